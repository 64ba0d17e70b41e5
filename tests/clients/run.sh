#!/usr/bin/env bash
# Runs clients that others wrote against a server of this build: tests/clients/run.sh [pytest arguments]
# Not for what Rust tests can see. Input: the binary that `cargo build --release` made, or $FORETOKEN.
# Needs python3, and chromium with its driver for the page; where a tool is missing, it says so and what it skips.
set -euo pipefail
cd "$(dirname "$0")"
export FORETOKEN=${FORETOKEN:-$PWD/../../target/release/foretoken}

skip() {
    echo "tests/clients: skipped: $1"
    exit 0
}

[ -x "$FORETOKEN" ] || { echo "tests/clients: no binary at $FORETOKEN: cargo build --release -p server" >&2; exit 1; }
command -v python3 >/dev/null || skip "there is no python3"
command -v chromium >/dev/null && command -v chromedriver >/dev/null ||
    echo "tests/clients: the page is not tried: there is no chromium with chromedriver"

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment/uv" 2>/dev/null || skip "python3 -m venv does not work"
# uv installs these 130 packages in a quarter of pip's time.
"$environment/uv/bin/pip" install -q --disable-pip-version-check --no-compile uv==0.13.9 ||
    skip "the package index cannot be reached"
uv=$environment/uv/bin/uv
"$uv" venv -q --python python3 "$environment/clients"
"$uv" pip install -q --python "$environment/clients/bin/python" -r requirements.txt ||
    skip "their packages cannot be installed"
# Versions of its own; the tests say so where it is missing.
if "$uv" venv -q --python python3 "$environment/load" &&
    "$uv" pip install -q --python "$environment/load/bin/python" -r requirements-aiperf.txt; then
    export AIPERF=$environment/load/bin/aiperf
fi
PATH=$environment/clients/bin:$PATH
# Nothing of a person's own settings, and nothing from a hub.
export HOME=$environment HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
unset OPENAI_API_KEY OPENAI_BASE_URL http_proxy https_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY all_proxy
pytest -q -p no:cacheprovider --durations=8 -rs "$@"
