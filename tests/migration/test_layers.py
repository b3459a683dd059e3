"""Each class of layer that Keras 1 had predicts after migration what its old formula says."""

from __future__ import annotations

import numpy as np
import pytest

from evennorm.tools.migrate import migrate
from tests.grids import pairwise
from tests.migration.building import difference, layer, sequential
from tests.migration.keras1 import Keras1

BACKENDS = ("theano", "tensorflow")


def draw(*shape):
    return np.random.default_rng(1).normal(size=(3, *shape)).astype("float32")


def image(order, rows=9, columns=8, channels=3):
    return (channels, rows, columns) if order == "th" else (rows, columns, channels)


PLAIN = {
    "Dense": ((5,), [layer("Dense", output_dim=4, activation="relu")]),
    "Dense without bias": ((5,), [layer("Dense", output_dim=4, bias=False)]),
    "Dense on sequences": ((6, 5), [layer("Dense", output_dim=4, activation="softmax")]),
    "Dense hard_sigmoid": ((5,), [layer("Dense", output_dim=4, activation="hard_sigmoid")]),
    "Activation": ((5,), [layer("Dense", output_dim=4), layer("Activation", activation="hard_sigmoid")]),
    "softplus": ((5,), [layer("Activation", activation="softplus")]),
    "softsign": ((5,), [layer("Activation", activation="softsign")]),
    "Dropout": ((5,), [layer("Dropout", p=0.5), layer("GaussianNoise", sigma=0.1), layer("GaussianDropout", p=0.2)]),
    "ActivityRegularization": ((5,), [layer("ActivityRegularization", l1=0.1, l2=0.0)]),
    "Reshape": ((6, 2), [layer("Reshape", target_shape=[3, 4]), layer("Permute", dims=[2, 1]), layer("Flatten")]),
    "RepeatVector": ((5,), [layer("RepeatVector", n=3)]),
    "TimeDistributedDense": ((6, 5), [layer("TimeDistributedDense", output_dim=4, activation="tanh")]),
    "TimeDistributed": ((6, 5), [layer("TimeDistributed", layer=layer("Dense", output_dim=4, activation="tanh"))]),
    "MaxoutDense": ((5,), [layer("MaxoutDense", output_dim=3, nb_feature=4)]),
    "Highway": ((5,), [layer("Highway", activation="relu")]),
    "Highway hard": ((5,), [layer("Highway", activation="hard_sigmoid")]),
    "LeakyReLU": ((5,), [layer("LeakyReLU", alpha=0.3)]),
    "ELU": ((5,), [layer("ELU", alpha=0.7)]),
    "ThresholdedReLU": ((5,), [layer("ThresholdedReLU", theta=0.5)]),
    "PReLU": ((4, 5), [layer("PReLU", init="zero")]),
    "PReLU shared": ((4, 5), [layer("PReLU", init="zero", _shared=[1])]),
    "ParametricSoftplus": ((4, 5), [layer("ParametricSoftplus", alpha_init=0.2, beta_init=5.0)]),
    "SReLU": ((4, 5), [layer("SReLU", t_left_init="zero", a_left_init="glorot_uniform")]),
    "Convolution1D": ((9, 4), [layer("Convolution1D", nb_filter=3, filter_length=3, activation="relu")]),
    "Convolution1D same": ((9, 4), [layer("Convolution1D", nb_filter=3, filter_length=4, border_mode="same")]),
    "Convolution1D full": ((9, 4), [layer("Convolution1D", nb_filter=3, filter_length=3, border_mode="full")]),
    "Convolution1D stride": (
        (10, 4),
        [layer("Convolution1D", nb_filter=3, filter_length=3, border_mode="same", subsample_length=2)],
    ),
    "AtrousConvolution1D": ((9, 4), [layer("AtrousConvolution1D", nb_filter=3, filter_length=3, atrous_rate=2)]),
    "LocallyConnected1D": (
        (9, 4),
        [layer("LocallyConnected1D", nb_filter=3, filter_length=3, subsample_length=2, activation="relu")],
    ),
    "pooling 1D": ((9, 4), [layer("MaxPooling1D", pool_length=2), layer("AveragePooling1D", pool_length=3, stride=1)]),
    "pooling 1D same": (
        (9, 4),
        [
            layer("MaxPooling1D", pool_length=2, border_mode="same"),
            layer("AveragePooling1D", pool_length=3, stride=2, border_mode="same"),
            layer("Dense", output_dim=2),  # by its weights the backend is known
        ],
    ),
    "shapes 1D": (
        (9, 4),
        [layer("ZeroPadding1D", padding=2), layer("Cropping1D", cropping=[1, 2]), layer("UpSampling1D", length=3)],
    ),
    "GlobalAveragePooling1D": ((9, 4), [layer("GlobalAveragePooling1D")]),
    "GlobalMaxPooling1D": ((9, 4), [layer("GlobalMaxPooling1D")]),
    "BatchNormalization": ((5,), [layer("BatchNormalization")]),
    "BatchNormalization mode 1": ((5,), [layer("BatchNormalization", mode=1)]),
    "BatchNormalization mode 2": ((5,), [layer("BatchNormalization", mode=2)]),
    "BatchNormalization sequence axis": ((6, 5), [layer("BatchNormalization", axis=1)]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PLAIN)
def test_layers_without_an_order_of_axes(case, backend, tmp_path):
    shape, layers = PLAIN[case]
    assert difference(Keras1(backend), sequential(shape, *layers), tmp_path, draw(*shape)) < 1e-5


def conv(kind="Convolution2D", **config):
    return lambda order: [layer(kind, **({"nb_filter": 4, "nb_row": 3, "nb_col": 2, "dim_ordering": order} | config))]


def pooled(kind, **config):
    """With a layer behind it by whose weights the backend is known."""
    return lambda order: [layer(kind, dim_ordering=order, **config), layer("Dense", output_dim=2)]


IMAGES = {
    "valid": conv(),
    "same": conv(border_mode="same", activation="relu"),
    "same even": conv(border_mode="same", nb_row=4, nb_col=2),
    "same stride": conv(border_mode="same", subsample=[2, 3]),
    "full": conv(border_mode="full"),
    "stride": conv(subsample=[2, 2], bias=False),
    "hard_sigmoid": conv(activation="hard_sigmoid"),
    "atrous": conv("AtrousConvolution2D", atrous_rate=[2, 2]),
    "atrous same": conv("AtrousConvolution2D", atrous_rate=[2, 2], border_mode="same", nb_col=3),
    "locally": conv("LocallyConnected2D", subsample=[2, 1], activation="relu"),
    "max": pooled("MaxPooling2D", pool_size=[2, 3]),
    "max same": pooled("MaxPooling2D", pool_size=[2, 2], border_mode="same"),
    "max same 3": pooled("MaxPooling2D", pool_size=[3, 3], strides=[2, 2], border_mode="same"),
    "average": pooled("AveragePooling2D", pool_size=[2, 2], strides=[1, 1]),
    "average same": pooled("AveragePooling2D", pool_size=[3, 2], strides=[2, 2], border_mode="same"),
    "global average": pooled("GlobalAveragePooling2D"),
    "global max": pooled("GlobalMaxPooling2D"),
    "normalized": lambda order: [
        *conv(activation="relu")(order),
        layer("BatchNormalization", axis=1 if order == "th" else -1),
        layer("PReLU", init="zero"),
        layer("LeakyReLU", alpha=0.1),
        layer("Dropout", p=0.3),
        layer("SpatialDropout2D", p=0.3, dim_ordering=order),
    ],
    "channel slopes": lambda order: [*conv()(order), layer("PReLU", _shared=[2, 3] if order == "th" else [1, 2])],
    "other axis": lambda order: [*conv()(order), layer("BatchNormalization", axis=-1 if order == "th" else 1)],
    "mode 2": lambda order: [*conv()(order), layer("BatchNormalization", mode=2, axis=1 if order == "th" else 3)],
    "unsaid": lambda order: [
        *conv()(order),
        layer("ZeroPadding2D", padding=[1, 2]),
        layer("UpSampling2D", size=[2, 1]),
        layer("Cropping2D", cropping=[[1, 0], [0, 2]]),
    ],
    "padding dict": lambda order: [
        layer("ZeroPadding2D", padding={"top_pad": 1, "bottom_pad": 0, "left_pad": 2, "right_pad": 1}),
        *conv()(order),
    ],
    "flatten": lambda order: [
        *conv(activation="relu")(order),
        layer("MaxPooling2D", dim_ordering=order, pool_size=[2, 2]),
        layer("Flatten"),
        layer("Dense", output_dim=3, activation="softmax"),
    ],
    "reshape": lambda order: [*conv()(order), layer("Permute", dims=[2, 3, 1]), layer("Reshape", target_shape=[-1, 7])],
    "dense on the last axis": lambda order: [*conv()(order), layer("Dense", output_dim=3)],
    "elementwise": lambda order: [*conv()(order), layer("SReLU"), layer("ParametricSoftplus")],
}


@pytest.mark.parametrize(*pairwise(case=list(IMAGES), order=["th", "tf"], backend=BACKENDS))
def test_images(case, order, backend, tmp_path):
    shape = image(order)
    old = Keras1(backend)
    old.order = order
    assert difference(old, sequential(shape, *IMAGES[case](order)), tmp_path, draw(*shape)) < 1e-5


@pytest.mark.parametrize("order", ["th", "tf"])
@pytest.mark.parametrize("config", [{}, {"border_mode": "same", "subsample": [2, 2], "depth_multiplier": 2}], ids=str)
def test_separable_convolution(config, order, tmp_path):
    shape = image(order)
    model = sequential(shape, *conv("SeparableConvolution2D", activation="relu", **config)(order))
    assert difference(Keras1("tensorflow"), model, tmp_path, draw(*shape)) < 1e-5


@pytest.mark.parametrize(
    *pairwise(
        stated=[
            *(("valid", 1, 6, 5), ("valid", 2, 9, 8), ("valid", 2, 10, 9)),
            *(("same", 2, 8, 8), ("same", 1, 4, 4), ("same", 2, 7, 8)),
        ],
        order=["th", "tf"],
        backend=BACKENDS,
    )
)
def test_deconvolution_has_the_output_shape_it_states(stated, order, backend, tmp_path):
    mode, stride, rows, columns = stated
    shape = image(order, 4, 4)
    out = [None, 2, rows, columns] if order == "th" else [None, rows, columns, 2]
    options = {"nb_filter": 2, "border_mode": mode, "subsample": [stride, stride], "output_shape": out}
    model = sequential(shape, *conv("Deconvolution2D", **options)(order))
    assert difference(Keras1(backend), model, tmp_path, draw(*shape)) < 1e-5


def deconvolved(order, *shapes, **config):
    """One layer for each (rows, columns) of output, as the configuration gives it."""
    outs = [[None, 2, *shape] if order == "th" else [None, *shape, 2] for shape in shapes]
    return [
        layer("Deconvolution2D", f"d{k}", nb_filter=2, dim_ordering=order, output_shape=out, **config)
        for k, out in enumerate(outs)
    ]


@pytest.mark.parametrize(*pairwise(version=["1.0.8", "1.1.2", "1.2.0"], order=["th", "tf"], backend=BACKENDS))
def test_deconvolution_before_keras_stored_what_it_was_given(version, order, backend, tmp_path):
    """Up to 1.1.2 the file has (n - 1) * stride + kernel - 2 * (kernel // 2), not the shape that the layer ran with."""
    shape, options = image(order, 4, 5), {"nb_row": 3, "nb_col": 5, "subsample": [2, 3], "border_mode": "same"}
    ran = sequential(shape, *deconvolved(order, (8, 15), (16, 45), **options))
    held = ran if version == "1.2.0" else sequential(shape, *deconvolved(order, (7, 13), (13, 37), **options))
    old, x = Keras1(backend, version), draw(*shape)
    expected = old.predict(ran, x.astype("float64"))
    path = old.save(tmp_path / "old.h5", held)
    report = migrate(path)
    np.testing.assert_allclose(report.model.predict_on_batch(x), expected, atol=1e-5)
    assert [len(found.assumed) for found in report.layers] == ([0, 0] if version == "1.2.0" else [1, 1])
    if version != "1.2.0":
        assert "output shape (8, 15), size times stride: before 1.2 files held what" in report.layers[0].assumed[0]
        taken = migrate(path, written_by="keras==1.2.0").model.output_shape
        assert list(taken) == held["config"][1]["config"]["output_shape"]


def test_deconvolution_keeps_a_shape_that_keras_did_not_compute(tmp_path):
    """As a user wrote it into the JSON."""
    options = {"nb_row": 3, "nb_col": 3, "subsample": [3, 3], "border_mode": "same"}
    model = sequential((4, 4, 3), *deconvolved("tf", (11, 12), **options))
    assert difference(Keras1("tensorflow", "1.1.0"), model, tmp_path, draw(4, 4, 3)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["th", "tf"])
def test_volumes(order, backend, tmp_path):
    shape = (2, 5, 6, 4) if order == "th" else (5, 6, 4, 2)
    sizes = {"kernel_dim1": 2, "kernel_dim2": 3, "kernel_dim3": 2}
    model = sequential(
        shape,
        layer("Convolution3D", nb_filter=3, border_mode="same", dim_ordering=order, **sizes),
        layer("MaxPooling3D", pool_size=[2, 2, 1], dim_ordering=order),
        layer("BatchNormalization", axis=1 if order == "th" else -1),
        layer("AveragePooling3D", pool_size=[2, 1, 2], dim_ordering=order),
    )
    assert difference(Keras1(backend), model, tmp_path, draw(*shape)) < 1e-5


@pytest.mark.parametrize(
    *pairwise(
        options=[
            {},
            {"return_sequences": True},
            {"go_backwards": True, "inner_activation": "sigmoid"},
            {"activation": "hard_sigmoid"},
        ],
        consume_less=["cpu", "gpu"],
        kind=["LSTM", "GRU", "SimpleRNN"],
    )
)
def test_recurrent_layers(kind, consume_less, options, tmp_path):
    model = sequential((6, 3), layer(kind, output_dim=4, consume_less=consume_less, **options))
    assert difference(Keras1(), model, tmp_path, 2 * draw(6, 3)) < 1e-5


@pytest.mark.parametrize(
    *pairwise(
        kind=["LSTM", "GRU"],
        backwards=[False, True],
        sequences=[True, False],
        merge_mode=["concat", "sum", "mul", "ave"],
    )
)
def test_bidirectional(kind, backwards, sequences, merge_mode, tmp_path):
    inner = layer(kind, output_dim=4, return_sequences=sequences, go_backwards=backwards)
    model = sequential((6, 3), layer("Bidirectional", merge_mode=merge_mode, layer=inner))
    assert difference(Keras1(), model, tmp_path, draw(6, 3)) < 1e-5


def test_embedding_of_words(tmp_path):
    words = np.random.default_rng(0).integers(0, 10, (3, 6))
    model = sequential((6,), layer("Embedding", input_dim=10, output_dim=4, input_length=6), layer("LSTM", output_dim=3))
    assert difference(Keras1(), model, tmp_path, words) < 1e-5


@pytest.mark.parametrize("order", ["th", "tf"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_time_distributed_images(backend, order, tmp_path):
    inner = conv(activation="relu", border_mode="same", nb_col=3, nb_row=3)(order)[0]
    shape = (4, *image(order, 5, 6))
    model = sequential(shape, layer("TimeDistributed", layer=inner))
    assert difference(Keras1(backend), model, tmp_path, draw(*shape)) < 1e-5
