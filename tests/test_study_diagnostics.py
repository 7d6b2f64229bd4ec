"""Diagnostics of a study: measured from stored parameters, stored, and drawn in the report."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest
from study_parts import tiny

import gradlab as gl
from gradlab.report.style import style
from gradlab.study import StudyError
from gradlab.study.cells import cell_folder, run_cell, tree_of
from gradlab.study.diagnostic_kinds import AFTER_TRAINING, KINDS
from gradlab.study.diagnostics import diagnostic_folder, read_diagnostic, run_diagnostic
from gradlab.study.diagnostics_section import DRAWINGS, diagnostics
from gradlab.study.probes import batch_key, make_batch
from gradlab.study.statistics_section import statistics
from gradlab.study.store import load_arrays
from gradlab.study.summary import load_results

MEASURED = ("attribution", "updates", "health", "between")


@pytest.fixture(scope="module")
def study():
    return tiny(diagnostics=MEASURED, landscape=None, spot_checks=(), profiles={}, iterations=3, probes=2)


@pytest.fixture(scope="module")
def results(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for cell in study.cells():
        run_cell(study.to_json(), cell.index, str(folder))
    for kind in MEASURED:
        run_diagnostic(study.to_json(), "lif-5", kind, str(folder))
    return folder


def stored(study, results, kind):
    return read_diagnostic(diagnostic_folder(study, "lif-5", kind, results))


def test_what_is_stored_is_what_the_analysis_gives(study, results):
    """From the cell's final parameters and the seed's batch, by hand."""
    frame = stored(study, results, "attribution")
    assert set(frame["at"]) == {0, 3} and set(frame["seed"]) == {0, 1} and set(frame["train_rule"]) == {"BPTT"}
    cell = next(cell for cell in study.cells() if cell.train_rule == "BPTT")
    params = tree_of(load_arrays(cell_folder(study, cell, results).path / "arrays.npz"), "params")
    last = jax.tree.map(lambda leaf: leaf[1], params)
    batch = make_batch(study, "lif-5", batch_key("diagnostics", 1), study.batch_size)
    for rule in (gl.rules.SLTT(), gl.rules.OSTL()):
        found = gl.analysis.attribute(rule, study.networks["lif-5"], last, batch, study.loss)
        rows = frame.query("kind == 'ladder' and metric == 'cosine' and layer == 'layer_0' and at == 3 and seed == 1")
        rows = rows[rows["rule"] == rule.name]
        rungs = [found.metric(found.paths[:k], "cosine", "layer_0") for k in range(len(found.paths) + 1)]
        np.testing.assert_allclose(rows["value"], rungs, rtol=1e-5, atol=1e-6)
    other = frame.query("kind == 'ladder' and at == 3 and seed == 0 and rule == 'SLTT' and layer == 'layer_0'")
    mine = frame.query("kind == 'ladder' and at == 3 and seed == 1 and rule == 'SLTT' and layer == 'layer_0'")
    assert not np.allclose(other["value"], mine["value"])  # another seed has other parameters


def test_text_stays_text_and_undefined_stays_undefined(study, results):
    frame = stored(study, results, "health")
    assert pd.api.types.is_float_dtype(frame["value"]) and (frame["rule"] == "").all()
    assert frame["value"].isna().eq(frame["flag"] != "").all()
    between = stored(study, results, "between")
    assert set(between["at"]) == {3} and set(between["other"]) == {"SLTT"} and between["t"].notna().any()


def test_each_kind_has_a_folder_and_an_identity_of_its_own(study, results):
    path = diagnostic_folder(study, "lif-5", "health", results)
    assert path.done()
    before = (path.path / "values.csv").read_bytes()
    run_diagnostic(study.to_json(), "lif-5", "health", str(results))
    assert (path.path / "values.csv").read_bytes() == before
    more = dataclasses.replace(study, diagnostics=(*MEASURED, "lags"))
    assert diagnostic_folder(more, "lif-5", "health", results).done()  # another kind does not make it anew
    assert not diagnostic_folder(more, "lif-5", "lags", results).done()
    longer = dataclasses.replace(study, iterations=4)
    assert not diagnostic_folder(longer, "lif-5", "health", results).done()
    cell = study.cells()[0]
    assert more.only(cell).to_json() == dataclasses.replace(study, diagnostics=()).only(cell).to_json()


def test_the_report_draws_what_is_stored(study, results, tmp_path):
    found = load_results(study, results, tmp_path)
    assert set(found.diagnostics["lif-5"]) == set(MEASURED)
    with style("nature", columns=2):
        section, sure = diagnostics(found), statistics(found)
    drawn = {path.stem for path in (tmp_path / study.folder).glob("*.png")}
    assert {"shares-lif-5-0", "shares-lif-5-3", "ladder-lif-5-3", "rates-lif-5-3", "between-lif-5-3"} <= drawn
    assert {"intervals", "improvement"} <= drawn and sure is not None and "between-lif-5-0" not in drawn
    (part,) = [block for block in section.blocks if not isinstance(block, str)]
    captions = [block.caption for block in part.blocks if not isinstance(block, str)]
    assert len(captions) == 11 and all(caption.startswith(("Before training", "After 3")) for caption in captions)
    none = dataclasses.replace(found, diagnostics={})
    assert diagnostics(none) is None


def test_every_kind_is_drawn_and_unknown_ones_are_refused():
    assert {drawing.kind for drawing in DRAWINGS} == set(KINDS) and set(AFTER_TRAINING) <= set(KINDS)
    with pytest.raises(StudyError, match=r"Study\.diagnostics holds 'lag': choose from attribution, lags"):
        tiny(diagnostics=("lag",))
    with pytest.raises(StudyError, match=r"give a tuple of names"):
        tiny(diagnostics="lags")
    with pytest.raises(StudyError, match=r"a name stands there twice"):
        tiny(diagnostics=("lags", "lags"))
