//! A draft model: a second runner that proposes tokens one step after another.
//!
//! It follows the verifier through a sequence's prompt, chunk by chunk, and its keys and values
//! lie in the sequence's own KV blocks (in its own memory for them), so one block table serves
//! both, and giving a sequence up or going back to an earlier length costs nothing. Where it lags
//! behind (it was not asked for a while), it first catches up within a step's limits. Blocks that
//! sequences share ([`crate::sharing`]) it writes to for one of them alone. Where the runner can go
//! from step to step by itself, it does ([`chain`]).
//!
//! Not here: whether drafting pays, acceptance. All sequences draft in one batch.

mod chain;

use super::vocab::VocabMap;
use super::{Rule, rejection};
use crate::Error;
use crate::batch::Batch;
use crate::sampler::{Law, LogitsError, Sampler};
use crate::scheduler::StepPart;
use crate::sequence::Sequence;
use chain::Chain;
use kernels::program::TokenId;
use kernels::{Runner, StepLimits, StepOutput};

/// A runner that drafts.
pub struct DraftModel {
    runner: Box<dyn Runner>,
    vocab: VocabMap,
    context_len: usize,
    limits: StepLimits,
    batch: Batch,
    output: StepOutput,
    sampler: Sampler,
    /// A row of logits in the verifier's ids.
    row_v: Vec<f32>,
    /// The same without what a grammar forbids.
    allowed_v: Vec<f32>,
    /// What the next step of the draft computes, and up to which length its sequence may grow.
    parts: Vec<StepPart>,
    ends: Vec<usize>,
    chain: Chain,
}

impl std::fmt::Debug for DraftModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DraftModel").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl DraftModel {
    /// A draft model over a runner built for `limits`, whose blocks must be those of the
    /// verifier's runner in number and length.
    ///
    /// # Panics
    /// If the context is empty.
    pub fn new(
        runner: Box<dyn Runner>,
        limits: &StepLimits,
        vocab: VocabMap,
        context_len: u32,
    ) -> Self {
        assert!(context_len > 0, "a model has a context");
        Self {
            runner,
            vocab,
            context_len: context_len as usize,
            limits: *limits,
            batch: Batch::new(limits),
            output: StepOutput::default(),
            sampler: Sampler::default(),
            row_v: Vec::new(),
            allowed_v: Vec::new(),
            parts: Vec::new(),
            ends: Vec::new(),
            chain: Chain::default(),
        }
    }

    /// The runner, for memory figures and tests.
    pub(crate) fn runner(&mut self) -> &mut dyn Runner {
        self.runner.as_mut()
    }

    /// Whether its context holds the sequence and it may write to the blocks that it lacks.
    pub(crate) fn reaches(&self, sequence: &Sequence) -> bool {
        sequence.tokens.len() <= self.context_len && is_open(sequence)
    }

    /// Follows the sequences of `parts` that want drafts, and proposes tokens where a part has
    /// room for them and nobody has proposed any.
    ///
    /// # Errors
    /// Those of the runner.
    pub(crate) fn propose(
        &mut self,
        parts: &[StepPart],
        sequences: &mut [Sequence],
        rule: Rule,
    ) -> Result<(), Error> {
        self.start(parts, sequences);
        while !self.parts.is_empty() {
            self.pack(sequences, rule);
            if !self.propose_chain(sequences)? {
                self.runner.step(&self.batch.input(), &mut self.output)?;
                self.sample(sequences, rule);
            }
        }
        Ok(())
    }

    /// Packs the next step; where the runner's own choice is not the draft's, all logits are wanted.
    fn pack(&mut self, sequences: &[Sequence], rule: Rule) {
        self.batch.pack(&self.parts, sequences, self.limits.block_len);
        if !self.vocab.is_identity() {
            self.batch.map_tokens(|token| self.vocab.to_draft(token));
        }
        let by_law = |part: &StepPart| is_by_law(&sequences[part.sequence], rule);
        if !self.vocab.is_identity() || self.parts.iter().any(by_law) {
            self.batch.want_logits();
        }
    }

    /// The first step: catching up with the verifier, as far as the limits allow.
    fn start(&mut self, parts: &[StepPart], sequences: &[Sequence]) {
        self.parts.clear();
        self.ends.clear();
        let mut tokens_left = self.limits.tokens;
        for part in parts {
            let sequence = &sequences[part.sequence];
            let (len, start) = (sequence.tokens.len(), sequence.draft.computed);
            let known = part.end.min(len).min(self.context_len);
            let end = known.min(start + tokens_left);
            let wanted = sequence.draft.wanted > 0 && sequence.draft.proposed == 0;
            if !wanted || end <= start || !is_open(sequence) {
                continue;
            }
            let outputs = usize::from(end == len && part.end > len);
            tokens_left -= end - start;
            self.parts.push(StepPart { sequence: part.sequence, start, end, outputs });
            self.ends.push(part.end.min(self.context_len + 1));
        }
    }

    /// Books the step, appends a token wherever one was wanted, and plans the next step.
    fn sample(&mut self, sequences: &mut [Sequence], rule: Rule) {
        let (mut row, mut kept) = (0, 0);
        for k in 0..self.parts.len() {
            let (part, end) = (self.parts[k], self.ends[k]);
            let sequence = &mut sequences[part.sequence];
            sequence.draft.computed = part.end;
            if part.outputs == 0 {
                continue;
            }
            let goes_on = self.choose(row, sequence, rule);
            row += 1;
            let len = sequence.tokens.len();
            if goes_on && len < end {
                self.parts[kept] = StepPart { start: part.end, end: len, ..part };
                self.ends[kept] = end;
                kept += 1;
            }
        }
        self.parts.truncate(kept);
        self.ends.truncate(kept);
    }

    /// Appends the choice of output row `row` to `sequence` as a proposed token; whether to go on.
    fn choose(&mut self, row: usize, sequence: &mut Sequence, rule: Rule) -> bool {
        if let Some(token) = self.output.chosen.get(row).copied().flatten() {
            return sequence.propose(token);
        }
        let vocab = self.vocab.draft_vocab();
        let mut logits_v = &self.output.logits[row * vocab..(row + 1) * vocab];
        if !self.vocab.is_identity() {
            self.vocab.row(logits_v, &mut self.row_v);
            logits_v = &self.row_v;
        }
        // A grammar that allows the draft nothing leaves the verifier to say so.
        let allowed = sequence.allowed(logits_v, &mut self.allowed_v);
        allowed.is_ok_and(|logits_v| propose(&mut self.sampler, logits_v, sequence, rule))
    }
}

/// Whether no block that the draft model lacks is one that another sequence's draft writes to.
fn is_open(sequence: &Sequence) -> bool {
    sequence.draft.computed >= sequence.draft.locked
}

/// Whether the law that its proposed tokens are drawn from is wanted.
fn is_by_law(sequence: &Sequence, rule: Rule) -> bool {
    rule == Rule::Rejection && sequence.sampling.temperature > 0.0
}

/// Appends the draft's choice to `sequence` as a proposed token; whether to go on. A row without
/// a choice (the draft computed no finite logits) proposes nothing: the verifier goes on alone.
fn propose(sampler: &mut Sampler, logits_v: &[f32], sequence: &mut Sequence, rule: Rule) -> bool {
    let choice = if is_by_law(sequence, rule) {
        draw(sampler, logits_v, sequence)
    } else {
        let position = sequence.tokens.len() as u32;
        sampler.sample(logits_v, &sequence.history(), &sequence.sampling, position)
    };
    let Ok(token) = choice else { return false };
    sequence.propose(token)
}

/// A draw that shares no noise with the verifier's choice, whose law is kept.
fn draw(
    sampler: &mut Sampler,
    logits_v: &[f32],
    sequence: &mut Sequence,
) -> Result<TokenId, LogitsError> {
    let (seed, position) = (sequence.sampling.seed, sequence.tokens.len() as u32);
    let mut law = Law::point(TokenId(0));
    sampler.law(logits_v, &sequence.history(), &sequence.sampling, &mut law)?;
    let token = rejection::propose(&law, seed, position);
    sequence.draft.laws.push(law);
    Ok(token)
}
