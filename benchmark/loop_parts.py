"""Where the time of gail_ppo.py's loop goes: `python benchmark/loop_parts.py` writes benchmark/results/loop_parts.csv.

CPU seconds of one thread for 64,000 steps of the default run, whatever else the machine does."""

import collections
import csv
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gail_ppo as script  # noqa: E402

STEPS = 64_000
PARTS = {  # what is shown: a function
    "a rollout": (script, "collect"),
    "20 steps of D": (script, "update_discriminator"),
    "of that the gradient penalty (forwards)": (script, "gradient_penalty"),
    "rewards": (script, "compute_rewards"),
    "40 minibatches of policy and value": (script, "update_policy"),
    "evaluations": (script, "evaluate"),
    "the physics (of rollouts and evaluations)": (script.BatchHalfCheetah, "step"),
}


def timed(function, part: str, seconds: collections.Counter):
    """function, whose CPU seconds are added to those of the part."""

    def wrapper(*args, **settings):
        start = time.process_time()
        result = function(*args, **settings)
        seconds[part] += time.process_time() - start
        return result

    return wrapper


def main(steps: int = STEPS, path: Path = ROOT / "benchmark/results/loop_parts.csv") -> None:
    """Time the parts of the loop over some steps, and write them into a CSV."""
    seconds: collections.Counter = collections.Counter()
    originals = {part: getattr(owner, name) for part, (owner, name) in PARTS.items()}
    try:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, timed(originals[part], part, seconds))
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--total-timesteps", str(steps), "--threads", "1", "--output-dir", folder, "--eval-episodes", "1"]
            script.main(flags)
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["part", "CPU seconds", "microseconds a step"])
        for part in PARTS:
            writer.writerow([part, round(seconds[part], 2), round(1e6 * seconds[part] / steps, 1)])


if __name__ == "__main__":
    tyro.cli(main)
