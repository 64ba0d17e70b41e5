//! A valid two-sequence step, broken in one array at a time.

use super::*;
use crate::program::{Rows, SlotDecl, SlotId, Step, TokenId, WeightDecl, WeightId};
use crate::{BlockTables, Draw};
use proptest::prelude::*;
use quant::{FloatType, Format};

const LIMITS: StepLimits = StepLimits {
    tokens: 6,
    sequences: 2,
    outputs: 3,
    blocks: 8,
    block_len: 2,
    context_len: 7,
    trace: false,
};

/// Only the embedding matters here: it gives the vocabulary.
fn embedding(vocab: usize) -> Program {
    let op = Op::Embed { table: WeightId(0), out: SlotId(0) };
    let format = Format::Dense(FloatType::F32);
    Program {
        weights: vec![WeightDecl::new("embed", [vocab, 4], format)],
        slots: vec![SlotDecl { label: "x".to_owned(), rows: Rows::Tokens, width: 4 }],
        ropes: vec![],
        kv: vec![],
        steps: vec![Step { op, label: "embed".to_owned() }],
        logits: SlotId(0),
    }
}

/// The arrays of a step, owned so that a test can break one.
#[derive(Debug)]
struct Arrays {
    tokens: Vec<TokenId>,
    positions: Vec<u32>,
    rope_lens: Vec<u32>,
    query_ends: Vec<u32>,
    context_lens: Vec<u32>,
    blocks: Vec<BlockId>,
    table_ends: Vec<u32>,
    output_rows: Vec<u32>,
    draws: Vec<Option<Draw>>,
}

/// Sequence 0 adds positions 2..5 in blocks 1, 3, 4; sequence 1 adds position 3 in blocks 1, 7.
fn valid() -> Arrays {
    Arrays {
        tokens: [0, 9, 5, 3].map(TokenId).to_vec(),
        positions: vec![2, 3, 4, 3],
        rope_lens: vec![5, 5, 5, 4],
        query_ends: vec![3, 4],
        context_lens: vec![5, 4],
        blocks: [1, 3, 4, 1, 7].map(BlockId).to_vec(),
        table_ends: vec![3, 5],
        output_rows: vec![2, 3],
        draws: vec![],
    }
}

fn check(arrays: &Arrays) -> Result<(), Error> {
    let block_tables = BlockTables { blocks: &arrays.blocks, ends: &arrays.table_ends };
    let step = StepInput {
        tokens: &arrays.tokens,
        positions: &arrays.positions,
        rope_lens: &arrays.rope_lens,
        query_ends: &arrays.query_ends,
        context_lens: &arrays.context_lens,
        block_tables,
        output_rows: &arrays.output_rows,
        draws: &arrays.draws,
    };
    super::input(&embedding(10), &LIMITS, &step)
}

fn broken(change: impl FnOnce(&mut Arrays), reason: &str) {
    let mut arrays = valid();
    change(&mut arrays);
    let err = check(&arrays).expect_err("the input is broken").to_string();
    assert!(err.contains(reason), "{err}");
}

#[test]
fn a_step_of_two_sequences_is_valid() {
    check(&valid()).unwrap();
    let mut silent = valid();
    silent.output_rows.clear();
    check(&silent).unwrap();
    let mut chosen = valid();
    chosen.draws = vec![None, Some(Draw::GREEDY)];
    check(&chosen).unwrap();
}

#[test]
fn lengths_must_agree() {
    broken(|a| a.tokens.push(TokenId(1)), "expected 5 entries of positions, found 4");
    broken(|a| a.tokens.clear(), "expected 1 to 6 entries of tokens, found 0");
    broken(|a| a.tokens = vec![TokenId(0); 7], "expected 1 to 6 entries of tokens, found 7");
    broken(|a| a.query_ends = vec![1, 2, 4], "expected 1 to 2 entries of query_ends, found 3");
    broken(|a| a.output_rows = vec![0, 1, 2, 3], "expected at most 3 entries of output_rows");
    broken(|a| a.rope_lens.clear(), "expected 4 entries of rope_lens, found 0");
    broken(|a| a.context_lens.push(1), "expected 2 entries of context_lens, found 3");
    broken(|a| a.draws = vec![None], "expected 2 or no entries of draws, found 1");
    broken(|a| a.table_ends.truncate(1), "expected 2 entries of block_tables.ends, found 1");
}

#[test]
fn ends_must_ascend_to_the_total() {
    broken(|a| a.query_ends = vec![4, 4], "expected ascending query_ends, found 4 after 4");
    broken(|a| a.query_ends = vec![0, 4], "expected ascending query_ends, found 0 after 0");
    broken(|a| a.query_ends = vec![3, 5], "expected query_ends up to 4, found 5");
    broken(|a| a.query_ends = vec![1, 3], "expected query_ends up to 4, found 3");
    broken(|a| a.table_ends = vec![3, 9], "expected block_tables.ends up to 5, found 9");
    broken(|a| a.table_ends = vec![5, 3], "expected ascending block_tables.ends, found 3 after 5");
}

#[test]
fn tokens_and_positions_are_checked() {
    broken(|a| a.tokens[1] = TokenId(10), "expected tokens below 10, found 10");
    broken(|a| a.positions[1] = 2, "expected position 3 in sequence 0, found 2");
    broken(|a| a.positions[3] = 2, "expected position 3 in sequence 1, found 2");
    broken(|a| a.context_lens[0] = 2, "expected context_lens[0] of at least 3, found 2");
    broken(|a| a.context_lens[0] = 6, "expected position 3 in sequence 0, found 2");
    broken(|a| a.context_lens[1] = 8, "expected context_lens[1] of at most 7, found 8");
    broken(|a| a.rope_lens[2] = 4, "expected rope_lens above position 4, found 4");
}

#[test]
fn block_tables_are_checked() {
    broken(|a| a.blocks[4] = BlockId(8), "expected block ids below 8, found 8");
    broken(
        |a| {
            a.blocks.remove(2);
            a.table_ends = vec![2, 4];
        },
        "block table of sequence 0: expected room for 5 positions, found 4",
    );
    broken(|a| a.blocks[2] = BlockId(7), "block 7 would be written through two entries");
    broken(|a| a.blocks[2] = BlockId(3), "block 3 would be written through two entries");
    let mut read_by_both = valid();
    read_by_both.blocks[3] = BlockId(1);
    check(&read_by_both).unwrap();
}

#[test]
fn output_rows_ascend_within_the_step() {
    broken(|a| a.output_rows = vec![3, 2], "expected output_rows ascending within 4..4, found 2");
    broken(|a| a.output_rows = vec![1, 1], "expected output_rows ascending within 2..4, found 1");
    broken(|a| a.output_rows = vec![4], "expected output_rows ascending within 0..4, found 4");
}

/// Any small numbers in any array, lengths mostly as they should be.
fn any_arrays() -> impl Strategy<Value = Arrays> {
    let numbers = |most: u32| prop::collection::vec(0..most, 0..6);
    let first = (numbers(11), numbers(6), numbers(7), numbers(6));
    let second = (numbers(9), numbers(9), numbers(6), numbers(5));
    (first, second).prop_map(|((a, b, c, d), (e, f, g, h))| Arrays {
        tokens: a.into_iter().map(TokenId).collect(),
        positions: b,
        rope_lens: c,
        query_ends: d,
        context_lens: e,
        blocks: f.into_iter().map(BlockId).collect(),
        table_ends: g,
        output_rows: h,
        draws: vec![],
    })
}

proptest! {
    #[test]
    fn no_input_panics(arrays in any_arrays()) {
        let _ = check(&arrays);
    }

    /// One number of a valid step changed to anything, the largest included.
    #[test]
    fn no_single_change_panics(array in 0usize..8, at in 0usize..8, value: u32, small in 0u32..12) {
        for value in [value, small, u32::MAX] {
            let mut a = valid();
            let mut tokens: Vec<u32> = a.tokens.iter().map(|t| t.0).collect();
            let mut blocks: Vec<u32> = a.blocks.iter().map(|b| b.0).collect();
            let all = [
                &mut tokens,
                &mut a.positions,
                &mut a.rope_lens,
                &mut a.query_ends,
                &mut a.context_lens,
                &mut blocks,
                &mut a.table_ends,
                &mut a.output_rows,
            ];
            for (i, numbers) in all.into_iter().enumerate() {
                if i == array && at < numbers.len() {
                    numbers[at] = value;
                }
            }
            a.tokens = tokens.into_iter().map(TokenId).collect();
            a.blocks = blocks.into_iter().map(BlockId).collect();
            let _ = check(&a);
        }
    }
}
