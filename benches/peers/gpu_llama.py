"""llama.cpp on a GPU: builds it with CUDA, and answers tests as llama_worker.py does, every layer on the device.

`gpu_llama.py make FOLDER [WHEELS]` builds llama-cpp-python from source by nvcc in an environment of its own, from the
packages in WHEELS where that folder is there, else from the package index. In that environment run `gpu_llama.py write
SHAPE FILE` and `gpu_llama.py serve FILE`. Not here: what a model's file has, how a test is timed (llama_worker.py), what
is measured when (gpu_compare.py).
"""

import json
import os
import pathlib
import shutil
import sys

import environment
from environment import Refused

# Kernels for the device at hand alone: for all of them nvcc takes half an hour.
CMAKE = "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
PACKAGES = ("llama-cpp-python", "gguf")


def make(folder, wheels):
    """Builds the environment unless it is there; returns its Python."""
    python, built = folder / "bin" / "python", folder / "built"
    if built.exists():
        return python
    if not shutil.which("nvcc"):
        raise Refused("llama.cpp needs nvcc, which is not here")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    environment.run([sys.executable, "-m", "venv", str(folder)], log, "this Python cannot make an environment")
    index = ["--no-index", "--find-links", str(wheels)] if wheels and wheels.is_dir() else []
    pip = [str(python), "-m", "pip", "install", "--no-binary", PACKAGES[0], *index, *PACKAGES]
    settings = {"CMAKE_ARGS": CMAKE, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    environment.run(pip, log, "pip cannot build llama-cpp-python with CUDA", env=os.environ | settings)
    built.touch()
    return python


def write(name, path):
    """Writes a shape of either list as GGUF."""
    import gpu_shapes
    import llama_worker
    import shapes

    llama_worker.write((shapes.SHAPES | gpu_shapes.SHAPES)[name], path)


def engine(path):
    """llama_worker's engine, with every layer on the device."""
    import llama_worker as worker

    class OnDevice(worker.Engine):
        def __init__(self):
            import llama_cpp as lib

            self.lib = lib
            lib.llama_backend_init()
            if not lib.llama_supports_gpu_offload():
                sys.exit("this llama.cpp was built without CUDA")
            params = lib.llama_model_default_params()
            params.n_gpu_layers = 999
            self.model = lib.llama_model_load_from_file(path.encode(), params)
            if not self.model:
                sys.exit(f"llama.cpp cannot load {path}")
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = worker.CONTEXT, worker.BATCH, worker.BATCH
            params.n_threads = params.n_threads_batch = 1
            self.context = lib.llama_init_from_model(self.model, params)
            if not self.context:
                sys.exit(f"llama.cpp cannot make a context of {worker.CONTEXT} tokens")
            self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
            self.rng = worker.np.random.default_rng(worker.SEED)

    return OnDevice()


def serve(path):
    """Answers tests until standard input ends."""
    # The engine prints to standard output too: that goes where its errors go, answers keep the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llama = engine(path)
    print(json.dumps({"about": llama.about()["packages"]}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(llama.run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1] == "write":
            write(sys.argv[2], sys.argv[3])
        elif sys.argv[1] == "make":
            print(make(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]) if sys.argv[3:] else None))
        else:
            serve(sys.argv[2])
    except Refused as refused:
        sys.exit(f"error: {refused}")
