"""What the server takes on, with defaults; options of `retro serve` by the same names."""

from dataclasses import dataclass

from retro.common.values import Count, Positive, check_fields


@dataclass(frozen=True)
class GenerationLimits:
    """What one request, one batch and the queue may hold.

    Arguments:
        max_prompt_tokens: Tokens of the longest prompt; a longer one gets status 400.
        max_new_tokens: Tokens of the longest text that is written; a request for more gets status 400.
        max_neighbors: The largest number of neighbors of a chunk; a request for more gets status 400.
        max_batch: Texts that are written at once, and the most that one request may ask for.
        max_queue: Texts that may wait for one store; a request beyond gets status 429.
        max_seconds: Seconds of a request, waiting included; then it gets status 504.
        max_search_seconds: Seconds of a search of a store; then its requests get status 504, and the store is spared
            for a while: requests for it get status 503.
        max_stop_chars: Characters of the longest stop string; a longer one gets status 400.
        max_request_bytes: Bytes of the largest body of a request; a larger one gets status 413.
        grace_seconds: Seconds that requests have to end after SIGTERM or Ctrl-C.

    Raises ValueError for a limit that is not above 0, or no number.
    """

    max_prompt_tokens: Count = 4096
    max_new_tokens: Count = 1024
    max_neighbors: Count = 16
    max_batch: Count = 8
    max_queue: Count = 64
    max_seconds: Positive = 120.0
    max_search_seconds: Positive = 10.0
    max_stop_chars: Count = 256
    max_request_bytes: Count = 1_000_000
    grace_seconds: Positive = 10.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_queue < self.max_batch:
            raise ValueError(f"max_queue is {self.max_queue}; give at least the {self.max_batch} texts of max_batch.")
