//! From a program to what the team does: phases, where each slot lies, which barriers are needed.
//!
//! A linear over quantized weights becomes two phases, quantize and multiply. Phases that treat
//! each row by itself and split rows alike are a chain: they need no barrier between them, and a few
//! rows go through all of them before the next few. Not here: running ([`super::exec`]). Input: a
//! validated program.

use super::matmul;
use super::share::Place;
use super::simd::LANES;
use super::store::Stored;
use crate::backend::RowCounts;
use crate::program::{Op, Program, RopeId, Rows, SlotId, SlotView, WeightId};
use crate::{StepLimits, memory};
use std::ops::Range;

/// Something all members do together, each its share.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Phase {
    /// Sine and cosine tables of the step's tokens.
    RopeTables,
    /// Activations of a linear to int8.
    Quantize {
        x: SlotId,
        weight: WeightId,
        /// Split by rows as its predecessor; otherwise by blocks.
        by_rows: bool,
    },
    /// An activation and then its results to int8: columns that are still in the first-level cache.
    ActivateQuantize { x: SlotId, out: SlotId, weight: WeightId },
    /// The op itself.
    Op(Op),
}

/// A phase and whether a barrier follows it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Planned {
    pub(crate) phase: Phase,
    pub(crate) barrier: bool,
}

/// Phases without a barrier between them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chain {
    pub(crate) phases: Range<usize>,
    /// What rows all of them split; none if that is not so.
    pub(crate) rows: Option<Rows>,
}

/// Everything about a program that is the same at every step.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) phases: Vec<Planned>,
    /// Phases up to the next barrier, and whose rows they split if there are several.
    pub(crate) chains: Vec<Chain>,
    slots: Vec<SlotPlace>,
    /// Elements of the slot arena.
    pub(crate) arena: usize,
    ropes: Vec<Place>,
    /// Elements of the rotary tables.
    pub(crate) rope_len: usize,
    /// Quads and blocks of the longest quantized input.
    pub(crate) quads: usize,
    pub(crate) blocks: usize,
}

#[derive(Debug)]
struct SlotPlace {
    rows: Rows,
    place: Place,
}

/// Columns of an activation that one item covers.
pub(crate) const ACTIVATE_COLUMNS: usize = 512;

/// Elements from one row of a slot to the next. Columns of a matrix whose rows are a multiple of some
/// KiB apart would fall into a few sets of the caches, which then hold the rows of none.
fn stride(width: usize) -> usize {
    const SETS: usize = 256;
    if width.is_multiple_of(SETS) { width + LANES } else { width }
}

impl Plan {
    /// Plans a validated program whose weights are stored as `weights`.
    pub(crate) fn new(program: &Program, weights: &[Stored], limits: &StepLimits) -> Self {
        let layout = memory::plan(program, limits, stride);
        let most = RowCounts::most(limits);
        let slots = program.slots.iter().zip(layout.offsets).map(|(decl, offset)| {
            let (rows, width) = (most.of(decl.rows), decl.width);
            let place = Place { offset, stride: stride(width), rows, width };
            SlotPlace { rows: decl.rows, place }
        });
        let mut plan = Self {
            phases: phases(program, weights),
            chains: vec![],
            slots: slots.collect(),
            arena: layout.len,
            ropes: vec![],
            rope_len: 0,
            quads: 0,
            blocks: 0,
        };
        plan.place_ropes(program, limits);
        plan.size_scratch(weights, most);
        plan.drop_barriers();
        plan.chains = plan.chains();
        plan
    }

    fn place_ropes(&mut self, program: &Program, limits: &StepLimits) {
        for rope in &program.ropes {
            let (offset, width, rows) = (self.rope_len, rope.width, limits.tokens);
            self.ropes.push(Place { offset, stride: width, rows, width });
            self.rope_len += rows * width;
        }
    }

    fn size_scratch(&mut self, weights: &[Stored], most: RowCounts) {
        for planned in &self.phases {
            let (Phase::Quantize { x, weight, .. } | Phase::ActivateQuantize { x, weight, .. }) =
                planned.phase
            else {
                continue;
            };
            let Some(packed) = weights[weight.index()].packed() else { continue };
            let rows = matmul::padded_rows(most.of(self.rows(x)), &packed.blocks);
            self.quads = self.quads.max(rows * packed.blocks.width() / 4);
            self.blocks = self.blocks.max(rows * packed.blocks.count);
        }
    }

    /// Removes barriers inside chains of row-by-row phases.
    fn drop_barriers(&mut self) {
        let mut chain: Vec<SlotId> = vec![];
        for i in 1..self.phases.len() {
            let (before, after) = (&self.phases[i - 1].phase, &self.phases[i].phase);
            chain.extend(touched(before));
            let alike = self.row_split(before).is_some_and(|a| self.row_split(after) == Some(a));
            let joined = alike && written(after).iter().all(|slot| !self.overlaps(*slot, &chain));
            if joined {
                self.phases[i - 1].barrier = false;
                if let Phase::Quantize { by_rows, .. } = &mut self.phases[i].phase {
                    *by_rows = true;
                }
            } else {
                chain.clear();
            }
        }
    }

    /// All phases by chains.
    fn chains(&self) -> Vec<Chain> {
        let mut chains = vec![];
        let mut start = 0;
        for (i, planned) in self.phases.iter().enumerate().filter(|(_, planned)| planned.barrier) {
            let rows = match planned.phase {
                Phase::Quantize { by_rows: false, .. } => None,
                ref phase => self.row_split(phase),
            };
            chains.push(Chain { phases: start..i + 1, rows });
            start = i + 1;
        }
        chains
    }

    /// Whose rows a phase splits, if it reads and writes nothing but the rows of each member.
    fn row_split(&self, phase: &Phase) -> Option<Rows> {
        match phase {
            Phase::RopeTables => Some(Rows::Tokens),
            Phase::Quantize { x, .. } => Some(self.rows(*x)),
            Phase::ActivateQuantize { .. } => None,
            Phase::Op(op) => match op {
                Op::Embed { .. } | Op::Norm { .. } | Op::HeadNorm { .. } => Some(Rows::Tokens),
                Op::Rope { .. } | Op::KvWrite { .. } => Some(Rows::Tokens),
                Op::Linear { .. } | Op::Attend { .. } => None,
                Op::Activate { .. } | Op::Gather { .. } => None,
            },
        }
    }

    /// Whether `slot` shares memory with another slot of `others`: a member that is ahead would
    /// write rows that one behind still reads.
    fn overlaps(&self, slot: SlotId, others: &[SlotId]) -> bool {
        let range = |slot: SlotId| -> Range<usize> {
            let Place { offset, rows, stride, .. } = self.slots[slot.index()].place;
            offset..offset + rows * stride
        };
        let mine = range(slot);
        others.iter().any(|&other| {
            let other_range = range(other);
            other != slot && mine.start < other_range.end && other_range.start < mine.end
        })
    }

    /// What kind of rows a slot has.
    pub(crate) fn rows(&self, slot: SlotId) -> Rows {
        self.slots[slot.index()].rows
    }

    /// Where the rows of a slot lie in a step.
    pub(crate) fn place(&self, slot: SlotId, counts: RowCounts) -> Place {
        let SlotPlace { rows, place } = &self.slots[slot.index()];
        place.slice(0..counts.of(*rows))
    }

    /// Where the columns of a view lie in a step.
    pub(crate) fn view(&self, view: SlotView, counts: RowCounts) -> Place {
        self.place(view.slot, counts).columns(view.start, view.width)
    }

    /// Where the table of a rope lies in a step.
    pub(crate) fn rope(&self, rope: RopeId, counts: RowCounts) -> Place {
        self.ropes[rope.index()].slice(0..counts.tokens)
    }
}

/// All phases, each with a barrier.
fn phases(program: &Program, weights: &[Stored]) -> Vec<Planned> {
    let mut phases = vec![];
    let mut push = |phase| phases.push(Planned { phase, barrier: true });
    if !program.ropes.is_empty() {
        push(Phase::RopeTables);
    }
    let mut quantized = None;
    for (i, step) in program.steps.iter().enumerate() {
        let next = program.steps.get(i + 1).map(|next| &next.op);
        match step.op {
            Op::Activate { x, out, .. } if let Some(weight) = follows(out, next, weights) => {
                push(Phase::ActivateQuantize { x, out, weight });
                quantized = Some(i + 1);
                continue;
            }
            Op::Linear { x, weight, .. }
                if weights[weight.index()].packed().is_some() && quantized != Some(i) =>
            {
                push(Phase::Quantize { x, weight, by_rows: false });
            }
            _ => {}
        }
        push(Phase::Op(step.op.clone()));
    }
    phases
}

/// The weight of a linear over `x` whose blocks are those of the columns in order, some to a part of
/// an activation.
fn follows(x: SlotId, next: Option<&Op>, weights: &[Stored]) -> Option<WeightId> {
    let Some(&Op::Linear { x: read, weight, .. }) = next else { return None };
    let blocks = &weights[weight.index()].packed()?.blocks;
    let in_order = blocks.source.is_none() && ACTIVATE_COLUMNS.is_multiple_of(blocks.block);
    (read == x && in_order).then_some(weight)
}

fn touched(phase: &Phase) -> Vec<SlotId> {
    match phase {
        Phase::RopeTables => vec![],
        Phase::Quantize { x, .. } => vec![*x],
        Phase::ActivateQuantize { x, out, .. } => vec![*x, *out],
        Phase::Op(op) => [op.reads(), op.writes()].concat(),
    }
}

fn written(phase: &Phase) -> Vec<SlotId> {
    match phase {
        Phase::RopeTables | Phase::Quantize { .. } => vec![],
        Phase::ActivateQuantize { out, .. } => vec![*out],
        Phase::Op(op) => op.writes(),
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
