//! Whole steps of the demo pair, cache-resident: `step/{model}/{part}`, throughput in bytes that
//! must move, then the overhead: what a step takes beyond reading its bytes.
//!
//! `runner` is the forward pass alone at depth 256; `engine` adds scheduling and the greedy choice.
//! The overhead's bytes (weights and KV) count at the rate at which one thread reads as many bytes
//! again and again, measured in turns with the steps; least times count, since other programs can
//! only add to them. One thread: so small a model gets no more by default.

#![allow(missing_docs, clippy::print_stdout)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use engine::engine::{Engine, EngineConfig, Progress};
use engine::files::ModelFiles;
use engine::forward;
use engine::kv::{BLOCK_LEN, PrefixCaching};
use engine::model::Model;
use engine::request::{Event, Request};
use kernels::cpu::{CpuBackend, CpuOptions};
use kernels::program::{BlockId, Program, TokenId};
use kernels::{Backend, BlockTables, Runner, StepInput, StepLimits, StepOutput};
use std::hint::black_box;
use std::time::{Duration, Instant};

const MODELS: [&str; 2] = ["draft", "verifier"];
/// Tokens before the one that a step of the runner computes.
const DEPTH: usize = 256;
/// Tokens that a sequence of the engine gets after a prompt of one.
const TOKENS: u32 = 2 * DEPTH as u32;

fn open(name: &str) -> Model {
    let folder = format!("{}/../server/demo/{name}", env!("CARGO_MANIFEST_DIR"));
    Model::open(ModelFiles::Folder(folder.into())).expect("a demo model")
}

fn build(model: &Model, limits: &StepLimits) -> Box<dyn Runner> {
    let options = CpuOptions { threads: Some(1), isa: None };
    let backend = CpuBackend::new(&options).expect("this machine's processor");
    backend.build(model.program(), &model.weights(), limits).expect("a demo model's runner")
}

/// Bytes that a token at [`DEPTH`] must read: weights, and the KV cache's f16.
fn bytes(program: &Program) -> usize {
    program.bytes_per_token() + 2 * program.kv_elements_per_token() * DEPTH
}

/// The forward pass of one token after [`DEPTH`] others.
struct Pass {
    runner: Box<dyn Runner>,
    output: StepOutput,
    blocks: Vec<BlockId>,
}

impl Pass {
    fn new(model: &Model) -> Self {
        let limits = forward::limits(DEPTH + 1, DEPTH);
        let mut runner = build(model, &limits);
        let filled = forward::logits(runner.as_mut(), &limits, &[TokenId(7); DEPTH]);
        filled.expect("logits of a filled cache");
        let blocks = (0..limits.blocks as u32).map(BlockId).collect();
        Self { runner, output: StepOutput::default(), blocks }
    }

    fn step(&mut self) {
        let length = DEPTH as u32 + 1;
        let input = StepInput {
            tokens: &[TokenId(7)],
            positions: &[length - 1],
            rope_lens: &[length],
            query_ends: &[1],
            context_lens: &[length],
            block_tables: BlockTables { blocks: &self.blocks, ends: &[self.blocks.len() as u32] },
            output_rows: &[0],
            draws: &[],
        };
        let done = self.runner.step(&input, &mut self.output);
        assert!(done.is_ok(), "{done:?}");
    }
}

/// An engine with one greedy sequence; the next begins where one ends.
struct Loop {
    engine: Engine,
    events: Vec<Event>,
}

impl Loop {
    fn new(model: &Model) -> Self {
        let config = EngineConfig {
            vocab: model.spec().vocab,
            context_len: model.spec().context_len,
            step_tokens: 1,
            max_sequences: 1,
            blocks: (TOKENS as usize + 1).div_ceil(BLOCK_LEN),
            block_len: BLOCK_LEN,
            max_waiting: 0,
            max_drafted: 0,
            max_scored: 0,
            prefix_caching: PrefixCaching::Off,
        };
        let runner = build(model, &config.step_limits());
        Self { engine: Engine::new(runner, config), events: vec![] }
    }

    fn step(&mut self) {
        self.events.clear();
        let mut progress = self.engine.step(&mut self.events);
        if matches!(progress, Ok(Progress::Idle)) {
            let request = Request::new(vec![TokenId(7)], TOKENS);
            self.engine.submit(request).expect("room for one request");
            progress = self.engine.step(&mut self.events);
        }
        assert!(matches!(progress, Ok(Progress::Worked { .. })), "{progress:?}");
    }

    /// Least seconds of the steps around [`DEPTH`] in one sequence; between two sequences before
    /// and after.
    fn least_near_depth(&mut self) -> f64 {
        let near = 16;
        let rest = TOKENS / 2 - near / 2;
        (0..rest).for_each(|_| self.step());
        let least = least_of(near, || self.step());
        (0..rest).for_each(|_| self.step());
        least
    }
}

fn steps(c: &mut Criterion) {
    for name in MODELS {
        let model = open(name);
        let (mut pass, mut engine) = (Pass::new(&model), Loop::new(&model));
        let mut group = c.benchmark_group(format!("step/{name}"));
        group.sample_size(20).warm_up_time(Duration::from_millis(300));
        group.measurement_time(Duration::from_secs(1));
        group.throughput(Throughput::Bytes(bytes(model.program()) as u64));
        let id = BenchmarkId::from_parameter;
        group.bench_function(id("runner"), |b| b.iter(|| pass.step()));
        group.bench_function(id("engine"), |b| b.iter(|| engine.step()));
        group.finish();
    }
}

/// Reads all words once, in streams that do not wait for each other.
fn read(words: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    for chunk in words.chunks_exact(16) {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

/// Least seconds of `times` runs of `work`.
fn least_of(times: u32, mut work: impl FnMut()) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..times {
        let start = Instant::now();
        work();
        least = least.min(start.elapsed().as_secs_f64());
    }
    least
}

/// Prints what a step takes beyond its bytes: least of `rounds` times, in turns.
fn overhead(name: &str, rounds: usize) {
    let model = open(name);
    let (mut pass, mut engine) = (Pass::new(&model), Loop::new(&model));
    let bytes = bytes(model.program());
    let words = vec![1u64; bytes / 8];
    let read = || {
        black_box(read(black_box(&words)));
    };
    let mut least = [f64::INFINITY; 3];
    for _ in 0..rounds {
        let times =
            [least_of(TOKENS, || pass.step()), engine.least_near_depth(), least_of(TOKENS, read)];
        least = std::array::from_fn(|i| least[i].min(times[i]));
    }
    let [pass, engine, read] = least;
    println!(
        "overhead/{name}: runner {:.0} us beyond the {:.0} us of its {:.2} MB at {:.0} GB/s; engine {:.0} us more",
        1e6 * (pass - read),
        1e6 * read,
        bytes as f64 / 1e6,
        bytes as f64 / read / 1e9,
        1e6 * (engine - pass),
    );
}

criterion_group!(benches, steps);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let filters = args.iter().filter(|arg| !arg.starts_with("--")).count();
    if filters == 0 || args.iter().any(|arg| arg == "overhead") {
        let rounds = if args.iter().any(|arg| arg == "--test") { 1 } else { 10 };
        MODELS.iter().for_each(|name| overhead(name, rounds));
    }
}
