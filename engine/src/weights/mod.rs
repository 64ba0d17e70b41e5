//! The weights of a model: found by name and checked at open ([`plan`]), delivered one at a time
//! to a backend ([`ModelWeights`]).
//!
//! q, k, v and gate, up become one matrix each where their formats and column orders agree.
//! Not here: bit layouts (crate `quant`), which modules are quantized ([`crate::quantization`]).

mod modules;
mod plan;

pub use plan::{Plan, plan};

use crate::Error;
use crate::checkpoint::{Checkpoint, TensorId};
use kernels::WeightSource;
use kernels::program::{WeightDecl, WeightId};
use quant::import::{RawTensor, RawType, awq, compressed, gptq};
use quant::{Dense, FloatType, Format, Grouped, Weight, quantize};

/// How to make one weight from tensors of the checkpoint: its parts are stacked by rows.
#[derive(Debug, Clone)]
pub struct Recipe(Vec<Part>);

/// A matrix (or vector) as the checkpoint stores it.
#[derive(Debug, Clone)]
struct Part {
    /// `[n, k]`.
    shape: [usize; 2],
    storage: Storage,
}

/// The tensors of a part.
#[derive(Debug, Clone)]
enum Storage {
    Dense(TensorId),
    Gptq {
        settings: gptq::Settings,
        qweight: TensorId,
        qzeros: TensorId,
        scales: TensorId,
        g_idx: Option<TensorId>,
    },
    Awq {
        settings: awq::Settings,
        qweight: TensorId,
        qzeros: Option<TensorId>,
        scales: TensorId,
    },
    Compressed {
        settings: compressed::Settings,
        packed: TensorId,
        scale: TensorId,
        zero_point: Option<TensorId>,
        g_idx: Option<TensorId>,
        shape: Option<TensorId>,
    },
}

impl Storage {
    fn tensors(&self) -> Vec<TensorId> {
        match *self {
            Self::Dense(tensor) => vec![tensor],
            Self::Gptq { qweight, qzeros, scales, g_idx, .. } => {
                [qweight, qzeros, scales].into_iter().chain(g_idx).collect()
            }
            Self::Awq { qweight, qzeros, scales, .. } => {
                [qweight, scales].into_iter().chain(qzeros).collect()
            }
            Self::Compressed { packed, scale, zero_point, g_idx, shape, .. } => {
                let rest = [zero_point, g_idx, shape].into_iter().flatten();
                [packed, scale].into_iter().chain(rest).collect()
            }
        }
    }
}

/// Delivers the weights of a model; memory of a delivered one is given back at the next call.
#[derive(Debug)]
pub struct ModelWeights<'m> {
    checkpoint: &'m Checkpoint,
    decls: &'m [WeightDecl],
    recipes: &'m [Recipe],
    delivered: Vec<TensorId>,
}

impl<'m> ModelWeights<'m> {
    /// The weights of `decls`, made by `recipes` from `checkpoint`.
    pub(crate) fn new(
        checkpoint: &'m Checkpoint,
        decls: &'m [WeightDecl],
        recipes: &'m [Recipe],
    ) -> Self {
        Self { checkpoint, decls, recipes, delivered: Vec::new() }
    }

    fn release(&mut self) {
        for tensor in self.delivered.drain(..) {
            self.checkpoint.release(tensor);
        }
    }

    fn make(&mut self, id: WeightId) -> Result<Weight<'m>, Error> {
        self.release();
        let (decl, Recipe(parts)) = (&self.decls[id.index()], &self.recipes[id.index()]);
        self.delivered = parts.iter().flat_map(|p| p.storage.tensors()).collect();
        match decl.format {
            Format::Dense(float) => self.dense(decl, float, parts).map(Weight::Dense),
            Format::Grouped { .. } => {
                let made = self.grouped(decl, parts);
                // Nothing borrows from the files, so their pages can go before it is repacked.
                self.release();
                made.map(Weight::Grouped)
            }
        }
    }

    /// One tensor as it is, or the rows of several; a part of another type is widened.
    fn dense(
        &self,
        decl: &WeightDecl,
        float: FloatType,
        parts: &[Part],
    ) -> Result<Dense<'m>, Error> {
        let mut bytes = Vec::new();
        for part in parts {
            let Storage::Dense(tensor) = part.storage else { return Err(self.broken(decl)) };
            let part = self.floats(decl, tensor, part.shape)?;
            match part.float() == float {
                true if parts.len() == 1 => return Ok(part),
                true => bytes.extend_from_slice(part.bytes()),
                false => bytes.extend(part.to_f32().iter().flat_map(|v| v.to_le_bytes())),
            }
        }
        let root = self.checkpoint.root().to_owned();
        Dense::new(&decl.label, float, decl.shape, bytes)
            .map_err(|source| Error::Weight { path: root, source })
    }

    /// Tensor `tensor` as it is stored.
    fn floats(
        &self,
        decl: &WeightDecl,
        tensor: TensorId,
        shape: [usize; 2],
    ) -> Result<Dense<'m>, Error> {
        let own = float_type(self.checkpoint, tensor).ok_or_else(|| self.broken(decl))?;
        let name = &self.checkpoint.info(tensor).name;
        Dense::new(name, own, shape, self.checkpoint.bytes(tensor)).map_err(|e| self.at(tensor, e))
    }

    /// Imported codes, or floats rounded to codes where the plan asks for them.
    fn grouped(&self, decl: &WeightDecl, parts: &[Part]) -> Result<Grouped, Error> {
        let mut all = Vec::with_capacity(parts.len());
        for part in parts {
            all.push(self.import(decl, part)?);
        }
        if let [_] = all[..] {
            return all.pop().ok_or_else(|| self.broken(decl));
        }
        Grouped::stack(&all).ok_or_else(|| self.broken(decl))
    }

    fn import(&self, decl: &WeightDecl, part: &Part) -> Result<Grouped, Error> {
        let raw = |id| self.raw(id);
        let made = match &part.storage {
            Storage::Dense(tensor) => {
                let Format::Grouped { bits, group, .. } = decl.format else {
                    return Err(self.broken(decl));
                };
                let floats = self.floats(decl, *tensor, part.shape)?;
                quantize::round_to_nearest(
                    &self.checkpoint.info(*tensor).name,
                    &floats,
                    bits,
                    group,
                )
            }
            Storage::Gptq { settings, qweight, qzeros, scales, g_idx } => {
                let (qweight, qzeros) = (raw(*qweight), raw(*qzeros));
                let (scales, g_idx) = (raw(*scales), g_idx.map(raw));
                let tensors = gptq::Tensors { qweight, qzeros, scales, g_idx };
                gptq::import(settings, part.shape, &tensors)
            }
            Storage::Awq { settings, qweight, qzeros, scales } => {
                let (qweight, qzeros, scales) = (raw(*qweight), qzeros.map(raw), raw(*scales));
                awq::import(settings, part.shape, &awq::Tensors { qweight, qzeros, scales })
            }
            Storage::Compressed { settings, packed, scale, zero_point, g_idx, shape } => {
                let tensors = compressed::Tensors {
                    packed: raw(*packed),
                    scale: raw(*scale),
                    zero_point: zero_point.map(raw),
                    g_idx: g_idx.map(raw),
                    shape: shape.map(raw),
                };
                compressed::import(settings, part.shape, &tensors)
            }
        };
        made.map_err(|e| self.at(part.storage.tensors()[0], e))
    }

    fn raw(&self, id: TensorId) -> RawTensor<'m> {
        let info = self.checkpoint.info(id);
        let dtype = match info.dtype {
            "F32" => RawType::F32,
            "F16" => RawType::F16,
            "BF16" => RawType::Bf16,
            "I32" => RawType::I32,
            "I64" => RawType::I64,
            _ => RawType::Other,
        };
        let bytes = self.checkpoint.bytes(id);
        RawTensor { name: &info.name, dtype, shape: &info.shape, bytes }
    }

    fn at(&self, tensor: TensorId, source: quant::Error) -> Error {
        Error::Weight { path: self.checkpoint.path_of(tensor).to_owned(), source }
    }

    /// The parts are not what the plan saw: the file changed since.
    fn broken(&self, decl: &WeightDecl) -> Error {
        Error::Tensor {
            tensor: decl.label.clone(),
            path: self.checkpoint.root().to_owned(),
            expected: format!("parts that stack to {:?} {}", decl.shape, decl.format),
            found: "parts that do not: was the file changed since it was opened?".to_owned(),
        }
    }
}

impl WeightSource for ModelWeights<'_> {
    fn load(&mut self, id: WeightId) -> Result<Weight<'_>, kernels::Error> {
        let label = self.decls[id.index()].label.clone();
        self.make(id).map_err(|source| kernels::Error::Source { label, source: Box::new(source) })
    }
}

impl Drop for ModelWeights<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

/// The float type of a tensor, none for another type.
fn float_type(checkpoint: &Checkpoint, id: TensorId) -> Option<FloatType> {
    match checkpoint.info(id).dtype {
        "F32" => Some(FloatType::F32),
        "F16" => Some(FloatType::F16),
        "BF16" => Some(FloatType::Bf16),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
