//! Attention of a few tokens of one sequence over one KV head, for all query heads that share it.
//!
//! ```text
//! score[p] = scale * (q . k[p])    out = sum over p of exp(score[p] - max) v[p] / sum of exp
//! in    queries: a row is one query head of one token; the caches in f16 ([`super::kv`])
//! out   one row for each query
//! walk  chunks of 64 positions, at multiples of 64 of the absolute position; maximum and sum are
//!       carried from chunk to chunk (online softmax)
//! dot   column i goes to chain i % 2, one fma a column, then chain 0 + chain 1
//! split (tokens, KV head) items over threads; reads every visible key and value once an item,
//!       queries take turns, up to four at once, while a chunk is in the cache
//! ```
//! A position's score needs that position alone, and chunks are laid out by absolute position, so
//! neither the block length nor the tokens beside it change a bit of a query. Positions that a
//! query does not see add nothing to it, not even a zero, and positions that none sees are never
//! read: their memory may hold NaN. Reference: `reference::` attend.

// Loops over queries, chains and columns count indices: they unroll whole, over several arrays.
#![allow(clippy::needless_range_loop)]

use super::isa::Kernel;
use super::kv::KvShape;
use super::math;
use super::share::{Mat, MatMut};
use super::simd::{LANES, Simd};
use crate::program::{BlockId, Mask};
use std::ops::Range;

/// Positions of a chunk.
const CHUNK: usize = 64;
/// Most queries of an item; more are taken in turns, each reading keys and values again.
pub(crate) const QUERIES: usize = 16;
/// Chains of sums of a score.
const CHAINS: usize = 2;
/// Columns of keys taken at once.
const COLUMNS: usize = 4;
/// f16 numbers asked for at a time: as many as keys are taken at once, two cache lines.
const AHEAD: usize = COLUMNS * LANES;

/// Computes the outputs of consecutive tokens for the query heads of one KV head.
#[derive(Debug)]
pub(crate) struct Attend<'a> {
    pub(crate) shape: KvShape,
    pub(crate) keys: &'a [u16],
    pub(crate) values: &'a [u16],
    /// Blocks of the sequence.
    pub(crate) table: &'a [BlockId],
    /// KV head.
    pub(crate) head: usize,
    /// Position of the first token.
    pub(crate) position: usize,
    pub(crate) mask: Mask,
    pub(crate) scale: f32,
    /// `[tokens, heads * width]`
    pub(crate) q: Mat<'a>,
    /// `[tokens, heads * width]`
    pub(crate) out: MatMut<'a>,
    /// Query heads.
    pub(crate) heads: usize,
}

/// What softmax carries from chunk to chunk for one query.
#[derive(Debug, Clone, Copy)]
struct Carry {
    max: f32,
    sum: f32,
}

/// The positions of one chunk that some query sees, and where they lie.
struct Chunk {
    /// First position.
    start: usize,
    /// Seen ones, counted from `start`.
    range: Range<usize>,
    /// Row of values of each seen position, in vectors.
    rows: [usize; CHUNK],
}

/// Weights of a chunk's positions for one query, zero where it does not see.
#[derive(Clone)]
struct Weights {
    weights: [f32; CHUNK],
    range: Range<usize>,
}

/// Positions that a query sees.
fn visible(mask: Mask, position: usize) -> Range<usize> {
    let end = position + 1;
    match mask {
        Mask::Causal => 0..end,
        Mask::Window(width) => end.saturating_sub(width as usize)..end,
    }
}

impl Kernel for Attend<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let queries = self.out.rows() * self.heads;
        for first in (0..queries).step_by(QUERIES) {
            self.attend(s, first..queries.min(first + QUERIES));
        }
    }
}

impl Attend<'_> {
    /// Query `i` is head `i % heads` of token `i / heads`.
    #[inline(always)]
    fn attend<S: Simd>(&mut self, s: S, queries: Range<usize>) {
        let mut carries = [Carry { max: f32::NEG_INFINITY, sum: 0.0 }; QUERIES];
        for query in queries.clone() {
            self.out(query).fill(0.0);
        }
        let seen = self.visible(queries.start).start..self.visible(queries.end - 1).end;
        for c in seen.start / CHUNK..seen.end.div_ceil(CHUNK) {
            let chunk = self.chunk(c * CHUNK, &seen);
            let mut query = queries.start;
            while query < queries.end {
                let carries = &mut carries[query - queries.start..queries.end - queries.start];
                query += match self.side_by_side(query, carries.len(), &chunk) {
                    0 => 1,
                    4.. => self.take::<S, 4, 1>(s, &chunk, query, carries),
                    2 | 3 => self.take::<S, 2, 2>(s, &chunk, query, carries),
                    1 => self.take::<S, 1, 2>(s, &chunk, query, carries),
                };
            }
        }
        for (query, carry) in queries.zip(carries) {
            let factor = 1.0 / carry.sum;
            for out in self.out(query) {
                *out *= factor;
            }
        }
    }

    /// Positions that a query sees.
    #[inline(always)]
    fn visible(&self, query: usize) -> Range<usize> {
        visible(self.mask, self.position + query / self.heads)
    }

    /// Those of a chunk, counted from its start; may be empty.
    #[inline(always)]
    fn visible_in(&self, query: usize, chunk: &Chunk) -> Range<usize> {
        let Range { start, end } = self.visible(query);
        let within = |at: usize| at.clamp(chunk.start, chunk.start + CHUNK) - chunk.start;
        within(start)..within(end)
    }

    /// How many of up to four queries from `query`, of `left`, see something of a chunk.
    #[inline(always)]
    fn side_by_side(&self, query: usize, left: usize, chunk: &Chunk) -> usize {
        let sees = |i: &usize| !self.visible_in(query + i, chunk).is_empty();
        (0..left.min(4)).take_while(sees).count()
    }

    #[inline(always)]
    fn q(&self, query: usize) -> &[f32] {
        let width = self.shape.width;
        &self.q.row(query / self.heads)[query % self.heads * width..][..width]
    }

    #[inline(always)]
    fn out(&mut self, query: usize) -> &mut [f32] {
        let width = self.shape.width;
        &mut self.out.row(query / self.heads)[query % self.heads * width..][..width]
    }

    /// The chunk of positions from `start`, as far as seen.
    #[inline(always)]
    fn chunk(&self, start: usize, seen: &Range<usize>) -> Chunk {
        let range = seen.start.max(start) - start..seen.end.min(start + CHUNK) - start;
        let mut rows = [0; CHUNK];
        for i in range.clone() {
            let (block, at) = self.locate(start + i);
            rows[i] = self.shape.value_row(block, self.head, at);
        }
        Chunk { start, range, rows }
    }

    /// Memory to ask for while the scores of a tile of keys are computed: the values of its
    /// positions and the tile of the next ones. Blocks lie anywhere, so the processor cannot guess.
    #[inline(always)]
    fn ahead(&self, chunk: &Chunk, i: usize, next: usize) -> [&[[u16; AHEAD]]; 2] {
        let part = |all, start: usize| -> &[[u16; AHEAD]] {
            let all = <[u16]>::as_chunks(all).0;
            let start = (start * LANES / AHEAD).min(all.len());
            &all[start..all.len().min(start + self.shape.width / COLUMNS)]
        };
        let values = part(self.values, chunk.rows[i]);
        if next >= self.table.len() * self.shape.block_len {
            return [values, &[]];
        }
        let (block, at) = self.locate(next);
        [values, part(self.keys, self.shape.key_tile(block, self.head, at))]
    }

    /// Block and position in it.
    #[inline(always)]
    fn locate(&self, position: usize) -> (usize, usize) {
        let block_len = self.shape.block_len;
        (self.table[position / block_len].index(), position % block_len)
    }

    /// Takes one chunk into `H` queries from `query`; returns `H`.
    #[inline(always)]
    fn take<S: Simd, const H: usize, const SIDE: usize>(
        &mut self,
        s: S,
        chunk: &Chunk,
        query: usize,
        carries: &mut [Carry],
    ) -> usize {
        let scores = self.scores::<S, H, SIDE>(s, chunk, query);
        let mut all = scores.map(|weights| Weights { weights, range: 0..0 });
        for h in 0..H {
            all[h].range = self.visible_in(query + h, chunk);
            let factor = soften(s, &mut all[h], &mut carries[h]);
            for out in self.out(query + h) {
                *out *= factor;
            }
        }
        // Positions that all see are taken together, those around them one query at a time.
        let first = all.iter().map(|w| w.range.start).fold(0, usize::max);
        let end = all.iter().map(|w| w.range.end).fold(CHUNK, usize::min).max(first);
        for h in 0..H {
            let before = all[h].range.start..all[h].range.end.min(first);
            self.mix::<S, 1, 2>(s, chunk, before, query + h, &all[h..]);
        }
        match H {
            4 => self.mix::<S, H, 1>(s, chunk, first..end, query, &all),
            _ => self.mix::<S, H, 2>(s, chunk, first..end, query, &all),
        }
        for h in 0..H {
            let after = all[h].range.start.max(end)..all[h].range.end;
            self.mix::<S, 1, 2>(s, chunk, after, query + h, &all[h..]);
        }
        H
    }

    /// Scores of the chunk's positions; of those no query sees, minus infinity.
    #[inline(always)]
    fn scores<S: Simd, const H: usize, const SIDE: usize>(
        &self,
        s: S,
        chunk: &Chunk,
        query: usize,
    ) -> [[f32; CHUNK]; H] {
        // The first queries of an item ask for memory, the others find it there.
        let first = query.is_multiple_of(QUERIES);
        let (width, block_len) = (self.shape.width, self.shape.block_len);
        let keys = self.keys.as_chunks::<LANES>().0;
        let mut q: [&[f32]; H] = [&[]; H];
        for h in 0..H {
            q[h] = self.q(query + h);
        }
        let mut scores = [[f32::NEG_INFINITY; CHUNK]; H];
        let mut i = chunk.range.start;
        while i < chunk.range.end {
            let (block, at) = self.locate(chunk.start + i);
            let lane = at % LANES;
            let count = (LANES - lane).min(block_len - at).min(chunk.range.end - i);
            let tile = &keys[self.shape.key_tile(block, self.head, at)..][..width];
            let ahead = match first {
                true => self.ahead(chunk, i, chunk.start + i + count),
                false => [&[][..]; 2],
            };
            let dots = dots::<S, H, SIDE>(s, tile, q, ahead);
            for h in 0..H {
                let mut lanes = [0.0; LANES];
                s.store(s.mul(dots[h], s.splat(self.scale)), &mut lanes);
                if count == LANES {
                    scores[h][i..i + LANES].copy_from_slice(&lanes);
                } else {
                    scores[h][i..i + count].copy_from_slice(&lanes[lane..lane + count]);
                }
            }
            i += count;
        }
        scores
    }

    /// Adds the weighted values of positions `range` to `H` outputs from `query`, `V` vectors of
    /// columns at a time.
    #[inline(always)]
    fn mix<S: Simd, const H: usize, const V: usize>(
        &mut self,
        s: S,
        chunk: &Chunk,
        range: Range<usize>,
        query: usize,
        all: &[Weights],
    ) {
        if range.is_empty() {
            return;
        }
        let vectors = self.shape.vectors();
        for vector in (0..vectors / V * V).step_by(V) {
            self.mix_columns::<S, H, V>(s, (chunk, range.clone()), vector, query, all);
        }
        for vector in vectors / V * V..vectors {
            self.mix_columns::<S, H, 1>(s, (chunk, range.clone()), vector, query, all);
        }
    }

    /// The same for columns of `V` vectors from `vector`.
    #[inline(always)]
    fn mix_columns<S: Simd, const H: usize, const V: usize>(
        &mut self,
        s: S,
        (chunk, range): (&Chunk, Range<usize>),
        vector: usize,
        query: usize,
        all: &[Weights],
    ) {
        let width = self.shape.width;
        let values = self.values.as_chunks::<LANES>().0;
        let columns = |v: usize| (vector + v) * LANES..width.min((vector + v + 1) * LANES);
        let mut sums = [[s.splat(0.0); V]; H];
        for h in 0..H {
            for v in 0..V {
                sums[h][v] = s.load_part(&self.out(query + h)[columns(v)]);
            }
        }
        for i in range {
            let row = &values[chunk.rows[i] + vector..][..V];
            for v in 0..V {
                let value = s.widen_f16(&row[v]);
                for h in 0..H {
                    sums[h][v] = s.fma(value, s.splat(all[h].weights[i]), sums[h][v]);
                }
            }
        }
        for h in 0..H {
            for v in 0..V {
                s.store_part(sums[h][v], &mut self.out(query + h)[columns(v)]);
            }
        }
    }
}

/// Dot products of sixteen keys with `H` queries, `SIDE` chains at a time; meanwhile asks for
/// other memory.
#[inline(always)]
fn dots<S: Simd, const H: usize, const SIDE: usize>(
    s: S,
    tile: &[[u16; LANES]],
    q: [&[f32]; H],
    ahead: [&[[u16; AHEAD]]; 2],
) -> [S::F; H] {
    let (columns, rest) = tile.as_chunks::<COLUMNS>();
    let mut out = [s.splat(0.0); H];
    for first in (0..CHAINS).step_by(SIDE) {
        let mut sums = [[s.splat(0.0); SIDE]; H];
        for (i, keys) in columns.iter().enumerate() {
            let mut x = [&[0.0; COLUMNS]; H];
            for h in 0..H {
                x[h] = &q[h].as_chunks().0[i];
            }
            for lines in ahead.iter().filter_map(|all| all.get(i)) {
                s.prefetch(&lines[0]);
                s.prefetch(&lines[AHEAD / 2]);
            }
            for step in (0..COLUMNS).step_by(CHAINS) {
                for c in 0..SIDE {
                    let column = step + first + c;
                    let key = s.widen_f16(&keys[column]);
                    for h in 0..H {
                        sums[h][c] = s.fma(key, s.splat(x[h][column]), sums[h][c]);
                    }
                }
            }
        }
        for column in 0..rest.len() {
            let c = (column % CHAINS).wrapping_sub(first);
            if c < SIDE {
                let key = s.widen_f16(&rest[column]);
                for h in 0..H {
                    let x = q[h][columns.len() * COLUMNS + column];
                    sums[h][c] = s.fma(key, s.splat(x), sums[h][c]);
                }
            }
        }
        for h in 0..H {
            for c in 0..SIDE {
                out[h] = if first + c == 0 { sums[h][c] } else { s.add(out[h], sums[h][c]) };
            }
        }
    }
    out
}

/// Turns scores into weights `exp(score - max)`, zero outside the range, which is not empty, and
/// updates the carry; returns the factor on everything that was summed under the old maximum.
#[inline(always)]
fn soften<S: Simd>(s: S, scores: &mut Weights, carry: &mut Carry) -> f32 {
    let Weights { weights: scores, range } = scores;
    let mut max = carry.max;
    for &score in &scores[range.clone()] {
        max = if score > max { score } else { max };
    }
    let mut factor = [0.0; LANES];
    s.store(math::exp(s, s.splat(carry.max - max)), &mut factor);
    let vectors = scores.as_chunks_mut::<LANES>().0;
    for scores in vectors.iter_mut() {
        let weights = math::exp(s, s.sub(s.load(scores), s.splat(max)));
        s.store(weights, scores);
    }
    scores[..range.start].fill(0.0);
    scores[range.end..].fill(0.0);
    let vectors = scores.as_chunks::<LANES>().0;
    let low = s.add(s.load(&vectors[0]), s.load(&vectors[1]));
    let high = s.add(s.load(&vectors[2]), s.load(&vectors[3]));
    carry.sum = carry.sum * factor[0] + s.sum(s.add(low, high));
    carry.max = max;
    factor[0]
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
