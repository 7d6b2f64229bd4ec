"""What every test shares: no screen, fast compilation, checked array shapes, 64-bit numbers on request."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["MPLBACKEND"] = "Agg"
# Proofs compile hundreds of tiny programs and run each once: fast compilation matters, fast code does not.
_FAST_COMPILATION = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # A third less time. Only here: a later jaxlib ends the process when it meets a flag that it no longer has.
    _FAST_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FAST_COMPILATION))

_ROOT = Path(__file__).resolve().parent.parent
_TESTS_BETWEEN_CLEARINGS = 80
_n_finished = pytest.StashKey[int]()


def modules_with_shapes(package: Path) -> list[str]:
    """Names of the modules of a package that import jaxtyping: their annotations carry array shapes."""
    names = []
    for path in sorted(package.rglob("*.py")):
        if re.search(r"^\s*(from|import) jaxtyping\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            parts = path.relative_to(package.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def check_shapes(package: Path) -> None:
    """Let beartype check the annotated functions of these modules at each call; run it before their import.

    Only modules with array shapes are checked: elsewhere gradlab's own errors, which say the way out, must be
    the first that a wrong argument meets.
    """
    from jaxtyping import install_import_hook

    install_import_hook(modules_with_shapes(package), "beartype.beartype")


if any(name.split(".")[0] == "gradlab" for name in sys.modules):
    raise RuntimeError("gradlab was imported before tests/conftest.py could have its array shapes checked")
check_shapes(_ROOT / "gradlab")


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit numbers for the whole test: proofs of equality need them, float32 stops at about 1e-7."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process (`--dist loadgroup`), where they share fixtures and compiled programs.

    Tests that name a group themselves keep it: those of the long files, which would take one process too long.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Drop compiled programs now and then: hundreds of small ones would fill the memory."""
    stash = item.config.stash
    stash[_n_finished] = stash.get(_n_finished, 0) + 1
    if stash[_n_finished] % _TESTS_BETWEEN_CLEARINGS == 0 and "jax" in sys.modules:
        import jax

        jax.clear_caches()
