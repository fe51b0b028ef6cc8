"""Helpers that stand in several scripts are the same to the letter, so that a fix in one is a fix in all."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["bc", "gail_ppo", "gail_state_seq", "gail_pixels_ae", "gail_rssm", "collect_expert_sac", "toy_pointnav"]
SCRIPTS = [ROOT / f"{name}.py" for name in SCRIPTS if (ROOT / f"{name}.py").exists()]
# One role in every script, about that script's settings and networks
OWN = {"Args", "train", "evaluate", "main", "parse_args", "report", "plot_curves", "load_agent", "final_evaluation"}


def definitions(path: Path) -> dict[str, str]:
    source = path.read_text()
    lines = source.splitlines()
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in OWN
    }


def differing(scripts: list[Path]) -> dict[str, list[str]]:
    """Names defined in several scripts in more than one way -> the scripts."""
    found = defaultdict(lambda: defaultdict(list))
    for path in scripts:
        for name, text in definitions(path).items():
            found[name][text].append(path.name)
    return {name: sum(texts.values(), []) for name, texts in found.items() if len(texts) > 1}


def test_copies_agree():
    assert differing(SCRIPTS) == {}


def test_a_differing_copy_is_seen(tmp_path):
    text = (ROOT / "gail_ppo.py").read_text()
    (tmp_path / "a.py").write_text(text)
    (tmp_path / "b.py").write_text(text.replace("running = deltas[t]", "running = 2 * deltas[t]"))
    assert differing([tmp_path / "a.py", tmp_path / "b.py"]) == {"compute_gae": ["a.py", "b.py"]}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stand_alone(path):
    names = {script.stem for script in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not names & {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in names
