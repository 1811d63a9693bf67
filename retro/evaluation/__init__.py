"""Measuring what retrieval gives. Names load on demand."""

from importlib import import_module

_HOME = {
    "ChunkScores": "bits",
    "EvaluationData": "bits",
    "bits_per_byte": "bits",
    "bits_table": "bits",
    "prepare": "bits",
    "score": "bits",
    "longest_common_run": "overlap",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
