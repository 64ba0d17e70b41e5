//! Weights as the runner keeps them: each in the one layout that its uses read.
//!
//! ```text
//! used by a linear (and perhaps an embedding)   tiles of sixteen rows
//! used by embeddings only                       rows as delivered
//! norm weights and biases                       f32 vector
//! ```
//! A matrix whose outputs are always gates and what belongs to them has these side by side.
//! A head tied to the embedding is stored once: the embedding reads its rows out of the tiles.
//! Not here: the layouts ([`super::packed`], [`super::dense`]).

use super::dense::DenseTiles;
use super::packed::{PAIRED, Packed};
use super::pages::{Arena, Pages};
use super::repack::Parts;
use super::simd::LANES;
use crate::program::{Op, Program, WeightId};
use crate::{Error, WeightSource, joins, validate};
use quant::{Dense, FloatType, Format, Grouped, Weight};
use rayon::prelude::*;
use std::ops::Range;

/// One weight.
#[derive(Debug)]
pub(crate) enum Stored {
    Packed(Packed),
    Tiles(DenseTiles),
    Rows(Rows),
    Vector(Vec<f32>),
}

/// A table that is read row by row, as delivered.
#[derive(Debug)]
pub(crate) struct Rows {
    float: FloatType,
    /// `[n, k]` little-endian elements.
    bytes: Pages<u8>,
}

impl Stored {
    /// The quantized matrix, if it is one.
    pub(crate) fn packed(&self) -> Option<&Packed> {
        match self {
            Self::Packed(packed) => Some(packed),
            Self::Tiles(_) | Self::Rows(_) | Self::Vector(_) => None,
        }
    }

    /// The vector; a program that passed validation asks for one only where it is one.
    pub(crate) fn vector(&self) -> &[f32] {
        match self {
            Self::Vector(vector) => vector,
            Self::Packed(_) | Self::Tiles(_) | Self::Rows(_) => &[],
        }
    }

    /// Copies row `row` as f32 into `out_k`.
    pub(crate) fn row(&self, row: usize, out_k: &mut [f32]) {
        match self {
            Self::Packed(packed) => packed.row(row, out_k),
            Self::Tiles(tiles) => tiles.row(row, out_k),
            Self::Rows(Rows { float, bytes }) => {
                let stride = out_k.len() * float.bytes();
                float.widen(&bytes[row * stride..][..stride], out_k);
            }
            Self::Vector(vector) => out_k.copy_from_slice(vector),
        }
    }

    /// Bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Packed(packed) => packed.bytes(),
            Self::Tiles(tiles) => tiles.bytes(),
            Self::Rows(rows) => rows.bytes.len(),
            Self::Vector(vector) => size_of_val(&vector[..]),
        }
    }
}

/// What the program does with a weight.
#[derive(Debug, Clone, Copy, Default)]
struct Uses {
    linear: bool,
    /// All linears have outputs that are activated at once.
    gates: bool,
    vector: bool,
}

/// Pulls and repacks every weight, one after another, parts of it on `threads` threads. Traced programs
/// show what lies between steps, so that no gates are stored in pairs.
pub(crate) fn load(
    program: &Program,
    source: &dyn WeightSource,
    threads: usize,
    trace: bool,
) -> Result<Vec<Stored>, Error> {
    let mut handles = vec![];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).spawn_handler(|thread| {
        handles.push(std::thread::Builder::new().spawn(|| thread.run())?);
        Ok(())
    });
    let stored = pool.build().map(|pool| load_on(&pool, program, source, trace));
    // A pool alone does not wait for its threads, and steps should have the machine to themselves.
    for handle in handles {
        // What a thread runs reports through the pool.
        drop(handle.join());
    }
    stored.map_err(|e| Error::Device {
        device: "cpu".to_owned(),
        reason: format!("no {threads} threads to load with: {e}"),
    })?
}

fn load_on(
    pool: &rayon::ThreadPool,
    program: &Program,
    source: &dyn WeightSource,
    trace: bool,
) -> Result<Vec<Stored>, Error> {
    let (uses, arena) = (uses(program, trace), Arena::default());
    let one = |(i, uses): (usize, &Uses)| {
        let loader = Loader { program, source, arena: &arena, id: WeightId(i as u32) };
        let stored = pool.install(|| loader.store(*uses));
        source.release(loader.id);
        stored
    };
    uses.iter().enumerate().map(one).collect()
}

fn uses(program: &Program, trace: bool) -> Vec<Uses> {
    let gates = |i| !trace && joins::is_paired(program, WeightId(i as u32));
    let new = |i| Uses { gates: gates(i), ..Uses::default() };
    let mut uses: Vec<Uses> = (0..program.weights.len()).map(new).collect();
    for step in &program.steps {
        match step.op {
            Op::Linear { weight, bias, .. } => {
                uses[weight.index()].linear = true;
                if let Some(bias) = bias {
                    uses[bias.index()].vector = true;
                    // It would have to be paired too.
                    uses[weight.index()].gates = false;
                }
            }
            Op::Norm { weight, .. } | Op::HeadNorm { weight, .. } => {
                uses[weight.index()].vector = true;
            }
            Op::Embed { .. }
            | Op::Rope { .. }
            | Op::KvWrite { .. }
            | Op::Attend { .. }
            | Op::Activate { .. }
            | Op::Gather { .. } => {}
        }
    }
    uses
}

/// One weight of a source.
struct Loader<'a> {
    program: &'a Program,
    source: &'a dyn WeightSource,
    arena: &'a Arena,
    id: WeightId,
}

impl<'a> Loader<'a> {
    fn store(&self, uses: Uses) -> Result<Stored, Error> {
        let (decl, arena) = (&self.program.weights[self.id.index()], self.arena);
        Ok(match decl.format {
            Format::Grouped { .. } => {
                let gates = uses.linear && uses.gates;
                let paired = gates && decl.shape[0].is_multiple_of(2 * PAIRED);
                Stored::Packed(Packed::load(decl, arena, paired, |rows| self.grouped(rows))?)
            }
            Format::Dense(_) if uses.vector => {
                Stored::Vector(self.dense(0..decl.shape[0])?.to_f32())
            }
            Format::Dense(float) if uses.linear => {
                let format = (decl.shape, float);
                Stored::Tiles(DenseTiles::load(format, arena, |rows| self.dense(rows))?)
            }
            Format::Dense(float) => Stored::Rows(self.rows(decl.shape, float)?),
        })
    }

    /// The rows of a table.
    fn rows(&self, [n, k]: [usize; 2], float: FloatType) -> Result<Rows, Error> {
        let stride = k * float.bytes();
        let mut bytes = self.arena.zeroed(n * stride)?;
        let parts = Parts::new(n, stride);
        let all = bytes.par_chunks_mut(parts.tiles * LANES * stride).enumerate();
        all.try_for_each(|(part, bytes)| {
            bytes.copy_from_slice(self.dense(parts.rows(part))?.bytes());
            Ok(())
        })?;
        Ok(Rows { float, bytes })
    }

    /// Rows of a weight, as declared.
    fn weight(&self, rows: Range<usize>) -> Result<Weight<'a>, Error> {
        let weight = self.source.load(self.id, rows.clone())?;
        validate::weight(self.program, self.id, rows, &weight)?;
        Ok(weight)
    }

    fn dense(&self, rows: Range<usize>) -> Result<Dense<'a>, Error> {
        match self.weight(rows)? {
            Weight::Dense(dense) => Ok(dense),
            Weight::Grouped(_) => Err(self.other_kind()),
        }
    }

    fn grouped(&self, rows: Range<usize>) -> Result<Grouped, Error> {
        match self.weight(rows)? {
            Weight::Grouped(grouped) => Ok(grouped),
            Weight::Dense(_) => Err(self.other_kind()),
        }
    }

    /// Validation lets no weight of another kind than declared pass.
    fn other_kind(&self) -> Error {
        let decl = &self.program.weights[self.id.index()];
        let (label, expected) = (decl.label.clone(), decl.format.to_string());
        Error::Weight { label, expected, found: "a weight of another kind".to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{GroupedSpec, random_grouped};
    use super::*;
    use crate::program::{SlotId, WeightDecl};
    use std::sync::Mutex;

    /// Delivers weights from memory and writes down which were released.
    struct Source(Vec<Weight<'static>>, Mutex<Vec<WeightId>>);

    impl WeightSource for Source {
        fn load(&self, id: WeightId, rows: Range<usize>) -> Result<Weight<'_>, Error> {
            Ok(self.0[id.index()].rows(rows))
        }

        fn release(&self, id: WeightId) {
            self.1.lock().unwrap().push(id);
        }
    }

    #[test]
    fn rows_of_many_parts_come_back_and_each_weight_is_released() {
        let [n, k] = [200, 4096];
        let values: Vec<f32> = (0..n * k).map(|i| i as f32).collect();
        let spec = GroupedSpec { n, k, ..GroupedSpec::default() };
        let weights = vec![
            Weight::Dense(Dense::from_f32([n, k], &values)),
            Weight::Grouped(random_grouped(&spec)),
        ];
        let decl =
            |(i, w): (usize, &Weight<'_>)| WeightDecl::new(format!("w{i}"), w.shape(), w.format());
        let program = Program {
            weights: weights.iter().enumerate().map(decl).collect(),
            slots: vec![],
            ropes: vec![],
            kv: vec![],
            steps: vec![],
            logits: SlotId(0),
        };
        let source = Source(weights, Mutex::default());
        let stored = load(&program, &source, 3, false).unwrap();
        assert_eq!(*source.1.lock().unwrap(), [WeightId(0), WeightId(1)]);
        assert!(matches!(stored[0], Stored::Rows(_)));
        let mut row = vec![0.0; k];
        for i in 0..n {
            for (stored, weight) in stored.iter().zip(&source.0) {
                stored.row(i, &mut row);
                assert_eq!(row, quant::reference::row(weight, i), "row {i}");
            }
        }
    }
}
