// What a device can do at most, to measure kernels against: reading memory, and int8 arithmetic.
//
// read_memory, as fast as it comes
//   split  `gridDim.x` blocks of 256 threads, each thread every (256 gridDim.x)th 16 bytes, four at a time
//   bytes  16 `vectors`, a multiple of 4 * 256 * gridDim.x of them, each once
// The sum is stored where it is one that no memory gives, so that no load is left out.
//
// multiply_tiles: tensor instructions alone
//   split   `gridDim.x` blocks of 8 warps, each with 8 sums of its own, `rounds` times
//   work    8 warps * 8 * 2 * 16 * 8 * 32 operations a block and round

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

FT_KERNEL(256) multiply_tiles(int* out, int rounds) {
    await_launches();
    u32 a[4], b[2] = {threadIdx.x, threadIdx.x * 3u};
    int sums[8][4] = {};
    for (int i = 0; i < 4; i++) a[i] = threadIdx.x * (i + 1);
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < 8; i++) mma_u8i8(sums[i], a, b);
        // Always other operands, so that nothing is known before.
        a[0] ^= round;
    }
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) sum += sums[i / 4][i % 4];
    out[blockIdx.x * 256 + threadIdx.x] = sum;
}
