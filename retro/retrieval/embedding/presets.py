"""Embedders known by a short name: where their weights are, and how their makers pool, prefix, cut and compare.

Every preset is what the model's own card or code says (`source`). Anything given to `load_embedder` goes before it, and
what was used is recorded in the store. Weights must be safetensors: of a repository that has others (Contriever and
DRAGON did when this was written) transformers takes the hub's converted copy; offline, convert them once with
AutoModel.from_pretrained(folder, use_safetensors=False).save_pretrained(folder).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, get_args

Pooling = Literal["mean", "cls", "last", "weighted_mean", "max"]
Similarity = Literal["cosine", "dot", "l2"]
Attention = Literal["own", "bidirectional"]
POOLINGS, SIMILARITIES, ATTENTIONS = get_args(Pooling), get_args(Similarity), get_args(Attention)
SAME = "same"  # queries go through the encoder of passages
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Preset:
    """How a known embedder is used.

    passages, queries: names of the encoders on the hub.
    pooling, max_length: None is what the folder says.
    similarity: "cosine" (keys of length 1), "dot" (inner product) or "l2" (keys as they are).
    attention: "own" is the model's; "bidirectional" lets every token of a decoder see all others.
    pool_prefix: whether the prefix's tokens are pooled too.
    """

    passages: str
    source: str
    queries: str = SAME
    pooling: str | None = "mean"
    similarity: str = "cosine"
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int | None = 512
    attention: str = "own"
    pool_prefix: bool = True


def preset_of(name: str) -> Preset | None:
    """The preset of a short name, or of the hub name of its encoder of passages; None if there is none."""
    if name in PRESETS:
        return PRESETS[name]
    return next((preset for preset in PRESETS.values() if preset.passages == name), None)


def nearest_preset(name: str) -> str | None:
    """The preset that a misspelt name may mean."""
    return next(iter(difflib.get_close_matches(name, PRESETS, n=1)), None)


def _dpr(data: str) -> Preset:
    """Differs: DPR's passages are "title [SEP] text"; a chunk has no title, so its text stands alone."""
    place = "sentence-transformers/facebook-dpr-{}-" + data + "-base"
    return Preset(
        place.format("ctx_encoder"),
        "Karpukhin et al. 2020; sbert.net/docs/pretrained-models/dpr.html: dot-product, not cosine",
        place.format("question_encoder"),
        "cls",
        "dot",
        max_length=None,
    )


def _dragon(kind: str) -> Preset:
    return Preset(
        f"facebook/dragon-{kind}-context-encoder",
        "Lin et al. 2023; model card: last_hidden_state[:, 0, :], inner product",
        f"facebook/dragon-{kind}-query-encoder",
        "cls",
        "dot",
    )


def _contriever(name: str) -> Preset:
    return Preset(name, "Izacard et al. 2021; model card: mean of token embeddings, dot product", similarity="dot")


def _e5(name: str) -> Preset:
    return Preset(
        f"intfloat/{name}",
        "Wang et al. 2022, 2024; model card: average pooling, normalised, at most 512 tokens",
        query_prefix="query: ",
        passage_prefix="passage: ",
    )


def _bge(size: str) -> Preset:
    return Preset(
        f"BAAI/bge-{size}-en-v1.5",
        "Xiao et al. 2023; model card: [CLS], normalised; the instruction goes before queries only",
        pooling="cls",
        query_prefix="Represent this sentence for searching relevant passages: ",
    )


def _gtr(size: str) -> Preset:
    return Preset(
        f"sentence-transformers/gtr-t5-{size}",
        "Ni et al. 2021; modules.json: encoder of T5, mean, Dense head, Normalize",
        max_length=None,
    )


def _decoder(name: str, source: str, max_length: int) -> Preset:
    """A decoder read in both directions, its instruction left out of the mean.

    The prefix is that of texts without an instruction; one goes into query_prefix as
    "<|user|>\\n" + instruction + "\\n<|embed|>\\n". The repository's own code is not run: transformers' class of the
    same architecture takes the weights, and its attention is made bidirectional.
    """
    return Preset(
        name,
        source,
        query_prefix="<|embed|>\n",
        passage_prefix="<|embed|>\n",
        max_length=max_length,
        attention="bidirectional",
        pool_prefix=False,
    )


PRESETS: dict[str, Preset] = {
    # RETRO, section 2.2: the key of a chunk is BERT(N) averaged over time, compared by L2. Differs: whether the paper
    # counts [CLS] and [SEP] it does not say; here they count.
    "bert-base-uncased": Preset("google-bert/bert-base-uncased", "Borgeaud et al. 2022", similarity="l2"),
    "minilm": Preset(MINILM, "model card: mean, normalised; 256 tokens", max_length=None),
    "contriever": _contriever("facebook/contriever"),
    "contriever-msmarco": _contriever("facebook/contriever-msmarco"),
    "dpr": _dpr("multiset"),
    "dpr-multiset": _dpr("multiset"),
    "dpr-single-nq": _dpr("single-nq"),
    "dragon": _dragon("plus"),
    "dragon-roberta": _dragon("roberta"),
    "gtr-t5-base": _gtr("base"),
    "gtr-t5-large": _gtr("large"),
    "e5-small-v2": _e5("e5-small-v2"),
    "e5-base": _e5("e5-base"),
    "e5-base-v2": _e5("e5-base-v2"),
    "e5-large": _e5("e5-large"),
    "e5-large-v2": _e5("e5-large-v2"),
    "multilingual-e5-small": _e5("multilingual-e5-small"),
    "multilingual-e5-base": _e5("multilingual-e5-base"),
    "multilingual-e5-large": _e5("multilingual-e5-large"),
    "bge-small-en-v1.5": _bge("small"),
    "bge-base-en-v1.5": _bge("base"),
    "bge-large-en-v1.5": _bge("large"),
    "grit": _decoder("GritLM/GritLM-7B", "Muennighoff et al. 2024; github.com/ContextualAI/gritlm: encode()", 512),
    "reasonir": _decoder("reasonir/ReasonIR-8B", "Shao et al. 2025; BRIGHT evaluation of its repository", 32768),
}
