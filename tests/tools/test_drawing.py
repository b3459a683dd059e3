"""The figure of an array: valid XML, nothing from outside, and one colour for exactly the cells normalized together."""

import re
from collections import Counter
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evennorm import ShapeError
from evennorm.tools.explain import explain
from evennorm.tools.explain.axes import GroupColours, drawn_axes
from evennorm.tools.explain.drawing import draw
from evennorm.tools.svg import mixed

SVG = "{http://www.w3.org/2000/svg}"
BLUE, ORANGE, GREEN = "#4f8fd0", "#f0953f", "#45b08c"


def figure(shape, axis):
    return ElementTree.fromstring(draw(explain(shape, axis)))


def cells(root):
    """Corner and colour of each polygon: cells of a table, visible faces of blocks, then the swatches of the legend."""
    polygons = root.findall(f"{SVG}polygon")
    return [(tuple(map(float, p.get("points").split()[0].split(","))), p.get("fill")) for p in polygons]


def words(root):
    return [text.text for text in root.findall(f"{SVG}text")]


def bright(colour):
    return mixed(colour, "#ffffff", 0.22)


def dark(colour):
    return mixed(colour, "#000000", 0.16)


@pytest.mark.parametrize(("axis", "same"), [(1, 0), (0, 1)])
def test_a_table_has_one_colour_per_channel(axis, same):
    table = cells(figure((2, 3), axis))[:6]
    assert len({corner for corner, _ in table}) == 6
    colours = {}
    for corner, colour in table:
        colours.setdefault(corner[same], set()).add(colour)
    assert len({frozenset(seen) for seen in colours.values()}) == (3 if axis == 1 else 2)
    assert all(len(seen) == 1 for seen in colours.values())


# Two cells along each axis: four front faces, four at the side, four on top; channels are in depth, rows are vertical.
BLOCKS = [
    (2, {BLUE: 4, dark(BLUE): 2, dark(ORANGE): 2, bright(BLUE): 2, bright(ORANGE): 2}),
    (1, {BLUE: 2, ORANGE: 2, dark(ORANGE): 4, bright(BLUE): 2, bright(ORANGE): 2}),
    (0, {BLUE: 2, ORANGE: 2, dark(BLUE): 2, dark(ORANGE): 2, bright(BLUE): 4}),
]


@pytest.mark.parametrize(("axis", "faces"), BLOCKS)
def test_a_block_has_one_colour_per_channel(axis, faces):
    drawn = Counter(colour for _, colour in cells(figure((2, 2, 2), axis)))
    drawn.subtract([BLUE, ORANGE])
    assert +drawn == Counter(faces)


@pytest.mark.parametrize(("shape", "blocks"), [((2, 2, 2, 2), 2), ((2, 2, 2, 2, 2), 4), ((3, 2, 2, 2), 3)])
def test_blocks_are_repeated(shape, blocks):
    assert len(cells(figure(shape, -1))) == 12 * blocks + 2


def test_samples_kept_apart_have_a_block_each():
    colours = [colour for _, colour in cells(figure((2, 2, 2, 2), 0))]
    assert Counter(colours[:12]) == Counter({BLUE: 4, dark(BLUE): 4, bright(BLUE): 4})
    assert Counter(colours[12:24]) == Counter({ORANGE: 4, dark(ORANGE): 4, bright(ORANGE): 4})


def test_channels_first_and_channels_last_look_alike():
    first, last = figure((32, 3, 28, 28), 1), figure((32, 28, 28, 3), -1)
    assert cells(first) == cells(last)
    assert {BLUE, ORANGE, GREEN} <= {colour for _, colour in cells(last)}


def test_labels():
    seen = words(figure((32, 28, 28, 3), -1))
    assert seen[-4:] == [
        "Numbers are indices; dots stand for the cells left out.",
        "shape (32, 28, 28, 3), axis 3",
        "One colour: one mean and one variance. Values per mean: 32 x 28 x 28 = 25,088",
        "3 groups, averaged over batch (32), height (28), width (28)",
    ]
    for label in ("batch 0", "batch 1", "batch 31", "height (28)", "width (28)", "channel (3)", "…", "⋮", "27"):
        assert label in seen


def test_unknown_sizes():
    seen = words(figure((None, 10), -1))
    assert "batch (?)" in seen
    assert "last" in seen
    assert "One colour: one mean and one variance. Values per mean: ? = 1 per sample" in seen


def test_a_short_axis_is_drawn_whole():
    assert "Numbers are indices." in words(figure((3, 4, 4, 4), -1))
    assert "Numbers are indices; dots stand for the cells left out." in words(figure((3, 4, 4, 5), -1))


def test_many_axes_are_merged_or_cut():
    merged = words(figure((4, 2, 3, 3, 6, 5), -1))
    assert "Drawn as one axis: axes 0, 1" in merged
    assert "batch x axis 1: 7" in merged
    cut = words(figure((2, 3, 2, 3, 2, 3, 2), (1, 3, 5)))
    assert "Drawn at index 0 of the first 2 axes" in cut
    assert "27 groups, averaged over batch (2), axis 2 (2), axis 4 (2), channel (2)" in cut


@settings(max_examples=40)
@given(st.lists(st.none() | st.integers(1, 300), min_size=1, max_size=8), st.data())
def test_every_shape_is_drawn(shape, data):
    shape = shape if any(shape) else [*shape, 3]
    known = [a for a, size in enumerate(shape) if size is not None]
    axis = data.draw(st.lists(st.sampled_from(known), unique=True, min_size=1))
    text = draw(explain(shape, axis))
    root = ElementTree.fromstring(text)
    assert re.findall(r"https?:[^\"]*|href|url\(|@import|<image|<script", text) == ["http://www.w3.org/2000/svg"]
    left, top, wide, high = map(float, root.get("viewBox").split())
    for polygon in root.findall(f"{SVG}polygon"):
        for point in polygon.get("points").split():
            x, y = map(float, point.split(","))
            assert left <= x <= left + wide
            assert top <= y <= top + high


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_no_two_groups_share_a_colour(shape, data):
    axis = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True, min_size=1, max_size=3))
    axes = [a.shortened(3) for a in drawn_axes(explain(shape, axis))]
    colours = GroupColours(axes)
    kept = [a for a in axes if a.kept]
    groups = [{}]
    for a in kept:
        groups = [group | {a.axes: cell.label} for group in groups for cell in a.cells]
    assert len({colours.of(group) for group in groups}) == len(groups)


def test_an_empty_array_has_no_figure():
    with pytest.raises(ShapeError) as error:
        draw(explain((32, 0, 28, 3)))
    assert str(error.value) == "a figure needs cells to draw; axis 1 has size 0; give the size of a batch that holds values"


def test_a_wrong_axis_is_marked_as_wrong():
    wrong = words(figure((32, 3, 28, 28), -1))
    at = wrong.index("shape (32, 3, 28, 28), axis 3")
    assert " ".join(wrong[at + 1 : at + 3]).startswith(
        "Looks wrong: axis 3 (-1) looks like the width of channels-first images"
    )
    assert not [text for text in words(figure((32, 3, 28, 28), 1)) if "wrong" in text]
