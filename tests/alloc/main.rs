//! Counts what a step of the CPU backend allocates. A binary of its own, since the count is of
//! the whole process, and without a harness, whose threads would be counted too.
//!
//! Input: the demo pair, whose models have three and six layers.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

mod counter;

use counter::ALLOCATIONS;
use engine::files::ModelFiles;
use engine::model::Model;
use kernels::cpu::{CpuBackend, CpuOptions};
use kernels::program::{BlockId, TokenId};
use kernels::{Backend, BlockTables, StepInput, StepLimits, StepOutput};
use std::path::Path;
use std::sync::atomic::Ordering;

/// The most that any of several steps of `rows` tokens allocated.
fn allocations(name: &str, rows: usize) -> usize {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/demo").join(name);
    let model = Model::open(ModelFiles::Folder(dir)).expect("a demo model");
    let limits = StepLimits {
        tokens: rows,
        sequences: 1,
        outputs: 1,
        blocks: 4,
        block_len: 16,
        context_len: 64,
        trace: false,
    };
    let backend = CpuBackend::new(&CpuOptions { threads: Some(2), isa: None }).expect("cpu");
    let runner = backend.build(model.program(), &model.weights(), &limits);
    let mut runner = runner.expect("a runner");
    let (tokens, blocks) = (vec![TokenId(5); rows], [0, 1, 2, 3].map(BlockId));
    let positions: Vec<u32> = (0..rows as u32).collect();
    let t = rows as u32;
    let input = StepInput {
        tokens: &tokens,
        positions: &positions,
        rope_lens: &vec![t; rows],
        query_ends: &[t],
        context_lens: &[t],
        block_tables: BlockTables { blocks: &blocks, ends: &[4] },
        output_rows: &[t - 1],
        draws: &[],
    };
    let mut output = StepOutput::default();
    let mut most = 0;
    for step in 0..12 {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        runner.step(&input, &mut output).expect("a step");
        let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
        // The first steps grow what is kept from then on.
        most = if step < 2 { 0 } else { most.max(made) };
    }
    most
}

fn main() {
    a_step_allocates_nothing();
    println!("a step allocates nothing: ok");
}

fn a_step_allocates_nothing() {
    for (name, rows) in [("draft", 1), ("verifier", 1), ("verifier", 33)] {
        let made = allocations(name, rows);
        println!("{name}, {rows} rows: at most {made} allocations a step");
        assert_eq!(made, 0, "a step allocates: {name}, {rows} rows");
    }
}
