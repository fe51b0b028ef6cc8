"""GAIL of `tianshou` 2.0.1 (Weng et al. 2022) on our demonstrations, with the settings of its own example.

It needs an environment of its own:

    python3 -m venv .venv-tianshou && .venv-tianshou/bin/pip install -r benchmark/peers/requirements_tianshou.txt

See run_imitation.py for what a run writes and how it is judged. Settings are those of examples/inverse/irl_gail.py in
its repository, its step size's fall to zero ending where this run ends. One thing is changed, in its favour: the
example standardizes what the policy sees by running statistics but not what the expert saw, so that D can tell them
apart by their scale. Here both are standardized with the demonstrations' statistics.
"""

import csv
import json
import math
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from tianshou.algorithm import GAIL
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
from tianshou.data import Batch, Collector, ReplayBuffer, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from torch import nn
from torch.distributions import Independent, Normal

COLUMNS = ["global_step", "charts/episodic_return", "eval/return_mean", "disc/expert_prob", "disc/policy_prob"]
EPISODE = 100  # steps
NUM_ENVS, ROLLOUT = 64, 2048  # steps of all environments together
EPOCH = 25 * ROLLOUT  # steps between evaluations, some 50,000


@dataclass
class Args:
    seed: int = 1
    total_timesteps: int = 500_000
    """environment steps, in whole epochs of 51,200"""
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"
    output_dir: str = "runs"
    run_name: str = "tianshou"
    threads: int = 1
    """threads of torch"""
    disc_learning_rate: float = 2.5e-5
    """Adam step size of D"""
    disc_steps: int = 2
    """steps of D per rollout, each on its share of it"""


def read_demos(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """Observations (L, O) that each action answered, actions (L, A), returns (E,), metadata."""
    with np.load(path, allow_pickle=False) as file:
        fields = dict(file)
    final = np.cumsum(fields["lengths"] + 1) - 1
    starts = np.cumsum(fields["lengths"]) - fields["lengths"]
    returns = np.add.reduceat(fields["rewards"].astype(np.float64), starts)
    observations = np.delete(fields["observations"], final, axis=0).astype(np.float64)
    return observations, fields["actions"], returns, json.loads(str(fields["metadata"]))


def evaluate(act, episodes: int, seed: int) -> np.ndarray:
    """True returns (episodes,) of act: observations (B, O) -> actions (B, A) in bounds."""
    envs = gym.vector.SyncVectorEnv([lambda: gym.make("HalfCheetah-v4", max_episode_steps=EPISODE)] * episodes)
    obs, _ = envs.reset(seed=seed)
    returns = np.zeros(episodes)
    for _ in range(EPISODE):
        obs, rewards, _, _, _ = envs.step(act(obs))
        returns += rewards
    return returns


def initialize(*modules: nn.Module) -> None:
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
                nn.init.zeros_(layer.bias)


def make_gail(observations: np.ndarray, actions: np.ndarray, space: gym.spaces.Box, epochs: int, args: Args) -> GAIL:
    """tianshou's GAIL on standardized demonstrations (L, O), (L, A)."""
    shape = {"state_shape": observations.shape[1:], "hidden_sizes": [64, 64], "activation": nn.Tanh}
    actor = ContinuousActorProbabilistic(preprocess_net=Net(**shape), action_shape=actions.shape[1:], unbounded=True)
    critic = ContinuousCritic(preprocess_net=Net(**shape))
    disc = ContinuousCritic(preprocess_net=Net(**shape, action_shape=actions.shape[1:], concat=True))
    initialize(actor, critic, disc)
    nn.init.constant_(actor.sigma_param, -0.5)
    with torch.no_grad():
        for layer in actor.mu.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= 0.01

    def distribution(mean_and_std: tuple[torch.Tensor, torch.Tensor]) -> Independent:
        return Independent(Normal(*mean_and_std), 1)

    expert = ReplayBuffer(len(observations))
    for obs, action in zip(observations, actions):
        expert.add(Batch(obs=obs, act=action, rew=0.0, terminated=False, truncated=False, obs_next=obs, info={}))
    schedule = LRSchedulerFactoryLinear(max_epochs=epochs, epoch_num_steps=EPOCH, collection_step_num_env_steps=ROLLOUT)
    return GAIL(
        policy=ProbabilisticActorPolicy(
            actor=actor,
            dist_fn=distribution,
            action_space=space,
            action_scaling=True,
            action_bound_method="clip",
        ),
        critic=critic,
        optim=AdamOptimizerFactory(lr=3e-4).with_lr_scheduler_factory(schedule),
        expert_buffer=expert,
        disc_net=disc,
        disc_optim=AdamOptimizerFactory(lr=args.disc_learning_rate),
        disc_update_num=args.disc_steps,
        gamma=0.99,
        gae_lambda=0.95,
        max_grad_norm=0.5,
        vf_coef=0.25,
        ent_coef=0.001,
        return_scaling=True,
        eps_clip=0.2,
        advantage_normalization=False,
        recompute_advantage=True,
    )


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002, tianshou's buffers draw from it
    rng = np.random.default_rng(args.seed)
    observations, actions, demo_returns, metadata = read_demos(args.demos)
    mean, std = observations.mean(0), observations.std(0)

    def make_env() -> gym.Env:
        env = gym.make("HalfCheetah-v4", max_episode_steps=EPISODE)
        space = env.observation_space
        return gym.wrappers.TransformObservation(env, lambda obs: (obs - mean) / std, space)

    envs = DummyVectorEnv([make_env] * NUM_ENVS)
    envs.seed(args.seed)
    space = envs.action_space[0]
    epochs = max(1, round(args.total_timesteps / EPOCH))
    gail = make_gail((observations - mean) / std, actions, space, epochs, args)
    folder = Path(args.output_dir) / args.run_name
    folder.mkdir(parents=True)

    @torch.no_grad()
    def act(obs: np.ndarray, sampled: bool) -> np.ndarray:
        (mu, sigma), _ = gail.policy.actor((obs - mean) / std)
        if sampled:
            mu = mu + sigma * torch.as_tensor(rng.standard_normal(mu.shape), dtype=mu.dtype)
        return gail.policy.map_action(mu).astype(np.float32)

    trainer = gail.create_trainer(
        OnPolicyTrainerParams(
            training_collector=Collector(gail, envs, VectorReplayBuffer(4096, NUM_ENVS), exploration_noise=True),
            max_epochs=epochs,
            epoch_num_steps=EPOCH,
            collection_step_num_env_steps=ROLLOUT,
            update_step_num_repetitions=10,
            batch_size=64,
            verbose=False,
            show_progress=False,
        )
    )
    trainer.reset()
    evaluations, seconds = [], 0.0
    for epoch in range(1, epochs + 1):
        began = time.perf_counter()
        trainer.execute_epoch()
        seconds += time.perf_counter() - began
        returns = evaluate(lambda obs: act(obs, False), 20, args.seed + 10_000)
        evaluations.append((epoch * EPOCH, float(returns.mean())))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({"global_step": step, "eval/return_mean": x} for step, x in evaluations)

    returns = evaluate(lambda obs: act(obs, False), 100, args.seed + 20_000)
    sampled = evaluate(lambda obs: act(obs, True), 100, args.seed + 30_000)
    drawn = evaluate(lambda obs: rng.uniform(space.low, space.high, (len(obs), *space.shape)), 20, args.seed)
    demos_mean, random_mean = float(demo_returns.mean()), float(drawn.mean())
    best_step, best = max(evaluations, key=lambda pair: pair[1])
    summary = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
    summary |= {"eval/return_sampled_mean": sampled.mean(), "best/return_mean": best, "best/step": best_step}
    summary |= {"demos_return_mean": demos_mean, "random_return_mean": random_mean}
    summary |= {"expert_return_mean": metadata["expert_return_mean"]}
    summary |= {"env_steps": evaluations[-1][0], "seconds": seconds, "charts/SPS": evaluations[-1][0] / seconds}
    names = ("tianshou", "torch", "mujoco", "gymnasium", "numpy")
    summary["versions"] = " ".join(f"{name} {version(name)}" for name in names)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
