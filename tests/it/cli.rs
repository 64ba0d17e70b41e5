//! The command line in process: what a new user types, and what a wrong word answers.

use serde_json::Value;
use std::path::Path;

/// What a command printed.
pub(crate) struct Printed {
    pub(crate) code: u8,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs `foretoken` with these words and this standard input.
pub(crate) fn foretoken_with_input(words: &[&str], input: &str) -> Printed {
    let (mut out, mut err) = (vec![], vec![]);
    let mut io = server::Io {
        out: &mut out,
        err: &mut err,
        input: &mut input.as_bytes(),
        out_is_terminal: false,
        err_is_terminal: false,
        input_is_terminal: input.is_empty(),
    };
    let words = std::iter::once("foretoken").chain(words.iter().copied());
    let code = server::main_with(words.map(std::ffi::OsString::from), &mut io);
    let text = |bytes| String::from_utf8(bytes).expect("utf-8");
    Printed { code, out: text(out), err: text(err) }
}

pub(crate) fn foretoken(words: &[&str]) -> Printed {
    foretoken_with_input(words, "")
}

/// A mistake of the caller: exit code 2, one line, and each of `parts` in it.
pub(crate) fn assert_refused(printed: &Printed, parts: &[&str]) {
    assert_eq!(printed.code, 2, "{}{}", printed.out, printed.err);
    assert_eq!(printed.err.trim_end().lines().count(), 1, "one sentence: {}", printed.err);
    for part in parts {
        assert!(printed.err.contains(part), "{part:?} is not in: {}", printed.err);
    }
}

fn json(words: &[&str]) -> Value {
    let printed = foretoken(words);
    assert_eq!(printed.code, 0, "{}", printed.err);
    serde_json::from_str(&printed.out).expect("one JSON object")
}

#[test]
fn the_first_command_writes_text() {
    let printed = foretoken(&["run", "fn main() {", "--max-tokens", "12"]);
    assert_eq!(printed.code, 0, "{}", printed.err);
    assert!(printed.out.trim().len() > 10, "{:?}", printed.out);
    let piped = foretoken_with_input(&["run", "--max-tokens", "12"], "fn main() {\n");
    assert_eq!(piped.out, printed.out, "a prompt on standard input is the same prompt");
}

#[test]
fn json_has_ids_text_reason_and_timings() {
    let object = json(&["run", "demo", "impl ", "--max-tokens", "5", "--ignore-eos", "--json"]);
    assert_eq!(object["ids"].as_array().map(Vec::len), Some(5), "{object}");
    assert_eq!(object["finish_reason"], "length");
    assert!(object["text"].as_str().is_some_and(|t| !t.is_empty()), "{object}");
    assert_eq!(object["timings"]["decode_tokens"], 4, "{object}");
    assert!(object["timings"]["read_bytes_per_second"].as_f64().is_some_and(|b| b > 1e8));
}

#[test]
fn ids_and_text_are_the_same_prompt() {
    let text = json(&["run", "demo", "fn main() {", "--max-tokens", "6", "--json"]);
    let prompt = testkit::golden_json("demo.json")["greedy"]["verifier"][0]["ids"].clone();
    let ids: Vec<String> =
        prompt.as_array().expect("ids").iter().map(ToString::to_string).collect();
    let by_ids = json(&["run", "demo", "--ids", &ids.join(","), "--max-tokens", "6", "--json"]);
    assert_eq!(text["ids"], by_ids["ids"]);
}

#[test]
fn the_seed_decides_sampled_text() {
    let with = |seed: &str| {
        let words = ["run", "fn ", "--temperature", "1", "--seed", seed, "--max-tokens", "16"];
        foretoken(&words).out
    };
    assert_eq!(with("7"), with("7"));
    assert_ne!(with("7"), with("8"), "sixteen tokens at temperature 1 agree by chance");
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let words = ["run", "fn main() {", "--max-tokens", "24"];
    let all = foretoken(&words).out;
    let stop = &all.trim_end()[4..7];
    let object = json(&["run", "fn main() {", "--max-tokens", "24", "--stop", stop, "--json"]);
    assert_eq!(object["finish_reason"], "stop");
    assert_eq!(object["text"].as_str(), all.split(stop).next());
}

#[test]
fn logits_are_written_for_every_position() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("l.safetensors");
    let path = file.to_str().expect("utf-8");
    for device in ["cpu", "reference"] {
        let words = ["logits", "demo-draft", "--ids", "0,5,9", "--device", device, "--out", path];
        let printed = foretoken(&words);
        assert_eq!(printed.code, 0, "{}", printed.err);
        let tensors = testkit::read_tensors(&file);
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["logits"]);
        assert_eq!(tensors["logits"].shape, [3, 4096]);
        assert!(tensors["logits"].to_f32().iter().all(|v| v.is_finite()));
    }
}

#[test]
fn inspect_and_devices_describe() {
    let text = foretoken(&["inspect", "demo", "--plan"]).out;
    for part in ["LlamaForCausalLM", "q_proj", "gptq v1", "layers.5.attn.qkv", "kernels"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let object = json(&["inspect", "demo", "--json"]);
    assert_eq!(object["layers"], 6, "{object}");
    assert!(object["bytes_per_token"].as_u64().is_some_and(|b| b > 1_000_000));
    let devices = foretoken(&["devices"]).out;
    for part in ["cpu", "GB/s", "not built yet"] {
        assert!(devices.contains(part), "{part} is not in\n{devices}");
    }
    let script = foretoken(&["completions", "bash"]).out;
    assert!(script.contains("max-tokens"), "the script completes flags");
}

#[test]
fn heads_are_int8_where_that_is_worth_it() {
    let inspect = |words: &[&str]| json(&[&["inspect", "demo", "--json"], words].concat());
    let [keep, int8, auto] = ["keep", "int8", "auto"].map(|head| inspect(&["--head", head]));
    assert_eq!(keep["head"]["format"], "f16");
    assert_eq!(int8["head"]["format"], "w8g128");
    assert_eq!(auto, int8, "the demo's layers are quantized");
    assert_eq!(inspect(&[]), auto);
    let bytes = |run: &Value| run["bytes_per_token"].as_u64().expect("bytes");
    // 4096 rows of 256 columns: two bytes each, or one and two scales of two bytes.
    assert_eq!(bytes(&keep) - bytes(&int8), 4096 * (2 * 256 - (256 + 2 * 2)));
    let run = |words: &[&str]| {
        let words = [&["run", "fn ", "--max-tokens", "2", "--json"], words].concat();
        bytes(&json(&words)["timings"])
    };
    assert_eq!(run(&[]), bytes(&int8));
    assert_eq!(run(&["--head", "keep"]), bytes(&keep));
    assert_eq!(run(&["--device", "reference"]), bytes(&keep), "the reference rounds nothing");
    assert_eq!(run(&["--device", "reference", "--head", "int8"]), bytes(&int8));
    let float = testkit::golden("decoders/qwen2");
    let float = json(&["inspect", float.to_str().expect("utf-8"), "--json"]);
    assert!(!float["head"]["format"].as_str().expect("a format").starts_with('w'), "{float}");
}

#[test]
fn mistakes_get_one_sentence() {
    assert_refused(&foretoken(&["run", "./nowhere", "hi"]), &["./nowhere", "folder"]);
    assert_refused(&foretoken(&["run", "./nowhere"]), &["./nowhere"]);
    assert_refused(&foretoken(&["run", "demo"]), &["prompt"]);
    assert_refused(&foretoken(&["run", "x", "--temperature", "-1"]), &["temperature", "-1"]);
    assert_refused(&foretoken(&["run", "x", "--top-p", "NaN"]), &["top_p"]);
    assert_refused(&foretoken(&["run", "x", "--max-tokens", "0"]), &["max_tokens"]);
    assert_refused(&foretoken(&["run", "demo", "--ids", "0,5000"]), &["5000", "4096"]);
    assert_refused(&foretoken(&["run", "x", "--chat"]), &["chat template"]);
    assert_refused(&foretoken(&["run", "x", "--threads", "0"]), &["threads"]);
    let reference = ["run", "x", "--device", "reference", "--threads", "2"];
    assert_refused(&foretoken(&reference), &["--threads"]);
    let unwritable = ["logits", "demo", "--ids", "1", "--out", "/nowhere/l.safetensors"];
    assert_refused(&foretoken(&unwritable), &["/nowhere/l.safetensors"]);
    let usage = foretoken(&["run", "--no-such-flag"]);
    assert_eq!(usage.code, 2);
    assert!(usage.err.contains("--no-such-flag"), "{}", usage.err);
}

#[test]
fn prompts_must_fit_the_context() {
    let long = vec!["7"; 2048].join(",");
    let printed = foretoken(&["run", "demo", "--ids", &long]);
    assert_refused(&printed, &["2048", "context"]);
    let printed = foretoken_with_input(&["run", "demo", "--max-tokens", "1"], "\n");
    // The demo's tokenizer begins every text with a token, so an empty text is a valid prompt.
    assert_eq!(printed.code, 0, "{}", printed.err);
}

#[test]
fn an_empty_prompt_is_refused_where_nothing_is_added() {
    let dir = testkit::golden("decoders/qwen2");
    let model = Path::new(&dir).to_str().expect("utf-8");
    assert_refused(&foretoken(&["run", model, ""]), &["empty"]);
}
