#!/usr/bin/env bash
# Every measurement that needs a GPU, in order, each with a time limit and results of its own.
#
#   OUT=results PARTS="tests index variants" bash benchmarks/gpu_all.sh
#
# Parts: tests index variants sanitize attention long prefill peers grouped pages, all by default;
# benchmarks/search_gpu.sh has those of the search.
# Limits, guessed and mostly not yet measured on a GPU: tests 6 minutes, index 4, variants 2,
# sanitize 5, attention 8, long 8, prefill 8, peers 8, grouped 8,
# pages 4. Where one command may take 10 minutes, name one
# or two parts at a time.
set -u
: "${OUT:?name the folder for the results}"
export PYTHONPATH="${PYTHONPATH:-src}"
python=${PYTHON:-python}
failed=()

# part SECONDS NAME COMMAND...: a part that fails or takes too long does not stop the next
part() {
  local limit=$1 name=$2
  shift 2
  case " ${PARTS:-tests index variants sanitize attention long prefill peers grouped pages} " in *" $name "*) ;; *) return ;; esac
  timeout "$limit" "$@" >>"$OUT/$name.log" 2>&1 || failed+=("$name ($?)")
}

mkdir -p "$OUT"
part 360 tests "$python" benchmarks/record_tests.py "$OUT/tests.jsonl" tests/gpu tests/ops -q
part 120 index "$python" benchmarks/index_time.py --out "$OUT/index.jsonl"
part 120 index "$python" benchmarks/break_even.py --out "$OUT/break_even.jsonl"
part 120 variants "$python" benchmarks/triton_variants.py --out "$OUT/triton_variants.jsonl"
part 300 sanitize bash benchmarks/sanitize.sh
bench() { local limit=$1 name=$2; shift 2; part "$limit" "$name" "$python" -m minference bench "$@"; }
bench 300 attention attention --lengths 8k 16k 32k 64k 128k --impls hopper triton \
  --out "$OUT/attention.jsonl"
bench 90 attention attention --lengths 128k --impls hopper triton --dim 64 --seeds 0 \
  --out "$OUT/attention.jsonl"
bench 90 attention attention --lengths 128k --impls hopper triton --seeds 0 \
  --cases scattered gradientai/Llama-3-8B-Instruct-262k@5 --out "$OUT/attention.jsonl"
bench 480 long attention --lengths 1m --impls hopper triton --out "$OUT/attention.jsonl"
bench 480 prefill prefill --model llama-3-8b --lengths 32k 128k --out "$OUT/prefill.jsonl"
methods=xattention:stride=16,xattention:stride=8,flexprefill
part 120 peers "$python" benchmarks/peer_times.py --length 32k 128k --methods ${methods//,/ } \
  --trace --out "$OUT/peer_times.jsonl"
part 60 peers "$python" benchmarks/peer_times.py --length 128k --impl triton \
  --methods ${methods//,/ } --out "$OUT/peer_times.jsonl"
part 300 peers "$python" benchmarks/eval_table.py run --placement spread --lengths 32k \
  --seconds 270 --methods "dense,$methods" --folder "$OUT/peers32"
part 240 grouped "$python" benchmarks/grouped_time.py --lengths 32k 128k --out "$OUT/grouped.jsonl"
part 240 grouped "$python" benchmarks/grouped_time.py --lengths 1m --layers 1 4 --calls 3 \
  --out "$OUT/grouped.jsonl"
part 230 pages "$python" benchmarks/vllm_paged.py --out "$OUT/vllm_paged.jsonl"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
