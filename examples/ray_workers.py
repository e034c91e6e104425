"""Run one command as many processes of a Ray cluster, which share its rows through the results folder (pip install ray).

    python examples/ray_workers.py 8 bench --data my_texts/ --models gam transformer --seeds 0 1 2 --no-timing --out /shared/compared

The folder has to lie where all machines see it. Afterwards the same `gam bench` without --no-timing measures the speed columns on one quiet machine.
A study of `gam tune` needs --storage as well, a database that all machines reach. RAY_CPUS and RAY_GPUS say what each process gets (1 and 0).
"""

import os
import subprocess
import sys

import ray

CPUS, GPUS = int(os.environ.get("RAY_CPUS", "1")), float(os.environ.get("RAY_GPUS", "0"))


@ray.remote(num_cpus=CPUS, num_gpus=GPUS)
def work(arguments, folder):
    """The command in a process of its own, so that one that dies takes no other along."""
    environment = os.environ | {"OMP_NUM_THREADS": str(CPUS)}
    return subprocess.run([sys.executable, "-m", "gam_lm", *arguments], cwd=folder, env=environment).returncode


if __name__ == "__main__":
    count, *arguments = sys.argv[1:]
    ray.init()
    codes = ray.get([work.remote(arguments, os.getcwd()) for _ in range(int(count))])
    sys.exit(max(codes))
