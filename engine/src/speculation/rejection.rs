//! The second rule of acceptance: rejection sampling (Leviathan, Kalman and Matias, arXiv
//! 2211.17192), and how often each rule accepts.
//!
//! A token drafted from law q is accepted with probability `min(1, p / q)` of it, p being the
//! verifier's law; else a token of `(p - q)+` takes its place. What is emitted has law p, whatever
//! q is, and no rule accepts more often; but which token it is depends on q, unlike with coupled
//! choices. Everything is a function of (laws, seed, position).
//!
//! Whether a drafted token is judged must not depend on the token itself or on noise of its own
//! position: a drafter that wants to stop does so *after* its last token, by what came before it.
//! A token where nothing was drafted (or all was accepted) is [`crate::sampler::Sampler::sample`]'s,
//! so that text without drafts is the same under each rule.
//!
//! Not here: cycles and their lengths ([`super`]), how laws arise ([`crate::sampler`]).

use crate::sampler::Law;
use crate::sampler::law;
use crate::sampler::noise::{NoiseKey, Stream};
use kernels::program::TokenId;

/// What becomes of a drafted token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It stands.
    Accepted,
    /// This token takes its place, and whatever was drafted after it is void.
    Replaced(TokenId),
}

/// The token that a drafter proposes at `position` if its law there is `draft`: a draw with noise
/// that nothing else uses.
pub fn propose(draft: &Law, seed: u64, position: u32) -> TokenId {
    draft.at(NoiseKey::of(Stream::Draft, seed, position).uniform())
}

/// Judges `drafted`, a token drawn from `draft`, at `position`, where the verifier's law is
/// `verifier`.
///
/// A token that was looked up has [`Law::point`]. A `drafted` without probability in `draft` breaks
/// the rule's premise; it is accepted wherever the verifier may choose it. Time grows with the
/// entries of both laws where it rejects and is logarithmic where it accepts; no memory.
pub fn judge(verifier: &Law, draft: &Law, drafted: TokenId, seed: u64, position: u32) -> Verdict {
    let [p, q] = [verifier, draft].map(|law| f64::from(law.probability(drafted)));
    if NoiseKey::of(Stream::Coin, seed, position).uniform() * q < p {
        return Verdict::Accepted;
    }
    Verdict::Replaced(residual(verifier, draft, NoiseKey::of(Stream::Residual, seed, position)))
}

/// A token of `(p - q)+`. Where rounding leaves nothing of it (a rejection then had a chance of
/// about 1e-7), a token of p.
fn residual(p: &Law, q: &Law, key: NoiseKey) -> TokenId {
    let excess = beside(p, q).map(|(token, p, q)| (token, (p - q).max(0.0)));
    let u = key.uniform();
    law::at(excess, u).unwrap_or_else(|| p.at(u))
}

/// The chance that [`judge`] accepts a token that [`propose`] drew from `draft`:
/// `sum min(p, q)`, in 0..=1, which is 1 minus the laws' total variation distance.
pub fn acceptance(verifier: &Law, draft: &Law) -> f64 {
    beside(verifier, draft).map(|(_, p, q)| p.min(q)).sum::<f64>().min(1.0)
}

/// The chance that both laws' choices agree if they share their Gumbel noise, as coupled choices
/// do; in 0..=1, at most [`acceptance`].
///
/// `sum over i of 1 / sum over j of max(p_j / p_i, q_j / q_i)`: with `E_j = exp(-noise_j)`, which
/// is exponential, both choices are i where `E_j >= E_i max(p_j / p_i, q_j / q_i)` for all other j
/// (compare Daliri, Musco and Suresh, arXiv 2408.07978). Tokens sorted by `p / q` make the inner
/// sums prefix sums: p of i and what follows it, q of what precedes it.
pub fn coupled_acceptance(verifier: &Law, draft: &Law) -> f64 {
    let mut shared: Vec<(f64, f64)> =
        beside(verifier, draft).filter(|e| e.2 > 0.0).map(|(_, p, q)| (p, q)).collect();
    shared.sort_unstable_by(|a, b| (a.0 * b.1).total_cmp(&(b.0 * a.1)));
    let [mut p_after, q_all] = [verifier, draft].map(mass);
    let mut q_before = q_all - shared.iter().map(|e| e.1).sum::<f64>();
    let mut sum = 0.0;
    for (p, q) in shared {
        sum += 1.0 / (p_after.max(p) / p + q_before.max(0.0) / q);
        p_after -= p;
        q_before += q;
    }
    sum.min(1.0)
}

fn mass(law: &Law) -> f64 {
    law.entries().iter().map(|e| f64::from(e.1)).sum()
}

/// The tokens of p with their probabilities in p and in q.
fn beside<'a>(p: &'a Law, q: &'a Law) -> impl Iterator<Item = (TokenId, f64, f64)> + Clone + 'a {
    let mut rest = q.entries();
    p.entries().iter().map(move |&(token, p)| {
        let passed = rest.iter().take_while(|e| e.0 < token).count();
        rest = &rest[passed..];
        let q = rest.first().filter(|e| e.0 == token).map_or(0.0, |e| e.1);
        (token, f64::from(p), f64::from(q))
    })
}

#[cfg(test)]
#[path = "rejection_tests.rs"]
mod tests;
