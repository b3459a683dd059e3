"""Explanations of shapes people really have: their facts, their findings, and their text."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evennorm import Geometry
from evennorm.explanation import Explanation
from evennorm.explanation.data_format import DataFormat
from evennorm.explanation.findings import FEW_VALUES, percent, relative_error


def explained(shape, axis=-1):
    return Explanation.of(Geometry(shape, axis))


FORMATS = [
    # shape, name, channel axis, certainty
    ((5,), "one vector without a batch axis", 0, "likely"),
    ((256, 1024), "dense features", 1, "clear"),
    ((None, 10), "dense features", 1, "clear"),
    ((None, None, 64), "channels-last sequences", 2, "clear"),
    ((None, 64, None), "channels-first sequences", 1, "clear"),
    ((32, 100, 64), "channels-last sequences", 2, "likely"),
    ((32, 100, 3), "channels-last sequences", 2, "likely"),
    ((32, 1, 16000), "channels-first sequences", 1, "likely"),
    ((8, 16, 128), "channels-last sequences", 2, "unclear"),
    ((32, 128, 50), "channels-last sequences", 2, "unclear"),
    ((28, 28, 3), "one channels-last image without a batch axis", 2, "likely"),
    ((3, 224, 224), "one channels-first image without a batch axis", 0, "likely"),
    ((32, 28, 28, 3), "channels-last images", 3, "clear"),
    ((32, 3, 28, 28), "channels-first images", 1, "clear"),
    ((32, 28, 28, 1), "channels-last images", 3, "clear"),
    ((None, 7, 7, 2048), "channels-last images", 3, "clear"),
    ((None, 2048, 7, 7), "channels-first images", 1, "clear"),
    ((None, None, None, 3), "channels-last images", 3, "clear"),
    ((None, 3, None, None), "channels-first images", 1, "clear"),
    ((32, 3, 3, 512), "channels-last images", 3, "clear"),
    ((8, 3, 224, 320), "channels-first images", 1, "clear"),
    ((8, 480, 640, 64), "channels-last images", 3, "likely"),
    ((8, 64, 480, 640), "channels-first images", 1, "likely"),
    ((32, 64, 64, 64), "channels-last images", 3, "unclear"),
    ((4, 2, 3, 3, 5), "channels-last volumes or video", 4, "clear"),
    ((8, 16, 112, 112, 3), "channels-last volumes or video", 4, "clear"),
    ((8, 3, 16, 112, 112), "channels-first volumes or video", 1, "likely"),
    ((8, 16, 3, 64, 64), "video of channels-first frames", 2, "likely"),
    ((2, 3, 4, 5, 6, 7), "a channels-last array of rank 6", 5, "unclear"),
]


@pytest.mark.parametrize(("shape", "name", "channel_axis", "certainty"), FORMATS)
def test_data_format(shape, name, channel_axis, certainty):
    data_format = DataFormat.of(shape)
    assert (data_format.name, data_format.channel_axis, data_format.certainty) == (name, channel_axis, certainty)
    assert len(data_format.roles) == len(shape)
    assert data_format.roles.index("channel") == channel_axis


def test_an_unclear_format_says_so():
    reason = DataFormat.of((8, 16, 128)).reason
    assert reason == "the sizes fit channels-first as well; channels-last is Keras's default"


FINDINGS = [
    # shape, axis, codes
    ((32, 28, 28, 3), -1, []),
    ((32, 3, 28, 28), 1, []),
    ((256, 1024), -1, []),
    ((None, 1024), -1, []),
    ((None, None, 64), -1, []),
    ((None, 64, None), 1, []),
    ((32, 100, 64), -1, []),
    ((8, 16, 128), -1, []),
    ((32, 128, 50), -1, []),
    ((32, 128, 50), 1, []),  # 50 steps of 128 channels, or 128 steps of 50 features: both are common
    ((8, 16, 3, 64, 64), 2, []),
    ((3, 224, 224), 0, []),
    ((2, 3, 4, 5, 6, 7), -1, []),
    ((32, 3, 28, 28), -1, ["spatial-axis"]),
    ((32, 28, 28, 3), 1, ["spatial-axis"]),
    ((32, 28, 28, 3), 2, ["spatial-axis"]),
    ((32, 28, 28, 3), (1, 2), ["spatial-axis"]),
    ((None, 8, 8, 64), (1, 3), ["spatial-axis"]),
    ((32, 3, 28, 28), (0, -1), ["batch-axis", "spatial-axis"]),
    ((8, 16, 128), 1, ["time-axis"]),
    ((32, 100, 64), 1, ["time-axis"]),
    ((32, 1, 16000), -1, ["time-axis"]),
    ((8, 16, 3, 64, 64), 1, ["time-axis"]),
    ((8, 16, 112, 112, 3), 1, ["time-axis"]),
    ((32, 28, 28, 3), 0, ["batch-axis"]),
    ((32, 10), 0, ["batch-axis", "few-values"]),
    ((28, 28, 3), 0, ["spatial-axis"]),
    ((5,), 0, ["one-value"]),
    ((1, 10), -1, ["one-value"]),
    ((1, 1, 1, 64), -1, ["one-value"]),
    ((2, 10), -1, ["few-values"]),
    ((31, 10), -1, ["few-values"]),
    ((32, 10), -1, []),
    ((1, 28, 28, 3), -1, ["one-sample"]),
    ((0, 28, 28, 3), -1, ["no-values"]),
    ((32, 0), -1, ["no-values"]),
]


@pytest.mark.parametrize(("shape", "axis", "codes"), FINDINGS)
def test_findings(shape, axis, codes):
    found = explained(shape, axis).findings
    assert [finding.code for finding in found] == codes
    assert all(finding.message and finding.remedy for finding in found)


MESSAGES = [
    (
        (32, 3, 28, 28),
        -1,
        "axis 3 (-1) looks like the width of channels-first images whose channels are on axis 1: each of the 28 "
        "positions would get a mean of its own, shared by all 3 channels",
        "use axis=1 for this channels-first data, or move the channels to the end and keep axis=-1",
    ),
    (
        (32, 28, 28, 3),
        1,
        "axis 1 looks like the height of channels-last images whose channels are on axis 3: each of the 28 positions "
        "would get a mean of its own, shared by all 3 channels",
        "use axis=-1 for this channels-last data; axis=1 belongs to channels-first data",
    ),
    (
        (8, 16, 128),
        1,
        "axis 1 may be the time of channels-last sequences whose channels are on axis 2: each of the 16 positions would "
        "get a mean of its own, shared by all 128 channels",
        "use axis=-1 if so; where the data is channels-first, as in PyTorch, the axis is right and this can be ignored",
    ),
    (
        (None, 8, 8, 64),
        (1, 3),
        "axis 1 looks like the height of channels-last images whose channels are on axis 3: each of the 8 positions "
        "would get a mean of its own in every channel, 512 means instead of 64",
        "use axis=-1, unless a mean per position is meant: it ties the layer to this size, and costs the parameters for it",
    ),
    (
        (32, 28, 28, 3),
        0,
        "axis 0 looks like the batch: each of its 32 samples would get a mean, a gamma and a beta of its own, and the layer "
        "would accept batches of exactly 32 samples",
        "use axis=-1; to normalize each sample by itself, use layer, group or instance normalization instead",
    ),
    (
        (9, 10),
        -1,
        "each mean is computed from only 9 values: a variance from so few is off by about 50 % (standard error sqrt(2 / "
        "(9 - 1)) for independent, normally distributed values)",
        "use larger batches (25 % with 32 values), batch renormalization (renorm=True), or layer or group normalization, "
        "which do not depend on the batch",
    ),
    (
        (5,),
        0,
        "each mean is computed from one value: the variance is 0, and so is every normalized value, so the layer returns "
        "beta",
        "give the shape with its batch axis first, ? where its size is unknown",
    ),
]


@pytest.mark.parametrize(("shape", "axis", "message", "remedy"), MESSAGES)
def test_messages(shape, axis, message, remedy):
    finding = explained(shape, axis).findings[0]
    assert (finding.message, finding.remedy) == (message, remedy)


def test_too_few_values_for_want_of_the_batch():
    remedies = {finding.code: finding.remedy for finding in explained((32, 10), 0).findings}
    assert remedies["few-values"] == "choose an axis that leaves the batch to be averaged over"


COUNTS = [
    ((32, 28, 28, 3), -1, "32 x 28 x 28 = 25,088"),
    ((None, 28, 28, 3), -1, "? x 28 x 28 = 784 per sample"),
    ((None, 1024), -1, "? = 1 per sample"),
    ((256, 1024), -1, "256"),
    ((4, 3, None), 1, "4 x ? = 4 per step of axis 2"),
    ((None, 28, None, 3), -1, "? x 28 x ? = 28 times the unknown sizes"),
    ((None, None, 64), -1, "? x ?"),
    ((None, 8, 8, 64), (1, 3), "? x 8 = 8 per sample"),
    ((5,), 0, "1"),
    ((0, 4, 3), -1, "0 x 4 = 0"),
]


@pytest.mark.parametrize(("shape", "axis", "text"), COUNTS)
def test_count_text(shape, axis, text):
    assert explained(shape, axis).count_text == text


def test_relative_error():
    assert relative_error(0) is None
    assert relative_error(1) is None
    assert relative_error(2) == sqrt(2)
    assert relative_error(9) == 0.5
    assert relative_error(FEW_VALUES) == pytest.approx(0.254, abs=5e-4)
    assert relative_error(FEW_VALUES - 1) > 0.25


@pytest.mark.parametrize(("part", "text"), [(sqrt(2), "141 %"), (0.5, "50 %"), (0.0999, "10 %"), (0.00893, "0.89 %")])
def test_percent(part, text):
    assert percent(part) == text


def test_parameters():
    explanation = explained((None, 8, 8, 64), (1, 3))
    assert [(p.name, p.shape, p.size, p.trainable) for p in explanation.parameters] == [
        ("gamma", (8, 64), 512, True),
        ("beta", (8, 64), 512, True),
        ("moving_mean", (8, 64), 512, False),
        ("moving_variance", (8, 64), 512, False),
    ]
    assert (explanation.trainable, explanation.non_trainable) == (1024, 1024)


TEXT = """\
Batch normalization: shape (?, 28, 28, 3), axis 3 (-1)

  looks like        channels-last images (batch, height, width, channel): height
                    and width are equal, 28; 3 channels are usual
  averaged over     axes 0, 1, 2: batch ?, height 28, width 28
  values per mean   ? x 28 x 28 = 784 per sample
  groups            3, one per channel (axis 3): own mean, own variance
  noise             a variance from n values is off by about sqrt(2 / (n - 1)):
                    25 % for 32, meaningless for 1

  parameter         shape  size  trainable
  gamma             (3,)      3  yes
  beta              (3,)      3  yes
  moving_mean       (3,)      3  no
  moving_variance   (3,)      3  no
  together          6 trainable, 6 non-trainable

Nothing looks wrong."""


def test_text():
    assert explained((None, 28, 28, 3)).text() == TEXT


def test_lines_know_what_they_are():
    kinds = [line.kind for line in explained((32, 3, 28, 28), -1).lines()]
    assert kinds[0] == "title"
    assert kinds.index("warning") < kinds.index("remedy")
    assert "clean" not in kinds
    assert explained((32, 28, 28, 3)).lines()[-1].kind == "clean"


@given(st.lists(st.none() | st.integers(0, 2000), min_size=1, max_size=7), st.data())
def test_every_shape_is_explained_within_80_columns(shape, data):
    known = [a for a, size in enumerate(shape) if size is not None]
    if not known:
        shape, known = [*shape, 3], [len(shape)]
    # The row of a parameter is never broken, and with many channel axes its shape alone may fill a line.
    axis = data.draw(st.lists(st.sampled_from(known), unique=True, min_size=1, max_size=3))
    explanation = explained(shape, axis)
    assert max(len(line) for line in explanation.text(80).splitlines()) <= 80
    assert explanation.as_dict()["count"] == explanation.geometry.count
    assert bool(explanation.findings) == ("Nothing looks wrong." not in explanation.text())
    assert explanation.trainable == explanation.non_trainable == 2 * explanation.geometry.channel
