"""Measuring what retrieval gives. Names load on demand."""

from importlib import import_module

_HOME = {
    "BaselineSettings": "baselines",
    "measure_baselines": "baselines",
    "baselines_table": "baselines",
    "ChunkScores": "bits",
    "EvaluationData": "bits",
    "bits_per_byte": "bits",
    "bits_table": "bits",
    "perplexity_table": "bits",
    "prepare": "bits",
    "score": "bits",
    "leakage_table": "leakage",
    "measure_leakage": "leakage",
    "longest_common_run": "overlap",
    "Reading": "sweeps",
    "sweep_datastore": "sweeps",
    "sweep_models": "sweeps",
    "sweep_neighbors": "sweeps",
    "sweep_table": "sweeps",
    "sweep_tokens": "sweeps",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
