// Heads between their projection and attention: norm, rotation, and keys and values into the paged cache.
//
//   norm   x = x / sqrt(mean(x^2) + eps) * weight, each head of `width` columns by itself
//   turn   columns i and i + half of a head turn by position * speed[i]; half is half the columns that turn
//   cache  [blocks, KV heads, block_len, width] f16; a sequence's block table says where position p lies:
//          block p / block_len of the table, row p % block_len
//
//   heads      all of it for the query, key and value heads of a token, a warp a head: queries stay in
//              their slot, keys and values go to the cache
//   head_norm, rope, kv_write   one of it each, for programs that do something else between them: the same
//              bits, as the same functions compute them
//   bytes      each head once in and once out; a head's columns meet in shared memory
// Reference: kernels/src/reference. Counts of rows come from device memory (`step`), so that a recorded
// launch serves steps of any size up to its grid.

#define STEP_TOKENS 0

// The norm of a head by a warp.
FT_DEVICE void norm_head(const float* x, const float* weight, float eps, int width, float* out) {
    int lane = threadIdx.x % 32;
    float square = 0.0f;
    for (int i = lane; i < width; i += 32) square = fmaf(x[i], x[i], square);
    float inverse = 1.0f / sqrtf(warp_sum(square) / (float)width + eps);
    for (int i = lane; i < width; i += 32) out[i] = x[i] * inverse * weight[i];
}

// A rotary table: `speeds` [rows, width / 2], `rows` names each token's row.
struct Rotary {
    const u32* positions;
    const float* speeds;
    const u32* rows;
    int width;
    float amplitude;
};

// Turns columns i and i + width / 2 of a head.
FT_DEVICE void turn(const Rotary& rotary, int token, int i, float* x) {
    int half = rotary.width / 2;
    // The angle is an f32 product, as model code computes it.
    float angle = __fmul_rn((float)rotary.positions[token], rotary.speeds[(u64)rotary.rows[token] * half + i]);
    float sine, cosine;
    sincosf(angle, &sine, &cosine);
    sine *= rotary.amplitude;
    cosine *= rotary.amplitude;
    float a = x[i], b = x[i + half];
    x[i] = fmaf(a, cosine, -(b * sine));
    x[i + half] = fmaf(b, cosine, a * sine);
}

// Where a layer's cache has a token's row of the first KV head, and how far apart heads are.
struct Place {
    u64 first, apart;
};

FT_DEVICE Place place_of(const u32* positions, const u32* sequences, const u32* table_starts, const u32* table, int token,
                         int heads, int width, int block_len) {
    int position = positions[token];
    u64 block = table[table_starts[sequences[token]] + position / block_len], apart = (u64)block_len * width;
    return Place{block * heads * apart + (u64)(position % block_len) * width, apart};
}

// One warp a head. grid (heads / 8, t)
FT_KERNEL(256) head_norm(const u32* step, float* slot, const float* weight, int slot_width, int start, int heads, int width,
                         float eps) {
    await_launches();
    int row = blockIdx.y, head = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= step[STEP_TOKENS] || head >= heads) return;
    float* x = slot + (u64)row * slot_width + start + head * width;
    norm_head(x, weight, eps, width, x);
}

// grid (heads * width / 2 / 256, t)
FT_KERNEL(256) rope(const u32* step, float* slot, const u32* positions, const float* speeds, const u32* speed_rows,
                    int slot_width, int start, int heads, int head_width, int width, float amplitude) {
    await_launches();
    int row = blockIdx.y, item = blockIdx.x * 256 + threadIdx.x, half = width / 2;
    if (row >= step[STEP_TOKENS] || item >= heads * half) return;
    Rotary rotary = {positions, speeds, speed_rows, width, amplitude};
    turn(rotary, row, item % half, slot + (u64)row * slot_width + start + item / half * head_width);
}

// grid (heads * width / 256, t)
FT_KERNEL(256) kv_write(const u32* step, const float* k, const float* v, u16* keys, u16* values, const u32* positions,
                        const u32* sequences, const u32* table_starts, const u32* table, int heads, int width, int block_len,
                        int k_width, int k_start, int v_width, int v_start) {
    await_launches();
    int row = blockIdx.y, item = blockIdx.x * 256 + threadIdx.x;
    if (row >= step[STEP_TOKENS] || item >= heads * width) return;
    Place place = place_of(positions, sequences, table_starts, table, row, heads, width, block_len);
    u64 to = place.first + item / width * place.apart + item % width;
    keys[to] = f32_to_f16(k[(u64)row * k_width + k_start + item]);
    values[to] = f32_to_f16(v[(u64)row * v_width + v_start + item]);
}

// A warp copies a head into the cache.
FT_DEVICE void cache_head(u16* to, const float* x, int width) {
    for (int i = threadIdx.x % 32; i < width; i += 32) to[i] = f32_to_f16(x[i]);
}

// Columns `start ..` of a slot are `q_heads` heads of queries and then `kv_heads` of keys, which stay there
// too if `keeps`. A norm without weights is none. Shared memory: a row of `width` f32 a warp.
// grid ((q_heads + 2 kv_heads) / 8, t)
FT_KERNEL(256) heads(const u32* step, float* slot, const float* v_slot, const u32* positions, const float* speeds,
                     const u32* speed_rows, const float* q_norm, const float* k_norm, u16* keys, u16* values,
                     const u32* sequences, const u32* table_starts, const u32* table, int slot_width, int start, int q_heads,
                     int kv_heads, int v_width, int v_start, int width, int rope_width, int block_len, int keeps,
                     float amplitude, float q_eps, float k_eps) {
    await_launches();
    FT_SHARED(float, rows);
    int token = blockIdx.y, head = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= step[STEP_TOKENS] || head >= q_heads + 2 * kv_heads) return;
    int kv_head = head - q_heads;
    Place place = {0, 0};
    if (kv_head >= 0) place = place_of(positions, sequences, table_starts, table, token, kv_heads, width, block_len);
    if (kv_head >= kv_heads) {
        const float* x = v_slot + (u64)token * v_width + v_start + (kv_head - kv_heads) * width;
        cache_head(values + place.first + (kv_head - kv_heads) * place.apart, x, width);
        return;
    }
    float *from = slot + (u64)token * slot_width + start + head * width, *x = rows + threadIdx.x / 32 * width;
    const float* weight = kv_head < 0 ? q_norm : k_norm;
    if (weight) {
        norm_head(from, weight, kv_head < 0 ? q_eps : k_eps, width, x);
    } else {
        for (int i = lane; i < width; i += 32) x[i] = from[i];
    }
    __syncwarp();
    Rotary rotary = {positions, speeds, speed_rows, rope_width, amplitude};
    for (int i = lane; i < rope_width / 2; i += 32) turn(rotary, token, i, x);
    __syncwarp();
    if (kv_head >= 0) cache_head(keys + place.first + kv_head * place.apart, x, width);
    if (kv_head >= 0 && !keeps) return;
    for (int i = lane; i < width; i += 32) from[i] = x[i];
}
