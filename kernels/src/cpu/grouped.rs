//! Linears with 4- and 8-bit weights and int8 activations (W4A8, W8A8).
//!
//! ```text
//! y[m, n] = sum over blocks b of  w_scale[n, b] * a_scale[m, b]
//!           * ( sum over columns i of b of code[n, i] * a[m, i]  -  zero[n, b] * a_sum[m, b] )
//! in    codes, scales, zeros in tiles of sixteen rows ([`super::packed`], which has the picture)
//!       activations in quads with a scale and a sum for each block ([`super::quantize`])
//! out   columns of `[rows, n]` f32
//! split tiles over threads; a tile by panels of 8 KiB, which come from memory ahead of their use,
//!       stay in the first-level cache and are opened once for every four or eight rows
//! bytes every code and scale once (and once more for every 64 rows), activations from cache
//! ```
//! Integers are exact inside a block (at most 128 * 255 * 127 < 2^22), and blocks are added by one
//! f32 fma each in ascending order. So a row's result depends on nothing but its weights and its
//! activations: not on the other rows, the threads or the instruction set.
//!
//! Error against exact arithmetic: `|x - a_scale * a| <= a_scale / 2` for every activation, so
//! `|error| <= sum_b |w_scale| * a_scale / 2 * sum_i |code - zero|`, plus f32 rounding of at most
//! (blocks + 2) half ulps of the sum of the blocks' magnitudes. Reference:
//! [`quant::reference::matmul`]. Other ways to the same bits: up to four rows with
//! AVX-512 (`x86/avx512_rows.rs`), more on a matrix unit ([`super::few_rows`], [`super::matmul`]).

use super::blocks::CodeBlocks;
use super::isa::Kernel;
use super::packed::{Packed, Tile, TileScales, TileZeros};
use super::quantize::{BlockScale, QuadLayout};
use super::share::MatMut;
use super::simd::{LANES, Line, Simd};
use super::tile::put;
use quant::Bits;
use std::ops::Range;

/// Rows of activations whose blocks stay in the second-level cache while all tiles pass by.
const ROWS_CACHED: usize = 64;

/// Lines of a panel: its codes, the next panel's and the activations of four rows or eight share
/// a first-level cache of 32 KiB.
pub(crate) const PANEL: usize = 128;

/// Most tiles side by side: eight were no faster with one thread and slower with two.
pub(crate) const STREAMS: usize = 4;

/// Tiles that a thread claims at least: two, which a matrix unit multiplies together.
pub(crate) const TILES_AT_LEAST: usize = 2;

/// Quantized activations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Activations<'a> {
    /// `[rows / height, blocks, height, block / 4]`
    pub(crate) quads: &'a [i32],
    /// `[rows / height, blocks, height]`
    pub(crate) scales: &'a [BlockScale],
    /// The height: as many rows are multiplied together.
    pub(crate) layout: QuadLayout,
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
    /// Tiles that a few rows may take side by side, at most [`STREAMS`].
    pub(crate) streams: usize,
}

impl Kernel for GroupedLinear<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        match self.weight.bits {
            Bits::Four => linear::<S, Four>(s, &mut self),
            Bits::Eight => linear::<S, Eight>(s, &mut self),
        }
    }
}

/// How codes of one width are multiplied.
trait Codes<S: Simd> {
    /// Taken from a code before it is multiplied.
    const OFFSET: i32;
    /// Adds blocks times rows to the rows' accumulators.
    fn dot<const R: usize>(s: S, job: &CodeBlocks<'_, S>, acc: &mut [[f32; LANES]; R]);
}

struct Four;
struct Eight;

impl<S: Simd> Codes<S> for Four {
    const OFFSET: i32 = 0;
    #[inline(always)]
    fn dot<const R: usize>(s: S, job: &CodeBlocks<'_, S>, acc: &mut [[f32; LANES]; R]) {
        s.dot_nibbles_of(job, acc);
    }
}

impl<S: Simd> Codes<S> for Eight {
    const OFFSET: i32 = S::BYTE_OFFSET;
    #[inline(always)]
    fn dot<const R: usize>(s: S, job: &CodeBlocks<'_, S>, acc: &mut [[f32; LANES]; R]) {
        s.dot_bytes_of(job, acc);
    }
}

/// Sums of a tile and some rows, each in a cache line of its own: vectors across two lines are
/// slow to load after they were stored.
#[repr(C, align(64))]
struct Sums([[f32; LANES]; ROWS_CACHED]);

#[inline(always)]
fn linear<S: Simd, C: Codes<S>>(s: S, job: &mut GroupedLinear<'_>) {
    let mut y = Sums([[0.0; LANES]; ROWS_CACHED]);
    let (tiles, height) = (job.tiles.clone(), job.x.layout.height);
    let cached = ROWS_CACHED - ROWS_CACHED % height;
    for start in (0..job.out.rows()).step_by(cached) {
        let rows = start..job.out.rows().min(start + cached);
        let y = &mut y.0[..rows.len()];
        for tile in tiles.clone() {
            y.fill([0.0; LANES]);
            one_tile::<S, C>(s, (job.weight, job.x), (tile, tiles.end), rows.clone(), y);
            put(&mut job.out, (&job.tiles, job.weight.n), job.bias, (tile, start), y);
        }
    }
}

/// A tile before tile `end` times some rows, a panel in turn: it stays in the first-level cache while the
/// rows pass by, and meanwhile the next one comes from memory.
#[inline(always)]
fn one_tile<S: Simd, C: Codes<S>>(
    s: S,
    (weight, x): (&Packed, Activations<'_>),
    (tile, end): (usize, usize),
    rows: Range<usize>,
    y: &mut [[f32; LANES]],
) {
    for start in (0..weight.blocks.count).step_by(weight.panel) {
        let blocks = start..weight.blocks.count.min(start + weight.panel);
        let group = weight.blocks.group_of(start);
        let part = Part { weight, tile, end, blocks, group };
        let (mut ahead, mut row, mut y) = (part.ahead(), rows.start, &mut *y);
        while row < rows.end {
            let count = x.layout.height.min(rows.end - row);
            let (these, rest) = y.split_at_mut(count);
            some_rows::<S, C>(s, (&part, ahead), (x, row), these);
            (row, y, ahead) = (row + count, rest, &[]);
        }
    }
}

/// A part of a tile times as many rows from `row` on as `y` has, which are together.
#[inline(always)]
fn some_rows<S: Simd, C: Codes<S>>(
    s: S,
    part: (&Part<'_>, &[Line]),
    x: (Activations<'_>, usize),
    y: &mut [[f32; LANES]],
) {
    match y.len() {
        1 => dot_groups::<S, C, 1>(s, part, x, y),
        2 => dot_groups::<S, C, 2>(s, part, x, y),
        3 => dot_groups::<S, C, 3>(s, part, x, y),
        4 => dot_groups::<S, C, 4>(s, part, x, y),
        5 if S::ROWS > 4 => dot_groups::<S, C, 5>(s, part, x, y),
        6 if S::ROWS > 4 => dot_groups::<S, C, 6>(s, part, x, y),
        7 if S::ROWS > 4 => dot_groups::<S, C, 7>(s, part, x, y),
        8 if S::ROWS > 4 => dot_groups::<S, C, 8>(s, part, x, y),
        rows => unreachable!("{rows} rows at once"),
    }
}

/// Some blocks of the columns of a tile.
struct Part<'a> {
    weight: &'a Packed,
    tile: usize,
    /// Behind the last tile.
    end: usize,
    blocks: Range<usize>,
    /// Of the first block, and how many blocks of it there are from that one on.
    group: (usize, usize),
}

impl<'a> Part<'a> {
    /// Codes that are needed when the stream goes on; after its last tile none.
    #[inline(always)]
    fn ahead(&self) -> &'a [Line] {
        let (w, block) = (self.weight, self.blocks.end);
        let left = ((self.end - self.tile) * w.blocks.count).saturating_sub(block);
        w.lines_from(self.tile, block, self.blocks.len().min(left))
    }

    /// Asks for the scales that are needed a panel after group `group`.
    #[inline(always)]
    fn ask_scales<S: Simd>(&self, s: S, group: usize) {
        let later = group + self.weight.panel.div_ceil(self.weight.blocks.per_group);
        self.weight.ask_group(s, self.tile, later);
    }
}

/// Takes up to `count` lines off the front.
#[inline(always)]
fn take_lines<'a>(lines: &mut &'a [Line], count: usize) -> &'a [Line] {
    let (taken, rest) = lines.split_at(count.min(lines.len()));
    *lines = rest;
    taken
}

/// Adds a part times `R` rows from `row` on to `y`, a group at a time; meanwhile asks for the lines
/// `ahead`.
#[inline(always)]
fn dot_groups<S: Simd, C: Codes<S>, const R: usize>(
    s: S,
    (part, mut ahead): (&Part<'_>, &[Line]),
    (x, row): (Activations<'_>, usize),
    y: &mut [[f32; LANES]],
) {
    let Some(y) = y.first_chunk_mut::<R>() else { return };
    let (w, blocks, tile) = (part.weight, &part.weight.blocks, part.weight.tile(part.tile));
    let (height, first) = (x.layout.height, row * blocks.count);
    let mut b = part.blocks.start;
    let (mut group, mut left) = part.group;
    while b < part.blocks.end {
        let count = left.min(part.blocks.end - b);
        if !ahead.is_empty() {
            part.ask_scales(s, group);
        }
        let job = CodeBlocks {
            lines: &tile.codes[b * w.block_lines()..][..count * w.block_lines()],
            block_lines: w.block_lines(),
            count,
            quads: &x.quads[(first + b * height) * (blocks.block / 4)..],
            scales: &x.scales[first + b * height..],
            height,
            scale: scale(s, &tile, group),
            zero: minus_zero::<S, C>(s, &tile, group),
            ahead: take_lines(&mut ahead, count * w.block_lines()),
        };
        C::dot(s, &job, y);
        b += count;
        (group, left) = (group + 1, blocks.per_group);
    }
}

/// Scales of a group.
#[inline(always)]
pub(crate) fn scale<S: Simd>(s: S, tile: &Tile<'_>, group: usize) -> S::F {
    match tile.scales {
        TileScales::F16(all) => s.widen_f16(&all[group]),
        TileScales::F32(all) => s.load(&all[group]),
    }
}

/// Zero points of a group, less what is taken from its codes, times -1.
#[inline(always)]
fn minus_zero<S: Simd, C: Codes<S>>(s: S, tile: &Tile<'_>, group: usize) -> S::I {
    match tile.zeros {
        TileZeros::All(zero) => s.splat_i(C::OFFSET - zero),
        TileZeros::Each(all) => {
            let minus = s.mul_i(s.widen_u8(&all[group]), s.splat_i(-1));
            s.add_i(minus, s.splat_i(C::OFFSET))
        }
    }
}

#[cfg(test)]
#[path = "grouped_tests.rs"]
mod tests;
