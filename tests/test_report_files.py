"""Tables by their text, and the HTML report by its structure."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from report_data import RULES, SILENT, results

from gradlab.analysis.similarity import summarise
from gradlab.report import html, plots, tables


@pytest.fixture(scope="module")
def summary():
    return summarise(results())


# Tables.


def test_similarity_table_has_intervals_and_warnings(tmp_path):
    table = tables.similarity_table(results(), step=30)
    row = table[(table["rule"] == "OTTT") & (table["layer"] == "network")].iloc[0]
    values = results().query("rule == 'OTTT' and layer == 'network' and metric == 'cosine' and step == 30")["value"]
    assert row["cosine"] == pytest.approx(values.mean()) and row["cosine_low"] < row["cosine"] < row["cosine_high"]
    assert row["warning"] == "" and row["seeds"] == 3
    lost = table[(table["rule"] == "OTTT") & (table["layer"] == "layer_1")].iloc[0]
    assert lost["seeds"] == 2 and lost["warning"] == f"cosine, norm_ratio undefined for 1 of 3 seeds ({SILENT})"
    dead = tables.similarity_table(results(), step=20)
    dead = dead[dead["layer"] == "layer_0"]
    assert dead["cosine"].isna().all() and dead["warning"].str.contains("layer silent in 3 seeds").all()
    assert set(tables.similarity_table(results(seeds=1))["warning"]) == {"one seed: no interval"}
    with pytest.raises(ValueError, match="the steps are 0, 10, 20, 30, 40"):
        tables.similarity_table(results(), step=7)
    csv, md, tex = tables.to_files(table, tmp_path / "table")
    assert pd.read_csv(csv)["cosine_low"].iloc[1] == table["cosine_low"].iloc[1]
    assert md.read_text().count("\n") == len(table) + 2 and "0.8" in md.read_text()
    assert r"\toprule" in tex.read_text() and r"layer\_1" in tex.read_text()


def test_training_table_warns_of_silent_outputs():
    table = tables.training_table(results(RULES)).set_index("train_rule")
    assert table.loc["SLTT", "warning"] == "silent outputs: accuracy does not compare"
    assert table.loc["OTTT", "warning"] == "" and table.loc["OTTT", "accuracy"] == pytest.approx(0.2 + 40 / 60)
    with pytest.raises(ValueError, match="none of the metrics speed"):
        tables.training_table(results(), metrics=["speed"])


@pytest.mark.parametrize(("numbers", "text"), [
    ((0.91234, 0.8834, 0.9412), "0.912 [0.883, 0.941]"),
    ((12.3, 2.0, 22.6), "12 [2, 23]"),
    ((1.0, 1.0, 1.0), "1 (all seeds)"),
    ((0.5, np.nan, np.nan), "0.5"),
    ((np.nan, np.nan, np.nan), "undefined"),
    ((2.5e-7, 1e-7, 4e-7), "2.50e-07 [1.00e-07, 4.00e-07]"),
])  # fmt: skip
def test_numbers_have_sensible_digits(numbers, text):
    assert tables.interval_text(*numbers) == text


def test_text_is_escaped_for_its_format():
    table = pd.DataFrame({"rule": ["[A]_1 & 50% {x} \\ ~^<#$ | b"], "value": [0.5]})
    assert r"\[A\]" not in tables.latex(table)
    assert (
        r"{}[A]\_1 \& 50\% \{x\} \textbackslash{} \textasciitilde{}\textasciicircum{}\textless{}\#\$ | b"
        in tables.latex(table)
    )
    assert r"\\ ~^<#$ \| b | 0.5 |" in tables.markdown(table)


# HTML.


class Page(HTMLParser):
    """Collects tags; fails on tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_report_is_one_file_that_asks_for_nothing(tmp_path, summary):
    nasty = "<script>alert('x')</script> & \"quotes\""
    figure = plots.similarity_trace(summary)
    inner = html.Section("Details", [html.Listing("a < b\n", nasty), html.Listing("c > d")])
    blocks = [
        nasty,
        html.Figure(figure, f"caption {nasty}"),
        html.Table(tables.similarity_table(results(), 30), nasty),
        inner,
    ]
    sections = [html.Section("Results", blocks), html.Section("Results", [html.Facts({nasty: nasty})])]
    path = html.write_report(tmp_path / "report.html", nasty, sections, subtitle=nasty, provenance={"jax": "1.2"})
    page = read(path)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & set(names)
    for _, attributes in page.tags:
        assert not {"onclick", "onerror", "onload"} & set(attributes)
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,"))
    assert "http://" not in path.read_text() and "https://" not in path.read_text() and "url(" not in path.read_text()
    anchors = [a["id"] for tag, a in page.tags if tag == "section"]
    links = [a["href"][1:] for tag, a in page.tags if tag == "a"]
    assert anchors == links == ["results", "details", "results-2", "provenance"]
    said = "".join(page.text)
    assert said.count(nasty) == 9 and "a < b" in said and "undefined for 1 of 3 seeds" in said
    assert names.count("img") == 1 and [a["alt"] for tag, a in page.tags if tag == "img"] == [f"caption {nasty}"]


def test_equal_reports_have_equal_bytes_and_bad_blocks_are_refused(tmp_path):
    sections = [html.Section("One", ["text"])]
    first = html.write_report(tmp_path / "a" / "r.html", "T", sections).read_bytes()
    assert html.write_report(tmp_path / "b" / "r.html", "T", sections).read_bytes() == first
    assert html.write_report(tmp_path / "c" / "r.html", "U", sections).read_bytes() != first
    with pytest.raises(TypeError, match="not int"):
        html.write_report(tmp_path / "r.html", "T", [html.Section("One", [3])])
    with pytest.raises(TypeError, match="PNG"):
        html.write_report(tmp_path / "r.html", "T", [html.Section("One", [html.Figure(b"GIF89a", "x")])])
    assert not (tmp_path / "r.html").exists()
