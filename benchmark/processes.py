"""One process or two? `python benchmark/processes.py`, on an idle machine.

The author of "GAIL with Pixels Only" found one set of networks over a batch of environments substantially slower than
networks in every process for small MLPs, and far faster for convolutional ones. Each row of
benchmark/results/processes.csv is one run, with the same environments and minibatches in all; its speed is that of the
whole loop without evaluations and pretraining.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {  # script -> (its networks, flags); the scripts with small MLPs had this too, and lost (docs)
    "gail_pixels_ae.py": ("convolutions", "--total-timesteps 96000 --pretrain-steps 100 --no-capture-video".split()),
}
RESULTS = ROOT / "benchmark/results/processes.csv"


def measure(script: str, flags: list[str], processes: int) -> float:
    """Steps per second of one run, its first rollout, evaluations and pretraining left out."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*(start if processes > 1 else [sys.executable]), script, *flags]
        where = ["--output-dir", folder, "--run-name", "a", "--eval-episodes", "10"]
        subprocess.run([*command, *where], cwd=ROOT, check=True, capture_output=True)
        with open(Path(folder) / "a/metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))[1:]
    seconds = sum(float(row[name]) for row in rows for name in row if name.startswith("time/"))
    steps = int(rows[-1]["global_step"]) - int(rows[0]["global_step"])
    return steps * len(rows) / (len(rows) - 1) / seconds


def main() -> None:
    """Time one process and two, on an idle machine."""
    with open(RESULTS, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["script"] not in SCRIPTS]
    for script, (networks, flags) in SCRIPTS.items():
        for processes in (1, 2):
            speed = measure(script, flags, processes)
            rows.append({"script": script, "networks": networks, "processes": processes, "steps/s": round(speed)})
            rows[-1]["cores"] = len(os.sched_getaffinity(0))
            print(rows[-1], flush=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    tyro.cli(main)
