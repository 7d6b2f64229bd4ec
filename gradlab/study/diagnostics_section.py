"""The section of a study's report that draws its diagnostics, with what is seen and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from gradlab.study.sections import figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gradlab.report.html import Section
    from gradlab.study.summary import Results

__all__ = ["DRAWINGS", "Drawing", "diagnostics"]


class Drawing(NamedTuple):
    """How one figure of a kind is drawn from the stored frame of one seed, or of all seeds.

    Attributes:
        kind: of `gradlab.study.diagnostic_kinds.KINDS`.
        name: of the figure's file.
        draw: (frame, reference, ax) -> Axes.
        caption: what is seen, and how not to read it.
        seeds: True when the frame of all seeds is drawn (their mean), False for the first seed's.
    """

    kind: str
    name: str
    draw: Callable[[pd.DataFrame, str, Axes], Axes]
    caption: str
    seeds: bool = False


def _hidden(frame: pd.DataFrame) -> str:
    """The first layer, where errors have come the longest way."""
    return "layer_0" if "layer_0" in set(frame["layer"]) else "network"


def _shares(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_attribution

    return plots_attribution.shares(frame, _hidden(frame), ax=ax)


def _ladder(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_attribution

    paths = frame[frame["kind"] == "ladder"].groupby("rule", sort=False)["path"].nunique()
    rule = paths.idxmax()  # the rule that drops most
    # An attribution is always against BPTT, whatever the study's reference is.
    return plots_attribution.attribution(frame[frame["rule"] == rule], layer=_hidden(frame), ax=ax)


def _lags(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_time

    return plots_time.lags(frame, _hidden(frame), ax=ax, reference=reference)


def _timeline(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_time

    return plots_time.timeline(frame, layer=_hidden(frame), ax=ax, reference=reference)


def _noise(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_noise

    return plots_noise.draw(frame, ax, reference=reference)


def _descent(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_descent

    return plots_descent.draw(frame, ax, reference=reference)


def _best_steps(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_descent

    return plots_descent.curves(frame, ax)


def _updates(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.analysis.similarity import summarise
    from gradlab.report import plots_maps

    rows = frame[(frame["metric"] == "cosine") & (frame["rule"] != reference)]
    table = summarise(rows, ["rule", "layer", "metric"]).assign(step=0)
    ax = plots_maps.rule_layer_map(table, "cosine", ax=ax, reference=reference)
    ax.set_title("after the optimizer", loc="left")
    return ax


def _rates(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_health

    return plots_health.rates(frame, ax)


def _flow(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_health

    return plots_health.flow(frame, ax)


def _curvature(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_curvature

    return plots_curvature.curvature_along(frame, ax)


def _spectrum(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_curvature

    return plots_curvature.spectral_density(frame, ax)


def _between(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_descent

    return plots_descent.lines(frame, ax)


def _representation(frame: pd.DataFrame, reference: str, ax: Axes) -> Axes:
    from gradlab.report import plots_representation

    return plots_representation.networks(frame, _hidden(frame), ax)


DRAWINGS = (
    Drawing(
        "attribution", "shares", _shares,
        "Why each gradient differs in the first layer: the gap to BPTT, split over the paths of credit that the rule "
        "drops (Shapley values, mean over seeds; each row adds up to 1). A bar left of zero says that putting this "
        "path back leads away in the mean over all orders: errors of dropped paths partly cancel.", True,
    ),
    Drawing(
        "attribution", "ladder", _ladder,
        "The cosine of the rule that drops most, as its paths are put back one after the other (mean over seeds). "
        "What a step of the ladder gains depends on the order.", True,
    ),
    Drawing(
        "lags", "lags", _lags,
        "Credit by delay in the first layer: how much of {reference}'s gradient each rule finds at each lag between a "
        "weight's action and the error (mean over seeds). Those of {reference} add up to 1.", True,
    ),
    Drawing(
        "timeline", "timeline", _timeline,
        "The cosine with {reference} at each step of the sequence in the first layer (mean over seeds): of that step's "
        "loss alone (thin) and of all steps until then (thick).", True,
    ),
    Drawing(
        "noise", "noise", _noise,
        "Bias and noise of each rule's gradient over eight batches (first seed), relative to the mean gradient of "
        "{reference}: where the data's noise is larger than the bias, a better rule would hardly be seen in one step.",
    ),
    Drawing(
        "descent", "descent", _descent,
        "Does it matter? The decrease of the loss along each rule's own step over that along {reference}'s, at equal "
        "length (first seed): 1 is as good as {reference}, below 0 the loss rises.",
    ),
    Drawing(
        "best_steps", "best-steps", _best_steps,
        "The loss along each rule's direction (first seed), with the best length of step. The losses are those of the "
        "spiking network, which has jumps.",
    ),
    Drawing(
        "updates", "updates", _updates,
        "The cosine with {reference}'s of the optimizer's updates from a fresh state (mean over seeds), which are "
        "not the next ones of training. An optimizer that rescales its steps may make directions more alike, or less.",
        True,
    ),
    Drawing("health", "rates", _rates, "Firing rates of the units of each layer, sorted (first seed)."),
    Drawing(
        "health", "flow", _flow,
        "The flow of BPTT's error to each layer and step (first seed). A layer whose errors are orders of magnitude "
        "smaller than those above it learns slowly, whatever the rule.",
    ),
    Drawing(
        "curvature", "curvature", _curvature,
        "Curvature of the loss along each rule's gradient (first seed): by the second derivative (filled) and by the "
        "change of the gradient over a small step (hollow). Where they differ, spikes that appear or vanish rule the "
        "loss, and the second derivative is one of the surrogate.",
    ),
    Drawing(
        "spectrum", "spectrum", _spectrum,
        "Density of the eigenvalues of the loss's second derivative, taken through the surrogate (first seed). Near or "
        "above a mismatch of 1 it does not foretell how the gradient changes: read it as a picture of the surrogate.",
    ),
    Drawing(
        "between", "between", _between,
        "The loss on the straight lines from the first solution to those of the other rules (first seed). A barrier "
        "says that the rules ended in different valleys, or in mirror images of one.",
    ),
    Drawing(
        "representation", "cka", _representation,
        "Similarity (centred kernel alignment of firing rates) of the first layer's activity between networks trained "
        "with different rules from the same initial weights (first seed).",
    ),
)  # fmt: skip
"""Every figure of the diagnostics."""


def diagnostics(found: Results) -> Section | None:
    """Return the figures of the stored diagnostics, if there are any."""
    from gradlab.report.html import Section

    if not found.diagnostics:
        return None
    text = (
        "Measured where training with the reference began and where it ended, on a batch of the training size: why "
        "gradients differ, whether it matters for the loss, and in what state the network is."
    )
    parts = []
    for network, frames in found.diagnostics.items():
        parts.append(Section(f"Diagnostics of {network}", list(_figures(found, network, frames))))
    return Section("Why do gradients differ, and does it matter?", [text, *parts])


def _figures(found: Results, network: str, frames: dict[str, pd.DataFrame]) -> Iterator[Any]:
    for drawing in DRAWINGS:
        frame = frames.get(drawing.kind)
        if frame is None:
            continue
        if frame.empty:
            yield f"{drawing.kind}: nothing to compare."
            continue
        for at in sorted(frame["at"].unique()):
            drawn = draw(drawing, frame[frame["at"] == at], found.study.reference.name)
            when = "Before training" if at == 0 else f"After {at} iterations"
            name = f"{drawing.name}-{network}-{at}"
            caption = drawing.caption.format(reference=found.study.reference.name)
            yield figure(found, drawn, name, f"{when} (network {network}). {caption}{_lost(found, frame, at)}")


def _lost(found: Results, frame: pd.DataFrame, at: int) -> str:
    """What must be said when seeds are missing because their parameters were not finite."""
    missing = sorted(set(found.study.seeds) - set(frame[frame["at"] == at]["seed"]))
    return f" Left out: seeds {missing}, whose parameters are not finite numbers." if missing else ""


def draw(drawing: Drawing, frame: pd.DataFrame, reference: str) -> Any:
    """One figure from the rows of one place in training."""
    from gradlab.report.style import new_figure

    rows = frame if drawing.seeds else frame[frame["seed"] == frame["seed"].min()]
    drawn, (ax,) = new_figure()
    drawing.draw(rows, reference, ax)
    return drawn
