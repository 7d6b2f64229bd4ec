"""Figures by their data and structure."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from report_data import RULES, SILENT, STEPS, results

from gradlab.analysis.landscape import Landscape
from gradlab.analysis.similarity import summarise
from gradlab.report import plots, style
from gradlab.rules import ALL


@pytest.fixture(scope="module")
def summary():
    return summarise(results())


def small_landscape(**changes):
    a, b = np.linspace(-1, 1, 7), np.linspace(-2, 2, 5)
    loss = a[None, :] ** 2 + b[:, None] ** 2 + 0.5
    coordinates = {
        "BPTT": np.array([[0.9, 1.5], [0.3, 0.5], [0.0, 0.0]]),
        "OTTT": np.array([[0.9, 1.5], [-0.5, 0.5]]),
    }
    path_loss = {"BPTT": np.array([3.0, 1.0, 0.5]), "OTTT": np.array([3.0, 1.7])}
    made = {"kind": "pca", "explained": (0.6, 0.2), "coordinates": coordinates, "path_loss": path_loss}
    return Landscape(a, b, **{**made, "loss": loss, "captured": {"BPTT": 0.91, "OTTT": 0.42}, **changes})


def words_of(ax):
    figure = ax.get_figure()
    legends = list(figure.legends) + ([ax.get_legend()] if ax.get_legend() else [])
    texts = [text.get_text() for legend in legends for text in [legend.get_title(), *legend.get_texts()]]
    return "\n".join([*texts, ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()])


def run(code, **environment):
    environment["PYTHONPATH"] = ":".join(sys.path)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def lines_of(ax, rule):
    return [line for line in ax.lines if line.get_color() == style.rule_style(rule).color]


# Style.


def test_a_rule_keeps_its_look_in_every_process():
    names = ["BPTT", "OTTT", "SomebodysRule", "SomebodysRule(k=3)", "TBPTT(k=1)"]
    code = f"from gradlab.report.style import rule_style\nprint([rule_style(n) for n in {names}])"
    prints = {run(code, PYTHONHASHSEED=seed).stdout for seed in ("1", "2")}
    assert prints == {f"{[style.rule_style(n) for n in names]}\n"}


def test_parametrised_rules_share_a_colour_and_not_a_line():
    short, long = style.rule_style("TBPTT(k=1)"), style.rule_style("TBPTT(k=10)")
    assert short.color == long.color == style.rule_style("TBPTT").color
    assert (short.line, short.marker) != (long.line, long.marker)
    six = [style.rule_style(n) for n in ("BPTT", "OSTL", "OTTT", "OTPE", "ApproximateOTPE", "SLTT")]
    assert len({s.color for s in six}) == len({s.marker for s in six}) == 6


def test_every_rule_has_a_look_of_its_own():
    names = {type(rule).__name__ for rule in ALL}
    assert set(style.RULE_STYLES) == names
    assert len(set(style.RULE_STYLES.values())) == len(names)


@pytest.mark.parametrize(("journal", "columns", "width"), [("nature", 1, 3.5), ("neurips", 2, 5.5)])
def test_figures_have_the_width_of_the_column(journal, columns, width, summary):
    before = mpl.rcParams["font.size"]
    with style.style(journal, columns):
        figure = plots.similarity_trace(summary).get_figure()
        assert mpl.rcParams["font.size"] in (7.0, 8.0)
    assert figure.get_figwidth() == width and mpl.rcParams["font.size"] == before
    with pytest.raises(ValueError, match="'ieee'"), style.style("cell"):
        pass


@pytest.mark.parametrize("suffix", ["pdf", "png", "svg"])
def test_equal_data_give_equal_bytes(summary, suffix, monkeypatch):
    def draw(layer):
        with style.style("nature"):
            return style.to_bytes(plots.similarity_trace(summary, layer=layer).get_figure(), suffix, dpi=80)

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    first = draw("network")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1500000000")
    assert draw("network") == first
    assert draw("layer_1") != first  # negative control
    if suffix == "pdf":
        assert b"/Type3" not in first and b"CreationDate" not in first


def test_save_writes_whole_files(tmp_path, summary):
    figure = plots.similarity_trace(summary).get_figure()
    paths = style.save(figure, tmp_path / "new" / "trace.v1", dpi=60)
    assert [path.name for path in paths] == ["trace.v1.pdf", "trace.v1.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["trace.v1.pdf", "trace.v1.png"]
    with pytest.raises(ValueError, match="not as 'bmp'"):
        style.save(figure, tmp_path / "x", ["bmp"])


# Plots.


def test_trace_draws_the_means_and_the_bands(summary):
    ax = plots.similarity_trace(summary, "cosine", "network")
    rows = summary[(summary["metric"] == "cosine") & (summary["layer"] == "network") & (summary["rule"] == "OTTT")]
    line = next(line for line in lines_of(ax, "OTTT") if len(line.get_xdata()) == len(STEPS))
    np.testing.assert_array_equal(line.get_ydata(), rows["mean"])
    heights = ax.collections[1].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((rows["low"].min(), rows["high"].max()))
    said = words_of(ax)
    assert [said.index(rule) for rule in RULES] == sorted(said.index(rule) for rule in RULES)
    assert "cosine with BPTT" in said and "training step" in said and "undefined" not in said


def test_trace_says_what_is_undefined(summary):
    ax = plots.similarity_trace(summary, "cosine", "layer_0")
    assert [(p.get_x(), p.get_width()) for p in ax.patches] == [(5, 10), (15, 10)]
    assert f"hatched: undefined ({SILENT})" in words_of(ax)
    line = next(line for line in lines_of(ax, "OTTT") if len(line.get_xdata()) == len(STEPS))
    assert np.isnan(line.get_ydata()).tolist() == [False, True, True, False, False]
    ax = plots.similarity_trace(summary, "cosine", "layer_1")
    crosses = [line for line in lines_of(ax, "SLTT") if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[0]]
    hollow = [line for line in lines_of(ax, "OTTT") if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata().tolist() for line in hollow] == [[30]]
    said = words_of(ax)
    assert "crosses: undefined for that rule (zero gradient)" in said and "hollow: some seeds" in said
    assert not ax.patches


def test_rules_that_coincide_are_said_to_coincide(summary):
    same = summary.assign(mean=1.0)
    text = lambda frame: [t.get_text() for t in plots.similarity_trace(frame).texts]  # noqa: E731
    assert text(same) == ["all rules agree within 0.0001"] and text(summary) == []


def test_a_figure_shows_one_thing_and_says_what_it_lacks():
    two = summarise(results(("BPTT", "SLTT")))
    with pytest.raises(ValueError, match="one train_rule, the summary has 'BPTT', 'SLTT'"):
        plots.similarity_trace(two)
    with pytest.raises(ValueError, match="no row with layer == 'layer_7'; there is 'network', 'layer_0'"):
        plots.similarity_trace(two, layer="layer_7")


def test_panels_share_one_legend(summary):
    figure = plots.similarity_panels(summary)
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == ["network", "layer 0", "layer 1"]
    assert len(figure.legends) == 1 and [t.get_text() for t in figure.legends[0].get_texts()] == list(RULES)
    assert [ax.get_xlabel() != "" for ax in figure.axes[:3]] == [False, True, True]


def test_learning_curves_tell_dead_outputs():
    ax = plots.learning_curves(summarise(results(RULES)))
    said = words_of(ax)
    assert "SLTT (2 silent)" in said and "OTTT (" not in said and "not comparable" in said
    hollow = [line for line in lines_of(ax, "SLTT") if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata().tolist() for line in hollow] == [[20, 30, 40]]
    assert "not comparable" not in words_of(plots.learning_curves(summarise(results(("BPTT", "OTTT")))))


def test_heat_maps_show_numbers_and_gaps(summary):
    ax = plots.rule_layer_map(summary, "norm_ratio", step=20)
    shown = ax.images[0].get_array()
    assert shown.shape == (3, 3) and shown.mask[:, 1].all() and not shown.mask[:, [0, 2]].any()
    assert len(ax.texts) == 6 and len(ax.patches) == 3 and "undefined" in words_of(ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["network", "layer 0", "layer 1"]
    starred = plots.rule_layer_map(summary, "cosine", step=30)
    assert sum("*" in text.get_text() for text in starred.texts) == 3
    gradients = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    ax = plots.gram_matrix(gradients @ gradients.T, RULES)
    assert ax.images[0].get_array()[0, 1] == pytest.approx(np.sqrt(0.5)) and len(ax.patches) == 5
    with pytest.raises(ValueError, match="2 names"):
        plots.gram_matrix(np.eye(3), ["a", "b"])


def test_landscape_figure_prints_share_and_true_loss():
    view = small_landscape()
    ax = view.plot()
    said = words_of(ax)
    assert "BPTT: 91 % in the plane, loss 3 to 0.5" in said and "OTTT: 42 % in the plane" in said
    assert "principal direction 1 (60 %)" in said and "not a number" not in said
    path = lines_of(ax, "OTTT")[0]
    np.testing.assert_array_equal(np.transpose(path.get_data()), view.coordinates["OTTT"])
    # A point is filled with the colour of its true loss, not with that of the ground below it.
    points = ax.collections[-1].get_facecolors()
    filled = ax.collections[0]
    np.testing.assert_allclose(points[1], filled.cmap(filled.norm(1.7)), atol=1e-6)
    assert not np.allclose(points[1], filled.cmap(filled.norm(0.5**2 + 0.5**2 + 0.5)), atol=1e-3)


def test_landscape_marks_what_is_not_a_number_and_chooses_levels():
    loss = small_landscape().loss
    broken = loss.copy()
    broken[0, :3] = np.nan
    ax = plots.landscape(small_landscape(loss=broken))
    assert "hatched: the loss is not a number" in words_of(ax) and ax.patch.get_hatch()
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.landscape(small_landscape(loss=np.full_like(loss, np.nan)))
    with pytest.raises(ValueError, match="positive"):
        plots.landscape(small_landscape(loss=loss - 1), log=True)
    assert isinstance(plots.landscape(small_landscape(loss=loss**6)).collections[0].norm, mpl.colors.LogNorm)
    assert not isinstance(plots.landscape(small_landscape()).collections[0].norm, mpl.colors.LogNorm)
    assert plots.landscape(small_landscape(loss=np.ones_like(loss))) is not None


def test_path_losses_shows_truth_and_surface():
    view = small_landscape()
    ax = plots.path_losses(view)
    true, ground = lines_of(ax, "OTTT")
    np.testing.assert_array_equal(true.get_ydata(), view.path_loss["OTTT"])
    assert ground.get_ydata()[1] == pytest.approx(0.5**2 + 0.5**2 + 0.5, abs=0.3)


def test_functions_draw_where_they_are_told(summary):
    with style.style("nature", 2):
        figure, (left, right) = style.new_figure(1, 2)
        assert plots.similarity_trace(summary, ax=left) is left and plots.landscape(small_landscape(), right) is right
    assert left.get_legend() is not None and not figure.legends
    style.to_bytes(figure, dpi=50)


def test_packages_load_their_modules_on_first_use():
    code = (
        "import sys, gradlab.analysis, gradlab.report\n"
        "assert not {'matplotlib', 'pandas'} & set(sys.modules)\n"
        "gradlab.report.html, gradlab.analysis.similarity\n"
        "assert {'matplotlib', 'pandas'} <= set(sys.modules) and 'matplotlib.pyplot' not in sys.modules\n"
        "gradlab.report.nothing"
    )
    done = run(code)
    assert "it has animation, html, plots, style, tables" in done.stderr
