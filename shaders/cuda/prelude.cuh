// What every CUDA kernel uses: integer types, memory with hints, warp and tensor operations.
//
// No header of NVIDIA's is needed: this text is put before each kernel file and compiled at run
// time. Inline PTX stands here alone, one instruction a function. With FT_EMULATED defined the same
// functions come from the emulator of the tests, which runs the kernels on a processor. Not here:
// arithmetic of the model.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef FT_EMULATED

#define FT_DEVICE __device__ __forceinline__
// A kernel: threads of a block at most and, where the registers of that many blocks are to fit into a
// multiprocessor, how many.
#define FT_KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
// Dynamic shared memory as an array of `type`.
#define FT_SHARED(type, name)                                 \
    extern __shared__ __align__(16) unsigned char name##_[]; \
    type* name = (type*)name##_

// f16 bits to f32, exact.
FT_DEVICE float f16_to_f32(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// f32 to f16 bits, to nearest even.
FT_DEVICE u16 f32_to_f16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// 2 to the power of `value`, off by at most 2^-22 of it; results below 2^-126 are 0.
FT_DEVICE float exp2_approx(float value) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
}

// 16 bytes of weights: read once, so that they need not stay in a cache. No `nc` where launches are awaited
// (sm_90): the compiler would move such loads behind the waiting.
FT_DEVICE uint4 load_once(const uint4* from) {
    uint4 v;
#if __CUDA_ARCH__ >= 800
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
#else
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
#endif
    return v;
}

// The same for 8 bytes.
FT_DEVICE uint2 load_once(const uint2* from) {
    uint2 v;
#if __CUDA_ARCH__ >= 800
    asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
#else
    asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
#endif
    return v;
}

// The value of lane `lane ^ mask` of the warp.
FT_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
FT_DEVICE int shuffle_xor(int value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Copies 16 bytes to shared memory without waiting; they are there once `copy_async_wait` says so (and,
// for other threads, after a barrier). Before sm_80 at once.
FT_DEVICE void copy_async16(void* shared, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(from) : "memory");
#else
    *(uint4*)shared = *(const uint4*)from;
#endif
}

// The same for 8 bytes.
FT_DEVICE void copy_async8(void* shared, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(from) : "memory");
#else
    *(uint2*)shared = *(const uint2*)from;
#endif
}

// Closes a group of copies.
FT_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all of this thread's groups but the newest `open`.
template <int open>
FT_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
#endif
}

#if __CUDA_ARCH__ < 800
// c[8, 8] += a[8, 16] * b[16, 8]; lane l holds row l / 4 of a and columns 4 (l % 4) .. of it.
FT_DEVICE void mma_m8n8k16(int* c, u32 a, u32 b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a), "r"(b));
}
#endif

// c[16, 8] += a[16, 32] * b[32, 8], a of u8 and b of i8, exact. With g = lane / 4 and t = lane % 4:
// a[0], a[1]: rows g and g + 8, columns 4 t ..; a[2], a[3]: the same rows, columns 16 + 4 t ..;
// b[0], b[1]: rows 4 t .. and 16 + 4 t .. of column g; c[0], c[1]: row g, columns 2 t and 2 t + 1;
// c[2], c[3]: row g + 8.
FT_DEVICE void mma_u8i8(int* c, const u32* a, const u32* b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_m8n8k16(c, a[0], b[0]);
    mma_m8n8k16(c, a[2], b[1]);
    mma_m8n8k16(c + 2, a[1], b[0]);
    mma_m8n8k16(c + 2, a[3], b[1]);
#endif
}

// c[16, 8] += a[16, 16] * b[16, 8], a and b of f16 pairs (first in the low half) and c of f32. With
// g = lane / 4 and t = lane % 4: a[0], a[1]: rows g and g + 8, columns 2 t and 2 t + 1; a[2], a[3]: the
// same rows, columns 8 + 2 t ..; b[0], b[1]: rows 2 t .. and 8 + 2 t .. of column g; c as in mma_u8i8.
// A row's bits depend on its own a and c and on b alone.
FT_DEVICE void mma_f16(float* c, const u32* a, const u32* b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int half = 0; half < 2; half++) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}

// The same for bf16. Before sm_80 there is no such instruction: lanes lend each other their operands.
FT_DEVICE void mma_bf16(float* c, const u32* a, const u32* b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    int lane = threadIdx.x % 32, row_lane = lane / 4 * 4, column_lane = lane % 4 * 8;
    // Not unrolled: there would be a thousand instructions where kernels have eight of this one.
#pragma unroll 1
    for (int t = 0; t < 4; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 left = __shfl_sync(0xffffffffu, a[i], row_lane + t);
#pragma unroll
            for (int column = 0; column < 2; column++) {
                u32 right = __shfl_sync(0xffffffffu, b[i / 2], column_lane + 4 * column + t);
                float* sum = c + i % 2 * 2 + column;
                *sum = fmaf(__uint_as_float(left << 16), __uint_as_float(right << 16), *sum);
                *sum = fmaf(__uint_as_float(left & 0xffff0000u), __uint_as_float(right & 0xffff0000u), *sum);
            }
        }
    }
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane l names row l % 8 of matrix l / 8 (16
// bytes); it gets of each matrix the columns 2 (l % 4) .. of row l / 4.
FT_DEVICE void ldmatrix4(u32* to, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

// The same, each matrix transposed: a lane gets rows 2 (l % 4) .. of column l / 4.
FT_DEVICE void ldmatrix4_transposed(u32* to, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

// Waits for the launches asked for before this one, and lets the next one start its threads. Every
// thread of every kernel comes here once, before it reads or writes what a launch leaves to another:
// weights may be asked for sooner. Before sm_90 launches wait for each other anyway.
FT_DEVICE void await_launches() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif

// Whether this block is the last of `count` that come here with the same counter, which is 0 before and
// after. All threads of a block come; the last block sees what the others wrote before. `flag` is
// shared memory that nobody else uses meanwhile.
FT_DEVICE bool is_last_block(u32* counter, u32 count, u32* flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        // Whether others are still to come: what stands there before would mostly say so too.
        *flag = atomicAdd(counter, 1u) != count - 1;
        if (!*flag) *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return !*flag;
}

// Two f16, to nearest even, `first` in the low half.
FT_DEVICE u32 pack_f16(float first, float second) {
#if !defined(FT_EMULATED) && __CUDA_ARCH__ >= 800
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#else
    return f32_to_f16(first) | (u32)f32_to_f16(second) << 16;
#endif
}

// bf16 bits to f32, exact.
FT_DEVICE float bf16_to_f32(u16 bits) { return __uint_as_float((u32)bits << 16); }
