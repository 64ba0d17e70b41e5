//! The tokenizer against reference vectors, real models and broken files.

use super::*;
use testkit::{golden, golden_cases, golden_json, read_json, shared_models};

fn golden_tokenizer(kind: &str) -> Tokenizer {
    let files = ModelFiles::Folder(golden("tokenizers").join(kind));
    Tokenizer::from_files(&files).unwrap()
}

fn ids(value: &Value) -> Vec<TokenId> {
    let number = |id: &Value| TokenId(id.as_u64().unwrap() as u32);
    value.as_array().unwrap().iter().map(number).collect()
}

fn rows(vectors: &Value, key: &str) -> Vec<Value> {
    vectors[key].as_array().unwrap().clone()
}

#[test]
fn golden_encode_and_decode() {
    for kind in golden_cases("tokenizers") {
        let tokenizer = golden_tokenizer(&kind);
        let vectors = golden_json(&format!("tokenizers/{kind}/vectors.json"));
        for row in rows(&vectors, "encode") {
            let text = row["text"].as_str().unwrap();
            let all = tokenizer.encode(text, true).unwrap();
            assert_eq!(all, ids(&row["ids"]), "{kind}: {text:?}");
            let plain = tokenizer.encode(text, false).unwrap();
            assert_eq!(plain, ids(&row["ids_plain"]), "{kind}: {text:?}");
            assert_eq!(tokenizer.decode(&all, true).unwrap(), row["decoded"], "{kind}: {text:?}");
            let special = tokenizer.decode(&all, false).unwrap();
            assert_eq!(special, row["decoded_with_special"], "{kind}: {text:?}");
        }
        for row in rows(&vectors, "decode_only") {
            let ids = ids(&row["ids"]);
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), row["decoded"], "{kind}: {ids:?}");
            let special = tokenizer.decode(&ids, false).unwrap();
            assert_eq!(special, row["decoded_with_special"], "{kind}: {ids:?}");
        }
    }
}

#[test]
fn real_models_match_their_reference() {
    let Some(models) = shared_models() else { return };
    for name in ["stories260k-hf", "babyllama-105-hf", "bitllama-1m-hf", "tinystories-656k"] {
        let tokenizer = Tokenizer::from_files(&ModelFiles::Folder(models.join(name))).unwrap();
        let golden = read_json(&models.join("golden").join(format!("{name}.json")));
        for case in golden["cases"].as_array().unwrap() {
            let prompt = case["prompt"].as_str().unwrap();
            assert_eq!(tokenizer.encode(prompt, true).unwrap(), ids(&case["ids"]), "{name}");
            let all = [ids(&case["ids"]), ids(&case["greedy_ids"])].concat();
            let text = tokenizer.decode(&all, true).unwrap();
            // The reference leaves special tokens in that pass the normalizer; we do not.
            let want = case["greedy_text"].as_str().unwrap();
            let want = want.trim_start_matches("<|start_story|> ");
            assert_eq!(text, want.trim_end_matches(" <|end_story|>"), "{name}");
        }
        for case in golden["nll"].as_array().unwrap() {
            let want = ids(&case["ids"]);
            let text = tokenizer.decode(&want, true).unwrap();
            assert_eq!(tokenizer.encode(&text, true).unwrap(), want, "{name}: {text:?}");
        }
    }
}

/// A tokenizer of these files, and the error's text if it is refused.
fn open(files: &[(&str, &str)]) -> Result<Tokenizer, String> {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    Tokenizer::from_files(&ModelFiles::Folder(dir.path().into())).map_err(|e| e.to_string())
}

fn golden_text(kind: &str) -> String {
    std::fs::read_to_string(golden("tokenizers").join(kind).join("tokenizer.json")).unwrap()
}

#[test]
fn a_missing_tokenizer_names_the_remedy() {
    let error = open(&[("tokenizer_config.json", "{}")]).unwrap_err();
    assert!(error.contains("tokenizer.json is missing") && error.contains("copy"), "{error}");
}

#[test]
fn explicit_flags_overrule_the_post_processor() {
    let json = golden_text("llama2");
    let ends = |config: &str| {
        let tokenizer =
            open(&[("tokenizer.json", &json), ("tokenizer_config.json", config)]).unwrap();
        let ids = tokenizer.encode("a", true).unwrap();
        let text = tokenizer.encode("a", false).unwrap();
        let at = ids.windows(text.len()).position(|w| w == text).unwrap();
        (ids[..at].to_vec(), ids[at + text.len()..].to_vec())
    };
    let (bos, eos) = (vec![TokenId(1)], vec![TokenId(2)]);
    let tokens = r#""bos_token": "<s>", "eos_token": {"content": "</s>"}"#;
    assert_eq!(ends("{}"), (bos.clone(), vec![]));
    let with = |flags: &str| ends(&format!("{{{tokens}, {flags}}}"));
    assert_eq!(with(r#""add_bos_token": false"#), (vec![], vec![]));
    assert_eq!(with(r#""add_eos_token": true"#), (vec![], eos.clone()));
    assert_eq!(with(r#""add_bos_token": true, "add_eos_token": true"#), (bos, eos));
    assert_eq!(with(r#""add_bos_token": null"#), (vec![], vec![]));
    // No token of that name: nothing is added.
    assert_eq!(ends(r#"{"add_bos_token": true}"#), (vec![], vec![]));
}

#[test]
fn wrong_configurations_are_refused_by_name() {
    let json = golden_text("llama2");
    for (config, reason) in [
        (r#"{"add_bos_token": "yes"}"#, "add_bos_token is \"yes\", expected true or false"),
        (r#"{"add_bos_token": true, "bos_token": "<new>"}"#, "\"<new>\", which is not in the voc"),
        ("{", "tokenizer_config.json is not valid JSON"),
    ] {
        let found = open(&[("tokenizer.json", &json), ("tokenizer_config.json", config)]);
        let error = found.map(|_| ()).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn tokens_the_configuration_calls_special_are_skipped() {
    let json = golden_text("gpt2");
    let plain = open(&[("tokenizer.json", &json)]).unwrap();
    let id = TokenId(40);
    let text = plain.decode(&[id], true).unwrap();
    assert!(!text.is_empty());
    let config = json!({"eos_token": plain.inner.id_to_token(id.0).unwrap()}).to_string();
    let files = [("tokenizer.json", json.as_str()), ("tokenizer_config.json", &config)];
    let special = open(&files).unwrap();
    assert_eq!(special.decode(&[id], true).unwrap(), "");
    assert_eq!(special.decode(&[id], false).unwrap(), text);
}

#[test]
fn special_tokens_that_pass_the_normalizer_are_skipped() {
    let mut json: Value = serde_json::from_str(&golden_text("llama2")).unwrap();
    for token in json["added_tokens"].as_array_mut().unwrap() {
        token["normalized"] = true.into();
    }
    let tokenizer = open(&[("tokenizer.json", &json.to_string())]).unwrap();
    assert_eq!(tokenizer.decode(&[TokenId(1), TokenId(2)], true).unwrap(), "");
}

#[test]
fn contradicting_parts_are_an_error_not_a_panic() {
    let mut json: Value = serde_json::from_str(&golden_text("llama2")).unwrap();
    json["decoder"] = json!({"type": "Strip", "content": "P", "start": 0, "stop": 9});
    let tokenizer = open(&[("tokenizer.json", &json.to_string())]).unwrap();
    let p = tokenizer.token_id("P").unwrap();
    let error = tokenizer.decode(&[p], true).unwrap_err().to_string();
    assert!(error.contains("contradict each other"), "{error}");
    assert!(open(&[("tokenizer.json", "{}")]).unwrap_err().starts_with("tokenizer "));
}

#[test]
fn ids_without_a_token_print_nothing() {
    let tokenizer = golden_tokenizer("llama3");
    let ids = tokenizer.encode("hi", false).unwrap();
    let more = [&[TokenId(u32::MAX)], ids.as_slice(), &[TokenId(100_000)]].concat();
    assert_eq!(tokenizer.decode(&more, true).unwrap(), "hi");
    assert_eq!(tokenizer.vocab_size(), 900);
    assert_eq!(tokenizer.token_id("<|begin_of_text|>"), Some(TokenId(893)));
    assert_eq!(tokenizer.token_id("no such token"), None);
}
