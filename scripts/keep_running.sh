#!/usr/bin/env bash
# Start a training again whenever it may go on: for machines that can be taken away.
#
#   scripts/keep_running.sh COMMAND [ARGUMENT ...]
#
# Again after exit code
#   75   stopped by a signal after saving
#   76   another process of the run is gone; all start again
#   137  killed (kill -9, out of memory): to the other processes that is 76, and they wait for this
# With any other code it ends, and has that code: 0 done, 1 an error that would come again.
#
# Ctrl-C, SIGTERM and SIGHUP go to the command once, which saves and ends; then it is not started
# again. A second one stops train.py at once.
set -euo pipefail

PAUSE=${PAUSE:-10}      # seconds before the next start: ports and devices become free
BRIEF=${BRIEF:-60}      # a start that lasted fewer seconds than this came to nothing;
ATTEMPTS=${ATTEMPTS:-5} # after so many of them in a row it gives up

if (($# == 0)); then
  echo "usage: scripts/keep_running.sh COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' scripts/keep_running.sh "$@"
  echo
  exit 0
fi

say() { echo "$(date '+%F %T') keep_running: $*" >&2; }

child='' stopping=0 told=0 interrupted=0
tell() {
  told=1
  kill -TERM "$child" 2>/dev/null || true
}
stop() {
  stopping=1 interrupted=1
  if [[ -n $child ]]; then tell; fi
}
trap stop INT TERM HUP
# The command has a process group of its own: Ctrl-C in a terminal would else reach it twice, from
# the terminal and from here, and the second one is not for saving.
set -m

brief=0
while :; do
  started=$SECONDS
  "$@" </dev/null &
  child=$!
  if ((stopping && !told)); then tell; fi # a signal that came before there was a child
  while :; do # wait returns early when a signal comes
    interrupted=0
    wait "$child" && code=0 || code=$?
    ((interrupted)) || break
  done
  child=''
  case $code in
    75 | 76 | 137) ;;
    *)
      say "ended with exit code $code"
      exit "$code"
      ;;
  esac
  if ((SECONDS - started < BRIEF)); then brief=$((brief + 1)); else brief=0; fi
  if ((!stopping && brief >= ATTEMPTS)); then
    say "exit code $code, and $brief starts in a row lasted less than $BRIEF s: giving up"
    exit "$code"
  fi
  if ((!stopping)); then
    say "exit code $code: starting again in $PAUSE s"
    sleep "$PAUSE" &
    wait $! || true # so that a signal does not wait for it
  fi
  if ((stopping)); then
    say "stopped with exit code $code; the same command goes on"
    exit "$code"
  fi
done
