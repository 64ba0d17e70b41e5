//! How many launches a layer takes, and which.

use crate::cuda::estimate::memory;
use crate::cuda::gpu::{Gpu, Launch, Pointer, Recorded};
use crate::cuda::runner::CudaRunner;
use crate::program::{
    Activation, BlockId, Heads, KvDecl, KvLayer, Mask, Op, Program, RopeDecl, RopeId, RopeSpeeds,
    Rounding, Rows, SlotDecl, SlotId, SlotView, Step, TokenId, WeightDecl, WeightId,
};
use crate::{BlockTables, Error, Runner, StepInput, StepLimits, StepOutput, WeightSource};
use quant::{Bits, Dense, Format, Grouped, GroupedParts, GroupedShape, Weight};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A device that does nothing, and tells which kernels it was asked for.
#[derive(Default)]
struct Listening {
    end: u64,
    kernels: Arc<Mutex<Vec<&'static str>>>,
}

impl Gpu for Listening {
    fn multiprocessors(&self) -> usize {
        132
    }

    fn alloc(&mut self, bytes: usize) -> Result<Pointer, Error> {
        self.end += 256;
        let at = Pointer(self.end);
        self.end += bytes as u64;
        Ok(at)
    }

    fn write(&mut self, _: Pointer, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    fn read(&mut self, _: Pointer, _: &mut [u8]) -> Result<(), Error> {
        Ok(())
    }

    fn launch(&mut self, launch: &Launch) -> Result<(), Error> {
        self.kernels.lock().unwrap().push(launch.kernel);
        Ok(())
    }

    fn replay(&mut self, recorded: &Recorded) -> Result<(), Error> {
        recorded.launches.iter().try_for_each(|launch| self.launch(launch))
    }
}

const D: usize = 128;
const F: usize = 256;
const HEAD: usize = 64;
const VOCAB: usize = 16;

/// Delivers zeros.
struct Zeros(Vec<WeightDecl>);

impl WeightSource for Zeros {
    fn load(&self, id: WeightId, rows: Range<usize>) -> Result<Weight<'_>, Error> {
        let [n, k] = [rows.len(), self.0[id.index()].shape[1]];
        Ok(match self.0[id.index()].format {
            Format::Dense(_) => Weight::Dense(Dense::from_f32([n, k], &vec![0.0; n * k])),
            Format::Grouped { bits, group, .. } => {
                let shape = GroupedShape { n, k, group, bits };
                let (codes, scales) = (vec![0; bits.row_bytes(k) * n], vec![1.0; n * k / group]);
                let zeros = vec![0; n * k / group];
                let parts = GroupedParts { shape, codes, scales, zeros, perm: None };
                Weight::Grouped(Grouped::new("zeros", parts).unwrap())
            }
        })
    }
}

/// A decoder as a llama's is lowered, with norms of heads as some families have them.
struct Decoder {
    program: Program,
}

impl Decoder {
    fn weight(&mut self, shape: [usize; 2], format: Format) -> WeightId {
        let weights = &mut self.program.weights;
        weights.push(WeightDecl::new(format!("w{}", weights.len()), shape, format));
        WeightId(weights.len() as u32 - 1)
    }

    fn vector(&mut self, width: usize) -> WeightId {
        self.weight([1, width], Format::Dense(quant::FloatType::F32))
    }

    fn slot(&mut self, rows: Rows, width: usize) -> SlotId {
        let slots = &mut self.program.slots;
        slots.push(SlotDecl { label: format!("s{}", slots.len()), rows, width });
        SlotId(slots.len() as u32 - 1)
    }

    fn step(&mut self, op: Op) {
        self.program.steps.push(Step { op, label: "step".to_owned() });
    }

    fn linear(&mut self, x: SlotId, [n, k]: [usize; 2], slot: SlotId) {
        let format = Format::Grouped { bits: Bits::Four, group: 64, act_order: false };
        let weight = self.weight([n, k], format);
        let out = SlotView { slot, start: 0, width: n };
        self.step(Op::Linear { x, weight, bias: None, out });
    }

    fn norm(&mut self, [x, add, out]: [SlotId; 3], first: bool) {
        let weight = self.vector(D);
        self.step(Op::Norm { x, add: (!first).then_some(add), weight, eps: 1e-5, out });
    }

    /// A program of so many layers.
    fn program(layers: usize, head_norms: bool) -> Program {
        let (empty, none) = (Vec::new, SlotId(0));
        let program = Program {
            weights: vec![],
            slots: empty(),
            ropes: vec![],
            kv: vec![],
            steps: vec![],
            logits: none,
        };
        let mut d = Self { program };
        let speeds = RopeSpeeds::Fixed(vec![1.0; HEAD / 2]);
        d.program.ropes.push(RopeDecl { width: HEAD, speeds, amplitude: 1.0 });
        let wide = [D, D, D, 8 * HEAD, 4 * HEAD, 2 * F, F];
        let [x, normed, delta, qkv, attn, gates, act] = wide.map(|w| d.slot(Rows::Tokens, w));
        let table = d.weight([VOCAB, D], Format::Dense(quant::FloatType::F32));
        d.step(Op::Embed { table, out: x });
        for layer in 0..layers {
            d.norm([x, delta, normed], layer == 0);
            d.linear(normed, [8 * HEAD, D], qkv);
            d.attention(layer, [qkv, attn], head_norms);
            d.linear(attn, [D, 4 * HEAD], delta);
            d.norm([x, delta, normed], false);
            d.linear(normed, [2 * F, D], gates);
            d.step(Op::Activate { kind: Activation::Silu, x: gates, out: act });
            d.linear(act, [D, F], delta);
        }
        let logits = d.slot(Rows::Outputs, D);
        d.step(Op::Gather { x: delta, out: logits });
        d.program.logits = logits;
        d.program
    }

    fn attention(&mut self, layer: usize, [slot, out]: [SlotId; 2], head_norms: bool) {
        let heads = |first: usize, count| Heads { slot, start: first * HEAD, count, width: HEAD };
        let (q, k, v) = (heads(0, 4), heads(4, 2), heads(6, 2));
        for heads in [q, k].into_iter().filter(|_| head_norms) {
            let weight = self.vector(HEAD);
            self.step(Op::HeadNorm { heads, weight, eps: 1e-6 });
        }
        self.step(Op::Rope { heads: heads(0, 6), rope: RopeId(0) });
        let layer = KvLayer(layer as u32);
        self.program.kv.push(KvDecl { heads: 2, head_width: HEAD });
        self.step(Op::KvWrite { layer, k, v });
        self.step(Op::Attend { q, layer, mask: Mask::Causal, scale: 0.1, out });
    }
}

/// The kernels of a step of `tokens` tokens.
fn kernels(program: &Program, tokens: usize, trace: bool) -> Vec<&'static str> {
    let gpu = Listening::default();
    let kernels = Arc::clone(&gpu.kernels);
    let limits = StepLimits {
        tokens: 64,
        sequences: 1,
        outputs: 64,
        blocks: 4,
        block_len: 16,
        context_len: 64,
        trace,
    };
    let source = Zeros(program.weights.clone());
    let mut runner = CudaRunner::new(Box::new(gpu), program, &source, &limits).unwrap();
    let count = tokens as u32;
    let input = StepInput {
        tokens: &vec![TokenId(0); tokens],
        positions: &(0..count).collect::<Vec<_>>(),
        rope_lens: &vec![count; tokens],
        query_ends: &[count],
        context_lens: &[count],
        block_tables: BlockTables { blocks: &[0, 1, 2, 3].map(BlockId), ends: &[4] },
        output_rows: &[count - 1],
        draws: &[],
    };
    runner.step(&input, &mut StepOutput::default()).unwrap();
    kernels.lock().unwrap().clone()
}

/// Those of a layer that is not the first.
fn of_a_layer(tokens: usize, trace: bool, head_norms: bool) -> Vec<&'static str> {
    last_layer(|layers| kernels(&Decoder::program(layers, head_norms), tokens, trace))
}

/// Those that `of` has more of for three layers than for two.
fn last_layer(of: impl Fn(usize) -> Vec<&'static str>) -> Vec<&'static str> {
    let [two, three] = [2, 3].map(of);
    // All but the last launch, which gathers.
    let at = two.len() - 1;
    three[at..at + three.len() - two.len()].to_vec()
}

#[test]
fn a_layer_takes_six_launches_where_rows_are_few() {
    for head_norms in [false, true] {
        let expected = [
            "linear_w4_s64_m8",
            "heads",
            "attend_mma_64",
            "linear_w4_s64_m8",
            "linear_w4_s64_m8",
            "linear_w4_s64_m8",
        ];
        for tokens in [1, 4] {
            assert_eq!(of_a_layer(tokens, false, head_norms), expected);
        }
    }
}

#[test]
fn norms_of_more_rows_are_launches_of_their_own() {
    let expected = [
        "rms_norm_quantize",
        "linear_w4_s64_m8",
        "heads",
        "attend_mma_64",
        "linear_w4_s64_m8",
        "rms_norm_quantize",
        "linear_w4_s64_m8",
        "linear_w4_s64_m8",
    ];
    assert_eq!(of_a_layer(5, false, false), expected);
}

/// A layer with coarse rounding before its gates, in groups of so many columns.
fn with_coarse_gates(tokens: usize, group: usize) -> Vec<&'static str> {
    last_layer(|layers| {
        let mut program = Decoder::program(layers, false);
        for step in program.steps.windows(2) {
            if let [Op::Linear { weight, .. }, Op::Activate { .. }] = [&step[0].op, &step[1].op] {
                let gates = &mut program.weights[weight.index()];
                gates.format = Format::Grouped { bits: Bits::Four, group, act_order: false };
                gates.rounding = Rounding::Coarse;
            }
        }
        kernels(&program, tokens, false)
    })
}

#[test]
fn coarse_gates_have_kernels_of_their_own_and_leave_all_joins() {
    let expected = [
        "linear_w4_s64_m8",
        "heads",
        "attend_mma_64",
        "linear_w4_s64_m8",
        "linear_w4_s128_m8",
        "linear_w4_s64_m8",
    ];
    assert_eq!(with_coarse_gates(1, 128), expected);
    assert_eq!(with_coarse_gates(1, 64), of_a_layer(1, false, false), "no group is larger");
    let expected = [
        "rms_norm_quantize",
        "linear_w4_s64_m32",
        "heads",
        "attend_mma_64",
        "linear_w4_s64_m32",
        "rms_norm_quantize",
        "linear_w4_s128_m32",
        "linear_w4_s64_m32",
    ];
    assert_eq!(with_coarse_gates(20, 128), expected);
}

#[test]
fn scales_of_f16_and_one_zero_point_take_fewer_bytes() {
    let program = Decoder::program(1, false);
    let limits = StepLimits {
        tokens: 1,
        sequences: 1,
        outputs: 1,
        blocks: 4,
        block_len: 16,
        context_len: 64,
        trace: false,
    };
    let source = Zeros(program.weights.clone());
    let runner = CudaRunner::new(Box::new(Listening::default()), &program, &source, &limits);
    let (taken, most) = (runner.unwrap().memory(), memory(&program, &limits).unwrap());
    let groups = |decl: &WeightDecl| match decl.format {
        Format::Grouped { group, .. } => decl.shape[0] * decl.shape[1] / group,
        Format::Dense(_) => 0,
    };
    // Two bytes of four, and the zero point.
    let fewer: usize = program.weights.iter().map(|decl| 3 * groups(decl)).sum();
    assert!(fewer > 0);
    assert_eq!(taken.weights_bytes + fewer, most.weights_bytes);
}

#[test]
fn a_trace_keeps_all_steps_apart() {
    let kernels = of_a_layer(1, true, true);
    assert_eq!(kernels.len(), 12);
    for apart in ["head_norm", "rope", "kv_write", "activate_silu_quantize"] {
        assert!(kernels.contains(&apart), "{kernels:?}");
    }
}

#[test]
fn rows_choose_the_kernel() {
    for (tokens, name) in [(8, "m8"), (9, "m16"), (17, "m32"), (33, "m64")] {
        let kernels = of_a_layer(tokens, false, false);
        let expected = format!("linear_w4_s64_{name}");
        let linears = kernels.iter().filter(|kernel| kernel.contains("w4"));
        assert!(linears.clone().count() == 4 && linears.clone().all(|k| **k == expected));
    }
}
