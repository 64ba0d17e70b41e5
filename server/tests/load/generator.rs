//! `foretoken load` against the built server: it counts what the server counts, and says why it cannot.
//!
//! Input: the demo pair, and traces written here. Not here: what a server does under a wild load.

use super::{KEY, Server};
use serde_json::{Value, json};
use std::process::Command;

/// What `foretoken load` prints, and its exit code.
fn load(words: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foretoken"));
    let output = command.args(["load", "--json"]).args(words).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_load_counts_what_its_server_counts() {
    let server = Server::start(&["--threads", "1"]);
    let url = format!("http://{}/v1/", server.address);
    let trace = tempfile::NamedTempFile::new().unwrap();
    let lines = ["374,44", "9999,10", "5,0"].map(|l| format!("2023-11-16 18:15:46.68,{l}\n"));
    let header = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
    std::fs::write(trace.path(), format!("{header}{}", lines.concat())).unwrap();
    let path = trace.path().to_str().unwrap();
    let streams =
        ["--streams", "3", "--requests", "10", "--prompt-tokens", "20", "--max-tokens", "30"];
    let (mut prompts, mut generated) = (0, 0);
    // The demo pair has a context of 2048: the longest prompt becomes 2048 - 5.
    for (words, counts) in [
        (&streams[..], [10, 200, 300]),
        (&["--trace", path, "--shrink", "2"], [3, 187 + 2043 + 3, 22 + 5 + 1]),
    ] {
        let always = [&url, "--api-key", KEY, "--slo-ttft", "60000", "--slo-itl", "60000"];
        let (code, out, err) = load(&[&always[..], words].concat());
        assert_eq!(code, Some(0), "{err}");
        let told: Value = serde_json::from_str(&out).unwrap();
        let found = ["answered", "prompt_tokens", "generated_tokens"].map(|key| &told[key]);
        assert_eq!(found, counts.map(|n| json!(n)).each_ref(), "{out}");
        assert_eq!(told["failed"], json!({}));
        assert_eq!(told["goodput"]["share"], 1.0);
        assert_eq!(told["tokens_are_exact"], true);
        assert!(told["ttft_ms"]["p50"].as_f64() <= told["whole_ms"]["max"].as_f64(), "{out}");
        assert!(told["server"]["steps"].as_f64() > Some(0.0), "{out}");
        assert_eq!(err.contains("lose 2957 tokens"), words[0] == "--trace", "{err}");
        prompts += counts[1];
        generated += counts[2];
    }
    let found = server.idle_metrics();
    assert_eq!(found["foretoken_prompt_tokens_total"] as i32, prompts);
    assert_eq!(found["foretoken_generation_tokens_total"] as i32, generated);
    let (step, all) =
        (found["foretoken_step_seconds_total"], found["foretoken_worker_seconds_total"]);
    assert!(0.0 < step && step <= all, "{step} of {all}");
    server.stop();
}

#[test]
fn a_load_says_why_it_cannot_be() {
    let refuse = |words: &[&str], parts: &[&str]| {
        let (code, _, err) = load(words);
        assert_eq!(code, Some(2), "{err}");
        assert!(parts.iter().all(|part| err.contains(part)), "{err}");
    };
    // Nobody listens at a port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    refuse(&[&format!("http://{free}")], &["no server answers", &free.to_string(), "refused"]);
    refuse(&["localhost:8080"], &["http://"]);
    let trace = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(trace.path(), "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n").unwrap();
    let path = trace.path().to_str().unwrap();
    refuse(&["--trace", path], &[path, "line 2", "TIMESTAMP is \"noon\""]);
    let server = Server::start(&["--max-running", "1", "--max-queue", "0", "--draft", "off"]);
    let url = format!("http://{}", server.address);
    refuse(&[&url], &["401", "key"]);
    refuse(&[&url, "--api-key", KEY, "--max-tokens", "2000"], &["context of 2048"]);
    // One place and no queue: of many streams some are refused, and none of that is lost.
    let words = ["--api-key", KEY, "--streams", "4", "--requests", "12", "--max-tokens", "200"];
    let (code, out, err) = load(&[&[&url[..]], &words[..]].concat());
    assert_eq!(code, Some(0), "{err}");
    let told: Value = serde_json::from_str(&out).unwrap();
    let full = &told["failed"]["status 429"];
    assert!(full["count"].as_u64() > Some(0), "{out}");
    assert_eq!(told["answered"].as_u64().unwrap() + full["count"].as_u64().unwrap(), 12);
    server.stop();
}
