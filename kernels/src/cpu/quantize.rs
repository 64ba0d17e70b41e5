//! Activations to int8, one scale for each block of columns.
//!
//! ```text
//! scale = max|x| / 127    q = round(x / scale)    sum = q_0 + q_1 + ...
//! in    x [rows, k] f32, gathered by `source` where columns are permuted or padded
//! out   quads [rows, blocks, block / 4]: four int8 in an i32, first in the lowest byte
//!       scales [rows, blocks]: scale and sum; both in the order of a [`QuadLayout`]
//! split items (row, block) over threads; reads 4 bytes and writes 1 byte a column
//! ```
//! A block with a NaN or an infinity gets the scale NaN, so that its outputs show it. Reference:
//! none of its own, the linears' error bound accounts for it ([`super::grouped`]).

use super::isa::Kernel;
use super::share::{MatMut, Place};
use super::simd::{LANES, Simd};
use crate::program::Rounding;
use std::ops::Range;

/// Most columns of an activation block.
pub(crate) const MAX_BLOCK: usize = Rounding::Coarse.columns();

/// Marks a padding column in [`Blocks::source`].
pub(crate) const PADDING: u32 = u32::MAX;

/// Below this a block counts as zero: 127 / max would overflow.
const TINY: f32 = 1e-35;

/// Scale of a block and the sum of its integers.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct BlockScale {
    pub(crate) scale: f32,
    pub(crate) sum: i32,
}

#[cfg(test)]
impl BlockScale {
    pub(crate) const ZERO: Self = Self { scale: 0.0, sum: 0 };
}

/// How the k columns of a linear fall into activation blocks: none crosses a weight group, all
/// have the same stored size, a multiple of 8, beyond 64 columns of 16.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Blocks {
    /// Blocks of a row.
    pub(crate) count: usize,
    /// Blocks of a weight group.
    pub(crate) per_group: usize,
    /// Stored columns of a block.
    pub(crate) block: usize,
    /// `[count * block]` input column of each stored column or [`PADDING`]; none is the identity.
    pub(crate) source: Option<Vec<u32>>,
}

impl Blocks {
    /// Splits groups of `group` columns evenly into blocks of at most as many as `rounding` lets share a scale.
    pub(crate) fn new(k: usize, group: usize, perm: Option<&[u32]>, rounding: Rounding) -> Self {
        let per_group = group.div_ceil(rounding.columns());
        // Of two depths of a matrix register each is whole lines of 4-bit codes.
        let columns = group.div_ceil(per_group);
        let block = columns.next_multiple_of(if columns > 64 { 16 } else { 8 });
        let count = k / group * per_group;
        let padded = per_group * block != group;
        let mut blocks = Self { count, per_group, block, source: None };
        if padded || perm.is_some() {
            let stored = blocks.stored_columns(group);
            let input = |c: Option<usize>| match (c, perm) {
                (None, _) => PADDING,
                (Some(c), None) => c as u32,
                (Some(c), Some(perm)) => perm[c],
            };
            blocks.source = Some(stored.map(input).collect());
        }
        blocks
    }

    /// The canonical column of each stored column, none for padding.
    pub(crate) fn stored_columns(
        &self,
        group: usize,
    ) -> impl Iterator<Item = Option<usize>> + use<> {
        let span = self.per_group * self.block;
        let groups = self.count / self.per_group;
        (0..groups * span).map(move |i| (i % span < group).then_some(i / span * group + i % span))
    }

    /// Group of a block, and how many blocks of that group are left from there on.
    pub(crate) fn group_of(&self, block: usize) -> (usize, usize) {
        match block {
            // Most parts begin here, and a division takes as long as some lines of weights.
            0 => (0, self.per_group),
            _ => (block / self.per_group, self.per_group - block % self.per_group),
        }
    }

    /// Stored columns of a row.
    pub(crate) fn width(&self) -> usize {
        self.count * self.block
    }
}

/// How quantized activations lie in memory: `height` rows at a time, and of these all rows of a
/// block before the next block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QuadLayout {
    pub(crate) height: usize,
}

impl QuadLayout {
    /// For `rows` rows of which up to `most` are multiplied together, in equal shares: one row left
    /// over would take as long as two.
    pub(crate) fn together(rows: usize, most: usize) -> Self {
        Self { height: rows.div_ceil(rows.div_ceil(most).max(1)).max(1) }
    }

    /// Rows that `rows` take up in memory: the last few count as `height`.
    pub(crate) fn rows(self, rows: usize) -> usize {
        rows.next_multiple_of(self.height)
    }

    /// Where the `blocks` blocks of row `row` lie, `width` elements each.
    pub(crate) fn row(self, row: usize, blocks: usize, width: usize) -> Place {
        let first = row / self.height * self.height * blocks + row % self.height;
        Place { offset: first * width, stride: self.height * width, rows: blocks, width }
    }
}

/// Quantizes some blocks of a row.
#[derive(Debug)]
pub(crate) struct Quantize<'a> {
    /// The whole row; of columns in order, those of the blocks alone.
    pub(crate) x: &'a [f32],
    pub(crate) blocks: &'a Blocks,
    pub(crate) items: Range<usize>,
    /// `[items, block / 4]`
    pub(crate) quads: MatMut<'a, i32>,
    /// `[items, 1]`
    pub(crate) scales: MatMut<'a, BlockScale>,
}

impl Kernel for Quantize<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Blocks { block, ref source, .. } = *self.blocks;
        for (i, item) in self.items.enumerate() {
            let quads = self.quads.row(i);
            self.scales.row(i)[0] = match source {
                None => quantize_block(s, &self.x[i * block..][..block], quads),
                Some(source) => {
                    let mut x = [0.0; MAX_BLOCK];
                    gather(self.x, &source[item * block..][..block], &mut x);
                    quantize_padded(s, &x, quads)
                }
            };
        }
    }
}

/// Quantizes one block of columns in order into as many quads.
#[inline(always)]
pub(crate) fn quantize_block<S: Simd>(s: S, x: &[f32], quads: &mut [i32]) -> BlockScale {
    match x.len() {
        // The blocks of most models, straight from where they lie.
        128 => quantize::<S, 8>(s, x.as_chunks().0, quads),
        64 => quantize::<S, 4>(s, x.as_chunks().0, quads),
        32 => quantize::<S, 2>(s, x.as_chunks().0, quads),
        block => {
            let mut padded = [0.0; MAX_BLOCK];
            padded[..block].copy_from_slice(x);
            quantize_padded(s, &padded, quads)
        }
    }
}

/// Quantizes a block with zeros behind its columns.
#[inline(always)]
fn quantize_padded<S: Simd>(s: S, x: &[f32; MAX_BLOCK], quads: &mut [i32]) -> BlockScale {
    match quads.len() {
        ..=16 => quantize::<S, 4>(s, x.as_chunks().0, quads),
        _ => quantize::<S, 8>(s, x.as_chunks().0, quads),
    }
}

#[inline(always)]
fn gather(row: &[f32], source: &[u32], x: &mut [f32; MAX_BLOCK]) {
    for (x, &column) in x.iter_mut().zip(source) {
        *x = if column == PADDING { 0.0 } else { row[column as usize] };
    }
}

/// Quantizes one block, `V` vectors with zeros behind its columns.
#[inline(always)]
fn quantize<S: Simd, const V: usize>(s: S, x: &[[f32; LANES]], quads: &mut [i32]) -> BlockScale {
    let Some(x) = x.first_chunk::<V>() else { return BlockScale { scale: f32::NAN, sum: 0 } };
    let x = x.each_ref().map(|x| s.load(x));
    let max = magnitude(s, &x);
    if !max.is_finite() {
        quads.fill(0);
        return BlockScale { scale: f32::NAN, sum: 0 };
    }
    let inverse = if max < TINY { 0.0 } else { 127.0 / max };
    let factor = s.splat(inverse);
    let mut sum = s.splat_i(0);
    for (x, quads) in x.into_iter().zip(quads.chunks_mut(4)) {
        let q = s.round(s.mul(x, factor));
        sum = s.add_i(sum, q);
        let packed = s.pack_quads(q);
        match quads.first_chunk_mut() {
            // Of known length, so that it is no call.
            Some(quads) => *quads = packed,
            None => quads.copy_from_slice(&packed[..quads.len()]),
        }
    }
    BlockScale { scale: if inverse == 0.0 { 0.0 } else { max / 127.0 }, sum: s.sum_i(sum) }
}

/// The greatest magnitude; NaN if there is one.
#[inline(always)]
fn magnitude<S: Simd>(s: S, vectors: &[S::F]) -> f32 {
    let max = vectors.iter().fold(s.splat_i(0), |max, &x| s.max_magnitude(max, x));
    f32::from_bits(s.greatest_i(max) as u32)
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Machine};
    use super::*;
    use proptest::prelude::*;
    use testkit::Rng;

    fn run(machine: Machine, x: &[f32], blocks: &Blocks) -> (Vec<i32>, Vec<BlockScale>) {
        let mut quads = vec![0; blocks.width() / 4];
        let mut scales = vec![BlockScale::ZERO; blocks.count];
        let items = 0..blocks.count;
        let (to, scales_to) =
            (MatMut::new(&mut quads, blocks.block / 4), MatMut::new(&mut scales, 1));
        machine.run(Quantize { x, blocks, items, quads: to, scales: scales_to });
        (quads, scales)
    }

    fn machines() -> Vec<Machine> {
        Isa::ALL.into_iter().filter_map(|isa| isa.detect().ok()).collect()
    }

    #[test]
    fn blocks_never_cross_a_group() {
        for (k, group, expected) in [
            (256, 128, (4, 2, 64, false)),
            (4096, 4096, (64, 64, 64, false)),
            (64, 8, (8, 1, 8, false)),
            (40, 20, (2, 1, 24, true)),
            (300, 300, (5, 5, 64, true)),
            (384, 192, (6, 3, 64, false)),
        ] {
            let blocks = Blocks::new(k, group, None, Rounding::Fine);
            let found = (blocks.count, blocks.per_group, blocks.block, blocks.source.is_some());
            assert_eq!(found, expected, "k {k} group {group}");
            let columns: Vec<_> = blocks.stored_columns(group).flatten().collect();
            assert_eq!(columns, (0..k).collect::<Vec<_>>());
        }
        let coarse = |group| Blocks::new(group, group, None, Rounding::Coarse);
        let found = [64, 128, 192, 300].map(coarse).map(|b| (b.per_group, b.block));
        assert_eq!(found, [(1, 64), (1, 128), (2, 96), (3, 112)]);
    }

    proptest! {
        #[test]
        fn every_isa_agrees_and_error_is_half_a_step(
            seed: u64,
            groups in 1usize..4,
            group in 1usize..140,
            permuted: bool,
            coarse: bool,
            exponent in -30i32..30,
        ) {
            let (mut rng, k) = (Rng::new(seed), groups * group);
            let perm = permuted.then(|| rng.permutation(k));
            let rounding = if coarse { Rounding::Coarse } else { Rounding::Fine };
            let blocks = Blocks::new(k, group, perm.as_deref(), rounding);
            let x = rng.floats(k, 2f32.powi(exponent));
            let first = run(Machine::Scalar, &x, &blocks);
            for machine in machines() {
                prop_assert_eq!(&run(machine, &x, &blocks), &first);
            }
            for (i, column) in blocks.stored_columns(group).enumerate() {
                let q = first.0[i / 4].to_le_bytes()[i % 4] as i8;
                let scale = first.1[i / blocks.block].scale;
                let x = column.map_or(0.0, |c| x[perm.as_ref().map_or(c, |p| p[c] as usize)]);
                // half a step, and the rounding of the factor and of the product
                prop_assert!((f32::from(q) * scale - x).abs() <= scale * 0.500_03);
            }
        }
    }

    #[test]
    fn zero_tiny_and_not_finite() {
        let blocks = Blocks::new(32, 16, None, Rounding::Fine);
        for machine in machines() {
            let mut x = [0.0f32; 32];
            x[3] = 1e-38;
            x[20] = f32::NAN;
            let (quads, scales) = run(machine, &x, &blocks);
            assert_eq!((&quads[..], scales[0]), (&[0; 8][..], BlockScale::ZERO));
            assert!(scales[1].scale.is_nan());
            x[20] = f32::NEG_INFINITY;
            assert!(run(machine, &x, &blocks).1[1].scale.is_nan());
        }
    }
}
