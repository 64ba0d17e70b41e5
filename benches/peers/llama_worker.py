"""What runs inside the throw-away environment: writes a model of random weights, and times llama.cpp on it.

`llama_worker.py write SHAPE FILE` writes a shape as GGUF: every matrix, the output's too, in Q4_0, norms in f32, no
vocabulary. `llama_worker.py serve FILE THREADS` loads it, says what it is, and answers lines of JSON from standard
input, one test each: {"prefill": 512} or {"decode": 64}. It computes nothing while it waits. Not here: what is measured
when (compare.py).
"""

import json
import os
import sys
import time
from importlib.metadata import version

import gguf
import numpy as np
import shapes

Q4_0 = gguf.GGMLQuantizationType.Q4_0
SEED = 7
# Tokens of a sequence, and of one batch.
CONTEXT, BATCH = 1024, 512


def q4_0(rng, n, k):
    """Random blocks whose products are about as large as their inputs."""
    blocks = rng.integers(0, 256, (n, k // shapes.BLOCK, shapes.BLOCK_BYTES), dtype=np.uint8)
    # Codes -8..7 deviate by 4.6 from their mean; a row of k of them shall deviate by 1.
    blocks[:, :, :2] = np.array([k**-0.5 / 4.6], dtype="<f2").view(np.uint8)
    return blocks.reshape(n, -1)


def write_head(writer, shape):
    """What kind of model it is."""
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape["width"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["inner"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_rope_dimension_count(shape["width"] // shape["heads"])
    writer.add_rope_freq_base(shape["rope_base"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)


def write(shape, path):
    """Writes the model tensor by tensor, so that memory holds one at a time."""
    writer = gguf.GGUFWriter(path, "llama")
    write_head(writer, shape)
    sizes = dict([shapes.embedding(shape), *shapes.matrices(shape)])
    norms = list(shapes.norms(shape))
    for name, (n, k) in sizes.items():
        row = shapes.row_bytes(k)
        writer.add_tensor_info(name, (n, row), np.dtype(np.uint8), n * row, raw_dtype=Q4_0)
    ones = np.ones(shape["width"], dtype=np.float32)
    for name in norms:
        writer.add_tensor_info(name, ones.shape, ones.dtype, ones.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(SEED)
    for n, k in sizes.values():
        writer.write_tensor_data(q4_0(rng, n, k))
    for _ in norms:
        writer.write_tensor_data(ones)
    writer.close()


class Engine:
    """llama.cpp with one model and one sequence that starts anew at each test."""

    def __init__(self, path, threads):
        import llama_cpp as lib

        self.lib = lib
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"llama.cpp cannot make a context of {CONTEXT} tokens")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.rng = np.random.default_rng(SEED)

    def about(self):
        """Versions, and the instruction sets of the build."""
        info = self.lib.llama_print_system_info().decode().strip(" |\n")
        packages = {name: version(name) for name in ("llama-cpp-python", "gguf")}
        return {"packages": packages, "system": info}

    def clear(self):
        """Forgets the sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def compute(self, count):
        """Passes `count` random tokens through the model at the sequence's end; the last one gives logits."""
        tokens = (self.lib.llama_token * count)(*self.rng.integers(0, self.vocab, count).tolist())
        code = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, count))
        if code != 0:
            sys.exit(f"llama_decode answers {code} to {count} tokens")
        self.lib.llama_synchronize(self.context)

    def run(self, test):
        """Times one test after a few tokens to warm up: seconds."""
        steps = [test["prefill"]] if "prefill" in test else [1] * test["decode"]
        self.clear()
        for _ in range(2):
            self.compute(min(steps[0], 32))
        self.clear()
        start = time.perf_counter()
        for count in steps:
            self.compute(count)
        return {"seconds": time.perf_counter() - start}


def serve(path, threads):
    """Answers tests until standard input ends."""
    # The engine prints to standard output too: that goes where its errors go, answers keep the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = Engine(path, threads)
    print(json.dumps(engine.about()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(shapes.SHAPES[sys.argv[2]], sys.argv[3])
    else:
        serve(sys.argv[2], int(sys.argv[3]))
