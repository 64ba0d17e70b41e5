//! Finds the tensors of one module and checks them against configuration and shape.
//!
//! Every tensor that is taken is remembered, so that those left over can be reported. Not here:
//! fusing ([`super::plan`]). Input: a checkpoint's headers, and the few bytes of group indices.

use super::{Part, Storage, float_type};
use crate::Error;
use crate::checkpoint::{Checkpoint, TensorId};
use crate::quantization::{Packing, Quantization};
use quant::import::{awq, compressed, gptq};
use quant::{Bits, FloatType, Format, quantize};
use std::cell::RefCell;
use std::collections::HashSet;

/// A linear module or a vector as it is stored.
#[derive(Debug, Clone)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) part: Part,
    pub(super) format: Format,
    /// Group indices that reorder the columns.
    pub(super) order: Option<TensorId>,
    /// For `inspect`: `bf16`, `gptq v1 4-bit g128 sym`.
    pub(super) wording: String,
}

impl Module {
    /// Asks for the matrix as codes of `bits`, in the file's column order; whether that is less
    /// than the file has.
    pub(super) fn round_to(&mut self, bits: Bits) -> bool {
        let k = self.part.shape[1];
        let more = match self.format {
            Format::Dense(_) => true,
            Format::Grouped { bits: own, .. } => own.count() > bits.count(),
        };
        if !more || bits == Bits::Four && k % 2 == 1 {
            return false;
        }
        self.format = Format::Grouped { bits, group: quantize::group(k), act_order: false };
        self.order = None;
        self.wording += &format!(", rounded to {}", self.format);
        true
    }
}

/// The modules of a checkpoint.
#[derive(Debug)]
pub(super) struct Modules<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    quantization: &'a Quantization,
    taken: RefCell<HashSet<TensorId>>,
}

impl<'a> Modules<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, quantization: &'a Quantization) -> Self {
        Self { checkpoint, quantization, taken: RefCell::default() }
    }

    /// The linear module `name` of shape `[n, k]`, without its bias.
    pub(super) fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Module, Error> {
        match self.quantization.packing(name)? {
            None => self.matrix(name, &shape, shape),
            Some(packing) => self.packed(name, shape, packing),
        }
    }

    /// The float tensor `name.weight` of the given dimensions, as an `[n, k]` matrix.
    pub(super) fn matrix(
        &self,
        name: &str,
        dims: &[usize],
        shape: [usize; 2],
    ) -> Result<Module, Error> {
        self.dense(&format!("{name}.weight"), dims, shape)
    }

    /// The vector `name` of `len` floats, as a `[1, len]` matrix.
    pub(super) fn vector(&self, name: &str, len: usize) -> Result<Module, Error> {
        self.dense(name, &[len], [1, len])
    }

    fn dense(&self, tensor: &str, dims: &[usize], shape: [usize; 2]) -> Result<Module, Error> {
        let expected = format!("{dims:?} of f32, f16 or bf16");
        let id = self.need(tensor, &expected)?;
        let info = self.checkpoint.info(id);
        let found = || format!("{:?} of {}", info.shape, info.dtype);
        let float = float_type(self.checkpoint, id).filter(|_| info.shape == dims);
        let float = float.ok_or_else(|| self.error(tensor, &expected, found()))?;
        Ok(Module {
            name: tensor.to_owned(),
            part: Part { shape, storage: Storage::Dense(id) },
            format: Format::Dense(float),
            order: None,
            wording: float.to_string(),
        })
    }

    fn packed(&self, name: &str, shape: [usize; 2], packing: Packing) -> Result<Module, Error> {
        let storage = self.storage(name, packing)?;
        let order = self.order(&storage);
        let act_order = order.is_some();
        let format = match &storage {
            Storage::Dense(_) => Ok(Format::Dense(FloatType::F32)),
            Storage::Gptq { settings, .. } => gptq::format(settings, shape, act_order),
            Storage::Awq { settings, .. } => awq::format(settings, shape, act_order),
            Storage::Compressed { settings, .. } => compressed::format(settings, shape, act_order),
        };
        let expected = format!("a shape {shape:?} that can be {packing}");
        let format = format.map_err(|e| self.error(name, &expected, e.to_string()))?;
        let wording = format!("{packing}{}", if act_order { " act-order" } else { "" });
        let part = Part { shape, storage };
        Ok(Module { name: name.to_owned(), part, format, order, wording })
    }

    fn storage(&self, name: &str, packing: Packing) -> Result<Storage, Error> {
        let expected = format!("part of a {packing} module, as the configuration says");
        let need = |suffix| self.need(&format!("{name}.{suffix}"), &expected);
        let take = |suffix| self.take(&format!("{name}.{suffix}"));
        let indices =
            |suffix, needed| if needed { need(suffix).map(Some) } else { Ok(take(suffix)) };
        Ok(match packing {
            Packing::Gptq { bits, group, v2, act_order, .. } => {
                let version = if v2 { gptq::Version::V2 } else { gptq::Version::V1 };
                Storage::Gptq {
                    settings: gptq::Settings { bits, group, version },
                    qweight: need("qweight")?,
                    qzeros: need("qzeros")?,
                    scales: need("scales")?,
                    g_idx: indices("g_idx", act_order)?,
                }
            }
            Packing::Awq { bits, group, zero_points } => Storage::Awq {
                settings: awq::Settings { bits, group },
                qweight: need("qweight")?,
                qzeros: indices("qzeros", zero_points)?,
                scales: need("scales")?,
            },
            Packing::Compressed { bits, group, symmetric, act_order } => Storage::Compressed {
                settings: compressed::Settings { bits, group, symmetric },
                packed: need("weight_packed")?,
                scale: need("weight_scale")?,
                zero_point: indices("weight_zero_point", !symmetric)?,
                g_idx: indices("weight_g_idx", act_order)?,
                shape: take("weight_shape"),
            },
        })
    }

    /// Group indices that are not ascending; most files have ascending ones, which say nothing.
    fn order(&self, storage: &Storage) -> Option<TensorId> {
        let (Storage::Gptq { g_idx, .. } | Storage::Compressed { g_idx, .. }) = storage else {
            return None;
        };
        let id = (*g_idx)?;
        let bytes = self.checkpoint.bytes(id);
        let ascending = match self.checkpoint.info(id).dtype {
            "I32" => bytes.as_chunks().0.is_sorted_by_key(|b| i32::from_le_bytes(*b)),
            "I64" => bytes.as_chunks().0.is_sorted_by_key(|b| i64::from_le_bytes(*b)),
            _ => false,
        };
        self.checkpoint.release(id);
        (!ascending).then_some(id)
    }

    /// Whether two modules have their columns in the same order.
    pub(super) fn same_order(&self, a: &Module, b: &Module) -> bool {
        match (a.order, b.order) {
            (None, None) => true,
            (Some(a), Some(b)) => self.same_bytes(a, b),
            _ => false,
        }
    }

    /// Whether two tensors are equal in type, shape and content.
    pub(super) fn same_bytes(&self, a: TensorId, b: TensorId) -> bool {
        let (x, y) = (self.checkpoint.info(a), self.checkpoint.info(b));
        let same = x.dtype == y.dtype
            && x.shape == y.shape
            && self.checkpoint.bytes(a) == self.checkpoint.bytes(b);
        self.checkpoint.release(a);
        self.checkpoint.release(b);
        same
    }

    /// Takes tensor `name` if it is there.
    pub(super) fn take(&self, name: &str) -> Option<TensorId> {
        let id = self.checkpoint.find(name)?;
        self.taken.borrow_mut().insert(id);
        Some(id)
    }

    fn need(&self, name: &str, expected: &str) -> Result<TensorId, Error> {
        self.take(name).ok_or_else(|| self.error(name, expected, self.instead(name)))
    }

    /// What the checkpoint has in place of tensor `name`.
    fn instead(&self, name: &str) -> String {
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        let weight = |suffix: &&str| self.checkpoint.find(&format!("{module}.{suffix}")).is_some();
        match ["weight", "qweight", "weight_packed"].iter().find(|s| weight(s)) {
            Some(suffix) => format!("no such tensor, but {module}.{suffix}"),
            None => "no such tensor".to_owned(),
        }
    }

    fn error(&self, tensor: &str, expected: &str, found: String) -> Error {
        Error::Tensor {
            tensor: tensor.to_owned(),
            path: self.checkpoint.root().to_owned(),
            expected: expected.to_owned(),
            found,
        }
    }

    /// Checks that every tensor was taken or is known to mean nothing.
    pub(super) fn finish(&self) -> Result<(), Error> {
        let taken = self.taken.borrow();
        let left = |id: &TensorId| !taken.contains(id) && !self.meaningless(*id);
        let unused: Vec<&str> = self
            .checkpoint
            .ids()
            .filter(left)
            .map(|id| self.checkpoint.info(id).name.as_str())
            .collect();
        if unused.is_empty() {
            return Ok(());
        }
        let first = unused.iter().take(10).copied().collect::<Vec<_>>().join(", ");
        let path = self.checkpoint.root().to_owned();
        Err(Error::UnusedTensors { path, count: unused.len(), first })
    }

    /// Tensors that cannot change the result: rotary tables that old writers stored (they follow
    /// from the configuration) and the zero biases that early GPTQ packers gave every module.
    fn meaningless(&self, id: TensorId) -> bool {
        let name = self.checkpoint.info(id).name.as_str();
        if name.ends_with("rotary_emb.inv_freq") {
            return true;
        }
        let module = name.strip_suffix(".bias");
        let packed =
            module.is_some_and(|m| self.checkpoint.find(&format!("{m}.qweight")).is_some());
        packed && self.checkpoint.bytes(id).iter().all(|b| *b == 0)
    }
}
