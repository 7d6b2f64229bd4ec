"""The gallery: every figure has its stored numbers, its picture and its caption."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", FIGURES / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_numbers_pictures_and_captions_belong_together(gallery):
    names = [entry.name for entry in gallery.ENTRIES]
    captions = tomllib.loads((FIGURES / "captions.toml").read_text(encoding="utf-8"))
    page = (FIGURES / "gallery" / "README.md").read_text(encoding="utf-8")
    assert len(names) == len(set(names)) >= 12
    assert set(captions) == {"gallery", *names}
    stored = {path.name.split(".")[0] for path in (FIGURES / "stored").iterdir()}
    assert stored == set(names)
    for name in names:
        assert (FIGURES / "gallery" / f"{name}.png").is_file(), name
        assert captions[name].strip() in page and len(captions[name]) > 100, name


@pytest.mark.parametrize("name", ["shares", "lags", "descent"])
def test_a_figure_is_drawn_from_its_stored_numbers(gallery, name):
    entry = next(entry for entry in gallery.ENTRIES if entry.name == name)
    frame = gallery.read(gallery.stored_file(entry))
    assert frame["value"].notna().any() and frame["value"].isna().eq(frame["flag"] != "").all()
    ax = entry.draw(frame)
    legend = ax.get_legend() or ax.get_figure().legends[0]
    shown = {text.get_text() for text in legend.get_texts()} | {text.get_text() for text in ax.get_yticklabels()}
    assert any("OTPE" in text for text in shown) and ax.get_xlabel()
