"""The loss landscape of a study: one job per network, after its cells, from their stored training paths."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradlab.study import canonical
from gradlab.study.cells import cell_folder, clock, study_from_json, tree_of
from gradlab.study.parts import StudyError, slug
from gradlab.study.probes import batch_key, make_batch
from gradlab.study.progress import Progress
from gradlab.study.provenance import provenance, software
from gradlab.study.spec import Study
from gradlab.study.store import Folder, load_arrays, locked

__all__ = ["landscape_folder", "run_landscape"]


def landscape_folder(study: Study, network: str, results_dir: str | Path) -> Folder:
    """Return the folder of one network's landscapes."""
    identity = canonical.identity(_only(study, network).to_json())
    return Folder(Path(results_dir) / study.folder, f"landscape/{slug(network)}", identity)


def run_landscape(spec_json: str, network: str, results_dir: str) -> str:
    """Compute the loss landscapes of one network from its stored cells, and store them.

    Args:
        spec_json: the canonical JSON of the study.
        network: the name of the network, all of whose cells are complete.
        results_dir: the results folder of all studies.

    Returns:
        The landscape's folder; it holds one `<plane>.npz` for each plane that the study asks for.
    """
    study = study_from_json(spec_json)
    folder = landscape_folder(study, network, results_dir)
    with locked(folder):
        if not folder.done():
            _compute(study, network, folder, results_dir)
    return str(folder.path)


def _only(study: Study, network: str) -> Study:
    return replace(study, title="", profiles={}, diagnostics=()).with_network(network)


def _compute(study: Study, network: str, folder: Folder, results_dir: str) -> None:
    from gradlab.analysis.landscape import landscape, loss_function

    started = time.time()
    spec = study.landscape
    if spec is None:
        raise StudyError(f"Study {study.name!r} asks for no landscape.")
    folder.begin(_only(study, network).to_json(), software())
    paths = _paths(study, network, results_dir)
    centre = study.reference.name if study.reference.name in paths else next(iter(paths))
    origin = jax.tree.map(lambda leaf: leaf[-1], paths[centre])
    batch = make_batch(study, network, batch_key("test batch", study.seeds[0]), spec.samples)
    loss = loss_function(study.networks[network], batch, study.loss)
    progress = Progress(folder.path / "progress.json", len(spec.planes))
    for number, kind in enumerate(spec.planes, start=1):
        plane = _plane(kind, paths, origin, study.seeds[0])
        drawn = landscape(loss, plane, paths, points=spec.points, margin=spec.margin)
        drawn.save(folder.path / f"{kind}.npz")
        progress(number, len(spec.planes))
    folder.finish(
        {
            "study": study.name,
            "network": network,
            "seed": study.seeds[0],
            "centre": centre,
            "planes": list(spec.planes),
            "times": {
                "started": clock(started),
                "ended": clock(time.time()),
                "seconds": time.time() - started,
            },
            "provenance": provenance(),
        }
    )


def _paths(study: Study, network: str, results_dir: str) -> dict[str, Any]:
    """Return the training path of each rule: parameters of the first seed, leading axis probes."""
    paths = {}
    for cell in study.cells():
        if cell.network == network:
            arrays = load_arrays(cell_folder(study, cell, results_dir).path / "arrays.npz")
            paths[cell.train_rule] = _finite(tree_of(arrays, "trajectory"))
    return paths


def _finite(path: Any) -> Any:
    """Return the part of a path before the first parameter that is not a finite number."""
    leaves = jax.tree.leaves(path)
    good = np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves], axis=0)
    end = len(good) if good.all() else int(np.argmin(good))
    return jax.tree.map(lambda leaf: leaf[:end], path)


def _plane(kind: str, paths: dict[str, Any], origin: Any, seed: int) -> Any:
    from gradlab.analysis.landscape import pca_plane, random_plane

    if kind == "pca":
        return pca_plane(paths, origin)
    return random_plane(origin, batch_key("random plane", seed))
