"""PyTorch on a GPU: a decode with int4 weights as gpt-fast does it, and f16 products by cuBLAS.

`gpu_torch.py SHAPE DEVICE` makes random weights of the shape, says what it is, and answers lines of JSON from standard
input, one test each: {"decode": 64} (tokens of one sequence, greedy) or {"product": [n, k], "rows": m} (seconds of one
product with an f16 matrix that no cache holds). As gpt-fast does: all linears in int4 by `_weight_int4pack_mm`, bf16
activations, a cache of fixed length, and a step that torch.compile made one CUDA graph of. With DEVICE cpu the linears
are floats and nothing is compiled: that tries this file, and measures nothing of interest.

Not here: what is measured when (gpu_compare.py). Needs PyTorch 2.5 or newer, and Triton's compiler for the decode.
"""

import json
import sys
import time

import gpu_shapes
import shapes
import torch
import torch.nn.functional as F

# Columns of a group with a scale, and tokens of the cache.
GROUP, CONTEXT = 128, 1024
# Bytes that the copies of a matrix fill together: more than any cache.
FOOTPRINT = 512 << 20


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


class Linear(torch.nn.Module):
    """A matrix of random weights: int4 in groups on a GPU, else floats."""

    def __init__(self, n, k, device):
        super().__init__()
        self.bytes = n * k // 2 + 4 * n * k // GROUP
        self.packed = device == "cuda"
        if not self.packed:
            self.register_buffer("weight", torch.randn(n, k) * k**-0.5)
            return
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack(codes, 8))
        scales = torch.full((k // GROUP, n, 2), k**-0.5 / 4.6, dtype=torch.bfloat16, device=device)
        scales[:, :, 1] = 0
        self.register_buffer("scales", scales)

    def forward(self, x):
        if not self.packed:
            return F.linear(x, self.weight)
        return torch.ops.aten._weight_int4pack_mm(x, self.weight, GROUP, self.scales)


class Layer(torch.nn.Module):
    """A layer of a plain Llama for one token at a time."""

    def __init__(self, shape, device, dtype):
        super().__init__()
        width, inner = shape["width"], shape["inner"]
        self.heads, self.kv_heads = shape["heads"], shape["kv_heads"]
        self.head = width // self.heads
        self.qkv = Linear((self.heads + 2 * self.kv_heads) * self.head, width, device)
        self.out = Linear(width, width, device)
        self.gate_up, self.down = Linear(2 * inner, width, device), Linear(width, inner, device)
        for name in ("keys", "values"):
            cache = torch.zeros(1, self.kv_heads, CONTEXT, self.head, device=device, dtype=dtype)
            self.register_buffer(name, cache)

    def attend(self, x, at, turn, mask):
        q, k, v = self.qkv(x).view(1, -1, self.head).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(q, turn), rotate(k, turn)
        self.keys.index_copy_(2, at, k.transpose(0, 1).unsqueeze(0))
        self.values.index_copy_(2, at, v.transpose(0, 1).unsqueeze(0))
        shared = self.heads // self.kv_heads
        keys, values = (cache.repeat_interleave(shared, dim=1) for cache in (self.keys, self.values))
        mixed = F.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=mask)
        return self.out(mixed.reshape(1, -1))

    def forward(self, x, at, turn, mask):
        x = x + self.attend(F.rms_norm(x, x.shape[-1:]), at, turn, mask)
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:])).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, turn):
    """Turns pairs of columns by a token's angles."""
    cos, sin = turn
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Decoder(torch.nn.Module):
    """All layers, and the greedy choice of the next token."""

    def __init__(self, shape, device):
        super().__init__()
        self.device, self.dtype = device, torch.bfloat16 if device == "cuda" else torch.float32
        width = shape["width"]
        embedding = torch.randn(shape["vocab"], width, device=device, dtype=self.dtype)
        self.register_buffer("embedding", embedding)
        self.layers = torch.nn.ModuleList(Layer(shape, device, self.dtype) for _ in range(shape["layers"]))
        self.head = Linear(shape["vocab"], width, device)
        head = width // shape["heads"]
        speeds = shape["rope_base"] ** (-torch.arange(0, head, 2, device=device) / head)
        self.register_buffer("angles", torch.outer(torch.arange(CONTEXT, device=device), speeds))
        self.register_buffer("places", torch.arange(CONTEXT, device=device))

    def forward(self, token, at):
        x = self.embedding[token]
        angles = self.angles[at]
        turn = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        mask = (self.places <= at).view(1, 1, 1, -1)
        for layer in self.layers:
            x = layer(x, at, turn, mask)
        return self.head(F.rms_norm(x, x.shape[-1:])).argmax(dim=-1)

    def weight_bytes(self):
        """Bytes of weights that one token reads."""
        return sum(module.bytes for module in self.modules() if isinstance(module, Linear))


class Worker:
    """Makes what a test needs when it is first asked for."""

    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        self.model = self.step = None

    def about(self):
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"about": {"torch": torch.__version__, "cuda": torch.version.cuda, "device": name}}

    def run(self, test):
        return self.decode(test["decode"]) if "decode" in test else self.product(*test["product"], test["rows"])

    def prepare(self):
        self.model = Decoder(self.shape, self.device).eval()
        self.step = self.model
        if self.device == "cuda":
            self.step = torch.compile(self.model, mode="reduce-overhead", fullgraph=True)
        self.tokens(8)

    def tokens(self, count):
        token = torch.zeros(1, dtype=torch.long, device=self.device)
        at = torch.zeros(1, dtype=torch.long, device=self.device)
        for _ in range(count):
            token = self.step(token, at).clone()
            at += 1
        synchronize(self.device)

    def decode(self, count):
        if self.step is None:
            self.prepare()
        start = time.perf_counter()
        self.tokens(count)
        return {"seconds": time.perf_counter() - start, "bytes": count * self.model.weight_bytes()}

    def product(self, n, k, rows):
        """Least of some passes over copies of a matrix."""
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        copies = max(1, FOOTPRINT // (2 * n * k)) if self.device == "cuda" else 1
        weights = [torch.randn(n, k, device=self.device, dtype=dtype) for _ in range(copies)]
        x = torch.randn(rows, k, device=self.device, dtype=dtype)
        every = lambda: [F.linear(x, weight) for weight in weights]
        run = recorded(every) if self.device == "cuda" else every
        seconds = []
        for _ in range(8):
            synchronize(self.device)
            start = time.perf_counter()
            run()
            synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        return {"seconds": min(seconds) / copies, "bytes": 2 * n * k}


def recorded(work):
    """The work as one CUDA graph, so that the host's share does not count."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def main():
    worker = Worker((shapes.SHAPES | gpu_shapes.SHAPES)[sys.argv[1]], sys.argv[2])
    print(json.dumps(worker.about()), flush=True)
    for line in sys.stdin:
        with torch.inference_mode():
            print(json.dumps(worker.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
