//! Linears with 4- and 8-bit weights for more than sixteen rows, on a matrix unit (Intel AMX).
//!
//! The formula and, bit for bit, the results of [`super::grouped`]: integers are exact in any
//! order, and each block is added by the same f32 fma, blocks in ascending order.
//!
//! ```text
//! row block   up to 128 rows; their int8 activations stay in the second-level cache (<= 1 MiB)
//!   two tiles of weights          sums [2, 128, 16] f32 start at zero
//!     panel of two depths         codes opened once to [2, 2, quads, 16 x 4] of int8: two blocks of up
//!                                 to 64 columns, or one of up to 128
//!       two strips of 16 rows     dots [2, blocks, 2, 16, 16] = activations x panel, eight products
//!       the two before them       sums += w_scale * a_scale * dots (vector unit, meanwhile)
//!       then                      a part of the next panel is opened, so that nothing waits for its codes
//!                                 (the next two tiles' first one behind the last)
//! in    packed weights (a line of codes is two rows of a panel, or one of 8-bit codes)
//!       activations laid out for it ([`layout`]): all rows of a row block, block by block
//! out   columns of `[rows, n]` f32; strips are computed whole, only real rows are stored
//! split tiles over threads; bytes: every code and scale once for every row block
//! ```
//! A panel holds signed codes: `code - zero` for 4 bits, so that nothing is left to do;
//! `code - 128` for 8 bits, which leaves `(128 - zero) * a_sum` to add. Reference: the generic
//! kernel. Not here: the instructions ([`super::x86`]).

use super::few_rows::{self, MOST_ROWS, Round};
use super::grouped::{Activations, GroupedLinear};
use super::isa::Kernel;
use super::job::Job;
use super::packed::{Packed, TileZeros};
use super::quantize::{Blocks, MAX_BLOCK, QuadLayout};
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
pub(crate) const STEP_ROWS: usize = STEP_STRIPS * STRIP_ROWS;

/// Most quads of a depth, as many as a matrix tile has.
pub(crate) const DEPTH_QUADS: usize = 16;

/// Depths of a panel: one of each of two blocks, or two of one.
pub(crate) const PANEL_DEPTHS: usize = 2;

/// Most blocks of a panel.
pub(crate) const PANEL_BLOCKS: usize = PANEL_DEPTHS;

/// Most rows of a row block: their sums take 16 KiB of the first-level cache.
pub(crate) const MAX_ROWS: usize = 128;

/// Bytes of activations that stay in the second-level cache beside the weights passing by.
const ROW_BLOCK_BYTES: usize = 1 << 20;

/// Opened codes of a tile: byte `4 r + i` of a line is row `r` of the tile and column `i` of the quad,
/// signed. A block's quads follow each other; a second block begins at [`DEPTH_QUADS`].
pub(crate) type Opened = [Line; PANEL_DEPTHS * DEPTH_QUADS];

const _: () = assert!(MAX_BLOCK == 4 * PANEL_DEPTHS * DEPTH_QUADS, "a block is at most a panel");

/// `[tile]`
pub(crate) type Panel = [Opened; 2];

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

/// The matrix tiles of a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Of a depth, 1 to [`DEPTH_QUADS`].
    pub(crate) quads: usize,
    /// Of a block, 1 to [`PANEL_DEPTHS`].
    pub(crate) depths: usize,
    /// Of a strip, 1 to [`STRIP_ROWS`].
    pub(crate) rows: usize,
}

impl Shape {
    /// For blocks of so many columns, a multiple of 8, in as few depths as hold them.
    pub(crate) fn new(block: usize, rows: usize) -> Self {
        let depths = block.div_ceil(4 * DEPTH_QUADS);
        Self { quads: block / 4 / depths, depths, rows }
    }

    /// Quads of a block.
    pub(crate) fn block_quads(self) -> usize {
        self.quads * self.depths
    }

    /// Blocks of a panel.
    pub(crate) fn panel_blocks(self) -> usize {
        PANEL_DEPTHS / self.depths
    }
}

/// What stays in the first-level cache, in whatever form the unit that uses it likes but for the sums.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Scratch {
    /// Zero between pairs of tiles.
    pub(crate) sums: PairSums,
    pub(crate) dots: Dots,
    /// Of even panels and of odd ones.
    pub(crate) panels: [Panel; 2],
    pub(crate) factors: [[Factors; PANEL_BLOCKS]; 2],
}

/// Sums of two tiles, `[tile, row, lane]`.
pub(crate) type PairSums = [[[f32; LANES]; MAX_ROWS]; 2];

impl Scratch {
    const EMPTY: Self = {
        let factors = Factors { scale: [[0.0; LANES]; 2], rest: [[0; LANES]; 2] };
        Self {
            sums: [[[0.0; LANES]; MAX_ROWS]; 2],
            dots: Dots([[[[[0; LANES]; STRIP_ROWS]; 2]; PANEL_BLOCKS]; STEP_STRIPS]),
            panels: [[[Line([0; 64]); PANEL_DEPTHS * DEPTH_QUADS]; 2]; 2],
            factors: [[factors; PANEL_BLOCKS]; 2],
        }
    };
}

thread_local! {
    /// The thread's own, so that no linear must clear one.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
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
    /// Adds up all blocks of each set of tiles, in order, and calls `done` with the last round of the
    /// set and its sums, which that clears.
    fn few_rows(
        &self,
        job: &Job<'_>,
        scratch: &mut few_rows::Scratch,
        done: impl FnMut(Round, &mut [[f32; LANES]]),
    );

    /// Adds up all blocks of each two tiles, in order, for `rows` rows in strips, of a job that has room for as many
    /// strips, and puts the sums. The second tile of the last two is the first again where there is no other.
    fn many_rows(
        &self,
        job: &Job<'_>,
        rows: usize,
        scratch: &mut Scratch,
        results: &mut impl Results,
    );
}

/// Where the sums of two tiles from `tile` on go.
pub(crate) trait Results {
    /// Asks for the memory of some rows: each lies in another page and, where they are a multiple of
    /// 4 KiB apart, in one set of the first-level cache with all others.
    fn ask(&mut self, tile: usize, rows: Range<usize>);

    /// Stores the sums of all rows and clears them.
    fn put(&mut self, tile: usize, sums: &mut PairSums);
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

impl<U: MatrixUnit> Kernel for MatrixLinear<'_, U> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let GroupedLinear { weight, bias, x, tiles, mut out, .. } = self.linear;
        let (height, blocks) = (x.layout.height, weight.blocks.count);
        assert!(height.is_multiple_of(STRIP_ROWS) && height <= MAX_ROWS);
        let mut scratch = SCRATCH.take().unwrap_or_else(|| Box::new(Scratch::EMPTY));
        let shape = Shape::new(weight.blocks.block, STRIP_ROWS);
        let registers = self.unit.configure(shape);
        for start in (0..out.rows()).step_by(height) {
            let (first, rows) = (start * blocks, height.min(out.rows() - start));
            let quads = &x.quads[first * shape.block_quads()..];
            let x = Activations { quads, scales: &x.scales[first..], layout: x.layout };
            let job = Job::new(weight, x, tiles.clone());
            let (n, tiles, out) = (weight.n, &tiles, &mut out);
            let mut results = Columns { s, n, bias, tiles, start, rows, out };
            registers.many_rows(&job, rows, &mut scratch, &mut results);
        }
        SCRATCH.set(Some(scratch));
    }
}

/// Columns of the output, `rows` rows from `start` on.
struct Columns<'b, 'a, S> {
    s: S,
    n: usize,
    bias: Option<&'b [f32]>,
    /// All that the columns of `out` belong to.
    tiles: &'b Range<usize>,
    start: usize,
    rows: usize,
    out: &'b mut MatMut<'a>,
}

impl<S: Simd> Results for Columns<'_, '_, S> {
    #[inline(always)]
    fn ask(&mut self, tile: usize, rows: Range<usize>) {
        let first = (tile - self.tiles.start) * LANES;
        for row in rows.start..rows.end.min(self.rows) {
            let row = &self.out.row(self.start + row)[first..];
            row.chunks(LANES).take(2).for_each(|lanes| self.s.prefetch(&lanes[0]));
        }
    }

    #[inline(always)]
    fn put(&mut self, tile: usize, sums: &mut PairSums) {
        for (tile, sums) in (tile..).zip(sums) {
            if tile < self.tiles.end {
                let at = (tile, self.start);
                put(self.out, (self.tiles, self.n), self.bias, at, &sums[..self.rows]);
            }
            sums[..self.rows.next_multiple_of(STRIP_ROWS)].fill([0.0; LANES]);
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
