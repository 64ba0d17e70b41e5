//! Random weights and the list of instruction sets for this module's tests.

use super::isa::{Isa, Machine};
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
