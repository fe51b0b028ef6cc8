"""Runs of every script with --cuda: on a GPU (test_with_a_gpu.py), on a make-believe one (test_without_a_gpu.py)."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DEMOS

GAIL = "--total-timesteps 400 --num-envs 4 --num-steps 50 --update-epochs 1 --disc-steps 2 --disc-batch-size 16 "
GAIL += "--eval-interval 200 --checkpoint-interval 200 --eval-episodes 2 --threads 1 --num-demos 2 --hidden-size 8"
PIXELS = "--num-envs 4 --num-steps 50 --image-size 32 --predictor-steps 1 --pretrain-steps 1 --num-minibatches 1 "
PIXELS += "--update-epochs 1 --hidden-size 8 --ae-steps 1 --ae-batch-size 16 --latent-dim 4 --threads 1 --disc-steps 1 "
PIXELS += "--eval-episodes 1 --eval-interval 600 --checkpoint-interval 400 --total-timesteps 600 --num-demos 2 "
PIXELS += "--no-capture-video"
RSSM = "--total-timesteps 1000 --num-envs 4 --num-steps 50 --learning-starts 400 --updates 1 --batch-size 4 "
RSSM += "--sequence-length 5 --num-starts 8 --horizon 2 --eval-episodes 2 --checkpoint-interval 500 --threads 1"
BC = "--gradient-steps 20 --eval-interval 10 --batch-size 16 --hidden-size 8 --eval-episodes 2"
SAC = "--total-timesteps 4000 --num-envs 16 --learning-starts 1000 --threads 1 --hidden-size 8 --batch-size 16 "
SAC += "--updates-per-step 0.01 --buffer-size 2000 --eval-interval 2000 --checkpoint-interval 2000"


def short_episodes(path) -> str:
    """Two demonstrations of 25 steps, so that evaluations are short: each operation here takes its time."""
    with np.load(DEMOS) as whole:
        observations = np.concatenate([whole["observations"][start : start + 26] for start in (0, 101)])
        metadata = json.loads(str(whole["metadata"])) | {"max_episode_steps": 25}
    ends = {"terminated": np.zeros(2, bool), "truncated": np.ones(2, bool), "lengths": np.array([25, 25])}
    np.savez(path, observations=observations, metadata=json.dumps(metadata), **ends)
    return str(path)


RUNS = [
    ("gail_ppo", f"{GAIL} --bc-warm-start"),
    ("gail_ppo", f"{GAIL} --reward-source combined"),
    ("gail_state_seq", f"{GAIL} --seq-len 4"),
    ("gail_state_seq", f"{GAIL} --seq-len 4 --discriminator transformer --use-actions"),
    ("gail_rssm", RSSM),
    ("bc", f"{BC} --threads 1 --loss nll"),
    ("collect_expert_sac", SAC),
    ("gail_pixels_ae", PIXELS),
    ("gail_pixels_ae", f"{PIXELS} --policy-obs state"),
]


def killed_moved_and_resumed(tmp_path, name: str, flags: str, gpu) -> set[torch.device]:
    """A run with --cuda is killed at its first checkpoint and goes on, there and on a machine without a GPU; what it
    learned is evaluated. -> Where the weights in its checkpoint were."""
    script, folder = importlib.import_module(name), tmp_path / "run"
    first = ["train"] if name == "collect_expert_sac" else []
    demos = [] if first else ["--demos", str(DEMOS)]
    if name == "gail_pixels_ae":
        demos = ["--demos", short_episodes(tmp_path / "short.npz")]
    save, devices = script.save_atomically, []

    def save_and_die(content, path):
        save(content, path)
        if path.name == "checkpoint.pt":
            leaves = torch.utils._pytree.tree_leaves_with_path(content)
            weights = [x for where, x in leaves if "weight" in str(where[-1]) and torch.is_tensor(x)]
            devices.extend(x.device for x in weights)
            raise KeyboardInterrupt

    with gpu:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(script, "save_atomically", save_and_die)
            script.main([*first, *flags.split(), "--cuda", *demos, "--output-dir", str(tmp_path), "--run-name", "run"])
        shutil.copytree(folder, tmp_path / "copy")
        script.main([*first, "--resume", str(folder / "checkpoint.pt")])
        if not first:
            script.main(["--evaluate", str(folder / "policy.pt"), "--cuda", "--eval-episodes", "1", "--threads", "1"])
    assert (folder / "summary.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "torch", torch)  # of the machine without a GPU
        script.main([*first, "--resume", str(tmp_path / "copy/checkpoint.pt"), "--no-cuda"])
    assert (tmp_path / "copy/summary.json").exists()
    return set(devices)
