//! Guessing ahead with real numbers: whoever drafts, however much, the text stays the same.
//!
//! Every test generates with and without a draft on the same backend and compares all tokens.
//! Input: the demo pair, and made-up weights of the draft's sizes. Not here: schedules of many
//! sequences over a scripted runner (the engine's own tests).

use crate::cli::{assert_refused, foretoken};
use crate::run::{self, Device};
use engine::engine::{Engine, EngineConfig};
use engine::kv::{BLOCK_LEN, PrefixCaching};
use engine::model::{Head, Model};
use engine::request::{Event, FinishReason, Request, RequestId};
use engine::sampler::SamplingParams;
use engine::speculation::vocab::VocabMap;
use engine::speculation::{DraftModel, Drafter, Length, Rule, Speculation, SpeculationCounts};
use engine::synthetic::{Formats, SyntheticModel};
use kernels::cpu::{CpuBackend, CpuOptions};
use kernels::program::TokenId;
use kernels::{Backend, Program, StepLimits, WeightSource};
use quant::{Bits, Format};
use serde_json::Value;
use std::path::Path;

fn demo(name: &str) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/demo").join(name);
    run::open_with(&dir, Head::Keep)
}

/// Who drafts: a program and its weights, and how many tokens a cycle.
struct Draft<'a> {
    program: &'a Program,
    weights: &'a dyn WeightSource,
    context_len: u32,
    length: usize,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq)]
struct Output {
    ids: Vec<TokenId>,
    reason: Option<FinishReason>,
}

/// Runs all requests together, three at a time, in steps of at most 24 tokens.
fn outputs(
    verifier: &Model,
    draft: Option<&Draft<'_>>,
    backend: &dyn Backend,
    requests: &[Request],
) -> (Vec<Output>, SpeculationCounts) {
    let spec = verifier.spec();
    let config = EngineConfig {
        vocab: spec.vocab,
        context_len: spec.context_len,
        step_tokens: 24,
        max_sequences: 3,
        blocks: 64,
        block_len: BLOCK_LEN,
        max_waiting: requests.len(),
        max_drafted: draft.map_or(0, |draft| draft.length),
        max_scored: 0,
        prefix_caching: PrefixCaching::Off,
    };
    let build = |program: &Program, weights: &dyn WeightSource, limits: &StepLimits| {
        backend.build(program, weights, limits).unwrap_or_else(|e| panic!("{}", run::chain(&e)))
    };
    let runner = build(verifier.program(), &verifier.weights(), &config.step_limits());
    let mut engine = Engine::new(runner, config);
    if let Some(draft) = draft {
        let limits = config.draft_limits();
        let runner = build(draft.program, draft.weights, &limits);
        let vocab = VocabMap::same(spec.vocab, spec.vocab);
        let model = DraftModel::new(runner, &limits, vocab, draft.context_len);
        engine = engine.with_speculation(Speculation {
            drafter: Drafter::Model(model),
            length: Length::Fixed(draft.length),
            rule: Rule::Coupled,
        });
    }
    drain(&mut engine, requests)
}

fn drain(engine: &mut Engine, requests: &[Request]) -> (Vec<Output>, SpeculationCounts) {
    let submit = |request: &Request| engine.submit(request.clone()).expect("a valid request");
    let ids: Vec<RequestId> = requests.iter().map(submit).collect();
    let mut outputs = vec![Output { ids: vec![], reason: None }; ids.len()];
    let (mut events, mut counts) = (vec![], SpeculationCounts::default());
    while outputs.iter().any(|output| output.reason.is_none()) {
        engine.step(&mut events).expect("a step");
        for event in events.drain(..) {
            let of = |id| ids.iter().position(|other| *other == id).expect("a known request");
            match event {
                Event::Prompt { .. } => {}
                Event::Token { id, token, .. } => outputs[of(id)].ids.push(token),
                Event::Finished { id, reason, speculation, .. } => {
                    outputs[of(id)].reason = Some(reason);
                    counts.cycles += speculation.cycles;
                    counts.drafted_tokens += speculation.drafted_tokens;
                    counts.accepted_tokens += speculation.accepted_tokens;
                }
                Event::Failed { reason, .. } => panic!("{reason}"),
            }
        }
    }
    (outputs, counts)
}

/// The golden prompts of the demo's verifier.
fn prompts() -> Vec<Vec<TokenId>> {
    let golden = testkit::golden_json("demo.json");
    let all = golden["greedy"]["verifier"].as_array().expect("prompts");
    all.iter().map(|one| run::ids(&one["ids"])).collect()
}

/// Greedy, sampled, filtered and penalized requests over different prompts.
fn requests(max_tokens: u32) -> Vec<Request> {
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let sampled = |temperature, seed| SamplingParams { temperature, seed, ..greedy.clone() };
    let filtered = SamplingParams { top_p: 0.9, top_k: 40, min_p: 0.02, ..sampled(1.1, 3) };
    let penalized = SamplingParams {
        repetition_penalty: 1.3,
        frequency_penalty: 0.4,
        presence_penalty: 0.2,
        logit_bias: vec![(TokenId(259), -2.0), (TokenId(26), 1.5)],
        ..greedy.clone()
    };
    let both = SamplingParams { temperature: 0.7, seed: 11, ..penalized.clone() };
    let all = [greedy.clone(), sampled(0.6, 0), sampled(1.0, 1), filtered, penalized, both];
    let prompts = prompts();
    let request = |(i, sampling): (usize, SamplingParams)| Request {
        stop_tokens: vec![TokenId(0)],
        sampling,
        ..Request::new(prompts[i % prompts.len()].clone(), max_tokens + i as u32)
    };
    all.into_iter().enumerate().map(request).collect()
}

fn cpu(threads: usize) -> CpuBackend {
    let options = CpuOptions { threads: Some(threads), isa: None };
    CpuBackend::new(&options).expect("the cpu device is always there")
}

/// Asserts that `draft` changes nothing and returns what it did.
fn assert_same(
    verifier: &Model,
    draft: &Draft<'_>,
    backend: &dyn Backend,
    plain: &[Output],
    requests: &[Request],
) -> SpeculationCounts {
    let (drafted, counts) = outputs(verifier, Some(draft), backend, requests);
    for (i, (drafted, plain)) in drafted.iter().zip(plain).enumerate() {
        let (name, length) = (backend.name(), draft.length);
        assert_eq!(drafted, plain, "request {i} on {name}, {length} drafted at most");
    }
    assert!(counts.cycles > 0, "nothing was drafted");
    counts
}

#[test]
fn the_demo_pair_writes_the_verifiers_text() {
    let (verifier, draft) = (demo("verifier"), demo("draft"));
    let requests = requests(40);
    let (expected, none) = outputs(&verifier, None, &cpu(1), &requests);
    assert_eq!(none, SpeculationCounts::default());
    for (threads, length) in [(1, 1), (2, 4), (1, 13)] {
        let (program, weights) = (draft.program(), &draft.weights());
        let draft = Draft { program, weights, context_len: 2048, length };
        let counts = assert_same(&verifier, &draft, &cpu(threads), &expected, &requests);
        println!("{length} drafted at most: {counts:?}");
        assert!(counts.accepted_tokens * 10 > counts.drafted_tokens, "{counts:?}");
    }
}

#[test]
fn the_demo_pair_writes_the_verifiers_text_on_reference() {
    let (verifier, draft) = (demo("verifier"), demo("draft"));
    let mut requests = requests(6);
    requests.truncate(3);
    let backend = Device::Reference.backend();
    let (expected, _) = outputs(&verifier, None, backend.as_ref(), &requests);
    let (program, weights) = (draft.program(), &draft.weights());
    let draft = Draft { program, weights, context_len: 2048, length: 3 };
    assert_same(&verifier, &draft, backend.as_ref(), &expected, &requests);
}

#[test]
fn a_draft_that_is_the_verifier_is_always_right() {
    let verifier = demo("verifier");
    let requests = requests(40);
    let backend = cpu(2);
    let (expected, _) = outputs(&verifier, None, &backend, &requests);
    for length in [1, 5, 20] {
        let (program, weights) = (verifier.program(), &verifier.weights());
        let draft = Draft { program, weights, context_len: 2048, length };
        let counts = assert_same(&verifier, &draft, &backend, &expected, &requests);
        assert_eq!(counts.accepted_tokens, counts.drafted_tokens, "{length}: {counts:?}");
    }
}

#[test]
fn a_draft_of_random_weights_costs_time_and_no_token() {
    let verifier = demo("verifier");
    let requests = requests(24);
    let backend = cpu(2);
    let (expected, _) = outputs(&verifier, None, &backend, &requests);
    let layers = Format::Grouped { bits: Bits::Four, group: 128, act_order: false };
    let random = SyntheticModel::new(demo("draft").spec().clone(), Formats { layers, head: None });
    let (program, weights) = (random.program(), &random.weights());
    let draft = Draft { program, weights, context_len: 2048, length: 4 };
    let counts = assert_same(&verifier, &draft, &backend, &expected, &requests);
    assert!(counts.accepted_tokens * 5 < counts.drafted_tokens, "by chance? {counts:?}");
}

#[test]
fn a_draft_of_a_short_context_stops_drafting_and_nothing_else() {
    let (verifier, draft) = (demo("verifier"), demo("draft"));
    let requests = requests(40);
    let (expected, _) = outputs(&verifier, None, &cpu(2), &requests);
    let (program, weights) = (draft.program(), &draft.weights());
    let draft = Draft { program, weights, context_len: 20, length: 4 };
    assert_same(&verifier, &draft, &cpu(2), &expected, &requests);
}

#[test]
fn texts_end_at_the_same_token() {
    let verifier = demo("verifier");
    let backend = cpu(2);
    let prompt = prompts().remove(0);
    let request = |max_tokens, stop_tokens: Vec<TokenId>| Request {
        stop_tokens,
        ..Request::new(prompt.clone(), max_tokens)
    };
    let (all, _) = outputs(&verifier, None, &backend, &[request(24, vec![])]);
    // Every token of the text once as the one that ends it, and every limit.
    let stops = all[0].ids.iter().map(|stop| request(24, vec![*stop]));
    let requests: Vec<Request> = stops.chain((1..=12).map(|n| request(n, vec![]))).collect();
    let (expected, _) = outputs(&verifier, None, &backend, &requests);
    let (program, weights) = (verifier.program(), &verifier.weights());
    // The draft is right each time, so that stop tokens and limits lie inside what is accepted.
    let draft = Draft { program, weights, context_len: 2048, length: 7 };
    assert_same(&verifier, &draft, &backend, &expected, &requests);
}

#[test]
fn the_demo_pair_agrees_as_often_as_was_counted() {
    let (verifier, draft) = (demo("verifier"), demo("draft"));
    let windows = testkit::golden_json("demo_windows.json");
    let (mut same, mut all) = (0, 0);
    for window in windows.as_array().expect("windows") {
        let ids = run::ids(window);
        let best = |model: &Model| -> Vec<usize> {
            let logits = run::logits(model, Device::Cpu, &ids, 512);
            let rows = logits.chunks_exact(model.spec().vocab);
            rows.map(|row| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])))
                .map(Option::unwrap_or_default)
                .collect()
        };
        let (verifier, draft) = (best(&verifier), best(&draft));
        same += verifier.iter().zip(&draft).filter(|(v, d)| v == d).count();
        all += ids.len();
    }
    let counted = testkit::golden_json("demo.json")["pairs"]["verifier verifier, draft draft"]
        ["greedy_agreement"]
        .as_f64()
        .expect("an agreement");
    let found = same as f64 / all as f64;
    println!("greedy agreement {found:.4} here, {counted:.4} counted");
    // Counted over 48 windows, whose agreement varies; these are the first three.
    assert!((found - counted).abs() < 0.06, "{found}");
}

/// What `run` prints without a terminal: the text alone.
fn text(words: &[&str]) -> String {
    let printed = foretoken(&[&["run", "fn main() {", "--ignore-eos"], words].concat());
    assert_eq!(printed.code, 0, "{}", printed.err);
    printed.out
}

#[test]
fn stop_strings_end_the_same_text() {
    let all = text(&["--draft", "off", "--max-tokens", "40"]);
    let stops = [&all[20..22], &all[31..34], &all[40..48], "let mut", "no such text"];
    for stop in stops {
        let words = ["--max-tokens", "40", "--stop", stop, "--draft"];
        let plain = text(&[&words[..], &["off"]].concat());
        // The verifier as its own draft: the stop string ends within accepted tokens.
        for draft in ["demo", "demo-draft"] {
            let drafted = text(&[&words[..], &[draft, "--draft-tokens", "16"]].concat());
            assert_eq!(drafted, plain, "{draft} until {stop:?}");
        }
    }
    let object = |draft: &str| {
        let words = ["run", "fn main() {", "--stop", stops[1], "--json", "--draft", draft];
        let printed = foretoken(&words);
        serde_json::from_str::<Value>(&printed.out).expect("an object")
    };
    let (plain, drafted) = (object("off"), object("demo"));
    for key in ["ids", "text", "finish_reason"] {
        assert_eq!(plain[key], drafted[key], "{key}");
    }
    let [plain, drafted] = [plain, drafted].map(|o| o["timings"]["decode_tokens"].clone());
    assert_eq!(plain, drafted, "tokens behind the stop string do not count");
}

#[test]
fn run_reports_what_the_draft_did() {
    let words = ["run", "impl Iterator for ", "--max-tokens", "32", "--json", "--compare"];
    let printed = foretoken(&[&words[..], &["--draft-tokens", "3"]].concat());
    assert_eq!(printed.code, 0, "{}", printed.err);
    let object: Value = serde_json::from_str(&printed.out).expect("an object");
    let speculation = &object["speculation"];
    assert_eq!(speculation["draft"], "demo-draft", "the demo brings its own");
    assert_eq!(
        (&speculation["draft_tokens"], &speculation["rule"]),
        (&3.into(), &"coupled".into())
    );
    let count = |key: &str| speculation[key].as_f64().expect("a number");
    assert!(count("cycles") > 5.0 && count("drafted_tokens") > 15.0, "{speculation}");
    let acceptance = count("accepted_tokens") / count("drafted_tokens");
    assert!((count("acceptance") - acceptance).abs() < 1e-12, "{speculation}");
    assert!((1.0..=4.0).contains(&count("tokens_per_cycle")), "{speculation}");
    assert_eq!(object["compare"]["same"], true);
    assert!(object["compare"]["speed_up"].as_f64().is_some_and(|s| s > 0.0), "{object}");
    let off = foretoken(&["run", "demo", "fn ", "--max-tokens", "2", "--json"]);
    let off: Value = serde_json::from_str(&off.out).expect("an object");
    assert_eq!((&off["speculation"], &off["compare"]), (&Value::Null, &Value::Null));
}

#[test]
fn colours_tell_how_tokens_came_about_and_change_no_text() {
    let (mut out, mut err) = (vec![], vec![]);
    let mut io = server::Io {
        out: &mut out,
        err: &mut err,
        input: &mut std::io::empty(),
        out_is_terminal: true,
        err_is_terminal: false,
        input_is_terminal: true,
    };
    let words = ["foretoken", "run", "fn main() {", "--ignore-eos", "--max-tokens", "40"];
    let words =
        words.iter().chain(&["--show-draft", "--draft-tokens", "4"]).map(std::ffi::OsString::from);
    assert_eq!(server::main_with(words, &mut io), 0);
    let coloured = String::from_utf8(out).expect("utf-8");
    let mut bare = coloured.clone();
    for code in ["\x1b[31m", "\x1b[32m", "\x1b[34m", "\x1b[0m"] {
        assert!(coloured.contains(code), "{code:?} is not in {coloured:?}");
        bare = bare.replace(code, "");
    }
    let legend = bare.trim_end().rfind('\n').expect("a line of its own") + 1;
    assert!(bare[legend..].contains("drafted, corrected, bonus"), "{bare}");
    assert_eq!(bare[..legend], text(&["--draft", "off", "--max-tokens", "40"]));
}

#[test]
fn drafts_of_all_kinds_are_certified() {
    let drafts = ["lookup", "demo-draft,lookup", "self:layers=3", "self:layers=2,lookup"];
    for draft in drafts {
        for temperature in ["0", "0.9"] {
            let words = ["verify", "--draft", draft, "--temperature", temperature, "--json"];
            let printed = foretoken(&words);
            assert_eq!(printed.code, 0, "{draft}: {}{}", printed.out, printed.err);
            let object: Value = serde_json::from_str(&printed.out).expect("an object");
            let speculation = &object["speculation"];
            assert_eq!(speculation["draft"], draft);
            assert!(speculation["accepted_tokens"].as_u64() > Some(0), "{speculation}");
            assert_eq!(object["tokens"], object["tokens_from_identical_logits"], "{draft}");
        }
    }
}

#[test]
fn verify_certifies_prompts_of_all_kinds() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("prompts.jsonl");
    let lines =
        "fn main() {\n\n\"use std::\\nfmt\"\n{\"prompt\": \"impl \"}\n{\"ids\": [0, 730]}\n";
    std::fs::write(&file, lines).expect("a file");
    let prompts = ["--prompts", file.to_str().expect("utf-8")];
    let words = ["verify", "--max-tokens", "20", "--temperature", "0.8", "--seed", "5", "--json"];
    let printed = foretoken(&[&words[..], &prompts[..]].concat());
    assert_eq!(printed.code, 0, "{}{}", printed.out, printed.err);
    let object: Value = serde_json::from_str(&printed.out).expect("an object");
    assert_eq!((&object["identical"], &object["prompts"]), (&true.into(), &4.into()));
    assert_eq!(object["tokens"], object["tokens_from_identical_logits"]);
    for model in ["verifier", "draft"] {
        let hash = object[model]["weights_sha256"].as_str().expect("a hash");
        assert_eq!(hash.len(), 64, "{object}");
    }
    assert_ne!(object["verifier"]["weights_sha256"], object["draft"]["weights_sha256"]);
    std::fs::write(&file, "fn\n\"broken\n").expect("a file");
    assert_refused(&foretoken(&[&words[..], &prompts[..]].concat()), &["line 2", "JSON string"]);
    std::fs::write(&file, "\n").expect("a file");
    assert_refused(&foretoken(&[&words[..], &prompts[..]].concat()), &["no prompt"]);
}

#[test]
fn drafts_that_make_no_sense_get_one_sentence() {
    let other = testkit::golden("decoders/qwen2");
    let other = other.to_str().expect("utf-8");
    assert_refused(&foretoken(&["run", "x", "--draft", other]), &["vocabulary", "4096"]);
    assert_refused(&foretoken(&["run", "x", "--draft", "self:layers=7"]), &["layers", "7"]);
    assert_refused(&foretoken(&["run", "x", "--draft", "./nowhere"]), &["draft", "./nowhere"]);
    assert_refused(&foretoken(&["run", "demo", "x", "--draft-tokens", "2"]), &["--draft"]);
    assert_refused(&foretoken(&["run", "demo", "x", "--compare"]), &["--compare", "--draft"]);
    assert_refused(&foretoken(&["run", "x", "--show-draft"]), &["--show-draft", "terminal"]);
    assert_refused(&foretoken(&["verify", "demo"]), &["--draft"]);
    assert_refused(&foretoken(&["verify", "--draft", "off"]), &["--draft"]);
    assert_refused(&foretoken(&["verify", "--prompts", "/nowhere"]), &["/nowhere"]);
    assert_refused(&foretoken(&["verify", "--ids", "0,4096"]), &["prompt 1", "4096"]);
    let law = ["verify", "--acceptance-rule", "rejection", "--temperature", "1"];
    assert_refused(&foretoken(&law), &["--acceptance-rule"]);
    for words in [["--draft-tokens", "65"], ["--draft", "self:bits=3"]] {
        assert_eq!(foretoken(&[&["run", "x"], &words[..]].concat()).code, 2, "{words:?}");
    }
}
