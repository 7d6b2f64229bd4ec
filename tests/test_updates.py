"""Updates and seconds to a target; runs that never reach it."""

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis.updates import updates_to_target

RISING = [0.1, 0.5, 0.9, 0.6, 0.8, 0.95, 0.9]


def reached(history, target, **settings):
    found = updates_to_target({"OTTT": history}, target, **{"higher_is_better": True, **settings})
    return [run.updates for run in found.runs]


def test_first_step_by_hand():
    history = [RISING, [0.9, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0.89]]
    np.testing.assert_array_equal(reached(history, 0.9), [2, 0, np.nan])
    np.testing.assert_array_equal(reached(history, 0.1, higher_is_better=False), [0, 1, 0])
    np.testing.assert_array_equal(reached(history, 0.9, steps=[0, 10, 20, 40, 80, 160, 320]), [20, 0, np.nan])


def test_staying_and_smoothing_by_hand():
    np.testing.assert_array_equal(reached([RISING], 0.8), [2])
    np.testing.assert_array_equal(reached([RISING], 0.8, stay=True), [4])
    # Means of two: 0.3, 0.7, 0.75, 0.7, 0.875, 0.925, the first of them after two measurements.
    np.testing.assert_array_equal(reached([RISING], 0.74, smooth=2), [3])
    np.testing.assert_array_equal(reached([RISING], 0.74, smooth=2, stay=True), [5])
    np.testing.assert_array_equal(reached([RISING], 0.8, smooth=7), [np.nan])
    lost = updates_to_target({"OTTT": [[0.1, 0.9, 0.2]]}, 0.9, higher_is_better=True, stay=True)
    assert lost.runs[0].flag == "reached, but lost again within 2 updates"


def test_a_run_that_does_not_get_there_is_not_averaged():
    history = {
        "BPTT": [[0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 1]],
        "SLTT": [[0, 0, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]],
    }
    found = updates_to_target(history, 1.0, higher_is_better=True)
    frame, summary = found.to_frame(), found.summary().set_index("rule")
    late = frame[frame["value"].isna()]
    assert late["flag"].tolist() == ["not reached within 2 updates"] * 3 and late["last"].tolist() == [2.0] * 3
    assert (frame.loc[frame["value"].notna(), "flag"] == "").all()
    # BPTT: 0, 1, 2 and later than 2: the median lies between 1 and 2, whatever the last one is.
    assert summary.loc["BPTT", "value"] == 1.5 and summary.loc["BPTT", ["n_reached", "n"]].tolist() == [3, 4]
    assert summary.loc["BPTT", "value"] != np.mean([0, 1, 2, 2])  # negative control: as if it had got there at last
    assert np.isnan(summary.loc["SLTT", "value"]) and "reached by 2 of 4 runs" in summary.loc["SLTT", "flag"]


def test_medians_equal_those_of_complete_records():
    """Cutting records short may take a median away, but may not change it."""
    rng = np.random.default_rng(0)
    complete = np.cumsum(rng.random((40, 5, 60)) < 0.1, axis=-1)
    kept = 0
    for history in complete:
        truth = np.median([np.argmax(row >= 2) if (row >= 2).any() else np.inf for row in history])
        got = updates_to_target(history[:, :20], 2, higher_is_better=True).summary()["value"][0]
        assert np.isnan(got) or got == truth
        kept += np.isfinite(got)
    assert 10 < kept < 35


def test_a_run_that_ended_early_says_nothing_about_later():
    history = np.array([[0, 0, 0, 1], [0, 0, 0, 1], [0, np.nan, np.nan, np.nan]])
    found = updates_to_target(history, 1, higher_is_better=True)
    assert found.runs[2].last == 0 and "undefined at 3 of 4 measurements" in found.runs[2].flag
    row = found.summary().iloc[0]
    assert np.isnan(row["value"]) and "1 of 3 runs ended before" in row["flag"]
    history[2] = 0  # negative control: followed to the end
    assert updates_to_target(history, 1, higher_is_better=True).summary()["value"][0] == 3
    nothing = updates_to_target([[np.nan, np.inf]], 1, higher_is_better=True)
    assert nothing.runs[0].flag == "undefined throughout" and np.isnan(nothing.summary()["value"][0])


def test_resolution_goes_back_to_the_last_known_value():
    history = [[0, 0, 1, 1], [0, np.nan, np.nan, 1], [1, 1, 1, 1], [0, 1, np.nan, 1]]
    found = updates_to_target(history, 1, higher_is_better=True, steps=[0, 10, 30, 60])
    assert [(run.updates, run.resolution) for run in found.runs] == [(30, 20), (60, 60), (0, 0), (10, 10)]
    late = updates_to_target([[1.0, 1.0]], 1, higher_is_better=True, steps=[100, 200])
    assert late.runs[0].resolution == 100, "the first measurement came late"
    stays = updates_to_target(history[3:], 1, higher_is_better=True, stay=True, steps=[0, 10, 30, 60])
    assert stays.runs[0].updates == 60, "what is undefined did not stay"


def rows(rule, seed, values, steps=(0, 10, 20), **columns):
    base = {"train_rule": rule, "seed": seed, "metric": "accuracy", "layer": "network", "flag": "", **columns}
    return pd.DataFrame([{**base, "step": step, "value": value} for step, value in zip(steps, values, strict=True)])


def test_frames_and_arrays_agree():
    frame = pd.concat([rows("BPTT", 0, [0.1, 0.9, 1.0]), rows("OTTT", 3, [0.1, 0.2, 0.9]), rows("OTTT", 5, [0, 0, 0])])
    other = rows("OTTT", 3, [5.0, 5.0, 5.0], metric="train_loss")
    found = updates_to_target(pd.concat([frame, other]).sample(frac=1, random_state=0), 0.9, higher_is_better=True)
    got = {(run.rule, run.seed): run.updates for run in found.runs}
    assert got.pop(("OTTT", 5)) != got and got == {("BPTT", 0): 10, ("OTTT", 3): 20}
    arrays = updates_to_target({"OTTT": [[0.1, 0.2, 0.9]]}, 0.9, higher_is_better=True, steps=[0, 10, 20])
    assert arrays.runs[0].updates == got["OTTT", 3]
    flagged = rows("SLTT", 0, [0.1, 0.9, 0.9], flag="two outputs are silent")
    found = updates_to_target(flagged, 0.9, higher_is_better=True)
    assert found.runs[0].flag == "undefined throughout: two outputs are silent"
    with pytest.raises(ValueError, match="select one network"):
        updates_to_target(pd.concat([frame, frame]), 0.9, higher_is_better=True)
    with pytest.raises(ValueError, match="the metrics are 'accuracy'"):
        updates_to_target(frame, 0.9, metric="speed", higher_is_better=True)
    with pytest.raises(ValueError, match="no column 'step'"):
        updates_to_target(frame.drop(columns="step"), 0.9, higher_is_better=True)


def test_seconds():
    history = {"BPTT": [[0, 0, 1]], "OTTT": [[0, 0, 1]]}
    found = updates_to_target(history, 1, higher_is_better=True, seconds_per_update={"BPTT": 2.0, "OTTT": 0.5})
    frame = found.to_frame()
    assert frame["value"].tolist() == [4.0, 1.0] and set(frame["metric"]) == {"seconds_to_target"}
    assert found.summary()["value"].tolist() == [4.0, 1.0] and frame["resolution"].tolist() == [2.0, 0.5]
    for wrong in ({"BPTT": 2.0}, 0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="no positive number"):
            updates_to_target(history, 1, higher_is_better=True, seconds_per_update=wrong)


@pytest.mark.parametrize(
    ("history", "settings", "words"),
    [
        ([0.1, 0.9], {}, r"give \[seeds, steps\]"),
        ({}, {}, "no rule"),
        ([[0.1, 0.9]], {"steps": [0, 0]}, "increasing"),
        ([[0.1, 0.9]], {"steps": [0, 1, 2]}, "2 increasing numbers"),
        ([[0.1, 0.9]], {"smooth": 3}, "only 2 measurements"),
        ([[0.1, 0.9]], {"smooth": 0}, "1 for none"),
        ([[0.1, 0.9]], {"target": np.nan}, "not a finite number"),
    ],
)
def test_at_the_door(history, settings, words):
    with pytest.raises(ValueError, match=words):
        updates_to_target(history, **{"target": 0.9, "higher_is_better": True, **settings})


def test_figure(tmp_path):
    from gradlab.report import plots_statistics as plots

    history = {"BPTT": [[0, 0, 1], [0, 1, 1], [0, 0, 0]], "SLTT": [[0, 0, 0], [0, 0, 0], [0, 0, 0]]}
    found = updates_to_target(history, 1, higher_is_better=True)
    found.to_frame().to_csv(tmp_path / "updates.csv", index=False)
    found.summary().to_csv(tmp_path / "summary.csv", index=False)
    stored = plots.updates(pd.read_csv(tmp_path / "updates.csv"), pd.read_csv(tmp_path / "summary.csv"))
    for ax in (found.plot(), stored):
        arrows = [line for line in ax.lines if line.get_marker() == ">"]
        assert [len(line.get_xdata()) for line in arrows] == [1, 3] and set(arrows[1].get_xdata()) == {1.0}
        (points,) = (line for line in ax.lines if line.get_marker() == "o")
        assert points.get_xdata().tolist() == [2, 1]
        (median,) = (line for line in ax.lines if line.get_linewidth() == 3)
        assert median.get_xdata().tolist() == [2, 2]
        labels = [label.get_text() for label in ax.get_yticklabels()]
        assert labels == ["BPTT (2 of 3 reached)", "SLTT (0 of 3 reached)"]
        words = ax.get_figure().legends[0].get_title().get_text()
        assert "target: metric at least 1" in words and "no median: SLTT" in words
