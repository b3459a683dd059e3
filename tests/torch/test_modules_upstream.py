"""PyTorch's own inputs for its modules and its function: the same results from ours, and the same types of error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.torch.upstream import LIBRARIES, NAMES, UpstreamCase, deviations, function_cases, module_cases, outcome

CASES = {case.name: case for case in (*module_cases(), *function_cases())}
DEVIATIONS = deviations(Path(__file__).with_name("deviations.toml"), set(CASES))

BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Two roundings of a half precision; float32 sums of torch's that are not centred."""


def _marked(name: str) -> object:
    """A case that deviates has to fail; where it passes, its row is stale and the run fails."""
    marks = [pytest.mark.xfail(reason=DEVIATIONS[name], strict=True)] if name in DEVIATIONS else []
    return pytest.param(CASES[name], id=name, marks=marks)


@pytest.mark.parametrize("case", [_marked(name) for name in CASES])
def test_same_results_and_errors(case: UpstreamCase) -> None:
    theirs, own = (outcome(case, library) for library in LIBRARIES.values())
    if theirs.error is not None:
        assert isinstance(own.error, type(theirs.error)), own.error
        return
    assert own.error is None, own.error
    assert list(own.results) == list(theirs.results)
    for key, expected in theirs.results.items():
        got = own.results[key]
        bound = BOUNDS.get(expected.dtype, 0.0)
        torch.testing.assert_close(
            got, expected, rtol=bound, atol=bound, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_every_kind_of_case_is_there() -> None:
    """Of PyTorch 2.13, the version these files come from; later ones may have more."""
    for name in NAMES[:3]:
        assert sum(case.startswith(name) for case in CASES) >= 64
    assert sum(case.startswith("function") for case in CASES) >= 48


@pytest.mark.parametrize(
    "row", ['cases = ["no such case"]\nreason = "why"', f'cases = ["{next(iter(CASES))}"]\nreason = ""']
)
def test_a_row_names_its_case_and_its_reason(tmp_path: Path, row: str) -> None:
    file = tmp_path / "deviations.toml"
    file.write_text(f"[[deviation]]\n{row}\n")
    with pytest.raises(ValueError, match="every row has a reason and names cases that are there"):
        deviations(file, set(CASES))
