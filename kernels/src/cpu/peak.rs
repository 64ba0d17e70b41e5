//! The most int8 products a core can add up: the dots of [`super::grouped`] with everything in
//! registers and nothing else to do.
//!
//! ```text
//! sum[m] += dot(code line, quad[m])   for M sums at once, flushed after every eight
//! in    one line of codes in registers, M quads in the first-level cache
//! out   a number that depends on every sum, so that none can be left out
//! split none: each thread runs its own
//! bytes none that count
//! ```
//! This is the bound of a linear over 4-bit weights by this instruction set's dots, exact sums
//! included. Not here: the clock ([`crate::devices::int8_peak`]).

use super::isa::Kernel;
use super::simd::{LANES, Line, Simd};

/// Dots between flushes: as many as running sums bear.
const DOTS: usize = 8;

/// Multiplications and additions of a dot.
const DOT_OPS: usize = 2 * 4 * LANES;

/// Rounds of the loop with `M` sums; each adds `8 M` dots.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peak<const M: usize> {
    pub(crate) rounds: usize,
}

impl<const M: usize> Peak<M> {
    /// Multiplications and additions of a run.
    pub(crate) fn ops(self) -> usize {
        self.rounds * DOTS * M * DOT_OPS
    }
}

impl<const M: usize> Kernel for Peak<M> {
    type Output = i32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> i32 {
        let line = std::hint::black_box(Line([0x35; 64]));
        let codes = s.open_nibbles(&line)[0];
        let quads: [[i32; M]; DOTS] = std::array::from_fn(|i| [0x0102_0304 + i as i32; M]);
        let mut totals = [s.splat_i(0); M];
        for _ in 0..self.rounds {
            // The compiler must take the quads for new ones, or it would multiply only once; and as
            // many as there may be, or it would unroll the loop and run out of registers.
            let quads: &[[i32; M]] = std::hint::black_box(&quads);
            let mut sums = [s.zero_nibbles(); M];
            for quads in quads {
                for (sum, &quad) in sums.iter_mut().zip(quads) {
                    *sum = s.dot_nibbles(*sum, codes, quad);
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

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;

    #[test]
    fn every_dot_is_added_up() {
        // A round adds, for each sum and lane, eight dots of the code 5 with 4 + i, 3, 2 and 1.
        let lane: i32 = (0..8).map(|i| 5 * (4 + i + 3 + 2 + 1)).sum();
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
}
