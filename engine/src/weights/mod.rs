//! The weights of a model: found by name and checked at open ([`plan`]), delivered some rows at a
//! time to a backend ([`ModelWeights`]).
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
use quant::reference::dequantize_row;
use quant::{Dense, FloatType, Format, Grouped, Weight, quantize};
use std::ops::Range;

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

/// Delivers the weights of a model.
#[derive(Debug, Clone, Copy)]
pub struct ModelWeights<'m> {
    checkpoint: &'m Checkpoint,
    decls: &'m [WeightDecl],
    recipes: &'m [Recipe],
}

/// Rows of one part.
type Cut<'m> = (&'m Part, Range<usize>);

impl<'m> ModelWeights<'m> {
    /// The weights of `decls`, made by `recipes` from `checkpoint`.
    pub(crate) fn new(
        checkpoint: &'m Checkpoint,
        decls: &'m [WeightDecl],
        recipes: &'m [Recipe],
    ) -> Self {
        Self { checkpoint, decls, recipes }
    }

    fn make(&self, id: WeightId, rows: &Range<usize>) -> Result<Weight<'m>, kernels::Error> {
        let (decl, Recipe(parts)) = (&self.decls[id.index()], &self.recipes[id.index()]);
        let cuts = cut(decl, parts, rows);
        let made = match decl.format {
            Format::Dense(float) => self.dense(decl, float, &cuts).map(Weight::Dense),
            Format::Grouped { .. } => self.grouped(decl, &cuts).map(Weight::Grouped),
        };
        made.map_err(|source| {
            let (label, source) = (decl.label.clone(), Box::new(source));
            kernels::Error::Source { label, source }
        })
    }

    /// Rows of one tensor as they are, or of several; a part of another type is widened.
    fn dense(
        &self,
        decl: &WeightDecl,
        float: FloatType,
        cuts: &[Cut<'_>],
    ) -> Result<Dense<'m>, Error> {
        let mut bytes = Vec::new();
        for cut in cuts {
            let part = self.floats(decl, cut)?;
            match part.float() == float {
                true if cuts.len() == 1 => return Ok(part),
                true => bytes.extend_from_slice(part.bytes()),
                false => bytes.extend(part.to_f32().iter().flat_map(|v| v.to_le_bytes())),
            }
        }
        let n = bytes.len() / (decl.shape[1] * float.bytes());
        let root = self.checkpoint.root().to_owned();
        Dense::new(&decl.label, float, [n, decl.shape[1]], bytes)
            .map_err(|source| Error::Weight { path: root, source })
    }

    /// Rows of a float tensor as they are stored.
    fn floats(&self, decl: &WeightDecl, (part, rows): &Cut<'_>) -> Result<Dense<'m>, Error> {
        let Storage::Dense(tensor) = part.storage else { return Err(self.broken(decl)) };
        let own = float_type(self.checkpoint, tensor).ok_or_else(|| self.broken(decl))?;
        let stride = part.shape[1] * own.bytes();
        let bytes = self.checkpoint.bytes(tensor).get(rows.start * stride..rows.end * stride);
        let name = &self.checkpoint.info(tensor).name;
        let shape = [rows.len(), part.shape[1]];
        Dense::new(name, own, shape, bytes.ok_or_else(|| self.broken(decl))?)
            .map_err(|e| self.at(tensor, e))
    }

    /// Codes of all parts, stacked.
    fn grouped(&self, decl: &WeightDecl, cuts: &[Cut<'_>]) -> Result<Grouped, Error> {
        let mut all = Vec::with_capacity(cuts.len());
        for cut in cuts {
            all.push(self.codes(decl, cut)?);
        }
        if let [_] = all[..] {
            return all.pop().ok_or_else(|| self.broken(decl));
        }
        Grouped::stack(&all).ok_or_else(|| self.broken(decl))
    }

    /// Codes as `decl` wants them: those of the file, or rounded on the way.
    fn codes(&self, decl: &WeightDecl, cut: &Cut<'_>) -> Result<Grouped, Error> {
        let Format::Grouped { bits, group, .. } = decl.format else {
            return Err(self.broken(decl));
        };
        let (part, rows) = cut;
        let tensor = part.storage.tensors()[0];
        let name = &self.checkpoint.info(tensor).name;
        let floats = match part.storage {
            Storage::Dense(_) => self.floats(decl, cut)?,
            _ => {
                let own = self.import(decl, cut)?;
                if own.shape().bits == bits {
                    return Ok(own);
                }
                let values: Vec<f32> =
                    (0..rows.len()).flat_map(|row| dequantize_row(&own, row)).collect();
                Dense::from_f32([rows.len(), part.shape[1]], &values)
            }
        };
        let before = rows.start * part.shape[1];
        quantize::round_to_nearest(name, &floats, bits, group)
            .map_err(|e| self.at(tensor, e.behind(before)))
    }

    /// Codes as the file has them.
    fn import(&self, decl: &WeightDecl, (part, rows): &Cut<'_>) -> Result<Grouped, Error> {
        let (raw, rows) = (|id| self.raw(id), rows.clone());
        let made = match &part.storage {
            Storage::Dense(_) => return Err(self.broken(decl)),
            Storage::Gptq { settings, qweight, qzeros, scales, g_idx } => {
                let (qweight, qzeros) = (raw(*qweight), raw(*qzeros));
                let (scales, g_idx) = (raw(*scales), g_idx.map(raw));
                let tensors = gptq::Tensors { qweight, qzeros, scales, g_idx };
                gptq::import(settings, part.shape, rows, &tensors)
            }
            Storage::Awq { settings, qweight, qzeros, scales } => {
                let (qweight, qzeros, scales) = (raw(*qweight), qzeros.map(raw), raw(*scales));
                let tensors = awq::Tensors { qweight, qzeros, scales };
                awq::import(settings, part.shape, rows, &tensors)
            }
            Storage::Compressed { settings, packed, scale, zero_point, g_idx, shape } => {
                let tensors = compressed::Tensors {
                    packed: raw(*packed),
                    scale: raw(*scale),
                    zero_point: zero_point.map(raw),
                    g_idx: g_idx.map(raw),
                    shape: shape.map(raw),
                };
                compressed::import(settings, part.shape, rows, &tensors)
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
    fn load(&self, id: WeightId, rows: Range<usize>) -> Result<Weight<'_>, kernels::Error> {
        self.make(id, &rows)
    }

    fn release(&self, id: WeightId) {
        let Recipe(parts) = &self.recipes[id.index()];
        for tensor in parts.iter().flat_map(|part| part.storage.tensors()) {
            self.checkpoint.release(tensor);
        }
    }
}

/// The parts that hold rows `rows` of the whole, each with those of its own rows.
fn cut<'m>(decl: &WeightDecl, parts: &'m [Part], rows: &Range<usize>) -> Vec<Cut<'m>> {
    if decl.shape[0] == 1 {
        // A vector's parts lie side by side.
        return parts.iter().map(|part| (part, 0..1)).collect();
    }
    let mut start = 0;
    let own = |part: &'m Part| {
        let end = start + part.shape[0];
        let inside = rows.start.clamp(start, end) - start..rows.end.clamp(start, end) - start;
        start = end;
        (part, inside)
    };
    parts.iter().map(own).filter(|(_, rows)| !rows.is_empty()).collect()
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
