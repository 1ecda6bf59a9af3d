"""Settings for all tests: one thread, since tiny tensors gain nothing from more."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

EXAMPLES = Path(__file__).parents[1] / "examples"

torch.set_num_threads(1)

settings.register_profile("fcvgg", deadline=None, derandomize=True)
settings.load_profile("fcvgg")  # one suite, one result, however busy the machine


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """What an example prints, run in this process as the interpreter runs a file."""
    import matplotlib.pyplot as plt

    def printed(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str((EXAMPLES / name).parent))
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield printed
    plt.close("all")
    torch.use_deterministic_algorithms(False)  # which one of them asks for
