//! Where each slot lies in one arena of f32: slots that are never live together share memory.
//!
//! A slot is live from the first step that touches it to the last one; the logits stay live to
//! the end. Slots are coloured greedily in the order they come to life, each at the lowest offset
//! where it fits between the slots live beside it.
//!
//! Not here: KV memory and weights, which never share; allocation itself. Input: a validated
//! program.

use crate::StepLimits;
use crate::program::{Program, Rows, SlotDecl, SlotId};
use std::ops::Range;

/// Slots start at multiples of this many f32 elements: 64 bytes, a cache line and an AVX-512
/// vector.
const ALIGN: usize = 16;

/// Offsets of all slots in one arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Offset of each slot by [`SlotId`], in f32 elements, a multiple of 16.
    pub offsets: Vec<usize>,
    /// Elements of the arena.
    pub len: usize,
}

/// Lays out the slots of a validated program, of which a row of `width` elements begins `stride(width)`
/// elements behind the one before it; with `limits.trace` no two slots share memory.
pub fn plan(program: &Program, limits: &StepLimits, stride: impl Fn(usize) -> usize) -> Plan {
    let lives = lifetimes(program, limits.trace);
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&slot| lives[slot].start);
    let mut places: Vec<Range<usize>> = vec![0..0; lives.len()];
    for (at, &slot) in order.iter().enumerate() {
        let beside = order[..at].iter().filter(|&&other| overlap(&lives[slot], &lives[other]));
        let taken = beside.map(|&other| places[other].clone()).collect();
        places[slot] = first_fit(slot_len(&program.slots[slot], limits, &stride), taken);
    }
    Plan {
        offsets: places.iter().map(|place| place.start).collect(),
        len: places.iter().map(|place| place.end).max().unwrap_or(0),
    }
}

/// Elements of a slot at its most rows.
fn slot_len(slot: &SlotDecl, limits: &StepLimits, stride: impl Fn(usize) -> usize) -> usize {
    let rows = match slot.rows {
        Rows::Tokens => limits.tokens,
        Rows::Outputs => limits.outputs,
    };
    rows * stride(slot.width)
}

/// Steps at which each slot holds something; an untouched slot has an empty range.
fn lifetimes(program: &Program, trace: bool) -> Vec<Range<usize>> {
    let end = program.steps.len() + 1;
    if trace {
        return vec![0..end; program.slots.len()];
    }
    let mut lives = vec![end..end; program.slots.len()];
    let mut touch = |slot: SlotId, step: usize| {
        let life = &mut lives[slot.index()];
        *life = if life.start == end { step..step + 1 } else { life.start..step + 1 };
    };
    for (i, step) in program.steps.iter().enumerate() {
        step.op.reads().into_iter().chain(step.op.writes()).for_each(|slot| touch(slot, i));
    }
    touch(program.logits, end - 1);
    lives
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// The lowest aligned place of `len` elements that avoids all `taken` places.
fn first_fit(len: usize, mut taken: Vec<Range<usize>>) -> Range<usize> {
    taken.sort_by_key(|place| place.start);
    let mut start = 0;
    for place in taken {
        if start + len <= place.start {
            break;
        }
        start = start.max(place.end.next_multiple_of(ALIGN));
    }
    start..start + len
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{Activation, Op, SlotView, Step, WeightId};
    use proptest::prelude::*;

    const LIMITS: StepLimits = StepLimits {
        tokens: 5,
        sequences: 2,
        outputs: 3,
        blocks: 1,
        block_len: 16,
        context_len: 16,
        trace: false,
    };

    /// Rows that are a little apart.
    fn wide(width: usize) -> usize {
        width + width % 3
    }

    fn slot(id: u32) -> SlotId {
        SlotId(id)
    }

    /// Planning looks at slots and steps only; shapes need not agree.
    fn program(slots: Vec<(Rows, usize)>, ops: Vec<Op>, logits: u32) -> Program {
        let decl = |(i, (rows, width))| SlotDecl { label: format!("s{i}"), rows, width };
        let step = |(i, op)| Step { op, label: format!("step{i}") };
        Program {
            weights: vec![],
            slots: slots.into_iter().enumerate().map(decl).collect(),
            ropes: vec![],
            kv: vec![],
            steps: ops.into_iter().enumerate().map(step).collect(),
            logits: SlotId(logits),
        }
    }

    fn activate(x: u32, out: u32) -> Op {
        Op::Activate { kind: Activation::Silu, x: slot(x), out: slot(out) }
    }

    /// An op over three slots: what it reads and writes is all that matters.
    fn op((kind, [a, b, c]): (u8, [u32; 3])) -> Op {
        let (weight, eps) = (WeightId(0), 0.0);
        match kind {
            0 => Op::Embed { table: weight, out: slot(a) },
            1 => Op::Norm { x: slot(a), add: Some(slot(b)), weight, eps, out: slot(c) },
            2 => Op::Gather { x: slot(a), out: slot(b) },
            3 => {
                let out = SlotView { slot: slot(b), start: 0, width: 1 };
                Op::Linear { x: slot(a), weight, bias: None, out }
            }
            _ => activate(a, b),
        }
    }

    fn any_program() -> impl Strategy<Value = Program> {
        (1..9u32).prop_flat_map(|n| {
            let rows = prop_oneof![Just(Rows::Tokens), Just(Rows::Outputs)];
            let slots = prop::collection::vec((rows, 1..40usize), n as usize);
            let ops = prop::collection::vec((0..5u8, [0..n, 0..n, 0..n]), 0..20);
            (slots, ops, 0..n).prop_map(|(slots, ops, logits)| {
                program(slots, ops.into_iter().map(op).collect(), logits)
            })
        })
    }

    /// Whether `slot` holds a value that matters between step `at` and the next one, found
    /// without lifetimes: touched at or before, and touched at or after.
    fn live_at(program: &Program, slot: SlotId, at: usize) -> bool {
        let touches =
            |step: &Step| step.op.reads().contains(&slot) || step.op.writes().contains(&slot);
        let is_logits = slot == program.logits;
        let before = program.steps[..=at].iter().any(touches);
        let after = is_logits || program.steps[at..].iter().any(touches);
        before && after
    }

    fn place(program: &Program, plan: &Plan, slot: usize) -> Range<usize> {
        let start = plan.offsets[slot];
        start..start + slot_len(&program.slots[slot], &LIMITS, wide)
    }

    proptest! {
        #[test]
        fn slots_live_together_never_overlap(program in any_program(), trace: bool) {
            let plan = plan(&program, &StepLimits { trace, ..LIMITS }, wide);
            let n = program.slots.len();
            for a in 0..n {
                let mine = place(&program, &plan, a);
                prop_assert!(mine.start.is_multiple_of(ALIGN) && mine.end <= plan.len);
                for b in 0..a {
                    let both = |at: &usize| {
                        [a, b].iter().all(|s| live_at(&program, slot(*s as u32), *at))
                    };
                    let together = trace || (0..program.steps.len()).any(|at| both(&at));
                    let apart = !overlap(&mine, &place(&program, &plan, b));
                    prop_assert!(apart || !together, "slots {} and {}: {:?}", a, b, plan);
                }
            }
        }

        #[test]
        fn sharing_never_costs_memory(program in any_program()) {
            let apart = StepLimits { trace: true, ..LIMITS };
            let [shared, apart] = [LIMITS, apart].map(|limits| plan(&program, &limits, wide).len);
            prop_assert!(shared <= apart.next_multiple_of(ALIGN));
        }
    }

    #[test]
    fn a_chain_needs_two_places() {
        let slots = vec![(Rows::Tokens, 16); 6];
        let ops = (0..5).map(|i| activate(i, i + 1)).collect();
        let chain = program(slots, ops, 5);
        let plan = plan(&chain, &LIMITS, |width| width);
        assert_eq!(plan.offsets, [0, 80, 0, 80, 0, 80]);
        assert_eq!(plan.len, 160);
    }

    #[test]
    fn logits_outlive_the_last_step() {
        let slots = vec![(Rows::Outputs, 8), (Rows::Tokens, 8), (Rows::Tokens, 8)];
        let ops = vec![activate(1, 0), activate(1, 2)];
        let plan = plan(&program(slots, ops, 0), &LIMITS, |width| width);
        assert_eq!(plan.offsets, [0, 32, 80]);
    }
}
