//! How often a draft would be right in a text: both models read it, chunk by chunk.
//!
//! Beyond its context a draft proposes nothing, so nothing is scored there. Input: runners with
//! room for the text. Not here: what follows from the laws ([`engine::speculation::rank`]).

use super::texts::Text;
use crate::load::Unexpected;
use anyhow::Context;
use engine::forward;
use engine::sampler::{Law, LogitsError, Sampler};
use engine::speculation::rank;
use engine::speculation::vocab::VocabMap;
use kernels::program::TokenId;
use kernels::{Runner, StepLimits, StepOutput};
use std::ops::Range;

/// A model that reads.
pub(super) struct Reader<'a> {
    runner: &'a mut dyn Runner,
    /// What it was built for.
    limits: StepLimits,
    /// How its tokens are the target's.
    vocab: VocabMap,
    output: StepOutput,
    sampler: Sampler,
    law: Law,
    /// A row of logits in the target's ids.
    row_v: Vec<f32>,
}

impl<'a> Reader<'a> {
    /// Reads by `runner`, which was built for `limits`.
    pub(super) fn new(runner: &'a mut dyn Runner, limits: StepLimits, vocab: VocabMap) -> Self {
        Self {
            runner,
            limits,
            vocab,
            output: StepOutput::default(),
            sampler: Sampler::default(),
            law: Law::point(TokenId(0)),
            row_v: Vec::new(),
        }
    }

    /// `ids` of the target in the ids of this model.
    fn own(&self, ids: &[TokenId]) -> Vec<TokenId> {
        ids.iter().map(|&id| self.vocab.to_draft(id)).collect()
    }

    /// Computes the logits after those tokens of `range` that are not before `first`.
    fn read(
        &mut self,
        text: forward::Text<'_>,
        range: Range<usize>,
        first: usize,
    ) -> anyhow::Result<()> {
        forward::extend(self.runner, &self.limits, text, range, first, &mut self.output)
            .context(Unexpected)
    }

    /// The law of the token at `position` of `text`, by row `row` of what was computed last.
    fn law(&mut self, row: usize, text: &Text, position: usize) -> Result<&Law, LogitsError> {
        let v = self.vocab.draft_vocab();
        let mut logits_v = &self.output.logits[row * v..(row + 1) * v];
        if !self.vocab.is_identity() {
            self.vocab.row(logits_v, &mut self.row_v);
            logits_v = &self.row_v;
        }
        self.sampler.law(logits_v, &text.history(position), &text.sampling, &mut self.law)?;
        Ok(&self.law)
    }
}

/// Scores a draft on the tokens of `text` that are to be predicted after at most `reach` others.
/// Both readers have the same limits.
///
/// # Errors
/// [`Unexpected`] where a runner or the target fails; else what is wrong with the draft's logits.
pub(super) fn score(
    target: &mut Reader<'_>,
    draft: &mut Reader<'_>,
    text: &Text,
    reach: usize,
) -> anyhow::Result<rank::Prompt> {
    let (ids, prompt_len) = (draft.own(&text.ids), text.prompt_len);
    let [targets, drafts] = [&text.ids, &ids].map(|ids| forward::Text { ids, prompt_len });
    let mut scores = rank::Prompt::default();
    // Logits speak of the token after, and after the last one there is none.
    let (first, end) = (text.first - 1, reach.min(text.ids.len() - 1));
    let limits = target.limits;
    for range in forward::pieces(0..end, &limits) {
        target.read(targets, range.clone(), first)?;
        draft.read(drafts, range.clone(), first)?;
        for (row, after) in (first.max(range.start)..range.end).enumerate() {
            let position = after + 1;
            let verifier = target.law(row, text, position).context(Unexpected)?;
            let drafted = draft
                .law(row, text, position)
                .with_context(|| format!("it cannot draft after {position} tokens"))?;
            scores.push(position as u32, verifier, drafted);
        }
    }
    Ok(scores)
}
