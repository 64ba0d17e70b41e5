//! Runs a case on a backend under a schedule: which tokens of which sequences share a step.
//!
//! Whatever the schedule, the rows of a position must be the same bits.

use super::case::{Case, Source};
use crate::program::BlockId;
use crate::{Backend, BlockTables, Runner, StepInput, StepLimits, StepOutput};
use std::collections::BTreeMap;
use testkit::Rng;

/// How tokens are spread over steps.
#[derive(Debug, Clone, Copy)]
pub(super) enum Schedule {
    /// Everything in one step, at the limits of the runner.
    Whole,
    /// Every token alone in its step, one sequence after another.
    Alone,
    /// Random sequences in random order with chunks of random length and random wanted rows.
    Mixed(u64),
}

/// Result rows by sequence and position.
pub(super) type Rows = BTreeMap<(usize, usize), Vec<f32>>;

/// A part of a step: sequence and number of its next tokens.
type Part = (usize, usize);

/// A runner in the middle of a case.
struct Session<'c> {
    case: &'c Case,
    runner: Box<dyn Runner>,
    /// Tokens of each sequence that have been computed.
    computed: Vec<usize>,
    tables: Vec<Vec<BlockId>>,
}

/// Runs a case and returns the rows that were wanted; with `poison` everything that no step may
/// read is NaN before each step.
pub(super) fn run(backend: &dyn Backend, case: &Case, schedule: Schedule, poison: bool) -> Rows {
    run_within(backend, case, (schedule, poison), &limits(case))
}

/// The same with a trace: every slot is written, whatever a backend may do at once otherwise.
pub(super) fn run_traced(backend: &dyn Backend, case: &Case, schedule: Schedule) -> Rows {
    run_within(backend, case, (schedule, true), &StepLimits { trace: true, ..limits(case) })
}

fn run_within(
    backend: &dyn Backend,
    case: &Case,
    (schedule, poison): (Schedule, bool),
    limits: &StepLimits,
) -> Rows {
    let mut rng = Rng::new(match schedule {
        Schedule::Mixed(seed) => seed,
        Schedule::Whole | Schedule::Alone => 0,
    });
    let mut session = Session::new(backend, case, limits, &mut rng);
    let mut rows = Rows::new();
    while let Some(parts) = session.next_parts(schedule, &mut rng) {
        if poison {
            session.poison();
        }
        let all = !matches!(schedule, Schedule::Mixed(_));
        session.step(&parts, |_| all || rng.below(2) == 0, &mut rows);
    }
    rows
}

/// Limits that the whole case fills exactly.
pub(super) fn limits(case: &Case) -> StepLimits {
    let blocks = case.sequences.iter().map(|s| s.len().div_ceil(case.block_len)).sum();
    StepLimits {
        tokens: case.tokens(),
        sequences: case.sequences.len(),
        outputs: case.tokens(),
        blocks,
        block_len: case.block_len,
        context_len: blocks * case.block_len,
        trace: false,
    }
}

impl<'c> Session<'c> {
    fn new(backend: &dyn Backend, case: &'c Case, limits: &StepLimits, rng: &mut Rng) -> Self {
        let runner = backend.build(&case.program, &Source(&case.weights), limits);
        let mut free = rng.permutation(limits.blocks).into_iter().map(BlockId);
        let tables = case
            .sequences
            .iter()
            .map(|tokens| free.by_ref().take(tokens.len().div_ceil(case.block_len)).collect());
        Self {
            case,
            tables: tables.collect(),
            runner: runner.unwrap_or_else(|e| panic!("{}: {e}", case.name)),
            computed: vec![0; case.sequences.len()],
        }
    }

    fn remaining(&self, sequence: usize) -> usize {
        self.case.sequences[sequence].len() - self.computed[sequence]
    }

    fn next_parts(&self, schedule: Schedule, rng: &mut Rng) -> Option<Vec<Part>> {
        let open: Vec<usize> =
            (0..self.computed.len()).filter(|s| self.remaining(*s) > 0).collect();
        let first = *open.first()?;
        Some(match schedule {
            Schedule::Whole => open.iter().map(|s| (*s, self.remaining(*s))).collect(),
            Schedule::Alone => vec![(first, 1)],
            Schedule::Mixed(_) => {
                let order = rng.permutation(open.len());
                let several = &order[..1 + rng.below(open.len())];
                let mut part = |i: &u32| {
                    let sequence = open[*i as usize];
                    (sequence, 1 + rng.below(self.remaining(sequence).min(9)))
                };
                several.iter().map(&mut part).collect()
            }
        })
    }

    /// Computes the parts and keeps the wanted rows.
    fn step(&mut self, parts: &[Part], mut wanted: impl FnMut(usize) -> bool, rows: &mut Rows) {
        let places: Vec<(usize, usize)> = parts
            .iter()
            .flat_map(|(s, n)| (self.computed[*s]..self.computed[*s] + n).map(|p| (*s, p)))
            .collect();
        let token = |(s, p): &(usize, usize)| self.case.sequences[*s][*p];
        let ends = |lens: Vec<usize>| -> Vec<u32> {
            let sum = |end: &mut usize, len| {
                *end += len;
                Some(*end as u32)
            };
            lens.into_iter().scan(0, sum).collect()
        };
        let tables = || parts.iter().map(|(s, _)| &self.tables[*s]);
        let context = |(s, n): &Part| (self.computed[*s] + n) as u32;
        let blocks: Vec<BlockId> = tables().flatten().copied().collect();
        let output_rows: Vec<u32> =
            (0..places.len() as u32).filter(|r| wanted(*r as usize)).collect();
        let input = StepInput {
            tokens: &places.iter().map(token).collect::<Vec<_>>(),
            positions: &places.iter().map(|(_, p)| *p as u32).collect::<Vec<_>>(),
            rope_lens: &places.iter().map(|(s, p)| self.case.rope_len(*s, *p)).collect::<Vec<_>>(),
            query_ends: &ends(parts.iter().map(|(_, n)| *n).collect()),
            context_lens: &parts.iter().map(context).collect::<Vec<_>>(),
            block_tables: BlockTables {
                blocks: &blocks,
                ends: &ends(tables().map(Vec::len).collect()),
            },
            output_rows: &output_rows,
            draws: &[],
        };
        let mut output = StepOutput::default();
        self.runner.step(&input, &mut output).unwrap_or_else(|e| panic!("{}: {e}", self.case.name));
        let width = self.case.program.slots[self.case.program.logits.index()].width;
        assert_eq!(output.logits.len(), output_rows.len() * width, "{}", self.case.name);
        for (row, values) in output_rows.iter().zip(output.logits.chunks_exact(width)) {
            rows.insert(places[*row as usize], values.to_vec());
        }
        parts.iter().for_each(|(s, n)| self.computed[*s] += n);
    }

    /// Makes everything NaN but the positions already computed.
    fn poison(&mut self) {
        let block_len = self.case.block_len;
        let mut live = vec![0; self.tables.iter().map(Vec::len).sum()];
        for (table, computed) in self.tables.iter().zip(&self.computed) {
            for (i, block) in table.iter().enumerate() {
                live[block.index()] = computed.saturating_sub(i * block_len).min(block_len);
            }
        }
        self.runner.poison(&live);
    }
}
