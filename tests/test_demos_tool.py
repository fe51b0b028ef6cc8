"""data/demos.py and formats.py: they show sets, and translate other formats into sets and back."""

import io
import json
import math
import pickle
import re
import sys
import types
import warnings
from contextlib import contextmanager

import gymnasium as gym
import numpy as np
import pytest
from conftest import DEMOS, ROOT

import gail_ppo

sys.path.insert(0, str(ROOT / "data"))
import demos  # noqa: E402
import formats  # noqa: E402

CHEETAH = ["--env-id", "HalfCheetah-v4"]


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

    demos.main(["convert", "--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "b.npz")])
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
    demos.main(["convert", "--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "a.npz"), *CHEETAH])
    file = np.load(tmp_path / "a.npz")
    assert file["lengths"].tolist() == [3, 1] and file["observations"].shape == (6, 17)
    assert json.loads(str(file["metadata"]))["max_episode_steps"] == 3
    np.testing.assert_array_equal(file["observations"][3], file["observations"][5])
    assert (file["observations"][3] != 0).all()  # the body moves
    np.testing.assert_allclose(np.diff(file["qpos"][:4, 0]), (1.0 + 0.1 * 6 * 0.25) * 0.05)


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


@pytest.mark.parametrize("content", [[[Hostile()]], Hostile(), [], [[]], [[{"state": 1}]], {"a": 1}])
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


@pytest.mark.parametrize("module", ["os.system", "builtins.eval", "numpy.load", "numpy.core.multiarray.fromfile"])
def test_an_unpickler_that_admits_arrays_alone(module, tmp_path, capsys):
    name = module.rpartition(".")
    (tmp_path / "bad.pkl").write_bytes(f"c{name[0]}\n{name[2]}\n.".encode())
    flags = ["--source", str(tmp_path / "bad.pkl"), "--target", str(tmp_path / "x.npz")]
    assert f"it asks for {module}" in mistake(capsys, "convert", *flags)


def test_a_pickle_that_makes_an_array_of_forged_pointers_is_refused(tmp_path, capsys):
    """numpy.ndarray, called with a buffer and dtype O, would take the buffer's bytes for addresses of objects."""
    forged = b"cnumpy\nndarray\n((I2\ntcnumpy\ndtype\n(VO\ntRC\x10AAAAAAAABBBBBBBBtR."
    (tmp_path / "bad.pkl").write_bytes(forged)
    flags = ["--source", str(tmp_path / "bad.pkl"), "--target", str(tmp_path / "x.npz"), *CHEETAH]
    assert "not callable" in mistake(capsys, "convert", *flags)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_scalars_of_every_protocol_are_read(protocol):
    content = [
        np.arange(6.0).reshape(2, 3).T,
        np.float32(2.5),
        np.array(["a", "bc"]),
        np.array([True]),
        {"a": (1, b"x")},
    ]
    read = demos.PlainUnpickler(io.BytesIO(pickle.dumps(content, protocol))).load()
    for x, y in zip(read[:4], content[:4]):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype
    assert read[4] == content[4]


@pytest.mark.parametrize("reward", [np.array([1.0]), math.nan])
def test_pickles_of_odd_rewards_are_refused_and_leave_no_folder(tmp_path, capsys, reward):
    step = {"state": np.zeros(17), "action": np.zeros(6), "reward": reward, "done": True}
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps([[step, step]]))
    flags = ["--source", str(tmp_path / "odd.pkl"), "--target", str(tmp_path / "new/x.npz"), *CHEETAH]
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
    shown = capsys.readouterr().out
    assert (tmp_path / "a.png").exists() and "physics state        no" in shown
    assert "--figure" in mistake(capsys, "inspect", "--demos", path, "--figure", str(tmp_path / "a.xyz"))


@pytest.mark.parametrize(
    ("replaced", "row"),
    [
        ({"rewards": None}, "return               unknown"),
        ({"rewards": np.full(12, np.nan)}, "return               unknown"),
        (
            {"rewards": np.array([1.0] * 11 + [np.nan])},
            "return               4.0 ± 1.0, from 3.0 to 5.0 (that of 1 episodes is unknown)",
        ),
        ({"actions": None}, "actions              none"),
        (
            {"actions": np.linspace([-1, 0], [0.5, 2], 12)},
            "actions              2 numbers, from -1 to 0.5, 0 to 2",
        ),
        ({"actions": np.arange(12) % 4}, "actions              discrete, from 0 to 3"),
        ({"reward": np.ones(12), "act": np.ones(12)}, "read by nobody       act, reward"),
    ],
)
def test_what_may_be_missing_and_discrete_actions(tmp_path, capsys, demo_file, replaced, row):
    figure = tmp_path / "a.png"
    demos.main(["inspect", "--demos", demo_file(**replaced), "--figure", str(figure)])
    assert row in [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        (
            {"rewards": np.zeros(3, np.float32)},
            "'rewards' is float32 of shape (3,), expected numbers of shape (12,)",
        ),
        ({"actions": np.zeros((12, 6), "U1")}, "'actions' is <U1"),
        ({"observations": np.zeros((15, 17, 1))}, "'observations' is float64 of shape (15, 17, 1)"),
        ({"observations": np.full((15, 17), np.nan)}, "NaN or infinity"),
        ({"qpos": np.zeros((12, 9))}, "'qpos'"),
        ({"lengths": np.array([], np.int64)}, "it holds no episodes"),
        ({"lengths": np.array([12, 0, 0])}, "'lengths' is int64 of shape (3,), from 0, expected (E,) int64"),
        ({"lengths": np.array([4.0, 4.0, 4.0])}, "'lengths' is float64 of shape (3,), from 4.0, expected"),
        ({"actions": np.zeros(12, np.float32)}, "fractions of shape (L,), expected (L, A), or whole numbers"),
        ({"qvel": np.zeros((12, 9))}, "'qvel' is float64 of shape (12, 9), expected 15 rows"),
        (
            {"terminated": np.zeros(3, int)},
            "'terminated' is int64 of shape (3,), expected (3,) bool",
        ),
        ({"truncated": np.ones((3, 1), bool)}, "'truncated' is bool of shape (3, 1)"),
        ({"actions": np.full((12, 6), np.inf)}, "'actions' holds NaN or infinity"),
        ({"observations": None}, "the field 'observations' is missing"),
        ({"terminated": None}, "the field 'terminated' is missing"),
        ({"lengths": None}, "the field 'lengths' is missing"),
        ({"metadata": None}, "the field 'metadata' is missing"),
        ({"metadata": "{}"}, "max_episode_steps"),
        (
            {"metadata": json.dumps({"max_episode_steps": 4})},
            "an episode has 5 steps, but max_episode_steps is 4",
        ),
        ({"metadata": "no JSON"}, "its metadata is no JSON"),
        ({"rewards": np.array([{}], dtype=object)}, "or of objects; expected arrays of numbers"),
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


def test_discrete_actions_are_drawn_as_counts(tmp_path, monkeypatch, demo_file):
    drawn = []

    class Kept(demos.Figure):
        def savefig(self, *args, **kwargs):
            drawn.append(self)
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(demos, "Figure", Kept)
    path = demo_file(actions=np.array([0] * 5 + [1] * 3 + [4] * 4))
    demos.main(["inspect", "--demos", path, "--figure", str(tmp_path / "a.png")])
    bars = drawn[0].axes[2].patches
    assert [bar.get_height() for bar in bars] == [5, 3, 4]
    assert [bar.get_center()[0] for bar in bars] == [0, 1, 4]


# Other formats


def convert(source, target, *flags) -> None:
    demos.main(["convert", "--source", str(source), "--target", str(target), *flags])


def load(path, env_id) -> dict:
    """As gail_ppo.py reads a set, where it was made: with all that is asked of one."""
    with np.load(path, allow_pickle=False) as file:
        limit = json.loads(str(file["metadata"]))["max_episode_steps"]
        arrays = dict(file)
    loaded = gail_ppo.load_demos(gail_ppo.Args(demos=str(path), env_id=env_id), ["actions"])
    assert loaded["max_episode_steps"] == limit
    return loaded | {name: arrays[name] for name in arrays if name != "metadata"}


def make_episodes(lengths=(4, 2, 3), terminated=(False, True, True), discrete=False) -> list[dict]:
    """Episodes of distinct numbers: row i of an episode is followed by row i + 1."""
    rng = np.random.default_rng(0)
    episodes = []
    for length, flag in zip(lengths, terminated):
        actions = rng.normal(size=(length, 2)).astype(np.float32)
        if discrete:
            actions = rng.integers(3, size=length)
        episode = {"observations": rng.normal(size=(length + 1, 3)).astype(np.float32)}
        episode |= {"actions": actions, "rewards": rng.normal(size=length).astype(np.float32)}
        episodes.append(episode | {"terminated": flag})
    return episodes


def joined(episodes, name, rows=slice(None)) -> np.ndarray:
    return np.concatenate([episode[name][rows] for episode in episodes])


def in_a_row(episodes) -> dict[str, np.ndarray]:
    """D4RL's fields."""
    ends = [np.arange(len(x["actions"])) == len(x["actions"]) - 1 for x in episodes]
    return {
        "observations": joined(episodes, "observations", slice(-1)),
        "next_observations": joined(episodes, "observations", slice(1, None)),
        "actions": joined(episodes, "actions"),
        "rewards": joined(episodes, "rewards"),
        "terminals": np.concatenate([e & x["terminated"] for e, x in zip(ends, episodes)]),
        "timeouts": np.concatenate([e & (not x["terminated"]) for e, x in zip(ends, episodes)]),
    }


def assert_is(path, episodes, lost=False, env_id="Hopper-v4", limit=4) -> None:
    """The set holds these episodes, each without its last step if that is lost."""
    loaded = load(path, env_id)
    states, steps = (slice(-1), slice(-1)) if lost else (slice(None), slice(None))
    assert loaded["lengths"].tolist() == [len(x["actions"]) - lost for x in episodes]
    assert loaded["terminated"].tolist() == [x["terminated"] for x in episodes]
    assert loaded["truncated"].tolist() == [not x["terminated"] for x in episodes]
    assert loaded["max_episode_steps"] == limit
    for name, rows in (("observations", states), ("actions", steps), ("rewards", steps)):
        wanted = joined(episodes, name, rows)
        assert loaded[name].dtype == wanted.dtype
        np.testing.assert_array_equal(loaded[name], wanted)


@pytest.fixture
def a_set(tmp_path):
    """A function that writes episodes as a set, with some fields replaced; its path."""

    def write(episodes, **replaced):
        flags = np.array([x["terminated"] for x in episodes])
        fields = {name: joined(episodes, name) for name in ("observations", "actions", "rewards")}
        fields |= {"terminated": flags, "truncated": ~flags}
        fields |= {"lengths": np.array([len(x["actions"]) for x in episodes])}
        fields |= {"metadata": json.dumps({"env_id": "Hopper-v4", "max_episode_steps": 4})}
        fields |= replaced
        fields = {name: x for name, x in fields.items() if x is not None}
        np.savez(tmp_path / "set.npz", **fields)
        return tmp_path / "set.npz"

    return write


HOPPER = ("--env-id", "Hopper-v4")
HOPPER_OF_4 = (*HOPPER, "--max-episode-steps", "4")


# Pickles of plain arrays


@pytest.mark.parametrize("observation", ["observation", "obs", "state"])
def test_a_pickle_of_steps(tmp_path, capsys, observation):
    content, episodes = [], make_episodes()
    for episode in episodes:
        steps = []
        for i, action in enumerate(episode["actions"]):
            last = i == len(episode["actions"]) - 1
            step = {observation: episode["observations"][i], "action": action, "info": {"x": None}}
            step |= {"reward": float(episode["rewards"][i])}
            step |= {"terminated": last and episode["terminated"], "truncated": last}
            steps.append(step)
        content.append(steps)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    convert(tmp_path / "a.pkl", tmp_path / "a.npz", *HOPPER)
    assert_is(tmp_path / "a.npz", episodes, lost=True)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "3 of 9 steps lost: the last of an episode has no observation after it"
    assert printed[1] == "3 episodes of 1 to 3 steps, Hopper-v4, time limit 4"


@pytest.mark.parametrize("discrete", [False, True])
def test_pickles_of_arrays(tmp_path, capsys, discrete):
    episodes = make_episodes(discrete=discrete)
    (tmp_path / "final.pkl").write_bytes(pickle.dumps(episodes))
    convert(tmp_path / "final.pkl", tmp_path / "a.npz", *HOPPER)
    assert_is(tmp_path / "a.npz", episodes)

    row = in_a_row(episodes)
    (tmp_path / "row.pickle").write_bytes(pickle.dumps(row))
    convert(tmp_path / "row.pickle", tmp_path / "b.npz", *HOPPER)
    assert_is(tmp_path / "b.npz", episodes)

    cuts = np.cumsum([len(x["actions"]) for x in episodes])[:-1]  # as Decision Transformer's files
    del row["timeouts"]
    pieces = {name: np.split(column, cuts) for name, column in row.items()}
    pieces = [{name: pieces[name][i] for name in pieces} for i in range(3)]
    (tmp_path / "pieces.pkl").write_bytes(pickle.dumps(pieces))
    convert(tmp_path / "pieces.pkl", tmp_path / "c.npz", *HOPPER)
    assert_is(tmp_path / "c.npz", episodes)

    (tmp_path / "one.pkl").write_bytes(pickle.dumps(episodes[0]))
    convert(tmp_path / "one.pkl", tmp_path / "d.npz", *HOPPER)
    assert_is(tmp_path / "d.npz", episodes[:1])
    assert "lost" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "terminated"),
    [
        ({"terminated": True, "truncated": True}, True),
        ({"terminated": False, "done": True}, False),
        ({"terminated": np.array([True, False])}, False),  # that of the last step counts
        ({"truncated": True, "done": True}, False),
        ({"truncated": False, "done": True}, True),
        ({"truncated": False, "done": False}, False),  # the recording stopped
        ({"truncated": True}, False),
        ({"truncated": False}, None),
        ({"done": True}, None),
        ({"terminal": True}, None),  # imitation's name, for any end
        ({"dones": [1.0, 0.0]}, False),
        ({}, None),
    ],
)
def test_how_an_episode_ended(flags, terminated):
    columns = formats.known_columns({"obs": np.zeros((2, 1)), "act": np.zeros((2, 1))} | flags)
    assert formats.how_it_ended(columns) is terminated


def test_ends_without_a_reason_are_told_by_the_time_limit(tmp_path, capsys):
    episodes = make_episodes()
    content = [{name: x for name, x in e.items() if name != "terminated"} for e in episodes]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    flags = ["--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "new/a.npz")]
    message = mistake(capsys, "convert", *flags, *HOPPER)
    assert "not which of them a time limit cut: give it with --max-episode-steps" in message
    assert not (tmp_path / "new").exists()
    demos.main(["convert", *flags, *HOPPER_OF_4])
    assert_is(tmp_path / "new/a.npz", episodes)
    said = "taken: 1 of 4 steps as cut by the time limit, 2 as terminated"
    assert said in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]


def test_the_time_limit_is_not_guessed(tmp_path, capsys):
    """The longest episode fell: the limit is further away."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(make_episodes(terminated=(True, False, True))))
    flags = ["--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "a.npz"), *HOPPER]
    assert "no episode reached its time limit" in mistake(capsys, "convert", *flags)
    long = mistake(capsys, "convert", *flags, "--max-episode-steps", "3")
    assert "an episode has 4 steps, but the time limit is 3" in long
    demos.main(["convert", *flags, "--max-episode-steps", "1000"])
    assert load(tmp_path / "a.npz", "Hopper-v4")["max_episode_steps"] == 1000


def test_numbers_are_not_rounded(tmp_path):
    (episode,) = make_episodes((3,), (False,))
    episode["observations"] = np.linspace(0, 1, 12).reshape(4, 3)  # thirds are no float32
    episode["actions"] = episode["actions"].astype(np.float64)  # these are
    episode["rewards"] = np.array([2**53 - 1, 0, 0])  # whole, but no float32
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([episode]))
    convert(tmp_path / "a.pkl", tmp_path / "a.npz", *HOPPER)
    loaded = np.load(tmp_path / "a.npz")
    names = ("observations", "actions", "rewards")
    assert [loaded[x].dtype for x in names] == [np.float64, np.float32, np.float64]
    assert all((loaded[x] == episode[x]).all() for x in names)


def test_rewards_may_be_unknown_to_a_pickle_and_episodes_of_one_step_are_lost(tmp_path, capsys):
    content = [{"obs": np.zeros((n, 3)), "act": np.zeros((n, 2)), "done": False} for n in (1, 2)]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    convert(tmp_path / "a.pkl", tmp_path / "a.npz", *HOPPER)
    loaded = load(tmp_path / "a.npz", "Hopper-v4")
    assert loaded["lengths"].tolist() == [1] and "rewards" not in loaded
    printed = capsys.readouterr().out
    assert "2 of 3 steps lost" in printed and "1 of 2 episodes lost: no other step" in printed
    (tmp_path / "b.pkl").write_bytes(pickle.dumps([replace(rewards=[1.0, None, 2.0])]))
    convert(tmp_path / "b.pkl", tmp_path / "b.npz", *HOPPER)
    np.testing.assert_equal(load(tmp_path / "b.npz", "Hopper-v4")["rewards"], [1.0, np.nan, 2.0])


def replace(**replaced) -> dict:
    return make_episodes((3,), (False,))[0] | replaced


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            [replace(observations=np.zeros((3, 2, 2)))],
            "observations of shape (3, 2, 2) for 3 actions",
        ),
        ([replace(observations=np.zeros((6, 2)))], "observations of shape (6, 2) for 3 actions"),
        ([replace(observations=np.zeros(4))], "observations of shape (4,) for 3 actions"),
        ([replace(observations=["a", "b", "c"])], "'observations' is <U1, expected numbers"),
        ([replace(observations=np.full((4, 3), np.nan))], "expected finite numbers"),
        ([replace(actions=np.full((3, 2), np.inf))], "expected finite numbers"),
        ([replace(actions=np.zeros((3, 2, 2)))], "actions of shape (3, 2, 2)"),
        ([replace(rewards=np.zeros(2))], "rewards of shape (2,), expected (3,)"),
        ([replace(rewards=["a", None, "b"])], "'rewards' is <U"),
        ([replace(observations=[], actions=[])], "an episode has no steps"),
        ([make_episodes()[0], {**make_episodes()[1], "rew": 0}, {"obs": 1}], "none of the fields"),
        ([replace(), {n: x for n, x in replace().items() if n != "rewards"}], "others do not"),
        ([[(0, 1, 2)]], "a step is a tuple, expected a dict"),
        ([3], "an episode is no list of steps"),
        (3, "it holds a int, expected a list of episodes"),
        ([[{"obs": [0.0], "act": [0.0]}, {"obs": [0.0]}]], "the field 'act' is missing"),
        ([], "it is empty"),
        (
            [{"obs": np.zeros((1, 3)), "act": np.zeros((1, 2)), "done": 0}],
            "no episode has two steps",
        ),
    ],
)
def test_pickles_with_a_fault_are_refused(tmp_path, capsys, content, says):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    flags = ["--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "a.npz")]
    message = mistake(capsys, "convert", *flags, *HOPPER_OF_4)
    assert message.startswith(f"error: --source {tmp_path / 'a.pkl'}: ") and says in message


# Stable-Baselines


@pytest.mark.parametrize("discrete", [False, True])
def test_stable_baselines(tmp_path, capsys, a_set, discrete):
    episodes = make_episodes(discrete=discrete)
    starts = np.array([1, 0, 0, 0, 1, 0, 1, 0, 0], bool)
    np.savez(
        tmp_path / "sb.npz",
        obs=joined(episodes, "observations", slice(-1)),
        actions=joined(episodes, "actions").reshape(9, -1),
        rewards=joined(episodes, "rewards")[:, None],  # as from its vectorized environments
        episode_returns=np.zeros(3),
        episode_starts=starts,
    )
    convert(tmp_path / "sb.npz", tmp_path / "a.npz", *HOPPER_OF_4)
    assert_is(tmp_path / "a.npz", episodes, lost=True)
    assert "3 of 9 steps lost" in capsys.readouterr().out

    convert(a_set(episodes), tmp_path / "back.npz")
    before, after = np.load(tmp_path / "sb.npz"), np.load(tmp_path / "back.npz")
    assert {*before.files} == {*after.files}
    for name in ("obs", "actions", "episode_starts"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(after["rewards"], before["rewards"][:, 0])
    returns = [x["rewards"].sum() for x in episodes]
    np.testing.assert_allclose(after["episode_returns"], returns)


def test_stable_baselines3_plays_and_the_old_layout_is_read(tmp_path):
    """Version 3 records nothing itself; its policy plays as generate_expert_traj of version 2."""
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.vec_env import DummyVecEnv

    envs = DummyVecEnv([lambda: gym.make("CartPole-v1", max_episode_steps=20)])
    model = sb3.PPO("MlpPolicy", envs, n_steps=64, seed=0)
    obs, observations, actions, rewards, starts = envs.reset(), [], [], [], [True]
    while sum(starts) < 6:
        action, _ = model.predict(obs)
        observations.append(obs[0])
        actions.append(action)
        obs, reward, done, _ = envs.step(action)
        rewards.append(reward)
        starts.append(done[0])
    columns = {"obs": observations, "actions": actions, "rewards": rewards}
    np.savez(tmp_path / "sb.npz", episode_starts=starts[:-1], **columns)
    flags = ("--env-id", "CartPole-v1", "--max-episode-steps", "20")
    convert(tmp_path / "sb.npz", tmp_path / "a.npz", *flags)
    loaded = load(tmp_path / "a.npz", "CartPole-v1")
    assert (loaded["lengths"] + 1).sum() == len(observations) and len(loaded["lengths"]) == 5
    np.testing.assert_array_equal(loaded["observations"], observations)
    assert loaded["actions"].dtype == np.int64 and loaded["actions"].ndim == 1
    np.testing.assert_array_equal(loaded["terminated"], loaded["lengths"] + 1 < 20)


# imitation


def test_the_older_file_of_imitation(tmp_path):
    episodes = make_episodes()
    columns = {"obs": joined(episodes, "observations"), "acts": joined(episodes, "actions")}
    columns |= {"rews": joined(episodes, "rewards"), "indices": np.array([4, 6])}
    columns |= {"terminal": np.array([True, True, True])}
    infos = np.array([{}] * 8 + [Hostile()])  # stays unread
    np.savez(tmp_path / "old.npz", infos=infos, **columns)
    convert(tmp_path / "old.npz", tmp_path / "a.npz", *HOPPER_OF_4)
    assert_is(tmp_path / "a.npz", episodes)
    columns["terminal"][2] = False  # a fragment: the recording stopped
    del columns["rews"]
    np.savez(tmp_path / "old.npz", **columns)
    convert(tmp_path / "old.npz", tmp_path / "b.npz", *HOPPER_OF_4)
    loaded = load(tmp_path / "b.npz", "Hopper-v4")
    assert loaded["terminated"].tolist() == [False, True, False] and "rewards" not in loaded


def imitation_rows(episodes, infos=True) -> list[dict]:
    rows = []
    for episode in episodes:
        noted = ["{}"] * len(episode["actions"])
        if infos:
            noted[-1] = json.dumps({"TimeLimit.truncated": not episode["terminated"]})
        row = {"obs": episode["observations"].tolist(), "acts": episode["actions"].tolist()}
        row |= {"rews": episode["rewards"].tolist(), "infos": noted, "terminal": True}
        rows.append(row)
    return rows


@pytest.mark.parametrize("discrete", [False, True])
def test_the_folder_of_imitation_read_from_rows(tmp_path, capsys, monkeypatch, discrete):
    """Without the package: a stand-in of its loader."""
    episodes = make_episodes(discrete=discrete)
    rows = {"noted": imitation_rows(episodes), "plain": imitation_rows(episodes, infos=False)}
    loader = types.SimpleNamespace(load_from_disk=lambda path: rows[path.rpartition("/")[2]])
    monkeypatch.setitem(sys.modules, "datasets", loader)
    for name in rows:
        (tmp_path / name).mkdir()
    convert(tmp_path / "noted", tmp_path / "a.npz", *HOPPER)
    assert_is(tmp_path / "a.npz", episodes)
    capsys.readouterr()
    flags = ["--source", str(tmp_path / "plain"), "--target", str(tmp_path / "b.npz")]
    assert "give it with --max-episode-steps" in mistake(capsys, "convert", *flags, *HOPPER)
    demos.main(["convert", *flags, *HOPPER_OF_4])
    assert_is(tmp_path / "b.npz", episodes)


@pytest.mark.parametrize("discrete", [False, True])
def test_the_folder_of_imitation(tmp_path, capsys, a_set, discrete):
    datasets = pytest.importorskip("datasets")
    episodes = make_episodes(discrete=discrete)
    source = a_set(episodes)
    convert(source, tmp_path / "new/folder")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]
    written = list(datasets.load_from_disk(str(tmp_path / "new/folder")))
    assert written == imitation_rows(episodes)
    convert(tmp_path / "new/folder", tmp_path / "a.npz", *HOPPER)
    assert_is(tmp_path / "a.npz", episodes)
    flags = ["--source", str(source), "--target", str(tmp_path / "new/folder")]
    assert "not empty" in mistake(capsys, "convert", *flags)


def test_imitation_itself(tmp_path, a_set):
    pytest.importorskip("imitation")
    from imitation.data import serialize
    from imitation.data.types import TrajectoryWithRew

    episodes, trajectories = make_episodes(), []
    for episode in episodes:
        infos = [{}] * (len(episode["actions"]) - 1)
        infos.append({"TimeLimit.truncated": not episode["terminated"]})
        columns = [episode["observations"], episode["actions"], np.array(infos)]
        trajectories.append(TrajectoryWithRew(*columns, True, episode["rewards"]))
    serialize.save(tmp_path / "folder", trajectories)
    convert(tmp_path / "folder", tmp_path / "a.npz", *HOPPER)
    assert_is(tmp_path / "a.npz", episodes)
    convert(a_set(episodes), tmp_path / "back")
    for wanted, found in zip(trajectories, serialize.load(tmp_path / "back")):
        np.testing.assert_array_equal(found.obs, wanted.obs)
        np.testing.assert_array_equal(found.acts, wanted.acts)
        np.testing.assert_array_equal(found.rews, wanted.rews)
        assert found.terminal and list(found.infos) == list(wanted.infos)


# Minari


def as_minari(episodes, env_id) -> types.SimpleNamespace:
    """A dataset with what is read of one."""
    items = []
    for x in episodes:
        terminations = np.zeros(len(x["actions"]), bool)
        terminations[-1] = x["terminated"]
        columns = {name: x[name] for name in ("observations", "actions", "rewards")}
        items.append(types.SimpleNamespace(terminations=terminations, **columns))
    spec = None
    if env_id is not None:
        spec = types.SimpleNamespace(id=env_id, max_episode_steps=1000)
    return types.SimpleNamespace(
        iterate_episodes=lambda: iter(items),
        spec=types.SimpleNamespace(env_spec=spec),
        observation_space=gym.spaces.Dict({"goal": gym.spaces.Box(0, 1, (3,))}),
    )


def test_minari_read_from_a_stand_in(tmp_path, capsys, monkeypatch):
    episodes = make_episodes()
    nameless, odd = as_minari(episodes, None), as_minari(episodes, "Hopper-v4")
    next(odd.iterate_episodes()).observations = {"goal": np.zeros((5, 3))}
    store = {"mine/hop-v0": as_minari(episodes, "Hopper-v4"), "nameless-v0": nameless, "odd": odd}

    def load_dataset(name):
        if name not in store:
            raise FileNotFoundError(f"{name} not found, use download=True")
        return store[name]

    monkeypatch.setitem(sys.modules, "minari", types.SimpleNamespace(load_dataset=load_dataset))
    convert("minari:mine/hop-v0", tmp_path / "a.npz")
    assert_is(tmp_path / "a.npz", episodes, limit=1000)
    convert("minari:mine/hop-v0", tmp_path / "a.npz", "--max-episode-steps", "7")
    assert_is(tmp_path / "a.npz", episodes, limit=7)
    convert("minari:nameless-v0", tmp_path / "b.npz", *HOPPER)
    assert_is(tmp_path / "b.npz", episodes)
    for name, says in (
        ("nameless-v0", "it does not name its environment: give --env-id"),
        ("nothing-v0", "try: minari download nothing-v0"),
        ("odd", "its observations are Dict('goal': Box"),
    ):
        flags = ["--source", f"minari:{name}", "--target", str(tmp_path / "c.npz")]
        assert says in mistake(capsys, "convert", *flags)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_minari_itself(tmp_path, capsys, monkeypatch, data_format):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    env, buffers = gym.make("CartPole-v1", max_episode_steps=15), []
    env.action_space.seed(0)
    for seed in range(4):
        steps, observations = [], [env.reset(seed=seed)[0]]
        while not steps or not (steps[-1][2] or steps[-1][3]):
            action = env.action_space.sample()
            observation, *step, _ = env.step(action)
            observations.append(observation)
            steps.append((action, *step))
        columns = dict(zip(("actions", "rewards", "terminations", "truncations"), zip(*steps)))
        columns = {name: np.array(column) for name, column in columns.items()}
        columns["observations"] = np.array(observations)
        buffers.append(minari.data_collector.EpisodeBuffer(**columns))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = {"env": env, "data_format": data_format}
        minari.create_dataset_from_buffers("mine/cart-v0", buffers, **more)
    convert("minari:mine/cart-v0", tmp_path / "a.npz")
    terminated = [bool(x.terminations[-1]) for x in buffers]
    assert len(set(terminated)) == 2
    episodes = []
    for buffer, flag in zip(buffers, terminated):
        episode = {"observations": buffer.observations, "actions": buffer.actions}
        episodes.append(episode | {"rewards": np.float32(buffer.rewards), "terminated": flag})
    assert_is(tmp_path / "a.npz", episodes, env_id="CartPole-v1", limit=15)
    convert(tmp_path / "a.npz", "minari:mine/back-v0")
    convert("minari:mine/back-v0", tmp_path / "b.npz")
    assert_is(tmp_path / "b.npz", episodes, env_id="CartPole-v1", limit=15)
    flags = ["--source", str(tmp_path / "a.npz"), "--target", "minari:mine/back-v0"]
    assert "already exists" in mistake(capsys, "convert", *flags)


# D4RL


class Column(np.ndarray):
    """An array in the place of a dataset of h5py's."""


def stand_in_of_h5py(files: dict) -> types.SimpleNamespace:
    @contextmanager
    def open_file(path, mode):
        written: dict = {}

        def create_dataset(name, data, compression):
            written[name] = np.asarray(data).view(Column)

        if mode == "r":
            yield files[str(path)]
        else:
            yield types.SimpleNamespace(create_dataset=create_dataset)
            files["written"] = written
            path.write_text("")

    return types.SimpleNamespace(File=open_file, Dataset=Column)


@pytest.fixture(params=["stand-in", "h5py"])
def hdf5(request, tmp_path, monkeypatch):
    """Two functions: one writes columns to a file of D4RL's kind, the other reads it."""
    if request.param == "h5py":
        h5py = pytest.importorskip("h5py")

        def write(columns):
            with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
                for name, column in columns.items():
                    file.create_dataset(name, data=column)
                file.create_dataset("infos/qpos", data=np.zeros(3))
            return tmp_path / "d4rl.hdf5"

        def read(path):
            with h5py.File(path, "r") as file:
                return {name: file[name][()] for name in file}

        return write, read
    files: dict = {}
    monkeypatch.setitem(sys.modules, "h5py", stand_in_of_h5py(files))

    def stand_in_write(columns):
        columns = {name: np.asarray(column).view(Column) for name, column in columns.items()}
        files[str(tmp_path / "d4rl.hdf5")] = columns | {"infos": {"qpos": None}}
        return tmp_path / "d4rl.hdf5"

    return stand_in_write, lambda path: files["written"]


@pytest.mark.parametrize("discrete", [False, True])
def test_d4rl(tmp_path, hdf5, a_set, discrete):
    write, read = hdf5
    episodes = make_episodes(discrete=discrete)
    columns = in_a_row(episodes)
    convert(write(columns), tmp_path / "a.npz", *HOPPER)
    assert_is(tmp_path / "a.npz", episodes)
    convert(a_set(episodes), tmp_path / "back.h5")
    written = read(tmp_path / "back.h5")
    assert written.keys() == columns.keys()
    for name, column in columns.items():
        assert written[name].dtype == column.dtype
        np.testing.assert_array_equal(written[name], column)


def test_d4rl_with_fields_missing(tmp_path, capsys, hdf5):
    write, _ = hdf5
    episodes = make_episodes((2, 4, 4), (True, False, False))
    columns = in_a_row(episodes)
    following, timeouts = columns.pop("next_observations"), columns.pop("timeouts")
    convert(write(columns | {"timeouts": timeouts}), tmp_path / "a.npz", *HOPPER)
    assert_is(tmp_path / "a.npz", episodes, lost=True)
    assert "3 of 10 steps lost" in capsys.readouterr().out

    # Without time limits: where the next observation is not the following row's ...
    source = write(columns | {"next_observations": following})
    convert(source, tmp_path / "b.npz", *HOPPER)
    assert_is(tmp_path / "b.npz", episodes)

    source = write(columns)  # ... or after so many steps
    flags = ["--source", str(source), "--target", str(tmp_path / "c.npz"), *HOPPER]
    assert "it does not mark time limits" in mistake(capsys, "convert", *flags)
    demos.main(["convert", *flags, "--max-episode-steps", "4"])
    assert_is(tmp_path / "c.npz", episodes, lost=True)

    for wrong, says in (
        ({"rewards": np.zeros(3)}, "its rewards are 3, but its actions are 10"),
        ({"observations": columns["observations"][1:]}, "its observations are 9, but its actions"),
    ):
        write(columns | {"timeouts": timeouts} | wrong)
        assert says in mistake(capsys, "convert", *flags)


def test_a_recording_that_stops_is_a_cut(tmp_path, hdf5):
    write, _ = hdf5
    episodes = make_episodes(terminated=(False, True, False))
    columns = in_a_row(episodes)
    columns["timeouts"][-1] = False
    columns["rewards"] = columns["rewards"][:, None]
    convert(write(columns), tmp_path / "a.npz", *HOPPER)
    assert_is(tmp_path / "a.npz", episodes)


def test_the_length_of_a_fragment_is_no_time_limit(tmp_path, capsys, hdf5):
    """Episodes that ended, and one that was under way when the recording stopped, which is the longest."""
    write, _ = hdf5
    episodes = make_episodes((2, 3, 4), (True, True, False))
    columns = in_a_row(episodes)
    columns["timeouts"][-1] = False
    flags = ["--source", str(write(columns)), "--target", str(tmp_path / "a.npz"), *HOPPER]
    assert "no episode reached its time limit" in mistake(capsys, "convert", *flags)
    demos.main(["convert", *flags, "--max-episode-steps", "9"])
    assert_is(tmp_path / "a.npz", episodes, limit=9)


def test_observations_that_were_rounded_differently_still_follow_each_other(tmp_path, capsys, hdf5):
    write, _ = hdf5
    episodes = make_episodes((2, 4, 4), (True, False, False))
    columns = in_a_row(episodes)
    del columns["timeouts"]
    columns["observations"] = columns["observations"].astype(np.float64) + 1e-12
    columns["next_observations"] = columns["next_observations"].astype(np.float32)
    convert(write(columns), tmp_path / "a.npz", *HOPPER)
    assert np.load(tmp_path / "a.npz")["lengths"].tolist() == [2, 4, 4]
    order = np.array([3, 0, 8, 1, 6, 4, 9, 2, 7, 5])  # of a replay buffer
    flags = ["--source", str(write({name: x[order] for name, x in columns.items()})), "--target", str(tmp_path / "b")]
    flags[-1] += ".npz"
    assert "no step begins with the observation" in mistake(capsys, "convert", *flags, *HOPPER)
    one = {name: x[:1] for name, x in columns.items()}  # a step alone
    convert(write(one), tmp_path / "c.npz", *HOPPER, "--max-episode-steps", "7")
    assert np.load(tmp_path / "c.npz")["lengths"].tolist() == [1]


# Which format


@pytest.mark.parametrize(
    ("name", "source"),
    [("h5py", "a.hdf5"), ("datasets", "folder"), ("minari", "minari:a-v0")],
)
def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch, name, source, a_set):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(sys.modules, name, None)
    says = f"this format needs the package {name}: pip install '{formats.PINS[name]}'"
    flags = ["--source", source, "--target", "x.npz", *HOPPER]
    assert says in mistake(capsys, "convert", *flags)
    target = {"folder": "new_folder"}.get(source, source)
    assert says in mistake(capsys, "convert", "--source", str(a_set(make_episodes())), "--target", target)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "set.npz"}


def test_the_commands_of_the_document_parse():
    text = (ROOT / "docs/own_demonstrations.md").read_text()
    commands = re.findall(r"`(--source [^`]+)`", text)
    assert len(commands) == 12
    for command in commands:
        args = demos.parse_args(["convert", *command.split()])
        assert ".npz" in args.source + args.target


def test_the_data_card_names_the_packages():
    card = (ROOT / "data/README.md").read_text()
    assert all(f"pip install '{pin}'" in card for pin in formats.PINS.values())
    assert not any(name in (ROOT / "requirements.txt").read_text() for name in formats.PINS)


@pytest.mark.parametrize(
    ("source", "target", "flags", "says"),
    [
        (
            "row.pkl",
            "a.npz",
            "",
            "--source row.pkl: it does not name its environment: give --env-id",
        ),
        (
            "row.pkl",
            "a.hdf5",
            "--env-id A-v0",
            "--target a.hdf5: expected a .npz, since the source",
        ),
        (
            "strange.npz",
            "a.npz",
            "",
            "it is no set, none of Stable-Baselines and none of imitation",
        ),
        ("text.npz", "a.npz", "", "--source text.npz: "),
        ("text.txt", "a.npz", "--env-id A-v0", "--source text.txt: expected a .npz, a .pkl"),
        ("set.npz", "a.txt", "", "--target a.txt: expected a .npz, a .pkl, an .hdf5, a folder"),
        ("set.npz", "a.pkl", "--env-id A-v0", "a set has its own; leave them out"),
        ("set.npz", "a.pkl", "--max-episode-steps 3", "a set has its own; leave them out"),
        (
            "row.pkl",
            "a.npz",
            "--max-episode-steps 0",
            "--max-episode-steps is 0, expected 1 or more",
        ),
        ("no_rewards.npz", "a.npz", "", "it has no rewards, and the target needs them"),
        ("no_rewards.npz", "a.h5", "", "it has no rewards, and the target needs them"),
        ("no_rewards.npz", "minari:a-v0", "", "it has no rewards, and the target needs them"),
        ("no_actions.npz", "a.pkl", "", "it has no actions, and the target needs them"),
    ],
)
def test_what_is_no_format(tmp_path, monkeypatch, capsys, a_set, source, target, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "row.pkl").write_bytes(pickle.dumps(in_a_row(make_episodes())))
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "text.txt").write_text("text")
    np.savez("strange.npz", a=np.zeros(3))
    for name in ("rewards", "actions"):
        a_set(make_episodes(), **{name: None}).rename(f"no_{name}.npz")
    a_set(make_episodes())
    before = {path.name for path in tmp_path.iterdir()}
    flags = ["--source", source, "--target", target, *flags.split()]
    assert says in mistake(capsys, "convert", *flags)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_pickle_without_rewards_and_endings_that_it_cannot_tell(tmp_path, capsys, a_set):
    source = a_set(make_episodes(terminated=(True, True, False)), rewards=None)
    convert(source, tmp_path / "a.pkl")
    said = "2 episodes were cut before the limit, or ended at it"
    assert said in capsys.readouterr().out
    steps = pickle.loads((tmp_path / "a.pkl").read_bytes())[0]
    assert [step.keys() for step in steps] == [{"state", "action", "done"}] * 4
    convert(a_set(make_episodes()), tmp_path / "a.npz")
    assert said.split()[1] + " were" not in capsys.readouterr().out


def test_an_authors_pickle_of_another_body(tmp_path):
    """Of the same shape, but --env-id says that no cheetah can complete it."""
    step = {"state": [0.0] * 17, "action": [0.5] * 6, "reward": 1.0, "done": False}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([[step] * 3]))
    convert(tmp_path / "a.pkl", tmp_path / "a.npz", "--env-id", "Walker2d-v4")
    loaded = load(tmp_path / "a.npz", "Walker2d-v4")
    assert loaded["lengths"].tolist() == [2] and "qpos" not in np.load(tmp_path / "a.npz")


@pytest.mark.parametrize("flag", ["dones", "terminals", "truncations"])
def test_an_episode_that_goes_on_after_its_end_is_refused(tmp_path, capsys, flag):
    """As a loop over an environment that resets itself leaves it: the step across the reset is no step."""
    obs, ends = np.array([0, 1, 10, 11, 12, 20.0])[:, None], np.array([0, 1, 0, 0, 1], bool)
    episode = {"obs": obs, "actions": np.zeros((5, 1)), flag: ends}
    for content in (episode, [episode]):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
        flags = ["--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "a.npz"), *HOPPER]
        assert "an episode goes on after its flags say" in mistake(capsys, "convert", *flags)


def test_flags_and_other_fields_may_stand_in_some_steps_alone(tmp_path):
    steps = [{"obs": np.full(3, float(i)), "act": np.zeros(2)} for i in range(4)]
    steps[0]["info"] = {}
    steps[-1]["truncated"] = True
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([steps]))
    convert(tmp_path / "a.pkl", tmp_path / "a.npz", *HOPPER, "--max-episode-steps", "10")
    assert np.load(tmp_path / "a.npz")["terminated"].tolist() == [False]


def test_another_body_of_a_cheetahs_shape_is_not_taken_for_one(tmp_path, capsys):
    """17 observations and 6 actions, and no environment's name in a pickle. The first episode tells too little."""
    rng = np.random.default_rng(0)
    steps = [{"state": rng.normal(size=17), "action": rng.uniform(-1, 1, 6), "reward": 1.0, "done": i == 2}
             for i in range(3)]  # fmt: skip
    flags = ["--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "a.npz")]
    for content in ([steps], [steps[-1:], steps]):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
        assert "it does not name its environment" in mistake(capsys, "convert", *flags, "--max-episode-steps", "9")


def test_a_set_is_not_replaced_by_its_own_translation(tmp_path, capsys, a_set):
    source = a_set(make_episodes())
    before = source.read_bytes()
    told = mistake(capsys, "convert", "--source", str(source), "--target", str(tmp_path / "x/.." / source.name))
    assert "is the source itself" in told and source.read_bytes() == before


@pytest.mark.parametrize("name", ["a.npz", "a.pkl", "folder"])
def test_a_refused_export_leaves_nothing(tmp_path, capsys, monkeypatch, a_set, name):
    """The target is a folder that is not empty."""
    source = a_set(make_episodes())
    (tmp_path / name / "full").mkdir(parents=True)
    monkeypatch.setattr(formats, "write_imitation_folder", lambda path, episodes: path.mkdir())
    before = sorted(tmp_path.rglob("*"))
    mistake(capsys, "convert", "--source", str(source), "--target", str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_time_limit_that_the_target_cannot_hold_is_told(tmp_path, capsys, a_set):
    source = a_set(make_episodes(terminated=(True, False, True)))
    convert(source, tmp_path / "a.pkl")
    assert "give --max-episode-steps 4: no episode was that long" in capsys.readouterr().out
    convert(a_set(make_episodes()), tmp_path / "a.pkl")
    assert "give --max-episode-steps" not in capsys.readouterr().out


def test_returns_that_differ_by_rounding_and_boolean_actions_are_drawn(tmp_path, demo_file):
    rewards = np.array([0.1, 0.2, 0.7, 0.0, 0.7, 0.3, 0.7, 0.2, 0.1, 0, 0, 0])
    path = demo_file("a.npz", make={"lengths": (4, 2, 6)}, rewards=rewards, actions=rewards[:, None] > [0.1, 0.3])
    demos.main(["inspect", "--demos", path, "--figure", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").exists()
