// What CUDA gives every kernel, for a processor: vectors, indices, barriers, warps, intrinsics.
//
// Included before prelude.cuh, whose own functions are in prelude.h. A barrier and each warp
// operation know where they are called (`Site`), so that threads that disagree are found. Not here:
// how threads take turns (emulator.cpp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

// Where a kernel asks for something; as a default argument it is the caller's line.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What a running thread sees.
struct Current {
    uint3 thread;
    uint3 block;
    dim3 threads;
    dim3 blocks;
    unsigned char* shared;
    int lane;
};
extern Current current;

// Ends the launch with an error; does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Waits until all threads of the block are here.
void barrier(Site site);
// Waits until all lanes of the warp are here, each with its own `mine`. The last of them runs `work`
// for all. Nothing is copied: a lane that waits keeps what is on its stack.
void meet(const char* what, Site site, void* mine, void (*work)(void* const* lanes));
// Copies `bytes` bytes, a power of two that both addresses are multiples of: now, or when waited for.
void copy_async(void* to, const void* from, int bytes, Site site);
// Ends this thread's group of copies.
void commit_copies();
// Waits until at most `open` groups of this thread are under way.
void wait_copies(int open, Site site);
// Notes that this thread has waited for the launches before.
void await_launches();

// A kernel as the table has it.
struct Kernel {
    const char* name;
    // One letter a parameter: p pointer, i int, f float.
    const char* types;
    unsigned threads;
    void (*run)(void* const* args);
    // Static shared memory of the kernel's file.
    unsigned char* shared_start;
    unsigned char* shared_end;
};

template <class T>
constexpr char letter() {
    static_assert(std::is_pointer_v<T> || std::is_same_v<T, int> || std::is_same_v<T, float>,
                  "a kernel's parameters are pointers, int and float");
    return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, int> ? 'i' : 'f';
}

template <auto F>
struct Glue;
template <class... P, void (*F)(P...)>
struct Glue<F> {
    static constexpr char types[] = {letter<P>()..., 0};
    static void run(void* const* args) { spread(args, std::index_sequence_for<P...>()); }
    template <std::size_t... I>
    static void spread(void* const* args, std::index_sequence<I...>) {
        F(*(P*)args[I]...);
    }
};

template <auto F>
Kernel kernel(const char* name, unsigned threads, unsigned char* shared_start, unsigned char* shared_end) {
    return {name, Glue<F>::types, threads, Glue<F>::run, shared_start, shared_end};
}

template <class Lane>
void meet_all(const char* what, Site site, Lane& mine, void (*work)(Lane* const* lanes)) {
    meet(what, site, &mine, (void (*)(void* const*))work);
}

// The value of lane `from`.
template <class T>
T shuffle(const char* what, T value, int from, Site site) {
    struct Lane {
        T value, result;
        int from;
    } mine = {value, value, from};
    meet_all<Lane>(what, site, mine, [](Lane* const* lanes) {
        for (int i = 0; i < 32; i++) lanes[i]->result = lanes[lanes[i]->from]->value;
    });
    return mine.result;
}

inline void check_mask(unsigned mask, Site site) {
    if (mask != 0xffffffffu) fail("a warp operation of part of a warp at %s:%d is not emulated", site.file, site.line);
}

template <class To, class From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

}  // namespace emulator

// Words of the language. A file's static shared memory is one section, so that it can be poisoned.
#define __shared__ static __attribute__((section(EMULATOR_SHARED)))
#define __device__
#define __constant__ static
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define threadIdx (emulator::current.thread)
#define blockIdx (emulator::current.block)
#define blockDim (emulator::current.threads)
#define gridDim (emulator::current.blocks)

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
    emulator::check_mask(mask, site);
    int nothing = 0;
    emulator::meet("__syncwarp", site, &nothing, [](void* const*) {});
}

// Shuffles of a whole warp; beyond its group of `width` lanes a lane keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, emulator::Site site = emulator::Site::here()) {
    emulator::check_mask(mask, site);
    int lane = emulator::current.lane, first = lane / width * width;
    return emulator::shuffle("__shfl_sync", value, first + (from & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int turn, int width = 32, emulator::Site site = emulator::Site::here()) {
    emulator::check_mask(mask, site);
    int lane = emulator::current.lane, from = lane ^ turn;
    return emulator::shuffle("__shfl_xor_sync", value, from < (lane / width + 1) * width ? from : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, emulator::Site site = emulator::Site::here()) {
    emulator::check_mask(mask, site);
    int lane = emulator::current.lane, from = lane + by;
    return emulator::shuffle("__shfl_down_sync", value, from < (lane / width + 1) * width ? from : lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, emulator::Site site = emulator::Site::here()) {
    emulator::check_mask(mask, site);
    int lane = emulator::current.lane, from = lane - by;
    return emulator::shuffle("__shfl_up_sync", value, from >= lane / width * width ? from : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int yes, emulator::Site site = emulator::Site::here()) {
    struct Lane {
        int yes;
        unsigned votes;
    } mine = {yes, 0};
    emulator::check_mask(mask, site);
    emulator::meet_all<Lane>("__ballot_sync", site, mine, [](Lane* const* lanes) {
        unsigned votes = 0;
        for (int i = 0; i < 32; i++) votes |= (unsigned)(lanes[i]->yes != 0) << i;
        for (int i = 0; i < 32; i++) lanes[i]->votes = votes;
    });
    return mine.votes;
}
inline int __any_sync(unsigned mask, int yes, emulator::Site site = emulator::Site::here()) {
    return __ballot_sync(mask, yes, site) != 0;
}
inline int __all_sync(unsigned mask, int yes, emulator::Site site = emulator::Site::here()) {
    return __ballot_sync(mask, yes, site) == 0xffffffffu;
}

// One thread runs at a time, so an atomic operation is a plain one and a fence is nothing.
template <class T>
T atomicAdd(T* to, T value) {
    T old = *to;
    *to = old + value;
    return old;
}
template <class T>
T atomicMax(T* to, T value) {
    T old = *to;
    if (value > old) *to = value;
    return old;
}
template <class T>
T atomicExch(T* to, T value) {
    T old = *to;
    *to = value;
    return old;
}
template <class T>
T atomicCAS(T* to, T expected, T value) {
    T old = *to;
    if (old == expected) *to = value;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* from) {
    return *from;
}

// As CUDA does: a mixed pair of integers is unsigned, a NaN loses against a number.
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax((T)a, (T)b);
    return (T)a > (T)b ? (T)a : (T)b;
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin((T)a, (T)b);
    return (T)a < (T)b ? (T)a : (T)b;
}

// Nothing is contracted in this build, so plain operators round as these do.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return (float)(1.0 / std::sqrt((double)a)); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __fdividef(float a, float b) { return a / b; }

inline float __uint_as_float(unsigned a) { return emulator::bits<float>(a); }
inline unsigned __float_as_uint(float a) { return emulator::bits<unsigned>(a); }
inline float __int_as_float(int a) { return emulator::bits<float>(a); }
inline int __float_as_int(float a) { return emulator::bits<int>(a); }

// Out of range a conversion takes the nearest integer, and NaN gives 0.
inline int emulator_to_int(float a) {
    if (a != a) return 0;
    if (a >= 2147483648.0f) return 2147483647;
    if (a < -2147483648.0f) return -2147483647 - 1;
    return (int)a;
}
inline int __float2int_rn(float a) { return emulator_to_int(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return emulator_to_int(a); }
inline int __float2int_rd(float a) { return emulator_to_int(std::floor(a)); }
inline int __float2int_ru(float a) { return emulator_to_int(std::ceil(a)); }
inline float __int2float_rn(int a) { return (float)a; }
inline float __uint2float_rn(unsigned a) { return (float)a; }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a ? __builtin_clz((unsigned)a) : 32; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned)((((unsigned long long)high << 32) | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return (unsigned)((((unsigned long long)high << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned nibble = selector >> (4 * i) & 15, byte = (unsigned)(bytes >> (8 * (nibble & 7))) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (signed char)(a >> (8 * i)) * (signed char)(b >> (8 * i));
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += (a >> (8 * i) & 255) * (b >> (8 * i) & 255);
    return c;
}
