"""Tiny real stores, built from text by the library, with an embedder that hashes words; and short runs over them."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

WORDS = [f"w{i}" for i in range(60)]
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "cca_layers": [2, 3],
    "encoder_num_layers": 1,
    "retrieved_len": 16,
}


class HashedWords:
    """A bag of hashed words: an embedder without weights."""

    dim, fingerprint, num_truncated = 16, "hashed-words", 0
    description = {"name": "hashed-words", "dim": 16}

    def embed(self, texts, is_query=False):
        keys = np.zeros((len(texts), self.dim), np.float32)
        for key, text in zip(keys, texts, strict=True):
            for word in text.split():
                key[hashlib.sha256(word.encode()).digest()[0] % self.dim] += 1
        return keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1)


def make_tokenizer(words=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def make_store(folder: Path, num_documents: int, seed: int, words=WORDS, queries_of=None, chunk_len: int = 8):
    """Documents of 3 to 60 words, phrases of which occur in several; the neighbor table is written too."""
    from retro.retrieval import BuildSettings, Store, build_neighbors, build_store

    rng = random.Random(seed)
    phrases = [[random.Random(i).choice(words) for _ in range(6)] for i in range(12)]
    file = folder.with_suffix(".jsonl")
    with open(file, "w") as out:
        for i in range(num_documents):
            tokens = sum((rng.choice(phrases) for _ in range(10)), [])[: rng.randint(3, 60)]
            out.write(json.dumps({"id": f"{folder.name}-{i}", "text": " ".join(tokens)}) + "\n")
    settings = BuildSettings(
        store=str(folder), inputs=[str(file)], tokenizer="words", chunk_len=chunk_len, min_chunk_len=2, index="none"
    )
    store = build_store(settings, embedder=HashedWords(), tokenizer=make_tokenizer(words))
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
        "other": make_store(folder / "other", 8, seed=3, words=[*WORDS, "extra"]),
    }


@pytest.fixture(autouse=True)
def one_thread():
    """The same arithmetic here and in the processes that tests start."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_settings(stores, tmp_path):
    """make_settings(output, **changes): the settings of a short run."""
    from retro.train.settings import TrainSettings

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
    from retro.train.loop import setup
    from retro.train.pretrain import model_config

    return lambda settings: setup(settings, model_config, RetroForCausalLM)
