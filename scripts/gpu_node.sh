#!/usr/bin/env bash
# Train on one machine with GPUs: one process that uses all of them.
#
#   scripts/gpu_node.sh [train.py flags ...]
#   nohup scripts/gpu_node.sh >masm.log 2>&1 &      # goes on when the terminal is closed
#
#   make venv && .venv/bin/pip install "jax[cuda12]==0.10.2"         # before, once
#   DRY_RUN=1 scripts/gpu_node.sh                   # prints what it would run
#
# Starts again after a preemption (scripts/keep_running.sh says when); Ctrl-C or SIGTERM to this
# script saves and ends. Called again it goes on. Do not start it twice with one WORKDIR.
# Not run by us on eight GPUs.
set -euo pipefail

# ---------------------------------------------------------------- yours; paths from the repository
CONFIG=${CONFIG:-configs/masm_brats.py} # 8 crops of 128^3 a step: one for each of 8 GPUs
WORKDIR=${WORKDIR:-runs/masm}
RECORDS=${RECORDS:-records/brats} # on a local disk: training reads it in pieces, at random
PYTHON=${PYTHON:-.venv/bin/python}
FLAGS=() # more flags of train.py, such as --config.batch_size=16 --config.mesh.spatial=2

# ---------------------------------------------------------------- the rest
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/gpu_env.sh
if ! command -v "$PYTHON" >/dev/null; then
  echo "gpu_node.sh: PYTHON=$PYTHON cannot be run; make venv makes .venv, or set PYTHON" >&2
  exit 2
fi
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf 'XLA_FLAGS=%q\n' "$XLA_FLAGS"
fi
exec scripts/keep_running.sh "$PYTHON" train.py --config="$CONFIG" --workdir="$WORKDIR" \
  --config.data.records="$RECORDS" ${FLAGS[@]+"${FLAGS[@]}"} "$@"
