"""What test_processes.py starts twice by torchrun: what the two processes must have in common, written as JSON."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from conftest import DEMOS

import gail_pixels_ae as g

FLAGS = "--total-timesteps 1600 --num-envs 4 --num-steps 50 --threads 1 --eval-episodes 2 --update-epochs 2 "
FLAGS += "--num-minibatches 4 --disc-steps 4 --disc-batch-size 32 --hidden-size 16 --image-size 32 --latent-dim 8 "
FLAGS += "--pretrain-steps 4 --num-demos 2 --ae-batch-size 16 --ae-steps 2 --predictor-steps 2 --eval-interval 1000 "
FLAGS += "--no-capture-video"


def digest(module: torch.nn.Module) -> str:
    """Hash of all weights and statistics."""
    state = {name: x.numpy().tobytes() for name, x in sorted(module.state_dict().items())}
    return hashlib.sha256(repr(state).encode()).hexdigest()


def halves_and_whole() -> float:
    """Largest difference between a step on the mean gradient of two halves and one on the whole batch."""
    frames = torch.randint(0, 256, (8, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weights = []
    for part, processes in ((frames.chunk(2)[g.RANK], 2), (frames, 1)):
        g.WORLD_SIZE = processes
        torch.manual_seed(3)
        autoencoder = g.Autoencoder(frames, 4, 1)
        optimizer = torch.optim.Adam(autoencoder.parameters(), eps=1e-2, fused=True)  # so that rounding stays small
        optimizer.register_step_pre_hook(g.average_gradients)
        autoencoder.errors(autoencoder.encode(part), part).mean().backward()
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in autoencoder.parameters()]))
    g.WORLD_SIZE = 2
    return (weights[0] - weights[1]).abs().max().item()


def main() -> None:
    folder, made, init = sys.argv[1], [], g.Networks.__init__

    def noted(self, *args) -> None:
        made.append(self)
        init(self, *args)

    g.Networks.__init__ = noted
    seen, normalize = [], g.normalize
    g.normalize = lambda rewards, recent: (seen.append(recent), normalize(rewards, recent))[1]
    places = ["--demos", str(DEMOS), "--output-dir", folder, "--run-name", "run"]
    g.train(g.parse_args([*FLAGS.split(), *places]))
    result = {"networks": digest(made[0]), "difference": halves_and_whole()}
    result["rewards"] = torch.stack(list(seen[0])).tolist()
    result["gathered"] = g.all_gather(torch.tensor([g.RANK])).tolist()
    Path(folder, f"rank{g.RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
