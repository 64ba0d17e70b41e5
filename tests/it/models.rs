//! Real trained models, where they lie beside the repository: published text and losses.
//!
//! Skips with a printed reason where `shared/models` is absent.

use crate::run::{self, Device};
use engine::files::ModelFiles;
use engine::model::{Head, Model};
use engine::speculation::self_draft::SelfDraft;
use engine::tokenizer::Tokenizer;
use serde_json::Value;
use std::path::Path;

/// Float32 losses are recorded to six digits and the reference device computes them alike.
const LOSS_REFERENCE: f64 = 0.005;
/// Int8 activations: rounding noise of 0.64 % in each product moves a mean over several hundred
/// tokens by thousandths of a nat; twenty leave room for the narrow layers of these models.
const LOSS_CPU: f64 = 0.02;

fn devices() -> [(Device, f64); 2] {
    [(Device::Reference, LOSS_REFERENCE), (Device::Cpu, LOSS_CPU)]
}

fn windows(dir: &Path) -> Vec<Value> {
    let golden = testkit::read_json(&dir.join("golden/tinystories-656k.json"));
    golden["nll"].as_array().expect("windows").clone()
}

#[test]
fn losses_of_the_quantized_tinystories() {
    let Some(dir) = testkit::shared_models() else { return };
    let windows = windows(&dir);
    let mut names: Vec<_> = std::fs::read_dir(dir.join("tinystories-656k-quant"))
        .expect("the folder of quantized models")
        .map_while(Result::ok)
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names.len(), 12, "{names:?}");
    for name in names {
        let golden = testkit::read_json(&dir.join(format!("golden/quant/{name}.json")));
        let model = run::open(&dir.join("tinystories-656k-quant").join(&name));
        for (device, tolerance) in devices() {
            let mut worst = 0.0f64;
            for (window, expected) in windows.iter().zip(losses(&golden)) {
                let loss = run::loss(&model, device, &run::ids(&window["ids"]));
                worst = worst.max((loss - expected).abs());
            }
            println!("{name:<36} {device:?}: loss off by {worst:.5} nats of {tolerance}");
            assert!(worst <= tolerance, "{name} on {device:?}: {worst} > {tolerance}");
        }
    }
}

/// Losses of a golden file: of the float32 pass over dequantized weights.
fn losses(golden: &Value) -> Vec<f64> {
    let all = golden["f32_dequant"]["nll"].as_array().expect("losses");
    all.iter().map(|v| v.as_f64().expect("a loss")).collect()
}

#[test]
fn losses_and_text_of_float_models() {
    let Some(dir) = testkit::shared_models() else { return };
    for name in ["stories260k-hf", "bitllama-1m-hf", "tinystories-656k", "babyllama-105-hf"] {
        let golden = testkit::read_json(&dir.join(format!("golden/{name}.json")));
        let model = run::open(&dir.join(name));
        let tokenizer = Tokenizer::from_files(&ModelFiles::Folder(dir.join(name)));
        let tokenizer = tokenizer.unwrap_or_else(|e| panic!("{name}: {e}"));
        for (device, tolerance) in devices() {
            for window in golden["nll"].as_array().expect("windows") {
                let loss = run::loss(&model, device, &run::ids(&window["ids"]));
                let off = (loss - window["nll"].as_f64().expect("a loss")).abs();
                assert!(off <= tolerance, "{name} on {device:?}: {off} > {tolerance}");
            }
            for case in golden["cases"].as_array().expect("cases") {
                check_text(name, &model, device, &tokenizer, case);
            }
        }
    }
}

/// The published greedy continuation, word for word.
fn check_text(name: &str, model: &Model, device: Device, tokenizer: &Tokenizer, case: &Value) {
    let prompt = run::ids(&case["ids"]);
    let expected = run::ids(&case["greedy_ids"]);
    let found = run::greedy(model, device, &prompt, expected.len(), 512);
    assert_eq!(found, expected, "{name} on {device:?}: {}", case["prompt"]);
    let all: Vec<_> = prompt.iter().chain(&found).copied().collect();
    let text = tokenizer.decode(&all, true).expect("decodable ids");
    let expected = case["greedy_text"].as_str().expect("text");
    // transformers decoded with special tokens kept where a model begins its stories with one.
    let special = tokenizer.decode(&all, false).expect("decodable ids");
    assert!(expected == text || expected == special, "{name}: {text:?} {expected:?}");
}

/// What a coupled or rejecting verifier accepts at temperature 1: mean sum(min(p, q)).
fn overlap(p_tv: &[f32], q_tv: &[f32], v: usize) -> f64 {
    let softmax = |row: &[f32]| -> Vec<f64> {
        let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let all: Vec<f64> = row.iter().map(|&x| f64::from(x - max).exp()).collect();
        let sum: f64 = all.iter().sum();
        all.into_iter().map(|x| x / sum).collect()
    };
    let row = |(p, q): (&[f32], &[f32])| -> f64 {
        softmax(p).iter().zip(softmax(q)).map(|(p, q)| p.min(q)).sum()
    };
    p_tv.chunks_exact(v).zip(q_tv.chunks_exact(v)).map(row).sum::<f64>() / (p_tv.len() / v) as f64
}

/// An independent computation in float32 over the same windows. It keeps scales in float32; those
/// of f16, up to a thousandth larger, move few codes and a mean over 300 tokens by far less than
/// a hundredth.
#[test]
fn a_model_drafts_for_itself() {
    let Some(models) = testkit::shared_models() else { return };
    let dir = models.join("tinystories-656k");
    let windows = windows(&models);
    let windows: Vec<_> = windows[..4].iter().map(|w| run::ids(&w["ids"])).collect();
    let whole = run::open(&dir);
    let logits = |model: &Model| -> Vec<Vec<f32>> {
        windows.iter().map(|ids| run::logits(model, Device::Reference, ids, 512)).collect()
    };
    let exact = logits(&whole);
    for (text, expected) in
        [("layers=2", 1.0), ("bits=8", 0.9912), ("bits=4", 0.8223), ("layers=1", 0.365)]
    {
        let draft: SelfDraft = text.parse().expect("a self-draft");
        let files = ModelFiles::Folder(dir.clone());
        let draft = Model::open_with(files, &draft.options(Head::Keep)).expect("a model");
        let found = logits(&draft);
        let v = whole.spec().vocab;
        let sum: f64 = exact.iter().zip(&found).map(|(p, q)| overlap(p, q, v)).sum();
        let mean = sum / windows.len() as f64;
        println!("{text}: overlap {mean:.4}, expected {expected}");
        assert!((mean - expected).abs() <= 0.01, "{text}: {mean}");
        assert_eq!(text == "layers=2", exact == found, "{text}: two layers are all of them");
        let bytes = [&whole, &draft].map(|m| m.program().bytes_per_token());
        assert_eq!(text == "layers=2", bytes[0] <= bytes[1], "{text}: {bytes:?}");
    }
}
