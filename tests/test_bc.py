"""bc.py: every function against a closed form or a slow version of its own; then the behaviour of whole runs."""

import csv
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEMOS, ROOT, make_demo_fields

import bc

TINY = ["--gradient-steps", "60", "--eval-interval", "20", "--batch-size", "16", "--hidden-size", "8"]
TINY += ["--eval-episodes", "4", "--threads", "1"]


def run(tmp_path, name, *flags) -> dict:
    """One in-process run; returns its summary."""
    bc.main([*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", name, *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir, without_times=True) -> list[dict]:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "charts/SPS" or not without_times} for row in rows]


def saved(path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take longer than these runs; where they are not the point, they are left out."""
    monkeypatch.setattr(bc, "plot_curves", lambda *args: None)
    monkeypatch.setattr(bc, "plot_cumulative_returns", lambda *args: None)


class Bounds:
    action_low, action_high = -np.ones(6), np.ones(6)


def make_pairs(path, held_out) -> bc.Pairs:
    demos = bc.load_demos(path, None, 0, np.random.default_rng(0), ("actions",))
    return bc.make_pairs(demos, np.array(held_out), Bounds, torch.device("cpu"))


# Demonstrations and their split


@pytest.mark.parametrize(
    ("episodes", "fraction", "count"),
    [(50, 0.1, 5), (50, 0.0, 0), (2, 0.1, 1), (1, 0.1, 0), (3, 0.99, 2), (10, 0.5, 5)],
)
def test_split_holds_out_the_asked_share_and_never_all(episodes, fraction, count):
    held_out = bc.split_episodes(episodes, fraction, np.random.default_rng(0))
    assert held_out.shape == (episodes,) and held_out.sum() == count


def test_split_is_drawn_by_the_seed():
    drawn = {tuple(bc.split_episodes(5, 0.2, np.random.default_rng(seed))) for seed in range(50)}
    assert len(drawn) == 5  # each episode is held out at times


def test_no_episode_is_on_both_sides(demo_file):
    lengths = (5, 3, 4, 6, 2)
    fields = make_demo_fields(lengths)
    episode = np.repeat(np.arange(5), lengths)
    actions = np.repeat(episode[:, None] / 10, 6, axis=1).astype(np.float32)  # an action tells its episode
    path = demo_file(make={"lengths": lengths}, actions=actions)
    for seed in range(20):
        held_out = bc.split_episodes(5, 0.4, np.random.default_rng(seed))
        pairs = make_pairs(path, held_out)
        train, val = (np.rint(x[:, 0].numpy() * 10).astype(int) for x in (pairs.train_actions, pairs.val_actions))
        assert set(train) == set(np.flatnonzero(~held_out)) and set(val) == set(np.flatnonzero(held_out))
        assert len(train) + len(val) == sum(lengths)  # whole episodes, nothing lost
        # and each action still answers its own observation
        before = np.delete(fields["observations"], np.cumsum(np.array(lengths) + 1) - 1, axis=0)
        expected = (before[np.isin(episode, val)] - pairs.obs_mean.numpy()) / pairs.obs_std.numpy()
        np.testing.assert_allclose(pairs.val_obs, expected, rtol=1e-4, atol=1e-5)


def test_observations_are_standardized_by_the_training_episodes_alone(demo_file):
    fields = make_demo_fields((5, 3, 4))
    fields["observations"][6:10] += 100  # episode 1
    pairs = make_pairs(demo_file(observations=fields["observations"]), [False, True, False])
    training = np.concatenate([fields["observations"][:5], fields["observations"][10:14]])  # without the final ones
    np.testing.assert_allclose(pairs.obs_mean, training.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pairs.obs_std, training.std(0) + 1e-3, rtol=1e-4)
    np.testing.assert_allclose(pairs.train_obs.mean(0), np.zeros(17), atol=1e-5)
    assert (pairs.val_obs == bc.OBS_CLIP).all()  # far outside, and clipped as the policy would


def test_actions_are_clipped_to_the_bounds(demo_file):
    actions = np.linspace(-2, 2, 72, dtype=np.float32).reshape(12, 6)
    pairs = make_pairs(demo_file(actions=actions), [False, False, False])
    np.testing.assert_array_equal(pairs.train_actions, actions.clip(-1, 1))


# Pure functions


def test_gaussian_log_prob_is_the_closed_form():
    rng = np.random.default_rng(0)
    action, mean, log_std = (torch.from_numpy(rng.normal(size=shape)) for shape in ((4, 3), (4, 3), (3,)))
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    np.testing.assert_allclose(bc.gaussian_log_prob(action, mean, log_std), expected)


def test_losses_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    obs, actions = torch.randn(7, 17, generator=generator), torch.rand(7, 6, generator=generator)
    for gaussian in (False, True):
        model = bc.Cloner([17, 8, 6], Bounds, gaussian, generator)
        error = (actions - model(obs)).detach().numpy()
        expected = np.mean([[e**2 for e in row] for row in error])
        if gaussian:
            model.log_std.data = torch.tensor([-1.0, -0.5, 0.0, 0.3, 0.5, 1.0])
            std = model.log_std.exp().detach().numpy()
            density = np.exp(-0.5 * (error / std) ** 2) / (std * math.sqrt(2 * math.pi))
            expected = -np.log(density.prod(axis=1)).mean()
        assert bc.cloning_loss(model, obs, actions).item() == pytest.approx(expected, rel=1e-5)


def test_weight_decay_leaves_the_standard_deviation_alone(tmp_path, demo_file, monkeypatch):
    """Without a gradient only the decay moves a parameter."""
    made, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(bc.torch.optim, "AdamW", lambda *args, **kw: made.append(adamw(*args, **kw)) or made[-1])
    run(tmp_path, "a", "--loss", "nll", "--weight-decay", "0.3", "--gradient-steps", "2")
    groups = made[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [p.shape for p in groups[1]["params"]] == [(6,)] and len(groups[0]["params"]) == 6


def test_the_study_runs_no_cell_twice():
    cells = bc.study_cells(bc.Args(study_wide=True, study_widths=(64, 64, 4096), demos="data/x.npz"), bc.Path("s"))
    names = [args.run_name for _, args in cells]
    assert len(names) == len(set(names)) == 5 * 2 * 3


def test_the_slow_policy_is_the_slow_one(tmp_path):
    run(tmp_path, "a")
    fast, slow = (
        torch.load(tmp_path / f"a/{name}.pt", weights_only=True)["weights"] for name in ("policy", "policy_slow")
    )
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert all(torch.equal(slow[name], saved["slow"][f"net.{name}"]) for name in slow)
    assert not any(torch.equal(slow[name], fast[name]) for name in slow)


def test_likelihood_is_highest_at_the_residuals_standard_deviation():
    generator = torch.Generator().manual_seed(0)
    model = bc.Cloner([17, 8, 6], Bounds, True, generator)
    obs = torch.randn(500, 17, generator=generator)
    with torch.no_grad():
        actions = model(obs) + 0.2 * torch.randn(500, 6, generator=generator)
    residual_std = (actions - model(obs)).square().mean(0).sqrt()
    model.log_std.data = residual_std.log().detach()
    bc.cloning_loss(model, obs, actions).backward()
    np.testing.assert_allclose(model.log_std.grad, np.zeros(6), atol=1e-5)


def test_polyak_average_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    fast, slow = (bc.Cloner([17, 8, 6], Bounds, True, generator) for _ in range(2))
    start = [p.detach().clone() for p in slow.parameters()]
    for _ in range(30):
        bc.polyak_update(slow, fast, 0.9)
    for after, before, target in zip(slow.parameters(), start, fast.parameters()):
        expected = 0.9**30 * before + (1 - 0.9**30) * target  # geometric series
        np.testing.assert_allclose(after.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    bc.polyak_update(slow, fast, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), fast.parameters()))


def test_training_and_validation_loss_are_on_the_same_footing():
    generator = torch.Generator().manual_seed(0)
    obs, actions = torch.randn(90, 17, generator=generator), torch.rand(90, 6, generator=generator)
    zero = torch.zeros(17)
    for gaussian in (False, True):
        model = bc.Cloner([17, 8, 6], Bounds, gaussian, generator)
        same = bc.split_losses(model, bc.Pairs(obs, actions, obs, actions, zero, zero))
        assert same["bc/train_loss"] == same["bc/val_loss"] == bc.cloning_loss(model, obs, actions).item()
        alone = bc.split_losses(model, bc.Pairs(obs, actions, obs[:0], actions[:0], zero, zero))
        assert alone == {"bc/train_loss": same["bc/train_loss"]}


def test_share_that_fell_away():
    returns = np.array([100.0, 90.0, 51.0, 50.0, 49.0, 10.0, -5.0, 120.0])
    assert bc.fell_away(returns, 100.0) == 3 / 8
    assert bc.fell_away(returns, 300.0) == 1.0 and bc.fell_away(returns, 1.0) == 1 / 8
    assert math.isnan(bc.fell_away(returns, -100.0))


# Training


@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_training_moves_every_parameter_and_the_slow_policy_follows(demo_file, loss):
    generator = torch.Generator().manual_seed(0)
    pairs = make_pairs(demo_file(), [False, False, True])
    model, slow = (bc.Cloner([17, 8, 8, 6], Bounds, loss == "nll", torch.Generator().manual_seed(1)) for _ in range(2))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    bc.clone(model, slow, optimizer, pairs, bc.Args(loss=loss, batch_size=8), 0, 3, generator)
    for before, fast, behind in zip(start, model.parameters(), slow.parameters()):
        assert (fast != before).any()
        assert 0 < (behind - before).norm() < 0.1 * (fast - before).norm()


def test_step_size_falls_linearly_to_zero(demo_file):
    pairs, args = make_pairs(demo_file(), [False] * 3), bc.Args(gradient_steps=10, batch_size=4, learning_rate=1.0)
    model = bc.Cloner([17, 8, 6], Bounds, False, torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(10):
        bc.clone(model, model, optimizer, pairs, args, step, step + 1, torch.Generator().manual_seed(0))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1 - step / 10)


@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_overfits_a_tiny_set(demo_file, loss):
    pairs = make_pairs(demo_file(), [False, False, True])
    generator = torch.Generator().manual_seed(0)
    model, slow = (bc.Cloner([17, 64, 64, 6], Bounds, loss == "nll", generator) for _ in range(2))
    before = bc.split_losses(model, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    args = bc.Args(loss=loss, batch_size=8, gradient_steps=600)
    bc.clone(model, slow, optimizer, pairs, args, 0, 600, generator)
    with torch.no_grad():
        assert (model(pairs.train_obs) - pairs.train_actions).square().mean() < 1e-3
    after = bc.split_losses(model, pairs)
    assert after["bc/train_loss"] < before["bc/train_loss"] - 0.2
    assert after["bc/val_loss"] > after["bc/train_loss"] + 0.2  # random actions cannot be foretold


# Policies of all kinds


def make_policy(kind: str, seed: int = 0) -> dict:
    """A policy.pt of random weights."""
    rng = torch.Generator().manual_seed(seed)
    sizes = [17, 16, 8, 6 if kind == "deterministic" else 12]
    weights = {}
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        weights[f"{2 * i}.weight"] = torch.randn(fan_out, fan_in, generator=rng) / 2
        weights[f"{2 * i}.bias"] = torch.randn(fan_out, generator=rng) / 2
    squashed = kind == "tanh_gaussian"
    return {
        "format_version": 1,
        "kind": kind,
        **({} if squashed else {"activation": "silu" if kind == "gaussian" else "relu"}),
        "sizes": sizes,
        "weights": weights,
        "obs_mean": torch.zeros(17) if squashed else torch.randn(17, generator=rng),
        "obs_std": torch.ones(17) if squashed else torch.rand(17, generator=rng) + 0.05,
        "obs_clip": math.inf if squashed else 10.0,
        "env_id": "HalfCheetah-v4",
        "max_episode_steps": 20,
    }


def slow_action(policy, obs, noise, low, high) -> list[float]:
    """One action with plain loops, from the definitions in gail_ppo.py and collect_expert_sac.py."""
    kind, x = policy["kind"], []
    for o, m, s in zip(obs.tolist(), policy["obs_mean"].tolist(), policy["obs_std"].tolist()):
        x.append(min(max((o - m) / s, -policy["obs_clip"]), policy["obs_clip"]))
    for layer in range(3):
        weight, bias = (policy["weights"][f"{2 * layer}.{name}"].tolist() for name in ("weight", "bias"))
        x = [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(weight, bias)]
        if layer < 2:
            x = [v / (1 + math.exp(-v)) if kind == "gaussian" else max(v, 0.0) for v in x]
    action = []
    for a in range(6):
        if kind == "gaussian":
            std = math.exp(min(max(x[6 + a], -5), 2))
            action.append(min(max(x[a] + std * noise[a], low[a]), high[a]))
        else:
            std = math.exp(-5 + 0.5 * 7 * (math.tanh(x[6 + a]) + 1)) if kind == "tanh_gaussian" else 0.0
            action.append(low[a] + 0.5 * (math.tanh(x[a] + std * noise[a]) + 1) * (high[a] - low[a]))
    return action


@pytest.mark.parametrize("kind", ["deterministic", "gaussian", "tanh_gaussian"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_each_kind_of_policy_acts_as_defined(kind, scale):
    policy, rng = make_policy(kind), np.random.default_rng(0)
    low, high = np.full(6, -0.5), np.linspace(0.3, 2, 6)
    obs, noise = rng.normal(size=(5, 17)), scale * rng.normal(size=(5, 6))
    actions = bc.load_any_actor(policy, low, high)(obs, torch.tensor(noise, dtype=torch.float32))
    expected = [slow_action(policy, o, n, low, high) for o, n in zip(obs, noise)]
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)


def test_saved_clone_acts_as_the_network(demo_file):
    pairs = make_pairs(demo_file(), [False, False, True])
    obs = np.random.default_rng(0).normal(size=(5, 17)) * 20  # some of it beyond the clipping
    for gaussian in (False, True):
        model = bc.Cloner([17, 8, 8, 8, 6], Bounds, gaussian, torch.Generator().manual_seed(0))
        model.net[-1].bias.data.uniform_(-2, 2, generator=torch.Generator().manual_seed(0))
        policy = bc.policy_to_save(model, pairs, "HalfCheetah-v4", 20)
        assert policy["kind"] == ("gaussian" if gaussian else "deterministic")
        assert policy["sizes"] == [17, 8, 8, 8, 12 if gaussian else 6]
        seen = bc.standardize(torch.tensor(obs, dtype=torch.float32), pairs.obs_mean, pairs.obs_std)
        expected = model(seen).detach().clamp(-1, 1)
        actions = bc.load_any_actor(policy, -np.ones(6), np.ones(6))(obs, torch.zeros(5, 6))
        np.testing.assert_allclose(actions, expected, atol=1e-6)
        if gaussian:
            actions = bc.load_any_actor(policy, -np.ones(6), np.ones(6))(obs, torch.full((5, 6), 0.5))
            expected = (model(seen) + 0.5 * model.log_std.exp()).detach().clamp(-1, 1)
            np.testing.assert_allclose(actions, expected, atol=1e-6)


def test_most_demonstrated_actions_lie_near_the_bounds():  # why the policy ends in a tanh
    actions = np.load(DEMOS)["actions"]
    assert (np.abs(actions) > 0.8).mean() > 0.5 and np.abs(actions).max() < 1


def test_a_gaussian_clone_is_read_by_gail_ppo(tmp_path, no_figures):
    import gail_ppo

    run(tmp_path, "a", "--loss", "nll")
    path = tmp_path / "a/policy.pt"
    policy, obs = saved(path), np.random.default_rng(0).normal(size=(5, 17))
    mean, log_std = gail_ppo.load_actor(policy)(obs)
    for noise in (0.0, 1.0):
        actions = bc.load_any_actor(policy, -np.ones(6), np.ones(6))(obs, torch.full((5, 6), noise))
        np.testing.assert_allclose(actions, (mean + noise * log_std.exp()).clamp(-1, 1), atol=1e-6)
    np.testing.assert_allclose(  # from the same starts, the same returns
        bc.returns_of_play(policy, 3, False, 5), gail_ppo.evaluate(policy, 3, False, 5), rtol=1e-6
    )


def test_play_counts_no_reward_after_an_episode_has_ended():
    policy = make_policy("deterministic") | {"env_id": "Hopper-v4", "max_episode_steps": 1000}
    policy |= {"obs_mean": torch.zeros(11), "obs_std": torch.ones(11)}
    shapes = {"0.weight": (16, 11), "4.weight": (3, 8), "4.bias": (3,)}
    policy["weights"] = policy["weights"] | {name: torch.zeros(shape) for name, shape in shapes.items()}
    rewards = bc.play(policy, 4, False, seed=0)
    lengths = (~np.isnan(rewards)).sum(0)
    assert len(set(lengths)) > 1 and lengths.max() == len(rewards) < 1000  # they fell, not all at once
    for i, length in enumerate(lengths):
        assert not np.isnan(rewards[:length, i]).any() and np.isnan(rewards[length:, i]).all()
    np.testing.assert_allclose(bc.returns_of_play(policy, 4, False, seed=0), np.nansum(rewards, axis=0))


def test_evaluation_is_repeatable_and_its_noise_is_seeded():
    policy = make_policy("gaussian")
    first, second = (bc.play(policy, 3, True, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (20, 3)
    assert (bc.play(policy, 3, True, seed=4) != first).any() and (bc.play(policy, 3, False, seed=3) != first).any()


def test_cumulative_figure_draws_a_line_an_episode_and_the_mean_in_red(tmp_path, monkeypatch):
    rewards = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0], [1.0, np.nan, np.nan]])  # (T, E), of 3, 1 and 2 steps
    figures = []
    monkeypatch.setattr(bc.Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    bc.plot_cumulative_returns(tmp_path / "x.png", [("a", rewards), ("b", 2 * rewards)], 6.0)
    left, right = figures[0].axes
    assert left.get_ylim() == right.get_ylim() and left.get_xlim() == right.get_xlim()
    *episodes, mean, threshold = left.get_lines()
    drawn = [line.get_ydata()[~np.isnan(line.get_ydata())].tolist() for line in episodes]
    assert drawn == [[0, 1, 2, 3], [0, 2], [0, 3, 6]]
    assert mean.get_color() == "red"
    np.testing.assert_allclose(mean.get_ydata(), [0, 2, 10 / 3, 11 / 3])
    assert threshold.get_ydata()[0] == 3.0
    assert "33.3% fell away" in left.get_title() and "0.0% fell away" in right.get_title()


# Whole runs


def test_run_writes_its_files_and_returns_its_summary(tmp_path):
    summary = run(tmp_path, "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "metrics.csv", "summary.json", "checkpoint.pt", "policy.pt", "policy_slow.pt"} | {
        "curves.png",
        "cumulative_return.png",
    }
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [20, 40, 60, 60]
    assert all(row["eval/return_mean"] and row["eval/slow_return_mean"] for row in rows)
    assert all(row["bc/train_loss"] and row["bc/val_loss"] for row in rows[:3])
    assert (summary["train_episodes"], summary["val_episodes"]) == (45, 5)
    assert 0 <= summary["eval/fell_away"] <= 1 and summary["bc/train_loss"] == float(rows[2]["bc/train_loss"])


def test_clones_most_of_the_demonstrator_in_800_steps(tmp_path, no_figures):
    """From the noisier set, which shows how to recover (benchmark/results/bc_short.csv has the others)."""
    noisier = str(ROOT / "data/halfcheetah-v4_sac_stochastic-one_five.npz")
    flags = ["--demos", noisier]
    flags += ["--gradient-steps", "800", "--hidden-size", "128", "--batch-size", "128", "--learning-rate", "2e-3"]
    summary = run(tmp_path, "learn", *flags, "--eval-interval", "800", "--eval-episodes", "40")
    assert summary["eval/vs_demos"] > 0.5


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "nll", "--hidden-layers", "3", "--weight-decay", "0.1"],
        ["--num-demos", "3", "--no-anneal-lr", "--val-fraction", "0"],
        ["--polyak", "0", "--eval-interval", "1000"],
    ],
)
def test_options_run(tmp_path, no_figures, flags):
    summary = run(tmp_path, "options", *flags)
    assert math.isfinite(summary["eval/return_mean"])
    assert ("eval/return_sampled_mean" in summary) == ("nll" in flags)
    if "--polyak" in flags:  # the slow policy is then the policy
        assert summary["eval/slow_return_mean"] == summary["eval/return_mean"]


def test_another_environment_and_negative_returns(tmp_path, demo_file, capsys):
    make = {"obs_dim": 11, "action_dim": 3, "env_id": "Hopper-v4"}
    path = demo_file(make=make, rewards=-np.ones(12, np.float32))
    summary = run(tmp_path, "hopper", "--env-id", "Hopper-v4", "--demos", path)
    assert summary["demos_return_mean"] == -4 and math.isfinite(summary["eval/return_mean"])
    assert "eval/fell_away" not in summary and "fell away" not in capsys.readouterr().out


def test_one_demonstration_trains_without_validation(tmp_path, capsys):
    summary = run(tmp_path, "one", "--num-demos", "1")
    assert (summary["train_episodes"], summary["val_episodes"]) == (1, 0)
    assert "bc/val_loss" not in summary and "no episode held out" in capsys.readouterr().out
    assert all(row["bc/val_loss"] == "" for row in rows_of(tmp_path / "one"))


def test_same_seed_same_run_and_another_seed_another(tmp_path, no_figures):
    for name, flags in (("a", ()), ("b", ("--threads", "2")), ("c", ("--seed", "2"))):
        run(tmp_path, name, *flags)
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b != c


class Killed(Exception):
    pass


@pytest.mark.parametrize("flags", [[], ["--loss", "nll", "--num-demos", "7"]])
def test_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, no_figures, flags):
    run(tmp_path, "whole", *flags)
    calls, clone = [], bc.clone

    def dying_clone(*args):
        calls.append(None)
        clone(*args)
        if len(calls) == 3:  # beyond the checkpoint at 40
            raise Killed

    monkeypatch.setattr(bc, "clone", dying_clone)
    with pytest.raises(Killed):
        run(tmp_path, "killed", *flags)
    monkeypatch.setattr(bc, "clone", clone)
    bc.main(["--resume", str(tmp_path / "killed/checkpoint.pt")])
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    for name in ("policy.pt", "policy_slow.pt"):
        whole, killed = (saved(tmp_path / run_name / name)["weights"] for run_name in ("whole", "killed"))
        assert all(torch.equal(whole[k], killed[k]) for k in whole)


def test_compare_with_plays_and_reports_any_policy(tmp_path, capsys, no_figures):
    for kind in ("deterministic", "gaussian", "tanh_gaussian"):
        path = tmp_path / f"{kind}.pt"
        torch.save(make_policy(kind), path)
        summary = run(tmp_path, f"beside_{kind}", "--compare-with", str(path))
        long = make_policy(kind) | {"max_episode_steps": 100}  # both play under this run's limit
        expected = bc.returns_of_play(long, 4, False, 20_001)
        assert summary["compare/return_mean"] == pytest.approx(expected.mean())
        assert summary["compare/fell_away"] == 1.0
        assert f"{kind}.pt" in capsys.readouterr().out


def test_evaluate_reads_any_policy_and_compares(tmp_path, capsys):
    for kind in ("deterministic", "gaussian", "tanh_gaussian"):
        torch.save(make_policy(kind), tmp_path / f"{kind}.pt")
    flags = ["--demos", str(DEMOS), "--eval-episodes", "3", "--compare-with", str(tmp_path / "tanh_gaussian.pt")]
    for kind in ("deterministic", "gaussian"):
        bc.main(["--evaluate", str(tmp_path / f"{kind}.pt"), *flags])
        printed = capsys.readouterr().out
        assert f"{kind}.pt" in printed and "tanh_gaussian.pt" in printed and printed.count("fell away") == 2
        assert (tmp_path / f"{kind}_cumulative_return.png").exists()


def test_runs_alone_beside_data(tmp_path):
    """A copied file is complete: no sibling, no package."""
    (tmp_path / "bc.py").write_text((ROOT / "bc.py").read_text())
    (tmp_path / "data").symlink_to(ROOT / "data")
    command = [sys.executable, "bc.py", *TINY, "--run-name", "alone"]
    result = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "demonstrations" in result.stdout and (tmp_path / "runs/alone/curves.png").exists()


# The study


@pytest.fixture
def study_flags(tmp_path):
    """Flags of a study of 10 short runs over five sets."""
    (tmp_path / "data").mkdir()
    for level in bc.LEVELS:
        (tmp_path / f"data/halfcheetah-v4_sac_{level}.npz").write_bytes(DEMOS.read_bytes())
    flags = [
        "--study",
        "--demos",
        str(tmp_path / "data/any.npz"),
        "--output-dir",
        str(tmp_path),
        "--study-workers",
        "1",
    ]
    return [*TINY, *flags, "--study-widths", "4", "8", "--study-seeds", "1", "--gradient-steps", "2"]


def test_interrupted_study_goes_on_and_keeps_what_is_done(tmp_path, monkeypatch, capsys, no_figures, study_flags):
    clone, trained = bc.clone, []

    def counting(interrupt_at):
        def counted(model, *args):
            if len(trained) == interrupt_at:
                raise KeyboardInterrupt
            trained.append(None)
            clone(model, *args)

        return counted

    monkeypatch.setattr(bc, "clone", counting(3))
    with pytest.raises(SystemExit) as exit_info:
        bc.main(study_flags)
    assert exit_info.value.code == 130 and "interrupted" in capsys.readouterr().err
    ended = [path.parent.name for path in (tmp_path / "bc_study").glob("*/summary.json")]
    assert len(ended) == 3 == len((tmp_path / "bc_study/study.csv").read_text().splitlines()) - 1

    monkeypatch.setattr(bc, "clone", counting(-1))
    bc.main(study_flags)
    assert len(trained) == 10  # nothing was trained twice
    with open(tmp_path / "bc_study/study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = {(level, width, "1") for level in bc.LEVELS for width in ("4", "8")}
    assert len(rows) == 10 and {(row["level"], row["width"], row["seed"]) for row in rows} == wanted
    folder = tmp_path / "bc_study"
    assert {"sets.png", "widths.png"} <= {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "stochastic-two__width-8__seed-1/summary.json").read_text())
    row = next(row for row in rows if row["level"] == "stochastic-two" and row["width"] == "8")
    assert float(row["eval/return_mean"]) == summary["eval/return_mean"]
    printed = capsys.readouterr().out
    assert all(level in printed for level in bc.LEVELS) and "width 8" in printed


def test_study_in_parallel_gives_the_same_rows(tmp_path, study_flags):
    cells = bc.study_cells(bc.parse_args([*study_flags, "--study-widths", "4"], bc.Args), tmp_path)[:2]
    parallel = sorted(bc.run_cells(cells, 2), key=lambda row: row["level"])
    again = [(level, dataclasses.replace(cell, output_dir=str(tmp_path / "again"))) for level, cell in cells]
    alone = sorted(bc.run_cells(again, 1), key=lambda row: row["level"])
    for one, other in zip(parallel, alone):
        assert one["level"] == other["level"] and one["eval/return_mean"] == other["eval/return_mean"]


def test_study_runs_every_cell_once_and_the_widest_first():
    cells = bc.study_cells(bc.Args(study_wide=True, demos="data/x.npz"), bc.Path("s"))
    assert len(cells) == 5 * 4 * 3 + 1 == len({cell.run_name for _, cell in cells})
    assert [cell.hidden_size for _, cell in cells] == sorted((cell.hidden_size for _, cell in cells), reverse=True)
    assert cells[0][0] == "stochastic-one" and cells[0][1].hidden_size == 4096
    assert cells[1][1].demos == "data/halfcheetah-v4_sac_deterministic.npz"


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
        (["--hidden-layers", "0"], "--hidden-layers"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--polyak", "1"], "--polyak"),
        (["--val-fraction", "1.5"], "--val-fraction"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--num-demos", "51"], "--num-demos"),
        (["--num-demos", "-1"], "--num-demos"),
        (["--demos", "nowhere.npz"], "--demos nowhere.npz"),
        (["--env-id", "Ant-v4"], "--env-id"),
        (["--compare-with", "nowhere.pt"], "--compare-with nowhere.pt"),
        (["--study", "--compare-with", "x.pt"], "--study"),
        (["--study", "--study-widths", "0"], "--study-widths"),
        (["--study", "--study-seeds", "0"], "--study-seeds"),
        (["--study", "--demos", "nowhere/x.npz"], "--demos nowhere/halfcheetah-v4_sac_deterministic.npz"),
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
        ("observations", np.full((15, 17), np.nan, np.float32), "NaN"),
        ("actions", np.zeros((12, 5), np.float32), "dimensions"),
        ("actions", None, "'actions' is missing"),
        ("lengths", np.array([5, 0, 7]), "'lengths'"),
        ("metadata", json.dumps({"format_version": 1, "env_id": "Hopper-v4"}), "Hopper-v4"),
        ("metadata", "{", "not a readable"),
    ],
)
def test_bad_demonstrations(tmp_path, capsys, demo_file, field, value, named):
    path = demo_file(**{field: value})
    message = mistake(capsys, "--demos", path, "--output-dir", str(tmp_path / "runs"))
    assert named in message and path in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"kind": "seq"}, "kind is seq"),
        ({"format_version": 9}, "format_version is 9"),
        ({"env_id": "Hopper-v4"}, "env_id is Hopper-v4"),
        ({"weights": {}}, "damaged"),
        ({"weights": 3}, "damaged"),
        ({"max_episode_steps": "x"}, "damaged"),
        ({"obs_mean": torch.zeros(3)}, "damaged"),
        ({"obs_mean": torch.full((17,), math.nan)}, "not finite"),
    ],
)
def test_bad_policies(tmp_path, capsys, changed, named):
    torch.save(make_policy("gaussian") | changed, tmp_path / "bad.pt")
    flags = ["--demos", str(DEMOS), "--output-dir", str(tmp_path / "runs"), "--compare-with", str(tmp_path / "bad.pt")]
    assert named in mistake(capsys, *flags)
    assert not (tmp_path / "runs").exists()


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_hostile_checkpoint_runs_nothing(tmp_path, capsys):
    torch.save({"format_version": 1, "script": "bc", "args": Hostile()}, tmp_path / "bad.pt")
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(SystemExit):
            bc.main([flag, str(tmp_path / "bad.pt")])
        printed = capsys.readouterr()
        assert "ran" not in printed.out and "not a readable" in printed.err


def test_checkpoint_of_another_version(tmp_path, capsys, no_figures):
    run(tmp_path, "a")
    content = saved(tmp_path / "a/checkpoint.pt")
    content["args"]["steps"] = content["args"].pop("gradient_steps")
    torch.save(content, tmp_path / "a/checkpoint.pt")
    assert "another version" in mistake(capsys, "--resume", str(tmp_path / "a/checkpoint.pt"))


def test_checkpoint_of_another_script(tmp_path, capsys):
    torch.save({"format_version": 1, "script": "gail_ppo"}, tmp_path / "other.pt")
    assert "script is gail_ppo, expected bc" in mistake(capsys, "--resume", str(tmp_path / "other.pt"))
    assert "kind" in mistake(capsys, "--evaluate", str(tmp_path / "other.pt"))


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    flags = ["--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "taken"]
    assert "--run-name" in mistake(capsys, *flags)
    assert not list((tmp_path / "taken").iterdir())


def test_a_study_with_other_settings_is_not_mixed_into_an_old_one(tmp_path, capsys, study_flags):
    cells = bc.study_cells(bc.parse_args(study_flags, bc.Args), tmp_path / "bc_study")
    bc.run_cell(cells[0])
    assert "config.json has other settings" in mistake(capsys, *study_flags, "--learning-rate", "0.1")
    more_seeds = bc.study_cells(bc.parse_args([*study_flags, "--study-seeds", "2"], bc.Args), tmp_path / "bc_study")
    assert cells[0][1] in [cell for _, cell in more_seeds]  # which are no other settings


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    calls, clone = [], bc.clone

    def diverging(model, *args):
        calls.append(None)
        clone(model, *args)
        if len(calls) == 3:
            model.net[0].bias.data.fill_(math.nan)

    monkeypatch.setattr(bc, "clone", diverging)
    flags = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "nan"]
    assert "diverged at step 60 (bc/train_loss" in mistake(capsys, *flags)
    assert saved(tmp_path / "nan/checkpoint.pt")["progress"]["step"] == 40


@pytest.mark.parametrize("flag", ["--anneal-lr=False", "--no-anneal-lr", "--anneal_lr=False"])
def test_booleans_as_a_sweep_agent_writes_them(flag):
    assert bc.parse_args([flag], bc.Args).anneal_lr is False


def test_a_set_that_does_not_tell_its_expert(tmp_path, demo_file):
    """As `collect_expert_sac.py convert` makes it of the author's pickles."""
    path = demo_file(metadata=json.dumps({"format_version": 1, "env_id": "HalfCheetah-v4", "max_episode_steps": 100}))
    summary = run(tmp_path, "run", "--demos", path)
    assert "expert_return_mean" not in summary and "eval/return_mean" in summary
