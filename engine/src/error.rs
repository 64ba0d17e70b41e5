//! The one error type of this crate: what, where, expected, found, remedy.

use std::path::PathBuf;

/// Why a model cannot be loaded or a step cannot be run. (Why a *request* is refused is
/// [`crate::request::Rejected`].)
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// A file the model needs is absent.
    #[error("{path} is missing: {needed_for}")]
    MissingFile {
        /// The file.
        path: PathBuf,
        /// What it is needed for and what to do.
        needed_for: String,
    },
    /// A file is not the JSON it must be.
    #[error("{path} is not valid JSON for its purpose: {reason}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and what is wrong.
        reason: String,
    },
    /// A safetensors file breaks its format.
    #[error("{path} is not a valid safetensors file: {reason}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong: expected and found.
        reason: String,
    },
    /// The architecture has no row in the table of families.
    #[error("architecture {found} is not supported; known: {known}")]
    Architecture {
        /// As config.json names it.
        found: String,
        /// Names of the table, comma separated.
        known: String,
    },
    /// A configuration key has a value that is not supported.
    #[error("{path}: {key} is {found}, expected {expected}")]
    Config {
        /// The file.
        path: PathBuf,
        /// The key, dotted.
        key: String,
        /// Allowed values.
        expected: String,
        /// The value found, or "missing".
        found: String,
    },
    /// Keys that the reader neither uses nor knowingly ignores.
    #[error("{path}: unknown keys {keys}: they may change the result, so the model is refused")]
    UnknownKeys {
        /// The file.
        path: PathBuf,
        /// The keys, comma separated.
        keys: String,
    },
    /// A tensor the model needs is absent, or has the wrong type or shape.
    #[error("tensor {tensor} in {path}: expected {expected}, found {found}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// The file or folder.
        path: PathBuf,
        /// What the model needs.
        expected: String,
        /// What the checkpoint has.
        found: String,
    },
    /// Tensors of the checkpoint that the model would not use.
    #[error(
        "{path}: {count} tensors are not part of this model, first {first}: refused, since leaving them out may change the result"
    )]
    UnusedTensors {
        /// The folder.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first ten names, comma separated.
        first: String,
    },
    /// A choice of the caller ([`crate::model::ModelOptions`]) that this model cannot follow.
    #[error("{path}: {option} is {found}, expected {expected}")]
    Choice {
        /// The folder.
        path: PathBuf,
        /// Name of the choice.
        option: &'static str,
        /// What this model allows.
        expected: String,
        /// What was asked for.
        found: String,
    },
    /// A weight breaks the rules of its format.
    #[error("{path}: {source}")]
    Weight {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: quant::Error,
    },
    /// The tokenizer cannot be built or fails on a text.
    #[error("tokenizer {path}: {reason}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The chat template is absent, cannot be parsed, or refuses the messages.
    #[error("chat template: {reason}")]
    Template {
        /// What is wrong, with the template's own words if it raised an exception.
        reason: String,
    },
    /// A backend refuses the program or a step.
    #[error(transparent)]
    Backend(#[from] kernels::Error),
}
