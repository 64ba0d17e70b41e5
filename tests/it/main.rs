//! The one integration test binary: whole models against independent references, the command
//! line, hostile input, and the repository's own rules.
//!
//! Not here: tests of single parts (they lie beside the parts).

#![allow(clippy::print_stdout, reason = "tests print what they measured beside what is allowed")]

mod bench;
mod cli;
mod cuda;
mod demo;
mod golden;
mod gpu;
mod hostile;
mod kl;
mod models;
mod rank;
mod run;
mod schemas;
mod speculate;
mod sweep;
mod tidy;
