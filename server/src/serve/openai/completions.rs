//! `POST /v1/completions`: texts or tokens go on.
//!
//! Not here: chats. The JSON is the OpenAI API's, with the extensions of vLLM that its clients use
//! (token prompts, prompt log-probabilities by `echo`, `min_tokens`, `ignore_eos`, ...).

use super::super::app::{App, Served};
use super::super::error::{ApiError, ErrorBody};
use super::super::extract::Body;
use super::super::generation::{Delta, Finish};
use super::super::sse::{self, Writer};
use super::choices::Choices;
use super::params::{Params, Plan};
use super::report::{Figures, Provenance, Report, Wanted};
use super::usage::{Usage, finite};
use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use engine::logprobs::{LogprobsWanted, TokenLogprob};
use engine::request::Request;
use engine::stream::TextStream;
use engine::tokenizer::Tokenizer;
use kernels::program::TokenId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use utoipa::ToSchema;

/// Tokens to generate where nobody says how many, as the OpenAI API has it.
const MAX_TOKENS: u32 = 16;

/// A request.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionRequest {
    /// The served model's name; default: that model.
    model: Option<String>,
    prompt: Prompt,
    /// Most tokens to generate; default 16. 0 with `echo` only scores the prompt.
    max_tokens: Option<u32>,
    /// Whether the prompt is part of the text.
    echo: Option<bool>,
    /// Report each token's log-probability beside that many likeliest ones, 0 to 20.
    logprobs: Option<u32>,
    /// Candidates of which the `n` likeliest (by mean log-probability) are answered; at least `n`.
    best_of: Option<u32>,
    /// Refused: these models do not fill gaps.
    suffix: Option<String>,
    /// Whether to send pieces as they come.
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[serde(flatten)]
    wanted: Wanted,
    #[serde(flatten)]
    params: Params,
}

/// One prompt or several, as text or token ids.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    IdLists(Vec<Vec<u32>>),
}

/// What a stream tells beside its pieces.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// Whether a last piece tells the usage.
    #[serde(default)]
    pub include_usage: bool,
    /// Whether every piece tells the usage so far.
    #[serde(default)]
    pub continuous_usage_stats: bool,
}

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Completion {
    id: String,
    /// `text_completion`.
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(flatten)]
    figures: Figures,
}

/// A continuation, or a piece of one.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct Choice {
    index: usize,
    text: String,
    logprobs: Option<Logprobs>,
    /// `stop` or `length`; null in pieces before the last.
    finish_reason: Option<&'static str>,
    /// How the generated text came about, where that is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    provenance: Option<Vec<Provenance>>,
}

/// How likely tokens were, one entry a token.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(crate) struct Logprobs {
    tokens: Vec<String>,
    /// Null for the first token of a prompt.
    token_logprobs: Vec<Option<f64>>,
    /// The likeliest tokens, and the token itself; null for the first token of a prompt.
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where in the text a token begins, in characters.
    text_offset: Vec<usize>,
}

/// Continues prompts.
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest, responses(
    (status = 200, content((Completion = "application/json"), (Completion = "text/event-stream"))),
    (status = "default", body = ErrorBody),
))]
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Body(request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let served = app.ready()?;
    served.check_name(request.model.as_deref())?;
    let report = Report::new(request.wanted, &headers, &served);
    let job = Job::new(&request, &app, served)?;
    let requests = job.requests();
    let choices = Choices::start(&app, &job.served, requests, &job.plan.wording).await?;
    if request.stream == Some(true) {
        let stream = Stream::new(job, report, request.stream_options.unwrap_or_default());
        return Ok(sse::response(choices, stream, &[]));
    }
    Ok(Json(whole(job, choices, report).await?).into_response())
}

/// A request that was understood.
struct Job {
    id: String,
    created: u64,
    served: Arc<Served>,
    prompts: Vec<Vec<TokenId>>,
    plan: Plan,
    echo: bool,
    /// Likeliest tokens to show; none shows no log-probabilities.
    logprobs: Option<u32>,
    /// Candidates of each prompt, at least `plan.n`.
    best_of: u32,
    /// The prompt is scored and nothing is generated for the client.
    scores_only: bool,
}

impl Job {
    fn new(request: &CompletionRequest, app: &App, served: Arc<Served>) -> Result<Self, ApiError> {
        if request.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            let message =
                "suffix is not supported: these models continue a text, they do not fill gaps";
            return Err(ApiError::invalid(message).of("suffix"));
        }
        let (echo, asked) = (request.echo == Some(true), request.max_tokens.unwrap_or(MAX_TOKENS));
        let mut plan = request.params.plan(app, &served)?;
        let best_of = request.best_of.unwrap_or(plan.n);
        if best_of < plan.n || best_of > 128 {
            let message = format!("best_of is {best_of}, expected n ({}) to 128", plan.n);
            return Err(ApiError::invalid(message).of("best_of"));
        }
        if best_of > plan.n && request.stream == Some(true) {
            let message = "best_of cannot be streamed: the best is known only at the end";
            return Err(ApiError::invalid(message).of("best_of"));
        }
        let scores_only = echo && asked == 0;
        plan.max_tokens = Some(if scores_only { 1 } else { asked });
        let wanted = LogprobsWanted {
            top: request.logprobs.unwrap_or(0),
            prompt: echo && request.logprobs.is_some(),
        };
        plan.logprobs = (request.logprobs.is_some() || best_of > plan.n).then_some(wanted);
        let prompts = prompts(&request.prompt, &served)?;
        let (id, created) = (app.answer_id("cmpl"), super::super::app::seconds());
        Ok(Self {
            id,
            created,
            served,
            prompts,
            plan,
            echo,
            logprobs: request.logprobs,
            best_of,
            scores_only,
        })
    }

    /// The candidates of all prompts, prompt by prompt.
    fn requests(&self) -> Vec<Request> {
        let of = |prompt: &Vec<TokenId>| {
            let request = |i| self.plan.request(prompt.clone(), i, &self.served);
            (0..self.best_of).map(request).collect::<Vec<_>>()
        };
        self.prompts.iter().flat_map(of).collect()
    }

    fn prompt(&self, candidate: usize) -> &[TokenId] {
        &self.prompts[candidate / self.best_of as usize]
    }

    fn completion(&self, choices: Vec<Choice>, usage: Option<Usage>) -> Completion {
        let (id, model) = (self.id.clone(), self.served.name.clone());
        let (created, figures) = (self.created, Figures::default());
        Completion { id, object: "text_completion", created, model, choices, usage, figures }
    }

    /// Of text that is not given out there is nothing to tell.
    fn shown(&self, provenance: Option<Vec<Provenance>>) -> Option<Vec<Provenance>> {
        provenance.map(|all| if self.scores_only { vec![] } else { all })
    }

    fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    /// Of each prompt, what its first candidate found: others may find what that one computed.
    fn cached_tokens<'o>(&self, candidates: impl Iterator<Item = &'o Open>) -> usize {
        candidates.step_by(self.best_of as usize).map(|open| open.cached_tokens).sum()
    }

    /// The text of candidate `candidate`, of which nothing has come yet.
    fn open(&self, candidate: usize) -> Result<Open, ApiError> {
        let (mut open, prompt) = (Open::default(), self.prompt(candidate));
        let stream = || TextStream::new(self.served.tokenizer.clone(), vec![]);
        open.shown = match self.logprobs {
            Some(_) if self.echo => Some(stream()),
            Some(_) => Some(stream().after(prompt).map_err(|e| ApiError::failed(e.to_string()))?),
            None => None,
        };
        if self.echo {
            let text = self.served.tokenizer.decode(prompt, true);
            open.echo = text.map_err(|e| ApiError::failed(e.to_string()))?;
            open.known = prompt.to_vec();
        }
        Ok(open)
    }

    /// The piece that `delta` adds to a choice.
    fn piece(&self, open: &mut Open, delta: &Delta) -> Result<Choice, ApiError> {
        let mut logprobs = self.logprobs.map(|_| Logprobs::default());
        if let Some(logprobs) = &mut logprobs {
            self.prompt_logprobs(open, &delta.prompt, logprobs)?;
        }
        let mut text = String::new();
        if delta.prompt.is_empty() {
            text += &std::mem::take(&mut open.echo);
        }
        if !self.scores_only {
            text += &delta.text;
            for token in &delta.tokens {
                open.tokens += 1;
                if let Some(logprob) = &token.logprob {
                    open.logprob += f64::from(logprob.logprob);
                    if let Some(logprobs) = &mut logprobs {
                        open.token(token.id, Some(logprob), &self.served, logprobs)?;
                    }
                }
            }
        }
        let reason =
            |finish: &Finish| if self.scores_only { "length" } else { finish.reason.as_str() };
        let finish_reason = delta.finish.as_ref().map(reason);
        open.cached_tokens = delta.finish.as_ref().map_or(0, |finish| finish.cached_tokens);
        Ok(Choice { index: 0, text, logprobs, finish_reason, provenance: None })
    }

    /// The prompt's first token has no probability, and comes with the second, or alone.
    fn prompt_logprobs(
        &self,
        open: &mut Open,
        prompt: &[TokenLogprob],
        logprobs: &mut Logprobs,
    ) -> Result<(), ApiError> {
        if let (0, Some(&first)) = (open.scored, open.known.first()) {
            open.token(first, None, &self.served, logprobs)?;
            open.scored = 1;
        }
        for logprob in prompt {
            let token = open.known[open.scored];
            open.scored += 1;
            open.token(token, Some(logprob), &self.served, logprobs)?;
        }
        open.end_prompt(&self.served)
    }
}

/// What has come of a choice.
#[derive(Debug, Default)]
struct Open {
    /// The prompt's text, until it is given out.
    echo: String,
    /// The prompt's tokens, if they are shown.
    known: Vec<TokenId>,
    /// How many of them are shown.
    scored: usize,
    /// Generated tokens, and the sum of their log-probabilities.
    tokens: usize,
    logprob: f64,
    /// The text that the tokens told of make, if they are told.
    shown: Option<TextStream<Arc<Tokenizer>>>,
    /// Characters of it.
    offset: usize,
    /// Tokens of the prompt that had been computed before, once it has ended.
    cached_tokens: usize,
}

impl Open {
    fn token(
        &mut self,
        token: TokenId,
        logprob: Option<&TokenLogprob>,
        served: &Served,
        into: &mut Logprobs,
    ) -> Result<(), ApiError> {
        let text = served.token_text(token)?;
        let mut top = Map::new();
        for &(other, value) in logprob.iter().flat_map(|l| &l.top) {
            top.entry(served.token_text(other)?).or_insert(json!(finite(value)));
        }
        if let Some(logprob) = logprob {
            top.insert(text.clone(), json!(finite(logprob.logprob)));
        }
        into.text_offset.push(self.offset);
        if let Some(shown) = &mut self.shown {
            let piece = shown.push(token).map_err(|e| ApiError::failed(e.to_string()))?;
            self.offset += piece.text.chars().count();
        }
        into.tokens.push(text);
        into.token_logprobs.push(logprob.map(|l| finite(l.logprob)));
        into.top_logprobs.push(logprob.map(|_| top));
        Ok(())
    }

    /// Once the prompt is told, goes on with what follows it.
    fn end_prompt(&mut self, served: &Served) -> Result<(), ApiError> {
        let (Some(shown), true) = (&mut self.shown, self.scored == self.known.len()) else {
            return Ok(());
        };
        if self.scored > 0 {
            let failed = |e: engine::Error| ApiError::failed(e.to_string());
            self.offset += shown.finish().map_err(failed)?.chars().count();
            let stream = TextStream::new(served.tokenizer.clone(), vec![]);
            *shown = stream.after(&self.known).map_err(failed)?;
            self.known.clear();
            self.scored = 0;
        }
        Ok(())
    }

    /// Mean log-probability of its tokens.
    fn mean(&self) -> f64 {
        self.logprob / self.tokens.max(1) as f64
    }
}

/// The answer when everything has come.
async fn whole(job: Job, mut choices: Choices, mut report: Report) -> Result<Completion, ApiError> {
    let candidates = job.prompts.len() * job.best_of as usize;
    let opened = (0..candidates).map(|i| Ok((job.open(i)?, Choice::default())));
    let mut all: Vec<(Open, Choice)> = opened.collect::<Result<_, ApiError>>()?;
    while let Some((i, delta)) = choices.next().await? {
        let mut piece = job.piece(&mut all[i].0, &delta)?;
        piece.provenance = job.shown(report.book(&delta));
        all[i].1.append(piece);
    }
    let completion_tokens = all.iter().map(|(open, _)| open.tokens).sum();
    let cached = job.cached_tokens(all.iter().map(|(open, _)| open));
    let mut best = vec![];
    while !all.is_empty() {
        let mut of_prompt: Vec<_> = all.drain(..job.best_of as usize).collect();
        if job.best_of > job.plan.n {
            of_prompt.sort_by(|a, b| b.0.mean().total_cmp(&a.0.mean()));
        }
        best.extend(of_prompt.into_iter().take(job.plan.n as usize).map(|(_, choice)| choice));
    }
    best.iter_mut().enumerate().for_each(|(index, choice)| choice.index = index);
    let usage = Usage::new(job.prompt_tokens(), completion_tokens).cached(cached);
    let figures = report.figures(job.prompt_tokens());
    Ok(Completion { figures, ..job.completion(best, Some(usage)) })
}

impl Choice {
    fn append(&mut self, piece: Self) {
        self.text += &piece.text;
        self.finish_reason = self.finish_reason.or(piece.finish_reason);
        match (&mut self.provenance, piece.provenance) {
            (Some(all), Some(more)) => all.extend(more),
            (none, more) => *none = more,
        }
        match (&mut self.logprobs, piece.logprobs) {
            (Some(all), Some(more)) => {
                all.tokens.extend(more.tokens);
                all.token_logprobs.extend(more.token_logprobs);
                all.top_logprobs.extend(more.top_logprobs);
                all.text_offset.extend(more.text_offset);
            }
            (none, more) => *none = more,
        }
    }
}

/// The answer piece by piece.
struct Stream {
    job: Job,
    report: Report,
    options: StreamOptions,
    open: Vec<Option<Open>>,
    completion_tokens: usize,
}

impl Stream {
    fn new(job: Job, report: Report, options: StreamOptions) -> Self {
        let candidates = job.prompts.len() * job.best_of as usize;
        let open = (0..candidates).map(|_| None).collect();
        Self { job, report, options, open, completion_tokens: 0 }
    }

    fn usage(&self) -> Usage {
        Usage::new(self.job.prompt_tokens(), self.completion_tokens)
    }
}

impl Writer for Stream {
    fn delta(&mut self, index: usize, delta: Delta) -> Result<Vec<Value>, ApiError> {
        let mut open = match self.open[index].take() {
            Some(open) => open,
            None => self.job.open(index)?,
        };
        let before = open.tokens;
        let provenance = self.job.shown(self.report.book(&delta));
        let piece = Choice { index, provenance, ..self.job.piece(&mut open, &delta)? };
        self.completion_tokens += open.tokens - before;
        self.open[index] = Some(open);
        let shown = piece.logprobs.as_ref().is_some_and(|l| !l.tokens.is_empty());
        if piece.text.is_empty() && piece.finish_reason.is_none() && !shown {
            return Ok(vec![]);
        }
        let usage = self.options.continuous_usage_stats.then(|| self.usage());
        Ok(vec![json!(self.job.completion(vec![piece], usage))])
    }

    fn last(&mut self) -> Vec<Value> {
        if !self.options.include_usage && !self.report.wants_figures() {
            return vec![];
        }
        let cached = self.job.cached_tokens(self.open.iter().flatten());
        let usage = self.usage().cached(cached);
        let figures = self.report.figures(self.job.prompt_tokens());
        vec![json!(Completion { figures, ..self.job.completion(vec![], Some(usage)) })]
    }
}

/// All prompts as tokens; at least one.
fn prompts(prompt: &Prompt, served: &Served) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let encode = |text: &String| served.encode(text, true);
    let ids = |ids: &Vec<u32>| ids.iter().map(|&id| TokenId(id)).collect();
    let prompts: Vec<Vec<TokenId>> = match prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Ids(list) => vec![ids(list)],
        Prompt::IdLists(lists) => lists.iter().map(ids).collect(),
    };
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt is an empty list: give at least one").of("prompt"));
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::TestServer;
    use serde_json::{Value, json};

    /// Of a choice: its text's characters, and its tokens with their offsets.
    fn told(answer: &Value) -> (Vec<char>, Vec<(String, usize)>) {
        let choice = &answer["choices"][0];
        let list = |key: &str| choice["logprobs"][key].as_array().unwrap().clone();
        let offset = |value: Value| value.as_u64().unwrap() as usize;
        let tokens = list("tokens").into_iter().map(|t| t.as_str().unwrap().to_owned());
        let offsets = list("text_offset").into_iter().map(offset);
        (choice["text"].as_str().unwrap().chars().collect(), tokens.zip(offsets).collect())
    }

    #[tokio::test]
    async fn offsets_are_places_in_the_text_that_is_returned() {
        let server = TestServer::start(&["--draft", "off"]);
        for (prompt, echo) in [("let x = 1;", true), ("let é = \"😀\";", true), ("fn a", false)]
        {
            let body = json!({"prompt": prompt, "max_tokens": 12, "temperature": 0, "echo": echo,
                "logprobs": 0, "ignore_eos": true});
            let (text, tokens) = told(&server.post("/v1/completions", body).await.1);
            let mut plain = 0;
            for (k, (token, start)) in tokens.iter().enumerate() {
                let end = tokens.get(k + 1).map_or(text.len(), |(_, next)| *next);
                let part: String = text[*start..end].iter().collect();
                // The first token prints nothing; part of a character shows with its last one.
                let begins = echo && k == 0;
                assert!(!begins || (token.starts_with("<|") && part.is_empty()), "{token} {part}");
                if !begins && !token.contains('\u{fffd}') {
                    assert_eq!(part, *token, "token {k} of {prompt:?}");
                    plain += 1;
                }
            }
            assert!(plain >= 10, "{tokens:?}");
            let shown: String = text.into_iter().collect();
            assert_eq!(shown.starts_with(prompt), echo);
            let split = tokens.iter().any(|(token, _)| token.contains('\u{fffd}'));
            assert_eq!(split, prompt.contains('😀'), "{tokens:?}");
        }
    }
}
