// The functions that prelude.cuh leaves to the emulator: what stands there as PTX, for a processor.
//
// A new one of them needs one here: a plain function where threads work alone, `meet_all` where a
// warp works together (each lane brings a struct with what it gives and what it gets; the last lane
// computes for all). Layouts are those of the PTX ISA, "Matrix Fragments".
#pragma once

#define FT_DEVICE inline
#define FT_KERNEL(...) void
#define FT_SHARED(type, name) type* name = (type*)emulator::current.shared

// f16 bits to f32, exact. All NaN become one, as on a device.
FT_DEVICE float f16_to_f32(unsigned short half) {
    unsigned sign = (unsigned)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude > 0x7c00) return __uint_as_float(0x7fffffffu);
    if (magnitude == 0x7c00) return __uint_as_float(sign | 0x7f800000u);
    // The exponent's bias differs by 112; the product is exact, also for subnormal values.
    float value = __uint_as_float(magnitude << 13) * 0x1p112f;
    return __uint_as_float(sign | __float_as_uint(value));
}

// f32 to f16 bits, to nearest even.
FT_DEVICE unsigned short f32_to_f16(float value) {
    unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    // From 65520 on the nearest is infinity.
    if (magnitude >= 0x477ff000u) return (unsigned short)(sign | 0x7c00);
    if (magnitude < 0x38800000u) {
        // Below 2^-14 halves are multiples of 2^-24: adding 0.5, whose last bit is worth that, rounds.
        float rounded = __uint_as_float(magnitude) + 0.5f;
        return (unsigned short)(sign | (__float_as_uint(rounded) - 0x3f000000u));
    }
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return (unsigned short)(sign | ((magnitude - 0x38000000u) >> 13));
}

// 2 to the power of `value`.
FT_DEVICE float exp2_approx(float value) {
    float power = std::exp2(value);
    return power < 0x1p-126f ? 0.0f : power;
}

FT_DEVICE uint4 load_once(const uint4* from) { return *from; }
FT_DEVICE uint2 load_once(const uint2* from) { return *from; }

FT_DEVICE float shuffle_xor(float value, int mask, emulator::Site site = emulator::Site::here()) {
    return emulator::shuffle("shuffle_xor", value, emulator::current.lane ^ mask, site);
}
FT_DEVICE int shuffle_xor(int value, int mask, emulator::Site site = emulator::Site::here()) {
    return emulator::shuffle("shuffle_xor", value, emulator::current.lane ^ mask, site);
}

// c[16, 8] += a[16, 32] * b[32, 8], a of u8 and b of i8.
FT_DEVICE void mma_u8i8(int* c, const unsigned* a, const unsigned* b, emulator::Site site = emulator::Site::here()) {
    struct Lane {
        int* c;
        const unsigned *a, *b;
    } mine = {c, a, b};
    emulator::meet_all<Lane>("mma_u8i8", site, mine, [](Lane* const* lanes) {
        alignas(16) unsigned char a[16][32];
        alignas(16) signed char b[8][32];
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4;
            for (int r = 0; r < 4; r++) std::memcpy(&a[g + 8 * (r % 2)][16 * (r / 2) + 4 * t], &lanes[l]->a[r], 4);
            for (int r = 0; r < 2; r++) std::memcpy(&b[g][16 * r + 4 * t], &lanes[l]->b[r], 4);
        }
        // Wider first: products of 16-bit integers are what processors have instructions for.
        alignas(16) short rows[16][32], columns[8][32];
        for (int i = 0; i < 16 * 32; i++) rows[0][i] = a[0][i];
        for (int i = 0; i < 8 * 32; i++) columns[0][i] = b[0][i];
        for (int l = 0; l < 32; l++) {
            for (int i = 0; i < 4; i++) {
                const short *row = rows[l / 4 + 8 * (i / 2)], *column = columns[2 * (l % 4) + i % 2];
                int sum = 0;
                for (int k = 0; k < 32; k++) sum += row[k] * column[k];
                lanes[l]->c[i] += sum;
            }
        }
    });
}

// c[16, 8] += a[16, 16] * b[16, 8], a and b of pairs that `open` makes f32 and c of f32. A device adds in
// an order of its own and with fewer bits; here the sum is rounded once.
template <float (*open)(unsigned short)>
void mma_pairs(const char* what, emulator::Site site, float* c, const unsigned* a, const unsigned* b) {
    struct Lane {
        float* c;
        const unsigned *a, *b;
    } mine = {c, a, b};
    emulator::meet_all<Lane>(what, site, mine, [](Lane* const* lanes) {
        // Two columns at a time, as processors have instructions for; each sum is still one after another.
        typedef double Two __attribute__((vector_size(16)));
        double rows[16][16];
        Two columns[16][4];
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4;
            for (int i = 0; i < 2; i++) {
                for (int r = 0; r < 4; r++) {
                    rows[g + 8 * (r % 2)][8 * (r / 2) + 2 * t + i] = open((unsigned short)(lanes[l]->a[r] >> (16 * i)));
                }
                for (int r = 0; r < 2; r++) {
                    columns[8 * r + 2 * t + i][g / 2][g % 2] = open((unsigned short)(lanes[l]->b[r] >> (16 * i)));
                }
            }
        }
        for (int row = 0; row < 16; row++) {
            Two sums[4];
            for (int t = 0; t < 4; t++) {
                const float* c = lanes[row % 8 * 4 + t]->c + row / 8 * 2;
                sums[t] = Two{c[0], c[1]};
            }
            for (int k = 0; k < 16; k++) {
                Two factor = {rows[row][k], rows[row][k]};
                for (int t = 0; t < 4; t++) sums[t] += factor * columns[k][t];
            }
            for (int t = 0; t < 4; t++) {
                float* c = lanes[row % 8 * 4 + t]->c + row / 8 * 2;
                c[0] = (float)sums[t][0];
                c[1] = (float)sums[t][1];
            }
        }
    });
}

FT_DEVICE float emulator_open_bf16(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

FT_DEVICE void mma_f16(float* c, const unsigned* a, const unsigned* b, emulator::Site site = emulator::Site::here()) {
    mma_pairs<f16_to_f32>("mma_f16", site, c, a, b);
}
FT_DEVICE void mma_bf16(float* c, const unsigned* a, const unsigned* b, emulator::Site site = emulator::Site::here()) {
    mma_pairs<emulator_open_bf16>("mma_bf16", site, c, a, b);
}

// Four 8 x 8 matrices of f16 from shared memory: lane l names row l % 8 of matrix l / 8 (16 bytes);
// it gets of each matrix the columns 2 (l % 4) .. of row l / 4.
FT_DEVICE void ldmatrix4(unsigned* to, const void* row, emulator::Site site = emulator::Site::here()) {
    struct Lane {
        unsigned* to;
        const unsigned char* row;
    } mine = {to, (const unsigned char*)row};
    if ((std::uintptr_t)row % 16) emulator::fail("ldmatrix4 at %s:%d reads an address off 16 bytes", site.file, site.line);
    emulator::meet_all<Lane>("ldmatrix4", site, mine, [](Lane* const* lanes) {
        for (int l = 0; l < 32; l++) {
            for (int m = 0; m < 4; m++) std::memcpy(&lanes[l]->to[m], lanes[8 * m + l / 4]->row + 4 * (l % 4), 4);
        }
    });
}

// The same, each matrix transposed: a lane gets rows 2 (l % 4) .. of column l / 4.
FT_DEVICE void ldmatrix4_transposed(unsigned* to, const void* row, emulator::Site site = emulator::Site::here()) {
    struct Lane {
        unsigned* to;
        const unsigned char* row;
    } mine = {to, (const unsigned char*)row};
    if ((std::uintptr_t)row % 16) emulator::fail("ldmatrix4 at %s:%d reads an address off 16 bytes", site.file, site.line);
    emulator::meet_all<Lane>("ldmatrix4_transposed", site, mine, [](Lane* const* lanes) {
        for (int l = 0; l < 32; l++) {
            for (int m = 0; m < 4; m++) {
                for (int i = 0; i < 2; i++) {
                    const unsigned char* from = lanes[8 * m + 2 * (l % 4) + i]->row + 2 * (l / 4);
                    std::memcpy((unsigned char*)&lanes[l]->to[m] + 2 * i, from, 2);
                }
            }
        }
    });
}

// Launches run one after another; that every thread comes here once is checked.
FT_DEVICE void await_launches() { emulator::await_launches(); }

// Copies past the registers, from global to shared memory.
FT_DEVICE void copy_async16(void* shared, const void* from, emulator::Site site = emulator::Site::here()) {
    emulator::copy_async(shared, from, 16, site);
}
FT_DEVICE void copy_async8(void* shared, const void* from, emulator::Site site = emulator::Site::here()) {
    emulator::copy_async(shared, from, 8, site);
}
FT_DEVICE void copy_async_commit() { emulator::commit_copies(); }
template <int open>
FT_DEVICE void copy_async_wait(emulator::Site site = emulator::Site::here()) {
    emulator::wait_copies(open, site);
}
