"""collect_expert_sac.py: SAC against closed forms and known answers, the sets, whole runs."""

import csv
import hashlib
import json
import math
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import DEMOS, ROOT
from torch.optim import Adam

import collect_expert_sac as c

TINY = "train --total-timesteps 20000 --num-envs 16 --learning-starts 2000 --threads 1"
TINY += " --hidden-size 16 --batch-size 32 --updates-per-step 0.01 --buffer-size 5000"
TINY = f"{TINY} --eval-interval 10000 --checkpoint-interval 10000".split()
CHEETAH = {"env_id": "HalfCheetah-v4", "max_episode_steps": 20}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def an_actor(obs_dim=17, low=(-1,) * 6, high=(1,) * 6, hidden_size=16, seed=0) -> c.SquashedGaussianActor:
    """An actor that standardizes with mean 0.1 and deviation 2."""
    actor = c.SquashedGaussianActor(obs_dim, low, high, hidden_size, generator(seed))
    actor.mean.fill_(0.1)
    actor.std.fill_(2.0)
    return actor


def a_policy_file(path, **changes) -> str:
    actor = an_actor()
    saved = {"kind": "collect_expert_sac policy", "actor": actor.state_dict(), "hidden_size": 16}
    torch.save(saved | CHEETAH | changes, path)
    return str(path)


# Networks


def test_twin_critic_is_two_ordinary_networks():
    critic, obs, action = c.TwinCritic(3, 2, 8, generator()), torch.randn(5, 3), torch.randn(5, 2)
    for i, net in enumerate(critic.nets):
        x = torch.cat([obs, action], 1)
        for layer in (net[0], net[2], net[4]):
            x = x @ layer.weight.T + layer.bias
            x = torch.relu(x) if layer is not net[4] else x
        torch.testing.assert_close(critic(obs, action)[i], x[:, 0])
    assert not torch.allclose(*critic(obs, action))


def test_weights_begin_as_those_of_linear_layers():
    agent = c.SoftActorCritic(50, (-1,), (1,), 200, generator())
    layers = [(agent.actor.net[0].weight, 50), (agent.critic.nets[0][0].weight, 51)]
    for weight, fan_in in [*layers, (agent.critic.nets[1][2].bias, 200)]:
        assert weight.abs().max() <= 1 / math.sqrt(fan_in)
        assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)
    assert agent.log_alpha.item() == 0
    for target, critic in zip(agent.target_critic.parameters(), agent.critic.parameters()):
        assert torch.equal(target, critic) and not target.requires_grad and critic.requires_grad


def test_actions_fill_the_bounds_and_log_deviations_theirs():
    actor = an_actor(3, low=(-2.0, 0.0), high=(4.0, 1.0))
    actions = torch.tensor([[-1.0, 1.0], [0.0, 0.0]])
    assert actor.to_bounds(actions).tolist() == [[-2.0, 1.0], [1.0, 0.5]]
    mean, log_std = actor(torch.randn(100, 3) * 1000)
    assert mean.shape == log_std.shape == (100, 2)
    assert log_std.min() >= -5 and log_std.max() <= 2 and log_std.max() - log_std.min() > 3
    mean, log_std = actor(torch.zeros(1, 3))
    raw = actor.net(torch.zeros(1, 3))[:, 2:]
    torch.testing.assert_close(log_std, -5 + 3.5 * (torch.tanh(raw) + 1))


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(-2.2, 0.4, np.float32), (-0.1, 0.1, np.float32), (-0.1, 0.1, np.float64)]
)
def test_no_action_lies_beyond_the_bounds_by_rounding(low, high, dtype):
    """In float32 -2.2 + (0.4 + 2.2) is more than 0.4, and 0.1 more than in float64."""
    space = gym.spaces.Box(low, high, (2,), dtype)
    actor = an_actor(3, low=space.low, high=space.high)
    actor.net[-1].bias.data[:] = 20.0
    action = actor.act(np.zeros(3))
    assert space.contains(action) and np.allclose(action, high)


def test_acting_standardizes_squashes_and_stretches():
    actor = an_actor(3, low=(-2.0, 0.0), high=(4.0, 1.0))
    obs = np.random.default_rng(0).normal(size=(9, 3))
    x = torch.tensor((obs - 0.1) / 2, dtype=torch.float32)
    mean, log_std = (part.detach().numpy() for part in actor(x))
    low, high = np.array([-2.0, 0.0]), np.array([4.0, 1.0])

    def stretched(u):
        return low + (np.tanh(u) + 1) / 2 * (high - low)

    np.testing.assert_allclose(actor.act(obs), stretched(mean), rtol=1e-5, atol=1e-6)
    noise = torch.randn(9, 2, generator=generator(1)).numpy()
    for scale in (0.0, 0.5, 1.0, 2.0):
        expected = stretched(mean + scale * np.exp(log_std) * noise)
        action = actor.act(obs, generator(1), scale)
        np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-6)


# The algorithm


def test_tanh_gaussian_log_probability_integrates_to_one():
    """Quadrature over the action of exp(log_prob): the density of one squashed dimension."""
    mean, log_std = torch.tensor([[0.3]]), torch.tensor([[-0.4]])
    u = torch.linspace(-8, 8, 200_001, dtype=torch.float64) * log_std.exp().item() + mean.item()
    noise = (u - mean.item()) / log_std.exp().item()
    action, log_prob = c.tanh_gaussian(mean, log_std, noise[:, None].float())
    total = torch.trapezoid(log_prob.double().exp(), torch.tanh(u))
    assert total.item() == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(action[:, 0].double(), torch.tanh(u), atol=1e-4, rtol=0)


def test_log_probability_is_that_of_torch():
    mean, log_std, noise = 0.5 * torch.randn(3, 7, 2, generator=generator()).double()
    action, log_prob = c.tanh_gaussian(mean, log_std, noise)
    normal = torch.distributions.Normal(mean, log_std.exp())
    tanh = torch.distributions.TanhTransform()
    squashed = torch.distributions.TransformedDistribution(normal, tanh)
    torch.testing.assert_close(log_prob, squashed.log_prob(action).sum(-1))


def test_log_probability_stays_finite_where_tanh_saturates():
    mean, noise = torch.full((1, 1), 1e4), torch.full((1, 1), 50.0)
    action, log_prob = c.tanh_gaussian(mean, torch.zeros(1, 1), noise)
    assert action.abs().item() <= 1 and torch.isfinite(log_prob).all()


def a_buffer(size) -> dict[str, torch.Tensor]:
    shapes = {"obs": (1,), "action": (1,), "next_obs": (1,), "reward": (), "terminated": ()}
    return {name: torch.zeros(size, *shape) for name, shape in shapes.items()}


def test_replay_buffer_keeps_the_latest():
    buffer = a_buffer(5)
    for k in range(4):
        values = torch.tensor([2.0 * k, 2.0 * k + 1])
        columns = {name: values[:, None] for name in ("obs", "action", "next_obs")}
        c.store(buffer, columns | {"reward": values, "terminated": values > 6}, 2 * k)
        seen = set(c.sample(buffer, min(2 * k + 2, 5), 500, generator())["reward"].tolist())
        assert seen == set(range(max(0, 2 * k - 3), 2 * k + 2))
    batch = c.sample(buffer, 5, 100, generator())
    torch.testing.assert_close(batch["obs"][:, 0], batch["reward"])
    torch.testing.assert_close(batch["terminated"], (batch["reward"] > 6).float())


def test_statistics_are_those_of_the_observations():
    """Far from zero too, where float32 has no more than two digits of them."""
    actor, scale, centre = an_actor(2), torch.tensor([10.0, 1e-2]), torch.tensor([5.0, 1e4])
    z = torch.randn(5000, 2, generator=generator(), dtype=torch.float64)
    actor.fit_statistics(centre + scale * z)
    expected = (z - z.mean(0)) / z.std(0)
    x = actor.standardize(centre + scale * z)
    torch.testing.assert_close(x, expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(actor.std, scale * z.std(0), rtol=1e-8, atol=0)
    action = actor.act((centre + scale * z).numpy())
    np.testing.assert_allclose(action, torch.tanh(actor(expected.float())[0]).detach(), atol=1e-5)
    assert {"mean", "std"} <= actor.state_dict().keys()


def test_what_has_not_varied_yet_keeps_its_scale():
    actor, centre = an_actor(4), torch.tensor([0.0, -7.0, 0.1, 1e6])
    obs = centre.repeat(1000, 1).double()
    obs[::2, 2] += 1e-9  # rounding
    obs[::2, 3] += 1.0  # a millionth is more than that
    actor.fit_statistics(obs)
    assert actor.std[:3].tolist() == [1.0, 1.0, 1.0] and 0.49 < actor.std[3] < 0.51
    moved = actor.standardize(centre.double() + 0.5)[:3]  # it moves after all
    torch.testing.assert_close(moved, torch.full((3,), 0.5), atol=1e-6, rtol=0)


def bandit_batch(size=256, seed=0):
    """One state, one step, reward -(a - 0.5)^2: Q is known, the best action too."""
    action = torch.rand(size, 1, generator=generator(seed)) * 2 - 1
    obs = torch.zeros(size, 1)
    reward = -(action[:, 0] - 0.5).square()
    return {
        "obs": obs,
        "action": action,
        "reward": reward,
        "next_obs": obs,
        "terminated": torch.ones(size),
    }


def a_learner(learning_rate=3e-3, alpha_rate=3e-3, action_dim=1, obs_dim=1) -> tuple:
    bounds = (-1,) * action_dim, (1,) * action_dim
    sac = c.SoftActorCritic(obs_dim, *bounds, 32, generator())
    optimizers = {"critic": Adam(sac.critic.parameters(), learning_rate)}
    optimizers |= {
        "actor": Adam(sac.actor.parameters(), learning_rate),
        "alpha": Adam([sac.log_alpha], alpha_rate),
    }
    return sac, optimizers


def test_update_learns_the_known_answer_of_a_one_step_problem():
    sac, optimizers = a_learner(alpha_rate=3e-2)
    sac.log_alpha.data.fill_(-4.0)
    noise, args = generator(1), c.Args(gamma=0.99)
    for k in range(600):
        log = c.update(sac, optimizers, bandit_batch(seed=k), args, noise)
    batch = bandit_batch(seed=10_000)
    with torch.no_grad():
        q = sac.critic(batch["obs"], batch["action"])
        mean, _ = sac.actor(torch.zeros(1, 1))
    assert (q - batch["reward"]).abs().mean() < 0.05  # terminated: no bootstrap, whatever gamma
    assert torch.tanh(mean).item() == pytest.approx(0.5, abs=0.1)
    # the temperature holds the entropy at its target
    assert log["sac/entropy"].item() == pytest.approx(-1.0, abs=0.15)


def test_update_bootstraps_only_where_the_episode_goes_on():
    values = {}
    for terminated in (0.0, 1.0):
        sac, optimizers = a_learner(alpha_rate=0.0)
        sac.log_alpha.data.fill_(-20.0)  # no entropy in the value
        for k in range(400):
            batch = bandit_batch(seed=k) | {
                "reward": torch.ones(256),
                "terminated": torch.full((256,), terminated),
            }
            c.update(sac, optimizers, batch, c.Args(gamma=0.5, tau=0.05), generator(k))
        values[terminated] = sac.critic(batch["obs"], batch["action"]).mean().item()
    assert values[1.0] == pytest.approx(1.0, abs=0.05)
    assert values[0.0] == pytest.approx(2.0, abs=0.1)  # 1 / (1 - gamma)


def test_losses_are_the_papers():
    """Against plain loops over the minibatch, with the noise that update draws."""
    sac, optimizers = a_learner(learning_rate=0.0, action_dim=2, obs_dim=3)
    sac.actor.mean.fill_(0.5)
    sac.actor.std.fill_(3.0)
    sac.log_alpha.data.fill_(-1.0)
    for weight in sac.target_critic.parameters():
        weight.data *= 1.5
    obs, next_obs = torch.randn(2, 8, 3, generator=generator(6))
    batch = {"obs": obs, "action": torch.tanh(next_obs[:, :2]), "next_obs": next_obs}
    batch |= {"reward": obs.sum(1), "terminated": (torch.arange(8) % 3 == 0).float()}
    noise = torch.randn((2, 8, 2), generator=generator(5))
    critic_loss = actor_loss = entropy = 0.0
    alpha = math.exp(-1)
    with torch.no_grad():
        for b in range(8):
            x, next_x = ((batch[name][b : b + 1] - 0.5) / 3 for name in ("obs", "next_obs"))
            next_action, next_log_prob = c.tanh_gaussian(*sac.actor(next_x), noise[0, b : b + 1])
            worst = min(sac.target_critic(next_x, next_action)[i].item() for i in range(2))
            soft_value = worst - alpha * next_log_prob.item()
            goes_on = 1 - batch["terminated"][b].item()
            target = batch["reward"][b].item() + 0.9 * goes_on * soft_value
            q = sac.critic(x, batch["action"][b : b + 1])
            critic_loss += sum(0.5 * (q[i].item() - target) ** 2 for i in range(2)) / 8
            action, log_prob = c.tanh_gaussian(*sac.actor(x), noise[1, b : b + 1])
            worst = min(sac.critic(x, action)[i].item() for i in range(2))
            actor_loss += (alpha * log_prob.item() - worst) / 8
            entropy -= log_prob.item() / 8
    log = c.update(sac, optimizers, batch, c.Args(gamma=0.9), generator(5))
    log = {name: x.item() for name, x in log.items()}
    expected = {"sac/qf_loss": critic_loss, "sac/actor_loss": actor_loss}
    expected |= {"sac/alpha": alpha, "sac/entropy": entropy}
    # the target entropy is minus the number of actions
    expected |= {"sac/alpha_loss": -alpha * (-entropy - 2)}
    assert log == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("std", [0.01, 1.0])
def test_temperature_moves_towards_the_target_entropy(std):
    sac, optimizers = a_learner()
    nn = sac.actor.net[-1]
    nn.weight.data.zero_()
    nn.bias.data[:] = torch.tensor([0.0, math.atanh((math.log(std) + 5) / 3.5 - 1)])
    log = c.update(sac, optimizers, bandit_batch(), c.Args(), generator())
    too_little = log["sac/entropy"].item() < -1
    assert too_little == (std == 0.01) and (sac.log_alpha.item() > 0) == too_little


def test_target_critic_follows_by_polyak_averaging():
    sac, optimizers = a_learner()
    before = [p.clone() for p in sac.target_critic.parameters()]
    c.update(sac, optimizers, bandit_batch(), c.Args(tau=0.25), generator())
    for old, new, online in zip(before, sac.target_critic.parameters(), sac.critic.parameters()):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)
        assert not torch.equal(old, online)


def test_critics_learn_from_their_own_loss_alone():
    """The actor's loss must not reach them: it would make every action look good."""
    sac, optimizers = a_learner()
    optimizers["critic"] = Adam(sac.critic.parameters(), 0.0)
    before = [p.clone() for p in sac.critic.parameters()]
    c.update(sac, optimizers, bandit_batch(), c.Args(), generator())
    assert all(torch.equal(x, y) for x, y in zip(before, sac.critic.parameters()))
    gradients = [p.grad.clone() for p in sac.critic.parameters()]
    q = sac.critic(torch.zeros(256, 1), bandit_batch()["action"])
    loss = 0.5 * (q - bandit_batch()["reward"]).square().mean(1).sum()
    expected = torch.autograd.grad(loss, list(sac.critic.parameters()))
    torch.testing.assert_close(gradients, list(expected))
    assert all(p.requires_grad for p in sac.critic.parameters())


# The steps of the loop


def first_episodes(envs, seed=0) -> dict:
    obs = torch.from_numpy(envs.reset(seed=seed)[0])
    return {"obs": obs, "return": torch.zeros(len(obs), dtype=torch.float64), "finished": []}


def test_transitions_are_continuous_and_keep_true_next_observations():
    envs, actor, random = c.BatchHalfCheetah(3, 5, 1), an_actor(), generator()
    episodes, steps = first_episodes(envs), []
    for t in range(12):
        steps.append(c.step_environments(envs, actor, episodes, t < 6, random))
        assert len(episodes["finished"]) == 3 * ((t + 1) // 5)
    for t, (step, following) in enumerate(zip(steps, steps[1:])):
        continues = torch.equal(step["next_obs"], following["obs"])
        assert continues == ((t + 1) % 5 != 0)
        assert not step["terminated"].any()  # a time limit is no end of the task
    rewards = torch.stack([step["reward"] for step in steps])
    returns = rewards[:10].reshape(2, 5, 3).sum(1).flatten().tolist()
    assert episodes["finished"] == pytest.approx(returns)
    torch.testing.assert_close(episodes["return"], rewards[10:].sum(0))
    for _ in range(200):
        c.step_environments(envs, actor, episodes, True, random)
    assert len(episodes["finished"]) == 100


def test_actions_are_uniform_at_first_and_then_the_policys_in_the_worlds_bounds():
    envs, actor = c.BatchHalfCheetah(50, 100, 1), an_actor(low=(-0.5,) * 6, high=(0.25,) * 6)
    episodes, seen, step = first_episodes(envs), [], envs.step
    envs.step = lambda actions: (seen.append(actions), step(actions))[1]
    steps = [c.step_environments(envs, actor, episodes, True, generator(k)) for k in range(40)]
    uniform = torch.cat([step["action"] for step in steps])
    assert uniform.abs().max() <= 1
    assert uniform.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.02)
    obs, random = episodes["obs"].float(), generator(7)
    action = c.step_environments(envs, actor, episodes, False, random)["action"]
    noise = torch.randn(50, 6, generator=generator(7))
    expected, _ = c.tanh_gaussian(*actor((obs - 0.1) / 2), noise)
    torch.testing.assert_close(action, expected)
    np.testing.assert_allclose(seen[-1], -0.5 + (expected.detach() + 1) / 2 * 0.75, atol=1e-6)
    assert np.min(seen) >= -0.5 and np.max(seen) <= 0.25


def test_the_fast_environment_is_gymnasiums():
    fast, slow = c.BatchHalfCheetah(1, 30, 1), gym.make("HalfCheetah-v4").unwrapped
    obs, _ = fast.reset(seed=3)
    slow.reset()
    slow.set_state(fast.qpos[0].copy(), fast.qvel[0].copy())
    for t in range(30):
        action = np.random.default_rng(t).uniform(-1, 1, (1, 6)).astype(np.float32)
        obs, reward, _, truncated, info = fast.step(action)
        expected, expected_reward, *_ = slow.step(action[0])
        np.testing.assert_allclose(info["final_obs"][0], expected, atol=1e-9)
        np.testing.assert_allclose(info["final_states"][0, 1:], expected, atol=1e-9)
        assert reward[0] == pytest.approx(expected_reward, abs=1e-7)
        assert truncated[0] == (t == 29)
    assert not np.allclose(obs, info["final_obs"])


# Recording


def test_recorded_episodes_replay_in_the_environment():
    arrays = c.record_episodes(an_actor(), CHEETAH, 1.0, 3, seed=5)
    assert arrays["lengths"].tolist() == [20, 20, 20]
    assert arrays["truncated"].all() and not arrays["terminated"].any()
    assert arrays["observations"].shape == (63, 17) and arrays["qpos"].shape == (63, 9)
    envs = c.BatchHalfCheetah(1, 1000, 1)
    for e in range(3):
        envs.reset()
        envs.qpos[0], envs.qvel[0] = arrays["qpos"][21 * e], arrays["qvel"][21 * e]
        for t in range(20):
            obs = arrays["observations"][21 * e + t]
            np.testing.assert_allclose(envs.states()[0, 1:], obs, atol=1e-3)
            _, reward, *_ = envs.step(arrays["actions"][20 * e + t][None])
            assert reward[0] == pytest.approx(arrays["rewards"][20 * e + t], abs=1e-2)
        obs = arrays["observations"][21 * e + 20]
        np.testing.assert_allclose(envs.states()[0, 1:], obs, atol=1e-3)


def test_noise_scales_differ_and_zero_is_repeatable():
    recorded = [c.record_episodes(an_actor(), CHEETAH, x, 2, seed=1) for x in (0.0, 2.0, 0.0)]
    quiet, loud, again = (arrays["actions"] for arrays in recorded)
    np.testing.assert_array_equal(quiet, again)
    assert np.abs(loud).mean() > np.abs(quiet).mean()


def test_recorded_actions_are_the_experts_on_what_was_recorded():
    arrays = c.record_episodes(an_actor(), CHEETAH, 0.0, 3, seed=0)
    before = np.delete(arrays["observations"], np.cumsum(arrays["lengths"] + 1) - 1, axis=0)
    np.testing.assert_allclose(arrays["actions"], an_actor().act(before), atol=1e-5)


def test_each_set_has_the_noise_that_it_is_named_after(tmp_path, monkeypatch):
    record, scales, seeds = c.record_episodes, [], []

    def noted(actor, task, noise_scale, episodes, seed):
        scales.append(noise_scale)
        seeds.append(seed)
        return record(actor, task, noise_scale, episodes, seed)

    monkeypatch.setattr(c, "record_episodes", noted)
    returns = c.record_sets(an_actor(), CHEETAH, tmp_path / "new", 2, 1)
    assert scales == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0]  # the expert's own return comes first
    assert seeds == [1001, 50_001, 50_002, 50_003, 50_004, 50_005]
    for seed, (level, scale) in enumerate(c.NOISE_LEVELS.items(), 50_001):
        with np.load(tmp_path / f"new/halfcheetah-v4_sac_{level}.npz", allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"]))
            assert metadata["noise_scale"] == scale and metadata["seed"] == seed
            assert metadata["expert_return_mean"] == returns["expert"].mean()
            per_episode = file["rewards"].reshape(2, 20).sum(1)
        assert metadata["return_mean"] == pytest.approx(per_episode.mean(), rel=1e-5)
        np.testing.assert_allclose(returns[level], per_episode, rtol=1e-4)
    assert len(list((tmp_path / "new").iterdir())) == 5
    seeds.clear()
    c.record_sets(an_actor(), {**CHEETAH, "env_id": "gymnasium:HalfCheetah-v4"}, tmp_path / "more", 2, 3)
    assert seeds[1:] == [52_001, 52_002, 52_003, 52_004, 52_005]  # no episode in common with other seeds
    assert (tmp_path / "more/gymnasium-halfcheetah-v4_sac_deterministic.npz").exists()


def test_the_shipped_expert_records_the_shipped_sets_again():
    """Bit for bit; and the sets name the weights of just this expert."""
    actor, task = c.load_agent(str(ROOT / "data/expert.pt"))
    with np.load(DEMOS) as file:
        arrays = c.record_episodes(actor, task, 1.0, 50, 50_003)
        metadata = json.loads(str(file["metadata"]))
        assert {*file.files} == {*arrays, "metadata"}
        for name, x in arrays.items():
            assert x.dtype == file[name].dtype and (x == file[name]).all(), name
    weights = [*actor.net.state_dict().values(), actor.mean, actor.std]
    sha256 = hashlib.sha256(b"".join(x.numpy().tobytes() for x in weights)).hexdigest()
    assert metadata["expert_sha256"] == sha256


@pytest.mark.parametrize("body", ["Hopper", "Walker2d"])
def test_the_other_shipped_experts_walk(body):
    actor, task = c.load_agent(str(ROOT / f"data/{body.lower()}_expert.pt"))
    assert task["env_id"] == f"{body}-v4" and task["max_episode_steps"] == 1000
    arrays = c.record_episodes(actor, task | {"max_episode_steps": 100}, 0.0, 2, 0)
    assert arrays["lengths"].tolist() == [100, 100] and arrays["rewards"].mean() > 2


def test_an_expert_that_has_diverged_records_nothing(tmp_path, capsys):
    weights = an_actor().state_dict()
    weights["net.0.weight"] = weights["net.0.weight"] * math.nan
    policy, folder = a_policy_file(tmp_path / "a.pt", actor=weights), tmp_path / "sets"
    message = mistake(capsys, "collect", "--expert", policy, "--output-dir", str(folder))
    assert "not finite" in message and not folder.exists()


def test_recording_an_environment_that_can_terminate():
    """Against gymnasium, one episode after another."""
    actor = an_actor(11, (-1,) * 3, (1,) * 3)
    task = {"env_id": "Hopper-v4", "max_episode_steps": 50}
    arrays = c.record_episodes(actor, task, 0.0, 5, seed=0)
    assert arrays["terminated"].any() and len(arrays["observations"]) == arrays["lengths"].sum() + 5
    assert (arrays["terminated"] ^ arrays["truncated"]).all() and "qpos" not in arrays
    first = np.cumsum(arrays["lengths"]) - arrays["lengths"]
    env = gym.make("Hopper-v4", max_episode_steps=50)
    for e in range(5):
        obs, _ = env.reset(seed=e)
        observations, ended = [obs], False
        while not ended:
            obs, _, terminated, truncated, _ = env.step(actor.act(obs[None])[0])
            observations.append(obs)
            ended = terminated or truncated
        rows = slice(first[e] + e, first[e] + e + len(observations))
        np.testing.assert_allclose(arrays["observations"][rows], observations, rtol=1e-3, atol=1e-4)
        assert arrays["lengths"][e] == len(observations) - 1
        assert arrays["terminated"][e] == terminated


def test_sets_of_an_environment_in_a_namespace_have_plain_names(tmp_path, monkeypatch):
    arrays = c.record_episodes(an_actor(), CHEETAH, 0.0, 2, seed=0)
    monkeypatch.setattr(c, "record_episodes", lambda *args: dict(arrays))
    task = CHEETAH | {"env_id": "mine/Hopper-v0"}
    c.record_sets(an_actor(), task, tmp_path, 2, 1)
    assert (tmp_path / "mine-hopper-v0_sac_stochastic-one.npz").exists()
    assert len(list(tmp_path.iterdir())) == 5


def test_collect_records_sets_of_a_saved_expert(tmp_path, capsys):
    policy, folder = a_policy_file(tmp_path / "policy.pt"), tmp_path / "d"
    flags = ["--expert", policy, "--output-dir", str(folder), "--episodes", "2", "--seed", "3"]
    c.main(["collect", *flags])
    assert capsys.readouterr().out.count("(2 episodes)") == 5
    with np.load(folder / "halfcheetah-v4_sac_stochastic-one_five.npz") as file:
        assert file["lengths"].tolist() == [20, 20] and file["qvel"].shape == (42, 9)
        metadata = json.loads(str(file["metadata"]))
        expected = c.record_episodes(an_actor(), CHEETAH, 1.5, 2, metadata["seed"])
        assert (file["observations"] == expected["observations"]).all()
    assert {"expert_sha256", "versions"} <= metadata.keys() and metadata["seed"] == 52_004


# Whole runs


def run(tmp_path, name, *flags) -> dict:
    c.main([*TINY, *flags, "--output-dir", str(tmp_path), "--run-name", name])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir) -> list[dict]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in csv.DictReader(file)]


@pytest.fixture
def without_sets(monkeypatch):
    returns = dict.fromkeys(["expert", *c.NOISE_LEVELS], np.zeros(1))
    monkeypatch.setattr(c, "record_sets", lambda *args: returns)


def test_statistics_are_fitted_once_and_updates_come_on_time(tmp_path, monkeypatch, without_sets):
    acted, updated, step, update = [], [], c.step_environments, c.update

    def noted_step(envs, actor, episodes, uniform, random):
        mean, std = actor.mean.clone(), actor.std.clone()
        acted.append((uniform, mean, std, step(envs, actor, episodes, uniform, random)["obs"]))
        transitions = {"obs": acted[-1][3], "next_obs": acted[-1][3], "action": torch.zeros(16, 6)}
        return transitions | {"reward": torch.zeros(16), "terminated": torch.zeros(16)}

    def noted_update(*args):
        updated.append(len(acted) * 16)
        return update(*args)

    monkeypatch.setattr(c, "step_environments", noted_step)
    monkeypatch.setattr(c, "update", noted_update)
    flags = "--total-timesteps 4800 --eval-interval 100000 --checkpoint-interval 100000"
    run(tmp_path, "a", *flags.split())
    assert [x[0] for x in acted] == [16 * t <= 2000 for t in range(300)]
    obs = torch.cat([x[3] for x in acted if x[0]])  # the random ones
    before = torch.zeros(17, dtype=torch.float64), torch.ones(17, dtype=torch.float64)
    for uniform, mean, std, _ in acted:
        expected = before if uniform else (obs.mean(0), obs.std(0))
        torch.testing.assert_close((mean, std), expected, atol=1e-5, rtol=0)
    due = {16 * t: int(0.16 * t) - int(0.16 * (t - 1)) for t in range(126, 301)}
    assert updated == [step for step, count in due.items() for _ in range(count)]


def test_a_run_writes_its_files_and_returns_its_summary(tmp_path):
    flags = "--total-timesteps 4800 --eval-interval 1600 --max-episode-steps 20"
    summary = run(tmp_path, "a", *flags.split())
    names = {path.name for path in (tmp_path / "a").iterdir()}
    sets = {f"halfcheetah-v4_sac_{level}.npz" for level in c.NOISE_LEVELS}
    files = {"config.json", "metrics.csv", "summary.json", "checkpoint.pt", "policy.pt"}
    assert names == files | sets
    rows = rows_of(tmp_path / "a")
    evaluated = [row["global_step"] for row in rows if row["eval/return_mean"]]
    assert evaluated == ["1600", "3200", "4800"]
    rates = [float(row["charts/learning_rate"]) for row in rows]
    assert rates == pytest.approx([1e-3 * (1 - x / 4800) for x in (1600, 3200, 4800)])
    assert rows[0]["sac/qf_loss"] == "" and float(rows[1]["sac/qf_loss"]) > 0
    assert summary["env_steps"] == 4800
    assert summary["best/return_mean"] == max(float(row["eval/return_mean"]) for row in rows)
    assert {f"sets/{level}" for level in c.NOISE_LEVELS} <= summary.keys()
    with np.load(tmp_path / "a/halfcheetah-v4_sac_stochastic-half.npz") as file:
        assert summary["sets/stochastic-half"] == json.loads(str(file["metadata"]))["return_mean"]
    actor, task = c.load_agent(str(tmp_path / "a/policy.pt"))
    again = c.returns_of(c.record_episodes(actor, task, 0.0, 20, 1 + 10_000))
    assert again.mean() == float(rows[-1]["eval/return_mean"])


class Killed(Exception):
    pass


def test_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, without_sets):
    run(tmp_path, "whole")
    calls, update = [], c.update

    def dying_update(*args):
        calls.append(None)
        if len(calls) == 120:  # after a checkpoint, and with updates beyond it
            raise Killed
        return update(*args)

    monkeypatch.setattr(c, "update", dying_update)
    with pytest.raises(Killed):
        run(tmp_path, "killed")
    monkeypatch.setattr(c, "update", update)
    c.main(["train", "--resume", str(tmp_path / "killed/checkpoint.pt")])
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    paths = (tmp_path / name / "checkpoint.pt" for name in ("whole", "killed"))
    whole, killed = (torch.load(path, weights_only=True) for path in paths)
    for part in ("sac", "buffer"):
        assert all(torch.equal(whole[part][k], killed[part][k]) for k in whole[part])
    assert torch.equal(whole["generator"], killed["generator"])


def test_a_finished_run_goes_on_longer_and_says_that_it_is_finished(tmp_path, capsys, without_sets):
    flags = "--total-timesteps 4000 --eval-interval 2000 --checkpoint-interval 2000"
    run(tmp_path, "a", *flags.split())
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    assert "has come that far" in mistake(capsys, "train", "--resume", checkpoint)
    c.main(["train", "--resume", checkpoint, "--total-timesteps=8000"])
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [2000, 4000, 6000, 8000]
    rates = [float(row["charts/learning_rate"]) for row in rows]
    # the old schedule, then the new one
    assert rates == pytest.approx([1e-3 * x for x in (1 / 2, 0, 1 / 4, 0)])
    assert len(torch.load(checkpoint, weights_only=True)["buffer"]["obs"]) == 5000


def test_a_run_that_is_killed_while_it_records_goes_on(tmp_path, monkeypatch):
    def dying_record(*args):
        raise Killed

    record, flags = c.record_sets, "--total-timesteps 3200 --max-episode-steps 10".split()
    monkeypatch.setattr(c, "record_sets", dying_record)
    with pytest.raises(Killed):
        run(tmp_path, "a", *flags)
    monkeypatch.setattr(c, "record_sets", record)
    c.main(["train", "--resume", str(tmp_path / "a/checkpoint.pt")])
    assert (tmp_path / "a/summary.json").exists() and len(list(tmp_path.glob("a/*.npz"))) == 5
    assert [row["global_step"] for row in rows_of(tmp_path / "a")] == ["3200"]


def test_same_seed_same_run_and_another_seed_another(tmp_path, without_sets):
    flags = ["--total-timesteps", "4000", "--eval-interval", "2000", "--no-anneal-lr"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(tmp_path, name, *flags, "--seed", seed)
    a, b, other = (rows_of(tmp_path / name) for name in "abc")
    assert a == b != other
    assert {row["charts/learning_rate"] for row in a} == {"0.001"}


def test_another_environment_trains_and_begins_new_episodes_when_resumed(tmp_path, without_sets):
    flags = "--env-id Hopper-v4 --total-timesteps 2400 --learning-starts 800 --eval-interval 1200"
    run(tmp_path, "a", *flags.split())
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert saved["simulator"] is None and saved["buffer"]["terminated"].sum() > 0
    c.main(["train", "--resume", str(tmp_path / "a/checkpoint.pt"), "--total-timesteps", "3600"])
    assert [row["global_step"] for row in rows_of(tmp_path / "a")] == ["1200", "2400", "3600"]


@pytest.mark.parametrize("flags, rate", [([], 0.0), (["--no-anneal-lr"], 1e-3)])
def test_all_step_sizes_fall_to_zero_or_stay(tmp_path, monkeypatch, flags, rate):
    class Trained(Exception):
        pass

    def stop(*args):
        raise Trained

    monkeypatch.setattr(c, "record_sets", stop)
    args = c.parse_args([*TINY, *flags, "--total-timesteps", "2400", "--output-dir", str(tmp_path), "--run-name", "a"])
    with pytest.raises(Trained):
        c.train(args)
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert {name: saved[name]["param_groups"][0]["lr"] for name in ("critic", "actor", "alpha")} == dict.fromkeys(
        ("critic", "actor", "alpha"), rate
    )


@pytest.mark.parametrize("at, what, kept", [(25, "sac/qf_loss", 4000), (180, "weights", 16000)])  # of 180 updates
def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys, at, what, kept):
    calls, update = [], c.update

    def diverging(sac, *args):
        log = update(sac, *args)
        calls.append(None)
        if len(calls) == at and what == "weights":
            sac.log_alpha.data.fill_(math.nan)
        elif len(calls) == at:
            log[what] = torch.tensor(math.nan)
        return log

    monkeypatch.setattr(c, "update", diverging)
    flags = ["--checkpoint-interval", "4000", "--output-dir", str(tmp_path), "--run-name", "a"]
    message = mistake(capsys, *TINY, *flags)
    assert "training diverged at step" in message and f": {what} not finite" in message
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert saved["rows"][-1]["global_step"] == kept and saved["sac"]["log_alpha"].isfinite()


class Match(gym.Env):
    """The best action is the number that is shown."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-2, 2, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.shown = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.shown, {}

    def step(self, action):
        reward = -float((action[0] - self.shown[0]) ** 2)
        return *self.reset()[:1], reward, False, False, {}


gym.register("Match-v0", Match)


@pytest.mark.parametrize("what", ["shown", "reward"])
def test_what_is_no_number_is_the_environments_mistake(tmp_path, monkeypatch, capsys, what):
    step = Match.step

    def broken(self, action):
        obs, reward, *others = step(self, action)
        return (np.full(1, np.nan), reward, *others) if what == "shown" else (obs, np.nan, *others)

    monkeypatch.setattr(Match, "step", broken)
    flags = "--env-id Match-v0 --max-episode-steps 10 --total-timesteps 4000".split()
    message = mistake(capsys, *TINY, *flags, "--output-dir", str(tmp_path), "--run-name", "a")
    assert "--env-id Match-v0: an observation or a reward is not a finite number; fix the environment" in message


def test_a_whole_run_learns_what_can_be_learned_in_seconds(tmp_path, without_sets):
    flags = "--env-id Match-v0 --max-episode-steps 10 --total-timesteps 4000 --num-envs 8"
    flags += " --learning-starts 500 --updates-per-step 0.2 --hidden-size 32 --batch-size 64"
    flags += " --learning-rate 3e-3 --gamma 0.5 --eval-interval 4000"
    run(tmp_path, "a", *flags.split())
    # an action of 0 would have -10 / 3
    assert float(rows_of(tmp_path / "a")[-1]["eval/return_mean"]) > -0.3


def test_runs_alone_with_weights_and_biases(tmp_path):
    """A copied file is complete: no sibling, no package."""
    (tmp_path / "collect_expert_sac.py").write_text((ROOT / "collect_expert_sac.py").read_text())
    flags = "--total-timesteps 3200 --max-episode-steps 20 --run-name alone --track".split()
    env = {"WANDB_MODE": "offline", "PATH": "", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    command = [sys.executable, "collect_expert_sac.py", *TINY, *flags]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "sets/deterministic" in result.stdout
    assert list((tmp_path / "runs/wandb").glob("offline-run-*"))


# Users' mistakes


def mistake(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit_info:
        c.main([*argv])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["train", "--num-envs", "0"], "--num-envs"),
        (["train", "--tau", "2"], "--tau"),
        (["train", "--learning-starts", "10"], "--learning-starts is 10, expected"),
        (["train", "--learning-starts", "5000000"], "--learning-starts"),
        (["train", "--env-id", "Nothing-v0"], "--env-id"),
        (["train", "--env-id", "CartPole-v1"], "are Discrete(2), and SAC's are numbers with bounds"),
        (["train", "--resume", "nowhere.pt"], "--resume"),
        (["train", "--resume", "nowhere.pt", "--seed", "2"], "--resume"),
        (["collect", "--expert", "nowhere.pt"], "--expert"),
        (["collect", "--episodes", "0"], "--episodes"),
        (["train", "--seed", "99999999999999999999"], "--seed"),
        (["collect", "--seed", "99999999999999999999"], "--seed"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    assert named in mistake(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_actions_without_bounds_are_refused(tmp_path, monkeypatch, capsys):
    class Boundless(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (3,))
        action_space = gym.spaces.Box(-np.inf, np.inf, (1,))

    gym.register("BoundlessForSAC-v0", Boundless)
    monkeypatch.chdir(tmp_path)
    message = mistake(capsys, "train", "--env-id", "BoundlessForSAC-v0")
    assert "Box(-inf, inf, (1,), float32), and SAC's are numbers with bounds" in message
    assert not list(tmp_path.iterdir())


def test_files_of_another_kind_or_version_are_refused(tmp_path, capsys):
    args = vars(c.Args()) | {"lr": 1.0}
    torch.save({"kind": "collect_expert_sac checkpoint", "args": args}, tmp_path / "old.pt")
    assert "another version" in mistake(capsys, "train", "--resume", str(tmp_path / "old.pt"))
    policy = a_policy_file(tmp_path / "policy.pt")
    assert "it is a collect_expert_sac policy" in mistake(capsys, "train", "--resume", policy)
    message = mistake(capsys, "collect", "--expert", str(tmp_path / "old.pt"))
    assert "expected a collect_expert_sac policy" in message


@pytest.mark.parametrize("flag", ["--anneal-lr=False", "--no-anneal-lr", "--anneal_lr=False"])
def test_booleans_as_a_sweep_agent_writes_them(flag):
    assert c.parse_args(["train", flag]).anneal_lr is False


def test_a_run_is_as_long_as_its_last_row_though_nothing_was_evaluated(tmp_path):
    returns = {name: np.ones(3) for name in ("expert", *c.NOISE_LEVELS)}
    summary = c.report(returns, [{"global_step": 4800}], 2.0, c.Args(), tmp_path)
    assert summary["env_steps"] == 4800 and summary["charts/SPS"] == 2400 and "best/step" not in summary
    rows = [{"global_step": 3200, "eval/return_mean": 5.0}, {"global_step": 4800}]
    summary = c.report(returns, rows, 2.0, c.Args(), tmp_path)
    assert (summary["env_steps"], summary["best/step"]) == (4800, 3200)
