#!/usr/bin/env bash
# On a machine with a GPU, torch and triton (no network needed): build where it is not, test, measure into bench/results/gpu.json.
#   bench/gpu.sh [arguments of bench.gpu]      PYTHON=python3.12 bench/gpu.sh --only flashrnn      PYTEST_ADDOPTS="-n 8" bench/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export FASTRNN_TRITON=1 # on devices, too, where the engine has to be asked for
"$python" -c "import fastrnn" 2>/dev/null || "$python" -m pip install --quiet --no-deps --no-build-isolation -e .
"$python" -m pytest tests/test_gpu.py -m gpu
"$python" -m bench.gpu "$@"
if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --error-exitcode 1 "$python" -m pytest tests/test_gpu.py -k "test_kernels and time"
fi
