//! The list of cases: every op over odd and even shapes, formats, masks and rotary kinds.
//!
//! A name starts with its op's group and a colon; the groups are what the tests report on.

use super::case::{Builder, Case, Grouping, dense};
use crate::program::{
    Activation, Heads, Mask, Op, RopeDecl, RopeSpeeds, Rounding, Rows, SlotId, SlotView,
};
use quant::{Bits, FloatType, Weight};

/// Lengths of the sequences where the op looks at one row only.
const LENS: [usize; 4] = [1, 17, 6, 20];

const FLOATS: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

/// Every case.
pub(super) fn all() -> Vec<Case> {
    let groups = [embed(), gather(), norm(), float_linear(), grouped_linear(), fused_linear()];
    // More rows than any kernel takes at once.
    let more = [coarse_linears(&[1, 7, 40, 90]), head_norm(), rope(), attend(), activate()];
    groups.into_iter().chain(more).flatten().collect()
}

fn embed() -> Vec<Case> {
    let floats = FLOATS.into_iter().flat_map(|float| [1, 37, 64].map(|d| (float, d)));
    let floats = floats.map(|(float, d)| {
        let mut b = Builder::new(1, &LENS, 4);
        let table = dense(&mut b.rng, float, [super::case::VOCAB, d]);
        embedded(b, format!("embed exact: {float} d {d}"), table)
    });
    let grouped = [Bits::Four, Bits::Eight].map(|bits| {
        let mut b = Builder::new(2, &LENS, 4);
        let plain = Grouping::plain(bits, 32);
        let grouping = Grouping { act_order: true, f16_scales: false, ..plain };
        let table = grouping.weight(&mut b.rng, [super::case::VOCAB, 96]);
        embedded(b, format!("embed grouped: {grouping}"), table)
    });
    floats.chain(grouped).collect()
}

fn embedded(mut b: Builder, name: String, table: Weight<'static>) -> Case {
    let out = b.tokens_slot(table.shape()[1]);
    let table = b.weight(table);
    b.step(Op::Embed { table, out });
    b.observe(name, out)
}

fn gather() -> Vec<Case> {
    let one = |width| {
        let mut b = Builder::new(3, &LENS, 4);
        let x = b.input(width, 1.0);
        b.observe(format!("gather exact: d {width}"), x)
    };
    [1, 7, 130].map(one).into()
}

fn norm() -> Vec<Case> {
    let mut cases = vec![];
    for width in [1, 5, 64, 257, 1024] {
        for (add, observe_x) in [(false, false), (true, false), (true, true)] {
            let mut b = Builder::new(4, &LENS, 4);
            let x = b.input(width, 3.0);
            let add = add.then(|| b.input(width, 1.0));
            let (weight, out) = (b.vector(width), b.tokens_slot(width));
            b.step(Op::Norm { x, add, weight, eps: 1e-5, out });
            let name = match (observe_x, add.is_some()) {
                (true, _) => format!("residual exact: d {width}"),
                (false, true) => format!("norm: d {width} with add"),
                (false, false) => format!("norm: d {width}"),
            };
            cases.push(b.observe(name, if observe_x { x } else { out }));
        }
    }
    cases
}

/// A linear over `rows`, its input up to 1 in size.
fn linear(name: String, weight: Weight<'static>, bias: bool, rows: Rows, mut b: Builder) -> Case {
    let x = b.input(weight.shape()[1], 1.0);
    linear_of(x, name, weight, bias, rows, b)
}

/// A linear over slot `x` of tokens, or over rows of it.
fn linear_of(
    mut x: SlotId,
    name: String,
    weight: Weight<'static>,
    bias: bool,
    rows: Rows,
    mut b: Builder,
) -> Case {
    let [n, k] = weight.shape();
    if rows == Rows::Outputs {
        let out = b.slot(Rows::Outputs, k);
        b.step(Op::Gather { x, out });
        x = out;
    }
    let bias = bias.then(|| dense(&mut b.rng, FloatType::F32, [1, n])).map(|v| b.weight(v));
    let weight = b.weight(weight);
    let slot = b.slot(rows, n);
    b.step(Op::Linear { x, weight, bias, out: SlotView { slot, start: 0, width: n } });
    match rows {
        Rows::Tokens => b.observe(name, slot),
        Rows::Outputs => b.finish(name, slot),
    }
}

fn float_linear() -> Vec<Case> {
    let mut cases = vec![];
    let shapes = [[1, 1], [3, 5], [16, 64], [17, 33], [8, 4], [40, 257], [72, 256]];
    for float in FLOATS {
        for (i, shape) in shapes.into_iter().enumerate() {
            let mut b = Builder::new(5, &LENS, 4);
            let weight = dense(&mut b.rng, float, shape);
            let rows = if i % 3 == 1 { Rows::Outputs } else { Rows::Tokens };
            let name = format!("linear {float}: {shape:?} {rows:?}");
            cases.push(linear(name, weight, i % 2 == 0, rows, b));
        }
    }
    cases.extend([FloatType::F16, FloatType::Bf16].into_iter().flat_map(two_byte_linear));
    cases
}

/// Shapes and sizes that kernels for weights of two bytes have ways of their own for.
fn two_byte_linear(float: FloatType) -> Vec<Case> {
    let case = |shape: [usize; 2], lens: &[usize], scale: f32| {
        let mut b = Builder::new(13, lens, 4);
        let weight = dense(&mut b.rng, float, shape);
        let x = b.input(shape[1], scale);
        let name = format!("linear {float}: {shape:?} lens {lens:?} up to {scale:e}");
        linear_of(x, name, weight, scale == 1.0, Rows::Outputs, b)
    };
    let odd = [[1, 20], [300, 33], [17, 1030]].map(|shape| case(shape, &LENS, 1.0));
    let sizes = [1e6, 1e-6, 1e-37].map(|scale| case([17, 100], &LENS, scale));
    // Two tiles a block; four, and so many that no blocks of threads share one.
    let wide = case(if float == FloatType::F16 { [16400, 20] } else { [4100, 24] }, &[1, 17], 1.0);
    let rows = case([17, 72], &[1, 40, 90], 1.0);
    odd.into_iter().chain(sizes).chain([wide, rows]).collect()
}

/// Linears whose activation blocks are longer than most: of 128 columns, of 96 and of 112 with padding, of
/// permuted columns, for sequences of these lengths.
pub(super) fn coarse_linears(lens: &[usize]) -> Vec<Case> {
    let case = |(i, (grouping, shape)): (usize, (Grouping, [usize; 2]))| {
        let mut b = Builder::new(60 + i as u64, lens, 4);
        let weight = grouping.weight(&mut b.rng, shape);
        let name = format!("coarse linear w{}: {grouping} {shape:?}", grouping.bits.count());
        let mut case = linear(name, weight, i % 2 == 0, Rows::Outputs, b);
        case.program.weights.iter_mut().for_each(|weight| weight.rounding = Rounding::Coarse);
        case
    };
    let groupings = [Bits::Four, Bits::Eight].into_iter().flat_map(|bits| {
        let plain = |group| Grouping::plain(bits, group);
        let wild = |group| Grouping { asymmetric: true, f16_scales: false, ..plain(group) };
        [
            (plain(128), [33, 640]),
            (plain(128), [276, 2176]),
            (wild(128), [72, 384]),
            (Grouping { act_order: true, ..wild(128) }, [40, 384]),
            (plain(384), [24, 384]),
            (wild(192), [17, 576]),
            (wild(300), [17, 300]),
            (plain(64), [24, 192]),
        ]
    });
    groupings.enumerate().map(case).collect()
}

fn grouped_linear() -> Vec<Case> {
    let mut cases = vec![];
    let mut case = |grouping: Grouping, shape: [usize; 2]| {
        let mut b = Builder::new(6 + cases.len() as u64, &LENS, 4);
        let weight = grouping.weight(&mut b.rng, shape);
        let rows = if cases.len() % 3 == 1 { Rows::Outputs } else { Rows::Tokens };
        let name = format!("linear w{}: {grouping} {shape:?} {rows:?}", grouping.bits.count());
        let bias = cases.len() % 2 == 0;
        cases.push(linear(name, weight, bias, rows, b));
    };
    for bits in [Bits::Four, Bits::Eight] {
        for group in [32, 64, 128, 384] {
            let plain = Grouping::plain(bits, group);
            case(plain, [33, 384]);
            case(Grouping { asymmetric: true, ..plain }, [24, 384]);
            case(Grouping { act_order: true, ..plain }, [72, 384]);
            let wild = Grouping { asymmetric: true, act_order: true, f16_scales: false, ..plain };
            case(wild, [8, 384]);
        }
        let wild = |group| Grouping { asymmetric: true, ..Grouping::plain(bits, group) };
        for (group, shape) in [(2, [5, 2]), (20, [9, 40]), (100, [1, 100]), (300, [17, 300])] {
            case(wild(group), shape);
        }
        case(wild(128), [256, 1024]);
        // More rows than a block of any kernel takes.
        case(wild(64), [276, 384]);
        case(wild(32), [276, 96]);
        // More blocks than any kernel takes in one go.
        case(Grouping::plain(bits, 32), [20, 2176]);
    }
    cases
}

/// Two linears side by side in one slot, as unfused projections are.
fn fused_linear() -> Vec<Case> {
    let mut b = Builder::new(7, &LENS, 4);
    let (k, widths) = (64, [5, 11]);
    let x = b.input(k, 1.0);
    let slot = b.tokens_slot(widths[0] + widths[1]);
    for (start, width) in [(widths[0], widths[1]), (0, widths[0])] {
        let grouping = Grouping::plain(Bits::Four, 32);
        let weight = grouping.weight(&mut b.rng, [width, k]);
        let weight = b.weight(weight);
        b.step(Op::Linear { x, weight, bias: None, out: SlotView { slot, start, width } });
    }
    vec![b.observe("linear w4: two in one slot".to_owned(), slot)]
}

/// Heads in an input slot with columns before and after that must stay as they are.
fn some_heads(b: &mut Builder, count: usize, width: usize) -> Heads {
    let slot = b.input(3 + count * width + 2, 2.0);
    Heads { slot, start: 3, count, width }
}

fn head_norm() -> Vec<Case> {
    let one = |(count, width)| {
        let mut b = Builder::new(8, &LENS, 4);
        let heads = some_heads(&mut b, count, width);
        let weight = b.vector(width);
        b.step(Op::HeadNorm { heads, weight, eps: 1e-6 });
        b.observe(format!("head norm: {count} of {width}"), heads.slot)
    };
    [(1, 2), (3, 5), (4, 64), (7, 128)].map(one).into()
}

/// Speeds of a plain rotary table.
pub(super) fn plain_speeds(width: usize, theta: f32) -> Vec<f32> {
    let exponent = |i: usize| -(2.0 * i as f32) / width as f32;
    (0..width / 2).map(|i| theta.powf(exponent(i))).collect()
}

fn rope() -> Vec<Case> {
    let mut cases = vec![];
    for width in [4usize, 10, 64] {
        let plain = || plain_speeds(width, 10000.0);
        let switched = RopeSpeeds::Switched {
            short: plain(),
            long: plain().iter().map(|s| s / 3.0).collect(),
            switch: 12,
        };
        let ntk = RopeSpeeds::DynamicNtk { theta: 10000.0, factor: 2.0, trained: 12 };
        for (kind, speeds, amplitude) in [
            ("fixed", RopeSpeeds::Fixed(plain()), 1.0),
            ("scaled", RopeSpeeds::Fixed(plain()), 1.25),
            ("switched", switched, 1.0),
            ("ntk", ntk, 1.0),
        ] {
            for head_width in [width, width + 6] {
                let mut b = Builder::new(9, &LENS, 4);
                let heads = some_heads(&mut b, 3, head_width);
                let rope = b.rope(RopeDecl { width, speeds: speeds.clone(), amplitude });
                b.step(Op::Rope { heads, rope });
                let name = format!("rope: {kind} {width} of {head_width}");
                cases.push(b.observe(name, heads.slot));
            }
        }
    }
    cases
}

/// Shape of an attention case.
#[derive(Debug, Clone, Copy)]
struct Attention {
    /// Query heads, KV heads, head width.
    heads: [usize; 3],
    mask: Mask,
    block_len: usize,
    /// Size of the scores' factor times root e.
    sharpness: f32,
}

fn attend() -> Vec<Case> {
    let mut cases = vec![];
    let masks = [Mask::Causal, Mask::Window(1), Mask::Window(7), Mask::Window(1000)];
    let shapes = [[1, 1, 8], [4, 4, 16], [6, 2, 5], [8, 1, 64], [14, 2, 64], [3, 1, 128]];
    for (i, heads) in shapes.into_iter().enumerate() {
        for (j, mask) in masks.into_iter().enumerate() {
            let block_len = [1, 4, 5, 16][(i + j) % 4];
            let shape = Attention { heads, mask, block_len, sharpness: 1.0 };
            cases.push(attention(shape, &[1, 19, 41]));
        }
    }
    let base = Attention { heads: [4, 2, 32], mask: Mask::Causal, block_len: 16, sharpness: 20.0 };
    cases.push(attention(base, &[33, 2]));
    let long = Attention { sharpness: 1.0, ..base };
    cases.push(attention(long, &[300, 2]));
    cases.push(attention(Attention { mask: Mask::Window(130), ..long }, &[300]));
    // More positions than any kernel takes in one go.
    cases.push(attention(Attention { heads: [2, 1, 40], ..long }, &[270]));
    cases.push(attention(Attention { heads: [2, 1, 32], ..long }, &[530]));
    cases.extend(tensor_attend());
    cases
}

/// Widths of heads that tensor cores take, and numbers of query heads that share a KV head.
fn tensor_attend() -> Vec<Case> {
    let (causal, near, far) = (Mask::Causal, Mask::Window(9), Mask::Window(290));
    let of = |heads, mask, block_len, lens: &[usize]| {
        attention(Attention { heads, mask, block_len, sharpness: 1.0 }, lens)
    };
    vec![
        of([1, 1, 128], causal, 4, &[20, 3]),
        of([8, 2, 80], causal, 16, &[23, 1, 14]),
        of([7, 1, 64], near, 4, &[6, 31]),
        of([12, 1, 80], near, 16, &[18, 5, 17]),
        of([2, 1, 96], causal, 5, &[67]),
        of([70, 1, 16], causal, 16, &[9, 2]),
        of([7, 1, 16], far, 4, &[330, 270]),
        attention(
            Attention { heads: [4, 2, 32], mask: far, block_len: 16, sharpness: 20.0 },
            &[345],
        ),
    ]
}

fn attention(shape: Attention, lens: &[usize]) -> Case {
    let Attention { heads: [h, g, e], mask, block_len, sharpness } = shape;
    let mut b = Builder::new(10, lens, block_len);
    let slot = b.input((h + 2 * g) * e, 1.0);
    let heads = |start: usize, count| Heads { slot, start: start * e, count, width: e };
    let (layer, out) = (b.kv(g, e), b.tokens_slot(h * e));
    b.step(Op::KvWrite { layer, k: heads(h, g), v: heads(h + g, g) });
    let scale = sharpness / (e as f32).sqrt();
    b.step(Op::Attend { q: heads(0, h), layer, mask, scale, out });
    let name = format!("attend: {h}/{g} of {e} {mask:?} blocks of {block_len} x{sharpness}");
    b.observe(format!("{name} lens {lens:?}"), out)
}

fn activate() -> Vec<Case> {
    let mut cases = vec![];
    for width in [1, 7, 64, 129] {
        for scale in [1.0, 60.0] {
            let mut b = Builder::new(11, &LENS, 4);
            let x = b.input(2 * width, scale);
            let out = b.tokens_slot(width);
            b.step(Op::Activate { kind: Activation::Silu, x, out });
            cases.push(b.observe(format!("activate: f {width} up to {scale}"), out));
        }
    }
    cases
}
