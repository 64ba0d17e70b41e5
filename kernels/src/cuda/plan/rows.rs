//! Launches of the ops that treat each row by itself: `shaders/cuda/rows.cu`.
//!
//! Not here: heads ([`super::heads`]). Input: ops of a validated program.

use super::{List, THREADS, args, is_whole_blocks};
use crate::cuda::store::{Table, Tiles};
use crate::program::{SlotId, WeightId};
use quant::FloatType;

impl List<'_> {
    pub(super) fn embed(&mut self, table: WeightId, out: SlotId) {
        let (stored, width) = (&self.plan.weights[table.index()], self.width(out));
        let (step, tokens) = (self.plan.inputs.counts(), self.plan.inputs.token_ids());
        let to = self.slot(out);
        if let Some(dense) = stored.dense {
            let kind = match dense.float {
                FloatType::F32 => 0,
                FloatType::F16 => 1,
                FloatType::Bf16 => 2usize,
            };
            let args = args![step, tokens, dense.values, to, kind, width];
            self.elements("embed_dense", width, self.rows.tokens, args);
        } else if let Some(Table { bits, group, codes, scales, zeros, columns }) = stored.table {
            let bits = bits.count();
            let args = args![step, tokens, codes, scales, zeros, columns, to, bits, width, group];
            self.elements("embed_grouped", width, self.rows.tokens, args);
        }
    }

    pub(super) fn norm(
        &mut self,
        at: usize,
        [x, out]: [SlotId; 2],
        add: Option<SlotId>,
        weight: WeightId,
        eps: f32,
    ) {
        let (step, add) = (self.plan.inputs.counts(), add.map(|add| self.slot(add)));
        let weight = self.vector(weight);
        let mut args = args![step, self.slot(x), add, weight, self.slot(out), self.width(x), eps];
        let splits = ["rms_norm_split_f16", "rms_norm_split_bf16"];
        let kernel = self.with_split((at, out), splits, &mut args).unwrap_or_else(|| {
            let kernels = ["rms_norm", "rms_norm_quantize"];
            self.with_quantize((at, out), kernels, |_| true, &mut args)
        });
        self.push(kernel, [1, self.rows.tokens, 1], THREADS, args);
    }

    pub(super) fn activate(&mut self, at: usize, x: SlotId, out: SlotId) {
        let width = self.width(out);
        let mut args = args![self.plan.inputs.counts(), self.slot(x), self.slot(out), width];
        let splits = ["activate_silu_split_f16", "activate_silu_split_bf16"];
        if let Some(kernel) = self.with_split((at, out), splits, &mut args) {
            return self.push(kernel, [1, self.rows.tokens, 1], THREADS, args);
        }
        let fits = |tiles: &Tiles| is_whole_blocks(tiles, THREADS as usize);
        let kernels = ["activate_silu", "activate_silu_quantize"];
        let kernel = self.with_quantize((at, out), kernels, fits, &mut args);
        self.elements(kernel, width, self.rows.tokens, args);
    }

    pub(super) fn gather(&mut self, at: usize, x: SlotId, out: SlotId) {
        let (inputs, width) = (&self.plan.inputs, self.width(out));
        let mut args =
            args![inputs.counts(), self.slot(x), inputs.output_rows(), self.slot(out), width];
        let splits = ["gather_split_f16", "gather_split_bf16"];
        match self.with_split((at, out), splits, &mut args) {
            Some(kernel) => self.push(kernel, [1, self.rows.outputs, 1], THREADS, args),
            None => self.elements("gather", width, self.rows.outputs, args),
        }
    }
}
