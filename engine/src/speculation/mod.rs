//! Guessing tokens ahead of the verifier.

pub mod lookup;
