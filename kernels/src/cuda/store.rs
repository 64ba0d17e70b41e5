//! Weights on the device: each in the layouts that its uses read.
//!
//! ```text
//! linear, quantized    tiles of sixteen rows ([`super::tiles`])
//! embedding, quantized rows of codes as delivered, with scales, zero points and column order
//! float matrix         as delivered, for both
//! norm weights, biases f32 vector
//! ```
//! Scales are f16 where that changes none of a matrix, and zero points one number where they all are the
//! same: half as many bytes beside the codes, or two fifths. What is reserved without weights is the most.
//! One weight after another is delivered, and repacked in parts, on all threads. Not here: what is done
//! with them ([`super::plan`]). Input: canonical weights, or their declarations alone, of which follows
//! how much memory they will take.

use super::gpu::{Gpu, Pointer};
use super::tiles::{self, Layout, Packed, TileRows, stride};
use crate::cpu::Blocks;
use crate::joins;
use crate::program::{Op, Program, Rounding, WeightId};
use crate::{Error, WeightSource, validate};
use quant::{Bits, FloatType, Format, Grouped, Weight};
use rayon::prelude::*;
use std::ops::Range;

/// Codes of a part: few enough that all threads' parts are little memory, enough that a source whose
/// rows lie side by side is read in long pieces.
const PART: usize = 1 << 20;
/// Parts that are repacked before the first of them is copied.
const PARTS: usize = 64;

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
    /// Stored columns of a block with the zeros behind it: 32, 64 or 128.
    pub(crate) stride: usize,
    pub(crate) codes: Pointer,
    pub(crate) scales: Pointer,
    /// Whether scales are f16, else f32.
    pub(crate) narrow: bool,
    /// None where all are `zero`.
    pub(crate) zeros: Option<Pointer>,
    pub(crate) zero: u8,
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
    store(Upload { gpu, program, source: Some(source), bytes: 0 }, trace)
}

/// Takes the memory of every weight and loads none.
///
/// # Errors
/// Want of memory.
pub(crate) fn reserve(
    gpu: &mut dyn Gpu,
    program: &Program,
    trace: bool,
) -> Result<(Vec<Stored>, usize), Error> {
    store(Upload { gpu, program, source: None, bytes: 0 }, trace)
}

fn store(mut upload: Upload<'_>, trace: bool) -> Result<(Vec<Stored>, usize), Error> {
    let mut all = vec![];
    for (i, uses) in uses(upload.program).into_iter().enumerate() {
        let id = WeightId(i as u32);
        let paired = !trace && uses.linear && joins::is_paired(upload.program, id);
        all.push(upload.weight(id, Uses { paired, ..uses })?);
        upload.source.inspect(|source| source.release(id));
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
    program: &'a Program,
    /// None where memory alone is taken.
    source: Option<&'a dyn WeightSource>,
    bytes: usize,
}

/// Rows of a weight, as declared.
fn rows<'a>(
    program: &Program,
    source: &'a dyn WeightSource,
    id: WeightId,
    rows: Range<usize>,
) -> Result<Weight<'a>, Error> {
    let weight = source.load(id, rows.clone())?;
    validate::weight(program, id, rows, &weight)?;
    Ok(weight)
}

/// The same of a matrix that is declared as quantized.
fn grouped(
    program: &Program,
    source: &dyn WeightSource,
    id: WeightId,
    range: Range<usize>,
) -> Result<Grouped, Error> {
    match rows(program, source, id, range)? {
        Weight::Grouped(grouped) => Ok(grouped),
        // Validation lets no weight of another kind than declared pass.
        Weight::Dense(_) => {
            let decl = &program.weights[id.index()];
            let (label, expected) = (decl.label.clone(), decl.format.to_string());
            Err(Error::Weight { label, expected, found: "floats".to_owned() })
        }
    }
}

impl Upload<'_> {
    fn weight(&mut self, id: WeightId, uses: Uses) -> Result<Stored, Error> {
        let decl = &self.program.weights[id.index()];
        let mut stored = Stored::default();
        if uses.vector {
            stored.vector = Some(self.vector(id, decl.shape[1])?);
        }
        match decl.format {
            Format::Dense(float) if uses.embed || uses.linear => {
                stored.dense = Some(self.dense(id, decl.shape, float)?);
            }
            Format::Dense(_) => {}
            Format::Grouped { bits, group, act_order } => {
                let (shape, rounding) = (decl.shape, decl.rounding);
                let matrix = Matrix { id, shape, bits, group, act_order, rounding };
                let tiles = uses.linear.then(|| self.tiles(&matrix, uses.paired));
                stored.tiles = tiles.transpose()?;
                stored.table = uses.embed.then(|| self.table(&matrix)).transpose()?;
            }
        }
        Ok(stored)
    }

    fn vector(&mut self, id: WeightId, len: usize) -> Result<Pointer, Error> {
        let to = self.take(4 * len)?;
        if let Some(source) = self.source {
            let weight = rows(self.program, source, id, 0..1)?;
            let values = quant::reference::row(&weight, 0);
            self.gpu.write(to, cast(&values))?;
        }
        Ok(to)
    }

    fn dense(
        &mut self,
        id: WeightId,
        [n, k]: [usize; 2],
        float: FloatType,
    ) -> Result<StoredDense, Error> {
        let row = k * float.bytes();
        let values = self.take(n * row)?;
        let (program, Some(source)) = (self.program, self.source) else {
            return Ok(StoredDense { float, values });
        };
        let part = |range: Range<usize>| Ok((range.start, rows(program, source, id, range)?));
        self.in_parts(n, (PART / row).max(1), part, |gpu, (first, part)| match part {
            Weight::Dense(part) => gpu.write(values.offset(first * row), part.bytes()),
            // Validation lets no weight of another kind than declared pass.
            Weight::Grouped(_) => Ok(()),
        })?;
        Ok(StoredDense { float, values })
    }

    /// Makes parts of `step` of `count` things on all threads, and copies them by `copy` in order.
    fn in_parts<T: Send>(
        &mut self,
        count: usize,
        step: usize,
        make: impl Fn(Range<usize>) -> Result<T, Error> + Sync,
        mut copy: impl FnMut(&mut dyn Gpu, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let parts: Vec<Range<usize>> =
            (0..count).step_by(step).map(|first| first..count.min(first + step)).collect();
        for parts in parts.chunks(PARTS) {
            let made: Vec<T> = parts.par_iter().cloned().map(&make).collect::<Result<_, _>>()?;
            made.into_iter().try_for_each(|part| copy(self.gpu, part))?;
        }
        Ok(())
    }

    fn table(&mut self, matrix: &Matrix) -> Result<Table, Error> {
        let Matrix { id, shape: [n, k], bits, group, .. } = *matrix;
        let groups = k / group;
        let codes = self.take(n * bits.row_bytes(k))?;
        let (scales, zeros) = (self.take(4 * n * groups)?, self.take(n * groups)?);
        let columns = self.perm(matrix)?.map(|perm| self.copy(&perm)).transpose()?;
        if let Some(source) = self.source {
            let table = grouped(self.program, source, id, 0..n)?;
            self.gpu.write(codes, table.codes())?;
            self.gpu.write(scales, cast(table.scales()))?;
            self.gpu.write(zeros, table.zeros())?;
        }
        Ok(Table { bits, group, codes, scales, zeros, columns })
    }

    fn tiles(&mut self, matrix: &Matrix, paired: bool) -> Result<Tiles, Error> {
        let Matrix { id, shape: [n, k], bits, group, .. } = *matrix;
        let blocks = Blocks::new(k, group, self.perm(matrix)?.as_deref(), matrix.rounding);
        let columns: Vec<Option<usize>> = blocks.stored_columns(group).collect();
        let rows = TileRows { n, paired };
        let layout = Layout { bits, blocks: &blocks, columns: &columns, rows, groups: k / group };
        let (count, mut all) = (rows.tiles(), Packed::default());
        let codes = self.take(count * layout.code_bytes())?;
        let source = blocks.source.as_deref().map(|source| self.copy(source)).transpose()?;
        if let Some(from) = self.source {
            let program = self.program;
            let part = |tiles: Range<usize>| {
                let one = |r: Range<usize>| Ok((r.start, grouped(program, from, id, r)?));
                let ranges = rows.ranges(&tiles).into_iter();
                let parts = ranges.map(one).collect::<Result<Vec<_>, Error>>()?;
                Ok((tiles.start, tiles::pack(&layout, tiles, &parts)))
            };
            let step = (PART / (tiles::TILE * k)).max(1);
            self.in_parts(count, step, part, |gpu, (first, part): (usize, Packed)| {
                all.scales.extend(part.scales);
                all.zeros.extend(part.zeros);
                gpu.write(codes.offset(first * layout.code_bytes()), cast(&part.codes))
            })?;
        }
        let (scales, narrow) = self.scales(&all, count * layout.scales())?;
        let (zeros, zero) = self.zeros(&all, count * layout.scales())?;
        let stride = stride(&blocks);
        Ok(Tiles { bits, blocks, stride, codes, scales, narrow, zeros, zero, source, paired })
    }

    /// A matrix's scales and whether they are f16; room for `count` f32 where none are loaded.
    fn scales(&mut self, all: &Packed, count: usize) -> Result<(Pointer, bool), Error> {
        if self.source.is_none() {
            return Ok((self.take(4 * count)?, false));
        }
        let narrow = all.narrow_scales();
        let bytes = narrow.as_deref().map_or(cast(&all.scales), cast);
        Ok((self.copy(bytes)?, narrow.is_some()))
    }

    /// A matrix's zero points, or the one that they all are; room for `count` where none are loaded.
    fn zeros(&mut self, all: &Packed, count: usize) -> Result<(Option<Pointer>, u8), Error> {
        if self.source.is_none() {
            return Ok((Some(self.take(count)?), 0));
        }
        match all.one_zero() {
            Some(zero) => Ok((None, zero)),
            None => Ok((Some(self.copy(&all.zeros)?), 0)),
        }
    }

    /// The order of a matrix's columns, if they have one; any where nothing is loaded.
    fn perm(&self, matrix: &Matrix) -> Result<Option<Vec<u32>>, Error> {
        let Matrix { id, shape: [_, k], act_order, .. } = *matrix;
        match self.source {
            _ if !act_order => Ok(None),
            None => Ok(Some((0..k as u32).collect())),
            Some(source) => {
                let row = grouped(self.program, source, id, 0..1)?;
                Ok(row.perm().map(<[u32]>::to_vec))
            }
        }
    }

    fn take(&mut self, bytes: usize) -> Result<Pointer, Error> {
        self.bytes += bytes;
        self.gpu.alloc(bytes)
    }

    fn copy<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Result<Pointer, Error> {
        let to = self.take(size_of_val(values))?;
        self.gpu.write(to, cast(values))?;
        Ok(to)
    }
}

fn cast<T: bytemuck::NoUninit>(values: &[T]) -> &[u8] {
    bytemuck::cast_slice(values)
}

/// A quantized matrix as it is declared.
#[derive(Debug, Clone, Copy)]
struct Matrix {
    id: WeightId,
    shape: [usize; 2],
    bits: Bits,
    group: usize,
    act_order: bool,
    rounding: Rounding,
}
