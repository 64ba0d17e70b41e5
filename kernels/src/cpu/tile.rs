//! Where the results of one tile of weights go: sixteen columns of some rows, plus their bias.
//!
//! Shared by the linears ([`super::dense`], [`super::grouped`]), which compute the lanes.

use super::share::MatMut;
use super::simd::LANES;
use std::ops::Range;

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
