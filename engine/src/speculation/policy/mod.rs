//! How many tokens to draft in a cycle, from measured costs and measured acceptance; 0 is a choice.
//!
//! The rule: draft the tokens that give the most expected tokens per expected time. Tokens are
//! added one by one, over all sequences the one with the best chance per cost first, and as many
//! are kept as give the best rate. For one sequence that is the marginal rule ("one more while its
//! chance per its own cost is above the tokens per time so far") except that a bump in the
//! verifier's cost does not stop the search. [`Account`] bounds what being wrong may cost, and says
//! when to probe again while nothing pays.
//!
//! Input: [`Costs`] from whoever owns a clock, prospects and outcomes from [`crate::engine`]. Not
//! here: a clock, tokens, who proposes them.

mod acceptance;
mod account;
mod costs;
#[cfg(test)]
mod tests;
mod verdict;

pub use acceptance::{Acceptance, POSITIONS, Source};
pub use costs::{Costs, Curve, DraftCosts};
pub use verdict::Verdict;

use acceptance::SOURCES;
use account::Account;

/// How much faster than plain decoding a cycle must promise to be: what is expected to gain less
/// is not worth being wrong.
const MARGIN: f64 = 0.02;
/// Cycles over which catching up should pay for itself.
const CATCH_UP_CYCLES: f64 = 64.0;
/// Tokens that may be added without a better rate before the search ends, if there are not more
/// sequences: bumps in the verifier's cost come from kernels that take rows by so many.
const PATIENCE: usize = 8;
/// Tokens of a sequence over which following its prompt should pay for itself.
const FOLLOW_TOKENS: usize = 256;

/// Chooses draft lengths.
#[derive(Debug, Clone)]
pub struct Policy {
    costs: Costs,
    longest: usize,
    /// Of all sequences.
    acceptance: Acceptance,
    /// Tokens of each source that were judged and accepted since the engine began.
    judged: [(u64, u64); SOURCES],
    account: Account,
    candidates: Vec<Candidate>,
    /// Candidates in the order in which tokens were added.
    order: Vec<usize>,
    /// What the step that runs now has done.
    done: Load,
    tokens: usize,
}

/// A sequence that decodes, before a step.
#[derive(Debug, Clone, Copy)]
pub struct Prospect<'a> {
    /// Who would propose.
    pub source: Source,
    /// The sequence's own counts.
    pub acceptance: &'a Acceptance,
    /// Most tokens that may be proposed.
    pub most: usize,
    /// Tokens that a draft model must compute before it can propose the first one.
    pub lag: usize,
    /// Most tokens that the sequence may still generate.
    pub left: usize,
}

/// What became of a sequence that decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Who proposed.
    pub source: Source,
    /// Tokens proposed.
    pub drafted: usize,
    /// The first of these, that were judged: all accepted ones and the rejected one.
    pub judged: usize,
    /// The first of these, that were accepted.
    pub accepted: usize,
    /// Tokens generated.
    pub tokens: usize,
    /// Tokens that the draft model computed beyond one for each that it proposed.
    pub caught_up: usize,
}

#[derive(Debug, Clone)]
struct Candidate {
    chances: [f64; POSITIONS],
    model: bool,
    /// Whether its source was right lately.
    proven: bool,
    most: usize,
    lag: usize,
    /// Most tokens that the sequence may still generate.
    left: usize,
    /// Cycles that share the price of catching up.
    cycles: f64,
    length: usize,
}

impl Candidate {
    /// Seconds of catching up before the first token.
    fn catch_up(&self, costs: &Costs) -> f64 {
        let lag = if self.length == 0 { self.lag as f64 } else { 0.0 };
        costs.draft.as_ref().map_or(0.0, |draft| draft.prefill_token * lag)
    }

    /// What the next token adds to a step of `load` beside its row.
    fn own_seconds(&self, load: &Load, costs: &Costs) -> f64 {
        let Some(draft) = costs.draft.as_ref().filter(|_| self.model) else {
            return if self.length == 0 { costs.lookup } else { 0.0 };
        };
        let others = load.drafting[self.length];
        let step = draft.step.seconds(others + 1) - draft.step.seconds(others);
        let start = if load.drafting[0] == 0 { draft.start } else { 0.0 };
        start + step + self.catch_up(costs) / self.cycles
    }
}

/// The work of a step.
#[derive(Debug, Clone, Copy, Default)]
struct Load {
    sequences: usize,
    /// Rows of other sequences, which prefill.
    other: usize,
    drafted: usize,
    /// Sequences for which the draft model proposes a first token, a second, and so on.
    drafting: [usize; POSITIONS],
    lookups: usize,
    caught_up: usize,
}

impl Load {
    fn draft(&mut self, model: bool, tokens: usize) {
        self.drafted += tokens;
        if model {
            self.drafting.iter_mut().take(tokens).for_each(|n| *n += 1);
        } else {
            self.lookups += usize::from(tokens > 0);
        }
    }

    /// One more token for `candidate`, the first of which may need catching up.
    fn add(&mut self, candidate: &Candidate) {
        self.drafted += 1;
        let first = candidate.length == 0;
        if candidate.model {
            self.drafting[candidate.length] += 1;
            self.caught_up += if first { candidate.lag } else { 0 };
        } else {
            self.lookups += usize::from(first);
        }
    }

    /// Seconds, without prefill: the step of one row for each sequence, and what is added to it.
    fn seconds(&self, costs: &Costs) -> f64 {
        let plain = self.other + self.sequences;
        let added = costs.verify.seconds(plain + self.drafted) - costs.verify.seconds(plain);
        let drafts = costs.draft.as_ref().map_or(0.0, |draft| {
            let steps = self.drafting.iter().take_while(|&&n| n > 0);
            let steps: f64 = steps.map(|&n| draft.step.seconds(n)).sum();
            let start = if steps > 0.0 { draft.start } else { 0.0 };
            start + steps + draft.prefill_token * self.caught_up as f64
        });
        costs.verify.seconds(self.sequences) + added + drafts + costs.lookup * self.lookups as f64
    }

    /// Seconds of a token without drafts.
    fn plain_token(&self, costs: &Costs) -> f64 {
        costs.verify.seconds(self.sequences) / self.sequences.max(1) as f64
    }
}

impl Policy {
    /// A policy that drafts at most `longest` tokens, and at most [`POSITIONS`].
    pub fn new(costs: Costs, longest: usize) -> Self {
        Self {
            costs,
            longest: longest.min(POSITIONS),
            acceptance: Acceptance::default(),
            judged: [(0, 0); SOURCES],
            account: Account::default(),
            candidates: Vec::new(),
            order: Vec::new(),
            done: Load::default(),
            tokens: 0,
        }
    }

    /// What drafts of `source` are worth, for one sequence.
    pub fn verdict(&self, source: Source) -> Verdict {
        let (judged, accepted) = self.judged[source.index()];
        let measured = (judged > 0).then(|| accepted as f64 / judged as f64);
        Verdict::new(&self.costs, source, self.longest, measured)
    }

    /// Takes in a sequence.
    pub(crate) fn open(&mut self) {
        self.acceptance.fade();
    }

    /// Whether a draft model should compute the `prospect.lag` tokens of a sequence's prompt beside
    /// the verifier, so that it can propose when the prompt is done.
    ///
    /// That is part of the prompt's time and not in the account, which is about generated tokens.
    pub(crate) fn follows(&self, prospect: &Prospect<'_>) -> bool {
        let Some(draft) = &self.costs.draft else { return false };
        let candidate = self.candidate(prospect);
        let (alone, mut tokens) = (Load { sequences: 1, ..Load::default() }, 1.0);
        let plain = alone.seconds(&self.costs);
        let mut least = plain;
        for (i, chance) in candidate.chances[..candidate.most].iter().enumerate() {
            let mut load = alone;
            load.draft(candidate.model, i + 1);
            tokens += chance;
            least = least.min(load.seconds(&self.costs) / tokens);
        }
        let saved = (plain - least) * prospect.left.min(FOLLOW_TOKENS) as f64;
        saved > draft.prefill_token * prospect.lag as f64
    }

    /// Begins a step: no prospects yet.
    pub(crate) fn begin(&mut self) {
        self.candidates.clear();
    }

    /// Adds a sequence that decodes in the step.
    pub(crate) fn add(&mut self, prospect: &Prospect<'_>) {
        let candidate = self.candidate(prospect);
        self.candidates.push(candidate);
    }

    fn candidate(&self, prospect: &Prospect<'_>) -> Candidate {
        let model = prospect.source == Source::Model;
        Candidate {
            chances: prospect.acceptance.chances(&self.acceptance, prospect.source),
            model,
            proven: self.acceptance.proves(prospect.source),
            most: prospect.most.min(self.longest),
            lag: if model { prospect.lag } else { 0 },
            left: prospect.left,
            cycles: CATCH_UP_CYCLES.min(prospect.left as f64 / 2.0).max(1.0),
            length: 0,
        }
    }

    /// Chooses how many tokens to draft for each sequence added, in their order, in a step that
    /// also computes `other` rows of prompts.
    pub(crate) fn choose(&mut self, other: usize) -> impl Iterator<Item = usize> {
        if !self.candidates.is_empty() {
            let plain = Load { sequences: self.candidates.len(), other, ..Load::default() };
            let left = self.candidates.iter().map(|c| c.left);
            self.account.lend(left, plain.plain_token(&self.costs));
            if !self.draft_the_best(plain) {
                self.probe(plain);
            }
        }
        self.candidates.iter().map(|c| c.length)
    }

    /// Adds tokens by their chance per cost to a step of `load`, and keeps as many as give the best
    /// rate that is allowed, or, of sources that were not right so far, as few as pay; whether
    /// there are any.
    fn draft_the_best(&mut self, mut load: Load) -> bool {
        let plain = load.plain_token(&self.costs) * load.sequences as f64;
        let (mut tokens, mut shared) = (load.sequences as f64, 0.0);
        let (mut best_rate, mut best) = (tokens / plain * (1.0 + MARGIN), 0);
        let patience = PATIENCE.max(load.sequences);
        let proven = self.candidates.iter().any(|c| c.proven);
        self.order.clear();
        while let Some(i) = self.next(&load).filter(|_| self.order.len() < best + patience) {
            let candidate = &mut self.candidates[i];
            // The account bears all of catching up now, the rate only this cycle's share.
            shared += candidate.catch_up(&self.costs) * (1.0 - 1.0 / candidate.cycles);
            load.add(candidate);
            tokens += candidate.chances[candidate.length];
            candidate.length += 1;
            self.order.push(i);
            let seconds = load.seconds(&self.costs);
            let rate = tokens / (seconds - shared);
            if rate > best_rate && self.account.allows(seconds, plain) {
                (best_rate, best) = (rate, self.order.len());
                if !proven {
                    break;
                }
            }
        }
        for &i in &self.order[best..] {
            self.candidates[i].length -= 1;
        }
        best > 0
    }

    /// The candidate whose next token has the best chance per cost; none if all are full.
    fn next(&self, load: &Load) -> Option<usize> {
        let rows = load.other + load.sequences + load.drafted;
        let row = self.costs.verify.seconds(rows + 1) - self.costs.verify.seconds(rows);
        let mut best: Option<(usize, f64)> = None;
        for (i, candidate) in self.candidates.iter().enumerate() {
            if candidate.length == candidate.most {
                continue;
            }
            // A row may cost nothing or, as measured, less than nothing.
            let seconds = (row + candidate.own_seconds(load, &self.costs)).max(1e-12);
            let worth = candidate.chances[candidate.length] / seconds;
            if best.is_none_or(|(_, most)| worth > most) {
                best = Some((i, worth));
            }
        }
        best.map(|(i, _)| i)
    }

    /// Drafts one token for one sequence if it is time to look whether that pays by now.
    fn probe(&mut self, plain: Load) {
        let plain_token = plain.plain_token(&self.costs);
        let plain_seconds = plain_token * plain.sequences as f64;
        let mut best = None;
        for (i, candidate) in self.candidates.iter().enumerate().filter(|(_, c)| c.most > 0) {
            let mut load = plain;
            load.add(candidate);
            let seconds = load.seconds(&self.costs);
            let worth = candidate.chances[0] * plain_token - seconds;
            if best.is_none_or(|(_, _, most)| worth > most) {
                best = Some((i, seconds, worth));
            }
        }
        let Some((i, seconds, _)) = best else { return };
        let due = self.account.probe_is_due(seconds - plain_seconds, plain_token);
        if due && self.account.allows(seconds, plain_seconds) {
            self.candidates[i].length = 1;
        }
    }

    /// Books what became of a sequence that decoded in the step.
    pub(crate) fn record(&mut self, own: &mut Acceptance, outcome: &Outcome) {
        let Outcome { source, drafted, judged, accepted, tokens, caught_up } = *outcome;
        self.done.sequences += 1;
        self.done.draft(source == Source::Model, drafted);
        self.done.caught_up += caught_up;
        self.tokens += tokens;
        if judged > 0 {
            let sum = &mut self.judged[source.index()];
            *sum = (sum.0 + judged as u64, sum.1 + accepted as u64);
            own.book(&mut self.acceptance, source, judged, accepted);
        }
    }

    /// Ends a step that also computed `other` rows of prompts.
    pub(crate) fn settle(&mut self, other: usize) {
        let done = Load { other, ..std::mem::take(&mut self.done) };
        let tokens = std::mem::take(&mut self.tokens);
        if done.sequences == 0 {
            return;
        }
        let plain = done.plain_token(&self.costs) * tokens as f64;
        let drafted = done.drafted + done.caught_up > 0;
        self.account.book(done.seconds(&self.costs), plain, drafted);
    }
}
