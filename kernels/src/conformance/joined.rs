//! A backend may do several ops at once: the bits are those of the ops one by one.
//!
//! Each program runs twice: as it is, and with a copy between an op and the linear that reads its
//! result, so that nothing can be joined.

use super::case::{Builder, Case, Grouping, dense};
use super::gpu_tests::gpu;
use super::session::{Schedule, run};
use super::{Tested, cpus, cuda, reference};
use crate::program::{Activation, Heads, Mask, Op, Rounding, Rows, SlotId, SlotView};
use emulator::Options;
use quant::{Bits, FloatType};

/// Columns of a head, and of a group of weights.
const HEAD: usize = 64;

/// What computes the rows that the linear reads.
#[derive(Debug, Clone, Copy)]
enum Before {
    /// Of so many columns.
    Norm(usize),
    Activate,
    /// Heads of so many columns.
    Attend(usize),
}

/// All of them; heads that tensor cores take, and others; heads that are whole blocks of 128 columns, and others.
const ALL: [Before; 6] = [
    Before::Norm(4 * HEAD),
    Before::Activate,
    Before::Attend(HEAD),
    Before::Attend(2 * HEAD),
    Before::Attend(3 * HEAD),
    Before::Attend(4 * HEAD),
];

/// Weights of the linear.
#[derive(Debug, Clone, Copy)]
enum Weights {
    /// Quantized, so many columns a scale.
    Groups(usize),
    /// The same with coarse rounding.
    Coarse(usize),
    Floats(FloatType),
}

/// A program of an op and a linear; with a copy between, if `apart`.
fn case(before: Before, weights: Weights, apart: bool) -> Case {
    let mut b = Builder::new(21, &[19, 3, 30], 4);
    let mut x = match before {
        Before::Norm(width) => norm(&mut b, width),
        Before::Activate => activate(&mut b),
        Before::Attend(head) => attend(&mut b, head),
    };
    let k = match before {
        Before::Norm(width) => width,
        Before::Activate => 4 * HEAD,
        Before::Attend(head) => 4 * head,
    };
    let mut rows = Rows::Tokens;
    if apart {
        let copy = b.slot(Rows::Outputs, k);
        b.step(Op::Gather { x, out: copy });
        (x, rows) = (copy, Rows::Outputs);
    }
    let weight = match weights {
        Weights::Groups(group) | Weights::Coarse(group) => {
            Grouping::plain(Bits::Four, group).weight(&mut b.rng, [24, k])
        }
        Weights::Floats(float) => dense(&mut b.rng, float, [24, k]),
    };
    let (weight, slot) = (b.weight(weight), b.slot(rows, 24));
    b.step(Op::Linear { x, weight, bias: None, out: SlotView { slot, start: 0, width: 24 } });
    let name = format!("{before:?} before a linear of {weights:?}, apart: {apart}");
    let mut case = if apart { b.finish(name, slot) } else { b.observe(name, slot) };
    if matches!(weights, Weights::Coarse(_)) {
        case.program.weights[weight.index()].rounding = Rounding::Coarse;
    }
    case
}

fn norm(b: &mut Builder, width: usize) -> SlotId {
    let (x, add) = (b.input(width, 3.0), b.input(width, 1.0));
    let (weight, out) = (b.vector(width), b.tokens_slot(width));
    b.step(Op::Norm { x, add: Some(add), weight, eps: 1e-5, out });
    out
}

fn activate(b: &mut Builder) -> SlotId {
    let (x, out) = (b.input(8 * HEAD, 2.0), b.tokens_slot(4 * HEAD));
    b.step(Op::Activate { kind: Activation::Silu, x, out });
    out
}

fn attend(b: &mut Builder, width: usize) -> SlotId {
    let slot = b.input(8 * width, 1.0);
    let heads = |start: usize, count| Heads { slot, start: start * width, count, width };
    let (layer, out) = (b.kv(2, width), b.tokens_slot(4 * width));
    b.step(Op::KvWrite { layer, k: heads(4, 2), v: heads(6, 2) });
    b.step(Op::Attend { q: heads(0, 4), layer, mask: Mask::Causal, scale: 0.1, out });
    out
}

/// Those with nothing between.
pub(super) fn all() -> Vec<Case> {
    let weights = [Weights::Groups(64), Weights::Coarse(128), Weights::Floats(FloatType::F16)];
    weights.into_iter().flat_map(|w| ALL.map(|before| case(before, w, false))).collect()
}

fn check(tested: &Tested) {
    // A norm of more blocks than any kernel quantizes in one go.
    for before in ALL.into_iter().chain([Before::Norm(66 * HEAD)]) {
        let floats = [FloatType::F16, FloatType::Bf16].map(Weights::Floats);
        let groups = [32, 64, 128].map(Weights::Groups).into_iter().chain([Weights::Coarse(128)]);
        for weights in groups.chain(floats) {
            let joined = case(before, weights, false);
            for schedule in [Schedule::Whole, Schedule::Alone] {
                let found = run(tested.backend.as_ref(), &joined, schedule, true);
                let alone =
                    run(tested.backend.as_ref(), &case(before, weights, true), schedule, true);
                assert_eq!(found, alone, "{} on {} ({schedule:?})", joined.name, tested.name);
            }
        }
    }
}

#[test]
fn ops_that_are_joined_give_the_same_bits() {
    let one_of_each = [reference()].into_iter().chain(cpus().pop());
    let gpus = cuda(Options::default()).into_iter().chain(gpu());
    one_of_each.chain(gpus).for_each(|tested| check(&tested));
}
