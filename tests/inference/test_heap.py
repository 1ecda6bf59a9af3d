"""Freed maps are used again: what the C library does, measured in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

from fcvgg.inference import memory

PAGES = """
import resource, torch
from fcvgg.inference.memory import keep_freed_maps

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        maps = [torch.ones(5 << 20) for _ in range(6)]  # 20 MB each, 120 together
        del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{first}
keep_freed_maps()
faults()
print(faults())
"""
ONE_MAP = 5120
"""Its pages, of thirty maps that are made."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize("first", ["", "a = [torch.ones(3 << 20) for _ in range(12)]; del a"])
def test_freed_maps_need_no_new_pages(first):
    assert faults(first) < ONE_MAP


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_the_users_own_settings_stand():
    assert faults("", MALLOC_TRIM_THRESHOLD_="131072") > 10 * ONE_MAP


def faults(first, **variables):
    code = PAGES.replace("{first}", first)
    environment = {**os.environ, **variables}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return int(ran.stdout)


def test_the_last_cache_is_the_largest_that_linux_reports(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CACHES", tmp_path)
    for i, size in enumerate(("48K", "2048K", "65536K", "odd")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    assert memory.last_cache_bytes.__wrapped__() == 64 * 1024**2
    monkeypatch.setattr(memory, "_CACHES", tmp_path / "absent")
    assert memory.last_cache_bytes.__wrapped__() == memory._USUAL_CACHE
