"""The table that stands under a run of transformers' own test classes; a plugin of pytest."""

from collections import Counter

OUTCOMES = {"failed": "failed", "passed": "passed", "xfailed": "cannot apply", "skipped": "left out by transformers"}


def pytest_terminal_summary(terminalreporter):
    found = {}
    for outcome in OUTCOMES:  # of a test with subtests several are told: the first of these holds
        for report in terminalreporter.getreports(outcome):
            found.setdefault(report.nodeid, outcome)
    counts = Counter((test.split("::")[1].removeprefix("Test_"), outcome) for test, outcome in found.items())
    terminalreporter.write_line(" " * 18 + "  ".join(OUTCOMES.values()))
    for case in dict.fromkeys(case for case, _ in counts):
        row = "  ".join(f"{counts[case, outcome]:>{len(title)}}" for outcome, title in OUTCOMES.items())
        terminalreporter.write_line(f"{case:<18}{row}")
