// Ops that treat each row by itself: embed, norm, activate, gather.
//
//   embed      out[t] = table[tokens[t]]                                  exact
//   norm       x += add;  out = x / sqrt(mean(x^2) + eps) * weight        [t, d]; norm.cuh has it
//   activate   out = silu(x[.., ..f]) * x[.., f..]
//   gather     out[r] = x[output_rows[r]]                                  exact
//
// split  one block of 256 threads a row (norm), a thread an element otherwise
// bytes  each row once in and once out; nothing is read twice but weights, which stay in L2
// Not here: norms of few rows, which the linear before them computes (linear_grouped.cu).
// Reference: kernels/src/reference/ops.rs. Counts of rows come from device memory (`step`), so that
// a recorded launch serves steps of any size up to its grid.

#define STEP_TOKENS 0
#define STEP_OUTPUTS 1

// Element `i` of a float matrix of kind 0 (f32), 1 (f16) or 2 (bf16).
FT_DEVICE float float_at(const void* values, int kind, u64 i) {
    if (kind == 0) return ((const float*)values)[i];
    u16 bits = ((const u16*)values)[i];
    return kind == 1 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

// grid (columns / 256, t)
FT_KERNEL(256) embed_dense(const u32* step, const u32* tokens, const void* table, float* out, int kind, int width) {
    await_launches();
    int row = blockIdx.y, column = blockIdx.x * 256 + threadIdx.x;
    if (row >= step[STEP_TOKENS] || column >= width) return;
    out[(u64)row * width + column] = float_at(table, kind, (u64)tokens[row] * width + column);
}

// A row of codes, low nibble first where they have 4 bits; `columns` says where each stored column
// belongs, null that they are in order. grid (columns / 256, t)
FT_KERNEL(256) embed_grouped(const u32* step, const u32* tokens, const u8* codes, const float* scales, const u8* zeros,
                             const u32* columns, float* out, int bits, int width, int group) {
    await_launches();
    int row = blockIdx.y, stored = blockIdx.x * 256 + threadIdx.x;
    if (row >= step[STEP_TOKENS] || stored >= width) return;
    u64 token = tokens[row];
    u64 row_bytes = bits == 4 ? width / 2 : width;
    u8 byte = codes[token * row_bytes + (bits == 4 ? stored / 2 : stored)];
    int code = bits == 8 ? byte : (stored % 2 ? byte >> 4 : byte & 15);
    u64 at = token * (width / group) + stored / group;
    int column = columns ? columns[stored] : stored;
    out[(u64)row * width + column] = (float)(code - zeros[at]) * scales[at];
}

// A row's norm by a thread block, written to `out`.
FT_DEVICE Normed norm_row(int row, float* x, const float* add, const float* weight, float* out, int width, float eps) {
    __shared__ float sums[8];
    u64 at = (u64)row * width;
    add_and_square(x + at, add ? add + at : nullptr, width, sums);
    // All sums are there, and all of the row.
    __syncthreads();
    Normed normed = normed_row(x + at, weight, width, eps, sums);
    write_normed(normed, out + at, width);
    return normed;
}

// grid (1, t)
FT_KERNEL(256) rms_norm(const u32* step, float* x, const float* add, const float* weight, float* out, int width, float eps) {
    await_launches();
    if (blockIdx.y < step[STEP_TOKENS]) norm_row(blockIdx.y, x, add, weight, out, width, eps);
}

// The same, and its rows quantized. grid (1, t)
FT_KERNEL(256) rms_norm_quantize(const u32* step, float* x, const float* add, const float* weight, float* out, int width,
                                 float eps, QUANTIZED_PARAMETERS) {
    await_launches();
    int row = blockIdx.y;
    if (row >= step[STEP_TOKENS]) return;
    quantize_blocks<NORM_BLOCKS>(QUANTIZED, norm_row(row, x, add, weight, out, width, eps), row, 0, blocks);
}

FT_DEVICE float silu_times(const float* x_row, int i, int width) { return silu(x_row[i]) * x_row[width + i]; }

// grid (f / 256, t)
FT_KERNEL(256) activate_silu(const u32* step, const float* x, float* out, int width) {
    await_launches();
    int row = blockIdx.y, i = blockIdx.x * 256 + threadIdx.x;
    if (row >= step[STEP_TOKENS] || i >= width) return;
    out[(u64)row * width + i] = silu_times(x + (u64)row * 2 * width, i, width);
}

// The same, and its rows quantized: 256 columns are whole blocks, and in order. grid (f / 256, t)
FT_KERNEL(256) activate_silu_quantize(const u32* step, const float* x, float* out, int width, QUANTIZED_PARAMETERS) {
    await_launches();
    int row = blockIdx.y, i = blockIdx.x * 256 + threadIdx.x;
    if (row >= step[STEP_TOKENS]) return;
    float* out_row = out + (u64)row * width;
    if (i < width) out_row[i] = silu_times(x + (u64)row * 2 * width, i, width);
    __syncthreads();
    int first = blockIdx.x * (256 / block);
    quantize_blocks<1>(QUANTIZED, out_row, row, first, min(first + 256 / block, blocks));
}

// grid (d / 256, r)
FT_KERNEL(256) gather(const u32* step, const float* x, const u32* output_rows, float* out, int width) {
    await_launches();
    int row = blockIdx.y, i = blockIdx.x * 256 + threadIdx.x;
    if (row >= step[STEP_OUTPUTS] || i >= width) return;
    out[(u64)row * width + i] = x[(u64)output_rows[row] * width + i];
}

// The same, and what was gathered split. grid (1, r)
template <class Float>
FT_DEVICE void gather_and_split(const u32* step, const float* x, const u32* output_rows, float* out, int width, const Split& to) {
    await_launches();
    int row = blockIdx.y;
    if (row >= step[STEP_OUTPUTS]) return;
    const float* from = x + (u64)output_rows[row] * width;
    for (int i = threadIdx.x; i < width; i += 256) out[(u64)row * width + i] = from[i];
    split_row<Float>(to, from, row, width);
}
FT_KERNEL(256) gather_split_f16(const u32* step, const float* x, const u32* output_rows, float* out, int width,
                                SPLIT_PARAMETERS) {
    gather_and_split<F16>(step, x, output_rows, out, width, SPLIT);
}
FT_KERNEL(256) gather_split_bf16(const u32* step, const float* x, const u32* output_rows, float* out, int width,
                                 SPLIT_PARAMETERS) {
    gather_and_split<Bf16>(step, x, output_rows, out, width, SPLIT);
}

// Norms, split. grid (1, t)
template <class Float>
FT_DEVICE void norm_and_split(const u32* step, float* x, const float* add, const float* weight, float* out, int width, float eps,
                              const Split& to) {
    await_launches();
    int row = blockIdx.y;
    if (row >= step[STEP_TOKENS]) return;
    norm_row(row, x, add, weight, out, width, eps);
    // A thread finds the largest of what it wrote itself; a barrier comes before it reads what others did.
    split_row<Float>(to, out + (u64)row * width, row, width);
}
FT_KERNEL(256) rms_norm_split_f16(const u32* step, float* x, const float* add, const float* weight, float* out, int width,
                                  float eps, SPLIT_PARAMETERS) {
    norm_and_split<F16>(step, x, add, weight, out, width, eps, SPLIT);
}
FT_KERNEL(256) rms_norm_split_bf16(const u32* step, float* x, const float* add, const float* weight, float* out, int width,
                                   float eps, SPLIT_PARAMETERS) {
    norm_and_split<Bf16>(step, x, add, weight, out, width, eps, SPLIT);
}

// Activations, split: a block a row, as above. grid (1, t)
template <class Float>
FT_DEVICE void activate_and_split(const u32* step, const float* x, float* out, int width, const Split& to) {
    await_launches();
    int row = blockIdx.y;
    if (row >= step[STEP_TOKENS]) return;
    float* out_row = out + (u64)row * width;
    for (int i = threadIdx.x; i < width; i += 256) out_row[i] = silu_times(x + (u64)row * 2 * width, i, width);
    split_row<Float>(to, out_row, row, width);
}
FT_KERNEL(256) activate_silu_split_f16(const u32* step, const float* x, float* out, int width, SPLIT_PARAMETERS) {
    activate_and_split<F16>(step, x, out, width, SPLIT);
}
FT_KERNEL(256) activate_silu_split_bf16(const u32* step, const float* x, float* out, int width, SPLIT_PARAMETERS) {
    activate_and_split<Bf16>(step, x, out, width, SPLIT);
}
