//! Quantized matrices as tiles of sixteen rows, in the order of a tensor instruction's lanes.
//!
//! `shaders/cuda/grouped.cuh` has the picture. Where outputs are activated at once, a tile is eight rows
//! of gates and the eight that belong to them. Tiles are made some at a time, on all threads: no matrix
//! exists twice. Not here: memory ([`super::store`]). Input: the delivered rows of a matrix.

use crate::cpu::Blocks;
use quant::{Bits, Grouped};
use std::ops::Range;

/// Rows of a tile.
pub(super) const TILE: usize = 16;
/// Lanes of a warp.
const LANES: usize = 32;

/// Columns of the pieces that blocks of more lie in, one behind the other.
const PIECE: usize = 64;

/// Columns that a block takes in memory.
pub(super) fn stride(blocks: &Blocks) -> usize {
    match blocks.block {
        0..=32 => 32,
        33..=PIECE => PIECE,
        _ => 2 * PIECE,
    }
}

/// The rows of a matrix as tiles have them.
#[derive(Debug, Clone, Copy)]
pub(super) struct TileRows {
    pub(super) n: usize,
    /// The first half are gates of the second.
    pub(super) paired: bool,
}

impl TileRows {
    pub(super) fn tiles(self) -> usize {
        self.n.div_ceil(TILE)
    }

    /// Row `row` of tile `tile`, if there is one.
    fn at(self, tile: usize, row: usize) -> Option<usize> {
        if !self.paired {
            return Some(tile * TILE + row).filter(|row| *row < self.n);
        }
        let (pairs, half) = (TILE / 2, self.n / 2);
        let pair = Some(tile * pairs + row % pairs).filter(|pair| *pair < half);
        pair.map(|pair| pair + row / pairs * half)
    }

    /// The rows that some tiles have, as ranges.
    pub(super) fn ranges(self, tiles: &Range<usize>) -> Vec<Range<usize>> {
        let (rows, end) = if self.paired { (TILE / 2, self.n / 2) } else { (TILE, self.n) };
        let first = (tiles.start * rows).min(end)..(tiles.end * rows).min(end);
        let second = self.paired.then(|| first.start + end..first.end + end);
        [first].into_iter().chain(second).collect()
    }
}

/// How a matrix lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout<'a> {
    pub(super) bits: Bits,
    pub(super) blocks: &'a Blocks,
    /// Canonical column of each stored one, none for padding.
    pub(super) columns: &'a [Option<usize>],
    pub(super) rows: TileRows,
    /// Of a row.
    pub(super) groups: usize,
}

impl Layout<'_> {
    /// Columns of a piece of a block, and how many pieces a block has.
    fn pieces(&self) -> [usize; 2] {
        let (stride, piece) = (stride(self.blocks), stride(self.blocks).min(PIECE));
        [piece, stride / piece]
    }

    /// Quads of a lane's part of a piece.
    fn quads(&self) -> usize {
        self.pieces()[0] / TILE
    }

    /// Words of them.
    fn words(&self) -> usize {
        self.quads() * self.bits.count() / 4
    }

    /// Bytes of codes of a tile.
    pub(super) fn code_bytes(&self) -> usize {
        4 * self.blocks.count * self.pieces()[1] * LANES * self.words()
    }

    /// Scales of a tile, or zero points.
    pub(super) fn scales(&self) -> usize {
        self.groups * TILE
    }
}

/// Some tiles of a matrix.
#[derive(Debug, Default)]
pub(super) struct Packed {
    /// `[tiles, blocks, pieces, lanes, words]`
    pub(super) codes: Vec<u32>,
    /// `[tiles, groups, 16]`; where there is no row, 0 and the zero point of the tile's first row.
    pub(super) scales: Vec<f32>,
    pub(super) zeros: Vec<u8>,
}

impl Packed {
    /// Scales as f16, if that changes none of them.
    pub(super) fn narrow_scales(&self) -> Option<Vec<u16>> {
        let narrow = |&scale: &f32| {
            let half = half::f16::from_f32(scale);
            (half.to_f32().to_bits() == scale.to_bits()).then(|| half.to_bits())
        };
        self.scales.iter().map(narrow).collect()
    }

    /// The zero point, if all are the same.
    pub(super) fn one_zero(&self) -> Option<u8> {
        let first = *self.zeros.first()?;
        self.zeros.iter().all(|zero| *zero == first).then_some(first)
    }
}

/// A row of delivered ones.
type Line<'a> = Option<(&'a Grouped, usize)>;

/// Packs `tiles`, whose rows are `parts`, each with its first row.
pub(super) fn pack(layout: &Layout<'_>, tiles: Range<usize>, parts: &[(usize, Grouped)]) -> Packed {
    let mut packed = Packed::default();
    for tile in tiles {
        let lines: [Line<'_>; TILE] = std::array::from_fn(|row| {
            let row = layout.rows.at(tile, row)?;
            let (start, part) = parts.iter().rev().find(|(start, _)| *start <= row)?;
            Some((part, row - start))
        });
        pack_codes(layout, &lines, &mut packed.codes);
        for group in 0..layout.groups {
            let at = |(part, row): (&'_ Grouped, usize)| {
                let at = row * layout.groups + group;
                (part.scales()[at], part.zeros()[at])
            };
            let beyond = lines[0].map_or(0, |first| at(first).1);
            for line in &lines {
                let (scale, zero) = line.map_or((0.0, beyond), at);
                packed.scales.push(scale);
                packed.zeros.push(zero);
            }
        }
    }
    packed
}

/// Appends a tile's codes `[blocks, pieces, lanes, words]`.
fn pack_codes(layout: &Layout<'_>, lines: &[Line<'_>; TILE], out: &mut Vec<u32>) {
    let (blocks, [columns, pieces]) = (layout.blocks, layout.pieces());
    for at in 0..blocks.count * pieces * LANES {
        let (lane, piece, block) = (at % LANES, at / LANES % pieces, at / LANES / pieces);
        let start = out.len();
        out.resize(start + layout.words(), 0);
        let words = &mut out[start..];
        for quad in 0..layout.quads() {
            let first = piece * columns + lane % 4 * (columns / 4) + 4 * quad;
            let code = |half: usize, i: usize| -> u32 {
                let column = (first + i < blocks.block)
                    .then(|| layout.columns[block * blocks.block + first + i])
                    .flatten();
                let place = lines[half * 8 + lane / 4].zip(column);
                place.map_or(0, |((part, row), column)| u32::from(part.code(row, column)))
            };
            for i in 0..4 {
                match layout.bits {
                    Bits::Four => words[quad] |= (code(0, i) | code(1, i) << 4) << (8 * i),
                    Bits::Eight => {
                        words[2 * quad] |= code(0, i) << (8 * i);
                        words[2 * quad + 1] |= code(1, i) << (8 * i);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::Rounding;
    use quant::{GroupedParts, GroupedShape};

    /// Codes that tell row and column: `(row + column) % 16`; scales and zeros that tell row and group.
    fn matrix(bits: Bits, n: usize, k: usize, group: usize) -> Grouped {
        let code = |row: usize, column: usize| ((row + column) % 16) as u8;
        let mut codes = vec![];
        for row in 0..n {
            match bits {
                Bits::Four => {
                    codes.extend((0..k / 2).map(|i| code(row, 2 * i) | code(row, 2 * i + 1) << 4));
                }
                Bits::Eight => codes.extend((0..k).map(|column| code(row, column))),
            }
        }
        let shape = GroupedShape { n, k, group, bits };
        let count = n * k / group;
        let scales = (0..count).map(|at| 1.0 + at as f32).collect();
        let zeros = (0..count).map(|at| (at % 16) as u8).collect();
        Grouped::new("m", GroupedParts { shape, codes, scales, zeros, perm: None }).unwrap()
    }

    /// All tiles of a matrix, delivered `step` tiles at a time.
    fn packed(matrix: &Grouped, paired: bool, step: usize) -> Packed {
        packed_for(Rounding::Fine, matrix, paired, step)
    }

    fn packed_for(rounding: Rounding, matrix: &Grouped, paired: bool, step: usize) -> Packed {
        let shape = matrix.shape();
        let blocks = Blocks::new(shape.k, shape.group, None, rounding);
        let columns: Vec<Option<usize>> = blocks.stored_columns(shape.group).collect();
        let rows = TileRows { n: shape.n, paired };
        let (bits, groups) = (shape.bits, shape.groups());
        let layout = Layout { bits, blocks: &blocks, columns: &columns, rows, groups };
        let mut all = Packed::default();
        for first in (0..rows.tiles()).step_by(step) {
            let tiles = first..(first + step).min(rows.tiles());
            let part = |rows: Range<usize>| (rows.start, matrix.rows(rows));
            let parts: Vec<_> = rows.ranges(&tiles).into_iter().map(part).collect();
            let Packed { codes, scales, zeros } = pack(&layout, tiles, &parts);
            all.codes.extend(codes);
            all.scales.extend(scales);
            all.zeros.extend(zeros);
        }
        assert_eq!(4 * all.codes.len(), rows.tiles() * layout.code_bytes());
        assert_eq!(all.scales.len(), rows.tiles() * layout.scales());
        all
    }

    #[test]
    fn a_lane_holds_its_columns_of_two_rows() {
        let words = packed(&matrix(Bits::Four, 20, 128, 64), false, 2).codes;
        assert_eq!(words.len(), 2 * 2 * 32 * 4);
        // Tile 0, block 1, lane 4 * 2 + 3: rows 2 and 10, columns 64 + 48 + 4 * 1 .. of word 1.
        let word = words[(32 + 11) * 4 + 1];
        let expected = |row: u32, i: u32| (row + 64 + 48 + 4 + i) % 16;
        for i in 0..4 {
            let byte = word >> (8 * i) & 255;
            assert_eq!((byte & 15, byte >> 4), (expected(2, i), expected(10, i)));
        }
        // Tile 1 has four rows; the others are zeros.
        let beyond = &words[(2 * 32 + 4 * 4) * 4..][..4];
        assert_eq!(beyond, [0; 4]);
    }

    #[test]
    fn bytes_of_two_rows_take_turns() {
        let words = packed(&matrix(Bits::Eight, 16, 32, 32), false, 1).codes;
        assert_eq!(words.len(), 32 * 4);
        // Lane 4 * 1 + 2: columns 16 .. 24 of rows 1 and 9.
        let lane = &words[6 * 4..][..4];
        let quad = |row: u32, column: u32| {
            (0..4).fold(0, |word, i| word | ((row + column + i) % 16) << (8 * i))
        };
        assert_eq!(lane, [quad(1, 16), quad(9, 16), quad(1, 20), quad(9, 20)]);
    }

    #[test]
    fn a_block_of_128_columns_lies_as_two_of_64() {
        for bits in [Bits::Four, Bits::Eight] {
            let matrix = matrix(bits, 20, 256, 128);
            let codes = packed(&matrix, false, 2).codes;
            assert_eq!(packed_for(Rounding::Coarse, &matrix, false, 2).codes, codes);
        }
        // 96 columns: the second piece ends with 32 zeros, those of lanes 4 * g + 2 and 4 * g + 3.
        let words = packed_for(Rounding::Coarse, &matrix(Bits::Four, 16, 96, 96), false, 1).codes;
        assert_eq!(words.len(), 2 * 32 * 4);
        for (lane, words) in words[32 * 4..].chunks(4).enumerate() {
            let first = |i: usize| (lane / 4 + 64 + lane % 4 * 16 + i) % 16;
            let expected = if lane % 4 < 2 { first(0) | first(8) << 4 } else { 0 };
            assert_eq!(words[0] & 255, expected as u32, "lane {lane}");
        }
    }

    #[test]
    fn gates_meet_what_belongs_to_them() {
        let rows = TileRows { n: 24, paired: true };
        assert_eq!(rows.tiles(), 2);
        assert_eq!([0, 7, 8, 15].map(|row| rows.at(0, row)), [0, 7, 12, 19].map(Some));
        // The second tile has four pairs.
        assert_eq!([3, 4, 11, 12].map(|row| rows.at(1, row)), [Some(11), None, Some(23), None]);
        assert_eq!(rows.ranges(&(1..2)), [8..12, 20..24]);
        let scales = packed(&matrix(Bits::Eight, 24, 64, 32), true, 2).scales;
        assert_eq!(scales.len(), 2 * 2 * 16);
        // Tile 1, group 1: rows 8 .. 12, then 20 .. 24.
        let row = |row: usize| (2 * row + 2) as f32;
        let expected: Vec<f32> = [8, 9, 10, 11, 20, 21, 22, 23].into_iter().map(row).collect();
        assert_eq!([&scales[48..52], &scales[56..60]].concat(), expected);
        assert_eq!([&scales[52..56], &scales[60..]].concat(), [0.0; 8]);
    }

    #[test]
    fn scales_are_f16_and_zero_points_one_only_if_nothing_changes() {
        let of = |scales: &[f32], zeros: &[u8]| Packed {
            scales: scales.to_vec(),
            zeros: zeros.to_vec(),
            ..Packed::default()
        };
        let (small, large) = (half::f16::from_bits(1).to_f32(), 65504.0);
        let narrow = of(&[1.0, -0.5, 0.0, small, large], &[8, 8, 8]);
        assert_eq!(narrow.narrow_scales().unwrap(), [0x3c00, 0xb800, 0, 1, 0x7bff]);
        assert_eq!(narrow.one_zero(), Some(8));
        for scale in [1.0 + f32::EPSILON, 0.1, small / 2.0, 65536.0] {
            assert_eq!(of(&[1.0, scale], &[]).narrow_scales(), None, "{scale}");
        }
        assert_eq!(of(&[], &[8, 7, 8]).one_zero(), None);
        // Rows that do not exist do not count: the matrix has 20.
        let shape = GroupedShape { n: 20, k: 64, group: 32, bits: Bits::Eight };
        let (codes, scales) = (vec![0; 20 * 64], vec![1.0; 40]);
        let parts = GroupedParts { shape, codes, scales, zeros: vec![128; 40], perm: None };
        let matrix = Grouped::new("m", parts).unwrap();
        assert_eq!(packed(&matrix, false, 1).one_zero(), Some(128));
    }

    #[test]
    fn parts_are_the_whole() {
        for (bits, paired) in [(Bits::Four, false), (Bits::Eight, true)] {
            let matrix = matrix(bits, 88, 96, 32);
            let whole = packed(&matrix, paired, 6);
            for step in [1, 4] {
                let parts = packed(&matrix, paired, step);
                assert_eq!(parts.codes, whole.codes);
                assert_eq!(
                    (parts.scales, parts.zeros),
                    (whole.scales.clone(), whole.zeros.clone())
                );
            }
        }
    }
}
