//! Linears with 4- and 8-bit weights for more than sixteen rows, on a matrix unit (Intel AMX).
//!
//! The formula and, bit for bit, the results of [`super::grouped`]: integers are exact in any
//! order, and each block is added by the same f32 fma, blocks in ascending order.
//!
//! ```text
//! row block   up to 128 rows; their int8 activations stay in the second-level cache (<= 1 MiB)
//!   two tiles of weights          sums [2, 128, 16] f32 start at zero
//!     panel of two blocks         codes opened once to [2, 2, quads, 16 x 4] of int8
//!       two strips of 16 rows     dots [2, 2, 2, 16, 16] = activations x panel, eight products
//!       the two before them       sums += w_scale * a_scale * dots (vector unit, meanwhile)
//!       then                      a part of the next panel is opened, so that nothing waits for its codes
//! in    packed weights (a line of codes is two rows of a panel, or one of 8-bit codes)
//!       activations laid out for it ([`layout`]): all rows of a row block, block by block
//! out   columns of `[rows, n]` f32; strips are computed whole, only real rows are stored
//! split tiles over threads; bytes: every code and scale once for every row block
//! ```
//! A panel holds signed codes: `code - zero` for 4 bits, so that nothing is left to do;
//! `code - 128` for 8 bits, which leaves `(128 - zero) * a_sum` to add. Reference: the generic
//! kernel. Not here: the instructions ([`super::x86`]).

use super::few_rows::{self, MOST_ROWS, Round, TileSums};
use super::grouped::{Activations, GroupedLinear, STREAMS, scale};
use super::isa::Kernel;
use super::packed::{Packed, Tile, TileZeros};
use super::quantize::{BlockScale, Blocks, MAX_BLOCK, QuadLayout};
use super::share::MatMut;
use super::simd::{LANES, Line, Simd, TOGETHER};
use super::tile::put;
use quant::Bits;
use std::cell::Cell;
use std::ops::Range;

/// Fewest rows worth the matrix unit. Two take 1.2 of the vector unit's time out of a cache and as long or 1.15
/// out of memory; three and four 0.8 to 1.0 and 0.9 to 1.0 (1024 x 2048 and 5632 x 2048 weights, Emerald
/// Rapids).
pub(crate) const FEWEST_ROWS: usize = 3;

/// Rows of a matrix tile, and of a strip.
pub(crate) const STRIP_ROWS: usize = 16;

/// Strips that are multiplied in one step.
pub(crate) const STEP_STRIPS: usize = 2;

/// Rows of a step.
const STEP_ROWS: usize = STEP_STRIPS * STRIP_ROWS;

/// Blocks of a panel.
pub(crate) const PANEL_BLOCKS: usize = 2;

/// Blocks and tiles of a panel, which are opened one by one.
const PARTS: usize = 2 * PANEL_BLOCKS;

/// Most quads of a block, the depth of a matrix tile.
pub(crate) const BLOCK_QUADS: usize = MAX_BLOCK / 4;

/// Most rows of a row block: their sums take 16 KiB of the first-level cache.
const MAX_ROWS: usize = 128;

/// Bytes of activations that stay in the second-level cache beside the weights passing by.
const ROW_BLOCK_BYTES: usize = 1 << 20;

/// Panels between asking for codes and opening them.
const PANELS_AHEAD: usize = 8;

/// Groups between asking for scales and using them.
const LATER: usize = 8;

/// Opened codes of a block and a tile: byte `4 r + i` of a line is row `r` of the tile and column
/// `i` of the quad, signed.
pub(crate) type Opened = [Line; BLOCK_QUADS];

/// `[block, tile]`
pub(crate) type Panel = [[Opened; 2]; PANEL_BLOCKS];

/// Products of a panel and the strips of a step `[strip, block, tile, row, lane]`, in whatever form the unit that
/// makes and scales them likes.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Dots(pub(crate) [[[[[i32; LANES]; STRIP_ROWS]; 2]; PANEL_BLOCKS]; STEP_STRIPS]);

/// What the dots of a block are multiplied with, and what is left to add, `[tile, lane]`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Factors {
    pub(crate) scale: [[f32; LANES]; 2],
    /// 128 less the zero points; the sum of the activations times it is left to add.
    pub(crate) rest: [[i32; LANES]; 2],
}

/// The matrix tiles of a linear: quads of a block and rows of a strip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// 1 to [`BLOCK_QUADS`].
    pub(crate) quads: usize,
    /// 1 to [`STRIP_ROWS`].
    pub(crate) rows: usize,
}

/// Codes of a block and a tile to open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opening<'a> {
    pub(crate) bits: Bits,
    /// Half a line or one for each quad, as the bits want.
    pub(crate) lines: &'a [Line],
    /// Zero points, taken from 4-bit codes.
    pub(crate) zeros: &'a [u8; LANES],
    /// Lines to ask for meanwhile.
    pub(crate) ahead: &'a [Line],
}

/// A panel times the strips of a step.
#[derive(Debug)]
pub(crate) struct Product<'a> {
    pub(crate) panel: &'a Panel,
    /// Blocks of the panel.
    pub(crate) blocks: usize,
    pub(crate) strips: usize,
    /// `[blocks, height, quads]` from the first strip's first row on.
    pub(crate) x: &'a [i32],
    pub(crate) height: usize,
}

/// Dots to scale and add up.
#[derive(Debug)]
pub(crate) struct Scaling<'a> {
    /// Blocks of the panel.
    pub(crate) blocks: usize,
    pub(crate) strips: usize,
    pub(crate) factors: &'a [Factors; PANEL_BLOCKS],
    /// Whether anything is left to add.
    pub(crate) rest: bool,
    /// `[blocks, height]` from the first strip's first row on.
    pub(crate) x: &'a [BlockScale],
    pub(crate) height: usize,
    /// Of both tiles and at least the rows of the strips.
    pub(crate) sums: [&'a mut [[f32; LANES]]; 2],
}

/// A processor with matrix registers. A value of an implementing type proves that it has them.
pub(crate) trait MatrixUnit: Copy + Send + Sync {
    /// This thread's registers in use.
    type Registers: MatrixRegisters;

    /// Shapes this thread's registers. A thread has one such value at a time; when it is dropped the
    /// system need not save the registers any more.
    fn configure(self, shape: Shape) -> Self::Registers;
}

/// Matrix registers in a certain shape.
pub(crate) trait MatrixRegisters {
    /// Writes the opened codes of a block and a tile.
    fn open(&self, codes: Opening<'_>, out: &mut Opened);

    /// Adds up all blocks of each set of tiles, in order, and calls `done` with the last round of the
    /// set and its sums, which that clears.
    fn few_rows(
        &self,
        job: &few_rows::Job<'_>,
        scratch: &mut few_rows::Scratch,
        done: impl FnMut(Round, &mut [TileSums; STREAMS]),
    );

    /// For the blocks of `last`, which was `next` one call ago, in order
    /// `sums[tile][row][lane] += scale * x scale * (dots + rest * x sum)`, one fma each; then, or meanwhile,
    /// `dots[strip][block][tile][row][lane]` = sum over the quads of a block of a row of `next.x` times row
    /// `lane` of the panel's tile, exact.
    fn step(&self, next: Option<Product<'_>>, last: Option<Scaling<'_>>, dots: &mut Dots);
}

/// The layout of activations for a matrix unit: row blocks as high as the caches allow.
pub(crate) fn layout(rows: usize, blocks: &Blocks) -> QuadLayout {
    let fit = ROW_BLOCK_BYTES / blocks.width().max(1) / STRIP_ROWS * STRIP_ROWS;
    let most = fit.clamp(STRIP_ROWS, MAX_ROWS);
    let strips = if rows <= MOST_ROWS { rows } else { rows.next_multiple_of(STRIP_ROWS) };
    QuadLayout { height: most.min(strips) }
}

/// Rows that memory must have room for so that up to `rows` rows fit in any layout.
pub(crate) fn padded_rows(rows: usize, blocks: &Blocks) -> usize {
    let together = rows.next_multiple_of(TOGETHER);
    if rows < FEWEST_ROWS { together } else { together.max(layout(rows, blocks).rows(rows)) }
}

/// A linear over several rows.
#[derive(Debug)]
pub(crate) struct MatrixLinear<'a, U> {
    /// Its activations lie in row blocks of a height that is a multiple of 16, at most 128, and
    /// up to the end of the last one.
    pub(crate) linear: GroupedLinear<'a>,
    pub(crate) unit: U,
}

/// What stays in the first-level cache.
#[derive(Debug)]
#[repr(C, align(64))]
struct Scratch {
    sums: [[[f32; LANES]; MAX_ROWS]; 2],
    dots: Dots,
    panels: [Panel; 2],
    factors: [[Factors; PANEL_BLOCKS]; 2],
}

impl Scratch {
    const EMPTY: Self = {
        let factors = Factors { scale: [[0.0; LANES]; 2], rest: [[0; LANES]; 2] };
        Self {
            sums: [[[0.0; LANES]; MAX_ROWS]; 2],
            dots: Dots([[[[[0; LANES]; STRIP_ROWS]; 2]; PANEL_BLOCKS]; STEP_STRIPS]),
            panels: [[[[Line([0; 64]); BLOCK_QUADS]; 2]; PANEL_BLOCKS]; 2],
            factors: [[factors; PANEL_BLOCKS]; 2],
        }
    };
}

thread_local! {
    /// The thread's own, so that no linear must clear one.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

impl<U: MatrixUnit> Kernel for MatrixLinear<'_, U> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let GroupedLinear { weight, x, .. } = &self.linear;
        let height = x.layout.height;
        assert!(height.is_multiple_of(STRIP_ROWS) && height <= MAX_ROWS);
        let mut scratch = SCRATCH.take().unwrap_or_else(|| Box::new(Scratch::EMPTY));
        let registers =
            self.unit.configure(Shape { quads: weight.blocks.block / 4, rows: STRIP_ROWS });
        let GroupedLinear { weight, bias, x, tiles, out, .. } = &mut self.linear;
        for start in (0..out.rows()).step_by(height) {
            for tile in tiles.clone().step_by(2) {
                let rows = height.min(out.rows() - start);
                let job = Job::new((weight, *x), &registers, (start, rows), tile..tiles.end);
                let results = Results { n: weight.n, bias: *bias, tiles, start, tile, out };
                job.add_up(s, &mut scratch, results);
            }
        }
        SCRATCH.set(Some(scratch));
    }
}

/// Where the results of a job go: rows from `start` on, the columns of two tiles from `tile` on.
struct Results<'b, 'a> {
    n: usize,
    bias: Option<&'b [f32]>,
    /// All that the columns of `out` belong to.
    tiles: &'b Range<usize>,
    start: usize,
    tile: usize,
    out: &'b mut MatMut<'a>,
}

impl Results<'_, '_> {
    /// Asks for the memory of some rows: each lies in another page and, where they are a multiple of
    /// 4 KiB apart, in one set of the first-level cache with all others.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S, rows: Range<usize>) {
        let first = (self.tile - self.tiles.start) * LANES;
        for row in rows {
            let row = &self.out.row(self.start + row)[first..];
            row.chunks(LANES).take(2).for_each(|lanes| s.prefetch(&lanes[0]));
        }
    }

    /// Stores the sums of all rows.
    #[inline(always)]
    fn put(&mut self, rows: usize, sums: &[[[f32; LANES]; MAX_ROWS]; 2]) {
        for (tile, sums) in (self.tile..self.tiles.end).zip(sums) {
            let at = (tile, self.start);
            put(self.out, (self.tiles, self.n), self.bias, at, &sums[..rows]);
        }
    }
}

/// The rows of one row block and two tiles.
#[derive(Debug, Clone, Copy)]
struct Job<'a, R> {
    registers: &'a R,
    weight: &'a Packed,
    /// The second is the first again where there is no other: its sums are not stored.
    tiles: [(usize, Tile<'a>); 2],
    /// Whether something is left to add to dots.
    rest: bool,
    /// Real rows, and rows of the layout.
    rows: usize,
    height: usize,
    /// `[blocks, height, quads]`
    quads: &'a [i32],
    /// `[blocks, height]`
    scales: &'a [BlockScale],
}

/// A panel's first block and a step's first row whose dots are not added up yet.
#[derive(Debug, Clone, Copy)]
struct Pending {
    block: usize,
    row: usize,
}

impl<'a, R: MatrixRegisters> Job<'a, R> {
    /// `rows` rows from `start` on and the first two of some tiles.
    #[inline(always)]
    fn new(
        (weight, x): (&'a Packed, Activations<'a>),
        registers: &'a R,
        (start, rows): (usize, usize),
        tiles: Range<usize>,
    ) -> Self {
        let (height, first) = (x.layout.height, start * weight.blocks.count);
        let items = height * weight.blocks.count;
        let quads = weight.blocks.block / 4;
        let second = (tiles.start + 1).min(tiles.end - 1);
        let tiles = [tiles.start, second].map(|tile| (tile, weight.tile(tile)));
        Self {
            registers,
            weight,
            tiles,
            rest: leaves_rest(weight),
            rows,
            height,
            quads: &x.quads[first * quads..][..items * quads],
            scales: &x.scales[first..][..items],
        }
    }

    /// All blocks of the row block. The matrix unit is given the next strips while the dots of those
    /// before them are scaled, so that both units work at once.
    #[inline(always)]
    fn add_up<S: Simd>(&self, s: S, scratch: &mut Scratch, mut results: Results<'_, '_>) {
        let Scratch { sums, dots, panels: [panel, after], factors } = scratch;
        let (mut panel, mut after) = (panel, after);
        for sums in &mut *sums {
            sums[..self.rows.next_multiple_of(STRIP_ROWS)].fill([0.0; LANES]);
        }
        let count = self.weight.blocks.count;
        let share = self.rows.div_ceil(count.div_ceil(PANEL_BLOCKS));
        let steps = self.rows.div_ceil(STEP_ROWS);
        let mut pending: Option<Pending> = None;
        (0..PARTS).for_each(|part| self.open(s, 0, part, panel, &mut factors[0]));
        for block in (0..count).step_by(PANEL_BLOCKS) {
            let first = block / PANEL_BLOCKS * share;
            results.ask(s, first.min(self.rows)..self.rows.min(first + share));
            for (i, row) in (0..self.rows).step_by(STEP_ROWS).enumerate() {
                let last = pending.map(|last| self.scaling(last, factors, sums));
                let next = self.product((block, row), panel);
                self.registers.step(Some(next), last, dots);
                pending = Some(Pending { block, row });
                for part in PARTS * i / steps..PARTS * (i + 1) / steps {
                    let next = block + PANEL_BLOCKS;
                    self.open(s, next, part, after, &mut factors[next / PANEL_BLOCKS % 2]);
                }
            }
            (panel, after) = (after, panel);
        }
        let last = pending.map(|last| self.scaling(last, factors, sums));
        self.registers.step(None, last, dots);
        results.put(self.rows, sums);
    }

    /// Blocks of the panel that begins at `block`.
    #[inline(always)]
    fn blocks(&self, block: usize) -> Range<usize> {
        block..self.weight.blocks.count.min(block + PANEL_BLOCKS)
    }

    /// Opens one of [`PARTS`] of the panel that begins at `block`, if there is one.
    #[inline(always)]
    fn open<S: Simd>(
        &self,
        s: S,
        block: usize,
        part: usize,
        panel: &mut Panel,
        factors: &mut [Factors; PANEL_BLOCKS],
    ) {
        let (i, t, blocks) = (part / 2, part % 2, &self.weight.blocks);
        let b = block + i;
        if b >= blocks.count {
            return;
        }
        let ((index, tile), group) = (&self.tiles[t], b / blocks.per_group);
        let zeros = match tile.zeros {
            TileZeros::All(zero) => [zero as u8; LANES],
            TileZeros::Each(all) => all[group],
        };
        if self.rest {
            factors[i].rest[t] = zeros.map(|zero| MIDDLE - i32::from(zero));
        }
        self.weight.ask_group(s, *index, group + LATER);
        s.store(scale(s, tile, group), &mut factors[i].scale[t]);
        let lines = self.weight.block_lines();
        let codes = Opening {
            bits: self.weight.bits,
            lines: &tile.codes[b * lines..][..lines],
            zeros: &zeros,
            ahead: self.ahead(*index, b + PANELS_AHEAD * PANEL_BLOCKS),
        };
        self.registers.open(codes, &mut panel[i][t]);
    }

    /// Codes of block `block` of a tile, or, beyond its end, of the tile that is opened after it.
    #[inline(always)]
    fn ahead(&self, tile: usize, block: usize) -> &'a [Line] {
        let count = self.weight.blocks.count;
        match block < count {
            true => self.weight.lines_from(tile, block, 1),
            false => self.weight.lines_from(tile + 2, block - count, 1),
        }
    }

    /// Strips of the step that begins at row `row`.
    #[inline(always)]
    fn strips(&self, row: usize) -> usize {
        (self.rows - row).div_ceil(STRIP_ROWS).min(STEP_STRIPS)
    }

    /// The panel that begins at `block` times the rows from `row` on.
    #[inline(always)]
    fn product<'b>(&'b self, (block, row): (usize, usize), panel: &'b Panel) -> Product<'b> {
        let x = &self.quads[(block * self.height + row) * (self.weight.blocks.block / 4)..];
        let (blocks, strips) = (self.blocks(block).len(), self.strips(row));
        Product { panel, blocks, strips, x, height: self.height }
    }

    /// What is left to do for strips whose dots are there.
    #[inline(always)]
    fn scaling<'b>(
        &'b self,
        Pending { block, row }: Pending,
        factors: &'b [[Factors; PANEL_BLOCKS]; 2],
        sums: &'b mut [[[f32; LANES]; MAX_ROWS]; 2],
    ) -> Scaling<'b> {
        let [first, second] = sums;
        Scaling {
            blocks: self.blocks(block).len(),
            strips: self.strips(row),
            factors: &factors[block / PANEL_BLOCKS % 2],
            rest: self.rest,
            x: &self.scales[block * self.height + row..],
            height: self.height,
            sums: [&mut first[row..], &mut second[row..]],
        }
    }
}

/// Whether opened codes leave something to add to dots: zero points that are not [`MIDDLE`].
pub(crate) fn leaves_rest(weight: &Packed) -> bool {
    let plain = matches!(weight.tile(0).zeros, TileZeros::All(zero) if zero == MIDDLE);
    weight.bits == Bits::Eight && !plain
}

/// What 8-bit codes are lowered by to be signed.
pub(crate) const MIDDLE: i32 = 128;

#[cfg(test)]
#[path = "matmul_tests.rs"]
mod tests;
