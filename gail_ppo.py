"""GAIL + PPO: imitate a demonstrator from (state, action) pairs, complete in one file.

Generative Adversarial Imitation Learning (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476). A discriminator D(s, a)
learns to tell the demonstrations from the policy's own transitions (equation 17); the policy is trained by
reinforcement learning, here PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), to be mistaken for the
demonstrator:

    repeat:  collect a rollout -> update D -> reward = how much D takes a step for the expert's -> GAE -> PPO update

Where this departs from the papers, and why:

 1. D outputs the probability of *expert* (in the paper: of policy), so that a higher output is a higher reward.
 2. The reward is -log(1 - D) by default; `--reward-form` offers log D - log(1 - D) and log D. All three are computed
    from the logit, so that they stay finite when D saturates.
 3. PPO instead of TRPO: simpler, and faster per step. `toy_pointnav.py` has TRPO.
 4. The discriminator has a gradient penalty (Gulrajani et al. 2017, equation 3), which keeps D smooth enough to climb.
 5. Rewards are normalized by a running mean and standard deviation, so that PPO sees one scale while D drifts. In tasks
    that can end early, subtracting the mean changes what is optimal: use `--no-center-reward` there.
 6. Observations are standardized with the demonstrations' statistics, for D, policy and value alike. They never change,
    so there is nothing to freeze for an evaluation and nothing to get out of step.
 7. D sees the action that was executed (clipped to the bounds), never the raw sample: otherwise |a| > 1 gives the
    policy away. A time limit is a truncation: the value of the true final observation is bootstrapped.
 8. The policy's standard deviation depends on the state, as the demonstrator's does; otherwise D may tell the two apart
    by their noise. All layers are SiLU. With one deviation a run ends at 95 to 96% of the demonstrations instead of 99
    to 100%; with tanh layers besides it ends there too, but takes 0.65M steps to 90% instead of 0.45M to 0.60M
    (gail_tuning.csv in benchmark/results: one or two seeds each, before the other settings were fitted to it).

Commands (two CPU cores):

    python gail_ppo.py                                      # GAIL on stochastic-one: 80 seconds
    python gail_ppo.py --num-demos 1                        # from one episode of 100 steps
    python gail_ppo.py --reward-source combined             # env reward + GAIL reward, each normalized
    python gail_ppo.py --reward-source env                  # PPO alone (the demonstrations standardize what it sees)
    python gail_ppo.py --evaluate runs/<run>/policy.pt      # 100 episodes with the mean action, 100 sampled
    python gail_ppo.py --resume runs/<run>/checkpoint.pt    # go on where a killed run stopped, bit for bit
    torchrun --standalone --nproc-per-node 2 gail_ppo.py    # two processes; README

A resumed run equals the uninterrupted one bit for bit on the CPU with HalfCheetah-v4, at the same number of threads.
Other environments cannot be saved: there a resumed run begins new episodes.

The algorithm is "Networks" to "The training loop's named steps" and `train`; the rest (demonstrations, environments,
processes, files) is plumbing, to the letter the same in every script that needs it.
"""

import csv
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import typing
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode
from matplotlib.figure import Figure
from mujoco.batch import Batch
from torch import Generator, Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

FORMAT_VERSION = 1
REWARD_WINDOW = 10  # rollouts that the running mean and deviation of a reward are taken over
OBS_CLIP = 10.0  # standardized observations are clipped to [-OBS_CLIP, OBS_CLIP]
INITIAL_LOG_STD, LOG_STD_MIN, LOG_STD_MAX = -0.5, -5.0, 2.0  # of the policy's Gaussian


@dataclass
class Args:
    exp_name: str = "gail_ppo"  # name of the experiment, the first part of the run's name
    seed: int = 1  # seed of everything random: networks, environments, minibatches, choice of demonstrations
    env_id: str = "HalfCheetah-v4"  # environment id; must be the one the demonstrations come from
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"  # demonstration set (.npz, see data/README.md)
    num_demos: int = 0  # use this many demonstrated episodes, drawn by the seed (0: all)
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: <exp-name>__<env-id>__<seed>__<time>)
    resume: str = ""  # checkpoint.pt of a run to go on with; settings come from it, so give no other flag
    evaluate: str = ""  # policy.pt to evaluate instead of training
    eval_interval: int = 50_000  # env steps between evaluations (20 episodes with the mean action)
    eval_episodes: int = 100  # episodes of the final evaluation, with the mean action and again with sampled ones
    checkpoint_interval: int = 100_000  # env steps between checkpoints
    capture_video: bool = False  # write a GIF of one episode at the end
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works without an account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    wandb_entity: str = ""  # Weights & Biases team (default: yours)
    cuda: bool = False  # run the networks on the GPU; for networks this small the CPU is faster
    threads: int = 0  # threads that step the physics, two of them for the networks as well (0: one a core)

    total_timesteps: int = 1_000_000  # environment steps of the whole run
    num_envs: int = 32  # parallel environments (N)
    num_steps: int = 100  # steps per environment and rollout (T)
    learning_rate: float = 2e-3  # Adam step size of policy and value
    anneal_lr: bool = True  # let that step size fall linearly to zero over the run
    gamma: float = 0.97  # discount factor
    gae_lambda: float = 0.9  # lambda of generalized advantage estimation
    num_minibatches: int = 5  # minibatches per epoch of the PPO update
    update_epochs: int = 8  # epochs of the PPO update over each rollout
    norm_adv: bool = True  # normalize advantages in each minibatch
    clip_coef: float = 0.2  # clipping of the probability ratio
    clip_vloss: bool = False  # clip the value's change as well
    ent_coef: float = 0.0  # weight of the policy's entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient norm at which PPO's gradients are cut
    target_kl: float = 0.0  # leave out the rest of a rollout's epochs once the approximate KL exceeds this (0: never)
    hidden_size: int = 128  # width of the two hidden layers of policy and value

    reward_source: Literal["gail", "env", "combined"] = "gail"
    """what PPO maximizes: the discriminator's reward, the environment's, or the sum of both, each normalized"""
    reward_form: Literal["softplus", "logit", "logsigmoid"] = "softplus"
    """GAIL reward: -log(1-D) = softplus(logit), log D - log(1-D) = logit, log D = logsigmoid(logit)"""
    normalize_reward: bool = True  # divide the reward by its running standard deviation and subtract its running mean
    center_reward: bool = True  # subtract the mean when normalizing; turn off where episodes can end early

    disc_loss: Literal["bce", "wgan"] = "bce"
    """discriminator loss: binary cross-entropy, or Wasserstein (reward: the raw score; wants --grad-penalty-coef 10)"""
    disc_learning_rate: float = 1e-3  # Adam step size of the discriminator
    disc_steps: int = 10  # minibatch steps of the discriminator per rollout
    disc_batch_size: int = 512  # expert transitions, and as many of the policy's, in a discriminator minibatch
    disc_hidden_size: int = 128  # width of the two hidden layers of the discriminator
    disc_interval: int = 1
    """update the discriminator after every this many rollouts (generator steps per discriminator round)"""
    grad_penalty_coef: float = 0.3  # weight of the discriminator's gradient penalty
    disc_ent_coef: float = 0.0  # weight of the entropy bonus on the discriminator's output
    spectral_norm: bool = False  # spectral normalization of the discriminator's layers

    bc_warm_start: bool = False  # start from a behaviour-cloned policy instead of a random one
    burn_in_steps: int = 0
    """discriminator steps on the first rollout, before the policy may change; useful with --bc-warm-start"""

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        require_range(self, ["gamma", "gae_lambda"], "between 0 and 1", lambda x: 0 <= x <= 1)
        may_be_zero = "num_demos threads gamma gae_lambda ent_coef vf_coef target_kl grad_penalty_coef disc_ent_coef"
        check_numbers(self, f"{may_be_zero} burn_in_steps")
        rollout = self.num_envs * self.num_steps
        expected = f"of at most {rollout // 2}, half of a rollout (num-envs x num-steps)"
        require_range(self, ["num_minibatches"], expected, lambda x: 2 * x <= rollout)
        expected = f"of {rollout} or more, one rollout (num-envs x num-steps)"
        require_range(self, ["total_timesteps"], expected, lambda x: x >= rollout)
        if self.cuda and not torch.cuda.is_available():
            raise UserError("--cuda was given, but PyTorch sees no GPU; leave it out or install a CUDA build of torch.")
        if self.disc_loss == "wgan" and self.reward_form != "softplus":
            raise UserError("--reward-form is for --disc-loss bce; WGAN's reward is its raw score; drop one of them.")
        if self.burn_in_steps and self.reward_source == "env":
            raise UserError("--burn-in-steps trains the discriminator, but --reward-source env has none; drop one.")
        if self.reward_source == "combined" and not self.normalize_reward:
            raise UserError("--reward-source combined adds normalized rewards; drop it or --no-normalize-reward.")


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


class Agent(nn.Module):
    """Gaussian policy and value function. Both read standardized observations (..., O)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int, generator: Generator):
        super().__init__()
        self.actor = mlp([obs_dim, hidden_size, hidden_size, 2 * action_dim], nn.SiLU, 0.01, generator)
        self.critic = mlp([obs_dim, hidden_size, hidden_size, 1], nn.SiLU, 1.0, generator)
        self.actor[-1].bias.data[action_dim:] = INITIAL_LOG_STD

    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the action, (..., A) each."""
        mean, log_std = self.actor(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(action; mean, exp(log_std)^2), summed over the last axis: (..., A) -> (...)."""
    z = (action - mean) * torch.exp(-log_std)
    return -0.5 * z.square().sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * action.shape[-1]


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of a diagonal Gaussian: (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class Discriminator(nn.Module):
    """Logit of 'this is the expert's': (B, X) standardized input -> (B,). Under WGAN it is the critic's score."""

    def __init__(self, input_dim: int, hidden_size: int, spectral_norm: bool, generator: Generator):
        super().__init__()
        self.net = mlp([input_dim, hidden_size, hidden_size, 1], nn.SiLU, 1.0, generator)
        for i in range(0, len(self.net), 2) if spectral_norm else ():  # the linear layers
            self.net[i] = nn.utils.parametrizations.spectral_norm(self.net[i])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


# The algorithm, as pure functions


def standardize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std, clipped to [-OBS_CLIP, OBS_CLIP]."""
    return ((x - mean) / std).clamp(-OBS_CLIP, OBS_CLIP)


def gradient_penalty(disc: nn.Module, expert: Tensor, policy: Tensor, mix: Tensor) -> Tensor:
    """Mean of (|dD/dx| - 1)^2 at x = mix * expert + (1 - mix) * policy (Gulrajani et al. 2017, eq. 3), with one mix
    and one norm for each of the B inputs, whatever their shape."""
    x = (mix * expert + (1 - mix) * policy).requires_grad_(True)
    (grad,) = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=-1) - 1).square().mean()


def discriminator_loss(expert_logit: Tensor, policy_logit: Tensor, kind: str, ent_coef: float) -> tuple[Tensor, Tensor]:
    """Loss to minimize (before the gradient penalty) and mean entropy of D's output in nats.

    bce:  -E_expert[log D] - E_policy[log(1 - D)], D = sigmoid(logit); 2 log 2 when D cannot tell (Ho & Ermon, eq. 17).
    wgan: E_policy[score] - E_expert[score]; sigmoid(score) is then only an indicator of which side a score falls.
    """
    loss = policy_logit.mean() - expert_logit.mean()
    if kind == "bce":
        loss = F.softplus(-expert_logit).mean() + F.softplus(policy_logit).mean()
    logits = torch.cat([expert_logit, policy_logit])
    entropy = (F.softplus(logits) - torch.sigmoid(logits) * logits).mean()  # of a Bernoulli, from its logit
    return loss - ent_coef * entropy, entropy


def imitation_reward(logit: Tensor, form: str) -> Tensor:
    """GAIL reward of any shape from D's logit. softplus >= 0 pays for staying alive, logsigmoid <= 0 for an early end,
    logit (AIRL's form, Fu et al. 2018) for either: with a fixed horizon the choice is harmless, otherwise not."""
    if form == "softplus":
        return F.softplus(logit)  # -log(1 - D)
    return logit if form == "logit" else F.logsigmoid(logit)  # log D - log(1 - D), or log D


class RewardNormalizer:
    """Normalizes rewards by the mean and standard deviation of all rewards of the last `window` rollouts."""

    def __init__(self, window: int | None = REWARD_WINDOW):
        self.moments: deque[tuple[float, float]] = deque(maxlen=window)  # (mean, mean square) of each rollout

    def update(self, rewards: Tensor) -> None:
        rewards = rewards.double()  # a mean of squares minus a squared mean loses float32's digits
        self.moments.append((rewards.mean().item(), rewards.square().mean().item()))

    def normalize(self, rewards: Tensor, center: bool) -> Tensor:
        mean, square = np.mean(self.moments, axis=0).tolist()
        std = math.sqrt(max(square - mean**2, 0.0))
        return (rewards - mean * center) / max(std, 1e-3)  # a constant reward must not become a huge one

    def state_dict(self) -> dict:
        return {"moments": list(self.moments)}

    def load_state_dict(self, saved: dict) -> None:
        self.moments.extend(saved["moments"])


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16); everything (T, N).

    next_values are V of the true next observations, so a truncated step bootstraps from where its episode stopped and
    only a terminated one from nothing; `ended` (terminated or truncated) keeps the sum within its episode.
    Returns advantages and returns (advantages + values).
    """
    deltas = rewards + gamma * next_values * (1 - terminated.to(values.dtype)) - values
    decay = gamma * lam * (1 - ended.to(values.dtype))
    advantages, running = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        running = deltas[t] + decay[t] * running
        advantages[t] = running
    return advantages, advantages + values


def ppo_policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Clipped surrogate (Schulman et al. 2017, eq. 7), to minimize: (B,), (B,) -> ()."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def ppo_value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the squared error, (B,) -> (); with clip_coef, the larger of it and that of the value cut near old_value."""
    loss = (value - returns).square()
    if clip_coef is not None:
        clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        loss = torch.maximum(loss, (clipped - returns).square())
    return 0.5 * loss.mean()


# The training loop's named steps


@dataclass
class Rollout:
    """T steps of N environments. Observations are standardized; `next_obs` is the true one, before any reset."""

    obs: Tensor  # (T, N, O)
    next_obs: Tensor  # (T, N, O)
    actions: Tensor  # (T, N, A) as sampled: what PPO's ratio is about
    executed_actions: Tensor  # (T, N, A) as clipped to the bounds: what the world, and D, saw
    log_probs: Tensor  # (T, N)
    env_rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N) bool
    ended: Tensor  # (T, N) bool, terminated or truncated


class Collector:
    """Steps the environments with the policy and keeps what lasts from one rollout to the next."""

    def __init__(self, envs, obs_mean: Tensor, obs_std: Tensor, device: torch.device):
        self.envs, self.obs_mean, self.obs_std, self.device = envs, obs_mean, obs_std, device
        self.obs = envs.reset()  # (N, O) float64
        self.episode_return, self.episode_length = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)
        self.finished: deque[tuple[float, int]] = deque(maxlen=100)  # (return, length) of the latest episodes

    def standardized(self, obs: np.ndarray) -> Tensor:
        return standardize(torch.from_numpy(obs).float().to(self.device), self.obs_mean, self.obs_std)

    @torch.no_grad()
    def rollout(self, agent: Agent, num_steps: int, generator: Generator) -> Rollout:
        """Sample num_steps actions in every environment."""
        envs, steps = self.envs, []
        noise = torch.randn((num_steps, envs.num_envs, envs.action_dim), generator=generator).to(self.device)
        for t in range(num_steps):
            obs = self.standardized(self.obs)
            mean, log_std = agent.policy(obs)
            action = mean + log_std.exp() * noise[t]
            executed = np.clip(action.cpu().numpy(), envs.action_low, envs.action_high)
            self.obs, reward, terminated, truncated, final_obs = envs.step(executed)
            ended = terminated | truncated
            steps.append((obs, action, mean, log_std, executed, reward, terminated, ended, final_obs))
            self.episode_return += reward
            self.episode_length += 1
            self.finished.extend(zip(self.episode_return[ended].tolist(), self.episode_length[ended].tolist()))
            self.episode_return[ended], self.episode_length[ended] = 0.0, 0
        columns = list(zip(*steps))
        obs, action, mean, log_std = (torch.stack(column) for column in columns[:4])
        executed, reward, terminated, ended = (torch.from_numpy(np.stack(x)).to(self.device) for x in columns[4:8])
        next_obs, log_prob = self.standardized(np.stack(columns[8])), gaussian_log_prob(action, mean, log_std)
        return Rollout(obs, next_obs, action, executed.float(), log_prob, reward.float(), terminated, ended)

    def state_dict(self) -> dict:
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ("obs", "episode_return", "episode_length")}
        return arrays | {"finished": list(self.finished), "envs": self.envs.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        self.finished.extend(saved["finished"])
        if saved["envs"]:  # otherwise the environments could not be saved: keep the fresh episodes
            self.envs.load_state_dict(saved["envs"])
            for name in ("obs", "episode_return", "episode_length"):
                setattr(self, name, saved[name].numpy())


def update_discriminator(
    disc: nn.Module, optimizer: Optimizer, expert: Tensor, policy: Tensor, args: Args, steps: int, generator: Generator
) -> dict[str, float]:
    """Minibatch steps on the expert's inputs (L, ...) and the policy's (B, ...); returns the means of what to log."""
    log, size, device = [], args.disc_batch_size, expert.device
    for _ in range(steps):
        expert_x = expert[torch.randint(len(expert), (size,), generator=generator).to(device)]
        policy_x = policy[torch.randint(len(policy), (size,), generator=generator).to(device)]
        expert_logit, policy_logit = disc(torch.cat([expert_x, policy_x])).split(size)
        loss, entropy = discriminator_loss(expert_logit, policy_logit, args.disc_loss, args.disc_ent_coef)
        penalty = torch.zeros((), device=device)
        if args.grad_penalty_coef > 0:
            mix = torch.rand((size, *[1] * (expert.ndim - 1)), generator=generator).to(device)
            penalty = gradient_penalty(disc, expert_x, policy_x, mix)
        optimizer.zero_grad()
        (loss + args.grad_penalty_coef * penalty).backward()
        optimizer.step()
        with torch.no_grad():
            probs = [torch.sigmoid(expert_logit).mean(), torch.sigmoid(policy_logit).mean()]
            accuracies = [(expert_logit > 0).float().mean(), (policy_logit < 0).float().mean()]
            log.append(torch.stack([loss, *probs, *accuracies, penalty, entropy]))
    names = ("loss", "expert_prob", "policy_prob", "expert_acc", "policy_acc", "grad_penalty", "entropy")
    return {f"disc/{name}": value for name, value in zip(names, torch.stack(log).mean(0).tolist())}


def compute_rewards(
    rollout: Rollout, logit: Tensor | None, normalizers: dict[str, RewardNormalizer], args: Args
) -> tuple[Tensor, dict[str, float]]:
    """The (T, N) reward that PPO maximizes, and what to log. logit (T, N) is D's, None with --reward-source env."""
    sources = {"env": rollout.env_rewards}
    log = {"reward/env_mean": rollout.env_rewards.mean().item()}
    if logit is not None:
        sources["gail"] = logit if args.disc_loss == "wgan" else imitation_reward(logit, args.reward_form)
        log |= {"reward/gail_mean": sources["gail"].mean().item(), "reward/gail_std": sources["gail"].std().item()}
    total = torch.zeros_like(rollout.env_rewards)
    for name in ("env", "gail") if args.reward_source == "combined" else (args.reward_source,):
        normalizers[name].update(everyones(sources[name]))
        normalized = normalizers[name].normalize(sources[name], args.center_reward)
        total += normalized if args.normalize_reward else sources[name]
    return total, log | {"reward/total_mean": total.mean().item()}


def update_policy(
    agent: Agent, optimizer: Optimizer, rollout: Rollout, rewards: Tensor, args: Args, generator: Generator
) -> dict[str, float]:
    """PPO: several epochs of minibatches over one rollout; returns the means of what to log."""
    with torch.no_grad():
        values, next_values = agent.critic(rollout.obs).squeeze(-1), agent.critic(rollout.next_obs).squeeze(-1)
        ends = (rollout.terminated, rollout.ended)
        advantages, returns = compute_gae(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
        explained_variance = 1 - (returns - values).var() / (returns.var() + 1e-8)
    flat = [x.flatten(0, 1) for x in (rollout.obs, rollout.actions, rollout.log_probs, advantages, values, returns)]
    parameters, log = list(agent.parameters()), []
    for _ in range(args.update_epochs):
        order = torch.randperm(len(flat[0]), generator=generator).to(rewards.device)
        for minibatch in order.tensor_split(args.num_minibatches):
            obs, action, old_log_prob, advantage, old_value, target = (x[minibatch] for x in flat)
            mean, log_std = agent.policy(obs)
            log_ratio = gaussian_log_prob(action, mean, log_std) - old_log_prob
            if args.norm_adv:
                whole = everyones(advantage)
                advantage = (advantage - whole.mean()) / (whole.std() + 1e-8)
            policy_loss = ppo_policy_loss(log_ratio, advantage, args.clip_coef)
            value_clip = args.clip_coef if args.clip_vloss else None
            value_loss = ppo_value_loss(agent.critic(obs).squeeze(-1), old_value, target, value_clip)
            entropy = gaussian_entropy(log_std).mean()
            optimizer.zero_grad()
            (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
            average_gradients(optimizer)
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                approx_kl = (log_ratio.exp() - 1 - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html, k3
                clipfrac = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
                log.append(torch.stack([policy_loss, value_loss, entropy, approx_kl, clipfrac]))
        if args.target_kl > 0 and everyones(approx_kl[None]).mean() > args.target_kl:
            break
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
    means = dict(zip(names, torch.stack(log).mean(0).tolist())) | {"explained_variance": explained_variance.item()}
    return {f"losses/{name}": value for name, value in means.items()}


def clone_behaviour(agent: Agent, obs: Tensor, actions: Tensor, generator: Generator) -> None:
    """Warm start: fit the policy's mean to the demonstrated actions, (L, O) -> (L, A), by mean squared error."""
    optimizer = Adam(agent.actor.parameters(), lr=1e-3, fused=True)
    for _ in range(2000):
        index = torch.randint(len(obs), (256,), generator=generator).to(obs.device)
        loss = F.mse_loss(agent.policy(obs[index])[0], actions[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# Evaluation


def load_actor(policy: dict) -> typing.Callable[[np.ndarray], tuple[Tensor, Tensor]]:
    """Mean and log standard deviation of the action, (B, A) each, as a function of raw observations (B, O), from the
    content of a "gaussian" policy.pt."""
    actor = mlp(policy["sizes"], {"silu": nn.SiLU, "relu": nn.ReLU}[policy["activation"]], 0.01, Generator())
    actor.load_state_dict(policy["weights"])

    @torch.inference_mode()
    def act(obs: np.ndarray) -> tuple[Tensor, Tensor]:
        x = (torch.as_tensor(obs, dtype=torch.float32) - policy["obs_mean"]) / policy["obs_std"]
        x = x.clamp(-policy["obs_clip"], policy["obs_clip"])
        mean, log_std = actor(x).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    return act


def evaluate(policy: dict, episodes: int, sampled: bool, seed: int, threads: int = 0) -> np.ndarray:
    """True returns (episodes,) of fresh episodes, with the mean action or sampled ones.

    policy is the content of a policy.pt; environments and random numbers are the evaluation's own.
    """
    envs = make_envs(policy["env_id"], episodes, policy["max_episode_steps"], seed, threads)
    act, generator = load_actor(policy), Generator().manual_seed(seed)
    obs = envs.reset()
    returns, running = np.zeros(episodes), np.ones(episodes, bool)
    while running.any():
        mean, log_std = act(obs)
        action = mean + sampled * log_std.exp() * torch.randn(mean.shape, generator=generator)
        obs, reward, terminated, truncated, _ = envs.step(np.clip(action.numpy(), envs.action_low, envs.action_high))
        returns += reward * running
        running &= ~(terminated | truncated)
    return returns


def export_policy(agent: Agent, obs_mean, obs_std, env_id: str, max_episode_steps: int) -> dict:
    """The content of policy.pt, which bc.py, gail_ppo.py and gail_state_seq.py can read."""
    weights = {name: w.detach().cpu().clone() for name, w in agent.actor.state_dict().items()}
    sizes = [agent.actor[0].in_features, *(x.out_features for x in agent.actor if isinstance(x, nn.Linear))]
    # gaussian: layers to mean and log standard deviation of an action that is then clipped to the bounds
    policy = {"format_version": FORMAT_VERSION, "kind": "gaussian", "activation": "silu", "env_id": env_id}
    policy |= {"sizes": sizes, "weights": weights, "obs_mean": obs_mean.cpu(), "obs_std": obs_std.cpu()}
    return policy | {"obs_clip": OBS_CLIP, "max_episode_steps": max_episode_steps}


# Several processes: `torchrun --nproc-per-node W` starts W of these, which share environments and minibatches

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(cuda: bool) -> torch.device:
    """Connect the processes that torchrun started, over NCCL on GPUs and gloo on CPUs; returns this one's device."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda and device.index >= torch.cuda.device_count():
        raise UserError(f"--cuda: one process a GPU, but here are {torch.cuda.device_count()} GPUs; start as many.")
    if WORLD_SIZE > 1 and not dist.is_initialized():
        torch.cuda.set_device(device) if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def gather(value) -> list:
    """The value that each process has, in the order of their ranks."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def everyones(x: Tensor) -> Tensor:
    """The (B, ...) tensors of all processes, one after the other: (W * B, ...)."""
    if WORLD_SIZE == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def average_gradients(optimizer: Optimizer, *_) -> None:
    """Give every process the mean of all processes' gradients, so that their networks stay the same to the bit. What
    has no gradient in any process keeps none."""
    if WORLD_SIZE == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    total = torch.cat([*gradients, there])
    dist.all_reduce(total)
    *sums, there = total.split([*(p.numel() for p in parameters), len(parameters)])
    for p, gradient, count in zip(parameters, sums, there.tolist()):
        p.grad = torch.empty_like(p).copy_(gradient.view(p.shape) / WORLD_SIZE) if count else None  # in p's layout


class PerProcess:
    """The parts of a run that each process has its own of. A checkpoint holds those of all."""

    def __init__(self, parts: dict):
        self.parts = parts

    def state_dict(self) -> dict:
        """To be called by all processes at once."""
        states = [
            part.get_state() if isinstance(part, Generator) else part.state_dict() for part in self.parts.values()
        ]
        return {"processes": gather(dict(zip(self.parts, states)))}

    def load_state_dict(self, saved: dict) -> None:
        if len(saved["processes"]) != WORLD_SIZE:
            before = len(saved["processes"])
            raise UserError(f"--resume: {before} processes wrote it, here are {WORLD_SIZE}; start as many by torchrun.")
        for name, part in self.parts.items():
            state = saved["processes"][RANK][name]
            part.set_state(state) if isinstance(part, Generator) else part.load_state_dict(state)


def share_of(args, names: list[str]):
    """The settings of one process: its share of the named numbers, and of the machine's cores without --threads."""
    for name in names:
        value = getattr(args, name)
        if value % WORLD_SIZE:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}, but {WORLD_SIZE} processes divide it; give a multiple of that.")
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shares = {name: getattr(args, name) // WORLD_SIZE for name in names}
    return dataclasses.replace(args, threads=args.threads or max(1, cores), **shares)


def mean_row(rows: typing.Iterable[dict]) -> dict[str, float]:
    """Means of what the processes log."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


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


COLUMNS = """global_step charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate
losses/policy_loss losses/value_loss losses/entropy losses/approx_kl losses/clipfrac losses/explained_variance
disc/loss disc/expert_prob disc/policy_prob disc/expert_acc disc/policy_acc disc/grad_penalty disc/entropy
reward/env_mean reward/gail_mean reward/gail_std reward/total_mean
eval/return_mean eval/return_std eval/return_sampled_mean eval/vs_demos eval/vs_expert
time/rollout time/discriminator time/update""".split()


def plot_run(run_dir: Path, demos_mean: float, expert_mean: float) -> None:
    """curves.png: return and discriminator outputs over environment steps, from metrics.csv."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    def draw(ax, name: str, **style) -> None:
        points = [(int(row["global_step"]), float(row[name])) for row in rows if row[name]]
        if points:
            ax.plot(*zip(*points), **style)

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, "charts/episodic_return", label="sampled actions (training)", color="tab:blue", alpha=0.5)
    draw(left, "eval/return_mean", label="mean action (evaluation)", color="tab:blue", marker=".")
    left.axhline(demos_mean, color="tab:red", linestyle="--", label="demonstrations")
    left.axhline(expert_mean, color="black", linestyle=":", label="expert (mean action)")
    left.set(xlabel="environment steps", ylabel="true return of an episode", title="Return")
    left.legend(loc="lower right")
    draw(right, "disc/expert_prob", label="on demonstrations", color="tab:red")
    draw(right, "disc/policy_prob", label="on the policy", color="tab:blue")
    right.axhline(0.5, color="grey", linestyle=":", label="cannot tell")
    right.set(xlabel="environment steps", ylabel="mean D (1: expert)", ylim=(0, 1), title="Discriminator output")
    right.legend()
    figure.savefig(run_dir / "curves.png", dpi=120)


def record_video(policy: dict, path: Path, seed: int) -> None:
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
    act, ended = load_actor(policy), False
    while not ended:
        action = np.clip(act(obs)[0].numpy(), env.action_space.low, env.action_space.high)
        obs, _, terminated, truncated, _ = env.step(action)
        frames.append(env.render())
        ended = terminated or truncated
    env.close()
    imageio.mimsave(path, [frame[::2, ::2] for frame in frames], duration=50, loop=0)


def steps_to_fraction(curve: list[tuple[int, float]], target: float) -> int | None:
    """The first env step of two evaluations in a row that reach target; None if there is none."""
    pairs = zip(curve, curve[1:])
    return next((step for (step, value), (_, following) in pairs if min(value, following) >= target), None)


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


def check_dimensions(demos: Demos, envs, path: str) -> None:
    """UserError unless the demonstrations fit the environment."""
    for name, expected in (("observations", envs.obs_dim), ("actions", envs.action_dim)):
        array = getattr(demos, name)
        if array is not None and array.shape[1] != expected:
            problem = f"its {name} have {array.shape[1]} dimensions, the environment's {expected}"
            raise UserError(f"--demos {path}: {problem}; give demonstrations of this environment.")


def return_metrics(returns: np.ndarray, demos: Demos) -> dict[str, float]:
    """An evaluation's returns (E,), and their mean as a share of the demonstrations' and the expert's, if positive."""
    mean = returns.mean().item()
    references = {"vs_demos": demos.returns.mean(), "vs_expert": demos.metadata.get("expert_return_mean", math.nan)}
    shares = {f"eval/{name}": mean / float(x) for name, x in references.items() if x > 0}
    return {"eval/return_mean": mean, "eval/return_std": returns.std().item()} | shares


def crossed(step: int, batch_size: int, interval: int) -> bool:
    """Whether the last batch of env steps, which ended at `step`, passed a multiple of interval."""
    return step // interval > (step - batch_size) // interval


def stop_if_not_finite(row: dict, step: int, run_dir: Path) -> None:
    """End a diverged run with one sentence before it can overwrite its last good checkpoint."""
    bad = ", ".join(name for name, value in row.items() if not math.isfinite(value))
    if bad:
        kept = "keeps the last good checkpoint" if (run_dir / "checkpoint.pt").exists() else "has no checkpoint yet"
        raise UserError(f"training diverged at step {step} ({bad} not finite); {run_dir} {kept}; lower the step sizes.")


def print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print("\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in rows), ""]))


# Training


def train(args: Args) -> dict:
    """One training, from start or checkpoint to its table, files and figure; returns summary.json's content."""
    torch.set_num_threads(1)  # until there are minibatches, so that a run begins alike whatever ran before it
    resume_path, saved = args.resume, None
    if resume_path:
        saved, args = load_checkpoint(resume_path, "gail_ppo", Args)
    args.check()
    device, mine = join_processes(args.cuda), share_of(args, ["num_envs", "disc_batch_size"])
    mine.check()
    own_seed = args.seed + 1_000_000 * RANK  # of what differs between processes
    demos = load_demos(args.demos, args.env_id, args.num_demos, np.random.default_rng(args.seed), ("actions",))
    max_episode_steps, demos_mean = demos.metadata["max_episode_steps"], demos.returns.mean()
    envs = make_envs(args.env_id, mine.num_envs, max_episode_steps, own_seed, mine.threads)
    check_dimensions(demos, envs, args.demos)

    # What D learns from: standardized (observation, action) pairs.
    def mean_and_std(x: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(x.mean(0)).float().to(device), torch.from_numpy(x.std(0) + 1e-3).float().to(device)

    def disc_input(obs: Tensor, actions: Tensor) -> Tensor:
        return torch.cat([obs, standardize(actions, *action_statistics)], dim=-1)

    demo_obs, demo_actions = demos.obs_before_step, np.clip(demos.actions, envs.action_low, envs.action_high)
    obs_statistics, action_statistics = mean_and_std(demo_obs), mean_and_std(demo_actions)
    demo_obs = standardize(torch.from_numpy(demo_obs).to(device), *obs_statistics)
    demo_actions = torch.from_numpy(demo_actions).float().to(device)
    expert = disc_input(demo_obs, demo_actions)

    torch.manual_seed(args.seed)  # for spectral_norm alone, which takes no generator
    generator = Generator().manual_seed(args.seed)
    agent = Agent(envs.obs_dim, envs.action_dim, args.hidden_size, generator).to(device)
    disc = Discriminator(expert.shape[1], args.disc_hidden_size, args.spectral_norm, generator).to(device)
    optimizer = Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    disc_optimizer = Adam(disc.parameters(), lr=args.disc_learning_rate, fused=True)
    disc_optimizer.register_step_pre_hook(average_gradients)
    normalizers = {"env": RewardNormalizer(), "gail": RewardNormalizer()}
    collector = Collector(envs, *obs_statistics, device)
    parts = {"agent": agent, "disc": disc, "optimizer": optimizer, "disc_optimizer": disc_optimizer}
    parts |= {"env_reward": normalizers["env"], "gail_reward": normalizers["gail"]}
    own = parts["own"] = PerProcess({"collector": collector, "generator": generator})
    progress = {"iteration": 0, "seconds": 0.0, "obs_mean": obs_statistics[0].cpu()}
    progress["evaluations"] = []  # (env step, mean return with the mean action)

    if saved:
        run_dir = Path(resume_path).parent
        progress = restore(parts, saved, resume_path)
        if not torch.equal(progress["obs_mean"], obs_statistics[0].cpu()):
            raise UserError(f"--resume {resume_path}: {args.demos} has changed since then; start a new run.")
    else:
        run_dir = gather(make_run_dir(args) if RANK == 0 else None)[0]
        if args.bc_warm_start:
            clone_behaviour(agent, demo_obs, demo_actions, generator)
        if RANK > 0:  # the same networks, other noise
            generator.manual_seed(own_seed)
    if RANK == 0:
        logger = parts["logger"] = MetricsLogger(run_dir, COLUMNS, args, saved and saved["logger"])

    def current_policy() -> dict:
        return export_policy(agent, *obs_statistics, args.env_id, max_episode_steps)

    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    first_step, last_step = progress["iteration"] * batch_size, num_iterations * batch_size
    bar = tqdm(total=last_step, initial=first_step, unit="step", disable=RANK > 0 or None)
    ctrl_c, warned = watch_ctrl_c(), ""
    counted = time.perf_counter()  # time until here is in progress["seconds"], or left out as an evaluation's
    for iteration in range(progress["iteration"], num_iterations):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        clock = [time.perf_counter()]
        torch.set_num_threads(1)  # a second one, waiting for work, would keep a core from the physics
        rollout = collector.rollout(agent, args.num_steps, generator)
        torch.set_num_threads(min(mine.threads, 2))  # faster than one; more were not tried
        clock.append(time.perf_counter())

        row, logit = {}, None
        if args.reward_source != "env":
            policy = disc_input(rollout.obs, rollout.executed_actions)
            if iteration % args.disc_interval == 0:
                steps = args.disc_steps + args.burn_in_steps * (iteration == 0)
                row |= update_discriminator(disc, disc_optimizer, expert, policy.flatten(0, 1), mine, steps, generator)
            with torch.no_grad():
                logit = disc(policy)
        rewards, reward_log = compute_rewards(rollout, logit, normalizers, args)
        clock.append(time.perf_counter())

        row |= reward_log | update_policy(agent, optimizer, rollout, rewards, args, generator)
        clock.append(time.perf_counter())

        step = (iteration + 1) * batch_size
        last = step == last_step
        row |= dict(zip(("time/rollout", "time/discriminator", "time/update"), np.diff(clock).tolist()))
        row["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        if collector.finished:
            row["charts/episodic_return"], row["charts/episodic_length"] = np.mean(collector.finished, axis=0).tolist()
        if rollout.terminated.any() and args.normalize_reward and args.center_reward and not warned:
            warned = "warning: episodes can end early, and a centered reward may teach that: use --no-center-reward"
            bar.write(warned, file=sys.stderr) if RANK == 0 else None
        if crossed(step, batch_size, args.eval_interval) or last:
            returns = evaluate(current_policy(), 20, False, args.seed + 10_000, mine.threads)
            row |= return_metrics(returns, demos)
            progress["evaluations"].append((step, returns.mean().item()))
            bar.set_postfix_str(f"return {returns.mean():.0f} (demonstrations {demos_mean:.0f})")
            counted += time.perf_counter() - clock[-1]
        rows, pressed = zip(*gather((row, ctrl_c.is_set())))
        row = mean_row(rows) | {"global_step": step}
        stop_if_not_finite(row, step, run_dir)
        progress["iteration"], now = iteration + 1, time.perf_counter()
        progress["seconds"], counted = progress["seconds"] + now - counted, now
        if RANK == 0:
            logger.write(row | {"charts/SPS": int(step / progress["seconds"])})
        bar.update(batch_size)
        if crossed(step, batch_size, args.checkpoint_interval) or last or any(pressed):
            if RANK == 0:
                save_checkpoint(run_dir / "checkpoint.pt", "gail_ppo", args, parts, progress)
            else:
                own.state_dict()  # this process's share of it
        if any(pressed):
            raise KeyboardInterrupt(f"stopped at step {step}; go on with --resume {run_dir}/checkpoint.pt")
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if RANK > 0:
        return {}
    return finish_run(current_policy(), progress, demos, logger, args, run_dir)


def finish_run(policy: dict, progress: dict, demos: Demos, logger: MetricsLogger, args: Args, run_dir: Path) -> dict:
    """The final evaluation, the run's remaining files and its table; returns summary.json's content."""
    save_atomically(policy, run_dir / "policy.pt")
    returns = evaluate(policy, args.eval_episodes, False, args.seed + 20_000, args.threads)
    sampled = evaluate(policy, args.eval_episodes, True, args.seed + 30_000, args.threads)
    demos_mean, expert_mean = float(demos.returns.mean()), float(demos.metadata.get("expert_return_mean", math.nan))
    evaluations, seconds = progress["evaluations"], progress["seconds"]
    env_steps, best = evaluations[-1][0], max(evaluations, key=lambda pair: pair[1])
    summary = return_metrics(returns, demos) | {"eval/return_sampled_mean": sampled.mean().item()}
    reference = demos_mean if demos_mean > 0 else math.nan  # a share of nothing, or of a loss, says nothing
    summary |= {"eval/sampled_vs_demos": sampled.mean().item() / reference, "best/return_mean": best[1]}
    summary |= {"best/step": best[0], "steps_to_90": steps_to_fraction(evaluations, 0.9 * reference)}
    summary |= {"demos_return_mean": demos_mean, "expert_return_mean": expert_mean, "env_steps": env_steps}
    summary |= {"seconds": seconds, "charts/SPS": env_steps / seconds}
    summary = {k: v for k, v in summary.items() if v is None or math.isfinite(v)}  # a set may tell no returns
    logger.write({"global_step": env_steps} | {k: v for k, v in summary.items() if k in COLUMNS})
    logger.close(summary)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_run(run_dir, demos_mean, expert_mean)
    rows = [("demonstrations", f"{demos_mean:.0f} ± {demos.returns.std():.0f}   ({len(demos.lengths)} episodes)")]
    rows += [("expert, mean action", f"{expert_mean:.0f}")]
    for name, x in (("policy, mean action", returns), ("policy, sampled", sampled)):
        share = f"   ({x.mean() / demos_mean:.1%} of demonstrations)" if demos_mean > 0 else ""
        rows += [(name, f"{x.mean():.0f} ± {x.std():.0f}{share}")]
    rows += [("steps to 90%", f"{summary['steps_to_90'] or 'not reached'}")]
    rows += [("time", f"{seconds:.0f} s, {env_steps / seconds:,.0f} steps/s"), ("results", str(run_dir))]
    print_table(rows)
    if args.capture_video:
        record_video(policy, run_dir / "policy.gif", args.seed)
    return summary


def evaluate_policy_file(args: Args) -> None:
    """--evaluate: returns of a saved policy with the mean action and with sampled ones, as a table."""
    args.check()
    policy, rows = load_saved(args.evaluate, "--evaluate", {"kind": "gaussian"}), [("policy", args.evaluate)]
    try:
        for name, sampled in (("mean action", False), ("sampled", True)):
            x = evaluate(policy, args.eval_episodes, sampled, args.seed + 20_000 + 10_000 * sampled, args.threads)
            rows.append((name, f"{x.mean():.1f} ± {x.std():.1f}   ({args.eval_episodes} episodes)"))
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = type(error).__name__
        raise UserError(
            f"--evaluate {args.evaluate}: damaged or of another version ({reason}); give another."
        ) from None
    print_table(rows)
    if args.capture_video:
        record_video(policy, Path(args.evaluate).with_suffix(".gif"), args.seed)


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
    run_command(argv, Args, lambda args: evaluate_policy_file(args) if args.evaluate else train(args))


if __name__ == "__main__":
    main(sys.argv[1:])
