//! Tiny models of every supported family and quantization against Hugging Face transformers.
//!
//! Input: `tests/golden/{decoders,quantized}`, whose values were computed by transformers in
//! float32. Both spellings of the configuration must give the same logits.

use crate::gpu;
use crate::run::{self, Device};
use engine::model::{Head, Model};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use testkit::Tensor;

/// Float32 against float32: transformers' own orders of summation differ by up to 5e-5; 1e-3 is
/// twenty times that and a seven hundredth of the smallest effect of any configuration key.
const F32_TOLERANCE: f64 = 1e-3;

/// Six deviations of the noise of rounding to int8, see [`tolerance`].
pub(crate) const ROUNDING: f64 = 6.0 * 0.0060;

struct Case {
    name: String,
    dir: PathBuf,
    expected: Value,
    arrays: BTreeMap<String, Tensor>,
}

fn cases(section: &str) -> Vec<Case> {
    let read = |name: String| {
        let dir = testkit::golden(section).join(&name);
        let expected = testkit::read_json(&dir.join("expected.json"));
        let arrays = testkit::read_tensors(&dir.join("expected.safetensors"));
        Case { name, dir, expected, arrays }
    };
    testkit::golden_cases(section).into_iter().map(read).collect()
}

/// How far the logits on `device` may lie from the float32 reference.
///
/// Reference: [`F32_TOLERANCE`]. The other devices round keys and values to f16, a part of what a
/// float16 forward pass rounds, so twice that pass's measured noise plus 0.01 bounds it. Grouped
/// weights add int8 activations: rounding to steps of `max|x| / 127` of a block of up to 64 near
/// Gaussian values (max about 2.6 deviations) is noise of `2.6 / 127 / sqrt(12)` = 0.0059
/// deviations in every product, of up to 128 before gates (2.8) 0.0064; over a layer's four linears
/// the root of the mean square is 0.0060. Of these four linears each adds that share of the logits'
/// deviation to the stream at most; independent shares add as squares. Six deviations of the sum
/// cover the about ten thousand logits of a case (normal tail 2e-9). A head rounded to int8 is
/// one linear more, with the same noise in its weights: two shares.
fn tolerance(device: Device, case: &Case, model: &Model, head: Head) -> f64 {
    if device == Device::Reference {
        return F32_TOLERANCE;
    }
    let noise = case.expected["noise_max_abs"]["float16"].as_f64().unwrap_or(0.0);
    let grouped = |f: &quant::Format| matches!(f, quant::Format::Grouped { .. });
    let int8 = if model.program().weights.iter().any(|w| grouped(&w.format)) {
        let std = case.expected["logits_std"].as_f64().expect("logits_std");
        let shares = 4 * model.spec().layers.len() + if head == Head::Keep { 0 } else { 2 };
        ROUNDING * std * (shares as f64).sqrt()
    } else {
        0.0
    };
    2.0 * noise + 0.01 + int8
}

/// Largest difference to the expected logits of prompt `name`.
fn logits_error(case: &Case, name: &str, prompt: &Value, logits_tv: &[f32], v: usize) -> f64 {
    let expected = case.arrays[&format!("{name}.logits")].to_f32();
    let positions = prompt["logits_positions"].as_array().expect("positions");
    assert_eq!(expected.len(), positions.len() * v, "{} {name}: vocabulary", case.name);
    let mut worst = 0.0f64;
    for (row_v, position) in expected.chunks_exact(v).zip(positions) {
        let p = position.as_u64().expect("a position") as usize;
        for (e, f) in row_v.iter().zip(&logits_tv[p * v..(p + 1) * v]) {
            let error = f64::from((e - f).abs());
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
    }
    worst
}

/// Compares greedy tokens until the reference itself is nearly undecided.
fn check_greedy(case: &Case, prompt: &Value, model: &Model, device: Device, tolerance: f64) {
    let ids = run::ids(&prompt["ids"]);
    let expected = run::ids(&prompt["greedy"]);
    let margins = prompt["greedy_margin"].as_array().expect("margins");
    for chunk in [512, 5] {
        let found = run::greedy(model, device, &ids, expected.len(), chunk);
        for (i, margin) in margins.iter().enumerate() {
            if margin.as_f64().expect("a margin") < 2.0 * tolerance {
                break;
            }
            let at = format!("{} {} token {i}, chunk {chunk}", case.name, prompt["name"]);
            assert_eq!(found[i], expected[i], "{at}");
        }
    }
}

/// Runs all prompts of a case; the largest error of its logits over the tolerance.
fn check_case(case: &Case, model: &Model, device: Device, head: Head) -> (f64, f64) {
    let tolerance = tolerance(device, case, model, head);
    let mut worst = 0.0f64;
    for prompt in case.expected["prompts"].as_array().expect("prompts") {
        let name = prompt["name"].as_str().expect("a name");
        let ids = run::ids(&prompt["ids"]);
        let logits = run::logits(model, device, &ids, 512);
        worst = worst.max(logits_error(case, name, prompt, &logits, model.spec().vocab));
        check_greedy(case, prompt, model, device, tolerance);
    }
    (worst, tolerance)
}

/// A copy of a case with `config.legacy.json` as its configuration, where it has one.
fn legacy_twin(case: &Case) -> Option<tempfile::TempDir> {
    let legacy = case.dir.join("config.legacy.json");
    if !legacy.is_file() {
        return None;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    for entry in std::fs::read_dir(&case.dir).expect("the case").map_while(Result::ok) {
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("a copy");
    }
    std::fs::copy(legacy, dir.path().join("config.json")).expect("a copy");
    Some(dir)
}

/// The older spelling of the configuration must give the same model: bit for bit.
fn check_legacy(case: &Case, model: &Model, device: Device) -> bool {
    let Some(dir) = legacy_twin(case) else { return false };
    let twin = run::open(dir.path());
    assert_eq!(twin.spec(), model.spec(), "{}: config.legacy.json", case.name);
    for prompt in case.expected["prompts"].as_array().expect("prompts") {
        let ids = run::ids(&prompt["ids"]);
        let [a, b] = [model, &twin].map(|m| run::logits(m, device, &ids, 512));
        assert!(a == b, "{}: logits with config.legacy.json differ", case.name);
    }
    true
}

fn check_section(section: &str, device: Device, head: Head) {
    let all = cases(section);
    assert!(all.len() >= 14, "{section} has only {} cases", all.len());
    check_cases(section, all.iter(), device, head);
}

fn check_cases<'a>(
    section: &str,
    cases: impl Iterator<Item = &'a Case>,
    device: Device,
    head: Head,
) {
    let (mut failures, mut twins, mut count) = (vec![], 0, 0);
    for case in cases {
        count += 1;
        let model = run::open_with(&case.dir, head);
        let (worst, allowed) = check_case(case, &model, device, head);
        if head == Head::Keep {
            twins += usize::from(check_legacy(case, &model, device));
        }
        println!("{device:?} {head:?} {:<44} {worst:.2e} of {allowed:.2e}", case.name);
        if worst > allowed {
            failures.push(format!("{}: {worst:.3e} > {allowed:.3e}", case.name));
        }
    }
    println!("{section}: {twins} of {count} cases with config.legacy.json too");
    assert!(failures.is_empty(), "{device:?}:\n{}", failures.join("\n"));
}

#[test]
fn decoders_on_reference() {
    check_section("decoders", Device::Reference, Head::Keep);
}

#[test]
fn decoders_on_cpu() {
    check_section("decoders", Device::Cpu, Head::Keep);
}

#[test]
fn quantized_on_reference() {
    check_section("quantized", Device::Reference, Head::Keep);
}

#[test]
fn quantized_on_cpu() {
    check_section("quantized", Device::Cpu, Head::Keep);
}

/// On a device all cases; on a processor, which takes a hundred times as long, every fourth.
fn check_cuda(section: &str) {
    if gpu::is_there() {
        let step = if gpu::is_real() { 1 } else { 4 };
        check_cases(section, cases(section).iter().step_by(step), Device::Cuda, Head::Keep);
    }
}

#[test]
fn decoders_on_cuda() {
    check_cuda("decoders");
}

#[test]
fn quantized_on_cuda() {
    check_cuda("quantized");
}

#[test]
fn quantized_on_cpu_with_int8_heads() {
    check_section("quantized", Device::Cpu, Head::Auto);
}

/// On the reference device nothing else differs: one share of rounding noise, that of the head's
/// weights. It must show, or nothing was rounded; a head that was quantized stays as it is.
#[test]
fn int8_heads_differ_by_their_rounding() {
    let mut rounded = 0;
    for case in &cases("quantized") {
        let [keep, int8] = [Head::Keep, Head::Int8].map(|head| run::open_with(&case.dir, head));
        let std = case.expected["logits_std"].as_f64().expect("logits_std");
        let prompt = &case.expected["prompts"][0];
        let ids = run::ids(&prompt["ids"]);
        let [a, b] = [&keep, &int8].map(|m| run::logits(m, Device::Reference, &ids, 512));
        let off = a.iter().zip(&b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        println!("{:<44} {off:.2e} of {:.2e}", case.name, ROUNDING * std);
        if keep.program() == int8.program() {
            assert!(a == b, "{}", case.name);
            continue;
        }
        rounded += 1;
        assert!(off > 0.0 && off <= ROUNDING * std, "{}: {off}", case.name);
    }
    assert!(rounded >= 14, "{rounded} cases have float heads");
}
