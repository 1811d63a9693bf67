"""Measuring what retrieval gives. Names load on demand."""

from retro.common.lazy import on_demand

_HOME = {
    "BaselineSettings": "retro.evaluation.settings",
    "measure_baselines": "retro.evaluation.baselines",
    "ChunkScores": "retro.evaluation.bits",
    "EvaluationData": "retro.evaluation.data",
    "bits_per_byte": "retro.evaluation.bits",
    "prepare": "retro.evaluation.data",
    "score": "retro.evaluation.bits",
    "TokenScores": "retro.evaluation.scorer",
    "score_tokens": "retro.evaluation.scorer",
    "measure_leakage": "retro.evaluation.leakage",
    "longest_common_run": "retro.text.overlap",
    "ScoringSettings": "retro.evaluation.settings",
    "sweep_datastore": "retro.evaluation.sweeps",
    "sweep_models": "retro.evaluation.sweeps",
    "sweep_neighbors": "retro.evaluation.sweeps",
    "table_text": "retro.evaluation.tables",
    "sweep_tokens": "retro.evaluation.sweeps",
}
__all__ = list(_HOME)
__getattr__, __dir__ = on_demand(__name__, _HOME)
