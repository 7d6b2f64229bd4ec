"""The command line: every mistake gets a sentence and exit status 2; a run says where everything is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradlab as gl
from gradlab import cli

ROOT = Path(gl.__file__).parent.parent

STUDY_FILE = """
\"\"\"A tiny study for a test.\"\"\"
from study_parts import tiny
STUDY = tiny()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, *arguments) -> str:
    assert cli.main(arguments) == 2
    return capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"gradlab {gl.__version__}"


def test_studies_are_listed_without_running_them(here, capsys):
    (here / "studies").mkdir()
    (here / "studies" / "mine.py").write_text('"""My own question."""\nraise SystemExit("I was run")')
    assert cli.main(["studies"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"mine +My own question\.", out)
    assert re.search(r"randman_rates +Five online", out)


def test_unknown_study_lists_the_known(here, capsys):
    message = fails(capsys, "study", "randman_rate")
    assert "Did you mean 'randman_rates'" in message and "Five online" in message
    assert "no study file nowhere.py" in fails(capsys, "study", "nowhere.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no STUDY"),
        ("STUDY = 3", "STUDY .* is a int"),
        ("import no_such_package_anywhere", r"line 1.*\n.*\n?.*No module named 'no_such_package_anywhere'"),
        ("import gradlab as gl\nSTUDY = gl.Study(name=1)", r"line 2(.|\n)*TypeError"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_broken_study_files(here, capsys, text, message):
    name = f"broken_study_{abs(hash(text))}"
    (here / f"{name}.py").write_text(text)
    shown = fails(capsys, "study", f"{name}.py")
    assert re.search(message, shown), shown
    assert "loading.py" not in shown, "the traceback begins in the user's own file"


def test_a_study_file_named_like_a_module_is_refused(here, capsys):
    (here / "json.py").write_text("STUDY = 1")
    assert "another name" in fails(capsys, "study", "json.py")


def test_bad_profile_and_folders_before_any_computing(here, capsys, monkeypatch):
    from gradlab.study import runner

    monkeypatch.setattr(runner, "_run_missing", lambda *_: pytest.fail("something was computed"))
    (here / "file").write_text("")
    assert "default, paper, smoke" in fails(capsys, "study", "randman_rates", "--profile", "big")
    assert "--results" in fails(capsys, "study", "randman_rates", "--results", "file/x")
    assert "--figures" in fails(capsys, "study", "randman_rates", "--figures", "file")
    assert "--workers 0" in fails(capsys, "study", "randman_rates", "--workers", "0")


def test_rerun_of_something_else(here, capsys):
    assert "cannot be read" in fails(capsys, "rerun", "none.json")
    (here / "spec.json").write_text("[1]")
    assert "not a gradlab study" in fails(capsys, "rerun", "spec.json")
    (here / "spec.json").write_text("{")
    assert "not valid JSON" in fails(capsys, "rerun", "spec.json")


def gradlab(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-m", "gradlab.cli", *arguments]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_from_study_file_to_report_and_again(tmp_path):
    (tmp_path / "tiny_study.py").write_text(STUDY_FILE)
    first = gradlab(tmp_path, "study", "tiny_study.py")
    assert first.returncode == 0, first.stderr
    report = tmp_path / "results/tiny/report.html"
    assert str(report) in first.stdout
    text = report.read_text()
    assert "SLTT" in text
    assert "<img" in text or "<svg" in text
    assert not re.search(r'(src|href)="https?:', text), "self-contained"
    assert list((tmp_path / "figures/tiny").glob("*.pdf")) and list((tmp_path / "figures/tiny").glob("*.png"))
    again = gradlab(tmp_path, "study", "tiny_study.py")
    assert again.returncode == 0 and "nothing to compute" in again.stderr
    rerun = gradlab(tmp_path, "rerun", "results/tiny/spec.json")
    assert rerun.returncode == 0, rerun.stderr
    assert rerun.stdout.count("byte for byte") == 2, rerun.stdout
    one = gradlab(tmp_path, "rerun", "results/tiny/cells/lif-5/SLTT/spec.json", "--results", "r1", "--figures", "f1")
    assert one.stdout.count("byte for byte") == 1, one.stdout + one.stderr
    metrics = tmp_path / "results/tiny/cells/lif-5/SLTT/metrics.csv"
    metrics.write_text(metrics.read_text().replace(",SLTT,network,cosine,0.", ",SLTT,network,cosine,0.1", 1))
    other = gradlab(tmp_path, "rerun", "results/tiny/spec.json")
    assert "DIFFERENT numbers" in other.stdout, "negative control"
