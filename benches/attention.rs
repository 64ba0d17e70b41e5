//! Attention by context on the CPU: `attention/{heads}/context {c}/rows {m}`, throughput in the
//! KV bytes that must move. Shapes are those of TinyLlama-1.1B: 32 query heads of width 64.
//!
//! A step writes the rows' keys and values and attends in 22 layers, so that a long context is
//! read from memory as in a model. Not here: linears; how good the results are.

#![allow(missing_docs)]

use benches::linear::Random;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::cpu::{CpuBackend, CpuOptions};
use kernels::program::{
    BlockId, Heads, KvDecl, KvLayer, Mask, Op, Program, Rows, SlotDecl, SlotId, Step, TokenId,
    WeightDecl, WeightId,
};
use kernels::{Backend, BlockTables, Runner, StepInput, StepLimits, StepOutput};
use quant::{FloatType, Format};

const LAYERS: usize = 22;
const HEADS: usize = 32;
const WIDTH: usize = 64;
const BLOCK: usize = 16;
/// Query rows of a step.
const ROWS: [usize; 4] = [1, 4, 16, 64];
const CONTEXTS: [usize; 5] = [128, 512, 2048, 4096, 8192];

/// A runner of nothing but attention layers.
struct Attention {
    runner: Box<dyn Runner>,
    output: StepOutput,
    kv_heads: usize,
}

impl Attention {
    fn new(kv_heads: usize) -> Option<Self> {
        let backend = CpuBackend::new(&CpuOptions::default()).ok()?;
        let limits = StepLimits {
            tokens: ROWS[ROWS.len() - 1],
            sequences: 1,
            outputs: 1,
            blocks: CONTEXTS[CONTEXTS.len() - 1] / BLOCK,
            block_len: BLOCK,
            context_len: CONTEXTS[CONTEXTS.len() - 1],
            trace: false,
        };
        let program = program(kv_heads);
        let runner = backend.build(&program, &Random(program.clone()), &limits).ok()?;
        let mut attention = Self { runner, output: StepOutput::default(), kv_heads };
        for end in (limits.tokens..=limits.blocks * BLOCK).step_by(limits.tokens) {
            attention.step(end, limits.tokens);
        }
        Some(attention)
    }

    /// Keys and values that a step over a context reads.
    fn bytes(&self, context: usize) -> usize {
        LAYERS * context * self.kv_heads * WIDTH * 2 * size_of::<u16>()
    }

    /// The last `rows` positions of a context.
    fn step(&mut self, context: usize, rows: usize) {
        let positions: Vec<u32> = ((context - rows) as u32..context as u32).collect();
        let tokens: Vec<TokenId> = positions.iter().map(|p| TokenId(p % 16)).collect();
        let blocks: Vec<BlockId> = (0..(context / BLOCK) as u32).map(BlockId).collect();
        let input = StepInput {
            tokens: &tokens,
            positions: &positions,
            rope_lens: &vec![context as u32; rows],
            query_ends: &[rows as u32],
            context_lens: &[context as u32],
            block_tables: BlockTables { blocks: &blocks, ends: &[blocks.len() as u32] },
            output_rows: &[rows as u32 - 1],
            draws: &[],
        };
        let done = self.runner.step(&input, &mut self.output);
        assert!(done.is_ok(), "{done:?}");
    }
}

/// Embed, then in every layer write keys and values and attend.
fn program(kv_heads: usize) -> Program {
    let width = (HEADS + 2 * kv_heads) * WIDTH;
    let slot = |label: &str, rows, width| SlotDecl { label: label.to_owned(), rows, width };
    let [qkv, attn, out] = [0, 1, 2].map(SlotId);
    let heads = |start, count| Heads { slot: qkv, start: start * WIDTH, count, width: WIDTH };
    let mut ops = vec![Op::Embed { table: WeightId(0), out: qkv }];
    for layer in (0..LAYERS as u32).map(KvLayer) {
        let (k, v) = (heads(HEADS, kv_heads), heads(HEADS + kv_heads, kv_heads));
        ops.push(Op::KvWrite { layer, k, v });
        let q = heads(0, HEADS);
        ops.push(Op::Attend { q, layer, mask: Mask::Causal, scale: 0.125, out: attn });
    }
    ops.push(Op::Gather { x: attn, out });
    let format = Format::Dense(FloatType::Bf16);
    Program {
        weights: vec![WeightDecl::new("table", [16, width], format)],
        slots: vec![
            slot("qkv", Rows::Tokens, width),
            slot("attn", Rows::Tokens, HEADS * WIDTH),
            slot("out", Rows::Outputs, HEADS * WIDTH),
        ],
        ropes: vec![],
        kv: vec![KvDecl { heads: kv_heads, head_width: WIDTH }; LAYERS],
        steps: ops.into_iter().map(|op| Step { label: op.name().to_owned(), op }).collect(),
        logits: out,
    }
}

fn attention(c: &mut Criterion) {
    for kv_heads in [4, HEADS] {
        let mut group = c.benchmark_group(format!("attention/{HEADS} over {kv_heads} heads"));
        group.sample_size(10);
        let Some(mut attention) = Attention::new(kv_heads) else { continue };
        for context in CONTEXTS {
            group.throughput(Throughput::Bytes(attention.bytes(context) as u64));
            for rows in ROWS {
                let id = BenchmarkId::new(format!("context {context}"), format!("rows {rows}"));
                group.bench_function(id, |b| b.iter(|| attention.step(context, rows)));
            }
        }
        group.finish();
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
