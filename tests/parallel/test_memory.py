"""Freed memory stays with the process: page faults are counted, nothing is timed."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from cli_jax.parallel.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for i in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 * 2**20, np.uint8).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_a_freed_block_is_used_again():
    faults = {}
    for how in ("keep", "default"):
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] < 16 <= faults["default"]
