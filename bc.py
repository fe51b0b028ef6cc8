"""Behaviour cloning: imitate a demonstrator by regressing its actions on its states, complete in one file.

The policy is a network fitted to the demonstrated (state, action) pairs by supervised learning (Pomerleau 1989; Ross &
Bagnell 2010 on why its errors add up over an episode). It never acts while it learns, so nothing corrects it once its
own actions have led it to states that no demonstration shows. Every result of an imitation method must stand beside it.

    repeat:  minibatch of pairs -> loss -> gradient step -> slow policy = polyak * slow + (1 - polyak) * policy

Details that matter:

 1. `--loss mse` fits a deterministic policy by mean squared error; `--loss nll` a Gaussian with a state-independent
    standard deviation by maximum likelihood. Both are judged by their mean action, the Gaussian by sampled ones too.
 2. A second, "slow" policy is the Polyak average of the first one's weights, evaluated beside it and saved as well.
 3. The demonstrations are split into training and validation *by episode*: neighbouring steps are nearly equal, so
    steps drawn from the same episode on both sides would make the validation loss a second training loss. One
    demonstration leaves no episode for validation; it is then left out.
 4. Observations are standardized by the training episodes alone.
 5. `bc/train_loss` and `bc/val_loss` are the same loss, of the same weights, each over its whole split, without any
    noise of minibatches: their difference is the generalization gap and nothing else.
 6. An episode *fell away from the pack* if it returned less than half of the demonstrations' mean return. The yardstick
    is the demonstrations', not the policy's own median: a policy that mostly fails cannot pass for its own pack. It
    asks for a task whose good returns are positive.
 7. Weight decay keeps the network from fitting the noise in the demonstrated actions. Without it training longer makes
    the policy worse (bc_short.csv in benchmark/results): the loss on held-out episodes rises and more episodes fall.
 8. The deterministic policy ends in a tanh, as the expert does: most demonstrated actions lie near the bounds, which a
    tanh meets by saturating. ReLU did better than tanh and SiLU in the hidden layers (bc_short.csv, one run each).

Commands (two CPU cores):

    python bc.py                                            # stochastic-one: 14 seconds
    python bc.py --loss nll --hidden-size 64                # Gaussian head, narrower
    python bc.py --num-demos 1                              # from one episode of 100 steps
    python bc.py --compare-with runs/<run>/policy.pt        # cumulative returns beside those of a saved policy
    python bc.py --evaluate runs/<run>/policy.pt            # 200 episodes; --compare-with works here as well
    python bc.py --resume runs/<run>/checkpoint.pt          # go on where a killed run stopped, bit for bit
    python bc.py --study                                    # five sets x four widths x three seeds: 16 minutes
    python bc.py --study --study-wide                       # width 4096 on stochastic-one as well: long
"""

import copy
import csv
import dataclasses
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode
from matplotlib.figure import Figure
from mujoco.batch import Batch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

FORMAT_VERSION = 1
OBS_CLIP = 10.0  # standardized observations are clipped to [-OBS_CLIP, OBS_CLIP]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # of a saved Gaussian policy, when it acts
LEVELS = ("deterministic", "stochastic-half", "stochastic-one", "stochastic-one_five", "stochastic-two")
WIDE_LEVEL, WIDE = "stochastic-one", 4096  # the cell that --study-wide adds


@dataclass
class Args:
    exp_name: str = "bc"  # name of the experiment, the first part of the run's name
    seed: int = 1
    """seed of everything random: network, minibatches, choice and split of demonstrations, evaluation episodes"""
    env_id: str = "HalfCheetah-v4"  # environment id; must be the one the demonstrations come from
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"  # demonstration set (.npz, see data/README.md)
    num_demos: int = 0  # use this many demonstrated episodes, drawn by the seed (0: all)
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""
    """name of the run's folder (default: <exp-name>__<env-id>__<seed>__<time>; for --study: <exp-name>_study)"""
    resume: str = ""  # checkpoint.pt of a run to go on with; settings come from it, so give no other flag
    evaluate: str = ""  # policy.pt to evaluate instead of training; the figure lands beside it
    compare_with: str = ""
    """policy.pt of a script that acts on states, whose cumulative returns are drawn beside this policy's"""
    eval_interval: int = 250
    """gradient steps between evaluations (20 episodes with the mean action), each followed by a checkpoint"""
    eval_episodes: int = 200  # episodes of the final evaluation
    capture_video: bool = False  # write a GIF of one episode at the end
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works without an account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    wandb_entity: str = ""  # Weights & Biases team (default: yours)
    cuda: bool = False  # train the network on the GPU; worth it for --hidden-size 1024 and more
    threads: int = 0  # threads that step the physics (0: one a core); results do not depend on it

    loss: Literal["mse", "nll"] = "mse"
    """mean squared error of a deterministic policy, or negative log-likelihood of a Gaussian one"""
    gradient_steps: int = 4000  # minibatch steps of the whole run
    batch_size: int = 256  # (state, action) pairs in a minibatch
    learning_rate: float = 4e-3  # Adam step size
    anneal_lr: bool = True  # let the step size fall linearly to zero over the run
    weight_decay: float = 0.3  # decoupled weight decay (AdamW)
    hidden_size: int = 256  # width of the hidden layers
    hidden_layers: int = 2  # number of hidden layers
    polyak: float = 0.99  # share of itself that the slow policy keeps at each gradient step
    val_fraction: float = 0.1  # share of the demonstrated episodes held out for validation (0: none)

    study: bool = False
    """train on each of the five sets beside --demos, at each width, with each seed, and tabulate the returns"""
    study_widths: tuple[int, ...] = (16, 64, 256, 1024)  # hidden sizes of the study
    study_seeds: int = 3  # seeds of the study, from --seed on
    study_wide: bool = False  # add width 4096 on stochastic-one, one seed
    study_workers: int = 0  # runs of the study side by side, one thread each (0: one a core)

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        require_range(self, ["polyak", "val_fraction"], "of at least 0 and less than 1", lambda x: 0 <= x < 1)
        check_numbers(self, may_be_zero="num_demos threads weight_decay study_workers polyak val_fraction")
        if self.cuda and not torch.cuda.is_available():
            raise UserError("--cuda was given, but PyTorch sees no GPU; leave it out or install a CUDA build of torch.")
        if not self.study_widths or min(self.study_widths) < 1:
            raise UserError(f"--study-widths is {self.study_widths}, expected widths of 1 or more; change it.")
        if self.study and (self.evaluate or self.compare_with or self.capture_video):
            raise UserError("--study trains many policies; drop --evaluate, --compare-with and --capture-video.")


class UserError(Exception):
    """A user's mistake: shown as one sentence, exit code 2."""


def parse_args(argv: list[str], args_type):
    """Command line to dataclass. Booleans may also be --flag=True or --flag=False, as a W&B sweep agent writes them."""
    classes = typing.get_args(args_type) or (args_type,)
    booleans = {field.name for cls in classes for field in dataclasses.fields(cls) if field.type is bool}
    rewritten = []
    for arg in argv:
        name, _, value = arg.removeprefix("--").replace("-", "_").partition("=")
        if arg.startswith("--") and name in booleans and value in ("True", "False"):
            arg = f"--{'' if value == 'True' else 'no-'}{name.replace('_', '-')}"
        rewritten.append(arg)
    args = tyro.cli(args_type, args=rewritten)
    if getattr(args, "resume", "") and sum(arg.startswith("--") for arg in argv) > 1:
        raise UserError("--resume takes every setting from the checkpoint, so it stands alone; drop the other flags.")
    return args


def check_numbers(args, may_be_zero: str) -> None:
    """Raise UserError unless every number in args is greater than 0, or 0 where its name is among may_be_zero."""
    numbers = [x.name for x in dataclasses.fields(args) if x.type in (int, float)]
    require_range(args, ["seed"], "from 0 to 2147483647", lambda x: 0 <= x < 2**31)
    require_range(args, may_be_zero.split(), "0 or greater", lambda x: x >= 0)
    positive = [name for name in numbers if name not in ("seed", *may_be_zero.split())]
    require_range(args, positive, "greater than 0", lambda x: x > 0)


def require_range(args, names: list[str], expected: str, accepts) -> None:
    """Raise UserError unless every named number in args is finite and accepted."""
    for name in names:
        value = getattr(args, name)
        if not (abs(value) < math.inf and accepts(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected a number {expected}; change it.")


# Demonstrations


@dataclass
class Demos:
    """E demonstrated episodes, L steps in all. What a file may lack is None."""

    observations: np.ndarray  # (L + E, O) float32, each episode's final observation included
    terminated: np.ndarray  # (E,) bool
    truncated: np.ndarray  # (E,) bool
    lengths: np.ndarray  # (E,) int64, steps of each episode
    metadata: dict
    actions: np.ndarray | None = None  # (L, A) float32, as executed
    rewards: np.ndarray | None = None  # (L,) float32
    qpos: np.ndarray | None = None  # (L + E, nq) float64

    @property
    def obs_before_step(self) -> np.ndarray:
        """(L, O): the observation each action answered, i.e. all but the final ones."""
        return np.delete(self.observations, np.cumsum(self.lengths + 1) - 1, axis=0)

    @property
    def returns(self) -> np.ndarray:
        """(E,): undiscounted return of each episode; NaN where the file has no rewards."""
        if self.rewards is None:
            return np.full(len(self.lengths), np.nan)
        return np.add.reduceat(self.rewards.astype(np.float64), np.cumsum(self.lengths) - self.lengths)


def load_demos(
    path: str, env_id: str | None, num_demos: int, rng: np.random.Generator, required: tuple[str, ...]
) -> Demos:
    """Read and check a demonstration set; keep `num_demos` episodes drawn without replacement by rng (0: all).

    Raises UserError where the file is missing, damaged, of another environment, or lacks a `required` field.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise UserError(f"--demos {path}: {problem}; give a set of collect_expert_sac.py (see data/README.md).")

    try:
        with np.load(path, allow_pickle=False) as file:
            fields = {name: file[name] for name in file.files}
        metadata = json.loads(str(fields.pop("metadata")[()]))
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        require(False, f"not a readable demonstration set ({getattr(error, 'strerror', None) or type(error).__name__})")

    for name in ("observations", "terminated", "truncated", "lengths", *required):
        require(name in fields, f"the field '{name}' is missing, and this script needs it")
    versioned = isinstance(metadata, dict) and metadata.get("format_version") == FORMAT_VERSION
    require(versioned, f"its format version is not {FORMAT_VERSION}")
    recorded_in, limit = metadata.get("env_id"), metadata.get("max_episode_steps")
    require(not env_id or recorded_in == env_id, f"recorded in {recorded_in}, but --env-id is {env_id}")
    require(isinstance(limit, int) and limit >= 1, "its metadata has no max_episode_steps of 1 or more")
    require(isinstance(metadata.get("expert_return_mean", 0), (int, float)), "its expert_return_mean is no number")
    lengths = fields["lengths"]
    counted = lengths.ndim == 1 and len(lengths) > 0 and lengths.dtype.kind == "i" and lengths.min() >= 1
    require(counted, "'lengths' must hold at least one episode, each of 1 step or more")
    episodes, steps = len(lengths), int(lengths.sum())
    rows = dict.fromkeys(("observations", "qpos"), steps + episodes)
    rows |= dict.fromkeys(("actions", "rewards"), steps) | dict.fromkeys(("terminated", "truncated"), episodes)
    for name, count in rows.items():
        array, ndim = fields.get(name), 2 if name in ("observations", "qpos", "actions") else 1
        if array is not None:
            fits, found = array.shape[:1] == (count,) and array.ndim == ndim, f"{array.dtype} of shape {array.shape}"
            require(fits and array.dtype.kind in "fbiu", f"'{name}' is {found}, expected {count} rows of numbers")
        if name in ("observations", *required):
            require(np.isfinite(array).all(), f"'{name}' holds NaN or infinity, expected finite numbers")
    if not 0 <= num_demos <= episodes:
        raise UserError(f"--num-demos is {num_demos}, but {path} holds {episodes} episodes; ask for 0 (all) or fewer.")

    chosen = np.isin(np.arange(episodes), rng.choice(episodes, num_demos or episodes, replace=False))
    masks = {steps: np.repeat(chosen, lengths), steps + episodes: np.repeat(chosen, lengths + 1), episodes: chosen}
    kept = {name: fields[name][masks[count]] for name, count in rows.items() if name in fields}
    kept |= {name: kept[name].astype(np.float32) for name in ("observations", "actions", "rewards") if name in kept}
    return Demos(lengths=lengths[chosen], metadata=metadata, **kept)


def check_dimensions(demos: Demos, envs, path: str) -> None:
    """UserError unless the demonstrations fit the environment."""
    for name, expected in (("observations", envs.obs_dim), ("actions", envs.action_dim)):
        array = getattr(demos, name)
        if array is not None and array.shape[1] != expected:
            problem = f"its {name} have {array.shape[1]} dimensions, the environment's {expected}"
            raise UserError(f"--demos {path}: {problem}; give demonstrations of this environment.")


def split_episodes(episodes: int, val_fraction: float, rng: np.random.Generator) -> np.ndarray:
    """(episodes,) bool: which episodes are held out for validation, drawn by rng.

    At least one where val_fraction asks for any, and never all: a single episode is trained on.
    """
    count = min(max(round(val_fraction * episodes), int(val_fraction > 0)), episodes - 1)
    return np.isin(np.arange(episodes), rng.permutation(episodes)[:count])


@dataclass
class Pairs:
    """The demonstrated pairs as tensors, split by episode; observations standardized by the training episodes."""

    train_obs: Tensor  # (B, O)
    train_actions: Tensor  # (B, A), clipped to the bounds
    val_obs: Tensor  # (B', O), B' = 0 without validation episodes
    val_actions: Tensor  # (B', A)
    obs_mean: Tensor  # (O,)
    obs_std: Tensor  # (O,)


def make_pairs(demos: Demos, held_out: np.ndarray, envs, device: torch.device) -> Pairs:
    """Split the demonstrations' steps by their episode, held_out (E,) bool, and standardize the observations."""
    in_val = np.repeat(held_out, demos.lengths)
    obs = torch.from_numpy(demos.obs_before_step).to(device)
    actions = torch.from_numpy(np.clip(demos.actions, envs.action_low, envs.action_high).astype(np.float32)).to(device)
    train, val = torch.from_numpy(~in_val).to(device), torch.from_numpy(in_val).to(device)
    obs_mean, obs_std = obs[train].mean(0), obs[train].std(0, correction=0) + 1e-3
    obs = standardize(obs, obs_mean, obs_std)
    return Pairs(obs[train], actions[train], obs[val], actions[val], obs_mean, obs_std)


# Environments: both classes give the same loop the same things


class BatchHalfCheetah:
    """N HalfCheetah-v4 simulations on MuJoCo's native threads; equal to gymnasium's, step for step, and bit-identical
    at any number of threads. Ended episodes reset at once; `final_obs` keeps the observation they ended with."""

    frame_skip, reset_noise, control_cost = 5, 0.1, 0.1

    def __init__(self, num_envs: int, max_episode_steps: int, seed: int, threads: int):
        mujoco.set_mju_user_warning(lambda message: None)  # the model file uses a deprecated attribute
        self.model = mujoco.MjModel.from_xml_path(f"{gym.__path__[0]}/envs/mujoco/assets/half_cheetah.xml")
        mujoco.set_mju_user_warning(None)
        self.batch = Batch(self.model, num_envs, threads)
        self.qpos, self.qvel, self.ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))  # live views
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.obs_dim, self.action_dim = self.model.nq - 1 + self.model.nv, self.model.nu
        self.action_low, self.action_high = self.model.actuator_ctrlrange.T
        self.dt = self.frame_skip * self.model.opt.timestep
        self.elapsed, self.rng = np.zeros(num_envs, np.int64), np.random.default_rng(seed)

    def observe(self) -> np.ndarray:
        """(N, O) float64: all positions but the root's x, then all velocities."""
        return np.concatenate([self.qpos[:, 1:], self.qvel], axis=1)

    def reset(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Start new episodes in the given simulations (None: all); returns all observations."""
        ids = np.arange(self.num_envs) if ids is None else ids
        self.batch.reset(ids, stage=mujoco.mjtStage.mjSTAGE_NONE)
        noise = self.rng.uniform(-self.reset_noise, self.reset_noise, (len(ids), self.model.nq))
        self.qpos[ids] = self.model.qpos0 + noise
        self.qvel[ids] = self.reset_noise * self.rng.standard_normal((len(ids), self.model.nv))
        self.elapsed[ids] = 0
        return self.observe()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """actions (N, A) in bounds -> next_obs (N, O), rewards (N,), terminated (N,), truncated (N,), final_obs (N, O).

        next_obs is what the next action answers; final_obs what this one led to: they differ where an episode ended.
        """
        x_before = self.qpos[:, 0].copy()
        self.ctrl[:] = actions
        self.batch.step(nstep=self.frame_skip)
        self.final_qpos, self.final_qvel = self.qpos.copy(), self.qvel.copy()
        rewards = (self.qpos[:, 0] - x_before) / self.dt - self.control_cost * np.square(actions).sum(axis=1)
        self.elapsed += 1
        truncated = self.elapsed >= self.max_episode_steps
        next_obs = final_obs = self.observe()
        if truncated.any():
            next_obs = self.reset(np.flatnonzero(truncated))
        return next_obs, rewards, np.zeros(self.num_envs, bool), truncated, final_obs

    def state_dict(self) -> dict:
        """Everything the simulations need to go on bit for bit, warm starts included."""
        state = torch.from_numpy(self.batch.state.copy())
        return {"state": state, "elapsed": self.elapsed.tolist(), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, saved: dict) -> None:
        self.batch.state[:] = saved["state"].numpy()
        self.elapsed[:] = saved["elapsed"]
        self.rng.bit_generator.state = saved["rng"]


class GymnasiumEnvs:
    """N copies of any gymnasium environment with flat Box observations and actions, behind the same interface."""

    def __init__(self, env_id: str, num_envs: int, max_episode_steps: int, seed: int):
        options = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}
        try:
            self.envs = gym.make_vec(env_id, num_envs, max_episode_steps=max_episode_steps, **options)
        except (gym.error.Error, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--env-id {env_id}: {reason}; give a registered gymnasium id.") from None
        obs_space, action_space = self.envs.single_observation_space, self.envs.single_action_space
        for name, space in (("observations", obs_space), ("actions", action_space)):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                raise UserError(f"--env-id {env_id}: its {name} are {space}, expected a flat Box; choose another env.")
        self.num_envs, self.obs_dim, self.action_dim = num_envs, obs_space.shape[0], action_space.shape[0]
        self.action_low, self.action_high, self.seed = action_space.low, action_space.high, seed

    def reset(self) -> np.ndarray:
        return self.envs.reset(seed=self.seed)[0]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """As BatchHalfCheetah.step."""
        next_obs, rewards, terminated, truncated, info = self.envs.step(actions)
        final_obs = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            final_obs[i] = info["final_obs"][i]
        return next_obs, rewards, terminated, truncated, final_obs

    def state_dict(self) -> dict:
        return {}  # a general simulator's state cannot be read: a resumed run starts new episodes

    def load_state_dict(self, saved: dict) -> None:
        pass


def make_envs(env_id: str, num_envs: int, max_episode_steps: int, seed: int, threads: int):
    """The fast HalfCheetah-v4, or gymnasium's version of anything else."""
    if env_id == "HalfCheetah-v4":
        return BatchHalfCheetah(num_envs, max_episode_steps, seed, threads or len(os.sched_getaffinity(0)))
    return GymnasiumEnvs(env_id, num_envs, max_episode_steps, seed)


# Networks


def mlp(sizes: list[int], activation: type[nn.Module], output_gain: float, generator: Generator) -> nn.Sequential:
    """Fully connected layers, orthogonal weights (gain sqrt 2, `output_gain` in the last), zero biases."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        last = i == len(sizes) - 2
        layer = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(layer.weight, output_gain if last else math.sqrt(2), generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, activation()]
    return nn.Sequential(*layers)


class Cloner(nn.Module):
    """The policy: mean action of standardized observations, (B, O) -> (B, A). The deterministic one is squashed by tanh
    into the bounds, as the expert's is; the gaussian one is not, and has a log standard deviation (A,)."""

    def __init__(self, sizes: list[int], envs, gaussian: bool, generator: Generator):
        super().__init__()
        self.net = mlp(sizes, nn.ReLU, 0.01, generator)
        self.log_std = nn.Parameter(torch.full((sizes[-1],), -0.5)) if gaussian else None
        for name in ("low", "high"):
            bound = torch.as_tensor(getattr(envs, f"action_{name}"), dtype=torch.float32)
            self.register_buffer(name, bound, persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        x = self.net(obs)
        return x if self.log_std is not None else self.low + 0.5 * (torch.tanh(x) + 1) * (self.high - self.low)


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(action; mean, exp(log_std)^2), summed over the last axis: (..., A) -> (...)."""
    z = (action - mean) * torch.exp(-log_std)
    return -0.5 * z.square().sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * action.shape[-1]


# The algorithm, as pure functions


def standardize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std, clipped to [-OBS_CLIP, OBS_CLIP]."""
    return ((x - mean) / std).clamp(-OBS_CLIP, OBS_CLIP)


def cloning_loss(model: Cloner, obs: Tensor, actions: Tensor) -> Tensor:
    """What is minimized, (B, O), (B, A) -> (): mean squared error per action dimension, or negative log-likelihood in
    nats per pair where the policy is Gaussian."""
    mean = model(obs)
    if model.log_std is None:
        return F.mse_loss(mean, actions)
    return -gaussian_log_prob(actions, mean, model.log_std).mean()


@torch.no_grad()
def polyak_update(slow: nn.Module, fast: nn.Module, polyak: float) -> None:
    """slow = polyak * slow + (1 - polyak) * fast, in place, for every parameter."""
    for slow_parameter, parameter in zip(slow.parameters(), fast.parameters()):
        slow_parameter.lerp_(parameter, 1 - polyak)


def fell_away(returns: np.ndarray, demos_mean: float) -> float:
    """Share of returns (E,) below half of the demonstrations' mean; NaN where that mean is not positive, for half of it
    is then no mark of failure."""
    return float((returns < 0.5 * demos_mean).mean()) if demos_mean > 0 else math.nan


# The training loop's named steps


def clone(
    model: Cloner,
    slow: Cloner,
    optimizer: Optimizer,
    pairs: Pairs,
    args: Args,
    first: int,
    last: int,
    generator: Generator,
) -> None:
    """Gradient steps number first to last - 1 of the run, each on a minibatch of its own."""
    for step in range(first, last):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.gradient_steps)
        index = torch.randint(len(pairs.train_obs), (args.batch_size,), generator=generator).to(pairs.train_obs.device)
        loss = cloning_loss(model, pairs.train_obs[index], pairs.train_actions[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        polyak_update(slow, model, args.polyak)


@torch.no_grad()
def split_losses(model: Cloner, pairs: Pairs) -> dict[str, float]:
    """bc/train_loss and bc/val_loss on the same footing: one loss, one set of weights, each over its whole split."""
    losses = {"bc/train_loss": cloning_loss(model, pairs.train_obs, pairs.train_actions).item()}
    if len(pairs.val_obs):
        losses["bc/val_loss"] = cloning_loss(model, pairs.val_obs, pairs.val_actions).item()
    return losses


# Policies and their evaluation


def policy_to_save(model: Cloner, pairs: Pairs, env_id: str, max_episode_steps: int) -> dict:
    """The content of policy.pt; gail_ppo.py and gail_state_seq.py read it too where the policy is Gaussian."""
    weights = {name: w.detach().cpu().clone() for name, w in model.net.state_dict().items()}
    kind, weight, bias = "deterministic", *list(weights)[-2:]
    if model.log_std is not None:  # as gail_ppo.py's: the last layer tells mean and log_std, here of any state the same
        kind, log_std = "gaussian", model.log_std.detach().cpu()
        weights |= {weight: torch.cat([weights[weight], torch.zeros_like(weights[weight])])}
        weights |= {bias: torch.cat([weights[bias], log_std])}
    sizes = [model.net[0].in_features, *(len(w) for w in weights.values() if w.ndim == 1)]
    policy = {"format_version": FORMAT_VERSION, "kind": kind, "activation": "relu", "env_id": env_id, "sizes": sizes}
    policy |= {"weights": weights, "obs_mean": pairs.obs_mean.cpu(), "obs_std": pairs.obs_std.cpu()}
    return policy | {"obs_clip": OBS_CLIP, "max_episode_steps": max_episode_steps}


def load_any_actor(
    policy: dict, low: np.ndarray, high: np.ndarray
) -> typing.Callable[[np.ndarray, Tensor], np.ndarray]:
    """The action in bounds (B, A) as a function of raw observations (B, O) and noise (B, A), from the content of a
    policy.pt of any kind. Noise is in units of the policy's standard deviation: zero gives the mean action.

    gaussian: layers to mean and log_std, clipped to the bounds; tanh_gaussian: squashed by tanh and stretched to the
    bounds (collect_expert_sac.py); deterministic: the same without log_std.
    """
    kind, weights = policy["kind"], policy["weights"]
    activation = {"relu": F.relu, "silu": F.silu}["relu" if kind == "tanh_gaussian" else policy["activation"]]
    layers = [(w, weights[name.removesuffix("weight") + "bias"]) for name, w in weights.items() if w.ndim == 2]

    @torch.inference_mode()
    def act(obs: np.ndarray, noise: Tensor) -> np.ndarray:
        x = (torch.as_tensor(obs, dtype=torch.float32) - policy["obs_mean"]) / policy["obs_std"]
        x = x.clamp(-policy["obs_clip"], policy["obs_clip"])
        for i, (weight, bias) in enumerate(layers):
            x = F.linear(activation(x) if i else x, weight, bias)
        if kind != "deterministic":
            mean, log_std = x.chunk(2, dim=-1)
            if kind == "tanh_gaussian":
                log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)
            x = mean + log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp() * noise
        if kind == "gaussian":
            return np.clip(x.numpy(), low, high)
        return low + 0.5 * (torch.tanh(x).numpy() + 1) * (high - low)

    return act


def read_policy(path: str, flag: str, env_id: str | None = None) -> dict:
    """The content of a policy.pt of any kind, tried once; UserError where it cannot act or, with env_id, not there."""
    policy = load_saved(path, flag, {"env_id": env_id} if env_id else {})
    if policy.get("kind") not in ("deterministic", "gaussian", "tanh_gaussian"):
        raise UserError(f"{flag} {path}: its kind is {policy.get('kind')}, which no policy.pt has; give another.")
    try:
        envs = make_envs(policy["env_id"], 1, policy["max_episode_steps"], 0, 1)
        act = load_any_actor(policy, envs.action_low, envs.action_high)
        action = act(envs.reset(), torch.zeros(1, envs.action_dim))
        if not np.isfinite(action).all():
            raise UserError(f"{flag} {path}: its actions are not finite; give a policy of a run that did not diverge.")
        envs.step(action)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{flag} {path}: damaged or of another version ({type(error).__name__}); give another."
        ) from None
    return policy


def play(policy: dict, episodes: int, sampled: bool, seed: int, threads: int = 0) -> np.ndarray:
    """Env rewards (T, episodes) of fresh episodes with the mean action or sampled ones; NaN once an episode has ended.

    policy is the content of a policy.pt; environments and random numbers are the evaluation's own.
    """
    envs = make_envs(policy["env_id"], episodes, policy["max_episode_steps"], seed, threads)
    act = load_any_actor(policy, envs.action_low, envs.action_high)
    generator = Generator().manual_seed(seed)
    obs = envs.reset()
    rewards, running = [], np.ones(episodes, bool)
    while running.any():
        action = act(obs, sampled * torch.randn((episodes, envs.action_dim), generator=generator))
        obs, reward, terminated, truncated, _ = envs.step(action)
        rewards.append(np.where(running, reward, np.nan))
        running = running & ~(terminated | truncated)
    return np.stack(rewards)


def returns_of_play(policy: dict, episodes: int, sampled: bool, seed: int, threads: int = 0) -> np.ndarray:
    """(episodes,) true returns of fresh episodes."""
    return np.nansum(play(policy, episodes, sampled, seed, threads), axis=0)


def compare_policies(
    policies: list[tuple[str, dict]], args: Args, demos_mean: float, figure_path: Path
) -> list[np.ndarray]:
    """Play each (title, policy) from the same starts under the first one's time limit, draw their cumulative returns,
    and give the returns (E,) of each."""
    limit, episodes, seed = policies[0][1]["max_episode_steps"], args.eval_episodes, args.seed + 20_000
    policies = [(title, policy | {"max_episode_steps": limit}) for title, policy in policies]
    played = [(title, play(policy, episodes, False, seed, args.threads)) for title, policy in policies]
    plot_cumulative_returns(figure_path, played, demos_mean)
    return [np.nansum(rewards, axis=0) for _, rewards in played]


# Files of a run


def save_atomically(content: dict, path: Path) -> None:
    """torch.save that leaves either the old file or the new one, whole, wherever the process is killed."""
    temporary, buffer = path.with_suffix(".tmp"), io.BytesIO()
    torch.save(content, buffer)  # to memory first: on a full disk torch.save itself ends in an obscure error
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_saved(path: str, flag: str, expected: dict) -> dict:
    """Read a checkpoint.pt or policy.pt without running any code in it; UserError without the `expected` entries."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{flag} {path}: not a readable file ({reason}); give one that a run wrote.") from None
    for key, value in (expected | {"format_version": FORMAT_VERSION}).items():
        found = content.get(key) if isinstance(content, dict) else None
        if found != value:
            raise UserError(f"{flag} {path}: its {key} is {found}, expected {value}; give a file of this script.")
    return content


def load_checkpoint(path: str, script: str, args_type) -> tuple:
    """A checkpoint.pt of this script and the settings in it; UserError where its settings are not today's."""
    saved, names = load_saved(path, "--resume", {"script": script}), {x.name for x in dataclasses.fields(args_type)}
    if not isinstance(saved.get("args"), dict) or saved["args"].keys() != names:
        raise UserError(f"--resume {path}: written by another version of this script; start a new run.")
    return saved, args_type(**saved["args"])


def save_checkpoint(path: Path, script: str, args, parts: dict, progress: dict) -> None:
    """Write everything that the run needs to go on as if it had not stopped."""
    content = {"format_version": FORMAT_VERSION, "script": script, "args": dataclasses.asdict(args)}
    for name, part in parts.items():
        content[name] = part.get_state() if isinstance(part, Generator) else part.state_dict()
    save_atomically(content | {"progress": progress}, path)


def restore(parts: dict, saved: dict, path: str) -> dict:
    """Give the parts of the run the states that a checkpoint holds; returns how far it had come."""
    try:
        for name, part in parts.items():
            part.set_state(saved[name]) if isinstance(part, Generator) else part.load_state_dict(saved[name])
        return saved["progress"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise UserError(f"--resume {path}: damaged, or written by another version; start a new run.") from None


class MetricsLogger:
    """Appends rows to metrics.csv and, with --track, to Weights & Biases. A resumed run drops the rows that were
    written after its checkpoint, so that the file has neither gap nor repeat."""

    def __init__(self, run_dir: Path, columns: list[str], args, saved: dict | None):
        path = run_dir / "metrics.csv"
        if saved and not (path.exists() and path.stat().st_size >= saved["offset"]):
            raise UserError(f"--resume: {path} is missing or shorter than the checkpoint says; keep the two together.")
        self.file = open(path, "a", newline="", buffering=1)  # a row is in the file once it is written
        self.writer, self.wandb = csv.DictWriter(self.file, columns), None
        if saved:
            self.file.truncate(saved["offset"])
        else:
            self.writer.writeheader()
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity or None, "name": run_dir.name}
            names |= {"id": saved["wandb_id"] if saved else None, "resume": "allow", "dir": str(run_dir)}
            try:
                self.wandb = wandb.init(**names, config=dataclasses.asdict(args))
            except Exception as error:  # W&B fails in many ways
                reason = str(error).splitlines()[0].rstrip(".")
                self.file.close()
                if not saved:
                    shutil.rmtree(run_dir)
                raise UserError(f"--track: {reason}; run `wandb login`, or set WANDB_MODE=offline.") from None
            self.wandb.define_metric("*", step_metric="global_step")

    def write(self, row: dict) -> None:
        self.writer.writerow(row)
        if self.wandb:
            self.wandb.log(row, step=row["global_step"])  # W&B ignores a step that it has already

    def state_dict(self) -> dict:
        return {"offset": os.fstat(self.file.fileno()).st_size, "wandb_id": self.wandb.id if self.wandb else ""}

    def close(self, summary: dict) -> None:
        self.file.close()
        if self.wandb:
            self.wandb.summary.update(summary)  # a resumed run's last row may be one that W&B ignores
            self.wandb.finish()


COLUMNS = """global_step charts/SPS charts/learning_rate bc/train_loss bc/val_loss
eval/return_mean eval/return_std eval/return_sampled_mean eval/vs_demos eval/vs_expert eval/fell_away
eval/slow_return_mean eval/slow_return_std eval/slow_vs_demos eval/slow_fell_away""".split()


def make_run_dir(args) -> Path:
    """Create <output-dir>/<run-name>/ with config.json in it."""
    name = args.run_name or f"{args.exp_name}__{args.env_id}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.output_dir) / name
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    except FileExistsError:
        raise UserError(f"--run-name {name}: {run_dir} exists already; choose another name or --resume it.") from None
    return run_dir


def stop_if_not_finite(row: dict, step: int, run_dir: Path) -> None:
    """End a diverged run with one sentence before it can overwrite its last good checkpoint."""
    bad = ", ".join(name for name, value in row.items() if not math.isfinite(value))
    if bad:
        kept = "keeps the last good checkpoint" if (run_dir / "checkpoint.pt").exists() else "has no checkpoint yet"
        raise UserError(f"training diverged at step {step} ({bad} not finite); {run_dir} {kept}; lower the step sizes.")


def print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print("\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in rows), ""]))


def read_curve(run_dir: Path, name: str) -> tuple[list[int], list[float]]:
    """(gradient steps, values) of a column of metrics.csv; the last row, of the final evaluation, is left out."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["charts/SPS"] and row[name]]
    return [int(row["global_step"]) for row in rows], [float(row[name]) for row in rows]


def new_figure(panels: int, width: float = 5.5, **options) -> tuple[Figure, list]:
    """A figure of panels side by side, and its axes."""
    figure = Figure(figsize=(width * panels, 4), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def plot_curves(run_dir: Path, loss_name: str, demos_mean: float, expert_mean: float) -> None:
    """curves.png: returns and losses over gradient steps, from metrics.csv."""
    figure, (left, right) = new_figure(2)
    val_loss = read_curve(run_dir, "bc/val_loss")
    left.plot(*read_curve(run_dir, "eval/return_mean"), label="policy", color="tab:blue", marker=".")
    left.plot(*read_curve(run_dir, "eval/slow_return_mean"), label="slow policy", color="tab:orange", marker=".")
    left.axhline(demos_mean, color="tab:red", linestyle="--", label="demonstrations")
    left.axhline(expert_mean, color="black", linestyle=":", label="expert (mean action)")
    left.set(xlabel="gradient steps", ylabel="true return, mean action, 20 episodes", title="Return")
    left.legend()
    right.plot(*read_curve(run_dir, "bc/train_loss"), label="training episodes", color="tab:blue", marker=".")
    if val_loss[0]:
        right.plot(*val_loss, label="validation episodes", color="tab:red", marker=".")
    label = {"mse": "mean squared error", "nll": "negative log-likelihood (nats)"}[loss_name]
    right.set(xlabel="gradient steps", ylabel=label, title="Loss", yscale="log" if loss_name == "mse" else "linear")
    right.legend(loc="upper right")
    figure.savefig(run_dir / "curves.png", dpi=120)


def plot_cumulative_returns(path: Path, played: list[tuple[str, np.ndarray]], demos_mean: float) -> None:
    """The return so far over the steps of an episode, a panel for each title's rewards (T, E), on the same axes: a thin
    line an episode, the mean of all episodes (an ended one keeps its return) in red."""
    figure, axes = new_figure(len(played), sharex=True, sharey=True)
    for ax, (title, rewards) in zip(axes, played):
        so_far = np.vstack([np.zeros(rewards.shape[1]), np.nancumsum(rewards, axis=0)])
        ended = np.vstack([np.zeros(rewards.shape[1], bool), np.isnan(rewards)])
        lines = ax.plot(np.where(ended, np.nan, so_far), color="tab:blue", linewidth=0.5, alpha=0.4)
        lines[0].set_label("an episode")
        ax.plot(so_far.mean(1), color="red", linewidth=2, label=f"mean of {rewards.shape[1]} episodes")
        if demos_mean > 0:
            ax.axhline(0.5 * demos_mean, color="grey", linestyle=":", label="half of the demonstrations' mean return")
        ax.set(xlabel="step of the episode", ylabel="return so far")
        ax.set_title(f"{title}\n{describe(so_far[-1], demos_mean)}", fontsize="medium")
        ax.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def short_name(path: str) -> str:
    """<run>/policy.pt, for a figure's title."""
    return "/".join(Path(path).absolute().parts[-2:])


def describe(returns: np.ndarray, demos_mean: float) -> str:
    """A policy's returns in words."""
    mean_std = f"{returns.mean():.0f} ± {returns.std():.0f}"
    if demos_mean <= 0:
        return mean_std
    return f"{mean_std}   ({returns.mean() / demos_mean:.1%}; {fell_away(returns, demos_mean):.1%} fell away)"


def record_gif(policy: dict, path: Path, seed: int) -> None:
    """A GIF of one episode with the mean action, rendered without a display."""
    import imageio

    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = gym.make(policy["env_id"], render_mode="rgb_array", max_episode_steps=policy["max_episode_steps"])
        obs, _ = env.reset(seed=seed)
        frames = [env.render()]
    except Exception as error:  # GL libraries fail in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        told = f"--capture-video: cannot render ({reason}); install libegl1 libgl1-mesa-dri or drop it."
        raise UserError(told) from None
    act, ended = load_any_actor(policy, env.action_space.low, env.action_space.high), False
    while not ended:
        obs, _, terminated, truncated, _ = env.step(act(obs, torch.zeros(env.action_space.shape)))
        frames.append(env.render())
        ended = terminated or truncated
    env.close()
    imageio.mimsave(path, [frame[::2, ::2] for frame in frames], duration=50, loop=0)


# Training


def train(args: Args, quiet: bool = False) -> dict:
    """One training, from start or checkpoint to its table, files and figures; returns summary.json's content."""
    torch.set_num_threads(1)  # minibatches this small run slower on more, and the study runs several trainings at once
    resume_path, saved = args.resume, None
    if resume_path:
        saved, args = load_checkpoint(resume_path, "bc", Args)
    args.check()
    device = torch.device("cuda" if args.cuda else "cpu")
    rng = np.random.default_rng(args.seed)
    demos = load_demos(args.demos, args.env_id, args.num_demos, rng, ("actions", "rewards"))
    max_episode_steps = demos.metadata["max_episode_steps"]
    envs = make_envs(args.env_id, 1, max_episode_steps, args.seed, 1)
    check_dimensions(demos, envs, args.demos)
    if args.loss == "mse" and not np.isfinite([envs.action_low, envs.action_high]).all():
        raise UserError(f"--loss mse ends in the action's bounds, and {args.env_id} has none; give --loss nll.")
    other = read_policy(args.compare_with, "--compare-with", args.env_id) if args.compare_with else None
    demos_mean, expert_mean = demos.returns.mean(), demos.metadata.get("expert_return_mean", math.nan)
    held_out = split_episodes(len(demos.lengths), args.val_fraction, rng)
    pairs = make_pairs(demos, held_out, envs, device)

    generator = Generator().manual_seed(args.seed)
    sizes = [envs.obs_dim, *[args.hidden_size] * args.hidden_layers, envs.action_dim]
    model = Cloner(sizes, envs, args.loss == "nll", generator).to(device)
    slow = copy.deepcopy(model).requires_grad_(False)
    groups = [{"params": model.net.parameters(), "weight_decay": args.weight_decay}]
    if model.log_std is not None:  # a decay to 0 would pull the standard deviation to 1
        groups.append({"params": [model.log_std], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    parts = {"model": model, "slow": slow, "optimizer": optimizer, "generator": generator}
    progress = {"step": 0, "seconds": 0.0, "evaluations": []}  # of (gradient step, mean return with the mean action)
    if saved:
        run_dir, progress = Path(resume_path).parent, restore(parts, saved, resume_path)
    else:
        run_dir = make_run_dir(args)
    logger = parts["logger"] = MetricsLogger(run_dir, COLUMNS, args, saved and saved["logger"])

    def export(module: Cloner) -> dict:
        return policy_to_save(module, pairs, args.env_id, max_episode_steps)

    def summarize(returns: np.ndarray, slow_returns: np.ndarray) -> dict:
        log = {}
        for prefix, x in (("eval/", returns), ("eval/slow_", slow_returns)):
            log |= {f"{prefix}return_mean": x.mean().item(), f"{prefix}return_std": x.std().item()}
            if demos_mean > 0:  # a share of nothing, or of a loss, says nothing
                log |= {f"{prefix}vs_demos": x.mean() / demos_mean, f"{prefix}fell_away": fell_away(x, demos_mean)}
        return log | ({"eval/vs_expert": returns.mean() / expert_mean} if expert_mean > 0 else {})

    bar = tqdm(total=args.gradient_steps, initial=progress["step"], unit="step", disable=True if quiet else None)
    ctrl_c = threading.Event() if quiet else watch_ctrl_c()  # the study answers Ctrl-C itself
    for first in range(progress["step"], args.gradient_steps, args.eval_interval):
        last = min(first + args.eval_interval, args.gradient_steps)
        clock = time.perf_counter()
        clone(model, slow, optimizer, pairs, args, first, last, generator)
        row = split_losses(model, pairs)
        progress["step"], progress["seconds"] = last, progress["seconds"] + time.perf_counter() - clock
        row |= {"global_step": last, "charts/SPS": int(last / progress["seconds"])}
        row |= {"charts/learning_rate": optimizer.param_groups[0]["lr"]}
        stop_if_not_finite(row, last, run_dir)
        seed, both = args.seed + 10_000, (export(model), export(slow))
        row |= summarize(*(returns_of_play(policy, 20, False, seed, args.threads) for policy in both))
        progress["evaluations"].append((last, row["eval/return_mean"]))
        bar.set_postfix_str(f"return {row['eval/return_mean']:.0f} (demonstrations {demos_mean:.0f})")
        logger.write(row)
        bar.update(last - first)
        save_checkpoint(run_dir / "checkpoint.pt", "bc", args, parts, progress)
        if ctrl_c.is_set():
            raise KeyboardInterrupt(f"stopped at step {last}; go on with --resume {run_dir}/checkpoint.pt")
    bar.close()
    if not quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    final, final_slow, seconds = export(model), export(slow), progress["seconds"]
    save_atomically(final, run_dir / "policy.pt")
    save_atomically(final_slow, run_dir / "policy_slow.pt")
    policies = [("behaviour cloning", final)] + ([(short_name(args.compare_with), other)] if other else [])
    returns, *others = compare_policies(policies, args, demos_mean, run_dir / "cumulative_return.png")
    slow_returns = returns_of_play(final_slow, args.eval_episodes, False, args.seed + 20_000, args.threads)
    rows = [("demonstrations", f"{demos_mean:.0f} ± {demos.returns.std():.0f}   ({len(demos.lengths)} episodes)")]
    rows += [("expert, mean action", f"{expert_mean:.0f}"), ("policy", describe(returns, demos_mean))]
    rows += [("slow policy", describe(slow_returns, demos_mean))]
    summary = summarize(returns, slow_returns)
    if args.loss == "nll":
        sampled = returns_of_play(final, args.eval_episodes, True, args.seed + 30_000, args.threads)
        summary["eval/return_sampled_mean"] = sampled.mean().item()
        rows.append(("policy, sampled", describe(sampled, demos_mean)))
    logger.write({"global_step": args.gradient_steps} | summary)
    logger.close(summary)
    best_step, best = max(progress["evaluations"], key=lambda pair: pair[1])
    summary |= split_losses(model, pairs) | {"best/return_mean": best, "best/step": best_step}
    summary |= {"demos_return_mean": demos_mean, "expert_return_mean": expert_mean}
    if args.loss == "nll" and demos_mean > 0:
        summary["eval/sampled_vs_demos"] = summary["eval/return_sampled_mean"] / demos_mean
    summary |= {"train_episodes": int((~held_out).sum()), "val_episodes": int(held_out.sum())}
    summary |= {"gradient_steps": args.gradient_steps, "seconds": seconds, "charts/SPS": args.gradient_steps / seconds}
    for x in others:
        summary |= {"compare/return_mean": x.mean().item(), "compare/return_std": x.std().item()}
        summary |= {"compare/fell_away": fell_away(x, demos_mean)} if demos_mean > 0 else {}
        rows.append((short_name(args.compare_with), describe(x, demos_mean)))
    summary = {name: x for name, x in summary.items() if math.isfinite(x)}  # a set may not tell its expert's return
    plot_curves(run_dir, args.loss, demos_mean, expert_mean)
    (run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(run_dir / "summary.tmp", run_dir / "summary.json")  # the study takes a run that has it for whole
    val_loss = f"{summary['bc/val_loss']:.4g}" if "bc/val_loss" in summary else "no episode held out"
    rows += [("loss", f"training {summary['bc/train_loss']:.4g}, validation {val_loss}")]
    rows += [("time", f"{seconds:.0f} s, {summary['charts/SPS']:,.0f} gradient steps/s, without evaluations")]
    if not quiet:
        print_table([*rows, ("results", str(run_dir))])
    if args.capture_video:
        record_gif(final, run_dir / "policy.gif", args.seed)
    return summary


def evaluate_saved(args: Args) -> dict:
    """--evaluate: returns of a saved policy of any kind, and of the one to --compare-with, as a table and a figure."""
    args.check()
    policy = read_policy(args.evaluate, "--evaluate")
    demos = load_demos(args.demos, policy["env_id"], 0, np.random.default_rng(), ("rewards",))
    policies = [(short_name(args.evaluate), policy)]
    if args.compare_with:
        other = read_policy(args.compare_with, "--compare-with", policy["env_id"])
        policies.append((short_name(args.compare_with), other))
    figure_path = Path(args.evaluate).with_name(f"{Path(args.evaluate).stem}_cumulative_return.png")
    demos_mean = demos.returns.mean()
    returns = compare_policies(policies, args, demos_mean, figure_path)
    summary = {title: describe(x, demos_mean) for (title, _), x in zip(policies, returns)}
    demos_line = f"{demos_mean:.0f} ± {demos.returns.std():.0f}   ({args.demos})"
    rows = [("demonstrations", demos_line), *summary.items(), ("episodes", f"{args.eval_episodes}, mean action")]
    print_table([*rows, ("figure", str(figure_path))])
    if args.capture_video:
        record_gif(policy, Path(args.evaluate).with_suffix(".gif"), args.seed)
    return summary


# The study

STUDY_COLUMNS = """level width seed eval/return_mean eval/return_std eval/vs_demos eval/vs_expert eval/fell_away
eval/slow_return_mean eval/slow_fell_away best/return_mean best/step bc/train_loss bc/val_loss demos_return_mean
expert_return_mean seconds""".split()


def study_cells(args: Args, folder: Path) -> list[tuple[str, Args]]:
    """(level, settings) of every run of the study, the longest first."""
    plan = [(level, width, k) for level in LEVELS for width in args.study_widths for k in range(args.study_seeds)]
    if args.study_wide:
        plan.append((WIDE_LEVEL, WIDE, 0))
    cells, no_study = [], {x.name: x.default for x in dataclasses.fields(Args) if x.name.startswith("study")}
    for level, width, k in sorted(dict.fromkeys(plan), key=lambda cell: -cell[1]):
        demos = str(Path(args.demos).with_name(f"{args.env_id.lower().replace('/', '-')}_sac_{level}.npz"))
        settings = {"demos": demos, "hidden_size": width, "seed": args.seed + k, "threads": 1}
        settings |= {"output_dir": str(folder), "run_name": cell_name(level, width, args.seed + k)}
        cells.append((level, dataclasses.replace(args, **no_study, **settings)))
    return cells


def cell_name(level: str, width: int, seed: int) -> str:
    return f"{level}__width-{width}__seed-{seed}"


def run_cell(cell: tuple[str, Args]) -> dict:
    """A row of study.csv: of the run's summary if it has ended before, else of a run from the start."""
    level, args = cell
    run_dir = Path(args.output_dir) / args.run_name
    if (run_dir / "summary.json").exists():
        summary = json.loads((run_dir / "summary.json").read_text())
    else:
        shutil.rmtree(run_dir, ignore_errors=True)  # it was interrupted
        summary = train(args, quiet=True)
    return {"level": level, "width": args.hidden_size, "seed": args.seed} | summary


def run_cells(cells: list[tuple[str, Args]], workers: int) -> typing.Iterator[dict]:
    """The rows of all cells, as they are done."""
    if workers == 1:
        yield from map(run_cell, cells)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process in which torch has threads may hang
    with context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # leaving it ends the workers
        yield from pool.imap_unordered(run_cell, cells)


def study(args: Args) -> list[dict]:
    """--study: every run that has not ended yet, then study.csv, tables and figures; returns the CSV's rows."""
    args.check()
    folder = Path(args.output_dir) / (args.run_name or f"{args.exp_name}_study")
    cells, rows = study_cells(args, folder), []
    for _, cell in cells:  # refused before the first run, not after an hour
        load_demos(cell.demos, cell.env_id, cell.num_demos, np.random.default_rng(), ("actions", "rewards"))
        config = folder / cell.run_name / "config.json"
        if config.exists() and json.loads(config.read_text()) != json.loads(json.dumps(dataclasses.asdict(cell))):
            raise UserError(f"--run-name {folder.name}: {config} has other settings; choose another name or the same.")
    try:
        with tqdm(total=len(cells), unit="run", disable=None) as progress:
            for row in run_cells(cells, args.study_workers or len(os.sched_getaffinity(0))):
                rows.append(row)
                progress.set_postfix_str(f"{row['level']}, width {row['width']}: {row['eval/return_mean']:.0f}")
                progress.update(1)
    except KeyboardInterrupt:
        message = f"interrupted; {folder} keeps the {len(rows)} runs that ended, and the same command goes on."
        raise KeyboardInterrupt(message) from None
    finally:  # what is done lands in the CSV however the study ends
        rows.sort(key=lambda row: (LEVELS.index(row["level"]), row["width"], row["seed"]))
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "study.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, STUDY_COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    print_study(rows)
    plot_study(folder, rows)
    print(f"  results: {folder}\n")
    return rows


def cells_of(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def print_grid(rows: list[list[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    print("\n".join(["", *("  " + "   ".join(f"{c:<{w}}" for c, w in zip(row, widths)) for row in rows), ""]))


def print_study(rows: list[dict]) -> None:
    """Two tables: returns by set and width, and what width does on stochastic-one."""

    def mean(cells: list[dict], name: str) -> float:
        return float(np.mean([row.get(name, math.nan) for row in cells])) if cells else math.nan

    def span(cells: list[dict], name: str) -> str:
        values = [row[name] for row in cells]
        return f"{np.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})" if values else "-"

    widths = sorted({row["width"] for row in rows})
    grid = [["return, mean (range) of the seeds", "demonstrations", *(f"width {width}" for width in widths)]]
    for level in LEVELS:
        cells = [cells_of(rows, level=level, width=width) for width in widths]
        demos = f"{mean(cells_of(rows, level=level), 'demos_return_mean'):.0f}"
        grid.append([level, demos, *(span(x, "eval/return_mean") for x in cells)])
    print_grid(grid)
    grid = [[f"on {WIDE_LEVEL}", "policy", "slow policy", "fell away", "train loss", "val loss", "seconds"]]
    for width in widths:
        cells = cells_of(rows, level=WIDE_LEVEL, width=width)
        grid.append([f"width {width}", span(cells, "eval/return_mean"), span(cells, "eval/slow_return_mean")])
        grid[-1].append(f"{mean(cells, 'eval/fell_away'):.1%}")
        grid[-1] += [f"{mean(cells, name):.3g}" for name in ("bc/train_loss", "bc/val_loss", "seconds")]
    print_grid(grid)


def plot_study(folder: Path, rows: list[dict]) -> None:
    """Learning curves, mean and range of the seeds: sets.png by set at one width (64 if it is there), widths.png by
    width on stochastic-one."""
    widths = sorted({row["width"] for row in rows})
    one = 64 if 64 in widths else widths[0]
    by_set = {level: cells_of(rows, level=level, width=one) for level in LEVELS}
    by_width = {f"width {width}": cells_of(rows, level=WIDE_LEVEL, width=width) for width in widths}
    figures = [("sets.png", f"Five sets, width {one}", by_set), ("widths.png", f"Widths, on {WIDE_LEVEL}", by_width)]
    for name, title, groups in figures:
        figure, (ax,) = new_figure(1, width=9)
        for label, cells in groups.items():
            if not cells:
                continue
            runs = [folder / cell_name(row["level"], row["width"], row["seed"]) for row in cells]
            curves = [read_curve(run_dir, "eval/return_mean") for run_dir in runs]
            steps, values = curves[0][0], np.array([curve[1] for curve in curves])
            if groups is by_set:
                label += f" (demonstrations: {cells[0]['demos_return_mean']:.0f})"
            (line,) = ax.plot(steps, values.mean(0), label=label, marker=".")
            ax.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        ax.axhline(
            rows[0].get("expert_return_mean", math.nan), color="black", linestyle=":", label="expert (mean action)"
        )
        ax.set(xlabel="gradient steps", ylabel="true return, mean action, 20 episodes")
        ax.set_title(f"{title} (mean and range of the seeds)")
        figure.legend(loc="outside right center")
        figure.savefig(folder / name, dpi=120)


def watch_ctrl_c() -> threading.Event:
    """From now on the first Ctrl-C sets the event that is returned, so that a training loop can save a checkpoint and
    leave; the second one interrupts at once."""
    pressed = threading.Event()

    def note(*_) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nCtrl-C: one moment, for a checkpoint; press it again to leave at once.", file=sys.stderr)

    signal.signal(signal.SIGINT, note)
    return pressed


def run_command(argv: list[str], args_type, command: typing.Callable) -> None:
    """command(parsed argv); one sentence and exit code 2 after a user's mistake or where a file cannot be written, 130
    after Ctrl-C."""
    try:
        return command(parse_args(argv, args_type))
    except UserError as error:
        sentence, code = f"error: {error}", 2
    except OSError as error:
        reason = f"{error.filename or 'a file of the run'}: {error.strerror or error}"
        sentence, code = f"error: {reason}; give a folder with room and access; checkpoints are whole, for --resume.", 2
    except KeyboardInterrupt as interrupt:
        sentence, code = str(interrupt) or "interrupted", 130
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    print(sentence, file=sys.stderr)
    sys.exit(code)


def main(argv: list[str]) -> None:
    """Command line in, exit code out."""
    run_command(
        argv, Args, lambda args: study(args) if args.study else evaluate_saved(args) if args.evaluate else train(args)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
