// Attention of single tokens over the paged cache (heads.cu writes it), for heads of any width: those of
// 16, 32, 64, 80, 96 and 128 columns go to attention_mma.cu.
//
//   score[p] = scale * (q . k[p])    out = sum over p of exp(score[p] - max) v[p] / sum of exp
//
//   caches [blocks, KV heads, block_len, width] f16; a sequence's block table says where position p
//          lies: block p / block_len of the table, row p % block_len
//   walk   chunks of 128 positions at multiples of 128 of the absolute position, and of these the two
//          of a split together. A split carries maximum and sum from chunk to chunk (online softmax) and
//          gives a partial result; partial results are added in ascending order
//   split  a block of 128 threads takes up to 8 query heads of one token that share a KV head. A chunk's
//          keys, then its values, pass through shared memory: a thread a position for the scores, a
//          thread a column for the outputs. Where tokens are few (`apart`) each split has a block of its
//          own and `attend_join` adds them; else one block walks all splits and adds them as it goes
//   bytes  every visible key and value once for each token and 8 heads
//
// Splits and chunks are laid out by absolute position and added in one order, so neither the block
// length, nor the tokens beside it, nor `apart` change a bit of a query. Positions it does not see add
// nothing, and none that nobody sees is read. Reference: reference::ops::attend.

#define CHUNK 128
#define SPLIT 256
#define HEADS 8
#define STEP_TOKENS 0

// A layer's cache and the step's tables.
struct Cache {
    u16* keys;
    u16* values;
    const u32* positions;     // [t]
    const u32* sequences;     // [t] whose tokens they are
    const u32* table_starts;  // [s]
    const u32* table;
    int heads, width, block_len;
};

// First element of a position's row of one KV head.
FT_DEVICE u64 cache_row(const Cache& cache, int sequence, int head, int position) {
    u64 block = cache.table[cache.table_starts[sequence] + position / cache.block_len];
    return ((block * cache.heads + head) * cache.block_len + position % cache.block_len) * cache.width;
}

// One block's queries: `count` heads of a token from `first` on, and what it sees.
struct Queries {
    int token, kv_head, first, count;
    int seen_start, seen_end;
};

// Shared memory of a block; `rows` has 8 columns more than needed so that threads that read a row each
// meet different banks.
struct Scratch {
    float* q;       // [HEADS, width]
    float* scores;  // [HEADS, CHUNK]
    float* carry;   // [HEADS, 3]: maximum, sum, factor of what was added before
    u16* rows;      // [CHUNK, width + 8]
};

// Copies the seen rows of a chunk into shared memory.
FT_DEVICE void stage(const Cache& cache, const u16* from, const Queries& queries, int start, int end, const Scratch& s) {
    int width = cache.width, stride = width + 8, sequence = cache.sequences[queries.token];
    if (width % 8 == 0) {
        int vectors = width / 8;
        for (int i = threadIdx.x; i < (end - start) * vectors; i += CHUNK) {
            int p = start + i / vectors, at = i % vectors * 8;
            *(uint4*)(s.rows + p % CHUNK * stride + at) = *(const uint4*)(from + cache_row(cache, sequence, queries.kv_head, p) + at);
        }
    } else {
        for (int i = threadIdx.x; i < (end - start) * width; i += CHUNK) {
            int p = start + i / width, at = i % width;
            s.rows[p % CHUNK * stride + at] = from[cache_row(cache, sequence, queries.kv_head, p) + at];
        }
    }
}

// Scores of this thread's position; minus infinity where it is not seen.
FT_DEVICE void score(const Queries& queries, int start, int end, int width, float scale, const Scratch& s) {
    int in_chunk = threadIdx.x, position = start / CHUNK * CHUNK + in_chunk;
    float dots[HEADS] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    bool seen = position >= start && position < end;
    if (seen) {
        const u16* key = s.rows + in_chunk * (width + 8);
        for (int i = 0; i < width; i++) {
            float k = f16_to_f32(key[i]);
#pragma unroll
            for (int h = 0; h < HEADS; h++) dots[h] = fmaf(s.q[h * width + i], k, dots[h]);
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        s.scores[h * CHUNK + in_chunk] = seen ? dots[h] * scale : -INFINITE;
    }
}

// Turns a chunk's scores into weights and updates maximum and sum; a warp takes every fourth head.
FT_DEVICE void soften(const Queries& queries, const Scratch& s) {
    int lane = threadIdx.x % 32;
    for (int h = threadIdx.x / 32; h < queries.count; h += 4) {
        float* scores = s.scores + h * CHUNK;
        float before = s.carry[3 * h], most = before;
        for (int i = lane; i < CHUNK; i += 32) most = fmaxf(most, scores[i]);
        for (int mask = 16; mask > 0; mask >>= 1) most = fmaxf(most, shuffle_xor(most, mask));
        float sum = 0.0f;
        for (int i = lane; i < CHUNK; i += 32) {
            float weight = expf(scores[i] - most);
            scores[i] = weight;
            sum += weight;
        }
        for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
        float factor = expf(before - most);
        if (lane == 0) {
            s.carry[3 * h + 1] = fmaf(s.carry[3 * h + 1], factor, sum);
            s.carry[3 * h] = most;
            s.carry[3 * h + 2] = factor;
        }
    }
}

// Adds a chunk's weighted values to this thread's column `column` of all heads.
FT_DEVICE void mix(int start, int end, int width, int column, const Scratch& s, float* outs) {
#pragma unroll
    for (int h = 0; h < HEADS; h++) outs[h] *= s.carry[3 * h + 2];
    for (int p = start; p < end; p++) {
        float v = f16_to_f32(s.rows[p % CHUNK * (width + 8) + column]);
#pragma unroll
        for (int h = 0; h < HEADS; h++) outs[h] = fmaf(s.scores[h * CHUNK + p % CHUNK], v, outs[h]);
    }
}

// One more partial result: what it and what was added before are to be multiplied by.
FT_DEVICE void join(float* most, float* sum, float part_most, float part_sum, float* old_factor, float* new_factor) {
    float all = fmaxf(*most, part_most);
    *old_factor = expf(*most - all);
    *new_factor = expf(part_most - all);
    *sum = fmaf(part_sum, *new_factor, *sum * *old_factor);
    *most = all;
}

// A partial result: this thread's two columns, and maximum and sum.
FT_DEVICE void store_part(float* part, int width, const float* carry, float first, float second) {
    if ((int)threadIdx.x < width) part[threadIdx.x] = first;
    if ((int)threadIdx.x + CHUNK < width) part[threadIdx.x + CHUNK] = second;
    if (threadIdx.x < 2) part[width + threadIdx.x] = carry[threadIdx.x];
}

FT_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
FT_DEVICE int max_int(int a, int b) { return a > b ? a : b; }

// The partial result of split `split`: columns `threadIdx.x` and, if there are more, those 128 further
// on, of all heads; maximum and sum in `carry`.
FT_DEVICE void attend_split(const Cache& cache, const Queries& queries, int split, float scale, const Scratch& s,
                            float outs[2][HEADS]) {
    int width = cache.width;
    // The split before may still be read.
    __syncthreads();
    if (threadIdx.x < HEADS) {
        s.carry[3 * threadIdx.x] = -INFINITE;
        s.carry[3 * threadIdx.x + 1] = 0.0f;
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) outs[0][h] = outs[1][h] = 0.0f;
    int from = max_int(queries.seen_start, split * SPLIT), to = min_int(queries.seen_end, (split + 1) * SPLIT);
    for (int start = from; start < to; start = start / CHUNK * CHUNK + CHUNK) {
        int end = min_int(to, start / CHUNK * CHUNK + CHUNK);
        __syncthreads();
        stage(cache, cache.keys, queries, start, end, s);
        __syncthreads();
        score(queries, start, end, width, scale, s);
        __syncthreads();
        soften(queries, s);
        stage(cache, cache.values, queries, start, end, s);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int column = threadIdx.x + j * CHUNK;
            if (column < width) mix(start, end, width, column, s, outs[j]);
        }
    }
}

// The queries of this block: grid (splits or 1, t, KV heads * ceil(shared / HEADS)).
FT_DEVICE Queries queries_of(const Cache& cache, int q_heads, int window) {
    Queries queries;
    int shared = q_heads / cache.heads, parts = (shared + HEADS - 1) / HEADS;
    queries.token = blockIdx.y;
    queries.kv_head = blockIdx.z / parts;
    int part = blockIdx.z % parts;
    queries.first = queries.kv_head * shared + part * HEADS;
    queries.count = min_int(HEADS, shared - part * HEADS);
    queries.seen_end = cache.positions[queries.token] + 1;
    queries.seen_start = window > 0 ? max_int(0, queries.seen_end - window) : 0;
    return queries;
}

// Attention of each token: `out` [t, q_heads * width]; where `apart`, partial results in `parts`
// [t, q_heads, splits, width + 2] instead: columns, then maximum and sum. `window` 0 sees everything.
FT_KERNEL(128) attend(const u32* step, const float* q, u16* keys, u16* values, const u32* positions, const u32* sequences,
                      const u32* table_starts, const u32* table, float* out, float* parts, int heads, int width,
                      int block_len, int q_heads, int q_width, int q_start, int window, int splits, int apart, float scale) {
    await_launches();
    if (blockIdx.y >= step[STEP_TOKENS]) return;
    Cache cache = {keys, values, positions, sequences, table_starts, table, heads, width, block_len};
    Queries queries = queries_of(cache, q_heads, window);
    FT_SHARED(float, memory);
    Scratch s = {memory, memory + HEADS * width, memory + HEADS * (width + CHUNK), (u16*)(memory + HEADS * (width + CHUNK + 4))};
    int first = queries.seen_start / SPLIT, last = (queries.seen_end - 1) / SPLIT;
    if (apart && ((int)blockIdx.x < first || (int)blockIdx.x > last)) return;
    for (int i = threadIdx.x; i < HEADS * width; i += CHUNK) {
        int h = i / width;
        const float* from = q + (u64)queries.token * q_width + q_start + (queries.first + h) * width;
        s.q[i] = h < queries.count ? from[i % width] : 0.0f;
    }
    float sums[2][HEADS], most[HEADS], total[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        most[h] = -INFINITE;
        total[h] = sums[0][h] = sums[1][h] = 0.0f;
    }
    if (apart) first = last = blockIdx.x;
    for (int split = first; split <= last; split++) {
        float outs[2][HEADS];
        attend_split(cache, queries, split, scale, s, outs);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float old_factor, new_factor;
            if (apart) {
                u64 at = ((u64)queries.token * q_heads + queries.first + h) * splits + split;
                if (h < queries.count) store_part(parts + at * (width + 2), width, s.carry + 3 * h, outs[0][h], outs[1][h]);
            } else {
                join(&most[h], &total[h], s.carry[3 * h], s.carry[3 * h + 1], &old_factor, &new_factor);
                sums[0][h] = fmaf(outs[0][h], new_factor, sums[0][h] * old_factor);
                sums[1][h] = fmaf(outs[1][h], new_factor, sums[1][h] * old_factor);
            }
        }
    }
    if (apart) return;
    float* row = out + ((u64)queries.token * q_heads + queries.first) * width;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float inverse = 1.0f / total[h];
        if (h < queries.count && threadIdx.x < width) row[h * width + threadIdx.x] = sums[0][h] * inverse;
        if (h < queries.count && threadIdx.x + CHUNK < width) row[h * width + threadIdx.x + CHUNK] = sums[1][h] * inverse;
    }
}

// Adds the partial results of a token's head; returns where the token's row stands.
FT_DEVICE const float* join_parts(const u32* positions, const float* parts, float* out, int width, int q_heads, int window,
                                  int splits) {
    int token = blockIdx.y, head = blockIdx.x;
    int seen_end = positions[token] + 1, seen_start = window > 0 ? max_int(0, seen_end - window) : 0;
    const float* from = parts + ((u64)token * q_heads + head) * splits * (width + 2);
    float most = -INFINITE, total = 0.0f, sum = 0.0f;
    int column = threadIdx.x;
    for (int split = seen_start / SPLIT; split <= (seen_end - 1) / SPLIT; split++) {
        const float* part = from + (u64)split * (width + 2);
        float old_factor, new_factor;
        join(&most, &total, part[width], part[width + 1], &old_factor, &new_factor);
        if (column < width) sum = fmaf(part[column], new_factor, sum * old_factor);
    }
    float* row = out + (u64)token * q_heads * width;
    if (column < width) row[head * width + column] = sum * (1.0f / total);
    return row;
}

// grid (q_heads, t)
FT_KERNEL(256) attend_join(const u32* step, const u32* positions, const float* parts, float* out, int width, int q_heads,
                           int window, int splits) {
    await_launches();
    if (blockIdx.y < step[STEP_TOKENS]) join_parts(positions, parts, out, width, q_heads, window, splits);
}

// The same, and its rows quantized: a head is whole blocks, and in order. grid (q_heads, t)
FT_KERNEL(256) attend_join_quantize(const u32* step, const u32* positions, const float* parts, float* out, int width, int q_heads,
                                    int window, int splits, QUANTIZED_PARAMETERS) {
    await_launches();
    if (blockIdx.y >= step[STEP_TOKENS]) return;
    const float* row = join_parts(positions, parts, out, width, q_heads, window, splits);
    __syncthreads();
    int first = blockIdx.x * (width / block);
    quantize_blocks<1>(QUANTIZED, row, blockIdx.y, first, first + width / block);
}
