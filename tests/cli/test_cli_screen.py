"""What commands show on a terminal, where results and progress bars share the screen."""

from __future__ import annotations

import sys

import pytest
from terminal import terminal

from fcvgg.cli import app
from fcvgg.demo import demo_photograph

if sys.platform == "win32":  # which has no pseudo-terminals
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

NAMES = ("one.png", "two.png", "absent.png", "three.png")


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        if name != "absent.png":
            demo_photograph().resize((48, 40)).save(name)
    return NAMES


def run(*arguments):
    try:
        app([str(a) for a in arguments], prog_name="fcvgg")
    except SystemExit as end:
        return end.code


COMMANDS = {
    "classify": ("--top", "1"),
    "heatmap": ("--target", "face", "--output", "maps"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_results_and_complaints_stand_above_the_bar(images, monkeypatch, capsys, command):
    options = ("-m", "demo", *COMMANDS[command])
    assert run(command, *images, *options) == 2
    plain = capsys.readouterr()
    with terminal(monkeypatch, "stdout", "stderr") as shown:
        assert run(command, *images, *options) == 2
    assert "4/4" in shown.raw, "there was a bar"
    assert "━" not in "".join(shown.screen), "no bar is left on the screen"
    said = (plain.out + plain.err).split()
    assert sorted(" ".join(shown.screen).split()) == sorted(said)  # broken between words only
    results = [line for line in shown.screen if line.startswith(NAMES)]
    assert [line.split(":")[0].split(",")[0] for line in results] == [
        name for name in NAMES if name != "absent.png"
    ]
    assert "fcvgg: error: there is no image file absent.png" in shown.screen


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_gets_the_results_and_the_terminal_the_rest(images, monkeypatch, capsys, command):
    options = ("-m", "demo", *COMMANDS[command])
    run(command, *images, *options)
    plain = capsys.readouterr()
    with terminal(monkeypatch, "stderr") as shown:
        run(command, *images, *options)
    assert capsys.readouterr().out == plain.out
    assert "4/4" in shown.raw
    assert shown.screen == plain.err.splitlines()


def test_json_on_a_terminal_is_whole(images, monkeypatch, capsys):
    run("classify", *images, "-m", "demo", "--json")
    plain = capsys.readouterr()
    with terminal(monkeypatch, "stdout", "stderr") as shown:
        run("classify", *images, "-m", "demo", "--json")
    screen = "".join("".join(shown.screen).split())  # lines go on where the screen ends
    for line in (*plain.out.splitlines(), *plain.err.splitlines()):
        assert "".join(line.split()) in screen


def test_one_image_has_no_bar(images, monkeypatch):
    with terminal(monkeypatch, "stdout", "stderr") as shown:
        run("classify", "one.png", "-m", "demo")
    assert "━" not in shown.raw


def test_names_with_markup_are_printed_as_they_are(images, monkeypatch):
    demo_photograph().resize((48, 40)).save("[bold]:dog:.png")
    with terminal(monkeypatch, "stdout", "stderr") as shown:
        run("heatmap", "[bold]:dog:.png", "one.png", "-m", "demo")
    assert shown.screen[0].startswith("[bold]:dog:.png: ")


def test_paths_and_commands_stay_whole(images, monkeypatch):
    """What is copied from a terminal has no line breaks of ours in it."""
    folder = "a folder " * 20
    with terminal(monkeypatch, "stdout", "stderr") as shown:
        run("heatmap", "one.png", "-m", "demo", "-o", folder)
    assert f"{folder}/one-heatmap.png\r\n" in shown.raw


def test_notes_are_broken_between_words(images, monkeypatch):
    demo_photograph().save("many.png")
    with terminal(monkeypatch, "stdout", "stderr") as shown:
        run("heatmap", "many.png", "-m", "demo")
    assert shown.screen[:2] == [
        "fcvgg: many.png is 16 windows high, and the network recognises what fits into",
        "one; --scale 37 shows the image whole",
    ]
