//! Guessing ahead: which draft models fit a verifier, and drafts made of the verifier itself.
//!
//! Not here: running a model, sampling. Input: the tokenizers of both models.

pub mod self_draft;
pub mod vocab;
