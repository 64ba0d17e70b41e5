//! Gumbel noise as a function of (seed, position, token id): no generator, no state.
//!
//! The same triple gives the same noise whatever else was sampled before, so a drafter and its
//! verifier, or a recomputed sequence, draw alike. Integer part, for anyone who must repeat it:
//! `next(x) = mix(x + 0x9e3779b97f4a7c15)` with wrapping 64-bit arithmetic, where `mix` is the
//! finaliser of SplitMix64 (shifts 30, 27, 31);
//! `bits = next(next(next(seed) ^ position ^ stream * 2^32) ^ token)`, stream 0 for all plain choices;
//! `w = ((bits >> 12) + 0.5) / 2^52`, exact in f64 and inside (0, 1); `noise = -ln(-ln(1 - w))`.

use kernels::program::TokenId;

/// What a noise is for. Positions have 32 bits and streams the bits above them, so all streams of
/// a seed have different keys, and their noises are as independent as those of two positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The choice of a token from the model's own law, and whatever shall share its noise.
    Choice = 0,
    /// A drafter's own choice, where it must not share the model's noise.
    Draft = 1,
    /// The coin that accepts or rejects a drafted token.
    Coin = 2,
    /// The choice that replaces a rejected token.
    Residual = 3,
}

/// The noise of one position of one seed, for one purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoiseKey(u64);

impl NoiseKey {
    /// [`Stream::Choice`]; `position` is that of the token to be chosen.
    pub fn new(seed: u64, position: u32) -> Self {
        Self::of(Stream::Choice, seed, position)
    }

    /// The key of any stream; `position` is that of the token to be chosen.
    pub fn of(stream: Stream, seed: u64, position: u32) -> Self {
        Self(next(next(seed) ^ u64::from(position) ^ ((stream as u64) << 32)))
    }

    /// The key as a number: what else makes this noise starts from it.
    pub fn value(self) -> u64 {
        self.0
    }

    /// 64 uniform bits for `token`.
    pub fn bits(self, token: TokenId) -> u64 {
        next(self.0 ^ u64::from(token.0))
    }

    /// One number, uniform inside (0, 1), in steps of 2^-52: from the bits of token 0.
    pub fn uniform(self) -> f64 {
        unit(self.bits(TokenId(0)))
    }
}

/// Standard Gumbel noise from uniform bits, between -3.6 and 36.8.
pub fn gumbel(bits: u64) -> f64 {
    -(-(-unit(bits)).ln_1p()).ln()
}

/// A cheap upper bound of [`gumbel`] of the same bits: with z leading zeros `w >= 2^-(z + 1)`, and
/// `-ln(1 - w) >= w`. The last term is far above the rounding of either side.
pub fn gumbel_max(bits: u64) -> f64 {
    f64::from(bits.leading_zeros().min(52) + 1) * std::f64::consts::LN_2 + 1e-9
}

/// The most bits of which [`gumbel_max`] may reach `noise`, which is not NaN; none if it never
/// does. The slack of 0.002 zeros is far above all rounding.
pub(super) fn most_bits(noise: f64) -> Option<u64> {
    let zeros = (noise / std::f64::consts::LN_2 - 0.002) as u32;
    (zeros <= 52).then(|| u64::MAX >> zeros)
}

/// `w` of the module's text.
fn unit(bits: u64) -> f64 {
    ((bits >> 12) as f64 + 0.5) / (1u64 << 52) as f64
}

fn next(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
