//! From a model folder to tokens: specs, checkpoints, lowering, KV blocks, scheduling, sampling,
//! and the text on both ends. Synchronous, single-threaded, without a clock, network or
//! environment; files are opened in [`files`] and [`checkpoint`] alone.
//!
//! Not here: kernels and devices (crate `kernels`), packings (crate `quant`), HTTP and the
//! command line (crate `server`).
//!
//! Start at [`model::Model`] (load), then [`engine::Engine`] (run).

pub mod batch;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod engine;
mod error;
pub mod families;
pub mod files;
pub mod forward;
pub mod grammar;
pub mod kv;
pub mod logprobs;
pub mod lower;
pub mod model;
pub mod prefix;
pub mod quantization;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod sharing;
pub mod spec;
pub mod speculation;
pub mod stream;
pub mod synthetic;
pub mod tokenizer;
pub mod weights;

pub use error::Error;
