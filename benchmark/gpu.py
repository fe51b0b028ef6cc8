"""Every number about a GPU at once: `python benchmark/gpu.py`, four minutes on one GPU.

Each row of benchmark/results/gpu.csv is one run: what it earned, its speed over the whole run and in the loop alone
(evaluations, checkpoints and pretraining left out), the seconds of a rollout and of each kind of update, the memory on
the card. What fails is printed, and the rest goes on. `--tiny` runs all of it in seconds, on the CPU if there is no
GPU, to see that it works.
"""

import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from run import steps_to_90

ROOT = Path(__file__).resolve().parent.parent
# Runs a script, as it is or with its CUDA graphs switched off, and tells how much memory it took
DRIVER = """
import importlib, sys, torch
script = importlib.import_module(sys.argv[1])
if sys.argv[2] == "plain":
    script.Captured.__call__ = lambda self, *inputs: self.function(*inputs)
script.main(sys.argv[3:])
if torch.cuda.is_available():
    print("peak", torch.cuda.max_memory_allocated() / 2**20)
"""
PIXELS, CUDA = "gail_pixels_ae", ["--cuda"]
SHORT = ["--total-timesteps", "128000"]
RUNS = [  # name, script, graphs, flags
    ("1M frames", PIXELS, "graphs", CUDA),
    ("0.13M frames", PIXELS, "graphs", [*CUDA, *SHORT]),
    ("0.13M frames, without graphs", PIXELS, "plain", [*CUDA, *SHORT]),
    ("0.13M frames, 256 environments", PIXELS, "graphs", [*CUDA, *SHORT, "--num-envs", "256"]),
    ("GAIL, 0.13M steps", "gail_ppo", "", [*CUDA, *SHORT]),
    ("GAIL, 0.13M steps, CPU", "gail_ppo", "", SHORT),
    ("GAIL on states, 0.13M steps", "gail_state_seq", "", [*CUDA, *SHORT]),
    ("GAIL on states, 0.13M steps, CPU", "gail_state_seq", "", SHORT),
]
TINY = "--num-envs 4 --num-steps 25 --total-timesteps 400 --eval-interval 100 --eval-episodes 1 --num-minibatches 1 "
TINY += "--update-epochs 1 --hidden-size 8 --disc-steps 3 --num-demos 1"
TINY_PIXELS = " --pretrain-steps 4 --ae-steps 3 --predictor-steps 3 --image-size 16 --latent-dim 4 --ae-batch-size 16 "
TINY_PIXELS += "--no-capture-video"


@dataclass
class Args:
    tiny: bool = False  # a few steps of everything, with --cuda only where there is a GPU
    only: str = ""  # only runs whose name begins with this (and no tests)
    extra: str = ""  # flags to add to each run, such as "--disc-steps 40"
    results: Path = ROOT / "benchmark/results/gpu.csv"  # rows of the same name and card are replaced
    timeout: int = 150  # seconds that a run may take


def measure(name: str, script: str, graphs: str, flags: list[str], folder: Path, timeout: int) -> dict[str, object]:
    """One run, to its end or to the time limit: a row of the table."""
    command = [sys.executable, "-c", DRIVER, script, graphs, *flags, "--checkpoint-interval", "50000"]
    command += ["--output-dir", str(folder), "--run-name", "run"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]  # killed: it says nothing
        raise RuntimeError(said[-1])
    summary = json.loads((folder / "run/summary.json").read_text())
    with open(folder / "run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    row = {"name": name, "wall_seconds": round(time.perf_counter() - start, 1)}
    row |= {key: summary.get(key) for key in ("env_steps", "seconds", "eval/return_mean", "eval/normalized_score")}
    reached = steps_to_90([r for r in rows if r.get("eval/return_mean")], summary)
    row |= {"steps_to_90": reached, "whole run, steps/s": round(summary["charts/SPS"])}
    later = rows[len(rows) // 5 :]  # warmed up
    parts = {key: sum(float(r[key]) for r in later) / len(later) for key in rows[0] if key.startswith("time/")}
    if parts and len(rows) > 1:
        steps = (int(rows[-1]["global_step"]) - int(rows[0]["global_step"])) / (len(rows) - 1)
        row["loop, steps/s"] = round(steps / sum(parts.values()))
    row |= {key: round(seconds, 4) for key, seconds in parts.items()}
    peak = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("peak")]
    return row | {"peak_MiB": round(float(peak[0])) if peak else None}


def write(rows: list[dict], path: Path) -> None:
    with open(path, "w", newline="") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(args: Args) -> int:
    """Returns how many runs failed."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or os.environ.get("COMMIT", "unknown")
    machine = {"card": card, "cores": os.cpu_count(), "python": platform.python_version()}
    machine |= {"torch": torch.__version__, "commit": commit}
    failed = 0
    if not any(name.startswith(args.only) for name, *_ in RUNS):
        sys.exit(f"--only is {args.only}, expected the beginning of one of {', '.join(name for name, *_ in RUNS)}")
    for name, script, graphs, flags in RUNS:
        if not name.startswith(args.only):
            continue
        flags = [x for x in flags if x != "--cuda" or torch.cuda.is_available()]
        if args.tiny:
            flags += (TINY + TINY_PIXELS * (script == PIXELS)).split()
        try:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(name, script, graphs, flags + args.extra.split(), Path(folder), args.timeout) | machine
        except (RuntimeError, subprocess.TimeoutExpired, KeyError, OSError) as error:
            print(f"{name}: failed: {error}", flush=True)
            failed += 1
            continue
        print(*(f"{key} {x}" for key, x in row.items() if x is not None), sep=", ", flush=True)
        rows = []
        if args.results.exists():
            with open(args.results, newline="") as file:
                rows = [r for r in csv.DictReader(file) if (r["name"], r["card"]) != (name, card)]
        write([*rows, row], args.results)
    if not args.only and not args.tiny:
        tests = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-p", "no:cacheprovider", "tests", "-k", "cuda"]
        result = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True)
        print("tests:", result.stdout.strip().splitlines()[-1])
        failed += result.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
