"""Take a picture of the page of a comparison, for docs/report.md.

    evennorm compare
    python benchmarks/_page_picture.py evennorm-runs/digits-article-cnn-jax/report.html docs/report.png

Needs chromium or google-chrome on the path.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

WIDTH, HEIGHT, SHOWN = 1100, 1960, 800
"""Pixels of the window, and the picture's width in the docs."""


def main(page: str, picture: str) -> int:
    """Draws the top of the page as a browser does, smaller and in few colours, so that the file is small."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no chromium or google-chrome on PATH; install one, as .ci/services does")
    with TemporaryDirectory() as folder:
        taken = Path(folder, "page.png")
        subprocess.run(
            [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"),
                *("--hide-scrollbars", "--virtual-time-budget=10000", f"--window-size={WIDTH},{HEIGHT}"),
                *(f"--screenshot={taken}", Path(page).resolve().as_uri()),
            ],
            check=True,
            capture_output=True,
        )
        with Image.open(taken) as image:
            smaller = image.convert("RGB").resize((SHOWN, HEIGHT * SHOWN // WIDTH), Image.Resampling.LANCZOS)
    few = smaller.quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)  # which keeps thin coloured lines
    few.save(picture, optimize=True)
    print(f"wrote {picture}, {Path(picture).stat().st_size // 1024} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
