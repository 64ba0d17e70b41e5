//! What a caller asks of the engine and what it hears back.
//!
//! Token ids only: text is turned into ids by [`crate::tokenizer`] before, and back by
//! [`crate::stream`] after.

use crate::grammar::Guide;
use crate::logprobs::{LogprobsWanted, TOP_MAX, TokenLogprob};
use crate::sampler::SamplingParams;
use crate::speculation::SpeculationCounts;
use kernels::program::TokenId;

/// Names a request for as long as the engine lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One sequence to continue.
#[derive(Debug, Clone)]
pub struct Request {
    /// Prompt, at least one token.
    pub prompt: Vec<TokenId>,
    /// Most tokens to generate, at least one; generation also ends at the context's end.
    pub max_tokens: u32,
    /// Tokens that end the sequence (the end token is emitted, then [`FinishReason::Stop`]).
    pub stop_tokens: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// What the generated text must look like; ends with it. At its beginning when submitted.
    pub guide: Option<Guide>,
    /// Which probabilities are reported.
    pub logprobs: Option<LogprobsWanted>,
    /// Requests of a larger one go first and are preempted last; equals go in order of arrival.
    pub priority: i32,
}

impl Request {
    /// Continues `prompt` greedily by `max_tokens` tokens and reports nothing but them.
    pub fn new(prompt: Vec<TokenId>, max_tokens: u32) -> Self {
        let (stop_tokens, sampling) = (Vec::new(), SamplingParams::greedy());
        let (guide, logprobs, priority) = (None, None, 0);
        Self { prompt, max_tokens, stop_tokens, sampling, guide, logprobs, priority }
    }

    /// Whether more probabilities are asked for than are ever reported.
    pub(crate) fn check_logprobs(&self) -> Result<(), Rejected> {
        match self.logprobs {
            Some(LogprobsWanted { top, .. }) if top > TOP_MAX => Err(Rejected::Parameter {
                parameter: "logprobs",
                found: top.to_string(),
                expected: "0 to 20",
            }),
            _ => Ok(()),
        }
    }
}

/// What happened to a request during a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// How likely a token of the prompt was, where that was asked for: all but the first, in
    /// order, before the first generated one.
    Prompt {
        /// Whose.
        id: RequestId,
        /// Its figures.
        logprob: TokenLogprob,
    },
    /// A token was generated.
    Token {
        /// Whose.
        id: RequestId,
        /// Which.
        token: TokenId,
        /// How it came about.
        source: TokenSource,
        /// How likely it was, where that was asked for.
        logprob: Option<TokenLogprob>,
    },
    /// No more tokens will come.
    Finished {
        /// Whose.
        id: RequestId,
        /// Why.
        reason: FinishReason,
        /// What guessing ahead did for it.
        speculation: SpeculationCounts,
        /// Tokens of the prompt that were computed for others before.
        cached_tokens: usize,
    },
    /// The request failed; no more tokens will come.
    Failed {
        /// Whose.
        id: RequestId,
        /// Why, in a sentence.
        reason: String,
    },
}

/// How a token came about; the token itself is the verifier's choice in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenSource {
    /// Chosen by the verifier in a step in which nothing was proposed.
    Plain,
    /// Proposed by a drafter and accepted.
    Drafted,
    /// Chosen where the proposed token was not accepted.
    Corrected,
    /// Chosen after all proposed tokens were accepted.
    Bonus,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, or a grammar in which nothing can follow (or, decided by the caller, a stop
    /// string).
    Stop,
    /// The token limit or the end of the context.
    Length,
    /// The caller cancelled it.
    Cancelled,
}

impl FinishReason {
    /// The OpenAI API's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Why a request was not accepted; every one of these reaches the caller.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    /// Nothing to continue.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    /// A zero limit.
    #[error("max_tokens is 0: ask for at least one token")]
    NoTokens,
    /// The prompt leaves no room for a token.
    #[error("the prompt has {prompt} tokens, but the context holds {context} including at least one new token: shorten the prompt by {}", prompt + 1 - context)]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// A sequence to evaluate is longer than the context.
    #[error("the sequence has {tokens} tokens, but the context holds {context}: shorten it by {}", tokens - context)]
    TooLong {
        /// Tokens of the sequence.
        tokens: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// A token id beyond the vocabulary.
    #[error("token id {token} at position {position} is outside the vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Where in the prompt (or in `logit_bias`).
        position: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A sampling parameter is outside its range.
    #[error("{parameter} is {found}, expected {expected}")]
    Parameter {
        /// Its API name.
        parameter: &'static str,
        /// Value found.
        found: String,
        /// Allowed range.
        expected: &'static str,
    },
    /// Probabilities of prompt tokens are asked of an engine without room for them.
    #[error(
        "this engine computes no probabilities of prompt tokens: ask for those of generated tokens alone"
    )]
    PromptNotScored,
    /// The prompt needs more KV blocks than there are.
    #[error(
        "the prompt has {prompt} tokens, but the KV cache holds {positions}: shorten the prompt or give the KV cache more memory"
    )]
    PromptExceedsKv {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens that all KV blocks hold.
        positions: usize,
    },
    /// The waiting queue is full.
    #[error("the queue is full: {waiting} requests are waiting; try again later")]
    QueueFull {
        /// Requests that wait.
        waiting: usize,
    },
}
