"""Kill a run again and again, and see that nothing is lost: `python benchmark/sudden_death.py --script gail_ppo`.

A small run goes through undisturbed. The same run is then killed (SIGKILL) at random moments, every third time while it
writes a checkpoint, and resumed each time. In the end policy, metrics and summary must be those of the undisturbed
run, bit for bit but for times, and Weights & Biases (offline) must have seen one run. What came of it goes to
benchmark/results/sudden_death.csv.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark/results/sudden_death.csv"
ROLLOUTS = ["--threads", "1", "--num-envs", "8", "--num-steps", "100"]
ROLLOUTS += ["--eval-interval", "2000", "--checkpoint-interval", "800"]
# script -> (command, flags of a run of some ten seconds with a checkpoint every fraction of a second)
RUNS = {
    "bc": ([], ["--gradient-steps", "12000", "--eval-interval", "100", "--hidden-size", "64", "--threads", "1"]),
    "collect_expert_sac": (
        ["train"],
        "--total-timesteps 300000 --learning-starts 5000 --num-envs 16 --checkpoint-interval 10000 "
        "--eval-interval 50000 --buffer-size 50000 --hidden-size 32 --updates-per-step 0.02".split(),
    ),
    "gail_pixels_ae": (
        [],
        ["--total-timesteps", "40000", *ROLLOUTS, "--image-size", "32", "--latent-dim", "8", "--ae-batch-size", "32"]
        + "--pretrain-steps 20 --ae-steps 4 --predictor-steps 4 --no-capture-video --num-demos 2".split(),
    ),
    "gail_ppo": ([], ["--total-timesteps", "100000", *ROLLOUTS]),
    "gail_rssm": (
        [],
        ["--total-timesteps", "60000", *ROLLOUTS, "--learning-starts", "1600", "--updates", "1", "--num-starts", "8"]
        + "--batch-size 4 --sequence-length 8 --horizon 3 --deter-size 16 --stoch-size 4 --model-hidden-size 16 "
        "--hidden-size 16 --disc-batch-size 16".split(),
    ),
    "gail_state_seq": ([], ["--total-timesteps", "100000", *ROLLOUTS]),
}
UNTIMED = ("seconds", "charts/SPS", "time/")  # what may differ starts so


@dataclass
class Args:
    script: str = "all"  # a script's name without .py, or all
    kills: int = 20  # times that each run is killed
    seed: int = 1  # seed of the moments
    track: bool = True  # with Weights & Biases, offline


def start(script: str, flags: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / f"{script}.py"), *RUNS[script][0], *flags]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    with open(log, "a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def settings(script: str, run_dir: Path, track: bool) -> list[str]:
    where = ["--output-dir", str(run_dir.parent), "--run-name", run_dir.name]
    return [*RUNS[script][1], *where, *(["--track"] if track else [])]


def timeless(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(UNTIMED)}


def plain(x):
    """Tensors as lists, within dictionaries."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items() if name not in ("output_dir", "run_name", "resume")}
    return x.tolist() if isinstance(x, torch.Tensor) else x


def outcome(run_dir: Path) -> dict:
    """All that must not depend on how often a run was killed."""
    policy = torch.load(run_dir / "policy.pt", weights_only=True)
    with open(run_dir / "metrics.csv", newline="") as file:
        metrics = [timeless(row) for row in csv.DictReader(file)]
    return {
        "policy": repr(plain(policy)),
        "metrics": metrics,
        "summary": timeless(json.loads((run_dir / "summary.json").read_text())),
        "W&B runs": len({path.name.rsplit("-", 1)[1] for path in (run_dir.parent / "wandb").glob("offline-run-*-*")}),
    }


def kill_and_resume(script: str, run_dir: Path, track: bool, kills: int, rng: random.Random, progress: tqdm) -> None:
    """A run in run_dir to its end, killed so many times on the way."""
    checkpoint, log, done = run_dir / "checkpoint.pt", run_dir.parent.parent / "log.txt", 0

    def written() -> int:
        """When the checkpoint was written, 0 if never."""
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    while not (run_dir / "summary.json").exists():
        flags, before = ["--resume", str(checkpoint)], written()
        if not before:
            shutil.rmtree(run_dir.parent, ignore_errors=True)  # killed before its first checkpoint: begin again
            run_dir.parent.mkdir()
            flags = settings(script, run_dir, track)
        process = start(script, flags, log)
        if done < kills:
            # Not while it starts: wait for a new checkpoint, then for a random moment or for the next one's writing.
            while process.poll() is None and written() == before:
                time.sleep(0.001)
            moment = time.monotonic() + rng.uniform(0, 0.5)
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.001)
            while process.poll() is None and done % 3 == 2 and not checkpoint.with_suffix(".tmp").exists():
                pass
            process.kill()
            done += process.wait() == -signal.SIGKILL
            progress.update(done - progress.n)
        if process.wait() not in (0, -signal.SIGKILL):
            sys.exit(f"{script} failed:\n{log.read_text()[-3000:]}")
    if done < kills:
        sys.exit(f"{script}: the run ended after {done} of {kills} kills; make it longer.")


def compare(script: str, kills: int, seed: int, track: bool) -> list[str]:
    """What differs between a run that was killed and one that was not."""
    with tempfile.TemporaryDirectory() as name, tqdm(total=kills, desc=script, unit="kill", disable=None) as progress:
        whole, killed = Path(name) / "whole/run", Path(name) / "killed/run"  # each with its own wandb folder
        if start(script, settings(script, whole, track), Path(name) / "log.txt").wait() != 0:
            sys.exit(f"{script} failed:\n{(Path(name) / 'log.txt').read_text()[-3000:]}")
        kill_and_resume(script, killed, track, kills, random.Random(seed), progress)
        expected, found = outcome(whole), outcome(killed)
    return [part for part in expected if expected[part] != found[part]]


def record(script: str, kills: int, differences: list[str], commit: str) -> None:
    """Put a script's outcome into the CSV, in place of an earlier one."""
    rows = {}
    if RESULTS.exists():
        with open(RESULTS, newline="") as file:
            rows = {row["script"]: row for row in csv.DictReader(file)}
    rows[script] = {"script": script, "kills": kills, "differences": ", ".join(differences) or "none", "commit": commit}
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, ["script", "kills", "differences", "commit"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


def main(args: Args) -> None:
    scripts = list(RUNS) if args.script == "all" else [args.script]
    if not set(scripts) <= RUNS.keys():
        sys.exit(f"--script is {args.script}, expected all or one of {', '.join(RUNS)}")
    failed = False
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    for script in scripts:
        differences = compare(script, args.kills, args.seed, args.track)
        failed |= bool(differences)
        record(script, args.kills, differences, commit.strip())
        print(f"{script}: {args.kills} kills, {', '.join(differences) or 'nothing'} differs")
    sys.exit(failed)


if __name__ == "__main__":
    main(tyro.cli(Args))
