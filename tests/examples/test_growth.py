"""The benchmark of `growth.py` on a narrow VGG: what it measures and writes, not how fast it is."""

import json
import sys

import pytest
import torch
import torchvision
from nets import narrow_vgg, seeded

import growth


@pytest.fixture
def narrow(monkeypatch):
    """Stands for torchvision's vgg16: full depth, 1/64 of the channels."""
    model = seeded(narrow_vgg, "vgg16", width=64, dtype=torch.float32)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda: model)
    monkeypatch.setattr(growth, "SECONDS", 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("way", growth.WAYS)
def test_a_case_is_measured(narrow, monkeypatch, capsys, way):
    monkeypatch.setattr(
        sys, "argv", ["growth.py", "--child", way, "--sizes", "320", "--threads", "1"]
    )
    growth.main()
    figures = json.loads(capsys.readouterr().out)
    assert (figures["way"], figures["size"], figures["calls"]) == (way, 320, 3)
    assert figures["seconds"] > 0
    assert figures["added"] >= 0


def test_the_report_has_a_row_for_every_size(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "figures"
    folder.mkdir()
    cases = [("plain", 512, 0.5), ("plain", 1024, 2.2), ("stream", 1024, 2.3)]
    for way, size, seconds in cases:
        work = size**2 * (100 if size == 512 else 110)
        figures = {"way": way, "size": size, "seconds": seconds, "added": 100 * 2**20}
        figures |= {"machine": "a machine", "threads": 2, "memory": "512MiB", "operations": work}
        (folder / f"{way}-{size}.json").write_text(json.dumps(figures))
    monkeypatch.setattr(
        sys, "argv", ["growth.py", "--folder", str(folder), "--report", str(tmp_path)]
    )
    growth.main()
    text = (tmp_path / "growth.md").read_text()
    assert "| 512 x 512 | 1.91 |  | +0% |\n| 1024 x 1024 | 2.10 | 2.19 | +10% |" in text
    assert "| 512 x 512 | 100 |  |\n| 1024 x 1024 | 100 | 100 |" in text
    assert capsys.readouterr().out == f"wrote {tmp_path / 'growth.md'}\n"


def test_figures_of_two_machines_and_none_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["growth.py", "--folder", str(tmp_path), "--report", str(tmp_path)]
    )
    with pytest.raises(SystemExit, match=r"^there are no figures in .*; run growth.py"):
        growth.main()
    for i in range(2):
        figures = {"machine": f"machine {i}", "threads": 2, "memory": "512MiB"}
        (tmp_path / f"plain-{i}.json").write_text(
            json.dumps({**figures, "way": "plain", "size": i})
        )
    with pytest.raises(SystemExit, match=r"^the figures are of several machines or settings"):
        growth.main()
