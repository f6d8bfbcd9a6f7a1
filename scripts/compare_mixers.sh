#!/usr/bin/env bash
# What do the mixers add? MASM, `late` and the plain U-Net, same recipe, same steps, several seeds.
#
#   scripts/compare_mixers.sh OUTPUT CONFIG [train.py flags ...]
#
# Runs CORES trainings at a time, one core each (faster in sum than one training on all cores), and
# evaluates each on the validation cases. A run that is finished is not run again; a stopped one goes on.
# Ends with 1 if one of them failed; the others are done.
set -euo pipefail

OUTPUT=${1:?folder for the runs}
CONFIG=${2:?config file, such as configs/masm_laptop.py}
shift 2
PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-"0 1 2"}
VARIANTS=${VARIANTS:-"masm late unet"}
CORES=${CORES:-2}

declare -A MIXERS=(
  [masm]="('aware','aware','aware','aware','aware','shift')"
  [aware]="('aware','aware','aware','aware','aware','aware')"
  [shift]="('shift','shift','shift','shift','shift','shift')"
  [late]="('concat','concat','concat','concat','concat','concat')"
  [unet]="()"
)

run() { # CORE VARIANT SEED FLAGS...
  local core=$1 variant=$2 seed=$3
  local workdir=$OUTPUT/$variant-$seed
  shift 3
  mkdir -p "$workdir"
  taskset -c "$core" "$PYTHON" train.py --config="$CONFIG" --workdir="$workdir" \
    --config.seed="$seed" --config.model.mixers="${MIXERS[$variant]}" "$@" \
    >>"$workdir/log.txt" 2>&1 || return # "set -e" sleeps where a caller asks how it went
  taskset -c "$core" "$PYTHON" eval.py --workdir="$workdir" --split=val --output="$workdir/eval" \
    >>"$workdir/log.txt" 2>&1 || return
  echo "$(date +%H:%M:%S) $variant seed $seed: $(grep ^average "$workdir/log.txt" | tail -n 1)"
}

jobs=()
for seed in $SEEDS; do for variant in $VARIANTS; do jobs+=("$variant $seed"); done; done
pids=()
next=$(mktemp)
echo 0 >"$next"
for ((core = 0; core < CORES; core++)); do
  (
    status=0
    while :; do
      exec 9<>"$next.lock"
      flock 9
      i=$(<"$next")
      echo $((i + 1)) >"$next"
      exec 9>&-
      ((i < ${#jobs[@]})) || break
      read -r variant seed <<<"${jobs[$i]}"
      run "$core" "$variant" "$seed" "$@" || {
        echo "$variant seed $seed failed: $OUTPUT/$variant-$seed/log.txt"
        status=1
      }
    done
    exit "$status"
  ) &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
rm -f "$next" "$next.lock"
exit "$status"
