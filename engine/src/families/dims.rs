//! The keys all families share: sizes, heads, epsilon, tying, rotary embedding.
//!
//! Not here: what differs between families. Input: the reader of `config.json`.

use super::rope;
use crate::Error;
use crate::config::Reader;
use crate::spec::{AttnSpec, LayerSpec, MlpSpec, ModelSpec};
use kernels::program::{Activation, Mask, RopeDecl};

/// Largest width, head count or layer count that is believed.
const MAX_SIZE: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEAD_WIDTH: usize = 1 << 12;

/// Features that none of these models has.
const OFF: &[&str] = &[
    "is_encoder_decoder",
    "tie_encoder_decoder",
    "add_cross_attention",
    "use_mrope",
    "rope_interleaved",
];

/// What a family takes for keys that are missing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Defaults {
    /// `num_key_value_heads` where missing (null always means as many as query heads).
    pub(super) kv_heads: Option<usize>,
    /// `head_dim` where missing; none is `hidden_size / num_attention_heads`.
    pub(super) head_width: Option<usize>,
}

/// What a layer has besides its sizes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Traits {
    /// Biases of q, k and v.
    pub(super) qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub(super) out_bias: bool,
    /// Biases of the feed-forward block.
    pub(super) mlp_bias: bool,
    /// A norm of each head of q and k.
    pub(super) qk_norm: bool,
    /// A norm before the output projection of each block.
    pub(super) sub_norms: bool,
}

/// Sizes of a model, checked against each other.
#[derive(Debug, Clone)]
pub(super) struct Dims {
    vocab: usize,
    width: usize,
    inner: usize,
    /// Number of layers.
    pub(super) layers: usize,
    heads: usize,
    kv_heads: usize,
    head_width: usize,
    eps: f32,
    tied: bool,
    context_len: u32,
    rope: RopeDecl,
}

impl Dims {
    /// Reads the shared keys.
    pub(super) fn read(config: &Reader, defaults: Defaults) -> Result<Self, Error> {
        let width = config.need_count("hidden_size", MAX_SIZE)?;
        let heads = config.need_count("num_attention_heads", 1 << 16)?;
        let head_width = head_width(config, width, heads, defaults)?;
        let context = config.need_count("max_position_embeddings", u32::MAX as usize)? as u32;
        let (rope, context_len) = rope::read(config, head_width, context)?;
        let activation = config.text("hidden_act")?.unwrap_or("silu");
        if !["silu", "swish"].contains(&activation) {
            return Err(config.error("hidden_act", "silu"));
        }
        for key in OFF {
            config.must_be_off(key)?;
        }
        config.must_be_empty("pruned_heads")?;
        Ok(Self {
            vocab: config.need_count("vocab_size", MAX_SIZE)?,
            width,
            inner: config.need_count("intermediate_size", MAX_SIZE)?,
            layers: config.need_count("num_hidden_layers", MAX_LAYERS)?,
            heads,
            kv_heads: kv_heads(config, heads, defaults)?,
            head_width,
            eps: config.number("rms_norm_eps", 1e-30..=1.0)?.unwrap_or(1e-6) as f32,
            tied: config.flag("tie_word_embeddings")?.unwrap_or(false),
            context_len,
            rope,
        })
    }

    /// The model with one layer for each mask.
    pub(super) fn model(self, traits: Traits, masks: Vec<Mask>) -> ModelSpec {
        ModelSpec {
            architecture: String::new(),
            vocab: self.vocab,
            width: self.width,
            context_len: self.context_len,
            layers: masks.into_iter().map(|mask| self.layer(traits, mask)).collect(),
            final_norm_eps: self.eps,
            tied_head: self.tied,
        }
    }

    fn layer(&self, traits: Traits, mask: Mask) -> LayerSpec {
        let attn = AttnSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_width: self.head_width,
            scale: (self.head_width as f32).sqrt().recip(),
            qkv_bias: traits.qkv_bias,
            out_bias: traits.out_bias,
            qk_norm_eps: traits.qk_norm.then_some(self.eps),
            out_norm_eps: traits.sub_norms.then_some(self.eps),
            rope: self.rope.clone(),
            mask,
        };
        let mlp = MlpSpec {
            width: self.inner,
            activation: Activation::Silu,
            bias: traits.mlp_bias,
            down_norm_eps: traits.sub_norms.then_some(self.eps),
        };
        LayerSpec { attn, mlp, norm_eps: self.eps }
    }
}

fn head_width(
    config: &Reader,
    width: usize,
    heads: usize,
    defaults: Defaults,
) -> Result<usize, Error> {
    let given = config.count("head_dim", MAX_HEAD_WIDTH)?;
    let default = defaults.head_width.filter(|_| !config.mentions("head_dim"));
    let head_width = match given.or(default) {
        Some(head_width) => head_width,
        None if width.is_multiple_of(heads) && width / heads <= MAX_HEAD_WIDTH => width / heads,
        None => {
            let expected = format!("a divisor of hidden_size {width}, or a head_dim");
            return Err(config.error("num_attention_heads", expected));
        }
    };
    if head_width % 2 == 1 {
        return Err(config.error("head_dim", "an even number: columns rotate in pairs"));
    }
    Ok(head_width)
}

/// A default that cannot divide the heads was never meant: such a model has one KV head for each
/// query head. Tensor shapes confirm either.
fn kv_heads(config: &Reader, heads: usize, defaults: Defaults) -> Result<usize, Error> {
    let key = "num_key_value_heads";
    let default = defaults.kv_heads.filter(|g| !config.mentions(key) && heads.is_multiple_of(*g));
    let kv_heads = config.count(key, heads)?.or(default).unwrap_or(heads);
    if heads.is_multiple_of(kv_heads) {
        return Ok(kv_heads);
    }
    Err(config.error(key, format!("a divisor of num_attention_heads {heads}")))
}

/// Reads `layer_types`: whether each layer slides, none where the key is missing.
pub(super) fn sliding_layers(config: &Reader, layers: usize) -> Result<Option<Vec<bool>>, Error> {
    let Some(types) = config.texts("layer_types")? else { return Ok(None) };
    let sliding = |t: &&str| match *t {
        "full_attention" => Some(false),
        "sliding_attention" => Some(true),
        _ => None,
    };
    match types.iter().map(sliding).collect::<Option<Vec<bool>>>() {
        Some(list) if list.len() == layers => Ok(Some(list)),
        _ => {
            let expected = format!("{layers} times full_attention or sliding_attention");
            Err(config.error("layer_types", expected))
        }
    }
}

/// Reads `sliding_window`, in tokens.
pub(super) fn window(config: &Reader) -> Result<Option<u32>, Error> {
    Ok(config.integer("sliding_window", 1..=u64::from(u32::MAX))?.map(|w| w as u32))
}
