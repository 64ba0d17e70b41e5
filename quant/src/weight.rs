//! What a backend is handed: a float matrix or a grouped one, and the format known beforehand.

use crate::{Bits, Dense, FloatType, Grouped};
use std::ops::Range;

/// One weight, ready for a backend to repack.
#[derive(Debug, Clone)]
pub enum Weight<'a> {
    /// Floats as stored.
    Dense(Dense<'a>),
    /// Quantized codes in the canonical layout.
    Grouped(Grouped),
}

impl Weight<'_> {
    /// `[n, k]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(d) => d.shape(),
            Self::Grouped(g) => [g.shape().n, g.shape().k],
        }
    }

    /// Rows `rows`, which must lie inside the matrix, as a weight of their own.
    pub fn rows(&self, rows: Range<usize>) -> Weight<'_> {
        match self {
            Self::Dense(d) => Weight::Dense(d.rows(rows)),
            Self::Grouped(g) => Weight::Grouped(g.rows(rows)),
        }
    }

    /// The format of this weight.
    pub fn format(&self) -> Format {
        match self {
            Self::Dense(d) => Format::Dense(d.float()),
            Self::Grouped(g) => Format::Grouped {
                bits: g.shape().bits,
                group: g.shape().group,
                act_order: g.perm().is_some(),
            },
        }
    }
}

/// How a weight is stored; known from the checkpoint's header before any weight is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Floats.
    Dense(FloatType),
    /// Codes with a scale and a zero point for each group.
    Grouped {
        /// Stored code width (2- and 3-bit checkpoints are widened to four).
        bits: Bits,
        /// Columns of a group.
        group: usize,
        /// Whether the columns are permuted. From a header alone this says "may be": the
        /// checkpoint carries group indices.
        act_order: bool,
    },
}

impl Format {
    /// Bytes of an `[n, k]` weight of this format at its leanest: codes and f16 scales. Zero
    /// points are left out, since one for the whole matrix may do: speeds in bytes are lower bounds.
    ///
    /// Saturates, since a shape from a file header may be absurd.
    pub fn bytes(self, [n, k]: [usize; 2]) -> usize {
        let row = match self {
            Self::Dense(float) => k.saturating_mul(float.bytes()),
            Self::Grouped { bits, group, .. } => {
                bits.row_bytes(k).saturating_add((k / group.max(1)).saturating_mul(2))
            }
        };
        n.saturating_mul(row)
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dense(float) => write!(f, "{float}"),
            Self::Grouped { bits, group, act_order } => {
                let order = if *act_order { " act-order" } else { "" };
                write!(f, "w{}g{group}{order}", bits.count())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_say_and_count_what_they_are() {
        let four = Format::Grouped { bits: Bits::Four, group: 128, act_order: true };
        let eight = Format::Grouped { bits: Bits::Eight, group: 256, act_order: false };
        assert_eq!(four.to_string(), "w4g128 act-order");
        assert_eq!(eight.to_string(), "w8g256");
        assert_eq!(four.bytes([2, 256]), 2 * (128 + 2 * 2));
        assert_eq!(eight.bytes([2, 256]), 2 * (256 + 2));
        assert_eq!(Format::Dense(FloatType::Bf16).bytes([2, 256]), 1024);
    }

    #[test]
    fn absurd_shapes_saturate() {
        let four = Format::Grouped { bits: Bits::Four, group: 0, act_order: false };
        for format in [four, Format::Dense(FloatType::F32)] {
            assert_eq!(format.bytes([usize::MAX, usize::MAX]), usize::MAX);
        }
    }
}
