# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#                 "matplotlib==3.11.2"]
# ///
"""Look into a demonstration set; translate the original author's pickles.

    python data/demos.py inspect --demos data/halfcheetah-v4_sac_stochastic-one.npz
    python data/demos.py convert --source demos.pkl --target demos.npz    # or back, by the endings

The fields of a set: README.md beside this file. An author's pickle is a list of trajectories, each
a list of steps {"state", "action", "reward", "done"} of HalfCheetah-v4.
"""

import json
import os
import pickle
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import tyro
from matplotlib.figure import Figure

ALLOWED = {  # what a pickle may ask for: numpy's arrays and scalars, before and since numpy 2
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


@dataclass
class Inspect:
    """Describe a demonstration set: a table and a figure."""

    demos: str  # demonstration set (.npz)
    figure: str = "demos.png"  # file for the figure


@dataclass
class Convert:
    """Translate the original author's pickles to .npz or back, by the files' endings."""

    source: str  # .pkl or .npz
    target: str  # the other kind


# Demonstration sets


def read_set(path: str, flag: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the metadata of a set; UserError where something is wrong with it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        metadata = json.loads(str(arrays.pop("metadata")))
        if not isinstance(metadata, dict) or not isinstance(metadata["max_episode_steps"], int):
            raise ValueError("its metadata has no max_episode_steps that is a whole number")
        lengths = arrays["lengths"]
        whole = lengths.dtype.kind == "i" and lengths.ndim == 1 and lengths.size > 0
        if not (whole and lengths.min() >= 1):
            raise ValueError("'lengths' are not those of episodes, each of 1 step or more")
        episodes, steps = len(lengths), int(lengths.sum())
        rows = {"observations": steps + episodes, "actions": steps, "rewards": steps}
        rows |= {"terminated": episodes, "truncated": episodes}
        if "qpos" in arrays:
            rows |= {"qpos": steps + episodes}
        for name, count in rows.items():
            array, ndim = arrays[name], 1 + (name in ("observations", "actions", "qpos"))
            if array.dtype.kind not in "fbiu" or array.ndim != ndim or len(array) != count:
                found = f"{array.dtype} of shape {array.shape}"
                raise ValueError(f"'{name}' is {found}, expected {count} rows of numbers")
            if not np.isfinite(array).all():
                raise ValueError(f"'{name}' holds NaN or infinity")
        return arrays, metadata
    except KeyError as error:
        problem = f"the field {error} is missing"
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise UserError(f"{flag} {path}: {problem.splitlines()[0]}; see data/README.md.")


def returns_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(E,) undiscounted return of each episode."""
    first = np.cumsum(arrays["lengths"]) - arrays["lengths"]
    return np.add.reduceat(arrays["rewards"].astype(np.float64), first)


def inspect(args: Inspect) -> None:
    """Print a table of a set; draw its returns, their growth over an episode, and its actions."""
    arrays, metadata = read_set(args.demos, "--demos")
    returns, lengths, limit = returns_of(arrays), arrays["lengths"], metadata["max_episode_steps"]
    made_with = {k: v for k, v in metadata.items() if k not in ("env_id", "max_episode_steps")}
    spread, terminated = f"{returns.mean():.1f} ± {returns.std():.1f}", arrays["terminated"].sum()
    rows = {
        "file": args.demos,
        "environment": f"{metadata.get('env_id')}, at most {limit} steps an episode",
        "episodes": f"{len(lengths)}, of {lengths.min()} to {lengths.max()} steps",
        "return": f"{spread}, from {returns.min():.1f} to {returns.max():.1f}",
        "ended by": f"termination {terminated}, time limit {arrays['truncated'].sum()}",
        "actions beyond 0.99": f"{(np.abs(arrays['actions']) > 0.99).mean():.1%}",
        "physics state": "yes" if "qpos" in arrays else "no (no frames can be rendered)",
        "made with": json.dumps(made_with),
    }
    print(*(f"  {name:21}{value}" for name, value in rows.items()), sep="\n")

    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.hist(returns, bins=20)
    left.set(xlabel="return of an episode", ylabel="episodes", title="Returns")
    for rewards in np.split(arrays["rewards"], np.cumsum(lengths)[:-1]):
        middle.plot(np.cumsum(rewards), color="tab:blue", alpha=0.3)
    middle.set(xlabel="step of the episode", ylabel="return so far", title="A line an episode")
    right.violinplot(list(arrays["actions"].T), showextrema=False)
    right.set(xlabel="action dimension", ylabel="executed action", title="Actions")
    Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(args.figure, dpi=120)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--figure {args.figure}: {reason}; name a .png.") from None
    print(f"figure: {args.figure}")


# The original author's pickles


class PlainUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers; all else could run code, and is refused."""

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_pickle(path: str) -> list[tuple[np.ndarray, ...]]:
    """States (T, 17), actions (T, 6) and rewards (T,) of each trajectory."""
    try:
        with open(path, "rb") as file:
            content = PlainUnpickler(file).load()
        keys, trajectories = ("state", "action", "reward"), []
        for steps in content:
            columns = [np.array([step[key] for step in steps], np.float64) for key in keys]
            if [x.shape[1:] for x in columns] != [(17,), (6,), ()]:
                raise ValueError("expected states of 17 numbers, actions of 6 and rewards of one")
            if not all(np.isfinite(x).all() for x in columns):
                raise ValueError("expected finite numbers")
            trajectories.append(tuple(columns))
        if not trajectories:
            raise ValueError("it is empty")
        return trajectories
    except Exception as error:  # a pickle can fail in any way
        problem = f"no HalfCheetah-v4 trajectories ({error})"
        raise UserError(f"--source {path}: {problem}; give an author's .pkl.") from None


def complete(trajectories: list[tuple[np.ndarray, ...]]) -> dict[str, np.ndarray]:
    """An author's trajectories as the arrays of a set. They leave out the state that an episode's
    last action led to, and the root's x. Both follow from the rest: the last action is simulated
    once more, and x is the sum of the velocities in the rewards."""
    mujoco.set_mju_user_warning(lambda message: None)  # the model has a deprecated attribute
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a HalfCheetah-v5
        env = gym.make("HalfCheetah-v4").unwrapped
    mujoco.set_mju_user_warning(None)
    columns: dict[str, list] = {name: [] for name in ("states", "x", "actions", "rewards")}
    for states, actions, rewards in trajectories:
        env.reset()
        env.set_state(np.append(0.0, states[-1, :8]), states[-1, 8:])
        final, *_ = env.step(actions[-1])
        velocity = rewards + 0.1 * np.square(actions).sum(axis=1)  # without the cost of control
        columns["states"].append(np.vstack([states, final]))
        columns["x"].append(np.append(0.0, np.cumsum(velocity * env.dt)))
        columns["actions"].append(actions)
        columns["rewards"].append(rewards)
    env.close()
    states, x = np.concatenate(columns["states"]), np.concatenate(columns["x"])
    return {
        "observations": states.astype(np.float32),
        "actions": np.concatenate(columns["actions"]).astype(np.float32),
        "rewards": np.concatenate(columns["rewards"]).astype(np.float32),
        "qpos": np.column_stack([x, states[:, :8]]),
        "qvel": states[:, 8:],
        "terminated": np.zeros(len(trajectories), bool),
        "truncated": np.ones(len(trajectories), bool),
        "lengths": np.array([len(rewards) for _, _, rewards in trajectories], np.int64),
    }


def convert(args: Convert) -> None:
    """A pickle drops what it has no place for: final observations, physics state, metadata."""
    source, target = Path(args.source), Path(args.target)
    if {source.suffix, target.suffix} != {".pkl", ".npz"}:
        problem = "expected one .pkl and one .npz; rename them"
        raise UserError(f"--source {source} and --target {target}: {problem}.")
    temporary = target.with_suffix(".tmp" + target.suffix)  # a kill leaves the old file, or the new
    if source.suffix == ".pkl":
        arrays = complete(read_pickle(args.source))
        returns, limit = returns_of(arrays), int(arrays["lengths"].max())
        metadata = {"env_id": "HalfCheetah-v4", "max_episode_steps": limit, "noise_scale": None}
        metadata |= {"return_mean": returns.mean(), "return_std": returns.std()}
        metadata |= {"versions": {x.__name__: x.__version__ for x in (np, gym, mujoco)}}
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(temporary, metadata=json.dumps(metadata), **arrays)
    else:
        arrays, _ = read_set(args.source, "--source")
        lengths = arrays["lengths"]
        states = np.delete(arrays["observations"], np.cumsum(lengths + 1) - 1, axis=0)
        done = np.isin(np.arange(lengths.sum()), np.cumsum(lengths) - 1)
        steps = zip(states, arrays["actions"], arrays["rewards"], done)
        steps = [dict(zip(("state", "action", "reward", "done"), step)) for step in steps]
        first = np.cumsum(lengths) - lengths
        trajectories = [steps[i : i + length] for i, length in zip(first, lengths)]
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(pickle.dumps(trajectories))
    os.replace(temporary, target)
    print(f"wrote {target}")


# Command line


class UserError(Exception):
    """A user's mistake: shown as one sentence, exit code 2."""


def parse_args(argv: list[str]) -> Inspect | Convert:
    commands = {"inspect": Inspect, "convert": Convert}
    return tyro.extras.subcommand_cli_from_dict(commands, args=argv)


def main(argv: list[str]) -> None:
    """Command line in, exit code out."""
    try:
        args = parse_args(argv)
        if isinstance(args, Inspect):
            inspect(args)
        else:
            convert(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
