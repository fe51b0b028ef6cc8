"""toy_pointnav.py: the world and its experts by hand, the algorithms against closed forms, then
whole runs."""

import ast
import csv
import json
import math
import subprocess
import sys
from collections import deque

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Generator

import toy_pointnav as t

TINY = ["--total-timesteps", "1024", "--num-envs", "16", "--num-steps", "16"]
TINY += ["--eval-interval", "512", "--eval-episodes", "20", "--expert-episodes", "20"]
TINY += ["--disc-steps", "3", "--update-epochs", "2", "--fresh-disc-steps", "5"]
VARIANTS = {"ppo": [], "trpo": ["--algorithm", "trpo"], "continuous": ["--continuous"]}
VARIANTS["continuous trpo"] = ["--continuous", "--algorithm", "trpo"]


@pytest.fixture(autouse=True)
def _fewer_episodes_for_fresh_discriminators(monkeypatch):
    monkeypatch.setattr(t.fresh_accuracy, "__defaults__", (60,))


@pytest.fixture
def no_page(monkeypatch):
    """Writing all of Plotly takes longer than a tiny run."""
    monkeypatch.setattr(t.go.Figure, "write_html", lambda *args: None)


def seeded(seed=0) -> Generator:
    return Generator().manual_seed(seed)


def run(tmp_path, name, *flags) -> dict:
    """One in-process run; returns its summary."""
    t.main([*TINY, "--output-dir", str(tmp_path), "--run-name", name, *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir) -> list[dict]:
    """metrics.csv without what the clock decides."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows]


def place(envs, *points):
    envs.reset(seed=0)
    envs.position[:] = points
    return envs


# The world


def test_the_five_moves():
    envs = place(t.PointNav(5, False), *[(0.5, 0.5)] * 5)
    next_obs, rewards, terminated, truncated, info = envs.step(np.arange(5))
    expected = [(0.5, 0.5), (0.5, 0.7), (0.5, 0.3), (0.3, 0.5), (0.7, 0.5)]
    np.testing.assert_allclose(next_obs, expected)
    np.testing.assert_array_equal(next_obs, info["final_obs"])
    assert info["length"].tolist() == [1] * 5
    np.testing.assert_allclose(rewards, -0.01)
    assert not terminated.any() and not truncated.any()


def test_walls_stop_the_point_on_all_sides():
    envs = place(t.PointNav(4, False), (0.3, 0.95), (0.3, -0.95), (-0.95, 0.3), (0.95, 0.3))
    for _ in range(2):
        obs, *_ = envs.step(np.array([1, 2, 3, 4]))
        np.testing.assert_allclose(obs, [(0.3, 1), (0.3, -1), (-1, 0.3), (1, 0.3)])


def test_the_goal_ends_an_episode_and_a_new_one_starts_at_once():
    envs = place(t.PointNav(3, False), (0.25, 0.0), (0.25, 0.2), (0.31, 0.05))
    next_obs, rewards, terminated, truncated, info = envs.step(np.array([3, 3, 3]))
    final_obs = info["final_obs"]
    expected = [(0.05, 0), (0.05, 0.2), (0.11, 0.05)]  # the last is 0.1208 away: outside
    np.testing.assert_allclose(final_obs, expected)
    assert terminated.tolist() == [True, False, False] and not truncated.any()
    np.testing.assert_allclose(rewards, [0.99, -0.01, -0.01])
    assert (next_obs[0] != final_obs[0]).all() and (next_obs[1:] == final_obs[1:]).all()
    np.testing.assert_array_equal(next_obs, envs.position)
    assert envs.elapsed.tolist() == [0, 1, 1]
    final_obs[:] = 7  # what was handed out is not the world's own memory
    next_obs[:] = 7
    assert (envs.position != 7).all()


def test_the_time_limit_truncates_after_sixty_steps_unless_the_goal_is_reached_then():
    envs = place(t.PointNav(2, False), (0.5, 0.5), (0.25, 0.0))
    for step in range(1, 61):
        last = step == 60
        _, _, terminated, truncated, info = envs.step(np.array([0, 3 if last else 0]))
        assert info["length"].tolist() == [step, step]
        assert truncated.tolist() == [last, False] and terminated.tolist() == [False, last]
    assert envs.elapsed.tolist() == [0, 0]


def test_starts_are_uniform_and_the_seeds_own():
    starts, _ = t.PointNav(20_000, False).reset(seed=3)
    assert np.abs(starts).max() <= 1 and np.abs(starts).max() > 0.999
    np.testing.assert_allclose(starts.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(starts.std(0), 1 / math.sqrt(3), rtol=0.02)
    np.testing.assert_array_equal(starts, t.PointNav(20_000, False).reset(seed=3)[0])
    assert (starts != t.PointNav(20_000, False).reset(seed=4)[0]).all()


def test_velocities_are_cut_to_full_speed():
    envs = place(t.PointNav(2, True), (0.5, 0.5), (0.5, 0.5))
    obs, *_ = envs.step(np.array([[0.5, -1.0], [9.0, -0.1]]))
    np.testing.assert_allclose(obs, [(0.6, 0.3), (0.7, 0.48)])


# The experts

GREEDY = t.make_expert(False, 0)


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ((0.5, 0.5), "left"),  # ties go along x
        ((0.5, -0.5), "left"),
        ((-0.5, 0.5), "right"),
        ((-0.5, -0.5), "right"),
        ((0.0, 0.0), "stay"),
        ((0.1, 0.5), "down"),
        ((0.1, -0.5), "up"),
        ((0.0, -0.3), "up"),
        ((-0.5, 0.4), "right"),
        ((0.5, 0.4), "left"),
    ],
)
def test_greedy_expert_and_its_ties(point, name):
    assert t.ACTION_NAMES[GREEDY(np.array([point]))[0]] == name


def test_greedy_expert_misses_exactly_the_starts_whose_lattice_has_no_point_in_the_goal():
    played = t.play_episodes(GREEDY, 20_000, 5, False)
    nearest = (played["obs"][0] + 0.1) % 0.2 - 0.1  # of the points within reach, without a wall
    np.testing.assert_array_equal(played["success"], np.hypot(*nearest.T) < t.GOAL_RADIUS)
    assert played["success"].mean() == pytest.approx(0.951, abs=0.006)
    assert (played["length"][~played["success"]] == t.MAX_EPISODE_STEPS).all()


def test_success_is_an_end_at_the_goal_whatever_the_reward(monkeypatch):
    step = t.PointNav.step

    def other_reward(self, actions):
        obs, reward, terminated, truncated, info = step(self, actions)
        return obs, reward - 2.0, terminated, truncated, info

    before = t.play_episodes(GREEDY, 500, 5, False)
    monkeypatch.setattr(t.PointNav, "step", other_reward)
    after = t.play_episodes(GREEDY, 500, 5, False)
    assert 0 < before["success"].mean() < 1
    np.testing.assert_array_equal(before["success"], after["success"])


def test_velocity_expert_goes_straight_and_no_farther_than_the_goal():
    class Silent:
        def standard_normal(self, shape):
            return np.zeros(shape)

    obs = np.array([(0.6, 0.8), (-0.3, 0.0), (0.05, -0.1), (0.0, 0.0)])
    velocity = t.expert_actions(obs, True, Silent())
    np.testing.assert_allclose(velocity, [(-0.6, -0.8), (1, 0), (-0.25, 0.5), (0, 0)], atol=1e-12)
    many = t.make_expert(True, 0)(np.tile(obs[:1], (20_000, 1)))
    np.testing.assert_allclose(many.mean(0), (-0.6, -0.8), atol=0.05)  # the cut moves it a little
    np.testing.assert_allclose(many[:, 0].std(), t.EXPERT_STD, rtol=0.1)
    assert np.abs(many).max() == 1


def test_played_episodes_equal_a_plain_loop():
    played = t.play_episodes(GREEDY, 6, 11, False)
    starts, _ = t.PointNav(6, False).reset(seed=11)
    all_pairs = t.pairs_of(played)
    assert len(all_pairs[0]) == len(all_pairs[1]) == played["length"].sum()
    for i, start in enumerate(starts):
        world, path, moves, total = place(t.PointNav(1, False), start), [start], [], 0.0
        while True:
            moves.append(GREEDY(path[-1][None])[0])
            _, reward, terminated, truncated, info = world.step(np.array(moves[-1:]))
            path.append(info["final_obs"][0])
            total += reward[0]
            if terminated[0] or truncated[0]:
                break
        np.testing.assert_allclose(played["obs"][: len(path), i], path)
        obs, actions = t.pairs_of(played, slice(i, i + 1))
        np.testing.assert_allclose(obs, path[:-1], rtol=1e-6)
        np.testing.assert_array_equal(actions, moves)
        assert (played["length"][i], played["success"][i]) == (len(moves), terminated[0])
        assert played["return"][i] == played["rewards"][:, i].sum() == pytest.approx(total)


# Networks and distributions


def make_agent(continuous, hidden_size=8, seed=0):
    agent = t.ActorCritic(continuous, hidden_size, seeded(seed))
    for parameter in agent.parameters():  # away from the almost uniform start
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(seed + 1))
    return agent


def test_the_discriminator_sees_the_position_beside_a_one_hot_move_or_a_velocity():
    actions, obs = torch.tensor([[0, 4], [2, 1]]), torch.rand(2, 2, 2)
    disc = t.PairDiscriminator(False, 8, seeded())
    pair = disc.pairs(obs, actions)
    assert pair.shape == (2, 2, 2 + 5) and disc(pair).shape == (2, 2)
    assert (pair[..., :2] == t.INPUT_SCALE * obs).all()
    assert (pair[..., 2:].sum(-1) == 1).all() and (pair[..., 2:].argmax(-1) == actions).all()
    disc = t.PairDiscriminator(True, 8, seeded())
    pair = disc.pairs(obs, obs + 1)
    assert (pair[..., 2:] == obs + 1).all() and disc(pair).shape == (2, 2)


@pytest.mark.parametrize("continuous", [False, True])
def test_a_new_policy_is_almost_uniform_or_has_the_deviation_asked_for(continuous):
    policy, value = t.ActorCritic(continuous, 64, seeded())(torch.randn(50, 2))
    assert value.shape == (50,)
    if continuous:
        assert policy.mean.abs().max() < 0.05
        torch.testing.assert_close(policy.stddev, torch.full((50, 2), math.exp(t.INITIAL_LOG_STD)))
    else:
        torch.testing.assert_close(policy.probs, torch.full((50, 5), 0.2), atol=0.01, rtol=0)


def test_log_prob_entropy_and_kl_of_velocities_equal_their_formulas():
    old, new = make_agent(True), make_agent(True, seed=5)
    x, action = torch.randn(50, 2), torch.randn(50, 2)
    with torch.no_grad():
        p, q = old(x)[0], new(x)[0]
    z = (action - p.mean) / p.stddev
    log_prob = (-0.5 * z**2 - p.stddev.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(p.log_prob(action), log_prob)
    entropy = (p.stddev.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    torch.testing.assert_close(p.entropy(), entropy)
    squares = (p.variance + (p.mean - q.mean) ** 2) / q.variance
    kl = ((q.stddev / p.stddev).log() + 0.5 * (squares - 1)).sum(-1)
    torch.testing.assert_close(t.kl_divergence(p, q), kl, rtol=1e-4, atol=1e-5)


def test_sampled_actions_follow_the_policy():
    agent, generator = make_agent(False), seeded()
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]).expand(40_000, 5)
    moves = agent.sample(t.Categorical(logits=logits), generator)
    shares = torch.bincount(moves, minlength=5) / 40_000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.01, rtol=0)
    normal = t.Normal(torch.full((40_000, 2), 0.3), torch.tensor([0.4, 1.0]))
    velocities = make_agent(True).sample(t.Independent(normal, 1), generator)
    torch.testing.assert_close(velocities.mean(0), torch.tensor([0.3, 0.3]), atol=0.02, rtol=0)
    torch.testing.assert_close(velocities.std(0), torch.tensor([0.4, 1.0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("continuous", [False, True])
def test_act_takes_the_mean_action_and_cuts(continuous):
    agent = make_agent(continuous)
    agent.actor[-1].weight.data *= 5  # some velocities are beyond full speed
    obs = np.random.default_rng(0).uniform(-1, 1, size=(200, 2))
    with torch.no_grad():
        policy, _ = agent(torch.tensor(obs).float())
    expected = policy.mean.clamp(-1, 1) if continuous else policy.logits.argmax(-1)
    np.testing.assert_allclose(agent.act(obs), expected, atol=1e-5)
    sampled = [agent.act(obs, seeded(seed)) for seed in (0, 0, 1)]
    assert (sampled[0] == sampled[1]).all() and (sampled[0] != sampled[2]).any()
    assert (sampled[0] != agent.act(obs)).any()
    assert not continuous or np.abs(sampled[0]).max() == 1  # the cut


@pytest.mark.parametrize("continuous", [False, True])
def test_torch_still_checks_the_distributions_of_others(continuous):
    make_agent(continuous)(torch.zeros(1, 2))
    with pytest.raises(ValueError):
        torch.distributions.Normal(math.nan, 1.0)


# Pure functions


def slow_gae(rewards, values, next_values, ended, gamma, lam):
    """The definition: A_t = sum_l (gamma lambda)^l delta_{t+l}, up to the end of the episode."""
    advantages = np.zeros(rewards.shape)
    for t0, n in np.ndindex(rewards.shape):
        for k in range(t0, len(rewards)):
            delta = rewards[k, n] + gamma * next_values[k, n] - values[k, n]
            advantages[t0, n] += (gamma * lam) ** (k - t0) * delta
            if ended[k, n]:
                break
    return advantages


def test_gae_equals_its_definition_at_the_ends_of_episodes_and_of_the_rollout():
    rng, shape = np.random.default_rng(0), (12, 3)
    rewards, values, next_values = rng.normal(size=(3, *shape))
    ended = rng.random(shape) < 0.3
    assert ended.any() and not ended[-1].all()
    arrays = rewards, values, next_values, ended
    advantages, returns = t.compute_gae(*map(torch.tensor, arrays), 0.9, 0.8)
    expected = slow_gae(*arrays, 0.9, 0.8)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns, expected + values, atol=1e-12)


@pytest.mark.parametrize("form", ["softplus", "logit", "logsigmoid"])
def test_reward_forms_equal_their_definition_and_stay_finite(form):
    logit = torch.linspace(-8, 8, 33, dtype=torch.float64)
    d = torch.sigmoid(logit)
    definition = {"softplus": -torch.log(1 - d), "logsigmoid": torch.log(d)}
    definition["logit"] = definition["softplus"] + definition["logsigmoid"]
    np.testing.assert_allclose(t.reward_of_form(logit, form), definition[form], atol=1e-9)
    assert torch.isfinite(t.reward_of_form(torch.tensor([-1e4, 1e4]), form)).all()


def test_discriminator_loss_closed_forms():
    zero = torch.zeros(5)
    assert t.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    for logit in (3, -3):  # the expert's side is the positive one
        loss = t.discriminator_loss(zero + logit, zero - logit).item()
        assert loss == pytest.approx(2 * math.log(1 + math.exp(-logit)), rel=1e-5)


def test_policy_loss_inside_and_beyond_the_clip():
    def loss_and_slope(ratio, advantage):
        log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
        loss = t.ppo_policy_loss(log_ratio, torch.tensor([advantage]), 0.2)
        loss.backward()
        return loss.item(), log_ratio.grad.item()

    assert loss_and_slope(1.0, 2.0) == pytest.approx((-2.0, -2.0))
    assert loss_and_slope(1.5, 2.0) == pytest.approx((-2.4, 0.0))  # no more to gain
    assert loss_and_slope(0.5, -2.0) == pytest.approx((1.6, 0.0))
    assert loss_and_slope(0.5, 2.0) == pytest.approx((-1.0, -1.0))  # but still to repair


def test_rewards_are_normalized_as_numpy_would_over_their_window():
    rng, recent = np.random.default_rng(0), deque(maxlen=10)
    batches = [rng.normal(3 * i, 1 + i, (4, 5)) for i in range(13)]
    recent.extend(torch.tensor(batch) for batch in batches)
    seen, x = np.stack(batches[-10:]), torch.tensor(batches[-1])
    expected = (batches[-1] - seen.mean()) / seen.std()
    np.testing.assert_allclose(t.normalize(x, recent), expected, rtol=1e-5)


# The absorbing state


def test_terminal_logits_are_log_ratios_of_shares():
    """With half a step added to each count of the policy's, and to the expert's one step, in the
    policy's shares."""
    policy, expert = torch.tensor([149.5, 49.5]), torch.tensor([24.25, 74.75])
    logits = t.terminal_logits(expert, policy)  # shares of 25 and 75%, and of 75 and 25%
    torch.testing.assert_close(logits, torch.tensor([1 / 3, 3.0]).log())
    for goals in (0, 1, 100):  # an expert that never ends: no end is paid for, however rare
        logits = t.terminal_logits(torch.tensor([999, 0]), torch.tensor([1000.0, goals]))
        assert logits[1].item() == pytest.approx(-math.log(1000), rel=1e-5)
    assert t.terminal_logits(torch.tensor([0, 0]), torch.zeros(2)).tolist() == [0, 0]
    assert t.terminal_logits(torch.tensor([10, 50]), torch.tensor([500.0, 0.0])).isfinite().all()


def test_the_logits_are_those_of_the_best_d_of_steps_and_absorbing_ones():
    """One table of the visits of both, the absorbing state in it, against D without it and
    counts."""
    expert, policy = torch.tensor([30, 10, 60]), torch.tensor([100, 300, 100])  # the last absorbs
    best = torch.log((expert / expert.sum()) / (policy / policy.sum()))
    d = torch.log((expert[:2] / expert[:2].sum()) / (policy[:2] / policy[:2].sum()))
    counts = [torch.stack([x[:2].sum(), x[2]]) * 10_000 for x in (expert, policy)]
    offset, absorbing = t.terminal_logits(*counts)
    torch.testing.assert_close(torch.stack([*(d + offset), absorbing]), best, rtol=1e-4, atol=1e-4)


# TRPO


def reference(agent, x):
    """The policy on x as a distribution of numbers, not of a graph."""
    with torch.no_grad():
        return agent(x)[0]


def test_conjugate_gradient_solves_a_known_system():
    a = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    x = t.conjugate_gradient(lambda v: a @ v, b, 2)
    torch.testing.assert_close(x, torch.tensor([1 / 11, 7 / 11], dtype=torch.float64))
    root = torch.randn(12, 12, dtype=torch.float64, generator=seeded())
    a, b = root @ root.T + torch.eye(12), root[0]
    x = t.conjugate_gradient(lambda v: a @ v, b, 40)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-4, atol=1e-4)
    zero = torch.zeros(12, dtype=torch.float64)
    assert (t.conjugate_gradient(lambda v: a @ v, zero, 5) == 0).all()


@pytest.mark.parametrize("continuous", [False, True])
def test_fisher_product_equals_the_explicit_fisher_matrix(continuous):
    agent = make_agent(continuous, hidden_size=3).double()
    parameters = agent.policy_parameters()
    obs = torch.randn(4, 2, dtype=torch.float64, generator=seeded(0))
    size = sum(p.numel() for p in parameters)
    fisher = torch.zeros(size, size, dtype=torch.float64)
    for one in obs:
        if continuous:  # J' diag(1 / std^2) J for the mean, and 2 for each log_std
            for i in range(2):
                options = {"materialize_grads": True, "allow_unused": True}
                row = t.flat_gradient(agent(one[None])[0].mean[0, i], parameters, **options)
                fisher += torch.outer(row, row) / agent.log_std[i].exp().square().item() / len(obs)
        else:  # the definition: E_a[grad log p grad log p']
            for action in range(5):
                log_p = agent(one[None])[0].logits[0, action]
                row = t.flat_gradient(log_p, parameters)
                fisher += log_p.exp().item() * torch.outer(row, row) / len(obs)
    if continuous:
        names = [name for name, _ in agent.named_parameters() if not name.startswith("critic")]
        begin = sum(p.numel() for p in parameters[: names.index("log_std")])
        fisher[range(begin, begin + 2), range(begin, begin + 2)] += 2
    vector = torch.randn(size, dtype=torch.float64, generator=seeded(1))
    product = t.fisher_product(agent, obs, 0.1)
    torch.testing.assert_close(product(vector), fisher @ vector + 0.1 * vector)
    torch.testing.assert_close(product(2 * vector), 2 * product(vector))  # again, same graph


def trpo_problem(continuous, seed=0):
    agent, generator = make_agent(continuous, 16, seed), seeded(seed)
    x = torch.randn(400, 2, generator=generator)
    policy = reference(agent, x)
    action = agent.sample(policy, generator)
    return agent, x, policy, action, torch.randn(400, generator=generator)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("max_kl", [0.001, 0.01, 0.1, 1.0])
def test_trpo_step_keeps_its_bound_and_does_not_lower_the_surrogate(continuous, max_kl):
    for seed in range(3):
        agent, x, old, action, advantages = trpo_problem(continuous, seed)
        log = t.trpo_step(agent, x, action, advantages, t.Args(max_kl=max_kl))
        new = reference(agent, x)
        kl = torch.distributions.kl_divergence(old, new).mean().item()
        ratio = (new.log_prob(action) - old.log_prob(action)).exp()
        assert 0.05 * max_kl < kl <= max_kl * 1.001
        assert (ratio * advantages).mean() > advantages.mean()
        assert log["losses/approx_kl"] == pytest.approx(kl, rel=1e-2)
        surrogate = (ratio * advantages).mean().item()
        assert log["losses/policy_loss"] == pytest.approx(-surrogate, abs=1e-4)


def test_trpo_step_that_finds_nothing_better_leaves_the_policy(monkeypatch):
    agent, obs, _, action, advantages = trpo_problem(False)
    before = [p.clone() for p in agent.parameters()]
    solve = t.conjugate_gradient
    monkeypatch.setattr(t, "conjugate_gradient", lambda *args: -solve(*args))  # downhill
    log = t.trpo_step(agent, obs, action, advantages, t.Args())
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters()))
    assert log["losses/approx_kl"] == 0
    assert log["losses/policy_loss"] == pytest.approx(-advantages.mean().item(), abs=1e-6)


# The steps of the loop


def collected(continuous=False, steps=70, worlds=8):
    agent, envs = make_agent(continuous), t.PointNav(worlds, continuous)
    episodes = {"obs": envs.reset(seed=0)[0], "return": np.zeros(worlds)}
    rollout, log = t.collect_rollout(envs, agent, episodes, steps, seeded())
    return agent, rollout, log, episodes


@pytest.mark.parametrize("continuous", [False, True])
def test_rollout_is_continuous_and_keeps_true_next_observations(continuous):
    agent, rollout, _, episodes = collected(continuous)
    same = (rollout["obs"][1:] == rollout["next_obs"][:-1]).all(-1)
    assert (same == ~rollout["ended"][:-1]).all() and rollout["ended"].any()
    assert (rollout["terminated"] <= rollout["ended"]).all()
    at_goal = rollout["next_obs"].norm(dim=-1) < t.GOAL_RADIUS
    assert (at_goal == rollout["terminated"]).all()
    last = torch.from_numpy(episodes["obs"]).float()
    assert ((last == rollout["next_obs"][-1]).all(-1) == ~rollout["ended"][-1]).all()
    policy = reference(agent, rollout["obs"])
    log_prob = policy.log_prob(rollout["action"])
    torch.testing.assert_close(rollout["log_prob"], log_prob, atol=1e-5, rtol=1e-5)
    if continuous:
        assert rollout["action"].abs().max() > 1  # the policy's ratio is about what was sampled
        assert (rollout["executed"] == rollout["action"].clamp(-1, 1)).all()
        moved = (rollout["obs"] + t.STEP_SIZE * rollout["executed"]).clamp(-1, 1)
        torch.testing.assert_close(moved, rollout["next_obs"])
    else:
        assert (rollout["executed"] == rollout["action"]).all()
        assert rollout["action"].unique().tolist() == [0, 1, 2, 3, 4]


def test_returns_and_lengths_are_those_of_the_finished_episodes():
    _, rollout, log, episodes = collected()
    returns, lengths = [], []
    for world in range(8):
        begin = 0
        for end in (rollout["ended"][:, world].nonzero().flatten() + 1).tolist():
            returns.append(rollout["env_reward"][begin:end, world].sum().item())
            lengths.append(end - begin)
            left = rollout["steps_left"][begin:end, world].tolist()
            assert left == [t.MAX_EPISODE_STEPS - k for k in range(1, end - begin + 1)]
            begin = end
        rest = rollout["env_reward"][begin:, world].sum().item()
        assert episodes["return"][world] == pytest.approx(rest, abs=1e-5)
    assert log["charts/episodic_return"] == pytest.approx(np.mean(returns), abs=1e-5)
    assert log["charts/episodic_length"] == pytest.approx(np.mean(lengths))
    assert collected(steps=1, worlds=2)[2] == {}  # none has ended yet


def as_rewards(steps, absorbing=0.0) -> dict:
    """What compute_gail_rewards gives of rewards (T, N)."""
    return {"steps": steps, "absorbing": absorbing}


def test_a_time_limit_is_bootstrapped_and_the_goal_is_followed_by_the_absorbing_state():
    agent, rollout, _, _ = collected(steps=130)
    rewards = as_rewards(torch.zeros_like(rollout["env_reward"]), absorbing=3.0)
    batch, _ = t.estimate_advantages(agent, rollout, rewards, t.Args(gamma=0.5))
    advantages = batch["advantage"].view_as(rewards["steps"])
    with torch.no_grad():
        values, next_values = (agent(rollout[x])[1] for x in ("obs", "next_obs"))
    goal = rollout["terminated"]
    limit = rollout["ended"] & ~goal
    assert limit.any() and goal.any()
    for_ever = 3.0 * (0.5 + 0.25 + 0.125 + 0.125)  # the last stands for all that follows
    torch.testing.assert_close(advantages[goal], for_ever - values[goal])
    torch.testing.assert_close(advantages[limit], 0.5 * next_values[limit] - values[limit])
    torch.testing.assert_close(batch["return"], batch["advantage"] + values.flatten())


def test_the_same_added_to_every_reward_changes_nothing():
    """As with a mean subtracted: no step and no end is made more worth than another by it."""
    agent, rollout, _, _ = collected(steps=130)
    rewards, args = torch.randn(rollout["env_reward"].shape, generator=seeded()), t.Args()
    before, _ = t.estimate_advantages(agent, rollout, as_rewards(rewards, 0.7), args)
    agent.critic[-1].bias.data += 2.0 / (1 - args.gamma)  # of a value that has learned it
    after, _ = t.estimate_advantages(agent, rollout, as_rewards(rewards + 2.0, 2.7), args)
    assert rollout["terminated"].any()
    torch.testing.assert_close(after["advantage"], before["advantage"], atol=1e-4, rtol=0)


def test_discriminator_separates_what_can_be_separated_and_nothing_else():
    generator, args = seeded(), t.Args(disc_batch_size=64)
    obs = torch.randn(600, 2, generator=generator)
    moves = torch.randint(1, 5, (600,), generator=generator)
    for policy_moves, loss in ((moves * 0, 0.0), (moves, 2 * math.log(2))):
        disc = t.PairDiscriminator(False, 32, generator)
        optimizer, expert = torch.optim.Adam(disc.parameters(), 3e-3), disc.pairs(obs, moves)
        policy = disc.pairs(obs, policy_moves)
        log = t.update_plain_discriminator(disc, optimizer, expert, policy, 300, args, generator)
        assert log["disc/loss"] == pytest.approx(loss, abs=0.2)
        if loss == 0:
            assert log["disc/expert_acc"] == log["disc/policy_acc"] == 1
            assert log["disc/expert_prob"] > 0.8 > 0.2 > log["disc/policy_prob"]


@pytest.mark.parametrize("form", ["softplus", "logit", "logsigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
def test_rewards_are_ds_opinion_of_what_was_executed_and_of_where_tasks_end(form, normalize):
    agent, rollout, _, _ = collected(True)
    disc = t.PairDiscriminator(True, 8, seeded())
    rollout["pairs"] = disc.pairs(rollout["obs"], rollout["executed"])
    args = t.Args(continuous=True, reward_form=form, normalize_reward=normalize)
    visits = {"expert": torch.tensor([400, 1600]), "policy": torch.tensor([100.0, 20.0])}
    rewards, log = t.compute_gail_rewards(rollout, disc, deque(), visits, args)
    absorbed = sum(rollout["steps_left"][rollout["terminated"]].tolist())
    assert absorbed > 0
    counts = [100.0 + 70 * 8, 20.0 + absorbed]
    torch.testing.assert_close(visits["policy"], torch.tensor(counts))
    offset, absorbing = t.terminal_logits(visits["expert"], torch.tensor(counts))
    x = torch.cat([t.INPUT_SCALE * rollout["obs"], rollout["executed"]], -1)
    with torch.no_grad():
        expected = t.reward_of_form(disc(x) + offset, form)
    absorbing = t.reward_of_form(absorbing, form)
    assert log["reward/gail_mean"] == pytest.approx(expected.mean().item(), rel=1e-4, abs=1e-6)
    assert log["reward/gail_std"] == pytest.approx(expected.std().item(), rel=1e-4)
    assert log["reward/env_mean"] == pytest.approx(rollout["env_reward"].mean().item(), rel=1e-5)
    if normalize:
        mean, std = expected.mean(), expected.std(correction=0)
        expected, absorbing = (expected - mean) / std, (absorbing - mean) / std
    torch.testing.assert_close(rewards["steps"], expected, rtol=1e-4, atol=1e-5)
    assert rewards["absorbing"] == pytest.approx(absorbing.item(), rel=1e-4)


@pytest.mark.parametrize("form", ["softplus", "logit", "logsigmoid"])
def test_a_policy_that_ends_as_the_expert_does_gains_nothing_by_lingering(form):
    """D cannot tell and both reach the goal as often: every step is worth the same, the last too."""
    agent, rollout, _, _ = collected(steps=130)
    args, disc = t.Args(reward_form=form, gamma=0.99), t.PairDiscriminator(False, 8, seeded())
    rollout["pairs"] = disc.pairs(rollout["obs"], rollout["executed"])
    disc.net[-1].weight.data.zero_()
    counts = torch.tensor([130 * 8, rollout["steps_left"][rollout["terminated"]].sum()])
    visits = {"expert": 1e6 * counts, "policy": 1e6 * counts}  # so many that half a one is nothing
    rewards, _ = t.compute_gail_rewards(rollout, disc, deque(), visits, args)
    agent.critic[-1].weight.data.zero_()
    agent.critic[-1].bias.data.fill_(rewards["absorbing"] / (1 - args.gamma))
    batch, _ = t.estimate_advantages(agent, rollout, rewards, args)
    assert rollout["terminated"].any() and (abs(rewards["absorbing"]) < 1e-6) == (form == "logit")
    torch.testing.assert_close(batch["advantage"], torch.zeros(130 * 8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("algorithm", ["ppo", "trpo"])
def test_an_update_makes_what_was_rewarded_likelier(continuous, algorithm):
    agent, rollout, _, _ = collected(continuous)
    toward = -(rollout["obs"] * (rollout["next_obs"] - rollout["obs"])).sum(-1)
    x, rewards = rollout["obs"], as_rewards(10 * toward)
    before = reference(agent, x).log_prob(rollout["action"])
    args = t.Args(continuous=continuous, algorithm=algorithm, gamma=0.0)
    if algorithm == "ppo":
        optimizer = torch.optim.Adam(agent.parameters(), 3e-3)
        log = t.update_by_ppo(agent, optimizer, rollout, rewards, args, seeded())
        assert log["losses/approx_kl"] > 0 and 0 < log["losses/clipfrac"] < 1
    else:
        optimizer = torch.optim.Adam(agent.critic.parameters(), 3e-3)
        log = t.update_by_trpo(agent, optimizer, rollout, rewards, args)
        assert 0 < log["losses/approx_kl"] <= args.max_kl
    change = reference(agent, x).log_prob(rollout["action"]) - before
    assert change[toward > 0.01].mean() > 0 > change[toward < -0.01].mean()
    assert log["losses/explained_variance"] < 0.5 and log["losses/entropy"] != 0


def test_ppo_cuts_its_gradient():
    agent, rollout, _, _ = collected()
    before = torch.cat([x.detach().flatten() for x in agent.parameters()])
    args = t.Args(update_epochs=1, num_minibatches=1, max_grad_norm=0.25)
    optimizer, rewards = torch.optim.SGD(agent.parameters(), 1.0), as_rewards(1e3 * rollout["obs"].sum(-1))
    t.update_by_ppo(agent, optimizer, rollout, rewards, args, seeded())
    after = torch.cat([x.detach().flatten() for x in agent.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_entropy_bonus_keeps_the_policy_wider():
    """PPO with rewards of nothing, TRPO with advantages of nothing."""
    entropies = []
    for coefficient in (0.0, 0.5):
        agent, rollout, _, _ = collected()
        optimizer = torch.optim.Adam(agent.parameters(), 3e-3)
        rewards = as_rewards(torch.zeros_like(rollout["env_reward"]))
        args = t.Args(ent_coef=coefficient)
        t.update_by_ppo(agent, optimizer, rollout, rewards, args, seeded())
        entropies.append(reference(agent, rollout["obs"]).entropy().mean())
    assert entropies[1] > entropies[0] + 0.01
    agent, x, policy, action, advantages = trpo_problem(False)
    t.trpo_step(agent, x, action, 0 * advantages, t.Args(ent_coef=0.5))
    assert reference(agent, x).entropy().mean() > policy.entropy().mean() + 0.01


def test_fresh_accuracy_knows_a_copy_from_a_beginner(monkeypatch):
    beginner = make_agent(False, 64)
    assert t.fresh_accuracy(beginner, t.Args(), 0, episodes=300) > 0.8
    monkeypatch.setattr(t.ActorCritic, "act", lambda self, obs, generator: GREEDY(obs))
    assert t.fresh_accuracy(beginner, t.Args(), 0, episodes=300) == pytest.approx(0.5, abs=0.08)


def test_evaluation_gives_everyone_the_same_starts(tmp_path, capsys):
    path = tmp_path / "evaluation.npz"
    played = t.final_evaluation(make_agent(True, 64), t.Args(eval_episodes=30, seed=3), path)
    assert list(played) == ["expert", "mean_action", "sampled"]
    saved = np.load(path)
    for name, who in played.items():
        np.testing.assert_array_equal(who["obs"][0], played["expert"]["obs"][0])
        np.testing.assert_allclose(saved[name][-1], who["return"])
        assert saved[name].shape == who["rewards"].shape
    differ = played["mean_action"]["actions"][0] != played["sampled"]["actions"][0]
    assert differ.any(axis=1).mean() > 0.5
    solved = f"{played['expert']['success'].mean():.1%} of 30 starts solved"
    assert solved in capsys.readouterr().out


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_training_moves_every_parameter(tmp_path, monkeypatch, no_page, flags):
    made, kinds = [], (t.ActorCritic, t.PairDiscriminator)
    for kind in kinds:

        def build(*args, kind=kind):
            made.append(kind(*args))
            made[-1].before = {name: p.detach().clone() for name, p in made[-1].named_parameters()}
            return made[-1]

        monkeypatch.setattr(t, kind.__name__, build)
    run(tmp_path, "moves", *flags)
    agent = next(module for module in made if isinstance(module, kinds[0]))
    disc = next(module for module in made if isinstance(module, kinds[1]))
    for module in (agent, disc):
        for name, parameter in module.named_parameters():
            assert not torch.equal(parameter, module.before[name]), name


def test_fitting_trpos_value_leaves_its_policy_alone():
    agent, rollout, _, _ = collected()
    alone, args, rewards = make_agent(False), t.Args(), torch.randn(rollout["env_reward"].shape)
    rewards = as_rewards(rewards)
    optimizer = torch.optim.Adam(agent.critic.parameters(), 1e-2)
    batch, _ = t.estimate_advantages(alone, rollout, rewards, args)
    advantage = batch["advantage"] - batch["advantage"].mean()
    advantage = advantage / (batch["advantage"].std() + 1e-8)
    t.trpo_step(alone, batch["obs"], batch["action"], advantage, args)
    with torch.no_grad():
        values = alone(batch["obs"])[1]  # after the step, which moves the trunk
    log = t.update_by_trpo(agent, optimizer, rollout, rewards, t.Args(value_steps=1))
    squares = (values - batch["return"]).square().mean().item()
    assert log["losses/value_loss"] == pytest.approx(0.5 * squares, rel=1e-5)
    assert all(map(torch.equal, agent.policy_parameters(), alone.policy_parameters()))
    assert not torch.equal(agent.critic[0].weight, alone.critic[0].weight)


# Whole runs


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_run_writes_its_files_and_returns_its_summary(tmp_path, capsys, flags):
    summary = run(tmp_path, "a", *flags)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    files = {"config.json", "metrics.csv", "summary.json", "policy.pt", "evaluation.npz"}
    assert names == files | {"diagnostics.html"}
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [256, 512, 768, 1024]
    assert [bool(row["eval/return_mean"]) for row in rows] == [False, True, False, True]
    assert summary["env_steps"] == 1024
    assert all(math.isfinite(value) for value in summary.values())
    returns = [float(row["eval/return_mean"]) for row in rows if row["eval/return_mean"]]
    assert summary["best/return_mean"] == max(returns)

    shown, whole = capsys.readouterr().out, np.load(tmp_path / "a/evaluation.npz")
    whole = {name: whole[name] for name in whole.files}
    t.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "20"])
    lines = capsys.readouterr().out.splitlines()
    names = ["expert", "mean_action", "sampled"]
    assert [line.split()[0] for line in lines] == list(whole) == names
    assert shown.splitlines()[:3] == lines  # the same episodes as at the end of the run
    for name, returns in np.load(tmp_path / "a/policy.npz").items():
        np.testing.assert_array_equal(returns, whole[name])
    before = (tmp_path / "a/evaluation.npz").read_bytes()
    t.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "3"])
    assert (tmp_path / "a/evaluation.npz").read_bytes() == before  # the run's own evaluation stays


@pytest.mark.parametrize("continuous", [False, True])
def test_the_page_has_its_titles_axes_and_curves(tmp_path, monkeypatch, continuous):
    pages, draw_page = [], t.draw_page
    monkeypatch.setattr(t, "draw_page", lambda *args: pages.append(draw_page(*args)) or pages[-1])
    run(tmp_path, "a", *(["--continuous"] if continuous else []))
    page = (tmp_path / "a/diagnostics.html").read_text()
    assert "<script src=" not in page and "<link" not in page and "Plotly.newPlot" in page
    figure = pages[0]
    assert figure.layout.title.text == "a"
    assert [x.text for x in figure.layout.annotations] == [title for title, _, _ in t.PANELS]
    curves = [[] for _ in t.PANELS]
    for trace in figure.data:
        panel = int(trace.xaxis[1:] or 1) - 1
        assert trace.legendgroup == str(panel) and len(trace.x) == len(trace.y) > 0
        curves[panel].append(trace)
    assert [len(x) for x in curves] == [2, 2, 2, 4, 2, 3]
    for panel, (_, x_title, y_title) in enumerate(t.PANELS):
        x_axis, y_axis = figure.get_subplot(panel // 3 + 1, panel % 3 + 1)
        assert (x_axis.title.text, y_axis.title.text) == (x_title, y_title)
    rows = rows_of(tmp_path / "a")
    loss, cannot_tell = curves[2]
    assert [float(row["disc/loss"]) for row in rows] == list(loss.y) and loss.x[-1] == 1024
    assert set(cannot_tell.y) == {2 * math.log(2)}
    for bars in curves[1]:
        assert sum(bars.y) == pytest.approx(1)
    path = np.array([curves[0][0].x, curves[0][0].y]).T[:-1]  # a gap comes last
    np.testing.assert_array_less(np.hypot(*path[-1]), t.GOAL_RADIUS)
    assert (np.hypot(*path[:-1].T) >= t.GOAL_RADIUS).all()
    for curve in curves[5][:2]:
        assert np.isnan(np.array(curve.x)).sum() == 8  # episodes, each from the same start
    assert curves[5][0].x[0] == curves[5][1].x[0] and curves[5][0].y[0] == curves[5][1].y[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--normalize-reward", "--reward-form", "logit", "--ent-coef", "0.01"],
        ["--reward-form=softplus", "--anneal-lr=False", "--normalize-reward=True"],
    ],
)
def test_options_run(tmp_path, no_page, flags):
    assert math.isfinite(run(tmp_path, "options", *flags)["eval/return_mean"])
    rates = [float(row["charts/learning_rate"]) for row in rows_of(tmp_path / "options")]
    falling = [3e-3 * (1 - i / 4) for i in range(4)]
    assert rates == pytest.approx(falling if "--ent-coef" in flags else [3e-3] * 4)


def test_the_loop_gives_d_what_was_executed(tmp_path, no_page, monkeypatch):
    rollouts, inputs = [], []
    collect, pairs = t.collect_rollout, t.PairDiscriminator.pairs

    def collected(*args):
        rollouts.append(collect(*args)[0])
        return rollouts[-1], {}

    def noted(self, obs, executed):
        inputs.append((obs, executed))
        return pairs(self, obs, executed)

    monkeypatch.setattr(t, "collect_rollout", collected)
    monkeypatch.setattr(t.PairDiscriminator, "pairs", noted)
    run(tmp_path, "a", "--continuous")
    assert any((rollout["action"] != rollout["executed"]).any() for rollout in rollouts)
    for rollout in rollouts:
        (seen,) = (executed for obs, executed in inputs if obs is rollout["obs"])
        assert seen is rollout["executed"]
    assert max(executed.abs().max() for _, executed in inputs) <= 1


def test_the_loop_counts_where_the_expert_ends_and_all_the_policys_rollouts(tmp_path, no_page, monkeypatch):
    seen, compute = [], t.compute_gail_rewards

    def noted(rollout, disc, recent, visits, args):
        seen.append({name: x.tolist() for name, x in visits.items()})
        return compute(rollout, disc, recent, visits, args)

    monkeypatch.setattr(t, "compute_gail_rewards", noted)
    run(tmp_path, "a", "--expert-episodes", "60")
    demos = t.play_episodes(GREEDY, 60, 1001, False)
    absorbed = sum(60 - n for n, good in zip(demos["length"], demos["success"]) if good)
    assert not demos["success"].all()
    assert [x["expert"] for x in seen] == [[demos["length"].sum(), absorbed]] * 4
    steps = [x["policy"][0] for x in seen]
    assert steps == [0, 256, 512, 768]


def test_same_seed_same_run_and_another_seed_another(tmp_path, no_page):
    for name, flags in (("a", ()), ("b", ()), ("c", ("--seed", "2"))):
        run(tmp_path, name, *flags)
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b != c


def learned(tmp_path, name, *flags) -> dict:
    """The summary of a run with the default settings, but these."""
    flags += ("--fresh-disc-steps", "5", "--eval-episodes", "500")
    t.main([*flags, "--output-dir", str(tmp_path), "--run-name", name])
    return json.loads((tmp_path / name / "summary.json").read_text())


def test_it_learns_what_the_expert_does(tmp_path, no_page):
    summary = learned(tmp_path, "learn", "--total-timesteps", "120000")
    assert summary["eval/success_mean"] > summary["expert/success_mean"] - 0.05
    assert summary["eval/length_sampled_mean"] < 1.5 * summary["expert/length_mean"]


def test_a_reward_after_the_goal_keeps_the_policy_from_lingering(tmp_path, no_page, monkeypatch):
    """Where every step is paid for and the discount factor is near 1."""
    flags = "--reward-form softplus --gamma 0.99 --no-anneal-lr --total-timesteps 60000".split()
    assert learned(tmp_path, "with", *flags)["eval/success_sampled_mean"] > 0.85
    compute = t.compute_gail_rewards

    def without(*args):
        rewards, log = compute(*args)
        return rewards | {"absorbing": 0.0}, log

    monkeypatch.setattr(t, "compute_gail_rewards", without)
    assert learned(tmp_path, "without", *flags)["eval/success_sampled_mean"] < 0.7


def test_needs_nothing_but_its_few_dependencies():
    allowed = {"numpy", "torch", "tyro", "tqdm", "plotly", "wandb"}
    for node in ast.walk(ast.parse((ROOT / "toy_pointnav.py").read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed | sys.stdlib_module_names


def test_runs_alone_and_tracked(tmp_path):
    """A copied file is complete: no sibling, no package, no data."""
    (tmp_path / "toy_pointnav.py").write_text((ROOT / "toy_pointnav.py").read_text())
    command = [sys.executable, "toy_pointnav.py", *TINY, "--run-name", "alone", "--track"]
    env = {"WANDB_MODE": "offline", "PATH": "", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "disc/fresh_accuracy" in result.stdout
    assert list((tmp_path / "runs/wandb").glob("offline-run-*"))


# Users' mistakes: one sentence, exit code 2, nothing left behind


def mistake(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit_info:
        t.main([*argv])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-envs", "0"], "--num-envs"),
        (["--total-timesteps", "-5"], "--total-timesteps"),
        (["--total-timesteps", "100"], "--total-timesteps"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--gamma", "1.5"], "--gamma"),
        (["--num-minibatches", "100000"], "--num-minibatches"),
        (["--expert-episodes", "0"], "--expert-episodes"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--max-kl", "0"], "--max-kl"),
        (["--cg-iterations", "0"], "--cg-iterations"),
        (["--cg-damping", "-1"], "--cg-damping"),
        (["--fresh-disc-steps", "0"], "--fresh-disc-steps"),
        (["--evaluate", "nowhere.pt"], "--evaluate"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    assert named in mistake(capsys, *TINY, *flags)
    assert not list(tmp_path.iterdir())


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_files_of_others(tmp_path, capsys):
    torch.save({"kind": "toy_pointnav policy", "agent": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(SystemExit):
        t.main(["--evaluate", str(tmp_path / "bad.pt")])
    printed = capsys.readouterr()
    assert "ran" not in printed.out and "not a readable" in printed.err
    torch.save({"kind": "gail_ppo policy"}, tmp_path / "other.pt")
    message = mistake(capsys, "--evaluate", str(tmp_path / "other.pt"))
    assert "it is a gail_ppo policy, expected a toy_pointnav policy" in message


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    message = mistake(capsys, *TINY, "--output-dir", str(tmp_path), "--run-name", "taken")
    assert "--run-name" in message and not list((tmp_path / "taken").iterdir())


@pytest.mark.parametrize("what", ["losses/value_loss", "weights"])
def test_divergence_stops_the_run_with_a_sentence(tmp_path, monkeypatch, capsys, what):
    calls, update = [], t.update_by_ppo

    def diverging(agent, *args):
        calls.append(None)
        log = update(agent, *args)
        if len(calls) == 3 and what == "weights":
            agent.critic[-1].bias.data.fill_(math.nan)
        elif len(calls) == 3:
            log[what] = math.nan
        return log

    monkeypatch.setattr(t, "update_by_ppo", diverging)
    message = mistake(capsys, *TINY, "--output-dir", str(tmp_path), "--run-name", "nan")
    assert f"diverged at step 768: {what} not finite" in message
    assert [row["global_step"] for row in rows_of(tmp_path / "nan")] == ["256", "512"]


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_a_step_size_that_explodes_ends_with_a_sentence_too(tmp_path, capsys, flags):
    rates = ["--learning-rate", "1e30", "--value-learning-rate", "1e30"]
    place = ["--output-dir", str(tmp_path), "--run-name", "a"]
    assert "diverged at step 256" in mistake(capsys, *TINY, *rates, *flags, *place)
