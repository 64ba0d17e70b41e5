//! The inside of a step: draft, run, and book what the verifier says.
//!
//! Input: the plan of [`crate::scheduler`] over the engine's sequences. Not here: what callers
//! see ([`super`]), which tokens are proposed ([`crate::speculation`]).

use super::{Engine, Progress, finished};
use crate::Error;
use crate::logprobs::token_logprob;
use crate::request::{Event, TokenSource};
use crate::sampler::{Law, LogitsError, Sampler};
use crate::scheduler::StepPart;
use crate::sequence::Sequence;
use crate::sharing;
use crate::speculation::rejection::{self, Verdict};
use crate::speculation::{Rule, simulated};
use kernels::program::TokenId;

impl Engine {
    /// Has tokens proposed where the plan has room for them.
    pub(super) fn draft(&mut self) -> Result<(), Error> {
        let Some(speculation) = &mut self.speculation else { return Ok(()) };
        let (parts, rule) = (self.scheduler.parts_mut(), speculation.rule);
        let sequences = &mut self.sequences;
        sequences.iter_mut().for_each(|s| s.draft.caught_up = s.draft.computed);
        speculation.drafter.propose(parts, sequences, rule)?;
        for draft in sequences.iter_mut().map(|s| &mut s.draft) {
            // Each step of the draft computes one token at least, and proposes one.
            draft.caught_up = (draft.computed - draft.caught_up).saturating_sub(draft.proposed);
        }
        Ok(())
    }

    /// Runs the planned parts; leaves `[r, v]` logits in `output`.
    pub(super) fn run(&mut self) -> Result<(), Error> {
        let parts = &self.scheduler.last().parts;
        if parts.is_empty() {
            return Ok(());
        }
        self.batch.pack(parts, &self.sequences, self.config.block_len);
        let input = self.batch.input();
        self.runner.step(&input, &mut self.output)?;
        let (expected, found) =
            (input.output_rows.len() * self.config.vocab, self.output.logits.len());
        if expected == found {
            return Ok(());
        }
        let reason = format!("expected {expected} logits of the runner, found {found}");
        Err(kernels::Error::Input { reason }.into())
    }

    /// Books the computed tokens and chooses new ones.
    pub(super) fn commit(&mut self, events: &mut Vec<Event>) -> Progress {
        let (mut prefill_tokens, mut decode_tokens, mut row) = (0, 0, 0);
        for k in 0..self.scheduler.last().parts.len() {
            let part = self.scheduler.last().parts[k];
            let sequence = &mut self.sequences[part.sequence];
            let (len, proposed) = (sequence.tokens.len(), sequence.draft.proposed);
            let decode = part.start >= sequence.prompt_len && part.start + proposed + 1 == len;
            sequence.computed = part.end - proposed;
            let before = sequence.draft.counts.accepted_tokens;
            let scored = self.score_prompt(part, row, events);
            let chosen = if part.outputs > scored {
                self.extend(part, row + scored, events)
            } else {
                sharing::offer(&mut self.sequences[part.sequence], &mut self.pool);
                0
            };
            if decode {
                decode_tokens += chosen;
                let accepted = self.sequences[part.sequence].draft.counts.accepted_tokens - before;
                self.record(part, proposed, accepted as usize, chosen);
            } else {
                prefill_tokens += part.end - part.start;
            }
            row += part.outputs;
        }
        self.settle(prefill_tokens);
        Progress::Worked { prefill_tokens, decode_tokens }
    }

    /// Tells how likely the known tokens after the first output rows of `part` were, where that
    /// was asked for; how many rows precede known tokens.
    fn score_prompt(&mut self, part: StepPart, row: usize, events: &mut Vec<Event>) -> usize {
        let sequence = &mut self.sequences[part.sequence];
        let len = sequence.tokens.len() - sequence.draft.proposed;
        let first = part.end - part.outputs + 1;
        let known = len.saturating_sub(first).min(part.outputs);
        let Some(wanted) = sequence.logprobs.filter(|_| known > 0) else { return known };
        let (vocab, id) = (self.config.vocab, sequence.id);
        for (i, position) in (first..(first + known).min(sequence.prompt_len)).enumerate() {
            if position < sequence.scored {
                continue;
            }
            let logits_v = &self.output.logits[(row + i) * vocab..][..vocab];
            let logprob = token_logprob(logits_v, sequence.tokens[position], wanted.top);
            events.push(Event::Prompt { id, logprob });
            sequence.scored = position + 1;
        }
        known
    }

    /// Chooses tokens after `part` from the output rows that begin at `row`, until the verifier
    /// does not accept a proposed token or the sequence ends; how many.
    fn extend(&mut self, part: StepPart, row: usize, events: &mut Vec<Event>) -> usize {
        let sequence = &mut self.sequences[part.sequence];
        sequence.take_proposed(&mut self.proposed);
        let (id, len) = (sequence.id, sequence.tokens.len());
        let rule = self.speculation.as_ref().map_or(Rule::Coupled, |s| s.rule);
        let rows = self.output.logits[row * self.config.vocab..].chunks_exact(self.config.vocab);
        let mut end = None;
        let wanted = sequence.logprobs;
        for (i, logits_v) in rows.take(1 + self.proposed.len()).enumerate() {
            let ready = self.output.chosen.get(row + i).copied().flatten();
            let guess = Guess { proposed: self.proposed.get(i).copied(), ready, row: i, rule };
            let chosen = sequence.allowed(logits_v, &mut self.allowed_v).and_then(|allowed_v| {
                guess.resolve(&mut self.sampler, allowed_v, sequence).map_err(|e| e.to_string())
            });
            match chosen {
                Ok((token, source)) => {
                    let logprob = wanted.map(|w| token_logprob(logits_v, token, w.top));
                    events.push(Event::Token { id, token, source, logprob });
                    end = (sequence.push(token)).map(|reason| finished(sequence, reason));
                    if source == TokenSource::Corrected {
                        break;
                    }
                }
                Err(error) => {
                    let reason = format!("no token can be chosen at position {}: {error}", len + i);
                    end = Some(Event::Failed { id, reason });
                }
            }
            if end.is_some() {
                break;
            }
        }
        sequence.draft.computed = sequence.draft.computed.min(sequence.computed);
        let chosen = sequence.tokens.len() - len;
        sharing::offer(sequence, &mut self.pool);
        if let Some(event) = end {
            self.end(part.sequence, event, events);
        }
        chosen
    }
}

/// One output row that may confirm a proposed token.
struct Guess {
    proposed: Option<TokenId>,
    /// What the runner chose of the row, whose logits then mean nothing.
    ready: Option<TokenId>,
    /// Which row of its sequence.
    row: usize,
    rule: Rule,
}

impl Guess {
    /// The token that stands after `sequence` and how it came about; books an accepted one.
    fn resolve(
        &self,
        sampler: &mut Sampler,
        logits_v: &[f32],
        sequence: &mut Sequence,
    ) -> Result<(TokenId, TokenSource), LogitsError> {
        let position = sequence.tokens.len() as u32;
        let Some(proposed) = self.proposed else {
            let source = if self.row == 0 { TokenSource::Plain } else { TokenSource::Bonus };
            return Ok((self.choose(sampler, logits_v, sequence)?, source));
        };
        let chosen = self.judge(proposed, sampler, logits_v, sequence)?;
        let accepted = match self.rule {
            Rule::Simulated(rate) => simulated(rate, sequence.sampling.seed, position),
            Rule::Coupled | Rule::Rejection => chosen == proposed,
        };
        if !accepted {
            return Ok((chosen, TokenSource::Corrected));
        }
        sequence.computed += 1;
        sequence.draft.counts.accepted_tokens += 1;
        Ok((proposed, TokenSource::Drafted))
    }

    /// The model's own choice of the token after `sequence`.
    fn choose(
        &self,
        sampler: &mut Sampler,
        logits_v: &[f32],
        sequence: &Sequence,
    ) -> Result<TokenId, LogitsError> {
        let (params, position) = (&sequence.sampling, sequence.tokens.len() as u32);
        let chosen = || sampler.sample(logits_v, &sequence.history(), params, position);
        self.ready.map_or_else(chosen, Ok)
    }

    /// The token that stands where `proposed` was proposed: itself if it is accepted. (A residual
    /// never holds the rejected token, so equality says the same for both rules.)
    fn judge(
        &self,
        proposed: TokenId,
        sampler: &mut Sampler,
        logits_v: &[f32],
        sequence: &Sequence,
    ) -> Result<TokenId, LogitsError> {
        let (params, position) = (&sequence.sampling, sequence.tokens.len() as u32);
        let Some(draft) = sequence.draft.laws.get(self.row) else {
            return self.choose(sampler, logits_v, sequence);
        };
        let mut verifier = Law::point(TokenId(0));
        sampler.law(logits_v, &sequence.history(), params, &mut verifier)?;
        Ok(match rejection::judge(&verifier, draft, proposed, params.seed, position) {
            Verdict::Accepted => proposed,
            Verdict::Replaced(token) => token,
        })
    }
}
