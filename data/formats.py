"""Formats of other projects, for demos.py: a function reads each into episodes, another writes it.

An episode is a dict with
    observations  (T + 1, O), or (T, O) where the format has no place for the final one
    actions       (T, A), or (T,) if they are discrete
    rewards       (T,), where the format has them
    terminated    bool; None where the format marks an end, but not whether it was a time limit's
The packages that some formats need are imported by the functions that need them.
"""

import dataclasses
import importlib
import json
import pickle
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np

PINS = {
    "datasets": "datasets==5.2.0",
    "h5py": "h5py==3.16.0",
    "minari": "minari[arrow,hdf5]==0.5.4",
}
NAMES = {  # field -> what people call it
    "observations": ("observations", "observation", "obs", "states", "state"),
    "following": ("next_observations", "next_observation", "next_obs", "next_states", "next_state"),
    "actions": ("actions", "action", "acts", "act"),
    "rewards": ("rewards", "reward", "rews", "rew"),
    "terminated": ("terminated", "terminations", "terminals"),
    "truncated": ("truncated", "truncations", "timeouts"),
    "done": ("done", "dones", "terminal"),  # `terminal` is imitation's: time limits count as well
}
FLAGS = ("terminated", "truncated", "done")


class UserError(Exception):
    """A user's mistake: shown as one sentence, exit code 2."""


def package(name: str):
    """A package that only some formats need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        command = f"pip install '{PINS[name]}'"
        raise UserError(f"this format needs the package {name}: {command}") from None


# Episodes from named columns


def known_columns(columns: dict) -> dict[str, np.ndarray]:
    """The columns that an episode needs, under our names, as numbers."""
    known = {}
    for field, names in NAMES.items():
        found = [name for name in names if name in columns]
        if not found:
            continue
        column = np.asarray(columns[found[0]])
        if field == "rewards" and column.dtype == object:  # None: unknown
            column = np.array([np.nan if x is None else x for x in column])
        if column.dtype.kind not in "fiub":
            raise ValueError(f"'{found[0]}' is {column.dtype}, expected numbers")
        if field in FLAGS:
            column = column.reshape(-1).astype(bool)
        # Stable-Baselines writes discrete actions, and D4RL now and then rewards, as (T, 1).
        is_scalar = field == "rewards" or (field == "actions" and column.dtype.kind in "iub")
        if is_scalar and column.shape[1:] == (1,):
            column = column[:, 0]
        known[field] = column
    for field in ("observations", "actions"):
        if field not in known:
            raise ValueError(f"none of the fields {', '.join(NAMES[field])} is there")
    return known


def how_it_ended(columns: dict[str, np.ndarray]) -> bool | None:
    """`terminated`, as the flags of an episode's last step tell it; None if they do not."""
    last = {name: bool(columns[name][-1]) for name in FLAGS if name in columns}
    if "terminated" in last:
        return last["terminated"]
    if last.get("truncated"):
        return False
    if last.get("done") is False:  # still under way when the recording stopped
        return False
    if "truncated" in last and "done" in last:  # done, and not by the time limit
        return True
    return None


def one_episode(columns: dict[str, np.ndarray]) -> dict:
    """An episode from known columns."""
    flags = [columns[name][:-1] for name in FLAGS if name in columns]
    if any(flag.any() for flag in flags):
        raise ValueError("an episode goes on after its flags say that it has ended")
    episode = {name: columns[name] for name in ("observations", "actions")}
    if "rewards" in columns:
        episode["rewards"] = columns["rewards"]
    if "following" in columns and len(episode["observations"]) == len(episode["actions"]):
        final = columns["following"][-1:]
        episode["observations"] = np.concatenate([episode["observations"], final])
    episode["terminated"] = how_it_ended(columns)
    return episode


def ends_of_episodes(columns: dict[str, np.ndarray], limit: int | None) -> np.ndarray:
    """(N,) bool: which of N steps in a row were the last of their episode."""
    steps = len(columns["actions"])
    for name, column in columns.items():
        if len(column) != steps:
            raise ValueError(f"its {name} are {len(column)}, but its actions are {steps}")
    ends = np.zeros(steps, bool)
    for name in FLAGS:
        if name in columns:
            ends |= columns[name]
    # Flags of termination alone say nothing of the episodes that a time limit cut.
    if "truncated" not in columns and "done" not in columns:
        if "following" in columns:
            following, observations = columns["following"][:-1], columns["observations"][1:]
            coarse = min(following.dtype, observations.dtype, key=lambda x: x.itemsize)
            differ = following.astype(coarse) != observations.astype(coarse)
            jumps = differ.any(axis=tuple(range(1, differ.ndim)))
            if jumps.all() and not ends[:-1].all():
                raise ValueError("no step begins with the observation that the one before led to")
            ends[:-1] |= jumps
        elif limit is not None:
            elapsed = 0
            for step in range(steps):
                elapsed += 1
                ends[step] |= elapsed == limit
                if ends[step]:
                    elapsed = 0
        else:
            raise ValueError("it does not mark time limits: give --max-episode-steps")
    ends[-1:] = True  # where the recording stopped
    return ends


def split_steps(columns: dict, limit: int | None) -> list[dict]:
    """Episodes from columns that hold the steps of all of them in a row, as D4RL has it."""
    columns = known_columns(columns)
    first = np.flatnonzero(ends_of_episodes(columns, limit))[:-1] + 1
    pieces = {name: np.split(column, first) for name, column in columns.items()}
    episodes = []
    for i in range(len(first) + 1):
        episodes.append(one_episode({name: pieces[name][i] for name in pieces}))
    told = any(columns[name][-1] for name in FLAGS if name in columns)
    episodes[-1]["stopped"] = not told  # maybe the recording ended, not the episode
    return episodes


def last_step(episode: dict) -> np.ndarray:
    """(T,) bool: true in the last step alone."""
    steps = len(episode["actions"])
    return np.arange(steps) == steps - 1


# Episodes and sets


def narrow(x: np.ndarray) -> np.ndarray:
    """As float32 where that loses nothing, else as float64."""
    with np.errstate(over="ignore"):
        small = x.astype(np.float32)
    if np.array_equal(small, x, equal_nan=True):
        return small
    return x.astype(np.float64)


def check_episodes(episodes: list[dict]) -> None:
    """ValueError unless all are episodes of the same kind."""
    if not episodes:
        raise ValueError("it is empty")
    for episode in episodes:
        observations, actions = episode["observations"], episode["actions"]
        steps = len(actions)
        if steps == 0:
            raise ValueError("an episode has no steps")
        if observations.ndim != 2 or len(observations) not in (steps, steps + 1):
            found = f"observations of shape {observations.shape} for {steps} actions"
            raise ValueError(
                f"{found}, expected ({steps + 1}, O), or ({steps}, O) without the last"
            )
        if actions.ndim > 2:
            raise ValueError(
                f"actions of shape {actions.shape}, expected ({steps}, A) or ({steps},)"
            )
        if not (np.isfinite(observations).all() and np.isfinite(actions).all()):
            raise ValueError("expected finite numbers")
        if "rewards" in episode and episode["rewards"].shape != (steps,):
            raise ValueError(f"rewards of shape {episode['rewards'].shape}, expected ({steps},)")
        if ("rewards" in episode) != ("rewards" in episodes[0]):
            raise ValueError("some episodes have rewards, others do not")


def tell_endings(episodes: list[dict], limit: int | None) -> None:
    """Sets `terminated` where the format marks only that an episode is over: one of the limit's
    length was cut by it, and a shorter one reached an end of the task."""
    untold = [episode for episode in episodes if episode["terminated"] is None]
    if not untold:
        return
    if limit is None:
        problem = "it marks where episodes end, but not which of them a time limit cut"
        raise ValueError(f"{problem}: give it with --max-episode-steps")
    for episode in untold:
        episode["terminated"] = len(episode["actions"]) < limit
    terminated = sum(episode["terminated"] for episode in untold)
    cut = f"{len(untold) - terminated} of {limit} steps as cut by the time limit"
    print(f"the source does not tell why episodes ended; taken: {cut}, {terminated} as terminated")


def cut_last_steps(episodes: list[dict]) -> list[dict]:
    """Without the steps whose next observation is missing, and a line that counts them.

    `terminated` stays as it was. It says how the demonstrator's episode ended, and the scripts
    count by it how much of an expert's time lies behind an end: a fall or a goal that became a
    cut would teach that the expert never ends, and the policy would shun the goal. What is not
    true any more is the step at which it ended: one too early."""
    kept, lost = [], 0
    for episode in episodes:
        if len(episode["observations"]) > len(episode["actions"]):
            kept.append(episode)
            continue
        lost += 1
        shorter = episode | {"actions": episode["actions"][:-1]}
        if "rewards" in episode:
            shorter["rewards"] = episode["rewards"][:-1]
        if len(shorter["actions"]) > 0:
            kept.append(shorter)
    if lost:
        why = "the last of an episode has no observation after it"
        print(f"{lost} of {sum(len(x['actions']) for x in episodes)} steps lost: {why}")
    if len(kept) < len(episodes):
        print(f"{len(episodes) - len(kept)} of {len(episodes)} episodes lost: no other step")
    if not kept:
        raise ValueError("no episode has two steps")
    return kept


def make_set(episodes: list[dict], limit: int | None) -> tuple[dict[str, np.ndarray], int]:
    """Episodes as the arrays of a set, and the time limit."""
    check_episodes(episodes)
    longest = max(len(episode["actions"]) for episode in episodes)
    if limit is not None and longest > limit:
        problem = f"an episode has {longest} steps, but the time limit is {limit}"
        raise ValueError(f"{problem}: give --max-episode-steps, {longest} or more")
    tell_endings(episodes, limit)
    if limit is None:
        # The scripts count the time after an end up to the limit: a guess would not do.
        cut = [
            len(episode["actions"])
            for episode in episodes
            if not episode["terminated"] and not episode.get("stopped")
        ]
        if longest not in cut:
            raise ValueError("no episode reached its time limit: give it with --max-episode-steps")
    episodes = cut_last_steps(episodes)
    columns = {}
    for name in ("observations", "actions", "rewards"):
        if name in episodes[0]:
            columns[name] = np.concatenate([episode[name] for episode in episodes])
    is_discrete = columns["actions"].dtype.kind in "iub" and columns["actions"].ndim == 1
    for name in columns:
        if name == "actions" and is_discrete:
            columns[name] = columns[name].astype(np.int64)
        else:
            columns[name] = narrow(columns[name])
    terminated = np.array([episode["terminated"] for episode in episodes], bool)
    lengths = np.array([len(episode["actions"]) for episode in episodes], np.int64)
    columns |= {"terminated": terminated, "truncated": ~terminated, "lengths": lengths}
    return columns, limit or longest


def episodes_of_set(arrays: dict[str, np.ndarray]) -> list[dict]:
    """The episodes of a set."""
    lengths, episodes = arrays["lengths"], []
    cuts = {name: np.cumsum(lengths)[:-1] for name in ("actions", "rewards") if name in arrays}
    cuts["observations"] = np.cumsum(lengths + 1)[:-1]
    pieces = {name: np.split(arrays[name], cuts[name]) for name in cuts}
    for i in range(len(lengths)):
        episode = {name: pieces[name][i] for name in pieces}
        episodes.append(episode | {"terminated": bool(arrays["terminated"][i])})
    return episodes


def warn_of_endings(arrays: dict[str, np.ndarray], limit: int) -> None:
    """A line where episodes did not end as their lengths let one think."""
    seems_terminated = arrays["lengths"] < limit
    odd = (seems_terminated != arrays["terminated"]).sum()
    if odd:
        print(
            f"the target cannot tell that {odd} episodes were cut before the limit, or ended at it"
        )


# Pickles of plain arrays


def columns_of_steps(steps: list[dict]) -> dict[str, list]:
    """A list for each name that we know. A flag may be missing where it is false."""
    columns = {}
    for field, names in NAMES.items():
        for name in names:
            if not any(name in step for step in steps):
                continue
            if field in FLAGS:
                columns[name] = [step.get(name, False) for step in steps]
            else:
                columns[name] = [step[name] for step in steps]
    return columns


def episodes_of_pickle(content, limit: int | None) -> list[dict]:
    """Episodes from what a pickle held: a list of episodes, each a list of steps or a dict of
    arrays; or one dict of arrays, with the steps of all episodes in a row."""
    if isinstance(content, dict):
        columns = known_columns(content)
        if len(columns["observations"]) == len(columns["actions"]) + 1:
            return [one_episode(columns)]
        return split_steps(content, limit)
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"it holds a {type(content).__name__}, expected a list of episodes")
    episodes = []
    for episode in content:
        if not isinstance(episode, dict):
            if not isinstance(episode, (list, tuple)) or not episode:
                raise ValueError("an episode is no list of steps")
            if not isinstance(episode[0], dict):
                found = type(episode[0]).__name__
                raise ValueError(
                    f"a step is a {found}, expected a dict with observation and action"
                )
            episode = columns_of_steps(episode)
        episodes.append(one_episode(known_columns(episode)))
    return episodes


def write_pickle(path: Path, episodes: list[dict]) -> None:
    """As the original author's: final observations and how episodes ended have no place in it."""
    trajectories = []
    for episode in episodes:
        steps = []
        for i, action in enumerate(episode["actions"]):
            step = {"state": episode["observations"][i], "action": action}
            if "rewards" in episode:
                step["reward"] = episode["rewards"][i]
            steps.append(step | {"done": i == len(episode["actions"]) - 1})
        trajectories.append(steps)
    path.write_bytes(pickle.dumps(trajectories))


# Stable-Baselines: generate_expert_traj of versions 1 and 2


def read_stable_baselines(path: str) -> list[dict]:
    with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in ("obs", "actions", "rewards") if name in file}
        starts = file["episode_starts"].reshape(-1).astype(bool)
    done = np.append(starts[1:], True)  # it records whole episodes
    return split_steps(columns | {"done": done}, None)


def write_stable_baselines(path: Path, episodes: list[dict]) -> None:
    """Final observations and how episodes ended have no place in it."""
    actions = np.concatenate([episode["actions"] for episode in episodes])
    starts = [np.arange(len(episode["actions"])) == 0 for episode in episodes]
    np.savez_compressed(
        path,
        obs=np.concatenate([episode["observations"][:-1] for episode in episodes]),
        actions=actions.reshape(len(actions), -1),
        rewards=np.concatenate([episode["rewards"] for episode in episodes]),
        episode_returns=np.array([episode["rewards"].sum() for episode in episodes]),
        episode_starts=np.concatenate(starts),
    )


# The package imitation


def read_imitation_npz(path: str) -> list[dict]:
    """imitation before 1.0. Its `infos` are a pickle, and stay unread."""
    with np.load(path, allow_pickle=False) as file:
        cuts, terminal = file["indices"], file["terminal"]
        columns = {
            "observations": np.split(file["obs"], cuts + np.arange(len(cuts)) + 1),
            "actions": np.split(file["acts"], cuts),
        }
        if "rews" in file:
            columns["rewards"] = np.split(file["rews"], cuts)
    episodes = []
    for i in range(len(terminal)):
        episode = {name: columns[name][i] for name in columns}
        # Its `terminal` is `done`: true also where a time limit ended the episode.
        episodes.append(one_episode(known_columns(episode | {"done": terminal[i]})))
    return episodes


def read_imitation_folder(path: str) -> list[dict]:
    """imitation since 1.0: a dataset of HuggingFace's package, whose rows are episodes."""
    datasets = package("datasets")
    episodes = []
    for row in datasets.load_from_disk(path):
        columns = {"observations": row["obs"], "actions": row["acts"], "done": row["terminal"]}
        if "rews" in row:
            columns["rewards"] = row["rews"]
        # Stable-Baselines3 notes in the info of the last step whether the time limit ended it.
        info = json.loads(row["infos"][-1])
        if isinstance(info, dict) and isinstance(info.get("TimeLimit.truncated"), bool):
            columns["truncated"] = info["TimeLimit.truncated"]
        episodes.append(one_episode(known_columns(columns)))
    return episodes


def write_imitation_folder(path: Path, episodes: list[dict]) -> None:
    datasets = package("datasets")
    columns: dict[str, list] = {"obs": [], "acts": [], "infos": [], "terminal": []}
    if "rewards" in episodes[0]:
        columns["rews"] = [episode["rewards"] for episode in episodes]
    for episode in episodes:
        infos = ["{}"] * len(episode["actions"])
        infos[-1] = json.dumps({"TimeLimit.truncated": not episode["terminated"]})
        columns["obs"].append(episode["observations"])
        columns["acts"].append(episode["actions"])
        columns["infos"].append(infos)
        columns["terminal"].append(True)  # no fragments: every episode is whole
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(path))


# Minari


def read_minari(dataset_id: str) -> tuple[list[dict], dict]:
    """Episodes of a dataset of the local store, and what it tells of the environment."""
    minari = package("minari")
    try:
        dataset = minari.load_dataset(dataset_id)
    except FileNotFoundError:
        problem = f"the local store has no such dataset; try: minari download {dataset_id}"
        raise ValueError(problem) from None
    episodes = []
    for episode in dataset.iterate_episodes():
        if not isinstance(episode.observations, np.ndarray):
            space = dataset.observation_space
            raise ValueError(f"its observations are {space}, expected one array of numbers")
        columns = {
            "observations": episode.observations,
            "actions": episode.actions,
            "rewards": episode.rewards,
            "terminated": episode.terminations,
        }
        episodes.append(one_episode(known_columns(columns)))
    known = {}
    spec = dataset.spec.env_spec
    if spec is not None:
        known = {"env_id": spec.id, "max_episode_steps": spec.max_episode_steps}
    return episodes, known


def write_minari(dataset_id: str, episodes: list[dict], env_id: str, limit: int) -> None:
    minari = package("minari")
    buffers = []
    for episode in episodes:
        last = last_step(episode)
        buffer = minari.data_collector.EpisodeBuffer(
            observations=episode["observations"],
            actions=episode["actions"],
            rewards=episode["rewards"],
            terminations=last & episode["terminated"],
            truncations=last & (not episode["terminated"]),
        )
        buffers.append(buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no author, no link to code, and the like
        spec = dataclasses.replace(gym.spec(env_id), max_episode_steps=limit)
        minari.create_dataset_from_buffers(dataset_id, buffers, env=spec)


# D4RL


def read_d4rl(path: str, limit: int | None) -> list[dict]:
    h5py = package("h5py")
    names = {name for several in NAMES.values() for name in several}
    columns = {}
    with h5py.File(path, "r") as file:
        for name in names.intersection(file):  # the other fields can be large
            if isinstance(file[name], h5py.Dataset):
                columns[name] = file[name][()]
    return split_steps(columns, limit)


def write_d4rl(path: Path, episodes: list[dict]) -> None:
    h5py = package("h5py")
    ends = [last_step(episode) for episode in episodes]
    terminated = [episode["terminated"] for episode in episodes]
    columns = {
        "observations": [episode["observations"][:-1] for episode in episodes],
        "next_observations": [episode["observations"][1:] for episode in episodes],
        "actions": [episode["actions"] for episode in episodes],
        "rewards": [episode["rewards"] for episode in episodes],
        "terminals": [end & flag for end, flag in zip(ends, terminated)],
        "timeouts": [end & (not flag) for end, flag in zip(ends, terminated)],
    }
    with h5py.File(path, "w") as file:
        for name, pieces in columns.items():
            file.create_dataset(name, data=np.concatenate(pieces), compression="gzip")
