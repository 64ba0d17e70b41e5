// Linears with weights of two bytes, for more than 16 rows of activations: prompts and large batches.
//
//   formula, layouts, order of sums and error: dense.cuh
//
//   tile   128 rows of weights x 64 rows of activations a block of 4 warps; a warp takes 64 x 32:
//          4 tiles x 4 groups, 64 sums a lane, and 64 totals
//   walk   blocks of columns in ascending order: 8 KiB of weights and 8 of activations each, through a
//          ring of 3 stages that `cp.async` fills ahead. Lanes read 16 bytes of a row, two rows of 64
//          bytes by eight lanes: all banks once. At the end of a range its sums are added to the totals
//   parts  where there are few tiles, gridDim.z blocks share one, some ranges each, and leave the ranges'
//          sums in memory, [tiles, 8, 16, 128 threads] of four. The last to come adds all of them in
//          order: the same sums in the same order
//   bytes  weights once for each 64 rows (from L2 but once: blocks of the same weights are neighbours),
//          activations once for each 128 rows of weights
//   count  of a warp for a block of columns: 64 tensor instructions (128 of k8 before sm_80), 16 loads from
//          shared memory, 8 copies, about 40 others. A block reads 32 KiB from shared memory and writes
//          16: 384 clocks, beside 256 tensor instructions of 2048 products: 412 clocks of an H200 through
//          mma.sync, 512 of an A100, 2048 of an RTX 4090. A second block on the multiprocessor fills
//          what barriers leave. With 64 rows that is 8 KiB of weights in 412 clocks, an H200's 19 bytes
//          a clock; groups of eight rows beyond the last are passed over
// Reference: reference::ops::linear; a test holds it to the bits of linear_dense.cu.

#define THREADS 128
#define WEIGHTS 128
#define TOKENS 64
#define STAGES 3
// Of a warp.
#define TILES 4
#define GROUPS 4

// One block of columns.
struct Stage {
    u16 weights[WEIGHTS * DENSE_COLUMNS];
    u16 tokens[2 * TOKENS * DENSE_COLUMNS];
};

// A warp's sums.
struct Sums {
    float of[TILES][GROUPS][4];
};

// Asks for eight weights from `column` on; zeros behind the row's end. Rows that are no multiples of 16 bytes
// are copied at once, one weight after another.
FT_DEVICE void ask_eight(u16* to, const u16* row, int column, int columns) {
    if (columns % 8 == 0 && column < columns) {
        copy_async16(to, row + column);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < 8; i++) to[i] = column + i < columns ? row[column + i] : (u16)0;
}

// Asks for block `block` of this tile; rows of weights beyond the last are read as the last, activations
// beyond theirs not at all: what they are multiplied to is not looked at.
FT_DEVICE void ask(const Dense& job, Stage* stage, int block, int blocks, int rows) {
#pragma unroll
    for (int i = 0; i < WEIGHTS * 4 / THREADS; i++) {
        int place = threadIdx.x + THREADS * i, column = block * DENSE_COLUMNS + place % 4 * 8;
        int row = min((int)blockIdx.y * WEIGHTS + place / 4, job.n - 1);
        ask_eight(stage->weights + 8 * place, job.weight + (u64)row * job.columns, column, job.columns);
    }
#pragma unroll
    for (int i = 0; i < 2 * TOKENS * 4 / THREADS; i++) {
        int place = threadIdx.x + THREADS * i, part = place / (4 * TOKENS);
        int row = blockIdx.x * TOKENS + place / 4 % TOKENS;
        const u16* from = job.parts + (((u64)row * blocks + block) * 2 + part) * DENSE_COLUMNS + place % 4 * 8;
        if (row < rows) copy_async16(stage->tokens + 8 * place, from);
    }
}

// First row of activations of one of a warp's groups, counted from the tile's: the two warps beside each
// other take turns, so that both have work where rows are few.
FT_DEVICE int group_row(int group) { return 8 * (2 * group + threadIdx.x / 32 % 2); }

// First row of weights of one of a warp's tiles, counted from the block's.
FT_DEVICE int tile_row(int tile) { return 16 * (threadIdx.x / 64 * TILES + tile); }

// Adds a block of columns to a warp's sums; `rows` rows of activations from the tile's first on exist.
template <class Float>
FT_DEVICE void multiply(const Stage& stage, int rows, Sums& sums) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4 words[TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
        int row = tile_row(i / 2) + i % 2 * 8 + g;
        words[i / 2][i % 2] = *(const uint4*)(stage.weights + row * DENSE_COLUMNS + 8 * t);
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        if (group_row(group) >= rows) break;
        const u16* from = stage.tokens + (group_row(group) + g) * DENSE_COLUMNS + 8 * t;
        uint4 hi = *(const uint4*)from, lo = *(const uint4*)(from + TOKENS * DENSE_COLUMNS);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) multiply_block<Float>(sums.of[tile][group], words[tile][0], words[tile][1], hi, lo);
    }
}

// Writes the outputs of a warp's totals that exist.
FT_DEVICE void store(const Dense& job, int rows, const Sums& totals) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TILES * GROUPS * 4; i++) {
        int tile = i / (4 * GROUPS), group = i / 4 % GROUPS;
        int column = blockIdx.y * WEIGHTS + tile_row(tile) + i % 4 / 2 * 8 + g;
        int token = blockIdx.x * TOKENS + group_row(group) + 2 * t + i % 2;
        if (column < job.n && token < rows) put_output(job, token, column, totals.of[tile][group][i % 4]);
    }
}

// Sums of ranges in memory, as one block of threads leaves them.
FT_DEVICE float4* range_sums(float4* sums, int range) {
    int tile = blockIdx.y * gridDim.x + blockIdx.x;
    return sums + ((u64)tile * DENSE_RANGES + range) * (TILES * GROUPS * THREADS) + threadIdx.x;
}

// What happens to the sums of a range at its end: they are added to the totals, or left in memory.
template <bool PARTS>
FT_DEVICE void end_range(Sums& sums, Sums& totals, float4* all, int range) {
#pragma unroll
    for (int i = 0; i < TILES * GROUPS; i++) {
        float* sum = sums.of[i / GROUPS][i % GROUPS];
        float* total = totals.of[i / GROUPS][i % GROUPS];
        if constexpr (PARTS) range_sums(all, range)[i * THREADS] = make_float4(sum[0], sum[1], sum[2], sum[3]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if constexpr (!PARTS) total[j] += sum[j];
            sum[j] = 0.0f;
        }
    }
}

// Adds the sums of all ranges.
FT_DEVICE void add_ranges(Sums& totals, float4* all) {
#pragma unroll 1
    for (int range = 0; range < DENSE_RANGES; range++) {
#pragma unroll
        for (int i = 0; i < TILES * GROUPS; i++) {
            float4 sum = range_sums(all, range)[i * THREADS];
            float* total = totals.of[i / GROUPS][i % GROUPS];
            total[0] += sum.x;
            total[1] += sum.y;
            total[2] += sum.z;
            total[3] += sum.w;
        }
    }
}

template <class Float, bool PARTS>
FT_DEVICE void gemm(const u32* counts, const Dense& job, float4* all, u32* counters) {
    await_launches();
    FT_SHARED(Stage, stages);
    int rows = counts[0], blocks = dense_blocks(job), left = rows - (int)blockIdx.x * TOKENS;
    if (left <= 0) return;
    int each = DENSE_RANGES / gridDim.z, range = blockIdx.z * each, last = range + each;
    int block = range_start(blocks, range), end = range_start(blocks, last), asked = block, stage = 0;
    Sums sums = {}, totals = {};
    for (int i = 0; i < STAGES - 1; i++, asked++) {
        if (asked < end) ask(job, stages + i, asked, blocks, rows);
        copy_async_commit();
    }
    for (; range < last; range++) {
        // A range may be empty.
        for (int range_end = range_start(blocks, range + 1); block < range_end; block++, asked++) {
            copy_async_wait<STAGES - 2>();
            // All have finished with the stage that is asked for now, and see the one that has come.
            __syncthreads();
            if (asked < end) ask(job, stages + (stage + STAGES - 1) % STAGES, asked, blocks, rows);
            copy_async_commit();
            multiply<Float>(stages[stage], left, sums);
            stage = (stage + 1) % STAGES;
        }
        end_range<PARTS>(sums, totals, all, range);
    }
    if constexpr (PARTS) {
        // Stages are free: the barrier within comes before the flag.
        if (!is_last_block(counters + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z, (u32*)stages)) return;
        add_ranges(totals, all);
    }
    store(job, rows, totals);
}

// `counts` is the step's count of these rows; shared memory: STAGES stages.
// grid (rows / 64, n / 128, blocks that share a tile: 1, and with `parts` 2, 4 or 8)
FT_KERNEL(128) gemm_f16(DENSE_PARAMETERS) { gemm<F16, false>(counts, DENSE_JOB, nullptr, nullptr); }
FT_KERNEL(128) gemm_bf16(DENSE_PARAMETERS) { gemm<Bf16, false>(counts, DENSE_JOB, nullptr, nullptr); }
FT_KERNEL(128) gemm_f16_parts(DENSE_PARAMETERS, float4* all, u32* counters) { gemm<F16, true>(counts, DENSE_JOB, all, counters); }
FT_KERNEL(128) gemm_bf16_parts(DENSE_PARAMETERS, float4* all, u32* counters) { gemm<Bf16, true>(counts, DENSE_JOB, all, counters); }
