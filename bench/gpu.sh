#!/usr/bin/env bash
# On a machine with a GPU, torch and triton (no network needed): build, test, then measure into bench/results/gpu.json.
#   bench/gpu.sh [arguments of bench.gpu]      PYTHON=python3.12 bench/gpu.sh --only flashrnn
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export FASTRNN_TRITON=1 # until this script has passed, the engine takes no calls of its own accord
"$python" -m pip install --quiet --no-deps --no-build-isolation -e .
"$python" -m bench.gpu_resources --quick
"$python" -m pytest tests/test_gpu.py -m gpu
if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --error-exitcode 1 "$python" -m pytest tests/test_gpu.py -k "test_kernels and time"
fi
"$python" -m bench.gpu "$@"
