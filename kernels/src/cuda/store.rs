//! Weights on the device: each in the layouts that its uses read.
//!
//! ```text
//! linear, quantized    tiles of sixteen rows, in the order of a tensor instruction's lanes
//!                      (`shaders/cuda/grouped.cuh` has the picture); where outputs are activated at
//!                      once, eight rows of gates and the eight that belong to them
//! embedding, quantized rows of codes as delivered, with scales, zero points and column order
//! float matrix         as delivered, for both
//! norm weights, biases f32 vector
//! ```
//! Not here: what is done with them ([`super::plan`]). Input: canonical weights, one at a time.

use super::gpu::{Gpu, Pointer};
use super::joins;
use crate::cpu::Blocks;
use crate::program::{Op, Program, WeightId};
use crate::{Error, WeightSource, validate};
use quant::{Bits, Dense, FloatType, Grouped, Weight};

/// Rows of a tile.
const TILE: usize = 16;
/// Lanes of a warp.
const LANES: usize = 32;

/// One weight; a part is missing where nothing uses it.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// f32 elements of a `[1, k]` weight.
    pub(crate) vector: Option<Pointer>,
    pub(crate) dense: Option<StoredDense>,
    pub(crate) tiles: Option<Tiles>,
    pub(crate) table: Option<Table>,
}

/// A float matrix as delivered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoredDense {
    pub(crate) float: FloatType,
    pub(crate) values: Pointer,
}

/// A quantized matrix for a linear.
#[derive(Debug, Clone)]
pub(crate) struct Tiles {
    pub(crate) bits: Bits,
    pub(crate) blocks: Blocks,
    /// Stored columns of a block with the zeros behind it: 32 or 64.
    pub(crate) stride: usize,
    pub(crate) codes: Pointer,
    pub(crate) scales: Pointer,
    pub(crate) zeros: Pointer,
    /// Input column of each stored one, if they are not in order.
    pub(crate) source: Option<Pointer>,
    /// Whether tiles are eight rows of gates and the eight that belong to them.
    pub(crate) paired: bool,
}

/// A quantized matrix for an embedding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    pub(crate) bits: Bits,
    pub(crate) group: usize,
    pub(crate) codes: Pointer,
    pub(crate) scales: Pointer,
    pub(crate) zeros: Pointer,
    /// Column of each stored one, if they are not in order.
    pub(crate) columns: Option<Pointer>,
}

/// What a program does with a weight.
#[derive(Debug, Clone, Copy, Default)]
struct Uses {
    embed: bool,
    linear: bool,
    /// Linears, and their outputs are activated at once.
    paired: bool,
    vector: bool,
}

/// Stores every weight of a validated program; returns them with the bytes they take. Traced programs
/// show what lies between steps, so that none are joined.
///
/// # Errors
/// Those of the source, a weight that is not as declared, and want of memory.
pub(crate) fn load(
    gpu: &mut dyn Gpu,
    program: &Program,
    source: &dyn WeightSource,
    trace: bool,
) -> Result<(Vec<Stored>, usize), Error> {
    let mut upload = Upload { gpu, bytes: 0 };
    let mut all = Vec::with_capacity(program.weights.len());
    for (decl, uses) in program.weights.iter().zip(uses(program)) {
        let (id, rows) = (WeightId(all.len() as u32), 0..decl.shape[0]);
        let weight = source.load(id, rows.clone())?;
        validate::weight(program, id, rows, &weight)?;
        let paired = !trace && uses.linear && joins::is_paired(program, id);
        all.push(upload.weight(&weight, Uses { paired, ..uses })?);
        drop(weight);
        source.release(id);
    }
    Ok((all, upload.bytes))
}

fn uses(program: &Program) -> Vec<Uses> {
    let mut all = vec![Uses::default(); program.weights.len()];
    for step in &program.steps {
        match step.op {
            Op::Embed { table, .. } => all[table.index()].embed = true,
            Op::Norm { weight, .. } | Op::HeadNorm { weight, .. } => {
                all[weight.index()].vector = true;
            }
            Op::Linear { weight, bias, .. } => {
                all[weight.index()].linear = true;
                bias.into_iter().for_each(|bias| all[bias.index()].vector = true);
            }
            Op::Rope { .. }
            | Op::KvWrite { .. }
            | Op::Attend { .. }
            | Op::Activate { .. }
            | Op::Gather { .. } => {}
        }
    }
    all
}

/// Copies weights to the device and counts their bytes.
struct Upload<'a> {
    gpu: &'a mut dyn Gpu,
    bytes: usize,
}

impl Upload<'_> {
    fn weight(&mut self, weight: &Weight<'_>, uses: Uses) -> Result<Stored, Error> {
        let mut stored = Stored::default();
        if uses.vector {
            let vector = quant::reference::row(weight, 0);
            stored.vector = Some(self.copy(&vector)?);
        }
        match weight {
            Weight::Dense(dense) if uses.embed || uses.linear => {
                stored.dense = Some(self.dense(dense)?);
            }
            Weight::Dense(_) => {}
            Weight::Grouped(grouped) => {
                stored.tiles = uses.linear.then(|| self.tiles(grouped, uses.paired)).transpose()?;
                stored.table = uses.embed.then(|| self.table(grouped)).transpose()?;
            }
        }
        Ok(stored)
    }

    fn dense(&mut self, dense: &Dense<'_>) -> Result<StoredDense, Error> {
        Ok(StoredDense { float: dense.float(), values: self.copy(dense.bytes())? })
    }

    fn table(&mut self, grouped: &Grouped) -> Result<Table, Error> {
        let shape = grouped.shape();
        Ok(Table {
            bits: shape.bits,
            group: shape.group,
            codes: self.copy(grouped.codes())?,
            scales: self.copy(grouped.scales())?,
            zeros: self.copy(grouped.zeros())?,
            columns: grouped.perm().map(|perm| self.copy(perm)).transpose()?,
        })
    }

    fn tiles(&mut self, grouped: &Grouped, paired: bool) -> Result<Tiles, Error> {
        let shape = grouped.shape();
        let blocks = Blocks::new(shape.k, shape.group, grouped.perm());
        let stride = stride(&blocks);
        let rows = Rows { n: shape.n, paired };
        let codes = pack(grouped, &blocks, stride, rows);
        let (scales, zeros) = (grouped.scales(), grouped.zeros());
        Ok(Tiles {
            bits: shape.bits,
            stride,
            codes: self.copy(&codes)?,
            scales: self.copy(&by_tile(scales, rows, shape.groups()))?,
            zeros: self.copy(&by_tile(zeros, rows, shape.groups()))?,
            source: blocks.source.as_deref().map(|source| self.copy(source)).transpose()?,
            blocks,
            paired,
        })
    }

    fn copy<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Result<Pointer, Error> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let to = self.gpu.alloc(bytes.len())?;
        self.gpu.write(to, bytes)?;
        self.bytes += bytes.len();
        Ok(to)
    }
}

/// Columns that a block takes in memory.
fn stride(blocks: &Blocks) -> usize {
    if blocks.block <= 32 { 32 } else { 64 }
}

/// The rows of a matrix as tiles have them.
#[derive(Debug, Clone, Copy)]
struct Rows {
    n: usize,
    /// The first half are gates of the second.
    paired: bool,
}

impl Rows {
    fn tiles(self) -> usize {
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
}

/// `[n, groups]` as `[tiles, groups, 16]`, zeros where there is no row.
fn by_tile<T: Copy + Default>(values: &[T], rows: Rows, groups: usize) -> Vec<T> {
    let place = |at: usize| (at / TILE / groups, at / TILE % groups, at % TILE);
    let value = |at: usize| {
        let (tile, group, row) = place(at);
        rows.at(tile, row).map_or(T::default(), |row| values[row * groups + group])
    };
    (0..rows.tiles() * groups * TILE).map(value).collect()
}

/// Codes `[tiles, blocks, lanes, words]`.
fn pack(grouped: &Grouped, blocks: &Blocks, stride: usize, rows: Rows) -> Vec<u32> {
    let shape = grouped.shape();
    let columns: Vec<Option<usize>> = blocks.stored_columns(shape.group).collect();
    let quads = stride / TILE;
    let words = quads * shape.bits.count() / 4;
    let mut out = vec![0u32; rows.tiles() * blocks.count * LANES * words];
    for (at, words) in out.chunks_exact_mut(words).enumerate() {
        let (lane, block, tile) =
            (at % LANES, at / LANES % blocks.count, at / LANES / blocks.count);
        for quad in 0..quads {
            let first = lane % 4 * (stride / 4) + 4 * quad;
            let code = |half: usize, i: usize| -> u32 {
                let column = (first + i < blocks.block)
                    .then(|| columns[block * blocks.block + first + i])
                    .flatten();
                let place = rows.at(tile, half * 8 + lane / 4).zip(column);
                place.map_or(0, |(row, column)| u32::from(grouped.code(row, column)))
            };
            for i in 0..4 {
                match shape.bits {
                    Bits::Four => words[quad] |= (code(0, i) | code(1, i) << 4) << (8 * i),
                    Bits::Eight => {
                        words[2 * quad] |= code(0, i) << (8 * i);
                        words[2 * quad + 1] |= code(1, i) << (8 * i);
                    }
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use quant::{GroupedParts, GroupedShape};

    /// Codes that tell row and column: `(row + column) % 16`.
    fn matrix(bits: Bits, n: usize, k: usize, group: usize) -> Grouped {
        let code = |row: usize, column: usize| ((row + column) % 16) as u8;
        let mut codes = vec![];
        for row in 0..n {
            match bits {
                Bits::Four => {
                    codes.extend((0..k / 2).map(|i| code(row, 2 * i) | code(row, 2 * i + 1) << 4))
                }
                Bits::Eight => codes.extend((0..k).map(|column| code(row, column))),
            }
        }
        let shape = GroupedShape { n, k, group, bits };
        let (scales, zeros) = (vec![1.0; n * k / group], vec![8; n * k / group]);
        Grouped::new("m", GroupedParts { shape, codes, scales, zeros, perm: None }).unwrap()
    }

    #[test]
    fn a_lane_holds_its_columns_of_two_rows() {
        let four = matrix(Bits::Four, 20, 128, 64);
        let blocks = Blocks::new(128, 64, None);
        let words = pack(&four, &blocks, stride(&blocks), Rows { n: 20, paired: false });
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
        let eight = matrix(Bits::Eight, 16, 32, 32);
        let blocks = Blocks::new(32, 32, None);
        let words = pack(&eight, &blocks, stride(&blocks), Rows { n: 16, paired: false });
        assert_eq!(words.len(), 32 * 4);
        // Lane 4 * 1 + 2: columns 16 .. 24 of rows 1 and 9.
        let lane = &words[6 * 4..][..4];
        let quad = |row: u32, column: u32| {
            (0..4).fold(0, |word, i| word | ((row + column + i) % 16) << (8 * i))
        };
        assert_eq!(lane, [quad(1, 16), quad(9, 16), quad(1, 20), quad(9, 20)]);
    }

    #[test]
    fn gates_meet_what_belongs_to_them() {
        let rows = Rows { n: 24, paired: true };
        assert_eq!(rows.tiles(), 2);
        assert_eq!([0, 7, 8, 15].map(|row| rows.at(0, row)), [0, 7, 12, 19].map(Some));
        // The second tile has four pairs.
        assert_eq!([3, 4, 11, 12].map(|row| rows.at(1, row)), [Some(11), None, Some(23), None]);
        let values: Vec<u8> = (1..=48).collect();
        let by_tile = by_tile(&values, rows, 2);
        assert_eq!(by_tile.len(), 2 * 2 * 16);
        // Tile 1, group 1: rows 8 .. 12, then 20 .. 24.
        let expected = [18, 20, 22, 24, 0, 0, 0, 0, 42, 44, 46, 48, 0, 0, 0, 0];
        assert_eq!(by_tile[48..], expected);
    }
}
