//! Weights as the runner keeps them: each in the one layout that its uses read.
//!
//! ```text
//! used by a linear (and perhaps an embedding)   tiles of sixteen rows
//! used by embeddings only                       rows as delivered
//! norm weights and biases                       f32 vector
//! ```
//! A head tied to the embedding is stored once: the embedding reads its rows out of the tiles.
//! Not here: the layouts ([`super::packed`], [`super::dense`]).

use super::dense::DenseTiles;
use super::packed::Packed;
use crate::program::{Op, Program, WeightId};
use crate::{Error, WeightSource, validate};
use quant::{Dense, Weight};

/// One weight.
#[derive(Debug)]
pub(crate) enum Stored {
    Packed(Packed),
    Tiles(DenseTiles),
    Rows(Dense<'static>),
    Vector(Vec<f32>),
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
            Self::Rows(dense) => dense.row(row, out_k),
            Self::Vector(vector) => out_k.copy_from_slice(vector),
        }
    }

    /// Bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Packed(packed) => packed.bytes(),
            Self::Tiles(tiles) => tiles.bytes(),
            Self::Rows(dense) => dense.bytes().len(),
            Self::Vector(vector) => size_of_val(&vector[..]),
        }
    }
}

/// What the program does with a weight.
#[derive(Debug, Clone, Copy, Default)]
struct Uses {
    linear: bool,
    vector: bool,
}

/// Pulls and repacks every weight, one at a time, with `threads` threads.
pub(crate) fn load(
    program: &Program,
    source: &mut dyn WeightSource,
    threads: usize,
) -> Result<Vec<Stored>, Error> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| Error::Device {
        device: "cpu".to_owned(),
        reason: format!("no {threads} threads to load with: {e}"),
    })?;
    let uses = uses(program);
    let one = |(i, uses): (usize, &Uses)| {
        let id = WeightId(i as u32);
        let weight = source.load(id)?;
        validate::weight(program, id, &weight)?;
        Ok(pool.install(|| store(weight, *uses)))
    };
    uses.iter().enumerate().map(one).collect()
}

fn uses(program: &Program) -> Vec<Uses> {
    let mut uses = vec![Uses::default(); program.weights.len()];
    for step in &program.steps {
        match step.op {
            Op::Linear { weight, bias, .. } => {
                uses[weight.index()].linear = true;
                if let Some(bias) = bias {
                    uses[bias.index()].vector = true;
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

fn store(weight: Weight<'_>, uses: Uses) -> Stored {
    match weight {
        Weight::Grouped(grouped) => Stored::Packed(Packed::new(&grouped)),
        Weight::Dense(dense) if uses.vector => Stored::Vector(dense.to_f32()),
        Weight::Dense(dense) if uses.linear => Stored::Tiles(DenseTiles::new(&dense)),
        Weight::Dense(dense) => Stored::Rows(dense.into_owned()),
    }
}
