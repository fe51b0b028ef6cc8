"""Write the result tables of the documents (between their markers) and the figures, from the CSVs in benchmark/results
alone.

python benchmark/report.py            # write
python benchmark/report.py --check    # exit with 1 if the tables are not what the CSVs say

It also numbers the links to lines: [text](../script.py#L12 "code") points at the one line that holds the code.
"""

import csv
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark/results"
FIGURES = ROOT / "benchmark/figures"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What the original's text gives, in % of its demonstrations' mean return (630): mean action, sampled.
ORIGINAL = dict.fromkeys(("GAIL", "GAIL 1M", "GAIL 2M", "GAIL + normalization"), "79 / 65 (50M steps)")
ORIGINAL |= dict.fromkeys(("combined 2M", "combined"), "89 / 72 (50M steps)")
GPU = {  # column of gpu.csv -> its head in the table
    "name": "run",
    "card": "card",
    "whole run, steps/s": "whole run, steps/s",
    "loop, steps/s": "loop, steps/s",
    "wall_seconds": "seconds, with the start",
    "time/rollout": "s a rollout",
    "time/discriminator": "s of D",
    "time/update": "s of policy and value",
    "time/autoencoder": "s of autoencoder and predictor",
    "peak_MiB": "MiB at most",
    "commit": "commit",
}
PEERS = ["ours", "imitation, our settings", "imitation, its settings", "tianshou, its settings"]
SCRIPTS = [  # suite, variant, label
    ("rssm", "100k steps", "gail_rssm.py, states"),
    ("rssm_frames", "frames, 100k", "gail_rssm.py, frames"),
    ("state_seq", "N = 2", "gail_state_seq.py, states"),
    ("gail", "GAIL", "gail_ppo.py, states and actions"),
    ("frames", "HalfCheetah, 1M", "gail_pixels_ae.py, frames"),
]


def of(suite: str, *variants: str) -> list[tuple[str, str, str]]:
    return [(suite, variant, variant) for variant in variants]


# figure -> what is drawn; over minutes instead of steps where its name says so
DRAWN = {
    "gail": of(
        "original_table",
        *("GAIL + normalization", "combined", "GAIL without normalization", "PPO, gamma 0.99, lambda 0.95"),
    ),
    "pixels": of("frames", "HalfCheetah, 1M, on an H200", "HalfCheetah, 1M"),
    "peers": of("peers", *(f"GAIL, {peer}" for peer in PEERS)),
    "peers_minutes": of("peers", *(f"GAIL, {peer}" for peer in PEERS)),
    "long": of("long", "GAIL 20M"),
    "hopper": of("endings", "Hopper, GAIL", "Hopper, GAIL on states"),
    "state_seq": of("state_seq", *(f"N = {n}" for n in range(1, 6)), "N = 4, look ahead"),
    "scripts": SCRIPTS,
    "scripts_minutes": SCRIPTS,
}


@dataclass
class Args:
    check: bool = False
    """write nothing; exit with 1 if a document differs from the CSVs"""


def read(name: str) -> dict[str, list[dict]]:
    """A CSV's rows by variant, in the file's order; nothing if there is no such file."""
    path, groups = RESULTS / f"{name}.csv", defaultdict(list)
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                groups[row["variant"]].append(row)
    return groups


def expert_return(row: dict) -> float | None:
    """The expert's mean return, if the run knew it."""
    if row.get("expert_return_mean"):
        return float(row["expert_return_mean"])
    if row.get("eval/vs_expert"):
        return float(row["eval/return_mean"]) / float(row["eval/vs_expert"])
    return None


def interquartile_mean(values: np.ndarray) -> float:
    """Mean of the middle half, (S,) -> (): a quarter of the weight is cut from each end (Agarwal et al. 2021)."""
    values, cut = np.sort(values), len(values) / 4
    inside = np.clip(np.arange(1, len(values) + 1) - cut, 0, 1) * np.clip(
        len(values) - cut - np.arange(len(values)), 0, 1
    )
    return float(np.average(values, weights=inside))


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95% interval of the interquartile mean, by resampling seeds."""
    rng = np.random.default_rng(0)
    means = [interquartile_mean(rng.choice(values, len(values))) for _ in range(resamples)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def percent(row: dict, name: str) -> float:
    """A return of a run in % of the way from random actions to its demonstrations; of a run from before random actions
    were measured, in % of its demonstrations."""
    random, demos = float(row.get("random_return_mean") or 0.0), float(row["demos_return_mean"])
    return 100 * (float(row[name]) - random) / (demos - random)


def row_of(variant: str, rows: list[dict]) -> dict[str, str]:
    """One variant's row, column -> text; a dash where there is nothing to tell."""
    if len({bool(r.get("random_return_mean")) for r in rows}) > 1:
        sys.exit(f"{variant}: rows with and without random_return_mean, whose percentages do not compare")
    mean = np.array([percent(r, "eval/return_mean") for r in rows])
    sampled = np.array([percent(r, "eval/return_sampled_mean") for r in rows if r.get("eval/return_sampled_mean")])
    each = [mean.min()] if len(rows) >= 5 else sorted(mean)
    spread = f" ± {mean.std(ddof=1):.1f} ({', '.join(f'{x:.1f}' for x in each)})" if len(rows) > 1 else ""
    best = [percent(r, "best/return_mean") for r in rows if r.get("best/return_mean")]
    middle = "[{:.1f}, {:.1f}]".format(*bootstrap_interval(mean)) if len(rows) >= 5 else ""
    sampled_text = f"{sampled.mean():.1f}" if len(sampled) else "–"
    sampled_text += f" ± {sampled.std(ddof=1):.1f}" if len(sampled) > 1 else ""
    returned = f"{np.mean([float(r['eval/return_mean']) for r in rows]):.0f}"
    if all(expert_return(r) for r in rows):
        returned += f" ({np.mean([100 * float(r['eval/return_mean']) / expert_return(r) for r in rows]):.0f})"
    reached = np.array([float(r.get("steps_to_90") or np.inf) for r in rows])
    steps = f"{np.median(reached) / 1e6:.2f}M" if np.isfinite(np.median(reached)) else "never"
    steps += f" ({np.isfinite(reached).sum()}/{len(rows)})"
    seconds = np.median([float(r["seconds"]) for r in rows])
    time = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s" if seconds else "–"
    if rows[0].get("env_steps"):
        time += f" ({np.median([float(r['charts/SPS']) for r in rows]):,.0f})"
    else:
        steps = "–"  # a method that takes no steps while it learns
    return {
        "variant": variant,
        "seeds": str(len(rows)),
        "mean action: mean ± std (worst, or each)": f"{mean.mean():.1f}{spread}",
        "IQM [95%]": f"{interquartile_mean(mean):.1f} {middle}" if middle else "–",
        "return (% of the expert)": returned,
        "best": f"{np.mean(best):.1f}" if best else "–",
        "sampled": sampled_text,
        "steps to 90%: median": steps,
        "time (steps/s)": time,
        "original": ORIGINAL.get(variant, "–"),
    }


def table(groups: dict[str, list[dict]]) -> str:
    """One Markdown row a variant, without columns that hold nothing but dashes; and where the runs come from."""
    rows = [row_of(variant, runs) for variant, runs in groups.items()]
    columns = [column for column in rows[0] if any(row[column] != "–" for row in rows)]
    cells = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    everything = [run for runs in groups.values() for run in runs]
    commits, versions = (", ".join(dict.fromkeys(run[name] for run in everything)) for name in ("commit", "versions"))
    return "\n".join([*(f"| {' | '.join(line)} |" for line in cells), "", f"Commits {commits}; {versions}."])


def draw(name: str, drawn: list[tuple[str, str, str]]) -> None:
    """benchmark/figures/<name>.png: return over env steps, median over seeds with the full range as a band; or over the
    minutes that learning took at each variant's median speed, the final evaluation left out (of peers all). `drawn` has
    (suite, variant, label). Where whole scripts are compared the axis is logarithmic."""
    drawn = [(read(suite), read(f"{suite}_curves"), variant, label) for suite, variant, label in drawn]
    if drawn[0][2] not in drawn[0][0]:
        return  # a figure without its subject
    drawn = [(rows[variant], curves[variant], label) for rows, curves, variant, label in drawn if variant in rows]
    figure, ax = plt.subplots(figsize=(7, 4.8), layout="constrained")
    in_minutes, bottom, top = name.endswith("_minutes"), 0.0, 0.0
    for rows, curve, label in drawn:
        scale = 1e-6
        if in_minutes:
            scale = np.median([float(row["seconds"]) / float(row["env_steps"]) for row in rows]) / 60
        by_step = defaultdict(list)
        for row in curve:
            by_step[int(row["global_step"])].append(float(row["eval/return_mean"]))
        steps = sorted(by_step)
        values = [np.array(by_step[step]) for step in steps]
        x, seeds = scale * np.array(steps), "1 seed" if len(values[0]) == 1 else f"{len(values[0])} seeds"
        (line,) = ax.plot(x, [np.median(v) for v in values], label=f"{label} ({seeds})")
        low, high = [v.min() for v in values], [v.max() for v in values]
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        bottom, top = min(bottom, *low), max(top, *high)
    first = drawn[-1][0][0]  # a run of the variant that the others are compared with
    demonstrations = float(first["demos_return_mean"])
    ax.axhline(demonstrations, color="tab:red", linestyle="--", label="demonstrations")
    top = expert_return(first) or max(top, demonstrations)
    if name.startswith("scripts"):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    if expert_return(first):
        ax.axhline(top, color="black", linestyle=":", label="expert (mean action)")
    xlabel = "minutes on one core" if in_minutes else "environment steps (million)"
    ax.set(xlabel=xlabel, ylabel="true return of an episode, mean action", ylim=(1.08 * bottom, 1.08 * top))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")  # it would cover curves
    ax.grid(alpha=0.3)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_few_demonstrations() -> None:
    """benchmark/figures/few_demonstrations.png: last policy over the number of demonstrations, one line a method: the
    seeds' median, their full range as a band."""
    groups = read("few_demonstrations")
    numbers = sorted({int(variant.rsplit(" = ", 1)[1]) for variant in groups})
    if len(numbers) < 3:
        return  # no curve yet
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method in dict.fromkeys(variant.rsplit(", K = ", 1)[0] for variant in groups):
        points = {
            int(variant.rsplit(" = ", 1)[1]): np.array([percent(row, "eval/return_mean") for row in rows])
            for variant, rows in groups.items()
            if variant.startswith(f"{method}, K = ")
        }
        x = sorted(points)
        (line,) = ax.plot(x, [np.median(points[k]) for k in x], marker="o", label=method)
        low, high = [points[k].min() for k in x], [points[k].max() for k in x]
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.axhline(100, color="tab:red", linestyle="--", label="demonstrations")
    ax.set(
        xscale="log", xticks=numbers, xticklabels=numbers, xlabel="demonstrated episodes of 100 steps", ylim=(-5, 110)
    )
    ax.set_ylabel("score (0: random actions, 100: demonstrations)")
    ax.minorticks_off()
    ax.legend(loc="lower right")
    ax.grid(alpha=0.3)
    figure.savefig(FIGURES / "few_demonstrations.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_bc_study() -> None:
    """benchmark/figures/bc_study.png: what a clone of each set returns, over the width of its network."""
    sets = defaultdict(lambda: defaultdict(list))  # demonstrations -> width -> returns
    demos, expert = {}, 0.0
    for variant, rows in read("bc_study").items():
        level, width = variant.rsplit(", width ", 1)
        sets[level][int(width)] = [float(row["eval/return_mean"]) for row in rows]
        demos[level], expert = float(rows[0]["demos_return_mean"]), expert_return(rows[0]) or expert
    if not sets:
        return
    figure, ax = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for level, returns in sets.items():
        widths = sorted(returns)
        (line,) = ax.plot(
            widths,
            [np.mean(returns[w]) for w in widths],
            marker="o",
            label=f"{level} (demonstrations: {demos[level]:.0f})",
        )
        low, high = [min(returns[w]) for w in widths], [max(returns[w]) for w in widths]
        ax.fill_between(widths, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if expert:
        ax.axhline(expert, color="black", linestyle=":", label="expert (mean action)")
    widths = sorted({width for returns in sets.values() for width in returns})
    ax.set(xscale="log", xticks=widths, xticklabels=widths, xlabel="width of the two hidden layers", ylim=(0, None))
    ax.set_ylabel("true return of an episode, mean action")
    ax.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    ax.grid(alpha=0.3)
    figure.savefig(FIGURES / "bc_study.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def study_table(rows: list[dict]) -> str:
    """Cloning's study: returns by demonstration set and width, mean (and range) of the seeds."""
    cells = defaultdict(list)  # (level, width) -> returns
    for row in rows:
        level, width = row["variant"].rsplit(", width ", 1)
        cells[level, int(width)].append(float(row["eval/return_mean"]))
    widths = sorted({width for _, width in cells})
    demos = {row["variant"].rsplit(", width ", 1)[0]: float(row["demos_return_mean"]) for row in rows}
    lines = [" | ".join(["| demonstrations", "their return", *(f"width {w}" for w in widths)]) + " |"]
    lines.append("|---" * (len(widths) + 2) + "|")
    for level, demos_return in demos.items():
        line = [f"| {level}", f"{demos_return:.0f}"]
        for width in widths:
            values = cells[level, width]
            spread = f" ({min(values):.0f} to {max(values):.0f})" if len(values) > 1 else ""
            line.append(f"{np.mean(values):.0f}{spread}" if values else "–")
        lines.append(" | ".join(line) + " |")
    return "\n".join(lines)


def toy_table(groups: dict[str, list[dict]]) -> str:
    """The toy's seeds by variant, mean (and range): what counts there is how many starts are solved."""
    columns = {
        "starts solved by the expert, %": ("expert/success_mean", 100),
        "by the policy, %": ("eval/success_mean", 100),
        "steps an episode": ("eval/length_mean", 1),
        "D tells the untrained policy, %": ("disc/initial_accuracy", 100),
        "a fresh D the trained one, %": ("disc/fresh_accuracy", 100),
        "seconds": ("seconds", 1),
    }
    lines = [f"| variant | seeds | {' | '.join(columns)} |", "| --- | --- " + "| --- " * len(columns) + "|"]
    for variant, runs in groups.items():
        cells = [variant, str(len(runs))]
        for key, scale in columns.values():
            x = scale * np.array([float(run[key]) for run in runs])
            cells.append(f"{x.mean():.1f} ({x.min():.1f} to {x.max():.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    commits = ", ".join(dict.fromkeys(run["commit"] for runs in groups.values() for run in runs))
    return "\n".join([*lines, "", f"Commits {commits}."])


def results(name: str) -> str:
    """A suite's CSV as a table of its variants, the BC study's as a grid; any other CSV as it stands."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return "(not measured yet)"
    with open(path, newline="") as file:
        head, *rows = csv.reader(file)
    if name == "bc_study":
        return study_table([dict(zip(head, row)) for row in rows])
    if name == "toy":
        return toy_table(read(name))
    if {"variant", "demos_return_mean"} <= set(head):
        return table(read(name))
    if name == "gpu":  # its widest columns are left out
        shown = [head.index(column) for column in GPU]
        rows = [[row[i] for i in shown] for row in rows]
        head = list(GPU.values())
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def with_tables(text: str) -> str:
    """A document's text, everything between <!-- results:NAME --> and <!-- /results --> made anew."""
    parts = text.split("<!-- results:")
    for i, part in enumerate(parts[1:], start=1):
        name = part.split(" -->")[0]
        rest = part.split("<!-- /results -->", 1)[1]
        body = results(name)
        parts[i] = f"{name} -->\n{body}\n<!-- /results -->{rest}"
    return "<!-- results:".join(parts)


def with_lines(text: str) -> str:
    """The text, its links to lines of code made anew; an error where a link's code is on no line, or on several."""

    def renumber(link: re.Match) -> str:
        up, script, code = link.groups()
        lines = [i for i, line in enumerate((ROOT / script).read_text().splitlines(), start=1) if code in line]
        if len(lines) != 1:
            sys.exit(f"{code!r} is on {len(lines)} lines of {script}, expected one; mend the link to it")
        return f'({up}{script}#L{lines[0]} "{code}")'

    return re.sub(r'\(((?:\.\./)?)((?:data/)?\w+\.py)#L\d+ "([^"]+)"\)', renumber, text)


def main(args: Args) -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        made = with_lines(with_tables(text))
        if not args.check:
            document.write_text(made)
        elif made != text:
            sys.exit(f"{document.name} differs from the CSVs or the code; run benchmark/report.py")
    if not args.check:
        for name, drawn in DRAWN.items():
            draw(name, drawn)
        draw_few_demonstrations()
        draw_bc_study()


if __name__ == "__main__":
    main(tyro.cli(Args))
