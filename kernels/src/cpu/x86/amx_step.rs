//! Steps of linears over many rows ([`super::super::matmul`]) on AMX int8: the next strips are multiplied while
//! the last ones are scaled.
//!
//! ```text
//! tmm0 tmm1   dots of a strip with tiles 0, 1            f32 [rows, 16]
//! tmm2 tmm3   of the strip below it
//! tmm4, tmm5  activations of those strips                i8 [rows, quads x 4]
//! tmm6 tmm7   a depth of the panel, tiles 0, 1           i8 [quads, 16 x 4]
//! ```
//!
//! Dots begin at a float whose last bit counts as one, so that the integers which products add to its bits make
//! floats; those of a panel's second block go on from those of its first. A subtraction then takes the place of
//! a conversion: beside products conversions, multiplications and fma start once a cycle, additions twice.
//!
//! What bounds it, for 32 rows, two tiles and two blocks of 64 columns (262144 operations): eight products of 16
//! cycles; storing 128 rows of dots, as much to issue as 640 simple instructions; 256 multiplications and fma. Woven
//! into each other they take 270 to 310 cycles, all in the first-level cache (Emerald Rapids; 170 for scaling alone,
//! 145 for the tile instructions alone). In place about 390: sums, dots, panels and the activations that pass by,
//! which are loaded as what is not needed again, fill that cache, and the walk around it takes its share. Order
//! matters: tile instructions in clumps of a product each, the same things took a quarter longer.
//! A block of two depths has the same products, and half of the dots to store and to scale; in a whole prefill it
//! takes 0.92 of the time, so that what is loaded and where from seems to count more than instructions.
//! Where another program shares the core and uses its matrix unit, tile instructions take longer: four
//! products with four loads 300 cycles instead of 66, for minutes.
//! Reference: the emulated unit of the tests. Not here: the formula and the split ([`super::super::matmul`]),
//! which strips and blocks come ([`super::amx_many`]), the registers themselves ([`super::amx`]).

// Loops over tiles and blocks count indices: they unroll whole, over registers.
#![allow(clippy::needless_range_loop)]

use super::super::matmul::{
    Dots, Factors, PANEL_BLOCKS, PANEL_DEPTHS, Panel, STEP_STRIPS, STRIP_ROWS,
};
use super::super::quantize::{BlockScale, MAX_BLOCK};
use super::super::simd::{LANES, Line};
use std::arch::asm;
use std::arch::x86_64::*;

/// The strips to multiply.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    /// Of the panel.
    pub(super) blocks: usize,
    /// Of all of them; none if there is nothing to multiply.
    pub(super) depths: usize,
    pub(super) strips: usize,
    /// The first strip.
    pub(super) x: *const i8,
    /// Bytes from one depth to the next, be it of the same block or another, and from one row to the next.
    pub(super) x_depth: usize,
    pub(super) row: usize,
    pub(super) panel: *const Panel,
    /// Lines from one depth to the next.
    pub(super) panel_depth: usize,
}

impl Tiles {
    pub(super) const NONE: Self = Self {
        blocks: 0,
        depths: 0,
        strips: 0,
        x: std::ptr::null(),
        x_depth: 0,
        row: 0,
        panel: std::ptr::null(),
        panel_depth: 0,
    };
}

/// The rows to scale, whose dots are those of the step before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) blocks: usize,
    pub(super) strips: usize,
    /// Whether anything is left to add to dots.
    pub(super) rest: bool,
    pub(super) factors: *const [Factors; PANEL_BLOCKS],
    /// Of each block.
    pub(super) x: [*const BlockScale; PANEL_BLOCKS],
    /// Of each tile.
    pub(super) sums: [*mut [f32; LANES]; 2],
}

/// For the blocks of `last`, which was `next` one call ago, in order
/// `sums[tile][row][lane] += scale * x scale * (dots + rest * x sum)`, one fma each; meanwhile `next` is multiplied.
///
/// # Safety
/// The processor must have AMX and AVX-512 and this thread's registers their shape; all must be there that `next`
/// and `last` count.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
pub(super) unsafe fn step(next: &Tiles, last: Option<&Rows>, dots: *mut Dots) {
    // SAFETY: the caller's promises. What a call before this one left in registers matters to results alone.
    unsafe {
        match last {
            Some(last) if is_whole(next, last) => match last.blocks {
                1 => deep_step(next, last, dots),
                _ => pair_step(next, last, dots),
            },
            last => any_step(next, last, dots),
        }
    }
}

fn is_whole(next: &Tiles, last: &Rows) -> bool {
    let strips = next.strips == STEP_STRIPS && last.strips == STEP_STRIPS;
    next.depths == PANEL_DEPTHS && next.blocks == last.blocks && strips && !last.rest
}

/// What dots begin at. From 2^23 to 2^24 the bits of consecutive integers as floats are consecutive too, so that
/// an integer added to the bits of this one, up to 2^22 either way, is added to the number.
const START: f32 = 12_582_912.0;

// The columns of a panel, be they one block or two.
const _: () = assert!(MAX_BLOCK * 128 * 128 < 1 << 22, "dots beyond 2^22");

/// A row of it.
static STARTS: Vector = Vector([START; LANES]);

#[repr(C, align(64))]
struct Vector([f32; LANES]);

/// Loads the activations of strip `$strip` and depth `$depth`, not to be kept in the first-level cache: they are
/// not needed again before all others have passed.
macro_rules! rows {
    ($tiles:ident, $strip:literal, $depth:literal, $register:literal) => {
        asm!(
            concat!("tileloaddt1 ", $register, ", [{x} + {row}]"),
            x = in(reg) $tiles.x.add($depth * $tiles.x_depth + $strip * STRIP_ROWS * $tiles.row),
            row = in(reg) $tiles.row,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Loads the codes of tile `$tile` and depth `$depth`.
macro_rules! codes {
    ($tiles:ident, $tile:literal, $depth:literal, $register:literal) => {
        asm!(
            concat!("tileloadd ", $register, ", [{w} + {line}]"),
            w = in(reg) (&raw const (*$tiles.panel)[$tile])
                .cast::<Line>()
                .add($depth * $tiles.panel_depth),
            line = in(reg) 4 * LANES,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Lets dots begin.
macro_rules! start {
    ($dots:literal) => {
        asm!(
            concat!("tileloadd ", $dots, ", [{starts}]"),
            starts = in(reg) &raw const STARTS,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Adds a product to dots.
macro_rules! multiply {
    ($dots:literal, $rows:literal, $codes:literal) => {
        asm!(
            concat!("tdpbssd ", $dots, ", ", $rows, ", ", $codes),
            options(nostack, nomem, preserves_flags),
        )
    };
}

/// Stores the dots of strip `$strip`, tile `$tile` and block `$block`, which stay in their register too.
macro_rules! keep {
    ($all:expr, $strip:literal, $tile:literal, $block:expr, $dots:literal) => {
        asm!(
            concat!("tilestored [{y} + {line}], ", $dots),
            y = in(reg) &raw mut (*$all).0[$strip][$block][$tile],
            line = in(reg) 4 * LANES,
            options(nostack, preserves_flags),
        )
    };
}

/// [`step`] of two blocks where both steps are whole: row by row is scaled, and between two rows goes a tile
/// instruction. The last step's dots of its second block are still in registers; dots of the first strip are
/// overwritten when all its rows are scaled. A product takes 52 cycles until it can be stored.
///
/// # Safety
/// See the caller.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
unsafe fn pair_step(next: &Tiles, last: &Rows, dots: *mut Dots) {
    // SAFETY: the caller's promises.
    unsafe {
        let factors = last.factors();
        macro_rules! row {
            ($($row:literal)*) => {$(last.scale::<PANEL_BLOCKS, false>(&factors, dots, $row);)*};
        }
        keep!(dots, 0, 0, 1, "tmm0");
        rows!(next, 0, 0, "tmm4");
        keep!(dots, 0, 1, 1, "tmm1");
        row!(0 1);
        codes!(next, 0, 0, "tmm6");
        row!(2);
        start!("tmm0");
        row!(3);
        multiply!("tmm0", "tmm4", "tmm6");
        row!(4);
        codes!(next, 1, 0, "tmm7");
        row!(5 6);
        start!("tmm1");
        row!(7);
        multiply!("tmm1", "tmm4", "tmm7");
        row!(8);
        keep!(dots, 1, 0, 1, "tmm2");
        row!(9);
        rows!(next, 1, 0, "tmm5");
        row!(10 11);
        start!("tmm2");
        row!(12);
        multiply!("tmm2", "tmm5", "tmm6");
        row!(13);
        keep!(dots, 1, 1, 1, "tmm3");
        row!(14);
        start!("tmm3");
        row!(15 16);
        multiply!("tmm3", "tmm5", "tmm7");
        row!(17);
        rows!(next, 0, 1, "tmm4");
        row!(18);
        codes!(next, 0, 1, "tmm6");
        row!(19);
        keep!(dots, 0, 0, 0, "tmm0");
        row!(20 21);
        multiply!("tmm0", "tmm4", "tmm6");
        row!(22);
        codes!(next, 1, 1, "tmm7");
        row!(23);
        keep!(dots, 0, 1, 0, "tmm1");
        row!(24 25);
        multiply!("tmm1", "tmm4", "tmm7");
        row!(26 27);
        rows!(next, 1, 1, "tmm5");
        row!(28 29 30 31);
        keep!(dots, 1, 0, 0, "tmm2");
        multiply!("tmm2", "tmm5", "tmm6");
        keep!(dots, 1, 1, 0, "tmm3");
        multiply!("tmm3", "tmm5", "tmm7");
    }
}

/// The same of a block of two depths. Rows are left to scale behind the last product, so that the next step need
/// not wait for it.
///
/// # Safety
/// See the caller.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
unsafe fn deep_step(next: &Tiles, last: &Rows, dots: *mut Dots) {
    // SAFETY: the caller's promises.
    unsafe {
        let factors = last.factors();
        macro_rules! row {
            ($($row:literal)*) => {$(last.scale::<1, false>(&factors, dots, $row);)*};
        }
        rows!(next, 0, 0, "tmm4");
        codes!(next, 0, 0, "tmm6");
        keep!(dots, 0, 0, 0, "tmm0");
        codes!(next, 1, 0, "tmm7");
        keep!(dots, 0, 1, 0, "tmm1");
        row!(0 1);
        start!("tmm0");
        multiply!("tmm0", "tmm4", "tmm6");
        row!(2 3);
        rows!(next, 1, 0, "tmm5");
        row!(4);
        start!("tmm1");
        multiply!("tmm1", "tmm4", "tmm7");
        row!(5);
        keep!(dots, 1, 0, 0, "tmm2");
        row!(6 7);
        rows!(next, 0, 1, "tmm4");
        row!(8);
        start!("tmm2");
        multiply!("tmm2", "tmm5", "tmm6");
        row!(9);
        keep!(dots, 1, 1, 0, "tmm3");
        row!(10);
        codes!(next, 0, 1, "tmm6");
        row!(11);
        start!("tmm3");
        multiply!("tmm3", "tmm5", "tmm7");
        row!(12);
        rows!(next, 1, 1, "tmm5");
        row!(13);
        codes!(next, 1, 1, "tmm7");
        row!(14);
        multiply!("tmm0", "tmm4", "tmm6");
        row!(15 16);
        multiply!("tmm1", "tmm4", "tmm7");
        row!(17 18);
        multiply!("tmm2", "tmm5", "tmm6");
        row!(19 20);
        multiply!("tmm3", "tmm5", "tmm7");
        row!(21 22 23 24 25 26 27 28 29 30 31);
    }
}

/// [`step`] in general, one thing after another; the dots of the last block stay in registers.
///
/// # Safety
/// See the caller.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
unsafe fn any_step(next: &Tiles, last: Option<&Rows>, dots: *mut Dots) {
    // SAFETY: the caller's promises.
    unsafe {
        if let Some(last) = last {
            let block = last.blocks - 1;
            keep!(dots, 0, 0, block, "tmm0");
            keep!(dots, 0, 1, block, "tmm1");
            if last.strips > 1 {
                keep!(dots, 1, 0, block, "tmm2");
                keep!(dots, 1, 1, block, "tmm3");
            }
            last.scale_all(dots);
        }
        macro_rules! multiply_depth {
            ($depth:literal) => {
                codes!(next, 0, $depth, "tmm6");
                codes!(next, 1, $depth, "tmm7");
                rows!(next, 0, $depth, "tmm4");
                multiply!("tmm0", "tmm4", "tmm6");
                multiply!("tmm1", "tmm4", "tmm7");
                if next.strips > 1 {
                    rows!(next, 1, $depth, "tmm5");
                    multiply!("tmm2", "tmm5", "tmm6");
                    multiply!("tmm3", "tmm5", "tmm7");
                }
            };
        }
        if next.blocks > 0 {
            start!("tmm0");
            start!("tmm1");
            start!("tmm2");
            start!("tmm3");
            multiply_depth!(0);
        }
        if next.blocks > 1 {
            keep!(dots, 0, 0, 0, "tmm0");
            keep!(dots, 0, 1, 0, "tmm1");
            keep!(dots, 1, 0, 0, "tmm2");
            keep!(dots, 1, 1, 0, "tmm3");
        }
        if next.depths > 1 {
            multiply_depth!(1);
        }
    }
}

impl Rows {
    /// `[block][tile]`
    ///
    /// # Safety
    /// The processor must have the features, and all must be there.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn factors(&self) -> [[__m512; 2]; PANEL_BLOCKS] {
        let mut factors = [[_mm512_setzero_ps(); 2]; PANEL_BLOCKS];
        for block in 0..PANEL_BLOCKS {
            for t in 0..2 {
                // SAFETY: the caller's promise; there are sixteen lanes.
                factors[block][t] =
                    unsafe { _mm512_loadu_ps((&raw const (*self.factors)[block].scale[t]).cast()) };
            }
        }
        factors
    }

    /// Adds the scaled dots of a row: those of a block are what its product added to the dots before it.
    ///
    /// # Safety
    /// The processor must have the features, and that row and as many blocks must be there.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn scale<const BLOCKS: usize, const REST: bool>(
        &self,
        factors: &[[__m512; 2]; PANEL_BLOCKS],
        dots: *const Dots,
        row: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let (mut scales, mut x_sums) = ([_mm512_setzero_ps(); BLOCKS], [0; BLOCKS]);
            for b in 0..BLOCKS {
                let x = &*self.x[b].add(row);
                (scales[b], x_sums[b]) = (_mm512_set1_ps(x.scale), x.sum);
            }
            let mut sums = [_mm512_setzero_ps(); 2];
            for t in 0..2 {
                sums[t] = _mm512_loadu_ps(self.sums[t].add(row).cast());
                let mut before = _mm512_set1_ps(START);
                for b in 0..BLOCKS {
                    let dots = &raw const (*dots).0[row / STRIP_ROWS][b][t][row % STRIP_ROWS];
                    let after = _mm512_load_ps(dots.cast());
                    let mut dots = _mm512_sub_ps(after, before);
                    if REST {
                        let rest = (&raw const (*self.factors)[b].rest[t]).cast();
                        let rest = _mm512_mullo_epi32(
                            _mm512_loadu_si512(rest),
                            _mm512_set1_epi32(x_sums[b]),
                        );
                        dots = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_cvtps_epi32(dots), rest));
                    }
                    let scale = _mm512_mul_ps(factors[b][t], scales[b]);
                    sums[t] = _mm512_fmadd_ps(scale, dots, sums[t]);
                    before = after;
                }
            }
            for t in 0..2 {
                _mm512_storeu_ps(self.sums[t].add(row).cast(), sums[t]);
            }
        }
    }

    /// Adds the scaled dots of all rows.
    ///
    /// # Safety
    /// The processor must have the features, and all must be there.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn scale_all(&self, dots: *const Dots) {
        // SAFETY: the caller's promise.
        unsafe {
            let factors = self.factors();
            for row in 0..self.strips * STRIP_ROWS {
                match (self.blocks, self.rest) {
                    (1, false) => self.scale::<1, false>(&factors, dots, row),
                    (1, true) => self.scale::<1, true>(&factors, dots, row),
                    (_, false) => self.scale::<2, false>(&factors, dots, row),
                    (_, true) => self.scale::<2, true>(&factors, dots, row),
                }
            }
        }
    }
}
