//! What a server has done so far, for `/metrics`.
//!
//! Input: what the worker books after each step. Not here: what a single request hears.

use super::worker::{Token, Update};
use engine::engine::{Counts, Progress};
use engine::request::Rejected;
use prometheus::{IntCounter, IntGauge, Registry, TextEncoder};
use std::time::{Duration, Instant};

/// Counters and gauges of one server.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    running: IntGauge,
    waiting: IntGauge,
    generated: IntCounter,
}

impl Metrics {
    /// All of them at zero.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| -> anyhow::Result<IntGauge> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let running = gauge("foretoken_requests_running", "Requests that hold KV blocks.")?;
        let waiting = gauge("foretoken_requests_waiting", "Requests that wait for a place.")?;
        let generated = IntCounter::new("foretoken_generation_tokens_total", "Generated tokens.")?;
        registry.register(Box::new(generated.clone()))?;
        Ok(Self { registry, running, waiting, generated })
    }

    /// A request came, and was perhaps refused.
    pub(crate) fn arrived(&self, _refused: Option<&Rejected>) {}

    /// A step is over.
    pub(crate) fn step(&self, _progress: &Progress, _took: Duration, counts: &Counts) {
        self.running.set(counts.running as i64);
        self.waiting.set((counts.open - counts.running) as i64);
    }

    /// A step brought a request `tokens`; `last` is when it had its first one.
    pub(crate) fn tokens(
        &self,
        tokens: &[Token],
        _arrived: Instant,
        _first: Option<Instant>,
        _now: Instant,
    ) {
        self.generated.inc_by(tokens.len() as u64);
    }

    /// A request ended.
    pub(crate) fn ended(&self, _update: &Update) {}

    /// All of them in the text format of Prometheus.
    pub(crate) fn text(&self) -> anyhow::Result<String> {
        Ok(TextEncoder::new().encode_to_string(&self.registry.gather())?)
    }
}
