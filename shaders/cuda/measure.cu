// Reads memory as fast as it comes: what decoding is measured against.
//
//   split  `gridDim.x` blocks of 256 threads, each thread every (256 gridDim.x)th 16 bytes, four at a time
//   bytes  16 `vectors`, a multiple of 4 * 256 * gridDim.x of them, each once
// The sum is stored where it is one that no memory gives, so that no load is left out.

FT_KERNEL(256) read_memory(const uint4* from, u32* out, int vectors) {
    await_launches();
    u32 sum = 0;
    int step = 256 * gridDim.x;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < vectors; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = load_once(from + i + j * step);
#pragma unroll
        for (int j = 0; j < 4; j++) sum |= v[j].x | v[j].y | v[j].z | v[j].w;
    }
    // The memory holds zeros.
    if (sum != 0) out[0] = sum;
}
