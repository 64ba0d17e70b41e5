//! The gated activation of the feed-forward block.
//!
//! ```text
//! out[i] = silu(x[i]) * x[f + i]    silu(x) = x / (1 + exp(-x))
//! in x [rows, 2 f], out [rows, f]; split columns of all rows over threads; reads 8, writes 4
//! bytes a column
//! ```
//! Reference: `reference::` activate.

use super::isa::Kernel;
use super::math;
use super::simd::{LANES, Simd};

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
    use super::super::testing::machines;
    use super::*;

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
