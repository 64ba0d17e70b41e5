//! AWQ checkpoints in the GEMM layout: four-bit codes packed along n, interleaved, true zeros.
//!
//! ```text
//! qweight [k, n / 8]       nibble i of word c is the code of output 8 c + ORDER[i]
//! qzeros  [groups, n / 8]  the same packing; absent: symmetric, zero point 8
//! scales  [groups, n]
//! ```
//! Not here: the GEMV layouts, reading `quantization_config`. Input: untrusted settings, tensors.

use super::RawTensor;
use super::layout::{Layout, Unpacked, bad_shape, setting};
use super::packed::{crop_rows, transpose};
use crate::{Bits, Error, Format, Grouped};
use std::ops::Range;

/// Output column of each nibble of a word.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// What `quantization_config` says of one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Code width: 4.
    pub bits: u8,
    /// Columns of a group; none (-1 in the file) is the whole row.
    pub group: Option<usize>,
}

/// The tensors of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct Tensors<'a> {
    /// `[k, n / 8]` i32.
    pub qweight: RawTensor<'a>,
    /// `[groups, n / 8]` i32; none is the zero point 8 throughout.
    pub qzeros: Option<RawTensor<'a>>,
    /// `[groups, n]` floats.
    pub scales: RawTensor<'a>,
}

/// The format an `[n, k]` matrix will have.
///
/// # Errors
/// [`Error::Setting`] for other widths, for `n` that is no multiple of 8, for a group size that
/// leaves no even group of at least 8 columns, and for group indices, which AWQ does not have.
pub fn format(settings: &Settings, shape: [usize; 2], has_g_idx: bool) -> Result<Format, Error> {
    if has_g_idx {
        return Err(setting("g_idx", "none in an awq checkpoint", &"group indices"));
    }
    Ok(layout(settings, shape)?.format(false))
}

/// Unpacks rows `rows` (some of the n) of an `[n, k]` matrix.
///
/// # Errors
/// Those of [`format()`], and a named one for each tensor whose type, shape, length or values do
/// not fit.
pub fn import(
    settings: &Settings,
    [n, k]: [usize; 2],
    rows: Range<usize>,
    tensors: &Tensors<'_>,
) -> Result<Grouped, Error> {
    let layout = layout(settings, [n, k])?;
    // A word holds eight rows: whole words are unpacked, then the rows cut out.
    let octets = rows.start / 8..rows.end.div_ceil(8);
    let whole = octets.start * 8..octets.end * 8;
    let layout = layout.rows(&whole);
    let (groups, count) = (layout.groups(), whole.len());
    let qweight = tensors.qweight.words([k, n / 8])?;
    let scales_gr = tensors.scales.floats([groups, n], [0..groups, whole.clone()])?;
    let zeros = match &tensors.qzeros {
        None => vec![8; count * groups],
        Some(qzeros) => {
            let words = qzeros.words([groups, n / 8])?;
            transpose(&zero_points(words, n / 8, &octets), count, 0..count)
        }
    };
    let words = pack_along_k(qweight, n / 8, &octets);
    let stream = transpose(&words, count, 0..count).into_flattened();
    let codes = crop_rows(stream, k.div_ceil(8) * 4, k / 2);
    let scales = transpose(&scales_gr, count, 0..count);
    let unpacked = Unpacked { codes, scales, zeros, perm: None };
    let all = layout.finish(tensors.qweight.name, unpacked)?;
    let wanted = rows.start - whole.start..rows.end - whole.start;
    Ok(if wanted.len() == count { all } else { all.rows(wanted) })
}

fn layout(settings: &Settings, [n, k]: [usize; 2]) -> Result<Layout, Error> {
    if settings.bits != 4 {
        return Err(setting("bits", "4", &settings.bits));
    }
    if n % 8 != 0 {
        return Err(bad_shape("a multiple of 8 rows", [n, k]));
    }
    Layout::new([n, k], Bits::Four, settings.group)
}

/// Zero points `[groups, 8 * octets]` in those columns of rows of `width` words.
fn zero_points(words: &[[u8; 4]], width: usize, octets: &Range<usize>) -> Vec<u8> {
    let words = words.chunks_exact(width).flat_map(|row| &row[octets.clone()]);
    let mut zeros = vec![[0; 8]; words.clone().count()];
    for (octet, word) in zeros.iter_mut().zip(words) {
        for (i, column) in ORDER.into_iter().enumerate() {
            octet[column] = (u32::from_le_bytes(*word) >> (4 * i)) as u8 & 15;
        }
    }
    zeros.into_flattened()
}

/// Repacks columns `octets` of `[k, width]` words along n to `[k / 8, 8 * octets]` words along k,
/// the last row padded by zeros.
fn pack_along_k(words: &[[u8; 4]], width: usize, octets: &Range<usize>) -> Vec<[u8; 4]> {
    let (k, n) = (words.len() / width, 8 * octets.len());
    let mut out = vec![[0; 4]; k.div_ceil(8) * n];
    for (eight_rows, row_n) in words.chunks(8 * width).zip(out.chunks_exact_mut(n)) {
        for (column, octet) in octets.clone().zip(row_n.as_chunks_mut::<8>().0) {
            let mut block = [0; 8];
            for (word, row) in block.iter_mut().zip(eight_rows.chunks_exact(width)) {
                *word = u32::from_le_bytes(row[column]);
            }
            for (word, output) in transpose_nibbles(block).into_iter().zip(ORDER) {
                octet[output] = word.to_le_bytes();
            }
        }
    }
    out
}

/// Nibble `i` of word `j` becomes nibble `j` of word `i`, by halves, bytes and nibbles.
fn transpose_nibbles(mut block: [u32; 8]) -> [u32; 8] {
    for (distance, low) in [(4, 0x0000_ffff), (2, 0x00ff_00ff), (1, 0x0f0f_0f0f)] {
        for i in (0..8).filter(|i| i & distance == 0) {
            let (a, b) = (block[i], block[i + distance]);
            block[i] = (a & low) | (b & low) << (4 * distance);
            block[i + distance] = (a >> (4 * distance)) & low | (b & !low);
        }
    }
    block
}

#[cfg(test)]
mod tests {
    use super::super::RawType;
    use super::super::packing::{self, Matrix};
    use super::*;
    use proptest::prelude::*;
    use testkit::Rng;

    fn unpack(m: &Matrix, dtype: RawType, symmetric: bool) -> Grouped {
        let owned = packing::awq(m, dtype);
        let [qweight, qzeros, scales] = owned.each_ref().map(|t| t.raw());
        let tensors = Tensors { qweight, qzeros: (!symmetric).then_some(qzeros), scales };
        let settings = Settings { bits: 4, group: m.group };
        let all = import(&settings, [m.n, m.k], 0..m.n, &tensors).unwrap();
        let part = import(&settings, [m.n, m.k], 3..m.n - 1, &tensors).unwrap();
        assert_eq!(part, all.rows(3..m.n - 1));
        all
    }

    proptest! {
        #[test]
        fn unpacks_what_was_packed(
            group in prop::sample::select(vec![None, Some(8), Some(32), Some(64), Some(128)]),
            (octets, columns) in (1usize..6, 4usize..90),
            symmetric in any::<bool>(),
            dtype in prop::sample::select(vec![RawType::F32, RawType::F16, RawType::Bf16]),
            seed in any::<u64>(),
        ) {
            // A whole row may have any even width; groups need a common divisor of 8.
            let k = if group.is_none() { columns * 2 } else { columns * 8 };
            let group = group.map(|g: usize| g.min(k));
            let mut m = Matrix::random(&mut Rng::new(seed), [octets * 8, k], 4, group);
            if symmetric {
                m.zeros.iter_mut().flatten().for_each(|z| *z = 8);
            }
            m.assert_is(&unpack(&m, dtype, symmetric));
        }
    }

    #[test]
    fn other_settings_are_refused() {
        let refused = |bits, shape, g_idx| {
            format(&Settings { bits, group: Some(32) }, shape, g_idx).unwrap_err().to_string()
        };
        assert_eq!(refused(8, [32, 32], false), "bits: expected 4, found 8");
        assert!(refused(4, [12, 32], false).starts_with("weight shape: expected a multiple of 8"));
        assert!(refused(4, [32, 32], true).starts_with("g_idx: expected none"));
    }
}
