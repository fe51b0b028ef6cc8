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

import gail_pixels_ae
import gail_ppo
import gail_state_seq

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIMIT = 120  # seconds that none of this may take
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_two_processes_agree_with_each_other_and_with_one(tmp_path):
    script = str(ROOT / "tests/two_processes.py")
    done = subprocess.run(
        [*TORCHRUN, script, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for differences in (
        first.pop("differences"),
        second.pop("differences"),
    ):  # each sums the whole in an order of its own
        assert max(differences.values()) < 1e-6
    assert first == second
    for name in ("gail_ppo", "gail_state_seq", "gail_pixels_ae"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {"metrics.csv", "checkpoint.pt", "policy.pt", "summary.json", "curves.png"} <= files
        saved = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        noise = [state["generator"].tolist() for state in saved["own"]["processes"]]
        assert len(noise) == 2 and noise[0] != noise[1]
    # One process cannot go on with the environments of two.
    with pytest.raises(SystemExit) as stopped:
        gail_ppo.main(["--resume", str(tmp_path / "gail_ppo/checkpoint.pt")])
    assert stopped.value.code == 2


def rank_of(pid: str) -> str | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry[5:].decode() for entry in environment if entry.startswith(b"RANK=")), None)


def test_a_death_ends_the_run_and_both_go_on_from_the_checkpoint(tmp_path):
    flags = "--total-timesteps 16000 --num-envs 4 --checkpoint-interval 400 --eval-interval 8000 --update-epochs 1"
    flags = [
        *flags.split(),
        "--demos",
        str(DEMOS),
        "--output-dir",
        str(tmp_path),
        "--run-name",
        "a",
        "--disc-steps",
        "1",
    ]
    process = subprocess.Popen([*TORCHRUN, str(ROOT / "gail_ppo.py"), *flags], env=ENVIRONMENT, stderr=subprocess.PIPE)
    checkpoint = tmp_path / "a/checkpoint.pt"
    deadline = time.monotonic() + LIMIT
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = (int(pid) for pid in children if rank_of(pid) == "1")
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 20
    assert b"Signal 9 (SIGKILL)" in errors
    metrics = (tmp_path / "a/metrics.csv").read_text().splitlines()
    assert 2 <= len(metrics) < 41
    resume = [*TORCHRUN, str(ROOT / "gail_ppo.py"), "--resume", str(checkpoint)]
    subprocess.run(resume, env=ENVIRONMENT, check=True, capture_output=True, timeout=LIMIT)
    steps = [line.split(",")[0] for line in (tmp_path / "a/metrics.csv").read_text().splitlines()[1:]]
    assert [int(step) for step in steps] == [*range(400, 16001, 400), 16000]


@pytest.mark.parametrize("script", [gail_ppo, gail_state_seq, gail_pixels_ae], ids=lambda script: script.__name__)
def test_what_processes_cannot_divide_is_refused(script, monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(script.UserError, match="--num-envs is 64, but 3 processes divide it; give a multiple of that"):
        script.share_of(script.Args(num_envs=64), ["num_envs"])
    assert script.share_of(script.Args(num_envs=9, threads=4), ["num_envs"]).num_envs == 3


def test_alone_nothing_is_exchanged():
    x = torch.arange(3.0)
    assert gail_ppo.everyones(x) is x and gail_ppo.gather("a") == ["a"]
    assert gail_ppo.mean_row([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0, "b": 2.0}
