//! A runner for tests whose logits are a hash of the tokens it finds in its KV blocks.
//!
//! It stores what a KV write would (token, position, rotary speeds) at the slot the block table
//! names, and reads the visible context back through the table. So a wrong table, position, length
//! or order, a stale or shared block changes the logits; memory nobody wrote, and poison, panics.
//! If a test says so it can be asked for steps that follow each other, and is strict about them.

use kernels::backend::{ASKED_ROWS, RunnerMemory};
use kernels::program::{SlotId, TokenId};
use kernels::reference::choose;
use kernels::{Draw, Error, Runner, StepInput, StepLimits, StepOutput};
use std::sync::{Arc, Mutex};

/// Decides whether step `n` fails and whether logits are spoilt.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    /// The step (from 0) that returns an error.
    pub(crate) fail_at: Option<usize>,
    /// A context that ends in this token has only NaN logits.
    pub(crate) nan_after: Option<TokenId>,
}

/// How a runner answers that can be asked for steps.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Asked {
    /// Of 100 rows, how many are left to the host.
    pub(crate) unclear: u64,
    /// Answers that it forgets.
    pub(crate) lost: usize,
}

/// What a runner did, for the test that owns the other half of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Logged>>);

#[derive(Debug, Default)]
struct Logged {
    steps: Vec<StepSize>,
    trips: usize,
    chains: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StepSize {
    pub(crate) tokens: usize,
    pub(crate) sequences: usize,
    pub(crate) outputs: usize,
}

impl Log {
    /// Sizes of the steps that ran since the last call.
    pub(crate) fn take(&self) -> Vec<StepSize> {
        std::mem::take(&mut self.0.lock().unwrap().steps)
    }

    /// How often somebody waited for results since the last call.
    pub(crate) fn trips(&self) -> usize {
        std::mem::take(&mut self.0.lock().unwrap().trips)
    }

    /// How many chains of several steps were asked for since the last call.
    pub(crate) fn chains(&self) -> usize {
        std::mem::take(&mut self.0.lock().unwrap().chains)
    }

    fn wait(&self, steps: usize) {
        let mut log = self.0.lock().unwrap();
        log.trips += 1;
        log.chains += usize::from(steps > 1);
    }
}

#[derive(Debug)]
pub(crate) struct ScriptedRunner {
    limits: StepLimits,
    vocab: usize,
    /// `[blocks * block_len]`; none where nothing may be read.
    kv: Vec<Option<u64>>,
    faults: Faults,
    /// Of 100 rows, how many have the logits everyone expects.
    right: u64,
    /// Lengths up to here choose the same rotary speeds.
    steady_len: u32,
    /// No position may lie beyond.
    context_len: u32,
    log: Log,
    asked: Option<Asked>,
    /// Steps of the chain that was asked for.
    asked_steps: usize,
    /// Tokens chosen in the last step of that chain, and in all of them.
    last: Vec<Option<TokenId>>,
    kept: Vec<Option<TokenId>>,
}

impl ScriptedRunner {
    pub(crate) fn new(limits: StepLimits, vocab: usize, faults: Faults) -> Self {
        let kv = vec![None; limits.blocks * limits.block_len];
        Self {
            limits,
            vocab,
            kv,
            faults,
            right: 100,
            steady_len: 0,
            context_len: u32::MAX,
            log: Log::default(),
            asked: None,
            asked_steps: 0,
            last: vec![],
            kept: vec![],
        }
    }

    /// One that can be asked for steps.
    pub(crate) fn asked(self, asked: Option<Asked>) -> Self {
        Self { asked, ..self }
    }

    /// One with other faults.
    pub(crate) fn faulty(self, faults: Faults) -> Self {
        Self { faults, ..self }
    }

    /// One whose context is so long.
    pub(crate) fn within(self, context_len: u32) -> Self {
        Self { context_len, ..self }
    }

    /// One whose rotary speeds are the same up to this length.
    pub(crate) fn steady(self, steady_len: u32) -> Self {
        Self { steady_len, ..self }
    }

    /// One that is right only `right` times out of 100.
    pub(crate) fn draft(limits: StepLimits, vocab: usize, right: u64) -> Self {
        Self { right, ..Self::new(limits, vocab, Faults::default()) }
    }

    pub(crate) fn log(&self) -> Log {
        self.log.clone()
    }

    fn slot(&self, input: &StepInput<'_>, sequence: usize, position: u32) -> usize {
        let (block_len, position) = (self.limits.block_len, position as usize);
        let table = input.block_tables.of(sequence);
        table[position / block_len].index() * block_len + position % block_len
    }

    /// Hash of positions `0..=position`, read through the block table.
    fn context(&self, input: &StepInput<'_>, sequence: usize, position: u32) -> u64 {
        let read = |p| self.kv[self.slot(input, sequence, p)];
        let read =
            |p| read(p).unwrap_or_else(|| panic!("position {p} of {sequence} is dead memory"));
        (0..=position).fold(0, |h, p| mix(h ^ read(p)))
    }

    fn check(&self, input: &StepInput<'_>) {
        let (t, s, r) = (input.tokens.len(), input.query_ends.len(), input.output_rows.len());
        assert!((1..=self.limits.tokens).contains(&t), "{t} tokens");
        assert!((1..=self.limits.sequences).contains(&s), "{s} sequences");
        assert!(r <= self.limits.outputs, "{r} outputs");
        assert_eq!((input.positions.len(), input.rope_lens.len()), (t, t));
        assert_eq!((input.context_lens.len(), input.block_tables.ends.len()), (s, s));
        assert!(input.query_ends.is_sorted_by(|a, b| a < b), "an empty or overlapping sequence");
        assert_eq!(input.query_ends[s - 1] as usize, t);
        assert!(input.output_rows.is_sorted_by(|a, b| a < b));
        assert!(input.output_rows.last().is_none_or(|&r| (r as usize) < t));
        assert!(input.positions.iter().all(|&p| p < self.context_len), "beyond the context");
    }

    /// Nobody reads or writes a block in the step in which another sequence writes to it.
    fn check_writers(&self, input: &StepInput<'_>) {
        let mut first_row = 0;
        for (i, &context_len) in input.context_lens.iter().enumerate() {
            let rows = input.query_ends[i] - first_row;
            first_row = input.query_ends[i];
            let written = (context_len - rows) as usize / self.limits.block_len;
            for block in &input.block_tables.of(i)[written..] {
                let found = input.block_tables.blocks.iter().filter(|b| *b == block).count();
                assert_eq!(found, 1, "{block:?} is written by sequence {i} and used by others");
            }
        }
    }

    /// Stores the step's tokens; returns which sequence each row belongs to.
    fn write(&mut self, input: &StepInput<'_>) -> Vec<usize> {
        let mut owners = Vec::new();
        for (i, (&end, &context_len)) in input.query_ends.iter().zip(input.context_lens).enumerate()
        {
            let first = context_len - (end - owners.len() as u32);
            for position in first..context_len {
                let t = owners.len();
                assert_eq!(input.positions[t], position, "positions of {i} are not contiguous");
                assert!(input.tokens[t].index() < self.vocab);
                let slot = self.slot(input, i, position);
                let speeds = speeds(input.rope_lens[t], self.steady_len);
                self.kv[slot] = Some(entry(input.tokens[t], position, speeds));
                owners.push(i);
            }
        }
        owners
    }
}

impl ScriptedRunner {
    /// Runs a step, or fails as the script says; leaves the logits of its output rows.
    fn compute(&mut self, input: &StepInput<'_>, logits: &mut Vec<f32>) -> Result<(), Error> {
        self.check(input);
        self.check_writers(input);
        self.count(input)?;
        let owners = self.write(input);
        logits.clear();
        for &row in input.output_rows {
            let row = row as usize;
            let hash = self.context(input, owners[row], input.positions[row]);
            let wrong = mix(hash ^ 1) % 100 >= self.right;
            let hash = if wrong { mix(hash) } else { hash };
            let spoilt = self.faults.nan_after == Some(input.tokens[row]);
            let logit = |v| if spoilt { f32::NAN } else { logit(hash, v) };
            logits.extend((0..self.vocab as u32).map(logit));
        }
        Ok(())
    }

    fn count(&self, input: &StepInput<'_>) -> Result<(), Error> {
        let mut log = self.log.0.lock().unwrap();
        log.steps.push(StepSize {
            tokens: input.tokens.len(),
            sequences: input.query_ends.len(),
            outputs: input.output_rows.len(),
        });
        assert!(log.steps.len() < 1_000_000, "somebody asks again and again");
        match self.faults.fail_at {
            Some(n) if n + 1 == log.steps.len() => {
                Err(Error::Input { reason: "scripted".to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// Chooses every other token itself and spoils its row, which nobody may look at then.
    fn choose(&self, draws: &[Option<Draw>], output: &mut StepOutput) {
        let rows = output.logits.chunks_exact_mut(self.vocab).zip(draws);
        let chosen = rows.map(|(logits_v, draw)| {
            let draw = draw.filter(|draw| mix(draw.key).is_multiple_of(2))?;
            let token = choose(logits_v, draw)?;
            logits_v.fill(f32::NAN);
            Some(token)
        });
        output.chosen.extend(chosen);
    }

    /// The tokens of a step that is asked for: any where the row before was left to the host.
    fn follow(&mut self, input: &StepInput<'_>, follows: bool) -> Vec<TokenId> {
        if !follows {
            self.kept.clear();
            self.asked_steps = 1;
            return input.tokens.to_vec();
        }
        assert_eq!(
            input.tokens.len(),
            self.last.len(),
            "each chosen token is one of the next step"
        );
        self.asked_steps += 1;
        let any = TokenId(self.vocab as u32 - 1);
        self.last.iter().map(|token| token.unwrap_or(any)).collect()
    }
}

impl Runner for ScriptedRunner {
    fn step(&mut self, input: &StepInput<'_>, output: &mut StepOutput) -> Result<(), Error> {
        self.log.wait(1);
        self.compute(input, &mut output.logits)?;
        output.chosen.clear();
        self.choose(input.draws, output);
        Ok(())
    }

    fn ask(&mut self, input: &StepInput<'_>, follows: bool) -> Result<bool, Error> {
        let Some(Asked { unclear, .. }) = self.asked else { return Ok(false) };
        let (tokens, mut logits) = (self.follow(input, follows), vec![]);
        let rows = input.output_rows.len();
        assert!(rows > 0 && input.draws.len() == rows, "each row has a draw");
        assert!(self.kept.len() + rows <= ASKED_ROWS, "too much is asked for");
        self.compute(&StepInput { tokens: &tokens, ..*input }, &mut logits)?;
        let rows = logits.chunks_exact(self.vocab).zip(input.draws);
        let chosen = rows.map(|(logits_v, draw)| {
            let draw = draw.expect("each row has a draw");
            choose(logits_v, draw).filter(|_| mix(draw.key ^ 1) % 100 >= unclear)
        });
        self.last = chosen.collect();
        self.kept.extend_from_slice(&self.last);
        Ok(true)
    }

    fn answers(&mut self, out: &mut Vec<Option<TokenId>>) -> Result<(), Error> {
        self.log.wait(self.asked_steps);
        self.last.clear();
        out.clear();
        out.append(&mut self.kept);
        out.truncate(out.len() - self.asked.map_or(0, |asked| asked.lost));
        Ok(())
    }

    fn read_slot(&mut self, _: SlotId, _: &mut Vec<f32>) -> Result<(), Error> {
        Err(Error::Input { reason: "a scripted runner has no slots".to_owned() })
    }

    fn memory(&self) -> RunnerMemory {
        RunnerMemory::default()
    }

    fn poison(&mut self, live: &[usize]) {
        let blocks = self.kv.chunks_mut(self.limits.block_len);
        blocks.zip(live).for_each(|(block, &live)| block[live..].fill(None));
    }
}

/// The logits a sequence must get after `tokens`, of which `prompt_len` are its prompt: the
/// runner's arithmetic without blocks, steps or an engine.
pub(crate) fn expected_logits(
    tokens: &[TokenId],
    prompt_len: usize,
    vocab: usize,
    steady_len: u32,
) -> Vec<f32> {
    let speeds = |p: usize| speeds(prompt_len.max(p + 1) as u32, steady_len);
    let hash = tokens
        .iter()
        .enumerate()
        .fold(0, |h, (p, &token)| mix(h ^ entry(token, p as u32, speeds(p))));
    (0..vocab as u32).map(|v| logit(hash, v)).collect()
}

/// Stands for the rotary speeds that a length chooses.
fn speeds(rope_len: u32, steady_len: u32) -> u32 {
    if rope_len <= steady_len { 0 } else { rope_len }
}

fn entry(token: TokenId, position: u32, speeds: u32) -> u64 {
    mix(mix(mix(u64::from(token.0)) ^ u64::from(position)) ^ u64::from(speeds))
}

/// In -4..4.
fn logit(hash: u64, token: u32) -> f32 {
    (mix(hash ^ u64::from(token)) >> 40) as f32 / (1u32 << 21) as f32 - 4.0
}

fn mix(x: u64) -> u64 {
    testkit::Rng::new(x).bits()
}
