"""The layers that `evennorm bench` measures compute the values of float64, in the passes that are timed."""

import keras
import pytest

from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import KERAS, OUR_LAYER
from tests.tools.test_bench_contestants import CASES, check

ENGINE = keras.config.backend()
LAYERS = [case for case in CASES if case.dtype == "float32"]
HALF = [case for case in CASES if case.dtype in ("bfloat16", "float16")]


@pytest.mark.skipif(ENGINE == "numpy", reason="Keras does not train on NumPy")
@pytest.mark.parametrize("case", [*LAYERS, *HALF], ids=str)
@pytest.mark.parametrize("name", [KERAS, OUR_LAYER])
def test_the_values(name: str, case: Case) -> None:
    check(ENGINE, name, case)
