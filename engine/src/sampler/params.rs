//! Sampling parameters and their ranges.
//!
//! Not here: the parameters' arithmetic ([`super::adjust`], [`super::filter`]), their JSON.

use crate::request::Rejected;
use kernels::program::TokenId;

/// Sampling parameters by their API names; the default is plain sampling at temperature 1.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. Range 0..=100.
    pub temperature: f32,
    /// Keep the k likeliest tokens and those that tie with the last of them; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose mass reaches p. Range 0 < p <= 1; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the likeliest. Range 0..=1; 0 keeps all.
    pub min_p: f32,
    /// Locally typical sampling's mass. Range 0 < p <= 1; 1 keeps all.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of seen tokens (prompt and generated).
    /// Range 0.01..=100; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once for each time a token was generated. Range -2..=2; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from tokens that were generated at all. Range -2..=2; 0 is off.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens. Range -100..=100 each.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Tokens that must be generated before one of `end_tokens` may be.
    pub min_tokens: u32,
    /// What `min_tokens` holds back.
    pub end_tokens: Vec<TokenId>,
    /// Seed of the noise.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            end_tokens: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// The default with temperature 0: always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks every range; NaN is in none.
    ///
    /// # Errors
    /// [`Rejected::Parameter`] names the first parameter that is outside.
    pub fn validate(&self) -> Result<(), Rejected> {
        let mass = |p: f32| p > 0.0 && p <= 1.0;
        let penalty = |p: f32| (-2.0..=2.0).contains(&p);
        let (t, r) = (self.temperature, self.repetition_penalty);
        check("temperature", t, (0.0..=100.0).contains(&t), "0 to 100")?;
        check("top_p", self.top_p, mass(self.top_p), "above 0, at most 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1")?;
        check("typical_p", self.typical_p, mass(self.typical_p), "above 0, at most 1")?;
        check("repetition_penalty", r, (0.01..=100.0).contains(&r), "0.01 to 100")?;
        let (frequency, presence) = (self.frequency_penalty, self.presence_penalty);
        check("frequency_penalty", frequency, penalty(frequency), "-2 to 2")?;
        check("presence_penalty", presence, penalty(presence), "-2 to 2")?;
        let bias = |&(_, b): &(TokenId, f32)| {
            check("logit_bias", b, (-100.0..=100.0).contains(&b), "-100 to 100")
        };
        self.logit_bias.iter().try_for_each(bias)
    }

    /// Whether logits change before they are compared at all.
    pub(super) fn adjusts(&self, generated: usize) -> bool {
        self.holds_back(generated)
            || !self.logit_bias.is_empty()
            || self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
    }

    /// Whether the token after `generated` others may not be one that ends the sequence.
    pub(super) fn holds_back(&self, generated: usize) -> bool {
        generated < self.min_tokens as usize && !self.end_tokens.is_empty()
    }

    /// Whether tokens are removed before one is drawn.
    pub(super) fn filters(&self) -> bool {
        self.top_k != 0 || self.top_p < 1.0 || self.min_p > 0.0 || self.typical_p < 1.0
    }
}

fn check(
    parameter: &'static str,
    found: f32,
    holds: bool,
    expected: &'static str,
) -> Result<(), Rejected> {
    if holds {
        return Ok(());
    }
    Err(Rejected::Parameter { parameter, found: found.to_string(), expected })
}
