//! The contract between a model and the machines that run it.
//!
//! A [`Program`] is a linear list of coarse steps over named slots: plain data, validated once.
//! A [`Backend`] turns it and the canonical weights into a [`Runner`], which runs every step over
//! a packed batch of token rows. [`mod@reference`] is the specification in scalar code; [`cpu`] is
//! the fast interpreter. No model family is named here, and no file is opened.
//!
//! Start at [`program`], then [`backend`], then [`mod@reference`].

pub mod backend;
#[cfg(test)]
mod conformance;
pub mod cpu;
pub mod cuda;
pub mod devices;
mod error;
mod joins;
pub mod memory;
pub mod program;
pub mod reference;
pub mod validate;

pub use backend::{
    Backend, BlockTables, Draw, Runner, StepInput, StepLimits, StepOutput, WeightSource,
};
pub use error::Error;
pub use program::Program;
