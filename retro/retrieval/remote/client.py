"""The client of a retrieval server (`retro serve-store`): called as a Retriever is, with the same answers.

Where a server is started is where its embedder and its indexes run; a client needs neither.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np
from jaxtyping import Bool, Int, Int64

from retro.common.files import check_files
from retro.common.own import check_names
from retro.common.values import check_record
from retro.retrieval.neighbors import Neighbors, Source
from retro.retrieval.remote.wire import ABOUT, COUNTS, ROW_TOKENS, Wanted, unpack, unpack_neighbors, unpack_sources
from retro.retrieval.retriever import Retriever
from retro.retrieval.search.exact import check_k
from retro.retrieval.search.queries import as_lists
from retro.retrieval.store.store import Store
from retro.text.chunks import decode_chunks, tokenizer_fingerprint
from retro.text.tokenizer import open_tokenizer
from retro.web.listening import API_KEY

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between tries
_REMEDY = "is it a retrieval server of this version?"
T = TypeVar("T")


def is_url(store: Any) -> bool:
    """Whether what is given as a store is the address of a retrieval server."""
    return isinstance(store, str) and store.startswith(("http://", "https://"))


class RemoteRetriever:
    """Nearest chunks of the store behind a retrieval server, for any text or tokens.

    Arguments:
        url: of the server, as it prints it.
        timeout: seconds that a request may take, tries and waiting included; a call of more queries than the server
            takes at once is several requests.
        num_neighbors, retrieved_len: k and r where a call does not say otherwise; None takes the server's.
        retries: how often a request is sent again when the connection is lost, or the server busy.
        api_key: bearer token; None takes that of the environment's RETRO_API_KEY, if there is one.
        tokenizer: if given, it must be the store's.
        fingerprint: if given, it must be the store's: that of a model's retro.json, or of a run before.

    Raises ValueError for what the server refuses, ConnectionError if it cannot be reached, TimeoutError if it is late.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        num_neighbors: int | None = None,
        retrieved_len: int | None = None,
        retries: int = 3,
        api_key: str | None = None,
        tokenizer: Any = None,
        fingerprint: str | None = None,
    ) -> None:
        if timeout <= 0 or retries < 0:
            raise ValueError(f"timeout must be above 0 and retries at least 0, not {timeout} and {retries}")
        self._server = _Server(url, timeout, retries, os.environ.get(API_KEY) if api_key is None else api_key)
        about = self._server.about()
        self.store, self.index = RemoteStore(self._server, about), RemoteIndex(self._server.url, about)
        self.num_neighbors = about["num_neighbors"] if num_neighbors is None else num_neighbors
        self.retrieved_len = about["retrieved_len"] if retrieved_len is None else retrieved_len
        if self.num_neighbors < 1 or self.retrieved_len < 1:
            given = f"{self.num_neighbors} and {self.retrieved_len}"
            raise ValueError(f"num_neighbors and retrieved_len must be at least 1, not {given}")
        self.shards_total: int | None = about["index"]["shards_total"]
        self._latest = threading.local()
        if fingerprint not in (None, self.store.fingerprint):
            raise ValueError(
                f"{url} serves the store {self.store.fingerprint[:12]}, not {fingerprint[:12]}; "
                "ask for that one's server, or leave fingerprint out"
            )
        if tokenizer is not None:
            self.store.check_tokenizer(tokenizer)

    def __call__(
        self,
        queries: Any,
        num_neighbors: int | None = None,
        exclude_documents: Sequence[set[str]] | None = None,
        mask: Bool[np.ndarray, "q m"] | None = None,
        against: Sequence[str] | None = None,
    ) -> Neighbors:
        """The k nearest chunks of each query and what follows them; see `Retriever.__call__`."""
        k, lists = self.num_neighbors if num_neighbors is None else num_neighbors, as_lists(queries, mask)
        check_k(k)
        for name, given in (("exclude_documents", exclude_documents), ("against", against)):
            if given is not None and len(given) != len(lists):
                raise ValueError(f"{name} must hold one item per query ({len(lists)}), not {len(given)}")
        size = self.store.most_queries(k * self.retrieved_len)
        there = {"num_rows": self.store.num_chunks, "num_tokens": self.store.num_tokens}
        parts, answered = [], []
        for start in range(0, len(lists), size) or (0,):
            part = slice(start, start + size)
            asked = {"queries": lists[part], "num_neighbors": k, "retrieved_len": self.retrieved_len}
            if exclude_documents is not None:
                asked["exclude_documents"] = [sorted(names) for names in exclude_documents[part]]
            if against is not None:
                asked["against"] = list(against[part])
            asked["store_fingerprint"] = self.store.fingerprint
            read = partial(unpack_neighbors, shape=(len(lists[part]), k, self.retrieved_len), **there)
            found, about = self._server.read("POST", "/v1/search", read, asked)
            parts.append(found)
            answered.append(about.get("shards_answered"))
        self._latest.answered = None if None in answered else min(answered)
        return parts[0] if len(parts) == 1 else _joined(parts)

    @property
    def shards_answered(self) -> int | None:
        """How many shards answered this thread's latest call; None where the server's search has none."""
        return getattr(self._latest, "answered", None)

    @property
    def timeout(self) -> float:
        """Seconds that a request may take."""
        return self._server.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._server.timeout = seconds

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_latest": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _latest=threading.local())

    show, records, measure = Retriever.show, Retriever.records, Retriever.measure  # call this one

    def sources(self, rows: Int64[np.ndarray, "q k"]) -> list[list[Source | None]]:
        """Where rows come from; None for row -1."""
        return self.store.sources(rows)


def _joined(parts: Sequence[Neighbors]) -> Neighbors:
    arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "tokens", "mask", "scores"))
    return Neighbors(*arrays, [line for part in parts for line in part.sources])


class RemoteIndex:
    """What a server says of its search."""

    def __init__(self, url: str, about: dict[str, Any]) -> None:
        self.url = url
        self.kind: str = about["index"]["kind"]
        self.num_rows: int = about["index"]["num_rows"]
        self.recall: float = about["index"]["recall"]


class RemoteStore:
    """What models, samplers and evaluation read of a store, from its server; arrays as `Store` gives them."""

    def __init__(self, server: _Server, about: dict[str, Any]) -> None:
        self._server = server
        self._limits: dict[str, Any] = about["limits"]
        self.path = server.url
        self.manifest: dict[str, Any] = about["manifest"]
        self.fingerprint: str = about["fingerprint"]
        self.chunk_len: int = self.manifest["chunk_len"]
        self.pad_token_id: int = self.manifest["pad_token_id"]
        self.num_tokens: int = self.manifest["tokenizer"]["vocab_size"]
        for name in COUNTS:
            setattr(self, name, about["counts"][name])

    tokenizer_fingerprint = Store.tokenizer_fingerprint
    embedder_fingerprint = Store.embedder_fingerprint

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer saved inside the store, fetched and compared with its checksums."""
        files = self.manifest["tokenizer"]["files"]
        check_names(f"the store of {self.path}", files)
        with tempfile.TemporaryDirectory() as folder:
            for name, record in files.items():
                data = self._server.ask("GET", f"/v1/store/tokenizer/{quote(name)}")
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(data)
                try:
                    check_files(Path(folder), {name: record}, checksums=True)
                except ValueError:
                    said = f"{self.path} sent a damaged tokenizer file {name}; restart the server"
                    raise ConnectionError(said) from None
            return open_tokenizer(folder)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that is not the one the store was built with, naming both."""
        found = tokenizer_fingerprint(tokenizer)
        if found != self.tokenizer_fingerprint:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise ValueError(
                f"the store behind {self.path} was built with the tokenizer {self.manifest['tokenizer']['name']} "
                f"({self.tokenizer_fingerprint[:12]}), not with {name} ({found[:12]}); serve a store of that tokenizer"
            )

    def most_queries(self, tokens_each: int) -> int:
        """How many queries, or rows, of so many tokens the server answers at once."""
        return max(min(self._limits["max_queries"], self._limits["max_answer_tokens"] // tokens_each), 1)

    def values(
        self, rows: Int[np.ndarray, "*rows"], retrieved_len: int
    ) -> tuple[Int64[np.ndarray, "*rows r"], Bool[np.ndarray, "*rows r"]]:
        """The values [N, F] of chunks; see `Store.values`."""

        def read(data: bytes, shape: tuple[int, int]) -> dict[str, np.ndarray]:
            return unpack(data, tokens=Wanted(np.int32, shape, 0, self.num_tokens), mask=Wanted(bool, shape))[1]

        asked, shape = {"what": "values", "retrieved_len": retrieved_len}, (*np.shape(rows), retrieved_len)
        parts = self._of_rows(rows, retrieved_len, asked, lambda data, n: read(data, (n, retrieved_len)))
        tokens = np.concatenate([part["tokens"] for part in parts]).astype(np.int64)
        return tokens.reshape(shape), np.concatenate([part["mask"] for part in parts]).reshape(shape)

    def chunks(self, rows: Int[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows m"]:
        """Token ids of chunks, padded with `pad_token_id`."""
        return self.values(rows, self.chunk_len)[0]

    def chunk_lens(self, rows: Int[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows"]:
        """Real tokens in each chunk; 0 where the document was removed."""
        return self.values(rows, self.chunk_len)[1].sum(-1)

    def token_lists(self, rows: Int[np.ndarray, "*rows"]) -> list[Int64[np.ndarray, " t"]]:
        """Token ids of chunks (flattened) without padding."""
        tokens, mask = self.values(np.asarray(rows).reshape(-1), self.chunk_len)
        return [ids[real] for ids, real in zip(tokens, mask, strict=True)]

    def text(self, rows: Int[np.ndarray, "*rows"]) -> list[str]:
        """Decoded text of chunks (flattened)."""
        return decode_chunks(self.tokenizer, self.token_lists(rows))

    def document_rows(self, rows: Int[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows"]:
        """The document row of each chunk."""

        def read(data: bytes, n: int) -> np.ndarray:
            return unpack(data, document_rows=Wanted(np.int64, (n,), 0, self.num_documents))[1]["document_rows"]

        parts = self._of_rows(rows, ROW_TOKENS, {"what": "document_rows"}, read)
        return np.concatenate(parts).reshape(np.shape(rows))

    def sources(self, rows: Int64[np.ndarray, "q k"]) -> list[list[Source | None]]:
        """Where rows come from; None for row -1."""
        read = lambda data, n: unpack_sources(unpack(data)[0], n)  # noqa: E731
        found = chain.from_iterable(self._of_rows(rows, ROW_TOKENS, {"what": "sources"}, read))
        return [[next(found) for _ in line] for line in rows]

    @cached_property
    def searchable_rows(self) -> Int64[np.ndarray, " c"]:
        """Rows that a search may return, all fetched at first use."""
        read = partial(unpack, rows=Wanted(np.int64, (self.num_searchable,), 0, self.num_chunks))
        return self._server.read("GET", "/v1/store/searchable_rows", read)[1]["rows"]

    @cached_property
    def document_ids(self) -> list[str]:
        """The ids of all documents, by document row, all fetched at first use."""

        def read(data: bytes) -> list[str]:
            names = json.loads(data)
            if not isinstance(names, list) or list(map(type, names)) != [str] * self.num_documents:
                raise ValueError(f"no ids of {self.num_documents} documents")
            return names

        return self._server.read("GET", "/v1/store/document_ids", read)

    def _of_rows(self, rows: Any, tokens_each: int, asked: dict[str, Any], read: Callable[[bytes, int], T]) -> list[T]:
        """What is read of the answers to as many requests as it takes; read: takes an answer and its number of rows."""
        flat, size = np.asarray(rows).reshape(-1), max(self._limits["max_answer_tokens"] // tokens_each, 1)
        answers = []
        for start in range(0, len(flat), size) or (0,):
            part = flat[start : start + size].tolist()
            sent = asked | {"rows": part, "store_fingerprint": self.fingerprint}
            answers.append(self._server.read("POST", "/v1/rows", partial(read, n=len(part)), sent))
        return answers


class _Server:
    """Requests to one server over connections that are kept and shared between threads, not between processes."""

    def __init__(self, url: str, timeout: float, retries: int, api_key: str | None) -> None:
        self.url, self.timeout, self.retries, self._api_key = url.rstrip("/"), timeout, retries, api_key
        parts = urlsplit(self.url)
        if not is_url(url) or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a retrieval server; give one as http://host:8001")
        self._idle: list[http.client.HTTPConnection] = []
        self._lock, self._process = threading.Lock(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "timeout": self.timeout, "retries": self.retries, "api_key": self._api_key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def about(self) -> dict[str, Any]:
        """What it says of itself."""
        said = self.read("GET", "/v1/store", json.loads)
        try:
            return check_record(f"what {self.url} says of itself", said, ABOUT, _REMEDY)
        except ValueError as error:
            raise ConnectionError(str(error)) from None

    def read(self, method: str, path: str, read: Callable[[bytes], T], asked: dict[str, Any] | None = None) -> T:
        """What is read of an answer; a ValueError of `read` says that it is none."""
        data = self.ask(method, path, asked)
        try:
            return read(data)
        except (ValueError, RecursionError) as error:
            raise ConnectionError(f"{self.url} sent what cannot be read: {error}; {_REMEDY}") from None

    def ask(self, method: str, path: str, asked: dict[str, Any] | None = None) -> bytes:
        """The body of an answer; a lost connection and a busy server are tried again, `retries` times within `timeout`.

        Raises ValueError with the server's sentence for what it refuses, ConnectionError and TimeoutError.
        """
        body = None if asked is None else json.dumps(asked).encode()
        deadline, lost, sent = time.monotonic() + self.timeout, "it is busy or far away", 0
        for tried in range(self.retries + 1):
            if tried:
                pause = min(_FIRST_PAUSE * 2 ** (tried - 1), _LONGEST_PAUSE)
                if time.monotonic() + pause >= deadline:
                    break
                time.sleep(pause)
            sent += 1
            try:
                status, data = self._send(method, path, body, deadline)
            except TimeoutError:
                raise TimeoutError(f"{self.url} has not answered within {self.timeout:g} seconds; {lost}") from None
            except (OSError, http.client.HTTPException) as error:
                lost = f"the connection was lost ({str(error).strip() or type(error).__name__})"
                continue
            if status == 200:
                return data
            lost = _sentence(status, data)
            if status == 504:
                raise TimeoutError(f"{self.url} said: {lost}")
            if status not in (429, 502, 503):
                raise (ValueError if status < 500 else ConnectionError)(f"{self.url} said: {lost}")
        raise ConnectionError(f"{self.url} gave no answer at {sent} tries: {lost}; is the server running?")

    def _send(self, method: str, path: str, body: bytes | None, deadline: float) -> tuple[int, bytes]:
        """One request; on a kept connection that the server has closed meanwhile, once more on a new one."""
        connection = self._take()
        if connection is not None:
            try:
                return self._exchange(connection, method, path, body, deadline)
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException):
                pass
        return self._exchange(self._connect(), method, path, body, deadline)

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, deadline: float
    ) -> tuple[int, bytes]:
        headers = {} if body is None else {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            connection.timeout = _left(deadline)  # of connecting, and of sending
            if connection.sock is not None:
                connection.sock.settimeout(connection.timeout)
            connection.response_class = partial(_Response, deadline=deadline)
            connection.request(method, urlsplit(self.url).path + path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        except BaseException:
            connection.close()
            raise
        if answer.will_close:
            connection.close()
        else:
            self._keep(connection)
        return answer.status, data

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port)

    def _take(self) -> http.client.HTTPConnection | None:
        with self._lock:
            if os.getpid() != self._process:  # a fork: its parent goes on using these
                self._idle, self._process = [], os.getpid()
            return self._idle.pop() if self._idle else None

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._idle.append(connection)


class _Response(http.client.HTTPResponse):
    """An answer that is read until a deadline, in however many pieces it comes."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **how: Any) -> None:
        super().__init__(sock, *args, **how)
        self.fp = io.BufferedReader(_Until(deadline, sock, self.fp.detach()))


class _Until(io.RawIOBase):
    def __init__(self, deadline: float, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._deadline, self._sock, self._raw = deadline, sock, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left(deadline: float) -> float:
    """Seconds until the deadline; TimeoutError if there are none."""
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _sentence(status: int, data: bytes) -> str:
    """What an error says."""
    try:
        return json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {status}"
