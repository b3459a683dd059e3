"""What `evennorm bench` measures: shapes from text, layouts, combinations, bytes, and what it refuses."""

import pytest

from evennorm.errors import InputError
from evennorm.tools.bench.cases import SETS, Case, cases, parsed_shapes, with_layout
from evennorm.tools.bench.settings import Settings


def test_shapes_are_read_as_they_lie_in_memory() -> None:
    assert parsed_shapes("32x56x56x64, 8x64x7x7:first,4x5:last") == [
        ((32, 56, 56, 64), "last"),
        ((8, 64, 7, 7), "first"),
        ((4, 5), "last"),
    ]


@pytest.mark.parametrize("name", SETS)
def test_lists_with_a_name(name: str) -> None:
    found = cases(name)
    assert [case.place for case in found] == list(SETS[name])
    channels_first = [case.channels for case in found if case.layout == "first"]
    assert channels_first == ([64, 32, 256, 2048, 512, 128] if name == "all" else [])


@pytest.mark.parametrize(
    "text", ["", "8", "8x", "8x0", "8x-1", "8x16:middle", "8x16;4x4", "8x16,", "eightx2", "8x16x99999999999"]
)
def test_a_shape_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="shapes are sizes as they lie in memory, batch first") as refused:
        parsed_shapes(text)
    assert repr(text.split(",")[-1]) in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "layout", "wanted", "expected"),
    [
        ((2, 3, 4, 5), "last", "first", ((2, 5, 3, 4), "first")),
        ((2, 5, 3, 4), "first", "last", ((2, 3, 4, 5), "last")),
        ((2, 3, 4, 5), "last", "last", ((2, 3, 4, 5), "last")),
        ((2, 7, 3), "first", "last", ((2, 3, 7), "last")),
        ((2, 3), "first", "first", ((2, 3), "last")),
    ],
)
def test_the_channels_move(shape: tuple[int, ...], layout: str, wanted: str, expected: tuple) -> None:
    assert with_layout(shape, layout, wanted) == expected


def test_every_combination_once() -> None:
    found = cases("4x5,2x3x5", ["last", "first"], ["float32", "float64"], ["relu", "none"], ["no", "yes"])
    assert len(found) == len(set(found)) == 3 * 2 * 2 * 2  # two axes have one layout
    assert found[:3] == [Case((4, 5)), Case((2, 3, 5)), Case((2, 5, 3), "first")]
    assert str(found[-1]) == "2x5x3:first, float64, no activation, residual"


@pytest.mark.parametrize(
    ("case", "forward", "both"),
    [
        (Case((4, 5)), 2, 5),
        (Case((4, 5), activation="none"), 2, 5),
        (Case((4, 5), residual=True), 3, 7),
        (Case((4, 5), activation="none", residual=True), 3, 6),  # the residual's gradient is dy itself
    ],
)
def test_necessary_bytes_are_those_of_every_array_once(case: Case, forward: int, both: int) -> None:
    assert (case.necessary_bytes("forward"), case.necessary_bytes("both")) == (forward * 80, both * 80)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"layouts": ["middle"]}, "layouts: one or more of last, first; received 'middle'"),
        ({"dtypes": ["int8"]}, "dtypes: one or more of float32, float64, bfloat16, float16; received 'int8'"),
        ({"dtypes": []}, "received none"),
        ({"activations": ["gelu"]}, "activations: one or more of none, relu; received 'gelu'"),
        ({"residuals": ["maybe"]}, "residual: one or more of no, yes; received 'maybe'"),
    ],
)
def test_words_that_are_none(words: dict, text: str) -> None:
    with pytest.raises(InputError) as refused:
        cases("4x5", **words)
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"engine": "cuda"}, "engine: one or more of torch, jax, tensorflow, numpy; received 'cuda'"),
        ({"passes": ("sideways",)}, "passes: one or more of forward, both; received 'sideways'"),
        ({"passes": ()}, "received none"),
        ({"threads": 0}, "the number of threads must be at least 1; received 0"),
        ({"rounds": 0}, "the number of rounds must be at least 1; received 0"),
        ({"cases": ()}, "one or more cases; received none"),
        ({"cases": (Case((4,)),)}, "a shape has a batch and a channel axis; received (4,)"),
    ],
)
def test_settings_that_cannot_be(values: dict, text: str) -> None:
    with pytest.raises(InputError) as refused:
        Settings(**{"engine": "numpy", "cases": (Case((4, 5)),), **values})
    assert text in str(refused.value)
