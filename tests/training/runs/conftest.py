"""Tiny real stores, built from text by the library with the stand-ins, and short runs over them."""

import json
import random
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.stand_ins import HashingEmbedder, make_words_tokenizer

MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "cca_layers": [2, 3],
    "encoder_num_layers": 1,
    "retrieved_len": 16,
}


def make_store(folder: Path, num_documents: int, seed: int, num_words=60, queries_of=None, chunk_len: int = 8):
    """Documents of 3 to 60 words, phrases of which occur in several; the neighbor table is written too."""
    from retro.retrieval import BuildSettings, Store, build_neighbors, build_store

    rng = random.Random(seed)
    phrases = [[f"w{random.Random(i).randrange(num_words)}" for _ in range(6)] for i in range(12)]
    file = folder.with_suffix(".jsonl")
    with open(file, "w") as out:
        for i in range(num_documents):
            tokens = sum((rng.choice(phrases) for _ in range(10)), [])[: rng.randint(3, 60)]
            out.write(json.dumps({"id": f"{folder.name}-{i}", "text": " ".join(tokens)}) + "\n")
    settings = BuildSettings(
        store=str(folder), inputs=[str(file)], tokenizer="words", chunk_len=chunk_len, min_chunk_len=2, index="none"
    )
    store = build_store(settings, embedder=HashingEmbedder(), tokenizer=make_words_tokenizer(num_words))
    build_neighbors(Store.open(queries_of) if queries_of else store, 2, queries=store if queries_of else None)
    return store.path


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Paths of three stores: "train", "valid" (with neighbors in train) and "other" (another tokenizer)."""
    folder = tmp_path_factory.mktemp("stores")
    train = make_store(folder / "train", 30, seed=1)
    return {
        "train": train,
        "valid": make_store(folder / "valid", 8, seed=2, queries_of=train),
        "other": make_store(folder / "other", 8, seed=3, num_words=61),
    }


@pytest.fixture(autouse=True)
def one_thread():
    """The same arithmetic here and in the processes that tests start."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one precision a process; the next Accelerator may take another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_settings(stores, tmp_path):
    """make_settings(output, **changes): the settings of a short run."""
    from retro.training.settings import TrainSettings

    def make(output: str = "run", **changes) -> TrainSettings:
        model = {**MODEL, **changes.pop("model", {})}
        values = dict(
            output=str(tmp_path / output),
            store=str(stores["train"]),
            valid_store=str(stores["valid"]),
            model=model,
            window_len=32,
            batch_size=2,
            max_steps=6,
            lr=1e-2,
            warmup_steps=2,
            eval_every=4,
            save_every=4,
            log_every=2,
        )
        return TrainSettings(**{**values, **changes})

    return make


@pytest.fixture
def prepare():
    """prepare(settings): a run set up for pretraining."""
    from retro.model import RetroForCausalLM
    from retro.training.setup import setup
    from retro.training.pretrain import model_config

    return lambda settings: setup(settings, model_config, RetroForCausalLM)
