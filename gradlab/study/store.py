"""Where results lie, and how they are written so that a run can be killed at any moment.

    results/<study>/spec.json                       the study, enough to run it again
    results/<study>/cells/<network>/<rule>/         one folder per cell:
        spec.json       what this cell's results depend on
        metrics.csv     one row per measured number
        arrays.npz      inner products of gradients, training losses, parameters
        manifest.json   when, where and with what it was computed: written last
    results/<study>/landscape/<network>/            likewise, after the cells
    results/<study>/superseded/...                  folders of another specification or of other software

A folder is complete if and only if its manifest exists. Every file is written beside its place and renamed
into it, so a file that exists is whole. While a cell is being computed its folder also holds `begun.json`
(specification and software), `probes/` (the rows of each probe), `checkpoint.npz` and `progress.json`; they
are removed at the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradlab.study.spec import StudyError

__all__ = [
    "Folder",
    "check_writable",
    "load_arrays",
    "locked",
    "read_json",
    "write_bytes",
    "write_json",
    "write_npz",
]

logger = logging.getLogger(__name__)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also when the process is killed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write readable JSON, with sorted keys."""
    write_bytes(path, (json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode())


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write NumPy arrays (no objects, no pickle): equal arrays give equal bytes."""
    buffer = io.BytesIO()
    # The names are file names inside the archive; "/" in them is fine.
    np.savez_compressed(buffer, allow_pickle=False, **{name: arrays[name] for name in sorted(arrays)})
    write_bytes(path, buffer.getvalue())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an npz file whole (never pickle)."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_json(path: Path) -> Any:
    """Read a JSON file, or return None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def check_writable(folder: Path, what: str, option: str) -> None:
    """Make a folder and prove that files can be written in it.

    Raises:
        StudyError: they cannot; the message names the folder and the option that chooses another one.
    """
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise StudyError(
            f"Nothing was computed: the folder {folder} for the {what} cannot be written ({error.strerror}). "
            f"Choose another one with {option} FOLDER."
        ) from error


class Folder(NamedTuple):
    """The folder of one cell (or landscape): its place, and the identity of what belongs into it."""

    root: Path  # results/<study>
    place: str  # such as cells/lif/OSTL
    identity: str  # SHA-256 of the specification

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.root / self.place

    def done(self) -> bool:
        """Say whether complete results of this very specification are there."""
        manifest = read_json(self.path / "manifest.json")
        return manifest is not None and manifest["identity"] == self.identity

    def begin(self, spec_json: str, software: Mapping[str, Any]) -> bool:
        """Make the folder ready to compute in; return whether a run that was cut off will be resumed.

        Anything there that belongs to another specification, or was computed with other software (numbers of
        two versions in one file would be a chimera), is moved aside, never deleted.
        """
        begun = {"identity": self.identity, "software": dict(software)}
        found = read_json(self.path / "begun.json")
        if found == begun and not (self.path / "manifest.json").exists():
            return True
        self.move_aside()
        write_json(self.path / "spec.json", json.loads(spec_json))
        write_json(self.path / "begun.json", begun)
        return False

    def move_aside(self) -> None:
        """Move the folder under `superseded/`, if there is anything in it."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        target = self.root / "superseded" / f"{self.place}-{time.strftime('%Y%m%d-%H%M%S')}"
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{target.name}.{number}")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path.rename(target)
        logger.warning("%s held results of another specification or of other software: moved to %s", self.path, target)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Declare the folder complete, then remove what only an unfinished run needs."""
        write_json(self.path / "manifest.json", {"identity": self.identity, **manifest})
        shutil.rmtree(self.path / "probes", ignore_errors=True)
        for name in ("begun.json", "checkpoint.npz", "progress.json"):
            (self.path / name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Folder, patience: float = 10.0) -> Iterator[None]:
    """Hold the right to compute in a folder; the system gives it back when the process ends, however it ends.

    Args:
        folder: the folder to compute in.
        patience: how many seconds to wait for another process (one that is just being ended, say).

    Raises:
        StudyError: another process keeps computing there.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock: there, do not start one study twice at the same time.
        yield
        return
    path = folder.root / "locks" / (folder.place.replace("/", "__") + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StudyError(
                        f"Another process is computing {folder.path}. Wait for it, or choose another results "
                        "folder with --results FOLDER."
                    ) from error
                time.sleep(0.2)
        yield
