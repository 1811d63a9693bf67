"""One page of everything that was measured: `retro report`. Names load on demand."""

from importlib import import_module

_HOME = {"Runs": "files", "read_runs": "files", "report_page": "page", "limits_of": "limits"}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
