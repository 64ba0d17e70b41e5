//! Choosing a token from a row of logits: `sampler/{vocabulary}/{way}`, throughput in bytes of the
//! row, which every way must read once.
//!
//! Logits are normally distributed (deviation 3), as a model's are about; the history, where it
//! counts, is 1024 tokens. A greedy choice over 32000 tokens should cost far below a step.

#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::sampler::{History, Sampler, SamplingParams};
use kernels::program::TokenId;
use std::time::Duration;

/// Tokens before the one that is chosen.
const HISTORY: u32 = 1024;

/// Sums of twelve uniform numbers less their mean, times 3: near enough to normal.
fn logits(vocab: usize) -> Vec<f32> {
    let mut state = 7u64;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..vocab).map(|_| 3.0 * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0)).collect()
}

fn ways() -> Vec<(&'static str, SamplingParams)> {
    let plain = SamplingParams::default;
    vec![
        ("greedy", SamplingParams::greedy()),
        ("plain", plain()),
        ("top-k 40", SamplingParams { top_k: 40, ..plain() }),
        ("top-p 0.9", SamplingParams { top_p: 0.9, ..plain() }),
        ("min-p 0.05", SamplingParams { min_p: 0.05, ..plain() }),
        ("typical 0.9", SamplingParams { typical_p: 0.9, ..plain() }),
        ("penalties", SamplingParams { repetition_penalty: 1.1, presence_penalty: 0.5, ..plain() }),
        (
            "all",
            SamplingParams {
                temperature: 0.7,
                top_k: 40,
                top_p: 0.9,
                min_p: 0.05,
                repetition_penalty: 1.1,
                ..plain()
            },
        ),
    ]
}

fn samplers(c: &mut Criterion) {
    for vocab in [4096, 32_000, 128_256] {
        let logits = logits(vocab);
        let tokens: Vec<TokenId> = (0..HISTORY).map(|i| TokenId(i * 37 % vocab as u32)).collect();
        let (prompt, generated) = tokens.split_at(tokens.len() / 2);
        let history = History { prompt, generated };
        let mut group = c.benchmark_group(format!("sampler/{vocab}"));
        group.sample_size(20).warm_up_time(Duration::from_millis(200));
        group.measurement_time(Duration::from_millis(800));
        group.throughput(Throughput::Bytes(4 * vocab as u64));
        for (name, params) in ways() {
            let (mut sampler, mut position) = (Sampler::default(), HISTORY);
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| {
                    position = position.wrapping_add(1);
                    sampler.sample(&logits, &history, &params, position)
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, samplers);
criterion_main!(benches);
