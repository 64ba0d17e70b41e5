//! What every backend and runner must refuse, report and offer beside right numbers.

use super::case::{Builder, Case, Source};
use super::{Tested, backends, session};
use crate::program::{BlockId, Op, SlotId, TokenId, WeightId};
use crate::{BlockTables, Error, Runner, StepInput, StepLimits, StepOutput, WeightSource};
use quant::{Dense, Weight};
use std::ops::Range;

/// A norm over four columns: embed into slot 0, norm into slot 1, gather into slot 2.
fn norm_case() -> Case {
    let mut b = Builder::new(1, &[3], 4);
    let x = b.input(4, 1.0);
    let (weight, out) = (b.vector(4), b.tokens_slot(4));
    b.step(Op::Norm { x, add: None, weight, eps: 1e-5, out });
    b.observe("contract".to_owned(), out)
}

fn build(tested: &Tested, case: &Case, limits: &StepLimits) -> Result<Box<dyn Runner>, Error> {
    tested.backend.build(&case.program, &Source(&case.weights), limits)
}

/// One step of the only sequence from its start, last row wanted.
fn step(runner: &mut dyn Runner, tokens: &[u32]) -> Result<Vec<f32>, Error> {
    let t = tokens.len() as u32;
    let input = StepInput {
        tokens: &tokens.iter().map(|t| TokenId(*t)).collect::<Vec<_>>(),
        positions: &(0..t).collect::<Vec<_>>(),
        rope_lens: &vec![t; tokens.len()],
        query_ends: &[t],
        context_lens: &[t],
        block_tables: BlockTables { blocks: &[BlockId(0)], ends: &[1] },
        output_rows: &[t - 1],
        draws: &[],
    };
    let mut output = StepOutput::default();
    runner.step(&input, &mut output)?;
    Ok(output.logits)
}

#[test]
fn broken_programs_and_limits_are_refused() {
    for tested in backends() {
        let mut case = norm_case();
        let limits = session::limits(&case);
        let none = StepLimits { blocks: 0, ..limits };
        assert!(matches!(build(&tested, &case, &none), Err(Error::Declaration { .. })));
        case.program.steps.remove(0);
        let found = build(&tested, &case, &limits);
        assert!(matches!(found, Err(Error::Program { step: 0, .. })), "{}", tested.name);
    }
}

#[test]
fn a_weight_that_is_not_as_declared_is_refused() {
    for tested in backends() {
        let mut case = norm_case();
        case.weights[1] = Weight::Dense(Dense::from_f32([1, 5], &[1.0; 5]));
        let found = build(&tested, &case, &session::limits(&case));
        let Err(Error::Weight { label, expected, found }) = found else {
            panic!("{}: expected a refusal", tested.name)
        };
        assert_eq!((&*label, &*expected, &*found), ("w1", "shape [1, 4]", "[1, 5]"));
    }
}

/// Has no weights.
struct Empty;

impl WeightSource for Empty {
    fn load(&self, id: WeightId, _: Range<usize>) -> Result<Weight<'_>, Error> {
        Err(Error::Source { label: format!("w{}", id.0), source: "no such file".into() })
    }
}

#[test]
fn the_source_s_error_comes_through() {
    for tested in backends() {
        let case = norm_case();
        let found = tested.backend.build(&case.program, &Empty, &session::limits(&case));
        assert!(matches!(found, Err(Error::Source { label, .. }) if label == "w0"));
    }
}

#[test]
fn a_refused_step_changes_nothing() {
    for tested in backends() {
        let case = norm_case();
        let limits = StepLimits { trace: true, ..session::limits(&case) };
        let mut runner = build(&tested, &case, &limits).unwrap();
        let logits = step(runner.as_mut(), &[2, 3]).unwrap();
        for wrong in [&[2, 99][..], &[2, 3, 4, 5]] {
            assert!(matches!(step(runner.as_mut(), wrong), Err(Error::Input { .. })));
        }
        let mut slot = vec![];
        runner.read_slot(SlotId(2), &mut slot).unwrap();
        assert_eq!(slot, logits, "{}", tested.name);
    }
}

#[test]
fn a_trace_shows_every_slot() {
    for tested in backends() {
        let case = norm_case();
        let limits = StepLimits { trace: true, ..session::limits(&case) };
        let mut runner = build(&tested, &case, &limits).unwrap();
        let tokens = [4, 1];
        let logits = step(runner.as_mut(), &tokens).unwrap();
        let table = &case.weights[0];
        let embedded = tokens.iter().flat_map(|t| quant::reference::row(table, *t as usize));
        let mut slots = [vec![], vec![9.0; 99], vec![]];
        for (i, slot) in slots.iter_mut().enumerate() {
            runner.read_slot(SlotId(i as u32), slot).unwrap();
        }
        assert_eq!(slots[0], embedded.collect::<Vec<_>>(), "{}", tested.name);
        assert_eq!(slots[1].len(), 8, "{}", tested.name);
        assert_eq!((&slots[1][4..], &slots[2]), (&logits[..], &logits), "{}", tested.name);
        assert!(matches!(runner.read_slot(SlotId(3), &mut vec![]), Err(Error::Input { .. })));
    }
}

#[test]
fn without_a_trace_no_slot_is_shown() {
    for tested in backends() {
        let case = norm_case();
        let mut runner = build(&tested, &case, &session::limits(&case)).unwrap();
        step(runner.as_mut(), &[1]).unwrap();
        assert!(matches!(runner.read_slot(SlotId(0), &mut vec![]), Err(Error::Input { .. })));
    }
}

#[test]
fn memory_is_told() {
    for tested in backends() {
        let mut b = Builder::new(1, &[3], 4);
        let slot = b.input(8, 1.0);
        let layer = b.kv(1, 4);
        let heads = |start| crate::program::Heads { slot, start, count: 1, width: 4 };
        b.step(Op::KvWrite { layer, k: heads(0), v: heads(4) });
        let case = b.observe("memory".to_owned(), slot);
        let runner = build(&tested, &case, &session::limits(&case)).unwrap();
        let memory = runner.memory();
        // One block of four positions, a key and a value of four numbers each, at two bytes or
        // more a number.
        assert!(memory.kv_bytes >= 4 * 8 * 2, "{}: {memory:?}", tested.name);
        let table = super::case::VOCAB * 8 * 4;
        assert!(memory.weights_bytes >= table, "{}: {memory:?}", tested.name);
        assert!(memory.slots_bytes > 0, "{}: {memory:?}", tested.name);
    }
}

#[test]
fn every_format_has_a_kernel() {
    use quant::{Bits, FloatType, Format};
    for tested in backends() {
        for format in [
            Format::Dense(FloatType::Bf16),
            Format::Grouped { bits: Bits::Four, group: 128, act_order: true },
        ] {
            assert!(!tested.backend.kernel_for(format).is_empty());
        }
    }
}
