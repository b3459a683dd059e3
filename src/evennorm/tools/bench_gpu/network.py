"""A way to normalize goes in; the time and the memory of ResNet-50's training step with it come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from evennorm.errors import reason_of
from evennorm.tools.bench_gpu import clock as clocks
from evennorm.tools.bench_gpu.clock import Clock
from evennorm.torch import convert, recompute_outputs, report

STEPS = 5
"""Training steps in a turn."""


@dataclass(frozen=True)
class Step:
    """The training step of one model.

    `peak` are the bytes that a step needs beyond parameters, optimizer, inputs and gradients, which are there before it.
    """

    contestant: str
    network: str
    batch: int
    milliseconds: tuple[float, ...] = ()
    peak: int | None = None
    reason: str | None = None

    @property
    def median(self) -> float:
        return median(self.milliseconds)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | ({"median": round(self.median, 4)} if self.milliseconds else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Step:
        """What `as_dict` gave, also by way of JSON."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "milliseconds": tuple(known["milliseconds"])})


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each normalized, beside a shortcut; the stride is that of the 3x3 (v1.5)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += identity
        return self.relu(y)


class ResNet50(nn.Module):
    """He et al. 2015, arXiv 1512.03385, with the strides of v1.5: what torchvision's `resnet50` computes.

    Example:
        >>> network = ResNet50(classes=10)
        >>> sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        53
    """

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        inputs, stages = 64, []
        for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            stages.append(
                nn.Sequential(
                    *(Bottleneck(inputs if i == 0 else 4 * width, width, stride if i == 0 else 1) for i in range(blocks))
                )
            )
            inputs = 4 * width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet50() -> tuple[nn.Module, str]:
    """ResNet-50 and whose it is: torchvision's or timm's where they are installed, else the one above."""
    try:
        from torchvision.models import resnet50 as make

        return make(), "torchvision"
    except ImportError:
        pass
    try:
        import timm

        return timm.create_model("resnet50"), "timm"
    except ImportError:
        return ResNet50(), "evennorm.tools.bench_gpu.network"


def leaky(model: nn.Module) -> nn.Module:
    """With LeakyReLU in place of each ReLU, since ReLU has no inverse."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.LeakyReLU(inplace=True))
    return model


def in_place(model: nn.Module) -> nn.Module:
    """Converted, and the output written over the input where an activation follows that has an inverse, and no sum."""
    model = convert(leaky(model))
    for layer in report(model).layers:
        if layer.steps == ("leaky_relu",):
            model.get_submodule(layer.name).memory = "inplace"
    return model


class Recomputing(nn.Module):
    """A model whose forward pass is inside `recompute_outputs`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with recompute_outputs():
            return self.model(x)


EAGER, CONVERTED, RECOMPUTED = "torch eager", "evennorm", "evennorm, recompute_outputs"
COMPILED, BOTH = "torch.compile", "evennorm, torch.compile"
LEAKY_EAGER, LEAKY_CONVERTED, LEAKY_IN_PLACE = (
    "LeakyReLU: torch eager",
    "LeakyReLU: evennorm",
    "LeakyReLU: evennorm, in place",
)

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    EAGER: lambda model: model,
    CONVERTED: convert,
    RECOMPUTED: lambda model: Recomputing(convert(model)),
    COMPILED: lambda model: torch.compile(model),
    BOTH: lambda model: torch.compile(convert(model)),
    LEAKY_EAGER: leaky,
    LEAKY_CONVERTED: lambda model: convert(leaky(model)),
    LEAKY_IN_PLACE: in_place,
}
"""How the model is changed before it trains."""

SAVED = ((EAGER, CONVERTED, 0.2), (EAGER, RECOMPUTED, 0.2), (LEAKY_EAGER, LEAKY_IN_PLACE, 0.3))
"""A way, one that needs less memory, and what part of it less that has to be."""


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of SGD with momentum: bfloat16 where autocast takes it, as on a GPU, with the gradients kept in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, images, labels).backward()
        optimizer.step()

    return step


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        return nn.functional.cross_entropy(model(images), labels)


def data_of(batch: int, side: int, device: Any) -> tuple[Tensor, Tensor]:
    """Images, channels last in memory, and labels."""
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(1000, (batch,), device=device)


def steps(
    batch: int = 128,
    side: int = 224,
    rounds: int = 9,
    device: str = "cuda",
    ways: Mapping[str, Callable[[nn.Module], nn.Module]] = WAYS,
    clock: Clock = clocks.on_device,
) -> list[Step]:
    """Each way after the other, with a model of its own; what one cannot do is told in its row."""
    found = []
    for name, change in ways.items():
        torch.manual_seed(0)
        model, whose = resnet50()
        network = f"ResNet-50 of {whose}, {side}x{side}, channels last, bfloat16 by autocast"
        empty = Step(name, network, batch)
        try:
            found.append(
                _measured(empty, change(model.to(device, memory_format=torch.channels_last).train()), side, rounds, clock)
            )
        except Exception as error:
            found.append(replace(empty, reason=reason_of(error)))
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def _measured(empty: Step, model: nn.Module, side: int, rounds: int, clock: Clock) -> Step:
    device = next(model.parameters()).device
    step = training_step(model, *data_of(empty.batch, side, device))
    for _ in range(3):
        step()
    peak = peak_of(step, device.type)
    times = clocks.in_turns({empty.contestant: clocks.queued([step], STEPS)}, rounds, clock)
    milliseconds = tuple(round(ms, 4) for ms in times[empty.contestant])
    return replace(empty, milliseconds=milliseconds, peak=peak)


def peak_of(step: Callable[[], None], device: str) -> int | None:
    """Bytes that a step takes beyond what is there before it; None where the device does not count."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
