//! Who proposes tokens: one enum over all kinds of drafters.
//!
//! Input: the parts that the scheduler planned with room for proposals, and their sequences.
//! Output: tokens at the sequences' ends, and parts cut to what was proposed. A drafter may
//! propose fewer tokens than there is room for, or none; it can never change the text.

use super::DraftModel;
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

    /// Appends proposed tokens to the sequences of `parts`, and cuts each part to them.
    ///
    /// # Errors
    /// Those of the draft model's runner.
    pub fn propose(
        &mut self,
        parts: &mut [StepPart],
        sequences: &mut [Sequence],
    ) -> Result<(), Error> {
        match self {
            Self::Model(model) => model.propose(parts, sequences)?,
        }
        for part in parts {
            let sequence = &sequences[part.sequence];
            part.end = part.end.min(sequence.tokens.len());
            part.outputs = part.outputs.min(1 + sequence.draft.proposed);
        }
        Ok(())
    }
}
