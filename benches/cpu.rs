//! Linears on the CPU: `linear/{format} {isa}/{n}x{k}/m{rows}`, throughput in bytes that must
//! move. Every repetition walks weights beyond all caches, on all threads.
//!
//! The shapes are those of one 8-billion and one 1-billion-parameter model: attention output,
//! gate and up, down. Instruction sets that the processor lacks are left out and named.
//! `cargo bench -p benches --bench cpu -- 'w4.*avx2/4096x4096'`; `--test` runs the small ones once.

#![allow(missing_docs, clippy::print_stdout)]

use benches::linear::{Linears, Setup, w4g128};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::cpu::Isa;
use quant::{FloatType, Format};
use std::time::Duration;

const SMALL: [[usize; 2]; 3] = [[2048, 2048], [11264, 2048], [2048, 5632]];
const LARGE: [[usize; 2]; 3] = [[4096, 4096], [28672, 4096], [4096, 14336]];
const ROWS: [usize; 6] = [1, 2, 4, 8, 16, 64];

/// Whether everything runs just once, to see that it can.
fn once() -> bool {
    std::env::args().any(|arg| arg == "--test")
}

fn linears(c: &mut Criterion) {
    let shapes: Vec<[usize; 2]> =
        if once() { SMALL[..1].to_vec() } else { [SMALL, LARGE].concat() };
    for isa in Isa::ALL.into_iter().filter(|isa| *isa != Isa::Scalar) {
        if !isa.missing().is_empty() {
            println!("linear {isa}: left out, this processor lacks {}", isa.missing().join(", "));
            continue;
        }
        for shape in &shapes {
            bench(c, Setup { format: w4g128(), shape: *shape, isa: Some(isa), threads: None });
        }
        let format = Format::Dense(FloatType::F16);
        bench(c, Setup { format, shape: shapes[0], isa: Some(isa), threads: None });
    }
}

/// All row counts of one kind of linear.
fn bench(c: &mut Criterion, setup: Setup) {
    let ([n, k], isa) = (setup.shape, setup.isa.unwrap_or_else(Isa::best));
    let mut group = c.benchmark_group(format!("linear/{} {isa}", setup.format));
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1));
    let Some(mut linears) = Linears::new(setup) else { return };
    for m in ROWS {
        let bytes = linears.bytes(m) * linears.copies();
        group.throughput(Throughput::Bytes(bytes as u64));
        let id = BenchmarkId::new(format!("{n}x{k}"), format!("m{m}"));
        group.bench_function(id, |b| b.iter(|| linears.step(m)));
    }
    group.finish();
}

criterion_group!(benches, linears);
criterion_main!(benches);
