"""Train over processes with torch.distributed: each normalizes its part by the statistics of the whole batch.

    torchrun --nproc-per-node 2 examples/distributed/keras_torch.py

Without torchrun one process trains alone, to the same weights.
"""

import os
from datetime import timedelta

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from evennorm.keras import BatchNormalization

BATCH = 16

processes, process = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
keras.utils.set_random_seed(1)
rng = np.random.default_rng(0)
x = torch.tensor(rng.normal(5.0, 2.0, (61, 8)), dtype=torch.float32)
y = torch.sin(x.sum(1, keepdim=True))

norm = BatchNormalization(momentum=0.5, activation="relu", synchronized=True)
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), norm, keras.layers.Dense(1)])
optimizer = torch.optim.SGD([variable.value for variable in model.trainable_variables], 0.05)
trained = model
if processes > 1:
    # A process that has lost the others ends with an error after this time, and does not wait for ever.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    trained = DistributedDataParallel(model)

for _ in range(2):
    for start in range(0, len(x), BATCH):
        part = slice(start + process, start + BATCH, processes)
        loss = ((trained(x[part], training=True) - y[part]) ** 2).sum() / BATCH
        optimizer.zero_grad()
        (loss * processes).backward()  # DistributedDataParallel gives the mean of all processes' gradients
        optimizer.step()
if processes > 1:
    torch.distributed.all_reduce(loss)
    torch.distributed.destroy_process_group()
if process == 0:
    print("loss", float(loss.detach()))
    for variable in (norm.gamma, norm.moving_mean, norm.moving_variance):
        print(variable.name, *keras.ops.convert_to_numpy(variable))
