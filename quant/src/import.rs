//! Importers: one file per checkpoint format, each a pure function from raw tensors to [`Grouped`].
//!
//! Every importer has a `format`, which needs only settings and a shape (so that a checkpoint is
//! refused before any weight is read), and an `import`, which checks the tensors and unpacks them.
//! Anything wrong with either is a typed error: settings, shapes and bytes are not trusted.
//!
//! Not here: files, tensor names, configuration keys; the caller hands over [`RawTensor`]s.
//!
//! [`Grouped`]: crate::Grouped

pub mod awq;
pub mod compressed;
pub mod gptq;
mod layout;
mod packed;
mod raw;

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod packing;

pub use raw::{RawTensor, RawType};
