"""What a server takes on, with defaults; options of `retro serve` by the same names."""

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
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{limit.name} is {value}; give a number above 0.")
        if self.max_queue < self.max_batch:
            raise ValueError(f"max_queue is {self.max_queue}, less than the {self.max_batch} texts of max_batch.")
