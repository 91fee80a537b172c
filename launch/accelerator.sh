#!/usr/bin/env bash
# Checks what an accelerator computes, and measures how fast minw is on it.
#
#   launch/accelerator.sh DIR [STAGE]...
#
# The stages, by default all of them in this order:
#
#   tests       `pytest -m gpu`, which compares the device with NumPy and with the CPU
#   train       a step of ConvNet D and A in float32 and in bfloat16, and with programs
#               that need not repeat; beside PyTorch if it is installed
#   throughput  several seeds at once, as processes or as one program
#   inference   the packed ConvNet A beside the same network in other number formats
#
# A stage does not stop those after it. DIR receives a text for each measurement, and
# its numbers as a JSON file. The last lines of each text are also printed.
#
#   PYTHON     Python that has minw (default: python3)
#   PROCESSES  number of processes of the tests, which share the device (default: 2)
#   SECONDS_EACH
#              largest duration of a measurement in seconds (default: 900)
#
# The exit code is 0 if all measurements succeed, 1 if one fails, and 2 if the input is
# bad.
#
# This was tried with a stand-in for Python (tests/test_launch.py), and its commands on
# a CPU. It was never tried on an accelerator.
set -uo pipefail

stages=(tests train throughput inference)
usage() {
  echo "error: $1: must be launch/accelerator.sh DIR [STAGE]..., with stages" \
    "${stages[*]}" >&2
  exit 2
}

[ "$#" -ge 1 ] || usage "no arguments"
for stage in "${@:2}"; do
  [[ " ${stages[*]} " == *" $stage "* ]] || usage "$stage"
done
mkdir -p "$1" || usage "$1"
dir=$(cd "$1" && pwd)
shift
[ "$#" -eq 0 ] || stages=("$@")
python=${PYTHON:-python3}
seconds=${SECONDS_EACH:-900}
cd "$(dirname "$0")/.." || exit 2
failed=0

measure() {  # measure NAME ARGUMENTS OF python
  local name=$1 code
  echo "== $name"
  timeout "$seconds" "$python" "${@:2}" >"$dir/$name.txt" 2>&1
  code=$?
  tail -n 12 "$dir/$name.txt"
  [ $code -eq 0 ] || failed=1
  [ $code -ne 124 ] || echo "$name: stopped after $seconds seconds"
}

bench() {  # bench NAME ARGUMENTS OF minw.bench
  measure "$1" -m minw.bench "${@:2}" --json="$dir/$1.json"
}

step() {  # step NETWORK DTYPE DETERMINISTIC
  local name=train-$1-$2
  "$3" || name+=-any-order
  bench "$name" train --config="cifar_convnet:network=$1" --config.batch_size=256 \
    --config.compute_dtype="$2" --config.sum_dtype="$2" --config.deterministic="$3"
}

for stage in "${stages[@]}"; do
  case $stage in
    tests)
      # Several processes share the device. The flags of the other tests are for CPUs.
      XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS='' \
        measure tests -m pytest -m gpu -n "${PROCESSES:-2}" -q
      ;;
    train)
      for network in D A; do
        step $network float32 true
        step $network float32 false
        step $network bfloat16 true
      done
      ;;
    throughput)
      bench throughput throughput --config=cifar_convnet:network=D \
        --config.batch_size=256
      ;;
    inference) bench inference inference ;;
  esac
done
exit $failed
