"""What the README tells its readers to type works."""

import dataclasses
import importlib
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import DEMOS, ROOT

import gail_ppo

README = (ROOT / "README.md").read_text()
BOTH = (README + (ROOT / "data/README.md").read_text()).replace("\\\n", "")
COMMANDS = re.findall(r"^(?:torchrun [^#\n]*?|python )((?:\w+)\.py[^#\n]*)", BOTH, re.MULTILINE)
COMMANDS = [command.strip() for command in COMMANDS]


def test_the_readme_has_commands_of_every_script():
    assert {command.split(".py")[0] for command in COMMANDS} == {
        "bc",
        "collect_expert_sac",
        "gail_pixels_ae",
        "gail_ppo",
        "gail_state_seq",
        "toy_pointnav",
    }


def test_it_names_every_suite_and_no_other():
    sys.path.insert(0, str(ROOT / "benchmark"))
    suites = importlib.import_module("run").SUITES
    table = README.split("### Measuring again")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == set(suites)
    assert set(re.findall(r"--suite (\w+)", README)) <= set(suites)


@pytest.mark.parametrize("script", sorted({command.split(".py")[0] for command in COMMANDS}))
def test_the_flags_that_matter_exist(script):
    section = re.search(rf"^## [^\n]*`{script}\.py`\n.*?(?=^## )", README, re.MULTILINE | re.DOTALL)[0]
    paragraph = re.search(r"^\*\*Flags that matter\*\*:.*?\n\n", section, re.MULTILINE | re.DOTALL)[0]
    module = importlib.import_module(script)
    args = module.Train if script == "collect_expert_sac" else module.Args
    flags = re.findall(r"`--(?:no-)?([a-z-]+)", paragraph)
    assert flags and {flag.replace("-", "_") for flag in flags} <= {field.name for field in dataclasses.fields(args)}


def test_every_metric_that_it_explains_is_logged():
    scripts = ("bc", "collect_expert_sac", "gail_pixels_ae", "gail_ppo", "gail_state_seq", "toy_pointnav")
    logged = {column for script in scripts for column in importlib.import_module(script).COLUMNS}
    explained = re.findall(r"`((?:charts|eval|disc|reward|losses|ae|bc|sac|time)/[\w]+)", README)
    assert len(set(explained)) > 30
    assert all(name in logged or name == "eval/slow_" for name in explained)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # for the one with --cuda
    script, *flags = shlex.split(command.replace("<run>", "run"))
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "collect_expert_sac.py":
        module.parse_args(flags, module.Train | module.Collect | module.Inspect | module.Convert)
    else:
        module.parse_args(flags, module.Args).check()


def test_the_worked_example_makes_a_set_that_trains(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    episodes = []
    for length, terminated in ((30, True), (40, False)):
        episode = {"observations": rng.normal(size=(length + 1, 11)), "actions": rng.uniform(-1, 1, (length, 3))}
        episodes.append(episode | {"rewards": rng.normal(size=length), "terminated": terminated})
    exec(code, {"episodes": episodes})
    demos = gail_ppo.load_demos("my_demos.npz", "Hopper-v4", 0, rng, ("actions", "rewards"))
    assert demos.lengths.tolist() == [30, 40] and demos.terminated.tolist() == [True, False]
    flags = ["--total-timesteps", "400", "--num-envs", "4", "--num-steps", "50", "--eval-episodes", "2"]
    gail_ppo.main(["--env-id", "Hopper-v4", "--demos", "my_demos.npz", "--no-center-reward", "--run-name", "a", *flags])
    assert (tmp_path / "runs/a/summary.json").exists()


def test_the_diff_names_lines_that_are_there():
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    source = (ROOT / "gail_ppo.py").read_text().splitlines()
    removed = [line[1:] for line in diff.splitlines() if line.startswith("- ")]
    assert len(removed) == 5
    assert all(source.count(line) == 1 for line in removed)


def test_the_demonstrations_named_in_the_readme_are_shipped():
    assert DEMOS.exists() and str(DEMOS.relative_to(ROOT)) in README
