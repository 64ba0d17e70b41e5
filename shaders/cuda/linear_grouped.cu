// Linears with 4- and 8-bit weights and int8 activations, for up to 64 rows at a time.
//
//   y[m, n] = sum over blocks b of  w_scale[n, b] * a_scale[m, b]
//             * ( sum over columns i of b of code[n, i] * a[m, i]  -  zero[n, b] * a_sum[m, b] )
//
//   codes, scales, zeros, quads, a_scales: grouped.cuh has the picture
//
//   split  a block of 8 warps takes a tile of 16 rows of weights and 8 TILES tokens; warps share its
//          blocks of columns, a panel of up to 32 at a time, and leave exact sums in shared memory.
//          Then a thread takes one row of weights and TILES / 2 tokens (half of the threads one token where
//          TILES is 1) and adds the sums in ascending order of blocks, one fma each
//   norm   up to 8 rows: blocks add their outputs to the residual stream, which they ask for when they begin, and
//          the last of them normalises and quantizes the rows as rows.cu does (norm.cuh). One block of threads
//          has all rows, so kernels/src/cuda/plan/linear.rs asks for it where there are few
//   ahead  codes, scales and zero points of the first panel are asked for before the launches before are
//          awaited, those of the next one while sums are added
//
// Integers are exact inside a block, and f32 sums run in one order whatever the rows beside: a row's
// bits depend on nothing but its weights and activations, and are those of the CPU
// (kernels/src/cpu/grouped.rs). This is why columns are divided over warps and not, as stream-K does,
// over blocks of threads: there partial f32 sums are added where segments happen to meet, another order
// for each n, k and device. Here what is divided are integers. Reference: quant::reference::matmul.
//
// Counts for 512 bytes of 4-bit codes (a tile, 64 columns), T tiles of tokens:
//   issue  13 + 7 T to multiply (12 open codes; a tile of tokens: address, load, two tensor instructions, two
//          stores); to add 2 a warp (scale, zero point; 3 where scales are f16) and 6 for 32 outputs (two
//          loads, mad, subtract, multiply, fma): at four a clock
//   L1     6 + 16 T lines: codes, scales, and of a tile of tokens 4 in, 4 exact sums out and in, 4 scales
//   L2     512 codes, 80 scales and zero points (32 where scales are f16 and zero points one number), 576 T
//          activations, less what other blocks left in L1
//   rows              1     8    16    32    64
//   issue, clocks     7    13    23    38    69
//   L1, clocks       12    22    38    70   134
// Bandwidth brings 512 bytes in 27 clocks on an H200 (19 bytes a clock and multiprocessor) and in 85 on
// an RTX 4090 (6): bound by bandwidth up to 8 rows on the former and 32 on the latter; 64 rows take 1.6
// times as long there and 5 times on an H200. gemm_grouped.cu takes 730 clocks for 8192 bytes and 64 rows
// (45 for 512) but has a block for 256 rows of weights only: kernels/src/cuda/plan/linear.rs weighs.
//
// Blocks of 128 columns have half as many exact sums, scales and scalings. The same counts, for half of one:
//   issue  13 + 4.5 T to multiply (a load more and half of the stores for four tensor instructions); to add 1 a
//          warp and 3 for 32 outputs
//   L1     5 + 10 T lines: of a tile of tokens 4 in, 2 exact sums out and in, 2 scales
//   rows              1     8    16    32    64
//   issue, clocks     5     8    14    22    38
//   L1, clocks        8    15    25    45    85
// Bound by bandwidth up to 16 rows on an H200 and 64 on an RTX 4090.

#define WARPS 8

FT_DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }

// Blocks of columns of a panel: a lane has at most 16 words of their codes, and each warp at least one.
template <int BITS, int HALVES, int TILES>
FT_DEVICE constexpr int panel_blocks() {
    int blocks = min_of(min_of(256 / (BITS * HALVES), 32), 64 / TILES);
    return blocks < WARPS ? WARPS : blocks;
}

// Shared memory. Exact sums are [blocks, tiles of 8 tokens, 16 rows, 8], the tokens of a row in an order
// that leaves no two threads of a warp the same bank, whether they write or read: see `place`.
template <int COUNT, int TILES>
struct Panel {
    int dots[COUNT * TILES * TILE * 8];
    // Of two panels, since those of the next one come while one is used.
    float scales[2][COUNT][TILE];
    u8 zeros[2][COUNT][TILE];
    BlockScale tokens[COUNT][8 * TILES];
};

// Where a tile's exact sum of a row of weights and a token stands; pairs of tokens stay together.
FT_DEVICE int place(int weight_row, int token) { return weight_row * 8 + (token ^ (weight_row / 4 * 2)); }

// Codes of this warp's blocks of the panel from `first` on.
template <int BITS, int HALVES, int STEPS>
FT_DEVICE void load_panel(u32 words[STEPS][BITS / 2 * HALVES], const Grouped& job, int first) {
    const int WORDS = BITS / 2 * HALVES;
    int block = first + threadIdx.x / 32;
    const u32* from = job.codes + ((u64)blockIdx.x * job.blocks + block) * 32 * WORDS;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        if (block + i * WARPS < job.blocks) load_codes<BITS, HALVES>(words[i], from + i * WARPS * 32 * WORDS);
    }
}

// Asks for the scales and zero points of the panel from `first` on, a copy for each block.
template <int COUNT, int TILES>
FT_DEVICE void ask_scales(Panel<COUNT, TILES>* panel, const Grouped& job, int first, int which) {
    u64 groups = (u64)blockIdx.x * (job.blocks / job.per_group);
    int block = threadIdx.x / 4, part = threadIdx.x % 4;
    if (block < COUNT && first + block < job.blocks) {
        u64 at = (groups + (first + block) / job.per_group) * TILE;
        ask_scale(job, panel->scales[which][block], at, part);
        if (part == 0 && job.zeros) copy_async16(panel->zeros[which][block], job.zeros + at);
    }
    copy_async_commit();
}

// Notes the zero point of all panels where there is one: four u8 a thread.
template <int COUNT, int TILES>
FT_DEVICE void fill_zeros(Panel<COUNT, TILES>* panel, const Grouped& job) {
    const int WORDS = 2 * COUNT * TILE / 4;
    static_assert(WORDS <= 256, "a word a thread");
    if (!job.zeros && threadIdx.x < WORDS) ((u32*)panel->zeros)[threadIdx.x] = (u32)job.zero * 0x01010101u;
}

// Asks for the scales of the activations of a panel, of the tokens that exist.
template <int COUNT, int TILES>
FT_DEVICE void ask_tokens(Panel<COUNT, TILES>* panel, const Grouped& job, int first, int row, int rows) {
    for (int i = threadIdx.x; i < COUNT * 8 * TILES; i += 256) {
        int token = i / COUNT, block = i % COUNT;
        if (row + token >= rows || first + block >= job.blocks) continue;
        copy_async8(&panel->tokens[block][token], job.a_scales + (u64)(row + token) * job.blocks + first + block);
    }
    copy_async_commit();
}

// Exact sums of COUNT of this warp's blocks of columns from `first` on, `words` their codes: a tile of
// weights times 8 TILES tokens from `row` on. Tokens beyond the last are the last one again, blocks beyond
// the last whatever stands behind them, and nobody's: so there is no branch, and all activations are asked
// for before the first is used, or half of them where registers have no room for all.
template <int BITS, int HALVES, int TILES, int COUNT>
FT_DEVICE void dot_blocks(const Grouped& job, const u32 words[COUNT][BITS / 2 * HALVES], int first, int row, int rows, int* dots) {
    // 32 registers a block of columns.
    constexpr int ASKED = min_of(TILES, 16 / HALVES);
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int start = 0; start < TILES; start += ASKED) {
        u32 b[COUNT][ASKED][2 * HALVES];
#pragma unroll
        for (int tile = 0; tile < ASKED; tile++) {
            u64 token = min(row + (start + tile) * 8 + g, rows - 1);
            const u32* from = job.quads + (token * job.blocks + first) * (8 * HALVES);
#pragma unroll
            for (int i = 0; i < COUNT; i++) load_quads<HALVES>(b[i][tile], from + i * WARPS * 8 * HALVES, 0);
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            u32 a[HALVES][4];
#pragma unroll
            for (int half = 0; half < HALVES; half++) open_codes<BITS>(a[half], words[i], half);
#pragma unroll
            for (int tile = 0; tile < ASKED; tile++) {
                int c[4] = {DOT_START, DOT_START, DOT_START, DOT_START};
#pragma unroll
                for (int half = 0; half < HALVES; half++) mma_u8i8(c, a[half], b[i][tile] + 2 * half);
                int* to = dots + (i * WARPS * TILES + start + tile) * TILE * 8;
                *(int2*)(to + place(g, 2 * t)) = make_int2(c[0], c[1]);
                *(int2*)(to + place(g + 8, 2 * t)) = make_int2(c[2], c[3]);
            }
        }
    }
}

// Adds `count` blocks to a thread's outputs: row `threadIdx.x` % 16 of the tile times every sixteenth token.
template <int COUNT, int TILES, int OUTPUTS>
FT_DEVICE void add_blocks(const Panel<COUNT, TILES>& panel, int which, int count, int scale_bytes, float* sums) {
    int weight_row = threadIdx.x % TILE, token = threadIdx.x / TILE;
    const int* dots = panel.dots + token / 8 * TILE * 8 + place(weight_row, token % 8);
    const u8* scales = (const u8*)panel.scales[which] + (scale_bytes == 2 ? weight_row * 2 : weight_row * 4);
#pragma unroll OUTPUTS == 1 ? 8 : OUTPUTS == 2 ? 4 : 1
    for (int b = 0; b < count; b++) {
        float scale = scale_at(scales + b * TILE * 4, scale_bytes);
        int zero = panel.zeros[which][b][weight_row];
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) {
            int dot = dots[(b * TILES + 2 * i) * TILE * 8];
            sums[i] = add_block(sums[i], scale, zero, panel.tokens[b][token + 16 * i], dot);
        }
    }
}

// Makes a thread's sums its outputs and writes them, activated where they are paired: a row of the other half
// is eight lanes on.
template <int OUTPUTS>
FT_DEVICE void write_outputs(const Grouped& job, int row, int end, float* sums) {
    int weight_row = threadIdx.x % TILE, output = output_of(job, blockIdx.x, weight_row);
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
        int token = row + threadIdx.x / TILE + 16 * i;
        float y = sums[i];
        if (job.bias && output >= 0) y += job.bias[output];
        bool writes = token < end && output >= 0;
        if (job.paired) {
            y = silu(y) * shuffle_xor(y, 8);
            writes = writes && weight_row < 8;
        }
        if (writes) job.out[(u64)token * job.out_width + job.out_start + output] = y;
        sums[i] = y;
    }
}

// Where the residual stream has the output of a thread that has one; null where it gets none.
FT_DEVICE float* stream_of(const Grouped& job, int row, int end) {
    int token = row + threadIdx.x / TILE, output = output_of(job, blockIdx.x, threadIdx.x % TILE);
    return job.norm.stream && token < end && output >= 0 ? job.norm.stream + (u64)token * job.n + output : nullptr;
}

// What stands there before.
FT_DEVICE float in_stream(const Grouped& job, int row, int end) {
    const float* stream = stream_of(job, row, end);
    return stream ? *stream : 0.0f;
}

// Normalises the first `rows` rows of the residual stream, which is complete, and quantizes them. `sums` is shared
// memory, 8 a row.
FT_DEVICE void norm_rows(const Grouped& job, int rows, float* sums) {
    const Norm& norm = job.norm;
    for (int row = 0; row < rows; row++) add_and_square(norm.stream + (u64)row * job.n, nullptr, job.n, sums + 8 * row);
    __syncthreads();
    for (int row = 0; row < rows; row++) {
        u64 at = (u64)row * job.n;
        Normed normed = normed_row(norm.stream + at, norm.weight, job.n, norm.eps, sums + 8 * row);
        if (job.next.quads) quantize_blocks<NORM_BLOCKS>(job.next, normed, row, 0, job.next.blocks);
        write_normed(normed, norm.out + at, job.n);
    }
}

template <int BITS, int HALVES, int TILES>
FT_DEVICE void linear(const u32* counts, const Grouped& job) {
    const int COUNT = panel_blocks<BITS, HALVES, TILES>(), STEPS = COUNT / WARPS, WORDS = BITS / 2 * HALVES;
    const int OUTPUTS = TILES == 1 ? 1 : TILES / 2, AT_ONCE = min_of(STEPS, TILES < 4 ? 4 / TILES : 1);
    using Shared = Panel<COUNT, TILES>;
    FT_SHARED(Shared, panel);
    u32 words[STEPS][WORDS];
    load_panel<BITS, HALVES, STEPS>(words, job, 0);
    ask_scales(panel, job, 0, 0);
    fill_zeros(panel, job);
    await_launches();
    int rows = counts[0], row = blockIdx.y * 8 * TILES;
    if (row >= rows) return;
    int end = min(row + 8 * TILES, rows);
    bool adds = row + (int)threadIdx.x / TILE < end;
    float before = TILES == 1 ? in_stream(job, row, end) : 0.0f, sums[OUTPUTS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) sums[i] = 0.0f;
    for (int first = 0, which = 0;; which ^= 1) {
        int count = min(COUNT, job.blocks - first);
        ask_tokens(panel, job, first, row, rows);
#pragma unroll
        for (int i = 0; i < STEPS; i += AT_ONCE) {
            int b = i * WARPS + threadIdx.x / 32;
            if (i * WARPS >= count) break;
            dot_blocks<BITS, HALVES, TILES, AT_ONCE>(job, words + i, first + b, row, rows, panel->dots + b * TILES * TILE * 8);
        }
        first += COUNT;
        load_panel<BITS, HALVES, STEPS>(words, job, first);
        copy_async_wait<0>();
        // All exact sums, scales and zero points are there.
        __syncthreads();
        ask_scales(panel, job, first, which ^ 1);
        if (adds) add_blocks<COUNT, TILES, OUTPUTS>(*panel, which, count, job.scale_bytes, sums);
        if (first >= job.blocks) break;
        // All have added.
        __syncthreads();
    }
    write_outputs<OUTPUTS>(job, row, end, sums);
    // The exact sums are no longer needed: their place is free.
    u32* flag = (u32*)panel->dots + 2;
    if (TILES == 1 && job.norm.stream) {
        if (float* stream = stream_of(job, row, end)) *stream = before + sums[0];
        if (is_last_block(job.counters, gridDim.x, flag)) norm_rows(job, rows, (float*)panel->dots + 16);
        return;
    }
    if (!job.next.quads) return;
    // Tiles of one block of columns that is quantized.
    int block = blockIdx.x * (TILE / 2) / job.next.block;
    u32* counter = job.counters + blockIdx.y * job.next.blocks + block;
    if (!is_last_block(counter, job.next.block / (TILE / 2), flag)) return;
    quantize_rows(job.next, job.out, job.out_width, block, row, end);
}

// `m32` is how many blocks of the kernel for up to 32 rows fit into a multiprocessor: two where a lane has so many
// quads and words of a block that the registers for three would not do.
#define LINEAR(format, bits, halves, m32)                                                                         \
    FT_KERNEL(256, 3) linear_##format##_m8(GROUPED_PARAMETERS) { linear<bits, halves, 1>(counts, GROUPED_JOB); }     \
    FT_KERNEL(256, 3) linear_##format##_m16(GROUPED_PARAMETERS) { linear<bits, halves, 2>(counts, GROUPED_JOB); }    \
    FT_KERNEL(256, m32) linear_##format##_m32(GROUPED_PARAMETERS) { linear<bits, halves, 4>(counts, GROUPED_JOB); }  \
    FT_KERNEL(256, 2) linear_##format##_m64(GROUPED_PARAMETERS) { linear<bits, halves, 8>(counts, GROUPED_JOB); }

// `counts` is the step's count of these rows; shared memory: a Panel. grid (n / 16, rows / (8 TILES))
LINEAR(w4_s128, 4, 4, 2)
LINEAR(w4_s64, 4, 2, 3)
LINEAR(w4_s32, 4, 1, 3)
LINEAR(w8_s128, 8, 4, 2)
LINEAR(w8_s64, 8, 2, 3)
LINEAR(w8_s32, 8, 1, 3)
