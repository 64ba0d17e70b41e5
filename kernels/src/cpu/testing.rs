//! Random weights, the list of instruction sets and matrix registers in plain Rust for this
//! module's tests.

use super::few_rows::{self, Round, TileSums};
use super::grouped::STREAMS;
use super::isa::{Isa, Machine};
use super::matmul::{
    Dots, MatrixRegisters, MatrixUnit, Opened, Opening, Product, STRIP_ROWS, Scaling, Shape,
};
use super::packed::{Tile, TileScales, TileZeros};
use super::simd::{LANES, Line};
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
    type Registers = Shape;

    fn configure(self, shape: Shape) -> Shape {
        shape
    }
}

impl MatrixRegisters for Shape {
    fn open(&self, codes: Opening<'_>, out: &mut Opened) {
        let mut opened = out.iter_mut();
        for line in codes.lines {
            let parts = match codes.bits {
                Bits::Four => vec![line.0.map(|code| code & 15), line.0.map(|code| code >> 4)],
                Bits::Eight => vec![line.0],
            };
            for part in parts {
                let lower = |i: usize| match codes.bits {
                    Bits::Four => codes.zeros[i / 4],
                    Bits::Eight => 128,
                };
                *opened.next().unwrap() =
                    Line(std::array::from_fn(|i| part[i].wrapping_sub(lower(i))));
            }
        }
    }

    fn few_rows(
        &self,
        job: &few_rows::Job<'_>,
        scratch: &mut few_rows::Scratch,
        mut done: impl FnMut(Round, &mut [TileSums; STREAMS]),
    ) {
        let few_rows::Scratch { panels: [panels, _], sums, .. } = scratch;
        let mut round = job.first(job.tiles.start);
        while round.tiles > 0 {
            for t in 0..round.tiles {
                let tile = round.tile + t;
                let (bits, codes) = (job.bits, &job.weight.codes);
                let block = |(tile, block)| (tile * job.blocks + block) * job.lines;
                let lines = &codes[block((tile, round.block))..][..job.lines];
                let (asked, later) = job.ahead(round);
                let ahead = &codes[block((asked + t, later))..][..job.lines];
                let group = tile * job.groups + round.group;
                let (zeros, scales) = (zeros_of(&job.weight, group), scales_of(&job.weight, group));
                self.open(Opening { bits, lines, zeros: &zeros, ahead }, &mut panels[t]);
                let row = |r| &job.quads[(round.block * job.rows + r) * self.quads..][..self.quads];
                let dots = product(*self, row, &panels[t]);
                for (r, sums) in sums[t].iter_mut().enumerate().take(job.rows) {
                    let x = job.scales[round.block * job.rows + r];
                    for (lane, sum) in sums.iter_mut().enumerate() {
                        let rest = if job.rest { 128 - i32::from(zeros[lane]) } else { 0 };
                        let dots = (dots[r][lane] + rest * x.sum) as f32;
                        *sum = (scales[lane] * x.scale).mul_add(dots, *sum);
                    }
                }
            }
            if job.is_last(round) {
                done(round, sums);
            }
            round = job.after(round);
        }
    }

    fn step(&self, next: Option<Product<'_>>, last: Option<Scaling<'_>>, dots: &mut Dots) {
        if let Some(last) = last {
            add_up(last, dots, self.rows);
        }
        let Some(next) = next else { return };
        for (strip, block) in (0..next.strips).flat_map(|s| (0..next.blocks).map(move |b| (s, b))) {
            let first = block * next.height + strip * self.rows;
            let row = |row| &next.x[(first + row) * self.quads..][..self.quads];
            for (panel, dots) in next.panel[block].iter().zip(&mut dots.0[strip][block]) {
                dots[..self.rows].copy_from_slice(&product(*self, row, panel)[..self.rows]);
            }
        }
    }
}

/// Some rows of activations times an opened block.
fn product<'a>(
    shape: Shape,
    row: impl Fn(usize) -> &'a [i32],
    panel: &Opened,
) -> [[i32; LANES]; STRIP_ROWS] {
    let x: Vec<&[i32]> = (0..shape.rows).map(row).collect();
    let w: Vec<[u8; 64]> = panel[..shape.quads].iter().map(|line| line.0).collect();
    let mut sums = [[0; LANES]; STRIP_ROWS];
    dot_signed(&mut sums, &x, &w);
    sums
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

/// Scales and adds up the dots of a step, of strips of `rows` rows.
fn add_up(last: Scaling<'_>, dots: &Dots, rows: usize) {
    for (t, sums) in last.sums.into_iter().enumerate() {
        for (block, factors) in last.factors.iter().enumerate().take(last.blocks) {
            for (row, sums) in sums[..last.strips * rows].iter_mut().enumerate() {
                let x = last.x[block * last.height + row];
                for (lane, sum) in sums.iter_mut().enumerate() {
                    let rest = if last.rest { factors.rest[t][lane] * x.sum } else { 0 };
                    let dots = dots.0[row / rows][block][t][row % rows][lane];
                    let dots = (dots + rest) as f32;
                    *sum = (factors.scale[t][lane] * x.scale).mul_add(dots, *sum);
                }
            }
        }
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
