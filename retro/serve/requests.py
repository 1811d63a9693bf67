"""What a request may say. What would change the answer and is not done here is refused, never ignored."""

from __future__ import annotations

import secrets
import sys
from copy import deepcopy
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from retro.sampling import filled_up, prompt_tokens
from retro.serve.engine import Engine
from retro.serve.rows import Row
from retro.web.errors import HALF, MOST, ApiError, shown

bad = partial(ApiError, 400)
_ANYTHING = object()
# fields of OpenAI's API that are taken at these values only, at which they change nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "user": (_ANYTHING,),
    "metadata": (_ANYTHING,),
    "safety_identifier": (_ANYTHING,),
    "prompt_cache_key": (_ANYTHING,),
    "prompt_cache_retention": (_ANYTHING,),
    "service_tier": ("auto", "default"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
_NEUTRAL_COMPLETION = _NEUTRAL | {"suffix": ("",)}
_NEUTRAL_CHAT = _NEUTRAL | {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (_ANYTHING,),  # there are no tools
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


class _Strict(BaseModel):
    """Only the fields it has, of their own types; neutral ones are dropped, others refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data.keys() & cls.neutral.keys():
            if data[name] is not None and not any(_is(data[name], allowed) for allowed in cls.neutral[name]):
                said = f"{name} is {shown(data[name])}, which this server does not do; leave it out."
                raise bad(said, name, "unsupported")
        return {name: value for name, value in data.items() if name not in cls.neutral}


def _is(value: Any, allowed: Any) -> bool:
    return allowed is _ANYTHING or (value == allowed and isinstance(value, bool) == isinstance(allowed, bool))


_Text = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1})]  # an empty one has a sentence of its own
_TokenId = Annotated[int, Field(lt=MOST), WithJsonSchema({"type": "integer", "minimum": 0})]
_Count = Annotated[int, Field(ge=1, lt=MOST)]


class StreamOptions(_Strict):
    neutral = {"include_obfuscation": (False,)}
    include_usage: bool = False


class RetroOptions(_Strict):
    """The extra field `retro` of a request."""

    retrieval: bool = True
    store: str | None = Field(None, description="a name of /v1/stores; default: the first")
    num_neighbors: _Count | None = Field(None, description="k; default: the model's")
    align: Literal["start", "end"] = Field("start", description="end: what the prompt's end finds is read at once")


class _Sampling(_Strict):
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="default 1; 0 takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1)
    n: _Count | None = None
    seed: int | None = Field(None, ge=-MOST, lt=MOST)
    stop: _Text | Annotated[list[_Text], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    retro: RetroOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options is given without stream; set stream to true.", "stream_options")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(_Sampling):
    neutral = _NEUTRAL_COMPLETION
    prompt: _Text | list[_Text] | list[_TokenId] | list[list[_TokenId]]
    max_tokens: int | None = Field(
        None, ge=0, lt=MOST, description="0 writes nothing: echo and logprobs then tell of prompts"
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5, description="how many likeliest tokens to tell of each place")
    best_of: int | None = Field(None, description="as many as n")

    @model_validator(mode="after")
    def _all_are_given(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise bad(
                f"best_of is {self.best_of}, and n {self.n or 1}; all texts are given, so leave it out.", "best_of"
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    neutral = _NEUTRAL_MESSAGE
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "\n".join(parts)}


class ChatRequest(_Sampling):
    neutral = _NEUTRAL_CHAT
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="how many likeliest tokens to tell of each place")

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise bad("max_tokens and max_completion_tokens differ; give one of them.", "max_tokens")
        self.max_tokens = self.max_tokens or self.max_completion_tokens
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad("top_logprobs is given without logprobs; set logprobs to true.", "top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class RowMaker:
    """Requests to rows, within the limits. Has a copy of the tokenizer: threads must not share a fast one."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._tokenizer = engine, deepcopy(engine.tokenizer)
        self._positions = getattr(engine.model.config, "max_position_embeddings", None) or sys.maxsize

    @property
    def can_chat(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def max_prompt_tokens(self) -> int:
        return min(self.engine.limits.max_prompt_tokens, self._positions - 1)

    def max_new_tokens(self, num_prompt_tokens: int = 1) -> int:
        return min(self.engine.limits.max_new_tokens, self._positions - num_prompt_tokens)

    def max_neighbors(self, store: str) -> int:
        return min(self.engine.stores[store].index.num_rows, self.engine.limits.max_neighbors)

    def of_completion(self, request: CompletionRequest) -> list[Row]:
        """n rows for each prompt."""
        prompts = request.prompt
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        rows = self._rows(request, ids, 16, "prompt")
        for number, row in enumerate(rows if request.echo else []):
            prompt = prompts[number // (request.n or 1)]
            row.echo = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        return rows

    def of_chat(self, request: ChatRequest) -> list[Row]:
        """n rows for the messages as the model's chat template writes them."""
        if not self.can_chat:
            raise bad("this model's tokenizer has no chat template; use /v1/completions.", code="no_chat_template")
        messages = [message.plain() for message in request.messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise bad(f"the model's chat template refuses the messages: {error}.", "messages") from None
        ids = self._tokenizer(_readable(text, "messages"), add_special_tokens=False)["input_ids"]
        return self._rows(request, [ids], self.engine.limits.max_new_tokens, "messages")

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            text = _readable(prompt, "prompt")
            try:
                return prompt_tokens(self._tokenizer, [text])[0]
            except ValueError as error:
                raise bad(str(error), "prompt") from None
        wrong = [token for token in prompt if not 0 <= token < len(self._tokenizer)]
        if wrong:
            raise bad(f"{wrong[0]} is no token; they are 0 to {len(self._tokenizer) - 1}.", "prompt")
        return prompt

    def _rows(
        self, request: CompletionRequest | ChatRequest, prompts: list[list[int]], default_tokens: int, param: str
    ) -> list[Row]:
        n, max_batch = request.n or 1, self.engine.limits.max_batch
        if not 1 <= n * len(prompts) <= max_batch:
            raise bad(
                f"{len(prompts)} prompts with n = {n} make {n * len(prompts)} texts; ask for 1 to {max_batch}.", "n"
            )
        if not all(request.stops):
            raise bad("stop holds an empty string; leave it out.", "stop")
        longest = max((len(_readable(stop, "stop")) for stop in request.stops), default=0)
        if longest > self.engine.limits.max_stop_chars:
            raise bad(f"stop has {longest} characters; at most {self.engine.limits.max_stop_chars} are taken.", "stop")
        if request.retro and request.retro.retrieval and request.retro.align == "end":
            prompts = [filled_up(self._tokenizer, ids, self.engine.model.config.chunk_len) for ids in prompts]
        lengths = [self._length(request.max_tokens, default_tokens, len(ids), param) for ids in prompts]
        seed = secrets.randbits(31) if request.seed is None else request.seed
        store, k = self._retrieval(request.retro or RetroOptions())
        sampling = {
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "stops": request.stops,
            "num_logprobs": request.num_logprobs,
        }
        return [
            Row(prompts[i // n], lengths[i // n], seed=seed + i, store=store, num_neighbors=k, **sampling)
            for i in range(n * len(prompts))
        ]

    def _length(self, asked: int | None, default: int, num_prompt_tokens: int, param: str) -> int:
        """How many tokens to write after a prompt."""
        code = "context_length_exceeded"
        if num_prompt_tokens == 0:
            raise bad("the prompt has no tokens; give at least one character.", param)
        if num_prompt_tokens > self.max_prompt_tokens:
            said = f"the prompt has {num_prompt_tokens} tokens; this server reads at most {self.max_prompt_tokens}."
            raise bad(said, param, code)
        most = self.max_new_tokens(num_prompt_tokens)
        if asked is not None and asked > most:
            raise bad(f"max_tokens is {asked}; at most {most} can follow this prompt.", "max_tokens", code)
        return min(default, most) if asked is None else asked

    def _retrieval(self, options: RetroOptions) -> tuple[str | None, int | None]:
        """The store to read from and k; None and None for RETRO[OFF]."""
        stores = self.engine.stores
        if not options.retrieval:
            for name in ("store", "num_neighbors"):
                if getattr(options, name) is not None:
                    raise bad(f"retro.{name} is given with retro.retrieval false; leave one out.", f"retro.{name}")
            return None, None
        store = next(iter(stores)) if options.store is None else options.store
        if store not in stores:
            raise bad(f"retro.store is {shown(store)}; the stores are {', '.join(stores)}.", "retro.store")
        most = self.engine.limits.max_neighbors
        if (options.num_neighbors or 1) > most:
            said = f"retro.num_neighbors is {options.num_neighbors}; this server gives at most {most}."
            raise bad(said, "retro.num_neighbors")
        k = options.num_neighbors or self.engine.model.config.num_neighbors
        return store, max(1, min(k, self.max_neighbors(store)))


def _readable(text: str, param: str) -> str:
    """The text, refused if it holds half of a character, which JSON can spell and tokenizers cannot read."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise bad(HALF, param)
    return text
