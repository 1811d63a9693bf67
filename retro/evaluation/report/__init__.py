"""One page of everything that was measured: `retro report`. Names load on demand."""

from retro.common.extras import check_installed
from retro.common.lazy import on_demand

_HOME = {
    "ReportInputs": "retro.evaluation.report.files",
    "read_runs": "retro.evaluation.report.files",
    "report_page": "retro.evaluation.report.page",
    "caveats_of": "retro.evaluation.report.caveats",
}
__all__ = list(_HOME)
__getattr__, __dir__ = on_demand(__name__, _HOME)
check_installed("pydantic", "a report")
