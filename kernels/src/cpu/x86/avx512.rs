//! [`Simd`] with AVX-512 and VNNI: sixteen lanes are one 512-bit vector, and `vpdpbusd` is the
//! dot of codes and a quad, exact in i32.

use super::super::blocks::CodeBlocks;
use super::super::isa::Kernel;
use super::super::simd::{LANES, Line, Simd};
use super::{Avx512, avx512_blocks};
use std::arch::x86_64::*;

type F = __m512;
type I = __m512i;

impl Simd for Avx512 {
    const SUMS: usize = 16;
    const ROWS: usize = 8;
    type F = F;
    type I = I;
    type Nibbles = I;
    type NibbleSum = I;
    type Bytes = I;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) -> K::Output {
        self.run_apart(kernel)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> F {
        // SAFETY: `self` proves the features; `x` has sixteen floats, unaligned.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: F, out: &mut [f32; LANES]) {
        // SAFETY: `self` proves the features; `out` has room for sixteen floats, unaligned.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn widen_f16(self, x: &[u16; LANES]) -> F {
        // SAFETY: `self` proves the features; `x` has 32 bytes, unaligned.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn widen_bf16(self, x: &[u16; LANES]) -> F {
        // SAFETY: `self` proves the features; `x` has 32 bytes, unaligned.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    fn narrow_f16(self, x: F) -> [u16; LANES] {
        let mut out = [0; LANES];
        // SAFETY: `self` proves the features; `out` has 32 bytes, unaligned.
        unsafe {
            let narrow = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), narrow);
        }
        out
    }
    #[inline(always)]
    fn shift_exponent(self, x: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(x));
            _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f80_0000)))
        }
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    fn lanes_i(self, x: I) -> [i32; LANES] {
        let mut out = [0; LANES];
        // SAFETY: `self` proves the features; `out` has 64 bytes, unaligned.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), x) }
        out
    }
    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x)));
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), high);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn greatest(self, x: F) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_reduce_max_ps(x) }
    }
    #[inline(always)]
    fn sum_i(self, x: I) -> i32 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_reduce_add_epi32(x) }
    }
    #[inline(always)]
    fn greatest_i(self, x: I) -> i32 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_reduce_max_epi32(x) }
    }
    #[inline(always)]
    fn widen_u8(self, x: &[u8; LANES]) -> I {
        // SAFETY: `self` proves the features; `x` has sixteen bytes, unaligned.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn mul_i(self, a: I, b: I) -> I {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mullo_epi32(a, b) }
    }
    #[inline(always)]
    fn to_f32(self, x: I) -> F {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn max_magnitude(self, a: I, x: F) -> I {
        // SAFETY: `self` proves the features.
        unsafe {
            let mask = _mm512_set1_epi32(0x7fff_ffff);
            _mm512_max_epi32(a, _mm512_and_si512(_mm512_castps_si512(x), mask))
        }
    }
    #[inline(always)]
    fn round(self, x: F) -> I {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtps_epi32(x) }
    }
    #[inline(always)]
    fn pack_quads(self, x: I) -> [i32; 4] {
        let mut out = [0; 4];
        // SAFETY: `self` proves the features; `out` has sixteen bytes, unaligned.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x)) }
        out
    }

    #[inline(always)]
    fn prefetch<T>(self, x: &T) {
        // SAFETY: every x86-64 processor has the instruction; it changes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>((&raw const *x).cast()) }
    }

    #[inline(always)]
    fn open_nibbles(self, line: &Line) -> [I; 2] {
        // SAFETY: `self` proves the features; a line has 64 bytes and is aligned to 64.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let both = _mm512_load_si512(line.0.as_ptr().cast());
            let high = _mm512_srli_epi16::<4>(both);
            [_mm512_and_si512(both, mask), _mm512_and_si512(high, mask)]
        }
    }
    #[inline(always)]
    fn start_nibbles(self, total: I) -> I {
        total
    }
    #[inline(always)]
    fn dot_nibbles(self, sum: I, codes: [I; 2], quads: [i32; 2]) -> I {
        self.dot_bytes(self.dot_bytes(sum, codes[0], quads[0]), codes[1], quads[1])
    }
    #[inline(always)]
    fn flush_nibbles(self, sum: I, _: I) -> I {
        sum
    }

    #[inline(always)]
    fn dot_nibbles_of<const R: usize>(
        self,
        job: &CodeBlocks<'_, Self>,
        acc: &mut [[f32; LANES]; R],
    ) {
        avx512_blocks::dot_blocks::<R, 2>(self, job, acc);
    }

    #[inline(always)]
    fn dot_bytes_of<const R: usize>(self, job: &CodeBlocks<'_, Self>, acc: &mut [[f32; LANES]; R]) {
        avx512_blocks::dot_blocks::<R, 1>(self, job, acc);
    }

    #[inline(always)]
    fn open_bytes(self, line: &Line) -> I {
        // SAFETY: `self` proves the features; a line has 64 bytes and is aligned to 64.
        unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
    }
    #[inline(always)]
    fn dot_bytes(self, sum: I, codes: I, quad: i32) -> I {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(quad)) }
    }
}
