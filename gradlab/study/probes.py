"""What is measured at a probe: for every seed, the rules on one batch, and the network on a held-out one."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradlab.study import rows
from gradlab.study.spec import Cell, Study
from gradlab.study.store import Folder, load_arrays, write_bytes, write_npz

__all__ = ["Prober", "batch_key", "is_finite", "make_batch", "place", "probe_file"]

_DIVERGED = "training diverged before this step: the parameters are not finite numbers"


def batch_key(purpose: str, *numbers: int) -> jax.Array:
    """Return a random key that depends on what it is for and on the numbers, and on nothing else.

    Not on the training rule: all cells see the same batches (common random numbers).
    """
    key = jax.random.key(zlib.crc32(purpose.encode()))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def make_batch(study: Study, network: str, key: jax.Array, size: int) -> Any:
    """Return a batch of a network's task, compiled once per task and size where the task is hashable."""
    task = study.task_of(network)
    try:
        hash(task)
    except TypeError:
        return task.batch(key, size)
    return _compiled_batch(task, key, size)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _compiled_batch(task: Any, key: jax.Array, size: int) -> Any:
    return task.batch(key, size)


def place(study: Study, cell: Cell, seed: int, step: int) -> dict[str, Any]:
    """Return the columns that say where a row belongs."""
    where = {"study": study.name, "cell": cell.name, "network": cell.network, "train_rule": cell.train_rule}
    return {**where, "seed": seed, "step": step}


def probe_file(folder: Folder, step: int) -> Path:
    """Return the file of a probe's rows; beside it lies an npz file with its Gram matrices."""
    return folder.path / "probes" / f"{step:09d}.csv"


class Prober:
    """Called by training with each seed's parameters; stores the numbers at once, each file by rename."""

    def __init__(self, study: Study, cell: Cell, folder: Folder) -> None:
        self.study, self.cell, self.folder = study, cell, folder
        self.net = study.networks[cell.network]

    def __call__(self, step: int, params_per_seed: Sequence[Any]) -> None:
        """Measure at training step `step`."""
        found: list[rows.Row] = []
        grams: list[dict[str, np.ndarray]] = []
        for seed, params in zip(self.study.seeds, params_per_seed, strict=True):
            if is_finite(params):
                measured, gram = self._measure(params, seed, step)
            else:
                measured, gram = self._undefined()
            where = place(self.study, self.cell, seed, step)
            found += [{**where, **row} for row in measured]
            grams.append(gram)
        file = probe_file(self.folder, step)
        stacked = {name: np.stack([gram[name] for gram in grams]) for name in grams[0] if name != "rules"}
        write_npz(file.with_suffix(".npz"), {"rules": grams[0]["rules"], **stacked})
        write_bytes(file, rows.rows_to_csv(found, header=False))

    def _measure(self, params: Any, seed: int, step: int) -> tuple[list[rows.Row], dict[str, np.ndarray]]:
        batch = make_batch(self.study, self.cell.network, batch_key("probe batch", seed, step), self.study.batch_size)
        comparison = self._compare(params, batch, list(self.study.rules), seed, step)
        spots = self._spot_checks(params, seed, step) if step in (0, self.study.iterations) else iter(())
        measured = [*rows.comparison_rows(comparison), *spots, *self._test(params, seed)]
        gram = {f"gram/{path}": np.asarray(matrix) for path, matrix in comparison.gram.items()}
        return measured, {"rules": np.array(list(comparison.rules)), **gram}

    def _compare(self, params: Any, batch: Any, rules: list[Any], seed: int, step: int) -> Any:
        import gradlab as gl

        study, key = self.study, batch_key("noise of the estimators", seed, step)
        found = gl.compare(
            self.net,
            params,
            batch,
            study.loss,
            rules=rules,
            key=key,
            reference=study.reference,
            skip_unsupported=True,
        )
        if found.rules[0] != study.reference.name:
            raise RuntimeError(
                f"the comparison was made with {found.rules[0]}, not with the reference {study.reference.name}"
            )
        return found

    def _spot_checks(self, params: Any, seed: int, step: int) -> Iterator[rows.Row]:
        for check in self.study.spot_checks:
            batch = make_batch(self.study, self.cell.network, batch_key("spot check", seed, step), check.samples)
            found = self._compare(params, batch, [check.rule], seed, step)
            shown = f"{check.rule.name}(samples={check.samples})"
            yield from rows.comparison_rows(found, {check.rule.name: shown})

    def _test(self, params: Any, seed: int) -> Iterator[rows.Row]:
        import gradlab as gl

        # One held-out batch per seed, the same for all rules and steps: differences between rules are paired.
        batch = make_batch(self.study, self.cell.network, batch_key("test batch", seed), self.study.test_size)
        measured = gl.evaluate(self.net, params, batch, self.study.loss)
        yield from rows.training_rows(measured, {"loss": "test_loss"})

    def _undefined(self) -> tuple[list[rows.Row], dict[str, np.ndarray]]:
        """Return the rows of a seed whose training diverged: everything undefined, with the reason."""
        first = load_arrays(probe_file(self.folder, 0).with_suffix(".npz"))
        gram = {name: np.full(array.shape[1:], np.nan) for name, array in first.items() if name != "rules"}
        metrics = [(rule, name) for rule in first["rules"] for name in ("cosine", "norm_ratio", "relative_error")]
        metrics += [("", name) for name in ("test_loss", "accuracy")]
        undefined = {"layer": "network", "value": math.nan, "flag": _DIVERGED}
        measured = [{**undefined, "rule": str(rule), "metric": metric} for rule, metric in metrics]
        return measured, {"rules": first["rules"], **gram}


def is_finite(params: Any) -> bool:
    """Say whether all parameters are finite numbers."""
    return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(params))
