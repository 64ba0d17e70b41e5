//! From a program to launches: which kernel, over how many blocks, with which memory.
//!
//! A layer of a dense decoder with quantized linears takes six launches for few rows, eight for more; one
//! more where its heads have no kernel for tensor cores, so that others join their splits:
//!
//! ```text
//! qkv       one linear                                                            [`linear`]
//! heads     norms of heads, rotation, keys and values into the cache              [`heads`]
//! attend    splits of attention; the last to end joins those of few tokens, and quantizes
//!                                                      [`attention_mma`], others [`attention`]
//! o         one linear; the last block adds its outputs to the stream, normalises, quantizes
//! gate_up   a linear that activates its outputs and quantizes them
//! down      as o
//! ```
//! More rows than one block of threads should have are normed by a launch of their own ([`rows`]) behind o
//! and down, which also adds the linear's outputs; so is the first norm.
//! Everything else is a launch an op; what belongs to others is decided by [`crate::joins`], and nothing
//! is joined where a trace shows what lies between. Activations are quantized by the kernel that computes
//! them where the next quantized linear reads them, else by one of their own; linears of the same input
//! share them. Where weights are f16 or bf16, activations are split in two parts of that type instead
//! ([`dense`]). Grids are sized for the rows asked for; kernels read the step's own counts from the device,
//! so launches made for more rows compute the same. Not here: memory and copies ([`super::runner`]), the
//! arrays of a step ([`super::inputs`]). Input: a validated program.

mod attention;
mod attention_mma;
mod choose;
mod dense;
mod heads;
mod linear;
mod rows;
#[cfg(test)]
mod tests;

pub(crate) use attention::splits;
pub(crate) use choose::bytes as choice_bytes;

use super::gpu::{Arg, Launch, Pointer};
use super::inputs::Inputs;
use super::store::{Stored, Tiles};
use crate::backend::RowCounts;
use crate::cpu::Blocks;
use crate::program::{Activation, Op, Program, Rows, SlotId, WeightId};
use crate::{Error, StepLimits};
use quant::FloatType;

/// Threads of most blocks.
const THREADS: u32 = 256;

/// Where everything lies.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) inputs: Inputs,
    /// First element of each slot.
    pub(crate) slots: Vec<Pointer>,
    pub(crate) weights: Vec<Stored>,
    /// Keys and values of each layer.
    pub(crate) kv: Vec<[Pointer; 2]>,
    /// Speeds of each rotary table.
    pub(crate) speeds: Vec<Pointer>,
    pub(crate) scratch: Scratch,
    pub(crate) choices: Choices,
    /// Whether every slot is to hold what its steps leave there.
    pub(crate) trace: bool,
    /// Of the device.
    pub(crate) multiprocessors: usize,
    pub(crate) block_len: usize,
    /// Most splits of a sequence.
    pub(crate) splits: usize,
}

/// Memory between the launches of one op.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scratch {
    /// Quantized activations: two, since a linear may read one and write the other.
    pub(crate) quantized: [Activations; 2],
    /// Activations in two parts of two bytes, the scales of their rows, and sums of ranges of columns.
    pub(crate) halves: Pointer,
    pub(crate) half_scales: Pointer,
    pub(crate) range_sums: Pointer,
    /// Partial results of attention.
    pub(crate) parts: Pointer,
    /// [`COUNTERS`] of u32, all 0 between launches: for blocks that do what is left when all are done.
    pub(crate) counters: Pointer,
}

/// Memory of quantized activations and the scales of their blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Activations {
    pub(crate) quads: Pointer,
    pub(crate) scales: Pointer,
}

/// Memory of the choice of tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choices {
    /// What is known of parts of rows.
    pub(crate) parts: Pointer,
    /// One of u32 a row, 0 between launches.
    pub(crate) counters: Pointer,
    /// `[r, 2]` u32: tokens, and 1 where one is certain.
    pub(crate) chosen: Pointer,
    /// The same of [`crate::backend::ASKED_ROWS`] rows of steps that follow each other.
    pub(crate) kept: Pointer,
}

/// Which tokens a step chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Chosen {
    /// None.
    Nothing,
    /// Those of the greatest logits, in some rows at least.
    Greatest,
    /// Drawn ones among them.
    Drawn,
}

/// Most counters that one launch uses.
pub(crate) const COUNTERS: usize = 1 << 14;

/// Bytes of each piece of [`Scratch`]; of `quads` and `scales` there are two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ScratchBytes {
    pub(crate) quads: usize,
    pub(crate) scales: usize,
    pub(crate) halves: usize,
    pub(crate) half_scales: usize,
    pub(crate) range_sums: usize,
    pub(crate) parts: usize,
}

/// What a program needs between launches.
///
/// # Errors
/// [`Error::Device`] for heads that attention has no kernel for.
pub(crate) fn scratch_bytes(
    program: &Program,
    weights: &[Stored],
    limits: &StepLimits,
) -> Result<ScratchBytes, Error> {
    let mut most = ScratchBytes::default();
    for step in &program.steps {
        match step.op {
            Op::Linear { x, weight, .. } => {
                let rows = RowCounts::most(limits).of(program.slots[x.index()].rows);
                if let Some(tiles) = &weights[weight.index()].tiles {
                    let quads = rows * tiles.blocks.count * tiles.stride + linear::BEHIND_QUADS;
                    most.quads = most.quads.max(quads);
                    most.scales = most.scales.max(rows * tiles.blocks.count * 8);
                } else if weights[weight.index()].dense.is_some_and(dense::is_split) {
                    dense::scratch_bytes(program.weights[weight.index()].shape, rows, &mut most);
                }
            }
            Op::Attend { q, .. } => {
                most.parts = most.parts.max(attention::parts_bytes(&step.label, q, limits)?);
            }
            _ => {}
        }
    }
    Ok(most)
}

impl Plan {
    /// The launches of a step of at most `rows`.
    pub(crate) fn launches(
        &self,
        program: &Program,
        rows: RowCounts,
        chosen: Chosen,
    ) -> Vec<Launch> {
        let mut list =
            List { plan: self, program, rows, launches: vec![], quantized: None, split: None };
        let mut at = 0;
        while at < program.steps.len() {
            at += list.op(at);
        }
        if chosen != Chosen::Nothing {
            list.choose(chosen == Chosen::Drawn);
        }
        list.launches
    }
}

/// Launches being listed.
struct List<'a> {
    plan: &'a Plan,
    program: &'a Program,
    rows: RowCounts,
    launches: Vec<Launch>,
    /// What is quantized.
    quantized: Option<Quantized>,
    /// What the activations in two parts are of, and the parts' type.
    split: Option<(SlotId, FloatType)>,
}

/// Activations that lie quantized in one of [`Scratch::quantized`].
#[derive(Debug, Clone)]
struct Quantized {
    /// What they are of.
    slot: SlotId,
    blocks: Blocks,
    /// Which of the two.
    at: usize,
}

/// An argument list from values of several types.
macro_rules! args {
    ($($value:expr),* $(,)?) => { vec![$($crate::cuda::gpu::Arg::from($value)),*] };
}
use args;

impl From<Pointer> for Arg {
    fn from(pointer: Pointer) -> Self {
        Self::Pointer(pointer)
    }
}

impl From<Option<Pointer>> for Arg {
    fn from(pointer: Option<Pointer>) -> Self {
        Self::Pointer(pointer.unwrap_or(Pointer::NULL))
    }
}

impl From<usize> for Arg {
    /// Sizes are below 2^31: a device has no memory for more.
    fn from(size: usize) -> Self {
        Self::Int(i32::try_from(size).unwrap_or(i32::MAX))
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl List<'_> {
    /// Lists the launches of the step at `at`; how many steps they are the launches of.
    fn op(&mut self, at: usize) -> usize {
        let op = &self.program.steps[at].op;
        self.forget(at);
        if let Op::HeadNorm { .. } | Op::Rope { .. } = op
            && let Some(steps) = self.heads(at)
        {
            return steps;
        }
        match *op {
            Op::Embed { table, out } => self.embed(table, out),
            Op::Norm { x, add, weight, eps, out } => self.norm(at, [x, out], add, weight, eps),
            Op::Linear { x, weight, bias, out } => return self.linear(at, (x, weight, bias), out),
            Op::HeadNorm { heads, weight, eps } => self.head_norm(heads, weight, eps),
            Op::Rope { heads, rope } => self.rope(heads, rope),
            Op::KvWrite { layer, k, v } => self.kv_write(layer, [k, v]),
            Op::Attend { q, layer, mask, scale, out } => {
                self.attend(at, (q, layer), (mask, scale), out);
            }
            Op::Activate { kind: Activation::Silu, x, out } => self.activate(at, x, out),
            Op::Gather { x, out } => self.gather(at, x, out),
        }
        1
    }

    /// Forgets activations in other forms of what the step at `at` writes.
    fn forget(&mut self, at: usize) {
        let writes = self.program.steps[at].op.writes();
        self.quantized.take_if(|known| writes.contains(&known.slot));
        self.split.take_if(|(slot, _)| writes.contains(slot));
    }

    /// The weight of the next quantized linear, if it reads `slot` as the step at `at` leaves it.
    fn next_reader(&self, at: usize, slot: SlotId) -> Option<Tiles> {
        for step in &self.program.steps[at + 1..] {
            if let Op::Linear { x, weight, .. } = step.op
                && let Some(tiles) = &self.plan.weights[weight.index()].tiles
            {
                return (x == slot).then(|| tiles.clone());
            }
            if step.op.writes().contains(&slot) {
                return None;
            }
        }
        None
    }

    /// Arguments that say where activations of `slot` go as `tiles` reads them; notes that they do.
    fn quantized(&mut self, slot: SlotId, tiles: &Tiles) -> Vec<Arg> {
        self.quantized = Some(Quantized { slot, blocks: tiles.blocks.clone(), at: 0 });
        let Activations { quads, scales } = self.plan.scratch.quantized[0];
        let Blocks { count, block, .. } = tiles.blocks;
        args![tiles.source, quads, scales, count, block, tiles.stride]
    }

    /// A kernel that computes rows of `slot`, or the one that quantizes them too where `fits` says that
    /// it can do so for the linear that reads them next.
    fn with_quantize(
        &mut self,
        (at, slot): (usize, SlotId),
        kernels: [&'static str; 2],
        fits: impl Fn(&Tiles) -> bool,
        args: &mut Vec<Arg>,
    ) -> &'static str {
        match self.next_reader(at, slot).filter(fits) {
            Some(tiles) => {
                args.extend(self.quantized(slot, &tiles));
                kernels[1]
            }
            None => kernels[0],
        }
    }

    fn push(&mut self, kernel: &'static str, grid: [usize; 3], threads: u32, args: Vec<Arg>) {
        let grid = grid.map(|blocks| blocks as u32);
        self.launches.push(Launch { kernel, grid, threads, shared: 0, args });
    }

    /// A thread an element of rows of `width`.
    fn elements(&mut self, kernel: &'static str, width: usize, rows: usize, args: Vec<Arg>) {
        self.push(kernel, [width.div_ceil(THREADS as usize), rows, 1], THREADS, args);
    }

    fn slot(&self, slot: SlotId) -> Pointer {
        self.plan.slots[slot.index()]
    }

    fn width(&self, slot: SlotId) -> usize {
        self.program.slots[slot.index()].width
    }

    fn vector(&self, weight: WeightId) -> Option<Pointer> {
        self.plan.weights[weight.index()].vector
    }

    /// Where the step's number of a slot's rows is, and how many there are at most.
    fn count(&self, slot: SlotId) -> (Pointer, usize) {
        let inputs = &self.plan.inputs;
        match self.program.slots[slot.index()].rows {
            Rows::Tokens => (inputs.counts(), self.rows.tokens),
            Rows::Outputs => (inputs.output_count(), self.rows.outputs),
        }
    }
}

/// Whether `columns` columns from a multiple of them on are whole blocks, in order.
fn is_whole_blocks(tiles: &Tiles, columns: usize) -> bool {
    tiles.source.is_none() && columns.is_multiple_of(tiles.blocks.block)
}
