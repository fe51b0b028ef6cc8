"""Several processes: networks that stay the same to the bit, and a death that leaves nobody waiting."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMOS, ROOT
from two_processes import FLAGS

import gail_pixels_ae

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIMIT = 120  # seconds that none of this may take
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_two_processes_agree_with_each_other_and_with_one(tmp_path):
    command = [*TORCHRUN, str(ROOT / "tests/two_processes.py"), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert max(first.pop("difference"), second.pop("difference")) < 1e-6
    assert first == second and first["gathered"] == [0, 1]
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"metrics.csv", "checkpoint.pt", "policy.pt", "summary.json", "curves.png"} <= files


def rank_of(pid: str) -> str | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry[5:].decode() for entry in environment if entry.startswith(b"RANK=")), None)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a process through Linux's /proc")
def test_a_death_ends_the_run_and_both_go_on_from_the_checkpoint(tmp_path):
    flags = FLAGS.replace("1600", "4000").split() + ["--checkpoint-interval", "200", "--demos", str(DEMOS)]
    flags += ["--output-dir", str(tmp_path), "--run-name", "a"]
    script = str(ROOT / "gail_pixels_ae.py")
    process = subprocess.Popen([*TORCHRUN, script, *flags], env=ENVIRONMENT, stderr=subprocess.PIPE)
    checkpoint = tmp_path / "a/checkpoint.pt"
    deadline = time.monotonic() + LIMIT
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = (int(pid) for pid in children if rank_of(pid) == "1")
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 20
    assert b"Signal 9 (SIGKILL)" in errors
    rows = len(torch.load(checkpoint, weights_only=True)["rows"])
    assert 1 <= rows < 18
    subprocess.run([*TORCHRUN, script, "--resume", str(checkpoint)], env=ENVIRONMENT, check=True, timeout=LIMIT)
    steps = [int(line.split(",")[0]) for line in (tmp_path / "a/metrics.csv").read_text().splitlines()[1:]]
    assert steps[-1] == 4000 and steps == sorted(set(steps)) and len(set(b - a for a, b in zip(steps, steps[1:]))) == 1


def test_what_processes_cannot_divide_is_refused(monkeypatch):
    monkeypatch.setattr(gail_pixels_ae, "WORLD_SIZE", 3)
    with pytest.raises(gail_pixels_ae.UserError, match="--num-envs is 64, but 3 processes divide it"):
        gail_pixels_ae.parse_args([])


def test_alone_nothing_is_exchanged():
    x = torch.arange(3.0)
    assert gail_pixels_ae.all_gather(x) is x
