//! A server over the demo pair, without sockets.

use super::access::Access;
use super::app::{App, Served};
use super::metrics::Metrics;
use super::{routes, worker};
use crate::cli::{Cli, Command};
use crate::io::Io;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use clap::Parser;
use serde_json::{Value, json};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tower::ServiceExt;

/// A router whose engine runs on a thread of its own until the server is dropped.
pub(super) struct TestServer {
    pub app: Arc<App>,
    pub router: Router,
    thread: Option<JoinHandle<()>>,
}

impl TestServer {
    /// `foretoken serve` with these arguments.
    pub(super) fn start(arguments: &[&str]) -> Self {
        let metrics = Arc::new(Metrics::new().unwrap());
        let (handle, inbox) = worker::channel();
        let app = Arc::new(App::new(handle, metrics.clone()));
        let words = ["foretoken", "serve"].iter().chain(arguments);
        let Command::Serve(args) = Cli::try_parse_from(words).unwrap().command else {
            panic!("these are arguments of serve")
        };
        let access = Access::new(&args.access).unwrap();
        let (ready, loaded) = std::sync::mpsc::channel::<Served>();
        let thread = std::thread::spawn(move || {
            let (mut out, mut err) = (vec![], vec![]);
            let mut io = Io {
                out: &mut out,
                err: &mut err,
                input: &mut std::io::empty(),
                out_is_terminal: false,
                err_is_terminal: false,
                input_is_terminal: true,
            };
            let (engine, served) = super::load(&args, &mut io).unwrap();
            ready.send(served).unwrap();
            worker::run(engine, inbox, &metrics, Duration::from_secs(5));
        });
        app.serve(loaded.recv().unwrap());
        let router = access.guard(routes::router(app.clone()), app.metrics.clone());
        Self { app, router, thread: Some(thread) }
    }

    /// Sends a request and waits for the whole answer.
    pub(super) async fn send(&self, request: Request<Body>) -> (StatusCode, String) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    /// Posts JSON.
    pub(super) async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let request = Request::post(path).header("content-type", "application/json");
        let (status, text) = self.send(request.body(Body::from(body.to_string())).unwrap()).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Gets a text.
    pub(super) async fn get(&self, path: &str) -> (StatusCode, String) {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let handle = self.app.handle.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(handle.stop());
        });
        if let Some(thread) = self.thread.take() {
            // A test that failed already must not fail again here.
            let _ = thread.join();
        }
    }
}

#[tokio::test]
async fn a_completion_is_the_text_that_run_prints() {
    let server = TestServer::start(&[]);
    let body = json!({"prompt": "fn main() {", "max_tokens": 24, "temperature": 0});
    let (status, answer) = server.post("/v1/completions", body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let mut out = vec![];
    let mut io = Io {
        out: &mut out,
        err: &mut vec![],
        input: &mut std::io::empty(),
        out_is_terminal: false,
        err_is_terminal: false,
        input_is_terminal: true,
    };
    let words = ["foretoken", "run", "fn main() {", "--max-tokens", "24", "--json"];
    assert_eq!(crate::main_with(words.map(Into::into), &mut io), 0);
    let run: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(answer["choices"][0]["text"], run["text"]);
    assert_eq!(answer["choices"][0]["finish_reason"], run["finish_reason"]);
    assert_eq!(answer["usage"]["completion_tokens"], 24);
}

#[tokio::test]
async fn a_stream_is_the_whole_answer_in_pieces() {
    let server = TestServer::start(&[]);
    let mut body = json!({"prompt": ["fn main() {", "use std::"], "max_tokens": 20, "seed": 5, "n": 2,
        "logprobs": 2, "echo": true});
    let (_, whole) = server.post("/v1/completions", body.clone()).await;
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let request = Request::post("/v1/completions").body(Body::from(body.to_string())).unwrap();
    let (status, text) = server.send(request).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let pieces: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(pieces.last(), Some(&"[DONE]"));
    let pieces = pieces[..pieces.len() - 1].iter();
    let pieces: Vec<Value> = pieces.map(|p| serde_json::from_str(p).unwrap()).collect();
    assert_eq!(pieces.last().unwrap()["usage"], whole["usage"]);
    for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let of = pieces.iter().flat_map(|p| p["choices"].as_array().unwrap());
        let of: Vec<&Value> = of.filter(|c| c["index"] == i).collect();
        let text: String = of.iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(text, choice["text"].as_str().unwrap());
        for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let list = |c: &Value| c["logprobs"][key].as_array().unwrap().clone();
            let all: Vec<Value> = of.iter().flat_map(|c| list(c)).collect();
            assert_eq!(all, list(choice), "{key}");
        }
        assert_eq!(of.last().unwrap()["finish_reason"], choice["finish_reason"]);
    }
}

#[tokio::test]
async fn mistakes_are_answered_in_words() {
    let server = TestServer::start(&[]);
    let refuse = async |body: &str, param: Option<&str>, status: u16, part: &str| {
        let request = Request::post("/v1/completions").body(Body::from(body.to_owned())).unwrap();
        let (found, text) = server.send(request).await;
        assert_eq!(found.as_u16(), status, "{body}: {text}");
        let error = &serde_json::from_str::<Value>(&text).unwrap()["error"];
        assert_eq!(error["param"].as_str(), param, "{body}: {text}");
        assert!(error["message"].as_str().unwrap().contains(part), "{body}: {text}");
    };
    refuse("{", None, 400, "not valid JSON").await;
    refuse("{}", None, 400, "prompt").await;
    refuse(r#"{"prompt": []}"#, Some("prompt"), 400, "at least one").await;
    refuse(r#"{"prompt": [99999999]}"#, Some("prompt"), 400, "vocabulary").await;
    refuse(r#"{"prompt": "a", "suffix": "b"}"#, Some("suffix"), 400, "fill gaps").await;
    refuse(r#"{"prompt": "a", "temperature": -1}"#, Some("temperature"), 400, "0 to 100").await;
    refuse(r#"{"prompt": "a", "n": 0}"#, Some("n"), 400, "1 to 128").await;
    refuse(r#"{"prompt": "a", "model": "b"}"#, Some("model"), 404, "demo").await;
    refuse(r#"{"prompt": "a", "logprobs": 21}"#, Some("logprobs"), 400, "0 to 20").await;
    assert_eq!(server.get("/nowhere").await.0, StatusCode::NOT_FOUND);
    assert_eq!(server.get("/v1/completions").await.0, StatusCode::METHOD_NOT_ALLOWED);
}

/// Of a prompt that was computed before, only the last, not full block is computed again; with and
/// without sharing, the text and all figures but the cached tokens are the same.
#[tokio::test]
async fn what_was_computed_before_is_counted_and_changes_nothing() {
    let prompt: Vec<u32> = (0..50).map(|i| 40 + i * 7 % 60).collect();
    let body = json!({"prompt": prompt, "max_tokens": 24, "seed": 3, "logprobs": 1});
    let mut answers = vec![];
    for (arguments, expected) in [(&[][..], [0, 48, 48]), (&["--no-prefix-cache"], [0, 0, 0])] {
        let server = TestServer::start(arguments);
        for cached in expected {
            let (_, mut answer) = server.post("/v1/completions", body.clone()).await;
            let details = answer["usage"]["prompt_tokens_details"].take();
            assert_eq!(details, json!({"cached_tokens": cached}), "{arguments:?}");
            answers.push((answer["choices"].take(), answer["usage"].take()));
        }
    }
    assert_eq!(answers[0].0[0]["logprobs"]["tokens"].as_array().unwrap().len(), 24);
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}
