//! The one error type of this crate: what is wrong with a weight, where, expected and found.

/// Why a weight cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another shape than the format demands.
    #[error("tensor {tensor}: expected shape {expected}, found {found:?}")]
    Shape {
        /// Name of the tensor in the checkpoint.
        tensor: String,
        /// The shape in words or numbers.
        expected: String,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A tensor's bytes do not match its shape and type.
    #[error("tensor {tensor}: expected {expected} bytes, found {found}")]
    Bytes {
        /// Name of the tensor.
        tensor: String,
        /// Bytes demanded by shape and type.
        expected: usize,
        /// Bytes found.
        found: usize,
    },
    /// A tensor is stored as a type that the format does not allow there.
    #[error("tensor {tensor}: expected type {expected}, found {found}")]
    Type {
        /// Name of the tensor.
        tensor: String,
        /// Allowed types, as text.
        expected: &'static str,
        /// Type found.
        found: String,
    },
    /// A tensor the format needs is absent.
    #[error("tensor {tensor} is missing: {reason}")]
    Missing {
        /// Name of the absent tensor.
        tensor: String,
        /// Why it is needed.
        reason: String,
    },
    /// A value is outside its range (a NaN scale, a group index beyond the groups, ...).
    #[error("tensor {tensor}: {what} at index {index} is {found}, expected {expected}")]
    Value {
        /// Name of the tensor.
        tensor: String,
        /// Which quantity.
        what: &'static str,
        /// Flat element index.
        index: usize,
        /// Value found, as text.
        found: String,
        /// Allowed range, as text.
        expected: String,
    },
    /// A combination of settings that no checkpoint of this format can mean.
    #[error("{key}: expected {expected}, found {found}")]
    Setting {
        /// The configuration key.
        key: String,
        /// Allowed values.
        expected: String,
        /// Value found.
        found: String,
    },
}

impl Error {
    /// The same of a tensor's elements behind the first `elements`, counted from its start.
    #[must_use]
    pub fn behind(mut self, elements: usize) -> Self {
        if let Self::Value { index, .. } = &mut self {
            *index += elements;
        }
        self
    }
}
