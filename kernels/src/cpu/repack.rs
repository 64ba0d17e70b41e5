//! How weights of sixteen rows a tile are repacked: in parts small enough to stay in a cache,
//! side by side on the threads of the pool.
//!
//! ```text
//! delivered rows -> a part of whole tiles (read once, written once) -> its place in the tiles
//! ```
//! Not here: the layouts ([`super::packed`], [`super::dense`]).

use super::simd::LANES;
use std::ops::Range;

/// Bytes of a part: few enough to stay in a cache between the steps it passes through, enough
/// that a source whose rows lie side by side (words along k) is read in pieces of many words.
const PART_BYTES: usize = 256 << 10;

/// The rows of a matrix in parts of whole tiles.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    n: usize,
    /// Tiles of a part; the last may have fewer.
    pub(crate) tiles: usize,
}

impl Parts {
    /// Parts of a matrix of `n` rows of `row_bytes` bytes.
    pub(crate) fn new(n: usize, row_bytes: usize) -> Self {
        Self { n, tiles: (PART_BYTES / (LANES * row_bytes).max(1)).max(1) }
    }

    /// Rows of part `part`.
    pub(crate) fn rows(self, part: usize) -> Range<usize> {
        let rows = self.tiles * LANES;
        part * rows..self.n.min((part + 1) * rows)
    }
}

/// Sixteen rows of sixteen elements turned; the loops have fixed ends and unroll.
#[inline(always)]
pub(crate) fn turn<T: Copy>(square: &[[T; LANES]; LANES]) -> [[T; LANES]; LANES] {
    std::array::from_fn(|column| std::array::from_fn(|row| square[row][column]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_rows_once() {
        for (n, row_bytes) in [(1, 1), (16, 2048), (100, 2048), (64, 1 << 20), (4096, 256), (5, 0)]
        {
            let parts = Parts::new(n, row_bytes);
            let count = n.div_ceil(LANES).div_ceil(parts.tiles);
            let rows: Vec<usize> = (0..count).flat_map(|part| parts.rows(part)).collect();
            assert_eq!(rows, (0..n).collect::<Vec<_>>(), "{n} rows of {row_bytes} bytes");
        }
    }

    #[test]
    fn a_turned_square_has_its_columns_as_rows() {
        let square = std::array::from_fn(|r| std::array::from_fn(|c| 16 * r + c));
        let turned = turn(&square);
        assert_eq!([turned[0][1], turned[15][2]], [16, 47]);
    }
}
