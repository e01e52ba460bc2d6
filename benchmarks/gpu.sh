#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one call of a few minutes: the tests of the scans on the card, the scan against
# the memory roofline and against transformers, decoding with and without CUDA graphs, full adversarial updates, and
# bfloat16 against float32. One JSON file per figure. Every step has a limit; together they are eight minutes.
#
#   benchmarks/gpu.sh OUT            (PYTHON=… for another interpreter, which has midimamba and its extra `test`)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0
step() {  # step NAME SECONDS COMMAND…: run for at most so long, keep the log, go on
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { failed=1; echo "FAILED $name: the end of $out/$name.log"; tail -15 "$out/$name.log"; }
    echo "$name: $((SECONDS - start)) s; $(tail -1 "$out/$name.log" | cut -c1-600)"
}
step tests 120 "$python" -m pytest -q -p no:cacheprovider tests/modeling/test_scan_triton.py tests/modeling/test_selective_scan.py
for length in 512 2048 8192 32768; do
    step "scan-gpu-$length" 20 "$python" benchmarks/scan_gpu.py --seq-len "$length" --batch $((32768 / length)) --out "$out/scan-gpu-$length.json"
done
step scan-gpu-bfloat16 20 "$python" benchmarks/scan_gpu.py --dtype bfloat16 --out "$out/scan-gpu-bfloat16.json"
step scan-512-cuda 30 "$python" benchmarks/scan.py --seq-len 512 --device cuda --their-repeats 1 --out "$out/scan-512-cuda.json"
step gpu 150 "$python" benchmarks/gpu.py --out "$out/gpu.json"
step memory-cuda 80 "$python" benchmarks/memory.py --length 1024 4096 --rollouts 4 16 --positions 16 --micro-batch 4 \
    --rollout-mb 2048 --naive-length 16 64 256 --limit-gb 12 --out "$out/memory-cuda.json"
exit $failed
