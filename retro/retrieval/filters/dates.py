"""Documents by their date, whatever its precision."""

from __future__ import annotations

import calendar
import datetime
import re
from typing import Any

from retro.retrieval.filters.records import removed

UNDATED = ("drop", "keep")
_DATE = re.compile(r"(\d{4})(?:-?(\d\d)-?(\d\d)(?:[T ].*)?|-(\d\d))?", re.DOTALL)


def days_of(date: str | None) -> tuple[int, int] | None:
    """First and last day that an ISO date may mean, as ordinals: "2015", "2015-06", "2015-06-30", "20150630".

    A time of day and its zone are read over. None for what is no date.
    """
    match = _DATE.fullmatch(date.strip()) if date else None
    if match is None:
        return None
    year, month, day, month_alone = (int(part) if part else None for part in match.groups())
    month = month or month_alone
    try:
        first = datetime.date(year, month or 1, day or 1)
        last_month = month or 12
        last = datetime.date(year, last_month, day or calendar.monthrange(year, last_month)[1])
    except (ValueError, calendar.IllegalMonthError):
        return None
    return first.toordinal(), last.toordinal()


class DateFilter:
    """Keeps the documents of which every day that their date may mean lies from min_date to max_date, both included.

    "2015" is every day of 2015: it lies in 2014 .. 2015-12, and not in 2014 .. 2015-06. undated: "drop" or "keep" those
    without a date, or with one that is not ISO 8601.
    """

    name = "date"

    def __init__(self, min_date: str | None = None, max_date: str | None = None, undated: str = "drop") -> None:
        if undated not in UNDATED:
            raise ValueError(f"undated must be {' or '.join(UNDATED)}, not {undated!r}")
        self._first, self._last = _bound("min_date", min_date, 0), _bound("max_date", max_date, 1)
        if self._first is not None and self._last is not None and self._first > self._last:
            raise ValueError(f"min_date ({min_date}) is after max_date ({max_date}); no document lies between them")
        self.min_date, self.max_date, self.undated = min_date, max_date, undated

    def verdict(self, document: Any) -> dict[str, Any] | None:
        """None, or the record of a document outside the range."""
        days, value = days_of(document.date), {"date": document.date}
        if days is None:
            reason = "no date" if not document.date else "the date is not ISO (2015, 2015-06, 2015-06-30)"
            return removed(self, document, reason, **value) if self.undated == "drop" else None
        if self._first is not None and days[0] < self._first:
            return removed(self, document, f"may be before {self.min_date}", **value)
        if self._last is not None and days[1] > self._last:
            return removed(self, document, f"may be after {self.max_date}", **value)
        return None


def _bound(name: str, date: str | None, end: int) -> int | None:
    days = days_of(date)
    if date is not None and (days is None or len(date) > len("2015-06-30")):
        raise ValueError(f"{name} must be a year, month or day such as 2015, 2015-06 or 2015-06-30, not {date!r}")
    return None if days is None else days[end]
