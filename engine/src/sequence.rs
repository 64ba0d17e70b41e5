//! One sequence: its tokens, how many of them are computed, and the KV blocks it holds.
//!
//! Plain data with the few rules that must hold however a sequence is scheduled. Not here: when
//! it runs ([`crate::scheduler`]), how tokens are chosen ([`crate::sampler`]), devices.

use crate::grammar::Guide;
use crate::logprobs::LogprobsWanted;
use crate::prefix::Link;
use crate::request::{FinishReason, Request, RequestId};
use crate::sampler::{self, History, SamplingParams};
use crate::speculation::DraftState;
use kernels::Draw;
use kernels::program::{BlockId, TokenId};

/// What a sequence is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Holds no blocks: new, or preempted and to be recomputed.
    Waiting,
    /// Holds blocks for all its tokens but, perhaps, the newest.
    Running,
    /// Finished, failed or cancelled; leaves the engine at the end of the step.
    Ended,
}

/// A request being worked on.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// Its name.
    pub id: RequestId,
    /// Prompt, then generated tokens, then during a step those proposed by a drafter.
    pub tokens: Vec<TokenId>,
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// Tokens at which it ends at the latest: `max_tokens` or the context.
    pub len_max: usize,
    /// Tokens that end it.
    pub stop_tokens: Vec<TokenId>,
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
    /// What its generated text must look like; it has seen all of `tokens` after the prompt.
    pub guide: Option<Guide>,
    /// Which probabilities are reported.
    pub logprobs: Option<LogprobsWanted>,
    /// Tokens of the prompt, the first one included, whose probability needs no reporting any more.
    pub scored: usize,
    /// Its place in line: larger ones go first.
    pub priority: i32,
    /// What it is doing.
    pub phase: Phase,
    /// Tokens whose keys and values are in `blocks`; always fewer than `tokens.len()` between
    /// steps, since a token's logits are wanted before there is a next one.
    pub computed: usize,
    /// Its drafting side.
    pub draft: DraftState,
    /// Its block table.
    pub blocks: Vec<BlockId>,
    /// Names of what its leading full blocks hold, as far as others may share them.
    pub links: Vec<Link>,
    /// Tokens that others had computed when it first got blocks; none before.
    pub cached: Option<usize>,
    /// Steps since it last had a part in one, as the scheduler counts them.
    pub waited: u32,
}

impl Sequence {
    /// A waiting sequence in a context of `context_len` tokens.
    pub fn new(id: RequestId, request: Request, context_len: usize) -> Self {
        let prompt_len = request.prompt.len();
        Self {
            id,
            tokens: request.prompt,
            prompt_len,
            len_max: prompt_len.saturating_add(request.max_tokens as usize).min(context_len),
            stop_tokens: request.stop_tokens,
            sampling: request.sampling,
            guide: request.guide,
            logprobs: request.logprobs,
            scored: 1,
            priority: request.priority,
            phase: Phase::Waiting,
            computed: 0,
            draft: DraftState::default(),
            blocks: Vec::new(),
            links: Vec::new(),
            cached: None,
            waited: 0,
        }
    }

    /// Tokens still to compute before the next one can be chosen; at least one between steps.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The length that chooses rotary speeds for the token at `position`: the length its sequence
    /// had when the token was first computed, which is the whole prompt for prompt tokens. It does
    /// not depend on chunks or preemption, so a recomputed token gets the same keys again.
    pub fn rope_len(&self, position: usize) -> usize {
        self.prompt_len.max(position + 1)
    }

    /// Its tokens as the sampler wants them.
    pub fn history(&self) -> History<'_> {
        let (prompt, generated) = self.tokens.split_at(self.prompt_len);
        History { prompt, generated }
    }

    /// Appends a token that awaits verification; whether another may follow it.
    pub fn propose(&mut self, token: TokenId) -> bool {
        self.tokens.push(token);
        self.draft.proposed += 1;
        !(self.follow(token) || self.stop_tokens.contains(&token))
    }

    /// Appends those of `tokens` that may follow, as tokens that await verification.
    pub fn propose_all(&mut self, tokens: &[TokenId]) {
        let allowed = self.guide.as_mut().map_or(tokens.len(), |guide| guide.accepts(tokens));
        for &token in &tokens[..allowed] {
            // Nothing stands after a token that ends the sequence.
            if !self.propose(token) {
                break;
            }
        }
    }

    /// Shows its guide a token; whether the grammar ends with it.
    fn follow(&mut self, token: TokenId) -> bool {
        let Some(guide) = &mut self.guide else { return false };
        guide.push(token);
        guide.is_over()
    }

    /// The row of logits `[v]` its next token is chosen from: without what its guide forbids, which
    /// then is written to `row_v`.
    ///
    /// # Errors
    /// Why its guide allows no token.
    pub fn allowed<'a>(
        &mut self,
        logits_v: &'a [f32],
        row_v: &'a mut Vec<f32>,
    ) -> Result<&'a [f32], String> {
        let Some(guide) = &mut self.guide else { return Ok(logits_v) };
        row_v.clear();
        row_v.extend_from_slice(logits_v);
        guide.mask(row_v)?;
        Ok(row_v)
    }

    /// How the token at `position` is chosen, where its logits alone decide and nobody else wants them.
    pub fn draw(&self, position: usize) -> Option<Draw> {
        let free = self.guide.is_none() && self.logprobs.is_none() && self.draft.laws.is_empty();
        let generated = position.checked_sub(self.prompt_len).filter(|_| free)?;
        sampler::draw(&self.sampling, generated, position as u32)
    }

    /// Moves the proposed tokens from its end into `proposed` and counts them.
    pub fn take_proposed(&mut self, proposed: &mut Vec<TokenId>) {
        proposed.clear();
        let count = std::mem::take(&mut self.draft.proposed);
        proposed.extend(self.tokens.drain(self.tokens.len() - count..));
        if let Some(guide) = &mut self.guide {
            guide.pop(count);
        }
        self.draft.counts.cycles += u64::from(count > 0);
        self.draft.counts.drafted_tokens += count as u64;
    }

    /// Most tokens that are worth proposing: with the one chosen after them it ends.
    pub fn proposals_max(&self) -> usize {
        self.len_max.saturating_sub(self.tokens.len() + 1)
    }

    /// Whether probabilities of prompt tokens are still to be reported.
    pub fn scores_prompt(&self) -> bool {
        self.scored < self.prompt_len && self.logprobs.is_some_and(|wanted| wanted.prompt)
    }

    /// Gives up what was computed, in all models: it starts anew from its tokens.
    pub fn reset(&mut self) {
        self.computed = 0;
        self.links.clear();
        (self.draft.computed, self.draft.shared, self.draft.locked) = (0, 0, 0);
        self.waited = 0;
        self.phase = Phase::Waiting;
    }

    /// Appends a chosen token; says why the sequence ends if it does.
    pub fn push(&mut self, token: TokenId) -> Option<FinishReason> {
        self.tokens.push(token);
        if self.follow(token) || self.stop_tokens.contains(&token) {
            return Some(FinishReason::Stop);
        }
        (self.tokens.len() >= self.len_max).then_some(FinishReason::Length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(prompt: u32, max_tokens: u32, context_len: usize) -> Sequence {
        let prompt = (0..prompt).map(TokenId).collect();
        let stop_tokens = vec![TokenId(9)];
        let request = Request { stop_tokens, ..Request::new(prompt, max_tokens) };
        Sequence::new(RequestId(1), request, context_len)
    }

    #[test]
    fn ends_at_the_limit_at_the_context_or_at_a_stop_token() {
        let mut limited = sequence(3, 2, 100);
        assert_eq!(limited.push(TokenId(1)), None);
        assert_eq!(limited.push(TokenId(1)), Some(FinishReason::Length));
        let mut full = sequence(3, u32::MAX, 5);
        assert_eq!(full.push(TokenId(1)), None);
        assert_eq!(full.push(TokenId(9)), Some(FinishReason::Stop), "stop wins over length");
        assert_eq!(full.history().generated, [TokenId(1), TokenId(9)]);
    }

    #[test]
    fn prompt_tokens_use_the_whole_prompts_length() {
        let sequence = sequence(4, 9, 100);
        let lens: Vec<usize> = (0..7).map(|p| sequence.rope_len(p)).collect();
        assert_eq!(lens, [4, 4, 4, 4, 5, 6, 7]);
    }
}
