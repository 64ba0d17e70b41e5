//! What all formats share once codes are unpacked: groups, act-order and the canonical matrix.
//!
//! A group at the end of a row may be short (k is no multiple of the group size). The canonical
//! layout has equal groups only, so such a matrix gets smaller groups with repeated scales.
//!
//! Not here: packing. Input: settings and shapes as a configuration gives them, unchecked.

use super::RawTensor;
use crate::{Bits, Error, Format, Grouped, GroupedParts, GroupedShape};
use std::ops::Range;

/// The groups of a checkpoint's matrix and how they map to canonical ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    shape: GroupedShape,
    /// Columns of a group in the checkpoint; `shape.group` divides it.
    stored: usize,
}

/// Unpacked tensors of a matrix, columns in checkpoint order.
pub(super) struct Unpacked {
    /// `[n, k]` codes of the canonical width.
    pub(super) codes: Vec<u8>,
    /// `[n, stored groups]`.
    pub(super) scales: Vec<f32>,
    /// `[n, stored groups]`, true zero points.
    pub(super) zeros: Vec<u8>,
    /// The columns sorted by group, or none where they are already.
    pub(super) perm: Option<Vec<u32>>,
}

impl Layout {
    /// Groups of an `[n, k]` matrix; `group` none is a whole row.
    pub(super) fn new([n, k]: [usize; 2], bits: Bits, group: Option<usize>) -> Result<Self, Error> {
        // Below 2^31 no count of bits overflows, and a permutation fits u32.
        if [n, k].iter().any(|d| !(1..=i32::MAX as usize).contains(d)) {
            return Err(bad_shape("1 to 2147483647 rows and columns", [n, k]));
        }
        let stored = group.unwrap_or(k).min(k);
        let common = gcd(stored, k);
        if stored == 0 || common < 8 || common % 2 == 1 {
            let expected = format!("one that shares an even divisor of 8 or more with width {k}");
            return Err(setting("group_size", &expected, &group.unwrap_or(k)));
        }
        Ok(Self { shape: GroupedShape { n, k, group: common, bits }, stored })
    }

    /// Groups of a row in the checkpoint, the last one possibly short.
    pub(super) fn groups(&self) -> usize {
        self.shape.k.div_ceil(self.stored)
    }

    /// The format of the matrix this becomes.
    pub(super) fn format(&self, act_order: bool) -> Format {
        Format::Grouped { bits: self.shape.bits, group: self.shape.group, act_order }
    }

    /// The same for rows `rows` alone, which must be some of the n.
    pub(super) fn rows(self, rows: &Range<usize>) -> Self {
        let GroupedShape { n, .. } = self.shape;
        assert!(rows.start < rows.end && rows.end <= n, "rows {rows:?} of {n}");
        Self { shape: GroupedShape { n: rows.len(), ..self.shape }, ..self }
    }

    /// Columns sorted by their group in `g_idx` (stable), or none where they are already sorted.
    pub(super) fn order(&self, g_idx: &RawTensor<'_>) -> Result<Option<Vec<u32>>, Error> {
        let group_of_k = g_idx.integers(self.shape.k)?;
        // The usual case, asked again for every range of rows: nothing is reordered.
        let plain = |(g, group): (usize, &[i64])| group.iter().all(|&found| found == g as i64);
        if group_of_k.chunks(self.stored).enumerate().all(plain) {
            return Ok(None);
        }
        let mut members = vec![0; self.groups()];
        for (column, &group) in group_of_k.iter().enumerate() {
            let count = usize::try_from(group).ok().and_then(|g| members.get_mut(g));
            *count.ok_or_else(|| {
                let expected = format!("a group in 0..{}", self.groups());
                g_idx.value("group index", column, &group, expected)
            })? += 1;
        }
        self.check_members(g_idx, &members)?;
        let mut free: Vec<usize> = (0..members.len()).map(|group| group * self.stored).collect();
        let mut perm = vec![0; self.shape.k];
        for (column, &group) in group_of_k.iter().enumerate() {
            let place = &mut free[group as usize];
            perm[*place] = column as u32;
            *place += 1;
        }
        Ok(Some(perm))
    }

    /// Checks that every group has its columns: all equally many, the last one the rest.
    fn check_members(&self, g_idx: &RawTensor<'_>, members: &[usize]) -> Result<(), Error> {
        let size = |group| self.stored.min(self.shape.k - group * self.stored);
        match (0..members.len()).find(|&group| members[group] != size(group)) {
            None => Ok(()),
            Some(group) => Err(g_idx.value(
                "number of columns of the group",
                group,
                &members[group],
                size(group).to_string(),
            )),
        }
    }

    /// The canonical matrix; `tensor` names it in errors.
    pub(super) fn finish(self, tensor: &str, unpacked: Unpacked) -> Result<Grouped, Error> {
        let Unpacked { mut codes, scales, zeros, perm } = unpacked;
        if let Some(perm_k) = &perm {
            permute_columns(self.shape, &mut codes, perm_k);
        }
        let (scales, zeros) = (self.spread(scales), self.spread(zeros));
        let shape = self.shape;
        Grouped::new(tensor, GroupedParts { shape, codes, scales, zeros, perm })
    }

    /// Repeats a value of each checkpoint group for the canonical groups inside it.
    fn spread<T: Copy>(&self, values: Vec<T>) -> Vec<T> {
        let GroupedShape { group, .. } = self.shape;
        if group == self.stored {
            return values;
        }
        let at: Vec<usize> = (0..self.shape.groups()).map(|g| g * group / self.stored).collect();
        values.chunks_exact(self.groups()).flat_map(|row| at.iter().map(|&g| row[g])).collect()
    }
}

/// An error about a setting.
pub(super) fn setting(key: &str, expected: &str, found: &dyn std::fmt::Display) -> Error {
    let (key, expected) = (key.to_owned(), expected.to_owned());
    Error::Setting { key, expected, found: found.to_string() }
}

/// An error about a declared shape.
pub(super) fn bad_shape(expected: &str, [n, k]: [usize; 2]) -> Error {
    setting("weight shape", expected, &format!("{n} rows of {k}"))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Reorders the columns of every row: new column `j` is old column `perm_k[j]`.
fn permute_columns(shape: GroupedShape, codes: &mut [u8], perm_k: &[u32]) {
    let mut row_k = vec![0; shape.k];
    for row in codes.chunks_exact_mut(shape.bits.row_bytes(shape.k)) {
        match shape.bits {
            Bits::Four => permute_nibbles(row, &mut row_k, perm_k),
            Bits::Eight => {
                row_k.copy_from_slice(row);
                for (code, &column) in row.iter_mut().zip(perm_k) {
                    *code = row_k[column as usize];
                }
            }
        }
    }
}

/// One row of nibbles; `row_k` is room for its codes.
fn permute_nibbles(row: &mut [u8], row_k: &mut [u8], perm_k: &[u32]) {
    for (codes, byte) in row_k.as_chunks_mut::<2>().0.iter_mut().zip(&*row) {
        *codes = [byte & 15, byte >> 4];
    }
    for (byte, &[low, high]) in row.iter_mut().zip(perm_k.as_chunks::<2>().0) {
        *byte = row_k[low as usize] | row_k[high as usize] << 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grouped(k: usize, group: usize) -> Result<Format, Error> {
        Ok(Layout::new([8, k], Bits::Four, Some(group))?.format(false))
    }

    #[test]
    fn short_last_groups_become_smaller_equal_ones() {
        let group_of = |k, group| match grouped(k, group).unwrap() {
            Format::Grouped { group, .. } => group,
            Format::Dense(_) => panic!("quantized"),
        };
        assert_eq!(group_of(256, 128), 128);
        assert_eq!(group_of(320, 128), 64);
        assert_eq!(group_of(96, 128), 96);
        assert_eq!(group_of(172, 172), 172);
    }

    #[test]
    fn hopeless_groups_are_named() {
        for (k, group) in [(132, 128), (256, 0), (27, 27), (4, 4)] {
            let err = grouped(k, group).unwrap_err().to_string();
            assert!(err.starts_with("group_size: expected one that shares"), "{err}");
        }
        let err = grouped(0, 32).unwrap_err().to_string();
        assert!(err.starts_with("weight shape: "), "{err}");
    }
}
