"""The last sections of a study's report: health, refusals, how to run it again, with what it was computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradlab.report.html import Section
    from gradlab.study.summary import Results

__all__ = ["health", "how_to_rerun", "provenance_facts", "refusals"]

_HEALTH = ("firing_rate", "silent_units", "saturated_units", "slope")


def health(found: Results) -> Section | None:
    """Return whether the layers are alive."""
    from gradlab.analysis.similarity import summarise
    from gradlab.report import tables
    from gradlab.report.html import Section, Table

    rows = found.frame[(found.frame["rule"] == "") & found.frame["metric"].isin(_HEALTH)]
    if rows.empty:
        return None
    steps = [rows["step"].min(), rows["step"].max()]
    summary = summarise(rows[rows["step"].isin(steps)])
    keys = ["network", "train_rule", "layer", "step"]
    table = summary.pivot_table("mean", keys, "metric", sort=False, dropna=False).reset_index()
    table = table.dropna(subset=[name for name in _HEALTH if name in table.columns], how="all")
    table.columns.name = None
    tables.to_files(table, found.root / "tables" / "health")
    text = (
        "A layer that is silent, or fires at every step, has a surrogate slope near zero and passes hardly "
        "any gradient; similarities there say little. Firing rate is spikes per unit and step; silent and "
        "saturated units are shares of units that never, or always, fire on the held-out batch; slope is "
        "the mean surrogate slope."
    )
    return Section("Are the layers alive?", [text, Table(table, "Before and after training, mean over seeds.")])


def refusals(found: Results) -> Section | None:
    """Return which rules were compared on few samples or not at all, and why."""
    from gradlab.report.html import Section, Table

    checks = found.study.spot_checks
    if found.refusals.empty and not checks:
        return None
    blocks: list[Any] = []
    if checks:
        shown = ", ".join(f"{check.rule.name} on {check.samples} samples" for check in checks)
        blocks.append(f"Compared at the first and the last probe only, because of their cost: {shown}.")
    if found.refusals.empty:
        blocks.append("No rule refused the network or the loss.")
    else:
        blocks.append(Table(found.refusals, "Rules that were not compared, in their own words."))
    return Section("Spot checks and refusals", blocks)


def how_to_rerun(found: Results, spec: str) -> Section:
    """Return how to run it again, how to cite it, and where everything is."""
    from gradlab.report.html import Facts, Listing, Section

    rules = {rule.name: rule for rule in (*found.study.compared, *found.study.trained, found.study.reference)}
    sources = {name: getattr(rule, "reference", "") or "no source given" for name, rule in rules.items()}
    places = {
        "results": found.root,
        "tables": found.root / "tables",
        "figures": found.figures,
        "specification": found.root / "spec.json",
    }
    return Section(
        "Run it again, cite it",
        [
            "The specification holds all that the numbers depend on. On the same processor and with the "
            "same versions the numbers come out equal, byte for byte:",
            Listing(f"gradlab rerun {found.root / 'spec.json'}"),
            Facts(places),
            "Cite gradlab as its file CITATION.cff says, with the version under Provenance, and the "
            "sources of the rules:",
            Facts(sources),
            Listing(spec, "The specification"),
        ],
    )


def provenance_facts(found: Results) -> dict[str, object]:
    """Return versions, devices and times of the stored cells; what differs between cells is said."""
    stored = [manifest["provenance"] for manifest in found.manifests.values()]
    facts: dict[str, object] = {}
    for name in (
        "revision",
        "source",
        "devices",
        "processor",
        "visible_cores",
        "flags",
        "x64",
        "matmul_precision",
    ):
        values = list(dict.fromkeys(str(entry.get(name)) for entry in stored))
        facts[name.replace("_", " ")] = values[0] if len(values) == 1 else "DIFFERENT: " + " | ".join(values)
    versions = list(dict.fromkeys(_pairs(entry["versions"]) for entry in stored))
    facts["versions"] = versions[0] if len(versions) == 1 else "DIFFERENT: " + " | ".join(versions)
    for name, manifest in found.manifests.items():
        again = ", taken up again after it was cut off" if manifest["resumed"] else ""
        facts[f"cell {name}"] = f"{manifest['times']['ended']}, {manifest['times']['seconds']:.0f} s{again}"
    return facts


def _pairs(mapping: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(mapping.items()))
