"""benchmark/: the report's statistics and tables, and the suites' command lines."""

import builtins
import difflib
import dis
import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import mutants  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402


def test_interquartile_mean_equals_its_definition():
    assert report.interquartile_mean(np.arange(8.0)) == pytest.approx(np.mean([2, 3, 4, 5]))
    assert report.interquartile_mean(np.array([0.0, 1, 2, 3, 100])) == pytest.approx((0.75 * 1 + 2 + 0.75 * 3) / 2.5)
    assert report.interquartile_mean(np.array([7.0])) == 7.0


def test_bootstrap_interval_holds_the_estimate_and_narrows_with_more_seeds():
    values = np.random.default_rng(1).normal(0, 1, 40)
    low, high = report.bootstrap_interval(values[:10])
    assert low < report.interquartile_mean(values[:10]) < high
    assert np.subtract(*report.bootstrap_interval(values)) > low - high


def test_tables_replace_what_stands_between_their_markers(monkeypatch):
    monkeypatch.setattr(report, "results", lambda name: "(not measured yet)")
    text = "a\n<!-- results:x -->\nold\n<!-- /results -->\nb\n"
    made = report.with_tables(text)
    assert made == "a\n<!-- results:x -->\n(not measured yet)\n<!-- /results -->\nb\n"
    assert report.with_tables(made) == made


def test_a_csv_without_variants_is_shown_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "x.csv").write_text("a,b\n1,two\n")
    assert report.results("x") == "| a | b |\n| --- | --- |\n| 1 | two |"
    assert report.results("y") == "(not measured yet)"


def test_the_study_becomes_a_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = ['"a, width 16",1,10,40', '"a, width 16",2,20,40', '"a, width 64",1,30,40', '"b, width 64",1,7,50']
    (tmp_path / "bc_study.csv").write_text("\n".join(["variant,seed,eval/return_mean,demos_return_mean", *rows]))
    assert report.results("bc_study").splitlines() == [
        "| demonstrations | their return | width 16 | width 64 |",
        "|---|---|---|---|",
        "| a | 40 | 15 (10 to 20) | 30 |",
        "| b | 50 | – | 7 |",
    ]


def test_a_row_shows_each_of_a_few_seeds_and_the_worst_of_many():
    def run(share, best, sps):
        row = {"eval/return_mean": 500 * share, "eval/vs_expert": share / 2}
        row |= {"eval/return_sampled_mean": 500 * (share - 0.1), "best/return_mean": 500 * best}
        row["demos_return_mean"] = 500
        row |= {"steps_to_90": 400_000 if share > 0.9 else "", "seconds": 90, "env_steps": 1, "charts/SPS": sps}
        return {name: str(value) for name, value in row.items()}

    few = report.row_of("few", [run(0.95, 0.99, 1000), run(0.85, 0.93, 3000)])
    assert few == {
        "variant": "few",
        "seeds": "2",
        "mean action: mean ± std (worst, or each)": "90.0 ± 7.1 (85.0, 95.0)",
        "IQM [95%]": "–",
        "return (% of the expert)": "450 (45)",
        "best": "96.0",
        "sampled": "80.0 ± 7.1",
        "steps to 90%: median": "never (1/2)",
        "time (steps/s)": "1.5 min (2,000)",
        "original": "–",
    }
    many = report.row_of("many", [run(share, 1, 1000) for share in (0.91, 0.92, 0.93, 0.94, 0.95)])
    assert many["mean action: mean ± std (worst, or each)"] == "93.0 ± 1.6 (91.0)"
    assert many["IQM [95%]"].startswith("93.0 [9") and many["steps to 90%: median"] == "0.40M (5/5)"


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda document: document.stem)
def test_documents_say_what_the_csvs_say(document):
    text = document.read_text()
    assert report.with_tables(text) == text, "run `python benchmark/report.py`"


def test_every_file_that_a_document_links_exists():
    for document in [*report.DOCUMENTS, ROOT / "data/README.md"]:
        links = re.findall(r"\]\(([^)#\s]+)", document.read_text())
        missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
        assert not missing, document


def test_every_heading_that_a_document_links_exists():
    headings = {}
    for document in [*report.DOCUMENTS, ROOT / "data/README.md"]:
        titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
        headings[document] = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for document in headings:
        for path, anchor in re.findall(r"\]\(([\w./]*)#([\w-]+)\)", document.read_text()):
            target = (document.parent / path).resolve() if path else document
            assert anchor in headings[target], f"{document.name}: {path}#{anchor}"


def test_documents_point_at_the_lines_they_speak_of():
    text = (ROOT / "docs/scripts.md").read_text()
    assert text.count(".py#L") >= 30 and report.with_lines(text) == text, "run `python benchmark/report.py`"


def test_links_to_lines_are_numbered_anew_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\ny = 2\ny = 3\n")
    assert report.with_lines('see [one](a.py#L7 "x = 1").') == 'see [one](a.py#L1 "x = 1").'
    for code in ("y = ", "z = "):
        with pytest.raises(SystemExit, match="expected one"):
            report.with_lines(f'[x](a.py#L1 "{code}")')


def unknown_names(code) -> set[str]:
    """Names that a module's code and its functions read and nobody defines."""
    used = {x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    known = {x.argval for x in dis.get_instructions(code) if x.opname == "STORE_NAME"} | vars(builtins).keys()
    inside = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return (used | set().union(*map(unknown_names, inside))) - known - {"__annotations__"}


@pytest.mark.parametrize("patch", sorted((ROOT / "benchmark/patches").glob("*.patch")), ids=lambda path: path.stem)
def test_a_patched_script_knows_all_names(patch, tmp_path):
    code = run.patched(str(patch.relative_to(ROOT)), tmp_path / "x").read_text()
    module_names = {"__name__", "__file__", "__module__", "__qualname__"}
    assert unknown_names(compile(code, patch.name, "exec")) <= module_names


@pytest.mark.parametrize("suite", run.SUITES)
def test_every_command_of_every_suite_parses(suite, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    runs = [(variant, seed) for variant, *_, seeds in run.SUITES[suite] for seed in seeds]
    assert len(runs) == len(set(runs))
    for _, script, flags, seeds in run.SUITES[suite]:
        if script.startswith("benchmark/peers/"):  # packages that are not ours: names of flags and choices must do
            source = (ROOT / script).read_text()
            for x in flags:
                name = f"    {x[2:].replace('-', '_')}: "
                assert name in source if x.startswith("--") else f'"{x}"' in source or float(x)
            continue
        name = script.removesuffix(".py")
        if script.endswith(".patch"):
            name = Path(script).stem
            run.patched(script, tmp_path / "x").rename(tmp_path / f"{name}.py")
        module = importlib.import_module(name)
        module.parse_args([*flags, "--seed", str(seeds[0])])


def test_help_names_every_suite():
    named = (ROOT / "benchmark/run.py").read_text().split('suite: str = "smoke"')[1].split('"""')[1]
    assert set(re.findall(r"\w+", named)) == set(run.SUITES)


def test_what_another_suite_has_measured_is_copied(tmp_path):
    command = run.command_line("gail_ppo.py", [], 1)
    rows = [{"variant": "GAIL 1M", "seed": 1, "command": command, "env_steps": 7}]
    rows += [{"variant": "combined 2M", "seed": 1, "command": "another", "env_steps": 8}]
    run.write_rows(tmp_path / "gail.csv", rows)
    run.write_rows(tmp_path / "gail_curves.csv", [{"variant": r["variant"], "seed": 1, "global_step": 5} for r in rows])
    run.copy_known(tmp_path, "original_table", {command: {"variant": "GAIL + normalization", "seed": 1}, "neither": {}})
    (row,), (point,) = (run.read_rows(tmp_path / f"original_table{ending}.csv") for ending in ("", "_curves"))
    assert row == {"variant": "GAIL + normalization", "seed": "1", "command": command, "env_steps": "7"}
    assert point == {"variant": "GAIL + normalization", "seed": "1", "global_step": "5"}


def test_rows_are_in_the_suites_order_and_replaced_when_measured_again(tmp_path):
    for variant, seed, value in (("combined 1M", 1, 5), ("by hand", 1, 6), ("GAIL 1M", 10, 7), ("GAIL 1M", 9, 8)):
        run.add_rows(tmp_path, "gail", "", [{"variant": variant, "seed": seed, "value": value}])
    run.add_rows(tmp_path, "gail", "", [{"variant": "combined 1M", "seed": 1, "value": 9}])  # killed in between
    rows = [(row["variant"], row["seed"], row["value"]) for row in run.read_rows(tmp_path / "gail.csv")]
    assert rows == [("GAIL 1M", "9", "8"), ("GAIL 1M", "10", "7"), ("combined 1M", "1", "9"), ("by hand", "1", "6")]


SCRIPT = """
import json, sys
from pathlib import Path

args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
resumed = "--resume" in args
folder = Path(args["--resume"]).parent if resumed else Path(args["--output-dir"], args["--run-name"])
folder.mkdir(exist_ok=True)
if "--fail" in args and args["--fail"] == args["--seed"]:  # cut off after its checkpoint
    (folder / "checkpoint.pt").touch()
    sys.exit(1)
(folder / "metrics.csv").write_text("global_step,eval/return_mean\\n1,5\\n2,\\n")
(folder / "summary.json").write_text(json.dumps({"resumed": resumed}))
"""


def test_a_suite_goes_on_after_failures_and_resumes_what_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "current_commit", lambda: "abc")
    suites = {name: [("x", "script.py", ["--fail", "1"], range(1, 4))] for name in ("a", "b")}
    monkeypatch.setattr(run, "SUITES", suites)
    (tmp_path / "script.py").write_text(SCRIPT)
    args = run.Args(suite="a", results=tmp_path / "results", runs=str(tmp_path / "runs"))

    def resumed(suite: str) -> list[tuple[str, str]]:
        return [(row["seed"], row["resumed"]) for row in run.read_rows(args.results / f"{suite}.csv")]

    with pytest.raises(SystemExit, match="x, seed 1: .*exit status 1"):
        run.main(args)
    assert resumed("a") == [("2", "False"), ("3", "False")]
    run.main(args)
    assert resumed("a") == [("1", "True"), ("2", "False"), ("3", "False")]
    assert [row["global_step"] for row in run.read_rows(args.results / "a_curves.csv")] == ["1"] * 3
    assert {row["cpu"] for row in run.read_rows(args.results / "a.csv")} == {run.cpu()}
    run.main(run.Args(suite="b", results=args.results, runs=args.runs))  # all of it is known
    assert resumed("b") == resumed("a") and not list((tmp_path / "runs").glob("b*"))


@pytest.mark.parametrize("change", ["another commit", "other flags", "finished"])
def test_a_folder_of_another_run_is_not_resumed(change, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "current_commit", lambda: "abc")
    (tmp_path / "script.py").write_text(SCRIPT)
    with pytest.raises(subprocess.CalledProcessError):
        run.run_one(tmp_path / "x", "script.py", ["--fail", "1"], 1, 0, sys.executable)
    if change == "another commit":
        monkeypatch.setattr(run, "current_commit", lambda: "def")
    if change == "finished":
        (tmp_path / "x/summary.json").touch()
    (tmp_path / "script.py").write_text(SCRIPT.replace('if "--fail" in args', "if False"))
    flags = ["--fail", "1", *(["--other", "2"] if change == "other flags" else [])]
    run.run_one(tmp_path / "x", "script.py", flags, 1, 0, sys.executable)
    assert json.loads((tmp_path / "x/summary.json").read_text()) == {"resumed": False}


@pytest.mark.parametrize("patch", sorted((ROOT / "benchmark/patches").iterdir()), ids=lambda patch: patch.stem)
def test_every_patch_fits_its_script(patch, tmp_path):
    changed = run.patched(f"benchmark/patches/{patch.name}", tmp_path / "x").read_text()
    assert changed != (ROOT / run.target(patch)).read_text()
    compile(changed, patch.name, "exec")


def test_a_patch_runs_in_place_of_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "current_commit", lambda: "abc")
    (tmp_path / "script.py").write_text(SCRIPT)
    changed = SCRIPT.replace('{"resumed": resumed}', '{"changed": True}').splitlines(keepends=True)
    patch = difflib.unified_diff(SCRIPT.splitlines(keepends=True), changed, "a/script.py", "b/script.py")
    (tmp_path / "x.patch").write_text("".join(patch))
    run.run_one(tmp_path / "run", "x.patch", ["--flag", "2"], 1, 0, sys.executable)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"changed": True}
    assert (tmp_path / "script.py").read_text() == SCRIPT
    assert run.command_line("x.patch", ["--flag", "2"], 1) == "git apply x.patch && python script.py --flag 2 --seed 1"


def test_a_figure_over_minutes_takes_the_time_that_the_runs_took(tmp_path, monkeypatch):
    row = {"seconds": "120", "env_steps": "1000", "demos_return_mean": "1"}
    row |= {"eval/return_mean": "1", "eval/vs_expert": "1"}
    curve = [{"global_step": str(step), "eval/return_mean": "1"} for step in (500, 1000)]
    monkeypatch.setattr(report, "read", lambda name: {"a": curve if name == "x_curves" else [row]})
    monkeypatch.setattr(report, "FIGURES", tmp_path)
    drawn = []
    monkeypatch.setattr(report.plt, "close", drawn.append)
    report.draw("x_minutes", report.of("x", "a"))
    report.draw("x", report.of("x", "a"))
    assert [list(figure.axes[0].lines[0].get_xdata()) for figure in drawn] == [[1.0, 2.0], [0.0005, 0.001]]


def test_figures_are_those_of_the_csvs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", tmp_path)
    for name, drawn in report.DRAWN.items():
        report.draw(name, drawn)
    report.draw_few_demonstrations()
    report.draw_bc_study()
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) == len(report.DRAWN) + 2
    for name in drawn:
        new, stored = (matplotlib.image.imread(folder / name) for folder in (tmp_path, ROOT / "benchmark/figures"))
        assert new.shape == stored.shape and np.abs(new - stored).mean() < 0.002, f"{name}: run benchmark/report.py"


def test_rows_whose_percentages_do_not_compare_are_refused():
    rows = [{"random_return_mean": ""}, {"random_return_mean": "-20"}]
    with pytest.raises(SystemExit, match="do not compare"):
        report.row_of("a", rows)


def test_one_seed_shows_no_spread():
    row = {"eval/return_sampled_mean": "240", "demos_return_mean": "600", "charts/SPS": "10"}
    row |= {"env_steps": "1000", "eval/return_mean": "300", "eval/vs_expert": "0.48", "seconds": "90"}
    row |= {"commit": "abc", "versions": "torch 1"}
    one, two = (report.table({"x": [row] * seeds}).splitlines()[2] for seeds in (1, 2))
    assert one == "| x | 1 | 50.0 | 300 (48) | 40.0 | never (0/1) | 1.5 min (10) |"
    assert two == "| x | 2 | 50.0 ± 0.0 (50.0, 50.0) | 300 (48) | 40.0 ± 0.0 | never (0/2) | 1.5 min (10) |"


def test_returns_count_from_random_actions_where_those_are_known():
    row = {"demos_return_mean": "-140", "eval/return_mean": "-246.7"}
    assert report.percent(row | {"random_return_mean": "-1207"}, "eval/return_mean") == pytest.approx(90)
    old = {"demos_return_mean": "600", "eval/return_mean": "300", "random_return_mean": ""}
    assert report.percent(old, "eval/return_mean") == 50
    assert report.expert_return({"expert_return_mean": "700"}) == 700
    assert report.expert_return({"eval/return_mean": "350", "eval/vs_expert": "0.5"}) == 700
    assert report.expert_return(row) is None


def test_a_table_leaves_out_columns_that_hold_nothing():
    row = {"demos_return_mean": "600", "eval/return_mean": "300", "eval/vs_expert": "0.48", "seconds": "90"}
    row |= {"commit": "abc", "versions": "torch 1"}
    cloning = row | dict.fromkeys(("eval/return_sampled_mean", "steps_to_90", "env_steps", "charts/SPS"), "")
    head, _, line, *_ = report.table({"x": [cloning]}).splitlines()
    assert line == "| x | 1 | 50.0 | 300 (48) | 1.5 min |" and head.count("|") == line.count("|")
    learning = row | {"eval/return_sampled_mean": "240", "demos_return_mean": "600", "steps_to_90": ""}
    learning |= {"charts/SPS": "10", "env_steps": "1000"}
    head, _, first, second, *_ = report.table({"x": [cloning], "combined": [learning] * 5}).splitlines()
    assert first == "| x | 1 | 50.0 | – | 300 (48) | – | – | 1.5 min | – |"
    assert second.startswith("| combined | 5 | 50.0 ± 0.0 (50.0) | 50.0 [50.0, 50.0] |") and "| 89 / 72 " in second
    assert head.count("|") == first.count("|") == second.count("|")


def test_steps_to_90_needs_two_evaluations_in_a_row():
    """Halfway from -100 to 100 is a score of 0.5, 80 of 0.9."""
    summary = {"random_return_mean": -100.0, "demos_return_mean": 100.0}
    points = enumerate((82.0, 78.0, 90.0, 81.0, 70.0, 95.0), 2)
    curve = [{"global_step": str(step), "eval/return_mean": str(x)} for step, x in points]
    assert run.steps_to_90(curve, summary) == 4
    assert run.steps_to_90(curve[:3], summary) is None and run.steps_to_90([], summary) is None
    assert run.steps_to_90(curve, {}) is None  # what random actions earn is not known


def test_steps_to_90_counts_the_seeds_that_never_got_there():
    row = {"demos_return_mean": "600", "eval/return_mean": "300", "eval/vs_expert": "0.48", "seconds": "0"}
    row |= {"env_steps": "9", "charts/SPS": "1", "commit": "abc", "versions": "torch 1"}
    rows = [row | {"steps_to_90": steps} for steps in ("", "400000", "500000", "", "700000")]
    assert "| 0.70M (3/5) |" in report.table({"x": rows}) and "| never (1/3) |" in report.table(
        {"x": rows[1:2] + rows[:1] * 2}
    )


def test_a_table_names_the_commits_and_versions_of_its_runs():
    row = {"demos_return_mean": "600", "eval/return_mean": "300", "eval/vs_expert": "0.48", "seconds": "0"}
    groups = {"x": [row | {"commit": "abc", "versions": "torch 1"}] * 2, "y": [row | {"commit": "d", "versions": "t"}]}
    assert report.table(groups).splitlines()[-2:] == ["", "Commits abc, d; torch 1, t."]


@pytest.mark.parametrize(("script", "bug", "right", "wrong"), mutants.MUTANTS, ids=lambda x: x[:40])
def test_every_mutant_finds_its_line(script, bug, right, wrong):
    source = (ROOT / f"{script}.py").read_text()
    assert source.count(right) == 1 and right != wrong


def test_the_parts_of_the_loop_are_timed_and_the_script_is_left_as_it_was(tmp_path, monkeypatch):
    import loop_parts

    before = loop_parts.script.update_policy
    monkeypatch.chdir(ROOT)
    loop_parts.main(3_200, tmp_path / "parts.csv")
    assert loop_parts.script.update_policy is before
    _, *rows = [line.split(",") for line in (tmp_path / "parts.csv").read_text().splitlines()]
    seconds = {row[0]: float(row[-2]) for row in rows}
    assert seconds.keys() == loop_parts.PARTS.keys()
    assert 0 < seconds["the physics (of rollouts and evaluations)"] < seconds["a rollout"] + seconds["evaluations"]
    assert seconds["40 minibatches of policy and value"] > 0


def test_how_precisely_the_pixel_script_sees():
    import eyes

    rng = np.random.default_rng(0)
    seen = rng.normal(size=(3000, 4))
    states = np.stack([seen[:, 0] - seen[:, 1], 100 * np.tanh(seen[:, 2]), rng.normal(size=3000)], axis=1)
    told = eyes.errors(seen, states, np.arange(3000) < 2000, 600, "cpu")
    assert (told[:2] < 0.2).all() and told[2] > 0.9  # what is not seen cannot be told

    flags = "--image-size 16 --latent-dim 4 --pretrain-steps 3 --predictor-steps 1 --num-envs 4 --num-steps 20 "
    flags += "--num-minibatches 1 --ae-batch-size 16 --num-demos 10 --threads 1"
    seen, states, train = eyes.see(eyes.script.parse_args(flags.split()))
    assert seen.shape == (1010, 4 * 4 + 3 * 6) and states.shape == (1010, 17) and train.sum() == 707
    with np.load(eyes.ROOT / "data/halfcheetah-v4_sac_stochastic-one.npz") as demos:
        drawn = np.flatnonzero((demos["observations"][:, None] == states[2]).all(-1))[0]  # third of its episode
        episode = np.flatnonzero(np.cumsum(demos["lengths"] + 1) > drawn)[0]
        actions = demos["actions"][drawn - episode - 2 : drawn - episode]
    np.testing.assert_allclose(seen[2, -12:].reshape(2, 6), actions)
    assert (seen[2, -18:-12] == 0).all() and len(eyes.main(flags.split(), steps=2)) == 17


def test_what_happens_along_the_episodes_of_a_pixel_run(tmp_path):
    import along

    episodes = [np.stack([np.full(n, k), np.arange(n)], axis=1) for k, n in ((1.0, 100), (4.0, 70), (8.0, 20))]
    assert along.windows(episodes) == [(0, 2, 2.5, 24.5), (50, 1, 1.0, 74.5)]  # 20 and 70 steps fill one less

    flags = "--image-size 16 --latent-dim 4 --pretrain-steps 3 --predictor-steps 1 --num-envs 4 --num-steps 20 "
    flags += "--num-minibatches 1 --ae-batch-size 16 --num-demos 3 --threads 1 --eval-episodes 2 --no-capture-video "
    flags += f"--total-timesteps 240 --output-dir {tmp_path} --run-name tiny"
    along.script.train(along.script.parse_args(flags.split()))
    rows = along.main(tmp_path / "tiny", episodes=2)
    assert [row[1:4] for row in rows] == [
        *(("demonstrations", 0, 3), ("demonstrations", 50, 3), ("mean action", 0, 2), ("mean action", 50, 2)),
        *(("sampled", 0, 2), ("sampled", 50, 2)),
    ]
    demos = along.script.load_demos(along.script.parse_args(["--num-demos", "3"]), required=["observations"])
    halves = demos["obs"].reshape(3, 2, 50, 17)[..., 8].mean((0, 2))  # the ninth of HalfCheetah's 17 is its velocity
    np.testing.assert_allclose([row[4] for row in rows[:2]], halves, atol=0.01)
    assert all(abs(row[4]) < 2 and row[5] > 0 for row in rows[2:]) and rows[2][2:] != rows[4][2:]


def test_eyes_need_two_demonstrations():
    import eyes

    with pytest.raises(eyes.script.UserError, match="--num-demos is 1, which leaves none to test on"):
        eyes.main(["--num-demos", "1"])


@pytest.mark.parametrize("tool", ["mutants", "gpu"])
def test_who_chooses_nothing_is_told(tool):
    module = importlib.import_module(tool)
    with pytest.raises(SystemExit, match="--only is nothing such"):
        module.main(module.Args(only="nothing such"))


@pytest.mark.parametrize("tool", ["loop_parts", "processes", "other_tasks"])
def test_asking_for_help_measures_nothing(tool):
    command = [sys.executable, f"benchmark/{tool}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout
