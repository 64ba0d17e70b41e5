//! Attention of a few tokens of one sequence over one KV head, for query heads that share it.
//!
//! ```text
//! score[p] = scale * (q . k[p])    out = sum over p of exp(score[p] - max) v[p] / sum of exp
//! in    queries: a row is one query head of one token; the caches in f16 ([`super::kv`])
//! out   one row for each query
//! walk  chunks of 128 positions, at multiples of 128 of the absolute position; maximum and sum are
//!       carried from chunk to chunk (online softmax)
//! block up to 64 queries take a chunk together: scores, then weights ([`super::softmax`]), then
//!       outputs; registers hold 8 queries x 32 positions or columns, 4 x 64, or 4 x 16
//! sums  one chain of fma: a score's over its columns, an output column's over the positions
//! split (tokens, KV head, query heads) items over threads; reads every visible key and value once
//!       an item; up to sixteen queries widen them where they use them, more share 16 KiB of
//!       widened ones: some tiles of keys, or some columns of values
//! ```
//! A position's score needs that position alone, and chunks are laid out by absolute position, so
//! neither the block length nor the tokens beside it change a bit of a query. Positions that a
//! query does not see add nothing to it, not even a zero, and positions that none sees are never
//! read: their memory may hold NaN. Reference: `reference::` attend.

// Loops over queries, vectors and columns count indices: they unroll whole, over several arrays.
#![allow(clippy::needless_range_loop)]

use super::isa::Kernel;
use super::kv::KvShape;
use super::products::{Dots, Element, Mix, Run, TILES, WidenKeys, WidenValues};
use super::share::{Mat, MatMut};
use super::simd::{LANES, Simd};
use super::softmax::{CHUNK, Soften, Weights};
use crate::program::{BlockId, Mask};
use std::array::from_ref;
use std::cell::Cell;
use std::ops::Range;

/// Most queries of an item; more are taken in turns, each reading keys and values again.
const QUERIES: usize = 64;
/// Most queries that read keys and values as they lie.
const FEW: usize = LANES;
/// Vectors that are widened at a time for more: a third of the first cache.
const ROOM: usize = 2 * CHUNK;

/// Computes the outputs of consecutive tokens for query heads of one KV head.
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

/// One query: its place in `q` and `out`, and what softmax carries from chunk to chunk.
#[derive(Debug, Clone, Copy)]
struct Query {
    token: usize,
    /// First column.
    column: usize,
    max: f32,
    sum: f32,
}

/// The positions of one chunk that some query sees, and where they lie.
struct Chunk<'a> {
    /// First position, seen or not.
    start: usize,
    runs: [Run<'a>; CHUNK],
    /// Runs in use.
    len: usize,
}

/// What queries need while they are taken, of each thread its own, so that no item must clear one.
struct Scratch {
    all: [Weights; QUERIES],
    room: [[f32; LANES]; ROOM],
}

impl Scratch {
    const EMPTY: Self = Self { all: [Weights::NEW; QUERIES], room: [[0.0; LANES]; ROOM] };
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Keys and values of some positions and columns of a chunk, as they lie or widened.
struct Source<'a, T> {
    runs: &'a [Run<'a, T>],
    /// To ask for meanwhile.
    ahead: &'a [Run<'a>],
    /// Vectors of columns that rows of values have, of all columns.
    strip: Range<usize>,
}

/// What is done for a block of queries and a chunk.
#[derive(Clone, Copy)]
enum Part {
    Scores,
    Outputs,
}

/// How many tokens and query heads an item has, where `shared` query heads share a KV head and
/// `items(tokens)` counts the items that do not split query heads.
///
/// As many as take turns on keys and values in the cache; fewer where threads would go without
/// work. Queries are computed one by one whatever the split: it changes no bit.
pub(crate) fn item_size(
    shared: usize,
    threads: usize,
    items: impl Fn(usize) -> usize,
) -> [usize; 2] {
    let (mut tokens, mut heads) = ((QUERIES / shared).max(1), shared);
    loop {
        let count = items(tokens) * shared.div_ceil(heads);
        let even = count.is_multiple_of(threads) || count > 4 * threads;
        match (even, tokens, heads) {
            (true, ..) | (false, 1, 1) => return [tokens, heads],
            (false, 1, _) => heads = heads.div_ceil(2),
            (false, ..) => tokens /= 2,
        }
    }
}

/// Positions that a query sees.
fn visible(mask: Mask, position: usize) -> Range<usize> {
    let end = position + 1;
    match mask {
        Mask::Causal => 0..end,
        Mask::Window(width) => end.saturating_sub(width as usize)..end,
    }
}

impl Query {
    const NEW: Self = Self { token: 0, column: 0, max: f32::NEG_INFINITY, sum: 0.0 };
}

impl<'a> Chunk<'a> {
    const EMPTY: Self = Self { start: 0, runs: [Run::EMPTY; CHUNK], len: 0 };

    #[inline(always)]
    fn runs(&self) -> &[Run<'a>] {
        &self.runs[..self.len]
    }
}

impl Kernel for Attend<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let count = self.out.rows() * self.heads;
        for first in (0..count).step_by(QUERIES) {
            let mut queries = [Query::NEW; QUERIES];
            let queries = &mut queries[..QUERIES.min(count - first)];
            for (i, query) in queries.iter_mut().enumerate() {
                query.token = (first + i) / self.heads;
                query.column = (first + i) % self.heads * self.shape.width;
            }
            self.attend(s, queries);
        }
    }
}

impl<'a> Attend<'a> {
    /// Computes the outputs of some queries in the order of their tokens.
    #[inline(always)]
    fn attend<S: Simd>(&mut self, s: S, queries: &mut [Query]) {
        for query in &*queries {
            clear(s, self.out(query));
        }
        let seen = self.visible(&queries[0]).start..self.visible(&queries[queries.len() - 1]).end;
        let (first, end) = (seen.start / CHUNK, seen.end.div_ceil(CHUNK));
        let mut chunks = [Chunk::EMPTY; 2];
        let mut scratch = SCRATCH.take().unwrap_or_else(|| Box::new(Scratch::EMPTY));
        let Scratch { all, room } = &mut *scratch;
        let (all, room): (&mut [Weights], &mut [_]) = match queries.len() <= FEW {
            true => (&mut all[..FEW], &mut []),
            false => (all, room),
        };
        self.locate(first, &seen, &mut chunks[first % 2]);
        for c in first..end {
            self.locate(c + 1, &seen, &mut chunks[(c + 1) % 2]);
            let at = [&chunks[c % 2], &chunks[(c + 1) % 2]];
            self.take_all(s, at, queries, (&mut *all, &mut *room));
        }
        for query in queries {
            scale(s, self.out(query), 1.0 / query.sum);
        }
        SCRATCH.set(Some(scratch));
    }

    /// Finds the positions of chunk `c`, as far as seen.
    #[inline(always)]
    fn locate(&self, c: usize, seen: &Range<usize>, chunk: &mut Chunk<'a>) {
        let (shape, start) = (self.shape, c * CHUNK);
        let (keys, values): (&'a [u16], &'a [u16]) = (self.keys, self.values);
        let (mut position, end) = (seen.start.max(start), seen.end.min(start + CHUNK));
        let (mut block, mut at) = (position / shape.block_len, position % shape.block_len);
        (chunk.start, chunk.len) = (start, 0);
        while position < end {
            let lane = at % LANES;
            let count = (LANES - lane).min(shape.block_len - at).min(end - position);
            let id = self.table[block].index();
            let tile = &keys.as_chunks().0[shape.key_tile(id, self.head, at)..][..shape.width];
            let rows = &values.as_chunks().0[shape.value_row(id, self.head, at)..];
            let rows = &rows[..count * shape.vectors()];
            chunk.runs[chunk.len] = Run { at: position - start, count, tile, lane, rows };
            chunk.len += 1;
            (position, at) = (position + count, at + count);
            if at == shape.block_len {
                (block, at) = (block + 1, 0);
            }
        }
    }

    /// Takes a chunk into all queries that see something of it.
    #[inline(always)]
    fn take_all<S: Simd>(
        &mut self,
        s: S,
        [chunk, next]: [&Chunk<'_>; 2],
        mut left: &mut [Query],
        (all, room): (&mut [Weights], &mut [[f32; LANES]]),
    ) {
        // The first queries ask for the next chunk, the others find it there.
        let mut ahead = next.runs();
        while !left.is_empty() {
            let count = self.side_by_side(left, chunk, all.len());
            let (queries, rest) = left.split_at_mut(count.max(1));
            let (all, at) = (&mut all[..count], (chunk, ahead));
            for (query, weights) in queries.iter().zip(&mut *all) {
                weights.range = self.visible_in(query, chunk);
            }
            self.in_strips(s, Part::Scores, at, (queries, all), room);
            for (queries, all) in queries.chunks_mut(LANES).zip(all.chunks_mut(LANES)) {
                self.soften(s, queries, all);
            }
            self.in_strips(s, Part::Outputs, at, (queries, all), room);
            if count > 0 {
                ahead = &[];
            }
            left = rest;
        }
    }

    /// Does a part for queries that all see something of a chunk. Many of them share the work of
    /// widening: keys of some tiles, or values of some columns, are widened for all of them, and are
    /// in the first cache until all have taken them.
    #[inline(always)]
    fn in_strips<S: Simd>(
        &mut self,
        s: S,
        part: Part,
        (chunk, ahead): (&Chunk<'_>, &[Run<'_>]),
        (queries, all): (&[Query], &mut [Weights]),
        room: &mut [[f32; LANES]],
    ) {
        let (runs, vectors) = (chunk.runs(), self.shape.vectors());
        let strip = match part {
            Part::Scores => TILES.min(room.len() / self.shape.width),
            Part::Outputs => room.len() / CHUNK,
        };
        match part {
            _ if all.len() <= FEW || strip == 0 => {
                let source = Source { runs, ahead, strip: 0..vectors };
                self.in_blocks(s, part, source, queries, all);
            }
            Part::Scores => {
                for (i, runs) in runs.chunks(strip).enumerate() {
                    let ahead = &ahead[ahead.len().min(i * strip)..];
                    let wide = s.apart(WidenKeys { runs, ahead, room: &mut *room });
                    let runs = &wide[..runs.len()];
                    let source = Source { runs, ahead: &[], strip: 0..0 };
                    self.in_blocks(s, part, source, queries, all);
                }
            }
            Part::Outputs => {
                for first in (0..vectors).step_by(strip) {
                    let strip = first..vectors.min(first + strip);
                    let (columns, room) = (strip.clone(), &mut *room);
                    let wide = s.apart(WidenValues { runs, ahead, vectors, columns, room });
                    let source = Source { runs: &[wide], ahead: &[], strip };
                    self.in_blocks(s, part, source, queries, all);
                }
            }
        }
    }

    /// Does a part for queries that all see something of a chunk, in blocks that fit in registers:
    /// some queries times some vectors of positions or columns.
    #[inline(always)]
    fn in_blocks<S: Simd, T: Element>(
        &mut self,
        s: S,
        part: Part,
        mut source: Source<'_, T>,
        mut queries: &[Query],
        mut all: &mut [Weights],
    ) {
        while !all.is_empty() {
            let at = (part, &source);
            let done = match (all.len(), S::SUMS) {
                (1, _) => self.block::<S, T, 1, 4>(s, at, queries, all),
                (2 | 3, 4) => self.block::<S, T, 2, 2>(s, at, queries, all),
                (2 | 3, _) => self.block::<S, T, 2, 4>(s, at, queries, all),
                (_, 4) => self.block::<S, T, 4, 1>(s, at, queries, all),
                (4..8, _) => self.block::<S, T, 4, 4>(s, at, queries, all),
                (_, _) => self.block::<S, T, 8, 2>(s, at, queries, all),
            };
            (queries, all, source.ahead) = (&queries[done..], &mut all[done..], &[]);
        }
    }

    /// Does a part for the first `H` queries; returns `H`.
    #[inline(always)]
    fn block<S: Simd, T: Element, const H: usize, const V: usize>(
        &mut self,
        s: S,
        (part, source): (Part, &Source<'_, T>),
        queries: &[Query],
        all: &mut [Weights],
    ) -> usize {
        if let (Some(queries), Some(all)) = (queries.first_chunk(), all.first_chunk_mut()) {
            match part {
                Part::Scores => self.scores::<S, T, H, V>(s, source, queries, all),
                Part::Outputs => self.outputs::<S, T, H, V>(s, source, queries, all),
            }
        }
        H
    }

    /// Positions that a query sees.
    #[inline(always)]
    fn visible(&self, query: &Query) -> Range<usize> {
        visible(self.mask, self.position + query.token)
    }

    /// Those of a chunk, counted from its start; may be empty.
    #[inline(always)]
    fn visible_in(&self, query: &Query, chunk: &Chunk<'_>) -> Range<usize> {
        let Range { start, end } = self.visible(query);
        let within = |at: usize| at.clamp(chunk.start, chunk.start + CHUNK) - chunk.start;
        within(start)..within(end)
    }

    /// How many of the first queries, at most `most`, see something of a chunk, up to one that does
    /// not.
    #[inline(always)]
    fn side_by_side(&self, queries: &[Query], chunk: &Chunk<'_>, most: usize) -> usize {
        let sees = |query: &&Query| !self.visible_in(query, chunk).is_empty();
        queries.iter().take(most).take_while(sees).count()
    }

    #[inline(always)]
    fn q(&self, query: &Query) -> &[f32] {
        &self.q.row(query.token)[query.column..][..self.shape.width]
    }

    #[inline(always)]
    fn out(&mut self, query: &Query) -> &mut [f32] {
        &mut self.out.row(query.token)[query.column..][..self.shape.width]
    }

    /// Turns scores into weights `exp(score - max)`, zero where a query does not see, updates the
    /// maximums and sums, and rescales outputs that were summed under another maximum.
    #[inline(always)]
    fn soften<S: Simd>(&mut self, s: S, queries: &mut [Query], all: &mut [Weights]) {
        let mut max = [0.0; LANES];
        for (query, max) in queries.iter().zip(&mut max) {
            *max = query.max;
        }
        let (mut factors, mut sums) = ([0.0; LANES], [0.0; LANES]);
        s.apart(Soften { all, max: &mut max, factors: &mut factors, sums: &mut sums });
        for (i, query) in queries.iter_mut().enumerate().take(all.len()) {
            // Outputs of the first chunk are zero still.
            if factors[i] != 1.0 && query.sum != 0.0 {
                scale(s, self.out(query), factors[i]);
            }
            query.max = max[i];
            query.sum = query.sum * factors[i] + sums[i];
        }
    }

    /// Adds the weighted values of a chunk's positions to outputs.
    #[inline(always)]
    fn outputs<S: Simd, T: Element, const H: usize, const V: usize>(
        &mut self,
        s: S,
        source: &Source<'_, T>,
        queries: &[Query; H],
        all: &[Weights; H],
    ) {
        // Positions that all see are taken together, those around them one query at a time.
        let first = all.iter().map(|w| w.range.start).fold(0, usize::max);
        let end = all.iter().map(|w| w.range.end).fold(CHUNK, usize::min).max(first);
        let alone = Source { ahead: &[], strip: source.strip.clone(), ..*source };
        for (query, weights) in queries.iter().zip(all) {
            let before = weights.range.start..weights.range.end.min(first);
            self.mix::<S, T, 1, 4>(s, &alone, before, from_ref(query), from_ref(weights));
        }
        self.mix::<S, T, H, V>(s, source, first..end, queries, all);
        for (query, weights) in queries.iter().zip(all) {
            let after = weights.range.start.max(end)..weights.range.end;
            self.mix::<S, T, 1, 4>(s, &alone, after, from_ref(query), from_ref(weights));
        }
    }

    /// Scores of those positions that some query of the item sees.
    #[inline(always)]
    fn scores<S: Simd, T: Element, const H: usize, const V: usize>(
        &self,
        s: S,
        source: &Source<'_, T>,
        queries: &[Query; H],
        all: &mut [Weights; H],
    ) {
        let mut q: [&[f32]; H] = [&[]; H];
        for h in 0..H {
            q[h] = self.q(&queries[h]);
        }
        let (scale, ahead) = (self.scale, source.ahead);
        let (groups, rest) = source.runs.as_chunks::<V>();
        for (i, runs) in groups.iter().enumerate() {
            let ahead = &ahead[ahead.len().min(i * V)..];
            s.apart(Dots { runs, ahead, q, scale, all: &mut *all });
        }
        for (i, run) in rest.iter().enumerate() {
            let ahead = &ahead[ahead.len().min(groups.len() * V + i)..];
            s.apart(Dots { runs: &[*run], ahead, q, scale, all: &mut *all });
        }
    }

    /// Adds the weighted values of positions `range` to the outputs of `H` queries, `V` vectors of
    /// columns at a time.
    #[inline(always)]
    fn mix<S: Simd, T: Element, const H: usize, const V: usize>(
        &mut self,
        s: S,
        source: &Source<'_, T>,
        range: Range<usize>,
        queries: &[Query; H],
        all: &[Weights; H],
    ) {
        if range.is_empty() {
            return;
        }
        let at = (source, &range);
        let vectors = source.strip.len();
        for vector in (0..vectors / V * V).step_by(V) {
            self.mix_columns::<S, T, H, V>(s, at, vector, queries, all);
        }
        for vector in vectors / V * V..vectors {
            self.mix_columns::<S, T, H, 1>(s, at, vector, queries, all);
        }
    }

    /// The same for columns of `V` vectors from `vector` of the strip.
    #[inline(always)]
    fn mix_columns<S: Simd, T: Element, const H: usize, const V: usize>(
        &mut self,
        s: S,
        (source, range): (&Source<'_, T>, &Range<usize>),
        vector: usize,
        queries: &[Query; H],
        all: &[Weights; H],
    ) {
        let Source { runs, ahead, ref strip } = *source;
        let (first, width) = ((strip.start + vector) * LANES, self.shape.width);
        let mut places = [const { (0, 0..0) }; H];
        for h in 0..H {
            let Query { token, column, .. } = queries[h];
            places[h] = (token, column + first..column + width);
        }
        let (range, columns, out) = (range.clone(), [strip.len(), vector], &mut self.out);
        s.apart(Mix::<_, H, V> { runs, ahead, range, columns, all, out, places });
    }
}

#[inline(always)]
fn clear<S: Simd>(s: S, row: &mut [f32]) {
    let (vectors, rest) = row.as_chunks_mut();
    vectors.iter_mut().for_each(|x| s.store(s.splat(0.0), x));
    rest.fill(0.0);
}

#[inline(always)]
fn scale<S: Simd>(s: S, row: &mut [f32], factor: f32) {
    let (vectors, rest) = row.as_chunks_mut();
    vectors.iter_mut().for_each(|x| s.store(s.mul(s.load(x), s.splat(factor)), x));
    rest.iter_mut().for_each(|x| *x *= factor);
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
