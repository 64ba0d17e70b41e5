//! What this machine offers: its processor's instruction sets and its memory bandwidth, measured.
//!
//! Not here: choosing ([`crate::cpu`]). Decode speed is bounded by bytes per token over
//! [`read_bandwidth`].

use crate::cpu::{Isa, available_threads};
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

/// Something programs can run on, or why they cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// For example `cpu avx2`.
    pub name: String,
    /// Why it cannot be used; none if it can.
    pub unavailable: Option<String>,
    /// What it has, in words.
    pub features: String,
}

/// All devices this program knows, available or not, fastest first.
pub fn list() -> Vec<Device> {
    let gpus = ["cuda", "wgpu"].map(|name| Device {
        name: name.to_owned(),
        unavailable: Some("not built yet".to_owned()),
        features: String::new(),
    });
    gpus.into_iter().chain(Isa::ALL.into_iter().rev().map(cpu)).collect()
}

fn cpu(isa: Isa) -> Device {
    let missing = isa.missing();
    let lacks = || format!("this processor lacks {}", missing.join(", "));
    let what = match isa {
        Isa::Scalar => "any processor",
        Isa::Avx2 => "avx2, fma, f16c",
        Isa::Avx512 => "avx512 f, bw, vl, vnni",
        Isa::Amx => "avx512 f, bw, vl, vnni; amx tile, int8",
    };
    Device {
        name: format!("cpu {isa}"),
        unavailable: (!missing.is_empty()).then(lacks),
        features: format!("{what}; {} threads", available_threads()),
    }
}

/// Bytes of the buffer that is read: far beyond any cache.
const BUFFER: usize = 256 << 20;
/// Streams a thread reads side by side; one alone does not fill the memory's queues.
const STREAMS: usize = 4;
/// Passes; the best counts, since other programs can only slow one down.
const PASSES: usize = 5;

/// Bytes per second that `threads` threads read from memory together, measured now in a fraction
/// of a second.
pub fn read_bandwidth(threads: usize) -> f64 {
    let threads = threads.max(1);
    let part = BUFFER / 8 / threads;
    let start = Barrier::new(threads);
    let times = std::thread::scope(|scope| {
        let reader = || {
            // Not zero: untouched zero pages would all be one page.
            let words = vec![1u64; part];
            let mut passes = [(Instant::now(), 0.0); PASSES];
            for pass in &mut passes {
                start.wait();
                pass.0 = Instant::now();
                black_box(sum(&words));
                pass.1 = pass.0.elapsed().as_secs_f64();
            }
            passes
        };
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(reader)).collect();
        handles.into_iter().filter_map(|handle| handle.join().ok()).collect::<Vec<_>>()
    });
    let pass = |i: usize| {
        let begin = times.iter().map(|passes| passes[i].0).min();
        let ends = times.iter().map(|passes| passes[i]);
        let end = |(at, seconds): (Instant, f64)| {
            begin.map_or(0.0, |begin| (at - begin).as_secs_f64()) + seconds
        };
        ends.map(end).fold(0.0, f64::max)
    };
    let best = (0..PASSES).map(pass).fold(f64::INFINITY, f64::min);
    (part * threads * 8) as f64 / best
}

/// Sum of all words, read as [`STREAMS`] streams at once.
fn sum(words: &[u64]) -> u64 {
    let stream = words.len() / STREAMS;
    let mut sums = [[0u64; 8]; STREAMS];
    for i in (0..stream / 8 * 8).step_by(8) {
        for (s, sums) in sums.iter_mut().enumerate() {
            let line = &words[s * stream + i..][..8];
            for (sum, word) in sums.iter_mut().zip(line) {
                *sum = sum.wrapping_add(*word);
            }
        }
    }
    sums.iter().flatten().fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_plausible() {
        let found = read_bandwidth(1);
        // slower than any disk or faster than any memory would be a mistake
        assert!((1e8..1e13).contains(&found), "{found}");
    }

    #[test]
    fn the_scalar_cpu_is_always_there() {
        let all = list();
        assert_eq!(all.len(), 2 + Isa::ALL.len());
        let scalar = all.iter().find(|d| d.name == "cpu scalar").unwrap();
        assert_eq!(scalar.unavailable, None);
    }
}
