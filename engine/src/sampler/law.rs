//! A law: the tokens that may come next, with their probabilities.
//!
//! Comes from [`super::Sampler::law`] (after every transform), or from weights; rules that compare
//! two laws and the arithmetic of acceptance take it ([`crate::speculation`]). Its memory is
//! reused. Not here: how logits become probabilities ([`super::filter`]), noise ([`super::noise`]).

use kernels::program::TokenId;

/// Tokens by ascending id with their probabilities: at least one token, all probabilities above 0,
/// their sum 1 up to f32 rounding of each.
#[derive(Debug, Clone, PartialEq)]
pub struct Law {
    entries: Vec<(TokenId, f32)>,
}

impl Law {
    /// All mass on one token: a greedy choice, or a token that was looked up.
    pub fn point(token: TokenId) -> Self {
        Self { entries: vec![(token, 1.0)] }
    }

    /// The law proportional to `weights` (any order; weights of the same token add up; weights of
    /// 0 are left out). None if a weight is negative, infinite or NaN, or none is above 0.
    pub fn from_weights(weights: &[(TokenId, f32)]) -> Option<Self> {
        let valid = weights.iter().all(|(_, w)| w.is_finite() && *w >= 0.0);
        let sum: f64 = weights.iter().map(|(_, w)| f64::from(*w)).sum();
        if !valid || sum <= 0.0 {
            return None;
        }
        let mut sorted = weights.to_vec();
        sorted.sort_unstable_by_key(|(token, _)| *token);
        let share = |same: &[(TokenId, f32)]| {
            let mass: f64 = same.iter().map(|(_, w)| f64::from(*w)).sum();
            (same[0].0, (mass / sum) as f32)
        };
        let shares = sorted.chunk_by(|a, b| a.0 == b.0).map(share);
        Some(Self { entries: shares.filter(|(_, p)| *p > 0.0).collect() })
    }

    /// Replaces the law; `entries` ascend by id, and one of them at least is above 0.
    pub(super) fn refill(&mut self, entries: impl IntoIterator<Item = (TokenId, f32)>) {
        self.entries.clear();
        self.entries.extend(entries.into_iter().filter(|(_, p)| *p > 0.0));
        debug_assert!(!self.entries.is_empty() && self.entries.is_sorted_by(|a, b| a.0 < b.0));
    }

    /// The tokens of probability above 0, by ascending id, with their probabilities.
    pub fn entries(&self) -> &[(TokenId, f32)] {
        &self.entries
    }

    /// The probability of `token`; 0 if it is not among the entries.
    pub fn probability(&self, token: TokenId) -> f32 {
        self.entries.binary_search_by_key(&token, |e| e.0).map_or(0.0, |i| self.entries[i].1)
    }

    /// The likeliest token, the lowest id among equals. Logits that differ by less than about
    /// 1e-7 may have equal probabilities.
    pub fn top(&self) -> TokenId {
        let likelier = |a: (TokenId, f32), b: &(TokenId, f32)| if b.1 > a.1 { *b } else { a };
        self.entries.iter().fold(self.entries[0], likelier).0
    }

    /// The token at `u` of the cumulative law, for `u` uniform in (0, 1).
    pub fn at(&self, u: f64) -> TokenId {
        let weights = self.entries.iter().map(|&(token, p)| (token, f64::from(p)));
        at(weights, u).unwrap_or(self.entries[0].0)
    }
}

/// The token at `u` of the cumulative sum of `weights` (>= 0), scaled to their own sum, so that
/// rounding of the sum shifts no mass to the last token; never one of weight 0. None if all are 0.
pub(crate) fn at<I>(weights: I, u: f64) -> Option<TokenId>
where
    I: Iterator<Item = (TokenId, f64)> + Clone,
{
    let aim = u * weights.clone().map(|(_, w)| w).sum::<f64>();
    let (mut sum, mut last) = (0.0, None);
    for (token, weight) in weights.filter(|(_, w)| *w > 0.0) {
        sum += weight;
        last = Some(token);
        if sum > aim {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::{History, LogitsError, Sampler, SamplingParams, candidates};
    use proptest::prelude::*;

    fn law(weights: &[(u32, f32)]) -> Law {
        let weights: Vec<_> = weights.iter().map(|&(t, w)| (TokenId(t), w)).collect();
        Law::from_weights(&weights).unwrap()
    }

    #[test]
    fn weights_are_sorted_merged_and_scaled() {
        let found = law(&[(7, 3.0), (2, 0.5), (5, 0.0), (2, 0.5)]);
        assert_eq!(found.entries(), [(TokenId(2), 0.25), (TokenId(7), 0.75)]);
        assert_eq!(found.probability(TokenId(7)), 0.75);
        assert_eq!(found.probability(TokenId(5)), 0.0);
        assert_eq!(found.top(), TokenId(7));
        assert_eq!(law(&[(9, 1.0), (4, 1.0)]).top(), TokenId(4));
    }

    #[test]
    fn weights_that_are_no_law_are_refused() {
        for weights in [&[][..], &[0.0], &[-1.0, 2.0], &[f32::NAN], &[f32::INFINITY, 1.0]] {
            let weights: Vec<_> = weights.iter().map(|&w| (TokenId(0), w)).collect();
            assert_eq!(Law::from_weights(&weights), None, "{weights:?}");
        }
    }

    #[test]
    fn the_cumulative_law_is_cut_at_the_sums() {
        let law = law(&[(2, 1.0), (5, 2.0), (6, 1.0)]);
        let at: Vec<u32> = [1e-16, 0.2499, 0.2501, 0.7499, 0.7501, 1.0 - 1e-16]
            .iter()
            .map(|&u| law.at(u).0)
            .collect();
        assert_eq!(at, [2, 2, 5, 5, 6, 6]);
        let weights = [(TokenId(0), 0.0), (TokenId(1), 1e-300), (TokenId(2), 0.0)];
        assert_eq!(super::at(weights.into_iter(), 1.0), Some(TokenId(1)));
        assert_eq!(super::at([(TokenId(0), 0.0)].into_iter(), 0.5), None);
    }

    #[test]
    fn a_row_without_a_law_leaves_the_last_one() {
        let mut out = Law::point(TokenId(3));
        for params in [SamplingParams::greedy(), SamplingParams::default()] {
            let row = [0.0, f32::NAN];
            let found = Sampler::default().law(&row, &History::default(), &params, &mut out);
            assert_eq!(found, Err(LogitsError::NotFinite { token: 1 }));
            assert_eq!(out, Law::point(TokenId(3)));
        }
    }

    proptest! {
        #[test]
        fn the_law_of_a_row_is_its_candidates_by_id(
            seed: u64, vocab in 1usize..600, scale in 0.0f32..200.0, k in 0u32..50,
            p in 0.01f32..=1.0, temperature in 0.0f32..2.0,
        ) {
            let logits_v = testkit::Rng::new(seed).floats(vocab, scale);
            let params = SamplingParams { temperature, top_k: k, top_p: p, ..Default::default() };
            let mut expected = candidates(&logits_v, &History::default(), &params).unwrap();
            expected.retain(|e| e.1 > 0.0);
            expected.sort_unstable_by_key(|e| e.0);
            let mut out = Law::point(TokenId(0));
            Sampler::default().law(&logits_v, &History::default(), &params, &mut out).unwrap();
            prop_assert_eq!(out.entries(), &expected);
        }
    }
}
