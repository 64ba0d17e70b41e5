//! The gated activation of the feed-forward block.
//!
//! ```text
//! out[i] = silu(x[i]) * x[f + i]    silu(x) = x / (1 + exp(-x))
//! in x [rows, 2 f], out [rows, f]; split columns of all rows over threads; reads 8 and writes 4
//! bytes a column
//! ```
//! Columns of a paired linear ([`super::packed`]) come as 64 gates and the 64 columns that belong to them in
//! turn, and where the next linear wants int8 it gets that at once. Reference: `reference::` activate.

use super::isa::Kernel;
use super::math;
use super::packed::PAIRED;
use super::quantize::{BlockScale, quantize_block};
use super::share::MatMut;
use super::simd::{LANES, Simd};

/// 64 gates and what belongs to them, or some.
type Pair = [[f32; PAIRED]; 2];

/// `out = silu(gate) * up` of pairs.
#[derive(Debug)]
pub(crate) struct PairedSilu<'a> {
    /// `[pairs, 2, 64]`
    pub(crate) pairs: &'a [f32],
    /// `[pairs, 64]`
    pub(crate) out: &'a mut [f32],
}

impl Kernel for PairedSilu<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (pair, out) in pairs(self.pairs).iter().zip(self.out.as_chunks_mut().0) {
            *out = pass(s, pair);
        }
    }
}

/// The same to int8, by blocks of columns in order.
#[derive(Debug)]
pub(crate) struct PairedInt8<'a> {
    /// `[pairs, 2, 64]`
    pub(crate) pairs: &'a [f32],
    /// Columns of a block: 16, 32 or 64.
    pub(crate) block: usize,
    /// `[blocks, block / 4]`
    pub(crate) quads: MatMut<'a, i32>,
    /// `[blocks, 1]`
    pub(crate) scales: MatMut<'a, BlockScale>,
}

impl Kernel for PairedInt8<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let each = PAIRED / self.block;
        for (i, pair) in pairs(self.pairs).iter().enumerate() {
            let out = pass(s, pair);
            for (j, x) in out.chunks_exact(self.block).enumerate() {
                let block = i * each + j;
                self.scales.row(block)[0] = quantize_block(s, x, self.quads.row(block));
            }
        }
    }
}

#[inline(always)]
fn pairs(columns: &[f32]) -> &[Pair] {
    columns.as_chunks().0.as_chunks().0
}

#[inline(always)]
fn pass<S: Simd>(s: S, [gate, up]: &Pair) -> [f32; PAIRED] {
    let mut out = [0.0; PAIRED];
    GatedSilu { gate, up, out: &mut out }.run(s);
    out
}

/// `out = silu(gate) * up`, all of one length.
#[derive(Debug)]
pub(crate) struct GatedSilu<'a> {
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for GatedSilu<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (gates, gate_tail) = self.gate.as_chunks::<LANES>();
        let (ups, up_tail) = self.up.as_chunks::<LANES>();
        let (outs, out_tail) = self.out.as_chunks_mut::<LANES>();
        for ((gate, up), out) in gates.iter().zip(ups).zip(outs) {
            s.store(gated(s, s.load(gate), s.load(up)), out);
        }
        s.store_part(gated(s, s.load_part(gate_tail), s.load_part(up_tail)), out_tail);
    }
}

#[inline(always)]
fn gated<S: Simd>(s: S, gate: S::F, up: S::F) -> S::F {
    let power = math::exp(s, s.sub(s.splat(0.0), gate));
    let silu = s.div(gate, s.add(s.splat(1.0), power));
    s.mul(silu, up)
}

#[cfg(test)]
mod tests {
    use super::super::quantize::{Blocks, Quantize};
    use super::super::testing::machines;
    use super::*;
    use crate::program::Rounding;
    use testkit::Rng;

    #[test]
    fn pairs_give_the_bits_of_gates_before_the_rest() {
        let [gate, up] = [1, 2].map(|seed| Rng::new(seed).floats(3 * PAIRED, 4.0));
        let pairs = gate.chunks(PAIRED).zip(up.chunks(PAIRED)).flat_map(|(g, u)| [g, u].concat());
        let pairs: Vec<f32> = pairs.collect();
        for machine in machines() {
            let [mut apart, mut paired] = [(); 2].map(|()| vec![f32::NAN; 3 * PAIRED]);
            machine.run(GatedSilu { gate: &gate, up: &up, out: &mut apart });
            machine.run(PairedSilu { pairs: &pairs, out: &mut paired });
            assert_eq!(paired, apart);
            for block in [16, 32, 64] {
                let blocks = Blocks::new(3 * PAIRED, block, None, Rounding::Fine);
                let mut found = [(); 2]
                    .map(|()| (vec![0; 3 * PAIRED / 4], vec![BlockScale::ZERO; blocks.count]));
                let [(quads, scales), (quads_apart, scales_apart)] = &mut found;
                let (quads, scales) = (MatMut::new(quads, block / 4), MatMut::new(scales, 1));
                machine.run(PairedInt8 { pairs: &pairs, block, quads, scales });
                let (quads, scales) =
                    (MatMut::new(quads_apart, block / 4), MatMut::new(scales_apart, 1));
                let items = 0..blocks.count;
                machine.run(Quantize { x: &apart, blocks: &blocks, items, quads, scales });
                assert_eq!(found[0], found[1], "blocks of {block}");
            }
        }
    }

    #[test]
    fn close_to_f64_on_every_isa_and_length() {
        for len in [1, 15, 16, 33] {
            let gate: Vec<f32> = (0..len).map(|i| (i as f32 - 12.0) * 2.7).collect();
            let up: Vec<f32> = (0..len).map(|i| 0.5 - i as f32 * 0.3).collect();
            let mut first = None;
            for machine in machines() {
                let mut out = vec![f32::NAN; len];
                machine.run(GatedSilu { gate: &gate, up: &up, out: &mut out });
                assert_eq!(first.get_or_insert(out.clone()), &out);
                for i in 0..len {
                    let x = f64::from(gate[i]);
                    let exact = x / (1.0 + (-x).exp()) * f64::from(up[i]);
                    // exp within 2 ulp, then three roundings
                    assert!((f64::from(out[i]) - exact).abs() <= 5e-7 * exact.abs());
                }
            }
        }
    }
}
