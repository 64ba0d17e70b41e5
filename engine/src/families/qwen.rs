//! Qwen2 (biases of q, k, v) and Qwen3 (norms of q and k heads, explicit head width).
//!
//! Both may slide: on the layers that `layer_types` names, else from `max_window_layers` on.
//! Input: the reader of `config.json`.

use super::dims::{Defaults, Dims, Traits, sliding_layers, window};
use crate::Error;
use crate::config::{IGNORED, Ignored, Reader};
use crate::spec::ModelSpec;
use kernels::program::Mask;

const QWEN2_IGNORED: &[Ignored] = &[Ignored {
    reason: "the architecture has biases of q, k and v and no others, whatever the key says",
    keys: &["attention_bias"],
}];

pub(super) fn read_qwen2(config: &Reader) -> Result<ModelSpec, Error> {
    config.ignore(IGNORED);
    config.ignore(QWEN2_IGNORED);
    config.must_be_off("mlp_bias")?;
    let dims = Dims::read(config, Defaults { kv_heads: Some(32), head_width: None })?;
    let masks = masks(config, dims.layers)?;
    Ok(dims.model(Traits { qkv_bias: true, ..Traits::default() }, masks))
}

pub(super) fn read_qwen3(config: &Reader) -> Result<ModelSpec, Error> {
    config.ignore(IGNORED);
    config.must_be_off("mlp_bias")?;
    let dims = Dims::read(config, Defaults { kv_heads: Some(32), head_width: Some(128) })?;
    let bias = config.flag("attention_bias")?.unwrap_or(false);
    let masks = masks(config, dims.layers)?;
    let traits = Traits { qkv_bias: bias, out_bias: bias, qk_norm: true, ..Traits::default() };
    Ok(dims.model(traits, masks))
}

fn masks(config: &Reader, layers: usize) -> Result<Vec<Mask>, Error> {
    let enabled = config.flag("use_sliding_window")?.unwrap_or(false);
    let window = if enabled {
        window(config)?.or((!config.mentions("sliding_window")).then_some(4096))
    } else {
        config.value("sliding_window"); // the size of a window that is off means nothing
        None
    };
    let first = config.integer("max_window_layers", 0..=1 << 20)?.unwrap_or(28) as usize;
    let listed = sliding_layers(config, layers)?;
    let sliding = listed.unwrap_or_else(|| (0..layers).map(|i| i >= first).collect());
    let mask = |slides: bool| match window {
        Some(w) if slides => Mask::Window(w),
        _ => Mask::Causal,
    };
    let contradiction = window.is_none() && config.value("layer_types").is_some();
    if contradiction && sliding.contains(&true) {
        let expected = "full_attention only, since use_sliding_window or sliding_window is off";
        return Err(config.error("layer_types", expected));
    }
    Ok(sliding.into_iter().map(mask).collect())
}
