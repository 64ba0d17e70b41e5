//! Guessing ahead: which draft models fit a verifier.
//!
//! Not here: running a model, sampling. Input: the tokenizers of both models.

pub mod vocab;
