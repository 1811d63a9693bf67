"""One page of everything that was measured: `retro report`. Names load on demand."""

from importlib import import_module

from retro.common.extras import check_installed

_HOME = {
    "ReportInputs": "retro.evaluation.report.files",
    "read_runs": "retro.evaluation.report.files",
    "report_page": "retro.evaluation.report.page",
    "caveats_of": "retro.evaluation.report.caveats",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_installed("pydantic", "a report")
    return getattr(import_module(_HOME[name]), name)
