"""A device without kernels of ours and without float64, as Apple's is: modules, tools and `evennorm compare` on it.

The programs run in processes of their own, on a device that `another_device` makes of the processor: it refuses float64 and
operations that mix it with the processor. What is computed there is compared with float64, or with the processor.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORTS = """
import numpy as np
import torch
from torch import nn
from tests.torch.another_device import FAR
from evennorm.torch import BatchNorm2d, batch_norm, compiled, convert, namespace, place
namespace.WITHOUT_FLOAT64.add("far")

def close(x, y, bound, scale=None):
    error = float((x.detach().cpu().double() - y.detach()).abs().max() / (scale or y.detach().abs().max()))
    assert error < bound, (error, bound)

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

random = np.random.default_rng(0)
x = random.random((40, 3, 6, 6), dtype="float32")
y = np.arange(40) % 3
batches = [(torch.from_numpy(x[:20]), y[:20]), (torch.from_numpy(x[20:]), y[20:])]
"""

MODULES = """
def compare(options, mean, given):
    x = torch.randn(6, 4, 5, 3) + mean
    dy, residual, mask = torch.randn(6, 4, 5, 3), torch.randn(6, 4, 5, 3), torch.rand(6, 5, 3) > 0.3
    extra = {name: value for name, value in {"residual": residual, "mask": mask}.items() if name in given}
    module, exact = BatchNorm2d(4, **options, device="far"), BatchNorm2d(4, **options, dtype=torch.float64)
    far, wide = x.to("far").requires_grad_(), x.double().requires_grad_()
    out = module(far, **{name: value.to("far") for name, value in extra.items()})
    out.backward(dy.to("far"))
    wanted = exact(wide, **{name: value if name == "mask" else value.double() for name, value in extra.items()})
    wanted.backward(dy.double())
    assert out.device == FAR
    close(out, wanted, 2e-6)
    close(far.grad, wide.grad, 5e-6)
    close(module.running_mean.cpu().double() + module.running_mean_low.cpu(), exact.running_mean, 2e-7, scale=max(mean, 1))
    close(module.running_var, exact.running_var, 2e-6)
    exact.load_state_dict({name: value.cpu() for name, value in module.state_dict().items()})
    close(module.eval()(far), exact.eval()(wide.detach()), 2e-6)

torch.manual_seed(0)
kinds = {"activation": "relu"}, {"momentum": None}, {"virtual_batch_size": 3}, {"activation": "elu"}, {"affine": False}
for mean in (0, 1e5):
    for options in ({}, *kinds):
        compare(options, mean, ())
        compare(options, mean, ("residual",))
        if "virtual_batch_size" not in options:
            compare(options, mean, ("mask",))
    rows = torch.randn(4096, 3) + mean
    shift, rest, variance = (row.cpu() for row in compiled._statistics(rows.to("far"), (0,)))
    close((shift.double() + rest)[0] - mean, rows.double().mean(0) - mean, 1e-6, scale=1)
    close(variance[0], rows.double().var(0, correction=0), 1e-6)
in_place = BatchNorm2d(3, memory="inplace", activation="leaky_relu", device="far")
in_place(torch.from_numpy(x).to("far").requires_grad_() * 1).sum().backward()
far = torch.from_numpy(x).to("far").requires_grad_()
dx, = torch.autograd.grad(batch_norm(far)[0].square().sum(), far, create_graph=True)
assert torch.autograd.grad(dx.square().sum(), far)[0].device == FAR
"""

TOOLS = """
from evennorm.tools.check import check
from evennorm.tools.fold import fold
from evennorm.tools.recalibrate import recalibrate
def both(of):
    near, far = of(network()), of(network().to("far"))
    assert {each.device.type for each in far.state_dict().values()} == {"far"}
    close(far.eval()(torch.from_numpy(x).to("far")), near.eval()(torch.from_numpy(x)).double(), 1e-5)

both(convert)
for where in ("none", "before", "after", "input"):
    both(lambda model: place(model, where, input_shape=(3, 6, 6)))
both(lambda model: recalibrate(model, batches) and model)
both(lambda model: fold(model, input_shape=(3, 6, 6)).folded)
models = network(), network().to("far")
found = [[finding.as_dict() for finding in check(model, batches, batch_size=20).findings] for model in models]
assert [each["code"] for each in found[0]] == [each["code"] for each in found[1]]
"""

COMPARE = """
from dataclasses import replace
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.torch_models import TorchArchitecture
from evennorm.tools.compare.torch_train import TorchTrainer
from tests.tools.comparing import settings
data = Data("made", x, y, x[:8], y[:8], x[:8], y[:8], 3)
architecture = TorchArchitecture("network", network, (3, 6, 6), True, "")
given = settings("out", batch_size=8, framework="torch", engine="torch", advantages=True)
trainers = [TorchTrainer(replace(given, device=device), data, architecture) for device in ("cpu", "far")]
for where in ("none", "before", "after", "as-is"):
    near, far = (trainer.train(Run(where, 0.1, 0)) for trainer in trainers)
    assert next(trainers[1].initial(Run(where, 0.1, 0)).parameters()).device == FAR
    np.testing.assert_allclose(near.test_loss, far.test_loss, rtol=1e-4)
    np.testing.assert_allclose(near.unit_input, far.unit_input, rtol=1e-3)
"""


LEAVE = """
import os
os._exit(0)  # autograd's thread of such a device may abort the process while it ends
"""


@pytest.mark.parametrize("program", [MODULES, TOOLS, COMPARE], ids=["modules", "tools", "compare"])
def test_on_another_device(program: str) -> None:
    root = Path(__file__).parents[2]
    settings = os.environ | {"PYTHONPATH": str(root), "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", IMPORTS + program + LEAVE]
    done = subprocess.run(command, env=settings, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
