//! The demo pair against transformers' own losses and greedy text.
//!
//! Input: the models shipped in `server/demo`, `tests/golden/demo.json` and the first evaluation
//! windows in `tests/golden/demo_windows.json`.

use crate::run::{self, Device};
use engine::model::Model;
use serde_json::Value;
use std::path::Path;

fn model(name: &str) -> Model {
    run::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/demo").join(name))
}

#[test]
fn losses_by_window() {
    let golden = testkit::golden_json("demo.json");
    let windows = testkit::golden_json("demo_windows.json");
    for name in ["verifier", "draft"] {
        let model = model(name);
        for (i, window) in windows.as_array().expect("windows").iter().enumerate() {
            let expected = golden["losses_by_window"][name][i].as_f64().expect("a loss");
            // Recorded to four digits; the cpu's int8 activations as in `models`.
            for (device, tolerance) in [(Device::Reference, 2e-4), (Device::Cpu, 0.02)] {
                if device == Device::Reference && i > 0 {
                    continue;
                }
                let off = run::loss(&model, device, &run::ids(window)) - expected;
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
        let model = model(name);
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
