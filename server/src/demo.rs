//! The demo pair inside the binary: two small 4-bit Llama models of Rust source.
//!
//! `verifier` is what `run` uses when no model is named; `draft` guesses for it.

use engine::files::ModelFiles;

macro_rules! embed {
    ($folder:literal: $($file:literal),*) => {
        &[$(($file, include_bytes!(concat!("../demo/", $folder, "/", $file)) as &[u8])),*]
    };
}

const VERIFIER: &[(&str, &[u8])] = embed!("verifier": "config.json", "generation_config.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json");
const DRAFT: &[(&str, &[u8])] = embed!("draft": "config.json", "generation_config.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json");

/// The built-in model called `name`.
pub(crate) fn find(name: &str) -> Option<ModelFiles> {
    match name {
        "demo" => Some(ModelFiles::Embedded { name: "demo", files: VERIFIER }),
        "demo-draft" => Some(ModelFiles::Embedded { name: "demo-draft", files: DRAFT }),
        _ => None,
    }
}
