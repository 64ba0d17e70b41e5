"""The throw-away environment: llama-cpp-python built from source for this processor, and gguf.

Compilers differ in what they build: GCC before 13.2 miscompiles llama.cpp's set-up of AMX tiles, and plain clang 14
leaves AMX out, so that where the processor has AMX clang builds with AMX named; elsewhere the plain build is right.
Not here: measuring (compare.py).
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

# What each level must have in the build's own words, where the processor has the flag.
KEYS = {"avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI"}
AMX = {"amx_int8": "AMX_INT8"}
AMX_DEFINES = "-D__AMX_INT8__=1 -D__AMX_TILE__=1 -D__AMX_BF16__=1"


class Refused(Exception):
    """Why there is nothing to measure, in a sentence."""


def cpu_flags():
    """What the processor has, by Linux's names."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError as error:
        raise Refused(f"cannot tell what the processor has ({error}): this script needs Linux") from error
    lines = (line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags"))
    return set(next(lines, []))


def build_settings(isa):
    """Environment variables that make the right build, and the compilers it needs."""
    cmake = "-DCMAKE_BUILD_TYPE=Release"
    if isa == "avx2":
        # llama.cpp's choices without the native one: AVX2, FMA, F16C, BMI2.
        return {"CMAKE_ARGS": f"{cmake} -DGGML_NATIVE=OFF"}, ("cc", "c++")
    settings = {"CMAKE_ARGS": f"{cmake} -DGGML_NATIVE=ON"}
    if "amx_int8" not in cpu_flags():
        return settings, ("cc", "c++")
    settings |= {"CC": "clang", "CXX": "clang++", "CFLAGS": AMX_DEFINES, "CXXFLAGS": AMX_DEFINES}
    return settings, ("clang", "clang++")


def run(command, log, hint, **more):
    """Runs a step of the build; its output goes to the log."""
    with open(log, "a") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **more)
    if done.returncode != 0:
        raise Refused(f"{hint}: see {log}")


def make(folder, isa):
    """Makes the environment in `folder` unless it is there; returns its Python."""
    python, built = folder / "bin" / "python", folder / "built.json"
    if built.exists():
        return python
    settings, compilers = build_settings(isa)
    missing = [name for name in compilers if not shutil.which(name)]
    if missing:
        raise Refused(f"llama.cpp cannot be built without {' and '.join(missing)}: install the compiler")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    print(f"building llama.cpp in {folder}: some minutes; log in {log}", file=sys.stderr)
    venv = [sys.executable, "-m", "venv", str(folder)]
    run(venv, log, "this Python cannot make an environment (Debian: install python3-venv)")
    # Without pip's cache, which would give a build with other settings again.
    pip = [str(python), "-m", "pip", "install", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
    pip += ["llama-cpp-python", "gguf"]
    run(pip, log, "pip cannot build llama-cpp-python", env=os.environ | settings)
    version = subprocess.run([compilers[1], "--version"], capture_output=True, text=True)
    first = next(iter(version.stdout.splitlines()), compilers[1])
    built.write_text(json.dumps({"compiler": first, "settings": settings}))
    return python


def about(folder):
    """Compiler and settings of the build, if it was made here."""
    try:
        return json.loads((folder / "built.json").read_text())
    except OSError:
        return {"compiler": "unknown", "settings": {}}


def check(system, isa, folder):
    """Refuses a build that does not use what the processor has; `system` is the build's own list."""
    flags, keys = cpu_flags(), KEYS | AMX
    if isa == "avx2":
        keys = {flag: key for flag, key in KEYS.items() if not flag.startswith("avx512")}
        extra = [key for key in ("AVX512", "AMX_INT8") if f"{key} = 1" in system]
        if extra:
            raise Refused(f"the build in {folder} is not plain AVX2 but has {', '.join(extra)}: name another folder")
    missing = [key for flag, key in keys.items() if flag in flags and f"{key} = 1" not in system]
    if missing:
        raise Refused(
            f"the build in {folder} does not use {', '.join(missing)}, which this processor has: remove the folder"
        )
