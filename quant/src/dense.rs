//! Float matrices and vectors as the checkpoint stores them: type tag, shape, little-endian bytes.
//!
//! Not here: arithmetic on them. Input: bytes of a safetensors tensor, borrowed or owned.

use crate::Error;
use half::slice::HalfFloatSliceExt;
use std::borrow::Cow;

/// A float type a checkpoint may store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for FloatType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// A row-major float matrix `[n, k]` (a vector is `[1, k]`): `n * k` little-endian elements.
///
/// The bytes may be unaligned: they can point into a mapped file.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense<'a> {
    float: FloatType,
    n: usize,
    k: usize,
    bytes: Cow<'a, [u8]>,
}

impl<'a> Dense<'a> {
    /// Wraps `bytes` as an `[n, k]` matrix.
    ///
    /// # Errors
    /// [`Error::Bytes`] if the length is not `n * k * size`; `tensor` names the culprit.
    pub fn new(
        tensor: &str,
        float: FloatType,
        [n, k]: [usize; 2],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self, Error> {
        let bytes = bytes.into();
        let expected = n.saturating_mul(k).saturating_mul(float.bytes());
        if bytes.len() != expected {
            let found = bytes.len();
            return Err(Error::Bytes { tensor: tensor.to_owned(), expected, found });
        }
        Ok(Self { float, n, k, bytes })
    }

    /// An owned f32 matrix from values in row-major order; panics if the count is not `n * k`.
    pub fn from_f32([n, k]: [usize; 2], values: &[f32]) -> Dense<'static> {
        assert_eq!(values.len(), n * k, "dense matrix needs n * k values");
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Dense { float: FloatType::F32, n, k, bytes: Cow::Owned(bytes) }
    }

    /// Element type.
    pub fn float(&self) -> FloatType {
        self.float
    }

    /// `[n, k]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.n, self.k]
    }

    /// All bytes, row-major, little-endian, possibly unaligned.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Writes row `row` widened to f32 into `out_k`, whose length must be `k`.
    pub fn row(&self, row: usize, out_k: &mut [f32]) {
        assert!(row < self.n && out_k.len() == self.k, "row {row} of {:?}", self.shape());
        let stride = self.k * self.float.bytes();
        widen(self.float, &self.bytes[row * stride..][..stride], out_k);
    }

    /// All elements widened to f32 (exact for all three types).
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n * self.k];
        widen(self.float, &self.bytes, &mut out);
        out
    }

    /// The same matrix owning its bytes.
    pub fn into_owned(self) -> Dense<'static> {
        let Self { float, n, k, bytes } = self;
        Dense { float, n, k, bytes: Cow::Owned(bytes.into_owned()) }
    }
}

/// Widens little-endian elements to f32.
fn widen(float: FloatType, bytes: &[u8], out: &mut [f32]) {
    match float {
        FloatType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        FloatType::F16 => {
            // Piece by piece: a single conversion would ask for the instruction set each time.
            let mut piece = [half::f16::ZERO; 64];
            for (out, bytes) in out.chunks_mut(64).zip(bytes.chunks(128)) {
                for (h, b) in piece.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *h = half::f16::from_le_bytes(*b);
                }
                piece[..out.len()].convert_to_f32_slice(out);
            }
        }
        FloatType::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = half::bf16::from_le_bytes(*b).to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_widen_exactly() {
        let bf16 = [1.5f32, -2.0, 0.25, 3.0].map(half::bf16::from_f32);
        let bytes: Vec<u8> = bf16.iter().flat_map(|v| v.to_le_bytes()).collect();
        let dense = Dense::new("t", FloatType::Bf16, [2, 2], bytes).unwrap();
        let mut row = [0.0; 2];
        dense.row(1, &mut row);
        assert_eq!(row, [0.25, 3.0]);
        assert_eq!(dense.to_f32(), [1.5, -2.0, 0.25, 3.0]);
    }

    #[test]
    fn wrong_length_is_named() {
        let err = Dense::new("w", FloatType::F16, [2, 3], vec![0u8; 11]).unwrap_err();
        assert_eq!(err.to_string(), "tensor w: expected 12 bytes, found 11");
    }
}
