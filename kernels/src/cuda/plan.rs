//! From a program to launches: which kernel, over how many blocks, with which memory.
//!
//! An op becomes one launch, attention of few tokens two (splits, join). Activations are quantized by
//! the kernel that computes them where the next quantized linear reads them, else by one of their own;
//! linears of the same input share them. Grids are sized for the rows asked for; kernels read the step's own counts from the
//! device, so launches made for more rows compute the same. Not here: memory and copies
//! ([`super::runner`]), the arrays of a step ([`super::inputs`]). Input: a validated program.

use super::gpu::{Arg, Launch, Pointer};
use super::inputs::Inputs;
use super::store::{Stored, Table, Tiles};
use crate::backend::RowCounts;
use crate::cpu::Blocks;
use crate::program::{
    Activation, Heads, KvLayer, Mask, Op, Program, RopeId, Rows, SlotId, SlotView, WeightId,
};
use crate::{Error, StepLimits};
use quant::{Bits, FloatType};

/// Threads of most blocks.
const THREADS: u32 = 256;
/// Positions of a split of attention, as `shaders/cuda/attention.cu` has them.
const SPLIT: usize = 512;
/// Threads of an attention block and positions of its chunks.
const CHUNK: usize = 128;
/// Query heads of an attention block.
const HEADS: usize = 8;
/// Widest head of attention: two columns a thread.
const HEAD_WIDTH_MAX: usize = 2 * CHUNK;
/// Most tokens whose splits of attention have blocks of their own: with more there is work enough.
const TOKENS_APART: usize = 16;

/// Where everything lies.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) inputs: Inputs,
    /// First element of each slot.
    pub(crate) slots: Vec<Pointer>,
    pub(crate) weights: Vec<Stored>,
    /// Keys and values of each layer.
    pub(crate) kv: Vec<[Pointer; 2]>,
    /// Speeds of each rotary table.
    pub(crate) speeds: Vec<Pointer>,
    pub(crate) scratch: Scratch,
    pub(crate) block_len: usize,
    /// Most splits of a sequence.
    pub(crate) splits: usize,
}

/// Memory between the launches of one op.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scratch {
    /// Quantized activations and the scales of their blocks.
    pub(crate) quads: Pointer,
    pub(crate) scales: Pointer,
    /// Partial results of attention.
    pub(crate) parts: Pointer,
}

/// Bytes of each piece of [`Scratch`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ScratchBytes {
    pub(crate) quads: usize,
    pub(crate) scales: usize,
    pub(crate) parts: usize,
}

/// Most splits of attention: those of a sequence that fills all blocks.
pub(crate) fn splits(limits: &StepLimits) -> usize {
    (limits.blocks * limits.block_len).div_ceil(SPLIT)
}

/// What a program needs between launches.
///
/// # Errors
/// [`Error::Device`] for heads that attention has no kernel for.
pub(crate) fn scratch_bytes(
    program: &Program,
    weights: &[Stored],
    limits: &StepLimits,
) -> Result<ScratchBytes, Error> {
    let mut most = ScratchBytes::default();
    for step in &program.steps {
        match step.op {
            Op::Linear { x, weight, .. } => {
                let Some(tiles) = &weights[weight.index()].tiles else { continue };
                let rows = RowCounts::most(limits).of(program.slots[x.index()].rows);
                most.quads = most.quads.max(rows * tiles.blocks.count * tiles.stride);
                most.scales = most.scales.max(rows * tiles.blocks.count * 8);
            }
            Op::Attend { q, .. } => {
                if q.width > HEAD_WIDTH_MAX {
                    let reason = format!(
                        "{}: expected heads of at most {HEAD_WIDTH_MAX} columns, found {}; use another device",
                        step.label, q.width
                    );
                    return Err(Error::Device { device: "cuda".into(), reason });
                }
                let tokens = limits.tokens.min(TOKENS_APART);
                let parts = tokens * q.count * splits(limits) * (q.width + 2) * 4;
                most.parts = most.parts.max(parts);
            }
            _ => {}
        }
    }
    Ok(most)
}

impl Plan {
    /// The launches of a step of at most `rows`.
    pub(crate) fn launches(&self, program: &Program, rows: RowCounts) -> Vec<Launch> {
        let mut list = List { plan: self, program, rows, launches: vec![], quantized: None };
        for (at, step) in program.steps.iter().enumerate() {
            list.op(at, &step.op);
        }
        list.launches
    }
}

/// Launches being listed.
struct List<'a> {
    plan: &'a Plan,
    program: &'a Program,
    rows: RowCounts,
    launches: Vec<Launch>,
    /// What the quantized activations are of, and how they lie.
    quantized: Option<(SlotId, Blocks)>,
}

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

/// An argument list from values of several types.
macro_rules! args {
    ($($value:expr),* $(,)?) => { vec![$(Arg::from($value)),*] };
}

impl From<Pointer> for Arg {
    fn from(pointer: Pointer) -> Self {
        Self::Pointer(pointer)
    }
}

impl From<Option<Pointer>> for Arg {
    fn from(pointer: Option<Pointer>) -> Self {
        Self::Pointer(pointer.unwrap_or(Pointer::NULL))
    }
}

impl From<usize> for Arg {
    /// Sizes are below 2^31: a device has no memory for more.
    fn from(size: usize) -> Self {
        Self::Int(i32::try_from(size).unwrap_or(i32::MAX))
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl List<'_> {
    fn op(&mut self, at: usize, op: &Op) {
        if let Some((slot, _)) = &self.quantized
            && op.writes().contains(slot)
        {
            self.quantized = None;
        }
        match *op {
            Op::Embed { table, out } => self.embed(table, out),
            Op::Norm { x, add, weight, eps, out } => self.norm(at, [x, out], add, weight, eps),
            Op::Linear { x, weight, bias, out } => self.linear(x, weight, bias, out),
            Op::HeadNorm { heads, weight, eps } => self.head_norm(heads, weight, eps),
            Op::Rope { heads, rope } => self.rope(heads, rope),
            Op::KvWrite { layer, k, v } => self.kv_write(layer, [k, v]),
            Op::Attend { q, layer, mask, scale, out } => {
                self.attend(q, layer, (mask, scale), out);
                self.join(at, q, mask, out);
            }
            Op::Activate { kind: Activation::Silu, x, out } => self.activate(at, x, out),
            Op::Gather { x, out } => self.gather(x, out),
        }
    }

    /// The weight of the next quantized linear, if it reads `slot` as the step at `at` leaves it.
    fn next_reader(&self, at: usize, slot: SlotId) -> Option<Tiles> {
        for step in &self.program.steps[at + 1..] {
            if let Op::Linear { x, weight, .. } = step.op
                && let Some(tiles) = &self.plan.weights[weight.index()].tiles
            {
                return (x == slot).then(|| tiles.clone());
            }
            if step.op.writes().contains(&slot) {
                return None;
            }
        }
        None
    }

    /// Arguments that say where activations of `slot` go as `tiles` reads them; notes that they do.
    fn quantized(&mut self, slot: SlotId, tiles: &Tiles) -> Vec<Arg> {
        self.quantized = Some((slot, tiles.blocks.clone()));
        let Scratch { quads, scales, .. } = self.plan.scratch;
        let Blocks { count, block, .. } = tiles.blocks;
        args![tiles.source, quads, scales, count, block, tiles.stride]
    }

    /// A kernel that computes rows of `slot`, or the one that quantizes them too where `fits` says that
    /// it can do so for the linear that reads them next.
    fn with_quantize(
        &mut self,
        (at, slot): (usize, SlotId),
        kernels: [&'static str; 2],
        fits: impl Fn(&Tiles) -> bool,
        args: &mut Vec<Arg>,
    ) -> &'static str {
        match self.next_reader(at, slot).filter(fits) {
            Some(tiles) => {
                args.extend(self.quantized(slot, &tiles));
                kernels[1]
            }
            None => kernels[0],
        }
    }

    fn push(&mut self, kernel: &'static str, grid: [usize; 3], threads: u32, args: Vec<Arg>) {
        let grid = grid.map(|blocks| blocks as u32);
        self.launches.push(Launch { kernel, grid, threads, shared: 0, args });
    }

    /// A thread an element of rows of `width`.
    fn elements(&mut self, kernel: &'static str, width: usize, rows: usize, args: Vec<Arg>) {
        self.push(kernel, [width.div_ceil(THREADS as usize), rows, 1], THREADS, args);
    }

    fn slot(&self, slot: SlotId) -> Pointer {
        self.plan.slots[slot.index()]
    }

    fn width(&self, slot: SlotId) -> usize {
        self.program.slots[slot.index()].width
    }

    fn vector(&self, weight: WeightId) -> Option<Pointer> {
        self.plan.weights[weight.index()].vector
    }

    /// Where the step's number of a slot's rows is, and how many there are at most.
    fn count(&self, slot: SlotId) -> (Pointer, usize) {
        let inputs = &self.plan.inputs;
        match self.program.slots[slot.index()].rows {
            Rows::Tokens => (inputs.counts(), self.rows.tokens),
            Rows::Outputs => (inputs.output_count(), self.rows.outputs),
        }
    }

    fn embed(&mut self, table: WeightId, out: SlotId) {
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

    fn norm(
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
        let kernels = ["rms_norm", "rms_norm_quantize"];
        let kernel = self.with_quantize((at, out), kernels, |_| true, &mut args);
        self.push(kernel, [1, self.rows.tokens, 1], THREADS, args);
    }

    fn linear(&mut self, x: SlotId, weight: WeightId, bias: Option<WeightId>, out: SlotView) {
        let ((counts, rows), bias) = (self.count(x), bias.and_then(|bias| self.vector(bias)));
        let stored = &self.plan.weights[weight.index()];
        let n = self.program.weights[weight.index()].shape[0];
        let to = (self.slot(out.slot), self.width(out.slot), out.start);
        if let Some(tiles) = stored.tiles.clone() {
            self.quantize(x, &tiles);
            self.grouped((counts, rows), &tiles, bias, n, to);
        } else if let Some(dense) = stored.dense {
            let kernel = match dense.float {
                FloatType::F32 => "linear_f32",
                FloatType::F16 => "linear_f16",
                FloatType::Bf16 => "linear_bf16",
            };
            let (x, columns) = (self.slot(x), self.width(x));
            let args = args![counts, dense.values, bias, x, to.0, n, columns, to.1, to.2];
            self.push(kernel, [n.div_ceil(8), rows.div_ceil(8), 1], THREADS, args);
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

    fn head_norm(&mut self, heads: Heads, weight: WeightId, eps: f32) {
        let (step, weight) = (self.plan.inputs.counts(), self.vector(weight));
        let Heads { slot, start, count, width } = heads;
        let args = args![step, self.slot(slot), weight, self.width(slot), start, count, width, eps];
        self.push("head_norm", [count.div_ceil(8), self.rows.tokens, 1], THREADS, args);
    }

    fn rope(&mut self, heads: Heads, rope: RopeId) {
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

    fn kv_write(&mut self, layer: KvLayer, [k, v]: [Heads; 2]) {
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

    fn attend(&mut self, q: Heads, layer: KvLayer, (mask, scale): (Mask, f32), out: SlotId) {
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

    fn activate(&mut self, at: usize, x: SlotId, out: SlotId) {
        let width = self.width(out);
        let mut args = args![self.plan.inputs.counts(), self.slot(x), self.slot(out), width];
        let fits = |tiles: &Tiles| is_whole_blocks(tiles, THREADS as usize);
        let kernels = ["activate_silu", "activate_silu_quantize"];
        let kernel = self.with_quantize((at, out), kernels, fits, &mut args);
        self.elements(kernel, width, self.rows.tokens, args);
    }

    fn gather(&mut self, x: SlotId, out: SlotId) {
        let (inputs, width) = (&self.plan.inputs, self.width(out));
        let args =
            args![inputs.counts(), self.slot(x), inputs.output_rows(), self.slot(out), width];
        self.elements("gather", width, self.rows.outputs, args);
    }
}

/// Positions that a query sees, as kernels take it: 0 is all.
fn window(mask: Mask) -> usize {
    match mask {
        Mask::Causal => 0,
        Mask::Window(width) => width as usize,
    }
}

/// Whether `columns` columns from a multiple of them on are whole blocks, in order.
fn is_whole_blocks(tiles: &Tiles, columns: usize) -> bool {
    tiles.source.is_none() && columns.is_multiple_of(tiles.blocks.block)
}
