//! `foretoken bench`: how fast whole steps of a model are, with all it takes to believe it.
//!
//! ```text
//! threads > depth > prefill tests, decode tests, verify tests: one row each, written at once
//! test    bandwidth and peak, warm-up, repetitions that nobody disturbed, bandwidth and peak
//! ```
//! Sizes come from a model folder or from a table ([`subject`]); weights are then made up. Not
//! here: linears alone ([`kernels`]), draft lengths ([`sweep`]), speed beside other programs.

mod kernels;
pub(crate) mod machine;
mod output;
mod rows;
mod session;
mod stats;
mod subject;
mod sweep;
mod work;

use crate::cli::{BenchArgs, BenchPart, DeviceArgs, DeviceName, MeasuringArgs};
use crate::{Io, load};
use ::kernels::cpu::{Isa, available_threads};
use ::kernels::devices;
use anyhow::bail;
use output::{Row, Writer};
use rows::{Figures, STEPS, Setting};
use serde::Serialize;
use session::{Needs, Session, Timed};
use stats::{Kept, Repetition, Spread};
use subject::Subject;

/// Runs the command.
pub(crate) fn run(args: &BenchArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    if let Some(BenchPart::Kernels(args)) = &args.part {
        return kernels::run(args, io);
    }
    if args.sweep.draft.is_some() || args.sweep.draft_shape.is_some() {
        return sweep::run(args, io);
    }
    let tests = tests(args)?;
    let subject = Subject::open(&args.subject, args.measuring.device)?;
    let needs = tests.iter().fold(Needs::default(), |most, test| test.needs(most));
    let runners = [(subject.program(), needs.limits())];
    subject::check_memory(&subject.name, subject.device, &runners)?;
    let mut writer = Writer::new(&STEPS, args.measuring.output);
    for place in places(&args.measuring)? {
        let backend = load::backend(&place.device_args())?;
        let weights = subject.weights();
        let (program, limits) = (subject.program(), needs.limits());
        let runner = load::build_program(program, weights.as_ref(), backend.as_ref(), &limits, io)?;
        let mut session = Session::new(runner, program, needs);
        for test in &tests {
            let measured = measure(test, args, place, &mut session)?;
            for row in measured.rows(test, &place.setting(&subject)) {
                writer.row(&to_row(&row)?, io)?;
            }
        }
    }
    Ok(writer.finish(io)?)
}

fn to_row(figures: &impl Serialize) -> anyhow::Result<Row> {
    match serde_json::to_value(figures)? {
        serde_json::Value::Object(row) => Ok(row),
        other => bail!("a row is no object but {other}"),
    }
}

/// What is timed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// A prompt of that many tokens.
    Prefill(usize),
    /// That many tokens of each sequence.
    Decode(usize),
    /// Steps of those many rows of one sequence, one row first.
    Verify(Vec<usize>),
}

/// One combination of the arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Test {
    phase: Phase,
    depth: usize,
    batch: usize,
}

/// All combinations in the order they run.
fn tests(args: &BenchArgs) -> anyhow::Result<Vec<Test>> {
    let mut all = vec![];
    for &depth in &args.depth {
        let mut push = |phase, batch| all.push(Test { phase, depth, batch });
        for &tokens in args.prompt_tokens.iter().filter(|tokens| **tokens > 0) {
            push(Phase::Prefill(tokens), 1);
        }
        for &tokens in args.gen_tokens.iter().filter(|tokens| **tokens > 0) {
            args.batch.iter().for_each(|&batch| push(Phase::Decode(tokens), batch));
        }
        if !args.verify.is_empty() {
            let more = args.verify.iter().copied().filter(|rows| *rows > 1);
            push(Phase::Verify(std::iter::once(1).chain(more).collect()), 1);
        }
    }
    if all.is_empty() {
        bail!(
            "nothing to measure: give --prompt-tokens, --gen-tokens or --verify a number above 0"
        );
    }
    Ok(all)
}

impl Test {
    fn needs(&self, most: Needs) -> Needs {
        let (rows, verified) = match &self.phase {
            Phase::Prefill(tokens) | Phase::Decode(tokens) => (*tokens, 1),
            Phase::Verify(rows) => {
                let most = rows.iter().copied().max().unwrap_or(1);
                (most, most)
            }
        };
        Needs {
            sequences: most.sequences.max(self.batch),
            positions: most.positions.max(self.depth + rows),
            verified: most.verified.max(verified),
        }
    }

    /// One repetition: a time for each row of the table.
    fn once(&self, session: &mut Session) -> anyhow::Result<Vec<Timed>> {
        match &self.phase {
            Phase::Prefill(tokens) => Ok(vec![session.prefill(self.depth, *tokens)?]),
            Phase::Decode(tokens) => Ok(vec![session.decode(self.depth, *tokens, self.batch)?]),
            Phase::Verify(rows) => {
                let mut sums = vec![Timed::default(); rows.len()];
                for _ in 0..VERIFY_STEPS {
                    for (sum, &rows) in sums.iter_mut().zip(rows) {
                        let one = session.verify(self.depth, rows)?;
                        sum.time += one.time / VERIFY_STEPS;
                        sum.work = one.work;
                    }
                }
                Ok(sums)
            }
        }
    }

    /// Name of row `i`, its phase and its tokens.
    fn name(&self, i: usize) -> (String, &'static str, usize) {
        let (start, phase, tokens) = match &self.phase {
            Phase::Prefill(tokens) => ("pp", "prefill", *tokens),
            Phase::Decode(tokens) => ("tg", "decode", *tokens),
            Phase::Verify(rows) => ("verify", "verify", rows[i]),
        };
        let batch = if self.batch > 1 { format!(" b{}", self.batch) } else { String::new() };
        let depth = if self.depth > 0 { format!(" @ d{}", self.depth) } else { String::new() };
        (format!("{start}{tokens}{batch}{depth}"), phase, tokens)
    }
}

/// Steps of each row count in a repetition, in turns, so that a slow moment meets all of them.
const VERIFY_STEPS: u32 = 8;

/// A device with a number of threads.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    args: &'a MeasuringArgs,
    threads: usize,
}

/// The places that the arguments name, one for each number of threads.
fn places(args: &MeasuringArgs) -> anyhow::Result<Vec<Place<'_>>> {
    let place = |threads| Place { args, threads };
    match args.device {
        DeviceName::Reference | DeviceName::Cuda(_) if args.threads.is_empty() => {
            Ok(vec![place(1)])
        }
        DeviceName::Reference | DeviceName::Cuda(_) => {
            bail!("--threads belongs to --device cpu; {} has one thread", args.device)
        }
        DeviceName::Cpu if args.threads.is_empty() => Ok(vec![place(available_threads())]),
        DeviceName::Cpu => Ok(args.threads.iter().map(|&threads| place(threads)).collect()),
    }
}

impl Place<'_> {
    fn device_args(&self) -> DeviceArgs {
        let (device, cpu_isa) = (self.args.device, self.args.cpu_isa);
        let threads = (device == DeviceName::Cpu).then_some(self.threads);
        DeviceArgs { device, threads, cpu_isa, head: None }
    }

    /// The instruction set of the cpu device.
    fn isa(&self) -> Option<Isa> {
        let chosen = self.args.cpu_isa.map(load::isa);
        (self.args.device == DeviceName::Cpu).then(|| chosen.unwrap_or_else(Isa::best))
    }

    fn setting(&self, subject: &Subject) -> Setting {
        let device = self.args.device.to_string();
        Setting {
            version: env!("CARGO_PKG_VERSION"),
            date: machine::utc_now(),
            cpu: machine::cpu_name(),
            model: subject.name.clone(),
            format: subject.format(),
            parameters: subject.parameters(),
            weight_bytes: subject.program().weight_bytes(),
            device,
            isa: self.isa().map(|isa| isa.to_string()),
            threads: self.threads,
        }
    }

    /// Measures what the machine can do now.
    fn ceilings(&self) -> anyhow::Result<Ceilings> {
        if let DeviceName::Cuda(number) = self.args.device {
            let gpu = load::cuda(number);
            return Ok(Ceilings { read: gpu.read_bandwidth()?, int8: Some(gpu.int8_peak()?) });
        }
        let read = devices::read_bandwidth(self.threads);
        let int8 = self.isa().map(|isa| devices::int8_peak(isa, self.threads)).transpose()?;
        Ok(Ceilings { read, int8 })
    }
}

/// What a machine can do at most.
#[derive(Debug, Clone, Copy)]
struct Ceilings {
    /// Bytes per second.
    read: f64,
    /// Operations per second.
    int8: Option<f64>,
}

impl Ceilings {
    /// The higher of each: others can only lower what is measured.
    fn or(self, other: Self) -> Self {
        let int8 = self.int8.zip(other.int8).map(|(a, b)| a.max(b));
        Self { read: self.read.max(other.read), int8 }
    }
}

/// A test's repetitions and what the machine could do around them.
#[derive(Debug)]
struct Measured {
    kept: Kept<Vec<Timed>>,
    ceilings: Ceilings,
}

fn measure(
    test: &Test,
    args: &BenchArgs,
    place: Place<'_>,
    session: &mut Session,
) -> anyhow::Result<Measured> {
    let before = place.ceilings()?;
    test.once(session)?;
    let most = args.measuring.max_foreign / 100.0;
    let kept = stats::repeat(args.repetitions, most, || {
        let (value, foreign) = machine::listen(|| test.once(session));
        anyhow::Ok(Repetition { value: value?, foreign })
    })?;
    Ok(Measured { kept, ceilings: before.or(place.ceilings()?) })
}

impl Measured {
    /// A row for each time of a repetition.
    fn rows(&self, test: &Test, setting: &Setting) -> Vec<Figures> {
        let count = self.kept.values.first().map_or(0, Vec::len);
        (0..count).map(|i| self.row(test, i, setting)).collect()
    }

    fn row(&self, test: &Test, i: usize, setting: &Setting) -> Figures {
        let seconds = |i: usize| {
            self.kept.values.iter().map(move |times| times[i].time.as_secs_f64().max(1e-9))
        };
        let samples: Vec<f64> = seconds(i).collect();
        let (name, phase, tokens) = test.name(i);
        let all_tokens = (tokens * test.batch) as f64;
        let rates: Vec<f64> = samples.iter().map(|seconds| all_tokens / seconds).collect();
        let (time, rate) = (Spread::of(&samples).median, Spread::of(&rates));
        let work = self.kept.values.first().map_or_else(Default::default, |times| times[i].work);
        let ratios: Vec<f64> = seconds(i).zip(seconds(0)).map(|(many, one)| many / one).collect();
        let cost = matches!(test.phase, Phase::Verify(_)).then(|| Spread::of(&ratios));
        let Ceilings { read, int8 } = self.ceilings;
        let quantized = work.int_ops > 0.0;
        Figures {
            setting: setting.clone(),
            test: name,
            phase,
            tokens,
            depth: test.depth,
            batch: test.batch,
            repetitions: samples.len(),
            dropped: self.kept.dropped,
            loud: self.kept.loud,
            foreign_cpu: self.kept.foreign,
            seconds: time,
            tokens_per_second: all_tokens / time,
            tokens_per_second_min: rate.min,
            tokens_per_second_max: rate.max,
            tokens_per_second_stddev: rate.deviation,
            bytes_per_second: work.bytes / time,
            read_bandwidth: read,
            share_of_read_bandwidth: work.bytes / time / read,
            ops_per_second: work.ops / time,
            int8_peak: int8,
            share_of_int8_peak: int8.filter(|_| quantized).map(|peak| work.int_ops / time / peak),
            verify_cost: cost.map(|c| c.median),
            verify_cost_min: cost.map(|c| c.min),
            verify_cost_max: cost.map(|c| c.max),
            samples_seconds: samples,
        }
    }
}

#[cfg(test)]
#[path = "mod_tests.rs"]
mod tests;
