"""gail_pixels_ae.py: rendering, latents, and what may and may not reach the learner."""

import csv
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import DEMOS, ROOT

import gail_pixels_ae as script

MINI = "--num-envs 4 --num-steps 50 --image-size 32 --predictor-steps 3 --pretrain-steps 6 --num-demos 2".split()
MINI += "--num-minibatches 2 --update-epochs 2 --hidden-size 16 --ae-steps 2".split()
MINI += ["--demos", str(DEMOS)]
MINI += ["--ae-batch-size", "16", "--latent-dim", "8", "--threads", "1", "--disc-steps", "2", "--eval-episodes", "2"]
MINI += ["--eval-interval", "400", "--total-timesteps", "1000", "--no-capture-video"]


@pytest.fixture(scope="module")
def renderer():
    return script.Renderer(32, 1)


@pytest.fixture(scope="module")
def demos():
    return script.load_demos(str(DEMOS), "HalfCheetah-v4", 3, np.random.default_rng(0), ("qpos",))


def mini(tmp_path, *flags, name="run"):
    args = script.parse_args([*MINI, "--output-dir", str(tmp_path), "--run-name", name, *flags], script.Args)
    return script.train(args)


def frames_of(count: int, size: int, channels: int = 1, width: int = 0) -> torch.Tensor:
    shape = (count, channels, size, width or size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def film_of(views: torch.Tensor) -> script.Film:
    """Views (B, C, H, W) as one environment's steps, without an end."""
    nothing = torch.zeros(len(views), 1, 6)
    return script.Film(views[:, None], nothing, nothing, nothing, torch.zeros(len(views), 1, dtype=torch.bool))


def settings(*flags: str) -> script.Args:
    return script.parse_args(list(flags), script.Args)


# Rendering


def test_a_live_frame_is_the_frame_rendered_again_from_the_saved_state(renderer):
    """After a step MuJoCo's derived fields lag one substep; a picture must depend on qpos alone."""
    envs, rng = script.BatchHalfCheetah(2, 100, 0, 1), np.random.default_rng(0)
    envs.reset()
    live, saved = [], []
    for _ in range(12):
        envs.step(rng.uniform(-1, 1, (2, 6)))
        live.append(renderer(envs.qpos))
        saved.append(envs.qpos.copy())
    live, saved = np.concatenate(live), np.concatenate(saved)
    again = script.Renderer(32, 2)(saved)
    assert np.array_equal(live, again)
    order = rng.permutation(len(saved))
    assert np.array_equal(script.Renderer(32, 3)(saved[order]), live[order])
    assert len(np.unique(live.reshape(len(live), -1), axis=0)) == len(live)  # and the pictures do differ


def test_many_frames_are_rendered_in_pieces(renderer, demos):
    many = np.concatenate([demos.qpos] * math.ceil(600 / len(demos.qpos)))[:600]  # more than 256 a thread
    few = renderer(demos.qpos)
    expected = np.concatenate([few] * math.ceil(600 / len(few)))[:600]
    assert np.array_equal(renderer(many), expected)
    assert np.array_equal(script.Renderer(32, 2)(many), expected)


def test_a_renderer_may_be_called_from_any_thread(renderer, demos):
    states = demos.qpos[:6]
    with ThreadPoolExecutor(1) as pool:
        assert np.array_equal(pool.submit(renderer, states).result(), renderer(states))


def test_the_picture_shows_the_animal_moving_not_the_world_passing(renderer, demos):
    """The camera follows: 1.33 m further on, one period of the floor, the picture is the same."""
    state = demos.qpos[:1].copy()
    moved = state + np.array([4 / 3] + [0] * 8)
    assert np.abs(renderer(state).astype(int) - renderer(moved)).mean() < 1
    bent = state.copy()
    bent[0, 3] += 0.5
    assert np.abs(renderer(state).astype(int) - renderer(bent)).mean() > 1


def test_the_last_frame_of_an_episode_is_kept():
    envs = script.BatchHalfCheetah(3, 2, 0, 1)
    envs.reset()
    envs.step(np.zeros((3, 6)))
    *_, truncated, final_obs = envs.step(np.ones((3, 6)))
    assert truncated.all()
    assert np.array_equal(envs.final_qpos[:, 1:], final_obs[:, :8])
    assert not np.allclose(envs.qpos[:, 1:], final_obs[:, :8])


def test_no_opengl_is_one_sentence(monkeypatch):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(script.subprocess, "run", fail)
    with pytest.raises(script.UserError, match="libegl1"):
        script.headless_backend()


def test_osmesa_where_there_is_no_egl(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(
        script.subprocess, "run", lambda command, **kw: subprocess.CompletedProcess(command, int("egl" in command[2]))
    )
    assert script.headless_backend() == "osmesa"


# Autoencoder and latents


@pytest.mark.parametrize("size, width, channels, latent_dim", [(16, 16, 1, 3), (32, 56, 4, 8), (56, 96, 1, 32)])
def test_autoencoder_shapes(size, width, channels, latent_dim):
    autoencoder = script.Autoencoder(channels, size, width, latent_dim)
    frames = frames_of(5, size, channels, width)
    latents = autoencoder.encode(frames)
    assert latents.shape == (5, latent_dim)
    assert autoencoder.decoder(latents).shape == frames.shape
    assert torch.allclose(script.encode_all(autoencoder, frames), latents, atol=1e-6)


def test_reconstruction_loss_is_the_weighted_squared_error():
    autoencoder, frames = script.Autoencoder(1, 16, 16, 4), frames_of(3, 16)
    autoencoder.set_reference(frames[:, 0], weighted=True)
    with torch.no_grad():
        guess, truth = autoencoder.decoder(autoencoder.encode(frames)), frames.float() / 255 - autoencoder.mean_frame
        expected = sum(
            autoencoder.weight[i, j] * (guess[b, 0, i, j] - truth[b, 0, i, j]) ** 2
            for b in range(3)
            for i in range(16)
            for j in range(16)
        ) / (3 * 16 * 16)
        assert autoencoder.loss(frames).item() == pytest.approx(expected.item(), rel=1e-5)
    assert autoencoder.weight.mean().item() == pytest.approx(1, rel=1e-5)


def test_autoencoder_beats_the_mean_frame(renderer):
    torch.manual_seed(0)
    many = script.load_demos(str(DEMOS), "HalfCheetah-v4", 20, np.random.default_rng(0), ("qpos",))
    frames = torch.from_numpy(renderer(many.qpos))
    train, heldout = frames[:1818, None], frames[1818:, None]
    autoencoder = script.Autoencoder(1, 32, 56, 32)
    autoencoder.set_reference(frames[:1818], weighted=True)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    args = settings("--ae-batch-size", "64")
    script.update_autoencoder(autoencoder, None, optimizer, train, film_of(train), 150, args, generator)
    with torch.no_grad():
        mean_frame_loss = (autoencoder.center(heldout).square() * autoencoder.weight).mean()
        assert autoencoder.loss(heldout) < 0.6 * mean_frame_loss


@pytest.mark.parametrize("lengths, frame_stack", [([3, 1, 4], 1), ([3, 1, 4], 2), ([2, 5], 4), ([1], 6)])
def test_window_rows_against_a_loop(lengths, frame_stack):
    expected, start = [], 0
    for length in lengths:
        for t in range(length + 1):
            expected.append([start + max(t - k, 0) for k in reversed(range(frame_stack))])
        start += length + 1
    assert script.window_rows(np.array(lengths), frame_stack).tolist() == expected


def test_latent_steps_against_a_loop():
    latents = torch.randn(5, 4, 3)
    seen = script.latent_steps(latents)
    for b in range(5):
        expected = torch.cat([*(latents[b, k + 1] - latents[b, k] for k in range(3)), latents[b, 3]])
        assert torch.equal(seen[b], expected)
    assert torch.equal(script.latent_steps(latents[:, :1]), latents[:, 0])


@pytest.mark.parametrize("faithful", [False, True])
def test_what_the_expert_looks_like_changes_with_the_encoder(faithful):
    torch.manual_seed(0)
    frames = frames_of(9, 16)[:, 0]
    rows = torch.from_numpy(script.window_rows(np.array([3, 4]), 3))
    views = frames[rows] if faithful else frames[:, None]
    windows = torch.arange(9)[:, None] if faithful else rows
    autoencoder = script.Autoencoder(views.shape[1], 16, 16, 4)
    seen, (mean, std) = script.look_at_expert(autoencoder, views, windows)
    assert seen.shape == (9, 4 if faithful else 12)
    raw = script.latent_steps(autoencoder.encode(views)[windows]).detach()
    assert torch.allclose(seen, (raw - mean) / std, atol=1e-5)
    assert torch.allclose(raw.mean(0), mean, atol=1e-6)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=1e-2)
    args, generator = settings("--ae-batch-size", "4"), torch.Generator().manual_seed(0)
    script.update_autoencoder(autoencoder, None, optimizer, views, film_of(views), 3, args, generator)
    again, _ = script.look_at_expert(autoencoder, views, windows)
    assert not torch.allclose(again, seen, atol=1e-3)


# Collecting


class Slide:
    """A renderer whose pictures are plain: every pixel tells how far the animal has come and which simulation it is."""

    def __init__(self):
        self.shown = []

    def __call__(self, qpos):
        self.shown.append(qpos.copy())
        return np.repeat(np.repeat((qpos[:, :1, None] * 1000 % 256).astype(np.uint8), 16, axis=1), 16, axis=2)


@pytest.mark.parametrize("faithful", [False, True])
def test_windows_start_with_a_repeated_frame_and_never_span_episodes(faithful):
    """Against a slow loop that encodes every window of every episode from its frames."""
    torch.manual_seed(0)
    flags = ["--frame-stack", "3", "--latent-dim", "4", "--image-size", "16"] + ["--faithful"] * faithful
    args = script.parse_args(flags, script.Args)
    envs = script.BatchHalfCheetah(2, 5, 0, 1)  # episodes of 5 steps, rollout of 8: one reset within
    autoencoder = script.Autoencoder(3 if faithful else 1, 16, 16, 4)
    agent = script.Agent((4 if faithful else 12) + 12, 6, 8, torch.Generator().manual_seed(0))
    renderer = Slide()
    collector = script.PixelCollector(envs, renderer, autoencoder, None, args, torch.device("cpu"))
    zero_one = (torch.zeros(4 if faithful else 12), torch.ones(4 if faithful else 12))
    rollout, film = collector.rollout(agent, {"latent": zero_one}, 8, torch.Generator().manual_seed(0))
    seen, views = film.seen, film.views
    assert rollout.ended[4].all() and rollout.ended.sum() == 2

    # What was rendered: the start, five steps (the fifth before the reset), the new start, three steps.
    shown = [Slide()(states) for states in renderer.shown]
    episodes = [shown[:6], shown[6:]]
    expected_obs, expected_next = [], []
    for episode in episodes:
        for t in range(len(episode)):
            window = np.stack([episode[max(t - k, 0)] for k in (2, 1, 0)], axis=1)  # (N, 3, H, W)
            window = torch.from_numpy(window)
            with torch.no_grad():
                if faithful:
                    latent = autoencoder.encode(window)
                else:
                    z = [autoencoder.encode(window[:, k : k + 1]) for k in range(3)]
                    latent = torch.cat([z[1] - z[0], z[2] - z[1], z[2]], dim=1)
            if t > 0:
                expected_next.append(latent)
            if t < len(episode) - 1:
                expected_obs.append(latent)
    dim = seen.shape[-1]
    assert torch.allclose(rollout.obs[..., :dim], torch.stack(expected_obs), atol=1e-6)
    assert torch.allclose(rollout.next_obs[..., :dim], torch.stack(expected_next), atol=1e-6)
    assert torch.equal(seen, rollout.next_obs[..., :dim])

    # The policy's own last two actions follow, zeros before an episode has any.
    own, none = rollout.executed_actions, torch.zeros(2, 6)
    for t in range(8):
        start = 0 if t < 5 else 5
        past = [own[t - k] if t - k >= start else none for k in (2, 1)]
        assert torch.equal(rollout.obs[t, :, dim:], torch.cat(past, dim=1))
        past = [own[t - 1] if t - 1 >= start else none, own[t]]
        assert torch.equal(rollout.next_obs[t, :, dim:], torch.cat(past, dim=1))
    assert views.shape == (8, 2, 3 if faithful else 1, 16, 16)
    assert torch.allclose(script.encode_all(autoencoder, views.flatten(0, 1)), seen.flatten(0, 1)[:, -4:], atol=1e-6)
    assert torch.equal(film.memory, rollout.obs) and torch.equal(film.actions, own)
    assert torch.equal(film.ended, rollout.ended)


def test_policy_on_states_sees_states():
    args = script.parse_args(["--image-size", "16", "--policy-obs", "state", "--latent-dim", "4"], script.Args)
    envs = script.BatchHalfCheetah(2, 5, 0, 1)
    agent = script.Agent(17, 6, 8, torch.Generator().manual_seed(0))
    collector = script.PixelCollector(envs, Slide(), script.Autoencoder(1, 16, 16, 4), None, args, torch.device("cpu"))
    statistics = {"latent": (torch.zeros(16), torch.ones(16)), "state": (torch.zeros(17), torch.full((17,), 0.5))}
    first = collector.state.copy()
    rollout, film = collector.rollout(agent, statistics, 1, torch.Generator().manual_seed(0))
    assert torch.allclose(rollout.obs[0], torch.from_numpy(first * 2).float().clamp(-10, 10))
    assert film.seen.shape == (1, 2, 16)


def test_the_value_is_told_the_last_true_reward_and_the_policy_is_not():
    args = script.parse_args("--image-size 16 --latent-dim 4 --frame-stack 2".split(), script.Args)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    autoencoder, statistics = script.Autoencoder(1, 16, 16, 4), {"latent": (torch.zeros(8), torch.ones(8))}

    def two_rollouts(source: str) -> tuple[script.Rollout, script.Rollout]:
        args.reward_source = source
        envs = script.BatchHalfCheetah(2, 5, 0, 1)  # episodes of 5 steps, two rollouts of 4: one reset in the second
        collector = script.PixelCollector(envs, Slide(), autoencoder, None, args, torch.device("cpu"))
        agent_type = script.ToldAgent if source == "env" else script.Agent
        agent = agent_type(14, 6, 8, torch.Generator().manual_seed(0))
        noise = torch.Generator().manual_seed(1)
        first = collector.rollout(agent, statistics, 4, noise)[0]
        fresh = script.PixelCollector(
            script.BatchHalfCheetah(2, 5, 0, 1), Slide(), autoencoder, None, args, torch.device("cpu")
        )
        fresh.load_state_dict(collector.state_dict())  # as a resumed run would
        return first, fresh.rollout(agent, statistics, 4, noise)[0]

    told, untold = two_rollouts("env"), two_rollouts("gail")
    obs, next_obs, rewards = (torch.cat([getattr(x, n) for x in told]) for n in ("obs", "next_obs", "env_rewards"))
    assert torch.equal(next_obs[..., -1], rewards / 5)
    assert torch.equal(obs[1:, :, -1], (rewards / 5 * (torch.arange(8) != 4)[:, None])[:-1])
    assert (obs[0, :, -1] == 0).all() and rewards.abs().min() > 0
    assert untold[0].obs.shape == (4, 2, 14)  # with GAIL nobody is told
    assert torch.equal(obs[..., :-1], torch.cat([x.obs for x in untold]))

    agent = script.ToldAgent(14, 6, 8, generator)
    other = obs.clone()
    other[..., -1] += 1
    assert all(torch.equal(a, b) for a, b in zip(agent.policy(obs), agent.policy(other)))
    assert not torch.isclose(agent.critic(obs), agent.critic(other)).any()


# Gradients: the encoder learns from reconstruction and from nothing else


def test_reward_and_policy_losses_do_not_move_the_encoder():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    args = script.parse_args(
        ["--image-size", "16", "--latent-dim", "4", "--frame-stack", "2", "--ae-batch-size", "4"], script.Args
    )
    envs = script.BatchHalfCheetah(4, 10, 0, 1)
    autoencoder = script.Autoencoder(1, 16, 16, 4)
    agent = script.Agent(8 + 6, 6, 8, generator)
    disc = script.LatentDiscriminator(8, 8, generator)
    collector = script.PixelCollector(envs, Slide(), autoencoder, None, args, torch.device("cpu"))
    statistics = {"latent": (torch.zeros(8), torch.ones(8))}
    rollout, film = collector.rollout(agent, statistics, 10, generator)
    seen, views = film.seen, film.views
    assert not seen.requires_grad and not rollout.obs.requires_grad
    before = {name: x.clone() for name, x in autoencoder.state_dict().items()}
    optimizer, disc_optimizer = torch.optim.Adam(agent.parameters()), torch.optim.Adam(disc.parameters())
    script.update_discriminator(disc, disc_optimizer, torch.randn(20, 8), seen.flatten(0, 1), args, 2, generator)
    script.update_policy(agent, optimizer, rollout, torch.randn(10, 4), args, generator)
    assert all(torch.equal(x, before[name]) for name, x in autoencoder.state_dict().items())
    assert all(p.grad is None for p in autoencoder.parameters())
    inverse = script.mlp([8, 8, 6], torch.nn.ReLU, 1.0, generator)
    ae_optimizer = torch.optim.Adam([*autoencoder.parameters(), *inverse.parameters()])
    script.update_autoencoder(autoencoder, inverse, ae_optimizer, views[0], film, 1, args, generator)
    assert all(p.grad.abs().sum() > 0 for p in [*autoencoder.parameters(), *inverse.parameters()])


def test_stacks_longer_than_a_snippet_teach_the_inverse_model():
    generator, count = torch.Generator().manual_seed(0), script.SNIPPET + 4
    args = settings("--frame-stack", str(count), "--ae-batch-size", str(2 * count), "--latent-dim", "4")
    autoencoder, views = script.Autoencoder(1, 16, 16, 4), frames_of(30, 16)
    inverse = script.mlp([4 * count, 8, 6], torch.nn.ReLU, 1.0, generator)
    optimizer = torch.optim.Adam([*autoencoder.parameters(), *inverse.parameters()])
    film = film_of(views)
    film.actions = torch.rand(30, 1, 6, generator=generator)
    row = script.update_autoencoder(autoencoder, inverse, optimizer, views, film, 1, args, generator)
    assert row["ae/inverse"] > 0 and all(p.grad.abs().sum() > 0 for p in inverse.parameters())
    row = script.update_autoencoder(autoencoder, None, optimizer, views, film, 1, args, generator)
    assert row.keys() == {"ae/loss"}  # no model, no error


def test_reconstruction_errors_look_at_the_whole_rollout():
    autoencoder, views = script.Autoencoder(1, 16, 16, 4), frames_of(600, 16)
    expert = script.ExpertFilm(views, None, None, views[:300], views[:0])
    row = script.reconstruction_errors(autoencoder, expert, views)
    assert row.keys() == {"ae/recon_expert", "ae/recon_policy"}  # one demonstration: nothing is held out
    changed = views.clone()
    changed[300:] = 0  # the later half of the steps
    with torch.no_grad():
        expected = autoencoder.loss(changed[torch.linspace(0, 599, 256).long()]).item()
    assert script.reconstruction_errors(autoencoder, expert, changed)["ae/recon_policy"] == pytest.approx(expected)
    assert abs(expected - row["ae/recon_policy"]) > 0.1 * expected


@pytest.mark.parametrize("length", [1, 2, 4])
def test_snippets_against_a_loop(length):
    ended = torch.zeros(12, 3, dtype=torch.bool)
    ended[4, 0] = ended[0, 1] = ended[10, 1] = ended[11, 2] = True
    episode = torch.cat([torch.zeros(1, 3), ended[:-1].cumsum(0)])  # an end belongs to the episode that it ends
    expected = {
        (t, n) for t in range(13 - length) for n in range(3) if len(set(episode[t : t + length, n].tolist())) == 1
    }
    whole = script.whole_windows(ended, length)
    assert whole.shape == (13 - length, 3) and {tuple(x) for x in torch.nonzero(whole).tolist()} == expected


def test_inverse_loss_sees_steps_and_newest_by_their_own_spread():
    """An inverse model that reads the last step's first number: exact where the action is that number, standardized."""
    torch.manual_seed(0)
    latents = torch.randn(50, 3, 2) * torch.tensor([5.0, 0.1])
    step = latents[:, 2] - latents[:, 1]
    actions = step / (step.std(0, correction=0) + 1e-2)
    assert script.inverse_loss(lambda seen: seen[:, 2:4], latents, actions).item() == pytest.approx(0, abs=1e-10)
    assert script.inverse_loss(lambda seen: seen[:, 4:6], latents, actions).item() > 0.1


def test_inverse_loss_does_not_pull_on_the_size_of_the_latents():
    """Guesses that are worse than none would otherwise shrink the latents to nothing: a gradient along them is 0."""
    torch.manual_seed(0)
    latents, actions = 10 * torch.randn(64, 4, 3), torch.rand(64, 6)
    inverse = script.mlp([12, 16, 6], torch.nn.ReLU, 1.0, torch.Generator().manual_seed(0))
    latents.requires_grad_(True)
    (grad,) = torch.autograd.grad(script.inverse_loss(inverse, latents, actions), latents)
    assert abs((grad * latents).sum()) < 1e-3 < (grad * latents).abs().sum()


def random_film(args, renderer, autoencoder) -> script.Film:
    """What an untrained policy shows."""
    envs = script.BatchHalfCheetah(args.num_envs, 100, 0, 1)
    collector = script.PixelCollector(envs, renderer, autoencoder, None, args, torch.device("cpu"))
    dim = args.frame_stack * args.latent_dim
    agent = script.Agent(dim + 6 * (args.frame_stack - 1), 6, 8, torch.Generator().manual_seed(0))
    statistics = {"latent": (torch.zeros(dim), torch.ones(dim))}
    return collector.rollout(agent, statistics, args.num_steps, torch.Generator().manual_seed(0))[1]


def test_the_inverse_model_shapes_the_encoder_and_not_the_decoder(renderer):
    args, changed = settings(*MINI, "--ae-batch-size", "64", "--num-envs", "8", "--latent-dim", "16"), []
    for inverse_coef in (0.0, 10.0):
        torch.manual_seed(0)
        args.inverse_coef, generator = inverse_coef, torch.Generator().manual_seed(0)
        autoencoder = script.Autoencoder(1, 32, 56, 16)
        film = random_film(args, renderer, autoencoder)
        dim = 16 * args.frame_stack
        inverse = script.mlp([dim, 8, 6], torch.nn.ReLU, 1.0, torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD([*autoencoder.parameters(), *inverse.parameters()], lr=0.1)
        script.update_autoencoder(autoencoder, inverse, optimizer, film.views[0], film, 1, args, generator)
        changed.append(autoencoder)
    for part, same in (("encoder", False), ("decoder", True)):
        pairs = zip(*(getattr(autoencoder, part).parameters() for autoencoder in changed))
        assert all(torch.equal(a, b) is same for a, b in pairs)


def test_the_inverse_model_learns_which_action_was_taken(renderer):
    torch.manual_seed(0)
    args = settings(*MINI, "--ae-batch-size", "128", "--inverse-coef", "1", "--num-envs", "8", "--latent-dim", "16")
    autoencoder, generator = script.Autoencoder(1, 32, 56, 16), torch.Generator().manual_seed(0)
    film = random_film(args, renderer, autoencoder)
    assert film.views.shape == (50, 8, 1, 32, 56) and film.actions.shape == (50, 8, 6)
    frames = film.views.flatten(0, 1)
    autoencoder.set_reference(frames[:, 0], weighted=True)
    inverse = script.mlp([64, 64, 6], torch.nn.ReLU, 1.0, generator)
    optimizer = torch.optim.Adam([*autoencoder.parameters(), *inverse.parameters()], lr=2e-3)
    script.update_autoencoder(autoencoder, None, optimizer, frames, film, 60, args, generator)
    script.update_autoencoder(autoencoder, inverse, optimizer, frames, film, 200, args, generator)
    log = script.update_autoencoder(autoencoder, inverse, optimizer, frames, film, 5, args, generator)
    assert log["ae/inverse"] < 0.6 * film.actions.var()


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_what_a_policy_gets_is_the_idle_prediction_and_the_last_action(frame_stack):
    predictor = script.Predictor(4, frame_stack, 2, torch.Generator().manual_seed(0))
    memory = torch.randn(5, frame_stack * 4 + (frame_stack - 1) * 2)
    obs = predictor.obs(memory)
    assert obs.shape == (5, predictor.obs_dim)
    sight = 4 * min(frame_stack, 2)
    for row, x in zip(obs, memory):
        assert torch.allclose(row[:sight], predictor.net(torch.cat([x, torch.zeros(4)])).clamp(-10, 10), atol=1e-6)
        assert torch.equal(row[sight:], x[-2:] if frame_stack > 1 else x[:0])


def test_the_predictor_learns_what_two_actions_lead_to_and_no_pair_spans_two_episodes():
    """A world whose sight is a sum: the predictor finds it, and rows that only a wrong pair reads are NaN."""
    torch.manual_seed(0)
    steps, actions, memory = 40, torch.rand(40, 8, 2) - 0.5, torch.randn(40, 8, 2 * 4 + 2)
    ended = torch.zeros(steps, 8, dtype=torch.bool)
    ended[9::10] = True
    seen = torch.full((steps, 8, 8), torch.nan)
    seen[1:] = memory[:-1, :, :8] + actions[:-1].repeat(1, 1, 4) - 2 * actions[1:].repeat(1, 1, 4)
    seen[10::10] = torch.nan
    predictor = script.Predictor(4, 2, 2, torch.Generator().manual_seed(0))
    optimizer, generator = torch.optim.Adam(predictor.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    film = script.Film(None, seen, memory, actions, ended)
    first = script.update_predictor(predictor, optimizer, film, 5, generator)["ae/prediction"]
    script.update_predictor(predictor, optimizer, film, 300, generator)
    last = script.update_predictor(predictor, optimizer, film, 5, generator)["ae/prediction"]
    assert last < 0.1 * first
    idle = predictor(memory[0, :1], torch.zeros(1, 4))
    assert (idle - memory[0, :1, :8]).square().mean() < 0.3


def test_a_policy_with_a_predictor_sees_its_predictions(renderer):
    args = settings(*MINI)
    autoencoder = script.Autoencoder(1, 32, 56, 8)
    predictor = script.Predictor(8, 4, 6, torch.Generator().manual_seed(0))
    envs = script.BatchHalfCheetah(2, 5, 0, 1)
    collector = script.PixelCollector(envs, renderer, autoencoder, predictor, args, torch.device("cpu"))
    agent = script.Agent(predictor.obs_dim, 6, 8, torch.Generator().manual_seed(0))
    statistics = {"latent": (torch.zeros(32), torch.ones(32))}
    rollout, film = collector.rollout(agent, statistics, 7, torch.Generator().manual_seed(0))
    for t in range(7):
        assert torch.allclose(rollout.obs[t], predictor.obs(film.memory[t]), atol=1e-6)
        memory_after = torch.cat([film.seen[t], film.memory[t, :, -12:], film.actions[t]], dim=1)
        if not rollout.ended[t].any() and t > 0:
            assert t == 6 or torch.allclose(film.memory[t + 1], memory_after)
            assert torch.allclose(rollout.next_obs[t], predictor.obs(memory_after), atol=1e-6)


def test_first_layers_of_many_inputs_take_smaller_steps():
    for inputs, expected in ((17, 1.0), (280, 0.1)):
        agent = script.Agent(inputs, 6, 8, torch.Generator().manual_seed(0))
        optimizer = script.agent_optimizer(agent, 0.01)
        steps = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(steps) == len(list(agent.parameters()))
        assert steps[id(agent.actor[0].weight)] == steps[id(agent.critic[0].bias)] == pytest.approx(0.01 * expected)
        assert steps[id(agent.actor[4].bias)] == steps[id(agent.actor[2].weight)] == 0.01


# Diagnostics


def test_energy_distance_against_a_loop():
    x, y = torch.randn(7, 3), torch.randn(5, 3) + 1

    def mean_distance(a, b):
        return np.mean([math.dist(p, q) for p in a.tolist() for q in b.tolist()])

    expected = 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
    assert script.energy_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert script.energy_distance(x, x) == pytest.approx(0, abs=1e-5)


def test_probe_finds_what_is_linear_and_not_what_is_absent():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(400, 6, generator=generator)
    lengths = np.array([99, 99, 99, 99])
    assert script.probe_state(latents, latents @ torch.randn(6, 3, generator=generator), lengths) > 0.99
    assert script.probe_state(latents, torch.randn(400, 3, generator=generator), lengths) < 0.1
    assert math.isnan(script.probe_state(latents[:100], latents[:100], lengths[:1]))


def test_collapse_is_told_and_health_is_not():
    healthy = [{"disc/expert_acc": 0.9, "disc/policy_acc": 1.0}] * 20
    assert script.signs_of_collapse(healthy, 0.5, [1.0, 0.9, 1.1, 1.2]) == {}
    pinned = [{"disc/expert_acc": 1.0, "disc/policy_acc": 1.0}] * 20
    assert "--grad-penalty-coef" in " ".join(script.signs_of_collapse(pinned, 0.5, [1.0]).values())
    assert script.signs_of_collapse(pinned[:19], 0.5, [1.0]) == {}
    assert "--pretrain" in " ".join(script.signs_of_collapse(healthy, 0.5, [1.0, 2.1, 2.2, 2.3]).values())
    assert "--learning-rate" in " ".join(script.signs_of_collapse(healthy, 0.01, [1.0]).values())
    assert script.signs_of_collapse([{}] * 20, 0.5, []) == {}  # --reward-source env


# Whole runs


def test_miniature_run_moves_all_networks_and_writes_its_files(tmp_path):
    flags = ["--capture-video"]
    summary = mini(tmp_path, *flags)
    run = tmp_path / "run"
    files = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.csv", "summary.json", "checkpoint.pt", "policy.pt", "policy_best.pt"} <= files
    assert {"curves.png", "reconstructions.png", "policy.gif"} <= files
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["env_steps"] == 1000
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    fresh = {
        "predictor": script.Predictor(8, 4, 6, generator).state_dict(),
        "agent": script.Agent(2 * 8 + 6, 6, 16, generator).state_dict(),
        "disc": script.LatentDiscriminator(32, 128, generator).state_dict(),
    }
    for part, weights in fresh.items():
        for name, value in weights.items():
            assert saved[part][name].shape == value.shape
            assert not torch.equal(saved[part][name], value), f"{part}.{name} did not move"
    torch.manual_seed(1)
    autoencoder = script.Autoencoder(1, 32, 56, 8)
    for name, value in autoencoder.named_parameters():
        assert not torch.equal(saved["autoencoder"][name], value), f"autoencoder.{name} did not move"
    rows = list(csv.DictReader(open(run / "metrics.csv", newline="")))
    assert [int(row["global_step"]) for row in rows] == [600, 800, 1000, 1000]
    names = (
        "ae/recon_heldout",
        "ae/probe_r2",
        "ae/prediction",
        "disc/loss",
        "time/autoencoder",
        "eval/latent_distance",
    )
    for name in names:
        assert any(row[name] for row in rows), name


@pytest.mark.parametrize("flags", [[], ["--faithful"]])
def test_resume_equals_uninterrupted(tmp_path, flags, monkeypatch):
    mini(tmp_path, *flags, "--checkpoint-interval", "600", name="whole")

    class Killed(Exception):
        pass

    write, count = script.MetricsLogger.write, [0]

    def die_at_the_last_row(self, row):
        count[0] += 1
        if row["global_step"] == 1000:
            raise Killed
        write(self, row)

    monkeypatch.setattr(script.MetricsLogger, "write", die_at_the_last_row)
    with pytest.raises(Killed):
        mini(tmp_path, *flags, "--checkpoint-interval", "600", name="cut")
    monkeypatch.setattr(script.MetricsLogger, "write", write)
    script.train(script.parse_args(["--resume", str(tmp_path / "cut/checkpoint.pt")], script.Args))
    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("agent", "disc", "autoencoder"):
        for name, value in whole[part].items():
            assert torch.equal(value, cut[part][name]), f"{part}.{name}"
    timed = ("time/", "charts/SPS")
    logs = [list(csv.DictReader(open(tmp_path / name / "metrics.csv", newline=""))) for name in ("whole", "cut")]
    logs = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in log] for log in logs]
    assert logs[0] == logs[1]


def test_nothing_but_pixels_reaches_the_learner(tmp_path, monkeypatch):
    """True state and true reward filled with NaN, in the environment and in the demonstrations: not a bit changes."""
    mini(tmp_path, name="clean")
    observe, step, load = script.BatchHalfCheetah.observe, script.BatchHalfCheetah.step, script.load_demos

    def blind_step(self, actions):
        next_obs, rewards, terminated, truncated, final_obs = step(self, actions)
        return next_obs, rewards * np.nan, terminated, truncated, final_obs

    def blind_demos(*args):
        demos = load(*args)
        demos.observations[:], demos.actions[:], demos.rewards[:] = np.nan, np.nan, np.nan
        return demos

    monkeypatch.setattr(script.BatchHalfCheetah, "observe", lambda self: observe(self) * np.nan)
    monkeypatch.setattr(script.BatchHalfCheetah, "step", blind_step)
    monkeypatch.setattr(script, "load_demos", blind_demos)
    mini(tmp_path, name="blind")
    clean, blind = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("clean", "blind"))
    for part in ("agent", "disc", "autoencoder"):
        for name, value in clean[part].items():
            assert torch.equal(value, blind[part][name]), f"{part}.{name}"
    rows = list(csv.DictReader(open(tmp_path / "blind/metrics.csv", newline="")))
    assert rows[-1]["eval/return_mean"] in ("nan", "")  # the NaNs were really there


@pytest.mark.parametrize(
    "flags",
    [
        ["--policy-obs", "state"],
        ["--reward-source", "env"],
        ["--frame-stack", "1"],
        ["--predictor-steps", "0"],
        ["--pretrain-steps", "0"],
        ["--ae-steps", "0", "--inverse-coef", "0"],
        ["--faithful"],
        ["--disc-loss", "wgan", "--no-anneal-lr", "--num-demos", "1"],
    ],
)
def test_variants_run_and_their_policy_can_be_evaluated(tmp_path, flags, capsys):
    summary = mini(tmp_path, *flags)
    script.main(["--evaluate", str(tmp_path / "run/policy.pt"), "--eval-episodes", "2", "--threads", "1"])
    assert f"{summary['eval/return_mean']:.1f} ±" in capsys.readouterr().out


def test_two_threads_give_what_one_gives(tmp_path):
    """Physics and rendering exactly; networks up to rounding, so one rollout is compared."""
    finished = []
    for threads in (1, 2):
        envs = script.BatchHalfCheetah(5, 7, 3, threads)
        renderer, rng = script.Renderer(16, threads), np.random.default_rng(0)
        envs.reset()
        shown = []
        for _ in range(10):
            envs.step(rng.uniform(-1, 1, (5, 6)))
            shown.append(renderer(envs.qpos))
        finished.append(np.stack(shown))
    assert np.array_equal(*finished)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda(tmp_path):
    summary = mini(tmp_path, "--cuda")
    assert math.isfinite(summary["eval/return_mean"])


# Users' mistakes


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--frame-stack", "0"], "--frame-stack"),
        (["--image-size", "60"], "--image-size"),
        (["--image-size", "8"], "--image-size"),
        (["--ae-batch-size", "7"], "--ae-batch-size"),
        (["--ae-batch-size", "6"], "--frame-stack"),
        (["--num-steps", "3"], "--num-steps"),
        (["--predictor-steps", "-1"], "--predictor-steps"),
        (["--frame-stack", "101", "--pretrain-steps", "0", "--num-steps", "200"], "--frame-stack"),
        (["--inverse-coef", "-1"], "--inverse-coef"),
        (["--latent-dim", "0"], "--latent-dim"),
        (["--env-id", "Hopper-v4"], "--env-id"),
        (["--total-timesteps", "100"], "--total-timesteps"),
        (["--num-minibatches", "10000"], "--num-minibatches"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--demos", "nowhere.npz"], "nowhere.npz"),
        (["--evaluate", "nowhere.pt"], "nowhere.pt"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, flags, told, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demos = [] if "--demos" in flags or "--resume" in flags else ["--demos", str(DEMOS)]
    with pytest.raises(SystemExit) as exit_info:
        script.main([*demos, *flags])
    assert exit_info.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and told in text and text.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_demonstrations_without_physics_state(demo_file, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--demos", demo_file(), "--output-dir", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    assert "'qpos' is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_policy_of_another_script_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--evaluate", str(ROOT / "data/expert.pt")])
    assert exit_info.value.code == 2
    assert "its kind is" in capsys.readouterr().err


def test_checkpoint_and_policy_of_another_version(tmp_path, capsys):
    common = {"format_version": 1, "args": vars(script.Args()) | {"zoom": 1}}
    torch.save(common | {"script": "gail_pixels_ae"}, tmp_path / "checkpoint.pt")
    torch.save(common | {"kind": "pixels"}, tmp_path / "policy.pt")
    for argv in (["--resume", str(tmp_path / "checkpoint.pt")], ["--evaluate", str(tmp_path / "policy.pt")]):
        with pytest.raises(SystemExit) as exit_info:
            script.main(argv)
        text = capsys.readouterr().err
        assert exit_info.value.code == 2 and "another version" in text and text.count("\n") == 1


def test_cuda_without_cuda(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--cuda", "--demos", str(DEMOS)])
    assert exit_info.value.code == 2
    assert "--cuda" in capsys.readouterr().err


def test_it_runs_as_a_command(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "gail_pixels_ae.py"),
        *MINI,
        "--output-dir",
        str(tmp_path),
        "--run-name",
        "run",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "frames/s" in result.stdout and "settotalmass" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
