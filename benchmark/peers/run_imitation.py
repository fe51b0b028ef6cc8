"""GAIL and BC of `imitation` 1.0.1 (Gleave et al. 2022, with Stable-Baselines3) on our demonstrations.

It needs packages of its own, older than ours:

    python3 -m venv .venv-imitation && .venv-imitation/bin/pip install -r benchmark/peers/requirements.txt

docs/results.md has the command that runs the peers in turn with our scripts.

A run writes metrics.csv and summary.json under the names that our scripts use: the same 100-step episodes, 20 of them
with the mean action every 50,000 steps, left out of the time, and at the end 100 with the mean action and 100 sampled.

`--settings own`: the tuned ones that its authors publish for HalfCheetah in its repository's benchmarking/ folder
(*_seals_half_cheetah_best_hp_eval.json; their `demo_batch_size` of 8,192 does not fit 5,000 demonstrated steps: 4,096
here). `--settings ours`: those of gail_ppo.py as far as it can express them. It cannot: the gradient penalty,
LayerNorm, the bound on PPO's ratio, the standard deviation by state, statistics of D's input fixed by the
demonstrations (its own are running ones).
"""

import csv
import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from imitation.algorithms import bc
from imitation.algorithms.adversarial.gail import GAIL
from imitation.data.types import Trajectory
from imitation.policies.base import FeedForward32Policy, NormalizeFeaturesExtractor
from imitation.rewards.reward_nets import BasicRewardNet, NormalizedRewardNet
from imitation.util.networks import RunningNorm
from imitation.util.util import make_vec_env
from stable_baselines3 import PPO
from stable_baselines3.ppo import MlpPolicy

COLUMNS = ["global_step", "charts/episodic_return", "eval/return_mean", "disc/expert_prob", "disc/policy_prob"]
EPISODE = 100  # steps


@dataclass
class Args:
    method: Literal["gail", "bc", "expert"] = "gail"
    """expert: no learning, how much our expert earns under this version of MuJoCo"""
    settings: Literal["own", "ours"] = "own"
    """imitation's tuned settings, or gail_ppo.py's as far as it has them"""
    seed: int = 1
    total_timesteps: int = 500_000
    """environment steps of GAIL"""
    demos: str = "data/halfcheetah-v4_sac_stochastic-one.npz"
    expert: str = "data/expert.pt"
    output_dir: str = "runs"
    run_name: str = "imitation"
    threads: int = 1
    """threads of torch"""


def read_trajectories(path: str) -> tuple[list[Trajectory], dict, float]:
    """Our demonstrations as imitation's trajectories, their metadata and their mean return."""
    with np.load(path, allow_pickle=False) as file:
        fields = dict(file)
    lengths = fields["lengths"]
    observations = np.split(fields["observations"], np.cumsum(lengths + 1)[:-1])
    actions = np.split(fields["actions"], np.cumsum(lengths)[:-1])
    ends = fields["terminated"].tolist()
    trajectories = [Trajectory(o, a, infos=None, terminal=end) for o, a, end in zip(observations, actions, ends)]
    mean_return = float(np.add.reduceat(fields["rewards"].astype(np.float64), np.cumsum(lengths) - lengths).mean())
    return trajectories, json.loads(str(fields["metadata"][()])), mean_return


def evaluate(act, episodes: int, seed: int) -> np.ndarray:
    """True returns (episodes,) of act: observations (B, O) -> actions (B, A) in bounds."""
    envs = gym.vector.SyncVectorEnv([lambda: gym.make("HalfCheetah-v4", max_episode_steps=EPISODE)] * episodes)
    obs, _ = envs.reset(seed=seed)
    returns = np.zeros(episodes)
    for _ in range(EPISODE):
        obs, rewards, _, _, _ = envs.step(act(obs))
        returns += rewards
    return returns


def expert_actions(path: str):
    """collect_expert_sac.py's policy.pt as a function (obs, noise in standard deviations) -> action."""
    policy = torch.load(path, weights_only=True)["actor"]
    layers = [(policy[f"net.{i}.weight"], policy[f"net.{i}.bias"]) for i in (0, 2, 4)]

    def act(obs: np.ndarray, sampled: bool, rng: np.random.Generator) -> np.ndarray:
        x = (torch.as_tensor(obs, dtype=torch.float32) - policy["mean"]) / policy["std"]
        for i, (weight, bias) in enumerate(layers):
            x = torch.nn.functional.linear(torch.relu(x) if i else x, weight, bias)
        mean, log_std = x.chunk(2, dim=-1)
        std = torch.exp(-5 + 0.5 * 7 * (torch.tanh(log_std) + 1))
        noise = torch.as_tensor(rng.standard_normal(mean.shape), dtype=torch.float32)
        return torch.tanh(mean + sampled * std * noise).numpy()

    return act


def make_gail(args: Args, trajectories: list[Trajectory], rng: np.random.Generator) -> GAIL:
    own = args.settings == "own"
    venv = make_vec_env("HalfCheetah-v4", rng=rng, n_envs=8 if own else 32, max_episode_steps=EPISODE)
    normalized_input = {
        "features_extractor_class": NormalizeFeaturesExtractor,
        "features_extractor_kwargs": {"normalize_class": RunningNorm},
    }
    if own:
        ppo = {"n_steps": 512, "batch_size": 64, "n_epochs": 5, "learning_rate": 0.00026250519057717037}
        ppo |= {"clip_range": 0.1, "ent_coef": 3.992371122209408e-6, "gae_lambda": 0.95, "gamma": 0.95}
        ppo |= {"max_grad_norm": 0.8, "vf_coef": 0.11483689492120866, "policy": FeedForward32Policy}
        ppo |= {"policy_kwargs": normalized_input}
        disc, rounds = {}, {"demo_batch_size": 4096, "gen_replay_buffer_capacity": 512, "n_disc_updates_per_round": 8}
    else:
        ppo = {"n_steps": 100, "batch_size": 640, "n_epochs": 8, "learning_rate": 3e-3, "clip_range": 0.2}
        ppo |= {"gae_lambda": 0.8, "gamma": 0.9, "max_grad_norm": 0.5, "vf_coef": 0.5, "policy": MlpPolicy}
        networks = {"net_arch": [128, 128], "activation_fn": torch.nn.SiLU, "log_std_init": -0.5}
        ppo |= {"policy_kwargs": networks | normalized_input}
        disc = {"hid_sizes": (128, 128), "activation": torch.nn.SiLU}
        rounds = {"demo_batch_size": 512, "n_disc_updates_per_round": 20, "disc_opt_kwargs": {"lr": 3e-3}}
    reward = BasicRewardNet(venv.observation_space, venv.action_space, normalize_input_layer=RunningNorm, **disc)
    return GAIL(
        demonstrations=trajectories,
        venv=venv,
        gen_algo=PPO(env=venv, seed=args.seed, device="cpu", **ppo),
        reward_net=NormalizedRewardNet(reward, RunningNorm),
        allow_variable_horizon=True,
        **rounds,
    )


def train_gail(args: Args, trajectories: list[Trajectory], rng: np.random.Generator, writer: csv.DictWriter):
    """Returns the policy, (step, mean return) of the evaluations, and the seconds that learning took without them."""
    gail = make_gail(args, trajectories, rng)
    learner, evaluations, evaluating = gail.gen_algo, [], 0.0
    a_round = gail.gen_train_timesteps
    last = args.total_timesteps // a_round * a_round

    def after_round(number: int) -> None:
        nonlocal evaluating
        step = (number + 1) * a_round
        if args.settings == "ours":  # Stable-Baselines3 begins its own schedule anew in every round
            learner.lr_schedule = lambda _: 3e-3 * (1 - (step / last) ** 3)
        if step // 50_000 > (step - a_round) // 50_000 or step == last:
            began = time.perf_counter()
            returns = evaluate(lambda obs: learner.predict(obs, deterministic=True)[0], 20, args.seed + 10_000)
            evaluations.append((step, float(returns.mean())))
            writer.writerow({"global_step": step, "eval/return_mean": returns.mean()})
            evaluating += time.perf_counter() - began

    began = time.perf_counter()
    gail.train(args.total_timesteps, callback=after_round)
    return learner.policy, evaluations, time.perf_counter() - began - evaluating


def train_bc(args: Args, trajectories: list[Trajectory], rng: np.random.Generator):
    """Returns the policy and the seconds that learning took."""
    env = gym.make("HalfCheetah-v4")
    policy = FeedForward32Policy(
        observation_space=env.observation_space,
        action_space=env.action_space,
        lr_schedule=lambda _: 0.0,  # BC has an optimizer of its own
        features_extractor_class=NormalizeFeaturesExtractor,
        features_extractor_kwargs={"normalize_class": RunningNorm},
    )
    trainer = bc.BC(
        observation_space=env.observation_space,
        action_space=env.action_space,
        rng=rng,
        policy=policy,
        demonstrations=trajectories,
        batch_size=64,
        optimizer_kwargs={"lr": 0.008056922426724927},
        l2_weight=0.005728455628518169,
        device="cpu",
    )
    began = time.perf_counter()
    trainer.train(n_epochs=20, progress_bar=False)
    return trainer.policy, time.perf_counter() - began


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    trajectories, metadata, demos_mean = read_trajectories(args.demos)
    folder = Path(args.output_dir) / args.run_name
    folder.mkdir(parents=True)
    evaluations, seconds = [], 0.0
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        if args.method == "gail":
            policy, evaluations, seconds = train_gail(args, trajectories, rng, writer)
        elif args.method == "bc":
            policy, seconds = train_bc(args, trajectories, rng)
        writer.writerow({})  # our scripts end with the row of the final evaluation
    expert = expert_actions(args.expert)

    def final(sampled: bool) -> np.ndarray:
        def act(obs: np.ndarray) -> np.ndarray:
            if args.method == "expert":
                return expert(obs, sampled, rng)
            return policy.predict(obs, deterministic=not sampled)[0]

        return evaluate(act, 100, args.seed + 20_000 + 10_000 * sampled)

    returns, sampled = final(False), final(True)
    space = gym.make("HalfCheetah-v4").action_space
    drawn = evaluate(lambda obs: rng.uniform(space.low, space.high, (len(obs), *space.shape)), 20, args.seed)
    random_mean = float(drawn.mean())
    names = ("imitation", "stable-baselines3", "torch", "mujoco", "gymnasium", "numpy")
    expert_mean = metadata["expert_return_mean"]
    summary = {"eval/return_mean": returns.mean(), "eval/return_std": returns.std()}
    summary |= {"eval/return_sampled_mean": sampled.mean(), "random_return_mean": random_mean}
    summary |= {"demos_return_mean": demos_mean, "expert_return_mean": expert_mean}
    summary |= {"seconds": seconds, "versions": " ".join(f"{name} {version(name)}" for name in names)}
    if evaluations:
        best = max(evaluations, key=lambda pair: pair[1])
        summary |= {"best/return_mean": best[1], "best/step": best[0], "env_steps": evaluations[-1][0]}
        summary |= {"charts/SPS": evaluations[-1][0] / seconds}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
