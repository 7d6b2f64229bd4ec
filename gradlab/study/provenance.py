"""With what a number was computed: versions, devices, flags, and the source's revision."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import gradlab

__all__ = ["provenance", "software", "visible_cores"]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "pandas")
_DRAWING = ("analysis", "report", "cli.py")
_FLAGS = ("JAX_", "XLA_", "TF_XLA_", "NVIDIA_TF32")


def software() -> dict[str, Any]:
    """Return what may change the numbers of a run: versions, the device, the flags.

    A run that was cut off is resumed only where this is still the same.
    """
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "source": _source(),
        "versions": {"gradlab": gradlab.__version__, "python": platform.python_version(), **versions},
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "processor": f"{platform.machine()} {_processor()}".strip(),
        "flags": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_FLAGS)},
        "x64": bool(getattr(jax.config, "jax_enable_x64", False)),
        "matmul_precision": str(getattr(jax.config, "jax_default_matmul_precision", None) or "default"),
    }


def provenance() -> dict[str, Any]:
    """Return `software()` with the platform and the source's revision, for the manifest."""
    return {
        **software(),
        "platform": platform.platform(),
        "visible_cores": visible_cores(),
        "revision": _revision(),
        "python_build": sys.version,
    }


def visible_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


@functools.cache
def _source() -> str:
    """Return the SHA-256 of the library's source without the parts that only draw; it sees every change."""
    folder = Path(gradlab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder)
        if place.parts[0] not in _DRAWING:
            digest.update(f"{place.as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _revision() -> str | None:
    """Return the source's Git revision, with "+changes" if it differs, or None for an installed package."""
    folder = Path(gradlab.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else it is somebody else's repository around us
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
