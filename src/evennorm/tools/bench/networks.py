"""Build the networks whose training steps are measured, with torch's layers and without normalization.

ResNets and MobileNetV2 are torchvision's where it is installed. Those that stand here compute the same, with as many
parameters, in-place ReLU and `y += identity`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evennorm.tools.bench.network_cases import FEATURES, NetworkCase
from evennorm.tools.zoo import is_of_library, maker


def build(case: NetworkCase) -> tuple[nn.Module, str]:
    """Build the network of a case, with fresh weights and torch's layers; return it and the package it is from.

    Example:
        >>> model, source = build(NetworkCase("mlp", 16))
        >>> sum(isinstance(module, nn.BatchNorm1d) for module in model.modules()), source
        (4, 'evennorm')
    """
    if case.name == "mlp":
        return mlp(case.network.classes), "evennorm"
    if case.side is not None and case.name == "article":
        return article(case.side, case.network.classes), "evennorm"
    classes = case.network.classes
    if is_of_library(case.name):
        return maker(case.name, classes=classes)(), case.name.partition(":")[0]
    try:
        from torchvision import models
    except ImportError:
        own = {"resnet18": resnet18, "resnet50": resnet50, "mobilenet": MobileNetV2}
        return own[case.name](classes), "evennorm"
    theirs = {"resnet18": models.resnet18, "resnet50": models.resnet50, "mobilenet": models.mobilenet_v2}
    return theirs[case.name](num_classes=classes), "torchvision"


def mlp(classes: int = 10, features: int = FEATURES, blocks: int = 4) -> nn.Sequential:
    """Build blocks of Linear, BatchNorm1d and ReLU, all of one width, and a Linear for the classes."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Linear(features, features), nn.BatchNorm1d(features), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(features, classes))


def article(side: int = 48, classes: int = 7) -> nn.Sequential:
    """Build the articles' convolutional network, as `evennorm compare` has it in Keras: ReLU precedes each normalization.

    Example:
        >>> sum(value.numel() for value in article().state_dict().values() if value.ndim)
        2354567
    """
    pixels = (((side - 4) // 2 - 2) // 2 - 2) // 2

    def norm(kind: type[nn.Module], channels: int) -> nn.Module:
        return kind(channels, eps=1e-3, momentum=0.01)

    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), norm(nn.BatchNorm2d, 64), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.MaxPool2d(2), norm(nn.BatchNorm2d, 128)),
        *(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), norm(nn.BatchNorm1d, 128 * pixels**2)),
        *(nn.Linear(128 * pixels**2, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, classes)),
    )


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each normalized, beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += identity
        return self.relu(y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each normalized, beside a shortcut; the stride is that of the 3x3 (v1.5)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = self.expansion * width
        self.conv1, self.bn1 = _convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _convolution(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += identity
        return self.relu(y)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """He et al. 2015, arXiv 1512.03385: four stages of so many blocks each."""

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], classes: int):
        super().__init__()
        self.conv1, self.bn1 = _convolution(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        inputs, stages = 64, []
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                blocks.append(block(inputs, 64 << stage, 2 if stage and not i else 1))
                inputs = block.expansion * (64 << stage)
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(classes: int = 1000) -> ResNet:
    """
    Example:
        >>> sum(isinstance(module, nn.BatchNorm2d) for module in resnet18(10).modules())
        20
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet50(classes: int = 1000) -> ResNet:
    """Build ResNet-50 with the strides of v1.5.

    Example:
        >>> sum(isinstance(module, nn.BatchNorm2d) for module in resnet50(10).modules())
        53
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)


class InvertedResidual(nn.Module):
    """A 1x1 convolution that widens, a depthwise 3x3 and a 1x1 that narrows, each normalized; ReLU6 after the first two."""

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int):
        super().__init__()
        width = inputs * widening
        layers = [] if widening == 1 else [_normalized(inputs, width, 1)]
        layers += [_normalized(width, width, 3, stride, width)]
        self.conv = nn.Sequential(*layers, _convolution(width, outputs, 1), nn.BatchNorm2d(outputs))
        self.with_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.with_shortcut else self.conv(x)


def _normalized(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = _convolution(inputs, outputs, size, stride, groups)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, arXiv 1801.04381.

    Example:
        >>> sum(isinstance(module, nn.BatchNorm2d) for module in MobileNetV2(10).modules())
        52
    """

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    """Widening, output channels, blocks, and the first block's stride."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        inputs, layers = 32, [_normalized(3, 32, 3, 2)]
        for widening, outputs, depth, stride in self.STAGES:
            for i in range(depth):
                layers.append(InvertedResidual(inputs, outputs, 1 if i else stride, widening))
                inputs = outputs
        self.features = nn.Sequential(*layers, _normalized(inputs, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def without_normalization(model: nn.Module, x: Tensor) -> nn.Module:
    """Put `nn.Identity` in place of each batch normalization, and scale the weights.

    Fifty layers whose weights are left as they are take values to infinity or to denormal numbers, and arithmetic takes
    another time on either. So the weights of each convolution and linear layer are divided by the standard deviation of
    what they give for `x`, layer after layer (Mishkin and Matas 2015, arXiv 1511.06422, without its orthogonal start).
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, nn.Identity())

    def scale(layer: nn.Module, _: object, y: Tensor) -> Tensor:
        deviation = y.float().std()
        for parameter in layer.parameters(recurse=False):
            parameter /= deviation
        return y / deviation.to(y.dtype)

    weighted = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [module.register_forward_hook(scale) for module in weighted]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return model
