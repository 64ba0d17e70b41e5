//! Softmax over one chunk of positions for one query: from scores to weights and their sum.
//!
//! ```text
//! weight[p] = exp(score[p] - max) where the query sees p, else 0
//! sums   thirty-two chains: position p of a chunk goes to chain p % 32; then halves, sixteen
//!        onto sixteen and so on
//! ```
//! Not here: scores, outputs, what is carried from chunk to chunk ([`super::attention`]).

use super::isa::Kernel;
use super::math;
use super::simd::{LANES, Simd};
use std::ops::Range;

/// Positions of a chunk.
pub(crate) const CHUNK: usize = 128;

/// Scores, then weights of a chunk's positions for one query.
pub(crate) struct Weights {
    pub(crate) all: [f32; CHUNK],
    /// Positions that the query sees, counted from the chunk's start; not empty.
    pub(crate) range: Range<usize>,
}

/// Turns the scores of some queries, at most sixteen, into weights; `i`th lanes are of query `i`.
pub(crate) struct Soften<'a> {
    pub(crate) all: &'a mut [Weights],
    /// The greatest scores of earlier chunks, then of these too.
    pub(crate) max: &'a mut [f32; LANES],
    /// What sums under the old maxima are multiplied by: `exp(old - new)`.
    pub(crate) factors: &'a mut [f32; LANES],
    /// Sums of the weights.
    pub(crate) sums: &'a mut [f32; LANES],
}

impl Kernel for Soften<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { all, max, factors, sums } = self;
        for ((weights, max), fallen) in all.iter_mut().zip(&mut *max).zip(&mut *factors) {
            let before = *max;
            *max = weights.max(s, before);
            *fallen = before - *max;
        }
        s.store(math::exp(s, s.load(factors)), factors);
        for ((weights, max), sum) in all.iter_mut().zip(max).zip(sums) {
            *sum = weights.soften(s, *max);
        }
    }
}

impl Weights {
    pub(crate) const NEW: Self = Self { all: [0.0; CHUNK], range: 0..0 };

    /// The greatest of the scores and `max`; scores that the query does not see become minus
    /// infinity.
    #[inline(always)]
    pub(crate) fn max<S: Simd>(&mut self, s: S, max: f32) -> f32 {
        self.fill_outside(f32::NEG_INFINITY);
        let mut most = [s.splat(max); 2];
        for [a, b] in self.pairs() {
            most = [s.max(s.load(a), most[0]), s.max(s.load(b), most[1])];
        }
        s.greatest(s.max(most[0], most[1]))
    }

    /// Turns scores into weights and returns their sum.
    #[inline(always)]
    pub(crate) fn soften<S: Simd>(&mut self, s: S, max: f32) -> f32 {
        for [a, b] in self.pairs() {
            let max = s.splat(max);
            let weights = math::exps(s, [s.sub(s.load(a), max), s.sub(s.load(b), max)]);
            s.store(weights[0], a);
            s.store(weights[1], b);
        }
        self.fill_outside(0.0);
        let mut sums = [s.splat(0.0); 2];
        for [a, b] in self.pairs() {
            sums = [s.add(sums[0], s.load(a)), s.add(sums[1], s.load(b))];
        }
        s.sum(s.add(sums[0], sums[1]))
    }

    /// Pairs of vectors up to the last position that the query sees.
    #[inline(always)]
    fn pairs(&mut self) -> &mut [[[f32; LANES]; 2]] {
        let end = self.pairs_end();
        self.all[..end].as_chunks_mut().0.as_chunks_mut().0
    }

    #[inline(always)]
    fn pairs_end(&self) -> usize {
        self.range.end.next_multiple_of(2 * LANES)
    }

    /// Sets the positions of pairs that the query does not see.
    #[inline(always)]
    fn fill_outside(&mut self, value: f32) {
        let end = self.pairs_end();
        if self.range != (0..end) {
            self.all[..self.range.start].fill(value);
            self.all[self.range.end..end].fill(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::machines;
    use super::*;

    struct Softmax(Weights);
    impl Kernel for Softmax {
        type Output = (f32, f32, [f32; CHUNK]);
        #[inline(always)]
        fn run<S: Simd>(mut self, s: S) -> Self::Output {
            let max = self.0.max(s, -3.0);
            (max, self.0.soften(s, max), self.0.all)
        }
    }

    #[test]
    fn what_a_query_does_not_see_counts_for_nothing() {
        for range in [0..1, 0..128, 5..6, 3..40, 120..128] {
            let score = |p: usize| (p * 29 % 64) as f32 * 0.1 - 4.0;
            // Scores of other positions may be anything.
            let all = std::array::from_fn(|p| if range.contains(&p) { score(p) } else { f32::NAN });
            let most = range.clone().map(score).fold(-3.0, f32::max);
            let weight = |p: usize| f64::from(score(p) - most).exp();
            let total: f64 = range.clone().map(weight).sum();
            for machine in machines() {
                let (max, sum, weights) =
                    machine.run(Softmax(Weights { all, range: range.clone() }));
                assert_eq!(max, most);
                // exp within 2 ulp, at most 128 roundings of positive numbers in chains of eight
                assert!((f64::from(sum) - total).abs() < 2e-6 * total, "{sum} for {total}");
                for (p, found) in weights.iter().enumerate() {
                    let exact = if range.contains(&p) { weight(p) } else { 0.0 };
                    let beyond = p >= range.end.next_multiple_of(2 * LANES);
                    assert!(beyond || (f64::from(*found) - exact).abs() <= 3e-7 * exact, "{p}");
                }
            }
        }
    }
}
