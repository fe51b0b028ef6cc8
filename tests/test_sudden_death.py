"""Runs that are killed, interrupted, or find the disk full lose nothing."""

import errno
import importlib
import os
import random
import signal
import subprocess
import sys
import time

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
    "gail_pixels_ae": (
        [],
        ["--total-timesteps", "1000", *GAIL, "--image-size", "32", "--latent-dim", "8", "--ae-batch-size", "16"]
        + "--pretrain-steps 2 --ae-steps 1 --predictor-steps 1 --num-demos 2 --no-capture-video".split(),
    ),
    "toy_pointnav": (
        [],
        "--total-timesteps 1024 --num-envs 16 --num-steps 16 --checkpoint-interval 256 --disc-steps 2 "
        "--update-epochs 1 --eval-episodes 20 --expert-episodes 20 --fresh-disc-steps 5".split(),
    ),
}


def ends(script, capsys, *flags) -> tuple[int, str]:
    """Exit code and message of a script's main."""
    with pytest.raises(SystemExit) as stopped:
        script.main([*SHORT[script.__name__][0], *flags])
    return stopped.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", SHORT)
def test_a_full_disk_ends_with_one_sentence_and_leaves_the_last_checkpoint_whole(name, tmp_path, capsys, monkeypatch):
    script, fsync, calls = importlib.import_module(name), os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(script.os, "fsync", full)
    code, message = ends(script, capsys, *SHORT[name][1], "--output-dir", str(tmp_path), "--run-name", "a")
    assert code == 2 and message.startswith("error: a file of the run: No space left on device; give"), message
    saved = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert saved["script"] == name
    monkeypatch.undo()
    script.main([*SHORT[name][0], "--resume", str(tmp_path / "a/checkpoint.pt")])
    assert (tmp_path / "a/summary.json").exists()


@pytest.mark.parametrize("name", SHORT)
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(name, tmp_path, capsys, monkeypatch):
    """Ctrl-C before the second row is written: the run ends after it, and goes on to what it would have been."""
    script, command = importlib.import_module(name), SHORT[name][0]
    if name == "collect_expert_sac":
        monkeypatch.setattr(script, "LOG_INTERVAL", 1000)  # it answers when it has written a row
    script.main([*command, *SHORT[name][1], "--output-dir", str(tmp_path), "--run-name", "whole"])
    write, written = script.MetricsLogger.write, []

    def interrupting(self, row: dict) -> None:
        write(self, row)
        written.append(row)
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(script.MetricsLogger, "write", interrupting)
    flags = [*SHORT[name][1], "--output-dir", str(tmp_path), "--run-name", "a"]
    code, message = ends(script, capsys, *flags)
    assert code == 130 and message.startswith("stopped at step ")
    path = message.rsplit(" ", 1)[1]
    assert path == str(tmp_path / "a/checkpoint.pt") and len(written) <= 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    script.main([*command, "--resume", path])
    whole, found = (sudden_death.outcome(tmp_path / run) for run in ("whole", "a"))
    assert found == whole


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    """The short form of benchmark/sudden_death.py: one script, without Weights & Biases."""
    flags = "--total-timesteps 20480 --num-envs 16 --num-steps 16 --checkpoint-interval 256 --update-epochs 1".split()
    flags += "--disc-steps 2 --eval-episodes 20 --expert-episodes 20 --fresh-disc-steps 5".split()
    monkeypatch.setitem(sudden_death.RUNS, "toy_pointnav", ([], flags))
    log, whole, killed = (tmp_path / name for name in ("log.txt", "whole", "killed"))
    flags = sudden_death.settings("toy_pointnav", whole, False)
    assert sudden_death.start("toy_pointnav", flags, log).wait() == 0, log.read_text()
    sudden_death.kill_and_resume("toy_pointnav", killed, False, 2, random.Random(0), tqdm(disable=True))
    assert sudden_death.outcome(killed) == sudden_death.outcome(whole)
    assert len(sudden_death.outcome(whole)["metrics"]) == 81


def test_ctrl_c_in_a_terminal(tmp_path):
    """The real signal, in a process of its own; a second one would leave at once."""
    flags = ["--total-timesteps", "10000000", "--output-dir", str(tmp_path), "--run-name", "a"]
    process = subprocess.Popen([sys.executable, "toy_pointnav.py", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "a/metrics.csv", time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].endswith(f"go on with --resume {tmp_path}/a/checkpoint.pt")
    assert "Traceback" not in errors
