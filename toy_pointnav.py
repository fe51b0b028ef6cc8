r"""All of GAIL in seconds: imitate an expert that walks a 2-D point to a goal, complete in one file.

Generative Adversarial Imitation Learning (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476) in the smallest world that
shows it whole. A point starts anywhere in [-1, 1]^2 and looks for the origin with five moves (stay, up, down, left,
right); the expert moves along its larger coordinate. A discriminator D(s, one-hot a) learns to tell the expert's 300
episodes from the policy's own steps; the policy learns by PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347)
or TRPO (Schulman et al. 2015, https://arxiv.org/abs/1502.05477) to be taken for the expert:

    repeat:  collect a rollout -> update D -> reward = how much D takes a step for the expert's -> GAE -> PPO or TRPO

The environment's reward (-0.01 a step, 1 at the goal) is only ever reported. What is worth knowing (the numbers of 2, 3
and 5 are of one run each, and in no table):

 1. The expert solves 95.1% of the starts. Moves of 0.2 reach only a lattice of points fixed by the start, and where the
    one nearest to the goal lies outside its radius of 0.12 (the corners of the lattice's cell, 4.9% of its area), the
    greedy rule steps to and fro until the time limit. These few starts are 39% of the expert's steps. Who bumped into
    two walls first, which moves the lattice onto the goal, would solve every start, in 16 to 24 steps on average
    instead of 8.
 2. Episodes end at the goal, so the reward's sign matters. log D (the default) is negative: every step costs, arriving
    ends the cost. -log(1 - D) is positive: it pays for staying alive, and with a discount factor of 0.99 the policy
    learns to linger (10% of the starts solved, 54 steps an episode, seed 1). log D - log(1 - D) can be either. For the
    same reason --normalize-reward divides by the deviation and keeps the mean.
 3. The discount factor is 0.9: it keeps that pull local, whichever its sign, and with all three forms the policy then
    solves what the expert solves. When D cannot tell, log D still charges log 2 a step, which bends the policy towards
    the shortest episodes: with 0.99 and as many steps a fresh discriminator (point 6) still knows 72% of the steps, and
    81% with --continuous.
 4. The time limit is a truncation, and the value of the last observation is bootstrapped: the observation holds no
    clock, so nothing in it could tell that the end is near. At a discount factor of 0.9 it makes no difference.
 5. The --continuous expert (straight to the goal at full speed) is given Gaussian noise. A Gaussian policy always has
    some: it comes less close to a noiseless expert (fresh discriminator 61% instead of 53%). Its actions, like the
    policy's, are cut to [-1, 1] before the world and D see them.
 6. Whether the adversary is real, and beaten: a new discriminator, trained from scratch on new episodes, is asked to
    tell the policy (sampled) from the expert on held-out episodes, before the training and after it. 50% is a coin.
 7. Observations are standardized by the demonstrations' mean and deviation, for D, policy and value alike. Policy and
    value share a trunk; under TRPO the value learns in its own layers only, so that the KL bound holds after it too.

Commands. With the first two, ten of ten seeds end with the expert's own success and steps, on 5,000 starts each (95.0%
on average). The third solves them all, as its expert does, in 7 to 9% fewer steps, since its mean action has no noise.
A fresh discriminator knows 91 to 94% at the start and 46 to 57% at the end. A run ends 11 to 12 s after the command on
two idle cores (idle_two_cores.csv in benchmark/results), on busy ones after 12 to 17, once 57 (toy_pointnav.csv).

    python toy_pointnav.py
    python toy_pointnav.py --algorithm trpo
    python toy_pointnav.py --continuous
    python toy_pointnav.py --normalize-reward
    python toy_pointnav.py --evaluate runs/<run>/policy.pt
    python toy_pointnav.py --resume runs/<run>/checkpoint.pt    # go on where a killed run stopped, bit for bit

A long run, with the sizes of a thorough notebook (13 million steps, not measured):

    python toy_pointnav.py --num-envs 128 --num-steps 512 --total-timesteps 13107200 --expert-episodes 1500 \
        --disc-batch-size 512 --disc-steps 105 --disc-learning-rate 3e-4 --update-epochs 10 --num-minibatches 64 \
        --learning-rate 3e-4 --gamma 0.99 --ent-coef 0.01 --eval-episodes 1000 --eval-interval 327680
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

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

FORMAT_VERSION = 1
REWARD_WINDOW = 10  # rollouts whose rewards --normalize-reward looks at
OBS_CLIP = 10.0  # standardized observations are clipped to [-OBS_CLIP, OBS_CLIP]

STEP_SIZE = 0.2  # distance of one move, or of one step at speed 1
GOAL_RADIUS = 0.12  # an episode ends in success closer than this to the origin
MAX_EPISODE_STEPS = 60
MOVES = np.array([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]], np.float64)  # what each of the five actions adds
ACTION_NAMES = ["stay", "up", "down", "left", "right"]
EXPERT_STD = 0.2  # noise of the --continuous expert, a share of full speed
BACKTRACK_STEPS = 10  # step sizes that TRPO's line search tries, each half of the one before
FISHER_STRIDE = 4  # TRPO's Fisher matrix is estimated on every fourth state; its bound is checked on all of them


@dataclass
class Args:
    exp_name: str = "toy_pointnav"  # name of the experiment, the first part of the run's name
    seed: int = 1  # seed of everything random: networks, worlds, minibatches, the expert's episodes
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: <exp-name>__PointNav__<seed>__<time>)
    resume: str = ""  # checkpoint.pt of a run to go on with; settings come from it, so give no other flag
    evaluate: str = ""  # policy.pt to evaluate instead of training
    eval_interval: int = 10_000
    """env steps between evaluations (500 episodes with the mean action: the likeliest move or mean velocity)"""
    eval_episodes: int = 5000  # episodes of the final evaluation of expert and policy, from the same starts
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works without an account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    wandb_entity: str = ""  # Weights & Biases team (default: yours)

    continuous: bool = False  # a 2-D velocity instead of five moves, a Gaussian policy, and an expert of its own
    noise_std: float = 0.0  # standard deviation of the noise that the world adds to each move
    expert_episodes: int = 300  # episodes that the expert demonstrates

    algorithm: Literal["ppo", "trpo"] = "ppo"  # how the policy is updated
    total_timesteps: int = 150_000  # environment steps of the whole run
    num_envs: int = 128  # parallel worlds (N)
    num_steps: int = 32  # steps per world and rollout (T)
    learning_rate: float = 3e-3  # Adam step size of policy and value (ppo)
    anneal_lr: bool = True  # let that step size fall linearly to zero over the run
    gamma: float = 0.9  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 2  # minibatches per epoch of the PPO update
    update_epochs: int = 8  # epochs of the PPO update over each rollout
    norm_adv: bool = True  # normalize advantages (ppo: in each minibatch; trpo: over the rollout)
    clip_coef: float = 0.2  # clipping of PPO's probability ratio
    ent_coef: float = 0.0  # weight of the policy's entropy bonus
    vf_coef: float = 0.5  # weight of the value loss (ppo)
    max_grad_norm: float = 1.0  # gradient norm at which PPO's gradients are cut
    hidden_size: int = 64  # width of the hidden layers of policy and value

    max_kl: float = 0.01  # TRPO: bound on the mean KL divergence from the old policy to the new one
    cg_iterations: int = 10  # TRPO: conjugate gradient iterations
    cg_damping: float = 0.01  # TRPO: this much of the identity is added to the Fisher matrix
    value_steps: int = 20  # TRPO: Adam steps of the value function per rollout
    value_learning_rate: float = 3e-3  # TRPO: their step size

    reward_form: Literal["softplus", "logit", "logsigmoid"] = "logsigmoid"
    """GAIL reward: -log(1-D) = softplus(logit), log D - log(1-D) = logit, log D = logsigmoid(logit)"""
    normalize_reward: bool = False
    """divide the reward by its running standard deviation (its mean stays: see the top of the file)"""
    disc_learning_rate: float = 3e-3  # Adam step size of the discriminator
    disc_steps: int = 20  # minibatch steps of the discriminator per rollout
    disc_batch_size: int = 256  # expert pairs, and as many of the policy's, in a discriminator minibatch
    disc_hidden_size: int = 128  # width of the two hidden layers of the discriminator
    grad_penalty_coef: float = 0.0  # weight of the discriminator's gradient penalty
    disc_ent_coef: float = 0.0  # weight of the entropy bonus on the discriminator's output
    fresh_disc_steps: int = 500
    """minibatch steps of the new discriminators that judge the policy before and after the training"""

    env_id: typing.ClassVar[str] = "PointNav"
    disc_loss: typing.ClassVar[str] = "bce"

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        require_range(self, ["gamma", "gae_lambda"], "between 0 and 1", lambda x: 0 <= x <= 1)
        may_be_zero = "gamma gae_lambda noise_std ent_coef vf_coef cg_damping grad_penalty_coef disc_ent_coef"
        check_numbers(self, may_be_zero)
        rollout = self.num_envs * self.num_steps
        expected = f"of at most {rollout // 2}, half of a rollout (num-envs x num-steps)"
        require_range(self, ["num_minibatches"], expected, lambda x: 2 * x <= rollout)
        expected = f"of {rollout} or more, one rollout (num-envs x num-steps)"
        require_range(self, ["total_timesteps"], expected, lambda x: x >= rollout)


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


# The world and its experts


class PointNav:
    """N points in the square [-1, 1]^2 that look for the origin. An observation is the position (N, 2), an action one
    of five moves, int (N,), or with `continuous` a velocity (N, 2) in [-1, 1]^2. Each step pays -0.01, the one that
    comes within GOAL_RADIUS 1 more. Ended episodes start anew at once; `final_obs` keeps where they ended."""

    def __init__(self, num_envs: int, seed: int, continuous: bool = False, noise_std: float = 0.0):
        self.num_envs, self.continuous, self.noise_std = num_envs, continuous, noise_std
        self.rng = np.random.default_rng(seed)
        self.position = np.zeros((num_envs, 2))
        self.elapsed = np.zeros(num_envs, np.int64)

    def reset(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Start new episodes in the given worlds (None: all); returns all observations."""
        ids = np.arange(self.num_envs) if ids is None else ids
        self.position[ids] = self.rng.uniform(-1, 1, (len(ids), 2))
        self.elapsed[ids] = 0
        return self.position.copy()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """-> next_obs (N, 2), rewards (N,), terminated (N,), truncated (N,), final_obs (N, 2)."""
        move = np.clip(actions, -1, 1) if self.continuous else MOVES[actions]
        noise = self.noise_std * self.rng.standard_normal((self.num_envs, 2)) if self.noise_std else 0.0
        self.position = np.clip(self.position + STEP_SIZE * move + noise, -1, 1)
        self.elapsed += 1
        terminated = np.hypot(*self.position.T) < GOAL_RADIUS
        truncated = (self.elapsed >= MAX_EPISODE_STEPS) & ~terminated
        final_obs = self.position.copy()
        next_obs, ended = final_obs, np.flatnonzero(terminated | truncated)
        if len(ended):
            next_obs = self.reset(ended)
        return next_obs, terminated - 0.01, terminated, truncated, final_obs

    def state_dict(self) -> dict:
        arrays = {"position": torch.from_numpy(self.position.copy()), "elapsed": torch.from_numpy(self.elapsed.copy())}
        return arrays | {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, saved: dict) -> None:
        self.position, self.elapsed = saved["position"].numpy(), saved["elapsed"].numpy()
        self.rng.bit_generator.state = saved["rng"]


def greedy_expert(obs: np.ndarray) -> np.ndarray:
    """(N, 2) -> (N,): one move along the larger coordinate towards 0; x on a tie; stay at the origin itself."""
    x, y = obs.T
    along_x = np.where(x > 0, 3, np.where(x < 0, 4, 0))
    along_y = np.where(y > 0, 2, 1)
    return np.where(np.abs(x) >= np.abs(y), along_x, along_y)


def velocity_expert(obs: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """(N, 2) -> (N, 2): straight to the goal at full speed, the last step only as long as needed; with rng, Gaussian
    noise of EXPERT_STD on both coordinates. Cut to [-1, 1]."""
    distance = np.hypot(*obs.T)[:, None]
    velocity = -obs / np.maximum(distance, STEP_SIZE)
    if rng is not None:
        velocity = velocity + EXPERT_STD * rng.standard_normal(velocity.shape)
    return np.clip(velocity, -1, 1)


def make_expert(continuous: bool, seed: int) -> typing.Callable[[np.ndarray], np.ndarray]:
    """The expert of one of the two worlds, as a function of observations."""
    rng = np.random.default_rng(seed)
    return (lambda obs: velocity_expert(obs, rng)) if continuous else greedy_expert


@dataclass
class Episodes:
    """E whole episodes side by side; rows after an episode's end are not `running` and mean nothing."""

    obs: np.ndarray  # (T + 1, E, 2), each episode's final one included
    actions: np.ndarray  # (T, E) or (T, E, 2), as executed
    running: np.ndarray  # (T, E) bool: this step belongs to the episode
    returns: np.ndarray  # (E,) true return
    success: np.ndarray  # (E,) bool

    @property
    def lengths(self) -> np.ndarray:
        return self.running.sum(axis=0)

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The L observations, the actions that answered them, and the number of each one's episode."""
        episode = np.broadcast_to(np.arange(self.running.shape[1]), self.running.shape)
        return self.obs[:-1][self.running], self.actions[self.running], episode[self.running]

    def path(self, episode: int) -> np.ndarray:
        return self.obs[: self.lengths[episode] + 1, episode]


def play_episodes(act: typing.Callable, episodes: int, seed: int, continuous: bool, noise_std: float) -> Episodes:
    """One episode in each of E worlds; the same seed gives the same starts, whoever acts."""
    envs = PointNav(episodes, seed, continuous, noise_std)
    obs = envs.reset()
    all_obs, all_actions, all_running = [obs], [], []
    returns, success, running = np.zeros(episodes), np.zeros(episodes, bool), np.ones(episodes, bool)
    while running.any():
        actions = act(obs)
        obs, rewards, terminated, truncated, final_obs = envs.step(actions)
        all_obs.append(final_obs)
        all_actions.append(actions)
        all_running.append(running.copy())
        returns += rewards * running
        success |= terminated & running
        running &= ~(terminated | truncated)
    return Episodes(np.stack(all_obs), np.stack(all_actions), np.stack(all_running), returns, success)


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


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(action; mean, exp(log_std)^2), summed over the last axis: (..., A) -> (...)."""
    z = (action - mean) * torch.exp(-log_std)
    return -0.5 * z.square().sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * action.shape[-1]


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of a diagonal Gaussian: (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class ActorCritic(nn.Module):
    """Policy and value on a shared trunk, over standardized observations (B, 2). The policy's output ("head") is the
    logits of five moves (B, 5), or the mean velocity (B, 2) beside a state-independent log_std."""

    def __init__(self, continuous: bool, hidden_size: int, generator: Generator):
        super().__init__()
        self.continuous = continuous
        self.trunk = mlp([2, hidden_size, hidden_size], nn.Tanh, math.sqrt(2), generator)
        self.actor = mlp([hidden_size, 2 if continuous else len(MOVES)], nn.Tanh, 0.01, generator)
        self.critic = mlp([hidden_size, hidden_size, 1], nn.Tanh, 1.0, generator)
        if continuous:
            self.log_std = nn.Parameter(torch.full((2,), -0.5))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """-> head (B, A), value (B,)."""
        features = torch.tanh(self.trunk(obs))
        return self.actor(features), self.critic(features).squeeze(-1)

    def policy_parameters(self) -> list[nn.Parameter]:
        """All but the critic's own layers: what TRPO's step moves."""
        return [p for name, p in self.named_parameters() if not name.startswith("critic")]

    def log_prob(self, head: Tensor, action: Tensor) -> Tensor:
        if self.continuous:
            return gaussian_log_prob(action, head, self.log_std)
        return F.log_softmax(head, -1).gather(-1, action[..., None]).squeeze(-1)

    def entropy(self, head: Tensor) -> Tensor:
        """Mean entropy in nats, ()."""
        if self.continuous:
            return gaussian_entropy(self.log_std)
        log_p = F.log_softmax(head, -1)
        return -(log_p.exp() * log_p).sum(-1).mean()

    def kl_from(self, old_head: Tensor, old_log_std: Tensor | None, head: Tensor) -> Tensor:
        """Mean KL(old || this policy) over a batch, ()."""
        if self.continuous:
            variance_ratio = (2 * (old_log_std - self.log_std)).exp()
            squared = ((old_head - head) * torch.exp(-self.log_std)).square()
            return 0.5 * (variance_ratio + squared - 1 - variance_ratio.log()).sum(-1).mean()
        old_log_p = F.log_softmax(old_head, -1)
        return (old_log_p.exp() * (old_log_p - F.log_softmax(head, -1))).sum(-1).mean()

    def old_log_std(self) -> Tensor | None:
        return self.log_std.detach().clone() if self.continuous else None


def sample_actions(head: Tensor, log_std: Tensor | None, generator: Generator) -> Tensor:
    """Draw from the policy: head (B, A) -> (B,) moves, or (B, 2) velocities where log_std is given."""
    if log_std is not None:
        return head + log_std.exp() * torch.randn(head.shape, generator=generator)
    return torch.multinomial(head.softmax(-1), 1, generator=generator).squeeze(-1)


class PairDiscriminator(nn.Module):
    """Logit of 'this pair is the expert's': (B, X) from disc_input -> (B,)."""

    def __init__(self, continuous: bool, hidden_size: int, generator: Generator):
        super().__init__()
        input_dim = 2 + (2 if continuous else len(MOVES))
        self.net = mlp([input_dim, hidden_size, hidden_size, 1], nn.Tanh, 1.0, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


def standardize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std, clipped to [-OBS_CLIP, OBS_CLIP]."""
    return ((x - mean) / std).clamp(-OBS_CLIP, OBS_CLIP)


def disc_input(obs: Tensor, actions: Tensor) -> Tensor:
    """Standardized observations (..., 2) beside the executed action: one-hot (...) moves, or (..., 2) velocities."""
    if not actions.is_floating_point():
        actions = F.one_hot(actions, len(MOVES)).float()
    return torch.cat([obs, actions], dim=-1)


# The algorithm, as pure functions


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


def conjugate_gradient(product: typing.Callable, b: Tensor, iterations: int) -> Tensor:
    """Solve A x = b for a symmetric positive definite A known through product(v) = A v (Hestenes & Stiefel 1952)."""
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    squared = residual @ residual
    for _ in range(iterations):
        if squared < 1e-10:
            break
        a_direction = product(direction)
        alpha = squared / (direction @ a_direction)
        x += alpha * direction
        residual -= alpha * a_direction
        previous, squared = squared, residual @ residual
        direction = residual + squared / previous * direction
    return x


def flat_gradient(y: Tensor, parameters: list[nn.Parameter], **options) -> Tensor:
    return torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(y, parameters, **options)])


def fisher_product(agent: ActorCritic, obs: Tensor, damping: float) -> typing.Callable:
    """v -> (F + damping I) v, F the policy's Fisher matrix on obs (B, 2): the Hessian of the mean KL divergence from
    the current policy, at itself (Schulman et al. 2015, appendix C). F itself is never formed."""
    parameters = agent.policy_parameters()
    head, _ = agent(obs)
    kl = agent.kl_from(head.detach(), agent.old_log_std(), head)
    gradient = flat_gradient(kl, parameters, create_graph=True)
    return lambda v: flat_gradient(gradient @ v, parameters, retain_graph=True) + damping * v


def trpo_step(agent: ActorCritic, obs: Tensor, action: Tensor, advantages: Tensor, args: Args) -> dict[str, float]:
    """One natural-gradient step of the policy; obs (B, 2), action (B,) or (B, 2), advantages (B,).

    The step is the largest that the quadratic model of the KL divergence allows, halved until the true divergence is
    within --max-kl and the surrogate no worse (Schulman et al. 2015, appendix C); where that never comes true, the
    policy stays as it was.
    """
    parameters = agent.policy_parameters()
    with torch.no_grad():
        old_head, old_log_std = agent(obs)[0], agent.old_log_std()
        old_log_prob = agent.log_prob(old_head, action)

    def surrogate_and_kl() -> tuple[Tensor, Tensor]:
        head, _ = agent(obs)
        ratio = (agent.log_prob(head, action) - old_log_prob).exp()
        surrogate = (ratio * advantages).mean() + args.ent_coef * agent.entropy(head)
        return surrogate, agent.kl_from(old_head, old_log_std, head)

    before, _ = surrogate_and_kl()
    gradient = flat_gradient(before, parameters)
    product = fisher_product(agent, obs[::FISHER_STRIDE], args.cg_damping)
    direction = conjugate_gradient(product, gradient, args.cg_iterations)
    curvature = direction @ product(direction)
    step = direction * torch.sqrt(2 * args.max_kl / (curvature + 1e-10))
    old = nn.utils.parameters_to_vector(parameters).detach().clone()
    with torch.no_grad():
        for halving in range(BACKTRACK_STEPS):
            nn.utils.vector_to_parameters(old + 0.5**halving * step, parameters)
            after, kl = surrogate_and_kl()
            if kl <= args.max_kl and after >= before:
                break
        else:
            nn.utils.vector_to_parameters(old, parameters)
            after, kl = surrogate_and_kl()
    return {"policy_loss": -after.item(), "approx_kl": kl.item()}


# The training loop's named steps


@dataclass
class PointRollout:
    """T steps of N worlds. Observations are standardized; `next_obs` is the true one, before any reset."""

    obs: Tensor  # (T, N, 2)
    next_obs: Tensor  # (T, N, 2)
    actions: Tensor  # (T, N) or (T, N, 2) as sampled: what the ratio is about
    executed_actions: Tensor  # the same, velocities cut to [-1, 1]: what the world, and D, saw
    log_probs: Tensor  # (T, N)
    env_rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N) bool
    ended: Tensor  # (T, N) bool, terminated or truncated


class PointCollector:
    """Steps the worlds with the policy and keeps what lasts from one rollout to the next."""

    def __init__(self, envs: PointNav, obs_mean: Tensor, obs_std: Tensor):
        self.envs, self.obs_mean, self.obs_std = envs, obs_mean, obs_std
        self.obs = envs.reset()
        self.step, self.episode_return = 0, np.zeros(envs.num_envs)
        self.finished: list[tuple[int, float, int]] = []  # (env step, return, length) of every episode of the run

    def standardized(self, obs: np.ndarray) -> Tensor:
        return standardize(torch.as_tensor(obs, dtype=torch.float32), self.obs_mean, self.obs_std)

    @torch.no_grad()
    def rollout(self, agent: ActorCritic, num_steps: int, generator: Generator) -> PointRollout:
        """Sample num_steps actions in every world."""
        steps = []
        for _ in range(num_steps):
            obs = self.standardized(self.obs)
            head, _ = agent(obs)
            action = sample_actions(head, agent.old_log_std(), generator)
            executed = action.clamp(-1, 1) if agent.continuous else action
            lengths = self.envs.elapsed + 1
            self.obs, reward, terminated, truncated, final_obs = self.envs.step(executed.numpy())
            ended = terminated | truncated
            steps.append((obs, action, executed, head, reward, terminated, ended, final_obs))
            self.step += self.envs.num_envs
            self.episode_return += reward
            done = zip(self.episode_return[ended].tolist(), lengths[ended].tolist())
            self.finished += [(self.step, *episode) for episode in done]
            self.episode_return[ended] = 0.0
        columns = list(zip(*steps))
        obs, action, executed, head = (torch.stack(column) for column in columns[:4])
        reward, terminated, ended = (torch.from_numpy(np.stack(column)) for column in columns[4:7])
        next_obs, log_prob = self.standardized(np.stack(columns[7])), agent.log_prob(head, action)
        return PointRollout(obs, next_obs, action, executed, log_prob, reward.float(), terminated, ended)

    def state_dict(self) -> dict:
        state = {"obs": torch.from_numpy(self.obs), "return": torch.from_numpy(self.episode_return)}
        finished = torch.tensor(self.finished, dtype=torch.float64)
        return state | {"step": self.step, "finished": finished, "envs": self.envs.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        self.obs, self.episode_return, self.step = saved["obs"].numpy(), saved["return"].numpy(), saved["step"]
        self.finished = [(int(step), value, int(length)) for step, value, length in saved["finished"].tolist()]
        self.envs.load_state_dict(saved["envs"])


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


def estimate_advantages(
    agent: ActorCritic, rollout: PointRollout, rewards: Tensor, args: Args
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, advantages and returns, each (T, N)."""
    with torch.no_grad():
        values, next_values = agent(rollout.obs)[1], agent(rollout.next_obs)[1]
    ends = (rollout.terminated, rollout.ended)
    return values, *compute_gae(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std() + 1e-8)


def update_by_ppo(
    agent: ActorCritic, optimizer: Optimizer, rollout: PointRollout, rewards: Tensor, args: Args, generator: Generator
) -> dict[str, float]:
    """PPO: several epochs of minibatches over one rollout; returns the means of what to log."""
    values, advantages, returns = estimate_advantages(agent, rollout, rewards, args)
    flat = [x.flatten(0, 1) for x in (rollout.obs, rollout.actions, rollout.log_probs, advantages, values, returns)]
    parameters, log = list(agent.parameters()), []
    for _ in range(args.update_epochs):
        for minibatch in torch.randperm(len(flat[0]), generator=generator).chunk(args.num_minibatches):
            obs, action, old_log_prob, advantage, old_value, target = (x[minibatch] for x in flat)
            head, value = agent(obs)
            log_ratio = agent.log_prob(head, action) - old_log_prob
            advantage = normalized(advantage) if args.norm_adv else advantage
            policy_loss = ppo_policy_loss(log_ratio, advantage, args.clip_coef)
            value_loss = ppo_value_loss(value, old_value, target, None)
            entropy = agent.entropy(head)
            optimizer.zero_grad()
            (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                approx_kl = (log_ratio.exp() - 1 - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html, k3
                clipfrac = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
                log.append(torch.stack([policy_loss, value_loss, entropy, approx_kl, clipfrac]))
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
    explained_variance = 1 - (returns - values).var() / (returns.var() + 1e-8)
    means = dict(zip(names, torch.stack(log).mean(0).tolist())) | {"explained_variance": explained_variance.item()}
    return {f"losses/{name}": value for name, value in means.items()}


def update_by_trpo(
    agent: ActorCritic, optimizer: Optimizer, rollout: PointRollout, rewards: Tensor, args: Args
) -> dict[str, float]:
    """TRPO: one step of the policy, then --value-steps of the critic's own layers. The optimizer holds no others, so
    that fitting the value leaves the trunk, and with it the policy, where the KL bound put it."""
    values, advantages, returns = estimate_advantages(agent, rollout, rewards, args)
    obs, action, advantage = rollout.obs.flatten(0, 1), rollout.actions.flatten(0, 1), advantages.flatten()
    log = trpo_step(agent, obs, action, normalized(advantage) if args.norm_adv else advantage, args)
    with torch.no_grad():
        log["entropy"] = agent.entropy(agent(obs)[0]).item()
        features = torch.tanh(agent.trunk(obs))
    for _ in range(args.value_steps):
        value_loss = ppo_value_loss(agent.critic(features).squeeze(-1), values.flatten(), returns.flatten(), None)
        optimizer.zero_grad()
        value_loss.backward()
        optimizer.step()
    log["value_loss"] = value_loss.item()
    log["explained_variance"] = (1 - (returns - values).var() / (returns.var() + 1e-8)).item()
    return {f"losses/{name}": value for name, value in log.items()}


# Evaluation


def export_toy_policy(agent: ActorCritic, obs_mean: Tensor, obs_std: Tensor, args: Args) -> dict:
    """The content of policy.pt: trunk and policy head as one chain of tanh layers."""
    prefix, hidden = "mean" if args.continuous else "logits", args.hidden_size
    chain = nn.Sequential(*agent.trunk, nn.Tanh(), *agent.actor)
    weights = {f"{prefix}.{name}": w.detach().clone() for name, w in chain.state_dict().items()}
    weights |= {"log_std": agent.old_log_std()} if args.continuous else {}
    policy = {"format_version": FORMAT_VERSION, "kind": "gaussian" if args.continuous else "categorical"}
    policy |= {"sizes": [2, hidden, hidden, agent.actor[-1].out_features], "weights": weights, "obs_mean": obs_mean}
    return policy | {
        "obs_std": obs_std,
        "obs_clip": OBS_CLIP,
        "env_id": "PointNav",
        "max_episode_steps": MAX_EPISODE_STEPS,
    }


def load_policy(policy: dict, sampled: bool, seed: int) -> typing.Callable[[np.ndarray], np.ndarray]:
    """Executed actions as a function of raw observations (B, 2): likeliest move or mean velocity, or sampled ones."""
    log_std, generator = policy["weights"].get("log_std"), Generator().manual_seed(seed)
    net = mlp(policy["sizes"], nn.Tanh, 0.01, Generator())
    net.load_state_dict({name.split(".", 1)[1]: w for name, w in policy["weights"].items() if "." in name})

    @torch.inference_mode()
    def act(obs: np.ndarray) -> np.ndarray:
        head = net(standardize(torch.as_tensor(obs, dtype=torch.float32), policy["obs_mean"], policy["obs_std"]))
        if sampled:
            head = sample_actions(head, log_std, generator)
        elif log_std is None:
            head = head.argmax(-1)
        return head.clamp(-1, 1).numpy() if log_std is not None else head.numpy()

    return act


def evaluate(policy: dict, episodes: int, noise_std: float, seed: int) -> dict[str, Episodes]:
    """Expert, policy (mean action: the likeliest move or mean velocity) and sampled policy, from the same starts."""
    continuous = policy["kind"] == "gaussian"
    actors = {"expert": make_expert(continuous, seed + 1), "policy": load_policy(policy, False, seed)}
    actors["sampled"] = load_policy(policy, True, seed + 2)
    return {name: play_episodes(act, episodes, seed, continuous, noise_std) for name, act in actors.items()}


def fresh_accuracy(policy: dict, args: Args, seed: int, episodes: int = 2000) -> float:
    """How well a new discriminator can tell the sampled policy from the expert: balanced accuracy on held-out episodes.

    Neither side's episodes are those of the training, and none stands on both sides of the split; 0.5 is a coin.
    """
    args = dataclasses.replace(args, grad_penalty_coef=0.0, disc_ent_coef=0.0)  # nothing holds this one back
    generator = Generator().manual_seed(seed)
    training, held_out = [], []
    for i, act in enumerate((make_expert(args.continuous, seed), load_policy(policy, True, seed))):
        obs, actions, episode = play_episodes(act, episodes, seed + i, args.continuous, args.noise_std).pairs()
        obs = standardize(torch.as_tensor(obs, dtype=torch.float32), policy["obs_mean"], policy["obs_std"])
        x = disc_input(obs, torch.as_tensor(actions, dtype=torch.float32 if args.continuous else torch.int64))
        in_training = torch.as_tensor(episode < episodes // 2)
        training.append(x[in_training])
        held_out.append(x[~in_training])
    disc = PairDiscriminator(args.continuous, args.disc_hidden_size, generator)
    optimizer = Adam(disc.parameters(), lr=args.disc_learning_rate, fused=True)
    update_discriminator(disc, optimizer, *training, args, args.fresh_disc_steps, generator)
    with torch.no_grad():
        expert, policy_side = (disc(x) > 0 for x in held_out)
    return 0.5 * (expert.float().mean() + (~policy_side).float().mean()).item()


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
eval/return_mean eval/return_std eval/return_sampled_mean eval/success_mean eval/length_mean
eval/vs_demos eval/vs_expert
time/rollout time/discriminator time/update""".split()


EXPERT, POLICY, GREY = "#d62728", "#1f77b4", "#7f7f7f"


def make_panels(
    run_dir: Path, demos: Episodes, expert_beside: Episodes, played: dict[str, Episodes], finished: list
) -> list[dict]:
    """What the diagnostics show: panels of traces, each (kind, x, y, name, color), drawn alike in HTML and PNG.

    expert_beside are the expert's episodes from the starts of the evaluations during training, played those of the
    evaluation at the end, finished the training's own: (env step, return, length).
    """
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))[:-1]  # the last one is the evaluation at the end, from other starts

    def curve(kind: str, column: str, name: str, color: str) -> tuple:
        points = [(int(row["global_step"]) / 1000, float(row[column])) for row in rows if row[column]]
        return kind, [x for x, _ in points], [y for _, y in points], name, color

    def level(value: float, name: str, color: str) -> tuple:
        return "dashed", [0, int(rows[-1]["global_step"]) / 1000], [float(value)] * 2, name, color

    def path(kind: str, episodes: Episodes, i: int, name: str, color: str) -> tuple:
        return kind, *(np.round(column, 4).tolist() for column in episodes.path(i).T), name, color

    def bars(actions: np.ndarray, name: str, color: str) -> tuple:
        if actions.ndim == 1:
            return "bars", ACTION_NAMES, (np.bincount(actions, minlength=5) / len(actions)).tolist(), name, color
        edges = np.linspace(0, 1.5, 16)
        counts, _ = np.histogram(np.hypot(*actions.T), edges)
        return "bars", [f"{x:.1f}" for x in edges[:-1]], (counts / len(actions)).tolist(), name, color

    steps, returns = [step / 1000 for step, _, _ in finished], np.array([value for _, value, _ in finished])
    window = min(200, len(returns))
    average = np.convolve(returns, np.full(window, 1 / window), "valid") if window else returns
    thin = max(1, len(returns) // 2000)
    angle = np.linspace(0, 2 * np.pi, 60)
    goal = ("line", *(GOAL_RADIUS * f(angle) for f in (np.cos, np.sin)), "goal", "black")
    solved = int(np.argmax(demos.success))
    shown = range(min(8, len(played["expert"].success)))
    both = (("line", "expert", EXPERT), ("dashed", "policy", POLICY))
    paths = [path(kind, played[who], i, who, color) for kind, who, color in both for i in shown]
    actions_x = "move" if demos.actions.ndim == 2 else "speed, share of the full one (lower edge of bin)"
    time_axis = "environment steps, thousands"

    def panel(title: str, x: str, y: str, *traces: tuple, square: bool = False) -> dict:
        return {"title": title, "x": x, "y": y, "traces": traces, "square": square}

    episode = ("points", steps[::thin], returns[::thin].tolist(), "an episode", "#aec7e8")
    smooth = ("line", steps[window - 1 :: thin], average[::thin].tolist(), f"mean of the last {window}", POLICY)
    evaluation = [curve("marked", "eval/return_mean", "return, policy", POLICY)]
    evaluation += [level(expert_beside.returns.mean(), "return, expert", EXPERT)]
    evaluation += [curve("marked", "eval/success_mean", "success, policy", "#17becf")]
    evaluation += [level(expert_beside.success.mean(), "success, expert", "#ff7f0e")]
    loss = curve("line", "disc/loss", "loss", POLICY), level(2 * math.log(2), "cannot tell", GREY)
    actions = bars(demos.pairs()[1], "expert", EXPERT), bars(played["sampled"].pairs()[1], "policy", POLICY)
    return [
        panel("One expert trajectory", "x", "y", path("marked", demos, solved, "expert", EXPERT), goal, square=True),
        panel("Actions taken", actions_x, "share of steps", *actions),
        panel("Discriminator loss", time_axis, "binary cross-entropy, nats", *loss),
        panel("Evaluation with the mean action", time_axis, "mean return; share of starts solved", *evaluation),
        panel("True return of training episodes", time_axis, "return", episode, smooth),
        panel("Expert and learned paths, same starts", "x", "y", *paths, goal, square=True),
    ]


def plot_diagnostics(
    run_dir: Path, demos: Episodes, expert_beside: Episodes, played: dict[str, Episodes], finished: list
) -> None:
    """diagnostics.png and diagnostics.html, the latter with all of Plotly inside, so that it opens without network."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = make_panels(run_dir, demos, expert_beside, played, finished)
    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplots(2, 3)
    page = make_subplots(2, 3, subplot_titles=[panel["title"] for panel in panels], horizontal_spacing=0.08)
    for number, (ax, panel) in enumerate(zip(axes.flat, panels)):
        cell, legend, named = {"row": number // 3 + 1, "col": number % 3 + 1}, f"legend{number + 1}", set()
        for kind, x, y, name, color in panel["traces"]:
            label = None if name in named else name
            common = {"name": name, "showlegend": label is not None, "legend": legend, "legendgroup": legend + name}
            named.add(name)
            if kind == "bars":
                shift = 0.4 * (len(named) - 1) - 0.2
                ax.bar(np.arange(len(x)) + shift, y, 0.4, label=label, color=color)
                ax.set_xticks(np.arange(len(x)), x)
                page.add_trace(go.Bar(x=x, y=y, marker_color=color, **common), **cell)
                continue
            style = {"line": "-", "dashed": "--", "marked": ".-", "points": "."}[kind]
            ax.plot(x, y, style, label=label, color=color, markersize=2 if kind == "points" else 6)
            mode = {"marked": "lines+markers", "points": "markers"}.get(kind, "lines")
            line = {"color": color, "dash": "dash" if kind == "dashed" else "solid"}
            marker = {"color": color, "size": 3 if kind == "points" else 6}
            page.add_trace(go.Scatter(x=x, y=y, mode=mode, line=line, marker=marker, **common), **cell)
        ax.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        ax.legend(loc="best")
        page.update_xaxes(title_text=panel["x"], **cell)
        page.update_yaxes(title_text=panel["y"], **cell)
        x_domain, y_domain = (page.get_subplot(**cell)[i].domain for i in (0, 1))
        place = {"x": x_domain[1], "xanchor": "right", "y": y_domain[0], "bgcolor": "rgba(255, 255, 255, 0.7)"}
        page.update_layout({legend: place | {"yanchor": "bottom"}})
        if panel["square"]:
            ax.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
            anchor = page.get_subplot(**cell)[0].anchor.replace("y", "x")
            page.update_xaxes(range=[-1.05, 1.05], **cell)
            page.update_yaxes(range=[-1.05, 1.05], scaleanchor=anchor, **cell)
    figure.suptitle(run_dir.name)
    figure.savefig(run_dir / "diagnostics.png", dpi=100)
    page.update_layout(title=run_dir.name, template="plotly_white", height=950)
    page.write_html(run_dir / "diagnostics.html", include_plotlyjs=True)


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


# Training


def train(args: Args) -> dict:
    """One training, from start or checkpoint to its table, files and figures; returns summary.json's content."""
    torch.set_num_threads(1)  # minibatches this small run slower on more
    resume_path, saved = args.resume, None
    if resume_path:
        saved, args = load_checkpoint(resume_path, "toy_pointnav", Args)
    args.check()

    expert_act = make_expert(args.continuous, args.seed)
    demos = play_episodes(expert_act, args.expert_episodes, args.seed + 1000, args.continuous, args.noise_std)
    demo_obs, demo_actions, _ = demos.pairs()
    demo_obs = torch.as_tensor(demo_obs, dtype=torch.float32)
    obs_mean, obs_std = demo_obs.mean(0), demo_obs.std(0).nan_to_num() + 1e-3  # a single step has no spread
    demo_actions = torch.as_tensor(demo_actions, dtype=torch.float32 if args.continuous else torch.int64)
    expert = disc_input(standardize(demo_obs, obs_mean, obs_std), demo_actions)

    generator = Generator().manual_seed(args.seed)
    agent = ActorCritic(args.continuous, args.hidden_size, generator)
    disc = PairDiscriminator(args.continuous, args.disc_hidden_size, generator)
    if args.algorithm == "ppo":
        optimizer = Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    else:
        optimizer = Adam(agent.critic.parameters(), lr=args.value_learning_rate, fused=True)
    disc_optimizer = Adam(disc.parameters(), lr=args.disc_learning_rate, fused=True)
    normalizer = RewardNormalizer()
    world = (args.continuous, args.noise_std)
    expert_beside = play_episodes(make_expert(args.continuous, args.seed), 500, args.seed + 10_000, *world)
    collector = PointCollector(PointNav(args.num_envs, args.seed, args.continuous, args.noise_std), obs_mean, obs_std)
    parts = {"agent": agent, "disc": disc, "optimizer": optimizer, "disc_optimizer": disc_optimizer}
    parts |= {"collector": collector, "normalizer": normalizer, "generator": generator}
    if saved:
        run_dir, progress = Path(resume_path).parent, restore(parts, saved, resume_path)
    else:
        run_dir = make_run_dir(args)
        initial = fresh_accuracy(export_toy_policy(agent, obs_mean, obs_std, args), args, args.seed + 40_000)
        progress = {"iteration": 0, "seconds": 0.0, "evaluations": [], "initial_accuracy": initial}
    logger = parts["logger"] = MetricsLogger(run_dir, COLUMNS, args, saved and saved["logger"])

    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    first_step, last_step = progress["iteration"] * batch_size, num_iterations * batch_size
    bar = tqdm(total=last_step, initial=first_step, unit="step", disable=None)
    ctrl_c = watch_ctrl_c()
    for iteration in range(progress["iteration"], num_iterations):
        clock = [time.perf_counter()]
        if args.anneal_lr and args.algorithm == "ppo":
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        episodes_before = len(collector.finished)
        rollout = collector.rollout(agent, args.num_steps, generator)
        clock.append(time.perf_counter())

        policy = disc_input(rollout.obs, rollout.executed_actions)
        flat = policy.flatten(0, 1)
        row = update_discriminator(disc, disc_optimizer, expert, flat, args, args.disc_steps, generator)
        with torch.no_grad():
            gail_rewards = imitation_reward(disc(policy), args.reward_form)
        normalizer.update(gail_rewards)
        rewards = normalizer.normalize(gail_rewards, False) if args.normalize_reward else gail_rewards
        clock.append(time.perf_counter())

        if args.algorithm == "ppo":
            row |= update_by_ppo(agent, optimizer, rollout, rewards, args, generator)
        else:
            row |= update_by_trpo(agent, optimizer, rollout, rewards, args)
        clock.append(time.perf_counter())

        progress["iteration"], progress["seconds"] = iteration + 1, progress["seconds"] + clock[-1] - clock[0]
        step = progress["iteration"] * batch_size
        row |= dict(zip(("time/rollout", "time/discriminator", "time/update"), np.diff(clock).tolist()))
        row |= {"global_step": step, "charts/SPS": int(step / progress["seconds"])}
        row |= {"charts/learning_rate": optimizer.param_groups[0]["lr"]}
        row |= {"reward/env_mean": rollout.env_rewards.mean().item(), "reward/total_mean": rewards.mean().item()}
        row |= {"reward/gail_mean": gail_rewards.mean().item(), "reward/gail_std": gail_rewards.std().item()}
        if len(collector.finished) > episodes_before:
            _, returns, lengths = np.mean(collector.finished[episodes_before:], axis=0).tolist()
            row |= {"charts/episodic_return": returns, "charts/episodic_length": lengths}
        if crossed(step, batch_size, args.eval_interval):
            current = load_policy(export_toy_policy(agent, obs_mean, obs_std, args), False, args.seed)
            played = play_episodes(current, 500, args.seed + 10_000, *world)
            mean, success = played.returns.mean().item(), played.success.mean().item()
            row |= {"eval/return_mean": mean, "eval/return_std": played.returns.std().item()}
            row |= {"eval/success_mean": success, "eval/length_mean": played.lengths.mean().item()}
            row |= {"eval/vs_demos": mean / demos.returns.mean(), "eval/vs_expert": mean / expert_beside.returns.mean()}
            progress["evaluations"].append((step, mean))
            bar.set_postfix_str(f"success {success:.1%}")
        stop_if_not_finite(row, step, run_dir)
        logger.write(row)
        bar.update(batch_size)
        if crossed(step, batch_size, args.checkpoint_interval) or step == last_step or ctrl_c.is_set():
            save_checkpoint(run_dir / "checkpoint.pt", "toy_pointnav", args, parts, progress)
        if ctrl_c.is_set():
            raise KeyboardInterrupt(f"stopped at step {step}; go on with --resume {run_dir}/checkpoint.pt")
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)

    final = export_toy_policy(agent, obs_mean, obs_std, args)
    demos_mean, seconds = demos.returns.mean().item(), progress["seconds"]
    save_atomically(final, run_dir / "policy.pt")
    played = evaluate(final, args.eval_episodes, args.noise_std, args.seed + 20_000)
    initial, fresh = progress["initial_accuracy"], fresh_accuracy(final, args, args.seed + 50_000)
    best_step, best = max(progress["evaluations"], key=lambda pair: pair[1], default=(None, None))
    summary = summarize(played) | {"demos_return_mean": demos_mean, "best/return_mean": best, "best/step": best_step}
    summary |= {"eval/vs_demos": summary["eval/return_mean"] / demos_mean, "env_steps": last_step}
    summary |= {"disc/initial_accuracy": initial, "disc/fresh_accuracy": fresh}
    summary |= {"seconds": seconds, "charts/SPS": last_step / seconds}
    logger.write({"global_step": last_step} | {k: v for k, v in summary.items() if k in COLUMNS})
    logger.close(summary)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_diagnostics(run_dir, demos, expert_beside, played, collector.finished)
    rows = [*table_rows(played)]
    rows += [("a fresh discriminator", f"{initial:.1%} right at the start, {fresh:.1%} at the end")]
    rows += [("time", f"{seconds:.0f} s, {last_step / seconds:,.0f} steps/s"), ("results", str(run_dir))]
    print_table(rows)
    return summary


def summarize(played: dict[str, Episodes]) -> dict[str, float]:
    """Means over the episodes of evaluate(), under the names of summary.json."""
    summary = {"eval/return_mean": 0.0, "eval/return_std": played["policy"].returns.std().item()}
    for name, prefix, suffix in (("policy", "eval", ""), ("sampled", "eval", "_sampled"), ("expert", "expert", "")):
        for quantity, values in (("return", "returns"), ("success", "success"), ("length", "lengths")):
            summary[f"{prefix}/{quantity}{suffix}_mean"] = getattr(played[name], values).mean().item()
    return summary | {"eval/vs_expert": summary["eval/return_mean"] / summary["expert/return_mean"]}


def table_rows(played: dict[str, Episodes]) -> list[tuple[str, str]]:
    """evaluate()'s result as rows of a table."""
    names = {"expert": "expert", "policy": "policy, mean action", "sampled": "policy, sampled"}
    rows = []
    for name, who in played.items():
        solved = f"{who.success.mean():.1%} of {len(who.success)} starts solved, {who.lengths.mean():.2f} steps"
        rows.append((names[name], f"{solved}, return {who.returns.mean():.3f} ± {who.returns.std():.3f}"))
    return rows


def evaluate_saved_policy(args: Args) -> dict:
    """--evaluate: a saved policy beside the expert, from the same starts."""
    args.check()
    policy = load_saved(args.evaluate, "--evaluate", {"env_id": args.env_id})
    try:
        played = evaluate(policy, args.eval_episodes, args.noise_std, args.seed + 20_000)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        reason = type(error).__name__
        raise UserError(
            f"--evaluate {args.evaluate}: damaged or of another version ({reason}); give another."
        ) from None
    print_table([("policy", args.evaluate), *table_rows(played)])
    return summarize(played)


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
    run_command(argv, Args, lambda args: evaluate_saved_policy(args) if args.evaluate else train(args))


if __name__ == "__main__":
    main(sys.argv[1:])
