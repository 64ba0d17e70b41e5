//! Phases, memory and barriers of a planned program.

use super::super::testing::GroupedSpec;
use super::*;
use crate::program::{
    Activation, Heads, KvDecl, KvLayer, Mask, RopeDecl, RopeSpeeds, SlotDecl, Step, WeightDecl,
};
use quant::{FloatType, Format};

const LIMITS: StepLimits = StepLimits {
    tokens: 3,
    sequences: 2,
    outputs: 2,
    blocks: 1,
    block_len: 16,
    context_len: 16,
    trace: false,
};

/// One attention layer in front of a head; all linears are quantized, 64 wide.
fn program() -> Program {
    let slot = |label: &str, rows, width| SlotDecl { label: label.to_owned(), rows, width };
    let [x, h, qkv, attn, last, logits] = [0, 1, 2, 3, 4, 5].map(SlotId);
    let weight = WeightId(0);
    let heads = |start, count| Heads { slot: qkv, start, count, width: 16 };
    let layer = KvLayer(0);
    let whole = |slot, width| SlotView { slot, start: 0, width };
    let ops = vec![
        Op::Embed { table: weight, out: x },
        Op::Norm { x, add: None, weight, eps: 0.0, out: h },
        Op::Linear { x: h, weight, bias: None, out: whole(qkv, 64) },
        Op::HeadNorm { heads: heads(0, 2), weight, eps: 0.0 },
        Op::Rope { heads: heads(0, 3), rope: RopeId(0) },
        Op::KvWrite { layer, k: heads(32, 1), v: heads(48, 1) },
        Op::Attend { q: heads(0, 2), layer, mask: Mask::Causal, scale: 1.0, out: attn },
        Op::Activate { kind: Activation::Silu, x: h, out: attn },
        Op::Gather { x, out: last },
        Op::Linear { x: last, weight, bias: None, out: whole(logits, 64) },
    ];
    Program {
        weights: vec![WeightDecl::new("w", [64, 64], Format::Dense(FloatType::F32))],
        slots: vec![
            slot("x", Rows::Tokens, 64),
            slot("h", Rows::Tokens, 64),
            slot("qkv", Rows::Tokens, 64),
            slot("attn", Rows::Tokens, 32),
            slot("last", Rows::Outputs, 64),
            slot("logits", Rows::Outputs, 64),
        ],
        ropes: vec![RopeDecl {
            width: 16,
            speeds: RopeSpeeds::Fixed(vec![1.0; 8]),
            amplitude: 1.0,
        }],
        kv: vec![KvDecl { heads: 1, head_width: 16 }],
        steps: ops.into_iter().map(|op| Step { label: op.name().to_owned(), op }).collect(),
        logits,
    }
}

fn weights() -> Vec<Stored> {
    let spec = GroupedSpec { n: 64, k: 64, ..GroupedSpec::default() };
    vec![Stored::Packed(spec.packed())]
}

/// Names of the phases, `|` where a barrier follows.
fn names(plan: &Plan) -> String {
    let name = |planned: &Planned| {
        let name = match &planned.phase {
            Phase::RopeTables => "tables",
            Phase::Quantize { by_rows: true, .. } => "quantize-rows",
            Phase::Quantize { by_rows: false, .. } => "quantize",
            Phase::ActivateQuantize { .. } => "activate-quantize",
            Phase::Op(op) => op.name(),
        };
        format!("{name}{}", if planned.barrier { " | " } else { " " })
    };
    plan.phases.iter().map(name).collect()
}

#[test]
fn row_by_row_phases_need_no_barrier() {
    let plan = Plan::new(&program(), &weights(), &LIMITS);
    assert_eq!(
        names(&plan),
        "tables embed norm quantize-rows | linear | head-norm rope kv-write | attend | \
         activate | gather | quantize | linear | "
    );
}

#[test]
fn chains_are_the_phases_between_barriers() {
    let plan = Plan::new(&program(), &weights(), &LIMITS);
    let tokens = Some(Rows::Tokens);
    let expected = [
        (0..4, tokens),
        (4..5, None),
        (5..8, tokens),
        (8..9, None),
        (9..10, None),
        (10..11, None),
        (11..12, None),
        (12..13, None),
    ];
    assert_eq!(plan.chains, expected.map(|(phases, rows)| Chain { phases, rows }));
}

#[test]
fn an_activation_is_quantized_with_the_columns_in_order() {
    let mut program = program();
    let [x, h, attn] = [1, 2, 3].map(SlotId);
    let out = SlotView { slot: SlotId(0), start: 0, width: 64 };
    let ops = [
        Op::Activate { kind: Activation::Silu, x: h, out: x },
        Op::Linear { x, weight: WeightId(0), bias: None, out },
        Op::Activate { kind: Activation::Silu, x: h, out: attn },
        Op::Linear { x, weight: WeightId(0), bias: None, out },
    ];
    program.steps = ops.map(|op| Step { label: op.name().to_owned(), op }).into();
    let plan = Plan::new(&program, &weights(), &LIMITS);
    let expected = "tables | activate-quantize | linear | activate | quantize | linear | ";
    assert_eq!(names(&plan), expected);
    assert_eq!(plan.quads, 8 * 16, "room for an activation's quads");
    for spec in [
        GroupedSpec { act_order: true, ..GroupedSpec::default() },
        GroupedSpec { group: 36, k: 72, ..GroupedSpec::default() },
    ] {
        let packed = vec![Stored::Packed(spec.packed())];
        let plan = Plan::new(&program, &packed, &LIMITS);
        assert!(!names(&plan).contains("activate-quantize"), "{spec:?}");
    }
}

#[test]
fn a_chain_ends_where_a_slot_reuses_another_s_memory() {
    let mut program = program();
    // `attn` holds the input of a norm, dies, and the next norm's output may take its place.
    let (x, weight) = (SlotId(0), WeightId(0));
    let norm = |x, out| Op::Norm { x, add: None, weight, eps: 0.0, out };
    let ops = [
        Op::Embed { table: weight, out: x },
        norm(x, SlotId(1)),
        norm(SlotId(1), SlotId(2)),
        Op::Gather { x: SlotId(2), out: SlotId(5) },
    ];
    program.steps = ops.map(|op| Step { label: op.name().to_owned(), op }).into();
    let plan = Plan::new(&program, &weights(), &LIMITS);
    let [first, third] = [0, 2].map(|slot| plan.slots[slot].place.offset);
    assert_eq!(first, third, "the plan of memory is expected to reuse x for the second norm");
    assert_eq!(names(&plan), "tables embed norm | norm | gather | ");
    let traced = Plan::new(&program, &weights(), &StepLimits { trace: true, ..LIMITS });
    assert_eq!(names(&traced), "tables embed norm norm | gather | ");
}

#[test]
fn scratch_fits_the_longest_input() {
    let plan = Plan::new(&program(), &weights(), &LIMITS);
    // three token rows of 64 columns in one block each, and room to round them up to eight
    assert_eq!((plan.quads, plan.blocks, plan.rope_len), (8 * 16, 8, 3 * 16));
}
