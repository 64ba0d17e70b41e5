//! Launches of linears, and of the quantization of what they read.
//!
//! Not here: how weights lie ([`crate::cuda::store`]), which activations are quantized on the way by
//! the kernel that computes them ([`super`]), float weights ([`super::dense`]). Input: ops of a validated program.

use super::{List, Scratch, THREADS, args};
use crate::cuda::gpu::{Launch, Pointer};
use crate::cuda::store::Tiles;
use crate::program::{SlotId, SlotView, WeightId};
use quant::Bits;

/// A kernel for quantized linears and the part of the output that one of its blocks computes.
struct GroupedKernel {
    name: &'static str,
    /// Rows of weights.
    weights: usize,
    /// Rows of activations.
    rows: usize,
    /// Bytes of shared memory that it asks for at launch.
    shared: u32,
}

/// The kernel for `rows` rows: they all compute the same bits.
fn grouped_kernel(tiles: &Tiles, rows: usize) -> GroupedKernel {
    let names = match (tiles.bits, tiles.stride) {
        (Bits::Four, 64) => ["linear_w4_s64_m8", "linear_w4_s64_m16", "gemm_w4_s64"],
        (Bits::Four, _) => ["linear_w4_s32_m8", "linear_w4_s32_m16", "gemm_w4_s32"],
        (Bits::Eight, 64) => ["linear_w8_s64_m8", "linear_w8_s64_m16", "gemm_w8_s64"],
        (Bits::Eight, _) => ["linear_w8_s32_m8", "linear_w8_s32_m16", "gemm_w8_s32"],
    };
    match rows {
        0..=8 => GroupedKernel { name: names[0], weights: 16, rows: 8, shared: 0 },
        9..=16 => GroupedKernel { name: names[1], weights: 16, rows: 16, shared: 0 },
        _ => {
            // Four stages of the activations of 64 rows with their scales.
            let shared = 4 * 64 * (tiles.stride + 8) as u32;
            GroupedKernel { name: names[2], weights: 256, rows: 64, shared }
        }
    }
}

impl List<'_> {
    pub(super) fn linear(
        &mut self,
        x: SlotId,
        weight: WeightId,
        bias: Option<WeightId>,
        out: SlotView,
    ) {
        let ((counts, rows), bias) = (self.count(x), bias.and_then(|bias| self.vector(bias)));
        let stored = &self.plan.weights[weight.index()];
        let n = self.program.weights[weight.index()].shape[0];
        let to = (self.slot(out.slot), self.width(out.slot), out.start);
        if let Some(tiles) = stored.tiles.clone() {
            self.quantize(x, &tiles);
            self.grouped((counts, rows), &tiles, bias, n, to);
        } else if let Some(dense) = stored.dense {
            self.dense(x, dense, (bias, n), to);
        }
    }

    fn quantize(&mut self, x: SlotId, tiles: &Tiles) {
        if self.quantized.as_ref().is_some_and(|(of, as_)| *of == x && *as_ == tiles.blocks) {
            return;
        }
        let (counts, rows) = self.count(x);
        let mut args = args![counts, self.slot(x), self.width(x)];
        args.extend(self.quantized(x, tiles));
        self.push("quantize", [tiles.blocks.count.div_ceil(16), rows, 1], THREADS, args);
    }

    fn grouped(
        &mut self,
        (counts, rows): (Pointer, usize),
        tiles: &Tiles,
        bias: Option<Pointer>,
        n: usize,
        (out, width, start): (Pointer, usize, usize),
    ) {
        let kernel = grouped_kernel(tiles, rows);
        let Tiles { codes, scales, zeros, ref blocks, .. } = *tiles;
        let Scratch { quads, scales: a_scales, .. } = self.plan.scratch;
        let (count, per_group) = (blocks.count, blocks.per_group);
        let args = args![
            counts, codes, scales, zeros, bias, quads, a_scales, out, n, count, per_group, width,
            start
        ];
        let grid = [n.div_ceil(kernel.weights), rows.div_ceil(kernel.rows), 1];
        let grid = grid.map(|blocks| blocks as u32);
        let GroupedKernel { name: kernel, shared, .. } = kernel;
        self.launches.push(Launch { kernel, grid, threads: THREADS, shared, args });
    }
}
