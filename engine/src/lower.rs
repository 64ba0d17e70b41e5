//! From a [`ModelSpec`] and the ids of its weights to a [`Program`]: about ten steps a layer.
//!
//! ```text
//! norm(+delta)  qkv  [q_norm k_norm]  rope  kv  attend  [norm]  out
//! norm(+delta)  gate_up  act  [norm]  down
//! ```
//! Not here: model families, files, tensor names. Input is data that was checked when it was
//! made; the backends validate the program again.

use crate::spec::{AttnSpec, LayerSpec, ModelSpec};
use kernels::Program;
use kernels::program::{
    Heads, KvDecl, KvLayer, Op, RopeDecl, RopeId, Rounding, Rows, SlotDecl, SlotId, SlotView, Step,
    WeightDecl, WeightId,
};

/// The weights of a model by their role.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Declarations by [`WeightId`].
    pub decls: Vec<WeightDecl>,
    /// `[v, d]`.
    pub embed: WeightId,
    /// One entry a layer.
    pub layers: Vec<LayerWeights>,
    /// `[1, d]`, the norm before the head.
    pub norm: WeightId,
    /// `[v, d]`; the embedding's id where they are one weight.
    pub head: WeightId,
}

/// The weights of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerWeights {
    /// Norm before attention.
    pub attn_norm: WeightId,
    /// q, k, v stacked in one matrix, or one after another where they cannot be.
    pub qkv: Vec<Projection>,
    /// Norms of the q and the k heads, where there are such.
    pub qk_norms: Option<[WeightId; 2]>,
    /// Norm before the output projection of attention, where there is one.
    pub out_norm: Option<WeightId>,
    /// Output projection of attention.
    pub out: Projection,
    /// Norm before the feed-forward block.
    pub mlp_norm: WeightId,
    /// Gate and up stacked, or one after the other.
    pub gate_up: Vec<Projection>,
    /// Norm before the output projection of the feed-forward block, where there is one.
    pub down_norm: Option<WeightId>,
    /// Output projection of the feed-forward block.
    pub down: Projection,
}

/// A linear module; its width is the row count of its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Projection {
    /// `[n, k]`.
    pub weight: WeightId,
    /// `[1, n]`.
    pub bias: Option<WeightId>,
}

/// Lowers a model.
pub fn lower(spec: &ModelSpec, layout: Layout) -> Program {
    let mut lowering = Lowering {
        program: Program {
            weights: layout.decls,
            slots: Vec::new(),
            ropes: Vec::new(),
            kv: Vec::new(),
            steps: Vec::new(),
            logits: SlotId(0),
        },
    };
    let hidden = lowering.slot("hidden", Rows::Tokens, spec.width);
    let normed = lowering.slot("normed", Rows::Tokens, spec.width);
    let delta = lowering.slot("delta", Rows::Tokens, spec.width);
    let stream = Stream { hidden, normed, delta };
    lowering.step("embed".to_owned(), Op::Embed { table: layout.embed, out: hidden });
    for (i, (layer, weights)) in spec.layers.iter().zip(&layout.layers).enumerate() {
        lowering.layer(i, layer, weights, stream);
    }
    lowering.head(spec, [layout.norm, layout.head], stream);
    lowering.program
}

/// The slots that live through all layers.
#[derive(Clone, Copy)]
struct Stream {
    /// Residual stream.
    hidden: SlotId,
    /// Input of the next block.
    normed: SlotId,
    /// Output of the last block, not yet added to the stream.
    delta: SlotId,
}

struct Lowering {
    program: Program,
}

impl Lowering {
    fn layer(&mut self, i: usize, layer: &LayerSpec, weights: &LayerWeights, stream: Stream) {
        let Stream { hidden: x, normed: out, delta } = stream;
        // Only the first block has nothing to add before it.
        let add = (i > 0).then_some(delta);
        let eps = layer.norm_eps;
        let norm = Op::Norm { x, add, weight: weights.attn_norm, eps, out };
        self.step(format!("layers.{i}.attn.norm"), norm);
        self.attention(i, &layer.attn, weights, stream);
        let norm = Op::Norm { x, add: Some(delta), weight: weights.mlp_norm, eps, out };
        self.step(format!("layers.{i}.mlp.norm"), norm);
        let gate_up = self.slot("gate_up", Rows::Tokens, 2 * layer.mlp.width);
        self.round_coarsely(&weights.gate_up);
        self.linears(out, &weights.gate_up, gate_up);
        let act = self.slot("act", Rows::Tokens, layer.mlp.width);
        let activate = Op::Activate { kind: layer.mlp.activation, x: gate_up, out: act };
        self.step(format!("layers.{i}.mlp.act"), activate);
        let norm = layer.mlp.down_norm_eps.zip(weights.down_norm);
        let act = self.normed(format!("layers.{i}.mlp.down_norm"), act, norm);
        self.linears(act, &[weights.down], delta);
    }

    fn attention(&mut self, i: usize, attn: &AttnSpec, weights: &LayerWeights, stream: Stream) {
        let (h, g, width) = (attn.heads, attn.kv_heads, attn.head_width);
        let slot = self.slot("qkv", Rows::Tokens, (h + 2 * g) * width);
        self.linears(stream.normed, &weights.qkv, slot);
        let heads = |first: usize, count| Heads { slot, start: first * width, count, width };
        let (q, k, v) = (heads(0, h), heads(h, g), heads(h + g, g));
        let label = |name: &str| format!("layers.{i}.attn.{name}");
        if let (Some(eps), Some([q_norm, k_norm])) = (attn.qk_norm_eps, weights.qk_norms) {
            self.step(label("q_norm"), Op::HeadNorm { heads: q, weight: q_norm, eps });
            self.step(label("k_norm"), Op::HeadNorm { heads: k, weight: k_norm, eps });
        }
        let rope = self.rope(&attn.rope);
        // q and k lie side by side and turn alike.
        self.step(label("rope"), Op::Rope { heads: heads(0, h + g), rope });
        let layer = KvLayer(self.program.kv.len() as u32);
        self.program.kv.push(KvDecl { heads: g, head_width: width });
        self.step(label("kv"), Op::KvWrite { layer, k, v });
        let out = self.slot("attn", Rows::Tokens, h * width);
        let attend = Op::Attend { q, layer, mask: attn.mask, scale: attn.scale, out };
        self.step(label("attend"), attend);
        let out = self.normed(label("out_norm"), out, attn.out_norm_eps.zip(weights.out_norm));
        self.linears(out, &[weights.out], stream.delta);
    }

    /// Where `x` is after `norm` (epsilon and weight): in a slot of its own, or as it was where
    /// there is none.
    fn normed(&mut self, label: String, x: SlotId, norm: Option<(f32, WeightId)>) -> SlotId {
        let Some((eps, weight)) = norm else { return x };
        let SlotDecl { label: slot, rows, width } = self.program.slots[x.index()].clone();
        let out = self.slot(&format!("{slot}_normed"), rows, width);
        self.step(label, Op::Norm { x, add: None, weight, eps, out });
        out
    }

    fn head(&mut self, spec: &ModelSpec, [norm, head]: [WeightId; 2], stream: Stream) {
        let Stream { hidden: x, normed, delta } = stream;
        let last = self.slot("last", Rows::Outputs, spec.width);
        let logits = self.slot("logits", Rows::Outputs, spec.vocab);
        let add = (!spec.layers.is_empty()).then_some(delta);
        let eps = spec.final_norm_eps;
        self.step("norm".to_owned(), Op::Norm { x, add, weight: norm, eps, out: normed });
        self.step("gather".to_owned(), Op::Gather { x: normed, out: last });
        let out = SlotView { slot: logits, start: 0, width: spec.vocab };
        self.step("head".to_owned(), Op::Linear { x: last, weight: head, bias: None, out });
        self.program.logits = logits;
    }

    /// Lets activations be rounded coarsely before these. Before gates and what they let pass that costs the trained
    /// models of the tests at most 0.00003 nats a token, before `q`, `k` and `v` or before `down` up to 0.0002.
    fn round_coarsely(&mut self, projections: &[Projection]) {
        for projection in projections {
            self.program.weights[projection.weight.index()].rounding = Rounding::Coarse;
        }
    }

    /// Projects `x` into the columns of `slot`, one linear after another.
    fn linears(&mut self, x: SlotId, projections: &[Projection], slot: SlotId) {
        let mut start = 0;
        for &Projection { weight, bias } in projections {
            let decl = &self.program.weights[weight.index()];
            let (label, width) = (decl.label.clone(), decl.shape[0]);
            let out = SlotView { slot, start, width };
            self.step(label, Op::Linear { x, weight, bias, out });
            start += width;
        }
    }

    fn step(&mut self, label: String, op: Op) {
        self.program.steps.push(Step { op, label });
    }

    /// The slot called `label`; layers share it. One of another width gets a name of its own.
    fn slot(&mut self, label: &str, rows: Rows, width: usize) -> SlotId {
        let taken = self.program.slot(label).map(|id| self.program.slots[id.index()].width);
        let label = match taken {
            Some(other) if other != width => format!("{label}_{width}"),
            _ => label.to_owned(),
        };
        self.program.slot(&label).unwrap_or_else(|| {
            self.program.slots.push(SlotDecl { label, rows, width });
            SlotId(self.program.slots.len() as u32 - 1)
        })
    }

    /// The rotary table equal to `decl`, declared once.
    fn rope(&mut self, decl: &RopeDecl) -> RopeId {
        let known = self.program.ropes.iter().position(|r| r == decl);
        let index = known.unwrap_or_else(|| {
            self.program.ropes.push(decl.clone());
            self.program.ropes.len() - 1
        });
        RopeId(index as u32)
    }
}

#[cfg(test)]
#[path = "lower_tests.rs"]
mod tests;
