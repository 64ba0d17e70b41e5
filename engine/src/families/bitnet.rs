//! BitNet: Llama with a norm before the output projection of each block, read as plain floats.
//!
//! Checkpoints with packed ternary weights or quantized activations name a `quantization_config`
//! and are refused by it. Input: the reader of `config.json`.

use super::dims::{Defaults, Dims, Traits};
use crate::Error;
use crate::config::{IGNORED, Reader};
use crate::spec::ModelSpec;
use kernels::program::Mask;

/// Keys that mean something else here than for other families where they are missing.
const NEEDED: [(&str, &str); 2] = [
    ("hidden_act", "silu (without the key it would be relu2, which is not supported)"),
    ("rms_norm_eps", "a number, such as 1e-5"),
];

pub(super) fn read(config: &Reader) -> Result<ModelSpec, Error> {
    config.ignore(IGNORED);
    for (key, expected) in NEEDED {
        if config.value(key).is_none() {
            return Err(config.error(key, expected));
        }
    }
    let nested = config.value("rope_parameters").and_then(|rope| rope.get("rope_theta"));
    if nested.or(config.value("rope_theta")).is_none() {
        return Err(config.error("rope_theta", "a number, such as 500000"));
    }
    let dims = Dims::read(config, Defaults { kv_heads: Some(5), head_width: None })?;
    let bias = config.flag("attention_bias")?.unwrap_or(false);
    config.must_be_off("mlp_bias")?;
    let masks = vec![Mask::Causal; dims.layers];
    let traits = Traits { qkv_bias: bias, out_bias: bias, sub_norms: true, ..Traits::default() };
    Ok(dims.model(traits, masks))
}
