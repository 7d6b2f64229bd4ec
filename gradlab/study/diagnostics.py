"""The diagnostics of a study: why gradients differ and whether it matters.

One job per network and kind, after the network's cells. Most kinds are measured where training with the reference (or,
if it was not trained with, the first rule that was) began and where it ended, for every seed; those that compare the
solutions of different rules, at the end only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from gradlab.study import canonical
from gradlab.study.cells import cell_folder, clock, study_from_json, tree_of
from gradlab.study.diagnostic_kinds import AFTER_TRAINING, KINDS, Setting
from gradlab.study.parts import slug
from gradlab.study.probes import batch_key, is_finite, make_batch
from gradlab.study.progress import Progress
from gradlab.study.provenance import provenance, software
from gradlab.study.spec import Study
from gradlab.study.store import Folder, load_arrays, locked, write_bytes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["diagnostic_folder", "read_diagnostic", "read_frame", "run_diagnostic"]

FILE = "values.csv"


def diagnostic_folder(study: Study, network: str, kind: str, results_dir: str | Path) -> Folder:
    """Return the folder of one kind of diagnostic of one network."""
    place = f"diagnostics/{slug(network)}/{kind}"
    identity = canonical.identity(_only(study, network, kind).to_json())
    return Folder(Path(results_dir) / study.folder, place, identity)


def _only(study: Study, network: str, kind: str) -> Study:
    """The study cut down to what one kind of diagnostic of one network depends on."""
    own = replace(study, title="", profiles={}, landscape=None, diagnostics=(kind,))
    return own.with_network(network)


def run_diagnostic(spec_json: str, network: str, kind: str, results_dir: str) -> str:
    """Compute one kind of diagnostic of one network from its stored cells, and store it.

    Args:
        spec_json: the canonical JSON of the study.
        network: the name of the network, all of whose cells are complete.
        kind: one of `KINDS`.
        results_dir: the results folder of all studies.

    Returns:
        The diagnostic's folder; it holds `values.csv`.
    """
    study = study_from_json(spec_json)
    folder = diagnostic_folder(study, network, kind, results_dir)
    with locked(folder):
        if not folder.done():
            _compute(study, network, kind, folder, results_dir)
    return str(folder.path)


def read_diagnostic(folder: Folder) -> pd.DataFrame:
    """Read what `run_diagnostic` stored."""
    return read_frame(folder.path / FILE)


def read_frame(path: Path) -> pd.DataFrame:
    """Read a stored frame of any analysis: empty text stays empty text, empty numbers are NaN."""
    import pandas as pd

    columns = pd.read_csv(path, nrows=0).columns
    text = {name: str for name in columns if name in _TEXT}
    numbers = {name: [""] for name in columns if name not in _TEXT}
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=numbers)  # type: ignore[arg-type]


_TEXT = (
    "study", "network", "train_rule", "rule", "other", "other_rule", "layer", "other_layer", "metric", "flag", "note",
    "kind", "data", "path",
)  # fmt: skip


def _compute(study: Study, network: str, kind: str, folder: Folder, results_dir: str) -> None:
    import pandas as pd

    started = time.time()
    folder.begin(_only(study, network, kind).to_json(), software())
    settings = list(_settings(study, network, kind, results_dir))
    progress = Progress(folder.path / "progress.json", len(settings))
    parts = []
    for number, setting in enumerate(settings, start=1):
        frame = KINDS[kind](setting)
        where = {"study": study.name, "network": network, "train_rule": setting.train_rule}
        frame = frame.drop(columns=[name for name in where if name in frame])
        parts.append(frame.assign(**where, seed=setting.seed, at=setting.step))
        progress(number, len(settings))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"value": []})
    write_bytes(folder.path / FILE, table.to_csv(index=False, lineterminator="\n").encode())
    times = {"started": clock(started), "ended": clock(time.time()), "seconds": time.time() - started}
    folder.finish({"study": study.name, "network": network, "kind": kind, "times": times, "provenance": provenance()})


def _settings(study: Study, network: str, kind: str, results_dir: str) -> Iterator[Setting]:
    """Every seed at the beginning and the end of training with the reference, as far as its parameters are finite."""
    solutions = {
        cell.train_rule: tree_of(load_arrays(cell_folder(study, cell, results_dir).path / "arrays.npz"), "params")
        for cell in study.cells()
        if cell.network == network
    }
    centre = study.reference.name if study.reference.name in solutions else next(iter(solutions))
    net = study.networks[network]
    for place, seed in enumerate(study.seeds):
        batch = make_batch(study, network, batch_key("diagnostics", seed), study.batch_size)
        finals = {name: jax.tree.map(lambda leaf, i=place: leaf[i], tree) for name, tree in solutions.items()}
        first = net.init(jax.random.fold_in(jax.random.key(seed), 0), batch.inputs)
        steps = {study.iterations: finals[centre]} if kind in AFTER_TRAINING else {0: first}
        steps |= {study.iterations: finals[centre]}
        finite = {name: tree for name, tree in finals.items() if is_finite(tree)}
        for step, params in steps.items():
            if is_finite(params):
                yield Setting(study, network, centre, seed, step, params, batch, finite)
