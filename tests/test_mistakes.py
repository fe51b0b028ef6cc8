"""Users' mistakes, as one table: each ends with exit code 2 and one sentence that names the flag or file, and leaves
nothing behind."""

import importlib
import pickle
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import DEMOS, make_demo_fields

GAIL = ("gail_ppo", "gail_state_seq", "gail_pixels_ae")
STATES = ("gail_ppo", "gail_state_seq", "bc")  # scripts that take any environment
IMITATORS = (*GAIL, "bc")
ALL = (*IMITATORS, "collect_expert_sac", "toy_pointnav")
# (scripts, flags, what the sentence says); {} is the folder of the files that broken_files() makes
TABLE = [
    (ALL, "--seed -1", "--seed is -1, expected a number from 0 to 2147483647"),
    (ALL, "--learning-rate 0", "--learning-rate is 0.0, expected a number greater than 0"),
    (ALL, "--learning-rate nan", "--learning-rate is nan"),
    (ALL, "--learning-rate inf", "--learning-rate is inf"),
    (ALL, "--hidden-size 0", "--hidden-size is 0"),
    (ALL, "--eval-interval 0", "--eval-interval is 0"),
    (ALL, "--resume {}/nowhere.pt", "nowhere.pt: not a readable file (No such file or directory)"),
    (ALL, "--resume {}/cut.pt", "cut.pt: not a readable file"),
    (ALL, "--resume {}/text.pt", "text.pt: not a readable file"),
    (ALL, "--resume {}", "not a readable file (Is a directory)"),
    (ALL, "--resume {}/hostile.pt", "hostile.pt: not a readable file (UnpicklingError)"),
    (ALL, "--resume {}/stranger.pt", "its script is stranger, expected"),
    (ALL, "--resume {}/policy.pt", "its script is None, expected"),
    (ALL, "--resume {}/list.pt", "its script is None, expected"),
    (ALL, "--resume {}/old.pt", "its format_version is 0, expected 1"),
    (ALL, "--resume {}/bare.pt", "written by another version of this script"),
    (ALL, "--resume {}/bare.pt --seed 3", "--resume takes every setting from the checkpoint"),
    (ALL, "--track", "--track: "),  # with an unknown WANDB_MODE, see below
    (IMITATORS + ("collect_expert_sac",), "--cuda", "--cuda was given, but PyTorch sees no"),
    (IMITATORS + ("collect_expert_sac",), "--threads -1", "--threads is -1, expected a number 0 or greater"),
    ((*GAIL, "collect_expert_sac", "toy_pointnav"), "--num-envs 0", "--num-envs is 0"),
    ((*GAIL, "collect_expert_sac", "toy_pointnav"), "--total-timesteps 0", "--total-timesteps is 0"),
    ((*GAIL, "collect_expert_sac", "toy_pointnav"), "--checkpoint-interval 0", "--checkpoint-interval is 0"),
    ((*GAIL, "collect_expert_sac", "toy_pointnav"), "--gamma 1.5", "--gamma is 1.5, expected a number between 0 and 1"),
    ((*GAIL, "toy_pointnav"), "--total-timesteps 100", "--total-timesteps is 100"),
    ((*GAIL, "toy_pointnav"), "--gae-lambda -0.1", "--gae-lambda is -0.1"),
    ((*GAIL, "toy_pointnav"), "--num-steps 0", "--num-steps is 0"),
    ((*GAIL, "toy_pointnav"), "--num-minibatches 0", "--num-minibatches is 0"),
    ((*GAIL, "toy_pointnav"), "--num-minibatches 99999", "--num-minibatches is 99999"),
    ((*GAIL, "toy_pointnav"), "--update-epochs 0", "--update-epochs is 0"),
    ((*GAIL, "toy_pointnav"), "--clip-coef 0", "--clip-coef is 0.0"),
    ((*GAIL, "toy_pointnav"), "--max-grad-norm 0", "--max-grad-norm is 0.0"),
    ((*GAIL, "toy_pointnav"), "--ent-coef -1", "--ent-coef is -1.0"),
    ((*GAIL, "toy_pointnav"), "--vf-coef -1", "--vf-coef is -1.0"),
    ((*GAIL, "toy_pointnav"), "--disc-steps 0", "--disc-steps is 0"),
    ((*GAIL, "toy_pointnav"), "--disc-batch-size -1", "--disc-batch-size is -1"),
    (("gail_ppo", "gail_pixels_ae", "toy_pointnav"), "--disc-batch-size 0", "--disc-batch-size is 0"),
    ((*GAIL, "toy_pointnav"), "--disc-hidden-size 0", "--disc-hidden-size is 0"),
    (GAIL, "--disc-loss wgan --reward-form logit", "--reward-form is for --disc-loss bce"),
    (ALL, f"--seed {'9' * 400}", "expected a number from 0 to 2147483647"),
    ((*GAIL, "toy_pointnav"), "--disc-learning-rate 0", "--disc-learning-rate is 0.0"),
    ((*GAIL, "toy_pointnav"), "--grad-penalty-coef -1", "--grad-penalty-coef is -1.0"),
    ((*GAIL, "toy_pointnav"), "--disc-ent-coef -1", "--disc-ent-coef is -1.0"),
    (GAIL, "--target-kl -1", "--target-kl is -1.0"),
    ((*IMITATORS, "toy_pointnav"), "--eval-episodes 0", "--eval-episodes is 0"),
    ((*IMITATORS, "toy_pointnav"), "--evaluate {}/nowhere.pt", "nowhere.pt: not a readable file"),
    ((*IMITATORS, "toy_pointnav"), "--evaluate {}/hostile.pt", "hostile.pt: not a readable file"),
    ((*IMITATORS, "toy_pointnav"), "--evaluate {}/bare.pt", "--evaluate {}/bare.pt: its "),
    (("gail_ppo", "gail_state_seq", "bc"), "--evaluate {}/hollow.pt", "hollow.pt"),
    (IMITATORS, "--num-demos -1", "--num-demos is -1"),
    (IMITATORS, "--num-demos 51", "--num-demos is 51, but {}/good.npz holds 50 episodes"),
    (IMITATORS, "--demos {}/nowhere.npz", "nowhere.npz: not a readable demonstration set (No such file or directory)"),
    (IMITATORS, "--demos {}/cut.npz", "cut.npz: not a readable demonstration set"),
    (IMITATORS, "--demos {}/empty.npz", "empty.npz: not a readable demonstration set"),
    (IMITATORS, "--demos {}/text.npz", "text.npz: not a readable demonstration set"),
    (IMITATORS, "--demos {}/pickle.npz", "pickle.npz: not a readable demonstration set"),
    (IMITATORS, "--demos {}/objects.npz", "objects.npz: not a readable demonstration set"),
    (IMITATORS, "--demos {}/policy.pt", "policy.pt: not a readable demonstration set"),
    (IMITATORS, "--demos {}", "not a readable demonstration set"),
    (IMITATORS, "--demos {}/unequal.npz", "'observations' is float32 of shape (15, 17), expected 18 rows of numbers"),
    (IMITATORS, "--demos {}/nan.npz", "holds NaN or infinity, expected finite numbers"),
    (IMITATORS, "--demos {}/no_episodes.npz", "'lengths' must hold at least one episode"),
    (IMITATORS, "--demos {}/old.npz", "its format version is not 1"),
    (IMITATORS, "--demos {}/hopper.npz", "recorded in Hopper-v4, but --env-id is HalfCheetah-v4"),
    (("gail_ppo", "bc"), "--demos {}/no_actions.npz", "the field 'actions' is missing, and this script needs it"),
    (("gail_state_seq",), "--demos {}/no_actions.npz --use-actions", "the field 'actions' is missing"),
    (("gail_pixels_ae",), "--demos {}/good_states.npz", "the field 'qpos' is missing, and this script needs it"),
    (("gail_ppo", "bc"), "--demos {}/narrow.npz", "its observations have 3 dimensions, the environment's 17"),
    (STATES, "--env-id Nothing-v0 --demos {}/nothing.npz", "--env-id Nothing-v0: "),
    (STATES, "--env-id CartPole-v1 --demos {}/cartpole.npz", "its actions are Discrete(2), expected a flat Box"),
    (STATES, "--env-id Image-v0 --demos {}/image.npz", "its observations are Box"),
    (("bc",), "--env-id Boundless-v0 --demos {}/boundless.npz", "and Boundless-v0 has none; give --loss nll"),
    (("collect_expert_sac",), "--env-id Nothing-v0", "--env-id Nothing-v0: "),
    (("collect_expert_sac",), "--env-id CartPole-v1", "its actions are Discrete(2), expected a flat Box"),
    ((*IMITATORS, "collect_expert_sac", "toy_pointnav"), "--run-name taken", "--run-name taken: "),
    ((*IMITATORS, "collect_expert_sac", "toy_pointnav"), "--output-dir {}/text.pt", "Not a directory; give a folder"),
    (("gail_ppo", "gail_state_seq"), "--reward-source combined --no-normalize-reward", "drop it or --no-normalize-rew"),
    (("gail_ppo",), "--reward-source env --burn-in-steps 5", "--burn-in-steps trains the discriminator"),
    (("gail_ppo",), "--disc-interval 0", "--disc-interval is 0"),
    (("gail_state_seq",), "--seq-len 0", "--seq-len is 0"),
    (("gail_state_seq",), "--seq-len 101", "--seq-len is 101, but the shortest demonstration has 100 steps"),
    (("gail_state_seq",), "--discriminator transformer --disc-hidden-size 30", "--disc-hidden-size is 30"),
    (("gail_pixels_ae",), "--frame-stack 0", "--frame-stack is 0"),
    (("gail_pixels_ae",), "--frame-stack 101 --ae-batch-size 512 --num-steps 200", "--frame-stack is 101"),
    (("gail_pixels_ae",), "--image-size 50", "--image-size is 50, expected a number of 16 or more that divides by 8"),
    (("gail_pixels_ae",), "--latent-dim 0", "--latent-dim is 0"),
    (("gail_pixels_ae",), "--ae-batch-size 7", "--ae-batch-size is 7"),
    (("gail_pixels_ae",), "--env-id Hopper-v4", "frames are of HalfCheetah-v4 alone"),
    (("bc",), "--val-fraction 1", "--val-fraction is 1.0"),
    (("bc",), "--polyak 1", "--polyak is 1.0"),
    (("bc",), "--study --capture-video", "--study trains many policies"),
    (("bc",), "--compare-with {}/bare.pt", "--compare-with {}/bare.pt: its env_id is None, expected HalfCheetah-v4"),
    (("collect_expert_sac",), "--learning-starts 1", "--learning-starts is 1, expected"),
    (("collect_expert_sac",), "--buffer-size 0", "--buffer-size is 0"),
    (("toy_pointnav",), "--noise-std -1", "--noise-std is -1.0"),
    (("toy_pointnav",), "--cg-iterations 0", "--cg-iterations is 0"),
]
COMMANDS = [  # of collect_expert_sac.py, but train
    ("collect --expert {}/nowhere.pt --output-dir {}/new", "--expert {}/nowhere.pt: not a readable file"),
    ("collect --expert {}/bare.pt --output-dir {}/new", "its kind is None, expected tanh_gaussian"),
    ("collect --episodes 0 --output-dir {}/new", "--episodes is 0"),
    ("inspect --demos {}/nan.npz", "holds NaN or infinity"),
    ("inspect --demos {}/nowhere.npz", "not a readable demonstration set"),
    ("convert --source {}/nowhere.pkl --target {}/new.npz", "--source {}/nowhere.pkl: no HalfCheetah-v4 trajectories"),
    ("convert --source {}/hostile.pkl --target {}/new.npz", "it asks for builtins.print"),
    ("convert --source {}/good.npz --target {}/new.npz", "expected one .pkl and one .npz"),
    ("convert --source {}/cut.npz --target {}/new.pkl", "not a readable demonstration set"),
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


gym.register("Image-v0", Image)
gym.register("Boundless-v0", Boundless)


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
    demos("old.npz", metadata='{"format_version": 0}', **qpos)
    demos("no_actions.npz", actions=None)
    demos("good_states.npz")
    demos("narrow.npz", make={"obs_dim": 3})
    for name, env_id in (("hopper", "Hopper-v4"), ("nothing", "Nothing-v0"), ("cartpole", "CartPole-v1")):
        demos(f"{name}.npz", make={"env_id": env_id}, **qpos)
    demos("image.npz", make={"env_id": "Image-v0"})
    demos("boundless.npz", make={"env_id": "Boundless-v0"})
    torch.save({"format_version": 1, "script": "stranger"}, folder / "stranger.pt")
    torch.save({"format_version": 1, "args": Hostile()}, folder / "hostile.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"format_version": 1, "kind": "gaussian"}, folder / "policy.pt")
    torch.save({"format_version": 1, "kind": "gaussian", "env_id": "HalfCheetah-v4"}, folder / "hollow.pt")
    (folder / "cut.pt").write_bytes((folder / "policy.pt").read_bytes()[:200])
    return folder


def refuses(name: str, argv: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(argv)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert says in printed.err and printed.err.rstrip().endswith("."), printed.err
    assert "; " in printed.err, f"it does not say what to do: {printed.err}"
    assert "ran" not in printed.out.split()


@pytest.mark.parametrize(("name", "flags", "says"), CASES, ids=lambda x: str(x)[:60])
def test_every_mistake_is_one_sentence(name, flags, says, broken_files, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs/taken").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "sideways")
    if "--cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for kind in ("bare", "old"):  # a checkpoint of this script that holds nothing, and one of another format
        content = {"format_version": int(kind == "bare"), "script": name, "args": {}}
        torch.save(content, broken_files / f"{kind}.pt")
    argv = ["train"] if name == "collect_expert_sac" else []
    alone = "--resume" in flags or "--demos" in flags or name in ("collect_expert_sac", "toy_pointnav")
    argv += flags.format(*[broken_files] * 9).split() + ([] if alone else ["--demos", str(broken_files / "good.npz")])
    refuses(name, argv, says.replace("{}", str(broken_files)), capsys)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]
    assert not list((tmp_path / "runs/taken").iterdir())


@pytest.mark.parametrize(("flags", "says"), COMMANDS, ids=lambda x: x[:60])
def test_every_mistake_with_sets_is_one_sentence(flags, says, broken_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(broken_files.iterdir())
    refuses("collect_expert_sac", flags.format(*[broken_files] * 9).split(), says.format(broken_files), capsys)
    assert sorted(broken_files.iterdir()) == before and not list(tmp_path.iterdir())
