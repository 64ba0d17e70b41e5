//! Root mean square norms: of rows after an optional residual add, and of heads in place.
//!
//! ```text
//! norm       x += add;  out = x / sqrt(mean(x^2) + eps) * weight      [rows, d]
//! head norm  the same in place for each head of `width` columns
//! sums       sixteen lanes times four chains: element i goes to lane i % 16 of chain i / 16 % 4;
//!            chains (0 + 1) + (2 + 3), then lanes by halving
//! split      rows over threads; reads and writes each row once
//! ```
//! Reference: `reference::` norm and head norm, which sum in f64.

use super::isa::Kernel;
use super::share::{Mat, MatMut};
use super::simd::{LANES, Simd};

/// Norms rows; `x` is updated where `add` is given.
#[derive(Debug)]
pub(crate) struct Norm<'a> {
    pub(crate) x: MatMut<'a>,
    pub(crate) add: Option<Mat<'a>>,
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: MatMut<'a>,
}

impl Kernel for Norm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for i in 0..self.x.rows() {
            let x = self.x.row(i);
            if let Some(add) = self.add {
                for (x, add) in x.iter_mut().zip(add.row(i)) {
                    *x += add;
                }
            }
            let factor = inverse_norm(s, x, self.eps);
            for ((out, x), weight) in self.out.row(i).iter_mut().zip(&*x).zip(self.weight) {
                *out = x * factor * weight;
            }
        }
    }
}

/// Norms each head in place.
#[derive(Debug)]
pub(crate) struct HeadNorm<'a> {
    /// `[rows, heads * width]`
    pub(crate) heads: MatMut<'a>,
    /// `[width]`
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
}

impl Kernel for HeadNorm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for i in 0..self.heads.rows() {
            for head in self.heads.row(i).chunks_exact_mut(self.weight.len()) {
                let factor = inverse_norm(s, head, self.eps);
                for (x, weight) in head.iter_mut().zip(self.weight) {
                    *x = *x * factor * weight;
                }
            }
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`, rounded once after the sum.
#[inline(always)]
fn inverse_norm<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let (vectors, tail) = x.as_chunks::<LANES>();
    let (quads, rest) = vectors.as_chunks::<4>();
    let mut sums = [s.splat(0.0); 4];
    for quad in quads {
        for c in 0..4 {
            let v = s.load(&quad[c]);
            sums[c] = s.fma(v, v, sums[c]);
        }
    }
    for (c, vector) in rest.iter().enumerate() {
        let v = s.load(vector);
        sums[c] = s.fma(v, v, sums[c]);
    }
    // The tail follows the last vector; its zeros add nothing.
    let v = s.load_part(tail);
    sums[rest.len()] = s.fma(v, v, sums[rest.len()]);
    let sum = s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
    let mean = f64::from(sum) / x.len() as f64;
    (1.0 / (mean + f64::from(eps)).sqrt()) as f32
}

#[cfg(test)]
mod tests {
    use super::super::isa::Machine;
    use super::super::testing::machines;
    use super::*;
    use testkit::Rng;

    /// The stream after the add, and the output.
    fn norm(machine: Machine, x: &[f32], add: Option<&[f32]>, weight: &[f32]) -> [Vec<f32>; 2] {
        let (d, mut stream, mut out) = (x.len(), x.to_vec(), vec![f32::NAN; x.len()]);
        machine.run(Norm {
            x: MatMut::new(&mut stream, d),
            add: add.map(|add| Mat::new(add, d)),
            weight,
            eps: 1e-5,
            out: MatMut::new(&mut out, d),
        });
        [stream, out]
    }

    #[test]
    fn widths_of_every_kind_match_f64_and_each_other() {
        for d in [1, 15, 16, 17, 48, 64, 80, 100, 128, 257, 896] {
            let mut rng = Rng::new(d as u64);
            let (x, add, weight) = (rng.floats(d, 3.0), rng.floats(d, 1.0), rng.floats(d, 1.0));
            let all = machines().into_iter().map(|m| norm(m, &x, Some(&add), &weight));
            let all: Vec<_> = all.collect();
            assert!(all.iter().all(|found| found == &all[0]), "d {d}");
            let [stream, out] = &all[0];
            let sum: f64 = stream.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let factor = 1.0 / (sum / d as f64 + 1e-5).sqrt();
            for i in 0..d {
                assert_eq!(stream[i], x[i] + add[i]);
                let exact = f64::from(stream[i]) * factor * f64::from(weight[i]);
                // a few roundings on each of sum, root, quotient and two products
                assert!((f64::from(out[i]) - exact).abs() <= 1e-6 * exact.abs(), "d {d} at {i}");
            }
        }
    }

    #[test]
    fn heads_are_normed_alone() {
        let (mut rng, width) = (Rng::new(3), 24);
        let (x, weight) = (rng.floats(3 * width, 2.0), rng.floats(width, 1.0));
        for machine in machines() {
            let mut row = x.clone();
            let heads = MatMut::new(&mut row, 3 * width);
            machine.run(HeadNorm { heads, weight: &weight, eps: 1e-5 });
            for (x, found) in x.chunks(width).zip(row.chunks(width)) {
                assert_eq!(norm(machine, x, None, &weight)[1], found);
            }
        }
    }
}
