//! One member's share of a phase: which rows, columns or items of which buffers it touches.
//!
//! This is the one place that hands out parts of shared memory. Every `unsafe` block rests on the
//! same three facts: a barrier separates phases that touch each other's parts ([`super::plan`]);
//! inside a phase members write disjoint rows, columns or items, by their index or because each
//! claims its own; no op reads the slot it writes, except in place in its own part, and slots that
//! live at once do not overlap (validation and [`crate::memory`]). Not here: arithmetic, which is all safe code.

use super::activate::{GatedSilu, PairedInt8, PairedSilu};
use super::attention::{Attend, item_size};
use super::dense::DenseLinear;
use super::grouped::{Activations, GroupedLinear, TILES_AT_LEAST};
use super::isa::Machine;
use super::kv::{KvCache, KvWrite};
use super::norm::{HeadNorm, Norm};
use super::packed::{PAIRED, Packed};
use super::plan::{Linear, Phase, Plan, stride};
use super::quantize::{BlockScale, Blocks, Quantize};
use super::rope::{Rotate, table_row};
use super::share::{MatMut, Place, Shared};
use super::simd::LANES;
use super::store::Stored;
use super::team::Member;
use crate::StepInput;
use crate::backend::RowCounts;
use crate::program::{Heads, KvLayer, Mask, Op, Program, RopeId, SlotId, SlotView, WeightId};
use std::ops::Range;
use std::sync::atomic::AtomicUsize;

/// Rows that go through a chain of phases together: what one phase wrote is still in the second-level
/// cache, or the first, when the next reads it.
const CHAIN_ROWS: usize = 8;

/// Columns of an activation that one item covers.
const ACTIVATE_COLUMNS: usize = 512;

/// All memory of a runner but the weights.
#[derive(Debug)]
pub(crate) struct Buffers {
    pub(crate) slots: Shared<f32>,
    /// Of each member as much room.
    pub(crate) gates: Shared<f32>,
    pub(crate) ropes: Shared<f32>,
    pub(crate) quads: Shared<i32>,
    pub(crate) scales: Shared<BlockScale>,
    pub(crate) kv: Vec<KvCache>,
}

/// The fields of [`Op::Attend`], and the weight that wants its results as int8.
#[derive(Debug, Clone, Copy)]
struct Attention<'a> {
    q: Heads,
    layer: KvLayer,
    mask: Mask,
    scale: f32,
    out: SlotId,
    next: Option<&'a Packed>,
}

/// One step as a member sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exec<'a> {
    pub(crate) machine: Machine,
    pub(crate) program: &'a Program,
    pub(crate) plan: &'a Plan,
    pub(crate) weights: &'a [Stored],
    pub(crate) buffers: &'a Buffers,
    pub(crate) input: &'a StepInput<'a>,
    pub(crate) counts: RowCounts,
    pub(crate) member: &'a Member<'a>,
    /// Of each phase, how many of its items are taken; all zero when the step begins.
    pub(crate) claimed: &'a [AtomicUsize],
}

impl Exec<'_> {
    /// Runs all phases.
    pub(crate) fn run(&self) {
        for chain in &self.plan.chains {
            match chain.rows {
                Some(rows) => {
                    let rows = self.member.share(self.counts.of(rows));
                    for start in rows.clone().step_by(CHAIN_ROWS) {
                        let rows = start..rows.end.min(start + CHAIN_ROWS);
                        chain.phases.clone().for_each(|phase| self.phase(phase, rows.clone()));
                    }
                }
                None => chain.phases.clone().for_each(|phase| self.phase(phase, 0..0)),
            }
            self.member.wait();
        }
    }

    /// This member's share of a phase; of one that is split by rows, `rows` of them.
    fn phase(&self, phase: usize, rows: Range<usize>) {
        let (planned, claimed) = (&self.plan.phases[phase], &self.claimed[phase]);
        match planned.phase {
            Phase::RopeTables => self.rope_tables(rows),
            Phase::Quantize { x, weight, by_rows } => {
                self.quantize(x, weight, by_rows.then_some(rows));
            }
            Phase::Gated { ref gates, out, next } => {
                let next = next.and_then(|next| self.weight(next).packed());
                self.gated(gates, out, next, claimed);
            }
            Phase::Op(Op::Embed { table, out }) => self.embed(table, out, rows),
            Phase::Op(Op::Norm { x, add, weight, eps, out }) => {
                self.norm([x, out], add, (weight, eps), rows);
            }
            Phase::Op(Op::Linear { x, weight, bias, out }) => {
                let (linear, out) = (Linear { x, weight, bias }, self.view(out));
                let tiles = out.width.div_ceil(LANES);
                self.member.claim(tiles, TILES_AT_LEAST, claimed, |tiles| {
                    let first = tiles.start * LANES;
                    let own = out.columns(first, out.width.min(tiles.end * LANES) - first);
                    // SAFETY: a member writes the columns of tiles that it alone has claimed.
                    let out = unsafe { self.buffers.slots.mat_mut(own) };
                    self.linear(&linear, tiles, out);
                });
            }
            Phase::Op(Op::HeadNorm { heads, weight, eps }) => {
                self.head_norm(heads, weight, eps, rows);
            }
            Phase::Op(Op::Rope { heads, rope }) => self.rope(heads, rope, rows),
            Phase::Op(Op::KvWrite { layer, k, v }) => self.kv_write(layer, k, v, rows),
            Phase::Op(Op::Attend { q, layer, mask, scale, out }) => {
                let next = planned.next.and_then(|next| self.weight(next).packed());
                self.attend_all(&Attention { q, layer, mask, scale, out, next }, claimed);
            }
            Phase::Op(Op::Activate { x, out, .. }) => self.activate(x, out),
            Phase::Op(Op::Gather { x, out }) => self.gather(x, out),
        }
    }

    fn kv(&self, layer: KvLayer) -> &KvCache {
        &self.buffers.kv[layer.index()]
    }

    fn weight(&self, id: WeightId) -> &Stored {
        &self.weights[id.index()]
    }

    fn place(&self, slot: SlotId) -> Place {
        self.plan.place(slot, self.counts)
    }

    fn view(&self, view: SlotView) -> Place {
        self.plan.view(view, self.counts)
    }

    fn rope_tables(&self, rows: Range<usize>) {
        for (i, decl) in self.program.ropes.iter().enumerate() {
            let place = self.plan.rope(RopeId(i as u32), self.counts).slice(rows.clone());
            // SAFETY: a member writes rows of its own tokens.
            let mut table = unsafe { self.buffers.ropes.mat_mut(place) };
            for (i, row) in rows.clone().enumerate() {
                let (position, length) = (self.input.positions[row], self.input.rope_lens[row]);
                table_row(decl, position, length, table.row(i));
            }
        }
    }

    fn embed(&self, table: WeightId, out: SlotId, rows: Range<usize>) {
        // SAFETY: a member writes rows of its own tokens.
        let mut out = unsafe { self.buffers.slots.mat_mut(self.place(out).slice(rows.clone())) };
        for (i, token) in self.input.tokens[rows].iter().enumerate() {
            self.weight(table).row(token.0 as usize, out.row(i));
        }
    }

    fn norm(
        &self,
        [x, out]: [SlotId; 2],
        add: Option<SlotId>,
        (weight, eps): (WeightId, f32),
        rows: Range<usize>,
    ) {
        let part = |slot| self.place(slot).slice(rows.clone());
        let slots = &self.buffers.slots;
        // SAFETY: a member touches its own rows of three different slots.
        let (x, add, out) = unsafe {
            let add = add.map(|add| slots.mat(part(add)));
            (slots.mat_mut(part(x)), add, slots.mat_mut(part(out)))
        };
        let weight = self.weight(weight).vector();
        self.machine.run(Norm { x, add, weight, eps, out });
    }

    /// Some rows of this member, or its share of all blocks.
    fn quantize(&self, x: SlotId, weight: WeightId, rows: Option<Range<usize>>) {
        let Some(packed) = self.weight(weight).packed() else { return };
        let count = packed.blocks.count;
        let items = match rows {
            Some(rows) => rows.start * count..rows.end * count,
            None => self.member.share(self.place(x).rows * count),
        };
        for row in items.start / count..items.end.div_ceil(count) {
            let first = row * count;
            let blocks = items.start.max(first) - first..items.end.min(first + count) - first;
            self.quantize_row(x, packed, row, blocks);
        }
    }

    /// Where some blocks of a row of a slot go.
    ///
    /// # Safety
    /// Nobody else may read or write them before the next barrier.
    unsafe fn int8(
        &self,
        x: SlotId,
        blocks: &Blocks,
        row: usize,
        items: Range<usize>,
    ) -> (MatMut<'_, i32>, MatMut<'_, BlockScale>) {
        let layout = self.machine.quad_layout(self.place(x).rows, blocks);
        let first = self.plan.int8(x);
        let own = |width, first| {
            let place = layout.row(row, blocks.count, width).slice(items.clone());
            Place { offset: first + place.offset, ..place }
        };
        let (quads, scales) = (own(blocks.block / 4, first.quads), own(1, first.blocks));
        // SAFETY: the caller's promise.
        unsafe { (self.buffers.quads.mat_mut(quads), self.buffers.scales.mat_mut(scales)) }
    }

    /// Some blocks of one row.
    fn quantize_row(&self, x: SlotId, packed: &Packed, row: usize, items: Range<usize>) {
        let (place, blocks) = (self.place(x), &packed.blocks);
        let columns = match blocks.source {
            None => items.start * blocks.block..items.end * blocks.block,
            Some(_) => 0..place.width,
        };
        let own = place.slice(row..row + 1).columns(columns.start, columns.len());
        // SAFETY: nobody else writes these columns of the row before the next barrier: either nobody
        // writes the slot at all, or this member the row, or these columns. A member writes quads
        // and scales of its own items.
        let (x, (quads, scales)) =
            unsafe { (self.buffers.slots.mat(own), self.int8(x, blocks, row, items.clone())) };
        self.machine.run(Quantize { x: x.row(0), blocks, items, quads, scales });
    }

    /// Some tiles of a linear, into columns of their own.
    fn linear(&self, linear: &Linear, tiles: Range<usize>, out: MatMut<'_>) {
        let (x, bias) = (self.place(linear.x), linear.bias);
        let bias = bias.map(|bias| self.weight(bias).vector());
        match self.weight(linear.weight) {
            Stored::Packed(weight) => {
                let layout = self.machine.quad_layout(x.rows, &weight.blocks);
                let blocks = layout.rows(x.rows) * weight.blocks.count;
                let quads = blocks * weight.blocks.block / 4;
                let first = self.plan.int8(linear.x);
                // SAFETY: nobody writes these quads or scales in this phase.
                let (quads, scales) = unsafe {
                    let quads = self.buffers.quads.read(first.quads..first.quads + quads);
                    (quads, self.buffers.scales.read(first.blocks..first.blocks + blocks))
                };
                let x = Activations { quads, scales, layout };
                let streams = self.machine.streams();
                self.machine.multiply(GroupedLinear { weight, bias, x, tiles, out, streams });
            }
            Stored::Tiles(weight) => {
                // SAFETY: nobody writes `x` in this phase; it is another slot than that of `out`.
                let x = unsafe { self.buffers.slots.mat(x) };
                self.machine.run(DenseLinear { weight, bias, x, tiles, out });
            }
            Stored::Rows(_) | Stored::Vector(_) => {}
        }
    }

    /// Gates that no other member has claimed, and what they let pass.
    fn gated(&self, gates: &Linear, out: SlotId, next: Option<&Packed>, claimed: &AtomicUsize) {
        let Place { rows, width, .. } = self.place(out);
        let most = self.plan.gates_together(rows);
        self.member.claim(width / PAIRED, 1, claimed, |all| {
            for start in all.clone().step_by(most) {
                self.gated_pairs(gates, out, next, start..all.end.min(start + most));
            }
        });
    }

    /// Some pairs of [`PAIRED`] columns of all rows, in the member's own room.
    fn gated_pairs(&self, gates: &Linear, out: SlotId, next: Option<&Packed>, pairs: Range<usize>) {
        let (slot, width) = (self.place(out), 2 * PAIRED * pairs.len());
        let offset = self.member.index() * self.plan.gate_room;
        let room = Place { offset, stride: stride(width), rows: slot.rows, width };
        let tiles = 2 * PAIRED / LANES;
        // SAFETY: a member alone touches its room.
        let gated = unsafe { self.buffers.gates.mat_mut(room) };
        self.linear(gates, pairs.start * tiles..pairs.end * tiles, gated);
        let columns = pairs.start * PAIRED..pairs.end * PAIRED;
        for row in 0..slot.rows {
            // SAFETY: a member alone touches its room, which it has written.
            let gated = unsafe { self.buffers.gates.mat(room.slice(row..row + 1)) };
            let pairs = gated.row(0);
            if let Some(Packed { blocks, .. }) = next {
                let block = blocks.block;
                let items = columns.start / block..columns.end / block;
                // SAFETY: a member writes quads and scales of blocks that it alone has claimed; they
                // are not those that are read in this phase ([`Plan::int8`]).
                let (quads, scales) = unsafe { self.int8(out, blocks, row, items) };
                self.machine.run(PairedInt8 { pairs, block, quads, scales });
            } else {
                let own = slot.slice(row..row + 1).columns(columns.start, columns.len());
                // SAFETY: a member writes columns that it alone has claimed; nobody reads the slot.
                let mut out = unsafe { self.buffers.slots.mat_mut(own) };
                self.machine.run(PairedSilu { pairs, out: out.row(0) });
            }
        }
    }

    fn head_norm(&self, heads: Heads, weight: WeightId, eps: f32, rows: Range<usize>) {
        let place = self.view(heads.view()).slice(rows);
        // SAFETY: a member touches rows of its own tokens.
        let heads = unsafe { self.buffers.slots.mat_mut(place) };
        self.machine.run(HeadNorm { heads, weight: self.weight(weight).vector(), eps });
    }

    fn rope(&self, heads: Heads, rope: RopeId, rows: Range<usize>) {
        let (head_width, place) = (heads.width, self.view(heads.view()).slice(rows.clone()));
        let table = self.plan.rope(rope, self.counts).slice(rows);
        // SAFETY: a member touches rows of its own tokens.
        let (heads, table) =
            unsafe { (self.buffers.slots.mat_mut(place), self.buffers.ropes.mat(table)) };
        self.machine.run(Rotate { heads, head_width, table });
    }

    fn kv_write(&self, layer: KvLayer, k: Heads, v: Heads, rows: Range<usize>) {
        let cache = self.kv(layer);
        let part = |heads: Heads| self.view(heads.view()).slice(rows.clone());
        // SAFETY: a member reads rows of its own tokens, which nobody else writes; nobody
        // reads the caches in this phase.
        let (k, v, keys, values) = unsafe {
            let slots = &self.buffers.slots;
            (slots.mat(part(k)), slots.mat(part(v)), cache.keys.sink(), cache.values.sink())
        };
        for (i, row) in rows.enumerate() {
            let position = self.input.positions[row] as usize;
            let table = self.input.block_tables.of(self.sequence(row));
            let shape = cache.shape;
            let (block, at) =
                (table[position / shape.block_len].index(), position % shape.block_len);
            let (k, v) = (k.row(i), v.row(i));
            self.machine.run(KvWrite { shape, block, at, k, v, keys, values });
        }
    }

    /// The sequence that owns a token row.
    fn sequence(&self, row: usize) -> usize {
        self.input.query_ends.partition_point(|end| *end as usize <= row)
    }

    /// Token rows of a sequence.
    fn rows_of(&self, sequence: usize) -> Range<usize> {
        let ends = self.input.query_ends;
        let start = if sequence == 0 { 0 } else { ends[sequence - 1] as usize };
        start..ends[sequence] as usize
    }

    /// Items of all sequences: some tokens of one sequence and query heads of one KV head.
    fn attend_all(&self, op: &Attention<'_>, claimed: &AtomicUsize) {
        let kv_heads = self.kv(op.layer).shape.heads;
        let shared = op.q.count / kv_heads;
        let sequences = 0..self.input.query_ends.len();
        let parts = |sequence, tokens| self.rows_of(sequence).len().div_ceil(tokens);
        let all = |tokens| sequences.clone().map(|s| parts(s, tokens)).sum::<usize>() * kv_heads;
        let [tokens, heads] = item_size(shared, self.member.count(), all);
        let splits = shared.div_ceil(heads);
        self.member.claim(all(tokens) * splits, 1, claimed, |items| {
            for item in items {
                let (mut left, group) = (item / (kv_heads * splits), item % (kv_heads * splits));
                let mut sequence = 0;
                while left >= parts(sequence, tokens) {
                    left -= parts(sequence, tokens);
                    sequence += 1;
                }
                // Later tokens see more: the longest items go first, which evens out the end.
                let (rows, part) = (self.rows_of(sequence), parts(sequence, tokens) - 1 - left);
                let first = rows.start + part * tokens;
                let rows = first..rows.end.min(first + tokens);
                let first = group % splits * heads;
                let (head, heads) = (group / splits, first..shared.min(first + heads));
                self.attend(op, (sequence, head), rows.clone(), heads.clone());
                if let Some(next) = op.next {
                    let column = |at| (head * shared + at) * op.q.width / next.blocks.block;
                    let blocks = column(heads.start)..column(heads.end);
                    rows.for_each(|row| self.quantize_row(op.out, next, row, blocks.clone()));
                }
            }
        });
    }

    /// One item: token rows of a sequence and some query heads of a KV head.
    fn attend(
        &self,
        op: &Attention<'_>,
        (sequence, head): (usize, usize),
        rows: Range<usize>,
        heads: Range<usize>,
    ) {
        let cache = self.kv(op.layer);
        let first = head * (op.q.count / cache.shape.heads) + heads.start;
        let columns = (first * op.q.width, heads.len() * op.q.width);
        let own = |place: Place| place.slice(rows.clone()).columns(columns.0, columns.1);
        let slots = &self.buffers.slots;
        // SAFETY: nobody writes `q` or the caches in this phase; an item writes its own columns
        // of its own rows, in another slot.
        let (q, out, keys, values) = unsafe {
            let q = slots.mat(own(self.view(op.q.view())));
            let out = slots.mat_mut(own(self.place(op.out)));
            (q, out, cache.keys.read_all(), cache.values.read_all())
        };
        self.machine.run(Attend {
            shape: cache.shape,
            keys,
            values,
            table: self.input.block_tables.of(sequence),
            head,
            position: self.input.positions[rows.start] as usize,
            mask: op.mask,
            scale: op.scale,
            q,
            out,
            heads: heads.len(),
        });
    }

    fn activate(&self, x: SlotId, to: SlotId) {
        let (x, out) = (self.place(x), self.place(to));
        let parts = out.width.div_ceil(ACTIVATE_COLUMNS);
        for item in self.member.share(out.rows * parts) {
            let (row, start) = (item / parts, item % parts * ACTIVATE_COLUMNS);
            let width = ACTIVATE_COLUMNS.min(out.width - start);
            let own = |place: Place, start| place.slice(row..row + 1).columns(start, width);
            let slots = &self.buffers.slots;
            // SAFETY: nobody writes `x` in this phase; an item writes its own columns of its own
            // row, in another slot.
            let (gate, up, mut out) = unsafe {
                let gate_up = (slots.mat(own(x, start)), slots.mat(own(x, out.width + start)));
                (gate_up.0, gate_up.1, slots.mat_mut(own(out, start)))
            };
            self.machine.run(GatedSilu { gate: gate.row(0), up: up.row(0), out: out.row(0) });
        }
    }

    fn gather(&self, x: SlotId, out: SlotId) {
        let rows = self.member.share(self.counts.outputs);
        let slots = &self.buffers.slots;
        // SAFETY: nobody writes `x` in this phase; a member writes its own rows of another slot.
        let (x, mut out) = unsafe {
            (slots.mat(self.place(x)), slots.mat_mut(self.place(out).slice(rows.clone())))
        };
        for (i, row) in self.input.output_rows[rows].iter().enumerate() {
            out.row(i).copy_from_slice(x.row(*row as usize));
        }
    }
}
