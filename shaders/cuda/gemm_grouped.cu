// Linears with 4- and 8-bit weights and int8 activations, for many rows: prompts and large batches.
//
//   the formula, the layouts and the bits of linear_grouped.cu
//
//   tile   256 rows of weights x 64 rows of activations a block of 8 warps; a warp takes 2 tiles of 16
//          weights x all 64 activations: 64 f32 sums a lane
//   walk   blocks of columns in ascending order; a warp's weights come straight from memory, the next
//          block's while one is multiplied. Activations pass through shared memory, which all warps
//          read: a ring of 4 blocks that `cp.async` fills ahead
//   each   block of columns is multiplied exactly (int8 tensor instructions), then scaled and added to
//          the f32 sums by one fma: a thread keeps the order that linear_grouped.cu keeps
//   bytes  weights once for each 64 rows, activations once for each 256 weights
//
// Reference: quant::reference::matmul; a test holds it to the bits of linear_grouped.cu.

#define TILES 2
#define TOKENS 64
#define STAGES 4

// Activations of one block of columns.
template <int HALVES>
struct Stage {
    u32 quads[TOKENS * 8 * HALVES];
    BlockScale scales[TOKENS];
};

// Asks for block `block` of the tokens from `row` on; rows beyond the last are read as the last.
template <int HALVES>
FT_DEVICE void ask(const Grouped& job, Stage<HALVES>* stage, int block, int row, int rows) {
    // 16 bytes a thread: TOKENS * 2 HALVES of them.
    int token = threadIdx.x / (2 * HALVES), part = threadIdx.x % (2 * HALVES);
    if (token < TOKENS) {
        int from = min(row + token, rows - 1);
        u64 at = ((u64)from * job.blocks + block) * (8 * HALVES) + 4 * part;
        copy_async16(stage->quads + token * 8 * HALVES + 4 * part, job.quads + at);
    }
    if (threadIdx.x < TOKENS) {
        int from = min(row + (int)threadIdx.x, rows - 1);
        copy_async8(stage->scales + threadIdx.x, job.a_scales + (u64)from * job.blocks + block);
    }
}

// Scales and zero points of rows g and g + 8 of a tile and a group.
struct Rows {
    float scale[2];
    int zero[2];
};

FT_DEVICE Rows rows_of(const Grouped& job, int tile, int group) {
    u64 at = ((u64)tile * (job.blocks / job.per_group) + group) * TILE + threadIdx.x % 32 / 4;
    Rows rows = {{job.scales[at], job.scales[at + 8]}, {job.zeros[at], job.zeros[at + 8]}};
    return rows;
}

// Adds a block's exact sums, scaled, to the sums of rows g, g + 8 and tokens 2 t, 2 t + 1.
FT_DEVICE void add_blocks(float* sums, const int* c, const Rows& rows, const BlockScale* tokens) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float* sum = sums + 2 * r + i;
            *sum = add_block(*sum, rows.scale[r], rows.zero[r], tokens[i], c[2 * r + i]);
        }
    }
}

// A warp's two tiles times all tokens, over one block of columns.
template <int BITS, int HALVES>
FT_DEVICE void multiply(const u32 words[TILES][BITS / 2 * HALVES], const Rows* rows, const Stage<HALVES>& stage,
                        float sums[TILES][TOKENS / 8][4]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 a[TILES][HALVES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < HALVES; half++) open_codes<BITS>(a[tile][half], words[tile], half);
    }
#pragma unroll
    for (int part = 0; part < TOKENS / 8; part++) {
        u32 b[2 * HALVES];
        const u32* from = stage.quads + (8 * part + g) * 8 * HALVES + t * 2 * HALVES;
#pragma unroll
        for (int i = 0; i < HALVES; i++) {
            uint2 v = *((const uint2*)from + i);
            b[2 * i] = v.x;
            b[2 * i + 1] = v.y;
        }
        const BlockScale* tokens = stage.scales + 8 * part + 2 * t;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            int c[4] = {0, 0, 0, 0};
#pragma unroll
            for (int half = 0; half < HALVES; half++) mma_u8i8(c, a[tile][half], b + 2 * half);
            add_blocks(sums[tile][part], c, rows[tile], tokens);
        }
    }
}

// Writes a warp's sums; rows of weights beyond n and tokens beyond the last have none.
FT_DEVICE void store(const Grouped& job, int first_tile, int row, int rows, float sums[TILES][TOKENS / 8][4]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4 * TOKENS / 8; i++) {
            int column = (first_tile + tile) * TILE + g + i % 4 / 2 * 8, token = row + i / 4 * 8 + 2 * t + i % 2;
            if (column >= job.n || token >= rows) continue;
            float y = sums[tile][i / 4][i % 4];
            if (job.bias) y += job.bias[column];
            job.out[(u64)token * job.out_width + job.out_start + column] = y;
        }
    }
}

template <int BITS, int HALVES>
FT_DEVICE void gemm(const u32* counts, const Grouped& job) {
    await_launches();
    const int WORDS = BITS / 2 * HALVES;
    FT_SHARED(Stage<HALVES>, stages);
    int rows = counts[0], row = blockIdx.y * TOKENS;
    if (row >= rows) return;
    int tiles = (job.n + TILE - 1) / TILE, lane = threadIdx.x % 32;
    int first_tile = (blockIdx.x * 8 + threadIdx.x / 32) * TILES;
    // Warps beyond the last tile do the last one again and store nothing.
    int tile_of[TILES];
    const u32* codes[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        tile_of[tile] = min(first_tile + tile, tiles - 1);
        codes[tile] = job.codes + ((u64)tile_of[tile] * job.blocks * 32 + lane) * WORDS;
    }
    float sums[TILES][TOKENS / 8][4];
#pragma unroll
    for (int i = 0; i < TILES * TOKENS / 2; i++) sums[i / (TOKENS / 2)][i / 4 % (TOKENS / 8)][i % 4] = 0.0f;
    for (int block = 0; block < STAGES - 1; block++) {
        if (block < job.blocks) ask(job, stages + block, block, row, rows);
        copy_async_commit();
    }
    u32 words[TILES][WORDS], next[TILES][WORDS];
    Rows scales[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) load_codes<WORDS>(words[tile], codes[tile]);
    int group = 0, left = 0;
    for (int block = 0; block < job.blocks; block++) {
        copy_async_wait<STAGES - 2>();
        // All have finished with the stage that is asked for now, and see the one that has come.
        __syncthreads();
        int ahead = block + STAGES - 1;
        if (ahead < job.blocks) ask(job, stages + ahead % STAGES, ahead, row, rows);
        copy_async_commit();
        int after = min(block + 1, job.blocks - 1);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) load_codes<WORDS>(next[tile], codes[tile] + (u64)after * 32 * WORDS);
        if (left == 0) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) scales[tile] = rows_of(job, tile_of[tile], group);
            group++;
            left = job.per_group;
        }
        left--;
        multiply<BITS, HALVES>(words, scales, stages[block % STAGES], sums);
#pragma unroll
        for (int i = 0; i < TILES * WORDS; i++) words[i / WORDS][i % WORDS] = next[i / WORDS][i % WORDS];
    }
    store(job, first_tile, row, rows, sums);
}

// `counts` is the step's count of these rows; shared memory: STAGES stages. grid (n / 256, rows / 64)
FT_KERNEL(256) gemm_w4_s64(GROUPED_PARAMETERS) { gemm<4, 2>(counts, GROUPED_JOB); }
FT_KERNEL(256) gemm_w4_s32(GROUPED_PARAMETERS) { gemm<4, 1>(counts, GROUPED_JOB); }
FT_KERNEL(256) gemm_w8_s64(GROUPED_PARAMETERS) { gemm<8, 2>(counts, GROUPED_JOB); }
FT_KERNEL(256) gemm_w8_s32(GROUPED_PARAMETERS) { gemm<8, 1>(counts, GROUPED_JOB); }
