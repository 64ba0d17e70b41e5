"""Servers of this build for the tests of this folder, and the command line beside them.

Not for what a client checks: see the test files. Input: the binary named by $FORETOKEN.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import threading

import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = ROOT / "server" / "demo" / "verifier"
# A model with a chat template; its weights are random.
CHAT = ROOT / "tests" / "golden" / "quantized" / "gptq_llama_w4g128"
PROMPT = "fn main() {"


def foretoken(*words):
    """What a command prints."""
    ran = subprocess.run([os.environ["FORETOKEN"], *map(str, words)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def run(*words):
    """The object that `foretoken run --json` prints."""
    return json.loads(foretoken("run", *words, "--json"))


class Server:
    """`foretoken serve` on a free port, until `stop`."""

    def __init__(self, *words):
        command = [os.environ["FORETOKEN"], "serve", *map(str, words), "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"served at (http://\S+)", line):
                self.root = found[1]
                break
        else:
            raise AssertionError(f"the server ended: {''.join(self.said)}")
        # A full pipe would stop the server.
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()

    def client(self, **settings):
        """openai-python for this server; it does not try again unless told to."""
        settings = {"api_key": "none", "max_retries": 0, "timeout": 60, **settings}
        return openai.OpenAI(base_url=f"{self.root}/v1", **settings)

    def stop(self):
        """Ends it as a service manager does; it must end well."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        assert code == 0, f"exit code {code}: {''.join(self.said)}"


@pytest.fixture(scope="session")
def server():
    """The demo pair."""
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def client(server):
    """openai-python on the demo pair."""
    with server.client() as client:
        yield client


@pytest.fixture
def start():
    """Starts servers with other arguments for one test."""
    started = []

    def start(*words):
        started.append(Server(*words))
        return started[-1]

    yield start
    for server in started:
        server.stop()
