//! Figures of an answer: tokens it took, and numbers that JSON can say.

use serde::Serialize;
use utoipa::ToSchema;

/// What stands for minus infinity, which JSON lacks; the number that vLLM sends.
const IMPOSSIBLE: f64 = -9999.0;

/// A log-probability for JSON: wherever one figure is sent twice, it is the same number.
pub(crate) fn finite(logprob: f32) -> f64 {
    f64::from(logprob).max(IMPOSSIBLE)
}

/// Tokens of a request and its answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Usage {
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Generated tokens.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// Known once the answer is complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Where tokens of prompts came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct PromptTokensDetails {
    /// Tokens that were computed for other requests before.
    pub cached_tokens: usize,
}

impl Usage {
    /// Of so many tokens.
    pub(crate) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        Self { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details: None }
    }

    /// The same, of a complete answer.
    pub(crate) fn cached(self, cached_tokens: usize) -> Self {
        Self { prompt_tokens_details: Some(PromptTokensDetails { cached_tokens }), ..self }
    }
}
