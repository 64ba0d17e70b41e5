//! Tensors and settings no quantizer writes: each gives a named error, nothing panics.
//!
//! Not here: valid input, which the importers' own tests cover.

use super::packing::{self, Matrix, Owned};
use super::{RawTensor, RawType, awq, compressed, gptq};
use crate::{Error, Grouped};
use proptest::prelude::*;
use testkit::Rng;

const GPTQ: gptq::Settings =
    gptq::Settings { bits: 4, group: Some(32), version: gptq::Version::V1 };
const AWQ: awq::Settings = awq::Settings { bits: 4, group: Some(32) };
const COMPRESSED: compressed::Settings =
    compressed::Settings { bits: 4, group: Some(32), symmetric: false };
const SHAPE: [usize; 2] = [16, 64];

fn matrix() -> Matrix {
    Matrix::random(&mut Rng::new(3), SHAPE, 4, Some(32))
}

fn import_gptq(tensors: &[Owned; 4], shape: [usize; 2]) -> Result<Grouped, Error> {
    let [qweight, qzeros, scales, g_idx] = tensors.each_ref().map(|t| t.raw());
    let tensors = gptq::Tensors { qweight, qzeros, scales, g_idx: Some(g_idx) };
    gptq::import(&GPTQ, shape, 0..shape[0], &tensors)
}

fn import_awq(tensors: &[Owned; 3], shape: [usize; 2]) -> Result<Grouped, Error> {
    let [qweight, qzeros, scales] = tensors.each_ref().map(|t| t.raw());
    awq::import(&AWQ, shape, 0..shape[0], &awq::Tensors { qweight, qzeros: Some(qzeros), scales })
}

fn import_compressed(tensors: &[Owned; 5], shape: [usize; 2]) -> Result<Grouped, Error> {
    let [packed, scale, zero_point, g_idx, declared] = tensors.each_ref().map(|t| Some(t.raw()));
    let (packed, scale) = (packed.unwrap(), scale.unwrap());
    let tensors = compressed::Tensors { packed, scale, zero_point, g_idx, shape: declared };
    compressed::import(&COMPRESSED, shape, 0..shape[0], &tensors)
}

/// The message for GPTQ tensors after `damage`.
fn gptq_error(damage: impl Fn(&mut [Owned; 4])) -> String {
    let mut tensors = packing::gptq(&matrix(), 1, RawType::F16);
    import_gptq(&tensors, SHAPE).unwrap();
    damage(&mut tensors);
    import_gptq(&tensors, SHAPE).unwrap_err().to_string()
}

fn awq_error(damage: impl Fn(&mut [Owned; 3])) -> String {
    let mut tensors = packing::awq(&matrix(), RawType::F16);
    import_awq(&tensors, SHAPE).unwrap();
    damage(&mut tensors);
    import_awq(&tensors, SHAPE).unwrap_err().to_string()
}

fn compressed_error(damage: impl Fn(&mut [Owned; 5])) -> String {
    let mut tensors = packing::compressed(&matrix(), RawType::F16);
    import_compressed(&tensors, SHAPE).unwrap();
    damage(&mut tensors);
    import_compressed(&tensors, SHAPE).unwrap_err().to_string()
}

#[test]
fn wrong_types_are_named() {
    assert_eq!(
        gptq_error(|t| t[0].dtype = RawType::F16),
        "tensor m.qweight: expected type i32, found f16"
    );
    assert_eq!(
        gptq_error(|t| t[3].dtype = RawType::F32),
        "tensor m.g_idx: expected type i32 or i64, found f32"
    );
    assert_eq!(
        awq_error(|t| t[2].dtype = RawType::Other),
        "tensor m.scales: expected type f32, f16 or bf16, found another type"
    );
    assert_eq!(
        compressed_error(|t| t[2].dtype = RawType::Other),
        "tensor m.weight_zero_point: expected type i32, found another type"
    );
}

#[test]
fn wrong_shapes_are_named() {
    assert_eq!(
        gptq_error(|t| t[0].shape = vec![16, 8]),
        "tensor m.qweight: expected shape [8, 16], found [16, 8]"
    );
    assert_eq!(
        gptq_error(|t| t[1].shape = vec![4]),
        "tensor m.qzeros: expected shape [2, 2], found [4]"
    );
    assert_eq!(
        awq_error(|t| t[2].shape = vec![2, 16, 1]),
        "tensor m.scales: expected shape [2, 16], found [2, 16, 1]"
    );
    assert_eq!(
        compressed_error(|t| t[3].shape = vec![]),
        "tensor m.weight_g_idx: expected shape [64], found []"
    );
}

#[test]
fn wrong_lengths_are_named() {
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 1);
    assert_eq!(
        gptq_error(|t| cut(&mut t[0].bytes)),
        "tensor m.qweight: expected 512 bytes, found 511"
    );
    assert_eq!(awq_error(|t| t[1].bytes.clear()), "tensor m.qzeros: expected 16 bytes, found 0");
    assert_eq!(
        compressed_error(|t| t[1].bytes.push(0)),
        "tensor m.weight_scale: expected 64 bytes, found 65"
    );
    assert_eq!(
        compressed_error(|t| cut(&mut t[4].bytes)),
        "tensor m.weight_shape: expected 16 bytes, found 15"
    );
}

#[test]
fn scales_that_are_not_finite_are_named() {
    let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
    assert_eq!(
        gptq_error(|t| t[2].bytes[6..8].copy_from_slice(&half(f32::NAN))),
        "tensor m.scales: scale at index 3 is NaN, expected a finite number"
    );
    assert_eq!(
        compressed_error(|t| t[1].bytes[..2].copy_from_slice(&half(f32::NEG_INFINITY))),
        "tensor m.weight_scale: scale at index 0 is -inf, expected a finite number"
    );
}

#[test]
fn group_indices_are_checked() {
    let set = |t: &mut Owned, at: usize, group: i32| {
        t.bytes[at * 4..][..4].copy_from_slice(&group.to_le_bytes());
    };
    assert_eq!(
        gptq_error(|t| set(&mut t[3], 5, 2)),
        "tensor m.g_idx: group index at index 5 is 2, expected a group in 0..2"
    );
    assert_eq!(
        gptq_error(|t| set(&mut t[3], 0, -1)),
        "tensor m.g_idx: group index at index 0 is -1, expected a group in 0..2"
    );
    assert_eq!(
        compressed_error(|t| set(&mut t[3], 0, 1)),
        "tensor m.weight_g_idx: number of columns of the group at index 0 is 31, expected 32"
    );
}

#[test]
fn declared_shapes_are_checked() {
    let swapped = |t: &mut [Owned; 5]| t[4] = Owned::longs("m.weight_shape", &[64, 16]);
    assert_eq!(
        compressed_error(swapped),
        "tensor m.weight_shape: dimension at index 0 is 64, expected 16"
    );
    let negative = |t: &mut [Owned; 5]| t[4] = Owned::longs("m.weight_shape", &[16, -64]);
    assert_eq!(
        compressed_error(negative),
        "tensor m.weight_shape: dimension at index 1 is -64, expected 64"
    );
}

#[test]
fn asymmetric_needs_zero_points() {
    let tensors = packing::compressed(&matrix(), RawType::F16);
    let [packed, scale, ..] = tensors.each_ref().map(|t| t.raw());
    let tensors = compressed::Tensors { packed, scale, zero_point: None, g_idx: None, shape: None };
    let err = compressed::import(&COMPRESSED, SHAPE, 0..SHAPE[0], &tensors).unwrap_err();
    assert_eq!(
        err.to_string(),
        "tensor weight_zero_point of m.weight_packed is missing: \
         the configuration says the weights are asymmetric"
    );
}

#[test]
fn absurd_shapes_are_refused_before_any_arithmetic() {
    let huge = usize::MAX - usize::MAX % 64;
    for shape in [[0, 64], [16, 0], [0, 0], [huge, 64], [16, huge], [huge, huge], [1 << 31, 64]] {
        assert!(gptq::format(&GPTQ, shape, true).is_err(), "{shape:?}");
        assert!(awq::format(&AWQ, shape, false).is_err(), "{shape:?}");
        assert!(compressed::format(&COMPRESSED, shape, true).is_err(), "{shape:?}");
    }
    // Allowed by the format alone, refused because no tensor is that large.
    let large = [1 << 30, 1 << 30];
    let gptq = packing::gptq(&matrix(), 1, RawType::F16);
    assert!(matches!(import_gptq(&gptq, large), Err(Error::Shape { .. })));
    let mut lying = gptq;
    lying[0].shape = vec![1 << 27, 1 << 30];
    assert!(matches!(import_gptq(&lying, large), Err(Error::Bytes { .. })));
}

#[test]
fn absurd_settings_are_refused() {
    for group in [Some(0), Some(1), Some(7), Some(12), Some(usize::MAX - 1)] {
        let settings = gptq::Settings { group, ..GPTQ };
        let found = gptq::format(&settings, SHAPE, false);
        // A group wider than the row is the row.
        assert_eq!(found.is_ok(), group > Some(64), "{group:?}: {found:?}");
    }
    for bits in [0, 1, 5, 6, 7, 9, 16, 32, 255] {
        assert!(gptq::format(&gptq::Settings { bits, ..GPTQ }, SHAPE, false).is_err());
        assert!(awq::format(&awq::Settings { bits, ..AWQ }, SHAPE, false).is_err());
        let settings = compressed::Settings { bits, ..COMPRESSED };
        assert!(compressed::format(&settings, SHAPE, false).is_err());
    }
}

/// Any tensor: often one that fits its own shape, sometimes not even that.
fn any_tensor() -> impl Strategy<Value = Owned> {
    let types = [RawType::F32, RawType::F16, RawType::Bf16, RawType::I32, RawType::I64];
    let shape = prop::collection::vec(0usize..20, 0..3);
    (prop::sample::select(types.to_vec()), shape, any::<u64>(), 0usize..8).prop_map(
        |(dtype, shape, seed, damage)| {
            let size = match dtype {
                RawType::F16 | RawType::Bf16 => 2,
                RawType::I64 => 8,
                _ => 4,
            };
            let len = shape.iter().product::<usize>() * size + usize::from(damage == 0);
            let bytes = Rng::new(seed).bytes(len);
            Owned { name: "t".to_owned(), dtype, shape, bytes }
        },
    )
}

/// Shapes near those the tensors above have, and far from them.
fn any_shape() -> impl Strategy<Value = [usize; 2]> {
    let side = prop_oneof![0usize..40, any::<usize>(), Just(8usize), Just(16), Just(32)];
    [side.clone(), side]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn garbage_never_panics(
        tensors in prop::collection::vec(any_tensor(), 5),
        shape in any_shape(),
        bits in prop::sample::select(vec![2u8, 3, 4, 8, 0, 9]),
        group in prop::option::of(prop_oneof![0usize..70, any::<usize>()]),
        (some, v1) in any::<([bool; 3], bool)>(),
    ) {
        let raw: Vec<RawTensor<'_>> = tensors.iter().map(Owned::raw).collect();
        let [a, b, c, d, e] = raw[..] else { unreachable!() };
        let maybe = |i: usize, tensor| some[i].then_some(tensor);
        let version = if v1 { gptq::Version::V1 } else { gptq::Version::V2 };
        let t = gptq::Tensors { qweight: a, qzeros: b, scales: c, g_idx: maybe(0, d) };
        let _ = gptq::import(&gptq::Settings { bits, group, version }, shape, 0..shape[0], &t);
        let t = awq::Tensors { qweight: a, qzeros: maybe(0, b), scales: c };
        let _ = awq::import(&awq::Settings { bits, group }, shape, 0..shape[0], &t);
        let (zero_point, g_idx, declared) = (maybe(0, c), maybe(1, d), maybe(2, e));
        let t = compressed::Tensors { packed: a, scale: b, zero_point, g_idx, shape: declared };
        let _ = compressed::import(&compressed::Settings { bits, group, symmetric: v1 }, shape, 0..shape[0], &t);
    }

    /// One thing wrong with one tensor: refused, or imported where it is only another value.
    #[test]
    fn damaged_tensors_never_panic(
        (which, how, at) in (0usize..5, 0usize..5, any::<usize>()),
        value in any::<u8>(),
    ) {
        let damage = |t: &mut Owned| match how {
            0 => t.dtype = RawType::I64,
            1 => t.bytes.truncate(at % t.bytes.len()),
            2 => t.shape.push(1),
            3 => t.shape[0] = at,
            _ => {
                let at = at % t.bytes.len();
                t.bytes[at] = value;
            }
        };
        let m = matrix();
        let mut gptq = packing::gptq(&m, 1, RawType::F32);
        damage(&mut gptq[which % 4]);
        let mut awq = packing::awq(&m, RawType::F32);
        damage(&mut awq[which % 3]);
        let mut compressed = packing::compressed(&m, RawType::F32);
        damage(&mut compressed[which]);
        let found = [
            import_gptq(&gptq, SHAPE),
            import_awq(&awq, SHAPE),
            import_compressed(&compressed, SHAPE),
        ];
        for result in found.into_iter().filter(|_| how < 3) {
            // The declared shape is i64 already.
            prop_assert!(result.is_err() || (which, how) == (4, 0));
        }
    }
}
