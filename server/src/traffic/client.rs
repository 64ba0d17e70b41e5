//! One streamed completion over HTTP, with the times at which its pieces came.
//!
//! Speaks what every server of the OpenAI API has: `/v1/models`, `/v1/completions`. Not here: which
//! requests are sent and when ([`super`]), what the times mean ([`super::summary`]).

use anyhow::{Context, bail};
use axum::body::{Body, Bytes};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use axum::http::{Method, Request, StatusCode};
use futures_util::StreamExt;
use hyper_util::client::legacy::Client as Http;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::Value;
use std::error::Error;
use std::time::{Duration, Instant};

/// Longest time for a whole answer: something is broken then, not slow.
const PATIENCE: Duration = Duration::from_secs(600);
/// Most bytes of an answer that is not a stream.
const WHOLE_BYTES: usize = 16 << 20;
/// Most characters that are shown of an answer that is no JSON.
const SHOWN: usize = 200;

/// A server and how to reach it.
#[derive(Debug, Clone)]
pub(super) struct Client {
    http: Http<HttpConnector, Body>,
    root: String,
    key: Option<HeaderValue>,
}

/// When an answer's pieces came, since its request was sent.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    /// Of every piece with text, or at least of the one that says why the answer ended.
    pub pieces: Vec<Duration>,
    /// To the end of the stream.
    pub whole: Duration,
    /// Generated tokens; none where the server does not tell.
    pub tokens: Option<u64>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// None if the connection or the stream broke.
    pub status: Option<u16>,
    pub reason: String,
}

impl Failure {
    fn broken(reason: impl Into<String>) -> Self {
        Self { status: None, reason: reason.into() }
    }
}

/// A line of a stream, as far as it matters here.
#[derive(Deserialize)]
struct Piece {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: Option<u64>,
}

impl Client {
    /// For the server at `url`, which is not asked anything yet.
    ///
    /// # Errors
    /// A URL or key that cannot be used.
    pub(super) fn new(url: &str, key: Option<&str>) -> anyhow::Result<Self> {
        let root = url.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches('/');
        if root.starts_with("https://") {
            bail!(
                "{url} is behind TLS, which load does not speak: give the http address behind it"
            );
        }
        if !root.starts_with("http://") {
            bail!("{url} is no address of a server: expected one such as http://127.0.0.1:8080");
        }
        let key = key.map(|key| HeaderValue::from_str(&format!("Bearer {key}"))).transpose();
        let key = key.ok().context("--api-key has characters that a header cannot hold")?;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let http = Http::builder(TokioExecutor::new()).build(connector);
        Ok(Self { http, root: root.to_owned(), key })
    }

    /// The server's address.
    pub(super) fn root(&self) -> &str {
        &self.root
    }

    /// Status and text of what is at `path`.
    ///
    /// # Errors
    /// Nobody answers there.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<(StatusCode, String)> {
        let exchange = async {
            let response = self.send(path, None).await?;
            Ok::<_, Failure>((response.status(), text(response.into_body()).await?))
        };
        let answer = tokio::time::timeout(PATIENCE, exchange).await;
        let answer = answer.unwrap_or_else(|_| Err(Failure::broken("no answer")));
        answer.map_err(|failure| {
            anyhow::anyhow!("no server answers at {}: {}", self.root, failure.reason)
        })
    }

    /// Has `body` completed as a stream.
    pub(super) async fn complete(&self, body: String) -> Result<Answer, Failure> {
        let answer = tokio::time::timeout(PATIENCE, self.stream(body)).await;
        answer.unwrap_or_else(|_| {
            let seconds = PATIENCE.as_secs();
            Err(Failure::broken(format!("the answer had not ended after {seconds} seconds")))
        })
    }

    async fn stream(&self, body: String) -> Result<Answer, Failure> {
        let start = Instant::now();
        let response = self.send("/v1/completions", Some(body)).await?;
        let status = response.status();
        if status != StatusCode::OK {
            let reason = reason(&text(response.into_body()).await?);
            return Err(Failure { status: Some(status.as_u16()), reason });
        }
        let mut stream = response.into_body().into_data_stream();
        let mut reader = Reader::default();
        while let Some(bytes) = stream.next().await {
            reader.take(&bytes.map_err(|e| Failure::broken(causes(&e)))?, start.elapsed())?;
        }
        reader.answer(start.elapsed())
    }

    async fn send(
        &self,
        path: &str,
        body: Option<String>,
    ) -> Result<axum::http::Response<Body>, Failure> {
        let method = if body.is_some() { Method::POST } else { Method::GET };
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.root));
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, key.clone());
        }
        let request = request
            .header(CONTENT_TYPE, "application/json")
            .body(body.map_or_else(Body::empty, Body::from))
            .map_err(|e| Failure::broken(causes(&e)))?;
        let response = self.http.request(request).await;
        Ok(response.map_err(|e| Failure::broken(causes(&e)))?.map(Body::new))
    }
}

/// A stream's lines as they come.
#[derive(Debug, Default)]
struct Reader {
    /// The beginning of a line.
    rest: Vec<u8>,
    pieces: Vec<Duration>,
    tokens: Option<u64>,
    /// When a piece said why the answer ended.
    finished: Option<Duration>,
}

impl Reader {
    fn take(&mut self, bytes: &Bytes, at: Duration) -> Result<(), Failure> {
        self.rest.extend_from_slice(bytes);
        let rest = std::mem::take(&mut self.rest);
        let mut lines = rest.split(|&b| b == b'\n').peekable();
        while let Some(line) = lines.next() {
            if lines.peek().is_none() {
                self.rest = line.to_vec();
            } else if let Some(data) = line.strip_prefix(b"data:") {
                self.line(data.trim_ascii(), at)?;
            }
        }
        Ok(())
    }

    fn line(&mut self, data: &[u8], at: Duration) -> Result<(), Failure> {
        if data == b"[DONE]" {
            return Ok(());
        }
        let piece: Piece = serde_json::from_slice(data).map_err(|e| {
            Failure::broken(format!("a piece of the stream is not understood: {e}"))
        })?;
        if piece.error.is_some() {
            return Err(Failure::broken(reason(&String::from_utf8_lossy(data))));
        }
        self.tokens = piece.usage.and_then(|usage| usage.completion_tokens).or(self.tokens);
        let says = |choice: &Choice| choice.text.as_ref().is_some_and(|text| !text.is_empty());
        if piece.choices.iter().any(says) {
            self.pieces.push(at);
        }
        if piece.choices.iter().any(|choice| choice.finish_reason.is_some()) {
            self.finished = Some(at);
        }
        Ok(())
    }

    fn answer(self, whole: Duration) -> Result<Answer, Failure> {
        let Some(finished) = self.finished else {
            return Err(Failure::broken("the stream broke off before the answer's end"));
        };
        let Self { mut pieces, tokens, .. } = self;
        // Tokens may have no text at all.
        if pieces.is_empty() {
            pieces.push(finished);
        }
        Ok(Answer { pieces, whole, tokens })
    }
}

async fn text(body: Body) -> Result<String, Failure> {
    let bytes = axum::body::to_bytes(body, WHOLE_BYTES).await;
    let bytes = bytes.map_err(|e| Failure::broken(causes(&e)))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What an error's body says: the message of an OpenAI error, else its beginning.
pub(super) fn reason(body: &str) -> String {
    let object: Value = serde_json::from_str(body).unwrap_or_default();
    match object["error"]["message"].as_str().or(object["error"].as_str()) {
        Some(message) => message.to_owned(),
        None => body.trim().chars().take(SHOWN).collect(),
    }
}

/// The innermost cause, which says most; the outer ones say that something failed.
fn causes(error: &dyn Error) -> String {
    error.source().map_or_else(|| error.to_string(), causes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `parts`, a millisecond apart.
    fn read(parts: &[&str]) -> Result<Answer, Failure> {
        let mut reader = Reader::default();
        for (i, part) in parts.iter().enumerate() {
            reader.take(&Bytes::from((*part).to_owned()), Duration::from_millis(i as u64))?;
        }
        reader.answer(Duration::from_millis(parts.len() as u64))
    }

    #[test]
    fn lines_may_be_split_anywhere_and_come_together() {
        let answer = read(&[
            ": a comment\n\ndata: {\"choices\": [{\"text\": \"\", \"index\": 0}]}\n\ndata: {\"cho",
            "ices\": [{\"text\": \"a\"}]}\r\n\r\n",
            "data:{\"choices\":[{\"text\":\"b\",\"finish_reason\":\"length\"}]}\n\n\
             data: {\"choices\": [], \"usage\": {\"completion_tokens\": 7}}\n\ndata: [DONE]\n\n",
        ]);
        let pieces = [1, 2].map(Duration::from_millis).to_vec();
        assert_eq!(answer, Ok(Answer { pieces, whole: Duration::from_millis(3), tokens: Some(7) }));
    }

    #[test]
    fn streams_that_break_are_no_answers() {
        let broken = |parts: &[&str]| read(parts).unwrap_err().reason;
        assert!(broken(&["data: {\"choices\": [{\"text\": \"a\"}]}\n\n"]).contains("broke off"));
        assert_eq!(broken(&["data: {\"error\": {\"message\": \"no memory\"}}\n\n"]), "no memory");
        assert!(broken(&["data: nonsense\n\n"]).contains("not understood"));
    }

    #[test]
    fn an_answer_without_text_has_one_time() {
        let answer =
            read(&["data: {\"choices\": [{\"text\": \"\", \"finish_reason\": \"stop\"}]}\n"]);
        assert_eq!(answer.unwrap().pieces, [Duration::ZERO]);
    }

    #[test]
    fn addresses_that_cannot_be_meant() {
        assert_eq!(Client::new("http://a:1/v1/", None).unwrap().root(), "http://a:1");
        assert!(Client::new("https://a", None).unwrap_err().to_string().contains("TLS"));
        assert!(Client::new("a:1", None).unwrap_err().to_string().contains("http://"));
        assert!(Client::new("http://a", Some("a\nb")).is_err());
    }
}
