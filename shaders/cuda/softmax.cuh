// Softmax while positions pass by, where scores lie as tensor instructions leave them.
//
//   x = score * unit    most = ceil(greatest x so far)    weight = 2^(x - most + LIFT)
//   sums so far *= 2^(most before - most)
//
//   scores  two tiles of 8 positions: lane 4 g + t holds rows g and g + 8, positions 2 t and 2 t + 1 of each
//             scores[i][0], [1]: row g        scores[i][2], [3]: row g + 8        of tile i
//   weights four registers of pairs of f16, which are the left operand of the next instruction as they are
//
// A maximum is an integer, so that what was added before is multiplied by a power of two: exactly. All is
// in registers; nothing is read or written. Not here: which positions are read (attention_mma.cu).
// Reference: reference::ops::attend.
#pragma once

#define LIFT 15.0f
#define INFINITE __uint_as_float(0x7f800000u)

// A lane's two rows of a warp's 16, lane / 4 and 8 more: the positions that they see, and what a score
// is multiplied by.
struct Lines {
    int start[2], end[2];
    float unit[2];
};

// 2^`power` for integers up to 0, exactly; 0 for what is too small and for NaN.
FT_DEVICE float power2(float power) { return power >= -126.0f ? __uint_as_float((u32)((int)power + 127) << 23) : 0.0f; }

// Sets scores of positions that a row does not see to minus infinity; 16 positions from `start` on.
FT_DEVICE void hide(const Lines& lines, int start, float (*scores)[4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int line = i % 4 / 2, position = start + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (position < lines.start[line] || position >= lines.end[line]) scores[i / 4][i % 4] = -INFINITE;
    }
}

// Takes the scores of 16 positions into a lane's maxima.
FT_DEVICE void take_most(const float (*scores)[4], float* most) {
#pragma unroll
    for (int i = 0; i < 8; i++) most[i % 4 / 2] = fmaxf(most[i % 4 / 2], scores[i / 4][i % 4]);
}

// Maxima of the whole rows: four lanes have a row.
FT_DEVICE void agree(float* most) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        for (int mask = 2; mask > 0; mask >>= 1) most[i] = fmaxf(most[i], shuffle_xor(most[i], mask));
    }
}

// What a lane's two rows are multiplied by.
struct Factors {
    float of[2];
};

// Raises a split's maxima by a chunk's greatest scores; what was added before is to be multiplied by the
// result.
FT_DEVICE Factors raise(const Lines& lines, const float* scores, float* most) {
    Factors factors;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float before = most[i];
        most[i] = fmaxf(before, ceilf(scores[i] * lines.unit[i]));
        factors.of[i] = power2(before - most[i]);
    }
    return factors;
}

// What 2^x is lifted by, so that a row's greatest weight is at most 2^LIFT.
FT_DEVICE float lift(float most) { return LIFT - (most == -INFINITE ? 0.0f : most); }

// Weights of a lane's positions 2 t and 2 t + 1.
FT_DEVICE u32 weigh(float first, float second, float unit, float lifted) {
    return pack_f16(exp2_approx(fmaf(first, unit, lifted)), exp2_approx(fmaf(second, unit, lifted)));
}

// Adds a partial result to what was added before: what either is to be multiplied by.
struct Join {
    float old_factor, new_factor;
};
FT_DEVICE Join join(float* most, float* sum, float part_most, float part_sum) {
    float all = fmaxf(*most, part_most);
    Join by = {power2(*most - all), power2(part_most - all)};
    *sum = fmaf(part_sum, by.new_factor, *sum * by.old_factor);
    *most = all;
    return by;
}
