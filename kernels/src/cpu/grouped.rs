//! Linears with 4- and 8-bit weights and int8 activations (W4A8, W8A8).
//!
//! ```text
//! y[m, n] = sum over blocks b of  w_scale[n, b] * a_scale[m, b]
//!           * ( sum over columns i of b of code[n, i] * a[m, i]  -  zero[n, b] * a_sum[m, b] )
//! in    codes, scales, zeros in tiles of sixteen rows ([`super::packed`], which has the picture)
//!       activations in quads with a scale and a sum for each block ([`super::quantize`])
//! out   columns of `[rows, n]` f32
//! split tiles over threads. One row takes four tiles side by side, which keeps the memory busy;
//!       more rows take a tile by panels of 1024 columns, which come from memory ahead of their
//!       use, stay in the first-level cache and are opened once for every four or eight rows
//! bytes every code and scale once (and once more for every 64 rows), activations from cache
//! ```
//! Integers are exact inside a block (at most 64 * 255 * 127 < 2^24), and blocks are added by one
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
use super::simd::{LANES, Line, NibbleBlocks, Simd};
use super::tile::put;
use quant::Bits;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of activations whose blocks stay in the second-level cache while all tiles pass by.
const ROWS_CACHED: usize = 64;

/// Columns of a panel: its codes, the next panel's and the activations of four rows share a
/// first-level cache of 32 KiB.
pub(crate) const PANEL: usize = 1024;

/// Tiles that one row takes at once.
pub(crate) const SIDE_BY_SIDE: usize = 4;

/// Quads of a flush: as many as running sums bear.
const QUADS: usize = 8;

/// Rows of activations that take a tile together.
const SIDE: usize = 4;

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
    /// Taken from a code before it is multiplied.
    const OFFSET: i32;
    type Open: Copy;
    type Sum: Copy;
    fn zero(s: S) -> Self::Sum;
    fn open(s: S, line: &Line) -> Self::Open;
    /// Adds the dots of one line with its quads, the first of which is `quads[0]`.
    fn dot(s: S, sum: Self::Sum, codes: Self::Open, quads: &[i32]) -> Self::Sum;
    fn flush(s: S, sum: Self::Sum, total: S::I) -> S::I;
    /// [`Simd::dot_blocks`], if the codes are nibbles.
    fn dot_blocks<const R: usize>(
        s: S,
        blocks: &NibbleBlocks<'_, S>,
        acc: &mut [[f32; LANES]; R],
    ) -> bool;
}

struct Four<S>(PhantomData<S>);
struct Eight<S>(PhantomData<S>);

impl<S: Simd> Codes<S> for Four<S> {
    const OFFSET: i32 = 0;
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
        s.dot_nibbles(sum, codes, [quads[0], quads[1]])
    }
    #[inline(always)]
    fn flush(s: S, sum: Self::Sum, total: S::I) -> S::I {
        s.flush_nibbles(sum, total)
    }
    #[inline(always)]
    fn dot_blocks<const R: usize>(
        s: S,
        blocks: &NibbleBlocks<'_, S>,
        acc: &mut [[f32; LANES]; R],
    ) -> bool {
        s.dot_blocks(blocks, acc)
    }
}

impl<S: Simd> Codes<S> for Eight<S> {
    const OFFSET: i32 = S::BYTE_OFFSET;
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
    #[inline(always)]
    fn dot_blocks<const R: usize>(
        _: S,
        _: &NibbleBlocks<'_, S>,
        _: &mut [[f32; LANES]; R],
    ) -> bool {
        false
    }
}

/// `L` is the lines of a flush.
#[inline(always)]
fn linear<S: Simd, C: Codes<S>, const L: usize>(s: S, job: &mut GroupedLinear<'_>) {
    let (rows, tiles) = (job.out.rows(), job.tiles.clone());
    if rows == 1 {
        let (quartets, rest) = by(SIDE_BY_SIDE, tiles);
        for tile in quartets {
            one_row::<S, C, L, SIDE_BY_SIDE>(s, job, tile);
        }
        for tile in rest {
            one_row::<S, C, L, 1>(s, job, tile);
        }
        return;
    }
    for start in (0..rows).step_by(ROWS_CACHED) {
        all_tiles::<S, C, L>(s, job, start..rows.min(start + ROWS_CACHED));
    }
}

/// Sums of one or two tiles and some rows.
type Sums = [[[f32; LANES]; ROWS_CACHED]; 2];

/// All tiles times some rows, at most [`ROWS_CACHED`].
#[inline(always)]
fn all_tiles<S: Simd, C: Codes<S>, const L: usize>(
    s: S,
    job: &mut GroupedLinear<'_>,
    rows: Range<usize>,
) {
    let mut y: Sums = [[[0.0; LANES]; ROWS_CACHED]; 2];
    let (pairs, rest) = by(2, job.tiles.clone());
    for tile in pairs {
        if S::TILES == 2 {
            some_rows::<S, C, L, 2>(s, job, tile, rows.clone(), &mut y);
        } else {
            some_rows::<S, C, L, 1>(s, job, tile, rows.clone(), &mut y);
            some_rows::<S, C, L, 1>(s, job, tile + 1, rows.clone(), &mut y);
        }
    }
    for tile in rest {
        some_rows::<S, C, L, 1>(s, job, tile, rows.clone(), &mut y);
    }
}

/// The first of every `most` tiles, and the tiles left over.
#[inline(always)]
fn by(most: usize, tiles: Range<usize>) -> (std::iter::StepBy<Range<usize>>, Range<usize>) {
    let end = tiles.end - tiles.len() % most;
    ((tiles.start..end).step_by(most), end..tiles.end)
}

/// `T` tiles from `tile` times the only row.
#[inline(always)]
fn one_row<S: Simd, C: Codes<S>, const L: usize, const T: usize>(
    s: S,
    job: &mut GroupedLinear<'_>,
    tile: usize,
) {
    let (w, mut y) = (job.weight, [[[0.0; LANES]; 1]; T]);
    let part = Part { weight: w, tile, blocks: 0..w.blocks.count };
    dot_tiles::<S, C, L, T, 1>(s, &part, job.x.rows(w, 0), &[&[]; T], &mut y);
    for (t, y) in y.iter().enumerate() {
        put(&mut job.out, (&job.tiles, w.n), job.bias, (tile + t, 0), y);
    }
}

/// `T` tiles from `tile` times some rows: panels of their columns stay in the first-level cache
/// while the rows pass by, and meanwhile the next panel comes from memory.
#[inline(always)]
fn some_rows<S: Simd, C: Codes<S>, const L: usize, const T: usize>(
    s: S,
    job: &mut GroupedLinear<'_>,
    tile: usize,
    rows: Range<usize>,
    y: &mut Sums,
) {
    let w = job.weight;
    for t in 0..T {
        for y in &mut y[t][..rows.len()] {
            *y = [0.0; LANES];
        }
    }
    let mut start = 0;
    while start < w.blocks.count {
        let end = w.blocks.count.min(start + w.panel);
        let part = Part { weight: w, tile, blocks: start..end };
        panel::<S, C, L, T>(s, job.x, &part, rows.clone(), y);
        start = end;
    }
    for (t, y) in y[..T].iter().enumerate() {
        let y: &[_] = &y[..rows.len()];
        put(&mut job.out, (&job.tiles, w.n), job.bias, (tile + t, rows.start), y);
    }
}

/// One panel times some rows, those together that lie side by side.
#[inline(always)]
fn panel<S: Simd, C: Codes<S>, const L: usize, const T: usize>(
    s: S,
    x: Activations<'_>,
    part: &Part<'_>,
    rows: Range<usize>,
    y: &mut Sums,
) {
    let mut ahead = part.next::<T>();
    for row in rows.clone().step_by(SIDE) {
        let at = (row, row - rows.start);
        match rows.end - row {
            1 => take::<S, C, L, T, 1>(s, (x, part), at, &ahead, y),
            2 => take::<S, C, L, T, 2>(s, (x, part), at, &ahead, y),
            3 => take::<S, C, L, T, 3>(s, (x, part), at, &ahead, y),
            _ => take::<S, C, L, T, SIDE>(s, (x, part), at, &ahead, y),
        }
        ahead = [&[]; T];
    }
}

/// A part of `T` tiles times `R` rows from `row`, added to `y` from its row `first`.
#[inline(always)]
fn take<S: Simd, C: Codes<S>, const L: usize, const T: usize, const R: usize>(
    s: S,
    (x, part): (Activations<'_>, &Part<'_>),
    (row, first): (usize, usize),
    ahead: &[&[Line]; T],
    y: &mut Sums,
) {
    if T == 1
        && let Some(y) = y[0][first..].first_chunk_mut::<R>()
        && dot_groups::<S, C, R>(s, part, (x, row), ahead[0], y)
    {
        return;
    }
    let mut sums = [[[0.0; LANES]; R]; T];
    for t in 0..T {
        sums[t].copy_from_slice(&y[t][first..first + R]);
    }
    dot_tiles::<S, C, L, T, R>(s, part, x.rows(part.weight, row), ahead, &mut sums);
    for t in 0..T {
        y[t][first..first + R].copy_from_slice(&sums[t]);
    }
}

impl Activations<'_> {
    /// Those of rows `row..row + R`.
    #[inline(always)]
    fn rows<const R: usize>(self, w: &Packed, row: usize) -> [Self; R] {
        let (quads, blocks) = (w.blocks.width() / 4, w.blocks.count);
        let mut rows = [self; R];
        for (r, x) in rows.iter_mut().enumerate() {
            x.quads = &self.quads[(row + r) * quads..][..quads];
            x.scales = &self.scales[(row + r) * blocks..][..blocks];
        }
        rows
    }
}

/// Some blocks of the columns of tiles from `tile` on.
struct Part<'a> {
    weight: &'a Packed,
    tile: usize,
    blocks: Range<usize>,
}

impl<'a> Part<'a> {
    /// Codes of the `T` tiles that are needed after these.
    #[inline(always)]
    fn next<const T: usize>(&self) -> [&'a [Line]; T] {
        let w = self.weight;
        let (tile, block) = match self.blocks.end < w.blocks.count {
            true => (self.tile, self.blocks.end),
            false => (self.tile + T, 0),
        };
        let mut next: [&[Line]; T] = [&[]; T];
        for (t, next) in next.iter_mut().enumerate() {
            *next = w.lines_from(tile + t, block, self.blocks.len());
        }
        next
    }
}

/// Takes up to `count` lines off the front.
#[inline(always)]
fn take_lines<'a>(lines: &mut &'a [Line], count: usize) -> &'a [Line] {
    let (taken, rest) = lines.split_at(count.min(lines.len()));
    *lines = rest;
    taken
}

/// Adds a tile times `R` rows from `row`, both restricted to a part, to `y`, a group at a time;
/// false, with nothing done, where the instruction set has no way of its own.
#[inline(always)]
fn dot_groups<S: Simd, C: Codes<S>, const R: usize>(
    s: S,
    part: &Part<'_>,
    (x, row): (Activations<'_>, usize),
    mut ahead: &[Line],
    y: &mut [[f32; LANES]; R],
) -> bool {
    let (w, blocks, tile) = (part.weight, &part.weight.blocks, part.weight.tile(part.tile));
    let (quad_stride, scale_stride) = (blocks.width() / 4, blocks.count);
    let mut b = part.blocks.start;
    let (mut group, mut left) = blocks.group_of(b);
    while b < part.blocks.end {
        let count = left.min(part.blocks.end - b);
        let job = NibbleBlocks {
            lines: &tile.codes[b * w.block_lines()..][..count * w.block_lines()],
            block_lines: w.block_lines(),
            count,
            quads: &x.quads[row * quad_stride + b * (blocks.block / 4)..],
            quad_stride,
            scales: &x.scales[row * scale_stride + b..],
            scale_stride,
            scale: scale(s, &tile, group),
            zero: shift::<S, C>(s, &tile, group, 1),
            ahead: take_lines(&mut ahead, count * w.block_lines()),
        };
        if !C::dot_blocks(s, &job, y) {
            return false;
        }
        b += count;
        (group, left) = (group + 1, blocks.per_group);
    }
    true
}

/// Adds `T` tiles times `R` rows, both restricted to a part, to `y`; meanwhile asks for the lines
/// `ahead`.
#[inline(always)]
fn dot_tiles<S: Simd, C: Codes<S>, const L: usize, const T: usize, const R: usize>(
    s: S,
    part: &Part<'_>,
    x: [Activations<'_>; R],
    ahead: &[&[Line]; T],
    y: &mut [[[f32; LANES]; R]; T],
) {
    let (w, blocks, mut ahead) = (part.weight, &part.weight.blocks, *ahead);
    let each = ahead[0].len().div_ceil(part.blocks.len());
    let mut tiles = [w.tile(part.tile); T];
    let mut acc = [[s.splat(0.0); R]; T];
    for t in 0..T {
        tiles[t] = w.tile(part.tile + t);
        for r in 0..R {
            acc[t][r] = s.load(&y[t][r]);
        }
    }
    let (mut group, mut left) = blocks.group_of(part.blocks.start);
    for b in part.blocks.clone() {
        let mut quads: [&[i32]; R] = [&[]; R];
        for r in 0..R {
            quads[r] = &x[r].quads[b * (blocks.block / 4)..][..blocks.block / 4];
        }
        let mut lines: [&[Line]; T] = [&[]; T];
        let mut totals = [[s.splat_i(0); R]; T];
        for t in 0..T {
            for line in take_lines(&mut ahead[t], each) {
                s.prefetch(line);
            }
            lines[t] = &tiles[t].codes[b * w.block_lines()..][..w.block_lines()];
        }
        dot_block::<S, C, L, T, R>(s, lines, quads, &mut totals);
        for t in 0..T {
            let scale = scale(s, &tiles[t], group);
            for r in 0..R {
                let BlockScale { scale: x_scale, sum } = x[r].scales[b];
                let dots = s.add_i(totals[t][r], shift::<S, C>(s, &tiles[t], group, sum));
                acc[t][r] = s.fma(s.mul(scale, s.splat(x_scale)), s.to_f32(dots), acc[t][r]);
            }
        }
        left -= 1;
        if left == 0 {
            (group, left) = (group + 1, blocks.per_group);
        }
    }
    for t in 0..T {
        for r in 0..R {
            s.store(acc[t][r], &mut y[t][r]);
        }
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

/// What the zero points of a group, and what was taken from its codes, change in a dot with
/// activations of that sum.
#[inline(always)]
fn shift<S: Simd, C: Codes<S>>(s: S, tile: &Tile<'_>, group: usize, sum: i32) -> S::I {
    match tile.zeros {
        TileZeros::All(zero) => s.splat_i((C::OFFSET - zero) * sum),
        TileZeros::Each(all) => {
            let zeros = s.add_i(s.widen_u8(&all[group]), s.splat_i(-C::OFFSET));
            s.mul_i(zeros, s.splat_i(-sum))
        }
    }
}

/// Adds the exact sums of code times activation over one block.
#[inline(always)]
fn dot_block<S: Simd, C: Codes<S>, const L: usize, const T: usize, const R: usize>(
    s: S,
    lines: [&[Line]; T],
    quads: [&[i32]; R],
    totals: &mut [[S::I; R]; T],
) {
    let full = lines[0].len() / L;
    for i in 0..full {
        let mut q = [&[0; QUADS]; R];
        for r in 0..R {
            q[r] = &quads[r].as_chunks::<QUADS>().0[i];
        }
        let mut sums = [[C::zero(s); R]; T];
        for t in 0..T {
            let lines = &lines[t].as_chunks::<L>().0[i];
            for l in 0..L {
                let codes = C::open(s, &lines[l]);
                for r in 0..R {
                    sums[t][r] = C::dot(s, sums[t][r], codes, &q[r][l * QUADS / L..]);
                }
            }
        }
        for t in 0..T {
            for r in 0..R {
                totals[t][r] = C::flush(s, sums[t][r], totals[t][r]);
            }
        }
    }
    if full * L < lines[0].len() {
        for t in 0..T {
            for r in 0..R {
                let (lines, quads) = (&lines[t][full * L..], &quads[r][full * QUADS..]);
                totals[t][r] = dot_rest::<S, C, L>(s, lines, quads, totals[t][r]);
            }
        }
    }
}

/// The lines of a block that do not fill a flush.
#[inline(always)]
fn dot_rest<S: Simd, C: Codes<S>, const L: usize>(
    s: S,
    lines: &[Line],
    quads: &[i32],
    total: S::I,
) -> S::I {
    let mut sum = C::zero(s);
    for (l, line) in lines.iter().enumerate() {
        sum = C::dot(s, sum, C::open(s, line), &quads[l * QUADS / L..]);
    }
    C::flush(s, sum, total)
}

#[cfg(test)]
#[path = "grouped_tests.rs"]
mod tests;
