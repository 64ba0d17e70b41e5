//! Who is let in, how much is taken, and what refusals give away.

use super::access::Access;
use super::tests::TestServer;
use crate::cli::{Cli, Command, ServeArgs};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use clap::Parser;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn args(words: &[&str]) -> ServeArgs {
    match Cli::try_parse_from(["foretoken", "serve"].iter().chain(words)).unwrap().command {
        Command::Serve(args) => args,
        _ => panic!("these are arguments of serve"),
    }
}

#[tokio::test]
async fn only_who_has_a_key_gets_in() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "# team\nsecret-two\n\n  secret-three  \n").unwrap();
    let path = file.path().to_str().unwrap();
    let server = TestServer::start(&["--api-key", "secret-one", "--api-key-file", path]);
    let get = async |path: &str, name: &str, value: &str| {
        let request = Request::get(path).header(name, value).body(Body::empty()).unwrap();
        server.send(request).await
    };
    for key in ["secret-one", "secret-two", "secret-three"] {
        let bearer = format!("Bearer {key}");
        assert_eq!(get("/v1/models", "authorization", &bearer).await.0, StatusCode::OK, "{key}");
        assert_eq!(get("/v1/models", "x-api-key", key).await.0, StatusCode::OK, "{key}");
    }
    for (name, value) in [
        ("authorization", "Bearer secret-on"),
        ("authorization", "Bearer secret-one1"),
        ("authorization", "Bearer # team"),
        ("authorization", "Bearer "),
        ("authorization", "Basic secret-one"),
        ("authorization", "secret-one"),
        ("x-api-key", ""),
        ("cookie", "secret-one"),
    ] {
        for path in ["/v1/models", "/metrics", "/nowhere", "/v1/completions"] {
            let (status, text) = get(path, name, value).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path} {value}");
            let error = &serde_json::from_str::<Value>(&text).unwrap()["error"];
            assert_eq!(error["type"], "authentication_error");
            assert_eq!(error["code"], "invalid_api_key");
            assert!(!text.contains("secret"), "{text}");
        }
    }
    for path in ["/health", "/ready"] {
        assert_eq!(server.get(path).await.0, StatusCode::OK);
    }
    let (_, text) = get("/metrics", "authorization", "bearer secret-one").await;
    let refused = "foretoken_requests_refused_total{reason=\"unauthorized\"} 32";
    assert!(text.contains(refused), "{text}");
}

#[test]
fn keys_that_cannot_be_sent_are_refused_without_being_shown() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let path = empty.path().to_str().unwrap();
    for (words, part) in [
        (vec!["--api-key", ""], "a key is empty"),
        (vec!["--api-key", "my secret"], "spaces"),
        (vec!["--api-key", "schlüssel"], "characters"),
        (vec!["--api-key-file", path], "has no key"),
        (vec!["--api-key-file", "/nowhere/keys"], "cannot read"),
        (vec!["--cors-origin", "example.org"], "https://example.org"),
        (vec!["--cors-origin", "https://example.org/path"], "without a path"),
        (vec!["--allowed-host", "https://example.org"], "without scheme"),
        (vec!["--allowed-host", "example.org:80"], "without scheme"),
        (vec!["--allowed-host", ""], "without scheme"),
    ] {
        let error = Access::new(&args(&words).access).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains(part) && !text.contains("secret"), "{words:?}: {text}");
    }
}

#[test]
fn an_address_that_others_reach_is_open_only_on_purpose() {
    let check = |words: &[&str]| {
        let args = args(words);
        Access::new(&args.access).unwrap().check_host(args.host, &args.access)
    };
    for host in ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"] {
        assert_eq!(check(&["--host", host]).unwrap(), None, "{host}");
    }
    for host in ["0.0.0.0", "::", "192.168.1.2", "::ffff:10.0.0.1"] {
        let error = check(&["--host", host]).unwrap_err().to_string();
        assert!(error.contains(host) && error.contains("--allow-public"), "{error}");
        assert_eq!(check(&["--host", host, "--api-key", "k"]).unwrap(), None);
        let warning = check(&["--host", host, "--allow-public"]).unwrap().unwrap();
        assert!(warning.starts_with("warning") && warning.contains(host), "{warning}");
    }
    let mut err = vec![];
    let mut io = crate::Io {
        out: &mut vec![],
        err: &mut err,
        input: &mut std::io::empty(),
        out_is_terminal: false,
        err_is_terminal: false,
        input_is_terminal: true,
    };
    let words = ["foretoken", "serve", "--host", "0.0.0.0", "--port", "0"];
    assert_eq!(crate::main_with(words.map(Into::into), &mut io), crate::EXIT_USER);
    assert!(String::from_utf8(err).unwrap().contains("--allow-public"));
}

#[tokio::test]
async fn pages_of_other_origins_call_only_where_allowed() {
    let ask = |origin: &str| {
        Request::options("/v1/completions")
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
            .body(Body::empty())
            .unwrap()
    };
    let allowed = async |server: &TestServer, origin: &str| {
        let response =
            tower::ServiceExt::oneshot(server.router.clone(), ask(origin)).await.unwrap();
        let allowed = response.headers().get("access-control-allow-origin").cloned();
        allowed.map(|value| value.to_str().unwrap().to_owned())
    };
    let page = "https://example.org";
    let closed = TestServer::start(&["--draft", "off"]);
    assert_eq!(allowed(&closed, page).await, None);
    let words = ["--draft", "off", "--api-key", "k", "--cors-origin", page];
    let one = TestServer::start(&words);
    assert_eq!(allowed(&one, page).await.as_deref(), Some(page));
    assert_eq!(allowed(&one, "https://example.com").await, None);
    let all = TestServer::start(&["--draft", "off", "--cors-origin", "*"]);
    assert_eq!(allowed(&all, page).await.as_deref(), Some("*"));
}

#[tokio::test]
async fn what_is_too_large_is_refused_in_words() {
    let server = TestServer::start(&["--draft", "off", "--max-body-bytes", "10000"]);
    let post = async |body: String| {
        let request = Request::post("/v1/completions").body(Body::from(body)).unwrap();
        let (status, text) = server.send(request).await;
        let error = serde_json::from_str::<Value>(&text).unwrap()["error"].clone();
        (status.as_u16(), error["message"].as_str().unwrap().to_owned())
    };
    let (status, message) = post(json!({"prompt": "a".repeat(10_000)}).to_string()).await;
    assert_eq!((status, message.contains("larger")), (413, true), "{message}");
    let (status, _) = post(json!({"prompt": "a".repeat(9000), "n": 0}).to_string()).await;
    assert_eq!(status, 400, "a body within the limit is read");
    let deep = format!(r#"{{"prompt": "a", "extra": {}"#, "[".repeat(5000));
    let (status, message) = post(deep).await;
    assert_eq!((status, message.contains("recursion")), (400, true), "{message}");
    let within = format!(r#"{{"prompt": 1, "extra": {}{}}}"#, "[".repeat(100), "]".repeat(100));
    assert!(!post(within).await.1.contains("recursion"), "a hundred levels are fine");
    let long = Request::get("/v1/models").header("x-long", "a".repeat(40_000));
    let (status, text) = server.send(long.body(Body::empty()).unwrap()).await;
    assert_eq!(status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "{text}");
    assert!(text.contains("invalid_request_error"), "{text}");
}

#[tokio::test]
async fn a_text_longer_than_the_context_is_refused_by_its_tokens_or_its_bytes() {
    let server = TestServer::start(&["--draft", "off"]);
    for (bytes, part) in [(30_000, "tokens, but the context"), (3 << 20, "bytes, more than")] {
        let body = json!({"prompt": "let x = y; ".repeat(bytes / 11)});
        let (status, answer) = server.post("/v1/completions", body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert_eq!(answer["error"]["code"], "context_length_exceeded");
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{answer}");
    }
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_told_so_and_cancelled() {
    let server = TestServer::start(&["--draft", "off", "--request-seconds", "1"]);
    let prompt = "fn main() {";
    let mut body = json!({"prompt": prompt, "temperature": 0, "ignore_eos": true, "n": 16});
    body["max_tokens"] = json!(100_000);
    for stream in [false, true] {
        body["stream"] = json!(stream);
        let start = Instant::now();
        let request = Request::post("/v1/completions").body(Body::from(body.to_string())).unwrap();
        let (status, text) = server.send(request).await;
        assert!(text.contains(r#""code":"timeout""#), "{text}");
        assert_eq!(status.as_u16(), if stream { 200 } else { 503 });
        assert_eq!(stream, text.ends_with("data: [DONE]\n\n"));
        assert!(start.elapsed() >= Duration::from_secs(1));
    }
    for _ in 0..500 {
        if server.get("/metrics").await.1.contains("\nforetoken_kv_blocks_used 0\n") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("requests that were given up still hold KV blocks");
}
