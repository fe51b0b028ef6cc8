"""bc.py: every function against a closed form or a slow version; then whole runs."""

import csv
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import DEMOS, ROOT, make_demo_fields

import bc

TINY = ["--gradient-steps", "60", "--eval-interval", "20", "--batch-size", "16"]
TINY += ["--hidden-size", "8", "--eval-episodes", "4", "--threads", "1"]
TASK = {"env_id": "HalfCheetah-v4", "max_episode_steps": 20}


def run(tmp_path, name, *flags) -> dict:
    """One in-process run; returns its summary."""
    place = ["--output-dir", str(tmp_path), "--run-name", name]
    bc.main([*TINY, "--demos", str(DEMOS), *place, *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir) -> list[dict]:
    """The rows of metrics.csv, without times."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: x for name, x in row.items() if name != "charts/SPS"} for row in rows]


def saved(path) -> dict:
    return torch.load(path, weights_only=True)


def weights(path) -> dict:
    return saved(path)["policy"]


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take longer than these runs; where they are not the point, they are left out."""
    monkeypatch.setattr(bc, "plot_curves", lambda *args: None)
    monkeypatch.setattr(bc, "plot_cumulative_returns", lambda *args: None)


@pytest.fixture
def no_episodes(monkeypatch, no_figures):
    """Where the policy's returns are not the point."""
    course = np.arange(8.0).reshape(2, 4)
    monkeypatch.setattr(bc, "evaluate", lambda *args: course)


def a_policy(kind="mse", hidden_size=16, obs_dim=17, low=(-1,) * 6, high=(1,) * 6, seed=0):
    """A policy whose actions vary, and whose observations are not standardized already."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    demos = {"obs": rng.normal(1, 2, (50, obs_dim)), "low": low, "high": high}
    demos["actions"] = rng.normal(0.2, 0.4, (50, len(low))).clip(low, high)
    demos["discrete"] = kind == "discrete"
    if demos["discrete"]:
        demos["actions"] = np.eye(len(low))[rng.integers(len(low), size=50)]
    policy = bc.Policy(demos, hidden_size, kind == "nll", generator)
    policy.net[-1].weight.data *= 100
    return policy


def some_pairs(policy, size=90, seed=0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    demos = {"obs": rng.normal(size=(size, 17)), "actions": rng.uniform(-1, 1, (size, 6))}
    if policy.discrete:
        demos["actions"] = np.eye(6)[rng.integers(6, size=size)]
    return bc.make_pairs(policy, demos, np.ones(size, bool))


def asked(obs: np.ndarray) -> np.ndarray:
    """What Toy asks for after an observation, between 0.1 and 0.9, in units of its actions."""
    return 0.5 + 0.4 * obs[..., :2]


class Toy(gym.Env):
    """Pays by how near an action is to what the observation asks for."""

    def __init__(self, unit=1.0, bound=1.0, worth=1.0):
        self.observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)
        self.action_space = gym.spaces.Box(-unit * bound, unit * bound, (2,), np.float32)
        self.unit, self.worth = unit, worth

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1, 1, 3)
        return self.obs, {}

    def step(self, action):
        reward = -self.worth * np.square(action / self.unit - asked(self.obs)).sum()
        self.obs = self.np_random.uniform(-1, 1, 3)
        return self.obs, reward, False, False, {}


@pytest.fixture
def toy(monkeypatch, demo_file):
    """A function that registers a Toy-v0 and returns flags for a run on a set of it."""

    def register(unit=1.0, bound=1.0, worth=1.0, **replaced) -> list[str]:
        def make():
            return Toy(unit, bound, worth)

        spec = gym.envs.registration.EnvSpec("Toy-v0", make, disable_env_checker=True)
        monkeypatch.setitem(gym.registry, "Toy-v0", spec)
        fields = demonstrate("Toy-v0", lambda obs: unit * asked(obs), 12, 10)
        return ["--env-id", "Toy-v0", "--demos", demo_file(**fields | replaced)]

    return register


def demonstrate(env_id, controller, episodes, limit) -> dict:
    """The fields of a set that a controller records."""
    env, steps, lengths, observations, ends = gym.make(env_id, max_episode_steps=limit), [], [], [], []
    for seed in range(episodes):
        obs, _ = env.reset(seed=seed)
        ended, before = False, len(steps)
        while not ended:
            action = controller(obs)
            observations.append(obs)
            obs, reward, terminated, truncated, _ = env.step(action)
            steps.append((action, reward))
            ended = terminated or truncated
        observations.append(obs)
        lengths.append(len(steps) - before)
        ends.append(terminated)
    metadata = json.dumps({"env_id": env_id, "max_episode_steps": limit})
    fields = {"observations": np.array(observations), "lengths": np.array(lengths), "metadata": metadata}
    fields |= {"terminated": np.array(ends), "truncated": ~np.array(ends)}
    actions, rewards = zip(*steps)
    return fields | {"actions": np.array(actions), "rewards": np.array(rewards)}


# The split of the demonstrations


@pytest.mark.parametrize(
    ("episodes", "fraction", "count"),
    [(2, 0.1, 0), (9, 0.1, 0), (10, 0.1, 1), (19, 0.1, 1), (50, 0.1, 5), (100, 0.29, 29)]
    + [(50, 0.0, 0), (1, 0.99, 0), (3, 0.99, 2), (10, 0.5, 5)],
)
def test_split_holds_out_the_asked_share_and_never_more(episodes, fraction, count):
    held_out = bc.split_episodes(episodes, fraction, np.random.default_rng(0))
    assert held_out.shape == (episodes,) and held_out.sum() == count


def test_split_is_drawn_by_the_seed():
    drawn = {tuple(bc.split_episodes(5, 0.2, np.random.default_rng(seed))) for seed in range(50)}
    assert len(drawn) == 5  # each episode is held out at times


def seen_by_a_run(tmp_path, monkeypatch, path, *flags) -> tuple:
    """Policy, training and validation pairs as train() makes them, once it takes its first step."""
    seen, split_losses = [], bc.split_losses

    def note(*args):
        seen.append(args)
        return split_losses(*args)

    with monkeypatch.context() as patch:
        patch.setattr(bc, "split_losses", note)
        run(tmp_path, f"run{len(list(tmp_path.iterdir()))}", "--demos", path, *flags)
    return seen[0]


def test_no_episode_is_on_both_sides(tmp_path, demo_file, monkeypatch, no_episodes):
    lengths = (5, 3, 4, 6, 2)
    fields, episode = make_demo_fields(lengths), np.repeat(np.arange(5), lengths)
    actions = np.repeat(episode[:, None] / 10, 6, axis=1)  # an action tells its episode
    path = demo_file(make={"lengths": lengths}, actions=actions.astype(np.float32))
    final, held_out = np.cumsum(np.add(lengths, 1)) - 1, set()
    obs = np.delete(fields["observations"], final, axis=0)
    for seed in range(3):
        flags = ["--val-fraction", "0.4", "--seed", str(seed), "--gradient-steps", "1"]
        policy, *pairs = seen_by_a_run(tmp_path, monkeypatch, path, *flags)
        actions = [policy.standardize_action.undo(x["action"]) for x in pairs]
        ids = [np.rint(x[:, 0].numpy() * 10).astype(int) for x in actions]
        train, val = (set(x) for x in ids)
        assert len(val) == 2 and not train & val and train | val == set(range(5))
        assert len(ids[0]) + len(ids[1]) == sum(lengths)  # whole episodes, nothing lost
        held_out |= val
        # each action still answers its own observation, standardized by the training ones alone
        mean, std = (f(obs[np.isin(episode, list(train))], axis=0) for f in (np.mean, np.std))
        for x, side in zip(pairs, (train, val)):
            expected = (obs[np.isin(episode, list(side))] - mean) / std
            np.testing.assert_allclose(x["obs"], expected.clip(-10, 10), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(policy.standardize.mean, mean, rtol=1e-4, atol=1e-5)
        trained_on = np.repeat(list(train), [lengths[i] for i in train]) / 10
        np.testing.assert_allclose(policy.standardize_action.mean, trained_on.mean())
        np.testing.assert_allclose(policy.standardize_action.std, trained_on.std())
    assert len(held_out) > 2


def test_pairs_are_what_the_policy_would_see_and_do():
    policy, rng = a_policy(), np.random.default_rng(0)
    demos = {"obs": rng.normal(size=(40, 17)) * 20, "actions": rng.uniform(-1, 1, (40, 6))}
    chosen = np.arange(40) % 3 > 0
    pairs = bc.make_pairs(policy, demos, chosen)
    assert pairs["obs"].abs().max() == bc.INPUT_CLIP and pairs["obs"].dtype == torch.float32
    actions, done = (policy.standardize_action.undo(x) for x in (pairs["action"], policy(pairs["obs"])))
    np.testing.assert_allclose(actions, demos["actions"][chosen], atol=1e-6)
    np.testing.assert_allclose(done.detach(), policy.act(demos["obs"][chosen]), atol=1e-6)


@pytest.mark.parametrize("highest", [1.0, np.inf])
def test_demonstrated_actions_are_cut_to_the_bounds(highest):
    envs = bc.BatchHalfCheetah(1, 100, 1)
    envs.single_action_space = gym.spaces.Box(-1.0, highest, (6,), np.float32)
    actions = np.linspace(-2, 2, 240).reshape(40, 6)
    demos = {"obs": np.zeros((40, 17)), "actions": actions}
    share = 50 if highest == 1 else 25
    with pytest.warns(UserWarning, match=f"{share}% of the demonstrated actions, -2 to 2, lie outside"):
        bc.match_demos(demos, envs)
    np.testing.assert_array_equal(demos["actions"], actions.clip(-1, highest))


# The policy


def slow_action(policy, obs, noise) -> list[float]:
    """One action with plain loops."""
    x = []
    for o, m, s in zip(obs, policy.standardize.mean.tolist(), policy.standardize.std.tolist()):
        x.append(min(max((o - m) / s, -10), 10))
    layers = [layer for layer in policy.net if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(layers):
        rows = zip(layer.weight.tolist(), layer.bias.tolist())
        x = [sum(w * v for w, v in zip(row, x)) + b for row, b in rows]
        x = [max(v, 0) for v in x] if i < len(layers) - 1 else x
    action, log_std, of_demos = [], policy.log_std.tolist(), policy.standardize_action
    bounds = zip(policy.low.tolist(), policy.high.tolist(), of_demos.mean.tolist(), of_demos.std.tolist())
    for a, (low, high, m, s) in enumerate(bounds):
        if not policy.gaussian:
            low, high = max(low, m - 10 * s), min(high, m + 10 * s)
            action.append(low + 0.5 * (math.tanh(x[a]) + 1) * (high - low))
        else:
            z = x[a] + policy.gaussian * math.exp(log_std[a]) * noise[a]
            action.append(min(max(m + s * z, low), high))
    return action


@pytest.mark.parametrize(("kind", "highest"), [("mse", 2), ("nll", 2), ("mse", np.inf)])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_policy_acts_as_defined(kind, highest, sampled):
    policy = a_policy(kind, low=np.full(6, -0.5), high=np.r_[np.linspace(0.3, 1.8, 5), highest])
    policy.log_std.data = torch.linspace(-2, 0.5, 6)
    obs, generator = np.random.default_rng(0).normal(size=(9, 17)) * 3, None
    noise = torch.zeros(9, 6)
    if sampled:
        noise = torch.randn((9, 6), generator=torch.Generator().manual_seed(4))
        generator = torch.Generator().manual_seed(4)
    expected = [slow_action(policy, o, n) for o, n in zip(obs.tolist(), noise.tolist())]
    actions = policy.act(obs, generator)
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)
    assert (actions >= policy.low.numpy()).all() and (actions <= policy.high.numpy()).all()


def test_a_discrete_policy_acts_as_defined():
    """Its logits' argmax, or as often as their softmax says."""
    policy = a_policy("discrete", low=(0,) * 3, high=(1,) * 3)
    policy.net[-1].weight.data /= 3
    obs = np.repeat(np.random.default_rng(0).normal(size=(1, 17)), 20_000, axis=0)
    logits = policy(policy.standardize(torch.from_numpy(obs[:1])))[0].tolist()
    assert (policy.act(obs) == np.argmax(logits)).all()
    drawn = policy.act(obs, torch.Generator().manual_seed(1))
    expected = np.exp(logits) / np.exp(logits).sum()
    assert 0.1 < expected.min() < 0.25  # none is out of the question, and not all are alike
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, expected, atol=0.01)


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_action_lies_beyond_the_bounds_by_rounding(dtype, gaussian):
    """0.1 is no float32 number; the nearest one is greater."""
    space = gym.spaces.Box(-0.1, 0.1, (2,), dtype)
    envs = SimpleNamespace(single_action_space=space, single_observation_space=gym.spaces.Box(-1, 1, (3,)))
    rng = np.random.default_rng(0)
    demos = {
        "obs": rng.normal(size=(9, 3)),
        "observations": np.zeros((9, 3)),
        "actions": rng.uniform(-0.1, 0.1, (9, 2)),
    }
    bc.match_demos(demos, envs)
    agent = bc.Policy(demos, 8, gaussian, torch.Generator().manual_seed(0))
    agent.net[-1].bias.data[:] = 20.0
    action = agent.act(demos["obs"][0])
    assert space.contains(action) and np.allclose(action, 0.1)


def test_a_discrete_action_for_one_observation_is_a_number():
    """Environments look it up in dicts and lists."""
    policy, obs = a_policy("discrete", low=(0,) * 3, high=(1,) * 3), np.random.default_rng(0).normal(size=17)
    for generator in (None, torch.Generator().manual_seed(0)):
        assert {0: "left", 1: "stay", 2: "right"}[policy.act(obs, generator)]


@pytest.mark.parametrize("kind", ["mse", "nll"])
def test_what_does_not_vary_has_no_influence_and_is_done_always(kind):
    rng = np.random.default_rng(0)
    demos = {"obs": rng.normal(size=(50, 3)), "actions": rng.uniform(-1, 1, (50, 2))}
    demos |= {"low": -np.ones(2), "high": np.ones(2), "discrete": False}
    demos["obs"][:, 1], demos["actions"][:, 0] = 1e4 + 1e-6 * rng.random(50), 0.3
    policy = bc.Policy(demos, 8, kind == "nll", torch.Generator().manual_seed(0))
    policy.net[-1].weight.data *= 100
    obs = rng.normal(size=(9, 3))
    actions = policy.act(obs)
    np.testing.assert_allclose(actions[:, 0], 0.3, rtol=1e-6)
    assert np.isfinite(actions).all() and len(np.unique(actions[:, 1])) == 9
    obs[:, 1] = rng.normal(size=9) * 1e6
    np.testing.assert_array_equal(policy.act(obs), actions)


def test_most_demonstrated_actions_lie_near_the_bounds():  # why the policy ends in a tanh
    actions = np.load(DEMOS)["actions"]
    assert (np.abs(actions) > 0.8).mean() > 0.5 and np.abs(actions).max() < 1


def test_layers_begin_orthogonal_and_the_last_one_small():
    net = bc.policy_mlp([17, 32, 8, 6], torch.Generator().manual_seed(0))
    assert [type(x) for x in net[1::2]] == [torch.nn.ReLU] * 2
    for layer, gain in zip(net[::2], (math.sqrt(2), math.sqrt(2), 0.01)):
        singular = torch.linalg.svdvals(layer.weight.detach())
        np.testing.assert_allclose(singular, gain, rtol=1e-4)
        assert (layer.bias == 0).all()


# Pure functions


def test_gaussian_log_prob_is_the_closed_form():
    rng, shapes = np.random.default_rng(0), ((4, 3), (4, 3), (3,))
    action, mean, log_std = (torch.from_numpy(rng.normal(size=shape)) for shape in shapes)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    np.testing.assert_allclose(bc.gaussian_log_prob(action, mean, log_std), expected)


def test_losses_are_their_definitions():
    for kind in ("mse", "nll"):
        policy = a_policy(kind)
        pairs = some_pairs(policy, 7)
        error = (pairs["action"] - policy(pairs["obs"])).detach().numpy()
        expected = np.mean([[e**2 for e in row] for row in error])
        if kind == "nll":
            policy.log_std.data = torch.tensor([-1.0, -0.5, 0.0, 0.3, 0.5, 1.0])
            std = policy.log_std.exp().detach().numpy()
            density = np.exp(-0.5 * (error / std) ** 2) / (std * math.sqrt(2 * math.pi))
            expected = -np.log(density.prod(axis=1)).mean()
        assert bc.cloning_loss(policy, pairs).item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_discrete_actions_is_the_surprise_at_them():
    policy, rng = a_policy("discrete"), np.random.default_rng(3)
    obs, chosen = rng.normal(size=(40, 17)), rng.integers(6, size=40)
    pairs = bc.make_pairs(policy, {"obs": obs, "actions": np.eye(6)[chosen]}, np.ones(40, bool))
    with torch.no_grad():
        logits = policy(policy.standardize(torch.from_numpy(obs))).double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.mean([-math.log(row[action]) for row, action in zip(shares, chosen)])
    assert bc.cloning_loss(policy, pairs).item() == pytest.approx(expected, rel=1e-5)


def test_likelihood_is_highest_at_the_residuals_standard_deviation():
    policy, generator = a_policy("nll"), torch.Generator().manual_seed(0)
    pairs = some_pairs(policy, 500)
    noise = 0.2 * torch.randn(500, 6, generator=generator)
    pairs["action"] = (policy(pairs["obs"]) + noise).detach()
    policy.log_std.data = noise.square().mean(0).sqrt().log()
    bc.cloning_loss(policy, pairs).backward()
    np.testing.assert_allclose(policy.log_std.grad, np.zeros(6), atol=1e-5)


def test_polyak_average_is_the_closed_form():
    fast, slow = a_policy("nll", seed=1), a_policy("nll", seed=2)
    start = [p.detach().clone() for p in slow.parameters()]
    for _ in range(30):
        bc.polyak_update(slow, fast, 0.1)
    for after, before, target in zip(slow.parameters(), start, fast.parameters()):
        expected = 0.9**30 * before + (1 - 0.9**30) * target  # geometric series
        np.testing.assert_allclose(after.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    bc.polyak_update(slow, fast, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), fast.parameters()))


@pytest.mark.parametrize("kind", ["mse", "nll", "discrete"])
def test_training_and_validation_loss_are_on_the_same_footing(kind):
    policy = a_policy(kind)
    pairs = some_pairs(policy)
    losses = bc.split_losses(policy, pairs, pairs)
    assert losses["bc/train_loss"] == losses["bc/val_loss"] == bc.cloning_loss(policy, pairs).item()
    nothing = {name: x[:0] for name, x in pairs.items()}
    alone = bc.split_losses(policy, pairs, nothing)
    assert alone == {"bc/train_loss": losses["bc/train_loss"]}


def test_share_that_fell_away():
    """Below halfway from random actions to the demonstrations."""
    returns = np.array([100.0, 90.0, 51.0, 50.0, 49.0, 10.0, -5.0, 120.0])
    for demos, random, expected in (([90, 110], 0, 3 / 8), ([300], 0, 1), ([60], 42, 4 / 8), ([10], -20, 0)):
        assert bc.fell_away(returns, {"returns": demos, "random_return": random}) == expected


@pytest.mark.parametrize(
    ("demos_mean", "random", "score", "slow_score"),
    [(100, 20, 0.5, 0.5625), (-20, -100, 2, 2.0625), (100, 100, None, None), (50, 60, None, None)]
    + [(math.nan, 20, None, None), (100, math.nan, None, None)],
)
def test_metrics_of_both_policies_have_scores_only_where_demonstrations_beat_chance(
    demos_mean, random, score, slow_score
):
    demos = {"returns": demos_mean + np.array([-10.0, 10.0]), "random_return": random}
    log = bc.metrics_of_both(np.array([40.0, 80.0]), np.array([60.0, 70.0]), demos)
    expected = {"eval/return_mean": 60, "eval/return_std": 20}
    expected |= {"eval/slow_return_mean": 65, "eval/slow_return_std": 5}
    if score:
        expected |= {"eval/normalized_score": score, "eval/fell_away": 0.5 * (random > 0)}
        expected |= {"eval/slow_normalized_score": slow_score, "eval/slow_fell_away": 0}
    assert log == pytest.approx(expected)


def test_returns_that_nobody_knows_are_left_out():
    demos, known = {"returns": np.array([100.0]), "random_return": 0.0}, np.array([50.0, 70.0])
    log = bc.metrics_of_both(known, known * [1, math.nan], demos)
    assert log.keys() == {f"eval/{x}" for x in ("return_mean", "return_std", "normalized_score", "fell_away")}


# The steps of the loop


@pytest.mark.parametrize("kind", ["mse", "nll"])
def test_a_gradient_step_is_adamws_on_the_drawn_pairs(kind):
    policy, reference = a_policy(kind), a_policy(kind)
    pairs, generators = some_pairs(policy), [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (torch.optim.AdamW(x.parameters(), 1e-2) for x in (policy, reference))
    for _ in range(3):
        bc.gradient_step(policy, first, pairs, 8, generators[0])
        drawn = torch.randint(90, (8,), generator=generators[1])
        error = pairs["action"][drawn] - reference(pairs["obs"][drawn])
        loss = error.square().mean()
        if kind == "nll":
            normal = torch.distributions.Normal(0.0, reference.log_std.exp())
            loss = -normal.log_prob(error).sum(-1).mean()
        second.zero_grad()
        loss.backward()
        second.step()
    before = a_policy(kind).named_parameters()
    for x, y, (name, z) in zip(policy.parameters(), reference.parameters(), before):
        np.testing.assert_allclose(x.detach(), y.detach(), rtol=1e-5, atol=1e-6)
        assert (x != z).any() == (kind == "nll" or name != "log_std")


@pytest.mark.parametrize("kind", ["mse", "nll"])
def test_overfits_a_tiny_set(kind):
    policy = a_policy(kind, hidden_size=64)
    policy.net[-1].weight.data /= 100
    training, validation = some_pairs(policy, 9), some_pairs(policy, 4, seed=1)
    before = bc.split_losses(policy, training, validation)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(600):
        bc.gradient_step(policy, optimizer, training, 8, generator)
    with torch.no_grad():
        assert (policy(training["obs"]) - training["action"]).square().mean() < 1e-2
    after = bc.split_losses(policy, training, validation)
    assert after["bc/train_loss"] < before["bc/train_loss"] - 0.2
    assert after["bc/val_loss"] > after["bc/train_loss"] + 0.2  # random actions cannot be foretold


# Evaluation


def test_evaluation_counts_no_reward_after_an_episode_has_ended():
    """Against gymnasium, one episode after another."""
    policy = a_policy(hidden_size=8, obs_dim=11, low=[-1] * 3, high=[1] * 3, seed=2)
    policy.net[-1].weight.data /= 20
    env, expected = gym.make("Hopper-v4", max_episode_steps=60), []
    for i in range(4):
        obs, _ = env.reset(seed=7 + i)
        rewards, ended = [], False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(policy.act(obs[None])[0])
            rewards.append(reward)
            ended = terminated or truncated
        expected.append(rewards)
    assert len({len(rewards) for rewards in expected}) > 1
    course = bc.evaluate(policy, {"env_id": "Hopper-v4", "max_episode_steps": 60}, 4, 7, 1)
    for i, rewards in enumerate(expected):
        np.testing.assert_allclose(course[: len(rewards), i], np.cumsum(rewards), rtol=1e-4)
        np.testing.assert_allclose(course[len(rewards) :, i], sum(rewards), rtol=1e-4)


def test_evaluation_is_repeatable_and_its_noise_is_seeded():
    policy = a_policy("nll")
    runs = ((3, True), (3, True), (4, True), (3, False))
    first, second, third, mean = (bc.evaluate(policy, TASK, 3, x, 1, y) for x, y in runs)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (20, 3)
    assert (third != first).any() and (mean != first).any()


def test_without_a_policy_actions_are_random(toy):
    toy()
    returns = bc.evaluate(None, {"env_id": "Toy-v0", "max_episode_steps": 10}, 300, 0, 1)[-1]
    each = 1 / 3 + 0.5**2 + 0.4**2 / 3  # mean square of what is done less what is asked for
    assert returns.mean() == pytest.approx(-10 * 2 * each, abs=4 * returns.std() / math.sqrt(300))
    assert returns.std() < 4


def test_discrete_actions_are_evaluated_likeliest_and_sampled(tmp_path, no_figures):
    policy = a_policy("discrete", obs_dim=4, low=(0, 0), high=(1, 1))
    policy.net[-1].weight.data /= 50  # not sure of any
    task = {"env_id": "CartPole-v1", "max_episode_steps": 50}
    paths = tmp_path / "a.npz", tmp_path / "a.png"
    returns = bc.final_evaluation(policy, task, bc.Args(eval_episodes=4, threads=1), *paths)
    expected = [bc.evaluate(policy, task, 4, 1 + seed, 1, seed > 20_000)[-1] for seed in (20_000, 30_000)]
    np.testing.assert_array_equal(returns, expected)
    assert (returns[0] != returns[1]).any()


def test_cumulative_figure_draws_a_line_an_episode_and_the_mean_in_red(tmp_path, monkeypatch):
    course, figures = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 6.0], [3.0, 2.0, 6.0]]), []  # (T, E)
    monkeypatch.setattr(bc.Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    demos = {"returns": [4.0, 6.0], "random_return": 1.0}
    bc.plot_cumulative_returns({"a": course, "b": 2 * course[:2]}, demos, tmp_path / "x.png")
    left, right = figures[0].axes
    assert left.get_ylim() == right.get_ylim() and left.get_xlim() == right.get_xlim()
    *episodes, mean, threshold = left.get_lines()
    lines = [line.get_ydata().tolist() for line in episodes]
    assert lines == [[0, 1, 2, 3], [0, 2, 2, 2], [0, 3, 6, 6]]
    assert mean.get_color() == "red"
    np.testing.assert_allclose(mean.get_ydata(), [0, 2, 10 / 3, 11 / 3])
    assert threshold.get_ydata()[0] == 3.0
    assert "33.3% fell away" in left.get_title() and "0.0% fell away" in right.get_title()
    for i, unknown in enumerate(({"returns": [math.nan]}, {"random_return": math.nan}, {"random_return": 5.0}), 1):
        bc.plot_cumulative_returns({"a": course}, demos | unknown, tmp_path / "x.png")
        assert "fell away" not in figures[i].axes[0].get_title() and len(figures[i].axes[0].get_lines()) == 4


# Whole runs


def test_run_writes_its_files_and_returns_its_summary(tmp_path):
    summary = run(tmp_path, "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    expected = "config.json metrics.csv summary.json checkpoint.pt policy.pt policy_slow.pt "
    expected += "evaluation.npz curves.png cumulative_return.png"
    assert names == set(expected.split())
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [20, 40, 60]
    assert all(row["eval/return_mean"] and row["eval/slow_return_mean"] for row in rows)
    assert all(row["bc/train_loss"] and row["bc/val_loss"] for row in rows)
    assert summary["bc/train_loss"] == float(rows[2]["bc/train_loss"])
    best = max(rows, key=lambda row: float(row["eval/return_mean"]))
    assert summary["best/step"] == int(best["global_step"])
    assert summary["best/return_mean"] == float(best["eval/return_mean"])
    assert 0 <= summary["eval/fell_away"] <= 1
    assert (summary["train_episodes"], summary["val_episodes"]) == (45, 5)
    gain = summary["demos_return_mean"] - summary["random_return_mean"]
    score = (summary["eval/return_mean"] - summary["random_return_mean"]) / gain
    assert summary["eval/normalized_score"] == pytest.approx(score)
    courses = np.load(tmp_path / "a/evaluation.npz")
    assert courses["mean_action"].shape == courses["sampled"].shape == (100, 4)
    assert courses["mean_action"].dtype == courses["sampled"].dtype == np.float64
    assert courses["mean_action"][-1].mean() == summary["eval/return_mean"]


def test_the_slow_policy_is_the_slow_one(tmp_path, no_figures):
    run(tmp_path, "a")
    fast, slow = (weights(tmp_path / f"a/{name}.pt") for name in ("policy", "policy_slow"))
    checkpoint = saved(tmp_path / "a/checkpoint.pt")
    assert same(fast, checkpoint["policy"]) and same(slow, checkpoint["slow"])
    moved = [name for name in slow if name.startswith("net.")]
    assert len(moved) == 6 and not any(torch.equal(slow[name], fast[name]) for name in moved)
    # after 60 steps at 0.99 it still has more than half of what all weights began as
    begin = bc.policy_mlp([17, 8, 8, 6], torch.Generator().manual_seed(1)).state_dict()
    for name in moved:
        before = begin[name.removeprefix("net.")]
        assert (slow[name] - before).norm() < 0.5 * (fast[name] - before).norm()


def test_each_policy_is_evaluated_under_its_own_name(tmp_path, no_figures):
    summary, prefixes = run(tmp_path, "a"), {"policy": "eval/", "policy_slow": "eval/slow_"}
    for name, prefix in prefixes.items():
        policy, task = bc.load_agent(str(tmp_path / f"a/{name}.pt"))
        returns = bc.evaluate(policy, task, 20, 10_001, 1)[-1]
        logged = float(rows_of(tmp_path / "a")[-1][f"{prefix}return_mean"])
        assert logged == pytest.approx(returns.mean())
        returns = bc.evaluate(policy, task, 4, 20_001, 1)[-1]
        assert summary[f"{prefix}return_mean"] == pytest.approx(returns.mean())


def test_weight_decay_leaves_the_standard_deviation_alone(tmp_path, monkeypatch, no_episodes):
    """Without a gradient only the decay moves a parameter."""
    begin = bc.policy_mlp([17, 8, 8, 6], torch.Generator().manual_seed(1)).state_dict()

    def no_loss(policy, pairs):
        return sum(0 * parameter.sum() for parameter in policy.parameters())

    monkeypatch.setattr(bc, "cloning_loss", no_loss)
    run(tmp_path, "a", "--loss", "nll", "--gradient-steps", "10", "--no-anneal-lr")
    after = weights(tmp_path / "a/policy.pt")
    assert (after["log_std"] == bc.INITIAL_LOG_STD).all()
    for name, x in begin.items():
        np.testing.assert_allclose(after[f"net.{name}"], x * (1 - 4e-3 * 0.3) ** 10, rtol=1e-5)


def test_step_size_falls_linearly_or_not_at_all(tmp_path, no_episodes):
    """That of the weights; log_std keeps its own."""
    flags = ["--gradient-steps", "10", "--eval-interval", "1", "--loss", "nll"]
    for name, falls, flag in (("a", 1, "--anneal-lr"), ("b", 0, "--no-anneal-lr")):
        run(tmp_path, name, *flags, flag)
        rates = [float(row["charts/learning_rate"]) for row in rows_of(tmp_path / name)]
        assert rates == pytest.approx([4e-3 * (1 - falls * step / 10) for step in range(10)])
        groups = saved(tmp_path / name / "checkpoint.pt")["optimizer"]["param_groups"]
        assert [group["lr"] for group in groups] == pytest.approx([rates[-1], 4e-3])


def test_clones_most_of_the_demonstrator_in_800_steps(tmp_path, no_figures):
    """From the noisier set, which shows how to recover."""
    flags = ["--demos", str(ROOT / "data/halfcheetah-v4_sac_stochastic-one_five.npz")]
    flags += "--gradient-steps 800 --hidden-size 128 --batch-size 128 --learning-rate 2e-3".split()
    summary = run(tmp_path, "learn", *flags, "--eval-interval", "800", "--eval-episodes", "40")
    assert summary["eval/normalized_score"] > 0.5


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "nll", "--weight-decay", "0.1"],
        ["--num-demos", "3", "--no-anneal-lr", "--val-fraction", "0"],
        ["--polyak", "0", "--eval-interval", "1000"],
    ],
)
def test_options_run(tmp_path, no_figures, flags):
    summary = run(tmp_path, "options", *flags)
    assert math.isfinite(summary["eval/return_mean"])
    courses = np.load(tmp_path / "options/evaluation.npz")
    assert ("eval/return_sampled_mean" in summary) == ("nll" in flags)
    assert (courses["sampled"] != courses["mean_action"]).all() == ("nll" in flags)
    if "--polyak" in flags:  # the slow policy is then the policy
        assert summary["eval/slow_return_mean"] == summary["eval/return_mean"]


@pytest.mark.parametrize("rewards", [None, -np.ones(12, np.float32)])
def test_another_environment_without_a_score(tmp_path, demo_file, capsys, rewards):
    """Nobody knows what the demonstrations earn, or it is less than chance. The policy's returns are
    known, then and when demonstrations are no longer there."""
    make = {"obs_dim": 11, "action_dim": 3, "env_id": "Hopper-v4"}
    path = demo_file(make=make, rewards=rewards, actions=np.zeros((12, 3)))  # of double precision
    summary = run(tmp_path, "hopper", "--env-id", "Hopper-v4", "--demos", path)
    assert math.isfinite(summary["eval/return_mean"]) and "eval/fell_away" not in summary
    assert "eval/normalized_score" not in summary and "demos_return_mean" not in summary
    (tmp_path / "demos.npz").unlink()
    assert "gives no rewards" not in capsys.readouterr().out
    policy = str(tmp_path / "hopper/policy.pt")
    bc.main(["--evaluate", policy, "--eval-episodes", "4", "--threads", "1", "--demos", "nowhere"])
    assert f"{summary['eval/return_mean']:.1f} ± {summary['eval/return_std']:.1f}" in capsys.readouterr().out
    assert (tmp_path / "hopper/policy.png").exists()


@pytest.mark.parametrize("replaced", [{}, {"rewards": None}])
def test_an_environment_without_rewards_is_cloned_and_says_so_once(tmp_path, toy, capsys, replaced):
    """Rewards that are NaN are not known, in the environment and in the demonstrations."""
    flags = [*toy(worth=math.nan, **replaced), "--gradient-steps", "200", "--eval-interval", "100"]
    summary = run(tmp_path, "toy", *flags)
    printed = capsys.readouterr()
    assert printed.out.count("Toy-v0 gives no rewards") == 1 and "reward" not in printed.err
    assert "nan" not in printed.out
    known = {"global_step", "bc/train_loss", "bc/val_loss", "charts/learning_rate", "charts/SPS"}
    assert summary.keys() == known | {"train_episodes", "val_episodes", "seconds"}
    assert all(map(math.isfinite, summary.values()))
    rows = rows_of(tmp_path / "toy")
    assert len(rows) == 2 and not any("return" in name for name in rows[0])
    policy, _ = bc.load_agent(str(tmp_path / "toy/policy.pt"))
    obs = np.random.default_rng(0).uniform(-1, 1, (100, 3))
    assert np.abs(policy.act(obs) - asked(obs)).mean() < np.abs(0.5 - asked(obs)).mean()


@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_units_of_actions_do_not_matter(tmp_path, toy, no_figures, loss):
    """Actions and bounds a hundred times as large: the same returns and losses up to rounding."""
    rows = []
    for name, unit in (("one", 1.0), ("hundred", 100.0)):
        run(tmp_path, name, *toy(unit), "--loss", loss)
        rows.append([{k: float(x) for k, x in row.items()} for row in rows_of(tmp_path / name)])
        course = np.load(tmp_path / name / "evaluation.npz")["sampled"]
        rows[-1].append({"sampled": course[-1].mean()})
    for one, hundred in zip(*rows):
        assert hundred == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert rows[0][-2]["eval/normalized_score"] > 0.5  # and it has learned


@pytest.mark.parametrize("bound", [1e6, 3.4e38, np.inf])
@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_actions_may_be_all_but_without_bounds(tmp_path, toy, no_figures, loss, bound):
    flags = ["--gradient-steps", "300", "--eval-interval", "300", "--hidden-size", "32", "--weight-decay", "0.01"]
    summary = run(tmp_path, "toy", *toy(7.0, bound / 7), *flags, "--loss", loss)
    assert summary["eval/return_mean"] > -0.5  # of ten steps
    policy, _ = bc.load_agent(str(tmp_path / "toy/policy.pt"))
    obs = np.random.default_rng(0).uniform(-1, 1, (100, 3))
    np.testing.assert_allclose(policy.act(obs), 7 * asked(obs), atol=1)
    assert policy.act(obs).max() > 5


@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_discrete_actions_are_cloned(tmp_path, demo_file, no_figures, loss):
    """A pole is balanced by pushing to where it leans and falls. The loss is cross-entropy, whatever
    --loss says."""

    def controller(obs):
        return int(obs[2] + obs[3] > 0)

    fields = demonstrate("CartPole-v1", controller, 12, 100)
    flags = ["--env-id", "CartPole-v1", "--demos", demo_file(**fields), "--gradient-steps", "300", "--loss", loss]
    summary = run(tmp_path, "pole", *flags, "--eval-interval", "300", "--hidden-size", "32", "--learning-rate", "1e-2")
    assert summary["demos_return_mean"] == 100 > 3 * summary["random_return_mean"]
    assert summary["eval/normalized_score"] > 0.95 and summary["bc/train_loss"] < 0.3 < math.log(2)
    policy, _ = bc.load_agent(str(tmp_path / "pole/policy.pt"))
    obs = demonstrate("CartPole-v1", lambda obs: policy.act(obs[None])[0], 4, 100)["observations"]
    wanted = np.array([controller(x) for x in obs])
    assert 0.2 < wanted.mean() < 0.8 and (policy.act(obs) == wanted).mean() > 0.9
    # a sampled action is the likeliest one mostly, not always
    share = (policy.act(obs, torch.Generator().manual_seed(0)) == wanted).mean()
    assert 0.6 < share < (policy.act(obs) == wanted).mean()
    assert math.isfinite(summary["eval/return_sampled_mean"])


def test_discrete_actions_begin_at_0(capsys, demo_file, monkeypatch):
    def from_one():
        env = Toy()
        env.action_space = gym.spaces.Discrete(3, start=1)
        return env

    monkeypatch.setitem(gym.registry, "FromOne-v0", gym.envs.registration.EnvSpec("FromOne-v0", from_one))
    path = demo_file(make={"obs_dim": 3, "env_id": "FromOne-v0"}, actions=np.ones(12, int))
    assert "Discrete(3, start=1), expected" in mistake(capsys, "--env-id", "FromOne-v0", "--demos", path)


def test_the_only_action_of_a_set_is_the_one_that_is_cloned(tmp_path, demo_file, no_figures):
    path = demo_file(make={"obs_dim": 4, "env_id": "CartPole-v1"}, actions=np.ones(12, int))
    run(tmp_path, "pole", "--env-id", "CartPole-v1", "--demos", path)
    policy, _ = bc.load_agent(str(tmp_path / "pole/policy.pt"))
    assert (policy.act(np.random.default_rng(0).normal(size=(50, 4))) == 1).all()


@pytest.mark.parametrize(("name", "step"), [("reset", 0), ("step", 1)])
def test_observations_that_are_no_numbers_are_named(toy, monkeypatch, name, step):
    toy()
    before = getattr(Toy, name)

    def broken(*args, **kwargs):
        _, *others = before(*args, **kwargs)
        return np.array([0.0, np.nan, 0.0]), *others

    monkeypatch.setattr(Toy, name, broken)
    with pytest.raises(bc.UserError, match=f"dimension 1 of an observation is nan at step {step} of"):
        bc.evaluate(None, {"env_id": "Toy-v0", "max_episode_steps": 10}, 1, 0, 1)


@pytest.mark.parametrize(
    ("actions", "told"),
    [
        (np.full(12, 2), "go from 2 to 2 (int64)"),
        (np.zeros(12), "(float64)"),
        (-np.ones(12, int), "whole numbers of Discrete(2)"),
    ],
)
def test_discrete_actions_that_are_none(tmp_path, demo_file, capsys, actions, told):
    path = demo_file(make={"obs_dim": 4, "env_id": "CartPole-v1"}, actions=actions)
    assert told in mistake(capsys, "--env-id", "CartPole-v1", "--demos", path, "--output-dir", str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("count", [1, 9])
def test_fewer_than_ten_demonstrations_train_without_validation(tmp_path, no_episodes, count):
    summary = run(tmp_path, "few", "--num-demos", str(count))
    assert "bc/val_loss" not in summary and "bc/val_loss" not in rows_of(tmp_path / "few")[0]
    assert (summary["train_episodes"], summary["val_episodes"]) == (count, 0)


def test_same_seed_same_run_and_another_seed_another(tmp_path, no_figures):
    """At any number of threads."""
    for name, flags in (("a", ()), ("b", ("--threads", "2")), ("c", ("--seed", "2"))):
        run(tmp_path, name, *flags)
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b != c


class Killed(Exception):
    pass


@pytest.mark.parametrize("flags", [[], ["--loss", "nll", "--num-demos", "7"]])
def test_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, no_figures, flags):
    run(tmp_path, "whole", *flags)
    calls, gradient_step = [], bc.gradient_step

    def dying_step(*args):
        calls.append(None)
        gradient_step(*args)
        if len(calls) == 45:  # beyond the checkpoint at 40
            raise Killed

    monkeypatch.setattr(bc, "gradient_step", dying_step)
    with pytest.raises(Killed):
        run(tmp_path, "killed", *flags)
    monkeypatch.setattr(bc, "gradient_step", gradient_step)
    bc.main(["--resume", str(tmp_path / "killed/checkpoint.pt")])
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    for name in ("policy.pt", "policy_slow.pt"):
        assert same(weights(tmp_path / "killed" / name), weights(tmp_path / "whole" / name))
    killed, whole = (np.load(tmp_path / x / "evaluation.npz") for x in ("killed", "whole"))
    np.testing.assert_array_equal(killed["sampled"], whole["sampled"])


def test_a_run_killed_in_its_final_evaluation_is_not_finished(tmp_path, monkeypatch, no_figures):
    run(tmp_path, "whole")
    report = bc.report

    def dying_report(*args):
        raise Killed

    monkeypatch.setattr(bc, "report", dying_report)
    with pytest.raises(Killed):
        run(tmp_path, "killed")
    monkeypatch.setattr(bc, "report", report)
    bc.main(["--resume", str(tmp_path / "killed/checkpoint.pt")])
    summaries = []
    for name in ("whole", "killed"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        summaries.append({k: x for k, x in summary.items() if k not in ("seconds", "charts/SPS")})
    assert summaries[0] == summaries[1]


def test_a_finished_run_goes_on_longer_and_says_so(tmp_path, capsys, no_episodes):
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    run(tmp_path, "a", "--gradient-steps", "50")
    assert "has come that far" in mistake(capsys, "--resume", checkpoint)
    assert "has come that far" in mistake(capsys, "--resume", checkpoint, "--gradient-steps", "40")
    assert json.loads((tmp_path / "a/config.json").read_text())["gradient_steps"] == 50
    moved = ["--resume", checkpoint, "--compare-with", "nowhere.npz"]  # may be told anew
    assert "--compare-with nowhere.npz: No such" in mistake(capsys, *moved)
    bc.main(["--resume", checkpoint, "--gradient-steps=80"])
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [20, 40, 50, 60, 80]
    rates = [float(row["charts/learning_rate"]) for row in rows]  # the old schedule, the new
    left = [1 - 19 / 50, 1 - 39 / 50, 1 - 49 / 50, 1 - 59 / 80, 1 - 79 / 80]
    assert rates == pytest.approx([4e-3 * x for x in left])
    assert json.loads((tmp_path / "a/config.json").read_text())["gradient_steps"] == 80


@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_evaluate_repeats_the_final_evaluation(tmp_path, capsys, loss):
    run(tmp_path, "a", "--loss", loss)
    courses, figure = tmp_path / "a/evaluation.npz", tmp_path / "a/cumulative_return.png"
    before, drawn = dict(np.load(courses)), figure.read_bytes()
    capsys.readouterr()
    bc.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "4", "--threads", "1"])
    assert "mean action" in capsys.readouterr().out
    after = np.load(tmp_path / "a/policy.npz")
    assert all((before[name] == after[name]).all() for name in before)
    assert (tmp_path / "a/policy.png").read_bytes() == drawn
    slow = ["--evaluate", str(tmp_path / "a/policy_slow.pt"), "--eval-episodes", "2"]
    bc.main([*slow, "--threads", "1"])
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"policy_slow.npz", "policy_slow.png"}
    kept = np.load(courses)  # the run's own
    assert all((before[name] == kept[name]).all() for name in before) and figure.read_bytes() == drawn


def test_a_saved_policy_acts_as_the_live_one(tmp_path, monkeypatch, no_figures):
    lives, report = [], bc.report
    monkeypatch.setattr(bc, "report", lambda *args: lives.extend(args[:2]) or report(*args))
    run(tmp_path, "a", "--loss", "nll")
    obs = np.random.default_rng(0).normal(size=(5, 17)) * 20
    for live, name in zip(lives, ("policy.pt", "policy_slow.pt")):
        loaded, task = bc.load_agent(str(tmp_path / "a" / name))
        for seed in (None, 3):
            draws = [seed and torch.Generator().manual_seed(seed) for _ in range(2)]
            np.testing.assert_array_equal(loaded.act(obs, draws[0]), live.act(obs, draws[1]))
    assert (task["env_id"], task["max_episode_steps"]) == ("HalfCheetah-v4", 100)


def test_compare_with_draws_any_scripts_evaluation(tmp_path, monkeypatch):
    other, drawn = np.cumsum(np.ones((30, 7)), axis=0), []
    (tmp_path / "gail").mkdir()
    path = tmp_path / "gail/evaluation.npz"
    np.savez(path, mean_action=other, sampled=-other)
    monkeypatch.setattr(bc, "plot_cumulative_returns", lambda *args: drawn.append(args))
    run(tmp_path, "a", "--compare-with", str(path))
    flags = ["--eval-episodes", "4", "--compare-with", str(path)]
    bc.main(["--evaluate", str(tmp_path / "a/policy.pt"), *flags])
    own = np.load(tmp_path / "a/evaluation.npz")["mean_action"]
    demos_mean = np.load(DEMOS)["rewards"].sum(dtype=np.float64) / 50
    assert len(drawn) == 2
    assert drawn[0][1]["random_return"] == drawn[1][1]["random_return"]
    for courses, demos, _ in drawn:
        assert list(courses) == ["behaviour cloning", "gail/evaluation.npz"]
        np.testing.assert_array_equal(courses["behaviour cloning"], own)
        np.testing.assert_array_equal(courses["gail/evaluation.npz"], other)
        assert np.mean(demos["returns"]) == pytest.approx(demos_mean)
    assert [args[2].name for args in drawn] == ["cumulative_return.png", "policy.png"]


def test_runs_alone_beside_data(tmp_path):
    """A copied file is complete: no sibling, no package."""
    (tmp_path / "bc.py").write_text((ROOT / "bc.py").read_text())
    (tmp_path / "data").symlink_to(ROOT / "data")
    command = [sys.executable, "bc.py", *TINY, "--run-name", "alone", "--track"]
    env = {"WANDB_MODE": "offline", "PATH": "", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "demos_return_mean" in result.stdout and (tmp_path / "runs/alone/curves.png").exists()
    assert list((tmp_path / "runs/wandb").glob("offline-run-*"))


def test_a_clone_is_compared_with_what_its_file_held_before(tmp_path, monkeypatch):
    """The evaluation writes the very file; and its name is text, not mathematics."""
    run(tmp_path, "a$5_vs_$b")
    drawn, plot = [], bc.plot_cumulative_returns
    monkeypatch.setattr(bc, "plot_cumulative_returns", lambda *x: (drawn.append(x[0]), plot(*x)))
    policy = tmp_path / "a$5_vs_$b/policy.pt"
    flags = ["--evaluate", str(policy), "--eval-episodes", "4", "--threads", "1"]
    bc.main([*flags, "--seed", "5"])
    before = bc.load_evaluation(str(policy.with_suffix(".npz")))
    bc.main([*flags, "--seed", "6", "--compare-with", str(policy.with_suffix(".npz"))])
    mine, compared = drawn[-1].values()
    assert np.array_equal(compared, before) and not np.array_equal(mine, before)


# Users' mistakes: one sentence, exit code 2, nothing left behind


def mistake(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit_info:
        bc.main([*argv])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--gradient-steps", "0"], "--gradient-steps"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--polyak", "1"], "--polyak"),
        (["--val-fraction", "1.5"], "--val-fraction"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--num-demos", "51"], "--num-demos"),
        (["--num-demos", "-1"], "--num-demos"),
        (["--demos", "nowhere.npz"], "--demos nowhere.npz"),
        (["--env-id", "Ant-v4"], "--env-id"),
        (["--compare-with", "nowhere.npz"], "--compare-with nowhere.npz: No such file"),
        (["--compare-with", str(DEMOS)], "mean_action"),  # a file without it
        (["--compare-with", str(ROOT / "bc.py")], "bc.py: "),
        (["--resume", "nowhere.pt"], "--resume"),
        (["--evaluate", "nowhere.pt"], "--evaluate"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    assert named in mistake(capsys, *flags)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error(capsys):
    assert "--cuda" in mistake(capsys, "--cuda", "--demos", str(DEMOS))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("observations", np.full((15, 17), np.nan, np.float32), "finite"),
        ("actions", np.zeros((12, 5), np.float32), "(6,)"),
        ("actions", None, "'actions' is missing"),
        ("lengths", np.array([5, 0, 7]), "'lengths'"),
        ("metadata", json.dumps({"env_id": "Hopper-v4", "max_episode_steps": 100}), "recorded in Hopper-v4"),
        ("metadata", json.dumps({"env_id": "HalfCheetah-v4"}), "'max_episode_steps' is missing"),
    ],
)
def test_bad_demonstrations(tmp_path, capsys, demo_file, field, value, named):
    path = demo_file(**{field: value})
    message = mistake(capsys, "--demos", path, "--output-dir", str(tmp_path / "runs"))
    assert named in message and "--demos" in message
    assert not (tmp_path / "runs").exists()


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_hostile_files_run_nothing(tmp_path, capsys):
    torch.save({"kind": "bc checkpoint", "args": Hostile()}, tmp_path / "bad.pt")
    np.savez(tmp_path / "bad.npz", mean_action=np.array([Hostile()], dtype=object))
    files = {"--resume": "bad.pt", "--evaluate": "bad.pt", "--compare-with": "bad.npz"}
    for flag, name in files.items():
        with pytest.raises(SystemExit):
            bc.main([flag, str(tmp_path / name)])
        printed = capsys.readouterr()
        assert "ran" not in printed.out and f"{flag} {tmp_path / name}: " in printed.err


def test_checkpoint_of_another_script_or_version(tmp_path, capsys):
    path = tmp_path / "other.pt"
    torch.save({"kind": "gail_ppo checkpoint"}, path)
    expected = "it is a gail_ppo checkpoint, expected a bc "
    assert expected + "checkpoint" in mistake(capsys, "--resume", str(path))
    assert expected + "policy" in mistake(capsys, "--evaluate", str(path))
    torch.save({"kind": "bc checkpoint", "args": {"steps": 4000}}, path)
    assert "another version" in mistake(capsys, "--resume", str(path))
    torch.save({"kind": "bc policy", "hidden": [256, 256]}, path)
    assert "another version" in mistake(capsys, "--evaluate", str(path))


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    flags = ["--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "taken"]
    assert "--run-name" in mistake(capsys, *flags)
    assert not list((tmp_path / "taken").iterdir())


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    calls, gradient_step = [], bc.gradient_step

    def diverging(policy, *args):
        calls.append(None)
        gradient_step(policy, *args)
        if len(calls) == 50:
            policy.net[0].bias.data.fill_(math.nan)

    monkeypatch.setattr(bc, "gradient_step", diverging)
    flags = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "nan"]
    message = mistake(capsys, *flags)
    assert "diverged at step 60" in message and "bc/train_loss" in message
    assert saved(tmp_path / "nan/checkpoint.pt")["rows"][-1]["global_step"] == 40


@pytest.mark.parametrize("flag", ["--anneal-lr=False", "--no-anneal-lr", "--anneal_lr=False"])
def test_booleans_as_a_sweep_agent_writes_them(flag):
    assert bc.parse_args([flag]).anneal_lr is False


def test_layers_that_somebody_adds_to_the_policy_are_trained_too(tmp_path, monkeypatch, no_episodes):
    class Deeper(bc.Policy):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = torch.nn.Parameter(torch.ones(6))

        def forward(self, x):
            return self.scale * super().forward(x)

    monkeypatch.setattr(bc, "Policy", Deeper)
    monkeypatch.setattr(bc, "report", lambda *args: {})
    args = bc.parse_args([*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "a"])
    bc.train(args)
    assert (weights(tmp_path / "a/checkpoint.pt")["scale"] != 1).all()
