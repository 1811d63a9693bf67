"""What an encoder's folder says of its use: modules.json and the other side files of sentence-transformers.

modules.json lists Transformer, Pooling, then any number of Dense heads and at most one Normalize at the end; anything
else is refused by name, since keys made without it would be wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro.common.files import load_json
from retro.common.own import check_names

_POOLINGS = {
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "last",
    "weightedmean": "weighted_mean",
    "max": "max",
    # as folders from before sentence-transformers 5.3 say it
    "mean_tokens": "mean",
    "cls_token": "cls",
    "max_tokens": "max",
    "weightedmean_tokens": "weighted_mean",
}
_SIMILARITIES = {"cosine": "cosine", "dot": "dot", "euclidean": "l2"}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid")
_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_TASK_DEFAULTS = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}


@dataclass(frozen=True)
class Dense:
    """A linear head: the path of its weights, its widths, and the name of its activation in torch.nn."""

    weights: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class EncoderConfig:
    """How a folder wants its encoder used; None is what it does not say."""

    subfolder: str = ""
    pooling: str | None = None
    heads: tuple[Dense, ...] = ()
    similarity: str | None = None
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int | None = None
    lower_case: bool = False
    pool_prefix: bool = True


def read_encoder_config(name: str, folder: str, pooling: str | None = None) -> EncoderConfig:
    """How an encoder's folder wants it used; defaults of any other encoder where it has no modules.json.

    `pooling`, if given, goes before the folder's, which may then be one that this library has not.
    Raises ValueError, naming the module, for what this library cannot do.
    """
    modules = folder_json(folder, "modules.json", list)
    if not modules:
        return EncoderConfig()
    kinds = [_kind(name, module) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Dense" for kind in kinds[2:-1]):
        raise ValueError(
            f"the embedder {name} is {', '.join(kinds)} in its modules.json, which this library does not read in this "
            "order; it reads Transformer, Pooling, Dense ..., Normalize; use another embedder"
        )
    paths = [str(module.get("path", "")) for module in modules]
    check_names(f"modules.json of the embedder {name}", filter(None, paths))
    pooling_config = folder_json(folder, f"{paths[1]}/config.json", dict)
    transformer = _transformer_config(name, folder, paths[0])
    query_prefix, passage_prefix, similarity = _prompts(name, folder)
    return EncoderConfig(
        subfolder=paths[0],
        pooling=pooling or _pooling(name, pooling_config),
        heads=tuple(_dense(name, folder, p) for p, kind in zip(paths, kinds, strict=True) if kind == "Dense"),
        similarity="cosine" if kinds[-1] == "Normalize" else similarity,
        query_prefix=query_prefix,
        passage_prefix=passage_prefix,
        max_length=transformer.get("max_seq_length"),
        lower_case=bool(transformer.get("do_lower_case", False)),
        pool_prefix=bool(pooling_config.get("include_prompt", True)),
    )


def check_own_code(name: str, folder: str, subfolder: str) -> None:
    """Refuse a repository that brings code for its encoder: transformers' class of its type would make other keys."""
    auto_map = folder_json(folder, f"{subfolder}/config.json".lstrip("/"), dict).get("auto_map") or {}
    if "AutoModel" in auto_map:
        raise ValueError(
            f"the embedder {name} comes with code of its own ({auto_map['AutoModel']}), which this library does not "
            "run; give attention as own or bidirectional if transformers' class of its type may take its weights, or "
            "use another embedder"
        )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No "Loading weights" bar of transformers, and no word of every retry where the hub cannot be reached."""
    from transformers.utils import logging as transformers_logging

    hub, shown = logging.getLogger("huggingface_hub"), transformers_logging.is_progress_bar_enabled()
    level = hub.level
    hub.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()


def folder_file(folder: str, name: str) -> Path | None:
    """A side file of an encoder, from its folder or the Hugging Face cache; None if there is none."""
    path: Any = Path(folder) / name
    if not path.is_file() and not Path(folder).is_dir():
        from transformers.utils import cached_file

        quiet = ("missing_entries", "connection_errors", "gated_repo")
        try:
            path = cached_file(folder, name, **{f"_raise_exceptions_for_{case}": False for case in quiet})
        except OSError:  # no such repository: whoever loads the encoder says so
            return None
    return Path(path) if path and Path(path).is_file() else None


def folder_json(folder: str, name: str, kind: type) -> Any:
    """A JSON side file; an empty value if there is none."""
    path = folder_file(folder, name)
    if path is None:
        return kind()
    found = load_json(path)
    if not isinstance(found, kind):
        raise ValueError(f"{path} must hold a JSON {kind.__name__}, not {found!r:.60}; download the embedder again")
    return found


def _kind(name: str, module: Any) -> str:
    package, _, kind = str(module.get("type", "") if isinstance(module, dict) else module).rpartition(".")
    if package.split(".")[0] != "sentence_transformers" or kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
        raise ValueError(
            f"the embedder {name} has the module {package}.{kind} in its modules.json, which this library does not "
            "have; it has Transformer, Pooling, Dense and Normalize; use another embedder"
        )
    return kind


def _pooling(name: str, config: dict[str, Any]) -> str:
    modes = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_") for key, chosen in config.items() if chosen is True and "pooling_mode" in key
    ]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise ValueError(
            f"the embedder {name} pools by {' and '.join(modes)}, which this library does not; "
            f"give pooling as {', '.join(dict.fromkeys(_POOLINGS.values()))}, or another embedder"
        )
    return _POOLINGS[modes[0]]


def _transformer_config(name: str, folder: str, path: str) -> dict[str, Any]:
    files = (f"{path}/sentence_{kind}_config.json".lstrip("/") for kind in _KINDS)
    config = next((found for file in files if (found := folder_json(folder, file, dict))), {})
    for key, value in config.items():
        harmless = not value or key in ("max_seq_length", "do_lower_case", "modality_config")
        if not harmless and _TASK_DEFAULTS.get(key) != value:
            raise ValueError(
                f"the embedder {name} sets {key} to {value!r:.60} in its sentence-transformers configuration, which "
                "this library does not do; use another embedder"
            )
    return config


def _dense(name: str, folder: str, path: str) -> Dense:
    config = folder_json(folder, f"{path}/config.json", dict)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, kind = activation.rpartition(".")
    if not package.startswith("torch.nn") or kind not in ACTIVATIONS:
        raise ValueError(
            f"the embedder {name} has the activation {activation} in {path}, which this library does not have; "
            f"it has {', '.join(ACTIVATIONS)}; use another embedder"
        )
    names = {config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")}
    if config.get("use_residual") or names != {"sentence_embedding"}:
        raise ValueError(
            f"the embedder {name} has a Dense head in {path} that is residual or not of the pooled text, which this "
            "library does not have; use another embedder"
        )
    weights = folder_file(folder, f"{path}/model.safetensors")
    if weights is None:
        raise ValueError(
            f"the embedder {name} holds no safetensors weights in {path}; save it again with sentence-transformers, "
            "or use another embedder"
        )
    sizes = [config.get("in_features"), config.get("out_features")]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or sizes[0] * sizes[1] > weights.stat().st_size:
        raise ValueError(
            f"the embedder {name} says in {path}/config.json that its head is {sizes[0]} x {sizes[1]}, which "
            f"{weights} does not hold; download the embedder again"
        )
    return Dense(weights, *sizes, bool(config.get("bias", True)), kind)


def _prompts(name: str, folder: str) -> tuple[str, str, str]:
    """The prefixes of queries and passages, and the similarity (cosine where the folder names none)."""
    config = folder_json(folder, "config_sentence_transformers.json", dict)
    prompts = config.get("prompts") or {}

    def prompt(*names: str) -> str:
        return next((prompts[key] for key in names if prompts.get(key) is not None), "")

    similarity = config.get("similarity_fn_name") or "cosine"
    if similarity not in _SIMILARITIES:
        raise ValueError(
            f"the embedder {name} compares by {similarity}, which this library does not; use another embedder"
        )
    return prompt("query"), prompt("document", "passage", "corpus"), _SIMILARITIES[similarity]
