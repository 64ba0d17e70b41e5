//! What an answer tells beside its text where its client asks: acceptance, times, and which text
//! was guessed ahead.
//!
//! Input: the deltas of all choices of a request. Two calls serve an endpoint: [`Report::book`] for
//! each delta, [`Report::figures`] at the end. The names are those that vLLM's clients
//! (`metrics.speculative_decoding`) and llama.cpp's (`timings`) read. Not here: sums over all
//! requests ([`super::super::metrics`]).

use super::super::app::Served;
use super::super::generation::Delta;
use axum::http::HeaderMap;
use engine::request::TokenSource;
use engine::speculation::SpeculationCounts;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use utoipa::ToSchema;

/// Header that asks for figures like the field `metrics`, for clients that cannot add fields.
const HEADER: &str = "x-foretoken-metrics";

/// What a client wants told; null counts as absent.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
pub(crate) struct Wanted {
    /// Whether the answer tells `metrics` and `timings`; a stream tells them in its last piece.
    pub metrics: Option<bool>,
    /// Whether each choice tells by `provenance` how its text came about.
    pub provenance: Option<bool>,
}

/// Text and how the token that completed it came about; all of a choice's joined are its generated
/// text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Provenance {
    text: String,
    /// `plain`, `drafted`, `corrected` or `bonus`.
    source: &'static str,
}

/// Figures of an answer; nothing where nobody asked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct Figures {
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<RequestMetrics>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Timings>,
}

#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct RequestMetrics {
    /// Absent where the server has no draft.
    #[serde(skip_serializing_if = "Option::is_none")]
    speculative_decoding: Option<Acceptance>,
}

/// What guessing ahead did for all choices of a request.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct Acceptance {
    /// Tokens that a step with proposed tokens gave on average, its own one included; at least 1.
    mean_acceptance_length: f64,
    /// Share of the proposed tokens that were accepted; 0 where none was proposed.
    draft_acceptance_rate: f64,
    /// Steps by how many proposed tokens they accepted, from 0 to `num_spec_tokens`.
    acceptance_histogram: Vec<u64>,
    /// Steps in which proposed tokens were verified.
    num_spec_steps: u64,
    num_accepted_draft_tokens: u64,
    num_draft_tokens: u64,
    /// Most tokens that are proposed in a step.
    num_spec_tokens: usize,
}

/// Where a request's time went. Choices are computed side by side: tokens are counted over all of
/// them, times are those of the slowest.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct Timings {
    /// Tokens of all prompts.
    prompt_n: usize,
    /// From arrival to the first token, waiting included.
    prompt_ms: f64,
    prompt_per_second: f64,
    /// Generated tokens.
    predicted_n: u64,
    /// From the first token to the end.
    predicted_ms: f64,
    /// Of the tokens after the first.
    predicted_per_second: f64,
    /// Tokens proposed.
    draft_n: u64,
    draft_n_accepted: u64,
}

/// What is known of a request so far.
#[derive(Debug)]
pub(crate) struct Report {
    metrics: bool,
    provenance: bool,
    /// Most tokens proposed in a step.
    budget: usize,
    counts: SpeculationCounts,
    accepted_in: Vec<u64>,
    choices: u64,
    tokens: u64,
    prompt: Duration,
    decode: Duration,
}

impl Report {
    /// Nothing yet of a request with these wishes.
    pub(crate) fn new(wanted: Wanted, headers: &HeaderMap, served: &Served) -> Self {
        let header = headers.get(HEADER).is_some_and(|value| value == "1" || value == "true");
        let budget = served.config.max_drafted;
        Self {
            metrics: wanted.metrics.unwrap_or(header),
            provenance: wanted.provenance == Some(true),
            budget,
            counts: SpeculationCounts::default(),
            accepted_in: vec![0; budget + 1],
            choices: 0,
            tokens: 0,
            prompt: Duration::ZERO,
            decode: Duration::ZERO,
        }
    }

    /// Takes in what came of a choice; how its text came about, where that is wanted.
    pub(crate) fn book(&mut self, delta: &Delta) -> Option<Vec<Provenance>> {
        self.tokens += delta.tokens.len() as u64;
        if let Some(finish) = &delta.finish {
            self.choices += 1;
            self.counts.cycles += finish.speculation.cycles;
            self.counts.drafted_tokens += finish.speculation.drafted_tokens;
            self.counts.accepted_tokens += finish.speculation.accepted_tokens;
            self.accepted_in.iter_mut().zip(&finish.accepted_in).for_each(|(sum, n)| *sum += n);
            self.prompt = self.prompt.max(finish.times.prompt);
            self.decode = self.decode.max(finish.times.decode);
        }
        let told = |(text, source): &(String, TokenSource)| Provenance {
            text: text.clone(),
            source: source_name(*source),
        };
        self.provenance.then(|| delta.pieces.iter().map(told).collect())
    }

    /// Whether figures are wanted, so that a stream ends with a piece that tells them.
    pub(crate) fn wants_figures(&self) -> bool {
        self.metrics
    }

    /// What came of all choices, where that is wanted; `prompt_tokens` are those of all prompts.
    pub(crate) fn figures(&self, prompt_tokens: usize) -> Figures {
        if !self.metrics {
            return Figures::default();
        }
        let speculative_decoding = (self.budget > 0).then(|| self.acceptance());
        let metrics = Some(RequestMetrics { speculative_decoding });
        Figures { metrics, timings: Some(self.timings(prompt_tokens)) }
    }

    fn acceptance(&self) -> Acceptance {
        let SpeculationCounts { cycles, drafted_tokens, accepted_tokens } = self.counts;
        Acceptance {
            mean_acceptance_length: 1.0 + ratio(accepted_tokens as f64, cycles as f64),
            draft_acceptance_rate: ratio(accepted_tokens as f64, drafted_tokens as f64),
            acceptance_histogram: self.accepted_in.clone(),
            num_spec_steps: cycles,
            num_accepted_draft_tokens: accepted_tokens,
            num_draft_tokens: drafted_tokens,
            num_spec_tokens: self.budget,
        }
    }

    fn timings(&self, prompt_n: usize) -> Timings {
        let (prompt, decode) = (self.prompt.as_secs_f64(), self.decode.as_secs_f64());
        let later = self.tokens.saturating_sub(self.choices);
        Timings {
            prompt_n,
            prompt_ms: prompt * 1e3,
            prompt_per_second: ratio(prompt_n as f64, prompt),
            predicted_n: self.tokens,
            predicted_ms: decode * 1e3,
            predicted_per_second: ratio(later as f64, decode),
            draft_n: self.counts.drafted_tokens,
            draft_n_accepted: self.counts.accepted_tokens,
        }
    }
}

/// 0 of nothing: JSON has no word for what is not a number.
fn ratio(part: f64, all: f64) -> f64 {
    if all > 0.0 { part / all } else { 0.0 }
}

fn source_name(source: TokenSource) -> &'static str {
    match source {
        TokenSource::Plain => "plain",
        TokenSource::Drafted => "drafted",
        TokenSource::Corrected => "corrected",
        TokenSource::Bonus => "bonus",
    }
}
