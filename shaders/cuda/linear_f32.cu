// Linears with f32 weights and activations, 8 rows at a time; linear_dense.cu has those of two bytes.
//
//   y[m, n] = sum over k of w[n, k] * x[m, k] + bias[n]
//
//   weight [n, k] as the checkpoint has it; x [rows, k] f32
//   split  a warp an output column; lane l takes the columns 8 l .. 8 l + 8 of every 256, so that a warp
//          reads a kilobyte at once. Eight sums a lane, one a row of x; then lanes by halving
//   bytes  every weight once for each 8 rows; activations from L1 and L2
// A row's sums run in one order whatever the rows beside it. Error: at most k / 32 + 5 roundings of f32.
// Reference: reference::ops::linear.

#define ROWS 8

// Eight weights of a row from element `at` on, `left` of which are in the row: the others are zeros. Rows
// whose length is a multiple of 8 are read 16 bytes at once.
FT_DEVICE void load_weights(float* w, const float* weight, u64 at, int left, bool aligned) {
    if (aligned) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint4 v = load_once((const uint4*)(weight + at) + i);
            w[4 * i] = __uint_as_float(v.x);
            w[4 * i + 1] = __uint_as_float(v.y);
            w[4 * i + 2] = __uint_as_float(v.z);
            w[4 * i + 3] = __uint_as_float(v.w);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = i < left ? weight[at + i] : 0.0f;
}

// `counts` is the step's count of these rows. grid (n / 8, rows / 8)
FT_KERNEL(256) linear_f32(const u32* counts, const float* weight, const float* bias, const float* x, float* out, int n,
                          int columns, int out_width, int out_start) {
    await_launches();
    int rows = counts[0], row = blockIdx.y * ROWS, lane = threadIdx.x % 32, column = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows || column >= n) return;
    float sums[ROWS] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (int k = 8 * lane; k < columns; k += 256) {
        float w[8];
        load_weights(w, weight, (u64)column * columns + k, columns - k, columns % 8 == 0);
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
