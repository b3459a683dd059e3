"""A small data set for `evennorm compare`, and one comparison of it that ran through, for all files that look at it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

# Imported inside the fixtures: it loads Keras, which most tests here do not need.
pytest.register_assert_rewrite("tests.tools.comparing")


@pytest.fixture(scope="session")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points in the plane, in two classes that a small network tells apart; the network lies beside them."""
    from tests.tools import comparing

    return comparing.write_points(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(points: Path) -> Iterator[str]:
    """The points, with their network where Python finds it."""
    from tests.tools import comparing

    with comparing.importable(points.parent):
        yield str(points)


@pytest.fixture(scope="session")
def finished(points: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One comparison that ran through, with what it printed."""
    from tests.tools import comparing

    out = tmp_path_factory.mktemp("finished") / "results"
    with comparing.importable(points.parent):
        result = comparing.command(str(points), out)
    assert result.exit_code == 0, result.output
    return out, result
