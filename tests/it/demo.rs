//! The demo pair against transformers' own losses and greedy text.
//!
//! Input: the models shipped in `server/demo`, `tests/golden/demo.json` and the first evaluation
//! windows in `tests/golden/demo_windows.json`.

use crate::golden::ROUNDING;
use crate::run::{self, Device};
use engine::model::{Head, Model};
use serde_json::Value;
use std::path::Path;

fn model(name: &str, head: Head) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/demo").join(name);
    run::open_with(&dir, head)
}

#[test]
fn losses_by_window() {
    let golden = testkit::golden_json("demo.json");
    let windows = testkit::golden_json("demo_windows.json");
    for name in ["verifier", "draft"] {
        let [keep, int8] = [Head::Keep, Head::Int8].map(|head| model(name, head));
        for (i, window) in windows.as_array().expect("windows").iter().enumerate() {
            let expected = golden["losses_by_window"][name][i].as_f64().expect("a loss");
            // Recorded to four digits; the cpu's int8 activations as in `models`.
            let runs = [
                (&keep, Device::Reference, 2e-4),
                (&keep, Device::Cpu, 0.02),
                (&int8, Device::Cpu, 0.02),
            ];
            for (model, device, tolerance) in runs {
                if device == Device::Reference && i > 0 {
                    continue;
                }
                let off = run::loss(model, device, &run::ids(window)) - expected;
                println!("demo {name} window {i} on {device:?}: {off:+.5} nats of {tolerance}");
                assert!(off.abs() <= tolerance, "{name} window {i}: {off}");
            }
        }
    }
}

#[test]
fn greedy_text_on_reference() {
    let golden = testkit::golden_json("demo.json");
    for name in ["verifier", "draft"] {
        let model = model(name, Head::Keep);
        for case in golden["greedy"][name].as_array().expect("cases") {
            check_greedy(name, &model, case);
        }
    }
}

/// The first 24 tokens: further ones say no more about correctness and the scalar device is slow.
fn check_greedy(name: &str, model: &Model, case: &Value) {
    let expected = run::ids(&case["greedy"]);
    let found = run::greedy(model, Device::Reference, &run::ids(&case["ids"]), 24, 512);
    assert_eq!(found, expected[..24], "{name}: {}", case["prompt"]);
}

#[test]
fn greedy_text_as_it_is_run() {
    let golden = testkit::golden_json("demo.json");
    for name in ["verifier", "draft"] {
        let models = [Head::Keep, Head::Auto].map(|head| model(name, head));
        for case in golden["greedy"][name].as_array().expect("cases") {
            check_int8(name, &models, case);
        }
    }
}

/// The cpu with an int8 head may choose another token than transformers only where the best two
/// are nearer than its rounding: both logits may move by what `golden` allows them.
fn check_int8(name: &str, [keep, int8]: &[Model; 2], case: &Value) {
    let (prompt, greedy) = (run::ids(&case["ids"]), &run::ids(&case["greedy"])[..24]);
    let all: Vec<_> = prompt.iter().chain(greedy).copied().collect();
    let v = keep.spec().vocab;
    let exact = run::logits(keep, Device::Reference, &all, 512);
    let shares = 4 * keep.spec().layers.len() + 2;
    let tolerance = ROUNDING * deviation(&exact) * (shares as f64).sqrt() + 0.01;
    let found = run::greedy(int8, Device::Cpu, &prompt, greedy.len(), 512);
    let same = found.iter().zip(greedy).take_while(|(f, g)| f == g).count();
    println!("demo {name} {}: {same} of {} tokens", case["prompt"], greedy.len());
    if same < greedy.len() {
        let row = &exact[(prompt.len() + same - 1) * v..][..v];
        let margin = f64::from(row[greedy[same].index()] - row[found[same].index()]);
        assert!(margin <= 2.0 * tolerance, "{name} token {same}: {margin} > 2 * {tolerance}");
    }
}

/// Standard deviation.
fn deviation(values: &[f32]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    (values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt()
}
