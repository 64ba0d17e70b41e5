// Activations to int8, one scale for each block of columns, where no other kernel does it on its way.
//
//   scale = max|x| / 127    q = round(x / scale), halves to even    sum = q_0 + q_1 + ...
//   in    x [rows, width] f32
//   out   quads and scales: grouped.cuh has the picture
//   split a quad a thread: sixteen threads a block of at most 64 columns, 32 one of at most 128
//   bytes 4 in and 1 out a column
// The same bits as the CPU's (kernels/src/cpu/quantize.rs), which is the reference.

// `counts` is the step's count of these rows. grid (blocks / those of 256 threads, rows)
FT_KERNEL(256) quantize(const u32* counts, const float* x, int width, QUANTIZED_PARAMETERS) {
    await_launches();
    Quantized to = QUANTIZED;
    int row = blockIdx.y, each = blocks_of(to, 256), first = blockIdx.x * each;
    if (row >= counts[0]) return;
    quantize_blocks<1>(to, x + (u64)row * width, row, first, min(first + each, blocks));
}
