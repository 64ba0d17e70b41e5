//! Launches that choose tokens from the logits, after all steps of a program.
//!
//! Not here: what becomes of rows without a certain token ([`crate::cuda::runner`]). Input: the
//! program's logits as its steps leave them.

use super::{List, THREADS, args};

/// Logits of a block, as `shaders/cuda/choose.cu` has them.
const CHUNK: usize = 4096;
/// Bytes of what is known of a chunk of a row.
const PART: usize = 32;

/// Blocks of a row of `vocab` logits.
fn chunks(vocab: usize) -> usize {
    vocab.div_ceil(CHUNK)
}

/// Bytes that are needed between the launches for `outputs` rows of `vocab` logits.
pub(crate) fn bytes(vocab: usize, outputs: usize) -> usize {
    outputs * (chunks(vocab) + 1) * PART
}

impl List<'_> {
    /// Chooses the tokens of rows that have a draw; `drawn` says whether there is any but the
    /// greatest logit to choose.
    pub(super) fn choose(&mut self, drawn: bool) {
        let (inputs, choices) = (&self.plan.inputs, &self.plan.choices);
        let (step, draws) = (inputs.counts(), inputs.draws());
        let (logits, width) = (self.slot(self.program.logits), self.width(self.program.logits));
        let args =
            args![step, logits, draws, choices.parts, choices.counters, choices.chosen, width];
        let grid = [chunks(width), self.rows.outputs, 1];
        if drawn {
            self.push("choose_greatest", grid, THREADS, args.clone());
            self.push("choose_drawn", grid, THREADS, args);
        } else {
            self.push("choose_greatest", grid, THREADS, args);
        }
    }
}
