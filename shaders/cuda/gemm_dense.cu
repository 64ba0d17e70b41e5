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

// Where a thread copies from: eight columns of each of these rows in every block of columns. Rows of
// weights beyond the last are read as the last, activations beyond theirs not at all: what they are
// multiplied to is not looked at.
struct Source {
    const u16* weights;
    u32 at[WEIGHTS * 4 / THREADS];
    const u16* tokens;
    int blocks, rows;
};

// `rows` rows of activations exist from the tile's first on.
FT_DEVICE Source source_of(const Dense& job, int blocks, int rows) {
    int first = blockIdx.y * WEIGHTS, row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    u64 token = (u64)blockIdx.x * TOKENS + row;
    Source from = {job.weight + (u64)first * job.columns, {}, job.parts + token * blocks * 2 * DENSE_COLUMNS + column, blocks, rows};
#pragma unroll
    for (int i = 0; i < WEIGHTS * 4 / THREADS; i++) from.at[i] = (u32)min(row + THREADS / 4 * i, job.n - 1 - first) * job.columns;
    return from;
}

// Asks for the weights of block `block`; zeros behind the rows' ends. Rows that are no multiples of 16 bytes
// are copied at once, one weight after another.
FT_DEVICE void ask_weights(const Source& from, Stage* stage, int block, int columns) {
    int column = block * DENSE_COLUMNS + threadIdx.x % 4 * 8;
    u16* to = stage->weights + 8 * threadIdx.x;
    if (columns % 8 == 0) {
#pragma unroll
        for (int i = 0; i < WEIGHTS * 4 / THREADS; i++) {
            if (column < columns) copy_async16(to + 8 * THREADS * i, from.weights + from.at[i] + column);
            else *(uint4*)(to + 8 * THREADS * i) = make_uint4(0, 0, 0, 0);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < WEIGHTS * 4 / THREADS; i++) {
        const u16* row = from.weights + from.at[i];
#pragma unroll 1
        for (int j = 0; j < 8; j++) to[8 * THREADS * i + j] = column + j < columns ? row[column + j] : (u16)0;
    }
}

// Asks for block `block` of this tile.
FT_DEVICE void ask(const Source& from, Stage* stage, int block, int columns) {
    ask_weights(from, stage, block, columns);
    // Half a tile's rows at once, of one part and then of the other.
#pragma unroll
    for (int i = 0; i < 2 * TOKENS * 4 / THREADS; i++) {
        int part = i / 2, row = i % 2 * (THREADS / 4);
        const u16* token = from.tokens + ((u64)row * from.blocks + block) * 2 * DENSE_COLUMNS + part * DENSE_COLUMNS;
        if ((int)threadIdx.x / 4 + row < from.rows) copy_async16(stage->tokens + 8 * (threadIdx.x + THREADS * i), token);
    }
}

// First row of activations of one of a warp's groups, counted from the tile's: the two warps beside each
// other take turns, so that both have work where rows are few.
FT_DEVICE int group_row(int group) { return 8 * (2 * group + threadIdx.x / 32 % 2); }

// First row of weights of one of a warp's tiles, counted from the block's.
FT_DEVICE int tile_row(int tile) { return 16 * (threadIdx.x / 64 * TILES + tile); }

// Adds a block of columns to the sums of a warp's first LIVE groups.
template <class Float, int LIVE>
FT_DEVICE void multiply(const Stage& stage, Sums& sums) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4 tokens[LIVE][2];
#pragma unroll
    for (int i = 0; i < 2 * LIVE; i++) {
        const u16* from = stage.tokens + (i % 2 * TOKENS + group_row(i / 2) + g) * DENSE_COLUMNS + 8 * t;
        tokens[i / 2][i % 2] = *(const uint4*)from;
    }
    // Tile by tile: what is read by rows is put in an instruction's order once for all groups.
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const u16* from = stage.weights + (tile_row(tile) + g) * DENSE_COLUMNS + 8 * t;
        uint4 low = *(const uint4*)from, high = *(const uint4*)(from + 8 * DENSE_COLUMNS);
#pragma unroll
        for (int group = 0; group < LIVE; group++) {
            multiply_block<Float>(sums.of[tile][group], low, high, tokens[group][0], tokens[group][1]);
        }
    }
}

// The same for those groups that have any of the `rows` rows from the tile's first on.
template <class Float>
FT_DEVICE void multiply_rows(const Stage& stage, int rows, Sums& sums) {
    if (group_row(3) < rows) multiply<Float, 4>(stage, sums);
    else if (group_row(2) < rows) multiply<Float, 3>(stage, sums);
    else if (group_row(1) < rows) multiply<Float, 2>(stage, sums);
    else if (group_row(0) < rows) multiply<Float, 1>(stage, sums);
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
    Source from = source_of(job, blocks, left);
    Sums sums = {}, totals = {};
    for (int i = 0; i < STAGES - 1; i++, asked++) {
        if (asked < end) ask(from, stages + i, asked, job.columns);
        copy_async_commit();
    }
    for (; range < last; range++) {
        // A range may be empty.
        for (int range_end = range_start(blocks, range + 1); block < range_end; block++, asked++) {
            copy_async_wait<STAGES - 2>();
            // All have finished with the stage that is asked for now, and see the one that has come.
            __syncthreads();
            if (asked < end) ask(from, stages + (stage + STAGES - 1) % STAGES, asked, job.columns);
            copy_async_commit();
            multiply_rows<Float>(stages[stage], left, sums);
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
FT_KERNEL(128, 1) gemm_bf16(DENSE_PARAMETERS) { gemm<Bf16, false>(counts, DENSE_JOB, nullptr, nullptr); }
FT_KERNEL(128) gemm_f16_parts(DENSE_PARAMETERS, float4* all, u32* counters) { gemm<F16, true>(counts, DENSE_JOB, all, counters); }
FT_KERNEL(128) gemm_bf16_parts(DENSE_PARAMETERS, float4* all, u32* counters) { gemm<Bf16, true>(counts, DENSE_JOB, all, counters); }
