"""What a retrieval server takes on; options of `retro serve-store` by the same names."""

from dataclasses import dataclass

from retro.web.limits import check_above_zero, limit


@dataclass(frozen=True)
class RetrievalLimits:
    """What one request, one search and the queue may hold. Raises ValueError for a limit that is not above 0."""

    max_queries: int = limit(1024, "most queries of one request; more get 400")
    max_query_bytes: int = limit(65_536, "longest query of text; longer ones get 400")
    max_query_tokens: int = limit(8192, "longest query of tokens; longer ones get 400")
    max_neighbors: int = limit(1024, "most neighbors of a query; more get 400")
    max_retrieved_len: int = limit(4096, "most tokens of a neighbor; more get 400")
    max_answer_tokens: int = limit(1 << 24, "most tokens of an answer: queries x neighbors x tokens; more get 400")
    max_batch: int = limit(4096, "queries of different requests that are searched at once")
    max_queue: int = limit(16_384, "queries that may wait; beyond it requests get 429")
    max_seconds: float = limit(60.0, "time of a request, waiting included; then it gets 504")
    max_request_bytes: int = limit(32_000_000, "largest body of a request; larger ones get 413")
    grace_seconds: float = limit(10.0, "time that requests have to end after SIGTERM or Ctrl-C")

    def __post_init__(self) -> None:
        check_above_zero(self)
        if self.max_queue < self.max_queries:
            raise ValueError(f"max_queue is {self.max_queue}, less than the {self.max_queries} queries of max_queries.")
