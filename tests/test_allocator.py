"""Freed memory is kept, and given back when asked."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from gam_lm.runtime.allocator import give_back, keep_freed_memory
from gam_lm.runtime.isolation import resident_bytes
import os, torch

def faults(bytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(bytes, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

MB = 2**20
if "keep" in sys.argv:
    assert keep_freed_memory()
faults(256 * MB)
again = faults(256 * MB)
held = resident_bytes(os.getpid())
give_back()
print(again, (held - resident_bytes(os.getpid())) // MB)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told so")
def test_what_is_freed_is_kept_until_it_is_given_back():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}

    def run(*words):
        done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True, env=clean)
        return [int(word) for word in done.stdout.split()]

    faults, returned = run("keep")
    assert faults < 1000 and returned > 200
    faults, returned = run()
    assert faults > 10_000 and returned < 50  # 65,536 pages of 4 KiB, given back at once
