//! One to eight rows of activations times blocks of nibbles or bytes with AVX-512 and VNNI.
//!
//! ```text
//! acc[r] += scale * x_scale[r, b] * ( zero * x_sum[r, b] + sum over lines l of b of l . quads )
//! a line of nibbles   a load and 3 operations to open it, 2 `vpdpbusd` a row
//! a line of bytes     a load, 1 `vpdpbusd` a row
//! a block's end       4 operations a row
//! ```
//! The bound is `vpdpbusd`: a block of 64 columns takes 16 of them a row, and its end 3 operations
//! of the same two pipes, so 16 / 19 of the peak can be had; 0.80 were measured for 2 to 8 rows in
//! the first-level cache (Zen 4, 0.38 of 0.467 TOPS a core). Their latency is 4 cycles: four rows or
//! less get two sums each. This is a function of its own, not inlined, so that registers are
//! allocated for it alone: as part of the whole kernel eight rows took more than twice as long.
//! Reference: [`super::super::blocks`].

// Loops over rows count indices: they unroll whole, over several arrays at once.
#![allow(clippy::needless_range_loop)]

use super::super::blocks::CodeBlocks;
use super::super::simd::{LANES, Line};
use super::Avx512;
use std::arch::x86_64::*;

/// Rows from which one sum each hides the latency.
const ONE_SUM: usize = 5;

/// Adds `job`'s blocks to the accumulators of `R` rows; `Q` is the quads of a line: 2 for nibbles,
/// 1 for bytes.
///
/// # Panics
/// If a slice is shorter than its lines and rows need.
#[inline(always)]
pub(super) fn dot_blocks<const R: usize, const Q: usize>(
    _: Avx512,
    job: &CodeBlocks<'_, Avx512>,
    acc: &mut [[f32; LANES]; R],
) {
    job.check(R, Q);
    assert!(job.block_lines.is_multiple_of(2 / Q), "a sum without its partner");
    // SAFETY: the first argument proves the features. `check` has made sure that there are whole
    // blocks of lines, Q quads of each row for each line and a scale of each row for each block.
    unsafe { run::<R, Q>(job, acc) }
}

/// # Safety
/// The processor must have the features, and `job` must have passed its check for `R` and `Q`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
unsafe fn run<const R: usize, const Q: usize>(
    job: &CodeBlocks<'_, Avx512>,
    acc: &mut [[f32; LANES]; R],
) {
    let (mut quads, mut scales) = (job.quads.as_ptr(), job.scales.as_ptr());
    let row = job.block_lines * Q;
    let (mut line, mut ahead) = (job.lines.as_ptr(), job.ahead.as_ptr());
    // What is asked for need not exist, but the same line again costs least where there is none.
    let ahead_step = usize::from(!job.ahead.is_empty());
    for _ in 0..job.count {
        let mut sums = [[_mm512_setzero_si512(); R]; 2];
        for r in 0..R {
            // SAFETY: each row has a scale for each block.
            let sum = unsafe { (*scales.add(r)).sum };
            sums[0][r] = _mm512_mullo_epi32(job.zero, _mm512_set1_epi32(sum));
        }
        let end = line.wrapping_add(job.block_lines);
        while line < end {
            // SAFETY: `line` is one of the job's lines, or with bytes the first of two; rows have Q
            // quads for each. A prefetch changes nothing, wherever it points.
            unsafe {
                for i in 0..2 / Q {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(i).cast());
                }
                let codes = open::<Q>(line);
                for half in 0..2 {
                    let chain = if R < ONE_SUM { half } else { 0 };
                    for r in 0..R {
                        let quad = _mm512_set1_epi32(*quads.add(r * row + half));
                        sums[chain][r] = _mm512_dpbusd_epi32(sums[chain][r], codes[half], quad);
                    }
                }
                quads = quads.add(2);
            }
            (line, ahead) = (line.wrapping_add(2 / Q), ahead.wrapping_add(ahead_step * 2 / Q));
        }
        for r in 0..R {
            // SAFETY: as above.
            let scale = unsafe { (*scales.add(r)).scale };
            let scale = _mm512_mul_ps(job.scale, _mm512_set1_ps(scale));
            let dots = match R < ONE_SUM {
                true => _mm512_add_epi32(sums[0][r], sums[1][r]),
                false => sums[0][r],
            };
            // SAFETY: an accumulator has sixteen floats.
            unsafe {
                let before = _mm512_loadu_ps(acc[r].as_ptr());
                let after = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dots), before);
                _mm512_storeu_ps(acc[r].as_mut_ptr(), after);
            }
        }
        quads = quads.wrapping_add((job.height - 1) * row);
        scales = scales.wrapping_add(job.height);
    }
}

/// The codes for the next two quads: those of one line of nibbles, or of two lines of bytes.
///
/// # Safety
/// `line` must point to that many lines.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn open<const Q: usize>(line: *const Line) -> [__m512i; 2] {
    // SAFETY: the caller's promise; lines are aligned to 64 bytes.
    unsafe {
        let first = _mm512_load_si512(line.cast());
        if Q == 1 {
            return [first, _mm512_load_si512(line.add(1).cast())];
        }
        let (mask, high) = (_mm512_set1_epi8(15), _mm512_srli_epi16::<4>(first));
        [_mm512_and_si512(first, mask), _mm512_and_si512(high, mask)]
    }
}
