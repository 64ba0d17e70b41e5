//! Small whole decoders with every op, for tests of invariance; errors add up over their layers,
//! so that they have no bounds.

use super::case::{Builder, Case, Grouping, VOCAB, dense};
use crate::program::{
    Activation, Heads, Mask, Op, RopeDecl, RopeId, RopeSpeeds, Rows, SlotId, SlotView, WeightId,
};
use quant::{Bits, FloatType};

/// Model width, four query heads and two KV heads of 16.
const WIDTH: usize = 64;
const HEAD: usize = 16;
/// Feed-forward width, a multiple of the groups.
const HIDDEN: usize = 96;

/// Decoders of two layers, the second with a window.
pub(super) fn decoders() -> Vec<Case> {
    let bits = [Bits::Four, Bits::Eight];
    bits.into_iter().flat_map(|bits| [4, 16].map(|block_len| decoder(bits, block_len))).collect()
}

fn decoder(bits: Bits, block_len: usize) -> Case {
    let mut b = Builder::new(12, &[37, 1, 18, 40], block_len);
    let x = b.input(WIDTH, 1.0);
    let speeds = RopeSpeeds::DynamicNtk { theta: 10000.0, factor: 2.0, trained: 24 };
    let rope = b.rope(RopeDecl { width: 12, speeds, amplitude: 1.0 });
    let mut layers = Layers { b, bits, x, rope, add: None };
    layers.layer(Mask::Causal);
    layers.layer(Mask::Window(11));
    let normed = layers.norm();
    let Layers { mut b, .. } = layers;
    let last = b.slot(Rows::Outputs, WIDTH);
    b.step(Op::Gather { x: normed, out: last });
    let head = dense(&mut b.rng, FloatType::F16, [VOCAB, WIDTH]);
    let (weight, slot) = (b.weight(head), b.slot(Rows::Outputs, VOCAB));
    let out = SlotView { slot, start: 0, width: VOCAB };
    b.step(Op::Linear { x: last, weight, bias: None, out });
    b.finish(format!("decoder: w{} blocks of {block_len}", bits.count()), slot)
}

/// A decoder under construction.
struct Layers {
    b: Builder,
    bits: Bits,
    /// Residual stream.
    x: SlotId,
    rope: RopeId,
    /// What the next norm adds to the residual stream.
    add: Option<SlotId>,
}

impl Layers {
    fn layer(&mut self, mask: Mask) {
        let normed = self.norm();
        let qkv = self.linear(normed, [8 * HEAD, WIDTH]);
        let attended = self.attention(qkv, mask);
        self.add = Some(self.linear(attended, [WIDTH, 4 * HEAD]));
        let normed = self.norm();
        let gate_up = self.linear(normed, [2 * HIDDEN, WIDTH]);
        let hidden = self.b.tokens_slot(HIDDEN);
        self.b.step(Op::Activate { kind: Activation::Silu, x: gate_up, out: hidden });
        self.add = Some(self.linear(hidden, [WIDTH, HIDDEN]));
    }

    fn norm(&mut self) -> SlotId {
        let (weight, out) = (self.b.vector(WIDTH), self.b.tokens_slot(WIDTH));
        self.b.step(Op::Norm { x: self.x, add: self.add, weight, eps: 1e-5, out });
        out
    }

    fn linear(&mut self, x: SlotId, [n, k]: [usize; 2]) -> SlotId {
        let weight = self.weight([n, k]);
        let slot = self.b.tokens_slot(n);
        self.b.step(Op::Linear {
            x,
            weight,
            bias: None,
            out: SlotView { slot, start: 0, width: n },
        });
        slot
    }

    fn weight(&mut self, shape: [usize; 2]) -> WeightId {
        let plain = Grouping::plain(self.bits, 32);
        let grouping = Grouping { asymmetric: true, act_order: shape[1] == WIDTH, ..plain };
        let weight = grouping.weight(&mut self.b.rng, shape);
        self.b.weight(weight)
    }

    fn attention(&mut self, slot: SlotId, mask: Mask) -> SlotId {
        let heads = |start: usize, count| Heads { slot, start: start * HEAD, count, width: HEAD };
        let (weight, layer) = (self.b.vector(HEAD), self.b.kv(2, HEAD));
        let out = self.b.tokens_slot(4 * HEAD);
        self.b.step(Op::HeadNorm { heads: heads(0, 6), weight, eps: 1e-6 });
        self.b.step(Op::Rope { heads: heads(0, 6), rope: self.rope });
        self.b.step(Op::KvWrite { layer, k: heads(4, 2), v: heads(6, 2) });
        self.b.step(Op::Attend { q: heads(0, 4), layer, mask, scale: 0.25, out });
        out
    }
}
