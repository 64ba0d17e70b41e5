// Linears with weights of two bytes: how activations lie, and the arithmetic that all kernels share.
//
//   y[m, n] = sum over k of w[n, k] * x[m, k] + bias[n]
//
//   weight [n, k]               f16 or bf16, as the checkpoint has it; operand A, 16 rows a tile
//   parts  [rows, blocks, 2, 32] activations in two parts of the weight's type, hi then lo, of blocks of
//                               32 columns; zeros behind column k; operand B, 8 rows a group
//   scales [rows] f32           what a row's sums are multiplied by in the end, a power of two
//
//   split  a row is multiplied by the power of two that brings its largest value to 2^14 .. 2^15 (exact).
//          hi = round(x), lo = round(x - hi), so |x - hi - lo| <= 2^-22 |x| + 2^-39 max|x| with f16, whose
//          smallest number is 2^-24, and 2^-16 |x| with bf16. A third part would bring bf16 to 2^-24 for
//          half as many instructions more: weights of 8 bits do not ask for it, and what runs bf16 models
//          elsewhere rounds activations to one part (2^-8). A row that has an infinity or a NaN has NaN
//          for scale, so that all its outputs show it.
//   places lane l = 4 g + t holds columns 8 t .. 8 t + 8 of a block, 16 bytes of each operand. Columns
//          8 t + 4 i .. meet in instruction i of two: the first pair in places 2 t and 2 t + 1 of its 16,
//          the second in 8 + 2 t and 9 + 2 t. Both operands agree, so no place needs to be its column.
//   order  columns are 8 ranges of blocks, fixed by k. A range's sum runs over its blocks in ascending
//          order: hi then lo of instruction 0, hi then lo of instruction 1. The ranges' sums are added
//          in ascending order, then scaled, then the bias.
// An element of a tensor instruction's result depends on its row of A, its column of B and its own sum
// alone, and the places and the order above are the same in every kernel: a row's bits do not depend on
// the rows beside it, nor on how many they are.
// Error: that of the split, and of 2 k additions and 8 more in f32, in an order of the device's within an
// instruction and cut instead of rounded (conformance/oracle.rs has the bound).
// Not here: walking over weights (linear_dense.cu, gemm_dense.cu). Reference: reference::ops::linear.
#pragma once

// Columns of a block and ranges of blocks.
#define DENSE_COLUMNS 32
#define DENSE_RANGES 8

// A linear: `n` rows of weights of `columns` columns, whose outputs are columns `out_start ..` of rows of
// `out_width`. `bias` may be null.
struct Dense {
    const u16* weight;
    const float* bias;
    const u16* parts;
    const float* scales;
    float* out;
    int n, columns, out_width, out_start;
};

// The kernels' parameters, in the order of `Dense`.
#define DENSE_PARAMETERS                                                                                       \
    const u32 *counts, const u16 *weight, const float *bias, const u16 *parts, const float *scales, float *out, \
        int n, int columns, int out_width, int out_start
#define DENSE_JOB \
    Dense { weight, bias, parts, scales, out, n, columns, out_width, out_start }

// The types of weights: rounding to one, and the tensor instruction.
struct F16 {
    static FT_DEVICE u16 round(float value) { return f32_to_f16(value); }
    static FT_DEVICE float open(u16 bits) { return f16_to_f32(bits); }
    static FT_DEVICE void multiply(float* sums, const u32* a, const u32* b) { mma_f16(sums, a, b); }
};
struct Bf16 {
    // To nearest even; of a finite number far below the largest.
    static FT_DEVICE u16 round(float value) {
        u32 bits = __float_as_uint(value);
        return (u16)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    }
    static FT_DEVICE float open(u16 bits) { return bf16_to_f32(bits); }
    static FT_DEVICE void multiply(float* sums, const u32* a, const u32* b) { mma_bf16(sums, a, b); }
};

FT_DEVICE int dense_blocks(const Dense& job) { return (job.columns + DENSE_COLUMNS - 1) / DENSE_COLUMNS; }

// First block of range `range`; that of range 8 is the end of all.
FT_DEVICE int range_start(int blocks, int range) { return (int)((u64)blocks * range / DENSE_RANGES); }

// Adds a block of columns to the sums of 16 rows of weights and 8 of activations: `low` and `high` are a
// lane's columns of rows g and g + 8, `hi` and `lo` those of the two parts of activation row g.
template <class Float>
FT_DEVICE void multiply_block(float* sums, uint4 low, uint4 high, uint4 hi, uint4 lo) {
    u32 a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
    u32 b[4][2] = {{hi.x, hi.y}, {lo.x, lo.y}, {hi.z, hi.w}, {lo.z, lo.w}};
#pragma unroll
    for (int i = 0; i < 4; i++) Float::multiply(sums, a[i / 2], b[i]);
}

// Writes one output from the sum of its ranges.
FT_DEVICE void put_output(const Dense& job, int token, int column, float sum) {
    float y = __fmul_rn(sum, job.scales[token]);
    if (job.bias) y = __fadd_rn(y, job.bias[column]);
    job.out[(u64)token * job.out_width + job.out_start + column] = y;
}

// Where the parts of activations go.
struct Split {
    u16* parts;
    float* scales;
};
#define SPLIT_PARAMETERS u16 *parts, float *part_scales
#define SPLIT \
    Split { parts, part_scales }

// Splits a row of `width` columns by a thread block of 256.
template <class Float>
FT_DEVICE void split_row(const Split& to, const float* x_row, int row, int width) {
    __shared__ u32 most_of[8];
    u32 most = 0;
    // As integers, magnitudes keep their order, and NaN is the greatest.
    for (int i = threadIdx.x; i < width; i += 256) most = max(most, __float_as_uint(x_row[i]) & 0x7fffffffu);
    for (int mask = 16; mask > 0; mask >>= 1) most = max(most, (u32)shuffle_xor((int)most, mask));
    if (threadIdx.x % 32 == 0) most_of[threadIdx.x / 32] = most;
    __syncthreads();
    for (int warp = 0; warp < 8; warp++) most = max(most, most_of[warp]);
    // Rows below 2^-100 are raised as if they were there: both powers of two stay normal numbers.
    int exponent = max((int)(most >> 23) - 127, -100);
    bool finite = most < 0x7f800000u;
    float up = __uint_as_float((u32)(127 + 14 - exponent) << 23), down = __uint_as_float((u32)(127 - 14 + exponent) << 23);
    int blocks = (width + DENSE_COLUMNS - 1) / DENSE_COLUMNS;
    u32* words = (u32*)to.parts + (u64)row * blocks * DENSE_COLUMNS;
    // A pair of columns a thread.
    for (int pair = threadIdx.x; pair < blocks * DENSE_COLUMNS / 2; pair += 256) {
        u32 hi = 0, lo = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int column = 2 * pair + i;
            float value = finite && column < width ? __fmul_rn(x_row[column], up) : 0.0f;
            u16 part = Float::round(value);
            hi |= (u32)part << (16 * i);
            lo |= (u32)Float::round(__fsub_rn(value, Float::open(part))) << (16 * i);
        }
        u32* place = words + pair / 16 * DENSE_COLUMNS + pair % 16;
        place[0] = hi;
        place[DENSE_COLUMNS / 2] = lo;
    }
    if (threadIdx.x == 0) to.scales[row] = finite ? down : __uint_as_float(0x7fc00000u);
}
