"""Running a study: its cells in parallel processes, then landscapes and diagnostics, then the report."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from gradlab.study import canonical
from gradlab.study.cells import cell_folder, run_cell
from gradlab.study.diagnostics import diagnostic_folder, run_diagnostic
from gradlab.study.progress import Display, read_progress
from gradlab.study.provenance import visible_cores
from gradlab.study.spec import Study, StudyError
from gradlab.study.store import Folder, check_writable, write_bytes, write_json
from gradlab.study.surfaces import landscape_folder, run_landscape

__all__ = ["run_study"]

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds
_ROUNDS = 3  # how often a pool whose worker was killed is started again


class Job(NamedTuple):
    """One call for an executor: `function(*arguments)`, whose results go to `folder`."""

    name: str
    function: Callable[..., str]
    arguments: tuple[Any, ...]
    folder: Folder


def run_study(study: Study, results: Path, figures: Path, workers: int | None = None, executor: Any = None) -> Path:
    """Run what is not there yet, then write tables, figures and the report from the stored results.

    Args:
        study: the study, with its profile chosen.
        results: folder for the numbers of all studies.
        figures: folder for the figures of all studies.
        workers: number of processes; the default is one per cell but at most one per visible processor core,
            and one on a machine with an accelerator.
        executor: anything with `submit(function, *arguments)` that returns a future, instead of local
            processes. Its workers must see the same results folder and import the same modules.

    Returns:
        The report's file.

    Raises:
        StudyError: a folder cannot be written (before anything is computed), or cells have failed (after all
        others
            have been computed and reported).
        gradlab.study.canonical.CanonicalError: the study cannot be written down.
    """
    check_writable(results, "results", "--results")
    check_writable(figures, "figures", "--figures")
    if workers is not None and workers < 1:
        raise StudyError(f"--workers {workers}: give at least 1.")
    spec_json = _specification(study)
    root = results / study.folder
    write_json(root / "spec.json", json.loads(spec_json))
    place = str(results.resolve())
    cells = [
        Job(cell.name, run_cell, (spec_json, cell.index, place), cell_folder(study, cell, place))
        for cell in study.cells()
    ]
    failures = _run_missing(cells, "Cells", workers, executor, root)
    failures += _run_missing(_landscape_jobs(study, spec_json, place), "Landscapes", workers, executor, root)
    failures += _run_missing(_diagnostic_jobs(study, spec_json, place), "Diagnostics", workers, executor, root)

    from gradlab.study.summary import write_summary

    report = write_summary(study, results, figures)
    if failures:
        raise StudyError("\n".join([*failures, _how_to_go_on(root, report)]))
    return report


def _specification(study: Study) -> str:
    """Return the study's text, after proving that what it builds has the same text."""
    spec_json = study.to_json()
    again = canonical.dumps(canonical.loads(spec_json))
    if again != spec_json:
        raise StudyError(
            f"Study {study.name!r} does not survive being written down and read back; something in it "
            "changes its own fields when it is built. Look for a constructor that alters its arguments."
        )
    return spec_json


def _landscape_jobs(study: Study, spec_json: str, place: str) -> list[Job]:
    """Return the landscapes of those networks whose cells are all complete."""
    if study.landscape is None:
        return []
    return [
        Job(name, run_landscape, (spec_json, name, place), landscape_folder(study, name, place))
        for name in _complete(study, place)
    ]


def _diagnostic_jobs(study: Study, spec_json: str, place: str) -> list[Job]:
    """Return the diagnostics of those networks whose cells are all complete."""
    return [
        Job(
            f"{kind} of {name}",
            run_diagnostic,
            (spec_json, name, kind, place),
            diagnostic_folder(study, name, kind, place),
        )
        for name in _complete(study, place)
        for kind in study.diagnostics
    ]


def _complete(study: Study, place: str) -> list[str]:
    """Return the networks whose cells are all complete."""
    waiting = {cell.network for cell in study.cells() if not cell_folder(study, cell, place).done()}
    return [name for name in sorted(study.networks) if name not in waiting]


def _run_missing(jobs: list[Job], what: str, workers: int | None, executor: Any, root: Path) -> list[str]:
    """Run the jobs whose folder is not complete; return a message for each that has failed."""
    pending = [job for job in jobs if not job.folder.done()]
    if not jobs:
        return []
    if not pending:
        logger.info("%s: all %d are complete; nothing to compute.", what, len(jobs))
        return []
    complete = len(jobs) - len(pending)
    logger.info("%s: %d complete, to compute: %s", what, complete, ", ".join(job.name for job in pending))
    display = Display(len(jobs), what)
    failures: dict[str, BaseException] = {}
    try:
        for attempt in range(_ROUNDS):
            pool = executor or _pool(_workers(workers, len(pending), attempt))
            try:
                pending = _round(pool, pending, len(jobs), display, failures)
            finally:
                if executor is None:
                    _end(pool)
            if not pending:
                break
            logger.warning("A worker was killed from outside; its cells are taken up again from what they stored.")
    finally:
        display.close()
    for job in pending:
        failures[job.name] = RuntimeError(
            f"its process was killed {_ROUNDS} times; if memory ran out, use fewer processes (--workers)"
        )
    return [_describe_failure(job, failures[job.name], root) for job in jobs if job.name in failures]


def _round(
    pool: Any, jobs: Sequence[Job], total: int, display: Display, failures: dict[str, BaseException]
) -> list[Job]:
    """Run jobs on an executor until each has ended; return those that were lost with a killed worker."""
    futures: dict[str, Any] = {}
    waiting: list[Job] = []
    lost: list[Job] = []
    for job in jobs:
        try:
            futures[job.name] = pool.submit(job.function, *job.arguments)
            waiting.append(job)
        except BrokenProcessPool:  # a worker was killed while the jobs were still being handed out
            lost.append(job)
    while waiting:
        time.sleep(_POLL)
        for job in [job for job in waiting if futures[job.name].done()]:
            waiting.remove(job)
            error = futures[job.name].exception()
            if isinstance(error, BrokenProcessPool):
                lost.append(job)
            elif error is not None:
                failures[job.name] = error
        shares = {job.name: read_progress(job.folder.path / "progress.json") for job in waiting}
        display.show(total - len(waiting) - len(lost), shares)
    return lost


def _describe_failure(job: Job, error: BaseException, root: Path) -> str:
    path = root / "errors" / (job.folder.place.replace("/", "__") + ".txt")
    write_bytes(path, "".join(traceback.format_exception(error)).encode())
    return f"{job.name} failed: {type(error).__name__}: {error}\n  (the whole traceback: {path})"


def _how_to_go_on(root: Path, report: Path) -> str:
    return (
        f"Everything else is complete and stored under {root}; the report of it is {report}. "
        "When the cause is removed, run the same command again: complete cells are not computed again."
    )


def _workers(asked: int | None, jobs: int, attempt: int) -> int:
    """Return the number of processes; after a worker was killed (perhaps for its memory), fewer of them."""
    if asked is None:
        asked = 1 if _accelerator() else visible_cores()
    return max(1, min(asked, jobs) >> attempt)


def _accelerator() -> bool:
    """Say whether JAX finds an accelerator, without opening it here, where it would keep its memory."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    devices = ("nvidia0", "nvidiactl", "kfd", "accel0", "vfio/0", "dxg")
    if sys.platform != "darwin" and not any(Path("/dev", name).exists() for name in devices):
        return False
    ask = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() != "cpu"


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, never forked: JAX has threads, and a forked copy of a process with threads can hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    """Prepare a worker: leave Ctrl-C to the parent, end when the parent has ended, one processor thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # One thread: the processes share the cores already, and sums do not depend on how many there are.
    single = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    flags = os.environ.get("XLA_FLAGS", "")
    if single not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {single}".strip()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _end(pool: ProcessPoolExecutor) -> None:
    """Take a pool down at once; what its workers have stored stays."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=5)
