#!/usr/bin/env bash
# Every measurement of the search that needs a GPU, each part with a time limit of its own.
#
#   OUT=results PARTS="8b4 cost ablation planted 8b ship recall eval" bash benchmarks/search_gpu.sh
#
# ablation makes tables at two shares of the keys (SHARES), eval asks with them; without them (TABLES
# names their folder) it makes them.
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
part 120 cost "$python" benchmarks/search_cost.py --lengths 32k 128k --out "$to/search_cost.jsonl"
ablation() {
  part 120 "$1" "$python" benchmarks/search_ablation.py --length 32k --share "$2" \
    --tables "$TABLES/$2" --out "$to/search_ablation_$2.jsonl"
}
export TABLES=${TABLES:-$to/tables} SHARES=${SHARES:-0.2 0.04}
for share in $SHARES; do ablation ablation "$share"; done
part 120 planted "$python" benchmarks/search_planted.py --length 16k --heads 50 \
  --out "$to/search_planted.jsonl"
part 200 8b "$python" benchmarks/search_8b.py --length 32k --spaces wide --out "$to/search_8b.jsonl"
find() { "$python" -m minference search models/needle --tasks "$tasks" --lengths 16k,32k "$@"; }
export -f find
export python tasks
for objective in output mass; do
  part 90 ship bash -c 'find "$@"' _ -o "$to/ship/$objective.json" --objective "$objective" \
    --card "$to/ship/$objective.md" --json
done
part 90 recall bash -c 'find "$@"' _ -o "$to/ship/recall.json" --objective mass --recall 0.95 \
  --card "$to/ship/recall.md" --json
for share in $SHARES; do
  [ -d "$TABLES/$share" ] || ablation eval "$share"
  methods=dense
  for name in searched_output searched_mass uniform a_shape_output vertical_slash_output \
    block_sparse_output; do
    methods+=",minference:patterns=$TABLES/$share/$name.json"
  done
  asked="--placement spread --prompts 10"
  [ "$share" = 0.2 ] || asked="--placement end --prompts 25"
  # shellcheck disable=SC2086
  part 150 eval "$python" benchmarks/eval_table.py run --lengths 32k $asked \
    --seconds 130 --methods "$methods" --folder "$to/eval_$share"
done
exit 0
