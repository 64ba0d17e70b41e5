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
            Phase::Gated { next: Some(_), .. } => "gated-int8",
            Phase::Gated { .. } => "gated",
            Phase::Op(Op::Attend { .. }) if planned.next.is_some() => "attend-quantize",
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

/// A feed-forward block of `width` columns between slots 1 and 0, and then a step that reads `read`; the gates
/// are in slot 2, and what they let pass in slot 3.
fn feed_forward(width: usize, read: u32) -> Program {
    let mut program = program();
    let [x, out, gates, passed] = [1, 0, 2, 3].map(SlotId);
    program.slots[2].width = 2 * width;
    program.slots[3].width = width;
    let linear = |x, weight, (slot, width)| {
        let out = SlotView { slot, start: 0, width };
        Op::Linear { x, weight: WeightId(weight), bias: None, out }
    };
    let ops = [
        linear(x, 0, (gates, 2 * width)),
        Op::Activate { kind: Activation::Silu, x: gates, out: passed },
        linear(passed, 1, (out, 64)),
        Op::Gather { x: SlotId(read), out: SlotId(5) },
    ];
    program.steps = ops.map(|op| Step { label: op.name().to_owned(), op }).into();
    program
}

/// The weights of [`feed_forward`], the first in pairs, the second as `down` has it.
fn gating(width: usize, down: &GroupedSpec) -> Vec<Stored> {
    let gates = GroupedSpec { n: 2 * width, k: 64, ..GroupedSpec::default() };
    let down = GroupedSpec { n: 64, k: width, ..*down };
    vec![Stored::Packed(gates.paired()), Stored::Packed(down.packed())]
}

#[test]
fn what_gates_let_pass_goes_to_int8_and_lies_in_no_slot() {
    let weights = gating(128, &GroupedSpec::default());
    let plan = Plan::new(&feed_forward(128, 0), &weights, &LIMITS);
    assert_eq!(names(&plan), "tables quantize-rows | gated-int8 | linear | gather | ");
    // Up to eight rows of 64 columns are read while up to eight of 128 are written.
    let passed = Int8Place { quads: 8 * 16, blocks: 8 };
    assert_eq!((plan.int8(SlotId(1)), plan.int8(SlotId(3))), (Int8Place::default(), passed));
    assert_eq!((plan.quads, plan.blocks), (8 * 16 + 8 * 32, 8 + 2 * 8));
    // Three rows of twice 128 columns, all there are, each some columns from the one before it.
    assert_eq!((plan.gate_room, plan.gates_together(3)), (3 * (256 + LANES), 2));
}

#[test]
fn it_goes_to_its_slot_if_the_next_linear_takes_it_otherwise_or_something_else_reads_it() {
    let (fine, expected) = (GroupedSpec::default(), "gated | quantize | linear | gather | ");
    let plan = Plan::new(&feed_forward(128, 3), &gating(128, &fine), &LIMITS);
    assert!(names(&plan).ends_with(expected), "read: {}", names(&plan));
    for down in [GroupedSpec { act_order: true, ..fine }, GroupedSpec { group: 8, ..fine }] {
        let plan = Plan::new(&feed_forward(128, 0), &gating(128, &down), &LIMITS);
        assert!(names(&plan).ends_with(expected), "{down:?}: {}", names(&plan));
        assert_eq!(plan.int8(SlotId(3)), Int8Place::default());
    }
}

#[test]
fn gates_that_are_not_paired_lie_in_their_slot() {
    let mut weights = gating(64, &GroupedSpec::default());
    let gates = GroupedSpec { n: 128, k: 64, ..GroupedSpec::default() };
    weights[0] = Stored::Packed(gates.packed());
    let plan = Plan::new(&feed_forward(64, 0), &weights, &LIMITS);
    let expected = "tables quantize-rows | linear | activate | quantize | linear | gather | ";
    assert_eq!(names(&plan), expected);
}

#[test]
fn a_member_has_room_for_the_gates_of_all_rows_that_it_takes_at_a_time() {
    let weights = gating(4096, &GroupedSpec::default());
    for tokens in [1, 3, 100, 512, 3000] {
        let limits = StepLimits { tokens, ..LIMITS };
        let plan = Plan::new(&feed_forward(4096, 0), &weights, &limits);
        for rows in [1, tokens.div_ceil(2), tokens] {
            let together = plan.gates_together(rows);
            let room = rows * stride(2 * PAIRED * together);
            assert!(room <= plan.gate_room, "{together} times {rows} of {tokens} rows");
        }
        let least = tokens * stride(2 * PAIRED);
        assert!(plan.gate_room <= GATE_ROOM.max(least), "{tokens} rows");
    }
}

#[test]
fn attention_makes_int8_where_heads_are_whole_blocks() {
    let mut program = program();
    let (attn, out) = (SlotId(3), SlotView { slot: SlotId(1), start: 0, width: 64 });
    program.steps.truncate(7);
    let op = Op::Linear { x: attn, weight: WeightId(1), bias: None, out };
    program.steps.push(Step { label: op.name().to_owned(), op });
    for (group, expected) in
        [(16, "attend-quantize | linear | "), (32, "attend | quantize | linear | ")]
    {
        let spec = GroupedSpec { n: 64, k: 32, group, ..GroupedSpec::default() };
        let weights =
            weights().into_iter().chain([Stored::Packed(spec.packed())]).collect::<Vec<_>>();
        let plan = Plan::new(&program, &weights, &LIMITS);
        assert!(names(&plan).ends_with(expected), "groups of {group}: {}", names(&plan));
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
