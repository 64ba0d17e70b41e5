//! Linears with 4- and 8-bit weights and int8 activations (W4A8, W8A8).
//!
//! ```text
//! y[m, n] = sum over blocks b of  w_scale[n, b] * a_scale[m, b]
//!           * ( sum over columns i of b of code[n, i] * a[m, i]  -  zero[n, b] * a_sum[m, b] )
//! in    codes, scales, zeros in tiles of sixteen rows ([`super::packed`], which has the picture)
//!       activations in quads with a scale and a sum for each block ([`super::quantize`])
//! out   columns of `[rows, n]` f32
//! split tiles over threads; a tile's weights are opened once for up to four rows of activations
//! bytes every code and scale once (and once more for every 64 rows), activations from cache
//! ```
//! Integers are exact inside a block (at most 128 * 255 * 127 < 2^24), and blocks are added by one
//! f32 fma each in ascending order. So a row's result depends on nothing but its weights and its
//! activations: not on the other rows, the threads or the instruction set.
//!
//! Error against exact arithmetic: `|x - a_scale * a| <= a_scale / 2` for every activation, so
//! `|error| <= sum_b |w_scale| * a_scale / 2 * sum_i |code - zero|`, plus f32 rounding of at most
//! (blocks + 2) half ulps of the sum of the blocks' magnitudes. Reference:
//! [`quant::reference::matmul`].

// Loops over heads, rows and chains count indices: they unroll whole, over several arrays at once.
#![allow(clippy::needless_range_loop)]

use super::isa::Kernel;
use super::packed::{Packed, Tile, TileScales, TileZeros};
use super::quantize::BlockScale;
use super::share::MatMut;
use super::simd::{LANES, Line, Simd};
use super::tile::put;
use quant::Bits;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of activations whose blocks stay in the second-level cache while all tiles pass by.
const ROWS_CACHED: usize = 64;

/// Quads of a flush: as many dots as running sums bear.
const QUADS: usize = 8;

/// Quantized activations `[rows, blocks]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Activations<'a> {
    /// `[rows, blocks, block / 4]`
    pub(crate) quads: &'a [i32],
    /// `[rows, blocks]`
    pub(crate) scales: &'a [BlockScale],
}

/// Computes output columns `16 * tiles.start .. min(16 * tiles.end, n)`.
#[derive(Debug)]
pub(crate) struct GroupedLinear<'a> {
    pub(crate) weight: &'a Packed,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) x: Activations<'a>,
    pub(crate) tiles: Range<usize>,
    /// Exactly those columns.
    pub(crate) out: MatMut<'a>,
}

impl Kernel for GroupedLinear<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        match self.weight.bits {
            Bits::Four => linear::<S, Four<S>, 4>(s, &mut self),
            Bits::Eight => linear::<S, Eight<S>, 8>(s, &mut self),
        }
    }
}

/// How codes of one width are multiplied: `Simd`'s nibble or byte operations.
trait Codes<S: Simd> {
    type Open: Copy;
    type Sum: Copy;
    fn zero(s: S) -> Self::Sum;
    fn open(s: S, line: &Line) -> Self::Open;
    /// Adds the dots of one line with its quads, the first of which is `quads[0]`.
    fn dot(s: S, sum: Self::Sum, codes: Self::Open, quads: &[i32]) -> Self::Sum;
    fn flush(s: S, sum: Self::Sum, total: S::I) -> S::I;
}

struct Four<S>(PhantomData<S>);
struct Eight<S>(PhantomData<S>);

impl<S: Simd> Codes<S> for Four<S> {
    type Open = [S::Nibbles; 2];
    type Sum = S::NibbleSum;
    #[inline(always)]
    fn zero(s: S) -> Self::Sum {
        s.zero_nibbles()
    }
    #[inline(always)]
    fn open(s: S, line: &Line) -> Self::Open {
        s.open_nibbles(line)
    }
    #[inline(always)]
    fn dot(s: S, sum: Self::Sum, codes: Self::Open, quads: &[i32]) -> Self::Sum {
        let sum = s.dot_nibbles(sum, codes[0], quads[0]);
        s.dot_nibbles(sum, codes[1], quads[1])
    }
    #[inline(always)]
    fn flush(s: S, sum: Self::Sum, total: S::I) -> S::I {
        s.flush_nibbles(sum, total)
    }
}

impl<S: Simd> Codes<S> for Eight<S> {
    type Open = S::Bytes;
    type Sum = S::ByteSum;
    #[inline(always)]
    fn zero(s: S) -> Self::Sum {
        s.zero_bytes()
    }
    #[inline(always)]
    fn open(s: S, line: &Line) -> Self::Open {
        s.open_bytes(line)
    }
    #[inline(always)]
    fn dot(s: S, sum: Self::Sum, codes: Self::Open, quads: &[i32]) -> Self::Sum {
        s.dot_bytes(sum, codes, quads[0])
    }
    #[inline(always)]
    fn flush(s: S, sum: Self::Sum, total: S::I) -> S::I {
        s.flush_bytes(sum, total)
    }
}

/// Few rows take several tiles side by side, which keeps the memory busy; more rows take one tile
/// at a time, which keeps the sums in registers.
#[inline(always)]
fn linear<S: Simd, C: Codes<S>, const LINES: usize>(s: S, job: &mut GroupedLinear<'_>) {
    match job.out.rows() {
        1 => walk::<S, C, LINES, 4, 1>(s, job),
        2 => walk::<S, C, LINES, 2, 2>(s, job),
        rows => {
            for start in (0..rows).step_by(ROWS_CACHED) {
                for tile in job.tiles.clone() {
                    rows_of_tile::<S, C, LINES>(s, job, tile, start..rows.min(start + ROWS_CACHED));
                }
            }
        }
    }
}

/// All tiles, `T` at a time, times `M` rows, which are all there are.
#[inline(always)]
fn walk<S: Simd, C: Codes<S>, const LINES: usize, const T: usize, const M: usize>(
    s: S,
    job: &mut GroupedLinear<'_>,
) {
    let mut tile = job.tiles.start;
    while tile + T <= job.tiles.end {
        product::<S, C, LINES, T, M>(s, job, tile, 0);
        tile += T;
    }
    while tile < job.tiles.end {
        product::<S, C, LINES, 1, M>(s, job, tile, 0);
        tile += 1;
    }
}

/// One tile times some rows, up to four at a time.
#[inline(always)]
fn rows_of_tile<S: Simd, C: Codes<S>, const LINES: usize>(
    s: S,
    job: &mut GroupedLinear<'_>,
    tile: usize,
    rows: Range<usize>,
) {
    let mut row = rows.start;
    while row < rows.end {
        row += match rows.end - row {
            1 => product::<S, C, LINES, 1, 1>(s, job, tile, row),
            2 => product::<S, C, LINES, 1, 2>(s, job, tile, row),
            3 => product::<S, C, LINES, 1, 3>(s, job, tile, row),
            _ => product::<S, C, LINES, 1, 4>(s, job, tile, row),
        };
    }
}

/// `T` tiles from `tile` times `M` rows from `row`; returns `M`.
#[inline(always)]
fn product<S: Simd, C: Codes<S>, const LINES: usize, const T: usize, const M: usize>(
    s: S,
    job: &mut GroupedLinear<'_>,
    tile: usize,
    row: usize,
) -> usize {
    let w = job.weight;
    let mut out = [[[0.0; LANES]; M]; T];
    let tiles = std::array::from_fn(|t| w.tile(tile + t));
    dot_tiles::<S, C, LINES, T, M>(s, w, tiles, rows_of(job, row), &mut out);
    for t in 0..T {
        put(&mut job.out, (&job.tiles, job.weight.n), job.bias, (tile + t, row), &out[t]);
    }
    M
}

/// Activations of rows `row..row + M`.
#[inline(always)]
fn rows_of<'a, const M: usize>(job: &GroupedLinear<'a>, row: usize) -> [Activations<'a>; M] {
    let (quads, blocks) = (job.weight.blocks.width() / 4, job.weight.blocks.count);
    let mut rows = [job.x; M];
    for (m, x) in rows.iter_mut().enumerate() {
        x.quads = &job.x.quads[(row + m) * quads..][..quads];
        x.scales = &job.x.scales[(row + m) * blocks..][..blocks];
    }
    rows
}

#[inline(always)]
fn dot_tiles<S: Simd, C: Codes<S>, const LINES: usize, const T: usize, const M: usize>(
    s: S,
    w: &Packed,
    tiles: [Tile<'_>; T],
    x: [Activations<'_>; M],
    out: &mut [[[f32; LANES]; M]; T],
) {
    let (block_quads, block_lines) = (w.blocks.block / 4, w.block_lines());
    let mut acc = [[s.splat(0.0); M]; T];
    let (mut group, mut left) = (0, w.blocks.per_group);
    for b in 0..w.blocks.count {
        let mut quads: [&[i32]; M] = [&[]; M];
        for m in 0..M {
            quads[m] = &x[m].quads[b * block_quads..][..block_quads];
        }
        let mut lines: [&[Line]; T] = [&[]; T];
        for t in 0..T {
            lines[t] = &tiles[t].codes[b * block_lines..][..block_lines];
        }
        let totals = dot_blocks::<S, C, LINES, T, M>(s, lines, quads);
        for t in 0..T {
            let (scale, zero) = factors(s, &tiles[t], group);
            for m in 0..M {
                let x = x[m].scales[b];
                let shift = s.mul_i(zero, s.splat_i(x.sum));
                let dots = s.to_f32(s.sub_i(totals[t][m], shift));
                acc[t][m] = s.fma(s.mul(scale, s.splat(x.scale)), dots, acc[t][m]);
            }
        }
        left -= 1;
        if left == 0 {
            (group, left) = (group + 1, w.blocks.per_group);
        }
    }
    for t in 0..T {
        for m in 0..M {
            s.store(acc[t][m], &mut out[t][m]);
        }
    }
}

/// Scales and zero points of a group.
#[inline(always)]
pub(crate) fn factors<S: Simd>(s: S, tile: &Tile<'_>, group: usize) -> (S::F, S::I) {
    let scale = match tile.scales {
        TileScales::F16(all) => s.widen_f16(&all[group]),
        TileScales::F32(all) => s.load(&all[group]),
    };
    let zero = match tile.zeros {
        TileZeros::All(zero) => s.splat_i(zero),
        TileZeros::Each(all) => s.widen_u8(&all[group]),
    };
    (scale, zero)
}

/// Exact sums of code times activation over one block.
#[inline(always)]
fn dot_blocks<S: Simd, C: Codes<S>, const LINES: usize, const T: usize, const M: usize>(
    s: S,
    lines: [&[Line]; T],
    quads: [&[i32]; M],
) -> [[S::I; M]; T] {
    let mut totals = [[s.splat_i(0); M]; T];
    let full = lines[0].len() / LINES;
    for i in 0..full {
        let mut q = [&[0; QUADS]; M];
        for m in 0..M {
            q[m] = &quads[m].as_chunks::<QUADS>().0[i];
        }
        let mut sums = [[C::zero(s); M]; T];
        for t in 0..T {
            let lines = &lines[t].as_chunks::<LINES>().0[i];
            for l in 0..LINES {
                let codes = C::open(s, &lines[l]);
                for m in 0..M {
                    sums[t][m] = C::dot(s, sums[t][m], codes, &q[m][l * QUADS / LINES..]);
                }
            }
        }
        for t in 0..T {
            for m in 0..M {
                totals[t][m] = C::flush(s, sums[t][m], totals[t][m]);
            }
        }
    }
    if full * LINES < lines[0].len() {
        for t in 0..T {
            for m in 0..M {
                let (lines, quads) = (&lines[t][full * LINES..], &quads[m][full * QUADS..]);
                totals[t][m] = dot_rest::<S, C, LINES>(s, lines, quads, totals[t][m]);
            }
        }
    }
    totals
}

/// The lines of a block that do not fill a flush.
#[inline(always)]
fn dot_rest<S: Simd, C: Codes<S>, const LINES: usize>(
    s: S,
    lines: &[Line],
    quads: &[i32],
    total: S::I,
) -> S::I {
    let mut sum = C::zero(s);
    for (l, line) in lines.iter().enumerate() {
        sum = C::dot(s, sum, C::open(s, line), &quads[l * QUADS / LINES..]);
    }
    C::flush(s, sum, total)
}

#[cfg(test)]
#[path = "grouped_tests.rs"]
mod tests;
