//! GPTQ checkpoints: codes packed along k in i32 words, transposed to rows here.
//!
//! ```text
//! qweight [k * bits / 32, n]       codes of column n, a bit stream down the rows
//! qzeros  [groups, n * bits / 32]  zero points, a bit stream along n; version 1 stores z - 1
//! scales  [groups, n]              g_idx [k]: the group of each input column (act-order)
//! ```
//! Bits 2, 3 (32 codes in three words), 4 and 8; 2- and 3-bit codes become nibbles.
//!
//! Not here: reading `quantization_config`. Input: untrusted settings and tensors.

use super::RawTensor;
use super::layout::{Layout, Unpacked, bad_shape, setting};
use super::packed::{code_at, transpose, widen, word_count};
use crate::{Bits, Error, Format, Grouped};
use std::ops::Range;

/// How zero points are stored (`checkpoint_format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// `gptq`: one less than the zero point, modulo 2^bits.
    V1,
    /// `gptq_v2`: the zero point.
    V2,
}

/// What `quantization_config` says of one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Code width: 2, 3, 4 or 8.
    pub bits: u8,
    /// Columns of a group; none (-1 in the file) is the whole row.
    pub group: Option<usize>,
    /// How zero points are stored.
    pub version: Version,
}

/// The tensors of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct Tensors<'a> {
    /// `[k * bits / 32, n]` i32.
    pub qweight: RawTensor<'a>,
    /// `[groups, n * bits / 32]` i32; symmetric checkpoints have it too.
    pub qzeros: RawTensor<'a>,
    /// `[groups, n]` floats.
    pub scales: RawTensor<'a>,
    /// `[k]` integers: the group of each column; none or sorted is no act-order.
    pub g_idx: Option<RawTensor<'a>>,
}

/// The format an `[n, k]` matrix will have.
///
/// # Errors
/// [`Error::Setting`] for other widths, for `n` or `k` that do not fill whole words, and for a
/// group size that leaves no even group of at least 8 columns.
pub fn format(settings: &Settings, shape: [usize; 2], has_g_idx: bool) -> Result<Format, Error> {
    Ok(layout(settings, shape)?.format(has_g_idx))
}

/// Unpacks rows `rows` (some of the n) of an `[n, k]` matrix.
///
/// # Errors
/// Those of [`format()`], and a named one for each tensor whose type, shape, length or values do
/// not fit: scales that are not finite, group indices beyond the groups or groups of unequal size.
pub fn import(
    settings: &Settings,
    [n, k]: [usize; 2],
    rows: Range<usize>,
    tensors: &Tensors<'_>,
) -> Result<Grouped, Error> {
    let layout = layout(settings, [n, k])?.rows(&rows);
    let groups = layout.groups();
    let bits = usize::from(settings.bits);
    let qweight = tensors.qweight.words([word_count(k, bits), n])?;
    let scales_gr = tensors.scales.floats([groups, n], [0..groups, rows.clone()])?;
    let zeros_gr = zero_points(settings, [groups, n], &rows, &tensors.qzeros)?;
    let perm = tensors.g_idx.as_ref().map_or(Ok(None), |g_idx| layout.order(g_idx))?;
    let stream = transpose(qweight, n, rows.clone()).into_flattened();
    let codes = match bits {
        2 => widen::<2>(&stream),
        3 => widen::<3>(&stream),
        _ => stream,
    };
    let all = 0..rows.len();
    let scales = transpose(&scales_gr, rows.len(), all.clone());
    let zeros = transpose(&zeros_gr, rows.len(), all);
    layout.finish(tensors.qweight.name, Unpacked { codes, scales, zeros, perm })
}

fn layout(settings: &Settings, [n, k]: [usize; 2]) -> Result<Layout, Error> {
    let bits = match settings.bits {
        2..=4 => Bits::Four,
        8 => Bits::Eight,
        other => return Err(setting("bits", "2, 3, 4 or 8", &other)),
    };
    // Codes that fill whole words: 16, 32, 8 and 4 of 2, 3, 4 and 8 bits.
    let step = if settings.bits == 3 { 32 } else { 32 / usize::from(settings.bits) };
    if n % step != 0 || k % step != 0 {
        let expected = format!("multiples of {step} at {} bits", settings.bits);
        return Err(bad_shape(&expected, [n, k]));
    }
    Layout::new([n, k], bits, settings.group)
}

/// True zero points `[groups, rows]`.
fn zero_points(
    settings: &Settings,
    [groups, n]: [usize; 2],
    rows: &Range<usize>,
    qzeros: &RawTensor<'_>,
) -> Result<Vec<u8>, Error> {
    let bits = usize::from(settings.bits);
    let words = word_count(n, bits);
    let stored = qzeros.words([groups, words])?;
    let (mask, less) = match settings.version {
        Version::V1 => (u8::MAX >> (8 - bits), 1),
        Version::V2 => (u8::MAX, 0),
    };
    let mut zeros = Vec::with_capacity(groups * rows.len());
    for row in stored.chunks_exact(words) {
        let stream = row.as_flattened();
        let zero = |code: u8| code.wrapping_add(less) & mask;
        match bits {
            4 => zeros.extend(rows.clone().map(|i| zero(stream[i / 2] >> (i % 2 * 4) & 15))),
            _ => zeros.extend(rows.clone().map(|i| zero(code_at(stream, bits, i)))),
        }
    }
    Ok(zeros)
}

#[cfg(test)]
mod tests {
    use super::super::packing::{self, Matrix};
    use super::super::{RawTensor, RawType};
    use super::*;
    use proptest::prelude::*;
    use testkit::Rng;

    /// Imports what the packer made; `ordered` passes the group indices on.
    fn unpack(m: &Matrix, version: Version, dtype: RawType, ordered: bool) -> Grouped {
        let owned = packing::gptq(m, u8::from(version == Version::V1), dtype);
        let [qweight, qzeros, scales, g_idx] = owned.each_ref().map(|t| t.raw());
        let g_idx = ordered.then_some(g_idx);
        let settings = Settings { bits: m.bits as u8, group: m.group, version };
        let tensors = Tensors { qweight, qzeros, scales, g_idx };
        let all = import(&settings, [m.n, m.k], 0..m.n, &tensors).unwrap();
        let part = import(&settings, [m.n, m.k], 3..m.n - 1, &tensors).unwrap();
        assert_eq!(part, all.rows(3..m.n - 1));
        all
    }

    proptest! {
        #[test]
        fn unpacks_what_was_packed(
            bits in prop::sample::select(vec![2, 3, 4, 8]),
            group in prop::sample::select(vec![None, Some(16), Some(32), Some(64), Some(128)]),
            (rows, columns) in (1usize..4, 1usize..7),
            (v1, act_order, ordered) in any::<(bool, bool, bool)>(),
            dtype in prop::sample::select(vec![RawType::F32, RawType::F16, RawType::Bf16]),
            seed in any::<u64>(),
        ) {
            let mut rng = Rng::new(seed);
            let shape = [rows * 32, columns * 32];
            let group = group.map(|g: usize| g.min(shape[1]));
            let mut m = Matrix::random(&mut rng, shape, bits, group);
            if act_order {
                m = m.shuffle(&mut rng);
            }
            let version = if v1 { Version::V1 } else { Version::V2 };
            m.assert_is(&unpack(&m, version, dtype, ordered || act_order));
        }
    }

    #[test]
    fn format_says_what_import_gives() {
        let settings = Settings { bits: 3, group: Some(128), version: Version::V1 };
        let m = Matrix::random(&mut Rng::new(5), [32, 320], 3, Some(128));
        let weight = crate::Weight::Grouped(unpack(&m, Version::V1, RawType::F16, false));
        assert_eq!(format(&settings, [32, 320], false).unwrap(), weight.format());
        assert_eq!(weight.format().to_string(), "w4g64");
    }

    #[test]
    fn version_1_zero_points_wrap() {
        // Stored 15 is the zero point (15 + 1) mod 16 = 0.
        let words = [0xffff_ffffu32; 1].map(u32::to_le_bytes);
        let (name, dtype, shape) = ("qzeros", RawType::I32, &[1usize, 1][..]);
        let raw = RawTensor { name, dtype, shape, bytes: words.as_flattened() };
        let settings = |version| Settings { bits: 4, group: None, version };
        let zeros = |version| zero_points(&settings(version), [1, 8], &(0..8), &raw).unwrap();
        assert_eq!(zeros(Version::V1), [0; 8]);
        assert_eq!(zeros(Version::V2), [15; 8]);
    }

    #[test]
    fn widths_and_ragged_words_are_refused() {
        let refused = |bits, shape| {
            let settings = Settings { bits, group: Some(32), version: Version::V1 };
            format(&settings, shape, false).unwrap_err().to_string()
        };
        assert_eq!(refused(5, [32, 32]), "bits: expected 2, 3, 4 or 8, found 5");
        assert_eq!(
            refused(3, [32, 48]),
            "weight shape: expected multiples of 32 at 3 bits, found 32 rows of 48"
        );
    }
}
