"""Sweep files: the command lines that a W&B agent would build from them are ones that the scripts take."""

import importlib
import itertools

import pytest
import yaml
from conftest import ROOT

SCRIPTS = ["bc", "collect_expert_sac", "gail_pixels_ae", "gail_ppo", "gail_rssm", "gail_state_seq", "toy_pointnav"]


def choices(parameter: dict) -> list:
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def command_lines(sweep: dict) -> list[list[str]]:
    """As the agent builds them: --name=value, booleans as True and False. Every value of every parameter is in one."""
    values = {name: choices(parameter) for name, parameter in sweep["parameters"].items()}
    rounds = max(map(len, values.values()))
    picked = (
        {name: list(itertools.islice(itertools.cycle(x), rounds))[i] for name, x in values.items()}
        for i in range(rounds)
    )
    return [[f"--{name}={value}" for name, value in choice.items()] for choice in picked]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_sweep_is_one_that_its_script_takes(name):
    sweep, script = yaml.safe_load((ROOT / f"sweeps/{name}.yaml").read_text()), importlib.import_module(name)
    assert sweep["program"] == f"{name}.py"
    assert f'"{sweep["metric"]["name"]}"' in (ROOT / f"{name}.py").read_text()
    assert sweep["metric"]["goal"] == "maximize"
    assert sweep["project"] == script.Args().wandb_project_name  # beside other runs; and it can be resumed
    assert sweep["method"] == "grid" or sweep["run_cap"] > 0  # random search has no end of its own
    assert sweep["method"] == "random" or "early_terminate" not in sweep  # grids compare what learns late, too
    assert sweep["command"][0] == "${env}" and sweep["command"][-1] == "${args}"
    fixed = sweep["command"][3:-1]
    assert "--track" in fixed
    for line in command_lines(sweep):
        args = script.parse_args([*fixed, *line])
        for flag in line:
            key, value = flag[2:].split("=")
            assert str(getattr(args, key)) == value or float(getattr(args, key)) == float(value)
        assert args.track


def test_every_script_has_a_sweep():
    assert sorted(path.stem for path in (ROOT / "sweeps").iterdir()) == SCRIPTS
