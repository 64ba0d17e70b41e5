//! How likely tokens were: natural logarithms of the softmax of a model's own logits.
//!
//! Input: a row of logits as a runner computed it, before bias, penalties, temperature and filters,
//! so that figures of requests with other parameters compare. Not here: the choice of tokens
//! ([`crate::sampler`]), their text.

use kernels::program::TokenId;

/// Most likeliest tokens that can be reported beside one.
pub const TOP_MAX: u32 = 20;

/// What a request wants to know of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogprobsWanted {
    /// The likeliest tokens to report beside each, at most [`TOP_MAX`].
    pub top: u32,
    /// Whether the prompt's tokens are reported too, all but the first.
    pub prompt: bool,
}

/// How likely a token was at its place.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Its log-probability, at most 0.
    pub logprob: f32,
    /// Its place among all tokens by likelihood, from 1; equals count as earlier.
    pub rank: u32,
    /// The likeliest tokens, likeliest first, ties by ascending id.
    pub top: Vec<(TokenId, f32)>,
}

/// How likely `token` is after the row `logits_v`; minus infinity if the row does not hold it.
pub fn token_logprob(logits_v: &[f32], token: TokenId, top: u32) -> TokenLogprob {
    let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mass: f64 = logits_v.iter().map(|&l| f64::from(l - max).exp()).sum();
    // One subtraction in f64 for every token: equal logits get equal figures.
    let shift = f64::from(max) + mass.ln();
    let logprob = |logit: f32| (f64::from(logit) - shift) as f32;
    let own = logits_v.get(token.index()).copied().unwrap_or(f32::NEG_INFINITY);
    let above = logits_v.iter().filter(|&&l| l > own).count();
    let top = likeliest(logits_v, top as usize);
    let top = top.into_iter().map(|(token, logit)| (token, logprob(logit))).collect();
    TokenLogprob { logprob: logprob(own), rank: above as u32 + 1, top }
}

/// The `count` largest logits in order.
fn likeliest(logits_v: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let mut top: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
    for (token, &logit) in (0u32..).map(TokenId).zip(logits_v) {
        let last = top.last().map_or(f32::NEG_INFINITY, |last| last.1);
        if count == 0 || logit.is_nan() || (top.len() == count && logit <= last) {
            continue;
        }
        let at = top.partition_point(|other| other.1 >= logit);
        top.insert(at, (token, logit));
        top.truncate(count);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_a_softmax() {
        let logits_v = [1.0f32, 3.0, 2.0, 3.0];
        let mass: f64 = logits_v.iter().map(|&l| f64::from(l).exp()).sum();
        let expected = |l: f64| (l - mass.ln()) as f32;
        let found = token_logprob(&logits_v, TokenId(2), 3);
        assert!((found.logprob - expected(2.0)).abs() < 1e-6, "{found:?}");
        assert_eq!(found.rank, 3);
        let ids: Vec<u32> = found.top.iter().map(|(token, _)| token.0).collect();
        assert_eq!(ids, [1, 3, 2], "ties by ascending id");
        assert_eq!(found.top[2].1, found.logprob, "the same figure wherever it stands");
    }

    #[test]
    fn huge_logits_do_not_overflow_and_impossible_tokens_are_minus_infinity() {
        let found = token_logprob(&[1e30, f32::NEG_INFINITY], TokenId(1), 2);
        assert_eq!((found.logprob, found.rank), (f32::NEG_INFINITY, 2));
        assert_eq!(found.top[0], (TokenId(0), 0.0));
    }
}
