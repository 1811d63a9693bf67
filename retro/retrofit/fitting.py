"""`retrofit(base, ...)`: a pretrained causal LM becomes one that reads neighbors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retro.retrofit.bases import config_to_keep, open_base, stored_name
from retro.retrofit.config import RetrofitConfig
from retro.retrofit.fingerprint import fingerprint
from retro.retrofit.model import RetrofitForCausalLM


def retrofit(base: Any, *, dtype: Any = None, revision: str | None = None, **options) -> RetrofitForCausalLM:
    """Fit a pretrained causal LM for neighbors: it is frozen, and what reads them is added.

    Without neighbors the result is the base, bit for bit; with neighbors it equals the base until it is trained.

    Args:
        base: A Hugging Face name, a folder, a GGUF file, "package:NAME" or a model in memory, which is taken over: its
            weights stop asking for gradients, and hooks are put in that do nothing without neighbors.
        dtype, revision: As in from_pretrained, for a base that is loaded here.
        options: Fields of RetrofitConfig: form, chunk_len, retrieved_len ... "paper" adds the paper's encoder and
            CCA, "pointer" copies from the neighbors by the base's own features, and "joint", the default, does both.

    Raises ValueError, in one sentence, for a base that cannot be loaded or fitted and for unknown options.
    """
    loading = {name: value for name, value in (("dtype", dtype), ("revision", revision)) if value is not None}
    if loading and not isinstance(base, (str, Path)):
        raise ValueError(f"{', '.join(loading)} is for a base that is loaded here; {type(base).__name__} is a model.")
    opened = open_base(base, **loading)
    if not hasattr(opened, "config") or not hasattr(opened, "get_input_embeddings"):
        raise ValueError(f"base is a {type(base).__name__}; give a Hugging Face causal LM, or where to load one.")
    if hasattr(opened.config, "chunk_len"):
        raise ValueError(f"base is a {type(opened).__name__}, which reads neighbors already; give a plain causal LM.")
    vouched = isinstance(base, (str, Path)) or options.get("base_name_or_path") is not None
    implied = {
        "base_config": config_to_keep(opened),
        "base_name_or_path": stored_name(base),
        "base_revision": revision or getattr(opened.config, "_commit_hash", None),
        "base_dtype": str(opened.dtype).removeprefix("torch."),
        "base_fingerprint": fingerprint(opened) if vouched else None,
    }
    return RetrofitForCausalLM(RetrofitConfig.checked(**{**implied, **options}), base=opened)
