#!/usr/bin/env bash
# benchmarks/eval_table.py over every GPU there is: one process for a length and a few methods.
#
#   OUT=results PLACEMENT=spread LENGTHS="16k 32k" bash benchmarks/eval_gpus.sh
#
# GPUS names the devices ("0 1 2 3"), SECONDS_EACH when a process stops asking, TASKS what is asked,
# JOBS the methods (separated by spaces, one process for each word and length). A second run with the
# same OUT goes on. Times are not kept: processes share a GPU.
set -u
: "${OUT:?name the folder for the results}"
export PYTHONPATH="${PYTHONPATH:-src:.}"
python=${PYTHON:-python}
read -ra gpus <<<"${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader | tr '\n' ' ')}"
read -ra jobs <<<"${JOBS:-dense,grouped minference:budget_length=none,selection=lines,minference \
  minference:budget_length=none,xattention:stride=16 a_shape,tri_shape,flexprefill \
  dilated1,static,static:vertical=250,slash=1524}"
placement=${PLACEMENT:-spread}
mkdir -p "$OUT"
number=0
for length in ${LENGTHS:-16k 32k}; do
  for methods in "${jobs[@]}"; do
    folder=$OUT/${placement}_${length}_$number
    CUDA_VISIBLE_DEVICES=${gpus[number % ${#gpus[@]}]} "$python" benchmarks/eval_table.py run \
      --placement "$placement" --lengths "$length" --tasks "${TASKS:-retrieval}" --untimed \
      --methods "$methods" --seconds "${SECONDS_EACH:-500}" --workers "${WORKERS:-4}" \
      ${PROMPTS:+--prompts "$PROMPTS"} ${SPLIT:+--split "$SPLIT"} \
      --folder "$folder" >"$folder.txt" 2>&1 &
    number=$((number + 1))
  done
done
wait
tail -qn 3 "$OUT"/*.txt
