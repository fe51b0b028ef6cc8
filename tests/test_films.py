"""Demonstrations that are films: gail_pixels_ae.py --frames render, and data/demos.py film."""

import importlib
import json
import math

import dot
import gymnasium as gym
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import ROOT

import gail_pixels_ae as script

MINI = (
    "--env-id dot:Dot-v0 --frames render --image-size 16 --num-envs 4 --num-steps 10 --total-timesteps 200 --threads 1 "
)
MINI += "--latent-dim 4 --pretrain-steps 4 --predictor-steps 2 --ae-steps 2 --ae-batch-size 16 --num-minibatches 2 "
MINI += "--update-epochs 2 --hidden-size 8 --disc-hidden-size 8 --disc-steps 2 --eval-interval 80 --eval-episodes 2 "
MINI += "--checkpoint-interval 80"


def write_film(path, **replaced) -> str:
    frames, lengths, ends = dot.film(4, 12)
    fields = {"frames": frames, "lengths": lengths, "terminated": ends, "truncated": ~ends}
    fields["metadata"] = json.dumps({"env_id": "dot:Dot-v0", "max_episode_steps": 12})
    np.savez(path, **{k: v for k, v in (fields | replaced).items() if v is not None})
    return str(path)


def run(tmp_path, *flags, name="run", **replaced) -> dict:
    demos = write_film(tmp_path / f"{name}.npz", **replaced)
    script.main([*MINI.split(), "--demos", demos, "--output-dir", str(tmp_path), "--run-name", name, *flags])
    return json.loads((tmp_path / name / "summary.json").read_text())


def networks_of(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["networks"]


def test_pictures_are_averaged_to_grey():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (70, 6, 8, 3), dtype=np.uint8)
    small = script.shrink(pictures, 3, 2)
    expected = pictures.reshape(70, 3, 2, 2, 4, 3).mean(axis=(2, 4, 5))
    assert small.dtype == torch.uint8 and np.abs(small.numpy() - expected).max() < 0.51
    grey = rng.integers(0, 256, (3, 6, 8), dtype=np.uint8)
    assert np.array_equal(script.shrink(grey, 6, 8), grey)


def test_pictures_with_alpha_are_as_without():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 4), dtype=np.uint8)
    assert torch.equal(script.shrink(pictures, 3, 2), script.shrink(pictures[..., :3].copy(), 3, 2))


def test_what_is_rendered_may_be_grey(tmp_path):
    metadata = json.dumps({"env_id": "dot:Grey-v0", "max_episode_steps": 12})
    summary = run(tmp_path, "--env-id", "dot:Grey-v0", metadata=metadata)
    assert math.isfinite(summary["eval/return_mean"])


def test_a_run_learns_from_a_film_and_its_files_tell(tmp_path):
    summary = run(tmp_path)
    assert math.isfinite(summary["eval/return_mean"]) and "eval/normalized_score" not in summary  # no rewards known
    film = script.imageio.mimread(tmp_path / "run/policy.gif")  # ten times as large
    assert film[0].shape[:2] == (160, 10 * (32 + 4 + 32)) and 1 < len(film) <= 12
    assert np.array_equal(film[0][::10, ::10].repeat(10, axis=0).repeat(10, axis=1), film[0])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["gamma"] == 0.9  # the demonstrations have 12 steps at most
    evaluation = np.load(tmp_path / "run/evaluation.npz")
    script.main(["--evaluate", str(tmp_path / "run/policy.pt"), "--eval-episodes", "2", "--threads", "1"])
    again = np.load(tmp_path / "run/policy.npz")
    assert all(np.array_equal(evaluation[x], again[x]) for x in evaluation.files)


def test_a_resumed_run_begins_new_episodes(tmp_path):
    run(tmp_path)
    script.main(["--resume", str(tmp_path / "run/checkpoint.pt"), "--total-timesteps", "280"])
    assert json.loads((tmp_path / "run/summary.json").read_text())["env_steps"] == 280


def test_nothing_but_the_film_reaches_the_learner(tmp_path, monkeypatch, capsys):
    """States and rewards that are no numbers, and a set without actions or with wrong ones: not a bit changes."""
    run(tmp_path, name="clean")
    step = dot.Dot.step

    def blind(self, action):
        _, _, terminated, truncated, info = step(self, action)
        return np.full(2, np.nan), math.nan, terminated, truncated, info

    monkeypatch.setattr(dot.Dot, "step", blind)
    _, lengths, _ = dot.film(4, 12)
    junk = np.full((lengths.sum(), 1), 1e3)
    states = np.full((lengths.sum() + 4, 2), 7.0)
    capsys.readouterr()
    run(tmp_path, name="blind", actions=junk, rewards=junk[:, 0] * np.nan, observations=states)
    shown = capsys.readouterr().out
    assert "dot:Dot-v0 gives no rewards" in shown and "nan" not in shown
    clean, blind = (networks_of(tmp_path / x) for x in ("clean", "blind"))
    assert all(torch.equal(clean[name], blind[name]) for name in clean)


def test_frames_of_the_pictures_own_size_and_of_the_frames_size_are_the_same(tmp_path):
    frames, *_ = dot.film(4, 12)
    small = script.shrink(frames, 16, 32).numpy()
    run(tmp_path, name="large")
    run(tmp_path, name="small", frames=small)
    large, small = (networks_of(tmp_path / x) for x in ("large", "small"))
    assert all(torch.equal(large[name], small[name]) for name in large)


def test_an_episodes_last_picture_is_its_own(tmp_path):
    """Where the dot has reached the goal, what D sees is the goal, not the next episode's beginning."""
    args = script.parse_args([*MINI.split(), "--demos", write_film(tmp_path / "a.npz")])
    task = {"env_id": "dot:Dot-v0", "max_episode_steps": 200}
    envs = script.make_world(task, 3, args)
    render = script.make_renderer(envs, args)
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (9, 16, 32), dtype=torch.uint8)
    nets = script.Networks(frames, None, envs.single_action_space, args, torch.Generator().manual_seed(0))
    nets.agent.actor[-1].bias.data[:1] = 0.5  # to the right: 2 + 4 * 0.5 = 4 a step
    nets.agent.actor[-1].bias.data[1:] = -5.0
    graphs = script.make_graphs(nets, render, {}, args)
    episodes = script.begin_episodes(envs, render, 4, 0, 200)
    rollout, _ = script.collect_frames(envs, render, nets, graphs, episodes, 30, torch.Generator().manual_seed(0))
    ended = rollout["ended"]
    assert ended.any() and torch.equal(ended, rollout["terminated"])
    columns = rollout["frame"].float().amax(2).argmax(2)  # where the dot is
    assert (columns[ended] > 17).all() and (columns[1:][ended[:-1]] < 17).all()
    assert (rollout["steps_left"][ended] > 150).all()


@pytest.mark.parametrize("limit", [6, 200])
def test_an_evaluation_counts_the_rewards_of_one_episode_each(tmp_path, limit):
    """Against the world itself, one episode after another; who has finished begins again, which counts no more."""
    args = script.parse_args([*MINI.split(), "--demos", write_film(tmp_path / "a.npz")])
    task = {"env_id": "dot:Dot-v0", "max_episode_steps": limit}
    envs = script.make_world(task, 1, args)
    render = script.make_renderer(envs, args)
    frames = torch.zeros((9, 16, 32), dtype=torch.uint8)
    nets = script.Networks(frames, None, envs.single_action_space, args, torch.Generator().manual_seed(0))
    nets.agent.actor[-1].weight.data.zero_()
    nets.agent.actor[-1].bias.data[0] = 0.25  # to the right: 2 + 4 * 0.25 = 3 a step
    graphs = script.make_graphs(nets, render, {}, args)
    course = script.evaluate(nets, render, graphs, task, 5, 7, args)
    env, lengths = dot.Dot(), []
    for i in range(5):
        env.reset(seed=7 + i)
        rewards, ended = [], False
        while not ended and len(rewards) < limit:
            _, reward, ended, _, _ = env.step(np.array([3.0]))
            rewards.append(reward)
        np.testing.assert_allclose(course[: len(rewards), i], np.cumsum(rewards), rtol=1e-6)
        np.testing.assert_allclose(course[len(rewards) :, i], sum(rewards), rtol=1e-6)
        lengths.append(len(rewards))
    assert len(course) == max(lengths) and (limit == 6 or len(set(lengths)) > 1)


@pytest.mark.parametrize(
    "flags, replaced, told",
    [
        ([], {"frames": None}, "the demonstrations have no 'frames'"),
        ([], {"frames": np.zeros((52, 10, 12), np.uint8)}, "its frames are (10, 12) in size, the policy's"),
        ([], {"frames": np.zeros((52, 32, 56, 4), np.uint8)}, "expected uint8, grey or RGB"),
        ([], {"frames": np.zeros((52, 32, 56))}, "its frames are float64"),
        ([], {"frames": np.zeros((51, 32, 56), np.uint8)}, "expected 52 rows"),
        (["--env-id", "dot:BlindDot-v0"], {}, "--env-id dot:BlindDot-v0: "),
        (["--env-id", "dot:Moves-v0"], {}, "its actions are Discrete(2), expected a flat Box of floats with bounds"),
        (["--policy-obs", "state"], {}, "--policy-obs state does not go with --frames render"),
        (["--frames", "capsules"], {}, "capsules can be drawn of HalfCheetah"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, flags, replaced, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        demos = write_film(tmp_path / "x.npz", **replaced)
        if "--env-id" in flags:
            with np.load(demos) as file:
                fields = dict(file)
            fields["metadata"] = json.dumps({"env_id": flags[1], "max_episode_steps": 12})
            np.savez(demos, **fields)
        script.main([*MINI.split(), "--demos", demos, "--output-dir", str(tmp_path / "out"), *flags])
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and told in text and text.count("\n") == 1, text
    assert not (tmp_path / "out").exists()


def test_a_film_of_a_known_body_can_stand_beside_drawn_frames(tmp_path, demo_file, capsys, monkeypatch):
    """The set has frames of the size that the script draws, and nothing else."""
    shown, plot = [], script.plot_first_frames
    monkeypatch.setattr(script, "plot_first_frames", lambda frames, path: shown.append(frames) or plot(frames, path))
    frames = np.random.default_rng(0).integers(0, 256, (15, 16, 24), dtype=np.uint8)
    demos = demo_file(frames=frames, observations=None, actions=None, rewards=None)
    flags = [x for x in MINI.split() if x not in ("--env-id", "dot:Dot-v0", "--frames", "render")]
    flags += ["--demos", demos, "--output-dir", str(tmp_path), "--ae-batch-size", "8"]
    script.main([*flags, "--run-name", "run"])
    assert np.array_equal(shown[0]["expert"], frames[0])
    policy = shown[0]["policy"]
    assert policy.shape == (16, 24) and (policy[0] == 0).all() and policy.max() > 150  # the sky, a body
    picture = script.imageio.imread(tmp_path / "run/first_frames.png")
    assert picture.shape[1] > 1000 and picture.std() > 10  # large, and not empty
    with pytest.raises(SystemExit):
        script.main([*flags, "--policy-obs", "state", "--run-name", "other"])
    assert "to normalize states by" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--demos", demo_file("none.npz", observations=None), "--output-dir", str(tmp_path / "no")])
    assert "neither 'frames' nor 'observations'" in capsys.readouterr().err


def test_gymnasium_wraps_what_is_rendered():
    """What make_world asks of gymnasium: pictures as observations, final ones too."""
    wrapper = gym.wrappers.AddRenderObservation
    env = wrapper(dot.Dot("rgb_array"), render_only=True)
    assert env.reset(seed=0)[0].shape == (32, 56, 3)


# data/demos.py film


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    return importlib.import_module("demos")


def test_videos_become_a_set_that_a_run_learns_from(tmp_path, tool, capsys):
    """A folder of pictures and a GIF, each an episode; through the tool, its inspection, and the script."""
    frames, lengths, _ = dot.film(2, 12)
    pictures = np.split(frames, [lengths[0] + 1])
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(pictures[0]):
        script.imageio.imwrite(tmp_path / f"pictures/{i:03}.png", picture)
    script.imageio.mimsave(tmp_path / "b.gif", list(pictures[1]), duration=50)
    videos = [str(tmp_path / "pictures"), str(tmp_path / "b.gif")]
    target = str(tmp_path / "film.npz")
    tool.main(["film", "--videos", *videos, "--env-id", "dot:Dot-v0", "--image-size", "16", "--target", target])
    with np.load(target) as file:
        arrays = dict(file)
    assert arrays["lengths"].tolist() == lengths.tolist() and not arrays["terminated"].any()
    assert json.loads(str(arrays["metadata"]))["max_episode_steps"] == 12
    expected = script.shrink(frames, 16, 32).numpy()
    first = lengths[0] + 1
    assert np.array_equal(arrays["frames"][:first], expected[:first])
    assert np.abs(arrays["frames"][first:].astype(int) - expected[first:]).max() < 4  # a GIF's colours are few
    tool.main(["inspect", "--demos", target, "--figure", str(tmp_path / "a.png")])
    assert "16 x 32 pixels" in capsys.readouterr().out
    assert script.imageio.imread(tmp_path / "a.png").std() > 10
    demos = ["--demos", target, "--output-dir", str(tmp_path), "--run-name", "run", "--no-capture-video"]
    script.main([*MINI.split(), *demos])
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--videos {}/nothing.gif --env-id Dot-v0 --target {}/a.npz", "nothing.gif"),
        ("--videos {}/still.gif --env-id Dot-v0 --target {}/a.npz", "give --picture-ms, the time of one"),
        ("--videos {}/two.gif --env-id Dot-v0 --target {}/a.npz --picture-ms 8", "--picture-ms is 8, expected 20 or"),
        ("--videos {}/two.gif --env-id Dot-v0 --target {}/a.npz --image-size 8", "a multiple of 8, 16 or more"),
        ("--videos {}/x.MP4 --env-id Dot-v0 --target {}/a.npz", "needs pip install 'imageio[ffmpeg]'"),
        ("--videos {}/x.avi --env-id Dot-v0 --target {}/a.npz", "expected a folder of .png"),
        ("--videos {} --env-id Dot-v0 --target {}/a.npz", "a folder without .png files"),
        ("--videos {}/one.gif --env-id Dot-v0 --target {}/a.npz", "expected two pictures or more"),
        ("--videos {}/one.gif --target {}/a.npz", "give --videos and --env-id"),
        ("--source {}/a.npz --env-id Dot-v0 --target {}/a.npz", "or --source alone"),
        ("--source {}/states.npz --target {}/a.npz", "the field 'actions' is missing"),
        ("--videos {}/two.gif --env-id Dot-v0 --target {}/a.npz --max-episode-steps 1", "max_episode_steps is 1"),
        ("--videos {}/two.gif --env-id Dot-v0 --target {}/a.mp4", "must end in .npz"),
        ("--videos {}/two.gif --env-id Dot-v0 --target {}/a.npz --terminated", "needs the task's --max-episode-steps"),
    ],
)
def test_films_that_cannot_be_made_are_one_sentence(tmp_path, tool, demo_file, flags, told, capsys, monkeypatch):
    monkeypatch.setattr(tool.film.importlib.util, "find_spec", lambda name: None)  # no imageio_ffmpeg
    frames, *_ = dot.film(1, 2)
    script.imageio.mimsave(tmp_path / "still.gif", list(frames[[0, 1, 1, 1]]), duration=50)
    script.imageio.mimsave(tmp_path / "two.gif", list(frames))
    script.imageio.mimsave(tmp_path / "one.gif", list(frames[:1]))
    demo_file("states.npz", actions=None)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        tool.main(["film", *flags.replace("{}", str(tmp_path)).split()])
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and told in text and text.count("\n") == 1, text
    assert sorted(tmp_path.iterdir()) == before


def test_what_the_environment_renders_of_a_set_is_what_a_policy_would_see(tmp_path, tool, monkeypatch):
    """Bit for bit, for a policy that acts as was recorded; rendered by a stand-in for OpenGL that shows where MuJoCo
    has the torso, which lags behind the state by a substep."""

    def render(self):
        place = self.data.geom_xpos[1]
        return np.full((20, 20, 3), int(abs(1e4 * place).sum()) % 256, np.uint8)

    monkeypatch.setattr("gymnasium.envs.mujoco.mujoco_env.MujocoEnv.render", render)
    env = gym.make("Hopper-v4", render_mode="rgb_array")
    env.reset(seed=0)
    env.action_space.seed(0)
    data, live, columns = env.unwrapped.data, [env.render()], {"qpos": [], "qvel": [], "actions": []}
    for _ in range(6):
        columns["qpos"].append(data.qpos.copy())
        columns["qvel"].append(data.qvel.copy())
        columns["actions"].append(env.action_space.sample())
        env.step(columns["actions"][-1])
        live.append(env.render())
    columns["qpos"].append(data.qpos.copy())
    columns["qvel"].append(data.qvel.copy())
    ends = {"lengths": np.array([6]), "terminated": np.array([False]), "truncated": np.array([True])}
    fields = {name: np.array(x) for name, x in columns.items()} | ends
    metadata = json.dumps({"env_id": "Hopper-v4", "max_episode_steps": 10})
    np.savez(tmp_path / "a.npz", observations=np.zeros((7, 11)), rewards=np.ones(6), metadata=metadata, **fields)
    sets = ["--source", str(tmp_path / "a.npz"), "--target", str(tmp_path / "b.npz"), "--image-size", "16"]
    tool.main(["film", *sets])
    with np.load(tmp_path / "b.npz") as file:
        filmed = dict(file)
    assert filmed["frames"].shape == (7, 16, 16) and filmed["rewards"].sum() == 6
    assert np.array_equal(filmed["frames"], script.shrink(np.array(live), 16, 16))
    assert len(set(filmed["frames"][:, 0, 0].tolist())) > 3  # they do differ


def film_of(tmp_path, tool, video, *flags) -> list[int]:
    """First pixels of the frames that the tool makes of a video."""
    flags = ["--videos", str(video), "--env-id", "dot:Dot-v0", "--image-size", "16", *flags]
    tool.main(["film", *flags, "--target", str(tmp_path / "film.npz")])
    with np.load(tmp_path / "film.npz") as file:
        return file["frames"][:, 0, 0].tolist()


def grey(value, *channels, dtype=np.uint8) -> np.ndarray:
    return np.full((16, 16, *channels), value, dtype)


def test_pictures_come_in_the_order_of_their_numbers(tmp_path, tool):
    (tmp_path / "p").mkdir()
    for i in range(12):
        script.imageio.imwrite(tmp_path / f"p/{i}.png", grey(10 * i))
    assert film_of(tmp_path, tool, tmp_path / "p") == list(range(0, 120, 10))


@pytest.mark.parametrize("picture_ms", [20, 1000 / 30, 1000 / 24, 50])
def test_a_gif_shows_what_stands_still_for_as_long(tmp_path, tool, capsys, picture_ms):
    """Also where pictures do not last whole hundredths of a second, which is what a file counts in."""
    values = [0, *[50] * 3, 100, *[150] * 27, 200, *[0] * 61]
    script.imageio.mimsave(tmp_path / "a.GIF", [grey(x, 3) for x in values], duration=picture_ms)
    frames = film_of(tmp_path, tool, tmp_path / "a.GIF", "--picture-ms", str(picture_ms))
    assert frames == pytest.approx(values, abs=3)
    assert "6 pictures make 94 of" in capsys.readouterr().out


def test_a_gif_that_tells_no_times_has_a_step_a_picture(tmp_path, tool, capsys):
    script.imageio.mimsave(tmp_path / "a.gif", [grey(x, 3) for x in (0, 50, 50, 100)])
    assert film_of(tmp_path, tool, tmp_path / "a.gif") == pytest.approx([0, 50, 100], abs=3)
    assert "3 pictures, a step each: it does not tell how long one stays" in capsys.readouterr().out


def test_pictures_of_other_kinds_are_grey_or_refused(tmp_path, tool, capsys):
    with_alpha = [np.concatenate([grey(x, 1), grey(7, 1)], -1) for x in (0, 20)]
    for name, pictures, expected in (
        ("alpha", with_alpha, [0, 20]),
        ("two", [PIL.Image.new("1", (16, 16), x) for x in (0, 1)], [0, 255]),
    ):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures):
            if name == "alpha":
                picture = PIL.Image.fromarray(picture)
            picture.save(tmp_path / name / f"{i}.png")
        assert film_of(tmp_path, tool, tmp_path / name) == expected
    (tmp_path / "deep").mkdir()
    for i in range(2):
        script.imageio.imwrite(tmp_path / f"deep/{i}.png", grey(20_000 * i, dtype=np.uint16))
    with pytest.raises(SystemExit):
        film_of(tmp_path, tool, tmp_path / "deep")
    assert "numbers are uint16, expected 8 bits a channel" in capsys.readouterr().err
