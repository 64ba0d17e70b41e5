//! Mistral: Llama with a sliding window on every layer where `sliding_window` is a number.
//!
//! Input: the reader of `config.json`.

use super::dims::{Defaults, Dims, Traits, sliding_layers, window};
use crate::Error;
use crate::config::{IGNORED, Reader};
use crate::spec::ModelSpec;
use kernels::program::Mask;

/// The window where the key is missing; null is no window.
const DEFAULT_WINDOW: u32 = 4096;

pub(super) fn read(config: &Reader) -> Result<ModelSpec, Error> {
    config.ignore(IGNORED);
    let dims = Dims::read(config, Defaults { kv_heads: Some(8), head_width: None })?;
    config.must_be_off("attention_bias")?;
    config.must_be_off("mlp_bias")?;
    let window = match window(config)? {
        None if !config.mentions("sliding_window") => Some(DEFAULT_WINDOW),
        given => given,
    };
    // This architecture has one mask for all layers; mixed ones are another architecture's.
    let sliding = sliding_layers(config, dims.layers)?;
    if sliding.is_some_and(|list| list.iter().any(|s| *s != window.is_some())) {
        let kind = if window.is_some() { "sliding_attention" } else { "full_attention" };
        return Err(config.error("layer_types", format!("{kind} only, as sliding_window says")));
    }
    let masks = vec![window.map_or(Mask::Causal, Mask::Window); dims.layers];
    Ok(dims.model(Traits::default(), masks))
}
