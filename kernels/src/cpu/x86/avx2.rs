//! [`Simd`] with AVX2, FMA and F16C: sixteen lanes are two 256-bit vectors, rows 0..8 and 8..16.
//!
//! Nibbles are multiplied by `maddubs` (u8 x i8 pairs into i16). A pair adds at most
//! 2 * 15 * 127 = 3810, so eight of them stay below 32767 and are widened to i32 together. A pair
//! of byte codes would overflow, so 128 is taken from each: the magnitude of what is left times the
//! activation with its sign adds at most 2 * 128 * 127 = 32512, and is widened at once.

use super::super::blocks::CodeBlocks;
use super::super::simd::{LANES, Line, Simd};
use super::{Avx2, avx2_blocks};
use std::arch::x86_64::*;

type F = (__m256, __m256);
type I = (__m256i, __m256i);

/// Adds the dots of nibbles with one quad.
#[inline(always)]
fn dot(_: Avx2, sum: I, codes: I, quad: i32) -> I {
    // SAFETY: the first argument proves the features.
    unsafe {
        let quad = _mm256_set1_epi32(quad);
        let low = _mm256_maddubs_epi16(codes.0, quad);
        let high = _mm256_maddubs_epi16(codes.1, quad);
        (_mm256_add_epi16(sum.0, low), _mm256_add_epi16(sum.1, high))
    }
}

impl Simd for Avx2 {
    const SUMS: usize = 4;
    const ROWS: usize = 4;
    const BYTE_OFFSET: i32 = 128;
    type F = F;
    type I = I;
    type Nibbles = I;
    type NibbleSum = I;
    type Bytes = [I; 2];

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        // SAFETY: `self` proves the features.
        let v = unsafe { _mm256_set1_ps(x) };
        (v, v)
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> F {
        let p = x.as_ptr();
        // SAFETY: `self` proves the features; `x` has sixteen floats, read as 8 and 8, unaligned.
        unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    fn store(self, x: F, out: &mut [f32; LANES]) {
        let p = out.as_mut_ptr();
        // SAFETY: `self` proves the features; `out` has room for sixteen floats, unaligned.
        unsafe {
            _mm256_storeu_ps(p, x.0);
            _mm256_storeu_ps(p.add(8), x.1);
        }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn widen_f16(self, x: &[u16; LANES]) -> F {
        let p = x.as_ptr().cast::<__m128i>();
        // SAFETY: `self` proves the features; `x` has 32 bytes, read as 16 and 16, unaligned.
        unsafe {
            let (low, high) = (_mm_loadu_si128(p), _mm_loadu_si128(p.add(1)));
            (_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        }
    }
    #[inline(always)]
    fn widen_bf16(self, x: &[u16; LANES]) -> F {
        let p = x.as_ptr().cast::<__m128i>();
        // SAFETY: `self` proves the features; `x` has 32 bytes, read as 16 and 16, unaligned.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(1)));
            let widen = [_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high)];
            (_mm256_castsi256_ps(widen[0]), _mm256_castsi256_ps(widen[1]))
        }
    }
    #[inline(always)]
    fn narrow_f16(self, x: F) -> [u16; LANES] {
        let mut out = [0; LANES];
        let p = out.as_mut_ptr().cast::<__m128i>();
        // SAFETY: `self` proves the features; `out` has 32 bytes, written as 16 and 16, unaligned.
        unsafe {
            _mm_storeu_si128(p, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.0));
            _mm_storeu_si128(p.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.1));
        }
        out
    }
    #[inline(always)]
    fn shift_exponent(self, x: F) -> F {
        // SAFETY: `self` proves the features.
        unsafe {
            let one = _mm256_set1_epi32(0x3f80_0000);
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(x.0));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(x.1));
            let sums = [_mm256_add_epi32(low, one), _mm256_add_epi32(high, one)];
            (_mm256_castsi256_ps(sums[0]), _mm256_castsi256_ps(sums[1]))
        }
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        // SAFETY: `self` proves the features.
        let v = unsafe { _mm256_set1_epi32(x) };
        (v, v)
    }
    #[inline(always)]
    fn lanes_i(self, x: I) -> [i32; LANES] {
        let mut out = [0; LANES];
        let p = out.as_mut_ptr().cast::<__m256i>();
        // SAFETY: `self` proves the features; `out` has 64 bytes, written as 32 and 32, unaligned.
        unsafe {
            _mm256_storeu_si256(p, x.0);
            _mm256_storeu_si256(p.add(1), x.1);
        }
        out
    }
    #[inline(always)]
    fn sum_i(self, x: I) -> i32 {
        // SAFETY: `self` proves the features.
        unsafe {
            let x = _mm256_add_epi32(x.0, x.1);
            let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
            _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
        }
    }
    #[inline(always)]
    fn greatest_i(self, x: I) -> i32 {
        // SAFETY: `self` proves the features.
        unsafe {
            let x = _mm256_max_epi32(x.0, x.1);
            let x = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            let x = _mm_max_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
            _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
        }
    }
    #[inline(always)]
    fn widen_u8(self, x: &[u8; LANES]) -> I {
        // SAFETY: `self` proves the features; `x` has sixteen bytes, unaligned.
        unsafe {
            let bytes = _mm_loadu_si128(x.as_ptr().cast());
            let high = _mm_srli_si128::<8>(bytes);
            (_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(high))
        }
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)) }
    }
    #[inline(always)]
    fn mul_i(self, a: I, b: I) -> I {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_mullo_epi32(a.0, b.0), _mm256_mullo_epi32(a.1, b.1)) }
    }
    #[inline(always)]
    fn to_f32(self, x: I) -> F {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_cvtepi32_ps(x.0), _mm256_cvtepi32_ps(x.1)) }
    }
    #[inline(always)]
    fn max_magnitude(self, a: I, x: F) -> I {
        // SAFETY: `self` proves the features.
        unsafe {
            let mask = _mm256_set1_epi32(0x7fff_ffff);
            let low = _mm256_and_si256(_mm256_castps_si256(x.0), mask);
            let high = _mm256_and_si256(_mm256_castps_si256(x.1), mask);
            (_mm256_max_epi32(a.0, low), _mm256_max_epi32(a.1, high))
        }
    }
    #[inline(always)]
    fn round(self, x: F) -> I {
        // SAFETY: `self` proves the features.
        unsafe { (_mm256_cvtps_epi32(x.0), _mm256_cvtps_epi32(x.1)) }
    }
    #[inline(always)]
    fn pack_quads(self, x: I) -> [i32; 4] {
        let mut out = [0; 8];
        // SAFETY: `self` proves the features; `out` has 32 bytes, unaligned.
        unsafe {
            // Packing works in 128-bit halves: i32 lanes come out as quads 0, 2 | 1, 3.
            let words = _mm256_packs_epi32(x.0, x.1);
            let bytes = _mm256_packs_epi16(words, words);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), bytes);
        }
        [out[0], out[4], out[1], out[5]]
    }

    #[inline(always)]
    fn prefetch<T>(self, x: &T) {
        // SAFETY: every x86-64 processor has the instruction; it changes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>((&raw const *x).cast()) }
    }

    #[inline(always)]
    fn open_nibbles(self, line: &Line) -> [I; 2] {
        let p = line.0.as_ptr().cast::<__m256i>();
        // SAFETY: `self` proves the features; a line has 64 bytes and is aligned to 64.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let (a, b) = (_mm256_load_si256(p), _mm256_load_si256(p.add(1)));
            let low = (_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
            let (a, b) = (_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b));
            [low, (_mm256_and_si256(a, mask), _mm256_and_si256(b, mask))]
        }
    }
    #[inline(always)]
    fn start_nibbles(self, _: I) -> I {
        self.splat_i(0)
    }
    #[inline(always)]
    fn dot_nibbles(self, sum: I, codes: [I; 2], quads: [i32; 2]) -> I {
        dot(self, dot(self, sum, codes[0], quads[0]), codes[1], quads[1])
    }
    #[inline(always)]
    fn flush_nibbles(self, sum: I, total: I) -> I {
        // SAFETY: `self` proves the features.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let low = _mm256_madd_epi16(sum.0, ones);
            let high = _mm256_madd_epi16(sum.1, ones);
            (_mm256_add_epi32(total.0, low), _mm256_add_epi32(total.1, high))
        }
    }

    #[inline(always)]
    fn dot_nibbles_of<const R: usize>(
        self,
        job: &CodeBlocks<'_, Self>,
        acc: &mut [[f32; LANES]; R],
    ) {
        avx2_blocks::dot_blocks(self, job, acc);
    }

    #[inline(always)]
    fn open_bytes(self, line: &Line) -> [I; 2] {
        let p = line.0.as_ptr().cast::<__m256i>();
        // SAFETY: `self` proves the features; a line has 64 bytes and is aligned to 64.
        unsafe {
            let offset = _mm256_set1_epi8(Self::BYTE_OFFSET as i8);
            let low = _mm256_xor_si256(_mm256_load_si256(p), offset);
            let high = _mm256_xor_si256(_mm256_load_si256(p.add(1)), offset);
            [(low, high), (_mm256_abs_epi8(low), _mm256_abs_epi8(high))]
        }
    }
    #[inline(always)]
    fn dot_bytes(self, sum: I, [signed, magnitude]: [I; 2], quad: i32) -> I {
        // SAFETY: `self` proves the features.
        unsafe {
            let (quad, ones) = (_mm256_set1_epi32(quad), _mm256_set1_epi16(1));
            let low = _mm256_maddubs_epi16(magnitude.0, _mm256_sign_epi8(quad, signed.0));
            let high = _mm256_maddubs_epi16(magnitude.1, _mm256_sign_epi8(quad, signed.1));
            let (low, high) = (_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
            (_mm256_add_epi32(sum.0, low), _mm256_add_epi32(sum.1, high))
        }
    }
}
