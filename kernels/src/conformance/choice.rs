//! Tokens that a backend chooses by itself are those that its own logits say.
//!
//! The choice is that of [`choose`]. Rows whose choice is not clear must come as logits. Not here: what
//! the choice is good for (the engine's sampler, whose tests hold it to the same function).

use super::case::{Builder, Case, Source};
use super::{Tested, backends, cuda, session};
use crate::backend::ASKED_ROWS;
use crate::program::{BlockId, TokenId};
use crate::reference::choose;
use crate::{BlockTables, Draw, Runner, StepInput, StepLimits, StepOutput};
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

/// All tokens of the case, at positions `all`, of which the first ones give `outputs` rows.
fn input<'a>(case: &'a Case, all: &'a [u32], outputs: usize) -> StepInput<'a> {
    StepInput {
        tokens: &case.sequences[0],
        positions: all,
        rope_lens: &[ROWS as u32; ROWS],
        query_ends: &[ROWS as u32],
        context_lens: &[ROWS as u32],
        block_tables: BlockTables { blocks: &[BlockId(0), BlockId(1), BlockId(2)], ends: &[3] },
        output_rows: &all[..outputs],
        draws: &[],
    }
}

/// All rows of the case with these draws.
fn step(tested: &Tested, case: &Case, draws: &[Option<Draw>]) -> StepOutput {
    let limits = session::limits(case);
    let built = tested.backend.build(&case.program, &Source(&case.weights), &limits);
    let mut runner = built.unwrap_or_else(|e| panic!("{}: {e}", tested.name));
    let all: Vec<u32> = (0..ROWS as u32).collect();
    let input = StepInput { draws, ..input(case, &all, ROWS) };
    let mut output = StepOutput::default();
    // Twice: what the first step leaves must not matter.
    for _ in 0..2 {
        runner.step(&input, &mut output).unwrap_or_else(|e| panic!("{}: {e}", tested.name));
    }
    output
}

/// Any number of 64 bits.
fn mixed(x: u64) -> u64 {
    (x + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Whether even other logarithms choose this token of the case's rows: noise is not lost in the
/// magnitude of the logits.
fn is_clear(logits_v: &[f32], draw: Draw) -> bool {
    let largest = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    draw.temperature != 1.0 || largest.abs() < 1e6
}

/// Draws of every kind, none for each fourth row.
fn draws(round: u64, drawn: bool) -> Vec<Option<Draw>> {
    let draw = |row: u64| {
        let temperature =
            if drawn { [1.0, 0.0, 0.3, 2.5][(row + round) as usize % 4] } else { 0.0 };
        (row % 4 != 3).then_some(Draw { key: mixed(row * 1000 + round), temperature })
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
                    assert_eq!(Some(token), choose(logits_v, draw), "{name}");
                    count += 1;
                }
                None => {
                    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
                    let row_v = &found.logits[row * vocab..][..vocab];
                    assert!(row_v.iter().zip(logits_v).all(same), "{name}");
                    let is_clear =
                        |draw| is_clear(logits_v, draw) && choose(logits_v, draw).is_some();
                    let open = found.chosen.is_empty() || !draws[row].is_some_and(is_clear);
                    assert!(open, "{name}: it is clear");
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

/// One token at `position`, and the choice after it.
fn ask(runner: &mut dyn Runner, token: u32, position: u32, draw: Draw, follows: bool) -> bool {
    let input = StepInput {
        tokens: &[TokenId(token)],
        positions: &[position],
        rope_lens: &[position + 1],
        query_ends: &[1],
        context_lens: &[position + 1],
        block_tables: BlockTables {
            blocks: &[0, 1, 2].map(BlockId)[..=position as usize / 4],
            ends: &[position / 4 + 1],
        },
        output_rows: &[0],
        draws: &[Some(draw)],
    };
    runner.ask(&input, follows).expect("a valid step")
}

/// Steps that follow `first` without the host choose what one step after another would.
fn check_follow(tested: &Tested, first: u32) {
    let case = case(ROWS);
    let plain = step(tested, &case, &[]);
    let built =
        tested.backend.build(&case.program, &Source(&case.weights), &session::limits(&case));
    let mut runner = built.unwrap_or_else(|e| panic!("{}: {e}", tested.name));
    let draw = |position: u32| Draw {
        key: mixed(u64::from(first * 100 + position)),
        temperature: [0.7, 1.0, 0.0][position as usize % 3],
    };
    // Twice, since what the first round keeps must be gone.
    for _ in 0..2 {
        if !ask(runner.as_mut(), first, 0, draw(0), false) {
            return println!("{} does not offer steps that follow", tested.name);
        }
        (1..9).for_each(|position| {
            assert!(ask(runner.as_mut(), position % 5, position, draw(position), true));
        });
        let mut found = vec![];
        runner.answers(&mut found).expect("they were asked for");
        assert_eq!(found.len(), 9);
        let mut token = first as usize;
        for (position, found) in (0..).zip(found) {
            let logits_v = &plain.logits[token * ROWS..][..ROWS];
            let expected =
                choose(logits_v, draw(position)).filter(|_| is_clear(logits_v, draw(position)));
            assert_eq!(found, expected, "{} after {first}, {position}", tested.name);
            let Some(next) = expected else { break };
            token = next.index();
        }
    }
}

#[test]
fn steps_that_follow_each_other_choose_as_single_ones() {
    for tested in backends().into_iter().chain(Options::all().into_iter().filter_map(cuda)) {
        (0..ROWS as u32).for_each(|first| check_follow(&tested, first));
    }
}

/// Draws of step `step` for the sequence `i` of those that begin with `first`.
fn draw_of(first: u32, i: u32, step: u32) -> Draw {
    Draw {
        key: mixed(u64::from(first * 1000 + i * 100 + step)),
        temperature: [0.7, 1.0, 0.0][(step + i) as usize % 3],
    }
}

/// Steps in which each of three sequences wants a token: two leave before the last.
const WANTED: [u32; 3] = [5, 2, 8];

/// Asks for step `step` of three sequences, the first of which begins with `first`. A sequence takes
/// part once more after its last wanted token, without an output row. The sequences that want one;
/// none where no steps are offered.
fn ask_several(runner: &mut dyn Runner, first: u32, step: u32) -> Option<Vec<u32>> {
    let wants = |i: &u32| step < WANTED[*i as usize];
    let all: Vec<u32> = (0..3).filter(|i| wants(i) || step == WANTED[*i as usize]).collect();
    let wanted: Vec<u32> = all.iter().copied().filter(wants).collect();
    let (count, blocks) = (all.len() as u32, step / 4 + 1);
    // Where tokens follow, the host's mean nothing.
    let token = |i: &u32| TokenId(if step == 0 { (first + i) % ROWS as u32 } else { *i });
    let table = |i: &u32| (3 * i..3 * i + blocks).map(BlockId);
    let input = StepInput {
        tokens: &all.iter().map(token).collect::<Vec<_>>(),
        positions: &vec![step; all.len()],
        rope_lens: &vec![step + 1; all.len()],
        query_ends: &(1..=count).collect::<Vec<_>>(),
        context_lens: &vec![step + 1; all.len()],
        block_tables: BlockTables {
            blocks: &all.iter().flat_map(table).collect::<Vec<_>>(),
            ends: &(1..=count).map(|end| end * blocks).collect::<Vec<_>>(),
        },
        output_rows: &(0..count).filter(|&row| wants(&all[row as usize])).collect::<Vec<_>>(),
        draws: &wanted.iter().map(|&i| Some(draw_of(first, i, step))).collect::<Vec<_>>(),
    };
    runner.ask(&input, step > 0).expect("a valid step").then_some(wanted)
}

/// Three sequences of which two leave the steps get what each would alone.
fn check_leaving(tested: &Tested, first: u32) {
    let case = case(ROWS);
    let plain = step(tested, &case, &[]);
    let limits = StepLimits { sequences: 3, blocks: 9, ..session::limits(&case) };
    let built = tested.backend.build(&case.program, &Source(&case.weights), &limits);
    let mut runner = built.unwrap_or_else(|e| panic!("{}: {e}", tested.name));
    for _ in 0..2 {
        let mut rows = vec![];
        for step in 0..8 {
            let Some(wanted) = ask_several(runner.as_mut(), first, step) else { return };
            rows.extend(wanted.into_iter().map(|i| (i, step)));
        }
        let mut found = vec![];
        runner.answers(&mut found).expect("they were asked for");
        assert_eq!((rows.len(), found.len()), (15, 15));
        let mut last = [0, 1, 2].map(|i| Some((first as usize + i) % ROWS));
        for ((i, step), found) in rows.into_iter().zip(found) {
            // What follows a choice left to the host means nothing.
            let Some(token) = last[i as usize] else { continue };
            let (logits_v, draw) = (&plain.logits[token * ROWS..][..ROWS], draw_of(first, i, step));
            let expected = choose(logits_v, draw).filter(|_| is_clear(logits_v, draw));
            assert_eq!(found, expected, "{} {first}, {i} of three, {step}", tested.name);
            last[i as usize] = expected.map(TokenId::index);
        }
    }
}

#[test]
fn sequences_may_leave_steps_that_follow_each_other() {
    for tested in backends().into_iter().chain(Options::all().into_iter().filter_map(cuda)) {
        (0..ROWS as u32).for_each(|first| check_leaving(&tested, first));
    }
}

/// However many rows a plain step before had.
#[test]
fn as_many_rows_are_kept_as_promised() {
    let Some(tested) = cuda(Options::default()) else { return };
    let (case, all) = (case(ROWS), (0..ROWS as u32).collect::<Vec<_>>());
    let built =
        tested.backend.build(&case.program, &Source(&case.weights), &session::limits(&case));
    let mut runner = built.expect("a valid program");
    let (draws, whole, last) = ([Some(Draw::GREEDY); ROWS], ASKED_ROWS / ROWS, ASKED_ROWS % ROWS);
    for (rows, is_kept) in [(last, true), (last + 1, false), (last, true)] {
        let input = |rows| StepInput { draws: &draws[..rows], ..input(&case, &all, rows) };
        runner.step(&input(ROWS), &mut StepOutput::default()).expect("a valid step");
        let mut found = vec![None];
        runner.answers(&mut found).expect("nothing was asked for");
        assert_eq!(found, []);
        for k in 0..whole {
            assert!(runner.ask(&input(ROWS), k > 0).expect("there is room"));
        }
        assert_eq!(runner.ask(&input(rows), true).is_ok(), is_kept, "{rows} of {last}");
        if is_kept {
            runner.answers(&mut found).expect("they were asked for");
            assert_eq!(found.len(), ASKED_ROWS);
        }
    }
}

#[test]
fn cuda_chooses_by_itself_in_every_order_of_threads() {
    for tested in Options::all().into_iter().filter_map(cuda) {
        assert!(check(&tested, &case(300)) >= 20, "{}", tested.name);
    }
}
