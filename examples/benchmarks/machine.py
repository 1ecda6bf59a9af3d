"""The machine that a benchmark runs on: its name, peak and memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F


def machine() -> str:
    """The processor's name, the instructions that torch uses, and the versions that matter."""
    name = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else name
    name += f" with {torch.backends.cpu.get_cpu_capability()}"
    if "as_avx2" in os.environ.get("LD_PRELOAD", ""):
        name += ", which all libraries took for an AMD Zen 3 (as_avx2.c)"
    versions = [f"torch {torch.__version__}"]
    for package in ("onnxruntime", "openvino", "nncf", "timm", "monai", "grad-cam", "torchcam"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([name, *versions])


def measured_peak(clock: Callable[[], float] = time.perf_counter) -> float:
    """GFLOP/s in float32 of the better of a large matrix product and a large convolution."""
    a, b = torch.ones(2048, 2048), torch.ones(2048, 2048)
    x = torch.ones(1, 256, 64, 64).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(256, 256, 3, 3)
    cases: list[tuple[Callable[[], Any], float]] = [
        (lambda: a @ b, 2 * 2048**3),
        (lambda: F.conv2d(x, weight, padding=1), 2 * 9 * 256 * 256 * 64 * 64),
    ]
    best = 0.0
    for work, operations in cases:
        work()
        start = clock()
        work()
        best = max(best, operations / (clock() - start) / 1e9)
    return best


def peak_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage tells on Linux includes the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
