//! Linears with 4- and 8-bit weights for three to sixteen rows, on a matrix unit (Intel AMX).
//!
//! The formula and, bit for bit, the results of [`super::grouped`]: integers are exact in any
//! order, and each block is added by the same f32 fma, blocks in ascending order.
//!
//! ```text
//! four tiles of weights, side by side     sums [4, rows, 16] f32
//!   round: a depth of each of them        three rounds are under way at once, tile by tile (a block of up
//!                                         to 64 columns is one depth, a longer one two):
//!     opened      this round's codes      panels [4, quads, 16 x 4] of int8
//!     multiplied  the round before it     dots [4, rows, 16] i32 += activations x panel, one product
//!     scaled      the round before that   a block's sums += w_scale * a_scale * dots (vector unit)
//! in    packed weights; activations `[blocks, rows, quads]`, all rows together
//! out   columns of `[rows, n]` f32
//! split tiles over threads; bytes: every code and scale once
//! ```
//! Rounds go on from one set of tiles to the next. Nothing in a round waits for what is done in it, so that
//! vector unit, matrix unit and memory work at once. Emerald Rapids at 2.6 GHz: a line of codes takes 8 to 9
//! cycles out of memory, out of a cache 7 with four rows, 9 with eight, 13 with sixteen; of blocks of two depths
//! 6, 7 and 10. By count the multiplying port takes 3, 5 and 8 of those, and storing dots 2, however many rows; of
//! two depths less. More rows: [`super::matmul`].

use super::grouped::{GroupedLinear, STREAMS};
use super::isa::Kernel;
use super::job::Job;
use super::matmul::{DEPTH_QUADS, MatrixRegisters, MatrixUnit, Shape};
use super::simd::{LANES, Line, Simd};
use super::tile::PutTiles;
use std::cell::Cell;

/// Most rows: those of a matrix register.
pub(crate) const MOST_ROWS: usize = 16;

/// Lines of each tile between asking for codes and opening them: four rounds of the longest depths of 4 bits, two of
/// 8 bits. With twice as many, four rows take up to 1.1 of the time.
pub(crate) const LINES_AHEAD: usize = 32;

/// Groups between asking for scales and using them.
const GROUPS_AHEAD: usize = 4;

/// Most rows of all tiles side by side.
const SET_ROWS: usize = STREAMS * MOST_ROWS;

/// A linear over a few rows.
#[derive(Debug)]
pub(crate) struct FewRows<'a, U> {
    /// At most [`MOST_ROWS`] rows, whose activations lie in one row block.
    pub(crate) linear: GroupedLinear<'a>,
    pub(crate) unit: U,
}

/// What stays in the first-level cache: of panels and dots those of even rounds and of odd ones.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Scratch {
    pub(crate) panels: [[[Line; DEPTH_QUADS]; STREAMS]; 2],
    /// `[round, tile, row, lane]`, without gaps where there are fewer rows: they would leave parts of the cache unused.
    pub(crate) dots: [[i32; LANES]; 2 * SET_ROWS],
    /// `[tile, row, lane]`, as dense; zero between sets.
    pub(crate) sums: [[f32; LANES]; SET_ROWS],
}

impl Scratch {
    const EMPTY: Self = Self {
        panels: [[[Line([0; 64]); DEPTH_QUADS]; STREAMS]; 2],
        dots: [[0; LANES]; 2 * SET_ROWS],
        sums: [[0.0; LANES]; SET_ROWS],
    };
}

thread_local! {
    /// The thread's own, so that no linear must clear one.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

impl<U: MatrixUnit> Kernel for FewRows<'_, U> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let GroupedLinear { weight, bias, x, tiles, mut out, .. } = self.linear;
        let rows = out.rows();
        assert!(rows == x.layout.height && rows <= MOST_ROWS, "{rows} rows at once");
        let mut scratch = SCRATCH.take().unwrap_or_else(|| Box::new(Scratch::EMPTY));
        let registers = self.unit.configure(Shape::new(weight.blocks.block, rows));
        let job = Job::new(weight, x, tiles.clone());
        registers.few_rows(&job, &mut scratch, |set, sums| {
            let (out, tiles, first) = (&mut out, &tiles, set.tile);
            let sums = &mut sums[..set.tiles * rows];
            s.apart(PutTiles { out, tiles, n: weight.n, bias, first, sums });
        });
        SCRATCH.set(Some(scratch));
    }
}

/// A depth of some tiles.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    /// The first one.
    pub(crate) tile: usize,
    /// At most [`STREAMS`]; none if there is no such round.
    pub(crate) tiles: usize,
    pub(crate) block: usize,
    /// Of the block.
    pub(crate) depth: usize,
    pub(crate) group: usize,
    /// The block's place in its group.
    at: usize,
}

impl Round {
    pub(crate) const NONE: Self = Self { tile: 0, tiles: 0, block: 0, depth: 0, group: 0, at: 0 };
}

impl Job<'_> {
    /// The first block of the tiles from `tile` on.
    #[inline(always)]
    pub(crate) fn first(&self, tile: usize) -> Round {
        Round { tile, tiles: self.tiles.end.saturating_sub(tile).min(STREAMS), ..Round::NONE }
    }

    /// The round after `round`; behind the last one that of no tiles.
    #[inline(always)]
    pub(crate) fn after(&self, round: Round) -> Round {
        if round.depth + 1 < self.depths {
            return Round { depth: round.depth + 1, ..round };
        }
        let round = Round { depth: 0, ..round };
        let (block, at) = (round.block + 1, round.at + 1);
        if block == self.blocks || round.tiles == 0 {
            self.first(round.tile + STREAMS)
        } else if at == self.per_group {
            Round { block, group: round.group + 1, at: 0, ..round }
        } else {
            Round { block, at, ..round }
        }
    }

    /// Tile and depth of a round.
    #[inline(always)]
    pub(crate) fn opened(&self, round: Round) -> (usize, usize) {
        (round.tile, round.block * self.depths + round.depth)
    }

    /// The first line of a tile's depth.
    #[inline(always)]
    pub(crate) fn line(&self, (tile, depth): (usize, usize)) -> usize {
        (tile * self.blocks * self.depths + depth) * self.depth_lines
    }

    /// Tiles that have all depths of a block when a round is multiplied: its own or none.
    #[inline(always)]
    pub(crate) fn complete(&self, round: Round) -> usize {
        if round.depth + 1 == self.depths { round.tiles } else { 0 }
    }

    /// Whether a round is the last of its tiles.
    #[inline(always)]
    pub(crate) fn is_last(&self, round: Round) -> bool {
        round.block + 1 == self.blocks && self.complete(round) > 0
    }

    /// Tile and depth to ask for while a round is opened: itself if what is behind the last tile would come.
    #[inline(always)]
    pub(crate) fn ahead(&self, round: Round) -> (usize, usize) {
        let (tile, depth) = self.opened(round);
        let later = self.later(round, depth + self.ahead, self.blocks * self.depths);
        later.unwrap_or((tile, depth))
    }

    /// Tile and group whose scales to ask for while a round is opened, if they are another group's.
    #[inline(always)]
    pub(crate) fn scales_ahead(&self, round: Round) -> Option<(usize, usize)> {
        let first = round.at == 0 && round.depth == 0 && round.tiles > 0;
        first.then(|| self.later(round, round.group + GROUPS_AHEAD, self.groups)).flatten()
    }

    /// Tile and depth, or group, of that number, counted on into the next set; none behind the last tile.
    #[inline(always)]
    fn later(&self, round: Round, item: usize, count: usize) -> Option<(usize, usize)> {
        let next = round.tile + STREAMS;
        if item < count {
            Some((round.tile, item))
        } else {
            (next + round.tiles <= self.tiles.end && item < 2 * count).then(|| (next, item - count))
        }
    }
}
