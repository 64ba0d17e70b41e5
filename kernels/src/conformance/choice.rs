//! Tokens that a backend chooses by itself are those that its own logits say.
//!
//! The formula is that of [`Draw`], computed here in f64. Rows whose choice is not clear must come as
//! logits. Not here: what the formula is good for (the engine's sampler).

use super::case::{Builder, Case, Source};
use super::{Tested, backends, cuda, session};
use crate::program::{BlockId, TokenId};
use crate::{BlockTables, Draw, StepInput, StepOutput};
use emulator::Options;
use quant::{Dense, Weight};

/// Rows of logits: those of the table below.
const ROWS: usize = 12;

/// Rows of `width` logits: random ones, and the last six with ties and numbers that are none.
fn case(width: usize) -> Case {
    let mut b = Builder::new(7, &[ROWS], 4);
    let mut table = b.rng.floats(ROWS * width, 6.0);
    let mut rows = table.chunks_exact_mut(width).skip(6);
    let mut row = || rows.next().unwrap_or_default();
    row().fill(f32::NEG_INFINITY);
    row()[width / 2] = f32::NAN;
    row()[width - 1] = f32::INFINITY;
    row().fill(0.25);
    row()[..width - 1].fill(f32::NEG_INFINITY);
    row().fill(1e30);
    let table = b.weight(Weight::Dense(Dense::from_f32([ROWS, width], &table)));
    let out = b.tokens_slot(width);
    b.step(crate::program::Op::Embed { table, out });
    let mut case = b.observe(format!("choice of {width}"), out);
    case.sequences = vec![(0..ROWS as u32).map(TokenId).collect()];
    case
}

/// All rows of the case with these draws.
fn step(tested: &Tested, case: &Case, draws: &[Option<Draw>]) -> StepOutput {
    let limits = session::limits(case);
    let built = tested.backend.build(&case.program, &Source(&case.weights), &limits);
    let mut runner = built.unwrap_or_else(|e| panic!("{}: {e}", tested.name));
    let all: Vec<u32> = (0..ROWS as u32).collect();
    let input = StepInput {
        tokens: &case.sequences[0],
        positions: &all,
        rope_lens: &[ROWS as u32; ROWS],
        query_ends: &[ROWS as u32],
        context_lens: &[ROWS as u32],
        block_tables: BlockTables { blocks: &[0, 1, 2].map(BlockId), ends: &[3] },
        output_rows: &all,
        draws,
    };
    let mut output = StepOutput::default();
    // Twice: what the first step leaves must not matter.
    for _ in 0..2 {
        runner.step(&input, &mut output).unwrap_or_else(|e| panic!("{}: {e}", tested.name));
    }
    output
}

fn next(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The choice of `draw`; none where it is not clear, or the row has no greatest finite logit.
fn expected(logits_v: &[f32], draw: Draw) -> Option<TokenId> {
    let largest = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if logits_v.iter().any(|l| l.is_nan()) || !largest.is_finite() {
        return None;
    }
    let score = |(token, &logit): (usize, &f32)| {
        let bits = next(draw.key ^ token as u64);
        let w = ((bits >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
        let noise = -(-(-w).ln_1p()).ln();
        match draw.temperature {
            0.0 => f64::from(logit),
            1.0 => f64::from(logit) + noise,
            temperature => f64::from((logit - largest) / temperature) + noise,
        }
    };
    let mut scores: Vec<(f64, u32)> =
        logits_v.iter().enumerate().map(|pair| (score(pair), pair.0 as u32)).collect();
    scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let lead = scores[0].0 - scores.get(1).map_or(f64::NEG_INFINITY, |second| second.0);
    let clear = draw.temperature == 0.0 || lead > 1e-9 * scores[0].0.abs().max(1.0);
    clear.then_some(TokenId(scores[0].1))
}

/// Draws of every kind, none for each fourth row.
fn draws(round: u64, drawn: bool) -> Vec<Option<Draw>> {
    let draw = |row: u64| {
        let temperature =
            if drawn { [1.0, 0.0, 0.3, 2.5][(row + round) as usize % 4] } else { 0.0 };
        (row % 4 != 3).then_some(Draw { key: next(row * 1000 + round), temperature })
    };
    (0..ROWS as u64).map(draw).collect()
}

/// The tokens chosen of two chunks a row.
pub(super) fn tokens(tested: &Tested) -> Vec<Option<TokenId>> {
    step(tested, &case(5000), &draws(0, true)).chosen
}

/// How many tokens a backend chose, all as expected.
fn check(tested: &Tested, case: &Case) -> usize {
    let plain = step(tested, case, &[]);
    assert!(plain.chosen.is_empty(), "{}", tested.name);
    let vocab = plain.logits.len() / ROWS;
    let mut count = 0;
    for (round, drawn) in [(0, true), (1, true), (2, true), (3, false)] {
        let draws = draws(round, drawn);
        let found = step(tested, case, &draws);
        assert_eq!(found.logits.len(), plain.logits.len());
        for (row, logits_v) in plain.logits.chunks_exact(vocab).enumerate() {
            let name = format!("{} of {}, row {row}, {:?}", tested.name, case.name, draws[row]);
            match found.chosen.get(row).copied().flatten() {
                Some(token) => {
                    let draw = draws[row].unwrap_or_else(|| panic!("{name}: nobody asked"));
                    assert_eq!(Some(token), expected(logits_v, draw), "{name}");
                    count += 1;
                }
                None => {
                    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
                    let row_v = &found.logits[row * vocab..][..vocab];
                    assert!(row_v.iter().zip(logits_v).all(same), "{name}");
                    let clear = draws[row].is_some_and(|draw| expected(logits_v, draw).is_some());
                    assert!(!clear || found.chosen.is_empty(), "{name}: it is clear");
                }
            }
        }
    }
    count
}

#[test]
fn chosen_tokens_are_those_of_the_logits() {
    for tested in backends() {
        let counts = [1, 3, 300, 5000].map(|width| check(&tested, &case(width)));
        println!("{} chose {counts:?} tokens", tested.name);
    }
}

#[test]
fn cuda_chooses_by_itself_in_every_order_of_threads() {
    for tested in Options::all().into_iter().filter_map(cuda) {
        assert!(check(&tested, &case(300)) >= 20, "{}", tested.name);
    }
}
