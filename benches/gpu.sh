#!/usr/bin/env bash
# What needs a GPU, all of it in one run: correctness first, then speed beside others.
#
#   benches/gpu.sh pack DIR           builds here; DIR is all that the machine with the GPU needs
#   DIR/gpu.sh run [MINUTES]          there (default 14 minutes): DIR/results has what every part said, and
#                                     rows.md, which is in the form of benches/RESULTS.md
#   benches/gpu.sh on HOST [MINUTES]  both, with ssh between them
#   benches/gpu.sh dry [DIR]          both here on the processor, with the smallest sizes: tries the script
#
# That machine: Linux x86-64 with an NVIDIA driver; no Rust, no network. NVIDIA's compiler (90 MB) and the sources
# of llama.cpp (120 MB) are carried along, but for CARRY=ours. What else others need (nvcc for llama.cpp, a
# Python with PyTorch) is used where it is there: PYTHON names one with PyTorch, LLAMA_PYTHON one with llama_cpp
# built for CUDA. A part that cannot run, or has no time left, says why in rows.md.
# Not here: how a part measures (foretoken bench, peers/gpu_compare.py).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The program that cargo built of the tests NAME. All of the workspace, as for other tests: nothing is compiled
# anew for other features.
test_program() {
    cargo test --release --locked --workspace --lib --test it --no-run 2>&1 |
        sed -n "s/.*Executable.*(\(.*\/$1-[0-9a-f]*\))\$/\1/p" | tail -1
}

# Copies a program without what only debuggers read.
carry() {
    if command -v strip >/dev/null; then strip -o "$2" "$1"; else cp "$1" "$2"; fi
}

pack() {
    local to=$1 root=$here/..
    cd "$root"
    cargo build --release --locked --workspace --bin foretoken
    mkdir -p "$to/peers"
    to=$(cd "$to" && pwd)
    carry target/release/foretoken "$to/foretoken"
    carry "$(test_program kernels)" "$to/conformance"
    carry "$(test_program it)" "$to/golden-tests"
    # The tests look for their files where they were built.
    (cd tests && pwd) >"$to/tests-path"
    cp -r tests/golden "$to/"
    cp benches/peers/*.py "$to/peers/"
    cp benches/gpu.sh "$to/"
    git describe --always --dirty >"$to/commit" 2>/dev/null || echo unknown >"$to/commit"
    if [ "${CARRY:-all}" != ours ]; then
        download "$to/wheels" --no-binary llama-cpp-python llama-cpp-python gguf scikit-build-core cmake ninja
        download "$to/nvrtc" --no-deps nvidia-cuda-nvrtc-cu12
        if [ -d "$to/nvrtc" ]; then (cd "$to/nvrtc" && python3 -m zipfile -e ./*.whl . && rm ./*.whl); fi
    fi
    echo "gpu.sh: $to has $(du -sh "$to" | cut -f1)"
}

# Packages for a machine without a network; without one here either it says what will be missing.
download() {
    local to=$1
    if ! python3 -m pip download -q --disable-pip-version-check --dest "$@" 2>"$to.log"; then
        echo "gpu.sh: ${*: -1} is not carried along: $(grep -v '^ *$' "$to.log" | tail -1)" >&2
        rm -rf "$to"
    fi
    rm -f "$to.log"
}

say() {
    echo "$*" | tee -a "$results/rows.md"
}

# part NAME SECONDS COMMAND...: runs it, but no longer; its words go to a file. Fails if it does.
part() {
    local name=$1 most=$2 left=$((end - SECONDS)) start=$SECONDS code=0
    shift 2
    if [ "$left" -lt 15 ]; then
        say "- $name: skipped, no time is left"
        return 1
    fi
    timeout "$((most < left ? most : left))" "$@" >"$results/$name.txt" 2>"$results/$name.err" || code=$?
    case $code in
    0) say "- $name: done in $((SECONDS - start)) s" ;;
    124) say "- $name: cut after $((SECONDS - start)) s" ;;
    *) say "- $name: FAILED ($code): $(grep -v '^ *$' "$results/$name.err" "$results/$name.txt" -h | tail -1)" ;;
    esac
    return "$code"
}

# Tests; how many passed.
tests() {
    if part "$@"; then
        say "  $(grep '^test result' "$results/$1.txt" | tail -1)"
    fi
}

# A measurement of Foretoken's: its command, then its table.
measure() {
    local name=$1
    if part "$name" "$2" "$here/foretoken" "${@:3}" --device "$device" --max-foreign 100; then
        say ""
        say "\`foretoken ${*:3} --device $device\`:"
        say ""
        say "$(<"$results/$name.txt")"
        say ""
    fi
}

# The golden tests' files, where they look for them.
place_golden() {
    local at
    at=$(<"$here/tests-path")
    [ -e "$at/golden" ] && return
    mkdir -p "$at" 2>/dev/null && ln -s "$here/golden" "$at/golden" && placed=$at/golden && return
    say "- golden: skipped, the files cannot be put at $at/golden"
    return 1
}

compare() {
    local shape=$1 seconds=$2 options=(--foretoken "$here/foretoken" --shape "$1" --device "$device")
    options+=(--torch "${PYTHON:-python3}" --dir "$results/peers" --seconds "$seconds" "${@:3}")
    [ -z "${LLAMA_PYTHON:-}" ] || options+=(--llama "$LLAMA_PYTHON")
    [ ! -d "$here/wheels" ] || options+=(--wheels "$here/wheels")
    if ! command -v python3 >/dev/null; then
        say "- beside others, $shape: skipped, there is no python3"
    elif part "peers-$shape" "$((seconds + 60))" python3 "$here/peers/gpu_compare.py" "${options[@]}"; then
        say ""
        say "$(<"$results/peers-$shape.txt")"
        say ""
    fi
}

# Everything on a GPU, what matters most first.
all_parts() {
    tests conformance 150 "$here/conformance" conformance:: cuda:: --skip passed --skip faults
    if place_golden; then tests golden 90 "$here/golden-tests" on_cuda --nocapture; fi
    part verify 40 "$here/foretoken" verify --device "$device" --draft-tokens 4 || true
    measure kernels-llama-3.1-8b 60 bench kernels --shape llama-3.1-8b
    measure bench-llama-3.1-8b 100 bench --shape llama-3.1-8b -p 512,1024 -d 0,4096 --verify 2,4,8,16
    measure speculation 100 bench --shape llama-3.1-8b --draft-shape llama-3.2-1b --acceptance 0.8 \
        --draft-tokens 2,4,6,auto -n 128 -r 3
    compare llama-3.1-8b 240
    measure bench-llama-3.2-1b 60 bench --shape llama-3.2-1b -p 512,1024 --verify 4,8,16
    measure bench-qwen2.5-7b 90 bench --shape qwen2.5-7b -p 512,1024 --verify 4,8,16
    measure kernels-qwen2.5-7b 60 bench kernels --shape qwen2.5-7b
    measure kernels-llama-3.2-1b 60 bench kernels --shape llama-3.2-1b
    compare qwen2.5-7b 120
    compare llama-3.2-1b 120
}

# The same parts where there is no GPU.
dry_parts() {
    tests conformance 100 "$here/conformance" conformance::faults cuda::tiles
    if place_golden; then tests golden 90 "$here/golden-tests" decoders_on_cpu; fi
    part verify 40 "$here/foretoken" verify --device "$device" --draft-tokens 4 --max-tokens 8 || true
    measure kernels 60 bench kernels --shape smollm2-135m -r 1 --footprint 1
    measure bench 60 bench --shape smollm2-135m -p 16 -n 4 -d 0,64 --verify 2 -r 1
    measure speculation 60 bench --shape smollm2-135m --draft-shape demo-draft --acceptance 0.8 \
        --draft-tokens 2 -n 8 -r 1
    compare smollm2-135m 60 -r 1 -p 16 -n 4
}

run() {
    local minutes=$1 parts=$2
    results=$here/results end=$((SECONDS + 60 * minutes)) placed=
    trap '[ -z "$placed" ] || rm -f "$placed"' EXIT
    rm -rf "$results"
    mkdir -p "$results"
    local machine=processor
    if [ "$device" != cpu ]; then
        if ! command -v nvidia-smi >/dev/null; then
            echo "gpu.sh: there is no nvidia-smi: this needs an NVIDIA driver (benches/gpu.sh dry tries the script)" >&2
            exit 1
        fi
        machine=$(nvidia-smi --query-gpu=name,driver_version,clocks.max.mem --format=csv,noheader | head -1)
    fi
    local nvrtc=$here/nvrtc/nvidia/cuda_nvrtc/lib
    if [ -z "${FORETOKEN_NVRTC:-}" ] && [ -d "$nvrtc" ]; then export FORETOKEN_NVRTC=$nvrtc; fi
    say "## $(date -u +%F), $machine, commit $(<"$here/commit")"
    say ""
    if part devices 60 "$here/foretoken" devices; then
        say ""
        sed 's/^/    /' "$results/devices.txt" | tee -a "$results/rows.md"
        say ""
    fi
    if [ "$device" != cpu ] && ! grep -q '^cuda:0 .* available$' "$results/devices.txt"; then
        say "Foretoken cannot use the GPU: $(grep '^cuda' "$results/devices.txt")"
        exit 1
    fi
    "$parts"
    echo "gpu.sh: $results/rows.md"
}

# Packs, sends, runs and brings the results back.
on() {
    local host=$1 minutes=$2 folder
    folder=$(mktemp -d)
    pack "$folder"
    tar -C "$folder" -cz . | ssh "$host" 'rm -rf foretoken-gpu && mkdir foretoken-gpu && tar -C foretoken-gpu -xz'
    ssh "$host" "foretoken-gpu/gpu.sh run $minutes" || echo "gpu.sh: it failed on $host" >&2
    ssh "$host" 'tar -C foretoken-gpu -cz --exclude results/peers results' | tar -C "$folder" -xz
    echo "gpu.sh: $folder/results/rows.md"
}

device=cuda
case ${1:-} in
pack) pack "${2:?pack needs a folder}" ;;
run) run "${2:-14}" all_parts ;;
on) on "${2:?on needs a host}" "${3:-14}" ;;
dry)
    folder=${2:-$(mktemp -d)}
    pack "$folder"
    here=$(cd "$folder" && pwd) device=cpu
    run 10 dry_parts
    ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
