#!/usr/bin/env bash
# All devices of this host train one model. Arguments are those of `forgather train`:
#     launch/one_node.sh -p configs/tiny_llama --lr 3e-4
# Words after `--` are torchrun's: launch/one_node.sh -p configs/tiny_llama -- --max-restarts 3
set -euo pipefail
python=${PYTHON:-$(ls "$(dirname "$0")/../.venv/bin/python" 2>/dev/null || echo python3)}
exec "$python" -m forgather train "$@"
