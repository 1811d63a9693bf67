"""What a retrieval server takes on; options of `retro serve-store` by the same names."""

from dataclasses import dataclass

from retro.web.limits import check_above_zero


@dataclass(frozen=True)
class RetrievalLimits:
    """What one request, one search and the queue may hold.

    Arguments:
        max_queries: Queries of the largest request; a larger one gets status 400.
        max_query_bytes: Bytes of the longest query of text; a longer one gets status 400.
        max_query_tokens: Tokens of the longest query of tokens; a longer one gets status 400.
        max_neighbors: The largest number of neighbors of a query; a request for more gets status 400.
        max_retrieved_len: The largest number of tokens of a neighbor; a request for more gets status 400.
        max_answer_tokens: Tokens of the largest answer, queries x neighbors x tokens; a request for more gets status
            400.
        max_batch: Queries of different requests that are searched at once.
        max_queue: Queries that may wait; a request beyond gets status 429.
        max_seconds: Seconds of a request, waiting included; then it gets status 504.
        max_request_bytes: Bytes of the largest body of a request; a larger one gets status 413.
        grace_seconds: Seconds that requests have to end after SIGTERM or Ctrl-C.

    Raises ValueError for a limit that is not above 0.
    """

    max_queries: int = 1024
    max_query_bytes: int = 65_536
    max_query_tokens: int = 8192
    max_neighbors: int = 1024
    max_retrieved_len: int = 4096
    max_answer_tokens: int = 1 << 24
    max_batch: int = 4096
    max_queue: int = 16_384
    max_seconds: float = 60.0
    max_request_bytes: int = 32_000_000
    grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        check_above_zero(self)
        if self.max_queue < self.max_queries:
            raise ValueError(
                f"max_queue is {self.max_queue}; give at least the {self.max_queries} queries of max_queries."
            )
