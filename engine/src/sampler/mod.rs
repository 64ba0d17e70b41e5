//! Choosing a token: a pure function of (logits, history, parameters, position).
//!
//! Order of the transforms: logit bias, repetition penalty (prompt and generated tokens), frequency
//! and presence penalty (generated tokens), temperature, top-k, top-p, min-p, typical. This is the
//! order of transformers; vLLM differs in one place, it applies min-p before top-k and top-p. Greedy
//! choice (temperature 0) sees the bias and the penalties and no filter.
//!
//! Not here: which sequence a row belongs to, stop tokens, text. Logits come from a runner's
//! output, history from [`crate::sequence`]. Each transform is public in [`adjust`] or [`filter`];
//! [`noise`] holds the randomness, [`Law`] the probabilities that are drawn from.

pub mod adjust;
mod choice;
pub mod filter;
pub(crate) mod law;
pub mod noise;
mod params;
#[cfg(test)]
mod tests;

pub use law::Law;
pub use params::SamplingParams;

use adjust::Tally;
use filter::Candidate;
use kernels::Draw;
use kernels::program::TokenId;
use noise::NoiseKey;

/// The tokens of a sequence so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct History<'a> {
    /// Tokens of the prompt.
    pub prompt: &'a [TokenId],
    /// Tokens generated after it.
    pub generated: &'a [TokenId],
}

/// Why no token can be chosen from a row of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LogitsError {
    /// A logit (or its value after bias and penalties) is NaN or plus infinity.
    #[error("the logit of token {token} is not a number or plus infinity")]
    NotFinite {
        /// The lowest such token.
        token: u32,
    },
    /// No logit is above minus infinity (or there is none at all).
    #[error("all logits are minus infinity, so no token can be chosen")]
    NoCandidate,
}

/// Chooses the token at `position` (the new token's own position in its sequence) from its row of
/// logits: the pure form of [`Sampler::sample`], which says more.
///
/// # Errors
/// A row without a finite maximum.
pub fn sample(
    logits_v: &[f32],
    history: &History<'_>,
    params: &SamplingParams,
    position: u32,
) -> Result<TokenId, LogitsError> {
    Sampler::default().sample(logits_v, history, params, position)
}

/// [`sample`] as a rule that needs nothing but the logits, so that a device may follow it: for the
/// token at `position`, after `generated` others; none where parameters ask for more than that.
pub fn draw(params: &SamplingParams, generated: usize, position: u32) -> Option<Draw> {
    let temperature = params.temperature;
    let plain = !params.adjusts(generated) && (temperature == 0.0 || !params.filters());
    plain.then(|| Draw { key: NoiseKey::new(params.seed, position).value(), temperature })
}

/// Every token that may be chosen with its probability, likeliest first, ties by ascending id:
/// the law that [`sample`] draws from. Greedy parameters give one token of probability 1.
///
/// # Errors
/// A row without a finite maximum.
pub fn candidates(
    logits_v: &[f32],
    history: &History<'_>,
    params: &SamplingParams,
) -> Result<Vec<(TokenId, f32)>, LogitsError> {
    let mut sampler = Sampler::default();
    if params.temperature == 0.0 {
        return Ok(vec![(sampler.sample(logits_v, history, params, 0)?, 1.0)]);
    }
    sampler.fill_kept(logits_v, history, params)?;
    Ok(filter::probabilities(&mut sampler.kept))
}

/// [`sample`] with memory that is reused from call to call; holds no state between calls.
#[derive(Debug, Default)]
pub struct Sampler {
    row_v: Vec<f32>,
    tally: Tally,
    kept: Vec<Candidate>,
}

impl Sampler {
    /// Chooses the token at `position` from the logits `[v]` computed one position before it.
    ///
    /// Greedy: the largest logit, ties to the lowest id. Otherwise the candidate with the largest
    /// `logit + noise` (Gumbel-max: a draw with the candidates' probabilities), where the noise is
    /// a function of (seed, position, token id) alone, ties to the lowest id. `params` must have
    /// passed [`SamplingParams::validate`]; tokens of the history beyond the row are ignored.
    ///
    /// # Errors
    /// A row without a finite maximum.
    pub fn sample(
        &mut self,
        logits_v: &[f32],
        history: &History<'_>,
        params: &SamplingParams,
        position: u32,
    ) -> Result<TokenId, LogitsError> {
        if params.temperature == 0.0 {
            return choice::argmax(self.adjusted(logits_v, history, params));
        }
        let key = NoiseKey::new(params.seed, position);
        if !params.filters() {
            let row_v = self.adjusted(logits_v, history, params);
            return choice::draw_row(row_v, params.temperature, key);
        }
        self.fill_kept(logits_v, history, params)?;
        choice::draw(&self.kept, key).ok_or(LogitsError::NoCandidate)
    }

    /// Refills `out` with the law that [`Sampler::sample`] draws from: [`candidates`] by ascending
    /// id, without tokens whose probability rounds to 0. Allocates only where `out` must grow.
    ///
    /// # Errors
    /// A row without a finite maximum; `out` stays as it was.
    pub fn law(
        &mut self,
        logits_v: &[f32],
        history: &History<'_>,
        params: &SamplingParams,
        out: &mut Law,
    ) -> Result<(), LogitsError> {
        if params.temperature == 0.0 {
            out.refill([(choice::argmax(self.adjusted(logits_v, history, params))?, 1.0)]);
            return Ok(());
        }
        self.fill_kept(logits_v, history, params)?;
        filter::fill_law(&mut self.kept, out);
        Ok(())
    }

    /// The row after bias and penalties; the row itself where there are none.
    fn adjusted<'a>(
        &'a mut self,
        logits_v: &'a [f32],
        history: &History<'_>,
        params: &SamplingParams,
    ) -> &'a [f32] {
        let generated = history.generated.len();
        if !params.adjusts(generated) {
            return logits_v;
        }
        let Self { row_v, tally, .. } = self;
        row_v.clear();
        row_v.extend_from_slice(logits_v);
        adjust::logit_bias(row_v, &params.logit_bias);
        adjust::repetition(row_v, history, params.repetition_penalty, tally);
        let (frequency, presence) = (params.frequency_penalty, params.presence_penalty);
        adjust::frequency_presence(row_v, history.generated, frequency, presence, tally);
        if params.holds_back(generated) {
            adjust::ban(row_v, &params.end_tokens);
        }
        row_v
    }

    /// Leaves the candidates that survive every transform in `self.kept`.
    fn fill_kept(
        &mut self,
        logits_v: &[f32],
        history: &History<'_>,
        params: &SamplingParams,
    ) -> Result<(), LogitsError> {
        let mut kept = std::mem::take(&mut self.kept);
        let gathered = filter::gather(self.adjusted(logits_v, history, params), &mut kept);
        self.kept = kept;
        gathered?;
        filter::temperature(&mut self.kept, params.temperature);
        filter::top_k(&mut self.kept, params.top_k as usize);
        filter::top_p(&mut self.kept, params.top_p);
        filter::min_p(&mut self.kept, params.min_p);
        filter::typical_p(&mut self.kept, params.typical_p);
        Ok(())
    }
}
