// Attention on tensor cores, for heads of 16 to 128 columns: one token or thousands, over the paged cache.
//
//   x[p] = scale * log2(e) * (q . k[p])    out = sum over p of 2^x[p] v[p] / sum of 2^x[p]
//
//   tile   up to 64 rows of one sequence that share a KV head: row r is token r / shared and query head
//          r % shared, so every key and value is read once for all tokens and heads of a tile
//              head  0 1 2 3 0 1 2 3 ..
//              token 0 0 0 0 1 1 1 1 ..     <- rows
//          a block is launched for each token and returns where that token does not begin a tile
//   walk   chunks of 64 positions at multiples of 64 of the absolute position, four of them a split. A
//          split carries maximum and sum from chunk to chunk (online softmax) and gives a partial result;
//          partial results are added in ascending order
//   split  few tokens: up to 64 blocks a tile, each with every 64th split; what a split gives goes to
//          `parts`, and the block that comes last adds it all up. Many tokens, or one split in all: one
//          block, which adds to `out` as it goes. Within a block of four warps:
//            at most 16 rows   warps divide the positions of a chunk for scores (all chunks of a split first,
//                              which gives the maxima), then the columns for the outputs
//            more rows         each warp has 16 of them
//   memory K and V pass through three stages of 64 rows [64, width + 8] f16 by asynchronous copies; the
//          eight columns more let ldmatrix meet all banks. Positions that no row sees are zeros and are
//          not read. Bytes of shared memory: 384 (width + 8) + 11536; 63760 for 128 columns
//
//   bits   a chunk's steps for a row are the same on both paths: scores by ascending columns, one maximum,
//          weights, outputs by ascending positions. A maximum is rounded up to an integer, so that what
//          was added before is multiplied by a power of two: exactly. A chunk that a row does not see
//          multiplies by 1 and adds zeros. So neither the tile, nor the path, nor who adds the splits
//          changes a bit of a row
//   error  q is high + low, two f16 of 22 bits together, scaled by a power of two so that the largest of
//          a row is near 2^14; weights are f16 of at most 2^LIFT; their sum is that of the rounded
//          ones. kernels/src/conformance/oracle.rs bounds it
//
// Counted, one token of 8 KV heads of 128 at 4096 positions: 16.8 MB are read, 16 splits * 8 heads = 128
// blocks of 131 kB, so nearly every one of 132 SMs has one and 35 kB under way. A block's eight stages
// take about 300 tensor and load instructions of a warp each, 2 us in all, beside 3.6 us for its bytes
// at 36 kB/us, an SM's share of 4.8 TB/s. Beginning (positions, table, first keys) and end (partial
// results, the last block) are some 3 us that nothing hides: about half of the peak for a single
// sequence, more than 80 % where several sequences or 16k positions fill the SMs twice. Partial results
// add 2 % of the bytes for 4 rows, 6 % for 16. Prefill: a chunk and warp take 64 * width / 16 tensor
// instructions for scores (twice, high and low) and half as many for outputs; with 96 loads of matrices
// and some 300 other instructions for 200 tensor ones at 128 columns, about half of what mma.sync gives.
// Not here: other widths (attention.cu), the arithmetic of weights (softmax.cuh), writing the cache.
// Reference: reference::ops::attend.

#define CHUNK 64
#define CHUNKS 4
#define SPLIT (CHUNK * CHUNKS)
#define STAGES 3
#define ROWS 64
#define WARPS 4
#define BATCH 8
#define STEP_TOKENS 0
// Columns of a row of weights in shared memory.
#define WEIGHTS (SPLIT + 8)

FT_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
FT_DEVICE int larger(int a, int b) { return a > b ? a : b; }

// The kernel's arguments.
struct Attention {
    const float* q;
    const u16* keys;
    const u16* values;
    const u32* positions;     // [t]
    const u32* sequences;     // [t] whose tokens they are
    const u32* begins;        // [t] first token of the same sequence in this step
    const u32* ends;          // [t] and the one after its last
    const u32* table_starts;  // [s]
    const u32* table;
    float* out;
    float* parts;   // [t, q_heads, splits, width]
    float2* tops;   // [t, q_heads, splits]: maximum and sum
    u32* counters;  // [t, grid z]
    int heads, block_len, q_heads, q_width, q_start, window, splits;
    float scale;
};

// Rows of a block and what they see.
struct Tile {
    int token, tokens, head, shared, rows;
    int kv_head, position;
    int seen_start, seen_end;
    const u32* table;
};

// Shared memory of a block.
struct Scratch {
    u16* stages;   // [STAGES, CHUNK, width + 8]
    u16* weights;  // [16, WEIGHTS]
    float* most;   // [CHUNKS, WARPS, 16]
    u32* places;   // [2, SPLIT] rows of the cache
};

// The tile that begins at this block's token; none of no rows.
FT_DEVICE Tile tile_of(const Attention& a, int token) {
    Tile tile;
    int group = a.q_heads / a.heads, pieces = gridDim.z / a.heads, piece = blockIdx.z % pieces;
    int share = (group + pieces - 1) / pieces, most = larger(1, ROWS / share);
    int begin = a.begins[token], end = a.ends[token];
    tile.token = token;
    tile.tokens = smaller(most, end - token);
    tile.kv_head = blockIdx.z / pieces;
    tile.head = tile.kv_head * group + piece * share;
    tile.shared = smaller(share, group - piece * share);
    tile.rows = (token - begin) % most == 0 ? tile.tokens * tile.shared : 0;
    tile.position = a.positions[token];
    tile.seen_end = tile.position + tile.tokens;
    tile.seen_start = a.window > 0 ? larger(0, tile.position + 1 - a.window) : 0;
    tile.table = a.table + a.table_starts[a.sequences[token]];
    return tile;
}

// Chunks of a split that some row sees.
FT_DEVICE int chunks_start(const Tile& tile, int split) { return larger(split * CHUNKS, tile.seen_start / CHUNK); }
FT_DEVICE int chunks_end(const Tile& tile, int split) {
    return smaller((split + 1) * CHUNKS, (tile.seen_end + CHUNK - 1) / CHUNK);
}

// Keys and values on their way: chunks of the splits `split`, `split` + `step` .. before `end`. Of each
// split either all keys come first (`keys_first`), or keys and values by turns.
struct Stream {
    int split, step, end, chunk;
    bool keys_first, value;
    int odd;          // which half of `places` the split has
    int asked, taken;  // stages
};

// Notes where the positions of a split lie.
FT_DEVICE void find_places(const Attention& a, const Tile& tile, int split, int odd, const Scratch& s) {
    for (int i = threadIdx.x; i < SPLIT; i += 32 * WARPS) {
        int position = split * SPLIT + i;
        if (position < tile.seen_start || position >= tile.seen_end) continue;
        u32 block = tile.table[position / a.block_len];
        s.places[odd * SPLIT + i] = (block * a.heads + tile.kv_head) * a.block_len + position % a.block_len;
    }
}

// The chunk after this one.
FT_DEVICE void advance(const Tile& tile, Stream& to) {
    int start = chunks_start(tile, to.split), end = chunks_end(tile, to.split);
    if (to.keys_first) {
        to.chunk++;
        if (to.chunk < end) return;
        to.chunk = start;
        to.value = !to.value;
        if (to.value) return;
    } else {
        to.value = !to.value;
        if (to.value) return;
        to.chunk++;
        if (to.chunk < end) return;
    }
    to.split += to.step;
    to.odd ^= 1;
    to.chunk = chunks_start(tile, to.split);
}

// Asks for the next chunk; zeros where nobody sees it. Eight lanes a row.
template <int WIDTH>
FT_DEVICE void ask(const Attention& a, const Tile& tile, Stream& stream, const Scratch& s) {
    if (stream.split < stream.end) {
        const u16* from = stream.value ? a.values : a.keys;
        u16* stage = s.stages + stream.asked * (CHUNK * (WIDTH + 8));
#pragma unroll
        for (int j = 0; j < CHUNK / 16; j++) {
            int row = threadIdx.x / 8 + 16 * j, position = stream.chunk * CHUNK + row;
            bool seen = position >= tile.seen_start && position < tile.seen_end;
            u64 place = seen ? s.places[stream.odd * SPLIT + position % SPLIT] : 0;
#pragma unroll
            for (int k = 0; k < (WIDTH + 63) / 64; k++) {
                int column = threadIdx.x % 8 * 8 + 64 * k;
                if (WIDTH % 64 && column >= WIDTH) continue;
                u16* to = stage + row * (WIDTH + 8) + column;
                if (seen) copy_async16(to, from + place * WIDTH + column);
                else *(uint4*)to = make_uint4(0, 0, 0, 0);
            }
        }
        advance(tile, stream);
    }
    copy_async_commit();
    stream.asked = stream.asked == STAGES - 1 ? 0 : stream.asked + 1;
}

// The next chunk, in place; its stage stands until the next one is taken.
template <int WIDTH>
FT_DEVICE const u16* take(const Attention& a, const Tile& tile, Stream& stream, const Scratch& s) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    ask<WIDTH>(a, tile, stream, s);
    const u16* stage = s.stages + stream.taken * (CHUNK * (WIDTH + 8));
    stream.taken = stream.taken == STAGES - 1 ? 0 : stream.taken + 1;
    return stage;
}

// A warp's queries, of which row `first` is its first, as left operands of tensor instructions.
template <int WIDTH>
FT_DEVICE void load_queries(const Attention& a, const Tile& tile, int first, u32 (*high)[4], u32 (*low)[4], Lines& lines) {
    int lane = threadIdx.x % 32;
    float factor = a.scale * 1.44269504f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = first + lane / 4 + 8 * i, token = row / tile.shared;
        bool real = row < tile.rows;
        int end = tile.position + token + 1;
        lines.end[i] = real ? end : 0;
        lines.start[i] = real && a.window > 0 ? larger(0, end - a.window) : 0;
        const float* from = a.q + (u64)(tile.token + token) * a.q_width + a.q_start + (tile.head + row % tile.shared) * WIDTH;
        float2 values[WIDTH / 8];
        u32 most = 0;
#pragma unroll
        for (int k = 0; k < WIDTH / 8; k++) {
            values[k] = real ? *(const float2*)(from + 8 * k + lane % 4 * 2) : make_float2(0.0f, 0.0f);
            values[k].x *= factor;
            values[k].y *= factor;
            most = max(most, max(__float_as_uint(values[k].x) & 0x7fffffffu, __float_as_uint(values[k].y) & 0x7fffffffu));
        }
        for (int mask = 2; mask > 0; mask >>= 1) most = max(most, (u32)shuffle_xor((int)most, mask));
        // The exponent of the largest becomes 14; a row of zeros and wild ones stay within what f32 has.
        int shift = most ? smaller(100, larger(-113, 14 + 127 - (int)(most >> 23))) : 0;
        float up = __uint_as_float((u32)(127 + shift) << 23);
        lines.unit[i] = __uint_as_float((u32)(127 - shift) << 23);
#pragma unroll
        for (int k = 0; k < WIDTH / 8; k++) {
            float x = values[k].x * up, y = values[k].y * up;
            u32 both = pack_f16(x, y);
            high[k / 2][k % 2 * 2 + i] = both;
            low[k / 2][k % 2 * 2 + i] = pack_f16(x - f16_to_f32((u16)both), y - f16_to_f32((u16)(both >> 16)));
        }
    }
}

// Scores of 16 positions, whose keys begin at `keys`: two tiles of 8.
template <int WIDTH>
FT_DEVICE void score16(const u32 (*high)[4], const u32 (*low)[4], const u16* keys, float (*scores)[4]) {
    int lane = threadIdx.x % 32;
    const u16* row = keys + (lane % 8 + lane / 16 * 8) * (WIDTH + 8) + lane / 8 % 2 * 8;
    float rest[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) scores[i / 4][i % 4] = rest[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++) {
        u32 b[4];
        ldmatrix4(b, row + 16 * k);
        mma_f16(scores[0], high[k], b);
        mma_f16(scores[1], high[k], b + 2);
        mma_f16(rest[0], low[k], b);
        mma_f16(rest[1], low[k], b + 2);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) scores[i / 4][i % 4] += rest[i / 4][i % 4];
}

// The same by what all warps noted of chunk `c` of a split.
FT_DEVICE Factors raise_by(const Scratch& s, int c, const Lines& lines, float* most) {
    const float* of = s.most + c * WARPS * 16 + threadIdx.x % 32 / 4;
    float scores[2];
#pragma unroll
    for (int i = 0; i < 2; i++) scores[i] = fmaxf(fmaxf(of[8 * i], of[16 + 8 * i]), fmaxf(of[32 + 8 * i], of[48 + 8 * i]));
    return raise(lines, scores, most);
}

// A split's result: a warp's 16 rows, and of the columns the UNITS pieces of 16 from `first` on, every
// STEP-th. `sum` is as one more tile of outputs, of values that are all 1.
template <int UNITS>
struct Part {
    float out[UNITS][2][4];
    float sum[4];
    float most[2];
};

template <int UNITS>
FT_DEVICE void clear(Part<UNITS>& part) {
#pragma unroll
    for (int i = 0; i < 8 * UNITS; i++) part.out[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) part.sum[i] = 0.0f;
    part.most[0] = part.most[1] = -INFINITE;
}

// Multiplies what was added before.
template <int UNITS>
FT_DEVICE void multiply(Part<UNITS>& part, Factors factors) {
    if (!__any_sync(0xffffffffu, factors.of[0] != 1.0f || factors.of[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < 8 * UNITS; i++) part.out[i / 8][i / 4 % 2][i % 4] *= factors.of[i % 4 / 2];
#pragma unroll
    for (int i = 0; i < 4; i++) part.sum[i] *= factors.of[i / 2];
}

// Adds 16 positions, whose values begin at `values`, by their weights.
template <int WIDTH, int UNITS, int STEP>
FT_DEVICE void mix16(const u32* weights, const u16* values, int first, Part<UNITS>& part) {
    int lane = threadIdx.x % 32;
    const u16* row = values + lane % 16 * (WIDTH + 8) + lane / 16 * 8;
    const u32 ones[2] = {0x3c003c00u, 0x3c003c00u};
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
        int unit = first + STEP * i;
        if (UNITS * STEP > WIDTH / 16 && unit >= WIDTH / 16) continue;
        u32 b[4];
        ldmatrix4_transposed(b, row + 16 * unit);
        mma_f16(part.out[i][0], weights, b);
        mma_f16(part.out[i][1], weights, b + 2);
    }
    mma_f16(part.sum, weights, ones);
}

// A split of at most 16 rows: the warps divide positions, then columns.
template <int WIDTH, int UNITS>
FT_DEVICE void attend_together(const Attention& a, const Tile& tile, Stream& stream, const Scratch& s, int split,
                               const u32 (*high)[4], const u32 (*low)[4], const Lines& lines, Part<UNITS>& part) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int start = chunks_start(tile, split), end = chunks_end(tile, split);
    float scores[CHUNKS][2][4];
    // No copies of the loops' bodies: scores move on by one chunk instead.
#pragma unroll 1
    for (int chunk = split * CHUNKS; chunk < (split + 1) * CHUNKS; chunk++) {
#pragma unroll
        for (int i = 0; i < 8 * (CHUNKS - 1); i++) scores[i / 8][i / 4 % 2][i % 4] = scores[i / 8 + 1][i / 4 % 2][i % 4];
        if (chunk < start || chunk >= end) continue;
        const u16* keys = take<WIDTH>(a, tile, stream, s);
        score16<WIDTH>(high, low, keys + 16 * warp * (WIDTH + 8), scores[CHUNKS - 1]);
        hide(lines, chunk * CHUNK + 16 * warp, scores[CHUNKS - 1]);
        float most[2] = {-INFINITE, -INFINITE};
        take_most(scores[CHUNKS - 1], most);
        agree(most);
        float* to = s.most + (chunk % CHUNKS * WARPS + warp) * 16 + lane / 4;
        if (lane % 4 == 0) {
            to[0] = most[0];
            to[8] = most[1];
        }
    }
    __syncthreads();
    float most[2] = {-INFINITE, -INFINITE};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int chunk = split * CHUNKS + c;
        if (chunk < start || chunk >= end) continue;
        raise_by(s, c, lines, most);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32* to = (u32*)(s.weights + (lane / 4 + 8 * i) * WEIGHTS + c * CHUNK + 16 * warp) + lane % 4;
            to[0] = weigh(scores[c][0][2 * i], scores[c][0][2 * i + 1], lines.unit[i], lift(most[i]));
            to[4] = weigh(scores[c][1][2 * i], scores[c][1][2 * i + 1], lines.unit[i], lift(most[i]));
        }
    }
    clear(part);
#pragma unroll 1
    for (int chunk = start; chunk < end; chunk++) {
        // This barrier is also the weights'.
        const u16* values = take<WIDTH>(a, tile, stream, s);
        multiply(part, raise_by(s, chunk % CHUNKS, lines, part.most));
        const u16* row = s.weights + lane % 16 * WEIGHTS + chunk % CHUNKS * CHUNK + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            u32 weights[4];
            ldmatrix4(weights, row + 16 * k);
            mix16<WIDTH, UNITS, WARPS>(weights, values + 16 * k * (WIDTH + 8), warp, part);
        }
    }
}

// A split of more rows: a warp has 16 of them, and all columns.
template <int WIDTH, int UNITS>
FT_DEVICE void attend_by_rows(const Attention& a, const Tile& tile, Stream& stream, const Scratch& s, int split,
                              const u32 (*high)[4], const u32 (*low)[4], const Lines& lines, Part<UNITS>& part) {
    bool works = (int)threadIdx.x / 32 * 16 < tile.rows;
    int end = chunks_end(tile, split), window_end = a.window > 0 ? tile.seen_end - a.window : 0;
    clear(part);
    for (int chunk = chunks_start(tile, split); chunk < end; chunk++) {
        const u16* keys = take<WIDTH>(a, tile, stream, s);
        u32 weights[CHUNK / 16][4];
        if (works) {
            // Every row sees all of most chunks.
            bool whole = chunk * CHUNK >= window_end && (chunk + 1) * CHUNK <= tile.position + 1;
            float scores[CHUNK / 16][2][4], most[2] = {-INFINITE, -INFINITE};
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++) {
                score16<WIDTH>(high, low, keys + 16 * k * (WIDTH + 8), scores[k]);
                if (!whole) hide(lines, chunk * CHUNK + 16 * k, scores[k]);
                take_most(scores[k], most);
            }
            agree(most);
            multiply(part, raise(lines, most, part.most));
#pragma unroll
            for (int i = 0; i < CHUNK / 4; i++) {
                const float* two = scores[i / 4][i % 4 / 2] + i % 2 * 2;
                weights[i / 4][i % 4] = weigh(two[0], two[1], lines.unit[i % 2], lift(part.most[i % 2]));
            }
        }
        const u16* values = take<WIDTH>(a, tile, stream, s);
        if (!works) continue;
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            mix16<WIDTH, UNITS, 1>(weights[k], values + 16 * k * (WIDTH + 8), 0, part);
        }
    }
}

// Maxima and sums of a lane's rows over the splits so far.
struct Total {
    float most[2], sum[2];
};

// Where a row's results lie, in heads of tokens.
FT_DEVICE u64 place_of(const Attention& a, const Tile& tile, int row) {
    return (u64)(tile.token + row / tile.shared) * a.q_heads + tile.head + row % tile.shared;
}

// Adds a split's result to `out`; the last one divides by the sum.
template <int WIDTH, int UNITS, int STEP>
FT_DEVICE void add_part(const Attention& a, const Tile& tile, int row, int first, bool is_first, bool is_last,
                        const Part<UNITS>& part, Total& total) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        Join by = join(&total.most[i], &total.sum[i], part.most[i], part.sum[2 * i]);
        if (row + 8 * i >= tile.rows) continue;
        float last_factor = is_last ? 1.0f / total.sum[i] : 1.0f;
        float* to = a.out + place_of(a, tile, row + 8 * i) * WIDTH + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < 2 * UNITS; j++) {
            int unit = first + STEP * (j / 2);
            if (UNITS * STEP > WIDTH / 16 && unit >= WIDTH / 16) continue;
            float2* at = (float2*)(to + 16 * unit + j % 2 * 8);
            float2 sum = is_first ? make_float2(0.0f, 0.0f) : *at;
            const float* two = part.out[j / 2][j % 2] + 2 * i;
            sum.x = fmaf(two[0], by.new_factor, sum.x * by.old_factor) * last_factor;
            sum.y = fmaf(two[1], by.new_factor, sum.y * by.old_factor) * last_factor;
            *at = sum;
        }
    }
}

// Leaves a split's result for the block that adds them up.
template <int WIDTH, int UNITS, int STEP>
FT_DEVICE void store_part(const Attention& a, const Tile& tile, int row, int first, int split, const Part<UNITS>& part) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (row + 8 * i >= tile.rows) continue;
        u64 place = place_of(a, tile, row + 8 * i) * a.splits + split;
        float* to = a.parts + place * WIDTH + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < 2 * UNITS; j++) {
            int unit = first + STEP * (j / 2);
            if (UNITS * STEP > WIDTH / 16 && unit >= WIDTH / 16) continue;
            const float* two = part.out[j / 2][j % 2] + 2 * i;
            *(float2*)(to + 16 * unit + j % 2 * 8) = make_float2(two[0], two[1]);
        }
        if (first == 0 && threadIdx.x % 4 == 0) a.tops[place] = make_float2(part.most[i], part.sum[2 * i]);
    }
}

// Adds up the splits `split` .. `end` of all rows: a warp a row, a lane four columns.
template <int WIDTH>
FT_DEVICE void join_parts(const Attention& a, const Tile& tile, int start, int end) {
    int lane = threadIdx.x % 32;
    if (WIDTH < 128 && lane >= WIDTH / 4) return;
    for (int row = threadIdx.x / 32; row < tile.rows; row += WARPS) {
        u64 place = place_of(a, tile, row);
        const float2* tops = a.tops + place * a.splits;
        const float4* parts = (const float4*)(a.parts + place * a.splits * WIDTH) + lane;
        float most = -INFINITE, sum = 0.0f, all[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int split = start; split < end; split += BATCH) {
            float2 top[BATCH];
            float4 part[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                int at = smaller(split + j, end - 1);
                top[j] = tops[at];
                part[j] = parts[at * (WIDTH / 4)];
            }
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                if (split + j >= end) break;
                Join by = join(&most, &sum, top[j].x, top[j].y);
                all[0] = fmaf(part[j].x, by.new_factor, all[0] * by.old_factor);
                all[1] = fmaf(part[j].y, by.new_factor, all[1] * by.old_factor);
                all[2] = fmaf(part[j].z, by.new_factor, all[2] * by.old_factor);
                all[3] = fmaf(part[j].w, by.new_factor, all[3] * by.old_factor);
            }
        }
        float inverse = 1.0f / sum;
        float4 result = {all[0] * inverse, all[1] * inverse, all[2] * inverse, all[3] * inverse};
        *((float4*)(a.out + place * WIDTH) + lane) = result;
    }
}

// Quantizes the rows of `out` that this block has written: a head is whole blocks, and in order.
template <int WIDTH>
FT_DEVICE void quantize_tile(const Attention& a, const Tile& tile, const Quantized& to) {
    __syncthreads();
    int each = WIDTH / to.block, count = tile.rows * each, mine = blocks_of(to, threadIdx.x);
    for (int first = 0; first < count; first += blocks_of(to, 32 * WARPS)) {
        int i = smaller(first + mine, count - 1), row = i / each;
        int token = tile.token + row / tile.shared, block = (tile.head + row % tile.shared) * each + i % each;
        quantize_block(to, a.out + (u64)token * a.q_heads * WIDTH, token, block, first + mine < count);
    }
}

// Splits `first`, `first` + `step` .. before `end` of a tile; `alone` is whether they are all there are.
template <int WIDTH, int UNITS, bool TOGETHER>
FT_DEVICE void attend_splits(const Attention& a, const Tile& tile, const Scratch& s, int first, int step, int end, bool alone) {
    int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4 + (TOGETHER ? 0 : 16 * warp), unit = TOGETHER ? warp : 0;
    constexpr int STEP = TOGETHER ? WARPS : 1;
    Stream stream = {first, step, end, chunks_start(tile, first), TOGETHER, false, 0, 0, 0};
    find_places(a, tile, first, 0, s);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) ask<WIDTH>(a, tile, stream, s);
    u32 high[WIDTH / 16][4], low[WIDTH / 16][4];
    Lines lines;
    load_queries<WIDTH>(a, tile, TOGETHER ? 0 : 16 * warp, high, low, lines);
    Total total = {{-INFINITE, -INFINITE}, {0.0f, 0.0f}};
    int odd = 0;
    for (int split = first; split < end; split += step) {
        // Asked for two stages before they are taken, so noted before the first of this split is.
        odd ^= 1;
        find_places(a, tile, split + step, odd, s);
        Part<UNITS> part;
        if constexpr (TOGETHER) attend_together<WIDTH, UNITS>(a, tile, stream, s, split, high, low, lines, part);
        else attend_by_rows<WIDTH, UNITS>(a, tile, stream, s, split, high, low, lines, part);
        if (alone) add_part<WIDTH, UNITS, STEP>(a, tile, row, unit, split == first, split + step >= end, part, total);
        else store_part<WIDTH, UNITS, STEP>(a, tile, row, unit, split, part);
    }
}

template <int WIDTH>
FT_DEVICE void attend_tile(const u32* step, const Attention& a, const Quantized& to) {
    await_launches();
    // The last tokens see most, so their blocks begin first.
    int token = gridDim.y - 1 - blockIdx.y;
    if (token >= (int)step[STEP_TOKENS]) return;
    Tile tile = tile_of(a, token);
    if (tile.rows == 0) return;
    int first = tile.seen_start / SPLIT, end = (tile.seen_end - 1) / SPLIT + 1;
    int blocks = smaller(gridDim.x, end - first);
    if ((int)blockIdx.x >= blocks) return;
    FT_SHARED(u16, memory);
    u16* weights = memory + STAGES * CHUNK * (WIDTH + 8);
    float* most = (float*)(weights + 16 * WEIGHTS);
    Scratch s = {memory, weights, most, (u32*)(most + CHUNKS * WARPS * 16)};
    if (tile.rows <= 16) attend_splits<WIDTH, (WIDTH / 16 + WARPS - 1) / WARPS, true>(a, tile, s, first + blockIdx.x, blocks, end, blocks == 1);
    else attend_splits<WIDTH, WIDTH / 16, false>(a, tile, s, first + blockIdx.x, blocks, end, blocks == 1);
    if (blocks > 1) {
        // The flag lies where a split's last weights did: nobody needs them once all are here.
        u32* flag = (u32*)(s.weights + SPLIT - 2);
        if (!is_last_block(a.counters + blockIdx.y * gridDim.z + blockIdx.z, blocks, flag)) return;
        join_parts<WIDTH>(a, tile, first, end);
    }
    if (to.quads) quantize_tile<WIDTH>(a, tile, to);
}

// grid (most blocks of a tile, t, KV heads * pieces of the query heads that share one); `quads` may be null
// Where compilers would spill a few registers for a third block on a multiprocessor, `2` says that two will do.
#define ATTEND(width, ...)                                                                                             \
    FT_KERNEL(__VA_ARGS__) attend_mma_##width(                                                                         \
        const u32* step, const float* q, const u16* keys, const u16* cached, const u32* positions, const u32* sequences, \
        const u32* begins, const u32* ends, const u32* table_starts, const u32* table, float* out, float* parts,       \
        float2* tops, u32* counters, int heads, int block_len, int q_heads, int q_width, int q_start, int window,      \
        int splits, float scale, QUANTIZED_PARAMETERS) {                                                               \
        Attention a = {q,     keys, cached, positions, sequences, begins,  ends,    table_starts, table,  out,  parts, \
                       tops, counters, heads,  block_len, q_heads,   q_width, q_start, window,       splits, scale};   \
        attend_tile<width>(step, a, QUANTIZED);                                                                        \
    }
ATTEND(16, 128)
ATTEND(32, 128, 3)
ATTEND(64, 128)
ATTEND(80, 128, 2)
ATTEND(96, 128)
ATTEND(128, 128)
