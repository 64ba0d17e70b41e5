// Chooses a token from a row of logits, so that a token is carried to the host and not the row.
//
//   greedy  the token of the largest logit, the lowest id among equals
//   drawn   the token of the largest  f64((logit - largest) / temperature) + noise(key, token)
//           (Gumbel-max; kernels/src/backend.rs, `Draw`, has the formula of the noise)
//
//   logits  [r, v] f32      draws [r, 4] u32: kind (0 none, 1 greedy, 2 drawn), temperature, key
//   parts   [r, chunks + 1] of 32 bytes: what a chunk of a row came to, then what all of them did
//   chosen  [r, 2] u32: token, and 1 where it is certain
//   split   a block of 256 threads takes a chunk of 4096 logits, 16 a thread; the last block of a row
//           joins its chunks
//   bytes   every logit once (`choose_greatest`), of drawn rows twice
//
// Steps that follow each other without the host: `follow` keeps a step's tokens and makes them the next
// one's.
//
// Certain is what the host would choose too, whose logarithms may differ in their last bits: the best
// score must lead by 1e-9 of its magnitude, far more than both errors (a few 2^-52 of at most 40 and of
// the logit). The host takes the row itself where a token is not certain: near ties, NaN, infinities.
// Reference: engine/src/sampler/choice.rs.

#define STEP_OUTPUTS 1
#define CHUNK 4096
#define GREEDY 1
#define DRAWN 2
#define NOBODY 0xffffffffu
#define LEAD 1e-9

// The best of some tokens with the runner-up's score; `wrong` where a logit is NaN or plus infinity.
struct Best {
    double score, second;
    u32 token, wrong;
    u32 unused[2];
};

FT_DEVICE Best nobody() {
    double none = -(double)__uint_as_float(0x7f800000u);
    return Best{none, none, NOBODY, 0, {0, 0}};
}

// Two groups of tokens as one: the better first, the lower id among equals.
FT_DEVICE Best better(const Best& a, const Best& b) {
    bool first = a.score > b.score || (a.score == b.score && a.token < b.token);
    Best best = first ? a : b;
    double loser = first ? b.score : a.score;
    if (loser > best.second) best.second = loser;
    best.wrong = a.wrong | b.wrong;
    return best;
}

// The best of a block's threads, in thread 0's place; nobody may write to `all` before a barrier.
FT_DEVICE void best_of_block(Best* all) {
    for (int half = 128; half > 0; half >>= 1) {
        __syncthreads();
        if (threadIdx.x < half) all[threadIdx.x] = better(all[threadIdx.x], all[threadIdx.x + half]);
    }
}

FT_DEVICE u64 next_bits(u64 x) {
    u64 z = x + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Gumbel noise of uniform bits.
FT_DEVICE double noise(u64 bits) {
    double w = ((double)(bits >> 12) + 0.5) * 0x1p-52;
    return -log(-log1p(-w));
}

// No noise of these bits is greater: with z leading zeros w >= 2^-(z + 1), and -ln(1 - w) >= w.
FT_DEVICE double most_noise(u64 bits) {
    int zeros = (bits >> 32) ? __clz((int)(bits >> 32)) : 32 + __clz((int)bits);
    return (double)(min(zeros, 52) + 1) * 0.6931471805599453 + 1e-9;
}

// Joins the block's threads, then, as the row's last block, its chunks. Whether this is the last block;
// the row's best is then in its thread 0's place.
FT_DEVICE bool join_row(Best mine, Best* all, Best* parts, u32* counters) {
    __shared__ u32 flag;
    int row = blockIdx.y, chunks = gridDim.x;
    Best* row_parts = parts + (u64)row * (chunks + 1);
    all[threadIdx.x] = mine;
    best_of_block(all);
    if (threadIdx.x == 0) row_parts[blockIdx.x] = all[0];
    if (!is_last_block(counters + row, chunks, &flag)) return false;
    Best best = nobody();
    for (int i = threadIdx.x; i < chunks; i += 256) best = better(best, row_parts[i]);
    all[threadIdx.x] = best;
    best_of_block(all);
    if (threadIdx.x == 0) row_parts[chunks] = all[0];
    return true;
}

// grid (v / 4096, r); before `choose_drawn`
FT_KERNEL(256) choose_greatest(const u32* step, const float* logits, const u32* draws, Best* parts, u32* counters, u32* chosen,
                               int width) {
    await_launches();
    __shared__ Best all[256];
    int row = blockIdx.y;
    if (row >= step[STEP_OUTPUTS] || draws[4 * row] == 0) return;
    Best best = nobody();
    for (int i = 0; i < CHUNK / 256; i++) {
        int token = blockIdx.x * CHUNK + i * 256 + threadIdx.x;
        if (token >= width) break;
        float logit = logits[(u64)row * width + token];
        // Comparisons with NaN are false.
        if (!(logit < __uint_as_float(0x7f800000u))) best.wrong = 1;
        best = better(best, Best{(double)logit, nobody().score, (u32)token, 0, {0, 0}});
    }
    if (!join_row(best, all, parts, counters) || threadIdx.x != 0) return;
    // Where all are minus infinity no token is to be chosen.
    chosen[2 * row] = all[0].token;
    chosen[2 * row + 1] = draws[4 * row] == GREEDY && !all[0].wrong && all[0].score > nobody().score;
}

// grid (v / 4096, r)
FT_KERNEL(256, 4) choose_drawn(const u32* step, const float* logits, const u32* draws, Best* parts, u32* counters, u32* chosen,
                            int width) {
    await_launches();
    __shared__ Best all[256];
    int row = blockIdx.y;
    if (row >= step[STEP_OUTPUTS] || draws[4 * row] != DRAWN) return;
    Best greatest = parts[(u64)row * (gridDim.x + 1) + gridDim.x], best = nobody();
    float largest = (float)greatest.score, temperature = __uint_as_float(draws[4 * row + 1]);
    u64 key = (u64)draws[4 * row + 3] << 32 | draws[4 * row + 2];
    for (int i = 0; i < CHUNK / 256; i++) {
        int token = blockIdx.x * CHUNK + i * 256 + threadIdx.x;
        if (token >= width) break;
        float logit = logits[(u64)row * width + token];
        double scaled = temperature == 1.0f ? logit : __fdiv_rn(__fsub_rn(logit, largest), temperature);
        u64 bits = next_bits(key ^ (u64)token);
        // Most cannot be among the two best even with the most noise: no logarithm for them.
        if (scaled + most_noise(bits) < best.second) continue;
        best = better(best, Best{scaled + noise(bits), nobody().score, (u32)token, 0, {0, 0}});
    }
    if (!join_row(best, all, parts, counters) || threadIdx.x != 0) return;
    double magnitude = fabs(all[0].score) > 1.0 ? fabs(all[0].score) : 1.0;
    bool finite = !greatest.wrong && greatest.score > nobody().score;
    chosen[2 * row] = all[0].token;
    chosen[2 * row + 1] = finite && all[0].score - all[0].second > LEAD * magnitude;
}

// Token i of the step that comes next is the one chosen in row i of the step before, whose tokens are kept
// in `kept` [rows, 2]. What follows a row without a certain token means nothing, but must be a token.
// grid (rows / 256)
FT_KERNEL(256) follow(const u32* chosen, u32* kept, u32* tokens, int rows) {
    await_launches();
    int row = blockIdx.x * 256 + threadIdx.x;
    if (row >= rows) return;
    u32 token = chosen[2 * row], certain = chosen[2 * row + 1];
    kept[2 * row] = token;
    kept[2 * row + 1] = certain;
    tokens[row] = certain ? token : 0;
}
