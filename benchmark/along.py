"""What happens along the episodes of a run of gail_pixels_ae.py with capsules: `python benchmark/along.py runs/<run>`.

For every fifty steps of the demonstrations, and of the run's policy with its mean action and with sampled ones: how
many episodes last that long, the forward velocity, what D pays the policy for a step, and the value that it expects (in
normalized rewards). benchmark/results/hopper_along.csv has such tables. A minute each.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gail_pixels_ae as script  # noqa: E402

WINDOW, EPISODES = 50, 48
COLUMNS = ("run", "whose", "first step", "episodes", "forward velocity, m/s", "reward", "value")


def windows(episodes: list[np.ndarray]) -> list[tuple]:
    """Of episodes (T, X) of different T, for each window that one of them fills: its first step, how many do, and
    the mean of all X over them."""
    table = []
    for start in range(0, max(map(len, episodes)), WINDOW):
        whole = [x[start : start + WINDOW] for x in episodes if len(x) >= start + WINDOW]
        if whole:
            table.append((start, len(whole), *np.concatenate(whole).mean(0).round(2)))
    return table


def policy_episodes(loaded: tuple, visits: dict, velocity: int, generator, episodes: int) -> list[np.ndarray]:
    """Forward velocity (this one of the observations), D's reward and value, (T, 3), of each episode of a policy."""
    nets, render, graphs, task, args = loaded
    offset, _ = script.terminal_logits(**visits)
    envs = script.make_world(task, episodes, args)
    begun = script.begin_episodes(envs, render, args.frame_stack, args.seed, task["max_episode_steps"])
    running, found = np.ones(episodes, bool), [[] for _ in range(episodes)]
    for step in script.play(envs, render, nets, graphs, begun, generator):
        with torch.no_grad():
            reward = F.softplus(nets.disc(step["features"]).squeeze(-1) + offset)
            value = nets.agent.value(step["obs"])
        row = torch.stack([step["state"][:, velocity], reward, value], dim=1).numpy()
        for i in np.flatnonzero(running):
            found[i].append(row[i])
        running &= ~step["ended"].numpy()
        if not running.any():
            break
    envs.close()
    return [np.array(x) for x in found]


def main(run_dir: Path, episodes: int = EPISODES) -> list[tuple]:
    loaded = script.load_agent(script.Args(evaluate=str(run_dir / "policy.pt"), threads=1))
    _, render, _, _, args = loaded
    script.require(
        args.frames == "capsules",
        f"{run_dir} is a run with --frames render, whose states are unknown; give one with capsules.",
    )
    visits = script.load_file(str(run_dir / "checkpoint.pt"), "checkpoint", "gail_pixels_ae checkpoint")["visits"]
    velocity = render.qpos.shape[1] - render.unobserved  # the first of the velocities
    demos = script.load_demos(args, required=["observations"])
    expert = np.split(demos["obs"][:, [velocity]], np.cumsum(demos["lengths"])[:-1])
    rows = [(run_dir.name, "demonstrations", *row, "", "") for row in windows(expert)]
    for generator, whose in ((None, "mean action"), (Generator().manual_seed(args.seed), "sampled")):
        found = policy_episodes(loaded, visits, velocity, generator, episodes)
        rows += [(run_dir.name, whose, *row) for row in windows(found)]
    return rows


if __name__ == "__main__":
    try:
        script.require(len(sys.argv) > 1, "no run was given; give the folder of one, such as runs/<run>.")
        writer = csv.writer(sys.stdout)
        writer.writerow(COLUMNS)
        for folder in sys.argv[1:]:
            writer.writerows(main(Path(folder)))
    except script.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
