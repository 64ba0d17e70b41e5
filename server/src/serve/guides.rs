//! Guides for answers that must look like something, made for the model that is served.
//!
//! Input: what the API's parameters ask for ([`super::openai::format`]). Not here: grammars
//! themselves ([`engine::grammar`]), which tokens they leave to the sampler.

use super::app::{Served, aside};
use super::error::ApiError;
use engine::grammar::{GrammarError, GrammarSource, Grammars, Guide};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Grammars that are kept for the next request with the same one.
const KEPT: usize = 8;

/// A grammar that a request asks for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Asked {
    pub source: GrammarSource,
    /// The parameter that asks.
    pub param: &'static str,
}

/// The model's grammars, from the first request that needs them on.
#[derive(Debug, Default)]
pub(crate) struct Guides {
    grammars: OnceLock<Result<Grammars, GrammarError>>,
    /// The latest ones, by what they were made of in words: objects of equal fields in another
    /// order are equal values, but make another grammar.
    kept: Mutex<VecDeque<(String, Guide)>>,
}

impl Asked {
    /// A guide at the beginning of an answer; made beside the threads that speak HTTP.
    pub(crate) async fn guide(self, served: &Arc<Served>) -> Result<Guide, ApiError> {
        let served = served.clone();
        aside(move || {
            let guide = served.guides.guide(&self.source, &served);
            guide.map_err(|e| refusal(&e, self.param))
        })
        .await
    }
}

impl Guides {
    fn guide(&self, source: &GrammarSource, served: &Served) -> Result<Guide, GrammarError> {
        let key = format!("{source:?}");
        if let Some(guide) = self.known(&key) {
            return Ok(guide);
        }
        let grammars = self.grammars.get_or_init(|| {
            Grammars::new(&served.tokenizer, served.config.vocab, &served.stop_tokens)
        });
        let guide = grammars.as_ref().map_err(Clone::clone)?.guide(source)?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.truncate(KEPT - 1);
        kept.push_front((key, guide.clone()));
        Ok(guide)
    }

    fn known(&self, key: &str) -> Option<Guide> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|(known, _)| known == key).map(|(_, guide)| guide.clone())
    }
}

fn refusal(error: &GrammarError, param: &str) -> ApiError {
    let code = match error {
        GrammarError::Vocabulary { .. } => "no_structured_output",
        _ => "invalid_grammar",
    };
    ApiError::invalid(format!("{param}: {error}")).of(param).code(code)
}
