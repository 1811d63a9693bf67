"""Waiting for what another thread or process does: for as long as that takes, however slow the machine."""

import time

FOREVER = 600.0  # seconds; keeps what has gone wrong from hanging


def wait_until(true) -> None:
    """Wait for a condition; fails when it does not come about."""
    end = time.monotonic() + FOREVER
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
