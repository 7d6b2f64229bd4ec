"""From stored cells to tables, figures and one report. All numbers in them come from the stored results."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradlab.study import appendix, atlas_section, diagnostics_section, sections, statistics_section
from gradlab.study.cells import cell_folder, manifest_of
from gradlab.study.diagnostics import diagnostic_folder, read_diagnostic
from gradlab.study.parts import StudyError
from gradlab.study.rows import REFUSED, read_rows
from gradlab.study.spec import Cell, Study
from gradlab.study.surfaces import landscape_folder

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Results", "load_results", "write_summary"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Results:
    """All that is stored of a study.

    Attributes:
        study: the study.
        frame: the rows of all complete cells, refusals left out.
        refusals: one row per rule that was not compared: train_rule, rule, reason.
        cells: the complete cells.
        missing: names of cells that are not complete.
        manifests: cell name -> manifest.
        landscapes: network -> {plane: Landscape}.
        centres: network -> the training rule at the end of whose path the landscapes have their origin.
        diagnostics: network -> {kind: frame}.
        root: the study's results folder.
        figures: the study's folder of figures.
    """

    study: Study
    frame: pd.DataFrame
    refusals: pd.DataFrame
    cells: tuple[Cell, ...]
    missing: tuple[str, ...]
    manifests: dict[str, dict[str, Any]]
    landscapes: dict[str, dict[str, Any]]
    centres: dict[str, str]
    diagnostics: dict[str, dict[str, pd.DataFrame]]
    root: Path
    figures: Path


def load_results(study: Study, results: Path, figures: Path) -> Results:
    """Read what is stored of a study.

    Raises:
        StudyError: no cell is complete.
    """
    from gradlab.analysis.landscape import Landscape

    folders = {cell: cell_folder(study, cell, results) for cell in study.cells()}
    done = tuple(cell for cell, folder in folders.items() if folder.done())
    if not done:
        raise StudyError(f"No cell of study {study.name!r} is complete under {results}: there is nothing to report.")
    frame = read_rows(folders[cell].path / "metrics.csv" for cell in done)
    refused = frame["metric"] == REFUSED
    refusals = frame[refused].drop_duplicates(["network", "rule", "flag"])[["network", "rule", "flag"]]
    landscapes: dict[str, dict[str, Any]] = {}
    centres: dict[str, str] = {}
    for network in sorted(study.networks):
        folder = landscape_folder(study, network, results)
        if study.landscape is not None and folder.done():
            planes = {kind: Landscape.load(folder.path / f"{kind}.npz") for kind in study.landscape.planes}
            landscapes[network] = planes
            centres[network] = manifest_of(folder)["centre"]
    return Results(
        study,
        frame[~refused].reset_index(drop=True),
        refusals.rename(columns={"flag": "reason"}).reset_index(drop=True),
        done,
        tuple(cell.name for cell in folders if cell not in done),
        {cell.name: manifest_of(folders[cell]) for cell in done},
        landscapes,
        centres,
        _diagnostics(study, results),
        results / study.folder,
        figures / study.folder,
    )


def _diagnostics(study: Study, results: Path) -> dict[str, dict[str, pd.DataFrame]]:
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for network in sorted(study.networks):
        folders = {kind: diagnostic_folder(study, network, kind, results) for kind in study.diagnostics}
        frames = {kind: read_diagnostic(folder) for kind, folder in folders.items() if folder.done()}
        if frames:
            found[network] = frames
    return found


def write_summary(study: Study, results: Path, figures: Path) -> Path:
    """Write tables (CSV, Markdown, LaTeX), figures (PDF, PNG) and `report.html` from the stored results.

    Args:
        study: the study, with its profile chosen.
        results: folder for the numbers of all studies.
        figures: folder for the figures of all studies.

    Returns:
        The report's file, `<results>/<study>/report.html`.

    Raises:
        StudyError: no cell is complete.
    """
    from gradlab.report import html, style

    found = load_results(study, results, figures)
    logger.info("Drawing tables, figures and the report from the stored results.")
    with style.style("nature", columns=2):
        parts = [
            sections.what_was_run(found),
            sections.similarity(found),
            atlas_section.atlas(found),
            sections.training(found),
            statistics_section.statistics(found),
            sections.landscapes(found),
            diagnostics_section.diagnostics(found),
            appendix.health(found),
            appendix.refusals(found),
            appendix.how_to_rerun(found, json.dumps(json.loads(study.to_json()), indent=1, ensure_ascii=False)),
        ]
    profile = "" if study.profile == "default" else f" (profile {study.profile})"
    return html.write_report(
        found.root / "report.html",
        (study.title or study.name) + profile,
        [part for part in parts if part is not None],
        subtitle=f"Study {study.name}: gradients of {len(study.compared)} learning rules against "
        f"{study.reference.name}",
        provenance=appendix.provenance_facts(found),
    )
