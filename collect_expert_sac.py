# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1"]
# ///
"""SAC, and demonstrations of its expert, complete in one file.

Soft Actor-Critic (Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905) maximizes return plus
temperature x entropy, off-policy, with twin critics, a replay buffer and automatic temperature:

    repeat:  step the environments -> store -> per update: critics, actor, temperature, target

Then the expert acts with five levels of noise, and each level is a demonstration set.

Where this departs from the usual implementation, and why (benchmark/results/sac_search.csv):

 1. Observations are standardized, with statistics of the random actions at the start. This is what
    held SAC back: after 16k updates 471 and 512 (two seeds) instead of 336 and 358.
 2. Far fewer updates than steps (1/8): simulation is nearly free here. And a learning rate of 1e-3,
    which is what an update gains by: 423 after 20k of them; with the usual 3e-4 for the actor (and
    LayerNorm in the critics) 254 after 20k, or 269 after 15k where there is one a step.
 3. gamma 0.97: a horizon of 33 steps, a stride or two, fits episodes of 100 steps better than 0.95
    (336 against 255 after 16k updates). Against 0.99 it is undecided (568 and 518; 536).
 4. Minibatches of 128, cheaper than 256, come to the same (539 and 546 after 300k steps).
 5. A time limit does not end the task: the value of the true final observation is bootstrapped.
 6. Rewards are taken as they come. Their scale matters here: some units a step (HalfCheetah's
    reach 7). A tenth of that had a return of 50 instead of 175 after 10k updates.

Shapes: T steps, N environments, B batch, O observation, A action; E episodes of a set.

    python collect_expert_sac.py train                   # expert and sets: 71 minutes on one core
    python collect_expert_sac.py train --resume runs/<run>/checkpoint.pt    # go on from there
    python collect_expert_sac.py collect --expert data/expert.pt --output-dir my_data

`data/demos.py` shows what is in a set.
"""

import copy
import hashlib
import io
import json
import math
import os
import re
import sys
import time
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
from mujoco.batch import Batch
from torch import Generator, Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

INPUT_CLIP = 100.0  # standardized inputs are clipped to [-INPUT_CLIP, INPUT_CLIP]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # of the policy's Gaussian
LOG_INTERVAL = 10_000  # env steps between rows of metrics.csv; evaluations and checkpoints add some
NOISE_LEVELS = {  # of the five sets, in multiples of the policy's own std
    "deterministic": 0.0,
    "stochastic-half": 0.5,
    "stochastic-one": 1.0,
    "stochastic-one_five": 1.5,
    "stochastic-two": 2.0,
}


@dataclass
class Args:
    """Train the expert, evaluate it and record the five demonstration sets."""

    seed: int = 1  # seed of networks, environments, minibatches
    env_id: str = "HalfCheetah-v4"  # environment: gymnasium's id, or module:id
    max_episode_steps: int = 100  # episodes are cut here, in training as in the sets
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: <script>__<env-id>__<seed>__<time>)
    resume: str = ""  # checkpoint.pt to go on from; with --total-timesteps, on a new schedule
    eval_interval: int = 50_000  # env steps between evaluations (20 episodes, mean action)
    checkpoint_interval: int = 200_000
    """env steps between checkpoints; they hold the replay buffer, HalfCheetah's 168 MB"""
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    cuda: bool = False  # networks on the GPU
    threads: int = 0  # threads of the physics; networks use up to two of them (0: one per core)

    total_timesteps: int = 5_000_000  # environment steps of the whole run
    num_envs: int = 32  # parallel environments (N)
    updates_per_step: float = 0.125  # gradient updates per environment step
    learning_starts: int = 20_000  # env steps with random actions before the first update
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    batch_size: int = 128  # transitions in a minibatch (B)
    hidden_size: int = 256  # width of the two hidden layers of actor and critics
    learning_rate: float = 1e-3  # Adam learning rate of actor, critics and temperature
    anneal_lr: bool = True  # let that learning rate fall linearly to zero over the run
    gamma: float = 0.97  # discount factor
    tau: float = 0.005  # how far the target critics move towards the critics at each update

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        at_most = {"seed": 2**31 - 1, "gamma": 1, "tau": 1}
        at_most["learning_starts"] = self.total_timesteps - 1
        at_least = {"learning_starts": 2 * self.num_envs, "buffer_size": self.num_envs}
        check_settings(self, "seed threads gamma tau", at_least, at_most)
        require(torch.cuda.is_available() or not self.cuda, "--cuda was given, but PyTorch sees no "
                "GPU; drop it (--resume: --no-cuda) or install a CUDA build of torch.")
        if self.threads == 0:
            has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
            self.threads = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()


@dataclass
class Collect:
    """Record the five demonstration sets from a saved expert."""

    expert: str = "data/expert.pt"  # policy.pt of an expert that `train` saved
    output_dir: str = "data"  # folder that receives the five .npz files
    episodes: int = 50  # episodes in each set
    seed: int = 1  # seed of the episodes; each set has noise of its own

    def check(self) -> None:
        check_settings(self, "seed", {}, {"seed": 2**31 - 1})


# Networks


def relu_mlp(sizes: list[int], generator: Generator) -> nn.Sequential:
    """Linear layers with ReLU between, drawn as nn.Linear does, but by the generator."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        for x in layers[-2].parameters():
            nn.init.uniform_(x, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return nn.Sequential(*layers[:-1])


class SquashedGaussianActor(nn.Module):
    """tanh of a Gaussian, stretched to the bounds low, high (A,). The state_dict has all that
    acting needs: the weights, the bounds, and the statistics that standardize observations."""

    def __init__(self, obs_dim: int, low, high, hidden_size: int, generator: Generator):
        super().__init__()
        self.net = relu_mlp([obs_dim, hidden_size, hidden_size, 2 * len(low)], generator)
        self.register_buffer("mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("std", torch.ones(obs_dim, dtype=torch.float64))
        self.register_buffer("low", torch.as_tensor(low))
        self.register_buffer("high", torch.as_tensor(high))

    def fit_statistics(self, obs: Tensor) -> None:
        """Of observations (L, O). What has not varied yet keeps scale 1, and is seen once it moves.
        """
        mean, std = obs.double().mean(0), obs.double().std(0)
        std[std <= 1e-7 * mean.abs()] = 1.0  # no more than rounding
        self.mean.copy_(mean)
        self.std.copy_(std)

    def standardize(self, obs: Tensor) -> Tensor:
        x = (obs.to(self.mean.dtype) - self.mean) / self.std
        return x.clamp(-INPUT_CLIP, INPUT_CLIP).float()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std before tanh, (..., A) each, from standardized x (..., O)."""
        mean, raw = self.net(x).chunk(2, dim=-1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1)

    def to_bounds(self, action: Tensor) -> Tensor:
        """From [-1, 1], as actor and critics know actions, to [low, high], as the world does."""
        action = self.low + 0.5 * (action + 1) * (self.high - self.low)
        return action.clamp(self.low, self.high)  # rounding may lead beyond

    @torch.inference_mode()
    def act(self, obs: np.ndarray, generator: Generator | None = None, noise_scale: float = 1.0):
        """The action (..., A) to execute after a raw observation (..., O): tanh of the Gaussian's
        mean, or, with a generator, one sampled with noise_scale times the policy's std."""
        obs = torch.from_numpy(obs).to(self.low.device)
        mean, log_std = self(self.standardize(obs))
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator).to(obs.device)
            mean = mean + noise_scale * log_std.exp() * noise
        return self.to_bounds(torch.tanh(mean)).cpu().numpy()


class TwinCritic(nn.Module):
    """Two independent Q-functions (2, B) of standardized observations (B, O) and actions (B, A) in
    [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int, generator: Generator):
        super().__init__()
        sizes = [obs_dim + action_dim, hidden_size, hidden_size, 1]
        self.nets = nn.ModuleList([relu_mlp(sizes, generator), relu_mlp(sizes, generator)])

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=-1)
        return torch.stack([net(x).squeeze(-1) for net in self.nets])


class SoftActorCritic(nn.Module):
    """All that is learned: actor, critics and their slow copy, and the temperature's log."""

    def __init__(self, obs_dim: int, low, high, hidden_size: int, generator: Generator):
        super().__init__()
        self.actor = SquashedGaussianActor(obs_dim, low, high, hidden_size, generator)
        self.critic = TwinCritic(obs_dim, len(low), hidden_size, generator)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))


# The algorithm, as functions


def tanh_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh(u), u = mean + std * noise, and log pi(a|s): (..., A) -> (..., A), (...). The
    density follows from the change of variables (appendix C), with log(1 - tanh(u)^2) in a form
    that does not overflow: 2 (log 2 - u - softplus(-2u))."""
    u = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return torch.tanh(u), (log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


# The steps of the loop


@torch.no_grad()
def step_environments(envs, actor, episodes: dict, uniform: bool, generator: Generator):
    """A step in each of N environments, with sampled or uniformly random actions -> transitions
    {name: (N, ...)}. `episodes` goes on from step to step: "obs" (N, O), the latest observations,
    "return" (N,) so far, "finished", the returns of the latest 100 episodes."""
    obs = episodes["obs"].to(actor.low.device)
    noise = torch.randn((envs.num_envs, len(actor.low)), generator=generator).to(obs.device)
    if uniform:
        action = 2 * torch.rand(noise.shape, generator=generator).to(obs.device) - 1
    else:
        action, _ = tanh_gaussian(*actor(actor.standardize(obs)), noise)
    executed = actor.to_bounds(action).cpu().numpy()
    require(np.isfinite(executed).all(), "training diverged: actions are not finite; start again "
            "with smaller learning rates (the last checkpoint is older).")
    new_obs, reward, terminated, truncated, info = envs.step(executed)
    ended, next_obs = terminated | truncated, new_obs.copy()
    for i in np.flatnonzero(ended):  # there new_obs is the next episode's first
        next_obs[i] = info["final_obs"][i]
    finite = all(np.isfinite(x).all() for x in (new_obs, next_obs, reward))
    require(finite, f"--env-id {envs.spec.id}: an observation or a reward is not a finite number; "
            "fix the environment.")
    episodes["obs"] = torch.from_numpy(new_obs)
    episodes["return"] += torch.from_numpy(reward)
    if ended.any():
        episodes["finished"] += episodes["return"][ended].tolist()
        del episodes["finished"][:-100]
        episodes["return"][ended] = 0.0
    outcome = {"reward": reward, "next_obs": next_obs, "terminated": terminated}
    outcome = {name: torch.from_numpy(x) for name, x in outcome.items()}
    return {"obs": obs, "action": action} | outcome


def store(buffer: dict, transitions: dict, before: int) -> None:
    """Put N transitions behind the `before` that came first, over the oldest if there is no room.
    The replay buffer is {name: (size, ...)}, in float32: observations as they come, actions in
    [-1, 1]."""
    indices = torch.arange(before, before + len(transitions["reward"])) % len(buffer["reward"])
    for name, x in buffer.items():
        x[indices] = transitions[name].float().to(x.device)


def sample(buffer: dict, stored: int, batch_size: int, generator: Generator) -> dict:
    """A minibatch {name: (B, ...)} of the buffer's first `stored` transitions."""
    indices = torch.randint(stored, (batch_size,), generator=generator)
    return {name: x[indices] for name, x in buffer.items()}


def update(sac: SoftActorCritic, optimizers: dict, batch: dict, args: Args, generator) -> dict:
    """One step of critics, actor, temperature and target on a minibatch {name: (B, ...)} -> what
    to log, as tensors, so that nothing waits for a GPU."""
    obs, next_obs = sac.actor.standardize(batch["obs"]), sac.actor.standardize(batch["next_obs"])
    noise = torch.randn((2, *batch["action"].shape), generator=generator).to(obs.device)
    alpha = sac.log_alpha.exp().detach()

    # critics: 1/2 (Q_i(s, a) - target)^2 (equation 5), where, with a' sampled (equations 2, 3),
    # target = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s'))
    with torch.no_grad():
        next_action, next_log_prob = tanh_gaussian(*sac.actor(next_obs), noise[0])
        next_value = sac.target_critic(next_obs, next_action).min(0).values - alpha * next_log_prob
        target = batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_value
    critic_loss = 0.5 * (sac.critic(obs, batch["action"]) - target).square().mean(1).sum()
    optimizers["critic"].zero_grad()
    critic_loss.backward()
    optimizers["critic"].step()

    # actor: alpha log pi(a|s) - min_i Q_i(s, a), a sampled (equation 9)
    action, log_prob = tanh_gaussian(*sac.actor(obs), noise[1])
    actor_loss = (alpha * log_prob - sac.critic(obs, action).min(0).values).mean()
    optimizers["actor"].zero_grad()
    actor_loss.backward(inputs=list(sac.actor.parameters()))  # of the critics dQ/da alone
    optimizers["actor"].step()

    # temperature: -alpha (log pi(a|s) + target entropy), the target -A (equation 18)
    log_prob, target_entropy = log_prob.detach().mean(), -action.shape[-1]
    alpha_loss = -sac.log_alpha.exp() * (log_prob + target_entropy)
    optimizers["alpha"].zero_grad()
    alpha_loss.backward()
    optimizers["alpha"].step()

    with torch.no_grad():  # Polyak averaging, one call for all parameters
        critic, target_critic = sac.critic.parameters(), sac.target_critic.parameters()
        torch._foreach_lerp_(list(target_critic), list(critic), args.tau)
    return {
        "sac/qf_loss": critic_loss.detach(),
        "sac/actor_loss": actor_loss.detach(),
        "sac/alpha": alpha,
        "sac/alpha_loss": alpha_loss.detach(),
        "sac/entropy": -log_prob,
    }


# Training


def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint, then record; returns what summary.json holds."""
    args = copy.copy(args)  # the caller's stay as they are
    args.check()
    torch.set_num_threads(min(args.threads, 2))
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.manual_seed(args.seed)  # nothing here draws from it, but layers that you add may
    generator = Generator().manual_seed(args.seed)
    task = {"env_id": args.env_id, "max_episode_steps": args.max_episode_steps}
    envs = make_envs(task, args.num_envs, args.threads)
    space = envs.single_action_space
    bounded = isinstance(space, gym.spaces.Box) and space.is_bounded()
    require(bounded, f"--env-id {args.env_id}: its actions are {space}, and SAC's are numbers with "
            "bounds; choose another environment.")
    obs_shape, action_shape = envs.single_observation_space.shape, space.shape
    sac = SoftActorCritic(*obs_shape, space.low, space.high, args.hidden_size, generator).to(device)
    optimizers = {
        "critic": Adam(sac.critic.parameters(), lr=args.learning_rate, fused=True),
        "actor": Adam(sac.actor.parameters(), lr=args.learning_rate, fused=True),
        "alpha": Adam([sac.log_alpha], lr=args.learning_rate, fused=True),
    }
    shapes = {"obs": obs_shape, "action": action_shape, "next_obs": obs_shape}
    shapes |= {"reward": (), "terminated": ()}
    buffer = {x: torch.zeros(args.buffer_size, *shapes[x], device=device) for x in shapes}

    rows, seconds, wandb_id, simulator, done = [], 0.0, None, None, 0
    if args.resume:
        saved = load_file(args.resume, "--resume", "collect_expert_sac checkpoint")
        free = {x: getattr(args, x) for x in ("resume", "total_timesteps", "threads", "cuda")}
        require(saved["args"] | free == vars(args), "--resume takes all but --total-timesteps, "
                "--threads and --cuda from the checkpoint; drop the other flags.")
        for name, learner in ({"sac": sac} | optimizers).items():
            learner.load_state_dict(saved[name])
        for name, x in saved["buffer"].items():
            buffer[name][: len(x)] = x
        generator.set_state(saved["generator"])
        rows, seconds, wandb_id = saved["rows"], saved["seconds"], saved["wandb_id"]
        simulator, done = saved["simulator"], rows[-1]["global_step"] // args.num_envs
    obs, _ = envs.reset(seed=args.seed + len(rows))
    episodes = {"obs": torch.from_numpy(obs), "finished": []}
    episodes["return"] = torch.zeros(args.num_envs, dtype=torch.float64)
    if simulator:  # BatchHalfCheetah's; others cannot be saved: new episodes
        envs.set_state(simulator)
        episodes = saved["episodes"]
    num_iterations = math.ceil(args.total_timesteps / args.num_envs)
    finished = done == num_iterations and (Path(args.resume).parent / "summary.json").exists()
    require(done <= num_iterations and not finished, "--resume: this run has come that far; "
            "give a greater --total-timesteps.")
    run_dir = open_run("collect_expert_sac", args, wandb_id)

    start, logs = time.perf_counter() - seconds, []
    options = {"unit": "step", "unit_scale": args.num_envs, "disable": None}
    bar = tqdm(range(done, num_iterations), initial=done, total=num_iterations, **options)
    for iteration in bar:
        before, step = iteration * args.num_envs, (iteration + 1) * args.num_envs
        if args.anneal_lr:
            for optimizer in optimizers.values():
                left = 1 - (iteration + 1) / num_iterations
                optimizer.param_groups[0]["lr"] = args.learning_rate * left
        uniform = before <= args.learning_starts
        transitions = step_environments(envs, sac.actor, episodes, uniform, generator)
        store(buffer, transitions, before)
        if uniform and step > args.learning_starts:  # the last of the random actions
            sac.actor.fit_statistics(buffer["obs"][:step])
        # --updates-per-step, exactly, over all steps after the random ones
        updates = int(step * args.updates_per_step) - int(before * args.updates_per_step)
        for _ in range(updates if step > args.learning_starts else 0):
            batch = sample(buffer, min(step, args.buffer_size), args.batch_size, generator)
            logs.append(update(sac, optimizers, batch, args, generator))

        last = iteration == num_iterations - 1
        evaluating = last or step % args.eval_interval < args.num_envs
        saving = last or step % args.checkpoint_interval < args.num_envs
        if not (evaluating or saving or step % LOG_INTERVAL < args.num_envs):
            continue
        row = {"charts/learning_rate": optimizers["actor"].param_groups[0]["lr"]}
        if episodes["finished"]:
            row["charts/episodic_return"] = float(np.mean(episodes["finished"]))
        if logs:
            row |= {name: torch.stack([x[name] for x in logs]).mean().item() for name in logs[0]}
        if evaluating:
            returns = returns_of(record_episodes(sac.actor, task, 0.0, 20, args.seed + 10_000))
            row |= {"eval/return_mean": returns.mean().item()}
            row |= {"eval/return_std": returns.std().item()}
            bar.set_postfix_str(f"return {returns.mean():.0f}")
        seconds, logs = time.perf_counter() - start, []
        row["charts/SPS"] = step / seconds
        bad = [name for name, x in row.items() if not math.isfinite(x)]
        finite = all(x.isfinite().all() for x in sac.parameters())
        require(finite and not bad, f"training diverged at step {step}: "
                f"{', '.join(bad) or 'weights'} not finite; start again with smaller learning "
                "rates (the last checkpoint is older).")
        rows.append({"global_step": step} | row)
        if args.track:
            wandb.log(rows[-1], step=step, commit=True)
        if saving:
            checkpoint = {name: x.state_dict() for name, x in ({"sac": sac} | optimizers).items()}
            checkpoint |= {  # tensors and plain containers: load_file reads nothing else
                "kind": "collect_expert_sac checkpoint",
                "args": vars(args),
                "buffer": {name: x[:step].clone() for name, x in buffer.items()},
                "generator": generator.get_state(),
                "simulator": envs.get_state() if isinstance(envs, BatchHalfCheetah) else None,
                "episodes": episodes,
                "rows": rows,
                "seconds": seconds,
                "wandb_id": wandb.run.id if args.track else None,
            }
            policy = {"kind": "collect_expert_sac policy", "actor": sac.actor.state_dict()}
            policy |= task | {"hidden_size": args.hidden_size}
            write_csv(rows, run_dir / "metrics.csv")
            save_atomically(policy, run_dir / "policy.pt")
            save_atomically(checkpoint, run_dir / "checkpoint.pt")
    envs.close()
    returns = record_sets(sac.actor, task, run_dir, 50, args.seed)
    return report(returns, rows, seconds, args, run_dir)


# --- Plumbing: demonstrations and environments ---


def record_episodes(actor, task: dict, noise_scale: float, episodes: int, seed: int) -> dict:
    """E fresh episodes with noise_scale times the actor's own std (0: the mean action), as
    arrays of a demonstration set (data/README.md); qpos and qvel of the fast HalfCheetah alone."""
    envs, generator = make_envs(task, episodes, 1), Generator().manual_seed(seed)
    obs, _ = envs.reset(seed=seed)
    running, lengths = np.ones(episodes, bool), np.zeros(episodes, np.int64)
    states, steps, has_physics = [{"observations": obs}], [], isinstance(envs, BatchHalfCheetah)
    if has_physics:
        states[0]["physics"] = envs.states()
    while running.any():
        action = actor.act(obs, generator, noise_scale)
        require(np.isfinite(action).all(), "the policy's actions are not finite: an observation "
                "is not, or its training has diverged; use an earlier one.")
        obs, reward, terminated, truncated, info = envs.step(action)
        steps.append({"actions": action, "rewards": reward})
        steps[-1] |= {"terminated": terminated, "truncated": truncated}
        states.append({"observations": obs.copy(), "physics": info.get("final_states")})
        for i in np.flatnonzero(terminated | truncated):
            states[-1]["observations"][i] = info["final_obs"][i]
        lengths += running
        running &= ~(terminated | truncated)
    envs.close()
    arrays = {"lengths": lengths}
    for table, counts in ((states, lengths + 1), (steps, lengths)):
        belongs = np.arange(len(table)) < counts[:, None]  # (E, T): not after the episode's end
        for name in table[0]:
            arrays[name] = np.stack([row[name] for row in table], axis=1)[belongs]
    if has_physics:
        arrays["qpos"], arrays["qvel"] = np.split(arrays.pop("physics"), [9], axis=1)
    last = np.cumsum(lengths) - 1
    arrays |= {name: arrays[name][last] for name in ("terminated", "truncated")}
    return arrays | {x: arrays[x].astype(np.float32) for x in ("observations", "rewards")}


def returns_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(E,) undiscounted return of each recorded episode."""
    first = np.cumsum(arrays["lengths"]) - arrays["lengths"]
    return np.add.reduceat(arrays["rewards"].astype(np.float64), first)


def record_sets(actor, task: dict, folder: Path, episodes: int, seed: int) -> dict:
    """Write the five demonstration sets -> the episodes' returns {level: (E,)}, and those of 100
    episodes with the mean action as "expert"."""
    returns, sets = {"expert": returns_of(record_episodes(actor, task, 0.0, 100, seed + 1000))}, {}
    weights = [x.cpu().numpy() for x in (*actor.net.state_dict().values(), actor.mean, actor.std)]
    sha256 = hashlib.sha256(b"".join(x.tobytes() for x in weights)).hexdigest()
    versions = {module.__name__: module.__version__ for module in (np, torch, gym, mujoco)}
    for i, (level, noise_scale) in enumerate(NOISE_LEVELS.items()):
        # no training starts here; gymnasium's environment j gets set_seed + j: sets share starts
        set_seed = 50_000 + 1_000 * (seed - 1) + 1 + i
        sets[level] = record_episodes(actor, task, noise_scale, episodes, set_seed)
        returns[level] = returns_of(sets[level])
        metadata = {name: task[name] for name in ("env_id", "max_episode_steps")}
        metadata |= {"noise_scale": noise_scale, "seed": set_seed, "expert_sha256": sha256}
        for name, x in (("expert_return", returns["expert"]), ("return", returns[level])):
            metadata |= {f"{name}_mean": x.mean(), f"{name}_std": x.std()}
        sets[level]["metadata"] = json.dumps(metadata | {"versions": versions})
    folder.mkdir(parents=True, exist_ok=True)
    for level, arrays in sets.items():  # once all are there: who interrupts keeps the old ones
        path = folder / f"{re.sub('[:/]', '-', task['env_id'].lower())}_sac_{level}.npz"
        np.savez_compressed(path.with_suffix(".tmp.npz"), **arrays)
        os.replace(path.with_suffix(".tmp.npz"), path)
    for name, x in returns.items():
        print(f"  {name:20}{x.mean():9.1f} ± {x.std():.1f}  ({len(x)} episodes)")
    return returns


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


# --- Plumbing: files, command line ---


def load_agent(path: str) -> tuple[SquashedGaussianActor, dict]:
    """The actor of a policy.pt, and all that the file holds, such as env_id."""
    saved = load_file(path, "--expert", "collect_expert_sac policy")
    weights, size = saved["actor"], saved["hidden_size"]
    bounds = weights["low"], weights["high"]
    actor = SquashedGaussianActor(len(weights["mean"]), *bounds, size, Generator())
    actor.load_state_dict(weights, assign=True)  # older files have statistics in float32
    return actor, saved


def report(returns: dict, rows: list[dict], seconds: float, args: Args, run_dir: Path) -> dict:
    """The run's summary: a table and summary.json."""
    expert, steps = returns["expert"], rows[-1]["global_step"]
    summary = {"eval/return_mean": expert.mean(), "eval/return_std": expert.std()}
    summary |= {f"sets/{level}": returns[level].mean() for level in NOISE_LEVELS}
    evaluated = [row for row in rows if "eval/return_mean" in row]
    if evaluated:
        best = max(evaluated, key=lambda row: row["eval/return_mean"])
        summary |= {"best/return_mean": best["eval/return_mean"], "best/step": best["global_step"]}
    summary |= {"env_steps": steps, "seconds": seconds, "charts/SPS": steps / seconds}
    print(*(f"  {name:24}{x:12,.6g}" for name, x in summary.items()), f"  {run_dir}", sep="\n")
    (run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(run_dir / "summary.tmp", run_dir / "summary.json")
    if args.track:  # last, since it waits for the network
        wandb.summary.update(summary)
        wandb.finish()
    return summary


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


def parse_args(argv: list[str]) -> Args | Collect:
    """Settings of a command, or of a resumed run. W&B's sweep agents write --flag=True, =False."""
    argv = [re.sub("^--(.*)=True$", r"--\1", re.sub("^--(.*)=False$", r"--no-\1", x)) for x in argv]
    commands = {"train": Args, "collect": Collect}
    args = tyro.extras.subcommand_cli_from_dict(commands, args=argv)
    if isinstance(args, Args) and args.resume:
        saved = load_file(args.resume, "--resume", "collect_expert_sac checkpoint")["args"]
        require(saved.keys() == vars(args).keys(), f"--resume {args.resume}: another version of "
                "this script wrote it; start a new run.")
        args = tyro.cli(Args, args=argv[1:], default=Args(**saved))
    args.check()
    return args


def main(argv: list[str]) -> None:
    """Command line in, exit code out."""
    try:
        args = parse_args(argv)
        if isinstance(args, Collect):
            record_sets(*load_agent(args.expert), Path(args.output_dir), args.episodes, args.seed)
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
