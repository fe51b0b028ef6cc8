# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "matplotlib==3.11.2",
#                 "imageio==2.38.1"]
# ///
"""GAIL from camera frames alone, through an autoencoder, complete in one file.

The learner knows expert and policy as images. An autoencoder turns each frame into a latent of Z
numbers; policy, value and discriminator D work on the latents of the last K frames. The rest is
GAIL (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476) and PPO, as in `gail_ppo.py`:

    pretrain autoencoder and predictor, then repeat:
    collect a rollout, encoding each frame once -> update D -> reward = how sure D is of the expert
    -> update policy -> update predictor and autoencoder -> encode the expert's frames anew

What GAIL on states does not have, and why:

 1. The expert's frames are rendered from the demonstrations' physics state by the code that renders
    the policy's: they can differ in behaviour alone. The expert's actions, the true reward and
    (unless --policy-obs state) the true state never reach the learner.
 2. D sees the newest latent and the K - 1 *steps* between latents, standardized by the expert's
    statistics: velocities show in steps. A reward is about the frames that its action led to.
 3. The policy sees what comes of that: a predictor (forward model), trained on rollouts, tells
    the latents two steps ahead if nothing is done, from D's view and the last K - 1 own actions.
 4. An episode's first frame is repeated, for expert and policy alike. No window of K frames looks
    ahead or spans two episodes.
 5. The encoder is pretrained, then trained on after each rollout. Besides reconstructing, K latents
    must tell the policy's *own* last action (an inverse model). It shows in accelerations, so
    latents must hold the positions of small limbs precisely.
 6. Reconstruction errors are divided by how much a pixel varies: a foot is as important as a torso.
 7. The camera runs along, low down and at one height: the animal stands out against the sky, and a
    jump shows. Its colour filter makes the brown animal bright and the floor dim.
 8. First layers of many inputs take smaller steps. All that the policy sees comes to rest with it.

    python gail_pixels_ae.py                              # K = 4: nine minutes on two cores
    python gail_pixels_ae.py --frame-stack 4 --cuda       # the same on a GPU
    python gail_pixels_ae.py --policy-obs state           # the policy sees the robot's own state
    python gail_pixels_ae.py --evaluate runs/<run>/policy.pt
    python gail_pixels_ae.py --resume runs/<run>/checkpoint.pt
    torchrun --standalone --nproc-per-node 2 gail_pixels_ae.py
"""

import io
import json
import math
import os
import re
import sys
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import imageio
import mujoco
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
import wandb
from matplotlib.figure import Figure
from mujoco.batch import Batch
from torch import Generator, Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

REWARD_WINDOW = 10  # rollouts that the running mean and deviation of a reward are taken over
INPUT_CLIP = 10.0  # standardized inputs are clipped to [-INPUT_CLIP, INPUT_CLIP]
INITIAL_LOG_STD, LOG_STD_MIN, LOG_STD_MAX = -0.5, -5.0, 2.0  # of the policy's Gaussian
FULL_STEP_INPUTS = 28  # layers of more inputs than this take smaller steps
ACTION_DIM = 6  # of HalfCheetah (A)
CAMERA_DISTANCE, CAMERA_ELEVATION = 2.4, 8.0  # metres and degrees; positive: it looks up
VIEW_CENTRE, VIEW_HEIGHT, VIEW_ASPECT = 0.56, 1.2, 12 / 7  # metres above the floor, metres, w / h
LOOK_AHEAD = 2  # steps that the predictor looks ahead
MODEL_HIDDEN = 256  # width of the hidden layers of predictor and inverse model
PREDICTOR_BATCH_SIZE = 512
PREDICTOR_PRETRAINING = 16  # times as many predictor steps before the policy's first update
SNIPPET = 16  # consecutive frames in a minibatch of the autoencoder
REST_OF_AE_LR = 0.2  # what is left of the autoencoder's step size after its pretraining
# torchrun starts W processes and tells each its rank; they share environments and minibatches
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Args:
    seed: int = 1  # seed of networks, environments, minibatches, choice of demonstrations
    env_id: str = "HalfCheetah-v4"  # environment; frames are made of this one alone
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"  # demonstration set (data/README.md)
    num_demos: int = 0  # use this many demonstrated episodes, drawn by the seed (0: all)
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: gail_pixels_ae__<env>__<seed>__<time>)
    resume: str = ""  # checkpoint.pt to go on from; with --total-timesteps, on a new schedule
    evaluate: str = ""  # policy.pt to evaluate instead of training
    eval_interval: int = 50_000  # env steps between evaluations (20 episodes, mean action)
    eval_episodes: int = 100  # episodes of the final evaluation, for mean and for sampled actions
    checkpoint_interval: int = 100_000  # env steps between checkpoints
    capture_video: bool = True  # write policy.gif, expert and policy side by side, at the end
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    cuda: bool = False  # networks and frames on the GPU
    threads: int = 0  # threads of physics, rendering and networks (0: one per core)

    total_timesteps: int = 1_000_000  # env steps of the whole run, each a frame; with pretraining's
    num_envs: int = 64  # parallel environments (N), of all processes together
    num_steps: int = 100  # steps per environment and rollout (T)
    learning_rate: float = 2e-3  # Adam step size of policy and value
    anneal_lr: bool = True  # let all step sizes but D's fall linearly to zero over the run
    gamma: float = 0.97  # discount factor
    gae_lambda: float = 0.9  # lambda of generalized advantage estimation
    num_minibatches: int = 8  # minibatches per epoch of the PPO update
    update_epochs: int = 8  # epochs of the PPO update over each rollout
    clip_coef: float = 0.2  # clipping of the probability ratio
    ent_coef: float = 0.0  # weight of the policy's entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient norm at which PPO's gradients are cut
    hidden_size: int = 128  # width of the two hidden layers of policy and value

    normalize_reward: bool = True  # subtract the running mean, divide by the running deviation
    disc_learning_rate: float = 1e-3  # Adam step size of D
    disc_steps: int = 20  # minibatch steps of D per rollout
    disc_batch_size: int = 512  # expert windows of K frames, and as many of the policy's
    disc_hidden_size: int = 128  # width of D's two hidden layers
    grad_penalty_coef: float = 0.1  # weight of D's gradient penalty

    frame_stack: int = 4  # frames that policy and D see at once (K)
    image_size: int = 56  # height of a frame; it is 12 wide for 7 high, rounded to 8 pixels
    latent_dim: int = 64  # numbers that a frame is encoded into (Z)
    policy_obs: Literal["latent", "state"] = "latent"
    """what policy and value see: predicted latents, or the robot's own state"""
    pretrain_steps: int = 2_000  # autoencoder steps on a rollout of the untrained policy
    ae_steps: int = 24  # autoencoder steps after each rollout (0: at rest after the pretraining)
    inverse_coef: float = 0.1  # weight of the inverse model's loss (0: reconstruction alone)
    predictor_steps: int = 60  # predictor steps per rollout (0: the policy sees D's view)
    ae_batch_size: int = 128  # frames in a minibatch, half the expert's and half the policy's
    ae_learning_rate: float = 1e-3  # Adam step size of the autoencoder; a fifth after pretraining

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        rollout = self.num_envs * self.num_steps
        at_least = {"image_size": 16, "ae_batch_size": 2 * self.frame_stack * WORLD_SIZE}
        at_least |= {"num_steps": max(LOOK_AHEAD, self.frame_stack)}
        at_least |= {"total_timesteps": (1 + self.pretraining_rollouts()) * rollout}
        at_most = {"seed": 2**31 - 1, "gamma": 0.9999, "gae_lambda": 1, "frame_stack": 100}
        at_most |= {"num_minibatches": rollout // 2}
        may_be_zero = "seed num_demos threads gamma gae_lambda ent_coef vf_coef grad_penalty_coef "
        may_be_zero += "pretrain_steps ae_steps inverse_coef predictor_steps"
        check_numbers(self, may_be_zero, at_least, at_most)
        require(self.env_id == "HalfCheetah-v4", f"--env-id is {self.env_id}, but frames are of "
                "HalfCheetah-v4 alone; leave it out.")
        require(self.image_size % 8 == 0, f"--image-size is {self.image_size}, expected a multiple "
                "of 8; change it.")
        require(self.num_envs % WORLD_SIZE == 0, f"--num-envs is {self.num_envs}, but "
                f"{WORLD_SIZE} processes divide it; give a multiple of that.")
        require(torch.cuda.is_available() or not self.cuda, "--cuda was given, but PyTorch sees no "
                "GPU; drop it or install a CUDA build of torch.")
        if self.threads == 0:
            has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
            cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
            self.threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def has_predictor(self) -> bool:
        return self.predictor_steps > 0 and self.policy_obs == "latent"

    def pretraining_rollouts(self) -> int:
        """Rollouts of the untrained policy that a run begins with: autoencoder's, predictor's."""
        return (self.pretrain_steps > 0) + self.has_predictor()


# Networks


def mlp(sizes: list[int], output_gain: float, generator: Generator) -> nn.Sequential:
    """Linear layers with SiLU between, orthogonal weights (gain sqrt 2; last layer output_gain)."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        gain = output_gain if len(layers) == 2 * len(sizes) - 2 else math.sqrt(2)
        nn.init.orthogonal_(layers[-2].weight, gain, generator=generator)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def relu_mlp(sizes: list[int], generator: Generator) -> nn.Sequential:
    """An mlp with ReLU instead of SiLU."""
    layers = mlp(sizes, 1.0, generator)
    return nn.Sequential(*(nn.ReLU() if isinstance(x, nn.SiLU) else x for x in layers))


class Standardize(nn.Module):
    """(x - mean) / std, clipped, in float32, with the statistics of data (L, X), saved with the
    weights. What does not vary in data becomes 0, whatever x: nobody sees it. Computed in float64,
    since x may be large beside its deviation."""

    def __init__(self, data: np.ndarray):
        super().__init__()
        data = data.astype(np.float64)
        mean, std = data.mean(0), data.std(0)
        std[std <= 1e-7 * np.abs(mean)] = np.inf  # no more than rounding
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("std", torch.from_numpy(std))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).clamp(-INPUT_CLIP, INPUT_CLIP).float()

    def undo(self, x: Tensor) -> Tensor:
        return (self.mean + self.std.nan_to_num(posinf=0.0) * x).float()


class Autoencoder(nn.Module):
    """Two strided convolutions and a linear layer to Z latents, and back by sub-pixel convolutions
    (Shi et al. 2016). Two wide strides cost a third of three small ones at the same error. It knows
    its normalization: mean and spread of the expert's frames (B, H, W) uint8, and mean and
    deviation of the expert's features, which change with the encoder (see encode_expert)."""

    def __init__(self, frames: Tensor, latent_dim: int, frame_stack: int):
        super().__init__()
        pixels = frames.float() / 255
        weight = 1 / (pixels.std(0) + 0.03)  # still pixels count too: a new policy may move there
        self.register_buffer("mean_frame", pixels.mean(0))
        self.register_buffer("weight", weight / weight.mean())  # of each pixel's squared error
        self.standardize = Standardize(np.zeros((1, frame_stack * latent_dim)))
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

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (B, H, W) -> latents (B, Z)."""
        return self.encoder(self.center(frames))

    @torch.no_grad()
    def encode_all(self, frames: Tensor) -> Tensor:
        """uint8 (..., H, W) -> latents (..., Z) without gradient, in pieces that fit the cache."""
        pieces = frames.flatten(0, -3).split(256)
        return torch.cat([self.encode(x) for x in pieces]).unflatten(0, frames.shape[:-2])

    def errors(self, latents: Tensor, frames: Tensor) -> Tensor:
        """Weighted mean squared error of each reconstruction: (B, Z), (B, H, W) -> (B,)."""
        squares = (self.decoder(latents) - self.center(frames)).square()
        return (squares * self.weight).mean((1, 2, 3))


class GaussianAgent(nn.Module):
    """Gaussian policy and value of standardized observations (..., O)."""

    def __init__(self, obs_dim: int, hidden_size: int, generator: Generator):
        super().__init__()
        sizes = [obs_dim, hidden_size, hidden_size]
        self.actor = mlp([*sizes, 2 * ACTION_DIM], 0.01, generator)
        self.critic = mlp([*sizes, 1], 1.0, generator)
        self.actor[-1].bias.data[ACTION_DIM:] = INITIAL_LOG_STD

    def value(self, x: Tensor) -> Tensor:
        return self.critic(x).squeeze(-1)

    def gaussian(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log deviation of the action, (..., A) each, from the actor's output."""
        mean, log_std = output.chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def log_prob_and_entropy(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.gaussian(output)
        return gaussian_log_prob(action, mean, log_std), gaussian_entropy(log_std)


class Networks(nn.Module):
    """All networks. Demonstrated frames (B, H, W) and states (L, O) are for normalization alone."""

    def __init__(self, frames: Tensor, states: np.ndarray, args: Args, generator: Generator):
        super().__init__()
        self.policy_obs, self.predictor, self.inverse = args.policy_obs, None, None
        features_dim = args.frame_stack * args.latent_dim
        obs_dim = history_dim = features_dim + (args.frame_stack - 1) * ACTION_DIM
        if args.has_predictor():
            sight_dim = min(args.frame_stack, 2) * args.latent_dim
            sizes = [history_dim + LOOK_AHEAD * ACTION_DIM, MODEL_HIDDEN, MODEL_HIDDEN, sight_dim]
            self.predictor = relu_mlp(sizes, generator)
            obs_dim = sight_dim + min(args.frame_stack - 1, 1) * ACTION_DIM
        self.autoencoder = Autoencoder(frames, args.latent_dim, args.frame_stack)
        if args.policy_obs == "state":
            self.standardize_state, obs_dim = Standardize(states), states.shape[1]
        self.agent = GaussianAgent(obs_dim, args.hidden_size, generator)
        sizes = [features_dim, args.disc_hidden_size, args.disc_hidden_size, 1]
        self.disc = mlp(sizes, 1.0, generator)  # logit of "these K frames are the expert's"
        if args.inverse_coef > 0 and args.frame_stack > 1:
            self.inverse = relu_mlp([features_dim, MODEL_HIDDEN, ACTION_DIM], generator)

    def observe(self, latents: Tensor, actions: Tensor, states: np.ndarray) -> tuple[Tensor, ...]:
        """Latents of K frames (N, K, Z), the last K - 1 actions (N, K - 1, A), states (N, O) ->
        features (N, K Z), which D sees; history (N, M), features and actions, which the predictor
        sees; obs (N, O) for the policy: what is predicted if nothing is done, and the last action.
        """
        features = self.autoencoder.standardize(latent_steps(latents))
        history = torch.cat([features, actions.flatten(1)], dim=1)
        if self.policy_obs == "state":
            states = torch.from_numpy(states).to(latents.device)
            return features, history, self.standardize_state(states)
        if self.predictor is None:
            return features, history, history
        nothing = torch.zeros(len(history), LOOK_AHEAD * ACTION_DIM, device=history.device)
        sight = self.predictor(torch.cat([history, nothing], dim=1)).clamp(-INPUT_CLIP, INPUT_CLIP)
        return features, history, torch.cat([sight, actions[:, -1:].flatten(1)], dim=1)


def make_optimizers(nets: Networks, args: Args) -> dict[str, Adam]:
    """First layers of policy and value take smaller steps where they have many inputs: Adam moves
    each weight by up to its step size, so that a layer of 134 inputs (the default) would move the
    policy 8 times as far as one of 17."""
    first = [*nets.agent.actor[0].parameters(), *nets.agent.critic[0].parameters()]
    others = [p for p in nets.agent.parameters() if all(p is not q for q in first)]
    first_lr = args.learning_rate * min(1.0, FULL_STEP_INPUTS / nets.agent.actor[0].in_features)
    groups = [{"params": others, "lr": args.learning_rate}, {"params": first, "lr": first_lr}]
    eyes = list(nets.autoencoder.parameters())
    if nets.inverse:
        eyes += nets.inverse.parameters()
    optimizers = {
        "agent": Adam(groups, eps=1e-5, fused=True),
        "disc": Adam(nets.disc.parameters(), lr=args.disc_learning_rate, fused=True),
        "autoencoder": Adam(eyes, lr=args.ae_learning_rate, fused=True),
    }
    if nets.predictor:
        optimizers["predictor"] = Adam(nets.predictor.parameters(), lr=1e-3, fused=True)
    for optimizer in optimizers.values():
        optimizer.register_step_pre_hook(average_gradients)
    return optimizers


# The algorithm, as functions


def latent_steps(latents: Tensor) -> Tensor:
    """Latents of K frames (..., K, Z), oldest first -> (..., K Z): the K - 1 steps between
    consecutive ones, then the newest."""
    return torch.cat([latents.diff(dim=-2), latents[..., -1:, :]], dim=-2).flatten(-2)


def window_rows(lengths: np.ndarray, frame_stack: int) -> np.ndarray:
    """Rows of the K frames that end at each frame of a demonstration set, (L + E, K), oldest first.
    An episode's first frame is repeated where there are too few."""
    starts = np.repeat(np.cumsum(lengths + 1) - (lengths + 1), lengths + 1)
    rows = np.arange(len(starts))[:, None] + np.arange(1 - frame_stack, 1)
    return np.maximum(rows, starts[:, None])


def whole_windows(ended: Tensor, length: int) -> Tensor:
    """Which `length` steps in a row are of one episode, whose last may end it: (T, N) bool ->
    (T - length + 1, N) bool."""
    starts = len(ended) - length + 1
    whole = torch.ones_like(ended[:starts])
    for k in range(length - 1):
        whole &= ~ended[k : k + starts]
    return whole


def inverse_loss(inverse: nn.Module, latents: Tensor, actions: Tensor) -> Tensor:
    """Squared error of the last action (B, A), guessed from K latents (B, K, Z) that end with what
    it led to. The gradient goes through the spread as well: without that, the first wild guesses
    shrink the latents to nothing."""
    steps = latent_steps(latents)
    return F.mse_loss(inverse(steps / (steps.std(0, correction=0) + 1e-2)), actions)


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(action; mean, exp(log_std)^2), summed over the last axis: (..., A) -> (...)."""
    z = (action - mean) * torch.exp(-log_std)
    constant = 0.5 * math.log(2 * math.pi) * action.shape[-1]
    return -0.5 * z.square().sum(-1) - log_std.sum(-1) - constant


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of a diagonal Gaussian: (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def gradient_penalty(disc: nn.Module, expert: Tensor, policy: Tensor, mix: Tensor) -> Tensor:
    """Mean of (|d logit/dx| - 1)^2 at x = mix * expert + (1 - mix) * policy (Gulrajani et al. 2017,
    https://arxiv.org/abs/1704.00028, equation 3), one mix and one norm for each of the B inputs."""
    x = (mix * expert + (1 - mix) * policy).requires_grad_(True)
    (grad,) = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=-1) - 1).square().mean()


def discriminator_loss(expert_logit: Tensor, policy_logit: Tensor) -> Tensor:
    """-E_expert[log D] - E_policy[log(1 - D)] with D = sigmoid(logit): (B,), (B,) -> ()
    (Ho & Ermon 2016, equation 17). It is 2 log 2 when D cannot tell."""
    return F.softplus(-expert_logit).mean() + F.softplus(policy_logit).mean()


class RewardNormalizer:
    """Normalizes by mean and deviation of all rewards of the last REWARD_WINDOW rollouts."""

    def __init__(self):
        self.moments: deque[tuple[float, float]] = deque(maxlen=REWARD_WINDOW)  # mean, mean square

    def update(self, rewards: Tensor) -> None:
        rewards = rewards.double()  # a mean of squares less a squared mean loses float32's digits
        self.moments.append((rewards.mean().item(), rewards.square().mean().item()))

    def normalize(self, rewards: Tensor) -> Tensor:
        mean, square = np.mean(self.moments, axis=0).tolist()
        std = math.sqrt(max(square - mean**2, 0.0))
        return (rewards - mean) / max(std, 1e-3)  # a constant must not become huge


def compute_gae(rewards, values, next_values, ended, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438,
    equation 16), all (T, N) -> advantages, returns (advantages + values).

    next_values are those of the true next observations: a truncated step bootstraps from where its
    episode stopped. `ended` (terminated or truncated) keeps the sum within its episode.
    """
    deltas = rewards + gamma * next_values - values
    decay = gamma * gae_lambda * (1 - ended.to(values.dtype))
    advantages, running = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        running = deltas[t] + decay[t] * running
        advantages[t] = running
    return advantages, advantages + values


def ppo_policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Clipped surrogate (Schulman et al. 2017, equation 7), to minimize: (B,), (B,) -> ()."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


# The steps of the loop


@torch.no_grad()
def collect_frames(envs, render, nets, episodes: dict, num_steps: int, generator, sampled=True):
    """T steps in each of N environments, with sampled or mean actions -> rollout
    {name: (T, N, ...)}, log. Each frame is rendered and encoded once. `episodes` (begin_episodes)
    goes on from one rollout to the next."""
    agent, autoencoder = nets.agent, nets.autoencoder
    device = autoencoder.mean_frame.device
    noise = torch.randn((num_steps, envs.num_envs, ACTION_DIM), generator=generator).to(device)
    frames, actions = episodes["frames"].to(device), episodes["actions"].to(device)
    latents = autoencoder.encode_all(frames)  # anew: the encoder has changed
    _, history, obs = nets.observe(latents, actions, episodes["state"].numpy())
    steps, finished = [], []
    for t in range(num_steps):
        output = agent.actor(obs)
        mean, log_std = agent.gaussian(output)
        action = mean + sampled * log_std.exp() * noise[t]
        executed = action.clamp(-1, 1)
        state, reward, terminated, truncated, info = envs.step(executed.cpu().numpy())
        ended, qpos = terminated | truncated, info["final_states"][:, :9]
        frame = render(qpos)
        frames = torch.cat([frames[:, 1:], frame[:, None]], dim=1)
        latents = torch.cat([latents[:, 1:], autoencoder.encode_all(frame)[:, None]], dim=1)
        actions = torch.cat([actions, executed[:, None]], dim=1)[:, 1:]
        features, next_history, next_obs = nets.observe(latents, actions, info["final_obs"])
        steps.append({
            "obs": obs,
            "next_obs": next_obs,
            "history": history,  # before the action
            "features": features,  # after it
            "frame": frame,
            "qpos": torch.from_numpy(qpos),  # for policy.gif
            "action": action,
            "executed": executed,
            "output": output,
            "env_reward": torch.from_numpy(reward).float(),  # to log
            "terminated": torch.from_numpy(terminated),
            "ended": torch.from_numpy(ended),  # terminated or truncated
        })
        history, obs = next_history, next_obs
        episodes["return"] += torch.from_numpy(reward)
        if ended.any():
            ids = torch.from_numpy(np.flatnonzero(ended)).to(device)
            frames[ids] = render(envs.qpos[ended])[:, None]  # a first frame is repeated
            latents[ids], actions[ids] = autoencoder.encode_all(frames[ids]), 0.0
            _, history, obs = nets.observe(latents, actions, state)
            finished += episodes["return"][ended].tolist()
            episodes["return"][ended] = 0.0
    episodes.update(frames=frames, actions=actions, state=torch.from_numpy(state))
    rollout = {name: torch.stack([step[name] for step in steps]).to(device) for name in steps[0]}
    rollout["log_prob"], _ = agent.log_prob_and_entropy(rollout["output"], rollout["action"])
    return rollout, {"charts/episodic_return": np.mean(finished).item()} if finished else {}


def update_latent_discriminator(nets, optimizers, expert, rollout, args: Args, generator):
    """Steps of D on features of the expert (L, K Z) and of the rollout -> log of the last."""
    expert, policy = expert["features"], rollout["features"].flatten(0, 1)
    size = args.disc_batch_size // WORLD_SIZE
    for _ in range(args.disc_steps):
        indices = torch.randint(len(expert), (size,), generator=generator)
        expert_x = expert[indices.to(expert.device)]
        indices = torch.randint(len(policy), (size,), generator=generator)
        policy_x = policy[indices.to(expert.device)]
        mix = torch.rand((size, 1), generator=generator).to(expert.device)
        expert_logit, policy_logit = nets.disc(torch.cat([expert_x, policy_x])).split(size)
        loss = discriminator_loss(expert_logit, policy_logit)
        penalty = gradient_penalty(nets.disc, expert_x, policy_x, mix)
        optimizers["disc"].zero_grad()
        (loss + args.grad_penalty_coef * penalty).backward()
        optimizers["disc"].step()
    return {
        "disc/loss": loss.item(),
        "disc/expert_prob": torch.sigmoid(expert_logit).mean().item(),
        "disc/policy_prob": torch.sigmoid(policy_logit).mean().item(),
        "disc/expert_acc": (expert_logit > 0).float().mean().item(),
        "disc/policy_acc": (policy_logit < 0).float().mean().item(),
        "disc/grad_penalty": penalty.item(),
    }


@torch.no_grad()
def compute_latent_rewards(nets, rollout, normalizer: RewardNormalizer, args: Args):
    """What PPO maximizes: {"steps": the rewards -log(1 - D) (T, N), normalized, "absorbing": what
    would follow if the task ended, which HalfCheetah's never does}, log."""
    rewards = F.softplus(nets.disc(rollout["features"])).squeeze(-1)
    log = {"reward/gail_mean": rewards.mean().item(), "reward/gail_std": rewards.std().item()}
    log["reward/env_mean"] = rollout["env_reward"].mean().item()
    if args.normalize_reward:
        normalizer.update(all_gather(rewards))
        rewards = normalizer.normalize(rewards)
    return {"steps": rewards, "absorbing": 0.0}, log


def update_policy(agent: nn.Module, optimizer, rollout, rewards: dict, args: Args, generator):
    """PPO: epochs of minibatches over one rollout -> log of the last minibatch."""
    with torch.no_grad():
        values, next_values = agent.value(rollout["obs"]), agent.value(rollout["next_obs"])
    next_values[rollout["terminated"]] = rewards["absorbing"] / (1 - args.gamma)  # for ever
    advantages, returns = compute_gae(
        rewards["steps"], values, next_values, rollout["ended"], args.gamma, args.gae_lambda
    )
    batch = {name: rollout[name] for name in ("obs", "action", "log_prob")}
    batch |= {"advantage": advantages, "return": returns}
    batch = {name: x.flatten(0, 1) for name, x in batch.items()}
    for _ in range(args.update_epochs):
        order = torch.randperm(values.numel(), generator=generator).to(values.device)
        for indices in order.tensor_split(args.num_minibatches):
            mini = {name: x[indices] for name, x in batch.items()}
            output = agent.actor(mini["obs"])
            log_prob, entropy = agent.log_prob_and_entropy(output, mini["action"])
            log_ratio, entropy = log_prob - mini["log_prob"], entropy.mean()
            advantage = mini["advantage"] - mini["advantage"].mean()
            advantage = advantage / (mini["advantage"].std() + 1e-8)
            policy_loss = ppo_policy_loss(log_ratio, advantage, args.clip_coef)
            value_loss = 0.5 * F.mse_loss(agent.value(mini["obs"]), mini["return"])
            optimizer.zero_grad()
            (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
    ratio, unexplained = log_ratio.exp(), (returns - values).var() / (returns.var() + 1e-8)
    return {
        "losses/policy_loss": policy_loss.item(),
        "losses/value_loss": value_loss.item(),
        "losses/entropy": entropy.item(),
        # the estimator k3 of http://joschu.net/blog/kl-approx.html
        "losses/approx_kl": (ratio - 1 - log_ratio).mean().item(),
        "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean().item(),
        "losses/explained_variance": 1 - unexplained.item(),
    }


def update_predictor(nets, optimizers, rollout, num_steps: int, generator):
    """Steps of the predictor on minibatches of history, LOOK_AHEAD actions, and what then was seen:
    last step between latents and newest latent -> log of the last."""
    inside, targets = whole_windows(rollout["ended"], LOOK_AHEAD), rollout["features"]
    actions = [rollout["executed"][k : k + len(inside)] for k in range(LOOK_AHEAD)]
    inputs = torch.cat([rollout["history"][: len(inside)], *actions], dim=-1)[inside]
    targets = targets[LOOK_AHEAD - 1 :, :, -nets.predictor[-1].out_features :][inside]
    for _ in range(num_steps):
        size = (PREDICTOR_BATCH_SIZE // WORLD_SIZE,)
        indices = torch.randint(len(inputs), size, generator=generator).to(inputs.device)
        loss = F.mse_loss(nets.predictor(inputs[indices]), targets[indices])
        optimizers["predictor"].zero_grad()
        loss.backward()
        optimizers["predictor"].step()
    return {"ae/prediction": loss.item()}


def update_autoencoder(
    nets, optimizers, expert, rollout, num_steps: int, args: Args, generator, with_inverse=True
):
    """Steps on minibatches of frames, half the expert's and half snippets of the rollout: as many
    as fit whole, of frames in a row from one environment -> log of the last. The inverse model
    learns from the rollout alone: nobody tells what the expert did."""
    expert, frames, frame_stack = expert["train_frames"], rollout["frame"], args.frame_stack
    device, half = frames.device, args.ae_batch_size // (2 * WORLD_SIZE)
    # Long snippets give many windows: one of 16 frames tells 13 actions with K = 4, 4 of 4 tell 4.
    length = min(max(SNIPPET, frame_stack), half, len(frames))
    whole, size = whole_windows(rollout["ended"], frame_stack), (half // length, 1)
    # bfloat16 halves the time. It is for this training alone: D and policy see float32.
    has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for _ in range(num_steps):
        expert_frames = expert[torch.randint(len(expert), (half,), generator=generator).to(device)]
        first = torch.randint(len(frames) - length + 1, size, generator=generator).to(device)
        env = torch.randint(frames.shape[1], size, generator=generator).to(device)
        steps = first + torch.arange(length, device=device)  # (snippets, length)
        batch = torch.cat([expert_frames, frames[steps, env].flatten(0, 1)])
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda" or has_bf16):
            latents = nets.autoencoder.encode(batch)
            errors = nets.autoencoder.errors(latents, batch)
        loss, inverse_error = errors[:half].mean() + errors[half:].mean(), torch.zeros(())
        if nets.inverse and with_inverse:
            snippets = latents[half:].float().unflatten(0, (-1, length))
            windows = snippets.unfold(1, frame_stack, 1).mT  # (snippets, windows, K, Z)
            usable = whole[steps[:, : windows.shape[1]], env]
            actions = rollout["executed"][steps[:, frame_stack - 1 :], env]
            if usable.any():
                inverse_error = inverse_loss(nets.inverse, windows[usable], actions[usable])
        optimizers["autoencoder"].zero_grad()
        (loss + args.inverse_coef * inverse_error).backward()
        optimizers["autoencoder"].step()
    return {"ae/loss": loss.item(), "ae/inverse": inverse_error.item()}


@torch.no_grad()
def encode_expert(autoencoder: Autoencoder, expert: dict) -> None:
    """Sets expert["features"] (L, K Z), of the frames after each action, with the encoder as it is
    now; from now on their mean and deviation standardize the policy's features too."""
    features = latent_steps(autoencoder.encode_all(expert["frames"])[expert["windows"]])
    autoencoder.standardize = Standardize(features.cpu().numpy()).to(features.device)
    expert["features"] = autoencoder.standardize(features)[expert["after_action"]]


def pretrain(envs, render, nets, optimizers, expert, episodes, args: Args, generator) -> None:
    """Autoencoder, inverse model and predictor learn from the untrained policy's random actions."""
    if args.pretrain_steps:
        rollout, _ = collect_frames(envs, render, nets, episodes, args.num_steps, generator)
        for i in tqdm(range(args.pretrain_steps), desc="pretraining", disable=RANK > 0 or None):
            rest = min(1.0, max(2 - 2 * i / args.pretrain_steps, REST_OF_AE_LR))
            optimizers["autoencoder"].param_groups[0]["lr"] = args.ae_learning_rate * rest
            # Reconstruction goes first: latents that mean nothing yet have nothing to tell.
            inverse = i > 0.2 * args.pretrain_steps
            update_autoencoder(nets, optimizers, expert, rollout, 1, args, generator, inverse)
        encode_expert(nets.autoencoder, expert)
    if nets.predictor:
        rollout, _ = collect_frames(envs, render, nets, episodes, args.num_steps, generator)
        steps = PREDICTOR_PRETRAINING * args.predictor_steps
        update_predictor(nets, optimizers, rollout, steps, generator)


# Training


def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; returns what summary.json holds."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # for convolutions, whose initialization takes no generator
    device, generator = join_processes(args.cuda), Generator().manual_seed(args.seed)
    demos = load_demos(args, required=["qpos"])
    render = Renderer(args.image_size, args.threads, device)
    expert = film_expert(demos, render, args.frame_stack)
    nets = Networks(expert["frames"], demos["obs"], args, generator).to(device)
    optimizers, normalizer = make_optimizers(nets, args), RewardNormalizer()
    envs = BatchHalfCheetah(args.num_envs // WORLD_SIZE, demos["max_episode_steps"], args.threads)
    demos["random_return"] = random_return(demos["max_episode_steps"], args.seed)

    rows, seconds, wandb_id = [], 0.0, None
    if args.resume:
        saved = load_file(args.resume, "--resume", "gail_pixels_ae checkpoint")
        nets.load_state_dict(saved["networks"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        normalizer.moments.extend(saved["moments"])
        generator.set_state(saved["generator"])
        rows, seconds, wandb_id = saved["rows"], saved["seconds"], saved["wandb_id"]
    own_seed = args.seed + 1_000_000 * RANK + len(rows)
    episodes = begin_episodes(envs, render, args.frame_stack, own_seed)
    if RANK > 0:  # the same networks, other noise and, when resumed, new episodes
        generator.manual_seed(own_seed)
    elif args.resume and len(saved["episodes"]["return"]) == envs.num_envs:  # as many processes
        envs.set_state(saved["simulator"])
        episodes = saved["episodes"]
    batch_size = args.num_envs * args.num_steps
    pretraining = args.pretraining_rollouts() * batch_size
    num_iterations = (args.total_timesteps - pretraining) // batch_size
    if len(rows) >= num_iterations and Path(args.resume).with_name("summary.json").exists():
        raise UserError("--resume: this run is finished; give a greater --total-timesteps.")
    if RANK == 0:
        run_dir = open_run("gail_pixels_ae", args, wandb_id)

    start = time.perf_counter() - seconds
    encode_expert(nets.autoencoder, expert)
    if not args.resume:
        pretrain(envs, render, nets, optimizers, expert, episodes, args, generator)
        encode_expert(nets.autoencoder, expert)
    annealed = [group for x in optimizers if x != "disc" for group in optimizers[x].param_groups]
    for group in annealed:
        group.setdefault("initial_lr", group["lr"])
    todo, off = range(len(rows), num_iterations), RANK > 0 or None  # None: if there is no terminal
    bar = tqdm(todo, initial=len(rows), total=num_iterations, unit="rollout", disable=off)
    for iteration in bar:
        if args.anneal_lr:
            for group in annealed:
                group["lr"] = group["initial_lr"] * (1 - iteration / num_iterations)
        clock = [time.perf_counter()]
        rollout, log = collect_frames(envs, render, nets, episodes, args.num_steps, generator)
        clock.append(time.perf_counter())
        log |= update_latent_discriminator(nets, optimizers, expert, rollout, args, generator)
        rewards, reward_log = compute_latent_rewards(nets, rollout, normalizer, args)
        clock.append(time.perf_counter())
        log |= update_policy(nets.agent, optimizers["agent"], rollout, rewards, args, generator)
        clock.append(time.perf_counter())
        if nets.predictor:
            log |= update_predictor(nets, optimizers, rollout, args.predictor_steps, generator)
        if args.ae_steps:
            log |= update_autoencoder(
                nets, optimizers, expert, rollout, args.ae_steps, args, generator
            )
            encode_expert(nets.autoencoder, expert)
        clock.append(time.perf_counter())

        if RANK > 0:
            continue  # process 0 evaluates, logs and saves
        step, last = pretraining + (iteration + 1) * batch_size, iteration == num_iterations - 1
        if last or step % args.eval_interval < batch_size:
            returns, _ = evaluate(nets, render, demos, 20, args.seed + 10_000, args)
            log |= return_metrics(returns[-1], demos)
            log |= reconstruct(nets.autoencoder, expert, rollout, run_dir / "reconstructions.png")
            bar.set_postfix_str(f"return {returns[-1].mean():.0f}")
        seconds = time.perf_counter() - start
        log |= reward_log | {"charts/SPS": step / seconds}
        log["charts/learning_rate"] = optimizers["agent"].param_groups[0]["lr"]
        names = ("time/rollout", "time/discriminator", "time/update", "time/autoencoder")
        log |= dict(zip(names, np.diff(clock).tolist()))
        # Nothing may hang on the true return, not even whether the run goes on.
        losses = [x for name, x in log.items() if name.startswith(("losses/", "disc/", "ae/"))]
        require(all(map(math.isfinite, losses)), f"training diverged at step {step}: {log}; "
                "start again with smaller step sizes (the last checkpoint is from before).")
        rows.append({"global_step": step} | log)
        if args.track:
            wandb.log(rows[-1], step=step)
        if last or step % args.checkpoint_interval < batch_size:
            checkpoint = {
                "kind": "gail_pixels_ae checkpoint",
                "args": vars(args),
                "networks": nets.state_dict(),
                "optimizers": {name: x.state_dict() for name, x in optimizers.items()},
                "moments": list(normalizer.moments),
                "generator": generator.get_state(),
                "simulator": envs.get_state(),
                "episodes": episodes,
                "rows": rows,
                "seconds": seconds,
                "wandb_id": wandb.run.id if args.track else None,
            }
            policy = {"kind": "gail_pixels_ae policy", "args": vars(args)}
            policy |= {"networks": nets.state_dict(), "max_episode_steps": envs.max_episode_steps}
            write_csv(rows, run_dir / "metrics.csv")
            save_atomically(policy, run_dir / "policy.pt")
            save_atomically(checkpoint, run_dir / "checkpoint.pt")
    if RANK > 0:
        return {}
    return report(nets, render, demos, rows, seconds, args, run_dir)


# --- Plumbing: demonstrations, environments, frames, processes ---


def load_demos(args, required: list[str]) -> dict:
    """Arrays and metadata of a demonstration set (docs/own_demonstrations.md), cut to --num-demos
    episodes that the seed draws. Adds "obs" (L, O), what each action answered, and "returns" (E,),
    NaN without rewards. UserError where the set is damaged, incomplete or of another task."""
    path = Path(args.demos)
    if not path.exists():
        path = Path(__file__).parent / args.demos  # whatever folder the script is called from
    try:
        with np.load(path, allow_pickle=False) as file:
            demos = dict(file)
        demos |= json.loads(str(demos.pop("metadata")))
        lengths, recorded_in, limit = (demos[x] for x in ("lengths", "env_id", "max_episode_steps"))
        if recorded_in.rsplit("-v", 1)[0] != args.env_id.rsplit("-v", 1)[0]:
            raise ValueError(f"recorded in {recorded_in}, but --env-id is {args.env_id}")
        if lengths.ndim != 1 or lengths.dtype.kind != "i" or lengths.min(initial=1) < 1:
            raise ValueError("'lengths' must be (E,) whole numbers, each episode of 1 step or more")
        if lengths.max(initial=0) > limit:
            longest = lengths.max()
            raise ValueError(f"an episode has {longest} steps, but max_episode_steps is {limit}")
        count = args.num_demos or len(lengths)
        if not 0 < count <= len(lengths):
            raise ValueError(f"--num-demos is {count}, but it holds {len(lengths)} episodes")
        drawn = np.random.default_rng(args.seed).choice(len(lengths), count, replace=False)
        episodes = np.isin(np.arange(len(lengths)), drawn)
        steps, states = np.repeat(episodes, lengths), np.repeat(episodes, lengths + 1)
        rows = {"observations": states, "qpos": states, "qvel": states, "actions": steps}
        rows |= {"rewards": steps, "lengths": episodes}
        rows |= {"terminated": episodes, "truncated": episodes}
        needed = {"observations", "terminated", "truncated", *required}
        for name in sorted(rows.keys() & (needed | demos.keys())):
            x, wanted = demos[name], len(rows[name])
            if x.shape[:1] != (wanted,) or not (np.isfinite(x).all() or name == "rewards"):
                found = f"'{name}' is {x.dtype} of shape {x.shape}"
                raise ValueError(f"{found}, expected {wanted} rows of finite numbers")
            if name in ("terminated", "truncated") and (x.dtype != bool or x.ndim > 1):
                raise ValueError(f"'{name}' is {x.dtype} of shape {x.shape}, expected (E,) bool")
            demos[name] = x[rows[name]]
    except KeyError as error:
        raise UserError(f"--demos {args.demos}: the field {error} is missing; see "
                        "docs/own_demonstrations.md.") from None
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        raise UserError(f"--demos {args.demos}: {reason(error)}; see "
                        "docs/own_demonstrations.md.") from None
    if recorded_in != args.env_id:
        warnings.warn(f"demonstrations of {recorded_in} are used in {args.env_id}")
    final = np.cumsum(demos["lengths"] + 1) - 1
    demos["obs"] = np.delete(demos["observations"], final, axis=0).astype(np.float64)
    rewards = demos.get("rewards", np.full(len(demos["obs"]), np.nan)).astype(np.float64)
    demos["returns"] = np.add.reduceat(rewards, np.cumsum(demos["lengths"]) - demos["lengths"])
    return demos | {"env_id": args.env_id, "max_episode_steps": int(limit)}


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


class Renderer:
    """Frames of simulation states, by OpenGL: a picture depends on qpos alone. MuJoCo's C calls
    release the GIL, so threads do as well as processes; an OpenGL context belongs to one thread."""

    def __init__(self, height: int, threads: int, device):
        self.height, self.width = height, 8 * round(height * VIEW_ASPECT / 8)
        self.model, self.threads, self.device = BatchHalfCheetah(1, 1, 1).model, threads, device
        # What is not needed to see the animal goes: shadows, smooth edges, reflections, sky and
        # haze (37 frames/s with them in software, 1,000 without), then fine capsules (2,900).
        vis = self.model.vis
        vis.quality.shadowsize = vis.quality.offsamples = 0
        vis.quality.numslices, vis.quality.numstacks, vis.quality.numquads = 12, 6, 1
        vis.global_.offheight, vis.global_.offwidth = self.height, self.width
        vis.global_.fovy = math.degrees(2 * math.atan(VIEW_HEIGHT / 2 / CAMERA_DISTANCE))
        os.environ.setdefault("LP_NUM_THREADS", "0")  # or software OpenGL starts threads of its own
        self.pool, self.local = ThreadPoolExecutor(threads), threading.local()

    def setup(self) -> None:
        """Once a thread, before its first picture."""
        self.local.gl = open_gl(self.width, self.height)
        self.local.data = mujoco.MjData(self.model)
        self.local.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.local.context)
        self.local.scene = mujoco.MjvScene(self.model, 100)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
            self.local.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False

    def draw(self, qpos: np.ndarray) -> np.ndarray:
        """(B, nq) -> (B, H, W), in the calling thread."""
        if not hasattr(self.local, "scene"):
            self.setup()
        model, data, scene = self.model, self.local.data, self.local.scene
        camera, option, visible = mujoco.MjvCamera(), mujoco.MjvOption(), mujoco.mjtCatBit.mjCAT_ALL
        camera.distance, camera.azimuth, camera.elevation = CAMERA_DISTANCE, 90.0, CAMERA_ELEVATION
        rect, torso = mujoco.MjrRect(0, 0, self.width, self.height), model.body("torso").id
        rgb = np.empty((len(qpos), self.height, self.width, 3), np.uint8)
        for i in range(len(qpos)):
            data.qpos[:] = qpos[i]
            # After a step MuJoCo's derived fields lag one substep: all is made anew from qpos.
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_camlight(model, data)
            camera.lookat[:] = data.subtree_com[torso][0], 0, VIEW_CENTRE
            mujoco.mjv_updateScene(model, data, option, None, camera, visible, scene)
            mujoco.mjr_render(rect, scene, self.local.context)
            mujoco.mjr_readPixels(rgb[i], None, rect, self.local.context)
        red, _, blue = np.moveaxis(rgb[:, ::-1].astype(np.int16), -1, 0)  # OpenGL's rows go up
        return np.clip((20 * red - 17 * blue) // 10, 0, 255).astype(np.uint8)

    def __call__(self, qpos: np.ndarray) -> Tensor:
        """qpos (B, nq) -> frames (B, H, W) uint8 on the device."""
        pieces = self.threads * math.ceil(len(qpos) / self.threads / 256)  # to fit the memory
        frames = np.concatenate(list(self.pool.map(self.draw, np.array_split(qpos, pieces))))
        return torch.from_numpy(frames).to(self.device)


def open_gl(width: int, height: int):
    """An OpenGL context without a display: EGL on Linux, but where MUJOCO_GL names another;
    elsewhere MuJoCo's default."""
    try:
        if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
            from mujoco.egl import GLContext as make_context
        else:
            make_context = mujoco.GLContext
        context = make_context(width, height)
        context.make_current()
        return context
    except Exception as error:  # each kind of OpenGL fails in its own way
        advice = "install libegl1, libegl-mesa0 and libgl1-mesa-dri (Debian), or set MUJOCO_GL"
        raise UserError(f"no OpenGL here ({type(error).__name__}); {advice}.") from None


def film_expert(demos: dict, render: Renderer, frame_stack: int) -> dict[str, Tensor]:
    """Frames of the demonstrations, and which of them belong together."""
    frames, lengths = render(demos["qpos"]), demos["lengths"]
    windows = torch.from_numpy(window_rows(lengths, frame_stack)).to(frames.device)
    after_action = torch.ones(len(frames), dtype=torch.bool, device=frames.device)
    after_action[np.cumsum(lengths + 1) - (lengths + 1)] = False  # but each episode's first
    train = len(frames) - (int(lengths[-1]) + 1) * (len(lengths) > 1)
    expert = {"frames": frames, "windows": windows, "after_action": after_action}
    return expert | {"train_frames": frames[:train], "heldout_frames": frames[train:]}


def begin_episodes(envs: BatchHalfCheetah, render: Renderer, frame_stack: int, seed: int) -> dict:
    """What a rollout goes on from: the last K frames (N, K, H, W), oldest first, the last K - 1
    actions (N, K - 1, A), states (N, O), returns so far (N,)."""
    state, _ = envs.reset(seed=seed)
    return {
        "frames": render(envs.qpos)[:, None].repeat(1, frame_stack, 1, 1),
        "actions": torch.zeros(envs.num_envs, frame_stack - 1, ACTION_DIM),
        "state": torch.from_numpy(state),
        "return": torch.zeros(envs.num_envs, dtype=torch.float64),
    }


def join_processes(cuda: bool) -> torch.device:
    """Connect with the other processes of torchrun, if any; returns this one's device."""
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def all_gather(x: Tensor) -> Tensor:
    """The (B, ...) tensors of all W processes, one after the other: (W B, ...)."""
    if WORLD_SIZE == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def average_gradients(optimizer, *_) -> None:
    """Before each step: every process gets the mean of all gradients, so that networks stay equal
    to the bit."""
    if WORLD_SIZE == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    mean = torch.cat([p.grad.flatten() for p in parameters]) / WORLD_SIZE
    dist.all_reduce(mean)
    for p, grad in zip(parameters, mean.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view(p.shape))


# --- Plumbing: evaluation, files, command line ---


def random_return(max_episode_steps: int, seed: int) -> float:
    """Mean return of 20 episodes with random actions."""
    envs = BatchHalfCheetah(20, max_episode_steps, 1)
    envs.reset(seed=seed)
    envs.action_space.seed(seed)
    rewards = [envs.step(envs.action_space.sample())[1] for _ in range(max_episode_steps)]
    return np.sum(rewards, axis=0).mean().item()


def evaluate(nets: Networks, render, task: dict, episodes: int, seed: int, args, sampled=False):
    """Cumulative true returns (T, E) after each step of fresh episodes, with the mean action or
    sampled ones, the last row being the episodes' returns; and the rollout."""
    envs = BatchHalfCheetah(episodes, task["max_episode_steps"], args.threads)
    begun = begin_episodes(envs, render, args.frame_stack, seed)
    steps, generator = task["max_episode_steps"], Generator().manual_seed(seed)
    rollout, _ = collect_frames(envs, render, nets, begun, steps, generator, sampled)
    return rollout["env_reward"].double().cumsum(0).cpu().numpy(), rollout


def return_metrics(returns: np.ndarray, demos: dict) -> dict[str, float]:
    """What to log of an evaluation's returns (E,), if the environment has any. A normalized score
    of 0 is as good as random actions, of 1 as the demonstrations (Fu et al. 2020,
    https://arxiv.org/abs/2004.07219); it is left out where those are no better."""
    if not np.isfinite(returns).all():
        return {}
    metrics = {"eval/return_mean": returns.mean().item(), "eval/return_std": returns.std().item()}
    gain = demos["returns"].mean().item() - demos["random_return"]
    if gain > 0:
        score = (metrics["eval/return_mean"] - demos["random_return"]) / gain
        metrics["eval/normalized_score"] = score
    return metrics


def final_evaluation(nets, render, task: dict, args: Args, folder: Path) -> list[np.ndarray]:
    """Returns (E,) with the mean action, and sampled; evaluation.npz gets those after each step."""
    mean, _ = evaluate(nets, render, task, args.eval_episodes, args.seed + 20_000, args)
    sampled, _ = evaluate(nets, render, task, args.eval_episodes, args.seed + 30_000, args, True)
    np.savez(folder / "evaluation.npz", mean_action=mean, sampled=sampled)
    print(f"  mean action {mean[-1].mean():9.1f} ± {mean[-1].std():.1f}")
    print(f"  sampled     {sampled[-1].mean():9.1f} ± {sampled[-1].std():.1f}")
    return [mean[-1], sampled[-1]]


def evaluate_file(args: Args) -> None:
    """--evaluate: the policy of a policy.pt, with the settings of its eyes."""
    saved = load_file(args.evaluate, "--evaluate", "gail_pixels_ae policy")
    require(saved["args"].keys() == vars(args).keys(), f"--evaluate {args.evaluate}: another "
            "version of this script wrote it; give a file of this one.")
    own = {name: getattr(args, name) for name in ("seed", "threads", "eval_episodes")}
    trained, device = Args(**saved["args"] | own), join_processes(args.cuda)
    torch.set_num_threads(args.threads)
    render = Renderer(trained.image_size, args.threads, device)
    no_frames = torch.zeros((2, render.height, render.width), dtype=torch.uint8)
    nets = Networks(no_frames, np.zeros((1, 17)), trained, Generator()).to(device)
    nets.load_state_dict(saved["networks"])
    final_evaluation(nets, render, saved, trained, Path(args.evaluate).parent)


def report(nets, render, demos: dict, rows: list[dict], seconds: float, args, run_dir) -> dict:
    """The final evaluation and the run's summary: a table, summary.json, curves.png, policy.gif."""
    returns, sampled = final_evaluation(nets, render, demos, args, run_dir)
    steps, demos_mean = rows[-1]["global_step"], demos["returns"].mean().item()
    summary = return_metrics(returns, demos)
    evaluated = [row for row in rows if "eval/return_mean" in row]
    if evaluated:
        best = max(evaluated, key=lambda row: row["eval/return_mean"])
        summary |= {"best/return_mean": best["eval/return_mean"], "best/step": best["global_step"]}
        summary["eval/return_sampled_mean"] = sampled.mean().item()
    if "eval/normalized_score" in summary:
        summary |= {"demos_return_mean": demos_mean, "random_return_mean": demos["random_return"]}
        if isinstance(demos.get("expert_return_mean"), (int, float)):
            summary["expert_return_mean"] = demos["expert_return_mean"]
        high = [row["eval/normalized_score"] >= 0.9 for row in evaluated]
        twice = [row["global_step"] for row, *pair in zip(evaluated, high, high[1:]) if all(pair)]
        if twice:  # the first of two evaluations in a row at 90%
            summary["steps_to_90"] = twice[0]
    summary |= {"env_steps": steps, "seconds": seconds, "charts/SPS": steps / seconds}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(*(f"  {name:24}{x:12,.6g}" for name, x in summary.items()), f"  {run_dir}", sep="\n")
    if args.track:
        wandb.summary.update(summary)
        wandb.finish()
    plot_curves(rows, demos_mean, run_dir / "curves.png")
    if args.capture_video:
        record_side_by_side(nets, render, demos, args, run_dir / "policy.gif")
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
        ax.plot([row["global_step"] for row in logged], [row[name] for row in logged], label=label)
    left.axhline(demos_mean, color="black", linestyle="--", label="demonstrations")
    left.set(title="Return", xlabel="environment steps", ylabel="true return of an episode")
    right.set(title="Discriminator", xlabel="environment steps", ylabel="mean D", ylim=(0, 1))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, expert: dict, rollout, path: Path) -> dict[str, float]:
    """Mean reconstruction errors of 256 frames of each kind, to log. And a picture: frames in the
    first row, reconstructions in the second, differences in the third; on the left four of the
    expert's (held out, if there are any), on the right four of the policy's."""
    kinds = {"expert": expert["train_frames"], "heldout": expert["heldout_frames"]}
    kinds, columns, log = kinds | {"policy": rollout["frame"].flatten(0, 1)}, [], {}
    for name, frames in kinds.items():
        if len(frames) > 0:
            spread = torch.linspace(0, len(frames) - 1, 256, device=frames.device).long()
            frames, latents = frames[spread], autoencoder.encode(frames[spread])
            log[f"ae/recon_{name}"] = autoencoder.errors(latents, frames).mean().item()
            guesses = autoencoder.decoder(latents)[:, 0] + autoencoder.mean_frame
            for frame, guess in zip(frames[::80] / 255, guesses[::80]):
                columns.append(torch.cat([frame, guess, guess - frame + 0.5]))
    picture = 255 * torch.cat(columns[-8:], dim=1).clamp(0, 1)
    imageio.imwrite(path, picture.byte().cpu().numpy())
    return log


def record_side_by_side(nets: Networks, render, demos: dict, args: Args, path: Path) -> None:
    """A GIF of one episode: the expert on the left, the policy's mean action on the right."""
    _, rollout = evaluate(nets, render, demos, 1, args.seed, args)
    length, large = int(demos["lengths"][0]), Renderer(168, 1, "cpu")
    left = large(demos["qpos"][1 : length + 1]).numpy()
    right = large(rollout["qpos"][:length, 0].cpu().numpy()).numpy()
    gap = np.full((length, large.height, 4), 255, np.uint8)
    imageio.mimsave(path, list(np.concatenate([left, gap, right], axis=2)), duration=50, loop=0)


def open_run(script: str, args: Args, wandb_id: str | None) -> Path:
    """The folder of the run, new or resumed; with --track, its run in Weights & Biases too."""
    name = f"{script}__{args.env_id}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.output_dir) / (args.run_name or re.sub("[:/]", "-", name))
    while run_dir.exists() and not args.run_name:  # another run began in the same second
        run_dir = run_dir.with_name(run_dir.name + "b")
    if args.resume:
        run_dir = Path(args.resume).parent
    elif run_dir.exists():
        raise UserError(f"--run-name: {run_dir} exists already; give another, or --resume it.")
    if args.track:
        names = {"project": args.wandb_project_name, "name": run_dir.name, "dir": args.output_dir}
        try:
            wandb.init(**names, id=wandb_id, resume="allow", config=vars(args))
        except Exception as error:  # W&B fails in many ways
            raise UserError(f"--track: {reason(error)}; run `wandb login`, or set "
                            "WANDB_MODE=offline.") from None
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    (run_dir / "summary.json").unlink(missing_ok=True)  # of a finished run that goes on longer
    return run_dir


def save_atomically(content: dict, path: Path) -> None:
    """torch.save that leaves the old file or the new one, whole, wherever the process is killed."""
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(content, buffer)  # to memory first: on a full disk torch fails obscurely
    temporary.write_bytes(buffer.getvalue())
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
        raise UserError(f"{flag} {path}: not a readable file ({problem}); give one that a run "
                        "wrote.") from None
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


def check_numbers(args, may_be_zero: str, at_least: dict, at_most: dict) -> None:
    """UserError unless every number is positive, or 0 where it may be, and within its limits."""
    for name, x in vars(args).items():
        if type(x) in (int, float):
            low, high = at_least.get(name, 0), at_most.get(name, sys.float_info.max)
            zero_is_fine = name in may_be_zero.split()
            expected = f"{low} or more" if low or zero_is_fine else "more than 0"
            expected += f" and {high} or less" if name in at_most else ""
            good = low <= x <= high and (x > 0 or zero_is_fine)
            flag = f"--{name.replace('_', '-')}"
            require(good, f"{flag} is {x}, expected a number, {expected}; change it.")


def parse_args(argv: list[str]) -> Args:
    """Settings of a new run, or of a resumed one. W&B's sweep agents write --flag=True, =False."""
    argv = [re.sub("^--(.*)=True$", r"--\1", re.sub("^--(.*)=False$", r"--no-\1", x)) for x in argv]
    args = tyro.cli(Args, args=argv)
    if args.resume:
        given = {x.split("=")[0].replace("_", "-") for x in argv if x.startswith("--")}
        require(given <= {"--resume", "--total-timesteps"}, "--resume takes all settings but "
                "--total-timesteps from the checkpoint; drop the other flags.")
        saved = load_file(args.resume, "--resume", "gail_pixels_ae checkpoint")["args"]
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
            evaluate_file(args)
        else:
            train(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume <run>/checkpoint.pt goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
