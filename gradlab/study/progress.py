"""Progress: workers write small files, the parent reads them and shows one line."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

__all__ = ["Display", "Progress", "read_progress"]

logger = logging.getLogger(__name__)


class Progress:
    """Written by a worker: how many of the training steps of its cell are done.

    Args:
        path: the file to write.
        total: the number of training steps.
        every: seconds between two writes, at least.
    """

    def __init__(self, path: Path, total: int, every: float = 0.3) -> None:
        self.path, self.total, self.every = path, total, every
        self.last = -float("inf")
        self(0, total)

    def __call__(self, done: int, total: int) -> None:
        """Note that `done` of `total` steps are done."""
        now = time.monotonic()
        if now - self.last < self.every and done < total:
            return
        self.last = now
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"done": int(done), "total": int(total)}))
        os.replace(temporary, self.path)


def read_progress(path: Path) -> float | None:
    """Return the share that is done, or None where nothing was written yet."""
    try:
        found = json.loads(path.read_text())
        return min(1.0, found["done"] / max(found["total"], 1))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Display:
    """Shown by the parent: a bar in a terminal, else a line every `every` seconds.

    Args:
        total: number of jobs, those that were complete before included.
        what: what the jobs are, in the plural.
        every: seconds between two lines when the output is not a terminal.
    """

    def __init__(self, total: int, what: str, every: float = 15.0) -> None:
        self.total, self.what, self.every = total, what, every
        self.started = time.monotonic()
        self.first: float | None = None
        self.last_line = self.started
        terminal = sys.stderr.isatty()
        layout = "{desc} {percentage:3.0f}% |{bar:20}|{postfix}"
        self.bar: tqdm | None = None
        if terminal:
            self.bar = tqdm(total=1.0, desc=what, bar_format=layout, leave=False, dynamic_ncols=True)

    def show(self, done: int, shares: Mapping[str, float | None]) -> None:
        """Show the state.

        Args:
            done: jobs that have ended, those that were complete before included.
            shares: name of each job that is not done -> the share of it that is done, None if it has not
                begun.
        """
        running = {name: share for name, share in shares.items() if share is not None}
        overall = (done + sum(running.values())) / max(self.total, 1)
        # The time left is estimated from this run's own pace, not from what an earlier run has left.
        self.first = overall if self.first is None else self.first
        elapsed, gained = time.monotonic() - self.started, overall - self.first
        left = _duration(elapsed * (1 - overall) / gained) + " left" if gained > 0.005 else "time left not known yet"
        names = ", ".join(f"{name} {share:.0%}" for name, share in running.items()) or "starting"
        text = f"{done} of {self.total} done; {left}; {names}"
        if self.bar is not None:
            self.bar.n = overall
            self.bar.set_postfix_str(text)
        elif time.monotonic() - self.last_line >= self.every:
            self.last_line = time.monotonic()
            logger.info("[%s] %s: %s", _duration(elapsed), self.what, text)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
