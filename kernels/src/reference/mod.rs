//! The specification in scalar code: what every op of a [`Program`] means, one function an op.
//!
//! Sums run in f64 and are rounded once into the f32 slots and the f32 KV cache, so results are
//! as close to the real numbers as f32 storage allows. Weights are dequantized once at build.
//! Nothing is shared, threaded or vectorised by hand: other backends are compared with this one,
//! and slots are not coloured, so that a wrong [`crate::memory`] plan shows as a difference.
//!
//! Start at [`ops`] for the arithmetic; [`rope`] says how angle speeds are found, [`cache`] how
//! blocks map to positions, [`runner`] which slots an op touches.

mod cache;
mod choice;
mod ops;
pub mod rope;
mod runner;

pub use choice::choose;

use crate::program::WeightId;
use crate::{Backend, Error, Program, Runner, StepLimits, WeightSource, validate};
use quant::{Format, Weight};
use runner::ReferenceRunner;

/// The backend that defines the others' results; slow, and right by inspection.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReferenceBackend;

impl Backend for ReferenceBackend {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn kernel_for(&self, format: Format) -> String {
        format!("scalar f64 sums over {format} dequantized to f32 at build")
    }

    fn build(
        &self,
        program: &Program,
        weights: &dyn WeightSource,
        limits: &StepLimits,
    ) -> Result<Box<dyn Runner>, Error> {
        validate::program(program)?;
        validate::limits(limits)?;
        let load = |i| {
            let (id, rows) = (WeightId(i), 0..program.weights[i as usize].shape[0]);
            let weight = weights.load(id, rows.clone())?;
            validate::weight(program, id, rows, &weight)?;
            let matrix = Matrix::dequantize(&weight);
            weights.release(id);
            Ok(matrix)
        };
        let matrices = (0..program.weights.len() as u32).map(load).collect::<Result<_, Error>>()?;
        Ok(Box::new(ReferenceRunner::new(program, matrices, limits)))
    }
}

/// A weight as f32, row-major `[n, k]`, checkpoint column order.
#[derive(Debug)]
struct Matrix {
    k: usize,
    values_nk: Vec<f32>,
}

impl Matrix {
    fn dequantize(weight: &Weight<'_>) -> Self {
        let [n, k] = weight.shape();
        let values_nk = (0..n).flat_map(|row| quant::reference::row(weight, row)).collect();
        Self { k, values_nk }
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values_nk.chunks_exact(self.k)
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values_nk[row * self.k..][..self.k]
    }
}
