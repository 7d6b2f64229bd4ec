"""Draw the gallery, `make figures`: each figure from stored numbers alone, with its caption.

The numbers lie in `figures/stored/`, small and committed. `make figures RESULTS=results` first takes them anew from the
results of the studies `why_gradients_differ` and `randman_rates`, which must have been run (`make study STUDY=...`).
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from gradlab.analysis.landscape import Landscape
from gradlab.analysis.similarity import summarise
from gradlab.analysis.statistics import summary_table
from gradlab.analysis.updates import updates_to_target
from gradlab.report import (
    plots,
    plots_attribution,
    plots_curvature,
    plots_descent,
    plots_health,
    plots_noise,
    plots_representation,
    plots_statistics,
    plots_surface,
    plots_time,
)
from gradlab.report.style import save, style
from gradlab.study.diagnostics import read_frame
from gradlab.study.loading import find_study, load_study
from gradlab.study.summary import Results, load_results

HERE = Path(__file__).resolve().parent
STORED, GALLERY = HERE / "stored", HERE / "gallery"
WHY, RATES = "why_gradients_differ", "randman_rates"


class Entry(NamedTuple):
    """One figure: where its numbers come from, and how it is drawn; what is seen stands in `captions.toml`."""

    name: str
    study: str
    take: Callable[[Results], Any]
    draw: Callable[[Any], Any]


def diagnostic(
    kind: str, network: str = "deep", seeds: bool = False, before: bool = False
) -> Callable[[Results], pd.DataFrame]:
    """Take one kind of diagnostic at the end of training, or before it: of all seeds, or of the first."""

    def take(found: Results) -> pd.DataFrame:
        frame = found.diagnostics[network][kind]
        frame = frame[frame["at"] == (frame["at"].min() if before else frame["at"].max())]
        frame = frame if seeds else frame[frame["seed"] == frame["seed"].min()]
        return frame.drop(columns=["study", "train_rule", "at"])

    return take


def hidden(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["layer"] == "layer_0"]


def only(take: Callable[[Results], pd.DataFrame], **wanted: str) -> Callable[[Results], pd.DataFrame]:
    """Take the rows with these values only, so that the stored file stays small."""

    def rows(found: Results) -> pd.DataFrame:
        frame = take(found)
        for column, value in wanted.items():
            frame = frame[frame[column] == value]
        return frame

    return rows


def training(found: Results) -> pd.DataFrame:
    rows = found.frame[(found.frame["rule"] == "") & (found.frame["layer"] == "network")]
    return rows[rows["metric"].isin(("accuracy", "silent_outputs", "classes_never_predicted"))].drop(columns=["cell"])


def gradients(found: Results) -> pd.DataFrame:
    rows = found.frame[(found.frame["rule"] != "") & (found.frame["train_rule"] == found.study.reference.name)]
    steady = rows.groupby("rule")["step"].transform("nunique") == rows["step"].nunique()  # no spot checks
    rows = rows[steady & ~rows["layer"].str.contains("/", regex=False)]
    return rows[rows["metric"].isin(("cosine", "norm_ratio"))].drop(columns=["cell"])


def scores(frame: pd.DataFrame) -> pd.DataFrame:
    return summary_table(frame, "BPTT", together=True, column="train_rule", task="network")


def target(frame: pd.DataFrame) -> Any:
    rows = frame[(frame["metric"] == "accuracy") & (frame["network"] == "deep")]
    ends = rows[(rows["train_rule"] == "BPTT") & (rows["step"] == rows["step"].max())]["value"]
    found = updates_to_target(rows, round(0.9 * float(ends.mean()), 3), higher_is_better=True)
    return plots_statistics.updates(found.to_frame(), found.summary())


def updates_map(frame: pd.DataFrame) -> Any:
    rows = frame[(frame["metric"] == "cosine") & (frame["rule"] != "BPTT")]
    ax = plots.rule_layer_map(summarise(rows, ["rule", "layer", "metric"]).assign(step=0), "cosine")
    ax.set_title("after the optimizer", loc="left")
    return ax


def landscape_of(network: str, plane: str) -> Callable[[Results], Landscape]:
    return lambda found: found.landscapes[network][plane]


ENTRIES = (
    Entry("shares", WHY, only(diagnostic("attribution", seeds=True), kind="share"),
          lambda f: plots_attribution.shares(f, "layer_0")),
    Entry("shares_recurrent", WHY, only(diagnostic("attribution", "recurrent", seeds=True), kind="share"),
          lambda f: plots_attribution.shares(f, "layer_0")),
    Entry("ladder", WHY, only(diagnostic("attribution", seeds=True), kind="ladder", rule="SLTT"),
          lambda f: plots_attribution.attribution(f, "cosine", "layer_0")),
    Entry("lags", WHY, lambda r: hidden(only(diagnostic("lags", seeds=True), metric="credit")(r)),
          lambda f: plots_time.lags(f, "layer_0")),
    Entry("timeline", WHY, lambda r: hidden(only(diagnostic("timeline", seeds=True), metric="cosine")(r)),
          lambda f: plots_time.timeline(f, layer="layer_0")),
    Entry("noise", WHY, diagnostic("noise"), lambda f: plots_noise.draw(f, layer="layer_0")),
    Entry("descent", WHY, diagnostic("descent", before=True), plots_descent.draw),
    Entry("best_steps", WHY, diagnostic("best_steps", before=True), plots_descent.curves),
    Entry("updates", WHY, only(diagnostic("updates", seeds=True), metric="cosine"), updates_map),
    Entry("rates", WHY, diagnostic("health"), plots_health.rates),
    Entry("flow", WHY, diagnostic("health"), plots_health.flow),
    Entry("curvature", WHY, diagnostic("curvature"), plots_curvature.curvature_along),
    Entry("spectrum", WHY, diagnostic("spectrum"), plots_curvature.spectral_density),
    Entry("between", WHY, diagnostic("between"), plots_descent.lines),
    Entry("cka", WHY, diagnostic("representation"),
          lambda f: plots_representation.networks(f, "layer_0")),
    Entry("intervals", WHY, training, lambda f: plots_statistics.intervals(scores(f))),
    Entry("improvement", WHY, training, lambda f: plots_statistics.improvement(scores(f))),
    Entry("updates_to_target", WHY, training, target),
    Entry("surface", WHY, landscape_of("deep", "pca"), plots_surface.surface),
    Entry("cosine", RATES, gradients, lambda f: plots.similarity_panels(summarise(f), "cosine")),
    Entry("norm_ratio", RATES, gradients, lambda f: plots.similarity_panels(summarise(f), "norm_ratio")),
    Entry("accuracy", RATES, training, lambda f: plots.learning_curves(summarise(f))),
    Entry("landscape", RATES, landscape_of("lif-128", "pca"), plots.landscape),
)  # fmt: skip


def stored_file(entry: Entry) -> Path:
    kinds = [STORED / f"{entry.name}.csv.gz", STORED / f"{entry.name}.npz"]
    return next((path for path in kinds if path.exists()), kinds[0])


def collect(results: Path) -> None:
    """Take every entry's numbers from the results of its study."""
    STORED.mkdir(exist_ok=True)
    found: dict[str, Results] = {}
    for entry in ENTRIES:
        if entry.study not in found:
            study = load_study(find_study(entry.study)).with_profile("default")
            found[entry.study] = load_results(study, results, HERE)
        taken = entry.take(found[entry.study])
        if isinstance(taken, Landscape):
            taken.save(STORED / f"{entry.name}.npz")
        else:
            text = taken.to_csv(index=False, lineterminator="\n", float_format="%.9g").encode()
            # No date inside: equal numbers give equal files.
            (STORED / f"{entry.name}.csv.gz").write_bytes(gzip.compress(text, mtime=0))


def read(path: Path) -> Any:
    return Landscape.load(path) if path.suffix == ".npz" else read_frame(path)


def draw() -> None:
    """Draw every entry, and write the page that shows them."""
    captions = tomllib.loads((HERE / "captions.toml").read_text(encoding="utf-8"))
    page = ["# Gallery\n", f"{captions['gallery'].strip()}\n"]
    for entry in ENTRIES:
        with style("nature", columns=2 if entry.study == RATES else 1):
            save(entry.draw(read(stored_file(entry))), GALLERY / entry.name, ("png",), dpi=220)
        page.append(f"![{entry.name.replace('_', ' ')}]({entry.name}.png)\n\n{captions[entry.name].strip()}\n")
    (GALLERY / "README.md").write_text("\n".join(page), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="results folder of the studies, to take the numbers anew")
    options = parser.parse_args()
    if options.results is not None:
        collect(options.results)
    draw()
    print(f"{len(ENTRIES)} figures in {GALLERY}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
