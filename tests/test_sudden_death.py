"""Runs that are killed, interrupted, or find the disk full lose nothing."""

import errno
import importlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMOS, ROOT
from tqdm import tqdm

sys.path.insert(0, str(ROOT / "benchmark"))
import sudden_death  # noqa: E402

GAIL = "--num-envs 4 --num-steps 50 --update-epochs 1 --num-minibatches 2 --disc-steps 2 --eval-episodes 2".split()
GAIL += ["--checkpoint-interval", "200", "--eval-interval", "1000", "--threads", "1", "--demos", str(DEMOS)]
# script -> (command, flags of a run with several checkpoints, steps between them)
SHORT = {
    "bc": ([], ["--gradient-steps", "60", "--eval-interval", "20", "--eval-episodes", "2", "--demos", str(DEMOS)]),
    "collect_expert_sac": (
        ["train"],
        "--total-timesteps 6000 --num-envs 8 --learning-starts 1000 --hidden-size 8 --batch-size 16 --buffer-size 6000 "
        "--updates-per-step 0.01 --checkpoint-interval 2000 --eval-interval 6000 --threads 1".split(),
    ),
    "gail_ppo": ([], ["--total-timesteps", "1000", *GAIL]),
    "gail_state_seq": ([], ["--total-timesteps", "1000", *GAIL]),
    "gail_rssm": (
        [],
        "--total-timesteps 1000 --num-envs 4 --num-steps 50 --learning-starts 400 --updates 1 --batch-size 4 "
        "--sequence-length 5 --num-starts 8 --horizon 2 --eval-episodes 2 --checkpoint-interval 200 "
        f"--eval-interval 1000 --threads 1 --demos {DEMOS}".split(),
    ),
    "gail_pixels_ae": (
        [],
        ["--total-timesteps", "1000", *GAIL, "--image-size", "32", "--latent-dim", "8", "--ae-batch-size", "16"]
        + "--pretrain-steps 2 --ae-steps 1 --predictor-steps 1 --num-demos 2 --no-capture-video".split(),
    ),
}


def ends(script, capsys, *flags) -> tuple[int, str]:
    """Exit code and message of a script's main."""
    with pytest.raises(SystemExit) as stopped:
        script.main([*SHORT[script.__name__][0], *flags])
    return stopped.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", SHORT)
def test_a_full_disk_ends_with_one_sentence_and_leaves_the_last_checkpoint_whole(name, tmp_path, capsys, monkeypatch):
    script, write_bytes, calls = importlib.import_module(name), Path.write_bytes, []

    def full(path: Path, content: bytes) -> None:
        calls.extend([path] * (path.name == "checkpoint.tmp"))
        if len(calls) > 1:
            write_bytes(path, content[: len(content) // 2])  # what still fitted
            raise OSError(errno.ENOSPC, "No space left on device")
        write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    code, message = ends(script, capsys, *SHORT[name][1], "--output-dir", str(tmp_path), "--run-name", "a")
    assert code == 2 and message == "error: [Errno 28] No space left on device", message
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert saved["kind"] == f"{name} checkpoint"
    monkeypatch.undo()
    script.main([*SHORT[name][0], "--resume", str(tmp_path / "a/checkpoint.pt")])
    assert (tmp_path / "a/summary.json").exists()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    """The short form of benchmark/sudden_death.py: one script, without Weights & Biases."""
    flags = "--total-timesteps 12000 --num-envs 4 --num-steps 100 --checkpoint-interval 400 --update-epochs 2".split()
    flags += ["--disc-steps", "2", "--eval-episodes", "4", "--threads", "1"]
    monkeypatch.setitem(sudden_death.RUNS, "gail_ppo", ([], flags))
    log, whole, killed = tmp_path / "log.txt", tmp_path / "whole/run", tmp_path / "killed/run"
    flags = sudden_death.settings("gail_ppo", whole, False)
    assert sudden_death.start("gail_ppo", flags, log).wait() == 0, log.read_text()
    sudden_death.kill_and_resume("gail_ppo", killed, False, 2, random.Random(0), tqdm(disable=True))
    assert sudden_death.outcome(killed) == sudden_death.outcome(whole)
    assert len(sudden_death.outcome(whole)["metrics"]) == 30


def test_ctrl_c_in_a_terminal(tmp_path):
    """The real signal, in a process of its own."""
    flags = ["--total-timesteps", "10000000", "--checkpoint-interval", "3200"]
    flags += ["--output-dir", str(tmp_path), "--run-name", "a"]
    process = subprocess.Popen(
        [sys.executable, "gail_ppo.py", *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore Ctrl-C
    )
    checkpoint, deadline = tmp_path / "a/checkpoint.pt", time.monotonic() + 60
    while time.monotonic() < deadline and not checkpoint.exists():
        time.sleep(0.1)
    written = checkpoint.exists()
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()  # or a run of ten million steps outlives a failed test
    assert written and process.returncode == 130
    assert errors.strip().splitlines()[-1] == "interrupted; a run goes on with --resume <run>/checkpoint.pt"
    assert "Traceback" not in errors
