//! Steps that a backend may do at once where nobody looks between them: with a trace, which shows all
//! slots, the bits are the same.
//!
//! Not here: ops that write what the next one reads and leave it in its slot too ([`super::joined`]).

use super::case::{Builder, Case, Grouping, dense};
use super::cases::plain_speeds;
use super::session::{Schedule, run, run_traced};
use super::{Tested, cpus, cuda, decoder};
use crate::program::{
    Activation, Heads, Mask, Op, RopeDecl, RopeSpeeds, Rounding, SlotId, SlotView, WeightId,
};
use emulator::Options;
use quant::{Bits, FloatType, Weight};

const SCHEDULES: [Schedule; 3] = [Schedule::Whole, Schedule::Alone, Schedule::Mixed(3)];

/// Which heads are normalised, one weight each.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Norms {
    None,
    Queries,
    Apart,
    Together,
}

/// Heads from their slot to attention; what is observed is attention's output or, if `keys`, the slot
/// itself, whose keys must then be there.
fn heads(norms: Norms, [width, turning]: [usize; 2], keys: bool) -> Case {
    let mut b = Builder::new(31, &[19, 1, 6], 4);
    let slot = b.input(3 + 8 * width, 1.0);
    let heads = |first: usize, count| Heads { slot, start: 3 + first * width, count, width };
    let (q, k, v) = (heads(0, 4), heads(4, 2), heads(6, 2));
    let normed = match norms {
        Norms::None => vec![],
        Norms::Queries => vec![q],
        Norms::Apart => vec![q, k],
        Norms::Together => vec![heads(0, 6)],
    };
    for (i, heads) in normed.into_iter().enumerate() {
        let (weight, eps) = (b.vector(width), [1e-6, 1e-5][i]);
        b.step(Op::HeadNorm { heads, weight, eps });
    }
    let speeds = RopeSpeeds::Fixed(plain_speeds(turning, 10000.0));
    let rope = b.rope(RopeDecl { width: turning, speeds, amplitude: 1.25 });
    b.step(Op::Rope { heads: heads(0, 6), rope });
    let (layer, out) = (b.kv(2, width), b.tokens_slot(4 * width));
    b.step(Op::KvWrite { layer, k, v });
    b.step(Op::Attend { q, layer, mask: Mask::Causal, scale: 0.3, out });
    let name = format!("heads: {norms:?} normed, {turning} of {width} turn, keys read: {keys}");
    b.observe(name, if keys { slot } else { out })
}

/// A linear into `slot`, which has as many columns as the weight has rows.
fn linear(b: &mut Builder, x: SlotId, (weight, bias): (Weight<'static>, bool)) -> SlotId {
    let n = weight.shape()[0];
    let bias: Option<WeightId> = bias.then(|| {
        let bias = dense(&mut b.rng, FloatType::F32, [1, n]);
        b.weight(bias)
    });
    let (weight, slot) = (b.weight(weight), b.tokens_slot(n));
    b.step(Op::Linear { x, weight, bias, out: SlotView { slot, start: 0, width: n } });
    slot
}

/// Gates `up` of `x`, what they let pass, and a linear over it, whose grouping is `down`. The slots of the
/// gates and of the output.
fn feed_forward(
    b: &mut Builder,
    x: SlotId,
    (up, bias): (Weight<'static>, bool),
    down: Grouping,
) -> [SlotId; 2] {
    let hidden = up.shape()[0] / 2;
    let gates = linear(b, x, (up, bias));
    let act = b.tokens_slot(hidden);
    b.step(Op::Activate { kind: Activation::Silu, x: gates, out: act });
    let weight = down.weight(&mut b.rng, [24, hidden]);
    [gates, linear(b, act, (weight, false))]
}

/// A gated feed-forward block of `hidden` columns; `down` is the grouping of its second linear. What is
/// observed is its output or, if `between`, its gates, which must then be there.
fn gated(bits: Bits, hidden: usize, down: Grouping, between: bool) -> Case {
    let mut b = Builder::new(32, &[19, 3, 30], 4);
    let x = b.input(192, 2.0);
    let up = Grouping { asymmetric: true, ..Grouping::plain(bits, 64) };
    let weight = up.weight(&mut b.rng, [2 * hidden, 192]);
    let [gates, out] = feed_forward(&mut b, x, (weight, hidden.is_multiple_of(3)), down);
    let name = format!("gated: {up} {hidden}, then {down}, gates read: {between}");
    b.observe(name, if between { gates } else { out })
}

/// A linear whose outputs are added to a stream, and a gated feed-forward block over its norm: rounding is
/// coarse before the gates and, unless `all` is, fine everywhere else, as engines ask for it.
fn coarsely_gated(bits: Bits, hidden: usize, down: Grouping, all: bool) -> Case {
    const WIDTH: usize = 384;
    let mut b = Builder::new(35, &[2, 9, 30], 4);
    let (x, stream) = (b.input(96, 2.0), b.input(WIDTH, 1.0));
    let weight = Grouping::plain(bits, 32).weight(&mut b.rng, [WIDTH, 96]);
    let add = linear(&mut b, x, (weight, false));
    let (weight, out) = (b.vector(WIDTH), b.tokens_slot(WIDTH));
    b.step(Op::Norm { x: stream, add: Some(add), weight, eps: 1e-5, out });
    let up = Grouping { asymmetric: true, ..Grouping::plain(bits, 128) };
    let weight = up.weight(&mut b.rng, [2 * hidden, WIDTH]);
    let [_, out] = feed_forward(&mut b, out, (weight, hidden.is_multiple_of(3)), down);
    let name = format!("coarsely gated: {up} {hidden}, then {down}, all coarse: {all}");
    coarse(b.observe(name, out), |[n, k]| all || [n, k] == [2 * hidden, WIDTH])
}

/// The case with coarse rounding for weights of some shapes.
fn coarse(mut case: Case, shapes: impl Fn([usize; 2]) -> bool) -> Case {
    let chosen = case.program.weights.iter_mut().filter(|weight| shapes(weight.shape));
    chosen.for_each(|weight| weight.rounding = Rounding::Coarse);
    case
}

/// What reads a norm.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Reader {
    Fine,
    Coarse,
    Floats,
}

/// A linear whose outputs, `width` columns, are added to a stream that is normed then, and what reads the
/// norm: a quantized linear, or one of floats.
fn added(bits: Bits, width: usize, reader: Reader) -> Case {
    let mut b = Builder::new(33, &[2, 9], 4);
    let (x, stream) = (b.input(96, 2.0), b.input(width, 1.0));
    let weight = Grouping { asymmetric: true, ..Grouping::plain(bits, 32) };
    let (weight, bias) = (weight.weight(&mut b.rng, [width, 96]), width.is_multiple_of(3));
    let add = linear(&mut b, x, (weight, bias));
    let (weight, out) = (b.vector(width), b.tokens_slot(width));
    b.step(Op::Norm { x: stream, add: Some(add), weight, eps: 1e-5, out });
    let weight = match reader {
        Reader::Fine => Grouping::plain(bits, 64).weight(&mut b.rng, [24, width]),
        Reader::Coarse => Grouping::plain(bits, 128).weight(&mut b.rng, [24, width]),
        Reader::Floats => dense(&mut b.rng, FloatType::F16, [24, width]),
    };
    let last = linear(&mut b, out, (weight, false));
    let name = format!("added: w{} {width}, read by {reader:?}", bits.count());
    coarse(b.observe(name, last), |shape| reader == Reader::Coarse && shape == [24, width])
}

/// A gated feed-forward block whose second linear has floats, twice over the same slots.
fn mixed() -> Case {
    let mut b = Builder::new(34, &[5, 3], 4);
    let (gates, act) = (b.tokens_slot(192), b.tokens_slot(96));
    let mut x = b.input(64, 2.0);
    for _ in 0..2 {
        let weight = Grouping::plain(Bits::Four, 32).weight(&mut b.rng, [192, 64]);
        let (weight, out) = (b.weight(weight), SlotView { slot: gates, start: 0, width: 192 });
        b.step(Op::Linear { x, weight, bias: None, out });
        b.step(Op::Activate { kind: Activation::Silu, x: gates, out: act });
        let weight = dense(&mut b.rng, FloatType::F16, [64, 96]);
        x = linear(&mut b, act, (weight, false));
    }
    b.observe("gated: then floats, twice".to_owned(), x)
}

/// All of them.
pub(super) fn all() -> Vec<Case> {
    let mut cases = vec![];
    for norms in [Norms::None, Norms::Queries, Norms::Apart, Norms::Together] {
        cases.push(heads(norms, [8, 6], false));
    }
    cases.push(heads(Norms::Apart, [5, 4], true));
    cases.push(heads(Norms::None, [128, 128], false));
    for bits in [Bits::Four, Bits::Eight] {
        let plain = |group| Grouping::plain(bits, group);
        // Blocks of 64 columns and of 32; the kernel for many rows.
        cases.push(gated(bits, 128, plain(128), false));
        cases.push(gated(bits, 96, plain(32), false));
        cases.push(gated(bits, 256, plain(64), false));
        // Gates that a CPU stores beside what belongs to them: blocks of 32 and of 16, and columns that the
        // next linear takes in another order.
        cases.push(gated(bits, 64, plain(32), false));
        cases.push(gated(bits, 128, plain(16), false));
        cases.push(gated(bits, 128, Grouping { act_order: true, ..plain(32) }, false));
        cases.push(gated(bits, 128, plain(32), true));
        // Blocks that are not quantized on the way.
        cases.push(gated(bits, 80, plain(40), false));
        cases.push(gated(bits, 20, plain(20), false));
        cases.push(gated(bits, 96, Grouping { act_order: true, ..plain(32) }, false));
        // Nothing may be joined.
        cases.push(gated(bits, 96, plain(32), true));
        // Blocks of 128 columns before the gates; of 64, of 32 and of 40 with padding behind them.
        cases.push(coarsely_gated(bits, 256, plain(128), false));
        cases.push(coarsely_gated(bits, 96, plain(32), false));
        cases.push(coarsely_gated(bits, 80, plain(40), false));
        // Of 128 there too, on the way; of 96, not.
        cases.push(coarsely_gated(bits, 256, plain(128), true));
        cases.push(coarsely_gated(bits, 192, plain(192), true));
        // A few columns, and more than threads have at once.
        cases.push(added(bits, 192, Reader::Fine));
        cases.push(added(bits, 2368, Reader::Fine));
        cases.push(added(bits, 4224, Reader::Coarse));
        cases.push(added(bits, 192, Reader::Floats));
    }
    cases.push(mixed());
    cases
}

fn check(tested: &Tested, case: &Case) {
    let backend = tested.backend.as_ref();
    for schedule in SCHEDULES {
        let apart = run_traced(backend, case, schedule);
        let found = run(backend, case, schedule, true);
        assert_eq!(found, apart, "{} on {} ({schedule:?})", case.name, tested.name);
    }
}

#[test]
fn steps_that_are_done_at_once_give_the_bits_of_a_trace() {
    for tested in cpus().into_iter().chain(cuda(Options::default())) {
        all().iter().for_each(|case| check(&tested, case));
    }
    for tested in cpus().pop().into_iter().chain(cuda(Options::default())) {
        decoder::decoders().iter().for_each(|case| check(&tested, case));
    }
}

/// One order of tokens and steps, and another.
#[test]
fn they_do_not_depend_on_the_schedule_or_on_the_order_of_threads() {
    for case in all() {
        let Some(first) = cuda(Options::default()) else { return };
        let rows = run(first.backend.as_ref(), &case, Schedule::Whole, false);
        for options in Options::all() {
            let tested = cuda(options).expect("it was there before");
            let found = run(tested.backend.as_ref(), &case, Schedule::Mixed(4), true);
            for (place, row) in found {
                assert_eq!(row, rows[&place], "{} {place:?} with {options:?}", case.name);
            }
        }
    }
}
