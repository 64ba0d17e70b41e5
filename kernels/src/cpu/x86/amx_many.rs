//! Linears over many rows ([`super::super::matmul`]) on AMX int8: the walk over tiles, panels and strips.
//!
//! ```text
//! step      the next two strips are multiplied while the two before them are scaled ([`super::amx_step`]); the
//!           last ones of two tiles while the first ones of the next two are multiplied
//! between   a block and tile of the panel after this one is opened: 2 vector operations and 2 stores a line of
//!           4-bit codes, which were asked for eight panels before
//! ```
//! Input: a checked job. Not here: what a step does, and the formula, split and bytes ([`super::super::matmul`]).

use super::super::job::Job;
use super::super::matmul::{
    DEPTH_QUADS, Dots, Factors, MAX_ROWS, MIDDLE, PANEL_BLOCKS, PairSums, Panel, Results,
    STEP_ROWS, STEP_STRIPS, STRIP_ROWS, Scratch, Shape,
};
use super::super::packed::TileZeros;
use super::super::simd::Line;
use super::amx::Opener;
use super::amx_step::{Rows, Tiles, step};
use super::avx512_rows::{ask_scales, factors, zeros};
use quant::Bits;
use std::arch::x86_64::*;

/// Panels between asking for codes and opening them.
const PANELS_AHEAD: usize = 8;

/// Groups between asking for scales and using them.
const LATER: usize = 8;

/// See [`MatrixRegisters::many_rows`](super::super::matmul::MatrixRegisters::many_rows).
///
/// # Safety
/// The processor must have AMX and AVX-512, and this thread's registers must have this shape.
#[inline(always)]
pub(super) unsafe fn many_rows(
    shape: Shape,
    job: &Job<'_>,
    rows: usize,
    scratch: &mut Scratch,
    results: &mut impl Results,
) {
    assert!(
        job.block_quads() == shape.block_quads() && job.depths == shape.depths,
        "a block of the registers"
    );
    assert!(
        shape.rows == STRIP_ROWS && rows.next_multiple_of(STRIP_ROWS) <= job.rows,
        "too many rows"
    );
    assert!(job.rows <= MAX_ROWS, "more rows than sums");
    job.check();
    let Scratch { sums, dots, panels, factors } = scratch;
    let (panels, factors) =
        (panels.each_mut().map(|p| &raw mut *p), factors.each_mut().map(|f| &raw mut *f));
    let walk = Walk { shape, job, rows, blocks: shape.panel_blocks(), sums, dots };
    // SAFETY: the caller's promise; all tiles have all their codes and scales, all rows their quads and sums, as just
    // checked.
    unsafe {
        match job.bits {
            Bits::Four => walk.all::<true>(panels, factors, results),
            Bits::Eight => walk.all::<false>(panels, factors, results),
        }
    }
}

/// A panel: its first tile and block.
#[derive(Debug, Clone, Copy)]
struct Place {
    tile: usize,
    block: usize,
}

/// A job and where its intermediate results are.
struct Walk<'a> {
    shape: Shape,
    job: &'a Job<'a>,
    /// Real ones.
    rows: usize,
    /// Of a panel.
    blocks: usize,
    sums: *mut PairSums,
    dots: *mut Dots,
}

impl Walk<'_> {
    /// All tiles; `FOUR` bits or eight.
    ///
    /// # Safety
    /// See [`many_rows`]; what the job counts must be there, and sums of its rows.
    #[target_feature(enable = "avx2,fma,f16c,gfni,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline(never)]
    unsafe fn all<const FOUR: bool>(
        &self,
        [mut panel, mut next_panel]: [*mut Panel; 2],
        [mut scales, mut next_scales]: [*mut [Factors; PANEL_BLOCKS]; 2],
        results: &mut impl Results,
    ) {
        let (tiles, parts) = (&self.job.tiles, 2 * self.blocks);
        let share = self.rows.div_ceil(self.job.blocks.div_ceil(self.blocks));
        let (mut last, mut full) = (None, None);
        let mut here = (!tiles.is_empty()).then_some(Place { tile: tiles.start, block: 0 });
        // SAFETY: the caller's promises; every place is one of the job's.
        unsafe {
            for part in 0..parts {
                self.open::<FOUR>(here, part, panel, scales);
            }
            while let Some(place) = here {
                let after = self.after(place);
                let first = place.block / self.blocks * share;
                results.ask(place.tile, first..first + share);
                let mut opened = 0;
                for row in (0..self.rows).step_by(STEP_ROWS) {
                    step(&self.tiles(place, row, panel), last.as_ref(), self.dots);
                    if let Some(tile) = full.take() {
                        results.put(tile, &mut *self.sums);
                    }
                    last = Some(self.rows(place, row, scales));
                    while opened * self.rows < parts * (row + STEP_ROWS).min(self.rows) {
                        self.open::<FOUR>(after, opened, next_panel, next_scales);
                        opened += 1;
                    }
                }
                let ends = place.block + self.blocks >= self.job.blocks;
                full = ends.then_some(place.tile);
                (panel, next_panel) = (next_panel, panel);
                (scales, next_scales) = (next_scales, scales);
                here = after;
            }
            step(&Tiles::NONE, last.as_ref(), self.dots);
            if let Some(tile) = full {
                results.put(tile, &mut *self.sums);
            }
        }
    }

    /// The panel behind one: of the same tiles or the first of the next two.
    #[inline(always)]
    fn after(&self, Place { tile, block }: Place) -> Option<Place> {
        let (next, more) = (block + self.blocks, tile + 2);
        if next < self.job.blocks {
            return Some(Place { tile, block: next });
        }
        (more < self.job.tiles.end).then_some(Place { tile: more, block: 0 })
    }

    /// Opens block `part / 2` and tile `part % 2` of a panel, if there are both.
    ///
    /// # Safety
    /// The processor must have the features, and the place must be one of the job's.
    #[target_feature(enable = "avx2,fma,f16c,gfni,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn open<const FOUR: bool>(
        &self,
        place: Option<Place>,
        part: usize,
        panel: *mut Panel,
        scales: *mut [Factors; PANEL_BLOCKS],
    ) {
        let (i, t, job) = (part / 2, part % 2, self.job);
        let Some(Place { tile: first, block }) = place else { return };
        if block + i >= job.blocks {
            return;
        }
        let (tile, block) = ((first + t).min(job.tiles.end - 1), block + i);
        let (in_tile, first_group) = (block / job.per_group, tile * job.groups);
        let group = first_group + in_tile;
        ask_scales(job, tile..tile + 1, in_tile + LATER);
        let codes = |tile: usize, block: usize| {
            job.weight.codes.as_ptr().wrapping_add(job.block_line(tile, block))
        };
        let later = block + PANELS_AHEAD * self.blocks;
        let ahead = match later < job.blocks {
            true => codes(tile, later),
            false => codes(tile + 2, later - job.blocks),
        };
        // SAFETY: the caller's promises: tile, block and group are there, and room for a block in the panel. A prefetch
        // changes nothing, wherever it points.
        unsafe {
            let to = &raw mut (*scales)[i];
            _mm512_store_ps((&raw mut (*to).scale[t]).cast(), factors(job, group));
            if job.rest {
                let rest = _mm512_sub_epi32(_mm512_set1_epi32(MIDDLE), zeros(job, group));
                _mm512_store_si512((&raw mut (*to).rest[t]).cast(), rest);
            }
            let out = (&raw mut (*panel)[t]).cast::<Line>().add(i * DEPTH_QUADS);
            open::<FOUR>(job, group, [codes(tile, block), ahead], out);
        }
    }

    /// Strips of the step that begins at row `row`.
    #[inline(always)]
    fn strips(&self, row: usize) -> usize {
        (self.rows - row).div_ceil(STRIP_ROWS).min(STEP_STRIPS)
    }

    /// Blocks of a panel.
    #[inline(always)]
    fn blocks_of(&self, place: Place) -> usize {
        self.blocks.min(self.job.blocks - place.block)
    }

    /// The rows from `row` on to multiply with a panel.
    #[inline(always)]
    fn tiles(&self, place: Place, row: usize, panel: *const Panel) -> Tiles {
        let Shape { quads, depths, .. } = self.shape;
        let (bytes, height, blocks) = (4 * quads * depths, self.job.rows, self.blocks_of(place));
        let x = self.job.quads.as_ptr().cast::<i8>();
        Tiles {
            blocks,
            depths: blocks * depths,
            strips: self.strips(row),
            x: x.wrapping_add((place.block * height + row) * bytes),
            x_depth: if depths > 1 { 4 * quads } else { height * bytes },
            row: bytes,
            panel,
            panel_depth: if depths > 1 { quads } else { DEPTH_QUADS },
        }
    }

    /// The same rows to scale.
    #[inline(always)]
    fn rows(&self, place: Place, row: usize, factors: *const [Factors; PANEL_BLOCKS]) -> Rows {
        let x = self.job.scales.as_ptr().wrapping_add(place.block * self.job.rows + row);
        let sums = self.sums.cast::<[f32; 16]>().wrapping_add(row);
        Rows {
            blocks: self.blocks_of(place),
            strips: self.strips(row),
            rest: self.job.rest,
            factors,
            x: [x, x.wrapping_add(self.job.rows)],
            sums: [sums, sums.wrapping_add(MAX_ROWS)],
        }
    }
}

/// Opens the codes of a block and asks for those of another.
///
/// # Safety
/// The processor must have the features; block, group and room must be there.
#[target_feature(enable = "gfni,avx512f,avx512bw")]
#[inline]
unsafe fn open<const FOUR: bool>(
    job: &Job<'_>,
    group: usize,
    [codes, ahead]: [*const Line; 2],
    mut out: *mut Line,
) {
    let bits = if FOUR { Bits::Four } else { Bits::Eight };
    // SAFETY: the caller's promises.
    unsafe {
        let opener = match job.weight.zeros {
            TileZeros::All(zero) => Opener::all(zero),
            TileZeros::Each(all) => Opener::each(all.get_unchecked(group)),
        };
        for i in 0..job.lines {
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(i).cast());
            out = opener.line(bits, &*codes.add(i), out);
        }
    }
}
