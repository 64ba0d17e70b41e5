// Linears with 4- and 8-bit weights and int8 activations, for many rows: prompts and large batches.
//
//   the formula, the layouts and the bits of linear_grouped.cu
//
//   tile   256 rows of weights x 64 rows of activations a block of 8 warps; a warp takes 2 tiles of 16
//          weights x all 64 activations: 64 f32 sums a lane
//   walk   blocks of columns in ascending order; a warp's weights come straight from memory, the next
//          block's while one is multiplied. Activations, which all warps read, and scales pass through
//          shared memory: a ring of 4 blocks that `cp.async` fills ahead
//   each   block of columns is multiplied exactly (int8 tensor instructions), then scaled and added to
//          the f32 sums by one fma: a thread keeps the order that linear_grouped.cu keeps
//   bytes  weights once for each 64 rows, activations once for each 256 weights
//   counts for 8192 bytes of 4-bit codes (256 weights, 64 columns) and 64 rows: 8 warps issue about 365
//          instructions each (26 open codes, 8 tiles of tokens at 3 loads and twice two tensor instructions
//          and four sums of four instructions), 730 clocks: 11 bytes a clock. In blocks of 128 columns they issue
//          about 430 for twice the bytes (52 open codes, 4 loads and twice four tensor instructions a tile of
//          tokens, and as many sums), 860 clocks: 19 bytes a clock
//
// Reference: quant::reference::matmul; a test holds it to the bits of linear_grouped.cu.

#define TILES 2
#define TOKENS 64
#define STAGES 4

// What a block of threads reads of one block of columns: activations of all its tokens, scales and zero
// points of all its rows of weights.
template <int HALVES>
struct Stage {
    u32 quads[TOKENS * 8 * HALVES];
    BlockScale tokens[TOKENS];
    float scales[8 * TILES][TILE];
    u8 zeros[8 * TILES][TILE];
};

// The piece of a token's quads that lies first in a stage. Rows of two pieces take turns: else two tokens that
// lanes read at once would have the same banks.
template <int HALVES>
FT_DEVICE int first_piece(int token) { return pieces<HALVES>() == 2 ? token % 2 : 0; }

// The block of columns to ask for next, and its group.
struct Next {
    int block, group, in_group;
};

// Asks for the next block of columns for the tokens from `row` on, if there is one; tokens and tiles beyond
// the last are read as the last.
template <int HALVES>
FT_DEVICE void ask(const Grouped& job, Stage<HALVES>* stages, Next& next, int row, int rows) {
    if (next.block < job.blocks) {
        Stage<HALVES>* stage = stages + next.block % STAGES;
        // 16 bytes a thread, a second time where a block is wide: TOKENS * 2 HALVES of them.
#pragma unroll
        for (int turn = 0; turn < (HALVES + 1) / 2; turn++) {
            int token = threadIdx.x / (2 * HALVES) + turn * TOKENS / 2, part = threadIdx.x % (2 * HALVES);
            if (token < TOKENS) {
                u64 at = ((u64)min(row + token, rows - 1) * job.blocks + next.block) * (8 * HALVES) + 4 * part;
                u32* to = stage->quads + token * 8 * HALVES + 4 * (part ^ 4 * first_piece<HALVES>(token));
                copy_async16(to, job.quads + at);
            }
        }
        if (threadIdx.x < TOKENS) {
            u64 from = min(row + (int)threadIdx.x, rows - 1);
            copy_async8(stage->tokens + threadIdx.x, job.a_scales + from * job.blocks + next.block);
        }
        int tile = threadIdx.x / 4, part_of_scales = threadIdx.x % 4;
        if (tile < 8 * TILES) {
            int from = min((int)blockIdx.x * 8 * TILES + tile, (job.n + TILE - 1) / TILE - 1);
            u64 at = ((u64)from * (job.blocks / job.per_group) + next.group) * TILE;
            ask_scale(job, stage->scales[tile], at, part_of_scales);
            if (part_of_scales == 0 && job.zeros) copy_async16(stage->zeros[tile], job.zeros + at);
        }
    }
    copy_async_commit();
    next.block++;
    if (++next.in_group == job.per_group) {
        next.in_group = 0;
        next.group++;
    }
}

// Notes the zero point of all stages where there is one: four u8 a thread.
template <int HALVES>
FT_DEVICE void fill_zeros(const Grouped& job, Stage<HALVES>* stages) {
    const int WORDS = 8 * TILES * TILE / 4;
    static_assert(STAGES * WORDS == 256, "a word a thread");
    if (!job.zeros) ((u32*)stages[threadIdx.x / WORDS].zeros)[threadIdx.x % WORDS] = (u32)job.zero * 0x01010101u;
}

// Scales and zero points of rows g and g + 8 of a tile.
struct Rows {
    float scale[2];
    int zero[2];
};

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
FT_DEVICE void multiply(const u32 words[TILES][BITS / 2 * HALVES], const Stage<HALVES>& stage, int scale_bytes,
                        float sums[TILES][TOKENS / 8][4]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = threadIdx.x / 32 * TILES;
    u32 a[TILES][HALVES][4];
    Rows rows[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < HALVES; half++) open_codes<BITS>(a[tile][half], words[tile], half);
        const u8* scales = (const u8*)stage.scales[first + tile] + g * scale_bytes;
        const u8* zeros = stage.zeros[first + tile];
        rows[tile] = Rows{{scale_at(scales, scale_bytes), scale_at(scales + 8 * scale_bytes, scale_bytes)}, {zeros[g], zeros[g + 8]}};
    }
#pragma unroll
    for (int part = 0; part < TOKENS / 8; part++) {
        u32 b[2 * HALVES];
        load_quads<HALVES>(b, stage.quads + (8 * part + g) * 8 * HALVES, first_piece<HALVES>(g));
        const BlockScale* tokens = stage.tokens + 8 * part + 2 * t;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            int c[4] = {DOT_START, DOT_START, DOT_START, DOT_START};
#pragma unroll
            for (int half = 0; half < HALVES; half++) mma_u8i8(c, a[tile][half], b + 2 * half);
            add_blocks(sums[tile][part], c, rows[tile], tokens);
        }
    }
}

// Writes a tile's sums, activated where they are paired: gates are the rows g, what belongs to them the
// rows g + 8.
FT_DEVICE void store(const Grouped& job, int tile, int row, int rows, const float sums[TOKENS / 8][4]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int outputs[2] = {output_of(job, tile, g), output_of(job, tile, g + 8)};
    float bias[2];
#pragma unroll
    for (int r = 0; r < 2; r++) bias[r] = job.bias && outputs[r] >= 0 ? job.bias[outputs[r]] : 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * TOKENS / 8; i++) {
        int token = row + i / 2 * 8 + 2 * t + i % 2;
        if (token >= rows) continue;
        float* out = job.out + (u64)token * job.out_width + job.out_start;
        float y[2] = {sums[i / 2][i % 2], sums[i / 2][2 + i % 2]};
#pragma unroll
        for (int r = 0; r < 2; r++) y[r] = job.bias ? y[r] + bias[r] : y[r];
        if (job.paired) {
            if (outputs[0] >= 0) out[outputs[0]] = silu(y[0]) * y[1];
        } else {
            if (outputs[0] >= 0) out[outputs[0]] = y[0];
            if (outputs[1] >= 0) out[outputs[1]] = y[1];
        }
    }
}

// Quantizes the paired outputs of this block of threads: whole blocks of columns.
FT_DEVICE void quantize_outputs(const Grouped& job, int row, int rows) {
    __syncthreads();
    int count = 8 * TILES * TILE / 2 / job.next.block, first = blockIdx.x * count;
    for (int block = first; block < min(first + count, job.next.blocks); block++) {
        quantize_rows(job.next, job.out, job.out_width, block, row, min(row + TOKENS, rows));
    }
}

template <int BITS, int HALVES>
FT_DEVICE void gemm(const u32* counts, const Grouped& job) {
    const int WORDS = BITS / 2 * HALVES;
    FT_SHARED(Stage<HALVES>, stages);
    int tiles = (job.n + TILE - 1) / TILE;
    int first_tile = (blockIdx.x * 8 + threadIdx.x / 32) * TILES;
    // Warps beyond the last tile do the last one again and store nothing.
    const u32* codes[TILES];
    u32 words[TILES][WORDS], next_words[TILES][WORDS];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        codes[tile] = job.codes + (u64)min(first_tile + tile, tiles - 1) * job.blocks * 32 * WORDS;
        load_codes<BITS, HALVES>(words[tile], codes[tile]);
    }
    await_launches();
    int rows = counts[0], row = blockIdx.y * TOKENS;
    if (row >= rows) return;
    float sums[TILES][TOKENS / 8][4];
#pragma unroll
    for (int i = 0; i < TILES * TOKENS / 2; i++) sums[i / (TOKENS / 2)][i / 4 % (TOKENS / 8)][i % 4] = 0.0f;
    fill_zeros(job, stages);
    Next next = {0, 0, 0};
    for (int i = 0; i < STAGES - 1; i++) ask(job, stages, next, row, rows);
    for (int block = 0; block < job.blocks; block++) {
        copy_async_wait<STAGES - 2>();
        // All have finished with the stage that is asked for now, and see the one that has come.
        __syncthreads();
        ask(job, stages, next, row, rows);
        int after = min(block + 1, job.blocks - 1);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) load_codes<BITS, HALVES>(next_words[tile], codes[tile] + (u64)after * 32 * WORDS);
        multiply<BITS, HALVES>(words, stages[block % STAGES], job.scale_bytes, sums);
#pragma unroll
        for (int i = 0; i < TILES * WORDS; i++) words[i / WORDS][i % WORDS] = next_words[i / WORDS][i % WORDS];
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        if (first_tile + tile < tiles) store(job, first_tile + tile, row, rows, sums[tile]);
    }
    if (job.next.quads) quantize_outputs(job, row, rows);
}

// `counts` is the step's count of these rows; shared memory: STAGES stages. grid (n / 256, rows / 64)
FT_KERNEL(256) gemm_w4_s128(GROUPED_PARAMETERS) { gemm<4, 4>(counts, GROUPED_JOB); }
FT_KERNEL(256) gemm_w4_s64(GROUPED_PARAMETERS) { gemm<4, 2>(counts, GROUPED_JOB); }
FT_KERNEL(256) gemm_w4_s32(GROUPED_PARAMETERS) { gemm<4, 1>(counts, GROUPED_JOB); }
FT_KERNEL(256) gemm_w8_s128(GROUPED_PARAMETERS) { gemm<8, 4>(counts, GROUPED_JOB); }
FT_KERNEL(256) gemm_w8_s64(GROUPED_PARAMETERS) { gemm<8, 2>(counts, GROUPED_JOB); }
FT_KERNEL(256) gemm_w8_s32(GROUPED_PARAMETERS) { gemm<8, 1>(counts, GROUPED_JOB); }
