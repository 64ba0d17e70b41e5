//! Measures what steps cost on this machine, for the automatic draft length.
//!
//! Input: the very runners that will be used, before their first request; whatever their KV
//! memory holds afterwards is dead, since no sequence has computed anything. A measurement is
//! kept on disk (see [`cache`]). Not here: what follows from the costs
//! ([`engine::speculation::policy`]).

mod cache;

use crate::bench::machine;
use crate::cli::{DeviceArgs, DeviceName};
use crate::load::{self, Unexpected};
use anyhow::Context;
use cache::{Key, cached};
use engine::engine::EngineConfig;
use engine::sampler::{History, Sampler, SamplingParams};
use engine::speculation::{Costs, Curve, DraftCosts};
use kernels::cpu::Isa;
use kernels::program::{BlockId, TokenId};
use kernels::{BlockTables, Program, Runner, StepInput, StepLimits, StepOutput};
use std::time::{Duration, Instant};

/// Rows at which a verifier is measured, as far as its limits and the draft length go.
const ROWS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];
/// The same for a verifier that is slow.
const ROWS_OF_SLOW: [usize; 5] = [1, 2, 4, 8, 16];
/// Position of the first row of a measured step: a moderate context.
const DEPTH: usize = 128;
/// Tokens of the chunk by which a draft model's prefill is measured.
const CHUNK: usize = 64;
/// Time that the repeated rounds should take in all.
const BUDGET: Duration = Duration::from_millis(200);
/// Most rounds; more find nothing new.
const ROUNDS: usize = 7;

/// A model to measure.
#[allow(missing_debug_implementations, reason = "a runner has nothing to print")]
pub(crate) struct Subject<'a> {
    /// What it computes.
    pub(crate) program: &'a Program,
    /// Built for the limits that the engine's configuration gives.
    pub(crate) runner: &'a mut dyn Runner,
}

/// The costs of a verifier and, if there is one, its draft model on the device of `args`: those
/// that an earlier run kept on disk, or else measured now (see [`measure`]) and kept. If they
/// cannot be kept, which is no error, `say` gets the reason.
///
/// # Errors
/// Those of the runners.
pub(crate) fn costs(
    verifier: Subject<'_>,
    draft: Option<Subject<'_>>,
    config: &EngineConfig,
    args: &DeviceArgs,
    say: impl FnOnce(&str),
) -> anyhow::Result<Costs> {
    let programs = (verifier.program, draft.as_ref().map(|d| d.program));
    let key = Key::new(programs.0, programs.1, config, &machine_name(args));
    cached(&key, || measure(verifier, draft, config), say)
}

/// Everything about the machine that a step's time depends on.
fn machine_name(args: &DeviceArgs) -> String {
    let (cpu, threads) = (machine::cpu_name(), load::threads(args));
    match args.device {
        DeviceName::Reference => format!("{cpu}, reference"),
        DeviceName::Cuda(number) => format!("{cpu}, {}", cuda_name(number)),
        DeviceName::Cpu => {
            let isa = args.cpu_isa.map_or_else(Isa::best, load::isa);
            format!("{cpu}, {isa}, {threads} threads")
        }
    }
}

/// The GPU's name; without one nothing is measured.
fn cuda_name(number: usize) -> String {
    let devices = kernels::cuda::devices().unwrap_or_default();
    devices.into_iter().nth(number).map_or_else(|| format!("cuda:{number}"), |device| device.name)
}

/// Measures a verifier (built for [`EngineConfig::step_limits`]) and, if there is one, its draft
/// model (built for [`EngineConfig::draft_limits`]).
///
/// Rounds over all sizes of steps, so that a slow moment meets all of them; the lower quartile of each.
/// Steps follow each other as in use, since each model drives the other out of the caches: one row
/// after one row, several rows after a draft. Takes about 0.2 s, and for a large model the time of
/// some twelve steps of the verifier.
///
/// # Errors
/// Those of the runners.
pub(crate) fn measure(
    verifier: Subject<'_>,
    draft: Option<Subject<'_>>,
    config: &EngineConfig,
) -> anyhow::Result<Costs> {
    let mut verifier = Steps::new(verifier, config.step_limits(), config.context_len);
    let mut draft = draft.map(|d| Drafting::new(d, config)).transpose()?;
    // The first step touches the weights' pages and starts threads.
    let first = verifier.step(1)?.min(verifier.step(1)?);
    let mut verified = Samples::new(verifier_rows(config, &verifier, first));
    let start = Instant::now();
    for round in 0..ROUNDS {
        for i in 0..verified.rows.len() {
            match (verified.rows[i], &mut draft) {
                (1, _) | (_, None) => drop(verifier.step(1)?),
                (_, Some(draft)) => draft.round()?,
            }
            verified.step(i, &mut verifier)?;
        }
        // The second round is there so that one interruption is not believed.
        if round > 0 && start.elapsed() * (round as u32 + 2) / (round as u32 + 1) > BUDGET {
            break;
        }
    }
    let token = sampling_time(&verifier.output.logits, verifier.vocab);
    let draft = draft.map(|d| d.costs(token)).transpose()?;
    Ok(Costs { verify: verified.curve(0.0)?, draft, lookup: LOOKUP, token })
}

/// A draft model being measured.
struct Drafting<'a> {
    steps: Steps<'a>,
    /// Of a row right after the verifier.
    first: Samples,
    /// After a step of its own, by rows.
    later: Samples,
    prefill: Samples,
    rounds: usize,
}

impl<'a> Drafting<'a> {
    fn new(draft: Subject<'a>, config: &EngineConfig) -> anyhow::Result<Self> {
        let mut steps = Steps::new(draft, config.draft_limits(), config.context_len);
        steps.step(1)?;
        let (first, later) = (Samples::new(vec![1]), Samples::new(draft_rows(config, &steps)));
        let prefill = Samples::new(vec![CHUNK.min(steps.most())]);
        Ok(Self { steps, first, later, prefill, rounds: 0 })
    }

    /// What happens between two steps of the verifier: a step and another one, which is in turn
    /// of each number of rows and a chunk of prefill.
    fn round(&mut self) -> anyhow::Result<()> {
        let sizes = self.later.rows.len() + 1;
        let turn = self.rounds % sizes;
        self.rounds += 1;
        if turn + 1 == sizes {
            // Before the others: a chunk drives more out of the caches than a step.
            self.prefill.step(0, &mut self.steps)?;
            return self.later.step(0, &mut self.steps);
        }
        self.first.step(0, &mut self.steps)?;
        self.later.step(turn, &mut self.steps)
    }

    /// What was measured, with `token` more seconds for each token chosen.
    fn costs(mut self, token: f64) -> anyhow::Result<DraftCosts> {
        // Too few rounds for every size leave some without a time.
        while self.rounds < self.later.rows.len() + 1 {
            self.round()?;
        }
        let start = (self.first.seconds(0) - self.later.seconds(0)).max(0.0);
        let prefill_token = self.prefill.seconds(0) / self.prefill.rows[0] as f64;
        Ok(DraftCosts { step: self.later.curve(token)?, start, prefill_token })
    }
}

/// A lookup is a few reads in tables that caches hold: below what a clock shows.
const LOOKUP: f64 = 1e-6;

/// Steps slower than this are measured at fewer rows.
const SLOW: Duration = Duration::from_millis(4);

fn verifier_rows(config: &EngineConfig, steps: &Steps<'_>, first: Duration) -> Vec<usize> {
    let longest = (1 + config.max_drafted).min(steps.most()).min(steps.limits.outputs);
    let all = if first > SLOW { &ROWS_OF_SLOW[..] } else { &ROWS[..] };
    let mut rows: Vec<usize> = all.iter().copied().filter(|&m| m < longest).collect();
    rows.push(longest.min(ROWS[ROWS.len() - 1]));
    rows.dedup();
    rows
}

fn draft_rows(config: &EngineConfig, steps: &Steps<'_>) -> Vec<usize> {
    let most = config.max_sequences.min(steps.most()).max(1);
    [1, 2, 4, 8, 16].into_iter().filter(|&m| m <= most).collect()
}

/// Seconds to choose a token from the first row of `logits`; the least of three.
fn sampling_time(logits: &[f32], vocab: usize) -> f64 {
    let Some(logits_v) = logits.get(..vocab) else { return 0.0 };
    let (mut sampler, params) = (Sampler::default(), SamplingParams::default());
    let time = |position| {
        let start = Instant::now();
        let chosen = sampler.sample(logits_v, &History::default(), &params, position);
        // Which token it is does not matter, nor whether there is one.
        let _ = std::hint::black_box(chosen);
        start.elapsed()
    };
    (0..3).map(time).min().unwrap_or_default().as_secs_f64()
}

/// Times of steps of several sizes.
struct Samples {
    rows: Vec<usize>,
    times: Vec<Vec<Duration>>,
}

impl Samples {
    fn new(rows: Vec<usize>) -> Self {
        let times = vec![Vec::with_capacity(ROUNDS); rows.len()];
        Self { rows, times }
    }

    /// Runs a step of size `i`.
    fn step(&mut self, i: usize, steps: &mut Steps<'_>) -> anyhow::Result<()> {
        self.times[i].push(steps.step(self.rows[i])?);
        Ok(())
    }

    /// Seconds of size `i`: the lower quartile, since what disturbs a step only adds.
    fn seconds(&mut self, i: usize) -> f64 {
        let times = &mut self.times[i];
        times.sort_unstable();
        times.get(times.len().saturating_sub(1) / 4).map_or(0.0, Duration::as_secs_f64)
    }

    /// All sizes, with `row` more seconds for each row. Fewer rows never cost more than more rows:
    /// where they seem to, something disturbed them in every round.
    fn curve(&mut self, row: f64) -> anyhow::Result<Curve> {
        let mut least = f64::INFINITY;
        let mut points = Vec::with_capacity(self.rows.len());
        for i in (0..self.rows.len()).rev() {
            // A clock may be too coarse for a step.
            let seconds = self.seconds(i) + row * self.rows[i] as f64;
            least = least.min(seconds.max(1e-9));
            points.push((self.rows[i], least));
        }
        points.reverse();
        Curve::new(points).context("no step could be measured").context(Unexpected)
    }
}

/// Steps of one sequence over a runner's first blocks.
struct Steps<'a> {
    runner: &'a mut dyn Runner,
    vocab: usize,
    limits: StepLimits,
    /// Positions that there are blocks and context for.
    positions: usize,
    output: StepOutput,
}

impl<'a> Steps<'a> {
    fn new(subject: Subject<'a>, limits: StepLimits, context_len: u32) -> Self {
        let Subject { program, runner } = subject;
        let vocab = program.slots[program.logits.index()].width;
        let positions = limits.blocks.saturating_mul(limits.block_len).min(context_len as usize);
        Self { runner, vocab, limits, positions, output: StepOutput::default() }
    }

    /// Most rows of a step.
    fn most(&self) -> usize {
        self.limits.tokens.min(self.positions).max(1)
    }

    /// The time of a step of `rows` rows after [`DEPTH`] positions, or as many as there are. As
    /// many rows as the limits allow give logits.
    fn step(&mut self, rows: usize) -> anyhow::Result<Duration> {
        let start = DEPTH.min(self.positions - rows) as u32;
        let end = start + rows as u32;
        // Any tokens; different ones, so that no row of the embedding is read twice.
        let tokens: Vec<TokenId> =
            (0..rows).map(|i| TokenId((i * 7919 % self.vocab) as u32)).collect();
        let blocks = (end as usize).div_ceil(self.limits.block_len) as u32;
        let outputs = rows.min(self.limits.outputs) as u32;
        let input = StepInput {
            tokens: &tokens,
            positions: &(start..end).collect::<Vec<_>>(),
            rope_lens: &vec![end; rows],
            query_ends: &[rows as u32],
            context_lens: &[end],
            block_tables: BlockTables {
                blocks: &(0..blocks).map(BlockId).collect::<Vec<_>>(),
                ends: &[blocks],
            },
            output_rows: &(rows as u32 - outputs..rows as u32).collect::<Vec<_>>(),
            draws: &[],
        };
        let start = Instant::now();
        self.runner.step(&input, &mut self.output).context(Unexpected)?;
        Ok(start.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load;
    use engine::kv::{BLOCK_LEN, PrefixCaching};
    use engine::model::Head;

    fn config(positions: usize, max_drafted: usize) -> EngineConfig {
        EngineConfig {
            vocab: 0,
            context_len: 512,
            step_tokens: 64,
            max_sequences: 2,
            blocks: positions.div_ceil(BLOCK_LEN),
            block_len: BLOCK_LEN,
            max_waiting: 1,
            max_drafted,
            max_scored: 0,
            prefix_caching: PrefixCaching::Off,
        }
    }

    /// Measures the built-in pair.
    fn demo(config: &EngineConfig) -> (Costs, Duration) {
        let args =
            DeviceArgs { device: DeviceName::Cpu, threads: Some(1), cpu_isa: None, head: None };
        let backend = load::backend(&args).unwrap();
        let models = ["demo", "demo-draft"].map(|name| load::open(name, Head::Auto).unwrap());
        let limits = [config.step_limits(), config.draft_limits()];
        let build = |i: usize| {
            let model: &engine::model::Model = &models[i];
            backend.build(model.program(), &model.weights(), &limits[i]).unwrap()
        };
        let (mut verifier, mut draft) = (build(0), build(1));
        let verifier = Subject { program: models[0].program(), runner: verifier.as_mut() };
        let draft = Subject { program: models[1].program(), runner: draft.as_mut() };
        let start = Instant::now();
        (measure(verifier, Some(draft), config).unwrap(), start.elapsed())
    }

    #[test]
    fn the_demo_pair_is_measured_up_to_the_draft_length() {
        let (costs, took) = demo(&config(400, 8));
        println!("{costs:?} in {took:?}");
        let rows: Vec<usize> = costs.verify.points().iter().map(|p| p.0).collect();
        assert_eq!(rows, [1, 2, 3, 4, 6, 8, 9]);
        let draft = costs.draft.unwrap();
        let rows: Vec<usize> = draft.step.points().iter().map(|p| p.0).collect();
        assert_eq!(rows, [1, 2]);
        // Sixteen rows of work against one; noise of a busy machine is far smaller.
        assert!(costs.verify.seconds(9) > costs.verify.seconds(1));
        assert!(draft.prefill_token > 0.0 && costs.token > 0.0);
    }

    #[test]
    fn what_was_disturbed_in_every_round_is_no_peak() {
        let mut samples = Samples::new(vec![1, 2, 4]);
        let times = [[5, 3, 9], [80, 90, 70], [8, 7, 60]];
        samples.times = times.map(|t| t.map(Duration::from_secs).to_vec()).to_vec();
        let curve = samples.curve(0.5).unwrap();
        assert_eq!(curve.points(), [(1, 3.5), (2, 9.0), (4, 9.0)]);
    }

    #[test]
    fn little_memory_for_keys_and_values_limits_the_rows() {
        let costs = demo(&config(1, 0)).0;
        assert_eq!(costs.verify.points().len(), 1);
        let tight = demo(&EngineConfig { step_tokens: 3, ..config(20, 30) }).0;
        let rows: Vec<usize> = tight.verify.points().iter().map(|p| p.0).collect();
        assert_eq!(rows, [1, 2, 3]);
    }
}
