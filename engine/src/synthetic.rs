//! Models of made-up weights: the sizes of a real one, values from a seeded generator.
//!
//! For measuring time and memory without a checkpoint ([`SyntheticModel`]), or one kind of linear
//! alone ([`linears`]). The programs are lowered as those of real models are; activations stay
//! finite, texts mean nothing. Not here: which sizes exist ([`crate::families::shapes`]).

use crate::lower::{LayerWeights, Layout, Projection, lower};
use crate::spec::{LayerSpec, ModelSpec};
use kernels::program::{
    Op, Program, Rounding, Rows, SlotDecl, SlotId, SlotView, Step, WeightDecl, WeightId,
};
use kernels::{Error, WeightSource};
use quant::{Dense, FloatType, Format, Grouped, GroupedParts, GroupedShape, Weight};
use std::ops::Range;

/// A model without a checkpoint.
#[derive(Debug)]
pub struct SyntheticModel {
    spec: ModelSpec,
    program: Program,
}

/// What the linears of a made-up model are stored as. Groups are an upper bound: a matrix whose
/// width they do not divide gets the greatest common divisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Formats {
    /// Linears of the layers.
    pub layers: Format,
    /// The head; none keeps the embedding's f16, and shares its matrix where `spec` says so.
    pub head: Option<Format>,
}

impl SyntheticModel {
    /// A model of `spec` with an f16 embedding and linears in `formats`; makes no weight yet.
    pub fn new(spec: ModelSpec, formats: Formats) -> Self {
        let mut layout = Declarations::default();
        let table = [spec.vocab, spec.width];
        let embed = layout.add("embed", table, EMBEDDING);
        let layers = spec.layers.iter().enumerate();
        let layers = layers.map(|(i, l)| layout.layer(i, l, spec.width, formats.layers)).collect();
        let norm = layout.vector("norm", spec.width);
        let head = match formats.head {
            None if spec.tied_head => embed,
            None => layout.add("head", table, EMBEDDING),
            Some(format) => layout.add("head", table, format),
        };
        let program = lower(&spec, Layout { decls: layout.0, embed, layers, norm, head });
        Self { spec, program }
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What it computes.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Its weights, made one at a time and always the same.
    pub fn weights(&self) -> MadeUp<'_> {
        MadeUp { decls: &self.program.weights }
    }
}

/// Embeddings are looked up row by row, so nothing is gained by quantizing them.
const EMBEDDING: Format = Format::Dense(FloatType::F16);

#[derive(Default)]
struct Declarations(Vec<WeightDecl>);

impl Declarations {
    fn add(&mut self, label: &str, shape: [usize; 2], format: Format) -> WeightId {
        let format = fitted(format, shape[1]);
        self.0.push(WeightDecl::new(label, shape, format));
        WeightId(self.0.len() as u32 - 1)
    }

    fn vector(&mut self, label: &str, len: usize) -> WeightId {
        self.add(label, [1, len], Format::Dense(FloatType::F16))
    }

    fn layer(&mut self, i: usize, layer: &LayerSpec, d: usize, format: Format) -> LayerWeights {
        let label = |tail: &str| format!("layers.{i}.{tail}");
        let (a, f, mlp_bias) = (&layer.attn, layer.mlp.width, layer.mlp.bias);
        let q_width = a.heads * a.head_width;
        let qkv_width = q_width + 2 * a.kv_heads * a.head_width;
        let mut linear = |name: &str, shape: [usize; 2], bias: bool| Projection {
            weight: self.add(&label(name), shape, format),
            bias: bias.then(|| self.vector(&label(&format!("{name}{BIAS}")), shape[0])),
        };
        let qkv = vec![linear("attn.qkv", [qkv_width, d], a.qkv_bias)];
        let out = linear("attn.out", [d, q_width], a.out_bias);
        let gate_up = vec![linear("mlp.gate_up", [2 * f, d], mlp_bias)];
        let down = linear("mlp.down", [d, f], mlp_bias);
        LayerWeights {
            attn_norm: self.vector(&label("attn.norm"), d),
            qkv,
            qk_norms: a.qk_norm_eps.map(|_| {
                ["attn.q_norm", "attn.k_norm"].map(|name| self.vector(&label(name), a.head_width))
            }),
            out_norm: a.out_norm_eps.map(|_| self.vector(&label("attn.out_norm"), q_width)),
            out,
            mlp_norm: self.vector(&label("mlp.norm"), d),
            gate_up,
            down_norm: layer.mlp.down_norm_eps.map(|_| self.vector(&label("mlp.down_norm"), f)),
            down,
        }
    }
}

/// `format` for rows of `k` columns.
fn fitted(format: Format, k: usize) -> Format {
    let Format::Grouped { bits, group, act_order } = format else { return format };
    let (mut a, mut b) = (group, k);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    Format::Grouped { bits, group: a, act_order }
}

/// A program of `copies` linears `[n, k]` that all read the same input, and nothing else of
/// weight: enough copies leave every cache, so that each step reads all of them from memory.
pub fn linears(format: Format, [n, k]: [usize; 2], rounding: Rounding, copies: usize) -> Program {
    let mut weights = Declarations::default();
    let table = weights.add("table", [2, k], EMBEDDING);
    let [x, y, out] = [0, 1, 2].map(SlotId);
    let mut ops = vec![Op::Embed { table, out: x }];
    for i in 0..copies {
        let weight = weights.add(&format!("linear.{i}"), [n, k], format);
        weights.0[weight.index()].rounding = rounding;
        let out = SlotView { slot: y, start: 0, width: n };
        ops.push(Op::Linear { x, weight, bias: None, out });
    }
    ops.push(Op::Gather { x: y, out });
    let slot = |label: &str, rows, width| SlotDecl { label: label.to_owned(), rows, width };
    Program {
        weights: weights.0,
        slots: vec![
            slot("x", Rows::Tokens, k),
            slot("y", Rows::Tokens, n),
            slot("out", Rows::Outputs, n),
        ],
        ropes: vec![],
        kv: vec![],
        steps: ops.into_iter().map(|op| Step { label: op.name().to_owned(), op }).collect(),
        logits: out,
    }
}

/// Ends the labels of vectors that are added; all others are factors.
const BIAS: &str = ".bias";

/// Makes any declared weight: random matrices of about `1 / sqrt(k)`, small biases, factors of 1.
#[derive(Debug, Clone, Copy)]
pub struct MadeUp<'a> {
    decls: &'a [WeightDecl],
}

impl<'a> MadeUp<'a> {
    /// Weights as `decls` declares them; a row's values follow from its place and width alone.
    pub fn new(decls: &'a [WeightDecl]) -> Self {
        Self { decls }
    }
}

impl WeightSource for MadeUp<'_> {
    fn load(&self, id: WeightId, rows: Range<usize>) -> Result<Weight<'_>, Error> {
        let decl = &self.decls[id.index()];
        let [n, k] = [rows.len(), decl.shape[1]];
        // Every row has a seed of its own, so that it is the same whatever else is made.
        let rows = rows.map(|row| Random(u64::from(id.0) << 32 | row as u64));
        let made = match decl.format {
            Format::Dense(float) => {
                let factors = decl.shape[0] == 1 && !decl.label.ends_with(BIAS);
                let bytes = rows.flat_map(|row| floats(float, k, factors, row)).collect::<Vec<_>>();
                Dense::new(&decl.label, float, [n, k], bytes).map(Weight::Dense)
            }
            Format::Grouped { bits, group, act_order } => {
                let shape = GroupedShape { n, k, group, bits };
                let perm = act_order.then(|| shuffled(k, Random(u64::from(id.0))));
                let parts = GroupedParts { perm, ..codes(shape, rows) };
                Grouped::new(&decl.label, parts).map(Weight::Grouped)
            }
        };
        made.map_err(|e| Error::Source { label: decl.label.clone(), source: Box::new(e) })
    }
}

/// `k` floats of random signs and mantissas under one exponent, magnitudes in 2^-6..2^-5; or ones.
fn floats(float: FloatType, k: usize, ones: bool, mut random: Random) -> Vec<u8> {
    // Sign and mantissa bits to keep, exponent bits to set, the number 1.
    let [keep, exponent, one] = match float {
        FloatType::F32 => [0x807f_ffff, 0x3c80_0000, 0x3f80_0000],
        FloatType::F16 => [0x83ff_83ff, 0x2400_2400, 0x3c00_3c00],
        FloatType::Bf16 => [0x807f_807f, 0x3c80_3c80, 0x3f80_3f80u32],
    };
    let len = k * float.bytes();
    // Whole words; the last one may hold a 16-bit float too many.
    let mut bytes = random.bytes(len.next_multiple_of(4));
    for word in bytes.as_chunks_mut::<4>().0 {
        let x = u32::from_le_bytes(*word);
        *word = if ones { one } else { x & keep | exponent }.to_le_bytes();
    }
    bytes.truncate(len);
    bytes
}

/// Random codes around a middle zero point. Scales are exact in f16, as those of most checkpoints.
fn codes(shape: GroupedShape, rows: impl Iterator<Item = Random>) -> GroupedParts {
    let GroupedShape { n, k, bits, .. } = shape;
    let levels = f32::from(bits.max_code()) + 1.0;
    // Uniform codes deviate by levels / sqrt(12).
    let base = (-(levels * (k as f32 / 12.0).sqrt()).log2().ceil()).exp2();
    let scale = |byte: u8| base * (1.0 + f32::from(byte % 64) / 64.0);
    let mut codes = Vec::with_capacity(n * bits.row_bytes(k));
    let mut scales = Vec::with_capacity(n * shape.groups());
    for mut row in rows {
        codes.extend(row.bytes(bits.row_bytes(k)));
        scales.extend(row.bytes(shape.groups()).into_iter().map(scale));
    }
    let zeros = vec![bits.max_code() / 2 + 1; scales.len()];
    GroupedParts { shape, scales, zeros, codes, perm: None }
}

/// The numbers below `len` in a random order.
fn shuffled(len: usize, mut random: Random) -> Vec<u32> {
    let mut order: Vec<u32> = (0..len as u32).collect();
    for i in (1..len).rev() {
        order.swap(i, (random.next() % (i as u64 + 1)) as usize);
    }
    order
}

/// The splitmix64 generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let (words, rest) = bytes.as_chunks_mut::<8>();
        words.iter_mut().for_each(|word| *word = self.next().to_le_bytes());
        rest.iter_mut().for_each(|byte| *byte = self.next() as u8);
        bytes
    }
}

#[cfg(test)]
#[path = "synthetic_tests.rs"]
mod tests;
