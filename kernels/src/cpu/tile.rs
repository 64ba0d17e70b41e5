//! Where the results of tiles of weights go: sixteen columns of some rows each, plus their bias.
//!
//! Shared by the linears ([`super::dense`], [`super::grouped`]), which compute the lanes.

use super::isa::Kernel;
use super::share::MatMut;
use super::simd::{LANES, Simd};
use std::ops::Range;

/// Writes the sums of tiles side by side and clears them, as a function of its own: copying a line takes
/// one instruction there, four in code for any processor.
#[derive(Debug)]
pub(crate) struct PutTiles<'a, 'o> {
    /// Columns of the tiles `tiles`.
    pub(crate) out: &'a mut MatMut<'o>,
    pub(crate) tiles: &'a Range<usize>,
    /// Rows of the weight.
    pub(crate) n: usize,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) first: usize,
    /// `[tiles from the first one on, rows of out, lane]`
    pub(crate) sums: &'a mut [[f32; LANES]],
}

impl Kernel for PutTiles<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let rows = self.out.rows();
        for (tile, sums) in (self.first..).zip(self.sums.chunks_exact_mut(rows)) {
            put(self.out, (self.tiles, self.n), self.bias, (tile, 0), sums);
            sums.fill([0.0; LANES]);
        }
    }
}

/// Writes the lanes of tile `tile` for rows from `row` on into `out`, whose columns are those of
/// `tiles`; the last tile of a weight of `n` rows may fill fewer than sixteen.
#[inline(always)]
pub(crate) fn put(
    out: &mut MatMut<'_>,
    (tiles, n): (&Range<usize>, usize),
    bias: Option<&[f32]>,
    (tile, row): (usize, usize),
    y: &[[f32; LANES]],
) {
    let first = tile * LANES;
    let columns = LANES.min(n - first);
    let at = first - tiles.start * LANES;
    for (m, lanes) in y.iter().enumerate() {
        let out = &mut out.row(row + m)[at..at + columns];
        match out.first_chunk_mut::<LANES>() {
            // Of known length, so that it is no call.
            Some(out) => *out = *lanes,
            None => out.copy_from_slice(&lanes[..columns]),
        }
        if let Some(bias) = bias {
            for (y, b) in out.iter_mut().zip(&bias[first..first + columns]) {
                *y += b;
            }
        }
    }
}
