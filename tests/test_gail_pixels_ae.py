"""gail_pixels_ae.py: rendering, latents, and what may and may not reach the learner."""

import csv
import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import DEMOS
from torch.optim import Adam

import gail_pixels_ae as script

# Three rollouts after two of the pretraining, on the first 25 steps of three demonstrations
MINI = ["--demos", "(short_demos writes it)", "--num-demos", "2", "--num-envs", "4"]
MINI += "--num-steps 25 --total-timesteps 500 --image-size 32 --latent-dim 8 --threads 1".split()
MINI += "--pretrain-steps 6 --predictor-steps 3 --ae-steps 2 --ae-batch-size 16".split()
MINI += "--num-minibatches 2 --update-epochs 2 --hidden-size 16 --disc-steps 2".split()
MINI += "--eval-episodes 2 --eval-interval 200 --checkpoint-interval 100 --no-capture-video".split()
SMALL = "--image-size 16 --latent-dim 4 --frame-stack 3 --ae-batch-size 6".split()
SMALL += "--hidden-size 8 --disc-hidden-size 8".split()


@pytest.fixture(scope="module", autouse=True)
def short_demos(tmp_path_factory):
    with np.load(DEMOS) as file:
        whole = dict(file)
    metadata = json.loads(str(whole["metadata"])) | {"max_episode_steps": 25}
    fields = {"lengths": np.array([25] * 3), "metadata": json.dumps(metadata)}
    fields |= {name: whole[name][:3] for name in ("terminated", "truncated")}
    for name in ("observations", "qpos", "qvel", "actions", "rewards"):
        length = 100 + (len(whole[name]) % 100 > 0)  # with the final one, or without
        rows = whole[name].reshape(-1, length, *whole[name].shape[1:])[:3, : length - 75]
        fields[name] = rows.reshape(-1, *whole[name].shape[1:])
    MINI[1] = str(tmp_path_factory.mktemp("demos") / "short.npz")
    np.savez(MINI[1], **fields)


@pytest.fixture(scope="module")
def render():
    return script.Renderer(32, 1, "cpu")


@pytest.fixture(scope="module")
def demos():
    return script.load_demos(settings("--num-demos", "3"), ["qpos"])


def settings(*flags: str) -> script.Args:
    return script.parse_args(["--demos", str(DEMOS), "--threads", "1", *flags])


def mini(tmp_path, *flags, name="run") -> dict:
    """One in-process run; returns its summary."""
    script.main([*MINI, "--output-dir", str(tmp_path), "--run-name", name, *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def checkpoint_of(run_dir) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def rows_of(run_dir) -> list[dict]:
    """The rows of metrics.csv, but for what is never twice the same."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "charts/SPS"))} for row in rows]


def same(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def random_frames(count: int, height: int, width: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width or height), generator=generator, dtype=torch.uint8)


def networks(args, frames=None) -> script.Networks:
    """Networks that see latents a thousand times as large (nothing has told their spread yet)."""
    torch.manual_seed(0)
    frames = random_frames(4, args.image_size) if frames is None else frames
    states = np.random.default_rng(0).normal(3, 2, (50, 17))
    nets = script.Networks(frames, states, args, torch.Generator().manual_seed(0))
    nets.autoencoder.standardize.std.fill_(1e-3)
    return nets


def rollout_of(nets, render, args, envs=2, limit=5, steps=8, sampled=True):
    """A first rollout, the environments and the episodes, which go on."""
    simulations = script.BatchHalfCheetah(envs, limit, 1)
    episodes = script.begin_episodes(simulations, render, args.frame_stack, seed=0)
    generator = torch.Generator().manual_seed(0)
    rollout, _ = script.collect_frames(simulations, render, nets, episodes, steps, generator, sampled)
    return rollout, simulations, episodes


def slide(qpos) -> torch.Tensor:
    """A renderer whose pictures are plain: every pixel tells how far the animal has come."""
    shade = torch.from_numpy((qpos[:, 0] * 1000 % 256).astype(np.uint8))
    return shade[:, None, None].repeat(1, 16, 16)


# Rendering


def test_a_live_frame_is_the_frame_rendered_again_from_the_saved_state(render):
    """After a step MuJoCo's derived fields lag one substep; a picture must depend on qpos alone."""
    envs, rng = script.BatchHalfCheetah(2, 100, 1), np.random.default_rng(0)
    envs.reset(seed=0)
    live, saved = [], []
    for _ in range(12):
        envs.step(rng.uniform(-1, 1, (2, 6)))
        live.append(render(envs.qpos).clone())
        saved.append(envs.qpos.copy())
    live, saved = torch.cat(live), np.concatenate(saved)
    assert torch.equal(script.Renderer(32, 2, "cpu")(saved), live)
    order = rng.permutation(len(saved))
    assert torch.equal(script.Renderer(32, 3, "cpu")(saved[order]), live[order])
    assert len(live.flatten(1).unique(dim=0)) == len(live)  # and the pictures do differ


def test_many_frames_are_rendered_in_pieces(render, demos):
    many = np.concatenate([demos["qpos"]] * 2)[:600]  # more than 256 a thread
    few = render(demos["qpos"])
    assert few.shape == (303, 32, 56) and few.dtype == torch.uint8
    expected = torch.cat([few] * 2)[:600]
    assert torch.equal(render(many), expected)
    assert torch.equal(script.Renderer(32, 2, "cpu")(many), expected)


def test_a_renderer_may_be_called_from_any_thread(render, demos):
    states = demos["qpos"][:6]
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(render, states).result(), render(states))


def test_the_picture_shows_the_animal_moving_not_the_world_passing(render, demos):
    """The camera follows: 1.33 m further on, one period of the floor, the picture is the same."""
    state = demos["qpos"][:1].copy()
    moved, bent = state + np.array([4 / 3] + [0] * 8), state.copy()
    bent[0, 3] += 0.5
    assert (render(state).int() - render(moved)).abs().float().mean() < 1
    assert (render(state).int() - render(bent)).abs().float().mean() > 1


def test_no_opengl_is_one_sentence(monkeypatch):
    def fail(width, height):
        raise RuntimeError("no display\nreally")

    monkeypatch.setattr(script.mujoco, "GLContext", fail)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(script.UserError, match=r"no OpenGL here \(RuntimeError\); install libegl1"):
        script.open_gl(8, 8)
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setitem(sys.modules, "mujoco.egl", None)  # as where libEGL is missing
    monkeypatch.setattr(script.sys, "platform", "linux")
    with pytest.raises(script.UserError, match="no OpenGL here .*; install libegl1"):
        script.open_gl(8, 8)


def test_mujoco_chooses_its_opengl_but_on_linux(monkeypatch):
    class Context:
        def __init__(self, width, height):
            self.current = False

        def make_current(self):
            self.current = True

    monkeypatch.setattr(script.mujoco, "GLContext", Context)
    for platform, wish in (("darwin", None), ("linux", "osmesa")):
        monkeypatch.setattr(script.sys, "platform", platform)
        if wish:
            monkeypatch.setenv("MUJOCO_GL", wish)
        assert script.open_gl(8, 8).current


# Autoencoder and latents


@pytest.mark.parametrize("height, width, latent_dim", [(16, 16, 3), (32, 56, 8), (56, 96, 32)])
def test_autoencoder_shapes(height, width, latent_dim):
    frames = random_frames(6, height, width)
    autoencoder = script.Autoencoder(frames, latent_dim, 2)
    latents = autoencoder.encode(frames)
    assert latents.shape == (6, latent_dim)
    assert autoencoder.decoder(latents).shape == (6, 1, height, width)
    many = autoencoder.encode_all(frames.view(3, 2, height, width))
    assert not many.requires_grad and torch.allclose(many, latents.view(3, 2, latent_dim), atol=1e-6)


def test_reconstruction_error_is_the_weighted_squared_error():
    frames = random_frames(3, 16)
    autoencoder = script.Autoencoder(frames, 4, 1)
    pixels = frames.double() / 255
    np.testing.assert_allclose(autoencoder.mean_frame, pixels.mean(0), rtol=1e-5)
    weight = 1 / (pixels.std(0) + 0.03)
    weight /= weight.mean()
    with torch.no_grad():
        latents = autoencoder.encode(frames)
        guess = autoencoder.decoder(latents).double()
        for b in range(3):
            expected = sum(
                weight[i, j] * (guess[b, 0, i, j] - (pixels[b, i, j] - pixels[:, i, j].mean())) ** 2
                for i in range(16)
                for j in range(16)
            )
            assert autoencoder.errors(latents, frames)[b].item() == pytest.approx(expected.item() / 256, rel=1e-4)


def autoencoder_only(args, frames) -> tuple:
    """Networks, the autoencoder's optimizer, and a rollout that shows some frames (T, N, H, W)."""
    nets = networks(args, frames.flatten(0, 1))
    parameters = [
        *nets.autoencoder.parameters(),
        *(nets.inverse.parameters() if nets.inverse else []),
    ]
    rollout = {"frame": frames, "ended": torch.zeros(frames.shape[:2], dtype=torch.bool)}
    rollout["executed"] = 2 * torch.rand((*frames.shape[:2], 6), generator=torch.Generator().manual_seed(0)) - 1
    return nets, {"autoencoder": Adam(parameters, lr=2e-3)}, rollout


def test_autoencoder_beats_the_mean_frame():
    qpos = script.load_demos(settings("--num-demos", "10"), ["qpos"])["qpos"]
    frames = script.Renderer(16, 1, "cpu")(qpos)
    train, heldout = frames[:808], frames[808:]
    args = settings(*"--ae-batch-size 64 --latent-dim 32 --inverse-coef 0 --image-size 16".split())
    nets, optimizers, rollout = autoencoder_only(args, train[:, None])
    generator, expert = torch.Generator().manual_seed(0), {"train_frames": train}
    script.update_autoencoder(nets, optimizers, expert, rollout, 150, args, generator)
    autoencoder = nets.autoencoder
    with torch.no_grad():
        mean_frame_error = (autoencoder.center(heldout).square() * autoencoder.weight).mean()
        error = autoencoder.errors(autoencoder.encode(heldout), heldout).mean()
    assert error < 0.6 * mean_frame_error


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
    steps = script.latent_steps(latents)
    for b in range(5):
        expected = torch.cat([*(latents[b, k + 1] - latents[b, k] for k in range(3)), latents[b, 3]])
        assert torch.equal(steps[b], expected)
    assert torch.equal(script.latent_steps(latents[:, :1]), latents[:, 0])


def test_what_the_expert_looks_like_changes_with_the_encoder():
    args = settings(*SMALL)
    frames, lengths = random_frames(9, 16), np.array([3, 4])
    demos = {"qpos": None, "lengths": lengths}
    expert = script.film_expert(demos, lambda qpos: frames, 3)
    assert len(expert["train_frames"]) == 4 and len(expert["heldout_frames"]) == 5
    nets, optimizers, rollout = autoencoder_only(args, frames[:, None])
    autoencoder = nets.autoencoder
    script.encode_expert(autoencoder, expert)
    with torch.no_grad():
        raw = script.latent_steps(autoencoder.encode(frames)[expert["windows"]])
    np.testing.assert_allclose(autoencoder.standardize.mean, raw.mean(0), atol=1e-6)
    expected = ((raw - raw.mean(0)) / raw.std(0, correction=0))[[1, 2, 3, 5, 6, 7, 8]]  # not an episode's first
    assert torch.allclose(expert["features"], expected, atol=1e-4)
    before = expert["features"].clone()
    script.update_autoencoder(nets, optimizers, expert, rollout, 3, args, torch.Generator().manual_seed(0))
    script.encode_expert(autoencoder, expert)
    assert not torch.allclose(expert["features"], before, atol=1e-3)


def test_latents_that_do_not_vary_have_no_influence():
    """Where a latent stands still in demonstrations, D and policy see 0, whatever the policy's does."""
    args, frames = settings(*SMALL), random_frames(9, 16)
    nets, demos = networks(args), {"qpos": None, "lengths": np.array([3, 4])}
    autoencoder, last = nets.autoencoder, nets.autoencoder.encoder[-1]
    expert = script.film_expert(demos, lambda qpos: frames, 3)
    last.weight.data[2], last.bias.data[2] = 0.0, 0.7
    script.encode_expert(autoencoder, expert)
    still = torch.arange(12) % 4 == 2  # in both steps and in the newest
    features = expert["features"]
    assert (features[:, still] == 0).all() and (features[:, ~still].std(0) > 0.5).all()
    torch.manual_seed(0)
    latents, actions, states = torch.randn(5, 3, 4), torch.zeros(5, 2, 6), np.zeros((5, 17))
    before = nets.observe(latents, actions, states)
    latents[..., 2] += 100 * torch.randn(5, 3)
    for x, y in zip(before, nets.observe(latents, actions, states)):
        assert torch.equal(x, y)
    latents[..., 1] += 0.1
    assert not torch.equal(before[2], nets.observe(latents, actions, states)[2])


# Collecting


def test_windows_start_with_a_repeated_frame_and_never_span_episodes():
    """Against a slow loop that encodes every window of every episode from its frames."""
    args, shown = settings(*SMALL, "--predictor-steps", "0"), []
    nets = networks(args)
    autoencoder = nets.autoencoder

    def render(qpos):
        shown.append(slide(qpos))
        return shown[-1]

    rollout, envs, episodes = rollout_of(nets, render, args)  # of 8 steps, one reset after the fifth
    assert rollout["ended"][4].all() and rollout["ended"].sum() == 2
    assert not rollout["terminated"].any()

    # Rendered were the start, five steps (the fifth before the reset), the new start, three steps.
    expected_obs, expected_next = [], []
    for episode in (shown[:6], shown[6:]):
        for t in range(len(episode)):
            with torch.no_grad():
                z = [autoencoder.encode(episode[max(t - k, 0)]) for k in (2, 1, 0)]
            window = torch.cat([z[1] - z[0], z[2] - z[1], z[2]], dim=1) / 1e-3  # the spread that networks() sets
            if t > 0:
                expected_next.append(window.clamp(-10, 10))
            if t < len(episode) - 1:
                expected_obs.append(window.clamp(-10, 10))
    features = rollout["features"]
    assert torch.allclose(rollout["obs"][..., :12], torch.stack(expected_obs), atol=1e-3)
    assert torch.allclose(rollout["next_obs"][..., :12], torch.stack(expected_next), atol=1e-3)
    assert torch.equal(features, rollout["next_obs"][..., :12])
    assert torch.equal(rollout["history"], rollout["obs"])

    # The policy's own last two actions follow, zeros before an episode has any.
    own, none = rollout["executed"], torch.zeros(2, 6)
    for t in range(8):
        start = 0 if t < 5 else 5
        past = [own[t - k] if t - k >= start else none for k in (2, 1)]
        assert torch.equal(rollout["obs"][t, :, 12:], torch.cat(past, dim=1))
        past = [own[t - 1] if t - 1 >= start else none, own[t]]
        assert torch.equal(rollout["next_obs"][t, :, 12:], torch.cat(past, dim=1))
    assert torch.equal(rollout["frame"], torch.stack([*shown[1:6], *shown[7:]]))
    assert torch.equal(torch.stack([slide(x.numpy()) for x in rollout["qpos"]]), rollout["frame"])

    # The next rollout goes on where this one stopped.
    more, _ = script.collect_frames(envs, render, nets, episodes, 1, torch.Generator().manual_seed(1))
    assert torch.allclose(more["obs"][0], rollout["next_obs"][-1], atol=1e-4)


def test_actions_are_sampled_kept_as_sampled_and_executed_as_clipped():
    args = settings(*SMALL)
    nets = networks(args)
    nets.agent.actor[-1].bias.data[6:] = 1.0
    seen, step = [], script.BatchHalfCheetah.step

    class Envs(script.BatchHalfCheetah):
        def step(self, actions):
            seen.append(actions)
            return step(self, actions)

    envs = Envs(2, 100, 1)
    episodes = script.begin_episodes(envs, slide, 3, seed=0)
    rollout, _ = script.collect_frames(envs, slide, nets, episodes, 10, torch.Generator().manual_seed(0))
    assert rollout["action"].abs().max() > 1 and rollout["executed"].abs().max() == 1
    np.testing.assert_array_equal(rollout["executed"].numpy(), np.stack(seen))
    assert torch.equal(rollout["executed"], rollout["action"].clamp(-1, 1))
    mean, log_std = nets.agent.gaussian(nets.agent.actor(rollout["obs"]))
    expected = script.gaussian_log_prob(rollout["action"], mean, log_std)
    assert torch.allclose(rollout["log_prob"], expected, atol=1e-3)
    still, _, _ = rollout_of(nets, slide, args, sampled=False)
    assert torch.allclose(still["action"], nets.agent.actor(still["obs"])[..., :6], atol=1e-5)


def test_deviations_keep_within_their_limits():
    agent = networks(settings(*SMALL)).agent
    assert (agent.actor[-1].bias[6:] == script.INITIAL_LOG_STD).all()
    output = torch.linspace(-20, 20, 60).view(5, 12)
    mean, log_std = agent.gaussian(output)
    assert torch.equal(mean, output[:, :6]) and torch.equal(log_std, output[:, 6:].clamp(-5, 2))
    normal, action = torch.distributions.Normal(mean, log_std.exp()), torch.randn(5, 6)
    log_prob, entropy = agent.log_prob_and_entropy(output, action)
    torch.testing.assert_close(log_prob, normal.log_prob(action).sum(-1))
    torch.testing.assert_close(entropy, normal.entropy().sum(-1))


def test_the_episodic_return_is_the_sum_of_an_episodes_rewards():
    args = settings(*SMALL)
    envs, nets = script.BatchHalfCheetah(2, 5, 1), networks(args)
    episodes, generator = (
        script.begin_episodes(envs, slide, 3, seed=0),
        torch.Generator().manual_seed(0),
    )
    first, log = script.collect_frames(envs, slide, nets, episodes, 3, generator)
    assert log == {}
    second, log = script.collect_frames(envs, slide, nets, episodes, 3, generator)
    expected = torch.cat([first["env_reward"], second["env_reward"][:2]]).sum(0).mean().item()
    assert log["charts/episodic_return"] == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(episodes["return"].float(), second["env_reward"][2], atol=1e-6)


def test_policy_on_states_sees_states():
    """By the mean and deviation of the demonstrated ones."""
    args = settings(*SMALL, "--policy-obs", "state")
    nets, states = networks(args), np.random.default_rng(0).normal(3, 2, (50, 17))
    rollout, _, _ = rollout_of(nets, slide, args)
    envs, mean, std = script.BatchHalfCheetah(2, 5, 1), states.mean(0), states.std(0)
    state, _ = envs.reset(seed=0)
    for t in range(8):
        np.testing.assert_allclose(rollout["obs"][t], (state - mean) / std, rtol=1e-5, atol=1e-6)
        state, _, _, _, info = envs.step(rollout["executed"][t].numpy())
        seen = (info["final_obs"] - mean) / std
        np.testing.assert_allclose(rollout["next_obs"][t], seen, rtol=1e-5, atol=1e-6)
    far, none = np.full((1, 17), 1e3), torch.zeros(1, 3, 4)
    assert (nets.observe(none, torch.zeros(1, 2, 6), far)[2] == script.INPUT_CLIP).all()


def test_a_policy_acts_on_what_it_gets_as_it_is():
    """What observe() returns is standardized already."""
    args = settings(*SMALL)
    nets = networks(args)
    rollout, _, _ = rollout_of(nets, slide, args)
    assert torch.allclose(rollout["output"], nets.agent.actor(rollout["obs"]), atol=1e-6)
    assert rollout["obs"].shape[-1] == nets.agent.actor[0].in_features
    values = nets.agent.critic(rollout["obs"])[..., 0]
    assert torch.equal(nets.agent.value(rollout["obs"]), values)


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_what_a_policy_gets_is_the_idle_prediction_and_the_last_action(frame_stack):
    args = settings(*SMALL, "--frame-stack", str(frame_stack))
    nets, sight = networks(args), 4 * min(frame_stack, 2)
    latents, actions = torch.randn(5, frame_stack, 4), torch.randn(5, frame_stack - 1, 6)
    nets.autoencoder.standardize.std.fill_(1.0)
    features, history, obs = nets.observe(latents, actions, np.zeros((5, 17)))
    assert torch.equal(features, script.latent_steps(latents).clamp(-10, 10))
    assert torch.equal(history, torch.cat([features, actions.flatten(1)], dim=1))
    for row, x, past in zip(obs, history, actions):
        expected = nets.predictor(torch.cat([x, torch.zeros(12)])).clamp(-10, 10)
        assert torch.allclose(row[:sight], expected, atol=1e-5)
        assert torch.equal(row[sight:], past[-1] if frame_stack > 1 else past.flatten())
    assert obs.shape == (5, nets.agent.actor[0].in_features)


# Gradients: the encoder learns from reconstruction and the inverse model, from nothing else


def test_reward_and_policy_losses_do_not_move_the_encoder():
    args, generator = settings(*SMALL, "--ae-batch-size", "32"), torch.Generator().manual_seed(0)
    nets = networks(args)
    optimizers = script.make_optimizers(nets, args)
    rollout, _, _ = rollout_of(nets, slide, args)
    assert not any(x.requires_grad for x in rollout.values())
    expert = {"features": torch.randn(20, 12), "train_frames": random_frames(9, 16)}
    before = {name: x.clone() for name, x in nets.state_dict().items()}
    script.update_latent_discriminator(nets, optimizers, expert, rollout, args, generator)
    rewards, _ = script.compute_latent_rewards(nets, rollout, script.RewardNormalizer(), args)
    script.update_policy(nets.agent, optimizers["agent"], rollout, rewards, args, generator)
    script.update_predictor(nets, optimizers, rollout, 2, generator)
    moved = {name.split(".")[0] for name, x in nets.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"disc", "agent", "predictor"}
    eyes = [*nets.autoencoder.parameters(), *nets.inverse.parameters()]
    assert all(p.grad is None for p in eyes)
    script.update_autoencoder(nets, optimizers, expert, rollout, 1, args, generator)
    assert all(p.grad.abs().sum() > 0 for p in eyes)


def test_stacks_longer_than_a_snippet_teach_the_inverse_model():
    count = script.SNIPPET + 4
    args = settings(*SMALL, "--frame-stack", str(count), "--ae-batch-size", str(2 * count))
    nets, optimizers, rollout = autoencoder_only(args, random_frames(30, 16)[:, None])
    expert, generator = {"train_frames": random_frames(30, 16)}, torch.Generator().manual_seed(0)
    log = script.update_autoencoder(nets, optimizers, expert, rollout, 1, args, generator)
    assert log["ae/inverse"] > 0 and all(p.grad.abs().sum() > 0 for p in nets.inverse.parameters())
    log = script.update_autoencoder(nets, optimizers, expert, rollout, 1, args, generator, with_inverse=False)
    assert log["ae/inverse"] == 0 and all(p.grad is None for p in nets.inverse.parameters())


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
    """An inverse model that reads the last step is exact where the action is it, standardized."""
    torch.manual_seed(0)
    latents = torch.randn(50, 3, 2) * torch.tensor([5.0, 0.1])
    step = latents[:, 2] - latents[:, 1]
    actions = step / (step.std(0, correction=0) + 1e-2)
    assert script.inverse_loss(lambda seen: seen[:, 2:4], latents, actions).item() == pytest.approx(0, abs=1e-10)
    assert script.inverse_loss(lambda seen: seen[:, 4:6], latents, actions).item() > 0.1


def test_inverse_loss_does_not_pull_on_the_size_of_the_latents():
    """Guesses that are worse than none would otherwise shrink the latents to nothing: a gradient
    along them is 0."""
    torch.manual_seed(0)
    latents, actions = 10 * torch.randn(64, 4, 3), torch.rand(64, 6)
    inverse = script.relu_mlp([12, 16, 6], torch.Generator().manual_seed(0))
    latents.requires_grad_(True)
    (grad,) = torch.autograd.grad(script.inverse_loss(inverse, latents, actions), latents)
    assert abs((grad * latents).sum()) < 1e-3 < (grad * latents).abs().sum()


def test_the_inverse_model_shapes_the_encoder_and_not_the_decoder():
    changed = []
    for inverse_coef in ("0.001", "10"):
        args = settings(*SMALL, "--ae-batch-size", "32", "--inverse-coef", inverse_coef)
        nets, _, rollout = autoencoder_only(args, random_frames(60, 16).view(20, 3, 16, 16))
        optimizers = {"autoencoder": torch.optim.SGD(nets.parameters(), lr=0.1)}
        expert, generator = {"train_frames": random_frames(9, 16)}, torch.Generator().manual_seed(0)
        script.update_autoencoder(nets, optimizers, expert, rollout, 1, args, generator)
        changed.append(nets.autoencoder)
    assert not same(changed[0].encoder.state_dict(), changed[1].encoder.state_dict())
    assert same(changed[0].decoder.state_dict(), changed[1].decoder.state_dict())


def test_the_inverse_model_learns_which_action_was_taken():
    """And each window is paired with the action that led to its last frame, within an episode."""
    flags = "--ae-batch-size 128 --inverse-coef 1 --latent-dim 16 --image-size 16 --frame-stack 4"
    args, generator = settings(*flags.split()), torch.Generator().manual_seed(0)
    render = script.Renderer(16, 1, "cpu")
    rollout, _, _ = rollout_of(networks(args, random_frames(4, 16, 24)), render, args, envs=8, limit=100, steps=50)
    frames = rollout["frame"].flatten(0, 1)
    nets, expert = networks(args, frames), {"train_frames": frames}
    eyes = [*nets.autoencoder.parameters(), *nets.inverse.parameters()]
    data = ({"autoencoder": Adam(eyes, lr=2e-3)}, expert, rollout)
    script.update_autoencoder(nets, *data, 60, args, generator, with_inverse=False)
    script.update_autoencoder(nets, *data, 200, args, generator)
    errors = [script.update_autoencoder(nets, *data, 1, args, generator) for _ in range(5)]
    assert np.mean([x["ae/inverse"] for x in errors]) < 0.6 * rollout["executed"].var()


def test_windows_that_span_two_episodes_teach_no_action():
    args = settings(*SMALL)
    nets, optimizers, rollout = autoencoder_only(args, random_frames(60, 16).view(30, 2, 16, 16))
    expert, generator = {"train_frames": random_frames(9, 16)}, torch.Generator().manual_seed(0)
    rollout["ended"][1::3] = True  # rows 2 to 4, 5 to 7 ... are the only windows of three
    rows = torch.arange(30) % 3 != 1
    rollout["executed"][rows] = torch.nan  # actions that only a wrong window tells
    for _ in range(10):
        log = script.update_autoencoder(nets, optimizers, expert, rollout, 1, args, generator)
        assert math.isfinite(log["ae/inverse"])


def test_the_predictor_learns_what_two_actions_lead_to_and_no_pair_spans_two_episodes():
    """A world whose sight is a sum: the predictor finds it. Rows that only a wrong pair reads are
    NaN."""
    torch.manual_seed(0)
    steps, actions, history = 40, torch.rand(40, 8, 6) - 0.5, torch.randn(40, 8, 2 * 4 + 6)
    ended = torch.zeros(steps, 8, dtype=torch.bool)
    ended[9::10] = True
    features = torch.full((steps, 8, 8), torch.nan)
    features[1:] = history[:-1, :, :8] + actions[:-1, :, :1] - 2 * actions[1:, :, :1]
    features[10::10] = torch.nan
    nets = networks(settings(*SMALL, "--frame-stack", "2"))
    optimizers, generator = (
        {"predictor": Adam(nets.predictor.parameters())},
        torch.Generator().manual_seed(0),
    )
    rollout = {"features": features, "history": history, "executed": actions, "ended": ended}
    first = script.update_predictor(nets, optimizers, rollout, 5, generator)["ae/prediction"]
    script.update_predictor(nets, optimizers, rollout, 300, generator)
    last = script.update_predictor(nets, optimizers, rollout, 5, generator)["ae/prediction"]
    assert last < 0.1 * first
    idle = nets.predictor(torch.cat([history[0], torch.zeros(8, 12)], dim=1))
    assert (idle - history[0, :, :8]).square().mean() < 0.3


def test_first_layers_of_many_inputs_take_smaller_steps():
    for flags, inputs, scale in (
        (["--policy-obs", "state"], 17, 1.0),
        (["--latent-dim", "67"], 140, 0.2),
    ):
        args = settings(*SMALL, *flags)
        nets = networks(args)
        agent, optimizer = nets.agent, script.make_optimizers(nets, args)["agent"]
        assert agent.actor[0].in_features == inputs
        steps = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(steps) == len(list(agent.parameters()))
        assert steps[id(agent.actor[0].weight)] == steps[id(agent.critic[0].bias)] == pytest.approx(2e-3 * scale)
        assert steps[id(agent.actor[4].bias)] == steps[id(agent.actor[2].weight)] == 2e-3


def test_every_network_is_trained_by_one_optimizer():
    args = settings(*SMALL)
    nets = networks(args)
    optimizers = script.make_optimizers(nets, args).values()
    trained = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in nets.parameters())


# Discriminator and reward


def test_discriminator_tells_the_expert_and_the_reward_says_so():
    args, generator = (
        settings(*SMALL, "--disc-steps", "60", "--disc-batch-size", "64"),
        torch.Generator().manual_seed(0),
    )
    nets = networks(args)
    optimizers = {"disc": Adam(nets.disc.parameters(), lr=3e-3)}
    features = torch.randn(10, 4, 12, generator=generator) - 1
    features[5:, :2] += 2  # these look like the expert's
    expert = {"features": torch.randn(50, 12, generator=generator) + 1}
    rollout = {"features": features, "env_reward": torch.full((10, 4), torch.nan)}
    log = script.update_latent_discriminator(nets, optimizers, expert, rollout, args, generator)
    assert log["disc/expert_prob"] > 0.6 > log["disc/policy_prob"]
    normalizer = script.RewardNormalizer()
    rewards, log = script.compute_latent_rewards(nets, rollout, normalizer, args)
    with torch.no_grad():
        d = torch.sigmoid(nets.disc(features)).squeeze(-1).double()
    plain = -torch.log(1 - d)
    assert rewards["absorbing"] == 0  # a cheetah's task does not end
    rewards = rewards["steps"]
    assert torch.allclose(rewards.double(), (plain - plain.mean()) / plain.std(correction=0), atol=1e-3)
    assert rewards[5:, :2].min() > rewards[:5].mean() and math.isnan(log["reward/env_mean"])
    args.normalize_reward = False
    rewards, _ = script.compute_latent_rewards(nets, rollout, normalizer, args)
    assert torch.allclose(rewards["steps"].double(), plain, atol=1e-4)
    assert log["reward/gail_mean"] == pytest.approx(plain.mean().item(), rel=1e-4)


def test_rewards_are_normalized_by_those_of_all_processes(monkeypatch):
    args = settings(*SMALL)
    nets, features = networks(args), torch.randn(5, 4, 12)
    rollout = {"features": features, "env_reward": torch.zeros(5, 4)}
    monkeypatch.setattr(script, "all_gather", lambda x: torch.cat([x, x + 4]))
    rewards, _ = script.compute_latent_rewards(nets, rollout, script.RewardNormalizer(), args)
    with torch.no_grad():
        plain = torch.nn.functional.softplus(nets.disc(features)).squeeze(-1)
    everyones = torch.cat([plain, plain + 4])
    expected = (plain - everyones.mean()) / everyones.std(correction=0)
    assert torch.allclose(rewards["steps"], expected, atol=1e-4)


def test_reconstruction_errors_look_at_the_whole_rollout(tmp_path):
    autoencoder, frames = script.Autoencoder(random_frames(9, 16), 4, 1), random_frames(600, 16)
    expert = {"train_frames": frames[:300], "heldout_frames": frames[:0]}
    row = script.reconstruct(autoencoder, expert, {"frame": frames.view(300, 2, 16, 16)}, tmp_path / "a.png")
    assert row.keys() == {
        "ae/recon_expert",
        "ae/recon_policy",
    }  # one demonstration: nothing is held out
    changed = frames.clone()
    changed[300:] = 0  # the later half of the steps
    with torch.no_grad():
        chosen = changed[torch.linspace(0, 599, 256).long()]
        expected = autoencoder.errors(autoencoder.encode(chosen), chosen).mean().item()
    rollout = {"frame": changed.view(300, 2, 16, 16)}
    again = script.reconstruct(autoencoder, expert, rollout, tmp_path / "b.png")
    assert again["ae/recon_policy"] == pytest.approx(expected)
    assert abs(expected - row["ae/recon_policy"]) > 0.1 * expected
    picture = script.imageio.imread(tmp_path / "b.png")
    assert picture.shape == (3 * 16, 8 * 16)
    assert np.array_equal(picture[:16, :16], frames[0]) and not picture[:16, -16:].any()


# Returns


def test_random_return_is_the_mean_of_20_episodes_with_uniform_actions(monkeypatch):
    seen, step = [], script.BatchHalfCheetah.step

    def note(self, actions):
        result = step(self, actions)
        seen.append((actions, result[1]))
        return result

    monkeypatch.setattr(script.BatchHalfCheetah, "step", note)
    value = script.random_return(50, 3)
    actions, rewards = map(np.array, zip(*seen))
    assert actions.shape == (50, 20, 6) and np.abs(actions).max() <= 1
    assert abs(actions.mean()) < 0.03 and actions.var() == pytest.approx(1 / 3, rel=0.05)
    assert value == pytest.approx(sum(rewards[t, n] for t in range(50) for n in range(20)) / 20)
    assert value == script.random_return(50, 3) != script.random_return(50, 4)


@pytest.mark.parametrize(
    "demos_mean, random, score",
    [(100, 20, 0.5), (-20, -100, 2), (100, 100, None), (50, 60, None), (math.nan, 0, None)],
)
def test_a_score_is_0_for_chance_and_1_for_the_demonstrations(demos_mean, random, score):
    demos = {"returns": demos_mean + np.array([-10.0, 10.0]), "random_return": random}
    metrics = script.return_metrics(np.array([40.0, 80.0]), demos)
    expected = {"eval/return_mean": 60, "eval/return_std": 20}
    if score:
        expected["eval/normalized_score"] = score
    assert metrics == pytest.approx(expected)
    assert script.return_metrics(np.array([1.0, math.nan]), demos) == {}


def test_90_percent_is_of_the_score_and_twice_in_a_row(tmp_path, monkeypatch):
    """Halfway from -100 to 100 is a score of 0.5, 80 of 0.9."""
    demos = {"returns": np.array([100.0]), "random_return": -100.0}
    monkeypatch.setattr(script, "final_evaluation", lambda *args: [np.array([50.0, 70.0])] * 2)
    rows = [{"global_step": 1}]
    for step, x in enumerate((82.0, 78.0, 90.0, 81.0, 70.0, 95.0), 2):
        rows.append({"global_step": step} | script.return_metrics(np.array([x]), demos))
    args = settings("--no-capture-video")
    for count, expected in ((7, 4), (4, None)):
        summary = script.report(None, None, demos, rows[:count], 2.0, args, tmp_path)
        assert summary.get("steps_to_90") == expected
    assert summary["eval/normalized_score"] == pytest.approx(0.8)
    assert (summary["best/step"], summary["best/return_mean"]) == (4, 90)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


# Whole runs


@pytest.fixture(scope="module")
def finished(short_demos, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    mini(folder, "--capture-video")
    return folder / "run"


def test_miniature_run_moves_all_networks_and_writes_its_files(finished):
    run, summary = finished, json.loads((finished / "summary.json").read_text())
    files = {path.name for path in run.iterdir()}
    expected = {
        "config.json",
        "metrics.csv",
        "summary.json",
        "checkpoint.pt",
        "policy.pt",
        "evaluation.npz",
    }
    assert files == expected | {"curves.png", "reconstructions.png", "policy.gif"}
    assert summary["env_steps"] == 500 and math.isfinite(summary["eval/return_mean"])
    drawn = script.load_demos(script.parse_args(MINI), ["qpos"])
    assert summary["demos_return_mean"] == pytest.approx(drawn["returns"].mean())
    assert summary["random_return_mean"] == script.random_return(25, 1)
    gain = summary["demos_return_mean"] - summary["random_return_mean"]
    score = (summary["eval/return_mean"] - summary["random_return_mean"]) / gain
    assert summary["eval/normalized_score"] == pytest.approx(score)
    args = script.parse_args(MINI)
    fresh = script.Networks(random_frames(4, 32, 56), np.zeros((1, 17)), args, torch.Generator().manual_seed(1))
    torch.manual_seed(args.seed)
    again = script.Networks(random_frames(4, 32, 56), np.zeros((1, 17)), args, torch.Generator().manual_seed(1))
    saved = checkpoint_of(run)["networks"]
    for name, value in fresh.named_parameters():
        assert saved[name].shape == value.shape
        assert not torch.equal(saved[name], value), f"{name} did not move"
        assert not torch.equal(saved[name], again.state_dict()[name]), f"{name} did not move"
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["global_step"]) for row in rows] == [300, 400, 500]
    for name in "ae/recon_heldout ae/prediction ae/inverse disc/loss reward/gail_std".split():
        assert math.isfinite(float(rows[-1][name])), name
    assert all(float(rows[0][f"time/{name}"]) > 0 for name in ("rollout", "discriminator", "update", "autoencoder"))
    returns = np.load(run / "evaluation.npz")["mean_action"]
    assert returns.shape == (25, 2) and returns[-1].mean() == pytest.approx(summary["eval/return_mean"])
    film = script.imageio.mimread(run / "policy.gif")
    assert len(film) == 25 and film[0].shape[:2] == (168, 288 + 4 + 288)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--policy-obs", "state", "--num-steps", "20"],  # rollouts end within episodes
    ],
)
def test_resume_equals_uninterrupted(tmp_path, flags, monkeypatch, finished):
    whole_run = finished
    if flags:
        mini(tmp_path, *flags, name="whole")
        whole_run = tmp_path / "whole"
    step, count = script.BatchHalfCheetah.step, [0]

    def die(self, actions):
        count[0] += self.num_envs == 4  # not an evaluation's
        if count[0] == 110:
            raise Killed
        return step(self, actions)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script.BatchHalfCheetah, "step", die)
        mini(tmp_path, *flags, name="cut")
    assert not (tmp_path / "cut/summary.json").exists()
    script.main(["--resume", str(tmp_path / "cut/checkpoint.pt")])
    whole, cut = checkpoint_of(whole_run), checkpoint_of(tmp_path / "cut")
    assert same(whole["networks"], cut["networks"])
    assert torch.equal(whole["generator"], cut["generator"])
    assert rows_of(whole_run) == rows_of(tmp_path / "cut")


def test_a_finished_run_goes_on_when_it_is_given_more(tmp_path, capsys, finished):
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = str(tmp_path / "run/checkpoint.pt")
    assert "this run is finished" in refused(["--resume", checkpoint], capsys)
    script.main(["--resume", checkpoint, "--total-timesteps", "800"])
    steps = [row["global_step"] for row in rows_of(tmp_path / "run")]
    assert steps == ["300", "400", "500", "600", "700", "800"]
    assert rows_of(tmp_path / "run")[:3] == rows_of(finished)

    # Step sizes fall along the new schedule, but for D's. The autoencoder came from its pretraining
    # with a third (6 steps are too few for a fifth).
    optimizers = checkpoint_of(tmp_path / "run")["optimizers"]
    shares = {name: x["param_groups"][0]["lr"] for name, x in optimizers.items()}
    last = {"agent": 2e-3 / 6, "autoencoder": 1e-3 / 3 / 6, "predictor": 1e-3 / 6}
    assert shares == pytest.approx({"disc": 1e-3} | last)


def test_nothing_but_pixels_reaches_the_learner(tmp_path, monkeypatch, finished):
    """True state and true reward filled with NaN, in the environment and in the demonstrations: not
    a bit changes."""
    step, reset, load = (
        script.BatchHalfCheetah.step,
        script.BatchHalfCheetah.reset,
        script.load_demos,
    )

    def blind_step(self, actions):
        obs, rewards, terminated, truncated, info = step(self, actions)
        info = {"final_obs": info["final_obs"] * np.nan, "final_states": info["final_states"]}
        info["final_states"][:, 9:] = np.nan  # frames are made of the positions
        return obs * np.nan, rewards * np.nan, terminated, truncated, info

    def blind_demos(*args, **kwargs):
        demos = load(*args, **kwargs)
        for name in ("observations", "obs", "actions", "rewards", "returns", "qvel"):
            demos[name][:] = np.nan
        return demos

    def blind_reset(self, **kwargs):
        obs, info = reset(self, **kwargs)
        return obs * np.nan, info

    monkeypatch.setattr(script.BatchHalfCheetah, "step", blind_step)
    monkeypatch.setattr(script.BatchHalfCheetah, "reset", blind_reset)
    monkeypatch.setattr(script, "load_demos", blind_demos)
    assert not any("return" in name for name in mini(tmp_path, name="blind"))
    rows = rows_of(tmp_path / "blind")  # the NaNs were really there
    assert all(math.isnan(float(row["reward/env_mean"])) for row in rows)
    assert "ae/recon_policy" in rows[-1] and "eval/return_mean" not in rows[-1]
    clean, blind = (checkpoint_of(x)["networks"] for x in (finished, tmp_path / "blind"))
    assert same(clean, blind)


@pytest.mark.parametrize(
    "flags",
    [
        ["--policy-obs", "state", "--frame-stack", "2"],
        ["--frame-stack", "1", "--no-anneal-lr", "--num-demos", "1"],
        ["--predictor-steps", "0", "--pretrain-steps", "0"],
        ["--ae-steps", "0", "--inverse-coef", "0", "--no-normalize-reward"],
    ],
)
def test_variants_run_and_their_policy_can_be_evaluated(tmp_path, flags, capsys):
    summary = mini(tmp_path, *flags)
    course = np.load(tmp_path / "run/evaluation.npz")["sampled"]
    (tmp_path / "run/evaluation.npz").unlink()
    capsys.readouterr()
    script.main(["--evaluate", str(tmp_path / "run/policy.pt"), "--eval-episodes", "2", "--threads", "1"])
    mean = f"{summary['eval/return_mean']:.1f} ± {summary['eval/return_std']:.1f}"
    assert mean in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(tmp_path / "run/evaluation.npz")["sampled"], course)


def test_a_diverged_run_stops_with_one_sentence(tmp_path, monkeypatch, capsys):
    update = script.update_policy

    def diverge(*args):
        return update(*args) | {"losses/value_loss": math.inf}

    monkeypatch.setattr(script, "update_policy", diverge)
    with pytest.raises(SystemExit) as stopped:
        mini(tmp_path)
    assert stopped.value.code == 2 and "training diverged at step 300" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_environments_that_processes_cannot_divide_are_refused(monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(
        script.UserError,
        match="--num-envs is 64, but 3 processes divide it; give a multiple of that",
    ):
        settings()


def test_alone_nothing_is_exchanged():
    x = torch.arange(3.0)
    assert script.all_gather(x) is x


def test_two_threads_give_what_one_gives():
    """Physics and rendering exactly; networks up to rounding, so they are left out."""
    finished = []
    for threads in (1, 2):
        envs = script.BatchHalfCheetah(5, 7, threads)
        render, rng = script.Renderer(16, threads, "cpu"), np.random.default_rng(0)
        envs.reset(seed=3)
        shown = []
        for _ in range(10):
            envs.step(rng.uniform(-1, 1, (5, 6)))
            shown.append(render(envs.qpos))
        finished.append(torch.stack(shown))
    assert torch.equal(*finished)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda(tmp_path):
    assert math.isfinite(mini(tmp_path, "--cuda")["eval/return_mean"])
    script.main(["--resume", str(tmp_path / "run/checkpoint.pt"), "--total-timesteps", "600"])
    script.main(["--evaluate", str(tmp_path / "run/policy.pt"), "--eval-episodes", "2", "--cuda"])


# Users' mistakes


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        script.main(argv)
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1
    return text


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--frame-stack", "0"], "--frame-stack"),
        (["--frame-stack", "101", "--ae-batch-size", "512", "--num-steps", "200"], "--frame-stack"),
        (["--image-size", "60"], "--image-size"),
        (["--image-size", "8"], "--image-size"),
        (["--ae-batch-size", "7"], "--ae-batch-size"),
        (["--num-steps", "3"], "--num-steps"),
        (["--predictor-steps", "-1"], "--predictor-steps"),
        (["--inverse-coef", "-1"], "--inverse-coef"),
        (["--latent-dim", "0"], "--latent-dim"),
        (["--env-id", "Hopper-v4"], "--env-id"),
        (["--total-timesteps", "100"], "--total-timesteps"),
        (["--num-minibatches", "10000"], "--num-minibatches"),
        (["--demos", "nowhere.npz"], "nowhere.npz"),
        (["--evaluate", "nowhere.pt"], "nowhere.pt"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
        (["--resume", "nowhere.pt", "--seed", "3"], "drop the other flags"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, flags, told, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demos = [] if "--demos" in flags or "--resume" in flags else ["--demos", str(DEMOS)]
    assert told in refused([*demos, *flags], capsys)
    assert not list(tmp_path.iterdir())


def test_demonstrations_without_physics_state(demo_file, capsys, tmp_path):
    out = tmp_path / "out"
    assert "'qpos' is missing" in refused(["--demos", demo_file(), "--output-dir", str(out)], capsys)
    assert not out.exists()


def test_files_of_another_script_or_version_are_refused(tmp_path, capsys):
    settings_of_another = vars(script.Args()) | {"zoom": 1}
    for flag, kind in (("--resume", "checkpoint"), ("--evaluate", "policy")):
        path = str(tmp_path / "x.pt")
        torch.save({"kind": f"gail_ppo {kind}"}, path)
        assert f"it is a gail_ppo {kind}" in refused([flag, path], capsys)
        torch.save({"kind": f"gail_pixels_ae {kind}", "args": settings_of_another}, path)
        assert "another version" in refused([flag, path], capsys)


def test_cuda_without_cuda(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert "--cuda" in refused(["--cuda", "--demos", str(DEMOS)], capsys)


def test_the_promised_command_parses(monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: True)
    args = script.parse_args(["--frame-stack", "4", "--cuda"])
    assert args.frame_stack == 4 and args.cuda
