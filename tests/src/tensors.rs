//! Safetensors files for tests, by the `safetensors` crate, so that our own reader is checked
//! against another one.

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use std::collections::BTreeMap;
use std::path::Path;

/// A tensor with owned bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// An f32 tensor.
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    /// An f16 tensor of rounded values.
    pub fn f16(shape: &[usize], values: &[f32]) -> Self {
        let half = |v: &f32| half::f16::from_f32(*v).to_le_bytes();
        Self {
            dtype: Dtype::F16,
            shape: shape.to_vec(),
            bytes: values.iter().flat_map(half).collect(),
        }
    }

    /// An i32 tensor.
    pub fn i32(shape: &[usize], values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: Dtype::I32, shape: shape.to_vec(), bytes }
    }

    /// Elements of an F32, F16 or BF16 tensor widened to f32; panics on another type.
    pub fn to_f32(&self) -> Vec<f32> {
        let pairs = || self.bytes.as_chunks::<2>().0.iter();
        match self.dtype {
            Dtype::F32 => {
                self.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
            }
            Dtype::F16 => pairs().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::BF16 => pairs().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            other => panic!("{other:?} is not a float type"),
        }
    }

    /// Elements of an I32 tensor; panics on another type.
    pub fn to_i32(&self) -> Vec<i32> {
        assert_eq!(self.dtype, Dtype::I32, "an I32 tensor is needed");
        self.bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
    }
}

/// All tensors of a safetensors file; panics with the path if it is not one.
pub fn read_tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let file = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let all = SafeTensors::deserialize(&file).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let own = |view: TensorView<'_>| Tensor {
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        bytes: view.data().to_vec(),
    };
    all.tensors().into_iter().map(|(name, view)| (name, own(view))).collect()
}

/// Writes a safetensors file; panics if that fails.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let views: Vec<(&String, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, t)| {
            let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
            (name, view.unwrap_or_else(|e| panic!("{name}: {e}")))
        })
        .collect();
    serialize_to_file(views, None, path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
