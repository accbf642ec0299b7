#!/usr/bin/env bash
# compute-sanitizer on the Hopper kernel: memcheck, initcheck, synccheck and racecheck as it is, then
# racecheck of the build in which every lane of a warp arrives at a barrier (docs/hopper.md).
#
#   OUT=results bash benchmarks/sanitize.sh
set -u
: "${OUT:?name the folder for the results}"
export PYTHONPATH="${PYTHONPATH:-src}"
python=${PYTHON:-python}
tool() {
  local name=$1 log=$2
  shift 2
  timeout "${LIMIT:-60}" compute-sanitizer --tool "$name" --report-api-errors no \
    --num-cuda-barriers 64 --kernel-name kns=sparse_attention \
    "$python" benchmarks/sanitize.py "$@" >"$OUT/$log.txt" 2>&1
  echo "$log: exit $?, $(grep -c 'Race reported' "$OUT/$log.txt") races, $(grep -h SUMMARY "$OUT/$log.txt" | tail -n 1)"
}
# the kernel is compiled and cached before a tool slows the process down
"$python" benchmarks/sanitize.py && "$python" benchmarks/sanitize.py --every-lane || exit 1
for name in memcheck initcheck synccheck racecheck; do tool "$name" "$name"; done
tool racecheck racecheck_every_lane --every-lane
