"""Run `evennorm compare` once, and write its table, its picture and its time into every page that shows them.

    python benchmarks/_docs_figures.py demo
    python benchmarks/_docs_figures.py fashion-mnist [FOLDER of its four IDX files]

An interrupted run resumes: its folder, in build/docs-figures, is removed when the pages are written.

A page shows a run between the lines `<!-- NAME: written by make docs-figures -->` and `<!-- end of NAME -->`. All is written
once the command has ended well; nothing else in a page is touched.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Figure:
    """A command, the pages that show it, and its picture."""

    arguments: tuple[str, ...]
    pages: tuple[str, ...]
    picture: str


FIGURES = {
    "demo": Figure((), ("README.md", "docs/compare.md"), "docs/compare-digits.png"),
    "fashion-mnist": Figure(
        (
            *("--data", "fashion-mnist", "--placements", "none,before,after", "--learning-rates", "0.05"),
            *("--epochs", "2", "--batch-size", "128", "--max-repeats", "8"),
        ),
        ("docs/fashion-mnist.md",),
        "docs/fashion-mnist.png",
    ),
}


def main(name: str, folder: str | None = None) -> int:
    """Runs one figure's command in an empty folder and rewrites its pages."""
    figure = FIGURES[name]
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in figure.pages}
    for page, text in texts.items():
        replaced(text, name, "", page)  # before hours are spent
    arguments = [os.path.abspath(folder) if folder and part == "fashion-mnist" else part for part in figure.arguments]
    here = ROOT / "build" / "docs-figures" / name
    resumed = here.exists()
    here.mkdir(parents=True, exist_ok=True)
    begin = perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "evennorm", "compare", *arguments],
        cwd=here,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = perf_counter() - begin
    if done.returncode:
        return done.returncode
    [results] = (here / "evennorm-runs").iterdir()
    summary = json.loads((results / "summary.json").read_text())
    picture = (results / "curves.png").read_bytes()
    told = block(figure, done.stdout, summary, None if resumed else seconds)
    for page, text in texts.items():
        (ROOT / page).write_text(replaced(text, name, told, page), encoding="utf-8")
    (ROOT / figure.picture).write_bytes(picture)
    rmtree(here)
    print(f"{name}: {seconds:.0f} s; wrote {', '.join((*figure.pages, figure.picture))}")
    return 0


def block(figure: Figure, output: str, summary: dict, seconds: float | None) -> str:
    """The command, what it printed, and by what, in how long; None where the run was resumed."""
    command = " ".join(("evennorm compare", *figure.arguments))
    took = _in_words(seconds)
    device, versions = summary["device"], summary["fingerprint"]["versions"]
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    return "\n".join([f"{took}: {device}; {versions}.", "", "```console", f"$ {command}", *lines, "```"])


def _in_words(seconds: float | None) -> str:
    if seconds is None:
        return "It was interrupted and resumed"
    if seconds < 600:
        return f"It took {seconds:.0f} seconds"
    return f"It took {seconds / 60:.0f} minutes" if seconds < 7200 else f"It took {seconds / 3600:.1f} hours"


def replaced(text: str, name: str, told: str, page: str) -> str:
    """A page with the block of that name exchanged.

    Example:
        >>> replaced("a\\n<!-- x: written by make docs-figures -->\\nold\\n<!-- end of x -->\\nb", "x", "new", "page")
        'a\\n<!-- x: written by make docs-figures -->\\nnew\\n<!-- end of x -->\\nb'
    """
    begin, end = f"<!-- {name}: written by make docs-figures -->", f"<!-- end of {name} -->"
    found = re.findall(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.S)
    if len(found) != 1:
        raise SystemExit(f"{page} has {len(found)} places for {name}; it must have one, between {begin!r} and {end!r}")
    return text.replace(found[0], f"{begin}\n{told}\n{end}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
