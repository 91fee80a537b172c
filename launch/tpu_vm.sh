#!/usr/bin/env bash
# One training run on all machines of a Cloud TPU slice, to its end.
#
#   ZONE=us-central2-b TYPE=v4-32 VERSION=tpu-ubuntu2204-base launch/tpu_vm.sh NAME \
#       --config=imagenet_resnet18 --workdir=/mnt/runs/resnet18
#
# The slice NAME is created unless it is there, made anew where it was preempted, and
# left running in the end (gcloud compute tpus tpu-vm delete NAME ends it). What git
# does not ignore of minw's folder is copied to all its machines and installed, and what
# follows NAME goes to minw.main on each. A run that was preempted goes on from its last
# checkpoint: the workdir must be where all machines, and those made later, see it, as
# must the data.
#
#   ZONE, TYPE, VERSION  of the slice, as gcloud takes them
#   CREATE_FLAGS         more for `tpu-vm create`: --spot, for example
#   PYTHON               Python 3.11 or newer on the machines (python3)
#   SETUP                a command for each machine before all else (apt-get, mounts)
#   RETRIES              tries in a row that failed otherwise than by preemption (3)
#   WAIT                 seconds before the next try (60)
#
# Exit codes: those of minw.main, else gcloud's.
#
# Tried with a stand-in for gcloud that records its calls (tests/test_launch.py), and
# its flags against gcloud 528's own help; never on a TPU.
set -uo pipefail

usage() {
  echo "error: $1" >&2
  exit 2
}

[ "$#" -ge 2 ] || usage "usage: $0 NAME ARGUMENTS OF minw.main"
name=$1
shift
: "${ZONE:?is not set}" "${TYPE:?is not set}" "${VERSION:?is not set}"
python=${PYTHON:-python3}
retries=${RETRIES:-3}
wait=${WAIT:-60}
root=$(cd "$(dirname "$0")/.." && pwd)
read -r -a create_flags <<<"${CREATE_FLAGS:-}"

tpu() {  # tpu VERB ARGUMENTS...
  gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$ZONE" --quiet
}

on_all() {
  tpu ssh "$name" --worker=all --command="$1"
}

state() {
  tpu describe "$name" --format='value(state)' 2>/dev/null
}

create_or_reuse() {
  case $(state) in
    READY) return 0 ;;
    '') ;;  # There is none.
    *) tpu delete "$name" || return ;;  # PREEMPTED, TERMINATED and the like.
  esac
  copied=
  tpu create "$name" --accelerator-type="$TYPE" --version="$VERSION" \
    "${create_flags[@]}"
}

copy_code() {
  [ -z "$copied" ] || return 0
  local archive
  archive=$(mktemp)
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar -czf "$archive" -C "$root" --ignore-failed-read --null -T - &&
    tpu scp "$archive" "$name:minw.tar.gz" --worker=all &&
    on_all "${SETUP:-true} && rm -rf minw && mkdir minw && \
tar -xzf minw.tar.gz -C minw && cd minw && \
$python -m pip install -r requirements-tpu.txt" &&
    copied=yes
  local code=$?
  rm -f "$archive"
  return "$code"
}

end_old() {  # What an earlier call of this script started, when its connection broke.
  on_all "pkill -f '[m]inw.main'; while pgrep -f '[m]inw.main'; do sleep 1; done"
}

printf -v arguments ' %q' "$@"
copied=
failures=0
while true; do
  failures=$((failures + 1))
  create_or_reuse && copy_code && end_old &&
    on_all "cd minw && exec $python -m minw.main$arguments --distributed"
  code=$?
  case $code in
    0 | 2 | 3) exit "$code" ;;  # Done, bad input, diverged: no use to go on.
    75) failures=0 ;;
    *) [ "$(state)" != PREEMPTED ] || failures=0 ;;
  esac
  if [ "$failures" -ge "$retries" ]; then
    echo "$name: failed $failures times, at last with code $code" >&2
    exit "$code"
  fi
  echo "$name: ended with code $code; going on in $wait s" >&2
  sleep "$wait"
done
