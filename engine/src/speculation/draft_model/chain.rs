//! Steps of a draft that follow each other on the device: the host waits once for all their tokens.
//!
//! Where a step's tokens stand is known before what they are, so all steps of a cycle are asked for
//! at once, and each reads the tokens that the one before it chose ([`kernels::Runner::ask`]). Every
//! chosen token is one of the next step. So a sequence that wants no more takes part once more, at
//! the last of its proposed tokens, which lies in its own blocks, and without an output row.
//!
//! What was chosen behind a token that ends a sequence is dropped, and so is what follows a choice
//! that the runner leaves to the host: a plain step then computes that row anew, for its logits. In
//! both cases the draft's length says that nothing was computed there, as after a rejected token.
//! So proposed tokens and lengths are those of one plain step after another.
//!
//! Not here: how a cycle begins, and steps whose logits are wanted ([`super`]). Input: the packed
//! first step.

use super::DraftModel;
use crate::Error;
use crate::scheduler::StepPart;
use crate::sequence::Sequence;
use kernels::backend::ASKED_ROWS;
use kernels::program::TokenId;

/// What was asked for and did not come back yet.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// The part that each output row belongs to, step by step.
    rows: Vec<usize>,
    /// The tokens chosen in those rows.
    answers: Vec<Option<TokenId>>,
    /// The parts of a step that follows.
    parts: Vec<StepPart>,
    /// Whether some row's choice is the host's, so that the next step must be a plain one.
    unclear: bool,
}

impl DraftModel {
    /// Proposes what the packed step and those that can follow it choose by themselves. Whether they
    /// could be asked for; if not, nothing was done.
    ///
    /// # Errors
    /// Those of the runner.
    pub(super) fn propose_chain(&mut self, sequences: &mut [Sequence]) -> Result<bool, Error> {
        self.chain.rows.clear();
        let unclear = std::mem::take(&mut self.chain.unclear);
        if unclear || !self.wants_several() || !self.may_ask() {
            return Ok(false);
        }
        if !self.runner.ask(&self.batch.input(), false)? {
            return Ok(false);
        }
        self.begin(sequences);
        for step in 1.. {
            if !self.plan(step, sequences) || !self.runner.ask(&self.batch.input(), true)? {
                break;
            }
            self.note(step);
        }
        self.collect(sequences)?;
        Ok(true)
    }

    /// Whether a sequence wants more than the token that a plain step brings just as soon.
    fn wants_several(&self) -> bool {
        let mut parts = self.parts.iter().zip(&self.ends);
        parts.any(|(part, &end)| part.outputs > 0 && part.end + 1 < end)
    }

    /// Whether the packed step leaves all choices to the runner, which has room for them.
    fn may_ask(&self) -> bool {
        let rows = self.chain.rows.len() + self.batch.input().output_rows.len();
        self.batch.is_drawn() && rows <= ASKED_ROWS
    }

    /// Books the first step, and drops the parts that only follow a prompt.
    fn begin(&mut self, sequences: &mut [Sequence]) {
        self.replan(|part, _| {
            sequences[part.sequence].draft.computed = part.end;
            (part.outputs > 0).then_some(part)
        });
        self.note(0);
    }

    /// Notes whose tokens step `step` chooses: `step` more than the token behind the first step.
    fn note(&mut self, step: usize) {
        let parts = self.parts.iter().zip(&self.ends).enumerate();
        let wanted = parts.filter(|(_, (part, end))| part.end + step < **end);
        self.chain.rows.extend(wanted.map(|(k, _)| k));
    }

    /// Packs step `step` of the chain: the tokens chosen in the one before, and output rows where
    /// others are wanted behind them. Whether there are any, and the step may be asked for.
    fn plan(&mut self, step: usize, sequences: &[Sequence]) -> bool {
        self.chain.parts.clear();
        for (part, &last) in self.parts.iter().zip(&self.ends) {
            let (start, end) = (part.end + step - 1, part.end + step);
            if start < last {
                let outputs = usize::from(end < last);
                self.chain.parts.push(StepPart { start, end, outputs, ..*part });
            }
        }
        self.batch.pack_unknown(&self.chain.parts, sequences, self.limits.block_len);
        // Who proposed up to the end of the context has no position left in which to take part.
        self.may_ask() && self.chain.parts.iter().all(|part| part.end <= self.context_len)
    }

    /// Fetches the chosen tokens, appends them as proposed ones, and plans the next step for
    /// sequences that want more.
    fn collect(&mut self, sequences: &mut [Sequence]) -> Result<(), Error> {
        let Chain { rows, answers, unclear, .. } = &mut self.chain;
        self.runner.answers(answers)?;
        let (expected, found) = (rows.len(), answers.len());
        if expected != found {
            let reason = format!("expected {expected} tokens of the runner, found {found}");
            return Err(kernels::Error::Input { reason }.into());
        }
        for (&k, &answer) in rows.iter().zip(answers.iter()) {
            let part = &mut self.parts[k];
            // Without outputs: the sequence ended, or its next token is the host's to choose.
            if part.outputs > 0 {
                part.outputs = usize::from(book(&mut sequences[part.sequence], answer));
                *unclear |= answer.is_none();
            }
        }
        self.replan(|part, end| next(part, end, &sequences[part.sequence]));
        Ok(())
    }

    /// Replaces each part by what `next` makes of it and of its end, or drops it.
    fn replan(&mut self, mut next: impl FnMut(StepPart, usize) -> Option<StepPart>) {
        let mut kept = 0;
        for k in 0..self.parts.len() {
            let end = self.ends[k];
            if let Some(part) = next(self.parts[k], end) {
                (self.parts[kept], self.ends[kept]) = (part, end);
                kept += 1;
            }
        }
        self.parts.truncate(kept);
        self.ends.truncate(kept);
    }
}

/// Books that `sequence` was computed to its end, and proposes what was chosen behind it; whether
/// another token may follow.
fn book(sequence: &mut Sequence, answer: Option<TokenId>) -> bool {
    sequence.draft.computed = sequence.tokens.len();
    answer.is_some_and(|token| sequence.propose(token))
}

/// The part in which a sequence goes on after a chain, if it wants tokens up to `end`.
fn next(part: StepPart, end: usize, sequence: &Sequence) -> Option<StepPart> {
    let len = sequence.tokens.len();
    // No token stands behind the last computed one: the host is to choose it.
    let unclear = sequence.draft.computed == len;
    let goes_on = part.outputs > 0 && len < end;
    (unclear || goes_on).then(|| StepPart { start: len - 1, end: len, outputs: 1, ..part })
}
