"""Folded torch models as ONNX: onnxruntime computes what the model did, for any number of samples. Keras: tests/keras."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from evennorm.errors import InputError, MissingExtra
from evennorm.tools.fold import fold


class Pair(nn.Module):
    """Two inputs, of which one goes through convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.dense, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, image: Tensor, row: Tensor) -> Tensor:
        return self.last(self.dense(row)) + self.act(self.norm(self.conv(image))).mean((2, 3))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = Pair().eval()
    for norm in (made.norm, made.last):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return made


SHAPES = [(3, 8, 8), (5,)]


def test_onnxruntime_computes_what_the_model_did(model, tmp_path: Path) -> None:
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for file in files:
        report = fold(model, file, input_shape=SHAPES, measure=False)
    assert (report.count("folded"), report.output) == (2, str(files[1]))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in files[0].read_bytes()
    read = onnx.load(files[0])
    onnx.checker.check_model(read, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in read.graph.node}
    assert {each.key: each.value for each in read.metadata_props} == {"folded_for": report.inputs}
    session = onnxruntime.InferenceSession(files[0])
    assert [slot.shape for slot in session.get_inputs()] == [["samples", 3, 8, 8], ["samples", 5]]
    for samples in (1, 7):
        inputs = [torch.randn(samples, *shape) for shape in SHAPES]
        given = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
        expected = model.double()(*(x.double() for x in inputs)).detach().numpy()
        np.testing.assert_allclose(session.run(None, given)[0], expected, rtol=1e-4, atol=1e-5)
        model.float()


def test_a_missing_package_is_told_before_anything_is_folded(model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"^writing \.onnx needs the package onnxscript, .* 'evennorm\[onnx\]'$"):
        fold(model, tmp_path / "a.onnx", input_shape=SHAPES)


def test_what_cannot_be_exported_leaves_no_file(tmp_path: Path, monkeypatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    told = r"cannot be exported to \.onnx \(RuntimeError: no such operation\); write it to \.pt2$"
    with pytest.raises(InputError, match=told):
        fold(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), tmp_path / "a.onnx", input_shape=[(3,)], measure=False)
    assert list(tmp_path.iterdir()) == []
