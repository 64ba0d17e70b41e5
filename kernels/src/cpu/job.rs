//! A linear over some tiles and rows as loops in pointers want it: counts, checked once against what they count.
//!
//! Input: a packed weight and activations of one height ([`super::packed`], [`super::grouped`]). Not here: the
//! loops ([`super::few_rows`], [`super::matmul`] and the instruction sets').

use super::few_rows::LINES_AHEAD;
use super::grouped::Activations;
use super::matmul::{Shape, leaves_rest};
use super::packed::{Packed, Tile, TileScales, TileZeros};
use super::quantize::BlockScale;
use quant::Bits;
use std::ops::Range;

/// A linear over some tiles.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) bits: Bits,
    /// Whether 128 less the zero points, times the sum of the activations, is left to add to dots.
    pub(crate) rest: bool,
    /// All tiles of the weight.
    pub(crate) weight: Tile<'a>,
    /// Of a tile, and how many of them a group has.
    pub(crate) blocks: usize,
    pub(crate) per_group: usize,
    pub(crate) groups: usize,
    /// Of a block, a multiple of its depths.
    pub(crate) lines: usize,
    /// Of a block.
    pub(crate) depths: usize,
    /// Of a depth.
    pub(crate) depth_lines: usize,
    /// Depths between asking for codes and opening them, for a few rows.
    pub(crate) ahead: usize,
    pub(crate) tiles: Range<usize>,
    pub(crate) rows: usize,
    /// `[blocks, rows, quads]`
    pub(crate) quads: &'a [i32],
    /// `[blocks, rows]`
    pub(crate) scales: &'a [BlockScale],
}

impl<'a> Job<'a> {
    pub(crate) fn new(weight: &'a Packed, x: Activations<'a>, tiles: Range<usize>) -> Self {
        let (rows, blocks) = (x.layout.height, &weight.blocks);
        let (lines, depths) = (weight.block_lines(), Shape::new(blocks.block, rows).depths);
        Self {
            bits: weight.bits,
            rest: leaves_rest(weight),
            weight: weight.all(),
            blocks: blocks.count,
            per_group: blocks.per_group,
            groups: weight.groups,
            lines,
            depths,
            depth_lines: lines / depths,
            ahead: (LINES_AHEAD * depths / lines).max(1),
            tiles,
            rows,
            quads: &x.quads[..blocks.width() / 4 * rows],
            scales: &x.scales[..blocks.count * rows],
        }
    }

    /// Quads of a block.
    pub(crate) fn block_quads(&self) -> usize {
        self.lines * if self.bits == Bits::Four { 2 } else { 1 }
    }

    /// The first line of a tile's block.
    #[inline(always)]
    pub(crate) fn block_line(&self, tile: usize, block: usize) -> usize {
        (tile * self.blocks + block) * self.lines
    }

    /// Checks that everything is there which is counted.
    pub(crate) fn check(&self) {
        let quads = self.block_quads();
        let items = self.blocks * self.rows;
        let enough = self.quads.len() >= items * quads && self.scales.len() >= items;
        assert!(enough, "too few activations");
        let groups = self.tiles.end * self.groups;
        let scales = match self.weight.scales {
            TileScales::F16(scales) => scales.len(),
            TileScales::F32(scales) => scales.len(),
        };
        let zeros = match self.weight.zeros {
            TileZeros::Each(zeros) => zeros.len(),
            TileZeros::All(_) => groups,
        };
        assert!(scales >= groups && zeros >= groups, "too few scales");
        assert!(self.groups * self.per_group >= self.blocks, "blocks without a group");
        let lines = self.tiles.end * self.blocks * self.lines;
        assert!(self.weight.codes.len() >= lines, "too few codes");
    }
}
