"""torch's momentum weighs the new batch, Keras's the old average.

`evennorm check` finds it as BN303; run this file to see what it says of both halves.
"""

from torch import nn

from evennorm.tools.check import check


def wrong():
    """Keras's 0.99, written in torch: the moving statistics are those of the last batch."""
    return nn.Sequential(nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8, momentum=0.99), nn.ReLU(), nn.Linear(8, 4))


def right():
    return nn.Sequential(nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8, momentum=0.01), nn.ReLU(), nn.Linear(8, 4))


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
