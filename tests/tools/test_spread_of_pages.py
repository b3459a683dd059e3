"""Every ratio of times on a page stands beside its interval, or beside the words that it has none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("kernels", "limits", "networks", "performance", "scaling", "gpu")))
RATIO = re.compile(r" / |^ratio$|share$|mean$|^worst$|^times|bandwidth$|^difference$")
"""Headers of columns that compare times."""
FIGURE = re.compile(r"-?[\d.,]+(?: %)? \(-?[\d.,]+ to -?[\d.,]+\)|[\d.,]+(?: %)? \(spread unknown\)")
SENTENCE = re.compile(r"(\S+) times (?:as (?:long|fast|many)|what the model)")


def bare(text: str) -> list[str]:
    """Ratios of times without an interval, in the tables and sentences of a page."""
    found: list[str] = []
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            found += [line for before in SENTENCE.findall(line) if re.search(r"\d", before) and not before.endswith(")")]
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = [cell.rpartition(": ")[2] for cell in cells]
        elif not set(line) <= set("|-: "):
            for name, cell in zip(header, cells, strict=False):
                if RATIO.search(name) and re.search(r"\d", cell) and not FIGURE.match(cell):
                    found.append(f"{name}: {cell}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_no_ratio_without_its_interval(page: str) -> None:
    """The pages are what their scripts write: tests beside this one hold them to that."""
    assert not bare((ROOT / page).read_text())


def test_what_is_found() -> None:
    assert bare("| x | a / b |\n| --- | --- |\n| 3 | 1.22 |") == ["a / b: 1.22"]
    assert bare("| in turns: mean | worst |\n| --- | --- |\n| 3.9 | 1.0 (0.9 to 1.1) at 8x16 |") == ["mean: 3.9"]
    assert bare("it takes 1.5 times as long") == ["it takes 1.5 times as long"]
    assert bare("it takes 1.5 (1.2 to 1.9) times as long, and four times as many bytes") == []
    assert bare("| x | evennorm's share |\n| --- | --- |\n| 3 | 10 % |\n| 4 | 10 % (8 to 12) |") == [
        "evennorm's share: 10 %"
    ]
