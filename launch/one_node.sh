#!/usr/bin/env bash
# All devices of this host train one model. Arguments are those of `forgather train`:
#     launch/one_node.sh -p configs/tiny_llama --lr 3e-4
# Words after `--` are torchrun's: launch/one_node.sh -p configs/tiny_llama -- --max-restarts 3
set -euo pipefail
exec "${PYTHON:-python3}" -m forgather train "$@"
