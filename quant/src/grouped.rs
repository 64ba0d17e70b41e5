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
        match self {
            Self::Four => k / 2,
            Self::Eight => k,
        }
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

pub(crate) fn check_shape(tensor: &str, shape: &GroupedShape) -> Result<(), Error> {
    let GroupedShape { n, k, group, bits } = *shape;
    let even = bits == Bits::Eight || k % 2 == 0;
    if n == 0 || k == 0 || group == 0 || !k.is_multiple_of(group) || !even {
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
        (n.saturating_mul(bits.row_bytes(k)), parts.codes.len()),
        (n.saturating_mul(groups), parts.scales.len()),
        (n.saturating_mul(groups), parts.zeros.len()),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rows of four columns in groups of two; codes count up from `first`.
    fn parts(first: u8) -> GroupedParts {
        GroupedParts {
            shape: GroupedShape { n: 2, k: 4, group: 2, bits: Bits::Four },
            codes: vec![first, 0x32, 0x54, 0x76],
            scales: vec![1.0, -2.0, 0.5, 0.0],
            zeros: vec![8, 7, 0, 15],
            perm: None,
        }
    }

    fn refused(change: impl FnOnce(&mut GroupedParts)) -> String {
        let mut parts = parts(0x10);
        change(&mut parts);
        Grouped::new("w", parts).unwrap_err().to_string()
    }

    #[test]
    fn codes_come_low_nibble_first() {
        let w = Grouped::new("w", parts(0x10)).unwrap();
        let codes: Vec<u8> =
            (0..2).flat_map(|r| (0..4).map(move |c| (r, c))).map(|(r, c)| w.code(r, c)).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7]);
        let bytes = GroupedParts {
            shape: GroupedShape { n: 1, k: 4, group: 4, bits: Bits::Eight },
            codes: vec![200, 1, 2, 255],
            scales: vec![1.0],
            zeros: vec![128],
            perm: None,
        };
        let w = Grouped::new("w", bytes).unwrap();
        assert_eq!([w.code(0, 0), w.code(0, 3)], [200, 255]);
    }

    #[test]
    fn shapes_that_do_not_divide_are_refused() {
        for (n, k, group) in [(0, 4, 2), (2, 0, 2), (2, 4, 0), (2, 4, 3), (2, 3, 3), (2, 4, 8)] {
            let bits = Bits::Four;
            let err = refused(|p| p.shape = GroupedShape { n, k, group, bits });
            assert!(err.starts_with("tensor w: expected shape [n, k]"), "{err}");
        }
        let huge = GroupedShape { n: usize::MAX, k: usize::MAX - 1, group: 2, bits: Bits::Four };
        assert!(refused(|p| p.shape = huge).starts_with("tensor w: expected 18446"));
    }

    #[test]
    fn lengths_and_values_are_checked() {
        assert_eq!(refused(|p| p.codes.truncate(3)), "tensor w: expected 4 bytes, found 3");
        assert_eq!(refused(|p| p.scales.push(1.0)), "tensor w: expected 4 bytes, found 5");
        assert_eq!(refused(|p| p.zeros.clear()), "tensor w: expected 4 bytes, found 0");
        assert_eq!(
            refused(|p| p.scales[2] = f32::INFINITY),
            "tensor w: scale at index 2 is inf, expected a finite number"
        );
        assert_eq!(
            refused(|p| p.zeros[1] = 16),
            "tensor w: zero point at index 1 is 16, expected at most 15"
        );
    }

    #[test]
    fn perm_must_be_a_permutation() {
        let repeated = refused(|p| p.perm = Some(vec![0, 1, 1, 3]));
        assert_eq!(
            repeated,
            "tensor w: permuted column at index 2 is 1, expected every column of 0..4 once"
        );
        assert!(refused(|p| p.perm = Some(vec![0, 1, 2, 4])).contains("at index 3 is 4"));
        assert_eq!(refused(|p| p.perm = Some(vec![0])), "tensor w: expected 4 bytes, found 1");
        let with = |perm: [u32; 4]| GroupedParts { perm: Some(perm.to_vec()), ..parts(0x10) };
        assert_eq!(Grouped::new("w", with([0, 1, 2, 3])).unwrap().perm(), None);
        let kept = Grouped::new("w", with([2, 0, 1, 3])).unwrap();
        assert_eq!(kept.perm(), Some(&[2, 0, 1, 3][..]));
    }

    #[test]
    fn stacked_rows_keep_their_order() {
        let (a, b) = (parts(0x10), parts(0xfe));
        let all = [&a, &b].map(|p| Grouped::new("w", p.clone()).unwrap());
        let both = Grouped::stack(&all).unwrap();
        assert_eq!(both.shape(), GroupedShape { n: 4, ..a.shape });
        assert_eq!([both.code(1, 0), both.code(2, 0), both.code(2, 1)], [4, 14, 15]);
        assert_eq!(both.scales(), [&a.scales[..], &b.scales].concat());
        assert_eq!(both.zeros(), [&a.zeros[..], &b.zeros].concat());
        assert_eq!(Grouped::stack(&all[..1]), Some(all[0].clone()));
    }

    #[test]
    fn unequal_parts_do_not_stack() {
        assert_eq!(Grouped::stack(&[]), None);
        let plain = Grouped::new("w", parts(0x10)).unwrap();
        let mut permuted = parts(0x10);
        permuted.perm = Some(vec![1, 0, 2, 3]);
        let mut regrouped = parts(0x10);
        regrouped.shape.group = 4;
        (regrouped.scales, regrouped.zeros) = (vec![1.0; 2], vec![8; 2]);
        for other in [permuted, regrouped] {
            let other = Grouped::new("w", other).unwrap();
            assert_eq!(Grouped::stack(&[plain.clone(), other]), None);
        }
    }
}
