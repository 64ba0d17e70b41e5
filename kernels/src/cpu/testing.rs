//! Random weights, the list of instruction sets and matrix registers in plain Rust for this
//! module's tests.

use super::few_rows::{self, Round};
use super::isa::{Isa, Machine};
use super::job::Job;
use super::matmul::{MatrixRegisters, MatrixUnit, Results, STRIP_ROWS, Scratch, Shape};
use super::packed::{Packed, Tile, TileScales, TileZeros};
use super::simd::{LANES, Line};
use crate::program::Rounding;
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
    pub(crate) rounding: Rounding,
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
            rounding: Rounding::Fine,
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
        let flags = any::<[bool; 5]>();
        (any::<u64>(), 1usize..40, 1usize..5, group, flags).prop_map(
            |(seed, n, groups, group, f)| {
                let bits = if f[0] { Bits::Four } else { Bits::Eight };
                let rounding = if f[1] { Rounding::Fine } else { Rounding::Coarse };
                let [.., act_order, zeros, f16_scales] = f;
                let k = groups * group;
                Self { seed, n, k, group, bits, act_order, zeros, f16_scales, rounding }
            },
        )
    }

    /// The matrix as kernels read it.
    pub(crate) fn packed(&self) -> Packed {
        Packed::rounded(&random_grouped(self), self.rounding)
    }

    /// The same with gates beside what belongs to them.
    pub(crate) fn paired(&self) -> Packed {
        Packed::of(&random_grouped(self), self.rounding, true)
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
    type Registers = Shape;

    fn configure(self, shape: Shape) -> Shape {
        shape
    }
}

impl MatrixRegisters for Shape {
    fn few_rows(
        &self,
        job: &Job<'_>,
        scratch: &mut few_rows::Scratch,
        mut done: impl FnMut(Round, &mut [[f32; LANES]]),
    ) {
        let sums = &mut scratch.sums;
        let mut round = job.first(job.tiles.start);
        while round.tiles > 0 {
            let (asked, depth) = job.ahead(round);
            let beyond = job.line((asked + round.tiles - 1, depth + 1));
            assert!(beyond <= job.line((job.tiles.end, 0)), "asked beyond the last tile");
            for (t, sums) in sums.chunks_mut(job.rows).enumerate().take(job.complete(round)) {
                add_block(job, (round.tile + t, round.block), 0, sums);
            }
            if job.is_last(round) {
                done(round, sums);
            }
            round = job.after(round);
        }
    }

    fn many_rows(
        &self,
        job: &Job<'_>,
        rows: usize,
        scratch: &mut Scratch,
        results: &mut impl Results,
    ) {
        let rows = rows.next_multiple_of(self.rows);
        for tile in job.tiles.clone().step_by(2) {
            results.ask(tile, 0..rows);
            for (t, sums) in scratch.sums.iter_mut().enumerate() {
                let tile = (tile + t).min(job.tiles.end - 1);
                for block in 0..job.blocks {
                    for (i, sums) in sums[..rows].chunks_mut(self.rows).enumerate() {
                        add_block(job, (tile, block), i * self.rows, sums);
                    }
                }
            }
            results.put(tile, &mut scratch.sums);
        }
    }
}

/// Adds a block of a tile, scaled, to the sums of rows from `first` on.
fn add_block(
    job: &Job<'_>,
    (tile, block): (usize, usize),
    first: usize,
    sums: &mut [[f32; LANES]],
) {
    let group = tile * job.groups + block / job.per_group;
    let (zeros, scales) = (zeros_of(&job.weight, group), scales_of(&job.weight, group));
    let lines = &job.weight.codes[job.block_line(tile, block)..][..job.lines];
    let w: Vec<[u8; 64]> = lines.iter().flat_map(|line| opened(job.bits, line, &zeros)).collect();
    let item = |row| block * job.rows + first + row;
    let x: Vec<&[i32]> =
        (0..sums.len()).map(|row| &job.quads[item(row) * w.len()..][..w.len()]).collect();
    let mut dots = [[0; LANES]; STRIP_ROWS];
    dot_signed(&mut dots, &x, &w);
    for (row, (sums, dots)) in sums.iter_mut().zip(dots).enumerate() {
        let x = job.scales[item(row)];
        for (lane, sum) in sums.iter_mut().enumerate() {
            let rest = if job.rest { 128 - i32::from(zeros[lane]) } else { 0 };
            *sum = (scales[lane] * x.scale).mul_add((dots[lane] + rest * x.sum) as f32, *sum);
        }
    }
}

/// Signed codes of a line, a quad after another.
fn opened(bits: Bits, line: &Line, zeros: &[u8; LANES]) -> Vec<[u8; 64]> {
    let lowered = |part: [u8; 64], lower: &dyn Fn(usize) -> u8| {
        std::array::from_fn(|i| part[i].wrapping_sub(lower(i)))
    };
    match bits {
        Bits::Four => [line.0.map(|code| code & 15), line.0.map(|code| code >> 4)]
            .map(|part| lowered(part, &|i| zeros[i / 4]))
            .into(),
        Bits::Eight => vec![lowered(line.0, &|_| 128)],
    }
}

fn zeros_of(weight: &Tile<'_>, group: usize) -> [u8; LANES] {
    match weight.zeros {
        TileZeros::All(zero) => [zero as u8; LANES],
        TileZeros::Each(all) => all[group],
    }
}

fn scales_of(weight: &Tile<'_>, group: usize) -> [f32; LANES] {
    match weight.scales {
        TileScales::F32(all) => all[group],
        TileScales::F16(all) => all[group].map(|bits| half::f16::from_bits(bits).to_f32()),
    }
}

/// What `tdpbssd` does: row m of `x` with lane n of every row of `w`, four signed bytes at a time.
fn dot_signed(sums: &mut [[i32; LANES]; STRIP_ROWS], x: &[&[i32]], w: &[[u8; 64]]) {
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
