//! Text to tokens and back with the demo pair's tokenizer: `tokenizer/{way}/{text}`, throughput in
//! bytes of text.
//!
//! Texts: `code` is this file, `prose` the licence. `stream` decodes token by token, as text
//! reaches a reader; it may cost no more than a small part of the step that makes a token.

#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::files::ModelFiles;
use engine::stream::TextStream;
use engine::tokenizer::Tokenizer;
use kernels::program::TokenId;
use std::time::Duration;

const TEXTS: [(&str, &str); 2] =
    [("code", include_str!("tokenizer.rs")), ("prose", include_str!("../LICENSE-APACHE"))];

fn streamed(tokenizer: &Tokenizer, ids: &[TokenId]) -> usize {
    let mut stream = TextStream::new(tokenizer, vec![]);
    ids.iter().map(|id| stream.push(*id).expect("a token of the vocabulary").text.len()).sum()
}

fn tokenizers(c: &mut Criterion) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../server/demo/draft");
    let tokenizer = Tokenizer::from_files(&ModelFiles::Folder(folder.into()));
    let tokenizer = tokenizer.expect("the demo's tokenizer");
    let mut group = c.benchmark_group("tokenizer");
    group.sample_size(20).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1));
    for (name, text) in TEXTS {
        let ids = tokenizer.encode(text, false).expect("tokens of a text");
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(BenchmarkId::new("encode", name), |b| {
            b.iter(|| tokenizer.encode(text, false));
        });
        group.bench_function(BenchmarkId::new("decode", name), |b| {
            b.iter(|| tokenizer.decode(&ids, false));
        });
        group.bench_function(BenchmarkId::new("stream", name), |b| {
            b.iter(|| streamed(&tokenizer, &ids));
        });
    }
    group.finish();
}

criterion_group!(benches, tokenizers);
criterion_main!(benches);
