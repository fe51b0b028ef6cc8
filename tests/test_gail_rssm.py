"""gail_rssm.py: world model, imagination and replay against closed forms and slow versions; then whole runs.

Functions that are copies of gail_ppo.py's are tested there (test_copies.py keeps them copies).
"""

import copy
import csv
import json
import math
import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import DEMOS, make_demo_fields
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import gail_rssm as r

SMALL = "--deter-size 16 --stoch-size 4 --model-hidden-size 16 --hidden-size 16 --disc-hidden-size 16"
TINY = f"{SMALL} --total-timesteps 2000 --learning-starts 500 --num-steps 100 --updates 2 --eval-episodes 2".split()
TINY += "--batch-size 8 --sequence-length 8 --num-starts 16 --horizon 3 --disc-batch-size 16 --threads 1".split()
TINY += "--eval-interval 500 --checkpoint-interval 500".split()


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**replaced) -> r.Args:
    small = dict(deter_size=5, stoch_size=3, model_hidden_size=8, hidden_size=8, horizon=4)
    return r.Args(**(small | dict(num_starts=6, batch_size=4, sequence_length=7) | replaced))


def make_agent(args=None, obs_dim=4, action_dim=2, seed=0) -> r.RSSMAgent:
    torch.manual_seed(seed)
    obs = np.random.default_rng(seed).normal(size=(50, obs_dim))
    return r.RSSMAgent(
        {"obs": obs, "low": -2 * np.ones(action_dim), "high": 2 * np.ones(action_dim)}, args or settings()
    )


def make_batch(count=4, length=7, obs_dim=4, action_dim=2, seed=0) -> dict:
    shape, generator = (count, length), seeded(seed)
    batch = {"obs": torch.randn(*shape, obs_dim, generator=generator)}
    batch["action"] = 2 * torch.rand(*shape, action_dim, generator=generator) - 1
    return batch | {"terminated": torch.zeros(shape, dtype=torch.bool), "inside": torch.ones(shape, dtype=torch.bool)}


def weights_of(*modules) -> list:
    return [x.detach().clone() for module in modules for x in module.parameters()]


def same(before: list, *modules) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(before, weights_of(*modules))]


# Closed forms


def test_gaussian_sample_and_kl_are_those_of_torch():
    p, q = torch.randn(2, 5, 6, generator=seeded())
    normals = [Normal(*r.gaussian(x)) for x in (p, q)]
    torch.testing.assert_close(r.kl_divergence(p, q), kl_divergence(*normals).sum(-1))
    mean, std = r.gaussian(p)
    assert r.gaussian(torch.zeros(1, 2))[1].item() == pytest.approx(1.05, abs=0.01)
    assert (r.gaussian(torch.full((1, 2), -1e3))[1] == r.STD_MIN).all()
    assert torch.equal(r.sample_gaussian(mean, std, None), mean)
    drawn = r.sample_gaussian(mean[0].expand(20000, -1), std[0].expand(20000, -1), seeded())
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(0), std[0], atol=0.05, rtol=0)


def test_samples_pass_gradients_to_mean_and_deviation():
    mean, std = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    noise = torch.randn(3, generator=seeded())
    r.sample_gaussian(mean, std, seeded()).sum().backward()
    assert torch.equal(mean.grad, torch.ones(3)) and torch.equal(std.grad, noise)


def test_log_probability_of_a_squashed_action_is_that_of_torch():
    mean, std = torch.randn(50, 3, generator=seeded()), torch.rand(50, 3, generator=seeded(1)) + 0.05
    u = r.sample_gaussian(mean, std, seeded(2))
    expected = TransformedDistribution(Normal(mean, std), TanhTransform(cache_size=1)).log_prob(torch.tanh(u))
    torch.testing.assert_close(r.tanh_gaussian_log_prob(u, mean, std), expected.sum(-1), rtol=1e-3, atol=1e-3)
    assert r.tanh_gaussian_log_prob(torch.tensor([[40.0]]), torch.zeros(1, 1), torch.ones(1, 1)).isfinite()


def test_actions_of_the_policy_have_the_log_probability_that_it_says():
    """The density of a one-dimensional action, by counting draws."""
    torch.manual_seed(0)
    actor, state = r.Actor(3, 1, 8), torch.randn(1, 3)
    actions, log_prob = actor(state.expand(200000, -1), seeded())
    near = (actions.squeeze(-1) - 0.2).abs() < 0.02
    assert near.float().mean().item() / 0.04 == pytest.approx(log_prob[near].exp().mean().item(), rel=0.03)
    middle, _ = actor(state, None)
    assert actions.quantile(0.5).item() == pytest.approx(middle.item(), abs=0.01)
    assert actions.abs().max() <= 1


def test_balanced_kl_draws_at_each_side_with_its_own_force():
    posterior, prior = (x.requires_grad_(True) for x in torch.randn(2, 3, 5, 6, generator=seeded()))
    weight = torch.rand(3, 5, generator=seeded())
    weight = weight / weight.sum()
    (weight * r.kl_divergence(posterior, prior)).sum().backward()
    plain = [posterior.grad.clone(), prior.grad.clone()]
    for free_nats, pulls in ((0.0, True), (1e6, False)):
        posterior.grad = prior.grad = None
        args = settings(dynamics_coef=0.5, representation_coef=0.1, free_nats=free_nats)
        loss, kl = r.balanced_kl(posterior, prior, weight, args)
        loss.backward()
        torch.testing.assert_close(posterior.grad, 0.1 * plain[0] * pulls)
        torch.testing.assert_close(prior.grad, 0.5 * plain[1] * pulls)
    assert loss.item() == pytest.approx(0.6e6)
    assert kl == pytest.approx((weight * r.kl_divergence(posterior, prior)).sum().item())


def slow_lambda_return(t, rewards, values, continues, absorbing, gamma, lam):
    """The mixture of n-step returns, each spelled out: (1 - lam) lam^(n - 1) of every n but the last."""
    horizon, total = len(rewards), 0.0
    for n in range(1, horizon - t + 1):
        n_step, alive = 0.0, 1.0
        for k in range(n):
            n_step += gamma**k * alive * rewards[t + k]
            n_step += gamma ** (k + 1) * alive * (1 - continues[t + k]) * absorbing
            alive *= continues[t + k]
        n_step += gamma**n * alive * values[t + n - 1]
        total += n_step * (lam ** (n - 1) if n == horizon - t else (1 - lam) * lam ** (n - 1))
    return total


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("ends", ["never", "early", "perhaps"])
def test_lambda_returns_equal_the_mixture_of_n_step_returns(ends, lam):
    rewards, values = torch.randn(2, 6, 3, dtype=torch.float64, generator=seeded())
    continues = torch.ones_like(rewards)
    if ends == "early":
        continues[2, 1] = continues[0, 2] = 0
    if ends == "perhaps":
        continues = torch.rand(continues.shape, dtype=torch.float64, generator=seeded())
    returns = r.lambda_returns(rewards, values, continues, -3.0, 0.9, lam)
    for t in range(6):
        for i in range(3):
            columns = (rewards[:, i], values[:, i], continues[:, i])
            assert returns[t, i].item() == pytest.approx(slow_lambda_return(t, *columns, -3.0, 0.9, lam).item())


def test_lambda_returns_pass_gradients_to_earlier_steps_alone():
    rewards = torch.zeros(5, 1, requires_grad=True)
    returns = r.lambda_returns(rewards, torch.zeros(5, 1), torch.ones(5, 1), 0.0, 0.5, 1.0)
    returns[2].sum().backward()
    torch.testing.assert_close(rewards.grad[:, 0], torch.tensor([0, 0, 1, 0.5, 0.25]))


def test_transitions_say_where_a_step_led_and_how_far():
    obs = torch.arange(10.0).square().view(5, 1, 2)
    expected = torch.cat([obs[1:], obs[1:] - obs[:-1]], -1)
    assert torch.equal(r.transitions(obs), expected) and r.transitions(obs).shape == (4, 1, 4)


# World model


def test_posterior_does_not_depend_on_what_comes_later():
    model, batch = make_agent().model, make_batch()
    later = {name: x.clone() for name, x in batch.items()}
    later["obs"][:, 4:] += 1
    later["action"][:, 5:] *= -1
    states, posterior, prior = model.observe(batch["obs"], batch["action"], seeded())
    for one, other in zip((states, posterior, prior), model.observe(later["obs"], later["action"], seeded())):
        assert torch.equal(one[:, :4], other[:, :4])
        assert not torch.equal(one[:, 5:], other[:, 5:])
    assert torch.equal(states[:, 4, :5], model.observe(later["obs"], later["action"], seeded())[0][:, 4, :5])


def gru_by_hand(cell, x, h):
    """Cho et al. 2014, as PyTorch has it."""
    xs, hs = x @ cell.weight_ih.T + cell.bias_ih, h @ cell.weight_hh.T + cell.bias_hh
    (xr, xz, xn), (hr, hz, hn) = xs.chunk(3, -1), hs.chunk(3, -1)
    z = torch.sigmoid(xz + hz)
    return (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h


def test_imagination_is_the_prior_step_by_step():
    """S rollouts of H steps, by hand, with the same draws in the same order."""
    args = settings()
    agent, batch = make_agent(args), make_batch()
    states, _, _ = agent.model.observe(batch["obs"], batch["action"], seeded())
    starts = states.detach().reshape(-1, 8)
    imagined = r.imagine(agent, starts, args, seeded(3))
    generator, model, alive = seeded(3), agent.model, torch.ones(6)
    state = starts[torch.randperm(len(starts), generator=generator)[:6]]
    assert imagined["states"].shape == (5, 6, 8) and imagined["log_prob"].shape == (4, 6)
    torch.testing.assert_close(imagined["states"][0], state)
    for t in range(4):
        mean, raw = agent.actor.net(state).chunk(2, -1)
        mean, std = 3 * torch.tanh(mean / 3), torch.sigmoid(raw) + 0.05
        u = mean + std * torch.randn(6, 2, generator=generator)
        distribution = TransformedDistribution(Normal(mean, std), TanhTransform(cache_size=1))
        log_prob = distribution.log_prob(torch.tanh(u)).sum(-1)
        h = gru_by_hand(model.gru, model.gru_input(torch.cat([state[:, 5:], torch.tanh(u)], -1)), state[:, :5])
        mean, std = r.gaussian(model.prior(h))
        state = torch.cat([h, mean + std * torch.randn(6, 3, generator=generator)], -1)
        torch.testing.assert_close(imagined["states"][t + 1], state)
        torch.testing.assert_close(imagined["log_prob"][t], log_prob, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(imagined["alive"][t], alive)
        continues = 1 - torch.sigmoid(model.end(state)).squeeze(-1)
        torch.testing.assert_close(imagined["continues"][t], continues)
        alive = alive * continues
    torch.testing.assert_close(imagined["obs"][-1], model.decoder(state))


def test_padding_does_not_count_in_the_model_loss():
    args, logs = settings(), []
    for filler in (0.0, 5.0):
        agent, batch = make_agent(args), make_batch()
        batch["inside"][0, 3:] = batch["inside"][2, 5:] = False
        batch["obs"][~batch["inside"]] = filler
        optimizer = torch.optim.SGD(agent.model.parameters(), 0.1)
        r.update_model(agent.model, optimizer, batch, args, seeded())
        logs.append(weights_of(agent.model))
    assert all(torch.equal(x, y) for x, y in zip(*logs))


def test_the_model_loss_is_what_its_parts_are_on_what_is_inside():
    args = settings(free_nats=0.0)
    agent, batch = make_agent(args), make_batch()
    batch["inside"][0, 3:] = batch["inside"][2, 5:] = False
    batch["terminated"][0, 2:] = True
    states, posterior, prior = agent.model.observe(batch["obs"], batch["action"], seeded())
    inside = batch["inside"]
    error = (agent.model.decoder(states) - batch["obs"]).square()[inside].mean()
    kl = kl_divergence(Normal(*r.gaussian(posterior)), Normal(*r.gaussian(prior))).sum(-1)[inside].mean()
    ended = torch.sigmoid(agent.model.end(states)).squeeze(-1)[inside]
    end = torch.where(batch["terminated"][inside], -ended.log(), -(1 - ended).log()).mean()
    optimizer = torch.optim.SGD(agent.model.parameters(), 0.1)
    _, log = r.update_model(agent.model, optimizer, batch, args, seeded())
    assert log["model/reconstruction"] == pytest.approx(error.item(), rel=1e-4)
    assert log["model/kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert log["model/end"] == pytest.approx(end.item(), rel=1e-4)
    assert log["model/loss"] == pytest.approx((25 * 4 * error + 0.6 * kl + end).item(), rel=1e-4)


def test_linear_dynamics_are_learned():
    """x' = R x + B a, R a turn by 30 degrees: after five observed steps the model foretells ten with a tenth of the
    error of "it stays where it is"."""
    torch.manual_seed(0)
    args = settings(deter_size=32, stoch_size=8, model_hidden_size=48)
    model = make_agent(args).model = r.WorldModel(2, 1, args)
    turn = torch.tensor(
        [[math.cos(math.pi / 6), -math.sin(math.pi / 6)], [math.sin(math.pi / 6), math.cos(math.pi / 6)]]
    )

    def play(count, length, generator):
        x, action = torch.randn(count, 2, generator=generator), torch.zeros(count, 1)
        obs, actions = [x], [action]
        for _ in range(length - 1):
            action = 2 * torch.rand(count, 1, generator=generator) - 1
            x = x @ turn.T + action @ torch.tensor([[0.3, -0.2]])
            obs.append(x)
            actions.append(action)
        return torch.stack(obs, 1), torch.stack(actions, 1)

    generator, optimizer = seeded(), torch.optim.Adam(model.parameters(), 3e-3)
    for i in range(400):
        obs, actions = play(32, 12, generator)
        inside = torch.ones(32, 12, dtype=torch.bool)
        batch = {"obs": obs, "action": actions, "terminated": ~inside, "inside": inside}
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - i / 400)
        _, log = r.update_model(model, optimizer, batch, args, generator)
    assert log["model/reconstruction"] < 0.01
    obs, actions = play(200, 15, seeded(1))
    with torch.no_grad():
        state = model.observe(obs[:, :5], actions[:, :5], None)[0][:, -1]
        for t in range(5, 15):
            state = model.prior_step(state, actions[:, t], None)
    error = (model.decoder(state) - obs[:, -1]).square().mean()
    assert error < 0.1 * (obs[:, 4] - obs[:, -1]).square().mean()


# Replay


def numbered(lengths, args):
    """A replay of episodes whose observations say (episode, step), and its batch."""
    replay = r.replay_rows(torch.zeros(0, 3), 1, False)
    for i, length in enumerate(lengths):
        steps = torch.arange(length + 1.0)
        rows = torch.stack([torch.full_like(steps, i), steps, 100 * i + steps], 1)
        for name, x in r.replay_rows(rows, 1, i % 2 == 1).items():
            replay[name] = torch.cat([replay[name], x])
    return replay, r.draw_sequences(replay, args, seeded())


def test_windows_are_of_one_episode_in_order():
    lengths = [20, 3, 9, 40, 1]
    replay, batch = numbered(lengths, settings(batch_size=4000, recent_share=0.0))
    episode, step = batch["obs"].unbind(-1)
    assert len(replay["obs"]) == sum(lengths) + 5
    assert (episode == episode[:, :1]).all()
    last = torch.tensor(lengths)[episode.long()]
    expected = torch.minimum(step[:, :1] + torch.arange(7), last)
    assert torch.equal(step, expected)
    assert torch.equal(batch["inside"], step[:, :1] + torch.arange(7) <= last)
    assert torch.equal(batch["action"].squeeze(-1), 100 * episode + step)
    assert torch.equal(batch["terminated"], (step == last) & (episode % 2 == 1))
    seen = {(int(e), int(s)) for e, s in batch["obs"][batch["inside"]].tolist()}
    assert seen == {(e, s) for e, length in enumerate(lengths) for s in range(length + 1)}
    assert all((step[:, 0] == 0) | batch["inside"].all(1))  # short ones are seen whole
    warm = (torch.arange(7) >= r.BURN_IN) | (step[:, :1] == 0)  # h is as long as it gets
    assert torch.equal(batch["starts"], batch["inside"] & ~batch["terminated"] & warm)
    started = {(int(e), int(s)) for e, s in batch["obs"][batch["starts"]].tolist()}
    assert started == {(e, s) for e, length in enumerate(lengths) for s in range(length + 1 - e % 2)}


def test_every_step_is_about_as_likely_as_another():
    _, batch = numbered([200], settings(batch_size=40000, recent_share=0.0))
    times = torch.bincount(batch["obs"][..., 1].flatten().long(), minlength=201) / 40000 / 7 * 201
    assert times[7:-7].min() > 0.8 and times[7:-7].max() < 1.2 and times.min() > 0.05 and times.max() < 2.5


def test_a_share_of_the_windows_is_recent():
    _, batch = numbered([50] * 10, settings(batch_size=4000, recent_share=0.3, recent_steps=102))
    recent = (batch["obs"][:, 0, 0] >= 8).float().mean()
    assert recent.item() == pytest.approx(0.3 + 0.7 * 0.2, abs=0.03)


def test_visits_of_all_episodes():
    replay, _ = numbered([20, 3, 9, 4], settings())
    assert r.count_visits(replay, 50).tolist() == [36, (50 - 3) + (50 - 4)]


class Counter:
    """Two environments whose observations count; the first ends a task every 3 steps, the other has 5 in all."""

    spec = SimpleNamespace(id="Counter")

    def __init__(self):
        self.at, self.actions = np.array([0.0, 100.0]), []

    def step(self, actions):
        self.at += 1
        self.actions.append(actions.copy())
        final, terminated = self.at[:, None].copy(), np.array([self.at[0] % 10 == 3, False])
        truncated = np.array([False, self.at[1] % 10 == 5])
        self.at = np.where(terminated | truncated, self.at // 10 * 10 + 10, self.at)
        return self.at[:, None].copy(), np.array([1.0, 2.0]), terminated, truncated, {"final_obs": final}


def test_collected_episodes_are_what_happened():
    torch.manual_seed(0)
    demos = {"obs": np.array([[-1.0], [1.0]]), "low": np.array([-2.0]), "high": np.array([4.0])}
    agent, envs = r.RSSMAgent(demos, settings()), Counter()
    replay, generator = r.replay_rows(torch.zeros(0, 2), 1, False), seeded()
    agent.standardize.std *= 1000  # nothing is clipped
    episodes = {"obs": torch.tensor([[0.0], [100.0]], dtype=torch.float64), "carry": agent.initial_carry(2)}
    episodes |= {"return": [0.0, 0.0], "rows": [[], []]}
    logs = [r.collect_episodes(envs, agent, episodes, replay, 4, generator) for _ in range(2)]
    size, actions = len(replay["obs"]), np.stack(envs.actions)[..., 0]
    assert size == 4 + 6 + 4 and logs == [{"charts/episodic_return": 3.0}, {"charts/episodic_return": 6.5}]
    obs = 1000 * replay["obs"][:size, 0]
    torch.testing.assert_close(obs, torch.tensor([0.0, 1, 2, 3, 100, 101, 102, 103, 104, 105, 10, 11, 12, 13]))
    done = replay["action"][:size, 0] * 3 + 1  # in the environment's units
    expected = [1, *actions[:3, 0], 1, *actions[:5, 1], 1, *actions[3:6, 0]]
    torch.testing.assert_close(done, torch.tensor(expected, dtype=torch.float32))
    assert replay["terminated"][:size].nonzero().flatten().tolist() == [3, 13]
    assert r.count_visits(replay, 5).tolist() == [3 + 5 + 3, 2 + 2]
    assert [len(rows) for rows in episodes["rows"]] == [2, 3]


def test_the_agent_forgets_when_an_episode_ends():
    """What it does in a new episode is what a fresh memory would do."""
    torch.manual_seed(0)
    demos = {"obs": np.array([[-1.0], [1.0]]), "low": np.array([-2.0]), "high": np.array([4.0])}
    agent, envs = r.RSSMAgent(demos, settings()), Counter()
    replay = r.replay_rows(torch.zeros(0, 2), 1, False)
    agent.standardize.std *= 1000
    episodes = {"obs": torch.tensor([[0.0], [100.0]], dtype=torch.float64), "carry": agent.initial_carry(2)}
    episodes |= {"return": [0.0, 0.0], "rows": [[], []]}
    r.collect_episodes(envs, agent, episodes, replay, 3, seeded())  # ends the first one's
    assert episodes["return"] == [0.0, 6.0] and [len(rows) for rows in episodes["rows"]] == [0, 3]
    fresh = agent.initial_carry(2)
    one, other = agent.act(episodes["obs"], episodes["carry"]), agent.act(episodes["obs"], fresh)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert not np.allclose(one[1], other[1], rtol=1e-5)


def test_acting_is_observing_step_by_step():
    agent, obs = make_agent(), np.random.default_rng(0).normal(size=(6, 3, 4))
    memory, executed, actions = agent.initial_carry(3), [], [torch.zeros(3, 2)]
    for x in obs:
        executed.append(agent.act(x, memory))
        actions.append(memory["action"])
    x = agent.standardize(torch.from_numpy(obs)).transpose(0, 1)
    states, _, _ = agent.model.observe(x, torch.stack(actions[:-1], 1), None)
    torch.testing.assert_close(states[:, -1], memory["state"])
    np.testing.assert_allclose(executed[-1], 2 * agent.actor(states[:, -1], None)[0].detach(), rtol=1e-4)


def test_the_target_follows_the_critic_by_a_share_of_the_way():
    args, critic = settings(), r.Critic(8, 8)
    target_critic, agent = copy.deepcopy(critic), make_agent(args)
    with torch.no_grad():
        for x in critic.parameters():
            x.normal_(generator=seeded())
    before, fast = weights_of(target_critic), weights_of(critic)
    imagined = r.imagine(agent, torch.zeros(6, 8), args, seeded())
    rewards, scales = {"steps": torch.zeros(4, 6), "absorbing": 0.0}, {"return": 1.0}
    nets = {"actor": agent.actor, "critic": critic}
    optimizers = {name: torch.optim.SGD(net.parameters(), 0.0) for name, net in nets.items()}
    r.update_actor_critic(critic, target_critic, optimizers, imagined, rewards, scales, args)
    for old, new, goal in zip(before, weights_of(target_critic), fast):
        torch.testing.assert_close(new, 0.98 * old + 0.02 * goal)


# Steps


def test_each_step_changes_its_own_network_alone():
    args = settings(disc_batch_size=16)
    agent, batch, generator = make_agent(args), make_batch(), seeded()
    critic, disc = r.Critic(8, 8), r.TransitionDiscriminator(8, 8)
    slow = copy.deepcopy(critic)
    nets = {"model": agent.model, "actor": agent.actor, "critic": critic, "slow": slow, "disc": disc}
    optimizers = {
        name: torch.optim.Adam(nets[name].parameters(), 1e-2) for name in ("model", "actor", "critic", "disc")
    }
    counts, scales = (
        {"expert": torch.tensor([100, 0]), "policy": torch.tensor([100, 0])},
        {"reward": 1.0, "return": 1.0},
    )
    seen = {}

    def changed(name, step):
        before = {key: weights_of(net) for key, net in nets.items()}
        for net in nets.values():
            net.zero_grad()
        result = step()
        seen[name] = {key for key, net in nets.items() if not all(same(before[key], net))}
        touched = {key for key, net in nets.items() if any(x.grad is not None for x in net.parameters())}
        assert touched <= seen[name]
        return result

    states, _ = changed("model", lambda: r.update_model(agent.model, optimizers["model"], batch, args, generator))
    imagined = changed("imagine", lambda: r.imagine(agent, states.flatten(0, 1), args, generator))
    expert = torch.randn(30, 8, generator=generator)
    seen_by_d = (expert, imagined, args, generator)
    changed("disc", lambda: r.update_transition_discriminator(disc, optimizers["disc"], *seen_by_d))
    rewards, _ = changed("reward", lambda: r.compute_imagined_rewards(imagined, batch, disc, counts, scales))
    changed("policy", lambda: r.update_actor_critic(critic, slow, optimizers, imagined, rewards, scales, args))
    own = {
        "model": {"model"},
        "imagine": set(),
        "disc": {"disc"},
        "reward": set(),
        "policy": {"actor", "critic", "slow"},
    }
    assert seen == own


def test_the_policy_climbs_the_gradient_through_model_and_discriminator():
    """Its gradient equals that of finite differences of the imagined return, with the same noise."""
    args = settings(horizon=3, ent_coef=0.01, gamma=0.9)
    agent, batch, critic, disc = make_agent(args).double(), make_batch(), r.Critic(8, 8).double(), None
    torch.manual_seed(1)
    disc = r.TransitionDiscriminator(8, 8).double()
    torch.nn.init.normal_(critic.net[-1].weight)
    target_critic = copy.deepcopy(critic)
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    states = agent.model.observe(batch["obs"], batch["action"], None)[0].detach()
    visits = {"expert": torch.tensor([100, 0]), "policy": torch.tensor([100, 0])}
    weight = agent.actor.net[-1].weight

    def loss_of(scales):
        imagined = r.imagine(agent, states.flatten(0, 1), args, seeded())
        reward = torch.nn.functional.softplus(
            disc(r.transitions(imagined["obs"])) + r.terminal_logits(*visits.values())[0]
        )
        returns = r.lambda_returns(
            (reward - scales["mean"]) / scales["std"],
            target_critic(imagined["states"][1:]),
            imagined["continues"],
            scales["absorbing"] / 0.1,
            0.9,
            args.gae_lambda,
        )
        alive = torch.ones(3, 6, dtype=torch.float64)
        alive[1:] = scales["continues"][:-1].cumprod(0)
        return -(alive * (returns / scales["range"] - 0.01 * imagined["log_prob"])).mean().item()

    imagined = r.imagine(agent, states.flatten(0, 1), args, seeded())
    scales = {"reward": 1.0, "return": 30.0}
    rewards, log = r.compute_imagined_rewards(imagined, batch, disc, visits, scales)
    fixed = {"mean": log["reward/gail_mean"], "std": scales["reward"], "absorbing": rewards["absorbing"]}
    optimizers = {"actor": torch.optim.SGD([weight], 0.0), "critic": torch.optim.SGD(critic.net.parameters(), 0.0)}
    log = r.update_actor_critic(critic, target_critic, optimizers, imagined, rewards, scales, args)
    fixed |= {"range": scales["return"], "continues": imagined["continues"].detach()}
    assert log["losses/policy_loss"] == pytest.approx(loss_of(fixed), rel=1e-6)
    for i, j in ((0, 0), (1, 5), (3, 2)):
        with torch.no_grad():
            weight[i, j] += 1e-5
            up = loss_of(fixed)
            weight[i, j] -= 2e-5
            down = loss_of(fixed)
            weight[i, j] += 1e-5
        assert weight.grad[i, j].item() == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-9)


def test_a_step_of_the_value_equals_a_plain_one():
    """It goes towards lambda-returns in which the slow critic tells what comes after; steps after an end do not count;
    the range of returns is from the 5th to the 95th percentile."""
    args, generator = settings(gamma=0.9, gae_lambda=0.7), seeded(1)
    agent, batch, critic = make_agent(args), make_batch(), r.Critic(8, 8)
    slow = copy.deepcopy(critic)
    for x in (*critic.parameters(), *slow.parameters()):
        x.data.normal_(generator=generator)  # each its own
    states = agent.model.observe(batch["obs"], batch["action"], None)[0].detach()
    imagined = r.imagine(agent, states.flatten(0, 1), args, seeded())
    imagined["alive"] = torch.rand(4, 6, generator=generator)
    rewards, scales = {"steps": 9 * torch.randn(4, 6, generator=generator), "absorbing": 0.3}, {"return": 2.0}
    other, seen = copy.deepcopy([critic, slow]), imagined["states"].detach()
    optimizers = {
        "actor": torch.optim.SGD(agent.actor.parameters(), 0.0),
        "critic": torch.optim.SGD(critic.net.parameters(), 0.1),
    }
    log = r.update_actor_critic(critic, slow, optimizers, imagined, rewards, scales, args)
    with torch.no_grad():
        ahead, returns = other[1](seen[-1]), []
        for t in (3, 2, 1, 0):  # Sutton & Barto 2018, equation 12.20
            after = other[1](seen[t + 1])
            ahead = torch.lerp(after, ahead, 0.7) if t < 3 else after
            going_on = imagined["continues"][t]
            ahead = rewards["steps"][t] + 0.9 * (going_on * ahead + (1 - going_on) * 0.3 / (1 - 0.9))
            returns.insert(0, ahead)
        returns = torch.stack(returns)
    value = other[0](seen[:-1])
    loss = (imagined["alive"] * (value - returns).square()).mean()
    loss.backward()
    assert log["losses/value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["losses/return"] == pytest.approx(returns.mean().item(), rel=1e-5)
    assert log["losses/value"] == pytest.approx(value.mean().item(), rel=1e-5)
    norm = torch.stack([x.grad.square().sum() for x in other[0].parameters()]).sum().sqrt()
    assert norm > 10
    for x, y in zip(critic.parameters(), other[0].parameters()):
        torch.testing.assert_close(x, y - 0.1 * y.grad * 10 / norm, rtol=1e-4, atol=1e-6)
    low, high = np.quantile(returns, (0.05, 0.95))
    assert scales["return"] == pytest.approx(0.99 * 2 + 0.01 * (high - low), rel=1e-5)


def test_two_steps_of_the_discriminator_equal_plain_ones():
    """Noise on both sides, what comes after an end left out, and the penalty between the two."""
    torch.manual_seed(0)
    one, obs = r.TransitionDiscriminator(6, 8), torch.randn(5, 7, 3, generator=seeded(1))
    other, expert, alive = copy.deepcopy(one), torch.randn(30, 6, generator=seeded(2)), torch.ones(4, 7)
    alive[2:, :3] = 0.1
    args = settings(disc_steps=2, disc_batch_size=16, grad_penalty_coef=0.5)
    imagined, optimizer = {"obs": obs, "alive": alive}, torch.optim.SGD(one.parameters(), 0.1)
    log = r.update_transition_discriminator(one, optimizer, expert, imagined, args, seeded(3))
    policy = torch.stack([torch.cat([obs[t + 1, i], obs[t + 1, i] - obs[t, i]])
                          for t in range(4) for i in range(7) if t < 2 or i > 2])  # fmt: skip
    optimizer, generator = torch.optim.SGD(other.parameters(), 0.1), seeded(3)
    for _ in range(2):
        x, y = (side[torch.randint(len(side), (16,), generator=generator)] for side in (expert, policy))
        noise = 0.1 * torch.randn(2, 16, 6, generator=generator)
        x, y = x + noise[0], y + noise[1]
        between = (y + torch.rand(16, 1, generator=generator) * (x - y)).requires_grad_(True)
        (grad,) = torch.autograd.grad(other(between).sum(), between, create_graph=True)
        penalty = ((grad.square().sum(1).sqrt() - 1) ** 2).mean()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(other(x), torch.ones(16))
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(other(y), torch.zeros(16))
        optimizer.zero_grad()
        (loss + 0.5 * penalty).backward()
        optimizer.step()
    for a, b in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)
    assert log["disc/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["disc/grad_penalty"] == pytest.approx(penalty.item(), rel=1e-4)


def test_rewards_are_softplus_of_the_logit_in_units_of_a_running_deviation():
    args = settings()
    agent, batch, disc = make_agent(args), make_batch(), r.TransitionDiscriminator(8, 8)
    batch["inside"][0, 3:] = False
    states = agent.model.observe(batch["obs"], batch["action"], None)[0].detach()
    imagined = r.imagine(agent, states.flatten(0, 1), args, seeded())
    counts = {"expert": torch.tensor([80, 20]), "policy": torch.tensor([50, 50])}
    scales = {"reward": 2.0}
    imagined["alive"][2:, 1] = 0.1  # steps after an end do not count
    rewards, log = r.compute_imagined_rewards(imagined, batch, disc, counts, scales)
    offset, absorbing = r.terminal_logits(*counts.values())
    plain = -torch.log(1 - torch.sigmoid(disc(r.transitions(imagined["obs"])) + offset))
    counted = torch.cat([plain[:, :1].flatten(), plain[:2, 1], plain[:, 2:].flatten()])
    scale = 0.99 * 2.0 + 0.01 * counted.std(correction=0).item()
    assert scales["reward"] == pytest.approx(scale)
    torch.testing.assert_close(rewards["steps"], (plain - counted.mean()) / scale, rtol=1e-4, atol=1e-5)
    expected = (-torch.log(1 - torch.sigmoid(absorbing)) - counted.mean()) / scale
    assert rewards["absorbing"] == pytest.approx(expected.item(), rel=1e-4)
    obs = batch["obs"]
    real = [
        disc(torch.cat([obs[:, t + 1], obs[:, t + 1] - obs[:, t]], -1))[batch["inside"][:, t + 1]] for t in range(6)
    ]
    assert log["disc/replayed_prob"] == pytest.approx(torch.sigmoid(torch.cat(real)).mean().item(), rel=1e-5)
    real = -torch.log(1 - torch.sigmoid(torch.cat(real) + offset)).mean()
    assert log["reward/replayed_mean"] == pytest.approx(real.item(), rel=1e-5)


def test_discriminator_learns_to_tell_and_says_so():
    torch.manual_seed(0)
    disc, generator = r.TransitionDiscriminator(4, 32), seeded()
    optimizer = torch.optim.Adam(disc.parameters(), 1e-3)
    alive = torch.ones(4, 200)
    obs = torch.randn(5, 200, 2, generator=generator)  # of the policy; the expert's next ones are their negatives
    expert = r.transitions(torch.randn(2, 1000, 2, generator=generator) + torch.tensor([3.0, 0.0])).flatten(0, 1)
    args = settings(disc_steps=300, disc_batch_size=64, grad_penalty_coef=0.1)
    log = r.update_transition_discriminator(disc, optimizer, expert, {"obs": obs, "alive": alive}, args, generator)
    assert log["disc/expert_acc"] > 0.9 and log["disc/policy_acc"] > 0.9
    assert log["disc/expert_prob"] > 0.8 > 0.2 > log["disc/policy_prob"]


# Whole runs


def run(tmp_path, name, *flags) -> dict:
    """One in-process run; returns its summary."""
    base = [*TINY, "--output-dir", str(tmp_path), "--run-name", name]
    r.main([*base, *flags] if "--demos" in flags else [*base, "--demos", str(DEMOS), *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def rows_of(run_dir) -> list[dict]:
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows]


class Killed(Exception):
    pass


def kill_and_resume(tmp_path, monkeypatch, name, updates, *flags) -> None:
    """A run that dies in the policy's update after so many of them, and goes on."""
    calls, update = [], r.update_actor_critic

    def dying_update(*args):
        calls.append(None)
        if len(calls) == updates + 1:
            raise Killed
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(r, "update_actor_critic", dying_update)
        run(tmp_path, name, *flags)
    r.main(["--resume", str(tmp_path / name / "checkpoint.pt")])


@pytest.mark.parametrize("flags", [(), ("--num-steps", "30", "--num-envs", "4", "--checkpoint-interval", "700")])
def test_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, flags):
    """Replay included; the second one's checkpoint lies within episodes."""
    run(tmp_path, "whole", *flags)
    kill_and_resume(tmp_path, monkeypatch, "killed", 5, *flags)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    saved = [torch.load(tmp_path / f"{name}/checkpoint.pt", weights_only=True) for name in ("whole", "killed")]
    for part in ("agent", "critic", "disc", "replay"):
        assert all(torch.equal(saved[0][part][name], saved[1][part][name]) for name in saved[0][part])


@pytest.mark.parametrize("what", ["losses/value_loss", "weights"])
def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys, what):
    """Also if the last update ruins the weights, whose losses were computed before."""
    calls, update = [], r.update_actor_critic

    def diverging(critic, *args):
        calls.append(None)
        log = update(critic, *args)
        if len(calls) == 6 and what == "weights":  # the last one of the third rollout
            critic.net[-1].bias.data.fill_(math.nan)
        elif len(calls) == 6:
            log[what] = math.nan
        return log

    monkeypatch.setattr(r, "update_actor_critic", diverging)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "a")
    assert stopped.value.code == 2 and f"diverged at step 1500: {what} not finite" in capsys.readouterr().err
    assert len(torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["rows"]) == 2


def test_files_of_a_run(tmp_path, capsys):
    summary = run(tmp_path, "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "metrics.csv", "summary.json", "checkpoint.pt", "policy.pt", "curves.png"} | {
        "imagination.png",
        "evaluation.npz",
    }
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == [500, 1000, 1500, 2000]
    parts = "model/reconstruction model/kl disc/replayed_prob disc/policy_prob reward/gail_mean reward/replayed_mean"
    assert all(float(rows[-1][name]) >= 0 for name in parts.split())
    assert summary["env_steps"] == 2000 and summary["demos_return_mean"] > 600
    before = dict(np.load(tmp_path / "a/evaluation.npz"))
    capsys.readouterr()
    r.main(["--evaluate", str(tmp_path / "a/policy.pt"), "--eval-episodes", "2"])
    assert "mean action" in capsys.readouterr().out
    after = np.load(tmp_path / "a/policy.npz")
    assert all((before[name] == after[name]).all() for name in before)


def test_what_the_discriminator_takes_for_the_experts_never_spans_two_episodes(tmp_path, monkeypatch):
    seen, update = [], r.update_transition_discriminator

    def noting(disc, optimizer, expert, *rest):
        seen.append(expert)
        return update(disc, optimizer, expert, *rest)

    monkeypatch.setattr(r, "update_transition_discriminator", noting)
    fields = make_demo_fields((30, 20, 40))
    np.savez(tmp_path / "a.npz", **fields)
    run(tmp_path, "a", "--demos", str(tmp_path / "a.npz"), "--total-timesteps", "1000")
    ends = np.cumsum([31, 21, 41])
    final = np.isin(np.arange(93), ends - 1)
    mean, std = (getattr(fields["observations"][~final].astype(np.float64), x)(0) for x in ("mean", "std"))
    expected = []
    for episode in np.split((fields["observations"] - mean) / std, ends[:-1]):
        expected.append(np.concatenate([episode[1:], np.diff(episode, axis=0)], axis=1))
    np.testing.assert_allclose(seen[0].numpy(), np.concatenate(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length, gamma", [(20, 0.85), (40, 1 - 3 / 40), (500, 0.99)])
def test_the_horizon_follows_the_demonstrations(tmp_path, monkeypatch, length, gamma):
    def stop(script, args, wandb_id):
        assert args.gamma == pytest.approx(gamma)
        raise Killed

    fields = make_demo_fields((length,) * 2)
    fields["metadata"] = json.dumps({"env_id": "HalfCheetah-v4", "max_episode_steps": 500})
    np.savez(tmp_path / "a.npz", **fields)
    monkeypatch.setattr(r, "open_run", stop)
    with pytest.raises(Killed):
        r.train(r.Args(demos=str(tmp_path / "a.npz"), threads=1))


def test_step_sizes_and_the_number_of_updates_reach_their_optimizers(tmp_path):
    """All fall to zero but that of D."""
    run(tmp_path, "a", "--updates", "3", "--disc-steps", "2")
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    args, updates = saved["args"], 3 * 4  # in four rollouts
    own = {"model": args["model_learning_rate"], "actor": args["learning_rate"], "critic": args["learning_rate"]}
    for name, rate in own.items():
        optimizer = saved[f"{name}_optimizer"]
        assert [group["lr"] for group in optimizer["param_groups"]] == [pytest.approx(rate / 4)]
        assert {int(state["step"]) for state in optimizer["state"].values()} == {updates}
    assert saved["disc_optimizer"]["param_groups"][0]["lr"] == args["disc_learning_rate"]
    assert {int(state["step"]) for state in saved["disc_optimizer"]["state"].values()} == {2 * updates}


def test_evaluation_of_episodes_that_end_early_counts_each_step_once():
    """Against gymnasium, one episode after another, each with a memory of its own."""
    agent, limit, expected = make_agent(obs_dim=11, action_dim=3), {"env_id": "Hopper-v4", "max_episode_steps": 60}, []
    agent.actor.net[-1].weight.data.normal_(0, 0.05, generator=seeded())
    for i in range(5):
        env, rewards, ended, memory = gym.make("Hopper-v4", max_episode_steps=60), [], False, agent.initial_carry(1)
        obs, _ = env.reset(seed=7 + i)
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs[None], memory)[0])
            rewards.append(reward)
            ended = terminated or truncated
        expected.append(rewards)
    assert len({len(rewards) for rewards in expected}) > 1
    course = r.evaluate(agent, limit, 5, 7, 1)
    for i, rewards in enumerate(expected):
        np.testing.assert_allclose(course[: len(rewards), i], np.cumsum(rewards), rtol=1e-3)
        np.testing.assert_allclose(course[len(rewards) :, i], sum(rewards), rtol=1e-3)


def test_a_finished_run_goes_on_longer(tmp_path):
    run(tmp_path, "a")
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    with pytest.raises(r.UserError, match="has come that far"):
        r.train(r.parse_args(["--resume", checkpoint]))
    r.main(["--resume", checkpoint, "--total-timesteps=3000"])
    rows = rows_of(tmp_path / "a")
    assert [int(row["global_step"]) for row in rows] == list(range(500, 3001, 500))
    rates = [float(row["charts/learning_rate"]) for row in rows]  # the old schedule, then the new
    assert rates == pytest.approx([8e-4 * (1 - x) for x in (0, 1 / 4, 2 / 4, 3 / 4, 4 / 6, 5 / 6)])


def test_a_checkpoint_of_other_networks_leaves_a_finished_run_as_it_was(tmp_path):
    """Somebody copied the script, changed its networks and resumes with the copy."""
    run(tmp_path, "a")
    checkpoint = tmp_path / "a/checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    del saved["agent"]["model.end.0.weight"]
    torch.save(saved, checkpoint)
    before = {name: (tmp_path / "a" / name).read_text() for name in ("summary.json", "config.json")}
    with pytest.raises(RuntimeError, match="model.end.0.weight"):
        r.main(["--resume", str(checkpoint), "--total-timesteps", "3000"])
    assert before == {name: (tmp_path / "a" / name).read_text() for name in before}


def test_a_policy_keeps_all_settings_of_its_networks(tmp_path, monkeypatch, capsys):
    """Also those that a copy adds, or whose defaults it changes."""
    run(tmp_path, "a", "--stoch-size", "3")
    path = tmp_path / "a/policy.pt"
    saved = r.load_agent(str(path))[1]
    assert saved["args"] == json.loads((tmp_path / "a/config.json").read_text())
    assert saved["args"]["stoch_size"] == 3
    del saved["args"]["horizon"]
    former = {name: x for name, x in saved.items() if name != "args"} | {"shapes": {}}
    for other in (saved, former):
        torch.save(other, path)
        with pytest.raises(SystemExit) as stopped:
            r.main(["--evaluate", str(path)])
        assert stopped.value.code == 2 and "another version of this script wrote it" in capsys.readouterr().err


def test_an_optimizer_may_have_several_groups():
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [other], "lr": 0.5}], 0.1)
    r.optimizer_step(optimizer, (one + 2 * other).sum(), math.inf)
    assert torch.equal(one, torch.full((2,), 0.9)) and torch.equal(other, torch.full((2,), 0.0))


def test_actions_and_rewards_of_the_demonstrations_change_nothing(tmp_path):
    fields, rows = make_demo_fields((30, 20, 40)), []
    for name, change in (("with", {}), ("without", {"actions": None, "rewards": np.full(90, np.nan, np.float32)})):
        changed = {key: x for key, x in (fields | change).items() if x is not None}
        np.savez(tmp_path / f"{name}.npz", **changed)
        run(tmp_path, name, "--demos", str(tmp_path / f"{name}.npz"), "--total-timesteps", "1500")
        rows.append([{k: v for k, v in row.items() if "score" not in k} for row in rows_of(tmp_path / name)])
    assert rows[0] == rows[1]


def test_a_body_that_falls_trains_and_resumes_with_new_episodes(tmp_path, monkeypatch):
    fields = make_demo_fields((20, 30), obs_dim=11, action_dim=3, env_id="Hopper-v4")
    fields["terminated"], fields["truncated"] = np.ones(2, bool), np.zeros(2, bool)
    np.savez(tmp_path / "hopper.npz", **fields)
    flags = ["--env-id", "Hopper-v4", "--demos", str(tmp_path / "hopper.npz")]
    kill_and_resume(tmp_path, monkeypatch, "a", 5, *flags)
    assert [int(row["global_step"]) for row in rows_of(tmp_path / "a")] == [500, 1000, 1500, 2000]
    replay = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["replay"]
    ends = (replay["left"] == 0).nonzero().flatten()
    assert replay["terminated"][ends].float().mean() > 0.9  # all but those of the time limit
    assert replay["terminated"].sum() == replay["terminated"][ends].sum()
    assert torch.equal(ends[1:] - replay["step"][ends[1:]], ends[:-1] + 1)


def test_a_policy_acts_in_somebody_elses_program(tmp_path):
    run(tmp_path, "a", "--total-timesteps", "1000")
    agent, saved = r.load_agent(str(tmp_path / "a/policy.pt"))
    env, memory = gym.make(saved["env_id"], max_episode_steps=5), agent.initial_carry(1)
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        action = agent.act(obs[None], memory)[0]
        assert env.action_space.contains(action)
        obs, *_ = env.step(action)


def test_it_beats_a_random_policy_within_5000_steps(tmp_path):
    flags = "--total-timesteps 5000 --updates 7 --num-steps 20 --batch-size 16 --sequence-length 12".split()
    flags += "--num-starts 64 --deter-size 64 --stoch-size 16 --model-hidden-size 64 --hidden-size 64".split()
    flags += "--horizon 8 --model-learning-rate 2e-3 --learning-rate 1e-3 --no-anneal-lr --eval-episodes 20".split()
    flags += "--disc-batch-size 256 --disc-hidden-size 64 --eval-interval 1000".split()
    summary = run(tmp_path, "a", *flags)
    assert summary["best/return_mean"] > 10 > 0 > summary["random_return_mean"]


def test_what_is_saved_is_the_running_average_of_the_agents(tmp_path, monkeypatch):
    weights, collect = [], r.collect_episodes

    def watched(envs, agent, *rest):
        weights.append([x.detach().clone() for x in agent.parameters()])  # before the updates
        return collect(envs, agent, *rest)

    monkeypatch.setattr(r, "collect_episodes", watched)
    run(tmp_path, "a", "--average-share", "0.5")
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    agent = r.load_agent(str(tmp_path / "a/policy.pt"))[0]
    last = [saved["agent"][name] for name, _ in agent.named_parameters()]
    expected, span = weights[1], 1.0  # after the first updates
    for policy in [*weights[2:], last]:
        span += 0.5
        expected = [slow + (fast - slow) / span for slow, fast in zip(expected, policy)]
    assert len(weights) > 2
    for x, y, z in zip(agent.parameters(), expected, last):
        torch.testing.assert_close(x, y)
        assert not torch.equal(x, z)
    task = {"env_id": "HalfCheetah-v4", "max_episode_steps": 100}
    judged = r.evaluate(agent, task, 20, saved["args"]["seed"] + 10_000, 1)[-1]
    assert saved["rows"][-1]["eval/return_mean"] == pytest.approx(judged.mean())


def test_a_resumed_run_may_have_other_threads(tmp_path, capsys):
    run(tmp_path, "a", "--total-timesteps", "1000")
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    r.main(["--resume", checkpoint, "--total-timesteps", "1500", "--threads", "2", "--no-cuda"])
    assert json.loads((tmp_path / "a/config.json").read_text())["threads"] == 2
    with pytest.raises(SystemExit):
        r.main(["--resume", checkpoint, "--num-envs", "2"])
    assert "all but --total-timesteps, --threads and --cuda" in capsys.readouterr().err


# Frames


@pytest.fixture(scope="module")
def cheetah():
    """FrameAutoencoder of HalfCheetah, environments, demonstrations, settings."""
    args = settings(obs="pixels", image_size=24, latent_dim=6, pretrain_steps=20, threads=1)
    torch.manual_seed(0)
    demos = r.load_demos(r.Args(num_demos=2), ["observations"])
    envs = r.make_envs(demos, 4, 1)
    render = r.CapsuleRenderer(envs, args.image_size, 1)
    return r.FrameAutoencoder(render, render(demos["observations"]), args.latent_dim), envs, demos, args


def test_a_short_demonstration_is_drawn_as_well(cheetah, tmp_path):
    autoencoder, envs, demos, args = cheetah
    r.match_spaces(demos, envs)
    agent = r.RSSMAgent(demos | {"obs": autoencoder(demos["obs"]).numpy()}, args, autoencoder)
    short = demos | {"lengths": np.array([3])}
    r.plot_imagination(agent, short, tmp_path / "imagination.png")
    assert (tmp_path / "imagination.png").stat().st_size > 10_000


def test_the_autoencoder_sees_the_frame_and_nothing_else(cheetah):
    autoencoder, _, demos, args = cheetah
    obs = demos["observations"][:5]
    latents = autoencoder(obs)
    assert latents.shape == (5, args.latent_dim) and not latents.requires_grad
    changed = obs.copy()
    changed[:, 8:] += 3.0  # velocities
    assert torch.equal(autoencoder(changed), latents)
    changed[:, 2] += 0.5  # a leg
    assert not torch.isclose(autoencoder(changed), latents).all(1).any()
    for i in range(5):  # whatever else is in the batch
        torch.testing.assert_close(autoencoder(obs[i : i + 1])[0], latents[i])


def test_reconstruction_error_weighs_each_pixel_by_how_much_it_varies(cheetah):
    autoencoder, _, demos, _ = cheetah
    all_frames = autoencoder.render(demos["observations"])
    pixels = all_frames.numpy() / 255.0
    weight = 1 / (pixels.std(0) + 0.03)
    frames = all_frames[:3]
    latents = autoencoder.encoder(autoencoder.center(frames))
    guesses = autoencoder.decoder(latents)[:, 0].detach().numpy() + pixels.mean(0)
    expected = ((guesses - pixels[:3]) ** 2 * weight / weight.mean()).mean()
    assert autoencoder.reconstruction_error(frames).item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(
        autoencoder.decode_frames(autoencoder(demos["observations"][:3])), torch.from_numpy(guesses).float().clamp(0, 1)
    )


def test_pretraining_learns_both_kinds_of_frames(cheetah, monkeypatch):
    autoencoder, envs, demos, args = cheetah
    render, drawn, before = autoencoder.render, [], autoencoder.state_dict()
    forward, expert = render.forward, render(demos["observations"])
    before = {name: x.clone() for name, x in before.items()}
    monkeypatch.setattr(render, "forward", lambda obs: drawn.append(forward(obs)) or drawn[-1])
    r.pretrain_autoencoder(autoencoder, envs, demos, settings(pretrain_steps=60), seeded())
    shown, acted = drawn
    assert torch.equal(shown, expert) and len(acted) == r.RANDOM_STEPS + envs.num_envs
    left = [autoencoder.reconstruction_error(frames[::10]).item() for frames in drawn]
    autoencoder.load_state_dict(before)
    at_first = [autoencoder.reconstruction_error(frames[::10]).item() for frames in drawn]
    assert left[0] < 0.7 * at_first[0] and left[1] < 0.7 * at_first[1], (left, at_first)


PIXELS = "--obs pixels --image-size 16 --latent-dim 4 --pretrain-steps 3 --num-demos 2 --total-timesteps 3000".split()


def test_frames_alone_from_beginning_to_end(tmp_path, monkeypatch, capsys):
    """The autoencoder is frozen; resumed bit for bit; a policy file has all that it takes to act."""
    asked, transitions, autoencoder = set(), r.transitions, {}
    pretrain, clock = r.pretrain_autoencoder, time.perf_counter

    def watched_pretrain(trained, *rest):
        assert (tmp_path / "whole/config.json").exists()  # what is wrong with a run's name is told before
        pretrain(trained, *rest)
        patch.setattr(time, "perf_counter", lambda: clock() + 1000)  # it took that long
        autoencoder.update({name: x.clone() for name, x in trained.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(r, "transitions", lambda obs: asked.add(obs.shape[-1]) or transitions(obs))
        patch.setattr(r, "pretrain_autoencoder", watched_pretrain)
        run(tmp_path, "whole", *PIXELS)
    assert asked == {4}
    assert json.loads((tmp_path / "whole/summary.json").read_text())["seconds"] > 1000
    agent = torch.load(tmp_path / "whole/policy.pt", weights_only=True)["agent"]
    assert all(torch.equal(agent[f"autoencoder.{name}"], x) for name, x in autoencoder.items())
    rows = rows_of(tmp_path / "whole")
    assert [int(row["global_step"]) for row in rows] == [1500, 2000, 2500, 3000]  # 1,000 were at random
    kill_and_resume(tmp_path, monkeypatch, "killed", 5, *PIXELS)
    assert rows_of(tmp_path / "killed") == rows
    saved = [torch.load(tmp_path / f"{name}/checkpoint.pt", weights_only=True) for name in ("whole", "killed")]
    for part in ("agent", "critic", "disc", "replay"):
        assert all(torch.equal(saved[0][part][name], saved[1][part][name]) for name in saved[0][part])
    before = dict(np.load(tmp_path / "whole/evaluation.npz"))
    r.main(["--evaluate", str(tmp_path / "whole/policy.pt"), "--eval-episodes", "2"])
    after = np.load(tmp_path / "whole/policy.npz")
    assert all((before[name] == after[name]).all() for name in before)
    assert (tmp_path / "whole/imagination.png").stat().st_size > 10_000


def test_a_body_that_falls_is_seen_too(tmp_path):
    fields = make_demo_fields((20, 30), obs_dim=11, action_dim=3, env_id="Hopper-v4")
    np.savez(tmp_path / "hopper.npz", **fields)
    summary = run(tmp_path, "a", *PIXELS, "--env-id", "Hopper-v4", "--demos", str(tmp_path / "hopper.npz"))
    assert summary["env_steps"] == 3000
