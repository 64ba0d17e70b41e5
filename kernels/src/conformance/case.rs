//! A conformance case: a tiny program around the op under test, its weights and some sequences.
//!
//! Input rows come from an f32 embedding, which every backend must copy exactly, so that the op
//! under test is the only one with an error. The logits are the rows of the observed slot.

use crate::program::{
    KvDecl, KvLayer, Op, Program, RopeDecl, RopeId, Rows, SlotDecl, SlotId, Step, TokenId,
    WeightDecl, WeightId,
};
use crate::{Error, WeightSource};
use quant::{Bits, Dense, FloatType, Format, Grouped, GroupedParts, GroupedShape, Weight};
use std::ops::Range;
use testkit::Rng;

/// Rows of every embedding table.
pub(super) const VOCAB: usize = 23;

/// A program with everything needed to run it.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) program: Program,
    pub(super) weights: Vec<Weight<'static>>,
    /// Tokens of each sequence.
    pub(super) sequences: Vec<Vec<TokenId>>,
    /// Prompt length of each sequence: what rotary speeds see as the length of early tokens.
    pub(super) prompts: Vec<usize>,
    pub(super) block_len: usize,
}

impl Case {
    /// Tokens of all sequences.
    pub(super) fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// The length that chooses rotary speeds for a position; see [`crate::program::RopeSpeeds`].
    pub(super) fn rope_len(&self, sequence: usize, position: usize) -> u32 {
        self.prompts[sequence].max(position + 1) as u32
    }
}

/// Delivers a case's weights.
#[derive(Debug)]
pub(super) struct Source<'a>(pub(super) &'a [Weight<'static>]);

impl WeightSource for Source<'_> {
    fn load(&self, id: WeightId, rows: Range<usize>) -> Result<Weight<'_>, Error> {
        Ok(self.0[id.index()].rows(rows))
    }
}

/// Puts a case together, step by step.
#[derive(Debug)]
pub(super) struct Builder {
    pub(super) rng: Rng,
    case: Case,
}

impl Builder {
    /// Starts a case with sequences of the given lengths; everything random follows from `seed`.
    pub(super) fn new(seed: u64, lens: &[usize], block_len: usize) -> Self {
        let mut rng = Rng::new(seed);
        let mut token = || TokenId(rng.below(VOCAB) as u32);
        let sequences = lens.iter().map(|len| (0..*len).map(|_| token()).collect()).collect();
        let program = Program {
            weights: vec![],
            slots: vec![],
            ropes: vec![],
            kv: vec![],
            steps: vec![],
            logits: SlotId(0),
        };
        let prompts = lens.iter().map(|len| len - len / 4).collect();
        let (name, weights) = (String::new(), vec![]);
        let case = Case { name, program, weights, sequences, prompts, block_len };
        Self { rng, case }
    }

    pub(super) fn weight(&mut self, weight: Weight<'static>) -> WeightId {
        let id = WeightId(self.case.weights.len() as u32);
        let decl = WeightDecl::new(format!("w{}", id.0), weight.shape(), weight.format());
        self.case.program.weights.push(decl);
        self.case.weights.push(weight);
        id
    }

    /// A vector `[1, width]` around 1, as norm weights are.
    pub(super) fn vector(&mut self, width: usize) -> WeightId {
        let values: Vec<f32> = self.rng.floats(width, 0.5).iter().map(|v| v + 1.0).collect();
        self.weight(Weight::Dense(Dense::from_f32([1, width], &values)))
    }

    pub(super) fn slot(&mut self, rows: Rows, width: usize) -> SlotId {
        let id = SlotId(self.case.program.slots.len() as u32);
        let label = format!("s{}", id.0);
        self.case.program.slots.push(SlotDecl { label, rows, width });
        id
    }

    pub(super) fn tokens_slot(&mut self, width: usize) -> SlotId {
        self.slot(Rows::Tokens, width)
    }

    pub(super) fn rope(&mut self, decl: RopeDecl) -> RopeId {
        self.case.program.ropes.push(decl);
        RopeId(self.case.program.ropes.len() as u32 - 1)
    }

    pub(super) fn kv(&mut self, heads: usize, head_width: usize) -> KvLayer {
        self.case.program.kv.push(KvDecl { heads, head_width });
        KvLayer(self.case.program.kv.len() as u32 - 1)
    }

    pub(super) fn step(&mut self, op: Op) {
        let label = format!("step{}", self.case.program.steps.len());
        self.case.program.steps.push(Step { op, label });
    }

    /// Input rows of `width` columns, up to `scale` in size; token 0 is a row of zeros and
    /// token 1 has one outlier column, fifty times the others.
    pub(super) fn input(&mut self, width: usize, scale: f32) -> SlotId {
        let mut table = self.rng.floats(VOCAB * width, scale);
        table[..width].fill(0.0);
        table[width + width / 2] = 50.0 * scale;
        let table = self.weight(Weight::Dense(Dense::from_f32([VOCAB, width], &table)));
        let out = self.tokens_slot(width);
        self.step(Op::Embed { table, out });
        out
    }

    /// Ends the program with the rows of `observed` as its logits.
    pub(super) fn observe(mut self, name: String, observed: SlotId) -> Case {
        let width = self.case.program.slots[observed.index()].width;
        let out = self.slot(Rows::Outputs, width);
        self.step(Op::Gather { x: observed, out });
        self.finish(name, out)
    }

    /// Ends the program with `logits`, a slot of output rows.
    pub(super) fn finish(mut self, name: String, logits: SlotId) -> Case {
        self.case.name = name;
        self.case.program.logits = logits;
        self.case
    }
}

/// What a random grouped weight looks like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grouping {
    pub(super) bits: Bits,
    pub(super) group: usize,
    pub(super) act_order: bool,
    /// Zero points differ between groups; otherwise all are half the code range.
    pub(super) asymmetric: bool,
    /// Scales are f16 numbers, as in most checkpoints; otherwise any f32.
    pub(super) f16_scales: bool,
}

impl Grouping {
    /// Symmetric, columns in order, f16 scales.
    pub(super) fn plain(bits: Bits, group: usize) -> Self {
        Self { bits, group, act_order: false, asymmetric: false, f16_scales: true }
    }

    /// Random codes over their whole range with values of about `[-1, 1]`.
    pub(super) fn weight(self, rng: &mut Rng, [n, k]: [usize; 2]) -> Weight<'static> {
        let Self { bits, group, act_order, asymmetric, f16_scales } = self;
        let shape = GroupedShape { n, k, group, bits };
        let (groups, max) = (n * shape.groups(), bits.max_code());
        let scale = |unit: f32| {
            let scale = (1.5 + unit) / f32::from(max);
            if f16_scales { half::f16::from_f32(scale).to_f32() } else { scale }
        };
        let codes = rng.bytes(n * bits.row_bytes(k));
        let scales = (0..groups).map(|_| scale(rng.signed())).collect();
        let mut zero =
            || if asymmetric { rng.below(usize::from(max) + 1) as u8 } else { max / 2 + 1 };
        let zeros = (0..groups).map(|_| zero()).collect();
        let perm = act_order.then(|| rng.permutation(k));
        let parts = GroupedParts { shape, codes, scales, zeros, perm };
        Weight::Grouped(Grouped::new("random", parts).unwrap())
    }
}

impl std::fmt::Display for Grouping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { bits, group, act_order, .. } = *self;
        let zeros = if self.asymmetric { " asym" } else { "" };
        let scales = if self.f16_scales { "" } else { " f32-scales" };
        write!(f, "{}{zeros}{scales}", Format::Grouped { bits, group, act_order })
    }
}

/// A float matrix of random values in `[-1, 1)`, rounded to its type.
pub(super) fn dense(rng: &mut Rng, float: FloatType, shape: [usize; 2]) -> Weight<'static> {
    let values = rng.floats(shape[0] * shape[1], 1.0);
    let bytes: Vec<u8> = match float {
        FloatType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        FloatType::F16 => {
            values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
        }
        FloatType::Bf16 => {
            values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
        }
    };
    Weight::Dense(Dense::new("random", float, shape, bytes).unwrap())
}
