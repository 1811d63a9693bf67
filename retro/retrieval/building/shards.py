"""The middle of a build: the parts that were read are merged into shards, in the order of the inputs.

    read parts -> merge (ids, copies, which shard) -> tables of a shard -> keys of its blocks -> keys.npy

The work is in the tasks of retro.retrieval.building.tasks. Records are taken in as they come, but parts in
their order only, so that the shards do not depend on who read what when.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from retro.common.files import delete, file_record, json_lines, stable_hash, sync, write_with
from retro.common.records import load_record, save_record
from retro.retrieval.building.ids import SeenIds
from retro.retrieval.building.job import PARTS, Job
from retro.retrieval.building.losses import warn_of_losses
from retro.retrieval.building.tasks import embedder_at_hand, signature_column
from retro.retrieval.embedding.embedder import Embedder
from retro.retrieval.executors.ranks import await_leader
from retro.retrieval.executors.tasks import Executor, Task, finished
from retro.retrieval.filters import Deduplicator
from retro.retrieval.store.store import Store
from retro.text.documents import InputPartition, Reject

log = logging.getLogger(__name__)

_JOB_FILE = "job.json"  # in it: whose work it is
PART_BYTES = 8 << 20  # of the inputs in a part; of no effect on the store
KEY_ROWS = 1024  # chunks embedded by one task; batches are made of these
_EXISTING = -1  # number of the documents that the store has, among those of parts


def merge_parts(
    job: Job,
    partitions: Sequence[InputPartition],
    embedder: Embedder,
    executor: Executor,
    duplicates: Deduplicator | None = None,
    existing: Store | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Read partitions of inputs into new shards of a store, after those of its `existing` generation.

    What an unfinished call for the same job has done is not done again. duplicates: what knows the copies, those of
    the existing documents too.
    Returns {"shards": records, "counts", "rejects": {file: record}}; {} in a rank that does not lead.
    """
    _begin(job, executor, _identity(job.plan, existing), is_first=existing is None)
    parts = _grouped(partitions)
    with _ProgressBars(
        progress and executor.leads, sum(partition.bytes for partition in partitions), embedder.dim > 0
    ) as bars:
        state = _BuildState(job, parts, executor, bars, duplicates, existing, embedder.dim)
        with embedder_at_hand(embedder):
            executor.run(job.folder, state.reads(), state.on_done)
    return state.result() if executor.leads else {}


def remove_parts(path: Path, plan: dict[str, Any] | None = None) -> None:
    """Delete a store's work in progress, once a manifest names the shards; with `plan`, only that of its build."""
    if plan is None or _is_of(path, _identity(plan, None)):
        delete(path / PARTS)


def _identity(plan: dict[str, Any], existing: Store | None) -> str:
    """A hash of what decides the bytes of the shards that a plan makes, and of who makes them."""
    named = {name: plan[name] for name in ("inputs", "held_out", "chunk_len", "key_dtype", "settings")}
    named["library_version"] = plan["library_version"]
    named |= {name: plan[name]["fingerprint"] for name in ("tokenizer", "embedder")}
    named["existing"] = existing and [record["files"] for record in existing.shards]
    if existing and plan["settings"].get("deduplicate"):
        named["removed"] = existing.manifest.get("removed")  # no longer a reason to leave a copy out
    return stable_hash(named)


def _is_of(path: Path, identity: str) -> bool:
    file = path / PARTS / _JOB_FILE
    try:
        return file.is_file() and load_record(file)["identity"] == identity
    except FileNotFoundError:  # rank 0 has just removed it
        return False


def _begin(job: Job, executor: Executor, identity: str, is_first: bool) -> None:
    """Make the folder of the job ready; work in progress of another job is deleted. Ranks above 0 wait for it."""
    if not executor.leads:

        def is_ready() -> bool:
            return _is_of(job.path, identity) or (is_first and _is_complete(job.path))

        return await_leader(executor, is_ready, "begun")
    if not _is_of(job.path, identity):
        if job.folder.exists():
            log.info("deleting %s, which is of other work", job.folder)
            delete(job.folder)
        job.folder.mkdir()
        (job.path / "shards").mkdir(exist_ok=True)
        sync(job.path)
        save_record(job.folder / _JOB_FILE, {"identity": identity})


def _is_complete(path: Path) -> bool:
    manifest = path / "manifest.json"
    return manifest.is_file() and load_record(manifest).get("state") == "complete"


def _grouped(partitions: Sequence[InputPartition]) -> list[list[InputPartition]]:
    """Partitions in parts of about PART_BYTES, in order."""
    parts: list[list[InputPartition]] = []
    size = 0
    for partition in partitions:
        if not parts or size + partition.bytes > PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(partition)
        size += partition.bytes
    return parts


@dataclass
class _NewShard:
    """A new shard: where it stands, and what its tasks have brought so far."""

    name: str
    first_row: int
    first_document: int
    runs: list[list[Any]] = field(default_factory=list)
    rows: int = 0
    documents: int = 0
    blocks: dict[str, int | None] = field(default_factory=dict)  # truncated chunks of each, once it is there
    record: dict[str, Any] = field(default_factory=dict)

    def append(self, part: str, row: int, num_chunks: int) -> None:
        """Take a document in: a row of a part's table."""
        if self.runs and self.runs[-1][0] == part and self.runs[-1][2] == row:
            self.runs[-1][2] = row + 1
        else:
            self.runs.append([part, row, row + 1])
        self.rows += num_chunks
        self.documents += 1

    def take_files(self, record: dict[str, Any]) -> None:
        """Add what a task wrote into the shard's folder."""
        files = {path.rpartition("/")[2]: file for path, file in record["files"].items()}
        self.record = {**self.record, **record, "files": {**self.record.get("files", {}), **files}}


class _BuildState:
    """The state of a build between its tasks."""

    def __init__(
        self,
        job: Job,
        parts: list[list[InputPartition]],
        executor: Executor,
        bars: _ProgressBars,
        duplicates: Deduplicator | None,
        existing: Store | None,
        dim: int,
    ) -> None:
        self.job, self.executor, self.bars, self.duplicates = job, executor, bars, duplicates
        self.existing, self.ids = existing, SeenIds()
        self.parts = [
            (job.read(number, partitions), sum(partition.bytes for partition in partitions))
            for number, partitions in enumerate(parts)
        ]
        self.count: Counter[str] = Counter()
        self.lost: dict[str, str] | None = None  # the first text that the tokenizer loses something of
        self.filtered_by: Counter[str] = Counter()
        self.key_rows = KEY_ROWS if dim else job.shard_chunks
        self.shards: dict[str, _NewShard] = {}
        self._open: _NewShard | None = None
        self._last: _NewShard | None = None
        self._resumed: set[str] = set()  # blocks that were there
        self._read: dict[str, dict[str, Any]] = {}  # records of parts that wait for the ones before them
        self._num_merged = 0
        self._left_out: dict[
            str, dict[int, str | None]
        ] = {}  # by part and row of its table: copies, and why; ids twice
        self._rejected: dict[str, list[dict[str, Any]]] = {}  # of ids that are given twice, by part
        records = existing.shards if existing else []
        self._next_name = 1 + max((int(record["name"]) for record in records), default=-1)
        self._first_row = sum(record["rows"] for record in records)
        self._first_document = sum(record["documents"] for record in records)
        for number in range(len(records)):
            self.ids.add(existing.live_ids(number), _EXISTING)

    def reads(self) -> Iterator[Task]:
        """The tasks to begin with."""
        return (task for task, _ in self.parts)

    def on_done(self, task: Task, record: dict[str, Any]) -> list[Task]:
        """Take in the record of a task; the tasks that it makes possible."""
        if task.name.startswith("read-"):
            return self._part_read(task, record)
        shard = self.shards[task.spec["shard"]]
        if task.name.startswith("tables-"):
            return self._tables_written(shard, record)
        if task.name.startswith("keys-"):
            return self._block_embedded(shard, task, record)
        return self._keys_joined(shard, record)

    # Parts, in their order

    def _part_read(self, task: Task, record: dict[str, Any]) -> list[Task]:
        self._read[task.name] = record
        tasks: list[Task] = []
        while self._num_merged < len(self.parts) and self.parts[self._num_merged][0].name in self._read:
            part, size = self.parts[self._num_merged]
            tasks += self._merge(part.name, self._read.pop(part.name))
            self._num_merged += 1
            self.bars.merged(size, self._num_chunks())
        if self._num_merged == len(self.parts):
            tasks += self._close_shard()
            if not self.shards:
                said = ", ".join(f"{self.count[name]} {name}" for name in ("read", "empty", "filtered", "rejected"))
                left = " that the filters leave" if self.count["filtered"] else ""
                raise ValueError(f"the inputs hold no document with text{left} ({said}); give at least one")
        return tasks

    def _merge(self, part: str, record: dict[str, Any]) -> list[Task]:
        """Take a part's documents in, one after another."""
        self.count.update(record["count"])
        self.lost = self.lost or record["lost"]
        columns = _columns(self.job.folder / f"{part}.parquet", "id", "place", "filtered", "signature", "num_tokens")
        known, tasks = self._known_ids(columns[0]), []
        for row, (name, place, filtered, signature, num_tokens) in enumerate(zip(*columns, strict=True)):
            if filtered is None and num_tokens:
                first = known.get(name)
                copy = self._copy(name, signature, place, is_new=first is None)
                if copy is not None:
                    filtered = self._left_out.setdefault(part, {})[row] = json.dumps(copy)
                elif first is not None:
                    self._refuse_id(part, row, name, place, first)
                    continue
                elif name in known:
                    known[name] = place
            if filtered is not None:
                self.count["filtered"] += 1
                self.filtered_by[json.loads(filtered)["filter"]] += 1
            elif not num_tokens:
                self.count["empty"] += 1
            else:
                self.count["kept"] += 1
                tasks += self._append(part, row, -(-num_tokens // self.job.plan["chunk_len"]))
        return tasks

    def _copy(self, name: str, signature: bytes | None, place: str, is_new: bool) -> dict[str, Any] | None:
        """The record of a document whose text was there before. One of a new id is known from now on."""
        if self.duplicates is None:
            return None
        return (self.duplicates.add if is_new else self.duplicates.find)(name, signature, place)

    def _known_ids(self, names: list[str]) -> dict[str, str | None]:
        """The ids of a part that may be given twice: where a document of it was kept before, None if nowhere yet."""
        again = self.ids.add(names, self._num_merged)
        known: dict[str, str | None] = {names[at]: None for at in again}
        if known and self.existing:
            there = self.existing.find_documents(list(known))
            known |= dict.fromkeys(there, str(self.existing.path))
        for number in sorted(set().union(*again.values()) - {self._num_merged, _EXISTING}):
            part = self.parts[number][0].name
            columns = _columns(self.job.folder / f"{part}.parquet", "id", "place", "filtered", "num_tokens")
            for row, (name, place, filtered, num_tokens) in enumerate(zip(*columns, strict=True)):
                if name in known and filtered is None and num_tokens and row not in self._left_out.get(part, ()):
                    known[name] = place
        return known

    def _refuse_id(self, part: str, row: int, name: str, place: str, first: str) -> None:
        """List a document as rejected because of its id, or ValueError."""
        in_store = self.existing is not None and first == str(self.existing.path)
        reason = f"the document id {name!r} is " + ("in the store already" if in_store else f"that of {first} as well")
        if self.job.on_bad == "error":
            remedy = (
                "remove that document first, or give this one another id" if in_store else "ids must be unique: mend it"
            )
            raise ValueError(f"{place}: {reason}; {remedy}, or take on_bad=reject to leave it out")
        file, _, line = place.rpartition(":")
        record = Reject(file, int(line), reason) if line.isdigit() else Reject(place, 1, reason)
        self.count["rejected"] += 1
        self._left_out.setdefault(part, {})[row] = None
        self._rejected.setdefault(part, []).append(asdict(record))

    def _append(self, part: str, row: int, num_chunks: int) -> list[Task]:
        closed: list[Task] = []
        if self._open is not None and self._open.rows + num_chunks > self.job.shard_chunks:
            closed = self._close_shard()
        if self._open is None:
            last = self._last
            first_row = last.first_row + last.rows if last else self._first_row
            first_document = last.first_document + last.documents if last else self._first_document
            self._open = _NewShard(f"{self._next_name + len(self.shards):05d}", first_row, first_document)
        self._open.append(part, row, num_chunks)
        return closed

    def _close_shard(self) -> list[Task]:
        if self._open is None:
            return []
        shard, self._open = self._open, None
        self.shards[shard.name] = self._last = shard
        signature = self.duplicates and signature_column(self.duplicates)
        task = self.job.tables(shard.name, shard.runs, shard.rows, signature)
        shard.runs = []
        return [task]

    def _num_chunks(self) -> int:
        return sum(shard.rows for shard in self.shards.values()) + (self._open.rows if self._open else 0)

    # Shards, in any order

    def _tables_written(self, shard: _NewShard, record: dict[str, Any]) -> list[Task]:
        assert (record["rows"], record["documents"]) == (shard.rows, shard.documents)
        shard.take_files(record)
        join = self.job.join(shard.name, [], shard.rows, 0)
        if finished(self.job.folder, join.name) is not None:  # its blocks are gone
            self.bars.embedded(shard.rows, resumed=True)
            return [join]
        starts = range(0, shard.rows, self.key_rows)
        stops = [min(start + self.key_rows, shard.rows) for start in starts]
        tasks = [self.job.keys(shard.name, shard.first_row, *span) for span in zip(starts, stops, strict=True)]
        shard.blocks = {task.name: None for task in tasks}
        self._resumed |= {task.name for task in tasks if finished(self.job.folder, task.name) is not None}
        return tasks

    def _block_embedded(self, shard: _NewShard, task: Task, record: dict[str, Any]) -> list[Task]:
        self.bars.embedded(task.spec["stop"] - task.spec["start"], resumed=task.name in self._resumed)
        shard.blocks[task.name] = record["truncated_chunks"]
        if None in shard.blocks.values():
            return []
        return [self.job.join(shard.name, list(shard.blocks), shard.rows, sum(shard.blocks.values()))]

    def _keys_joined(self, shard: _NewShard, record: dict[str, Any]) -> list[Task]:
        shard.take_files(record)
        if not self.executor.shared:
            for name in shard.blocks:
                (self.job.folder / f"{name}.npy").unlink(missing_ok=True)
                (self.job.folder / f"{name}.json").unlink(missing_ok=True)
        shard.blocks = {}
        return []

    # The end

    def result(self) -> dict[str, Any]:
        """Write rejects/, and say what has been made."""
        generation = self.job.plan["generation"]
        shards = []
        for shard in self.shards.values():
            place = {"name": shard.name, "first_row": shard.first_row, "first_document": shard.first_document}
            shards.append({**shard.record, **place, "generation": generation})
        counts: dict[str, Any] = {name: self.count[name] for name in ("read", "kept", "empty", "filtered", "rejected")}
        assert counts["read"] == sum(counts.values()) - counts["read"], counts
        counts["filtered_by"] = dict(sorted(self.filtered_by.items()))
        for name in ("tokens", "bytes", "short_chunks", "truncated_chunks"):
            counts[name] = sum(record[name] for record in shards)
        counts["chunks"] = sum(record["rows"] for record in shards)
        counts["documents"] = sum(record["documents"] for record in shards)
        counts["unknown_tokens"] = self.count["unknown_tokens"]  # the others depend on how the inputs are split
        warn_of_losses(self.job.plan["tokenizer"]["name"], self.count, self.lost)
        if counts["truncated_chunks"]:
            said = (counts["truncated_chunks"], counts["chunks"])
            log.warning("%d of %d chunk texts were cut to the embedder's maximum length", *said)
        return {"shards": shards, "counts": counts, "rejects": self._write_rejects(generation)}

    def _write_rejects(self, generation: int) -> dict[str, Any]:
        """Write rejected.jsonl and filtered.jsonl, those of a later generation in a folder of its own."""
        folder = self.job.path / "rejects"
        place = folder if generation == 1 else folder / f"{generation:05d}"
        place.mkdir(parents=True, exist_ok=True)
        sync(folder)
        write_with(place / "rejected.jsonl", self._write_rejected)
        write_with(place / "filtered.jsonl", self._write_filtered)
        files = [place / "rejected.jsonl", place / "filtered.jsonl"]
        return {file.relative_to(folder).as_posix(): file_record(file) for file in files}

    def _write_rejected(self, handle: IO[bytes]) -> None:
        for part, _ in self.parts:
            with open(self.job.folder / f"{part.name}.jsonl", "rb") as rejected:
                shutil.copyfileobj(rejected, handle)
            handle.write(json_lines(self._rejected.get(part.name, [])))

    def _write_filtered(self, handle: IO[bytes]) -> None:
        for part, _ in self.parts:
            copies = self._left_out.get(part.name, {})
            (column,) = _columns(self.job.folder / f"{part.name}.parquet", "filtered")
            for row, verdict in enumerate(column):
                if (verdict := verdict or copies.get(row)) is not None:
                    handle.write(json_lines([json.loads(verdict)]))


def _columns(path: Path, *names: str) -> list[list[Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=list(names))
    return [table.column(name).to_pylist() for name in names]


class _ProgressBars:
    """What has been read, of the bytes of the inputs, and embedded, of the chunks there are or will be."""

    def __init__(self, shown: bool, num_bytes: int, embeds: bool) -> None:
        from tqdm.auto import tqdm

        common = {"disable": not shown or None, "smoothing": 0.05}  # None: in no file, which would hold control codes
        self._bytes = num_bytes
        self._read = tqdm(total=num_bytes, desc="reading", unit=" B", unit_scale=True, position=0, **common)
        common["disable"] = not (shown and embeds) or None
        self._embedded = tqdm(total=None, desc="embedding", unit=" chunks", position=1, **common)

    def merged(self, num_bytes: int, num_chunks: int) -> None:
        """A part is merged; all merged parts hold so many chunks."""
        self._read.update(num_bytes)
        share = self._read.n / self._bytes if self._bytes else 1.0
        self._embedded.total = round(num_chunks / share) if share else None
        self._embedded.refresh()

    def embedded(self, num_chunks: int, resumed: bool) -> None:
        """So many chunks have their keys; resumed ones are no part of the rate."""
        if self._embedded.disable:
            return
        if resumed:
            self._embedded.initial += num_chunks
            self._embedded.n += num_chunks
        else:
            self._embedded.update(num_chunks)

    def __enter__(self) -> _ProgressBars:
        return self

    def __exit__(self, *error: object) -> None:
        self._read.close()
        self._embedded.close()
