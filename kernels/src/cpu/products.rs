//! The two products of attention, each of some queries with the runs of a chunk: scores ([`Dots`])
//! and outputs ([`Mix`]).
//!
//! ```text
//! Dots   score[h, p] = scale * sum over columns c, in order, of q[h, c] * key[c, p]
//! Mix    out[h, c] += sum over positions p, in order, of weight[h, p] * value[p, c]
//! in     queries and weights f32; keys and values f16, widened where they are used ([`super::kv`] has
//!        their layout), once for `H` queries
//! sums   `[H, V]` vectors in registers, one chain of fma each; run apart ([`Simd::apart`]) for them
//! ```
//! Both ask for the keys and values of the next chunk meanwhile. Not here: which queries and
//! positions, softmax ([`super::attention`]). Reference: `reference::` attend.

// Loops over queries, vectors and columns count indices: they unroll whole, over several arrays.
#![allow(clippy::needless_range_loop)]

use super::isa::Kernel;
use super::simd::{LANES, Simd};
use super::softmax::Weights;
use std::ops::Range;

/// Positions taken in one go while values are added.
const AT_ONCE: usize = 4;

/// At most sixteen consecutive positions that lie in one tile of keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run<'a> {
    /// First position, counted from the chunk's start.
    pub(super) at: usize,
    pub(super) count: usize,
    /// Tile of keys, `[width]` vectors of sixteen positions.
    pub(super) tile: &'a [[u16; LANES]],
    /// Lane of the first position.
    pub(super) lane: usize,
    /// Rows of values, `[count, vectors]`.
    pub(super) rows: &'a [[u16; LANES]],
}

impl Run<'_> {
    pub(super) const EMPTY: Self = Self { at: 0, count: 0, tile: &[], lane: 0, rows: &[] };

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
pub(super) struct Mix<'a, const H: usize, const V: usize> {
    pub(super) runs: &'a [Run<'a>],
    /// To ask for meanwhile.
    pub(super) ahead: &'a [Run<'a>],
    pub(super) range: Range<usize>,
    /// Vectors of a row of values, and the first.
    pub(super) columns: [usize; 2],
    pub(super) all: &'a [Weights; H],
    pub(super) sums: &'a mut [[[f32; LANES]; V]; H],
}

impl<const H: usize, const V: usize> Kernel for Mix<'_, H, V> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut sums = [[s.splat(0.0); V]; H];
        for h in 0..H {
            for v in 0..V {
                sums[h][v] = s.load(&self.sums[h][v]);
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
                s.store(sums[h][v], &mut self.sums[h][v]);
            }
        }
    }
}

/// Adds the weighted values of a run.
#[inline(always)]
fn mix_run<S: Simd, const H: usize, const V: usize>(
    s: S,
    run: Run<'_>,
    [vectors, vector]: [usize; 2],
    all: &[Weights; H],
    sums: &mut [[S::F; V]; H],
) {
    let mut weights: [&[f32]; H] = [&[]; H];
    for h in 0..H {
        weights[h] = &all[h].all[run.at..][..run.count];
    }
    let steps = run.count / AT_ONCE;
    for i in 0..steps {
        let mut w = [&[0.0; AT_ONCE]; H];
        for h in 0..H {
            w[h] = &weights[h].as_chunks().0[i];
        }
        let rows = &run.rows[i * AT_ONCE * vectors..][..AT_ONCE * vectors];
        for j in 0..AT_ONCE {
            let row = &rows[j * vectors + vector..][..V];
            for v in 0..V {
                let value = s.widen_f16(&row[v]);
                for h in 0..H {
                    sums[h][v] = s.fma(value, s.splat(w[h][j]), sums[h][v]);
                }
            }
        }
    }
    for i in steps * AT_ONCE..run.count {
        let row = &run.rows[i * vectors + vector..][..V];
        for v in 0..V {
            let value = s.widen_f16(&row[v]);
            for h in 0..H {
                sums[h][v] = s.fma(value, s.splat(weights[h][i]), sums[h][v]);
            }
        }
    }
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

/// Scaled dot products of `V` tiles of sixteen keys with `H` queries; asks for as many tiles beside
/// them.
pub(super) struct Dots<'a, const H: usize, const V: usize> {
    pub(super) tiles: [[&'a [[u16; LANES]]; 2]; V],
    pub(super) q: [&'a [f32]; H],
    pub(super) scale: f32,
    pub(super) dots: &'a mut [[[f32; LANES]; V]; H],
}

impl<const H: usize, const V: usize> Kernel for Dots<'_, H, V> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (tiles, q) = (self.tiles, self.q);
        let mut sums = [[s.splat(0.0); V]; H];
        let steps = q[0].len() / LANES;
        for i in 0..steps {
            for v in 0..V {
                prefetch(s, tiles[v][1], i);
            }
            let mut x = [&[0.0; LANES]; H];
            for h in 0..H {
                x[h] = &q[h].as_chunks().0[i];
            }
            let mut keys = [&[[0; LANES]; LANES]; V];
            for v in 0..V {
                keys[v] = &tiles[v][0].as_chunks().0[i];
            }
            for column in 0..LANES {
                for v in 0..V {
                    let key = s.widen_f16(&keys[v][column]);
                    for h in 0..H {
                        sums[h][v] = s.fma(key, s.splat(x[h][column]), sums[h][v]);
                    }
                }
            }
        }
        for column in steps * LANES..q[0].len() {
            for v in 0..V {
                let key = s.widen_f16(&tiles[v][0][column]);
                for h in 0..H {
                    sums[h][v] = s.fma(key, s.splat(q[h][column]), sums[h][v]);
                }
            }
        }
        for h in 0..H {
            for v in 0..V {
                s.store(s.mul(sums[h][v], s.splat(self.scale)), &mut self.dots[h][v]);
            }
        }
    }
}
