#!/usr/bin/env bash
# One training run on all machines of a Cloud TPU slice, to its end.
#
#   ZONE=us-central2-b TYPE=v4-32 VERSION=tpu-ubuntu2204-base launch/tpu_vm.sh NAME \
#       --config=cifar_convnet --config.eval_batch_size=1024 \
#       --workdir=gs://BUCKET/convnet
#
# The slice NAME is created if it does not exist, and created again if it was preempted.
# It still runs when this script ends. `gcloud compute tpus tpu-vm delete NAME` deletes
# it. All files in minw's folder that git does not ignore are copied to its machines,
# and the requirements are installed there. The arguments after NAME are passed to
# minw.main on each machine. A run that was preempted resumes from its last checkpoint.
# Therefore all machines, including those created later, must see the workdir and the
# data. Both may be on gs://, which needs nothing else. SETUP can mount a disk.
#
#   ZONE, TYPE, VERSION  zone, type and version of the slice, as gcloud takes them
#   CREATE_FLAGS         further flags of `tpu-vm create`, for example --spot
#   PYTHON               Python 3.11 or newer on the machines (default: python3)
#   SETUP                command that each machine runs first (apt-get, mounts)
#   RETRIES              largest number of consecutive failures other than preemptions
#                        (default: 3)
#   WAIT                 seconds before the next try (default: 60)
#
# The exit code is that of minw.main, or that of gcloud if it fails.
#
# This was tried with a stand-in for gcloud that records its calls
# (tests/test_launch.py). Its flags were compared with the help of gcloud 528. It was
# never tried on a TPU.
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
    '') ;;  # There is no such slice.
    *) tpu delete "$name" || return ;;  # PREEMPTED, TERMINATED and similar states.
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

# Ends runs that an earlier call of this script left when its connection broke.
end_old() {
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
    0 | 2 | 3) exit "$code" ;;  # Done, bad input, diverged: a retry is pointless.
    75) failures=0 ;;
    *) [ "$(state)" != PREEMPTED ] || failures=0 ;;
  esac
  if [ "$failures" -ge "$retries" ]; then
    echo "$name: failed $failures times, at last with code $code" >&2
    exit "$code"
  fi
  echo "$name: ended with code $code; retrying in $wait s" >&2
  sleep "$wait"
done
