"""Compile the C++ of this folder with the machine's own compiler, once, and make it known to JAX.

The library is kept in the user's cache folder ($XDG_CACHE_HOME/gradlab, else ~/.cache/gradlab) under a name that holds
everything it depends on: source, compiler, options, jaxlib and processor. Without a compiler or a folder to write to
there is one warning, and whoever asked takes the way without it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("sparse_products.cc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
HANDLERS = ("Pack", "Gather")
LONGEST = 300  # seconds that a compiler may take


class BuildError(Exception):
    """The library cannot be had on this machine; the message says what is missing."""


@functools.cache
def targets() -> dict[str, str] | None:
    """Handler ("Pack", "Gather") -> the name under which JAX knows it; None, with one warning, where it is missing."""
    try:
        path = built()
        library = ctypes.CDLL(str(path))
        names = {handler: f"gradlab_{handler.lower()}_{path.stem[-16:]}" for handler in HANDLERS}
        for handler, name in names.items():
            capsule = jax.ffi.pycapsule(getattr(library, f"{handler}Handler"))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except (BuildError, OSError, AttributeError) as error:
        logger.warning("gl.SparseProducts multiplies in the dense way, with the same results: %s", error)
        return None
    return names


def built() -> Path:
    """The path of the library, compiled if it is not there yet.

    Raises:
        BuildError: no compiler, or one that fails.
        OSError: no folder to write to.
    """
    compiler = _compiler()
    path = _folder() / f"sparse_products-{_identity(compiler)}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        _run([*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", draft])
        os.replace(draft, path)  # whoever else compiled it meanwhile made the same
    finally:
        Path(draft).unlink(missing_ok=True)
    return path


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    if named:
        raise BuildError(f"the C++ compiler {named[0]!r} that $CXX names was not found")
    raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}) was found: install one, or name it in $CXX")


def _folder() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen or os.path.expanduser("~/.cache")) / "gradlab"


def _identity(compiler: list[str]) -> str:
    """A digest of all that the library depends on."""
    parts = [
        SOURCE.read_text(encoding="utf-8"),
        *compiler,
        _run([*compiler, "--version"]),
        *FLAGS,
        importlib.metadata.version("jaxlib"),
        _processor(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The processor's name and abilities: a home folder may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *sorted(known)])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr[-1000:]}")
    return done.stdout
