"""gail_ppo.py: every function against a closed form or a slow version of its own; then the behaviour of whole runs."""

import copy
import csv
import json
import math
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import DEMOS, ROOT, make_demo_fields
from mujoco.batch import Batch  # noqa: F401  (a clear failure here if MuJoCo is too old)

import gail_pixels_ae
import gail_ppo as g
import gail_state_seq

TINY = ["--total-timesteps", "3200", "--num-envs", "8", "--eval-interval", "1600", "--eval-episodes", "4"]
TINY += ["--update-epochs", "2", "--disc-steps", "4", "--checkpoint-interval", "1600", "--threads", "1"]


def run(tmp_path, name, *flags) -> dict:
    """One in-process run; returns its summary."""
    g.main([*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", name, *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir, without_times=True) -> list[dict]:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    drop = ["charts/SPS"] if without_times else []
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def a_task(obs_dim=17, action_dim=6, low=-1.0, high=1.0, discrete=False) -> dict:
    """What an agent wants to know of demonstrations; these leave observations and actions as they are."""
    task = {"obs": np.zeros((2, obs_dim)) + [[-1.0], [1.0]], "actions": np.zeros((2, action_dim)) + [[-1.0], [1.0]]}
    return task | {"low": np.full(action_dim, low), "high": np.full(action_dim, high), "discrete": discrete}


def an_agent(obs_dim=17, action_dim=6, hidden_size=8, seed=0, **task) -> g.Agent:
    return g.Agent(a_task(obs_dim, action_dim, **task), hidden_size, torch.Generator().manual_seed(seed))


def a_disc(input_dim, hidden_size=32, seed=0) -> g.Discriminator:
    return g.Discriminator(input_dim, hidden_size, torch.Generator().manual_seed(seed))


def first_episodes(envs, seed=0, limit=1000) -> dict:
    obs, _ = envs.reset(seed=seed)
    episodes = {"obs": torch.from_numpy(obs), "return": torch.zeros(len(obs), dtype=torch.float64), "limit": limit}
    return episodes | {"length": torch.zeros(len(obs), dtype=torch.int64)}


def no_visits() -> dict:
    return {"expert": torch.tensor([100, 0]), "policy": torch.zeros(2)}


# Environment


def test_batch_environment_equals_gymnasium_through_resets():
    envs = g.BatchHalfCheetah(3, 40, threads=2)
    reference = gym.make("HalfCheetah-v4").unwrapped
    reference.reset(seed=0)
    rng = np.random.default_rng(1)
    obs, _ = envs.reset(seed=0)
    for t in range(100):
        if t % 40 == 0:  # a new episode began: start the reference from the same state
            reference.reset()
            reference.set_state(envs.qpos[1].copy(), envs.qvel[1].copy())
        np.testing.assert_allclose(obs[1], reference._get_obs(), rtol=0, atol=1e-9)
        actions = rng.uniform(-1, 1, (3, 6)).astype(np.float32)
        obs, reward, terminated, truncated, info = envs.step(actions)
        expected_obs, expected_reward, _, _, _ = reference.step(actions[1])
        np.testing.assert_allclose(info["final_obs"][1], expected_obs, rtol=0, atol=1e-9)
        final_state = np.concatenate([reference.data.qpos, reference.data.qvel])
        np.testing.assert_allclose(info["final_states"][1], final_state, rtol=0, atol=1e-9)
        assert abs(reward[1] - expected_reward) < 1e-6  # gymnasium's control cost is in float32
        assert truncated.all() == truncated.any() == ((t + 1) % 40 == 0)
        assert not terminated.any()


def test_batch_environment_has_gymnasiums_spaces():
    envs, reference = g.BatchHalfCheetah(2, 10, 1), gym.make("HalfCheetah-v4")
    assert envs.single_action_space == reference.action_space
    assert envs.single_observation_space == reference.observation_space


def test_batch_environment_starts_like_gymnasium():
    envs = g.BatchHalfCheetah(4000, 100, threads=2)
    envs.reset(seed=0)
    assert np.abs(envs.qpos - envs.model.qpos0).max() <= 0.1
    np.testing.assert_allclose((envs.qpos - envs.model.qpos0).std(), 0.1 / math.sqrt(3), rtol=0.02)
    np.testing.assert_allclose(envs.qvel.std(), 0.1, rtol=0.02)


@pytest.mark.parametrize("threads", [1, 2])
def test_batch_environment_is_bit_identical_at_any_thread_count_and_after_restore(threads):
    def play(envs, steps, rng):
        return np.stack([envs.step(rng.uniform(-1, 1, (5, 6)))[0] for _ in range(steps)])

    envs, other = g.BatchHalfCheetah(5, 30, 1), g.BatchHalfCheetah(5, 30, threads)
    envs.reset(seed=0)
    play(envs, 17, np.random.default_rng(3))
    other.set_state(envs.get_state())
    after = (play(x, 40, np.random.default_rng(4)) for x in (envs, other))
    np.testing.assert_array_equal(*after)


def test_a_reset_forgets_what_was_before():
    envs = g.BatchHalfCheetah(3, 30, 1)
    first, _ = envs.reset(seed=5)
    course = [envs.step(np.ones((3, 6)))[0] for _ in range(20)]
    assert (envs.reset()[0] != first).any()  # without a seed the random numbers go on
    again, _ = envs.reset(seed=5)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(course, [envs.step(np.ones((3, 6)))[0] for _ in range(20)])


def test_gymnasium_environments_report_the_true_final_observation():
    agent = an_agent(11, 3)
    envs = g.make_envs({"env_id": "Hopper-v4", "max_episode_steps": 3}, 2, threads=1)
    generator = torch.Generator().manual_seed(0)
    rollout, log = g.collect(envs, agent, first_episodes(envs), 6, generator)
    assert rollout["ended"][:, 0].tolist() == [False, False, True, False, False, True]
    assert not rollout["terminated"].any()
    jumps = (rollout["obs"][1:] != rollout["next_obs"][:-1]).any(-1)
    assert torch.equal(jumps, rollout["ended"][:-1])
    assert (rollout["steps_left"] == 1000 - torch.tensor([1, 2, 3, 1, 2, 3])[:, None]).all()
    rewards = rollout["env_reward"].double()
    expected = torch.cat([rewards[:3].sum(0), rewards[3:].sum(0)]).mean().item()
    assert log["charts/episodic_return"] == pytest.approx(expected, abs=1e-5)


def test_terminations_reach_the_rollout():
    envs = g.make_envs({"env_id": "Hopper-v4", "max_episode_steps": 1000}, 4, threads=1)
    generator = torch.Generator().manual_seed(0)
    rollout, _ = g.collect(envs, an_agent(11, 3), first_episodes(envs), 200, generator)
    assert rollout["terminated"].any() and torch.equal(rollout["ended"], rollout["terminated"])


# Demonstrations


def load(path, num_demos=0, seed=0, required=("actions",), env_id="HalfCheetah-v4") -> dict:
    args = g.Args(demos=path, num_demos=num_demos, seed=seed, env_id=env_id)
    return g.load_demos(args, list(required))


def test_demonstrations_are_read_whole_and_by_number(demo_file):
    fields, everything = make_demo_fields(), load(demo_file())
    np.testing.assert_array_equal(everything["observations"], fields["observations"])
    steps = np.delete(fields["observations"], [5, 9, 14], axis=0)
    np.testing.assert_array_equal(everything["obs"], steps)
    expected = [fields["rewards"][:5].sum(), fields["rewards"][5:8].sum(), fields["rewards"][8:].sum()]
    np.testing.assert_allclose(everything["returns"], expected, rtol=1e-6)

    one = load(demo_file(), num_demos=1)
    episode = {5: 0, 3: 1, 4: 2}[one["lengths"][0]]
    np.testing.assert_array_equal(one["actions"], np.split(fields["actions"], [5, 8])[episode])
    observations = np.split(fields["observations"], [6, 10])[episode]
    np.testing.assert_array_equal(one["observations"], observations)
    np.testing.assert_array_equal(one["obs"], observations[:-1])
    assert one["returns"] == pytest.approx(expected[episode])


def test_different_seeds_draw_different_demonstrations(demo_file):
    path = demo_file()
    assert {int(load(path, 1, seed)["lengths"][0]) for seed in range(20)} == {5, 3, 4}


def test_a_set_without_rewards_has_unknown_returns(demo_file):
    assert np.isnan(load(demo_file(rewards=None))["returns"]).tolist() == [True] * 3


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-6, 0), (1e6, 0), (1, 1e5), (0.1, 1e5)])
def test_standardizing_does_not_depend_on_units(scale, offset):
    plain = np.random.default_rng(0).normal(size=(20_000, 2))
    told = scale * plain + offset
    x, y = torch.from_numpy(plain), torch.from_numpy(told)
    expected = g.Standardize(plain)(x)
    np.testing.assert_allclose(g.Standardize(told)(y), expected, atol=1e-4)
    np.testing.assert_allclose(expected.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(expected.std(0, correction=0), 1, rtol=1e-6)
    undone = g.Standardize(told).undo(g.Standardize(told)(y))
    np.testing.assert_allclose(undone, told, rtol=1e-6, atol=1e-4 * scale)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3e5])
def test_what_does_not_vary_in_the_demonstrations_has_no_influence(constant):
    data = np.random.default_rng(0).normal(size=(1000, 2))
    data[:, 1] = constant * (1 + 1e-9 * np.random.default_rng(1).normal(size=1000))  # but for rounding
    standardize = g.Standardize(data)
    noisy = torch.tensor([[0.3, constant], [0.3, constant + 50.0], [0.3, constant - 1e-3]], dtype=torch.float64)
    assert (standardize(noisy)[:, 1] == 0).all() and (standardize(noisy)[:, 0] != 0).all()
    np.testing.assert_allclose(standardize.undo(torch.ones(1, 2))[0, 1], constant, rtol=1e-6, atol=1e-12)


def test_a_set_is_found_beside_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load("data/halfcheetah-v4_sac_stochastic-one.npz")["lengths"]) == 50


def test_demonstrations_of_another_version_of_the_same_body_are_taken_with_a_warning(demo_file):
    with pytest.warns(UserWarning, match="HalfCheetah-v4 are used in HalfCheetah-v5"):
        assert load(demo_file(), env_id="HalfCheetah-v5")["env_id"] == "HalfCheetah-v5"


def test_an_environment_has_its_name_with_or_without_its_module(demo_file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(demo_file(), env_id="gymnasium:HalfCheetah-v4")["env_id"] == "gymnasium:HalfCheetah-v4"
        told = demo_file(make={"env_id": "gymnasium:HalfCheetah-v4"})
        assert load(told)["env_id"] == "HalfCheetah-v4"
    with pytest.raises(g.UserError, match="recorded in Hopper-v4"):
        load(demo_file(make={"env_id": "Hopper-v4"}), env_id="gymnasium:HalfCheetah-v4")


def test_a_rare_action_can_be_executed_and_a_rare_observation_does_not_flatten_the_others():
    data = np.zeros((1000, 2))
    data[:, 0], data[3, 1] = np.random.default_rng(0).normal(size=1000), 1.0  # 32 deviations
    x = torch.from_numpy(data)
    whole, clipped = g.Standardize(data, whole=True), g.Standardize(data)
    np.testing.assert_allclose(whole.undo(whole(x)), data, atol=1e-6)
    assert (whole(x)[:, 0] == clipped(x)[:, 0]).all() and clipped(x).max() == g.INPUT_CLIP
    task = a_task(2, 2) | {"actions": data, "low": -np.ones(2), "high": np.ones(2)}
    agent = g.Agent(task, 8, torch.Generator())
    assert agent.execute(agent.standardize_action(x))[3, 1] == pytest.approx(1.0)
    assert agent.standardize.std.max() < 2


def envs_with(space) -> gym.vector.VectorEnv:
    envs = gym.vector.VectorEnv()
    envs.single_observation_space, envs.single_action_space = gym.spaces.Box(-1, 1, (3,)), space
    return envs


def test_actions_out_of_bounds_are_cut_with_a_warning():
    envs = envs_with(gym.spaces.Box(-1.0, 1.0, (2,)))
    demos = {"obs": np.random.default_rng(0).normal(size=(100, 3)), "actions": np.zeros((100, 2), np.float32)}
    demos["actions"][:30, 0] = 57.0
    with pytest.warns(UserWarning, match="15% of the demonstrated actions, 0 to 57, lie outside"):
        g.match_demos(demos, envs)
    assert demos["actions"].max() == 1 and not demos["discrete"]
    demos["actions"] = np.full((100, 2), 1 + 1e-7)  # rounding is no mistake
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g.match_demos(demos, envs)


def test_discrete_actions_become_one_hot_vectors():
    envs = envs_with(gym.spaces.Discrete(3))
    demos = {"obs": np.zeros((2, 3)), "actions": np.array([2, 0])}
    g.match_demos(demos, envs)
    assert demos["discrete"] and demos["actions"].tolist() == [[0, 0, 1], [1, 0, 0]]
    for bad in (np.array([3, 0]), np.array([-1, 0]), np.array([0.0, 1.0])):
        with pytest.raises(g.UserError, match="whole numbers"):
            g.match_demos({"obs": np.zeros((2, 3)), "actions": bad}, envs)


@pytest.mark.parametrize(("bound", "expected"), [(2.0, 2.0), (np.inf, 1.0)])
def test_without_actions_the_bounds_tell_their_scale(bound, expected):
    demos = {"obs": np.zeros((2, 3))}
    g.match_demos(demos, envs_with(gym.spaces.Box(-bound, bound, (2,))))
    np.testing.assert_array_equal(g.Standardize(demos["actions"]).std, [expected] * 2)


# Pure functions


def slow_gae(rewards, values, next_values, ended, gamma, lam):
    """The definition: A_t = sum_l (gamma lambda)^l delta_{t+l}, up to the end of the episode."""
    steps, envs = rewards.shape
    advantages = np.zeros((steps, envs))
    for n in range(envs):
        for t in range(steps):
            for k in range(t, steps):
                delta = rewards[k, n] + gamma * next_values[k, n] - values[k, n]
                advantages[t, n] += (gamma * lam) ** (k - t) * delta
                if ended[k, n]:
                    break
    return advantages


def test_gae_equals_its_definition_at_an_episodes_and_a_rollouts_end():
    rng = np.random.default_rng(0)
    shape = (12, 3)
    rewards, values, next_values = rng.normal(size=(3, *shape))
    ended = rng.random(shape) < 0.3
    assert ended.any() and not ended[-1].all()
    tensors = [torch.tensor(x) for x in (rewards, values, next_values, ended)]
    advantages, returns = g.compute_gae(*tensors, 0.9, 0.8)
    expected = slow_gae(rewards, values, next_values, ended, 0.9, 0.8)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), expected + values, atol=1e-12)


def test_gae_of_a_constant_reward_tends_to_the_geometric_sum():
    steps, gamma = 2000, 0.95
    zeros, nothing = torch.zeros(steps, 1, dtype=torch.float64), torch.zeros(steps, 1, dtype=torch.bool)
    _, returns = g.compute_gae(zeros + 1, zeros, zeros, nothing, gamma, 1.0)
    assert abs(returns[0, 0].item() - 1 / (1 - gamma)) < 1e-9


def test_gradient_penalty_of_a_linear_network():
    disc = nn.Linear(3, 1, bias=False)
    disc.weight.data = torch.tensor([[3.0, 0.0, 4.0]])  # gradient norm 5 everywhere
    penalty = g.gradient_penalty(disc, torch.randn(7, 3), torch.randn(7, 3), torch.rand(7, 1))
    assert abs(penalty.item() - 16.0) < 1e-5
    penalty.backward()
    np.testing.assert_allclose(disc.weight.grad.numpy(), [[2 * 4 * 0.6, 0, 2 * 4 * 0.8]], rtol=1e-5)


def test_gradient_penalty_looks_between_the_two_sides():
    class Recorder(nn.Module):
        def forward(self, x):
            self.seen = x.detach()
            return x.square().sum(-1)

    disc = Recorder()
    g.gradient_penalty(disc, torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([[0.25], [1.0]]))
    np.testing.assert_allclose(disc.seen.numpy(), [[0.25], [1.0]])


def test_discriminator_loss_closed_forms():
    zero = torch.zeros(5)
    assert abs(g.discriminator_loss(zero, zero).item() - 2 * math.log(2)) < 1e-6
    right, wrong = g.discriminator_loss(zero + 3, zero - 3), g.discriminator_loss(zero - 3, zero + 3)
    assert right < 0.1 and wrong > 6  # the expert's side is the positive one
    d = torch.sigmoid(torch.tensor([0.7, -1.2]))
    loss = g.discriminator_loss(torch.tensor([0.7, -1.2]), torch.tensor([0.7, -1.2]))
    assert loss.item() == pytest.approx(-(d.log().mean() + (1 - d).log().mean()).item(), rel=1e-5)


def test_reward_equals_its_definition_and_stays_finite():
    logit = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(g.imitation_reward(logit), -torch.log(1 - torch.sigmoid(logit)), rtol=0, atol=1e-9)
    extreme = g.imitation_reward(torch.tensor([-1e4, 1e4]))
    assert torch.isfinite(extreme).all() and extreme[1] > extreme[0]  # like the expert is always better


def test_gaussian_log_prob_and_entropy_equal_torch():
    mean, log_std, action = torch.randn(4, 3), torch.randn(3), torch.randn(4, 3)
    reference = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    np.testing.assert_allclose(g.gaussian_log_prob(action, mean, log_std), reference.log_prob(action), rtol=1e-4)
    np.testing.assert_allclose(g.gaussian_entropy(log_std), reference.entropy()[0], rtol=1e-5)


def test_log_prob_and_entropy_of_discrete_actions_equal_torch():
    agent, output = an_agent(3, 4, discrete=True), torch.randn(5, 4)
    index = torch.tensor([0, 1, 2, 3, 1])
    log_prob, entropy = agent.log_prob_and_entropy(output, nn.functional.one_hot(index, 4).float())
    reference = torch.distributions.Categorical(logits=output)
    np.testing.assert_allclose(log_prob, reference.log_prob(index), rtol=1e-5)
    np.testing.assert_allclose(entropy, reference.entropy(), rtol=1e-5)


def test_discrete_actions_are_drawn_by_their_probabilities():
    agent, generator = an_agent(3, 4, discrete=True), torch.Generator().manual_seed(0)
    output = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(20_000, -1)
    shares = agent.sample(output, generator).mean(0)
    np.testing.assert_allclose(shares, output[0].softmax(-1), atol=0.01)
    assert agent.sample(output, None)[0].tolist() == [0, 0, 0, 1]
    assert agent.for_envs(agent.execute(agent.sample(output[:2], None))).tolist() == [3, 3]


def test_the_policys_deviation_begins_as_asked_hangs_on_the_state_and_is_bounded():
    agent, obs = an_agent(hidden_size=16), torch.randn(50, 17)
    mean, log_std = agent.gaussian(agent.actor(obs))
    assert mean.shape == log_std.shape == (50, 6)
    np.testing.assert_allclose(log_std.detach(), g.INITIAL_LOG_STD, atol=0.1)
    assert (log_std.std(0) > 0).all()
    agent.actor[-1].bias.data[6:] = torch.tensor([-99.0, 99, 0, 0, 0, 0])
    log_std = agent.gaussian(agent.actor(obs))[1]
    assert (log_std[:, 0] == g.LOG_STD_MIN).all() and (log_std[:, 1] == g.LOG_STD_MAX).all()


def test_policy_loss_inside_and_beyond_the_clip():
    advantage = torch.tensor([2.0])

    def loss_and_slope(ratio, advantage):
        log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
        loss = g.ppo_policy_loss(log_ratio, advantage, 0.2)
        loss.backward()
        return loss.item(), log_ratio.grad.item()

    assert loss_and_slope(1.0, advantage) == pytest.approx((-2.0, -2.0))
    assert loss_and_slope(1.5, advantage) == pytest.approx((-2.4, 0.0))  # no more to gain
    assert loss_and_slope(0.5, -advantage) == pytest.approx((1.6, 0.0))
    assert loss_and_slope(0.5, advantage) == pytest.approx((-1.0, -1.0))  # but still to repair
    assert loss_and_slope(1.5, -advantage) == pytest.approx((3.0, 3.0))


def test_rewards_are_normalized_as_numpy_would_over_their_window():
    rng, recent = np.random.default_rng(0), deque(maxlen=3)
    batches = [rng.normal(3 * i, 1 + i, (4, 5)) for i in range(6)]
    recent.extend(torch.tensor(batch) for batch in batches)
    seen, x = np.stack(batches[-3:]), torch.tensor(batches[-1])
    centered = (batches[-1] - seen.mean()) / seen.std()
    np.testing.assert_allclose(g.normalize(x, recent), centered, rtol=1e-5)


def test_the_report_knows_the_best_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(g, "final_evaluation", lambda *args: [np.ones(2), np.ones(2)])
    monkeypatch.setattr(g, "plot_curves", lambda *args: None)
    curve = [(1, 0.5), (2, 0.95), (3, 0.8), (4, 0.95), (5, 0.9)]
    rows = [{"global_step": step, "eval/return_mean": 10 * x, "eval/normalized_score": x} for step, x in curve]
    demos = {"returns": np.full(3, 10.0), "random_return": 0.0}
    summary = g.report(None, demos, rows, 5.0, g.Args(), tmp_path)
    assert summary["best/step"] == 2 and summary["charts/SPS"] == 1 and summary["eval/normalized_score"] == 0.1


# The steps of the loop


def disc_args(**changes):
    return g.Args(disc_batch_size=64, **{"grad_penalty_coef": 0.1} | changes)


def rollout_of(x: torch.Tensor) -> dict:
    """A rollout whose pairs are x (B, X): the last column is the action."""
    return {"obs": x[None, :, :-1], "executed": x[None, :, -1:]}


def test_discriminator_separates_separable_data():
    generator, disc = torch.Generator().manual_seed(0), a_disc(2)
    expert = torch.randn(500, 2, generator=generator) + torch.tensor([3.0, 0.0])
    policy = torch.randn(500, 2, generator=generator) - torch.tensor([3.0, 0.0])
    optimizer = torch.optim.Adam(disc.parameters(), 3e-3)
    rollout = rollout_of(policy)
    log = g.update_discriminator(disc, optimizer, expert, rollout, 200, disc_args(), generator)
    with torch.no_grad():
        assert (disc(expert) > 0).float().mean() > 0.95 and (disc(policy) < 0).float().mean() > 0.95
    assert log["disc/expert_prob"] > 0.8 > 0.2 > log["disc/policy_prob"]
    assert log["disc/expert_acc"] > 0.9 and log["disc/policy_acc"] > 0.9


def test_two_steps_of_the_discriminator_equal_plain_ones():
    """The same minibatches, drawn in the same order, and PyTorch's own cross-entropy."""
    expert, policy = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1))
    one, other = a_disc(3), a_disc(3)
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    args, generator = disc_args(grad_penalty_coef=0.5), torch.Generator().manual_seed(2)
    log = g.update_discriminator(one, optimizer, expert, rollout_of(policy), 2, args, generator)
    optimizer, generator = torch.optim.SGD(other.parameters(), 0.1), torch.Generator().manual_seed(2)
    for _ in range(2):
        x, y = (side[torch.randint(40, (64,), generator=generator)] for side in (expert, policy))
        between = (y + torch.rand(64, 1, generator=generator) * (x - y)).requires_grad_(True)
        (grad,) = torch.autograd.grad(other(between).sum(), between, create_graph=True)
        penalty = ((grad.square().sum(1).sqrt() - 1) ** 2).mean()
        loss = F.binary_cross_entropy_with_logits(other(x), torch.ones(64))
        loss = loss + F.binary_cross_entropy_with_logits(other(y), torch.zeros(64))
        optimizer.zero_grad()
        (loss + 0.5 * penalty).backward()
        optimizer.step()
    for a, b in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)
    assert log["disc/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["disc/grad_penalty"] == pytest.approx(penalty.item(), rel=1e-4)


def test_discriminator_settles_at_two_log_two_on_identical_data():
    generator, disc = torch.Generator().manual_seed(0), a_disc(2)
    data = torch.randn(500, 2, generator=generator)
    optimizer = torch.optim.Adam(disc.parameters(), 1e-3)
    args = disc_args(grad_penalty_coef=0.0)
    g.update_discriminator(disc, optimizer, data, rollout_of(data), 500, args, generator)
    with torch.no_grad():
        assert g.discriminator_loss(disc(data), disc(data)).item() == pytest.approx(2 * math.log(2), abs=0.02)


def toy_rollout(steps=4, envs=3):
    shape = (steps, envs)
    obs, action = torch.randn(*shape, 17), torch.randn(*shape, 6)
    rollout = {"obs": obs, "next_obs": obs, "action": action, "executed": action.clamp(-1, 1)}
    nothing = torch.zeros(shape, dtype=torch.bool)
    rollout |= {"terminated": nothing, "ended": nothing, "log_prob": torch.zeros(shape)}
    rollout["steps_left"] = torch.full(shape, 90)
    return rollout | {"env_reward": torch.randn(shape)}


@pytest.mark.parametrize("source", ["gail", "env", "combined"])
def test_rewards_follow_their_source(source):
    rollout, args, disc = toy_rollout(), g.Args(reward_source=source), a_disc(23)
    recent = {"env": deque(maxlen=10), "gail": deque(maxlen=10)}
    rewards, log = g.compute_rewards(rollout, disc, recent, no_visits(), args)

    def normalized(x, of):
        return (x - of.mean()) / of.std(correction=0)

    with torch.no_grad():
        logit = disc(torch.cat([rollout["obs"], rollout["executed"]], -1))
    steps, ends = 12.5 / 13, 0.5 / 13  # shares of the policy's time; the expert's 100 steps have no end
    offset, end = np.log([(100 + steps) / 101 / steps, ends / 101 / ends])
    gail, after = nn.functional.softplus(logit + offset), math.log1p(math.exp(end))
    expected, absorbing = torch.zeros(4, 3), 0.0
    if source != "gail":
        expected += normalized(rollout["env_reward"], rollout["env_reward"])
        absorbing += normalized(0.0, rollout["env_reward"])
    if source != "env":
        expected += normalized(gail, gail)
        absorbing += normalized(after, gail)
    np.testing.assert_allclose(rewards["steps"], expected, atol=1e-4)
    assert rewards["absorbing"] == pytest.approx(float(absorbing), abs=1e-4)
    assert log["reward/env_mean"] == pytest.approx(rollout["env_reward"].mean().item())
    if source == "gail":
        plain, _ = g.compute_rewards(rollout, disc, recent, no_visits(), g.Args(normalize_reward=False))
        np.testing.assert_allclose(plain["steps"], gail, rtol=1e-5)
        assert plain["absorbing"] == pytest.approx(after, rel=1e-5)


def test_terminal_logits_are_those_of_a_discriminator_that_counts():
    """Against D's best logit for three kinds of steps, one of them absorbing, by their shares."""
    expert, policy = {"a": 300, "b": 100, "absorbing": 600}, {"a": 50, "b": 250, "absorbing": 100}

    def shares(counts, kinds):
        return np.array([counts[kind] for kind in kinds]) / sum(counts[kind] for kind in kinds)

    best = np.log(shares(expert, "a b absorbing".split()) / shares(policy, "a b absorbing".split()))
    of_disc = np.log(shares(expert, "ab") / shares(policy, "ab"))  # which sees no absorbing ones
    offset, absorbing = g.terminal_logits(*(torch.tensor([x["a"] + x["b"], x["absorbing"]]) for x in (expert, policy)))
    np.testing.assert_allclose(of_disc + offset.item(), best[:2], atol=0.01)
    assert absorbing.item() == pytest.approx(best[2], abs=0.01)
    nobody = g.terminal_logits(torch.tensor([5000, 0]), torch.tensor([32_000.0, 0.0]))
    assert nobody.isfinite().all() and abs(nobody[0]) < 1e-3  # where nothing ends, nothing changes
    for falls in (1, 20, 30_000):  # however rare, a fall is not the expert's
        assert g.terminal_logits(torch.tensor([100, 0]), torch.tensor([32_000, falls]))[1] < -4


def test_visits_of_the_whole_run_count():
    rollout, visits = toy_rollout(), {"expert": torch.tensor([100, 0]), "policy": torch.tensor([100.0, 40.0])}
    rollout["terminated"][1, 2] = True  # with 90 steps left
    g.compute_rewards(rollout, a_disc(23), {"gail": deque()}, visits, g.Args())
    assert visits["policy"].tolist() == [100 + 12, 40 + 90]


@pytest.mark.parametrize("expert_ends", [True, False])
def test_an_end_pays_if_it_is_the_experts(expert_ends):
    """Though the rewards are centered."""
    rollout, disc = toy_rollout(), a_disc(23)
    expert_visits = torch.tensor([100, 800]) if expert_ends else torch.tensor([100, 0])
    if not expert_ends:
        rollout["terminated"] = torch.ones(4, 3, dtype=torch.bool)  # the policy falls at every step
    recent = {"env": deque(maxlen=10), "gail": deque(maxlen=10)}
    visits = {"expert": expert_visits, "policy": torch.zeros(2)}
    rewards, _ = g.compute_rewards(rollout, disc, recent, visits, g.Args())
    better = rewards["absorbing"] > rewards["steps"].max()
    assert better if expert_ends else rewards["absorbing"] < rewards["steps"].min()


def test_the_value_of_an_end_is_that_of_the_absorbing_state():
    """One environment that ends at every step: the advantage knows what comes after."""
    seen, agent, rollout = {}, an_agent(hidden_size=16), toy_rollout(4, 1)
    rollout["terminated"] = rollout["ended"] = torch.ones(4, 1, dtype=torch.bool)
    optimizer, args = torch.optim.Adam(agent.parameters(), 1e-2), g.Args(gamma=0.5, num_minibatches=2, num_envs=1)
    gae, values = g.compute_gae, agent.value(rollout["obs"]).detach()
    try:
        g.compute_gae = lambda *x: seen.setdefault("it", gae(*x))
        rewards = {"steps": torch.full((4, 1), 2.0), "absorbing": 3.0}
        g.update_policy(agent, optimizer, rollout, rewards, args, torch.Generator().manual_seed(0))
    finally:
        g.compute_gae = gae
    np.testing.assert_allclose(seen["it"][1], np.full((4, 1), 2 + 0.5 * 3 / (1 - 0.5)), rtol=1e-6)
    np.testing.assert_allclose(seen["it"][0], 5 - values, rtol=1e-5)


def test_the_policys_update_equals_a_plain_one():
    """The same minibatches in the same order, torch.distributions, and no coefficient at its default."""
    args = g.Args(num_minibatches=3, update_epochs=2, clip_coef=0.3, ent_coef=0.05, vf_coef=0.7, max_grad_norm=0.2)
    args.gamma, args.gae_lambda = 0.9, 0.7
    generator, one = torch.Generator().manual_seed(0), an_agent(3, 2)
    obs, next_obs = torch.randn(2, 10, 4, 3, generator=generator)
    action, steps = torch.randn(10, 4, 2, generator=generator), torch.randn(10, 4, generator=generator)
    with torch.no_grad():
        log_prob, _ = one.log_prob_and_entropy(one.actor(obs), action)
        log_prob += 0.4 * torch.randn(10, 4, generator=generator)
        log_prob[2, :2] -= 3.0  # where the bound on the log ratio counts
    ended = torch.rand(10, 4, generator=generator) < 0.2
    terminated = ended & (torch.rand(10, 4, generator=generator) < 0.5)
    assert 0 < terminated.sum() < ended.sum()
    rollout = {"obs": obs, "next_obs": next_obs, "action": action, "log_prob": log_prob}
    rollout |= {"ended": ended, "terminated": terminated}
    other = copy.deepcopy(one)
    optimizer, rewards = torch.optim.SGD(one.parameters(), 0.1), {"steps": steps, "absorbing": 0.4}
    log = g.update_policy(one, optimizer, rollout, rewards, args, torch.Generator().manual_seed(3))

    with torch.no_grad():
        values, next_values = other.critic(obs)[..., 0], other.critic(next_obs)[..., 0]
        next_values = torch.where(terminated, 0.4 / (1 - 0.9), next_values)
        advantages, running = torch.zeros(10, 4), torch.zeros(4)
        for t in range(9, -1, -1):
            running = torch.where(ended[t], 0.0, 0.9 * 0.7 * running)
            running = running + steps[t] + 0.9 * next_values[t] - values[t]
            advantages[t] = running
        returns = advantages + values
    rows = [x.flatten(0, 1) for x in (obs, action, log_prob, advantages, returns)]
    parameters, generator = list(other.parameters()), torch.Generator().manual_seed(3)
    for indices in [x for _ in "ab" for x in torch.randperm(40, generator=generator).tensor_split(3)]:
        x, u, old, a, target = (column[indices] for column in rows)
        mean, log_std = other.actor(x).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.exp())
        log_ratio, a = normal.log_prob(u).sum(-1) - old, (a - a.mean()) / a.std()
        ratio = log_ratio.clamp(max=1.0).exp()
        policy_loss = -torch.where(a > 0, ratio.clamp(max=1.3) * a, ratio.clamp(min=0.7) * a).mean()
        value_loss = 0.5 * (other.critic(x)[:, 0] - target).square().mean()
        entropy = normal.entropy().sum(-1).mean()
        grads = torch.autograd.grad(policy_loss + 0.7 * value_loss - 0.05 * entropy, parameters)
        norm = torch.stack([x.square().sum() for x in grads]).sum().sqrt()
        assert norm > 0.2
        for parameter, grad in zip(parameters, grads):
            parameter.data -= 0.1 * grad * 0.2 / norm
    for a, b in zip(one.parameters(), parameters):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ratio = log_ratio.exp()
    expected = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clipfrac": ((ratio < 0.7) | (ratio > 1.3)).float().mean(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
    }
    assert 0 < expected["clipfrac"] < 1
    assert log == {f"losses/{name}": pytest.approx(x.item(), rel=1e-3, abs=1e-4) for name, x in expected.items()}


def test_rewards_that_are_no_numbers_stop_only_who_needs_them():
    rollout, disc = toy_rollout(), a_disc(23)
    rollout["env_reward"][0, 0] = math.nan
    recent = {"env": deque(maxlen=10), "gail": deque(maxlen=10)}
    rewards, _ = g.compute_rewards(rollout, disc, recent, no_visits(), g.Args())
    assert rewards["steps"].isfinite().all()
    for source in ("env", "combined"):
        with pytest.raises(g.UserError, match="use gail"):
            g.compute_rewards(rollout, disc, recent, no_visits(), g.Args(reward_source=source))


def test_a_constant_reward_does_not_become_a_huge_one():
    constant, nothing = deque([torch.full((100, 64), 0.1)]), deque([torch.zeros(100, 64)])
    assert g.normalize(torch.full((2,), 0.1), constant).abs().max() < 1e-3
    assert g.normalize(torch.full((2,), 0.2), constant).abs().max() <= 1000.1
    assert torch.equal(g.normalize(torch.zeros(2), nothing), torch.zeros(2))


@pytest.mark.parametrize("unit", [1e-9, 1e-4, 1.0, 1e6])
def test_rewards_in_any_unit_become_the_same(unit):
    rewards = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    normalized = g.normalize(unit * rewards, deque([unit * rewards]))
    assert torch.allclose(normalized, (rewards - rewards.mean()) / rewards.std(), atol=1e-3)


def test_an_environment_may_write_into_its_actions():
    """The rollout, and D, keep what the policy did."""

    class Scales(gym.Env):
        observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros(3, np.float32), {}

        def step(self, action):
            action *= 100.0
            return np.zeros(3, np.float32), 0.0, False, False, {}

    gym.register("Scales-v0", Scales)
    task = {"env_id": "Scales-v0", "max_episode_steps": 9}
    envs, rng = g.make_envs(task, 2, 1), np.random.default_rng(0)
    demos = {"obs": rng.normal(size=(20, 3)), "actions": rng.uniform(-1, 1, (20, 2))}
    g.match_demos(demos, envs)
    agent = g.Agent(demos, 8, torch.Generator().manual_seed(0))
    rollout, _ = g.collect(envs, agent, first_episodes(envs), 5, torch.Generator().manual_seed(0))
    assert agent.standardize_action.undo(rollout["executed"]).abs().max() <= 1.0001


@pytest.mark.parametrize("value", [7.0, 3e5 + np.float32(0.03125) * (np.arange(20) == 3)])  # or by rounding alone
def test_what_never_varies_is_named(value):
    demos = {"obs": np.random.default_rng(0).normal(size=(20, 3)), "actions": np.zeros((20, 2))}
    demos["obs"][:, 1] = value
    with pytest.warns(UserWarning, match=r"observations \[1\] never vary"):
        g.match_demos(demos, envs_with(gym.spaces.Box(-1.0, 1.0, (2,))))


def test_discriminator_and_environment_see_the_clipped_action():
    envs, agent = g.BatchHalfCheetah(4, 10, 1), an_agent()
    agent.actor[-1].bias.data[6:] = 1.0
    seen, step = [], envs.step
    envs.step = lambda actions: (seen.append(actions), step(actions))[1]
    rollout, _ = g.collect(envs, agent, first_episodes(envs), 12, torch.Generator().manual_seed(0))
    assert rollout["action"].abs().max() > 1  # PPO keeps what was sampled
    assert rollout["executed"].abs().max() == 1
    np.testing.assert_array_equal(rollout["executed"].numpy(), np.stack(seen))
    np.testing.assert_array_equal(rollout["executed"], rollout["action"].clamp(-1, 1))


def test_what_is_executed_is_in_the_environments_units():
    task = a_task(action_dim=2, low=90.0, high=130.0) | {"actions": np.array([[100.0, 100], [120, 140]])}
    agent = g.Agent(task, 8, torch.Generator().manual_seed(0))
    executed = agent.execute(torch.tensor([[0.0, 0.0], [1.0, 1.0], [-9.0, 0.5]]))
    np.testing.assert_allclose(executed, [[110, 120], [120, 130], [90, 130]])
    np.testing.assert_allclose(agent.standardize_action(executed)[1], [1, 0.5])  # as D sees it


def test_rollout_is_continuous_and_keeps_true_next_observations():
    envs, agent = g.BatchHalfCheetah(3, 5, 1), an_agent()
    episodes, generator = first_episodes(envs), torch.Generator().manual_seed(0)
    first, second = (g.collect(envs, agent, episodes, 7, generator)[0] for _ in range(2))
    obs, next_obs, ended = (torch.cat([first[x], second[x]]) for x in ("obs", "next_obs", "ended"))
    assert ended[:, 0].nonzero().flatten().tolist() == [4, 9]
    same = (obs[1:] == next_obs[:-1]).all(-1)
    assert (same == ~ended[:-1]).all()
    expected = g.gaussian_log_prob(first["action"], *agent.gaussian(agent.actor(first["obs"])))
    np.testing.assert_allclose(first["log_prob"], expected.detach(), rtol=1e-4, atol=1e-4)
    rewards = torch.cat([first["env_reward"], second["env_reward"]]).double()
    np.testing.assert_allclose(episodes["return"], rewards[10:].sum(0), atol=1e-5)


def test_collecting_leaves_the_number_of_threads_as_it_was():
    envs, before = g.BatchHalfCheetah(2, 5, 1), torch.get_num_threads()
    torch.set_num_threads(2)
    g.collect(envs, an_agent(), first_episodes(envs), 1, torch.Generator())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_policy_update_moves_towards_better_actions_and_learns_the_value():
    generator, agent, rollout = torch.Generator().manual_seed(0), an_agent(hidden_size=16), toy_rollout(32, 16)
    with torch.no_grad():
        mean, log_std = agent.gaussian(agent.actor(rollout["obs"]))
        rollout["action"] = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
        rollout["log_prob"] = g.gaussian_log_prob(rollout["action"], mean, log_std)
    rewards = {"steps": rollout["action"][..., 0] + 5, "absorbing": 0.0}  # the larger the first action, the better
    args = g.Args(gamma=0.0, update_epochs=20, num_minibatches=4)
    optimizer = torch.optim.Adam(agent.parameters(), 3e-3)
    log = g.update_policy(agent, optimizer, rollout, rewards, args, generator)
    with torch.no_grad():
        shift = (agent.gaussian(agent.actor(rollout["obs"]))[0] - mean).mean((0, 1))
        assert (agent.value(rollout["obs"]) - 5).abs().mean() < 1.5
    assert shift[0] > 0.1 and shift[0] > 3 * shift[1:].abs().max()
    assert log["losses/approx_kl"] > 0


def test_one_action_that_became_likely_does_not_outweigh_its_minibatch(monkeypatch):
    agent, rollout, seen, loss = an_agent(hidden_size=16), toy_rollout(8, 4), [], g.ppo_policy_loss
    with torch.no_grad():
        log_prob = g.gaussian_log_prob(rollout["action"], *agent.gaussian(agent.actor(rollout["obs"])))
        rollout["log_prob"] = log_prob
        rollout["log_prob"][0, 0] -= 80.0
    rollout["env_reward"][0, 0] = -100.0  # and it is bad

    def watched(log_ratio, advantages, clip_coef):
        seen.append(log_ratio.detach().max().item())
        return loss(log_ratio, advantages, clip_coef)

    monkeypatch.setattr(g, "ppo_policy_loss", watched)
    optimizer, args = torch.optim.Adam(agent.parameters(), 1e-3), g.Args(gamma=0.0, num_minibatches=1, update_epochs=3)
    rewards = {"steps": rollout["env_reward"], "absorbing": 0.0}
    log = g.update_policy(agent, optimizer, rollout, rewards, args, torch.Generator().manual_seed(0))
    assert seen == [g.MAX_LOG_RATIO] * 3 and abs(log["losses/policy_loss"]) < 5


def test_the_value_learns_the_discounted_return():
    agent, rollout, generator = an_agent(hidden_size=16), toy_rollout(8, 4), torch.Generator().manual_seed(0)
    optimizer, args = torch.optim.Adam(agent.parameters(), 1e-2), g.Args(gamma=0.5, num_minibatches=2)
    for _ in range(20):
        g.update_policy(agent, optimizer, rollout, {"steps": torch.ones(8, 4), "absorbing": 0.0}, args, generator)
    assert agent.value(rollout["obs"]).mean().item() == pytest.approx(1 / (1 - 0.5), abs=0.2)


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_entropy_bonus_widens_a_policy_that_nothing_else_moves(ent_coef, monkeypatch):
    agent, rollout = an_agent(hidden_size=16), toy_rollout(8, 4)
    args = g.Args(ent_coef=ent_coef, num_minibatches=2)
    monkeypatch.setattr(g, "ppo_policy_loss", lambda log_ratio, advantages, clip: 0 * log_ratio.sum())
    before = agent.gaussian(agent.actor(rollout["obs"]))[1].detach()
    optimizer = torch.optim.Adam(agent.parameters(), 1e-3)
    rewards = {"steps": rollout["env_reward"], "absorbing": 0.0}
    g.update_policy(agent, optimizer, rollout, rewards, args, torch.Generator().manual_seed(0))
    change = (agent.gaussian(agent.actor(rollout["obs"]))[1] - before).detach()
    assert (change > 1e-3).all() if ent_coef else (change == 0).all()


def test_cloning_fits_the_demonstrated_actions():
    generator, agent = torch.Generator().manual_seed(0), an_agent(hidden_size=64)
    obs = torch.randn(300, 17, generator=generator)
    actions = torch.tanh(obs[:, :6])
    before = (agent.gaussian(agent.actor(obs))[0] - actions).square().mean().item()
    g.clone_behaviour(agent, obs, actions, generator)
    assert (agent.gaussian(agent.actor(obs))[0] - actions).square().mean().item() < 0.1 * before
    agent = an_agent(17, 2, hidden_size=64, discrete=True)
    index = (obs[:, 0] > 0).long()
    g.clone_behaviour(agent, obs, nn.functional.one_hot(index, 2).float(), generator)
    assert (agent.actor(obs).argmax(-1) == index).float().mean() > 0.95


# Whole runs


def test_run_writes_its_files_and_returns_its_summary(tmp_path):
    summary = run(tmp_path, "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "metrics.csv", "summary.json", "checkpoint.pt", "policy.pt", "curves.png",
                     "evaluation.npz"}  # fmt: skip
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [800, 1600, 2400, 3200]
    assert [bool(row["eval/return_mean"]) for row in rows] == [False, True, False, True]
    assert summary["env_steps"] == 3200 and math.isfinite(summary["eval/normalized_score"])
    courses = np.load(tmp_path / "a/evaluation.npz")
    assert courses["mean_action"].shape == courses["sampled"].shape == (100, 4)
    assert courses["mean_action"][-1].mean() == summary["eval/return_mean"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward-source", "env"],
        ["--reward-source", "combined"],
        ["--grad-penalty-coef", "0", "--no-normalize-reward"],
        ["--bc-warm-start", "--burn-in-steps", "20", "--num-demos", "1"],
    ],
)
def test_options_run(tmp_path, flags):
    assert math.isfinite(run(tmp_path, "options", *flags)["eval/return_mean"])


def test_same_seed_same_run_and_another_seed_another(tmp_path):
    for name, flags in (("a", ()), ("b", ()), ("c", ("--seed", "2"))):
        run(tmp_path, name, *flags)
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b != c


def test_demonstrations_of_double_precision_train(tmp_path):
    with np.load(DEMOS) as file:
        fields = {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in file.items()}
    metadata = json.loads(str(fields["metadata"])) | {"expert_return_mean": 700}
    np.savez(tmp_path / "double.npz", **fields | {"metadata": json.dumps(metadata)})
    run(tmp_path, "double", "--demos", str(tmp_path / "double.npz"))
    run(tmp_path, "single")
    double, single = (torch.load(tmp_path / x / "policy.pt", weights_only=True)["agent"] for x in ("double", "single"))
    assert all(torch.equal(double[name], single[name]) for name in single)


class Killed(Exception):
    pass


@pytest.mark.parametrize("flags", [["--threads", "2"], ["--reward-source", "combined", "--num-steps", "70"]])
def test_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, flags):
    run(tmp_path, "whole", *flags)
    calls, update = [], g.update_policy

    def dying_update(*args):
        calls.append(None)
        if len(calls) == 4:  # after a checkpoint and a rollout beyond it
            raise Killed
        return update(*args)

    monkeypatch.setattr(g, "update_policy", dying_update)
    with pytest.raises(Killed):
        run(tmp_path, "killed", *flags)
    monkeypatch.setattr(g, "update_policy", update)
    g.main(["--resume", str(tmp_path / "killed/checkpoint.pt")])
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    whole, killed = (torch.load(tmp_path / name / "policy.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole["agent"][k], killed["agent"][k]) for k in whole["agent"])


def test_a_run_that_fails_at_its_figure_is_not_finished(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(g, "plot_curves", fail)
        run(tmp_path, "a")
    assert not (tmp_path / "a/summary.json").exists()
    fewer = ["--resume", str(tmp_path / "a/checkpoint.pt"), "--total-timesteps", "1600"]
    assert "has come that far" in mistake(capsys, *fewer)
    g.main(["--resume", str(tmp_path / "a/checkpoint.pt")])
    assert (tmp_path / "a/summary.json").exists() and (tmp_path / "a/curves.png").exists()


def test_a_finished_run_goes_on_longer_and_says_that_it_is_finished(tmp_path, capsys):
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    run(tmp_path, "a")
    assert "has come that far" in mistake(capsys, "--resume", checkpoint)
    assert "has come that far" in mistake(capsys, "--resume", checkpoint, "--total-timesteps", "1600")
    g.main(["--resume", checkpoint, "--total-timesteps=4800"])
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == list(range(800, 4801, 800))
    rates = [float(row["charts/learning_rate"]) for row in rows]  # the old schedule, then the new one
    assert rates == pytest.approx([3e-3 * (1 - x**3) for x in (0, 1 / 4, 2 / 4, 3 / 4, 4 / 6, 5 / 6)])
    assert json.loads((tmp_path / "a/config.json").read_text())["total_timesteps"] == 4800
    assert json.loads((tmp_path / "a/summary.json").read_text())["env_steps"] == 4800


def test_a_run_that_was_killed_before_its_summary_gets_it(tmp_path):
    summary = run(tmp_path, "a")
    for name in ("summary.json", "curves.png", "evaluation.npz"):
        (tmp_path / "a" / name).unlink()
    g.main(["--resume", str(tmp_path / "a/checkpoint.pt")])
    assert json.loads((tmp_path / "a/summary.json").read_text()) == summary


def test_evaluate_repeats_the_final_evaluation(tmp_path, capsys):
    run(tmp_path, "a")
    before = dict(np.load(tmp_path / "a/evaluation.npz"))
    capsys.readouterr()
    g.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "4"])
    assert "mean action" in capsys.readouterr().out
    after = np.load(tmp_path / "a/policy.npz")
    assert all((before[name] == after[name]).all() for name in before)
    g.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "2", "--seed", "5"])
    assert np.load(tmp_path / "a/policy.npz")["sampled"].shape == (100, 2)
    kept = np.load(tmp_path / "a/evaluation.npz")  # the run's own
    assert all((before[name] == kept[name]).all() for name in before)


def test_a_saved_policy_is_the_network_and_its_normalization(tmp_path):
    obs = np.random.default_rng(0).normal(size=(9, 17)) * 20
    demo_obs, demo_actions = (
        np.random.default_rng(1).normal(3, 2, (50, 17)),
        np.random.default_rng(2).normal(1, 9, (50, 6)),
    )
    task = a_task(high=2.0) | {"obs": demo_obs, "actions": demo_actions}
    agent = g.Agent(task, 16, torch.Generator().manual_seed(0))
    agent.actor[-1].weight.data *= 100
    saved = {
        "kind": "gail_ppo policy",
        "hidden_size": 16,
        "agent": agent.state_dict(),
        "env_id": "x",
        "discrete": False,
    }
    g.save_atomically(saved, tmp_path / "policy.pt")
    loaded, _ = g.load_agent(str(tmp_path / "policy.pt"))
    np.testing.assert_array_equal(loaded.act(obs), agent.act(obs))
    x = ((obs - demo_obs.mean(0)) / demo_obs.std(0)).clip(-10, 10)
    mean = agent.actor(torch.tensor(x, dtype=torch.float32))[:, :6].detach().numpy()
    mean = demo_actions.mean(0) + demo_actions.std(0) * mean
    np.testing.assert_allclose(agent.act(obs), mean.clip(-1, 2), rtol=1e-4, atol=1e-5)
    assert (agent.act(obs) == -1).any() and (agent.act(obs) == 2).any()
    sampled = [agent.act(obs, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert (sampled[0] == sampled[1]).all() and (sampled[0] != sampled[2]).any()


def test_evaluation_is_frozen_and_repeatable():
    agent, task = an_agent(), {"env_id": "HalfCheetah-v4", "max_episode_steps": 20}
    runs = ((3, True), (3, True), (4, True), (3, False))
    first, second, third, mean = (g.evaluate(agent, task, 5, x, 1, sampled) for x, sampled in runs)
    np.testing.assert_array_equal(first, second)
    assert (third[-1] != first[-1]).all()
    assert (mean[-1] != first[-1]).all()  # the same starts without noise


def test_evaluation_of_episodes_that_end_early_counts_each_step_once():
    """Against gymnasium, one episode after another."""
    agent = an_agent(11, 3)
    agent.actor[-1].weight.data.mul_(30)  # actions that differ, so that lengths do
    env, expected = gym.make("Hopper-v4", max_episode_steps=60), []
    for i in range(5):
        obs, _ = env.reset(seed=7 + i)
        rewards, ended = [], False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs[None])[0])
            rewards.append(reward)
            ended = terminated or truncated
        expected.append(rewards)
    assert len({len(rewards) for rewards in expected}) > 1
    course = g.evaluate(agent, {"env_id": "Hopper-v4", "max_episode_steps": 60}, 5, 7, 1)
    for i, rewards in enumerate(expected):
        np.testing.assert_allclose(course[: len(rewards), i], np.cumsum(rewards), rtol=1e-4)
        np.testing.assert_allclose(course[len(rewards) :, i], sum(rewards), rtol=1e-4)


def test_a_summary_has_no_numbers_that_json_does_not_know(tmp_path, monkeypatch):
    """Where rewards of the mean action are known and those of sampled ones are not."""
    final = g.final_evaluation
    monkeypatch.setattr(g, "final_evaluation", lambda *given: [final(*given)[0], np.full(4, math.nan)])
    run(tmp_path, "a", "--total-timesteps", "1600")
    text = (tmp_path / "a/summary.json").read_text()
    assert "NaN" not in text and "eval/return_mean" in text


def test_rewards_may_be_whole_numbers(demo_file):
    demos = load(demo_file(rewards=np.arange(12)), required=["rewards"])
    assert demos["returns"].sum() == np.arange(12).sum()


def test_sizes_and_step_sizes_reach_their_networks(tmp_path):
    flags = "--hidden-size 16 --learning-rate 2e-3 --no-anneal-lr --disc-hidden-size 24 --disc-learning-rate 1e-4"
    run(tmp_path, "a", *flags.split(), "--total-timesteps", "1600", "--num-minibatches", "4")
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert saved["agent"]["actor.0.weight"].shape == (16, 17) and saved["disc"]["net.0.weight"].shape == (24, 23)
    steps = {}
    for name, rate in (("optimizer", 2e-3), ("disc_optimizer", 1e-4)):
        assert [group["lr"] for group in saved[name]["param_groups"]] == [rate]
        steps[name] = {int(state["step"]) for state in saved[name]["state"].values()}
    assert steps == {"optimizer": {2 * 2 * 4}, "disc_optimizer": {2 * 4}}  # in two rollouts


def test_a_warm_start_begins_near_the_demonstrations(tmp_path, monkeypatch):
    errors, collect, demos = [], g.collect, g.load_demos(g.Args(), ["observations"])

    def noting(envs, agent, *rest):
        if len(errors) < 2:
            errors.append(np.square(agent.act(demos["obs"]) - demos["actions"]).mean())
        return collect(envs, agent, *rest)

    monkeypatch.setattr(g, "collect", noting)
    for i, flags in enumerate(([], ["--bc-warm-start"])):
        del errors[i:]
        run(tmp_path, f"{i}", *flags, "--total-timesteps", "800")
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("module", [g, gail_state_seq, gail_pixels_ae])
@pytest.mark.parametrize("steps, gamma", [(20, 0.9), (400, 0.975), (1100, 0.99)])
def test_the_horizon_follows_the_demonstrations(monkeypatch, demo_file, module, steps, gamma):
    class Stopped(Exception):
        pass

    def stop(script, args, wandb_id):
        assert args.gamma == pytest.approx(gamma)
        raise Stopped

    metadata = json.dumps({"env_id": "HalfCheetah-v4", "max_episode_steps": steps})
    path = demo_file(make={"lengths": (steps,)}, metadata=metadata)
    monkeypatch.setattr(module, "open_run", stop)
    with pytest.raises(Stopped):
        module.train(module.Args(demos=path, threads=1))


def test_flags_reach_the_loop(tmp_path):
    """D burns in once, and the learning rate falls, most of it late, or not at all."""
    flags = ["--num-envs", "4", "--total-timesteps", "3200"]
    run(tmp_path, "a", *flags, "--burn-in-steps", "5")
    rows = rows_of(tmp_path / "a")[:8]
    assert [float(row["charts/learning_rate"]) for row in rows] == pytest.approx(
        [3e-3 * (1 - (i / 8) ** 3) for i in range(8)]
    )
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert saved["disc_optimizer"]["state"][0]["step"] == 5 + 8 * 4  # eight updates of --disc-steps 4
    run(tmp_path, "b", *flags, "--no-anneal-lr")
    assert {row["charts/learning_rate"] for row in rows_of(tmp_path / "b")[:8]} == {"0.003"}


def test_score_is_0_for_random_actions_and_1_for_the_demonstrations():
    demos = {"returns": np.array([-150.0, -130.0]), "random_return": -1200.0}
    for mean, score in ((-1200.0, 0.0), (-140.0, 1.0), (-670.0, 0.5)):
        metrics = g.return_metrics(np.array([mean - 1, mean + 1]), demos)
        assert metrics == pytest.approx(
            {"eval/return_mean": mean, "eval/return_std": 1.0, "eval/normalized_score": score}
        )
    for demos_return in (-1300.0, math.nan, math.inf):  # no better than random actions; unknown
        demos["returns"] = np.array([demos_return])
        assert "eval/normalized_score" not in g.return_metrics(np.ones(2), demos)
    assert g.return_metrics(np.array([1.0, math.nan]), demos) == {}


class Falls(gym.Env):
    """One number that the action moves; below 0 it has fallen. `reward` is what each step pays."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, reward=1.0, bad_step=None, discrete=False, render_mode=None):
        self.reward, self.bad_step, self.discrete = reward, bad_step, discrete
        if discrete:
            self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(0, 1, 1).astype(np.float32), 0
        return self.x.copy(), {}

    def step(self, action):
        self.t += 1
        self.x = np.clip(self.x + 0.2 * (2 * action - 1 if self.discrete else action), -9, 9).astype(np.float32)
        obs = np.full(1, np.nan, np.float32) if self.t == self.bad_step else self.x.copy()
        return obs.reshape(1), self.reward, bool(self.x[0] < 0), False, {}


for name, kwargs in (
    ("Falls", {}),
    ("NanReward", {"reward": math.nan}),
    ("NoneReward", {"reward": None}),
    ("NanObs", {"bad_step": 17}),
    ("Discrete", {"discrete": True}),
):
    gym.register(f"tests/{name}-v0", Falls, kwargs=kwargs, max_episode_steps=50)


@pytest.fixture
def falls_demos(demo_file):
    """Demonstrations that never fall: a function of the environment's name that writes them."""

    def write(name, **changes):
        rng = np.random.default_rng(0)
        actions = rng.uniform(-1, 1, (100, 1)).astype(np.float32)
        fields = {"observations": rng.uniform(0, 1, (102, 1)).astype(np.float32), "actions": actions}
        fields |= {"rewards": np.ones(100, np.float32), "lengths": np.array([50, 50])}
        if name == "Discrete":
            fields["actions"] = (actions[:, 0] > 0).astype(np.int64)
        fields |= {"terminated": np.zeros(2, bool), "truncated": np.ones(2, bool)}
        metadata = {"env_id": f"tests/{name}-v0", "max_episode_steps": 50}
        path = demo_file(f"{name}.npz", metadata=json.dumps(metadata), **fields | changes)
        return ["--env-id", f"tests/{name}-v0", "--demos", path]

    return write


def test_runs_with_ends_checkpoint_what_ends_pay(tmp_path, falls_demos):
    summary = run(tmp_path, "a", *falls_demos("Falls"))
    visits = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["visits"]
    assert visits["expert"].tolist() == [100, 0] and visits["policy"].min() > 0
    assert math.isfinite(summary["eval/normalized_score"])


@pytest.mark.parametrize("name", ["NanReward", "NoneReward"])
def test_an_environment_without_rewards_trains_and_says_so_once(tmp_path, falls_demos, capsys, name):
    summary, shown = run(tmp_path, "a", *falls_demos(name)), capsys.readouterr().out
    assert shown.count("gives no rewards") == 1
    assert not [key for key in summary if "return" in key or "score" in key]
    rows = rows_of(tmp_path / "a")
    assert len(rows) == 4 and "eval/return_mean" not in rows[0] and "reward/env_mean" not in rows[0]
    assert math.isfinite(float(rows[-1]["disc/loss"]))


def test_observations_that_are_no_numbers_are_named(tmp_path, falls_demos, capsys):
    message = mistake(capsys, *TINY, *falls_demos("NanObs"), "--output-dir", str(tmp_path))
    assert "tests/NanObs-v0: dimension 0 of an observation is nan at step 17" in message


def test_the_first_observation_of_an_episode_is_looked_at_too(monkeypatch):
    envs = g.make_envs({"env_id": "tests/Falls-v0", "max_episode_steps": 5}, 2, threads=1)
    episodes, nothing = first_episodes(envs, limit=5), np.full(1, np.nan, np.float32)
    monkeypatch.setattr(Falls, "reset", lambda self, **kwargs: (nothing, {}))
    with pytest.raises(g.UserError, match="dimension 0 of an observation is nan at step 0"):
        g.collect(envs, an_agent(1, 1), episodes, 6, torch.Generator().manual_seed(0))


def test_discrete_actions_train_resume_and_evaluate(tmp_path, falls_demos, capsys):
    flags = falls_demos("Discrete")
    run(tmp_path, "a", *flags, "--bc-warm-start")
    g.main(["--resume", str(tmp_path / "a/checkpoint.pt"), "--total-timesteps", "4800"])
    capsys.readouterr()
    g.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "4"])
    assert "sampled" in capsys.readouterr().out


def test_environments_are_closed(tmp_path, falls_demos, monkeypatch):
    opened = []
    monkeypatch.setattr(Falls, "__init__", lambda self, render_mode=None: opened.append(1))
    monkeypatch.setattr(Falls, "discrete", False, raising=False)
    monkeypatch.setattr(Falls, "reward", 1.0, raising=False)
    monkeypatch.setattr(Falls, "bad_step", None, raising=False)
    monkeypatch.setattr(Falls, "close", lambda self: opened.pop())
    run(tmp_path, "a", *falls_demos("Falls"))
    assert opened == []


def test_runs_in_a_thread(tmp_path):
    """A sweep agent's function, a web server or a notebook may be the caller."""
    thread = threading.Thread(target=run, args=(tmp_path, "a", "--total-timesteps", "800"))
    thread.start()
    thread.join()
    assert (tmp_path / "a/summary.json").exists()


def test_runs_of_one_second_have_folders_of_their_own(tmp_path):
    args = g.Args(env_id="my_module:tests/Falls-v0", output_dir=str(tmp_path))
    folders = [g.open_run("gail_ppo", args, None) for _ in range(3)]
    assert len({folder.name for folder in folders}) == 3
    assert all(folder.parent == tmp_path and ":" not in folder.name for folder in folders)


def test_gail_beats_a_third_of_the_demonstrations_in_150k_steps(tmp_path):
    flags = ["--total-timesteps", "150000", "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "learn"]
    g.main([*flags, "--anneal-lr=False", "--eval-episodes", "20"])
    summary = json.loads((tmp_path / "learn/summary.json").read_text())
    assert summary["eval/normalized_score"] > 1 / 3


def test_runs_alone_beside_data(tmp_path):
    """A copied file is complete: no sibling, no package."""
    (tmp_path / "gail_ppo.py").write_text((ROOT / "gail_ppo.py").read_text())
    (tmp_path / "data").symlink_to(ROOT / "data")
    command = [sys.executable, "gail_ppo.py", *TINY, "--run-name", "alone", "--track"]
    env = {"WANDB_MODE": "offline", "PATH": "", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "eval/return_mean" in result.stdout
    assert list((tmp_path / "runs/wandb").glob("offline-run-*"))


def test_discriminator_sees_actions_as_executed(tmp_path, monkeypatch):
    """Beyond the bounds a sampled action would give the policy away."""
    seen, forward = [], g.Discriminator.forward

    def noted(self, x):
        seen.append(x.detach())
        return forward(self, x)

    monkeypatch.setattr(g.Discriminator, "forward", noted)
    monkeypatch.setattr(g, "INITIAL_LOG_STD", 1.0)
    run(tmp_path, "a", "--total-timesteps", "800")
    agent = torch.load(tmp_path / "a/policy.pt", weights_only=True)["agent"]
    mean, std = agent["standardize_action.mean"], agent["standardize_action.std"]
    rollout = seen[-1][..., 17:] * std + mean  # what the rewards are computed from
    assert rollout.abs().max() <= 1 + 1e-6 and (rollout.abs() > 0.999).float().mean() > 0.2


# Users' mistakes: one sentence, exit code 2, nothing left behind

RUN = ["--total-timesteps", "3200", "--num-envs", "8"]


def mistake(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit_info:
        g.main([*argv])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-envs", "0"], "--num-envs"),
        (["--total-timesteps", "-5"], "--total-timesteps"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--gamma", "1.5"], "--gamma"),
        (["--num-minibatches", "401"], "--num-minibatches"),
        (["--env-id", "HalfCheetah-v3"], "--env-id"),
        (["--total-timesteps", "100"], "--total-timesteps"),
        (["--num-demos", "51"], "--num-demos"),
        (["--num-demos", "-1"], "--num-demos"),
        (["--demos", "nowhere.npz"], "--demos nowhere.npz"),
        (["--env-id", "Ant-v4"], "--env-id"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--seed", "-1"], "--seed"),
        (["--resume", "nowhere.pt"], "--resume"),
        (["--evaluate", "nowhere.pt"], "--evaluate"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    flags = flags if flags[0] in ("--resume", "--evaluate") else [*RUN, *flags]
    assert named in mistake(capsys, *flags)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error(capsys):
    assert "--cuda" in mistake(capsys, *RUN, "--cuda", "--demos", str(DEMOS))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("observations", np.full((15, 17), np.nan, np.float32), "finite"),
        ("observations", np.zeros((14, 17), np.float32), "15 rows"),
        ("actions", np.zeros((12, 5), np.float32), "(6,)"),
        ("actions", np.zeros((15, 6), np.float32), "'actions' is float32 of shape (15, 6), expected 12 rows"),
        ("actions", None, "'actions' is missing"),
        ("terminated", None, "'terminated' is missing"),
        ("lengths", np.array([], np.int64), "episode"),
        ("lengths", np.array([5, 0, 7]), "episode"),
        ("lengths", np.array([12.0]), "(E,) int64"),
        ("terminated", np.zeros(3), "'terminated' is float64 of shape (3,), expected (E,) bool"),
        ("rewards", np.zeros(13), "expected 12 rows"),
        (
            "metadata",
            json.dumps({"env_id": "HalfCheetah-v4", "max_episode_steps": 4}),
            "5 steps, max_episode_steps is 4",
        ),
        ("metadata", None, "'metadata' is missing"),
        ("metadata", json.dumps({"env_id": "HalfCheetah-v4"}), "'max_episode_steps' is missing"),
        ("metadata", json.dumps({"env_id": "Hopper-v4", "max_episode_steps": 9}), "Hopper-v4"),
        ("metadata", "{", "Expecting property name"),
    ],
)
def test_bad_demonstrations(tmp_path, capsys, demo_file, field, value, named):
    path = demo_file(**{field: value})
    message = mistake(capsys, *RUN, "--demos", path, "--output-dir", str(tmp_path / "runs"))
    assert named in message and "--demos" in message
    assert not (tmp_path / "runs").exists()


def test_truncated_demonstrations_and_a_pickle_in_disguise(tmp_path, capsys):
    whole = DEMOS.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert "cut.npz" in mistake(capsys, *RUN, "--demos", str(tmp_path / "cut.npz"))
    np.savez(tmp_path / "pickle.npz", **make_demo_fields() | {"observations": np.array([{}], dtype=object)})
    assert "pickle" in mistake(capsys, *RUN, "--demos", str(tmp_path / "pickle.npz"))


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_hostile_checkpoint_runs_nothing(tmp_path, capsys):
    torch.save({"kind": "gail_ppo checkpoint", "args": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(SystemExit):
        g.main(["--resume", str(tmp_path / "bad.pt")])
    printed = capsys.readouterr()
    assert "ran" not in printed.out and "not a readable" in printed.err


def test_checkpoint_of_another_script_or_version(tmp_path, capsys):
    torch.save({"kind": "bc checkpoint"}, tmp_path / "other.pt")
    message = mistake(capsys, "--resume", str(tmp_path / "other.pt"))
    assert "it is a bc checkpoint, expected a gail_ppo checkpoint" in message
    for args in ({"discount": 0.9}, {}, vars(g.Args()) | {"discount": 0.9}):
        torch.save({"kind": "gail_ppo checkpoint", "args": args}, tmp_path / "old.pt")
        assert "another version" in mistake(capsys, "--resume", str(tmp_path / "old.pt"))


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    flags = ["--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "taken"]
    assert "--run-name" in mistake(capsys, *RUN, *flags)
    assert not list((tmp_path / "taken").iterdir())


def test_what_is_saved_is_the_running_average_of_the_policies(tmp_path, monkeypatch):
    weights, update = [], g.update_policy

    def watched(agent, *rest):
        weights.append([x.detach().clone() for x in agent.parameters()])  # before the update
        return update(agent, *rest)

    monkeypatch.setattr(g, "update_policy", watched)
    flags = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--average-share", "0.5"]
    g.main([*flags, "--run-name", "a"])
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    agent = g.load_agent(str(tmp_path / "a/policy.pt"))[0]
    last = [saved["agent"][name] for name, _ in agent.named_parameters()]
    expected, span = weights[1], 1.0  # after the first update
    for policy in [*weights[2:], last]:
        span += 0.5
        expected = [slow + (fast - slow) / span for slow, fast in zip(expected, policy)]
    assert len(weights) > 1
    for x, y, z in zip(agent.parameters(), expected, last):
        torch.testing.assert_close(x, y)
        assert not torch.equal(x, z)
    task = {"env_id": "HalfCheetah-v4", "max_episode_steps": 100}
    judged = g.evaluate(agent, task, 20, saved["args"]["seed"] + 10_000, 1)[-1]
    assert saved["rows"][-1]["eval/return_mean"] == pytest.approx(judged.mean())


@pytest.mark.parametrize("what", ["losses/value_loss", "weights"])
def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys, what):
    """Also if the last minibatch ruins the weights, whose losses were computed before."""
    calls, update, evaluate = [], g.update_policy, g.evaluate

    def evaluating(agent, *settings):
        assert agent is None or agent.actor[-1].bias.isfinite().all()  # or the environment would be blamed
        return evaluate(agent, *settings)

    def diverging(*args):
        calls.append(None)
        log = update(*args)
        if len(calls) == 3:
            args[0].actor[-1].bias.data.fill_(math.nan)
            if what != "weights":
                log[what] = math.nan
        return log

    monkeypatch.setattr(g, "update_policy", diverging)
    monkeypatch.setattr(g, "evaluate", evaluating)
    flags = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "nan"]
    message = mistake(capsys, *flags, "--eval-interval", "800", "--checkpoint-interval", "800")
    assert f"diverged at step 2400: {what} not finite" in message
    saved = torch.load(tmp_path / "nan/checkpoint.pt", weights_only=True)
    assert len(saved["rows"]) == 2


@pytest.mark.parametrize("flag", ["--anneal-lr=False", "--no-anneal-lr", "--anneal_lr=False"])
def test_booleans_as_a_sweep_agent_writes_them(flag):
    assert g.parse_args([flag]).anneal_lr is False
    assert g.parse_args(["--track=True"]).track is True


def test_a_program_may_use_its_settings_again(tmp_path):
    """What train() finds out from demonstrations and machine is not written into them."""
    flags = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "a"]
    args = g.tyro.cli(g.Args, args=flags)
    before = dict(vars(args))
    g.train(args)
    assert vars(args) == before and args.gamma == 0
    assert json.loads((tmp_path / "a/config.json").read_text())["gamma"] == 0.9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_action_lies_beyond_the_bounds_by_rounding(dtype):
    """0.1 is no float32 number; the nearest one is greater."""
    space = gym.spaces.Box(-0.1, 0.1, (2,), dtype)
    envs = SimpleNamespace(single_action_space=space, single_observation_space=gym.spaces.Box(-1, 1, (3,)))
    rng = np.random.default_rng(0)
    demos = {
        "obs": rng.normal(size=(9, 3)),
        "observations": np.zeros((9, 3)),
        "actions": rng.uniform(-0.1, 0.1, (9, 2)),
    }
    g.match_demos(demos, envs)
    agent = g.Agent(demos, 8, torch.Generator().manual_seed(0))
    agent.actor[-1].bias.data[:] = 20.0
    action = agent.act(demos["obs"][0])
    assert space.contains(action) and np.allclose(action, 0.1)


def test_a_discrete_action_for_one_observation_is_a_number():
    """Environments look it up in dicts and lists."""
    demos = {"obs": np.random.default_rng(0).normal(size=(9, 3)), "actions": np.eye(2), "discrete": True}
    agent = g.Agent(demos | {"low": np.zeros(2), "high": np.ones(2)}, 8, torch.Generator().manual_seed(0))
    for generator in (None, torch.Generator().manual_seed(0)):
        assert {0: "left", 1: "right"}[agent.act(demos["obs"][0], generator)]
        assert agent.act(demos["obs"], generator).shape == (9,)


def test_a_tracked_run_after_one_that_failed_is_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    failed = g.wandb.init(project="p", name="failed", dir=str(tmp_path)).id  # and never finished
    args = g.Args(track=True, run_name="next", output_dir=str(tmp_path))
    g.open_run("gail_ppo", args, None)
    assert g.wandb.run.id != failed and g.wandb.run.name == "next" and g.wandb.run.config["run_name"] == "next"
    assert g.wandb.run.job_type == "gail_ppo"  # the script: all log into one project
    g.wandb.finish()


def test_a_run_is_whole_on_disk_before_it_waits_for_the_network(tmp_path, monkeypatch):
    def no_network():
        raise OSError("no network")

    monkeypatch.setenv("WANDB_MODE", "offline")
    with monkeypatch.context() as patch:
        patch.setattr(g.wandb, "finish", no_network)
        with pytest.raises(SystemExit):
            run(tmp_path, "a", "--track")
    g.wandb.finish()
    assert {"summary.json", "curves.png", "policy.pt"} <= {path.name for path in (tmp_path / "a").iterdir()}


def test_the_summary_in_wandb_ends_with_the_final_evaluation(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    final = run(tmp_path, "a", "--track")["eval/return_mean"]
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    wanted, logged, started = rb"eval/return_mean.{1,4}?(-?[0-9.]{9,})", [], time.time()
    while not logged and time.time() < started + 60:  # another process writes it
        logged = re.findall(wanted, log.read_bytes(), re.DOTALL)
    assert float(logged[-1]) == final != float(rows_of(tmp_path / "a")[-1]["eval/return_mean"])


def test_a_moved_run_is_tracked_where_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "moved/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "moved/here")
    args = g.Args(track=True, resume="checkpoint.pt", output_dir="/proc/1/nowhere")
    assert g.open_run("gail_ppo", args, None) == tmp_path / "moved/here"
    assert g.wandb.run.name == "here" and list((tmp_path / "moved/wandb").glob("offline-run-*"))
    g.wandb.finish()


def test_a_disk_that_is_full_at_the_summary_leaves_none(tmp_path, monkeypatch, capsys):
    """An empty one would say that the run is finished."""
    flags, write = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "a"], g.Path.write_text

    def full(path, text):
        if "summary" in path.name:
            write(path, "")
            raise OSError(28, "No space left on device")
        return write(path, text)

    monkeypatch.setattr(g.Path, "write_text", full)
    assert "No space left" in mistake(capsys, *flags)
    assert not (tmp_path / "a/summary.json").exists()
    monkeypatch.undo()
    g.main(["--resume", str(tmp_path / "a/checkpoint.pt")])
    assert json.loads((tmp_path / "a/summary.json").read_text())["env_steps"] == 3200
