#!/usr/bin/env bash
# A DiLoCo server here, and a worker on each of HOSTS, which are reached by ssh. Arguments are those of `forgather train`:
#     PROJECT=configs/tiny_llama ADDRESS=10.0.0.1 HOSTS="laptop2 box3" SERVER_FLAGS="--sync-every 40" \
#         launch/diloco_lan.sh --steps 2000
# ADDRESS is this machine's, as the hosts reach it. Every host has this repository, with its .venv, in FOLDER (default:
# the same folder as here). SERVER_FLAGS are more flags of the server, CONFIG is a config other than the default, PORT one
# other than 8512, OUTPUT a folder other than runs/diloco. When the workers have ended, or with Ctrl-C, so does the server.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(ls "$here/.venv/bin/python" 2>/dev/null || echo python3)}
project=${PROJECT:?the project to train, configs/tiny_llama say}
address=${ADDRESS:?the address of this machine, as the hosts reach it}
read -ra hosts <<<"${HOSTS:?the hosts to train on, as ssh knows them}"
read -ra flags <<<"${SERVER_FLAGS:-}"
port=${PORT:-8512} output=${OUTPUT:-runs/diloco} folder=${FOLDER:-$here}
chosen=(-p "$project" ${CONFIG:+-t "$CONFIG"})

"$python" -m forgather "${chosen[@]}" diloco server -n "${#hosts[@]}" --host "$address" --port "$port" -o "$output" \
    ${flags[@]+"${flags[@]}"} &
server=$!
trap 'kill -TERM "$server" $(jobs -p) 2>/dev/null || true; wait "$server" || true' EXIT
until "$python" -m forgather diloco status --server "$address:$port" --token-file "$output/token" >/dev/null 2>&1; do
    kill -0 "$server" 2>/dev/null || { wait "$server"; exit; } # it has said why
    sleep 1
done
kill -0 "$server" 2>/dev/null || { wait "$server"; exit; } # what has answered is another server
workers=()
for host in "${hosts[@]}"; do
    # Through ssh's own channel: the token is in no command line.
    ssh "$host" 'umask 077; mkdir -p .config/forgather; cat > .config/forgather/diloco.token' <"$output/token"
    words=$(printf '%q ' .venv/bin/python -m forgather "${chosen[@]}" train --diloco-server "$address:$port" "$@")
    # With a terminal, so that the worker is told when this ends: it then saves.
    ssh -tt "$host" "cd $(printf '%q' "$folder") && FORGATHER_DILOCO_TOKEN_FILE=~/.config/forgather/diloco.token $words" \
        </dev/null &
    workers+=($!)
done
code=0
for worker in "${workers[@]}"; do
    wait "$worker" || code=$?
done
exit "$code"
