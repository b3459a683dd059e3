"""Folded Keras models, held to the models they came from: over a grid of layers, and where folding would be wrong."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers as L  # noqa: N812

from evennorm.errors import ArgumentError, InputError
from evennorm.keras import BatchNormalization
from evennorm.keras.fold import fold
from evennorm.keras.legacy import BatchNormalization as OldBatchNormalization
from evennorm.models.fold_plan import Plan
from evennorm.tools.fold import fold as fold_file

WIDE = "float64" if keras.backend.backend() == "tensorflow" else "float32"
"""JAX has float64 for the whole process or not at all, and Keras on torch rounds it to float32 here and there."""
BOUND = {"float64": 1e-12, "float32": 2e-6}
NORMS = (L.BatchNormalization, BatchNormalization)


def trained(model: keras.Model, positive: bool = False) -> keras.Model:
    """With statistics, scales and shifts as training leaves them; scales above 0 if asked for."""
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        for weight in layer.weights if isinstance(layer, NORMS) else ():
            value = rng.normal(size=weight.shape)
            absolute = "variance" in weight.path or (positive and "gamma" in weight.path)
            weight.assign(abs(value) + 0.3 if absolute else value)
    return model


def values(model: keras.Model, samples: int = 3) -> Any:
    rng = np.random.default_rng(1)
    drawn = [rng.normal(size=(samples, *x.shape[1:])) for x in model.inputs]
    whole = [np.issubdtype(np.dtype(x.dtype), np.integer) for x in model.inputs]
    return [rng.integers(0, 6, x.shape) if w else x for x, w in zip(drawn, whole, strict=True)]


def outputs(model: keras.Model, inputs: Any) -> np.ndarray:
    tensors = [keras.ops.convert_to_tensor(x, t.dtype) for x, t in zip(inputs, model.inputs, strict=True)]
    y = model(tensors if len(tensors) > 1 else tensors[0], training=False)
    return np.concatenate([keras.ops.convert_to_numpy(each).astype("float64").ravel() for each in keras.tree.flatten(y)])


def check(model: keras.Model, bound: float = BOUND[WIDE]) -> tuple[keras.Model, Plan]:
    before = [np.array(weight) for weight in model.get_weights()]
    inputs = values(model)
    expected = outputs(model, inputs)
    folded, plan = fold(model)
    assert abs(outputs(folded, inputs) - expected).max() <= bound * max(1.0, abs(expected).max()) * 4
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))
    return folded, plan


def norms(model: keras.Model) -> list[Any]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, NORMS)]


def chain(*entries: Any, shape: tuple[int, ...] = (6, 6, 4), **options: Any) -> keras.Sequential:
    return keras.Sequential([keras.Input(shape, dtype=WIDE), *entries], **options)


KINDS = {
    "conv": (L.Conv1D, L.Conv2D, L.Conv3D),
    "transposed": (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose),
    "depthwise": (L.DepthwiseConv1D, L.DepthwiseConv2D),
    "separable": (L.SeparableConv1D, L.SeparableConv2D),
}
FIRST = keras.backend.backend() == "torch"
"""Whether channels-first convolutions run on the CPU; JAX runs them too, but not all kinds."""


@settings(max_examples=40)
@given(st.data())
def test_the_grid_of_convolutions(data: st.DataObject) -> None:
    """Behind: always part of the convolution. In front: where every output sees all taps, else one scale and shift."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    rank = data.draw(st.integers(1, len(KINDS[kind])))
    size, strides = data.draw(st.sampled_from((1, 2, 3))), data.draw(st.integers(1, 2))
    padding = data.draw(st.sampled_from(("valid", "same", "causal") if kind == "conv" and rank == 1 else ("valid", "same")))
    behind, bias, ours = (data.draw(st.booleans()) for _ in range(3))
    channels_first = FIRST and data.draw(st.booleans())
    options: dict[str, Any] = {
        "strides": strides,
        "padding": padding,
        "use_bias": bias,
        "bias_initializer": "normal",
        "dtype": WIDE,
        "data_format": "channels_first" if channels_first else "channels_last",
    }
    if kind == "conv":
        options["groups"] = 1 if keras.backend.backend() == "tensorflow" else data.draw(st.sampled_from((1, 2, 4)))
    outside = data.draw(st.sampled_from((4, 8)))
    if kind in ("depthwise", "separable"):
        options["depth_multiplier"] = outside // 4
    layer = KINDS[kind][rank - 1](*(() if kind == "depthwise" else (outside,)), size, **options)
    norm = NORMS[ours](
        axis=1 if channels_first else -1, scale=data.draw(st.booleans()), center=data.draw(st.booleans()), dtype=WIDE
    )
    sizes = [5] * rank
    shape = (4, *sizes) if channels_first else (*sizes, 4)
    folded, plan = check(trained(chain(*([layer, norm] if behind else [norm, layer]), shape=shape)))
    exact = size == 1 and strides == 1 if kind == "transposed" else size == 1 or padding == "valid"
    assert plan.folded[0].outcome == ("folded" if behind or exact else "scale and shift")
    assert not norms(folded)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("norm", [*NORMS, OldBatchNormalization])
def test_rows(rank: int, norm: Any) -> None:
    shape = (6, 5)[-rank + 1 :]
    for entries in (
        [L.Dense(4, dtype=WIDE), norm(dtype=WIDE)],
        [norm(dtype=WIDE), L.Dense(4, activation="tanh", dtype=WIDE)],
    ):
        folded, plan = check(trained(chain(*entries, shape=shape)))
        assert plan.folded[0].outcome == "folded"
        assert len(folded.layers) == 1
    words = keras.Sequential([keras.Input((6,), dtype="int32"), L.Embedding(6, 4, dtype=WIDE), norm(dtype=WIDE)])
    folded, plan = check(trained(words))
    assert [type(layer) for layer in folded.layers] == [L.Embedding]


@pytest.mark.parametrize(
    "between",
    [
        L.Dropout(0.5),
        L.GaussianNoise(0.5),
        L.AveragePooling2D(2),
        L.GlobalAveragePooling2D(),
        L.MaxPooling2D(2, padding="same"),
        L.GlobalMaxPooling2D(keepdims=True),
        L.Flatten(),
        L.UpSampling2D(2),
        L.Cropping2D(1),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("behind", [False, True])
def test_what_a_scale_and_shift_may_pass(between: keras.Layer, behind: bool) -> None:
    between = type(between).from_config(between.get_config() | {"dtype": WIDE})
    norm = L.BatchNormalization(dtype=WIDE)
    conv = L.Conv2D(4, 6 if isinstance(between, L.Flatten) else 1, dtype=WIDE)
    model = chain(*([conv, between, norm] if behind else [norm, between, L.Dense(3, dtype=WIDE)]))
    folded, plan = check(trained(model, positive=True))
    assert plan.folded[0].outcome == "folded"
    assert not norms(folded)


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda: L.MaxPooling2D(name="max", dtype=WIDE), "max takes maxima in between"),
        (lambda: L.ZeroPadding2D(name="pad", dtype=WIDE), "pad puts zeros around its input, which are not shifted"),
        (lambda: L.ReLU(name="relu", dtype=WIDE), "the activation relu stands in between"),
        (lambda: L.AveragePooling2D(2, padding="same", name="mean", dtype=WIDE), "mean (AveragePooling2D) is neither"),
        (lambda: L.Permute((2, 1, 3), name="turn", dtype=WIDE), "turn (Permute) is neither linear"),
        (lambda: L.LayerNormalization(name="norm", dtype=WIDE), "norm (LayerNormalization) is neither linear"),
    ],
)
def test_what_it_may_not_pass(between: Any, why: str) -> None:
    folded, plan = check(trained(chain(L.Conv2D(4, 3, dtype=WIDE), between(), L.BatchNormalization(name="bn", dtype=WIDE))))
    assert plan["bn"].why.startswith(why)
    assert type(folded.get_layer("bn")) is L.Rescaling


def test_an_activation_of_the_layer_itself_and_another_axis() -> None:
    for conv, norm, why in (
        (
            L.Conv2D(4, 3, activation="relu", name="c", dtype=WIDE),
            L.BatchNormalization(dtype=WIDE),
            "c applies relu in between",
        ),
        (
            L.Conv2D(4, 3, name="c", dtype=WIDE),
            L.BatchNormalization(axis=1, dtype=WIDE),
            "what it normalizes, axis 1, are not",
        ),
        (L.Conv2D(4, 3, name="c", dtype=WIDE), BatchNormalization(axis=(1, 3), dtype=WIDE), "it normalizes 2 axes"),
        (L.EinsumDense("bhwc,cd->bhwd", (None, None, 4), dtype=WIDE), L.BatchNormalization(dtype=WIDE), "einsum_dense"),
    ):
        folded, plan = check(trained(chain(conv, norm)))
        assert plan.folded[0].why.startswith(why)
        assert not norms(folded)


def test_never_into_a_layer_that_is_used_elsewhere() -> None:
    """Called twice; read by another; read by the caller. A normalization that stands behind two layers goes into both."""
    x = keras.Input((6, 6, 4), dtype=WIDE)
    conv, other = L.Conv2D(4, 1, name="conv", dtype=WIDE), L.Conv2D(4, 1, name="other", dtype=WIDE)

    def norm(name: str) -> Any:
        return L.BatchNormalization(name=name, dtype=WIDE)

    twice = keras.Model(x, L.Add(dtype=WIDE)([norm("bn")(conv(x)), conv(L.ReLU(dtype=WIDE)(x))]))
    _, plan = check(trained(twice))
    assert plan["bn"].why.startswith("conv is called 2 times, and would change everywhere")
    y = conv(x)
    _, plan = check(trained(keras.Model(x, L.Add(name="sum", dtype=WIDE)([norm("bn")(y), y]))))
    assert plan["bn"].why.startswith("sum reads the values of conv too")
    _, plan = check(trained(keras.Model(x, [norm("bn")(y), y])))
    assert plan["bn"].why == "the values of conv leave the model too; the values after it leave the model"
    shared = norm("bn")
    folded, plan = check(trained(keras.Model(x, [shared(conv(x)), L.ReLU(dtype=WIDE)(shared(other(x)))])))
    assert set(plan["bn"].into) == {"conv", "other"}
    assert not norms(folded)


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_activations_and_residuals_of_our_layers_stay(folds: bool, residual: bool) -> None:
    x = keras.Input((6, 6, 4), dtype=WIDE)
    first = L.Conv2D(4, 1, dtype=WIDE)(x) if folds else L.ReLU(dtype=WIDE)(x)
    norm = BatchNormalization(activation="gelu", name="bn", dtype=WIDE)
    y = norm(first, residual=x) if residual else norm(first)
    folded, plan = check(trained(keras.Model(x, L.Conv2D(2, 1, dtype=WIDE)(y))))
    assert plan["bn"].outcome == ("folded" if folds else "scale and shift")
    assert not norms(folded)
    assert sum(isinstance(layer, L.Activation) for layer in folded.layers) == 1
    own = {type(layer).__module__.split(".")[0] for layer in folded._flatten_layers()}
    assert own == {"keras"}


def test_nested_models_and_normalizations_on_both_sides_of_their_borders() -> None:
    inside = chain(
        L.Conv2D(4, 3, dtype=WIDE), L.BatchNormalization(dtype=WIDE), L.ReLU(dtype=WIDE), L.Conv2D(4, 1, dtype=WIDE)
    )
    x = keras.Input((6, 6, 4), dtype=WIDE)
    y = L.BatchNormalization(dtype=WIDE)(inside(L.BatchNormalization(dtype=WIDE)(x)))
    folded, plan = check(trained(keras.Model(x, y)))
    assert [(each.side, each.outcome) for each in plan.folded] == [
        ("in front of", "folded"),
        ("behind", "folded"),
        ("behind", "folded"),
    ]
    assert not norms(folded)


def test_what_stays_as_it_is() -> None:
    class Own(L.BatchNormalization):
        def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
            return inputs + 1

    for norm, why in (
        (BatchNormalization(mode=1, dtype=WIDE), "it normalizes each sample on its own"),
        (BatchNormalization(mode=2, dtype=WIDE), "it normalizes by the batch at inference too"),
        (Own(dtype=WIDE), "it is a Own, which may compute anything else"),
    ):
        folded, plan = check(trained(chain(L.Dense(4, dtype=WIDE), norm, shape=(5,))))
        assert (plan.folded[0].outcome, plan.folded[0].why) == ("kept", why)
        assert len(norms(folded)) == 1


def test_half_precision_with_a_large_mean() -> None:
    """Rescaling computes in float32 there: 1000 +- 1 has four values in float16."""
    model = chain(L.ReLU(dtype="mixed_float16"), L.BatchNormalization(dtype="mixed_float16", name="bn"), shape=(4,))
    model.get_layer("bn").moving_mean.assign([1000.0] * 4)
    model.get_layer("bn").moving_variance.assign([1.0] * 4)
    folded, _ = fold(model)
    x = np.linspace(998, 1002, 12).reshape(3, 4).astype("float16").astype("float32")
    np.testing.assert_allclose(outputs(folded, [x]), ((x - 1000) / np.sqrt(1.001)).ravel(), atol=2e-3)


def test_a_network_of_depthwise_convolutions() -> None:
    model = keras.applications.MobileNetV2(input_shape=(32, 32, 3), weights=None, classes=3)
    folded, plan = check(trained(model), bound=1e-4)
    assert {each.outcome for each in plan.folded} == {"folded"}
    assert len(folded.layers) == len(model.layers) - len(norms(model))


def test_models_that_cannot_be_rewritten() -> None:
    class Own(keras.Model):
        pass

    with pytest.raises(ArgumentError, match="only Sequential and functional models can be rewritten"):
        fold(Own())
    with pytest.raises(ArgumentError, match="a Keras model is needed; received str"):
        fold("model")
    with pytest.raises(ArgumentError, match="has no input shape yet"):
        fold(keras.Sequential([L.Dense(3)]))


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path: Path) -> None:
    """On torch onnxruntime computes what the model did; other backends say in one line what is needed."""
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, use_bias=False)(inputs)
    x = L.GlobalAveragePooling2D()(L.ReLU()(L.BatchNormalization(name="norm")(x)))
    model = keras.Model(inputs, L.Dense(2)(x))
    rng = np.random.default_rng(0)
    model.get_layer("norm").set_weights([rng.uniform(0.5, 2, 4) for _ in range(4)])
    file = tmp_path / "model.onnx"
    if keras.backend.backend() != "torch":
        with pytest.raises(InputError, match=r"^Keras writes \.onnx on its torch backend, .* KERAS_BACKEND=torch$"):
            fold_file(model, file)
        assert not file.exists()
        return
    import onnxruntime

    assert fold_file(model, file, measure=False).count("folded") == 1
    session = onnxruntime.InferenceSession(file)
    for samples in (1, 5):
        x = rng.normal(size=(samples, 8, 8, 3)).astype("float32")
        (served,) = session.run(None, {session.get_inputs()[0].name: x})
        np.testing.assert_allclose(served, model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
