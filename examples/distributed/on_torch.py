"""Train a network over processes with torch: each normalizes its part of a batch by the statistics of the whole.

    torchrun --nproc-per-node 2 examples/distributed/on_torch.py

Without torchrun one process trains alone, to the same weights.
"""

import os
from datetime import timedelta

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evennorm.torch import SyncBatchNorm

BATCH = 8

processes, process = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
)
model = nn.Sequential(SyncBatchNorm.convert_sync_batchnorm(model), nn.Linear(4 * 8 * 8, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
trained = model
if processes > 1:
    # A process that has lost the others ends with an error after this time, and does not wait for ever.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    trained = DistributedDataParallel(model)

images = torch.randn(61, 1, 12, 12) * 2 + 5
targets = images.mean((1, 2, 3)).sin()[:, None]
for _ in range(2):
    for start in range(0, len(images), BATCH):
        part = slice(start + process, start + BATCH, processes)
        loss = (trained(images[part]) - targets[part]).square().sum() / BATCH
        optimizer.zero_grad()
        (loss * processes).backward()  # DistributedDataParallel gives the mean of all processes' gradients
        optimizer.step()
if processes > 1:
    torch.distributed.all_reduce(loss)
    torch.distributed.destroy_process_group()
if process == 0:
    norm = model[0][1]
    print("loss", loss.item())
    for name in ("weight", "running_mean", "running_var"):
        print(name, *getattr(norm, name).tolist())
