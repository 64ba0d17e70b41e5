//! Linears on matrix registers, emulated and real, bit for bit like the generic kernel.

use super::super::grouped::Activations;
use super::super::isa::{Isa, Machine};
use super::super::packed::Packed;
use super::super::pages::Arena;
use super::super::quantize::{BlockScale, Quantize};
use super::super::share::{MatMut, Shared};
use super::super::testing::{EmulatedUnit, GroupedSpec, machines};
use super::*;
use crate::program::Rounding;
use proptest::prelude::*;
use testkit::Rng;

/// One linear to multiply.
#[derive(Debug, Clone, Copy)]
struct Case<'a> {
    packed: &'a Packed,
    bias: Option<&'a [f32]>,
    x_mk: &'a [f32],
}

impl Case<'_> {
    fn rows(&self) -> usize {
        self.x_mk.len() / self.packed.k
    }

    /// All columns, the tiles dealt to `parts` threads; what is no row of activations is garbage.
    fn run(
        &self,
        machine: Machine,
        layout: QuadLayout,
        parts: usize,
        work: impl Fn(GroupedLinear<'_>),
    ) -> Vec<f32> {
        let (n, rows, blocks) = (self.packed.n, self.rows(), &self.packed.blocks);
        let (per_block, stored) = (blocks.block / 4, layout.rows(rows) * blocks.count);
        let garbage = BlockScale { scale: f32::NAN, sum: -77 };
        let arena = Arena::default();
        let mut quads = Shared::<i32>::new(&arena, stored * per_block).unwrap();
        let mut scales = Shared::<BlockScale>::new(&arena, stored).unwrap();
        quads.all_mut().fill(0x5a7f_80a5);
        scales.all_mut().fill(garbage);
        for (row, x) in self.x_mk.chunks(self.packed.k).enumerate() {
            let (quads, scales) = (quads.all_mut(), scales.all_mut());
            let place = |width| layout.row(row, blocks.count, width);
            let to = (MatMut::at(quads, place(per_block)), MatMut::at(scales, place(1)));
            let items = 0..blocks.count;
            machine.run(Quantize { x, blocks, items, quads: to.0, scales: to.1 });
        }
        let x = Activations { quads: quads.all_mut(), scales: scales.all_mut(), layout };
        let mut y_mn = vec![f32::NAN; rows * n];
        for part in 0..parts {
            let tiles =
                self.packed.tiles() * part / parts..self.packed.tiles() * (part + 1) / parts;
            let out = MatMut::columns(&mut y_mn, n, tiles.start * LANES..n.min(tiles.end * LANES));
            work(GroupedLinear { weight: self.packed, bias: self.bias, x, tiles, out, streams: 1 });
        }
        y_mn
    }

    /// By the generic kernel.
    fn expected(&self) -> Vec<f32> {
        let machine = Machine::Scalar;
        self.run(machine, QuadLayout { height: 1 }, 1, |linear| machine.run(linear))
    }

    /// With emulated registers, scaled by the vector instructions of `machine`.
    fn emulated(&self, machine: Machine, height: usize, parts: usize) -> Vec<f32> {
        let (layout, unit) = (QuadLayout { height }, EmulatedUnit);
        self.run(machine, layout, parts, |linear| {
            machine.run(MatrixLinear { linear, unit });
        })
    }
}

/// The instruction sets with a matrix unit and the emulated one; says so if there is no real one.
fn matrix_machines() -> Vec<Machine> {
    let mut found: Vec<_> =
        machines().into_iter().filter(|machine| machine.isa() == Isa::Amx).collect();
    found.push(Machine::EmulatedAmx(EmulatedUnit));
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_row_is_the_same_bits_as_without_a_matrix_unit(
        spec in GroupedSpec::any(), rows in 1usize..=70, taller: bool, parts in 1usize..4, biased: bool
    ) {
        let packed = spec.packed();
        let mut rng = Rng::new(spec.seed ^ 3);
        let (x, bias) = (rng.floats(rows * spec.k, 2.0), rng.floats(spec.n, 1.0));
        let case = Case { packed: &packed, bias: biased.then_some(&bias[..]), x_mk: &x };
        let expected = case.expected();
        let height = if taller { 3 * STRIP_ROWS } else { STRIP_ROWS };
        for machine in machines() {
            prop_assert_eq!(&case.emulated(machine, height, parts), &expected);
        }
        for machine in matrix_machines() {
            let layout = machine.quad_layout(rows, &packed.blocks);
            let found = case.run(machine, layout, parts, |linear| machine.multiply(linear));
            prop_assert_eq!(&found, &expected);
        }
    }
}

#[test]
fn large_codes_zeros_and_activations_stay_exact() {
    let roundings = [Rounding::Fine, Rounding::Coarse];
    for (bits, rounding) in
        [Bits::Four, Bits::Eight].into_iter().flat_map(|b| roundings.map(|r| (b, r)))
    {
        let shape = quant::GroupedShape { n: 40, k: 256, group: 128, bits };
        let most = bits.max_code();
        for zero in [0, most] {
            let codes = vec![if zero == 0 { 255 } else { 0 }; 40 * bits.row_bytes(256)];
            let (scales, zeros) = (vec![0.5; 80], vec![zero; 80]);
            let parts = quant::GroupedParts { shape, codes, scales, zeros, perm: None };
            let packed = Packed::rounded(&quant::Grouped::new("extreme", parts).unwrap(), rounding);
            let x: Vec<f32> = (0..65 * 256).map(|i| [127.0, -127.0][i / 256 % 2]).collect();
            let case = Case { packed: &packed, bias: None, x_mk: &x };
            let row = 256.0 * 127.0 * 0.5 * f32::from(most) * if zero == 0 { 1.0 } else { -1.0 };
            let exact =
                |y: &[f32]| y.iter().enumerate().all(|(i, y)| *y == [row, -row][i / 40 % 2]);
            for machine in machines() {
                assert!(exact(&case.emulated(machine, STRIP_ROWS, 1)));
            }
            for machine in matrix_machines() {
                let layout = machine.quad_layout(65, &packed.blocks);
                assert!(exact(&case.run(machine, layout, 1, |linear| machine.multiply(linear))));
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_shows_and_stays_alone() {
    let packed = GroupedSpec::default().packed();
    let mut x = Rng::new(4).floats(20 * packed.k, 1.0);
    x[17 * packed.k + 5] = f32::NAN;
    let case = Case { packed: &packed, bias: None, x_mk: &x };
    let y = case.emulated(Machine::Scalar, STRIP_ROWS, 1);
    assert!(y.chunks(32).enumerate().all(|(row, y)| y.iter().all(|y| y.is_nan() == (row == 17))));
}

#[test]
fn row_blocks_fit_the_caches_and_the_memory() {
    for (k, rows, height) in [
        (4096, 5, 5),
        (4096, 16, 16),
        (4096, 33, 48),
        (4096, 512, 128),
        (11008, 512, 80),
        (28672, 512, 32),
        (65536, 512, 16),
        (128, 1000, 128),
    ] {
        let blocks = Blocks::new(k, 128, None, Rounding::Fine);
        assert_eq!(layout(rows, &blocks).height, height, "k {k}, {rows} rows");
    }
    let blocks = Blocks::new(8192, 128, None, Rounding::Fine);
    for most in 1..300 {
        let room = padded_rows(most, &blocks);
        let fits = |rows| {
            let mut layouts: Vec<_> =
                [4, TOGETHER].map(|most| QuadLayout::together(rows, most)).to_vec();
            layouts.extend((rows >= FEWEST_ROWS).then(|| layout(rows, &blocks)));
            layouts.iter().all(|layout| room >= layout.rows(rows))
        };
        assert!((1..=most).all(fits), "{most}");
    }
}

#[test]
fn one_row_does_without_the_matrix_unit() {
    for k in [256, 2048] {
        let blocks = Blocks::new(k, 128, None, Rounding::Fine);
        for machine in matrix_machines() {
            assert_eq!(machine.quad_layout(1, &blocks).height, 1);
            assert_eq!(machine.quad_layout(2, &blocks).height, 2);
        }
        assert_eq!(Machine::Scalar.quad_layout(100, &blocks), QuadLayout { height: 4 });
    }
}

#[test]
fn few_rows_are_the_same_bits() {
    // Rounds of four tiles and of fewer; blocks enough to be asked for within a tile, and too few.
    let kinds = [(Bits::Four, true), (Bits::Eight, true), (Bits::Eight, false)];
    let cases = kinds.iter().flat_map(|&kind| [(kind, 168, 128), (kind, 40, 1152)]);
    let roundings = [Rounding::Fine, Rounding::Coarse];
    for (((bits, zeros), n, k), rounding) in cases.flat_map(|case| roundings.map(|r| (case, r))) {
        let spec = GroupedSpec { n, k, group: 128, bits, zeros, rounding, ..Default::default() };
        let packed = spec.packed();
        for rows in 2..=17 {
            let x = Rng::new(rows as u64).floats(rows * spec.k, 2.0);
            let case = Case { packed: &packed, bias: None, x_mk: &x };
            for machine in matrix_machines() {
                let layout = machine.quad_layout(rows, &packed.blocks);
                let found = case.run(machine, layout, 2, |linear| machine.multiply(linear));
                assert_eq!(found, case.expected(), "{rows} rows, {machine:?}");
            }
        }
    }
}
