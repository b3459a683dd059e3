"""What a notebook shows of explanations, reports and findings: the same facts as their text, and no markup of a name's."""

from collections import OrderedDict
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from evennorm.tools.check import check
from evennorm.tools.explain import explain
from evennorm.tools.explain.model import explain_model
from evennorm.tools.fold import fold
from evennorm.tools.recalibrate import recalibrate
from evennorm.torch import convert, report

HOSTILE = "<script>alert(1)</script>"
VOID = {"polygon", "circle", "rect"}


class Shown(HTMLParser):
    """The text of a fragment and its tags, each of which must be closed in its turn."""

    def __init__(self, fragment: str):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(fragment)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def hostile_model() -> nn.Module:
    layers = [("hidden", nn.Linear(3, 4)), (HOSTILE, nn.BatchNorm1d(4)), ("last", nn.ReLU())]
    return nn.Sequential(OrderedDict(layers)).eval()


def shown(value: object) -> Shown:
    found = Shown(value._repr_html_())  # type: ignore[attr-defined]
    assert "script" not in found.tags
    return found


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 3)).astype("float32")


def test_an_explanation_is_the_figure_the_parameters_and_the_findings() -> None:
    wrong = explain((32, 3, 28, 28), axis=-1)
    found = shown(wrong)
    assert found.tags.count("svg") == 1
    assert found.words[0] == "Batch normalization: shape (32, 3, 28, 28), axis 3 (-1)"
    for words in ("moving_variance", "(28,)", "spatial-axis", wrong.findings[0].remedy):
        assert words in found.words
    assert shown(explain((32, 3), axis=-1)).tags.count("tr") == 5
    assert "svg" not in shown(explain((0, 3))).tags  # there are no cells to draw
    assert wrong.findings[0].remedy in "".join(shown(wrong.findings[0]).words)


def test_the_report_and_the_findings_of_a_check(x: np.ndarray) -> None:
    checked = check(hostile_model(), shape=(8, 3))
    codes = [finding.code for finding in checked.findings]
    assert "BN201" in codes
    found = shown(checked)
    assert [word for word in found.words if word in codes] == codes
    assert any(HOSTILE in word for word in found.words)
    assert checked.findings[0].what in "".join(shown(checked.findings[0]).words)
    assert "Nothing looks wrong." in shown(check(nn.Sequential(nn.Linear(3, 4, bias=False)))).words


def test_an_explained_model() -> None:
    found = shown(explain_model(hostile_model(), shape=(8, 3)))
    at = found.words.index(HOSTILE)
    assert found.words[at + 1 : at + 5] == ["(8, 4)", "1", "4", "8"]


def test_the_report_of_a_conversion() -> None:
    found = shown(report(convert(hostile_model())))
    assert found.words[0].startswith("1 batch normalization: 1 computed by evennorm, 1 of them together with")
    assert found.words[-4:] == [HOSTILE, "BatchNorm1d", "evennorm", "relu"]


def test_the_report_of_a_folding() -> None:
    found = shown(fold(hostile_model(), input_shape=[(3,)], measure=False))
    assert found.words[-3:-1] == [HOSTILE, "folded into the previous layer, hidden"]
    assert found.words[-1].startswith("largest difference")


def test_the_report_of_a_recalibration(x: np.ndarray) -> None:
    model = hostile_model()
    done = recalibrate(model, x)
    found = shown(done)
    assert found.words[0] == done.title
    assert found.words[6:8] == [HOSTILE, "8"]
    assert any(word.startswith("outputs before and after") for word in found.words)
    with torch.no_grad():
        values = model.hidden(torch.from_numpy(x)).double()
    assert f"{done.layers[0].shift:.3g} sd" in found.words
    assert done.layers[0].shift == pytest.approx(float((values.mean(0).abs() / values.std(0, correction=0)).max()), rel=1e-3)
