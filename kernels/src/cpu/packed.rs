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

use super::grouped::PANEL;
use super::pages::{Arena, Pages};
use super::quantize::Blocks;
use super::repack::{Parts, turn};
use super::simd::{LANES, Line, Simd};
use crate::Error;
#[cfg(test)]
use crate::program::Rounding;
use crate::program::WeightDecl;
use half::slice::HalfFloatSliceExt;
use quant::{Bits, Grouped, GroupedShape};
use rayon::prelude::*;
use std::ops::Range;

/// A quantized matrix in tiles.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) bits: Bits,
    pub(crate) blocks: Blocks,
    pub(crate) groups: usize,
    /// Blocks of a panel, which several rows share.
    pub(crate) panel: usize,
    /// Whether gates lie beside what belongs to them ([`PAIRED`]).
    pub(crate) paired: bool,
    codes: Pages<Line>,
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

/// Rows of gates that lie together in a paired matrix, with the rows that belong to them behind: whole blocks
/// of what they let pass, and four tiles, which a few rows take side by side.
pub(crate) const PAIRED: usize = 64;

/// The declared rows that lie at `rows` of a paired matrix of `n` rows, whose first half are gates.
fn paired_rows(n: usize, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut at = rows.start;
    std::iter::from_fn(move || {
        let (pair, within) = (at / (2 * PAIRED), at % (2 * PAIRED));
        let count = (PAIRED - within % PAIRED).min(rows.end - at);
        let first = within / PAIRED * (n / 2) + pair * PAIRED + within % PAIRED;
        at += count;
        (count > 0).then_some(first..first + count)
    })
}

/// Where a declared row of such a matrix lies.
fn paired_place(n: usize, row: usize) -> usize {
    let (half, gate) = (row / (n / 2), row % (n / 2));
    (2 * (gate / PAIRED) + half) * PAIRED + gate % PAIRED
}

/// Columns of a line.
fn line_columns(bits: Bits) -> usize {
    match bits {
        Bits::Four => 8,
        Bits::Eight => 4,
    }
}

impl Packed {
    /// Repacks a matrix on the current rayon pool, into memory of `arena`; `load` delivers its rows as declared.
    /// A paired one has a multiple of 128 rows.
    ///
    /// # Errors
    /// What `load` returns, [`Error::Device`] for want of memory, and [`Error::Weight`] if parts
    /// come in different column orders.
    pub(crate) fn load(
        decl: &WeightDecl,
        arena: &Arena,
        paired: bool,
        load: impl Fn(Range<usize>) -> Result<Grouped, Error> + Sync,
    ) -> Result<Self, Error> {
        let [n, k] = decl.shape;
        assert!(!paired || n.is_multiple_of(2 * PAIRED), "{n} rows in pairs");
        let first = load(0..n.min(LANES))?;
        let GroupedShape { group, bits, .. } = first.shape();
        let blocks = Blocks::new(k, group, first.perm(), decl.rounding);
        let (tiles, groups, lines) =
            (n.div_ceil(LANES), k / group, blocks.width() / line_columns(bits));
        let mut codes = arena.zeroed(tiles * lines)?;
        let mut scales = vec![[0.0; LANES]; tiles * groups];
        let mut zeros = vec![[0; LANES]; tiles * groups];
        let parts = Parts::new(n, bits.row_bytes(k));
        let vectors = scales.par_chunks_mut(parts.tiles * groups);
        let vectors = vectors.zip(zeros.par_chunks_mut(parts.tiles * groups));
        let all = codes.par_chunks_mut(parts.tiles * lines).zip(vectors).enumerate();
        all.try_for_each(|(part, (codes, (scales, zeros)))| {
            let w = match paired {
                false => load(parts.rows(part))?,
                true => {
                    let all = paired_rows(n, parts.rows(part)).map(&load);
                    let all = all.collect::<Result<Vec<_>, _>>()?;
                    Grouped::stack(&all).ok_or_else(|| other_order(decl))?
                }
            };
            if w.perm() != first.perm() {
                return Err(other_order(decl));
            }
            pack_codes(&w, &blocks, codes);
            by_tile(&w, w.scales(), scales);
            by_tile(&w, w.zeros(), zeros);
            Ok(())
        })?;
        let (scales, zeros) = (Scales::new(scales), Zeros::new(zeros, groups, n));
        let panel = (PANEL * line_columns(bits) / blocks.block).max(1);
        Ok(Self { n, k, bits, blocks, groups, panel, paired, codes, scales, zeros })
    }

    /// Repacks a canonical matrix.
    #[cfg(test)]
    pub(crate) fn new(w: &Grouped) -> Self {
        Self::rounded(w, Rounding::Fine)
    }

    /// Repacks a canonical matrix for activations that are rounded so.
    #[cfg(test)]
    pub(crate) fn rounded(w: &Grouped, rounding: Rounding) -> Self {
        Self::of(w, rounding, false)
    }

    /// Repacks a canonical matrix.
    #[cfg(test)]
    pub(crate) fn of(w: &Grouped, rounding: Rounding, paired: bool) -> Self {
        let weight = quant::Weight::Grouped(w.clone());
        let plain = WeightDecl::new("w", weight.shape(), weight.format());
        let decl = WeightDecl { rounding, ..plain };
        Self::load(&decl, &Arena::default(), paired, |rows| Ok(w.rows(rows))).unwrap()
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

    /// All tiles, one behind the other.
    pub(crate) fn all(&self) -> Tile<'_> {
        Tile {
            codes: &self.codes,
            scales: match &self.scales {
                Scales::F16(all) => TileScales::F16(all),
                Scales::F32(all) => TileScales::F32(all),
            },
            zeros: match &self.zeros {
                Zeros::All(zero) => TileZeros::All(i32::from(*zero)),
                Zeros::Each(all) => TileZeros::Each(all),
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

    /// Asks for the scales and zero points of tile `tile` from group `group` on, or of the tile behind
    /// it: they pass so much more slowly than codes that processors do not read them ahead.
    #[inline(always)]
    pub(crate) fn ask_group<S: Simd>(&self, s: S, tile: usize, group: usize) {
        let at = tile * self.groups + group;
        match &self.scales {
            Scales::F16(all) => all.get(at).into_iter().for_each(|scales| s.prefetch(scales)),
            Scales::F32(all) => all.get(at).into_iter().for_each(|scales| s.prefetch(scales)),
        }
        if let Zeros::Each(all) = &self.zeros {
            all.get(at).into_iter().for_each(|zeros| s.prefetch(zeros));
        }
    }

    /// Dequantizes row `row` into `out_k`, input column order.
    pub(crate) fn row(&self, row: usize, out_k: &mut [f32]) {
        let place = if self.paired { paired_place(self.n, row) } else { row };
        let (tile, lane) = (self.tile(place / LANES), place % LANES);
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

fn other_order(decl: &WeightDecl) -> Error {
    let found = "rows whose columns come in different orders".to_owned();
    Error::Weight { label: decl.label.clone(), expected: "one column order".to_owned(), found }
}

/// Repacks a part: its rows are those of the tiles that `codes` holds.
fn pack_codes(w: &Grouped, blocks: &Blocks, codes: &mut [Line]) {
    let shape = w.shape();
    let lines = blocks.width() / line_columns(shape.bits);
    let columns: Vec<Option<usize>> = blocks.stored_columns(shape.group).collect();
    let padded = columns.iter().any(Option::is_none);
    for (tile, lines) in codes.chunks_exact_mut(lines).enumerate() {
        let rows = tile * LANES..shape.n.min((tile + 1) * LANES);
        if padded {
            pack_tile_padded(w, rows, &columns, lines);
        } else {
            pack_tile(w, rows, lines);
        }
    }
}

/// Spreads the packed codes of up to sixteen rows over lines, four bytes of each row a line.
fn pack_tile(w: &Grouped, rows: Range<usize>, lines: &mut [Line]) {
    let shape = w.shape();
    let bytes = shape.bits.row_bytes(shape.k);
    let mut square = [[0; LANES]; LANES];
    for (i, lines) in lines.chunks_mut(LANES).enumerate() {
        for (words, row) in square.iter_mut().zip(rows.clone()) {
            let quads = w.codes()[row * bytes..][..bytes].as_chunks::<4>().0;
            for (word, quad) in words.iter_mut().zip(&quads[i * LANES..][..lines.len()]) {
                *word = u32::from_ne_bytes(*quad);
            }
        }
        if shape.bits == Bits::Four {
            for word in square.as_flattened_mut() {
                *word = shuffle(u32::from_le(*word)).to_le();
            }
        }
        for (line, words) in lines.iter_mut().zip(turn(&square)) {
            *line = Line(bytemuck::cast(words));
        }
    }
}

/// Eight nibbles 0 1 2 3 4 5 6 7, the lowest first, in the order 0 4 1 5 2 6 3 7.
#[inline(always)]
fn shuffle(word: u32) -> u32 {
    let swap = |x: u32, mask: u32, distance: u32| {
        let differing = (x ^ x >> distance) & mask;
        x ^ differing ^ differing << distance
    };
    swap(swap(word, 0x0000_ff00, 8), 0x00f0_00f0, 4)
}

/// The same one code at a time, for blocks with padding columns.
fn pack_tile_padded(
    w: &Grouped,
    rows: Range<usize>,
    columns: &[Option<usize>],
    lines: &mut [Line],
) {
    let per_line = line_columns(w.shape().bits);
    for (lane, row) in rows.enumerate() {
        for (i, column) in columns.iter().enumerate() {
            let code = column.map_or(0, |column| w.code(row, column));
            lines[i / per_line].0[4 * lane + i % 4] |= code << (i % per_line / 4 * 4);
        }
    }
}

/// Spreads `[n, groups]` values of a part over its tiles.
fn by_tile<T: Copy>(w: &Grouped, values: &[T], vectors: &mut [[T; LANES]]) {
    let groups = w.shape().groups();
    for (row, values) in values.chunks_exact(groups).enumerate() {
        let tile = &mut vectors[row / LANES * groups..][..groups];
        for (vector, value) in tile.iter_mut().zip(values) {
            vector[row % LANES] = *value;
        }
    }
}

impl Scales {
    /// As f16 if that changes none of them.
    fn new(scales: Vec<[f32; LANES]>) -> Self {
        let narrow = |vector: &[f32; LANES]| {
            let (mut narrow, mut again) = ([half::f16::ZERO; LANES], [0.0; LANES]);
            narrow.convert_from_f32_slice(vector);
            narrow.convert_to_f32_slice(&mut again);
            let same = vector.map(f32::to_bits) == again.map(f32::to_bits);
            same.then(|| narrow.map(half::f16::to_bits))
        };
        let narrowed: Option<Vec<_>> = scales.par_iter().map(narrow).collect();
        narrowed.map_or(Self::F32(scales), Self::F16)
    }
}

impl Zeros {
    /// One for all if the `n` rows have no other.
    fn new(zeros: Vec<[u8; LANES]>, groups: usize, n: usize) -> Self {
        let first = zeros[0][0];
        let same = |(tile, vectors): (usize, &[[u8; LANES]])| {
            let lanes = LANES.min(n - tile * LANES);
            vectors.iter().all(|vector| vector[..lanes].iter().all(|zero| *zero == first))
        };
        match zeros.chunks_exact(groups).enumerate().all(same) {
            true => Self::All(first),
            false => Self::Each(zeros),
        }
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
            let packed = spec.packed();
            let mut out = vec![f32::NAN; spec.k];
            for row in 0..spec.n {
                packed.row(row, &mut out);
                prop_assert_eq!(&out, &quant::reference::dequantize_row(&w, row));
            }
        }
    }

    #[test]
    fn rows_of_many_parts_survive_packing() {
        let spec = GroupedSpec { n: 150, k: 4096, zeros: true, ..GroupedSpec::default() };
        for spec in [GroupedSpec { bits: Bits::Eight, ..spec }, GroupedSpec { n: 300, ..spec }] {
            assert!(Parts::new(spec.n, spec.bits.row_bytes(spec.k)).tiles * LANES * 2 < spec.n);
            let w = random_grouped(&spec);
            let (packed, mut out) = (Packed::new(&w), vec![f32::NAN; spec.k]);
            for row in 0..spec.n {
                packed.row(row, &mut out);
                assert_eq!(out, quant::reference::dequantize_row(&w, row), "row {row}");
            }
        }
    }

    #[test]
    fn rows_of_a_paired_matrix_survive_and_gates_lie_beside_what_belongs_to_them() {
        for (n, k) in [(128, 64), (384, 128), (384, 4096)] {
            let spec = GroupedSpec { n, k, zeros: true, ..GroupedSpec::default() };
            let (w, mut out) = (random_grouped(&spec), vec![f32::NAN; k]);
            let packed = spec.paired();
            for row in 0..n {
                packed.row(row, &mut out);
                assert_eq!(out, quant::reference::dequantize_row(&w, row), "row {row} of {n}");
            }
            let (unpaired, tiles) = (Packed::new(&w), n / LANES);
            let place = |tile| (tile / 8 * 4 + tile % 4) + tile % 8 / 4 * (tiles / 2);
            for tile in 0..tiles {
                assert_eq!(packed.tile(tile).codes, unpaired.tile(place(tile)).codes, "{tile}");
            }
        }
    }

    #[test]
    fn parts_in_different_column_orders_are_refused() {
        let spec = GroupedSpec { n: 300, k: 4096, act_order: true, ..GroupedSpec::default() };
        let [a, b] = [1, 2].map(|seed| random_grouped(&GroupedSpec { seed, ..spec }));
        let format = quant::Weight::Grouped(a.clone()).format();
        let deliver = |rows: Range<usize>| Ok(if rows.end < 300 { &a } else { &b }.rows(rows));
        let decl = WeightDecl::new("w", [spec.n, spec.k], format);
        let refused = Packed::load(&decl, &Arena::default(), false, deliver).unwrap_err();
        assert!(
            refused.to_string().starts_with("weight w: expected one column order"),
            "{refused}"
        );
    }

    #[test]
    fn one_zero_point_for_all_rows_is_found_beside_padding() {
        let spec = GroupedSpec { n: 17, ..GroupedSpec::default() };
        assert!(matches!(spec.packed().zeros, Zeros::All(8)));
    }

    #[test]
    fn bytes_are_four_and_an_eighth_bits_for_symmetric_groups_of_128() {
        let mut spec = GroupedSpec { n: 64, k: 512, group: 128, ..GroupedSpec::default() };
        spec.f16_scales = true;
        assert_eq!(spec.packed().bytes(), 64 * 512 * 33 / 64 + 1);
        spec.zeros = true;
        assert_eq!(spec.packed().bytes(), 64 * 512 * 67 / 128);
    }
}
