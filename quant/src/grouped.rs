//! The canonical quantized matrix: integer codes in groups along k, one scale and zero per group.
//!
//! ```text
//! logical     w[n, k] = scale[n, k / group] * (code[n, k] - zero[n, k / group])
//! Bits::Four  one row of codes: byte i holds column 2i in its low nibble, 2i + 1 in the high one
//! Bits::Eight one row of codes: byte i holds column i
//! perm        stored column j is checkpoint column perm[j] (act-order): y = W[:, j] * x[perm[j]]
//! ```
//! 2- and 3-bit codes are widened to nibbles by the importers. Scales are f32 here, since a
//! checkpoint may hold f16, bf16 or f32 ones; a backend narrows them where that is exact.
//!
//! Not here: unpacking of checkpoint formats ([`crate::import`]), repacking for a device.

use crate::Error;

/// Width of a stored code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bits {
    /// Two codes a byte, 0..=15.
    Four,
    /// One code a byte, 0..=255.
    Eight,
}

impl Bits {
    /// 4 or 8.
    pub fn count(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// The largest code.
    pub fn max_code(self) -> u8 {
        match self {
            Self::Four => 15,
            Self::Eight => 255,
        }
    }

    /// Bytes of a row of `k` codes (`k` even for nibbles).
    pub fn row_bytes(self, k: usize) -> usize {
        k * self.count() / 8
    }
}

/// Shape of a grouped matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupedShape {
    /// Output width (rows).
    pub n: usize,
    /// Input width (columns).
    pub k: usize,
    /// Columns of a group; `k` itself when quantized per row.
    pub group: usize,
    /// Code width.
    pub bits: Bits,
}

impl GroupedShape {
    /// Groups in a row: `k / group`.
    pub fn groups(&self) -> usize {
        self.k / self.group
    }
}

/// A quantized matrix in the canonical layout; see the module's picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Grouped {
    shape: GroupedShape,
    /// `[n, k]` codes, packed.
    codes: Vec<u8>,
    /// `[n, k / group]`.
    scales: Vec<f32>,
    /// `[n, k / group]`, true zero points.
    zeros: Vec<u8>,
    /// `[k]`, a permutation of `0..k`, or none for the identity.
    perm: Option<Vec<u32>>,
}

/// The parts of a [`Grouped`] before validation.
#[derive(Debug, Clone)]
pub struct GroupedParts {
    /// Shape and code width.
    pub shape: GroupedShape,
    /// `[n, k]` packed codes.
    pub codes: Vec<u8>,
    /// `[n, k / group]` scales, finite.
    pub scales: Vec<f32>,
    /// `[n, k / group]` zero points, at most the largest code.
    pub zeros: Vec<u8>,
    /// Column permutation or none.
    pub perm: Option<Vec<u32>>,
}

impl Grouped {
    /// Validates the parts of the matrix called `tensor`.
    ///
    /// # Errors
    /// A shape that does not divide, a wrong length, a scale that is not finite, a zero point
    /// beyond the codes, or a `perm` that is no permutation. An identity `perm` is dropped.
    pub fn new(tensor: &str, parts: GroupedParts) -> Result<Self, Error> {
        check_shape(tensor, &parts.shape)?;
        check_lengths(tensor, &parts)?;
        check_values(tensor, &parts)?;
        let perm = check_perm(tensor, parts.shape.k, parts.perm)?;
        let GroupedParts { shape, codes, scales, zeros, .. } = parts;
        Ok(Self { shape, codes, scales, zeros, perm })
    }

    /// Shape and code width.
    pub fn shape(&self) -> GroupedShape {
        self.shape
    }

    /// Packed codes, `n` rows of [`Bits::row_bytes`].
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Code at `[row, column]` (stored column order).
    pub fn code(&self, row: usize, column: usize) -> u8 {
        let GroupedShape { k, bits, .. } = self.shape;
        let row_codes = &self.codes[row * bits.row_bytes(k)..];
        match bits {
            Bits::Four => row_codes[column / 2] >> (4 * (column % 2)) & 15,
            Bits::Eight => row_codes[column],
        }
    }

    /// `[n, k / group]` scales.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// `[n, k / group]` zero points.
    pub fn zeros(&self) -> &[u8] {
        &self.zeros
    }

    /// Column permutation of act-order; none is the identity.
    pub fn perm(&self) -> Option<&[u32]> {
        self.perm.as_deref()
    }

    /// Rows of `parts` stacked in order (fused q/k/v or gate/up).
    ///
    /// Returns none where they cannot be one matrix: different k, group, bits or perm.
    pub fn stack(parts: &[Self]) -> Option<Self> {
        let (first, rest) = parts.split_first()?;
        let mut all = first.clone();
        for part in rest {
            let shape = GroupedShape { n: first.shape.n, ..part.shape };
            if shape != first.shape || part.perm != first.perm {
                return None;
            }
            all.shape.n += part.shape.n;
            all.codes.extend_from_slice(&part.codes);
            all.scales.extend_from_slice(&part.scales);
            all.zeros.extend_from_slice(&part.zeros);
        }
        Some(all)
    }
}

fn check_shape(tensor: &str, shape: &GroupedShape) -> Result<(), Error> {
    let GroupedShape { n, k, group, bits } = *shape;
    let even = bits == Bits::Eight || k % 2 == 0;
    if n == 0 || k == 0 || group == 0 || !k.is_multiple_of(group.max(1)) || !even {
        return Err(Error::Shape {
            tensor: tensor.to_owned(),
            expected: format!("[n, k] with n, k > 0 and k a multiple of the group size {group}"),
            found: vec![n, k],
        });
    }
    Ok(())
}

fn check_lengths(tensor: &str, parts: &GroupedParts) -> Result<(), Error> {
    let GroupedShape { n, k, bits, .. } = parts.shape;
    let groups = parts.shape.groups();
    let lengths = [
        (n * bits.row_bytes(k), parts.codes.len()),
        (n * groups, parts.scales.len()),
        (n * groups, parts.zeros.len()),
    ];
    match lengths.into_iter().find(|(expected, found)| expected != found) {
        None => Ok(()),
        Some((expected, found)) => Err(Error::Bytes { tensor: tensor.to_owned(), expected, found }),
    }
}

fn check_values(tensor: &str, parts: &GroupedParts) -> Result<(), Error> {
    let value = |what, index, found: String, expected: String| {
        Err(Error::Value { tensor: tensor.to_owned(), what, index, found, expected })
    };
    if let Some(i) = parts.scales.iter().position(|s| !s.is_finite()) {
        return value("scale", i, parts.scales[i].to_string(), "a finite number".to_owned());
    }
    let max = parts.shape.bits.max_code();
    if let Some(i) = parts.zeros.iter().position(|&z| z > max) {
        return value("zero point", i, parts.zeros[i].to_string(), format!("at most {max}"));
    }
    Ok(())
}

fn check_perm(tensor: &str, k: usize, perm: Option<Vec<u32>>) -> Result<Option<Vec<u32>>, Error> {
    let Some(perm) = perm else { return Ok(None) };
    if perm.len() != k {
        let (expected, found) = (k, perm.len());
        return Err(Error::Bytes { tensor: tensor.to_owned(), expected, found });
    }
    let mut seen = vec![false; k];
    for (index, &column) in perm.iter().enumerate() {
        let fresh = seen.get_mut(column as usize).is_some_and(|s| !std::mem::replace(s, true));
        if !fresh {
            return Err(Error::Value {
                tensor: tensor.to_owned(),
                what: "permuted column",
                index,
                found: column.to_string(),
                expected: format!("every column of 0..{k} once"),
            });
        }
    }
    let identity = perm.iter().enumerate().all(|(i, &p)| i == p as usize);
    Ok((!identity).then_some(perm))
}
