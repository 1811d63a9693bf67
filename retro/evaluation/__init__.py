"""Measuring what retrieval gives. Names load on demand."""

from importlib import import_module

_HOME = {
    "BaselineSettings": "retro.evaluation.settings",
    "measure_baselines": "retro.evaluation.baselines",
    "baselines_table": "retro.evaluation.baselines",
    "ChunkScores": "retro.evaluation.bits",
    "EvaluationData": "retro.evaluation.data",
    "bits_per_byte": "retro.evaluation.bits",
    "bits_table": "retro.evaluation.bits",
    "perplexity_table": "retro.evaluation.bits",
    "prepare": "retro.evaluation.data",
    "score": "retro.evaluation.bits",
    "score_tokens": "retro.evaluation.scorer",
    "leakage_table": "retro.evaluation.leakage",
    "measure_leakage": "retro.evaluation.leakage",
    "longest_common_run": "retro.text.overlap",
    "ScoringSettings": "retro.evaluation.settings",
    "sweep_datastore": "retro.evaluation.sweeps",
    "sweep_models": "retro.evaluation.sweeps",
    "sweep_neighbors": "retro.evaluation.sweeps",
    "sweep_table": "retro.evaluation.sweeps",
    "sweep_tokens": "retro.evaluation.sweeps",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
