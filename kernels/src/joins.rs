//! Which steps of a program a backend may do at once: what is read of what they write, and when.
//!
//! Not here: how they are done (the backends' plans). Input: a validated program that is not traced,
//! since a trace shows what lies between.

use crate::program::{Activation, Heads, KvLayer, Op, Program, RopeId, SlotId, SlotView, WeightId};

/// Heads between their projection and attention.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HeadSteps {
    /// Norms of queries and keys: weight and epsilon.
    pub(crate) norms: [Option<(WeightId, f32)>; 2],
    /// Queries, then keys, which turn alike.
    pub(crate) turned: Heads,
    pub(crate) rope: RopeId,
    pub(crate) layer: KvLayer,
    pub(crate) k: Heads,
    pub(crate) v: Heads,
    /// How many steps these are.
    pub(crate) steps: usize,
}

/// The steps from `at` on, if they are norms of heads (up to two, or none), rotation and cache of the
/// same queries and keys.
pub(crate) fn head_steps(program: &Program, at: usize) -> Option<HeadSteps> {
    let ops = || program.steps[at..].iter().map(|step| &step.op);
    let count = ops().take(2).take_while(|op| matches!(op, Op::HeadNorm { .. })).count();
    let mut after = ops().skip(count);
    let (Some(&Op::Rope { heads: turned, rope }), Some(&Op::KvWrite { layer, k, v })) =
        (after.next(), after.next())
    else {
        return None;
    };
    let end = |heads: Heads| heads.view().start + heads.view().width;
    let is_last = k.slot == turned.slot && k.width == turned.width && end(k) == end(turned);
    if !is_last || k.count > turned.count || overlap(v.view(), turned.view()) {
        return None;
    }
    let q = Heads { count: turned.count - k.count, ..turned };
    let mut norms = [None; 2];
    for op in ops().take(count) {
        let Op::HeadNorm { heads, weight, eps } = *op else { return None };
        let of = [q, k].map(|part| heads == part || heads == turned);
        for (norm, _) in norms.iter_mut().zip(of).filter(|(_, of)| *of) {
            // A second norm of the same heads is left to a launch of its own.
            if norm.replace((weight, eps)).is_some() {
                return None;
            }
        }
        if of == [false; 2] {
            return None;
        }
    }
    Some(HeadSteps { norms, turned, rope, layer, k, v, steps: count + 2 })
}

/// The activated slot, if the step at `at` is a linear whose outputs, gates and what belongs to them,
/// are read by the activation behind it alone.
pub(crate) fn activated(program: &Program, at: usize) -> Option<SlotId> {
    let Op::Linear { out, .. } = program.steps[at].op else { return None };
    let Op::Activate { kind: Activation::Silu, x, out: to } = program.steps.get(at + 1)?.op else {
        return None;
    };
    let width = program.slots[out.slot.index()].width;
    let is_whole = out.slot == x && out.start == 0 && out.width == width;
    (is_whole && !is_read(program, at + 1, out)).then_some(to)
}

/// A norm and where its rows are, which it writes: what it adds to, and what it gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NormStep {
    pub(crate) stream: SlotId,
    pub(crate) out: SlotId,
    pub(crate) weight: WeightId,
    pub(crate) eps: f32,
}

/// The norm behind the linear at `at`, if it adds the linear's outputs, whole rows, to its stream.
pub(crate) fn normed(program: &Program, at: usize) -> Option<NormStep> {
    let Op::Linear { out, .. } = program.steps[at].op else { return None };
    let Op::Norm { x, add, weight, eps, out: to } = program.steps.get(at + 1)?.op else {
        return None;
    };
    let width = program.slots[out.slot.index()].width;
    let is_added = add == Some(out.slot) && out.start == 0 && out.width == width;
    is_added.then_some(NormStep { stream: x, out: to, weight, eps })
}

/// Whether every use of a weight is a linear whose outputs are [`activated`].
pub(crate) fn is_paired(program: &Program, weight: WeightId) -> bool {
    let mut uses = program.steps.iter().enumerate().filter(|(_, step)| match step.op {
        Op::Linear { weight: used, .. } => used == weight,
        _ => false,
    });
    uses.all(|(at, _)| activated(program, at).is_some())
}

/// Whether a step behind `at` reads of `view` what the steps up to `at` have left there.
pub(crate) fn is_read(program: &Program, at: usize, view: SlotView) -> bool {
    for step in &program.steps[at + 1..] {
        let whole = |slot| SlotView { slot, start: 0, width: usize::MAX };
        let read: Vec<SlotView> = match step.op {
            Op::HeadNorm { heads, .. } | Op::Rope { heads, .. } => vec![heads.view()],
            Op::KvWrite { k, v, .. } => vec![k.view(), v.view()],
            Op::Attend { q, .. } => vec![q.view()],
            _ => step.op.reads().into_iter().map(whole).collect(),
        };
        if read.into_iter().any(|read| overlap(read, view)) {
            return true;
        }
        let covers = match step.op {
            Op::Linear { out, .. } => {
                out.slot == view.slot
                    && out.start <= view.start
                    && view.start + view.width <= out.start + out.width
            }
            _ => step.op.writes().contains(&view.slot),
        };
        if covers {
            return false;
        }
    }
    view.slot == program.logits
}

fn overlap(a: SlotView, b: SlotView) -> bool {
    a.slot == b.slot
        && a.start < b.start.saturating_add(b.width)
        && b.start < a.start.saturating_add(a.width)
}
