#!/bin/bash
# One training on 2 machines of 8 GPUs: sbatch examples/slurm_train.sh. The run directory has to lie where all machines see it.
# A job that is stopped or requeued goes on from its last state, also on another number of machines.
#SBATCH --job-name=gam-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m gam_lm train --data my_texts/ --batch-size 512 --context 1024 --steps 20000 --out runs/large
