//! What a GPU's memory gives, measured: decoding can be no faster.
//!
//! Not here: the processor's ([`crate::devices`]). Input: an opened device.

use super::gpu::{Arg, Gpu, Launch};
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
}
