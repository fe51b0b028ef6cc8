"""The SAC expert and its demonstrations, complete in one file.

Soft Actor-Critic (Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905) with twin critics and automatic temperature
maximizes return plus temperature x entropy, off-policy, from a replay buffer:

    repeat:  step the environments with sampled actions -> store -> per update: critics, actor, temperature, target

 1. Critics regress on  r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s'))        (equations 5 and 6)
 2. The actor minimizes  alpha log pi(a|s) - min_i Q_i(s, a),  a = tanh(mean + std * noise)           (equation 9)
 3. The temperature alpha is moved until the policy's entropy is the target, minus the action dimension (equation 18)

Where this departs from the usual implementation, and why (every run: benchmark/results/sac_search.csv):

 4. Observations are standardized, with statistics of the random actions at the start. This is what held SAC back:
    after 16k updates the mean action earns 471 and 512 (two seeds) instead of 336 and 358.
 5. Far fewer updates than steps (1/8), at a step size of 1e-3: simulation is nearly free here, and fresh data makes
    each update worth more than a second look at old data (423 after 20k updates; one update a step, with the usual
    3e-4 for the actor, had 350 after 35k; which of the two changes did it was not told apart).
 6. gamma 0.97: a horizon of 33 steps, a stride or two, fits episodes of 100 steps better than 0.95 (336 against 255
    after 16k updates) and, once of twice, than 0.99 (568 and 518 against 536 after 60k, with its step size annealed). A
    smaller reward scale and training episodes of 1000 steps learned more slowly; LayerNorm in the critics did with few
    updates a step.
 7. Minibatches of 128, which are cheaper than 256 and come to the same (539 and 546 after 300k steps). Returns
    rise with the number of updates for long: 571 after 0.6M steps, 646 after 2.2M, 676 after 3M, 712 at the end.

Commands (two CPU cores):

    python collect_expert_sac.py train                                    # 71 minutes on one core: expert and sets
    python collect_expert_sac.py train --resume runs/<run>/checkpoint.pt  # go on where a killed run stopped
    python collect_expert_sac.py collect --expert data/expert.pt --output-dir data
    python collect_expert_sac.py inspect --demos data/halfcheetah-v4_sac_stochastic-one.npz
    python collect_expert_sac.py convert --source demos.pkl --target demos.npz   # the author's pickles, both ways
"""

import copy
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import typing
from collections import deque
from dataclasses import dataclass
from pathlib import Path

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
from torch.optim import Adam, Optimizer
from tqdm import tqdm

FORMAT_VERSION = 1
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
LOG_INTERVAL = 10_000  # env steps between rows of metrics.csv, or less if evaluations or checkpoints want it
PICKLE_KEYS = ("state", "action", "reward")
NOISE_LEVELS = {"deterministic": 0.0, "stochastic-half": 0.5, "stochastic-one": 1.0, "stochastic-one_five": 1.5}
NOISE_LEVELS |= {"stochastic-two": 2.0}  # multiples of the policy's own standard deviation


@dataclass
class Train:
    """Train the expert, evaluate it and record the five demonstration sets."""

    exp_name: str = "collect_expert_sac"  # name of the experiment, the first part of the run's name
    seed: int = 1  # seed of everything random: networks, environments, minibatches
    env_id: str = "HalfCheetah-v4"  # environment id
    max_episode_steps: int = 100  # episodes are cut here, in training as in the sets
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: <exp-name>__<env-id>__<seed>__<time>)
    resume: str = ""  # checkpoint.pt of a run to go on with; settings come from it, so give no other flag
    eval_interval: int = 50_000  # env steps between evaluations (20 episodes with the mean action)
    checkpoint_interval: int = 200_000
    """env steps between checkpoints (each holds the replay buffer: about 168 MB for a million steps)"""
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works without an account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    wandb_entity: str = ""  # Weights & Biases team (default: yours)
    cuda: bool = False  # run the networks on the GPU
    threads: int = 0  # threads that step the physics and multiply matrices (0: one a core)

    total_timesteps: int = 5_000_000  # environment steps of the whole run
    num_envs: int = 32  # parallel environments (N)
    updates_per_step: float = 0.125  # gradient updates per environment step
    learning_starts: int = 20_000  # env steps with uniformly random actions before the first update
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    batch_size: int = 128  # transitions in a minibatch
    hidden_size: int = 256  # width of the two hidden layers of actor and critics
    learning_rate: float = 1e-3  # Adam step size of actor, critics and temperature
    anneal_lr: bool = True  # let that step size fall linearly to zero over the run
    gamma: float = 0.97  # discount factor
    tau: float = 0.005  # how far the target critics move towards the critics at each update

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        require_range(self, ["gamma", "tau"], "between 0 and 1", lambda x: 0 <= x <= 1)
        check_numbers(self, may_be_zero="threads learning_starts gamma tau")
        first, last = 2 * self.num_envs, self.total_timesteps - 1
        if not first <= self.learning_starts <= last:
            raise UserError(f"--learning-starts is {self.learning_starts}, expected {first} to {last}; change it.")
        if self.cuda and not torch.cuda.is_available():
            raise UserError("--cuda was given, but PyTorch sees no GPU; leave it out or install a CUDA build of torch.")


@dataclass
class Collect:
    """Record the five demonstration sets from a saved expert."""

    expert: str = "data/expert.pt"  # policy.pt of an expert that `train` saved
    output_dir: str = "data"  # folder that receives the five .npz files
    episodes: int = 50  # episodes in each set
    seed: int = 1  # seed of the episodes; each set has noise of its own


@dataclass
class Inspect:
    """Describe a demonstration set: a table and a figure."""

    demos: str
    """demonstration set (.npz)"""
    figure: str = "demos.png"  # file for the figure


@dataclass
class Convert:
    """Translate the original author's pickles to this project's .npz or back, by the files' endings."""

    source: str
    """.pkl (list of trajectories, each a list of {state, action, reward, done}) or .npz"""
    target: str
    """the other kind"""


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


class TwinCritic(nn.Module):
    """Two independent Q-functions evaluated at once, one batched matrix product a layer: (B, O), (B, A) -> (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int, generator: Generator):
        super().__init__()
        sizes = [obs_dim + action_dim, hidden_size, hidden_size, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            bound = 1 / math.sqrt(fan_in)  # nn.Linear's own initialization
            for group, shape in ((self.weights, (2, fan_in, fan_out)), (self.biases, (2, 1, fan_out))):
                group.append(nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator)))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=-1).expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, F.relu(x) if i else x, weight)
        return x.squeeze(-1)


def make_actor(sizes: list[int], generator: Generator) -> nn.Sequential:
    """ReLU network from observations to mean and raw log standard deviation, (B, O) -> (B, 2A)."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        layer, bound = nn.Linear(fan_in, fan_out), 1 / math.sqrt(fan_in)
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sample_action(actor: nn.Module, obs: Tensor, noise: Tensor, noise_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """tanh(mean + noise_scale * std * noise) in [-1, 1], (B, A), and its log-probability at noise_scale 1, (B,).

    The density follows from the change of variables (appendix C), with log(1 - tanh(u)^2) in a form that does not
    overflow: 2 (log 2 - u - softplus(-2u)).
    """
    mean, raw_log_std = actor(obs).chunk(2, dim=-1)
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw_log_std) + 1)
    u = mean + noise_scale * log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return torch.tanh(u), (log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


# The algorithm


class ReplayBuffer:
    """The latest `size` transitions, in preallocated tensors; actions in [-1, 1]. Observations are stored as they come
    and standardized when they leave, with statistics fixed once, from the random actions before learning starts."""

    def __init__(self, size: int, obs_dim: int, action_dim: int, device: torch.device):
        shapes = {"obs": (size, obs_dim), "action": (size, action_dim), "next_obs": (size, obs_dim)}
        shapes |= {"reward": (size,), "terminated": (size,)}
        self.data = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self.size, self.added = size, 0
        self.obs_mean, self.obs_std = torch.zeros(obs_dim, device=device), torch.ones(obs_dim, device=device)

    def fit_statistics(self) -> None:
        """Fix the mean and standard deviation of observations to those of what is stored now."""
        obs = self.data["obs"][: self.added]
        self.obs_mean, self.obs_std = obs.mean(0), obs.std(0) + 1e-3

    def standardize(self, obs: Tensor) -> Tensor:
        return (obs - self.obs_mean) / self.obs_std

    def add(self, **transitions: np.ndarray) -> None:
        """Store N transitions, each field (N, ...)."""
        count = len(transitions["reward"])
        index = torch.arange(self.added, self.added + count) % self.size
        for name, value in transitions.items():
            self.data[name][index] = torch.as_tensor(value, dtype=torch.float32).to(self.data[name].device)
        self.added += count

    def sample(self, batch_size: int, generator: Generator) -> dict[str, Tensor]:
        index = torch.randint(min(self.added, self.size), (batch_size,), generator=generator)
        batch = {name: value[index] for name, value in self.data.items()}
        return batch | {name: self.standardize(batch[name]) for name in ("obs", "next_obs")}

    def state_dict(self) -> dict:
        data = {name: value[: self.added].clone() for name, value in self.data.items()}
        return {"obs_mean": self.obs_mean, "obs_std": self.obs_std, "added": self.added, "data": data}

    def load_state_dict(self, saved: dict) -> None:
        self.added = saved["added"]
        self.obs_mean, self.obs_std = (saved[name].to(self.obs_mean.device) for name in ("obs_mean", "obs_std"))
        for name, value in saved["data"].items():
            self.data[name][: len(value)] = value


@dataclass
class Learner:
    """The networks and optimizers of one SAC agent."""

    actor: nn.Module
    critic: TwinCritic
    target_critic: TwinCritic
    log_alpha: nn.Parameter  # (), log of the temperature
    actor_optimizer: Optimizer
    critic_optimizer: Optimizer
    alpha_optimizer: Optimizer
    target_entropy: float

    @staticmethod
    def create(args: Train, obs_dim: int, action_dim: int, generator: Generator, device: torch.device) -> "Learner":
        hidden = args.hidden_size
        actor = make_actor([obs_dim, hidden, hidden, 2 * action_dim], generator).to(device)
        critic = TwinCritic(obs_dim, action_dim, hidden, generator).to(device)
        target_critic = copy.deepcopy(critic).requires_grad_(False)
        log_alpha = nn.Parameter(torch.zeros((), device=device))
        parameters = (actor.parameters(), critic.parameters(), [log_alpha])
        optimizers = [Adam(group, lr=args.learning_rate, fused=True) for group in parameters]
        return Learner(actor, critic, target_critic, log_alpha, *optimizers, target_entropy=-float(action_dim))

    def state_dict(self) -> dict:
        parts = {name: part.state_dict() for name, part in vars(self).items() if hasattr(part, "state_dict")}
        return parts | {"log_alpha": self.log_alpha.detach().clone()}

    def load_state_dict(self, saved: dict) -> None:
        for name, part in vars(self).items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(saved[name])
        self.log_alpha.data.copy_(saved["log_alpha"])


def update(learner: Learner, batch: dict[str, Tensor], gamma: float, tau: float, generator) -> Tensor:
    """One gradient step of critics, actor and temperature, and the target's move. Returns (5,): critic loss, actor
    loss, temperature, its loss, policy entropy."""
    obs, action, alpha = batch["obs"], batch["action"], learner.log_alpha.exp().detach()
    noise = torch.randn((2, *action.shape), generator=generator).to(obs.device)

    with torch.no_grad():
        next_action, next_log_prob = sample_action(learner.actor, batch["next_obs"], noise[0])
        next_value = learner.target_critic(batch["next_obs"], next_action).min(0).values - alpha * next_log_prob
        target = batch["reward"] + gamma * (1 - batch["terminated"]) * next_value
    critic_loss = 0.5 * (learner.critic(obs, action) - target).square().mean(1).sum()
    learner.critic_optimizer.zero_grad()
    critic_loss.backward()
    learner.critic_optimizer.step()

    learner.critic.requires_grad_(False)  # the actor's loss needs dQ/da only
    policy_action, log_prob = sample_action(learner.actor, obs, noise[1])
    actor_loss = (alpha * log_prob - learner.critic(obs, policy_action).min(0).values).mean()
    learner.actor_optimizer.zero_grad()
    actor_loss.backward()
    learner.actor_optimizer.step()
    learner.critic.requires_grad_(True)

    alpha_loss = -learner.log_alpha.exp() * (log_prob.detach().mean() + learner.target_entropy)
    learner.alpha_optimizer.zero_grad()
    alpha_loss.backward()
    learner.alpha_optimizer.step()

    with torch.no_grad():
        torch._foreach_lerp_(list(learner.target_critic.parameters()), list(learner.critic.parameters()), tau)
        return torch.stack([critic_loss, actor_loss, alpha, alpha_loss, -log_prob.mean()])


# Recording episodes


@torch.inference_mode()
def record_episodes(policy: dict, noise_scale: float, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Whole fresh episodes of a policy.pt of kind "tanh_gaussian", as the fields of a demonstration set.

    noise_scale multiplies the policy's own standard deviation: 0 is the mean action. The physics state (qpos, qvel) is
    recorded where the environment shows it.
    """
    envs = make_envs(policy["env_id"], episodes, policy["max_episode_steps"], seed, 0)
    actor = make_actor(policy["sizes"], Generator())
    actor.load_state_dict(policy["weights"])
    generator = Generator().manual_seed(seed)
    obs, steps, running = envs.reset(), [], np.ones(episodes, bool)
    states = [(obs, *physics_state(envs))]  # before the first step, and after each
    terminated_at_all, truncated_at_all = np.zeros(episodes, bool), np.zeros(episodes, bool)
    while running.any():
        noise = torch.randn((episodes, envs.action_dim), generator=generator)
        x = (torch.as_tensor(obs, dtype=torch.float32) - policy["obs_mean"]) / policy["obs_std"]
        action = scale_action(sample_action(actor, x, noise, noise_scale)[0].numpy(), envs)
        obs, reward, terminated, truncated, final_obs = envs.step(action)
        steps.append((action, reward, running))
        states.append((final_obs, *physics_state(envs, final=True)))
        terminated_at_all |= terminated & running
        truncated_at_all |= truncated & running
        running = running & ~(terminated | truncated)
    actions, rewards, running = (np.stack(column) for column in zip(*steps))  # (T, E, ...)
    if not np.isfinite(actions).all():
        raise ValueError("actions that are not finite")
    lengths = running.sum(0)
    shown = np.arange(len(states)) <= lengths[:, None]  # (E, T + 1): the final state of an episode belongs to it
    fields = zip(("observations", "qpos", "qvel"), (np.stack(column, 1)[shown] for column in zip(*states)))
    arrays = dict(fields) | {"actions": actions.swapaxes(0, 1)[running.T], "rewards": rewards.T[running.T]}
    arrays |= {name: arrays[name].astype(np.float32) for name in ("observations", "actions", "rewards")}
    return arrays | {"terminated": terminated_at_all, "truncated": truncated_at_all, "lengths": lengths}


def export_expert(actor: nn.Sequential, buffer: ReplayBuffer, args: Train) -> dict:
    """The content of policy.pt, which bc.py and this script's `collect` can read."""
    sizes = [actor[0].in_features, *(layer.out_features for layer in actor if isinstance(layer, nn.Linear))]
    # tanh_gaussian: ReLU layers to mean and raw log_std of a Gaussian squashed into the action bounds
    policy = {"format_version": FORMAT_VERSION, "kind": "tanh_gaussian", "env_id": args.env_id, "sizes": sizes}
    policy |= {"weights": {name: weight.detach().cpu().clone() for name, weight in actor.state_dict().items()}}
    policy |= {"obs_mean": buffer.obs_mean.cpu(), "obs_std": buffer.obs_std.cpu(), "obs_clip": math.inf}
    return policy | {"max_episode_steps": args.max_episode_steps}


def physics_state(envs, final: bool = False) -> tuple[np.ndarray, ...]:
    """(qpos, qvel) of all simulations, before the last reset if final; nothing where the environment hides them."""
    if not isinstance(envs, BatchHalfCheetah):
        return ()
    return (envs.final_qpos, envs.final_qvel) if final else (envs.qpos.copy(), envs.qvel.copy())


def scale_action(action: np.ndarray, envs) -> np.ndarray:
    """From [-1, 1] to the environment's bounds."""
    return envs.action_low + 0.5 * (action + 1) * (envs.action_high - envs.action_low)


def returns_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(E,) undiscounted return of each recorded episode."""
    return np.add.reduceat(arrays["rewards"].astype(np.float64), np.cumsum(arrays["lengths"]) - arrays["lengths"])


def record_sets(policy: dict, folder: Path, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Write the five demonstration sets; returns the episodes' returns in each, (E,)."""
    expert_returns = returns_of(record_episodes(policy, 0.0, 100, seed + 1000))
    tensors = [*policy["weights"].values(), policy["obs_mean"], policy["obs_std"]]
    sha256 = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    returns, sets = {"expert": expert_returns}, []  # of the mean action, over 100 episodes
    for i, (level, noise_scale) in enumerate(NOISE_LEVELS.items()):
        arrays = record_episodes(policy, noise_scale, episodes, seed + 50_000 + i)  # no training starts from these
        returns[level] = returns_of(arrays)
        metadata = {name: policy[name] for name in ("env_id", "max_episode_steps")}
        metadata |= {"noise_scale": noise_scale, "seed": seed + 50_000 + i, "expert_sha256": sha256}
        metadata |= {"expert_return_mean": expert_returns.mean(), "expert_return_std": expert_returns.std()}
        sets.append((folder / f"{policy['env_id'].lower().replace('/', '-')}_sac_{level}.npz", arrays, metadata))
    folder.mkdir(parents=True, exist_ok=True)
    for one in sets:  # once all are there: who interrupts keeps the old ones
        save_demos(*one)
    return returns


def save_demos(path: Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Write a demonstration set, completing its metadata with returns and versions."""
    returns = returns_of(arrays)
    versions = {module.__name__: module.__version__ for module in (np, torch, gym, mujoco)}
    metadata = {"format_version": FORMAT_VERSION} | metadata
    metadata |= {"return_mean": returns.mean(), "return_std": returns.std(), "versions": versions}
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, metadata=json.dumps(metadata), **arrays)
    os.replace(temporary, path)


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


# The original author's pickles


class PlainUnpickler(pickle.Unpickler):
    """Admits numpy arrays, numpy scalars and plain containers; anything else could run code, and is refused."""

    allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    allowed |= {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
    allowed |= {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def pickle_to_arrays(path: str) -> dict[str, np.ndarray]:
    """The original author's HalfCheetah-v4 trajectories as the fields of a demonstration set.

    His pickles leave out the state that an episode's last action led to, and the root's x. Both follow from the rest:
    the last action is simulated once more, and x is the sum of the velocities in the rewards.
    """
    try:
        with open(path, "rb") as file:
            trajectories = PlainUnpickler(file).load()
        columns = [[np.array([x[key] for x in steps], np.float64) for key in PICKLE_KEYS] for steps in trajectories]
        lengths = np.array([len(reward) for _, _, reward in columns], np.int64)
        envs = BatchHalfCheetah(len(columns), 1000, 0, 1)
        for states, actions, rewards in columns:
            if states.shape[1:] != (envs.obs_dim,) or actions.shape[1:] != (envs.action_dim,) or rewards.ndim != 1:
                raise ValueError("expected states of 17 numbers, actions of 6 and rewards of one")
            if not all(np.isfinite(column).all() for column in (states, actions, rewards)):
                raise ValueError("expected finite numbers")
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"--source {path}: no HalfCheetah-v4 trajectories ({error}); give an author's .pkl.") from None
    envs.reset()
    for i, (states, _, _) in enumerate(columns):
        envs.qpos[i, 1:], envs.qvel[i] = np.split(states[-1], [envs.model.nq - 1])
    final_obs = envs.step(np.stack([actions[-1] for _, actions, _ in columns]))[-1]
    observations, qpos = [], []
    for (states, actions, rewards), final in zip(columns, final_obs):
        observations.append(np.vstack([states, final]))
        x = np.cumsum((rewards + envs.control_cost * np.square(actions).sum(1)) * envs.dt)
        qpos.append(np.column_stack([np.append(0.0, x), observations[-1][:, : envs.model.nq - 1]]))
    observations, qpos = np.concatenate(observations), np.concatenate(qpos)
    actions, rewards = (np.concatenate([column[k] for column in columns]).astype(np.float32) for k in (1, 2))
    fields = {"observations": observations.astype(np.float32), "actions": actions, "rewards": rewards}
    fields |= {"qpos": qpos, "qvel": observations[:, envs.model.nq - 1 :], "lengths": lengths}
    return fields | {"terminated": np.zeros(len(lengths), bool), "truncated": np.ones(len(lengths), bool)}


def convert(args: Convert) -> None:
    """.pkl to .npz or back. Going to a pickle drops what it has no place for: final observations, physics, metadata."""
    source, target = Path(args.source), Path(args.target)
    if {source.suffix, target.suffix} != {".pkl", ".npz"}:
        raise UserError(f"--source {source} and --target {target}: expected one .pkl and one .npz; rename them.")
    if source.suffix == ".pkl":
        arrays = pickle_to_arrays(args.source)
        target.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"env_id": "HalfCheetah-v4", "max_episode_steps": int(arrays["lengths"].max()), "noise_scale": None}
        save_demos(target, arrays, metadata)
    else:
        demos = load_demos(args.source, None, 0, np.random.default_rng(), ("actions", "rewards"))
        splits, trajectories = np.cumsum(demos.lengths)[:-1], []
        columns = [np.split(x, splits) for x in (demos.obs_before_step, demos.actions, demos.rewards)]
        for states, actions, rewards in zip(*columns):
            steps = zip(states, actions, rewards, np.arange(len(rewards)) == len(rewards) - 1)
            trajectories.append([dict(zip((*PICKLE_KEYS, "done"), step)) for step in steps])
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")  # so that a kill leaves the old file or the new one, whole
        temporary.write_bytes(pickle.dumps(trajectories))
        os.replace(temporary, target)
    print(f"wrote {target}")


def inspect(args: Inspect) -> None:
    """Print a table of a demonstration set and draw its returns, their growth over an episode, and its actions."""
    demos = load_demos(args.demos, None, 0, np.random.default_rng(), ("actions", "rewards"))
    returns, metadata = demos.returns, demos.metadata
    rows = [("file", args.demos)]
    rows += [("environment", f"{metadata.get('env_id')}, at most {metadata['max_episode_steps']} steps an episode")]
    rows += [("episodes", f"{len(returns)}, of {demos.lengths.min()} to {demos.lengths.max()} steps")]
    spread = f"{returns.mean():.1f} ± {returns.std():.1f}, from {returns.min():.1f} to {returns.max():.1f}"
    ends = f"termination {demos.terminated.sum()}, time limit {demos.truncated.sum()}"
    rows += [("return", spread), ("ended by", ends)]
    rows += [("actions beyond 0.99", f"{(np.abs(demos.actions) > 0.99).mean():.1%}")]
    rows += [("physics state", "yes" if demos.qpos is not None else "no (no frames can be rendered)")]
    made_with = {k: v for k, v in metadata.items() if k not in ("env_id", "max_episode_steps")}
    print_table([*rows, ("made with", json.dumps(made_with))])

    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.hist(returns, bins=20, color="tab:blue")
    left.set(xlabel="return of an episode", ylabel="episodes", title=f"Returns, mean {returns.mean():.0f}")
    for rewards in np.split(demos.rewards, np.cumsum(demos.lengths)[:-1]):
        middle.plot(np.cumsum(rewards), color="tab:blue", alpha=0.3)
    middle.set(xlabel="step of the episode", ylabel="return so far", title="Growth of the return, a line an episode")
    right.violinplot(list(demos.actions.T), showextrema=False)
    right.set(xlabel="action dimension", ylabel="executed action", title="Actions")
    Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(args.figure, dpi=120)
    except ValueError as error:
        raise UserError(f"--figure {args.figure}: {str(error).splitlines()[0]}; name a .png.") from None
    print(f"figure: {args.figure}")


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


COLUMNS = """global_step charts/episodic_return charts/SPS charts/learning_rate
sac/qf_loss sac/actor_loss sac/alpha sac/alpha_loss sac/entropy eval/return_mean eval/return_std""".split()


# Training


def train(args: Train) -> dict:
    """One training, from its start or from a checkpoint to the expert and its sets; returns summary.json's content."""
    resume_path, saved = args.resume, None
    if resume_path:
        saved, args = load_checkpoint(resume_path, "collect_expert_sac", Train)
    args.check()
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    envs = make_envs(args.env_id, args.num_envs, args.max_episode_steps, args.seed, args.threads)
    if not np.isfinite([envs.action_low, envs.action_high]).all():
        raise UserError(f"--env-id {args.env_id}: its actions have no bounds, and SAC's have; choose another env.")

    generator = Generator().manual_seed(args.seed)
    learner = Learner.create(args, envs.obs_dim, envs.action_dim, generator, device)
    buffer = ReplayBuffer(args.buffer_size, envs.obs_dim, envs.action_dim, device)
    obs, step, seconds, evaluations = envs.reset(), 0, 0.0, []
    finished: deque[float] = deque(maxlen=100)  # returns of the latest episodes
    episode_return = np.zeros(args.num_envs)
    parts = {"learner": learner, "buffer": buffer, "envs": envs, "generator": generator}
    if saved:
        run_dir, progress = Path(resume_path).parent, restore(parts, saved, resume_path)
        step, seconds, evaluations = (progress[name] for name in ("step", "seconds", "evaluations"))
        finished.extend(progress["finished"])
        if saved["envs"]:  # otherwise the environments could not be saved, and new episodes begin
            obs, episode_return = progress["obs"].numpy(), progress["episode_return"].numpy()
    else:
        run_dir = make_run_dir(args)
    logger = parts["logger"] = MetricsLogger(run_dir, COLUMNS, args, saved and saved["logger"])

    def checkpoint() -> None:
        progress = {"step": step, "seconds": seconds, "evaluations": evaluations, "finished": list(finished)}
        progress |= {"obs": torch.from_numpy(obs), "episode_return": torch.from_numpy(episode_return)}
        save_checkpoint(run_dir / "checkpoint.pt", "collect_expert_sac", args, parts, progress)

    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)
    clock, log, last_row = time.perf_counter(), [], step
    ctrl_c, log_interval = watch_ctrl_c(), min(LOG_INTERVAL, args.eval_interval, args.checkpoint_interval)
    while step < args.total_timesteps:
        # Act: uniformly at first, then by the policy.
        noise = torch.randn((args.num_envs, envs.action_dim), generator=generator).to(device)
        if step <= args.learning_starts:
            action = torch.rand(noise.shape, generator=generator).numpy() * 2 - 1
        else:
            with torch.inference_mode():
                x = buffer.standardize(torch.as_tensor(obs, dtype=torch.float32).to(device))
                action = sample_action(learner.actor, x, noise)[0]
            action = action.cpu().numpy()
        next_obs, reward, terminated, truncated, final_obs = envs.step(scale_action(action, envs))
        buffer.add(obs=obs, action=action, reward=reward, next_obs=final_obs, terminated=terminated)
        obs = next_obs
        episode_return += reward
        ended = terminated | truncated
        finished.extend(episode_return[ended].tolist())
        episode_return[ended] = 0.0
        step += args.num_envs

        # Learn: so many updates that their number keeps to updates_per_step, exactly, over the run.
        if step > args.learning_starts:
            if step - args.num_envs <= args.learning_starts:
                buffer.fit_statistics()
            if args.anneal_lr:
                for optimizer in (learner.actor_optimizer, learner.critic_optimizer, learner.alpha_optimizer):
                    optimizer.param_groups[0]["lr"] = args.learning_rate * max(0.0, 1 - step / args.total_timesteps)
            due, done = (int((step - k * args.num_envs) * args.updates_per_step) for k in (0, 1))
            for _ in range(due - done):
                batch = buffer.sample(args.batch_size, generator)
                log.append(update(learner, batch, args.gamma, args.tau, generator))

        if crossed(step, args.num_envs, log_interval):
            seconds += time.perf_counter() - clock
            row = {"global_step": step, "charts/SPS": int(step / seconds)}
            row["charts/learning_rate"] = learner.actor_optimizer.param_groups[0]["lr"]
            if finished:
                row["charts/episodic_return"] = float(np.mean(finished))
            if log:
                names = ("qf_loss", "actor_loss", "alpha", "alpha_loss", "entropy")
                row |= {f"sac/{name}": x for name, x in zip(names, torch.stack(log).mean(0).tolist())}
                log.clear()
            since_last_row, last_row = step - last_row, step
            if crossed(step, since_last_row, args.eval_interval):
                policy = export_expert(learner.actor, buffer, args)
                returns = returns_of(record_episodes(policy, 0.0, 20, args.seed + 10_000))
                evaluations.append((step, returns.mean().item()))
                row |= {"eval/return_mean": returns.mean().item(), "eval/return_std": returns.std().item()}
                bar.set_postfix_str(f"return {returns.mean():.0f}")
            stop_if_not_finite(row, step, run_dir)
            logger.write(row)
            if crossed(step, since_last_row, args.checkpoint_interval) or ctrl_c.is_set():
                checkpoint()
            if ctrl_c.is_set():
                raise KeyboardInterrupt(f"stopped at step {step}; go on with --resume {run_dir}/checkpoint.pt")
            clock = time.perf_counter()
        bar.update(args.num_envs)
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seconds += time.perf_counter() - clock
    stop_if_not_finite({"a loss": torch.stack(log).mean().item()} if log else {}, step, run_dir)
    checkpoint()

    policy = export_expert(learner.actor, buffer, args)
    save_atomically(policy, run_dir / "policy.pt")
    returns = record_sets(policy, run_dir, 50, args.seed)
    best_step, best = max(evaluations, key=lambda pair: pair[1], default=(None, None))
    summary = {"eval/return_mean": returns["expert"].mean(), "eval/return_std": returns["expert"].std()}
    summary |= {f"sets/{level}": returns[level].mean() for level in NOISE_LEVELS}
    summary |= {"best/return_mean": best, "best/step": best_step, "env_steps": step, "seconds": seconds}
    summary |= {"charts/SPS": step / seconds}
    logger.close(summary)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_sets(returns, [("time", f"{seconds:.0f} s, {step / seconds:,.0f} steps/s"), ("results", str(run_dir))])
    return summary


def print_sets(returns: dict[str, np.ndarray], more: list[tuple[str, str]]) -> None:
    rows = [("expert, mean action", returns["expert"])] + [(level, returns[level]) for level in NOISE_LEVELS]
    print_table([(name, f"{x.mean():.1f} ± {x.std():.1f}   ({len(x)} episodes)") for name, x in rows] + more)


def collect(args: Collect) -> None:
    """Record the five sets from a saved expert."""
    require_range(args, ["episodes"], "greater than 0", lambda x: x > 0)
    require_range(args, ["seed"], "from 0 to 2147483647", lambda x: 0 <= x < 2**31)
    policy = load_saved(args.expert, "--expert", {"kind": "tanh_gaussian"})
    try:
        returns = record_sets(policy, Path(args.output_dir), args.episodes, args.seed)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = type(error).__name__
        raise UserError(f"--expert {args.expert}: damaged or of another version ({reason}); give another.") from None
    print_sets(returns, [("results", args.output_dir)])


COMMANDS = {Train: train, Collect: collect, Inspect: inspect, Convert: convert}


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
    run_command(argv, Train | Collect | Inspect | Convert, lambda args: COMMANDS[type(args)](args))


if __name__ == "__main__":
    main(sys.argv[1:])
