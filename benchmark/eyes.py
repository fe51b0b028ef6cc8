"""How precisely gail_pixels_ae.py sees: `python benchmark/eyes.py` with any of its flags, such as --env-id and --cuda.

After the script's pretraining a network learns to tell the true state from what the script knows, the latents of K
frames and the K - 1 actions between them, on seven tenths of the demonstrations. Printed are its errors on the rest:
root-mean-square, in the state's own units and as a share of the state's spread. benchmark/results/eyes.csv has
such errors of three bodies. A minute on a GPU, ten on a CPU.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gail_pixels_ae as script  # noqa: E402

BATCH_SIZE, HIDDEN = 512, 256


def see(args) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is seen (L + E, K Z + (K - 1) A) with each of the demonstrations' states (L + E, O), and which of them
    (L + E,) bool are of the first seven tenths of the episodes."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device, generator = script.join_processes(args.cuda), Generator().manual_seed(args.seed)
    demos = script.load_demos(args, required=["observations", "actions"])
    envs = script.make_world(demos, args.num_envs, args)
    render, frame_stack = script.make_renderer(envs, args).to(device), args.frame_stack
    expert = script.film_expert(demos, render, device)
    nets = script.Networks(expert["frames"], demos["obs"], envs.single_action_space, args, generator).to(device)
    optimizers = script.make_optimizers(nets, args)
    graphs = script.make_graphs(nets, render, optimizers, args)
    episodes = script.begin_episodes(envs, render, frame_stack, args.seed, demos["max_episode_steps"])
    script.encode_expert(nets.autoencoder, expert)
    collect = functools.partial(script.collect_frames, envs, render, nets, graphs, episodes, args.num_steps, generator)
    script.pretrain(collect, nets, graphs, optimizers, expert, args, generator)
    latents = nets.autoencoder.encode_all(expert["frames"])

    starts = np.repeat(np.cumsum(demos["lengths"] + 1) - (demos["lengths"] + 1), demos["lengths"] + 1)
    rows = np.arange(len(starts))[:, None] + np.arange(1 - frame_stack, 1)
    rows = np.maximum(rows, starts[:, None])  # (L + E, K): an episode's first frame is repeated
    features = script.latent_steps(latents[torch.from_numpy(rows)]).cpu().numpy()
    actions = np.zeros((len(features), *demos["actions"].shape[1:]))
    actions[np.arange(len(starts)) > starts] = demos["actions"]  # each in the row that it led to
    seen = np.concatenate([features, actions[rows[:, 1:]].reshape(len(features), -1)], axis=1)
    ends = np.cumsum(demos["lengths"] + 1)
    return seen, demos["observations"], np.arange(len(seen)) < ends[int(0.7 * len(ends)) - 1]


def errors(seen: np.ndarray, states: np.ndarray, train: np.ndarray, steps: int, device: str) -> np.ndarray:
    """Root-mean-square error (O,) of each dimension of states (N, O), told from seen (N, X) by a network that learns
    where train (N,) is true, elsewhere; in units of the states' deviations."""
    x, y = (
        torch.from_numpy((v - v[train].mean(0)) / (v[train].std(0) + 1e-9)).float().to(device) for v in (seen, states)
    )
    known, generator = torch.from_numpy(np.flatnonzero(train)), Generator().manual_seed(0)
    net = script.mlp([x.shape[1], HIDDEN, HIDDEN, y.shape[1]], 1.0, generator).to(device)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        rows = known[torch.randint(len(known), (BATCH_SIZE,), generator=generator)].to(device)
        loss = (net(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        mistakes: Tensor = (net(x) - y).cpu()[torch.from_numpy(~train)]
    return mistakes.square().mean(0).sqrt().numpy()


def main(argv: list[str], steps: int = 4000) -> np.ndarray:
    args = script.parse_args(argv)
    script.require(args.num_demos != 1, "--num-demos is 1, which leaves none to test on; give more.")
    seen, states, train = see(args)
    shares = errors(seen, states, train, steps, "cuda" if args.cuda else "cpu")
    print(f"{args.env_id}, {len(states)} demonstrated states: errors of each dimension of the unseen ones")
    print("  in its own unit ", *(f"{x:8.3g}" for x in shares * states[train].std(0)))
    print("  over its spread ", *(f"{x:8.3g}" for x in shares), f"  mean {shares.mean():.3g}")
    return shares


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except script.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
