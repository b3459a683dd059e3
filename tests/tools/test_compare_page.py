"""The page of a comparison: what it says, and that a real browser draws it, from a comparison that nobody trained."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from evennorm.cli import main
from evennorm.cli.compare import compare as command_line
from evennorm.tools.compare import settings_for
from evennorm.tools.compare.best import Best, Choice
from evennorm.tools.compare.page import command, page
from evennorm.tools.compare.page_charts import groups
from evennorm.tools.compare.page_plotly import drawn
from evennorm.tools.compare.report import PAGE, Comparison
from evennorm.tools.compare.search import Found
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.train import Record

ENDS = {
    ("none", 0.005): 0.62,
    ("none", 0.2): 0.21,
    ("before", 0.005): 0.95,
    ("before", 0.2): 0.93,
    ("after", 0.005): 0.945,
    ("after", 0.2): 0.9,
    ("input", 0.005): 0.8,
    ("input", 0.2): 0.1,
}
EPOCHS = 5


def settings(out, **changes):
    values = {
        "data": "digits",
        "model": "article-cnn",
        "placements": ("none", "before", "after", "input"),
        "repeats": 5,
        "learning_rates": (0.005, 0.2),
        "epochs": EPOCHS,
        "batch_size": 32,
        "engine": "jax",
        "seed": 0,
        "out": str(out),
    }
    return Settings(**values | changes)


def record(end, random, unit=True):
    way = 0.1 + (end - 0.1) * (1 - np.exp(-np.arange(1, EPOCHS + 1) / 1.5)) / (1 - np.exp(-EPOCHS / 1.5))
    curve = (way + random.normal(0, 0.01, EPOCHS)).clip(0, 1).tolist()
    center = np.cumsum(random.normal(0, 0.4, EPOCHS))
    return Record(
        test_accuracy=curve,
        test_loss=[1.0] * EPOCHS,
        train_accuracy=[min(1.0, value + 0.02) for value in curve],
        train_loss=[1.0] * EPOCHS,
        seconds=[2.0, 0.3, 0.3, 0.3, 0.3],
        validation_accuracy=curve[-1],
        diverged=False,
        learned=end > 0.15,
        unit_input=[[at - 1, at, at + 1.2] for at in center] if unit else [],
    )


def fabricated(out, unit=True, **changes):
    given = settings(out, **changes)
    random = np.random.default_rng(3)
    records = {run: record(ENDS[run.placement, run.learning_rate], random, unit) for run in given.runs}
    words = "digits: 1151 training, 287 validation and 359 test samples of 8 x 8 x 1, 10 classes"
    fingerprint = {"data": "digits (ab2f)", "model": "article-cnn (1234)", "versions": "evennorm 0.1.0, keras 3.15.1"}
    made = Comparison.of(given, words, fingerprint, "jax on cpu; 2 cores", records, 1 / 359)
    choice = Choice("before", 0.005, EPOCHS, 0.95, "by the mean validation accuracy of its repeats")
    finding = {"code": "BN201", "level": "warning", "layer": "norm<1>", "what": "variance < epsilon"}
    return replace(made, best=Best(("best.keras",), choice, 0, 1438, 0.953, 0.925, 0.972, 359, [finding]))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return fabricated(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def text(comparison):
    return page(comparison)


def without_library(text):
    """The page without plotly's own code."""
    from plotly.offline import get_plotlyjs

    assert text.count(get_plotlyjs()) == 1
    return text.replace(get_plotlyjs(), "")


def test_the_page_says_what_the_summary_says(comparison, text):
    ours = without_library(text)
    for line in comparison.verdict.splitlines():
        assert line in ours
    for row in comparison.table:
        assert f"<td>{100 * row.test_accuracy:.1f}</td><td>{100 * row.low:.1f} to {100 * row.high:.1f}</td>" in ours
    assert "keras 3.15.1" in ours
    assert command(comparison.settings) in ours
    assert "BN201 warning: norm&lt;1&gt;: variance &lt; epsilon" in ours
    assert "95.3 % (92.5 to 97.2), of 359 samples" in ours


def test_a_notebook_shows_the_verdict_and_the_table(comparison):
    hostile = replace(comparison, data="<script>alert(1)</script>")
    shown = hostile._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert all(line in shown for line in comparison.verdict.splitlines())
    assert shown.count("<tr>") == 1 + len(comparison.table)
    assert all(f">{100 * row.low:.1f} to {100 * row.high:.1f}</td>" in shown for row in comparison.table)


def test_figures_hold_the_numbers_of_the_comparison(comparison):
    curves, forest, tolerance, drift = groups(comparison)
    [before] = [series for series in curves.charts[0].series if series.name == "before"]
    runs = [record for run, record in comparison.records.items() if run[:2] == ("before", 0.005)]
    assert before.y == pytest.approx(100 * np.mean([run.test_accuracy for run in runs], axis=0))
    row = next(row for row in comparison.table if (row.placement, row.learning_rate) == ("before", 0.005))
    assert (before.low[-1], before.high[-1]) == pytest.approx((100 * row.low, 100 * row.high))
    points = {
        forest.charts[0].y_names[place]: (x, low, high)
        for series in forest.charts[0].series
        for x, place, low, high in zip(series.x, series.y, series.low, series.high, strict=True)
    }
    assert points == {
        f"{pair.better} – {pair.worse}": tuple(  # noqa: RUF001
            pytest.approx(100 * value) for value in (pair.difference, pair.low, pair.high)
        )
        for pair in comparison.differences
    }
    assert [list(series.x) for series in tolerance.charts[0].series] == [[0.005, 0.2]] * 4
    first = comparison.records[Run("none", 0.005, 0)].unit_input
    assert list(drift.charts[0].series[0].y) == [middle for _, middle, _ in first]


def test_bars_end_where_the_intervals_end(comparison):
    forest = groups(comparison)[1].charts[0]
    for series, trace in zip(forest.series, drawn(forest)["data"], strict=True):
        ends = np.array(trace["x"]) - trace["error_x"]["arrayminus"], np.array(trace["x"]) + trace["error_x"]["array"]
        np.testing.assert_allclose(ends, (series.low, series.high))


def test_what_was_not_recorded_is_left_out(tmp_path):
    made = fabricated(tmp_path, unit=False, learning_rates=(0.005,), repeats=1, placements=("none", "before"))
    found = replace(made, best=None, search=Found("mix:bn", {}, 3, ["mix:bn normalizes before a; not b"]))
    assert [group.title for group in groups(found)] == ["Learning curves", "Paired differences"]
    ours = without_library(page(found))
    assert "best.keras" not in ours
    assert "mix:bn normalizes before a; not b" in ours
    assert "One repeat tells nothing about chance" in ours


def test_one_placement_and_a_metric_of_another_unit(tmp_path):
    made = fabricated(
        tmp_path, placements=("before",), learning_rates=(0.005,), task="regression", metric="mean_absolute_error"
    )
    ours = without_library(page(made))
    assert "Only before was trained" in ours
    assert "test mean absolute error" in ours
    assert "Paired differences" not in ours


def test_values_that_are_not_finite_are_gaps_and_still_json(tmp_path):
    made = fabricated(tmp_path, metric="mean_squared_error", task="regression")
    for record in made.records.values():
        record.test_accuracy[2] = float("inf")
    table = [replace(row, test_accuracy=float("nan"), low=None, high=None) for row in made.table]
    ours = without_library(page(replace(made, table=table)))
    assert not re.search(r"[:,\[ ](NaN|-?Infinity)[,\] }]", ours)


def test_names_of_the_users_are_text_and_no_markup(tmp_path):
    made = fabricated(tmp_path)
    evil = "<img src=x onerror=alert(1)>\x1b[2J"
    given = replace(made.settings, data=evil, model=evil, metric=f"$a_{evil}accuracy")
    ours = without_library(page(replace(made, settings=given, data=evil, device="</script>", fingerprint={evil: evil})))
    assert "<img" not in ours
    assert "\x1b" not in ours
    assert ours.count("<script") == ours.count("</script>")


def test_nothing_is_asked_for_from_outside(text):
    ours = without_library(text)
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//""", ours)
    assert not re.search(r"url\((?!#)|@import|<link|<iframe|fetch\(", ours)
    assert "default-src 'none'" in ours


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sequential": True, "repeats": 20, "until_flat": True, "epochs": 40, "study": "my study"},
        {"learning_rates": (1e-5, 0.1 + 0.2), "equivalent": 0.03, "advantages": True, "data": "my data.npz"},
        {"task": "regression", "metric": "my_cost:min", "equivalent": 0.25, "placements": ("none", "before:layer")},
        {"search": 12, "placements": ("mix:b2n", "none", "before")},
        {"storage": "postgresql://me@host/db", "seed": 7},
    ],
)
def test_the_command_of_the_page_comes_to_the_same_settings(tmp_path, changes):
    given = settings(tmp_path, **changes)
    context = command_line.make_context("compare", shlex.split(command(given))[2:])
    options = {name: value for name, value in context.params.items() if value is not None}
    names = ("jobs", "force", "show", "as_json", "no_model", "worker", "serve")
    options = {name: value for name, value in options.items() if name not in names}
    options |= {"placements": options["placements"].split(","), "norms": options["norms"].split(",")}
    options["learning_rates"] = list(map(float, options["learning_rates"].split(",")))
    options = {name: options.get(name) for name in ("repeats", "storage", "equivalent", "device")} | options
    found = settings_for(**options)
    assert found == replace(given, placements=tuple(name for name in given.placements if not name.startswith("mix:")))


def test_a_password_is_not_on_the_page(tmp_path):
    made = fabricated(tmp_path)
    given = replace(made.settings, storage="postgresql://me:secret@host/db")
    assert "secret" not in without_library(page(replace(made, settings=given)))


def test_results_hold_the_page(comparison):
    comparison.write()
    assert PAGE in comparison.as_dict()["files"]
    assert "article-cnn on digits" in Path(comparison.settings.out, PAGE).read_text("utf-8")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH; .ci/services installs it")


def browse(page, folder, *flags):
    """The page as a browser leaves it, and what it has logged."""
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"),
            *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000", "--dump-dom", *flags, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(folder)},
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_a_browser_draws_every_figure_and_complains_of_nothing(comparison, text, tmp_path):
    path = tmp_path / PAGE
    path.write_text(text, encoding="utf-8")
    dom, console = browse(path, tmp_path)
    assert console == []
    charts = sum(len(group.charts) for group in groups(comparison))
    plots = re.findall(r'<div class="live js-plotly-plot" id="([\w-]+)"', dom)
    assert len(plots) == charts == 8
    assert dom.count('class="main-svg"') >= charts
    assert dom.count('class="trace scatter') == sum(
        len(drawn(chart)["data"]) for group in groups(comparison) for chart in group.charts
    )
    assert 'class="drawn"' in dom


@needs_browser
def test_nothing_is_wider_than_a_phone(text, tmp_path):
    """In a frame of that width, as browsers take no window that is so narrow; the page tells its width to the frame's."""
    told = "<script>parent.postMessage(document.documentElement.scrollWidth + ' of ' + innerWidth, '*')</script></body>"
    (tmp_path / PAGE).write_text(text.replace("</body>", told), encoding="utf-8")
    (tmp_path / "phone.html").write_text(
        "<body><script>addEventListener('message', (event) => { document.title = event.data })</script>"
        f'<iframe src="{PAGE}" width="390" height="800" style="border: 0"></iframe>'
    )
    dom, _ = browse(tmp_path / "phone.html", tmp_path, "--hide-scrollbars")
    assert "<title>390 of 390</title>" in dom


@needs_browser
def test_a_page_whose_script_fails_shows_the_still_figures(text, tmp_path):
    path = tmp_path / PAGE
    path.write_text(text.replace("function draw() {", "function draw() { throw new Error('no');"), encoding="utf-8")
    dom, console = browse(path, tmp_path)
    assert len(console) == 1
    assert 'class="drawn"' not in dom
    assert dom.count('<div class="still"><svg') == 8


def test_open_shows_the_page(tmp_path, comparison, monkeypatch):
    """The command with a comparison that is there already, in a browser that can be opened, and where there is none."""
    opened, answers = [], [0, 1]
    monkeypatch.setattr("click.launch", lambda url: opened.append(url) or answers.pop(0))
    monkeypatch.setattr("evennorm.tools.compare.compare", lambda **options: comparison)
    shown = [CliRunner().invoke(main, ["compare", "--out", str(tmp_path), "--open", "--json"]) for _ in range(2)]
    place = Path(comparison.settings.out, PAGE)
    assert opened == [place.resolve().as_uri()] * 2
    assert [done.exit_code for done in shown] == [0, 0]
    assert [done.stderr for done in shown] == ["", f"evennorm: no browser could be opened; the page is {place}\n"]


def test_a_foreign_file_in_the_place_of_the_page_is_not_overwritten(tmp_path):
    (tmp_path / PAGE).write_text("my own notes")
    done = CliRunner().invoke(main, ["compare", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "report.html' exists and is no HTML page" in done.stderr
    assert (tmp_path / PAGE).read_text() == "my own notes"
