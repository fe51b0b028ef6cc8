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
    table.write_text('name,card,env_steps\n"GAIL, 0.13M steps",no GPU,1\n"GAIL, 0.13M steps",a card,2\n')
    assert gpu.main(gpu.Args(tiny=True, results=table)) == 1
    assert "broken: failed: error: --gamma is 7" in capsys.readouterr().out
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    other, pixels, gail = rows  # the row of another card stays, the one of this card is replaced
    assert (other["card"], other["env_steps"]) == ("a card", "2") and gail["name"] == "GAIL, 0.13M steps"
    assert pixels["name"] == "0.13M frames, without graphs" and pixels["card"] == gail["card"] == "no GPU"
    assert int(pixels["env_steps"]) == int(gail["env_steps"]) == 400
    assert float(pixels["time/rollout"]) > 0 and float(pixels["loop, steps/s"]) > 0


def test_a_run_that_takes_too_long_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "RUNS", gpu.RUNS[:1])
    assert gpu.main(gpu.Args(tiny=True, results=tmp_path / "gpu.csv", timeout=1)) == 1
    assert "1M frames: failed: " in capsys.readouterr().out and not (tmp_path / "gpu.csv").exists()
