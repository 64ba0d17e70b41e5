//! Launches of linears, and of the quantization of what they read.
//!
//! Not here: how weights lie ([`crate::cuda::store`]), which activations are quantized on the way by
//! the kernel that computes them ([`super`]), float weights ([`super::dense`]). Input: ops of a validated program.

use super::{Activations, COUNTERS, List, Quantized, THREADS, args};
use crate::cuda::gpu::{Arg, Launch, Pointer};
use crate::cuda::store::Tiles;
use crate::joins::{self, NormStep};
use crate::program::{SlotId, SlotView, WeightId};
use quant::Bits;
use std::ops::Range;

/// Rows of weights, and of activations, of a block of the kernels for many rows.
const GEMM: [usize; 2] = [256, 64];
/// Rows of weights of a tile.
const TILE: usize = 16;
/// Most blocks of columns of a panel of `shaders/cuda/linear_grouped.cu`.
const PANEL_MOST: usize = 32;
/// Bytes behind quantized activations: kernels read whole panels, and use what is there of them. A panel has
/// at most 32 blocks of 64 columns or 16 of 128.
pub(super) const BEHIND_QUADS: usize = PANEL_MOST * 64;

/// A kernel for quantized linears and the part of the output that one of its blocks computes.
#[derive(Debug, PartialEq)]
struct GroupedKernel {
    name: &'static str,
    /// Rows of weights.
    weights: usize,
    /// Rows of activations.
    rows: usize,
    /// Bytes of shared memory that it asks for at launch.
    shared: usize,
}

/// The kernels of a format, by rows.
macro_rules! names {
    ($format:literal) => {
        [
            concat!("linear_", $format, "_m8"),
            concat!("linear_", $format, "_m16"),
            concat!("linear_", $format, "_m32"),
            concat!("linear_", $format, "_m64"),
            concat!("gemm_", $format),
        ]
    };
}

/// The kernel for `rows` rows of activations and `n` of weights: they all compute the same bits.
fn grouped_kernel(tiles: &Tiles, n: usize, rows: usize, multiprocessors: usize) -> GroupedKernel {
    let names = match (tiles.bits, tiles.stride) {
        (Bits::Four, 128) => names!("w4_s128"),
        (Bits::Four, 64) => names!("w4_s64"),
        (Bits::Four, _) => names!("w4_s32"),
        (Bits::Eight, 128) => names!("w8_s128"),
        (Bits::Eight, 64) => names!("w8_s64"),
        (Bits::Eight, _) => names!("w8_s32"),
    };
    if rows > 16 && is_for_gemm(n, rows, multiprocessors) {
        // Four stages: activations of 64 rows and their scales, scales and zero points of 256 weights.
        let shared = 4 * (GEMM[1] * (tiles.stride + 8) + GEMM[0] * 5);
        return GroupedKernel { name: names[4], weights: GEMM[0], rows: GEMM[1], shared };
    }
    let at = match rows {
        0..=8 => 0,
        9..=16 => 1,
        17..=32 => 2,
        _ => 3,
    };
    // Tiles of eight rows, and blocks of columns of a panel.
    let many = 1 << at;
    let in_lanes = 256 * 32 / (tiles.bits.count() * tiles.stride);
    let panel = in_lanes.min(PANEL_MOST).min(64 / many).max(8);
    // Exact sums; two times scales and zero points; scales of activations.
    let shared = panel * (many * TILE * 8 * 4 + 2 * TILE * 5 + 8 * many * 8);
    GroupedKernel { name: names[at], weights: TILE, rows: 8 * many, shared }
}

/// Whether the kernel for many rows is the faster one. Its blocks bring 11 bytes of codes a clock, alone on a
/// multiprocessor, for 64 rows, whether they exist or not; those of the others 7 for 32 rows and 4 for 64 (19,
/// and 11 and 6, where blocks have 128 columns), and there are enough of them for every device (counts in
/// `shaders/cuda`): so it is from the point on where its blocks and the rows of each keep a third of the
/// device busy.
fn is_for_gemm(n: usize, rows: usize, multiprocessors: usize) -> bool {
    let blocks = n.div_ceil(GEMM[0]) * rows.div_ceil(GEMM[1]);
    blocks * rows.min(GEMM[1]) >= GEMM[1] / 3 * multiprocessors
}

/// Most rows whose norm is computed by the linear before it. One block of threads has all of them there, about
/// 600 clocks each (16 KiB from the second-level cache and 64 blocks to quantize, where rows are 4096 wide)
/// and 1500 more; a launch of its own has a block a row and takes 2000, and 2500 (1.3 us) to begin.
const NORM_ROWS: usize = 4;

/// Where a quantized linear's outputs go.
#[derive(Debug, Clone, Copy)]
struct Outputs {
    to: Pointer,
    /// Columns of a row.
    width: usize,
    start: usize,
    bias: Option<Pointer>,
}

/// What a linear does with its outputs beside.
#[derive(Debug, Default)]
struct After {
    norm: Option<NormStep>,
    /// The slot that is quantized in the end, and the linear that reads it so.
    next: Option<(SlotId, Tiles)>,
}

impl List<'_> {
    /// The linear at `at`, and what is joined with it; how many steps these are.
    pub(super) fn linear(
        &mut self,
        at: usize,
        (x, weight, bias): (SlotId, WeightId, Option<WeightId>),
        out: SlotView,
    ) -> usize {
        let bias = bias.and_then(|bias| self.vector(bias));
        let stored = &self.plan.weights[weight.index()];
        let n = self.program.weights[weight.index()].shape[0];
        let (to, width) = (self.slot(out.slot), self.width(out.slot));
        let outputs = Outputs { to, width, start: out.start, bias };
        if let Some(tiles) = stored.tiles.clone() {
            self.quantize(x, &tiles);
            let rows = self.count(x).1;
            let kernel = grouped_kernel(&tiles, n, rows, self.plan.multiprocessors);
            let activated = joins::activated(self.program, at).filter(|_| tiles.paired);
            let (outputs, after) = match activated {
                Some(act) => {
                    let (to, width) = (self.slot(act), self.width(act));
                    let counters = |next: &Tiles| next.blocks.count * rows.div_ceil(kernel.rows);
                    let fits = |next: &Tiles| fits(next, n) && counters(next) <= COUNTERS;
                    let next = self.next_reader(at + 1, act).filter(fits).map(|next| (act, next));
                    (Outputs { to, width, start: 0, bias }, After { norm: None, next })
                }
                None => (outputs, self.normed(at, rows)),
            };
            let steps = if activated.is_some() || after.norm.is_some() { 2 } else { 1 };
            self.grouped(x, &tiles, (n, kernel), outputs, &after);
            self.note(at..at + steps, after);
            return steps;
        }
        if let Some(dense) = stored.dense {
            self.dense(x, dense, (bias, n), (to, width, out.start));
        }
        1
    }

    /// The norm of the outputs of the linear at `at`, if few rows make it the linear's, and nobody reads
    /// them in two parts.
    fn normed(&self, at: usize, rows: usize) -> After {
        let few = !self.plan.trace && rows <= NORM_ROWS;
        let Some(norm) = joins::normed(self.program, at).filter(|_| few) else {
            return After::default();
        };
        match self.next_reader(at + 1, norm.out) {
            None if self.next_split(at + 1, norm.out).is_some() => After::default(),
            next => After { norm: Some(norm), next: next.map(|next| (norm.out, next)) },
        }
    }

    /// Which of the quantized activations a linear reads.
    fn read(&self) -> usize {
        self.quantized.as_ref().map_or(0, |known| known.at)
    }

    /// Notes what a linear and the `steps` that it did leave behind.
    fn note(&mut self, steps: Range<usize>, after: After) {
        let at = 1 - self.read();
        steps.for_each(|step| self.forget(step));
        if let Some((slot, Tiles { blocks, .. })) = after.next {
            self.quantized = Some(Quantized { slot, blocks, at });
        }
    }

    fn quantize(&mut self, x: SlotId, tiles: &Tiles) {
        let known = self.quantized.as_ref();
        if known.is_some_and(|known| known.slot == x && known.blocks == tiles.blocks) {
            return;
        }
        let (counts, rows) = self.count(x);
        let mut args = args![counts, self.slot(x), self.width(x)];
        args.extend(self.quantized(x, tiles));
        // A thread a quad, sixteen threads a block at least.
        let at_once = THREADS as usize * 4 / tiles.stride.max(64);
        self.push("quantize", [tiles.blocks.count.div_ceil(at_once), rows, 1], THREADS, args);
    }

    /// A linear over the quantized `x`, and what it does beside.
    fn grouped(
        &mut self,
        x: SlotId,
        tiles: &Tiles,
        (n, kernel): (usize, GroupedKernel),
        Outputs { to, width, start, bias }: Outputs,
        after: &After,
    ) {
        let (counts, rows) = self.count(x);
        let Tiles { codes, scales, zeros, ref blocks, .. } = *tiles;
        let from = self.plan.scratch.quantized[self.read()];
        let (count, per_group) = (blocks.count, blocks.per_group);
        let mut args = args![
            counts,
            codes,
            scales,
            zeros,
            bias,
            from.quads,
            from.scales,
            to,
            n,
            count,
            per_group,
            width,
            start,
            usize::from(tiles.paired),
            if tiles.narrow { 2 } else { 4 },
            usize::from(tiles.zero)
        ];
        args.extend(self.after(after));
        let grid = [n.div_ceil(kernel.weights), rows.div_ceil(kernel.rows), 1];
        let grid = grid.map(|blocks| blocks as u32);
        let (kernel, shared) = (kernel.name, kernel.shared as u32);
        self.launches.push(Launch { kernel, grid, threads: THREADS, shared, args });
    }

    fn after(&self, after: &After) -> Vec<Arg> {
        const NONE: Pointer = Pointer::NULL;
        let Activations { quads, scales } = self.plan.scratch.quantized[1 - self.read()];
        let mut args = match &after.next {
            Some((_, Tiles { source, blocks, stride, .. })) => {
                args![*source, quads, scales, blocks.count, blocks.block, *stride]
            }
            None => args![NONE, NONE, NONE, 0, 0, 0],
        };
        args.push(self.plan.scratch.counters.into());
        args.extend(match after.norm {
            Some(NormStep { stream, out, weight, eps }) => {
                args![self.slot(stream), self.vector(weight), self.slot(out), eps]
            }
            None => args![NONE, NONE, NONE, 0.0],
        });
        args
    }
}

/// Whether a linear can quantize its activated outputs for `next`: blocks are in order, whole tiles have
/// one, and whole blocks the tiles of a block of threads of the kernel for many rows.
fn fits(next: &Tiles, n: usize) -> bool {
    let block = next.blocks.block;
    let is_in_order = next.source.is_none() && next.blocks.count * block == n / 2;
    is_in_order && block.is_multiple_of(TILE / 2) && (GEMM[0] / 2).is_multiple_of(block)
}
