//! Launches of attention: splits and their join.
//!
//! Not here: heads that tensor cores take ([`super::attention_mma`]), what fills the cache
//! ([`super::heads`]), the arrays of a step ([`crate::cuda::inputs`]). Input: ops of a validated program.

use super::{List, Plan, Scratch, THREADS, args, is_whole_blocks};
use crate::cuda::gpu::Launch;
use crate::cuda::store::Tiles;
use crate::program::{Heads, KvLayer, Mask, SlotId};
use crate::{Error, StepLimits};

/// Positions of a split of attention, as `shaders/cuda/attention.cu` and `attention_mma.cu` have them.
const SPLIT: usize = 256;
/// Threads of an attention block and positions of its chunks.
const CHUNK: usize = 128;
/// Query heads of an attention block.
const HEADS: usize = 8;
/// Widest head of attention: two columns a thread.
const HEAD_WIDTH_MAX: usize = 2 * CHUNK;
/// Most tokens whose splits of attention have blocks of their own: with more there is work enough.
pub(super) const TOKENS_APART: usize = 32;

/// Most splits of attention: those of the longest sequence.
pub(crate) fn splits(limits: &StepLimits) -> usize {
    let StepLimits { blocks, block_len, context_len, .. } = *limits;
    blocks.saturating_mul(block_len).min(context_len).div_ceil(SPLIT)
}

/// Bytes of the partial results of heads `q` of step `label`.
///
/// # Errors
/// [`Error::Device`] for heads that attention has no kernel for.
pub(super) fn parts_bytes(label: &str, q: Heads, limits: &StepLimits) -> Result<usize, Error> {
    if q.width > HEAD_WIDTH_MAX {
        let reason = format!(
            "{label}: expected heads of at most {HEAD_WIDTH_MAX} columns, found {}; use another device",
            q.width
        );
        return Err(Error::Device { device: "cuda".into(), reason });
    }
    let tokens = limits.tokens.min(TOKENS_APART);
    Ok(tokens * q.count * splits(limits) * (q.width + 2) * 4)
}

/// Positions that a query sees, as kernels take it: 0 is all.
pub(super) fn window(mask: Mask) -> usize {
    match mask {
        Mask::Causal => 0,
        Mask::Window(width) => width as usize,
    }
}

impl List<'_> {
    pub(super) fn attend(
        &mut self,
        at: usize,
        (q, layer): (Heads, KvLayer),
        (mask, scale): (Mask, f32),
        out: SlotId,
    ) {
        if let Some(kernel) = self.attend_mma_kernel(q) {
            self.attend_mma((at, kernel), (q, layer), (mask, scale), out);
        } else {
            self.attend_splits((q, layer), (mask, scale), out);
            self.join(at, q, mask, out);
        }
    }

    fn attend_splits(
        &mut self,
        (q, layer): (Heads, KvLayer),
        (mask, scale): (Mask, f32),
        out: SlotId,
    ) {
        let Plan { ref inputs, scratch: Scratch { parts, .. }, splits, block_len, .. } = *self.plan;
        let ([keys, values], kv) = (self.plan.kv[layer.index()], self.program.kv[layer.index()]);
        let (tokens, apart, window) = (self.rows.tokens, self.apart(), window(mask));
        let (from, to, q_width) = (self.slot(q.slot), self.slot(out), self.width(q.slot));
        let args = args![
            inputs.counts(),
            from,
            keys,
            values,
            inputs.positions(),
            inputs.owners(),
            inputs.table_starts(),
            inputs.table(),
            to,
            parts,
            kv.heads,
            q.width,
            block_len,
            q.count,
            q_width,
            q.start,
            window,
            splits,
            usize::from(apart),
            scale
        ];
        let blocks = kv.heads * (q.count / kv.heads).div_ceil(HEADS);
        let grid = [if apart { splits } else { 1 }, tokens, blocks].map(|blocks| blocks as u32);
        let shared = HEADS * (q.width + CHUNK + 4) * 4 + CHUNK * (q.width + 8) * 2;
        let (kernel, threads, shared) = ("attend", CHUNK as u32, shared as u32);
        self.launches.push(Launch { kernel, grid, threads, shared, args });
    }

    /// Whether the splits of attention have blocks of their own.
    fn apart(&self) -> bool {
        self.rows.tokens <= TOKENS_APART
    }

    /// Adds the splits of attention.
    fn join(&mut self, at: usize, q: Heads, mask: Mask, out: SlotId) {
        if !self.apart() {
            return;
        }
        let Plan { ref inputs, scratch: Scratch { parts, .. }, splits, .. } = *self.plan;
        let (to, positions) = (self.slot(out), inputs.positions());
        let window = window(mask);
        let mut args =
            args![inputs.counts(), positions, parts, to, q.width, q.count, window, splits];
        let fits = |tiles: &Tiles| is_whole_blocks(tiles, q.width);
        let kernels = ["attend_join", "attend_join_quantize"];
        let kernel = self.with_quantize((at, out), kernels, fits, &mut args);
        self.push(kernel, [q.count, self.rows.tokens, 1], THREADS, args);
    }
}
