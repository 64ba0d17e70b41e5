// Linears with f32, f16 or bf16 weights and f32 activations, 8 rows at a time.
//
//   y[m, n] = sum over k of w[n, k] * x[m, k] + bias[n]
//
//   weight [n, k] as the checkpoint has it; x [rows, k] f32
//   split  a warp an output column; lane l takes the columns 8 l .. 8 l + 8 of every 256, so that a warp
//          reads 512 bytes of f16 at once. Eight sums a lane, one a row of x; then lanes by halving
//   bytes  every weight once for each 8 rows; activations from L1 and L2
// A row's sums run in one order whatever the rows beside it. Error: at most k / 32 + 5 roundings of f32.
// Reference: reference::ops::linear.

#define ROWS 8

// How a kind of weights is read: one of them, and eight from a multiple of eight on.
struct F32 {
    static FT_DEVICE float one(const void* w, u64 at) { return ((const float*)w)[at]; }
    static FT_DEVICE void eight(float* w, const void* from, u64 at) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint4 v = load_once((const uint4*)((const float*)from + at) + i);
            w[4 * i] = __uint_as_float(v.x);
            w[4 * i + 1] = __uint_as_float(v.y);
            w[4 * i + 2] = __uint_as_float(v.z);
            w[4 * i + 3] = __uint_as_float(v.w);
        }
    }
};
struct F16 {
    static FT_DEVICE float one(const void* w, u64 at) { return f16_to_f32(((const u16*)w)[at]); }
    static FT_DEVICE void eight(float* w, const void* from, u64 at) {
        uint4 v = load_once((const uint4*)((const u16*)from + at));
        u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[2 * i] = f16_to_f32(words[i] & 0xffff);
            w[2 * i + 1] = f16_to_f32(words[i] >> 16);
        }
    }
};
struct Bf16 {
    static FT_DEVICE float one(const void* w, u64 at) { return bf16_to_f32(((const u16*)w)[at]); }
    static FT_DEVICE void eight(float* w, const void* from, u64 at) {
        uint4 v = load_once((const uint4*)((const u16*)from + at));
        u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[2 * i] = bf16_to_f32(words[i] & 0xffff);
            w[2 * i + 1] = bf16_to_f32(words[i] >> 16);
        }
    }
};

// Eight weights from element `at` on, `left` of which are in the row: the others are zeros. Rows whose
// length is a multiple of 8 are read 16 bytes at once.
template <class Float>
FT_DEVICE void load_weights(float* w, const void* weight, u64 at, int left, bool aligned) {
    if (aligned) {
        Float::eight(w, weight, at);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = i < left ? Float::one(weight, at + i) : 0.0f;
}

template <class Float>
FT_DEVICE void linear(const u32* counts, const void* weight, const float* bias, const float* x, float* out, int n, int columns,
                      int out_width, int out_start) {
    await_launches();
    int rows = counts[0], row = blockIdx.y * ROWS, lane = threadIdx.x % 32, column = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows || column >= n) return;
    float sums[ROWS] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (int k = 8 * lane; k < columns; k += 256) {
        float w[8];
        load_weights<Float>(w, weight, (u64)column * columns + k, columns - k, columns % 8 == 0);
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
            if (row + m >= rows) break;
            const float* x_row = x + (u64)(row + m) * columns + k;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (k + i < columns) sums[m] = fmaf(w[i], x_row[i], sums[m]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
        if (row + m >= rows) break;
        float sum = sums[m];
        for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
        if (bias) sum += bias[column];
        if (lane == 0) out[(u64)(row + m) * out_width + out_start + column] = sum;
    }
}

// `counts` is the step's count of these rows. grid (n / 8, rows / 8)
#define PARAMETERS                                                                                      \
    const u32 *counts, const void *weight, const float *bias, const float *x, float *out, int n, int columns, \
        int out_width, int out_start
#define ARGUMENTS counts, weight, bias, x, out, n, columns, out_width, out_start

FT_KERNEL(256) linear_f32(PARAMETERS) { linear<F32>(ARGUMENTS); }
FT_KERNEL(256) linear_f16(PARAMETERS) { linear<F16>(ARGUMENTS); }
FT_KERNEL(256) linear_bf16(PARAMETERS) { linear<Bf16>(ARGUMENTS); }
