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
use kernels::{BlockTables, Draw, Error, Program, Runner, StepInput, StepLimits, StepOutput};
use std::time::{Duration, Instant};

/// Rows at which a verifier is measured, as far as its limits and the draft length go.
const ROWS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];
/// The same for a verifier that is slow.
const ROWS_OF_SLOW: [usize; 5] = [1, 2, 4, 8, 16];
/// Position of the first row of a measured step: a moderate context.
const DEPTH: usize = 128;
/// Tokens of the chunk by which a draft model's prefill is measured.
const CHUNK: usize = 64;
/// Steps that follow each other on the device, by which another one of them is measured.
const CHAIN: usize = 4;
/// Time that the repeated rounds should take in all.
const BUDGET: Duration = Duration::from_millis(200);
/// Most rounds: with 7 the time of two rows against one went from 1.15 to 1.51, with these it stays within
/// a tenth while the machine keeps its pace.
const ROUNDS: usize = 32;

/// A model to measure.
#[allow(missing_debug_implementations, reason = "a runner has nothing to print")]
pub(crate) struct Subject<'a> {
    /// What it computes.
    pub(crate) program: &'a Program,
    /// Built for the limits that the engine's configuration gives.
    pub(crate) runner: &'a mut dyn Runner,
}

/// A draft model to measure.
#[allow(missing_debug_implementations, reason = "a runner has nothing to print")]
pub(crate) struct DraftSubject<'a> {
    /// The model.
    pub(crate) model: Subject<'a>,
    /// Whether its ids are the verifier's: only then may its steps follow each other on the device.
    pub(crate) same_ids: bool,
}

/// The costs of a verifier and, if there is one, its draft model on the device of `args`: those
/// that an earlier run kept on disk, or else measured now (see [`measure`]) and kept. If they
/// cannot be kept, which is no error, `say` gets the reason.
///
/// # Errors
/// Those of the runners.
pub(crate) fn costs(
    verifier: Subject<'_>,
    draft: Option<DraftSubject<'_>>,
    config: &EngineConfig,
    args: &DeviceArgs,
    say: impl FnOnce(&str),
) -> anyhow::Result<Costs> {
    let drafting = draft.as_ref().map(|d| (d.model.program, d.same_ids));
    let key = Key::new(verifier.program, drafting, config, &machine_name(args));
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
/// after one row, several rows after a draft. Where a draft's steps can follow each other on the
/// device, one more of them costs what it adds to such a chain. Takes about 0.2 s, and for a large
/// model the time of some twelve steps of the verifier.
///
/// # Errors
/// Those of the runners.
pub(crate) fn measure(
    verifier: Subject<'_>,
    draft: Option<DraftSubject<'_>>,
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
    let token = sampling_time(&verifier.output, verifier.vocab);
    let draft = draft.map(|d| d.costs(token)).transpose()?;
    let verify = curve(&verified.rows, &verified.all(), 0.0)?;
    Ok(Costs { verify, draft, lookup: LOOKUP, token })
}

/// A draft model being measured.
struct Drafting<'a> {
    steps: Steps<'a>,
    same_ids: bool,
    /// Of a row right after the verifier.
    first: Samples,
    /// After a step of its own, by rows.
    later: Samples,
    /// Of [`CHAIN`] steps that follow each other, by rows; without times where there are none.
    chains: Samples,
    prefill: Samples,
    rounds: usize,
}

impl<'a> Drafting<'a> {
    fn new(draft: DraftSubject<'a>, config: &EngineConfig) -> anyhow::Result<Self> {
        let DraftSubject { model, same_ids } = draft;
        let mut steps = Steps::new(model, config.draft_limits(), config.context_len);
        steps.step(1)?;
        let [later, chains] = [(); 2].map(|()| Samples::new(draft_rows(config, &steps)));
        let first = Samples::new(vec![1]);
        let prefill = Samples::new(vec![CHUNK.min(steps.most())]);
        Ok(Self { steps, same_ids, first, later, chains, prefill, rounds: 0 })
    }

    /// What happens between two steps of the verifier: a step and another one, which is in turn
    /// of each number of rows, with a chain of such steps, and a chunk of prefill.
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
        self.later.step(turn, &mut self.steps)?;
        if self.same_ids {
            self.chains.chain(turn, &mut self.steps)?;
        }
        Ok(())
    }

    /// What was measured, with `token` more seconds for each token chosen.
    fn costs(mut self, token: f64) -> anyhow::Result<DraftCosts> {
        // Too few rounds for every size leave some without a time.
        while self.rounds < self.later.rows.len() + 1 {
            self.round()?;
        }
        let (steps, token) = match self.chained() {
            // The device has chosen the tokens.
            Some(steps) => (steps, 0.0),
            None => (self.later.all(), token),
        };
        let start = (self.first.seconds(0) - steps[0]).max(0.0);
        let prefill_token = self.prefill.seconds(0) / self.prefill.rows[0] as f64;
        Ok(DraftCosts { step: curve(&self.later.rows, &steps, token)?, start, prefill_token })
    }

    /// Seconds of one more step in a chain, by rows; none where there are no chains. A step by itself
    /// is waited for as a chain is, once, so the difference holds no wait.
    fn chained(&self) -> Option<Vec<f64>> {
        let is_offered = self.chains.times.iter().all(|times| !times.is_empty());
        let (chains, singles) = (self.chains.all(), self.later.all());
        let more = |(chain, single): (f64, f64)| ((chain - single) / (CHAIN - 1) as f64).max(0.0);
        is_offered.then(|| chains.into_iter().zip(singles).map(more).collect())
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

/// Seconds to choose a token from the first row of logits, the least of three; none where the runner
/// chooses by itself.
fn sampling_time(output: &StepOutput, vocab: usize) -> f64 {
    if output.chosen.first().is_some_and(Option::is_some) {
        return 0.0;
    }
    let Some(logits_v) = output.logits.get(..vocab) else { return 0.0 };
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

    /// Runs a chain of steps of size `i`, if the runner offers it.
    fn chain(&mut self, i: usize, steps: &mut Steps<'_>) -> anyhow::Result<()> {
        self.times[i].extend(steps.chain(self.rows[i])?);
        Ok(())
    }

    /// Seconds of size `i`: the lower quartile, since what disturbs a step only adds.
    fn seconds(&self, i: usize) -> f64 {
        let mut times = self.times[i].clone();
        times.sort_unstable();
        times.get(times.len().saturating_sub(1) / 4).map_or(0.0, Duration::as_secs_f64)
    }

    /// Seconds of all sizes.
    fn all(&self) -> Vec<f64> {
        (0..self.rows.len()).map(|i| self.seconds(i)).collect()
    }
}

/// A curve through the seconds of these sizes, with `row` more for each row. Fewer rows never cost
/// more than more rows: where they seem to, something disturbed them in every round.
fn curve(rows: &[usize], seconds: &[f64], row: f64) -> anyhow::Result<Curve> {
    let mut least = f64::INFINITY;
    let mut points = Vec::with_capacity(rows.len());
    for (&rows, &seconds) in rows.iter().zip(seconds).rev() {
        // A clock may be too coarse for a step.
        least = least.min((seconds + row * rows as f64).max(1e-9));
        points.push((rows, least));
    }
    points.reverse();
    Curve::new(points).context("no step could be measured").context(Unexpected)
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

    /// The time of a step of `rows` rows.
    fn step(&mut self, rows: usize) -> anyhow::Result<Duration> {
        let step = self.time(rows, |runner, input, output| runner.step(input, output))?;
        Ok(step.1)
    }

    /// The time of [`CHAIN`] steps of `rows` rows that follow each other, no more than the limits
    /// allow outputs; none where the runner does not offer it.
    fn chain(&mut self, rows: usize) -> anyhow::Result<Option<Duration>> {
        let (is_offered, time) = self.time(rows, |runner, input, _| chain(runner, input))?;
        Ok(is_offered.then_some(time))
    }

    /// What `run` gives, and its time, for a step of `rows` rows after [`DEPTH`] positions, or as many
    /// as there are. As many rows as the limits allow give logits.
    fn time<T>(
        &mut self,
        rows: usize,
        run: impl FnOnce(&mut dyn Runner, &StepInput<'_>, &mut StepOutput) -> Result<T, Error>,
    ) -> anyhow::Result<(T, Duration)> {
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
            draws: &vec![Some(Draw::GREEDY); outputs as usize],
        };
        let start = Instant::now();
        let done = run(&mut *self.runner, &input, &mut self.output).context(Unexpected)?;
        Ok((done, start.elapsed()))
    }
}

/// Asks for [`CHAIN`] steps like `input`, and waits for them; whether that is offered.
fn chain(runner: &mut dyn Runner, input: &StepInput<'_>) -> Result<bool, Error> {
    for k in 0..CHAIN {
        if !runner.ask(input, k > 0)? {
            return Ok(false);
        }
    }
    runner.answers(&mut vec![])?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load;
    use engine::kv::{BLOCK_LEN, PrefixCaching};
    use engine::model::Head;
    use kernels::Backend;
    use kernels::backend::RunnerMemory;
    use kernels::program::SlotId;

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

    /// A runner that is asked for steps and computes them at once.
    struct Asked {
        inner: Box<dyn Runner>,
        is_offered: bool,
        /// Rows of the last step, and of all in the chain.
        rows: usize,
        kept: usize,
        /// Rows of each chain whose answers were fetched.
        chains: Vec<usize>,
    }

    impl Runner for Asked {
        fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
            self.inner.step(input, output)
        }

        fn ask(&mut self, input: &StepInput<'_>, follows: bool) -> Result<bool, Error> {
            let rows = input.output_rows.len();
            assert!(rows > 0 && input.draws.iter().flatten().count() == rows, "each has a draw");
            assert!(!follows || input.tokens.len() == self.rows, "each token is a chosen one");
            self.kept = if follows { self.kept + rows } else { rows };
            self.rows = rows;
            self.inner.step(input, &mut StepOutput::default())?;
            Ok(self.is_offered)
        }

        fn answers(&mut self, out: &mut Vec<Option<TokenId>>) -> Result<(), Error> {
            self.chains.push(self.kept);
            out.resize(self.kept, None);
            Ok(())
        }

        fn read_slot(&mut self, slot: SlotId, out: &mut Vec<f32>) -> Result<(), Error> {
            self.inner.read_slot(slot, out)
        }

        fn memory(&self) -> RunnerMemory {
            self.inner.memory()
        }

        fn poison(&mut self, live: &[usize]) {
            self.inner.poison(live);
        }
    }

    /// Measures the built-in pair.
    fn demo(config: &EngineConfig) -> (Costs, Duration) {
        let (costs, took, chains) = demo_asked(config, true, false);
        assert!(chains.is_empty(), "none are offered");
        (costs, took)
    }

    /// Measures the built-in pair, whose draft may be asked for steps; rows of the chains of steps.
    fn demo_asked(
        config: &EngineConfig,
        same_ids: bool,
        is_offered: bool,
    ) -> (Costs, Duration, Vec<usize>) {
        let args =
            DeviceArgs { device: DeviceName::Cpu, threads: Some(1), cpu_isa: None, head: None };
        let backend = load::backend(&args).unwrap();
        let models = ["demo", "demo-draft"].map(|name| load::open(name, Head::Auto).unwrap());
        let limits = [config.step_limits(), config.draft_limits()];
        let build = |i: usize| {
            let model: &engine::model::Model = &models[i];
            backend.build(model.program(), &model.weights(), &limits[i]).unwrap()
        };
        let (mut verifier, inner) = (build(0), build(1));
        let mut asked = Asked { inner, is_offered, rows: 0, kept: 0, chains: vec![] };
        let verifier = Subject { program: models[0].program(), runner: verifier.as_mut() };
        let model = Subject { program: models[1].program(), runner: &mut asked };
        let start = Instant::now();
        let costs = measure(verifier, Some(DraftSubject { model, same_ids }), config).unwrap();
        (costs, start.elapsed(), asked.chains)
    }

    #[test]
    fn a_draft_that_goes_from_step_to_step_is_measured_in_chains() {
        let (costs, _, chains) = demo_asked(&config(400, 8), true, true);
        assert!([1, 2].iter().all(|rows| chains.contains(&(CHAIN * rows))), "{chains:?}");
        let points = costs.draft.unwrap().step;
        assert_eq!(points.points().iter().map(|p| p.0).collect::<Vec<_>>(), [1, 2]);
        let (.., chains) = demo_asked(&config(400, 8), false, true);
        assert!(chains.is_empty(), "ids must be mapped, so each step ends on the host");
    }

    #[test]
    fn one_more_step_of_a_chain_costs_what_it_adds() {
        let model = load::open("demo-draft", Head::Auto).unwrap();
        let (config, backend) = (config(400, 8), kernels::reference::ReferenceBackend);
        let mut runner =
            backend.build(model.program(), &model.weights(), &config.draft_limits()).unwrap();
        let model = Subject { program: model.program(), runner: runner.as_mut() };
        let mut draft = Drafting::new(DraftSubject { model, same_ids: true }, &config).unwrap();
        let seconds = |samples: &mut Samples, all: &[u64]| {
            samples.times = all.iter().map(|&s| vec![Duration::from_secs(s)]).collect();
        };
        seconds(&mut draft.first, &[9]);
        seconds(&mut draft.later, &[8, 10]);
        seconds(&mut draft.prefill, &[64]);
        draft.rounds = 3;
        assert_eq!(draft.chained(), None, "nothing is offered");
        seconds(&mut draft.chains, &[14, 22]);
        let costs = draft.costs(0.5).unwrap();
        // Six seconds for three more steps of one row, and twelve of two; no tokens to choose.
        assert_eq!(costs.step.points(), [(1, 2.0), (2, 4.0)]);
        assert_eq!((costs.start, costs.prefill_token), (7.0, 1.0), "the wait is in the start");
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
        let curve = curve(&samples.rows, &samples.all(), 0.5).unwrap();
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
