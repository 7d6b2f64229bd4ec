"""Means and intervals over seeds."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gradlab.analysis.similarity import NO_REASON, cosines, paired_difference, summarise, tidy


def frame(values, metric="cosine", flags=None, **columns):
    rows = {
        "study": "s",
        "cell": "c",
        "network": "n",
        "train_rule": "BPTT",
        "step": 0,
        "rule": "OTTT",
        "layer": "layer_0",
    }
    n = len(values)
    return pd.DataFrame(
        {**rows, **columns, "seed": range(n), "metric": metric, "value": values, "flag": flags or [""] * n}
    )


def test_student_interval():
    values = [0.2, 0.5, 0.3]
    row = summarise(frame(values)).iloc[0]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert row["mean"] == pytest.approx(np.mean(values)) and row["n"] == 3 and row["method"] == "t"
    assert (row["low"], row["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    narrow = summarise(frame(values), level=0.5).iloc[0]
    assert narrow["high"] - narrow["low"] < 0.3 * (row["high"] - row["low"])


def test_student_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2000, 3))
    table = pd.concat([frame(v, metric="slope", step=i) for i, v in enumerate(draws)])
    table = summarise(table)
    covered = ((table["low"] < 0) & (table["high"] > 0)).mean()
    assert covered == pytest.approx(0.95, abs=0.015)
    spread = draws.max(axis=1) * draws.min(axis=1) < 0  # negative control: what a bootstrap of three seeds amounts to
    assert spread.mean() < 0.8


def test_undefined_values_are_counted_and_explained_never_averaged():
    data = frame([0.5, np.nan, 0.7, 9.0, np.nan], flags=["", "layer_0 is silent", "", "layer_0 is silent", ""])
    row = summarise(data).iloc[0]
    assert row["mean"] == pytest.approx(0.6) and (row["n"], row["n_undefined"]) == (2, 3)
    assert row["reason"] == f"layer_0 is silent; {NO_REASON}"
    assert summarise(frame([0.5, 0.7])).iloc[0][["n_undefined", "reason"]].tolist() == [0, ""]
    none = summarise(frame([np.nan] * 3, flags=["dead"] * 3)).iloc[0]
    assert np.isnan(none["mean"]) and np.isnan(none["low"]) and none["n"] == 0 and none["reason"] == "dead"


def test_one_seed_has_no_interval():
    row = summarise(frame([0.5])).iloc[0]
    assert row["mean"] == 0.5 and np.isnan(row["low"]) and np.isnan(row["high"])


def test_interval_ends_where_the_metric_ends():
    values = [0.9, 0.99, 1.0]
    assert summarise(frame(values)).iloc[0]["high"] == 1.0
    assert summarise(frame(values, metric="slope")).iloc[0]["high"] > 1.0  # negative control


def test_rows_of_one_seed_are_not_taken_for_independent():
    data = pd.concat([frame([0.1, 0.2], step=0), frame([0.3, 0.4], step=10)])
    assert len(summarise(data)) == 2
    with pytest.raises(ValueError, match="add 'step' to `by`"):
        summarise(data, by=["rule", "metric"])
    with pytest.raises(ValueError, match="drop the copies"):
        summarise(pd.concat([data, data]))


def test_bootstrap_needs_seeds_and_is_reproducible():
    rng = np.random.default_rng(1)
    many, few = (
        frame(rng.normal(size=40), metric="slope"),
        frame([1.0, 2.0, 4.0], metric="slope", rule="SLTT"),
    )
    table = summarise(pd.concat([many, few]), method="bootstrap")
    assert table["method"].tolist() == ["bootstrap", "t"]
    student = summarise(pd.concat([many, few]))
    assert table.loc[0, "low"] == pytest.approx(student.loc[0, "low"], abs=0.05)
    assert table.loc[0, "low"] != student.loc[0, "low"] and table.loc[1, "low"] == student.loc[1, "low"]
    pd.testing.assert_frame_equal(table, summarise(pd.concat([many, few]), method="bootstrap"))
    other = summarise(pd.concat([many, few]), by=["rule"], method="bootstrap", seed=5)
    assert other.loc[0, "low"] != table.loc[0, "low"]


def test_paired_difference_is_narrower_than_the_parts():
    rng = np.random.default_rng(2)
    common = rng.normal(size=6)
    data = pd.concat([
        frame(common, metric="slope", rule="BPTT"),
        frame(common + 0.1 + 1e-3 * rng.normal(size=6), metric="slope", rule="OTTT"),
    ])  # fmt: skip
    row = paired_difference(data, "BPTT").iloc[0]
    assert row["rule"] == "OTTT" and row["metric"] == "slope" and row["low"] < 0.1 < row["high"]
    alone = summarise(data).iloc[0]
    assert row["high"] - row["low"] < 0.01 * (alone["high"] - alone["low"])


def test_paired_difference_pairs_by_seed_and_keeps_reasons():
    left, right = frame([0.1, 0.2, 0.3], rule="BPTT"), frame([0.5, 0.6, 0.7])
    shuffled = pd.concat([left, right.iloc[[2, 0, 1]]])
    row = paired_difference(shuffled, "BPTT").iloc[0]
    assert row["mean"] == pytest.approx(0.4) and row["high"] == pytest.approx(0.4)
    lacking = pd.concat([left.iloc[:2], right])
    row = paired_difference(lacking, "BPTT").iloc[0]
    assert (row["n"], row["n_undefined"]) == (2, 1) and "BPTT: it was not measured" in row["reason"]
    # A difference is not a cosine: its interval is not cut at -1 and 1.
    assert (
        paired_difference(pd.concat([frame([-1, -1, 0.9], rule="BPTT"), frame([1, 1, 0.0])]), "BPTT").iloc[0]["high"]
        > 1
    )
    with pytest.raises(ValueError, match="'OSTL'"):
        paired_difference(shuffled, "OSTL")


def test_training_metrics_pair_over_training_rules():
    data = pd.concat([
        frame([0.9, 0.8], metric="accuracy", rule="", layer="network", cell="1"),
        frame([0.7, 0.5], metric="accuracy", rule="", layer="network", cell="2", train_rule="OTTT"),
    ])  # fmt: skip
    row = paired_difference(data, "BPTT", column="train_rule").iloc[0]
    assert row["train_rule"] == "OTTT" and row["mean"] == pytest.approx(-0.25)


def test_tidy_mends_what_csv_does_to_empty_text(tmp_path):
    data = frame([0.9, 0.8], metric="accuracy", rule="")
    data.to_csv(tmp_path / "metrics.csv", index=False)
    read = pd.read_csv(tmp_path / "metrics.csv")
    assert read["rule"].isna().all()
    row = summarise(read).iloc[0]
    assert row["rule"] == "" and row["n"] == 2
    with pytest.raises(ValueError, match="'metric'"):
        tidy(data.drop(columns="metric"))
    with pytest.raises(ValueError, match="no rows"):
        tidy(data.iloc[:0])


def test_cosines_of_a_gram_matrix():
    vectors = np.random.default_rng(0).normal(size=(3, 5)) * [[1.0], [2e-150], [3e150]]
    vectors = np.vstack([vectors, np.zeros(5)])
    got = cosines(vectors @ vectors.T)
    unit = vectors[:3] / np.abs(vectors[:3]).max(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(got[:3, :3], unit @ unit.T, rtol=1e-12)
    assert np.isnan(got[3]).all() and np.isnan(got[:, 3]).all()
    with pytest.raises(ValueError, match="square"):
        cosines(np.ones((2, 3)))
