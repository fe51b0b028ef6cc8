"""What the documents tell their readers to type works."""

import dataclasses
import importlib
import json
import re
import shlex
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import DEMOS, ROOT

import gail_pixels_ae
import gail_ppo
import gail_rssm

README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
EVERYTHING = "\n".join([README, *DOCS.values(), (ROOT / "data/README.md").read_text()]).replace("\\\n", "")
COMMANDS = re.findall(r"^(?:torchrun [^#\n]*?|python )((?:data/)?\w+\.py[^#\n]*)", EVERYTHING, re.MULTILINE)
COMMANDS = sorted({command.strip() for command in COMMANDS})
SCRIPTS = ["bc", "collect_expert_sac", "gail_pixels_ae", "gail_ppo", "gail_rssm", "gail_state_seq", "toy_pointnav"]


def test_the_readme_is_short():
    assert README.count("\n") <= 250 and len(README.encode()) <= 14_000


def test_the_documents_have_commands_of_every_script():
    assert {command.split(".py")[0] for command in COMMANDS} == {*SCRIPTS, "data/demos"}


def test_they_name_every_suite_and_no_other():
    sys.path.insert(0, str(ROOT / "benchmark"))
    suites = importlib.import_module("run").SUITES
    table = DOCS["results"].split("## Measuring again")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == set(suites)
    assert set(re.findall(r"--suite (\w+)", EVERYTHING)) <= set(suites)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_that_matter_exist(script):
    section = re.search(rf"^## `{script}\.py`\n.*?(?=^## |\Z)", DOCS["scripts"], re.MULTILINE | re.DOTALL)[0]
    paragraph = re.search(r"^\*\*Flags that matter\*\*:.*?\n\n", section, re.MULTILINE | re.DOTALL)[0]
    module = importlib.import_module(script)
    flags = re.findall(r"`--(?:no-)?([a-z-]+)", paragraph)
    fields = {field.name for field in dataclasses.fields(module.Args)}
    assert flags and {flag.replace("-", "_") for flag in flags} <= fields


def test_every_metric_that_they_explain_is_logged():
    source = "".join((ROOT / f"{script}.py").read_text() for script in SCRIPTS)
    source += "".join(f'"reward/{name}_{x}" ' for name in ("env", "gail") for x in ("mean", "std"))
    source += "".join(f'"eval/{name}" ' for name in ("success_mean", "length_mean"))
    source += "".join(f'"ae/recon_{name}" ' for name in ("policy", "expert", "heldout"))
    explained = re.findall(r"`((?:charts|eval|disc|reward|losses|ae|bc|sac|time|model)/[\w]+)", EVERYTHING)
    assert len(set(explained)) > 30
    assert [name for name in explained if f'"{name}"' not in source] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/run").mkdir(parents=True)
    np.savez(tmp_path / "runs/run/evaluation.npz", mean_action=np.ones((3, 2)))
    if command.startswith("data/"):
        monkeypatch.syspath_prepend(ROOT / "data")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # for the one with --cuda
    script, *flags = shlex.split(command.removeprefix("data/").replace("<run>", "run"))
    module = importlib.import_module(script.removesuffix(".py"))
    if "--resume" in flags:  # needs its file
        assert set(flags[::2]) <= {"--resume", "--total-timesteps"}
    else:
        module.parse_args(flags)


def test_the_commands_of_the_benchmark_parse(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    commands = set(re.findall(r"python benchmark/(\w+)\.py([^#`\n&]*)", EVERYTHING))
    assert len(commands) > 8
    for name, flags in sorted(commands):
        module = importlib.import_module(name)
        if name == "eyes":  # has the flags of the pixel script
            gail_pixels_ae.parse_args(shlex.split(flags))
        elif name == "along":  # has the folders of runs
            assert flags.strip() == "runs/<run>"
        elif hasattr(module, "Args"):
            args = tyro.cli(module.Args, args=shlex.split(flags))
            assert getattr(args, "suite", "gail") in importlib.import_module("run").SUITES
        else:
            assert not flags.strip()


def test_the_worked_example_makes_a_set_that_trains(tmp_path, monkeypatch):
    register, code, *_ = re.findall(r"```python\n(.*?)```", DOCS["own_demonstrations"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    episodes = []
    for length, terminated in ((30, True), (40, False)):
        episode = {"observations": rng.normal(size=(length + 1, 11)), "actions": rng.uniform(-1, 1, (length, 3))}
        episodes.append(episode | {"rewards": rng.normal(size=length), "terminated": terminated})
    exec(code, {"episodes": episodes})
    demos = gail_ppo.load_demos(gail_ppo.Args(demos="my_demos.npz", env_id="Hopper-v4"), ["actions", "rewards"])
    assert demos["lengths"].tolist() == [30, 40] and demos["terminated"].tolist() == [True, False]
    (tmp_path / "my_envs.py").write_text(register)  # as the page begins
    (tmp_path / "my_package.py").write_text("from gymnasium.envs.mujoco.hopper_v4 import HopperEnv as MyEnv\n")
    monkeypatch.syspath_prepend(tmp_path)
    exec(code.replace("Hopper-v4", "Mine-v0"), {"episodes": episodes})
    flags = ["--total-timesteps", "400", "--num-envs", "4", "--num-steps", "50", "--eval-episodes", "2"]
    gail_ppo.main(["--env-id", "my_envs:Mine-v0", "--demos", "my_demos.npz", "--run-name", "a", *flags])
    assert (tmp_path / "runs/a/summary.json").exists()


def test_the_example_that_flattens_makes_an_environment(tmp_path, monkeypatch):
    _, _, code, _ = re.findall(r"```python\n(.*?)```", DOCS["own_demonstrations"], re.DOTALL)
    space = gym.spaces.Dict({"angle": gym.spaces.Box(-1, 1, (2,)), "speed": gym.spaces.Box(-8, 8, (1,))})

    class DictEnv(gym.Env):
        observation_space, action_space = space, gym.spaces.Box(-1, 1, (1,))

    gym.register("MyDict-v0", DictEnv)
    exec(code, {})
    envs = gail_ppo.make_envs({"env_id": "FlatDict-v0", "max_episode_steps": 5}, 2, 1)
    assert envs.single_observation_space.shape == (3,)
    with pytest.raises(gail_ppo.UserError, match="FlattenObservation"):
        gail_ppo.make_envs({"env_id": "MyDict-v0", "max_episode_steps": 5}, 2, 1)


@pytest.mark.parametrize(
    "expert, policy, offset, absorbing",
    [
        ([5000, 45000], [100000, 0], -2.30, 12.10),
        ([50000, 0], [2000, 98000], 3.91, -10.82),
        ([700, 300], [700, 300], 0.0, 0.0),
    ],
)
def test_the_page_on_ends_tells_what_the_scripts_do(expert, policy, offset, absorbing):
    """Its numbers, and that its program is theirs."""
    page = DOCS["own_demonstrations"]
    assert offset == 0 or (f"{expert}`" in page and f"{policy}`" in page)
    assert offset == 0 or (f" {offset:.2f}" in page and f" {absorbing:.2f}" in page)
    counted = [torch.tensor(x, dtype=torch.float64) for x in (expert, policy)]
    logits = gail_ppo.terminal_logits(*counted)
    assert logits.tolist() == pytest.approx([offset, absorbing], abs=0.005)
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1]
    names = {"torch": torch, "F": torch.nn.functional, "gamma": 0.9}
    names |= {"visits": {"expert": counted[0], "policy": counted[1].clone()}, "logit": torch.zeros(0)}
    names |= {"steps_left": torch.tensor([3]), "terminated": torch.tensor([False]), "next_values": torch.zeros(1)}
    exec(code, names)
    assert torch.equal(torch.stack([names["offset"], names["absorbing_logit"]]), logits)
    names |= {"logit": torch.zeros(2), "steps_left": torch.tensor([3, 40]), "terminated": torch.tensor([False, True])}
    names["next_values"] = torch.zeros(2)
    exec(code, names)
    assert names["visits"]["policy"].tolist() == [policy[0] + 2, policy[1] + 40]
    assert names["next_values"][0] == 0 and names["next_values"][1] == pytest.approx(10 * names["absorbing"].item())


def test_the_example_that_uses_a_policy_acts(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    flags = ["--total-timesteps", "400", "--num-envs", "4", "--eval-episodes", "2", "--demos", str(DEMOS)]
    gail_ppo.main([*flags, "--run-name", "my_run"])
    names: dict = {}
    exec(code, names)
    assert names["obs"].shape == (17,) and np.isfinite(names["reward"])


def test_the_example_of_a_program_that_trains_runs(tmp_path, monkeypatch):
    """With fewer steps."""
    example, *_ = re.findall(r"```python\n(.*?)```", DOCS["reading_a_run"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert "num_demos=5" in example and "1000000" in example
    few = "num_demos=5, total_timesteps=3200, eval_episodes=2, threads=1"
    exec(example.replace("num_demos=5", few).replace("1000000", "6400"), {})
    assert json.loads((tmp_path / "runs/five/summary.json").read_text())["env_steps"] == 6400


def test_the_examples_that_use_policies_with_a_memory_act(tmp_path, monkeypatch, capsys):
    library, rssm, pixels = re.findall(r"```python\n(.*?)```", DOCS["reading_a_run"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    common = ["--demos", str(DEMOS), "--num-envs", "4", "--eval-episodes", "2", "--threads", "1"]
    small = "--updates 1 --num-steps 20 --batch-size 4 --sequence-length 12 --num-starts 8 --horizon 3".split()
    gail_rssm.main([*common, "--run-name", "my_rssm", *small, "--total-timesteps", "1200"])
    names: dict = {}
    exec(rssm, names)
    assert names["truncated"] and np.isfinite(names["reward"])
    small = "--num-steps 8 --ae-steps 1 --pretrain-steps 1 --predictor-steps 1 --update-epochs 1".split()
    gail_pixels_ae.main([*common, "--run-name", "my_pixels", *small, "--total-timesteps", "96"])
    exec(pixels, names)
    shapes, returns = "torch.Size([4, 56, 96]) torch.Size([4, 6])", names["step"]["return"]
    assert capsys.readouterr().out.count(shapes) == 100 and returns.isfinite().all() and len(returns.unique()) == 4


def test_the_diff_names_lines_that_are_there():
    (diff,) = re.findall(r"```diff\n(.*?)```", DOCS["own_demonstrations"], re.DOTALL)
    source = (ROOT / "gail_ppo.py").read_text().splitlines()
    removed = [line[1:] for line in diff.splitlines() if line.startswith("- ")]
    assert len(removed) == 2
    assert all(source.count(line) == 1 for line in removed)


def test_what_the_readme_says_of_the_code_is_there():
    source = (ROOT / "gail_ppo.py").read_text()
    table = README.split("## Copying a script")[1].split("\n## ")[0]
    rows = re.findall(r"\|([^|]+)\|$", table, re.MULTILINE)[2:]
    names = re.findall(r"`(\w+)(?:\.(\w+))?`", "".join(rows).replace("`gym.register`", ""))
    assert len(names) > 5
    for name, method in names:
        assert re.search(rf"^(class|def) {name}\b", source, re.MULTILINE) and f"def {method}" in source


def test_the_shipped_set_is_the_default():
    assert DEMOS.exists() and gail_ppo.Args().demos == str(DEMOS.relative_to(ROOT))
