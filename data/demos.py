# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#                 "matplotlib==3.11.2", "imageio==2.38.1", "torch==2.13.0"]
# ///
"""Look into a demonstration set; translate other formats into sets, and sets into other formats;
make sets of films.

    python data/demos.py inspect --demos data/halfcheetah-v4_sac_stochastic-one.npz
    python data/demos.py convert --source demos.pkl --target demos.npz    # or back, by the endings
    python data/demos.py film --videos run1.mp4 run2.gif --env-id Hopper-v4 --target film.npz
    python data/demos.py film --source demos.npz --target film.npz        # as the task renders it

The fields of a set: README.md beside this file. The formats: ../docs/own_demonstrations.md; the
functions that read and write them: formats.py; films: film.py. An original author's pickle is a
list of trajectories, each a list of steps {"state", "action", "reward", "done"} of HalfCheetah-v4.
"""

import json
import os
import pickle
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import film
import formats
import gymnasium as gym
import mujoco
import numpy as np
import tyro
from formats import UserError
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
PICKLE, HDF5 = (".pkl", ".pickle"), (".hdf5", ".h5")
FIELDS = {"observations", "actions", "rewards", "terminated", "truncated", "lengths", "frames"}
FIELDS |= {"qpos", "qvel"}
SEE = "see docs/own_demonstrations.md"
KINDS = "a .npz, a .pkl, an .hdf5, a folder of imitation's or minari:<dataset id>"


@dataclass
class Inspect:
    """Describe a demonstration set: a table and a figure."""

    demos: str  # demonstration set (.npz)
    figure: str = "demos.png"  # file for the figure


@dataclass
class Convert:
    """Translate another format into a set (.npz), or a set into another format."""

    source: str  # a .npz, .pkl or .hdf5, a folder of imitation's, or minari:<dataset id>
    target: str  # a .npz; of a set: a .pkl, .hdf5 or .npz, a folder, or minari:<dataset id>
    env_id: str | None = None  # the source's environment, if it does not name it
    max_episode_steps: int | None = None
    """the source's time limit, if it does not tell it, or not which episodes it cut"""


@dataclass
class Film:
    """Make a set of frames, of videos or of what an environment renders of a set's steps."""

    target: str  # the set (.npz)
    videos: list[str] = field(default_factory=list)
    """an episode each: .gif, .mp4 or folders of .png"""
    source: str = ""  # instead of videos: a set with actions, qpos and qvel
    env_id: str = ""  # the videos' environment
    max_episode_steps: int = 0  # its time limit (0: the longest video's length)
    terminated: bool = False  # the videos end because the task did, not by a time limit
    image_size: int = 56  # shorter side of a frame in pixels, a multiple of 8
    picture_ms: float = 0.0  # of a .gif with merged pictures: the time of one, 1000 / (pictures/s)


# Demonstration sets


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def check_fields(arrays: dict[str, np.ndarray], limit: int) -> None:
    """ValueError or KeyError unless the arrays are those of a set."""
    lengths = arrays["lengths"]
    if lengths.size == 0:
        raise ValueError("it holds no episodes")
    if lengths.dtype.kind != "i" or lengths.ndim != 1 or lengths.min() < 1:
        found = f"'lengths' is {lengths.dtype} of shape {lengths.shape}, from {lengths.min()}"
        raise ValueError(f"{found}, expected (E,) int64, each episode of 1 step or more")
    if lengths.max() > limit:
        longest = lengths.max()
        raise ValueError(f"an episode has {longest} steps, but max_episode_steps is {limit}")
    episodes, steps = len(lengths), int(lengths.sum())
    for name in ("terminated", "truncated"):
        if arrays[name].dtype != bool or arrays[name].shape != (episodes,):
            found = f"'{name}' is {arrays[name].dtype} of shape {arrays[name].shape}"
            raise ValueError(f"{found}, expected ({episodes},) bool")
    rows = {"observations": steps + episodes, "actions": steps, "rewards": steps}
    rows |= {"qpos": steps + episodes, "qvel": steps + episodes}
    rows |= {"frames": steps + episodes}
    dimensions = {"observations": (2,), "actions": (1, 2), "rewards": (1,), "frames": (3, 4)}
    needed = set() if "frames" in arrays else {"observations"}
    for name in sorted(rows.keys() & (arrays.keys() | needed)):
        array = arrays[name]
        has_rows = array.ndim in dimensions.get(name, (2,)) and len(array) == rows[name]
        if array.dtype.kind not in "fbiu" or not has_rows:
            found = f"{array.dtype} of shape {array.shape}"
            rewards = f"numbers of shape ({rows[name]},)"
            wanted = rewards if name == "rewards" else f"{rows[name]} rows of numbers"
            raise ValueError(f"'{name}' is {found}, expected {wanted}")
        if name == "actions" and array.ndim == 1 and array.dtype.kind == "f":
            raise ValueError("'actions' are fractions of shape (L,), expected (L, A), or whole "
                             "numbers where they are discrete")
        if name != "rewards" and not np.isfinite(array).all():  # those may be unknown
            raise ValueError(f"'{name}' holds NaN or infinity")


def read_set(path: str, flag: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the metadata of a set; UserError where something is wrong with it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        metadata = arrays.pop("metadata")
        try:
            metadata = json.loads(str(metadata))
        except json.JSONDecodeError:
            raise ValueError("its metadata is no JSON, as json.dumps makes it") from None
        if not isinstance(metadata, dict) or not isinstance(metadata["max_episode_steps"], int):
            raise ValueError("its metadata has no max_episode_steps that is a whole number")
        check_fields(arrays, metadata["max_episode_steps"])
        return arrays, metadata
    except KeyError as error:
        problem = f"the field {error} is missing"
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        problem = reason(error)
        if "pickle" in problem:  # numpy's advice is to trust it
            problem = "no .npz, or of objects; expected arrays of numbers, and metadata as JSON"
    raise UserError(f"{flag} {path}: {problem}; {SEE}.")


def returns_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(E,) undiscounted return of each episode; NaN where a reward is unknown."""
    first = np.cumsum(arrays["lengths"]) - arrays["lengths"]
    unknown = np.full(arrays["lengths"].sum(), np.nan)
    return np.add.reduceat(arrays.get("rewards", unknown).astype(np.float64), first)


def inspect(args: Inspect) -> None:
    """Print a table of a set; draw its returns, their growth over an episode, and its actions."""
    arrays, metadata = read_set(args.demos, "--demos")
    returns, lengths, limit = returns_of(arrays), arrays["lengths"], metadata["max_episode_steps"]
    known = returns[np.isfinite(returns)]
    earned = "unknown"
    if len(known):
        spread = f"{known.mean():.1f} ± {known.std():.1f}"
        earned = f"{spread}, from {known.min():.1f} to {known.max():.1f}"
        if len(known) < len(returns):
            earned += f" (that of {len(returns) - len(known)} episodes is unknown)"
    made_with = {k: v for k, v in metadata.items() if k not in ("env_id", "max_episode_steps")}
    terminated, truncated = arrays["terminated"].sum(), arrays["truncated"].sum()
    rows = {
        "file": args.demos,
        "environment": f"{metadata.get('env_id', 'not named')}, at most {limit} steps an episode",
        "episodes": f"{len(lengths)}, of {lengths.min()} to {lengths.max()} steps",
        "return": earned,
        "ended by": f"termination {terminated}, time limit {truncated}",
    }
    if "actions" not in arrays:
        rows["actions"] = "none"
    elif arrays["actions"].ndim == 1:
        rows["actions"] = f"discrete, from {arrays['actions'].min()} to {arrays['actions'].max()}"
    else:
        lowest, highest = arrays["actions"].min(axis=0), arrays["actions"].max(axis=0)
        ranges = [f"{low:.3g} to {high:.3g}" for low, high in zip(lowest, highest)]
        rows["actions"] = f"{len(ranges)} numbers, from {', '.join(ranges)}"
    rows["physics state"] = "yes" if "qpos" in arrays else "no"
    if "frames" in arrays:
        height, width = arrays["frames"].shape[1:3]
        rows["frames"] = f"{height} x {width} pixels, {arrays['frames'].dtype}"
    rows["made with"] = json.dumps(made_with)
    if unread := sorted(arrays.keys() - FIELDS):
        rows["read by nobody"] = ", ".join(unread)
    for name, value in rows.items():
        print(f"  {name:21}{value}")
    if "rewards" in arrays or "actions" in arrays:
        draw(arrays, known, args.figure)
    elif "frames" in arrays:
        draw_film(arrays["frames"][: lengths[0] + 1], args.figure)
    else:
        print("no figure: there are neither rewards, actions nor frames")
        return
    print(f"figure: {args.figure}")


def draw(arrays: dict[str, np.ndarray], returns: np.ndarray, path: str) -> None:
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    if len(returns):
        margin = 1e-6 * np.abs(returns).max()  # they may differ by no more than rounding
        left.hist(returns, bins=20, range=(returns.min() - margin, returns.max() + margin))
    left.set(xlabel="return of an episode", ylabel="episodes", title="Returns")
    if "rewards" in arrays:
        for rewards in np.split(arrays["rewards"], np.cumsum(arrays["lengths"])[:-1]):
            middle.plot(np.cumsum(rewards, dtype=np.float64), color="tab:blue", alpha=0.3)
    middle.set(xlabel="step of the episode", ylabel="return so far", title="A line an episode")
    right.set(xlabel="action dimension", ylabel="executed action", title="Actions")
    if "actions" in arrays and arrays["actions"].ndim == 1:
        right.bar(*np.unique(arrays["actions"], return_counts=True))
        right.set(xlabel="action", ylabel="steps")
    elif "actions" in arrays:
        right.violinplot(list(arrays["actions"].T.astype(np.float64)), showextrema=False)
    save(figure, path)


def draw_film(frames: np.ndarray, path: str) -> None:
    """Eight frames of an episode (T + 1, H, W) or (T + 1, H, W, 3), from first to last."""
    figure = Figure(figsize=(14, 2.4), layout="constrained")
    steps = np.linspace(0, len(frames) - 1, 8).astype(int)
    for ax, step in zip(figure.subplots(1, 8), steps):
        ax.imshow(frames[step], cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"after step {step}")
        ax.set_axis_off()
    save(figure, path)


def save(figure: Figure, path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=120, format=Path(path).suffix[1:] or "none")
    except ValueError as error:
        raise UserError(f"--figure {path}: {reason(error)}; name a .png.") from None


# The original author's pickles


class PlainUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers; all else could run code, and is refused. (A file
    made for it may still crash numpy, which trusts what a pickle says of a dtype.)"""

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if name == "ndarray":
            return name  # only named in pickles; one that calls it could choose what memory is read
        if name == "_reconstruct":
            return lambda *names: np.empty(0, np.int8)  # the array that the pickle fills next
        return super().find_class(module, name)


def make_cheetah() -> gym.Env:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a HalfCheetah-v5
        return gym.make("HalfCheetah-v4").unwrapped


def moves_like_a_cheetah(first: dict, second: dict) -> bool:
    """Whether HalfCheetah-v4 gets from one step's state to the next one's by the first's action.
    (Walker2d has as many observations and actions.)"""
    env = make_cheetah()
    env.reset()
    env.set_state(np.append(0.0, first["state"][:8]), np.array(first["state"][8:]))
    simulated, *_ = env.step(np.array(first["action"]))
    env.close()
    return np.allclose(simulated, second["state"], rtol=0.05, atol=0.05)


def is_the_authors(content, env_id: str | None) -> bool:
    """Whether what a pickle held looks like trajectories of HalfCheetah-v4, one dict a step."""
    if env_id not in (None, "HalfCheetah-v4") or not isinstance(content, list) or not content:
        return False
    if not all(isinstance(steps, list) and steps for steps in content):
        return False
    longest = max(content, key=len)
    step = longest[0]
    if not isinstance(step, dict):
        return False
    if step.keys() != {"state", "action", "reward", "done"}:
        return False
    if np.shape(step["state"]) != (17,) or np.shape(step["action"]) != (6,):
        return False
    return env_id is not None or len(longest) > 1 and moves_like_a_cheetah(*longest[:2])


def trajectories_of(content: list) -> list[tuple[np.ndarray, ...]]:
    """States (T, 17), actions (T, 6) and rewards (T,) of each trajectory."""
    keys, trajectories = ("state", "action", "reward"), []
    for steps in content:
        columns = [np.array([step[key] for step in steps], np.float64) for key in keys]
        if [x.shape[1:] for x in columns] != [(17,), (6,), ()]:
            raise ValueError("expected states of 17 numbers, actions of 6 and rewards of one")
        for key, x in zip(keys, columns):
            if not np.isfinite(x).all():
                raise ValueError(f"'{key}' holds None, NaN or infinity, expected finite numbers")
        trajectories.append(tuple(columns))
    return trajectories


def complete(trajectories: list[tuple[np.ndarray, ...]]) -> dict[str, np.ndarray]:
    """An author's trajectories as the arrays of a set. They leave out the state that an episode's
    last action led to, and the root's x. Both follow from the rest: the last action is simulated
    once more, and x is the sum of the velocities in the rewards."""
    env = make_cheetah()
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


# Other formats into sets, and back


def read_other(args: Convert) -> tuple[dict[str, np.ndarray], dict]:
    """A source in another format, by its name and fields: arrays and metadata of a set."""
    source, ending, limit = args.source, Path(args.source).suffix, args.max_episode_steps
    known: dict = {}
    if source.startswith("minari:"):
        episodes, known = formats.read_minari(source.removeprefix("minari:"))
    elif Path(source).is_dir():
        episodes = formats.read_imitation_folder(source)
    elif ending in PICKLE:
        with open(source, "rb") as file:
            content = PlainUnpickler(file).load()
        if is_the_authors(content, args.env_id):
            arrays = complete(trajectories_of(content))
            limit = limit or int(arrays["lengths"].max())
            return arrays, {"env_id": "HalfCheetah-v4", "max_episode_steps": limit}
        episodes = formats.episodes_of_pickle(content, limit)
    elif ending in HDF5:
        episodes = formats.read_d4rl(source, limit)
    elif ending == ".npz":
        with np.load(source, allow_pickle=False) as file:
            fields = set(file.files)
        if "episode_starts" in fields:
            episodes = formats.read_stable_baselines(source)
        elif "indices" in fields:
            episodes = formats.read_imitation_npz(source)
        else:
            raise ValueError("it is no set, none of Stable-Baselines and none of imitation")
    else:
        raise ValueError(f"expected {KINDS}")
    env_id = args.env_id or known.get("env_id")
    if env_id is None:
        raise ValueError("it does not name its environment: give --env-id")
    arrays, limit = formats.make_set(episodes, limit or known.get("max_episode_steps"))
    return arrays, {"env_id": env_id, "max_episode_steps": limit}


def import_set(args: Convert) -> None:
    """Another format becomes a set."""
    if Path(args.target).suffix != ".npz":
        problem = "expected a .npz, since the source is no set"
        raise UserError(f"--target {args.target}: {problem}; {SEE}.")
    try:
        arrays, metadata = read_other(args)
        check_fields(arrays, metadata["max_episode_steps"])
    except KeyError as error:
        problem = f"the field {error} is missing"
        raise UserError(f"--source {args.source}: {problem}; {SEE}.") from None
    except Exception as error:  # a pickle, or a damaged file, can fail in any way
        raise UserError(f"--source {args.source}: {reason(error)}; {SEE}.") from None
    write_set(arrays, metadata | {"source": args.source}, Path(args.target))


def write_set(arrays: dict, metadata: dict, target: Path) -> None:
    """A set's file, whole or not at all."""
    returns = returns_of(arrays)
    if np.isfinite(returns).all():
        metadata |= {"return_mean": returns.mean(), "return_std": returns.std()}
    metadata |= {"versions": {x.__name__: x.__version__ for x in (np, gym, mujoco)}}
    temporary = target.with_suffix(".tmp.npz")  # a kill leaves the old file, or the new
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        np.savez_compressed(temporary, metadata=json.dumps(metadata), **arrays)
        os.replace(temporary, target)
    except OSError:
        remove(temporary)
        raise
    lengths, limit = arrays["lengths"], metadata["max_episode_steps"]
    shown = f"{len(lengths)} episodes of {lengths.min()} to {lengths.max()} steps"
    print(f"{shown}, {metadata['env_id']}, time limit {limit}")


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def export_set(args: Convert) -> None:
    """A set becomes another format, by the target's name."""
    if args.env_id or args.max_episode_steps:
        raise UserError("--env-id and --max-episode-steps: a set has its own; leave them out.")
    arrays, metadata = read_set(args.source, "--source")
    target, ending = Path(args.target), Path(args.target).suffix
    limit = metadata["max_episode_steps"]
    is_minari = args.target.startswith("minari:")
    writers = {".npz": formats.write_stable_baselines, "": formats.write_imitation_folder}
    writers |= dict.fromkeys(PICKLE, formats.write_pickle) | dict.fromkeys(HDF5, formats.write_d4rl)
    if not is_minari and ending not in writers:
        raise UserError(f"--target {args.target}: expected {KINDS}; {SEE}.")
    needed = {"observations", "actions"}
    if is_minari or ending in (".npz", *HDF5):
        needed |= {"rewards"}
    for name in sorted(needed - arrays.keys()):
        problem = f"it has no {name}, and the target needs them"
        raise UserError(f"--source {args.source}: {problem}; {SEE}.")
    episodes = formats.episodes_of_set(arrays)
    temporary = target.parent / f"{target.stem}.tmp{ending}"  # a kill leaves the old file
    try:
        if is_minari:
            dataset_id = args.target.removeprefix("minari:")
            formats.write_minari(dataset_id, episodes, metadata.get("env_id"), limit)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        writers[ending](temporary, episodes)
        os.replace(temporary, target)
    except Exception as error:
        if not is_minari:
            remove(temporary)
        raise UserError(f"--target {args.target}: {reason(error)}; {SEE}.") from None
    if ending in (".npz", *PICKLE):
        formats.warn_of_endings(arrays, limit)
    if arrays["lengths"][arrays["truncated"]].max(initial=0) < limit:
        print(f"to read it back, give --max-episode-steps {limit}: no episode was that long")


def is_set(path: str) -> bool:
    """Whether a file has the fields of a set; UserError if it is a .npz that cannot be read."""
    if Path(path).suffix != ".npz" or Path(path).is_dir():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            return "lengths" in file
    except Exception as error:
        raise UserError(f"--source {path}: {reason(error)}; {SEE}.") from None


def convert(args: Convert) -> None:
    mujoco.set_mju_user_warning(lambda message: None)  # gymnasium's models have old attributes
    limit = args.max_episode_steps
    if limit is not None and limit < 1:
        raise UserError(f"--max-episode-steps is {limit}, expected 1 or more; change it.")
    if Path(args.source).exists() and Path(args.source).resolve() == Path(args.target).resolve():
        raise UserError(f"--target {args.target} is the source itself; give another.")
    if is_set(args.source):
        export_set(args)
    else:
        import_set(args)
    print(f"wrote {args.target}")


# Films


def make_film(args: Film) -> None:
    """Videos, or a set's steps as its environment renders them, become a set of frames."""
    flag = "--source" if args.source else "--videos"
    if bool(args.source) == bool(args.videos) or bool(args.source) == bool(args.env_id):
        raise UserError(f"film: give --videos and --env-id, or --source alone; {SEE}.")
    if Path(args.target).suffix != ".npz" or args.image_size < 16 or args.image_size % 8:
        raise UserError(f"film: --target must end in .npz, --image-size is a multiple of 8, 16 or "
                        f"more; {SEE}.")
    if args.picture_ms and args.picture_ms < 20:
        raise UserError(f"--picture-ms is {args.picture_ms:g}, expected 20 or more (a .gif counts "
                        "in 10 ms); make a folder of .png instead.")
    if args.terminated and not args.max_episode_steps:  # ends count by the time left until it
        raise UserError(f"film: --terminated needs the task's --max-episode-steps; {SEE}.")
    try:
        if args.source:
            arrays, metadata = read_set(args.source, "--source")
            for name in sorted({"qpos", "qvel", "actions"} - arrays.keys()):
                raise ValueError(f"the field '{name}' is missing")
            arrays = film.render_set(arrays, metadata["env_id"], args.image_size)
            metadata = {name: metadata[name] for name in ("env_id", "max_episode_steps")}
        else:
            arrays = film.read_videos(
                args.videos, args.terminated, args.image_size, args.picture_ms
            )
            limit = args.max_episode_steps or int(arrays["lengths"].max())
            metadata = {"env_id": args.env_id, "max_episode_steps": limit}
        check_fields(arrays, metadata["max_episode_steps"])
    except UserError:
        raise
    except Exception as error:  # imageio and renderers fail in many ways
        given = args.source or " ".join(args.videos)
        raise UserError(f"{flag} {given}: {reason(error)}; {SEE}.") from None
    write_set(arrays, metadata | {"source": args.source or args.videos}, Path(args.target))
    print(f"wrote {args.target}")


# Command line


def parse_args(argv: list[str]) -> Inspect | Convert | Film:
    commands = {"inspect": Inspect, "convert": Convert, "film": Film}
    return tyro.extras.subcommand_cli_from_dict(commands, args=argv)


def main(argv: list[str]) -> None:
    """Command line in, exit code out."""
    try:
        args = parse_args(argv)
        if isinstance(args, Inspect):
            inspect(args)
        elif isinstance(args, Film):
            make_film(args)
        else:
            convert(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
