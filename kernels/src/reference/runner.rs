//! Walks the steps: which slots, sequences and positions each op touches.
//!
//! Not here: arithmetic ([`super::ops`]). Programs and inputs are validated before they get here.

use super::cache::KvCache;
use super::{Matrix, ops, rope};
use crate::backend::{RowCounts, RunnerMemory};
use crate::program::{Heads, KvLayer, Mask, Op, RopeId, SlotId, SlotView, WeightId};
use crate::{Error, Program, Runner, StepInput, StepLimits, StepOutput, validate};
use std::ops::Range;

/// A program with dequantized weights; every slot has its own memory.
#[derive(Debug)]
pub(super) struct ReferenceRunner {
    program: Program,
    limits: StepLimits,
    weights: Vec<Matrix>,
    /// `[most rows, width]` each.
    slots: Vec<Vec<f32>>,
    kv: Vec<KvCache>,
    /// Rows of the last step.
    counts: RowCounts,
}

impl ReferenceRunner {
    pub(super) fn new(program: &Program, weights: Vec<Matrix>, limits: &StepLimits) -> Self {
        let most = RowCounts::most(limits);
        let slots = program.slots.iter().map(|s| vec![0.0; most.of(s.rows) * s.width]);
        Self {
            program: program.clone(),
            limits: *limits,
            weights,
            slots: slots.collect(),
            kv: program.kv.iter().map(|decl| KvCache::new(*decl, limits)).collect(),
            counts: RowCounts::default(),
        }
    }

    fn run(&mut self, op: &Op, input: &StepInput<'_>) {
        match *op {
            Op::Embed { table, out } => {
                self.update(out, |this, out| ops::embed(this.weight(table), input.tokens, out));
            }
            Op::Norm { x, add, weight, eps, out } => self.norm([x, out], add, weight, eps),
            Op::Linear { x, weight, bias, out } => self.linear(x, weight, bias, out),
            Op::HeadNorm { heads, weight, eps } => self.update_heads(heads, |this, _, head_e| {
                ops::norm(head_e, this.vector(weight), eps);
            }),
            Op::Rope { heads, rope } => self.rope(heads, rope, input),
            Op::KvWrite { layer, k, v } => self.kv_write(layer, [k, v], input),
            Op::Attend { q, layer, mask, scale, out } => {
                self.update(out, |this, out| {
                    this.attend(q, &this.kv[layer.index()], (mask, scale), input, out);
                });
            }
            Op::Activate { kind, x, out } => self.update(out, |this, out| {
                let f = this.width(x) / 2;
                for (x_2f, out_f) in this.slot(x).chunks_exact(2 * f).zip(out.chunks_exact_mut(f)) {
                    ops::activate(kind, x_2f, out_f);
                }
            }),
            Op::Gather { x, out } => self.update(out, |this, out| {
                ops::gather(this.slot(x), input.output_rows, this.width(x), out);
            }),
        }
    }

    fn norm(&mut self, [x, out]: [SlotId; 2], add: Option<SlotId>, weight: WeightId, eps: f32) {
        if let Some(add) = add {
            self.update(x, |this, x| ops::add(x, this.slot(add)));
        }
        self.update(out, |this, out| {
            out.copy_from_slice(this.slot(x));
            for out_d in out.chunks_exact_mut(this.width(x)) {
                ops::norm(out_d, this.vector(weight), eps);
            }
        });
    }

    fn linear(&mut self, x: SlotId, weight: WeightId, bias: Option<WeightId>, out: SlotView) {
        let y_rn = ops::linear(self.slot(x), self.weight(weight), bias.map(|b| self.vector(b)));
        self.update(out.slot, |this, slot| {
            let width = this.width(out.slot);
            for (y_n, row) in y_rn.chunks_exact(out.width).zip(slot.chunks_exact_mut(width)) {
                row[out.start..][..out.width].copy_from_slice(y_n);
            }
        });
    }

    fn rope(&mut self, heads: Heads, rope: RopeId, input: &StepInput<'_>) {
        self.update_heads(heads, |this, row, head_e| {
            let decl = &this.program.ropes[rope.index()];
            let speeds = rope::speeds(decl, input.rope_lens[row]);
            ops::rotate(head_e, input.positions[row], &speeds, decl.amplitude);
        });
    }

    fn kv_write(&mut self, layer: KvLayer, [k, v]: [Heads; 2], input: &StepInput<'_>) {
        let widths = [k, v].map(|heads| self.width(heads.slot));
        let slots = [k, v].map(|heads| &self.slots[heads.slot.index()]);
        let cache = &mut self.kv[layer.index()];
        for (row, sequence) in owners(input) {
            let k_ge = &slots[0][row * widths[0]..][columns(k)];
            let v_ge = &slots[1][row * widths[1]..][columns(v)];
            cache.write(input.block_tables.of(sequence), input.positions[row], k_ge, v_ge);
        }
    }

    fn attend(
        &self,
        q: Heads,
        kv: &KvCache,
        (mask, scale): (Mask, f32),
        input: &StepInput<'_>,
        out_the: &mut [f32],
    ) {
        let rows = out_the.chunks_exact_mut(q.count * q.width);
        let q_rows = self.slot(q.slot).chunks_exact(self.width(q.slot));
        for (((row, sequence), out_he), q_row) in owners(input).zip(rows).zip(q_rows) {
            let table = input.block_tables.of(sequence);
            let seen = || ops::visible(mask, input.positions[row]);
            let q_heads = q_row[columns(q)].chunks_exact(q.width);
            for (i, (q_e, out_e)) in q_heads.zip(out_he.chunks_exact_mut(q.width)).enumerate() {
                let head = i * kv.heads() / q.count;
                let keys = seen().map(|p| kv.key(table, p, head));
                let values = seen().map(|p| kv.value(table, p, head));
                ops::attend(q_e, keys, values, scale, out_e);
            }
        }
    }

    fn weight(&self, id: WeightId) -> &Matrix {
        &self.weights[id.index()]
    }

    /// A weight of one row.
    fn vector(&self, id: WeightId) -> &[f32] {
        self.weight(id).row(0)
    }

    fn width(&self, slot: SlotId) -> usize {
        self.program.slots[slot.index()].width
    }

    /// Elements of a slot that this step uses.
    fn used(&self, slot: SlotId) -> usize {
        let decl = &self.program.slots[slot.index()];
        self.counts.of(decl.rows) * decl.width
    }

    /// The rows of this step.
    fn slot(&self, slot: SlotId) -> &[f32] {
        &self.slots[slot.index()][..self.used(slot)]
    }

    /// Changes the rows of this step with the rest of the runner at hand; the slot itself is
    /// out of reach meanwhile, which no op needs.
    fn update(&mut self, slot: SlotId, change: impl FnOnce(&Self, &mut [f32])) {
        let mut taken = std::mem::take(&mut self.slots[slot.index()]);
        change(self, &mut taken[..self.used(slot)]);
        self.slots[slot.index()] = taken;
    }

    /// Changes every head of every row; `change` gets the row's index and the head.
    fn update_heads(&mut self, heads: Heads, change: impl Fn(&Self, usize, &mut [f32])) {
        self.update(heads.slot, |this, slot| {
            for (row, values) in slot.chunks_exact_mut(this.width(heads.slot)).enumerate() {
                for head_e in values[columns(heads)].chunks_exact_mut(heads.width) {
                    change(this, row, head_e);
                }
            }
        });
    }
}

impl Runner for ReferenceRunner {
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
        validate::input(&self.program, &self.limits, input)?;
        self.counts = RowCounts::new(input);
        for i in 0..self.program.steps.len() {
            let op = self.program.steps[i].op.clone();
            self.run(&op, input);
        }
        output.chosen.clear();
        output.logits.clear();
        output.logits.extend_from_slice(self.slot(self.program.logits));
        Ok(())
    }

    fn read_slot(&mut self, slot: SlotId, out: &mut Vec<f32>) -> Result<(), Error> {
        validate::traced(&self.program, &self.limits, slot)?;
        out.clear();
        out.extend_from_slice(self.slot(slot));
        Ok(())
    }

    fn memory(&self) -> RunnerMemory {
        RunnerMemory {
            weights_bytes: self.weights.iter().map(|w| size_of_val(&*w.values_nk)).sum(),
            slots_bytes: self.slots.iter().map(|slot| size_of_val(&**slot)).sum(),
            kv_bytes: self.kv.iter().map(KvCache::bytes).sum(),
        }
    }

    fn poison(&mut self, live: &[usize]) {
        self.kv.iter_mut().for_each(|kv| kv.poison(live));
        self.slots.iter_mut().for_each(|slot| slot.fill(f32::NAN));
    }
}

/// Columns of all heads.
fn columns(heads: Heads) -> Range<usize> {
    heads.start..heads.start + heads.count * heads.width
}

/// Every token row with its sequence.
fn owners(input: &StepInput<'_>) -> impl Iterator<Item = (usize, usize)> {
    let sequence_of = |row: usize| input.query_ends.partition_point(|end| *end as usize <= row);
    (0..input.tokens.len()).map(move |row| (row, sequence_of(row)))
}
