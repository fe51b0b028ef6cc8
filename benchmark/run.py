"""Run a suite of experiments: `python benchmark/run.py --suite gail`.

A suite is a table of (variant, script, flags, seeds). As many runs as there are cores go at a time, each on one thread
(`--threads 1`) and pinned to one core. What is in the suite's CSV already is skipped, what another suite's CSV holds
is copied from there, and a run that was cut off is resumed from its checkpoint, so the command may be stopped and
started again at any time (`--seeds 5` first, all later). Suites peers and frames copy nothing; peers goes on
one core, in turn.
`--results my_results` begins with empty CSVs in a folder of their own: everything is measured again.
A change that no flag makes is a patch in benchmark/patches, which stands where the script would.
Each finished run adds to

    benchmark/results/<suite>.csv          one row: what summary.json says, the commit and the versions
    benchmark/results/<suite>_curves.csv   its evaluations and discriminator outputs over training
"""

import csv
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark/results"
CURVE = ["global_step", "charts/episodic_return", "eval/return_mean", "disc/expert_prob", "disc/policy_prob"]
TEN, FIVE, THREE = range(1, 11), range(1, 6), range(1, 4)

# suite -> (variant, script, flags, seeds)
FEW_STEPS = ["--total-timesteps", "300000"]
MILLION = ["--total-timesteps", "1000000"]
THREE_MILLION = ["--total-timesteps", "3000000"]
HOPPER = ["--env-id", "Hopper-v4", "--demos", "runs/hopper/hopper-v4_sac_stochastic-one.npz"]
WALKER = ["--env-id", "Walker2d-v4", "--demos", "runs/walker2d/walker2d-v4_sac_stochastic-one.npz"]
LONG_HORIZON = ["--gamma", "0.99", "--gae-lambda", "0.95"]
HALF_ROLLOUTS = "--num-envs 32 --num-minibatches 5 --disc-steps 10 --ae-steps 12 --predictor-steps 30".split()
MOUNTAIN_CAR = "MountainCarContinuous-v0"
ENDINGS = {
    "MountainCarContinuous": [
        *("--env-id", MOUNTAIN_CAR),
        *("--demos", f"runs/other_tasks/{MOUNTAIN_CAR}.npz"),
        *FEW_STEPS,
    ],
    "CartPole": ["--env-id", "CartPole-v1", "--demos", "runs/other_tasks/CartPole-v1.npz"],
    "Acrobot": ["--env-id", "Acrobot-v1", "--demos", "runs/other_tasks/Acrobot-v1.npz"],
    "Hopper": [*HOPPER, *MILLION],
    "Walker2d": [*WALKER, *MILLION],
}
IMITATION, TIANSHOU = "benchmark/peers/run_imitation.py", "benchmark/peers/run_tianshou.py"
LEVELS = ("deterministic", "stochastic-half", "stochastic-one", "stochastic-one_five", "stochastic-two")
DEMOS = "data/halfcheetah-v4_sac_{}.npz"


def pendulum(name: str) -> list[str]:
    return ["--env-id", f"benchmark.other_tasks:{name}-v0", "--demos", f"runs/other_tasks/{name}.npz"]


SUITES: dict[str, list[tuple[str, str, list[str], range]]] = {
    "smoke": [
        ("GAIL", "gail_ppo.py", ["--total-timesteps", "64000"], range(1, 3)),
        ("state sequences", "gail_state_seq.py", ["--total-timesteps", "64000"], range(1, 3)),
    ],
    "gail": [
        ("GAIL", "gail_ppo.py", [], TEN),
        ("GAIL, one demonstration", "gail_ppo.py", ["--num-demos", "1"], FIVE),
        ("GAIL 1M", "gail_ppo.py", MILLION, TEN),
        ("GAIL 1M, one demonstration", "gail_ppo.py", ["--num-demos", "1", *MILLION], FIVE),
        ("PPO on the env reward 1M", "gail_ppo.py", ["--reward-source", "env", *MILLION], FIVE),
        (
            "PPO, gamma 0.99, lambda 0.95, 1M",
            "gail_ppo.py",
            ["--reward-source", "env", *LONG_HORIZON, *MILLION],
            FIVE,
        ),
        ("combined 1M", "gail_ppo.py", ["--reward-source", "combined", *MILLION], FIVE),
        ("GAIL without normalization 1M", "gail_ppo.py", ["--no-normalize-reward", *MILLION], FIVE),
    ],
    "bc": [
        ("BC", "bc.py", [], TEN),
        ("BC, Gaussian head", "bc.py", ["--loss", "nll"], TEN),
        ("BC, one demonstration", "bc.py", ["--num-demos", "1"], TEN),
    ],
    "original_table": [  # the original's own table, then its five sets
        ("BC", "bc.py", [], TEN),
        ("PPO on the env reward", "gail_ppo.py", ["--reward-source", "env"], FIVE),
        ("PPO, gamma 0.99, lambda 0.95", "gail_ppo.py", ["--reward-source", "env", *LONG_HORIZON], FIVE),
        ("GAIL without normalization", "gail_ppo.py", ["--no-normalize-reward"], FIVE),
        ("GAIL + normalization", "gail_ppo.py", [], TEN),
        ("combined", "gail_ppo.py", ["--reward-source", "combined"], FIVE),
        *(
            (f"GAIL + normalization, {level}", "gail_ppo.py", ["--demos", DEMOS.format(level)], FIVE)
            for level in ("deterministic", "stochastic-half", "stochastic-one_five", "stochastic-two")
        ),
    ],
    "few_demonstrations": [  # the set has 50, so K = 50 is the default
        (f"{name}, K = {k}", script, default if k == 50 else ["--num-demos", str(k)], seeds)
        for k in (1, 2, 5, 10, 50)
        for name, script, default, seeds in (
            ("BC", "bc.py", [], FIVE),
            ("GAIL", "gail_ppo.py", [], FIVE),
            ("GAIL on states", "gail_state_seq.py", ["--seq-len", "2"], THREE),
        )
    ],
    "what_matters": [  # one change at a time from the defaults of gail_ppo.py
        *(
            (name, "gail_ppo.py", flags.split(), THREE)
            for name, flags in (
                ("the defaults", ""),
                ("no gradient penalty", "--grad-penalty-coef 0"),
                ("gradient penalty 0.1", "--grad-penalty-coef 0.1"),
                ("gradient penalty 1", "--grad-penalty-coef 1"),
                ("gradient penalty 10", "--grad-penalty-coef 10"),
                ("rewards not normalized", "--no-normalize-reward"),
                ("D: 2 steps a rollout", "--disc-steps 2"),
                ("D: 10 steps a rollout", "--disc-steps 10"),
                ("D: 40 steps a rollout", "--disc-steps 40"),
                ("D: learning rate 1e-3", "--disc-learning-rate 1e-3"),
                ("learning rate 1e-3", "--learning-rate 1e-3"),
                ("learning rate not annealed", "--no-anneal-lr"),
                ("gamma 0.97, lambda 0.9", "--gamma 0.97 --gae-lambda 0.9"),
                ("16 environments", "--num-envs 16"),
                ("D: 64 wide", "--disc-hidden-size 64"),
                ("D: 256 wide", "--disc-hidden-size 256"),
                ("policy: 64 wide", "--hidden-size 64"),
                ("policy: 256 wide", "--hidden-size 256"),
                ("64 environments", "--num-envs 64 --num-minibatches 8 --disc-steps 40"),
                ("warm start from BC", "--bc-warm-start"),
                ("warm start, 500 steps of D first", "--bc-warm-start --burn-in-steps 500"),
            )
        ),
        ("reward log D - log(1 - D)", "benchmark/patches/gail_reward_logit.patch", [], THREE),
        ("reward log D", "benchmark/patches/gail_reward_log_d.patch", [], THREE),
        ("without LayerNorm", "benchmark/patches/gail_without_layernorm.patch", [], THREE),
        ("demonstrations unstandardized", "benchmark/patches/gail_unstandardized.patch", [], THREE),
        (
            "spectral norm, no penalty",
            "benchmark/patches/gail_spectral_norm.patch",
            ["--grad-penalty-coef", "0"],
            THREE,
        ),
        (
            "D: every fourth rollout",
            "benchmark/patches/gail_disc_interval.patch",
            ["--disc-interval", "4"],
            THREE,
        ),
        ("WGAN, penalty 10", "benchmark/patches/gail_wgan.patch", [], THREE),
    ],
    "peers": [  # in turn, seed by seed; wants --imitation-python and --tianshou-python, see benchmark/peers/
        (variant, script, flags.split(), range(seed, seed + 1))
        for seed in THREE
        for variant, script, flags in (
            ("GAIL, ours", "gail_ppo.py", ""),
            ("GAIL, imitation, its settings", IMITATION, "--settings own"),
            ("GAIL, imitation, our settings", IMITATION, "--settings ours"),
            ("GAIL, tianshou, its settings", TIANSHOU, ""),
            ("BC, ours", "bc.py", ""),
            ("BC, imitation", IMITATION, "--method bc"),
            ("the expert in imitation's MuJoCo", IMITATION, "--method expert"),
        )
    ]
    + [("GAIL, tianshou, a quicker D", TIANSHOU, ["--disc-learning-rate", "1e-3", "--disc-steps", "20"], [1])],
    "toy": [
        (name, "toy_pointnav.py", flags, TEN)
        for name, flags in (("PPO", []), ("TRPO", ["--algorithm", "trpo"]), ("PPO, continuous", ["--continuous"]))
    ],
    "bc_study": [
        *(
            (f"{level}, width {width}", "bc.py", ["--demos", DEMOS.format(level), "--hidden-size", str(width)], THREE)
            for level in LEVELS
            for width in (16, 64, 256, 1024)
        ),
        ("stochastic-one, width 4096", "bc.py", ["--hidden-size", "4096"], range(1, 2)),
    ],
    "long": [("GAIL 20M", "gail_ppo.py", ["--total-timesteps", "20000000"], [1])],
    "endings": [  # falls and goals, with the default reward and horizon; sets: see the docs, and other_tasks.py
        (f"{name}, {method}", script, flags, THREE)
        for method, script in (("GAIL", "gail_ppo.py"), ("GAIL on states", "gail_state_seq.py"))
        for name, flags in ENDINGS.items()
    ]
    + [
        (
            f"{name}, GAIL, nothing after an end",
            "benchmark/patches/gail_nothing_after_an_end.patch",
            [*ENDINGS[name], *flags],
            THREE,
        )
        for name, flags in (
            ("MountainCarContinuous", []),
            ("CartPole", []),
            ("Acrobot", []),
            ("Hopper", ["--disc-learning-rate", "1e-3"]),
        )
    ],
    "endings_bc": [
        (f"{env_id}, BC", "bc.py", ["--env-id", env_id, "--demos", f"runs/other_tasks/{env_id}.npz"], THREE)
        for env_id in (MOUNTAIN_CAR, "CartPole-v1", "Acrobot-v1")
    ],
    "units": [  # Pendulum in other units: python benchmark/other_tasks.py makes the sets
        (f"{name}, {method}", script, [*pendulum(name), *flags.split()], THREE)
        for method, script, flags in (
            ("GAIL", "gail_ppo.py", " ".join(FEW_STEPS)),
            ("GAIL on states", "gail_state_seq.py", " ".join(FEW_STEPS)),
            ("BC", "bc.py", ""),
            ("BC, Gaussian head", "bc.py", "--loss nll"),
        )
        for name in ("Torque1", "Torque100", "Torque0p01", "Unbounded", "Obs1e6", "Obs1e-6", "Far")
    ],
    "state_seq": [
        ("N = 2", "gail_state_seq.py", ["--seq-len", "2"], FIVE),
        *((f"N = {n}", "gail_state_seq.py", ["--seq-len", str(n)], FIVE) for n in (1, 3, 4, 5)),
        ("N = 2, 1M", "gail_state_seq.py", ["--seq-len", "2", *MILLION], FIVE),
        ("N = 2, one demonstration", "gail_state_seq.py", ["--num-demos", "1"], FIVE),
        ("N = 4, look ahead", "benchmark/patches/state_seq_look_ahead.patch", ["--seq-len", "4", "--look-ahead"], FIVE),
        *(
            (f"transformer, N = {name}", "gail_state_seq.py", ["--seq-len", *flags.split()], THREE)
            for name, flags in (
                ("16, states", "16 --discriminator transformer"),
                ("16, (s, a)", "16 --discriminator transformer --use-actions"),
                ("100, states", "100 --discriminator transformer"),
            )
        ),
    ],
    "rssm": [
        ("100k steps", "gail_rssm.py", [], FIVE),
        ("Hopper, 100k steps", "gail_rssm.py", HOPPER, THREE),
        ("one demonstration, 100k steps", "gail_rssm.py", ["--num-demos", "1"], FIVE),
        ("200k steps", "gail_rssm.py", ["--total-timesteps", "200000"], FIVE),
    ],
    "rssm_frames": [
        ("frames, 100k", "gail_rssm.py", ["--obs", "pixels"], THREE),
        ("frames, 100k, D on replayed ones", "benchmark/patches/rssm_replayed.patch", ["--obs", "pixels"], [1]),
        ("Hopper, frames, 100k", "gail_rssm.py", ["--obs", "pixels", *HOPPER], THREE),
        ("Hopper, frames, 200k", "gail_rssm.py", ["--obs", "pixels", *HOPPER, "--total-timesteps", "200000"], THREE),
        ("Walker2d, frames, 100k", "gail_rssm.py", ["--obs", "pixels", *WALKER], THREE),
    ],
    "rssm_choices": [  # one change at a time from the defaults of gail_rssm.py, 40,000 steps
        *(
            (name, script, ["--total-timesteps", "40000", *flags.split()], range(1, 3))
            for name, script, flags in (
                ("the defaults, 40k", "gail_rssm.py", ""),
                ("D on what was replayed", "benchmark/patches/rssm_replayed.patch", ""),
                ("REINFORCE", "benchmark/patches/rssm_reinforce.patch", ""),
                ("discrete latents", "benchmark/patches/rssm_discrete.patch", ""),
                ("8 updates for 100 steps", "gail_rssm.py", "--updates 8"),
                ("32 updates for 100 steps", "gail_rssm.py", "--updates 32"),
                ("no recent steps preferred", "gail_rssm.py", "--recent-share 0"),
                ("horizon 6", "gail_rssm.py", "--horizon 6"),
                ("horizon 20", "gail_rssm.py", "--horizon 20"),
                ("reconstruction 1", "gail_rssm.py", "--reconstruction-coef 1"),
                ("2 steps of D", "gail_rssm.py", "--disc-steps 2"),
                ("entropy bonus 0.01", "gail_rssm.py", "--ent-coef 0.01"),
            )
        ),
    ],
    "pixels_ablation": [  # one change at a time from the defaults of gail_pixels_ae.py, half their frames
        *(
            (name, "gail_pixels_ae.py", ["--total-timesteps", "500000", *flags.split()], range(1, 3))
            for name, flags in (
                ("the defaults, 0.5M", ""),
                ("encoder frozen after the pretraining", "--ae-steps 0"),
                ("no pretraining", "--pretrain-steps 0"),
                ("reconstruction alone", "--inverse-coef 0"),
                ("no predictor", "--predictor-steps 0"),
                ("entropy bonus 0.003", "--ent-coef 0.003"),
                ("a quarter of the learning rate", "--learning-rate 5e-4"),
                ("2 frames", "--frame-stack 2"),
                ("8 frames", "--frame-stack 8"),
                ("32 latents", "--latent-dim 32"),
                ("128 latents", "--latent-dim 128"),
                ("32 environments", " ".join(HALF_ROLLOUTS)),
            )
        ),
        (
            "faithful, 0.5M",
            "benchmark/patches/pixels_faithful.patch",
            ["--total-timesteps", "500000"],
            range(1, 3),
        ),
        (
            "spectral norm, no penalty",
            "benchmark/patches/pixels_spectral_norm.patch",
            ["--total-timesteps", "500000", "--spectral-norm", "--grad-penalty-coef", "0"],
            range(1, 3),
        ),
    ],
    "frames": [  # as the script draws them; the two suites above and below are of its former OpenGL frames
        ("HalfCheetah, 1M", "gail_pixels_ae.py", [], THREE),
        (
            "Hopper, demonstrations that never fall, 2M",
            "gail_pixels_ae.py",
            [
                *("--env-id", "Hopper-v4", "--demos", "runs/hopper/hopper-v4_sac_deterministic.npz"),
                *("--total-timesteps", "2000000"),
            ],
            THREE,
        ),
        (
            "Hopper, 2M",
            "gail_pixels_ae.py",
            [
                *("--env-id", "Hopper-v4", "--demos", "runs/hopper/hopper-v4_sac_stochastic-one.npz"),
                *("--ae-steps", "0", "--latent-dim", "32", "--learning-rate", "7e-4"),
                *("--disc-learning-rate", "3e-4", "--total-timesteps", "2000000"),
            ],
            THREE,
        ),
        (
            "Hopper, 3M",
            "gail_pixels_ae.py",
            [
                *("--env-id", "Hopper-v4", "--demos", "runs/hopper/hopper-v4_sac_stochastic-one.npz"),
                *("--ae-steps", "0", "--latent-dim", "32", "--learning-rate", "7e-4"),
                *("--disc-learning-rate", "3e-4", "--total-timesteps", "3000000"),
            ],
            THREE,
        ),
        (
            "Hopper, entropy bonus 0.005, 2M",
            "gail_pixels_ae.py",
            [
                *("--env-id", "Hopper-v4", "--demos", "runs/hopper/hopper-v4_sac_stochastic-one.npz"),
                *("--ae-steps", "0", "--latent-dim", "32", "--learning-rate", "7e-4"),
                *("--disc-learning-rate", "3e-4", "--total-timesteps", "2000000", "--ent-coef", "0.005"),
            ],
            THREE,
        ),
        (
            "Hopper, gradient penalty 1, 2M",
            "gail_pixels_ae.py",
            [
                *("--env-id", "Hopper-v4", "--demos", "runs/hopper/hopper-v4_sac_stochastic-one.npz"),
                *("--ae-steps", "0", "--latent-dim", "32", "--learning-rate", "7e-4"),
                *("--disc-learning-rate", "3e-4", "--total-timesteps", "2000000", "--grad-penalty-coef", "1"),
            ],
            THREE,
        ),
        (
            "Hopper, demonstrations that never fall, gradient penalty 1, 3M",
            "gail_pixels_ae.py",
            [
                *("--env-id", "Hopper-v4", "--demos", "runs/hopper/hopper-v4_sac_deterministic.npz"),
                *("--ae-steps", "0", "--latent-dim", "32", "--learning-rate", "7e-4"),
                *("--disc-learning-rate", "3e-4", "--total-timesteps", "3000000", "--grad-penalty-coef", "1"),
            ],
            THREE,
        ),
        ("HalfCheetah, policy on the state, 1M", "gail_pixels_ae.py", ["--policy-obs", "state"], THREE),
        ("HalfCheetah, one demonstration, 1M", "gail_pixels_ae.py", ["--num-demos", "1"], THREE),
    ],
    "pixels": [
        ("policy on latents, 1M", "gail_pixels_ae.py", [], THREE),
        ("policy on the state, 1M", "gail_pixels_ae.py", ["--policy-obs", "state"], THREE),
        ("true reward on latents, 3M", "benchmark/patches/pixels_true_reward.patch", THREE_MILLION, range(1, 5)),
        ("faithful, 1M", "benchmark/patches/pixels_faithful.patch", [], THREE),
        ("entropy bonus 0.003, 1M", "gail_pixels_ae.py", ["--ent-coef", "0.003"], THREE),  # the ablation's best two
        ("32 latents, 1M", "gail_pixels_ae.py", ["--latent-dim", "32"], THREE),
        ("32 environments, 1M", "gail_pixels_ae.py", HALF_ROLLOUTS, THREE),
        ("policy on latents, 3M", "gail_pixels_ae.py", THREE_MILLION, THREE),
    ],
}


@dataclass
class Args:
    suite: str = "smoke"
    """smoke, gail, bc, bc_study, toy, original_table, few_demonstrations, what_matters, peers, long, endings,
    endings_bc, units, state_seq, rssm, rssm_frames, rssm_choices, frames, pixels_ablation, pixels"""
    seeds: int = 0
    """run seeds up to this one alone (0: all)"""
    results: Path = RESULTS
    """folder of the CSVs"""
    runs: str = "runs/benchmark"
    """folder for the runs' own files, which may be deleted afterwards"""
    imitation_python: str = sys.executable
    """Python of the environment that holds `imitation` (suite peers)"""
    tianshou_python: str = sys.executable
    """Python of the environment that holds `tianshou` (suite peers)"""


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replace a CSV by rows whose columns may differ."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def add_rows(results: Path, suite: str, ending: str, new: list[dict]) -> None:
    """Add rows to a suite's CSV, in place of what it may hold of their variant and seed; in the suite's order."""
    path, order = results / f"{suite}{ending}.csv", [variant for variant, *_ in SUITES[suite]]
    keys = {(str(row["variant"]), str(row["seed"])) for row in new}
    rows = [row for row in read_rows(path) if (row["variant"], row["seed"]) not in keys] + new
    place = {variant: i for i, variant in enumerate(dict.fromkeys([*order, *(row["variant"] for row in rows)]))}
    write_rows(path, sorted(rows, key=lambda row: (place[row["variant"]], int(row["seed"]))))


def target(patch: str) -> str:
    """Name of the one script that a patch changes."""
    return re.search(r"^\+\+\+ \w/(\S+)$", (ROOT / patch).read_text(), re.MULTILINE).group(1)


def command_line(script: str, flags: list[str], seed: int) -> str:
    first = ["python", script]
    if script.endswith(".patch"):
        first = ["git", "apply", script, "&&", "python", target(script)]
    return " ".join([*first, *flags, "--seed", str(seed)])


def patched(patch: str, folder: Path) -> Path:
    """A copy of the script that a patch changes, changed, in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy = shutil.copy(ROOT / target(patch), folder)
    outside = os.environ | {
        "GIT_CEILING_DIRECTORIES": str(folder.parent)
    }  # or git looks for the file in the repository
    subprocess.run(["git", "apply", str(ROOT / patch)], cwd=folder, env=outside, check=True)
    return Path(copy)


def copy_known(results: Path, suite: str, commands: dict[str, dict]) -> None:
    """Add to the suite's CSVs what other suites' hold of its commands (command -> variant and seed here).

    A row keeps its commit and its speed, so delete rows that a change of the script has made stale."""
    for other in SUITES:
        rows, their_curves = (read_rows(results / f"{other}{ending}.csv") for ending in ("", "_curves"))
        known = {
            (row["variant"], row["seed"]): commands.pop(row["command"])
            for row in rows
            if row.get("command") in commands
        }
        for ending, theirs in (("_curves", their_curves), ("", rows)):  # what is in the table counts as done
            mine = [row | known[key] for row in theirs if (key := (row["variant"], row["seed"])) in known]
            if mine:
                add_rows(results, suite, ending, mine)


def current_commit() -> str:
    """The commit, marked if a script differs from it (results may)."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    code = [":(glob)*.py", "benchmark/patches", "benchmark/peers"]
    differs = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode
    return f"{commit}-dirty" if differs else commit


def cpu() -> str:
    """The CPU's name, family and model: runs on different ones go different ways."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    told = {name.strip(): value.strip() for name, value in lines}
    return " ".join(told[name] for name in ("model name", "cpu family", "model") if name in told)


def run_one(folder: Path, script: str, flags: list[str], seed: int, core: int, python: str) -> str:
    """One run on one core into a folder; returns the commit it ran at. A run of the same command and commit that was
    cut off is resumed, what else the folder holds is deleted."""
    commit, note = current_commit(), Path(f"{folder}.txt")
    mark = f"{commit} {command_line(script, flags, seed)}"
    cut_off = (folder / "checkpoint.pt").exists() and not (folder / "summary.json").exists()
    if cut_off and note.exists() and note.read_text() == mark:
        command = ["--resume", str(folder / "checkpoint.pt")]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        note.write_text(mark)
        place = ["--output-dir", str(folder.parent), "--run-name", folder.name]
        if script != "toy_pointnav.py":  # which always uses one
            place += ["--threads", "1"]
        command = [*flags, "--seed", str(seed), *place]
    code = patched(script, Path(f"{folder}_script")) if script.endswith(".patch") else ROOT / script
    with open(f"{folder}.log", "w") as log:
        subprocess.run(
            [python, str(code), *command],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            check=True,
        )
    return commit


def steps_to_90(curve: list[dict], summary: dict) -> int | None:
    """The first of two evaluations in a row that reach 90% of the way from random actions to the demonstrations."""
    if "random_return_mean" not in summary:
        return None
    random, demos = summary["random_return_mean"], summary["demos_return_mean"]
    high = [float(row["eval/return_mean"]) >= random + 0.9 * (demos - random) for row in curve]
    twice = [int(row["global_step"]) for row, *pair in zip(curve, high, high[1:]) if all(pair)]
    return twice[0] if twice else None


def main(args: Args) -> None:
    if args.suite not in SUITES:
        sys.exit(f"--suite is {args.suite}, expected one of {', '.join(SUITES)}")
    results, runs = args.results.resolve(), Path(args.runs).resolve()
    results.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    wanted = [
        (command_line(script, flags, seed), (variant, script, flags, seed))
        for variant, script, flags, seeds in SUITES[args.suite]
        for seed in seeds
        if seed <= (args.seeds or seed)
    ]
    table, cores = results / f"{args.suite}.csv", sorted(os.sched_getaffinity(0))
    if args.suite == "peers":
        cores = cores[:1]
    if args.suite not in ("peers", "frames"):
        done = {row.get("command") for row in read_rows(table)}  # the oldest rows tell no command
        copy_known(results, args.suite, {c: {"variant": r[0], "seed": r[3]} for c, r in wanted if c not in done})
    done = {row.get("command") for row in read_rows(table)}
    todo: queue.Queue = queue.Queue()
    for command, one in wanted:
        if command not in done:
            todo.put(one)
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "mujoco", "gymnasium", "numpy"))
    progress, lock, stop = tqdm(total=todo.qsize(), desc=args.suite), threading.Lock(), threading.Event()
    failed: list[str] = []
    pythons = {IMITATION: args.imitation_python, TIANSHOU: args.tianshou_python}

    def run_and_note(variant: str, script: str, flags: list[str], seed: int, core: int) -> None:
        folder = runs / f"{args.suite}__{variant.replace(' ', '-').replace('/', '-')}__{seed}"
        commit = run_one(folder, script, flags, seed, core, pythons.get(script, sys.executable))
        key = {"variant": variant, "seed": seed}
        row = key | {"command": command_line(script, flags, seed), "commit": commit, "versions": versions, "cpu": cpu()}
        row |= json.loads((folder / "summary.json").read_text())  # a peer tells its own versions
        curve = [r for r in read_rows(folder / "metrics.csv") if r.get("eval/return_mean")]
        row["steps_to_90"] = steps_to_90(curve, row)
        with lock:
            add_rows(results, args.suite, "_curves", [key | {name: r.get(name) for name in CURVE} for r in curve])
            add_rows(results, args.suite, "", [row])  # last: what it holds counts as done
            progress.update()

    def work(core: int) -> None:
        while not stop.is_set():
            try:
                one = todo.get_nowait()
            except queue.Empty:
                return
            try:
                run_and_note(*one, core)
            except Exception as error:  # whatever it is, the other runs go on
                if not stop.is_set():
                    failed.append(f"{one[0]}, seed {one[3]}: {error}")

    workers = [threading.Thread(target=work, args=(core,)) for core in cores]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:  # the runs got it too, and end; their last checkpoints stay
        stop.set()
        sys.exit("stopped; the same command goes on")
    progress.close()
    if failed:
        sys.exit("\n".join([f"failed, see the logs in {runs}:", *failed]))


if __name__ == "__main__":
    main(tyro.cli(Args))
