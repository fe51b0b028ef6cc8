# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "wandb==0.31.0",
#                 "tqdm==4.70.1", "plotly==7.1.0"]
# ///
"""All of GAIL in seconds: imitate an expert that walks a 2-D point to a goal, in one file.

Generative Adversarial Imitation Learning (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476) in
the smallest world that shows it whole. A point looks for the origin of the square [-1, 1]^2 with
five moves (stay, up, down, left, right). A discriminator D learns to tell the steps (s, one-hot a)
of an expert from the policy's own; PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) or
TRPO (Schulman et al. 2015, https://arxiv.org/abs/1502.05477) trains the policy to be taken for it:

    repeat:  collect a rollout -> update D -> reward = how sure D is of the expert -> update policy

The true reward (-0.01 a step, 1 at the goal) is only reported. What is worth knowing:

 1. The expert moves along its larger coordinate. It solves 95% of the starts: moves of 0.2 reach
    only a lattice of points, and where none lies in the goal, it steps to and fro to the end.
 2. Episodes end at the goal. With nothing after it the reward's sign would decide: -log(1 - D) is
    positive, so that lingering pays, log D negative, so that any end does. So an absorbing state
    follows the goal (Kostrikov et al. 2019, https://arxiv.org/abs/1809.02925). Its reward is not
    learned by D, as there, but counted (terminal_logits). Then every form will do, centered or not.
 3. A time limit does not end the task: the value of the last observation is bootstrapped.
 4. The --continuous expert (straight to the goal at full speed) has Gaussian noise, as the policy
    has; otherwise D can tell the two apart by it. D sees velocities as executed, cut to [-1, 1].
 5. Is the adversary beaten? A new discriminator, trained from scratch, has to tell the policy from
    the expert on held-out episodes, before the training and after it. 50% is a coin.
 6. Policy and value share a trunk. Under TRPO the value learns in its own layers only, so that the
    bound on the KL divergence still holds after it.

Shapes: T steps, N worlds, E episodes, B batch, L steps in all demonstrations, P parameters;
X = 2 + 5 or 2 + 2 numbers of an observation and an action.

    python toy_pointnav.py                                   # 12 seconds; diagnostics.html
    python toy_pointnav.py --algorithm trpo
    python toy_pointnav.py --continuous                      # a velocity instead of five moves
    python toy_pointnav.py --evaluate runs/<run>/policy.pt   # 5,000 episodes beside the expert's
"""

import copy
import io
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
import tyro
import wandb
from plotly.subplots import make_subplots
from torch import Generator, Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.optim import Adam
from tqdm import tqdm

REWARD_WINDOW = 10  # rollouts that rewards are normalized over
INPUT_SCALE = 2.5  # so that positions, as the expert visits them, spread by about 1
INITIAL_LOG_STD = -0.5  # of the --continuous policy's Gaussian
BACKTRACK_STEPS = 10  # step sizes that TRPO's line search tries, each half of the one before
FISHER_STRIDE = 5  # TRPO's Fisher matrix: of every fifth state (of all worlds, unless 5 divides N)
STEP_SIZE, GOAL_RADIUS, MAX_EPISODE_STEPS = 0.2, 0.12, 60  # of the world
MOVES = np.array([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]], np.float64)
ACTION_NAMES = ["stay", "up", "down", "left", "right"]
EXPERT_STD = 0.2  # noise of the --continuous expert, as a share of full speed


@dataclass
class Args:
    seed: int = 1  # seed of networks, worlds, minibatches and the expert's episodes
    output_dir: str = "runs"  # folder that receives the run's folder
    run_name: str = ""  # name of the run's folder (default: toy_pointnav__PointNav__<seed>__<time>)
    evaluate: str = ""  # policy.pt to evaluate, in its own task, instead of training
    eval_interval: int = 10_000  # env steps between evaluations (500 episodes, mean action)
    eval_episodes: int = 5000  # episodes of the final evaluation, from the same starts for all
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "gail"  # Weights & Biases project

    continuous: bool = False  # a velocity instead of five moves, and an expert of its own
    expert_episodes: int = 300  # episodes that the expert demonstrates
    algorithm: Literal["ppo", "trpo"] = "ppo"  # how the policy is updated
    total_timesteps: int = 150_000  # environment steps of the whole run, in whole rollouts
    num_envs: int = 128  # parallel worlds (N)
    num_steps: int = 32  # steps per world and rollout (T)
    gamma: float = 0.9  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    ent_coef: float = 0.0  # weight of the policy's entropy bonus
    hidden_size: int = 64  # width of the hidden layers of policy and value

    learning_rate: float = 3e-3  # PPO: Adam learning rate of policy and value
    anneal_lr: bool = True  # PPO: let that learning rate fall linearly to zero over the run
    num_minibatches: int = 2  # PPO: minibatches per epoch
    update_epochs: int = 8  # PPO: epochs over each rollout
    clip_coef: float = 0.2  # PPO: clipping of the probability ratio
    vf_coef: float = 0.5  # PPO: weight of the value loss
    max_grad_norm: float = 1.0  # PPO: gradient norm at which gradients are cut

    max_kl: float = 0.01  # TRPO: bound on the mean KL divergence from old policy to new
    cg_iterations: int = 10  # TRPO: conjugate gradient iterations
    cg_damping: float = 0.01  # TRPO: this much of the identity is added to the Fisher matrix
    value_steps: int = 20  # TRPO: Adam steps of the value per rollout
    value_learning_rate: float = 3e-3  # TRPO: Adam learning rate of the value

    reward_form: Literal["softplus", "logit", "logsigmoid"] = "logsigmoid"
    """softplus(logit) = -log(1 - D), logit = log D - log(1 - D), logsigmoid(logit) = log D"""
    normalize_reward: bool = False  # subtract the running mean, divide by the running std
    disc_learning_rate: float = 3e-3  # Adam learning rate of D
    disc_steps: int = 20  # minibatch steps of D per rollout
    disc_batch_size: int = 256  # expert pairs, and as many of the policy's, in a minibatch
    disc_hidden_size: int = 128  # width of D's two hidden layers
    fresh_disc_steps: int = 500  # steps of the new D that judges before and after the training

    def check(self) -> None:
        """Raise UserError for a setting out of range, before anything is written."""
        rollout = self.num_envs * self.num_steps
        at_most = {"seed": 2**31 - 1, "gamma": 0.9999, "gae_lambda": 1}  # 1 - gamma divides
        at_most["num_minibatches"] = rollout // 2
        may_be_zero = "seed gamma gae_lambda ent_coef vf_coef cg_damping"
        check_settings(self, may_be_zero, {"total_timesteps": rollout}, at_most)


# Networks


def tanh_mlp(sizes: list[int], output_gain: float, generator: Generator) -> nn.Sequential:
    """Linear layers with tanh between, orthogonal weights (gain sqrt 2; last layer output_gain)."""
    layers, gains = [], [math.sqrt(2)] * (len(sizes) - 2) + [output_gain]
    for fan_in, fan_out, gain in zip(sizes[:-1], sizes[1:], gains):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, gain, generator=generator)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class ActorCritic(nn.Module):
    """Policy and value on a shared trunk. (The other scripts standardize what they see by the
    demonstrations' statistics; here a factor will do.)"""

    def __init__(self, continuous: bool, hidden_size: int, generator: Generator):
        super().__init__()
        self.continuous = continuous
        self.low, self.high = (-1, 1) if continuous else (0, len(MOVES) - 1)  # of an action
        self.trunk = tanh_mlp([2, hidden_size, hidden_size], math.sqrt(2), generator)
        self.actor = tanh_mlp([hidden_size, 2 if continuous else len(MOVES)], 0.01, generator)
        self.critic = tanh_mlp([hidden_size, hidden_size, 1], 1.0, generator)
        if continuous:
            self.log_std = nn.Parameter(torch.full((2,), INITIAL_LOG_STD))

    def features(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.trunk(INPUT_SCALE * obs))

    def forward(self, obs: Tensor) -> tuple[Distribution, Tensor]:
        """Policy, and value (B,), from observations (B, 2)."""
        features = self.features(obs)
        output, value = self.actor(features), self.critic(features).squeeze(-1)
        if self.continuous:  # validate_args takes time; train looks whether numbers are finite
            normal = Normal(output, self.log_std.exp(), validate_args=False)
            return Independent(normal, 1, validate_args=False), value
        return Categorical(logits=output, validate_args=False), value

    def sample(self, policy: Distribution, generator: Generator) -> Tensor:
        """As policy.sample(), which takes no generator."""
        if self.continuous:
            return policy.mean + policy.stddev * torch.randn(policy.mean.shape, generator=generator)
        return torch.multinomial(policy.probs, 1, generator=generator).squeeze(-1)

    def policy_parameters(self) -> list[nn.Parameter]:
        """All but the critic's own layers: what TRPO's step moves."""
        return [p for name, p in self.named_parameters() if not name.startswith("critic")]

    @torch.inference_mode()
    def act(self, obs: np.ndarray, generator: Generator | None = None) -> np.ndarray:
        """The action to execute after observations (B, 2): the likeliest move or the mean velocity,
        or, with a generator, a sampled one."""
        policy, _ = self(torch.as_tensor(obs, dtype=torch.float32))
        action = policy.mode
        if generator is not None:
            action = self.sample(policy, generator)
        return action.clamp(self.low, self.high).numpy()


class PairDiscriminator(nn.Module):
    """Logit (...) of "this is the expert's" from pairs (..., X): the observation beside the
    executed action, a one-hot move or a velocity."""

    def __init__(self, continuous: bool, hidden_size: int, generator: Generator):
        super().__init__()
        input_size = 2 + (2 if continuous else len(MOVES))
        self.net = tanh_mlp([input_size, hidden_size, hidden_size, 1], 1.0, generator)

    def pairs(self, obs: Tensor, executed: Tensor) -> Tensor:
        if not executed.is_floating_point():
            executed = F.one_hot(executed, len(MOVES))
        return torch.cat([INPUT_SCALE * obs, executed.float()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


# The algorithm, as functions


def discriminator_loss(expert_logit: Tensor, policy_logit: Tensor) -> Tensor:
    """-E_expert[log D] - E_policy[log(1 - D)] with D = sigmoid(logit): (B,), (B,) -> ()
    (Ho & Ermon 2016, equation 17, whose D is 1 - ours). It is 2 log 2 when D cannot tell."""
    return F.softplus(-expert_logit).mean() + F.softplus(policy_logit).mean()


def reward_of_form(logit: Tensor, form: str) -> Tensor:
    """What a step pays, of any shape: one of GAIL's two forms, or D's logit itself, as in AIRL
    (Fu et al. 2018, https://arxiv.org/abs/1710.11248)."""
    if form == "softplus":
        return F.softplus(logit)  # -log(1 - D)
    if form == "logsigmoid":
        return F.logsigmoid(logit)  # log D
    return logit  # log D - log(1 - D)


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


def conjugate_gradient(product: Callable, b: Tensor, iterations: int) -> Tensor:
    """Solve A x = b for a symmetric positive definite A (P, P) that is known only through
    product(v) = A v (Hestenes & Stiefel 1952)."""
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


def fisher_product(agent: ActorCritic, obs: Tensor, damping: float) -> Callable:
    """v (P,) -> (F + damping I) v. F is the policy's Fisher matrix on obs (B, 2): the Hessian of
    the mean KL divergence from the current policy, at itself (Schulman et al. 2015, appendix C). F
    itself is never formed."""
    parameters = agent.policy_parameters()
    with torch.no_grad():
        old_policy, _ = agent(obs)
    kl = kl_divergence(old_policy, agent(obs)[0]).mean()
    gradient = flat_gradient(kl, parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return flat_gradient(gradient @ v, parameters, retain_graph=True) + damping * v

    return product


def trpo_step(agent: ActorCritic, obs: Tensor, action: Tensor, advantages: Tensor, args: Args):
    """One natural-gradient step of the policy on obs (B, 2), action (B, ...), advantages (B,) ->
    log. It is the largest that the quadratic model of the KL divergence allows (damped, on every
    fifth state), halved until the true divergence is within --max-kl and the surrogate no worse
    (Schulman et al. 2015, appendix C). Where that never comes true, the policy stays as it was."""
    parameters = agent.policy_parameters()
    with torch.no_grad():
        old_policy, _ = agent(obs)
        old_log_prob = old_policy.log_prob(action)

    def surrogate_and_kl() -> tuple[Tensor, Tensor]:
        policy, _ = agent(obs)
        ratio = (policy.log_prob(action) - old_log_prob).exp()
        surrogate = (ratio * advantages).mean() + args.ent_coef * policy.entropy().mean()
        return surrogate, kl_divergence(old_policy, policy).mean()

    before, _ = surrogate_and_kl()
    gradient = flat_gradient(before, parameters)
    product = fisher_product(agent, obs[::FISHER_STRIDE], args.cg_damping)
    direction = conjugate_gradient(product, gradient, args.cg_iterations)
    step = direction * torch.sqrt(2 * args.max_kl / (direction @ product(direction) + 1e-10))
    old = nn.utils.parameters_to_vector(parameters).detach().clone()
    with torch.no_grad():
        for halving in range(BACKTRACK_STEPS):
            nn.utils.vector_to_parameters(old + 0.5**halving * step, parameters)
            after, kl = surrogate_and_kl()
            if kl <= args.max_kl and after >= before:
                return {"losses/policy_loss": -after.item(), "losses/approx_kl": kl.item()}
    nn.utils.vector_to_parameters(old, parameters)
    return {"losses/policy_loss": -before.item(), "losses/approx_kl": 0.0}


# The steps of the loop


@torch.no_grad()
def collect_rollout(envs, agent: ActorCritic, episodes: dict, num_steps: int, generator: Generator):
    """Sample T steps in each of N worlds -> rollout {name: (T, N, ...)}, log. `episodes` goes on
    from one rollout to the next: "obs" (N, 2), the latest observations, "return" (N,) so far."""
    steps, finished = [], []
    for _ in range(num_steps):
        obs = torch.from_numpy(episodes["obs"]).float()
        policy, _ = agent(obs)
        action = agent.sample(policy, generator)
        executed = action.clamp(agent.low, agent.high)
        episodes["obs"], reward, terminated, truncated, info = envs.step(executed.numpy())
        ended = terminated | truncated
        steps.append({
            "obs": obs,
            "next_obs": torch.from_numpy(info["final_obs"]).float(),  # before any reset
            "action": action,  # as sampled: the policy's ratio is about this one
            "executed": executed,  # as cut: the world, and D, see this one
            "log_prob": policy.log_prob(action),
            "env_reward": torch.from_numpy(reward).float(),
            "terminated": torch.from_numpy(terminated),
            "steps_left": torch.from_numpy(MAX_EPISODE_STEPS - info["length"]),
            "ended": torch.from_numpy(ended),  # terminated or truncated
        })
        episodes["return"] += reward
        finished += zip(episodes["return"][ended], info["length"][ended])
        episodes["return"][ended] = 0.0
    rollout = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    if not finished:
        return rollout, {}
    returns, lengths = np.mean(finished, axis=0).tolist()
    return rollout, {"charts/episodic_return": returns, "charts/episodic_length": lengths}


def update_plain_discriminator(disc, optimizer, expert, policy, num_steps, args: Args, generator):
    """Steps of D, without a gradient penalty, on pairs of the expert (L, X) and of the policy (B,
    X) -> log of the last."""
    size = args.disc_batch_size
    for _ in range(num_steps):
        expert_x = expert[torch.randint(len(expert), (size,), generator=generator)]
        policy_x = policy[torch.randint(len(policy), (size,), generator=generator)]
        expert_logit, policy_logit = disc(torch.cat([expert_x, policy_x])).split(size)
        loss = discriminator_loss(expert_logit, policy_logit)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        "disc/loss": loss.item(),
        "disc/expert_prob": torch.sigmoid(expert_logit).mean().item(),
        "disc/policy_prob": torch.sigmoid(policy_logit).mean().item(),
        "disc/expert_acc": (expert_logit > 0).float().mean().item(),
        "disc/policy_acc": (policy_logit < 0).float().mean().item(),
    }


@torch.no_grad()
def compute_gail_rewards(rollout, disc, recent_rewards: deque, visits: dict, args: Args):
    """What the policy maximizes: {"steps": the rewards (T, N), "absorbing": that of each step after
    the goal}, log. `visits` is what terminal_logits takes; the rollout's counts are added to the
    policy's."""
    logit = disc(rollout["pairs"])
    counts = torch.tensor([logit.numel(), rollout["steps_left"][rollout["terminated"]].sum()])
    visits["policy"] += counts  # of the whole run: with fewer, the reward of an end jumps
    offset, absorbing_logit = terminal_logits(**visits)
    rewards = reward_of_form(logit + offset, args.reward_form)
    absorbing = reward_of_form(absorbing_logit, args.reward_form)
    log = {"reward/env_mean": rollout["env_reward"].mean().item()}
    log |= {"reward/gail_mean": rewards.mean().item(), "reward/gail_std": rewards.std().item()}
    log["reward/absorbing"] = absorbing.item()
    if args.normalize_reward:
        recent_rewards.append(rewards)
        rewards = normalize(rewards, recent_rewards)
        absorbing = normalize(absorbing, recent_rewards)
    return {"steps": rewards, "absorbing": absorbing.item()}, log


def estimate_advantages(agent: ActorCritic, rollout, rewards, args: Args):
    """-> "obs", "action", "log_prob", "advantage" and "return" (B, ...) of a rollout; log."""
    with torch.no_grad():
        values, next_values = agent(rollout["obs"])[1], agent(rollout["next_obs"])[1]
    next_values[rollout["terminated"]] = rewards["absorbing"] / (1 - args.gamma)  # for ever
    advantages, returns = compute_gae(
        rewards["steps"], values, next_values, rollout["ended"], args.gamma, args.gae_lambda
    )
    batch = {name: rollout[name] for name in ("obs", "action", "log_prob")}
    batch |= {"advantage": advantages, "return": returns}
    batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
    explained = 1 - (returns - values).var() / (returns.var() + 1e-8)
    return batch, {"losses/explained_variance": explained.item()}


def update_by_ppo(agent: ActorCritic, optimizer, rollout, rewards, args: Args, generator):
    """PPO: epochs of minibatches over one rollout -> log of the last minibatch."""
    batch, log = estimate_advantages(agent, rollout, rewards, args)
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch["obs"]), generator=generator)
        for indices in order.tensor_split(args.num_minibatches):
            mini = {name: tensor[indices] for name, tensor in batch.items()}
            policy, value = agent(mini["obs"])
            log_ratio = policy.log_prob(mini["action"]) - mini["log_prob"]
            advantage = mini["advantage"] - mini["advantage"].mean()
            advantage = advantage / (mini["advantage"].std() + 1e-8)
            policy_loss = ppo_policy_loss(log_ratio, advantage, args.clip_coef)
            value_loss = 0.5 * F.mse_loss(value, mini["return"])
            entropy = policy.entropy().mean()
            optimizer.zero_grad()
            (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
    ratio = log_ratio.exp()
    return log | {
        "losses/policy_loss": policy_loss.item(),
        "losses/value_loss": value_loss.item(),
        "losses/entropy": entropy.item(),
        # the estimator k3 of http://joschu.net/blog/kl-approx.html
        "losses/approx_kl": (ratio - 1 - log_ratio).mean().item(),
        "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean().item(),
    }


def update_by_trpo(agent: ActorCritic, optimizer, rollout, rewards, args: Args):
    """TRPO: one step of the policy, then --value-steps of the critic's own layers -> log. The
    optimizer holds no others, so that fitting the value leaves the trunk, and with it the policy,
    where the bound on the KL divergence put it."""
    batch, log = estimate_advantages(agent, rollout, rewards, args)
    advantage = batch["advantage"] - batch["advantage"].mean()
    advantage = advantage / (batch["advantage"].std() + 1e-8)
    log |= trpo_step(agent, batch["obs"], batch["action"], advantage, args)
    with torch.no_grad():
        log["losses/entropy"] = agent(batch["obs"])[0].entropy().mean().item()
        features = agent.features(batch["obs"])
    for _ in range(args.value_steps):
        value_loss = 0.5 * F.mse_loss(agent.critic(features).squeeze(-1), batch["return"])
        optimizer.zero_grad()
        value_loss.backward()
        optimizer.step()
    return log | {"losses/value_loss": value_loss.item()}


# Training


def train(args: Args) -> dict[str, float]:
    """Train from the start; returns what summary.json holds."""
    args = copy.copy(args)  # the caller's stay as they are
    args.check()
    torch.set_num_threads(1)  # minibatches this small run slower on more
    generator, continuous = Generator().manual_seed(args.seed), args.continuous
    expert_act = make_expert(continuous, args.seed)
    demos = play_episodes(expert_act, args.expert_episodes, args.seed + 1000, continuous)
    agent = ActorCritic(continuous, args.hidden_size, generator)
    disc = PairDiscriminator(continuous, args.disc_hidden_size, generator)
    if args.algorithm == "ppo":
        optimizer = Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    else:
        optimizer = Adam(agent.critic.parameters(), lr=args.value_learning_rate, fused=True)
    disc_optimizer = Adam(disc.parameters(), lr=args.disc_learning_rate, fused=True)
    recent_rewards, expert = deque(maxlen=REWARD_WINDOW), disc.pairs(*pairs_of(demos))
    steps_left = (MAX_EPISODE_STEPS - demos["length"])[demos["success"]].sum()
    visits = {"expert": torch.tensor([len(expert), steps_left]), "policy": torch.zeros(2)}
    envs = PointNav(args.num_envs, continuous)
    episodes = {"obs": envs.reset(seed=args.seed)[0], "return": np.zeros(args.num_envs)}
    run_dir = start_run(args)

    initial_accuracy = fresh_accuracy(agent, args, args.seed + 40_000)
    rows, start = [], time.perf_counter()
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    bar = tqdm(range(num_iterations), unit="rollout", disable=None)
    for iteration in bar:
        if args.anneal_lr and args.algorithm == "ppo":
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        rollout, log = collect_rollout(envs, agent, episodes, args.num_steps, generator)
        rollout["pairs"] = disc.pairs(rollout["obs"], rollout["executed"])  # (T, N, X)
        policy = rollout["pairs"].flatten(0, 1)
        log |= update_plain_discriminator(
            disc, disc_optimizer, expert, policy, args.disc_steps, args, generator
        )
        rewards, reward_log = compute_gail_rewards(rollout, disc, recent_rewards, visits, args)
        if args.algorithm == "ppo":
            log |= update_by_ppo(agent, optimizer, rollout, rewards, args, generator)
        else:
            log |= update_by_trpo(agent, optimizer, rollout, rewards, args)

        step, last = (iteration + 1) * batch_size, iteration == num_iterations - 1
        if last or step % args.eval_interval < batch_size:
            played = play_episodes(agent.act, 500, args.seed + 10_000, continuous)
            log |= episode_metrics(played, "eval")
            bar.set_postfix_str(f"success {log['eval/success_mean']:.1%}")
        seconds = time.perf_counter() - start
        log |= reward_log | {"charts/learning_rate": optimizer.param_groups[0]["lr"]}
        log["charts/SPS"] = step / seconds
        bad = [name for name, x in log.items() if not math.isfinite(x)]
        finite = all(x.isfinite().all() for x in agent.parameters())
        require(finite and not bad, f"training diverged at step {step}: "
                f"{', '.join(bad) or 'weights'} not finite; lower the learning rates.")
        rows.append({"global_step": step} | log)
        write_csv(rows, run_dir / "metrics.csv")
        if args.track:
            wandb.log(rows[-1], step=step, commit=True)
    policy = {"kind": "toy_pointnav policy", "agent": agent.state_dict()}
    policy |= {"continuous": continuous, "hidden_size": args.hidden_size}
    save_atomically(policy, run_dir / "policy.pt")
    summary = {"env_steps": step, "seconds": seconds, "charts/SPS": step / seconds}
    summary["disc/initial_accuracy"] = initial_accuracy
    summary["disc/fresh_accuracy"] = fresh_accuracy(agent, args, args.seed + 50_000)
    played = final_evaluation(agent, args, run_dir / "evaluation.npz")
    page = draw_page(demos, played, rows).update_layout(title_text=run_dir.name)
    page.write_html(run_dir / "diagnostics.html")  # all of Plotly inside: it needs no network
    return report(demos, played, rows, summary, args, run_dir)


# --- Plumbing: the world, its experts, their episodes ---


class PointNav:
    """N points in the square [-1, 1]^2 that look for the origin. An observation is the position
    (N, 2), an action one of five moves (N,), or with `continuous` a velocity (N, 2) in [-1, 1]^2.
    Each step pays -0.01, the one that comes within GOAL_RADIUS 1 more. An ended episode resets in
    the same step. All as in gymnasium's vector environments, but info has "final_obs" (N, 2), the
    positions before any reset, at every step, and "length" (N,), the steps of the episodes so far.
    (gail_ppo.py takes gymnasium's own.)"""

    def __init__(self, num_envs: int, continuous: bool):
        self.num_envs, self.continuous = num_envs, continuous
        self.position, self.elapsed = np.zeros((num_envs, 2)), np.zeros(num_envs, np.int64)
        self.rng = np.random.default_rng()

    def restart(self, ids: np.ndarray) -> None:
        self.position[ids] = self.rng.uniform(-1, 1, (len(ids), 2))
        self.elapsed[ids] = 0

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict]:
        self.rng = np.random.default_rng(seed)
        self.restart(np.arange(self.num_envs))
        return self.position.copy(), {}

    def step(self, actions: np.ndarray):
        velocity = np.clip(actions, -1, 1) if self.continuous else MOVES[actions]
        self.position = np.clip(self.position + STEP_SIZE * velocity, -1, 1)
        self.elapsed += 1
        terminated = np.hypot(*self.position.T) < GOAL_RADIUS
        truncated = (self.elapsed >= MAX_EPISODE_STEPS) & ~terminated
        info = {"final_obs": self.position.copy(), "length": self.elapsed.copy()}
        self.restart(np.flatnonzero(terminated | truncated))
        return self.position.copy(), terminated - 0.01, terminated, truncated, info


def expert_actions(obs: np.ndarray, continuous: bool, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) -> (N,): one move along the larger coordinate towards 0, along x on a tie. Or (N, 2):
    straight to the goal at full speed, in the last step no farther, plus Gaussian noise."""
    if continuous:
        velocity = -obs / np.maximum(np.hypot(*obs.T)[:, None], STEP_SIZE)
        return np.clip(velocity + EXPERT_STD * rng.standard_normal(velocity.shape), -1, 1)
    x, y = obs.T
    along_x = np.where(x > 0, 3, np.where(x < 0, 4, 0))
    along_y = np.where(y > 0, 2, 1)
    return np.where(np.abs(x) >= np.abs(y), along_x, along_y)


def make_expert(continuous: bool, seed: int) -> Callable:
    """An expert that acts as an agent does: obs (N, 2) -> actions."""
    return partial(expert_actions, continuous=continuous, rng=np.random.default_rng(seed))


def play_episodes(act: Callable, episodes: int, seed: int, continuous: bool) -> dict:
    """One episode in each of E worlds. The same seed gives the same starts, whoever acts. -> "obs"
    (T + 1, E, 2), final ones included; "actions" (T, E, ...), as executed; "rewards" (T, E);
    "terminated" (T, E), at the goal; "running" (T, E), False after an episode's end, where
    observations and actions mean nothing; "return", "length", "success" (E,)."""
    envs, running = PointNav(episodes, continuous), np.ones(episodes, bool)
    obs, _ = envs.reset(seed=seed)
    all_obs, steps = [obs], []
    while running.any():
        actions = act(obs)
        obs, reward, terminated, truncated, info = envs.step(actions)
        all_obs.append(info["final_obs"])
        steps.append({"actions": actions, "rewards": reward * running, "running": running})
        steps[-1]["terminated"] = terminated & running
        running = running & ~(terminated | truncated)
    played = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    played |= {"obs": np.stack(all_obs), "success": played["terminated"].any(axis=0)}
    played |= {"return": played["rewards"].sum(axis=0), "length": played["running"].sum(axis=0)}
    return played


def pairs_of(played: dict, episodes: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """All observations (L, 2) of some of the episodes, and the actions that answered them."""
    running = played["running"][:, episodes]
    obs = torch.from_numpy(played["obs"][:-1, episodes][running]).float()
    return obs, torch.from_numpy(played["actions"][:, episodes][running])


# --- Plumbing: evaluation ---


def episode_metrics(played: dict, name: str, kind: str = "") -> dict[str, float]:
    metrics = {f"{name}/{x}{kind}_mean": played[x].mean() for x in ("return", "success", "length")}
    metrics[f"{name}/return{kind}_std"] = played["return"].std()
    return {key: x.item() for key, x in metrics.items()}


def fresh_accuracy(agent: ActorCritic, args: Args, seed: int, episodes: int = 2000) -> float:
    """How well a new discriminator can tell the sampled policy from the expert: the mean of its
    accuracies on either side's held-out episodes. 0.5 is a coin."""
    act, generator = make_expert(agent.continuous, seed + 2), Generator().manual_seed(seed)
    expert = play_episodes(act, episodes, seed, agent.continuous)
    act = partial(agent.act, generator=Generator().manual_seed(seed))
    policy = play_episodes(act, episodes, seed + 1, agent.continuous)
    training, held_out = slice(episodes // 2), slice(episodes // 2, None)
    disc = PairDiscriminator(agent.continuous, args.disc_hidden_size, generator)
    optimizer = Adam(disc.parameters(), lr=args.disc_learning_rate, fused=True)
    expert_x, policy_x = (disc.pairs(*pairs_of(x, training)) for x in (expert, policy))
    steps = args.fresh_disc_steps
    update_plain_discriminator(disc, optimizer, expert_x, policy_x, steps, args, generator)
    with torch.no_grad():
        expert_right = disc(disc.pairs(*pairs_of(expert, held_out))) > 0
        policy_right = disc(disc.pairs(*pairs_of(policy, held_out))) <= 0
    return 0.5 * (expert_right.float().mean() + policy_right.float().mean()).item()


def final_evaluation(agent: ActorCritic, args: Args, path: Path) -> dict[str, dict]:
    """Prints and returns episodes of the expert, of the policy's mean action and of sampled ones,
    from the same starts; their cumulative returns (T, E) go into a .npz."""
    seed, played = args.seed + 20_000, {}
    actors = {"expert": make_expert(agent.continuous, seed + 1), "mean_action": agent.act}
    actors["sampled"] = partial(agent.act, generator=Generator().manual_seed(seed + 2))
    for name, act in actors.items():
        played[name] = play_episodes(act, args.eval_episodes, seed, agent.continuous)
        success, length, returns = (played[name][x] for x in ("success", "length", "return"))
        solved = f"{success.mean():6.1%} of {len(success)} starts solved, {length.mean():.2f} steps"
        print(f"  {name:12}{solved}, return {returns.mean():.3f} ± {returns.std():.3f}")
    returns = {name: np.cumsum(x["rewards"], axis=0) for name, x in played.items()}
    np.savez_compressed(path, **returns)
    return played


def load_agent(path: str) -> ActorCritic:
    """The agent of a policy.pt."""
    saved = load_file(path, "--evaluate", "toy_pointnav policy")
    agent = ActorCritic(saved["continuous"], saved["hidden_size"], Generator())
    agent.load_state_dict(saved["agent"])
    return agent


def report(demos: dict, played: dict, rows: list[dict], summary: dict, args: Args, run_dir) -> dict:
    """The rest of the run's summary, which it writes as a table and as summary.json."""
    summary |= episode_metrics(played["mean_action"], "eval")
    summary |= episode_metrics(played["sampled"], "eval", "_sampled")
    summary |= episode_metrics(played["expert"], "expert")
    summary["demos_return_mean"] = demos["return"].mean().item()
    points = [(x["eval/return_mean"], x["global_step"]) for x in rows if "eval/return_mean" in x]
    summary["best/return_mean"], summary["best/step"] = max(points, key=lambda point: point[0])
    (run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(run_dir / "summary.tmp", run_dir / "summary.json")
    print(*(f"  {name:26}{value}" for name, value in summary.items()), f"  {run_dir}", sep="\n")
    if args.track:
        wandb.summary.update(summary)
        wandb.finish()
    return summary


# --- Plumbing: the page of diagnostics ---

RED, ORANGE, BLUE, LIGHT, BLACK = "#d62728", "#ff7f0e", "#1f77b4", "#aec7e8", "black"
PANELS = (  # title, x axis, y axis
    ("One expert trajectory", "x", "y"),
    ("Actions taken", "move, or speed as a share of full speed", "share of steps"),
    ("Discriminator loss", "environment steps", "cross-entropy of both sides, nats"),
    ("Evaluation with the mean action", "environment steps", "mean return; share of starts solved"),
    ("True return of training episodes", "environment steps", "mean return in a rollout"),
    ("Expert and learned paths, same starts", "x", "y"),
)


def draw(page, panel: int, x, y, name: str, color: str, mode="lines", dash="solid") -> None:
    """One curve, or with mode "bars" a row of bars, in a panel; they are numbered from 0."""
    look = {"name": name, "marker_color": color, "legendgroup": panel}
    look["legendgrouptitle_text"] = PANELS[panel][0]
    if mode == "bars":
        trace = go.Bar(x=x, y=y, **look)
    else:
        line = {"color": color, "dash": dash}
        trace = go.Scatter(x=x, y=y, mode=mode, line=line, marker_size=4, **look)
    page.add_trace(trace, panel // 3 + 1, panel % 3 + 1)


def draw_page(demos: dict, played: dict, rows: list[dict]) -> go.Figure:
    """Diagnostics in six panels. `played` are the episodes of the evaluation at the end."""
    page = make_subplots(2, 3, subplot_titles=[title for title, _, _ in PANELS])
    expert, solved = played["expert"], [np.argmax(demos["success"])]
    some = range(min(8, len(expert["length"])))
    angle, gap = np.linspace(0, 2 * np.pi, 60), np.full((1, 2), np.nan)
    for panel, who, episodes, name, color, dash in (
        (0, demos, solved, "expert", RED, "solid"),
        (5, expert, some, "expert", RED, "solid"),
        (5, played["mean_action"], some, "policy", BLUE, "dash"),
    ):
        paths = [who["obs"][: who["length"][i] + 1, i] for i in episodes]
        x, y = np.concatenate([part for path in paths for part in (path, gap)]).T
        draw(page, panel, x, y, name, color, "lines+markers", dash)
    for panel in (0, 5):
        draw(page, panel, GOAL_RADIUS * np.cos(angle), GOAL_RADIUS * np.sin(angle), "goal", BLACK)

    for who, name, color in ((demos, "expert", RED), (played["sampled"], "policy", BLUE)):
        actions = pairs_of(who)[1].numpy()
        if actions.ndim == 1:
            x, counts = ACTION_NAMES, np.bincount(actions, minlength=len(MOVES))
        else:
            x = np.linspace(0.05, 1.45, 15)  # centres of the bins
            counts, _ = np.histogram(np.hypot(*actions.T), 15, (0, 1.5))
        draw(page, 1, x, counts / len(actions), name, color, "bars")

    for panel, column, name, color, level, level_name, level_color in (
        (2, "disc/loss", "loss", BLUE, 2 * math.log(2), "D cannot tell", BLACK),
        (3, "eval/return_mean", "return", BLUE, expert["return"].mean(), "expert's return", RED),
        (3, "eval/success_mean", "success", LIGHT, expert["success"].mean(), "its success", ORANGE),
        (4, "charts/episodic_return", "policy", BLUE, demos["return"].mean(), "expert", RED),
    ):
        logged, ends = [row for row in rows if column in row], [0, rows[-1]["global_step"]]
        steps, values = [row["global_step"] for row in logged], [row[column] for row in logged]
        draw(page, panel, steps, values, name, color, "lines+markers")
        draw(page, panel, ends, [level, level], level_name, level_color, dash="dash")

    for panel, (_, x_title, y_title) in enumerate(PANELS):
        cell = {"row": panel // 3 + 1, "col": panel % 3 + 1}
        page.update_xaxes(title_text=x_title, **cell)
        page.update_yaxes(title_text=y_title, **cell)
        if x_title == "x":  # a map of the square
            page.update_xaxes(range=[-1.05, 1.05], **cell)
            page.update_yaxes(range=[-1.05, 1.05], scaleanchor=f"x{panel + 1}", **cell)
    return page.update_layout(template="plotly_white", height=950, legend_groupclick="toggleitem")


# --- Plumbing: files, command line ---


def start_run(args: Args) -> Path:
    """The new folder of the run; with --track, its run in Weights & Biases too."""
    name = f"toy_pointnav__PointNav__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.output_dir) / (args.run_name or name)
    require(not run_dir.exists(), f"--run-name: {run_dir} exists already; give another.")
    if args.track:
        names = {"project": args.wandb_project_name, "name": run_dir.name, "dir": args.output_dir}
        names |= {"job_type": "toy_pointnav", "reinit": "finish_previous"}  # one may be open
        try:
            wandb.init(**names, config=vars(args))
        except Exception as error:  # W&B fails in many ways
            raise UserError(f"--track: {reason(error)}; run `wandb login`, or set "
                            "WANDB_MODE=offline.") from None
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(vars(args), indent=2) + "\n")
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
    """Settings from the command line. W&B's sweep agents write --flag=True and --flag=False."""
    argv = [re.sub("^--(.*)=True$", r"--\1", re.sub("^--(.*)=False$", r"--no-\1", x)) for x in argv]
    args = tyro.cli(Args, args=argv, description=__doc__.split("\n")[0])
    args.check()
    return args


def main(argv: list[str]) -> None:
    """Command line in, exit code out."""
    try:
        args = parse_args(argv)
        if args.evaluate:
            path = Path(args.evaluate)  # its .npz: the run's own evaluation stays
            final_evaluation(load_agent(args.evaluate), args, path.with_suffix(".npz"))
        else:
            train(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
