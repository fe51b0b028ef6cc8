"""gail_state_seq.py: windows and sequence discriminators against slow versions; then whole runs.

Functions that are copies of gail_ppo.py's are tested there (test_copies.py keeps them copies).
"""

import csv
import importlib
import json
import math
import shutil
import subprocess
import sys
from collections import deque
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEMOS, ROOT, make_demo_fields

import gail_state_seq as s

TINY = ["--total-timesteps", "3200", "--num-envs", "8", "--eval-interval", "1600"]
TINY += ["--eval-episodes", "4", "--update-epochs", "2", "--disc-steps", "3", "--threads", "1"]
TINY += ["--disc-batch-size", "32", "--checkpoint-interval", "1600"]


def run(tmp_path, name, *flags) -> dict:
    """One in-process run; returns its summary."""
    base = [*TINY, "--output-dir", str(tmp_path), "--run-name", name]
    s.main([*base, *flags] if "--demos" in flags else [*base, "--demos", str(DEMOS), *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir) -> list[dict]:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows]


# Windows


# stands for an agent that does not standardize
AS_IT_IS = SimpleNamespace(low=torch.zeros(1), standardize=lambda x: x, standardize_action=lambda x: x)


def play(lengths, dim=2, seed=0):
    """Episodes of the given lengths, one after another in one environment: their states
    (length + 1, dim) and actions (length, 1), and all of it as one rollout."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(n + 1, dim, generator=generator) for n in lengths]
    actions = [torch.randn(n, 1, generator=generator) for n in lengths]
    rollout = {"obs": torch.cat([x[:-1] for x in states])[:, None]}
    rollout["next_obs"] = torch.cat([x[1:] for x in states])[:, None]
    rollout["executed"] = torch.cat(actions)[:, None]
    rollout["ended"] = torch.zeros(sum(lengths), 1, dtype=torch.bool)
    rollout["ended"][np.cumsum(lengths) - 1] = True
    return states, actions, rollout


def pieces(rollout: dict, steps: int) -> list[dict]:
    """The rollout, cut into rollouts of `steps`."""
    return [dict(zip(rollout, x)) for x in zip(*(x.split(steps) for x in rollout.values()))]


def slow_windows(states, actions, seq_len, use_actions, look_ahead=False):
    """The definition, step by step: (L, K, X)."""
    windows = []
    for episode, acted in zip(states, actions):
        tokens = []
        for i, state in enumerate(episode):
            led_here = acted[i - 1] if i else torch.zeros_like(acted[0])
            tokens.append(torch.cat([state, led_here]) if use_actions else state)
        for t in range(len(acted)):
            wanted = range(t - seq_len + 2, t + 2)
            if look_ahead:
                wanted = range(t + 1, t + 1 + seq_len)
            windows.append(torch.stack([tokens[min(max(i, 0), len(acted))] for i in wanted]))
    return torch.stack(windows)


def windows_of(rollouts: list[dict], seq_len, use_actions=False):
    """The script's windows of successive rollouts: (L, N, K, X)."""
    episodes, args = {}, s.Args(seq_len=seq_len, use_actions=use_actions)
    return torch.cat([s.cut_windows(x, episodes, args) for x in rollouts])


def an_agent(demos) -> s.Agent:
    """The agent of loaded demonstrations of HalfCheetah; completes them as the script does."""
    s.match_demos(demos, s.make_envs(demos, 1, 1))
    return s.Agent(demos, 8, torch.Generator().manual_seed(0))


def test_the_windows_of_four_steps():
    """Three states a window; the second episode begins at step 2."""
    states = torch.arange(10.0).view(-1, 1, 1)
    ended = torch.tensor([[False], [True], [False], [False]])
    rollout = {"obs": states[[2, 3, 5, 6]], "next_obs": states[[3, 4, 6, 7]], "ended": ended}
    episodes = {"window": states[:3].view(1, 3, 1), "begins": torch.tensor([False])}  # states 0, 1, 2
    windows = s.cut_windows(rollout, episodes, s.Args(seq_len=3))
    assert windows[:, 0, :, 0].tolist() == [[1, 2, 3], [2, 3, 4], [5, 5, 6], [5, 6, 7]]
    assert episodes["window"].flatten().tolist() == [5, 6, 7] and episodes["begins"].tolist() == [False]
    assert s.cut_windows(rollout, {}, s.Args(seq_len=1)).flatten().tolist() == [3, 4, 6, 7]


@pytest.mark.parametrize("use_actions", [False, True])
@pytest.mark.parametrize("seq_len", [1, 2, 3, 7])
@pytest.mark.parametrize("rollout_steps", [4, 5, 100])
def test_windows_equal_a_slow_loop_over_resets_and_rollouts(seq_len, rollout_steps, use_actions):
    states, actions, rollout = play([5, 3, 9, 1, 6])
    windows = windows_of(pieces(rollout, rollout_steps), seq_len, use_actions)[:, 0]
    assert torch.equal(windows, slow_windows(states, actions, seq_len, use_actions))


@pytest.mark.parametrize("trial", range(12))
def test_windows_of_environments_of_different_ages_equal_a_slow_loop(trial):
    """Several environments, each with episodes of its own, six rollouts."""
    generator, use_actions, envs = torch.Generator().manual_seed(trial), trial % 2 == 1, 3
    seq_len, rollout_steps = torch.randint(1, 9, (2,), generator=generator).tolist()
    steps, rollouts, expected = 6 * rollout_steps, [], []
    for env in range(envs):
        lengths = torch.randint(1, 14, (steps,), generator=generator).tolist()
        states, actions, rollout = play(lengths, seed=100 * trial + env)
        expected.append(slow_windows(states, actions, seq_len, use_actions)[:steps])
        rollouts.append({name: x[:steps] for name, x in rollout.items()})
    rollout = {name: torch.cat([x[name] for x in rollouts], dim=1) for name in rollouts[0]}
    episodes, args = {}, s.Args(seq_len=seq_len, use_actions=use_actions)
    expected = torch.stack(expected, dim=1).split(rollout_steps)
    for piece, wanted in zip(pieces(rollout, rollout_steps), expected):
        assert torch.equal(s.cut_windows(piece, episodes, args), wanted)


@pytest.mark.parametrize("use_actions", [False, True])
def test_expert_windows_come_from_the_same_function(demo_file, use_actions):
    path = demo_file(make={"lengths": (5, 3, 4)})
    demos = s.load_demos(s.Args(demos=path), ["actions"])
    episodes = np.split(demos["observations"], np.cumsum(demos["lengths"] + 1)[:-1])
    actions = np.split(demos["actions"], np.cumsum(demos["lengths"])[:-1])
    as_tensors = [[torch.tensor(x) for x in arrays] for arrays in (episodes, actions)]
    rollout = s.as_rollout(demos, AS_IT_IS, use_actions)
    assert ("executed" in rollout) is use_actions
    windows = windows_of([rollout], 3, use_actions)[:, 0]
    assert torch.equal(windows.float(), slow_windows(*as_tensors, 3, use_actions))


def test_demonstrations_of_double_precision_become_the_same_rollout(demo_file):
    fields = make_demo_fields()
    double = {name: fields[name].astype(np.float64) for name in ("observations", "actions")}
    demos = [s.load_demos(s.Args(demos=demo_file(**x)), ["actions"]) for x in ({}, double)]
    one, other = (s.as_rollout(x, an_agent(x), True) for x in demos)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["obs"].dtype == one["next_obs"].dtype == one["executed"].dtype == torch.float32


def test_tokens_are_standardized_and_no_action_led_to_a_first_state(demo_file):
    """By the statistics of the states that an action answered, and of the actions."""
    fields = make_demo_fields((4, 6))
    shifted = {"observations": 2 * fields["observations"] + 500, "actions": 0.1 * fields["actions"] + 0.5}
    demos = s.load_demos(s.Args(demos=demo_file(make={"lengths": (4, 6)}, **shifted)), ["actions"])
    agent = an_agent(demos)
    plain, windows = (windows_of([s.as_rollout(demos, x, True)], 3, True) for x in (AS_IT_IS, agent))
    data = np.concatenate([np.delete(shifted["observations"], [4, 11], axis=0), shifted["actions"]], axis=1)
    mean, std = (torch.tensor(x) for x in (data.mean(0, dtype=float), data.std(0, dtype=float)))
    standardized, first = (plain - mean) / std, torch.zeros(10, 1, 3, dtype=torch.bool)
    first[[0, 1, 4, 5], 0, 0] = first[[0, 4], 0, 1] = True
    standardized[..., 17:].masked_fill_(first.unsqueeze(-1), 0.0)
    torch.testing.assert_close(windows, standardized.float(), rtol=1e-3, atol=1e-3)


def test_a_later_state_changes_no_earlier_reward():
    _, _, rollout = play([12])
    disc = s.MLPDiscriminator(2, 3, 8, torch.Generator().manual_seed(0))
    changed = {name: x.clone() for name, x in rollout.items()}
    changed["obs"][8], changed["next_obs"][7] = 5.0, 5.0  # the state after step 7
    before, after = (disc(windows_of([x], 3))[:, 0] for x in (rollout, changed))
    assert (after != before).nonzero().flatten().tolist() == [7, 8, 9]


def test_the_patch_looks_ahead_and_changes_nothing_else(tmp_path, monkeypatch):
    """benchmark/patches/state_seq_look_ahead.patch: rewards for what later actions did."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    shutil.copy(ROOT / "gail_state_seq.py", tmp_path)
    patch = ROOT / "benchmark/patches/state_seq_look_ahead.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    (tmp_path / "gail_state_seq.py").rename(tmp_path / "looking_ahead.py")
    monkeypatch.syspath_prepend(tmp_path)
    ahead = importlib.import_module("looking_ahead")
    states, actions, rollout = play([5, 3, 9])
    for args in (ahead.Args(seq_len=4, look_ahead=True), ahead.Args(seq_len=4)):
        windows = ahead.cut_windows(rollout, {}, args)[:, 0]
        assert torch.equal(windows, slow_windows(states, actions, 4, False, args.look_ahead))
    flags = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path)]
    flags += ["--seq-len", "3", "--discriminator", "transformer", "--total-timesteps", "800"]
    for name, more in (("ahead", ["--look-ahead"]), ("back", [])):
        ahead.main([*flags, *more, "--run-name", name])
    s.main([*flags, "--run-name", "back_too"])
    rewards = [rows_of(tmp_path / x)[0]["reward/gail_mean"] for x in ("ahead", "back", "back_too")]
    assert rewards[0] != rewards[1] and float(rewards[1]) == pytest.approx(float(rewards[2]))


# The discriminators


def random_transformer(seq_len, dim=3):
    disc = s.TransformerDiscriminator(dim, seq_len, 16, torch.Generator())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in disc.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return disc.double()


@torch.no_grad()
def slow_attention(disc, window):
    """The logit of one window (K, X), head by head and token by token."""
    tokens, answers = [disc.embed(x) for x in window], []
    width = len(tokens[0]) // s.HEADS
    for head in range(s.HEADS):
        part = slice(head * width, (head + 1) * width)
        query, weights = disc.query(tokens[-1])[part], []
        for i, token in enumerate(tokens):
            match = torch.dot(query, disc.key(token)[part]) / math.sqrt(width)
            weights.append(math.exp(match + disc.distance_bias[head, i]))
        values = [disc.value(token)[part] for token in tokens]
        answers.append(sum(w * v for w, v in zip(weights, values)) / sum(weights))
    return disc.head(torch.cat([tokens[-1], *answers]))[0]


@pytest.mark.parametrize("seq_len", [1, 4])
def test_the_transformer_equals_a_slow_loop(seq_len):
    disc = random_transformer(seq_len)
    windows = torch.randn(2, 3, seq_len, 3, dtype=torch.float64)
    expected = torch.stack([slow_attention(disc, x) for x in windows.flatten(0, 1)])
    torch.testing.assert_close(disc(windows), expected.view(2, 3))


def test_transformer_reads_its_oldest_state_and_nothing_beyond():
    disc, args = random_transformer(4), s.Args(seq_len=4)
    _, _, rollout = play([20], dim=3)
    before = disc(s.cut_windows(rollout, {}, args).double())[10]
    for step, moves in ((8, True), (7, False)):  # step 10's window holds states 8, 9, 10 and 11
        changed = {name: x.clone() for name, x in rollout.items()}
        changed["obs"][step] += 1.0
        changed["next_obs"][step - 1] += 1.0
        assert (disc(s.cut_windows(changed, {}, args).double())[10] != before).item() is moves


def test_an_untrained_transformer_heeds_the_latest_tokens_most():
    generator = torch.Generator().manual_seed(0)
    disc = s.TransformerDiscriminator(3, 8, 32, generator)
    windows = torch.randn(200, 8, 3, generator=generator).requires_grad_(True)
    (grad,) = torch.autograd.grad(disc(windows).sum(), windows)
    influence = grad.norm(dim=-1).mean(0)  # of each token on its window's logit, the oldest first
    assert (influence[1:] > influence[:-1]).all() and influence[0] < 0.01 * influence[-1]


def test_no_weight_of_an_untrained_transformer_is_a_denormal_number():
    """Some CPUs multiply those many times slower than others."""
    biases = s.TransformerDiscriminator(3, 100, 32, torch.Generator()).distance_bias
    assert torch.softmax(biases, -1).min() > 1e6 * torch.finfo(torch.float32).tiny


def test_transformer_tells_the_order_of_its_tokens():
    disc, window = random_transformer(4), torch.randn(1, 4, 3, dtype=torch.float64)
    assert not torch.allclose(disc(window), disc(window[:, [1, 0, 2, 3]]))


@pytest.mark.parametrize("kind", [s.MLPDiscriminator, s.TransformerDiscriminator])
def test_window_gradient_penalty_equals_finite_differences(kind):
    disc = kind(2, 3, 8, torch.Generator().manual_seed(0)).double()
    expert, policy = torch.randn(2, 1, 3, 2, dtype=torch.float64)
    mix = torch.full((1, 1, 1), 0.3, dtype=torch.float64)
    x = 0.3 * expert + 0.7 * policy
    grad = []
    for i in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[i] = 1e-6
        step = step.view(1, 3, 2)
        grad.append(((disc(x + step) - disc(x - step)) / 2e-6).item())
    expected = (math.sqrt(sum(g * g for g in grad)) - 1) ** 2
    penalty = s.gradient_penalty(disc, expert, policy, mix)
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    penalty.backward()  # the double backward exists
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in disc.parameters())


# The steps of the loop


def rollout_of(windows) -> dict:
    """A rollout of one step in B environments whose windows are those (B, K, X)."""
    rollout = {"windows": windows[None], "env_reward": torch.full((1, len(windows)), 7.0)}
    rollout["terminated"] = torch.zeros(1, len(windows), dtype=torch.bool)
    return rollout | {"steps_left": torch.zeros(1, len(windows), dtype=torch.int64)}


def test_dynamics_are_told_apart_by_two_states_and_not_by_one():
    """Two circles walked in opposite directions: the same single states, other transitions."""
    generator = torch.Generator().manual_seed(0)
    accuracy = {}
    for seq_len in (1, 2):
        windows = []
        for direction in (1, -1):
            angle = 2 * math.pi * torch.rand(600, 1, generator=generator)
            angles = angle + direction * 0.5 * torch.arange(seq_len)
            windows.append(torch.stack([angles.cos(), angles.sin()], -1))
        expert, policy = windows
        disc = s.MLPDiscriminator(2, seq_len, 32, generator)
        optimizer = torch.optim.Adam(disc.parameters(), 3e-3)
        args = s.Args(disc_batch_size=128, grad_penalty_coef=0.0, disc_steps=300)
        rollout = rollout_of(policy)
        log = s.update_window_discriminator(disc, optimizer, expert, rollout, args, generator)
        with torch.no_grad():
            right = torch.cat([disc(expert) > 0, disc(policy) < 0])
        accuracy[seq_len] = right.float().mean().item()
    assert accuracy[2] > 0.95 and accuracy[1] < 0.65
    assert log["disc/expert_prob"] > 0.8 > 0.2 > log["disc/policy_prob"]
    assert log["disc/expert_acc"] > 0.9 and log["disc/policy_acc"] > 0.9


@pytest.mark.parametrize("kind", [s.MLPDiscriminator, s.TransformerDiscriminator])
def test_one_step_of_the_discriminator_equals_a_plain_one(kind):
    """The same minibatches, drawn in the same order, and PyTorch's own cross-entropy."""
    windows = torch.randn(2, 40, 3, 2, generator=torch.Generator().manual_seed(1))
    expert, policy = windows
    args = s.Args(disc_batch_size=16, disc_steps=2, grad_penalty_coef=0.5)
    one, other = (kind(2, 3, 8, torch.Generator().manual_seed(0)) for _ in "ab")
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    generator = torch.Generator().manual_seed(2)
    log = s.update_window_discriminator(one, optimizer, expert, rollout_of(policy), args, generator)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        x, y = (side[torch.randint(40, (16,), generator=generator)] for side in (expert, policy))
        mix = torch.rand(16, 1, 1, generator=generator)
        between = (y + mix * (x - y)).requires_grad_(True)
        (grad,) = torch.autograd.grad(other(between).sum(), between, create_graph=True)
        penalty = ((grad.square().sum((1, 2)).sqrt() - 1) ** 2).mean()
        loss = F.binary_cross_entropy_with_logits(other(x), torch.ones(16))
        loss = loss + F.binary_cross_entropy_with_logits(other(y), torch.zeros(16))
        optimizer.zero_grad()
        (loss + 0.5 * penalty).backward()
        optimizer.step()
    for a, b in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)
    assert log["disc/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["disc/grad_penalty"] == pytest.approx(penalty.item(), rel=1e-4)


def plain_reward(d):
    """From D, the probability of *expert*."""
    return -torch.log(1 - d)


def test_rewards_are_those_of_the_windows_normalized():
    windows = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0))
    disc = s.MLPDiscriminator(2, 3, 8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        d = torch.sigmoid(disc(windows))
    plain, rollout = plain_reward(d)[None], rollout_of(windows)
    centered = (plain - plain.mean()) / plain.std(correction=0)
    for normalize, expected in ((False, plain), (True, centered)):
        args = s.Args(normalize_reward=normalize)
        visits = {"expert": torch.tensor([1e9, 0]), "policy": torch.tensor([1e9, 0])}  # nobody ends, that is sure
        rewards, log = s.compute_window_rewards(rollout, disc, deque(), visits, args)
        torch.testing.assert_close(rewards["steps"], expected, rtol=1e-4, atol=1e-4)
        assert log["reward/gail_mean"] == pytest.approx(plain.mean().item(), abs=1e-5)
        assert log["reward/gail_std"] == pytest.approx(plain.std().item(), abs=1e-5)
        assert log["reward/env_mean"] == 7.0


def slow_rewards(logits, expert, policy):
    """Bayes: the odds that a window is the expert's, times how much oftener the expert is at a window at all. `expert`
    and `policy` count steps and absorbing ones."""
    seen = (policy[0] + 0.5) / (sum(policy) + 1)
    share = (expert[0] + seen) / (sum(expert) + 1), seen
    odds = logits.double().exp() * share[0] / share[1]
    absorbing = torch.tensor((1 - share[0]) / (2 - sum(share)), dtype=torch.float64)
    return plain_reward(odds / (1 + odds)), plain_reward(absorbing).item()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("expert", [(120, 880), (1000, 0)])
@pytest.mark.parametrize("policy_ends", [True, False])
def test_absorbing_reward_is_that_of_a_discriminator_that_counts(policy_ends, expert, normalize):
    """Over two rollouts, of which the first still counts at the second."""
    windows = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0))
    disc = s.MLPDiscriminator(2, 3, 8, torch.Generator().manual_seed(0))
    logits, rollout, recent = disc(windows)[None].detach(), rollout_of(windows), deque()
    rollout["steps_left"] += 60  # they count where an episode is terminated
    rollout["terminated"][0, [3, 7]] = policy_ends
    visits, seen = {"expert": torch.tensor(expert), "policy": torch.zeros(2)}, []
    for rollouts in (1, 2):
        args = s.Args(normalize_reward=normalize)
        rewards, _ = s.compute_window_rewards(rollout, disc, recent, visits, args)
        policy = rollouts * 50, rollouts * 120 * policy_ends
        expected, absorbing = slow_rewards(logits, expert, policy)
        seen.append(expected)
        if normalize:
            mean, std = torch.cat(seen).mean(), torch.cat(seen).std(correction=0)
            expected, absorbing = (expected - mean) / std, ((absorbing - mean) / std).item()
        torch.testing.assert_close(rewards["steps"].double(), expected, rtol=1e-3, atol=1e-3)
        assert rewards["absorbing"] == pytest.approx(absorbing, rel=1e-3)
    if expert[1] and not policy_ends:  # to end as the expert does is better than anything else
        assert rewards["absorbing"] > rewards["steps"].max()
    if policy_ends and not expert[1]:
        assert rewards["absorbing"] < rewards["steps"].min()


# Whole runs


def test_run_writes_its_files_and_returns_its_summary(tmp_path):
    summary = run(tmp_path, "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "metrics.csv", "summary.json", "checkpoint.pt", "policy.pt",
                     "curves.png", "evaluation.npz"}  # fmt: skip
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [800, 1600, 2400, 3200]
    assert [bool(row["eval/return_mean"]) for row in rows] == [False, True, False, True]
    assert summary["env_steps"] == 3200 and math.isfinite(summary["eval/normalized_score"])
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (config["gamma"], config["gae_lambda"]) == (0.9, 0.8)  # for episodes of 100 steps


@pytest.mark.parametrize(
    "flags",
    [
        ["--seq-len", "1"],
        ["--seq-len", "100", "--discriminator", "transformer"],
        ["--seq-len", "5", "--use-actions", "--discriminator", "transformer"],
        ["--seq-len", "3", "--use-actions", "--num-steps", "70", "--num-demos", "2"],
        ["--seq-len", "4", "--grad-penalty-coef", "0", "--no-normalize-reward", "--no-anneal-lr"],
    ],
)
def test_options_run(tmp_path, flags):
    assert math.isfinite(run(tmp_path, "options", *flags)["eval/return_mean"])


def test_same_seed_same_run_and_another_seed_another(tmp_path):
    for name, flags in (("a", ()), ("b", ()), ("c", ("--seed", "2"))):
        run(tmp_path, name, *flags)
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(("discriminator", "lr", "size"), [("mlp", 3e-3, 512), ("transformer", 1e-3, 48)])
def test_step_size_and_minibatch_of_the_discriminator_by_default(discriminator, lr, size):
    found = s.parse_args(["--discriminator", discriminator])
    assert (found.disc_learning_rate, found.disc_batch_size) == (lr, size)
    given = "--disc-batch-size", "7", "--disc-learning-rate", "0.5"
    given = s.parse_args(["--discriminator", discriminator, *given])
    assert (given.disc_learning_rate, given.disc_batch_size) == (0.5, 7)


def states_alone(tmp_path, name, **changes) -> str:
    with np.load(DEMOS) as file:
        fields = dict(file) | changes
    kept = {key: value for key, value in fields.items() if value is not None}
    np.savez(tmp_path / name, **kept)
    return str(tmp_path / name)


def test_demonstrations_of_a_body_with_other_actions(tmp_path, capsys):
    demos = states_alone(tmp_path, "other.npz", actions=np.zeros((5000, 2), np.float32))
    run(tmp_path, "a", "--demos", demos)
    assert (tmp_path / "a/summary.json").exists()
    flags = [*TINY, "--demos", demos, "--use-actions", "--output-dir", str(tmp_path / "runs")]
    assert "each row of its actions has shape (2,)" in mistake(capsys, *flags)
    assert not (tmp_path / "runs").exists()


def test_actions_and_rewards_of_the_demonstrations_are_never_used(tmp_path):
    rng = np.random.default_rng(0)
    noise = {"actions": rng.normal(size=(5000, 6)), "rewards": rng.normal(size=5000)}
    run(tmp_path, "whole")
    run(tmp_path, "noise", "--demos", states_alone(tmp_path, "noise.npz", **noise))
    nothing = states_alone(tmp_path, "none.npz", actions=None, rewards=None)
    run(tmp_path, "none", "--demos", nothing)
    policies = [tmp_path / name / "policy.pt" for name in ("whole", "noise", "none")]
    whole, *others = (torch.load(path, weights_only=True)["agent"] for path in policies)
    assert all(torch.equal(x[name], whole[name]) for x in others for name in whole)


def test_discriminator_sees_actions_as_executed(tmp_path, monkeypatch):
    """Beyond the bounds a sampled action would give the policy away; so for the expert."""
    wild = 3 * np.load(DEMOS)["actions"].astype(np.float64)
    demos, seen = states_alone(tmp_path, "wild.npz", actions=wild), []
    cut_windows = s.cut_windows

    def noted(rollout, *rest):
        seen.append(rollout["executed"])
        return cut_windows(rollout, *rest)

    monkeypatch.setattr(s, "cut_windows", noted)
    with pytest.warns(UserWarning, match="lie outside the bounds"):
        run(tmp_path, "a", "--demos", demos, "--use-actions", "--total-timesteps", "800")
    expert, policy = seen
    mean, std = wild.clip(-1, 1).mean(0), wild.clip(-1, 1).std(0)
    np.testing.assert_allclose(expert[:, 0], (wild.clip(-1, 1) - mean) / std, atol=1e-4)
    assert policy.shape == (100, 8, 6)
    executed = policy.numpy() * std + mean
    np.testing.assert_allclose([executed.min((0, 1)), executed.max((0, 1))], [[-1] * 6, [1] * 6], atol=1e-5)


class Killed(Exception):
    pass


def test_the_value_of_an_end_is_that_of_the_absorbing_state(monkeypatch):
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    demos = {"obs": rng.normal(size=(9, 3)), "actions": rng.normal(size=(9, 2)), "discrete": False}
    agent = s.Agent(demos | {"low": -np.ones(2), "high": np.ones(2)}, 8, generator)
    ends = torch.tensor([[True], [False], [True], [True]])
    rollout = {"obs": torch.randn(4, 1, 3), "next_obs": torch.randn(4, 1, 3), "action": torch.randn(4, 1, 2)}
    rollout |= {"terminated": ends, "ended": ends, "log_prob": torch.zeros(4, 1)}
    with torch.no_grad():
        expected = torch.where(ends, 3 / (1 - 0.5), agent.value(rollout["next_obs"]))
    seen, gae = [], s.compute_gae

    def note(rewards, values, next_values, *rest):
        seen.append(next_values.clone())
        return gae(rewards, values, next_values, *rest)

    monkeypatch.setattr(s, "compute_gae", note)
    args, optimizer = s.Args(gamma=0.5, num_minibatches=2), torch.optim.Adam(agent.parameters())
    s.update_policy(agent, optimizer, rollout, {"steps": torch.ones(4, 1), "absorbing": 3.0}, args, generator)
    torch.testing.assert_close(seen[0], expected)


def kill_and_resume(tmp_path, monkeypatch, name, rollouts, *flags) -> None:
    """A run that dies in the policy update after so many rollouts, and goes on."""
    calls, update = [], s.update_policy

    def dying_update(*args):
        calls.append(None)
        if len(calls) == rollouts + 1:
            raise Killed
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(s, "update_policy", dying_update)
        run(tmp_path, name, *flags)
    s.main(["--resume", str(tmp_path / name / "checkpoint.pt")])


@pytest.mark.parametrize(
    "flags", [["--seq-len", "5", "--use-actions"], ["--seq-len", "30", "--discriminator", "transformer"]]
)
def test_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, flags):
    """Rollouts of 60 steps end within episodes, so windows reach over the checkpoint."""
    flags = ["--num-steps", "60", *flags]
    run(tmp_path, "whole", *flags)
    kill_and_resume(tmp_path, monkeypatch, "killed", 5, *flags)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    policies = [tmp_path / name / "policy.pt" for name in ("whole", "killed")]
    whole, killed = (torch.load(path, weights_only=True)["agent"] for path in policies)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_body_that_falls_trains_and_resumes_with_new_episodes(tmp_path, monkeypatch):
    fields = make_demo_fields((20, 30), obs_dim=11, action_dim=3, env_id="Hopper-v4")
    fields["terminated"], fields["truncated"] = np.ones(2, bool), np.zeros(2, bool)
    np.savez(tmp_path / "hopper.npz", **fields)
    flags = ["--env-id", "Hopper-v4", "--demos", str(tmp_path / "hopper.npz"), "--seq-len", "4"]
    flags += ["--num-envs", "4", "--num-steps", "40", "--checkpoint-interval", "320"]
    flags += ["--total-timesteps", "960", "--eval-interval", "480"]
    seen, cut_windows = [], s.cut_windows

    def noted(rollout, episodes, *rest):
        seen.append((rollout, dict(episodes)))
        return cut_windows(rollout, episodes, *rest)

    monkeypatch.setattr(s, "cut_windows", noted)
    kill_and_resume(tmp_path, monkeypatch, "a", 3, *flags)
    assert json.loads((tmp_path / "a/summary.json").read_text())["env_steps"] == 960
    steps = [int(row["global_step"]) for row in rows_of(tmp_path / "a")]
    assert steps == list(range(160, 961, 160))
    pasts = [bool(episodes) and "window" in episodes for _, episodes in seen]
    assert pasts == [False, False, True, True, True, False, False, True, True, True]
    assert any(rollout["ended"].any() for rollout, _ in seen[1:])
    visits = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["visits"]
    assert visits["expert"].tolist() == [50, 80 + 70]
    counts = slow_counts([x for x, _ in seen[1:3]]) + slow_counts([x for x, _ in seen[6:]])
    assert visits["policy"].tolist() == np.sum(counts, axis=0).tolist()
    assert visits["policy"][1] > 0


def slow_counts(rollouts) -> list[tuple[int, int]]:
    """Steps, and those that were left of 100 where an episode was terminated, of each of successive rollouts."""
    counts, lengths = [], np.zeros(rollouts[0]["ended"].shape[1], int)
    for rollout in rollouts:
        absorbing = 0
        for terminated, ended in zip(rollout["terminated"].numpy(), rollout["ended"].numpy()):
            lengths += 1
            absorbing += (100 - lengths[terminated]).sum()
            lengths[ended] = 0
        counts.append((rollout["ended"].numel(), absorbing))
    return counts


def test_a_demonstration_of_one_step_among_longer_ones_trains(tmp_path, demo_file):
    """With windows that are longer than any."""
    demos = demo_file(make={"lengths": (6, 1, 5)})
    for discriminator in ("mlp", "transformer"):
        flags = ["--demos", demos, "--seq-len", "9", "--discriminator", discriminator, "--use-actions"]
        summary = run(tmp_path, discriminator, *flags, "--total-timesteps", "800")
        assert math.isfinite(summary["eval/return_mean"])
    one_step_each = ["--demos", demo_file(make={"lengths": (1, 1, 1)}), "--total-timesteps", "800"]
    assert math.isfinite(run(tmp_path, "short", *one_step_each)["eval/return_mean"])


class Drift(gym.Env):
    """A point that goes where the action, a flat box, tells it."""

    def __init__(self, low, high):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2).astype(np.float32)
        return self.x.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x = (0.9 * self.x + action).astype(np.float32)
        return self.x.copy(), -float(np.square(self.x).sum()), False, False, {}


# name: low, high, and what standardizes actions that nobody recorded: mean, deviation
DRIFTS = {
    "Bounded": ([-2, 0], [4, 0.5], [1, 0.25], [3, 0.25]),
    "Unbounded": ([-np.inf] * 2, [np.inf] * 2, [0, 0], [1, 1]),
    "Half": ([0, -np.inf], [np.inf, 0.5], [0.5, -0.25], [0.5, 0.75]),
}
for name, (low, high, _, _) in DRIFTS.items():
    gym.register(f"state_seq/{name}-v0", Drift, kwargs={"low": low, "high": high})


@pytest.mark.parametrize("name", DRIFTS)
def test_actions_that_nobody_recorded_are_standardized_by_their_bounds(tmp_path, demo_file, name):
    metadata = json.dumps({"env_id": f"state_seq/{name}-v0", "max_episode_steps": 50})
    path = demo_file(make={"obs_dim": 2, "lengths": (50, 50)}, actions=None, metadata=metadata)
    run(tmp_path, "a", "--demos", path, "--env-id", f"state_seq/{name}-v0", "--total-timesteps", "800")
    agent, _ = s.load_agent(tmp_path / "a/policy.pt")
    low, high, mean, std = DRIFTS[name]
    assert agent.low.tolist() == low and agent.high.tolist() == high
    assert agent.standardize_action.mean.tolist() == mean and agent.standardize_action.std.tolist() == std
    assert agent.execute(torch.zeros(2)).tolist() == mean
    assert agent.execute(torch.full((2,), -9.0)).tolist() == [max(m - 9 * d, x) for m, d, x in zip(mean, std, low)]


def cart_pole_demos(path) -> str:
    """Twelve episodes of at most 60 steps; half of them push at random, and fall."""
    env, rng = gym.make("CartPole-v1", max_episode_steps=60), np.random.default_rng(0)
    fields = {name: [] for name in ("observations", "actions", "lengths", "terminated", "truncated")}
    for episode in range(12):
        obs, ended = env.reset(seed=episode)[0], False
        fields["observations"].append(obs)
        fields["lengths"].append(0)
        while not ended:
            action = rng.integers(2) if episode % 2 else int(obs[2] + obs[3] > 0)
            obs, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            fields["observations"].append(obs)
            fields["actions"].append(action)
            fields["lengths"][-1] += 1
        fields["terminated"].append(terminated)
        fields["truncated"].append(truncated)
    assert 0 < sum(fields["terminated"]) < 12
    metadata = json.dumps({"env_id": "CartPole-v1", "max_episode_steps": 60})
    np.savez(path, metadata=metadata, **{name: np.array(x) for name, x in fields.items()})
    return str(path)


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
    s.match_demos(demos, envs)
    agent = s.Agent(demos, 8, torch.Generator().manual_seed(0))
    agent.actor[-1].bias.data[:] = 20.0
    action = agent.act(demos["obs"][0])
    assert space.contains(action) and np.allclose(action, 0.1)


def test_a_discrete_action_for_one_observation_is_a_number():
    """Environments look it up in dicts and lists."""
    demos = {"obs": np.random.default_rng(0).normal(size=(9, 3)), "actions": np.eye(2), "discrete": True}
    agent = s.Agent(demos | {"low": np.zeros(2), "high": np.ones(2)}, 8, torch.Generator().manual_seed(0))
    for generator in (None, torch.Generator().manual_seed(0)):
        assert {0: "left", 1: "right"}[agent.act(demos["obs"][0], generator)]


@pytest.mark.parametrize("use_actions", [False, True])
def test_discrete_actions_train_resume_and_evaluate(tmp_path, monkeypatch, use_actions):
    demos, seen, cut_windows = cart_pole_demos(tmp_path / "cart_pole.npz"), [], s.cut_windows

    def noted(rollout, *rest):
        windows = cut_windows(rollout, *rest)
        seen.append((rollout, windows))
        return windows

    monkeypatch.setattr(s, "cut_windows", noted)
    flags = ["--env-id", "CartPole-v1", "--demos", demos, "--seq-len", "3", "--total-timesteps", "1600"]
    run(tmp_path, "a", *flags, *["--use-actions"] * use_actions)
    (expert, expert_windows), *rollouts = seen
    if use_actions:  # one-hot vectors have the mean 1/2 and the deviation 1/2
        recorded = np.load(demos)["actions"]
        np.testing.assert_array_equal(expert["executed"][:, 0], 2 * np.eye(2)[recorded] - 1)
        assert torch.equal(expert_windows[:, :, -1, 4:], expert["executed"])
    for rollout, windows in rollouts:
        assert windows.shape == (100, 8, 3, 6 if use_actions else 4)
        assert torch.equal(rollout["executed"], 2 * rollout["action"] - 1)
        assert rollout["action"].sum(-1).eq(1).all() and 0.2 < rollout["action"].mean((0, 1))[0] < 0.8
        assert rollout["terminated"].any()
    before = rows_of(tmp_path / "a")
    s.main(["--resume", str(tmp_path / "a/checkpoint.pt"), "--total-timesteps", "3200"])
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [800, 1600, 2400, 3200]
    assert [row["disc/loss"] for row in rows[:2]] == [row["disc/loss"] for row in before]
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert 1 <= summary["eval/return_mean"] <= 60 and summary["env_steps"] == 3200
    assert "eval/normalized_score" not in summary  # the set has no rewards
    evaluation = dict(np.load(tmp_path / "a/evaluation.npz"))
    s.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "4"])
    again = np.load(tmp_path / "a/policy.npz")
    assert all(np.array_equal(evaluation[name], again[name]) for name in evaluation)


def test_a_finished_run_goes_on_longer_and_says_that_it_is_finished(tmp_path, capsys):
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    run(tmp_path, "a")
    assert "has come that far" in mistake(capsys, "--resume", checkpoint)
    s.main(["--resume", checkpoint, "--total-timesteps=4800"])
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == list(range(800, 4801, 800))
    rates = [float(row["charts/learning_rate"]) for row in rows]  # the old schedule, then the new
    assert rates == pytest.approx([3e-3 * (1 - x**3) for x in (0, 1 / 4, 2 / 4, 3 / 4, 4 / 6, 5 / 6)])


def test_evaluate_repeats_the_final_evaluation(tmp_path, capsys):
    run(tmp_path, "a")
    before = dict(np.load(tmp_path / "a/evaluation.npz"))
    capsys.readouterr()
    s.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "4"])
    assert "mean action" in capsys.readouterr().out
    after = np.load(tmp_path / "a/policy.npz")
    assert all((before[name] == after[name]).all() for name in before)


def test_the_policy_moves_towards_the_expert_in_64k_steps(tmp_path):
    flags = ["--total-timesteps", "64000", "--demos", str(DEMOS), "--output-dir", str(tmp_path)]
    flags += ["--run-name", "learn", "--eval-interval", "16000", "--eval-episodes", "10"]
    s.main([*flags, "--anneal-lr=False"])
    summary = json.loads((tmp_path / "learn/summary.json").read_text())
    assert summary["best/return_mean"] > 0.15 * summary["demos_return_mean"]


def test_runs_alone_beside_data(tmp_path):
    """A copied file is complete: no sibling, no package."""
    shutil.copy(ROOT / "gail_state_seq.py", tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    command = [sys.executable, "gail_state_seq.py", *TINY, "--run-name", "alone"]
    result = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/alone/summary.json").exists()


# Users' mistakes: one sentence, exit code 2, nothing left behind


def mistake(capsys, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        s.main([*argv])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seq-len", "0"], "--seq-len is 0"),
        (["--discriminator", "transformer", "--disc-hidden-size", "30"], "a multiple of 4"),
        (["--disc-batch-size", "-1"], "--disc-batch-size is -1"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--total-timesteps", "100"], "--total-timesteps"),
        (["--num-demos", "51"], "--num-demos"),
        (["--gamma", "1"], "--gamma is 1.0"),
        (["--resume", "nowhere.pt"], "--resume"),
        (["--evaluate", "nowhere.pt"], "--evaluate"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    assert named in mistake(capsys, *flags)
    assert not (tmp_path / "runs").exists()


def test_chains_need_the_demonstrated_actions(tmp_path, capsys):
    path = states_alone(tmp_path, "none.npz", actions=None)
    flags = ["--demos", path, "--use-actions", "--output-dir", str(tmp_path / "runs")]
    assert "'actions' is missing" in mistake(capsys, *flags) and not (tmp_path / "runs").exists()


def test_files_of_another_script_or_version(tmp_path, capsys):
    torch.save({"kind": "gail_ppo checkpoint"}, tmp_path / "other.pt")
    message = mistake(capsys, "--resume", str(tmp_path / "other.pt"))
    assert "it is a gail_ppo checkpoint, expected a gail_state_seq checkpoint" in message
    torch.save({"kind": "gail_ppo policy"}, tmp_path / "policy.pt")
    message = mistake(capsys, "--evaluate", str(tmp_path / "policy.pt"))
    assert "expected a gail_state_seq policy" in message
    for args in ({}, vars(s.Args()) | {"discount": 0.9}):
        torch.save({"kind": "gail_state_seq checkpoint", "args": args}, tmp_path / "old.pt")
        assert "another version" in mistake(capsys, "--resume", str(tmp_path / "old.pt"))


def test_what_is_saved_is_the_running_average_of_the_policies(tmp_path, monkeypatch):
    weights, update = [], s.update_policy

    def watched(agent, *rest):
        weights.append([x.detach().clone() for x in agent.parameters()])  # before the update
        return update(agent, *rest)

    monkeypatch.setattr(s, "update_policy", watched)
    flags = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--average-share", "0.5"]
    s.main([*flags, "--run-name", "a"])
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    agent = s.load_agent(str(tmp_path / "a/policy.pt"))[0]
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
    judged = s.evaluate(agent, task, 20, saved["args"]["seed"] + 10_000, 1)[-1]
    assert saved["rows"][-1]["eval/return_mean"] == pytest.approx(judged.mean())


@pytest.mark.parametrize("what", ["disc/loss", "weights"])
def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys, what):
    calls, update, polyak_update = [], s.update_window_discriminator, s.polyak_update

    def diverging(*args):
        calls.append(None)
        return update(*args) | ({what: math.nan} if len(calls) == 3 and what != "weights" else {})

    def averaging(slow, agent, rate):
        if len(calls) == 3:  # as if the policy's last minibatch had ruined them
            agent.critic[0].weight.data[0, 0] = math.inf
        polyak_update(slow, agent, rate)

    monkeypatch.setattr(s, "update_window_discriminator", diverging)
    monkeypatch.setattr(s, "polyak_update", averaging)
    flags = [*TINY, "--demos", str(DEMOS), "--output-dir", str(tmp_path), "--run-name", "nan"]
    message = mistake(capsys, *flags, "--checkpoint-interval", "800")
    assert f"diverged at step 2400: {what} not finite" in message
    saved = torch.load(tmp_path / "nan/checkpoint.pt", weights_only=True)
    assert len(saved["rows"]) == 2
