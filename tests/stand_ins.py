"""A hashing embedder, a tokenizer of words and small stores, so that tests need no weights unless they say so."""

import hashlib
import json

import numpy as np

from retro.retrieval import BuildSettings, Store, build_store


class HashingEmbedder:
    """Normalised sum of one random vector per word; the same text has the same key, shared words bring texts closer."""

    def __init__(self, dim=16, name="hashing", prefix=""):
        self.dim, self.prefix, self.num_truncated = dim, prefix, 0
        self.description = {"name": name, "dim": dim}
        self.fingerprint = hashlib.sha256(f"{name} {dim} {prefix}".encode()).hexdigest()
        self._vectors = {}

    def embed(self, texts, is_query=False):
        keys = np.stack([sum(map(self._vector, [self.prefix, *text.split()])) for text in texts])
        return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)

    def _vector(self, word):
        if word not in self._vectors:
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            self._vectors[word] = np.random.default_rng(seed).normal(size=self.dim)
        return self._vectors[word]


def make_words_tokenizer(num_words=100):
    """One token per word (w0, w1, ..., else unk), eos at the end of a document, no bos."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(num_words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_store(folder, texts, tokenizer, embedder=None, name="store", **settings) -> Store:
    """A store of texts (documents d0, d1, ...) with chunks of 4 tokens."""
    records = [{"id": f"d{i}", "text": text, "title": f"title {i}", "source": "here"} for i, text in enumerate(texts)]
    given = {"chunk_len": 4, "min_chunk_len": 1, "index": "none", **settings}
    inputs = [write_jsonl(folder / f"{name}.jsonl", records)]
    return build_store(
        BuildSettings(str(folder / name), inputs, "words", **given), embedder or HashingEmbedder(), tokenizer
    )


def words(count, seed=0, vocabulary=60):
    """A text of `count` words."""
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(0, vocabulary, count))
