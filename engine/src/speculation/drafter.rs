//! Who proposes tokens: one enum over all kinds of drafters.
//!
//! Input: the parts that the scheduler planned with room for proposals, and their sequences.
//! Output: tokens at the sequences' ends, and parts cut to what was proposed. A drafter may
//! propose fewer tokens than there is room for, or none; it can never change the text.

use super::policy::Source;
use super::{DraftModel, Rule};
use crate::Error;
use crate::sampler::Law;
use crate::scheduler::StepPart;
use crate::sequence::Sequence;

/// Proposes the next tokens of sequences.
#[derive(Debug)]
pub enum Drafter {
    /// What followed where the text's end occurred before ([`super::lookup`]).
    Lookup(LookupRule),
    /// A smaller model.
    Model(DraftModel),
    /// What can be looked up, and the model where nothing can.
    Cascade(LookupRule, DraftModel),
}

/// When what was looked up is proposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LookupRule {
    /// Tokens of the text's end that must have occurred before, at least.
    pub least_match: usize,
}

impl LookupRule {
    /// For lookup alone: of Rust sources, about four in ten tokens are right after a match of two.
    pub const ALONE: Self = Self { least_match: 2 };
    /// Before a model: a match of six is right about as often as a good draft model.
    pub const BEFORE_A_MODEL: Self = Self { least_match: 6 };
}

impl Drafter {
    /// The draft model, if there is one.
    pub(crate) fn model(&mut self) -> Option<&mut DraftModel> {
        match self {
            Self::Lookup(_) => None,
            Self::Model(model) | Self::Cascade(_, model) => Some(model),
        }
    }

    /// Notes who would propose the next tokens of a sequence that has none proposed.
    pub(crate) fn foresee(&self, sequence: &mut Sequence) {
        let (Self::Lookup(least) | Self::Cascade(least, _)) = self else { return };
        let Sequence { tokens, draft, .. } = sequence;
        draft.lookup.extend(&tokens[draft.lookup.len()..]);
        draft.source = match draft.lookup.matched() {
            matched if matched >= least.least_match => Source::Lookup { matched },
            _ => Source::Model,
        };
    }

    /// Whether the one who was foreseen can propose a token after the sequence's.
    pub(crate) fn reaches(&self, sequence: &Sequence) -> bool {
        match (self, sequence.draft.source) {
            (_, Source::Lookup { .. }) => true,
            (Self::Lookup(_), Source::Model) => false,
            (Self::Model(model) | Self::Cascade(_, model), Source::Model) => {
                model.reaches(sequence)
            }
        }
    }

    /// Whether a draft model is to follow a sequence that begins.
    pub(crate) fn follows(&self, sequence: &Sequence) -> bool {
        match self {
            Self::Lookup(_) => false,
            Self::Model(model) | Self::Cascade(_, model) => {
                sequence.draft.wanted > 0 && model.reaches(sequence)
            }
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
            Self::Lookup(least) => look_up(*least, parts, sequences, rule),
            Self::Model(model) => model.propose(parts, sequences, rule)?,
            Self::Cascade(least, model) => {
                look_up(*least, parts, sequences, rule);
                model.propose(parts, sequences, rule)?;
            }
        }
        for part in parts {
            let sequence = &sequences[part.sequence];
            let surplus = part.end.saturating_sub(sequence.tokens.len());
            part.end -= surplus;
            part.outputs -= surplus;
        }
        Ok(())
    }
}

/// Proposes what was looked up wherever a part has room for it.
fn look_up(least: LookupRule, parts: &[StepPart], sequences: &mut [Sequence], rule: Rule) {
    for part in parts {
        let sequence = &mut sequences[part.sequence];
        let len = sequence.tokens.len();
        if part.end <= len {
            continue;
        }
        let Sequence { tokens, draft, .. } = sequence;
        draft.lookup.extend(&tokens[draft.lookup.len()..]);
        draft.lookup.propose(part.end - len, least.least_match, tokens);
        let found = tokens.split_off(len);
        sequence.propose_all(&found);
        let Sequence { tokens, draft, .. } = sequence;
        if rule == Rule::Rejection && sequence.sampling.temperature > 0.0 {
            draft.laws.extend(tokens[len..].iter().map(|&token| Law::point(token)));
        }
    }
}
