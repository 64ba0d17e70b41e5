//! The two products of attention, each of some queries with the runs of a chunk: scores ([`Dots`])
//! and outputs ([`Mix`]).
//!
//! ```text
//! Dots   score[h, p] = scale * sum over columns c, in order, of q[h, c] * key[c, p]
//! Mix    out[h, c] += sum over positions p, in order, of weight[h, p] * value[p, c]
//! in     queries and weights f32; keys and values f16 ([`super::kv`] has their layout), widened where
//!        they are used, once for `H` queries, or before ([`WidenKeys`], [`WidenValues`]) for many
//! sums   `[H, V]` vectors in registers, one chain of fma each; run apart ([`Simd::apart`]) for them
//! ```
//! Loops have one step a column or position and no checks, so that compilers keep all sums in
//! registers. Keys and values of the next chunk are asked for meanwhile. Not here: which queries and
//! positions, softmax ([`super::attention`]). Reference: `reference::` attend.

// Loops over queries, vectors and columns count indices: they unroll whole, over several arrays.
#![allow(clippy::needless_range_loop)]

use super::isa::Kernel;
use super::share::MatMut;
use super::simd::{LANES, Simd};
use super::softmax::Weights;
use std::ops::Range;

/// Most tiles of keys that are widened together.
pub(super) const TILES: usize = 4;

/// What keys and values are read as: f16 as they lie in the cache, or f32 widened before.
pub(super) trait Element: Copy {
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F;
}

impl Element for u16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F {
        s.widen_f16(x)
    }
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F {
        s.load(x)
    }
}

/// Consecutive positions, of which a tile of keys has at most sixteen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run<'a, T = u16> {
    /// First position, counted from the chunk's start.
    pub(super) at: usize,
    pub(super) count: usize,
    /// Tile of keys, `[width]` vectors of sixteen positions.
    pub(super) tile: &'a [[T; LANES]],
    /// Lane of the first position.
    pub(super) lane: usize,
    /// Rows of values, `[count, vectors]`.
    pub(super) rows: &'a [[T; LANES]],
}

impl<T> Run<'_, T> {
    pub(super) const EMPTY: Self = Self { at: 0, count: 0, tile: &[], lane: 0, rows: &[] };
}

impl<T: Element> Run<'_, T> {
    /// Those of its positions that lie in a range of the chunk; may be none.
    #[inline(always)]
    fn within(self, range: &Range<usize>) -> Self {
        let (start, end) = (range.start.max(self.at), range.end.min(self.at + self.count));
        if start == self.at && end == self.at + self.count {
            return self;
        }
        let vectors = self.rows.len() / self.count;
        let (skipped, count) = (start - self.at, end.saturating_sub(start));
        let rows = match count {
            0 => &[],
            _ => &self.rows[skipped * vectors..][..count * vectors],
        };
        Self { at: start, count, lane: self.lane + skipped, rows, ..self }
    }
}

/// Adds the weighted values of positions `range` to `V` vectors of columns of `H` queries.
pub(super) struct Mix<'a, 'o, T, const H: usize, const V: usize> {
    pub(super) runs: &'a [Run<'a, T>],
    /// To ask for meanwhile.
    pub(super) ahead: &'a [Run<'a>],
    pub(super) range: Range<usize>,
    /// Vectors of a row of values, and the first.
    pub(super) columns: [usize; 2],
    pub(super) all: &'a [Weights; H],
    pub(super) out: &'a mut MatMut<'o>,
    /// Row of each query's outputs, and the columns from the first vector's on.
    pub(super) places: [(usize, Range<usize>); H],
}

impl<T: Element, const H: usize, const V: usize> Mix<'_, '_, T, H, V> {
    /// Outputs of a query from the columns of vector `v` on.
    #[inline(always)]
    fn out(&mut self, h: usize, v: usize) -> &mut [f32] {
        let (row, columns) = &self.places[h];
        &mut self.out.row(*row)[columns.clone()][v * LANES..]
    }
}

impl<T: Element, const H: usize, const V: usize> Kernel for Mix<'_, '_, T, H, V> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut sums = [[s.splat(0.0); V]; H];
        for h in 0..H {
            for v in 0..V {
                let out = self.out(h, v);
                sums[h][v] = match out.first_chunk() {
                    Some(out) => s.load(out),
                    None => s.load_part(out),
                };
            }
        }
        for (i, run) in self.runs.iter().enumerate() {
            if let Some(ahead) = self.ahead.get(i) {
                for v in 0..V {
                    prefetch(s, ahead.rows, self.columns[1] + v);
                }
            }
            mix_run(s, run.within(&self.range), self.columns, self.all, &mut sums);
        }
        for h in 0..H {
            for v in 0..V {
                let out = self.out(h, v);
                match out.first_chunk_mut() {
                    Some(out) => s.store(sums[h][v], out),
                    None => s.store_part(sums[h][v], out),
                }
            }
        }
    }
}

/// Adds the weighted values of a run.
#[inline(always)]
fn mix_run<S: Simd, T: Element, const H: usize, const V: usize>(
    s: S,
    run: Run<'_, T>,
    [vectors, vector]: [usize; 2],
    all: &[Weights; H],
    sums: &mut [[S::F; V]; H],
) {
    let mut weights: [&[f32]; H] = [&[]; H];
    for h in 0..H {
        weights[h] = &all[h].all[run.at..][..run.count];
    }
    // A copy, which compilers keep in registers.
    let mut own = *sums;
    for (i, row) in run.rows.chunks_exact(vectors).take(run.count).enumerate() {
        let row = &row[vector..][..V];
        for v in 0..V {
            let value = T::load(s, &row[v]);
            for h in 0..H {
                own[h][v] = s.fma(value, s.splat(weights[h][i]), own[h][v]);
            }
        }
    }
    *sums = own;
}

/// Asks for the `i`th sixteen vectors, eight cache lines: blocks lie anywhere, so the processor
/// cannot guess.
#[inline(always)]
fn prefetch<S: Simd>(s: S, vectors: &[[u16; LANES]], i: usize) {
    if let Some(vectors) = vectors.as_chunks::<LANES>().0.get(i) {
        for i in (0..LANES).step_by(2) {
            s.prefetch(&vectors[i]);
        }
    }
}

/// Scores of `V` runs, each in a tile of sixteen keys, for `H` queries; asks for as many tiles beside
/// them.
pub(super) struct Dots<'a, T, const H: usize, const V: usize> {
    pub(super) runs: &'a [Run<'a, T>; V],
    /// To ask for meanwhile.
    pub(super) ahead: &'a [Run<'a>],
    pub(super) q: [&'a [f32]; H],
    pub(super) scale: f32,
    pub(super) all: &'a mut [Weights; H],
}

impl<T: Element, const H: usize, const V: usize> Kernel for Dots<'_, T, H, V> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (runs, width) = (self.runs, self.q[0].len());
        // All of one length, so that no index is checked in the loops.
        let (mut q, mut tiles): ([&[_]; H], [&[_]; V]) = ([&[]; H], [&[]; V]);
        for h in 0..H {
            q[h] = &self.q[h][..width];
        }
        for v in 0..V {
            tiles[v] = &runs[v].tile[..width];
        }
        let mut sums = [[s.splat(0.0); V]; H];
        let ahead = &self.ahead[..self.ahead.len().min(V)];
        // Between columns, not all before them: a burst costs decode a tenth of its time.
        for first in (0..width).step_by(LANES) {
            for ahead in ahead {
                prefetch(s, ahead.tile, first / LANES);
            }
            for column in first..width.min(first + LANES) {
                for v in 0..V {
                    let key = T::load(s, &tiles[v][column]);
                    for h in 0..H {
                        sums[h][v] = s.fma(key, s.splat(q[h][column]), sums[h][v]);
                    }
                }
            }
        }
        for v in 0..V {
            let Run { at, count, lane, .. } = runs[v];
            for h in 0..H {
                let dots = s.mul(sums[h][v], s.splat(self.scale));
                let scores = &mut self.all[h].all[at..at + count];
                match scores.first_chunk_mut() {
                    Some(scores) => s.store(dots, scores),
                    None => {
                        let mut lanes = [0.0; LANES];
                        s.store(dots, &mut lanes);
                        scores.copy_from_slice(&lanes[lane..lane + count]);
                    }
                }
            }
        }
    }
}

/// Widens the keys of at most [`TILES`] runs into `room`, one tile behind the other; asks for other
/// keys meanwhile.
pub(super) struct WidenKeys<'a> {
    pub(super) runs: &'a [Run<'a>],
    pub(super) ahead: &'a [Run<'a>],
    pub(super) room: &'a mut [[f32; LANES]],
}

impl<'a> Kernel for WidenKeys<'a> {
    type Output = [Run<'a, f32>; TILES];
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let (mut wide, mut room) = ([Run::EMPTY; TILES], self.room);
        for (i, (run, wide)) in self.runs.iter().zip(&mut wide).enumerate() {
            let (tile, rest) = room.split_at_mut(run.tile.len());
            if let Some(ahead) = self.ahead.get(i) {
                for i in 0..tile.len() / LANES {
                    prefetch(s, ahead.tile, i);
                }
            }
            for (wide, key) in tile.iter_mut().zip(run.tile) {
                s.store(s.widen_f16(key), wide);
            }
            *wide = Run { at: run.at, count: run.count, tile, lane: run.lane, rows: &[] };
            room = rest;
        }
        wide
    }
}

/// Widens some columns of the values of runs into `room`, as rows of one run; asks for other values
/// meanwhile.
pub(super) struct WidenValues<'a> {
    pub(super) runs: &'a [Run<'a>],
    pub(super) ahead: &'a [Run<'a>],
    /// Vectors of a row of values.
    pub(super) vectors: usize,
    /// Those to widen.
    pub(super) columns: Range<usize>,
    pub(super) room: &'a mut [[f32; LANES]],
}

impl<'a> Kernel for WidenValues<'a> {
    type Output = Run<'a, f32>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let at = self.runs.first().map_or(0, |run| run.at);
        let count = self.runs.iter().map(|run| run.count).sum();
        let rows = &mut self.room[..count * self.columns.len()];
        let mut wide = rows.chunks_exact_mut(self.columns.len());
        for (i, run) in self.runs.iter().enumerate() {
            if let Some(ahead) = self.ahead.get(i) {
                for i in self.columns.clone() {
                    prefetch(s, ahead.rows, i);
                }
            }
            // The run's rows end first, so no row of the room is passed over.
            for (row, wide) in run.rows.chunks_exact(self.vectors).zip(&mut wide) {
                for (value, wide) in row[self.columns.clone()].iter().zip(wide) {
                    s.store(s.widen_f16(value), wide);
                }
            }
        }
        Run { at, count, tile: &[], lane: 0, rows }
    }
}
