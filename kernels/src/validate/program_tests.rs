//! A small valid decoder layer, broken in one place at a time.

use super::*;
use crate::program::{Activation, Step};
use quant::FloatType;

const F32: Format = Format::Dense(FloatType::F32);
const W4: Format = Format::Grouped { bits: Bits::Four, group: 4, act_order: false };

/// Slots of [`layer`] in order.
const SLOTS: [(&str, Rows, usize); 8] = [
    ("x", Rows::Tokens, 8),
    ("normed", Rows::Tokens, 8),
    ("qkv", Rows::Tokens, 16),
    ("attended", Rows::Tokens, 8),
    ("gate_up", Rows::Tokens, 24),
    ("hidden", Rows::Tokens, 12),
    ("last", Rows::Outputs, 8),
    ("logits", Rows::Outputs, 11),
];

/// Weights of [`layer`] in order.
const WEIGHTS: [(&str, [usize; 2], Format); 8] = [
    ("embed", [11, 8], F32),
    ("norm", [1, 8], F32),
    ("qkv", [16, 8], W4),
    ("qkv.bias", [1, 16], F32),
    ("head_norm", [1, 4], F32),
    ("gate_up", [24, 8], W4),
    ("head", [11, 8], F32),
    ("down", [8, 12], W4),
];

fn slot(label: &str) -> SlotId {
    let at = SLOTS.iter().position(|slot| slot.0 == label);
    SlotId(at.unwrap() as u32)
}

fn weight(label: &str) -> WeightId {
    let at = WEIGHTS.iter().position(|weight| weight.0 == label);
    WeightId(at.unwrap() as u32)
}

fn whole(label: &str) -> SlotView {
    SlotView { slot: slot(label), start: 0, width: SLOTS[slot(label).index()].2 }
}

fn heads(start: usize, count: usize) -> Heads {
    Heads { slot: slot("qkv"), start, count, width: 4 }
}

fn linear(x: &str, w: &str, bias: Option<&str>, out: SlotView) -> Op {
    Op::Linear { x: slot(x), weight: weight(w), bias: bias.map(weight), out }
}

fn norm(add: Option<&str>) -> Op {
    let (x, out) = (slot("x"), slot("normed"));
    Op::Norm { x, add: add.map(slot), weight: weight("norm"), eps: 1e-5, out }
}

fn attend() -> Op {
    let (q, out) = (heads(0, 2), slot("attended"));
    Op::Attend { q, layer: KvLayer(0), mask: Mask::Window(3), scale: 0.5, out }
}

/// Step indices are used by the cases below.
fn ops() -> Vec<Op> {
    vec![
        Op::Embed { table: weight("embed"), out: slot("x") },
        norm(None),
        linear("normed", "qkv", Some("qkv.bias"), whole("qkv")),
        Op::HeadNorm { heads: heads(0, 2), weight: weight("head_norm"), eps: 0.0 },
        Op::Rope { heads: heads(0, 3), rope: RopeId(0) },
        Op::KvWrite { layer: KvLayer(0), k: heads(8, 1), v: heads(12, 1) },
        attend(),
        norm(Some("attended")),
        linear("normed", "gate_up", None, whole("gate_up")),
        Op::Activate { kind: Activation::Silu, x: slot("gate_up"), out: slot("hidden") },
        linear("hidden", "down", None, whole("x")),
        Op::Gather { x: slot("x"), out: slot("last") },
        linear("last", "head", None, whole("logits")),
    ]
}

fn with_ops(ops: Vec<Op>) -> Program {
    let weights =
        WEIGHTS.iter().map(|(label, shape, format)| WeightDecl::new(*label, *shape, *format));
    let slots = SLOTS.iter().map(|(label, rows, width)| SlotDecl {
        label: (*label).to_owned(),
        rows: *rows,
        width: *width,
    });
    let step = |(i, op)| Step { op, label: format!("s{i}") };
    let speeds = RopeSpeeds::Fixed(vec![1.0]);
    Program {
        weights: weights.collect(),
        slots: slots.collect(),
        ropes: vec![RopeDecl { width: 2, speeds, amplitude: 1.0 }],
        kv: vec![KvDecl { heads: 1, head_width: 4 }],
        steps: ops.into_iter().enumerate().map(step).collect(),
        logits: slot("logits"),
    }
}

fn refusal(program: &Program) -> String {
    super::program(program).expect_err("the program is broken").to_string()
}

/// Replaces step `at` and expects its refusal to contain `reason`.
fn broken_step(at: usize, op: Op, reason: &str) {
    let mut ops = ops();
    ops[at] = op;
    let err = refusal(&with_ops(ops));
    assert!(err.starts_with(&format!("program step {at} (s{at}): ")), "{err}");
    assert!(err.contains(reason), "{err}");
}

/// Removes step `at` and expects a refusal that contains `reason`.
fn missing_step(at: usize, reason: &str) {
    let mut ops = ops();
    ops.remove(at);
    let err = refusal(&with_ops(ops));
    assert!(err.contains(reason), "{err}");
}

fn broken_declaration(change: impl FnOnce(&mut Program), reason: &str) {
    let mut program = with_ops(ops());
    change(&mut program);
    let err = refusal(&program);
    assert!(err.contains(reason), "{err}");
}

#[test]
fn a_decoder_layer_is_valid() {
    super::program(&with_ops(ops())).unwrap();
}

#[test]
fn reads_before_writes_are_found() {
    missing_step(0, "s0): column 0 of slot x is read before it is written");
    missing_step(2, "column 0 of slot qkv is read before it is written");
    missing_step(5, "kv layer 0 is read before it is written");
    missing_step(6, "column 0 of slot attended is read before it is written");
    missing_step(12, "logits: slot logits is not written by the last step");
    let half = SlotView { width: 8, ..whole("qkv") };
    let mut halved = with_ops(ops());
    halved.weights[weight("qkv").index()].shape = [8, 8];
    halved.weights[weight("qkv.bias").index()].shape = [1, 8];
    halved.steps[2].op = linear("normed", "qkv", Some("qkv.bias"), half);
    assert!(refusal(&halved).contains("s4): column 8 of slot qkv"), "{}", refusal(&halved));
}

#[test]
fn ids_out_of_range_are_found() {
    let table = WeightId(8);
    broken_step(0, Op::Embed { table, out: slot("x") }, "expected weight ids below 8, found 8");
    let x = SlotId(99);
    broken_step(11, Op::Gather { x, out: slot("last") }, "expected slot ids below 8, found 99");
    let rope = RopeId(1);
    broken_step(4, Op::Rope { heads: heads(0, 3), rope }, "expected rope ids below 1, found 1");
    let op = Op::KvWrite { layer: KvLayer(1), k: heads(8, 1), v: heads(12, 1) };
    broken_step(5, op, "expected kv layer ids below 1, found 1");
}

#[test]
fn shapes_that_disagree_are_found() {
    let table = weight("down");
    broken_step(0, Op::Embed { table, out: slot("x") }, "expected width 12 of table rows, found 8");
    broken_step(2, linear("normed", "down", None, whole("qkv")), "expected width 12 of weight");
    let short = SlotView { width: 12, ..whole("qkv") };
    broken_step(2, linear("normed", "qkv", None, short), "expected width 16 of the output");
    let late = SlotView { start: 1, ..whole("qkv") };
    broken_step(2, linear("normed", "qkv", None, late), "16 columns from 1 exceed slot qkv");
    let huge = SlotView { start: usize::MAX, ..whole("qkv") };
    broken_step(2, linear("normed", "qkv", None, huge), "exceed slot qkv");
    let bias = Some("norm");
    broken_step(2, linear("normed", "qkv", bias, whole("qkv")), "weight norm as floats [1, 16]");
    let (x, out) = (slot("gate_up"), slot("attended"));
    let op = Op::Activate { kind: Activation::Silu, x, out };
    broken_step(9, op, "expected width 16 of gate and up, found 24");
}

#[test]
fn vectors_must_be_floats() {
    broken_declaration(
        |p| p.weights[weight("norm").index()].format = W4,
        "s1): expected weight norm as floats [1, 8], found w4g4",
    );
}

#[test]
fn heads_that_do_not_fit_are_found() {
    let kv = |k, v| Op::KvWrite { layer: KvLayer(0), k, v };
    broken_step(5, kv(heads(8, 2), heads(12, 1)), "expected 1 heads of 4, found 2 of 4");
    broken_step(4, Op::Rope { heads: heads(8, 3), rope: RopeId(0) }, "12 columns from 8 exceed");
    let vast = Heads { count: usize::MAX, ..heads(0, 1) };
    broken_step(4, Op::Rope { heads: vast, rope: RopeId(0) }, "expected heads in slot qkv");
    broken_declaration(|p| p.ropes[0].width = 6, "expected 3 speeds, found 1");
    broken_declaration(
        |p| {
            p.ropes[0].width = 6;
            p.ropes[0].speeds = RopeSpeeds::Fixed(vec![1.0; 3]);
        },
        "s4): expected a rope width up to 4, found 6",
    );
    let q = heads(0, 3);
    let (layer, mask, out) = (KvLayer(0), Mask::Causal, slot("attended"));
    let op = |q, mask, scale| Op::Attend { q, layer, mask, scale, out };
    broken_step(6, op(q, mask, 1.0), "expected width 12 of all query heads");
    broken_step(6, op(heads(0, 2), Mask::Window(0), 1.0), "expected a window above 0");
    broken_step(6, op(heads(0, 2), mask, f32::NAN), "expected a finite scale");
    let wide = Heads { width: 8, ..heads(0, 1) };
    broken_step(6, op(wide, mask, 1.0), "expected query heads of 4, found 8");
}

#[test]
fn kv_heads_must_divide_query_heads() {
    let mut program = with_ops(ops());
    program.kv[0].heads = 2;
    program.steps[5].op = Op::KvWrite { layer: KvLayer(0), k: heads(0, 2), v: heads(8, 2) };
    let Op::Attend { q, .. } = &mut program.steps[6].op else { unreachable!() };
    *q = heads(0, 3);
    let err = refusal(&program);
    assert!(err.contains("expected query heads in multiples of 2, found 3"), "{err}");
}

#[test]
fn a_kv_layer_is_written_once() {
    let mut ops = ops();
    ops.insert(6, ops[5].clone());
    assert!(refusal(&with_ops(ops)).contains("s6): kv layer 0 is written twice"));
}

#[test]
fn an_output_must_not_be_an_input() {
    let (x, weight) = (slot("x"), weight("norm"));
    let op = |add, out| Op::Norm { x, add, weight, eps: 0.0, out };
    broken_step(1, op(None, x), "slot x is both input and output");
    broken_step(7, op(Some(slot("attended")), slot("attended")), "slot attended is both");
    broken_step(7, op(Some(x), slot("normed")), "add is the same slot as x");
}

#[test]
fn row_kinds_are_checked() {
    broken_step(11, Op::Gather { x: slot("x"), out: slot("normed") }, "expected Outputs rows");
    let last = slot("last");
    broken_step(0, Op::Embed { table: weight("embed"), out: last }, "expected Tokens rows");
    broken_step(10, linear("hidden", "down", None, whole("last")), "expected Tokens rows in slot");
    broken_declaration(|p| p.logits = slot("hidden"), "logits: expected Outputs rows");
    broken_declaration(|p| p.steps.clear(), "logits: slot logits is not written by the last step");
}

#[test]
fn declarations_are_checked() {
    broken_declaration(|p| p.weights[1].label = "embed".to_owned(), "embed: label is declared");
    broken_declaration(|p| p.slots[1].label = "x".to_owned(), "slot x: label is declared twice");
    broken_declaration(|p| p.slots[1].label.clear(), "label is empty");
    broken_declaration(|p| p.slots[5].width = 0, "slot hidden: width is 0");
    broken_declaration(|p| p.weights[0].shape = [0, 8], "weight embed: expected a shape");
    broken_declaration(|p| p.weights[0].shape = [usize::MAX, 8], "weight embed: expected a shape");
    broken_declaration(|p| p.weights[2].shape = [16, 6], "groups that divide 6 columns");
    let odd = Format::Grouped { bits: Bits::Four, group: 3, act_order: false };
    broken_declaration(
        |p| p.weights[0] = WeightDecl { shape: [2, 9], format: odd, ..p.weights[0].clone() },
        "even number of 4-bit",
    );
    broken_declaration(|p| p.kv[0].heads = 0, "kv layer 0: expected heads");
    broken_declaration(|p| p.ropes[0].width = 3, "rope 0: expected an even width, found 3");
    broken_declaration(|p| p.ropes[0].amplitude = f32::INFINITY, "rope 0: amplitude is inf");
    let ntk = |theta, trained| RopeSpeeds::DynamicNtk { theta, factor: 2.0, trained };
    broken_declaration(|p| p.ropes[0].speeds = ntk(1e4, 8), "expected an ntk width above 2");
    let wide = |speeds| RopeDecl { width: 4, speeds, amplitude: 1.0 };
    broken_declaration(|p| p.ropes[0] = wide(ntk(0.0, 8)), "expected theta above zero");
    broken_declaration(|p| p.ropes[0] = wide(ntk(1e4, 0)), "expected a trained length");
    let nan = RopeSpeeds::Switched { short: vec![1.0], long: vec![f32::NAN], switch: 4 };
    broken_declaration(|p| p.ropes[0].speeds = nan, "long speeds hold a non-finite value");
    broken_step(
        3,
        Op::HeadNorm { heads: heads(0, 2), weight: weight("head_norm"), eps: -1.0 },
        "expected eps",
    );
}
