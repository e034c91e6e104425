"""Run one training as several processes of a Ray cluster (pip install ray). The run directory has to lie where all machines see it.

    python examples/ray_train.py 8 train --data my_texts/ --tokens-per-step 524288 --context 1024 --steps 20000 --out /shared/large

RAY_CPUS and RAY_GPUS say what each process gets (1 and 0). The same line goes on with a run that was stopped.
"""

import os
import socket
import subprocess
import sys

import ray

CPUS, GPUS = int(os.environ.get("RAY_CPUS", "1")), float(os.environ.get("RAY_GPUS", "0"))


@ray.remote(num_cpus=CPUS, num_gpus=GPUS)
class Process:
    def place(self):
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def work(self, rank, size, place, arguments, folder):
        address, port = place
        # Ray shows each process its own GPU alone, which is number 0 there.
        told = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port, "OMP_NUM_THREADS": CPUS}
        environment = os.environ | {name: str(value) for name, value in told.items()}
        return subprocess.run([sys.executable, "-m", "gam_lm", *arguments], cwd=folder, env=environment).returncode


if __name__ == "__main__":
    count, *arguments = sys.argv[1:]
    ray.init()
    workers = [Process.remote() for _ in range(int(count))]
    place = ray.get(workers[0].place.remote())
    codes = ray.get([worker.work.remote(rank, len(workers), place, arguments, os.getcwd()) for rank, worker in enumerate(workers)])
    sys.exit(max(codes))
