"""Memory that is freed is used again."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from retro.training.memory import keep_freed_memory

kept = sys.argv[1] == "kept" and keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = np.full(48 << 20, 1, np.uint8)
    del array
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked")
def test_freed_memory_is_used_again_without_new_pages():
    found = {}
    for way in ("kept", "returned"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True)
        kept, faults = done.stdout.split()
        found[way] = int(faults)
        if way == "kept" and kept == "False":
            pytest.skip("another C library")
    assert found["kept"] < 16 < found["returned"]
