//! Loading and running models in tests: logits, losses and greedy continuations on a device.

use crate::gpu;
use engine::engine::{Engine, EngineConfig};
use engine::files::ModelFiles;
use engine::forward;
use engine::kv::PrefixCaching;
use engine::model::{Head, Model, ModelOptions};
use engine::request::{Event, Request};
use kernels::Backend;
use kernels::cpu::{CpuBackend, CpuOptions};
use kernels::program::TokenId;
use kernels::reference::ReferenceBackend;
use std::path::Path;

/// The device a test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    Reference,
    Cpu,
    Cuda,
}

impl Device {
    pub(crate) fn backend(self) -> Box<dyn Backend> {
        match self {
            Self::Reference => Box::new(ReferenceBackend),
            Self::Cuda => gpu::backend(),
            Self::Cpu => {
                let options = CpuOptions { threads: Some(2), isa: None };
                Box::new(CpuBackend::new(&options).expect("the cpu device is always there"))
            }
        }
    }
}

pub(crate) fn open(dir: &Path) -> Model {
    open_with(dir, Head::Keep)
}

pub(crate) fn open_with(dir: &Path, head: Head) -> Model {
    Model::open_with(
        ModelFiles::Folder(dir.to_owned()),
        &ModelOptions { head, ..ModelOptions::default() },
    )
    .unwrap_or_else(|e| panic!("{}: {}", dir.display(), chain(&e)))
}

/// An error with all its causes.
pub(crate) fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

pub(crate) fn ids(values: &serde_json::Value) -> Vec<TokenId> {
    let values = values.as_array().expect("a list of token ids");
    values.iter().map(|v| TokenId(v.as_u64().expect("a token id") as u32)).collect()
}

/// Logits `[t, v]` of every position, `chunk` tokens a step.
pub(crate) fn logits(model: &Model, device: Device, ids: &[TokenId], chunk: usize) -> Vec<f32> {
    let limits = forward::limits(ids.len(), chunk);
    let mut runner = device.backend().build(model.program(), &model.weights(), &limits);
    let runner = runner.as_mut().unwrap_or_else(|e| panic!("build: {}", chain(e)));
    forward::logits(runner.as_mut(), &limits, ids).expect("a valid sequence")
}

/// Mean negative log likelihood of `ids[1..]`, in nats.
pub(crate) fn loss(model: &Model, device: Device, ids: &[TokenId]) -> f64 {
    let v = model.spec().vocab;
    let logits = logits(model, device, ids, 512);
    let nll = |(row, next): (&[f32], &TokenId)| {
        let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
        sum.ln() - f64::from(row[next.index()] - max)
    };
    let total: f64 = logits.chunks_exact(v).zip(&ids[1..]).map(nll).sum();
    total / (ids.len() - 1) as f64
}

/// Greedy continuation through the engine, prompts computed `chunk` tokens a step.
pub(crate) fn greedy(
    model: &Model,
    device: Device,
    prompt: &[TokenId],
    tokens: usize,
    chunk: usize,
) -> Vec<TokenId> {
    let config = EngineConfig {
        vocab: model.spec().vocab,
        context_len: model.spec().context_len.max((prompt.len() + tokens) as u32),
        step_tokens: chunk,
        max_sequences: 1,
        blocks: (prompt.len() + tokens).div_ceil(16),
        block_len: 16,
        max_waiting: 1,
        max_drafted: 0,
        max_scored: 0,
        prefix_caching: PrefixCaching::Off,
    };
    let runner = device.backend().build(model.program(), &model.weights(), &config.step_limits());
    let mut engine = Engine::new(runner.expect("a valid model"), config);
    engine.submit(Request::new(prompt.to_vec(), tokens as u32)).expect("a valid request");
    let (mut events, mut out) = (vec![], vec![]);
    loop {
        engine.step(&mut events).expect("a step");
        for event in events.drain(..) {
            match event {
                Event::Prompt { .. } => {}
                Event::Token { token, .. } => out.push(token),
                Event::Finished { .. } => return out,
                Event::Failed { reason, .. } => panic!("{reason}"),
            }
        }
    }
}
