//! Llama: RMS norms, grouped KV heads, gated SiLU, optional biases, every rotary scaling.
//!
//! Also what many others publish as (Yi, DeepSeek Coder, SmolLM, TinyLlama, ...).
//! Input: the reader of `config.json`.

use super::dims::{Defaults, Dims, Traits, sliding_layers};
use crate::Error;
use crate::config::{IGNORED, Reader};
use crate::spec::ModelSpec;
use kernels::program::Mask;

pub(super) fn read(config: &Reader) -> Result<ModelSpec, Error> {
    config.ignore(IGNORED);
    let dims = Dims::read(config, Defaults::default())?;
    let attention_bias = config.flag("attention_bias")?.unwrap_or(false);
    let traits = Traits {
        qkv_bias: attention_bias,
        out_bias: attention_bias,
        mlp_bias: config.flag("mlp_bias")?.unwrap_or(false),
        ..Traits::default()
    };
    if config.value("sliding_window").is_some() {
        return Err(config.error("sliding_window", "null: this architecture has no window"));
    }
    if sliding_layers(config, dims.layers)?.is_some_and(|list| list.contains(&true)) {
        return Err(config.error("layer_types", "full_attention only"));
    }
    let masks = vec![Mask::Causal; dims.layers];
    Ok(dims.model(traits, masks))
}
