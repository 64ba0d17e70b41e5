//! From a program to what the team does: phases, where each slot lies, which barriers are needed.
//!
//! A linear over quantized weights becomes two phases, quantize and multiply. Attention quantizes what
//! it writes, and gates what they let pass, where the next linear takes columns in order; then slots that
//! nobody else reads are not written. Phases that treat each row by itself and split rows alike are a
//! chain: they need no barrier between them, and a few rows go through all of them before the next few.
//! Not here: running ([`super::exec`]). Input: a validated program.

use super::matmul;
use super::packed::PAIRED;
use super::share::Place;
use super::simd::LANES;
use super::store::Stored;
use crate::backend::RowCounts;
use crate::program::{Op, Program, RopeId, Rows, SlotId, SlotView, WeightId};
use crate::{StepLimits, joins, memory};
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
    /// A linear that gates and its activation: a member takes gates and what belongs to them side by side, in
    /// memory of its own. Results go to int8 if the next linear takes them so and nobody else does.
    Gated { gates: Linear, out: SlotId, next: Option<WeightId> },
    /// The op itself.
    Op(Op),
}

/// The inputs of [`Op::Linear`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Linear {
    pub(crate) x: SlotId,
    pub(crate) weight: WeightId,
    pub(crate) bias: Option<WeightId>,
}

/// A phase and whether a barrier follows it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Planned {
    pub(crate) phase: Phase,
    /// The weight of the next linear if attention makes int8 of its results for it.
    pub(crate) next: Option<WeightId>,
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
    /// Quads and blocks of the longest quantized inputs: of one, and of what gates let pass.
    pub(crate) quads: usize,
    pub(crate) blocks: usize,
    /// Elements that a member has for gates.
    pub(crate) gate_room: usize,
}

#[derive(Debug)]
struct SlotPlace {
    rows: Rows,
    place: Place,
    /// Where its quads and scales lie. What gates let pass has other ones than the rows that gate, which
    /// other members still read.
    int8: Int8Place,
}

/// The first quad and the first scale of a quantized slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Int8Place {
    pub(crate) quads: usize,
    pub(crate) blocks: usize,
}

/// Elements of gates and what belongs to them that a member takes at a time: half a MiB, which stays in the
/// second-level cache beside what is multiplied.
const GATE_ROOM: usize = 1 << 17;

/// Elements from one row of a slot to the next. Columns of a matrix whose rows are a multiple of some
/// KiB apart would fall into a few sets of the caches, which then hold the rows of none.
pub(crate) fn stride(width: usize) -> usize {
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
            SlotPlace { rows: decl.rows, place, int8: Int8Place::default() }
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
            gate_room: 0,
        };
        plan.place_ropes(program, limits);
        plan.place_int8(weights, most);
        plan.size_gates(program, most);
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

    fn place_int8(&mut self, weights: &[Stored], most: RowCounts) {
        let gated: Vec<SlotId> = self.phases.iter().filter_map(|planned| planned.gated()).collect();
        let mut lengths = [Int8Place::default(); 2];
        for (x, weight) in self.phases.iter().filter_map(Planned::quantizes) {
            let Some(packed) = weights[weight.index()].packed() else { continue };
            let rows = matmul::padded_rows(most.of(self.rows(x)), &packed.blocks);
            let length = &mut lengths[usize::from(gated.contains(&x))];
            length.quads = length.quads.max(rows * packed.blocks.width() / 4);
            length.blocks = length.blocks.max(rows * packed.blocks.count);
        }
        let [plain, passed] = lengths;
        gated.into_iter().for_each(|slot| self.slots[slot.index()].int8 = plain);
        self.quads = plain.quads + passed.quads;
        self.blocks = plain.blocks + passed.blocks;
    }

    fn size_gates(&mut self, program: &Program, most: RowCounts) {
        for planned in &self.phases {
            let Phase::Gated { out, .. } = planned.phase else { continue };
            let rows = most.of(self.rows(out));
            let (least, all) = (2 * PAIRED, 2 * program.slots[out.index()].width);
            let room = |width| rows * stride(width);
            self.gate_room = self.gate_room.max(GATE_ROOM.min(room(all)).max(room(least)));
        }
    }

    /// How many times [`PAIRED`] gates a member takes at a time, all `rows` rows of them.
    pub(crate) fn gates_together(&self, rows: usize) -> usize {
        // A row may begin some elements later than the one before it ends.
        let width = (self.gate_room / rows.max(1)).saturating_sub(LANES);
        (width / (2 * PAIRED)).max(1)
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
            Phase::Gated { .. } => None,
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
        let SlotPlace { rows, place, .. } = &self.slots[slot.index()];
        place.slice(0..counts.of(*rows))
    }

    /// Where the int8 of a slot lies.
    pub(crate) fn int8(&self, slot: SlotId) -> Int8Place {
        self.slots[slot.index()].int8
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

impl Planned {
    /// What is quantized, and for which weight.
    fn quantizes(&self) -> Option<(SlotId, WeightId)> {
        match self.phase {
            Phase::Quantize { x, weight, .. } => Some((x, weight)),
            Phase::Gated { out, next, .. } => Some((out, next?)),
            Phase::Op(Op::Attend { out, .. }) => Some((out, self.next?)),
            Phase::RopeTables | Phase::Op(_) => None,
        }
    }

    /// What gates let pass, if it goes to int8.
    fn gated(&self) -> Option<SlotId> {
        if let Phase::Gated { out, next: Some(_), .. } = self.phase { Some(out) } else { None }
    }
}

/// All phases, each with a barrier.
fn phases(program: &Program, weights: &[Stored]) -> Vec<Planned> {
    let mut phases = vec![];
    let mut push = |phase, next| phases.push(Planned { phase, next, barrier: true });
    if !program.ropes.is_empty() {
        push(Phase::RopeTables, None);
    }
    // The next step, and the linear whose activations are int8 already.
    let (mut at, mut quantized) = (0, None);
    while let Some(step) = program.steps.get(at) {
        let mut steps = 1;
        match step.op {
            Op::Linear { x, weight, bias, .. } => {
                let packed = weights[weight.index()].packed();
                if packed.is_some() && quantized != Some(at) {
                    push(Phase::Quantize { x, weight, by_rows: false }, None);
                }
                match joins::activated(program, at).filter(|_| packed.is_some_and(|w| w.paired)) {
                    Some(out) => {
                        let next = passed(program, weights, at + 2, out);
                        push(Phase::Gated { gates: Linear { x, weight, bias }, out, next }, None);
                        (steps, quantized) = (2, next.map(|_| at + 2));
                    }
                    None => push(Phase::Op(step.op.clone()), None),
                }
            }
            Op::Attend { q, out, .. } => {
                let next = reader(program, weights, at + 1, (out, q.width));
                quantized = next.map(|_| at + 1);
                push(Phase::Op(step.op.clone()), next);
            }
            _ => push(Phase::Op(step.op.clone()), None),
        }
        at += steps;
    }
    phases
}

/// The weight of the linear at step `at`, if it alone reads what gates let pass, as it comes.
fn passed(program: &Program, weights: &[Stored], at: usize, x: SlotId) -> Option<WeightId> {
    let next = reader(program, weights, at, (x, PAIRED))?;
    let whole = SlotView { slot: x, start: 0, width: program.slots[x.index()].width };
    let tiles = weights[next.index()].packed()?.blocks.block.is_multiple_of(LANES);
    (tiles && !joins::is_read(program, at, whole)).then_some(next)
}

/// The weight of the linear at step `at`, if it is one over `x` whose blocks are those of its columns in
/// order, some to each `columns`.
fn reader(
    program: &Program,
    weights: &[Stored],
    at: usize,
    (x, columns): (SlotId, usize),
) -> Option<WeightId> {
    let Op::Linear { x: read, weight, .. } = program.steps.get(at)?.op else { return None };
    let blocks = &weights[weight.index()].packed()?.blocks;
    let in_order = blocks.source.is_none() && columns.is_multiple_of(blocks.block);
    (read == x && in_order).then_some(weight)
}

fn touched(phase: &Phase) -> Vec<SlotId> {
    match phase {
        Phase::RopeTables => vec![],
        Phase::Quantize { x, .. } => vec![*x],
        Phase::Gated { gates, out, .. } => vec![gates.x, *out],
        Phase::Op(op) => [op.reads(), op.writes()].concat(),
    }
}

fn written(phase: &Phase) -> Vec<SlotId> {
    match phase {
        Phase::RopeTables | Phase::Quantize { .. } => vec![],
        Phase::Gated { out, .. } => vec![*out],
        Phase::Op(op) => op.writes(),
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
