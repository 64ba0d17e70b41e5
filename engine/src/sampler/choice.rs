//! The choice itself: the largest logit, or the largest sum of logit and noise.
//!
//! A row is taken in blocks: the greatest logit of a block, and the least bits of its noise, tell
//! whether any of its tokens can win, which few blocks survive. Loops over lanes have no order to
//! keep, so that the compiler makes vectors of them. Not here: which tokens may be chosen
//! ([`super::filter`]), the noise as a function ([`super::noise`]). Input: a row of a runner's
//! logits, or what filters left of it.

use super::LogitsError;
use super::filter::Candidate;
use super::noise::{self, NoiseKey};
use kernels::program::TokenId;

/// Logits compared at once.
const LANES: usize = 16;
/// Logits of a block where they are compared: its tokens are looked at again where it wins.
const COMPARED: usize = 256;
/// Tokens of a block where they are drawn: the fewer, the more blocks have no chance.
const DRAWN: usize = 32;

/// The token of the largest logit, the lowest id among equals.
pub(super) fn argmax(logits_v: &[f32]) -> Result<TokenId, LogitsError> {
    let (mut most, mut first) = (f32::NEG_INFINITY, None);
    for (block, logits) in logits_v.chunks(COMPARED).enumerate() {
        let greatest = greatest(logits);
        if greatest > most {
            (most, first) = (greatest, Some((block * COMPARED, logits)));
        }
    }
    let (start, logits) = first.ok_or(LogitsError::NoCandidate)?;
    let stands_out = |logit: &f32| *logit == most || logit.is_nan();
    let token = (start + logits.iter().position(stands_out).unwrap_or(0)) as u32;
    match most {
        f32::INFINITY => Err(LogitsError::NotFinite { token }),
        _ => Ok(TokenId(token)),
    }
}

/// The greatest of some logits; plus infinity if one is NaN, minus infinity if there is none.
fn greatest(logits: &[f32]) -> f32 {
    let (mut most, mut wrong) = ([f32::NEG_INFINITY; LANES], [false; LANES]);
    let (vectors, rest) = logits.as_chunks::<LANES>();
    for vector in vectors {
        for (lane, &logit) in vector.iter().enumerate() {
            most[lane] = if logit > most[lane] { logit } else { most[lane] };
            wrong[lane] |= logit.is_nan();
        }
    }
    if wrong.contains(&true) || rest.iter().any(|logit| logit.is_nan()) {
        return f32::INFINITY;
    }
    most.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// The token of the largest score so far, the lowest id among equals.
struct Winner {
    token: TokenId,
    score: f64,
}

impl Winner {
    /// Nobody yet: any score wins against it.
    const NONE: Self = Self { token: TokenId(u32::MAX), score: f64::NEG_INFINITY };

    fn challenge(&mut self, token: TokenId, logit: f64, bits: u64) {
        // Most lose even with the most noise these bits can give: no logarithm for them.
        if logit + noise::gumbel_max(bits) < self.score {
            return;
        }
        let score = logit + noise::gumbel(bits);
        if score > self.score || (score == self.score && token < self.token) {
            (self.token, self.score) = (token, score);
        }
    }
}

/// The candidate of the largest `logit + noise`, in f64; the order of candidates does not matter.
pub(super) fn draw(kept: &[Candidate], key: NoiseKey) -> Option<TokenId> {
    let mut winner = Winner::NONE;
    for candidate in kept {
        let bits = key.bits(candidate.token);
        winner.challenge(candidate.token, f64::from(candidate.logit), bits);
    }
    (!kept.is_empty()).then_some(winner.token)
}

/// What [`draw`] chooses of a whole row, no token of which was removed, divided by `temperature`
/// as [`super::filter::temperature`] does.
pub(super) fn draw_row(
    logits_v: &[f32],
    temperature: f32,
    key: NoiseKey,
) -> Result<TokenId, LogitsError> {
    let top = argmax(logits_v)?;
    let most = logits_v[top.index()];
    let scaled = |logit: f32| match temperature {
        1.0 => f64::from(logit),
        _ => f64::from((logit - most) / temperature),
    };
    // The likeliest token goes first: few others can win then.
    let mut winner = Winner::NONE;
    winner.challenge(top, scaled(most), key.bits(top));
    for (start, logits) in (0u32..).step_by(DRAWN).zip(logits_v.chunks(DRAWN)) {
        let missing = winner.score - scaled(greatest(logits));
        let Some(most_bits) = noise::most_bits(missing) else { continue };
        for (token, &logit) in (start..).map(TokenId).zip(logits) {
            let bits = key.bits(token);
            if bits <= most_bits {
                winner.challenge(token, scaled(logit), bits);
            }
        }
    }
    Ok(winner.token)
}
