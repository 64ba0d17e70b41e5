#!/usr/bin/env python3
"""Foretoken on a GPU beside llama.cpp, a PyTorch int4 decode and cuBLAS f16, in turns, in one run.

`gpu_compare.py --shape llama-3.1-8b` prints Markdown in the form of benches/RESULTS.md; benches/gpu.sh calls it with
what it has built. A round measures every engine one after the other, never at once, and the next one turns the order
round; figures are medians over rounds, with the least and most. An engine that cannot be had is left out, with the
reason in words; so is one that fails on the way. `--device cpu` tries all of it without a GPU.

Not here: the engines' own parts (gpu_llama.py, gpu_torch.py, `foretoken bench`), checks of results (benches/gpu.sh).
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import gpu_llama
import gpu_shapes
import shapes
from environment import Refused

HERE = pathlib.Path(__file__).resolve().parent
SHAPES = shapes.SHAPES | gpu_shapes.SHAPES
# Rows whose products cuBLAS does in f16: what a verification costs there.
ROWS = (1, 4, 8, 16)


def last_line(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


class Worker:
    """A process that waits between tests: a line of JSON in, a line out."""

    def __init__(self, command):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=HERE,
        )  # fmt: skip
        self.about = self.answer()["about"]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise Refused(last_line(self.errors.read().decode(errors="replace")))
        return json.loads(line)

    def ask(self, test):
        print(json.dumps(test), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


class Foretoken:
    """`foretoken bench`, one process a round."""

    name, tests = "foretoken", ("prefill", "decode")

    def __init__(self, args):
        self.command = [
            args.foretoken, "bench", "--shape", args.shape, "--device", args.device, "-r", "2",
            "-p", str(args.prompt_tokens), "-n", str(args.gen_tokens), "--max-foreign", "100", "-o", "json",
        ]  # fmt: skip
        self.bandwidth, self.about = 0.0, {}

    def measure(self):
        done = subprocess.run(self.command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Refused(last_line(done.stderr))
        found = {}
        for row in json.loads(done.stdout):
            self.bandwidth = max(self.bandwidth, row["read_bandwidth"])
            self.about = {key: row[key] for key in ("version", "format")}
            found[row["phase"]] = row["seconds"], row["bytes_per_second"] * row["seconds"]
        return found

    def close(self):
        pass


class Llama:
    """llama.cpp, Q4_0 throughout."""

    name, tests = "llama.cpp", ("prefill", "decode")

    def __init__(self, args):
        if args.device == "cpu":
            raise Refused("compare.py has it on a processor")
        python = args.llama or gpu_llama.make(args.dir / "llama", args.wheels)
        model = args.dir / f"{args.shape}-q4_0.gguf"
        if not model.exists():
            write = [python, HERE / "gpu_llama.py", "write", args.shape, model]
            done = subprocess.run(write, capture_output=True, text=True)
            if done.returncode != 0:
                raise Refused(f"the model was not written: {last_line(done.stderr)}")
        self.args, self.bytes = args, shapes.bytes_per_token(SHAPES[args.shape])
        self.worker = Worker([python, HERE / "gpu_llama.py", "serve", model])
        self.about = self.worker.about

    def measure(self):
        tests = {"prefill": self.args.prompt_tokens, "decode": self.args.gen_tokens}
        seconds = {test: self.worker.ask({test: count})["seconds"] for test, count in tests.items()}
        return {test: (took, self.bytes * (tests[test] if test == "decode" else 1)) for test, took in seconds.items()}

    def close(self):
        self.worker.close()


class Torch:
    """A decode as gpt-fast does it."""

    name, tests = "PyTorch int4", ("decode",)

    def __init__(self, args):
        if subprocess.run([args.torch, "-c", "import torch"], capture_output=True).returncode != 0:
            raise Refused(f"{args.torch} has no PyTorch: pip install torch there first")
        self.args = args
        self.worker = Worker([args.torch, HERE / "gpu_torch.py", args.shape, args.device])
        self.about = self.worker.about

    def measure(self):
        found = self.worker.ask({"decode": self.args.gen_tokens})
        return {"decode": (found["seconds"], found["bytes"])}

    def close(self):
        self.worker.close()


def start(engines, args):
    """The engines that can be had, and why others cannot."""
    there, missing = [], {}
    for engine in engines:
        try:
            there.append(engine(args))
        except Refused as refused:
            missing[engine.name] = str(refused)
    return there, missing


def rounds(there, missing, args):
    """Measures in turns; an engine that fails is left out from then on. Samples by test and engine."""
    samples = {}
    for turn in range(args.rounds):
        for engine in there[:] if turn % 2 == 0 else there[::-1]:
            if time.monotonic() > args.end:
                missing["further rounds"] = f"the time was up in round {turn + 1}"
                return samples
            try:
                found = engine.measure()
            except Refused as refused:
                missing[engine.name] = str(refused)
                there.remove(engine)
                continue
            for test, one in found.items():
                samples.setdefault(test, {}).setdefault(engine.name, []).append(one)
    return samples


def step_rows(samples, bandwidth, args):
    """Markdown of whole steps."""
    counts = {"prefill": args.prompt_tokens, "decode": args.gen_tokens}
    lines = ["| test | engine | tok/s (least-most) | GB/s | of read bandwidth |", "|---|---|---|---|---|"]
    for test, engines in samples.items():
        for engine, found in engines.items():
            rates = [counts[test] / seconds for seconds, _ in found]
            moved = statistics.median(read / seconds for seconds, read in found)
            share = f"{moved / bandwidth:.0%}" if bandwidth and test == "decode" else "-"
            speed = f"{statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})"
            lines.append(f"| {test} {counts[test]} | {engine} | {speed} | {moved / 1e9:.1f} | {share} |")
    return lines


def product_rows(torch, bandwidth, args):
    """Markdown of f16 products of the shape's matrices."""
    heads = "".join(f" T({rows})/T(1) |" for rows in ROWS[1:])
    lines = [f"| cuBLAS f16 | GB/s | of read bandwidth |{heads}", "|---|---|---|" + "---|" * len(ROWS[1:])]
    for n, k in sorted({size for _, size in shapes.matrices(SHAPES[args.shape])}):
        if time.monotonic() > args.end:
            break
        found = [torch.worker.ask({"product": [n, k], "rows": rows}) for rows in ROWS]
        rate = found[0]["bytes"] / found[0]["seconds"]
        share = f"{rate / bandwidth:.0%}" if bandwidth else "-"
        costs = "".join(f" {one['seconds'] / found[0]['seconds']:.2f} |" for one in found[1:])
        lines.append(f"| {n} x {k} | {rate / 1e9:.1f} | {share} |{costs}")
    return lines


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512, help="at most 512")
    parser.add_argument("-n", "--gen-tokens", type=int, default=128, help="at most 512")
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="no measurement begins after that")
    parser.add_argument("--foretoken", default=str(HERE.parent.parent / "target" / "release" / "foretoken"))
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="a Python that has PyTorch")
    parser.add_argument("--llama", metavar="PYTHON", help="one that has llama_cpp with CUDA; built if not given")
    parser.add_argument("--wheels", type=pathlib.Path, help="folder with the packages to build it from")
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "foretoken-gpu-peers")
    args = parser.parse_args()
    if not 1 <= args.prompt_tokens <= 512 or not 1 <= args.gen_tokens <= 512 or args.rounds < 1:
        parser.error("--prompt-tokens and --gen-tokens must be 1 to 512, --rounds at least 1")
    args.end = time.monotonic() + args.seconds
    return args


def main():
    args = arguments()
    args.dir.mkdir(parents=True, exist_ok=True)
    there, missing = start([Foretoken, Llama, Torch], args)
    samples = rounds(there, missing, args)
    bandwidth = next((engine.bandwidth for engine in there if engine.name == "foretoken"), 0.0)
    print(f"`gpu_compare.py --shape {args.shape} --device {args.device} -r {args.rounds}`, in turns, ", end="")
    print(f"medians; {bandwidth / 1e9:.0f} GB/s can be read:\n")
    print("\n".join(step_rows(samples, bandwidth, args)) + "\n")
    torch = next((engine for engine in there if engine.name == Torch.name), None)
    try:
        if torch:
            print("\n".join(product_rows(torch, bandwidth, args)) + "\n")
    except Refused as refused:
        missing["cuBLAS f16"] = str(refused)
    for engine in there:
        print(f"- {engine.name}: {', '.join(f'{key} {value}' for key, value in engine.about.items())}")
        engine.close()
    for name, why in missing.items():
        print(f"- skipped: {name}: {why}")


if __name__ == "__main__":
    main()
