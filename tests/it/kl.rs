//! What int8 costs: the divergence of the cpu's next-token distributions from the reference's.
//!
//! Both devices run the same 4-bit weights; the reference keeps activations and heads in floats.
//! Models: the quantized TinyStories of `shared/models` (skipped with a printed reason where they
//! are absent) and the demo pair, over the windows of their golden losses.

use crate::run::{self, Device};
use engine::model::{Head, Model};
use kernels::program::TokenId;
use std::path::{Path, PathBuf};

/// Nats a token: what users may lose to int8 activations and an int8 head. Blocks of 64 columns, 128
/// before gates, give the worst of these narrow models 0.9e-3, blocks of 128 everywhere would give it 1.3e-3.
const MOST: f64 = 1e-3;

/// Sum over the rows of both of KL(softmax(p) || softmax(q)), in nats.
fn divergence(p_tv: &[f32], q_tv: &[f32], v: usize) -> f64 {
    p_tv.chunks_exact(v).zip(q_tv.chunks_exact(v)).map(|(p, q)| row_divergence(p, q)).sum()
}

fn row_divergence(p: &[f32], q: &[f32]) -> f64 {
    let [log_p, log_q] = [p, q].map(log_sum);
    let term = |(p, q): (&f32, &f32)| {
        let (p, q) = (f64::from(*p) - log_p, f64::from(*q) - log_q);
        p.exp() * (p - q)
    };
    p.iter().zip(q).map(term).sum()
}

/// Logarithm of the sum of exponentials.
fn log_sum(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)));
    max + row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

/// Mean over all tokens of `windows`: with the file's head and with an int8 one.
fn divergences(dir: &Path, windows: &[Vec<TokenId>]) -> [f64; 2] {
    let [keep, int8] = [Head::Keep, Head::Int8].map(|head| run::open_with(dir, head));
    let v = keep.spec().vocab;
    let mut sums = [0.0; 2];
    for window in windows {
        let logits = |model: &Model, device| run::logits(model, device, window, 512);
        let exact = logits(&keep, Device::Reference);
        for (sum, model) in sums.iter_mut().zip([&keep, &int8]) {
            *sum += divergence(&exact, &logits(model, Device::Cpu), v);
        }
    }
    let tokens: usize = windows.iter().map(Vec::len).sum();
    sums.map(|sum| sum / tokens as f64)
}

fn check(models: &[(String, PathBuf)], windows: &[Vec<TokenId>]) {
    let mut failures = vec![];
    for (name, dir) in models {
        let [keep, int8] = divergences(dir, windows);
        println!("{name:<36} KL {keep:.2e}, with an int8 head {int8:.2e}, of {MOST:.1e}");
        if !(keep <= MOST && int8 <= MOST) {
            failures.push(name);
        }
    }
    assert!(failures.is_empty(), "beyond {MOST} nats a token: {failures:?}");
}

#[test]
fn of_the_quantized_tinystories() {
    let Some(dir) = testkit::shared_models() else { return };
    let golden = testkit::read_json(&dir.join("golden/tinystories-656k.json"));
    let windows = golden["nll"].as_array().expect("windows");
    let windows: Vec<_> = windows.iter().map(|w| run::ids(&w["ids"])).collect();
    let dir = dir.join("tinystories-656k-quant");
    let entries = std::fs::read_dir(&dir).expect("the folder").map_while(Result::ok);
    let mut models: Vec<_> =
        entries.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path())).collect();
    models.sort();
    check(&models, &windows);
}

#[test]
fn of_the_demo_pair() {
    let windows = testkit::golden_json("demo_windows.json");
    // Half of one window: the reference is slow.
    let window = run::ids(&windows[0])[..256].to_vec();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/demo");
    check(&["verifier", "draft"].map(|name| (name.to_owned(), demo.join(name))), &[window]);
}

#[test]
fn divergence_of_known_distributions() {
    // (1/2, 1/2) against (1/4, 3/4): ln 2 - ln(3) / 2.
    let found = divergence(&[1.0, 1.0, 5.0, 5.0], &[0.0, 3f32.ln(), 7.0, 7.0], 2);
    assert!((found - (2f64.ln() - 3f64.ln() / 2.0)).abs() < 1e-6, "{found}");
}
