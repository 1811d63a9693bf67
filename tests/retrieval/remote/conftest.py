"""The stores and the model of the server's tests."""

from tests.serve.conftest import make_engine, model, stores, tokenizer  # noqa: F401
