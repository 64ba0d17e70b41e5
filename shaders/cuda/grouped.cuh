// Quantized matrices and activations as the linears find them.
//
//   codes  [tiles, blocks, 32 lanes, words] u32: a tile is 16 rows of weights; lane l = 4 g + t holds
//          columns s t .. s (t + 1) of a block, s = stride / 4, of the rows g and g + 8:
//            4-bit  word j: byte i is column s t + 4 j + i, row g in the low nibble, g + 8 in the high
//            8-bit  words 2 j and 2 j + 1: the same columns of row g, then of row g + 8
//          so one load brings what two tensor instructions multiply, and opening it takes one `and`
//          and one shift for four codes. Which column meets which place of the instruction does not
//          matter, as long as both operands agree: sums of a block are exact. A block of stride 128 lies
//          as two of stride 64, so that lanes side by side load what lies side by side.
//   scales [tiles, groups, 16] f16 where that changes none of a matrix (two `scale_bytes`), else f32
//   zeros  [tiles, groups, 16] u8; null where all of a matrix are `zero`
//   quads  [rows, blocks, stride / 4]: four int8 activations in an u32, first in the lowest byte
//   a_scales  [rows, blocks]: scale and sum of a block's activations
//
// Not here: what is done with them (linear_grouped.cu, gemm_grouped.cu). kernels/src/cuda/store.rs
// writes codes, scales and zeros, quantize.cu the activations.
#pragma once

// Rows of weights of a tile.
#define TILE 16

// Scale of a block of activations and the sum of its integers.
struct BlockScale {
    float scale;
    int sum;
};

// Where a row's activations go: `blocks` blocks of `block` columns, each stored as `stride` (32, 64 or 128),
// zeros behind its own. `source` names the column of each stored one where columns are permuted or
// padded (PADDING: a zero), null that they are in order.
struct Quantized {
    const u32* source;
    u32* quads;
    BlockScale* scales;
    int blocks, block, stride;
};

// The norm of the rows that a linear adds its outputs to: `out` gets stream / sqrt(mean(stream^2) + eps) *
// weight. No stream is no norm.
struct Norm {
    float* stream;
    const float* weight;
    float* out;
    float eps;
};

// A linear: `blocks` blocks of columns, `per_group` of which share scale and zero point; `n` rows of
// weights, whose outputs are columns `out_start ..` of rows of `out_width`. `bias` may be null.
//
// Where `paired`, the first half of the outputs are gates of the second: a tile is eight rows of gates
// and the eight that belong to them, and `out` gets silu(gate) * other, n / 2 columns. Where `next` has
// quads those are quantized too, each block by the block of threads that comes last (`counters`).
//
// Where `norm` has a stream, outputs are added to it too, and of all blocks of threads the last one
// normalises its rows and, where `next` has quads, quantizes them.
struct Grouped {
    const u32* codes;
    const void* scales;
    const u8* zeros;
    const float* bias;
    const u32* quads;
    const BlockScale* a_scales;
    float* out;
    int n, blocks, per_group, out_width, out_start, paired, scale_bytes, zero;
    Quantized next;
    u32* counters;
    Norm norm;
};

// The output that row `row` of a tile is; -1 where it is none.
FT_DEVICE int output_of(const Grouped& job, int tile, int row) {
    int output = tile * TILE + row;
    if (!job.paired) return output < job.n ? output : -1;
    int pair = tile * (TILE / 2) + row % (TILE / 2), half = job.n / 2;
    return pair < half ? pair + row / (TILE / 2) * half : -1;
}

// Asks for quarter `part` of the scales of a tile's group, 16 bytes; f16 have two. `at` is the group's first.
FT_DEVICE void ask_scale(const Grouped& job, float* to, u64 at, int part) {
    if (part < job.scale_bytes) copy_async16(to + 4 * part, (const u8*)job.scales + at * job.scale_bytes + 16 * part);
}

// A scale of so many bytes.
FT_DEVICE float scale_at(const u8* scale, int bytes) { return bytes == 2 ? f16_to_f32(*(const u16*)scale) : *(const float*)scale; }

FT_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

// Blocks are of 32 HALVES columns, a half being what one tensor instruction multiplies: their stride. PIECES of
// them, of at most two halves, lie one behind the other.
template <int HALVES>
FT_DEVICE constexpr int pieces() { return HALVES == 4 ? 2 : 1; }

// One lane's codes of a block, BITS / 2 * HALVES words, in loads of at most 16 bytes; `block` is the block's first.
template <int BITS, int HALVES>
FT_DEVICE void load_codes(u32* words, const u32* block) {
    constexpr int PIECES = pieces<HALVES>(), WORDS = BITS / 2 * HALVES / PIECES;
    const u32* from = block + threadIdx.x % 32 * WORDS;
    if constexpr (WORDS == 2) {
        uint2 v = load_once((const uint2*)from);
        words[0] = v.x;
        words[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < PIECES * WORDS; i += 4) {
            uint4 v = load_once((const uint4*)(from + i / WORDS * 32 * WORDS + i % WORDS));
            words[i] = v.x;
            words[i + 1] = v.y;
            words[i + 2] = v.z;
            words[i + 3] = v.w;
        }
    }
}

// The 2 HALVES quads of a lane of a block, which begins at `block` with its piece `first`.
template <int HALVES>
FT_DEVICE void load_quads(u32* b, const u32* block, int first) {
    int t = threadIdx.x % 4;
    if constexpr (HALVES == 1) {
        uint2 v = *((const uint2*)block + t);
        b[0] = v.x;
        b[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < pieces<HALVES>(); i++) {
            uint4 v = *((const uint4*)block + 4 * (i ^ first) + t);
            b[4 * i] = v.x;
            b[4 * i + 1] = v.y;
            b[4 * i + 2] = v.z;
            b[4 * i + 3] = v.w;
        }
    }
}

// The four registers of a tensor instruction's left operand: quads 2 `half` and 2 `half` + 1 of a lane.
template <int BITS>
FT_DEVICE void open_codes(u32* a, const u32* words, int half) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if constexpr (BITS == 4) {
            u32 word = words[2 * half + j];
            a[2 * j] = word & 0x0f0f0f0fu;
            a[2 * j + 1] = (word >> 4) & 0x0f0f0f0fu;
        } else {
            a[2 * j] = words[2 * (2 * half + j)];
            a[2 * j + 1] = words[2 * (2 * half + j) + 1];
        }
    }
}

// What tensor instructions add their exact sums to: as a float 1.5 * 2^23, from where on integers of up to
// 2^22 in size are the float's last digits. A block's sums are at most 128 * 127 * 255 = 4145280 in size, so that a
// subtraction converts them exactly, at four times the rate of the instruction for it.
#define DOT_START 0x4b400000

// One block's exact sum (from DOT_START on), scaled, added to an output: the order of operations of all
// linears and of the CPU.
FT_DEVICE float add_block(float sum, float scale, int zero, BlockScale block, int dot) {
    float exact = __fsub_rn(__int_as_float(dot - zero * block.sum), 12582912.0f);
    return __fmaf_rn(__fmul_rn(scale, block.scale), exact, sum);
}

// Below this a block counts as zero: 127 / max would overflow.
#define TINY 1e-35f
#define PADDING 0xffffffffu

// Whether all lanes of a warp quantize a block, a quad each: one of more than 64 columns. Others take sixteen.
FT_DEVICE bool is_wide(const Quantized& to) { return to.stride > 64; }

// Blocks that so many threads quantize at once: of the threads before one, the place of its own.
FT_DEVICE int blocks_of(const Quantized& to, u32 threads) { return is_wide(to) ? threads / 32 : threads / 16; }

// Quantizes COUNT blocks of a row at once: scale = max|x| / 127, q = round(x / scale) with halves to even. A row
// is what gives its columns by []. Lanes of a block come together; those that are not to store still take part.
template <int COUNT, class Row>
FT_DEVICE void quantize_some(const Quantized& to, const Row& x_row, int row, const int* blocks, const bool* stores) {
    bool wide = is_wide(to);
    int quad = wide ? threadIdx.x % 32 : threadIdx.x % 16;
    float values[COUNT][4];
    u32 most[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        most[k] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int column = 4 * quad + i, at = blocks[k] * to.block + column;
            u32 from = PADDING;
            if (column < to.block) from = to.source ? to.source[at] : at;
            values[k][i] = from == PADDING ? 0.0f : x_row[from];
            // As integers, magnitudes keep their order, and NaN is the greatest.
            most[k] = max(most[k], __float_as_uint(values[k][i]) & 0x7fffffffu);
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        if (mask == 16 && !wide) continue;
#pragma unroll
        for (int k = 0; k < COUNT; k++) most[k] = max(most[k], (u32)shuffle_xor((int)most[k], mask));
    }
    u32 packed[COUNT];
    int sums[COUNT];
    float scales[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        float max_value = __uint_as_float(most[k]);
        bool finite = most[k] < 0x7f800000u;
        float inverse = !finite || max_value < TINY ? 0.0f : __fdiv_rn(127.0f, max_value);
        packed[k] = 0;
        sums[k] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int q = finite ? __float2int_rn(__fmul_rn(values[k][i], inverse)) : 0;
            packed[k] |= (u32)(q & 255) << (8 * i);
            sums[k] += q;
        }
        // A block with a NaN or an infinity shows it in all its outputs.
        float scale = inverse == 0.0f ? 0.0f : __fdiv_rn(max_value, 127.0f);
        scales[k] = finite ? scale : __uint_as_float(0x7fc00000u);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        if (mask == 16 && !wide) continue;
#pragma unroll
        for (int k = 0; k < COUNT; k++) sums[k] += shuffle_xor(sums[k], mask);
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        u64 at = (u64)row * to.blocks + blocks[k];
        if (stores[k] && 4 * quad < to.stride) to.quads[at * (to.stride / 4) + quad] = packed[k];
        if (stores[k] && quad == 0) to.scales[at] = BlockScale{scales[k], sums[k]};
    }
}

template <class Row>
FT_DEVICE void quantize_block(const Quantized& to, const Row& x_row, int row, int block, bool stores) {
    quantize_some<1>(to, x_row, row, &block, &stores);
}

// Quantizes blocks `first .. end` of a row by a thread block of 256, COUNT times `blocks_of` them at once.
template <int COUNT, class Row>
FT_DEVICE void quantize_blocks(const Quantized& to, const Row& x_row, int row, int first, int end) {
    int each = blocks_of(to, 256), mine = blocks_of(to, threadIdx.x);
    for (int start = first; start < end; start += COUNT * each) {
        int blocks[COUNT];
        bool stores[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            int block = start + k * each + mine;
            blocks[k] = min(block, end - 1);
            stores[k] = block < end;
        }
        quantize_some<COUNT>(to, x_row, row, blocks, stores);
    }
}

#define QUANTIZED_PARAMETERS const u32 *source, u32 *quads, BlockScale *scales, int blocks, int block, int stride
#define QUANTIZED \
    Quantized { source, quads, scales, blocks, block, stride }

// Quantizes block `block` of rows `row .. end` of a matrix of `width` columns by a thread block of 256.
FT_DEVICE void quantize_rows(const Quantized& to, const float* x, int width, int block, int row, int end) {
    for (int each = blocks_of(to, 256); row < end; row += each) {
        int mine = row + blocks_of(to, threadIdx.x), from = min(mine, end - 1);
        quantize_block(to, x + (u64)from * width, from, block, mine < end);
    }
}

// The kernels' parameters, in the order of `Grouped`.
#define GROUPED_PARAMETERS                                                                                          \
    const u32 *counts, const u32 *codes, const void *scales, const u8 *zeros, const float *bias, const u32 *quads,  \
        const BlockScale *a_scales, float *out, int n, int blocks, int per_group, int out_width, int out_start,     \
        int paired, int scale_bytes, int zero, const u32 *next_source, u32 *next_quads, BlockScale *next_scales,    \
        int next_blocks, int next_block, int next_stride, u32 *counters, float *stream, const float *norm_weight,   \
        float *normed, float eps
#define GROUPED_JOB                                                                                                 \
    Grouped {                                                                                                       \
        codes, scales, zeros, bias, quads, a_scales, out, n, blocks, per_group, out_width, out_start, paired,       \
            scale_bytes, zero, {next_source, next_quads, next_scales, next_blocks, next_block, next_stride},        \
            counters, {stream, norm_weight, normed, eps}                                                            \
    }
