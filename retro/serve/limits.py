"""What the server takes on, with defaults; options of `retro serve` by the same names."""

from dataclasses import dataclass

from retro.web.limits import check_above_zero


@dataclass(frozen=True)
class GenerationLimits:
    """What one request, one batch and the queue may hold.

    Arguments:
        max_prompt_tokens: Tokens of the longest prompt; a longer one gets status 400.
        max_new_tokens: Tokens of the longest text that is written; a request for more gets status 400.
        max_neighbors: The largest number of neighbors of a chunk; a request for more gets status 400.
        max_batch: Texts that are written at once, and the most that one request may ask for.
        max_queue: Texts that may wait; a request beyond gets status 429.
        max_seconds: Seconds of a request, waiting included; then it gets status 504.
        max_stop_chars: Characters of the longest stop string; a longer one gets status 400.
        max_request_bytes: Bytes of the largest body of a request; a larger one gets status 413.
        grace_seconds: Seconds that requests have to end after SIGTERM or Ctrl-C.

    Raises ValueError for a limit that is not above 0.
    """

    max_prompt_tokens: int = 4096
    max_new_tokens: int = 1024
    max_neighbors: int = 16
    max_batch: int = 8
    max_queue: int = 64
    max_seconds: float = 120.0
    max_stop_chars: int = 256
    max_request_bytes: int = 1_000_000
    grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        check_above_zero(self)
        if self.max_queue < self.max_batch:
            raise ValueError(f"max_queue is {self.max_queue}; give at least the {self.max_batch} texts of max_batch.")
