"""Each rule of `evennorm check` on networks made for it: what it finds with which words, and what it leaves alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evennorm.errors import ArgumentError
from evennorm.models.network import Role
from evennorm.tools.check.epsilon import rounding_variance
from evennorm.tools.check.rules import RULES, selected
from tests.tools.networks import BN, chain, codes, found, network, one, state, step

LINEAR, RELU = Role.LINEAR, Role.ACTIVATION


def test_a_sound_network_has_no_findings() -> None:
    assert codes(one(), batch_size=32) == []


# The axis


def test_an_axis_that_the_convolution_contradicts() -> None:
    (finding,) = found(one({"state": state(axis=(1,))}))
    assert (finding.code, finding.level, finding.layer) == ("BN101", "error", "bn")
    assert "each of its 8 positions" in finding.what
    assert "conv has its channels on axis 3" in finding.what
    assert finding.remedy == "use axis=-1"


def test_channels_first_data_under_axis_minus_one() -> None:
    conv = ("conv", LINEAR, {"channel_axis": 1, "shape": (None, 4, 8, 8)})
    norm = ("bn", BN, {"shape": (None, 4, 8, 8)})
    relu = ("relu", RELU, {"shape": (None, 4, 8, 8)})
    assert codes(chain(conv, norm, relu)) == ["BN102"]
    right = ("bn", BN, {"shape": (None, 4, 8, 8), "state": state(axis=(1,))})
    assert codes(chain(conv, right, relu)) == []


def test_the_axis_is_known_through_activations_and_from_what_follows() -> None:
    wrong = {"state": state(axis=(2,))}
    conv = ("conv", LINEAR, {"channel_axis": 3})
    assert codes(chain(conv, ("relu", RELU, {}), ("bn", BN, wrong))) == ["BN101"]
    assert codes(chain(("x", Role.OTHER, {}), ("bn", BN, wrong), ("relu", RELU, {}), conv)) == ["BN101"]
    unknown = (("x", Role.OTHER, {}), ("bn", BN, wrong), ("relu", RELU, {}))
    assert codes(chain(*unknown)) == []


def test_a_reshape_hides_what_stood_in_front_of_it() -> None:
    conv = ("conv", LINEAR, {"channel_axis": 3})
    permuted = ("permute", Role.RESHAPE, {"kind": "Permute"})
    assert codes(chain(conv, permuted, ("bn", BN, {"state": state(axis=(1,))}), ("relu", RELU, {}))) == []


def test_images_that_look_channels_first() -> None:
    shape = (None, 3, 28, 28)
    model = chain(("x", Role.INPUT, {"shape": shape}), ("bn", BN, {"shape": shape}), ("flat", Role.OTHER, {}))
    (finding,) = found(model)
    assert finding.code == "BN102"
    assert "channels-first images" in finding.what


def test_several_axes_are_a_choice() -> None:
    assert codes(one({"state": state(axis=(1, 3))})) == []


# Neighbours


def biased(**settings):
    return ("conv", LINEAR, {"channel_axis": 3, "bias": True} | settings)


def test_a_bias_in_front() -> None:
    (finding,) = found(chain(biased(), ("bn", BN, {}), ("relu", RELU, {})))
    assert (finding.code, finding.layer, finding.fixable) == ("BN201", "conv", True)
    assert finding.what == "it adds a bias that bn subtracts again"


def test_a_bias_that_something_else_needs() -> None:
    assert codes(chain(biased(activation="relu"), ("bn", BN, {}), ("relu", RELU, {}))) == []
    assert codes(chain(biased(), ("relu", RELU, {}), ("bn", BN, {}))) == []
    assert codes(chain(biased(), ("bn", BN, {"state": state(mode=1)}), ("relu", RELU, {}))) == []
    steps = [step("conv", LINEAR, bias=True), step("bn", BN, "conv"), step("sum", Role.ADD, "bn", "conv")]
    assert codes(network(*steps)) == []
    assert codes(network(*steps[:2], step("relu", RELU, "bn"), outputs=("relu", "conv"))) == []


def test_a_bias_is_subtracted_along_its_own_axis_only() -> None:
    assert codes(chain(biased(), ("bn", BN, {"state": state(axis=(1,))}), ("relu", RELU, {}))) == ["BN101"]


def test_two_normalizations_in_a_row() -> None:
    for kinds in ((BN, BN), (Role.NORM, BN), (BN, Role.NORM)):
        second = chain(("conv", LINEAR, {}), ("first", kinds[0], {}), ("second", kinds[1], {}), ("relu", RELU, {}))
        (finding,) = found(second)
        assert (finding.code, finding.layer) == ("BN202", "second")
        assert "first" in finding.what


def test_normalizations_with_something_between_them() -> None:
    assert codes(chain(("conv", LINEAR, {}), ("a", BN, {}), ("relu", RELU, {}), ("b", BN, {}), ("relu2", RELU, {}))) == []
    fused = ("a", BN, {"activation": "relu"})
    assert codes(chain(("conv", LINEAR, {}), fused, ("b", BN, {}), ("relu", RELU, {}))) == []
    scaled = ("a", Role.NORM, {"kind": "Normalization"})  # a fixed map of the inputs, of no batch
    assert codes(chain(("x", Role.INPUT, {}), scaled, ("b", BN, {}), ("relu", RELU, {}))) == []
    assert codes(chain(("a", Role.NORM, {}), ("b", Role.NORM, {}))) == []


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "tanh"])
def test_normalization_in_front_of_the_output_s_activation(activation: str) -> None:
    role = Role.SOFTMAX if activation == "softmax" else RELU
    steps = (step("dense", LINEAR), step("bn", BN, "dense"), step("out", role, "bn", activation=activation))
    assert codes(network(*steps, outputs=("out",))) == ["BN203"]


def test_normalization_of_the_output() -> None:
    steps = (step("dense", LINEAR), step("bn", BN, "dense"))
    assert codes(network(*steps, outputs=("bn",))) == ["BN203"]
    flat = step("flat", Role.RESHAPE, "bn", kind="Flatten")
    assert codes(network(*steps, flat, outputs=("flat",))) == ["BN203"]
    softmax = (step("dense", LINEAR), step("bn", BN, "dense", activation="softmax"))
    assert codes(network(*softmax, outputs=("bn",))) == ["BN203"]


def test_features_of_a_backbone_are_no_such_output() -> None:
    relu = (step("conv", LINEAR), step("bn", BN, "conv"), step("relu", RELU, "bn", activation="relu"))
    assert codes(network(*relu, outputs=("relu",))) == []
    both = (step("conv", LINEAR), step("bn", BN, "conv"), step("relu", RELU, "bn", activation="relu"))
    assert codes(network(*both, outputs=("bn", "relu"))) == []
    gate = (step("conv", LINEAR), step("bn", BN, "conv"), step("gate", RELU, "bn", activation="sigmoid"))
    assert codes(network(*gate)) == []


def test_dropout_in_front() -> None:
    dropout = ("drop", Role.DROPOUT, {"rate": 0.5})
    (finding,) = found(chain(("conv", LINEAR, {}), dropout, ("pool", Role.POOLING, {}), ("bn", BN, {}), ("relu", RELU, {})))
    assert (finding.code, finding.layer) == ("BN204", "bn")
    assert "drop (rate 0.5)" in finding.what


def test_dropout_elsewhere() -> None:
    none = ("drop", Role.DROPOUT, {"rate": 0.0})
    assert codes(chain(("conv", LINEAR, {}), none, ("bn", BN, {}), ("relu", RELU, {}))) == []
    some = ("drop", Role.DROPOUT, {"rate": 0.5})
    assert codes(chain(some, ("conv", LINEAR, {}), ("bn", BN, {}), ("relu", RELU, {}))) == []


# Moving statistics

FRESH = {"mean": np.zeros(4), "variance": np.ones(4)}
NEW = FRESH | {"gamma": np.ones(4), "beta": np.zeros(4)}


def test_statistics_that_were_never_updated() -> None:
    assert codes(one({"state": state(**FRESH)})) == ["BN301"]
    (finding,) = found(one({"state": state(**NEW)}, iterations=500))
    assert finding.code == "BN301"
    assert "after 500 training steps" in finding.what
    assert codes(one({"state": state(**NEW)}), steps=500) == ["BN301"]


def test_an_untrained_model_has_nothing_to_update() -> None:
    assert codes(one({"state": state(**NEW)})) == []
    assert codes(one({"state": state(**NEW, updates=0)}, iterations=None)) == []
    assert codes(one({"state": state(**FRESH, mode=1)})) == []
    zero = state(**(NEW | {"gamma": np.zeros(4)}))  # the last of a residual block, at the beginning
    assert codes(one({"state": zero})) == []


def test_statistics_that_have_not_converged() -> None:
    (finding,) = found(one({"state": state(decay=0.99)}, iterations=100))
    assert finding.code == "BN302"
    assert f"{100 * 0.99**100:.2g} %" in finding.what
    assert f"it needs {math.ceil(math.log(0.01) / math.log(0.99)):,}" in finding.what  # 459
    assert "momentum=0.95" in finding.remedy
    assert 0.95**100 <= 0.01 < 0.96**100


def test_statistics_of_enough_steps_or_of_another_start() -> None:
    assert codes(one({"state": state(decay=0.99)}, iterations=459)) == []
    assert codes(one({"state": state(decay=0.99)}, iterations=458)) == ["BN302"]
    assert codes(one({"state": state(decay=0.99)}, iterations=0)) == []
    assert codes(one({"state": state(decay=None)}, iterations=3)) == []
    assert codes(one({"state": state(decay=0.99), "trainable": False}, iterations=100)) == []
    # From 1 and positive variances no average falls below what is left of the 1: it was loaded.
    loaded = state(decay=0.99, variance=np.array([1.0, 2.0, 0.5, 0.36]))
    assert codes(one({"state": loaded}, iterations=100)) == []


def test_a_layer_that_is_called_twice_converges_twice_as_fast() -> None:
    steps = [step("x", Role.INPUT)]
    for number in ("", "#2"):
        before = steps[-1].name
        steps.append(step(f"conv{number}", LINEAR, before, layer="conv"))
        steps.append(step(f"bn{number}", BN, f"conv{number}", layer="bn", state=state(decay=0.99)))
        steps.append(step(f"relu{number}", RELU, f"bn{number}"))
    assert codes(network(*steps, iterations=230)) == []
    assert codes(network(*steps, iterations=229)) == ["BN302"]


@pytest.mark.parametrize(("framework", "written", "right"), [("keras", "0.1", "0.9"), ("torch", "0.9", "0.1")])
def test_a_momentum_of_the_other_framework(framework: str, written: str, right: str) -> None:
    (finding,) = found(one({"state": state(decay=0.1)}, framework=framework))
    assert finding.code == "BN303"
    assert f"momentum={written} " in finding.what
    assert finding.remedy.endswith(f"momentum={right}")
    assert codes(one({"state": state(decay=0.5)}, framework=framework)) == []


# Epsilon


@pytest.mark.parametrize(("dtype", "numpy"), [("float16", np.float16), ("float32", np.float32)])
def test_the_variance_of_rounding(dtype: str, numpy: type) -> None:
    """Against the rounding errors of values of 1 to 2, whose spacing is that at 1; below 1 they are half of it."""
    exact = np.random.default_rng(0).uniform(1, 2, 200_000)
    errors = exact.astype(numpy).astype(np.float64) - exact
    assert np.var(errors) == pytest.approx(rounding_variance(dtype), rel=0.02)


def test_an_epsilon_too_small_for_the_dtype() -> None:
    assert codes(one({"state": state(epsilon=1e-8), "dtype": "float16"})) == ["BN401"]
    assert codes(one({"state": state(epsilon=1e-8), "dtype": "float32"})) == []
    assert codes(one({"state": state(epsilon=0.0), "dtype": "float32"})) == ["BN401"]
    for dtype in ("float16", "bfloat16", "float32", None):
        assert codes(one({"state": state(epsilon=1e-5), "dtype": dtype})) == []


def test_an_epsilon_that_dominates() -> None:
    (finding,) = found(one({"state": state(variance=np.array([1e-6, 2e-6, 5e-4, 1.0]), epsilon=1e-3)}))
    assert finding.code == "BN402"
    assert "of 3 of 4 channels, whose median is 0.00025" in finding.what
    assert codes(one({"state": state(variance=np.array([1e-3, 2e-3, 5e-4, 1.0]), epsilon=1e-3)})) == []


# Channels


@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "variance"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(name: str, value: float) -> None:
    (finding,) = found(one({"state": state(**{name: np.array([1.0, value, 2.0, 3.0])})}))
    assert (finding.code, finding.level) == ("BN403", "error")
    assert "1 of 4 channels (1)" in finding.what


def test_a_negative_variance() -> None:
    (finding,) = found(one({"state": state(variance=np.array([1.0, -0.1, 2.0, 3.0]))}))
    assert finding.code == "BN403"
    assert "is negative" in finding.what


def test_dead_gammas() -> None:
    (finding,) = found(one({"state": state(gamma=np.array([1.0, 1e-8, -0.9, 3e-4]))}))
    assert finding.code == "BN404"
    assert "2 of 4 channels (1, 3)" in finding.what
    assert codes(one({"state": state(gamma=np.array([1.0, 0.01, -0.9, 0.5]))})) == []


def test_constant_channels() -> None:
    (finding,) = found(one({"state": state(variance=np.array([0.0, 1.0, 1e-8, 2.0]))}))
    assert finding.code == "BN405"
    assert "2 of 4 channels (0, 2)" in finding.what


def test_exploding_channels() -> None:
    huge = {"state": state(variance=np.array([1.0, 2e8, 1.0, 1.0]))}
    assert codes(one(huge)) == ["BN406"]
    raw = chain(("x", Role.INPUT, {}), ("bn", BN, huge), ("relu", RELU, {}))
    assert codes(raw) == []  # as measured, in whatever unit
    half = {"state": state(mean=np.array([0.0, 6e4, 0.0, 0.0]), variance=np.full(4, 1e6)), "dtype": "float16"}
    (finding,) = found(one(half))
    assert finding.code == "BN406"
    assert "beyond 65504" in finding.what


# Training


def test_weight_decay() -> None:
    (finding,) = found(one({"decayed": ("gamma", "beta")}))
    assert (finding.code, finding.what) == ("BN501", "weight decay acts on its gamma and beta")


def shared(*makers: str):
    steps = [step("x", Role.INPUT), step("z", Role.INPUT)]
    for number, (maker, source) in enumerate(zip(makers, ("x", "z"), strict=True), 1):
        name = f"{maker}#{number}" if number > 1 and maker == makers[0] else maker
        steps.append(step(name, LINEAR, source, layer=maker))
        steps.append(step("bn" if number == 1 else "bn#2", BN, name, layer="bn"))
    return network(*steps, step("sum", Role.ADD, "bn", "bn#2"))


def test_a_layer_behind_two_others() -> None:
    (finding,) = found(shared("text", "image"))
    assert finding.code == "BN502"
    assert "2 times, after text and after image" in finding.what
    assert codes(shared("twin", "twin")) == []  # the two halves of a siamese network


def test_frozen_in_training_mode() -> None:
    assert codes(one({"training": True, "trainable": False}, framework="torch")) == ["BN503"]
    assert codes(one({"training": False, "trainable": False}, framework="torch")) == []
    assert codes(one({"training": True, "trainable": True}, framework="torch")) == []
    assert codes(one({"asked": False})) == ["BN503"]
    assert codes(one({"asked": False, "trainable": False})) == []


def test_unfrozen_inside_frozen() -> None:
    def backbone(norm: bool, last: bool):
        conv = ("conv", LINEAR, {"trainable": False})
        after = ("conv2", LINEAR, {"trainable": last})
        return chain(("x", Role.INPUT, {}), conv, ("bn", BN, {"trainable": norm}), ("relu", RELU, {}), after)

    (finding,) = found(backbone(norm=True, last=False))
    assert (finding.code, finding.layer) == ("BN504", "bn")
    assert codes(backbone(norm=False, last=False)) == []
    assert codes(backbone(norm=True, last=True)) == []  # a new head behind a frozen backbone


def test_few_values() -> None:
    dense = {"shape": (None, 4)}
    model = chain(("dense", LINEAR, {**dense, "channel_axis": 1}), ("bn", BN, dense), ("relu", RELU, dense))
    (finding,) = found(model, batch_size=8)
    assert finding.code == "BN505"
    assert f"each mean is computed from 8 values; each variance is off by about {100 * (2 / 7) ** 0.5:.0f} %" in finding.what
    (finding,) = found(model, batch_size=1)
    assert finding.level == "error"
    assert "the output is always beta" in finding.what
    assert codes(model, batch_size=32) == []
    assert codes(model) == []
    assert codes(one(), batch_size=1) == []  # 64 positions


def test_values_of_replicas_and_ghost_batches() -> None:
    dense = {"shape": (None, 4)}

    def model(**settings):
        return chain(("bn", BN, {**dense, "state": state(**settings)}), ("relu", RELU, dense))

    (finding,) = found(model(), batch_size=64, replicas=4)
    assert "each mean is computed from 16 values on each of 4 replicas" in finding.what
    assert "synchronize" in finding.remedy
    assert codes(model(synchronized=True), batch_size=64, replicas=4) == []
    (finding,) = found(model(synchronized=True), batch_size=16, replicas=4)
    assert "each mean is computed from 16 values of all 4 replicas together" in finding.what
    assert "synchronize" not in finding.remedy
    assert codes(model(virtual_batch_size=16), batch_size=64) == ["BN505"]


def test_batch_statistics_at_inference() -> None:
    assert codes(one({"training": True})) == ["BN506"]
    assert codes(one({"training": False})) == []
    assert codes(one({"state": state(mode=2)})) == codes(one({"state": state(mode=2), "trainable": False})) == ["BN506"]
    assert codes(one({"state": state(mode=1)})) == []


# The catalogue


def test_codes_are_those_that_were_published() -> None:
    assert {rule.code: rule.name for rule in RULES} == {
        "BN101": "wrong-axis",
        "BN102": "channels-first-axis",
        "BN201": "bias-before-norm",
        "BN202": "norm-after-norm",
        "BN203": "norm-at-output",
        "BN204": "dropout-before-norm",
        "BN301": "statistics-never-updated",
        "BN302": "statistics-not-converged",
        "BN303": "momentum-convention",
        "BN401": "epsilon-too-small",
        "BN402": "epsilon-dominates",
        "BN403": "not-finite",
        "BN404": "dead-gamma",
        "BN405": "constant-channels",
        "BN406": "exploding-channels",
        "BN501": "weight-decay",
        "BN502": "shared-layer",
        "BN503": "frozen-but-training",
        "BN504": "unfrozen-in-frozen",
        "BN505": "few-values",
        "BN506": "always-training",
        "BN601": "drift",
        "BN602": "modes-disagree",
    }


def test_selection() -> None:
    assert selected() == RULES
    assert [rule.code for rule in selected(["bn30"], ["BN302"])] == ["BN301", "BN303"]
    assert [rule.code for rule in selected(["drift"])] == ["BN601"]
    for wrong in ("BN9", "B", "axis"):
        with pytest.raises(ArgumentError, match=rf"--ignore takes codes.*received '{wrong}'.*BN101"):
            selected([], [wrong])
