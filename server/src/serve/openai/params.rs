//! Parameters that completions and chats share, and what the engine makes of them.

use super::super::app::{App, Served};
use super::super::error::ApiError;
use super::super::generation::Wording;
use engine::grammar::Guide;
use engine::logprobs::LogprobsWanted;
use engine::request::Request;
use engine::sampler::SamplingParams;
use kernels::program::TokenId;
use serde::Deserialize;
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Most stop strings of a request.
const STOPS_MAX: usize = 16;
/// Longest stop string in bytes: text that one may begin is held back.
const STOP_BYTES_MAX: usize = 1024;

/// How tokens are chosen and when they end; null counts as absent.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(crate) struct Params {
    /// 0 always takes the likeliest token; 0 to 100, default 1.
    pub temperature: Option<f32>,
    /// Mass of the likeliest tokens that are kept; above 0, at most 1.
    pub top_p: Option<f32>,
    /// The k likeliest tokens are kept; 0 or -1 keeps all.
    pub top_k: Option<i64>,
    /// Tokens at least this many times as likely as the likeliest are kept; 0 to 1.
    pub min_p: Option<f32>,
    /// Mass of locally typical sampling; above 0, at most 1.
    pub typical_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens seen before; 0.01 to 100.
    pub repetition_penalty: Option<f32>,
    /// Subtracted once for each time a token was generated; -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Subtracted from tokens that were generated; -2 to 2.
    pub presence_penalty: Option<f32>,
    /// Added to the logits of tokens, by their ids; -100 to 100 each.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// The same seed gives the same text; default: another one for each request.
    pub seed: Option<i64>,
    /// Text that ends the answer and is not part of it.
    pub stop: Option<Stop>,
    /// Further tokens that end the answer.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Whether to go on where the model would end.
    pub ignore_eos: Option<bool>,
    /// Tokens before which the model may not end.
    pub min_tokens: Option<u32>,
    /// Requests of a larger one go first; default 0.
    pub priority: Option<i32>,
    /// Continuations of each prompt; 1 to 128, default 1.
    pub n: Option<u32>,
}

/// One stop string or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Stop {
    One(String),
    Several(Vec<String>),
}

/// What is asked for, checked as far as that needs no prompt.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub max_tokens: Option<u32>,
    pub sampling: SamplingParams,
    pub stop_tokens: Vec<TokenId>,
    pub wording: Wording,
    /// What the answer must look like.
    pub guide: Option<Guide>,
    pub logprobs: Option<LogprobsWanted>,
    pub priority: i32,
    pub n: u32,
}

impl Params {
    /// The same for the engine; sampling ranges are checked by the engine itself.
    pub(crate) fn plan(&self, app: &App, served: &Served) -> Result<Plan, ApiError> {
        let mut stop_tokens = served.stop_tokens.clone();
        if self.ignore_eos == Some(true) {
            stop_tokens.clear();
        }
        stop_tokens.extend(self.stop_token_ids.iter().flatten().map(|&id| TokenId(id)));
        let n = self.n.unwrap_or(1);
        if !(1..=128).contains(&n) {
            return Err(ApiError::invalid(format!("n is {n}, expected 1 to 128")).of("n"));
        }
        Ok(Plan {
            max_tokens: None,
            sampling: self.sampling(app, &stop_tokens)?,
            stop_tokens,
            wording: Wording { stop: self.stops()?, shown: vec![] },
            guide: None,
            logprobs: None,
            priority: self.priority.unwrap_or(0),
            n,
        })
    }

    fn sampling(&self, app: &App, end_tokens: &[TokenId]) -> Result<SamplingParams, ApiError> {
        let default = SamplingParams::default();
        let top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            k => u32::try_from(k).map_err(|_| {
                ApiError::invalid(format!("top_k is {k}, expected -1 or more")).of("top_k")
            })?,
        };
        Ok(SamplingParams {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k,
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            typical_p: self.typical_p.unwrap_or(default.typical_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(default.repetition_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(default.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(default.presence_penalty),
            logit_bias: self.logit_bias()?,
            min_tokens: self.min_tokens.unwrap_or(0),
            end_tokens: end_tokens.to_vec(),
            seed: self.seed.map_or_else(|| app.seed(), |seed| seed as u64),
        })
    }

    fn logit_bias(&self) -> Result<Vec<(TokenId, f32)>, ApiError> {
        let entry = |(key, &bias): (&String, &f32)| {
            let id = key.trim().parse().map_err(|_| {
                let message = format!("logit_bias has the key {key:?}, expected a token id");
                ApiError::invalid(message).of("logit_bias")
            })?;
            Ok((TokenId(id), bias))
        };
        self.logit_bias.iter().flatten().map(entry).collect()
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => vec![],
            Some(Stop::One(one)) => vec![one.clone()],
            Some(Stop::Several(several)) => several.clone(),
        };
        let refuse = |what: String| Err(ApiError::invalid(what).of("stop"));
        if stops.len() > STOPS_MAX {
            return refuse(format!("{} stop strings, expected at most {STOPS_MAX}", stops.len()));
        }
        match stops.iter().map(String::len).find(|&len| len == 0 || len > STOP_BYTES_MAX) {
            None => Ok(stops),
            Some(len) => {
                refuse(format!("a stop string has {len} bytes, expected 1 to {STOP_BYTES_MAX}"))
            }
        }
    }
}

impl Plan {
    /// The engine's request for the continuation number `index` of `prompt`.
    pub(crate) fn request(&self, prompt: Vec<TokenId>, index: u32, served: &Served) -> Request {
        let room = (served.config.context_len as usize).saturating_sub(prompt.len());
        // A prompt without room is refused as such.
        let max_tokens = self.max_tokens.unwrap_or(room.max(1) as u32);
        let seed = self.sampling.seed.wrapping_add(u64::from(index));
        Request {
            prompt,
            max_tokens,
            stop_tokens: self.stop_tokens.clone(),
            sampling: SamplingParams { seed, ..self.sampling.clone() },
            guide: self.guide.clone(),
            logprobs: self.logprobs,
            priority: self.priority,
        }
    }
}
