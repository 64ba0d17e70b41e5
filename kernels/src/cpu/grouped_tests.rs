//! Quantized linears against their stated error, bit for bit alike for any number of rows.

use super::super::isa::Machine;
use super::super::quantize::Quantize;
use super::super::testing::{GroupedSpec, machines, random_grouped};
use super::*;
use crate::program::Rounding;
use proptest::prelude::*;
use quant::{Grouped, Weight};
use testkit::Rng;

/// All rows of `x` times the weight, the tiles dealt to `parts` threads.
fn multiply(
    machine: Machine,
    packed: &Packed,
    bias: Option<&[f32]>,
    x_mk: &[f32],
    parts: usize,
) -> Vec<f32> {
    let (n, blocks) = (packed.n, &packed.blocks);
    let rows = x_mk.len() / packed.k;
    let layout = machine.quad_layout(rows, blocks);
    let mut quads = vec![0; layout.rows(rows) * blocks.width() / 4];
    let mut scales = vec![BlockScale::ZERO; layout.rows(rows) * blocks.count];
    for (row, x) in x_mk.chunks(packed.k).enumerate() {
        let place = |width| layout.row(row, blocks.count, width);
        let to =
            (MatMut::at(&mut quads, place(blocks.block / 4)), MatMut::at(&mut scales, place(1)));
        let items = 0..blocks.count;
        machine.run(Quantize { x, blocks, items, quads: to.0, scales: to.1 });
    }
    let x = Activations { quads: &quads, scales: &scales, layout };
    let mut y_mn = vec![f32::NAN; rows * n];
    for part in 0..parts {
        let tiles = packed.tiles() * part / parts..packed.tiles() * (part + 1) / parts;
        let columns = tiles.start * LANES..n.min(tiles.end * LANES);
        let out = MatMut::columns(&mut y_mn, n, columns);
        // One tile after another with one part, two or four side by side with more.
        let streams = [1, 2, STREAMS][parts.min(3) - 1];
        machine.multiply(GroupedLinear { weight: packed, bias, x, tiles, out, streams });
    }
    y_mn
}

/// How far each output may be off: half a step for every activation, as the module derives, and
/// f32 rounding of `blocks + 2` half ulps of the sizes added.
fn bounds(w: &Grouped, packed: &Packed, x_k: &[f32]) -> Vec<f64> {
    let (shape, blocks) = (w.shape(), &packed.blocks);
    let mut bounds = vec![0.0; shape.n];
    let columns: Vec<_> = blocks.stored_columns(shape.group).collect();
    for columns in columns.chunks(blocks.block) {
        let columns: Vec<usize> = columns.iter().flatten().copied().collect();
        let input = |&j: &usize| x_k[w.perm().map_or(j, |p| p[j] as usize)].abs();
        let most = columns.iter().map(input).fold(0.0, f32::max);
        for (row, bound) in bounds.iter_mut().enumerate() {
            let at = row * shape.groups() + columns[0] / shape.group;
            let distance =
                |&j: &usize| f64::from(i16::from(w.code(row, j)) - i16::from(w.zeros()[at])).abs();
            let sum: f64 = columns.iter().map(distance).sum();
            let scale = f64::from(w.scales()[at]).abs() * f64::from(most);
            let rounding = (blocks.count as f64 + 2.0) / f64::from(1 << 24);
            // The half step is one of 127, widened by the rounding of the factor 127 / max.
            *bound += scale * sum * (0.500_03 / 127.0 + rounding);
        }
    }
    bounds
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_row_is_the_same_bits_on_every_isa_with_any_rows_and_threads(
        spec in GroupedSpec::any(), rows in 1usize..=17, biased: bool
    ) {
        let packed = spec.packed();
        let mut rng = Rng::new(spec.seed ^ 1);
        let (x, bias) = (rng.floats(rows * spec.k, 2.0), rng.floats(spec.n, 1.0));
        let bias = biased.then_some(&bias[..]);
        let alone: Vec<f32> = x
            .chunks(spec.k)
            .flat_map(|x| multiply(Machine::Scalar, &packed, bias, x, 1))
            .collect();
        for machine in machines() {
            for parts in 1..4 {
                prop_assert_eq!(&multiply(machine, &packed, bias, &x, parts), &alone);
            }
        }
    }

    #[test]
    fn the_error_is_that_of_int8_activations(spec in GroupedSpec::any()) {
        let w = random_grouped(&spec);
        let packed = spec.packed();
        let x = Rng::new(spec.seed ^ 2).floats(spec.k, 3.0);
        let exact = quant::reference::matmul(&x, &Weight::Grouped(w.clone()));
        let found = multiply(Machine::Scalar, &packed, None, &x, 1);
        for ((found, exact), bound) in found.iter().zip(exact).zip(bounds(&w, &packed, &x)) {
            let error = (f64::from(*found) - f64::from(exact)).abs();
            prop_assert!(error <= bound + 1e-12, "{found} for {exact}, bound {bound}");
        }
    }
}

#[test]
fn every_number_of_rows_agrees_on_a_large_shape() {
    for rounding in [Rounding::Fine, Rounding::Coarse] {
        let spec = GroupedSpec {
            n: 150,
            k: 512,
            group: 128,
            zeros: true,
            rounding,
            ..GroupedSpec::default()
        };
        every_number_of_rows_agrees(&spec);
    }
}

fn every_number_of_rows_agrees(spec: &GroupedSpec) {
    let packed = spec.packed();
    let x = Rng::new(5).floats(70 * spec.k, 1.0);
    let all = multiply(Machine::Scalar, &packed, None, &x, 1);
    for machine in machines() {
        for rows in (1..=17).chain([64, 65, 70]) {
            let some = multiply(machine, &packed, None, &x[..rows * spec.k], 3);
            assert_eq!(some, all[..rows * spec.n], "{machine:?} {rows} rows");
        }
    }
}

#[test]
fn exact_where_activations_are_integers() {
    // x in -127..=127 with a 127 in every block: scale 1, nothing is rounded away.
    for bits in [Bits::Four, Bits::Eight] {
        let spec =
            GroupedSpec { k: 256, bits, zeros: true, f16_scales: true, ..Default::default() };
        let mut w = random_grouped(&spec);
        let parts = quant::GroupedParts {
            shape: w.shape(),
            codes: w.codes().to_vec(),
            scales: vec![0.5; w.scales().len()],
            zeros: w.zeros().to_vec(),
            perm: None,
        };
        w = Grouped::new("exact", parts).unwrap();
        let mut rng = Rng::new(9);
        let mut x: Vec<f32> = (0..256).map(|_| rng.below(255) as f32 - 127.0).collect();
        x.iter_mut().step_by(64).for_each(|x| *x = 127.0);
        let exact = quant::reference::matmul(&x, &Weight::Grouped(w.clone()));
        for machine in machines() {
            assert_eq!(multiply(machine, &Packed::new(&w), None, &x, 1), exact);
        }
    }
}

#[test]
fn a_row_that_is_not_finite_shows() {
    let packed = GroupedSpec::default().packed();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = vec![0.5; 2 * 128];
        x[3] = bad;
        for machine in machines() {
            let y = multiply(machine, &packed, None, &x, 1);
            assert!(y[..32].iter().all(|y| y.is_nan()) && y[32..].iter().all(|y| y.is_finite()));
        }
    }
}
