//! Linears over a few rows ([`super::super::few_rows`]) on AMX int8.
//!
//! ```text
//! tmm0 ... tmm3  dots of the round's tiles          i32 [rows, 16]
//! tmm4           activations                        i8 [rows, quads x 4]
//! tmm6, tmm7     panel of an even tile, of an odd   i8 [quads, 16 x 4]
//! ```
//! In a round, tile by tile: its codes are opened (2 vector operations and 2 stores a line of 4-bit codes), its
//! panel of the round before is multiplied, and its dots of two rounds ago are scaled (3 operations a row), if
//! those were a block's last. A
//! product is stored three products later, since it takes 52 cycles and its register is free only then: four
//! products with their loads and stores take 60 cycles so, 80 if each is stored after the next, 100 at once
//! (however many rows). Not here: the order of rounds ([`super::super::few_rows`]).

use super::super::few_rows::{Round, Scratch};
use super::super::grouped::STREAMS;
use super::super::job::Job;
use super::super::matmul::{MIDDLE, STRIP_ROWS, Shape};
use super::super::packed::TileZeros;
use super::super::quantize::BlockScale;
use super::super::simd::{LANES, Line};
use super::amx::Opener;
use super::avx512_rows::{ask_scales, factors, zeros};
use quant::Bits;
use std::arch::asm;
use std::arch::x86_64::*;

/// See [`MatrixRegisters::few_rows`](super::super::matmul::MatrixRegisters::few_rows).
///
/// # Safety
/// The processor must have AMX and AVX-512, and this thread's registers must have this shape.
#[inline(always)]
pub(super) unsafe fn few_rows(
    shape: Shape,
    job: &Job<'_>,
    scratch: &mut Scratch,
    done: impl FnMut(Round, &mut [[f32; LANES]]),
) {
    assert!(job.rows == shape.rows && job.rows <= STRIP_ROWS, "rows of the registers");
    assert!(job.block_quads() == shape.block_quads(), "quads of the registers");
    assert!(
        job.depths == shape.depths && job.lines.is_multiple_of(job.depths),
        "depths of the registers"
    );
    job.check();
    // SAFETY: the caller's promise; all tiles have all their codes and scales, all rows their quads, as just
    // checked.
    unsafe {
        match (job.bits, job.depth_lines, job.rest) {
            (Bits::Four, 8, false) => rounds::<true>(shape, job, scratch, done),
            _ => rounds::<false>(shape, job, scratch, done),
        }
    }
}

/// Loads the rows of activations.
macro_rules! rows {
    ($from:expr, $row:expr) => {
        asm!(
            "tileloadd tmm4, [{x} + {row}]",
            x = in(reg) $from,
            row = in(reg) $row,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Lets dots begin in register `$y`.
macro_rules! start {
    ($y:literal) => {
        asm!(concat!("tilezero ", $y), options(nostack, nomem, preserves_flags))
    };
}

/// Adds the product of the rows and a panel to register `$y`.
macro_rules! product {
    ($y:literal, $w:literal, $panel:expr) => {
        asm!(
            concat!("tileloadd ", $w, ", [{w} + {line}]"),
            concat!("tdpbssd ", $y, ", tmm4, ", $w),
            w = in(reg) $panel,
            line = in(reg) 4 * LANES,
            options(nostack, readonly, preserves_flags),
        )
    };
}

/// Stores register `$y`.
macro_rules! keep {
    ($y:literal, $dots:expr) => {
        asm!(
            concat!("tilestored [{y} + {line}], ", $y),
            y = in(reg) $dots,
            line = in(reg) 4 * LANES,
            options(nostack, preserves_flags),
        )
    };
}

/// `COMMON` is the most common depth, of 64 columns of 4 bits, in a function without the others' branches.
///
/// # Safety
/// See [`few_rows`]; what the job counts is there.
#[target_feature(enable = "avx2,fma,f16c,gfni,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
unsafe fn rounds<const COMMON: bool>(
    shape: Shape,
    job: &Job<'_>,
    scratch: &mut Scratch,
    mut done: impl FnMut(Round, &mut [[f32; LANES]]),
) {
    let (mut now, mut before) = (0, 1);
    let mut under_way = [job.first(job.tiles.start), Round::NONE, Round::NONE];
    while under_way.iter().any(|round| round.tiles > 0) {
        let [opened, multiplied, scaled] = under_way;
        // SAFETY: the caller's promises.
        unsafe { round::<COMMON>(shape, job, &under_way, (now, before), scratch) }
        if job.is_last(scaled) {
            done(scaled, &mut scratch.sums);
        }
        under_way = [job.after(opened), opened, multiplied];
        (now, before) = (before, now);
    }
}

/// Opens, multiplies and scales a round each; `now` and `before` are the buffers of this round and of that before
/// it.
///
/// # Safety
/// See [`few_rows`]; what the job counts is there.
#[target_feature(enable = "avx2,fma,f16c,gfni,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
unsafe fn round<const COMMON: bool>(
    shape: Shape,
    job: &Job<'_>,
    [opened, multiplied, scaled]: &[Round; 3],
    (now, before): (usize, usize),
    scratch: &mut Scratch,
) {
    let quads = multiplied.block * job.rows * shape.block_quads() + multiplied.depth * shape.quads;
    let (first, later) = (job.line(job.opened(*opened)), job.line(job.ahead(*opened)));
    let (kept, done) = (job.complete(*multiplied), job.complete(*scaled));
    if let Some((tile, group)) = job.scales_ahead(*opened) {
        ask_scales(job, tile..tile + opened.tiles, group);
    }
    // SAFETY: the caller's promises: a tile is there wherever it is counted, and the registers have the
    // shape that its panel, the rows and its dots have room for.
    unsafe {
        let codes = job.weight.codes.as_ptr();
        let panels = scratch.panels.as_mut_ptr();
        let (panels, last_panels) = (panels.add(now), panels.add(before));
        let (rows, dots) = (job.rows, scratch.dots.as_mut_ptr());
        let [dots, next_dots] = [now, before].map(|half| dots.add(half * STREAMS * rows));
        if multiplied.tiles > 0 {
            rows!(job.quads.as_ptr().add(quads), 4 * shape.block_quads());
        }
        macro_rules! tile {
            ($t:literal, $y:literal, $w:literal) => {
                if $t < opened.tiles {
                    let group = (opened.tile + $t) * job.groups + opened.group;
                    let out = (&raw mut (*panels)[$t]).cast();
                    let tile = $t * job.blocks * job.lines;
                    open::<COMMON>(
                        job,
                        [first, later].map(|line| codes.add(line + tile)),
                        group,
                        out,
                    );
                }
                if $t < multiplied.tiles {
                    if multiplied.depth == 0 {
                        start!($y);
                    }
                    product!($y, $w, &raw const (*last_panels)[$t]);
                }
                if $t < done {
                    let group = (scaled.tile + $t) * job.groups + scaled.group;
                    let x = job.scales.as_ptr().add(scaled.block * job.rows);
                    let sums = scratch.sums.as_mut_ptr().add($t * rows).cast();
                    scale::<COMMON>(job, group, x, dots.add($t * rows).cast(), sums);
                }
            };
        }
        // Dots of the round before, which are now scaled, are still in registers but for the first tile's.
        tile!(0, "tmm0", "tmm6");
        if done > 1 {
            keep!("tmm1", dots.add(rows));
        }
        tile!(1, "tmm1", "tmm7");
        if done > 2 {
            keep!("tmm2", dots.add(2 * rows));
        }
        tile!(2, "tmm2", "tmm6");
        if done > 3 {
            keep!("tmm3", dots.add(3 * rows));
        }
        tile!(3, "tmm3", "tmm7");
        if kept > 0 {
            keep!("tmm0", next_dots);
        }
    }
}

/// Opens the codes of a block and asks for those of another.
///
/// # Safety
/// The processor must have the features; block, group and room must be there.
#[target_feature(enable = "gfni,avx512f,avx512bw")]
#[inline]
unsafe fn open<const COMMON: bool>(
    job: &Job<'_>,
    [codes, ahead]: [*const Line; 2],
    group: usize,
    mut out: *mut Line,
) {
    // SAFETY: the caller's promises.
    unsafe {
        let opener = match job.weight.zeros {
            TileZeros::All(zero) => Opener::all(zero),
            TileZeros::Each(all) => Opener::each(all.get_unchecked(group)),
        };
        let mut line = |bits, i| {
            _mm_prefetch::<_MM_HINT_T0>(ahead.add(i).cast());
            out = opener.line(bits, &*codes.add(i), out);
        };
        match COMMON {
            true => (0..8).for_each(|i| line(Bits::Four, i)),
            false => (0..job.depth_lines).for_each(|i| line(job.bits, i)),
        }
    }
}

/// Adds the scaled dots of a tile.
///
/// # Safety
/// The processor must have the features; group, rows, dots and sums must be there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
unsafe fn scale<const COMMON: bool>(
    job: &Job<'_>,
    group: usize,
    x: *const BlockScale,
    dots: *const __m512i,
    sums: *mut f32,
) {
    // SAFETY: the caller's promises; scales, zero points, dots and sums have sixteen lanes.
    unsafe {
        let factor = factors(job, group);
        if COMMON || !job.rest {
            for row in 0..job.rows {
                add(factor, &*x.add(row), _mm512_load_si512(dots.add(row)), sums.add(row * LANES));
            }
            return;
        }
        let rest = _mm512_sub_epi32(_mm512_set1_epi32(MIDDLE), zeros(job, group));
        for row in 0..job.rows {
            let x = &*x.add(row);
            let rest = _mm512_mullo_epi32(rest, _mm512_set1_epi32(x.sum));
            let dots = _mm512_add_epi32(_mm512_load_si512(dots.add(row)), rest);
            add(factor, x, dots, sums.add(row * LANES));
        }
    }
}

/// Adds the scaled dots of a row.
///
/// # Safety
/// The processor must have the features, and `sum` sixteen lanes.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn add(factor: __m512, x: &BlockScale, dots: __m512i, sum: *mut f32) {
    let scale = _mm512_mul_ps(factor, _mm512_set1_ps(x.scale));
    // SAFETY: the caller's promise.
    unsafe {
        let sums = _mm512_load_ps(sum);
        _mm512_store_ps(sum, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dots), sums));
    }
}
