# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""GAIL inside a learned world model: imitate from states or frames alone, complete in one file.

A recurrent state-space model (RSSM; Hafner et al. 2019, https://arxiv.org/abs/1811.04551) learns
from all episodes so far how the world moves. Discriminator D (GAIL; Ho & Ermon 2016,
https://arxiv.org/abs/1606.03476), policy and value learn from what it imagines: some 250 imagined
steps for each one in the world.

    repeat:  act -> several times (update model -> imagine -> update D -> reward -> update policy)

The model, of observations o and actions a, has a state of two parts, [h, z]:

    h(t) = GRU(h(t-1), z(t-1), a(t-1))      deterministic
    z(t) ~ posterior(h(t), o(t))            Gaussian, what is seen
    z(t) ~ prior(h(t))                      Gaussian, the same guessed: this is imagination
    o(t) = decoder(h(t), z(t)), and whether the task has ended there

Where this departs from the papers, and why:

 1. The expert's actions are neither needed nor used: D sees pairs of observations, where a
    step led and how far (Torabi et al. 2018, https://arxiv.org/abs/1807.06158).
 2. D compares demonstrated pairs with decoded imagined ones, which begin in states of the replay,
    recent ones preferred. Noise on both keeps D from knowing the imagined ones by their blur. D is
    the probability of *expert*.
 3. The policy follows the gradient of its return through D and model (Dreamer, Hafner et al. 2020,
    https://arxiv.org/abs/1912.01603). Unlike in its code, the state that the policy reads is not
    detached: a step also counts for what it makes of later actions. An imagined step weighs as much
    as it is likely that the task has not ended before it, with no further discount by gamma.
    Returns bootstrap from a slow copy of the value. The policy explores by its own noise, which has
    an entropy bonus.
 4. KL balance and the scale of returns are DreamerV3's (Hafner et al. 2023,
    https://arxiv.org/abs/2301.04104v1); Gaussian latents, free nats for the batch instead of each
    state, and a value fitted to squared errors are Dreamer's. The reconstruction weighs more than
    in either: where an observation has few numbers, the return hangs on how precisely they are
    known.
 5. Rewards are softplus(logit) = -log(1 - D), less their mean, over a running std.
 6. Where the task ends an absorbing state follows (Kostrikov et al. 2019,
    https://arxiv.org/abs/1809.02925), whose reward is not learned but counted. A time limit ends an
    episode, not the task.
 7. What is evaluated and saved is a running average of model and policy (Yazici et al. 2019,
    https://arxiv.org/abs/1806.04498), which is steadier than the last ones.
 8. With --obs pixels an observation is the latents of a frame. Their autoencoder learns from
    demonstrated frames and those of random actions, then is frozen: to all else it is a sensor.

Shapes: T steps, N environments; B sequences of L observations; S imagined rollouts of H steps;
K steps in E demonstrations (L to Standardize and load_demos); O, A, M, Z numbers in o, a, h, z.

    python gail_rssm.py                                     # the default set: 18 minutes, one core
    python gail_rssm.py --num-demos 1                       # from one episode of 100 steps
    python gail_rssm.py --obs pixels                        # from frames alone
    python gail_rssm.py --evaluate runs/<run>/policy.pt     # 100 episodes, mean and sampled actions
    python gail_rssm.py --resume runs/<run>/checkpoint.pt   # go on from the last checkpoint
"""

import copy
import io
import json
import math
import os
import re
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args, get_origin

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
import wandb
from matplotlib.figure import Figure
from mujoco.batch import Batch
from torch import Generator, Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

INPUT_CLIP = 10.0  # standardized inputs are clipped to [-INPUT_CLIP, INPUT_CLIP]
STD_MIN = 0.05  # least standard deviation of latents, and of actions before tanh
DISC_NOISE = 0.1  # standard deviation of the noise on D's inputs in its updates
BURN_IN = 2  # no imagining from so many first states of a sequence: h lacks what came before
SCALE_DECAY = 0.99  # of the running scales that rewards and returns are divided by
MODEL_GRAD_NORM, ACTOR_GRAD_NORM, CRITIC_GRAD_NORM = 100.0, 1.0, 10.0  # largest norms
TARGET_RATE = 0.02  # at which the target critic moves to the critic in each update

# The rest is about --obs pixels. Steps of random actions whose frames the autoencoder learns from,
# and how many of these, and of the demonstrated ones, are in a minibatch
RANDOM_STEPS, AE_BATCH_SIZE = 1_000, 64
# How to look at a body: width and height of the picture and the height of its middle above the
# floor, in metres; degrees from above; how many of its positions are no part of its observations
CAMERAS = {
    "HalfCheetah": (2.2, 1.3, 0.56, 0, 1),
    "Hopper": (1.2, 2.0, 0.9, 0, 1),
    "Walker2d": (1.5, 2.0, 0.9, 0, 1),
    "Swimmer": (3.8, 2.2, 0.0, 90, 2),
    "Ant": (2.4, 2.0, 0.5, 45, 2),
    "Humanoid": (1.4, 1.8, 0.85, 15, 2),
}
GROUND = 27.0  # brightness of what is below the floor, seen from the side; the sky is black
POSES_AT_ONCE, FRAMES_AT_ONCE = 64, 32  # drawn in one go: so many fit the cache


@dataclass
class Args:
    seed: int = 1  # seed of networks, environments, minibatches, choice of demonstrations
    env_id: str = "HalfCheetah-v4"  # the demonstrations' environment: gymnasium's id, or module:id
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"  # demonstration set (data/README.md)
    num_demos: int = 0  # use this many demonstrated episodes, drawn by the seed (0: all)
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: gail_rssm__<env-id>__<seed>__<time>)
    resume: str = ""  # checkpoint.pt to go on from; with --total-timesteps, on a new schedule
    evaluate: str = ""  # policy.pt to evaluate, in its own task, instead of training
    eval_interval: int = 5_000  # env steps between evaluations (20 episodes, mean action)
    eval_episodes: int = 100  # episodes of the final evaluation, for mean and for sampled actions
    checkpoint_interval: int = 10_000  # env steps between checkpoints
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    cuda: bool = False  # networks on the GPU; for networks this small the CPU is faster
    threads: int = 0  # threads of the physics; networks use up to two of them (0: one per core)

    obs: Literal["state", "pixels"] = "state"  # what is seen of environment and demonstrations
    image_size: int = 56  # --obs pixels: shorter side of a frame in pixels
    latent_dim: int = 32  # --obs pixels: numbers that a frame is encoded into
    pretrain_steps: int = 1_500  # --obs pixels: steps of the autoencoder, before all else

    total_timesteps: int = 100_000  # environment steps of the whole run, in whole rollouts
    num_envs: int = 5  # parallel environments (N)
    num_steps: int = 20  # steps in each environment between updates (T)
    learning_starts: int = 1_000  # observations of finished episodes before the first update
    updates: int = 16  # updates of model, D, policy and value after each rollout
    anneal_lr: bool = True  # let all learning rates but D's fall linearly to zero over the run

    batch_size: int = 32  # replayed sequences in a batch (B)
    sequence_length: int = 16  # observations in a sequence (L)
    recent_share: float = 0.3  # share of the sequences that are drawn from recent steps alone
    recent_steps: int = 5_000  # how many of the latest observations are recent
    model_learning_rate: float = 1.5e-3  # Adam learning rate of the model
    deter_size: int = 128  # size of the model's deterministic state h (M)
    stoch_size: int = 32  # size of its stochastic state z (Z)
    model_hidden_size: int = 128  # width of the model's layers
    reconstruction_coef: float = 25.0  # weight of the squared error of decoded observations
    dynamics_coef: float = 0.5  # weight of the KL that pulls the prior to the posterior
    representation_coef: float = 0.1  # weight of the KL that pulls the posterior to the prior
    free_nats: float = 1.0  # no pull while the mean KL of the batch is below this

    horizon: int = 12  # steps to imagine (H)
    num_starts: int = 128  # replayed states to imagine from, at most (S)
    learning_rate: float = 8e-4  # Adam learning rate of policy and value
    gamma: float = 0.0  # discount factor (0: 1 - 3 / L, 0.85 to 0.99; L: demos' mean length)
    gae_lambda: float = 0.95  # lambda of the lambda-returns
    ent_coef: float = 1e-3  # weight of the policy's entropy bonus
    average_share: float = 0.02  # share of rollouts that the judged agent averages (0: the last)
    hidden_size: int = 128  # width of the two hidden layers of policy and value

    disc_learning_rate: float = 1e-3  # Adam learning rate of D
    disc_steps: int = 1  # minibatch steps of D per update
    disc_batch_size: int = 512  # demonstrated pairs, and as many imagined, in a minibatch
    disc_hidden_size: int = 128  # width of D's two hidden layers
    grad_penalty_coef: float = 0.3  # weight of D's gradient penalty

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        rollout = self.num_envs * self.num_steps
        at_least = {"total_timesteps": rollout, "sequence_length": BURN_IN + 2, "image_size": 16}
        at_most = {"seed": 2**31 - 1, "gamma": 0.9999, "gae_lambda": 1}
        at_most |= {"recent_share": 1, "average_share": 1}
        may_be_zero = "seed num_demos threads gamma gae_lambda ent_coef grad_penalty_coef"
        may_be_zero += " recent_share free_nats representation_coef average_share"  # others: > 0
        check_settings(self, may_be_zero, at_least, at_most)
        require(self.obs == "state" or body_of(self.env_id) in CAMERAS, f"--env-id is {self.env_id}"
                f", but --obs pixels draws {', '.join(CAMERAS)} alone; choose one of these.")
        require(self.image_size % 8 == 0, f"--image-size is {self.image_size}, expected a multiple "
                "of 8; change it.")
        require(torch.cuda.is_available() or not self.cuda, "--cuda was given, but PyTorch sees no "
                "GPU; drop it (--resume: --no-cuda) or install a CUDA build of torch.")
        if self.threads == 0:
            has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
            self.threads = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()


# Networks


def norm_mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers, with LayerNorm and SiLU between."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(fan_in, fan_out), nn.LayerNorm(fan_out, eps=1e-3), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class Standardize(nn.Module):
    """(x - mean) / std, clipped, in float32, with the statistics of data (L, X), saved with the
    weights. What does not vary in data becomes 0: no network sees it. Computed in float64,
    since x may be large beside its std. With `whole` all of data is within the clip."""

    def __init__(self, data: np.ndarray, whole: bool = False):
        super().__init__()
        data = data.astype(np.float64)
        mean, std = data.mean(0), data.std(0)
        if whole:
            std = np.maximum(std, np.abs(data - mean).max(0) / INPUT_CLIP)
        std[std <= 1e-7 * np.abs(mean)] = np.inf  # no more than rounding
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("std", torch.from_numpy(std))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).clamp(-INPUT_CLIP, INPUT_CLIP).float()

    def undo(self, x: Tensor) -> Tensor:
        return (self.mean + self.std.nan_to_num(posinf=0.0) * x).float()


class FrameAutoencoder(nn.Module):
    """What --obs pixels sees of raw observations (B, O): the latents of a frame drawn of each.
    `frames` (B, rows, columns) uint8 say what an average frame is, how much each pixel varies."""

    def __init__(self, render: "CapsuleRenderer", frames: Tensor, latent_dim: int):
        super().__init__()
        self.render, pixels = render, frames.float() / 255
        weight = 1 / (pixels.std(0, correction=0) + 0.03)  # a foot matters as much as the torso
        self.register_buffer("mean_frame", pixels.mean(0))
        self.register_buffer("weight", weight / weight.mean())  # of each pixel's squared error
        rows, columns = frames.shape[1] // 8, frames.shape[2] // 8
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 8, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * rows * columns, latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 32 * rows * columns),
            nn.ReLU(),
            nn.Unflatten(1, (32, rows, columns)),
            nn.Conv2d(32, 32 * 4, 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.PixelShuffle(4),
        )
        self.to(memory_format=torch.channels_last)

    def center(self, frames: Tensor) -> Tensor:
        """uint8 (B, H, W) -> floats around 0 (B, 1, H, W)."""
        return (frames.float() / 255 - self.mean_frame)[:, None]

    def reconstruction_error(self, frames: Tensor) -> Tensor:
        """Weighted mean squared error of frames (B, H, W) uint8 -> ()."""
        x = self.center(frames)
        return ((self.decoder(self.encoder(x)) - x).square() * self.weight).mean()

    @torch.no_grad()
    def forward(self, obs: np.ndarray) -> Tensor:
        pieces = self.render(obs).split(256)  # so many fit the cache
        return torch.cat([self.encoder(self.center(x)) for x in pieces])

    @torch.no_grad()
    def decode_frames(self, latents: Tensor) -> Tensor:
        """Latents -> frames (B, rows, columns), from 0 to 1."""
        return (self.decoder(latents)[:, 0] + self.mean_frame).clamp(0, 1)


class WorldModel(nn.Module):
    """The RSSM. A state (..., M + Z) is [h, z]; the parameters (..., 2 Z) of a Gaussian over z are
    its mean and its raw standard deviation."""

    def __init__(self, obs_dim: int, action_dim: int, args):
        super().__init__()
        hidden, self.deter_size = args.model_hidden_size, args.deter_size
        self.state_size = args.deter_size + args.stoch_size
        self.encoder = norm_mlp([obs_dim, hidden, hidden, hidden])
        first = nn.Linear(args.stoch_size + action_dim, hidden)
        self.gru_input = nn.Sequential(first, nn.LayerNorm(hidden, eps=1e-3), nn.SiLU())
        self.gru = nn.GRUCell(hidden, args.deter_size)
        self.prior = norm_mlp([args.deter_size, hidden, 2 * args.stoch_size])
        self.posterior = norm_mlp([args.deter_size + hidden, hidden, 2 * args.stoch_size])
        self.decoder = norm_mlp([self.state_size, hidden, hidden, obs_dim])
        self.end = norm_mlp([self.state_size, hidden, 1])  # logit of "the task has ended here"
        nn.init.constant_(self.end[-1].bias, -5.0)  # which is rare

    def recurrent_step(self, state: Tensor, action: Tensor) -> Tensor:
        """h (B, M) after an action (B, A) in a state (B, M + Z)."""
        h, z = state[:, : self.deter_size], state[:, self.deter_size :]
        return self.gru(self.gru_input(torch.cat([z, action], -1)), h)

    def prior_step(self, state: Tensor, action: Tensor, generator: Generator | None) -> Tensor:
        """A state (B, M + Z) that may follow; without a generator with the prior's mean."""
        h = self.recurrent_step(state, action)
        return torch.cat([h, sample_latent(self.prior(h), generator)], -1)

    def posterior_step(self, state: Tensor, action: Tensor, embedding: Tensor, generator):
        """The state (B, M + Z) after an action, what follows being seen (the encoder's output,
        (B, hidden)), and the parameters of its posterior (B, 2 Z)."""
        h = self.recurrent_step(state, action)
        posterior = self.posterior(torch.cat([h, embedding], -1))
        return torch.cat([h, sample_latent(posterior, generator)], -1), posterior

    def observe(self, obs: Tensor, actions: Tensor, generator: Generator | None):
        """States (B, L, M + Z), posteriors and priors (B, L, 2 Z) of sequences of standardized
        observations (B, L, O); actions[:, t], of (B, L, A), led to obs[:, t]: a(t-1) above."""
        state, states, posteriors = obs.new_zeros(len(obs), self.state_size), [], []
        for action, embedding in zip(actions.unbind(1), self.encoder(obs).unbind(1)):
            state, posterior = self.posterior_step(state, action, embedding, generator)
            states.append(state)
            posteriors.append(posterior)
        states = torch.stack(states, 1)
        return states, torch.stack(posteriors, 1), self.prior(states[..., : self.deter_size])


class Actor(nn.Module):
    """The policy: a Gaussian of a state (..., M + Z), squashed by tanh to an action (..., A)."""

    def __init__(self, state_size: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.net = norm_mlp([state_size, hidden_size, hidden_size, 2 * action_dim])
        nn.init.normal_(self.net[-1].weight, std=0.01)  # acts alike in all states at first

    def forward(self, state: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """An action (..., A) within -1 and 1, and its log-probability (...); without a generator
        tanh(mean). Both have gradients (reparametrization)."""
        mean, raw_std = self.net(state).chunk(2, dim=-1)
        mean = 3 * torch.tanh(mean / 3)  # beyond 3 tanh is flat
        std = torch.sigmoid(raw_std) + STD_MIN
        u = sample_gaussian(mean, std, generator)
        return torch.tanh(u), tanh_gaussian_log_prob(u, mean, std)


class Critic(nn.Module):
    """The value (...) of a state (..., M + Z)."""

    def __init__(self, state_size: int, hidden_size: int):
        super().__init__()
        self.net = norm_mlp([state_size, hidden_size, hidden_size, 1])
        nn.init.zeros_(self.net[-1].weight)

    def forward(self, state: Tensor) -> Tensor:
        return self.net(state).squeeze(-1)


class TransitionDiscriminator(nn.Module):
    """Logit (...) of "this is the expert's" from transitions (..., 2 O), made of standardized
    observations."""

    def __init__(self, input_dim: int, hidden_size: int):
        super().__init__()
        first, second = nn.Linear(input_dim, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.net = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Linear(hidden_size, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


class RSSMAgent(nn.Module):
    """World model and policy: all that acting needs. What is seen, raw observations or what the
    autoencoder makes of them, is standardized by demos["obs"] (K, O), actions by the bounds
    demos["low"] and ["high"] (A,)."""

    def __init__(self, demos: dict, args, autoencoder: FrameAutoencoder | None = None):
        super().__init__()
        self.autoencoder = autoencoder
        obs_dim, self.action_dim = demos["obs"].shape[1], len(demos["low"])
        self.standardize = Standardize(demos["obs"])
        self.standardize_action = Standardize(np.stack([demos["low"], demos["high"]]))
        self.model = WorldModel(obs_dim, self.action_dim, args)
        self.actor = Actor(self.model.state_size, self.action_dim, args.hidden_size)

    def see(self, obs: np.ndarray) -> Tensor:
        """Raw observations (N, O) -> standardized ones, of a state or of a frame."""
        seen = self.autoencoder(np.asarray(obs)) if self.autoencoder else torch.as_tensor(obs)
        return self.standardize(seen.to(self.standardize.mean.device))

    def initial_carry(self, num_envs: int) -> dict[str, Tensor]:
        """The state and action before an episode's first step: zeros."""
        device = self.standardize.mean.device
        return {
            "state": torch.zeros(num_envs, self.model.state_size, device=device),
            "action": torch.zeros(num_envs, self.action_dim, device=device),
        }

    @torch.no_grad()
    def act(self, obs, carry: dict, generator: Generator | None = None) -> np.ndarray:
        """What to do after raw observations (N, O): the mean action (tanh of the Gaussian's mean),
        or, with a generator, a sampled one. Keeps in `carry` what the next call goes on from."""
        state, action, carry["obs"] = carry["state"], carry["action"], self.see(obs)
        embedding = self.model.encoder(carry["obs"])
        carry["state"], _ = self.model.posterior_step(state, action, embedding, generator)
        carry["action"], _ = self.actor(carry["state"], generator)
        return self.standardize_action.undo(carry["action"]).cpu().numpy()


# The algorithm, as functions


def gaussian(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (..., Z) of a network's output (..., 2 Z)."""
    mean, raw_std = parameters.chunk(2, dim=-1)
    return mean, F.softplus(raw_std + 0.54) + STD_MIN  # at first near 1


def sample_gaussian(mean: Tensor, std: Tensor, generator: Generator | None) -> Tensor:
    """A draw from N(mean, std^2) with gradients to both; without a generator the mean."""
    if generator is None:
        return mean
    return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)


def sample_latent(parameters: Tensor, generator: Generator | None) -> Tensor:
    """z (..., Z) of a prior's or posterior's parameters (..., 2 Z)."""
    return sample_gaussian(*gaussian(parameters), generator)


def tanh_gaussian_log_prob(u: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log p(tanh(u)) with u ~ N(mean, std^2), summed over the last axis: (..., A) -> (...)
    (Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905, appendix C)."""
    log_prob = -0.5 * ((u - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), without overflow
    return (log_prob - log_slope).sum(-1)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of diagonal Gaussians with parameters (..., 2 Z) -> (...)."""
    (p_mean, p_std), (q_mean, q_std) = gaussian(p), gaussian(q)
    ratio = p_std / q_std
    shift = (p_mean - q_mean) / q_std
    return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum(-1)


def balanced_kl(posterior: Tensor, prior: Tensor, weight: Tensor, args) -> tuple[Tensor, float]:
    """KL(posterior || prior) twice, to train the prior and the posterior with weights of their own
    (Hafner et al. 2023), and its value; weight (B, L) has a sum of 1."""
    dynamics = (weight * kl_divergence(posterior.detach(), prior)).sum()
    representation = (weight * kl_divergence(posterior, prior.detach())).sum()
    loss = args.dynamics_coef * dynamics.clamp(min=args.free_nats)
    loss = loss + args.representation_coef * representation.clamp(min=args.free_nats)
    return loss, dynamics.item()


def gradient_penalty(disc: nn.Module, expert: Tensor, policy: Tensor, mix: Tensor) -> Tensor:
    """Mean of (|d logit/dx| - 1)^2 at x = mix * expert + (1 - mix) * policy (Gulrajani et al. 2017,
    https://arxiv.org/abs/1704.00028, equation 3), one mix and one norm for each of the B inputs."""
    x = (mix * expert + (1 - mix) * policy).requires_grad_(True)
    (grad,) = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=-1) - 1).square().mean()


def discriminator_loss(expert_logit: Tensor, policy_logit: Tensor) -> Tensor:
    """-E_expert[log D] - E_policy[log(1 - D)] with D = sigmoid(logit): (B,), (B,) -> ()
    (Ho & Ermon 2016, equation 17, whose D is 1 - ours). It is 2 log 2 when D cannot tell."""
    return F.softplus(-expert_logit).mean() + F.softplus(policy_logit).mean()


def terminal_logits(expert: Tensor, policy: Tensor) -> Tensor:
    """What to add to D's logit of each real step, and the logit of the absorbing state, (2,), from
    counts (2,) of real and of absorbing steps, of expert and policy. An episode that was terminated
    spends what is left until its time limit in the absorbing state.

    The best D's logit at a step x is log p_expert(x) - log p_policy(x) (Goodfellow et al. 2014,
    proposition 1). D is trained on as many real steps of the one as of the other, so what its logit
    lacks is the log ratio of their shares of real steps; that of their shares of absorbing steps is
    the other logit. To keep all finite, half a step is added to each count of the policy's, and one
    step to the expert's, split as the policy's are: ends that nobody demonstrated do not pay."""
    policy = (policy + 0.5) / (policy + 0.5).sum()
    expert = (expert + policy) / (expert + policy).sum()
    return torch.log(expert / policy)


def lambda_returns(rewards, values, continues, absorbing_value, gamma, gae_lambda) -> Tensor:
    """Returns of H imagined steps (DreamerV2, Hafner et al. 2021, https://arxiv.org/abs/2010.02193,
    equation 4), all (H, S): rewards; values of the states that they lead to; the probability that
    the task continues there. Where it does not, absorbing_value is what follows. gae_lambda 1 looks
    as far as was imagined, 0 one step."""
    returns, ahead = torch.empty_like(rewards), values[-1]
    for t in reversed(range(len(rewards))):
        ahead = (1 - gae_lambda) * values[t] + gae_lambda * ahead
        ahead = rewards[t] + gamma * (continues[t] * ahead + (1 - continues[t]) * absorbing_value)
        returns[t] = ahead
    return returns


@torch.no_grad()
def polyak_update(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow = (1 - rate) * slow + rate * fast, in place, for parameters
    (not for buffers, such as BatchNorm's statistics)."""
    for slow_parameter, parameter in zip(slow.parameters(), fast.parameters()):
        slow_parameter.lerp_(parameter, rate)


def transitions(obs: Tensor) -> Tensor:
    """What D sees of H steps, (H + 1, ..., O) -> (H, ..., 2 O): where each led, and how far."""
    return torch.cat([obs[1:], obs[1:] - obs[:-1]], dim=-1)


def replay_rows(rows: Tensor, action_dim: int, terminated: bool) -> dict[str, Tensor]:
    """What the replay keeps of an episode of T steps, from rows (T + 1, O + A): standardized
    observations and the action that led to each (zeros to the first); whether the task ended there,
    how many steps came before and how many were left."""
    step = torch.arange(len(rows), device=rows.device)
    left = step.flip(0)
    columns = {"obs": rows[:, :-action_dim], "action": rows[:, -action_dim:]}
    return columns | {"terminated": (left == 0) & terminated, "step": step, "left": left}


def count_visits(replay: dict[str, Tensor], limit: int) -> Tensor:
    """Counts (2,) of real and of absorbing steps, of all episodes."""
    steps_left = (limit - replay["step"])[replay["terminated"]].sum()
    return torch.stack([(replay["step"] > 0).sum(), steps_left]).cpu()


def draw_sequences(replay: dict[str, Tensor], args, generator: Generator) -> dict[str, Tensor]:
    """B sequences of L rows, none of two episodes: {name: (B, L, ...)}. Where an episode is too
    short its last row is repeated, and not "inside". Imagination may begin at "starts": there the
    task goes on, and BURN_IN rows came before, or the episode began with the sequence."""
    shape, length, size = (args.batch_size,), args.sequence_length, len(replay["obs"])
    recent = torch.rand(shape, generator=generator) < args.recent_share
    oldest = recent * max(0, size - args.recent_steps)
    row = oldest + (torch.rand(shape, generator=generator) * (size - oldest)).long()
    begin = row - torch.randint(length, shape, generator=generator)
    row, begin = row.to(replay["obs"].device), begin.to(replay["obs"].device)
    first, last = row - replay["step"][row], row + replay["left"][row]
    begin = torch.maximum(torch.minimum(begin, last + 1 - length), first)
    step = torch.arange(length, device=row.device)
    inside = begin[:, None] + step <= last[:, None]
    rows = torch.minimum(begin[:, None] + step, last[:, None])
    batch = {name: replay[name][rows] for name in ("obs", "action", "terminated")}
    warm = (step >= BURN_IN) | (begin == first)[:, None]
    return batch | {"inside": inside, "starts": inside & warm & ~batch["terminated"]}


# The steps of the loop


@torch.no_grad()
def collect_episodes(envs, agent: RSSMAgent, episodes: dict, replay, num_steps: int, generator):
    """Act for T steps in N environments; episodes that end go into the replay -> log. `episodes`
    goes on from one call to the next: "obs" (N, O), the latest; "carry" of the agent; and for each
    environment "return" so far, and "rows" for the replay, (O + A,) each."""
    finished, carry = [], episodes["carry"]
    for _ in range(num_steps):
        check_finite(envs, episodes["obs"].numpy(), [len(rows) for rows in episodes["rows"]])
        led_here = carry["action"]  # no action led to an episode's first observation: zeros
        executed = agent.act(episodes["obs"], carry, generator)
        obs, reward, terminated, truncated, info = envs.step(executed)
        episodes["obs"] = torch.from_numpy(obs)
        for i, row in enumerate(torch.cat([carry["obs"], led_here], dim=-1).cpu()):
            episodes["rows"][i].append(row)
            episodes["return"][i] += float(reward[i])
        for i in np.flatnonzero(terminated | truncated):
            final_obs = info["final_obs"][i][None]
            check_finite(envs, final_obs, len(episodes["rows"][i]))
            final = torch.cat([agent.see(final_obs)[0], carry["action"][i]]).cpu()
            rows = torch.stack([*episodes["rows"][i], final]).to(replay["obs"].device)
            for name, x in replay_rows(rows, agent.action_dim, bool(terminated[i])).items():
                replay[name] = torch.cat([replay[name], x])
            finished.append(episodes["return"][i])
            episodes["rows"][i], episodes["return"][i] = [], 0.0
            for x in carry.values():  # the agent forgets
                x[i] = 0.0
    return {"charts/episodic_return": np.mean(finished).item()} if finished else {}


def pretrain_autoencoder(autoencoder: FrameAutoencoder, envs, demos: dict, args, generator) -> None:
    """Train the autoencoder on demonstrated frames and those of random actions, half and half; then
    it is frozen, so that what has been seen stays what it was."""
    envs.action_space.seed(args.seed)
    seen = [envs.reset(seed=args.seed)[0]]
    for _ in range(RANDOM_STEPS // envs.num_envs):
        seen.append(envs.step(envs.action_space.sample())[0])
        check_finite(envs, seen[-1], len(seen) - 1)
    kinds = [autoencoder.render(demos["observations"]), autoencoder.render(np.concatenate(seen))]
    optimizer = Adam(autoencoder.parameters(), lr=1e-3, fused=True)
    for i in tqdm(range(args.pretrain_steps), desc="pretraining", disable=None):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 2 - 2 * i / args.pretrain_steps)
        rows = [torch.randint(len(x), (AE_BATCH_SIZE,), generator=generator) for x in kinds]
        frames = torch.cat([x[i.to(x.device)] for x, i in zip(kinds, rows)])
        optimizer_step(optimizer, autoencoder.reconstruction_error(frames), math.inf)


def optimizer_step(optimizer, loss: Tensor, max_norm: float) -> None:
    """One step of an optimizer; nothing but its own parameters gets a gradient."""
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


def update_model(model: WorldModel, optimizer, batch: dict, args, generator):
    """One step on replayed sequences -> their states (B, L, M + Z), log."""
    states, posterior, prior = model.observe(batch["obs"], batch["action"], generator)
    weight = batch["inside"] / batch["inside"].sum()
    error = (weight * (model.decoder(states) - batch["obs"]).square().sum(-1)).sum()
    kl_loss, kl = balanced_kl(posterior, prior, weight, args)
    end_logit, ended = model.end(states).squeeze(-1), batch["terminated"].float()
    end_error = F.binary_cross_entropy_with_logits(end_logit, ended, weight, reduction="sum")
    loss = args.reconstruction_coef * error + kl_loss + end_error
    optimizer_step(optimizer, loss, MODEL_GRAD_NORM)
    return states.detach(), {
        "model/loss": loss.item(),
        "model/reconstruction": error.item() / batch["obs"].shape[-1],
        "model/kl": kl,
        "model/end": end_error.item(),
    }


def imagine(agent: RSSMAgent, starts: Tensor, args, generator) -> dict[str, Tensor]:
    """Roll out the policy in the model from some of the replayed states (..., M + Z), with
    gradients: "states" (H + 1, S, M + Z), "obs" (H + 1, S, O), "log_prob" (H, S) of the actions,
    "continues" (H, S), the probability that the task goes on after a step, and "alive" (H, S), that
    it has gone on until then."""
    chosen = torch.randperm(len(starts), generator=generator)[: args.num_starts]
    states, log_probs = [starts[chosen.to(starts.device)]], []
    for _ in range(args.horizon):
        action, log_prob = agent.actor(states[-1], generator)
        states.append(agent.model.prior_step(states[-1], action, generator))
        log_probs.append(log_prob)
    states = torch.stack(states)
    continues = torch.sigmoid(-agent.model.end(states[1:])).squeeze(-1)
    alive = torch.cat([torch.ones_like(continues[:1]), continues[:-1]]).cumprod(0)
    rollout = {"states": states, "log_prob": torch.stack(log_probs), "continues": continues}
    return rollout | {"obs": agent.model.decoder(states), "alive": alive.detach()}


def update_transition_discriminator(disc, optimizer, expert, imagined: dict, args, generator):
    """Steps of D on demonstrated transitions (K, 2 O) and imagined ones -> log of the last."""
    policy, size = transitions(imagined["obs"].detach()), args.disc_batch_size
    policy = policy[imagined["alive"] > 0.5]  # what comes after an end is not seen either
    for _ in range(args.disc_steps):
        expert_x = expert[torch.randint(len(expert), (size,), generator=generator)]
        policy_x = policy[torch.randint(len(policy), (size,), generator=generator)]
        noise = DISC_NOISE * torch.randn((2, *policy_x.shape), generator=generator)
        x = torch.stack([expert_x, policy_x]) + noise.to(policy.device)
        mix = torch.rand((size, 1), generator=generator).to(policy.device)
        expert_logit, policy_logit = disc(x)
        penalty = gradient_penalty(disc, *x, mix)
        loss = discriminator_loss(expert_logit, policy_logit)
        optimizer_step(optimizer, loss + args.grad_penalty_coef * penalty, math.inf)
    return {
        "disc/loss": loss.item(),
        "disc/expert_prob": torch.sigmoid(expert_logit).mean().item(),
        "disc/policy_prob": torch.sigmoid(policy_logit).mean().item(),
        "disc/expert_acc": (expert_logit > 0).float().mean().item(),
        "disc/policy_acc": (policy_logit < 0).float().mean().item(),
        "disc/grad_penalty": penalty.item(),
    }


def compute_imagined_rewards(imagined: dict, batch: dict, disc, visits: dict, scales: dict):
    """{"steps": rewards of imagined steps (H, S), with gradients, "absorbing": that of each step
    after an end}, log. `visits` is what terminal_logits takes; "reward" of `scales` is a running
    standard deviation."""
    offset, absorbing_logit = terminal_logits(**visits)
    reward = F.softplus(disc(transitions(imagined["obs"])) + offset)
    absorbing = F.softplus(absorbing_logit).item()
    with torch.no_grad():  # what really happened, to compare
        replayed_logit = disc(transitions(batch["obs"].transpose(0, 1)))[batch["inside"].T[1:]]
    counted = reward[imagined["alive"] > 0.5]
    mean, std = counted.mean().item(), counted.std(correction=0).item()
    scales["reward"] = SCALE_DECAY * scales["reward"] + (1 - SCALE_DECAY) * std
    scale = max(scales["reward"], 1e-3)  # a constant must not become huge
    return {"steps": (reward - mean) / scale, "absorbing": (absorbing - mean) / scale}, {
        "reward/gail_mean": mean,
        "reward/gail_std": std,
        "reward/absorbing": absorbing,
        "reward/replayed_mean": F.softplus(replayed_logit + offset).mean().item(),
        "disc/replayed_prob": torch.sigmoid(replayed_logit).mean().item(),
    }


def update_actor_critic(critic, target_critic, optimizers, imagined, rewards, scales, args):
    """One step of the policy up the gradient of its imagined returns, one of the value towards
    them -> log. "return" of `scales` is a running range, from the 5th to the 95th percentile."""
    states, alive, log_prob = imagined["states"], imagined["alive"], imagined["log_prob"]
    values, continues = target_critic(states[1:]), imagined["continues"]
    absorbing_value = rewards["absorbing"] / (1 - args.gamma)  # at every step that follows
    returns = lambda_returns(
        rewards["steps"], values, continues, absorbing_value, args.gamma, args.gae_lambda
    )
    low, high = (returns.detach().quantile(share).item() for share in (0.05, 0.95))
    scales["return"] = SCALE_DECAY * scales["return"] + (1 - SCALE_DECAY) * (high - low)
    objective = returns / max(scales["return"], 1.0) - args.ent_coef * log_prob
    policy_loss = -(alive * objective).mean()
    optimizer_step(optimizers["actor"], policy_loss, ACTOR_GRAD_NORM)
    value = critic(states[:-1].detach())
    value_loss = (alive * (value - returns.detach()).square()).mean()
    optimizer_step(optimizers["critic"], value_loss, CRITIC_GRAD_NORM)
    polyak_update(target_critic, critic, TARGET_RATE)
    return {
        "losses/policy_loss": policy_loss.item(),
        "losses/value_loss": value_loss.item(),
        "losses/entropy": -log_prob.mean().item(),
        "losses/return": returns.mean().item(),
        "losses/value": value.mean().item(),
    }


# Training


def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; returns what summary.json holds."""
    args = copy.copy(args)  # the caller's stay as they are
    args.check()
    torch.set_num_threads(min(args.threads, 2))  # faster than one
    torch.manual_seed(args.seed)  # of the networks' first weights; all else draws from generator
    generator = Generator().manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    demos = load_demos(args, required=["observations"])
    if args.gamma == 0:  # 1 / (1 - gamma) steps: a third of an episode
        args.gamma = min(1 - 3 / max(demos["lengths"].mean().item(), 20), 0.99)
    envs = make_envs(demos, args.num_envs, args.threads)
    match_spaces(demos, envs)
    pretraining = RANDOM_STEPS if args.obs == "pixels" else 0  # environment steps
    rollout_size, limit = args.num_envs * args.num_steps, demos["max_episode_steps"]
    rounds = math.ceil(args.learning_starts / (args.num_envs * (limit + 1)))  # of whole episodes
    least = pretraining + rollout_size * math.ceil(rounds * limit / args.num_steps)
    require(args.total_timesteps >= least, f"--total-timesteps is {args.total_timesteps}, expected "
            f"{least} or more (only finished episodes are learned from); give more.")
    demos["random_return"] = evaluate(None, demos, 20, args.seed, args.threads)[-1].mean().item()
    autoencoder = None
    if args.obs == "pixels":
        render = CapsuleRenderer(envs, args.image_size, args.threads).to(device)
        frames = render(demos["observations"])
        autoencoder = FrameAutoencoder(render, frames, args.latent_dim).to(device)
    saved = {"rows": [], "seconds": 0.0, "wandb_id": None, "simulator": None}
    saved["scales"] = {"reward": 1.0, "return": 1.0}
    if args.resume:
        saved = load_file(args.resume, "--resume", "gail_rssm checkpoint")
        free = {x: getattr(args, x) for x in ("resume", "total_timesteps", "threads", "cuda")}
        require(saved["args"] | free == vars(args), "--resume takes all but --total-timesteps, "
                "--threads and --cuda from the checkpoint; drop the other flags.")
    rows, seconds, scales = saved["rows"], saved["seconds"], saved["scales"]
    num_iterations = (args.total_timesteps - pretraining) // rollout_size
    summary = Path(args.resume).parent / "summary.json"
    finished = len(rows) == num_iterations and summary.exists()
    require(len(rows) <= num_iterations and not finished, "--resume: this run has come that far; "
            "give a greater --total-timesteps.")
    start = time.perf_counter() - seconds
    if not args.resume:
        run_dir = open_run("gail_rssm", args, None)  # before minutes of pretraining
        if autoencoder:
            pretrain_autoencoder(autoencoder, envs, demos, args, generator)
    if autoencoder:
        demos["obs"] = autoencoder(demos["obs"]).cpu().numpy()
    agent, obs_dim = RSSMAgent(demos, args, autoencoder).to(device), demos["obs"].shape[1]
    critic = Critic(agent.model.state_size, args.hidden_size).to(device)
    target_critic = copy.deepcopy(critic)  # follows it slowly; returns bootstrap from it
    disc = TransitionDiscriminator(2 * obs_dim, args.disc_hidden_size).to(device)
    slow = RSSMAgent(demos, args, autoencoder).to(device)  # agent's running average
    nets = {"model": agent.model, "actor": agent.actor, "critic": critic}
    lrs = dict.fromkeys(nets, args.learning_rate) | {"model": args.model_learning_rate}
    optimizers = {x: Adam(nets[x].parameters(), lrs[x], eps=1e-5, fused=True) for x in nets}
    optimizers["disc"] = Adam(disc.parameters(), args.disc_learning_rate, (0.5, 0.99), fused=True)
    no_rows = torch.zeros(0, obs_dim + agent.action_dim)
    replay = replay_rows(no_rows, agent.action_dim, False)

    learners = {"agent": agent, "slow": slow, "critic": critic, "disc": disc}
    learners["target_critic"] = target_critic
    learners |= {f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}
    if args.resume:
        for name, learner in learners.items():
            learner.load_state_dict(saved[name])
        replay = saved["replay"]
        generator.set_state(saved["generator"])
        run_dir = open_run("gail_rssm", args, saved["wandb_id"])  # it is whole, and fits
    replay = {name: x.to(device) for name, x in replay.items()}
    demo_seen = agent.see(demos["observations"]).split((demos["lengths"] + 1).tolist())
    expert = torch.cat([transitions(x) for x in demo_seen])
    steps_left = (limit - demos["lengths"])[demos["terminated"]].sum()
    expert_visits = torch.tensor([len(expert), steps_left])
    obs, _ = envs.reset(seed=args.seed + len(rows))
    episodes = {"obs": torch.from_numpy(obs), "carry": agent.initial_carry(args.num_envs)}
    episodes |= {"rows": [[] for _ in obs], "return": [0.0] * args.num_envs}
    if saved["simulator"]:  # BatchHalfCheetah's; others cannot be saved: new episodes
        envs.set_state(saved["simulator"])
        episodes = saved["episodes"]
        episodes["carry"] = {name: x.to(device) for name, x in episodes["carry"].items()}

    todo = range(len(rows), num_iterations)
    bar = tqdm(todo, initial=len(rows), total=num_iterations, unit="rollout", disable=None)
    for iteration in bar:
        if args.anneal_lr:
            for name, lr in lrs.items():
                optimizers[name].param_groups[0]["lr"] = lr * (1 - iteration / num_iterations)
        log = collect_episodes(envs, agent, episodes, replay, args.num_steps, generator)
        visits = {"expert": expert_visits, "policy": count_visits(replay, limit)}
        for _ in range(args.updates if len(replay["obs"]) >= args.learning_starts else 0):
            batch = draw_sequences(replay, args, generator)
            states, model_log = update_model(
                agent.model, optimizers["model"], batch, args, generator
            )
            imagined = imagine(agent, states[batch["starts"]], args, generator)
            disc_log = update_transition_discriminator(
                disc, optimizers["disc"], expert, imagined, args, generator
            )
            rewards, reward_log = compute_imagined_rewards(imagined, batch, disc, visits, scales)
            policy_log = update_actor_critic(
                critic, target_critic, optimizers, imagined, rewards, scales, args
            )
            log |= model_log | disc_log | reward_log | policy_log
        polyak_update(slow, agent, 1 / (1 + args.average_share * iteration))

        step, last = pretraining + (iteration + 1) * rollout_size, iteration == num_iterations - 1
        losses = [name for name in log if name.startswith(("losses/", "disc/", "model/"))]
        bad = [name for name in losses if not math.isfinite(log[name])]
        finite = all(x.isfinite().all() for net in nets.values() for x in net.parameters())
        require(finite and not bad, f"training diverged at step {step}: "
                f"{', '.join(bad) or 'weights'} not finite; start again with smaller learning "
                "rates (the last checkpoint is older).")
        if last or step % args.eval_interval < rollout_size:  # passed a multiple
            returns = evaluate(slow, demos, 20, args.seed + 10_000, args.threads)[-1]
            log |= return_metrics(returns, demos)
            bar.set_postfix_str(f"return {returns.mean():.0f}")
        seconds = time.perf_counter() - start
        log["charts/learning_rate"] = optimizers["actor"].param_groups[0]["lr"]
        log["charts/SPS"] = step / seconds
        numbers = {name: x for name, x in log.items() if math.isfinite(x)}  # returns may be unknown
        rows.append({"global_step": step} | numbers)
        if args.track:
            wandb.log(rows[-1], step=step, commit=True)
        if last or step % args.checkpoint_interval < rollout_size:
            checkpoint = {name: learner.state_dict() for name, learner in learners.items()}
            checkpoint |= {  # tensors and plain containers: load_file reads nothing else
                "kind": "gail_rssm checkpoint",
                "args": vars(args),
                "replay": replay,
                "scales": scales,
                "generator": generator.get_state(),
                "simulator": envs.get_state() if isinstance(envs, BatchHalfCheetah) else None,
                "episodes": episodes,
                "rows": rows,
                "seconds": seconds,
                "wandb_id": wandb.run.id if args.track else None,
            }
            policy = {"kind": "gail_rssm policy", "args": vars(args), "agent": slow.state_dict()}
            policy |= {name: demos[name] for name in ("env_id", "max_episode_steps")}
            write_csv(rows, run_dir / "metrics.csv")
            save_atomically(policy, run_dir / "policy.pt")
            save_atomically(checkpoint, run_dir / "checkpoint.pt")
    envs.close()
    plot_imagination(slow, demos, run_dir / "imagination.png")
    return report(slow, demos, rows, seconds, args, run_dir)


# --- Plumbing: demonstrations and environments ---


def load_demos(args, required: list[str]) -> dict:
    """Arrays and metadata of a demonstration set (docs/own_demonstrations.md), cut to --num-demos
    episodes that the seed draws. Adds "obs" (L, O), from before each action, and "returns" (E,),
    NaN without rewards. UserError where the set is damaged, incomplete or of another task."""
    path = Path(args.demos)
    if not path.exists():
        path = Path(__file__).parent / args.demos  # whatever folder the script is called from
    try:
        with np.load(path, allow_pickle=False) as file:
            demos = dict(file)
        demos |= json.loads(str(demos.pop("metadata")))
        lengths, limit = demos["lengths"], int(demos["max_episode_steps"])
        # what stands before a colon is the module that registers the environment
        recorded_in, env_id = (x.split(":")[-1] for x in (demos["env_id"], args.env_id))
        if recorded_in.rsplit("-v", 1)[0] != env_id.rsplit("-v", 1)[0]:
            raise ValueError(f"recorded in {recorded_in}, but --env-id is {args.env_id}")
        if lengths.ndim != 1 or lengths.dtype.kind != "i" or lengths.min(initial=1) < 1:
            raise ValueError("'lengths' must be (E,) int64, each episode of 1 step or more")
        if lengths.max(initial=0) > limit:
            raise ValueError(f"an episode has {lengths.max()} steps, max_episode_steps is {limit}")
        count = args.num_demos or len(lengths)
        if not 0 < count <= len(lengths):
            raise ValueError(f"--num-demos is {count}, but it holds {len(lengths)} episodes")
        drawn = np.random.default_rng(args.seed).choice(len(lengths), count, replace=False)
        episodes = np.isin(np.arange(len(lengths)), drawn)
        steps, states = np.repeat(episodes, lengths), np.repeat(episodes, lengths + 1)
        rows = {"observations": states, "frames": states, "actions": steps, "rewards": steps}
        rows |= {"lengths": episodes, "terminated": episodes, "truncated": episodes}
        needed = {"terminated", "truncated", *required}
        for name in sorted(rows.keys() & (needed | demos.keys())):
            x, wanted = demos[name], len(rows[name])
            if x.shape[:1] != (wanted,) or not (np.isfinite(x).all() or name == "rewards"):
                found = f"'{name}' is {x.dtype} of shape {x.shape}"
                raise ValueError(f"{found}, expected {wanted} rows of finite numbers")
            if name in ("terminated", "truncated") and (x.dtype != bool or x.ndim > 1):
                raise ValueError(f"'{name}' is {x.dtype} of shape {x.shape}, expected (E,) bool")
            demos[name] = x[rows[name]]
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        missing = isinstance(error, KeyError)
        why = f"the field {error} is missing" if missing else reason(error)
        raise UserError(f"--demos {args.demos}: {why}; see docs/own_demonstrations.md.") from None
    if recorded_in != env_id:
        warnings.warn(f"demonstrations of {recorded_in} are used in {args.env_id}")
    if "observations" in demos:
        final = np.cumsum(demos["lengths"] + 1) - 1
        demos["obs"] = np.delete(demos["observations"], final, axis=0).astype(np.float64)
    rewards = demos.get("rewards", np.full(demos["lengths"].sum(), np.nan)).astype(np.float64)
    demos["returns"] = np.add.reduceat(rewards, np.cumsum(demos["lengths"]) - demos["lengths"])
    return demos | {"env_id": args.env_id, "max_episode_steps": limit}


class BatchHalfCheetah(gym.vector.VectorEnv):
    """N HalfCheetah-v4 on MuJoCo's native threads: gymnasium's, step for step (a test says so), but
    faster, and bit-identical at any number of threads. An ended episode resets in the same step."""

    def __init__(self, num_envs: int, max_episode_steps: int, threads: int):
        mujoco.set_mju_user_warning(lambda message: None)  # the model has a deprecated attribute
        path = Path(gym.__file__).parent / "envs/mujoco/assets/half_cheetah.xml"
        self.model = mujoco.MjModel.from_xml_path(str(path))
        mujoco.set_mju_user_warning(None)
        self.batch = Batch(self.model, num_envs, threads)
        self.qpos, self.qvel, self.ctrl = map(self.batch.bind, ("qpos", "qvel", "ctrl"))  # views
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.spec = gym.spec("HalfCheetah-v4")
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (17,), np.float64)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (6,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (num_envs, 6), np.float32)
        self.elapsed, self.rng = np.zeros(num_envs, np.int64), np.random.default_rng()

    def states(self) -> np.ndarray:
        """(N, 18): positions, the root's x first, then velocities. All but x is observed."""
        return np.concatenate([self.qpos, self.qvel], axis=1)

    def restart(self, ids: np.ndarray) -> None:
        self.batch.reset(ids, stage=mujoco.mjtStage.mjSTAGE_NONE)
        self.qpos[ids] = self.model.qpos0 + self.rng.uniform(-0.1, 0.1, (len(ids), 9))
        self.qvel[ids] = 0.1 * self.rng.standard_normal((len(ids), 9))
        self.elapsed[ids] = 0

    def reset(self, *, seed: int | None = None, options=None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.restart(np.arange(self.num_envs))
        return self.states()[:, 1:], {}

    def step(self, actions: np.ndarray):
        x_before = self.qpos[:, 0].copy()
        self.ctrl[:] = actions
        self.batch.step(nstep=5)  # of 0.01 s
        final_states = self.states()
        rewards = (self.qpos[:, 0] - x_before) / 0.05 - 0.1 * np.square(self.ctrl).sum(axis=1)
        self.elapsed += 1
        truncated = self.elapsed >= self.max_episode_steps
        if truncated.any():
            self.restart(np.flatnonzero(truncated))
        info = {"final_obs": final_states[:, 1:], "final_states": final_states}
        return self.states()[:, 1:], rewards, np.zeros_like(truncated), truncated, info

    def get_state(self) -> dict:
        """All that the simulations need to go on bit for bit, warm starts included."""
        state, rng = torch.from_numpy(self.batch.state.copy()), self.rng.bit_generator.state
        return {"state": state, "elapsed": self.elapsed.tolist(), "rng": rng}

    def set_state(self, saved: dict) -> None:
        self.batch.state[:], self.elapsed[:] = saved["state"].numpy(), saved["elapsed"]
        self.rng.bit_generator.state = saved["rng"]


def make_envs(task: dict, num_envs: int, threads: int):
    """N environments task["env_id"] with episodes of at most task["max_episode_steps"]: the fast
    HalfCheetah-v4, or gymnasium's. UserError unless observations are flat, and actions flat or
    discrete."""
    env_id, limit = task["env_id"], task["max_episode_steps"]
    if env_id == "HalfCheetah-v4":
        return BatchHalfCheetah(num_envs, limit, threads)
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    try:
        envs = gym.make_vec(env_id, num_envs, "sync", same_step, max_episode_steps=limit)
    except (gym.error.Error, ImportError) as error:
        raise UserError(f"--env-id {env_id}: {reason(error)}; give a registered id, "
                        "or module:id.") from None
    obs, actions = envs.single_observation_space, envs.single_action_space
    flat = [isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in (obs, actions)]
    require(flat[0], f"--env-id {env_id}: its observations are {obs}, expected a flat Box; put "
            "gymnasium.wrappers.FlattenObservation around it (docs/own_demonstrations.md).")
    discrete = isinstance(actions, gym.spaces.Discrete) and actions.start == 0
    require(discrete or (flat[1] and actions.dtype.kind == "f"), f"--env-id {env_id}: its actions "
            f"are {actions}, expected a flat Box of floats, or Discrete from 0; choose another.")
    return envs


def match_spaces(demos: dict, envs) -> None:
    """Hold demonstrations against the environment that they are of. Sets "low" and "high" (A,)."""
    space, shape = envs.single_action_space, envs.single_observation_space.shape
    found = demos["observations"].shape[1:]
    require(found == shape, f"--demos: each row of its observations has shape {found}, the "
            f"environment's {shape}; give demonstrations of this environment.")
    constant = np.flatnonzero(Standardize(demos["obs"]).std.isinf())
    if len(constant):
        warnings.warn(f"observations {constant} never vary in the demonstrations: left out")
    bounded = isinstance(space, gym.spaces.Box) and space.is_bounded()
    require(bounded, f"--env-id {demos['env_id']}: its actions are {space}, expected a flat Box "
            "with finite bounds; use gail_state_seq.py.")
    demos |= {"low": space.low.astype(np.float64), "high": space.high.astype(np.float64)}


def body_of(env_id: str) -> str:
    """HalfCheetah of HalfCheetah-v4, and of my_envs:HalfCheetah-v0."""
    return re.split("[:/]", env_id)[-1].rsplit("-v", 1)[0]


def frame_size(shorter: int, width: float, height: float) -> tuple[int, int]:
    """Height and width in pixels of a frame whose sides are as these; both are multiples of 8."""
    longer = 8 * round(shorter * max(width, height) / min(width, height) / 8)
    return (shorter, longer) if width > height else (longer, shorter)


class CapsuleRenderer(nn.Module):
    """Draws bodies made of capsules and spheres for whole batches, on whatever device. The camera
    is far off (an orthographic projection: a capsule's picture is a flat capsule) and runs along
    with the centre of mass. MuJoCo tells where the G capsules and spheres are."""

    def __init__(self, envs, image_size: int, threads: int):
        super().__init__()
        *view, self.look_at_height, degrees, self.unobserved = CAMERAS[body_of(envs.spec.id)]
        if isinstance(envs, BatchHalfCheetah):
            model = envs.model
        else:
            (obs, _), env = envs.envs[0].reset(), envs.envs[0].unwrapped
            data = getattr(env, "data", None)  # MuJoCo's, or not
            positions = data.qpos[self.unobserved :] if isinstance(data, mujoco.MjData) else []
            same = 0 < len(positions) <= len(obs) and np.allclose(obs[: len(positions)], positions)
            require(same, f"--env-id {envs.spec.id}: its observations do not begin with a body's "
                    "positions, as those of gymnasium's task do, so it cannot be drawn; use "
                    "gail_pixels_ae.py --frames render.")
            model = env.model
        self.height, self.width = frame_size(image_size, *view)
        self.sizes, self.pixel = [(self.height, self.width)], view[1] / self.height  # metres
        self.obs_shape = envs.single_observation_space.shape

        self.batch = Batch(model, POSES_AT_ONCE, threads)
        self.qpos, self.positions, self.rotations, self.centers_of_mass = map(
            self.batch.bind, ("qpos", "geom_xpos", "geom_xmat", "subtree_com")
        )
        kinds = mujoco.mjtGeom
        plane, sphere = int(kinds.mjGEOM_PLANE), int(kinds.mjGEOM_SPHERE)
        capsule = int(kinds.mjGEOM_CAPSULE)
        self.geoms = np.flatnonzero((model.geom_type != plane) & (model.geom_rgba[:, 3] > 0))
        for i in self.geoms:
            require(model.geom_type[i] in (sphere, capsule), f"--env-id {envs.spec.id}: its geom "
                    f"'{model.geom(i).name}' is neither capsule nor sphere, which are all that can "
                    "be drawn; use gail_pixels_ae.py --frames render.")
        is_capsule = model.geom_type[self.geoms] == capsule
        self.half_lengths = np.where(is_capsule, model.geom_size[self.geoms, 1], 0.0)[:, None]
        red, _, blue, _ = model.geom_rgba[self.geoms].T
        brightness = 255 * np.clip(2 * red - 1.7 * blue, 0.3, 1.0)  # left and right legs differ
        self.looks = np.stack([model.geom_size[self.geoms, 0], brightness], axis=1)  # and radius
        sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
        self.axes = np.array([[1, 0, 0], [0, sin, cos], [0, cos, -sin]])  # right, up, away from us

        rows = ((self.height - 1) / 2 - torch.arange(self.height)) * self.pixel  # metres, upwards
        self.register_buffer("rows", rows[:, None])
        columns = (torch.arange(self.width) + 0.5 - self.width / 2) * self.pixel
        self.register_buffer("columns", columns)
        below = (0.5 - (rows + self.look_at_height) / self.pixel).clamp(0, 1) * (degrees == 0)
        self.register_buffer("background", (GROUND * below)[:, None].repeat(1, self.width))

    def prepare(self, obs: np.ndarray) -> Tensor:
        """Observations (B, O), which begin with positions -> poses (B, G, 6), the farthest first:
        middle (right, up), half axis (right, up) and radius, in metres; brightness."""
        positions = obs[:, : self.qpos.shape[1] - self.unobserved]
        bad = np.flatnonzero(~np.isfinite(positions).all(axis=0))
        require(not len(bad), f"dimensions {bad} of an observation are not finite; fix the "
                "environment.")
        poses = np.empty((len(obs), len(self.geoms), 6))
        for start in range(0, len(obs), POSES_AT_ONCE):
            piece = positions[start : start + POSES_AT_ONCE]
            ids = np.arange(len(piece))
            self.qpos[ids, self.unobserved :] = piece
            self.batch.forward(ids, stage=mujoco.mjtStage.mjSTAGE_POS)
            look_at = self.centers_of_mass[ids, 1]  # of the first body and all that hangs on it
            look_at[:, 2] = self.look_at_height
            middles = (self.positions[: len(ids), self.geoms] - look_at[:, None]) @ self.axes.T
            axes = self.rotations[: len(ids), self.geoms, 2::3]  # third columns: along the capsules
            half_axes = self.half_lengths * (axes @ self.axes.T)
            looks = np.broadcast_to(self.looks, (len(ids), *self.looks.shape))
            piece = np.concatenate([middles[..., :2], half_axes[..., :2], looks], axis=2)
            order = np.argsort(-middles[..., 2].round(6), axis=1, kind="stable")
            poses[start + ids] = np.take_along_axis(piece, order[..., None], axis=1)
        return torch.from_numpy(poses).float()

    def states(self, obs: np.ndarray) -> Tensor:
        return torch.from_numpy(obs)

    def draw(self, poses: Tensor) -> Tensor:
        """Poses (B, G, 6) -> frames (B, H, W) uint8. One capsule after the other covers what is
        there; the pixels at its edge, by as much as it fills of them."""
        right, up, axis_right, axis_up, radius, brightness = poses[..., None, None].unbind(2)
        half = torch.hypot(axis_right, axis_up)  # each of these is (B, G, 1, 1)
        cos = torch.where(half > 1e-6, axis_right / half, 1.0)
        sin = torch.where(half > 1e-6, axis_up / half, 0.0)
        # In this unit, the squared distance to the axis grows by 1 within the pixel at the edge.
        unit = (2 * radius * self.pixel).sqrt()
        columns, rows, half = (self.columns - right) / unit, (self.rows - up) / unit, half / unit
        edge = 0.5 + radius / (2 * self.pixel)
        shade = 0.8 * brightness * self.pixel / radius
        image = self.background.expand(len(poses), -1, -1).clone()
        for g in range(poses.shape[1]):  # in place, for speed
            along = columns[:, g] * cos[:, g] + rows[:, g] * sin[:, g]
            across = rows[:, g] * cos[:, g] - columns[:, g] * sin[:, g]
            beyond = along.abs_().sub_(half[:, g]).clamp_(min=0)  # the end of the axis
            distance = beyond.square_().add_(across.square_())
            colour = torch.sub(brightness[:, g], torch.mul(distance, shade[:, g], out=across))
            image.lerp_(colour, torch.sub(edge[:, g], distance, out=distance).clamp_(0, 1))
        return image.clamp_(0, 255).round_().to(torch.uint8)

    def forward(self, obs: np.ndarray) -> Tensor:
        """Observations (B, O) -> frames (B, H, W) uint8."""
        poses = self.prepare(obs).to(self.background.device)
        return torch.cat([self.draw(piece) for piece in poses.split(FRAMES_AT_ONCE)])


# --- Plumbing: evaluation, files, command line ---


def evaluate(agent: RSSMAgent | None, task: dict, episodes: int, seed: int, threads, sampled=False):
    """Cumulative true returns (T, E) after each step of fresh episodes, with the mean actions,
    sampled ones, or, without an agent, random ones; the last row is the episodes' returns."""
    envs = make_envs(task, episodes, threads)
    generator = Generator().manual_seed(seed) if sampled else None
    obs, _ = envs.reset(seed=seed)
    envs.action_space.seed(seed)
    carry = agent.initial_carry(episodes) if agent else {}
    running, rewards = np.ones(episodes, bool), []
    while running.any():
        check_finite(envs, obs, len(rewards))
        actions = agent.act(obs, carry, generator) if agent else envs.action_space.sample()
        obs, reward, terminated, truncated, _ = envs.step(actions)
        rewards.append(np.where(running, reward, 0.0))
        running &= ~(terminated | truncated)
    envs.close()
    return np.cumsum(rewards, axis=0)


def check_finite(envs, obs: np.ndarray, step) -> None:
    """UserError that names the first entry of observations (N, O) that is not finite."""
    if not np.isfinite(obs).all():
        i, dim = np.argwhere(~np.isfinite(obs))[0]
        step = np.broadcast_to(step, len(obs))[i]
        raise UserError(f"--env-id {envs.spec.id}: dimension {dim} of an observation is "
                        f"{obs[i, dim]} at step {step} of an episode; fix the environment.")


def return_metrics(returns: np.ndarray, demos: dict) -> dict[str, float]:
    """What to log of an evaluation's returns (E,), if the environment has any. A normalized score
    of 0 is as good as random actions, of 1 as the demonstrations (after Fu et al. 2020,
    https://arxiv.org/abs/2004.07219); it is left out where those are no better."""
    if not np.isfinite(returns).all():
        return {}
    metrics = {"eval/return_mean": returns.mean().item(), "eval/return_std": returns.std().item()}
    gain = demos["returns"].mean().item() - demos["random_return"]
    if 0 < gain < math.inf:
        metrics["eval/normalized_score"] = (returns.mean().item() - demos["random_return"]) / gain
    return metrics


def final_evaluation(agent: RSSMAgent, task: dict, args: Args, path: Path) -> list[np.ndarray]:
    """Returns (E,) with the mean actions, and sampled; evaluate()'s go into a .npz."""
    mean = evaluate(agent, task, args.eval_episodes, args.seed + 20_000, args.threads)
    sampled = evaluate(agent, task, args.eval_episodes, args.seed + 30_000, args.threads, True)
    np.savez(path, mean_action=mean, sampled=sampled)
    if not np.isfinite(mean).all():
        print(f"  {task['env_id']} gives no rewards, so the policy's return is unknown")
    else:
        print(f"  mean action {mean[-1].mean():9.1f} ± {mean[-1].std():.1f}")
        print(f"  sampled     {sampled[-1].mean():9.1f} ± {sampled[-1].std():.1f}")
    return [mean[-1], sampled[-1]]


def load_agent(path: str) -> tuple[RSSMAgent, dict]:
    """The agent of a policy.pt, and all that the file holds, such as env_id."""
    saved = load_file(path, "--evaluate", "gail_rssm policy")
    require(saved.get("args", {}).keys() == vars(Args()).keys(), f"--evaluate {path}: another "
            "version of this script wrote it; give a file of this one.")
    weights = saved["agent"]
    bounds, args = weights["standardize_action.mean"].numpy(), Args(**saved["args"])
    autoencoder = None
    demos = {"obs": weights["standardize.mean"].numpy()[None], "low": bounds, "high": bounds}
    if args.obs == "pixels":
        render = CapsuleRenderer(make_envs(saved, 1, 1), args.image_size, 1)
        frames = torch.zeros(1, render.height, render.width)
        autoencoder = FrameAutoencoder(render, frames, args.latent_dim)
    agent = RSSMAgent(demos, args, autoencoder)  # with anything of these shapes
    agent.load_state_dict(weights)
    return agent, saved


def report(agent: RSSMAgent, demos: dict, rows: list[dict], seconds: float, args, run_dir) -> dict:
    """The final evaluation and the run's summary: a table, summary.json, curves.png."""
    returns, sampled = final_evaluation(agent, demos, args, run_dir / "evaluation.npz")
    steps, demos_mean = rows[-1]["global_step"], demos["returns"].mean().item()
    summary = return_metrics(returns, demos)
    evaluated = [row for row in rows if "eval/return_mean" in row]
    if evaluated and np.isfinite(sampled).all():
        best = max(evaluated, key=lambda row: row["eval/return_mean"])
        summary["eval/return_sampled_mean"] = sampled.mean().item()
        summary |= {"best/return_mean": best["eval/return_mean"], "best/step": best["global_step"]}
    if "eval/normalized_score" in summary:
        summary |= {"demos_return_mean": demos_mean, "random_return_mean": demos["random_return"]}
        if isinstance(demos.get("expert_return_mean"), (int, float)):
            summary["expert_return_mean"] = demos["expert_return_mean"]
    summary |= {"env_steps": steps, "seconds": seconds, "charts/SPS": steps / seconds}
    print(*(f"  {name:24}{x:12,.6g}" for name, x in summary.items()), f"  {run_dir}", sep="\n")
    plot_curves(rows, demos_mean, run_dir / "curves.png")
    (run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(run_dir / "summary.tmp", run_dir / "summary.json")
    if args.track:  # last, since it waits for the network
        wandb.summary.update(summary)
        wandb.finish()
    return summary


def plot_curves(rows: list[dict], demos_mean: float, path: Path) -> None:
    """Return, and outputs of D, over environment steps."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, name, label in (
        (left, "charts/episodic_return", "sampled actions (training)"),
        (left, "eval/return_mean", "mean action (evaluation)"),
        (right, "disc/expert_prob", "on demonstrations"),
        (right, "disc/policy_prob", "on the policy"),
    ):
        logged = [row for row in rows if name in row]
        x, y = [row["global_step"] for row in logged], [row[name] for row in logged]
        ax.plot(x, y, ".-", markersize=3, label=label)
    if math.isfinite(demos_mean):
        left.axhline(demos_mean, color="black", linestyle="--", label="demonstrations")
    left.set(title="Return", xlabel="environment steps", ylabel="true return of an episode")
    right.set(title="Discriminator", xlabel="environment steps", ylabel="mean D", ylim=(0, 1))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def plot_imagination(agent: RSSMAgent, demos: dict, path: Path) -> None:
    """A demonstrated episode, what the model perceives of it, and what it imagines after step
    `begin`: four of the observation's numbers, or frames. Its actions are the policy's."""
    begin, obs = 10, demos["observations"][: demos["lengths"][0] + 1]
    names = ["demonstrated", "perceived by the model", f"imagined from step {begin} on"]
    model, carry, kinds = agent.model, agent.initial_carry(1), []
    for t in range(len(obs)):
        agent.act(obs[t : t + 1], carry)
        if t <= begin:
            state, action = carry["state"], carry["action"]
        else:
            state = model.prior_step(state, action, None)
            action, _ = agent.actor(state, None)
        kinds.append([carry["obs"], model.decoder(carry["state"]), model.decoder(state)])
    kinds, steps = [torch.cat(x) for x in zip(*kinds)], np.arange(len(obs))
    if agent.autoencoder:
        figure, shown = Figure(figsize=(11, 3.6), layout="constrained"), steps[:: len(obs) // 6 + 1]
        axes = figure.subplots(3, len(shown), squeeze=False)
        films = [agent.autoencoder.decode_frames(agent.standardize.undo(x[shown])) for x in kinds]
        films[0] = agent.autoencoder.render(obs[shown]) / 255  # the frames themselves
        for row, name, film in zip(axes, names, films):
            for ax, frame in zip(row, film.cpu()):
                ax.imshow(frame, cmap="gray", vmin=0, vmax=1)
                ax.set(xticks=[], yticks=[])
            row[0].set_ylabel(name.replace(" ", "\n", 1))
        for ax, step in zip(axes[0], shown):
            ax.set_title(f"step {step}")
    else:
        figure = Figure(figsize=(11, 6), layout="constrained")
        dims = np.linspace(0, obs.shape[1] - 1, 4).astype(int)
        for ax, dim in zip(figure.subplots(2, 2).flat, dims):
            demonstrated, perceived, imagined = (x[:, dim].cpu() for x in kinds)
            ax.plot(demonstrated, color="lightgrey", linewidth=5, label=names[0])
            ax.plot(perceived, label=names[1])
            ax.plot(steps[begin:], imagined[begin:], "--", label=names[2])
            ax.set(title=f"Observation {dim}", xlabel="step of the episode", ylabel="standardized")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def open_run(script: str, args: Args, wandb_id: str | None) -> Path:
    """The folder of the run, new or resumed; with --track, its run in Weights & Biases too."""
    name = f"{script}__{args.env_id}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.output_dir) / (args.run_name or re.sub("[:/]", "-", name))
    if args.resume:
        run_dir = Path(args.resume).absolute().parent
    elif run_dir.exists():
        raise UserError(f"--run-name: {run_dir} exists already; give another, or --resume it.")
    if args.track:
        names = {"project": args.wandb_project_name, "name": run_dir.name, "dir": run_dir.parent}
        names |= {"job_type": script, "reinit": "finish_previous"}  # a failed one may be open still
        try:
            wandb.init(**names, id=wandb_id, resume="allow", config=vars(args))
        except Exception as error:  # W&B fails in many ways
            raise UserError(f"--track: {reason(error)}; run `wandb login`, or set "
                            "WANDB_MODE=offline.") from None
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    (run_dir / "summary.json").unlink(missing_ok=True)  # of a finished run that goes on longer
    print(f"the run's folder is {run_dir}", flush=True)
    return run_dir


def save_atomically(content: dict, path: Path) -> None:
    """torch.save that leaves the old file or the new one, whole, wherever the process is killed."""
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(content, buffer)  # to memory first: on a full disk torch fails obscurely
    temporary.write_bytes(buffer.getbuffer())
    os.replace(temporary, path)


def write_csv(rows: list[dict], path: Path) -> None:
    columns = dict.fromkeys(name for row in rows for name in row)
    lines = [",".join(columns), *(",".join(str(row.get(x, "")) for x in columns) for row in rows)]
    path.with_suffix(".tmp").write_text("\n".join(lines) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def load_file(path: str, flag: str, kind: str) -> dict:
    """A checkpoint.pt or policy.pt, read without running any code in it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, with advice that is not ours
        problem = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{flag} {path}: not a readable file ({problem}); give the "
                        f"{kind.split()[-1]}.pt of a run.") from None
    found = content.get("kind") if isinstance(content, dict) else None
    require(found == kind, f"{flag} {path}: it is a {found}, expected a {kind}; give another file.")
    return content


class UserError(Exception):
    """A user's mistake, or a run that cannot go on: shown as one sentence, exit code 2."""


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def check_settings(args, may_be_zero: str, at_least: dict, at_most: dict) -> None:
    """UserError unless each setting has its type, or is one of its choices, and each number is
    positive, or 0 where it may be, and within its limits."""
    for name, kind in type(args).__annotations__.items():
        if kind not in (bool, int, float, str) and get_origin(kind) is not Literal:
            continue  # a kind that you added: check it yourself
        x, flag, choices = getattr(args, name), f"--{name.replace('_', '-')}", get_args(kind)
        good = x in choices or type(x) is kind or (kind is float and type(x) is int)
        expected = f"one of {', '.join(choices)}" if choices else f"a plain {kind.__name__}"
        require(good, f"{flag} is {x!r}, expected {expected}; change it.")
        if kind in (int, float):
            low, high = at_least.get(name, 0), at_most.get(name, sys.float_info.max)
            zero_is_fine = name in may_be_zero.split()
            expected = f"{low} or more" if low or zero_is_fine else "more than 0"
            expected += f" and {high} or less" if name in at_most else ""
            good = low <= x <= high and (x > 0 or zero_is_fine)
            require(good, f"{flag} is {x}, expected a number, {expected}; change it.")


def parse_args(argv: list[str]) -> Args:
    """Settings of a new run, or of a resumed one. W&B's sweep agents write --flag=True, =False."""
    argv = [re.sub("^--(.*)=True$", r"--\1", re.sub("^--(.*)=False$", r"--no-\1", x)) for x in argv]
    args = tyro.cli(Args, args=argv, description=__doc__.split("\n")[0])
    if args.resume:
        saved = load_file(args.resume, "--resume", "gail_rssm checkpoint")["args"]
        require(saved.keys() == vars(args).keys(), f"--resume {args.resume}: another version of "
                "this script wrote it; start a new run.")
        args = tyro.cli(Args, args=argv, default=Args(**saved))
    args.check()
    return args


def main(argv: list[str]) -> None:
    """Command line in, exit code out."""
    try:
        args = parse_args(argv)
        if args.evaluate:
            path = Path(args.evaluate)  # its .npz: the run's own evaluation stays
            final_evaluation(*load_agent(args.evaluate), args, path.with_suffix(".npz"))
        else:
            train(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; a run goes on with --resume <run>/checkpoint.pt", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
