//! `foretoken bench kernels`: every distinct linear of a model alone.
//!
//! Each is a program of as many copies as leave all caches, run as any program is; all row counts
//! take turns, round by round, and the least time of each counts. Not here: whole steps
//! ([`super`]).

use super::output::Writer;
use super::rows::{LINEARS, LinearFigures, Setting};
use super::subject::{Subject, linears};
use super::{Ceilings, Place, machine, places, to_row};
use crate::Io;
use crate::cli::KernelsArgs;
use crate::load::{self, Unexpected};
use ::kernels::program::{BlockId, Program, Rounding, TokenId, WeightDecl};
use ::kernels::{BlockTables, Runner, StepInput, StepLimits, StepOutput};
use anyhow::Context;
use engine::synthetic::{self, MadeUp};
use quant::Format;
use std::time::Instant;

/// Row counts that take turns.
const ROWS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];

/// Rounds between two measurements of what the machine can do.
const CEILING_ROUNDS: usize = 10;

/// Runs the command.
pub(super) fn run(args: &KernelsArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let subject = Subject::open(&args.subject, args.measuring.device)?;
    let mut writer = Writer::new(&LINEARS, args.measuring.output);
    for place in places(&args.measuring)? {
        for linear in distinct(subject.program()) {
            let measured = Measured::new(&linear, place, args, io)?;
            let figures = measured.figures(&linear, place.setting(&subject));
            writer.row(&to_row(&figures)?, io)?;
        }
    }
    Ok(writer.finish(io)?)
}

/// Linears that are alike.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Linear {
    /// Of the first one, without the layer's number.
    label: String,
    shape: [usize; 2],
    format: Format,
    rounding: Rounding,
    uses: usize,
}

/// The linears of a program by shape and format, in order of appearance.
fn distinct(program: &Program) -> Vec<Linear> {
    let mut all: Vec<Linear> = vec![];
    for (id, step) in linears(program) {
        let decl = &program.weights[id.index()];
        let WeightDecl { shape, format, rounding, .. } = *decl;
        let known =
            all.iter_mut().find(|l| (l.shape, l.format, l.rounding) == (shape, format, rounding));
        if let Some(linear) = known {
            linear.uses += 1;
            continue;
        }
        let label = &program.steps[step].label;
        let tail = label.splitn(3, '.').nth(2).filter(|_| label.starts_with("layers."));
        let label = tail.unwrap_or(label).to_owned();
        all.push(Linear { label, shape, format, rounding, uses: 1 });
    }
    all
}

/// What the rounds over a linear gave.
#[derive(Debug)]
struct Measured {
    copies: usize,
    rounds: usize,
    /// Least seconds of one linear by row count.
    least: [f64; ROWS.len()],
    ceilings: Ceilings,
    foreign: Option<f64>,
}

impl Measured {
    fn new(
        linear: &Linear,
        place: Place<'_>,
        args: &KernelsArgs,
        io: &Io<'_>,
    ) -> anyhow::Result<Self> {
        let rounds = args.repetitions;
        let copies = (args.footprint << 20).div_ceil(linear.format.bytes(linear.shape).max(1));
        let program = synthetic::linears(linear.format, linear.shape, linear.rounding, copies);
        let most = ROWS[ROWS.len() - 1];
        let limits = StepLimits {
            tokens: most,
            sequences: 1,
            outputs: 1,
            blocks: 1,
            block_len: most,
            context_len: most,
            trace: false,
        };
        let backend = load::backend(&place.device_args())?;
        let weights = MadeUp::new(&program.weights);
        let backend = backend.as_ref();
        let mut runner = load::build_program(&program, &weights, backend, &limits, io)?;
        let mut least = [f64::INFINITY; ROWS.len()];
        step(runner.as_mut(), ROWS[0])?;
        let mut ceilings = place.ceilings()?;
        let (done, foreign) = machine::listen(|| {
            for round in 1..=rounds {
                for (least, rows) in least.iter_mut().zip(ROWS) {
                    *least = least.min(step(runner.as_mut(), rows)? / copies as f64);
                }
                if round % CEILING_ROUNDS == 0 || round == rounds {
                    ceilings = ceilings.or(place.ceilings()?);
                }
            }
            anyhow::Ok(())
        });
        done?;
        let foreign = foreign.and_then(super::stats::Foreign::share);
        Ok(Self { copies, rounds, least, ceilings, foreign })
    }

    fn figures(&self, linear: &Linear, setting: Setting) -> LinearFigures {
        let [one, two, three, four, six, eight, twelve, sixteen] = self.least;
        let [n, k] = linear.shape;
        let rate = linear.format.bytes(linear.shape) as f64 / one;
        let ops = (2 * n * k * ROWS[ROWS.len() - 1]) as f64 / sixteen;
        let quantized = matches!(linear.format, Format::Grouped { .. });
        let peak = self.ceilings.int8.filter(|_| quantized);
        LinearFigures {
            setting,
            linear: linear.label.clone(),
            n,
            k,
            weight_format: linear.format.to_string(),
            uses: linear.uses,
            copies: self.copies,
            rounds: self.rounds,
            foreign_cpu: self.foreign,
            seconds: one,
            bytes_per_second: rate,
            read_bandwidth: self.ceilings.read,
            share_of_read_bandwidth: rate / self.ceilings.read,
            cost_2: two / one,
            cost_3: three / one,
            cost_4: four / one,
            cost_6: six / one,
            cost_8: eight / one,
            cost_12: twelve / one,
            cost_16: sixteen / one,
            ops_per_second_16: ops,
            int8_peak: self.ceilings.int8,
            share_of_int8_peak_16: peak.map(|peak| ops / peak),
        }
    }
}

/// Seconds of one step of `rows` rows: every copy once.
fn step(runner: &mut dyn Runner, rows: usize) -> anyhow::Result<f64> {
    let positions: Vec<u32> = (0..rows as u32).collect();
    let input = StepInput {
        tokens: &vec![TokenId(1); rows],
        positions: &positions,
        rope_lens: &vec![rows as u32; rows],
        query_ends: &[rows as u32],
        context_lens: &[rows as u32],
        block_tables: BlockTables { blocks: &[BlockId(0)], ends: &[1] },
        output_rows: &[rows as u32 - 1],
        draws: &[],
    };
    let mut output = StepOutput::default();
    let start = Instant::now();
    runner.step(&input, &mut output).context(Unexpected)?;
    Ok(start.elapsed().as_secs_f64().max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{DeviceName, HeadName, ShapeFormat, SubjectArgs};

    #[test]
    fn linears_that_are_alike_are_measured_once() {
        let args = SubjectArgs {
            model: None,
            shape: Some("tinyllama-1.1b".to_owned()),
            format: ShapeFormat::GptqG128,
            head: HeadName::Int8,
        };
        let subject = Subject::open(&args, DeviceName::Cpu);
        let found = distinct(subject.unwrap().program());
        let found: Vec<_> = found.iter().map(|l| (l.label.as_str(), l.shape, l.uses)).collect();
        let expected = [
            ("attn.qkv", [2560, 2048], 22),
            ("attn.out", [2048, 2048], 22),
            ("mlp.gate_up", [11_264, 2048], 22),
            ("mlp.down", [2048, 5632], 22),
            ("head", [32_000, 2048], 1),
        ];
        assert_eq!(found, expected);
    }
}
