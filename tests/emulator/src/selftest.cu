// Kernels that try out the emulator itself: what it must run, and what it must find.

// out[i] = the sum of lane numbers over a warp, by halving. 64 threads
FT_KERNEL(64) selftest_shuffle(int* out, float* floats) {
    await_launches();
    int sum = threadIdx.x % 32;
    float product = 1.0f + (float)(threadIdx.x % 32 == 5);
    for (int mask = 16; mask > 0; mask >>= 1) {
        sum += shuffle_xor(sum, mask);
        product *= shuffle_xor(product, mask);
    }
    out[threadIdx.x] = sum;
    floats[threadIdx.x] = product;
}

// Every thread reads what its mirror image wrote, `rounds` times over; `barriers` 3 is right, without
// bit 0 nobody waits before reading, without bit 1 nobody waits before writing again.
FT_KERNEL(256) selftest_mirror(int* out, int rounds, int barriers) {
    await_launches();
    __shared__ int values[256];
    int i = threadIdx.x, sum = 0;
    for (int round = 0; round < rounds; round++) {
        values[i] = i * (round + 1);
        if (barriers & 1) __syncthreads();
        // Lanes meet, so that warps get far from each other.
        sum += shuffle_xor(0, 1) + values[255 - i];
        if (barriers & 2) __syncthreads();
    }
    out[blockIdx.x * 256 + i] = sum;
}

// Copies a tile through shared memory; where not `waits` it is read before it need be there.
FT_KERNEL(128) selftest_copy(const uint4* from, uint4* to, int waits) {
    await_launches();
    FT_SHARED(uint4, tile);
    int i = threadIdx.x;
    copy_async16(&tile[i], &from[i]);
    copy_async_commit();
    copy_async16(&tile[128 + i], &from[128 + i]);
    copy_async_commit();
    if (waits) copy_async_wait<1>();
    __syncthreads();
    to[i] = tile[127 - i];
    if (waits) copy_async_wait<0>();
    __syncthreads();
    to[128 + i] = tile[255 - i];
}

// c [16, 8] = a [16, 32] b [32, 8] with a in rows and b in columns.
FT_KERNEL(32) selftest_mma_u8i8(const u32* a, const u32* b, int* c) {
    await_launches();
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 rows[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + 4 + t], a[(g + 8) * 8 + 4 + t]};
    u32 columns[2] = {b[g * 8 + t], b[g * 8 + 4 + t]};
    int sums[4] = {1, 2, 3, 4};
    mma_u8i8(sums, rows, columns);
    c[g * 8 + 2 * t] = sums[0] - 1;
    c[g * 8 + 2 * t + 1] = sums[1] - 2;
    c[(g + 8) * 8 + 2 * t] = sums[2] - 3;
    c[(g + 8) * 8 + 2 * t + 1] = sums[3] - 4;
}

// c [16, 8] = a [16, 16] b [16, 8], f16 in rows and in columns; a passes through ldmatrix.
FT_KERNEL(32) selftest_mma_f16(const u16* a, const u32* b, float* c) {
    await_launches();
    FT_SHARED(u16, tile);
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += 32) tile[i] = a[i];
    __syncthreads();
    u32 rows[4];
    // Matrices in the order of the fragment: rows 0 .. 8, rows 8 .. 16, then their columns 8 .. 16.
    ldmatrix4(rows, &tile[(lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8]);
    u32 columns[2] = {b[g * 8 + t], b[g * 8 + 4 + t]};
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_f16(sums, rows, columns);
    c[g * 8 + 2 * t] = sums[0];
    c[g * 8 + 2 * t + 1] = sums[1];
    c[(g + 8) * 8 + 2 * t] = sums[2];
    c[(g + 8) * 8 + 2 * t + 1] = sums[3];
}

// c [16, 8] = a [16, 16] b [16, 8], bf16 in rows; b [16, 8] in rows too, turned by ldmatrix.
FT_KERNEL(32) selftest_mma_bf16(const u32* a, const u16* b, float* c) {
    await_launches();
    FT_SHARED(u16, tile);
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 128; i += 32) tile[i] = b[i];
    __syncthreads();
    u32 rows[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + 4 + t], a[(g + 8) * 8 + 4 + t]}, columns[4];
    ldmatrix4_transposed(columns, &tile[lane % 16 * 8]);
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_bf16(sums, rows, columns);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// All 65,536 halves to f32 and back.
FT_KERNEL(256) selftest_halves(float* wide, u16* narrow) {
    await_launches();
    u32 i = blockIdx.x * 256 + threadIdx.x;
    wide[i] = f16_to_f32((u16)i);
    narrow[i] = f32_to_f16(wide[i]);
}

// f32 to halves.
FT_KERNEL(256) selftest_narrow(const float* from, u16* to) {
    await_launches();
    u32 i = blockIdx.x * 256 + threadIdx.x;
    to[i] = f32_to_f16(from[i]);
}

// Writes and reads at an index of the caller's.
FT_KERNEL(32) selftest_touch(int* to, const int* from, int write_at, int read_at) {
    await_launches();
    if (threadIdx.x == 7) to[write_at] = from[read_at];
}

// Thread `who` writes behind `shared` ints of shared memory.
FT_KERNEL(32) selftest_shared_overrun(int count) {
    await_launches();
    FT_SHARED(int, values);
    values[threadIdx.x] = 0;
    if (threadIdx.x == 3) values[count] = 0;
}

// 0: half of the threads wait at another barrier. 1: half never come. 2: one lane is missing in a
// shuffle. 3: two shuffles that differ. 4: right.
FT_KERNEL(64) selftest_diverge(int* out, int how) {
    await_launches();
    int i = threadIdx.x, value = i;
    if (how == 0 && i >= 32) {
        __syncthreads();
    } else if (how != 1 || i < 32) {
        __syncthreads();
    }
    if (how == 3 && i % 2) {
        value += shuffle_xor(value, 2);
    } else if (how != 2 || i != 40) {
        value += shuffle_xor(value, 2);
    }
    out[i] = value;
}

// Shared memory before anything was written to it.
FT_KERNEL(32) selftest_poison(u32* out) {
    await_launches();
    FT_SHARED(u32, dynamic);
    __shared__ u32 fixed[32];
    out[threadIdx.x] = dynamic[threadIdx.x];
    out[32 + threadIdx.x] = fixed[threadIdx.x];
    dynamic[threadIdx.x] = fixed[threadIdx.x] = 1;
}

// The order in which threads came, for all blocks: ticket [blocks * 64].
FT_KERNEL(64) selftest_order(int* counter, int* ticket) {
    await_launches();
    ticket[blockIdx.x * 64 + threadIdx.x] = atomicAdd(counter, 1);
}

FT_KERNEL(256) selftest_empty(int* unused) {
    await_launches();
}

// The last of a launch's blocks writes what all have added up.
FT_KERNEL(64) selftest_last(u32* counter, int* sum, int* out) {
    await_launches();
    __shared__ u32 flag;
    if (threadIdx.x == 0) atomicAdd(sum, (int)blockIdx.x + 1);
    if (is_last_block(counter, gridDim.x, &flag) && threadIdx.x == 0) out[0] = *sum;
}

// Thread 5 does not wait for the launches before.
FT_KERNEL(32) selftest_hasty(int* unused) {
    if (threadIdx.x != 5) await_launches();
}
