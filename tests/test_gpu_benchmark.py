"""benchmark/gpu.py: a tiny form of it on the CPU, and what it does when a run fails."""

import csv
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run benchmark/gpu.py itself")
def test_it_runs_to_its_end_whatever_fails(tmp_path, monkeypatch, capsys):
    names = [name for name, *_ in gpu.RUNS]
    assert len(set(names)) == len(names) and any(graphs == "plain" for _, _, graphs, _ in gpu.RUNS)
    chosen = [run for run in gpu.RUNS if run[0] in ("0.13M frames, without graphs", "GAIL, 0.13M steps")]
    broken = [("broken", "gail_ppo", "", ["--gamma", "7"])]
    monkeypatch.setattr(gpu, "RUNS", [chosen[0], *broken, chosen[1]])
    table = tmp_path / "gpu.csv"
    assert gpu.main(gpu.Args(tiny=True, results=table)) == 1
    assert "broken: failed: error: --gamma is 7" in capsys.readouterr().out
    assert (
        gpu.main(gpu.Args(tiny=True, only="GAIL, 0.13M steps", results=table)) == 0
    )  # its row takes the place of the former
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["0.13M frames, without graphs", "GAIL, 0.13M steps"]
    assert rows[0]["card"] == "no GPU" and int(rows[0]["env_steps"]) == 400
    assert float(rows[0]["time/rollout"]) > 0 and float(rows[0]["loop, steps/s"]) > 0


def test_a_run_that_takes_too_long_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "RUNS", gpu.RUNS[:1])
    assert gpu.main(gpu.Args(tiny=True, results=tmp_path / "gpu.csv", timeout=1)) == 1
    assert "1M frames: failed: " in capsys.readouterr().out and not (tmp_path / "gpu.csv").exists()
