//! Prompt lookup in real text: `lookup/{work}/{tokens}`, throughput in tokens.
//!
//! `extend` indexes a text of so many tokens, as at a prompt. `step` adds one token to a text of
//! that length and proposes eight, as while generating. Text: sources of the engine, in the demo
//! pair's tokens. Target: 1 us a token, against milliseconds of the step that makes a token.

#![allow(missing_docs, clippy::print_stdout)]

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::files::ModelFiles;
use engine::speculation::lookup::Lookup;
use engine::tokenizer::Tokenizer;
use kernels::program::TokenId;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Steps timed at once, so that the copy of the index they start from costs nothing.
const STEPS: usize = 256;

/// Rust sources below a folder, in the order of their names.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder of sources");
    let mut paths: Vec<PathBuf> = entries.map(|e| e.expect("a file of it").path()).collect();
    paths.sort();
    let below = |path: PathBuf| if path.is_dir() { sources(&path) } else { vec![path] };
    paths.into_iter().flat_map(below).collect()
}

fn text() -> Vec<TokenId> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let files = ModelFiles::Folder(root.join("server/demo/draft"));
    let tokenizer = Tokenizer::from_files(&files).expect("the demo's tokenizer");
    let encode = |path: PathBuf| {
        let text = std::fs::read_to_string(path).expect("a source");
        tokenizer.encode(&text, false).expect("tokens of a text")
    };
    sources(&root.join("engine/src")).into_iter().flat_map(encode).collect()
}

fn index(text: &[TokenId]) -> Lookup {
    let mut lookup = Lookup::default();
    lookup.extend(text);
    lookup
}

/// Adds tokens one by one, with a proposal after each.
fn steps(lookup: &mut Lookup, tokens: &[TokenId], out: &mut Vec<TokenId>) {
    for token in tokens {
        lookup.extend(std::slice::from_ref(token));
        out.clear();
        lookup.propose(8, 1, out);
    }
}

fn lookups(c: &mut Criterion) {
    let text = text();
    let mut group = c.benchmark_group("lookup");
    group.sample_size(20).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1));
    for len in [4096, 32_768] {
        let (start, next) = text[..len + STEPS].split_at(len);
        let lookup = index(start);
        println!("lookup/{len}: {} bytes a token", lookup.bytes() / len);
        group.throughput(Throughput::Elements(len as u64));
        group.bench_function(BenchmarkId::new("extend", len), |b| b.iter(|| index(start)));
        group.throughput(Throughput::Elements(STEPS as u64));
        let mut out = Vec::new();
        group.bench_function(BenchmarkId::new("step", len), |b| {
            let copy = || lookup.clone();
            b.iter_batched_ref(copy, |l| steps(l, next, &mut out), BatchSize::LargeInput);
        });
    }
    group.finish();
}

criterion_group!(benches, lookups);
criterion_main!(benches);
