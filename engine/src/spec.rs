//! A model as data: everything the lowering needs to know, nothing about its family or files.
//!
//! Filled by [`crate::families`] from `config.json`, read by [`crate::lower`].

use kernels::program::{Activation, Mask, RopeDecl, RopeSpeeds};

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Name of its architecture, for display only.
    pub architecture: String,
    /// v, rows of the embedding.
    pub vocab: usize,
    /// d, width of the residual stream.
    pub width: usize,
    /// Longest context the model accepts, in tokens.
    pub context_len: u32,
    /// One entry a layer; layers may differ.
    pub layers: Vec<LayerSpec>,
    /// Epsilon of the norm before the head.
    pub final_norm_eps: f32,
    /// Whether the files have one matrix for the head and the embedding.
    pub tied_head: bool,
}

impl ModelSpec {
    /// Longest length up to which no layer's rotary speeds depend on the length: until there, keys
    /// and values of equal tokens are equal whatever follows them in a prompt.
    pub fn steady_len(&self) -> u32 {
        let steady = |layer: &LayerSpec| match layer.attn.rope.speeds {
            RopeSpeeds::Fixed(_) => u32::MAX,
            RopeSpeeds::Switched { switch, .. } => switch,
            RopeSpeeds::DynamicNtk { trained, .. } => trained,
        };
        self.layers.iter().map(steady).min().unwrap_or(u32::MAX)
    }
}

/// One pre-norm layer: `x += attn(norm(x)); x += mlp(norm(x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Attention block.
    pub attn: AttnSpec,
    /// Feed-forward block.
    pub mlp: MlpSpec,
    /// Epsilon of both norms.
    pub norm_eps: f32,
}

/// Attention with grouped KV heads.
#[derive(Debug, Clone, PartialEq)]
pub struct AttnSpec {
    /// h, query heads.
    pub heads: usize,
    /// g, KV heads; divides h.
    pub kv_heads: usize,
    /// e, width of a head.
    pub head_width: usize,
    /// Factor on the scores, usually `1 / sqrt(e)`.
    pub scale: f32,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has one.
    pub out_bias: bool,
    /// Epsilon of the per-head norm of q and k, where there is one.
    pub qk_norm_eps: Option<f32>,
    /// Epsilon of the norm before the output projection, over all heads, where there is one.
    pub out_norm_eps: Option<f32>,
    /// Rotary table.
    pub rope: RopeDecl,
    /// Visible positions.
    pub mask: Mask,
}

/// Gated feed-forward block.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpSpec {
    /// f, inner width.
    pub width: usize,
    /// Function of the gate.
    pub activation: Activation,
    /// Whether the three projections have biases.
    pub bias: bool,
    /// Epsilon of the norm before the output projection, where there is one.
    pub down_norm_eps: Option<f32>,
}
