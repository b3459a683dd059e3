"""Trainings by torch's elastic agent, each of which goes on from its last checkpoint: elastic.py FOLDER FAULT...

FAULT is none, or forward or backward: where the last process kills itself once, in the step after a checkpoint. Each
training writes into a folder of its own, FOLDER/FAULT. The agent is that of torchrun; its processes are forks of one
server that has imported torch, which takes longer than the training.

For the same bits all buffers are saved, since a state_dict is torch's and lacks `running_mean_low`; and gradients are
averaged one by one, since DistributedDataParallel adds them up in another order in its first step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from evennorm.torch import SyncBatchNorm

STEPS, SAVED_AFTER, FAILS_IN = 5, 2, 3


def train(folder: Path, fault: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), SyncBatchNorm(6, activation="relu"), nn.Flatten(), nn.Linear(6 * 36, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saved, start = folder / "checkpoint.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        for name, buffer in model.named_buffers():
            buffer.copy_(state["buffers"][name])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    fails = rank == last and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    for step in range(start, STEPS):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(100 * step + rank))
        if fails and step == FAILS_IN and fault == "forward":
            model[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        loss = model(x).square().mean()
        if fails and step == FAILS_IN and fault == "backward":
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == SAVED_AFTER and rank == 0:
            state = {"model": model.state_dict(), "buffers": dict(model.named_buffers()), "step": step + 1}
            torch.save({**state, "optimizer": optimizer.state_dict()}, saved)
        dist.barrier()
    if rank == 0:
        torch.save(model.state_dict(), folder / "end.pt")
        (folder / "restarts").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.destroy_process_group()


def launch(folder: Path, fault: str) -> None:
    folder.mkdir()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=3,
        run_id=fault,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=1,
        monitor_interval=0.2,
        start_method="forkserver",
    )
    elastic_launch(config, train)(folder, fault)


if __name__ == "__main__":
    # The store that torch shares between attempts holds the addresses of processes that are gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    multiprocessing.set_forkserver_preload(["evennorm.torch", "torch._dynamo"])  # the optimizers import it
    for fault in sys.argv[2:]:
        launch(Path(sys.argv[1]) / fault, fault)
