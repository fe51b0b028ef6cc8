"""What test_processes.py starts twice by torchrun: what the two processes must have in common, printed as JSON."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from conftest import DEMOS
from torch import Generator

import gail_pixels_ae
import gail_ppo
import gail_state_seq

ROLLOUT = ["--num-envs", "4", "--num-steps", "50", "--threads", "1", "--eval-episodes", "2", "--demos", str(DEMOS)]
ROLLOUT += "--update-epochs 2 --num-minibatches 4 --disc-steps 4 --disc-batch-size 32 --hidden-size 16".split()
RUNS = {
    gail_ppo: ["--total-timesteps", "4000", "--target-kl", "0.02", "--bc-warm-start"],
    gail_state_seq: ["--total-timesteps", "4000", "--discriminator", "transformer", "--seq-len", "3"],
    gail_pixels_ae: [*"--total-timesteps 1600 --image-size 32 --latent-dim 8 --pretrain-steps 4 --num-demos 2".split()]
    + "--ae-batch-size 16 --ae-steps 2 --predictor-steps 2 --eval-interval 1000 --no-capture-video".split(),
}


def halves_and_whole() -> dict[str, float]:
    """Largest difference between what two processes make of half a batch each and what one makes of the whole."""
    g, rank = gail_ppo, gail_ppo.RANK
    generator = Generator().manual_seed(0)
    shape = (10, 8)  # T, N
    obs, action = torch.randn((*shape, 5), generator=generator), torch.randn((*shape, 3), generator=generator)
    rewards, ended = torch.randn(shape, generator=generator), torch.zeros(shape, dtype=torch.bool)
    agents = [g.Agent(5, 3, 16, Generator().manual_seed(1)) for _ in range(2)]
    log_prob = g.gaussian_log_prob(action, torch.zeros(3), torch.full((3,), -0.5))
    args = g.Args(num_minibatches=1, update_epochs=3)
    for agent, envs, processes in zip(agents, (slice(4 * rank, 4 * rank + 4), slice(None)), (g.WORLD_SIZE, 1)):
        g.WORLD_SIZE, optimizer = processes, torch.optim.Adam(agent.parameters(), lr=1e-3)
        part = (x[:, envs] for x in (obs, obs, action, action, log_prob, rewards, ended, ended))
        g.update_policy(agent, optimizer, g.Rollout(*part), rewards[:, envs], args, Generator().manual_seed(rank))
    g.WORLD_SIZE = 2
    update = max((p - q).abs().max().item() for p, q in zip(agents[0].parameters(), agents[1].parameters()))

    disc = g.Discriminator(5, 16, False, Generator().manual_seed(2))
    x, parameters = obs.flatten(0, 1), list(disc.parameters())
    whole = torch.autograd.grad(disc(x).square().mean(), parameters)
    disc(x.chunk(2)[rank]).square().mean().backward()
    unused = torch.nn.Parameter(torch.ones(3))
    g.average_gradients(torch.optim.SGD([*parameters, unused]))
    assert unused.grad is None
    gradient = max((p.grad - w).abs().max().item() for p, w in zip(parameters, whole))

    views = torch.randint(0, 256, (8, 1, 16, 16), generator=generator, dtype=torch.uint8)
    weights = []
    for part, processes in ((views.chunk(2)[rank], 2), (views, 1)):  # channels last, as the fused step wants gradients
        gail_pixels_ae.WORLD_SIZE = processes
        torch.manual_seed(3)
        autoencoder = gail_pixels_ae.Autoencoder(1, 16, 16, 4).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(autoencoder.parameters(), eps=1e-2, fused=True)  # so that rounding stays small
        optimizer.register_step_pre_hook(gail_pixels_ae.average_gradients)
        autoencoder.loss(part).backward()
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in autoencoder.parameters()]))
    gail_pixels_ae.WORLD_SIZE = 2
    return {"update": update, "gradient": gradient, "convolutions": (weights[0] - weights[1]).abs().max().item()}


def digest(script, flags: list[str]) -> str:
    """Hash of all weights, optimizer states and reward statistics that a training ends with."""
    made, originals = [], {}
    names = ("Agent", "Discriminator", "Autoencoder", "Predictor", "TransformerDiscriminator", "RewardNormalizer")
    for cls in (getattr(script, name) for name in (*names, "Adam") if hasattr(script, name)):
        originals[cls] = cls.__init__

        def noted(self, *args, cls=cls, **kwargs) -> None:
            made.append(self)
            originals[cls](self, *args, **kwargs)

        cls.__init__ = noted
    script.train(script.parse_args(flags, script.Args))
    for cls, original in originals.items():
        cls.__init__ = original
    return hashlib.sha256(repr([flat(x.state_dict()) for x in made]).encode()).hexdigest()


def flat(x):
    if isinstance(x, torch.Tensor):
        return x.numpy().tobytes()
    if isinstance(x, dict):
        return {name: flat(value) for name, value in x.items()}
    return [flat(value) for value in x] if isinstance(x, list) else x


def main() -> None:
    folder = sys.argv[1]
    gail_ppo.join_processes(False)
    result = {"differences": halves_and_whole()}
    for script, flags in RUNS.items():
        where = ["--output-dir", folder, "--run-name", script.__name__]
        result[script.__name__] = digest(script, [*ROLLOUT, *flags, *where])
    Path(folder, f"rank{gail_ppo.RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
