"""Run a model, fold it and make inputs for it, for each framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evennorm.errors import ArgumentError, InputError, first_line
from evennorm.models.fold_plan import Plan
from evennorm.tools.data.batch import leaves
from evennorm.tools.fold.difference import Run
from evennorm.tools.fold.inputs import Input, inputs_of_keras, inputs_of_torch, others_of_torch
from evennorm.tools.models import Opened


@dataclass(frozen=True)
class KerasModel:
    opened: Opened

    def fold(self, example: Sequence[np.ndarray], others: Sequence[Sequence[np.ndarray]]) -> tuple[Any, Plan]:
        from evennorm.keras.fold import fold

        try:
            return fold(self.opened.model)
        except ArgumentError as error:
            raise InputError(str(error)) from error

    def run(self, model: Any) -> Run:
        from evennorm.keras.graph import graph

        names = [tensor._keras_history.operation.name for tensor in model.inputs]
        by_name = isinstance(graph(model).input, dict)

        def run(batch: Sequence[np.ndarray]) -> list[np.ndarray]:
            x: Any = dict(zip(names, batch, strict=True)) if by_name else batch[0] if len(batch) == 1 else list(batch)
            return [np.asarray(each) for each in leaves(model.predict_on_batch(x))]

        return run

    def arrays(self, x: Any) -> tuple[np.ndarray, ...]:
        """Return the inputs of a batch of data in the model's order."""
        names = [tensor._keras_history.operation.name for tensor in self.opened.model.inputs]
        return tuple(x[name] for name in names) if isinstance(x, dict) else tuple(leaves(x))

    def inputs(self, shapes: Sequence[tuple[int, ...]]) -> list[Input]:
        from evennorm.keras.graph import graph
        from evennorm.keras.network import network

        try:
            graph(self.opened.model)
        except ArgumentError as error:
            raise InputError(str(error)) from error
        if shapes:
            raise InputError("--input-shape is for torch models; a Keras model says itself what it takes")
        unknown = any(None in tensor.shape[1:] for tensor in self.opened.model.inputs)
        run = self.run(self.opened.model)

        def failure(found: Sequence[Input]) -> str:
            return _failure(run, found) if unknown else ""

        return inputs_of_keras(self.opened.model, network(self.opened.model), failure)

    def others(self, found: Sequence[Input]) -> list[list[Input]]:
        """Return none: a Keras model says itself of what rank its inputs are."""
        return []

    @property
    def dtype(self) -> str:
        """The narrowest dtype that a layer computes in."""
        dtypes = {getattr(layer, "compute_dtype", "float32") for layer in self.opened.model._flatten_layers()}
        return next((each for each in ("bfloat16", "float16", "float32") if each in dtypes), "float64")


@dataclass(frozen=True)
class TorchModel:
    opened: Opened

    def fold(self, example: Sequence[np.ndarray], others: Sequence[Sequence[np.ndarray]]) -> tuple[Any, Plan]:
        from evennorm.torch.fold import fold

        try:
            return fold(self.opened.model, self.tensors(example), [self.tensors(each) for each in others])
        except ArgumentError as error:
            raise InputError(str(error)) from error

    def run(self, model: Any) -> Run:
        import torch

        def run(batch: Sequence[np.ndarray]) -> list[np.ndarray]:
            tensors = self.tensors(batch)
            modes = [(module, module.training) for module in model.modules()]
            try:
                for module, _ in modes:
                    module.training = False
                with torch.inference_mode():
                    y = model(*tensors)
            finally:
                for module, training in modes:
                    module.training = training
            return [_array(each) for each in leaves(y) if hasattr(each, "detach")]

        return run

    def tensors(self, batch: Sequence[np.ndarray]) -> tuple[Any, ...]:
        """Return a batch as tensors on the device and, for floats, in the dtype of the model."""
        import torch

        parameter = next(iter(self.opened.model.parameters()), None)
        device = "cpu" if parameter is None else parameter.device
        dtype = torch.float32 if parameter is None or not parameter.is_floating_point() else parameter.dtype
        # A copy, since data may be mapped from a file and models may write.
        tensors = [torch.from_numpy(np.array(each, order="C")).to(device) for each in batch]
        return tuple(each.to(dtype) if each.is_floating_point() else each for each in tensors)

    def arrays(self, x: Any) -> tuple[np.ndarray, ...]:
        return tuple(leaves(x))

    def inputs(self, shapes: Sequence[tuple[int, ...]]) -> list[Input]:
        from evennorm.torch.network import network

        run = self.run(self.opened.model)
        try:
            found = network(self.opened.model)
        except ArgumentError as error:
            raise InputError(str(error)) from error
        return inputs_of_torch(self.opened, found, shapes, lambda inputs: _failure(run, inputs))

    def others(self, found: Sequence[Input]) -> list[list[Input]]:
        """Return inputs of other ranks that the model takes as well."""
        from evennorm.torch.network import network

        run = self.run(self.opened.model)
        return others_of_torch(self.opened, network(self.opened.model), found, lambda inputs: _failure(run, inputs))

    def failure(self, batch: Sequence[np.ndarray]) -> str:
        """Return why the model does not run on a batch; "" if it does."""
        try:
            self.run(self.opened.model)(batch)
        except Exception as error:  # its code may raise anything
            return first_line(error)
        return ""

    @property
    def dtype(self) -> str:
        dtypes = {str(each.dtype).removeprefix("torch.") for each in self.opened.model.parameters()}
        return next((each for each in ("bfloat16", "float16", "float32") if each in dtypes), "float64")


@dataclass(frozen=True)
class FlaxModel:
    opened: Opened

    def fold(self, example: Sequence[np.ndarray], others: Sequence[Sequence[np.ndarray]]) -> tuple[Any, Plan]:
        from evennorm.flax.fold import fold

        try:
            return fold(self.opened.model, example[0])
        except ArgumentError as error:
            raise InputError(str(error)) from error

    def run(self, model: Any) -> Run:
        from evennorm.flax.program import Program

        return lambda batch: Program(model).predict(tuple(batch))

    def arrays(self, x: Any) -> tuple[np.ndarray, ...]:
        return tuple(leaves(x))

    def inputs(self, shapes: Sequence[tuple[int, ...]]) -> list[Input]:
        if len(shapes) != 1:
            raise InputError(
                f"{self.opened.name} does not say what it takes; say what one sample is by --input-shape, as in 32,32,3, "
                "or give --data"
            )
        return [Input("input", shapes[0])]

    def others(self, found: Sequence[Input]) -> list[list[Input]]:
        """Return none: the channels of Flax's layers are the last axis at every rank."""
        return []

    @property
    def dtype(self) -> str:
        import jax

        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(self.opened.model) if hasattr(leaf, "dtype")}
        return next((each for each in ("bfloat16", "float16", "float32") if each in dtypes), "float64")


Framework = KerasModel | TorchModel | FlaxModel


def adapter(opened: Opened) -> Framework:
    if opened.framework == "flax":
        return FlaxModel(opened)
    return KerasModel(opened) if opened.framework == "keras" else TorchModel(opened)


def _failure(run: Run, inputs: Sequence[Input]) -> str:
    """Return why a model does not run on inputs like these; "" if it does."""
    try:
        run([each.draw(2) for each in inputs])
    except Exception as error:  # its code may raise anything
        return first_line(error)
    return ""


def _array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype.itemsize < 4 and tensor.is_floating_point() else tensor).numpy()
