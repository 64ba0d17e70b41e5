"""Sizes that only the comparison on GPUs measures, as shapes.py has the others. Not here: anything but numbers."""

SHAPES = {
    "qwen2.5-7b": {
        "width": 3584, "inner": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "vocab": 152064, "rope_base": 1e6,
    },
    # As small as Foretoken's smallest shape: to try the scripts without a GPU.
    "smollm2-135m": {
        "width": 576, "inner": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "vocab": 49152, "rope_base": 1e5,
    },
}  # fmt: skip
