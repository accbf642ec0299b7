#!/usr/bin/env bash
# vLLM 0.26.0 on a machine without a network, beside its torch 2.11 (CUDA 13), transformers and
# triton: packed here to 54 MB in parts below 20 MB, unpacked there, measured there.
#   benchmarks/vllm_bring_up.sh pack FOLDER     where there is a network: the parts, in FOLDER
#   benchmarks/vllm_bring_up.sh unpack FOLDER   there: /tmp/vllm_site, on Python's path
#   benchmarks/vllm_bring_up.sh run OUT         there: models/needle, Llama 3 8B's shape, CUDA graphs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
site=${VLLM_SITE:-/tmp/vllm_site}
# kernels that a dense decoder on an H100 does not call, and sources of kernels
unused='_vllm_fa2_C|_moe_C|/vllm-rs|deep_gemm/_C|_flashmla|_qutlass|_rust_tool|/include/|fmha_sm100'

pack() {
  local out work platforms=()
  mkdir -p "$1"
  out=$(cd "$1" && pwd)
  work=$(mktemp -d)
  mkdir "$work/site"
  for platform in 2_34 2_31 2_28 2_17 2_5; do platforms+=(--platform "manylinux_${platform}_x86_64"); done
  "$python" -m pip download -q --no-deps --only-binary :all: --python-version 3.12 "${platforms[@]}" \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    -d "$work/wheels" vllm==0.26.0 -r "$here/vllm_bring_up.txt"
  for wheel in "$work"/wheels/*; do "$python" -m zipfile -e "$wheel" "$work/site"; done
  cd "$work/site"
  find vllm -type f | grep -E "$unused" | xargs rm
  # tokenizers of other models, names of countries in other languages
  find mistral_common/data -size +500k -delete
  rm -rf pycountry/locales
  find . -path ./vllm -prune -o -name '*.so*' -type f -print | xargs strip --strip-unneeded
  for library in vllm/_C_stable_libtorch vllm/vllm_flash_attn/_vllm_fa3_C; do
    "$python" "$here/vllm_strip_fatbin.py" $library.abi3.so "$work/library.so" 90
    xz -T1 -3 --lzma2=preset=3,dict=128MiB -c "$work/library.so" > "$out/$(basename $library).abi3.so.xz"
    rm $library.abi3.so
  done
  # how vLLM finds the plugin of a checkout that is not installed
  mkdir minference_plugin-0.dist-info
  printf 'Metadata-Version: 2.1\nName: minference-plugin\nVersion: 0\n' \
    > minference_plugin-0.dist-info/METADATA
  printf '[vllm.general_plugins]\nminference = minference.integrations.vllm:register\n' \
    > minference_plugin-0.dist-info/entry_points.txt
  tar c . | xz -5 | split -b 17600000 -d - "$out/rest.tar.xz."
  rm -rf "$work"
}

unpack() {
  mkdir -p $site
  cat "$1"/rest.tar.xz.* | "$python" -c 'import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1], filter="tar")' $site
  for more in "$1"/*.tar.xz; do
    if [ -e "$more" ]; then "$python" -m tarfile -e "$more" $site; fi
  done
  for library in _C_stable_libtorch vllm_flash_attn/_vllm_fa3_C; do
    "$python" -c 'import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' \
      "$1/$(basename $library).abi3.so.xz" $site/vllm/$library.abi3.so
  done
  # at the end of the path: what the machine has already stays what it is
  echo $site > "$("$python" -c 'import site; print(site.getsitepackages()[0])')/zz_vllm_site.pth"
}

run() {
  local out
  mkdir -p "$1"
  out=$(cd "$1" && pwd)
  cd "$here/.."
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  "$python" -c 'import torch, vllm, vllm._C_stable_libtorch, vllm.vllm_flash_attn._vllm_fa3_C
print("vllm", vllm.__version__, "torch", torch.__version__)'
  local first="$python benchmarks/vllm_first_token.py --out $out/vllm_first_token.jsonl"
  first="$first --methods ${METHODS:-minference,grouped}"
  # a failure of one does not keep the other from being tried
  $first --model models/needle --length 65536 --batched 65536 --seconds 110 || true
  $first --model llama-3-8b --length 131008 --batched 131072 --seconds 110 || true
  $first --model models/needle --length 16384 --graphs --seconds 110 || true
  if [ "${CHUNKED:-}" ]; then $first --model llama-3-8b --batched 16384 --seconds 110; fi
}

"$@"
