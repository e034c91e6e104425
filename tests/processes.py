"""Several processes of one test, joined by gloo: what each does is a function of a module."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(count, function, folder, *arguments):
    """Run ``function(rank, *arguments)`` on ``count`` processes that form the world; what one raises is raised here."""
    mp.spawn(_process, args=(count, str(folder / "rendezvous"), function, arguments), nprocs=count, join=True)


def _process(rank, count, rendezvous, function, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
