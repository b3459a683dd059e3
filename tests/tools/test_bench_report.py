"""What `evennorm bench` makes of its samples: medians, ratios, means, sentences, the file, the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evennorm.errors import InputError
from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import COPY, LIMIT, OURS
from evennorm.tools.bench.picture import draw
from evennorm.tools.bench.report import FORMAT, Benchmark, geometric_mean, read
from evennorm.tools.bench.rows import ALONE, IN_TURNS, Row
from evennorm.tools.bench.settings import Settings
from evennorm.tools.spread import Median

BIG, WIDE, TINY = Case((512, 1024)), Case((4, 256, 32, 32), "first"), Case((8, 16))


def rows(case: Case, passes: str, protocol: str = IN_TURNS, **medians: float) -> list[Row]:
    """Three samples around each median. The two eager ones are a family."""
    found = []
    for name, median in medians.items():
        family = {"relu": "eager", "relu_": "eager", "copy": LIMIT}.get(name, name)
        ours = None if name in (OURS, COPY) else OURS
        samples = (median, median * 0.9, median * 1.2)
        found.append(Row(protocol, case, passes, name, family, ours, samples, 0 if name == COPY else case.bytes))
    return found


def arrays() -> Benchmark:
    """We are ahead by 2 and 8 at the large cases, behind at the tiny one."""
    settings = Settings("numpy", (BIG, WIDE, TINY), threads=2)
    measured = [
        *rows(BIG, "both", evennorm=1.0, relu=3.0, relu_=2.0, plain=4.0, copy=0.25),
        *rows(WIDE, "both", evennorm=1.0, relu=8.0, relu_=9.0, copy=0.5),
        *rows(TINY, "both", evennorm=1.0, relu=0.8, relu_=0.9, copy=0.01),
        *rows(BIG, "both", ALONE, evennorm=1.0, relu=1.5),
        Row(IN_TURNS, WIDE, "both", "plain", "plain", OURS, reason="it has no axis 1"),
    ]
    where = {"device": "a machine", "versions": {"numpy": "2"}, "load before": 0.1}
    return Benchmark(settings, where, {"float32": "reference"}, tuple(measured))


@pytest.fixture
def found() -> Benchmark:
    return arrays()


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_median_and_quartiles(count: int) -> None:
    samples = tuple(np.random.default_rng(count).random(count).tolist())
    row = Row(IN_TURNS, TINY, "both", OURS, OURS, None, samples)
    assert (row.quartiles[0], row.median, row.quartiles[1]) == pytest.approx(np.percentile(samples, [25, 50, 75]))


def test_bandwidth_is_that_of_necessary_bytes() -> None:
    row = Row(IN_TURNS, BIG, "forward", OURS, OURS, None, (2.0,))
    assert row.bandwidth == pytest.approx(2 * 512 * 1024 * 4 / 2e-3 / 1e9)


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0, 4.0]) == pytest.approx(4.0)


def test_ratios_are_taken_to_the_best_of_a_family(found: Benchmark) -> None:
    eager, plain, alone = found.summaries()
    assert (eager.protocol, eager.family, eager.passes, eager.ours) == (IN_TURNS, "eager", "both", OURS)
    assert [(r.case, r.other, r.ratio) for r in eager.large] == [(BIG, "relu_", 2.0), (WIDE, "relu", 8.0)]
    assert [(r.case, r.other, r.ratio) for r in eager.small] == [(TINY, "relu", 0.8)]
    assert eager.mean == pytest.approx(4.0)  # tiny ones do not count
    assert eager.worst is not None
    assert eager.worst.case == BIG
    assert [r.ratio for r in plain.large] == [4.0]
    assert (alone.protocol, [r.ratio for r in alone.large]) == (ALONE, [1.5])


def test_the_time_of_a_copy_has_an_interval_beside_it() -> None:
    """Of rounds where both took turns; of both medians where the copy was timed in another pass."""
    ours = [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    copies = [each / 2 for each in ours]
    rows = [
        Row(IN_TURNS, BIG, passes, name, family, None, tuple(samples))
        for passes, name, family, samples in (
            ("forward", OURS, OURS, ours),
            ("forward", COPY, LIMIT, copies),
            ("both", OURS, OURS, [10.0] * 6),
        )
    ]
    found = Benchmark(Settings("numpy", (BIG,), threads=2), {}, {}, tuple(rows))
    assert [found.beside_limit(row) for row in rows] == [
        Median(2.0, 2.0, 2.0),
        None,
        Median(10 / 3.25, 10 / 4.5, 10 / 2.0),
    ]


def test_losses_are_told(found: Benchmark) -> None:
    eager, plain, _ = found.summaries()
    assert eager.lost() == "evennorm is slower than eager, forward + backward: 1.25 times as long at 8x16."
    assert plain.lost() is None


def test_variants_are_not_mixed() -> None:
    half = Case(BIG.shape, dtype="float16")
    settings = Settings("numpy", (BIG, half), ("forward",))
    measured = [*rows(BIG, "forward", evennorm=1.0, relu=4.0), *rows(half, "forward", evennorm=1.0, relu=1.0)]
    summaries = Benchmark(settings, {}, {}, tuple(measured)).summaries()
    assert [(s.variant, s.mean) for s in summaries] == [("", pytest.approx(4.0)), ("float16", pytest.approx(1.0))]


def test_the_limit_is_the_fastest_copy_of_any_pass(found: Benchmark) -> None:
    faster = Row(IN_TURNS, BIG, "forward", "copy, cheap pages", LIMIT, None, (0.125,))
    both = Benchmark(found.settings, found.environment, found.kernels, (*found.rows, faster))
    assert both.limit(IN_TURNS, BIG) is faster
    assert both.limit(ALONE, BIG) is None


def test_the_file_is_read_back(found: Benchmark, tmp_path: Path) -> None:
    found.write(tmp_path / "found.json")
    assert read(tmp_path / "found.json") == found
    values = json.loads((tmp_path / "found.json").read_text())
    assert values["format"] == FORMAT
    assert values["environment"]["device"] == "a machine"
    assert values["rows"][0]["median"] == 1.0
    assert values["rows"][0]["quartiles"] == [0.95, 1.1]
    assert values["summaries"][0]["geometric mean"] == 4.0


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "other"}', f'{{"format": "{FORMAT}"}}'])
def test_a_file_of_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InputError, match="evennorm bench"):
        read(tmp_path / "other.json")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json is no result of evennorm bench: .*No such file"):
        read(tmp_path / "none.json")


def test_the_picture(found: Benchmark, tmp_path: Path) -> None:
    draw(found, tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    assert [path.name for path in tmp_path.iterdir()] == ["found.png"]
    with pytest.raises(InputError, match=r"cannot write .*: No such file or directory; choose another place"):
        draw(found, tmp_path / "nowhere" / "found.png")


def test_ratios_have_intervals_and_close_ones_are_told_apart_from_lost_ones() -> None:
    """Six rounds or more; noise that both share does not count in turns, and counts where each was alone."""
    noise = (1.0, 1.3, 0.9, 1.1, 1.2, 0.8, 1.0, 1.05)
    ours = tuple(noise)
    slower = tuple(0.9 * x for x in noise)
    close = tuple(x * y for x, y in zip(noise, (0.95, 1.02, 0.97, 1.05, 0.99, 1.01, 0.93, 1.06), strict=True))

    def case_of(protocol: str, times: tuple[float, ...]) -> Benchmark:
        made = [
            Row(protocol, TINY, "both", "evennorm", OURS, None, ours),
            Row(protocol, TINY, "both", "x", "x", OURS, times),
        ]
        return Benchmark(Settings("numpy", (TINY,), ("both",)), {}, {}, tuple(made))

    decided, undecided, alone = case_of(IN_TURNS, slower), case_of(IN_TURNS, close), case_of(ALONE, slower)
    (found,) = decided.summaries()
    assert found.small[0].spread.low == pytest.approx(0.9)
    assert found.small[0].spread.high == pytest.approx(0.9)
    assert (
        found.lost(decided=True)
        == "evennorm is slower than x, forward + backward: 1.11 (1.11 to 1.11) times as long at 8x16."
    )
    assert found.undecided() is None
    for other in (undecided, alone):
        (found,) = other.summaries()
        assert found.lost(decided=True) is None
        assert found.undecided() == "No difference between evennorm and x is shown, forward + backward: at 8x16."
