//! Blocks of one tile of codes times some rows of int8 activations: the innermost work of a
//! quantized linear.
//!
//! ```text
//! acc[r] += scale * x_scale[r, b] * ( sum over columns i of b of code[i] * a[r, i]
//!                                     + zero * x_sum[r, b] )        for block after block b
//! in    lines of codes ([`super::packed`] has the picture), opened once for all rows
//!       a quad for each row and four columns; a scale and a sum for each row and block
//! out   `[rows, 16]` f32
//! ```
//! One operation of [`Simd`] after another; an instruction set may have a better way with the same
//! bits ([`Simd::dot_nibbles_of`], [`Simd::dot_bytes_of`]). Not here: which blocks and rows
//! ([`super::grouped`]).

// Loops over rows count indices: they unroll whole, over several arrays at once.
#![allow(clippy::needless_range_loop)]

use super::quantize::BlockScale;
use super::simd::{LANES, Line, Simd};

/// Lines of nibbles between flushes: their eight quads are as many as running sums bear.
const LINES: usize = 4;

/// Consecutive blocks of one tile and one weight group, and some rows of activations, of which all
/// rows of a block lie before the next block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CodeBlocks<'a, S: Simd> {
    /// `[blocks, block_lines]`
    pub(crate) lines: &'a [Line],
    pub(crate) block_lines: usize,
    /// Blocks.
    pub(crate) count: usize,
    /// `[blocks, height, quads of a block]`
    pub(crate) quads: &'a [i32],
    /// `[blocks, height]`
    pub(crate) scales: &'a [BlockScale],
    /// Rows that there is room for in a block.
    pub(crate) height: usize,
    /// The group's scales.
    pub(crate) scale: S::F,
    /// The group's zero points, less what is taken from its codes, times -1.
    pub(crate) zero: S::I,
    /// Lines to ask for meanwhile, at most as many as are multiplied.
    pub(crate) ahead: &'a [Line],
}

impl<S: Simd> CodeBlocks<'_, S> {
    /// Checks that everything is there for `rows` rows of codes that take `quads` quads a line.
    #[inline(always)]
    pub(crate) fn check(&self, rows: usize, quads: usize) {
        let lines = self.lines.len();
        assert!(self.count * self.block_lines == lines && rows <= self.height, "broken blocks");
        assert!(self.height * quads * lines <= self.quads.len(), "too few quads");
        assert!(self.height * self.count <= self.scales.len(), "too few scales");
    }

    /// What the zero points add to the dots of block `b`.
    #[inline(always)]
    fn totals<const R: usize>(&self, s: S, b: usize) -> [S::I; R] {
        let mut totals = [self.zero; R];
        for r in 0..R {
            let sum = self.scales[b * self.height + r].sum;
            totals[r] = s.mul_i(self.zero, s.splat_i(sum));
        }
        totals
    }

    /// Adds the dots of block `b` to the accumulators.
    #[inline(always)]
    fn finish<const R: usize>(
        &self,
        s: S,
        b: usize,
        totals: &[S::I; R],
        acc: &mut [[f32; LANES]; R],
    ) {
        for r in 0..R {
            let scale = s.splat(self.scales[b * self.height + r].scale);
            let dots = s.to_f32(totals[r]);
            s.store(s.fma(s.mul(self.scale, scale), dots, s.load(&acc[r])), &mut acc[r]);
        }
    }

    /// Lines of block `b`, and the quads of each row.
    #[inline(always)]
    fn block<const R: usize>(&self, b: usize, quads: usize) -> (&[Line], [&[i32]; R]) {
        let (lines, quads) = (self.block_lines, self.block_lines * quads);
        let mut rows = [&[][..]; R];
        for r in 0..R {
            rows[r] = &self.quads[(b * self.height + r) * quads..][..quads];
        }
        (&self.lines[b * lines..][..lines], rows)
    }

    /// Asks for one line while line `l` of block `b` is multiplied: many at once would hold it up.
    #[inline(always)]
    fn prefetch(&self, s: S, b: usize, l: usize) {
        if let Some(line) = self.ahead.get(b * self.block_lines + l) {
            s.prefetch(line);
        }
    }
}

/// Blocks of nibbles, two quads a line, times `R` rows.
#[inline(always)]
pub(crate) fn dot_nibbles<S: Simd, const R: usize>(
    s: S,
    job: &CodeBlocks<'_, S>,
    acc: &mut [[f32; LANES]; R],
) {
    job.check(R, 2);
    for b in 0..job.count {
        let (lines, quads) = job.block::<R>(b, 2);
        let mut totals = job.totals::<R>(s, b);
        for (i, lines) in lines.chunks(LINES).enumerate() {
            let mut sums = totals.map(|total| s.start_nibbles(total));
            for (l, line) in lines.iter().enumerate() {
                job.prefetch(s, b, i * LINES + l);
                let (codes, at) = (s.open_nibbles(line), 2 * (i * LINES + l));
                for r in 0..R {
                    sums[r] = s.dot_nibbles(sums[r], codes, [quads[r][at], quads[r][at + 1]]);
                }
            }
            for r in 0..R {
                totals[r] = s.flush_nibbles(sums[r], totals[r]);
            }
        }
        job.finish(s, b, &totals, acc);
    }
}

/// Blocks of bytes, a quad a line, times `R` rows.
#[inline(always)]
pub(crate) fn dot_bytes<S: Simd, const R: usize>(
    s: S,
    job: &CodeBlocks<'_, S>,
    acc: &mut [[f32; LANES]; R],
) {
    job.check(R, 1);
    for b in 0..job.count {
        let (lines, quads) = job.block::<R>(b, 1);
        let mut totals = job.totals::<R>(s, b);
        for (at, line) in lines.iter().enumerate() {
            job.prefetch(s, b, at);
            let codes = s.open_bytes(line);
            for r in 0..R {
                totals[r] = s.dot_bytes(totals[r], codes, quads[r][at]);
            }
        }
        job.finish(s, b, &totals, acc);
    }
}
