//! Steps of linears over many rows ([`super::super::matmul`]) on AMX int8: the next strips are multiplied while
//! the last ones are scaled.
//!
//! ```text
//! tmm0 tmm1   dots of a strip with tiles 0, 1            f32 [rows, 16]
//! tmm2 tmm3   of the strip below it
//! tmm4, tmm5  activations of those strips                i8 [rows, quads x 4]
//! tmm6 tmm7   the block's panel, tiles 0, 1              i8 [quads, 16 x 4]
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
//! Where another program shares the core and uses its matrix unit, tile instructions take longer: four
//! products with four loads 300 cycles instead of 66, for minutes.
//! Reference: the emulated unit of the tests. Not here: the formula, the split and which strips and blocks come
//! ([`super::super::matmul`]), the registers themselves ([`super::amx`]).

// Loops over tiles and blocks count indices: they unroll whole, over registers.
#![allow(clippy::needless_range_loop)]

use super::super::matmul::{
    Dots, Factors, PANEL_BLOCKS, Panel, Product, STEP_STRIPS, STRIP_ROWS, Scaling, Shape,
};
use super::super::quantize::{BlockScale, MAX_BLOCK};
use super::super::simd::LANES;
use std::arch::asm;
use std::arch::x86_64::*;

/// See [`step`](super::super::matmul::MatrixRegisters::step).
///
/// # Safety
/// The processor must have AMX and AVX-512, and this thread's registers must have this shape.
#[inline(always)]
pub(super) unsafe fn step(
    shape: Shape,
    next: Option<Product<'_>>,
    last: Option<Scaling<'_>>,
    dots: &mut Dots,
) {
    assert_eq!(shape.rows, STRIP_ROWS, "rows of a strip");
    let next = next.map_or(Tiles::NONE, |next| Tiles::new(shape, &next));
    let last = last.map(Rows::new);
    // SAFETY: the caller's promises; `new` has made sure that rows, scales and sums are there as counted, and panels
    // have as many lines as any shape has quads. What a call before this one left in registers matters to results alone.
    unsafe {
        match &last {
            Some(last) if last.is_whole() && next.is_whole() => whole_step(&next, last, dots),
            last => any_step(&next, last.as_ref(), dots),
        }
    }
}

/// Whether `items` hold the rows of some strips of each of some blocks, `height` rows apart.
fn fits((blocks, strips): (usize, usize), height: usize, items: usize) -> bool {
    let counted = (1..=PANEL_BLOCKS).contains(&blocks) && (1..=STEP_STRIPS).contains(&strips);
    counted && (blocks - 1) * height + strips * STRIP_ROWS <= items
}

/// A [`Product`] as assembly takes it.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    blocks: usize,
    strips: usize,
    x: *const u8,
    /// Bytes from one block to the next, and from one row to the next.
    x_block: usize,
    row: usize,
    panel: *const Panel,
}

impl Tiles {
    const NONE: Self = Self {
        blocks: 0,
        strips: 0,
        x: std::ptr::null(),
        x_block: 0,
        row: 0,
        panel: std::ptr::null(),
    };

    /// # Panics
    /// If activations are missing.
    #[inline(always)]
    fn new(shape: Shape, next: &Product<'_>) -> Self {
        let Product { blocks, strips, height, .. } = *next;
        let (quads, row) = (shape.quads, 4 * shape.quads);
        assert!(fits((blocks, strips), height, next.x.len() / quads), "too few quads");
        Self {
            blocks,
            strips,
            x: next.x.as_ptr().cast(),
            x_block: height * row,
            row,
            panel: next.panel,
        }
    }

    fn is_whole(&self) -> bool {
        self.blocks == PANEL_BLOCKS && self.strips == STEP_STRIPS
    }
}

/// What dots begin at. From 2^23 to 2^24 the bits of consecutive integers as floats are consecutive too, so that
/// an integer added to the bits of this one, up to 2^22 either way, is added to the number.
const START: f32 = 12_582_912.0;

const _: () = assert!(PANEL_BLOCKS * MAX_BLOCK * 128 * 128 < 1 << 22, "dots beyond 2^22");

/// A row of it.
static STARTS: Vector = Vector([START; LANES]);

#[repr(C, align(64))]
struct Vector([f32; LANES]);

/// Loads the activations of strip `$strip` and block `$block`, not to be kept in the first-level cache: they are
/// not needed again before all others have passed.
macro_rules! rows {
    ($tiles:ident, $strip:literal, $block:literal, $register:literal) => {
        asm!(
            concat!("tileloaddt1 ", $register, ", [{x} + {row}]"),
            x = in(reg) $tiles.x.add($block * $tiles.x_block + $strip * STRIP_ROWS * $tiles.row),
            row = in(reg) $tiles.row,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Loads the codes of tile `$tile` and block `$block`.
macro_rules! codes {
    ($tiles:ident, $tile:literal, $block:literal, $register:literal) => {
        asm!(
            concat!("tileloadd ", $register, ", [{w} + {line}]"),
            w = in(reg) &raw const (*$tiles.panel)[$block][$tile],
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

/// [`step`] where both steps are whole: row by row is scaled, and between two rows goes a tile
/// instruction. The last step's dots of its second block are still in registers; dots of the first strip are
/// overwritten when all its rows are scaled. A product takes 52 cycles until it can be stored.
///
/// # Safety
/// See the caller.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
unsafe fn whole_step(next: &Tiles, last: &Rows, dots: *mut Dots) {
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
        macro_rules! multiply_block {
            ($block:literal) => {
                codes!(next, 0, $block, "tmm6");
                codes!(next, 1, $block, "tmm7");
                rows!(next, 0, $block, "tmm4");
                multiply!("tmm0", "tmm4", "tmm6");
                multiply!("tmm1", "tmm4", "tmm7");
                if next.strips > 1 {
                    rows!(next, 1, $block, "tmm5");
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
            multiply_block!(0);
        }
        if next.blocks > 1 {
            keep!(dots, 0, 0, 0, "tmm0");
            keep!(dots, 0, 1, 0, "tmm1");
            keep!(dots, 1, 0, 0, "tmm2");
            keep!(dots, 1, 1, 0, "tmm3");
            multiply_block!(1);
        }
    }
}

/// A [`Scaling`] in pointers.
#[derive(Debug, Clone, Copy)]
struct Rows {
    blocks: usize,
    strips: usize,
    rest: bool,
    factors: *const [Factors; PANEL_BLOCKS],
    /// Of each block.
    x: [*const BlockScale; PANEL_BLOCKS],
    sums: [*mut [f32; LANES]; 2],
}

impl Rows {
    /// # Panics
    /// If scales or sums are missing.
    #[inline(always)]
    fn new(last: Scaling<'_>) -> Self {
        let Scaling { blocks, strips, factors, rest, x, height, sums: [first, second] } = last;
        assert!(fits((blocks, strips), height, x.len()), "too few scales");
        let rows = strips * STRIP_ROWS;
        assert!(first.len() >= rows && second.len() >= rows, "too few sums");
        let x = [x.as_ptr(), x.as_ptr().wrapping_add(height)];
        Self { blocks, strips, rest, factors, x, sums: [first.as_mut_ptr(), second.as_mut_ptr()] }
    }

    fn is_whole(&self) -> bool {
        self.blocks == PANEL_BLOCKS && self.strips == STEP_STRIPS && !self.rest
    }

    /// `[block][tile]`
    ///
    /// # Safety
    /// The processor must have the features, and this must come from a [`Scaling`].
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
    /// The processor must have the features, and this must come from a [`Scaling`] of that row and as many blocks.
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
    /// The processor must have the features, and this must come from a [`Scaling`].
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
