"""Shared fixtures: the repository on the import path, the shipped demonstrations, and small sets made on the spot."""

import json
import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # a core for each worker, "gw0" and so on: threads of several that share cores wait for each other
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(cores)]})
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two threads on one core: do not spin while waiting

import numpy as np  # noqa: E402
import torch  # noqa: E402  # after its settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DEMOS = ROOT / "data/halfcheetah-v4_sac_stochastic-one.npz"
torch.set_num_threads(1)


def make_demo_fields(lengths=(5, 3, 4), obs_dim=17, action_dim=6, env_id="HalfCheetah-v4", seed=0) -> dict:
    """The fields of a small, valid demonstration set of random numbers."""
    rng = np.random.default_rng(seed)
    episodes, steps = len(lengths), sum(lengths)
    metadata = {"format_version": 1, "env_id": env_id, "max_episode_steps": 100, "expert_return_mean": 1.0}
    return {
        "observations": rng.normal(size=(steps + episodes, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=steps).astype(np.float32),
        "terminated": np.zeros(episodes, bool),
        "truncated": np.ones(episodes, bool),
        "lengths": np.array(lengths, np.int64),
        "metadata": json.dumps(metadata),
    }


@pytest.fixture
def demo_file(tmp_path):
    """A function that writes a demonstration set with some fields replaced (None: left out) and returns its path."""

    def write(name="demos.npz", make=None, **replaced) -> str:
        fields = make_demo_fields(**(make or {})) | replaced
        np.savez(tmp_path / name, **{key: value for key, value in fields.items() if value is not None})
        return str(tmp_path / name)

    return write
