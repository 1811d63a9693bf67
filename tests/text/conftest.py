from tests.retrieval.conftest import tokenizer  # noqa: F401
