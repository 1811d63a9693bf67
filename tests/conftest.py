"""Shared fixtures: tiny random models, stand-ins for speed; real weights are used where a test says so."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

ROOT = Path(__file__).parents[1]
CHECKED = (
    *("modules", "model", "text", "retrieval", "evaluation"),
    *("training/windows.py", "serve/rows.py", "serve/engine.py"),
)
NOT_CHECKED = ("settings.py", "config.py")  # what a user may get wrong there is refused in a sentence of our own


def pytest_addoption(parser):
    parser.addoption("--shapes", action="store_true", help="check the shapes and types of signatures in the library")


def pytest_configure(config):
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        places = [ROOT / "retro" / place for place in CHECKED]
        files = [file for place in places for file in ([place] if place.suffix else place.rglob("*.py"))]
        files = [file for file in files if file.name not in ("__init__.py", *NOT_CHECKED)]
        names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
        install_import_hook(names, "beartype.beartype")


TINY = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    chunk_len=4,
    retrieved_len=8,
    cca_layers=[2, 3],
    encoder_hidden_size=24,
    encoder_num_attention_heads=2,
    encoder_head_dim=8,
)


@pytest.fixture
def make_model():
    """make_model(seed=0, **overrides): a tiny RetroForCausalLM in evaluation mode, its weights spread out so that a
    wrong position or mask shows."""
    from retro.model import RetroConfig, RetroForCausalLM

    def make(seed: int = 0, **overrides) -> RetroForCausalLM:
        torch.manual_seed(seed)
        model = RetroForCausalLM(RetroConfig(**{"initializer_range": 0.3, **TINY, **overrides})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "bias" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def make_batch():
    """make_batch(model, n): tokens, neighbors and their mask; about a quarter of the neighbors missing, some short."""

    def make(model, n: int, b: int = 2, k: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        config = model.config
        shape = (b, n // config.chunk_len, k, config.retrieved_len)
        lengths = torch.randint(1, config.retrieved_len + 1, shape[:3], generator=generator)
        lengths[torch.rand(shape[:3], generator=generator) < 0.25] = 0
        return {
            "input_ids": torch.randint(0, config.vocab_size, (b, n), generator=generator),
            "neighbor_ids": torch.randint(0, config.vocab_size, shape, generator=generator),
            "neighbor_mask": torch.arange(config.retrieved_len) < lengths[..., None],
        }

    return make


@pytest.fixture(scope="session")
def words_tokenizer():
    from tests.stand_ins import make_words_tokenizer

    return make_words_tokenizer()


@pytest.fixture(scope="session")
def words_store(words_tokenizer, tmp_path_factory):
    """30 documents of 5 to 60 words in chunks of 8."""
    from tests.stand_ins import make_store, words

    texts = [words(5 + 7 * i % 56, seed=i) for i in range(30)]
    return make_store(tmp_path_factory.mktemp("words"), texts, words_tokenizer, chunk_len=8, min_chunk_len=2)


@pytest.fixture(scope="session")
def words_retriever(words_store):
    from retro.retrieval import Retriever
    from tests.stand_ins import HashingEmbedder

    return Retriever(words_store, embedder=HashingEmbedder(), retrieved_len=16)
