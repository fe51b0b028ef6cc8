# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#                 "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""GAIL + PPO: imitate an expert from (state, action) pairs, complete in one file.

Generative Adversarial Imitation Learning (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476):
a discriminator D learns to tell demonstrated steps from the policy's own; PPO (Schulman et al.
2017, https://arxiv.org/abs/1707.06347) trains the policy to be taken for the expert.

    repeat:  collect a rollout -> update D -> reward = how sure D is of the expert -> update policy

Where this departs from the papers, and why:

 1. D is the probability of *expert* (in the paper: of policy): the higher, the better.
 2. The reward is the paper's, which is -log(1 - D) with this D, but computed from D's logit, so
    that it stays finite when D saturates.
 3. PPO instead of TRPO: simpler, and faster per step. `toy_pointnav.py` has TRPO.
 4. D has a gradient penalty, on its logit (Gulrajani et al. 2017, there for a Wasserstein critic),
    which keeps it smooth enough to climb.
 5. Rewards are normalized by a running mean and std: PPO sees one scale while D drifts.
 6. Policy, value and D work on observations and actions standardized with the demonstrations'
    statistics, which never change. So it does not matter what units an environment has.
 7. D sees the action as executed (clipped), not as sampled, which may lie beyond the bounds.
 8. A time limit (the demonstrations' own: 100 steps) does not end the task: the value of the true
    final observation is bootstrapped.
 9. Where the task ends, by a fall or at a goal, an absorbing state follows (Kostrikov et al. 2019,
    https://arxiv.org/abs/1809.02925). Its reward is not learned by D, as there, but comes from
    counting the time that expert and policy spend there (terminal_logits).
10. The policy's std depends on the state, as the expert's does; otherwise D can tell
    the two apart by their noise.
11. Policy and D chase each other. What is evaluated and saved is a running average of the policy's
    weights, mostly of the last twentieth of the rollouts so far, which swings less than either
    (Yazici et al. 2019, https://arxiv.org/abs/1806.04498).

Shapes: T steps, N environments, B batch, O observation, A action; L steps in E demonstrations.

    python gail_ppo.py                                      # the default set: 45 seconds
    python gail_ppo.py --num-demos 1                        # from one episode of 100 steps
    python gail_ppo.py --reward-source combined             # env reward + GAIL reward
    python gail_ppo.py --evaluate runs/<run>/policy.pt      # 100 episodes, mean and sampled actions
    python gail_ppo.py --resume runs/<run>/checkpoint.pt    # go on from the last checkpoint
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
from collections import deque
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

MAX_LOG_RATIO = 1.0  # where PPO's log ratio is cut, or one bad action could outweigh a minibatch
REWARD_WINDOW = 10  # rollouts that rewards are normalized over
INPUT_CLIP = 10.0  # standardized inputs are clipped to [-INPUT_CLIP, INPUT_CLIP]
INITIAL_LOG_STD, LOG_STD_MIN, LOG_STD_MAX = -0.5, -5.0, 2.0  # of the policy's Gaussian


@dataclass
class Args:
    seed: int = 1  # seed of networks, environments, minibatches, choice of demonstrations
    env_id: str = "HalfCheetah-v4"  # the demonstrations' environment: gymnasium's id, or module:id
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"  # demonstration set (data/README.md)
    num_demos: int = 0  # use this many demonstrated episodes, drawn by the seed (0: all)
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: gail_ppo__<env-id>__<seed>__<time>)
    resume: str = ""  # checkpoint.pt to go on from; with --total-timesteps, on a new schedule
    evaluate: str = ""  # policy.pt to evaluate, in its own task, instead of training
    eval_interval: int = 50_000  # env steps between evaluations (20 episodes, mean action)
    eval_episodes: int = 100  # episodes of the final evaluation, for mean and for sampled actions
    checkpoint_interval: int = 100_000  # env steps between checkpoints
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "gail"  # Weights & Biases project
    cuda: bool = False  # networks on the GPU; for networks this small the CPU is faster
    threads: int = 0  # threads of the physics; networks use up to two of them (0: one per core)

    total_timesteps: int = 500_000  # environment steps of the whole run, in whole rollouts
    num_envs: int = 32  # parallel environments (N)
    num_steps: int = 100  # steps per environment and rollout (T)
    learning_rate: float = 3e-3  # Adam learning rate of policy and value
    anneal_lr: bool = True  # let that learning rate fall to zero, most of it late in the run
    gamma: float = 0.0  # discount factor (0: 1 - 10 / L, 0.9 to 0.99; L: demos' mean length)
    gae_lambda: float = 0.8  # lambda of generalized advantage estimation
    num_minibatches: int = 5  # minibatches per epoch of the PPO update
    update_epochs: int = 8  # epochs of the PPO update over each rollout
    clip_coef: float = 0.2  # clipping of the probability ratio
    ent_coef: float = 0.0  # weight of the policy's entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient norm at which PPO's gradients are cut
    average_share: float = 0.05  # share of rollouts that the judged policy averages (0: the last)
    hidden_size: int = 128  # width of the two hidden layers of policy and value

    reward_source: Literal["gail", "env", "combined"] = "gail"
    """what to maximize; env wants --gamma 0.99 --gae-lambda 0.95"""
    normalize_reward: bool = True  # subtract the running mean, divide by the running std

    disc_learning_rate: float = 3e-3  # Adam learning rate of D
    disc_steps: int = 20  # minibatch steps of D per rollout
    disc_batch_size: int = 512  # expert transitions, and as many of the policy's, in a minibatch
    disc_hidden_size: int = 128  # width of D's two hidden layers
    grad_penalty_coef: float = 0.3  # weight of D's gradient penalty
    bc_warm_start: bool = False  # start from a behaviour-cloned policy instead of a random one
    burn_in_steps: int = 0  # more steps of D on the first rollout; useful with --bc-warm-start

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        rollout = self.num_envs * self.num_steps
        at_most = {"seed": 2**31 - 1, "gamma": 0.9999, "gae_lambda": 1}  # 1 - gamma divides
        at_most |= {"num_minibatches": rollout // 2, "average_share": 1}
        may_be_zero = "seed num_demos threads gamma gae_lambda ent_coef vf_coef grad_penalty_coef"
        may_be_zero += " average_share burn_in_steps"  # all other numbers are more than 0
        check_settings(self, may_be_zero, {"total_timesteps": rollout}, at_most)
        require(torch.cuda.is_available() or not self.cuda, "--cuda was given, but PyTorch sees no "
                "GPU; drop it (--resume: --no-cuda) or install a CUDA build of torch.")
        if self.threads == 0:
            has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
            self.threads = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()


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


class Agent(nn.Module):
    """Policy and value of standardized observations. The policy is a Gaussian of the standardized
    action (A,), or, where actions are discrete, a categorical one of one-hot vectors (A,). The
    state_dict has all that acting needs: weights, statistics of demos["obs"] (L, O) and ["actions"]
    (L, A), and the bounds demos["low"] and ["high"] (A,) of actions, as precise as the world's."""

    def __init__(self, demos: dict, hidden_size: int, generator: Generator):
        super().__init__()
        obs_dim, action_dim = demos["obs"].shape[1], demos["actions"].shape[1]
        self.discrete = demos["discrete"]
        outputs = action_dim if self.discrete else 2 * action_dim
        self.standardize = Standardize(demos["obs"])
        actions = np.eye(action_dim) if self.discrete else demos["actions"]  # all, even unseen ones
        self.standardize_action = Standardize(actions, whole=True)  # no action may be clipped
        self.actor = mlp([obs_dim, hidden_size, hidden_size, outputs], 0.01, generator)
        self.critic = mlp([obs_dim, hidden_size, hidden_size, 1], 1.0, generator)
        self.actor[-1].bias.data[action_dim:] = INITIAL_LOG_STD
        self.register_buffer("low", torch.as_tensor(demos["low"]))
        self.register_buffer("high", torch.as_tensor(demos["high"]))

    def value(self, x: Tensor) -> Tensor:
        return self.critic(x).squeeze(-1)

    def gaussian(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std of the action, (..., A) each, from the actor's output."""
        mean, log_std = output.chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def sample(self, output: Tensor, generator: Generator | None) -> Tensor:
        """An action (..., A) from the actor's output; without a generator the likeliest one."""
        if self.discrete:
            if generator is not None:  # with Gumbel noise the greatest is a draw from the softmax
                noise = torch.rand(output.shape, generator=generator).to(output.device)
                output = output - torch.log(-torch.log(noise))
            return F.one_hot(output.argmax(-1), output.shape[-1]).float()
        mean, log_std = self.gaussian(output)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        return mean + log_std.exp() * noise

    def log_prob_and_entropy(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        if self.discrete:
            log_probs = output.log_softmax(-1)
            return (action * log_probs).sum(-1), -(log_probs.exp() * log_probs).sum(-1)
        mean, log_std = self.gaussian(output)
        return gaussian_log_prob(action, mean, log_std), gaussian_entropy(log_std)

    def execute(self, action: Tensor) -> Tensor:
        """What the world gets of an action (..., A): in its units, within its bounds."""
        if self.discrete:
            return action
        return self.standardize_action.undo(action).clamp(self.low, self.high)

    def for_envs(self, executed: Tensor) -> np.ndarray:
        """A copy, since an environment may change what it is given; [()] makes a discrete action of
        one observation a number."""
        return (executed.argmax(-1) if self.discrete else executed).cpu().numpy().copy()[()]

    @torch.inference_mode()
    def act(self, obs: np.ndarray, generator: Generator | None = None) -> np.ndarray:
        """What to do after raw observations (..., O): the likeliest action, or, with a generator,
        a sampled one."""
        output = self.actor(self.standardize(torch.from_numpy(obs).to(self.low.device)))
        return self.for_envs(self.execute(self.sample(output, generator)))


class Discriminator(nn.Module):
    """Logit (...) of "this is the expert's" from standardized (s, a) pairs (..., O + A)."""

    def __init__(self, input_dim: int, hidden_size: int, generator: Generator):
        super().__init__()
        self.net = mlp([input_dim, hidden_size, hidden_size, 1], 1.0, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


# The algorithm, as functions


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


def imitation_reward(logit: Tensor) -> Tensor:
    """GAIL's reward -log(1 - D), of any shape. AIRL's would be the logit itself, which is
    log D - log(1 - D) (Fu et al. 2018, https://arxiv.org/abs/1710.11248)."""
    return F.softplus(logit)


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
def polyak_update(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow = (1 - rate) * slow + rate * fast, in place, for parameters
    (not for buffers, such as BatchNorm's statistics)."""
    for slow_parameter, parameter in zip(slow.parameters(), fast.parameters()):
        slow_parameter.lerp_(parameter, rate)


# The steps of the loop


@torch.no_grad()
def collect(envs, agent: Agent, episodes: dict, num_steps: int, generator: Generator):
    """Sample T steps in each of N environments -> rollout {name: (T, N, ...)}, observations and
    actions standardized; log. `episodes` goes on from one rollout to the next: "obs" (N, O), the
    latest observations, as they come, "return" (N,) and "length" (N,) so far, "limit", the most
    steps that an episode may have."""
    device, threads = agent.low.device, torch.get_num_threads()
    torch.set_num_threads(1)  # a second one, waiting for work, would keep a core from the physics
    steps, finished = [], []
    for _ in range(num_steps):
        check_finite(envs, episodes["obs"].numpy(), 0)  # first ones; the rest is checked below
        x = agent.standardize(episodes["obs"].to(device))
        output = agent.actor(x)
        action = agent.sample(output, generator)
        executed = agent.execute(action)
        new_obs, reward, terminated, truncated, info = envs.step(agent.for_envs(executed))
        ended, next_obs = terminated | truncated, new_obs.copy()
        for i in np.flatnonzero(ended):  # there new_obs is the next episode's first
            next_obs[i] = info["final_obs"][i]
        episodes["obs"] = torch.from_numpy(new_obs)
        episodes["return"] += torch.from_numpy(reward)
        episodes["length"] += 1
        check_finite(envs, next_obs, episodes["length"])
        steps.append({
            "obs": x,
            "next_obs": torch.from_numpy(next_obs),
            "output": output,
            "action": action,  # as sampled: PPO's ratio is about this one
            "executed": executed,  # as clipped: the world, and D, see this one
            "env_reward": torch.from_numpy(reward).float(),
            "terminated": torch.from_numpy(terminated),
            "ended": torch.from_numpy(ended),  # terminated or truncated
            "steps_left": episodes["limit"] - episodes["length"],
        })
        if ended.any():
            finished += episodes["return"][ended].tolist()
            episodes["return"][ended] = 0.0
            episodes["length"][ended] = 0
    torch.set_num_threads(threads)
    rollout = {name: torch.stack([step[name] for step in steps]).to(device) for name in steps[0]}
    rollout["next_obs"] = agent.standardize(rollout["next_obs"])
    rollout["executed"] = agent.standardize_action(rollout["executed"])
    rollout["log_prob"], _ = agent.log_prob_and_entropy(rollout["output"], rollout["action"])
    log = {"charts/episodic_return": np.mean(finished).item()} if finished else {}
    return rollout, log


def disc_inputs(obs: Tensor, executed: Tensor) -> Tensor:
    """What D sees of steps: standardized observations (..., O) and actions as executed (..., A)."""
    return torch.cat([obs, executed], dim=-1)


def update_discriminator(disc, optimizer, expert, rollout, num_steps, args: Args, generator):
    """Steps of D on the expert's pairs (L, O + A) and the rollout's -> log of the last."""
    policy = disc_inputs(rollout["obs"], rollout["executed"]).flatten(0, 1)
    size = args.disc_batch_size
    for _ in range(num_steps):
        expert_x = expert[torch.randint(len(expert), (size,), generator=generator)]
        policy_x = policy[torch.randint(len(policy), (size,), generator=generator)]
        mix = torch.rand((size, 1), generator=generator).to(expert.device)
        expert_logit, policy_logit = disc(torch.cat([expert_x, policy_x])).split(size)
        loss = discriminator_loss(expert_logit, policy_logit)
        penalty = gradient_penalty(disc, expert_x, policy_x, mix)
        optimizer.zero_grad()
        (loss + args.grad_penalty_coef * penalty).backward()
        optimizer.step()
    return {
        "disc/loss": loss.item(),
        "disc/expert_prob": torch.sigmoid(expert_logit).mean().item(),
        "disc/policy_prob": torch.sigmoid(policy_logit).mean().item(),
        "disc/expert_acc": (expert_logit > 0).float().mean().item(),
        "disc/policy_acc": (policy_logit < 0).float().mean().item(),
        "disc/grad_penalty": penalty.item(),
    }


@torch.no_grad()
def compute_rewards(rollout, disc, recent_rewards: dict[str, deque], visits: dict, args: Args):
    """What PPO maximizes: {"steps": the rewards (T, N), "absorbing": that of each step after an
    end}, log. `visits` is what terminal_logits takes; the rollout's counts are added to the
    policy's."""
    env, log = rollout["env_reward"], {}
    rewards = {"env": (env, torch.zeros(()))}  # of each step (T, N), of each step after an end
    if args.reward_source != "gail":
        require(env.isfinite().all(), f"--reward-source {args.reward_source} needs the "
                "environment's rewards, and they are not all numbers; use gail.")
    if args.reward_source != "env":
        logit = disc(disc_inputs(rollout["obs"], rollout["executed"]))
        counts = torch.tensor([logit.numel(), rollout["steps_left"][rollout["terminated"]].sum()])
        visits["policy"] += counts  # of the whole run: with fewer, the reward of an end jumps
        offset, absorbing_logit = terminal_logits(**visits)
        rewards["gail"] = imitation_reward(logit + offset), imitation_reward(absorbing_logit)
        log["reward/absorbing"] = rewards["gail"][1].item()
    total, total_absorbing = torch.zeros_like(env), torch.zeros(())
    for name, (steps, absorbing) in rewards.items():
        log[f"reward/{name}_mean"] = steps.mean().item()
        log[f"reward/{name}_std"] = steps.std().item()
        if args.reward_source in (name, "combined"):
            if args.normalize_reward:
                recent_rewards[name].append(steps.cpu())
                steps = normalize(steps, recent_rewards[name])
                absorbing = normalize(absorbing, recent_rewards[name])
            total += steps
            total_absorbing += absorbing
    return {"steps": total, "absorbing": total_absorbing.item()}, log


def update_policy(agent: Agent, optimizer, rollout, rewards: dict, args: Args, generator):
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
            # the dual clip of Ye et al. 2020, https://arxiv.org/abs/1912.09729, c = e
            bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
            policy_loss = ppo_policy_loss(bounded, advantage, args.clip_coef)
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


def clone_behaviour(agent: Agent, obs: Tensor, actions: Tensor, generator: Generator) -> None:
    """Warm start: fit the policy to standardized demonstrations (L, O), (L, A): its mean by squared
    error, or, if actions are discrete, its logits by cross-entropy."""
    optimizer = Adam(agent.actor.parameters(), lr=1e-3, fused=True)
    for _ in range(2000):
        indices = torch.randint(len(obs), (256,), generator=generator).to(obs.device)
        output = agent.actor(obs[indices])
        if agent.discrete:
            loss = F.cross_entropy(output, actions[indices].argmax(-1))
        else:
            loss = F.mse_loss(agent.gaussian(output)[0], actions[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# Training


def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; returns what summary.json holds."""
    args = copy.copy(args)  # the caller's stay as they are
    args.check()
    torch.set_num_threads(1)  # until the loop, so that a run begins the same on any machine
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.manual_seed(args.seed)  # nothing here draws from it, but layers that you add may
    generator = Generator().manual_seed(args.seed)
    demos = load_demos(args, required=["observations", "actions"])
    if args.gamma == 0:  # 1 / (1 - gamma) steps: a tenth of an episode
        args.gamma = float(np.clip(1 - 10 / demos["lengths"].mean(), 0.9, 0.99))
    envs = make_envs(demos, args.num_envs, args.threads)
    match_demos(demos, envs)
    demos["random_return"] = evaluate(None, demos, 20, args.seed, args.threads)[-1].mean().item()
    agent = Agent(demos, args.hidden_size, generator).to(device)
    demo_obs = agent.standardize(torch.from_numpy(demos["obs"]).to(device))
    demo_actions = agent.standardize_action(torch.from_numpy(demos["actions"]).to(device))
    expert = disc_inputs(demo_obs, demo_actions)
    disc = Discriminator(expert.shape[1], args.disc_hidden_size, generator).to(device)
    optimizer = Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    disc_optimizer = Adam(disc.parameters(), lr=args.disc_learning_rate, fused=True)
    recent_rewards = {name: deque(maxlen=REWARD_WINDOW) for name in ("env", "gail")}
    steps_left = (demos["max_episode_steps"] - demos["lengths"])[demos["terminated"]].sum()
    visits = {"expert": torch.tensor([len(expert), steps_left]), "policy": torch.zeros(2)}
    if args.bc_warm_start and not args.resume:
        clone_behaviour(agent, demo_obs, demo_actions, generator)

    saved = {"rows": [], "seconds": 0.0, "wandb_id": None, "simulator": None}
    slow = copy.deepcopy(agent)  # its running average: what is evaluated and saved
    learners = {"agent": agent, "slow": slow, "disc": disc}
    learners |= {"optimizer": optimizer, "disc_optimizer": disc_optimizer}
    if args.resume:
        saved = load_file(args.resume, "--resume", "gail_ppo checkpoint")
        free = {x: getattr(args, x) for x in ("resume", "total_timesteps", "threads", "cuda")}
        require(saved["args"] | free == vars(args), "--resume takes all but --total-timesteps, "
                "--threads and --cuda from the checkpoint; drop the other flags.")
        for name, learner in learners.items():
            learner.load_state_dict(saved[name])
        for name, rewards in saved["recent"].items():
            recent_rewards[name].extend(rewards)
        visits = saved["visits"]
        generator.set_state(saved["generator"])
    rows, seconds, wandb_id = saved["rows"], saved["seconds"], saved["wandb_id"]
    obs, _ = envs.reset(seed=args.seed + len(rows))
    episodes = {"obs": torch.from_numpy(obs), "limit": demos["max_episode_steps"]}
    episodes["return"] = torch.zeros(args.num_envs, dtype=torch.float64)
    episodes["length"] = torch.zeros(args.num_envs, dtype=torch.int64)
    if saved["simulator"]:  # BatchHalfCheetah's; others cannot be saved: new episodes
        envs.set_state(saved["simulator"])
        episodes = saved["episodes"]
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    summary = Path(args.resume).parent / "summary.json"
    finished = len(rows) == num_iterations and summary.exists()
    require(len(rows) <= num_iterations and not finished, "--resume: this run has come that far; "
            "give a greater --total-timesteps.")
    run_dir = open_run("gail_ppo", args, wandb_id)

    torch.set_num_threads(min(args.threads, 2))  # faster than one
    start = time.perf_counter() - seconds
    todo = range(len(rows), num_iterations)
    bar = tqdm(todo, initial=len(rows), total=num_iterations, unit="rollout", disable=None)
    for iteration in bar:
        if args.anneal_lr:
            rest = 1 - (iteration / num_iterations) ** 3
            optimizer.param_groups[0]["lr"] = args.learning_rate * rest
        rollout, log = collect(envs, agent, episodes, args.num_steps, generator)
        if args.reward_source != "env":
            steps = args.disc_steps + args.burn_in_steps * (iteration == 0)
            log |= update_discriminator(
                disc, disc_optimizer, expert, rollout, steps, args, generator
            )
        rewards, reward_log = compute_rewards(rollout, disc, recent_rewards, visits, args)
        log |= reward_log | update_policy(agent, optimizer, rollout, rewards, args, generator)
        polyak_update(slow, agent, 1 / (1 + args.average_share * iteration))

        step, last = (iteration + 1) * batch_size, iteration == num_iterations - 1
        bad = [x for x in log if x.startswith(("losses/", "disc/")) and not math.isfinite(log[x])]
        finite = all(x.isfinite().all() for x in agent.parameters())
        require(finite and not bad, f"training diverged at step {step}: "
                f"{', '.join(bad) or 'weights'} not finite; start again with smaller learning "
                "rates (the last checkpoint is older).")
        if last or step % args.eval_interval < batch_size:  # passed a multiple
            returns = evaluate(slow, demos, 20, args.seed + 10_000, args.threads)[-1]
            log |= return_metrics(returns, demos)
            bar.set_postfix_str(f"return {returns.mean():.0f}")
        seconds = time.perf_counter() - start
        log["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        log["charts/SPS"] = step / seconds
        numbers = {name: x for name, x in log.items() if math.isfinite(x)}  # returns may be unknown
        rows.append({"global_step": step} | numbers)
        if args.track:
            wandb.log(rows[-1], step=step, commit=True)
        if last or step % args.checkpoint_interval < batch_size:
            checkpoint = {name: learner.state_dict() for name, learner in learners.items()}
            checkpoint |= {  # tensors and plain containers: load_file reads nothing else
                "kind": "gail_ppo checkpoint",
                "args": vars(args),
                "recent": {name: list(rewards) for name, rewards in recent_rewards.items()},
                "visits": visits,
                "generator": generator.get_state(),
                "simulator": envs.get_state() if isinstance(envs, BatchHalfCheetah) else None,
                "episodes": episodes,
                "rows": rows,
                "seconds": seconds,
                "wandb_id": wandb.run.id if args.track else None,
            }
            policy = {"kind": "gail_ppo policy", "agent": slow.state_dict()}
            policy |= {name: demos[name] for name in ("env_id", "max_episode_steps", "discrete")}
            write_csv(rows, run_dir / "metrics.csv")
            save_atomically(policy | {"hidden_size": args.hidden_size}, run_dir / "policy.pt")
            save_atomically(checkpoint, run_dir / "checkpoint.pt")
    envs.close()
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


def evaluate(agent: Agent | None, task: dict, episodes: int, seed: int, threads, sampled=False):
    """Cumulative true returns (T, E) after each step of fresh episodes, with the likeliest actions,
    sampled ones, or, without an agent, random ones; the last row is the episodes' returns."""
    envs = make_envs(task, episodes, threads)
    generator = Generator().manual_seed(seed) if sampled else None
    obs, _ = envs.reset(seed=seed)
    envs.action_space.seed(seed)
    running, rewards = np.ones(episodes, bool), []
    while running.any():
        check_finite(envs, obs, len(rewards))
        actions = agent.act(obs, generator) if agent else envs.action_space.sample()
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


def final_evaluation(agent: Agent, task: dict, args: Args, path: Path) -> list[np.ndarray]:
    """Returns (E,) with the likeliest actions, and sampled; evaluate()'s go into a .npz."""
    mean = evaluate(agent, task, args.eval_episodes, args.seed + 20_000, args.threads)
    sampled = evaluate(agent, task, args.eval_episodes, args.seed + 30_000, args.threads, True)
    np.savez(path, mean_action=mean, sampled=sampled)
    if not np.isfinite(mean).all():
        print(f"  {task['env_id']} gives no rewards, so the policy's return is unknown")
    else:
        print(f"  mean action {mean[-1].mean():9.1f} ± {mean[-1].std():.1f}")
        print(f"  sampled     {sampled[-1].mean():9.1f} ± {sampled[-1].std():.1f}")
    return [mean[-1], sampled[-1]]


def load_agent(path: str) -> tuple[Agent, dict]:
    """The agent of a policy.pt, and all that the file holds, such as env_id."""
    saved = load_file(path, "--evaluate", "gail_ppo policy")
    weights = saved["agent"]
    demos = {"obs": weights["standardize.mean"], "actions": weights["standardize_action.mean"]}
    demos = {name: x.numpy()[None] for name, x in demos.items()}  # for the shapes
    demos |= {"low": weights["low"], "high": weights["high"], "discrete": saved["discrete"]}
    agent = Agent(demos, saved["hidden_size"], Generator())
    agent.load_state_dict(weights)
    return agent, saved


def report(agent: Agent, demos: dict, rows: list[dict], seconds: float, args, run_dir) -> dict:
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
        saved = load_file(args.resume, "--resume", "gail_ppo checkpoint")["args"]
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
