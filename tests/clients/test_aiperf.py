"""A short profile by aiperf: every request answered, with as many tokens as were asked for.

Not for speed: the machine may be busy. Input: the demo model's tokenizer; $AIPERF, the program, which run.sh installs in
an environment of its own (its pins are not those of the other clients).
"""

import json
import os
import subprocess

import pytest
from conftest import DEMO

REQUESTS, PROMPT, ANSWER = 24, 64, 32


@pytest.mark.skipif("AIPERF" not in os.environ, reason="aiperf is not installed: $AIPERF names no program")
def test_a_short_profile(server, tmp_path):
    command = [os.environ["AIPERF"], "profile", "--model", "demo", "--url", server.root, "--endpoint-type", "completions"]
    command += ["--streaming", "--tokenizer", str(DEMO), "--concurrency", "4", "--request-count", str(REQUESTS)]
    command += ["--isl", str(PROMPT), "--isl-stddev", "0", "--osl", str(ANSWER), "--extra-inputs", "ignore_eos:true"]
    # The same texts every time.
    command += ["--extra-inputs", "temperature:0"]
    command += ["--random-seed", "1", "--no-gpu-telemetry", "--ui", "none", "--artifact-dir", str(tmp_path)]
    # Offline, it looks for the folder in the hub's cache.
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    mean = {name: value["avg"] for name, value in report.items() if isinstance(value, dict) and "avg" in value}
    assert report["error_summary"] == []
    assert mean["request_count"] == mean["completed_request_count"] == REQUESTS
    assert mean["total_usage_prompt_tokens"] == REQUESTS * PROMPT
    assert mean["total_usage_completion_tokens"] == REQUESTS * ANSWER
    # Its own tokenizer's counts beside ours: a beginning-of-text that it does not count, and texts that have fewer
    # tokens when they are read again than were made (greedy text is the same everywhere: 1.2 % on average).
    assert mean["usage_prompt_tokens"] == mean["input_sequence_length"] + 1
    assert 0 <= mean["usage_completion_tokens_diff_pct"] < 2
    assert 0 < mean["time_to_first_token"] <= mean["request_latency"]
