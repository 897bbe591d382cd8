#!/usr/bin/env bash
# Several hosts train one model: the same command on each, in any order. A lost host leads to a restart on what is left,
# when NODES is MIN:MAX and MAX_RESTARTS above 0.
#     NODES=2 MEET=10.0.0.1:29500 launch/several_nodes.sh -p configs/tiny_llama --lr 3e-4
# MEET is an address of one of the hosts, by which the others reach it. All see the same files, or copies of them.
set -euo pipefail
python=${PYTHON:-$(ls "$(dirname "$0")/../.venv/bin/python" 2>/dev/null || echo python3)}
exec "$python" -m forgather train --nnodes "${NODES:?how many hosts, 4 or 2:4}" \
    --rdzv-endpoint "${MEET:?where the hosts meet, HOST:PORT of one of them}" --max-restarts "${MAX_RESTARTS:-0}" "$@"
