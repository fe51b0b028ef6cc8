"""gail_ppo.py: every function against a closed form or a slow version of its own; then the behaviour of whole runs."""

import csv
import json
import math
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import DEMOS, ROOT, make_demo_fields
from mujoco.batch import Batch  # noqa: F401  (a clear failure here if MuJoCo is too old)

import gail_ppo as g

TINY = ["--total-timesteps", "3200", "--num-envs", "8", "--eval-interval", "1600", "--eval-episodes", "4"]
TINY += ["--update-epochs", "2", "--disc-steps", "4", "--checkpoint-interval", "1600", "--threads", "1"]


def run(tmp_path, name, *flags) -> dict:
    """One in-process run; returns its summary."""
    g.main([*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", name, *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir, without_times=True) -> list[dict]:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    drop = [k for k in rows[0] if k.startswith("time/") or k == "charts/SPS"] if without_times else []
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


# Environment


def test_batch_environment_equals_gymnasium_through_resets():
    envs = g.BatchHalfCheetah(3, 40, seed=0, threads=2)
    reference = gym.make("HalfCheetah-v4").unwrapped
    reference.reset(seed=0)
    rng = np.random.default_rng(1)
    obs = envs.reset()
    for t in range(100):
        if t % 40 == 0:  # a new episode began: start the reference from the same state
            reference.reset()
            reference.set_state(envs.qpos[1].copy(), envs.qvel[1].copy())
        np.testing.assert_allclose(obs[1], reference._get_obs(), rtol=0, atol=1e-9)
        actions = rng.uniform(-1, 1, (3, 6)).astype(np.float32)
        obs, reward, terminated, truncated, final_obs = envs.step(actions)
        expected_obs, expected_reward, _, _, _ = reference.step(actions[1])
        np.testing.assert_allclose(final_obs[1], expected_obs, rtol=0, atol=1e-9)
        assert abs(reward[1] - expected_reward) < 1e-6  # gymnasium computes the control cost in float32
        assert truncated.all() == truncated.any() == ((t + 1) % 40 == 0)
        assert not terminated.any()


def test_batch_environment_starts_like_gymnasium():
    envs = g.BatchHalfCheetah(4000, 100, seed=0, threads=2)
    envs.reset()
    assert np.abs(envs.qpos - envs.model.qpos0).max() <= 0.1
    np.testing.assert_allclose((envs.qpos - envs.model.qpos0).std(), 0.1 / math.sqrt(3), rtol=0.02)
    np.testing.assert_allclose(envs.qvel.std(), 0.1, rtol=0.02)


@pytest.mark.parametrize("threads", [1, 2])
def test_batch_environment_is_bit_identical_at_any_thread_count_and_after_restore(threads):
    def play(envs, steps, rng):
        return np.stack([envs.step(rng.uniform(-1, 1, (5, 6)))[0] for _ in range(steps)])

    envs, other = g.BatchHalfCheetah(5, 30, 0, 1), g.BatchHalfCheetah(5, 30, 99, threads)
    envs.reset()
    play(envs, 17, np.random.default_rng(3))
    other.load_state_dict(envs.state_dict())
    np.testing.assert_array_equal(play(envs, 40, np.random.default_rng(4)), play(other, 40, np.random.default_rng(4)))


def test_gymnasium_environments_report_the_true_final_observation():
    envs = g.make_envs("Hopper-v4", 2, 3, seed=0, threads=1)
    envs.reset()
    for t in range(1, 7):
        next_obs, _, terminated, truncated, final_obs = envs.step(np.zeros((2, 3)))
        assert truncated.all() == (t % 3 == 0) and not terminated.any()
        assert (next_obs != final_obs).any() == truncated.any()


def test_terminations_reach_the_rollout():
    envs = g.make_envs("Hopper-v4", 4, 1000, seed=0, threads=1)
    generator = torch.Generator().manual_seed(0)
    agent = g.Agent(11, 3, 8, generator)
    collector = g.Collector(envs, torch.zeros(11), torch.ones(11), torch.device("cpu"))
    rollout = collector.rollout(agent, 200, generator)
    assert rollout.terminated.any() and (rollout.ended == rollout.terminated).all()
    assert len(collector.finished) == rollout.ended.sum()


# Demonstrations


def test_demonstrations_are_read_whole_and_by_number(demo_file):
    fields = make_demo_fields()
    everything = g.load_demos(demo_file(), "HalfCheetah-v4", 0, np.random.default_rng(0), ("actions",))
    np.testing.assert_array_equal(everything.observations, fields["observations"])
    np.testing.assert_array_equal(everything.obs_before_step, np.delete(fields["observations"], [5, 9, 14], axis=0))
    expected = [fields["rewards"][:5].sum(), fields["rewards"][5:8].sum(), fields["rewards"][8:].sum()]
    np.testing.assert_allclose(everything.returns, expected, rtol=1e-6)

    one = g.load_demos(demo_file(), "HalfCheetah-v4", 1, np.random.default_rng(0), ("actions",))
    episode = {5: 0, 3: 1, 4: 2}[one.lengths[0]]
    np.testing.assert_array_equal(one.actions, np.split(fields["actions"], [5, 8])[episode])
    np.testing.assert_array_equal(one.observations, np.split(fields["observations"], [6, 10])[episode])


def test_different_seeds_draw_different_demonstrations(demo_file):
    drawn = {int(g.load_demos(demo_file(), None, 1, np.random.default_rng(seed), ()).lengths[0]) for seed in range(20)}
    assert drawn == {5, 3, 4}


# Pure functions


def slow_gae(rewards, values, next_values, terminated, ended, gamma, lam):
    """The definition: A_t = sum_l (gamma lambda)^l delta_{t+l}, up to the end of the episode."""
    steps, envs = rewards.shape
    advantages = np.zeros((steps, envs))
    for n in range(envs):
        for t in range(steps):
            for k in range(t, steps):
                bootstrap = 0.0 if terminated[k, n] else next_values[k, n]
                delta = rewards[k, n] + gamma * bootstrap - values[k, n]
                advantages[t, n] += (gamma * lam) ** (k - t) * delta
                if ended[k, n]:
                    break
    return advantages


def test_gae_equals_its_definition_at_termination_truncation_and_rollout_end():
    rng = np.random.default_rng(0)
    shape = (12, 3)
    rewards, values, next_values = rng.normal(size=(3, *shape))
    terminated = rng.random(shape) < 0.15
    ended = terminated | (rng.random(shape) < 0.15)
    assert terminated.any() and (ended & ~terminated).any() and not ended[-1].all()
    tensors = [torch.tensor(x) for x in (rewards, values, next_values, terminated, ended)]
    advantages, returns = g.compute_gae(*tensors, 0.9, 0.8)
    expected = slow_gae(rewards, values, next_values, terminated, ended, 0.9, 0.8)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), expected + values, atol=1e-12)


def test_gae_of_a_constant_reward_tends_to_the_geometric_sum():
    steps, gamma = 2000, 0.95
    zeros, nothing = torch.zeros(steps, 1, dtype=torch.float64), torch.zeros(steps, 1, dtype=torch.bool)
    _, returns = g.compute_gae(zeros + 1, zeros, zeros, nothing, nothing, gamma, 1.0)
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
    loss, entropy = g.discriminator_loss(zero, zero, "bce", 0.0)
    assert abs(loss.item() - 2 * math.log(2)) < 1e-6 and abs(entropy.item() - math.log(2)) < 1e-6
    right, _ = g.discriminator_loss(zero + 3, zero - 3, "bce", 0.0)
    wrong, _ = g.discriminator_loss(zero - 3, zero + 3, "bce", 0.0)
    assert right < 0.1 and wrong > 6  # the expert's side is the positive one
    assert abs(g.discriminator_loss(zero + 2, zero - 1, "wgan", 0.0)[0].item() + 3) < 1e-6
    p = 1 / (1 + math.exp(-0.7))
    expected = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    _, entropy = g.discriminator_loss(zero + 0.7, zero + 0.7, "bce", 0.0)
    assert abs(entropy.item() - expected) < 1e-6
    assert g.discriminator_loss(zero, zero, "bce", 0.5)[0] < 2 * math.log(2)  # entropy is a bonus


@pytest.mark.parametrize("form", ["softplus", "logit", "logsigmoid"])
def test_reward_forms_equal_their_definition_and_stay_finite(form):
    logit = torch.linspace(-8, 8, 33, dtype=torch.float64)
    d = torch.sigmoid(logit)
    definition = {"softplus": -torch.log(1 - d), "logit": torch.log(d) - torch.log(1 - d), "logsigmoid": torch.log(d)}
    np.testing.assert_allclose(g.imitation_reward(logit, form).numpy(), definition[form].numpy(), atol=1e-9)
    extreme = g.imitation_reward(torch.tensor([-1e4, 1e4]), form)
    assert torch.isfinite(extreme).all() and extreme[1] > extreme[0]  # like the expert is always better


def test_gaussian_log_prob_and_entropy_equal_torch():
    mean, log_std, action = torch.randn(4, 3), torch.randn(3), torch.randn(4, 3)
    reference = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    np.testing.assert_allclose(g.gaussian_log_prob(action, mean, log_std), reference.log_prob(action), rtol=1e-4)
    np.testing.assert_allclose(g.gaussian_entropy(log_std), reference.entropy()[0], rtol=1e-5)


def test_the_policys_deviation_begins_as_asked_hangs_on_the_state_and_is_bounded():
    agent, obs = g.Agent(17, 6, 16, torch.Generator().manual_seed(0)), torch.randn(50, 17)
    mean, log_std = agent.policy(obs)
    assert mean.shape == log_std.shape == (50, 6)
    np.testing.assert_allclose(log_std.detach(), g.INITIAL_LOG_STD, atol=0.1)
    assert (log_std.std(0) > 0).all()
    agent.actor[-1].bias.data[6:] = torch.tensor([-99.0, 99, 0, 0, 0, 0])
    log_std = agent.policy(obs)[1]
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


def test_value_loss_with_and_without_clipping():
    value, old, target = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([3.5])
    assert g.ppo_value_loss(value, old, target, None).item() == pytest.approx(0.125)
    assert g.ppo_value_loss(value, old, target, 0.2).item() == pytest.approx(0.5 * 2.3**2)


@pytest.mark.parametrize("window", [None, 3])
def test_reward_normalizer_equals_numpy_over_its_window(window):
    rng = np.random.default_rng(0)
    batches = [rng.normal(3 * i, 1 + i, (4, 5)) for i in range(6)]
    normalizer = g.RewardNormalizer(window)
    for batch in batches:
        normalizer.update(torch.tensor(batch))
    seen = np.stack(batches[-window:] if window else batches)
    x = torch.tensor(batches[-1])
    np.testing.assert_allclose(normalizer.normalize(x, True), (batches[-1] - seen.mean()) / seen.std(), rtol=1e-5)
    np.testing.assert_allclose(normalizer.normalize(x, False), batches[-1] / seen.std(), rtol=1e-5)
    restored = g.RewardNormalizer(window)
    restored.load_state_dict(normalizer.state_dict())
    assert torch.equal(restored.normalize(x, True), normalizer.normalize(x, True))


def test_spectral_norm_bounds_each_layer():
    disc = g.Discriminator(5, 32, True, torch.Generator().manual_seed(0))
    for _ in range(50):
        disc(torch.randn(8, 5))  # power iterations
    disc.eval()
    for layer in disc.net:
        if isinstance(layer, nn.Linear):
            assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1.0, abs=0.02)


def test_crossed_fires_once_per_interval():
    assert [step for step in range(30, 400, 30) if g.crossed(step, 30, 100)] == [120, 210, 300]


def test_steps_to_fraction_needs_two_in_a_row():
    curve = [(1, 0.5), (2, 0.95), (3, 0.8), (4, 0.95), (5, 0.9)]
    assert g.steps_to_fraction(curve, 0.9) == 4
    assert g.steps_to_fraction(curve[:3], 0.9) is None


# The steps of the loop


def disc_args(**changes):
    args = g.Args(disc_batch_size=64, disc_learning_rate=3e-3, grad_penalty_coef=0.0)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


@pytest.mark.parametrize("kind", ["bce", "wgan"])
def test_discriminator_separates_separable_data(kind):
    generator = torch.Generator().manual_seed(0)
    disc = g.Discriminator(2, 32, False, generator)
    expert = torch.randn(500, 2, generator=generator) + torch.tensor([3.0, 0.0])
    policy = torch.randn(500, 2, generator=generator) - torch.tensor([3.0, 0.0])
    optimizer = torch.optim.Adam(disc.parameters(), 3e-3)
    args = disc_args(disc_loss=kind, grad_penalty_coef=0.1 if kind == "bce" else 10.0)
    g.update_discriminator(disc, optimizer, expert, policy, args, 200, generator)
    with torch.no_grad():
        assert disc(expert).mean() > disc(policy).mean() + 1
        threshold = 0 if kind == "bce" else (disc(expert).mean() + disc(policy).mean()) / 2
        assert (disc(expert) > threshold).float().mean() > 0.95 and (disc(policy) < threshold).float().mean() > 0.95


def test_discriminator_settles_at_two_log_two_on_identical_data():
    generator = torch.Generator().manual_seed(0)
    disc = g.Discriminator(2, 32, False, generator)
    data = torch.randn(500, 2, generator=generator)
    optimizer = torch.optim.Adam(disc.parameters(), 1e-3)
    log = {}
    for _ in range(10):
        log = g.update_discriminator(disc, optimizer, data, data, disc_args(), 50, generator)
    assert log["disc/loss"] == pytest.approx(2 * math.log(2), abs=0.02)
    assert log["disc/expert_prob"] == pytest.approx(0.5, abs=0.05)


def toy_rollout(steps=4, envs=3):
    shape = (steps, envs)
    obs, action = torch.randn(*shape, 17), torch.randn(*shape, 6)
    nothing = torch.zeros(shape, dtype=torch.bool)
    return g.Rollout(obs, obs, action, action, torch.zeros(shape), torch.randn(shape), nothing, nothing)


@pytest.mark.parametrize("source", ["gail", "env", "combined"])
def test_rewards_follow_their_source(source):
    rollout, args = toy_rollout(), g.Args(reward_source=source)
    logit = None if source == "env" else torch.randn(4, 3)
    normalizers = {"env": g.RewardNormalizer(), "gail": g.RewardNormalizer()}
    total, log = g.compute_rewards(rollout, logit, normalizers, args)

    def normalized(x):
        return (x - x.mean()) / x.std(correction=0)

    expected = torch.zeros(4, 3)
    if source != "gail":
        expected += normalized(rollout.env_rewards)
    if source != "env":
        expected += normalized(nn.functional.softplus(logit))
    np.testing.assert_allclose(total, expected, atol=1e-4)
    assert log["reward/env_mean"] == pytest.approx(rollout.env_rewards.mean().item())
    if source == "gail":
        plain, _ = g.compute_rewards(rollout, logit, normalizers, g.Args(normalize_reward=False))
        np.testing.assert_allclose(plain, nn.functional.softplus(logit))


def test_wasserstein_reward_is_the_raw_score():
    rollout, score = toy_rollout(), torch.randn(4, 3)
    args = g.Args(disc_loss="wgan", normalize_reward=False)
    total, _ = g.compute_rewards(rollout, score, {"gail": g.RewardNormalizer()}, args)
    assert torch.equal(total, score)


def test_a_constant_reward_does_not_become_a_huge_one():
    normalizer = g.RewardNormalizer()
    normalizer.update(torch.full((100, 64), 0.1))
    assert normalizer.normalize(torch.full((2,), 0.1), center=False).abs().max() <= 100.1
    assert normalizer.normalize(torch.full((2,), 0.1), center=True).abs().max() < 1e-3


def test_discriminator_and_environment_see_the_clipped_action():
    envs = g.BatchHalfCheetah(4, 10, 0, 1)
    generator = torch.Generator().manual_seed(0)
    agent = g.Agent(17, 6, 8, generator)
    agent.actor[-1].bias.data[6:] = 1.0
    collector = g.Collector(envs, torch.zeros(17), torch.ones(17), torch.device("cpu"))
    seen, step = [], envs.step
    envs.step = lambda actions: (seen.append(actions), step(actions))[1]
    rollout = collector.rollout(agent, 12, generator)
    assert rollout.actions.abs().max() > 1  # PPO keeps what was sampled
    assert rollout.executed_actions.abs().max() == 1
    np.testing.assert_array_equal(rollout.executed_actions.numpy(), np.stack(seen))
    np.testing.assert_array_equal(rollout.executed_actions, rollout.actions.clamp(-1, 1))


def test_rollout_is_continuous_and_keeps_true_next_observations():
    envs = g.BatchHalfCheetah(3, 5, 0, 1)
    generator = torch.Generator().manual_seed(0)
    agent = g.Agent(17, 6, 8, generator)
    collector = g.Collector(envs, torch.zeros(17), torch.ones(17), torch.device("cpu"))
    first, second = (collector.rollout(agent, 7, generator) for _ in range(2))
    obs, next_obs = torch.cat([first.obs, second.obs]), torch.cat([first.next_obs, second.next_obs])
    ended = torch.cat([first.ended, second.ended])
    assert ended[:, 0].nonzero().flatten().tolist() == [4, 9]
    same = (obs[1:] == next_obs[:-1]).all(-1)
    assert (same == ~ended[:-1]).all()
    expected = g.gaussian_log_prob(first.actions, *agent.policy(first.obs))
    np.testing.assert_allclose(first.log_probs, expected.detach(), rtol=1e-4, atol=1e-4)


def test_policy_update_moves_towards_better_actions_and_learns_the_value():
    generator = torch.Generator().manual_seed(0)
    agent = g.Agent(17, 6, 16, generator)
    rollout = toy_rollout(32, 16)
    with torch.no_grad():
        mean, log_std = agent.policy(rollout.obs)
        rollout.actions = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
        rollout.log_probs = g.gaussian_log_prob(rollout.actions, mean, log_std)
    rewards = rollout.actions[..., 0]  # the larger the first action, the better
    args = g.Args(gamma=0.0, update_epochs=20, num_minibatches=4, learning_rate=3e-3)
    optimizer = torch.optim.Adam(agent.parameters(), 3e-3)
    log = g.update_policy(agent, optimizer, rollout, rewards, args, generator)
    with torch.no_grad():
        shift = (agent.policy(rollout.obs)[0] - mean).mean((0, 1))
    assert shift[0] > 0.1 and shift[0] > 3 * shift[1:].abs().max()
    assert log["losses/approx_kl"] > 0
    args.target_kl = 1e-9  # stops after the first epoch: the same as asking for one
    stopped, single = (g.Agent(17, 6, 16, torch.Generator().manual_seed(5)) for _ in range(2))
    for one, epochs, kl in ((stopped, 20, 1e-9), (single, 1, 0.0)):
        args.update_epochs, args.target_kl = epochs, kl
        optimizer = torch.optim.Adam(one.parameters(), 3e-3)
        g.update_policy(one, optimizer, rollout, rewards, args, torch.Generator().manual_seed(6))
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters(), single.parameters()))


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_entropy_bonus_widens_a_policy_that_nothing_else_moves(ent_coef):
    agent = g.Agent(17, 6, 16, torch.Generator().manual_seed(0))
    rollout = toy_rollout(8, 4)
    args = g.Args(norm_adv=False, vf_coef=0.0, gamma=0.0, gae_lambda=0.0, ent_coef=ent_coef, num_minibatches=2)
    with torch.no_grad():  # a value that is right leaves no advantage
        for parameter in agent.critic.parameters():
            parameter.zero_()
    before, rewards = agent.policy(rollout.obs)[1].detach(), torch.zeros_like(rollout.env_rewards)
    optimizer = torch.optim.Adam(agent.parameters(), 1e-3)
    g.update_policy(agent, optimizer, rollout, rewards, args, torch.Generator().manual_seed(0))
    change = (agent.policy(rollout.obs)[1] - before).detach()
    assert (change > 1e-3).all() if ent_coef else (change == 0).all()


def test_cloning_fits_the_demonstrated_actions():
    generator = torch.Generator().manual_seed(0)
    agent = g.Agent(17, 6, 64, generator)
    obs = torch.randn(300, 17, generator=generator)
    actions = torch.tanh(obs[:, :6])
    before = (agent.policy(obs)[0] - actions).square().mean().item()
    g.clone_behaviour(agent, obs, actions, generator)
    assert (agent.policy(obs)[0] - actions).square().mean().item() < 0.1 * before


# Whole runs


def test_run_writes_its_files_and_returns_its_summary(tmp_path):
    summary = run(tmp_path, "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "metrics.csv", "summary.json", "checkpoint.pt", "policy.pt", "curves.png"}
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [800, 1600, 2400, 3200, 3200]
    assert [bool(row["eval/return_mean"]) for row in rows] == [False, True, False, True, True]
    assert summary["env_steps"] == 3200 and math.isfinite(summary["eval/vs_demos"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward-source", "env"],
        ["--reward-source", "combined", "--no-center-reward"],
        ["--disc-loss", "wgan", "--grad-penalty-coef", "10"],
        ["--spectral-norm=True", "--disc-ent-coef", "0.01", "--reward-form", "logit"],
        ["--bc-warm-start", "--burn-in-steps", "20", "--num-demos", "1"],
        ["--disc-interval", "2", "--reward-form", "logsigmoid", "--no-normalize-reward", "--clip-vloss"],
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
    double, single = (
        torch.load(tmp_path / x / "policy.pt", weights_only=True)["weights"] for x in ("double", "single")
    )
    assert all(torch.equal(double[name], single[name]) for name in single)


class Killed(Exception):
    pass


@pytest.mark.parametrize("flags", [["--threads", "2"], ["--reward-source", "combined", "--spectral-norm"]])
def test_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, flags):
    run(tmp_path, "whole", *flags)
    calls, update = [], g.update_policy

    def dying_update(*args):
        calls.append(None)
        if len(calls) == 4:  # after the checkpoint at 1600 and one row beyond it
            raise Killed
        return update(*args)

    monkeypatch.setattr(g, "update_policy", dying_update)
    with pytest.raises(Killed):
        run(tmp_path, "killed", *flags)
    monkeypatch.setattr(g, "update_policy", update)
    g.main(["--resume", str(tmp_path / "killed/checkpoint.pt")])
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    whole, killed = (torch.load(tmp_path / name / "policy.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole["weights"][k], killed["weights"][k]) for k in whole["weights"])


def test_evaluate_reads_the_saved_policy(tmp_path, capsys):
    run(tmp_path, "a")
    capsys.readouterr()
    g.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "3"])
    assert "mean action" in capsys.readouterr().out


def test_a_saved_policy_is_the_network():
    agent, obs = (
        g.Agent(17, 6, 16, torch.Generator().manual_seed(0)),
        np.random.default_rng(0).normal(size=(9, 17)) * 20,
    )
    agent.actor[-1].weight.data *= 100
    mean, std = torch.randn(17), torch.rand(17) + 0.1
    saved = g.export_policy(agent, mean, std, "HalfCheetah-v4", 100)
    expected = agent.policy(g.standardize(torch.tensor(obs, dtype=torch.float32), mean, std))
    for found, x in zip(g.load_actor(saved)(obs), expected):
        np.testing.assert_allclose(found, x.detach(), rtol=1e-5, atol=1e-6)


def test_evaluation_is_frozen_and_repeatable(tmp_path):
    run(tmp_path, "a")
    policy = torch.load(tmp_path / "a/policy.pt", weights_only=True)
    first, second = (g.evaluate(policy, 5, True, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (g.evaluate(policy, 5, True, seed=4) != first).all()
    assert (g.evaluate(policy, 5, False, seed=3) != first).all()  # the same starts without noise


def test_evaluation_of_episodes_that_end_early_counts_each_step_once():
    """Against gymnasium, one episode after another."""
    agent = g.Agent(11, 3, 8, torch.Generator().manual_seed(0))
    agent.actor[-1].weight.data.mul_(30)  # actions that differ, so that episodes end at different steps
    policy = g.export_policy(agent, torch.zeros(11), torch.ones(11), "Hopper-v4", 60)
    act, env, expected, lengths = g.load_actor(policy), gym.make("Hopper-v4", max_episode_steps=60), [], set()
    for i in range(5):
        obs, _ = env.reset(seed=7 + i)
        total, ended, steps = 0.0, False, 0
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(np.clip(act(obs[None])[0][0].numpy(), -1, 1))
            total, steps, ended = total + reward, steps + 1, terminated or truncated
        expected.append(total)
        lengths.add(steps)
    assert len(lengths) > 1
    assert np.allclose(g.evaluate(policy, 5, False, 7), expected, rtol=1e-4)


def test_a_policy_is_read_with_its_own_clipping():
    agent = g.Agent(17, 6, 8, torch.Generator().manual_seed(0))
    policy = g.export_policy(agent, torch.zeros(17), torch.ones(17), "HalfCheetah-v4", 100)
    obs = np.full((1, 17), 8.0)
    narrow = g.load_actor(policy | {"obs_clip": 2.0})(obs)[0]
    assert torch.equal(narrow, g.load_actor(policy)(np.full((1, 17), 2.0))[0])
    assert not torch.equal(narrow, g.load_actor(policy)(obs)[0])


def test_rewards_may_be_whole_numbers(demo_file):
    path = demo_file(rewards=np.arange(12))
    demos = g.load_demos(path, "HalfCheetah-v4", 0, np.random.default_rng(0), ("rewards",))
    assert demos.rewards.dtype == np.float32 and demos.returns.sum() == np.arange(12).sum()


def test_the_first_early_end_is_warned_of_once_whenever_it_comes(tmp_path, capsys, monkeypatch):
    rollout, made = g.Collector.rollout, []

    def with_ends(*args):
        made.append(rollout(*args))
        made[-1].terminated[0] = len(made) > 1
        return made[-1]

    monkeypatch.setattr(g.Collector, "rollout", with_ends)
    for name, flags, warnings in (("a", [], 1), ("b", ["--no-center-reward"], 0)):
        made.clear()
        run(tmp_path, name, "--num-envs", "4", "--total-timesteps", "1600", *flags)
        assert len(made) == 4 and capsys.readouterr().err.count("use --no-center-reward") == warnings


def test_flags_reach_the_loop(tmp_path):
    """D rests between its updates, burns in once, and the step size falls linearly, or not at all."""
    flags = ["--num-envs", "4", "--total-timesteps", "3200", "--disc-interval", "3"]
    run(tmp_path, "a", *flags, "--burn-in-steps", "5")
    rows = rows_of(tmp_path / "a")[:8]
    assert [bool(row["disc/loss"]) for row in rows] == [i % 3 == 0 for i in range(8)]
    assert [float(row["charts/learning_rate"]) for row in rows] == pytest.approx([2e-3 * (1 - i / 8) for i in range(8)])
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert saved["disc_optimizer"]["state"][0]["step"] == 5 + 3 * 4  # three updates of --disc-steps 4
    run(tmp_path, "b", *flags, "--no-anneal-lr")
    assert {row["charts/learning_rate"] for row in rows_of(tmp_path / "b")[:8]} == {"0.002"}


@pytest.mark.parametrize("reward", [0.0, -1.0, None])
def test_no_share_of_demonstrations_that_earn_nothing(tmp_path, demo_file, capsys, reward):
    steps = 12
    rewards = None if reward is None else np.full(steps, reward, np.float32)
    metadata = {"format_version": 1, "env_id": "HalfCheetah-v4", "max_episode_steps": 100, "expert_return_mean": 0}
    path = demo_file(rewards=rewards, metadata=json.dumps(metadata))
    run(tmp_path, "a", "--demos", path, "--num-envs", "4", "--total-timesteps", "1600")
    shown, summary = capsys.readouterr().out, json.loads((tmp_path / "a/summary.json").read_text())
    assert "policy, mean action" in shown and "of demonstrations" not in shown
    assert not {"eval/vs_demos", "eval/vs_expert", "eval/sampled_vs_demos"} & summary.keys()
    assert summary["steps_to_90"] is None


def test_gail_beats_a_third_of_the_demonstrations_in_150k_steps(tmp_path):
    flags = ["--total-timesteps", "150000", "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "learn"]
    g.main([*flags, "--anneal-lr=False", "--eval-episodes", "20"])
    summary = json.loads((tmp_path / "learn/summary.json").read_text())
    assert summary["eval/vs_demos"] > 1 / 3


def test_runs_alone_beside_data(tmp_path):
    """A copied file is complete: no sibling, no package."""
    (tmp_path / "gail_ppo.py").write_text((ROOT / "gail_ppo.py").read_text())
    (tmp_path / "data").symlink_to(ROOT / "data")
    command = [sys.executable, "gail_ppo.py", *TINY, "--run-name", "alone", "--track"]
    env = {"WANDB_MODE": "offline", "PATH": "", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "demonstrations" in result.stdout
    assert list((tmp_path / "runs/alone/wandb").glob("offline-run-*"))


def test_discriminator_sees_actions_as_executed(tmp_path, monkeypatch):
    """Beyond the bounds a sampled action would give the policy away."""
    seen, update = [], g.update_discriminator

    def noted(disc, optimizer, expert, policy, *rest):
        seen.append((expert[:, 17:], policy[:, 17:]))
        return update(disc, optimizer, expert, policy, *rest)

    monkeypatch.setattr(g, "update_discriminator", noted)
    run(tmp_path, "a")
    actions = np.clip(g.load_demos(str(DEMOS), None, 0, np.random.default_rng(), ()).actions, -1, 1)
    for standardized in seen[0]:
        executed = standardized * torch.from_numpy(actions.std(0) + 1e-3) + torch.from_numpy(actions.mean(0))
        assert 1 - 1e-4 < executed.abs().max() < 1 + 1e-4


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
        (["--reward-source", "env", "--burn-in-steps", "5"], "--burn-in-steps"),
        (["--reward-source", "combined", "--no-normalize-reward"], "--no-normalize-reward"),
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
        ("observations", np.full((15, 17), np.nan, np.float32), "NaN"),
        ("observations", np.zeros((14, 17), np.float32), "15 rows"),
        ("actions", np.zeros((12, 5), np.float32), "dimensions"),
        ("actions", None, "'actions' is missing"),
        ("lengths", np.array([], np.int64), "'lengths'"),
        ("lengths", np.array([5, 0, 7]), "'lengths'"),
        ("metadata", json.dumps({"format_version": 9}), "format version"),
        ("metadata", json.dumps({"format_version": 1, "env_id": "Hopper-v4"}), "Hopper-v4"),
        ("metadata", "{", "not a readable"),
    ],
)
def test_bad_demonstrations(tmp_path, capsys, demo_file, field, value, named):
    path = demo_file(**{field: value})
    message = mistake(capsys, *RUN, "--demos", path, "--output-dir", str(tmp_path / "runs"))
    assert named in message and path in message
    assert not (tmp_path / "runs").exists()


def test_truncated_demonstrations_and_a_pickle_in_disguise(tmp_path, capsys):
    whole = DEMOS.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert "not a readable" in mistake(capsys, *RUN, "--demos", str(tmp_path / "cut.npz"))
    np.savez(tmp_path / "pickle.npz", **make_demo_fields() | {"observations": np.array([{}], dtype=object)})
    assert "not a readable" in mistake(capsys, *RUN, "--demos", str(tmp_path / "pickle.npz"))


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_hostile_checkpoint_runs_nothing(tmp_path, capsys):
    torch.save({"format_version": 1, "script": "gail_ppo", "args": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(SystemExit):
        g.main(["--resume", str(tmp_path / "bad.pt")])
    printed = capsys.readouterr()
    assert "ran" not in printed.out and "not a readable" in printed.err


def test_checkpoint_of_another_script_or_format(tmp_path, capsys):
    torch.save({"format_version": 1, "script": "bc"}, tmp_path / "other.pt")
    assert "script is bc, expected gail_ppo" in mistake(capsys, "--resume", str(tmp_path / "other.pt"))
    torch.save({"format_version": 7, "script": "gail_ppo"}, tmp_path / "old.pt")
    assert "format_version is 7" in mistake(capsys, "--resume", str(tmp_path / "old.pt"))


def test_resume_needs_its_metrics_and_its_demonstrations(tmp_path, capsys):
    run(tmp_path, "a")
    checkpoint = tmp_path / "a/checkpoint.pt"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/checkpoint.pt").write_bytes(checkpoint.read_bytes())
    assert "metrics.csv" in mistake(capsys, "--resume", str(tmp_path / "alone/checkpoint.pt"))
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["checkpoint.pt"]
    saved = torch.load(checkpoint, weights_only=True)
    saved["progress"]["obs_mean"] += 1
    torch.save(saved, checkpoint)
    assert "has changed" in mistake(capsys, "--resume", str(checkpoint))


@pytest.mark.parametrize("change", [{"discount": 0.9}, {"gamma": None}, {"optimizer": None}, {"agent": {"w": 1}}])
def test_checkpoint_of_another_version(tmp_path, capsys, change):
    """Settings unknown, settings missing, and a part missing or of another form."""
    run(tmp_path, "a")
    path = tmp_path / "a/checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    for name, value in change.items():
        entries = saved if name in ("agent", "optimizer") else saved["args"]
        entries[name] = value
        if value is None:
            del entries[name]
    torch.save(saved, path)
    assert "another version" in mistake(capsys, "--resume", str(path))


@pytest.mark.parametrize(
    "change",
    [{"weights": None}, {"weights": {}}, {"weights": 3}, {"sizes": [17, 4]}, {"obs_mean": "x"}, {"obs_std": None}],
)
def test_malformed_policy(tmp_path, capsys, change):
    agent = g.Agent(17, 6, 8, torch.Generator().manual_seed(0))
    policy = g.export_policy(agent, torch.zeros(17), torch.ones(17), "HalfCheetah-v4", 10)
    torch.save({k: v for k, v in (policy | change).items() if v is not None}, tmp_path / "policy.pt")
    assert "damaged" in mistake(capsys, "--evaluate", str(tmp_path / "policy.pt"), "--eval-episodes", "2")


def test_resume_stands_alone(capsys):
    assert "--resume" in mistake(capsys, "--resume", "x.pt", "--seed", "3")


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    flags = ["--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "taken"]
    assert "--run-name" in mistake(capsys, *RUN, *flags)
    assert not list((tmp_path / "taken").iterdir())


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    calls, update = [], g.update_policy

    def diverging(*args):
        calls.append(None)
        return update(*args) | ({"losses/value_loss": math.nan} if len(calls) == 3 else {})

    monkeypatch.setattr(g, "update_policy", diverging)
    flags = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "nan"]
    assert "diverged at step 2400 (losses/value_loss" in mistake(capsys, *flags)
    saved = torch.load(tmp_path / "nan/checkpoint.pt", weights_only=True)
    assert saved["progress"]["iteration"] == 2


@pytest.mark.parametrize("flag", ["--anneal-lr=False", "--no-anneal-lr", "--anneal_lr=False"])
def test_booleans_as_a_sweep_agent_writes_them(flag):
    assert g.parse_args([flag], g.Args).anneal_lr is False
    assert g.parse_args(["--track=True", "--run-name=True"], g.Args).run_name == "True"
