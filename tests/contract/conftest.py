"""float64 under JAX is a switch of the whole process; the contract turns it on where a test asks for float64."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _double_precision_of_jax(request: pytest.FixtureRequest) -> Iterator[None]:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("dtype") != "float64":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield
