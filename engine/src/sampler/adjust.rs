//! Transforms of single logits by token id, in place on the whole row: bias and penalties.
//!
//! Not here: temperature and whatever removes tokens ([`super::filter`]). Every function ignores
//! tokens beyond the row, and touches only the tokens it is given: no pass over the vocabulary.

use super::History;
use kernels::program::TokenId;

/// Counts tokens of a history; its memory is reused and all zero between calls.
#[derive(Debug, Default)]
pub struct Tally {
    counts_v: Vec<u32>,
}

impl Tally {
    /// Calls `visit(index, count)` once for each distinct token of `tokens` below `vocab`.
    fn each<'a, I>(&mut self, vocab: usize, tokens: I, mut visit: impl FnMut(usize, u32))
    where
        I: Iterator<Item = &'a TokenId> + Clone,
    {
        if self.counts_v.len() < vocab {
            self.counts_v.resize(vocab, 0);
        }
        let known = tokens.map(|t| t.index()).filter(|&t| t < vocab);
        known.clone().for_each(|t| self.counts_v[t] += 1);
        for token in known {
            let count = std::mem::take(&mut self.counts_v[token]);
            if count > 0 {
                visit(token, count);
            }
        }
    }
}

/// `logit += bias` for each entry; a token that is listed twice is biased twice.
pub fn logit_bias(logits_v: &mut [f32], bias: &[(TokenId, f32)]) {
    for (token, value) in bias {
        if let Some(logit) = logits_v.get_mut(token.index()) {
            *logit += value;
        }
    }
}

/// Makes `tokens` impossible.
pub fn ban(logits_v: &mut [f32], tokens: &[TokenId]) {
    for token in tokens {
        if let Some(logit) = logits_v.get_mut(token.index()) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Divides the positive and multiplies the other logits of all seen tokens by `penalty`, once each.
pub fn repetition(logits_v: &mut [f32], history: &History<'_>, penalty: f32, tally: &mut Tally) {
    if penalty == 1.0 {
        return;
    }
    let seen = history.prompt.iter().chain(history.generated);
    tally.each(logits_v.len(), seen, |token, _| {
        let logit = &mut logits_v[token];
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
    });
}

/// `logit -= count * frequency + presence` for every generated token.
pub fn frequency_presence(
    logits_v: &mut [f32],
    generated: &[TokenId],
    frequency: f32,
    presence: f32,
    tally: &mut Tally,
) {
    if frequency == 0.0 && presence == 0.0 {
        return;
    }
    tally.each(logits_v.len(), generated.iter(), |token, count| {
        logits_v[token] = logits_v[token] - count as f32 * frequency - presence;
    });
}
