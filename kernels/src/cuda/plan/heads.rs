//! Launches of what happens to heads between their projection and attention: `shaders/cuda/heads.cu`.
//!
//! Not here: which steps belong together ([`crate::joins`]). Input: ops of a validated program.

use super::{List, THREADS, args};
use crate::cuda::gpu::Launch;
use crate::joins::{self, HeadSteps};
use crate::program::{Heads, KvLayer, RopeId, WeightId};

/// Heads of a block: a warp has one.
const HEADS: usize = THREADS as usize / 32;

impl List<'_> {
    /// One launch for the steps from `at` on, if they are what happens to the heads of a layer; how
    /// many steps it does.
    pub(super) fn heads(&mut self, at: usize) -> Option<usize> {
        if self.plan.trace {
            return None;
        }
        let HeadSteps { norms, turned, rope, layer, k, v, steps } =
            joins::head_steps(self.program, at)?;
        let (inputs, decl) = (&self.plan.inputs, &self.program.ropes[rope.index()]);
        let (speeds, rows) = (self.plan.speeds[rope.index()], inputs.speed_rows(rope.index()));
        let weight = |norm: Option<(WeightId, f32)>| norm.and_then(|(id, _)| self.vector(id));
        let eps = norms.map(|norm| norm.map_or(0.0, |(_, eps)| eps));
        let keeps = usize::from(joins::is_read(self.program, at + steps - 1, k.view()));
        let [keys, values] = self.plan.kv[layer.index()];
        let args = args![
            inputs.counts(),
            self.slot(turned.slot),
            self.slot(v.slot),
            inputs.positions(),
            speeds,
            rows,
            weight(norms[0]),
            weight(norms[1]),
            keys,
            values,
            inputs.owners(),
            inputs.table_starts(),
            inputs.table(),
            self.width(turned.slot),
            turned.start,
            turned.count - k.count,
            k.count,
            self.width(v.slot),
            v.start,
            turned.width,
            decl.width,
            self.plan.block_len,
            keeps,
            decl.amplitude,
            eps[0],
            eps[1]
        ];
        let blocks = (turned.count + v.count).div_ceil(HEADS);
        let grid = [blocks, self.rows.tokens, 1].map(|blocks| blocks as u32);
        let shared = (4 * HEADS * turned.width) as u32;
        self.launches.push(Launch { kernel: "heads", grid, threads: THREADS, shared, args });
        Some(steps)
    }

    pub(super) fn head_norm(&mut self, heads: Heads, weight: WeightId, eps: f32) {
        let (step, weight) = (self.plan.inputs.counts(), self.vector(weight));
        let Heads { slot, start, count, width } = heads;
        let args = args![step, self.slot(slot), weight, self.width(slot), start, count, width, eps];
        self.push("head_norm", [count.div_ceil(HEADS), self.rows.tokens, 1], THREADS, args);
    }

    pub(super) fn rope(&mut self, heads: Heads, rope: RopeId) {
        let (inputs, decl) = (&self.plan.inputs, &self.program.ropes[rope.index()]);
        let (speeds, rows) = (self.plan.speeds[rope.index()], inputs.speed_rows(rope.index()));
        let Heads { slot, start, count, width } = heads;
        let args = args![
            inputs.counts(),
            self.slot(slot),
            inputs.positions(),
            speeds,
            rows,
            self.width(slot),
            start,
            count,
            width,
            decl.width,
            decl.amplitude
        ];
        self.elements("rope", count * decl.width / 2, self.rows.tokens, args);
    }

    pub(super) fn kv_write(&mut self, layer: KvLayer, [k, v]: [Heads; 2]) {
        let (inputs, [keys, values]) = (&self.plan.inputs, self.plan.kv[layer.index()]);
        let (k_slot, v_slot) = (self.slot(k.slot), self.slot(v.slot));
        let args = args![
            inputs.counts(),
            k_slot,
            v_slot,
            keys,
            values,
            inputs.positions(),
            inputs.owners(),
            inputs.table_starts(),
            inputs.table(),
            k.count,
            k.width,
            self.plan.block_len,
            self.width(k.slot),
            k.start,
            self.width(v.slot),
            v.start
        ];
        self.elements("kv_write", k.count * k.width, self.rows.tokens, args);
    }
}
