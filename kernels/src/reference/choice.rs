//! What a [`Draw`] means, in scalar code.
//!
//! Not here: which parameters of a request lead to a draw (the engine's sampler). Input: a row of
//! logits.

use crate::Draw;
use crate::program::TokenId;

/// The token that `draw` chooses of a row of logits `[v]`.
///
/// None where a logit is NaN or plus infinity, or no logit is above minus infinity.
pub fn choose(logits_v: &[f32], draw: Draw) -> Option<TokenId> {
    let largest = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !largest.is_finite() || logits_v.iter().any(|logit| logit.is_nan()) {
        return None;
    }
    let mut best = (f64::NEG_INFINITY, None);
    for (token, &logit) in (0..).map(TokenId).zip(logits_v) {
        let score = match draw.temperature {
            0.0 => f64::from(logit),
            1.0 => f64::from(logit) + noise(draw.key, token),
            temperature => f64::from((logit - largest) / temperature) + noise(draw.key, token),
        };
        if score > best.0 {
            best = (score, Some(token));
        }
    }
    best.1
}

/// Standard Gumbel noise of a token.
fn noise(key: u64, token: TokenId) -> f64 {
    let x = (key ^ u64::from(token.0)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let w = (((z ^ (z >> 31)) >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
    -(-(-w).ln_1p()).ln()
}
