"""The README's code runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_code_runs(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
    assert list(names["grads"]) == ["BPTT", "OSTL", "OTTT", "OTPE", "EProp(feedback=random)"]
    assert list(names["table"].columns) == ["rule", "layer", "metric", "value", "flag"]
    cosine, ratio = map(float, capsys.readouterr().out.split("\n")[0].split())
    assert 0 < cosine < 1
    assert ratio > 0


def test_the_readmes_pictures_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures
    assert [name for name in pictures if not (ROOT / name).is_file()] == []
