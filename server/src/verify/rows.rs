//! Logits as they are used: a runner that remembers what it computed, by position.
//!
//! For one sequence at a time. Of each row it keeps the greatest entries and a hash of all, so
//! that two runs can be compared without keeping their logits. All tokens are chosen from logits, by
//! the caller.

use kernels::backend::RunnerMemory;
use kernels::program::{SlotId, TokenId};
use kernels::{Error, Runner, StepInput, StepOutput};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

/// Entries of a row that are kept.
const TOP: usize = 5;

/// Logits of one position.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    /// Which row of its step it was, from 0, and how many there were.
    pub row: usize,
    /// Rows with logits in that step.
    pub rows: usize,
    /// Hash of all entries' bits.
    pub bits: u64,
    /// The greatest entries, in descending order; of equal ones the first.
    pub top: Vec<(TokenId, f32)>,
}

/// The rows recorded since they were last taken. A position that is computed again (its token was
/// drafted and not accepted the first time) keeps the last row, the one whose token stands.
#[derive(Debug, Clone, Default)]
pub(super) struct Rows(Arc<Mutex<BTreeMap<u32, Row>>>);

impl Rows {
    /// Takes them, by position.
    pub(super) fn take(&self) -> BTreeMap<u32, Row> {
        // Rows are inserted whole, so even a lock that saw a panic guards whole ones.
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn insert(&self, position: u32, row: Row) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(position, row);
    }
}

/// A runner that records. It offers no steps that follow each other ([`Runner::ask`]): nobody sees
/// their logits.
pub(super) struct Recorder {
    inner: Box<dyn Runner>,
    vocab: usize,
    rows: Rows,
}

impl Recorder {
    pub(super) fn new(inner: Box<dyn Runner>, vocab: usize, rows: &Rows) -> Self {
        Self { inner, vocab, rows: rows.clone() }
    }
}

impl Runner for Recorder {
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
        // Of a row whose token the runner chooses nothing else would be known.
        let input = &StepInput { draws: &[], ..*input };
        self.inner.step(input, output)?;
        let rows = input.output_rows.len();
        let logits = output.logits.chunks_exact(self.vocab).zip(input.output_rows).enumerate();
        for (row, (logits_v, &token_row)) in logits {
            let (bits, top) = (hash(logits_v), top(logits_v));
            self.rows.insert(input.positions[token_row as usize], Row { row, rows, bits, top });
        }
        Ok(())
    }

    fn read_slot(&mut self, slot: SlotId, out: &mut Vec<f32>) -> Result<(), Error> {
        self.inner.read_slot(slot, out)
    }

    fn memory(&self) -> RunnerMemory {
        self.inner.memory()
    }

    fn poison(&mut self, live: &[usize]) {
        self.inner.poison(live);
    }
}

fn hash(logits_v: &[f32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    logits_v.iter().for_each(|logit| hasher.write_u32(logit.to_bits()));
    hasher.finish()
}

fn top(logits_v: &[f32]) -> Vec<(TokenId, f32)> {
    let mut top: Vec<(TokenId, f32)> = Vec::with_capacity(TOP + 1);
    for (i, &logit) in logits_v.iter().enumerate() {
        if top.len() == TOP && top[TOP - 1].1.total_cmp(&logit).is_ge() {
            continue;
        }
        let place = top.partition_point(|(_, other)| other.total_cmp(&logit).is_ge());
        top.insert(place, (TokenId(i as u32), logit));
        top.truncate(TOP);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::program::BlockId;
    use kernels::{BlockTables, Draw};

    #[test]
    fn the_greatest_entries_come_first_and_ties_keep_their_order() {
        let found = top(&[1.0, 7.0, -2.0, 7.0, 3.0, 0.5, 9.0]);
        let ids: Vec<u32> = found.iter().map(|(id, _)| id.0).collect();
        assert_eq!(ids, [6, 1, 3, 4, 0]);
        assert_eq!(top(&[2.0]), [(TokenId(0), 2.0)]);
    }

    #[test]
    fn the_hash_sees_single_bits() {
        assert_eq!(hash(&[1.0, 2.0]), hash(&[1.0, 2.0]));
        assert_ne!(hash(&[1.0, 2.0]), hash(&[1.0, f32::from_bits(2.0f32.to_bits() + 1)]));
        assert_ne!(hash(&[0.0]), hash(&[-0.0]));
    }

    /// Chooses wherever it may, and then computes no logits.
    struct Chooser;

    impl Runner for Chooser {
        fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
            output.logits = if input.draws.is_empty() { vec![1.0, 3.0] } else { vec![f32::NAN; 2] };
            output.chosen = input.draws.iter().map(|draw| draw.map(|_| TokenId(0))).collect();
            Ok(())
        }

        fn read_slot(&mut self, _: SlotId, _: &mut Vec<f32>) -> Result<(), Error> {
            Ok(())
        }

        fn memory(&self) -> RunnerMemory {
            RunnerMemory::default()
        }

        fn poison(&mut self, _: &[usize]) {}
    }

    #[test]
    fn a_row_is_recorded_though_the_runner_could_choose_its_token() {
        let rows = Rows::default();
        let mut recorder = Recorder::new(Box::new(Chooser), 2, &rows);
        let input = StepInput {
            tokens: &[TokenId(1)],
            positions: &[6],
            rope_lens: &[7],
            query_ends: &[1],
            context_lens: &[7],
            block_tables: BlockTables { blocks: &[BlockId(0)], ends: &[1] },
            output_rows: &[0],
            draws: &[Some(Draw::GREEDY)],
        };
        let mut output = StepOutput::default();
        recorder.step(&input, &mut output).unwrap();
        assert!(output.chosen.is_empty(), "the token comes from the logits");
        assert_eq!(rows.take()[&6].top, [(TokenId(1), 3.0), (TokenId(0), 1.0)]);
    }
}
