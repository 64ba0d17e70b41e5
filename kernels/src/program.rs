//! A model's forward pass as plain data: the only contract between the engine and the backends.
//!
//! Rows are packed tokens `[t]` of all sequences of a step, or output rows `[r]` whose logits are
//! wanted. Slots are f32 matrices `[rows, width]`; a [`SlotView`] is a range of their columns.
//! Dimension key: t token rows, r output rows, s sequences, h query heads, g KV heads, e head
//! width, d model width, f feed-forward width, v vocabulary, n/k output/input width of a linear.
//!
//! Not here: checks ([`crate::validate`]), memory ([`crate::memory`]), arithmetic
//! ([`crate::reference`] says what each op means).

use quant::Format;
use std::fmt;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u32);
        impl $name {
            /// The id as an index into its declarations.
            pub fn index(self) -> usize { self.0 as usize }
        }
    )*};
}
ids! {
    /// A token of the vocabulary.
    TokenId,
    /// A KV block of the pool.
    BlockId,
    /// Index into [`Program::slots`].
    SlotId,
    /// Index into [`Program::weights`].
    WeightId,
    /// Index into [`Program::ropes`].
    RopeId,
    /// Index into [`Program::kv`].
    KvLayer
}

/// A whole forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// Weights by [`WeightId`].
    pub weights: Vec<WeightDecl>,
    /// Slots by [`SlotId`].
    pub slots: Vec<SlotDecl>,
    /// Rotary tables by [`RopeId`].
    pub ropes: Vec<RopeDecl>,
    /// KV layers by [`KvLayer`].
    pub kv: Vec<KvDecl>,
    /// The steps in order.
    pub steps: Vec<Step>,
    /// The slot of rows [`Rows::Outputs`] that holds the logits after the last step.
    pub logits: SlotId,
}

/// One op with the name it is known by in plans, traces and errors.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// What to do.
    pub op: Op,
    /// For example `layers.3.attn.qkv`.
    pub label: String,
}

/// A weight the program needs.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightDecl {
    /// For example `layers.3.attn.qkv`.
    pub label: String,
    /// `[n, k]`; a vector is `[1, k]`.
    pub shape: [usize; 2],
    /// The format it will be delivered in.
    pub format: Format,
    /// How finely a device may round what a quantized matrix is multiplied with.
    pub rounding: Rounding,
}

impl WeightDecl {
    /// A weight with fine rounding.
    pub fn new(label: impl Into<String>, shape: [usize; 2], format: Format) -> Self {
        Self { label: label.into(), shape, format, rounding: Rounding::Fine }
    }
}

/// How finely activations are rounded where a device multiplies them as int8: so many columns of a weight
/// group, at most, share a scale.
///
/// Twice as many columns take a tenth off a linear over eight rows and a fifth over many (Intel AMX). What that
/// costs in text depends on where in a model the linear stands (`tests/it/kl.rs` measures it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// 64 columns: anywhere.
    Fine,
    /// 128 columns.
    Coarse,
}

impl Rounding {
    /// Most columns that share a scale.
    pub const fn columns(self) -> usize {
        match self {
            Self::Fine => 64,
            Self::Coarse => 128,
        }
    }
}

/// A matrix of activations, f32.
#[derive(Debug, Clone, PartialEq)]
pub struct SlotDecl {
    /// For example `qkv`.
    pub label: String,
    /// How many rows a step gives it.
    pub rows: Rows,
    /// Columns.
    pub width: usize,
}

/// Row counts that are known only at each step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// `t`: one row a token.
    Tokens,
    /// `r`: one row a token whose logits are wanted.
    Outputs,
}

/// Columns `start..start + width` of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotView {
    /// The slot.
    pub slot: SlotId,
    /// First column.
    pub start: usize,
    /// Number of columns.
    pub width: usize,
}

/// The KV cache of one layer: keys and values `[positions, g, e]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvDecl {
    /// g.
    pub heads: usize,
    /// e.
    pub head_width: usize,
}

/// Rotary frequencies; pairing is always "half": column `i` turns with column `i + width / 2`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeDecl {
    /// Columns of a head that rotate (even); the rest pass unchanged.
    pub width: usize,
    /// How the angle speeds are found.
    pub speeds: RopeSpeeds,
    /// Factor on sine and cosine (YaRN's and LongRoPE's attention factor), else 1.
    pub amplitude: f32,
}

/// Angle per position of each pair, `[width / 2]`.
///
/// "Length" is a token's entry of [`crate::StepInput::rope_lens`]: the length its sequence had
/// when the token was first computed (the whole prompt for prompt tokens).
#[derive(Debug, Clone, PartialEq)]
pub enum RopeSpeeds {
    /// The same at every length.
    Fixed(Vec<f32>),
    /// `long` once the length exceeds `switch`, `short` before (LongRoPE).
    Switched {
        /// Speeds up to `switch`.
        short: Vec<f32>,
        /// Speeds beyond.
        long: Vec<f32>,
        /// Last length of the short table.
        switch: u32,
    },
    /// NTK by current length: with `l = max(length, trained)` the base is
    /// `theta * (factor * l / trained - (factor - 1)) ^ (width / (width - 2))`.
    DynamicNtk {
        /// Base.
        theta: f32,
        /// Scaling factor.
        factor: f32,
        /// Context length of training.
        trained: u32,
    },
}

/// Which keys a query at position p sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Positions `0..=p`.
    Causal,
    /// The last `w` positions: `p - w + 1 ..= p`.
    Window(u32),
}

/// Elementwise function of the feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
}

/// Heads packed side by side in the columns of a slot: head `i` is
/// `start + i * width .. start + (i + 1) * width`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// The slot.
    pub slot: SlotId,
    /// First column of the first head.
    pub start: usize,
    /// Number of heads.
    pub count: usize,
    /// Columns of a head, e.
    pub width: usize,
}

impl Heads {
    /// The columns as one view.
    pub fn view(&self) -> SlotView {
        SlotView { slot: self.slot, start: self.start, width: self.count * self.width }
    }
}

/// A coarse operation. `t` rows unless said otherwise.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// `out[t] = table[tokens[t]]`.
    Embed {
        /// `[v, d]`.
        table: WeightId,
        /// `[t, d]`.
        out: SlotId,
    },
    /// Root mean square norm with the residual add before it: where `add` is given,
    /// `x += add` first (x is updated in place); then `out = x / sqrt(mean(x^2) + eps) * weight`.
    Norm {
        /// Residual stream `[t, d]`, updated when `add` is given.
        x: SlotId,
        /// `[t, d]`.
        add: Option<SlotId>,
        /// `[1, d]`.
        weight: WeightId,
        /// Added to the mean square.
        eps: f32,
        /// `[t, d]`.
        out: SlotId,
    },
    /// `out = x * weight^T + bias`; any rows.
    Linear {
        /// `[rows, k]`.
        x: SlotId,
        /// `[n, k]`.
        weight: WeightId,
        /// `[1, n]`.
        bias: Option<WeightId>,
        /// `[rows, n]`, same kind of rows as `x`.
        out: SlotView,
    },
    /// Root mean square norm of each head in place, one weight for all heads.
    HeadNorm {
        /// Heads to normalise.
        heads: Heads,
        /// `[1, e]`.
        weight: WeightId,
        /// Added to the mean square.
        eps: f32,
    },
    /// Rotates heads in place by their token's position.
    Rope {
        /// Heads to rotate.
        heads: Heads,
        /// Table.
        rope: RopeId,
    },
    /// Stores keys and values of the step's tokens at their positions.
    KvWrite {
        /// Destination.
        layer: KvLayer,
        /// g heads of keys.
        k: Heads,
        /// g heads of values.
        v: Heads,
    },
    /// `out = softmax(scale * q k^T) v` over the visible positions of the token's sequence;
    /// query head `i` reads KV head `i * g / h`.
    Attend {
        /// h query heads.
        q: Heads,
        /// Keys and values.
        layer: KvLayer,
        /// Visible positions.
        mask: Mask,
        /// Factor on the scores.
        scale: f32,
        /// `[t, h * e]`.
        out: SlotId,
    },
    /// `out = f(x[.., ..f]) * x[.., f..]` (gated: x is `[t, 2 f]`, out `[t, f]`).
    Activate {
        /// The function.
        kind: Activation,
        /// Gate then up.
        x: SlotId,
        /// Product.
        out: SlotId,
    },
    /// Keeps the rows whose logits are wanted: `out[r] = x[output_rows[r]]`.
    Gather {
        /// `[t, d]`.
        x: SlotId,
        /// `[r, d]`.
        out: SlotId,
    },
}

impl Op {
    /// Short name, as plans print it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Embed { .. } => "embed",
            Self::Norm { add: None, .. } => "norm",
            Self::Norm { add: Some(_), .. } => "add+norm",
            Self::Linear { .. } => "linear",
            Self::HeadNorm { .. } => "head-norm",
            Self::Rope { .. } => "rope",
            Self::KvWrite { .. } => "kv-write",
            Self::Attend { .. } => "attend",
            Self::Activate { .. } => "activate",
            Self::Gather { .. } => "gather",
        }
    }

    /// Weights this op reads.
    pub fn weights(&self) -> Vec<WeightId> {
        match *self {
            Self::Embed { table, .. } => vec![table],
            Self::Norm { weight, .. } | Self::HeadNorm { weight, .. } => vec![weight],
            Self::Linear { weight, bias, .. } => std::iter::once(weight).chain(bias).collect(),
            Self::Rope { .. }
            | Self::KvWrite { .. }
            | Self::Attend { .. }
            | Self::Activate { .. }
            | Self::Gather { .. } => vec![],
        }
    }

    /// Slots this op reads (an op that updates a slot in place reads and writes it).
    pub fn reads(&self) -> Vec<SlotId> {
        match *self {
            Self::Embed { .. } => vec![],
            Self::Norm { x, add, .. } => std::iter::once(x).chain(add).collect(),
            Self::Linear { x, .. } | Self::Activate { x, .. } | Self::Gather { x, .. } => vec![x],
            Self::HeadNorm { heads, .. } | Self::Rope { heads, .. } => vec![heads.slot],
            Self::KvWrite { k, v, .. } => vec![k.slot, v.slot],
            Self::Attend { q, .. } => vec![q.slot],
        }
    }

    /// Slots this op writes.
    pub fn writes(&self) -> Vec<SlotId> {
        match *self {
            Self::Embed { out, .. } | Self::Attend { out, .. } => vec![out],
            Self::Activate { out, .. } | Self::Gather { out, .. } => vec![out],
            Self::Norm { x, add, out, .. } => {
                add.map(|_| x).into_iter().chain(std::iter::once(out)).collect()
            }
            Self::Linear { out, .. } => vec![out.slot],
            Self::HeadNorm { heads, .. } | Self::Rope { heads, .. } => vec![heads.slot],
            Self::KvWrite { .. } => vec![],
        }
    }
}

impl Program {
    /// Bytes of all weights at their leanest.
    pub fn weight_bytes(&self) -> usize {
        self.weights.iter().map(|w| w.format.bytes(w.shape)).sum()
    }

    /// Bytes of weights one decoded token must read: every weight once, of embeddings one row.
    pub fn bytes_per_token(&self) -> usize {
        self.steps.iter().map(|step| self.step_weight_bytes(step)).sum()
    }

    /// Bytes of weights that one row makes `step` read.
    pub fn step_weight_bytes(&self, step: &Step) -> usize {
        let bytes = |id: &WeightId| {
            let decl = &self.weights[id.index()];
            let all = decl.format.bytes(decl.shape);
            if matches!(step.op, Op::Embed { .. }) { all / decl.shape[0].max(1) } else { all }
        };
        step.op.weights().iter().map(bytes).sum()
    }

    /// KV elements (keys and values) of one token over all layers.
    pub fn kv_elements_per_token(&self) -> usize {
        self.kv.iter().map(|kv| 2 * kv.heads * kv.head_width).sum()
    }

    /// The id of the slot called `label`.
    pub fn slot(&self, label: &str) -> Option<SlotId> {
        self.slots.iter().position(|s| s.label == label).map(|i| SlotId(i as u32))
    }
}

/// Prints the plan: one line a step with its slots, weights and bytes.
impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, step) in self.steps.iter().enumerate() {
            let names = |ids: Vec<SlotId>| {
                let one = |id: &SlotId| {
                    let slot = &self.slots[id.index()];
                    let rows = if slot.rows == Rows::Tokens { 't' } else { 'r' };
                    format!("{}[{rows},{}]", slot.label, slot.width)
                };
                ids.iter().map(one).collect::<Vec<_>>().join(" ")
            };
            let weights = step.op.weights();
            let weights = weights.iter().map(|id| {
                let w = &self.weights[id.index()];
                format!("{}x{} {}", w.shape[0], w.shape[1], w.format)
            });
            writeln!(
                f,
                "{i:4}  {:<10} {:<28} {} -> {}  {}  {} B",
                step.op.name(),
                step.label,
                names(step.op.reads()),
                names(step.op.writes()),
                weights.collect::<Vec<_>>().join(", "),
                self.step_weight_bytes(step),
            )?;
        }
        Ok(())
    }
}
