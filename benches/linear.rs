//! A program of nothing but linears over one input, to time one kind of weight.
//!
//! There are as many weights as it takes to leave every cache, so that each step reads all of
//! them from memory. Not here: timing.

use kernels::cpu::{CpuBackend, CpuOptions, Isa};
use kernels::program::{
    BlockId, Op, Program, Rows, SlotDecl, SlotId, SlotView, Step, TokenId, WeightDecl, WeightId,
};
use kernels::{
    Backend, BlockTables, Error, Runner, StepInput, StepLimits, StepOutput, WeightSource,
};
use quant::{Bits, Dense, FloatType, Format, Grouped, GroupedParts, GroupedShape, Weight};
use std::ops::Range;

/// Bytes that all weights together exceed: processors share caches of up to some hundred MiB.
const BEYOND_CACHES: usize = 512 << 20;

/// Most rows of a step.
pub const ROWS: usize = 64;

/// What kind of linear to time, on what.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Format of the weights.
    pub format: Format,
    /// `[n, k]`
    pub shape: [usize; 2],
    /// Instruction set; the best the machine has if none.
    pub isa: Option<Isa>,
    /// Threads; all of the machine's if none.
    pub threads: Option<usize>,
}

/// A runner over that many weights, and what a step with it moves.
#[allow(missing_debug_implementations, reason = "a runner has nothing to print")]
pub struct Linears {
    runner: Box<dyn Runner>,
    output: StepOutput,
    copies: usize,
    setup: Setup,
}

/// 4-bit weights in groups of 128.
pub fn w4g128() -> Format {
    Format::Grouped { bits: Bits::Four, group: 128, act_order: false }
}

impl Linears {
    /// Builds the runner; `None` if the processor lacks the instruction set.
    pub fn new(setup: Setup) -> Option<Self> {
        let options = CpuOptions { threads: setup.threads, isa: setup.isa };
        let backend = CpuBackend::new(&options).ok()?;
        let copies = BEYOND_CACHES.div_ceil(setup.format.bytes(setup.shape));
        let limits = StepLimits {
            tokens: ROWS,
            sequences: 1,
            outputs: 1,
            blocks: 1,
            block_len: ROWS,
            context_len: ROWS,
            trace: false,
        };
        let program = program(setup, copies);
        let runner = backend.build(&program, &Random(program.clone()), &limits).ok()?;
        Some(Self { runner, output: StepOutput::default(), copies, setup })
    }

    /// Bytes of weights and activations that `m` rows through one linear must move.
    pub fn bytes(&self, m: usize) -> usize {
        let [n, k] = self.setup.shape;
        self.setup.format.bytes(self.setup.shape) + 4 * m * (n + k)
    }

    /// Linears of a step.
    pub fn copies(&self) -> usize {
        self.copies
    }

    /// Runs a step of `m` rows: every linear once.
    pub fn step(&mut self, m: usize) {
        let rows: Vec<u32> = (0..m as u32).collect();
        let input = StepInput {
            tokens: &vec![TokenId(1); m],
            positions: &rows,
            rope_lens: &vec![m as u32; m],
            query_ends: &[m as u32],
            context_lens: &[m as u32],
            block_tables: BlockTables { blocks: &[BlockId(0)], ends: &[1] },
            output_rows: &[m as u32 - 1],
            draws: &[],
        };
        let done = self.runner.step(&input, &mut self.output);
        assert!(done.is_ok(), "{done:?}");
    }
}

fn program(setup: Setup, copies: usize) -> Program {
    let Setup { format, shape: [n, k], .. } = setup;
    let weight = |label: &str, shape, format| WeightDecl::new(label, shape, format);
    let slot = |label: &str, rows, width| SlotDecl { label: label.to_owned(), rows, width };
    let mut weights = vec![weight("table", [2, k], Format::Dense(FloatType::F32))];
    weights.extend((0..copies).map(|i| weight(&format!("w{i}"), [n, k], format)));
    let [x, y, out] = [0, 1, 2].map(SlotId);
    let linear = |i: usize| Op::Linear {
        x,
        weight: WeightId(i as u32 + 1),
        bias: None,
        out: SlotView { slot: y, start: 0, width: n },
    };
    let mut ops = vec![Op::Embed { table: WeightId(0), out: x }];
    ops.extend((0..copies).map(linear));
    ops.push(Op::Gather { x: y, out });
    Program {
        weights,
        slots: vec![
            slot("x", Rows::Tokens, k),
            slot("y", Rows::Tokens, n),
            slot("out", Rows::Outputs, n),
        ],
        ropes: vec![],
        kv: vec![],
        steps: ops.into_iter().map(|op| Step { label: op.name().to_owned(), op }).collect(),
        logits: out,
    }
}

/// Weights of some values; their size matters, not what they are.
#[derive(Debug)]
pub struct Random(pub Program);

/// Byte `i` of floats of either sign, none so small that a processor takes longer for it (a
/// subnormal product or sum costs it a hundred cycles).
fn float_byte(i: usize, float: FloatType) -> u8 {
    match (i + 1).is_multiple_of(float.bytes()) {
        true => 0x3a | (i * 37 % 251 % 2 * 128) as u8,
        false => (i * 37 % 251) as u8,
    }
}

impl WeightSource for Random {
    fn load(&self, id: WeightId, rows: Range<usize>) -> Result<Weight<'_>, Error> {
        let decl = &self.0.weights[id.index()];
        let [n, k] = [rows.len(), decl.shape[1]];
        let made = match decl.format {
            Format::Dense(float) => {
                let floats = 0..n * k * float.bytes();
                let bytes: Vec<u8> = floats.map(|i| float_byte(i, float)).collect();
                Dense::new(&decl.label, float, [n, k], bytes).map(Weight::Dense)
            }
            Format::Grouped { bits, group, .. } => {
                let shape = GroupedShape { n, k, group, bits };
                let groups = n * shape.groups();
                let codes = (0..n * bits.row_bytes(k)).map(|i| (i * 37 % 251) as u8).collect();
                let (scales, zeros) = (vec![0.0078125; groups], vec![8; groups]);
                let parts = GroupedParts { shape, codes, scales, zeros, perm: None };
                Grouped::new(&decl.label, parts).map(Weight::Grouped)
            }
        };
        made.map_err(|e| Error::Source { label: decl.label.clone(), source: Box::new(e) })
    }
}
