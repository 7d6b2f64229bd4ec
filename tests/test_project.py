"""The project as a whole: what an import costs, what the files may not contain, what the build promises."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYTHON_VERSIONS = ("3.11", "3.12", "3.13")
MAX_LINES = 400


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # A make started by a test must not take over the flags of the make that started the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def files() -> list[Path]:
    """The repository's files: all that git tracks or would add, or, without git, everything."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    listing = run(*command) if shutil.which("git") else None
    if listing is not None and listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        skipped = {".venv", ".git", "results", "__pycache__"}
        paths = [path for path in ROOT.rglob("*") if not skipped & set(path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


# --- importing ---


def heavy_imports(code: str) -> set[str]:
    """Drawing and table libraries that a fresh Python has loaded after running this code."""
    heavy = ("matplotlib", "pandas", "seaborn", "sklearn")
    probe = f"{code}\nimport sys; print('loaded:', *(m for m in {heavy} if m in sys.modules))"
    result = run(sys.executable, "-c", probe)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("loaded:")[2].split())


def test_import_is_light() -> None:
    assert heavy_imports("import gradlab") == set()
    assert heavy_imports("import gradlab, pandas") == {"pandas"}, "the probe sees what was loaded"


def test_version_is_the_installed_one() -> None:
    import gradlab

    try:
        installed = importlib.metadata.version("gradlab")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gradlab is not installed here; the tests read it from the folder")
    assert gradlab.__version__ == installed


def test_shape_annotations_are_checked(tmp_path: Path) -> None:
    package = tmp_path / "shaped"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "plain.py").write_text("def f(a: int) -> int:\n    return a\n")
    code = """
        import jax
        from jaxtyping import Array, Float

        def f(a: Float[Array, "time batch"], w: Float[Array, " batch"]) -> Float[Array, " time"]:
            return a @ w
    """
    (package / "annotated.py").write_text(textwrap.dedent(code))
    probe = f"""
        import sys
        sys.path[:0] = [{str(ROOT / "tests")!r}, {str(tmp_path)!r}]
        from pathlib import Path
        import conftest
        assert conftest.modules_with_shapes(Path({str(package)!r})) == ["shaped.annotated"]
        conftest.check_shapes(Path({str(package)!r}))
        import jax.numpy as jnp, shaped.annotated, shaped.plain
        shaped.plain.f("not an int, and nobody looks")
        shaped.annotated.f(jnp.ones((4, 3)), jnp.ones(3))
        try:
            shaped.annotated.f(jnp.ones((4, 3)), jnp.ones((3, 1)))
        except TypeError as error:
            print("refused:", type(error).__name__)
    """
    result = run(sys.executable, "-c", textwrap.dedent(probe))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "refused: TypeCheckError"


def test_x64_fixture(x64: None) -> None:
    import jax.numpy as jnp

    assert jnp.zeros(2).dtype == "float64"


def test_default_is_32_bit() -> None:
    """The fixture above must not leak into tests that do not ask for it."""
    import jax.numpy as jnp

    assert jnp.zeros(2).dtype == "float32"


# --- the files ---

# Written so that this file does not find itself.
FORBIDDEN = re.compile(
    r"/w[o]rk/|/f[a]rm/|/r[o]ot/|/h[o]me/\w|/tmp/v[/]|python[h]osted|p[y]pi\.org|n[p]mjs|deb\.d[e]bian"
)


def forbidden_lines(named_texts: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, text in named_texts:
        for number, line in enumerate(text.splitlines(), start=1):
            if FORBIDDEN.search(line):
                yield f"{name}:{number}: {line.strip()[:120]}"


def test_no_machine_path_and_no_registry_host() -> None:
    def texts() -> Iterator[tuple[str, str]]:
        for path in files():
            content = path.read_bytes()
            if b"\0" not in content[:8192]:
                yield str(path.relative_to(ROOT)), content.decode("utf-8", errors="replace")

    assert list(forbidden_lines(texts())) == []


@pytest.mark.parametrize("line", ["open('/wor" + "k/data.npz')", "--index-url https://py" + "pi.org/simple"])
def test_forbidden_lines_are_found(line: str) -> None:
    assert list(forbidden_lines([("a.py", f"import os\n{line}\n")])) == [f"a.py:2: {line}"]
    assert list(forbidden_lines([("a.py", "the work of others; results/homework/x\n")])) == []


def test_modules_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files()
        if path.suffix == ".py"
    }
    assert "tests/test_project.py" in lengths
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_results_are_ignored_and_the_gallery_is_kept(tmp_path: Path) -> None:
    run("git", "init", "-q", cwd=tmp_path)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    drawn = ["results/randman_rates/report.html", "figures/randman_rates/cosine.pdf", ".venv/.stamp"]
    kept = [
        "figures/README.md",
        "figures/gallery/cosine.png",
        "figures/stored/lags.csv.gz",
        "gradlab/report/results.py",
        "studies/randman_rates.py",
    ]
    result = run("git", "check-ignore", *drawn, *kept, cwd=tmp_path)
    assert result.stdout.split() == drawn


# --- the build ---


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def pins(python_version: str) -> dict[str, Version]:
    """Package -> the one version that constraints.txt gives it on this Python."""
    found: dict[str, Version] = {}
    for line in constraint_lines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python_version}):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"constraints.txt pins exactly: {line}"
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice on Python {python_version}"
            found[name] = Version(specifier.version)
    return found


def direct_requirements() -> list[Requirement]:
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def test_requirements_are_lower_bounds_only() -> None:
    operators = {str(r): [s.operator for s in r.specifier] for r in direct_requirements()}
    assert {text: found for text, found in operators.items() if found != [">="]} == {}


@pytest.mark.parametrize("python_version", PYTHON_VERSIONS)
def test_every_requirement_is_pinned_at_or_above_its_lower_bound(python_version: str) -> None:
    pinned = pins(python_version)
    for requirement in direct_requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin for Python {python_version}"
        assert requirement.specifier.contains(version), f"{requirement} is not met by the pin {version}"


def test_pins_differ_between_the_two_ends() -> None:
    """Python 3.11 cannot install the newest JAX: one common pin could not serve both ends."""
    assert pins("3.11")["jax"] < Version("0.11") <= pins("3.13")["jax"]


def test_constraints_name_no_address() -> None:
    for line in constraint_lines():
        assert Requirement(line).url is None, line
    assert not re.search(r"https?:|file:|^\s*-", "\n".join(constraint_lines()), re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lists_its_targets() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    targets = [name for name in phony.split() if name != "force"]
    assert {"venv", "study", "test", "slow", "lint", "types", "format", "clean"} <= set(targets)
    result = run("make", "--no-print-directory")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^  make ([\w-]+) +\S", result.stdout, re.MULTILINE) == targets


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("exit 1", "needs Python 3.11 or newer"),
        ('case "$*" in *ensurepip*) exit 1;; esac; echo 3.12', "python3.12-venv"),
    ],
)
def test_make_says_what_is_missing(tmp_path: Path, body: str, said: str) -> None:
    """A Python that is too old, and one without ensurepip (Debian keeps it in a package of its own)."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "fake python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    result = run("make", "venv", f"PYTHON={python}", cwd=tmp_path)
    assert result.returncode != 0
    assert said in result.stderr
    assert not (tmp_path / ".venv").exists()
