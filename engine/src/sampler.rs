//! Choosing a token: a pure function of (logits, history, parameters, seed, position).

/// Sampling parameters by their API names; defaults are those of greedy-free plain sampling.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. Range 0..=100.
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose mass reaches p. Range 0 < p <= 1; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the likeliest. Range 0..=1; 0 keeps all.
    pub min_p: f32,
    /// Locally typical sampling's mass. Range 0 < p <= 1; 1 keeps all.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of seen tokens (prompt and generated). 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once for each time a token was generated. Range -2..=2; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from tokens that were generated at all. Range -2..=2; 0 is off.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(kernels::program::TokenId, f32)>,
    /// Seed of the noise.
    pub seed: u64,
}
