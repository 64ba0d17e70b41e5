//! How many tokens each sequence wants proposed: asking the policy, and telling it what came of it.
//!
//! Input: the engine's sequences before and after a step. Not here: the choice itself
//! ([`crate::speculation::policy`]).

use super::Engine;
use crate::scheduler::StepPart;
use crate::sequence::{Phase, Sequence};
use crate::speculation::policy::{Outcome, Prospect, Source, Verdict};
use crate::speculation::{Drafter, Length, Policy, Speculation};

impl Engine {
    /// Says how many tokens each sequence wants proposed.
    pub(super) fn choose_lengths(&mut self) {
        let Some(speculation) = &mut self.speculation else { return };
        let most = self.config.max_drafted;
        let sequences = &mut self.sequences;
        match &mut speculation.length {
            Length::Fixed(tokens) => {
                sequences.iter_mut().for_each(|s| s.draft.wanted = most.min(*tokens));
            }
            Length::Auto(policy) => {
                let chooser = Chooser { drafter: &speculation.drafter, most };
                chooser.follow(policy, sequences);
                chooser.choose(policy, sequences, self.config.step_tokens);
            }
        }
        for sequence in sequences.iter_mut().filter(|s| s.phase == Phase::Waiting) {
            sequence.draft.follows = speculation.drafter.follows(sequence);
        }
    }

    /// Replaces how many tokens are proposed from the next step on and returns what it was; with
    /// no draft there is nothing to replace, and `length` comes back.
    pub fn replace_length(&mut self, length: Length) -> Length {
        match &mut self.speculation {
            Some(speculation) => std::mem::replace(&mut speculation.length, length),
            None => length,
        }
    }

    /// What drafts of `source` are worth by now; none without [`Length::Auto`].
    pub fn verdict(&self, source: Source) -> Option<Verdict> {
        match &self.speculation.as_ref()?.length {
            Length::Fixed(_) => None,
            Length::Auto(policy) => Some(policy.verdict(source)),
        }
    }

    /// Tells the policy that sequence `part.sequence` decoded: of `drafted` proposed tokens
    /// `accepted` were accepted, and `tokens` were generated.
    pub(super) fn record(
        &mut self,
        part: StepPart,
        drafted: usize,
        accepted: usize,
        tokens: usize,
    ) {
        let Some(policy) = policy(&mut self.speculation) else { return };
        let draft = &mut self.sequences[part.sequence].draft;
        let outcome = Outcome {
            source: draft.source,
            drafted,
            // A sequence that ended on an accepted token left the others unjudged.
            judged: drafted.min(tokens),
            accepted,
            tokens,
            caught_up: draft.caught_up,
        };
        policy.record(&mut draft.acceptance, &outcome);
    }

    /// Ends the step for the policy; `prefill_rows` were computed beside the decoding sequences.
    pub(super) fn settle(&mut self, prefill_rows: usize) {
        if let Some(policy) = policy(&mut self.speculation) {
            policy.settle(prefill_rows);
        }
    }
}

fn policy(speculation: &mut Option<Speculation>) -> Option<&mut Policy> {
    match &mut speculation.as_mut()?.length {
        Length::Fixed(_) => None,
        Length::Auto(policy) => Some(policy),
    }
}

/// What the policy must know about sequences.
struct Chooser<'a> {
    drafter: &'a Drafter,
    most: usize,
}

impl Chooser<'_> {
    /// For sequences that do not decode yet: whether the draft model follows their prompts.
    fn follow(&self, policy: &mut Policy, sequences: &mut [Sequence]) {
        for sequence in sequences {
            if !std::mem::replace(&mut sequence.draft.known, true) {
                policy.open();
            }
            if !decodes(sequence) {
                let follows = policy.follows(&self.prospect(sequence));
                sequence.draft.wanted = usize::from(follows).min(self.most);
            }
        }
    }

    /// For those that do: how many tokens are proposed, in a step of at most `step_tokens` rows.
    fn choose(&self, policy: &mut Policy, sequences: &mut [Sequence], step_tokens: usize) {
        policy.begin();
        sequences.iter_mut().filter(|s| decodes(s)).for_each(|s| self.drafter.foresee(s));
        let (mut decoding, mut prefill) = (0, 0);
        for sequence in sequences.iter() {
            if decodes(sequence) {
                policy.add(&self.prospect(sequence));
                decoding += 1;
            } else {
                prefill += sequence.pending();
            }
        }
        let lengths = policy.choose(prefill.min(step_tokens.saturating_sub(decoding)));
        for (sequence, length) in sequences.iter_mut().filter(|s| decodes(s)).zip(lengths) {
            sequence.draft.wanted = length;
        }
    }

    fn prospect<'s>(&self, sequence: &'s Sequence) -> Prospect<'s> {
        let (len, draft) = (sequence.tokens.len(), &sequence.draft);
        let most = if self.drafter.reaches(sequence) { self.most } else { 0 };
        Prospect {
            source: draft.source,
            acceptance: &draft.acceptance,
            most: most.min(sequence.proposals_max()),
            lag: len - 1 - draft.computed,
            left: sequence.len_max - len,
        }
    }
}

/// Whether the sequence needs one token to go on.
fn decodes(sequence: &Sequence) -> bool {
    sequence.phase == Phase::Running && sequence.pending() == 1
}
