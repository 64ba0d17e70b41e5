//! One continuation on its way to a client: tokens become text, stop strings end it.
//!
//! Input: updates of the worker. Output: [`Delta`]s, which every endpoint writes in its own form.
//! Not here: JSON, HTTP, where requests come from ([`super::openai`]).

use super::error::ApiError;
use super::worker::{Ending, Handle, Times, Token, Update, Updates};
use engine::logprobs::TokenLogprob;
use engine::request::{FinishReason, Request, TokenSource};
use engine::speculation::SpeculationCounts;
use engine::stream::TextStream;
use engine::tokenizer::Tokenizer;
use kernels::program::TokenId;
use std::sync::Arc;

/// What has come since the last one.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    /// How likely tokens of the prompt were, in order.
    pub prompt: Vec<TokenLogprob>,
    /// Text that is final; what a stop string may begin is held back.
    pub text: String,
    /// The same text token by token, by how the token that completed it came about; tokens that
    /// completed none are left out.
    pub pieces: Vec<(String, TokenSource)>,
    /// The tokens that were generated.
    pub tokens: Vec<Token>,
    /// Set in the last one.
    pub finish: Option<Finish>,
}

impl Delta {
    fn say(&mut self, text: String, source: TokenSource) {
        self.text += &text;
        if !text.is_empty() {
            self.pieces.push((text, source));
        }
    }
}

/// How a continuation ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Finish {
    /// `stop` or `length`.
    pub reason: FinishReason,
    pub speculation: SpeculationCounts,
    pub accepted_in: Vec<u64>,
    pub times: Times,
}

/// How tokens become text.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wording {
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Special tokens that are written out, where others print nothing.
    pub shown: Vec<TokenId>,
}

/// A continuation that is being computed; dropping it cancels it.
#[derive(Debug)]
pub(crate) struct Generation {
    updates: Updates,
    text: Option<TextStream<Arc<Tokenizer>>>,
    /// How the last token came about.
    source: TokenSource,
    /// A stop string was found; what the engine computes until it hears so is not counted.
    stopped: bool,
    ended: bool,
}

impl Generation {
    /// Has `request` computed; its text, if there is a tokenizer, ends before the first of the
    /// stop strings.
    pub(crate) async fn start(
        handle: &Handle,
        request: Request,
        tokenizer: Option<Arc<Tokenizer>>,
        wording: Wording,
    ) -> Result<Self, ApiError> {
        let Wording { stop, shown } = wording;
        let stream = |t| TextStream::new(t, stop).showing(shown).after(&request.prompt);
        let text = tokenizer.map(stream).transpose();
        let text = text.map_err(|e| ApiError::invalid(e.to_string()))?;
        let updates = handle.submit(request).await?;
        Ok(Self { updates, text, source: TokenSource::Plain, stopped: false, ended: false })
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
            self.source = token.source;
            delta.say(piece.text, token.source);
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
        let Ending { reason, speculation, accepted_in, times } = ending;
        let reason = match (self.stopped, reason) {
            (true, _) => FinishReason::Stop,
            // Only a server that stops cancels what its client still waits for.
            (false, FinishReason::Cancelled) => {
                return Err(ApiError::unavailable("the server stopped before the end"));
            }
            (false, reason) => reason,
        };
        let finish = Some(Finish { reason, speculation, accepted_in, times });
        let mut delta = Delta { finish, ..Delta::default() };
        delta.say(text, self.source);
        Ok(delta)
    }
}
