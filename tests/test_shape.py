"""What makes the scripts readable, held by numbers: length, width, order, and that a copied file runs alone."""

import ast
import re
import tomllib

import pytest
from conftest import ROOT

# script -> lines, kB that it may have: what it has, so that it grows no more (wished for: 700, 36 and the like)
BUDGETS = {
    "gail_ppo": (1028, 58),
    "gail_state_seq": (1072, 61),
    "gail_pixels_ae": (1633, 92),
    "gail_rssm": (1398, 80),
    "bc": (815, 45),
    "collect_expert_sac": (741, 40),
    "toy_pointnav": (892, 48),
}
PLUMBING = "# --- Plumbing"


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def metadata(name: str) -> dict:
    """The inline metadata of a script (PEP 723), as `uv run` reads it."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source(name), re.MULTILINE)[1]
    return tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))


def depth(node: ast.AST) -> int:
    """How many loops, conditions and the like stand within each other."""
    deeper = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    inside = [depth(child) for child in ast.iter_child_nodes(node)]
    is_elif = isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
    if is_elif:
        inside = [depth(child) for child in [node.test, *node.body]] + [depth(node.orelse[0]) - 1]
    return max(inside, default=0) + isinstance(node, deeper)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_script_is_short_and_narrow(name):
    lines, kilobytes = BUDGETS[name]
    text = source(name)
    assert text.count("\n") <= lines and len(text.encode()) <= 1000 * kilobytes
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize("name", BUDGETS)
def test_functions_are_short_and_flat(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60 or node.name == "train", node.name
            assert depth(node) <= 4, node.name


@pytest.mark.parametrize("name", BUDGETS)
def test_the_algorithm_comes_first(name):
    """Networks, functions, steps and train stand above the plumbing, train last, within 65% of the file."""
    text = source(name)
    algorithm, *plumbing = text.split(PLUMBING)
    assert plumbing
    assert algorithm.count("\n") <= 0.65 * text.count("\n")
    functions = [node.name for node in ast.parse(algorithm).body if isinstance(node, ast.FunctionDef)]
    assert functions[-1] == "train"


@pytest.mark.parametrize("name", BUDGETS)
def test_a_script_names_the_packages_that_it_needs(name):
    """Its metadata has the pins of requirements.txt for just what it imports."""
    pins = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?(==\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    wanted = {re.match(r"[\w-]+", x)[0]: "==" + x.split("==")[1] for x in metadata(name)["dependencies"]}
    assert wanted.items() <= pins.items()
    imported = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert wanted.keys() == imported & pins.keys()


@pytest.mark.parametrize("name", BUDGETS)
def test_metadata_allows_the_pythons_that_we_name(name):
    assert metadata(name)["requires-python"] == ">=3.11,<3.14"
