"""A training loop that never lets the moving statistics follow the batches.

`evennorm check` finds it as BN301; run this file to see what it says of both halves.
"""

import torch
from torch import nn

from evennorm.tools.check import check


def trained(model):
    """Ten steps of somebody's own training loop, after model.train() or model.eval()."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = 3 + 2 * torch.randn(64, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
    return model


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8, momentum=0.5), nn.ReLU(), nn.Linear(8, 4))


def wrong():
    """Trained in evaluation mode: gamma and beta learn, the moving statistics stay 0 and 1."""
    return trained(network().eval())


def right():
    return trained(network().train())


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
