//! Linears with 4- and 8-bit weights for many rows, on a matrix unit (Intel AMX).
//!
//! The formula and, bit for bit, the results of [`super::grouped`]: integers are exact in any
//! order, and each block is added by the same f32 fma, blocks in ascending order.
//!
//! ```text
//! row block   up to 128 rows; its int8 activations stay in the second-level cache (<= 1 MiB)
//!   two tiles of weights           sums [2, 128, 16] f32 start at zero
//!     block of up to 64 columns    codes opened once to a panel [2, quads, 16 x 4] of int8
//!       32 rows                    dots [2, 32, 16] i32 = activations x panel, 2 x 2 matrix tiles
//!       the 32 rows before them    sums += w_scale * a_scale * dots (vector unit, meanwhile)
//! in    packed weights (a line of codes is two rows of a panel, or one of 8-bit codes)
//!       activations laid out for it ([`layout`]): all rows of a row block, block by block
//! out   columns of `[rows, n]` f32; rows are computed 32 at a time, only real ones are stored
//! split tiles over threads; bytes: every code and scale once for every row block
//! ```
//! A panel holds signed codes: `code - zero` for 4 bits, so that nothing is left to do;
//! `code - 128` for 8 bits, which leaves `(128 - zero) * a_sum` to add. Reference: the generic kernel.
//!
//! Expected rate (not measured: no such processor at hand). For 32 rows, two tiles and 64 columns,
//! 131072 operations, the matrix unit works 4 products x 16 cycles = 64 cycles. Loads take 32 for
//! matrix tiles and 80 to scale, stores 64 and 64, vector arithmetic 96; opening codes takes 40,
//! shared by 128 rows. All at once that is 128 cycles, 3.1 TOPS a core at 3 GHz; one after another
//! about 350 cycles, 1.1 TOPS.

// Loops over the bytes of a line count indices: they become one vector operation each.
#![allow(clippy::needless_range_loop)]

use super::grouped::{GroupedLinear, scale};
use super::isa::Kernel;
use super::packed::{Tile, TileZeros};
use super::quantize::{BlockScale, Blocks, MAX_BLOCK, QuadLayout};
use super::simd::{LANES, Line, Simd, TOGETHER};
use super::tile::put;
use quant::Bits;

/// Fewest rows worth the matrix unit. A product costs as much for one row as for 32: about 260
/// cycles with opening and scaling, where dots of 16 rows take 512 in the vector unit.
pub(crate) const FEWEST_ROWS: usize = 16;

/// Rows of a matrix tile.
pub(crate) const TILE_ROWS: usize = 16;

/// Rows that a product covers: two matrix tiles.
pub(crate) const PRODUCT_ROWS: usize = 2 * TILE_ROWS;

/// Most quads of a block.
pub(crate) const BLOCK_QUADS: usize = MAX_BLOCK / 4;

/// Most quads of a step, the depth of a matrix tile.
pub(crate) const STEP_QUADS: usize = 16;

/// Most rows of a row block: their sums take 16 KiB of the first-level cache.
const MAX_ROWS: usize = 128;

/// Bytes of activations that stay in the second-level cache beside the weights passing by.
const ROW_BLOCK_BYTES: usize = 1 << 20;

/// Opened codes of one block of two tiles: `[tile, quad]` lines, byte `4 r + i` of a line is row
/// `r` of the tile and column `i` of the quad, signed.
pub(crate) type Panel = [[Line; BLOCK_QUADS]; 2];

/// Products of a block `[tile, row, lane]`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Dots(pub(crate) [[[i32; LANES]; PRODUCT_ROWS]; 2]);

/// How a block falls into equal steps, each the depth of one matrix tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Steps {
    /// One or two.
    pub(crate) count: usize,
    /// Quads of a step, 1 to 16.
    pub(crate) quads: usize,
}

impl Steps {
    /// Of a block of `block` columns: a multiple of 8, at most [`MAX_BLOCK`], hence of an even
    /// number of quads, which two steps share equally.
    pub(crate) fn of(block: usize) -> Self {
        let count = (block / 4).div_ceil(STEP_QUADS);
        Self { count, quads: block / 4 / count }
    }

    /// Quads of the block.
    pub(crate) fn block_quads(self) -> usize {
        self.count * self.quads
    }
}

/// A processor with matrix registers. A value of an implementing type proves that it has them.
pub(crate) trait MatrixUnit: Copy + Send + Sync {
    /// This thread's registers in use.
    type Registers: MatrixRegisters;

    /// Shapes this thread's registers for products of such blocks. A thread has one such value
    /// at a time; when it is dropped the system need not save the registers any more.
    fn configure(self, steps: Steps) -> Self::Registers;
}

/// Matrix registers shaped for blocks of certain steps.
pub(crate) trait MatrixRegisters {
    /// `dots[tile][row][lane]` = sum over the quads of a block of row `row` of `x`
    /// `[PRODUCT_ROWS, block quads]` times row `lane` of panel `tile`, exact. Lines of a panel
    /// behind the block are not used.
    fn product(&self, x: &[i32], panel: &Panel, dots: &mut Dots);
}

/// The layout of activations for a matrix unit: row blocks as high as the caches allow.
pub(crate) fn layout(rows: usize, blocks: &Blocks) -> QuadLayout {
    let fit = ROW_BLOCK_BYTES / blocks.width().max(1) / PRODUCT_ROWS * PRODUCT_ROWS;
    let most = fit.clamp(PRODUCT_ROWS, MAX_ROWS);
    QuadLayout { height: most.min(rows.next_multiple_of(PRODUCT_ROWS)) }
}

/// Rows that memory must have room for so that up to `rows` rows fit in any layout.
pub(crate) fn padded_rows(rows: usize, blocks: &Blocks) -> usize {
    let together = rows.next_multiple_of(TOGETHER);
    if rows < FEWEST_ROWS { together } else { together.max(layout(rows, blocks).rows(rows)) }
}

/// A linear over many rows.
#[derive(Debug)]
pub(crate) struct MatrixLinear<'a, U> {
    /// Its activations lie in row blocks of a height that is a multiple of [`PRODUCT_ROWS`], at most
    /// 128, and up to the end of the last one.
    pub(crate) linear: GroupedLinear<'a>,
    pub(crate) unit: U,
}

/// What stays in the first-level cache.
#[derive(Debug)]
#[repr(C, align(64))]
struct Scratch {
    sums: [[[f32; LANES]; MAX_ROWS]; 2],
    dots: [Dots; 2],
    panel: Panel,
}

impl<U: MatrixUnit> Kernel for MatrixLinear<'_, U> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let height = self.linear.x.layout.height;
        assert!(height.is_multiple_of(PRODUCT_ROWS) && height <= MAX_ROWS);
        let mut scratch = Scratch {
            sums: [[[0.0; LANES]; MAX_ROWS]; 2],
            dots: [Dots([[[0; LANES]; PRODUCT_ROWS]; 2]); 2],
            panel: [[Line([0; 64]); BLOCK_QUADS]; 2],
        };
        let registers = self.unit.configure(Steps::of(self.linear.weight.blocks.block));
        for start in (0..self.linear.out.rows()).step_by(height) {
            for tile in self.linear.tiles.clone().step_by(2) {
                let job = Job::new(&self, &registers, start, tile);
                match self.linear.weight.bits {
                    Bits::Four => job.add_up::<S, Four>(s, &mut scratch),
                    Bits::Eight => job.add_up::<S, Eight>(s, &mut scratch),
                }
                self.put((start, job.rows), tile, &scratch);
            }
        }
    }
}

impl<U> MatrixLinear<'_, U> {
    /// Stores the sums of `rows` rows from `start` and of the tiles from `tile`.
    #[inline(always)]
    fn put(&mut self, (start, rows): (usize, usize), tile: usize, scratch: &Scratch) {
        let GroupedLinear { weight, bias, tiles, out, .. } = &mut self.linear;
        for (tile, sums) in (tile..tiles.end).zip(&scratch.sums) {
            put(out, (tiles, weight.n), *bias, (tile, start), &sums[..rows]);
        }
    }
}

/// How codes of one width are opened, and whether the zero point is left to add.
trait Codes {
    /// Whether anything is left.
    const REST: bool;
    /// Opens the lines of a block; `zero` has the zero point of each row four times.
    fn open(lines: &[Line], zero: [u8; 64], panel: &mut [Line; BLOCK_QUADS]);
}

struct Four;
struct Eight;

/// What 8-bit codes are lowered by to be signed.
const MIDDLE: u8 = 128;

impl Codes for Four {
    const REST: bool = false;
    #[inline(always)]
    fn open(lines: &[Line], zero: [u8; 64], panel: &mut [Line; BLOCK_QUADS]) {
        for (line, open) in lines.iter().zip(panel.as_chunks_mut::<2>().0) {
            let (codes, mut low, mut high) = (line.0, [0; 64], [0; 64]);
            for i in 0..64 {
                low[i] = (codes[i] & 15).wrapping_sub(zero[i]);
                high[i] = (codes[i] >> 4).wrapping_sub(zero[i]);
            }
            *open = [Line(low), Line(high)];
        }
    }
}

impl Codes for Eight {
    const REST: bool = true;
    #[inline(always)]
    fn open(lines: &[Line], _: [u8; 64], panel: &mut [Line; BLOCK_QUADS]) {
        for (line, open) in lines.iter().zip(panel) {
            let mut codes = line.0;
            for code in &mut codes {
                *code = code.wrapping_sub(MIDDLE);
            }
            *open = Line(codes);
        }
    }
}

/// Each of sixteen codes four times.
#[inline(always)]
fn fourfold<S: Simd>(s: S, codes: S::I) -> [u8; 64] {
    let mut bytes = [0; 64];
    let fourfold = s.lanes_i(s.mul_i(codes, s.splat_i(0x0101_0101)));
    for (bytes, code) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(&fourfold) {
        *bytes = code.to_le_bytes();
    }
    bytes
}

/// The rows of one row block and two tiles.
#[derive(Debug, Clone, Copy)]
struct Job<'a, R> {
    registers: &'a R,
    /// The second is the first again where there is no other: its sums are not stored.
    tiles: [Tile<'a>; 2],
    blocks: &'a Blocks,
    block_lines: usize,
    /// Real rows, and rows of the layout.
    rows: usize,
    height: usize,
    /// `[blocks, height, block quads]`
    quads: &'a [i32],
    /// `[blocks, height]`
    scales: &'a [BlockScale],
}

impl<'a, R: MatrixRegisters> Job<'a, R> {
    /// The rows from `start` on and the tiles from `tile` on.
    #[inline(always)]
    fn new<U>(all: &MatrixLinear<'a, U>, registers: &'a R, start: usize, tile: usize) -> Self {
        let GroupedLinear { weight, x, tiles, out, .. } = &all.linear;
        let (height, first) = (x.layout.height, start * weight.blocks.count);
        let items = height * weight.blocks.count;
        let block_quads = weight.blocks.block / 4;
        Self {
            registers,
            tiles: [weight.tile(tile), weight.tile((tile + 1).min(tiles.end - 1))],
            blocks: &weight.blocks,
            block_lines: weight.block_lines(),
            rows: height.min(out.rows() - start),
            height,
            quads: &x.quads[first * block_quads..][..items * block_quads],
            scales: &x.scales[first..][..items],
        }
    }

    /// All blocks of the row block into `scratch.sums`.
    #[inline(always)]
    fn add_up<S: Simd, C: Codes>(&self, s: S, scratch: &mut Scratch) {
        for sums in &mut scratch.sums {
            sums[..self.rows].fill([0.0; LANES]);
        }
        for b in 0..self.blocks.count {
            let [first, second] = &mut scratch.panel;
            let factors = [self.open::<S, C>(s, 0, b, first), self.open::<S, C>(s, 1, b, second)];
            self.add_block::<S, C>(s, b, factors, scratch);
        }
    }

    /// Opens block `b` of a tile; returns its scales, and [`MIDDLE`] minus its zero points.
    #[inline(always)]
    fn open<S: Simd, C: Codes>(
        &self,
        s: S,
        tile: usize,
        b: usize,
        panel: &mut [Line; BLOCK_QUADS],
    ) -> (S::F, S::I) {
        let (tile, group) = (&self.tiles[tile], b / self.blocks.per_group);
        let zero = match tile.zeros {
            TileZeros::All(zero) => s.splat_i(zero),
            TileZeros::Each(all) => s.widen_u8(&all[group]),
        };
        let lines = &tile.codes[b * self.block_lines..][..self.block_lines];
        C::open(lines, fourfold(s, zero), panel);
        let minus = s.mul_i(zero, s.splat_i(-1));
        (scale(s, tile, group), s.add_i(s.splat_i(i32::from(MIDDLE)), minus))
    }

    /// One block, whose panel is open: the matrix unit is given the next rows before the dots of
    /// the last ones are scaled, so that both units work at once.
    #[inline(always)]
    fn add_block<S: Simd, C: Codes>(
        &self,
        s: S,
        block: usize,
        factors: [(S::F, S::I); 2],
        scratch: &mut Scratch,
    ) {
        let Scratch { sums: [first, second], dots, panel } = scratch;
        self.product(block, 0, panel, &mut dots[0]);
        for (i, start) in (0..self.rows).step_by(PRODUCT_ROWS).enumerate() {
            let end = start + PRODUCT_ROWS;
            if end < self.rows {
                self.product(block, end, panel, &mut dots[(i + 1) % 2]);
            }
            let rows = start..end.min(self.rows);
            let x = &self.scales[block * self.height..][rows.clone()];
            let [dots0, dots1] = &dots[i % 2].0;
            add_scaled::<S, C>(s, factors[0], x, dots0, &mut first[rows.clone()]);
            add_scaled::<S, C>(s, factors[1], x, dots1, &mut second[rows]);
        }
    }

    /// Dots of one block and the rows from `row` on.
    #[inline(always)]
    fn product(&self, block: usize, row: usize, panel: &Panel, dots: &mut Dots) {
        let quads = self.blocks.block / 4;
        let x = &self.quads[(block * self.height + row) * quads..][..PRODUCT_ROWS * quads];
        self.registers.product(x, panel, dots);
    }
}

/// Adds the dots of a block and one tile to the sums of up to 32 rows.
#[inline(always)]
fn add_scaled<S: Simd, C: Codes>(
    s: S,
    (scale, rest): (S::F, S::I),
    x: &[BlockScale],
    dots: &[[i32; LANES]; PRODUCT_ROWS],
    sums: &mut [[f32; LANES]],
) {
    for ((x, dots), sum) in x.iter().zip(dots).zip(sums) {
        let mut dots = s.load_i(dots);
        if C::REST {
            dots = s.add_i(dots, s.mul_i(rest, s.splat_i(x.sum)));
        }
        let scale = s.mul(scale, s.splat(x.scale));
        s.store(s.fma(scale, s.to_f32(dots), s.load(sum)), sum);
    }
}

#[cfg(test)]
#[path = "matmul_tests.rs"]
mod tests;
