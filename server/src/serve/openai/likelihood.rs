//! Log-probabilities as chats tell them: one object a token.
//!
//! Input: the engine's figures. Not here: the form of completions ([`super::completions`]).

use super::super::app::Served;
use super::super::error::ApiError;
use super::super::worker::Token;
use super::usage::finite;
use engine::logprobs::TokenLogprob;
use kernels::program::TokenId;
use serde::Serialize;
use utoipa::ToSchema;

/// How likely the tokens of an answer were.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    /// One entry a token.
    pub content: Vec<ChatLogprob>,
}

/// How likely a token was.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatLogprob {
    #[serde(flatten)]
    own: Likelihood,
    /// The likeliest tokens at its place, likeliest first.
    top_logprobs: Vec<Likelihood>,
}

/// A token and its log-probability.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct Likelihood {
    /// Its text; half a character is U+FFFD.
    token: String,
    logprob: f64,
    /// The text's bytes; null for half a character.
    bytes: Option<Vec<u8>>,
}

impl ChatLogprobs {
    /// What is known of `tokens`; none if nothing is.
    pub(crate) fn of(tokens: &[Token], served: &Served) -> Result<Option<Self>, ApiError> {
        let known = tokens.iter().filter_map(|token| Some((token.id, token.logprob.as_ref()?)));
        let content = known.map(|(token, known)| entry(token, known, served));
        let content = content.collect::<Result<Vec<_>, _>>()?;
        Ok((!content.is_empty()).then_some(Self { content }))
    }
}

fn entry(token: TokenId, known: &TokenLogprob, served: &Served) -> Result<ChatLogprob, ApiError> {
    let top = known.top.iter().map(|&(other, logprob)| likelihood(other, logprob, served));
    let top_logprobs = top.collect::<Result<_, _>>()?;
    Ok(ChatLogprob { own: likelihood(token, known.logprob, served)?, top_logprobs })
}

fn likelihood(token: TokenId, logprob: f32, served: &Served) -> Result<Likelihood, ApiError> {
    let token = served.token_text(token)?;
    let bytes = (!token.contains('\u{fffd}')).then(|| token.as_bytes().to_vec());
    Ok(Likelihood { token, logprob: finite(logprob), bytes })
}
