//! Float matrices to codes: symmetric rounding to nearest, one scale a row and group.
//!
//! ```text
//! scale = max|w| of the group / (zero - 1), up to the next f16     code = zero + round(w / scale)
//! zero  = 8 for four bits, 128 for eight
//! ```
//! Not here: quantizers that look at data. Input: a float matrix of a checkpoint, such as a head.

use crate::grouped::check_shape;
use crate::{Bits, Dense, Error, Grouped, GroupedParts, GroupedShape};
use half::f16;

/// Columns of a group wherever they divide the width.
const GROUP: usize = 128;

/// Adding it to a float of magnitude below 2^22 leaves the nearest integer (ties to even) in the
/// low bits; unlike `round`, that is one instruction on every machine.
const ROUNDER: f32 = 12_582_912.0;

/// Columns of a group for a matrix of width `k`: the most, up to 128, that divide it; the whole
/// row where fewer than 32 would be the most, since short groups cost more than they gain.
pub fn group(k: usize) -> usize {
    (32..=GROUP).rev().find(|group| k.is_multiple_of(*group)).unwrap_or(k)
}

/// Quantizes the `[n, k]` matrix called `tensor` in groups of `group` columns.
///
/// Each weight moves by at most half its group's scale, and a matrix made by this function is
/// reproduced exactly. Scales are f16 values, unless a weight beyond 458 thousand (four bits) or
/// 8.3 million (eight) needs a larger one.
///
/// # Errors
/// [`Error::Value`] for a weight that is not finite, [`Error::Shape`] where `group` does not
/// divide `k`.
pub fn round_to_nearest(
    tensor: &str,
    w: &Dense<'_>,
    bits: Bits,
    group: usize,
) -> Result<Grouped, Error> {
    let [n, k] = w.shape();
    let shape = GroupedShape { n, k, group, bits };
    check_shape(tensor, &shape)?;
    let zero = bits.max_code() / 2 + 1;
    let mut codes = Vec::with_capacity(n * bits.row_bytes(k));
    let mut scales = Vec::with_capacity(n * shape.groups());
    let (mut row_k, mut codes_k) = (vec![0.0; k], vec![0; k]);
    for row in 0..n {
        w.row(row, &mut row_k);
        for (x, codes) in row_k.chunks_exact(group).zip(codes_k.chunks_exact_mut(group)) {
            let max = magnitude(x);
            if !max.is_finite() {
                return Err(not_finite(tensor, row * k, &row_k));
            }
            let scale = scale(max / f32::from(zero - 1));
            round(x, scale, zero, codes);
            scales.push(scale);
        }
        match bits {
            Bits::Eight => codes.extend_from_slice(&codes_k),
            Bits::Four => codes.extend(codes_k.as_chunks().0.iter().map(|[a, b]| a | b << 4)),
        }
    }
    let zeros = vec![zero; scales.len()];
    Grouped::new(tensor, GroupedParts { shape, codes, scales, zeros, perm: None })
}

/// The greatest magnitude; NaN if there is one.
fn magnitude(x: &[f32]) -> f32 {
    // The bits of magnitudes are ordered as the magnitudes are, NaN last.
    let bits = x.iter().map(|x| (x.to_bits() & 0x7fff_ffff).cast_signed());
    f32::from_bits(bits.fold(0, i32::max).cast_unsigned())
}

/// The least f16 not below `exact`, or `exact` itself beyond them: no code is then clipped.
fn scale(exact: f32) -> f32 {
    let near = f16::from_f32(exact);
    let below = near.to_f32() < exact;
    let up = f16::from_bits(near.to_bits() + u16::from(below));
    if up.is_finite() { up.to_f32() } else { exact }
}

/// Codes of one group, one a byte.
fn round(x: &[f32], scale: f32, zero: u8, codes: &mut [u8]) {
    let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
    for (x, code) in x.iter().zip(codes) {
        *code = ((x * inverse + ROUNDER).to_bits() as u8).wrapping_add(zero);
    }
}

fn not_finite(tensor: &str, start: usize, row_k: &[f32]) -> Error {
    let column = row_k.iter().position(|x| !x.is_finite()).unwrap_or(0);
    Error::Value {
        tensor: tensor.to_owned(),
        what: "weight",
        index: start + column,
        found: row_k[column].to_string(),
        expected: "a finite number, which alone can be quantized".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::dequantize_row;
    use proptest::prelude::*;
    use testkit::Rng;

    fn both(w: &[f32], [n, k]: [usize; 2], group: usize) -> [Grouped; 2] {
        let dense = Dense::from_f32([n, k], w);
        [Bits::Four, Bits::Eight].map(|b| round_to_nearest("w", &dense, b, group).unwrap())
    }

    proptest! {
        #[test]
        fn weights_move_by_half_a_scale_at_most(
            (n, groups, group) in (1..4usize, 1..4usize, 1..70usize),
            exponent in -30..24i32,
            seed: u64,
        ) {
            let (group, k) = (2 * group, 2 * group * groups);
            let w = Rng::new(seed).floats(n * k, 2f32.powi(exponent));
            for q in both(&w, [n, k], group) {
                let zero = q.zeros()[0];
                for (row, w_k) in w.chunks_exact(k).enumerate() {
                    for (j, (found, w)) in dequantize_row(&q, row).iter().zip(w_k).enumerate() {
                        let scale = q.scales()[row * groups + j / group];
                        // Half a step, and the f32 rounding of w / scale and of code * scale:
                        // three of 2^-24 of a magnitude of up to `zero` steps.
                        let allowed = scale * (0.5 + f32::from(zero) * 3.0 * 2f32.powi(-24));
                        prop_assert!((found - w).abs() <= allowed, "{w} {found} {scale}");
                    }
                }
            }
        }

        #[test]
        fn its_own_matrices_return_exactly(
            (bits, groups, group) in (0..2usize, 1..4usize, 1..70usize),
            scale_bits in 1..0x7c00u16,
            seed: u64,
        ) {
            let (group, k) = (2 * group, 2 * group * groups);
            let most = [7i16, 127][bits];
            let mut rng = Rng::new(seed);
            let mut steps: Vec<i16> = (0..k).map(|_| {
                rng.below(2 * most as usize + 1) as i16 - most
            }).collect();
            // The group's scale is found again where its greatest weight is `most` steps.
            steps.iter_mut().step_by(group).for_each(|s| *s = -most);
            let scale = f16::from_bits(scale_bits).to_f32();
            let w: Vec<f32> = steps.iter().map(|s| f32::from(*s) * scale).collect();
            let q = &both(&w, [1, k], group)[bits];
            prop_assert_eq!(dequantize_row(q, 0), w);
            prop_assert!(q.scales().iter().all(|s| *s == scale));
        }
    }

    #[test]
    fn codes_lie_where_the_layout_says() {
        let w = [7.0, -7.0, 3.4, -0.6, 0.0, 0.0, 0.0, 0.0];
        let [four, eight] = both(&w, [2, 4], 4);
        assert_eq!(four.codes(), [0x1f, 0x7b, 0x88, 0x88]);
        assert_eq!(four.scales(), [1.0, 0.0]);
        assert_eq!(eight.codes()[..2], [255, 1]);
        assert_eq!(eight.codes()[4..], [128; 4]);
        assert_eq!(eight.zeros(), [128; 2]);
    }

    #[test]
    fn scales_are_f16_where_one_is_large_enough() {
        for exact in [0.0, 1e-9, 6e-8, 3.1e-5, 0.01, 1.0, 65504.0] {
            let scale = scale(exact);
            assert_eq!(f16::from_f32(scale).to_f32(), scale);
            assert!(scale >= exact && scale <= exact * 1.001 + 6e-8, "{exact}: {scale}");
        }
        assert_eq!(scale(65505.0), 65505.0);
        assert_eq!(scale(1e30), 1e30);
    }

    #[test]
    fn groups_divide_the_width() {
        let found = [2048, 4096, 192, 200, 96, 8, 134, 131].map(group);
        assert_eq!(found, [128, 128, 96, 100, 96, 8, 67, 131]);
    }

    #[test]
    fn what_has_no_code_is_named() {
        let w = Dense::from_f32([2, 4], &[0.0, 0.0, 0.0, 0.0, 0.0, f32::NEG_INFINITY, 0.0, 0.0]);
        let refused = round_to_nearest("lm_head.weight", &w, Bits::Eight, 4).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "tensor lm_head.weight: weight at index 5 is -inf, expected a finite number, which \
             alone can be quantized"
        );
        for group in [0, 3] {
            let refused =
                round_to_nearest("w", &Dense::from_f32([1, 4], &[0.0; 4]), Bits::Four, group);
            assert!(refused.is_err(), "{group}");
        }
        let odd = round_to_nearest("w", &Dense::from_f32([1, 3], &[0.0; 3]), Bits::Four, 3);
        assert!(odd.is_err());
    }
}
