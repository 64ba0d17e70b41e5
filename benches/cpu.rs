//! Linears on the CPU: `linear/{format} {isa}/{n}x{k}/m{rows}`, throughput in bytes that must
//! move. Every repetition walks weights beyond all caches.

#![allow(missing_docs)]

use benches::linear::{Linears, Setup, w4g128};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::cpu::Isa;
use quant::{FloatType, Format};

fn linears(c: &mut Criterion) {
    for isa in [Isa::Avx2, Isa::Avx512] {
        for format in [w4g128(), Format::Dense(FloatType::F16)] {
            let mut group = c.benchmark_group(format!("linear/{format} {isa}"));
            group.sample_size(10);
            for shape in [[4096, 4096], [1024, 4096], [4096, 14336]] {
                let setup = Setup { format, shape, isa: Some(isa), threads: None };
                let Some(mut linears) = Linears::new(setup) else { continue };
                for m in [1, 4, 16] {
                    let bytes = (linears.bytes(m) * linears.copies()) as u64;
                    group.throughput(Throughput::Bytes(bytes));
                    let id =
                        BenchmarkId::new(format!("{}x{}", shape[0], shape[1]), format!("m{m}"));
                    group.bench_function(id, |b| b.iter(|| linears.step(m)));
                }
            }
            group.finish();
        }
    }
}

criterion_group!(benches, linears);
criterion_main!(benches);
