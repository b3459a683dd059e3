"""The documentation as a site: it builds without a warning, asks no other host, and its pages work in a browser."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As make docs builds it: strict, so that a dead link or anchor is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Nobody reads it."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"""<(?:script|img|iframe|source)[^>]*\bsrc=["']?(?:https?:)?//[^"'>]+""", text)
        linked = re.findall(
            r"""<link[^>]*rel=["']?(?:stylesheet|preconnect|preload|icon)[^>]*href=["']?https?://[^>]+""", text
        )
        assert not loaded + linked, (page, loaded + linked)


def test_the_reference_has_all_public_names(site: Path) -> None:
    import evennorm.keras
    import evennorm.numpy
    import evennorm.torch

    for module in (evennorm.keras, evennorm.torch, evennorm.numpy):
        text = (site / "reference" / f"{module.__name__.split('.')[1]}.html").read_text()
        headings = set(re.findall(r"""<h\d[^>]* id=["']?evennorm[\w.]*\.(\w+)["' ]""", text))
        assert set(module.__all__) - {"legacy"} <= headings, set(module.__all__) - headings
    assert "&gt;&gt;&gt; " in (site / "reference" / "torch.html").read_text()


def seen(url: str, width: int = 1200) -> tuple[str, list[str]]:
    """The page as a browser has it once its scripts have run, and what they complained of."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--virtual-time-budget=5000"]
    run = subprocess.run(
        [BROWSER, *options, "--enable-logging=stderr", "--v=0", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("page", ["index.html", "reference/torch.html", "compare.html"])
def test_pages_run_without_an_error(address: str, page: str) -> None:
    text, complaints = seen(f"{address}/{page}", width=390)
    assert "<h1" in text
    assert complaints == []


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_an_axis_is_chosen_on_a_page(address: str) -> None:
    text, complaints = seen(f"{address}/which-axis.html")
    assert complaints == []
    figures = re.findall(r'<figure class="axis-figure" data-layout="(\d)" data-axis="(\d)"([^>]*)>', text)
    assert len(figures) == 2 + 3 + 4 + 4 + 5
    assert [(layout, axis) for layout, axis, rest in figures if "hidden" not in rest] == [("2", "3")]
