"""Options that take one of several names: how they are listed, refused and given to the library."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run

from fcvgg.finetuning import finetuning
from fcvgg.finetuning.strategies import Recipe


@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        (["classify", "x.png"], "--average", ["scores", "probabilities"]),
        (["evaluate", "x"], "--average", ["scores", "probabilities"]),
        (["probe", "x"], "--pooling", ["avg", "max"]),
        (["probe", "x"], "--classifier", ["logistic", "svm"]),
        (["segment-train", "x", "-c", "a,b"], "--variant", ["32s", "16s", "8s"]),
        (["segment-train", "x", "-c", "a,b"], "--class-weights", ["none", "balanced"]),
        (["finetune", "x"], "--strategy", ["auto", "linear", "partial", "all", "svm", "scratch"]),
        (["finetune", "x"], "--resize", ["resize", "center-crop"]),
        (["finetune", "x"], "--optimizer", ["sgd", "adamw"]),
        (["finetune", "x"], "--precision", ["auto", "32", "bf16-mixed", "16-mixed"]),
        (["finetune", "x"], "--class-weights", ["none", "balanced"]),
    ],
)
def test_names_are_listed_in_the_help_and_in_the_refusal(
    command: list[str], option: str, names: list[str]
) -> None:
    listed = "|".join(names)
    assert f"{option} " in run(command[0], "--help").output
    assert listed in run(command[0], "--help").output
    refused = run(*command, option, "else")
    assert refused.exit_code == 2
    assert "'else' is not one of " + ", ".join(map(repr, names)) in refused.output


@pytest.mark.parametrize("spelling", ["center-crop", "centre-crop"])
def test_both_spellings_of_a_crop_reach_the_library(
    spelling: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {}

    def finetune(*args: object, **options: object) -> None:
        given.update(options)
        raise KeyboardInterrupt  # nothing more is wanted

    monkeypatch.setattr(finetuning, "finetune", finetune)
    run("finetune", "x", "--resize", spelling, "-o", tmp_path)
    assert given["resize"] == spelling
    assert given.get("class_weights") is None
    assert Recipe(resize=given["resize"]).resize == "center-crop"
    assert "centre" not in run("finetune", "--help").output
