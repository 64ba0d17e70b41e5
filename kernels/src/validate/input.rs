//! Checks the arrays of one step against each other, the program and the runner's limits.
//!
//! Runs before every step, so nothing is allocated unless a check fails.
//!
//! Not here: whether a block really holds what the sequence wrote earlier; that is the engine's
//! block bookkeeping.

use crate::program::{BlockId, Op};
use crate::{Error, Program, StepInput, StepLimits};
use std::ops::Range;

/// A rule that is broken, with what was expected and found.
type Broken = String;

/// Checks one step's arrays.
///
/// After this holds: at least one sequence, each with at least one token; its positions are the
/// last of its context; its table covers the context; no block is written through two tables.
///
/// # Errors
/// [`Error::Input`] naming the array with what was expected and found.
pub fn input(program: &Program, limits: &StepLimits, input: &StepInput<'_>) -> Result<(), Error> {
    lengths(limits, input)
        .and_then(|()| tokens(program, input))
        .and_then(|()| sequences(limits, input))
        .and_then(|()| written_once(limits, input))
        .and_then(|()| outputs(input))
        .map_err(|reason| Error::Input { reason })
}

fn require(holds: bool, broken: impl FnOnce() -> Broken) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err(broken()) }
}

fn lengths(limits: &StepLimits, input: &StepInput<'_>) -> Result<(), Broken> {
    let (t, s, r) = (input.tokens.len(), input.query_ends.len(), input.output_rows.len());
    for (name, found, most) in [("tokens", t, limits.tokens), ("query_ends", s, limits.sequences)] {
        require((1..=most).contains(&found), || {
            format!("expected 1 to {most} entries of {name}, found {found}")
        })?;
    }
    require(r <= limits.outputs, || {
        format!("expected at most {} entries of output_rows, found {r}", limits.outputs)
    })?;
    for (name, found, expected) in [
        ("positions", input.positions.len(), t),
        ("rope_lens", input.rope_lens.len(), t),
        ("context_lens", input.context_lens.len(), s),
        ("block_tables.ends", input.block_tables.ends.len(), s),
    ] {
        require(found == expected, || {
            format!("expected {expected} entries of {name}, found {found}")
        })?;
    }
    let draws = input.draws.len();
    require(draws == 0 || draws == r, || {
        format!("expected {r} or no entries of draws, found {draws}")
    })?;
    ends("query_ends", input.query_ends, t)?;
    ends("block_tables.ends", input.block_tables.ends, input.block_tables.blocks.len())
}

/// Strictly ascending ends, the first above zero, the last at `total`.
fn ends(name: &str, ends: &[u32], total: usize) -> Result<(), Broken> {
    let mut start = 0;
    for &end in ends {
        require(end > start, || format!("expected ascending {name}, found {end} after {start}"))?;
        start = end;
    }
    require(start as usize == total, || format!("expected {name} up to {total}, found {start}"))
}

fn tokens(program: &Program, input: &StepInput<'_>) -> Result<(), Broken> {
    for step in &program.steps {
        let Op::Embed { table, .. } = step.op else { continue };
        let [vocab, _] = program.weights[table.index()].shape;
        let beyond = input.tokens.iter().find(|token| token.index() >= vocab);
        beyond.map_or(Ok(()), |token| {
            Err(format!("expected tokens below {vocab}, found {}", token.0))
        })?;
    }
    let pairs = input.rope_lens.iter().zip(input.positions);
    let short = pairs.clone().find(|(len, position)| len <= position);
    short.map_or(Ok(()), |(len, position)| {
        Err(format!("expected rope_lens above position {position}, found {len}"))
    })
}

/// Token rows of sequence `i`.
fn rows(input: &StepInput<'_>, i: usize) -> Range<usize> {
    let start = if i == 0 { 0 } else { input.query_ends[i - 1] };
    start as usize..input.query_ends[i] as usize
}

fn sequences(limits: &StepLimits, input: &StepInput<'_>) -> Result<(), Broken> {
    for (i, &context_len) in input.context_lens.iter().enumerate() {
        let positions = &input.positions[rows(input, i)];
        let context = context_len as usize;
        require(context >= positions.len(), || {
            let new = positions.len();
            format!("expected context_lens[{i}] of at least {new}, found {context}")
        })?;
        require(context <= limits.context_len, || {
            let most = limits.context_len;
            format!("expected context_lens[{i}] of at most {most}, found {context}")
        })?;
        let first = context - positions.len();
        let wrong = positions.iter().enumerate().find(|(j, p)| **p as usize != first + j);
        wrong.map_or(Ok(()), |(j, p)| {
            Err(format!("expected position {} in sequence {i}, found {p}", first + j))
        })?;
        table(limits, input.block_tables.of(i), context)
            .map_err(|reason| format!("block table of sequence {i}: {reason}"))?;
    }
    Ok(())
}

fn table(limits: &StepLimits, blocks: &[BlockId], context: usize) -> Result<(), Broken> {
    let room = blocks.len().saturating_mul(limits.block_len);
    require(room >= context, || format!("expected room for {context} positions, found {room}"))?;
    let beyond = blocks.iter().find(|block| block.index() >= limits.blocks);
    beyond.map_or(Ok(()), |block| {
        Err(format!("expected block ids below {}, found {}", limits.blocks, block.0))
    })
}

/// Blocks that sequence `i` writes in this step.
fn written<'a>(limits: &StepLimits, input: &StepInput<'a>, i: usize) -> &'a [BlockId] {
    let context = input.context_lens[i] as usize;
    let first = context - rows(input, i).len();
    let blocks = input.block_tables.of(i);
    &blocks[first / limits.block_len..context.div_ceil(limits.block_len)]
}

/// Two writers of one block would race in a parallel backend and corrupt each other in any.
fn written_once(limits: &StepLimits, input: &StepInput<'_>) -> Result<(), Broken> {
    let s = input.query_ends.len();
    for i in 0..s {
        let mine = written(limits, input, i);
        for (at, block) in mine.iter().enumerate() {
            let others = (i + 1..s).flat_map(|j| written(limits, input, j));
            let twice = mine[at + 1..].iter().chain(others).any(|other| other == block);
            require(!twice, || format!("block {} would be written through two entries", block.0))?;
        }
    }
    Ok(())
}

fn outputs(input: &StepInput<'_>) -> Result<(), Broken> {
    let t = input.tokens.len();
    let mut least = 0;
    for &row in input.output_rows {
        require(row as usize >= least && (row as usize) < t, || {
            format!("expected output_rows ascending within {least}..{t}, found {row}")
        })?;
        least = row as usize + 1;
    }
    Ok(())
}

#[cfg(test)]
#[path = "input_tests.rs"]
mod tests;
