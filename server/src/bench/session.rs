//! A runner with sequences of random tokens, whose steps are timed.
//!
//! Time is that inside steps. Not here: repetitions and rows ([`super`]).

use super::work::{Costs, Work};
use crate::load::{STEP_TOKENS, Unexpected};
use anyhow::Context;
use engine::kv::BLOCK_LEN;
use kernels::program::{BlockId, Program, TokenId};
use kernels::{BlockTables, Draw, Runner, StepInput, StepLimits, StepOutput};
use std::ops::Range;
use std::time::{Duration, Instant};

/// The most that any test of a session asks for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Needs {
    /// Sequences of a step.
    pub(crate) sequences: usize,
    /// Positions of a sequence.
    pub(crate) positions: usize,
    /// Rows of one sequence in a step that all give logits.
    pub(crate) verified: usize,
}

impl Needs {
    /// Limits of a runner that satisfies them.
    pub(crate) fn limits(self) -> StepLimits {
        let blocks = self.positions.div_ceil(BLOCK_LEN).max(1);
        let outputs = self.sequences.max(self.verified).max(1);
        StepLimits {
            tokens: STEP_TOKENS.min(self.positions.max(1)).max(outputs),
            sequences: self.sequences.max(1),
            outputs,
            blocks: blocks.saturating_mul(self.sequences.max(1)),
            block_len: BLOCK_LEN,
            context_len: self.positions.max(1),
            trace: false,
        }
    }
}

/// Which rows of a step give logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outputs {
    None,
    /// The last of each sequence.
    Last,
    All,
}

/// Time and the work that was done in it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Timed {
    pub(crate) time: Duration,
    pub(crate) work: Work,
}

/// A runner and what its sequences hold.
#[allow(missing_debug_implementations, reason = "a runner has nothing to print")]
pub(crate) struct Session {
    runner: Box<dyn Runner>,
    costs: Costs,
    vocab: u64,
    /// Blocks of each sequence.
    blocks: usize,
    /// Positions of each sequence whose keys and values are there.
    filled: Vec<usize>,
    output: StepOutput,
    random: u64,
}

impl Session {
    /// A session of a runner that was built for `program` with the limits of `needs`.
    pub(crate) fn new(runner: Box<dyn Runner>, program: &Program, needs: Needs) -> Self {
        let limits = needs.limits();
        let positions = (limits.blocks * limits.block_len) as f64;
        let elements = program.kv_elements_per_token() as f64;
        let kv_bytes = runner.memory().kv_bytes as f64 / (positions * elements).max(1.0);
        let vocab = program.slots[program.logits.index()].width as u64;
        Self {
            runner,
            costs: Costs::new(program, kv_bytes),
            vocab,
            blocks: limits.blocks / limits.sequences,
            filled: vec![0; limits.sequences],
            output: StepOutput::default(),
            random: 1,
        }
    }

    /// Computes `tokens` tokens of the first sequence from position `depth` on; logits of the last.
    pub(crate) fn prefill(&mut self, depth: usize, tokens: usize) -> anyhow::Result<Timed> {
        self.fill(1, depth)?;
        self.chunks(0, depth..depth + tokens, Outputs::Last)
    }

    /// Decodes `tokens` tokens of each of `batch` sequences from position `depth` on.
    pub(crate) fn decode(
        &mut self,
        depth: usize,
        tokens: usize,
        batch: usize,
    ) -> anyhow::Result<Timed> {
        self.fill(batch, depth)?;
        let mut sum = Timed::default();
        for position in depth..depth + tokens {
            sum.add(self.step(0..batch, position..position + 1, Outputs::Last)?);
        }
        Ok(sum)
    }

    /// One step of `rows` rows of the first sequence at `depth`, all with logits.
    pub(crate) fn verify(&mut self, depth: usize, rows: usize) -> anyhow::Result<Timed> {
        self.fill(1, depth)?;
        self.step(0..1, depth..depth + rows, Outputs::All)
    }

    /// Gives the first `sequences` sequences keys and values at all positions before `depth`.
    fn fill(&mut self, sequences: usize, depth: usize) -> anyhow::Result<()> {
        for i in 0..sequences {
            self.chunks(i, self.filled[i]..depth, Outputs::None)?;
        }
        Ok(())
    }

    /// Computes positions of sequence `i` chunk by chunk; `outputs` are those of the last chunk.
    fn chunks(
        &mut self,
        i: usize,
        positions: Range<usize>,
        outputs: Outputs,
    ) -> anyhow::Result<Timed> {
        let (mut sum, mut start) = (Timed::default(), positions.start);
        while start < positions.end {
            let end = positions.end.min(start + STEP_TOKENS);
            let outputs = if end == positions.end { outputs } else { Outputs::None };
            sum.add(self.step(i..i + 1, start..end, outputs)?);
            start = end;
        }
        Ok(sum)
    }

    /// One step in which each of `sequences` computes `positions`.
    fn step(
        &mut self,
        sequences: Range<usize>,
        positions: Range<usize>,
        outputs: Outputs,
    ) -> anyhow::Result<Timed> {
        let (s, m, end) = (sequences.len(), positions.len(), positions.end);
        let tokens: Vec<TokenId> = (0..s * m).map(|_| self.token()).collect();
        let places = positions.start as u32..end as u32;
        let positions: Vec<u32> = (0..s).flat_map(|_| places.clone()).collect();
        let ends = |each: usize| (1..=s).map(|i| (i * each) as u32).collect::<Vec<u32>>();
        let query_ends = ends(m);
        let output_rows: Vec<u32> = match outputs {
            Outputs::None => vec![],
            Outputs::Last => query_ends.iter().map(|end| end - 1).collect(),
            Outputs::All => (0..(s * m) as u32).collect(),
        };
        let blocks = sequences.start * self.blocks..sequences.end * self.blocks;
        let input = StepInput {
            tokens: &tokens,
            positions: &positions,
            rope_lens: &vec![end as u32; s * m],
            query_ends: &query_ends,
            context_lens: &vec![end as u32; s],
            block_tables: BlockTables {
                blocks: &blocks.map(|b| BlockId(b as u32)).collect::<Vec<_>>(),
                ends: &ends(self.blocks),
            },
            output_rows: &output_rows,
            draws: &vec![Some(Draw::GREEDY); output_rows.len()],
        };
        let start = Instant::now();
        self.runner.step(&input, &mut self.output).context(Unexpected)?;
        let time = start.elapsed();
        for filled in &mut self.filled[sequences] {
            *filled = end.max(*filled);
        }
        Ok(Timed { time, work: self.costs.step(s, m, end, output_rows.len()) })
    }

    /// The next random token.
    fn token(&mut self) -> TokenId {
        // Constants of Knuth's MMIX generator; its high bits are the random ones.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        TokenId(((self.random >> 33) % self.vocab.max(1)) as u32)
    }
}

impl Timed {
    fn add(&mut self, more: Self) {
        self.time += more.time;
        self.work += more.work;
    }
}
