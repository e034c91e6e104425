#!/bin/bash
# One training on 2 machines of 8 GPUs. The run directory has to lie where all machines see it:
#   sbatch examples/slurm_train.sh --data my_texts/ --tokens-per-step 524288 --context 1024 --steps 20000 --out runs/large
# A job that is stopped or requeued goes on from its last state, also on another number of machines.
#SBATCH --job-name=gam-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" -m gam_lm train "$@"
