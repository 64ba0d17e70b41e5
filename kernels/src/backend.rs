//! What a backend promises: build a runner once, then run every step of the program on request.
//!
//! Not here: sequences, requests, sampling. Input comes from the engine's batch packer as flat
//! arrays; logits go back. A row's result depends on that row's own sequence alone, never on
//! which other rows share the step: this is what makes speculation exact.

use crate::program::{BlockId, Rows, SlotId, TokenId, WeightId};
use crate::{Error, Program};
use quant::Weight;
use std::ops::Range;

/// Upper bounds a runner is built for; all memory is taken at build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Most token rows of a step.
    pub tokens: usize,
    /// Most sequences of a step.
    pub sequences: usize,
    /// Most output rows of a step.
    pub outputs: usize,
    /// KV blocks of the pool, ids `0..blocks`.
    pub blocks: usize,
    /// Positions of a KV block.
    pub block_len: usize,
    /// Most tokens of a sequence; blocks may have room for more of them than one sequence can.
    pub context_len: usize,
    /// Gives every slot its own memory so that [`Runner::read_slot`] sees each one after a step.
    pub trace: bool,
}

/// Token and output rows of a step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RowCounts {
    pub(crate) tokens: usize,
    pub(crate) outputs: usize,
}

impl RowCounts {
    /// Those of the largest step.
    pub(crate) fn most(limits: &StepLimits) -> Self {
        Self { tokens: limits.tokens, outputs: limits.outputs }
    }

    /// Those of a step.
    pub(crate) fn new(input: &StepInput<'_>) -> Self {
        Self { tokens: input.tokens.len(), outputs: input.output_rows.len() }
    }

    /// How many rows of a kind.
    pub(crate) fn of(self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens,
            Rows::Outputs => self.outputs,
        }
    }
}

/// Delivers weights to a backend: one after another, parts of one to several threads at once.
pub trait WeightSource: Sync {
    /// Rows `rows` of declaration `id`: not empty, inside its n, in the declared format.
    ///
    /// # Errors
    /// [`Error::Source`] with what is wrong in the checkpoint.
    fn load(&self, id: WeightId, rows: Range<usize>) -> Result<Weight<'_>, Error>;

    /// Says that all of weight `id` was read: memory that only serves to deliver it may go.
    fn release(&self, id: WeightId) {
        let _ = id;
    }
}

/// Output rows of steps asked for ([`Runner::ask`]) before their answers are fetched: a runner that
/// offers such steps keeps so many.
pub const ASKED_ROWS: usize = 1024;

/// Makes runners for one device.
pub trait Backend: Send + std::fmt::Debug {
    /// Short name: `cpu`, `reference`.
    fn name(&self) -> &'static str;

    /// Which kernel would run a weight of this format, and why, in one line.
    fn kernel_for(&self, format: quant::Format) -> String;

    /// Validates the program, pulls every weight and repacks it.
    ///
    /// # Errors
    /// A program that breaks the contract, a weight that is not as declared.
    fn build(
        &self,
        program: &Program,
        weights: &dyn WeightSource,
        limits: &StepLimits,
    ) -> Result<Box<dyn Runner>, Error>;
}

/// A program with its weights, slots and KV memory on a device.
pub trait Runner: Send {
    /// Runs every step once and writes the logits `[r, v]` of `input.output_rows`, but for rows
    /// whose token it chooses by itself ([`StepInput::draws`]).
    ///
    /// # Errors
    /// [`Error::Input`] if the arrays contradict each other or the limits; nothing has run then.
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error>;

    /// Asks for a step without waiting for it: every output row has a draw, and only the chosen tokens
    /// come back, by [`Runner::answers`]. Whether this runner offers it; if not, nothing was done.
    ///
    /// With `follows` the tokens of `input` are any of the vocabulary: token i of the step is the one
    /// chosen in output row i of the step asked for before, which has as many as this one has tokens.
    /// Not every token needs an output row of its own: a sequence whose last one is known to be chosen
    /// leaves the steps so. Without `follows` begins a new chain; answers not fetched are lost.
    ///
    /// # Errors
    /// As [`Runner::step`], and beyond [`ASKED_ROWS`]; what was asked for before is then lost.
    fn ask(&mut self, input: &StepInput<'_>, follows: bool) -> Result<bool, Error> {
        let _ = (input, follows);
        Ok(false)
    }

    /// The tokens chosen in the steps asked for since a chain began, step by step and row by row. None
    /// where the runner leaves the choice to its caller, who may compute the row's token anew with
    /// [`Runner::step`] for its logits. Tokens that follow such a row mean nothing, and what was computed
    /// of them is overwritten when their positions are computed again.
    ///
    /// # Errors
    /// Those of the steps.
    fn answers(&mut self, out: &mut Vec<Option<TokenId>>) -> Result<(), Error> {
        out.clear();
        Ok(())
    }

    /// Copies a slot as it is after the last step, `[rows, width]`, into `out`.
    ///
    /// # Errors
    /// [`Error::Input`] if the runner was built without [`StepLimits::trace`].
    fn read_slot(&mut self, slot: SlotId, out: &mut Vec<f32>) -> Result<(), Error>;

    /// Bytes this runner holds: weights, slots, KV.
    fn memory(&self) -> RunnerMemory;

    /// Fills every KV position outside the given live blocks and every dead slot with NaN, so
    /// that a test can show that nothing reads them. Block `b` keeps its first `live[b]` positions.
    fn poison(&mut self, live: &[usize]);
}

/// Bytes a runner holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunnerMemory {
    /// Repacked weights.
    pub weights_bytes: usize,
    /// Activation slots and scratch.
    pub slots_bytes: usize,
    /// KV cache.
    pub kv_bytes: usize,
}

impl RunnerMemory {
    /// All of it.
    pub fn total(&self) -> usize {
        [self.weights_bytes, self.slots_bytes, self.kv_bytes]
            .into_iter()
            .fold(0, usize::saturating_add)
    }
}

/// The arrays of one step; all packed, one sequence after another.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// `[t]`
    pub tokens: &'a [TokenId],
    /// `[t]` position of each token in its sequence.
    pub positions: &'a [u32],
    /// `[t]` length that chooses rotary speeds, see [`crate::program::RopeSpeeds`].
    pub rope_lens: &'a [u32],
    /// `[s]` sequence i owns tokens `query_ends[i - 1]..query_ends[i]`.
    pub query_ends: &'a [u32],
    /// `[s]` tokens visible after this step, the new ones included.
    pub context_lens: &'a [u32],
    /// Which blocks hold each sequence's positions.
    pub block_tables: BlockTables<'a>,
    /// `[r]` token rows whose logits are wanted, ascending.
    pub output_rows: &'a [u32],
    /// `[r]`, or empty for none: how the token after an output row is chosen. A runner may choose it
    /// itself where its memory is far away: a token is less to carry than a row of logits.
    pub draws: &'a [Option<Draw>],
}

/// A choice of a token by its logits alone; ties go to the lowest id.
///
/// At temperature 0 the token of the largest logit. Else that of the largest
/// `f64((logit - largest) / temperature) + noise`, the f32 quotient being the logit itself at
/// temperature 1, with `noise = -ln(-ln(1 - w))`, `w = ((bits >> 12) + 0.5) / 2^52` and
/// `bits = next(key ^ token)`, where `next(x)` is the finaliser of SplitMix64 (shifts 30, 27, 31)
/// of `x + 0x9e3779b97f4a7c15`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// What the noise depends on beside the token.
    pub key: u64,
    /// At least 0, finite.
    pub temperature: f32,
}

impl Draw {
    /// The token of the largest logit.
    pub const GREEDY: Self = Self { key: 0, temperature: 0.0 };
}

/// Block tables of all sequences, concatenated: sequence i owns `blocks[ends[i - 1]..ends[i]]`,
/// and its position p lies in its block `p / block_len` at offset `p % block_len`.
#[derive(Debug, Clone, Copy)]
pub struct BlockTables<'a> {
    /// All tables, one after another.
    pub blocks: &'a [BlockId],
    /// `[s]` end of each sequence's table.
    pub ends: &'a [u32],
}

impl<'a> BlockTables<'a> {
    /// The table of sequence `i`.
    pub fn of(&self, i: usize) -> &'a [BlockId] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.blocks[start as usize..self.ends[i] as usize]
    }
}

/// Results of a step; the engine keeps one and reuses its memory.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// `[r, v]`; what rows of chosen tokens hold means nothing.
    pub logits: Vec<f32>,
    /// `[r]` tokens that the runner chose, none where the logits are to be used; or empty for none.
    pub chosen: Vec<Option<TokenId>>,
}
