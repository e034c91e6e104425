"""Several processes of one test, joined by gloo: what each does is a function of a module. None outlives the test."""

import os
import signal
import subprocess
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 300
"""Seconds after which processes that wait for each other are ended: many times what the slowest test takes."""


def in_processes(count, function, folder, *arguments):
    """Run ``function(rank, *arguments)`` on ``count`` processes that form the world; what one raises is raised here."""
    running = mp.spawn(_process, args=(count, str(folder / "rendezvous"), function, arguments), nprocs=count, join=False)
    end = time.monotonic() + LIMIT
    try:
        while not running.join(timeout=max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"{count} processes of {function.__name__} did not end in {LIMIT} s"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
                process.join()


def launched(command, **options):
    """`subprocess.run` with the text of both outputs, which ends a launcher so that this ends its processes."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun hands it on
            try:
                process.communicate(timeout=40)  # and kills after 30 s whoever did not end
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _process(rank, count, rendezvous, function, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count, timeout=timedelta(seconds=LIMIT))
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
