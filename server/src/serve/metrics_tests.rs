//! `/metrics` is Prometheus text, and its figures are those of the requests that were made.

use super::tests::TestServer;
use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Series by name and labels as they are written, with their values.
type Series = BTreeMap<String, f64>;

/// Reads Prometheus text (format 0.0.4); panics where it is none.
fn parse(text: &str) -> Series {
    let (mut kinds, mut series) = (BTreeMap::new(), Series::new());
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (key, name, rest) = (words.next(), words.next().unwrap(), words.next().unwrap());
            match key {
                Some("HELP") => assert!(!rest.is_empty(), "{line}"),
                Some("TYPE") => assert_eq!(kinds.insert(name.to_owned(), rest.to_owned()), None),
                _ => panic!("{line}"),
            }
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        let plain = name.split('{').next().unwrap();
        assert!(plain.starts_with(|c: char| c.is_ascii_alphabetic()), "{line}");
        assert!(plain.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':'), "{line}");
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| plain.strip_suffix(end));
        let is_histogram = |base: &&str| kinds.get(*base).is_some_and(|kind| kind == "histogram");
        let kind = &kinds[base.filter(is_histogram).unwrap_or(plain)];
        assert_eq!(kind == "counter", plain.ends_with("_total"), "{line} is a {kind}");
        if let Some(labels) = name.strip_prefix(plain).filter(|labels| !labels.is_empty()) {
            let labels = labels.strip_prefix('{').unwrap().strip_suffix("\"}").unwrap();
            labels.split("\",").for_each(|label| assert!(label.contains("=\""), "{line}"));
        }
        let value: f64 = value.parse().unwrap();
        assert!(value.is_finite() && value >= 0.0, "{line}");
        assert_eq!(series.insert(name.to_owned(), value), None, "{line} comes twice");
    }
    series
}

async fn series(server: &TestServer) -> Series {
    parse(&server.get("/metrics").await.1)
}

/// A server that has answered two requests and refused two.
async fn used() -> (TestServer, Vec<Value>) {
    let server = TestServer::start(&["--draft-tokens", "3"]);
    let mut answers = vec![];
    // The first ends long before its limit, so that the engine hears of its stop string in time.
    for (stop, tokens) in [(json!([" Commands"]), 2000), (json!([]), 32)] {
        let body = json!({"prompt": "fn main() {", "max_tokens": tokens, "temperature": 0,
            "stop": stop, "ignore_eos": true, "metrics": true});
        answers.push(server.post("/v1/completions", body).await.1);
    }
    server.post("/v1/completions", json!({"prompt": []})).await;
    server.get("/nowhere").await;
    (server, answers)
}

#[tokio::test]
async fn figures_are_those_of_the_requests() {
    let (server, answers) = used().await;
    let found = series(&server).await;
    let sum = |path: &str| -> f64 {
        answers.iter().map(|a| a.pointer(path).unwrap().as_f64().unwrap()).sum()
    };
    let of: fn(&str) -> String = |name| format!("foretoken_{name}");
    let is = |name: &str, value: f64| assert_eq!(found[&of(name)], value, "{name}");
    is("prompt_tokens_total", sum("/usage/prompt_tokens"));
    // What was computed behind a stop string, until the engine heard of it, is work too.
    assert!(found["foretoken_generation_tokens_total"] >= sum("/usage/completion_tokens"));
    is("requests_ended_total{finished_reason=\"length\"}", 1.0);
    is("requests_ended_total{finished_reason=\"stop\"}", 1.0);
    is("requests_ended_total{finished_reason=\"abort\"}", 0.0);
    is("requests_refused_total{reason=\"invalid\"}", 1.0);
    is("requests_refused_total{reason=\"unknown\"}", 1.0);
    is("drafts_total", sum("/metrics/speculative_decoding/num_spec_steps"));
    is("draft_tokens_total", sum("/timings/draft_n"));
    is("accepted_tokens_total", sum("/timings/draft_n_accepted"));
    let at = |i: usize| {
        found[&format!("foretoken_accepted_tokens_by_position_total{{position=\"{i}\"}}")]
    };
    assert_eq!(at(0) + at(1) + at(2), found["foretoken_accepted_tokens_total"]);
    assert!(at(0) >= at(1) && at(1) >= at(2) && at(2) > 0.0);
    for histogram in ["time_to_first_token_seconds", "request_seconds", "request_prompt_tokens"] {
        is(&format!("{histogram}_count"), 2.0);
        is(&format!("{histogram}_bucket{{le=\"+Inf\"}}"), 2.0);
    }
    is("request_prompt_tokens_sum", sum("/usage/prompt_tokens"));
    is("prefix_cached_tokens_total", sum("/usage/prompt_tokens_details/cached_tokens"));
    is("prefix_queried_tokens_total", sum("/usage/prompt_tokens"));
    let seconds = |span: &str| found[&format!("foretoken_request{span}_seconds_sum")];
    let parts = [seconds("_queue"), seconds("_prefill"), seconds("_decode")];
    assert!(parts.iter().all(|part| *part > 0.0), "{parts:?}");
    // Nanoseconds are added as floats.
    assert!((parts.iter().sum::<f64>() - seconds("")).abs() < 1e-9, "{parts:?}");
    assert!((parts[1] + parts[2] - seconds("_inference")).abs() < 1e-9, "{parts:?}");
    is("step_tokens_count", found["foretoken_steps_total"]);
    assert!(found["foretoken_step_tokens_sum"] >= found["foretoken_generation_tokens_total"]);
    let steps = found["foretoken_steps_total"];
    assert!(found["foretoken_inter_token_seconds_count"] + 2.0 <= steps, "of {steps} steps");
    for idle in ["requests_running", "requests_waiting", "kv_blocks_used", "kv_usage_ratio"] {
        is(idle, 0.0);
    }
    assert!(found["foretoken_kv_blocks"] > 0.0);
}

#[tokio::test]
async fn the_names_of_vllm_say_the_same() {
    let (server, _) = used().await;
    let found = series(&server).await;
    let labels = "{model_name=\"demo\"}";
    for (own, alias) in [
        ("requests_running", "num_requests_running"),
        ("requests_waiting", "num_requests_waiting"),
        ("kv_usage_ratio", "kv_cache_usage_perc"),
        ("preemptions_total", "num_preemptions_total"),
        ("prompt_tokens_total", "prompt_tokens_total"),
        ("generation_tokens_total", "generation_tokens_total"),
        ("drafts_total", "spec_decode_num_drafts_total"),
        ("draft_tokens_total", "spec_decode_num_draft_tokens_total"),
        ("accepted_tokens_total", "spec_decode_num_accepted_tokens_total"),
        ("time_to_first_token_seconds_sum", "time_to_first_token_seconds_sum"),
        ("inter_token_seconds_count", "inter_token_latency_seconds_count"),
        ("request_seconds_count", "e2e_request_latency_seconds_count"),
        ("request_prompt_tokens_sum", "request_prompt_tokens_sum"),
        ("request_generation_tokens_sum", "request_generation_tokens_sum"),
        ("prefix_queried_tokens_total", "prefix_cache_queries_total"),
        ("prefix_cached_tokens_total", "prefix_cache_hits_total"),
        ("prefix_cached_tokens_total", "prompt_tokens_cached_total"),
        ("step_tokens_sum", "iteration_tokens_total_sum"),
        ("request_queue_seconds_sum", "request_queue_time_seconds_sum"),
        ("request_prefill_seconds_sum", "request_prefill_time_seconds_sum"),
        ("request_decode_seconds_sum", "request_decode_time_seconds_sum"),
        ("request_inference_seconds_count", "request_inference_time_seconds_count"),
        ("request_time_per_token_seconds_sum", "request_time_per_output_token_seconds_sum"),
    ] {
        let own = found[&format!("foretoken_{own}")];
        assert_eq!(found[&format!("vllm:{alias}{labels}")], own, "{alias}");
    }
    for reason in ["stop", "length", "abort", "error"] {
        let own = &format!("foretoken_requests_ended_total{{finished_reason=\"{reason}\"}}");
        let alias = &format!(
            "vllm:request_success_total{{model_name=\"demo\",finished_reason=\"{reason}\"}}"
        );
        assert_eq!(found[alias], found[own]);
    }
    let at = "vllm:spec_decode_num_accepted_tokens_per_pos_total";
    let at = found.keys().filter(|name| name.starts_with(at)).count();
    assert_eq!(at, 3, "one for each place of a draft");
}

#[tokio::test]
async fn who_leaves_is_counted_and_what_drafts_are_worth_is_told() {
    let server = TestServer::start(&["--draft-tokens", "auto"]);
    assert!(!series(&server).await.contains_key("foretoken_measured_acceptance"));
    let body = json!({"prompt": "fn main() {", "max_tokens": 64, "temperature": 0});
    server.post("/v1/completions", body).await;
    let body =
        json!({"prompt": "fn main() {", "max_tokens": 400, "stream": true, "ignore_eos": true});
    let request = Request::post("/v1/completions").body(Body::from(body.to_string())).unwrap();
    let response = tower::ServiceExt::oneshot(server.router.clone(), request).await.unwrap();
    drop(response);
    let aborted = "foretoken_requests_ended_total{finished_reason=\"abort\"}";
    let mut found = series(&server).await;
    for _ in 0..500 {
        if found[aborted] == 1.0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        found = series(&server).await;
    }
    assert_eq!(found[aborted], 1.0);
    assert_eq!(found["foretoken_request_seconds_count"], 1.0, "only one came to its end");
    let told = ["foretoken_break_even_acceptance", "foretoken_measured_acceptance"];
    println!("{:?}", told.map(|name| found.get(name)));
    // A machine on which no draft pays may draft nothing, and has no break-even.
    if found["foretoken_drafts_total"] > 0.0 {
        assert!((0.0..=1.0).contains(&found["foretoken_measured_acceptance"]));
    }
}
