"""What a retrieval server takes on; options of `retro serve-store` by the same names."""

from dataclasses import dataclass

from retro.common.values import Count, Positive, check_fields


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

    Raises ValueError for a limit that is not above 0, or no number.
    """

    max_queries: Count = 1024
    max_query_bytes: Count = 65_536
    max_query_tokens: Count = 8192
    max_neighbors: Count = 1024
    max_retrieved_len: Count = 4096
    max_answer_tokens: Count = 1 << 24
    max_batch: Count = 4096
    max_queue: Count = 16_384
    max_seconds: Positive = 60.0
    max_request_bytes: Count = 32_000_000
    grace_seconds: Positive = 10.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_queue < self.max_queries:
            raise ValueError(
                f"max_queue is {self.max_queue}; give at least the {self.max_queries} queries of max_queries."
            )
