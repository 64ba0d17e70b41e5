//! [`Simd`] in plain Rust: arrays of sixteen lanes. Runs on every processor, and is what the
//! vector implementations are compared with.

use super::simd::{LANES, Line, Simd};
use std::array::from_fn;

/// Needs nothing of the processor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

type F = [f32; LANES];
type I = [i32; LANES];

/// Adding this to a value within int8 leaves its nearest integer in the low bits.
const ROUNDER: f32 = 12_582_912.0;

#[inline(always)]
fn dot(mut sum: I, codes: &[u8; 64], quad: i32) -> I {
    let quad = quad.to_le_bytes().map(|a| i32::from(a as i8));
    for (lane, codes) in sum.iter_mut().zip(codes.as_chunks::<4>().0) {
        for (code, a) in codes.iter().zip(quad) {
            *lane += i32::from(*code) * a;
        }
    }
    sum
}

impl Simd for Scalar {
    const SUMS: usize = 4;
    const ROWS: usize = 4;
    type F = F;
    type I = I;
    type Nibbles = [u8; 64];
    type NibbleSum = I;
    type Bytes = [u8; 64];

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &F) -> F {
        *x
    }
    #[inline(always)]
    fn store(self, x: F, out: &mut F) {
        *out = x;
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn widen_f16(self, x: &[u16; LANES]) -> F {
        x.map(|bits| half::f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    fn widen_bf16(self, x: &[u16; LANES]) -> F {
        x.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    fn narrow_f16(self, x: F) -> [u16; LANES] {
        x.map(|x| half::f16::from_f32(x).to_bits())
    }
    #[inline(always)]
    fn shift_exponent(self, x: F) -> F {
        x.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(0x3f80_0000)))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        [x; LANES]
    }
    #[inline(always)]
    fn lanes_i(self, x: I) -> I {
        x
    }
    #[inline(always)]
    fn sum_i(self, x: I) -> i32 {
        x.iter().sum()
    }
    #[inline(always)]
    fn greatest_i(self, x: I) -> i32 {
        x.into_iter().fold(i32::MIN, i32::max)
    }
    #[inline(always)]
    fn widen_u8(self, x: &[u8; LANES]) -> I {
        x.map(i32::from)
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn mul_i(self, a: I, b: I) -> I {
        from_fn(|i| a[i].wrapping_mul(b[i]))
    }
    #[inline(always)]
    fn to_f32(self, x: I) -> F {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    fn max_magnitude(self, a: I, x: F) -> I {
        from_fn(|i| a[i].max((x[i].to_bits() & 0x7fff_ffff) as i32))
    }
    #[inline(always)]
    fn round(self, x: F) -> I {
        x.map(|x| (x + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32)
    }
    #[inline(always)]
    fn pack_quads(self, x: I) -> [i32; 4] {
        from_fn(|q| i32::from_le_bytes(from_fn(|i| x[4 * q + i] as u8)))
    }

    #[inline(always)]
    fn prefetch<T>(self, _: &T) {}

    #[inline(always)]
    fn open_nibbles(self, line: &Line) -> [[u8; 64]; 2] {
        [line.0.map(|byte| byte & 15), line.0.map(|byte| byte >> 4)]
    }
    #[inline(always)]
    fn start_nibbles(self, total: I) -> I {
        total
    }
    #[inline(always)]
    fn dot_nibbles(self, sum: I, codes: [[u8; 64]; 2], quads: [i32; 2]) -> I {
        dot(dot(sum, &codes[0], quads[0]), &codes[1], quads[1])
    }
    #[inline(always)]
    fn flush_nibbles(self, sum: I, _: I) -> I {
        sum
    }

    #[inline(always)]
    fn open_bytes(self, line: &Line) -> [u8; 64] {
        line.0
    }
    #[inline(always)]
    fn dot_bytes(self, sum: I, codes: [u8; 64], quad: i32) -> I {
        dot(sum, &codes, quad)
    }
}
