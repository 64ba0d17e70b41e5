//! Random weights, the list of instruction sets and matrix registers in plain Rust for this
//! module's tests.

use super::isa::{Isa, Machine};
use super::matmul::{Dots, MatrixRegisters, MatrixUnit, PRODUCT_ROWS, Panel, Steps, TILE_ROWS};
use super::simd::LANES;
use proptest::prelude::*;
use quant::{Bits, Grouped, GroupedParts, GroupedShape};
use testkit::Rng;

/// What a random quantized matrix is to look like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupedSpec {
    pub(crate) seed: u64,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) group: usize,
    pub(crate) bits: Bits,
    pub(crate) act_order: bool,
    /// Zero points differ.
    pub(crate) zeros: bool,
    /// Every scale is an f16.
    pub(crate) f16_scales: bool,
}

impl Default for GroupedSpec {
    fn default() -> Self {
        Self {
            seed: 1,
            n: 32,
            k: 128,
            group: 64,
            bits: Bits::Four,
            act_order: false,
            zeros: false,
            f16_scales: false,
        }
    }
}

impl GroupedSpec {
    /// Small shapes of every kind: odd n, groups from 2 to 300, padding, permutations.
    pub(crate) fn any() -> impl Strategy<Value = Self> {
        let group = prop_oneof![
            Just(8usize),
            Just(32),
            Just(64),
            Just(128),
            (1usize..40).prop_map(|g| 2 * g),
            Just(256),
            Just(300)
        ];
        let flags = any::<[bool; 4]>();
        (any::<u64>(), 1usize..40, 1usize..5, group, flags).prop_map(
            |(seed, n, groups, group, f)| {
                let bits = if f[0] { Bits::Four } else { Bits::Eight };
                let [_, act_order, zeros, f16_scales] = f;
                Self { seed, n, k: groups * group, group, bits, act_order, zeros, f16_scales }
            },
        )
    }
}

/// A matrix of this kind.
pub(crate) fn random_grouped(spec: &GroupedSpec) -> Grouped {
    let GroupedSpec { seed, n, k, group, bits, .. } = *spec;
    let (mut rng, shape) = (Rng::new(seed), GroupedShape { n, k, group, bits });
    let max = bits.max_code();
    let groups = n * shape.groups();
    let scale = |x: f32| {
        let x = 0.02 + 0.01 * x;
        if spec.f16_scales { half::f16::from_f32(x).to_f32() } else { x }
    };
    let parts = GroupedParts {
        shape,
        codes: rng.bytes(n * bits.row_bytes(k)),
        scales: rng.floats(groups, 1.0).into_iter().map(scale).collect(),
        zeros: match spec.zeros {
            false => vec![max / 2 + 1; groups],
            true => rng.bytes(groups).into_iter().map(|b| b & max).collect(),
        },
        perm: spec.act_order.then(|| rng.permutation(k)),
    };
    Grouped::new("random", parts).unwrap()
}

/// Every instruction set this processor has; says which ones it skips.
pub(crate) fn machines() -> Vec<Machine> {
    let mut found = vec![];
    for isa in Isa::ALL {
        match isa.detect() {
            Ok(machine) => found.push(machine),
            Err(_) => {
                eprintln!("skipped {isa}: this processor has no {}", isa.missing().join(", "))
            }
        }
    }
    found
}

/// Matrix registers in plain Rust, instruction by instruction as AMX defines them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EmulatedUnit;

impl MatrixUnit for EmulatedUnit {
    type Registers = Steps;

    fn configure(self, steps: Steps) -> Steps {
        steps
    }
}

impl MatrixRegisters for Steps {
    fn product(&self, x: &[i32], panel: &Panel, dots: &mut Dots) {
        let block = self.block_quads();
        for (tile, lines) in panel.iter().enumerate() {
            for half in 0..PRODUCT_ROWS / TILE_ROWS {
                let first = half * TILE_ROWS;
                let mut sums = [[0; LANES]; TILE_ROWS];
                for step in 0..self.count {
                    let quad = step * self.quads;
                    let x: Vec<Vec<i32>> = (first..first + TILE_ROWS)
                        .map(|row| x[row * block + quad..][..self.quads].to_vec())
                        .collect();
                    let w: Vec<[u8; 64]> =
                        lines[quad..][..self.quads].iter().map(|line| line.0).collect();
                    dot_signed(&mut sums, &x, &w);
                }
                dots.0[tile][first..first + TILE_ROWS].copy_from_slice(&sums);
            }
        }
    }
}

/// What `tdpbssd` does: row m of `x` with lane n of every row of `w`, four signed bytes at a time.
fn dot_signed(sums: &mut [[i32; LANES]; TILE_ROWS], x: &[Vec<i32>], w: &[[u8; 64]]) {
    for (sums, x) in sums.iter_mut().zip(x) {
        for (quad, line) in x.iter().zip(w) {
            for (n, sum) in sums.iter_mut().enumerate() {
                for (i, a) in quad.to_le_bytes().into_iter().enumerate() {
                    *sum += i32::from(a as i8) * i32::from(line[4 * n + i] as i8);
                }
            }
        }
    }
}
