"""collect_expert_sac.py: SAC against closed forms and known answers, the recorded sets, and the author's pickles."""

import csv
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_demo_fields

import bc
import collect_expert_sac as c

TINY = ["train", "--total-timesteps", "20000", "--num-envs", "16", "--learning-starts", "2000", "--threads", "1"]
TINY += ["--hidden-size", "16", "--batch-size", "32", "--updates-per-step", "0.01", "--buffer-size", "5000"]
TINY += ["--eval-interval", "10000", "--checkpoint-interval", "10000"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_policy(seed=0, max_episode_steps=20) -> dict:
    buffer = c.ReplayBuffer(1, 17, 6, torch.device("cpu"))
    buffer.obs_mean, buffer.obs_std = torch.full((17,), 0.1), torch.full((17,), 2.0)
    return c.export_expert(
        c.make_actor([17, 16, 16, 12], generator(seed)), buffer, c.Train(max_episode_steps=max_episode_steps)
    )


# Networks


def test_twin_critic_is_two_ordinary_networks():
    critic = c.TwinCritic(3, 2, 8, generator())
    obs, action = torch.randn(5, 3), torch.randn(5, 2)
    for i in range(2):
        x = torch.cat([obs, action], 1)
        for j, (weight, bias) in enumerate(zip(critic.weights, critic.biases)):
            x = x @ weight[i] + bias[i, 0]
            x = torch.relu(x) if j < 2 else x
        torch.testing.assert_close(critic(obs, action)[i], x[:, 0])
    assert not torch.allclose(*critic(obs, action))


def test_tanh_gaussian_log_probability_integrates_to_one():
    """Quadrature over the action of exp(log_prob): the density of one squashed dimension."""
    actor = c.make_actor([1, 4, 2], generator(3))
    obs = torch.zeros(1, 1)
    mean, raw = actor(obs).chunk(2, -1)
    std = (c.LOG_STD_MIN + 0.5 * (c.LOG_STD_MAX - c.LOG_STD_MIN) * (torch.tanh(raw) + 1)).exp()
    u = torch.linspace(-8, 8, 200_001, dtype=torch.float64) * float(std.detach()) + float(mean.detach())
    noise = (u - float(mean.detach())) / float(std.detach())
    action, log_prob = c.sample_action(actor, obs.expand(len(u), 1), noise[:, None].float())
    a, p = torch.tanh(u), log_prob.detach().double().exp()
    total = torch.trapezoid(p, a)
    assert total.item() == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(action[:, 0].double(), a, atol=1e-4, rtol=0)


def test_log_probability_stays_finite_where_tanh_saturates():
    actor = c.make_actor([1, 4, 2], generator())
    action, log_prob = c.sample_action(actor, torch.full((1, 1), 1e4), torch.full((1, 1), 50.0))
    assert action.abs().item() <= 1 and torch.isfinite(log_prob).all()


def test_noise_scale_zero_is_the_mean_action():
    actor = c.make_actor([3, 8, 4], generator())
    obs = torch.randn(6, 3)
    action, _ = c.sample_action(actor, obs, torch.randn(6, 2), 0.0)
    torch.testing.assert_close(action, torch.tanh(actor(obs)[:, :2]))


# The algorithm


def test_replay_buffer_keeps_the_latest():
    buffer = c.ReplayBuffer(5, 1, 1, torch.device("cpu"))
    for k in range(4):
        values = np.array([2.0 * k, 2.0 * k + 1])
        buffer.add(
            obs=values[:, None], action=values[:, None], next_obs=values[:, None], reward=values, terminated=values
        )
    seen = set(buffer.sample(500, generator())["reward"].tolist())
    assert seen == {3, 4, 5, 6, 7}
    restored = c.ReplayBuffer(5, 1, 1, torch.device("cpu"))
    restored.load_state_dict(buffer.state_dict())
    assert torch.equal(restored.data["reward"], buffer.data["reward"]) and restored.added == 8


def test_replay_buffer_standardizes_what_leaves_it():
    buffer = c.ReplayBuffer(100, 2, 1, torch.device("cpu"))
    obs = np.random.default_rng(0).normal([5, -3], [10, 0.1], (80, 2)).astype(np.float32)
    buffer.add(obs=obs, action=obs[:, :1], next_obs=obs + 1, reward=obs[:, 0], terminated=obs[:, 0])
    buffer.fit_statistics()
    batch = buffer.sample(4000, generator())
    torch.testing.assert_close(batch["obs"].mean(0), torch.zeros(2), atol=0.1, rtol=0)
    torch.testing.assert_close(batch["obs"].std(0), torch.ones(2), atol=0.1, rtol=0)
    torch.testing.assert_close(
        (batch["next_obs"] - batch["obs"]) * buffer.obs_std, torch.ones(4000, 2), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        batch["obs"] * buffer.obs_std + buffer.obs_mean,
        batch["obs"].new_tensor(obs)[(batch["reward"][:, None] == torch.tensor(obs[:, 0])).float().argmax(1)],
        atol=1e-3,
        rtol=0,
    )


def bandit_batch(size=256, seed=0):
    """One state, one step, reward -(a - 0.5)^2: Q is known, the best action too."""
    action = torch.rand(size, 1, generator=generator(seed)) * 2 - 1
    obs = torch.zeros(size, 1)
    reward = -(action[:, 0] - 0.5).square()
    return {"obs": obs, "action": action, "reward": reward, "next_obs": obs, "terminated": torch.ones(size)}


def test_update_learns_the_known_answer_of_a_one_step_problem():
    args = c.Train(hidden_size=32, learning_rate=3e-3)
    learner = c.Learner.create(args, 1, 1, generator(), torch.device("cpu"))
    learner.target_entropy = -0.5
    learner.alpha_optimizer.param_groups[0]["lr"] = 3e-2
    noise = generator(1)
    for k in range(800):
        log = c.update(learner, bandit_batch(seed=k), 0.99, 0.005, noise)
    batch = bandit_batch(seed=10_000)
    with torch.no_grad():
        q = learner.critic(batch["obs"], batch["action"])
        best = torch.tanh(learner.actor(torch.zeros(1, 1))[:, :1])
    assert (q - batch["reward"]).abs().mean() < 0.05  # terminated: no bootstrap, whatever gamma
    assert best.item() == pytest.approx(0.5, abs=0.1)
    assert log[4].item() == pytest.approx(-0.5, abs=0.15)  # the temperature holds the entropy at its target


def test_update_bootstraps_only_where_the_episode_goes_on():
    args = c.Train(hidden_size=32, learning_rate=3e-3)
    values = {}
    for terminated in (0.0, 1.0):
        learner = c.Learner.create(args, 1, 1, generator(), torch.device("cpu"))
        learner.log_alpha.data.fill_(-20.0)  # no entropy in the value
        learner.alpha_optimizer.param_groups[0]["lr"] = 0.0
        for k in range(600):
            batch = bandit_batch(seed=k) | {"reward": torch.ones(256), "terminated": torch.full((256,), terminated)}
            c.update(learner, batch, 0.5, 0.05, generator(k))
        values[terminated] = learner.critic(batch["obs"], batch["action"]).mean().item()
    assert values[1.0] == pytest.approx(1.0, abs=0.05)
    assert values[0.0] == pytest.approx(2.0, abs=0.1)  # 1 / (1 - gamma)


def test_temperature_moves_towards_the_target_entropy():
    for target, sign in ((5.0, 1), (-50.0, -1)):
        learner = c.Learner.create(c.Train(hidden_size=8), 1, 1, generator(), torch.device("cpu"))
        learner.target_entropy = target
        c.update(learner, bandit_batch(), 0.99, 0.005, generator())
        assert math.copysign(1, learner.log_alpha.item()) == sign  # too little entropy: a higher temperature


def test_target_critic_follows_by_polyak_averaging():
    learner = c.Learner.create(c.Train(hidden_size=8), 1, 1, generator(), torch.device("cpu"))
    before = [p.clone() for p in learner.target_critic.parameters()]
    c.update(learner, bandit_batch(), 0.99, 0.25, generator())
    for old, new, online in zip(before, learner.target_critic.parameters(), learner.critic.parameters()):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)
        assert not torch.equal(old, online)


# Recording


def test_recorded_episodes_replay_in_the_environment():
    arrays = c.record_episodes(small_policy(), 1.0, 3, seed=5)
    assert arrays["lengths"].tolist() == [20, 20, 20] and arrays["truncated"].all() and not arrays["terminated"].any()
    assert arrays["observations"].shape == (63, 17) and arrays["qpos"].shape == (63, 9)
    envs = c.BatchHalfCheetah(1, 1000, 0, 1)
    for e in range(3):
        envs.reset()
        envs.qpos[0], envs.qvel[0] = arrays["qpos"][21 * e], arrays["qvel"][21 * e]
        for t in range(20):
            np.testing.assert_allclose(envs.observe()[0], arrays["observations"][21 * e + t], atol=1e-3)
            _, reward, *_ = envs.step(arrays["actions"][20 * e + t][None].astype(np.float64))
            assert reward[0] == pytest.approx(arrays["rewards"][20 * e + t], abs=1e-2)
        np.testing.assert_allclose(envs.observe()[0], arrays["observations"][21 * e + 20], atol=1e-3)


def test_noise_scales_differ_and_zero_is_repeatable():
    quiet, loud = (c.record_episodes(small_policy(), scale, 2, seed=1)["actions"] for scale in (0.0, 2.0))
    again = c.record_episodes(small_policy(), 0.0, 2, seed=1)["actions"]
    np.testing.assert_array_equal(quiet, again)
    assert np.abs(loud).mean() > np.abs(quiet).mean()


def test_recorded_actions_are_the_experts_on_what_was_recorded():
    """As bc.py reads the same policy; and actions fill the environment's bounds, whatever they are."""
    policy = small_policy()
    arrays = c.record_episodes(policy, 0.0, 3, seed=0)
    before = np.delete(arrays["observations"], np.cumsum(arrays["lengths"] + 1) - 1, axis=0)
    act = bc.load_any_actor(policy, -np.ones(6), np.ones(6))
    np.testing.assert_allclose(arrays["actions"], act(before, torch.zeros(len(before), 6)), atol=1e-5)
    bounds = SimpleNamespace(action_low=np.array([-2.0, 0.0]), action_high=np.array([4.0, 1.0]))
    assert c.scale_action(np.array([[-1.0, 1.0], [0.0, 0.0]]), bounds).tolist() == [[-2.0, 1.0], [1.0, 0.5]]


def test_each_set_has_the_noise_that_it_is_named_after(tmp_path, monkeypatch):
    record, scales = c.record_episodes, []
    monkeypatch.setattr(c, "record_episodes", lambda *args: scales.append(args[1]) or record(*args))
    c.record_sets(small_policy(), tmp_path / "new", 2, 1)
    assert scales == [0.0, *c.NOISE_LEVELS.values()]  # the expert's own return comes first
    for level, scale in c.NOISE_LEVELS.items():
        path = tmp_path / f"new/halfcheetah-v4_sac_{level}.npz"
        assert c.load_demos(str(path), None, 0, np.random.default_rng(), ()).metadata["noise_scale"] == scale


def test_an_expert_that_has_diverged_records_nothing(tmp_path, capsys):
    policy = small_policy()
    policy["weights"]["0.weight"] *= math.nan
    torch.save(policy, tmp_path / "policy.pt")
    flags = ["--expert", str(tmp_path / "policy.pt"), "--output-dir", str(tmp_path / "sets")]
    assert "damaged" in mistake(capsys, "collect", *flags) and not (tmp_path / "sets").exists()


def test_training_remembers_true_ends_and_acts_on_standardized_observations(tmp_path, monkeypatch):
    added, seen, add, sample = [], [], c.ReplayBuffer.add, c.sample_action

    def noted_add(self, **step):
        added.append({name: np.array(value) for name, value in step.items()} | {"buffer": self})
        add(self, **step)

    def noted_sample(actor, x, *args):
        if len(x) == 16:  # the environments'; minibatches have 32
            seen.append((len(added), x.clone()))
        return sample(actor, x, *args)

    monkeypatch.setattr(c.ReplayBuffer, "add", noted_add)
    monkeypatch.setattr(c, "sample_action", noted_sample)
    monkeypatch.setattr(c, "record_sets", lambda *args: dict.fromkeys(["expert", *c.NOISE_LEVELS], np.zeros(1)))
    flags = ["--total-timesteps", "4800", "--eval-interval", "100000", "--checkpoint-interval", "100000"]
    c.main([*TINY, *flags, "--output-dir", str(tmp_path), "--run-name", "a"])
    for t, (step, following) in enumerate(zip(added, added[1:])):
        continues = np.allclose(step["next_obs"], following["obs"])
        assert continues == ((t + 1) % 100 != 0) and not step["terminated"].any()  # a time limit ends no episode
    buffer = added[-1]["buffer"]
    mean, std = buffer.obs_mean.numpy(), buffer.obs_std.numpy()
    assert len(seen) > 100 and std.min() < 0.5
    for t, x in seen:
        np.testing.assert_allclose(x.numpy(), (added[t]["obs"] - mean) / std, atol=1e-3)


def test_short_intervals_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "record_sets", lambda *args: dict.fromkeys(["expert", *c.NOISE_LEVELS], np.zeros(1)))
    flags = ["--total-timesteps", "4800", "--eval-interval", "1600", "--checkpoint-interval", "1600"]
    c.main([*TINY, *flags, "--output-dir", str(tmp_path), "--run-name", "a"])
    assert [row["global_step"] for row in rows_of(tmp_path / "a") if row["eval/return_mean"]] == [
        "1600",
        "3200",
        "4800",
    ]


def test_recording_an_environment_that_can_terminate():
    actor, buffer = c.make_actor([11, 8, 6], generator()), c.ReplayBuffer(1, 11, 3, torch.device("cpu"))
    policy = c.export_expert(actor, buffer, c.Train(env_id="Hopper-v4", max_episode_steps=50))
    arrays = c.record_episodes(policy, 1.0, 5, seed=0)
    assert arrays["terminated"].any() and len(arrays["observations"]) == arrays["lengths"].sum() + 5
    assert (arrays["terminated"] ^ arrays["truncated"]).all() and "qpos" not in arrays


# Whole runs


def rows_of(run_dir) -> list[dict]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in csv.DictReader(file)]


def test_killed_run_resumes_bit_for_bit_and_ends_with_five_sets(tmp_path, monkeypatch, capsys):
    c.main([*TINY, "--output-dir", str(tmp_path), "--run-name", "whole"])
    sets = sorted(path.name for path in (tmp_path / "whole").glob("*.npz"))
    assert len(sets) == 5 and "halfcheetah-v4_sac_stochastic-one_five.npz" in sets

    calls, update = [], c.update
    monkeypatch.setattr(c, "update", lambda *args: calls.append(None) or (1 / (len(calls) < 120)) and update(*args))
    with pytest.raises(ZeroDivisionError):
        c.main([*TINY, "--output-dir", str(tmp_path), "--run-name", "killed"])
    monkeypatch.setattr(c, "update", update)
    c.main(["train", "--resume", str(tmp_path / "killed/checkpoint.pt")])
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    whole, killed = (torch.load(tmp_path / name / "policy.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole["weights"][k], killed["weights"][k]) for k in whole["weights"])

    capsys.readouterr()
    c.main(
        [
            "collect",
            "--expert",
            str(tmp_path / "whole/policy.pt"),
            "--output-dir",
            str(tmp_path / "d"),
            "--episodes",
            "2",
        ]
    )
    demos = c.load_demos(str(tmp_path / "d" / sets[0]), "HalfCheetah-v4", 0, np.random.default_rng(0), ("qpos",))
    assert demos.lengths.tolist() == [100, 100] and {"expert_sha256", "versions"} <= demos.metadata.keys()
    c.main(["inspect", "--demos", str(tmp_path / "d" / sets[0]), "--figure", str(tmp_path / "demos.png")])
    assert (tmp_path / "demos.png").exists() and "physics state" in capsys.readouterr().out


# The original author's pickles


def test_pickles_go_both_ways_and_the_lost_final_state_is_found_again(tmp_path):
    arrays = c.record_episodes(small_policy(), 1.0, 3, seed=5)
    c.save_demos(tmp_path / "a.npz", arrays, {"env_id": "HalfCheetah-v4", "max_episode_steps": 20})
    c.main(["convert", "--source", str(tmp_path / "a.npz"), "--target", str(tmp_path / "a.pkl")])
    trajectories = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert [len(steps) for steps in trajectories] == [20, 20, 20]
    assert set(trajectories[0][0]) == {"state", "action", "reward", "done"}
    assert [bool(step["done"]) for step in trajectories[1]] == [False] * 19 + [True]

    c.main(["convert", "--source", str(tmp_path / "a.pkl"), "--target", str(tmp_path / "b.npz")])
    back = c.load_demos(str(tmp_path / "b.npz"), "HalfCheetah-v4", 0, np.random.default_rng(0), ("qpos", "actions"))
    np.testing.assert_allclose(back.observations, arrays["observations"], atol=1e-3)
    np.testing.assert_array_equal(back.actions, arrays["actions"])
    x = arrays["qpos"][:21, 0] - arrays["qpos"][0, 0]
    np.testing.assert_allclose(back.qpos[:21, 0], x, atol=1e-3)


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


@pytest.mark.parametrize("content", [[[Hostile()]], Hostile(), [], [[]], [[{"state": 1}]], {"a": 1}])
def test_bad_pickles_run_nothing_and_are_refused(tmp_path, capsys, content):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
    message = mistake(capsys, "convert", "--source", str(tmp_path / "bad.pkl"), "--target", str(tmp_path / "x.npz"))
    assert "--source" in message and not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("reward", [np.array([1.0]), math.nan])
def test_pickles_of_odd_rewards_are_refused_and_leave_no_folder(tmp_path, capsys, reward):
    step = {"state": np.zeros(17), "action": np.zeros(6), "reward": reward, "done": True}
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps([[step, step]]))
    flags = ["--source", str(tmp_path / "odd.pkl"), "--target", str(tmp_path / "new/x.npz")]
    assert "expected" in mistake(capsys, "convert", *flags) and not (tmp_path / "new").exists()


def test_inspecting_a_set_that_does_not_say_its_environment(tmp_path, capsys, demo_file):
    path = demo_file(metadata=json.dumps({"format_version": 1, "max_episode_steps": 100}))
    c.main(["inspect", "--demos", path, "--figure", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").exists()
    assert "--figure" in mistake(capsys, "inspect", "--demos", path, "--figure", str(tmp_path / "a.xyz"))


def test_sets_of_an_environment_in_a_namespace_have_plain_names(tmp_path, monkeypatch):
    arrays = c.record_episodes(small_policy(), 0.0, 2, seed=0)
    monkeypatch.setattr(c, "record_episodes", lambda *args: arrays)
    c.record_sets(small_policy() | {"env_id": "mine/Hopper-v0"}, tmp_path, 2, 1)
    assert (tmp_path / "mine-hopper-v0_sac_stochastic-one.npz").exists() and len(list(tmp_path.iterdir())) == 5


# Users' mistakes


def mistake(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit_info:
        c.main([*argv])
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert "code from a file ran" not in printed.out
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["train", "--num-envs", "0"], "--num-envs"),
        (["train", "--tau", "2"], "--tau"),
        (["train", "--env-id", "Nothing-v0"], "--env-id"),
        (["train", "--env-id", "CartPole-v1"], "--env-id"),
        (["train", "--resume", "nowhere.pt"], "--resume"),
        (["train", "--resume", "nowhere.pt", "--seed", "2"], "--resume"),
        (["collect", "--expert", "nowhere.pt"], "--expert"),
        (["collect", "--episodes", "0"], "--episodes"),
        (["inspect", "--demos", "nowhere.npz"], "nowhere.npz"),
        (["convert", "--source", "a.npz", "--target", "b.npz"], "--source"),
        (["convert", "--source", "nowhere.pkl", "--target", "b.npz"], "--source"),
        (["train", "--seed", "99999999999999999999"], "--seed"),
        (["collect", "--seed", "99999999999999999999"], "--seed"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    assert named in mistake(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_outputs_in_new_folders_and_where_nothing_can_be_written(tmp_path, capsys, demo_file):
    source = demo_file()
    c.main(["convert", "--source", source, "--target", str(tmp_path / "new/folder/a.pkl")])
    c.main(["inspect", "--demos", source, "--figure", str(tmp_path / "another/a.png")])
    assert (tmp_path / "new/folder/a.pkl").exists() and (tmp_path / "another/a.png").exists()
    (tmp_path / "file").write_text("")
    for argv in (["convert", "--source", source, "--target"], ["inspect", "--demos", source, "--figure"]):
        assert f"{tmp_path}/file" in mistake(capsys, *argv, str(tmp_path / "file/a.pkl"))


def test_checkpoint_of_another_version(tmp_path, capsys):
    args = vars(c.Train()) | {"lr": 1.0}
    torch.save({"format_version": 1, "script": "collect_expert_sac", "args": args}, tmp_path / "old.pt")
    assert "another version" in mistake(capsys, "train", "--resume", str(tmp_path / "old.pt"))


@pytest.mark.parametrize("change", [{"weights": {}}, {"weights": 3}, {"sizes": [17, 12]}, {"obs_mean": "x"}])
def test_malformed_expert(tmp_path, capsys, change):
    torch.save(small_policy() | change, tmp_path / "policy.pt")
    flags = ["--expert", str(tmp_path / "policy.pt"), "--output-dir", str(tmp_path / "sets")]
    assert "damaged" in mistake(capsys, "collect", *flags)


def test_a_set_whose_fields_disagree_is_refused(tmp_path, capsys):
    fields = make_demo_fields() | {"rewards": np.zeros(3, np.float32)}
    np.savez(tmp_path / "bad.npz", **fields)
    assert "'rewards'" in mistake(capsys, "inspect", "--demos", str(tmp_path / "bad.npz"))
    assert json.loads(fields["metadata"])["format_version"] == c.FORMAT_VERSION
