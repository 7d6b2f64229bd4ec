"""Scores from tidy frames, the table of rules, and their figures."""

import numpy as np
import pandas as pd
import pytest

from gradlab.analysis import statistics
from gradlab.analysis.statistics import (
    bootstrap_difference,
    collect_scores,
    interquartile_mean,
    paired_differences,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
    summary_table,
)


def frame(scores, flags=None, metric="accuracy", step=10, **columns):
    """Rows of {(rule, task): [value per seed]}; `flags` by (rule, task, seed)."""
    rows = []
    for (rule, task), values in scores.items():
        for seed, value in enumerate(values):
            flag = (flags or {}).get((rule, task, seed), "")
            row = {"network": task, "train_rule": rule, "rule": "", "seed": seed, "step": step, "layer": "network"}
            rows.append({**row, "metric": metric, "value": value, "flag": flag, **columns})
    return pd.DataFrame(rows)


def normal(rules=("BPTT", "OTTT"), tasks=("small", "large"), seeds=10, shift=-0.03):
    rng = np.random.default_rng(0)
    common = {task: rng.normal(0.8, 0.03, seeds) for task in tasks}
    return {
        (rule, task): common[task] + shift * i + 0.01 * rng.normal(size=seeds)
        for i, rule in enumerate(rules)
        for task in tasks
    }


def test_table_says_what_the_arrays_say():
    data = normal()
    bptt, ottt = (np.stack([data[rule, task] for task in ("small", "large")], axis=1) for rule in ("BPTT", "OTTT"))
    table = summary_table(frame(data).sample(frac=1, random_state=0), "BPTT", seed=3).set_index("rule")
    got = table.loc["OTTT"]
    alone, difference = stratified_bootstrap(ottt, seed=3), bootstrap_difference(ottt, bptt, seed=3)
    # Shuffled rows may put the tasks in another order, and then other seeds are drawn: values to the last digit,
    # ends about.
    assert got["iqm"] == pytest.approx(alone.value) and got["difference"] == pytest.approx(difference.value)
    assert got[["low", "high"]].tolist() == pytest.approx([alone.low, alone.high], abs=0.005)
    assert got[["difference_low", "difference_high"]].tolist() == pytest.approx([*difference[1:3]], abs=0.005)
    assert got["improvement"] == probability_of_improvement(ottt, bptt).value < 0.5
    assert (got["n"], got["n_pairs"], got["warning"]) == (10, 10, "") and got["difference_high"] < 0
    assert np.isnan(table.loc["BPTT", "difference"]) and table.loc["BPTT", "n_pairs"] == 0
    again = summary_table(frame(data), "BPTT", seed=3)
    pd.testing.assert_frame_equal(again, summary_table(frame(data), "BPTT", seed=3))
    pairs = paired_differences(frame(data), "BPTT", seed=3)
    assert pairs["rule"].tolist() == ["OTTT"] and pairs.loc[0, "value"] == again.loc[1, "difference"]


def test_less_of_a_loss_is_better():
    data = frame(normal(shift=-0.1), metric="test_loss")
    assert summary_table(data, "BPTT", "test_loss").loc[1, "improvement"] > 0.9
    wrong = summary_table(data, "BPTT", "test_loss", higher_is_better=True)  # negative control
    assert wrong.loc[1, "improvement"] < 0.1
    with pytest.raises(ValueError, match="higher_is_better"):
        summary_table(frame(normal(), metric="norm_ratio"), "BPTT", metric="norm_ratio")


def test_undefined_runs_are_left_out_with_their_seed_and_told():
    data = normal()
    data["OTTT", "large"][4] = np.nan
    table = summary_table(frame(data, {("OTTT", "large", 4): "layer_0 is silent"}), "BPTT").set_index("rule")
    got = table.loc["OTTT"]
    kept = [i for i in range(10) if i != 4]
    expected = interquartile_mean(np.stack([data["OTTT", t][kept] for t in ("small", "large")], axis=1))
    assert (got["n"], got["n_left_out"], got["n_pairs"]) == (9, 1, 9) and got["iqm"] == pytest.approx(expected)
    assert got["warning"] == "1 of 10 seeds left out (layer_0 is silent)" and table.loc["BPTT", "warning"] == ""
    lacking = frame(data)
    lacking = lacking[~((lacking["train_rule"] == "OTTT") & (lacking["network"] == "large"))]
    got = summary_table(lacking, "BPTT").set_index("rule").loc["OTTT"]
    assert got["n"] == 0 and np.isnan(got["iqm"]) and got["warning"] == "undefined: not measured at step 10"
    pairs = paired_differences(lacking, "BPTT")
    assert np.isnan(pairs.loc[0, "value"]) and pairs.loc[0, "flag"].startswith("no seed is defined for both")


def test_runs_and_tasks_that_end_early_are_missed():
    early = frame({("OTTT", "small"): [0.1] * 9}, step=0)
    late = frame({("BPTT", "small"): np.linspace(0.8, 0.9, 9), ("OTTT", "small"): np.linspace(0.7, 0.8, 8)})
    scores = collect_scores(pd.concat([early, late]))
    assert scores["OTTT"].left_out == 1 and scores["OTTT"].seeds == tuple(range(8))
    assert scores["OTTT"].reason == "not measured at step 10" and scores["BPTT"].left_out == 0
    other = frame({("BPTT", "large"): [0.5] * 9}, step=5)
    assert collect_scores(pd.concat([early, late, other]))["BPTT"].values.shape == (0, 2)
    assert collect_scores(pd.concat([early, late]), step=0)["OTTT"].values.shape == (9, 1)


def test_when_not_to_trust_a_row():
    def warnings(data, **settings):
        return summary_table(data, "BPTT", **settings).set_index("rule")["warning"].to_dict()

    assert warnings(frame(normal())) == {"BPTT": "", "OTTT": ""}  # negative control
    assert "contains 0" in warnings(frame(normal(shift=0.0)))["OTTT"]
    assert "10 different" in warnings(frame(normal(seeds=3)))["BPTT"]
    assert warnings(frame(normal(seeds=1)))["BPTT"] == "one seed: no interval"
    dead = frame({("BPTT", "small"): [0, 2, 1] + [0] * 7}, metric="silent_outputs")
    found = warnings(pd.concat([frame(normal()), dead]))
    assert "in 2 of 20 runs" in found["BPTT"] and found["OTTT"].startswith("difference: BPTT has silent")
    assert warnings(pd.concat([frame(normal()), dead.assign(step=0)]))["BPTT"] == "", "dead before, alive now"
    short = frame(normal())
    short = short[~((short["train_rule"] == "BPTT") & (short["seed"] == 0))]
    assert "only 9 of 10 seeds" in warnings(short)["OTTT"]
    assert "no width" in warnings(frame(normal(shift=-9.0)))["OTTT"]


def test_gradient_metrics_go_by_the_rule_compared():
    data = pd.concat([
        frame({("BPTT", "n"): [1.0] * 9}, metric="cosine", rule="BPTT"),
        frame({("BPTT", "n"): np.linspace(0.4, 0.6, 9)}, metric="cosine", rule="OTTT"),
    ])  # fmt: skip
    assert list(collect_scores(data, "cosine")) == ["BPTT", "OTTT"]
    both = pd.concat([data, data.assign(train_rule="OTTT")])
    with pytest.raises(ValueError, match="select one 'train_rule' first"):
        collect_scores(both, "cosine")
    assert list(collect_scores(both[both["rule"] == "OTTT"], "cosine", column="train_rule")) == ["BPTT", "OTTT"]


def test_frames_put_together_with_repeated_row_labels():
    data = normal()
    whole = collect_scores(frame(data))
    parts = collect_scores(pd.concat([frame({key: values}) for key, values in data.items()]))
    for rule, scores in whole.items():
        np.testing.assert_array_equal(parts[rule].values, scores.values)


def test_frames_at_the_door():
    data = frame(normal())
    with pytest.raises(ValueError, match="drop the copies"):
        collect_scores(pd.concat([data, data]))
    with pytest.raises(ValueError, match="no row with metric == 'speed'; there is 'accuracy'"):
        collect_scores(data, "speed")
    with pytest.raises(ValueError, match="no row with step == 7"):
        collect_scores(data, step=7)
    with pytest.raises(ValueError, match="no column 'dataset'"):
        collect_scores(data, task="dataset")
    with pytest.raises(ValueError, match="no rule is named 'OSTL'; the frame has 'BPTT', 'OTTT'"):
        summary_table(data, "OSTL")
    plain = data[data["network"] == "small"][["train_rule", "seed", "metric", "value"]]
    assert collect_scores(plain)["BPTT"].tasks == ("",), "step, layer, network and flag are optional"
    assert set(statistics.__all__) <= set(dir(statistics))


# Figures.


def words_of(ax):
    legend = ax.get_figure().legends[0]
    return "\n".join(text.get_text() for text in [legend.get_title(), *legend.get_texts()])


def test_figures_of_a_table(tmp_path):
    from gradlab.report import plots_statistics as plots

    data = normal(("BPTT", "OTTT", "SLTT", "RTRL"))
    data["SLTT", "small"][:] = np.nan
    table = summary_table(frame(data, {("SLTT", "small", i): "it diverged" for i in range(10)}), "BPTT")
    table.loc[table["rule"] == "RTRL", "warning"] = "difference: the interval contains 0"
    table.to_csv(tmp_path / "table.csv", index=False)
    read = pd.read_csv(tmp_path / "table.csv")
    for drawn in (table, read):
        ax = plots.intervals(drawn)
        assert [label.get_text() for label in ax.get_yticklabels()][:3] == [
            "BPTT (n = 10)", "OTTT (n = 10)", "SLTT (n = 0)",
        ]  # fmt: skip
        ends = {tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2}
        assert ends == {tuple(row) for row in table.loc[[0, 1, 3], ["low", "high"]].to_numpy()}
        assert [text.get_text() for text in ax.texts] == ["undefined"]
        assert "SLTT: undefined: it diverged" in words_of(ax) and "contains 0" not in words_of(ax)
    ax = plots.intervals(table, quantity="difference")
    assert "RTRL: the interval contains 0" in words_of(ax) and len(ax.get_yticklabels()) == 3
    bars = plots.improvement(table).patches
    assert [bar.get_x() + bar.get_width() for bar in bars] == pytest.approx(table["improvement"].dropna().tolist())
    with pytest.raises(ValueError, match="choose"):
        plots.intervals(table, quantity="speed")


def test_figure_of_profiles():
    scores = {rule: np.linspace(0, 1, 9) + i for i, rule in enumerate(("BPTT", "OTTT"))}
    ax = performance_profile({**scores, "SLTT": [0.3]}, [0.0, 0.5, 1.0]).plot(label="accuracy")
    assert ax.lines[0].get_ydata().tolist() == [8 / 9, 4 / 9, 0.0]
    assert "SLTT (n = 1)" in words_of(ax) and "SLTT: one seed" in words_of(ax)
