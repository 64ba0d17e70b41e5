//! Guessing ahead: the arithmetic of acceptance.
//!
//! Not here: the verifier's step and the choice of tokens ([`crate::engine`],
//! [`crate::sampler`]). Laws come from [`crate::sampler::Sampler::law`].

pub mod rank;
pub mod rejection;
