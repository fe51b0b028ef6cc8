"""An experiment: gail_rssm.py from frames alone. Of a frame it sees the latents of gail_pixels_ae.py's autoencoder,
which rests after its pretraining on demonstrated frames and those of random actions.

python benchmark/rssm_frames.py imagined --total-timesteps 60000    # D on decoded imagined latents
python benchmark/rssm_frames.py replayed --total-timesteps 60000    # D on replayed ones (patches/rssm_replayed.patch)

All other flags are gail_rssm.py's. HalfCheetah-v4 alone; runs cannot be resumed, nor their policies evaluated again.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Generator

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import run  # noqa: E402

import gail_pixels_ae as pixels  # noqa: E402

LATENTS, PRETRAIN_STEPS, BATCH = 32, 1500, 64


class LatentEnvs(gym.vector.VectorEnv):
    """Environments whose observations are latents (N, Z) of their frames."""

    def __init__(self, envs, see):
        self.envs, self.see, self.num_envs, self.spec = envs, see, envs.num_envs, envs.spec
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (LATENTS,), np.float64)
        self.single_action_space, self.action_space = envs.single_action_space, envs.action_space

    def reset(self, *, seed=None, options=None):
        obs, info = self.envs.reset(seed=seed)
        return self.see(obs), info

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.envs.step(actions)
        if (terminated | truncated).any():
            info = {"final_obs": self.see(info["final_obs"])}
        return self.see(obs), reward, terminated, truncated, info


def random_frames(envs, render, steps: int, seed: int) -> torch.Tensor:
    """uint8 (steps N, H, W) of random actions."""
    obs, _ = envs.reset(seed=seed)
    envs.action_space.seed(seed)
    frames = []
    for _ in range(steps):
        frames.append(render(obs))
        obs, *_ = envs.step(envs.action_space.sample())
    return torch.cat(frames)


def pretrain(expert: torch.Tensor, policy: torch.Tensor, seed: int, steps: int) -> pixels.Autoencoder:
    """An autoencoder of both kinds of frames, alike often."""
    torch.manual_seed(seed)
    autoencoder, generator = pixels.Autoencoder(expert, LATENTS, 1), Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(autoencoder.parameters(), 1e-3, fused=True)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 2.02 - 2 * i / steps)
        chosen = [x[torch.randint(len(x), (BATCH,), generator=generator)] for x in (expert, policy)]
        frames = torch.cat(chosen)
        with torch.autocast("cpu", torch.bfloat16):
            errors = autoencoder.errors(autoencoder.encode(frames), frames)
        loss = errors[:BATCH].mean() + errors[BATCH:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return autoencoder.requires_grad_(False)


def main(argv: list[str], pretrain_steps: int = PRETRAIN_STEPS) -> None:
    disc_sees, *flags = argv
    if disc_sees not in ("imagined", "replayed"):
        sys.exit(f"{disc_sees}: expected imagined or replayed; runs of this experiment are not resumed.")
    with tempfile.TemporaryDirectory() as folder:
        if disc_sees == "replayed":
            sys.path.insert(0, str(run.patched("benchmark/patches/rssm_replayed.patch", Path(folder) / "x").parent))
        rssm = importlib.import_module("gail_rssm")
    args = rssm.parse_args(flags)
    task = {"env_id": "HalfCheetah-v4", "max_episode_steps": 100}
    envs = pixels.make_envs(task, 10, args.threads)
    render = pixels.CapsuleRenderer(envs, 56, args.threads)
    torch.set_num_threads(args.threads)
    expert = render(rssm.load_demos(args, ["observations"])["observations"])
    autoencoder = pretrain(expert, random_frames(envs, render, 100, args.seed), args.seed, pretrain_steps)

    def see(obs: np.ndarray) -> np.ndarray:
        return autoencoder.encode_all(render(obs)).double().numpy()

    make_envs, load_demos = rssm.make_envs, rssm.load_demos

    def load_latents(args, required: list[str]) -> dict:
        demos = load_demos(args, required)
        latents, final = see(demos["observations"]), np.cumsum(demos["lengths"] + 1) - 1
        return demos | {"observations": latents, "obs": np.delete(latents, final, axis=0)}

    rssm.make_envs = lambda *task: LatentEnvs(make_envs(*task), see)
    rssm.load_demos = load_latents
    rssm.train(args)


if __name__ == "__main__":
    main(sys.argv[1:])
