"""Users' mistakes, as one table: each ends with exit code 2 and one sentence that names the flag or file, and leaves
nothing behind."""

import importlib
import pickle
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
import wandb
from conftest import DEMOS, ROOT, make_demo_fields

GAIL = ("gail_ppo", "gail_state_seq", "gail_pixels_ae")
IMAGINING = ("gail_rssm",)
STATES = ("gail_ppo", "gail_state_seq", "gail_rssm", "bc")  # scripts that take any environment
IMITATORS = (*GAIL, *IMAGINING, "bc")
RESUMING = (*IMITATORS, "collect_expert_sac")  # the toy's run lasts seconds
ALL = (*RESUMING, "toy_pointnav")
PPO = (*GAIL, "toy_pointnav")
CARTPOLE = "--env-id CartPole-v1 --demos {}"
# (scripts, flags, what the sentence says); {} is the folder of the files that broken_files() makes
TABLE = [
    (ALL, "--seed -1", "--seed is -1, expected a number, 0 or more and 2147483647 or less; change it."),
    (ALL, f"--seed {'9' * 400}", "expected a number, 0 or more and 2147483647 or less"),
    (ALL, "--learning-rate 0", "--learning-rate is 0.0, expected a number, more than 0; change it."),
    (ALL, "--learning-rate nan", "--learning-rate is nan"),
    (ALL, "--learning-rate inf", "--learning-rate is inf"),
    (ALL, "--hidden-size 0", "--hidden-size is 0"),
    (ALL, "--eval-interval 0", "--eval-interval is 0"),
    (ALL, "--track", "--track: "),  # with an unknown WANDB_MODE, see below
    (RESUMING, "--resume {}/nowhere.pt", "nowhere.pt: not a readable file (No such file or directory)"),
    (RESUMING, "--resume {}/cut.pt", "cut.pt: not a readable file"),
    (RESUMING, "--resume {}/text.pt", "text.pt: not a readable file"),
    (RESUMING, "--resume {}", "not a readable file (Is a directory); give the checkpoint.pt of a run."),
    (RESUMING, "--resume {}/hostile.pt", "hostile.pt: not a readable file ("),
    (RESUMING, "--resume {}/stranger.pt", "it is a stranger, expected a"),
    (RESUMING, "--resume {}/policy.pt", "it is a strange policy, expected a"),
    (RESUMING, "--resume {}/list.pt", "it is a None, expected a"),
    (RESUMING, "--resume {}/bare.pt", "another version of this script"),
    (RESUMING, "--resume {}/whole.pt --seed 3", "checkpoint; drop the other flags"),
    ((*IMITATORS, "collect_expert_sac"), "--cuda", "--cuda was given, but PyTorch sees no"),
    ((*IMITATORS, "collect_expert_sac"), "--threads -1", "--threads is -1, expected a number, 0 or more; change it."),
    ((*PPO, *IMAGINING, "collect_expert_sac"), "--num-envs 0", "--num-envs is 0"),
    ((*PPO, *IMAGINING, "collect_expert_sac"), "--total-timesteps 0", "--total-timesteps is 0"),
    ((*GAIL, *IMAGINING, "collect_expert_sac"), "--checkpoint-interval 0", "--checkpoint-interval is 0"),
    ((*PPO, *IMAGINING), "--gamma 1", "--gamma is 1.0, expected a number, 0 or more and 0.9999 or less"),
    (("collect_expert_sac",), "--gamma 1.5", "--gamma is 1.5, expected a number, 0 or more and 1 or less"),
    (PPO, "--total-timesteps 100", "--total-timesteps is 100"),
    ((*PPO, *IMAGINING), "--gae-lambda -0.1", "--gae-lambda is -0.1"),
    ((*PPO, *IMAGINING), "--num-steps 0", "--num-steps is 0"),
    (PPO, "--num-minibatches 0", "--num-minibatches is 0"),
    (PPO, "--num-minibatches 99999", "--num-minibatches is 99999"),
    (PPO, "--update-epochs 0", "--update-epochs is 0"),
    (PPO, "--clip-coef 0", "--clip-coef is 0.0"),
    (PPO, "--max-grad-norm 0", "--max-grad-norm is 0.0"),
    ((*PPO, *IMAGINING), "--ent-coef -1", "--ent-coef is -1.0"),
    (PPO, "--vf-coef -1", "--vf-coef is -1.0"),
    ((*PPO, *IMAGINING), "--disc-steps 0", "--disc-steps is 0"),
    (PPO, "--disc-batch-size -1", "--disc-batch-size is -1"),
    (PPO, "--disc-hidden-size 0", "--disc-hidden-size is 0"),
    (PPO, "--disc-learning-rate -1", "--disc-learning-rate is -1.0"),
    (("gail_ppo", "gail_pixels_ae", "toy_pointnav"), "--disc-learning-rate 0", "--disc-learning-rate is 0.0"),
    ((*GAIL, *IMAGINING), "--grad-penalty-coef -1", "--grad-penalty-coef is -1.0"),
    ((*IMITATORS, "toy_pointnav"), "--eval-episodes 0", "--eval-episodes is 0"),
    ((*IMITATORS, "toy_pointnav"), "--evaluate {}/nowhere.pt", "nowhere.pt: not a readable file"),
    (
        (*IMITATORS, "toy_pointnav"),
        "--evaluate .",
        "--evaluate .: not a readable file (Is a directory); give the policy.pt",
    ),
    ((*IMITATORS, "toy_pointnav"), "--evaluate {}/hostile.pt", "hostile.pt: not a readable file"),
    ((*IMITATORS, "toy_pointnav"), "--evaluate {}/bare.pt", "--evaluate {}/bare.pt: it is a "),
    (IMITATORS, "--num-demos -1", "--num-demos is -1"),
    (IMITATORS, "--num-demos 51", "--num-demos is 51, but it holds 50 episodes"),
    (IMITATORS, "--demos {}/nowhere.npz", "--demos {}/nowhere.npz: No such file or directory"),
    (IMITATORS, "--demos {}/cut.npz", "--demos {}/cut.npz: "),
    (IMITATORS, "--demos {}/empty.npz", "--demos {}/empty.npz: "),
    (IMITATORS, "--demos {}/text.npz", "--demos {}/text.npz: "),
    (IMITATORS, "--demos {}/pickle.npz", "--demos {}/pickle.npz: "),
    (IMITATORS, "--demos {}/objects.npz", "--demos {}/objects.npz: Object arrays cannot be loaded"),
    (IMITATORS, "--demos {}/policy.pt", "--demos {}/policy.pt: "),
    (IMITATORS, "--demos {}", "--demos {}: Is a directory"),
    (IMITATORS, "--demos {}/unequal.npz", "is float32 of shape (12, 6), expected 15 rows of finite numbers"),
    (IMITATORS, "--demos {}/nan.npz", "expected 15 rows of finite numbers"),
    (IMITATORS, "--demos {}/no_episodes.npz", "holds 0 episodes"),
    (IMITATORS, "--demos {}/no_steps.npz", "'lengths' must be (E,) int64, each episode of 1 step or more"),
    (IMITATORS, "--demos {}/too_long.npz", "an episode has 5 steps, max_episode_steps is 4"),
    (IMITATORS, "--demos {}/flags.npz", "'terminated' is int64 of shape (3,), expected (E,) bool"),
    (IMITATORS, "--demos {}/no_limit.npz", "the field 'max_episode_steps' is missing"),
    (IMITATORS, "--demos {}/hopper.npz", "recorded in Hopper-v4, but --env-id is HalfCheetah-v4"),
    (("gail_ppo", "bc"), "--demos {}/no_actions.npz", "the field 'actions' is missing"),
    (("gail_state_seq",), "--demos {}/no_actions.npz --use-actions", "the field 'actions' is missing"),
    (("gail_ppo", "bc"), "--demos {}/narrow.npz", "has shape (3,), the environment's (17,)"),
    (STATES, "--env-id Nothing-v0 --demos {}/nothing.npz", "--env-id Nothing-v0: "),
    (STATES, "--env-id Image-v0 --demos {}/image.npz", "its observations are Box"),
    (STATES, "--env-id Named-v0 --demos {}/named.npz", "put gymnasium.wrappers.FlattenObservation around it"),
    (STATES, "--env-id Many-v0 --demos {}/many.npz", "its actions are MultiDiscrete([2 2]), expected a flat Box"),
    (STATES, "--env-id FromOne-v0 --demos {}/fromone.npz", "its actions are Discrete(2, start=1), expected a flat Box"),
    (STATES, "--env-id Whole-v0 --demos {}/whole.npz", "int64), expected a flat Box of floats, or Discrete from 0"),
    (("collect_expert_sac",), "--env-id Whole-v0", "int64), expected a flat Box of floats"),
    (STATES, "--env-id Broken-v0 --demos {}/broken.npz", "dimension 2 of an observation is nan at step 3 of an"),
    (("gail_ppo", "bc"), f"{CARTPOLE}/cartpole.npz", "its actions has shape (6,), the environment's ()"),
    (("gail_ppo", "bc"), f"{CARTPOLE}/moves.npz", "go from 0 to 2 (int64), expected whole numbers of Discrete(2)"),
    (("gail_ppo", "bc"), f"{CARTPOLE}/minus.npz", "go from -1 to 1 (int64), expected whole"),
    (("gail_ppo", "bc"), f"{CARTPOLE}/floats.npz", "go from 0.0 to 1.0 (float64), expected whole numbers"),
    (("gail_state_seq",), f"--use-actions {CARTPOLE}/moves.npz", "go from 0 to 2 (int64), expected"),
    (("collect_expert_sac",), "--env-id Nothing-v0", "--env-id Nothing-v0: "),
    (("collect_expert_sac",), "--env-id CartPole-v1", "its actions are Discrete(2), and SAC's are numbers with bounds"),
    (("collect_expert_sac",), "--env-id Boundless-v0", "and SAC's are numbers with bounds"),
    (("collect_expert_sac",), "--env-id Named-v0", "put gymnasium.wrappers.FlattenObservation around it"),
    ((*IMITATORS, "collect_expert_sac", "toy_pointnav"), "--run-name taken", "runs/taken exists already"),
    ((*IMITATORS, "collect_expert_sac", "toy_pointnav"), "--output-dir {}/text.pt", "Not a directory"),
    (("gail_ppo",), "--burn-in-steps -1", "--burn-in-steps is -1"),
    (IMAGINING, "--total-timesteps 500", "--total-timesteps is 500, expected 1000 or more (only finished"),
    (IMAGINING, "--horizon 0", "--horizon is 0"),
    (IMAGINING, "--sequence-length 3", "--sequence-length is 3, expected a number, 4 or more; change it."),
    (IMAGINING, "--recent-share 1.5", "--recent-share is 1.5, expected a number, 0 or more and 1 or less"),
    (IMAGINING, "--learning-starts 5000 --total-timesteps 4000", "--total-timesteps is 4000, expected 5000 or more"),
    (IMAGINING, "--obs pixels --num-steps 300 --total-timesteps 2000", "is 2000, expected 2500 or more (only"),
    (IMAGINING, "--obs pixels --total-timesteps 1500", "--total-timesteps is 1500, expected 2000 or more (only"),
    (IMAGINING, "--obs pixels --image-size 50", "--image-size is 50, expected a multiple of 8; change it."),
    (IMAGINING, "--obs pixels --latent-dim 0", "--latent-dim is 0"),
    (IMAGINING, "--obs pixels --pretrain-steps 0", "--pretrain-steps is 0"),
    (
        IMAGINING,
        "--obs pixels --env-id CartPole-v1",
        "--env-id is CartPole-v1, but --obs pixels draws",
    ),
    (IMAGINING, "--obs pixels --demos {}/nan.npz", "expected 15 rows of finite numbers"),
    (IMAGINING, "--obs pixels --demos {}/narrow.npz", "has shape (3,), the environment's (17,)"),
    (IMAGINING, "--demos {}/narrow.npz", "has shape (3,), the environment's (17,)"),
    (IMAGINING, f"{CARTPOLE}/moves.npz", "its actions are Discrete(2), expected a flat Box with finite bounds"),
    (("gail_state_seq",), "--seq-len 0", "--seq-len is 0"),
    (("gail_state_seq",), "--seq-len 1001", "--seq-len is 1001"),
    (("gail_state_seq",), "--discriminator transformer --disc-hidden-size 30", "--disc-hidden-size is 30"),
    (("gail_pixels_ae",), "--frame-stack 0", "--frame-stack is 0"),
    (("gail_pixels_ae",), "--frame-stack 101 --ae-batch-size 512 --num-steps 200", "--frame-stack is 101"),
    (("gail_pixels_ae",), "--image-size 50", "--image-size is 50"),
    (("gail_pixels_ae",), "--demos {}/narrow.npz", "each row of its observations has shape (3,)"),
    (("gail_pixels_ae",), "--latent-dim 0", "--latent-dim is 0"),
    (("gail_pixels_ae",), "--ae-batch-size 7", "--ae-batch-size is 7"),
    (("gail_pixels_ae",), "--env-id Pendulum-v1", "capsules can be drawn of HalfCheetah"),
    (("bc",), "--val-fraction 1", "--val-fraction is 1.0"),
    (("bc",), "--polyak 1", "--polyak is 1.0"),
    (("bc",), "--compare-with {}/text.npz", "--compare-with {}/text.npz: "),
    (("bc",), "--compare-with {}/flat.npz", "its mean_action has shape (3,), expected (T, E)"),
    (IMITATORS, "--demos {}/endless.npz", "endless.npz: cannot convert float infinity to integer"),
    (("collect_expert_sac",), "--learning-starts 1", "--learning-starts is 1"),
    (("collect_expert_sac",), "--buffer-size 0", "--buffer-size is 0"),
    (("collect_expert_sac",), "--buffer-size 31", "--buffer-size is 31, expected a number, 32 or more"),
    (("toy_pointnav",), "--cg-iterations 0", "--cg-iterations is 0"),
]
COLLECT = [  # of collect_expert_sac.py collect
    ("collect --expert {}/nowhere.pt --output-dir {}/new", "--expert {}/nowhere.pt: not a readable file"),
    ("collect --expert {}/bare.pt --output-dir {}/new", "--expert {}/bare.pt: it is a "),
    ("collect --episodes 0 --output-dir {}/new", "--episodes is 0"),
]
TOOL = [  # of data/demos.py
    ("inspect --demos {}/nan.npz", "NaN or infinity"),
    ("inspect --demos {}/nowhere.npz", "nowhere.npz: "),
    ("convert --source {}/nowhere.pkl --target {}/new.npz", "--source {}/nowhere.pkl: "),
    ("convert --source {}/hostile.pkl --target {}/new.npz", "builtins.print"),
    ("convert --source {}/good.npz --target {}/new.txt", "/new.txt: expected "),
    ("convert --source {}/cut.npz --target {}/new.pkl", "cut.npz: "),
    ("convert --source {}/good.npz --target .", "--target .: "),
    ("convert --source {}/film.npz --target {}/new.pkl", "film.npz: it has no observations, and the target needs them"),
    ("inspect --demos {}/good.npz --figure {}/new", "name a .png"),
]
CASES = [(script, flags, says) for scripts, flags, says in TABLE for script in scripts]


class Hostile:
    def __reduce__(self):
        return (print, ("code from a file ran",))


class Image(gym.Env):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (2,))


class Boundless(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (17,))
    action_space = gym.spaces.Box(-np.inf, np.inf, (6,))


class Named(gym.Env):
    observation_space = gym.spaces.Dict({"position": gym.spaces.Box(-1, 1, (3,)), "goal": gym.spaces.Discrete(2)})
    action_space = gym.spaces.Box(-1, 1, (2,))


class Many(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.MultiDiscrete([2, 2])


class FromOne(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(2, start=1)


class Whole(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-5, 5, (2,), np.int64)


class Broken(gym.Env):
    """A sensor fails in the third step."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        self.steps = 0
        return np.zeros(3), {}

    def step(self, action):
        self.steps += 1
        return np.array([0.0, 1.0, np.nan if self.steps == 3 else 2.0]), 1.0, False, False, {}


for env in (Image, Boundless, Named, Many, FromOne, Whole, Broken):
    gym.register(f"{env.__name__}-v0", env)


@pytest.fixture(scope="module")
def broken_files(tmp_path_factory):
    """A folder of files that no script should accept, beside a good one."""
    folder = tmp_path_factory.mktemp("files")

    def demos(name: str, make=None, **replaced) -> None:
        fields = make_demo_fields(**(make or {})) | replaced
        np.savez(folder / name, **{key: value for key, value in fields.items() if value is not None})

    shutil.copy(DEMOS, folder / "good.npz")
    (folder / "cut.npz").write_bytes(DEMOS.read_bytes()[:100_000])
    (folder / "empty.npz").write_bytes(b"")
    for name in ("text.npz", "text.pt"):
        (folder / name).write_text("not what it seems")
    (folder / "pickle.npz").write_bytes(pickle.dumps(make_demo_fields()))
    (folder / "hostile.pkl").write_bytes(pickle.dumps(Hostile()))
    demos("objects.npz", observations=np.array([{}], dtype=object))
    qpos = {"qpos": np.zeros((15, 9)), "qvel": np.zeros((15, 9))}
    demos("unequal.npz", lengths=np.array([5, 3, 7]), **qpos)
    demos("nan.npz", observations=np.full((15, 17), np.nan, np.float32), **qpos)
    demos("no_episodes.npz", lengths=np.array([], np.int64), **qpos)
    demos("no_steps.npz", lengths=np.array([5, 0, 7]), **qpos)
    demos("too_long.npz", metadata='{"env_id": "HalfCheetah-v4", "max_episode_steps": 4}', **qpos)
    demos("flags.npz", terminated=np.zeros(3, np.int64), **qpos)
    demos("endless.npz", metadata='{"env_id": "HalfCheetah-v4", "max_episode_steps": Infinity}', **qpos)
    np.savez(folder / "flat.npz", mean_action=np.ones(3))
    demos("no_limit.npz", metadata='{"env_id": "HalfCheetah-v4"}', **qpos)
    demos("no_actions.npz", actions=None)
    demos("film.npz", observations=None, frames=np.zeros((15, 8, 8), np.uint8))
    demos("good_states.npz")
    demos("narrow.npz", make={"obs_dim": 3})
    for name, env_id in (("hopper", "Hopper-v4"), ("nothing", "Nothing-v0")):
        demos(f"{name}.npz", make={"env_id": env_id}, **qpos)
    demos("cartpole.npz", make={"env_id": "CartPole-v1", "obs_dim": 4})
    demos("image.npz", make={"env_id": "Image-v0"})
    for env_id in ("Named-v0", "Many-v0", "FromOne-v0", "Whole-v0", "Broken-v0"):
        demos(f"{env_id[:-3].lower()}.npz", make={"env_id": env_id, "obs_dim": 3, "action_dim": 2})
    for name, actions in (("moves", [0, 1, 2]), ("minus", [0, 1, -1]), ("floats", [0.0, 1.0, 1.0])):
        demos(f"{name}.npz", make={"env_id": "CartPole-v1", "obs_dim": 4}, actions=np.tile(actions, 4))
    torch.save({"kind": "stranger"}, folder / "stranger.pt")
    torch.save({"kind": "x", "args": Hostile()}, folder / "hostile.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"kind": "strange policy"}, folder / "policy.pt")
    (folder / "cut.pt").write_bytes((folder / "policy.pt").read_bytes()[:200])
    return folder


def refuses(name: str, argv: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(argv)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert printed.err[:-1].isprintable(), f"it has control characters: {printed.err}"
    assert says in printed.err, printed.err
    said_what_to_do = "; " in printed.err or "No such file" in printed.err or "Not a directory" in printed.err
    assert said_what_to_do, f"it does not say what to do: {printed.err}"
    assert "ran" not in printed.out.split()


@pytest.mark.parametrize(("name", "flags", "says"), CASES, ids=lambda x: str(x)[:60])
def test_every_mistake_is_one_sentence(name, flags, says, broken_files, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs/taken").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "sideways")
    if "--track" in flags:
        wandb.teardown()  # or it goes on with the mode of an earlier test of this process
    if "--cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    torch.save({"kind": f"{name} checkpoint", "args": {}}, broken_files / "bare.pt")  # it holds nothing
    if name in RESUMING:
        settings = vars(importlib.import_module(name).Args())
        if name != "collect_expert_sac":
            settings["num_demos"] = 1  # as a flag that differs, --seed aside
        torch.save({"kind": f"{name} checkpoint", "args": settings}, broken_files / "whole.pt")
    argv = ["train"] if name == "collect_expert_sac" else []
    alone = "--resume" in flags or "--demos" in flags or name in ("collect_expert_sac", "toy_pointnav")
    argv += flags.format(*[broken_files] * 9).split() + ([] if alone else ["--demos", str(broken_files / "good.npz")])
    refuses(name, argv, says.replace("{}", str(broken_files)), capsys)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]
    assert not list((tmp_path / "runs/taken").iterdir())


@pytest.mark.parametrize(("flags", "says"), COLLECT, ids=lambda x: x[:60])
def test_every_mistake_in_recording_is_one_sentence(flags, says, broken_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": "x"}, broken_files / "bare.pt")
    before = sorted(broken_files.iterdir())
    argv = flags.format(*[broken_files] * 9).split()
    refuses("collect_expert_sac", argv, says.format(broken_files), capsys)
    assert sorted(broken_files.iterdir()) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "says"), TOOL, ids=lambda x: x[:60])
def test_every_mistake_with_sets_is_one_sentence(flags, says, broken_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "data")
    before = sorted(broken_files.iterdir())
    refuses("demos", flags.format(*[broken_files] * 9).split(), says.format(broken_files), capsys)
    assert sorted(broken_files.iterdir()) == before and not list(tmp_path.iterdir())
