#!/usr/bin/env bash
# A visit to a machine with a GPU, torch and triton (no network needed): build where it is not, then in ten minutes what is worth
# most first. Each stage is useful alone, and has a limit of its own, so that all but the grid have their turn; what one measures
# lies in build/gpu/ as soon as it is known.
#   bench/gpu.sh                  every stage          bench/gpu.sh worst threads    these alone
#   PYTHON=python3.12 MINUTES=30 bench/gpu.sh          PYTEST_ADDOPTS="-n 8" bench/gpu.sh tests
# Stages:
#   tests      the engine's tests on the device
#   selftest   which schedules prove themselves, and replays, and how long that takes with and without compilation
#   host       from a call to its launches
#   worst      where cuDNN was farthest ahead, on an H200
#   stacks     layers at once, beside which bench/results/gpu.json has the times of one after another
#   threads    the CPU engine with 1 to 16 threads: results and speed of larger teams
#   grid       every point; a whole one becomes bench/results/gpu.json
#   peers      layers of FlashRNN's, DeepBench's and bonito's shapes beside other libraries' that are installed, some of which
#              compile for minutes; only if named
#   sanitizer  memcheck over one layer of each schedule, where compute-sanitizer is installed; only if named
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=build/gpu
end=$((SECONDS + 60 * ${MINUTES:-10}))
stages=("$@")
[ $# -gt 0 ] || stages=(tests selftest host worst stacks threads grid)
failed=()

# limited SECONDS COMMAND...: for so long at most, and not beyond the visit's end
limited() {
    local left=$((end - SECONDS))
    [ "$left" -gt 5 ] || { echo "gpu.sh: no time left"; return 124; }
    timeout --signal=INT --kill-after=10 "$((left < $1 ? left : $1))" "${@:2}"
}

tests() { FASTRNN_TRITON=1 limited 180 "$python" -m pytest -q tests/test_gpu.py -m "gpu and not slow"; }

selftest() {
    limited 60 "$python" - <<'END'
import sys, time
import torch
from fastrnn.kernels.gpu import selftest, tape
device = torch.device("cuda", 0)
print(selftest.identity(device))
print("passes are replayed" if tape.on_gpu() else "Python runs every pass: no compiled runtime, no driver, or ROCm")
for how in "with compilation", "compiled before":
    begin = time.perf_counter()
    off, _ = selftest.run(device)
    print(f"{how}: {time.perf_counter() - begin:.2f} s, off: {off or 'nothing'}")
sys.exit(bool(off))
END
}

host() { limited 40 "$python" -m bench.gpu_host --device cuda --seconds 0.5; }

worst() {
    local points='H2816 |H4096 |tf32 H1536 |RNN tf32 H192|fp16 H512 B16 T25|tf32 H128 B32 T512|^ieee'
    limited 120 "$python" -m bench.gpu --only "$points" --seconds 0.3 --output "$results/worst.json"
}

stacks() { limited 60 "$python" -m bench.gpu --only ' L[2-9]$' --seconds 0.3 --output "$results/stacks.json"; }

threads() {
    limited 100 "$python" -m bench.run --threads 1,2,4,8,16 --peers torch --seconds 0.5 --output "$results/threads.json" \
        --only 'lstm (train|infer) B(32|128) T(100|25) H(256|1024)$'
}

grid() {
    limited 3600 "$python" -m bench.gpu --seconds 0.3 --output "$results/grid.json" && cp "$results/grid.json" bench/results/gpu.json
}

peers() {
    local points='^flashrnn .*fp16|^deepbench .* (fp16|tf32) (H512 B16|H1024 B32) |^bonito'
    limited 1200 "$python" -m bench.gpu --peers torch,torchrl,loop,flashrnn --only "$points" --seconds 0.3 \
        --output "$results/peers.json"
}

sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "gpu.sh: compute-sanitizer is not installed"; return 1; }
    limited 600 compute-sanitizer --error-exitcode 1 "$python" -m pytest tests/test_gpu.py -k "test_kernels and time"
}

for stage in "${stages[@]}"; do
    case $stage in
    tests | selftest | host | worst | stacks | threads | grid | peers | sanitizer) ;;
    *)
        echo "gpu.sh: stage: expected tests, selftest, host, worst, stacks, threads, grid, peers or sanitizer, got $stage" >&2
        exit 2
        ;;
    esac
done
mkdir -p "$results"
"$python" -c "import fastrnn" 2>/dev/null || "$python" -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
for stage in "${stages[@]}"; do
    echo "gpu.sh: $stage, $((end - SECONDS)) s left"
    "$stage" 2>&1 | tee "$results/$stage.txt" || failed+=("$stage")
done
[ ${#failed[@]} -eq 0 ] || { echo "gpu.sh: failed or not finished: ${failed[*]}"; exit 1; }
