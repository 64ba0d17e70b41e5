//! What every test may use: reproducible random numbers, golden data, safetensors in and out.
//!
//! Not here: anything of the engine (this crate depends on none of ours, so that `quant` and
//! `kernels` can use it too). Golden data lies in `tests/golden`; the real models that tests may
//! use beside it are found by [`shared_models`].

#![forbid(unsafe_code)]

mod rng;
mod tensors;

pub use rng::Rng;
pub use tensors::{Tensor, read_tensors, write_tensors};

use std::path::{Path, PathBuf};

/// Folder or file `name` of the golden data in this repository.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// A JSON file of the golden data; panics with its path if it cannot be read.
pub fn golden_json(name: &str) -> serde_json::Value {
    read_json(&golden(name))
}

/// Any JSON file; panics with its path if it cannot be read.
pub fn read_json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Names of the folders in golden folder `section`, sorted.
pub fn golden_cases(section: &str) -> Vec<String> {
    let dir = golden(section);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .filter(|e| e.path().is_dir())
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Real third-party models that may lie beside the repository; prints why a test skips if not.
pub fn shared_models() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models");
    if dir.is_dir() {
        return Some(dir);
    }
    eprintln!("skipped: no real models at {} (they are not part of the repository)", dir.display());
    None
}
