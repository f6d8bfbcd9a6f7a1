#!/usr/bin/env bash
# Train on a Cloud TPU slice, from a machine that has gcloud.
#
#   scripts/tpu_pod.sh create                     request the slice and wait until it is there
#   scripts/tpu_pod.sh setup                      repository and packages, on all workers
#   scripts/tpu_pod.sh data                       records from the bucket to every worker's disk
#   scripts/tpu_pod.sh train [train.py flags]     start on all workers, in the background
#   scripts/tpu_pod.sh status                     the slice, the workers, the last lines of their logs
#   scripts/tpu_pod.sh resume [train.py flags]    all of the above as needed, after a preemption
#   scripts/tpu_pod.sh stop                       save and end; train or resume goes on
#   scripts/tpu_pod.sh delete                     give the slice back; the bucket stays
#
# Any of them can be called again. Put your values below, or in the environment. DRY_RUN=1 prints
# the commands in place of running them. Before: upload the records,
#   gcloud storage rsync --recursive records/brats gs://BUCKET/records/brats
#
# NOT run by us on a TPU: the tests replace gcloud, and run what it is given on a pretended worker.
# Google says that this API is kept, but not developed further, and ends before TPU7x
# (https://docs.cloud.google.com/tpu/docs/runtimes); train.py itself needs nothing of it.
set -euo pipefail

# ---------------------------------------------------------------- yours
PROJECT=${PROJECT:-}               # of Google Cloud
ZONE=${ZONE:-}                     # such as us-west4-a
TYPE=${TYPE:-}                     # such as v5litepod-16, v6e-16
BUCKET=${BUCKET:-}                 # gs://NAME, in the zone's region
BUCKET=${BUCKET%/}
REPO=${REPO:-}                     # URL of this repository, as git clone takes it
BRANCH=${BRANCH:-main}             # or a tag: a run should not change its code on the way
NAME=${NAME:-masm}                 # of the slice
SPOT=${SPOT:-1}                    # 1: cheap, and can be taken away at any time; 0: on demand
RECORDS=${RECORDS:-records/brats}  # folder in the bucket, and in the repository on the workers
WORKDIR=${WORKDIR:-$BUCKET/runs/$NAME} # in the bucket: a spot slice goes with its disks
CONFIG=${CONFIG:-configs/masm_brats.py}
# The whole list of flags of a run: resume must give the same as train. The batch is a multiple of
# the chips, or of chips / mesh.spatial (docs/scaling.md).
FLAGS=(--config.batch_size=16)

# Software of the workers; empty: by TYPE. https://docs.cloud.google.com/tpu/docs/runtimes
RUNTIME=${RUNTIME:-}

# No flag of the TPU compiler is set. The lists in use, such as MaxText's, are tuned for language
# models whose weights are cut over the chips; here each chip has them all, and nothing was measured.
# https://github.com/AI-Hypercomputer/maxtext
# To try one: LIBTPU_INIT_ARGS=--xla_tpu_... scripts/tpu_pod.sh train
LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}
# Compiled programs go to the bucket: those on a spot slice's disk would be lost with it.
# Whoever can write there can run code on the workers.
# https://docs.jax.dev/en/latest/persistent_compilation_cache.html
CACHE=${CACHE:-$BUCKET/jax_cache}

# ---------------------------------------------------------------- checks, helpers
UNIT=masm-train FOLDER=masm-jax # on the workers: the service, and the clone below the home folder
POLL=${POLL:-30}                # seconds between looks at a request that waits

die() {
  echo "tpu_pod.sh: $*" >&2
  exit 2
}

check() {
  local key value example
  for key in PROJECT ZONE TYPE BUCKET REPO; do
    case $key in
      PROJECT) example=my-project ;;
      ZONE) example=us-west4-a ;;
      TYPE) example=v5litepod-16 ;;
      BUCKET) example=gs://my-bucket ;;
      REPO) example=https://github.com/me/masm-jax.git ;;
    esac
    [[ -n ${!key} ]] || die "$key is not set; write it at the top of this file, or: $key=$example $0"
  done
  for key in PROJECT ZONE TYPE BUCKET REPO BRANCH NAME RECORDS CONFIG WORKDIR RUNTIME CACHE; do
    value=${!key}
    case $value in # it goes through the shells of other machines
      *[!A-Za-z0-9_./:@~%+=-]*) die "$key='$value': letters, digits and _./:@~%+=- only, no spaces" ;;
    esac
  done
  case $BUCKET in gs://?*) ;; *) die "BUCKET=$BUCKET: expected gs://NAME" ;; esac
  case $SPOT in 0 | 1) ;; *) die "SPOT=$SPOT: expected 1 or 0" ;; esac
}

run() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

queue() { # VERB ARGUMENTS: of the request for the slice
  run gcloud compute tpus queued-resources "$@" --project="$PROJECT" --zone="$ZONE"
}

on_all() { # SCRIPT: in bash on every worker; ends with an error if it does on one
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    echo "gcloud compute tpus tpu-vm ssh $NAME --project=$PROJECT --zone=$ZONE --worker=all --command="
    echo "    set -eu; $1"
  else
    gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all \
      --command="set -eu; $1"
  fi
}

state() { # prints it; ABSENT: there is no such request
  local errors said
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    queue describe "$NAME" --format='value(state.state)' >&2
    echo "${DRY_STATE:-ABSENT}"
    return
  fi
  errors=$(mktemp)
  if said=$(queue describe "$NAME" --format='value(state.state)' 2>"$errors"); then
    echo "$said"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

runtime() {
  case $RUNTIME:$TYPE in
    :v6e-*) echo v2-alpha-tpuv6e ;;
    :v5p-*) echo v2-alpha-tpuv5 ;;
    :v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    :v[234]-*) echo tpu-ubuntu2204-base ;;
    :*) die "TYPE=$TYPE: no software known for it; set RUNTIME, see $0" ;;
    *) echo "$RUNTIME" ;;
  esac
}

# ---------------------------------------------------------------- the commands

# A queued resource, for spot and on demand alike: it waits for a free slice, where a plain create
# fails. Taken away, it is SUSPENDED, never allocated again, and must be made anew.
# https://docs.cloud.google.com/tpu/docs/queued-resources https://cloud.google.com/tpu/docs/spot
create() {
  local now version
  local spot=()
  version=$(runtime)
  if ((SPOT)); then spot=(--spot); fi
  while :; do
    now=$(state)
    case $now in
      ACTIVE) break ;;
      ABSENT)
        queue create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
          --runtime-version="$version" ${spot[@]+"${spot[@]}"}
        ;;
      SUSPENDED) queue delete "$NAME" --force --quiet ;;
      FAILED)
        queue describe "$NAME" >&2
        die "the request for $NAME failed, see above; then: $0 delete, $0 create"
        ;;
      *)
        echo "$NAME: $now" >&2
        sleep "$POLL"
        ;;
    esac
    if [[ ${DRY_RUN:-0} == 1 ]]; then
      case $now in ABSENT) break ;; SUSPENDED) DRY_STATE=ABSENT ;; *) break ;; esac
    fi
  done
  echo "$NAME: ACTIVE" >&2
}

# The machines are Ubuntu 22.04, whose Python is 3.10; uv brings another one without touching it.
setup() {
  on_all "
    if systemctl is-active --quiet $UNIT; then echo 'training runs; nothing is changed'; exit 0; fi
    [ -d $FOLDER/.git ] || git clone --quiet $REPO $FOLDER
    cd $FOLDER
    git fetch --quiet --tags origin $BRANCH
    git checkout --quiet --detach FETCH_HEAD
    python3 -m pip install --quiet --user uv
    [ -x .venv/bin/python ] || ~/.local/bin/uv venv --quiet --seed --python 3.12 .venv
    ~/.local/bin/uv pip install --quiet --python .venv/bin/python -r requirements.txt \
      \"jax[tpu]==\$(sed -n 's/^jax==//p' requirements.txt)\" gcsfs
    echo \"\$(hostname): \$(git rev-parse --short HEAD)\""
}

# Copied, not mounted: a step reads crops at random from memory-mapped files of some 28 MB, and
# Cloud Storage FUSE does better at reading in sequence, and at random in files of 2 MB. Every worker
# takes all records, as any case may come up on any: about 35 GB for BraTS 2021 at 1 mm.
# https://cloud.google.com/storage/docs/gcsfuse-performance-and-best-practices
data() {
  on_all "
    if systemctl is-active --quiet $UNIT; then echo 'training runs; nothing is changed'; exit 0; fi
    mkdir -p $FOLDER/$RECORDS
    gcloud storage rsync --recursive --delete-unmatched-destination-objects \
      $BUCKET/$RECORDS $FOLDER/$RECORDS"
}

# A service of systemd: it outlives the ssh connection, is there once and by name, and at a shutdown
# gets SIGTERM and time. KillMode=mixed: the signal goes to keep_running.sh alone, which passes it on
# once. Compute Engine's Spot VMs have 30 s at a preemption. We found no such promise for TPUs:
# config.log.checkpoint_every says how many steps a preemption may cost.
train() {
  local command
  command=$(printf '%q ' .venv/bin/python train.py --config="$CONFIG" --workdir="$WORKDIR" \
    --config.data.records="$RECORDS" ${FLAGS[@]+"${FLAGS[@]}"} "$@")
  on_all "
    if systemctl is-active --quiet $UNIT; then echo \"\$(hostname): runs already\"; exit 0; fi
    sudo systemd-run --unit=$UNIT --collect --uid=\"\$(id -un)\" \
      --working-directory=\"\$HOME/$FOLDER\" \
      --property=KillMode=mixed --property=TimeoutStopSec=600 \
      --property=StandardOutput=append:\"\$HOME/$UNIT.log\" \
      --property=StandardError=append:\"\$HOME/$UNIT.log\" \
      --setenv=PYTHONUNBUFFERED=1 --setenv=JAX_COMPILATION_CACHE_DIR=$CACHE \
      --setenv=LIBTPU_INIT_ARGS=$(printf '%q' "$LIBTPU_INIT_ARGS") \
      /bin/bash scripts/keep_running.sh $command"
}

status() {
  local now
  now=$(state)
  echo "$NAME: $now"
  if [[ $now == ACTIVE || ${DRY_RUN:-0} == 1 ]]; then
    on_all "echo \"\$(hostname): \$(systemctl is-active $UNIT || true)\"; tail -n 5 $UNIT.log || true"
  fi
  run gcloud storage ls "$WORKDIR/checkpoints/" || true # none yet
}

resume() {
  create
  setup
  data
  train "$@"
}

stop() {
  on_all "if systemctl is-active --quiet $UNIT; then sudo systemctl stop $UNIT; fi"
}

delete() {
  if [[ $(state) == ABSENT && ${DRY_RUN:-0} != 1 ]]; then
    echo "$NAME is not there" >&2
  else
    queue delete "$NAME" --force --quiet # --force: with its machines
  fi
}

case ${1:-} in
  create | setup | data | status | stop | delete)
    (($# == 1)) || die "$1 takes no arguments, got: ${*:2}"
    check
    "$1"
    ;;
  train | resume)
    check
    "$@"
    ;;
  *)
    echo "usage: $0 create|setup|data|train|resume|status|stop|delete" >&2
    exit 2
    ;;
esac
