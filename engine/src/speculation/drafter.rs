//! Who proposes tokens: one enum over all kinds of drafters.
//!
//! Input: the parts that the scheduler planned with room for proposals, and their sequences.
//! Output: tokens at the sequences' ends, and parts cut to what was proposed. A drafter may
//! propose fewer tokens than there is room for, or none; it can never change the text.

use super::{DraftModel, Rule};
use crate::Error;
use crate::scheduler::StepPart;
use crate::sequence::Sequence;

/// Proposes the next tokens of sequences.
#[derive(Debug)]
pub enum Drafter {
    /// A smaller model.
    Model(DraftModel),
}

impl Drafter {
    /// The draft model, if there is one.
    pub(crate) fn model(&mut self) -> Option<&mut DraftModel> {
        match self {
            Self::Model(model) => Some(model),
        }
    }

    /// Whether it can propose a token after `len` tokens.
    pub(crate) fn reaches(&self, len: usize) -> bool {
        match self {
            Self::Model(model) => model.reaches(len),
        }
    }

    /// Appends proposed tokens to the sequences of `parts`, and cuts each part to them; `rule` says
    /// what they are drawn with and whether their laws are kept.
    ///
    /// # Errors
    /// Those of the draft model's runner.
    pub fn propose(
        &mut self,
        parts: &mut [StepPart],
        sequences: &mut [Sequence],
        rule: Rule,
    ) -> Result<(), Error> {
        sequences.iter_mut().for_each(|s| s.draft.laws.clear());
        match self {
            Self::Model(model) => model.propose(parts, sequences, rule)?,
        }
        for part in parts {
            let sequence = &sequences[part.sequence];
            part.end = part.end.min(sequence.tokens.len());
            part.outputs = part.outputs.min(1 + sequence.draft.proposed);
        }
        Ok(())
    }
}
