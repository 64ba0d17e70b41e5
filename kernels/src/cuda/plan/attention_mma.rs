//! Launches of attention on tensor cores.
//!
//! Not here: heads of other widths ([`super::attention`]), the arrays of a step
//! ([`crate::cuda::inputs`]). Input: ops of a validated program.

use super::attention::{TOKENS_APART, window};
use super::{COUNTERS, List, Plan, Scratch, args, is_whole_blocks};
use crate::cuda::gpu::{Launch, Pointer};
use crate::program::{Heads, KvLayer, Mask, SlotId};

/// Positions of a chunk, as `shaders/cuda/attention_mma.cu` has them, and those of a split.
const CHUNK: usize = 64;
const SPLIT: usize = 4 * CHUNK;
/// Chunks in shared memory.
const STAGES: usize = 3;
/// Rows of a tile: tokens times the query heads that share a KV head.
const ROWS: usize = 64;
/// Threads of a block.
const THREADS: u32 = 128;
/// Most blocks of a tile: together with 8 KV heads enough for three on each of 160 multiprocessors.
const BLOCKS_MAX: usize = 64;

/// Bytes of shared memory: chunks and weights of f16, then maxima and places of 4 bytes.
fn shared_bytes(width: usize) -> usize {
    2 * (STAGES * CHUNK * (width + 8) + 16 * (SPLIT + 8)) + 4 * (4 * 4 * 16 + 2 * SPLIT)
}

impl List<'_> {
    /// The kernel for heads `q`, if tensor cores take them: it reads two columns of a query at once.
    pub(super) fn attend_mma_kernel(&self, q: Heads) -> Option<&'static str> {
        let even = q.start.is_multiple_of(2) && self.width(q.slot).is_multiple_of(2);
        let kernel = match q.width {
            16 => "attend_mma_16",
            32 => "attend_mma_32",
            64 => "attend_mma_64",
            80 => "attend_mma_80",
            96 => "attend_mma_96",
            128 => "attend_mma_128",
            _ => return None,
        };
        even.then_some(kernel)
    }

    pub(super) fn attend_mma(
        &mut self,
        (at, kernel): (usize, &'static str),
        (q, layer): (Heads, KvLayer),
        (mask, scale): (Mask, f32),
        out: SlotId,
    ) {
        let Plan { ref inputs, scratch, splits, block_len, .. } = *self.plan;
        let Scratch { parts, counters, .. } = scratch;
        let ([keys, values], kv) = (self.plan.kv[layer.index()], self.program.kv[layer.index()]);
        let tokens = self.rows.tokens;
        let pieces = kv.heads * (q.count / kv.heads).div_ceil(ROWS);
        let apart = tokens <= TOKENS_APART && tokens * pieces <= COUNTERS;
        // Maxima and sums lie behind what they belong to.
        let tops = parts.offset(4 * tokens.min(TOKENS_APART) * q.count * splits * q.width);
        let mut args = args![
            inputs.counts(),
            self.slot(q.slot),
            keys,
            values,
            inputs.positions(),
            inputs.owners(),
            inputs.begins(),
            inputs.ends(),
            inputs.table_starts(),
            inputs.table(),
            self.slot(out),
            parts,
            tops,
            counters,
            kv.heads,
            block_len,
            q.count,
            self.width(q.slot),
            q.start,
            window(mask),
            splits,
            scale
        ];
        const NONE: Pointer = Pointer::NULL;
        let fits = self.next_reader(at, out).filter(|tiles| is_whole_blocks(tiles, q.width));
        args.extend(match fits {
            Some(tiles) => self.quantized(out, &tiles),
            None => args![NONE, NONE, NONE, 0, 0, 0],
        });
        let blocks = if apart { splits.min(BLOCKS_MAX) } else { 1 };
        let grid = [blocks, tokens, pieces].map(|blocks| blocks as u32);
        let shared = shared_bytes(q.width) as u32;
        self.launches.push(Launch { kernel, grid, threads: THREADS, shared, args });
    }
}
