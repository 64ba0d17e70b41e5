//! What `draft-rank` predicts, against figures counted elsewhere and against real runs.
//!
//! Input: the demo pair, and the trained models beside the repository with what is known of them.
//! Not here: the arithmetic of laws (the engine's own tests).

use crate::cli::{assert_refused, foretoken};
use crate::run::{self, Device};
use engine::forward::{self, Text};
use engine::model::Head;
use kernels::StepOutput;
use serde_json::{Value, json};
use std::path::Path;

/// What `draft-rank` finds.
fn rank(words: &[&str]) -> Value {
    let printed = foretoken(&[&["draft-rank"], words, &["--json"]].concat());
    assert_eq!(printed.code, 0, "{}", printed.err);
    serde_json::from_str(&printed.out).expect("one JSON object")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// A file of prompts: token sequences, each to be predicted as it is.
fn prompts_of<'a>(dir: &Path, windows: impl Iterator<Item = &'a Value>) -> String {
    let lines: String = windows.map(|ids| format!("{}\n", json!({"ids": ids}))).collect();
    let file = dir.join("prompts.jsonl");
    std::fs::write(&file, lines).expect("a file");
    file.to_str().expect("utf-8").to_owned()
}

/// How many drafts were judged when a run drafted one token a cycle after each prompt of `found`,
/// how many of them accepted, and how many texts were the same.
fn counted(found: &Value, rule: &str) -> (f64, f64, usize) {
    let (mut drafted, mut accepted, mut same) = (0.0, 0.0, 0);
    for text in found["texts"].as_array().expect("texts") {
        let ids = run::ids(&text["ids"]);
        let (prompt, rest) = ids.split_at(number(&text["prompt_tokens"]) as usize);
        let prompt: Vec<String> = prompt.iter().map(|id| id.0.to_string()).collect();
        let (prompt, seed) = (prompt.join(","), text["seed"].to_string());
        let one = ["--draft", "demo-draft", "--draft-tokens", "1", "--acceptance-rule", rule];
        let words = ["run", "demo", "--ids", &prompt, "--seed", &seed, "--max-tokens", "128"];
        let printed = foretoken(&[&words[..], &one, &["--temperature", "1", "--json"]].concat());
        assert_eq!(printed.code, 0, "{}", printed.err);
        let object: Value = serde_json::from_str(&printed.out).expect("one JSON object");
        drafted += number(&object["speculation"]["drafted_tokens"]);
        accepted += number(&object["speculation"]["accepted_tokens"]);
        same += usize::from(run::ids(&object["ids"]) == rest);
    }
    (drafted, accepted, same)
}

#[test]
fn predictions_agree_with_what_runs_count() {
    let found = rank(&["demo", "--drafts", "demo-draft"]);
    let texts = found["texts"].as_array().expect("texts").len();
    for rule in ["coupled", "rejection"] {
        let (drafted, accepted, same) = counted(&found, rule);
        let predicted = &found["drafts"][0]["prediction"][rule]["acceptance"];
        let [mean, half] = ["mean", "half_width_95"].map(|key| number(&predicted[key]));
        let share = accepted / drafted;
        println!("{rule}: {share:.4} of {drafted} counted, {mean:.4} +- {half:.4} predicted");
        // What is counted is also a matter of chance at each token: two deviations of that.
        let chance = 2.0 * (mean * (1.0 - mean) / drafted).sqrt();
        // Coupled runs write the very texts that were read. Those of the other rule are other
        // texts of the same law, so that two sets of texts differ from the truth; half as much
        // again makes it three deviations, since rounding elsewhere may write yet other texts.
        let (texts_expected, width) = match rule {
            "coupled" => (texts, half.hypot(chance)),
            _ => (0, 1.5 * (half * 2f64.sqrt()).hypot(chance)),
        };
        assert_eq!(same, texts_expected, "{rule}: texts that are the same");
        assert!((share - mean).abs() <= width, "{rule}: {share} is not {mean} +- {width}");
    }
}

#[test]
fn the_demo_pair_is_ranked_as_it_was_measured() {
    let windows = testkit::golden_json("demo_windows.json");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let prompts = prompts_of(dir.path(), windows.as_array().expect("windows").iter());
    let words = ["demo", "--drafts", "demo-draft", "--generate", "0", "--prompts", &prompts];
    let found = rank(&words);
    let acceptance = &found["drafts"][0]["acceptance"];
    let pair = &testkit::golden_json("demo.json")["pairs"]["verifier verifier, draft draft"];
    let [overlap, greedy] = ["rejection", "greedy"].map(|key| number(&acceptance[key]["mean"]));
    println!("overlap {overlap:.4}, greedy {greedy:.4}; over all 48 windows {pair}");
    // Measured over 48 windows, whose acceptance varies; these are the first three.
    assert!((overlap - 0.740).abs() < 0.06, "{overlap}");
    assert!((greedy - number(&pair["greedy_agreement"])).abs() < 0.06, "{greedy}");
    // Greedily both rules accept just where first choices agree, at the very same places.
    let cold = rank(&[&words[..], &["--temperature", "0"]].concat());
    let cold = &cold["drafts"][0]["acceptance"];
    for key in ["coupled", "rejection", "greedy"] {
        assert_eq!(number(&cold[key]["mean"]), greedy, "{key}");
    }
}

/// Published over texts of these models in float32, which the reference device computes: of the
/// texts that are known. Greedy agreement within 0.03, and 0.01 more for the overlap's two digits
/// and other texts.
#[test]
fn trained_pairs_are_ranked_as_they_were_measured() {
    let Some(models) = testkit::shared_models() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let name = |folder: &str| models.join(folder).to_str().expect("utf-8").to_owned();
    let rank = |target: &str, drafts: &[String]| {
        let golden = testkit::read_json(&models.join(format!("golden/{target}.json")));
        let windows = golden["nll"].as_array().expect("windows");
        let prompts = prompts_of(dir.path(), windows.iter().map(|window| &window["ids"]));
        let words = ["--generate", "0", "--device", "reference", "--prompts", &prompts, "--drafts"];
        let drafts: Vec<&str> = drafts.iter().map(String::as_str).collect();
        rank(&[&[name(target).as_str()], &words[..], &drafts].concat())
    };
    let folder = std::fs::read_dir(name("tinystories-656k-quant")).expect("a folder");
    let copies = folder.map(|entry| entry.expect("an entry").path().display().to_string());
    let copies: Vec<String> = copies.collect();
    assert_eq!(copies.len(), 12, "{copies:?}");
    let mut found = vec![rank("tinystories-656k", &copies)];
    found.push(rank("stories260k-hf", &[name("bitllama-1m-hf")]));
    for draft in found.iter().flat_map(|f| f["drafts"].as_array().expect("drafts")) {
        let name = draft["draft"].as_str().expect("a name");
        let [overlap, greedy] =
            ["rejection", "greedy"].map(|key| number(&draft["acceptance"][key]["mean"]));
        println!("{name}: overlap {overlap:.4}, greedy {greedy:.4}");
        let (overlaps, greedies) = match name {
            _ if name.contains("bitllama") => ([0.820; 2], [0.805; 2]),
            _ if name.contains("w8") => ([0.992; 2], [0.98, 1.0]),
            _ => ([0.87, 0.92], [0.81, 0.88]),
        };
        let within = |x: f64, [low, high]: [f64; 2], by: f64| x >= low - by && x <= high + by;
        assert!(within(overlap, overlaps, 0.01), "{name}: {overlap}");
        assert!(within(greedy, greedies, 0.03), "{name}: {greedy}");
    }
}

#[test]
fn drafts_are_listed_best_first_and_refused_ones_with_their_reason() {
    let other = testkit::golden("decoders/qwen2");
    let other = other.to_str().expect("utf-8");
    let words = ["demo", "--generate", "8", "--drafts", "self:layers=3", other, "demo", "./none"];
    let found = rank(&words);
    let names = |key: &str| -> Vec<String> {
        let all = found[key].as_array().expect("a list").iter();
        all.map(|one| one["draft"].as_str().expect("a name").to_owned()).collect()
    };
    assert_eq!(names("refused"), [other, "./none"]);
    assert!(found["refused"][0]["reason"].as_str().is_some_and(|r| r.contains("vocabulary")));
    let mut ranked = names("drafts");
    let merit = |draft: &Value| {
        let prediction = &draft["prediction"]["coupled"];
        (number(&prediction["speedup"]), number(&prediction["acceptance"]["mean"]))
    };
    assert!(merit(&found["drafts"][0]) >= merit(&found["drafts"][1]), "{found}");
    ranked.sort();
    assert_eq!(ranked, ["demo", "self:layers=3"]);
    let itself = found["drafts"].as_array().expect("drafts").iter().find(|d| d["draft"] == "demo");
    let itself = &itself.expect("the target as its own draft")["acceptance"];
    assert!((number(&itself["rejection"]["mean"]) - 1.0).abs() < 1e-6, "{itself}");
    let printed = foretoken(&[&["draft-rank"], &words[..], &["--details"]].concat());
    let parts = ["speed-up", "functions", "16 to 63", "refused: ./none:", "break-even"];
    for part in parts {
        assert!(printed.out.contains(part), "{part} is not in {}", printed.out);
    }
}

#[test]
fn nothing_to_rank_is_a_mistake_and_so_is_a_draft_that_is_no_model() {
    let none = ["draft-rank", "demo", "--drafts", "./a", "./b"];
    let printed = foretoken(&none);
    assert_refused(&printed, &["none of the drafts"]);
    assert!(printed.out.contains("refused: ./a") && printed.out.contains("refused: ./b"));
    let printed = foretoken(&["draft-rank", "demo", "--drafts", "lookup"]);
    assert_eq!(printed.code, 2, "{}", printed.err);
    assert!(printed.err.contains("model folder"), "{}", printed.err);
    let gone = ["draft-rank", "demo", "--drafts", "demo-draft", "--prompts", "/nowhere"];
    assert_refused(&foretoken(&gone), &["/nowhere"]);
}

#[test]
fn categories_of_a_file_are_those_of_the_results() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("prompts.jsonl");
    let lines = "{\"prompt\": \"fn main() {\", \"category\": \"code\"}\n// plain\n{\"ids\": [0, 730], \"category\": \"code\"}\n";
    std::fs::write(&file, lines).expect("a file");
    let prompts = ["--prompts", file.to_str().expect("utf-8"), "--generate", "6"];
    let found = rank(&[&["demo", "--drafts", "demo-draft"], &prompts[..]].concat());
    let categories = &found["drafts"][0]["by_category"];
    let texts = |name: &str| categories[name]["texts"].as_u64();
    assert_eq!((texts("code"), texts("other")), (Some(2), Some(1)), "{categories}");
    let seeds: Vec<u64> = found["texts"]
        .as_array()
        .expect("texts")
        .iter()
        .filter_map(|text| text["seed"].as_u64())
        .collect();
    assert_eq!(seeds, [0, 1, 2]);
}

#[test]
fn a_text_read_in_pieces_has_the_same_logits() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/demo/draft");
    let model = run::open_with(&dir, Head::Keep);
    let windows = testkit::golden_json("demo_windows.json");
    let ids = &run::ids(&windows[0])[..150];
    let v = model.spec().vocab;
    let whole = run::logits(&model, Device::Cpu, ids, 512);
    for (chunk, first) in [(1, 0), (7, 30), (64, 64), (64, 100)] {
        let limits = forward::limits(ids.len(), chunk);
        let backend = Device::Cpu.backend();
        let mut runner =
            backend.build(model.program(), &model.weights(), &limits).expect("a model");
        let text = Text { ids, prompt_len: ids.len() };
        let (mut output, mut found) = (StepOutput::default(), vec![]);
        for range in forward::pieces(0..ids.len(), &limits) {
            forward::extend(runner.as_mut(), &limits, text, range, first, &mut output)
                .expect("a step");
            found.extend_from_slice(&output.logits);
        }
        assert!(found == whole[first * v..], "{chunk} tokens a step, from {first} on");
    }
}
