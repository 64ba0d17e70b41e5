//! `POST /v1/chat/completions`: a conversation goes on.
//!
//! Not here: how messages become text ([`super::conversation`]). The JSON is the OpenAI API's, with
//! the extensions of vLLM that its clients use (`top_k`, `chat_template_kwargs`, `min_tokens`, ...).

use super::super::app::{App, Served, seconds};
use super::super::error::{ApiError, ErrorBody};
use super::super::extract::Body;
use super::super::generation::Delta;
use super::super::sse::{self, Writer};
use super::calls::Reader;
use super::choices::Choices;
use super::completions::StreamOptions;
use super::conversation::Conversation;
use super::format::{self, FormatParams};
use super::likelihood::ChatLogprobs;
use super::params::{Params, Plan};
use super::report::{Figures, Provenance, Report, Wanted};
use super::tools::{ToolCall, ToolParams, ToolPlan};
use super::usage::Usage;
use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use engine::logprobs::LogprobsWanted;
use engine::request::{FinishReason, Request};
use kernels::program::TokenId;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;
use utoipa::ToSchema;

/// A request.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ChatRequest {
    /// The served model's name; default: that model.
    model: Option<String>,
    #[serde(flatten)]
    conversation: Conversation,
    #[serde(flatten)]
    tools: ToolParams,
    /// Most tokens to generate; default: what the context holds beside the conversation.
    max_completion_tokens: Option<u32>,
    /// The older name of `max_completion_tokens`, which wins.
    max_tokens: Option<u32>,
    /// Whether to tell each token's log-probability.
    logprobs: Option<bool>,
    /// The likeliest tokens to tell beside each, 0 to 20; needs `logprobs`.
    top_logprobs: Option<u32>,
    /// Whether to send pieces as they come.
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[serde(flatten)]
    format: FormatParams,
    #[serde(flatten)]
    wanted: Wanted,
    #[serde(flatten)]
    params: Params,
}

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatCompletion {
    id: String,
    /// `chat.completion`.
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChatChoice>,
    usage: Usage,
    #[serde(flatten)]
    figures: Figures,
}

/// One of several answers.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    index: usize,
    message: Answer,
    logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    finish_reason: Option<&'static str>,
    /// How the generated text came about, where that is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    provenance: Option<Vec<Provenance>>,
}

/// What the model says.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Answer {
    /// `assistant`.
    role: &'static str,
    /// Null where there are only calls.
    content: Option<String>,
    /// Null: what a model refuses, it says in `content`.
    refusal: Option<String>,
    /// Tools that the model calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A piece of a streamed answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk {
    id: String,
    /// `chat.completion.chunk`.
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(flatten)]
    figures: Figures,
}

/// What a piece adds to a choice.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChunkChoice {
    index: usize,
    delta: AnswerDelta,
    logprobs: Option<ChatLogprobs>,
    /// As in the whole answer; null in pieces before the last.
    finish_reason: Option<&'static str>,
    /// How the generated text came about, where that is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    provenance: Option<Vec<Provenance>>,
}

/// What a piece adds to an answer.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct AnswerDelta {
    /// `assistant`, in a choice's first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    /// Calls, each whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// Answers a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest, responses(
    (status = 200, content((ChatCompletion = "application/json"), (ChatChunk = "text/event-stream"))),
    (status = "default", body = ErrorBody),
))]
pub(crate) async fn chat_completions(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Body(request): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let served = app.ready()?;
    served.check_name(request.model.as_deref())?;
    let (stream, options) = (request.stream == Some(true), request.stream_options);
    let report = Report::new(request.wanted, &headers, &served);
    let job = Job::new(request, app, served).await?;
    let choices = Choices::start(&job.app, &job.served, job.requests(), &job.plan.wording).await;
    let choices = choices.map_err(blame_messages)?;
    if stream {
        let progress = Progress::new(&job, report);
        let stream = Stream { job, progress, options: options.unwrap_or_default() };
        let first = stream.first();
        return Ok(sse::response(choices, stream, &first));
    }
    Ok(Json(whole(&job, choices, report).await?).into_response())
}

/// What the engine says of a prompt is true of the messages here.
fn blame_messages(error: ApiError) -> ApiError {
    match error.param.as_deref() {
        Some("prompt") => error.of("messages"),
        _ => error,
    }
}

/// A request that was understood.
struct Job {
    app: Arc<App>,
    id: String,
    created: u64,
    served: Arc<Served>,
    prompt: Vec<TokenId>,
    plan: Plan,
    tools: ToolPlan,
}

/// What has come of an answer.
struct Open {
    reader: Reader,
    /// Calls that were given out.
    calls: usize,
}

impl Job {
    async fn new(
        mut request: ChatRequest,
        app: Arc<App>,
        served: Arc<Served>,
    ) -> Result<Self, ApiError> {
        let mut plan = request.params.plan(&app, &served)?;
        plan.max_tokens = request.max_completion_tokens.or(request.max_tokens);
        plan.logprobs = request.likelihoods()?;
        let format = request.format.asked()?;
        // An answer of a given form is content, whatever it looks like.
        let calls_nothing = format.is_some();
        let (mut tools, calls) = request.tools.plan(&mut request.conversation, &served)?;
        if let Some(asked) = format::only(format.into_iter().chain(calls).collect())? {
            plan.guide = Some(asked.guide(&served).await?);
        }
        if calls_nothing {
            tools = ToolPlan::default();
        }
        plan.wording.shown = tools.marks(&served);
        let prompt = request.conversation.tokens(&served, false).await?;
        let (id, created) = (app.answer_id("chatcmpl"), seconds());
        Ok(Self { app, id, created, served, prompt, plan, tools })
    }

    fn requests(&self) -> Vec<Request> {
        let request = |i| self.plan.request(self.prompt.clone(), i, &self.served);
        (0..self.plan.n).map(request).collect()
    }

    /// What `delta` adds to choice `index`, and whether a client is to hear of it.
    fn piece(
        &self,
        index: usize,
        open: &mut Open,
        delta: &Delta,
    ) -> Result<(ChunkChoice, bool), ApiError> {
        let logprobs = ChatLogprobs::of(&delta.tokens, &self.served)?;
        let found = open.reader.read(&delta.text, delta.finish.is_some());
        let content = (!found.text.is_empty()).then_some(found.text);
        let calls = (open.calls..).zip(found.calls);
        let tool_calls: Vec<_> = calls.map(|(i, c)| ToolCall::new(c, i, &self.app)).collect();
        open.calls += tool_calls.len();
        let finish_reason = delta.finish.as_ref().map(|finish| match finish.reason {
            FinishReason::Stop if open.calls > 0 => "tool_calls",
            reason => reason.as_str(),
        });
        let says = content.is_some() || finish_reason.is_some() || logprobs.is_some();
        let says = says || !tool_calls.is_empty();
        let delta = AnswerDelta { role: None, content, tool_calls };
        let provenance = None;
        Ok((ChunkChoice { index, delta, logprobs, finish_reason, provenance }, says))
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Usage>, figures: Figures) -> Value {
        let (id, model) = (self.id.clone(), self.served.name.clone());
        let (object, created) = ("chat.completion.chunk", self.created);
        json!(ChatChunk { id, object, created, model, choices, usage, figures })
    }
}

impl ChatRequest {
    fn likelihoods(&self) -> Result<Option<LogprobsWanted>, ApiError> {
        let top = self.top_logprobs.unwrap_or(0);
        if top > 0 && self.logprobs != Some(true) {
            let message = "top_logprobs needs logprobs to be true";
            return Err(ApiError::invalid(message).of("top_logprobs"));
        }
        if top > engine::logprobs::TOP_MAX {
            let message = format!("top_logprobs is {top}, expected 0 to 20");
            return Err(ApiError::invalid(message).of("top_logprobs"));
        }
        Ok((self.logprobs == Some(true)).then_some(LogprobsWanted { top, prompt: false }))
    }
}

impl Default for Answer {
    fn default() -> Self {
        Self { role: "assistant", content: None, refusal: None, tool_calls: vec![] }
    }
}

/// What has come of all answers.
struct Progress {
    open: Vec<Open>,
    report: Report,
    completion_tokens: usize,
    /// Of the conversation, once one answer is complete: what its first one found.
    cached_tokens: Option<usize>,
}

impl Progress {
    fn new(job: &Job, report: Report) -> Self {
        let open = (0..job.plan.n).map(|_| Open { reader: job.tools.reader(), calls: 0 }).collect();
        Self { open, report, completion_tokens: 0, cached_tokens: None }
    }

    /// What `delta` adds to choice `index`, and whether a client is to hear of it.
    fn take(
        &mut self,
        job: &Job,
        index: usize,
        delta: &Delta,
    ) -> Result<(ChunkChoice, bool), ApiError> {
        self.completion_tokens += delta.tokens.len();
        if let (0, Some(finish)) = (index, &delta.finish) {
            self.cached_tokens = Some(finish.cached_tokens);
        }
        let provenance = self.report.book(delta);
        let (piece, says) = job.piece(index, &mut self.open[index], delta)?;
        Ok((ChunkChoice { provenance, ..piece }, says))
    }

    fn usage(&self, job: &Job) -> Usage {
        let usage = Usage::new(job.prompt.len(), self.completion_tokens);
        self.cached_tokens.map_or(usage, |cached| usage.cached(cached))
    }
}

/// The answer when everything has come.
async fn whole(
    job: &Job,
    mut choices: Choices,
    report: Report,
) -> Result<ChatCompletion, ApiError> {
    let empty = |index| ChatChoice { index, ..ChatChoice::default() };
    let mut all: Vec<ChatChoice> = (0..job.plan.n as usize).map(empty).collect();
    let mut progress = Progress::new(job, report);
    while let Some((i, delta)) = choices.next().await? {
        let (piece, _) = progress.take(job, i, &delta)?;
        all[i].append(piece);
    }
    Ok(ChatCompletion {
        id: job.id.clone(),
        object: "chat.completion",
        created: job.created,
        model: job.served.name.clone(),
        choices: all,
        usage: progress.usage(job),
        figures: progress.report.figures(job.prompt.len()),
    })
}

impl ChatChoice {
    fn append(&mut self, piece: ChunkChoice) {
        let AnswerDelta { content, tool_calls, .. } = piece.delta;
        if let Some(more) = content {
            self.message.content.get_or_insert_default().push_str(&more);
        }
        self.message.tool_calls.extend(tool_calls.into_iter().map(ToolCall::whole));
        if let Some(more) = piece.logprobs {
            self.logprobs.get_or_insert_default().content.extend(more.content);
        }
        if let Some(more) = piece.provenance {
            self.provenance.get_or_insert_default().extend(more);
        }
        self.finish_reason = self.finish_reason.or(piece.finish_reason);
        if self.finish_reason.is_some() && self.message.tool_calls.is_empty() {
            self.message.content.get_or_insert_default();
        }
    }
}

/// The answer piece by piece.
struct Stream {
    job: Job,
    progress: Progress,
    options: StreamOptions,
}

impl Stream {
    /// The pieces that say who speaks.
    fn first(&self) -> Vec<Value> {
        let choice = |index| {
            let (role, content) = (Some("assistant"), Some(String::new()));
            let delta = AnswerDelta { role, content, tool_calls: vec![] };
            ChunkChoice { index, delta, ..ChunkChoice::default() }
        };
        (0..self.job.plan.n as usize).map(|i| self.chunk(choice(i))).collect()
    }

    fn chunk(&self, choice: ChunkChoice) -> Value {
        let stats = self.options.continuous_usage_stats;
        let usage = stats.then(|| self.progress.usage(&self.job));
        self.job.chunk(vec![choice], usage, Figures::default())
    }
}

impl Writer for Stream {
    fn delta(&mut self, index: usize, delta: Delta) -> Result<Vec<Value>, ApiError> {
        let (piece, says) = self.progress.take(&self.job, index, &delta)?;
        Ok(if says { vec![self.chunk(piece)] } else { vec![] })
    }

    fn last(&mut self) -> Vec<Value> {
        let report = &self.progress.report;
        if !self.options.include_usage && !report.wants_figures() {
            return vec![];
        }
        let figures = report.figures(self.job.prompt.len());
        vec![self.job.chunk(vec![], Some(self.progress.usage(&self.job)), figures)]
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::chat_tests::server;
    use super::super::super::generation::Finish;
    use super::super::super::worker::Times;
    use super::super::calls::Call;
    use super::*;
    use engine::speculation::SpeculationCounts;

    fn delta(text: &str, reason: Option<FinishReason>) -> Delta {
        let (speculation, times) = (SpeculationCounts::default(), Times::default());
        let (accepted_in, cached_tokens) = (vec![], 0);
        let finish =
            reason.map(|reason| Finish { reason, speculation, accepted_in, times, cached_tokens });
        Delta { text: text.to_owned(), finish, ..Delta::default() }
    }

    /// What a stream says of an answer with calls that comes in these pieces.
    async fn choices(deltas: &[(&str, Option<FinishReason>)]) -> Vec<Value> {
        let server = server("{{ tools }}<tool_call>");
        let body = json!({"messages": [{"role": "user", "content": "x"}],
            "tools": [{"type": "function", "function": {"name": "add"}}]});
        let request = serde_json::from_value(body).unwrap();
        let job = Job::new(request, server.app.clone(), server.app.ready().unwrap());
        let job = job.await.unwrap();
        let report = Report::new(Wanted::default(), &HeaderMap::new(), &job.served);
        let progress = Progress::new(&job, report);
        let mut stream = Stream { job, progress, options: StreamOptions::default() };
        let deltas = deltas.iter().map(|(text, reason)| delta(text, *reason));
        let objects = deltas.flat_map(|delta| stream.delta(0, delta).unwrap());
        objects.map(|mut object| object["choices"][0].take()).collect()
    }

    #[tokio::test]
    async fn calls_are_streamed_one_by_one() {
        let call =
            |a: u32| format!("<tool_call>{{\"name\": \"add\", \"arguments\": {{\"a\": {a}}}");
        let (one, two) = (format!(".\n{}", call(1)), format!("}}</tool_call>\n{}", call(2)));
        let end = ("", Some(FinishReason::Stop));
        let deltas = [("Well", None), (&one, None), (&two, None), ("}</tool_call>", None), end];
        let found = choices(&deltas).await;
        assert_eq!(found.len(), 5, "{found:?}");
        assert_eq!(found[0]["delta"], json!({"content": "Well"}));
        assert_eq!(found[1]["delta"], json!({"content": "."}));
        for (i, choice) in found[2..4].iter().enumerate() {
            let call = &choice["delta"]["tool_calls"][0];
            assert_eq!(call["index"], i);
            assert_eq!(call["type"], "function");
            let arguments = format!("{{\"a\":{}}}", i + 1);
            assert_eq!(call["function"], json!({"name": "add", "arguments": arguments}));
            assert_eq!(call["id"].as_str().unwrap().len(), 9);
            assert_eq!(choice["finish_reason"], Value::Null);
        }
        assert_ne!(
            found[2]["delta"]["tool_calls"][0]["id"],
            found[3]["delta"]["tool_calls"][0]["id"]
        );
        assert_eq!(found[4]["finish_reason"], "tool_calls");
        assert_eq!(found[4]["delta"], json!({}));
    }

    #[tokio::test]
    async fn a_call_that_was_cut_off_is_text() {
        let cut = "<tool_call>{\"name\": \"add\", \"argu";
        let found = choices(&[(cut, None), ("", Some(FinishReason::Length))]).await;
        assert_eq!(found.len(), 1);
        assert_eq!(found[0]["delta"]["content"], cut);
        assert_eq!(found[0]["finish_reason"], "length");
    }

    #[tokio::test]
    async fn a_whole_answer_with_calls_alone_has_no_content() {
        let server = server("{{ messages }}");
        let call = Call { name: "add".into(), arguments: "{}".into() };
        let tool_calls = vec![ToolCall::new(call, 0, &server.app)];
        let with = AnswerDelta { tool_calls, ..AnswerDelta::default() };
        for (delta, content) in [(with, Value::Null), (AnswerDelta::default(), json!(""))] {
            let mut choice = ChatChoice::default();
            let finish_reason = Some("stop");
            choice.append(ChunkChoice { delta, finish_reason, ..ChunkChoice::default() });
            let message = &json!(choice)["message"];
            assert_eq!(message["content"], content);
            assert_eq!(message["tool_calls"][0].get("index"), None);
        }
    }
}
