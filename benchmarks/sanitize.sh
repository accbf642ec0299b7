#!/usr/bin/env bash
# compute-sanitizer on the Hopper kernel: memcheck, initcheck, synccheck and racecheck as it ships,
# then racecheck of the build in which one lane arrives for its warp (docs/hopper.md).
#
#   OUT=results [TOOLS="memcheck initcheck"] [LIMIT=60] bash benchmarks/sanitize.sh
set -u
: "${OUT:?name the folder for the results}"
export PYTHONPATH="${PYTHONPATH:-src}"
python=${PYTHON:-python}
tool() {
  local name=$1 log=$2
  shift 2
  # initcheck must see every kernel: memory that one writes unseen counts as never written
  local only=(--kernel-name kns=sparse_attention)
  [ "$name" = initcheck ] && only=()
  timeout "${LIMIT:-60}" compute-sanitizer --tool "$name" --report-api-errors no \
    --num-cuda-barriers 64 "${only[@]}" \
    "$python" benchmarks/sanitize.py "$@" >"$OUT/$log.txt" 2>&1
  echo "$log: exit $?, $(grep -c 'Race reported' "$OUT/$log.txt") races, $(grep -h SUMMARY "$OUT/$log.txt" | tail -n 1)"
}
# the kernel is compiled and cached before a tool slows the process down
"$python" benchmarks/sanitize.py && "$python" benchmarks/sanitize.py --one-lane || exit 1
for name in ${TOOLS:-memcheck initcheck synccheck racecheck racecheck_one_lane}; do
  case $name in
  racecheck_one_lane) tool racecheck "$name" --one-lane ;;
  *) tool "$name" "$name" ;;
  esac
done
