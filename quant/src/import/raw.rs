//! A tensor as a checkpoint file holds it, and the checked ways of reading one.
//!
//! Each reader checks type, shape and length, so what it returns can be indexed by that shape.
//! Not here: what the words mean. Input: name, type, shape and bytes from a file header.

use crate::{Dense, Error, FloatType};
use std::ops::Range;

/// Element type of a raw tensor, as far as the importers tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RawType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// 32-bit integers; packed codes are read as unsigned words.
    I32,
    /// 64-bit signed integers.
    I64,
    /// Any type that no quantized format uses.
    Other,
}

impl std::fmt::Display for RawType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::Other => "another type",
        })
    }
}

/// One tensor of a checkpoint, borrowed from its file; nothing about it is trusted.
#[derive(Debug, Clone, Copy)]
pub struct RawTensor<'a> {
    /// Name in the checkpoint, for error messages.
    pub name: &'a str,
    /// Element type.
    pub dtype: RawType,
    /// Dimensions, row-major.
    pub shape: &'a [usize],
    /// Little-endian elements, possibly unaligned.
    pub bytes: &'a [u8],
}

impl<'a> RawTensor<'a> {
    /// The i32 words of a tensor of shape `[rows, columns]`, as little-endian bytes.
    pub(super) fn words(&self, shape: [usize; 2]) -> Result<&'a [[u8; 4]], Error> {
        if self.dtype != RawType::I32 {
            return Err(self.wrong_type("i32"));
        }
        self.check(&shape, 4)?;
        Ok(self.bytes.as_chunks::<4>().0)
    }

    /// The floats in a part of a tensor of shape `[rows, columns]`, widened to f32 and finite.
    pub(super) fn floats(
        &self,
        shape: [usize; 2],
        [rows, columns]: [Range<usize>; 2],
    ) -> Result<Vec<f32>, Error> {
        let float = match self.dtype {
            RawType::F32 => FloatType::F32,
            RawType::F16 => FloatType::F16,
            RawType::Bf16 => FloatType::Bf16,
            RawType::I32 | RawType::I64 | RawType::Other => {
                return Err(self.wrong_type("f32, f16 or bf16"));
            }
        };
        self.check(&shape, float.bytes())?;
        let all = Dense::new(self.name, float, shape, self.bytes)?;
        let width = columns.len().max(1);
        let mut values = vec![0.0; rows.len() * columns.len()];
        for (row, out) in rows.clone().zip(values.chunks_exact_mut(width)) {
            all.columns(row, columns.clone(), out);
        }
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(i) => {
                let at = (rows.start + i / width) * shape[1] + columns.start + i % width;
                Err(self.value("scale", at, &values[i], "a finite number".to_owned()))
            }
        }
    }

    /// The integers of a tensor of shape `[len]`, stored as i32 or i64.
    pub(super) fn integers(&self, len: usize) -> Result<Vec<i64>, Error> {
        match self.dtype {
            RawType::I32 => {
                self.check(&[len], 4)?;
                let words = self.bytes.as_chunks().0.iter();
                Ok(words.map(|b| i64::from(i32::from_le_bytes(*b))).collect())
            }
            RawType::I64 => {
                self.check(&[len], 8)?;
                Ok(self.bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect())
            }
            RawType::F32 | RawType::F16 | RawType::Bf16 | RawType::Other => {
                Err(self.wrong_type("i32 or i64"))
            }
        }
    }

    /// Checks shape and byte count for elements of `size` bytes.
    fn check(&self, shape: &[usize], size: usize) -> Result<(), Error> {
        if self.shape != shape {
            return Err(Error::Shape {
                tensor: self.name.to_owned(),
                expected: format!("{shape:?}"),
                found: self.shape.to_vec(),
            });
        }
        let expected = shape.iter().fold(size, |bytes, d| bytes.saturating_mul(*d));
        if self.bytes.len() != expected {
            let found = self.bytes.len();
            return Err(Error::Bytes { tensor: self.name.to_owned(), expected, found });
        }
        Ok(())
    }

    fn wrong_type(&self, expected: &'static str) -> Error {
        Error::Type { tensor: self.name.to_owned(), expected, found: self.dtype.to_string() }
    }

    /// An element of this tensor that is out of range.
    pub(super) fn value(
        &self,
        what: &'static str,
        index: usize,
        found: &dyn std::fmt::Display,
        expected: String,
    ) -> Error {
        Error::Value {
            tensor: self.name.to_owned(),
            what,
            index,
            found: found.to_string(),
            expected,
        }
    }
}
