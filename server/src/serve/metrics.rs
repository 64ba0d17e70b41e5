//! What a server has done so far, for `/metrics`.
//!
//! Input: what the worker books after each step, and how requests were answered. The worker meets
//! only atomics here: every counter is made before the first request. Not here: what a single
//! request hears ([`super::openai::report`]), vLLM's names ([`aliases`]).

mod aliases;

use axum::http::StatusCode;
use engine::engine::{Counts, EngineConfig, Progress};
use engine::request::FinishReason;
use engine::speculation::SpeculationCounts;
use engine::speculation::policy::Verdict;
use prometheus::core::Collector;
use prometheus::{
    Counter, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};
use std::sync::OnceLock;
use std::time::Duration;

/// Upper bounds of times of a whole request, in seconds.
const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 300.0];
/// Upper bounds of times between pieces, in seconds.
const SHORT_SECONDS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
/// Upper bounds of lengths, in tokens.
const TOKENS: [f64; 13] =
    [1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 32768.0, 131_072.0];
/// How requests end.
const ENDINGS: [&str; 4] = ["stop", "length", "abort", "error"];
/// Why requests are refused, by the status that says so; the last is any other.
const REFUSALS: [(u16, &str); 8] = [
    (400, "invalid"),
    (401, "unauthorized"),
    (403, "forbidden"),
    (404, "unknown"),
    (413, "too_large"),
    (429, "queue_full"),
    (503, "unavailable"),
    (0, "other"),
];

/// Counters and gauges of one server.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    served: OnceLock<Served>,
    running: IntGauge,
    waiting: IntGauge,
    blocks_used: IntGauge,
    blocks: IntGauge,
    kv_usage: Gauge,
    preemptions: IntCounter,
    steps: IntCounter,
    step_seconds: Counter,
    worker_seconds: Counter,
    prefill: IntCounter,
    prompt: IntCounter,
    generated: IntCounter,
    ended: Vec<IntCounter>,
    refused: Vec<IntCounter>,
    speculation: Speculation,
    first_token: Histogram,
    between: Histogram,
    whole: Histogram,
    prompts: Histogram,
    generations: Histogram,
    work: Work,
    spans: Spans,
}

/// What was computed, and what need not be.
#[derive(Debug)]
struct Work {
    step_tokens: Histogram,
    prefix_queried: IntCounter,
    prefix_cached: IntCounter,
}

/// Where the time of requests went.
#[derive(Debug)]
struct Spans {
    waiting: Histogram,
    prefill: Histogram,
    decode: Histogram,
    computed: Histogram,
    a_token: Histogram,
}

/// What is known when the model is loaded.
#[derive(Debug)]
struct Served {
    name: String,
    blocks: usize,
    /// Accepted tokens by their place in their draft.
    accepted_at: Vec<IntCounter>,
}

/// What guessing ahead did.
#[derive(Debug)]
struct Speculation {
    drafts: IntCounter,
    drafted: IntCounter,
    accepted: IntCounter,
    accepted_at: IntCounterVec,
    /// NaN until known.
    break_even: Gauge,
    measured: Gauge,
    speedup: Gauge,
}

/// When tokens came.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Brought {
    /// A request's first ones, so long after its arrival.
    First { prompt_tokens: usize, wait: Duration },
    /// Later ones, so long after the last ones.
    Later { wait: Duration },
}

/// A request that ended.
#[derive(Debug)]
pub(crate) struct Ended<'a> {
    /// None if it failed.
    pub reason: Option<FinishReason>,
    pub prompt_tokens: usize,
    pub tokens: usize,
    pub lasted: Duration,
    /// From its arrival until it got a place.
    pub waited: Duration,
    /// From its arrival to its first token.
    pub first: Duration,
    pub speculation: SpeculationCounts,
    /// Cycles by how many proposed tokens they accepted.
    pub accepted_in: &'a [u64],
}

impl Metrics {
    /// All of them at zero.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let make = Make(Registry::new());
        Ok(Self {
            served: OnceLock::new(),
            running: make.gauge("requests_running", "Requests that hold KV blocks")?,
            waiting: make.gauge("requests_waiting", "Requests that wait for a place")?,
            blocks_used: make.gauge("kv_blocks_used", "KV blocks that requests hold")?,
            blocks: make.gauge("kv_blocks", "KV blocks in all")?,
            kv_usage: make.share("kv_usage_ratio", "Share of the KV blocks that are held")?,
            preemptions: make.counter("preemptions_total", "Times a request lost its KV blocks")?,
            steps: make.counter("steps_total", "Steps of the engine")?,
            step_seconds: make.add(Counter::new(
                "foretoken_step_seconds_total",
                "Time that the engine took for its steps",
            ))?,
            worker_seconds: make.add(Counter::new(
                "foretoken_worker_seconds_total",
                "Time of the steps and of all that the engine's thread did between them",
            ))?,
            prefill: make.counter(
                "step_prefill_tokens_total",
                "Tokens computed of prompts, and again of requests that were preempted",
            )?,
            prompt: make.counter("prompt_tokens_total", "Tokens of prompts that were computed")?,
            generated: make.counter("generation_tokens_total", "Generated tokens")?,
            ended: make.labelled(
                Opts::new("foretoken_requests_ended_total", "Requests that ended"),
                "finished_reason",
                &ENDINGS,
            )?,
            refused: make.labelled(
                Opts::new("foretoken_requests_refused_total", "Requests answered by an error"),
                "reason",
                &REFUSALS.map(|(_, reason)| reason),
            )?,
            speculation: Speculation::new(&make)?,
            first_token: make.histogram(
                "time_to_first_token_seconds",
                "From a request's arrival to its first token",
                &SECONDS,
            )?,
            between: make.histogram(
                "inter_token_seconds",
                "Between two steps that brought a request tokens",
                &SHORT_SECONDS,
            )?,
            whole: make.histogram(
                "request_seconds",
                "From a request's arrival to its own end",
                &SECONDS,
            )?,
            prompts: make.histogram("request_prompt_tokens", "Tokens of a prompt", &TOKENS)?,
            generations: make.histogram(
                "request_generation_tokens",
                "Tokens generated for a request",
                &TOKENS,
            )?,
            work: Work::new(&make)?,
            spans: Spans::new(&make)?,
            registry: make.0,
        })
    }

    /// The model is loaded, and is called `name`.
    pub(crate) fn serve(&self, name: &str, config: &EngineConfig) {
        self.blocks.set(config.blocks as i64);
        let at = |i: usize| self.speculation.accepted_at.with_label_values(&[i.to_string()]);
        let accepted_at = (0..config.max_drafted).map(at).collect();
        let served = Served { name: name.to_owned(), blocks: config.blocks, accepted_at };
        // There is one model, so nothing was set before.
        let _ = self.served.set(served);
    }

    /// A step is over.
    pub(crate) fn step(&self, progress: &Progress, took: Duration, counts: &Counts) {
        self.running.set(counts.running as i64);
        self.waiting.set((counts.open - counts.running) as i64);
        let total = |counter: &IntCounter, is: u64| {
            counter.inc_by(is.saturating_sub(counter.get()));
        };
        total(&self.preemptions, counts.preemptions);
        total(&self.work.prefix_queried, counts.prefix.queried);
        total(&self.work.prefix_cached, counts.prefix.cached);
        if let Some(served) = self.served.get() {
            let used = served.blocks.saturating_sub(counts.blocks_free);
            self.blocks_used.set(used as i64);
            self.kv_usage.set(used as f64 / served.blocks.max(1) as f64);
        }
        if let Progress::Worked { prefill_tokens, decode_tokens } = progress {
            self.work.step_tokens.observe((prefill_tokens + decode_tokens) as f64);
            self.steps.inc();
            self.step_seconds.inc_by(took.as_secs_f64());
            self.prefill.inc_by(*prefill_tokens as u64);
        }
    }

    /// So much time passed on the engine's thread, not waiting for requests.
    pub(crate) fn worked(&self, time: Duration) {
        self.worker_seconds.inc_by(time.as_secs_f64());
    }

    /// A step brought a request `tokens` tokens.
    pub(crate) fn tokens(&self, tokens: usize, brought: Brought) {
        self.generated.inc_by(tokens as u64);
        match brought {
            Brought::First { prompt_tokens, wait } => {
                self.prompt.inc_by(prompt_tokens as u64);
                self.first_token.observe(wait.as_secs_f64());
            }
            Brought::Later { wait } => self.between.observe(wait.as_secs_f64()),
        }
    }

    /// A request ended. Times and lengths are told of those that came to their own end.
    pub(crate) fn ended(&self, end: &Ended<'_>) {
        let reason = match end.reason {
            Some(FinishReason::Stop) => 0,
            Some(FinishReason::Length) => 1,
            Some(FinishReason::Cancelled) => 2,
            None => 3,
        };
        self.ended[reason].inc();
        if reason < 2 {
            self.whole.observe(end.lasted.as_secs_f64());
            self.prompts.observe(end.prompt_tokens as f64);
            self.generations.observe(end.tokens as f64);
            self.spans.book(end);
        }
        let at = self.served.get().map_or(&[][..], |served| &served.accepted_at);
        self.speculation.book(&end.speculation, end.accepted_in, at);
    }

    /// What drafts are worth by now.
    pub(crate) fn verdict(&self, verdict: &Verdict) {
        let Speculation { break_even, measured, speedup, .. } = &self.speculation;
        break_even.set(verdict.break_even.unwrap_or(f64::NAN));
        measured.set(verdict.measured.unwrap_or(f64::NAN));
        speedup.set(verdict.expected_speedup.unwrap_or(f64::NAN));
    }

    /// A request was answered with `status`.
    pub(crate) fn answered(&self, status: StatusCode) {
        if status.is_client_error() || status.is_server_error() {
            let is = |(code, _): &(u16, &str)| *code == status.as_u16();
            let at = REFUSALS.iter().position(is).unwrap_or(REFUSALS.len() - 1);
            self.refused[at].inc();
        }
    }

    /// All that is known in the text format of Prometheus.
    pub(crate) fn text(&self) -> anyhow::Result<String> {
        let mut families = self.registry.gather();
        families.retain(|f| !f.get_metric().iter().any(|m| m.get_gauge().get_value().is_nan()));
        if let Some(served) = self.served.get() {
            families = aliases::with_aliases(families, &served.name);
        }
        Ok(TextEncoder::new().encode_to_string(&families)?)
    }
}

impl Work {
    fn new(make: &Make) -> anyhow::Result<Self> {
        Ok(Self {
            step_tokens: make.histogram(
                "step_tokens",
                "Tokens that a step computed of prompts or generated",
                &TOKENS,
            )?,
            prefix_queried: make.counter(
                "prefix_queried_tokens_total",
                "Tokens of new requests that were looked for among those computed before",
            )?,
            prefix_cached: make
                .counter("prefix_cached_tokens_total", "Of these, tokens that were found")?,
        })
    }
}

impl Spans {
    fn new(make: &Make) -> anyhow::Result<Self> {
        let span = |name: &str, help: &str| {
            make.histogram(&format!("request_{name}_seconds"), help, &SECONDS)
        };
        Ok(Self {
            waiting: span("queue", "From a request's arrival until it got a place")?,
            prefill: span("prefill", "From a request's place to its first token")?,
            decode: span("decode", "From a request's first token to its last")?,
            computed: span("inference", "From a request's place to its last token")?,
            a_token: make.histogram(
                "request_time_per_token_seconds",
                "Mean time of a request's tokens after its first",
                &SHORT_SECONDS,
            )?,
        })
    }

    fn book(&self, end: &Ended<'_>) {
        let &Ended { waited, first, lasted, tokens, .. } = end;
        let observe = |span: &Histogram, from: Duration, to: Duration| {
            span.observe(to.saturating_sub(from).as_secs_f64());
        };
        observe(&self.waiting, Duration::ZERO, waited);
        observe(&self.prefill, waited, first);
        observe(&self.decode, first, lasted);
        observe(&self.computed, waited, lasted);
        let more = tokens.saturating_sub(1).max(1) as f64;
        self.a_token.observe(lasted.saturating_sub(first).as_secs_f64() / more);
    }
}

impl Speculation {
    fn new(make: &Make) -> anyhow::Result<Self> {
        let at = Opts::new(
            "foretoken_accepted_tokens_by_position_total",
            "Proposed tokens that were accepted, by their place in their draft from 0",
        );
        let unknown = |name: &str, help: &str| -> anyhow::Result<Gauge> {
            let gauge = make.share(name, help)?;
            gauge.set(f64::NAN);
            Ok(gauge)
        };
        Ok(Self {
            drafts: make.counter(
                "drafts_total",
                "Steps of requests in which proposed tokens were verified, of ended requests",
            )?,
            drafted: make
                .counter("draft_tokens_total", "Tokens proposed for requests that ended")?,
            accepted: make
                .counter("accepted_tokens_total", "Of these, tokens that were accepted")?,
            accepted_at: make.add(IntCounterVec::new(at, &["position"]))?,
            break_even: unknown(
                "break_even_acceptance",
                "Acceptance from which on drafting is faster than not, by measured costs",
            )?,
            measured: unknown("measured_acceptance", "Acceptance so far")?,
            speedup: unknown(
                "expected_speedup_ratio",
                "Speed-up over plain decoding at the measured acceptance",
            )?,
        })
    }

    fn book(&self, counts: &SpeculationCounts, accepted_in: &[u64], at: &[IntCounter]) {
        self.drafts.inc_by(counts.cycles);
        self.drafted.inc_by(counts.drafted_tokens);
        self.accepted.inc_by(counts.accepted_tokens);
        // A cycle that accepted k tokens accepted those at the first k places.
        for (place, counter) in at.iter().enumerate() {
            counter.inc_by(accepted_in.iter().skip(place + 1).sum());
        }
    }
}

/// Makes counters that a registry knows.
struct Make(Registry);

impl Make {
    fn add<C: Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> anyhow::Result<C> {
        let made = made?;
        self.0.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn gauge(&self, name: &str, help: &str) -> anyhow::Result<IntGauge> {
        self.add(IntGauge::new(format!("foretoken_{name}"), help))
    }

    fn share(&self, name: &str, help: &str) -> anyhow::Result<Gauge> {
        self.add(Gauge::new(format!("foretoken_{name}"), help))
    }

    fn counter(&self, name: &str, help: &str) -> anyhow::Result<IntCounter> {
        self.add(IntCounter::new(format!("foretoken_{name}"), help))
    }

    fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> anyhow::Result<Histogram> {
        let options = HistogramOpts::new(format!("foretoken_{name}"), help);
        self.add(Histogram::with_opts(options.buckets(bounds.to_vec())))
    }

    /// A counter for each of the label's values.
    fn labelled(&self, of: Opts, label: &str, values: &[&str]) -> anyhow::Result<Vec<IntCounter>> {
        let all = self.add(IntCounterVec::new(of, &[label]))?;
        Ok(values.iter().map(|value| all.with_label_values(&[value])).collect())
    }
}
