//! Quantized weights as the CPU kernels read them: tiles of sixteen rows, repacked at build.
//!
//! ```text
//! codes [tiles, blocks, lines]   one line of 64 bytes is sixteen rows of four bytes:
//!   4-bit, a line is 8 columns   byte 4 r + i: row r, column i low nibble, column 4 + i high
//!   8-bit, a line is 4 columns   byte 4 r + i: row r, column i
//! scales [tiles, groups, 16]     f16 where every scale of the matrix is one, else f32
//! zeros  [tiles, groups, 16]     u8, or one number for the whole matrix
//! ```
//! Rows beyond n and columns that pad a block hold zeros. Columns are in activation-block order
//! ([`Blocks`]). Not here: arithmetic ([`super::grouped`]). Input: canonical weights.

use super::quantize::Blocks;
use super::simd::{LANES, Line};
use quant::{Bits, Grouped};
use rayon::prelude::*;

/// A quantized matrix in tiles.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) bits: Bits,
    pub(crate) blocks: Blocks,
    pub(crate) groups: usize,
    codes: Vec<Line>,
    scales: Scales,
    zeros: Zeros,
}

/// `[tiles, groups]` vectors of sixteen rows.
#[derive(Debug)]
enum Scales {
    F16(Vec<[u16; LANES]>),
    F32(Vec<[f32; LANES]>),
}

/// `[tiles, groups]` vectors of sixteen rows, or one for all.
#[derive(Debug)]
enum Zeros {
    All(u8),
    Each(Vec<[u8; LANES]>),
}

/// Scales of sixteen rows and one group.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TileScales<'a> {
    F16(&'a [[u16; LANES]]),
    F32(&'a [[f32; LANES]]),
}

/// Zero points of sixteen rows and one group.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TileZeros<'a> {
    All(i32),
    Each(&'a [[u8; LANES]]),
}

/// Sixteen rows of a matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// `[blocks, lines]`
    pub(crate) codes: &'a [Line],
    /// `[groups]`
    pub(crate) scales: TileScales<'a>,
    /// `[groups]`
    pub(crate) zeros: TileZeros<'a>,
}

/// Columns of a line.
fn line_columns(bits: Bits) -> usize {
    match bits {
        Bits::Four => 8,
        Bits::Eight => 4,
    }
}

impl Packed {
    /// Repacks a canonical matrix on the current rayon pool.
    pub(crate) fn new(w: &Grouped) -> Self {
        let shape = w.shape();
        let blocks = Blocks::new(shape.k, shape.group, w.perm());
        Self {
            n: shape.n,
            k: shape.k,
            bits: shape.bits,
            groups: shape.groups(),
            codes: pack_codes(w, &blocks),
            scales: pack_scales(w),
            zeros: pack_zeros(w),
            blocks,
        }
    }

    /// Number of tiles.
    #[cfg(test)]
    pub(crate) fn tiles(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    /// Lines of a block.
    pub(crate) fn block_lines(&self) -> usize {
        self.blocks.block / line_columns(self.bits)
    }

    /// Tile `tile`.
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize) -> Tile<'_> {
        let lines = self.blocks.count * self.block_lines();
        let groups = tile * self.groups..(tile + 1) * self.groups;
        Tile {
            codes: &self.codes[tile * lines..][..lines],
            scales: match &self.scales {
                Scales::F16(all) => TileScales::F16(&all[groups.clone()]),
                Scales::F32(all) => TileScales::F32(&all[groups.clone()]),
            },
            zeros: match &self.zeros {
                Zeros::All(zero) => TileZeros::All(i32::from(*zero)),
                Zeros::Each(all) => TileZeros::Each(&all[groups]),
            },
        }
    }

    /// Codes of `count` blocks from block `block` of tile `tile` on: those of the next tile follow
    /// those of the last block. Fewer at the end of the matrix, none beyond.
    #[inline(always)]
    pub(crate) fn lines_from(&self, tile: usize, block: usize, count: usize) -> &[Line] {
        let each = self.block_lines();
        let start = (tile * self.blocks.count + block) * each;
        let rest = &self.codes[start.min(self.codes.len())..];
        &rest[..rest.len().min(count * each)]
    }

    /// Dequantizes row `row` into `out_k`, input column order.
    pub(crate) fn row(&self, row: usize, out_k: &mut [f32]) {
        let (tile, lane) = (self.tile(row / LANES), row % LANES);
        let group = self.k / self.groups;
        for (i, column) in self.blocks.stored_columns(group).enumerate() {
            let Some(column) = column else { continue };
            let g = column / group;
            let scale = match tile.scales {
                TileScales::F16(all) => half::f16::from_bits(all[g][lane]).to_f32(),
                TileScales::F32(all) => all[g][lane],
            };
            let zero = match tile.zeros {
                TileZeros::All(zero) => zero as f32,
                TileZeros::Each(all) => f32::from(all[g][lane]),
            };
            let source = self.blocks.source.as_ref().map_or(column, |s| s[i] as usize);
            out_k[source] = (f32::from(code(self.bits, tile.codes, lane, i)) - zero) * scale;
        }
    }

    /// Bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::F16(all) => size_of_val(&all[..]),
            Scales::F32(all) => size_of_val(&all[..]),
        };
        let zeros = match &self.zeros {
            Zeros::All(_) => 1,
            Zeros::Each(all) => size_of_val(&all[..]),
        };
        let source = self.blocks.source.as_ref().map_or(0, |all| size_of_val(&all[..]));
        size_of_val(&self.codes[..]) + scales + zeros + source
    }
}

/// Code of row `lane` and stored column `i` of a tile.
fn code(bits: Bits, codes: &[Line], lane: usize, i: usize) -> u8 {
    let columns = line_columns(bits);
    let byte = codes[i / columns].0[4 * lane + i % 4];
    match bits {
        Bits::Four => byte >> (i % 8 / 4 * 4) & 15,
        Bits::Eight => byte,
    }
}

fn pack_codes(w: &Grouped, blocks: &Blocks) -> Vec<Line> {
    let shape = w.shape();
    let lines = blocks.width() / line_columns(shape.bits);
    let mut codes = vec![Line::ZERO; shape.n.div_ceil(LANES) * lines];
    let columns: Vec<Option<usize>> = blocks.stored_columns(shape.group).collect();
    let padded = columns.iter().any(Option::is_none);
    codes.par_chunks_mut(lines).enumerate().for_each(|(tile, lines)| {
        for row in tile * LANES..shape.n.min((tile + 1) * LANES) {
            if padded {
                pack_row_padded(w, row, &columns, lines);
            } else {
                pack_row(w, row, lines);
            }
        }
    });
    codes
}

/// Spreads a row's packed codes over the lines of its tile, four bytes a line.
fn pack_row(w: &Grouped, row: usize, lines: &mut [Line]) {
    let shape = w.shape();
    let bytes = shape.bits.row_bytes(shape.k);
    let quads = w.codes()[row * bytes..][..bytes].as_chunks::<4>().0;
    for (line, &[a, b, c, d]) in lines.iter_mut().zip(quads) {
        let packed = match shape.bits {
            // columns 0..8 arrive as pairs (0, 1) (2, 3) (4, 5) (6, 7)
            Bits::Four => [a & 15 | c << 4, a >> 4 | c & 240, b & 15 | d << 4, b >> 4 | d & 240],
            Bits::Eight => [a, b, c, d],
        };
        line.0[4 * (row % LANES)..][..4].copy_from_slice(&packed);
    }
}

/// The same one code at a time, for blocks with padding columns.
fn pack_row_padded(w: &Grouped, row: usize, columns: &[Option<usize>], lines: &mut [Line]) {
    let per_line = line_columns(w.shape().bits);
    for (i, column) in columns.iter().enumerate() {
        let code = column.map_or(0, |column| w.code(row, column));
        lines[i / per_line].0[4 * (row % LANES) + i % 4] |= code << (i % per_line / 4 * 4);
    }
}

/// Spreads `[n, groups]` values over vectors of sixteen rows, `pad` beyond row n.
fn by_tile<T: Copy, U: Copy>(
    w: &Grouped,
    values: &[T],
    pad: U,
    map: impl Fn(T) -> U,
) -> Vec<[U; LANES]> {
    let (n, groups) = (w.shape().n, w.shape().groups());
    let tiles = (0..n.div_ceil(LANES)).flat_map(|tile| (0..groups).map(move |g| (tile, g)));
    let lane = |tile: usize, g: usize, lane: usize| {
        let row = tile * LANES + lane;
        if row < n { map(values[row * groups + g]) } else { pad }
    };
    tiles.map(|(tile, g)| std::array::from_fn(|l| lane(tile, g, l))).collect()
}

fn pack_scales(w: &Grouped) -> Scales {
    let narrow = |x: f32| half::f16::from_f32(x);
    if w.scales().iter().all(|&x| narrow(x).to_f32().to_bits() == x.to_bits()) {
        Scales::F16(by_tile(w, w.scales(), 0, |x| narrow(x).to_bits()))
    } else {
        Scales::F32(by_tile(w, w.scales(), 0.0, |x| x))
    }
}

fn pack_zeros(w: &Grouped) -> Zeros {
    match w.zeros() {
        [first, rest @ ..] if rest.iter().all(|zero| zero == first) => Zeros::All(*first),
        zeros => Zeros::Each(by_tile(w, zeros, 0, |zero| zero)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{GroupedSpec, random_grouped};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_survive_packing(spec in GroupedSpec::any()) {
            let w = random_grouped(&spec);
            let packed = Packed::new(&w);
            let mut out = vec![f32::NAN; spec.k];
            for row in 0..spec.n {
                packed.row(row, &mut out);
                prop_assert_eq!(&out, &quant::reference::dequantize_row(&w, row));
            }
        }
    }

    #[test]
    fn bytes_are_four_and_an_eighth_bits_for_symmetric_groups_of_128() {
        let mut spec = GroupedSpec { n: 64, k: 512, group: 128, ..GroupedSpec::default() };
        spec.f16_scales = true;
        assert_eq!(Packed::new(&random_grouped(&spec)).bytes(), 64 * 512 * 33 / 64 + 1);
        spec.zeros = true;
        assert_eq!(Packed::new(&random_grouped(&spec)).bytes(), 64 * 512 * 67 / 128);
    }
}
