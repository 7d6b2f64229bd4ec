"""Timing in turns, within a time budget, for `gpu.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

Action = Callable[[], Any]


class OutOfTimeError(Exception):
    """The section's time is used up."""


class Clock:
    """The time that a section has, and the timing of programs within it."""

    def __init__(self, seconds: float, per_case: float):
        self.end = time.monotonic() + seconds
        self.per_case = per_case

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def require(self, seconds: float = 0.0) -> None:
        """Raise OutOfTimeError unless that many seconds are left."""
        if self.left <= seconds:
            raise OutOfTimeError

    def times(self, actions: dict[str, Action]) -> dict[str, list[float]]:
        """Seconds of every action in every round, all actions in turns; the first two calls are left out.

        Short actions are called several times in a row, so that the host's part is hidden as in real use.
        """
        if not actions:
            return {}
        repeats = {}
        for name, action in actions.items():
            jax.block_until_ready(action())
            once = _seconds(action, 1)
            repeats[name] = max(1, min(20, int(0.005 / max(once, 1e-9))))
        found: dict[str, list[float]] = {name: [] for name in actions}
        begin = time.monotonic()
        while len(next(iter(found.values()))) < 30:
            for name, action in actions.items():
                found[name].append(_seconds(action, repeats[name]) / repeats[name])
            enough = len(next(iter(found.values()))) >= 3
            if enough and (time.monotonic() - begin > self.per_case or self.left < 0):
                break
        return found


def _seconds(action: Action, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        result = action()
    jax.block_until_ready(result)
    return time.perf_counter() - begin


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Per program: the median time in ms, and the median over rounds of its ratio to the base of the same round."""
    found = {name: {"ms": 1e3 * statistics.median(own)} for name, own in times.items()}
    for name, own in times.items() if base in times else ():
        found[name][f"over {base}"] = statistics.median(a / b for a, b in zip(own, times[base], strict=True))
    return found


def buildable(clock: Clock, builders: dict[str, Callable[[], Action]], failures: dict[str, str]) -> dict[str, Action]:
    """The actions that can be built in time and run once; the others' errors go into `failures`."""
    actions = {}
    for name, build in builders.items():
        try:
            clock.require()
            action = build()
            jax.block_until_ready(action())
            actions[name] = action
        except OutOfTimeError:
            failures[name] = "skipped: time"
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:400]
    return actions


def cases(clock: Clock, given: Sequence[Any], run: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Every case's row; one that fails says why, and one that would take too long, by the last one, is skipped."""
    rows: list[dict[str, Any]] = []
    last = 0.0
    for case in given:
        begin = time.monotonic()
        try:
            clock.require(last)
            rows.append({"case": case, **run(case)})
        except OutOfTimeError:
            rows.append({"case": case, "skipped": "time"})
            continue
        except Exception as error:
            rows.append({"case": case, "error": f"{type(error).__name__}: {error}"[:2000]})
        last = time.monotonic() - begin
    return rows
