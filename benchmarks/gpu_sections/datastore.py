"""Sections `embedding` and `search`: keys of chunks, exact search and the kNN join, each beside what bounds it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_sections.bench import Bench, Figures
from made_stores import recall
from synthetic import SyntheticKeys, write_synthetic_store
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from retro.retrieval import Store, build_index, build_neighbors, load_embedder

K = 10
SCORES = 1 << 29  # of the bare product at a time: 2 GiB


def embedding(bench: Bench) -> None:
    """Chunks a second of texts about as long as chunks of 64 tokens, by a BERT-base of random weights in bfloat16.

    Tokenization is part of it. sentence-transformers takes batches of a fixed number of texts: its best is the peer.
    """
    with tempfile.TemporaryDirectory() as folder:
        made_up_encoder(bench, folder)
        texts = made_up_texts(bench.pick(32_768, 24))
        embedder = load_embedder(folder, similarity="cosine", device=bench.device.type)
        weights = sum(
            p.numel() for name, p in embedder.model.named_parameters() if p.ndim > 1 and "embedding" not in name
        )
        tokens = sum(map(len, embedder.tokenizer(texts)["input_ids"]))

        def rate(run: Callable[[], Any]) -> Figures:
            seconds = bench.seconds(run, rounds=5, warm_up=1, at_most=10.0)
            share = bench.share(2 * weights * tokens, seconds)
            return {"seconds": seconds, "chunks_per_second": len(texts) / seconds, "share_of_product": share}

        bench.case("retro", lambda: rate(lambda: embedder.embed(texts)))
        compiled = load_embedder(folder, similarity="cosine", device=bench.device.type)
        compiled.passages.compile(bench.compiler.get("backend", "inductor"))
        bench.case("retro, compiled", lambda: rate(lambda: compiled.embed(texts)))
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            print("  sentence-transformers is not installed and is left out; pip install sentence-transformers")
            return
        dtype = {"dtype": getattr(torch, embedder.passages.dtype)}
        peer = SentenceTransformer(folder, device=bench.device.type, model_kwargs=dtype)
        options = {"normalize_embeddings": True, "show_progress_bar": False}
        for size in bench.pick((32, 256, 1024), (8,)):  # 32 is encode's own
            encode = partial(peer.encode, texts, batch_size=size, **options)
            bench.case(f"sentence-transformers, batches of {size}", partial(rate, encode))
        difference = float(np.abs(embedder.embed(texts[:256]) - peer.encode(texts[:256], **options)).max())
        bench.tell("keys of both", {"difference": difference})


def made_up_encoder(bench: Bench, folder: str) -> None:
    """BERT-base without training, with a tokenizer of made-up pieces of words."""
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    pieces = [*names.values(), *made_up_pieces(), *(f"##{piece}" for piece in made_up_pieces())]
    backend = BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, model_max_length=512, **names)
    tokenizer.save_pretrained(folder)
    tiny = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    BertModel(BertConfig(vocab_size=len(pieces), **bench.pick({}, tiny))).save_pretrained(folder)


def made_up_pieces() -> list[str]:
    """Syllables and pairs of them, 11,130."""
    syllables = [a + b for a in "bdfghjklmnprstvwxyz" for b in "aeiou"] + list("abcdefghij")
    return syllables + [a + b for a in syllables for b in syllables]


def made_up_texts(count: int) -> list[str]:
    """Words of one piece or two, about 64 tokens each; one text in eight is shorter, as at the end of a document."""
    draw = np.random.default_rng(0)
    pieces = np.asarray(made_up_pieces())
    lens = np.where(draw.random(count) < 0.125, draw.integers(4, 48, count), 46)
    return [" ".join(map("".join, draw.choice(pieces, (n, 2))[:, : 1 + i % 2])) for i, n in enumerate(lens)]


# Search


def search(bench: Bench) -> None:
    """Exact search and the kNN join over clustered keys, beside the same by torch alone with the keys on the card.

    Bare: the float32 product, as exact search has it, and the top k, nothing else; the keys are there already. The
    recall is against it.
    """
    rows, dim, asked = bench.pick((1_000_000, 384, (64, 4096)), (2000, 32, (8,)))
    joined = bench.pick(131_072, 500)
    with tempfile.TemporaryDirectory() as folder:
        large = write_synthetic_store(Path(folder) / "store", rows, dim, "float16")
        keys = torch.from_numpy(large.key_block(0, rows)).to(bench.device)
        halves = keys.square().sum(1) / 2
        for count in asked:
            queries = SyntheticKeys(rows, dim).queries(count)
            true = bare(keys, halves)(queries)
            for name, engine in engines(bench, large, keys, halves).items():
                bench.case(f"{name}, {count} queries", partial(searched, bench, engine, queries, true))
        small = write_synthetic_store(Path(folder) / "joined", joined, dim, "float16")
        keys, halves = keys[:joined], halves[:joined]  # as many keys: what they are does not matter
        queries = small.key_block(0, joined)
        bench.case("join by torch's product and top-k", lambda: searched(bench, bare(keys, halves), queries))
        bench.case("join by build_neighbors", lambda: join(bench, small))


def engines(bench: Bench, store: Store, keys: Tensor, halves: Tensor) -> dict[str, Callable[[np.ndarray], Any]]:
    """What searches a store: queries [q, d] to rows [q, k] in the host's memory."""
    index = build_index(store, "exact")
    found = {
        "torch's product and top-k": bare(keys, halves),
        "exact search": lambda queries: index.search(queries, K)[0],
    }
    try:
        import faiss
    except ImportError:
        print("  faiss is not installed and is left out; pip install faiss-gpu")
        return found
    if bench.device.type == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        print("  faiss is installed for CPUs and is left out; pip install faiss-gpu")
        return found
    flat = faiss.IndexFlatL2(store.key_dim)
    if bench.device.type == "cuda":
        flat = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat)
    flat.add(store.key_block(0, store.num_chunks))
    return {**found, "faiss, flat": lambda queries: flat.search(queries, K)[1]}


def bare(keys: Tensor, halves: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """The order of squared L2 by one product; as many queries at a time as keep the scores in bounds."""
    size = max(1, SCORES // len(keys))

    def run(queries: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(queries).to(keys.device).split(size)
        return torch.cat([torch.addmm(-halves, part, keys.T).topk(K).indices for part in parts]).cpu().numpy()

    return run


def searched(
    bench: Bench, engine: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, true: np.ndarray | None = None
) -> Figures:
    seconds = bench.seconds(lambda: engine(queries), rounds=5, warm_up=1, at_most=6.0)
    found = {} if true is None else {"recall": recall(engine(queries), true)}
    return {"seconds": seconds, "queries_per_second": len(queries) / seconds, **found}


def join(bench: Bench, store: Store) -> Figures:
    """Once: a table that is there already is only opened."""
    seconds = bench.once(lambda: build_neighbors(store, K))
    return {"seconds": seconds, "queries_per_second": store.num_chunks / seconds}
