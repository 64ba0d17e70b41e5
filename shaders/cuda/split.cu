// Activations to two parts of two bytes, where no other kernel does it on its way.
//
//   in    x [rows, width] f32
//   out   parts and scales: dense.cuh has the picture and the errors
//   split a block of 256 threads a row
//   bytes 4 in, twice (the second time from a cache), and 4 out a column

// `counts` is the step's count of these rows. grid (1, rows)
FT_KERNEL(256) split_f16(const u32* counts, const float* x, int width, SPLIT_PARAMETERS) {
    await_launches();
    int row = blockIdx.y;
    if (row < counts[0]) split_row<F16>(SPLIT, x + (u64)row * width, row, width);
}
FT_KERNEL(256) split_bf16(const u32* counts, const float* x, int width, SPLIT_PARAMETERS) {
    await_launches();
    int row = blockIdx.y;
    if (row < counts[0]) split_row<Bf16>(SPLIT, x + (u64)row * width, row, width);
}
