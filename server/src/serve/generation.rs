//! One continuation on its way to a client: tokens become text, stop strings end it.
//!
//! Input: updates of the worker. Output: [`Delta`]s, which every endpoint writes in its own form.
//! Not here: JSON, HTTP, where requests come from ([`super::openai`]).

use super::error::ApiError;
use super::worker::{Ending, Handle, Times, Token, Update, Updates};
use engine::logprobs::TokenLogprob;
use engine::request::{FinishReason, Request};
use engine::speculation::SpeculationCounts;
use engine::stream::TextStream;
use engine::tokenizer::Tokenizer;
use std::sync::Arc;

/// What has come since the last one.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    /// How likely tokens of the prompt were, in order.
    pub prompt: Vec<TokenLogprob>,
    /// Text that is final; what a stop string may begin is held back.
    pub text: String,
    /// The tokens that were generated.
    pub tokens: Vec<Token>,
    /// Set in the last one.
    pub finish: Option<Finish>,
}

/// How a continuation ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Finish {
    /// `stop` or `length`.
    pub reason: FinishReason,
    pub speculation: SpeculationCounts,
    pub accepted_in: Vec<u64>,
    pub times: Times,
    /// Tokens of the prompt that were computed for others before.
    pub cached_tokens: usize,
}

/// A continuation that is being computed; dropping it cancels it.
#[derive(Debug)]
pub(crate) struct Generation {
    updates: Updates,
    text: Option<TextStream<Arc<Tokenizer>>>,
    /// A stop string was found; what the engine computes until it hears so is not counted.
    stopped: bool,
    ended: bool,
}

impl Generation {
    /// Has `request` computed; its text, if there is a tokenizer, ends before the first of the
    /// `stop` strings.
    pub(crate) async fn start(
        handle: &Handle,
        request: Request,
        tokenizer: Option<Arc<Tokenizer>>,
        stop: Vec<String>,
    ) -> Result<Self, ApiError> {
        let text = tokenizer.map(|t| TextStream::new(t, stop).after(&request.prompt)).transpose();
        let text = text.map_err(|e| ApiError::invalid(e.to_string()))?;
        let updates = handle.submit(request).await?;
        Ok(Self { updates, text, stopped: false, ended: false })
    }

    /// The next piece; none after the one with a [`Finish`].
    pub(crate) async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        while !self.ended {
            match self.updates.next().await {
                Some(Update::Prompt(prompt)) => {
                    return Ok(Some(Delta { prompt, ..Delta::default() }));
                }
                Some(Update::Tokens(_)) if self.stopped => {}
                Some(Update::Tokens(tokens)) => return self.take(tokens).map(Some),
                Some(Update::Ended(ending)) => return self.end(ending).map(Some),
                Some(Update::Failed(reason)) => return Err(ApiError::failed(reason)),
                None => return Err(ApiError::unavailable("the server stopped before the end")),
            }
        }
        Ok(None)
    }

    fn take(&mut self, tokens: Vec<Token>) -> Result<Delta, ApiError> {
        let mut delta = Delta::default();
        for token in tokens {
            let piece = self.text.as_mut().map(|text| text.push(token.id)).transpose();
            let piece = piece.map_err(|e| ApiError::failed(e.to_string()))?.unwrap_or_default();
            delta.text += &piece.text;
            delta.tokens.push(token);
            if piece.stopped {
                self.stopped = true;
                self.updates.cancel();
                break;
            }
        }
        Ok(delta)
    }

    fn end(&mut self, ending: Ending) -> Result<Delta, ApiError> {
        self.ended = true;
        let rest = self.text.as_mut().map(TextStream::finish).transpose();
        let text = rest.map_err(|e| ApiError::failed(e.to_string()))?.unwrap_or_default();
        let Ending { reason, speculation, accepted_in, times, cached_tokens } = ending;
        let reason = match (self.stopped, reason) {
            (true, _) => FinishReason::Stop,
            // Only a server that stops cancels what its client still waits for.
            (false, FinishReason::Cancelled) => {
                return Err(ApiError::unavailable("the server stopped before the end"));
            }
            (false, reason) => reason,
        };
        let finish = Some(Finish { reason, speculation, accepted_in, times, cached_tokens });
        Ok(Delta { text, finish, ..Delta::default() })
    }
}
