"""What the server takes on, with defaults; options of `retro serve` by the same names."""

from dataclasses import dataclass

from retro.web.limits import check_above_zero, limit


@dataclass(frozen=True)
class Limits:
    """What one request, one batch and the queue may hold. Raises ValueError for a limit that is not above 0."""

    max_prompt_tokens: int = limit(4096, "longest prompt; longer ones get 400")
    max_new_tokens: int = limit(1024, "longest text written; more gets 400")
    max_neighbors: int = limit(16, "most neighbors per chunk; more gets 400")
    max_batch: int = limit(8, "texts written at once, and most of one request")
    max_queue: int = limit(64, "texts that may wait; beyond it requests get 429")
    max_seconds: float = limit(120.0, "time of a request, waiting included; then it gets 504")
    max_stop_chars: int = limit(256, "longest stop string; longer ones get 400")
    max_request_bytes: int = limit(1_000_000, "largest body of a request; larger ones get 413")
    grace_seconds: float = limit(10.0, "time that requests have to end after SIGTERM or Ctrl-C")

    def __post_init__(self) -> None:
        check_above_zero(self)
        if self.max_queue < self.max_batch:
            raise ValueError(f"max_queue is {self.max_queue}, less than the {self.max_batch} texts of max_batch.")
