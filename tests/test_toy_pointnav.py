"""toy_pointnav.py: the world and its experts by hand, the algorithms against closed forms, then whole runs."""

import ast
import csv
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import toy_pointnav as t

TINY = ["--total-timesteps", "1024", "--num-envs", "16", "--num-steps", "16", "--eval-interval", "512"]
TINY += ["--eval-episodes", "20", "--expert-episodes", "20", "--checkpoint-interval", "512", "--disc-steps", "3"]
TINY += ["--update-epochs", "2", "--fresh-disc-steps", "5"]
VARIANTS = {"ppo": [], "trpo": ["--algorithm", "trpo"], "continuous": ["--continuous"]}
VARIANTS["continuous trpo"] = ["--continuous", "--algorithm", "trpo"]


@pytest.fixture(autouse=True)
def _fewer_episodes_for_fresh_discriminators(monkeypatch):
    monkeypatch.setattr(t.fresh_accuracy, "__defaults__", (60,))


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(t, "plot_diagnostics", lambda *args: None)


def run(tmp_path, name, *flags) -> dict:
    """One in-process run; returns its summary."""
    t.main([*TINY, "--output-dir", str(tmp_path), "--run-name", name, *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir) -> list[dict]:
    """metrics.csv without what the clock decides."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "charts/SPS"} for row in rows]


def place(envs, *points):
    envs.reset()
    envs.position[:] = points
    return envs


# The world


def test_the_five_moves():
    envs = place(t.PointNav(5, 0), *[(0.5, 0.5)] * 5)
    next_obs, rewards, terminated, truncated, final_obs = envs.step(np.arange(5))
    expected = [(0.5, 0.5), (0.5, 0.7), (0.5, 0.3), (0.3, 0.5), (0.7, 0.5)]
    np.testing.assert_allclose(next_obs, expected)
    np.testing.assert_array_equal(next_obs, final_obs)
    np.testing.assert_allclose(rewards, -0.01)
    assert not terminated.any() and not truncated.any()


def test_walls_stop_the_point_on_all_sides():
    envs = place(t.PointNav(4, 0), (0.3, 0.95), (0.3, -0.95), (-0.95, 0.3), (0.95, 0.3))
    for _ in range(2):
        obs, *_ = envs.step(np.array([1, 2, 3, 4]))
        np.testing.assert_allclose(obs, [(0.3, 1), (0.3, -1), (-1, 0.3), (1, 0.3)])


def test_the_goal_ends_an_episode_and_a_new_one_starts_at_once():
    envs = place(t.PointNav(3, 0), (0.25, 0.0), (0.25, 0.2), (0.31, 0.05))
    next_obs, rewards, terminated, truncated, final_obs = envs.step(np.array([3, 3, 3]))
    np.testing.assert_allclose(final_obs, [(0.05, 0), (0.05, 0.2), (0.11, 0.05)])  # the last is 0.1208 away: outside
    assert terminated.tolist() == [True, False, False] and not truncated.any()
    np.testing.assert_allclose(rewards, [0.99, -0.01, -0.01])
    assert (next_obs[0] != final_obs[0]).all() and (next_obs[1:] == final_obs[1:]).all()
    np.testing.assert_array_equal(next_obs, envs.position)
    assert envs.elapsed.tolist() == [0, 1, 1]
    final_obs[:] = 7  # what was handed out is not the world's own memory
    next_obs[:] = 7
    assert (envs.position != 7).all()


def test_the_time_limit_truncates_after_sixty_steps_unless_the_goal_is_reached_then():
    envs = place(t.PointNav(2, 0), (0.5, 0.5), (0.25, 0.0))
    for step in range(1, 61):
        last = step == 60
        _, rewards, terminated, truncated, _ = envs.step(np.array([0, 3 if last else 0]))
        assert truncated.tolist() == [last, False] and terminated.tolist() == [False, last]
    assert envs.elapsed.tolist() == [0, 0]


def test_starts_are_uniform_and_the_seeds_own():
    starts = t.PointNav(20_000, 3).reset()
    assert np.abs(starts).max() <= 1 and np.abs(starts).max() > 0.999
    np.testing.assert_allclose(starts.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(starts.std(0), 1 / math.sqrt(3), rtol=0.02)
    np.testing.assert_array_equal(starts, t.PointNav(20_000, 3).reset())
    assert (starts != t.PointNav(20_000, 4).reset()).all()


def test_noise_is_added_to_every_move():
    envs = place(t.PointNav(20_000, 0, noise_std=0.05), *[(0.5, -0.5)] * 20_000)
    obs, *_ = envs.step(np.full(20_000, 4))
    np.testing.assert_allclose(obs.mean(0), (0.7, -0.5), atol=0.002)
    np.testing.assert_allclose(obs.std(0), 0.05, rtol=0.03)


def test_velocities_are_cut_to_full_speed():
    envs = place(t.PointNav(2, 0, continuous=True), (0.5, 0.5), (0.5, 0.5))
    obs, *_ = envs.step(np.array([[0.5, -1.0], [9.0, -0.1]]))
    np.testing.assert_allclose(obs, [(0.6, 0.3), (0.7, 0.48)])


# The experts


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
    assert t.ACTION_NAMES[t.greedy_expert(np.array([point]))[0]] == name


def test_greedy_expert_misses_exactly_the_starts_whose_lattice_has_no_point_in_the_goal():
    played = t.play_episodes(t.greedy_expert, 20_000, 5, False, 0.0)
    nearest = (played.obs[0] + 0.1) % 0.2 - 0.1  # of the points that moves of 0.2 can reach, without a wall
    np.testing.assert_array_equal(played.success, np.hypot(*nearest.T) < t.GOAL_RADIUS)
    assert played.success.mean() == pytest.approx(0.951, abs=0.006)
    assert (played.lengths[~played.success] == t.MAX_EPISODE_STEPS).all()


def test_velocity_expert_goes_straight_and_no_farther_than_the_goal():
    obs = np.array([(0.6, 0.8), (-0.3, 0.0), (0.05, -0.1), (0.0, 0.0)])
    velocity = t.velocity_expert(obs, None)
    np.testing.assert_allclose(velocity, [(-0.6, -0.8), (1, 0), (-0.25, 0.5), (0, 0)], atol=1e-12)
    many = t.velocity_expert(np.tile(obs[:1], (20_000, 1)), np.random.default_rng(0))
    np.testing.assert_allclose(many.mean(0), (-0.6, -0.8), atol=0.05)  # the cut at 1 moves it a little
    np.testing.assert_allclose(many[:, 0].std(), t.EXPERT_STD, rtol=0.1)
    assert np.abs(many).max() == 1


def test_played_episodes_equal_a_plain_loop():
    played = t.play_episodes(t.greedy_expert, 6, 11, False, 0.0)
    starts = t.PointNav(6, 11).reset()
    obs, actions, episode = played.pairs()
    for i, start in enumerate(starts):
        world, path, moves, total = place(t.PointNav(1, 0), start), [start], [], 0.0
        while True:
            moves.append(t.greedy_expert(path[-1][None])[0])
            _, reward, terminated, truncated, final_obs = world.step(np.array(moves[-1:]))
            path.append(final_obs[0])
            total += reward[0]
            if terminated[0] or truncated[0]:
                break
        np.testing.assert_allclose(played.path(i), path)
        np.testing.assert_allclose(obs[episode == i], path[:-1])
        np.testing.assert_array_equal(actions[episode == i], moves)
        assert (played.lengths[i], played.success[i]) == (len(moves), terminated[0])
        assert played.returns[i] == pytest.approx(total)
    assert len(obs) == len(actions) == played.lengths.sum()


# Networks and distributions


def test_the_discriminators_input():
    actions = torch.tensor([[0, 4], [2, 1]])
    obs = torch.randn(2, 2, 2)
    pair = t.disc_input(obs, actions)
    assert pair.shape == (2, 2, 2 + 5) and (pair[..., :2] == obs).all()
    assert (pair[..., 2:].sum(-1) == 1).all() and (pair[..., 2:].argmax(-1) == actions).all()
    assert (t.disc_input(obs, obs + 1)[..., 2:] == obs + 1).all()


def make_agent(continuous, hidden_size=8, seed=0):
    agent = t.ActorCritic(continuous, hidden_size, torch.Generator().manual_seed(seed))
    for parameter in agent.parameters():  # away from the almost uniform start
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 1))
    return agent


def reference(agent, head):
    if agent.continuous:
        return torch.distributions.Independent(torch.distributions.Normal(head, agent.log_std.exp()), 1)
    return torch.distributions.Categorical(logits=head)


@pytest.mark.parametrize("continuous", [False, True])
def test_log_prob_entropy_and_kl_equal_torch(continuous):
    old, new = make_agent(continuous), make_agent(continuous, seed=5)
    obs = torch.randn(50, 2)
    head, new_head = old(obs)[0].detach(), new(obs)[0].detach()
    action = reference(old, head).sample()
    expected = reference(old, head)
    torch.testing.assert_close(old.log_prob(head, action), expected.log_prob(action))
    torch.testing.assert_close(old.entropy(head), expected.entropy().mean())
    kl = torch.distributions.kl_divergence(expected, reference(new, new_head)).mean()
    torch.testing.assert_close(new.kl_from(head, old.old_log_std(), new_head), kl, rtol=1e-4, atol=1e-5)


def test_sampled_actions_follow_the_policy():
    generator = torch.Generator().manual_seed(0)
    head = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]).expand(40_000, 5)
    shares = torch.bincount(t.sample_actions(head, None, generator), minlength=5) / 40_000
    torch.testing.assert_close(shares, head[0].softmax(-1), atol=0.01, rtol=0)
    velocities = t.sample_actions(torch.zeros(40_000, 2) + 0.3, torch.tensor([-1.0, 0.0]), generator)
    torch.testing.assert_close(velocities.mean(0), torch.tensor([0.3, 0.3]), atol=0.02, rtol=0)
    torch.testing.assert_close(velocities.std(0), torch.tensor([math.exp(-1), 1.0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("continuous", [False, True])
def test_exported_policy_acts_as_the_agent(continuous):
    agent, args = make_agent(continuous), t.Args(continuous=continuous, hidden_size=8)
    mean, std, obs = torch.tensor([0.1, -0.2]), torch.tensor([0.5, 2.0]), np.random.default_rng(0).normal(size=(30, 2))
    head = agent(t.standardize(torch.as_tensor(obs, dtype=torch.float32), mean, std))[0].detach()
    actions = t.load_policy(t.export_toy_policy(agent, mean, std, args), False, 0)(obs)
    np.testing.assert_allclose(actions, head.clamp(-1, 1) if continuous else head.argmax(-1), atol=1e-6)


# TRPO


def test_conjugate_gradient_solves_a_known_system():
    a = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    x = t.conjugate_gradient(lambda v: a @ v, b, 2)
    torch.testing.assert_close(x, torch.tensor([1 / 11, 7 / 11], dtype=torch.float64))
    root = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = root @ root.T + torch.eye(12), root[0]
    torch.testing.assert_close(
        t.conjugate_gradient(lambda v: a @ v, b, 40), torch.linalg.solve(a, b), rtol=1e-4, atol=1e-4
    )
    zero = torch.zeros(12, dtype=torch.float64)
    assert (t.conjugate_gradient(lambda v: a @ v, zero, 5) == 0).all()


@pytest.mark.parametrize("continuous", [False, True])
def test_fisher_product_equals_the_explicit_fisher_matrix(continuous):
    agent = make_agent(continuous, hidden_size=3).double()
    parameters = agent.policy_parameters()
    obs = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    size = sum(p.numel() for p in parameters)
    fisher = torch.zeros(size, size, dtype=torch.float64)
    for one in obs:
        if continuous:  # J' diag(1 / std^2) J for the mean, and 2 for each log_std
            for i in range(2):
                head, _ = agent(one[None])
                row = t.flat_gradient(head[0, i], parameters, materialize_grads=True, allow_unused=True)
                fisher += torch.outer(row, row) / agent.log_std[i].exp().square().item() / len(obs)
        else:  # the definition: E_a[grad log p grad log p']
            for action in range(5):
                log_p = agent(one[None])[0].log_softmax(-1)[0, action]
                row = t.flat_gradient(log_p, parameters)
                fisher += log_p.exp().item() * torch.outer(row, row) / len(obs)
    if continuous:
        names = [name for name, _ in agent.named_parameters() if not name.startswith("critic")]
        begin = sum(p.numel() for p in parameters[: names.index("log_std")])
        fisher[range(begin, begin + 2), range(begin, begin + 2)] += 2
    vector = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    product = t.fisher_product(agent, obs, 0.1)
    torch.testing.assert_close(product(vector), fisher @ vector + 0.1 * vector)
    torch.testing.assert_close(product(2 * vector), 2 * product(vector))  # and again, from the same graph


def trpo_problem(continuous, seed=0):
    agent, generator = make_agent(continuous, 16, seed), torch.Generator().manual_seed(seed)
    obs = torch.randn(400, 2, generator=generator)
    head = agent(obs)[0].detach()
    action = t.sample_actions(head, agent.old_log_std(), generator)
    return agent, obs, head, action, torch.randn(400, generator=generator)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("max_kl", [0.001, 0.01, 0.1, 1.0])
def test_trpo_step_keeps_its_bound_and_does_not_lower_the_surrogate(continuous, max_kl):
    for seed in range(3):
        agent, obs, head, action, advantages = trpo_problem(continuous, seed)
        old = make_agent(continuous, 16, seed)
        log = t.trpo_step(agent, obs, action, advantages, t.Args(max_kl=max_kl))
        with torch.no_grad():
            new_head = agent(obs)[0]
            kl = torch.distributions.kl_divergence(reference(old, head), reference(agent, new_head)).mean()
            ratio = (reference(agent, new_head).log_prob(action) - reference(old, head).log_prob(action)).exp()
        assert kl <= max_kl * 1.001 and kl > 0.05 * max_kl
        assert (ratio * advantages).mean() > advantages.mean()
        assert log["approx_kl"] == pytest.approx(kl.item(), rel=1e-2)
        assert log["policy_loss"] == pytest.approx(-(ratio * advantages).mean().item(), abs=1e-4)


def test_trpo_step_that_finds_nothing_better_leaves_the_policy(monkeypatch):
    agent, obs, _, action, advantages = trpo_problem(False)
    before = [p.clone() for p in agent.parameters()]
    solve = t.conjugate_gradient
    monkeypatch.setattr(t, "conjugate_gradient", lambda *args: -solve(*args))  # downhill, at every length
    log = t.trpo_step(agent, obs, action, advantages, t.Args())
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters()))
    assert log["approx_kl"] == pytest.approx(0, abs=1e-6)


# The steps of the loop


def collected(continuous=False, steps=70, envs=8):
    generator = torch.Generator().manual_seed(0)
    agent = make_agent(continuous)
    collector = t.PointCollector(t.PointNav(envs, 0, continuous), torch.zeros(2), torch.ones(2))
    return agent, collector, collector.rollout(agent, steps, generator)


@pytest.mark.parametrize("continuous", [False, True])
def test_rollout_is_continuous_and_keeps_true_next_observations(continuous):
    agent, collector, rollout = collected(continuous)
    same = (rollout.obs[1:] == rollout.next_obs[:-1]).all(-1)
    assert (same == ~rollout.ended[:-1]).all() and rollout.ended.any()
    assert (rollout.terminated <= rollout.ended).all()
    at_goal = rollout.next_obs.norm(dim=-1) < t.GOAL_RADIUS
    assert (at_goal == rollout.terminated).all()
    with torch.no_grad():
        torch.testing.assert_close(rollout.log_probs, agent.log_prob(agent(rollout.obs)[0], rollout.actions))
    if continuous:
        assert rollout.actions.abs().max() > 1  # the policy's ratio is about what was sampled
        assert (rollout.executed_actions == rollout.actions.clamp(-1, 1)).all()
        moved = (rollout.obs + t.STEP_SIZE * rollout.executed_actions).clamp(-1, 1)
        torch.testing.assert_close(moved, rollout.next_obs)


def test_every_finished_episode_is_counted():
    _, collector, rollout = collected()
    assert len(collector.finished) == rollout.ended.sum()
    ended = rollout.ended.nonzero()
    for (step, value, length), (row, world) in zip(collector.finished, ended.tolist()):
        assert step == (row + 1) * 8
        rewards = rollout.env_rewards[row + 1 - length : row + 1, world]
        assert value == pytest.approx(rewards.sum().item(), abs=1e-5)


def test_a_time_limit_is_bootstrapped_and_the_goal_is_not():
    agent, _, rollout = collected(steps=130)
    rewards = torch.zeros_like(rollout.env_rewards)
    values, advantages, _ = t.estimate_advantages(agent, rollout, rewards, t.Args(gamma=0.5))
    with torch.no_grad():
        next_values = agent(rollout.next_obs)[1]
    limit, goal = rollout.ended & ~rollout.terminated, rollout.terminated
    assert limit.any() and goal.any()
    torch.testing.assert_close(advantages[goal], -values[goal])
    torch.testing.assert_close(advantages[limit], 0.5 * next_values[limit] - values[limit])


def test_discriminator_separates_what_can_be_separated_and_nothing_else():
    generator, args = torch.Generator().manual_seed(0), t.Args(disc_batch_size=64, grad_penalty_coef=0.01)
    obs, moves = torch.randn(600, 2, generator=generator), torch.randint(1, 5, (600,), generator=generator)
    expert = t.disc_input(obs, moves)
    for policy, loss in ((t.disc_input(obs, moves * 0), 0.3), (expert, 2 * math.log(2))):
        disc = t.PairDiscriminator(False, 32, generator)
        optimizer = torch.optim.Adam(disc.parameters(), 3e-3)
        t.update_discriminator(disc, optimizer, expert, policy, args, 200, generator)
        log = t.update_discriminator(disc, optimizer, expert, policy, args, 20, generator)
        assert log["disc/loss"] == pytest.approx(loss, abs=0.2)
        if policy is not expert:
            assert log["disc/expert_acc"] == log["disc/policy_acc"] == 1 and log["disc/grad_penalty"] > 0
            assert log["disc/expert_prob"] > 0.8 > 0.2 > log["disc/policy_prob"]


def test_fresh_accuracy_knows_a_copy_from_a_beginner(monkeypatch):
    args = t.Args()
    beginner = t.export_toy_policy(make_agent(False, 64), torch.zeros(2), torch.ones(2) * 0.4, args)
    assert t.fresh_accuracy(beginner, args, 0, episodes=400) > 0.8
    monkeypatch.setattr(t, "load_policy", lambda *_: t.greedy_expert)
    assert t.fresh_accuracy(beginner, args, 0, episodes=400) == pytest.approx(0.5, abs=0.08)


def test_evaluation_gives_everyone_the_same_starts():
    policy = t.export_toy_policy(make_agent(True, 64), torch.zeros(2), torch.ones(2), t.Args(continuous=True))
    played = t.evaluate(policy, 30, 0.0, 3)
    assert list(played) == ["expert", "policy", "sampled"]
    for who in played.values():
        np.testing.assert_array_equal(who.obs[0], played["expert"].obs[0])
    assert (played["policy"].actions[0] != played["sampled"].actions[0]).any(axis=1).mean() > 0.5


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_training_moves_every_parameter(tmp_path, monkeypatch, no_figures, flags):
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
    agent, _, rollout = collected()
    alone = make_agent(False)
    args, rewards = t.Args(algorithm="trpo"), torch.randn(rollout.env_rewards.shape)
    optimizer = torch.optim.Adam(agent.critic.parameters(), 1e-2)
    _, advantages, _ = t.estimate_advantages(alone, rollout, rewards, args)
    t.trpo_step(alone, rollout.obs.flatten(0, 1), rollout.actions.flatten(), t.normalized(advantages.flatten()), args)
    log = t.update_by_trpo(agent, optimizer, rollout, rewards, args)
    assert all(torch.equal(a, b) for a, b in zip(agent.policy_parameters(), alone.policy_parameters()))
    assert not torch.equal(agent.critic[0].weight, alone.critic[0].weight)
    assert 0 < log["losses/approx_kl"] <= args.max_kl


# Whole runs


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_run_writes_its_files_and_returns_its_summary(tmp_path, capsys, flags):
    summary = run(tmp_path, "a", *flags)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    files = {"config.json", "metrics.csv", "summary.json", "checkpoint.pt", "policy.pt"}
    assert names == files | {"diagnostics.html", "diagnostics.png"}
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [256, 512, 768, 1024, 1024]
    assert [bool(row["eval/return_mean"]) for row in rows] == [False, True, False, True, True]
    assert summary["env_steps"] == 1024
    assert all(math.isfinite(value) for value in summary.values())
    page = (tmp_path / "a/diagnostics.html").read_text()
    assert not re.search(r"<script[^>]*\ssrc=|<link\s|<img[^>]*\ssrc=", page) and "Plotly.newPlot" in page
    for title in ("One expert trajectory", "Actions taken", "Discriminator loss", "same starts"):
        assert title in page

    capsys.readouterr()
    t.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "10"])
    assert "expert" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--normalize-reward", "--reward-form", "logit", "--noise-std", "0.02"],
        ["--reward-form", "softplus", "--grad-penalty-coef", "1", "--disc-ent-coef", "0.01", "--ent-coef", "0.01"],
    ],
)
def test_options_run(tmp_path, no_figures, flags):
    assert math.isfinite(run(tmp_path, "options", *flags)["eval/return_mean"])


def test_the_loop_gives_d_what_was_executed_and_keeps_the_rewards_sign(tmp_path, no_figures, monkeypatch):
    rollouts, inputs, forms, centered = [], [], [], []
    rollout, update, reward = t.PointCollector.rollout, t.update_discriminator, t.imitation_reward
    normalize = t.RewardNormalizer.normalize
    monkeypatch.setattr(t.PointCollector, "rollout", lambda *args: rollouts.append(rollout(*args)) or rollouts[-1])
    monkeypatch.setattr(t, "update_discriminator", lambda *args: inputs.append(args[3]) or update(*args))
    monkeypatch.setattr(t, "imitation_reward", lambda logit, form: forms.append(form) or reward(logit, form))
    monkeypatch.setattr(
        t.RewardNormalizer, "normalize", lambda self, x, center: centered.append(center) or normalize(self, x, center)
    )
    run(tmp_path, "a", "--continuous", "--normalize-reward", "--reward-form", "softplus")
    assert set(forms) == {"softplus"} and set(centered) == {False}
    assert any((played.actions != played.executed_actions).any() for played in rollouts)
    for played, seen in zip(rollouts, inputs[1:-1], strict=True):  # but for the fresh ones, at start and end
        assert torch.equal(seen, t.disc_input(played.obs, played.executed_actions).flatten(0, 1))


def test_same_seed_same_run_and_another_seed_another(tmp_path, no_figures):
    for name, flags in (("a", ()), ("b", ()), ("c", ("--seed", "2"))):
        run(tmp_path, name, *flags)
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b != c


class Killed(Exception):
    pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, no_figures, variant):
    flags = [*VARIANTS[variant], "--normalize-reward", "--noise-std", "0.01"]
    whole_summary = run(tmp_path, "whole", *flags)
    name = "update_by_trpo" if "trpo" in variant else "update_by_ppo"
    calls, update = [], getattr(t, name)

    def dying_update(*args):
        calls.append(None)
        if len(calls) == 4:  # after the checkpoint at 512 and one row beyond it
            raise Killed
        return update(*args)

    monkeypatch.setattr(t, name, dying_update)
    with pytest.raises(Killed):
        run(tmp_path, "killed", *flags)
    monkeypatch.setattr(t, name, update)
    t.main(["--resume", str(tmp_path / "killed/checkpoint.pt")])
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    whole, killed = (torch.load(tmp_path / name / "policy.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole["weights"][k], killed["weights"][k]) for k in whole["weights"])
    summary = json.loads((tmp_path / "killed/summary.json").read_text())
    for clock in ("seconds", "charts/SPS"):
        del summary[clock], whole_summary[clock]
    assert summary == whole_summary


def test_it_learns_what_the_expert_does(tmp_path, no_figures):
    flags = [
        "--total-timesteps",
        "60000",
        "--fresh-disc-steps",
        "5",
        "--output-dir",
        str(tmp_path),
        "--run-name",
        "learn",
    ]
    t.main([*flags, "--eval-episodes", "500"])
    summary = json.loads((tmp_path / "learn/summary.json").read_text())
    assert summary["eval/success_mean"] > summary["expert/success_mean"] - 0.05
    assert summary["eval/length_sampled_mean"] < 1.5 * summary["expert/length_mean"]


def test_needs_nothing_but_its_few_dependencies():
    allowed = {"numpy", "torch", "tyro", "tqdm", "plotly", "matplotlib", "wandb"}
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
    assert "fresh discriminator" in result.stdout
    assert list((tmp_path / "runs/alone/wandb").glob("offline-run-*"))


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
        (["--noise-std", "-0.1"], "--noise-std"),
        (["--num-minibatches", "100000"], "--num-minibatches"),
        (["--expert-episodes", "0"], "--expert-episodes"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--max-kl", "0"], "--max-kl"),
        (["--cg-iterations", "0"], "--cg-iterations"),
        (["--cg-damping", "-1"], "--cg-damping"),
        (["--resume", "nowhere.pt"], "--resume"),
        (["--resume", "nowhere.pt", "--seed", "3"], "--resume"),
        (["--evaluate", "nowhere.pt"], "--evaluate"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    flags = flags if flags[0] in ("--resume", "--evaluate") else [*TINY, *flags]
    assert named in mistake(capsys, *flags)
    assert not list(tmp_path.iterdir())


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_files_of_others(tmp_path, capsys):
    torch.save({"format_version": 1, "script": "toy_pointnav", "args": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(SystemExit):
        t.main(["--resume", str(tmp_path / "bad.pt")])
    printed = capsys.readouterr()
    assert "ran" not in printed.out and "not a readable" in printed.err
    torch.save({"format_version": 1, "script": "gail_ppo"}, tmp_path / "other.pt")
    assert "script is gail_ppo, expected toy_pointnav" in mistake(capsys, "--resume", str(tmp_path / "other.pt"))
    torch.save({"format_version": 1, "kind": "gaussian", "env_id": "HalfCheetah-v4"}, tmp_path / "policy.pt")
    assert "env_id is HalfCheetah-v4" in mistake(capsys, "--evaluate", str(tmp_path / "policy.pt"))


def test_checkpoint_of_another_version_and_malformed_policy(tmp_path, capsys, no_figures):
    run(tmp_path, "a")
    saved, policy = (torch.load(tmp_path / "a" / name, weights_only=True) for name in ("checkpoint.pt", "policy.pt"))
    saved["args"]["discount"] = saved["args"].pop("gamma")
    torch.save(saved, tmp_path / "a/checkpoint.pt")
    assert "another version" in mistake(capsys, "--resume", str(tmp_path / "a/checkpoint.pt"))
    for change in ({"weights": {}}, {"weights": 3}, {"sizes": []}, {"obs_mean": "x"}, {"kind": "gaussian"}):
        torch.save(policy | change, tmp_path / "bad.pt")
        assert "damaged" in mistake(capsys, "--evaluate", str(tmp_path / "bad.pt"), "--eval-episodes", "5")


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    message = mistake(capsys, *TINY, "--output-dir", str(tmp_path), "--run-name", "taken")
    assert "--run-name" in message and not list((tmp_path / "taken").iterdir())


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    calls, update = [], t.update_by_ppo

    def diverging(*args):
        calls.append(None)
        return update(*args) | ({"losses/value_loss": math.nan} if len(calls) == 3 else {})

    monkeypatch.setattr(t, "update_by_ppo", diverging)
    message = mistake(capsys, *TINY, "--output-dir", str(tmp_path), "--run-name", "nan")
    assert "diverged at step 768 (losses/value_loss" in message
    saved = torch.load(tmp_path / "nan/checkpoint.pt", weights_only=True)
    assert saved["progress"]["iteration"] == 2
