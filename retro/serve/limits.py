"""What servers take on, with defaults; options of `retro serve` and `retro serve-store` by the same names."""

from dataclasses import dataclass, field, fields
from typing import Any


def _limit(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """What one request, one batch and the queue may hold. Raises ValueError for a limit that is not above 0."""

    max_prompt_tokens: int = _limit(4096, "longest prompt; longer ones get 400")
    max_new_tokens: int = _limit(1024, "longest text written; more gets 400")
    max_neighbors: int = _limit(16, "most neighbors per chunk; more gets 400")
    max_batch: int = _limit(8, "texts written at once, and most of one request")
    max_queue: int = _limit(64, "texts that may wait; beyond it requests get 429")
    max_seconds: float = _limit(120.0, "time of a request, waiting included; then it gets 504")
    max_stop_chars: int = _limit(256, "longest stop string; longer ones get 400")
    max_request_bytes: int = _limit(1_000_000, "largest body of a request; larger ones get 413")
    grace_seconds: float = _limit(10.0, "time that requests have to end after SIGTERM or Ctrl-C")

    def __post_init__(self) -> None:
        _check_above_zero(self)
        if self.max_queue < self.max_batch:
            raise ValueError(f"max_queue is {self.max_queue}, less than the {self.max_batch} texts of max_batch.")


@dataclass(frozen=True)
class RetrievalLimits:
    """What one request, one search and the queue may hold. Raises ValueError for a limit that is not above 0."""

    max_queries: int = _limit(1024, "most queries of one request; more get 400")
    max_query_bytes: int = _limit(65_536, "longest query of text; longer ones get 400")
    max_query_tokens: int = _limit(8192, "longest query of tokens; longer ones get 400")
    max_neighbors: int = _limit(1024, "most neighbors of a query; more get 400")
    max_retrieved_len: int = _limit(4096, "most tokens of a neighbor; more get 400")
    max_answer_tokens: int = _limit(1 << 24, "most tokens of an answer: queries x neighbors x tokens; more get 400")
    max_batch: int = _limit(4096, "queries of different requests that are searched at once")
    max_queue: int = _limit(16_384, "queries that may wait; beyond it requests get 429")
    max_seconds: float = _limit(60.0, "time of a request, waiting included; then it gets 504")
    max_request_bytes: int = _limit(32_000_000, "largest body of a request; larger ones get 413")
    grace_seconds: float = _limit(10.0, "time that requests have to end after SIGTERM or Ctrl-C")

    def __post_init__(self) -> None:
        _check_above_zero(self)
        if self.max_queue < self.max_queries:
            raise ValueError(f"max_queue is {self.max_queue}, less than the {self.max_queries} queries of max_queries.")


def _check_above_zero(limits: Any) -> None:
    for limit in fields(limits):
        value = getattr(limits, limit.name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{limit.name} is {value}; give a number above 0.")
