//! The vocabulary kernels are written in: sixteen f32 or i32 lanes, 64 bytes of codes, and the
//! few operations that instruction sets differ in.
//!
//! A kernel body is written once over [`Simd`] and compiled per instruction set. Every operation
//! has one exact result (given per lane, rounded once), so all instruction sets agree bit for bit
//! as long as a body fixes the order of its operations. Not here: choosing one ([`super::isa`]),
//! the x86 implementations ([`super::x86`]).

use super::blocks::{self, CodeBlocks};
use super::isa::Kernel;

/// f32 or i32 values of a vector, and weight rows of a tile.
pub(crate) const LANES: usize = 16;

/// Most rows of activations that any instruction set takes together.
pub(crate) const TOGETHER: usize = 8;

/// 64 bytes of codes, aligned to a cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// An instruction set. A value of an implementing type proves that the processor has it.
///
/// A quad is four int8 activations in an i32, the first in the lowest byte. `dot` operations
/// multiply byte `4 r + i` of 64 bytes of codes with byte `i` of the quad and add the four
/// products into lane `r`.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Vectors of f32 sums that fit the registers beside what is multiplied: 4 or 16.
    const SUMS: usize;
    /// Rows of activations that take blocks of a tile together, at most [`TOGETHER`].
    const ROWS: usize;
    /// Taken from a byte code before it is multiplied; 0 if it is multiplied as it is.
    const BYTE_OFFSET: i32 = 0;
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32.
    type I: Copy;
    /// 64 codes of at most 15.
    type Nibbles: Copy;
    /// Running sums of dots of nibbles; may overflow after more than eight quads.
    type NibbleSum: Copy;
    /// 64 codes of at most 255.
    type Bytes: Copy;

    /// Runs a kernel as a function of its own where that is faster: registers are then allocated for
    /// it alone, which compilers do better than for all that is inlined into one function.
    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: a NaN in `b` stays.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: a NaN in `b` stays.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn widen_f16(self, x: &[u16; LANES]) -> Self::F;
    fn widen_bf16(self, x: &[u16; LANES]) -> Self::F;
    /// Rounds to the nearest f16, ties to even.
    fn narrow_f16(self, x: Self::F) -> [u16; LANES];
    /// The f32 whose bits are `(bits(x) << 23) + 0x3f80_0000`.
    fn shift_exponent(self, x: Self::F) -> Self::F;

    fn splat_i(self, x: i32) -> Self::I;
    fn lanes_i(self, x: Self::I) -> [i32; LANES];
    /// Sum of all lanes.
    fn sum_i(self, x: Self::I) -> i32;
    /// The greatest lane.
    fn greatest_i(self, x: Self::I) -> i32;
    fn widen_u8(self, x: &[u8; LANES]) -> Self::I;
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn to_f32(self, x: Self::I) -> Self::F;
    /// The greater of `a` and the bits of `|x|`; bits of magnitudes order as magnitudes do, NaN
    /// above all.
    fn max_magnitude(self, a: Self::I, x: Self::F) -> Self::I;
    /// Nearest integers of values within int8, ties to even.
    fn round(self, x: Self::F) -> Self::I;
    /// Packs integers within int8 into quads.
    fn pack_quads(self, x: Self::I) -> [i32; 4];

    /// The low and the high nibble of each byte.
    fn open_nibbles(self, line: &Line) -> [Self::Nibbles; 2];
    /// Running sums that begin at a total where they can hold one, else at zero.
    fn start_nibbles(self, total: Self::I) -> Self::NibbleSum;
    /// Adds the dots of the low nibbles with the first quad and of the high ones with the second.
    fn dot_nibbles(
        self,
        sum: Self::NibbleSum,
        codes: [Self::Nibbles; 2],
        quads: [i32; 2],
    ) -> Self::NibbleSum;
    /// The total that the sums began at, plus all that was added to them.
    fn flush_nibbles(self, sum: Self::NibbleSum, total: Self::I) -> Self::I;

    /// [`blocks::dot_nibbles`], for at most [`Self::ROWS`] rows.
    #[inline(always)]
    fn dot_nibbles_of<const R: usize>(
        self,
        job: &CodeBlocks<'_, Self>,
        acc: &mut [[f32; LANES]; R],
    ) {
        blocks::dot_nibbles(self, job, acc);
    }

    /// [`blocks::dot_bytes`], for at most [`Self::ROWS`] rows.
    #[inline(always)]
    fn dot_bytes_of<const R: usize>(self, job: &CodeBlocks<'_, Self>, acc: &mut [[f32; LANES]; R]) {
        blocks::dot_bytes(self, job, acc);
    }

    fn open_bytes(self, line: &Line) -> Self::Bytes;
    /// Adds the dots of bytes less [`Self::BYTE_OFFSET`] with a quad.
    fn dot_bytes(self, sum: Self::I, codes: Self::Bytes, quad: i32) -> Self::I;

    /// Asks for a cache line that will be read soon; has no result.
    fn prefetch<T>(self, x: &T);

    /// Sum of all lanes by halving: lane `i + 8` onto `i`, then 4, 2, 1.
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    /// The greatest lane, none of which is NaN.
    #[inline(always)]
    fn greatest(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        lanes.into_iter().fold(lanes[0], |a, b| if b > a { b } else { a })
    }

    /// Loads up to sixteen values, zeros behind them.
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// Stores the first `out.len()` lanes, at most sixteen.
    #[inline(always)]
    fn store_part(self, x: Self::F, out: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        out.copy_from_slice(&lanes[..out.len()]);
    }
}
