#!/usr/bin/env bash
# Several hosts train one model, each told its number: for schedulers that know which host is which. Nothing is restarted.
#     NODES=2 NODE=0 FIRST=10.0.0.1 launch/several_nodes_static.sh -p configs/tiny_llama --lr 3e-4
#     NODES=2 NODE=1 FIRST=10.0.0.1 launch/several_nodes_static.sh -p configs/tiny_llama --lr 3e-4
# FIRST is the address of host 0, by which the others reach it; PORT, if 29500 is taken there, another that is free.
set -euo pipefail
python=${PYTHON:-$(ls "$(dirname "$0")/../.venv/bin/python" 2>/dev/null || echo python3)}
exec "$python" -m forgather train "$@" -- --nnodes "${NODES:?how many hosts}" \
    --node-rank "${NODE:?the number of this host, from 0}" --master-addr "${FIRST:?the address of host 0}" \
    --master-port "${PORT:-29500}"
