"""Landscapes of networks, what is stored of them, lines through the space of weights, and the figures of all that."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import network_loop
from landscape_parts import flat, tree, wavy

import gradlab as gl
from gradlab.analysis import linear_currents, objective
from gradlab.analysis.landscape import (
    Landscape,
    landscape,
    loss_function,
    losses_along,
    pca_plane,
    random_plane,
    surface,
)
from gradlab.analysis.lines import (
    LineProfile,
    StraightLine,
    directed_line,
    line_between,
    line_profile,
    random_line,
)
from gradlab.report import animation, plots_landscape, plots_lines, style
from gradlab.testing.networks import case


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


# --- networks ---


def test_surface_of_a_spiking_network_equals_a_numpy_simulation():
    net, params, batch, loss = case()
    plane = random_plane(params, jax.random.key(2))
    a, b = np.array([-0.6, 0.0, 0.5]), np.array([-0.4, 0.7])
    ground = surface(loss_function(net, batch, loss), plane, a, b)

    def simulated(x, y):
        point = jax.tree_util.tree_map(lambda o, u, v: np.asarray(o) + x * u + y * v, params, plane.x, plane.y)
        output = network_loop(net, point, batch.inputs)[1][-1]
        largest = output.max(-1, keepdims=True)
        log_p = output - largest - np.log(np.exp(output - largest).sum(-1, keepdims=True))
        return -(np.asarray(batch.targets) * log_p).sum(-1).mean()

    expected = np.array([[simulated(x, y) for x in a] for y in b])
    np.testing.assert_allclose(ground.loss, expected, rtol=1e-12)
    assert np.ptp(expected) > 1e-2  # negative control: the points differ, and so does the mirrored plane
    assert np.abs(ground.loss - np.array([[simulated(x, -y) for x in a] for y in b])).max() > 1e-2


def test_one_program_serves_all_batches_of_a_network(monkeypatch):
    net, params, batch, loss = case(n_steps=4)
    traces = []
    scalar = linear_currents.scalar
    monkeypatch.setattr(linear_currents, "scalar", lambda loss: traces.append(1) or scalar(loss))
    plane = random_plane(params, jax.random.key(2))
    axis = np.array([0.0, 0.5])
    first = surface(loss_function(net, batch, loss), plane, axis, axis).loss
    once = len(traces)
    assert once == 1  # not once per point
    other = gl.Batch(1.0 - batch.inputs, batch.targets)
    second = surface(loss_function(net, other, loss), plane, axis, axis).loss
    assert len(traces) == once and not np.allclose(first, second)
    surface(loss_function(net, batch, gl.PerStep(loss.function, time="sum")), plane, axis, axis)
    assert len(traces) > once  # negative control: another loss is another program
    with pytest.raises(ValueError, match="parameter layer_0/connection/kernel has shape"):
        loss_function(net, gl.Batch(batch.inputs[..., :2], batch.targets), loss)(params)
    with pytest.raises(TypeError, match=r"gl\.Batch"):
        loss_function(net, batch.inputs, loss)


def test_how_many_points_at_once(monkeypatch):
    net, params, batch, loss = case(n_steps=4)
    function = loss_function(net, batch, loss)
    assert objective.points_at_once(function, params, 100) is None  # on a CPU one after the other
    assert objective.points_at_once(function, params, 100, 7) == 7
    monkeypatch.setattr(objective.jax, "default_backend", lambda: "gpu")
    assert objective.points_at_once(function, params, 100) == 100
    assert objective.points_at_once(function, params, 10_000) == objective.MOST_AT_ONCE
    monkeypatch.setattr(objective, "_free_bytes", lambda: 100_000)
    assert 1 <= objective.points_at_once(function, params, 100) < 100
    monkeypatch.setattr(objective, "_free_bytes", lambda: 10)
    assert objective.points_at_once(function, params, 100) == 1
    with pytest.raises(ValueError, match="whole number above 0"):
        objective.points_at_once(function, params, 100, 0)


# --- what is stored ---


def paths_view():
    origin = tree(0)
    runs = {"BPTT": jax.tree_util.tree_map(lambda o, t: o + 0.2 * t, origin, tree(1, (4,)))}
    return landscape(wavy, pca_plane(runs, origin), runs, points=4), runs, origin


def test_zero_and_negative_losses_survive(tmp_path):
    loss = np.array([[0.0, -1.5, np.nan], [np.inf, 2.0, -0.0]])
    again = Landscape.load(Landscape(np.arange(3.0), np.arange(2.0), loss).save(tmp_path / "view.npz"))
    np.testing.assert_array_equal(again.loss, loss)


def test_the_frame_tells_distances_and_reasons(tmp_path):
    view, runs, origin = paths_view()
    again = Landscape.load(view.save(tmp_path / "view.npz"))
    frame = again.to_frame()
    wanted = ["path", "checkpoint", "a", "b", "captured", "distance", "loss", "loss_on_plane", "flag"]
    assert list(frame.columns) == wanted and len(frame) == 4 and (frame["flag"] == "").all()
    plane = pca_plane(runs, origin)
    axes = np.stack([flat(plane.x), flat(plane.y)])
    for i, row in frame.iterrows():
        d = flat(jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], runs["BPTT"])) - flat(origin)
        outside = np.linalg.norm(d - axes.T @ (axes @ d))
        assert row["distance"] == pytest.approx(outside, rel=1e-9)
        assert row["captured"] == pytest.approx(1 - outside**2 / (d @ d), rel=1e-9)
        assert abs(row["loss"] - row["loss_on_plane"]) > 1e-6  # off the plane the two differ
    narrow = landscape(wavy, plane, runs, points=2, extent=((50.0, 51.0), (0.0, 1.0))).to_frame()
    assert narrow["loss_on_plane"].isna().all() and (narrow["flag"] == "outside the grid").all()


def test_a_file_from_before_distances_still_loads(tmp_path):
    view, *_ = paths_view()
    with np.load(view.save(tmp_path / "view.npz")) as data:
        old = {name: data[name] for name in data.files if not name.startswith(("distance", "captured_at", "labels"))}
    np.savez(tmp_path / "old.npz", **old)
    again = Landscape.load(tmp_path / "old.npz")
    np.testing.assert_array_equal(again.path_loss["BPTT"], view.path_loss["BPTT"])
    frame = again.to_frame()
    assert frame["distance"].isna().all() and frame["flag"].str.contains("before distances were stored").all()
    np.savez(tmp_path / "other.npz", a=old["a"])
    with pytest.raises(ValueError, match="not a stored landscape: it lacks b"):
        Landscape.load(tmp_path / "other.npz")


# --- lines ---


def test_a_quadratic_gives_the_exact_parabola():
    o, d = flat(tree(0)), flat(tree(1))

    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree_util.tree_leaves(params))

    view = line_profile(loss, StraightLine(tree(0), tree(1)))
    assert (view.a[0], view.a[-1], len(view.a), list(view.loss)) == (-1.0, 2.0, 61, ["loss"])
    exact = o @ o + 2 * view.a * (o @ d) + view.a**2 * (d @ d)
    np.testing.assert_allclose(view.loss["loss"], exact, rtol=1e-12)
    np.testing.assert_allclose(line_profile(loss, StraightLine(tree(0), tree(1)), batch_size=7).loss["loss"], exact)
    assert not np.allclose(view.loss["loss"][::-1], exact)  # negative control: a line has a direction


def test_a_line_between_networks_begins_and_ends_at_them():
    start, end = tree(0), tree(1)
    view = line_profile(wavy, line_between(start, end, names=("BPTT", "OSTL")), a=np.array([0.0, 0.5, 1.0]))
    half = jax.tree_util.tree_map(lambda p, q: (p + q) / 2, start, end)
    np.testing.assert_allclose(view.loss["loss"], [float(wavy(p)) for p in (start, half, end)], rtol=1e-12)
    assert view.label == "from BPTT (0) to OSTL (1)"
    assert abs(view.loss["loss"][1] - view.loss["loss"][[0, 2]].mean()) > 1e-3  # the loss is no straight line


def test_several_losses_and_lines(tmp_path):
    lines = {"BPTT": directed_line(tree(0), tree(1)), "OSTL": directed_line(tree(0), tree(2))}
    a = np.array([-0.5, 0.5])
    view = line_profile({"train": wavy, "test": lambda p: 2 * wavy(p)}, lines, a)
    assert list(view.loss) == ["BPTT, train", "BPTT, test", "OSTL, train", "OSTL, test"]
    np.testing.assert_allclose(view.loss["OSTL, test"], 2 * view.loss["OSTL, train"], rtol=1e-12)
    np.testing.assert_allclose(view.loss["BPTT, train"], losses_along(wavy, jax.vmap(lines["BPTT"].point)(a)))
    assert not np.allclose(view.loss["BPTT, train"], view.loss["OSTL, train"])
    again = LineProfile.load(view.save(tmp_path / "line.npz"))
    assert list(again.loss) == list(view.loss) and again.label == view.label
    np.testing.assert_array_equal(again.loss["OSTL, test"], view.loss["OSTL, test"])
    frame = again.to_frame()
    assert list(frame.columns) == ["rule", "layer", "metric", "a", "value", "flag"] and len(frame) == 8
    frame = line_profile(lambda p: jnp.log(wavy(p) - 1e9), lines).to_frame()
    assert frame["value"].isna().all() and (frame["flag"] == "the loss is not finite here").all()


def test_a_random_line_is_normalised():
    line = random_line(tree(0), jax.random.key(0))
    weights, direction = (np.asarray(t["layer_1"]["connection"]["kernel"]) for t in (tree(0), line.direction))
    np.testing.assert_allclose(*(np.sqrt((w**2).sum((0, 1, 2))) for w in (direction, weights)), rtol=1e-12)
    assert line.ignored == ("layer_0/connection/bias", "layer_0/neuron/leak")
    with pytest.raises(ValueError, match="finite and not zero"):
        StraightLine(tree(0), jax.tree_util.tree_map(jnp.zeros_like, tree(0)))
    with pytest.raises(ValueError, match="at least one entry"):
        line_profile(wavy, line, a=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="two names"):
        line_between(tree(0), tree(1), names=("BPTT",))


# --- figures ---


def words_of(figure):
    return "\n".join(text.get_text() for legend in figure.legends for text in [legend.get_title(), *legend.get_texts()])


def test_the_surface_in_three_dimensions_shows_the_true_loss():
    view, *_ = paths_view()
    ax = view.plot(view="surface")
    assert ax.name == "3d" and ax.get_zlabel() == "loss" and "dotted" in words_of(ax.get_figure())
    x, y, z = ax.lines[0].get_data_3d()
    np.testing.assert_array_equal(np.stack([x, y], axis=1), view.coordinates["BPTT"])
    np.testing.assert_allclose(z, view.path_loss["BPTT"])
    assert np.abs(z - view.loss_on_plane("BPTT")).max() > 1e-6  # negative control: not the surface's
    stem = ax.lines[1].get_data_3d()[2]
    np.testing.assert_allclose(stem, [view.loss_on_plane("BPTT")[0], view.path_loss["BPTT"][0]])
    logarithmic = view.plot(view="surface", log=True)
    np.testing.assert_allclose(logarithmic.lines[0].get_data_3d()[2], np.log10(view.path_loss["BPTT"]))
    with pytest.raises(ValueError, match="these axes are flat"):
        view.plot(style.new_figure()[1][0], view="surface")
    with pytest.raises(ValueError, match="'contour' and 'surface'"):
        view.plot(view="3d")


def test_axes_are_called_what_the_plane_says():
    view, *_ = paths_view()
    assert view.plot().get_xlabel().startswith("principal direction 1 (")
    named = Landscape(view.a, view.b, view.loss, labels=("across", "up"))
    assert (named.plot().get_xlabel(), named.plot().get_ylabel()) == ("across", "up")


def test_out_of_plane_distances_are_drawn_from_the_frame(tmp_path):
    view, *_ = paths_view()
    view.to_frame().to_csv(tmp_path / "paths.csv", index=False)
    ax = plots_landscape.out_of_plane(pd.read_csv(tmp_path / "paths.csv"))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), view.distance["BPTT"])
    assert "units of the weights" in ax.get_ylabel()


def test_a_line_is_drawn_from_a_stored_frame(tmp_path):
    frame = pd.DataFrame({"rule": "BPTT", "layer": "network", "metric": "loss", "a": [0.0, 1.0, 2.0]})
    frame["value"], frame["flag"] = [3.0, -1.0, np.nan], ["", "", "the loss is not finite here"]
    frame.to_csv(tmp_path / "line.csv", index=False)
    ax = plots_lines.line_profile(pd.read_csv(tmp_path / "line.csv"), label="from here to there", log=True)
    said = words_of(ax.get_figure())
    assert ax.get_xlabel() == "from here to there"
    assert "missing: the loss is not finite here" in said and "no logarithm" in said
    ax = line_profile(wavy, line_between(tree(0), tree(1))).plot()
    assert ax.get_xlabel() == "from the start (0) to the end (1)" and not ax.get_figure().legends


# --- films ---


def test_a_film_has_a_frame_per_checkpoint(tmp_path):
    from PIL import Image

    view, *_ = paths_view()
    path = animation.animate(view, tmp_path / "deep" / "film.gif", fps=5, dpi=50, hold=0.4, steps=[0, 5, 9, 20])
    times = []
    with Image.open(path) as film:
        for frame in range(film.n_frames):
            film.seek(frame)
            times.append(film.info["duration"])
    # Equal frames at the end may be stored as one that stays longer.
    assert sum(times) == 6 * 200 and len(times) >= 4
    assert [p.name for p in path.parent.iterdir()] == ["film.gif"]


def test_paths_grow_and_show_their_true_loss():
    view, *_ = paths_view()
    figure, update = animation._stage(view, 4, [0, 5, 9, 20], "loss", None)
    left, right = figure.axes[:2]
    filled = left.collections[0]
    for frame in (0, 2, 3, 1):
        update(frame)
        np.testing.assert_array_equal(np.transpose(left.lines[0].get_data()), view.coordinates["BPTT"][: frame + 1])
        np.testing.assert_array_equal(right.lines[0].get_ydata(), view.path_loss["BPTT"][: frame + 1])
        np.testing.assert_array_equal(right.lines[0].get_xdata(), [0, 5, 9, 20][: frame + 1])
        head = left.lines[1]
        true = filled.cmap(filled.norm(view.path_loss["BPTT"][frame]))
        np.testing.assert_allclose(head.get_markerfacecolor(), true, atol=1e-6)
    assert figure.get_suptitle() == "training step 5 of 20"


def test_films_are_refused_in_words(tmp_path, monkeypatch):
    view, *_ = paths_view()
    monkeypatch.setattr(animation.FFMpegWriter, "isAvailable", lambda: False)
    with pytest.raises(RuntimeError, match=r"install it, or write a \.gif"):
        animation.animate(view, tmp_path / "film.mp4")
    with pytest.raises(ValueError, match=r"as \.gif or \.mp4"):
        animation.animate(view, tmp_path / "film.avi")
    with pytest.raises(ValueError, match="no paths"):
        animation.animate(Landscape(view.a, view.b, view.loss), tmp_path / "film.gif")
    with pytest.raises(ValueError, match="3 steps for 4 checkpoints"):
        animation.animate(view, tmp_path / "film.gif", steps=[1, 2, 3])
    with pytest.raises(ValueError, match="fps=0"):
        animation.animate(view, tmp_path / "film.gif", fps=0)
    assert not list(tmp_path.iterdir())
