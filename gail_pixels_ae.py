"""GAIL from camera frames alone, through an autoencoder, complete in one file.

Expert and policy are known to the learner only as images. A convolutional autoencoder turns each frame into a few
numbers, and everything else (policy, value, discriminator) works on the latents of the last K frames. Generative
Adversarial Imitation Learning (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476, equation 17) with PPO (Schulman et
al. 2017, https://arxiv.org/abs/1707.06347):

    pretrain the autoencoder on the expert's frames and on frames of the untrained policy, then the predictor
    repeat:  collect a rollout, rendering and encoding each frame once -> update D on the latents of K frames
             -> reward = how expert-like the K frames after each step are -> GAE -> PPO update on predicted latents
             -> a few steps of predictor and autoencoder; the expert's frames are encoded anew

What it does besides, and why:

 1. The expert's frames are rendered on load from the demonstrations' physics state, by the very code that renders the
    policy's: the two can differ in nothing but behaviour. The demonstrations' actions, observations and rewards, and
    the true reward and state, never reach the learner (a test fills them with NaN).
 2. One latent a frame, so that each frame is encoded once. D sees the newest latent and the K - 1 *steps* between
    consecutive ones, each standardized: velocities show in the steps, and a network finds them late if it has to do
    the subtraction itself.
 3. The policy does not see that, but what comes of it: a predictor (a forward model, trained on the policy's own
    rollouts) says from it and from the policy's last K - 1 actions, which a robot knows, what the newest latent and the
    latest step will be two frames from now if nothing is done. PPO learns a good deal faster from where the body is
    going than from where it is, with pixels (pixels_search.csv in benchmark/results) as with true positions
    (vision_noise.csv).
 4. At the start of an episode the first frame is repeated, for expert and policy alike. The frames that reward step t
    end with the one that action t led to. No window looks ahead or spans two episodes.
 5. The encoder is pretrained, then trained on a little after every rollout, and the expert is encoded anew each time.
    Besides reconstructing, the latents of K frames must tell the policy's *own* last action (an inverse model): an
    action shows in accelerations, so the latents have to hold the positions of small limbs precisely. No expert action
    is known. (Since point 3 any one of these three may be left out at little cost: pixels_ablation.csv.)
    `--faithful` is the arrangement of the document that this script started from: one latent for a stack of K frames,
    an encoder trained by reconstruction alone and not pretrained.
 6. Reconstruction errors are divided by how much a pixel varies, since a foot's few pixels matter as much as a torso.
 7. The camera runs along with the animal, low down and at one height, so that it stands out against the dark sky and a
    jump shows. It looks through a colour filter (2 red - 1.7 blue) under which the brown animal is bright and the floor
    dim: the encoder then spends itself on the animal, not on the checkerboard.
 8. PPO's steps are as large as in `gail_ppo.py`, but for the first layers', and as there the policy's noise depends on
    what it sees.
 9. The true return is logged, never used. The best policy is the one whose latents are nearest to the expert's.
10. Only with `--reward-source env`, PPO without any imitation, does the true reward train anything. The value (not the
    policy) is then told the last one besides: it is mostly the speed, which frames hardly show (benchmark/PIXELS.md).

Commands (two CPU cores):

    python gail_pixels_ae.py                               # K = 4, policy on latents: 9 minutes
    python gail_pixels_ae.py --frame-stack 4 --cuda        # the same on a GPU
    python gail_pixels_ae.py --policy-obs state            # reward from pixels, policy on the robot's own state
    python gail_pixels_ae.py --reward-source env           # PPO with the true reward on latents: is the view enough?
    python gail_pixels_ae.py --faithful
    python gail_pixels_ae.py --evaluate runs/<run>/policy.pt
    python gail_pixels_ae.py --resume runs/<run>/checkpoint.pt
    torchrun --standalone --nproc-per-node 2 gail_pixels_ae.py  # two processes; README

A resumed run equals the uninterrupted one bit for bit on the CPU, at the same number of threads.

The algorithm is "Networks" to "The training loop's named steps" and `train`; the rest (demonstrations, environments,
processes, files) is plumbing, to the letter the same in every script that needs it.
"""

import csv
import dataclasses
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
from collections import deque
from concurrent.futures import ThreadPoolExecutor
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
from matplotlib.figure import Figure
from mujoco.batch import Batch
from torch import Generator, Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

FORMAT_VERSION = 1
REWARD_WINDOW = 10  # rollouts that the running mean and deviation of a reward are taken over
FULL_STEP_INPUTS = 28  # layers of more inputs than this take smaller steps
OBS_CLIP = 10.0  # standardized inputs are clipped to [-OBS_CLIP, OBS_CLIP]
INITIAL_LOG_STD, LOG_STD_MIN, LOG_STD_MAX = -0.5, -5.0, 2.0  # of the policy's Gaussian
CAMERA_DISTANCE, CAMERA_ELEVATION = 2.4, 8.0  # metres and degrees; positive: the camera looks up
VIEW_CENTRE, VIEW_HEIGHT, VIEW_ASPECT = 0.56, 1.2, 12 / 7  # metres above the floor, metres, width by height
INVERSE_HIDDEN = 256  # width of the inverse model's hidden layer
REWARD_SCALE = 5.0  # divides a true reward that the value is told
LOOK_AHEAD = 2  # steps that the predictor looks ahead
PREDICTOR_HIDDEN = 256  # width of the predictor's two hidden layers
PREDICTOR_BATCH_SIZE = 512
PREDICTOR_PRETRAINING = 16  # times as many steps of the predictor before the policy's first update
SNIPPET = 16  # consecutive views in a minibatch of the autoencoder
REST_OF_AE_LR = 0.2  # what is left of the autoencoder's step size after its pretraining


@dataclass
class Args:
    exp_name: str = "gail_pixels_ae"  # name of the experiment, the first part of the run's name
    seed: int = 1  # seed of everything random: networks, environments, minibatches, choice of demonstrations
    env_id: str = "HalfCheetah-v4"  # environment id; frames are made for this one alone
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"  # demonstration set (.npz, see data/README.md)
    num_demos: int = 0  # use this many demonstrated episodes, drawn by the seed (0: all)
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: <exp-name>__<env-id>__<seed>__<time>)
    resume: str = ""  # checkpoint.pt of a run to go on with; settings come from it, so give no other flag
    evaluate: str = ""  # policy.pt to evaluate instead of training
    eval_interval: int = 50_000  # env steps between evaluations (20 episodes with the mean action)
    eval_episodes: int = 100  # episodes of the final evaluation, with the mean action and again with sampled ones
    checkpoint_interval: int = 100_000  # env steps between checkpoints
    capture_video: bool = True  # write a GIF of the policy beside the expert at the end of a training
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works without an account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    wandb_entity: str = ""  # Weights & Biases team (default: yours)
    cuda: bool = False  # run the networks on the GPU; frames are kept there as uint8
    threads: int = 0  # threads that step the physics, render and run the networks (0: one a core)

    total_timesteps: int = 1_000_000
    """environment steps of the whole run; each is one frame, those of pretraining included"""
    num_envs: int = 64  # parallel environments (N)
    num_steps: int = 100  # steps per environment and rollout (T)
    learning_rate: float = 2e-3  # Adam step size of policy and value
    anneal_lr: bool = True
    """let the step sizes of policy, value, autoencoder and predictor fall linearly to zero over the run"""
    gamma: float = 0.97  # discount factor
    gae_lambda: float = 0.9  # lambda of generalized advantage estimation
    num_minibatches: int = 8  # minibatches per epoch of the PPO update
    update_epochs: int = 8  # epochs of the PPO update over each rollout
    norm_adv: bool = True  # normalize advantages in each minibatch
    clip_coef: float = 0.2  # clipping of the probability ratio
    clip_vloss: bool = False  # clip the value's change as well
    ent_coef: float = 0.0  # weight of the policy's entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient norm at which PPO's gradients are cut
    target_kl: float = 0.0  # leave out the rest of a rollout's epochs once the approximate KL exceeds this (0: never)
    hidden_size: int = 128  # width of the two hidden layers of policy and value

    reward_source: Literal["gail", "env"] = "gail"
    """what PPO maximizes: the discriminator's reward, or the environment's, whose last one the value is then told (is
    what the policy sees enough?)"""
    reward_form: Literal["softplus", "logit", "logsigmoid"] = "softplus"
    """GAIL reward: -log(1-D) = softplus(logit), log D - log(1-D) = logit, log D = logsigmoid(logit)"""
    normalize_reward: bool = True  # divide the reward by its running standard deviation and subtract its running mean
    center_reward: bool = True  # subtract the mean when normalizing; turn off where episodes can end early

    disc_loss: Literal["bce", "wgan"] = "bce"
    """discriminator loss: binary cross-entropy, or Wasserstein (reward: the raw score; wants --grad-penalty-coef 10)"""
    disc_learning_rate: float = 1e-3  # Adam step size of the discriminator
    disc_steps: int = 20  # minibatch steps of the discriminator per rollout
    disc_batch_size: int = 512  # expert windows of K frames, and as many of the policy's, in a discriminator minibatch
    disc_hidden_size: int = 128  # width of the two hidden layers of the discriminator
    grad_penalty_coef: float = 0.1  # weight of the discriminator's gradient penalty
    disc_ent_coef: float = 0.0  # weight of the entropy bonus on the discriminator's output

    frame_stack: int = 4  # frames that policy and discriminator see at once (K)
    image_size: int = 56  # height of a frame in pixels; it is 12 wide for 7 high, rounded to 8
    latent_dim: int = 64  # numbers that a frame is encoded into (Z); a whole stack of K frames with --faithful
    policy_obs: Literal["latent", "state"] = "latent"
    """what policy and value see: latents (as the predictor sees them coming), or the robot's own state"""
    faithful: bool = False
    """one latent a stack, no pretraining, inverse model or predictor: the document's arrangement"""
    pretrain_steps: int = 2_000
    """autoencoder steps before the policy's first update, on a rollout of the untrained policy"""
    ae_steps: int = 24  # autoencoder steps after each rollout (0: frozen after the pretraining)
    inverse_coef: float = 0.1
    """weight of the inverse model's loss: K latents must tell the policy's own last action (0: reconstruction alone)"""
    predictor_steps: int = 60
    """minibatch steps of the predictor per rollout (0: the policy sees the latents themselves, not what comes next)"""
    ae_batch_size: int = 128  # frames in an autoencoder minibatch, half the expert's and half the policy's
    ae_learning_rate: float = 1e-3
    """Adam step size of the autoencoder; falls to a fifth over the second half of the pretraining"""

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        require_range(self, ["image_size"], "of 16 or more that divides by 8", lambda x: x >= 16 and x % 8 == 0)
        require_range(self, ["gamma", "gae_lambda"], "between 0 and 1", lambda x: 0 <= x <= 1)
        may_be_zero = "num_demos threads gamma gae_lambda ent_coef vf_coef target_kl grad_penalty_coef disc_ent_coef"
        check_numbers(self, f"{may_be_zero} pretrain_steps ae_steps inverse_coef predictor_steps")
        frames, rollout = self.frame_stack, self.num_envs * self.num_steps
        expected = f"that is even and twice --frame-stack ({frames}) or more"
        require_range(self, ["ae_batch_size"], expected, lambda x: x >= 2 * frames and x % 2 == 0)
        least = max(frames, LOOK_AHEAD)
        require_range(self, ["num_steps"], f"of {least} (--frame-stack, predictor) or more", lambda x: x >= least)
        expected = f"of at most {rollout // 2}, half of a rollout (num-envs x num-steps)"
        require_range(self, ["num_minibatches"], expected, lambda x: 2 * x <= rollout)
        needed = rollout + pretraining_frames(self)
        expected = f"of {needed} or more, the pretraining's frames and one rollout"
        require_range(self, ["total_timesteps"], expected, lambda x: x >= needed)
        if self.cuda and not torch.cuda.is_available():
            raise UserError("--cuda was given, but PyTorch sees no GPU; leave it out or install a CUDA build of torch.")
        if self.disc_loss == "wgan" and self.reward_form != "softplus":
            raise UserError("--reward-form is for --disc-loss bce; WGAN's reward is its raw score; drop one of them.")
        if self.env_id != "HalfCheetah-v4":
            raise UserError(f"--env-id is {self.env_id}, but frames are of HalfCheetah-v4 alone; leave the flag out.")


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


def pretraining_frames(args: Args) -> int:
    """Frames of the untrained policy that the run begins with: a rollout for the autoencoder, one for the predictor."""
    return args.num_envs * args.num_steps * ((args.pretrain_steps > 0 and not args.faithful) + has_predictor(args))


def has_predictor(args: Args) -> bool:
    """Whether the policy sees predictions: not if it sees the state, nor in the document's arrangement."""
    return args.predictor_steps > 0 and args.policy_obs == "latent" and not args.faithful


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


# Environment


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


# Rendering: the same code makes the expert's frames and the policy's


def headless_backend() -> str:
    """ "egl" where it works, else "osmesa"; each is tried in a child process, since a failed attempt cannot be undone.
    MUJOCO_GL is obeyed if it names one of them. Raises UserError where none works."""
    wanted = os.environ.get("MUJOCO_GL", "")
    for backend in (wanted,) if wanted in ("egl", "osmesa") else ("egl", "osmesa"):
        probe = f"from mujoco.{backend} import GLContext; GLContext(8, 8).make_current()"
        environment = os.environ | {"MUJOCO_GL": backend}
        if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True).returncode == 0:
            return backend
    raise UserError(
        f"no headless OpenGL here, tried {wanted if wanted in ('egl', 'osmesa') else 'egl and osmesa'}; install the "
        "Debian packages libegl1, libegl-mesa0 and libgl1-mesa-dri, or libosmesa6."
    )


class Renderer:
    """Pictures of simulation states, (height, width) pixels, on several threads. MuJoCo's C calls release the GIL, so
    threads do as well as processes and write into one array. An OpenGL context belongs to a thread: each thread makes
    its own."""

    def __init__(self, size: int, threads: int):
        xml = Path(gym.__file__).parent / "envs/mujoco/assets/half_cheetah.xml"
        mujoco.set_mju_user_warning(lambda message: None)  # the model file uses a deprecated attribute
        self.model = mujoco.MjModel.from_xml_path(str(xml))
        mujoco.set_mju_user_warning(None)
        # What costs time and is not needed to see the animal goes. MuJoCo's defaults give 37 frames/s in software;
        # without shadow map, multisampling, reflections, skybox and haze 1,000; with coarser capsules 2,900 (one core).
        quality = self.model.vis.quality
        quality.shadowsize = quality.offsamples = 0
        quality.numslices, quality.numstacks, quality.numquads = 12, 6, 1
        self.height, self.width, self.backend = size, 8 * round(size * VIEW_ASPECT / 8), headless_backend()
        self.model.vis.global_.offheight, self.model.vis.global_.offwidth = self.height, self.width
        self.model.vis.global_.fovy = math.degrees(2 * math.atan(VIEW_HEIGHT / 2 / CAMERA_DISTANCE))
        # Software OpenGL would keep threads of its own, which wait for each other: 4,200 frames/s, not 7,200.
        os.environ.setdefault("LP_NUM_THREADS", "0")
        self.pools = [ThreadPoolExecutor(1) for _ in range(threads)]
        self.local = threading.local()

    def setup(self) -> None:
        """Once a thread, before its first picture."""
        local, model = self.local, self.model
        local.data, local.option = mujoco.MjData(model), mujoco.MjvOption()
        local.gl = importlib.import_module(f"mujoco.{self.backend}").GLContext(self.width, self.height)
        local.gl.make_current()
        local.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, local.context)
        local.scene = mujoco.MjvScene(model, 100)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
            local.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        local.camera = mujoco.MjvCamera()
        local.camera.distance, local.camera.azimuth, local.camera.elevation = CAMERA_DISTANCE, 90.0, CAMERA_ELEVATION

    def work(self, qpos: np.ndarray, frames: np.ndarray) -> None:
        if not hasattr(self.local, "camera"):
            self.setup()
        local, model, everything = self.local, self.model, mujoco.mjtCatBit.mjCAT_ALL
        rect = mujoco.MjrRect(0, 0, self.width, self.height)
        rgb, torso = np.empty((*frames.shape, 3), np.uint8), model.body("torso").id
        for i in range(len(qpos)):
            local.data.qpos[:] = qpos[i]
            # After a step MuJoCo's derived fields lag one substep: what the camera sees is always made anew from qpos.
            mujoco.mj_kinematics(model, local.data)
            mujoco.mj_comPos(model, local.data)
            mujoco.mj_camlight(model, local.data)
            # The camera runs along with the animal and stays at one height, so that a frame shows how high it is.
            local.camera.lookat[:] = local.data.subtree_com[torso][0], 0, VIEW_CENTRE
            mujoco.mjv_updateScene(model, local.data, local.option, None, local.camera, everything, local.scene)
            mujoco.mjr_render(rect, local.scene, local.context)
            mujoco.mjr_readPixels(rgb[i], None, rect, local.context)
        red, blue = rgb[:, ::-1, :, 0].astype(np.int16), rgb[:, ::-1, :, 2].astype(np.int16)  # OpenGL's rows go up
        frames[:] = np.clip((20 * red - 17 * blue) // 10, 0, 255)

    def __call__(self, qpos: np.ndarray) -> np.ndarray:
        """qpos (N, nq) -> frames (N, H, W) uint8; the same picture for the same qpos in any thread and order."""
        frames = np.empty((len(qpos), self.height, self.width), np.uint8)
        pieces = len(self.pools) * math.ceil(len(qpos) / len(self.pools) / 256)  # few enough for a thread's memory
        parts = zip(self.pools * pieces, np.array_split(qpos, pieces), np.array_split(frames, pieces))
        for job in [pool.submit(self.work, states, part) for pool, states, part in parts]:
            job.result()
        return frames


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


class ToldAgent(Agent):
    """Agent whose value is told the last reward besides: one column more, (..., O + 1), which the policy leaves out."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int, generator: Generator):
        nn.Module.__init__(self)  # not Agent's, whose value reads a column less
        self.actor = mlp([obs_dim, hidden_size, hidden_size, 2 * action_dim], nn.SiLU, 0.01, generator)
        self.critic = mlp([obs_dim + 1, hidden_size, hidden_size, 1], nn.SiLU, 1.0, generator)
        self.actor[-1].bias.data[action_dim:] = INITIAL_LOG_STD

    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return super().policy(obs[..., :-1])


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(action; mean, exp(log_std)^2), summed over the last axis: (..., A) -> (...)."""
    z = (action - mean) * torch.exp(-log_std)
    return -0.5 * z.square().sum(-1) - log_std.sum(-1) - 0.5 * math.log(2 * math.pi) * action.shape[-1]


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of a diagonal Gaussian: (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def agent_optimizer(agent: Agent, learning_rate: float) -> Adam:
    """Adam with a smaller step size for the first layers, where they have many inputs: a step moves each weight by up
    to its size, so a layer of 134 inputs (the default) would move the policy 8 times as far as one of 17 states."""
    first = [*agent.actor[0].parameters(), *agent.critic[0].parameters()]
    others = [p for p in agent.parameters() if all(p is not q for q in first)]
    scale = min(1.0, FULL_STEP_INPUTS / agent.actor[0].in_features)
    groups = [(others, learning_rate), (first, scale * learning_rate)]
    groups = [{"params": parameters, "lr": lr, "initial_lr": lr} for parameters, lr in groups]
    return Adam(groups, eps=1e-5, fused=True)


class LatentDiscriminator(nn.Module):
    """Logit of 'these frames are the expert's': (B, X) standardized input -> (B,). Under WGAN, the critic's score."""

    def __init__(self, input_dim: int, hidden_size: int, generator: Generator):
        super().__init__()
        self.net = mlp([input_dim, hidden_size, hidden_size, 1], nn.SiLU, 1.0, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


# The autoencoder and its latents


class Autoencoder(nn.Module):
    """Two strided convolutions and a linear layer to Z latents, and back by sub-pixel convolutions (Shi et al. 2016).
    Two wide strides cost a third of three small ones at the same error. Works on frames minus a mean frame; C is 1,
    or K with --faithful."""

    def __init__(self, channels: int, height: int, width: int, latent_dim: int):
        super().__init__()
        rows, columns = height // 8, width // 8
        self.register_buffer("mean_frame", torch.zeros(height, width))  # in [0, 1]
        self.register_buffer("weight", torch.ones(height, width))  # of each pixel's squared error, 1 on average
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 32, 8, stride=4, padding=2),
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
            nn.Conv2d(32, channels * 16, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def set_reference(self, frames: Tensor, weighted: bool) -> None:
        """Take mean frame and pixel weights from uint8 frames (B, H, W)."""
        pixels = frames.float() / 255
        self.mean_frame.copy_(pixels.mean(0))
        if weighted:
            weight = 1 / (pixels.std(0) + 0.03)  # still pixels count too: a new policy may move there
            self.weight.copy_(weight / weight.mean())

    def center(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float around 0."""
        return frames.float() / 255 - self.mean_frame

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> latents (B, Z)."""
        return self.encoder(self.center(frames))

    def errors(self, latents: Tensor, frames: Tensor) -> Tensor:
        """Weighted mean squared error of each reconstruction, latents (B, Z), frames (B, C, H, W) -> (B,)."""
        return ((self.decoder(latents) - self.center(frames)).square() * self.weight).mean((1, 2, 3))

    def loss(self, frames: Tensor) -> Tensor:
        """Mean of the errors, ()."""
        return self.errors(self.encode(frames), frames).mean()


@torch.no_grad()
def encode_all(autoencoder: Autoencoder, frames: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> (B, Z), in pieces that fit the cache."""
    return torch.cat([autoencoder.encode(part) for part in frames.split(256)])


@dataclass
class Film:
    """What T steps of N environments showed: all of it after the action, `memory` alone before it."""

    views: Tensor  # (T, N, C, H, W) uint8
    seen: Tensor  # (T, N, D) what D judges: latents of K frames, standardized
    memory: Tensor  # (T, N, M) what was seen before the action, and the K - 1 actions before it
    actions: Tensor  # (T, N, A) as executed
    ended: Tensor  # (T, N) bool


def whole_windows(ended: Tensor, length: int) -> Tensor:
    """Which `length` consecutive views of a film are of one episode: ended (T, N) -> (T - length + 1, N) bool."""
    starts = len(ended) - length + 1
    whole = torch.ones_like(ended[:starts])
    for k in range(length - 1):  # an end is broken by what follows it: the last view of a window may be one
        whole &= ~ended[k : k + starts]
    return whole


def inverse_loss(inverse: nn.Module, latents: Tensor, actions: Tensor) -> Tensor:
    """Squared error of the last action, guessed from the latents of K frames that end with what it led to: (B, K, Z),
    (B, A) -> (). To tell a torque, the latents must hold positions finely enough to show an acceleration. The gradient
    goes through the spread as well: without that, the first wild guesses shrink the latents to nothing."""
    seen = latent_steps(latents)
    return F.mse_loss(inverse(seen / (seen.std(0, correction=0) + 1e-2)), actions)


def update_autoencoder(
    autoencoder: Autoencoder,
    inverse: nn.Module | None,
    optimizer: Optimizer,
    expert: Tensor,
    film: Film,
    num_steps: int,
    args: Args,
    generator: Generator,
) -> dict[str, float]:
    """num_steps steps on minibatches of half expert views (L, C, H, W), half snippets of a film (as many as fit whole):
    consecutive views of one environment; returns what to log.

    The inverse model, unless it is None, learns from the film alone: nobody tells what the expert did.
    """
    log, device, half, frame_stack = [], expert.device, args.ae_batch_size // 2, args.frame_stack
    # Long snippets give many windows: one of 16 views tells 13 actions with K = 4, four of 4 views tell 4.
    length = min(max(SNIPPET, frame_stack), half, len(film.views))
    whole = whole_windows(film.ended, frame_stack) if inverse else None
    # bfloat16 halves the time. It is for training alone: what policy and D see stays in float32.
    fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for _ in range(num_steps):
        expert_views = expert[torch.randint(len(expert), (half,), generator=generator).to(device)]
        size = (half // length, 1)
        first = torch.randint(len(film.views) - length + 1, size, generator=generator).to(device)
        env = torch.randint(film.views.shape[1], size, generator=generator).to(device)
        rows = first + torch.arange(length, device=device)  # (snippets, length)
        views = torch.cat([expert_views, film.views[rows, env].flatten(0, 1)])
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            latents = autoencoder.encode(views)
            errors = autoencoder.errors(latents, views)
        loss, inverse_error = errors[:half].mean() + errors[half:].mean(), torch.zeros((), device=device)
        if inverse:
            windows = latents[half:].float().unflatten(0, (-1, length)).unfold(1, frame_stack, 1).mT  # (.., .., K, Z)
            usable, actions = whole[rows[:, : windows.shape[1]], env], film.actions[rows[:, frame_stack - 1 :], env]
            if usable.any():
                inverse_error = inverse_loss(inverse, windows[usable], actions[usable])
        optimizer.zero_grad()
        (loss + args.inverse_coef * inverse_error).backward()
        optimizer.step()
        log.append(torch.stack([loss, inverse_error]).detach())
    return dict(zip(("ae/loss", "ae/inverse") if inverse else ("ae/loss",), torch.stack(log).mean(0).tolist()))


def latent_steps(latents: Tensor) -> Tensor:
    """Latents of K frames (..., K, Z), oldest first -> what is seen (..., K * Z): the K - 1 steps between consecutive
    latents, then the newest."""
    return torch.cat([latents.diff(dim=-2), latents[..., -1:, :]], dim=-2).flatten(-2)


def look_at_expert(autoencoder: Autoencoder, views: Tensor, windows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What the networks see of the expert (L + E, D), standardized, with the encoder as it is now, and the (mean, std)
    to standardize the policy's latents with. views (L + E, C, H, W); windows (L + E, K), or (L + E, 1) if C = K."""
    seen = latent_steps(encode_all(autoencoder, views)[windows])
    statistics = (seen.mean(0), seen.std(0) + 1e-3)
    return standardize(seen, *statistics), statistics


class Predictor(nn.Module):
    """Forward model: what will be seen LOOK_AHEAD steps from now, if these actions are taken."""

    def __init__(self, latent_dim: int, frame_stack: int, action_dim: int, generator: Generator):
        super().__init__()
        memory_dim = frame_stack * latent_dim + (frame_stack - 1) * action_dim
        self.idle_dim, self.action_dim = LOOK_AHEAD * action_dim, action_dim * (frame_stack > 1)
        sizes = [memory_dim + self.idle_dim, PREDICTOR_HIDDEN, PREDICTOR_HIDDEN, latent_dim * min(frame_stack, 2)]
        self.net = mlp(sizes, nn.ReLU, 1.0, generator)
        self.obs_dim = sizes[-1] + self.action_dim

    def forward(self, memory: Tensor, actions: Tensor) -> Tensor:
        """memory (B, M): what is seen and the last K - 1 actions; actions (B, LOOK_AHEAD * A), the next ones -> (B,
        2 Z): the last step between latents, then the newest latent, both standardized."""
        return self.net(torch.cat([memory, actions], dim=-1))

    def obs(self, memory: Tensor) -> Tensor:
        """What policy and value get, (N, M) -> (N, 2 Z + A): what comes if nothing is done, and the last action."""
        idle = torch.zeros(len(memory), self.idle_dim, device=memory.device)
        last_action = memory[:, memory.shape[1] - self.action_dim :]
        return torch.cat([self(memory, idle).clamp(-OBS_CLIP, OBS_CLIP), last_action], dim=1)


def update_predictor(
    predictor: Predictor, optimizer: Optimizer, film: Film, num_steps: int, generator: Generator
) -> dict[str, float]:
    """num_steps minibatch steps on a film; returns what to log."""
    starts, sight_dim = len(film.ended) - LOOK_AHEAD + 1, predictor.net[-1].out_features
    inside = whole_windows(film.ended, LOOK_AHEAD)  # where all the steps ahead are of the same episode
    memory = film.memory[:starts][inside]
    actions = torch.cat([film.actions[k : k + starts] for k in range(LOOK_AHEAD)], dim=-1)[inside]
    target, log = film.seen[LOOK_AHEAD - 1 :][inside][:, -sight_dim:], []
    for _ in range(num_steps):
        index = torch.randint(len(target), (PREDICTOR_BATCH_SIZE // WORLD_SIZE,), generator=generator).to(target.device)
        loss = F.mse_loss(predictor(memory[index], actions[index]), target[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(loss.detach())
    return {"ae/prediction": torch.stack(log).mean().item()}


def window_rows(lengths: np.ndarray, frame_stack: int) -> np.ndarray:
    """Rows of the K frames that each observation of a demonstration set ends, (L + E, K), oldest first; an episode's
    first frame is repeated where there are too few."""
    first = np.repeat(np.cumsum(lengths + 1) - (lengths + 1), lengths + 1)
    return np.maximum(np.arange(len(first))[:, None] + np.arange(1 - frame_stack, 1), first[:, None])


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


class PixelCollector:
    """Steps the environments, renders and encodes each frame once, and keeps what lasts from one rollout to the next.

    The autoencoder reads a view: the newest frame alone (C = 1), whose latent joins those of the K - 1 frames before
    it, or with --faithful all K frames (C = K), for one latent.
    """

    def __init__(self, envs: BatchHalfCheetah, renderer: Renderer, autoencoder: Autoencoder, predictor, args, device):
        self.envs, self.renderer, self.device = envs, renderer, device
        self.autoencoder, self.predictor = autoencoder, predictor  # predictor: None, and policies see what there is
        self.faithful, self.frame_stack, self.policy_obs = args.faithful, args.frame_stack, args.policy_obs
        self.tell_reward = args.reward_source == "env"
        self.state = envs.reset()  # (N, O) float64
        self.frames = self.first_frames(envs.qpos)  # (N, K, H, W) uint8, oldest first
        self.actions = torch.zeros(envs.num_envs, args.frame_stack - 1, envs.action_dim, device=device)  # oldest first
        self.episode_return, self.last_reward = np.zeros(envs.num_envs), np.zeros(envs.num_envs)
        self.finished: deque[float] = deque(maxlen=100)  # returns of the latest episodes

    def render(self, qpos: np.ndarray) -> Tensor:
        """(N, nq) -> (N, H, W) uint8 on the device."""
        return torch.from_numpy(self.renderer(qpos)).to(self.device)

    def first_frames(self, qpos: np.ndarray) -> Tensor:
        """(N, nq) -> (N, K, H, W): an episode begins with its first frame repeated."""
        return self.render(qpos)[:, None].repeat(1, self.frame_stack, 1, 1)

    def encode(self, frames: Tensor) -> Tensor:
        """(N, K, H, W) -> the latents of every frame (N, K, Z), or with --faithful of each stack (N, 1, Z)."""
        views = frames if self.faithful else frames.flatten(0, 1)[:, None]
        return encode_all(self.autoencoder, views).unflatten(0, (len(frames), -1))

    @torch.no_grad()
    def rollout(
        self, agent: Agent, statistics: dict, num_steps: int, generator: Generator, sampled: bool = True
    ) -> tuple[Rollout, Film]:
        """Act num_steps times in every environment, with sampled actions or their means; statistics holds the
        (mean, std) of "latent" and of "state". With --reward-source env the last reward is one more observation."""
        envs, steps = self.envs, []
        noise = torch.randn((num_steps, envs.num_envs, envs.action_dim), generator=generator).to(self.device)

        def look(latents: Tensor) -> Tensor:
            return standardize(latent_steps(latents), *statistics["latent"])

        def remember(seen: Tensor) -> Tensor:
            return torch.cat([seen, self.actions.flatten(1)], dim=1)

        def observe(memory: Tensor, state: np.ndarray, reward: np.ndarray) -> Tensor:
            if self.policy_obs == "state":
                obs = standardize(torch.as_tensor(state, dtype=torch.float32).to(self.device), *statistics["state"])
            else:
                obs = self.predictor.obs(memory) if self.predictor else memory
            if not self.tell_reward:
                return obs
            # The true reward is the speed, which frames hardly show: a value blind to it takes a fast start for merit.
            told = torch.as_tensor(reward, dtype=torch.float32).to(self.device)[:, None] / REWARD_SCALE
            return torch.cat([obs, told], dim=1)

        latents = self.encode(self.frames)
        memory = remember(look(latents))
        obs = observe(memory, self.state, self.last_reward)
        for t in range(num_steps):
            mean, log_std = agent.policy(obs)
            action = mean + sampled * log_std.exp() * noise[t]
            executed = np.clip(action.cpu().numpy(), envs.action_low, envs.action_high)
            self.state, reward, terminated, truncated, final_state = envs.step(executed)
            ended = terminated | truncated
            self.actions = torch.cat([self.actions, action.clamp(-1, 1)[:, None]], dim=1)[:, 1:]

            frames = self.render(envs.final_qpos)
            self.frames = torch.cat([self.frames[:, 1:], frames[:, None]], dim=1)
            view = self.frames if self.faithful else frames[:, None]
            newest = encode_all(self.autoencoder, view)[:, None]
            latents = torch.cat([latents[:, 1:], newest], dim=1)
            seen = look(latents)
            next_memory, log_prob = remember(seen), gaussian_log_prob(action, mean, log_std)
            next_obs = observe(next_memory, final_state, reward)
            self.last_reward = np.where(ended, 0.0, reward)
            steps.append((obs, next_obs, action, log_prob, memory, seen, view, executed, reward, terminated, ended))
            memory, obs = next_memory, next_obs

            if ended.any():
                ids = torch.from_numpy(np.flatnonzero(ended)).to(self.device)
                self.frames = self.frames.clone()  # with --faithful the film keeps the old ones
                self.frames[ids] = self.first_frames(envs.qpos[ended])
                latents[ids], self.actions[ids] = self.encode(self.frames[ids]), 0.0
                memory = remember(look(latents))
                obs = observe(memory, self.state, self.last_reward)
            self.episode_return += reward
            self.finished.extend(self.episode_return[ended].tolist())
            self.episode_return[ended] = 0.0
        columns = list(zip(*steps))
        obs, next_obs, action, log_prob, memory, seen, views = (torch.stack(column) for column in columns[:7])
        executed, reward, terminated, ended = (
            torch.as_tensor(np.stack(column)).to(self.device) for column in columns[7:]
        )
        executed = executed.float()
        rollout = Rollout(obs, next_obs, action, executed, log_prob, reward.float(), terminated, ended)
        return rollout, Film(views, seen, memory, executed, ended)

    def state_dict(self) -> dict:
        names = ("state", "episode_return", "last_reward")
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in names}
        arrays |= {"frames": self.frames.cpu(), "actions": self.actions.cpu()}
        arrays |= {"finished": list(self.finished), "envs": self.envs.state_dict()}
        return arrays

    def load_state_dict(self, saved: dict) -> None:
        names = ("state", "episode_return", "last_reward")
        self.state, self.episode_return, self.last_reward = (saved[name].numpy() for name in names)
        self.frames, self.actions = saved["frames"].to(self.device), saved["actions"].to(self.device)
        self.finished.extend(saved["finished"])
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


# Diagnostics and evaluation


def energy_distance(x: Tensor, y: Tensor) -> float:
    """How far two samples (n, D) and (m, D) are apart: 2 E|x - y| - E|x - x'| - E|y - y'| (Szekely & Rizzo 2013), on at
    most 1,000 of each; 0 for one distribution. It depends on no discriminator, and on the encoder, which comes to
    rest."""
    x, y = (z[torch.linspace(0, len(z) - 1, min(len(z), 1000), device=z.device).long()] for z in (x, y))
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def probe_state(latents: Tensor, states: Tensor, lengths: np.ndarray) -> float:
    """How well the true state (L + E, O) follows linearly from what policy and D see (L + E, D), for the log alone:
    mean R^2 on the second half of the episodes of a ridge regression on the first; NaN for a single episode."""
    half = int((lengths[: len(lengths) // 2] + 1).sum())
    if half == 0 or not states.isfinite().all():
        return math.nan
    x = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1).double().cpu()
    y = ((states - states.mean(0)) / (states.std(0) + 1e-6)).double()
    ridge = 1e-3 * half * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x[:half].T @ x[:half] + ridge, x[:half].T @ y[:half])
    residual = (y[half:] - x[half:] @ weights).square().sum(0)
    return (1 - residual / (y[half:] - y[half:].mean(0)).square().sum(0)).mean().item()


def signs_of_collapse(recent: list[dict], action_std: float, recon_policy: list[float]) -> dict[str, str]:
    """What the log says went wrong -> the likely cause. recent: rows of the last rollouts; recon_policy: reconstruction
    errors on the policy's frames so far."""
    found = {}
    if len(recent) >= 20 and all(
        min(row.get("disc/expert_acc", 0), row.get("disc/policy_acc", 0)) > 0.99 for row in recent
    ):
        cause = "it has more capacity than the policy can follow: raise --grad-penalty-coef or lower --disc-steps"
        found[f"the discriminator has told every window apart for {len(recent)} rollouts"] = cause
    if len(recon_policy) >= 3 and min(recon_policy[-3:]) > 2 * min(recon_policy):
        cause = "the policy shows what the encoder has not seen: raise --pretrain-steps or --ae-steps"
        found["the reconstruction error on the policy's frames has doubled"] = cause
    if action_std < 0.05:
        cause = "exploration has ended: lower --learning-rate or set --ent-coef"
        found["the action's standard deviation has fallen below 0.05"] = cause
    return found


def evaluate(
    policy: dict, renderer: Renderer, episodes: int, sampled: bool, seed: int, threads: int, device: torch.device
) -> tuple[np.ndarray, Tensor]:
    """True returns (episodes,) of fresh episodes with the mean action or sampled ones, and what they showed (B, D).

    policy is what `restore_policy` returns; environments and random numbers are the evaluation's own.
    """
    envs = BatchHalfCheetah(episodes, policy["max_episode_steps"], seed, threads)
    collector = PixelCollector(envs, renderer, policy["autoencoder"], policy["predictor"], policy["args"], device)
    generator, steps = Generator().manual_seed(seed), policy["max_episode_steps"]
    rollout, film = collector.rollout(policy["agent"], policy["statistics"], steps, generator, sampled)
    return rollout.env_rewards.double().sum(0).cpu().numpy(), film.seen.flatten(0, 1)


def policy_with_eyes(policy: dict) -> dict:
    """The content of policy.pt from what `restore_policy` returns; encoder and settings go along, as its eyes."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": "pixels",
        "args": dataclasses.asdict(policy["args"]),
        "agent": policy["agent"].state_dict(),
        "autoencoder": policy["autoencoder"].state_dict(),
        "predictor": policy["predictor"].state_dict() if policy["predictor"] else None,
        "statistics": policy["statistics"],
        "max_episode_steps": policy["max_episode_steps"],
    }


def restore_policy(content: dict, device: torch.device) -> dict:
    """The networks of a policy.pt, ready for `evaluate`."""
    args = Args(**content["args"])
    eyes, weights = content["autoencoder"], content["agent"]
    autoencoder = Autoencoder(args.frame_stack if args.faithful else 1, *eyes["mean_frame"].shape, args.latent_dim)
    autoencoder.load_state_dict(eyes)
    (hidden_size, obs_dim), action_dim = weights["actor.0.weight"].shape, len(weights["actor.4.bias"]) // 2
    agent_type = ToldAgent if args.reward_source == "env" else Agent
    agent = agent_type(obs_dim, action_dim, hidden_size, Generator())
    agent.load_state_dict(weights)
    predictor = None
    if has_predictor(args):
        predictor = Predictor(args.latent_dim, args.frame_stack, action_dim, Generator()).to(device)
        predictor.load_state_dict(content["predictor"])
    statistics = {name: tuple(x.to(device) for x in pair) for name, pair in content["statistics"].items()}
    networks = {"agent": agent.to(device), "autoencoder": autoencoder.to(device), "predictor": predictor}
    return networks | {"args": args, "statistics": statistics, "max_episode_steps": content["max_episode_steps"]}


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


COLUMNS = """global_step charts/episodic_return charts/SPS charts/learning_rate
losses/policy_loss losses/value_loss losses/entropy losses/approx_kl losses/clipfrac losses/explained_variance
disc/loss disc/expert_prob disc/policy_prob disc/expert_acc disc/policy_acc disc/grad_penalty disc/entropy
reward/env_mean reward/gail_mean reward/gail_std reward/total_mean
ae/loss ae/recon_policy ae/recon_expert ae/recon_heldout ae/inverse ae/prediction ae/probe_r2
eval/return_mean eval/return_std eval/return_sampled_mean eval/vs_demos eval/vs_expert eval/latent_distance
time/rollout time/discriminator time/update time/autoencoder""".split()


def plot_pixel_run(run_dir: Path, demos_mean: float, expert_mean: float) -> None:
    """curves.png: return, discriminator outputs and distance to the expert over environment steps, from metrics.csv."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    def draw(ax, name: str, **style) -> None:
        points = [(int(row["global_step"]), float(row[name])) for row in rows if row[name]]
        if points:
            ax.plot(*zip(*points), **style)

    figure = Figure(figsize=(15, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw(left, "charts/episodic_return", label="sampled actions (training)", color="tab:blue", alpha=0.5)
    draw(left, "eval/return_mean", label="mean action (evaluation)", color="tab:blue", marker=".")
    left.axhline(demos_mean, color="tab:red", linestyle="--", label="demonstrations")
    left.axhline(expert_mean, color="black", linestyle=":", label="expert (mean action)")
    left.set(xlabel="frames", ylabel="true return of an episode", title="Return")
    left.legend(loc="lower right")
    draw(middle, "disc/expert_prob", label="on demonstrations", color="tab:red")
    draw(middle, "disc/policy_prob", label="on the policy", color="tab:blue")
    middle.axhline(0.5, color="grey", linestyle=":", label="cannot tell")
    middle.set(xlabel="frames", ylabel="mean D (1: expert)", ylim=(0, 1), title="Discriminator output")
    middle.legend()
    draw(right, "eval/latent_distance", color="tab:blue", marker=".")
    right.set(xlabel="frames", ylabel="energy distance", yscale="log", title="Policy's latents to the expert's")
    figure.savefig(run_dir / "curves.png", dpi=120)


def picture_reconstructions(autoencoder: Autoencoder, expert: Tensor, policy: Tensor, path: Path) -> None:
    """A PNG of frames, reconstructions and differences: four views (B, C, H, W) of the expert, four of the policy."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(3, 8)
    for side, (name, views) in enumerate((("expert", expert), ("policy", policy))):
        views = views[torch.linspace(0, len(views) - 1, 4).long().to(views.device)]
        with torch.no_grad():
            truth = autoencoder.center(views)[:, -1]
            guess = autoencoder.decoder(autoencoder.encode(views))[:, -1]
        for i in range(4):
            column = axes[:, 4 * side + i]
            pictures = (truth[i] + autoencoder.mean_frame, guess[i] + autoencoder.mean_frame, (guess - truth)[i])
            for ax, picture, style in zip(column, pictures, ("gray", "gray", "coolwarm")):
                ax.imshow(
                    picture.cpu(), cmap=style, vmin=0 if style == "gray" else -0.5, vmax=1 if style == "gray" else 0.5
                )
                ax.set(xticks=[], yticks=[])
            column[0].set_title(name, fontsize="small")
    for ax, label in zip(axes[:, 0], ("frame", "reconstruction", "difference")):
        ax.set_ylabel(label)
    figure.savefig(path, dpi=100)


def record_side_by_side(policy: dict, demos: Demos, renderer: Renderer, path: Path, seed: int, device) -> None:
    """A GIF of one episode: the expert on the left, the policy with its mean action on the right."""
    import imageio

    class Camera:
        """A renderer that keeps the positions it was shown."""

        def __init__(self):
            self.qpos = []

        def __call__(self, qpos: np.ndarray) -> np.ndarray:
            self.qpos.append(qpos[:1].copy())
            return renderer(qpos)

    camera = Camera()
    evaluate(policy, camera, 1, False, seed, 1, device)
    large, length = Renderer(168, 1), int(demos.lengths[0])
    left, right = large(demos.qpos[: length + 1]), large(np.concatenate(camera.qpos)[: length + 1])
    gap = np.full((len(left), left.shape[1], 4), 255, np.uint8)
    imageio.mimsave(path, list(np.concatenate([left, gap, right], axis=2)), duration=50, loop=0)


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


@dataclass
class ExpertFilm:
    """The expert as the learner knows it."""

    views: Tensor  # (L + E, C, H, W) uint8, what the autoencoder reads: C is 1, or K with --faithful
    windows: Tensor  # (L + E, K), the rows of the views that end at each frame; (L + E, 1) with --faithful
    after_action: Tensor  # (L,), the rows that an action led to, which D sees
    train_views: Tensor  # the views but those of the last episode, unless it is the only one
    heldout_views: Tensor  # the others, for ae/recon_heldout


def film_expert(demos: Demos, renderer: Renderer, args: Args, device: torch.device) -> ExpertFilm:
    """Render the demonstrations and find the frames that end at each."""
    frames = torch.from_numpy(renderer(demos.qpos)).to(device)
    windows = torch.from_numpy(window_rows(demos.lengths, args.frame_stack)).to(device)
    first = np.cumsum(demos.lengths + 1) - (demos.lengths + 1)
    after_action = torch.from_numpy(np.delete(np.arange(len(windows)), first)).to(device)
    views = frames[:, None]
    if args.faithful:  # one view shows the whole window
        views, windows = frames[windows], torch.arange(len(windows), device=device)[:, None]
    train = len(views) - (int(demos.lengths[-1]) + 1 if len(demos.lengths) > 1 else 0)
    return ExpertFilm(views, windows, after_action, views[:train], views[train:])


@dataclass
class Networks:
    """All that is trained, with its optimizers. What the settings do not ask for is None."""

    autoencoder: Autoencoder
    inverse: nn.Module | None  # the inverse model: K latents -> the last action
    ae_optimizer: Optimizer  # of both
    predictor: Predictor | None
    predictor_optimizer: Optimizer | None
    agent: Agent
    optimizer: Optimizer
    disc: LatentDiscriminator
    disc_optimizer: Optimizer

    def parts(self) -> dict:
        """Those that are there, by name, for a checkpoint."""
        return {name: part for name, part in vars(self).items() if part is not None}


def make_networks(args: Args, expert: ExpertFilm, envs: BatchHalfCheetah, generator: Generator) -> Networks:
    """Networks and optimizers, on the device that the expert's views are on."""
    device, predictor, predictor_optimizer, inverse = expert.views.device, None, None, None
    seen_dim = args.latent_dim * (1 if args.faithful else args.frame_stack)
    obs_dim = envs.obs_dim if args.policy_obs == "state" else seen_dim + (args.frame_stack - 1) * envs.action_dim
    if has_predictor(args):
        predictor = Predictor(args.latent_dim, args.frame_stack, envs.action_dim, generator).to(device)
        predictor_optimizer, obs_dim = Adam(predictor.parameters(), lr=1e-3, fused=True), predictor.obs_dim
        predictor_optimizer.register_step_pre_hook(average_gradients)
    autoencoder = Autoencoder(*expert.views.shape[1:], args.latent_dim).to(device)
    autoencoder.set_reference(expert.views[:, -1], weighted=not args.faithful)
    autoencoder.to(memory_format=torch.channels_last)
    agent_type = ToldAgent if args.reward_source == "env" else Agent
    agent = agent_type(obs_dim, envs.action_dim, args.hidden_size, generator).to(device)
    disc = LatentDiscriminator(seen_dim, args.disc_hidden_size, generator).to(device)
    if args.inverse_coef > 0 and args.frame_stack > 1 and not args.faithful:
        inverse = mlp([seen_dim, INVERSE_HIDDEN, envs.action_dim], nn.ReLU, 1.0, generator).to(device)
    learners = nn.ModuleList([autoencoder, *([inverse] if inverse else [])])
    ae_optimizer = Adam(learners.parameters(), lr=args.ae_learning_rate, fused=True)
    disc_optimizer = Adam(disc.parameters(), lr=args.disc_learning_rate, fused=True)
    for optimizer in (ae_optimizer, disc_optimizer):
        optimizer.register_step_pre_hook(average_gradients)
    optimizer = agent_optimizer(agent, args.learning_rate)
    return Networks(
        autoencoder, inverse, ae_optimizer, predictor, predictor_optimizer, agent, optimizer, disc, disc_optimizer
    )


def pretrain(
    nets: Networks, expert: ExpertFilm, collector: PixelCollector, statistics: dict, args: Args, generator: Generator
) -> None:
    """Train autoencoder, inverse model and predictor on what the untrained policy shows: random actions. Updates
    statistics["latent"] on the way."""
    if args.pretrain_steps and not args.faithful:
        _, film = collector.rollout(nets.agent, statistics, args.num_steps, generator)
        for i in tqdm(range(args.pretrain_steps), desc="pretraining", disable=RANK > 0 or None):
            left = 2 - 2 * i / args.pretrain_steps
            nets.ae_optimizer.param_groups[0]["lr"] = args.ae_learning_rate * min(1.0, max(left, REST_OF_AE_LR))
            # Reconstruction goes first: the inverse model has nothing to read in latents that mean nothing yet.
            inverse = nets.inverse if i > 0.2 * args.pretrain_steps else None
            views = expert.train_views
            update_autoencoder(nets.autoencoder, inverse, nets.ae_optimizer, views, film, 1, args, generator)
        _, statistics["latent"] = look_at_expert(nets.autoencoder, expert.views, expert.windows)
    if nets.predictor:
        _, film = collector.rollout(nets.agent, statistics, args.num_steps, generator)
        steps = PREDICTOR_PRETRAINING * args.predictor_steps
        update_predictor(nets.predictor, nets.predictor_optimizer, film, steps, generator)


@torch.no_grad()
def reconstruction_errors(autoencoder: Autoencoder, expert: ExpertFilm, policy_views: Tensor) -> dict[str, float]:
    """The autoencoder's loss on 256 views of expert, held-out episode (if there is one) and policy, for the log."""
    views = {"heldout": expert.heldout_views, "expert": expert.train_views, "policy": policy_views}
    spread = {name: torch.linspace(0, len(x) - 1, 256, device=x.device).long() for name, x in views.items() if len(x)}
    return {f"ae/recon_{name}": autoencoder.loss(views[name][index]).item() for name, index in spread.items()}


def train(args: Args) -> dict:
    """One training, from start or checkpoint to its table, files and figures; returns summary.json's content."""
    resume_path, saved = args.resume, None
    if resume_path:
        saved, args = load_checkpoint(resume_path, "gail_pixels_ae", Args)
    args.check()
    device, mine = join_processes(args.cuda), share_of(args, ["num_envs", "disc_batch_size", "ae_batch_size"])
    mine.check()
    own_seed = args.seed + 1_000_000 * RANK  # of what differs between processes
    demos = load_demos(args.demos, args.env_id, args.num_demos, np.random.default_rng(args.seed), ("qpos",))
    max_episode_steps, threads = demos.metadata["max_episode_steps"], mine.threads
    if args.frame_stack > max_episode_steps:
        raise UserError(f"--frame-stack is {args.frame_stack}, but an episode has {max_episode_steps} steps; lower it.")
    demos_mean = demos.returns.mean()
    renderer = Renderer(args.image_size, threads)
    torch.set_num_threads(threads)
    torch.manual_seed(args.seed)  # for the convolutions, whose initialization takes no generator
    generator = Generator().manual_seed(args.seed)

    expert = film_expert(demos, renderer, args, device)
    envs = BatchHalfCheetah(mine.num_envs, max_episode_steps, own_seed, threads)
    nets = make_networks(args, expert, envs, generator)
    autoencoder, inverse, predictor, agent, disc = nets.autoencoder, nets.inverse, nets.predictor, nets.agent, nets.disc
    normalizers = {"env": RewardNormalizer(), "gail": RewardNormalizer()}
    collector = PixelCollector(envs, renderer, autoencoder, predictor, args, device)
    own = PerProcess({"collector": collector, "generator": generator})
    parts = nets.parts() | {"own": own, "env_reward": normalizers["env"], "gail_reward": normalizers["gail"]}
    progress = {"iteration": 0, "seconds": 0.0, "evaluations": []}

    if saved:
        run_dir = Path(resume_path).parent
        expected = autoencoder.mean_frame.clone()
        progress = restore(parts, saved, resume_path)
        if not torch.allclose(autoencoder.mean_frame, expected, atol=1e-4):
            raise UserError(f"--resume {resume_path}: {args.demos} or OpenGL has changed since then; start a new run.")
    else:
        run_dir = gather(make_run_dir(args) if RANK == 0 else None)[0]
        if RANK > 0:  # the same networks, other noise
            generator.manual_seed(own_seed)
    if RANK == 0:
        logger = parts["logger"] = MetricsLogger(run_dir, COLUMNS, args, saved and saved["logger"])

    def keep_checkpoint() -> None:
        """To be called by all processes at once: each gives its share of the one file."""
        if RANK == 0:
            save_checkpoint(run_dir / "checkpoint.pt", "gail_pixels_ae", args, parts, progress)
        else:
            own.state_dict()

    policy = {"agent": agent, "autoencoder": autoencoder, "predictor": predictor, "args": args}
    policy |= {"max_episode_steps": max_episode_steps}
    policy["statistics"] = statistics = {}  # mean and standard deviation of the networks' inputs
    if args.policy_obs == "state":
        states = torch.as_tensor(demos.observations)
        statistics["state"] = (states.mean(0).to(device), states.std(0).to(device) + 1e-3)
    expert_seen, statistics["latent"] = look_at_expert(autoencoder, expert.views, expert.windows)
    pretraining = pretraining_frames(args)
    if pretraining and not saved:
        clock = time.perf_counter()
        pretrain(nets, expert, collector, statistics, mine, generator)
        expert_seen, statistics["latent"] = look_at_expert(autoencoder, expert.views, expert.windows)
        progress["seconds"] += time.perf_counter() - clock
        keep_checkpoint()

    batch_size = args.num_envs * args.num_steps
    num_iterations = (args.total_timesteps - pretraining) // batch_size
    recent, warned, evaluations = deque(maxlen=20), set(), progress["evaluations"]
    first_step, last_step = (pretraining + n * batch_size for n in (progress["iteration"], num_iterations))
    # All that the policy sees comes to rest along with it: eyes that go on changing cost it its last tenth.
    annealed = [nets.optimizer, nets.ae_optimizer, *([nets.predictor_optimizer] if predictor else [])]
    for group in (group for optimizer in annealed for group in optimizer.param_groups):
        group.setdefault("initial_lr", group["lr"])
    bar = tqdm(total=last_step, initial=first_step, unit="frame", disable=RANK > 0 or None)
    ctrl_c = watch_ctrl_c()
    counted = time.perf_counter()  # time until here is in progress["seconds"], or left out as an evaluation's
    for iteration in range(progress["iteration"], num_iterations):
        clock = [time.perf_counter()]
        for group in (group for optimizer in annealed for group in optimizer.param_groups if args.anneal_lr):
            group["lr"] = group["initial_lr"] * (1 - iteration / num_iterations)

        rollout, film = collector.rollout(agent, statistics, args.num_steps, generator)
        clock.append(time.perf_counter())

        row, logit = {}, None
        if args.reward_source == "gail":
            expert_x, policy_x = expert_seen[expert.after_action], film.seen.flatten(0, 1)
            steps = args.disc_steps
            row |= update_discriminator(disc, nets.disc_optimizer, expert_x, policy_x, mine, steps, generator)
            with torch.no_grad():
                logit = disc(film.seen)
        rewards, reward_log = compute_rewards(rollout, logit, normalizers, args)
        clock.append(time.perf_counter())

        row |= reward_log | update_policy(agent, nets.optimizer, rollout, rewards, args, generator)
        clock.append(time.perf_counter())

        if predictor:
            row |= update_predictor(predictor, nets.predictor_optimizer, film, args.predictor_steps, generator)
        if args.ae_steps:  # the encoder changes, and with it what the expert looks like
            views, steps = expert.train_views, args.ae_steps
            row |= update_autoencoder(autoencoder, inverse, nets.ae_optimizer, views, film, steps, mine, generator)
            expert_seen, statistics["latent"] = look_at_expert(autoencoder, expert.views, expert.windows)
        clock.append(time.perf_counter())

        step = pretraining + (iteration + 1) * batch_size
        last = step == last_step
        names = ("time/rollout", "time/discriminator", "time/update", "time/autoencoder")
        row |= dict(zip(names, np.diff(clock).tolist()))
        row["charts/learning_rate"] = nets.optimizer.param_groups[0]["lr"]
        if collector.finished:
            row["charts/episodic_return"] = float(np.mean(collector.finished))
        if crossed(step, batch_size, args.eval_interval) or last:
            returns, shown = evaluate(policy, renderer, 20, False, args.seed + 10_000, threads, device)
            distance, policy_views = energy_distance(shown, expert_seen[expert.after_action]), film.views.flatten(0, 1)
            row |= reconstruction_errors(autoencoder, expert, policy_views) | return_metrics(returns, demos)
            row["ae/probe_r2"] = probe_state(expert_seen, torch.as_tensor(demos.observations), demos.lengths)
            row["eval/latent_distance"] = distance
            nearest = distance <= min((entry[2] for entry in evaluations), default=math.inf)
            evaluations.append((step, returns.mean().item(), distance, row["ae/recon_policy"]))
            if RANK == 0:
                if nearest:
                    save_atomically(policy_with_eyes(policy), run_dir / "policy_best.pt")
                expert_views = expert.heldout_views if len(expert.heldout_views) else expert.views
                picture_reconstructions(autoencoder, expert_views, policy_views, run_dir / "reconstructions.png")
            bar.set_postfix_str(f"return {returns.mean():.0f} (demonstrations {demos_mean:.0f})")
            counted += time.perf_counter() - clock[-1]
        rows, pressed = zip(*gather((row, ctrl_c.is_set())))
        row = mean_row(rows) | {"global_step": step}
        recent.append(row)
        with torch.no_grad():
            action_std = agent.policy(rollout.obs)[1].exp().mean().item()
        signs = signs_of_collapse(list(recent), action_std, [entry[3] for entry in evaluations])
        for sign in signs.keys() - warned if RANK == 0 else ():
            warned.add(sign)
            bar.write(f"warning: at frame {step} {sign}; {signs[sign]}.", file=sys.stderr)
        # The true reward and state are for the log alone, so nothing may hang on them.
        logged_only = ("charts/", "eval/", "reward/env", "ae/probe")
        stop_if_not_finite({k: v for k, v in row.items() if not k.startswith(logged_only)}, step, run_dir)
        progress["iteration"], now = iteration + 1, time.perf_counter()
        progress["seconds"], counted = progress["seconds"] + now - counted, now
        if RANK == 0:
            logger.write(row | {"charts/SPS": int(step / progress["seconds"])})
        bar.update(batch_size)
        if crossed(step, batch_size, args.checkpoint_interval) or last or any(pressed):
            keep_checkpoint()
        if any(pressed):
            raise KeyboardInterrupt(f"stopped at step {step}; go on with --resume {run_dir}/checkpoint.pt")
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if RANK > 0:
        return {}
    return finish_pixel_run(policy, progress, last_step, demos, renderer, logger, run_dir, device)


def finish_pixel_run(
    policy: dict, progress: dict, frames: int, demos: Demos, renderer, logger: MetricsLogger, run_dir: Path, device
) -> dict:
    """The final evaluation, the run's remaining files and its table; returns summary.json's content."""
    args, threads = policy["args"], len(renderer.pools)
    save_atomically(policy_with_eyes(policy), run_dir / "policy.pt")
    returns, _ = evaluate(policy, renderer, args.eval_episodes, False, args.seed + 20_000, threads, device)
    sampled, _ = evaluate(policy, renderer, args.eval_episodes, True, args.seed + 30_000, threads, device)
    demos_mean, expert_mean = float(demos.returns.mean()), float(demos.metadata.get("expert_return_mean", math.nan))
    evaluations, seconds = progress["evaluations"], progress["seconds"]
    best = max(evaluations, key=lambda entry: entry[1])
    chosen = min(evaluations, key=lambda entry: entry[2])  # policy_best.pt, by its distance to the expert
    summary = return_metrics(returns, demos) | {"eval/return_sampled_mean": sampled.mean().item()}
    reference = demos_mean if demos_mean > 0 else math.nan  # a share of nothing, or of a loss, says nothing
    summary |= {"eval/sampled_vs_demos": sampled.mean().item() / reference}
    summary |= {"best/return_mean": best[1], "best/step": best[0]}
    summary |= {"chosen/return_mean": chosen[1], "chosen/step": chosen[0]}
    summary |= {"steps_to_90": steps_to_fraction([entry[:2] for entry in evaluations], 0.9 * reference)}
    summary |= {"demos_return_mean": demos_mean, "expert_return_mean": expert_mean, "env_steps": frames}
    summary |= {"seconds": seconds, "charts/SPS": frames / seconds}
    summary = {k: v for k, v in summary.items() if v is None or math.isfinite(v)}  # a set may tell no returns
    logger.write({"global_step": frames} | {k: v for k, v in summary.items() if k in COLUMNS})
    logger.close(summary)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_pixel_run(run_dir, demos_mean, expert_mean)
    if args.capture_video:
        record_side_by_side(policy, demos, renderer, run_dir / "policy.gif", args.seed, device)
    rows = [
        ("demonstrations", f"{demos_mean:.0f} ± {demos.returns.std():.0f}   ({len(demos.lengths)} episodes, filmed)")
    ]
    rows += [("expert, mean action", f"{expert_mean:.0f}")]
    for name, x in (("policy, mean action", returns), ("policy, sampled", sampled)):
        share = f"   ({x.mean() / demos_mean:.1%} of demonstrations)" if demos_mean > 0 else ""
        rows += [(name, f"{x.mean():.0f} ± {x.std():.0f}{share}")]
    rows += [("frames to 90%", f"{summary['steps_to_90'] or 'not reached'}")]
    rows += [("time", f"{seconds:.0f} s, {frames / seconds:,.0f} frames/s"), ("results", str(run_dir))]
    print_table(rows)
    return summary


def evaluate_pixels_policy(args: Args) -> dict:
    """--evaluate: returns of a saved policy with the mean action and with sampled ones, as a table."""
    args.check()
    device = torch.device("cuda" if args.cuda else "cpu")
    content = load_saved(args.evaluate, "--evaluate", {"kind": "pixels"})
    try:
        policy = restore_policy(content, device)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = type(error).__name__
        raise UserError(
            f"--evaluate {args.evaluate}: damaged or of another version ({reason}); give another."
        ) from None
    threads, summary = args.threads or len(os.sched_getaffinity(0)), {}
    torch.set_num_threads(threads)
    renderer = Renderer(policy["args"].image_size, threads)
    for name, sampled in (("mean action", False), ("sampled", True)):
        seed = args.seed + 20_000 + 10_000 * sampled
        returns, _ = evaluate(policy, renderer, args.eval_episodes, sampled, seed, threads, device)
        summary[name] = f"{returns.mean():.1f} ± {returns.std():.1f}   ({args.eval_episodes} episodes)"
    print_table([("policy", args.evaluate), *summary.items()])
    return summary


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
    run_command(argv, Args, lambda args: evaluate_pixels_policy(args) if args.evaluate else train(args))


if __name__ == "__main__":
    main(sys.argv[1:])
