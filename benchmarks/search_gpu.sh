#!/usr/bin/env bash
# Every measurement of the search that needs a GPU, each part with a time limit of its own.
#
#   OUT=results PARTS="8b4 cost ablation planted 8b ship recall eval" bash benchmarks/search_gpu.sh
set -u
: "${OUT:?name the folder for the results}"
export PYTHONPATH="${PYTHONPATH:-src:.}"
python=${PYTHON:-python}
to=$OUT/search
tasks=single,multikey,key_value,multivalue,needle_lines
mkdir -p "$to"

# part SECONDS NAME COMMAND...: a part that fails or takes too long does not stop the next
part() {
  local limit=$1 name=$2
  shift 2
  case " ${PARTS:-8b4 cost ablation planted 8b ship recall eval} " in *" $name "*) ;; *) return ;; esac
  local began=$SECONDS
  timeout "$limit" "$@" >>"$to/$name.txt" 2>&1
  echo "$name: status $?, $((SECONDS - began)) s"
}

part 90 8b4 "$python" benchmarks/search_8b.py --length 32k --layers 4 --spaces wide \
  --out "$to/search_8b_4layers.jsonl"
part 60 cost "$python" benchmarks/search_cost.py --lengths 32k 128k --out "$to/search_cost.jsonl"
part 150 ablation "$python" benchmarks/search_ablation.py --length 32k --tables "$to/tables" \
  --out "$to/search_ablation.jsonl"
part 120 planted "$python" benchmarks/search_planted.py --length 16k --heads 50 \
  --out "$to/search_planted.jsonl"
part 200 8b "$python" benchmarks/search_8b.py --length 32k --spaces wide --out "$to/search_8b.jsonl"
find() { "$python" -m minference.cli search models/needle --tasks "$tasks" --lengths 16k,32k "$@"; }
export -f find
export python tasks
for objective in output mass; do
  part 90 ship bash -c 'find "$@"' _ -o "$to/ship/$objective.json" --objective "$objective" \
    --card "$to/ship/$objective.md" --json
done
part 90 recall bash -c 'find "$@"' _ -o "$to/ship/recall.json" --objective mass --recall 0.95 \
  --card "$to/ship/recall.md" --json
tables=""
for name in searched_output searched_mass uniform a_shape_output vertical_slash_output \
  block_sparse_output; do
  tables+=",minference:patterns=$to/tables/$name.json"
done
part 240 eval "$python" benchmarks/eval_table.py run --lengths 32k --placement spread \
  --seconds 210 --methods "dense$tables" --folder "$to/eval_spread"
exit 0
