//! What the benchmarks time: programs of made-up weights beyond all caches.
//!
//! Not here: timing, which each benchmark does its own way. `cargo bench -p benches`. Whole steps,
//! and linears against the machine's bandwidth, are measured by `foretoken bench`.

pub mod linear;
