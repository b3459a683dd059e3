"""Small networks that call their batch normalizations in the ways that people write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class BasicBlock(nn.Module):
    """As torchvision's: one ReLU for all, the shortcut added in place."""

    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """As torchvision's, the sum written as x + y and the last activation as a function."""

    def __init__(self, inside: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Conv2d(inside, 4 * width, 1) if inside != 4 * width else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer1(x))
        return self.fc(torch.flatten(x, 1))


def resnet18() -> nn.Module:
    return ResNet(BasicBlock(8, 8), BasicBlock(8, 12, 2), BasicBlock(12, 12), width=12)


def resnet50() -> nn.Module:
    return ResNet(Bottleneck(8, 4), Bottleneck(16, 4), width=16)


class SequentialResidual(nn.Module):
    """Both branches are Sequential, and the activation is made where it is used."""

    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.residual(x) + self.shortcut(x))


def sequential_resnet() -> nn.Module:
    return ResNet(SequentialResidual(8, 8), SequentialResidual(8, 12, 2), width=12)


class ConvNormReLU(nn.Sequential):
    def __init__(self, inside: int, outside: int, kernel: int = 3, stride: int = 1, groups: int = 1):
        super().__init__(
            nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
        )


class InvertedResidual(nn.Module):
    """MobileNetV2's: the sum has no activation."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int):
        super().__init__()
        self.use_residual = stride == 1 and inside == outside
        hidden = inside * expansion
        self.conv = nn.Sequential(
            ConvNormReLU(inside, hidden, 1),
            ConvNormReLU(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_residual:
            return x + self.conv(x)
        return self.conv(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormReLU(3, 4, 3, 2), InvertedResidual(4, 6, 2, 2), InvertedResidual(6, 6, 1, 2), ConvNormReLU(6, 8, 1)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).reshape(x.shape[0], -1))


class DenseLayer(nn.Module):
    """Normalization before the convolution, its calls in a method of its own."""

    def __init__(self, inside: int, growth: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inside)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inside, 8, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, growth, 3, 1, 1, bias=False)

    def bottleneck(self, inputs: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(inputs)))

    def forward(self, inputs: Tensor) -> Tensor:
        new = self.conv2(self.relu2(self.norm2(self.bottleneck(inputs))))
        return torch.cat([inputs, new], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        DenseLayer(6, 4),
        DenseLayer(10, 4),
        nn.BatchNorm2d(14),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(14, 5),
    )


class BasicConv(nn.Module):
    """Inception's: the activation as a function, in place."""

    def __init__(self, inside: int, outside: int, **options: Any):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, bias=False, **options)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch1 = BasicConv(3, 4, kernel_size=1)
        self.branch3 = nn.Sequential(BasicConv(3, 4, kernel_size=1), BasicConv(4, 4, kernel_size=3, padding=1))
        self.pool = BasicConv(3, 4, kernel_size=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(F.max_pool2d(x, 3, 1, 1))
        x = torch.cat([self.branch1(x), self.branch3(x), pooled], 1)
        return self.fc(x.mean((2, 3)))


class UNet(nn.Module):
    """One ReLU is shared by all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.down = nn.Conv2d(3, 4, 3, padding=1)
        self.norm_down = nn.BatchNorm2d(4)
        self.bottom = nn.Conv2d(4, 8, 3, padding=1)
        self.norm_bottom = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.norm_up = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.relu(self.norm_down(self.down(x)))
        x = self.relu(self.norm_bottom(self.bottom(F.max_pool2d(skip, 2))))
        x = self.relu(self.norm_up(self.up(x)))
        return self.head(self.relu(torch.cat([skip, x], 1)))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((3, 4), (4, 8)):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class DataDependent(nn.Module):
    """Which way it takes, the values say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y = F.relu(y) if x.mean() > 0 else F.leaky_relu(y)
        return self.tail(y)


class PreActivation(nn.Module):
    """He et al. 2016: normalization and activation come first, the sum last."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, bias=False) if inside != outside else None
        self.drop_rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = F.dropout(F.relu(self.bn2(out)), p=self.drop_rate, training=self.training)
        return self.conv2(out) + shortcut


def preactivation_resnet() -> nn.Module:
    return ResNet(PreActivation(8, 8), PreActivation(8, 12), width=12)


class Discriminator(nn.Module):
    """DCGAN's: leaky, one of them as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2, inplace=True))
        self.conv = nn.Conv2d(4, 8, 4, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.conv(self.main(x))), 0.3)
        return self.out(x).flatten(1)


class Video(nn.Module):
    """Three-dimensional, then a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x.unsqueeze(2)).mean((2, 3, 4)))


class TimmBlock(nn.Module):
    """As timm's: places for what this network has not, the sum in place, activations of their own."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.drop_block = nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.aa = nn.Identity()
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.se = self.drop_path = None
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


def timm_resnet() -> nn.Module:
    return ResNet(TimmBlock(8, 8), TimmBlock(8, 12), width=12)


@dataclass(frozen=True)
class Architecture:
    make: Callable[[], nn.Module]
    together: dict[str, str]
    """What is expected to be computed together with which batch normalization; nothing with others."""


ARCHITECTURES = {
    "ResNet-18": Architecture(
        resnet18,
        {
            "bn1": "relu",
            **{f"layer1.{place}.bn1": "relu" for place in range(3)},
            **{f"layer1.{place}.bn2": "add + relu" for place in range(3)},
        },
    ),
    "ResNet-50": Architecture(
        resnet50,
        {
            "bn1": "relu",
            **{f"layer1.{place}.bn{number}": "relu" for place in range(2) for number in (1, 2)},
            **{f"layer1.{place}.bn3": "add + relu" for place in range(2)},
        },
    ),
    "ResNet of Sequentials": Architecture(
        sequential_resnet,
        {
            "bn1": "relu",
            "layer1.0.residual.1": "relu",
            "layer1.0.residual.4": "add + relu",
            "layer1.1.residual.1": "relu",
            "layer1.1.shortcut.1": "add + relu",
        },
    ),
    "ResNet of timm": Architecture(
        timm_resnet,
        {
            "bn1": "relu",
            **{f"layer1.{place}.bn1": "relu" for place in range(2)},
            **{f"layer1.{place}.bn2": "add + relu" for place in range(2)},
        },
    ),
    "MobileNetV2": Architecture(
        MobileNet,
        {
            "features.0.1": "relu",
            **{f"features.{block}.conv.{part}.1": "relu" for block in (1, 2) for part in (0, 1)},
            "features.2.conv.3": "add",
            "features.3.1": "relu",
        },
    ),
    "DenseNet": Architecture(
        densenet, {"3": "relu", **{f"{place}.norm{number}": "relu" for place in (1, 2) for number in (1, 2)}}
    ),
    "Inception": Architecture(
        Inception, {f"{branch}.bn": "relu" for branch in ("branch1", "branch3.0", "branch3.1", "pool")}
    ),
    "U-Net": Architecture(UNet, {f"norm_{part}": "relu" for part in ("down", "bottom", "up")}),
    "VGG": Architecture(VGG, {"features.1": "relu", "features.5": "relu"}),
    "data-dependent": Architecture(DataDependent, {"tail.1": "relu"}),
    "pre-activation ResNet": Architecture(
        preactivation_resnet,
        {"bn1": "relu", **{f"layer1.{place}.bn{number}": "relu" for place in (0, 1) for number in (1, 2)}},
    ),
    "DCGAN": Architecture(Discriminator, {"main.1": "leaky_relu", "norm": "leaky_relu"}),
    "video": Architecture(Video, {"stem.1": "relu", "head.1": "relu"}),
}
