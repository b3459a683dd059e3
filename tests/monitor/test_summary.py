"""The numbers of a summary, against NumPy's own."""

import numpy as np
import pytest

from evennorm import BatchNormState
from evennorm.monitor import summary


@pytest.mark.parametrize("values", [[3.0], [4.0, 1.0], [5.0, -2.0, 7.0], [1.0, np.nan, 2.0], [np.inf, 1.0, -np.inf, 0.5]])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_minimum_median_and_maximum_are_those_of_numpy(values: list[float], dtype: str) -> None:
    array = np.array(values, dtype)
    found = summary(state := BatchNormState("bn", 0.0, 0.9, beta=array, mean=array, variance=array), state)
    for name in ("beta", "moving_mean", "moving_variance"):
        for part in ("min", "median", "max"):
            np.testing.assert_array_equal(found[f"{name}_{part}"], float(getattr(np, part)(array.astype("float64"))))
