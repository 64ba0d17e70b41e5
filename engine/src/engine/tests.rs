//! The engine over the scripted runner: what requests get never depends on how they are scheduled.

use super::random::{drawn, random_config, random_request, random_speculation};
use super::scripted::{Asked, Faults, Log, ScriptedRunner, StepSize, expected_logits};
use super::*;
use crate::grammar::Guide;
use crate::logprobs::token_logprob;
use crate::request::TokenSource;
use crate::sampler::{SamplingParams, sample};
use crate::scheduler::WAITED_MAX;
use crate::speculation::{Rule, SpeculationCounts};
use kernels::program::TokenId;
use std::collections::BTreeMap;
use testkit::Rng;

pub(super) const CONFIG: EngineConfig = EngineConfig {
    vocab: 29,
    context_len: 64,
    step_tokens: 16,
    max_sequences: 4,
    blocks: 64,
    block_len: 4,
    max_waiting: 16,
    max_drafted: 0,
    max_scored: 4,
    prefix_caching: PrefixCaching::On { steady_len: 0 },
};

/// The length up to which the runner's rotary speeds do not depend on it.
pub(super) fn steady_len(config: &EngineConfig) -> u32 {
    match config.prefix_caching {
        PrefixCaching::Off => 0,
        PrefixCaching::On { steady_len } => steady_len,
    }
}

pub(super) fn engine_with(config: EngineConfig, faults: Faults) -> (Engine, Log) {
    let runner = ScriptedRunner::new(config.step_limits(), config.vocab, faults);
    let runner = runner.steady(steady_len(&config));
    let log = runner.log();
    (Engine::new(Box::new(runner), config), log)
}

pub(super) fn engine(config: EngineConfig) -> Engine {
    engine_with(config, Faults::default()).0
}

pub(super) fn request(prompt: &[u32], max_tokens: u32) -> Request {
    let prompt = prompt.iter().map(|&t| TokenId(t)).collect();
    Request { sampling: SamplingParams::default(), ..Request::new(prompt, max_tokens) }
}

pub(super) fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|t| t * 7 % 29).collect()
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    Finished(FinishReason),
    Failed(String),
}

/// What a request got.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Outcome {
    pub(super) tokens: Vec<TokenId>,
    /// Log-probabilities of the prompt's tokens, where they are wanted.
    prompt: Vec<f32>,
    /// Those of the generated ones.
    logprobs: Vec<f32>,
    end: Option<End>,
}

/// How the tokens of a run came about.
#[derive(Debug, Clone, Copy, Default)]
struct Sources {
    drafted: u64,
    corrected: u64,
    bonus: u64,
}

/// Sorts events by request; none may follow the last one of its request.
fn collect(outcomes: &mut BTreeMap<RequestId, Outcome>, events: &mut Vec<Event>) -> Sources {
    let mut sources = Sources::default();
    for event in events.drain(..) {
        let id = match &event {
            Event::Prompt { id, .. } | Event::Token { id, .. } => *id,
            Event::Finished { id, .. } | Event::Failed { id, .. } => *id,
        };
        let outcome = outcomes.entry(id).or_default();
        assert_eq!(outcome.end, None, "an event after the end of {id:?}: {event:?}");
        match event {
            Event::Prompt { logprob, .. } => outcome.prompt.push(logprob.logprob),
            Event::Token { token, source, logprob, .. } => {
                outcome.logprobs.extend(logprob.map(|l| l.logprob));
                outcome.tokens.push(token);
                sources.drafted += u64::from(source == TokenSource::Drafted);
                sources.corrected += u64::from(source == TokenSource::Corrected);
                sources.bonus += u64::from(source == TokenSource::Bonus);
            }
            Event::Finished { reason, .. } => outcome.end = Some(End::Finished(reason)),
            Event::Failed { reason, .. } => outcome.end = Some(End::Failed(reason)),
        }
    }
    sources
}

pub(super) fn run_to_the_end(engine: &mut Engine) -> BTreeMap<RequestId, Outcome> {
    let (mut outcomes, mut events) = (BTreeMap::new(), Vec::new());
    while engine.step(&mut events).unwrap() != Progress::Idle {
        collect(&mut outcomes, &mut events);
        engine.check_integrity();
    }
    collect(&mut outcomes, &mut events);
    outcomes
}

/// What a request must get, found without an engine.
pub(super) fn oracle(request: &Request, config: &EngineConfig) -> Outcome {
    let (mut tokens, prompt_len) = (request.prompt.clone(), request.prompt.len());
    let row_v =
        |tokens: &[TokenId]| expected_logits(tokens, prompt_len, config.vocab, steady_len(config));
    let (mut logprobs, mut guide) = (vec![], request.guide.clone());
    let end = loop {
        if tokens.len() > config.blocks * config.block_len {
            break End::Failed("KV blocks".into());
        }
        let (logits_v, mut allowed_v) = (row_v(&tokens), row_v(&tokens));
        if guide.as_mut().is_some_and(|guide| guide.mask(&mut allowed_v).is_err()) {
            break End::Failed("no token can be chosen".into());
        }
        let (prompt, generated) = tokens.split_at(prompt_len);
        let history = crate::sampler::History { prompt, generated };
        let position = tokens.len() as u32;
        let Ok(token) = sample(&allowed_v, &history, &request.sampling, position) else {
            assert!(guide.is_some(), "only a grammar can forbid all tokens");
            break End::Failed("no token can be chosen".into());
        };
        let wanted = request.logprobs;
        logprobs.extend(wanted.map(|w| token_logprob(&logits_v, token, w.top).logprob));
        tokens.push(token);
        guide.iter_mut().for_each(|guide| guide.push(token));
        let over = guide.as_ref().is_some_and(Guide::is_over);
        if over || request.stop_tokens.contains(&token) {
            break End::Finished(FinishReason::Stop);
        }
        let generated = (tokens.len() - prompt_len) as u32;
        if generated == request.max_tokens || tokens.len() == config.context_len as usize {
            break End::Finished(FinishReason::Length);
        }
    };
    let scored = match request.logprobs {
        Some(wanted) if wanted.prompt => 1..prompt_len,
        _ => 0..0,
    };
    let logprob = |p: usize| token_logprob(&row_v(&tokens[..p]), tokens[p], 0).logprob;
    let prompt = scored.map(logprob).collect();
    Outcome { tokens: tokens.split_off(prompt_len), prompt, logprobs, end: Some(end) }
}

/// What a random run exercised.
#[derive(Debug, Default)]
struct Coverage {
    preemptions: u64,
    refused: usize,
    cancelled: usize,
    too_large: usize,
    stopped: usize,
    /// Tokens chosen under a grammar, and texts after which it allowed none.
    guided: usize,
    forbidden: usize,
    mixed_steps: usize,
    sources: Sources,
    /// Tokens that new requests found computed.
    cached: u64,
    /// Of all sequences in all steps: those that share a block, and those whose draft may not
    /// follow because of that.
    sharing: usize,
    locked: usize,
    /// Chains of steps that a draft model was asked for; how often it was waited for in the same runs,
    /// step by step and with chains.
    chains: usize,
    trips: [usize; 2],
}

/// One random run: requests arrive and are cancelled at random while steps go on.
struct Run {
    rng: Rng,
    engine: Engine,
    log: Log,
    /// Steps of the draft model, if there is one.
    drafted: Option<Log>,
    /// Whether only tokens are wanted that their logits alone decide.
    drawn: bool,
    /// All events so far.
    events: Vec<Event>,
    /// Accepted requests and whether they were cancelled.
    open: BTreeMap<RequestId, (Request, bool)>,
    outcomes: BTreeMap<RequestId, Outcome>,
    /// Every accepted request ends within this many more steps.
    steps_left: usize,
    refused: usize,
    sources: Sources,
    /// What many prompts begin with.
    texts: Vec<Vec<TokenId>>,
    sharing: usize,
    locked: usize,
    /// Whether sampled text may be another than without a draft.
    other_text: bool,
}

impl Run {
    fn new(seed: u64, asked: Option<Asked>) -> Self {
        let mut rng = Rng::new(seed);
        let config = random_config(&mut rng);
        let (mut engine, log) = engine_with(config, Faults::default());
        let (mut other_text, mut drafted) = (false, None);
        if rng.below(4) > 0 {
            let (mut speculation, log) = random_speculation(&mut rng, &config, asked);
            drafted = speculation.drafter.model().map(|_| log);
            other_text = speculation.rule == Rule::Rejection;
            engine = engine.with_speculation(speculation);
        }
        let (open, outcomes) = (BTreeMap::new(), BTreeMap::new());
        let mut token = || TokenId(rng.below(config.vocab) as u32);
        let texts = (0..2).map(|_| (0..config.context_len).map(|_| token()).collect()).collect();
        let drawn = rng.below(3) == 0;
        Self {
            rng,
            engine,
            log,
            drafted,
            drawn,
            events: vec![],
            open,
            outcomes,
            steps_left: 0,
            refused: 0,
            sources: Sources::default(),
            texts,
            sharing: 0,
            locked: 0,
            other_text,
        }
    }

    /// A random request; of three, two begin as others do or go on where another ended.
    fn request(&mut self) -> Request {
        let mut request = random_request(&mut self.rng, self.engine.config());
        request = if self.drawn { drawn(request) } else { request };
        let (len, n) = (request.prompt.len(), self.rng.below(3));
        match self.rng.below(6) {
            0 | 1 => return request,
            2 => {
                let ended = self.open.iter().nth(n).and_then(|(id, (before, _))| {
                    let outcome = self.outcomes.get(id)?;
                    Some([before.prompt.as_slice(), &outcome.tokens].concat())
                });
                request.prompt.splice(..0, ended.unwrap_or_default());
            }
            _ => {
                let text = &self.texts[n % 2];
                let most = [12, 12, 12, text.len()][self.rng.below(4)];
                let shared = self.rng.below(text.len().min(most));
                request.prompt.splice(..0, text[..shared].iter().copied());
            }
        }
        let config = self.engine.config();
        let most = (config.context_len as usize - 1).min(config.blocks * config.block_len);
        // Often one with little of its own.
        let least = if self.rng.below(2) == 0 { len } else { 1 };
        request.prompt.truncate(most.min((request.prompt.len() - len).max(least)));
        request
    }

    fn submit(&mut self) {
        let request = self.request();
        match self.engine.submit(request.clone()) {
            Ok(id) => {
                // The oldest request goes on at least every WAITED_MAX steps and one more for each
                // other sequence; it is never preempted.
                let tokens = request.prompt.len() + request.max_tokens as usize;
                let config = self.engine.config();
                self.steps_left += tokens * (WAITED_MAX as usize + config.max_sequences + 1);
                self.open.insert(id, (request, false));
            }
            Err(Rejected::QueueFull { .. }) => self.refused += 1,
            Err(other) => panic!("{other}"),
        }
    }

    fn cancel(&mut self) {
        let n = self.rng.below(self.open.len().max(1));
        if let Some((&id, (_, cancelled))) = self.open.iter_mut().nth(n) {
            self.engine.cancel(id);
            *cancelled |= self.outcomes.get(&id).is_none_or(|o| o.end.is_none());
        }
    }

    fn step(&mut self) -> Progress {
        if self.rng.below(3) == 0 {
            self.engine.poison();
        }
        let mut events = Vec::new();
        let progress = self.engine.step(&mut events).unwrap();
        self.events.extend_from_slice(&events);
        let sources = collect(&mut self.outcomes, &mut events);
        self.sources.drafted += sources.drafted;
        self.sources.corrected += sources.corrected;
        self.sources.bonus += sources.bonus;
        self.engine.check_integrity();
        let sequences = &self.engine.sequences;
        let tables = || sequences.iter().flat_map(|s| &s.blocks);
        for s in sequences {
            let first = s.blocks.first();
            self.sharing += usize::from(tables().filter(|b| Some(*b) == first).count() > 1);
            self.locked += usize::from(s.draft.computed < s.draft.locked);
        }
        progress
    }

    fn all(&mut self) {
        let arrivals = 1 + self.rng.below(14);
        for _ in 0..arrivals {
            self.submit();
            if self.rng.below(6) == 0 {
                self.cancel();
            }
            for _ in 0..self.rng.below(4) {
                self.step();
            }
        }
        while self.step() != Progress::Idle {
            assert!(self.steps_left > 0, "starved: {:?}", self.engine);
            self.steps_left -= 1;
        }
        assert_eq!(self.engine.counts().blocks_free, self.engine.config().blocks);
    }

    fn check(&self, coverage: &mut Coverage) {
        assert_eq!(self.open.len(), self.outcomes.len(), "a request without an end");
        for (id, (request, cancelled)) in &self.open {
            let (found, expected) = (&self.outcomes[id], oracle(request, self.engine.config()));
            if let Some(guide) = &request.guide {
                let fits = guide.clone().accepts(&found.tokens);
                assert_eq!(fits, found.tokens.len(), "{id:?}: {:?}", found.tokens);
                coverage.guided += fits;
            }
            if *cancelled {
                let any = self.other_text && request.sampling.temperature > 0.0;
                assert!(
                    any || expected.tokens.starts_with(&found.tokens),
                    "{id:?} before its cancel"
                );
                assert_eq!(found.end, Some(End::Finished(FinishReason::Cancelled)));
                coverage.cancelled += 1;
                continue;
            }
            if self.other_text && request.sampling.temperature > 0.0 {
                assert!(found.end.is_some(), "{id:?}");
                continue;
            }
            assert_eq!(found.tokens, expected.tokens, "{id:?}");
            assert_eq!(found.logprobs, expected.logprobs, "{id:?}");
            assert_eq!(found.prompt, expected.prompt, "{id:?}");
            if let (Some(End::Failed(part)), Some(End::Failed(why))) = (&expected.end, &found.end) {
                assert!(why.contains(part), "{id:?} was to fail for {part}, it says {why}");
                coverage.too_large += usize::from(part == "KV blocks");
                coverage.forbidden += usize::from(part != "KV blocks");
            } else {
                assert_eq!(found.end, expected.end, "{id:?}");
            }
            coverage.stopped += usize::from(found.end == Some(End::Finished(FinishReason::Stop)));
        }
        coverage.preemptions += self.engine.counts().preemptions;
        coverage.refused += self.refused;
        coverage.cached += self.engine.counts().prefix.cached;
        coverage.sharing += self.sharing;
        coverage.locked += self.locked;
        coverage.sources.drafted += self.sources.drafted;
        coverage.sources.corrected += self.sources.corrected;
        coverage.sources.bonus += self.sources.bonus;
        let mixed = |s: &StepSize| s.outputs > 0 && s.tokens > s.sequences;
        coverage.mixed_steps += self.log.take().iter().filter(|s| mixed(s)).count();
    }
}

/// What a draft model is asked for is what it does step by step: runs have the same events, with
/// the same counts; how often each waits.
fn check_asked(seed: u64, run: &Run, coverage: &mut Coverage) {
    let Some(drafted) = &run.drafted else { return };
    let chains = drafted.chains();
    if chains == 0 {
        return;
    }
    let mut plain = Run::new(seed, None);
    plain.all();
    assert_eq!(run.events, plain.events);
    let trips = [plain.drafted.map_or(0, |log| log.trips()), drafted.trips()];
    coverage.chains += chains;
    (0..2).for_each(|i| coverage.trips[i] += trips[i]);
}

/// The engine's main promise: tokens do not depend on arrivals, budgets, chunks, pools, preemption,
/// cancelled neighbours, dead memory or drafters.
#[test]
fn any_schedule_gives_each_request_what_it_gets_alone() {
    let mut coverage = Coverage::default();
    for seed in 0..4000 {
        let attempt = std::panic::AssertUnwindSafe(|| {
            let asked = Asked { unclear: [0, 5, 40][seed as usize % 3], lost: 0 };
            let mut run = Run::new(seed, Some(asked));
            run.all();
            run.check(&mut coverage);
            check_asked(seed, &run, &mut coverage);
        });
        if let Err(panic) = std::panic::catch_unwind(attempt) {
            eprintln!("failed at seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
    eprintln!("{coverage:?}");
    let Coverage { preemptions, refused, cancelled, too_large, stopped, mixed_steps, .. } =
        coverage;
    let Coverage { sources: Sources { drafted, corrected, bonus }, .. } = coverage;
    let Coverage { cached, sharing, locked, guided, forbidden, chains, trips, .. } = coverage;
    assert!(chains > 1000 && trips[1] < trips[0] * 9 / 10, "too little was asked for");
    assert!(guided > 10_000 && forbidden > 100, "too little was forbidden");
    assert!(cached > 10_000 && sharing > 3000 && locked > 500, "too little was shared");
    assert!(drafted > 10_000 && corrected > 10_000 && bonus > 2_000, "too little was drafted");
    assert!(preemptions > 1000 && refused > 1000 && cancelled > 500, "too little happened");
    assert!(too_large > 500 && stopped > 500 && mixed_steps > 5000, "too little happened");
}

#[test]
fn a_request_in_a_crowd_gets_what_the_same_engine_gives_it_alone() {
    let config = EngineConfig { blocks: 24, ..CONFIG };
    let mut rng = Rng::new(3);
    let requests: Vec<Request> = (0..12).map(|_| random_request(&mut rng, &config)).collect();
    let mut crowd = engine(config);
    let ids: Vec<RequestId> = requests.iter().map(|r| crowd.submit(r.clone()).unwrap()).collect();
    let outcomes = run_to_the_end(&mut crowd);
    for (id, request) in ids.iter().zip(&requests) {
        let mut alone = engine(config);
        let own = alone.submit(request.clone()).unwrap();
        assert_eq!(outcomes[id], run_to_the_end(&mut alone)[&own]);
    }
}

#[test]
fn every_rejection_is_a_value() {
    let mut engine =
        engine(EngineConfig { blocks: 10, max_waiting: 0, max_sequences: 1, ..CONFIG });
    let mut refuse = |request: Request| engine.submit(request).unwrap_err();
    assert_eq!(refuse(request(&[], 1)), Rejected::EmptyPrompt);
    assert_eq!(refuse(request(&[1], 0)), Rejected::NoTokens);
    let (prompt_len, context) = (64, 64);
    let long = refuse(request(&prompt(64), 1));
    assert_eq!(long, Rejected::PromptTooLong { prompt: prompt_len, context });
    let large = refuse(request(&prompt(41), 1));
    assert_eq!(large, Rejected::PromptExceedsKv { prompt: 41, positions: 40 });
    let outside = Rejected::TokenOutOfRange { token: 29, position: 2, vocab: 29 };
    assert_eq!(refuse(request(&[0, 28, 29], 1)), outside);
    let mut biased = request(&[1], 1);
    biased.sampling.logit_bias = vec![(TokenId(30), 1.0)];
    let outside = Rejected::TokenOutOfRange { token: 30, position: 0, vocab: 29 };
    assert_eq!(refuse(biased), outside);
    let mut hot = request(&[1], 1);
    hot.sampling.temperature = f32::NAN;
    assert!(matches!(refuse(hot), Rejected::Parameter { parameter: "temperature", .. }));
    assert_eq!(engine.submit(request(&[1], 1)), Ok(RequestId(0)));
    assert_eq!(engine.submit(request(&[1], 1)), Err(Rejected::QueueFull { waiting: 1 }));
}

#[test]
fn the_longest_prompt_gets_one_token() {
    let mut engine = engine(CONFIG);
    let id = engine.submit(request(&prompt(63), 10)).unwrap();
    let outcome = &run_to_the_end(&mut engine)[&id];
    assert_eq!(outcome.tokens.len(), 1);
    assert_eq!(outcome.end, Some(End::Finished(FinishReason::Length)));
}

#[test]
fn the_stop_token_is_emitted_and_ends_the_request() {
    let mut plain = request(&prompt(5), 9);
    let free = oracle(&plain, &CONFIG);
    plain.stop_tokens = vec![free.tokens[3]];
    let mut engine = engine(CONFIG);
    let id = engine.submit(plain).unwrap();
    let outcome = &run_to_the_end(&mut engine)[&id];
    assert_eq!(outcome.tokens, free.tokens[..=3]);
    assert_eq!(outcome.end, Some(End::Finished(FinishReason::Stop)));
}

#[test]
fn idle_without_requests_and_cancelling_the_unknown_changes_nothing() {
    let mut engine = engine(CONFIG);
    let mut events = Vec::new();
    assert_eq!(engine.step(&mut events).unwrap(), Progress::Idle);
    engine.cancel(RequestId(7));
    let id = engine.submit(request(&[1, 2], 50)).unwrap();
    engine.step(&mut events).unwrap();
    events.clear();
    engine.cancel(id);
    engine.cancel(id);
    assert_eq!(engine.counts().blocks_free, CONFIG.blocks, "blocks are free at once");
    assert_eq!(engine.step(&mut events).unwrap(), Progress::Idle);
    let (reason, speculation) = (FinishReason::Cancelled, SpeculationCounts::default());
    assert_eq!(events, [Event::Finished { id, reason, speculation, cached_tokens: 0 }]);
}

#[test]
fn a_prompt_is_computed_in_chunks_beside_decodes() {
    let (mut engine, log) =
        engine_with(EngineConfig { step_tokens: 8, ..CONFIG }, Faults::default());
    let mut events = Vec::new();
    engine.submit(request(&prompt(3), 9)).unwrap();
    engine.step(&mut events).unwrap();
    engine.submit(request(&prompt(20), 9)).unwrap();
    let worked = |prefill_tokens, decode_tokens| Progress::Worked { prefill_tokens, decode_tokens };
    let steps: Vec<Progress> = (0..4).map(|_| engine.step(&mut events).unwrap()).collect();
    assert_eq!(steps, [worked(7, 1), worked(7, 1), worked(6, 1), worked(0, 2)]);
    let outputs: Vec<usize> = log.take().iter().map(|s| s.outputs).collect();
    assert_eq!(outputs, [1, 1, 1, 2, 2], "logits only where a token is chosen");
}

#[test]
fn logits_that_are_not_numbers_fail_their_own_request_alone() {
    let plain = request(&prompt(4), 12);
    let expected = oracle(&plain, &CONFIG);
    let nan_after =
        (0..29).map(TokenId).find(|t| !expected.tokens.contains(t) && t.0 > 21).unwrap();
    let (mut engine, _) = engine_with(CONFIG, Faults { nan_after: Some(nan_after), fail_at: None });
    let good = engine.submit(plain).unwrap();
    let bad = engine.submit(request(&[1, nan_after.0], 5)).unwrap();
    let outcomes = run_to_the_end(&mut engine);
    assert_eq!(outcomes[&good], expected);
    let Some(End::Failed(why)) = &outcomes[&bad].end else { panic!("{outcomes:?}") };
    assert!(why.contains("position 2") && why.contains("not a number"), "{why}");
}

#[test]
fn a_failing_step_answers_every_request_and_the_engine_goes_on() {
    let (mut engine, _) = engine_with(CONFIG, Faults { fail_at: Some(2), nan_after: None });
    let open: Vec<RequestId> =
        (0..6).map(|_| engine.submit(request(&prompt(9), 20)).unwrap()).collect();
    let (mut outcomes, mut events) = (BTreeMap::new(), Vec::new());
    let error = (0..3).find_map(|_| engine.step(&mut events).err()).expect("the third step fails");
    assert!(error.to_string().contains("scripted"));
    collect(&mut outcomes, &mut events);
    for id in open {
        assert!(matches!(outcomes[&id].end, Some(End::Failed(_))), "{id:?}");
    }
    let counts = engine.counts();
    assert_eq!((counts.open, counts.blocks_free), (0, CONFIG.blocks));
    let again = request(&prompt(9), 20);
    let id = engine.submit(again.clone()).unwrap();
    assert_eq!(run_to_the_end(&mut engine)[&id], oracle(&again, &CONFIG));
}

#[test]
fn a_runner_of_another_vocabulary_is_an_error_not_a_panic() {
    let runner = ScriptedRunner::new(CONFIG.step_limits(), CONFIG.vocab + 1, Faults::default());
    let mut engine = Engine::new(Box::new(runner), CONFIG);
    engine.submit(request(&[1], 1)).unwrap();
    let error = engine.step(&mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "step input: expected 29 logits of the runner, found 30");
}

#[test]
fn an_engine_can_move_to_another_thread() {
    fn check<T: Send>(_: &T) {}
    check(&engine(CONFIG));
}
