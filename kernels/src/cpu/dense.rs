//! Linears with float weights (f32, f16, bf16) and f32 activations.
//!
//! ```text
//! y[m, n] = sum over k of w[n, k] * x[m, k]
//! weights [n / 16, k, 16]: sixteen rows side by side, in the type of the checkpoint
//! sums    four chains, columns k % 4 = 0, 1, 2, 3, one f32 fma a column;
//!         then (chain 0 + chain 1) + (chain 2 + chain 3)
//! split   tiles over threads; a tile's vectors serve up to four rows of activations
//! bytes   every weight once (and once more for every 64 rows), activations from cache
//! ```
//! The chains are the same whether they run side by side (one row) or one after another within 64
//! columns (four rows), so a row's result does not depend on the others. Reference:
//! [`quant::reference::matmul`].

// Loops over heads, rows and chains count indices: they unroll whole, over several arrays at once.
#![allow(clippy::needless_range_loop)]

use super::isa::Kernel;
use super::pages::{Arena, Pages};
use super::repack::{Parts, turn};
use super::share::{Mat, MatMut};
use super::simd::{LANES, Simd};
use super::tile::put;
use crate::Error;
use bytemuck::Pod;
use quant::{Dense, FloatType};
use rayon::prelude::*;
use std::ops::Range;

/// Chains of sums.
const CHAINS: usize = 4;
/// Columns whose weights stay in the first-level cache while chains take turns.
const COLUMNS_CACHED: usize = 64;
/// Rows of activations that stay in the second-level cache while tiles pass by.
const ROWS_CACHED: usize = 64;

/// A float matrix in tiles of sixteen rows.
#[derive(Debug)]
pub(crate) struct DenseTiles {
    pub(crate) n: usize,
    pub(crate) k: usize,
    values: Values,
}

/// `[tiles, k]` vectors of sixteen rows.
#[derive(Debug)]
enum Values {
    F32(Pages<[f32; LANES]>),
    F16(Pages<[u16; LANES]>),
    Bf16(Pages<[u16; LANES]>),
}

impl DenseTiles {
    /// Repacks an `[n, k]` matrix on the current rayon pool, into memory of `arena`; `load` delivers
    /// its rows.
    ///
    /// # Errors
    /// What `load` returns, and [`Error::Device`] for want of memory.
    pub(crate) fn load<'a>(
        ([n, k], float): ([usize; 2], FloatType),
        arena: &Arena,
        load: impl Fn(Range<usize>) -> Result<Dense<'a>, Error> + Sync,
    ) -> Result<Self, Error> {
        let values = match float {
            FloatType::F32 => Values::F32(interleave([n, k], arena, load, f32::from_le_bytes)?),
            FloatType::F16 => Values::F16(interleave([n, k], arena, load, u16::from_le_bytes)?),
            FloatType::Bf16 => Values::Bf16(interleave([n, k], arena, load, u16::from_le_bytes)?),
        };
        Ok(Self { n, k, values })
    }

    /// Repacks a matrix.
    #[cfg(test)]
    pub(crate) fn new(w: &Dense<'_>) -> Self {
        Self::load((w.shape(), w.float()), &Arena::default(), |rows| Ok(w.rows(rows))).unwrap()
    }

    /// Number of tiles.
    #[cfg(test)]
    pub(crate) fn tiles(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    /// Copies row `row` into `out_k`.
    pub(crate) fn row(&self, row: usize, out_k: &mut [f32]) {
        let (range, lane) = (self.range(row / LANES), row % LANES);
        match &self.values {
            Values::F32(all) => pick(&all[range], lane, out_k, |x| x),
            Values::F16(all) => {
                pick(&all[range], lane, out_k, |x| half::f16::from_bits(x).to_f32());
            }
            Values::Bf16(all) => {
                pick(&all[range], lane, out_k, |x| f32::from_bits(u32::from(x) << 16));
            }
        }
    }

    /// Bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        match &self.values {
            Values::F32(all) => size_of_val(&all[..]),
            Values::F16(all) | Values::Bf16(all) => size_of_val(&all[..]),
        }
    }

    #[inline(always)]
    fn range(&self, tile: usize) -> Range<usize> {
        tile * self.k..(tile + 1) * self.k
    }
}

fn pick<T: Copy>(tile: &[[T; LANES]], lane: usize, out_k: &mut [f32], widen: impl Fn(T) -> f32) {
    for (out, vector) in out_k.iter_mut().zip(tile) {
        *out = widen(vector[lane]);
    }
}

/// `[n, k]` little-endian elements to `[tiles, k]` vectors.
fn interleave<'a, T: Pod + Send, const B: usize>(
    [n, k]: [usize; 2],
    arena: &Arena,
    load: impl Fn(Range<usize>) -> Result<Dense<'a>, Error> + Sync,
    element: impl Fn([u8; B]) -> T + Sync,
) -> Result<Pages<[T; LANES]>, Error> {
    let mut tiles = arena.zeroed(n.div_ceil(LANES) * k)?;
    let parts = Parts::new(n, k * B);
    tiles.par_chunks_mut(parts.tiles * k).enumerate().try_for_each(|(part, tiles)| {
        let w = load(parts.rows(part))?;
        let rows = w.bytes().as_chunks::<B>().0;
        for (vectors, rows) in tiles.chunks_exact_mut(k).zip(rows.chunks(LANES * k)) {
            interleave_tile(rows, k, vectors, &element);
        }
        Ok(())
    })?;
    Ok(tiles)
}

/// Up to sixteen rows of `k` elements to `k` vectors, in squares.
fn interleave_tile<T: Pod, const B: usize>(
    rows: &[[u8; B]],
    k: usize,
    vectors: &mut [[T; LANES]],
    element: impl Fn([u8; B]) -> T,
) {
    let mut square = [[T::zeroed(); LANES]; LANES];
    for (i, vectors) in vectors.chunks_mut(LANES).enumerate() {
        for (values, row) in square.iter_mut().zip(rows.chunks_exact(k)) {
            for (value, bytes) in values.iter_mut().zip(&row[i * LANES..][..vectors.len()]) {
                *value = element(*bytes);
            }
        }
        vectors.copy_from_slice(&turn(&square)[..vectors.len()]);
    }
}

/// Computes output columns `16 * tiles.start .. min(16 * tiles.end, n)`.
#[derive(Debug)]
pub(crate) struct DenseLinear<'a> {
    pub(crate) weight: &'a DenseTiles,
    pub(crate) bias: Option<&'a [f32]>,
    /// `[rows, k]`
    pub(crate) x: Mat<'a>,
    pub(crate) tiles: Range<usize>,
    /// Exactly those columns.
    pub(crate) out: MatMut<'a>,
}

impl Kernel for DenseLinear<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        match &self.weight.values {
            Values::F32(all) => linear(s, &mut self, all, Widen::f32),
            Values::F16(all) => linear(s, &mut self, all, Widen::f16),
            Values::Bf16(all) => linear(s, &mut self, all, Widen::bf16),
        }
    }
}

/// The three ways to f32, as functions that take the instruction set.
struct Widen;

impl Widen {
    #[inline(always)]
    fn f32<S: Simd>(s: S, x: &[f32; LANES]) -> S::F {
        s.load(x)
    }
    #[inline(always)]
    fn f16<S: Simd>(s: S, x: &[u16; LANES]) -> S::F {
        s.widen_f16(x)
    }
    #[inline(always)]
    fn bf16<S: Simd>(s: S, x: &[u16; LANES]) -> S::F {
        s.widen_bf16(x)
    }
}

/// Few rows take two tiles side by side, which keeps the memory busy.
#[inline(always)]
fn linear<S: Simd, T: Copy>(
    s: S,
    job: &mut DenseLinear<'_>,
    all: &[[T; LANES]],
    widen: impl Fn(S, &[T; LANES]) -> S::F + Copy,
) {
    match job.out.rows() {
        1 => walk::<S, T, 2, 1, 2>(s, job, all, widen),
        2 => walk::<S, T, 2, 2, 1>(s, job, all, widen),
        rows => {
            for start in (0..rows).step_by(ROWS_CACHED) {
                for tile in job.tiles.clone() {
                    let rows = start..rows.min(start + ROWS_CACHED);
                    rows_of_tile(s, job, (all, tile), rows, widen);
                }
            }
        }
    }
}

/// All tiles, `N` at a time, times `M` rows, which are all there are.
#[inline(always)]
fn walk<S: Simd, T: Copy, const N: usize, const M: usize, const SIDE: usize>(
    s: S,
    job: &mut DenseLinear<'_>,
    all: &[[T; LANES]],
    widen: impl Fn(S, &[T; LANES]) -> S::F + Copy,
) {
    let mut tile = job.tiles.start;
    while tile + N <= job.tiles.end {
        product::<S, T, N, M, SIDE>(s, job, (all, tile), 0, widen);
        tile += N;
    }
    while tile < job.tiles.end {
        product::<S, T, 1, M, 2>(s, job, (all, tile), 0, widen);
        tile += 1;
    }
}

/// One tile times some rows, up to four at a time.
#[inline(always)]
fn rows_of_tile<S: Simd, T: Copy>(
    s: S,
    job: &mut DenseLinear<'_>,
    at: (&[[T; LANES]], usize),
    rows: Range<usize>,
    widen: impl Fn(S, &[T; LANES]) -> S::F + Copy,
) {
    let mut row = rows.start;
    while row < rows.end {
        row += match rows.end - row {
            1 => product::<S, T, 1, 1, 2>(s, job, at, row, widen),
            2 => product::<S, T, 1, 2, 2>(s, job, at, row, widen),
            3 => product::<S, T, 1, 3, 1>(s, job, at, row, widen),
            _ => product::<S, T, 1, 4, 1>(s, job, at, row, widen),
        };
    }
}

/// `N` tiles times `M` rows from `row`; returns `M`.
#[inline(always)]
fn product<S: Simd, T: Copy, const N: usize, const M: usize, const SIDE: usize>(
    s: S,
    job: &mut DenseLinear<'_>,
    (all, tile): (&[[T; LANES]], usize),
    row: usize,
    widen: impl Fn(S, &[T; LANES]) -> S::F,
) -> usize {
    let k = job.weight.k;
    let mut w: [&[[T; LANES]]; N] = [&[]; N];
    for n in 0..N {
        w[n] = &all[job.weight.range(tile + n)][..k];
    }
    let mut x: [&[f32]; M] = [&[]; M];
    for m in 0..M {
        x[m] = &job.x.row(row + m)[..k];
    }
    let y = dot_tiles::<S, T, N, M, SIDE>(s, w, x, widen);
    for n in 0..N {
        put(&mut job.out, (&job.tiles, job.weight.n), job.bias, (tile + n, row), &y[n]);
    }
    M
}

/// `N` tiles times `M` rows, `SIDE` chains at a time.
#[inline(always)]
fn dot_tiles<S: Simd, T, const N: usize, const M: usize, const SIDE: usize>(
    s: S,
    w: [&[[T; LANES]]; N],
    x: [&[f32]; M],
    widen: impl Fn(S, &[T; LANES]) -> S::F,
) -> [[[f32; LANES]; M]; N] {
    let k = w[0].len();
    let mut acc = [[[s.splat(0.0); CHAINS]; M]; N];
    for start in (0..k).step_by(COLUMNS_CACHED) {
        let end = k.min(start + COLUMNS_CACHED);
        for first in (0..CHAINS).step_by(SIDE) {
            let mut sums = [[[s.splat(0.0); SIDE]; M]; N];
            for (sums, acc) in sums.iter_mut().zip(&acc) {
                for m in 0..M {
                    sums[m].copy_from_slice(&acc[m][first..first + SIDE]);
                }
            }
            let mut column = start + first;
            while column + SIDE <= end {
                for c in 0..SIDE {
                    add_column::<S, T, N, M, SIDE>(s, (w, x), (column, c), &mut sums, &widen);
                }
                column += CHAINS;
            }
            for c in 0..end.saturating_sub(column) {
                add_column::<S, T, N, M, SIDE>(s, (w, x), (column, c), &mut sums, &widen);
            }
            for (sums, acc) in sums.iter().zip(&mut acc) {
                for m in 0..M {
                    acc[m][first..first + SIDE].copy_from_slice(&sums[m]);
                }
            }
        }
    }
    let mut out = [[[0.0; LANES]; M]; N];
    for n in 0..N {
        for m in 0..M {
            let [a, b, c, d] = acc[n][m];
            s.store(s.add(s.add(a, b), s.add(c, d)), &mut out[n][m]);
        }
    }
    out
}

/// Adds column `column + c` to the sums of chain `c`.
#[inline(always)]
fn add_column<S: Simd, T, const N: usize, const M: usize, const SIDE: usize>(
    s: S,
    (w, x): ([&[[T; LANES]]; N], [&[f32]; M]),
    (column, c): (usize, usize),
    sums: &mut [[[S::F; SIDE]; M]; N],
    widen: &impl Fn(S, &[T; LANES]) -> S::F,
) {
    for n in 0..N {
        let v = widen(s, &w[n][column + c]);
        for m in 0..M {
            sums[n][m][c] = s.fma(v, s.splat(x[m][column + c]), sums[n][m][c]);
        }
    }
}

#[cfg(test)]
#[path = "dense_tests.rs"]
mod tests;
