#!/usr/bin/env bash
# Compiles every CUDA kernel for every generation of GPUs, which needs no GPU: tests/cuda/run.sh
# Brings NVIDIA's compilers (12 and 13) and inspector as Python wheels, for the tests in tests/it/cuda.rs.
# Not for results: kernels' own tests run them on a processor. Without python3 or a package index, or
# where there are no such wheels, it says so and what it skips.
set -euo pipefail
cd "$(dirname "$0")/../.."

skip() {
    echo "tests/cuda: skipped: $1"
    exit 0
}

command -v python3 >/dev/null || skip "there is no python3"
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment" 2>/dev/null || skip "python3 -m venv does not work"
"$environment/bin/pip" install -q --disable-pip-version-check --no-compile --no-deps -r tests/cuda/requirements.txt ||
    skip "NVIDIA's packages cannot be installed"
packages=$(echo "$environment"/lib/python3*/site-packages/nvidia)
export CUOBJDUMP=$packages/cu13/bin/cuobjdump PATH=$packages/cu13/bin:$PATH
for library in "$packages/cu13/lib" "$packages/cuda_nvrtc/lib"; do
    FORETOKEN_NVRTC=$library cargo test --release --workspace --locked --test it cuda:: -- --show-output
done
