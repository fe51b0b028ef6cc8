# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""Behaviour cloning: regress an expert's actions on its states, complete in one file.

The policy is fitted to demonstrated (state, action) pairs by supervised learning (Pomerleau 1989).
It never acts while it learns, so nothing corrects it once its own actions have led it to states
that no demonstration shows (Ross & Bagnell 2010). Every result of imitation must stand beside it.

    repeat:  gradient step on a minibatch of pairs -> slow policy follows by Polyak averaging

Details that matter:

 1. `--loss mse` fits a deterministic policy by mean squared error; `--loss nll` a Gaussian, with
    one std for all states, by maximum likelihood; discrete actions have a categorical one,
    by cross-entropy. All are judged by their likeliest action, the mean of a Gaussian.
 2. Losses are of standardized actions, so that units do not matter. The deterministic policy ends
    in a tanh, as the expert does: many demonstrated actions lie near the bounds, which a tanh meets
    by saturating.
 3. Whole episodes are held out for validation: neighbouring steps are nearly equal, so with steps
    of one episode on both sides the validation loss would be a second training loss.
 4. `bc/train_loss` and `bc/val_loss` are the same loss, of the same weights, each over its whole
    split: their difference is the generalization gap and nothing else.
 5. Weight decay keeps the network from fitting the noise in the demonstrated actions. Without it
    a longer training makes the policy worse (benchmark/results/bc_short.csv).
 6. The slow policy is the Polyak average of the weights, evaluated and saved beside the other.
 7. An episode *fell away* if it returned less than halfway from random actions to the
    demonstrations' mean, not the policy's own: a policy that mostly fails is no yardstick.

Shapes: B batch, O observation, A action; L steps in E demonstrations; T steps of an episode.

    python bc.py                                            # the default set: 14 seconds
    python bc.py --loss nll --hidden-size 64                # a Gaussian policy, narrower
    python bc.py --compare-with runs/<run>/evaluation.npz   # any script's returns beside its own
    python bc.py --evaluate runs/<run>/policy.pt            # 200 episodes and their figure
    python bc.py --resume runs/<run>/checkpoint.pt          # go on from the last checkpoint
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
from torch.optim import AdamW
from tqdm import tqdm

INPUT_CLIP = 10.0  # standardized inputs and actions are clipped to [-INPUT_CLIP, INPUT_CLIP]
INITIAL_LOG_STD = -0.5  # of the Gaussian policy


@dataclass
class Args:
    seed: int = 1  # seed of network, minibatches, choice and split of demonstrations, evaluation
    env_id: str = "HalfCheetah-v4"  # the demonstrations' environment: gymnasium's id, or module:id
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"  # demonstration set (data/README.md)
    num_demos: int = 0  # use this many demonstrated episodes, drawn by the seed (0: all)
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: bc__<env-id>__<seed>__<time>)
    resume: str = ""  # checkpoint.pt to go on from; with --gradient-steps, on a new schedule
    evaluate: str = ""  # policy.pt to evaluate, in its own task, instead of training
    compare_with: str = ""  # evaluation.npz of any script, drawn beside this policy's returns
    eval_interval: int = 250  # gradient steps between evaluations (20 episodes) and checkpoints
    eval_episodes: int = 200  # episodes of the final evaluation
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    cuda: bool = False  # network on the GPU
    threads: int = 0  # threads of the physics (0: one per core)

    loss: Literal["mse", "nll"] = "mse"
    """mean squared error of a deterministic policy, or negative log-likelihood of a Gaussian one
    (discrete actions: cross-entropy, whatever is given)"""
    gradient_steps: int = 4000  # minibatch steps of the whole run
    batch_size: int = 256  # (state, action) pairs in a minibatch
    learning_rate: float = 4e-3  # Adam learning rate
    anneal_lr: bool = True  # let that learning rate fall linearly to zero over the run
    weight_decay: float = 0.3  # decoupled weight decay (AdamW)
    hidden_size: int = 256  # width of the two hidden layers
    polyak: float = 0.99  # share of itself that the slow policy keeps at each gradient step
    val_fraction: float = 0.1  # share of the episodes held out for validation, rounded down

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        may_be_zero = "seed num_demos threads weight_decay polyak val_fraction"
        at_most = {"seed": 2**31 - 1, "polyak": 0.9999, "val_fraction": 0.99}
        check_settings(self, may_be_zero, {}, at_most)
        require(torch.cuda.is_available() or not self.cuda, "--cuda was given, but PyTorch sees no "
                "GPU; drop it (--resume: --no-cuda) or install a CUDA build of torch.")
        if self.threads == 0:
            has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
            self.threads = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        if self.compare_with:
            load_evaluation(self.compare_with)


# Networks


def policy_mlp(sizes: list[int], generator: Generator) -> nn.Sequential:
    """Linear layers with ReLU between, which cloned better than SiLU and tanh (bc_short.csv);
    orthogonal weights (gain sqrt 2; last layer 0.01)."""
    layers, gains = [], [math.sqrt(2)] * (len(sizes) - 2) + [0.01]
    for fan_in, fan_out, gain in zip(sizes[:-1], sizes[1:], gains):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        nn.init.orthogonal_(layers[-2].weight, gain, generator=generator)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


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


class Policy(nn.Module):
    """Action (..., A) of a standardized observation (..., O), standardized as well: of a
    deterministic policy, squashed into the bounds and INPUT_CLIP, or the mean of a Gaussian one,
    which has a log std (A,). If actions are discrete, their logits. The state_dict has all
    that acting needs: weights, statistics of demos["obs"] (L, O) and ["actions"] (L, A), and the
    bounds demos["low"] and ["high"] (A,) of actions, as precise as the world's."""

    def __init__(self, demos: dict, hidden_size: int, gaussian: bool, generator: Generator):
        super().__init__()
        obs_dim, action_dim = demos["obs"].shape[1], demos["actions"].shape[1]
        self.gaussian, self.discrete = gaussian, demos["discrete"]
        self.standardize = Standardize(demos["obs"])
        actions = np.eye(action_dim) if self.discrete else demos["actions"]  # all, even unseen ones
        self.standardize_action = Standardize(actions, whole=True)  # no action may be clipped
        self.net = policy_mlp([obs_dim, hidden_size, hidden_size, action_dim], generator)
        self.log_std = nn.Parameter(torch.full((action_dim,), INITIAL_LOG_STD))
        self.register_buffer("low", torch.as_tensor(demos["low"]))
        self.register_buffer("high", torch.as_tensor(demos["high"]))

    def forward(self, x: Tensor) -> Tensor:
        if self.gaussian or self.discrete:
            return self.net(x)
        low, high = (self.standardize_action(b.nan_to_num()) for b in (self.low, self.high))
        return low + 0.5 * (torch.tanh(self.net(x)) + 1) * (high - low)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, generator: Generator | None = None) -> np.ndarray:
        """What to do after raw observations (O,) or (B, O): the likeliest action, or, with a
        generator and a policy that is not deterministic, a sampled one."""
        output = self(self.standardize(torch.from_numpy(obs).to(self.low.device)))
        if self.discrete and generator is None:
            return output.argmax(-1).cpu().numpy()[()]  # of one observation a number
        if self.discrete:
            probs = output.softmax(-1).cpu()
            return torch.multinomial(probs, 1, generator=generator)[..., 0].numpy()[()]
        if self.gaussian and generator is not None:
            noise = torch.randn(output.shape, generator=generator)
            output = output + self.log_std.exp() * noise.to(output.device)
        action = self.standardize_action.undo(output)
        return action.clamp(self.low, self.high).cpu().numpy()


# The algorithm, as functions


def split_episodes(episodes: int, val_fraction: float, rng: np.random.Generator) -> np.ndarray:
    """(E,) bool: which episodes are held out for validation; a tenth of nine is none."""
    count = int(val_fraction * episodes + 1e-9)  # 0.29 * 100 is a little less than 29
    return np.isin(np.arange(episodes), rng.permutation(episodes)[:count])


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(action; mean, exp(log_std)^2), summed over the last axis: (..., A) -> (...)."""
    z = (action - mean) * torch.exp(-log_std)
    constant = 0.5 * math.log(2 * math.pi) * action.shape[-1]
    return -0.5 * z.square().sum(-1) - log_std.sum(-1) - constant


def cloning_loss(policy: Policy, pairs: dict[str, Tensor]) -> Tensor:
    """Mean squared error per component of the standardized action; of a Gaussian policy, negative
    log-likelihood per action in nats; of a discrete one, cross-entropy in nats:
    pairs {"obs": (B, O), "action": (B, A)} -> ()."""
    output = policy(pairs["obs"])
    if policy.discrete:
        return F.cross_entropy(output, pairs["action"].argmax(-1))
    if policy.gaussian:
        return -gaussian_log_prob(pairs["action"], output, policy.log_std).mean()
    return F.mse_loss(output, pairs["action"])


@torch.no_grad()
def polyak_update(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow = (1 - rate) * slow + rate * fast, in place, for parameters
    (not for buffers, such as BatchNorm's statistics)."""
    for slow_parameter, parameter in zip(slow.parameters(), fast.parameters()):
        slow_parameter.lerp_(parameter, rate)


def fell_away(returns: np.ndarray, demos: dict) -> float:
    """Share of returns (E,) below the middle between random actions and the demonstrations."""
    return float((returns < 0.5 * (np.mean(demos["returns"]) + demos["random_return"])).mean())


# The steps of the loop


def make_pairs(policy: Policy, demos: dict, chosen: np.ndarray) -> dict[str, Tensor]:
    """The chosen (L,) of all pairs (L, O), (L, A), standardized once and for all."""
    obs = torch.from_numpy(demos["obs"][chosen]).to(policy.low.device)
    action = torch.from_numpy(demos["actions"][chosen]).to(policy.low.device)
    return {"obs": policy.standardize(obs), "action": policy.standardize_action(action)}


def gradient_step(policy: Policy, optimizer, pairs: dict, batch_size: int, generator) -> None:
    """One step on a minibatch of the training pairs."""
    indices = torch.randint(len(pairs["obs"]), (batch_size,), generator=generator)
    indices = indices.to(pairs["obs"].device)
    loss = cloning_loss(policy, {name: x[indices] for name, x in pairs.items()})
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def split_losses(policy: Policy, training: dict, validation: dict) -> dict[str, float]:
    """One loss, one set of weights, each over its whole split -> log."""
    log = {"bc/train_loss": cloning_loss(policy, training).item()}
    if len(validation["obs"]) > 0:
        log["bc/val_loss"] = cloning_loss(policy, validation).item()
    return log


# Training


def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; returns what summary.json holds."""
    args = copy.copy(args)  # the caller's stay as they are
    args.check()
    torch.set_num_threads(1)  # minibatches this small are slower on more
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.manual_seed(args.seed)  # nothing here draws from it, but layers that you add may
    generator = Generator().manual_seed(args.seed)
    demos = load_demos(args, required=["observations", "actions"])
    envs = make_envs(demos, 1, 1)
    match_demos(demos, envs)
    envs.close()
    demos["random_return"] = evaluate(None, demos, 20, args.seed, args.threads)[-1].mean().item()
    rng, lengths = np.random.default_rng(args.seed), demos["lengths"]
    held_out = split_episodes(len(lengths), args.val_fraction, rng)
    held_out_steps = np.repeat(held_out, lengths)  # (L,)
    train_demos = demos | {x: demos[x][~held_out_steps] for x in ("obs", "actions")}
    policy = Policy(train_demos, args.hidden_size, args.loss == "nll", generator).to(device)
    training = make_pairs(policy, demos, ~held_out_steps)
    validation = make_pairs(policy, demos, held_out_steps)
    slow = copy.deepcopy(policy)
    weights = [x for name, x in policy.named_parameters() if name != "log_std"]
    decayed = {"params": weights, "weight_decay": args.weight_decay}
    # a log std that decays is drawn to 0, a std of 1
    undecayed = {"params": [policy.log_std], "weight_decay": 0.0}
    optimizer = AdamW([decayed, undecayed], lr=args.learning_rate, fused=True)

    done, rows, seconds, wandb_id = 0, [], 0.0, None
    learners = {"policy": policy, "slow": slow, "optimizer": optimizer}
    if args.resume:
        saved = load_file(args.resume, "--resume", "bc checkpoint")
        free = ("resume", "gradient_steps", "compare_with", "threads", "cuda")
        free = {x: getattr(args, x) for x in free}
        require(saved["args"] | free == vars(args), "--resume takes all but --gradient-steps, "
                "--compare-with, --threads and --cuda from the checkpoint; drop the other flags.")
        for name, learner in learners.items():
            learner.load_state_dict(saved[name])
        generator.set_state(saved["generator"])
        rows, seconds, wandb_id = saved["rows"], saved["seconds"], saved["wandb_id"]
        done, summary = rows[-1]["global_step"], Path(args.resume).parent / "summary.json"
        finished = done == args.gradient_steps and summary.exists()
        require(done <= args.gradient_steps and not finished, "--resume: this run has come that "
                "far; give a greater --gradient-steps.")
    run_dir = open_run("bc", args, wandb_id)

    start, total = time.perf_counter() - seconds, args.gradient_steps
    bar = tqdm(range(done, total), initial=done, total=total, unit="step", disable=None)
    for step in bar:
        if args.anneal_lr:
            rate = args.learning_rate * (1 - step / total)
            optimizer.param_groups[0]["lr"] = rate  # of the weights; log_std keeps its own
        gradient_step(policy, optimizer, training, args.batch_size, generator)
        polyak_update(slow, policy, 1 - args.polyak)

        done = step + 1
        if done % args.eval_interval == 0 or done == total:
            log = {"global_step": done} | split_losses(policy, training, validation)
            seconds = time.perf_counter() - start
            bad = [name for name, x in log.items() if not math.isfinite(x)]
            require(not bad, f"training diverged at step {done}: {', '.join(bad)} not finite; "
                    "start again with a smaller learning rate.")
            seed = args.seed + 10_000
            returns = evaluate(policy, demos, 20, seed, args.threads)[-1]
            slow_returns = evaluate(slow, demos, 20, seed, args.threads)[-1]
            log |= metrics_of_both(returns, slow_returns, demos)
            bar.set_postfix_str(f"return {returns.mean():.0f}")
            log["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            log["charts/SPS"] = done / seconds
            rows.append(log)
            if args.track:
                wandb.log(log, step=done, commit=True)
            checkpoint = {name: learner.state_dict() for name, learner in learners.items()}
            checkpoint |= {  # tensors and plain containers: load_file reads nothing else
                "kind": "bc checkpoint",
                "args": vars(args),
                "generator": generator.get_state(),
                "rows": rows,
                "seconds": seconds,
                "wandb_id": wandb.run.id if args.track else None,
            }
            names = ("env_id", "max_episode_steps", "discrete", "random_return")
            task = {"kind": "bc policy"} | {name: demos[name] for name in names}
            task |= {"hidden_size": args.hidden_size, "gaussian": policy.gaussian}
            task["returns"] = demos["returns"].tolist()  # of the demonstrations, for the figure
            save_atomically(task | {"policy": policy.state_dict()}, run_dir / "policy.pt")
            save_atomically(task | {"policy": slow.state_dict()}, run_dir / "policy_slow.pt")
            write_csv(rows, run_dir / "metrics.csv")
            save_atomically(checkpoint, run_dir / "checkpoint.pt")
            start = time.perf_counter() - seconds  # evaluations are not counted
    counts = {"train_episodes": int((~held_out).sum()), "val_episodes": int(held_out.sum())}
    return report(policy, slow, demos, counts, rows, seconds, args, run_dir)


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


def match_demos(demos: dict, envs) -> None:
    """Hold demonstrations against the environment that they are of. Sets what networks want to know
    of actions: "discrete", "low" and "high" (A,), "actions" (L, A) within these bounds; one-hot
    vectors if they are discrete, and the bounds if nobody recorded any."""
    space = envs.single_action_space
    demos["discrete"] = isinstance(space, gym.spaces.Discrete)
    for name, x in (("observations", envs.single_observation_space), ("actions", space)):
        shape = demos.get(name, np.empty((0, *x.shape))).shape[1:]
        require(shape == x.shape, f"--demos: each row of its {name} has shape {shape}, the "
                f"environment's {x.shape}; give demonstrations of this environment.")
    constant = np.flatnonzero(Standardize(demos["obs"]).std.isinf())
    if len(constant):
        warnings.warn(f"observations {constant} never vary in the demonstrations: left out")
    if demos["discrete"]:
        one_hot = np.eye(int(space.n))
        demos |= {"low": np.zeros(len(one_hot)), "high": np.ones(len(one_hot))}
        actions = demos.get("actions", np.arange(len(one_hot)))
        require(actions.dtype.kind in "iu" and actions.min() >= 0 and actions.max() < len(one_hot),
                f"--demos: its actions go from {actions.min()} to {actions.max()} ({actions.dtype}"
                f"), expected whole numbers of {space}; give demonstrations of this environment.")
        demos["actions"] = one_hot[actions]
        return
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    unbounded = [np.minimum(-1.0, high - 1.0), np.maximum(1.0, low + 1.0)]
    bounds = np.where(np.isfinite([low, high]), [low, high], unbounded)
    actions = demos.get("actions", bounds)
    margin = 1e-3 * (bounds[1] - bounds[0])
    outside = np.mean((actions < low - margin) | (actions > high + margin))
    if outside > 0.01:
        warnings.warn(f"{outside:.0%} of the demonstrated actions, {actions.min():g} to "
                      f"{actions.max():g}, lie outside the bounds {low} to {high}, and are cut")
    demos |= {"low": space.low, "high": space.high, "actions": actions.clip(low, high)}


# --- Plumbing: evaluation, files, command line ---


def evaluate(policy: Policy | None, task: dict, episodes: int, seed: int, threads, sampled=False):
    """Cumulative true returns (T, E) after each step of fresh episodes, with the likeliest actions,
    sampled ones, or, without a policy, random ones; the last row is the episodes' returns."""
    envs = make_envs(task, episodes, threads)
    generator = Generator().manual_seed(seed) if sampled else None
    obs, _ = envs.reset(seed=seed)
    envs.action_space.seed(seed)
    running, rewards = np.ones(episodes, bool), []
    while running.any():
        check_finite(envs, obs, len(rewards))
        actions = policy.act(obs, generator) if policy else envs.action_space.sample()
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


def metrics_of_both(returns: np.ndarray, slow_returns: np.ndarray, demos: dict) -> dict:
    """What to log of an evaluation of the policy and of the slow one, (E,) each."""
    log = {}
    for prefix, x in (("eval/", returns), ("eval/slow_", slow_returns)):
        metrics = return_metrics(x, demos)
        if "eval/normalized_score" in metrics:
            metrics["eval/fell_away"] = fell_away(x, demos)
        log |= {name.replace("eval/", prefix): value for name, value in metrics.items()}
    return log


def final_evaluation(policy, task: dict, args: Args, path: Path, figure: Path) -> list[np.ndarray]:
    """Returns (E,) with the likeliest actions, and sampled (the same if the policy is
    deterministic); those after each step go into a .npz, and into a figure."""
    courses = {}
    if args.compare_with:
        name = "/".join(Path(args.compare_with).parts[-2:])  # <run>/evaluation.npz
        courses[name] = load_evaluation(args.compare_with)  # now: it may be what `path` replaces
    mean = evaluate(policy, task, args.eval_episodes, args.seed + 20_000, args.threads)
    sampled = mean
    if policy.gaussian or policy.discrete:
        sampled = evaluate(policy, task, args.eval_episodes, args.seed + 30_000, args.threads, True)
    np.savez(path, mean_action=mean, sampled=sampled)
    if not np.isfinite(mean).all():
        print(f"  {task['env_id']} gives no rewards, so the policy's return is unknown")
    else:
        print(f"  mean action {mean[-1].mean():9.1f} ± {mean[-1].std():.1f}")
        print(f"  sampled     {sampled[-1].mean():9.1f} ± {sampled[-1].std():.1f}")
        plot_cumulative_returns({"behaviour cloning": mean} | courses, task, figure)
    return [mean[-1], sampled[-1]]


def load_evaluation(path: str) -> np.ndarray:
    """Cumulative returns (T, E) with the mean action, from any script's evaluation.npz."""
    try:
        with np.load(path, allow_pickle=False) as file:
            course = file["mean_action"]
        if course.ndim != 2:
            raise ValueError(f"its mean_action has shape {course.shape}, expected (T, E)")
        return course
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        raise UserError(f"--compare-with {path}: {reason(error)}; give the evaluation.npz of a "
                        "run.") from None


def load_agent(path: str) -> tuple[Policy, dict]:
    """The policy of a policy.pt, and all that the file holds, such as env_id."""
    saved = load_file(path, "--evaluate", "bc policy")
    require("hidden_size" in saved, f"--evaluate {path}: another version of this script wrote it; "
            "give a file of this one.")
    weights = saved["policy"]
    demos = {"obs": weights["standardize.mean"], "actions": weights["standardize_action.mean"]}
    demos = {name: x.numpy()[None] for name, x in demos.items()}  # for the shapes
    demos |= {"low": weights["low"], "high": weights["high"], "discrete": saved["discrete"]}
    policy = Policy(demos, saved["hidden_size"], saved["gaussian"], Generator())
    policy.load_state_dict(weights)
    return policy, saved


def report(policy, slow, demos: dict, counts, rows: list[dict], seconds, args, run_dir) -> dict:
    """The final evaluation and the run's summary: a table, summary.json, curves.png."""
    paths = run_dir / "evaluation.npz", run_dir / "cumulative_return.png"
    returns, sampled = final_evaluation(policy, demos, args, *paths)
    slow_returns = evaluate(slow, demos, args.eval_episodes, args.seed + 20_000, args.threads)[-1]
    demos_mean = demos["returns"].mean().item()
    evaluated = [row for row in rows if "eval/return_mean" in row]
    summary = rows[-1] | metrics_of_both(returns, slow_returns, demos)  # with the last losses
    if evaluated and np.isfinite(sampled).all():
        best = max(evaluated, key=lambda row: row["eval/return_mean"])
        summary |= {"best/return_mean": best["eval/return_mean"], "best/step": best["global_step"]}
        if policy.gaussian or policy.discrete:
            summary["eval/return_sampled_mean"] = sampled.mean().item()
    if "eval/normalized_score" in summary:
        summary |= {"demos_return_mean": demos_mean, "random_return_mean": demos["random_return"]}
        if isinstance(demos.get("expert_return_mean"), (int, float)):
            summary["expert_return_mean"] = demos["expert_return_mean"]
    summary |= counts | {"seconds": seconds}
    print(*(f"  {name:24}{x:12,.6g}" for name, x in summary.items()), f"  {run_dir}", sep="\n")
    plot_curves(rows, demos_mean, run_dir / "curves.png")
    (run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(run_dir / "summary.tmp", run_dir / "summary.json")
    if args.track:  # last, since it waits for the network
        wandb.summary.update(summary)
        wandb.finish()
    return summary


def plot_curves(rows: list[dict], demos_mean: float, path: Path) -> None:
    """Return and loss over gradient steps."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, name, label in (
        (left, "eval/return_mean", "policy"),
        (left, "eval/slow_return_mean", "slow policy"),
        (right, "bc/train_loss", "training episodes"),
        (right, "bc/val_loss", "validation episodes"),
    ):
        logged = [row for row in rows if name in row]
        ax.plot([row["global_step"] for row in logged], [row[name] for row in logged], label=label)
    if math.isfinite(demos_mean):
        left.axhline(demos_mean, color="black", linestyle="--", label="demonstrations")
    left.set(title="Return", xlabel="gradient steps", ylabel="true return, mean action")
    right.set(title="Loss", xlabel="gradient steps", ylabel="loss of a whole split")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


def plot_cumulative_returns(courses: dict[str, np.ndarray], demos: dict, path: Path) -> None:
    """A panel for each policy's cumulative returns (T, E): a thin line an episode, their mean."""
    figure = Figure(figsize=(5.5 * len(courses), 4), layout="constrained")
    axes = figure.subplots(1, len(courses), squeeze=False, sharex=True, sharey=True)[0]
    for ax, (name, course) in zip(axes, courses.items()):
        returns, course = course[-1], np.vstack([0 * course[:1], course])  # from 0, before any step
        ax.plot(course, color="tab:blue", linewidth=0.5, alpha=0.4)
        ax.plot(course.mean(axis=1), color="red", linewidth=2, label="mean of all episodes")
        title = f"{name}\n{returns.mean():.0f} ± {returns.std():.0f}"
        if np.mean(demos["returns"]) > demos["random_return"]:
            title += f", {fell_away(returns, demos):.1%} fell away"
            halfway = 0.5 * (np.mean(demos["returns"]) + demos["random_return"])
            ax.axhline(halfway, color="grey", linestyle=":", label="ends below: fell away")
        ax.set(xlabel="step of the episode", ylabel="return so far")
        ax.set_title(title, fontsize="medium", parse_math=False)
        ax.legend(loc="best")
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
        saved = load_file(args.resume, "--resume", "bc checkpoint")["args"]
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
            policy, task = load_agent(args.evaluate)
            paths = [Path(args.evaluate).with_suffix(x) for x in (".npz", ".png")]
            final_evaluation(policy, task, args, *paths)  # the run's own files stay
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
