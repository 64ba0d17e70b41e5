//! The loop: take requests, plan a step, run it, choose tokens, say what happened.
//!
//! Synchronous and single-threaded, without a clock or IO: whoever owns an [`Engine`] calls
//! [`Engine::step`] while there is work. Requests come in as token ids and go out as [`Event`]s;
//! every request that was accepted gets exactly one `Finished` or `Failed`, its last event.
//!
//! A request's tokens do not depend on what else runs: not on other requests, chunk sizes,
//! preemption or shared blocks, as long as the runner computes each row from its own sequence
//! alone.
//!
//! Here: what a caller sees; the inside of a step is in [`cycle`], its draft
//! lengths in [`lengths`]. Not here: policy
//! ([`crate::scheduler`]), drafters ([`crate::speculation`]), text, threads.

#[cfg(test)]
mod chain_tests;
mod cycle;
mod lengths;
#[cfg(test)]
mod prefix_tests;
#[cfg(test)]
mod random;
#[cfg(test)]
mod scripted;
#[cfg(test)]
mod speculation_tests;
#[cfg(test)]
mod tests;

use crate::Error;
use crate::batch::Batch;
use crate::kv::{BlockPool, PrefixCaching, PrefixCounts};
use crate::request::{Event, FinishReason, Rejected, Request, RequestId};
use crate::sampler::Sampler;
use crate::scheduler::{Budget, Scheduler};
use crate::sequence::{Phase, Sequence};
use crate::speculation::Speculation;
use kernels::backend::RunnerMemory;
use kernels::program::TokenId;
use kernels::{Runner, StepLimits, StepOutput};

/// Sizes of an engine; all of them at least 1, but for `max_waiting` and `max_drafted`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Tokens of the vocabulary, v: columns of the runner's logits.
    pub vocab: usize,
    /// Most tokens of a sequence, prompt and generated.
    pub context_len: u32,
    /// Most tokens of a step. Decodes come first, so more than `max_sequences` leaves room for
    /// prefill beside them.
    pub step_tokens: usize,
    /// Most sequences that run at once.
    pub max_sequences: usize,
    /// KV blocks in all.
    pub blocks: usize,
    /// Positions of a KV block.
    pub block_len: usize,
    /// Most requests that wait beside those that run; 0 refuses what cannot run soon.
    pub max_waiting: usize,
    /// Most tokens proposed for a sequence in a step; 0 without a draft.
    pub max_drafted: usize,
    /// Most prompt tokens of a step whose own probabilities are computed; 0 where requests cannot
    /// ask for them.
    pub max_scored: usize,
    /// Whether requests share what they have in common from their beginnings on.
    pub prefix_caching: PrefixCaching,
}

impl EngineConfig {
    /// The limits the runner must be built for.
    pub fn step_limits(&self) -> StepLimits {
        let chosen = self.max_sequences.saturating_mul(1 + self.max_drafted);
        StepLimits {
            tokens: self.step_tokens,
            sequences: self.max_sequences,
            outputs: chosen.saturating_add(self.max_scored).min(self.step_tokens),
            blocks: self.blocks,
            block_len: self.block_len,
            context_len: self.context_len as usize,
            trace: false,
        }
    }

    /// The limits a draft model's runner must be built for: the same blocks, one wanted row a
    /// sequence, and room for the two tokens that a sequence may lag behind.
    pub fn draft_limits(&self) -> StepLimits {
        let tokens = self.step_tokens.max(self.max_sequences.saturating_mul(2));
        StepLimits { tokens, outputs: self.max_sequences, ..self.step_limits() }
    }

    /// Checks a request without submitting it: nothing is loaded or computed for one that cannot
    /// run.
    ///
    /// # Errors
    /// [`Rejected`] says what is wrong with it.
    pub fn check(&self, request: &Request) -> Result<(), Rejected> {
        let Request { prompt, max_tokens, sampling, .. } = request;
        let (context, positions) = (self.context_len as usize, self.blocks * self.block_len);
        if prompt.is_empty() {
            return Err(Rejected::EmptyPrompt);
        }
        if *max_tokens == 0 {
            return Err(Rejected::NoTokens);
        }
        if prompt.len() >= context {
            return Err(Rejected::PromptTooLong { prompt: prompt.len(), context });
        }
        if prompt.len() > positions {
            return Err(Rejected::PromptExceedsKv { prompt: prompt.len(), positions });
        }
        let vocab = self.vocab;
        let outside = |(position, token): (usize, u32)| match token as usize >= vocab {
            true => Err(Rejected::TokenOutOfRange { token, position, vocab }),
            false => Ok(()),
        };
        prompt.iter().map(|t| t.0).enumerate().try_for_each(outside)?;
        sampling.logit_bias.iter().map(|(t, _)| t.0).enumerate().try_for_each(outside)?;
        request.check_logprobs()?;
        if self.max_scored == 0 && request.logprobs.is_some_and(|wanted| wanted.prompt) {
            return Err(Rejected::PromptNotScored);
        }
        sampling.validate()
    }

    fn budget(&self) -> Budget {
        Budget { tokens: self.step_tokens, sequences: self.max_sequences, scored: self.max_scored }
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing: no request is open.
    Idle,
    /// Something; call again.
    Worked {
        /// Tokens computed of prompts, and of sequences that were preempted.
        prefill_tokens: usize,
        /// Tokens generated by sequences that were past their prompts: one each, and what was
        /// accepted of proposed ones.
        decode_tokens: usize,
    },
}

/// Gauges and counters, for metrics and tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Requests accepted and not ended.
    pub open: usize,
    /// Of these, those that hold KV blocks.
    pub running: usize,
    /// KV blocks that nobody holds; some may be known.
    pub blocks_free: usize,
    /// Times a sequence lost its blocks, since the engine began.
    pub preemptions: u64,
    /// Tokens of new requests, and those of them that were known, since the engine began. Requests
    /// that want probabilities of their prompts do not count.
    pub prefix: PrefixCounts,
}

/// A runner with everything around it.
pub struct Engine {
    runner: Box<dyn Runner>,
    config: EngineConfig,
    pool: BlockPool,
    /// By falling priority, equals in order of arrival; the scheduler relies on it.
    sequences: Vec<Sequence>,
    scheduler: Scheduler,
    batch: Batch,
    output: StepOutput,
    sampler: Sampler,
    /// A row of logits without what a grammar forbids.
    allowed_v: Vec<f32>,
    speculation: Option<Speculation>,
    /// Tokens proposed for the sequence that is being verified.
    proposed: Vec<TokenId>,
    /// Events of calls between steps.
    early: Vec<Event>,
    next_id: u64,
    preemptions: u64,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (config, counts) = (&self.config, self.counts());
        f.debug_struct("Engine").field("config", config).field("counts", &counts).finish()
    }
}

impl Engine {
    /// An engine over a runner that was built for [`EngineConfig::step_limits`].
    ///
    /// # Panics
    /// If a size that must be at least 1 is 0.
    pub fn new(runner: Box<dyn Runner>, config: EngineConfig) -> Self {
        assert!(config.vocab > 0 && config.context_len > 0, "a model has tokens and a context");
        assert!(config.step_tokens > 0 && config.max_sequences > 0, "a step has room for a token");
        Self {
            runner,
            pool: BlockPool::new(config.blocks, config.block_len, config.prefix_caching),
            sequences: Vec::new(),
            scheduler: Scheduler::default(),
            batch: Batch::new(&config.step_limits()),
            output: StepOutput::default(),
            sampler: Sampler::default(),
            allowed_v: Vec::new(),
            speculation: None,
            proposed: Vec::new(),
            early: Vec::new(),
            next_id: 0,
            preemptions: 0,
            config,
        }
    }

    /// Lets the engine guess ahead from the next step on; the text stays the same (unless the rule
    /// is another than [`crate::speculation::Rule::Coupled`]).
    pub fn with_speculation(mut self, speculation: Speculation) -> Self {
        self.speculation = Some(speculation);
        self
    }

    /// Accepts a request; it takes part from the next step on.
    ///
    /// # Errors
    /// [`Rejected`] says what is wrong with it, or that the queue is full.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, Rejected> {
        self.config.check(&request)?;
        let EngineConfig { max_sequences, max_waiting, context_len, .. } = self.config;
        if self.sequences.len() >= max_sequences.saturating_add(max_waiting) {
            let waiting = self.sequences.len() - self.counts().running;
            return Err(Rejected::QueueFull { waiting });
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let sequence = Sequence::new(id, request, context_len as usize);
        let at = self.sequences.partition_point(|s| s.priority >= sequence.priority);
        self.sequences.insert(at, sequence);
        Ok(id)
    }

    /// Ends a request and frees its blocks at once; the next step tells so. A request that has
    /// ended already, or never was, is left alone.
    pub fn cancel(&mut self, id: RequestId) {
        let Some(i) = self.sequences.iter().position(|s| s.id == id) else { return };
        let mut sequence = self.sequences.remove(i);
        self.pool.release(&mut sequence.blocks);
        self.early.push(finished(&sequence, FinishReason::Cancelled));
    }

    /// Does one step and appends what happened to `events`.
    ///
    /// # Errors
    /// The runner's error; every open request has got [`Event::Failed`] then, and the engine takes
    /// new ones.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<Progress, Error> {
        events.append(&mut self.early);
        if self.sequences.is_empty() {
            return Ok(Progress::Idle);
        }
        self.choose_lengths();
        self.scheduler.plan(&mut self.sequences, &mut self.pool, self.config.budget());
        self.preemptions += self.scheduler.last().preempted as u64;
        if let Err(error) = self.draft().and_then(|()| self.run()) {
            self.fail_all(&error, events);
            return Err(error);
        }
        self.fail_too_large(events);
        let progress = self.commit(events);
        self.sequences.retain(|s| s.phase != Phase::Ended);
        if cfg!(debug_assertions) {
            self.check_integrity();
        }
        Ok(progress)
    }

    /// Open requests that never had a place so far.
    pub fn queued(&self) -> impl Iterator<Item = RequestId> {
        self.sequences.iter().filter(|s| s.cached.is_none()).map(|s| s.id)
    }

    /// Gauges and counters.
    pub fn counts(&self) -> Counts {
        let running = self.sequences.iter().filter(|s| s.phase == Phase::Running).count();
        Counts {
            open: self.sequences.len(),
            running,
            blocks_free: self.pool.free(),
            preemptions: self.preemptions,
            prefix: self.pool.counts(),
        }
    }

    /// The sizes it was made with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Bytes the runner holds.
    pub fn memory(&self) -> RunnerMemory {
        self.runner.memory()
    }

    /// Checks the bookkeeping of blocks and sequences; debug builds do so after every step.
    ///
    /// # Panics
    /// If it is broken.
    pub fn check_integrity(&self) {
        self.pool.check_integrity(self.sequences.iter().map(|s| s.blocks.as_slice()));
        assert!(self.counts().running <= self.config.max_sequences, "too many run");
        for s in &self.sequences {
            let waiting = s.phase == Phase::Waiting;
            assert_eq!(waiting, s.blocks.is_empty(), "{:?} is {:?}", s.id, s.phase);
            assert_eq!(s.draft.proposed, 0, "{:?} has unverified tokens", s.id);
            assert!(s.draft.computed < s.tokens.len(), "{:?}: the draft is ahead", s.id);
            assert!(s.pending() > 0 && s.tokens.len() < s.len_max, "{:?} should have ended", s.id);
            assert!(
                s.links.len() * self.config.block_len <= s.computed,
                "{:?} shares too much",
                s.id
            );
            let held = s.blocks.len() * self.config.block_len;
            assert!(
                s.computed.max(s.draft.computed) <= held,
                "{:?} computed more than its blocks hold",
                s.id
            );
        }
    }

    /// Makes the runner overwrite all memory that no sequence needs, so that a test sees whether
    /// anything reads it.
    pub fn poison(&mut self) {
        self.runner.poison(&self.live(|s| s.computed, |_| true));
        let drafted = self.live(|s| s.draft.computed, |drafted| drafted);
        if let Some(model) = self.speculation.as_mut().and_then(|s| s.drafter.model()) {
            model.runner().poison(&drafted);
        }
    }

    /// Positions of each block that are needed by sequences, which have `computed` so many tokens,
    /// or, as a whole, by those to come; `known` says by whether the draft model computed it.
    fn live(&self, computed: fn(&Sequence) -> usize, known: fn(bool) -> bool) -> Vec<usize> {
        let (mut live, block_len) = (vec![0; self.config.blocks], self.config.block_len);
        for (block, _) in self.pool.known().filter(|(_, drafted)| known(*drafted)) {
            live[block.index()] = block_len;
        }
        for s in &self.sequences {
            for (block, start) in s.blocks.iter().zip((0..).step_by(block_len)) {
                let left = computed(s).saturating_sub(start).min(block_len);
                live[block.index()] = live[block.index()].max(left);
            }
        }
        live
    }

    fn fail_too_large(&mut self, events: &mut Vec<Event>) {
        for k in 0..self.scheduler.last().too_large.len() {
            let i = self.scheduler.last().too_large[k];
            let (id, tokens) = (self.sequences[i].id, self.sequences[i].tokens.len());
            let (needed, blocks) = (self.pool.blocks_for(tokens), self.pool.blocks());
            let reason = format!(
                "at {tokens} tokens the sequence needs {needed} KV blocks, but there are {blocks}: ask for fewer tokens or give the KV cache more memory"
            );
            self.end(i, Event::Failed { id, reason }, events);
        }
    }

    fn fail_all(&mut self, error: &Error, events: &mut Vec<Event>) {
        for i in 0..self.sequences.len() {
            let (id, reason) = (self.sequences[i].id, format!("the step failed: {error}"));
            self.end(i, Event::Failed { id, reason }, events);
        }
        self.sequences.clear();
        // Nothing is certain about what a failed step left in memory.
        self.pool.forget();
    }

    /// Ends sequence `i` with its last event; it stays in the list until the step's end, so that
    /// the plan's indices hold.
    fn end(&mut self, i: usize, event: Event, events: &mut Vec<Event>) {
        let sequence = &mut self.sequences[i];
        self.pool.release(&mut sequence.blocks);
        sequence.phase = Phase::Ended;
        events.push(event);
    }
}

/// The last event of a sequence that ended.
fn finished(sequence: &Sequence, reason: FinishReason) -> Event {
    let (id, speculation) = (sequence.id, sequence.draft.counts);
    Event::Finished { id, reason, speculation, cached_tokens: sequence.cached.unwrap_or(0) }
}
