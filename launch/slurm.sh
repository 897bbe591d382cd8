#!/usr/bin/env bash
#SBATCH --job-name=forgather
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
# A Slurm job that trains on all devices of its hosts. Arguments are those of `forgather train`:
#     sbatch --nodes 4 --time 12:00:00 launch/slurm.sh -p configs/tiny_llama --lr 3e-4
# Five minutes before its time is over, or when it is preempted, the run is told to stop: it saves and ends with 75. The
# job is then queued again and goes on. A host that fails ends the job; Slurm queues it again on others.
set -euo pipefail
# Slurm runs a copy of this file, so it is looked for in the folder of the submission.
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a host
code=0
# Not killed at once when one host ends with a code: then those that leave with 75 a moment later would have the code of
# a kill, which is higher, and srun's code is the highest. A host that is left alone ends by itself, or after 120 s.
srun --kill-on-bad-exit=0 --wait=120 "$python" -m forgather train --nnodes "$SLURM_NNODES" \
    --rdzv-endpoint "$first:$port" "$@" || code=$?
if [ "$code" -eq 75 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
