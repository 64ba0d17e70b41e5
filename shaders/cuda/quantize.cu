// Activations to int8, one scale for each block of columns, where no other kernel does it on its way.
//
//   scale = max|x| / 127    q = round(x / scale), halves to even    sum = q_0 + q_1 + ...
//   in    x [rows, width] f32
//   out   quads and scales: grouped.cuh has the picture
//   split sixteen threads a block of at most 64 columns, a quad each
//   bytes 4 in and 1 out a column
// The same bits as the CPU's (kernels/src/cpu/quantize.rs), which is the reference.

// `counts` is the step's count of these rows. grid (blocks / 16, rows)
FT_KERNEL(256) quantize(const u32* counts, const float* x, int width, QUANTIZED_PARAMETERS) {
    await_launches();
    int row = blockIdx.y, first = blockIdx.x * 16;
    if (row >= counts[0]) return;
    quantize_blocks<1>(QUANTIZED, x + (u64)row * width, row, first, min(first + 16, blocks));
}
