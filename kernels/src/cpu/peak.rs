//! The most a core can do of what bounds a linear: add up int8 products ([`Peak`]), read memory
//! ([`Read`]).
//!
//! ```text
//! Peak  sum[m] += dot(code line, quads[m])   for M sums at once, flushed after every eight quads
//!       one line of codes in registers, quads in the first-level cache, no bytes that count
//! Read  sum[i] += vectors of stream i        for some streams at once, each byte once
//! out   a number that depends on every sum, so that none can be left out
//! split none: each thread runs its own
//! ```
//! Not here: the clock ([`crate::devices`]).

use super::isa::Kernel;
use super::simd::{LANES, Line, Simd};

/// Lines between flushes: as many as running sums bear.
const LINES_A_FLUSH: usize = 4;

/// Multiplications and additions of a line's dots with two quads.
const LINE_OPS: usize = 2 * 2 * 4 * LANES;

/// Rounds of the loop with `M` sums; each adds the dots of `4 M` lines.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peak<const M: usize> {
    pub(crate) rounds: usize,
}

impl<const M: usize> Peak<M> {
    /// Multiplications and additions of a run.
    pub(crate) fn ops(self) -> usize {
        self.rounds * LINES_A_FLUSH * M * LINE_OPS
    }
}

impl<const M: usize> Kernel for Peak<M> {
    type Output = i32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> i32 {
        let line = std::hint::black_box(Line([0x35; 64]));
        let codes = s.open_nibbles(&line);
        // Two quads that a sum takes lie apart: they are broadcast from memory, as linears do.
        let quads: [[[i32; M]; 2]; LINES_A_FLUSH] =
            std::array::from_fn(|i| [[0x0102_0304 + i as i32; M]; 2]);
        let mut totals = [s.splat_i(0); M];
        for _ in 0..self.rounds {
            // The compiler must take the quads for new ones, or it would multiply only once; and as
            // many as there may be, or it would unroll the loop and run out of registers.
            let quads: &[[[i32; M]; 2]] = std::hint::black_box(&quads);
            let mut sums = totals.map(|total| s.start_nibbles(total));
            for [low, high] in quads {
                for (sum, (low, high)) in sums.iter_mut().zip(low.iter().zip(high)) {
                    *sum = s.dot_nibbles(*sum, codes, [*low, *high]);
                }
            }
            for (total, &sum) in totals.iter_mut().zip(&sums) {
                *total = s.flush_nibbles(sum, *total);
            }
        }
        let lanes = totals.iter().flat_map(|&total| s.lanes_i(total));
        lanes.fold(0, i32::wrapping_add)
    }
}

/// Reads vectors once, as `STREAMS` streams side by side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Read<'a, const STREAMS: usize>(pub(crate) &'a [[f32; LANES]]);

impl<const STREAMS: usize> Kernel for Read<'_, STREAMS> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (mut sums, each) = ([s.splat(0.0); STREAMS], self.0.len() / STREAMS);
        for i in 0..each {
            for (stream, sum) in sums.iter_mut().enumerate() {
                *sum = s.add(*sum, s.load(&self.0[stream * each + i]));
            }
        }
        s.sum(sums.into_iter().fold(s.splat(0.0), |all, sum| s.add(all, sum)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;

    #[test]
    fn every_dot_is_added_up() {
        // A round adds, for each sum and lane, four dots of the codes 5 and 3 with 4 + i, 3, 2, 1.
        let lane: i32 = (0..4).map(|i| (5 + 3) * (4 + i + 3 + 2 + 1)).sum();
        for isa in Isa::ALL {
            let Ok(machine) = isa.detect() else {
                println!("skipped: {} lacks {:?}", isa, isa.missing());
                continue;
            };
            let expected = 3 * 6 * LANES as i32 * lane;
            assert_eq!(machine.run(Peak::<6> { rounds: 3 }), expected, "{isa}");
            assert_eq!(machine.run(Peak::<12> { rounds: 3 }), 2 * expected, "{isa}");
        }
        assert_eq!(Peak::<6> { rounds: 3 }.ops(), 3 * 8 * 6 * 16 * 4 * 2);
    }

    #[test]
    fn every_vector_is_read_once() {
        let vectors: Vec<[f32; LANES]> = (0..40).map(|i| [i as f32; LANES]).collect();
        for machine in super::super::testing::machines() {
            let expected = (40 * 39 / 2 * LANES) as f32;
            assert_eq!(machine.run(Read::<1>(&vectors)), expected);
            assert_eq!(machine.run(Read::<4>(&vectors)), expected);
        }
    }
}
