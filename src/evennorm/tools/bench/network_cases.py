"""Name the networks whose training steps are measured, and read lists of them such as "mlp,resnet50:8x224"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evennorm.errors import InputError
from evennorm.tools.bench.cases import checked_counts
from evennorm.tools.zoo import LIBRARIES, is_of_library

Sizes = tuple[int, int | None]
"""Batch, and side of the images; None where the network takes vectors."""

FEATURES = 256
"""Inputs of the MLP, and width of its blocks."""


@dataclass(frozen=True)
class Network:
    """The inputs and outputs of a network.

    Args:
        title: for tables.
        channels: of its images; None where it takes vectors of `FEATURES`.
        classes: outputs.
        smallest: the least side of its images.
    """

    title: str
    channels: int | None
    classes: int
    smallest: int = 0


NETWORKS = {
    "mlp": Network("MLP, 4 x 256", None, 10),
    "article": Network("The articles' network", 1, 7, 24),
    "resnet18": Network("ResNet-18", 3, 1000, 32),
    "resnet50": Network("ResNet-50", 3, 1000, 32),
    "mobilenet": Network("MobileNetV2", 3, 1000, 32),
}

ON_CPU: Mapping[str, tuple[Sizes, ...]] = {
    "mlp": ((16, None), (128, None)),
    "article": ((64, 48),),
    "resnet18": ((4, 96),),
    "resnet50": ((4, 96),),
    "mobilenet": ((4, 96),),
}
"""Batches and sides where none are given, small enough for a laptop's processor."""

ON_GPU: Mapping[str, tuple[Sizes, ...]] = {
    **ON_CPU,
    "resnet18": ((128, 224),),
    "resnet50": ((128, 224),),
    "mobilenet": ((128, 224),),
}
"""The same for a GPU: the image networks as they are trained on ImageNet."""


def network_named(name: str) -> Network | None:
    """One of NETWORKS, or a classifier of timm or torchvision; None where there is no such network.

    Example:
        >>> network_named("timm:convnext_atto"), network_named("vgg")
        (Network(title='timm:convnext_atto', channels=3, classes=1000, smallest=1), None)
    """
    return Network(name, 3, 1000, 1) if is_of_library(name) else NETWORKS.get(name)


@dataclass(frozen=True)
class NetworkCase:
    """One network at one batch size.

    Args:
        name: one of NETWORKS, `timm:NAME` or `torchvision:NAME`.
        batch: samples of a step.
        side: of its images; None where it takes vectors.

    Raises:
        InputError: there is no such network, or it cannot take such a batch.
    """

    name: str
    batch: int
    side: int | None = None

    def __post_init__(self) -> None:
        network = network_named(self.name)
        if network is None:
            raise InputError(f"networks are {', '.join(NETWORKS)}, timm:NAME and torchvision:NAME; received {self.name!r}")
        checked_counts(samples=self.batch)
        if (self.side is None) != (network.channels is None):
            kind = "vectors, which have no side" if network.channels is None else "images, which have a side"
            raise InputError(f"{self.name} takes {kind}; received the side {self.side}")
        if self.side is not None and self.side < network.smallest:
            raise InputError(f"{self.name} takes images from {network.smallest} px on; received {self.side}")

    @property
    def network(self) -> Network:
        network = network_named(self.name)
        assert network is not None
        return network

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input, channels first.

        Example:
            >>> NetworkCase("mlp", 16).shape, NetworkCase("resnet50", 4, 96).shape
            ((16, 256), (4, 3, 96, 96))
        """
        if self.side is None or self.network.channels is None:
            return self.batch, FEATURES
        return self.batch, self.network.channels, self.side, self.side

    def __str__(self) -> str:
        """
        Example:
            >>> str(NetworkCase("mlp", 16)), str(NetworkCase("resnet50", 4, 96))
            ('mlp:16', 'resnet50:4x96')
        """
        return f"{self.name}:{self.batch}" + ("" if self.side is None else f"x{self.side}")

    @property
    def title(self) -> str:
        """
        Example:
            >>> NetworkCase("resnet50", 4, 96).title
            'ResNet-50, 96 px, batch 4'
        """
        side = "" if self.side is None else f", {self.side} px"
        return f"{self.network.title}{side}, batch {self.batch}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parsed_networks(text: str, usual: Mapping[str, tuple[Sizes, ...]] = ON_CPU) -> list[NetworkCase]:
    """Parse networks from "mlp:16,article,resnet50:8x224" or "all", each once.

    Args:
        text: names, each with a batch and a side of images if they are not to be the usual ones.
        usual: the sizes of a network that is named alone.

    Raises:
        InputError: something else.

    Example:
        >>> [str(case) for case in parsed_networks("mlp,resnet18:8,resnet50:8x224")]
        ['mlp:16', 'mlp:128', 'resnet18:8x96', 'resnet50:8x224']
    """
    rule = (
        f"networks are {', '.join(NETWORKS)}, timm:NAME, torchvision:NAME, or all; a batch may follow, and for images "
        "their side, as in mlp:16,resnet50:8x224"
    )
    name_of, size = rf"(?:(?:{'|'.join(LIBRARIES)}):)?[\w.-]+", "[0-9]{1,9}"
    found = []
    for part in NETWORKS if text.strip() == "all" else text.split(","):
        match = re.fullmatch(rf"\s*({name_of})(?::({size})(?:x({size}))?)?\s*", part)
        if match is None or network_named(match[1]) is None:
            raise InputError(f"{rule}; received {part.strip()!r} in {text!r}")
        name, batch, side = match[1], match[2], match[3]
        sizes = usual[name if name in NETWORKS else "resnet18"]
        if batch is None:
            found += [NetworkCase(name, *each) for each in sizes]
        else:
            found.append(NetworkCase(name, int(batch), sizes[0][1] if side is None else int(side)))
    return list(dict.fromkeys(found))
