"""gail_pixels_ae.py: rendering, latents, and what may and may not reach the learner."""

import copy
import csv
import json
import math
import shutil
import subprocess
import sys
from collections import deque

import gymnasium as gym
import matplotlib.axes
import mujoco
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEMOS, ROOT
from opengl_silhouettes import ROWS, STORED
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
SPACE = gym.spaces.Box(-1.0, 1.0, (6,), np.float32)
BODIES = [f"{body}-{version}" for body in script.CAMERAS for version in ("v4", "v5")]


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
    return renderer(32)


@pytest.fixture(scope="module")
def demos():
    return script.load_demos(settings("--num-demos", "3"), [])


def renderer(height: int, env_id="HalfCheetah-v4", threads=1) -> script.CapsuleRenderer:
    task = {"env_id": env_id, "max_episode_steps": 100}
    return script.CapsuleRenderer(script.make_world(task, 1, settings()), height, threads)


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
    nets = script.Networks(frames, states, SPACE, args, torch.Generator().manual_seed(0))
    nets.autoencoder.standardize.std.fill_(1e-3)
    return nets


def rollout_of(nets, render, args, envs=2, limit=5, steps=8, sampled=True):
    """A first rollout, the environments and the episodes, which go on."""
    simulations = script.BatchHalfCheetah(envs, limit, 1)
    episodes = script.begin_episodes(simulations, render, args.frame_stack, 0, limit)
    generator = torch.Generator().manual_seed(0) if sampled else None
    rollout, _ = collect(simulations, render, nets, args, episodes, steps, generator)
    return rollout, simulations, episodes


def collect(envs, render, nets, args, episodes, steps, generator):
    graphs = script.make_graphs(nets, render, {}, args)
    return script.collect_frames(envs, render, nets, graphs, episodes, steps, generator)


class Shades:
    """A renderer whose pictures are plain: every pixel tells the animal's pitch."""

    def prepare(self, obs) -> torch.Tensor:
        return torch.from_numpy(obs[:, 1:2] * 1000 % 256).float()

    def states(self, obs) -> torch.Tensor:
        return torch.from_numpy(obs)

    def draw(self, poses) -> torch.Tensor:
        return poses.to(torch.uint8)[..., None].repeat(1, 16, 16)

    def __call__(self, obs) -> torch.Tensor:
        return self.draw(self.prepare(obs))


class Film:
    """Stands where a renderer would: whatever it is asked for, these are the frames."""

    def __init__(self, frames):
        self.sizes, self.height, self.width = [frames.shape[1:]], *frames.shape[1:]


# Rendering


def played(env_id: str, steps: int) -> tuple[list, np.ndarray]:
    """qpos and observations of random steps."""
    env, states, seen = gym.make(env_id), [], []
    obs, _ = env.reset(seed=1)
    env.action_space.seed(1)
    for _ in range(steps):
        states.append(env.unwrapped.data.qpos.copy())
        seen.append(obs)
        obs, _, terminated, _, _ = env.step(env.action_space.sample())
        if terminated:
            obs, _ = env.reset()
    return env.unwrapped.model, states, np.array(seen)


@pytest.mark.parametrize("env_id", BODIES)
def test_poses_are_where_mujoco_has_the_geoms(env_id):
    """From observations alone, against MuJoCo's kinematics of the true positions."""
    model, states, obs = played(env_id, 70)  # more than POSES_AT_ONCE
    data, render = mujoco.MjData(model), renderer(32, env_id)
    *_, middle, degrees, _ = script.CAMERAS[env_id.split("-")[0]]
    angle, poses = math.radians(degrees), render.prepare(obs).double().numpy()
    up = np.array([0, math.sin(angle), math.cos(angle)])
    away = np.array([0, math.cos(angle), -math.sin(angle)])
    for qpos, pose in zip(states[::23], poses[::23]):
        data.qpos[:] = qpos
        mujoco.mj_forward(model, data)
        expected = []
        for i in range(model.ngeom):
            if model.geom_type[i] == int(mujoco.mjtGeom.mjGEOM_PLANE):
                continue
            seen_from = data.subtree_com[1] * [1, 1, 0] + [0, 0, middle]
            place, axis = data.geom_xpos[i] - seen_from, data.geom_xmat[i].reshape(3, 3)[:, 2]
            half = model.geom_size[i, 1] * (model.geom_type[i] == int(mujoco.mjtGeom.mjGEOM_CAPSULE))
            shown = [place[0], place @ up, half * axis[0], half * axis @ up, model.geom_size[i, 0]]
            expected.append((-(place @ away).round(6), i, shown))
        expected = [shown for *_, shown in sorted(expected)]  # the farthest first
        np.testing.assert_allclose(pose[:, :5], expected, atol=1e-5)
    frames = render(obs)
    covered = (frames.amax(0) > 30) & (render.background == 0)  # above the ground
    assert covered.any() and not covered[:, 0].any() and not covered[:, -1].any()  # all of it is in view


def test_a_capsule_is_drawn_as_a_slow_loop_draws_it():
    """The part of each pixel that is within the radius of the axis, to first order; in float64."""
    render, rng = renderer(32), np.random.default_rng(0)
    pixel, radius, brightness = 1.3 / 32, 0.08, 200.0
    for _ in range(3):
        middle, half = rng.uniform(-0.3, 0.3, 2), rng.uniform(-0.3, 0.3, 2)
        frame = render.draw(torch.tensor([[[*middle, *half, radius, brightness]]]).float())[0].numpy()
        for i in range(32):
            for j in range(56):
                at = np.array([(j + 0.5 - 28) * pixel, (16 - 0.5 - i) * pixel]) - middle
                nearest = np.clip(at @ half / (half @ half), -1, 1) * half
                square = ((at - nearest) ** 2).sum()
                cover = np.clip(0.5 + (radius**2 - square) / (2 * radius * pixel), 0, 1)
                ground = 27 * np.clip(0.5 - (0.56 + (16 - 0.5 - i) * pixel) / pixel, 0, 1)
                expected = cover * brightness * (1 - 0.4 * square / radius**2) + (1 - cover) * ground
                assert abs(frame[i, j] - expected) < 0.51


def test_what_is_nearer_covers_what_is_behind_and_spheres_are_round():
    render = renderer(64)
    far, near = [0, 0, 0.4, 0, 0.1, 100.0], [0, 0, 0, 0, 0.2, 250.0]
    frame = render.draw(torch.tensor([[far, near]]))[0]
    assert frame[32, 56] > 240 and 90 < frame[32, 56 + 16] < 110  # 0.3 m to the right
    assert render.draw(torch.tensor([[near, far]]))[0][32, 56] < 110
    ball = render.draw(torch.tensor([[near]]))[0]
    assert torch.equal(ball, ball.flip(0)) is False  # the ground is below
    above = ball[:32, :].int()
    assert torch.equal(above, above.flip(1)) and (above[:, 56 - 32 :] > 60).sum() == pytest.approx(
        math.pi / 2 * (0.2 / 1.3 * 64) ** 2, rel=0.05
    )


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Ant-v5"])
def test_a_frame_does_not_depend_on_its_batch(env_id):
    _, _, obs = played(env_id, 70)
    render = renderer(32, env_id)
    many, order = render(obs), np.random.default_rng(0).permutation(70)
    width = {"HalfCheetah-v4": 56, "Ant-v5": 40}[env_id]
    assert many.shape == (70, 32, width) and many.dtype == torch.uint8
    assert torch.equal(render(obs[order]), many[order])
    assert torch.equal(torch.cat([render(x[None]) for x in obs]), many)
    assert torch.equal(render.draw(render.prepare(obs)), many)
    assert torch.equal(renderer(32, env_id, threads=2)(obs), many)
    assert len(many.flatten(1).unique(dim=0)) > 60  # and the pictures do differ


def test_the_picture_shows_the_animal_moving_not_the_world_passing(demos):
    """Nothing but the eight positions in the observation counts, and these do; one of them is the height."""
    render, obs = renderer(32), demos["observations"][:1].astype(np.float64)
    moved, bent, lifted = (np.repeat(obs, 1, axis=0) for _ in range(3))
    moved[:, 8:] += 5.0  # velocities
    bent[0, 3] += 0.5
    lifted[0, 0] += 3 * 1.3 / 32
    assert torch.equal(render(obs), render(moved))
    assert (render(obs).int() - render(bent)).abs().float().mean() > 1
    assert torch.allclose(render(obs)[0, 3:26].float(), render(lifted)[0, :23].float(), atol=1)


def overlaps(path) -> list[float]:
    """Intersection over union of our silhouettes, at three times the size, and those in a file."""
    obs = script.load_demos(settings(), [])["observations"][ROWS]
    mine, theirs = renderer(168)(obs).numpy() > 60, np.load(path)["silhouettes"]
    return [(a & b).sum() / (a | b).sum() for a, b in zip(mine, theirs, strict=True)]


def test_silhouettes_are_those_that_mujocos_opengl_once_drew():
    assert min(overlaps(STORED)) > 0.97


def test_silhouettes_are_those_that_mujocos_opengl_draws(tmp_path):
    command = [sys.executable, str(ROOT / "tests/opengl_silhouettes.py"), str(tmp_path / "new.npz")]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no OpenGL here")
    assert min(overlaps(tmp_path / "new.npz")) > 0.97


def test_positions_that_are_no_numbers_are_named():
    """A picture of them would be of nothing; velocities are not drawn."""
    render = renderer(32, "Hopper-v4")
    obs = np.zeros((3, 11))
    obs[:, 7] = np.nan
    render(obs)
    obs[1, 2] = np.nan
    with pytest.raises(script.UserError, match=r"dimensions \[2\] of an observation are not finite"):
        render(obs)


def hopper_with(tmp_path, name: str, body: str, **options):
    """Vector environments of a hopper with one more geom, under a name of its own."""
    assets = script.Path(gym.__file__).parent / "envs/mujoco/assets"
    xml = (assets / "hopper.xml").read_text().replace("</worldbody>", f"{body}</worldbody>")
    (tmp_path / "hopper.xml").write_text(xml)
    entry = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"
    gym.register(f"{name}/Hopper-v0", entry, kwargs={"xml_file": str(tmp_path / "hopper.xml")} | options)
    task = {"env_id": f"{name}/Hopper-v0", "max_episode_steps": 5}
    return script.make_world(task, 1, settings("--env-id", task["env_id"]))


def test_a_body_that_cannot_be_drawn_is_one_sentence(tmp_path):
    envs = hopper_with(tmp_path, "boxed", "<geom name='box' type='box' size='1 1 1'/>")
    with pytest.raises(script.UserError, match="its geom 'box' is neither capsule nor sphere"):
        script.CapsuleRenderer(envs, 32, 1)


def test_what_is_invisible_is_not_drawn(tmp_path):
    sphere = "<geom type='sphere' size='0.3' pos='0 0 1' rgba='1 0 0 {}'/>"
    obs = np.zeros((1, 11))
    obs[0, 0] = 1.25  # the height of a hopper that stands
    frames = {}
    for name, alpha in (("hidden", 0), ("shown", 1)):
        envs = hopper_with(tmp_path, name, sphere.format(alpha))
        frames[name] = script.CapsuleRenderer(envs, 32, 1)(obs)
    assert torch.equal(frames["hidden"], renderer(32, "Hopper-v4")(obs))
    assert not torch.equal(frames["shown"], frames["hidden"])


def test_observations_that_do_not_begin_with_positions_are_one_sentence(tmp_path):
    """The picture would be of another pose."""
    with_x = hopper_with(tmp_path, "with_x", "", exclude_current_positions_from_observation=False)
    gym.register("bodiless/Hopper-v0", "gymnasium.envs.classic_control:PendulumEnv")
    bodiless = {"env_id": "bodiless/Hopper-v0", "max_episode_steps": 5}
    for envs in (with_x, script.make_world(bodiless, 1, settings("--env-id", bodiless["env_id"]))):
        with pytest.raises(script.UserError, match="do not begin with a body's positions"):
            script.CapsuleRenderer(envs, 32, 1)


@pytest.mark.parametrize("env_id, body", [("HalfCheetah-v4", "HalfCheetah"), ("my_envs:ns/Ant-v0", "Ant"), ("X", "X")])
def test_the_body_is_in_the_environments_name(env_id, body):
    assert script.body_of(env_id) == body


# CUDA graphs


def test_what_is_captured_is_what_would_have_run(monkeypatch):
    """Two plain calls, then a recording for each shape; inputs are copied in, outputs are copied out."""
    log, recording = [], []

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    class Graph:
        def replay(self):
            log.append("replay")
            for x, new in zip(self.outputs, double(*self.held)):
                x.copy_(new)

    class Recorder:
        def __init__(self, graph):
            recording.append(graph)

        def __enter__(self):
            log.append("record")

        def __exit__(self, *error):
            pass

    class Through:
        def __init__(self, stream):
            pass

        def __enter__(self):
            log.append("plain")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(script.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(script.torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(script.torch.cuda, "stream", Through)
    monkeypatch.setattr(script.torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(script.torch.cuda, "graph", Recorder)

    def double(x):
        if recording and not hasattr(recording[-1], "held"):
            recording[-1].held, recording[-1].outputs = [x], [2 * x]
            return tuple(recording[-1].outputs)
        return (2 * x,)

    captured, results = script.Captured(double), []
    for i in range(5):
        results.append(captured(torch.full((3,), float(i)))[0])
        captured(torch.full((2,), 10.0 + i))
    assert [x.tolist() for x in results] == [[2.0 * i] * 3 for i in range(5)]  # none was written over
    assert [x for x in log if x != "wait"] == ["plain"] * 4 + ["record", "replay"] * 2 + ["replay"] * 4
    assert captured(torch.full((2,), 7.0))[0].tolist() == [14.0, 14.0]
    graphs = script.make_graphs(networks(settings(*SMALL)), Shades(), {}, settings(*SMALL))
    assert not any(isinstance(x, script.Captured) for x in graphs.values())  # none on the CPU


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
    return nets, script.make_graphs(nets, None, {"autoencoder": Adam(parameters, lr=2e-3)}, args), rollout


def test_autoencoder_beats_the_mean_frame():
    frames = renderer(16)(script.load_demos(settings("--num-demos", "10"), [])["observations"])
    train, heldout = frames[:808], frames[808:]
    args = settings(*"--ae-batch-size 64 --latent-dim 32 --inverse-coef 0 --image-size 16".split())
    nets, graphs, rollout = autoencoder_only(args, train[:, None])
    generator, expert = torch.Generator().manual_seed(0), {"train_frames": train}
    script.update_autoencoder(graphs, expert, rollout, 150, args, generator)
    autoencoder = nets.autoencoder
    with torch.no_grad():
        mean_frame_error = (autoencoder.center(heldout).square() * autoencoder.weight).mean()
        error = autoencoder.errors(autoencoder.encode(heldout), heldout).mean()
    assert error < 0.6 * mean_frame_error


@pytest.mark.parametrize("lengths, frame_stack", [([3, 1, 4], 1), ([3, 1, 4], 2), ([2, 5], 4), ([1], 6)])
def test_what_the_expert_looks_like_against_a_loop(lengths, frame_stack):
    frames, rows, start = random_frames(sum(lengths) + len(lengths), 16), [], 0
    for length in lengths:
        for t in range(1, length + 1):  # after each action; an episode's first frame is repeated
            rows.append([start + max(t - k, 0) for k in reversed(range(frame_stack))])
        start += length + 1
    expert = script.film_expert({"frames": frames.numpy(), "lengths": np.array(lengths)}, Film(frames), "cpu")
    autoencoder = script.Autoencoder(frames, 4, frame_stack)
    script.encode_expert(autoencoder, expert)
    expected = autoencoder.standardize(script.latent_steps(autoencoder.encode_all(frames)[torch.tensor(rows)]))
    assert torch.equal(expert["features"], expected)


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
    demos = {"frames": frames.numpy(), "lengths": lengths}
    expert = script.film_expert(demos, Film(frames), "cpu")
    assert len(expert["train_frames"]) == 4 and len(expert["heldout_frames"]) == 5
    nets, graphs, rollout = autoencoder_only(args, frames[:, None])
    autoencoder = nets.autoencoder
    script.encode_expert(autoencoder, expert)
    windows = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [4, 4, 4], [4, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8]]
    raw = script.latent_steps(autoencoder.encode_all(frames)[torch.tensor(windows)])
    np.testing.assert_allclose(autoencoder.standardize.mean, raw.mean(0), atol=1e-6)
    expected = ((raw - raw.mean(0)) / raw.std(0, correction=0))[[1, 2, 3, 5, 6, 7, 8]]  # not an episode's first
    assert torch.allclose(expert["features"], expected, atol=1e-4)
    before = expert["features"].clone()
    script.update_autoencoder(graphs, expert, rollout, 3, args, torch.Generator().manual_seed(0))
    script.encode_expert(autoencoder, expert)
    assert not torch.allclose(expert["features"], before, atol=1e-3)


def test_latents_that_do_not_vary_have_no_influence():
    """Where a latent stands still in demonstrations, D and policy see 0, whatever the policy's does."""
    args, frames = settings(*SMALL), random_frames(9, 16)
    nets, demos = networks(args), {"frames": frames.numpy(), "lengths": np.array([3, 4])}
    autoencoder, last = nets.autoencoder, nets.autoencoder.encoder[-1]
    expert = script.film_expert(demos, Film(frames), "cpu")
    last.weight.data[2], last.bias.data[2] = 0.0, 0.7
    script.encode_expert(autoencoder, expert)
    still = torch.arange(12) % 4 == 2  # in both steps and in the newest
    features = expert["features"]
    assert (features[:, still] == 0).all() and (features[:, ~still].std(0) > 0.5).all()
    torch.manual_seed(0)
    latents, actions, states = torch.randn(5, 3, 4), torch.zeros(5, 2, 6), torch.zeros((5, 17))
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

    class Noted(Shades):
        def draw(self, poses):
            shown.append(super().draw(poses))
            return shown[-1]

    render = Noted()
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
    assert "state" not in rollout  # no learner gets it
    assert rollout["steps_left"].tolist() == [[x, x] for x in (4, 3, 2, 1, 0, 4, 3, 2)]

    # The next rollout goes on where this one stopped.
    more, _ = collect(envs, render, nets, args, episodes, 1, torch.Generator().manual_seed(1))
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
    episodes = script.begin_episodes(envs, Shades(), 3, 0, 100)
    rollout, _ = collect(envs, Shades(), nets, args, episodes, 10, torch.Generator().manual_seed(0))
    assert rollout["action"].abs().max() > 1 and rollout["executed"].abs().max() == 1
    np.testing.assert_array_equal(rollout["executed"].numpy(), np.stack(seen))
    assert torch.equal(rollout["executed"], rollout["action"].clamp(-1, 1))
    mean, log_std = nets.agent.gaussian(nets.agent.actor(rollout["obs"]))
    expected = script.gaussian_log_prob(rollout["action"], mean, log_std)
    assert torch.allclose(rollout["log_prob"], expected, atol=1e-3)
    still, _, _ = rollout_of(nets, Shades(), args, sampled=False)
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
    episodes, generator = script.begin_episodes(envs, Shades(), 3, 0, 5), torch.Generator().manual_seed(0)
    first, log = collect(envs, Shades(), nets, args, episodes, 3, generator)
    assert log == {}
    second, log = collect(envs, Shades(), nets, args, episodes, 3, generator)
    expected = torch.cat([first["env_reward"], second["env_reward"][:2]]).sum(0).mean().item()
    assert log["charts/episodic_return"] == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(episodes["return"], second["env_reward"][2], atol=1e-6)


def test_policy_on_states_sees_states():
    """By the mean and deviation of the demonstrated ones."""
    args = settings(*SMALL, "--policy-obs", "state")
    nets, states = networks(args), np.random.default_rng(0).normal(3, 2, (50, 17))
    rollout, _, _ = rollout_of(nets, Shades(), args)
    envs, mean, std = script.BatchHalfCheetah(2, 5, 1), states.mean(0), states.std(0)
    state, _ = envs.reset(seed=0)
    for t in range(8):
        np.testing.assert_allclose(rollout["obs"][t], (state - mean) / std, rtol=1e-5, atol=1e-6)
        state, _, _, _, info = envs.step(rollout["executed"][t].numpy())
        seen = (info["final_obs"] - mean) / std
        np.testing.assert_allclose(rollout["next_obs"][t], seen, rtol=1e-5, atol=1e-6)
    far, none = torch.full((1, 17), 1e3), torch.zeros(1, 3, 4)
    assert (nets.observe(none, torch.zeros(1, 2, 6), far)[2] == script.INPUT_CLIP).all()


def test_a_policy_acts_on_what_it_gets_as_it_is():
    """What observe() returns is standardized already."""
    args = settings(*SMALL)
    nets = networks(args)
    rollout, _, _ = rollout_of(nets, Shades(), args)
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
    features, history, obs = nets.observe(latents, actions, torch.zeros(5, 17))
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
    graphs = script.make_graphs(nets, None, script.make_optimizers(nets, args), args)
    rollout, _, _ = rollout_of(nets, Shades(), args)
    assert not any(x.requires_grad for x in rollout.values())
    expert = {"features": torch.randn(20, 12), "train_frames": random_frames(9, 16)}
    before = {name: x.clone() for name, x in nets.state_dict().items()}
    script.update_latent_discriminator(graphs, expert, rollout, args, generator)
    rewards, _ = script.compute_latent_rewards(nets, rollout, deque(), no_ends(), args)
    script.update_latent_policy(nets, graphs, rollout, rewards, args, generator)
    script.update_predictor(nets, graphs, rollout, 2, generator)
    moved = {name.split(".")[0] for name, x in nets.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"disc", "agent", "predictor"}
    eyes = [*nets.autoencoder.parameters(), *nets.inverse.parameters()]
    assert all(p.grad is None for p in eyes)
    script.update_autoencoder(graphs, expert, rollout, 1, args, generator)
    assert all(p.grad.abs().sum() > 0 for p in eyes)


def test_stacks_longer_than_a_snippet_teach_the_inverse_model():
    count = script.SNIPPET + 4
    args = settings(*SMALL, "--frame-stack", str(count), "--ae-batch-size", str(2 * count))
    nets, graphs, rollout = autoencoder_only(args, random_frames(30, 16)[:, None])
    expert, generator = {"train_frames": random_frames(30, 16)}, torch.Generator().manual_seed(0)
    log = script.update_autoencoder(graphs, expert, rollout, 1, args, generator)
    assert log["ae/inverse"] > 0 and all(p.grad.abs().sum() > 0 for p in nets.inverse.parameters())
    log = script.update_autoencoder(graphs, expert, rollout, 1, args, generator, with_inverse=False)
    assert log["ae/inverse"] == 0 and not any(p.grad.any() for p in nets.inverse.parameters())


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
    """An inverse model that reads the last step is exact where the action is it, standardized. What is not usable
    has no part in the spread, nor in the error."""
    torch.manual_seed(0)
    latents, usable = 10 * torch.randn(50, 3, 2) * torch.tensor([5.0, 0.1]), torch.arange(50) % 3 > 0
    step = latents[:, 2] - latents[:, 1]
    actions = step / step[usable].std(0, correction=0)
    actions[~usable] = 1e3
    assert script.inverse_loss(lambda seen: seen[:, 2:4], latents, actions, usable).item() < 1e-4
    assert script.inverse_loss(lambda seen: seen[:, 4:6], latents, actions, usable).item() > 0.1
    spread = script.latent_steps(latents)[usable].std(0, correction=0)
    guess = (script.latent_steps(latents) / spread)[:, 4:6]
    expected = (guess - actions)[usable].square().mean().item()
    assert script.inverse_loss(lambda seen: seen[:, 4:6], latents, actions, usable).item() == pytest.approx(
        expected, rel=1e-2
    )
    assert script.inverse_loss(lambda seen: seen[:, 2:4], latents, actions, usable & False) == 0


def test_inverse_loss_does_not_pull_on_the_size_of_the_latents():
    """Guesses that are worse than none would otherwise shrink the latents to nothing: a gradient
    along them is 0."""
    torch.manual_seed(0)
    latents, actions = 10 * torch.randn(64, 4, 3), torch.rand(64, 6)
    inverse = script.mlp([12, 16, 6], 1.0, torch.Generator().manual_seed(0))
    latents.requires_grad_(True)
    loss = script.inverse_loss(inverse, latents, actions, torch.ones(64, dtype=torch.bool))
    (grad,) = torch.autograd.grad(loss, latents)
    assert abs((grad * latents).sum()) < 1e-3 < (grad * latents).abs().sum()


def test_the_inverse_model_shapes_the_encoder_and_not_the_decoder():
    changed = []
    for inverse_coef in ("0.001", "10"):
        args = settings(*SMALL, "--ae-batch-size", "32", "--inverse-coef", inverse_coef)
        nets, _, rollout = autoencoder_only(args, random_frames(60, 16).view(20, 3, 16, 16))
        graphs = script.make_graphs(nets, None, {"autoencoder": torch.optim.SGD(nets.parameters(), lr=0.1)}, args)
        expert, generator = {"train_frames": random_frames(9, 16)}, torch.Generator().manual_seed(0)
        script.update_autoencoder(graphs, expert, rollout, 1, args, generator)
        changed.append(nets.autoencoder)
    assert not same(changed[0].encoder.state_dict(), changed[1].encoder.state_dict())
    assert same(changed[0].decoder.state_dict(), changed[1].decoder.state_dict())


def test_the_inverse_model_learns_which_action_was_taken():
    """And each window is paired with the action that led to its last frame, within an episode."""
    flags = "--ae-batch-size 128 --inverse-coef 1 --latent-dim 16 --image-size 16 --frame-stack 4"
    args, generator = settings(*flags.split()), torch.Generator().manual_seed(0)
    nets = networks(args, random_frames(4, 16, 24))
    rollout, _, _ = rollout_of(nets, renderer(16), args, envs=8, limit=100, steps=50)
    frames = rollout["frame"].flatten(0, 1)
    nets, expert = networks(args, frames), {"train_frames": frames}
    eyes = [*nets.autoencoder.parameters(), *nets.inverse.parameters()]
    graphs = script.make_graphs(nets, None, {"autoencoder": Adam(eyes, lr=2e-3)}, args)
    script.update_autoencoder(graphs, expert, rollout, 60, args, generator, with_inverse=False)
    script.update_autoencoder(graphs, expert, rollout, 200, args, generator)
    errors = [script.update_autoencoder(graphs, expert, rollout, 1, args, generator) for _ in range(5)]
    assert np.mean([x["ae/inverse"] for x in errors]) < 0.6 * rollout["executed"].var()


def test_windows_that_span_two_episodes_teach_no_action():
    """Whatever action only a wrong window tells: the networks end the same."""
    args, ends = settings(*SMALL), []
    for junk in (0.0, 1e3):
        nets, graphs, rollout = autoencoder_only(args, random_frames(60, 16).view(30, 2, 16, 16))
        expert, generator = {"train_frames": random_frames(9, 16)}, torch.Generator().manual_seed(0)
        rollout["ended"][1::3] = True  # rows 2 to 4, 5 to 7 ... are the only windows of three
        rollout["executed"][torch.arange(30) % 3 != 1] = junk
        script.update_autoencoder(graphs, expert, rollout, 10, args, generator)
        ends.append(nets.state_dict())
    assert same(*ends)


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
    optimizers = {"predictor": Adam(nets.predictor.parameters())}
    graphs, generator = script.make_graphs(nets, None, optimizers, settings()), torch.Generator().manual_seed(0)
    rollout = {"features": features, "history": history, "executed": actions, "ended": ended}
    first = script.update_predictor(nets, graphs, rollout, 5, generator)["ae/prediction"]
    script.update_predictor(nets, graphs, rollout, 300, generator)
    last = script.update_predictor(nets, graphs, rollout, 5, generator)["ae/prediction"]
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
        steps = {id(p): group["lr"].item() for group in optimizer.param_groups for p in group["params"]}
        assert len(steps) == len(list(agent.parameters()))
        assert steps[id(agent.actor[0].weight)] == steps[id(agent.critic[0].bias)] == pytest.approx(2e-3 * scale)
        assert steps[id(agent.actor[6].bias)] == steps[id(agent.actor[3].weight)] == pytest.approx(2e-3)


def test_every_network_is_trained_by_one_optimizer():
    args = settings(*SMALL)
    nets = networks(args)
    optimizers = script.make_optimizers(nets, args).values()
    trained = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in nets.parameters())


# Discriminator and reward


def test_discriminator_tells_the_expert_and_the_reward_says_so():
    args = settings(*SMALL, "--disc-steps", "60", "--disc-batch-size", "64")
    nets, generator = networks(args), torch.Generator().manual_seed(0)
    graphs = script.make_graphs(nets, None, {"disc": Adam(nets.disc.parameters(), lr=3e-3)}, args)
    features = torch.randn(10, 4, 12, generator=generator) - 1
    features[5:, :2] += 2  # these look like the expert's
    expert = {"features": torch.randn(50, 12, generator=generator) + 1}
    rollout = endless(features) | {"env_reward": torch.full((10, 4), torch.nan)}
    log = script.update_latent_discriminator(graphs, expert, rollout, args, generator)
    assert log["disc/expert_prob"] > 0.6 > log["disc/policy_prob"]
    rewards, log = script.compute_latent_rewards(nets, rollout, deque(), no_ends(), args)
    with torch.no_grad():
        d = torch.sigmoid(nets.disc(features)).squeeze(-1).double()
    plain = -torch.log(1 - d)
    rewards = rewards["steps"]
    assert torch.allclose(rewards.double(), (plain - plain.mean()) / plain.std(correction=0), atol=1e-3)
    assert rewards[5:, :2].min() > rewards[:5].mean() and math.isnan(log["reward/env_mean"])
    args.normalize_reward = False
    rewards, _ = script.compute_latent_rewards(nets, rollout, deque(), no_ends(), args)
    assert torch.allclose(rewards["steps"].double(), plain, atol=1e-3)
    assert log["reward/gail_mean"] == pytest.approx(plain.mean().item(), rel=1e-3)


def test_a_step_of_the_discriminator_equals_a_plain_one():
    args = settings(*SMALL, "--grad-penalty-coef", "0.5")
    nets = networks(args)
    other, (expert, policy), mix = copy.deepcopy(nets.disc), torch.randn(2, 16, 12), torch.rand(16, 1)
    optimizers = {"disc": torch.optim.SGD(nets.disc.parameters(), 0.1)}
    log = script.discriminator_step(nets, optimizers, args, expert, policy, mix)
    between = (policy + mix * (expert - policy)).requires_grad_(True)
    (grad,) = torch.autograd.grad(other(between).sum(), between, create_graph=True)
    penalty = ((grad.square().sum(1).sqrt() - 1) ** 2).mean()
    loss = F.binary_cross_entropy_with_logits(other(expert), torch.ones(16, 1))
    loss = loss + F.binary_cross_entropy_with_logits(other(policy), torch.zeros(16, 1))
    accuracies = (other(expert) > 0).float().mean(), (other(policy) < 0).float().mean()
    expected = loss, torch.sigmoid(other(expert)).mean(), torch.sigmoid(other(policy)).mean(), *accuracies, penalty
    for a, b in zip(log, expected, strict=True):
        torch.testing.assert_close(a, b)
    (loss + 0.5 * penalty).backward()
    for a, b in zip(nets.disc.parameters(), other.parameters()):
        torch.testing.assert_close(a, b - 0.1 * b.grad)


def test_a_step_of_the_policy_equals_a_plain_one():
    """By torch.distributions, and no coefficient at its default. One action that became likely is bad: its ratio is cut
    at e."""
    args = settings(*SMALL, *"--clip-coef 0.3 --ent-coef 0.05 --vf-coef 0.7 --max-grad-norm 0.2".split())
    nets = networks(args)
    other, obs, action = copy.deepcopy(nets.agent), torch.randn(30, nets.agent.actor[0].in_features), torch.randn(30, 6)
    advantage, returns = 2 * torch.randn(30) + 1, torch.randn(30)
    mean, log_std = other.actor(obs).chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.exp())
    old_log_prob = normal.log_prob(action).sum(-1).detach() + 0.4 * torch.randn(30)
    old_log_prob[0] -= 4.0
    advantage[0] = -5.0
    optimizers = {"agent": torch.optim.SGD(nets.agent.parameters(), 0.1)}
    log = script.policy_step(nets, optimizers, args, obs, action, old_log_prob, advantage, returns)
    ratio = (normal.log_prob(action).sum(-1) - old_log_prob).exp()
    a = (advantage - advantage.mean()) / advantage.std()
    policy_loss = -torch.where(a > 0, ratio.clamp(max=1.3) * a, ratio.clamp(0.7, math.e) * a).mean()
    value_loss = 0.5 * (other.critic(obs)[:, 0] - returns).square().mean()
    entropy, clipped = normal.entropy().sum(-1).mean(), ((ratio < 0.7) | (ratio > 1.3)).float().mean()
    assert 0 < clipped < 1 and ratio[0] > 10 and a[0] < 0
    expected = policy_loss, value_loss, entropy, (ratio - 1 - ratio.log()).mean(), clipped
    for x, y in zip(log, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    (policy_loss + 0.7 * value_loss - 0.05 * entropy).backward()
    norm = torch.stack([x.grad.square().sum() for x in other.parameters()]).sum().sqrt()
    assert norm > 0.2
    for x, y in zip(nets.agent.parameters(), other.parameters()):
        torch.testing.assert_close(x, y - 0.1 * y.grad * 0.2 / norm, rtol=1e-4, atol=1e-6)


def test_each_epoch_sees_each_step_once_with_its_own_advantage_and_return():
    args = settings(*SMALL, *"--num-minibatches 3 --update-epochs 2 --gamma 0.9 --gae-lambda 0.7".split())
    nets, seen = networks(args), []
    rollout, _, _ = rollout_of(nets, Shades(), args)

    def note(*columns):
        seen.append(columns)
        return [torch.zeros(())] * 5

    rewards = {"steps": torch.randn(8, 2), "absorbing": 0.3}
    script.update_latent_policy(nets, {"policy_step": note}, rollout, rewards, args, torch.Generator().manual_seed(0))
    assert [len(columns[0]) for columns in seen] == [6, 5, 5] * 2
    with torch.no_grad():
        values, next_values = nets.agent.value(rollout["obs"]), nets.agent.value(rollout["next_obs"])
    advantages, returns = script.compute_gae(rewards["steps"], values, next_values, rollout["ended"], 0.9, 0.7)
    steps = [rollout["obs"], rollout["action"], rollout["log_prob"], advantages, returns]
    steps = torch.cat([x.flatten(0, 1).flatten(1) if x.ndim > 2 else x.reshape(-1, 1) for x in steps], dim=1)
    orders = []
    for epoch in (seen[:3], seen[3:]):
        columns = [torch.cat(x) for x in zip(*epoch)]
        rows = torch.cat([x if x.ndim > 1 else x[:, None] for x in columns], dim=1)
        orders.append(torch.cdist(rows.double(), steps.double()).argmin(1))
        assert sorted(orders[-1].tolist()) == list(range(16))
        torch.testing.assert_close(rows, steps[orders[-1]])
    assert not torch.equal(*orders)


def test_the_expert_is_encoded_anew_after_the_pretraining(tmp_path, monkeypatch):
    pretrain, checked = script.pretrain, []

    def checking(collect, nets, graphs, optimizers, expert, *rest):
        before = expert["features"].clone()
        pretrain(collect, nets, graphs, optimizers, expert, *rest)
        after = expert["features"].clone()
        script.encode_expert(nets.autoencoder, expert)
        checked.append(torch.equal(after, expert["features"]) and not torch.equal(before, after))

    monkeypatch.setattr(script, "pretrain", checking)
    mini(tmp_path, "--total-timesteps", "300")
    assert checked == [True]


def test_episodes_too_short_to_predict_in_are_one_sentence():
    nets = networks(settings(*SMALL))
    rollout = {"ended": torch.ones(5, 2, dtype=torch.bool)}
    with pytest.raises(script.UserError, match="no episode lasts 2 steps, as far as the predictor looks"):
        script.update_predictor(nets, {}, rollout, 1, torch.Generator())


def no_ends() -> dict:
    """Visits where nothing ever ended: long ago, so that half a step is nothing."""
    return {"expert": torch.tensor([1e6, 0.0]), "policy": torch.tensor([1e6, 0.0])}


def endless(features: torch.Tensor) -> dict:
    zeros = torch.zeros(features.shape[:2])
    return {"features": features, "env_reward": zeros, "terminated": zeros.bool(), "steps_left": zeros.long()}


def test_what_follows_an_end_is_paid_by_how_often_the_expert_is_there():
    args = settings(*SMALL, "--no-normalize-reward")
    nets, rollout = networks(args), endless(torch.randn(10, 4, 12))
    rollout["terminated"][3, 1], rollout["steps_left"][3, 1] = True, 20
    visits = {"expert": torch.tensor([300.0, 100.0]), "policy": torch.tensor([40.0, 70.0])}
    rewards, log = script.compute_latent_rewards(nets, rollout, deque(), visits, args)
    assert visits["policy"].tolist() == pytest.approx([40 + 40, 70 + 20])
    policy = np.array([80.5, 90.5]) / 171
    expert = (np.array([300, 100]) + policy) / 401
    with torch.no_grad():
        logit = nets.disc(rollout["features"])[..., 0] + math.log(expert[0] / policy[0])
    assert torch.allclose(rewards["steps"], torch.nn.functional.softplus(logit), atol=1e-5)
    absorbing = math.log1p(expert[1] / policy[1])  # softplus of a log
    assert rewards["absorbing"] == pytest.approx(absorbing, rel=1e-5) == log["reward/absorbing"]


def test_the_value_after_an_end_is_that_of_the_absorbing_state_for_ever(monkeypatch):
    args = settings(*SMALL, "--gamma", "0.9")
    nets = networks(args)
    graphs = script.make_graphs(nets, None, script.make_optimizers(nets, args), args)
    rollout, _, _ = rollout_of(nets, Shades(), args)
    rollout["terminated"][2, 1] = rollout["ended"][2, 1] = True
    seen, gae = [], script.compute_gae

    def note(rewards, values, next_values, *rest):
        seen.append(next_values.clone())
        return gae(rewards, values, next_values, *rest)

    monkeypatch.setattr(script, "compute_gae", note)
    with torch.no_grad():
        expected = nets.agent.value(rollout["next_obs"])
    expected[2, 1] = 0.3 / (1 - 0.9)
    rewards = {"steps": torch.zeros(8, 2), "absorbing": 0.3}
    script.update_latent_policy(nets, graphs, rollout, rewards, args, torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[0], expected)


def test_rewards_are_normalized_by_those_of_all_processes(monkeypatch):
    args = settings(*SMALL)
    nets, features = networks(args), torch.randn(5, 4, 12)
    rollout, visits = endless(features), no_ends()
    monkeypatch.setattr(script, "all_gather", lambda x: torch.cat([x, x + 4]))
    rewards, _ = script.compute_latent_rewards(nets, rollout, deque(), visits, args)
    assert visits["policy"].tolist() == pytest.approx([1e6 + 20 + 24, 4])
    with torch.no_grad():
        plain = torch.nn.functional.softplus(nets.disc(features)).squeeze(-1)
    everyones = torch.cat([plain, plain + 4])
    expected = (plain - everyones.mean()) / everyones.std(correction=0)
    assert torch.allclose(rewards["steps"], expected, atol=1e-3)


def test_reconstruction_errors_look_at_the_whole_rollout(tmp_path, monkeypatch):
    shown, imshow = [], matplotlib.axes.Axes.imshow
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", lambda ax, x, **k: shown.append(x) or imshow(ax, x, **k))
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
    picture = 255 * shown[-1].numpy()
    assert picture.shape == (3 * 16, 8 * 16) and (tmp_path / "b.png").exists()
    assert np.allclose(picture[:16, :16], frames[0]) and not picture[:16, -16:].any()


# Returns


def test_random_return_is_the_mean_of_20_episodes_with_uniform_actions(monkeypatch):
    seen, step = [], script.BatchHalfCheetah.step

    def note(self, actions):
        result = step(self, actions)
        seen.append((actions, result[1]))
        return result

    monkeypatch.setattr(script.BatchHalfCheetah, "step", note)
    task = {"env_id": "HalfCheetah-v4", "max_episode_steps": 50}
    value = script.random_return(task, 3, settings())
    actions, rewards = map(np.array, zip(*seen))
    assert actions.shape == (50, 20, 6) and np.abs(actions).max() <= 1
    assert abs(actions.mean()) < 0.03 and actions.var() == pytest.approx(1 / 3, rel=0.05)
    assert value == pytest.approx(sum(rewards[t, n] for t in range(50) for n in range(20)) / 20)
    assert value == script.random_return(task, 3, settings()) != script.random_return(task, 4, settings())


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


def test_the_report_has_the_score_and_the_best_evaluation(tmp_path, monkeypatch):
    """Halfway from -100 to 100 is a score of 0.5, 60 of 0.8."""
    demos = {"returns": np.array([100.0]), "random_return": -100.0}
    monkeypatch.setattr(script, "final_evaluation", lambda *args: [np.array([50.0, 70.0])] * 2)
    rows = [{"global_step": 1}]
    for step, x in enumerate((82.0, 78.0, 90.0, 81.0), 2):
        rows.append({"global_step": step} | script.return_metrics(np.array([x]), demos))
    summary = script.report(None, None, None, demos, rows, 2.0, settings("--no-capture-video"), tmp_path)
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
    assert files == expected | {"curves.png", "reconstructions.png", "policy.gif", "first_frames.png"}
    for name in ("first_frames.png", "reconstructions.png"):
        picture = script.imageio.imread(run / name)
        assert picture.shape[1] > 1000 and picture[..., 0].std() > 20  # large, and not empty
    assert summary["env_steps"] == 500 and math.isfinite(summary["eval/return_mean"])
    drawn = script.load_demos(script.parse_args(MINI), [])
    assert summary["demos_return_mean"] == pytest.approx(drawn["returns"].mean())
    assert summary["random_return_mean"] == script.random_return(drawn, 1, settings())
    gain = summary["demos_return_mean"] - summary["random_return_mean"]
    score = (summary["eval/return_mean"] - summary["random_return_mean"]) / gain
    assert summary["eval/normalized_score"] == pytest.approx(score)
    args = script.parse_args(MINI)
    given = (random_frames(4, 32, 56), np.zeros((1, 17)), SPACE, args)
    fresh = script.Networks(*given, torch.Generator().manual_seed(1))
    torch.manual_seed(args.seed)
    again = script.Networks(*given, torch.Generator().manual_seed(1))
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


def test_what_is_saved_is_the_running_average_of_the_networks(tmp_path, monkeypatch):
    """With the statistics of the last encoder. Evaluated is the average, too."""
    weights, collect, evaluate, judged = [], script.collect_frames, script.evaluate, []

    def watched(envs, render, nets, *rest):
        weights.append([x.detach().clone() for x in nets.parameters()])  # before the updates
        return collect(envs, render, nets, *rest)

    def watched_evaluation(nets, *rest, **flags):
        judged.append([x.detach().clone() for x in nets.parameters()])
        return evaluate(nets, *rest, **flags)

    monkeypatch.setattr(script, "collect_frames", watched)
    monkeypatch.setattr(script, "evaluate", watched_evaluation)
    mini(tmp_path, "--average-share", "0.5")
    saved = checkpoint_of(tmp_path / "run")
    policy = torch.load(tmp_path / "run/policy.pt", weights_only=True)["networks"]
    names = [name for name, _ in networks(script.parse_args(MINI)).named_parameters()]
    updated, span = [*weights[3:], [saved["networks"][name] for name in names]], 1.0  # two pretraining rollouts
    expected = updated[0]
    for last in updated[1:]:
        span += 0.5
        expected = [slow + (fast - slow) / span for slow, fast in zip(expected, last)]
    assert len(updated) == 3 and len(judged) == 4  # two on the way, the final one with and without noise
    assert same(saved["slow"], policy)
    for i, name in enumerate(names):
        torch.testing.assert_close(policy[name], expected[i])
        assert torch.equal(policy[name], judged[-1][i]) and torch.equal(policy[name], judged[-3][i])
        assert not torch.equal(policy[name], last[i])
    statistics = saved["networks"].keys() - set(names)
    assert len(statistics) > 4 and all(torch.equal(policy[x], saved["networks"][x]) for x in statistics)
    mini(tmp_path, "--average-share", "0", name="last")
    last = checkpoint_of(tmp_path / "last")
    assert same(last["slow"], last["networks"])


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
    assert same(whole["networks"], cut["networks"]) and same(whole["slow"], cut["slow"])
    assert torch.equal(whole["generator"], cut["generator"])
    assert rows_of(whole_run) == rows_of(tmp_path / "cut")


def test_a_finished_run_goes_on_when_it_is_given_more(tmp_path, capsys, finished):
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = str(tmp_path / "run/checkpoint.pt")
    assert "this run has come that far" in refused(["--resume", checkpoint], capsys)
    script.main(["--resume", checkpoint, "--total-timesteps", "800"])
    steps = [row["global_step"] for row in rows_of(tmp_path / "run")]
    assert steps == ["300", "400", "500", "600", "700", "800"]
    assert rows_of(tmp_path / "run")[:3] == rows_of(finished)

    # Step sizes fall along the new schedule, but for D's. The autoencoder came from its pretraining
    # with a third (6 steps are too few for a fifth).
    optimizers = checkpoint_of(tmp_path / "run")["optimizers"]
    shares = {name: x["param_groups"][0]["lr"].item() for name, x in optimizers.items()}
    last = {"agent": 2e-3 / 6, "autoencoder": 1e-3 / 3 / 6, "predictor": 1e-3 / 6}
    assert shares == pytest.approx({"disc": 1e-3} | last, rel=1e-5)


def test_nothing_but_pixels_reaches_the_learner(tmp_path, monkeypatch, finished):
    """True velocities and true reward filled with NaN, in the environment and in the demonstrations: not a bit
    changes. (Frames are drawn from the positions.)"""
    step, reset, load = script.BatchHalfCheetah.step, script.BatchHalfCheetah.reset, script.load_demos

    def blind(obs):
        return np.where(np.arange(17) < 8, obs, np.nan)

    def blind_step(self, actions):
        obs, rewards, terminated, truncated, info = step(self, actions)
        return blind(obs), rewards * np.nan, terminated, truncated, {"final_obs": blind(info["final_obs"])}

    def blind_reset(self, **kwargs):
        obs, info = reset(self, **kwargs)
        return blind(obs), info

    def blind_demos(*args, **kwargs):
        demos = load(*args, **kwargs)
        demos["observations"] = blind(demos["observations"])
        for name in ("obs", "actions", "rewards", "returns", "qpos", "qvel"):
            demos[name][:] = np.nan
        return demos

    monkeypatch.setattr(script.BatchHalfCheetah, "step", blind_step)
    monkeypatch.setattr(script.BatchHalfCheetah, "reset", blind_reset)
    monkeypatch.setattr(script, "load_demos", blind_demos)
    assert not any("return" in name for name in mini(tmp_path, name="blind"))
    rows = rows_of(tmp_path / "blind")  # the NaNs were really there
    assert not any("reward/env_mean" in row for row in rows)
    assert "ae/recon_policy" in rows[-1] and "eval/return_mean" not in rows[-1]
    assert same(*(checkpoint_of(x)["networks"] for x in (finished, tmp_path / "blind")))


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
    capsys.readouterr()
    script.main(["--evaluate", str(tmp_path / "run/policy.pt"), "--eval-episodes", "2", "--threads", "1"])
    mean = f"{summary['eval/return_mean']:.1f} ± {summary['eval/return_std']:.1f}"
    assert mean in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(tmp_path / "run/policy.npz")["sampled"], course)


def test_a_body_whose_observations_are_not_flat_is_refused():
    class DictHopper(gym.Env):
        observation_space = gym.spaces.Dict({"angle": gym.spaces.Box(-1, 1, (11,))})
        action_space = gym.spaces.Box(-1, 1, (3,))

    gym.register("DictHopper/Hopper-v0", DictHopper)
    task = {"env_id": "DictHopper/Hopper-v0", "max_episode_steps": 5}
    with pytest.raises(script.UserError, match="expected a flat Box; use --frames render"):
        script.make_world(task, 1, settings())


@pytest.mark.parametrize("what", ["losses/value_loss", "weights"])
def test_a_diverged_run_stops_with_one_sentence(tmp_path, monkeypatch, capsys, what):
    update = script.update_latent_policy

    def diverge(nets, *args):
        log = update(nets, *args)
        if what != "weights":
            return log | {what: math.inf}
        nets.agent.critic[-1].bias.data.fill_(math.nan)
        return log

    monkeypatch.setattr(script, "update_latent_policy", diverge)
    with pytest.raises(SystemExit) as stopped:
        mini(tmp_path)
    assert stopped.value.code == 2 and f"diverged at step 300: {what} not finite" in capsys.readouterr().err
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
        render, rng = renderer(16, threads=threads), np.random.default_rng(0)
        envs.reset(seed=3)
        shown = []
        for _ in range(10):
            obs, *_ = envs.step(rng.uniform(-1, 1, (5, 6)))
            shown.append(render(obs))
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
        (["--env-id", "Pendulum-v1"], "capsules can be drawn of HalfCheetah, Hopper,"),
        (["--total-timesteps", "100"], "--total-timesteps"),
        (["--num-minibatches", "10000"], "--num-minibatches"),
        (["--demos", "nowhere.npz"], "nowhere.npz"),
        (["--evaluate", "nowhere.pt"], "nowhere.pt"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, flags, told, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demos = [] if "--demos" in flags or "--resume" in flags else ["--demos", str(DEMOS)]
    assert told in refused([*demos, *flags], capsys)
    assert not list(tmp_path.iterdir())


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
