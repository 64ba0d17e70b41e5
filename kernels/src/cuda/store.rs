//! Weights on the device: each in the layouts that its uses read.
//!
//! ```text
//! linear, quantized    tiles of sixteen rows, in the order of a tensor instruction's lanes
//!                      (`shaders/cuda/linear_grouped.cu` has the picture)
//! embedding, quantized rows of codes as delivered, with scales, zero points and column order
//! float matrix         as delivered, for both
//! norm weights, biases f32 vector
//! ```
//! Not here: what is done with them ([`super::plan`]). Input: canonical weights, one at a time.

use super::gpu::{Gpu, Pointer};
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
    vector: bool,
}

/// Stores every weight of a validated program; returns them with the bytes they take.
///
/// # Errors
/// Those of the source, a weight that is not as declared, and want of memory.
pub(crate) fn load(
    gpu: &mut dyn Gpu,
    program: &Program,
    source: &dyn WeightSource,
) -> Result<(Vec<Stored>, usize), Error> {
    let mut upload = Upload { gpu, bytes: 0 };
    let mut all = Vec::with_capacity(program.weights.len());
    for (decl, uses) in program.weights.iter().zip(uses(program)) {
        let (id, rows) = (WeightId(all.len() as u32), 0..decl.shape[0]);
        let weight = source.load(id, rows.clone())?;
        validate::weight(program, id, rows, &weight)?;
        all.push(upload.weight(&weight, uses)?);
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
                stored.tiles = uses.linear.then(|| self.tiles(grouped)).transpose()?;
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

    fn tiles(&mut self, grouped: &Grouped) -> Result<Tiles, Error> {
        let shape = grouped.shape();
        let blocks = Blocks::new(shape.k, shape.group, grouped.perm());
        let stride = stride(&blocks);
        let codes = pack(grouped, &blocks, stride);
        let (scales, zeros) = (grouped.scales(), grouped.zeros());
        Ok(Tiles {
            bits: shape.bits,
            stride,
            codes: self.copy(&codes)?,
            scales: self.copy(&by_tile(scales, shape.n, shape.groups()))?,
            zeros: self.copy(&by_tile(zeros, shape.n, shape.groups()))?,
            source: blocks.source.as_deref().map(|source| self.copy(source)).transpose()?,
            blocks,
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

/// `[n, groups]` as `[tiles, groups, 16]`, zeros beyond n.
fn by_tile<T: Copy + Default>(values: &[T], n: usize, groups: usize) -> Vec<T> {
    let mut out = vec![T::default(); n.div_ceil(TILE) * groups * TILE];
    for (row, values) in values.chunks_exact(groups).enumerate() {
        for (group, value) in values.iter().enumerate() {
            out[(row / TILE * groups + group) * TILE + row % TILE] = *value;
        }
    }
    out
}

/// Codes `[tiles, blocks, lanes, words]`.
fn pack(grouped: &Grouped, blocks: &Blocks, stride: usize) -> Vec<u32> {
    let shape = grouped.shape();
    let columns: Vec<Option<usize>> = blocks.stored_columns(shape.group).collect();
    let quads = stride / TILE;
    let words = quads * shape.bits.count() / 4;
    let mut out = vec![0u32; shape.n.div_ceil(TILE) * blocks.count * LANES * words];
    for (at, words) in out.chunks_exact_mut(words).enumerate() {
        let (lane, block, tile) =
            (at % LANES, at / LANES % blocks.count, at / LANES / blocks.count);
        for quad in 0..quads {
            let first = lane % 4 * (stride / 4) + 4 * quad;
            let code = |half: usize, i: usize| -> u32 {
                let row = tile * TILE + half * 8 + lane / 4;
                let column = (first + i < blocks.block)
                    .then(|| columns[block * blocks.block + first + i])
                    .flatten()
                    .filter(|_| row < shape.n);
                column.map_or(0, |column| u32::from(grouped.code(row, column)))
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
        let words = pack(&four, &blocks, stride(&blocks));
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
        let words = pack(&eight, &blocks, stride(&blocks));
        assert_eq!(words.len(), 32 * 4);
        // Lane 4 * 1 + 2: columns 16 .. 24 of rows 1 and 9.
        let lane = &words[6 * 4..][..4];
        let quad = |row: u32, column: u32| {
            (0..4).fold(0, |word, i| word | ((row + column + i) % 16) << (8 * i))
        };
        assert_eq!(lane, [quad(1, 16), quad(9, 16), quad(1, 20), quad(9, 20)]);
    }
}
