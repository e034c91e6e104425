#!/bin/bash
# One comparison on 8 machines of an array: sbatch examples/slurm_array.sh. Every task takes the rows that no other has claimed.
# The results folder has to lie where all machines see it, on a file system with locks (flock).
# Afterwards the same command without --no-timing measures the speed columns on one quiet machine.
#SBATCH --job-name=gam-bench
#SBATCH --array=1-8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue

export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
gam bench --data my_texts/ --models gam transformer mamba --seeds 0 1 2 --no-timing --out runs/compared
