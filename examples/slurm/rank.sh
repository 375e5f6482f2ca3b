#!/usr/bin/env bash
# One rank: Slurm's numbers under the names that torch.distributed reads, then the trainer in this very process.
# Arguments: those of tools/train.py.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$PYTHON" "$REPO/tools/train.py" "$@"
