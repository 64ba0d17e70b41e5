//! Weights as pure data: the canonical layouts every backend repacks from, the importers that
//! turn a checkpoint's packing into them, and the obvious scalar arithmetic that is the oracle.
//!
//! Not here: files, threads, kernels, model families. Input is byte slices and shapes; nothing
//! outside [`import`] knows the words GPTQ, AWQ or compressed-tensors.
//!
//! Start at [`Grouped`] (quantized) and [`Dense`] (floats), then [`import`].

#![forbid(unsafe_code)]

mod dense;
mod error;
mod grouped;
pub mod import;
pub mod quantize;
pub mod reference;
mod weight;

pub use dense::{Dense, FloatType};
pub use error::Error;
pub use grouped::{Bits, Grouped, GroupedParts, GroupedShape};
pub use weight::{Format, Weight};
