//! compressed-tensors checkpoints, format `pack-quantized`: signed codes stored with an offset.
//!
//! ```text
//! weight_packed     [n, k * bits / 32]       bit stream along k of value + 2^(bits - 1)
//! weight_scale      [n, groups]
//! weight_zero_point [n * bits / 32, groups]  bit stream down n, same offset; absent: value 0
//! weight_g_idx      [k]                      the group of each column; all -1: not used
//! weight_shape      [2]                      n and k
//! ```
//! The offset cancels in `code - zero`, so both are kept as stored.
//!
//! Not here: the other formats of compressed-tensors. Input: untrusted settings and tensors.

use super::RawTensor;
use super::layout::{Layout, Unpacked, setting};
use super::packed::{crop_rows, word_count};
use crate::{Bits, Error, Format, Grouped};
use std::ops::Range;

/// What `config_groups` says of one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Code width (`num_bits`): 4 or 8.
    pub bits: u8,
    /// Columns of a group (`group_size`); none is one scale a row (strategy `channel`).
    pub group: Option<usize>,
    /// Whether zero points may be absent.
    pub symmetric: bool,
}

/// The tensors of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct Tensors<'a> {
    /// `weight_packed`: `[n, k * bits / 32]` i32.
    pub packed: RawTensor<'a>,
    /// `weight_scale`: `[n, groups]` floats.
    pub scale: RawTensor<'a>,
    /// `weight_zero_point`: `[n * bits / 32, groups]` i32.
    pub zero_point: Option<RawTensor<'a>>,
    /// `weight_g_idx`: `[k]` integers.
    pub g_idx: Option<RawTensor<'a>>,
    /// `weight_shape`: the integers n and k.
    pub shape: Option<RawTensor<'a>>,
}

/// The format an `[n, k]` matrix will have.
///
/// # Errors
/// [`Error::Setting`] for other widths and for a group size that leaves no even group of at
/// least 8 columns.
pub fn format(settings: &Settings, shape: [usize; 2], has_g_idx: bool) -> Result<Format, Error> {
    Ok(layout(settings, shape)?.format(has_g_idx))
}

/// Unpacks rows `rows` (some of the n) of an `[n, k]` matrix.
///
/// # Errors
/// Those of [`format()`], [`Error::Missing`] for an asymmetric matrix without zero points, and a
/// named one for each tensor whose type, shape, length or values do not fit.
pub fn import(
    settings: &Settings,
    [n, k]: [usize; 2],
    rows: Range<usize>,
    tensors: &Tensors<'_>,
) -> Result<Grouped, Error> {
    let layout = layout(settings, [n, k])?.rows(&rows);
    let groups = layout.groups();
    let bits = usize::from(settings.bits);
    check_shape([n, k], tensors.shape.as_ref())?;
    let words = word_count(k, bits);
    let packed = &tensors.packed.words([n, words])?[rows.start * words..rows.end * words];
    let scales = tensors.scale.floats([n, groups], [rows.clone(), 0..groups])?;
    let zeros = zero_points(settings, [n, groups], &rows, tensors)?;
    let perm = order(&layout, k, tensors.g_idx.as_ref())?;
    let codes = crop_rows(packed.as_flattened().to_vec(), words * 4, k * bits / 8);
    layout.finish(tensors.packed.name, Unpacked { codes, scales, zeros, perm })
}

fn layout(settings: &Settings, shape: [usize; 2]) -> Result<Layout, Error> {
    let bits = match settings.bits {
        4 => Bits::Four,
        8 => Bits::Eight,
        other => return Err(setting("num_bits", "4 or 8", &other)),
    };
    Layout::new(shape, bits, settings.group)
}

fn check_shape([n, k]: [usize; 2], shape: Option<&RawTensor<'_>>) -> Result<(), Error> {
    let Some(shape) = shape else { return Ok(()) };
    let found = shape.integers(2)?;
    let same = |(&a, b): (&i64, usize)| usize::try_from(a) == Ok(b);
    match found.iter().zip([n, k]).position(|pair| !same(pair)) {
        None => Ok(()),
        Some(i) => Err(shape.value("dimension", i, &found[i], [n, k][i].to_string())),
    }
}

/// Zero points `[rows, groups]`, with the offset of the codes.
fn zero_points(
    settings: &Settings,
    [n, groups]: [usize; 2],
    rows: &Range<usize>,
    tensors: &Tensors<'_>,
) -> Result<Vec<u8>, Error> {
    let bits = usize::from(settings.bits);
    let Some(packed) = &tensors.zero_point else {
        return match settings.symmetric {
            true => Ok(vec![1 << (bits - 1); rows.len() * groups]),
            false => Err(Error::Missing {
                tensor: format!("weight_zero_point of {}", tensors.packed.name),
                reason: "the configuration says the weights are asymmetric".to_owned(),
            }),
        };
    };
    let words = packed.words([word_count(n, bits), groups])?;
    let mut zeros = Vec::with_capacity(rows.len() * groups);
    for row in rows.clone() {
        let (word, shift) = (row * bits / 32, row * bits % 32);
        let zero = |word: &[u8; 4]| (u32::from_le_bytes(*word) >> shift) as u8;
        let words = &words[word * groups..][..groups];
        zeros.extend(words.iter().map(|word| zero(word) & (u8::MAX >> (8 - bits))));
    }
    Ok(zeros)
}

/// Columns sorted by group; indices that are all -1 were allocated by the tool and never set.
fn order(
    layout: &Layout,
    k: usize,
    g_idx: Option<&RawTensor<'_>>,
) -> Result<Option<Vec<u32>>, Error> {
    let Some(g_idx) = g_idx else { return Ok(None) };
    if g_idx.integers(k)?.iter().all(|&group| group == -1) {
        return Ok(None);
    }
    layout.order(g_idx)
}

#[cfg(test)]
mod tests {
    use super::super::RawType;
    use super::super::packing::{self, Matrix, Owned};
    use super::*;
    use proptest::prelude::*;
    use testkit::Rng;

    fn unpack(m: &Matrix, dtype: RawType, symmetric: bool, ordered: bool) -> Grouped {
        let owned = packing::compressed(m, dtype);
        let [packed, scale, zero_point, g_idx, shape] = owned.each_ref().map(|t| t.raw());
        let zero_point = (!symmetric).then_some(zero_point);
        let g_idx = ordered.then_some(g_idx);
        let tensors = Tensors { packed, scale, zero_point, g_idx, shape: Some(shape) };
        let settings = Settings { bits: m.bits as u8, group: m.group, symmetric };
        let all = import(&settings, [m.n, m.k], 0..m.n, &tensors).unwrap();
        let rows = m.n / 3..m.n.div_ceil(2);
        let part = import(&settings, [m.n, m.k], rows.clone(), &tensors).unwrap();
        assert_eq!(part, all.rows(rows));
        all
    }

    proptest! {
        #[test]
        fn unpacks_what_was_packed(
            bits in prop::sample::select(vec![4, 8]),
            group in prop::sample::select(vec![None, Some(8), Some(32), Some(64), Some(128)]),
            (n, columns) in (1usize..30, 4usize..50),
            (symmetric, act_order, ordered) in any::<(bool, bool, bool)>(),
            seed in any::<u64>(),
        ) {
            let mut rng = Rng::new(seed);
            let k = if group.is_none() { columns * 2 } else { columns * 8 };
            let mut m = Matrix::random(&mut rng, [n, k], bits, group.map(|g: usize| g.min(k)));
            if act_order {
                m = m.shuffle(&mut rng);
            }
            if symmetric {
                m.zeros.iter_mut().flatten().for_each(|z| *z = 1 << (bits - 1));
            }
            m.assert_is(&unpack(&m, RawType::Bf16, symmetric, ordered || act_order));
        }
    }

    #[test]
    fn group_indices_that_were_never_set_mean_no_act_order() {
        let m = Matrix::random(&mut Rng::new(2), [8, 64], 4, Some(32));
        let owned = packing::compressed(&m, RawType::F16);
        let unset = Owned::integers("m.weight_g_idx", &[-1; 64]);
        let [packed, scale, zero_point, ..] = owned.each_ref().map(|t| Some(t.raw()));
        let (packed, scale) = (packed.unwrap(), scale.unwrap());
        let tensors = Tensors { packed, scale, zero_point, g_idx: Some(unset.raw()), shape: None };
        let settings = Settings { bits: 4, group: Some(32), symmetric: false };
        m.assert_is(&import(&settings, [8, 64], 0..8, &tensors).unwrap());
    }

    #[test]
    fn other_widths_are_refused() {
        let settings = Settings { bits: 3, group: Some(32), symmetric: true };
        let err = format(&settings, [32, 32], false).unwrap_err();
        assert_eq!(err.to_string(), "num_bits: expected 4 or 8, found 3");
    }
}
