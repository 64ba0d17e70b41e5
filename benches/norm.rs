//! Norms on the CPU: `norm/{width}/m{rows}`, residual add and root mean square norm, throughput in
//! bytes that must move: two rows read, two written, the weight once.
//!
//! A repetition is a step of [`NORMS`] norms one after another, so that waking the threads does not
//! count; the rows stay in the caches, as they do in a model. Not here: linears (`cpu`).

#![allow(missing_docs)]

use benches::linear::Random;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::cpu::{CpuBackend, CpuOptions};
use kernels::program::{
    BlockId, Op, Program, Rows, SlotDecl, SlotId, Step, TokenId, WeightDecl, WeightId,
};
use kernels::{Backend, BlockTables, Runner, StepInput, StepLimits, StepOutput};
use quant::{FloatType, Format};
use std::time::Duration;

/// Norms of a step.
const NORMS: usize = 64;
/// Most rows of a step.
const ROWS: usize = 128;

/// `x = table[token]; y = table[token]; NORMS times: x += y, out = norm(x)`.
fn program(width: usize) -> Program {
    let [x, y, out, last] = [0, 1, 2, 3].map(SlotId);
    let weight = |label, shape| WeightDecl::new(label, shape, Format::Dense(FloatType::F32));
    let slot = |label: &str, rows| SlotDecl { label: label.to_owned(), rows, width };
    let table = WeightId(0);
    let norm = Op::Norm { x, add: Some(y), weight: WeightId(1), eps: 1e-5, out };
    let mut ops = vec![Op::Embed { table, out: x }, Op::Embed { table, out: y }];
    ops.extend(std::iter::repeat_n(norm, NORMS));
    ops.push(Op::Gather { x: out, out: last });
    Program {
        weights: vec![weight("table", [2, width]), weight("weight", [1, width])],
        slots: vec![
            slot("x", Rows::Tokens),
            slot("y", Rows::Tokens),
            slot("out", Rows::Tokens),
            slot("last", Rows::Outputs),
        ],
        ropes: vec![],
        kv: vec![],
        steps: ops.into_iter().map(|op| Step { label: op.name().to_owned(), op }).collect(),
        logits: last,
    }
}

fn runner(width: usize) -> Box<dyn Runner> {
    let limits = StepLimits {
        tokens: ROWS,
        sequences: 1,
        outputs: 1,
        blocks: 1,
        block_len: ROWS,
        context_len: ROWS,
        trace: false,
    };
    let program = program(width);
    let backend = CpuBackend::new(&CpuOptions::default()).expect("this machine's processor");
    backend.build(&program, &Random(program.clone()), &limits).expect("a program of norms")
}

fn step(runner: &mut dyn Runner, rows: &[u32], output: &mut StepOutput) {
    let m = rows.len() as u32;
    let input = StepInput {
        tokens: &[TokenId(1); ROWS][..rows.len()],
        positions: rows,
        rope_lens: &[ROWS as u32; ROWS][..rows.len()],
        query_ends: &[m],
        context_lens: &[m],
        block_tables: BlockTables { blocks: &[BlockId(0)], ends: &[1] },
        output_rows: &[m - 1],
        draws: &[],
    };
    let done = runner.step(&input, output);
    assert!(done.is_ok(), "{done:?}");
}

fn norms(c: &mut Criterion) {
    for width in [2048, 4096] {
        let (mut runner, mut output) = (runner(width), StepOutput::default());
        let mut group = c.benchmark_group(format!("norm/{width}"));
        group.sample_size(20).warm_up_time(Duration::from_millis(300));
        group.measurement_time(Duration::from_secs(1));
        for m in [1, 8, ROWS] {
            let rows: Vec<u32> = (0..m as u32).collect();
            group.throughput(Throughput::Bytes((NORMS * 4 * width * (4 * m + 1)) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("m{m}")), |b| {
                b.iter(|| step(runner.as_mut(), &rows, &mut output));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, norms);
criterion_main!(benches);
