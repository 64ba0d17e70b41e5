//! What answers tell of acceptance, times and provenance where they are asked.

use super::tests::TestServer;
use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

/// The objects of a stream, without `[DONE]`.
fn pieces(text: &str) -> Vec<Value> {
    let pieces = text.lines().filter_map(|line| line.strip_prefix("data: "));
    pieces.filter(|p| *p != "[DONE]").map(|p| serde_json::from_str(p).unwrap()).collect()
}

/// The figures agree with each other and with a budget of `budget` tokens.
fn check_figures(answer: &Value, budget: u64) {
    let all = &answer["metrics"]["speculative_decoding"];
    let number = |key: &str| all[key].as_u64().unwrap_or_else(|| panic!("{key}: {answer}"));
    let histogram: Vec<u64> = serde_json::from_value(all["acceptance_histogram"].clone()).unwrap();
    assert_eq!(number("num_spec_tokens"), budget);
    assert_eq!(histogram.len() as u64, budget + 1);
    assert_eq!(histogram.iter().sum::<u64>(), number("num_spec_steps"));
    let accepted: u64 = histogram.iter().zip(0..).map(|(n, j)| n * j).sum();
    assert_eq!(accepted, number("num_accepted_draft_tokens"));
    assert!(accepted > 0 && number("num_draft_tokens") > accepted, "{answer}");
    let mean = 1.0 + accepted as f64 / number("num_spec_steps") as f64;
    assert!((all["mean_acceptance_length"].as_f64().unwrap() - mean).abs() < 1e-12);
    let rate = accepted as f64 / number("num_draft_tokens") as f64;
    assert!((all["draft_acceptance_rate"].as_f64().unwrap() - rate).abs() < 1e-12);
    let timings = &answer["timings"];
    assert_eq!(timings["draft_n"], number("num_draft_tokens"));
    assert_eq!(timings["draft_n_accepted"], accepted);
    assert_eq!(timings["prompt_n"], answer["usage"]["prompt_tokens"]);
    assert_eq!(timings["predicted_n"], answer["usage"]["completion_tokens"]);
    let later = timings["predicted_n"].as_f64().unwrap() - 2.0;
    let speed = later / timings["predicted_ms"].as_f64().unwrap() * 1e3;
    assert!((timings["predicted_per_second"].as_f64().unwrap() / speed - 1.0).abs() < 1e-9);
}

/// Provenance entries of choice `index` in `objects`: their text, and the sources.
fn provenance(objects: &[Value], index: usize) -> (String, Vec<String>) {
    let choices = objects.iter().flat_map(|o| o["choices"].as_array().unwrap());
    let of = choices.filter(|c| c["index"] == index);
    let entries = of.flat_map(|c| c["provenance"].as_array().unwrap());
    let entries = entries.map(|e| (e["text"].as_str().unwrap(), e["source"].as_str().unwrap()));
    let (texts, sources): (Vec<&str>, Vec<&str>) = entries.unzip();
    (texts.concat(), sources.into_iter().map(str::to_owned).collect())
}

#[tokio::test]
async fn acceptance_and_provenance_are_told_to_who_asks() {
    let server = TestServer::start(&["--draft-tokens", "3"]);
    let body = json!({"prompt": "fn main() {", "max_tokens": 40, "seed": 3, "n": 2,
        "stop": ["\n}"], "metrics": true, "provenance": true});
    let (_, whole) = server.post("/v1/completions", body.clone()).await;
    check_figures(&whole, 3);
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let request = Request::post("/v1/completions").body(Body::from(streamed.to_string()));
    let objects = pieces(&server.send(request.unwrap()).await.1);
    let last = objects.last().unwrap();
    check_figures(last, 3);
    assert_eq!(last["choices"], json!([]));
    assert!(objects.iter().rev().skip(1).all(|o| o.get("metrics").is_none()));
    for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let (text, sources) = provenance(std::slice::from_ref(&whole), i);
        assert_eq!(text, choice["text"].as_str().unwrap());
        assert_eq!(provenance(&objects, i).0, text);
        assert_eq!(sources[0], "plain", "a prompt's step guesses nothing");
        let known = ["plain", "drafted", "corrected", "bonus"];
        assert!(sources.iter().all(|s| known.contains(&s.as_str())), "{sources:?}");
        assert!(sources.iter().any(|s| s == "drafted"), "{sources:?}");
    }
}

#[tokio::test]
async fn nobody_is_told_unasked() {
    let server = TestServer::start(&["--draft", "off"]);
    let body = json!({"prompt": "fn main() {", "max_tokens": 4, "temperature": 0});
    let (_, answer) = server.post("/v1/completions", body.clone()).await;
    assert_eq!(answer.get("metrics").or(answer.get("timings")), None);
    assert_eq!(answer["choices"][0].get("provenance"), None);
    let request = Request::post("/v1/completions").header("x-foretoken-metrics", "1");
    let (_, text) = server.send(request.body(Body::from(body.to_string())).unwrap()).await;
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(answer["metrics"], json!({}), "there is no draft to tell of");
    assert_eq!(answer["timings"]["predicted_n"], 4);
}

#[tokio::test]
async fn an_echoed_prompt_has_no_provenance() {
    let server = TestServer::start(&["--draft-tokens", "3"]);
    let mut body = json!({"prompt": "fn main() {", "max_tokens": 6, "temperature": 0,
        "echo": true, "provenance": true});
    let (_, answer) = server.post("/v1/completions", body.clone()).await;
    let (text, _) = provenance(std::slice::from_ref(&answer), 0);
    assert_eq!(format!("fn main() {{{text}"), answer["choices"][0]["text"].as_str().unwrap());
    body["max_tokens"] = json!(0);
    let (_, answer) = server.post("/v1/completions", body).await;
    assert_eq!(answer["choices"][0]["provenance"], json!([]));
}
