# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "matplotlib==3.11.2",
#                 "imageio==2.38.1"]
# ///
"""GAIL from camera frames alone, through an autoencoder, complete in one file.

The learner knows expert and policy as images. An autoencoder turns each frame into a latent of Z
numbers; policy, value and discriminator D work on the latents of the last K frames. The rest is
GAIL (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476) and PPO, much as in `gail_ppo.py`:

    pretrain autoencoder and predictor, then repeat:
    collect a rollout, encoding each frame once -> update D -> reward = how sure D is of the expert
    -> update policy -> update predictor and autoencoder -> encode the expert's frames anew

What GAIL on states does not have, and why:

 1. Expert's and policy's frames are drawn by the same code: they can differ in behaviour alone.
    (With a film as demonstrations, look at first_frames.png: is it the same camera?) The expert's
    actions, the true reward and (unless --policy-obs state) the true state never reach the learner.
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
 7. The bodies of gymnasium's locomotion tasks are capsules, so a few lines of torch draw them, on
    CPU or GPU, without OpenGL. The camera runs along at one height: a jump shows, the way does not.
 8. First layers of many inputs take smaller steps. The learning rates of encoder and predictor
    fall to zero with the policy's.
 9. On a GPU a single process records repeated steps once, as CUDA graphs (Captured).

    python gail_pixels_ae.py                              # K = 4: ten minutes on one core
    python gail_pixels_ae.py --frame-stack 4 --cuda       # the same on a GPU
    python gail_pixels_ae.py --policy-obs state           # the policy sees the robot's own state
    python gail_pixels_ae.py --frames render --env-id <id> --demos <film>.npz  # pictures of a task
    python gail_pixels_ae.py --evaluate runs/<run>/policy.pt
    python gail_pixels_ae.py --resume runs/<run>/checkpoint.pt
    torchrun --standalone --nproc-per-node 2 gail_pixels_ae.py
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
from collections import Counter, deque
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

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

REWARD_WINDOW = 10  # rollouts that rewards are normalized over
INPUT_CLIP = 10.0  # standardized inputs are clipped to [-INPUT_CLIP, INPUT_CLIP]
INITIAL_LOG_STD, LOG_STD_MIN, LOG_STD_MAX = -0.5, -5.0, 2.0  # of the policy's Gaussian
MAX_LOG_RATIO = 1.0  # where PPO's log ratio is cut, or one bad action could outweigh a minibatch
FULL_STEP_INPUTS = 28  # layers of more inputs than this take smaller steps
# How to look at a body: width and height of the picture and the height of its middle above the
# floor, in metres; degrees that it looks down; how many of its positions are not observed
CAMERAS = {
    "HalfCheetah": (2.2, 1.3, 0.56, 0, 1),
    "Hopper": (1.2, 2.0, 0.9, 0, 1),
    "Walker2d": (1.5, 2.0, 0.9, 0, 1),
    "Swimmer": (3.8, 2.2, 0.0, 90, 2),
    "Ant": (2.4, 2.0, 0.5, 45, 2),
    "Humanoid": (1.4, 1.8, 0.85, 15, 2),
}
GROUND = 27.0  # brightness of what is below the floor, seen from the side; the sky is black
POSES_AT_ONCE, FRAMES_AT_ONCE = 64, 32  # of a film in one go: so many fit the cache
FILM_STEPS = 200  # that policy.gif shows at most
LOOK_AHEAD = 2  # steps that the predictor looks ahead
MODEL_HIDDEN = 256  # width of the hidden layers of predictor and inverse model
PREDICTOR_BATCH_SIZE = 512
PREDICTOR_PRETRAINING = 16  # times as many predictor steps before the policy's first update
SNIPPET = 16  # consecutive frames in a minibatch of the autoencoder
AE_LR_KEPT = 0.2  # what is left of the autoencoder's learning rate after its pretraining
# torchrun starts W processes and tells each its rank; they share environments and minibatches
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Args:
    seed: int = 1  # seed of networks, environments, minibatches, choice of demonstrations
    env_id: str = "HalfCheetah-v4"
    """the demonstrations' environment: HalfCheetah, Hopper, Walker2d, Swimmer, Ant or Humanoid, or,
    with --frames render, any that has rgb_array"""
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"  # demonstration set (data/README.md)
    num_demos: int = 0  # use this many demonstrated episodes, drawn by the seed (0: all)
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: gail_pixels_ae__<env>__<seed>__<time>)
    resume: str = ""  # checkpoint.pt to go on from; with --total-timesteps, on a new schedule
    evaluate: str = ""  # policy.pt to evaluate, in its own task, instead of training
    eval_interval: int = 50_000  # env steps between evaluations (20 episodes, mean action)
    eval_episodes: int = 100  # episodes of the final evaluation, for mean and for sampled actions
    checkpoint_interval: int = 100_000  # env steps between checkpoints
    capture_video: bool = True  # write policy.gif, expert and policy side by side, at the end
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    cuda: bool = False  # networks and frames on the GPU
    threads: int = 0  # threads of physics, rendering and networks (0: one per core)

    total_timesteps: int = 1_000_000  # env steps of the whole run, those of the pretraining too
    num_envs: int = 64  # parallel environments (N), of all processes together
    num_steps: int = 100  # steps per environment and rollout (T)
    learning_rate: float = 2e-3  # Adam learning rate of policy and value
    anneal_lr: bool = True  # let all learning rates but D's fall linearly to zero over the run
    gamma: float = 0.0  # discount factor (0: 1 - 10 / L, 0.9 to 0.99; L: demos' mean length)
    gae_lambda: float = 0.8  # lambda of generalized advantage estimation
    num_minibatches: int = 8  # minibatches per epoch of the PPO update
    update_epochs: int = 8  # epochs of the PPO update over each rollout
    clip_coef: float = 0.2  # clipping of the probability ratio
    ent_coef: float = 0.0  # weight of the policy's entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient norm at which PPO's gradients are cut
    average_share: float = 0.05  # share of rollouts that the judged networks average (0: the last)
    hidden_size: int = 128  # width of the two hidden layers of policy and value

    normalize_reward: bool = True  # subtract the running mean, divide by the running std
    disc_learning_rate: float = 1e-3  # Adam learning rate of D
    disc_steps: int = 20  # minibatch steps of D per rollout
    disc_batch_size: int = 512  # expert windows of K frames, and as many of the policy's
    disc_hidden_size: int = 128  # width of D's two hidden layers
    grad_penalty_coef: float = 0.1  # weight of D's gradient penalty

    frames: Literal["capsules", "render"] = "capsules"
    """the policy's frames: drawn by this script, or by the environment's own render()"""
    frame_stack: int = 4  # frames that policy and D see at once (K)
    image_size: int = 56  # shorter side of a frame in pixels; the longer one fits the camera
    latent_dim: int = 64  # numbers that a frame is encoded into (Z)
    policy_obs: Literal["latent", "state"] = "latent"
    """what policy and value see: predicted latents, or the robot's own state"""
    pretrain_steps: int = 2_000  # autoencoder steps on a rollout of the untrained policy
    ae_steps: int = 24  # autoencoder steps after each rollout (0: frozen after the pretraining)
    inverse_coef: float = 0.1  # weight of the inverse model's loss (0: reconstruction alone)
    predictor_steps: int = 60  # predictor steps per rollout (0: the policy sees present latents)
    ae_batch_size: int = 128  # frames in a minibatch: half of the expert, up to half of the policy
    ae_learning_rate: float = 1e-3  # Adam learning rate of the autoencoder; a fifth once pretrained

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        rollout = self.num_envs * self.num_steps
        at_least = {"image_size": 16, "ae_batch_size": 2 * self.frame_stack * WORLD_SIZE}
        at_least |= {"num_steps": max(LOOK_AHEAD, self.frame_stack), "disc_batch_size": WORLD_SIZE}
        at_least |= {"total_timesteps": (1 + self.pretraining_rollouts()) * rollout}
        at_most = {"seed": 2**31 - 1, "gamma": 0.9999, "gae_lambda": 1, "frame_stack": 100}
        at_most |= {"num_minibatches": rollout // (2 * WORLD_SIZE), "average_share": 1}
        may_be_zero = "seed num_demos threads gamma gae_lambda ent_coef vf_coef grad_penalty_coef "
        may_be_zero += "average_share pretrain_steps ae_steps inverse_coef predictor_steps"
        check_settings(self, may_be_zero, at_least, at_most)
        require(self.frames == "render" or body_of(self.env_id) in CAMERAS, f"--env-id is "
                f"{self.env_id}, but capsules can be drawn of {', '.join(CAMERAS)} alone; choose "
                "one of these, or --frames render.")
        require(self.frames == "capsules" or self.policy_obs == "latent", "--policy-obs state does "
                "not go with --frames render; drop one of them.")
        require(self.image_size % 8 == 0, f"--image-size is {self.image_size}, expected a multiple "
                "of 8; change it.")
        require(self.num_envs % WORLD_SIZE == 0, f"--num-envs is {self.num_envs}, but "
                f"{WORLD_SIZE} processes divide it; give a multiple of that.")
        require(torch.cuda.is_available() or not self.cuda, "--cuda was given, but PyTorch sees no "
                "GPU; drop it (--resume: --no-cuda) or install a CUDA build of torch.")
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
    """Linear layers with LayerNorm and SiLU between, orthogonal weights (gain sqrt 2; of the last
    layer output_gain)."""
    layers, gains = [], [math.sqrt(2)] * (len(sizes) - 2) + [output_gain]
    for fan_in, fan_out, gain in zip(sizes[:-1], sizes[1:], gains):
        layers += [nn.Linear(fan_in, fan_out), nn.LayerNorm(fan_out), nn.SiLU()]
        nn.init.orthogonal_(layers[-3].weight, gain, generator=generator)
        nn.init.zeros_(layers[-3].bias)
    return nn.Sequential(*layers[:-2])


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


class Autoencoder(nn.Module):
    """Two strided convolutions and a linear layer to Z latents, and back by sub-pixel convolutions
    (Shi et al. 2016). It knows its normalization: mean and spread of the expert's frames (B, H, W)
    uint8, and mean and std of the expert's features, which change with the encoder (see
    encode_expert)."""

    def __init__(self, frames: Tensor, latent_dim: int, frame_stack: int):
        super().__init__()
        pixels = frames.float() / 255
        weight = 1 / (pixels.std(0) + 0.03)  # still pixels count too: a new policy may move there
        self.register_buffer("mean_frame", pixels.mean(0))
        self.register_buffer("weight", weight / weight.mean())  # of each pixel's squared error
        self.standardize = Standardize(np.zeros((1, frame_stack * latent_dim)))
        self.frame_stack = frame_stack
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
    """Gaussian policy and value of standardized observations (..., O). An action (..., A) is in
    units of its bounds: from -1 to 1."""

    def __init__(self, obs_dim: int, space: gym.spaces.Box, hidden_size: int, generator: Generator):
        super().__init__()
        sizes, action_dim = [obs_dim, hidden_size, hidden_size], space.shape[0]
        self.actor = mlp([*sizes, 2 * action_dim], 0.01, generator)
        self.critic = mlp([*sizes, 1], 1.0, generator)
        self.actor[-1].bias.data[action_dim:] = INITIAL_LOG_STD
        self.register_buffer("middle", torch.from_numpy(space.high + space.low) / 2)
        self.register_buffer("half_range", torch.from_numpy(space.high - space.low) / 2)

    def value(self, x: Tensor) -> Tensor:
        return self.critic(x).squeeze(-1)

    def gaussian(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std of the action, (..., A) each, from the actor's output."""
        mean, log_std = output.chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def log_prob_and_entropy(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.gaussian(output)
        return gaussian_log_prob(action, mean, log_std), gaussian_entropy(log_std)

    def for_envs(self, executed: Tensor) -> np.ndarray:
        """Actions in the environment's units."""
        return (self.middle + self.half_range * executed).cpu().numpy()


class Networks(nn.Module):
    """All networks. Demonstrated frames (B, H, W), and states (L, O), which --policy-obs state
    needs, are for normalization alone."""

    def __init__(self, frames: Tensor, states: np.ndarray, space: gym.spaces.Box, args: Args,
                 generator: Generator):
        super().__init__()
        self.policy_obs, self.predictor, self.inverse = args.policy_obs, None, None
        features_dim, action_dim = args.frame_stack * args.latent_dim, space.shape[0]
        obs_dim = history_dim = features_dim + (args.frame_stack - 1) * action_dim
        if args.has_predictor():
            predicted_dim = min(args.frame_stack, 2) * args.latent_dim  # last step, newest latent
            inputs_dim = history_dim + LOOK_AHEAD * action_dim
            sizes = [inputs_dim, MODEL_HIDDEN, MODEL_HIDDEN, predicted_dim]
            self.predictor = mlp(sizes, 1.0, generator)
            obs_dim = predicted_dim + min(args.frame_stack - 1, 1) * action_dim
        self.autoencoder = Autoencoder(frames, args.latent_dim, args.frame_stack)
        if args.policy_obs == "state":
            self.standardize_state, obs_dim = Standardize(states), states.shape[1]
        self.agent = GaussianAgent(obs_dim, space, args.hidden_size, generator)
        sizes = [features_dim, args.disc_hidden_size, args.disc_hidden_size, 1]
        self.disc = mlp(sizes, 1.0, generator)  # logit of "these K frames are the expert's"
        if args.inverse_coef > 0 and args.frame_stack > 1:
            self.inverse = mlp([features_dim, MODEL_HIDDEN, action_dim], 1.0, generator)

    def observe(self, latents: Tensor, actions: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """Latents of K frames (N, K, Z), the last K - 1 actions (N, K - 1, A), states (N, O) ->
        features (N, K Z), which D sees; history (N, M), features and actions, which the predictor
        sees; obs (N, X) for the policy: what is predicted after actions of 0, and the last action;
        without a predictor the history; with --policy-obs state the state."""
        features = self.autoencoder.standardize(latent_steps(latents))
        history = torch.cat([features, actions.flatten(1)], dim=1)
        if self.policy_obs == "state":
            return features, history, self.standardize_state(states)
        if self.predictor is None:
            return features, history, history
        no_actions = history.new_zeros((len(history), LOOK_AHEAD * actions.shape[-1]))
        predicted = self.predictor(torch.cat([history, no_actions], dim=1))
        predicted = predicted.clamp(-INPUT_CLIP, INPUT_CLIP)
        return features, history, torch.cat([predicted, actions[:, -1:].flatten(1)], dim=1)


def make_optimizers(nets: Networks, args: Args) -> dict[str, Adam]:
    """First layers of policy and value take smaller steps where they have many inputs: Adam moves
    each weight by up to its learning rate, so that a layer of 134 inputs (the default) would move
    the policy 8 times as far as one of 17. Learning rates are tensors: CUDA graphs read them."""
    first = [*nets.agent.actor[0].parameters(), *nets.agent.critic[0].parameters()]
    others = [*nets.agent.actor[1:].parameters(), *nets.agent.critic[1:].parameters()]
    weights = list(nets.autoencoder.parameters())
    if nets.inverse:
        weights += nets.inverse.parameters()
    first_lr = args.learning_rate * min(1.0, FULL_STEP_INPUTS / nets.agent.actor[0].in_features)
    groups = {
        "agent": [(others, args.learning_rate), (first, first_lr)],
        "disc": [(nets.disc.parameters(), args.disc_learning_rate)],
        "autoencoder": [(weights, args.ae_learning_rate)],
    }
    if nets.predictor:
        groups["predictor"] = [(nets.predictor.parameters(), 1e-3)]
    optimizers, device = {}, nets.autoencoder.mean_frame.device
    for name, pairs in groups.items():
        settings = {"eps": 1e-5 if name == "agent" else 1e-8, "capturable": device.type == "cuda"}
        pairs = [{"params": p, "lr": torch.tensor(lr).to(device)} for p, lr in pairs]
        optimizers[name] = Adam(pairs, fused=True, **settings)
        optimizers[name].register_step_pre_hook(average_gradients)
    return optimizers


class Captured:
    """function(*tensors) -> a tuple of tensors, on a GPU: its kernels are recorded as a CUDA graph,
    one for each shape of inputs, and a call launches them all at once instead of one by one. The
    first two calls run as they are, to warm up. Parameters and buffers must keep their places in
    memory."""

    def __init__(self, function):
        self.function, self.graphs, self.calls = function, {}, Counter()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(x.shape for x in inputs)
        self.calls[shapes] += 1
        if self.calls[shapes] <= 2:  # as torch.cuda.CUDAGraph wants it: on another stream
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if shapes not in self.graphs:
            graph, held = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph):  # records, and runs nothing
                outputs = self.function(*held)
            self.graphs[shapes] = graph, held, outputs
        graph, held, outputs = self.graphs[shapes]
        for x, new in zip(held, inputs):
            x.copy_(new)
        graph.replay()
        return tuple(x.clone() for x in outputs)  # the next replay writes over them


def make_graphs(nets: Networks, render, optimizers: dict[str, Adam], args: Args) -> dict:
    """What is done over and over: CUDA graphs on a GPU with one process, else plain functions."""
    functions = {
        "act": partial(act, nets.agent),
        "see_next": partial(see_next, nets, render),
        "see_first": partial(see_first, nets, render),
        "disc_step": partial(discriminator_step, nets, optimizers, args),
        "policy_step": partial(policy_step, nets, optimizers, args),
        "predictor_step": partial(predictor_step, nets, optimizers),
        "autoencoder_step": partial(autoencoder_step, nets, optimizers, args),
    }
    if nets.autoencoder.mean_frame.device.type != "cuda" or WORLD_SIZE > 1:
        return functions
    return {name: Captured(function) for name, function in functions.items()}


# The algorithm, as functions


def latent_steps(latents: Tensor) -> Tensor:
    """Latents of K frames (..., K, Z), oldest first -> (..., K Z): the K - 1 steps between
    consecutive ones, then the newest."""
    return torch.cat([latents.diff(dim=-2), latents[..., -1:, :]], dim=-2).flatten(-2)


def whole_windows(ended: Tensor, length: int) -> Tensor:
    """Which `length` steps in a row are of one episode, whose last may end it: (T, N) bool ->
    (T - length + 1, N) bool."""
    return ~ended.unfold(0, length, 1)[..., :-1].any(-1)


def inverse_loss(inverse: nn.Module, latents: Tensor, actions: Tensor, usable: Tensor) -> Tensor:
    """Squared error of the last action (B, A), guessed from K latents (B, K, Z) that end with what
    it led to, over those that are usable (B,) bool. The gradient goes through the spread as well:
    without that, the first wild guesses shrink the latents to nothing."""
    steps, share = latent_steps(latents), usable[:, None] / usable.sum().clamp(min=1)
    mean = (share * steps).sum(0)
    variance = (share * (steps - mean).square()).sum(0)
    guess = inverse(steps / (variance + 1e-4).sqrt())
    return (share * (guess - actions).square()).sum() / actions.shape[1]


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


def normalize(rewards: Tensor, recent_rewards: deque[Tensor]) -> Tensor:
    """By mean and std of all steps of the last REWARD_WINDOW rollouts."""
    seen = torch.stack(list(recent_rewards)).double()
    mean, std = seen.mean().item(), seen.std(correction=0).item()
    least = 1e-3 * seen.square().mean().sqrt().item()  # a constant must not become huge
    return (rewards - mean) / (max(std, least) or 1.0)


def compute_gae(rewards, values, next_values, ended, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438,
    equation 16), all (T, N) -> advantages, returns (advantages + values).

    next_values are those of the true next observations: a truncated step bootstraps from where its
    episode stopped. Nothing is masked: where the task terminated, the caller puts the value of what
    follows there. `ended` (terminated or truncated) keeps the sum within its episode."""
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


@torch.no_grad()
def update_average(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow = (1 - rate) * slow + rate * fast, in place, for parameters; statistics are copied."""
    for slow_parameter, parameter in zip(slow.parameters(), fast.parameters()):
        slow_parameter.lerp_(parameter, rate)
    for slow_buffer, buffer in zip(slow.buffers(), fast.buffers()):
        slow_buffer.copy_(buffer)


# The steps of the loop


def act(agent: GaussianAgent, obs: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """obs (N, O), noise (N, A), 0 for the mean action -> the actor's output (N, 2 A), the action as
    sampled, which PPO's ratio is about, and as executed (N, A)."""
    output = agent.actor(obs)
    mean, log_std = agent.gaussian(output)
    action = mean + log_std.exp() * noise
    return output, action, action.clamp(-1, 1)


def see_next(nets, render, prepared, states, frames, latents, actions, executed):
    """What an action (N, A) led to, by render.prepare() and as states (N, O), joins the last K
    frames (N, K, H, W), latents (N, K, Z), K - 1 actions (N, K - 1, A) -> these, and all of
    observe()."""
    frame = render.draw(prepared)
    frames = torch.cat([frames[:, 1:], frame[:, None]], dim=1)
    latents = torch.cat([latents[:, 1:], nets.autoencoder.encode(frame)[:, None]], dim=1)
    actions = torch.cat([actions, executed[:, None]], dim=1)[:, 1:]
    return frames, latents, actions, *nets.observe(latents, actions, states)


def see_first(nets, render, prepared, states, begun, frames, latents, actions):
    """The same where an episode has begun (N,) bool: its first frame is repeated."""
    frame, begun = render.draw(prepared), begun[:, None, None]
    frames = torch.where(begun[..., None], frame[:, None], frames)
    latents = torch.where(begun, nets.autoencoder.encode(frame)[:, None], latents)
    actions = actions.masked_fill(begun, 0.0)
    return frames, latents, actions, *nets.observe(latents, actions, states)


@torch.no_grad()
def play(envs, render, nets, graphs, episodes: dict, generator: Generator | None):
    """Acts in N environments without end, by sampled actions, or by the mean ones if there is no
    generator -> for each step {name: (N, ...)}: obs, history, output and actions from before it,
    the rest from after it and before a reset. `episodes` (begin_episodes) is where they are, and
    goes on from one call to the next."""
    device = nets.autoencoder.mean_frame.device
    frames, actions = episodes["frames"].to(device), episodes["actions"].to(device)
    latents = nets.autoencoder.encode_all(frames)  # anew: the encoder has changed
    _, history, obs = nets.observe(latents, actions, episodes["state"].to(device))
    while True:
        noise = torch.zeros((envs.num_envs, nets.agent.middle.numel()))
        if generator is not None:
            noise = torch.randn(noise.shape, generator=generator)
        output, action, executed = graphs["act"](obs, noise.to(device))
        state, reward, terminated, truncated, info = envs.step(nets.agent.for_envs(executed))
        ended, final_state = terminated | truncated, state.copy()
        for i in np.flatnonzero(ended):  # there `state` is the next episode's first
            final_state[i] = info["final_obs"][i]
        episodes["length"] += 1
        episodes["return"] += torch.from_numpy(reward)
        step = {"obs": obs, "history": history, "output": output, "action": action}
        step |= {"executed": executed, "return": episodes["return"].clone()}
        step |= {"state": render.states(final_state), "env_reward": torch.from_numpy(reward)}
        step |= {"terminated": torch.from_numpy(terminated), "ended": torch.from_numpy(ended)}
        step["steps_left"] = episodes["limit"] - episodes["length"]
        prepared = render.prepare(final_state).to(device)
        seen = (prepared, step["state"].to(device), frames, latents, actions, executed)
        frames, latents, actions, features, history, obs = graphs["see_next"](*seen)
        step |= {"features": features, "next_obs": obs}  # of what the action led to
        step["frame"] = frames[:, -1].clone()
        if ended.any():
            episodes["length"][ended] = 0
            episodes["return"][ended] = 0.0
            seen = (render.prepare(state), render.states(state), step["ended"])
            seen = (*(x.to(device) for x in seen), frames, latents, actions)
            frames, latents, actions, _, history, obs = graphs["see_first"](*seen)
        episodes.update(frames=frames, actions=actions, state=render.states(state))
        yield step


def collect_frames(envs, render, nets, graphs, episodes: dict, num_steps: int, generator):
    """T steps with sampled actions -> rollout {name: (T, N, ...)} on the networks' device, log."""
    played = play(envs, render, nets, graphs, episodes, generator)
    steps, device = [next(played) for _ in range(num_steps)], nets.autoencoder.mean_frame.device
    names = sorted(steps[0].keys() - {"state"})  # the true state is for record_side_by_side
    rollout = {name: torch.stack([x[name] for x in steps]).to(device) for name in names}
    returns = rollout["return"][rollout["ended"]]
    rollout["log_prob"], _ = nets.agent.log_prob_and_entropy(rollout["output"], rollout["action"])
    return rollout, {"charts/episodic_return": returns.mean().item()} if len(returns) else {}


def discriminator_step(nets, optimizers, args, expert: Tensor, policy: Tensor, mix: Tensor):
    """One step of D on features of expert and policy, (B, K Z) each -> what is to be logged."""
    expert_logit, policy_logit = nets.disc(torch.cat([expert, policy])).chunk(2)
    loss = discriminator_loss(expert_logit, policy_logit)
    penalty = gradient_penalty(nets.disc, expert, policy, mix)
    optimizers["disc"].zero_grad()
    (loss + args.grad_penalty_coef * penalty).backward()
    optimizers["disc"].step()
    expert_prob, policy_prob = torch.sigmoid(expert_logit), torch.sigmoid(policy_logit)
    accuracies = (expert_logit > 0).float().mean(), (policy_logit < 0).float().mean()
    log = (loss, expert_prob.mean(), policy_prob.mean(), *accuracies, penalty)
    return tuple(x.detach() for x in log)


def update_latent_discriminator(graphs, expert, rollout, args: Args, generator):
    """Steps of D on features of the expert (L, K Z) and of the rollout -> log of the last."""
    expert, policy = expert["features"], rollout["features"].flatten(0, 1)
    shape = (args.disc_steps, args.disc_batch_size // WORLD_SIZE)
    expert_rows = torch.randint(len(expert), shape, generator=generator).to(expert.device)
    policy_rows = torch.randint(len(policy), shape, generator=generator).to(expert.device)
    mix = torch.rand((*shape, 1), generator=generator).to(expert.device)
    for i in range(args.disc_steps):
        log = graphs["disc_step"](expert[expert_rows[i]], policy[policy_rows[i]], mix[i])
    names = ("loss", "expert_prob", "policy_prob", "expert_acc", "policy_acc", "grad_penalty")
    return {f"disc/{name}": x for name, x in zip(names, torch.stack(log).tolist())}


@torch.no_grad()
def compute_latent_rewards(nets, rollout, recent_rewards: deque, visits: dict, args: Args):
    """What PPO maximizes: {"steps": the rewards -log(1 - D) (T, N), "absorbing": that of each step
    after an end}, normalized; log. `visits` is what terminal_logits takes; the rollout's counts are
    added to the policy's."""
    logit = nets.disc(rollout["features"]).squeeze(-1)
    counts = torch.tensor([logit.numel(), rollout["steps_left"][rollout["terminated"]].sum()])
    counts = all_gather(counts[None].to(logit.device)).sum(0).cpu()
    visits["policy"] += counts  # of the whole run: with fewer, the reward of an end jumps
    offset, absorbing_logit = terminal_logits(**visits)
    rewards, absorbing = F.softplus(logit + offset), F.softplus(absorbing_logit)
    log = {"reward/gail_mean": rewards.mean().item(), "reward/gail_std": rewards.std().item()}
    log |= {"reward/absorbing": absorbing.item()}
    log |= {"reward/env_mean": rollout["env_reward"].mean().item()}
    if args.normalize_reward:
        recent_rewards.append(all_gather(rewards).flatten().cpu())
        rewards = normalize(rewards, recent_rewards)
        absorbing = normalize(absorbing, recent_rewards)
    return {"steps": rewards, "absorbing": absorbing.item()}, log


def policy_step(nets, optimizers, args, obs, action, old_log_prob, advantage, returns):
    """One step of PPO on a minibatch, (B, ...) each -> what is to be logged."""
    agent = nets.agent
    log_prob, entropy = agent.log_prob_and_entropy(agent.actor(obs), action)
    log_ratio, entropy = log_prob - old_log_prob, entropy.mean()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    # the dual clip of Ye et al. 2020, https://arxiv.org/abs/1912.09729, c = e
    bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
    policy_loss = ppo_policy_loss(bounded, advantage, args.clip_coef)
    value_loss = 0.5 * F.mse_loss(agent.value(obs), returns)
    optimizers["agent"].zero_grad()
    (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizers["agent"].step()
    ratio = log_ratio.exp()
    kl = (ratio - 1 - log_ratio).mean()  # the estimator k3 of http://joschu.net/blog/kl-approx.html
    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return tuple(x.detach() for x in (policy_loss, value_loss, entropy, kl, clipfrac))


def update_latent_policy(nets, graphs, rollout, rewards: dict, args: Args, generator):
    """PPO: epochs of minibatches over one rollout -> log of the last minibatch."""
    with torch.no_grad():
        values = nets.agent.value(rollout["obs"])
        next_values = nets.agent.value(rollout["next_obs"])
    next_values[rollout["terminated"]] = rewards["absorbing"] / (1 - args.gamma)  # for ever
    given = (rewards["steps"], values, next_values, rollout["ended"])
    advantages, returns = compute_gae(*given, args.gamma, args.gae_lambda)
    batch = [rollout["obs"], rollout["action"], rollout["log_prob"], advantages, returns]
    batch = [x.flatten(0, 1) for x in batch]
    for _ in range(args.update_epochs):
        order = torch.randperm(values.numel(), generator=generator).to(values.device)
        for rows in order.tensor_split(args.num_minibatches):
            log = graphs["policy_step"](*(x[rows] for x in batch))
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
    log = {f"losses/{name}": x for name, x in zip(names, torch.stack(log).tolist())}
    unexplained = (returns - values).var() / (returns.var() + 1e-8)
    return log | {"losses/explained_variance": 1 - unexplained.item()}


def predictor_step(nets, optimizers, inputs: Tensor, targets: Tensor) -> tuple[Tensor]:
    loss = F.mse_loss(nets.predictor(inputs), targets)
    optimizers["predictor"].zero_grad()
    loss.backward()
    optimizers["predictor"].step()
    return (loss.detach(),)


def update_predictor(nets, graphs, rollout, num_steps: int, generator):
    """Steps of the predictor on minibatches of history, LOOK_AHEAD actions, and what then was seen:
    last step between latents and newest latent -> log of the last."""
    inside = whole_windows(rollout["ended"], LOOK_AHEAD)
    require(inside.any(), f"no episode lasts {LOOK_AHEAD} steps, as far as the predictor looks; "
            "give --predictor-steps 0.")
    actions = [rollout["executed"][k : k + len(inside)] for k in range(LOOK_AHEAD)]
    inputs = torch.cat([rollout["history"][: len(inside)], *actions], dim=-1)[inside]
    seen = rollout["features"][LOOK_AHEAD - 1 :, :, -nets.predictor[-1].out_features :][inside]
    shape = (num_steps, PREDICTOR_BATCH_SIZE // WORLD_SIZE)
    for rows in torch.randint(len(inputs), shape, generator=generator).to(inputs.device):
        (loss,) = graphs["predictor_step"](inputs[rows], seen[rows])
    return {"ae/prediction": loss.item()}


def autoencoder_step(nets, optimizers, args, expert, snippets, actions, usable):
    """One step on the expert's frames (B, H, W) and snippets (S, length, H, W) of the policy's. The
    inverse model learns from the latter alone: the expert's actions are unknown. actions (S, V, A)
    led to the last frames of the snippets' windows, which are usable (S, V) bool."""
    frames, count = torch.cat([expert, snippets.flatten(0, 1)]), len(expert)
    # bfloat16 halves the time. It is for this training alone.
    has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    device = frames.device.type
    with torch.autocast(device, torch.bfloat16, device == "cuda" or has_bf16):
        latents = nets.autoencoder.encode(frames)
        errors = nets.autoencoder.errors(latents, frames)
    loss, inverse_error = errors[:count].mean() + errors[count:].mean(), torch.zeros_like(errors[0])
    if nets.inverse:
        windows = latents[count:].float().unflatten(0, snippets.shape[:2])
        windows = windows.unfold(1, args.frame_stack, 1).mT.flatten(0, 1)  # (S V, K, Z)
        inverse_error = inverse_loss(nets.inverse, windows, actions.flatten(0, 1), usable.flatten())
    optimizers["autoencoder"].zero_grad()
    (loss + args.inverse_coef * inverse_error).backward()
    optimizers["autoencoder"].step()
    return loss.detach(), inverse_error.detach()


def update_autoencoder(graphs, expert, rollout, num_steps, args, generator, with_inverse=True):
    """Steps on minibatches of frames, half the expert's and half snippets of the rollout: as many
    as fit whole, of frames in a row from one environment -> log of the last."""
    expert, frames, frame_stack = expert["train_frames"], rollout["frame"], args.frame_stack
    device, half = frames.device, args.ae_batch_size // (2 * WORLD_SIZE)
    # Long snippets give many windows: with K = 4 one of 16 frames tells 13 actions, 4 of 4 tell 4.
    length = min(max(SNIPPET, frame_stack), half, len(frames))
    usable, shape = whole_windows(rollout["ended"], frame_stack), (num_steps, half // length, 1)
    rows = torch.randint(len(expert), (num_steps, half), generator=generator).to(device)
    first = torch.randint(len(frames) - length + 1, shape, generator=generator).to(device)
    env = torch.randint(frames.shape[1], shape, generator=generator).to(device)
    steps = first + torch.arange(length, device=device)  # (num_steps, S, length)
    starts, ends = steps[..., : length - frame_stack + 1], steps[..., frame_stack - 1 :]
    for i in range(num_steps):
        actions, whole = rollout["executed"][ends[i], env[i]], usable[starts[i], env[i]]
        batch = (expert[rows[i]], frames[steps[i], env[i]], actions, whole & with_inverse)
        loss, inverse_error = graphs["autoencoder_step"](*batch)
    return {"ae/loss": loss.item(), "ae/inverse": inverse_error.item()}


@torch.no_grad()
def encode_expert(autoencoder: Autoencoder, expert: dict) -> None:
    """Sets expert["features"] (L, K Z), of the frames after each action, with the encoder as it is
    now; from now on their mean and std standardize the policy's features too."""
    features, frame_stack = [], autoencoder.frame_stack
    for latents in autoencoder.encode_all(expert["frames"]).split(expert["counts"]):
        latents = torch.cat([latents[:1].expand(frame_stack - 1, -1), latents])  # first repeated
        features.append(latent_steps(latents.unfold(0, frame_stack, 1).mT))
    statistics = Standardize(torch.cat(features).cpu().numpy()).state_dict()
    autoencoder.standardize.load_state_dict(statistics)  # into the tensors that CUDA graphs read
    expert["features"] = autoencoder.standardize(torch.cat([x[1:] for x in features]))


def pretrain(collect, nets, graphs, optimizers, expert, args: Args, generator):
    """Autoencoder, inverse model and predictor learn from the untrained policy's random actions:
    collect() -> rollout, log."""
    if args.pretrain_steps:
        rollout, _ = collect()
        for i in tqdm(range(args.pretrain_steps), desc="pretraining", disable=RANK > 0 or None):
            share = min(1.0, max(2 - 2 * i / args.pretrain_steps, AE_LR_KEPT))
            optimizers["autoencoder"].param_groups[0]["lr"].fill_(args.ae_learning_rate * share)
            # Reconstruction goes first: latents that mean nothing yet have nothing to tell.
            inverse = i > 0.2 * args.pretrain_steps
            update_autoencoder(graphs, expert, rollout, 1, args, generator, inverse)
        encode_expert(nets.autoencoder, expert)
    if nets.predictor:
        rollout, _ = collect()
        steps = PREDICTOR_PRETRAINING * args.predictor_steps
        update_predictor(nets, graphs, rollout, steps, generator)


# Training


def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; returns what summary.json holds."""
    args = copy.copy(args)  # the caller's stay as they are
    args.check()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # for convolutions, whose initialization takes no generator
    generator = Generator().manual_seed(args.seed)
    device = join_processes(args.cuda)
    demos = load_demos(args, required=[])
    if args.gamma == 0:  # 1 / (1 - gamma) steps: a tenth of an episode
        args.gamma = float(np.clip(1 - 10 / demos["lengths"].mean(), 0.9, 0.99))
    envs = make_world(demos, args.num_envs // WORLD_SIZE, args)
    render, space = make_renderer(envs, args).to(device), envs.single_action_space
    require(args.policy_obs == "latent" or "obs" in demos, "--policy-obs state: the demonstrations "
            "have no 'observations' to normalize states by; drop the flag.")
    expert = film_expert(demos, render, device)
    nets = Networks(expert["frames"], demos.get("obs"), space, args, generator).to(device)
    slow = copy.deepcopy(nets)  # their running average: what is evaluated and saved
    optimizers, recent_rewards = make_optimizers(nets, args), deque(maxlen=REWARD_WINDOW)
    graphs = make_graphs(nets, render, optimizers, args)
    slow_graphs = make_graphs(slow, render, {}, args)
    steps_left = (demos["max_episode_steps"] - demos["lengths"])[demos["terminated"]].sum()
    counts = torch.tensor([demos["lengths"].sum(), steps_left])
    visits = {"expert": counts, "policy": torch.zeros(2)}
    demos["random_return"] = random_return(demos, args.seed, args)

    rows, seconds, wandb_id = [], 0.0, None
    if args.resume:
        saved = load_file(args.resume, "--resume", "gail_pixels_ae checkpoint")
        free = {x: getattr(args, x) for x in ("resume", "total_timesteps", "threads", "cuda")}
        require(saved["args"] | free == vars(args), "--resume takes all but --total-timesteps, "
                "--threads and --cuda from the checkpoint; drop the other flags.")
        nets.load_state_dict(saved["networks"])
        slow.load_state_dict(saved["slow"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
            for group in optimizer.param_groups:  # of a run on another device, maybe
                group |= {"lr": group["lr"].to(device), "capturable": device.type == "cuda"}
        recent_rewards.extend(saved["recent"])
        visits = saved["visits"]
        generator.set_state(saved["generator"])
        rows, seconds, wandb_id = saved["rows"], saved["seconds"], saved["wandb_id"]
    own_seed, limit = args.seed + 1_000_000 * RANK + len(rows), demos["max_episode_steps"]
    episodes = begin_episodes(envs, render, args.frame_stack, own_seed, limit)
    if RANK > 0:  # the same networks, other noise and, when resumed, new episodes
        generator.manual_seed(own_seed)
    elif args.resume and saved["simulator"] and len(saved["episodes"]["state"]) == envs.num_envs:
        envs.set_state(saved["simulator"])  # BatchHalfCheetah's, of as many processes
        episodes = saved["episodes"]
    batch_size = args.num_envs * args.num_steps
    pretraining = args.pretraining_rollouts() * batch_size
    num_iterations = (args.total_timesteps - pretraining) // batch_size
    summary = Path(args.resume).parent / "summary.json"
    finished = len(rows) == num_iterations and summary.exists()
    require(len(rows) <= num_iterations and not finished, "--resume: this run has come that far; "
            "give a greater --total-timesteps.")
    if RANK == 0:
        run_dir = open_run("gail_pixels_ae", args, wandb_id)
        if not args.resume:
            first_frames = {"expert": expert["frames"][0], "policy": episodes["frames"][0, -1]}
            plot_first_frames(first_frames, run_dir / "first_frames.png")

    start = time.perf_counter() - seconds
    collect = partial(
        collect_frames, envs, render, nets, graphs, episodes, args.num_steps, generator
    )
    encode_expert(nets.autoencoder, expert)
    if not args.resume:
        pretrain(collect, nets, graphs, optimizers, expert, args, generator)
    annealed = [group for x in optimizers if x != "disc" for group in optimizers[x].param_groups]
    for group in annealed:
        group.setdefault("initial_lr", group["lr"].item())
    todo, off = range(len(rows), num_iterations), RANK > 0 or None  # None: on a terminal alone
    bar = tqdm(todo, initial=len(rows), total=num_iterations, unit="rollout", disable=off)
    for iteration in bar:
        if args.anneal_lr:
            for group in annealed:
                group["lr"].fill_(group["initial_lr"] * (1 - iteration / num_iterations))
        clock = [time.perf_counter()]
        rollout, log = collect()
        clock.append(time.perf_counter())
        log |= update_latent_discriminator(graphs, expert, rollout, args, generator)
        rewards, reward_log = compute_latent_rewards(nets, rollout, recent_rewards, visits, args)
        clock.append(time.perf_counter())
        log |= update_latent_policy(nets, graphs, rollout, rewards, args, generator)
        clock.append(time.perf_counter())
        if nets.predictor:
            log |= update_predictor(nets, graphs, rollout, args.predictor_steps, generator)
        if args.ae_steps:
            log |= update_autoencoder(graphs, expert, rollout, args.ae_steps, args, generator)
            encode_expert(nets.autoencoder, expert)
        clock.append(time.perf_counter())

        if RANK > 0:
            continue  # process 0 averages, evaluates, logs and saves
        update_average(slow, nets, 1 / (1 + args.average_share * iteration))
        step, last = pretraining + (iteration + 1) * batch_size, iteration == num_iterations - 1
        # Nothing may hang on the true return, not even whether the run goes on.
        losses = [name for name in log if name.startswith(("losses/", "disc/", "ae/"))]
        bad = [name for name in losses if not math.isfinite(log[name])]
        finite = all(x.isfinite().all() for x in nets.parameters())
        require(finite and not bad, f"training diverged at step {step}: "
                f"{', '.join(bad) or 'weights'} not finite; start again with smaller learning "
                "rates (the last checkpoint is older).")
        if last or step % args.eval_interval < batch_size:  # passed a multiple
            returns = evaluate(slow, render, slow_graphs, demos, 20, args.seed + 10_000, args)[-1]
            log |= return_metrics(returns, demos)
            log |= reconstruct(nets.autoencoder, expert, rollout, run_dir / "reconstructions.png")
            bar.set_postfix_str(f"return {returns.mean():.0f}")
        seconds = time.perf_counter() - start
        log |= reward_log | {"charts/SPS": step / seconds}
        log["charts/learning_rate"] = optimizers["agent"].param_groups[0]["lr"].item()
        names = ("time/rollout", "time/discriminator", "time/update", "time/autoencoder")
        log |= dict(zip(names, np.diff(clock).tolist()))
        numbers = {name: x for name, x in log.items() if math.isfinite(x)}  # returns may be unknown
        rows.append({"global_step": step} | numbers)
        if args.track:
            wandb.log(rows[-1], step=step, commit=True)
        if last or step % args.checkpoint_interval < batch_size:
            checkpoint = {  # tensors and plain containers: load_file reads nothing else
                "kind": "gail_pixels_ae checkpoint",
                "args": vars(args),
                "networks": nets.state_dict(),
                "slow": slow.state_dict(),
                "optimizers": {name: x.state_dict() for name, x in optimizers.items()},
                "recent": list(recent_rewards),
                "visits": visits,
                "generator": generator.get_state(),
                "simulator": envs.get_state() if isinstance(envs, BatchHalfCheetah) else None,
                "episodes": episodes,
                "rows": rows,
                "seconds": seconds,
                "wandb_id": wandb.run.id if args.track else None,
            }
            policy = {"kind": "gail_pixels_ae policy", "args": vars(args)}
            policy |= {"networks": slow.state_dict(), "max_episode_steps": limit}
            write_csv(rows, run_dir / "metrics.csv")
            save_atomically(policy, run_dir / "policy.pt")
            save_atomically(checkpoint, run_dir / "checkpoint.pt")
    envs.close()
    if RANK > 0:
        return {}
    return report(slow, render, slow_graphs, demos, rows, seconds, args, run_dir)


# --- Plumbing: demonstrations, environments, frames, processes ---


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


def body_of(env_id: str) -> str:
    """HalfCheetah of HalfCheetah-v4, and of my_envs:HalfCheetah-v0."""
    return re.split("[:/]", env_id)[-1].rsplit("-v", 1)[0]


def make_world(task: dict, num_envs: int, args: Args, pictures: bool = True):
    """N environments task["env_id"] with episodes of at most task["max_episode_steps"]: the fast
    HalfCheetah-v4, or gymnasium's, which return their own pictures with --frames render."""
    env_id, limit = task["env_id"], task["max_episode_steps"]
    if env_id == "HalfCheetah-v4" and args.frames == "capsules":
        return BatchHalfCheetah(num_envs, limit, args.threads)
    options = {"max_episode_steps": limit}
    if args.frames == "render" and pictures:
        options |= {"wrappers": [gym.wrappers.AddRenderObservation], "render_mode": "rgb_array"}
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    try:
        envs = gym.make_vec(env_id, num_envs, "sync", same_step, **options)
    except Exception as error:  # each renderer is missing in its own way
        raise UserError(f"--env-id {env_id}: {reason(error)}; give a registered id, and with "
                        "--frames render one that renders rgb_array here.") from None
    space = envs.single_action_space
    flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
    require(flat and space.is_bounded(), f"--env-id {env_id}: its actions are {space}, expected a "
            "flat Box of floats with bounds; choose another environment.")
    obs = envs.single_observation_space
    flat = isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1
    require(flat or args.frames == "render", f"--env-id {env_id}: its observations are {obs}, "
            "expected a flat Box; use --frames render.")
    return envs


def make_renderer(envs, args: Args):
    if args.frames == "capsules":
        return CapsuleRenderer(envs, args.image_size, args.threads)
    return PictureRenderer(envs, args.image_size)


def frame_size(shorter: int, width: float, height: float) -> tuple[int, int]:
    """Height and width in pixels of a frame whose sides are as these; both are multiples of 8."""
    longer = 8 * round(shorter * max(width, height) / min(width, height) / 8)
    return (shorter, longer) if width > height else (longer, shorter)


def shrink(pictures: np.ndarray, height: int, width: int) -> Tensor:
    """Pictures (B, h, w), (B, h, w, 3) or with alpha, uint8 -> grey frames (B, H, W), averages."""
    frames = []
    for piece in torch.from_numpy(pictures).split(FRAMES_AT_ONCE):
        grey = piece.float() if piece.ndim == 3 else piece[..., :3].float().mean(-1)  # no alpha
        frames.append(F.adaptive_avg_pool2d(grey, (height, width)).round().to(torch.uint8))
    return torch.cat(frames)


class PictureRenderer(nn.Module):
    """Frames of environments that return their own pictures, as `shrink` takes them. Like
    CapsuleRenderer it prepares on the CPU, and draws wherever the networks are."""

    def __init__(self, envs, image_size: int):
        super().__init__()
        rows, columns = envs.single_observation_space.shape[:2]
        self.height, self.width = frame_size(image_size, columns, rows)
        self.sizes = [(rows, columns), (self.height, self.width)]  # that a film may have

    def states(self, pictures: np.ndarray) -> Tensor:
        return torch.zeros(len(pictures), 0)  # they are unknown

    def prepare(self, pictures: np.ndarray) -> Tensor:
        return shrink(pictures, self.height, self.width)

    def draw(self, frames: Tensor) -> Tensor:
        return frames

    forward = prepare


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


def frames_of(demos: dict, render) -> Tensor:
    """(L + E, H, W) uint8: the film in the set, or drawn from its observations. UserError unless
    it has one of these, which goes with the policy's frames."""
    draws = isinstance(render, CapsuleRenderer)
    if draws and "observations" in demos:
        found, wanted = demos["observations"].shape[1:], render.obs_shape
        require(found == wanted, f"--demos: each row of its observations has shape {found}, the "
                f"environment's {wanted}; give demonstrations of this environment.")
    if "frames" in demos:
        film = demos["frames"]
        require(film.dtype == np.uint8 and film.shape[3:] in ((), (3,)), f"--demos: its frames are "
                f"{film.dtype} of shape {film.shape}, expected uint8, grey or RGB; convert them.")
        require(film.shape[1:3] in render.sizes, f"--demos: its frames are {film.shape[1:3]} in "
                f"size, the policy's {render.sizes}; give a film of that size, another "
                "--image-size, or --frames render.")
        return shrink(film, render.height, render.width)
    require(draws, "--frames render: the demonstrations have no 'frames'; make some by `python "
            "data/demos.py film`.")
    require("observations" in demos, "--demos: it has neither 'frames' nor 'observations' to draw "
            "from; see docs/own_demonstrations.md.")
    return render(demos["observations"])


def film_expert(demos: dict, render, device) -> dict:
    """Frames of the demonstrations, and how many each episode has; the last one is held out."""
    frames, counts = frames_of(demos, render).to(device), (demos["lengths"] + 1).tolist()
    train = len(frames) - counts[-1] * (len(counts) > 1)
    expert = {"train_frames": frames[:train], "heldout_frames": frames[train:]}
    return expert | {"frames": frames, "counts": counts}


def begin_episodes(envs, render, frame_stack: int, seed: int, limit: int) -> dict:
    """What play() goes on from: the last K frames (N, K, H, W), oldest first, K - 1 actions
    (N, K - 1, A), states (N, O), steps and returns so far (N,), and an episode's most steps."""
    state, _ = envs.reset(seed=seed)
    return {
        "frames": render(state)[:, None].repeat(1, frame_stack, 1, 1),
        "actions": torch.zeros(len(state), frame_stack - 1, *envs.single_action_space.shape),
        "state": render.states(state),
        "length": torch.zeros(len(state), dtype=torch.int64),
        "return": torch.zeros(len(state), dtype=torch.float64),
        "limit": limit,
    }


def join_processes(cuda: bool) -> torch.device:
    """Connect with the other processes of torchrun, if any; returns this one's device."""
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD_SIZE > 1:
        torch.cuda.set_device(device)
    return device


def all_gather(x: Tensor) -> Tensor:
    """The (B, ...) tensors of all W processes, one after the other: (W B, ...)."""
    if WORLD_SIZE == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def average_gradients(optimizer, *_) -> None:
    """Before each step: every process gets the mean of all gradients (PPO's as clipped), so that
    networks stay equal to the bit."""
    if WORLD_SIZE == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mean = torch.cat([p.grad.flatten() for p in parameters]) / WORLD_SIZE
    dist.all_reduce(mean)
    for p, grad in zip(parameters, mean.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view(p.shape))


# --- Plumbing: evaluation, files, command line ---


def random_return(task: dict, seed: int, args: Args) -> float:
    """Mean return of 20 episodes with random actions."""
    envs = make_world(task, 20, args, pictures=False)  # which nobody would look at
    envs.reset(seed=seed)
    envs.action_space.seed(seed)
    running, total = np.ones(20, bool), np.zeros(20)
    while running.any():
        _, reward, terminated, truncated, _ = envs.step(envs.action_space.sample())
        total += np.where(running, reward, 0.0)
        running &= ~(terminated | truncated)
    envs.close()
    return total.mean().item()


def evaluate(nets, render, graphs, task: dict, episodes: int, seed: int, args, sampled=False):
    """Cumulative true returns (T, E) after each step of fresh episodes, with the mean action or
    sampled ones; the last row is the episodes' returns."""
    envs = make_world(task, episodes, args)
    generator = Generator().manual_seed(seed) if sampled else None
    begun = begin_episodes(envs, render, args.frame_stack, seed, task["max_episode_steps"])
    running, rewards = np.ones(episodes, bool), []
    for step in play(envs, render, nets, graphs, begun, generator):
        rewards.append(np.where(running, step["env_reward"].numpy(), 0.0))
        running &= ~step["ended"].numpy()
        if not running.any():
            break
    envs.close()
    return np.cumsum(rewards, axis=0)


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


def final_evaluation(nets, render, graphs, task: dict, args, path: Path) -> list[np.ndarray]:
    """Returns (E,) with the mean action, and sampled; those after each step go into a .npz."""
    count, seed = args.eval_episodes, args.seed
    mean = evaluate(nets, render, graphs, task, count, seed + 20_000, args)
    sampled = evaluate(nets, render, graphs, task, count, seed + 30_000, args, sampled=True)
    np.savez(path, mean_action=mean, sampled=sampled)
    if not np.isfinite(mean).all():
        print(f"  {task['env_id']} gives no rewards, so the policy's return is unknown")
    else:
        print(f"  mean action {mean[-1].mean():9.1f} ± {mean[-1].std():.1f}")
        print(f"  sampled     {sampled[-1].mean():9.1f} ± {sampled[-1].std():.1f}")
    return [mean[-1], sampled[-1]]


def load_agent(args: Args) -> tuple:
    """Networks of a policy.pt (--evaluate), their renderer, graphs, task and settings."""
    args.check()
    saved = load_file(args.evaluate, "--evaluate", "gail_pixels_ae policy")
    require(saved["args"].keys() == vars(args).keys(), f"--evaluate {args.evaluate}: another "
            "version of this script wrote it; give a file of this one.")
    own = {name: getattr(args, name) for name in ("seed", "threads", "eval_episodes")}
    trained, device = Args(**saved["args"] | own), join_processes(args.cuda)
    torch.set_num_threads(args.threads)
    task = {"env_id": trained.env_id, "max_episode_steps": saved["max_episode_steps"]}
    envs = make_world(task, 1, trained)
    render = make_renderer(envs, trained).to(device)
    no_frames = torch.zeros((2, render.height, render.width), dtype=torch.uint8)
    no_states = np.zeros((1, *envs.single_observation_space.shape))
    nets = Networks(no_frames, no_states, envs.single_action_space, trained, Generator())
    nets.to(device).load_state_dict(saved["networks"])
    return nets, render, make_graphs(nets, render, {}, trained), task, trained


def report(nets, render, graphs, demos: dict, rows, seconds: float, args, run_dir: Path) -> dict:
    """The final evaluation and the run's summary: a table, summary.json, curves.png, policy.gif."""
    path = run_dir / "evaluation.npz"
    returns, sampled = final_evaluation(nets, render, graphs, demos, args, path)
    steps, demos_mean = rows[-1]["global_step"], demos["returns"].mean().item()
    summary = return_metrics(returns, demos)
    evaluated = [row for row in rows if "eval/return_mean" in row]
    if evaluated and np.isfinite(sampled).all():
        best = max(evaluated, key=lambda row: row["eval/return_mean"])
        summary |= {"best/return_mean": best["eval/return_mean"], "best/step": best["global_step"]}
        summary["eval/return_sampled_mean"] = sampled.mean().item()
    if "eval/normalized_score" in summary:
        summary |= {"demos_return_mean": demos_mean, "random_return_mean": demos["random_return"]}
        if isinstance(demos.get("expert_return_mean"), (int, float)):
            summary["expert_return_mean"] = demos["expert_return_mean"]
    summary |= {"env_steps": steps, "seconds": seconds, "charts/SPS": steps / seconds}
    print(*(f"  {name:24}{x:12,.6g}" for name, x in summary.items()), f"  {run_dir}", sep="\n")
    plot_curves(rows, demos_mean, run_dir / "curves.png")
    if args.capture_video:
        record_side_by_side(nets, render, graphs, demos, args, run_dir / "policy.gif")
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


def plot_first_frames(frames: dict[str, Tensor], path: Path) -> None:
    """The first frame of each side, for the user to compare cameras."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for ax, (name, frame) in zip(figure.subplots(1, len(frames)), frames.items()):
        ax.imshow(frame.cpu(), cmap="gray", vmin=0, vmax=255)
        ax.set(title=f"{name}: the first frame", xlabel="pixels", ylabel="pixels")
    figure.savefig(path, dpi=120, bbox_inches="tight")


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, expert: dict, rollout, path: Path) -> dict[str, float]:
    """Mean reconstruction errors of 256 frames of each kind, to log. And a picture of four of the
    expert's (held out, if there are any) and four of the policy's."""
    kinds = {"expert": expert["train_frames"], "heldout": expert["heldout_frames"]}
    kinds["policy"], columns, log = rollout["frame"].flatten(0, 1), [], {}
    for name, frames in kinds.items():
        if len(frames) > 0:
            spread = torch.linspace(0, len(frames) - 1, 256, device=frames.device).long()
            frames, latents = frames[spread], autoencoder.encode(frames[spread])
            log[f"ae/recon_{name}"] = autoencoder.errors(latents, frames).mean().item()
            guesses = autoencoder.decoder(latents)[:, 0] + autoencoder.mean_frame
            for frame, guess in zip(frames[::80] / 255, guesses[::80]):
                columns.append(torch.cat([frame, guess, guess - frame + 0.5]))
    figure, (height, width) = Figure(figsize=(14, 6), layout="constrained"), frame.shape
    ax, picture = figure.subplots(), torch.cat(columns[-8:], dim=1)
    ax.imshow(picture.cpu(), cmap="gray", vmin=0, vmax=1)
    ax.set_xticks([2 * width, 6 * width], ["demonstrations", "policy"])
    ax.set_yticks(
        [height * (row + 0.5) for row in range(3)], ["frame", "reconstruction", "difference"]
    )
    ax.axvline(4 * width - 0.5, color="white")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return log


def record_side_by_side(nets, render, graphs, demos: dict, args: Args, path: Path) -> None:
    """A GIF of an episode's beginning: the expert on the left, the policy's mean action on the
    right."""
    envs, states, right = make_world(demos, 1, args), [], []
    begun = begin_episodes(envs, render, args.frame_stack, args.seed, demos["max_episode_steps"])
    for step in play(envs, render, nets, graphs, begun, None):
        states.append(step["state"].numpy())
        right.append(step["frame"].cpu().numpy())
        if step["ended"].all() or len(states) == FILM_STEPS:
            break
    count = min(demos["lengths"][0], FILM_STEPS)
    if args.frames == "capsules" and "frames" not in demos:  # drawn once more, larger
        large = CapsuleRenderer(envs, 168, 1)
        left = large(demos["observations"][1 : count + 1]).numpy()
        right = large(np.concatenate(states)).numpy()
    else:
        left = frames_of(demos, render)[1 : count + 1].cpu().numpy()
        right = np.concatenate(right)
    envs.close()
    length = max(len(left), len(right))  # the shorter one stands still at its end
    left, right = (x[np.arange(length).clip(max=len(x) - 1)] for x in (left, right))
    gap = np.full((length, left.shape[1], 4), 128, np.uint8)
    film, times = np.concatenate([left, gap, right], axis=2), max(1, 168 // left.shape[1])
    film = film.repeat(times, axis=1).repeat(times, axis=2)  # small ones larger
    imageio.mimsave(path, list(film), duration=50, loop=0)


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
            path = Path(args.evaluate)  # its .npz: the run's own evaluation stays
            final_evaluation(*load_agent(args), path.with_suffix(".npz"))
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
