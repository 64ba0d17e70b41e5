//! A decoder of made-up weights, to time whole steps: prefill a context, then decode at its end.
//!
//! Shapes are those of a 0.6-billion-parameter model, 4-bit but for the norms, 8-bit head. Not
//! here: timing; a real model (results are noise).

use crate::linear::Random;
use kernels::cpu::{CpuBackend, CpuOptions};
use kernels::program::{
    Activation, BlockId, Heads, KvDecl, KvLayer, Mask, Op, Program, RopeDecl, RopeId, RopeSpeeds,
    Rows, SlotDecl, SlotId, SlotView, Step, TokenId, WeightDecl, WeightId,
};
use kernels::{Backend, BlockTables, Runner, StepInput, StepLimits, StepOutput};
use quant::{Bits, FloatType, Format};

const LAYERS: usize = 28;
const D: usize = 1024;
const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const E: usize = 128;
const F: usize = 3072;
const VOCAB: usize = 151_936;

/// Positions of the cache.
pub const CONTEXT: usize = 2048;
const BLOCK: usize = 16;

/// Most rows of a step.
pub const ROWS: usize = 128;

/// A runner of the decoder.
#[allow(missing_debug_implementations, reason = "a runner has nothing to print")]
pub struct Decoder {
    runner: Box<dyn Runner>,
    output: StepOutput,
    /// What it runs.
    pub program: Program,
}

impl Decoder {
    /// A decoder on `threads` threads; none if they cannot be had.
    pub fn new(threads: usize) -> Option<Self> {
        let backend = CpuBackend::new(&CpuOptions { threads: Some(threads), isa: None }).ok()?;
        let limits = StepLimits {
            tokens: ROWS,
            sequences: 1,
            outputs: ROWS,
            blocks: CONTEXT / BLOCK,
            block_len: BLOCK,
            trace: false,
        };
        let program = Builder::default().decoder();
        let runner = backend.build(&program, &Random(program.clone()), &limits).ok()?;
        Some(Self { runner, output: StepOutput::default(), program })
    }

    /// Computes positions `start..start + m`; all rows give logits if `all`, else the last one.
    pub fn step(&mut self, start: usize, m: usize, all: bool) {
        let positions: Vec<u32> = (start as u32..(start + m) as u32).collect();
        let end = (start + m) as u32;
        let blocks: Vec<BlockId> = (0..(CONTEXT / BLOCK) as u32).map(BlockId).collect();
        let last = m as u32 - 1;
        let input = StepInput {
            tokens: &vec![TokenId(7); m],
            positions: &positions,
            rope_lens: &vec![end; m],
            query_ends: &[m as u32],
            context_lens: &[end],
            block_tables: BlockTables { blocks: &blocks, ends: &[blocks.len() as u32] },
            output_rows: &(if all { 0 } else { last }..=last).collect::<Vec<_>>(),
        };
        let done = self.runner.step(&input, &mut self.output);
        assert!(done.is_ok(), "{done:?}");
    }
}

#[derive(Default)]
struct Builder {
    weights: Vec<WeightDecl>,
    slots: Vec<SlotDecl>,
    steps: Vec<Step>,
}

impl Builder {
    fn weight(&mut self, shape: [usize; 2], format: Format) -> WeightId {
        let label = format!("w{}", self.weights.len());
        self.weights.push(WeightDecl { label, shape, format });
        WeightId(self.weights.len() as u32 - 1)
    }

    fn slot(&mut self, rows: Rows, width: usize) -> SlotId {
        let label = format!("s{}", self.slots.len());
        self.slots.push(SlotDecl { label, rows, width });
        SlotId(self.slots.len() as u32 - 1)
    }

    fn step(&mut self, op: Op) {
        self.steps.push(Step { label: op.name().to_owned(), op });
    }

    fn norm(&mut self, x: SlotId, add: Option<SlotId>, out: SlotId) {
        let weight = self.weight([1, D], Format::Dense(FloatType::Bf16));
        self.step(Op::Norm { x, add, weight, eps: 1e-6, out });
    }

    fn linear(&mut self, bits: Bits, (x, k): (SlotId, usize), (slot, n): (SlotId, usize)) {
        let weight = self.weight([n, k], Format::Grouped { bits, group: 128, act_order: false });
        let out = SlotView { slot, start: 0, width: n };
        self.step(Op::Linear { x, weight, bias: None, out });
    }

    fn decoder(mut self) -> Program {
        let [x, h, y] = [D, D, D].map(|width| self.slot(Rows::Tokens, width));
        let qkv_width = (HEADS + 2 * KV_HEADS) * E;
        let [qkv, attn, up, act] =
            [qkv_width, HEADS * E, 2 * F, F].map(|width| self.slot(Rows::Tokens, width));
        let last = self.slot(Rows::Outputs, D);
        let logits = self.slot(Rows::Outputs, VOCAB);
        let table = self.weight([VOCAB, D], Format::Dense(FloatType::Bf16));
        self.step(Op::Embed { table, out: x });
        let heads = |start, count| Heads { slot: qkv, start: start * E, count, width: E };
        for i in 0..LAYERS {
            let layer = KvLayer(i as u32);
            self.norm(x, (i > 0).then_some(y), h);
            self.linear(Bits::Four, (h, D), (qkv, qkv_width));
            for heads in [heads(0, HEADS), heads(HEADS, KV_HEADS)] {
                let weight = self.weight([1, E], Format::Dense(FloatType::Bf16));
                self.step(Op::HeadNorm { heads, weight, eps: 1e-6 });
                self.step(Op::Rope { heads, rope: RopeId(0) });
            }
            let (k, v) = (heads(HEADS, KV_HEADS), heads(HEADS + KV_HEADS, KV_HEADS));
            self.step(Op::KvWrite { layer, k, v });
            let q = heads(0, HEADS);
            self.step(Op::Attend { q, layer, mask: Mask::Causal, scale: 0.088, out: attn });
            self.linear(Bits::Four, (attn, HEADS * E), (y, D));
            self.norm(x, Some(y), h);
            self.linear(Bits::Four, (h, D), (up, 2 * F));
            self.step(Op::Activate { kind: Activation::Silu, x: up, out: act });
            self.linear(Bits::Four, (act, F), (y, D));
        }
        self.norm(x, Some(y), h);
        self.step(Op::Gather { x: h, out: last });
        self.linear(Bits::Eight, (last, D), (logits, VOCAB));
        let speeds = (0..E / 2).map(|i| 1e6f32.powf(-2.0 * i as f32 / E as f32)).collect();
        Program {
            weights: self.weights,
            slots: self.slots,
            ropes: vec![RopeDecl { width: E, speeds: RopeSpeeds::Fixed(speeds), amplitude: 1.0 }],
            kv: vec![KvDecl { heads: KV_HEADS, head_width: E }; LAYERS],
            steps: self.steps,
            logits,
        }
    }
}
