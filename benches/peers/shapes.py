"""Sizes of published models by the names that `foretoken bench --shape` knows, and what they weigh in Q4_0.

A shape here is plain Llama: no bias, no extra norm; where the model ties its head to the embedding the head is written
once more, since a token reads as much either way. Not here: how a file is written (llama_worker.py).
"""

SHAPES = {
    "tinyllama-1.1b": {
        "width": 2048, "inner": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocab": 32000, "rope_base": 1e4,
    },
    "llama-3.2-1b": {
        "width": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "vocab": 128256, "rope_base": 5e5,
    },
    "llama-3.1-8b": {
        "width": 4096, "inner": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256, "rope_base": 5e5,
    },
}  # fmt: skip

# Q4_0: a block of 32 weights is an f16 scale and 16 bytes of codes.
BLOCK, BLOCK_BYTES = 32, 18


def matrices(shape):
    """Names and sizes [n, k] of the matrices that every token passes through."""
    width, inner = shape["width"], shape["inner"]
    kv_width = width // shape["heads"] * shape["kv_heads"]
    for i in range(shape["layers"]):
        yield f"blk.{i}.attn_q.weight", (width, width)
        yield f"blk.{i}.attn_k.weight", (kv_width, width)
        yield f"blk.{i}.attn_v.weight", (kv_width, width)
        yield f"blk.{i}.attn_output.weight", (width, width)
        yield f"blk.{i}.ffn_gate.weight", (inner, width)
        yield f"blk.{i}.ffn_up.weight", (inner, width)
        yield f"blk.{i}.ffn_down.weight", (width, inner)
    yield "output.weight", (shape["vocab"], width)


def embedding(shape):
    """Name and size of the matrix of which a token reads one row."""
    return "token_embd.weight", (shape["vocab"], shape["width"])


def norms(shape):
    """Names of the norms' weights, f32 of the model's width."""
    for i in range(shape["layers"]):
        yield f"blk.{i}.attn_norm.weight"
        yield f"blk.{i}.ffn_norm.weight"
    yield "output_norm.weight"


def row_bytes(k):
    """Bytes of a row of `k` weights in Q4_0."""
    return k // BLOCK * BLOCK_BYTES


def bytes_per_token(shape):
    """Bytes of weights that one token reads."""
    weights = sum(n * row_bytes(k) for _, (n, k) in matrices(shape))
    return weights + row_bytes(shape["width"]) + 4 * shape["width"] * len(list(norms(shape)))


def file_bytes(shape):
    """Bytes of the whole model file, but for its head."""
    return bytes_per_token(shape) + shape["vocab"] * row_bytes(shape["width"])
