//! Opening whole model folders: every golden case in both spellings, and every real model.

use super::*;
use crate::files::ModelFiles;
use kernels::WeightSource;
use kernels::program::WeightId;
use proptest::prelude::*;
use serde_json::json;
use std::path::{Path, PathBuf};

fn open(dir: &Path) -> Result<Model, Error> {
    Model::open(ModelFiles::Folder(dir.to_owned()))
}

fn open_with(dir: &Path, head: Head) -> Result<Model, Error> {
    Model::open_with(
        ModelFiles::Folder(dir.to_owned()),
        &ModelOptions { head, ..ModelOptions::default() },
    )
}

/// Loads every weight and checks it against its declaration.
fn load_all(model: &Model) {
    let weights = model.weights();
    for (i, decl) in model.program().weights.iter().enumerate() {
        let weight = weights.load(WeightId(i as u32), 0..decl.shape[0]);
        let weight = weight.unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(weight.shape(), decl.shape, "{}", decl.label);
        assert_eq!(weight.format(), decl.format, "{}", decl.label);
    }
}

/// A copy of folder `from` in which `edit` changed `config.json`.
fn copy_with(
    from: &Path,
    config: &str,
    edit: impl FnOnce(&mut serde_json::Map<String, Value>),
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let name = entry.file_name();
        if !name.to_string_lossy().starts_with("expected.") {
            std::fs::copy(entry.path(), dir.path().join(name)).unwrap();
        }
    }
    let mut value = testkit::read_json(&from.join(config));
    edit(value.as_object_mut().unwrap());
    std::fs::write(dir.path().join(CONFIG), value.to_string()).unwrap();
    dir
}

fn cases() -> Vec<PathBuf> {
    let dirs = |section: &'static str| {
        let names = testkit::golden_cases(section).into_iter();
        names.map(move |name| testkit::golden(section).join(name))
    };
    dirs("decoders").chain(dirs("quantized")).collect()
}

#[test]
fn every_golden_case_opens_and_loads() {
    for dir in cases() {
        for head in [Head::Keep, Head::Int8, Head::Auto] {
            let model = open_with(&dir, head).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
            load_all(&model);
            kernels::validate::program(model.program()).unwrap();
            assert!(model.stop_tokens().len() == 1, "{}", dir.display());
        }
    }
}

#[test]
fn both_spellings_of_a_config_give_the_same_program() {
    let mut seen = 0;
    for dir in cases().iter().filter(|d| d.join("config.legacy.json").exists()) {
        let new = open(dir).unwrap();
        let old = copy_with(dir, "config.legacy.json", |_| ());
        let old = open(old.path()).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        assert_eq!(new.program(), old.program(), "{}", dir.display());
        assert_eq!(new.spec(), old.spec(), "{}", dir.display());
        seen += 1;
    }
    assert!(seen >= 14, "{seen}");
}

#[test]
fn real_models_open_or_are_refused_for_a_true_reason() {
    let Some(models) = testkit::shared_models() else { return };
    for name in ["stories260k-hf", "babyllama-105-hf", "tinystories-656k", "bitllama-1m-hf"] {
        let model = open(&models.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(model.spec().tied_head);
        load_all(&model);
    }
    let quantized = std::fs::read_dir(models.join("tinystories-656k-quant")).unwrap();
    for dir in quantized.map(|e| e.unwrap().path()) {
        let model = open(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        load_all(&model);
    }
    let bitllama = models.join("bitllama-1m-hf");
    let renamed = copy_with(&bitllama, CONFIG, |config| {
        config["architectures"] = json!(["LlamaForCausalLM"]);
        config["model_type"] = json!("llama");
    });
    let err = open(renamed.path()).unwrap_err();
    assert!(
        matches!(&err, Error::UnusedTensors { count: 16, first, .. } if first.contains("sub_norm")),
        "{err}"
    );
}

#[test]
fn stop_tokens_come_from_the_first_file_that_has_them() {
    let dir = testkit::golden("decoders/llama_mha");
    let stops = |own: Value, generation: Option<Value>| {
        let copy = copy_with(&dir, CONFIG, |config| drop(config.insert(EOS.to_owned(), own)));
        let file = copy.path().join("generation_config.json");
        match generation {
            Some(json) => std::fs::write(file, json.to_string()).unwrap(),
            None => std::fs::remove_file(file).unwrap(),
        }
        let ids = open(copy.path()).map(|m| m.stop_tokens().to_vec());
        ids.map(|ids| ids.into_iter().map(|t| t.0).collect::<Vec<_>>())
    };
    assert_eq!(stops(json!(2), None).unwrap(), [2]);
    assert_eq!(stops(json!([7, 9]), Some(json!({"bos_token_id": 1}))).unwrap(), [7, 9]);
    assert_eq!(stops(json!(2), Some(json!({"eos_token_id": [3, 4]}))).unwrap(), [3, 4]);
    assert_eq!(stops(json!(2), Some(json!({"eos_token_id": 5}))).unwrap(), [5]);
    assert_eq!(stops(json!([-1, 3, 100_000]), None).unwrap(), [3], "others cannot be generated");
    assert!(stops(json!(null), None).unwrap().is_empty());
    assert!(matches!(stops(json!("</s>"), None), Err(Error::Config { .. })));
    assert!(matches!(stops(json!(2), Some(json!([]))), Err(Error::Json { .. })));
}

#[test]
fn folders_without_their_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let err = open(dir.path()).unwrap_err();
    assert!(matches!(&err, Error::MissingFile { path, .. } if path.ends_with(CONFIG)), "{err}");
    let err = open(&dir.path().join("nowhere")).unwrap_err();
    assert!(matches!(&err, Error::MissingFile { .. }), "{err}");
}

/// Every place in a JSON value, as a path of keys and indices.
fn places(value: &Value, at: &[String], all: &mut Vec<Vec<String>>) {
    let mut child = |key: String, value: &Value| {
        let path = [at, &[key]].concat();
        places(value, &path, all);
        all.push(path);
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(k, v)| child(k.clone(), v)),
        Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| child(i.to_string(), v)),
        _ => (),
    }
}

fn set(value: &mut Value, path: &[String], new: Value) {
    let pointer: String =
        path.iter().map(|p| format!("/{}", p.replace('~', "~0").replace('/', "~1"))).collect();
    *value.pointer_mut(&pointer).unwrap() = new;
}

fn odd_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(null)),
        Just(json!({})),
        Just(json!([])),
        Just(json!([[[]]])),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|i| json!(i)),
        (0u64..300).prop_map(|i| json!(i)),
        any::<f64>().prop_map(|f| json!(f)),
        prop::sample::select(vec!["", "gptq", "yarn", "linear", "re:.*", "-:.*", "Linear", "silu"])
            .prop_map(|s| json!(s)),
        "[a-z.:*+(]{0,12}".prop_map(|s| json!(s)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a configuration says, opening gives a valid program or an error.
    #[test]
    fn mutated_configs_never_panic(
        case in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), odd_value()), 1..4),
    ) {
        let cases = cases();
        let dir = &cases[case.index(cases.len())];
        let mut config = testkit::read_json(&dir.join(CONFIG));
        for (at, new) in edits {
            let mut all = Vec::new();
            places(&config, &[], &mut all);
            if !all.is_empty() {
                set(&mut config, &all[at.index(all.len())], new);
            }
        }
        let copy = copy_with(dir, CONFIG, |map| *map = config.as_object().cloned().unwrap_or_default());
        if let Ok(model) = open(copy.path()) {
            prop_assert!(kernels::validate::program(model.program()).is_ok());
        }
    }
}
