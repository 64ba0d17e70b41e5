//! What a GPU's memory and its tensor instructions give, measured: decoding and prefill can be no
//! faster.
//!
//! Not here: the processor's ([`crate::devices`]). Input: an opened device.

use super::gpu::{Arg, Gpu, Launch, Pointer};
use crate::Error;
use std::time::Instant;

/// Blocks of the reading kernel: several for each multiprocessor of the largest devices.
const BLOCKS: usize = 1024;
/// Bytes that all blocks take in one turn.
const TURN: usize = 4 * 256 * BLOCKS * 16;
/// Passes over the memory in a measurement, and measurements, the best of which counts.
const PASSES: usize = 4;
const MEASUREMENTS: usize = 5;

/// Bytes per second that `gpu` reads from `bytes` of its memory, at least one turn of 16 MiB; they
/// should be far more than its caches hold.
///
/// # Errors
/// Want of memory, or the driver's reason.
pub(crate) fn read_bandwidth(gpu: &mut dyn Gpu, bytes: usize) -> Result<f64, Error> {
    let turns = (bytes / TURN).max(1);
    let (memory, out) = (gpu.alloc(turns * TURN)?, gpu.alloc(4)?);
    let vectors = i32::try_from(turns * TURN / 16).unwrap_or(i32::MAX);
    let launch = Launch {
        kernel: "read_memory",
        grid: [BLOCKS as u32, 1, 1],
        threads: 256,
        shared: 0,
        args: vec![Arg::Pointer(memory), Arg::Pointer(out), Arg::Int(vectors)],
    };
    let mut best = f64::MAX;
    for _ in 0..=MEASUREMENTS {
        let start = Instant::now();
        (0..PASSES).try_for_each(|_| gpu.launch(&launch))?;
        gpu.read(out, &mut [0; 4])?;
        // The first one loads the kernel; it is no better than the others.
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok((PASSES * turns * TURN) as f64 / best)
}

/// Blocks and rounds of the multiplying kernel: some milliseconds of work for the largest devices.
const MULTIPLIERS: usize = 1024;
const ROUNDS: usize = 4096;
/// Operations of a block in a round: eight warps, each eight products of 16 x 32 and 32 x 8.
const BLOCK_OPS: usize = 8 * 8 * 2 * 16 * 8 * 32;

/// Operations per second that `gpu` does on 8-bit integers, a product and a sum being two.
///
/// # Errors
/// Want of memory, or the driver's reason.
pub(crate) fn int8_peak(gpu: &mut dyn Gpu) -> Result<f64, Error> {
    let out = gpu.alloc(4 * 256 * MULTIPLIERS)?;
    let launch = multiply(out, MULTIPLIERS, ROUNDS);
    let mut best = f64::MAX;
    for _ in 0..=MEASUREMENTS {
        let start = Instant::now();
        gpu.launch(&launch)?;
        gpu.read(out, &mut [0; 4])?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok((MULTIPLIERS * ROUNDS * BLOCK_OPS) as f64 / best)
}

fn multiply(out: Pointer, blocks: usize, rounds: usize) -> Launch {
    let args = vec![Arg::Pointer(out), Arg::Int(i32::try_from(rounds).unwrap_or(i32::MAX))];
    let grid = [blocks as u32, 1, 1];
    Launch { kernel: "multiply_tiles", grid, threads: 256, shared: 0, args }
}

#[cfg(test)]
mod tests {
    use super::super::emulated::Emulated;
    use super::*;

    #[test]
    fn all_of_the_memory_is_read_and_nothing_else() {
        if let Err(why) = emulator::available() {
            return println!("skipped: {why}");
        }
        let mut gpu = Emulated::new(emulator::Options::default()).unwrap();
        let memory = gpu.alloc(TURN).unwrap();
        let out = gpu.alloc(4).unwrap();
        let args = vec![Arg::Pointer(memory), Arg::Pointer(out), Arg::Int(4 * 256 * 2)];
        let grid = [2, 1, 1];
        let launch = Launch { kernel: "read_memory", grid, threads: 256, shared: 0, args };
        // One bit in every vector: the sum has them all; the next byte is not seen.
        let mut bytes = vec![0; 4 * 256 * 2 * 16 + 1];
        for i in 0..4 * 256 * 2 {
            bytes[16 * i + i % 16] |= 1 << (i % 8);
        }
        *bytes.last_mut().unwrap() = 255;
        gpu.write(memory, &bytes).unwrap();
        gpu.launch(&launch).unwrap();
        let mut sum = [0; 4];
        gpu.read(out, &mut sum).unwrap();
        assert_ne!(sum, [0; 4]);
        for hidden in [0, 777, 4 * 256 * 2 - 1] {
            bytes.fill(0);
            bytes[16 * hidden + 5] = 1;
            gpu.write(memory, &bytes).unwrap();
            gpu.write(out, &[0; 4]).unwrap();
            gpu.launch(&launch).unwrap();
            gpu.read(out, &mut sum).unwrap();
            assert_eq!(sum, [0, 1, 0, 0], "vector {hidden}");
        }
    }
    #[test]
    fn every_round_adds_to_every_sum() {
        if let Err(why) = emulator::available() {
            return println!("skipped: {why}");
        }
        let mut gpu = Emulated::new(emulator::Options::default()).unwrap();
        let out = gpu.alloc(4 * 256 * 2).unwrap();
        let mut sums = |rounds: usize| {
            gpu.launch(&multiply(out, 2, rounds)).unwrap();
            let mut sums = vec![0i32; 256 * 2];
            gpu.read(out, bytemuck::cast_slice_mut(&mut sums)).unwrap();
            sums
        };
        let [none, one, two] = [0, 1, 2].map(&mut sums);
        assert!(none.iter().all(|&sum| sum == 0));
        // The first round's operands are those of a thread; both blocks do the same.
        let (first, second) = one.split_at(256);
        assert!(first == second && first.iter().skip(32).all(|&sum| sum != 0));
        assert!(two.iter().zip(&one).skip(32).take(224).all(|(two, one)| two != one));
    }
}
