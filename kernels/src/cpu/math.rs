//! exp for softmax and SiLU: a fixed sequence of operations, so that every instruction set gives
//! the same bits (a libm would not).
//!
//! ```text
//! n = round(x / ln 2)    r = x - n ln 2 in [-0.347, 0.347]    exp(x) = 2^n exp(r)
//! exp(r) by its Taylor polynomial of degree 7: the rest r^8 / 8! is below 6e-9 relative
//! ```

use super::simd::Simd;

/// Beyond this 2^n would overflow.
const HIGH: f32 = 88.3;
/// Below this 2^n would be subnormal; exp is 1e-38 there, nothing beside any weight or gate.
const LOW: f32 = -87.3;
/// Adding it rounds to an integer and leaves that integer in the low bits.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has enough trailing zeros for `n * LN2_HIGH` to be exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// `exp(x)` within 2 ulp, clamped to `[LOW, HIGH]`; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    exps(s, [x])[0]
}

/// The same of several vectors in step with each other: one alone waits for each operation's
/// result most of the time.
#[inline(always)]
pub(crate) fn exps<S: Simd, const N: usize>(s: S, mut x: [S::F; N]) -> [S::F; N] {
    let (mut shifted, mut p) = (x, [s.splat(1.0 / 5040.0); N]);
    for i in 0..N {
        x[i] = s.min(s.splat(HIGH), s.max(s.splat(LOW), x[i]));
        shifted[i] = s.fma(x[i], s.splat(std::f32::consts::LOG2_E), s.splat(ROUNDER));
    }
    for i in 0..N {
        let n = s.sub(shifted[i], s.splat(ROUNDER));
        x[i] = s.fma(n, s.splat(-LN2_HIGH), x[i]);
        x[i] = s.fma(n, s.splat(-LN2_LOW), x[i]);
    }
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        for i in 0..N {
            p[i] = s.fma(p[i], x[i], s.splat(c));
        }
    }
    for i in 0..N {
        p[i] = s.mul(p[i], s.shift_exponent(shifted[i]));
    }
    p
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Kernel, Machine};
    use super::*;

    struct Exp([f32; 16]);
    impl Kernel for Exp {
        type Output = [f32; 16];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; 16] {
            let mut out = [0.0; 16];
            s.store(exp(s, s.load(&self.0)), &mut out);
            out
        }
    }

    fn machines() -> Vec<Machine> {
        Isa::ALL.into_iter().filter_map(|isa| isa.detect().ok()).collect()
    }

    #[test]
    fn close_to_f64_and_equal_everywhere() {
        for i in -8800..8800 {
            let x: [f32; 16] = std::array::from_fn(|l| i as f32 * 0.01 + l as f32 * 0.0006);
            let outs: Vec<_> = machines().iter().map(|m| m.run(Exp(x))).collect();
            assert!(outs.iter().all(|out| out == &outs[0]), "{x:?}");
            for (x, y) in x.iter().zip(outs[0]) {
                let exact = f64::from(x.max(-87.3)).exp();
                let error = (f64::from(y) - exact).abs() / exact;
                // two ulp: the fma chain and the product round about once each
                assert!(error < 2.4e-7, "exp({x}) = {y}, relative error {error:e}");
            }
        }
    }

    #[test]
    fn ends_and_nan() {
        for machine in machines() {
            let mut x = [f32::NAN; 16];
            x[1] = f32::NEG_INFINITY;
            x[2] = f32::INFINITY;
            x[3] = 0.0;
            let y = machine.run(Exp(x));
            assert!(y[0].is_nan() && y[1] < 2e-38 && y[2].is_finite() && y[2] > 1e38);
            assert_eq!(y[3], 1.0);
        }
    }
}
