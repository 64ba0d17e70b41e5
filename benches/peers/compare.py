#!/usr/bin/env python3
"""Foretoken beside llama.cpp on the same shape, in turns, on the same threads.

`python3 benches/peers/compare.py` after `cargo build --release -p server`. The first run builds llama.cpp (package
llama-cpp-python) in a throw-away environment and writes the shape as GGUF Q4_0 with random weights; `--dir` says where.
A round measures both engines one after the other, never at once, and the next round turns the order round. A round in
which other processes used more than `--max-foreign` percent of the machine during either does not count and is
repeated, up to three times as many in all; before each turn the script waits some seconds for others to fall silent.
Ratios are medians over medians; their range is that of the rounds.

Not here: building (environment.py), llama.cpp's own part (llama_worker.py), absolute truth: a shared machine's figures
hold for one run, the ratios for longer.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import environment
import shapes
from environment import Refused

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TRIES = 3
TICKS = os.sysconf("SC_CLK_TCK")
# Share of a processor above which a worker that should wait is called busy.
IDLE = 0.02


class Books:
    """Processor time of the whole machine and of one process, from now on."""

    def __init__(self, pid):
        self.pid = pid
        self.first = self.read()

    def read(self):
        with open("/proc/stat") as stat:
            ticks = [int(word) for word in stat.readline().split()[1:9]]
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        # Neither idle (3) nor waiting for a disk (4) is use.
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], int(fields[11]) + int(fields[12])

    def since(self):
        """Ticks of all processors, of their use, and of the process since the beginning."""
        return [now - before for now, before in zip(self.read(), self.first)]

    def foreign(self):
        """Share of the machine that other processes used; the books may be off by two ticks."""
        everything, used, own = self.since()
        return max(0, used - own - 2) / max(1, everything)


def wait_for_quiet(most, patience):
    """Waits until others use at most `most` of the machine for a second, but no longer than `patience` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        books = Books(os.getpid())
        time.sleep(1)
        if books.foreign() <= most:
            return


class Llama:
    """llama.cpp in a process of its own that waits between tests."""

    name = "llama.cpp"

    def __init__(self, python, model, threads):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [python, HERE / "llama_worker.py", "serve", model, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            raise Refused(f"llama.cpp ended ({self.process.returncode}): {said[-1] if said else 'it said nothing'}")
        return json.loads(line)

    def measure(self, tests):
        """Seconds of each test and others' share of the machine meanwhile."""
        found = {}
        for name, (kind, tokens) in tests.items():
            books = Books(self.process.pid)
            print(json.dumps({kind: tokens}), file=self.process.stdin, flush=True)
            seconds = self.answer()["seconds"]
            found[name] = {"seconds": seconds, "foreign": books.foreign()}
        return found

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


class Foretoken:
    """`foretoken bench`, one process a round, while llama.cpp's waits."""

    name = "foretoken"

    def __init__(self, args, threads, other):
        self.command = [
            args.foretoken, "bench", "--shape", args.shape, "-t", str(threads), "-r", "1",
            "--max-foreign", "100", "-o", "json",
        ]  # fmt: skip
        if args.isa == "avx2":
            self.command += ["--cpu-isa", "avx2"]
        self.other = other
        self.row, self.busy = {}, 0.0

    def measure(self, tests):
        """Seconds of each test and others' share of the machine meanwhile."""
        wanted = {kind: tokens for kind, tokens in tests.values()}
        counts = ["-p", str(wanted.get("prefill", 0)), "-n", str(wanted.get("decode", 0))]
        books = Books(self.other.process.pid)
        done = subprocess.run(self.command + counts, capture_output=True, text=True)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise Refused(f"{self.command[0]} bench failed: {said[-1] if said else 'it said nothing'}")
        everything, _, own = books.since()
        self.busy = max(self.busy, own / max(1, everything))
        found = {}
        for row in json.loads(done.stdout):
            self.row |= row | {"read_bandwidth": max(row["read_bandwidth"], self.row.get("read_bandwidth", 0))}
            self.row[row["phase"]] = row["bytes_per_second"] * row["seconds"]
            found[row["test"]] = {"seconds": row["seconds"], "foreign": row["foreign_cpu"] or 0.0}
        return found


def rounds(engines, tests, args):
    """Measures in turns until enough rounds of each test were quiet; yields (test, kept, dropped, loud)."""
    wanted, most = args.rounds, args.max_foreign / 100
    kept, loud = {name: [] for name in tests}, {name: [] for name in tests}
    for turn in range(TRIES * wanted):
        open_tests = {name: test for name, test in tests.items() if len(kept[name]) < wanted}
        if not open_tests:
            break
        order = engines if turn % 2 == 0 else engines[::-1]
        found = {}
        for engine in order:
            wait_for_quiet(most, args.patience)
            found[engine.name] = engine.measure(open_tests)
        for name in open_tests:
            pair = {engine: tests_of[name] for engine, tests_of in found.items()}
            noise = max(one["foreign"] for one in pair.values())
            (kept if noise <= most else loud)[name].append(pair)
        print(f"  round {turn + 1}: {json.dumps(found)}", file=sys.stderr)
    for name in tests:
        quiet = bool(kept[name])
        noise = lambda pair: max(one["foreign"] for one in pair.values())
        chosen = kept[name] or sorted(loud[name], key=noise)[:wanted]
        yield name, chosen, len(kept[name]) + len(loud[name]) - len(chosen), not quiet


def row(name, tokens, threads, pairs):
    """What is told of a test: speeds of both engines, and their ratio."""
    result = {"test": name, "threads": threads, "rounds": len(pairs)}
    for engine in ("foretoken", "llama.cpp"):
        rates = [tokens / pair[engine]["seconds"] for pair in pairs]
        result[engine] = {
            "tokens_per_second": statistics.median(rates),
            "least": min(rates), "most": max(rates), "samples": rates,
            "foreign_cpu": max(pair[engine]["foreign"] for pair in pairs),
        }  # fmt: skip
    ratios = [pair["llama.cpp"]["seconds"] / pair["foretoken"]["seconds"] for pair in pairs]
    result["ratio"] = result["foretoken"]["tokens_per_second"] / result["llama.cpp"]["tokens_per_second"]
    result["ratio_least"], result["ratio_most"] = min(ratios), max(ratios)
    return result


def measure(args, threads, python, model):
    """All rows of one thread count, and what the engines say of themselves."""
    tests = {}
    if args.prompt_tokens:
        tests[f"pp{args.prompt_tokens}"] = ("prefill", args.prompt_tokens)
    if args.gen_tokens:
        tests[f"tg{args.gen_tokens}"] = ("decode", args.gen_tokens)
    llama = Llama(python, model, threads)
    with contextlib.closing(llama):
        environment.check(llama.about["system"], args.isa, args.venv)
        foretoken = Foretoken(args, threads, llama)
        rows = []
        for name, pairs, dropped, loud in rounds([foretoken, llama], tests, args):
            kind, tokens = tests[name]
            result = row(name, tokens, threads, pairs) | {"dropped": dropped, "loud": loud}
            if kind == "decode":
                read = {"foretoken": foretoken.row["decode"] / tokens}
                read["llama.cpp"] = shapes.bytes_per_token(shapes.SHAPES[args.shape])
                for engine, count in read.items():
                    result[engine] |= {
                        "bytes_per_token": count,
                        "bytes_per_second": count * result[engine]["tokens_per_second"],
                    }
            result["read_bandwidth"] = foretoken.row["read_bandwidth"]
            rows.append(result)
    if foretoken.busy > IDLE:
        print(f"llama.cpp used {foretoken.busy:.0%} of the machine while it waited", file=sys.stderr)
    return rows, llama.about, foretoken.row | {"llama_busy_while_waiting": foretoken.busy}


def ensure_model(args, python):
    """The shape's GGUF file, written if it is not there."""
    path = args.dir / f"{args.shape}-q4_0.gguf"
    if path.exists():
        return path
    needed, free = shapes.file_bytes(shapes.SHAPES[args.shape]) / 1e9, shutil.disk_usage(args.dir).free / 1e9
    if needed > free:
        raise Refused(f"{args.dir} has {free:.1f} GB left, {args.shape} needs {needed:.1f}: name another --dir")
    part = path.with_suffix(".part")
    done = subprocess.run([python, HERE / "llama_worker.py", "write", args.shape, part], capture_output=True, text=True)
    if done.returncode != 0:
        raise Refused(f"the model was not written: {done.stderr.strip().splitlines()[-1]}")
    part.rename(path)
    return path


def commit():
    """The sources' commit, where git tells."""
    with contextlib.suppress(OSError):
        command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def report(args, rows, llama, foretoken):
    """Everything as one object."""
    tell = ("version", "cpu", "model", "format", "isa", "weight_bytes")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "processor": foretoken.get("cpu", "unknown"),
        "processors": os.cpu_count(),
        "load_average": os.getloadavg(),
        "shape": args.shape,
        "foretoken": {key: foretoken.get(key) for key in tell} | {"commit": commit()},
        "llama.cpp": llama | environment.about(args.venv) | {"format": "q4_0, output matrix too"},
        "llama_busy_while_waiting": foretoken["llama_busy_while_waiting"],
        "rows": rows,
    }


def speed(one):
    """Median and range, and GB/s where a token reads a known number of bytes."""
    bytes_read = f", {one['bytes_per_second'] / 1e9:.1f} GB/s" if "bytes_per_second" in one else ""
    return f"{one['tokens_per_second']:.1f} ({one['least']:.1f}-{one['most']:.1f}){bytes_read}"


def markdown(result):
    """What people read."""
    ours, theirs = result["foretoken"], result["llama.cpp"]
    packages = ", ".join(f"{name} {version}" for name, version in theirs["packages"].items())
    load = " ".join(f"{part:.1f}" for part in result["load_average"])
    lines = [
        f"{result['date']}, {result['processor']}, {result['processors']} processors, load average {load}",
        "",
        f"- {result['shape']}; foretoken {ours['version']} ({ours['commit']}): {ours['format']}, {ours['isa']}",
        f"- llama.cpp: {theirs['format']}; {packages}; {theirs['compiler']}; {theirs['system']}",
        "",
        "| test | threads | foretoken tok/s | llama.cpp tok/s | ratio | read GB/s | others | rounds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in result["rows"]:
        both = one["foretoken"], one["llama.cpp"]
        others = max(engine["foreign_cpu"] for engine in both)
        loud = " LOUD" if one["loud"] else ""
        lines.append(
            f"| {one['test']} | {one['threads']} | {speed(both[0])} | {speed(both[1])} "
            f"| {one['ratio']:.2f} ({one['ratio_least']:.2f}-{one['ratio_most']:.2f}) "
            f"| {one['read_bandwidth'] / 1e9:.1f} | {others:.0%}{loud} | {one['rounds']}, {one['dropped']} dropped |"
        )
    lines += ["", "Speeds: median (least-most). Others: most of the machine that others used in a counted round."]
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="tinyllama-1.1b")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512, help="0 for none; at most 512")
    parser.add_argument("-n", "--gen-tokens", type=int, default=64, help="0 for none; at most 512")
    parser.add_argument("-t", "--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("-r", "--rounds", type=int, default=5, help="quiet rounds of each test")
    parser.add_argument("--isa", choices=("native", "avx2"), default="native", help="of both engines")
    parser.add_argument("--max-foreign", type=float, default=5.0, metavar="PERCENT")
    parser.add_argument("--patience", type=float, default=10.0, metavar="SECONDS", help="to wait for a quiet second")
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "foretoken-peers")
    parser.add_argument("--venv", type=pathlib.Path, help="environment that has llama_cpp and gguf; default in --dir")
    parser.add_argument("--foretoken", default=str(ROOT / "target" / "release" / "foretoken"))
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()
    for name in ("prompt_tokens", "gen_tokens"):
        if not 0 <= getattr(args, name) <= 512:
            parser.error(f"--{name.replace('_', '-')} must be 0 to 512")
    if args.rounds < 1 or min(args.threads) < 1 or not (args.prompt_tokens or args.gen_tokens):
        parser.error("there must be a round, a thread and a token at least")
    return args


def main():
    args = arguments()
    if not pathlib.Path(args.foretoken).is_file():
        raise Refused(f"no program at {args.foretoken}: cargo build --release -p server")
    args.dir.mkdir(parents=True, exist_ok=True)
    if args.venv is None:
        args.venv = args.dir / f"venv-{args.isa}"
        python = environment.make(args.venv, args.isa)
    else:
        python = args.venv / "bin" / "python"
        if not python.is_file():
            raise Refused(f"no environment at {args.venv}: leave out --venv to build one")
    model = ensure_model(args, python)
    all_rows, llama, foretoken = [], {}, {}
    for threads in args.threads:
        print(f"{threads} threads", file=sys.stderr)
        rows, llama, foretoken = measure(args, threads, python, model)
        all_rows += rows
    result = report(args, all_rows, llama, foretoken)
    print(json.dumps(result, indent=1) if args.output == "json" else markdown(result))


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        sys.exit(f"error: {refused}")
