// The norm of rows, for the kernels that compute it: rows.cu by itself, linear_grouped.cu behind the linear
// whose outputs the norm adds.
//
//   x += add;  out = x / sqrt(mean(x^2) + eps) * weight
//
//   order  thread i of 256 adds the squares of columns i, i + 256 .. in ascending order; lanes are added by
//          halving, then the eight warps in ascending order: all kernels give a row the same bits
//   bytes  a row once from memory, and again, normalised as it is read, from L1
// Not here: which rows, and where warps leave their sums. Reference: kernels/src/reference/ops.rs.
#pragma once

// Loads of a thread that are under way together.
#define NORM_BATCH 8
// Blocks of columns that a lane has a quad of at once.
#define NORM_BLOCKS 4

// The sum over a warp, the same bits in all lanes.
FT_DEVICE float warp_sum(float value) {
    for (int mask = 16; mask > 0; mask >>= 1) value += shuffle_xor(value, mask);
    return value;
}

// Adds `add`, if there is one, to a row; leaves a warp's sum of squares in `sums[warp]`.
FT_DEVICE void add_and_square(float* x_row, const float* add, int width, float* sums) {
    float square = 0.0f;
    for (int first = threadIdx.x; first < width; first += 256 * NORM_BATCH) {
        float values[NORM_BATCH];
#pragma unroll
        for (int j = 0; j < NORM_BATCH; j++) values[j] = first + 256 * j < width ? x_row[first + 256 * j] : 0.0f;
        if (add) {
#pragma unroll
            for (int j = 0; j < NORM_BATCH; j++) values[j] += first + 256 * j < width ? add[first + 256 * j] : 0.0f;
#pragma unroll
            for (int j = 0; j < NORM_BATCH; j++) {
                if (first + 256 * j < width) x_row[first + 256 * j] = values[j];
            }
        }
        // What is beyond the row adds nothing.
#pragma unroll
        for (int j = 0; j < NORM_BATCH; j++) square = fmaf(values[j], values[j], square);
    }
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = square;
}

// A row that is normalised as it is read.
struct Normed {
    const float* x;
    const float* weight;
    float inverse;
    FT_DEVICE float operator[](int i) const { return x[i] * inverse * weight[i]; }
};

// The row whose sums of squares `add_and_square` has left: a barrier lies between.
FT_DEVICE Normed normed_row(const float* x_row, const float* weight, int width, float eps, const float* sums) {
    float total = 0.0f;
    for (int warp = 0; warp < 8; warp++) total += sums[warp];
    float mean = total / (float)width;
    return Normed{x_row, weight, 1.0f / sqrtf(mean + eps)};
}

FT_DEVICE void write_normed(const Normed& normed, float* out, int width) {
    for (int first = threadIdx.x; first < width; first += 256 * NORM_BATCH) {
        float values[NORM_BATCH];
#pragma unroll
        for (int j = 0; j < NORM_BATCH; j++) values[j] = first + 256 * j < width ? normed[first + 256 * j] : 0.0f;
#pragma unroll
        for (int j = 0; j < NORM_BATCH; j++) {
            if (first + 256 * j < width) out[first + 256 * j] = values[j];
        }
    }
}
