"""data/demos.py: it shows sets, and translates the author's pickles without running them."""

import json
import math
import pickle
import sys

import numpy as np
import pytest
from conftest import DEMOS, ROOT

sys.path.insert(0, str(ROOT / "data"))
import demos  # noqa: E402


def mistake(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit_info:
        demos.main([*argv])
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert "code from a file ran" not in printed.out
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


# The original author's pickles


def test_pickles_go_both_ways_and_the_lost_final_state_is_found_again(tmp_path):
    demos.main(["convert", "--source", str(DEMOS), "--target", str(tmp_path / "a.pkl")])
    trajectories = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert [len(steps) for steps in trajectories] == [100] * 50
    assert set(trajectories[0][0]) == {"state", "action", "reward", "done"}
    assert [bool(step["done"]) for step in trajectories[1]] == [False] * 99 + [True]

    demos.main(
        ["convert", "--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "b.npz")]
    )
    before, after = np.load(DEMOS), np.load(tmp_path / "b.npz")
    assert {*before.files} == {*after.files}
    for name in before.files:
        if name == "metadata":
            continue
        assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
        if name != "qpos":
            np.testing.assert_allclose(after[name], before[name], atol=1e-4)
    np.testing.assert_array_equal(after["actions"], before["actions"])
    for episode in range(50):  # x is counted from where the episode began
        rows = slice(101 * episode, 101 * (episode + 1))
        x = before["qpos"][rows, 0] - before["qpos"][rows, 0][0]
        np.testing.assert_allclose(after["qpos"][rows, 0], x, atol=1e-4)
        np.testing.assert_allclose(after["qpos"][rows, 1:], before["qpos"][rows, 1:], atol=1e-4)
    metadata = json.loads(str(after["metadata"]))
    assert metadata["env_id"] == "HalfCheetah-v4" and metadata["max_episode_steps"] == 100
    assert metadata["return_mean"] == json.loads(str(before["metadata"]))["return_mean"]
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_pickle_of_plain_lists_and_episodes_of_any_length(tmp_path):
    """As from another numpy, or none: floats in lists; the final state is the simulator's."""
    step = {"state": [0.0] * 17, "action": [0.5] * 6, "reward": 1.0, "done": False}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([[step] * 3, [step]]))
    demos.main(
        ["convert", "--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "a.npz")]
    )
    file = np.load(tmp_path / "a.npz")
    assert file["lengths"].tolist() == [3, 1] and file["observations"].shape == (6, 17)
    assert json.loads(str(file["metadata"]))["max_episode_steps"] == 3
    np.testing.assert_array_equal(file["observations"][3], file["observations"][5])
    assert (file["observations"][3] != 0).all()  # the body moves
    np.testing.assert_allclose(np.diff(file["qpos"][:4, 0]), (1.0 + 0.1 * 6 * 0.25) * 0.05)


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


@pytest.mark.parametrize(
    "content", [[[Hostile()]], Hostile(), [], [[]], [[{"state": 1}]], {"a": 1}]
)
def test_bad_pickles_run_nothing_and_are_refused(tmp_path, capsys, content):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
    message = mistake(
        capsys,
        "convert",
        "--source",
        str(tmp_path / "bad.pkl"),
        "--target",
        str(tmp_path / "x.npz"),
    )
    assert "--source" in message and not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    "module", ["os.system", "builtins.eval", "numpy.load", "numpy.core.multiarray.fromfile"]
)
def test_an_unpickler_that_admits_arrays_alone(module, tmp_path, capsys):
    name = module.rpartition(".")
    (tmp_path / "bad.pkl").write_bytes(f"c{name[0]}\n{name[2]}\n.".encode())
    flags = ["--source", str(tmp_path / "bad.pkl"), "--target", str(tmp_path / "x.npz")]
    assert f"it asks for {module}" in mistake(capsys, "convert", *flags)


@pytest.mark.parametrize("reward", [np.array([1.0]), math.nan])
def test_pickles_of_odd_rewards_are_refused_and_leave_no_folder(tmp_path, capsys, reward):
    step = {"state": np.zeros(17), "action": np.zeros(6), "reward": reward, "done": True}
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps([[step, step]]))
    flags = ["--source", str(tmp_path / "odd.pkl"), "--target", str(tmp_path / "new/x.npz")]
    assert "expected" in mistake(capsys, "convert", *flags) and not (tmp_path / "new").exists()


# Looking into a set


def test_the_table_tells_what_is_in_a_set(tmp_path, capsys):
    demos.main(["inspect", "--demos", str(DEMOS), "--figure", str(tmp_path / "demos.png")])
    shown = capsys.readouterr().out
    assert "50, of 100 to 100 steps" in shown and "668.7 ± 20.9, from 617.1 to 713.8" in shown
    assert "termination 0, time limit 50" in shown and "expert_sha256" in shown
    assert [line.split()[-1] for line in shown.splitlines() if "physics state" in line] == ["yes"]
    assert (tmp_path / "demos.png").stat().st_size > 10_000


def test_inspecting_a_set_that_does_not_say_its_environment(tmp_path, capsys, demo_file):
    path = demo_file(metadata=json.dumps({"max_episode_steps": 100}))
    demos.main(["inspect", "--demos", path, "--figure", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").exists() and "no frames" in capsys.readouterr().out
    assert "--figure" in mistake(
        capsys, "inspect", "--demos", path, "--figure", str(tmp_path / "a.xyz")
    )


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        (
            {"rewards": np.zeros(3, np.float32)},
            "'rewards' is float32 of shape (3,), expected 12 rows",
        ),
        ({"actions": np.zeros((12, 6), "U1")}, "'actions' is <U1"),
        ({"observations": np.zeros((15, 17, 1))}, "'observations' is float64 of shape (15, 17, 1)"),
        ({"observations": np.full((15, 17), np.nan)}, "NaN or infinity"),
        ({"qpos": np.zeros((12, 9))}, "'qpos'"),
        ({"lengths": np.array([], np.int64)}, "'lengths'"),
        ({"lengths": np.array([12, 0, 0])}, "'lengths'"),
        ({"actions": None}, "the field 'actions' is missing"),
        ({"metadata": None}, "the field 'metadata' is missing"),
        ({"metadata": "{}"}, "max_episode_steps"),
        ({"metadata": "no JSON"}, "--demos "),
        ({"rewards": np.array([{}], dtype=object)}, "Object arrays cannot be loaded"),
    ],
)
def test_a_set_with_a_fault_is_refused(demo_file, capsys, replaced, says):
    assert says in mistake(capsys, "inspect", "--demos", demo_file(**replaced))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["inspect", "--demos", "nowhere.npz"], "nowhere.npz: No such file"),
        (["convert", "--source", "a.npz", "--target", "b.npz"], "--source"),
        (["convert", "--source", "nowhere.pkl", "--target", "b.npz"], "--source nowhere.pkl"),
        (["convert", "--source", "nowhere.npz", "--target", "b.pkl"], "--source nowhere.npz"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    assert named in mistake(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_outputs_in_new_folders_and_where_nothing_can_be_written(tmp_path, capsys, demo_file):
    source = demo_file()
    demos.main(["convert", "--source", source, "--target", str(tmp_path / "new/folder/a.pkl")])
    demos.main(["inspect", "--demos", source, "--figure", str(tmp_path / "another/a.png")])
    assert (tmp_path / "new/folder/a.pkl").exists() and (tmp_path / "another/a.png").exists()
    (tmp_path / "file").write_text("")
    for argv in (
        ["convert", "--source", source, "--target"],
        ["inspect", "--demos", source, "--figure"],
    ):
        assert f"{tmp_path}/file" in mistake(capsys, *argv, str(tmp_path / "file/a.pkl"))
