"""What a user sees on narrow terminals, in pipes and where a shell completes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torchvision
from command_line import run
from rich.text import Text

from fcvgg.cli import app
from fcvgg.cli.completion import complete_model
from fcvgg.cli.reports import ReportTable
from fcvgg.support.terminal import VisibleConsole

COMMANDS = [command.name for command in app.registered_commands]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_help_fits_the_terminal_and_is_whole(columns):
    for command in ("", *COMMANDS):
        shown = run(*command.split(), "--help", columns=columns).stdout
        assert "\x1b" not in shown
        assert "…" not in shown, command
        assert max(map(len, shown.splitlines())) <= columns, command
        assert "Examples" in shown
        assert "[bold]" not in shown
        assert "\\[" not in shown


def printed(table: ReportTable, columns: int) -> list[str]:
    console = VisibleConsole(width=columns, color_system=None)
    with console.capture() as shown:
        console.print(table)
    return [" ".join(line.split()) for line in shown.get().splitlines()]


def test_a_table_keeps_its_values_at_every_width():
    rows = [("plain", "512x512", Text("1.95 - 2.49"), "14.02x"), ("source", "32x32", "-", "1x")]
    table = ReportTable(("network", "images", "quartiles", "vs source"), rows)
    whole = ["network images quartiles vs source", "plain 512x512 1.95 - 2.49 14.02x"]
    assert printed(table, 50)[:2] == whole
    assert printed(table, 40)[:3] == ["vs", "network images quartiles source", whole[1]]
    assert printed(table, 30)[:4] == [
        *("network plain", "images 512x512", "quartiles 1.95 - 2.49", "vs source 14.02x"),
    ]


def test_long_names_are_wrapped_before_a_table_is_broken_up():
    table = ReportTable(("class", "right"), [("a name of many words", "9"), ("b", "99.0%")])
    assert printed(table, 26) == ["class right", "a name of many", "words 9", "b 99.0%"]


def completed(shell: str, words: str) -> list[str]:
    given = {"_FCVGG_COMPLETE": f"complete_{shell}", "COMP_WORDS": words}
    given |= {"COMP_CWORD": str(len(words.split(" ")) - 1), "_TYPER_COMPLETE_ARGS": words}
    if shell == "fish":
        given["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    command = [sys.executable, "-c", "from fcvgg.cli import main; main()"]
    done = subprocess.run(
        command, env=os.environ | given, capture_output=True, text=True, check=False
    )
    return done.stdout.splitlines()


def test_a_shell_completes_commands_options_choices_and_models():
    assert completed("bash", "fcvgg cl") == ["classify"]
    assert completed("bash", "fcvgg classify --av") == ["--average"]
    assert completed("bash", "fcvgg classify --average pro") == ["probabilities"]
    assert completed("bash", "fcvgg info vgg11") == ["vgg11", "vgg11_bn"]
    assert "convnext_base" in completed("zsh", "fcvgg classify --model convnext_b")[0]
    assert completed("fish", "fcvgg finetune data --arch demo:")[0].startswith("demo:imagenet")


def test_all_of_torchvisions_classifiers_are_completed():
    names = torchvision.models.list_models(module=torchvision.models)
    assert sorted(complete_model("")) == sorted([*names, "demo", "demo:imagenet", "timm:", "hf:"])


@pytest.mark.parametrize(
    ("shell", "says"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command")]
)
def test_the_completion_of_a_shell_is_shown(monkeypatch, shell, says):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = run("--show-completion", shell).stdout
    assert says in shown
    assert "_FCVGG_COMPLETE=complete_" in shown


def test_the_completion_is_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "bash completion installed" in run("--install-completion", "bash").stdout
    assert "_FCVGG_COMPLETE" in (tmp_path / ".bash_completions" / "fcvgg.sh").read_text()
    assert "fcvgg.sh" in (tmp_path / ".bashrc").read_text()
