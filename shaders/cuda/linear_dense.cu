// Linears with weights of two bytes, for up to 16 rows of activations.
//
//   formula, layouts, order of sums and error: dense.cuh
//
//   split  a block of 8 warps takes TILES tiles of 16 rows of weights, a warp one of the 8 ranges of
//          columns. A panel is STEPS blocks of columns, 4 KiB of weights a warp: 8 loads of 16 bytes a
//          lane, the next panel's under way while one is multiplied. The first is asked for before
//          the launch before has ended. The sums of the 8 warps meet in shared memory, [8, rows, weights]
//   bytes  weights once. Activations from the first- and second-level caches: a block reads all of them,
//          2 GROUPS * 8 / (16 TILES) bytes a byte of weights, which is why there are blocks of 4 tiles where
//          n leaves enough of them to go round
//   count  instructions of a warp for 512 bytes of weights, which take 27 clocks at the 19 bytes a
//          multiprocessor that an H200 brings (85 at an RTX 4090's 6), 4 issued a clock:
//            rows  8   1 load of weights, 2 tensor (4 where f16 has k8 instructions), 2 / (2 TILES) loads
//                      of activations, about 4 for addresses: 8
//            rows 16   the same with 4 tensor and twice the loads of activations: 11
//          and rows 1 is rows 8 with seven empty. A tensor instruction takes a multiprocessor 1 to 2 clocks
//          (8 on an RTX 4090: 16 of 85 with 8 rows, 32 with 16): memory stays what is waited for
// Reference: reference::ops::linear; a test holds it to the bits of gemm_dense.cu.

#define WARPS 8
#define TILE_ROWS 16

// Eight weights of a row from `column`, a multiple of eight, on; zeros behind the row's end. ALIGNED: rows
// are multiples of 16 bytes.
template <bool ALIGNED>
FT_DEVICE uint4 load_eight(const u16* row, int column, int columns) {
    if constexpr (ALIGNED) return column < columns ? load_once((const uint4*)(row + column)) : make_uint4(0, 0, 0, 0);
    u64 halves[2] = {0, 0};
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        if (column + i < columns) halves[0] |= (u64)row[column + i] << (16 * i);
        if (column + 4 + i < columns) halves[1] |= (u64)row[column + 4 + i] << (16 * i);
    }
    return make_uint4((u32)halves[0], (u32)(halves[0] >> 32), (u32)halves[1], (u32)(halves[1] >> 32));
}

// The rows of a block: a lane has rows g and g + 8 of each tile, those beyond the last read as the last.
template <int TILES>
struct Rows {
    const u16* first;
    u32 at[TILES][2];
};

template <int TILES>
FT_DEVICE Rows<TILES> rows_of(const Dense& job) {
    int first = blockIdx.x * TILES * TILE_ROWS, g = threadIdx.x % 32 / 4;
    Rows<TILES> rows = {job.weight + (u64)first * job.columns, {}};
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) rows.at[i / 2][i % 2] = (u32)min(8 * i + g, job.n - 1 - first) * job.columns;
    return rows;
}

// A lane's weights of the panel of STEPS blocks from `block` on; blocks from `end` on are left out.
template <bool ALIGNED, int TILES, int STEPS>
FT_DEVICE void load_panel(uint4 words[STEPS][TILES][2], const Rows<TILES>& rows, int columns, int block, int end) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        int column = (block + step) * DENSE_COLUMNS + threadIdx.x % 4 * 8;
        if (block + step >= end) break;
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            words[step][i / 2][i % 2] = load_eight<ALIGNED>(rows.first + rows.at[i / 2][i % 2], column, columns);
        }
    }
}

// Adds a panel to the sums of 8 GROUPS rows of activations.
template <class Float, int TILES, int GROUPS, int STEPS>
FT_DEVICE void multiply_panel(float sums[TILES][GROUPS][4], const uint4 words[STEPS][TILES][2], const u16* parts, int blocks,
                              int rows, int block, int end) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        if (block + step >= end) break;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            uint4 hi = make_uint4(0, 0, 0, 0), lo = hi;
            int row = blockIdx.y * 8 * GROUPS + 8 * group + g;
            if (row < rows) {
                const uint4* from = (const uint4*)parts + ((u64)row * blocks + block + step) * 8 + t;
                hi = from[0];
                lo = from[4];
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                multiply_block<Float>(sums[tile][group], words[step][tile][0], words[step][tile][1], hi, lo);
            }
        }
    }
}

// Sums of this warp's range of columns; all of a block's are left in shared memory, [8 warps, rows, STRIDE].
template <class Float, int TILES, int GROUPS, bool ALIGNED>
FT_DEVICE bool sum_range(const u32* counts, const Dense& job, float* shared, int stride) {
    const int STEPS = 4 / TILES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int blocks = dense_blocks(job), block = range_start(blocks, warp), end = range_start(blocks, warp + 1);
    Rows<TILES> weights = rows_of<TILES>(job);
    uint4 words[STEPS][TILES][2], next[STEPS][TILES][2];
    load_panel<ALIGNED, TILES, STEPS>(words, weights, job.columns, block, end);
    await_launches();
    int rows = counts[0];
    if ((int)blockIdx.y * 8 * GROUPS >= rows) return false;
    float sums[TILES][GROUPS][4] = {};
    for (; block < end; block += STEPS) {
        load_panel<ALIGNED, TILES, STEPS>(next, weights, job.columns, block + STEPS, end);
        multiply_panel<Float, TILES, GROUPS, STEPS>(sums, words, job.parts, blocks, rows, block, end);
#pragma unroll
        for (int i = 0; i < 8; i++) words[i / (2 * TILES)][i / 2 % TILES][i % 2] = next[i / (2 * TILES)][i / 2 % TILES][i % 2];
    }
#pragma unroll
    for (int i = 0; i < TILES * GROUPS * 4; i++) {
        int tile = i / (4 * GROUPS), group = i / 4 % GROUPS;
        int token = 8 * group + 2 * t + i % 2, row = tile * TILE_ROWS + i % 4 / 2 * 8 + g;
        shared[(warp * 8 * GROUPS + token) * stride + row] = sums[tile][group][i % 4];
    }
    return true;
}

template <class Float, int TILES, int GROUPS>
FT_DEVICE void linear(const u32* counts, const Dense& job) {
    // Four more than the rows of weights, so that lanes of a warp write to banks of their own.
    const int COUNT = TILES * TILE_ROWS, TOKENS = 8 * GROUPS, STRIDE = COUNT + 4;
    __shared__ float shared[WARPS * TOKENS * STRIDE];
    bool some = job.columns % 8 == 0 ? sum_range<Float, TILES, GROUPS, true>(counts, job, shared, STRIDE)
                                     : sum_range<Float, TILES, GROUPS, false>(counts, job, shared, STRIDE);
    if (!some) return;
    __syncthreads();
    int rows = counts[0];
    for (int i = threadIdx.x; i < TOKENS * COUNT; i += WARPS * 32) {
        int token = blockIdx.y * TOKENS + i / COUNT, column = blockIdx.x * COUNT + i % COUNT;
        if (token >= rows || column >= job.n) continue;
        float sum = 0.0f;
#pragma unroll
        for (int range = 0; range < DENSE_RANGES; range++) sum += shared[(range * TOKENS + i / COUNT) * STRIDE + i % COUNT];
        put_output(job, token, column, sum);
    }
}

// `counts` is the step's count of these rows; t: tiles, m: rows. grid (n / (16 TILES), rows / (8 GROUPS))
FT_KERNEL(256) linear_f16_t1_m8(DENSE_PARAMETERS) { linear<F16, 1, 1>(counts, DENSE_JOB); }
FT_KERNEL(256) linear_f16_t1_m16(DENSE_PARAMETERS) { linear<F16, 1, 2>(counts, DENSE_JOB); }
FT_KERNEL(256) linear_f16_t2_m8(DENSE_PARAMETERS) { linear<F16, 2, 1>(counts, DENSE_JOB); }
FT_KERNEL(256) linear_f16_t2_m16(DENSE_PARAMETERS) { linear<F16, 2, 2>(counts, DENSE_JOB); }
FT_KERNEL(256) linear_f16_t4_m8(DENSE_PARAMETERS) { linear<F16, 4, 1>(counts, DENSE_JOB); }
FT_KERNEL(256, 1) linear_f16_t4_m16(DENSE_PARAMETERS) { linear<F16, 4, 2>(counts, DENSE_JOB); }
FT_KERNEL(256) linear_bf16_t1_m8(DENSE_PARAMETERS) { linear<Bf16, 1, 1>(counts, DENSE_JOB); }
FT_KERNEL(256) linear_bf16_t1_m16(DENSE_PARAMETERS) { linear<Bf16, 1, 2>(counts, DENSE_JOB); }
FT_KERNEL(256) linear_bf16_t2_m8(DENSE_PARAMETERS) { linear<Bf16, 2, 1>(counts, DENSE_JOB); }
FT_KERNEL(256) linear_bf16_t2_m16(DENSE_PARAMETERS) { linear<Bf16, 2, 2>(counts, DENSE_JOB); }
FT_KERNEL(256) linear_bf16_t4_m8(DENSE_PARAMETERS) { linear<Bf16, 4, 1>(counts, DENSE_JOB); }
FT_KERNEL(256, 1) linear_bf16_t4_m16(DENSE_PARAMETERS) { linear<Bf16, 4, 2>(counts, DENSE_JOB); }
