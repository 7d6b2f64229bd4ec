"""The notebooks run and show what they draw, call gradlab as it is, and are the same in both files of a pair."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)

# As Jupyter does, show what stands alone on a line: draw a figure, write a table.
RUNNER = """
import ast, io, sys, warnings
from pathlib import Path

for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, RuntimeWarning):
    warnings.filterwarnings("error", category=kind, module="gradlab")

def show(value):
    if hasattr(value, "savefig"):
        value.savefig(io.BytesIO(), format="png")
    elif hasattr(value, "_repr_html_"):
        assert "<table" in value._repr_html_()
    if value is not None:
        print("shown:", type(value).__name__)

path = Path(sys.argv[1])
tree = ast.parse(path.read_text(encoding="utf-8"))
for line in tree.body:
    if isinstance(line, ast.Expr):
        line.value = ast.Call(ast.Name("show", ast.Load()), [line.value], [])
exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), {"__name__": "__main__", "show": show})
"""


def run(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # conftest chose the screen and the fast compilation
    command = (sys.executable, "-c", RUNNER, str(source))
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


@each
def test_it_runs(source: Path, tmp_path: Path) -> None:
    ran = run(source, tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Warning" not in ran.stderr, ran.stderr[-3000:]
    figures = source.read_text(encoding="utf-8").count(".get_figure()\n")
    assert ran.stdout.count("shown: Figure") == figures >= 2
    assert list(tmp_path.iterdir()) == [], "a notebook leaves no files behind"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print('fine')\n[1, 2]", ""),
        ("print(no_such_name)", "NameError"),
        ("import warnings\nwarnings.warn_explicit('gone soon', FutureWarning, 'x.py', 1, 'gradlab.x')", "gone soon"),
        ("class Figure:\n    def savefig(self, *_, **__):\n        raise ValueError('no ink')\nFigure()", "no ink"),
    ],
)
def test_the_runner_sees_what_fails(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(text)
    ran = run(tmp_path / "small.py", tmp_path)
    assert (ran.returncode != 0) == bool(said) and said in ran.stderr
    assert ("shown: list" in ran.stdout) == (not said)


# --- calls, without running them ---


def names_of_gradlab(tree: ast.Module) -> dict[str, Any]:
    """What the imports of a notebook bind to gradlab's modules, classes and functions."""
    found: dict[str, Any] = {}
    for node in tree.body:
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
        if isinstance(node, ast.Import | ast.ImportFrom) and str(imported[0]).split(".")[0] == "gradlab":
            exec(ast.unparse(node), found)
    return found


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object that `gl.analysis.attribute` and the like name; None for what is not gradlab's."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, names)) is not None:
        return getattr(owner, node.attr)  # AttributeError: the name is gone
    return None


def calls(text: str) -> Iterator[str]:
    """Names of gradlab's functions that a notebook calls, each with arguments that it takes."""
    tree = ast.parse(text)
    names = names_of_gradlab(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node, names)
        starred = isinstance(node, ast.Call) and (
            any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
        )
        if isinstance(node, ast.Call) and not starred and callable(found := resolve(node.func, names)):
            inspect.signature(found).bind(*node.args, **{str(k.arg): k.value for k in node.keywords})
            yield ast.unparse(node.func)


@each
def test_what_it_calls_is_there(source: Path) -> None:
    assert len(set(calls(source.read_text(encoding="utf-8")))) >= 8


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("gl.rules.BPTT()", None),
        ("gl.rules.BackPropagation()", AttributeError),
        ("gl.LIF(leak=0.9)", TypeError),
        ("gl.evaluate(net, params)", TypeError),
    ],
)
def test_a_call_that_is_not_there_is_found(line: str, error: type[Exception] | None) -> None:
    text = f"import gradlab as gl\n{line}"
    if error is None:
        assert list(calls(text)) == ["gl.rules.BPTT"]
    else:
        with pytest.raises(error):
            list(calls(text))


# --- pairs ---


def test_every_notebook_is_a_pair_and_in_the_table() -> None:
    folder = ROOT / "notebooks"
    assert len(SOURCES) == 4
    assert [path.stem for path in SOURCES] == sorted(path.stem for path in folder.glob("*.ipynb"))
    linked = re.findall(r"\]\((\w+)\.ipynb\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert sorted(linked) == [path.stem for path in SOURCES]


@each
def test_the_notebook_is_clean(source: Path) -> None:
    notebook = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


@each
def test_both_files_hold_the_same_cells(source: Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="pairs are compared with jupytext: install the extra 'test'")

    def cells(notebook: Any) -> list[tuple[str, str]]:
        return [(cell.cell_type, cell.source) for cell in notebook.cells]

    text, pair = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    way_out = f"write the pair anew: python -m jupytext --to ipynb --update notebooks/{source.name}"
    assert cells(pair) == cells(text), way_out
    assert text.metadata["kernelspec"] == pair.metadata["kernelspec"]
    assert cells(jupytext.reads(source.read_text(encoding="utf-8") + "\n1 + 1\n", "py:percent")) != cells(pair)
