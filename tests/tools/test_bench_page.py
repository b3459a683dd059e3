"""docs/kernels.md: what `benchmarks/kernels.py` measures, and the page that it writes from the results."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from evennorm.errors import InputError
from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import COPY, LIMIT, OURS
from evennorm.tools.bench.report import Benchmark
from evennorm.tools.bench.rows import ALONE, IN_TURNS, Row
from evennorm.tools.bench.settings import Settings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        import kernels

        return kernels


def test_the_plan_has_every_shape_in_both_layouts_and_a_few_variants(kernels: ModuleType) -> None:
    plan = kernels.plan("torch")
    usual = [case for case in plan.cases if not case.variant]
    assert len(usual) == len(set(usual)) == 2 * 8 + 2  # of ten with two layouts, two are another two; two have two axes
    assert {case.variant for case in plan.cases} == {"", "residual", "no activation", "bfloat16"}
    assert plan.each_alone
    assert {case.variant for case in kernels.plan("numpy").cases} >= {"float16"}


def test_the_page(kernels: ModuleType, tmp_path: Path) -> None:
    big, tiny = Case((32, 14, 14, 256)), Case((8, 16))
    medians = {
        (IN_TURNS, big): {OURS: 2.0, "their op": 8.0, COPY: 1.6},
        (IN_TURNS, tiny): {OURS: 0.02, "their op": 0.01, COPY: 0.001},
        (ALONE, big): {OURS: 2.0, "their op": 6.0},
        (ALONE, tiny): {OURS: 0.02, "their op": 0.03},
    }
    rows = tuple(
        Row(
            protocol,
            case,
            "both",
            name,
            LIMIT if name == COPY else name,
            OURS if name == "their op" else None,
            (median,),
            2 * case.bytes if name == "their op" else None,
        )
        for (protocol, case), them in medians.items()
        for name, median in them.items()
    )
    settings = Settings("numpy", (big, tiny), ("both",), threads=2, each_alone=True)
    where = {"device": "a machine", "versions": {"numpy": "2.0"}, "commit": "abc", "load before": 0.1}
    found = Benchmark(settings, where, {"float32": "reference"}, rows)
    text = kernels.page([found], kernels.draw_pictures([found], tmp_path))
    assert (tmp_path / "kernels-numpy.png").exists()
    lines = text.replace("(spread unknown)", "(?)").splitlines()
    for line in (
        "a machine, 2 threads, load average before 0.1, commit abc. Kernels of evennorm: float32: reference.",
        "| their op | float32, ReLU | forward + backward | 4.00 (?) | 4.00 (?) at 32x14x14x256 | 3.00 (?) "
        "| 3.00 (?) at 32x14x14x256 |",
        "| their op | float32, ReLU | forward + backward |  | 0.50 (?) at 8x16 | | 1.50 (?) at 8x16 |",
        "- evennorm is slower than their op, forward + backward: 2.00 times as long at 8x16.",
        "![bandwidth of all layers on numpy for each shape](kernels-numpy.png)",
        "| shape | pass | evennorm | their op | copy | evennorm / copy |",
        "| 32x14x14x256 | forward + backward | 2 | 8 | 1.6 | 1.25 (?) |",
        "| 8x16 | forward + backward | 0.02 | 0.01 | 0.001 | - |",
        "| their op | 2.00 |",
        "Measured on a machine, with numpy 2.0.",
    ):
        assert line in lines, f"{line}\n{text}"


def test_the_pages_say_what_the_results_do(kernels: ModuleType) -> None:
    """docs/kernels.md, and the table in README.md."""
    paths = [kernels.RESULTS / f"kernels-{engine}.json" for engine in kernels.ENGINES]
    results = [kernels.read(path) for path in paths if path.exists()]
    pictures = {found.settings.engine: f"kernels-{found.settings.engine}.png" for found in results}
    assert kernels.PAGE.read_text() == kernels.page(results, pictures)
    assert all((kernels.PAGE.parent / name).exists() for name in pictures.values())
    assert "\n".join(kernels.headline(results)) in (kernels.ROOT / "README.md").read_text()


def test_one_family_measured_anew_takes_the_place_of_its_rows(kernels: ModuleType) -> None:
    case = Case((32, 14, 14, 256))

    def rows(**medians: float) -> tuple[Row, ...]:
        families = {"copy": LIMIT}
        return tuple(
            Row(IN_TURNS, case, "both", name, families.get(name, name), None, (median,)) for name, median in medians.items()
        )

    settings = Settings("torch", (case,), ("both",))
    where = {"device": "a machine", "versions": {"torch": "2.13"}, "commit": "abc"}
    old = Benchmark(settings, where, {}, rows(ours=1.0, layer=3.0, copy=0.5))
    new = Benchmark(settings, {**where, "commit": "def"}, {}, rows(module=1.5, layer=4.0, copy=0.9))
    found = kernels.renewed(old, new)
    assert {row.contestant: row.median for row in found.rows} == {"ours": 1.0, "copy": 0.5, "module": 1.5, "layer": 4.0}
    assert found.environment["commit"] == "abc (module and layer: def)"
    with pytest.raises(InputError, match=r"that have the same versions: {'torch': '2.13'}; received {'torch': '2.14'}"):
        kernels.renewed(old, Benchmark(settings, {**where, "versions": {"torch": "2.14"}}, {}, ()))
