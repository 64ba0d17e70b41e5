// Linears with 4- and 8-bit weights and int8 activations, for up to 16 rows at a time.
//
//   y[m, n] = sum over blocks b of  w_scale[n, b] * a_scale[m, b]
//             * ( sum over columns i of b of code[n, i] * a[m, i]  -  zero[n, b] * a_sum[m, b] )
//
//   codes, scales, zeros, quads, a_scales: grouped.cuh has the picture
//
//   split  a block of 8 warps takes a tile; warps share its blocks of columns, 64 / TILES at a time
//          (a panel), and leave the exact sums in shared memory, [blocks, 16, rows]. Then one thread
//          an output adds them in ascending order of blocks, one fma each.
//   bytes  every code and scale once for each 16 rows; activations from L2
//
// Integers are exact inside a block, and f32 sums run in one order whatever the rows beside: a row's
// bits depend on nothing but its weights and activations, and are those of the CPU
// (kernels/src/cpu/grouped.rs). Reference: quant::reference::matmul.

#define WARPS 8
#define PANEL 64

// HALVES * 2 quads of one lane; zeros where there is no row.
template <int HALVES>
FT_DEVICE void load_quads(u32* b, const u32* from, bool exists) {
    if (!exists) {
#pragma unroll
        for (int i = 0; i < 2 * HALVES; i++) b[i] = 0;
    } else if constexpr (HALVES == 1) {
        uint2 v = *(const uint2*)from;
        b[0] = v.x;
        b[1] = v.y;
    } else {
        uint4 v = *(const uint4*)from;
        b[0] = v.x;
        b[1] = v.y;
        b[2] = v.z;
        b[3] = v.w;
    }
}

// Exact sums of one block of columns: a tile of weights times 8 * TILES rows from `row` on.
template <int BITS, int HALVES, int TILES>
FT_DEVICE void dot_block(const Grouped& job, const u32* words, int block, int row, int rows, int* dots) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 a[HALVES][4];
#pragma unroll
    for (int half = 0; half < HALVES; half++) open_codes<BITS>(a[half], words, half);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        int token = row + 8 * tile + g;
        u32 b[2 * HALVES];
        const u32* from = job.quads + ((u64)token * job.blocks + block) * (8 * HALVES) + t * 2 * HALVES;
        load_quads<HALVES>(b, from, token < rows);
        int c[4] = {0, 0, 0, 0};
#pragma unroll
        for (int half = 0; half < HALVES; half++) mma_u8i8(c, a[half], b + 2 * half);
        // [16 rows of weights, 8 tokens] a tile of tokens
        int* to = dots + tile * TILE * 8 + g * 8 + 2 * t;
        *(int2*)to = make_int2(c[0], c[1]);
        *(int2*)(to + 64) = make_int2(c[2], c[3]);
    }
}

// One thread's output: a row of weights times a token.
template <int TILES>
FT_DEVICE float add_blocks(const Grouped& job, int first, int count, const int* dots, int weight_row, int token, float sum) {
    int groups = job.blocks / job.per_group, group = first / job.per_group, left = job.per_group - first % job.per_group;
    const BlockScale* a = job.a_scales + (u64)token * job.blocks + first;
    u64 at = ((u64)blockIdx.x * groups + group) * TILE + weight_row;
    float scale = job.scales[at];
    int zero = job.zeros[at];
    for (int b = 0; b < count; b++) {
        if (left == 0) {
            at += TILE;
            scale = job.scales[at];
            zero = job.zeros[at];
            left = job.per_group;
        }
        left--;
        sum = add_block(sum, scale, zero, a[b], dots[b * TILE * 8 * TILES]);
    }
    return sum;
}

template <int BITS, int HALVES, int TILES>
FT_DEVICE void linear(const u32* counts, const Grouped& job) {
    await_launches();
    const int WORDS = BITS / 2 * HALVES, STEPS = PANEL / TILES / WARPS;
    __shared__ int dots[PANEL / TILES * TILE * 8 * TILES];
    int rows = counts[0], row = blockIdx.y * 8 * TILES, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    // Output `threadIdx.x` of this tile and these tokens.
    int tile = threadIdx.x / (TILE * 8), weight_row = threadIdx.x / 8 % TILE, token = row + 8 * tile + threadIdx.x % 8;
    bool has_output = tile < TILES && token < rows && blockIdx.x * TILE + weight_row < job.n;
    float sum = 0.0f;
    for (int first = 0; first < job.blocks; first += PANEL / TILES) {
        int count = min(PANEL / TILES, job.blocks - first);
        u32 words[STEPS][WORDS];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            int b = i * WARPS + warp;
            u64 at = (((u64)blockIdx.x * job.blocks + first + b) * 32 + lane) * WORDS;
            if (b < count) load_codes<WORDS>(words[i], job.codes + at);
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            int b = i * WARPS + warp;
            if (b < count) dot_block<BITS, HALVES, TILES>(job, words[i], first + b, row, rows, dots + b * TILE * 8 * TILES);
        }
        __syncthreads();
        if (has_output) sum = add_blocks<TILES>(job, first, count, dots + threadIdx.x, weight_row, token, sum);
        __syncthreads();
    }
    if (!has_output) return;
    int column = blockIdx.x * TILE + weight_row;
    if (job.bias) sum += job.bias[column];
    job.out[(u64)token * job.out_width + job.out_start + column] = sum;
}

// `counts` is the step's count of these rows. grid (n / 16, rows / (8 TILES))
FT_KERNEL(256) linear_w4_s64_m8(GROUPED_PARAMETERS) { linear<4, 2, 1>(counts, GROUPED_JOB); }
FT_KERNEL(256) linear_w4_s64_m16(GROUPED_PARAMETERS) { linear<4, 2, 2>(counts, GROUPED_JOB); }
FT_KERNEL(256) linear_w4_s32_m8(GROUPED_PARAMETERS) { linear<4, 1, 1>(counts, GROUPED_JOB); }
FT_KERNEL(256) linear_w4_s32_m16(GROUPED_PARAMETERS) { linear<4, 1, 2>(counts, GROUPED_JOB); }
FT_KERNEL(256) linear_w8_s64_m8(GROUPED_PARAMETERS) { linear<8, 2, 1>(counts, GROUPED_JOB); }
FT_KERNEL(256) linear_w8_s64_m16(GROUPED_PARAMETERS) { linear<8, 2, 2>(counts, GROUPED_JOB); }
FT_KERNEL(256) linear_w8_s32_m8(GROUPED_PARAMETERS) { linear<8, 1, 1>(counts, GROUPED_JOB); }
FT_KERNEL(256) linear_w8_s32_m16(GROUPED_PARAMETERS) { linear<8, 1, 2>(counts, GROUPED_JOB); }
