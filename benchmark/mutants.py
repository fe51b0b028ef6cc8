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
    ("gail_ppo", "earlier ends are forgotten", 'visits["policy"] += counts', 'visits["policy"] = counts'),
    (
        "gail_ppo",
        "bootstrap dropped at truncation",
        "deltas = rewards + gamma * next_values",
        "deltas = rewards + gamma * next_values * (1 - ended.to(values.dtype))",
    ),
    (
        "gail_ppo",
        "advantages run across episodes",
        "gae_lambda * (1 - ended.to(values.dtype))",
        "gae_lambda + 0 * values",
    ),
    ("gail_ppo", "nothing comes after an end", 'rewards["absorbing"] / (1 - args.gamma)', "0.0"),
    ("gail_ppo", "one absorbing step comes after an end", "/ (1 - args.gamma)  # for ever", ""),
    ("gail_ppo", "the expert's ends count as the policy's", "torch.log(expert / policy)", "torch.log(policy / expert)"),
    (
        "gail_ppo",
        "ends are counted, not what follows",
        'rollout["steps_left"][rollout["terminated"]].sum()',
        'rollout["terminated"].sum()',
    ),
    (
        "gail_ppo",
        "steps do not know how much time is absorbing",
        "imitation_reward(logit + offset)",
        "imitation_reward(logit)",
    ),
    ("gail_ppo", "a constant sensor counts", "std[std <= 1e-7 * np.abs(mean)] = np.inf", "std += 1e-3"),
    ("gail_ppo", "statistics in single precision", "data = data.astype(np.float64)", "data = data.astype(np.float32)"),
    (
        "gail_ppo",
        "actions are executed in standardized units",
        "self.standardize_action.undo(action).clamp",
        "action.clamp",
    ),
    ("gail_ppo", "episodes may be longer than their limit", "if lengths.max(initial=0) > limit:", "if False:"),
    ("gail_ppo", "observations may be no numbers", "if not np.isfinite(obs).all():", "if False:"),
    ("gail_ppo", "score without the random actions", 'demos["random_return"]) / gain', "0.0) / gain"),
    ("gail_ppo", "discriminator sees unclipped actions", '"executed": executed,', '"executed": action,'),
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
        "(rewards - mean) / (max",
        "(mean - rewards) / (max",
    ),
    (
        "gail_ppo",
        "reward divided by its variance",
        "seen.std(correction=0).item()",
        "seen.var(correction=0).item()",
    ),
    ("gail_ppo", "gradient penalty pulls the norm to 0", "norm(dim=-1) - 1).square()", "norm(dim=-1)).square()"),
    (
        "gail_ppo",
        "an ended episode's last observation is the next one's first",
        'next_obs[i] = info["final_obs"][i]',
        "pass",
    ),
    (
        "gail_ppo",
        "the final observation is one of after the reset",
        '{"final_obs": final_states[:, 1:]',
        '{"final_obs": self.states()[:, 1:]',
    ),
    (
        "gail_ppo",
        "sampled actions are the mean ones in evaluations",
        "return mean + log_std.exp() * noise",
        "return mean",
    ),
    (
        "gail_ppo",
        "evaluations count what comes after an episode's end",
        "rewards.append(np.where(running, reward, 0.0))",
        "rewards.append(reward)",
    ),
    (
        "gail_ppo",
        "the policy's deviation has no bounds",
        "return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)",
        "return mean, log_std",
    ),
    (
        "gail_ppo",
        "actions are executed beyond their bounds",
        "undo(action).clamp(self.low, self.high)",
        "undo(action)",
    ),
    ("gail_ppo", "log-probability without the deviation", "z.square().sum(-1) - log_std.sum(-1)", "z.square().sum(-1)"),
    ("gail_ppo", "entropy punished", "- args.ent_coef * entropy).backward()", "+ args.ent_coef * entropy).backward()"),
    (
        "toy_pointnav",
        "log D as reward has the wrong sign",
        "return F.logsigmoid(logit)  # log D",
        "return -F.logsigmoid(logit)",
    ),
    (
        "gail_ppo",
        "checkpoint forgets an optimizer",
        '"optimizer": optimizer, "disc_optimizer": disc_optimizer}',
        '"optimizer": optimizer}',
    ),
    ("gail_ppo", "checkpoint forgets the random numbers", 'generator.set_state(saved["generator"])', "pass"),
    ("gail_ppo", "checkpoint forgets the simulations", 'envs.set_state(saved["simulator"])', "pass"),
    (
        "gail_ppo",
        "checkpoint forgets the reward's statistics",
        "recent_rewards[name].extend(rewards)",
        "pass",
    ),
    (
        "gail_ppo",
        "one bad action outweighs the rest",
        "bounded = log_ratio.clamp(max=MAX_LOG_RATIO)",
        "bounded = log_ratio",
    ),
    (
        "gail_ppo",
        "a longer run keeps the old schedule",
        "rest = 1 - (iteration / num_iterations) ** 3",
        "rest = 1 - (iteration / (len(rows) + 1)) ** 3",
    ),
    (
        "gail_ppo",
        "reset without noise on velocities",
        "0.1 * self.rng.standard_normal",
        "0.0 * self.rng.standard_normal",
    ),
    (
        "gail_ppo",
        "combined reward leaves out the environment's",
        'if args.reward_source in (name, "combined"):',
        'if args.reward_source == name or (name, args.reward_source) == ("gail", "combined"):',
    ),
    (
        "gail_ppo",
        "the value learns the rewards, not the returns",
        '"advantage": advantages, "return": returns}',
        '"advantage": advantages, "return": rewards}',
    ),
    (
        "gail_state_seq",
        "windows see one state fewer of the past",
        "torch.cat([window[:, 1:], after[t]",
        "torch.cat([window[:, :-1], after[t]",
    ),
    (
        "gail_state_seq",
        "windows reach into the episode before",
        "window = torch.where(begins[:, None, None], first, window)",
        "window = window + 0 * first",
    ),
    (
        "gail_state_seq",
        "history forgotten between rollouts",
        'episodes["begins"] = window, begins',
        'episodes["begins"] = window, torch.ones_like(begins)',
    ),
    (
        "gail_state_seq",
        "transformer forgets distances",
        "torch.softmax(match + self.distance_bias, dim=-1)",
        "torch.softmax(match, dim=-1)",
    ),
    ("gail_state_seq", "transformer heeds the oldest", "nn.Parameter(-distance.repeat", "nn.Parameter(distance.repeat"),
    ("gail_state_seq", "first action not zero", "torch.zeros_like(rollout", "torch.ones_like(rollout"),
    ("gail_state_seq", "nothing comes after an end", 'rewards["absorbing"] / (1 - args.gamma)', "0.0"),
    ("toy_pointnav", "nothing comes after the goal", 'rewards["absorbing"] / (1 - args.gamma)', "0.0"),
    (
        "bc",
        "actions are learned in raw units",
        '"action": policy.standardize_action(action)',
        '"action": action.float()',
    ),
    ("bc", "two demonstrations are one", "int(val_fraction * episodes + 1e-9)", "1"),
    ("collect_expert_sac", "a constant sensor is divided by nothing", "] = 1.0  # no more than rounding", "] += 1e-3"),
    (
        "gail_state_seq",
        "next states wrong",
        "first = np.cumsum(lengths + 1) - lengths - 1",
        "first = np.cumsum(lengths + 1) - 1",
    ),
    (
        "gail_pixels_ae",
        "stale expert latents",
        "args.ae_steps, args, generator)\n            encode_expert(nets.autoencoder, expert)",
        "args.ae_steps, args, generator)",
    ),
    (
        "gail_pixels_ae",
        "the view lags one step behind",
        "self.batch.forward(ids, stage=mujoco.mjtStage.mjSTAGE_POS)",
        "pass",
    ),
    (
        "gail_pixels_ae",
        "the camera stands still",
        "look_at = self.centers_of_mass[ids, 1]",
        "look_at = 0 * self.qpos[ids, :3]",
    ),
    (
        "gail_pixels_ae",
        "what is behind covers what is nearer",
        "np.argsort(-middles[..., 2].round(6)",
        "np.argsort(middles[..., 2].round(6)",
    ),
    ("gail_pixels_ae", "capsules without ends", "sub_(half[:, g]).clamp_(min=0)", "sub_(half[:, g])"),
    (
        "gail_pixels_ae",
        "the next replay writes over what a CUDA graph returned",
        "return tuple(x.clone() for x in outputs)",
        "return tuple(outputs)",
    ),
    (
        "gail_pixels_ae",
        "a CUDA graph reads its first inputs for ever",
        "            x.copy_(new)\n",
        "            pass\n",
    ),
    (
        "gail_pixels_ae",
        "nothing follows an end",
        'next_values[rollout["terminated"]] = rewards["absorbing"] / (1 - args.gamma)  # for ever',
        'next_values[rollout["terminated"]] = 0.0',
    ),
    (
        "gail_pixels_ae",
        "a window's first frames are another episode's",
        'encode_all(expert["frames"]).split(expert["counts"])',
        'encode_all(expert["frames"]).split(10**9)',
    ),
    ("gail_pixels_ae", "snippets run into the next episode", "[..., :-1].any(-1)", "[..., :0].any(-1)"),
    (
        "gail_pixels_ae",
        "the true reward leaks",
        'logit = nets.disc(rollout["features"]).squeeze(-1)',
        'logit = nets.disc(rollout["features"]).squeeze(-1) + 0 * rollout["env_reward"]',
    ),
    (
        "gail_pixels_ae",
        "the inverse model's loss never reaches the encoder",
        "windows = latents[count:].float()",
        "windows = latents[count:].detach().float()",
    ),
    (
        "gail_pixels_ae",
        "a new episode starts with the old one's actions",
        "actions = actions.masked_fill(begun, 0.0)",
        "pass",
    ),
    (
        "gail_pixels_ae",
        "the predictor is shown the present as the future",
        '["features"][LOOK_AHEAD - 1 :, :, -nets',
        '["features"][: len(inside), :, -nets',
    ),
    (
        "gail_pixels_ae",
        "gradients added over processes, not averaged",
        "torch.cat([p.grad.flatten() for p in parameters]) / WORLD_SIZE",
        "torch.cat([p.grad.flatten() for p in parameters])",
    ),
    (
        "gail_pixels_ae",
        "rewards normalized by each process alone",
        "recent_rewards.append(all_gather(rewards)",
        "recent_rewards.append((rewards)",
    ),
    ("bc", "a clone that is not squashed", "torch.tanh(self.net(x)) + 1)", "self.net(x) + 1)"),
    ("collect_expert_sac", "target network not updated", "list(critic), args.tau)", "list(critic), 0.0)"),
    (
        "collect_expert_sac",
        "temperature moves the wrong way",
        "alpha_loss = -sac.log_alpha.exp()",
        "alpha_loss = sac.log_alpha.exp()",
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
        "slow_parameter.lerp_(parameter, rate)",
        "slow_parameter.lerp_(parameter, 1 - rate)",
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
    ("gail_rssm", "the last agent is saved", '"agent": slow.state_dict()', '"agent": agent.state_dict()'),
    ("gail_ppo", "the average stands still", "polyak_update(slow, agent, 1 /", "polyak_update(slow, agent, 0 /"),
    ("gail_state_seq", "the last policy is saved", '"agent": slow.state_dict()', '"agent": agent.state_dict()'),
    (
        "gail_rssm",
        "the posterior sees the future",
        "state, posterior = self.posterior_step(state, action, embedding, generator)",
        "state, posterior = self.posterior_step(state, action, self.encoder(obs)[:, -1], generator)",
    ),
    (
        "gail_rssm",
        "another sequence's action before a state",
        "state, posterior = self.posterior_step(state, action, embedding, generator)",
        "state, posterior = self.posterior_step(state, action.roll(1, 0), embedding, generator)",
    ),
    (
        "gail_rssm",
        "KL not balanced",
        "loss = args.dynamics_coef * dynamics",
        "loss = args.representation_coef * dynamics",
    ),
    ("gail_rssm", "too few nats pull all the same", "representation.clamp(min=args.free_nats)", "representation"),
    ("gail_rssm", "KL the wrong way round", "p_std / q_std", "q_std / p_std"),
    (
        "gail_rssm",
        "no gradient through a sample",
        "return mean + std * torch.randn(",
        "return mean + std.detach() * torch.randn(",
    ),
    (
        "gail_rssm",
        "returns run on after an end",
        "(continues[t] * ahead + (1 - continues[t]) * absorbing_value)",
        "ahead",
    ),
    (
        "gail_rssm",
        "a sequence of two episodes",
        "begin = torch.maximum(torch.minimum(begin, last + 1 - length), first)",
        "begin = torch.maximum(begin, 0 * begin)",
    ),
    (
        "gail_rssm",
        "padding counts",
        'weight = batch["inside"] / batch["inside"].sum()',
        'weight = torch.ones_like(batch["inside"]) / batch["inside"].numel()',
    ),
    ("gail_rssm", "D and policy train the model", "loss.backward(inputs=parameters)", "loss.backward()"),
    ("gail_rssm", "imagined from beyond an end", 'inside & warm & ~batch["terminated"]', "inside & warm"),
    ("gail_rssm", "imagined from a memory that has just begun", "warm = (step >= BURN_IN)", "warm = (step >= 0)"),
    ("gail_rssm", "the agent never forgets", "        x[i] = 0.0\n", "        x[i] += 0.0\n"),
    (
        "gail_rssm",
        "D sees no speed",
        "torch.cat([obs[1:], obs[1:] - obs[:-1]]",
        "torch.cat([obs[1:], obs[1:] - obs[1:]]",
    ),
    ("gail_rssm", "tanh's density left out", "(log_prob - log_slope).sum(-1)", "log_prob.sum(-1)"),
    ("gail_rssm", "the policy goes down", "policy_loss = -(alive * objective)", "policy_loss = (alive * objective)"),
    (
        "gail_rssm",
        "what was replayed is lost at a resume",
        'replay = saved["replay"]',
        "pass",
    ),
    ("gail_rssm", "steps after an end count", ".cumprod(0)\n", ".pow(0)\n"),
    ("gail_rssm", "the target is the critic", "critic, TARGET_RATE)", "critic, 1.0)"),
    (
        "gail_rssm",
        "autoencoder: still pixels weigh most",
        "weight = 1 / (pixels.std(0, correction=0) + 0.03)",
        "weight = pixels.std(0, correction=0) + 0.03",
    ),
    ("gail_rssm", "autoencoder: random steps are free", "pretraining = RANDOM_STEPS if", "pretraining = 0 if"),
    (
        "gail_rssm",
        "autoencoder: demonstrations alone are learned",
        "autoencoder.render(np.concatenate(seen))]",
        "autoencoder.render(seen[0])]",
    ),
    ("gail_ppo", "D has no gradient penalty", "loss + args.grad_penalty_coef * penalty", "loss"),
    ("gail_ppo", "gradients are not cut", "nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)", "pass"),
    ("gail_ppo", "the value's loss has no weight", "args.vf_coef * value_loss", "value_loss"),
    ("gail_ppo", "one epoch", "range(args.update_epochs)", "range(1)"),
    (
        "gail_ppo",
        "advantages in a unit of their own",
        'advantage = advantage / (mini["advantage"].std() + 1e-8)',
        "pass",
    ),
    ("gail_ppo", "evaluated is the policy, not its average", "evaluate(slow, demos, 20", "evaluate(agent, demos, 20"),
    ("gail_ppo", "weights that are no numbers are saved", "finite = all(x.isfinite().all()", "finite = all(True"),
    (
        "gail_ppo",
        "a warm start that clones nothing",
        "        clone_behaviour(agent, demo_obs",
        "        (agent, demo_obs",
    ),
    (
        "gail_ppo",
        "D takes the policy's learning rate",
        "Adam(disc.parameters(), lr=args.disc_learning_rate",
        "Adam(disc.parameters(), lr=args.learning_rate",
    ),
    ("gail_state_seq", "evaluated is the policy, not its average", "evaluate(slow, demos", "evaluate(agent, demos"),
    (
        "gail_pixels_ae",
        "evaluated are the networks, not their average",
        "evaluate(slow, render, slow_graphs",
        "evaluate(nets, render, graphs",
    ),
    (
        "gail_pixels_ae",
        "the last networks are saved",
        '{"networks": slow.state_dict(), "max',
        '{"networks": nets.state_dict(), "max',
    ),
    (
        "gail_pixels_ae",
        "the average is lost at a resume",
        '        slow.load_state_dict(saved["slow"])\n',
        "",
    ),
    ("gail_pixels_ae", "the average has the statistics of before", "slow_buffer.copy_(buffer)", "pass"),
    (
        "gail_pixels_ae",
        "one bad action outweighs the rest",
        "bounded = log_ratio.clamp(max=MAX_LOG_RATIO)",
        "bounded = log_ratio",
    ),
    ("gail_pixels_ae", "the policy goes down", "    (policy_loss + args.vf_coef", "    (-policy_loss + args.vf_coef"),
    (
        "gail_pixels_ae",
        "advantages of other steps",
        'rollout["log_prob"], advantages, returns]',
        'rollout["log_prob"], advantages.flip(0), returns]',
    ),
    (
        "gail_pixels_ae",
        "gradients are not cut",
        "nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)",
        "pass",
    ),
    ("gail_pixels_ae", "D has no gradient penalty", "loss + args.grad_penalty_coef * penalty", "loss"),
    (
        "gail_pixels_ae",
        "the expert is as it looked before the pretraining",
        "        encode_expert(nets.autoencoder, expert)\n    if nets.predictor:",
        "    if nets.predictor:",
    ),
    (
        "gail_pixels_ae",
        "rewards after an episode's end count",
        'np.where(running, step["env_reward"].numpy(), 0.0)',
        'step["env_reward"].numpy()',
    ),
    (
        "gail_rssm",
        "the value learns that of the next state",
        "critic(states[:-1].detach())",
        "critic(states[1:].detach())",
    ),
    ("gail_rssm", "returns count on the quick critic", "target_critic(states[1:])", "critic(states[1:])"),
    (
        "gail_rssm",
        "D sees jumps from one demonstration to the next",
        '.split((demos["lengths"] + 1).tolist())',
        ".split(10**9)",
    ),
    ("gail_rssm", "D sees what comes after an end", 'policy[imagined["alive"] > 0.5]', "policy.flatten(0, 1)"),
    ("gail_rssm", "D sees no noise", "DISC_NOISE * torch.randn", "0.0 * torch.randn"),
    ("gail_rssm", "D has no gradient penalty", "loss + args.grad_penalty_coef * penalty", "loss"),
    ("gail_rssm", "one update a rollout", "range(args.updates if", "range(1 if"),
    (
        "gail_rssm",
        "rewards after an end count",
        "rewards.append(np.where(running, reward, 0.0))",
        "rewards.append(reward)",
    ),
    (
        "gail_rssm",
        "weights that are no numbers are saved",
        "finite = all(x.isfinite().all()",
        "finite = all(True",
    ),
    (
        "collect_expert_sac",
        "the critic's learning rate stays",
        "for optimizer in optimizers.values():\n                left",
        'for optimizer in [optimizers["actor"]]:\n                left',
    ),
    (
        "toy_pointnav",
        "gradients are not cut",
        "nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)",
        "pass",
    ),
    (
        "gail_rssm",
        "parameters of an optimizer's second group rest",
        '[x for group in optimizer.param_groups for x in group["params"]]',
        'optimizer.param_groups[0]["params"]',
    ),
    (
        "bc",
        "layers that somebody adds rest",
        '[x for name, x in policy.named_parameters() if name != "log_std"]',
        "list(policy.net.parameters())",
    ),
    ("gail_pixels_ae", "what is invisible is drawn", " & (model.geom_rgba[:, 3] > 0)", ""),
    (
        "gail_pixels_ae",
        "whatever an observation begins with is drawn",
        "np.allclose(obs[: len(positions)], positions)",
        "True",
    ),
    ("gail_pixels_ae", "alpha counts as a colour", "piece[..., :3].float()", "piece.float()"),
    ("data/film", "times of a GIF are rounded down", "round(time / picture_ms)", "int(time / picture_ms)"),
]
EXTRA = {
    "alpha counts as a colour": "films",
    "times of a GIF are rounded down": "films",
    "gradients added over processes, not averaged": "processes",
    "rewards after an episode's end count": "films",
    "rewards normalized by each process alone": "processes",
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
        command = [sys.executable, "-m", "pytest", "-xq", "-n0", "-p", "no:cacheprovider", f"tests/test_{tests}.py"]
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
    if not chosen:
        sys.exit(f"--only is {args.only}, which no script's or bug's name holds")
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
