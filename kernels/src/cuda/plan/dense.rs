//! Launches of linears with float weights, and of the split of what they read into two parts.
//!
//! `shaders/cuda/dense.cuh` has the arithmetic: every kernel for weights of two bytes gives a row the
//! same bits, so that here only speed is chosen. Not here: quantized weights ([`super::linear`]),
//! the ops that split what they compute ([`super::rows`]).
//! Input: ops of a validated program.

use super::{COUNTERS, List, Scratch, ScratchBytes, THREADS, args};
use crate::cuda::gpu::{Arg, Launch, Pointer};
use crate::cuda::store::StoredDense;
use crate::program::{Op, SlotId};
use quant::FloatType;

/// Columns of a block, of which activations are stored in wholes.
const COLUMNS: usize = 32;
/// Ranges of columns whose sums may lie in memory.
const RANGES: usize = 8;
/// Rows of weights and of activations of a tile of `gemm_dense.cu`, and its threads.
const TILE: [usize; 2] = [128, 64];
const TILE_THREADS: u32 = 128;
/// Bytes of its shared memory: three blocks of columns, of weights once and of activations twice.
const TILE_SHARED: u32 = 3 * 2 * (COLUMNS * (TILE[0] + 2 * TILE[1])) as u32;
/// Most rows of activations of `linear_dense.cu`.
const FEW_ROWS: usize = 16;
/// Blocks of threads that fill a large device twice over: with fewer tiles, several share one.
const BLOCKS: usize = 256;
/// Most tiles that are shared: their sums of ranges take [`RANGES`] times a tile of f32.
const TILES_SHARED: usize = BLOCKS / 2;
const _: () = assert!(TILES_SHARED <= COUNTERS);

/// Whether a linear with these weights reads activations in two parts.
pub(super) fn is_split(weight: StoredDense) -> bool {
    match weight.float {
        FloatType::F32 => false,
        FloatType::F16 | FloatType::Bf16 => true,
    }
}

/// Raises `most` to what a linear of shape `[n, k]` over at most `rows` rows needs.
pub(super) fn scratch_bytes([n, k]: [usize; 2], rows: usize, most: &mut ScratchBytes) {
    most.halves = most.halves.max(rows * k.div_ceil(COLUMNS) * COLUMNS * 4);
    most.half_scales = most.half_scales.max(rows * 4);
    if rows <= FEW_ROWS {
        return;
    }
    let across = n.div_ceil(TILE[0]);
    // Whole rows of tiles, as many as may be shared.
    let down = rows.div_ceil(TILE[1]).min(TILES_SHARED / across);
    most.range_sums = most.range_sums.max(across * down * RANGES * TILE[0] * TILE[1] * 4);
}

/// Blocks of threads that share each of `tiles` tiles.
fn sharing(tiles: usize) -> usize {
    if tiles > TILES_SHARED { 1 } else { (1 << (BLOCKS / tiles).ilog2()).min(RANGES) }
}

/// Kernels for weights of one type, the same for all of them.
struct Kernels {
    split: &'static str,
    /// For up to 8 rows and up to 16, by tiles of sixteen rows of weights a block: 1, 2, 4.
    few: [[&'static str; 2]; 3],
    many: &'static str,
    /// With tiles that are shared.
    many_shared: &'static str,
}

const F16: Kernels = Kernels {
    split: "split_f16",
    few: [
        ["linear_f16_t1_m8", "linear_f16_t1_m16"],
        ["linear_f16_t2_m8", "linear_f16_t2_m16"],
        ["linear_f16_t4_m8", "linear_f16_t4_m16"],
    ],
    many: "gemm_f16",
    many_shared: "gemm_f16_parts",
};
const BF16: Kernels = Kernels {
    split: "split_bf16",
    few: [
        ["linear_bf16_t1_m8", "linear_bf16_t1_m16"],
        ["linear_bf16_t2_m8", "linear_bf16_t2_m16"],
        ["linear_bf16_t4_m8", "linear_bf16_t4_m16"],
    ],
    many: "gemm_bf16",
    many_shared: "gemm_bf16_parts",
};

/// Which of the kernels for few rows: more tiles a block read activations less often, fewer give a large
/// device blocks enough.
fn few_tiles(n: usize) -> usize {
    match n {
        0..4096 => 0,
        4096..16384 => 1,
        _ => 2,
    }
}

/// A linear's launch but for its kernel.
struct Job {
    rows: usize,
    n: usize,
    args: Vec<Arg>,
}

impl List<'_> {
    /// Lists a linear over slot `x`; `to` is memory, row width and first column of its outputs.
    pub(super) fn dense(
        &mut self,
        x: SlotId,
        weight: StoredDense,
        (bias, n): (Option<Pointer>, usize),
        to: (Pointer, usize, usize),
    ) {
        let ((counts, rows), columns) = (self.count(x), self.width(x));
        let kernels = match weight.float {
            FloatType::F32 => {
                let (x, w) = (self.slot(x), weight.values);
                let args = args![counts, w, bias, x, to.0, n, columns, to.1, to.2];
                return self.push(
                    "linear_f32",
                    [n.div_ceil(8), rows.div_ceil(8), 1],
                    THREADS,
                    args,
                );
            }
            FloatType::F16 => &F16,
            FloatType::Bf16 => &BF16,
        };
        self.split(x, weight.float, kernels);
        let Scratch { halves, half_scales, .. } = self.plan.scratch;
        let values = weight.values;
        let args = args![counts, values, bias, halves, half_scales, to.0, n, columns, to.1, to.2];
        let job = Job { rows, n, args };
        if rows <= FEW_ROWS { self.few(kernels, job) } else { self.many(kernels, job) }
    }

    /// The kernel, f16's or bf16's of `kernels`, that computes rows of `slot` and splits them, if the
    /// linear that reads them next wants them so.
    pub(super) fn with_split(
        &mut self,
        (at, slot): (usize, SlotId),
        [f16, bf16]: [&'static str; 2],
        args: &mut Vec<Arg>,
    ) -> Option<&'static str> {
        if self.next_reader(at, slot).is_some() {
            return None;
        }
        let float = self.next_split(at, slot)?;
        let Scratch { halves, half_scales, .. } = self.plan.scratch;
        args.extend(args![halves, half_scales]);
        self.split = Some((slot, float));
        Some(if float == FloatType::F16 { f16 } else { bf16 })
    }

    /// The type of the parts that the next linear with such wants, if it reads `slot` as the step at
    /// `at` leaves it.
    pub(super) fn next_split(&self, at: usize, slot: SlotId) -> Option<FloatType> {
        for step in &self.program.steps[at + 1..] {
            if let Op::Linear { x, weight, .. } = step.op
                && let Some(dense) =
                    self.plan.weights[weight.index()].dense.filter(|d| is_split(*d))
            {
                return (x == slot).then_some(dense.float);
            }
            if step.op.writes().contains(&slot) {
                return None;
            }
        }
        None
    }

    fn split(&mut self, x: SlotId, float: FloatType, kernels: &Kernels) {
        if self.split == Some((x, float)) {
            return;
        }
        let ((counts, rows), Scratch { halves, half_scales, .. }) =
            (self.count(x), self.plan.scratch);
        let args = args![counts, self.slot(x), self.width(x), halves, half_scales];
        self.push(kernels.split, [1, rows, 1], THREADS, args);
        self.split = Some((x, float));
    }

    fn few(&mut self, kernels: &Kernels, Job { rows, n, args }: Job) {
        let tiles = few_tiles(n);
        let kernel = kernels.few[tiles][usize::from(rows > 8)];
        self.push(kernel, [n.div_ceil(16 << tiles), 1, 1], THREADS, args);
    }

    fn many(&mut self, kernels: &Kernels, Job { rows, n, mut args }: Job) {
        let tiles = [rows.div_ceil(TILE[1]), n.div_ceil(TILE[0])];
        let shares = sharing(tiles[0] * tiles[1]);
        let mut kernel = kernels.many;
        if shares > 1 {
            let Scratch { range_sums, counters, .. } = self.plan.scratch;
            args.extend(args![range_sums, counters]);
            kernel = kernels.many_shared;
        }
        let grid = [tiles[0], tiles[1], shares].map(|blocks| blocks as u32);
        let (threads, shared) = (TILE_THREADS, TILE_SHARED);
        self.launches.push(Launch { kernel, grid, threads, shared, args });
    }
}
