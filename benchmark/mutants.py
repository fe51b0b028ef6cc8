"""Do the tests bite? `python benchmark/mutants.py` plants one bug at a time and runs the script's tests on it.

Each mutant is a line of a script replaced by a wrong one, in a copy of the repository. A mutant that no test notices
is a gap in the tests; the command then ends with exit code 1. `tests/test_copies.py` is left out, since it would see a
changed helper by its text alone. Results go to benchmark/results/mutants.csv.
"""

import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark/results/mutants.csv"
# (script, what is wrong, right line or part of it, wrong one)
MUTANTS = [
    (
        "gail_ppo",
        "labels flipped",
        "F.softplus(-expert_logit).mean() + F.softplus(policy_logit)",
        "F.softplus(expert_logit).mean() + F.softplus(-policy_logit)",
    ),
    (
        "gail_ppo",
        "bootstrap dropped at truncation",
        "gamma * next_values * (1 - terminated.to",
        "gamma * next_values * (1 - ended.to",
    ),
    (
        "gail_ppo",
        "advantages run across episodes",
        "decay = gamma * lam * (1 - ended.to",
        "decay = gamma * lam * (1 - terminated.to",
    ),
    (
        "gail_ppo",
        "discriminator sees unclipped actions",
        "disc_input(rollout.obs, rollout.executed_actions)",
        "disc_input(rollout.obs, rollout.actions)",
    ),
    (
        "gail_ppo",
        "ratio clipped from above alone",
        "ratio.clamp(1 - clip_coef, 1 + clip_coef)",
        "ratio.clamp(0, 1 + clip_coef)",
    ),
    (
        "gail_ppo",
        "surrogate with the larger of both terms",
        "-torch.minimum(ratio * advantages",
        "-torch.maximum(ratio * advantages",
    ),
    (
        "gail_ppo",
        "reward normalized with the wrong sign",
        "(rewards - mean * center) / max",
        "(mean * center - rewards) / max",
    ),
    (
        "gail_ppo",
        "reward divided by its variance",
        "std = math.sqrt(max(square - mean**2, 0.0))",
        "std = max(square - mean**2, 0.0)",
    ),
    ("gail_ppo", "gradient penalty pulls the norm to 0", "norm(dim=-1) - 1).square()", "norm(dim=-1)).square()"),
    (
        "gail_ppo",
        "an ended episode's last observation is the next one's first",
        'truncated, final_obs\n\n    def state_dict(self) -> dict:\n        """Everything',
        'truncated, next_obs\n\n    def state_dict(self) -> dict:\n        """Everything',
    ),
    (
        "gail_ppo",
        "sampled actions are the mean ones in evaluations",
        "action = mean + sampled * log_std.exp() * torch.randn(mean.shape, generator=generator)",
        "action = mean",
    ),
    (
        "gail_ppo",
        "the policy's deviation has no bounds",
        "return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)\n\n\ndef gaussian",
        "return mean, log_std\n\n\ndef gaussian",
    ),
    ("gail_ppo", "policy saved with another activation", '"activation": "silu"', '"activation": "relu"'),
    ("bc", "a clone that is not squashed", "torch.tanh(x) + 1) * (self.high", "x + 1) * (self.high"),
    ("gail_ppo", "log-probability without the deviation", "z.square().sum(-1) - log_std.sum(-1)", "z.square().sum(-1)"),
    (
        "gail_ppo",
        "value clipping keeps the smaller loss",
        "loss = torch.maximum(loss, (clipped",
        "loss = torch.minimum(loss, (clipped",
    ),
    ("gail_ppo", "entropy punished", "- args.ent_coef * entropy).backward()", "+ args.ent_coef * entropy).backward()"),
    ("gail_ppo", "log D as reward has the wrong sign", "else F.logsigmoid(logit)", "else -F.logsigmoid(logit)"),
    (
        "gail_ppo",
        "checkpoint forgets an optimizer",
        '"optimizer": optimizer, "disc_optimizer": disc_optimizer}',
        '"optimizer": optimizer}',
    ),
    (
        "gail_ppo",
        "checkpoint forgets the random numbers",
        'PerProcess({"collector": collector, "generator": generator})',
        'PerProcess({"collector": collector})',
    ),
    (
        "gail_ppo",
        "steps to a level: one evaluation suffices",
        "if min(value, following) >= target",
        "if value >= target",
    ),
    (
        "gail_ppo",
        "reset without noise on velocities",
        "self.qvel[ids] = self.reset_noise * self.rng",
        "self.qvel[ids] = 0.0 * self.rng",
    ),
    (
        "gail_ppo",
        "combined reward leaves out the environment's",
        'for name in ("env", "gail") if args.reward_source == "combined"',
        'for name in ("gail",) if args.reward_source == "combined"',
    ),
    (
        "gail_ppo",
        "gradients added over processes, not averaged",
        "copy_(gradient.view(p.shape) / WORLD_SIZE)",
        "copy_(gradient.view(p.shape))",
    ),
    ("gail_ppo", "advantages normalized by each process alone", "whole = everyones(advantage)", "whole = advantage"),
    (
        "gail_state_seq",
        "windows look ahead",
        "past = stream.tokens[torch.maximum(t - seq_len + 2",
        "past = stream.tokens[torch.maximum(t - seq_len + 3",
    ),
    (
        "gail_state_seq",
        "windows reach into the episode before",
        "offsets[:-1], start), env]",
        "offsets[:-1], 0 * start), env]",
    ),
    (
        "gail_state_seq",
        "the banded pass sees one token too many",
        "(j >= t - seq_len + 2) & (j >= start)",
        "(j >= t - seq_len + 1) & (j >= start)",
    ),
    (
        "gail_state_seq",
        "the transformer forgets its distances",
        "math.sqrt(key.shape[-1]) + self.distance_bias.flip(-1)",
        "math.sqrt(key.shape[-1]) + 0 * self.distance_bias.flip(-1)",
    ),
    (
        "gail_state_seq",
        "the transformer heeds the oldest tokens most",
        "nn.Parameter(-distance.repeat(self.heads, 1))",
        "nn.Parameter(distance.repeat(self.heads, 1))",
    ),
    (
        "gail_state_seq",
        "history forgotten between rollouts",
        "carried = min(self.keep, int(self.age.max()))",
        "carried = 0",
    ),
    (
        "gail_pixels_ae",
        "stale expert latents",
        "views, film, steps, mine, generator)\n            expert_seen, statistics",
        "views, film, steps, mine, generator)\n            _, statistics",
    ),
    ("gail_pixels_ae", "the view lags one step behind", "mujoco.mj_kinematics(model, local.data)", "pass"),
    (
        "gail_pixels_ae",
        "a window's first frames are another episode's",
        "return np.maximum(np.arange(len(first))[:, None] + np.arange(1 - frame_stack, 1), first[:, None])",
        "return np.maximum(np.arange(len(first))[:, None] + np.arange(1 - frame_stack, 1), 0)",
    ),
    ("gail_pixels_ae", "snippets run into the next episode", "whole &= ~ended[k : k + starts]", "whole &= True"),
    (
        "gail_pixels_ae",
        "the true reward leaks",
        "total += normalized if args.normalize_reward",
        "total += normalized + 0 * rollout.env_rewards if args.normalize_reward",
    ),
    (
        "gail_pixels_ae",
        "the inverse model's loss never reaches the encoder",
        "windows = latents[half:].float()",
        "windows = latents[half:].detach().float()",
    ),
    (
        "gail_pixels_ae",
        "a new episode starts with the old one's actions",
        "self.encode(self.frames[ids]), 0.0",
        "self.encode(self.frames[ids]), self.actions[ids]",
    ),
    (
        "gail_pixels_ae",
        "the predictor is shown the present as the future",
        "target, log = film.seen[LOOK_AHEAD - 1 :]",
        "target, log = film.seen[: starts]",
    ),
    (
        "collect_expert_sac",
        "target network not updated",
        "list(learner.critic.parameters()), tau)",
        "list(learner.critic.parameters()), 0.0)",
    ),
    (
        "collect_expert_sac",
        "temperature moves the wrong way",
        "alpha_loss = -learner.log_alpha.exp()",
        "alpha_loss = learner.log_alpha.exp()",
    ),
    (
        "collect_expert_sac",
        "a terminated step is bootstrapped",
        'gamma * (1 - batch["terminated"]) * next_value',
        "gamma * next_value",
    ),
    (
        "collect_expert_sac",
        "tanh's density left out",
        "(log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)",
        "log_prob.sum(-1)",
    ),
    (
        "bc",
        "validation episodes are trained on",
        "rng.permutation(episodes)[:count])",
        "rng.permutation(episodes)[:count]) & False",
    ),
    (
        "bc",
        "slow policy as fast as the fast one",
        "slow_parameter.lerp_(parameter, 1 - polyak)",
        "slow_parameter.lerp_(parameter, polyak)",
    ),
    (
        "toy_pointnav",
        "conjugate gradient forgets its directions",
        "direction = residual + squared / previous * direction",
        "direction = residual.clone()",
    ),
    (
        "toy_pointnav",
        "a TRPO step may break its bound",
        "if kl <= args.max_kl and after >= before:",
        "if after >= before:",
    ),
    (
        "toy_pointnav",
        "a solved episode counts as cut",
        "truncated = (self.elapsed >= MAX_EPISODE_STEPS) & ~terminated",
        "truncated = (self.elapsed >= MAX_EPISODE_STEPS) | terminated",
    ),
]
EXTRA = {
    "gradients added over processes, not averaged": "processes",
    "advantages normalized by each process alone": "processes",
}


@dataclass
class Args:
    only: str = ""  # plant those mutants alone whose script or description contains this
    workers: int = 0  # mutants at a time (0: one a core)


def first_failure(script: str, tests: str, right: str = "", wrong: str = "") -> str:
    """The first test that fails once `right` is replaced by `wrong` in a copy of the repository; empty if none does."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "wandb", "__pycache__", ".*_cache")
        )
        source = (copy / f"{script}.py").read_text()
        (copy / f"{script}.py").write_text(source.replace(right, wrong) if right else source)
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", f"tests/test_{tests}.py"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    failed = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    return failed.split(" - ")[0].partition(" ")[2]


def try_mutant(mutant: tuple[str, str, str, str]) -> dict:
    """Plant a bug and run the script's tests up to the first that fails."""
    script, bug, right, wrong = mutant
    clock = time.perf_counter()
    caught = first_failure(script, EXTRA.get(bug, script), right, wrong)
    return {"script": script, "bug": bug, "caught by": caught, "seconds": round(time.perf_counter() - clock)}


def main(args: Args) -> None:
    chosen = [mutant for mutant in MUTANTS if args.only in mutant[0] or args.only in mutant[1]]
    workers = args.workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(chosen), unit="mutant", disable=None) as progress:
        # Without any bug all tests must pass, or a failure says nothing.
        whole = sorted({(mutant[0], EXTRA.get(mutant[1], mutant[0])) for mutant in chosen})
        for (_, tests), failure in zip(whole, pool.map(lambda x: first_failure(*x), whole)):
            if failure:
                sys.exit(f"without any bug {failure} fails; mend that first (tests/test_{tests}.py).")
        rows = []
        for row in pool.map(try_mutant, chosen):
            rows.append(row)
            progress.update()
            print(f"{row['script']}: {row['bug']}: {row['caught by'] or 'NOT CAUGHT'}", flush=True)
    if not args.only:
        with open(RESULTS, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    missed = [row["bug"] for row in rows if not row["caught by"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} caught")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main(tyro.cli(Args))
