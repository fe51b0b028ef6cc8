"""gail_state_seq.py: windows and sequence discriminators against slow versions; then the behaviour of whole runs.

Functions that are copies of gail_ppo.py's are tested there (test_copies.py keeps them copies).
"""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import DEMOS, ROOT

import gail_state_seq as s

TINY = ["--total-timesteps", "3200", "--num-envs", "8", "--eval-interval", "1600", "--eval-episodes", "4"]
TINY += ["--update-epochs", "2", "--disc-steps", "3", "--disc-batch-size", "32", "--checkpoint-interval", "1600"]
TINY += ["--threads", "1"]


def run(tmp_path, name, *flags) -> dict:
    base = [*TINY, "--output-dir", str(tmp_path), "--run-name", name]
    s.main([*base, *flags] if "--demos" in flags else [*base, "--demos", str(DEMOS), *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir) -> list[dict]:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "charts/SPS"} for row in rows]


# Windows


def play(lengths, rollout_steps, dim=2, seed=0):
    """Episodes of the given lengths, one after another in one environment, cut into rollouts.

    Returns the episodes' states (length + 1, dim) and actions, and the rollouts (obs, next_obs, actions, ended).
    """
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(n + 1, dim, generator=generator) for n in lengths]
    actions = [torch.randn(n, 1, generator=generator) for n in lengths]
    obs, next_obs = torch.cat([x[:-1] for x in states])[:, None], torch.cat([x[1:] for x in states])[:, None]
    ended = torch.zeros(len(obs), 1, dtype=torch.bool)
    ended[np.cumsum(lengths) - 1] = True
    columns = [x.split(rollout_steps) for x in (obs, next_obs, torch.cat(actions)[:, None], ended)]
    return states, actions, list(zip(*columns))


def slow_windows(states, actions, seq_len, use_actions, look_ahead=False):
    """The definition, step by step."""
    windows = []
    for episode, acted in zip(states, actions):
        tokens = []
        for i, state in enumerate(episode):
            led_here = acted[i - 1] if i else torch.zeros(1)
            tokens.append(torch.cat([state, led_here]) if use_actions else state)
        for t in range(len(acted)):
            if look_ahead:
                wanted = range(t + 1, t + 1 + seq_len)
            else:
                wanted = range(t - seq_len + 2, t + 2)
            windows.append(torch.stack([tokens[min(max(i, 0), len(acted))] for i in wanted]))
    return torch.stack(windows)


@pytest.mark.parametrize("use_actions", [False, True])
@pytest.mark.parametrize("seq_len", [1, 2, 3, 7])
@pytest.mark.parametrize("rollout_steps", [4, 5, 100])
def test_windows_equal_a_slow_loop_across_episodes_and_rollouts(seq_len, rollout_steps, use_actions):
    states, actions, rollouts = play([5, 3, 9, 1, 6], rollout_steps)
    history = s.History(seq_len, use_actions, 2, 1, 1, "cpu")
    streams = [history.stream(*rollout) for rollout in rollouts]
    windows = torch.cat([s.make_windows(stream, seq_len) for stream in streams])[:, 0]
    assert torch.equal(windows, slow_windows(states, actions, seq_len, use_actions))


@pytest.mark.parametrize("trial", range(12))
def test_windows_of_environments_of_different_ages_equal_a_slow_loop(trial):
    """Several environments, each with episodes of its own, six rollouts: windows, and the transformer's banded pass."""
    generator, use_actions, envs = torch.Generator().manual_seed(trial), trial % 2 == 1, 3
    seq_len, rollout_steps = torch.randint(1, 9, (2,), generator=generator).tolist()
    steps, columns, expected = 6 * rollout_steps, [], []
    for env in range(envs):
        lengths = torch.randint(1, 14, (steps,), generator=generator).tolist()
        states, actions, ((*columns_of_one,),) = play(lengths, sum(lengths), seed=100 * trial + env)
        expected.append(slow_windows(states, actions, seq_len, use_actions)[:steps])
        columns.append([x[:steps] for x in columns_of_one])
    expected = torch.stack(expected, dim=1)
    columns = [torch.cat(column, dim=1).split(rollout_steps) for column in zip(*columns)]
    history = s.History(seq_len, use_actions, 2, 1, envs, "cpu")
    disc = s.TransformerDiscriminator(2 + use_actions, seq_len, 16, generator).double()
    with torch.no_grad():
        disc.distance_bias.normal_(generator=generator)
    for rollout, wanted in zip(zip(*columns), expected.split(rollout_steps)):
        stream = history.stream(*rollout)
        assert torch.equal(s.make_windows(stream, seq_len), wanted)
        stream.tokens, stream.next_tokens = stream.tokens.double(), stream.next_tokens.double()
        torch.testing.assert_close(disc.score(stream), disc(wanted.double()))


def test_look_ahead_windows_equal_a_slow_loop():
    states, actions, rollouts = play([5, 3, 9], 100)
    stream = s.History(4, False, 2, 1, 1, "cpu").stream(*rollouts[0])
    windows = s.make_windows(stream, 4, look_ahead=True)[:, 0]
    assert torch.equal(windows, slow_windows(states, actions, 4, False, look_ahead=True))


def test_expert_windows_come_from_the_same_function(demo_file):
    demos = s.load_demos(demo_file(), None, 0, np.random.default_rng(0), ())
    episodes = np.split(demos.observations, np.cumsum(demos.lengths + 1)[:-1])
    expected = slow_windows(torch.tensor(np.stack(episodes[:1])), [torch.zeros(5, 1)], 3, False)
    obs, next_obs = (torch.tensor(x)[:, None] for x in (demos.obs_before_step, s.obs_after_step(demos)))
    ended = torch.zeros(12, 1, dtype=torch.bool)
    ended[[4, 7, 11]] = True
    windows = s.make_windows(s.History(3, False, 17, 6, 1, "cpu").stream(obs, next_obs, None, ended), 3)
    assert torch.equal(windows[:5, 0], expected)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_later_state_changes_an_earlier_reward_only_when_looking_ahead(look_ahead):
    _, _, rollouts = play([12], 100)
    obs, next_obs, actions, ended = rollouts[0]
    disc = s.MLPDiscriminator(2, 3, 8, torch.Generator().manual_seed(0))

    def rewards(obs, next_obs):
        stream = s.History(3, False, 2, 1, 1, "cpu").stream(obs, next_obs, actions, ended)
        return disc(s.make_windows(stream, 3, look_ahead))[:, 0]

    before = rewards(obs, next_obs)
    obs, next_obs = obs.clone(), next_obs.clone()
    obs[8], next_obs[7] = 5.0, 5.0  # the state after step 7
    changed = (rewards(obs, next_obs) != before).nonzero().flatten().tolist()
    assert changed == ([5, 6, 7] if look_ahead else [7, 8, 9])


# The transformer


def random_transformer(seq_len, dim=3):
    disc = s.TransformerDiscriminator(dim, seq_len, 16, torch.Generator().manual_seed(0))
    disc.distance_bias.data.normal_(generator=torch.Generator().manual_seed(1))
    return disc.double()


@pytest.mark.parametrize("seq_len", [1, 2, 4, 12])
@pytest.mark.parametrize("rollout_steps", [5, 100])
def test_banded_pass_equals_scoring_windows_one_by_one(seq_len, rollout_steps):
    disc = random_transformer(seq_len)
    _, _, rollouts = play([5, 3, 9, 1, 6], rollout_steps, dim=2)
    history = s.History(seq_len, True, 2, 1, 1, "cpu")
    for rollout in rollouts:
        stream = history.stream(*rollout)
        stream.tokens, stream.next_tokens = stream.tokens.double(), stream.next_tokens.double()
        torch.testing.assert_close(disc.score(stream), disc(s.make_windows(stream, seq_len)))


def test_transformer_reads_its_oldest_state_and_nothing_beyond():
    disc = random_transformer(4)
    _, _, rollouts = play([20], 100, dim=3)
    obs, next_obs, actions, ended = (x.double() if x.is_floating_point() else x for x in rollouts[0])
    history = [s.History(4, False, 3, 1, 1, "cpu") for _ in range(3)]
    before = disc.score(history[0].stream(obs, next_obs, actions, ended))[:, 0]
    for step, moves in ((8, True), (7, False)):  # the window of step 10 holds states 8, 9, 10 and 11
        changed = obs.clone()
        changed[step] += 1.0
        after = disc.score(s.History(4, False, 3, 1, 1, "cpu").stream(changed, next_obs, actions, ended))[:, 0]
        assert (after[10] != before[10]).item() is moves


def test_an_untrained_transformer_heeds_the_latest_tokens_most():
    disc = s.TransformerDiscriminator(3, 8, 32, torch.Generator().manual_seed(0))
    windows = torch.randn(200, 8, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    (grad,) = torch.autograd.grad(disc(windows).sum(), windows)
    influence = grad.norm(dim=-1).mean(0)  # of each token on its window's logit, the oldest first
    assert (influence[1:] > influence[:-1]).all() and influence[0] < 0.01 * influence[-1]


def test_no_weight_of_an_untrained_transformer_is_a_denormal_number():
    """Some CPUs multiply those many times slower than others."""
    biases = s.TransformerDiscriminator(3, 100, 32, torch.Generator().manual_seed(0)).distance_bias
    assert torch.softmax(biases, -1).min() > 1e6 * torch.finfo(torch.float32).tiny


def test_transformer_tells_the_order_of_its_tokens():
    disc = random_transformer(4)
    window = torch.randn(1, 4, 3, dtype=torch.float64)
    swapped = window[:, [1, 0, 2, 3]]
    assert not torch.allclose(disc(window), disc(swapped))


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
        disc = s.MLPDiscriminator(2, seq_len, 32, generator)
        optimizer = torch.optim.Adam(disc.parameters(), 3e-3)
        args = s.Args(disc_batch_size=128, grad_penalty_coef=0.0)
        s.update_discriminator(disc, optimizer, *windows, args, 300, generator)
        with torch.no_grad():
            right = torch.cat([disc(windows[0]) > 0, disc(windows[1]) < 0])
        accuracy[seq_len] = right.float().mean().item()
    assert accuracy[2] > 0.95 and accuracy[1] < 0.65


# Whole runs


@pytest.mark.parametrize(
    "flags",
    [
        ["--seq-len", "1"],
        ["--seq-len", "4", "--look-ahead", "--reward-source", "combined"],
        ["--seq-len", "100", "--discriminator", "transformer"],
        ["--seq-len", "5", "--use-actions", "--discriminator", "transformer", "--disc-loss", "wgan"],
        ["--seq-len", "3", "--use-actions", "--num-steps", "70", "--num-demos", "2"],
    ],
)
def test_options_run(tmp_path, flags):
    summary = run(tmp_path, "options", *flags)
    assert math.isfinite(summary["eval/return_mean"])


@pytest.mark.parametrize(("discriminator", "size"), [("mlp", 512), ("transformer", 48)])
def test_minibatch_of_the_discriminator_by_default(tmp_path, discriminator, size):
    run(tmp_path, "default", "--discriminator", discriminator, "--disc-batch-size", "0", "--disc-steps", "1")
    assert json.loads((tmp_path / "default/config.json").read_text())["disc_batch_size"] == size


def states_alone(tmp_path, name, **changes) -> str:
    with np.load(DEMOS) as file:
        fields = dict(file) | changes
    np.savez(tmp_path / name, **{key: value for key, value in fields.items() if value is not None})
    return str(tmp_path / name)


def test_demonstrations_of_a_body_with_other_actions(tmp_path):
    demos = states_alone(tmp_path, "other.npz", actions=np.zeros((5000, 2), np.float32))
    run(tmp_path, "a", "--demos", demos)
    assert (tmp_path / "a/summary.json").exists()
    with pytest.raises(SystemExit):
        run(tmp_path, "b", "--demos", demos, "--use-actions")
    assert not (tmp_path / "b").exists()


def test_actions_and_rewards_of_the_demonstrations_are_never_used(tmp_path):
    with np.load(DEMOS) as file:
        nan = {name: np.full_like(file[name], np.nan) for name in ("actions", "rewards")}
    run(tmp_path, "whole")
    run(tmp_path, "nan", "--demos", states_alone(tmp_path, "nan.npz", **nan))
    run(tmp_path, "none", "--demos", states_alone(tmp_path, "none.npz", actions=None, rewards=None))
    reference = torch.load(tmp_path / "whole/policy.pt", weights_only=True)["weights"]
    for name in ("nan", "none"):
        weights = torch.load(tmp_path / name / "policy.pt", weights_only=True)["weights"]
        assert all(torch.equal(weights[k], reference[k]) for k in reference)


class Killed(Exception):
    pass


@pytest.mark.parametrize("flags", [["--num-steps", "60", "--seq-len", "5", "--use-actions"]])
def test_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, flags):
    run(tmp_path, "whole", *flags)
    calls, update = [], s.update_policy

    def dying_update(*args):
        calls.append(None)
        if len(calls) == 6:
            raise Killed
        return update(*args)

    monkeypatch.setattr(s, "update_policy", dying_update)
    with pytest.raises(Killed):
        run(tmp_path, "killed", *flags)
    monkeypatch.setattr(s, "update_policy", update)
    s.main(["--resume", str(tmp_path / "killed/checkpoint.pt")])
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


# Users' mistakes


def test_checkpoint_of_another_version_and_malformed_policy(tmp_path, capsys):
    run(tmp_path, "a")
    saved, policy = (torch.load(tmp_path / "a" / name, weights_only=True) for name in ("checkpoint.pt", "policy.pt"))
    saved["args"]["discount"] = saved["args"].pop("gamma")
    torch.save(saved, tmp_path / "a/checkpoint.pt")
    torch.save(policy | {"weights": {}}, tmp_path / "a/policy.pt")
    for flag, name, named in (("--resume", "checkpoint.pt", "another version"), ("--evaluate", "policy.pt", "damaged")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            s.main([flag, str(tmp_path / "a" / name)])
        message = capsys.readouterr().err
        assert exit_info.value.code == 2 and named in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seq-len", "0"], "--seq-len"),
        (["--seq-len", "101"], "--seq-len"),
        (["--discriminator", "transformer", "--disc-hidden-size", "30"], "--disc-hidden-size"),
        (["--reward-source", "combined", "--no-normalize-reward"], "--no-normalize-reward"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--resume", "nowhere.pt"], "--resume"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    with pytest.raises(SystemExit) as exit_info:
        s.main(flags)
    message = capsys.readouterr().err
    assert exit_info.value.code == 2 and named in message and message.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_chains_need_the_demonstrated_actions(tmp_path, capsys):
    path = states_alone(tmp_path, "none.npz", actions=None)
    with pytest.raises(SystemExit):
        s.main(["--demos", path, "--use-actions", "--output-dir", str(tmp_path / "runs")])
    assert "'actions' is missing" in capsys.readouterr().err and not (tmp_path / "runs").exists()
