//! What the benchmarks time: programs of made-up weights, beyond all caches or of a whole decoder.
//!
//! Not here: timing, which each benchmark does its own way. `cargo bench -p benches`.

pub mod decoder;
pub mod linear;
