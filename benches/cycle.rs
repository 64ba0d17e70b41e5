//! What a cycle costs beside its kernels: `cycle/{vocabulary}/{choice}/{sequences}/{drafter}`, a
//! cycle being a step of the engine with all drafting in it.
//!
//! Runners follow a script that costs a few nanoseconds a row (`runner` measures a step of as many
//! rows as any here has): their logits lie ready, and a step moves one likely token in each row it
//! is asked for. So a text repeats itself every [`PERIOD`] tokens, mostly: 9 of 10 times where
//! tokens are sampled. The other logits are normally distributed (deviation 3). A draft model is
//! as good as the verifier, so all its tokens are accepted, which is the most work for a cycle.
//!
//! Target: 20 us with three drafted tokens, greedy, one sequence, the vocabulary of the demo pair.

#![allow(missing_docs, clippy::print_stdout)]

use criterion::{Criterion, criterion_group};
use engine::engine::{Engine, EngineConfig};
use engine::kv::{BLOCK_LEN, PrefixCaching};
use engine::request::{Event, Request};
use engine::sampler::SamplingParams;
use engine::speculation::vocab::VocabMap;
use engine::speculation::{Costs, Curve, DraftCosts, DraftModel, Drafter, Length, LookupRule};
use engine::speculation::{Policy, Rule, Speculation};
use kernels::backend::RunnerMemory;
use kernels::program::{SlotId, TokenId};
use kernels::{BlockTables, Error, Runner, StepInput, StepOutput};
use std::time::{Duration, Instant};

/// Tokens after which the text repeats itself.
const PERIOD: u32 = 32;
/// Tokens of a prompt, which repeats itself already.
const PROMPT: u32 = 2 * PERIOD;
/// Tokens that follow it.
const TOKENS: u32 = 2048;
const TEMPERATURE: f32 = 0.8;
const MOST_DRAFTED: usize = 7;
const MOST_SEQUENCES: usize = 8;
/// Cycles timed at once.
const AT_ONCE: usize = 64;

/// Sums of twelve uniform numbers less their mean, times 3: near enough to normal.
fn normal(vocab: usize) -> Vec<f32> {
    let mut state = 7u64;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..vocab).map(|_| 3.0 * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0)).collect()
}

/// A runner whose logits after a token depend on that token alone.
struct Scripted {
    /// A row without its likely token.
    row_v: Vec<f32>,
    /// The logit that gives a token 9 of 10 parts of the mass.
    likely: f32,
    /// The likely token of each row of the output.
    tokens: Vec<usize>,
}

impl Scripted {
    fn new(vocab: usize) -> Self {
        let row_v = normal(vocab);
        let mass: f64 = row_v.iter().map(|x| f64::from(x / TEMPERATURE).exp()).sum();
        let likely = TEMPERATURE * (9.0 * mass).ln() as f32;
        Self { row_v, likely, tokens: Vec::new() }
    }
}

impl Runner for Scripted {
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
        let (rows, vocab) = (input.output_rows.len(), self.row_v.len());
        self.tokens.truncate(rows);
        output.logits.truncate(rows * vocab);
        while self.tokens.len() < rows {
            self.tokens.push(0);
            output.logits.extend_from_slice(&self.row_v);
        }
        let wanted = input.output_rows.iter().zip(&mut self.tokens);
        for ((&row, likely), logits_v) in wanted.zip(output.logits.chunks_exact_mut(vocab)) {
            logits_v[*likely] = self.row_v[*likely];
            *likely = ((input.tokens[row as usize].0 + 1) % PERIOD) as usize;
            logits_v[*likely] = self.likely;
        }
        Ok(())
    }

    fn read_slot(&mut self, _: SlotId, _: &mut Vec<f32>) -> Result<(), Error> {
        Err(Error::Input { reason: "a scripted runner has no slots".to_owned() })
    }

    fn memory(&self) -> RunnerMemory {
        RunnerMemory::default()
    }

    fn poison(&mut self, _: &[usize]) {}
}

/// Who drafts how many tokens.
#[derive(Clone, Copy)]
enum Way {
    Plain,
    Model(usize),
    /// As many as pay, by costs by which the most always do.
    Auto,
    Lookup(usize),
}

impl Way {
    const ALL: [(&str, Self); 7] = [
        ("plain", Self::Plain),
        ("model 1", Self::Model(1)),
        ("model 3", Self::Model(3)),
        ("model 7", Self::Model(7)),
        ("model auto", Self::Auto),
        ("lookup 3", Self::Lookup(3)),
        ("lookup 7", Self::Lookup(7)),
    ];

    fn most(self) -> usize {
        match self {
            Self::Plain => 0,
            Self::Auto => MOST_DRAFTED,
            Self::Model(tokens) | Self::Lookup(tokens) => tokens,
        }
    }

    fn speculation(self, config: &EngineConfig) -> Option<Speculation> {
        let model = || {
            let (limits, vocab) = (config.draft_limits(), config.vocab);
            let runner = Box::new(Scripted::new(vocab));
            let same = VocabMap::same(vocab, vocab);
            Drafter::Model(DraftModel::new(runner, &limits, same, config.context_len))
        };
        let (drafter, length) = match self {
            Self::Plain => return None,
            Self::Model(tokens) => (model(), Length::Fixed(tokens)),
            Self::Auto => {
                let policy = Policy::new(costs(), MOST_DRAFTED);
                (model(), Length::Auto(Box::new(policy)))
            }
            Self::Lookup(tokens) => (Drafter::Lookup(LookupRule::ALONE), Length::Fixed(tokens)),
        };
        Some(Speculation { drafter, length, rule: Rule::Coupled })
    }
}

/// A draft that costs a tenth of the verifier, whose rows are nearly free.
fn costs() -> Costs {
    let line = |one: f64, rows: f64| {
        let points = vec![(1, one), (1 + MOST_DRAFTED * MOST_SEQUENCES, one + rows)];
        Curve::new(points).expect("rising rows")
    };
    let draft = DraftCosts { step: line(1e-4, 1e-5), start: 0.0, prefill_token: 1e-6 };
    Costs { verify: line(1e-3, 1e-4), draft: Some(draft), lookup: 1e-6, token: 1e-6 }
}

/// An engine with some sequences; the next begin where all have ended.
struct Loop {
    engine: Engine,
    events: Vec<Event>,
    sequences: usize,
    drafts: bool,
    sampling: SamplingParams,
}

impl Loop {
    fn new(vocab: usize, temperature: f32, sequences: usize, way: Way) -> Self {
        let len = (PROMPT + TOKENS) as usize;
        let config = EngineConfig {
            vocab,
            context_len: PROMPT + TOKENS,
            step_tokens: sequences * PROMPT as usize,
            max_sequences: sequences,
            blocks: sequences * (len.div_ceil(BLOCK_LEN) + 1),
            block_len: BLOCK_LEN,
            max_waiting: 0,
            max_drafted: way.most(),
            max_scored: 0,
            prefix_caching: PrefixCaching::On { steady_len: u32::MAX },
        };
        let mut engine = Engine::new(Box::new(Scripted::new(vocab)), config);
        let drafting = way.speculation(&config);
        let drafts = drafting.is_some();
        if let Some(speculation) = drafting {
            engine = engine.with_speculation(speculation);
        }
        let sampling = SamplingParams { temperature, ..SamplingParams::default() };
        Self { engine, events: Vec::new(), sequences, drafts, sampling }
    }

    fn cycle(&mut self) {
        if self.engine.counts().open == 0 {
            self.begin();
        }
        let done = self.engine.step(&mut self.events);
        assert!(done.is_ok(), "{done:?}");
    }

    fn begin(&mut self) {
        for event in self.events.drain(..) {
            if let Event::Finished { speculation, .. } = event {
                let accepted = speculation.accepted_tokens;
                assert!(!self.drafts || 2 * accepted > u64::from(TOKENS) / 2, "{speculation:?}");
            }
        }
        for _ in 0..self.sequences {
            self.sampling.seed += 1;
            let prompt = (0..PROMPT).map(|i| TokenId(i % PERIOD)).collect();
            let sampling = self.sampling.clone();
            let request = Request { sampling, ..Request::new(prompt, TOKENS) };
            self.engine.submit(request).expect("room for all sequences");
        }
    }
}

/// Every case with its name.
fn cases() -> impl Iterator<Item = (String, Loop)> {
    let choices = [("greedy", 0.0), ("sampled", TEMPERATURE)];
    let groups = [4096, 32_000].into_iter().flat_map(move |vocab| {
        choices.into_iter().flat_map(move |choice| {
            [1, MOST_SEQUENCES].into_iter().map(move |sequences| (vocab, choice, sequences))
        })
    });
    groups.flat_map(|(vocab, (choice, temperature), sequences)| {
        Way::ALL.into_iter().map(move |(name, way)| {
            let name = format!("cycle/{vocab}/{choice}/{sequences}/{name}");
            (name, Loop::new(vocab, temperature, sequences, way))
        })
    })
}

fn cycles(c: &mut Criterion) {
    let mut group = c.benchmark_group("all");
    group.sample_size(20).warm_up_time(Duration::from_millis(200));
    group.measurement_time(Duration::from_millis(600));
    for (name, mut engine) in cases() {
        group.bench_function(name, |b| b.iter(|| engine.cycle()));
    }
    group.finish();
}

/// Prints the least mean of [`AT_ONCE`] cycles, which other programs disturb least.
fn least(budget: Duration) {
    for (name, mut engine) in cases() {
        let (mut least, begin) = (f64::INFINITY, Instant::now());
        while least == f64::INFINITY || begin.elapsed() < budget {
            let start = Instant::now();
            (0..AT_ONCE).for_each(|_| engine.cycle());
            // Some sequences may have ended before others.
            if engine.engine.counts().open == engine.sequences {
                least = least.min(start.elapsed().as_secs_f64() / AT_ONCE as f64);
            }
        }
        println!("least of {name}: {:.1} us", 1e6 * least);
    }
}

/// A step of the script itself, which is no part of the engine's time.
fn runner(c: &mut Criterion) {
    let rows = MOST_SEQUENCES * (1 + MOST_DRAFTED);
    let (mut runner, mut output) = (Scripted::new(4096), StepOutput::default());
    let indices: Vec<u32> = (0..rows as u32).collect();
    let input = StepInput {
        tokens: &vec![TokenId(3); rows],
        positions: &indices,
        rope_lens: &indices,
        query_ends: &[rows as u32],
        context_lens: &[rows as u32],
        block_tables: BlockTables { blocks: &[], ends: &[0] },
        output_rows: &indices,
        draws: &[],
    };
    c.bench_function(&format!("cycle/runner/{rows} rows"), |b| {
        b.iter(|| runner.step(&input, &mut output));
    });
}

criterion_group!(benches, cycles, runner);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let filters = args.iter().filter(|arg| !arg.starts_with("--")).count();
    if filters == 0 || args.iter().any(|arg| arg == "least") {
        let test = args.iter().any(|arg| arg == "--test");
        least(Duration::from_millis(if test { 1 } else { 500 }));
    }
}
