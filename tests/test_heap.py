"""Freed maps are used again: what the C library does, measured in a process of its own."""

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, torch
from fcvgg.heap import keep_freed_maps

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        a, b = torch.ones(3 << 20), torch.ones(3 << 20)  # 12 MB each
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_maps()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_maps_need_no_new_pages():
    ran = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 3072  # the pages of one map, of twenty that were made
