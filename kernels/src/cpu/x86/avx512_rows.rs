//! Linears with 4- and 8-bit weights for one to four rows, with AVX-512 and VNNI.
//!
//! The formula and, bit for bit, the results of [`super::super::grouped`]: integers are exact in any order,
//! and each block is added by the same f32 fma, blocks in ascending order.
//!
//! ```text
//! a line of nibbles   2 operations to open it, 2 `vpdpbusd` a row: the high ones stay where they are, so that
//!                     their dots are sixteen times as large until the block's end
//! a line of bytes     1 `vpdpbusd` a row
//! a block's end       6 operations a row
//! walk                a tile after another; where a processor gets more out of memory from several streams, four
//!                     side by side, a KiB of each in turn (1.15 times as much, Emerald Rapids; less on Zen 4)
//! bytes               every code and scale once, activations from the first-level cache
//! ```
//! By count a block of 64 columns of nibbles, 512 bytes, takes 19 cycles of the two ports that do this with
//! one row, 52 with four. The generic walk spends half of its time between the lines where tiles are small (128
//! columns, in a cache). More rows: [`super::avx512_blocks`], or a matrix unit.

// Loops over rows count indices: they unroll whole, over several arrays at once.
#![allow(clippy::needless_range_loop)]

use super::super::grouped::{GroupedLinear, PANEL, STREAMS};
use super::super::job::Job;
use super::super::packed::{TileScales, TileZeros};
use super::super::simd::{LANES, Line};
use super::super::tile::PutTiles;
use super::Avx512;
use quant::Bits;
use std::arch::x86_64::*;
use std::ops::Range;

/// Lines that are taken in turn of each of several tiles side by side.
const STREAM_LINES: usize = 16;

/// Such parts of a tile between asking for lines and taking them: with one part two threads got 3 to 5 % less out of
/// memory, with six as much less as with one.
const STREAM_AHEAD: usize = 3;

/// Most rows.
pub(crate) const MOST_ROWS: usize = 4;

/// Sums of a tile and some rows.
type Sums<const R: usize> = [[f32; LANES]; R];

/// Runs a linear over at most [`MOST_ROWS`] rows, whose activations lie together.
pub(crate) fn some_rows(isa: Avx512, linear: GroupedLinear<'_>) {
    match linear.out.rows() {
        0 => {}
        1 => rows::<1>(isa, linear),
        2 => rows::<2>(isa, linear),
        3 => rows::<3>(isa, linear),
        4 => rows::<4>(isa, linear),
        rows => unreachable!("{rows} rows at once"),
    }
}

fn rows<const R: usize>(isa: Avx512, linear: GroupedLinear<'_>) {
    let GroupedLinear { weight, bias, x, tiles, mut out, streams } = linear;
    assert!(out.rows() == R && x.layout.height == R, "other rows");
    let job = Job::new(weight, x, tiles.clone());
    job.check();
    assert!(job.block_quads().is_multiple_of(2), "a quad without its partner");
    let streams = streams.clamp(1, STREAMS);
    let done = |first: usize, sums: &mut [Sums<R>]| {
        let (out, tiles, sums) = (&mut out, &tiles, sums.as_flattened_mut());
        isa.run_apart(PutTiles { out, tiles, n: weight.n, bias, first, sums });
    };
    // SAFETY: the first argument proves the features; `check` has made sure that all tiles have all their codes
    // and scales, and the rows all their quads.
    unsafe {
        match job.bits {
            Bits::Four => sets::<R, 2>(&job, streams, done),
            Bits::Eight => sets::<R, 1>(&job, streams, done),
        }
    }
}

/// A place in the codes of a tile: block `at` of group `group`.
#[derive(Debug, Clone, Copy)]
struct Place {
    tile: usize,
    block: usize,
    group: usize,
    at: usize,
}

impl Place {
    /// The beginning of a tile.
    #[inline(always)]
    fn first(tile: usize) -> Self {
        Self { tile, block: 0, group: 0, at: 0 }
    }

    /// The same tile `count` blocks on.
    #[inline(always)]
    fn on(mut self, job: &Job<'_>, count: usize) -> Self {
        (self.block, self.at) = (self.block + count, self.at + count);
        while self.at >= job.per_group {
            (self.group, self.at) = (self.group + 1, self.at - job.per_group);
        }
        self
    }

    /// Where the stream of tile `tile` is then, at most a tile on: in the tile, or as far in the one that it takes next.
    #[inline(always)]
    fn of(self, tile: usize, job: &Job<'_>, streams: usize) -> Self {
        if self.block < job.blocks {
            return Self { tile, ..self };
        }
        let next = tile + streams;
        // Where nothing comes, what was read is asked for again, which costs least.
        let next = if next < job.tiles.end { next } else { tile };
        Self::first(next).on(job, self.block - job.blocks)
    }

    #[inline(always)]
    fn line(self, job: &Job<'_>) -> *const Line {
        job.weight.codes.as_ptr().wrapping_add(job.block_line(self.tile, self.block))
    }
}

/// All tiles, `streams` side by side; calls `done` with the first of these and their sums, which that clears.
///
/// # Safety
/// The processor must have the features, and `job` must have passed its check.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
unsafe fn sets<const R: usize, const Q: usize>(
    job: &Job<'_>,
    streams: usize,
    mut done: impl FnMut(usize, &mut [Sums<R>]),
) {
    let (lines, parts) = if streams == 1 { (PANEL, 1) } else { (STREAM_LINES, STREAM_AHEAD) };
    let most = (lines / job.lines).max(1);
    let far = job.blocks.min(parts * most);
    let mut sums = [[[0.0; LANES]; R]; STREAMS];
    for first in job.tiles.clone().step_by(streams) {
        let sums = &mut sums[..streams.min(job.tiles.end - first)];
        let mut place = Place::first(first);
        while place.block < job.blocks {
            let count = most.min(job.blocks - place.block);
            let later = place.on(job, far);
            for (tile, sums) in (first..).zip(&mut *sums) {
                let ahead = later.of(tile, job, streams);
                // SAFETY: the caller's promises.
                unsafe { add_part::<R, Q>(job, Place { tile, ..place }, count, ahead, sums) }
            }
            place = place.on(job, count);
        }
        done(first, sums);
    }
}

/// Adds `count` blocks of a tile from `place` on to its sums; asks for as many from `ahead` on.
///
/// # Safety
/// The processor must have the features, and `job` must have the tile, blocks and groups, and `R` rows.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
unsafe fn add_part<const R: usize, const Q: usize>(
    job: &Job<'_>,
    place: Place,
    count: usize,
    ahead: Place,
    sums: &mut Sums<R>,
) {
    let Place { tile, block, mut group, mut at } = place;
    ask_scales(job, ahead.tile..ahead.tile + 1, ahead.group);
    let row = job.lines * Q;
    let (mut line, mut ahead) = (place.line(job), ahead.line(job));
    // SAFETY: the caller's promises. A prefetch changes nothing, wherever it points.
    unsafe {
        let mut quads = job.quads.as_ptr().add(block * R * row);
        let mut totals = sums.each_ref().map(|sums| _mm512_loadu_ps(sums.as_ptr()));
        let (mut factor, mut zero) = scale(job, tile * job.groups + group);
        for i in block..block + count {
            if at == job.per_group {
                (group, at) = (group + 1, 0);
                (factor, zero) = scale(job, tile * job.groups + group);
            }
            at += 1;
            let mut dots = [[_mm512_setzero_si512(); 2]; R];
            for _ in 0..row / 2 {
                dot::<R, Q>(&mut dots, line, ahead, (quads, row));
                (line, ahead, quads) = (line.add(2 / Q), ahead.wrapping_add(2 / Q), quads.add(2));
            }
            quads = quads.wrapping_add((R - 1) * row);
            for r in 0..R {
                let x = job.scales.as_ptr().add(i * R + r);
                let [first, second] = dots[r];
                let second = if Q == 2 { _mm512_srai_epi32::<4>(second) } else { second };
                // Zero points and sums have at most 16 bits; the other halves of the zero points are zero.
                let first = _mm512_dpwssd_epi32(first, zero, _mm512_set1_epi32((*x).sum));
                let dots = _mm512_cvtepi32_ps(_mm512_add_epi32(first, second));
                let scale = _mm512_mul_ps(factor, _mm512_set1_ps((*x).scale));
                totals[r] = _mm512_fmadd_ps(scale, dots, totals[r]);
            }
        }
        for r in 0..R {
            _mm512_storeu_ps(sums[r].as_mut_ptr(), totals[r]);
        }
    }
}

/// Adds two quads of each row, which lie `row` quads apart: of a line of nibbles, the high ones sixteen
/// times too large, or of two lines of bytes.
///
/// # Safety
/// The processor must have the features, and lines and quads must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
unsafe fn dot<const R: usize, const Q: usize>(
    dots: &mut [[__m512i; 2]; R],
    line: *const Line,
    ahead: *const Line,
    (quads, row): (*const i32, usize),
) {
    // SAFETY: the caller's promises; lines are aligned to 64 bytes.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        let first = _mm512_load_si512(line.cast());
        let codes = if Q == 2 {
            let low = _mm512_set1_epi8(15);
            [_mm512_and_si512(first, low), _mm512_andnot_si512(low, first)]
        } else {
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(1).cast());
            [first, _mm512_load_si512(line.add(1).cast())]
        };
        for r in 0..R {
            for i in 0..2 {
                let quad = _mm512_set1_epi32(*quads.add(r * row + i));
                dots[r][i] = _mm512_dpbusd_epi32(dots[r][i], codes[i], quad);
            }
        }
    }
}

/// Asks for the scales and zero points of a group.
#[inline(always)]
pub(super) fn ask_scales(job: &Job<'_>, tiles: Range<usize>, group: usize) {
    for tile in tiles {
        let at = tile * job.groups + group;
        let scales: *const i8 = match job.weight.scales {
            TileScales::F16(all) => all.as_ptr().wrapping_add(at).cast(),
            TileScales::F32(all) => all.as_ptr().wrapping_add(at).cast(),
        };
        // SAFETY: every x86-64 processor has the instruction; it changes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(scales) }
        if let TileZeros::Each(all) = job.weight.zeros {
            // SAFETY: the same.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(all.as_ptr().wrapping_add(at).cast()) }
        }
    }
}

/// Scales of a group.
///
/// # Safety
/// The processor must have the features, and the group must be there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
pub(super) unsafe fn factors(job: &Job<'_>, group: usize) -> __m512 {
    // SAFETY: the caller's promises; a group has sixteen scales.
    unsafe {
        match job.weight.scales {
            TileScales::F32(all) => _mm512_loadu_ps(all.get_unchecked(group).as_ptr()),
            TileScales::F16(all) => {
                let half = all.get_unchecked(group).as_ptr();
                _mm512_cvtph_ps(_mm256_loadu_si256(half.cast()))
            }
        }
    }
}

/// Zero points of a group.
///
/// # Safety
/// The processor must have the features, and the group must be there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
pub(super) unsafe fn zeros(job: &Job<'_>, group: usize) -> __m512i {
    match job.weight.zeros {
        TileZeros::All(zero) => _mm512_set1_epi32(zero),
        TileZeros::Each(all) => {
            // SAFETY: the caller's promises; a group has sixteen zero points.
            let zeros = unsafe { _mm_loadu_si128(all.get_unchecked(group).as_ptr().cast()) };
            _mm512_cvtepu8_epi32(zeros)
        }
    }
}

/// Scales of a group, and its zero points times -1 in the low halves of lanes.
///
/// # Safety
/// The processor must have the features, and the group must be there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
unsafe fn scale(job: &Job<'_>, group: usize) -> (__m512, __m512i) {
    // SAFETY: the caller's promises.
    let (factor, zero) = unsafe { (factors(job, group), zeros(job, group)) };
    let minus = _mm512_sub_epi32(_mm512_setzero_si512(), zero);
    (factor, _mm512_and_si512(minus, _mm512_set1_epi32(0xffff)))
}
