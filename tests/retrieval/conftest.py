import pytest


@pytest.fixture(scope="session")
def tokenizer(words_tokenizer):
    return words_tokenizer
