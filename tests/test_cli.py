"""The command line of every script: help, and the two-sided booleans of sweeps."""

import dataclasses
import importlib
import os
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

SCRIPTS = ["gail_ppo", "bc", "gail_state_seq", "gail_pixels_ae", "gail_rssm", "toy_pointnav"]
SCRIPTS = [name for name in SCRIPTS if (ROOT / f"{name}.py").exists()]


@pytest.mark.parametrize("name", [*SCRIPTS, "collect_expert_sac"])
def test_importing_does_nothing_and_help_explains_every_flag(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    commands = [["train"], ["collect"]] if name == "collect_expert_sac" else [[]]
    classes = [script.Args, script.Collect] if len(commands) > 1 else [script.Args]
    for command, args_class in zip(commands, classes):
        with pytest.raises(SystemExit) as exit_info:
            script.main([*command, "--help"])
        assert exit_info.value.code == 0
        text = capsys.readouterr().out
        for field in dataclasses.fields(args_class):
            assert f"--{field.name.replace('_', '-')}" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*SCRIPTS, "collect_expert_sac"])
def test_flags_of_other_kinds_may_be_added(name):
    """By somebody who copies the script: what is not known is not checked, and does no harm."""
    script = importlib.import_module(name)

    @dataclasses.dataclass
    class Mine(script.Args):
        hidden_sizes: tuple[int, ...] = (64, 64, 64)
        target_kl: float | None = None
        steps: int = 0

    args = Mine()
    with pytest.raises(script.UserError, match="--steps is 0, expected a number, more than 0"):
        script.check_settings(args, "", {}, {})
    script.check_settings(Mine(steps=1), " ".join(vars(args)), {}, {})


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_boolean_has_both_forms(name):
    script = importlib.import_module(name)
    for field in dataclasses.fields(script.Args):
        if field.type is bool:
            flag = field.name.replace("_", "-")
            for value in (True, False):
                for form in (f"--{flag}={value}", f"--{'' if value else 'no-'}{flag}"):
                    if field.name == "cuda" and value and not torch.cuda.is_available():
                        continue  # refused, as test_mistakes.py says
                    assert getattr(script.parse_args([form]), field.name) is value


@pytest.mark.parametrize("name", [*SCRIPTS, "collect_expert_sac"])
def test_what_macos_lacks_is_not_needed(name, monkeypatch, capsys):
    """No core affinity; and nobody asks for OpenGL."""
    script = importlib.import_module(name)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    args = script.parse_args(["train"] if name == "collect_expert_sac" else [])
    assert name == "toy_pointnav" or args.threads == 7
    assert "MUJOCO_GL" not in (ROOT / f"{name}.py").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_the_script_does(name, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(["--help"])
    assert stopped.value.code == 0
    assert script.__doc__.splitlines()[0] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", [*SCRIPTS, "collect_expert_sac"])
def test_who_interrupts_a_run_is_told_how_it_goes_on(name, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    script = importlib.import_module(name)
    monkeypatch.setattr(script, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        script.main(["train"] if name == "collect_expert_sac" else [])
    assert stopped.value.code == 130
    told = capsys.readouterr().err
    assert told.startswith("interrupted") and told.count("\n") == 1
    assert ("--resume <run>/checkpoint.pt" in told) == (name != "toy_pointnav")


@pytest.mark.parametrize("name", [*SCRIPTS, "collect_expert_sac"])
def test_train_checks_the_settings_of_a_program_that_calls_it(name):
    """A sweep agent's function or a notebook makes Args of its own, without a command line."""
    script = importlib.import_module(name)
    with pytest.raises(script.UserError, match="--seed is -1, expected a number"):
        script.train(script.Args(seed=-1))


@pytest.mark.parametrize("name", [*SCRIPTS, "collect_expert_sac"])
def test_settings_of_another_kind_are_named(name):
    """What tyro would refuse on the command line, a program can give."""
    script, wrong = importlib.import_module(name), {int: [6.0, np.int64(64), True], bool: [1, np.True_]}
    wrong |= {float: [np.float64(0.5), "0.5", None], str: [Path("runs"), 3, None]}
    for field in dataclasses.fields(script.Args):
        for value in wrong.get(field.type, ["nonsense", None]):
            flag = f"--{field.name.replace('_', '-')}"
            with pytest.raises(script.UserError) as stopped:
                script.Args(**{field.name: value}).check()
            kind = "one of" if typing.get_args(field.type) else f"a plain {field.type.__name__};"
            assert str(stopped.value).startswith(f"{flag} is {value!r}, expected {kind}")
    script.Args(seed=3).check()
