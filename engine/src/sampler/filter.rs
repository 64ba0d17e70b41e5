//! Temperature, and the filters that remove tokens: top-k, top-p, min-p, typical.
//!
//! Each works on the tokens that are left and keeps at least one. Their order in memory means
//! nothing between two filters. Masses are summed in f64, so that a border is where the exact
//! sum puts it. Not here: bias and penalties ([`super::adjust`]), the choice ([`super::sample`]).

use super::{Law, LogitsError};
use kernels::program::TokenId;
use std::cmp::Ordering;

/// A token that may still be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Which.
    pub token: TokenId,
    /// Its logit, finite or minus infinity; only differences between candidates matter.
    pub logit: f32,
}

/// Puts every token with a logit above minus infinity into `kept`.
///
/// # Errors
/// A row without a finite maximum; `kept` means nothing then.
pub fn gather(logits_v: &[f32], kept: &mut Vec<Candidate>) -> Result<(), LogitsError> {
    kept.clear();
    for (token, &logit) in (0u32..).zip(logits_v) {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(LogitsError::NotFinite { token });
        }
        if logit > f32::NEG_INFINITY {
            kept.push(Candidate { token: TokenId(token), logit });
        }
    }
    if kept.is_empty() { Err(LogitsError::NoCandidate) } else { Ok(()) }
}

/// Divides by `temperature` (> 0). The largest logit becomes 0, so that no quotient overflows.
pub fn temperature(kept: &mut [Candidate], temperature: f32) {
    if temperature == 1.0 {
        return;
    }
    let top = top_logit(kept);
    kept.iter_mut().for_each(|c| c.logit = (c.logit - top) / temperature);
}

/// Keeps the `k` largest logits and those equal to the last of them; 0 keeps all.
pub fn top_k(kept: &mut Vec<Candidate>, k: usize) {
    if k == 0 || k >= kept.len() {
        return;
    }
    let border = kept.select_nth_unstable_by(k - 1, likeliest_first).1.logit;
    kept.retain(|c| c.logit >= border);
}

/// Keeps the smallest set whose mass reaches `p`, equal logits by ascending id; 1 keeps all.
pub fn top_p(kept: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 || kept.is_empty() {
        return;
    }
    let softmax = Softmax::of(kept);
    let count = reach(kept, f64::from(p), |c| softmax.probability(c), likeliest_first);
    kept.truncate(count);
}

/// Keeps tokens at least `p` times as likely as the likeliest; 0 keeps all.
pub fn min_p(kept: &mut Vec<Candidate>, p: f32) {
    if p <= 0.0 {
        return;
    }
    let border = f64::from(top_logit(kept)) + f64::from(p.min(1.0)).ln();
    kept.retain(|c| f64::from(c.logit) >= border);
}

/// Locally typical sampling (Meister et al. 2023): orders tokens by how far their surprise is from
/// the entropy, keeps the smallest such set whose mass reaches `p`, and whatever is exactly as far
/// as its last token; 1 keeps all.
pub fn typical_p(kept: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 || kept.is_empty() {
        return;
    }
    let softmax = Softmax::of(kept);
    let entropy = softmax.entropy(kept);
    let distance = |c: &Candidate| (softmax.surprise(c) - entropy).abs();
    let nearest_first = |a: &Candidate, b: &Candidate| {
        distance(a).total_cmp(&distance(b)).then(a.token.cmp(&b.token))
    };
    let count = reach(kept, f64::from(p), |c| softmax.probability(c), nearest_first);
    let border = distance(&kept[count - 1]);
    kept.retain(|c| distance(c) <= border);
}

/// Tokens and probabilities, likeliest first, equal ones by ascending id.
pub fn probabilities(kept: &mut [Candidate]) -> Vec<(TokenId, f32)> {
    let softmax = Softmax::of(kept);
    kept.sort_unstable_by(likeliest_first);
    kept.iter().map(|c| (c.token, softmax.probability(c) as f32)).collect()
}

/// Puts the candidates' tokens and probabilities into `law`, without those that round to 0 in f32.
pub(super) fn fill_law(kept: &mut [Candidate], law: &mut Law) {
    let softmax = Softmax::of(kept);
    kept.sort_unstable_by_key(|c| c.token);
    law.refill(kept.iter().map(|c| (c.token, softmax.probability(c) as f32)));
}

/// The softmax of some candidates.
struct Softmax {
    top: f64,
    sum: f64,
    ln_sum: f64,
}

impl Softmax {
    fn of(kept: &[Candidate]) -> Self {
        let top = f64::from(top_logit(kept));
        let sum: f64 = kept.iter().map(|c| (f64::from(c.logit) - top).exp()).sum();
        Self { top, sum, ln_sum: sum.ln() }
    }

    fn probability(&self, c: &Candidate) -> f64 {
        (f64::from(c.logit) - self.top).exp() / self.sum
    }

    /// `-ln p`.
    fn surprise(&self, c: &Candidate) -> f64 {
        self.ln_sum - (f64::from(c.logit) - self.top)
    }

    /// Mean surprise; tokens of probability 0 add nothing.
    fn entropy(&self, kept: &[Candidate]) -> f64 {
        let term = |c: &Candidate| match self.probability(c) {
            0.0 => 0.0,
            p => p * self.surprise(c),
        };
        kept.iter().map(term).sum()
    }
}

fn top_logit(kept: &[Candidate]) -> f32 {
    // None is NaN: a plain comparison is faster than `f32::max`.
    kept.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// Adding 0 makes minus zero equal to zero.
fn likeliest_first(a: &Candidate, b: &Candidate) -> Ordering {
    (b.logit + 0.0).total_cmp(&(a.logit + 0.0)).then(a.token.cmp(&b.token))
}

/// Sorts a prefix by `order` that is just long enough for its mass to reach `mass`, and returns
/// its length (at least 1, all of them if rounding leaves the sum below). Only ever longer fronts
/// are sorted: of a vocabulary's 150,000 tokens a few hundred usually hold the mass.
fn reach(
    kept: &mut [Candidate],
    mass: f64,
    probability: impl Fn(&Candidate) -> f64,
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
) -> usize {
    let (mut sum, mut done, mut front) = (0.0, 0, 256);
    while done < kept.len() {
        let rest = &mut kept[done..];
        let count = front.min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count, &order);
        }
        rest[..count].sort_unstable_by(&order);
        for (i, c) in rest[..count].iter().enumerate() {
            sum += probability(c);
            if sum >= mass {
                return done + i + 1;
            }
        }
        done += count;
        front *= 8;
    }
    kept.len()
}
