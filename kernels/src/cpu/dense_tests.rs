//! Dense linears against f64, bit for bit alike on every processor and for any number of rows.

use super::super::isa::Machine;
use super::super::testing::machines;
use super::*;
use proptest::prelude::*;
use quant::Weight;
use testkit::Rng;

fn random(seed: u64, float: FloatType, [n, k]: [usize; 2]) -> Dense<'static> {
    let values = Rng::new(seed).floats(n * k, 1.0);
    let bytes: Vec<u8> = match float {
        FloatType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        FloatType::F16 => {
            values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
        }
        FloatType::Bf16 => {
            values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
        }
    };
    Dense::new("random", float, [n, k], bytes).unwrap()
}

/// All rows of `x` times the weight, the tiles dealt to `parts` threads.
fn multiply(
    machine: Machine,
    weight: &DenseTiles,
    bias: Option<&[f32]>,
    x_mk: &[f32],
    parts: usize,
) -> Vec<f32> {
    let (n, k) = (weight.n, weight.k);
    let mut y_mn = vec![f32::NAN; x_mk.len() / k * n];
    for part in 0..parts {
        let tiles = weight.tiles() * part / parts..weight.tiles() * (part + 1) / parts;
        let columns = tiles.start * LANES..n.min(tiles.end * LANES);
        let (x, out) = (Mat::new(x_mk, k), MatMut::columns(&mut y_mn, n, columns));
        machine.run(DenseLinear { weight, bias, x, tiles, out });
    }
    y_mn
}

fn float() -> impl Strategy<Value = FloatType> {
    prop_oneof![Just(FloatType::F32), Just(FloatType::F16), Just(FloatType::Bf16)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_row_is_the_same_bits_on_every_isa_with_any_rows_and_threads(
        seed: u64,
        float in float(),
        n in 1usize..70,
        k in 1usize..200,
        rows in 1usize..=17,
        biased: bool,
    ) {
        let weight = DenseTiles::new(&random(seed, float, [n, k]));
        let mut rng = Rng::new(seed ^ 1);
        let (x, bias) = (rng.floats(rows * k, 2.0), rng.floats(n, 1.0));
        let bias = biased.then_some(&bias[..]);
        let alone: Vec<f32> =
            x.chunks(k).flat_map(|x| multiply(Machine::Scalar, &weight, bias, x, 1)).collect();
        for machine in machines() {
            for parts in 1..4 {
                prop_assert_eq!(&multiply(machine, &weight, bias, &x, parts), &alone);
            }
        }
    }

    #[test]
    fn close_to_f64_and_rows_survive(
        seed: u64, float in float(), n in 1usize..40, k in 1usize..300
    ) {
        let dense = random(seed, float, [n, k]);
        let tiles = DenseTiles::new(&dense);
        let x = Rng::new(seed ^ 2).floats(k, 1.0);
        let exact = quant::reference::matmul(&x, &Weight::Dense(dense.clone()));
        let found = multiply(Machine::Scalar, &tiles, None, &x, 1);
        let (mut row, mut expected) = (vec![0.0; k], vec![0.0; k]);
        for i in 0..n {
            dense.row(i, &mut expected);
            tiles.row(i, &mut row);
            prop_assert_eq!(&row, &expected);
            let size: f32 = row.iter().zip(&x).map(|(w, x)| (w * x).abs()).sum();
            // chains of k / 4 roundings and two more, each half an ulp of at most the size
            let bound = size * (k as f32 / 4.0 + 3.0) / (1 << 24) as f32 + 1e-30;
            prop_assert!((found[i] - exact[i]).abs() <= bound, "{} for {}", found[i], exact[i]);
        }
    }
}

#[test]
fn more_rows_than_the_cache_holds_agree() {
    let weight = DenseTiles::new(&random(3, FloatType::F16, [40, 130]));
    let x = Rng::new(4).floats(70 * 130, 1.0);
    let all = multiply(Machine::Scalar, &weight, None, &x, 1);
    for machine in machines() {
        for rows in [64, 65, 70] {
            assert_eq!(multiply(machine, &weight, None, &x[..rows * 130], 2), all[..rows * 40]);
        }
    }
}

#[test]
fn rows_of_many_parts_survive() {
    let [n, k] = [100, 4096];
    for float in [FloatType::F32, FloatType::F16] {
        assert!(Parts::new(n, k * float.bytes()).tiles * LANES * 2 < n);
        let dense = random(7, float, [n, k]);
        let tiles = DenseTiles::new(&dense);
        let (mut row, mut expected) = (vec![0.0; k], vec![0.0; k]);
        for i in 0..n {
            dense.row(i, &mut expected);
            tiles.row(i, &mut row);
            assert_eq!(row, expected, "row {i} of {float}");
        }
    }
}
