//! What requests with equal beginnings share, over the scripted runner. (That they get the same
//! text is in the random schedules of [`super::tests`].)

use super::scripted::{Faults, Log, ScriptedRunner};
use super::tests::{CONFIG, engine_with, oracle, prompt, request, run_to_the_end};
use super::*;
use crate::logprobs::LogprobsWanted;
use crate::speculation::vocab::VocabMap;
use crate::speculation::{DraftModel, Drafter, Length, Rule};

const ALWAYS: PrefixCaching = PrefixCaching::On { steady_len: u32::MAX };

fn config(prefix_caching: PrefixCaching) -> EngineConfig {
    EngineConfig { step_tokens: 64, prefix_caching, ..CONFIG }
}

/// Runs one request after another; of each, tokens of its first step and cached ones.
fn run(engine: &mut Engine, log: &Log, requests: &[Request]) -> Vec<(usize, usize)> {
    let mut run = |request: &Request| {
        let (config, mut events) = (*engine.config(), vec![]);
        engine.submit(request.clone()).unwrap();
        log.take();
        let mut tokens = vec![];
        loop {
            engine.poison();
            engine.step(&mut events).unwrap();
            for event in events.drain(..) {
                match event {
                    Event::Token { token, .. } => tokens.push(token),
                    Event::Finished { cached_tokens, .. } => {
                        assert_eq!(tokens, oracle(request, &config).tokens);
                        return (log.take()[0].tokens, cached_tokens);
                    }
                    _ => {}
                }
            }
        }
    };
    requests.iter().map(&mut run).collect()
}

#[test]
fn a_request_computes_only_what_no_other_computed() {
    let (mut engine, log) = engine_with(config(ALWAYS), Faults::default());
    let first = request(&prompt(18), 7);
    let mut next = first.clone();
    next.prompt.extend(&oracle(&first, engine.config()).tokens);
    next.prompt.push(TokenId(1));
    let other = request(&[&prompt(10)[..], &[28, 28, 28]].concat(), 3);
    // Blocks of 4. The next turn finds all 24 tokens that were computed; of an equal prompt of 8
    // one token is left to compute, so the second block is not taken.
    let requests = [first.clone(), first, next, other, request(&prompt(8), 3)];
    let found = run(&mut engine, &log, &requests);
    assert_eq!(found, [(18, 0), (2, 16), (2, 24), (5, 8), (4, 4)]);
    assert_eq!(engine.counts().prefix, PrefixCounts { queried: 83, cached: 52 });
    let (mut engine, log) = engine_with(config(PrefixCaching::Off), Faults::default());
    let found = run(&mut engine, &log, &requests[..2]);
    assert_eq!(found, [(18, 0), (18, 0)]);
    assert_eq!(engine.counts().prefix, PrefixCounts::default());
}

#[test]
fn requests_that_run_share_blocks_and_so_find_room() {
    let narrow = EngineConfig { blocks: 8, ..config(ALWAYS) };
    let (mut engine, log) = engine_with(narrow, Faults::default());
    let mut events = vec![];
    for _ in 0..2 {
        engine.submit(request(&prompt(21), 3)).unwrap();
        engine.step(&mut events).unwrap();
    }
    // Five of the first one's six blocks are the second one's too.
    assert_eq!((engine.counts().running, engine.counts().blocks_free), (2, 1));
    assert_eq!(log.take().iter().map(|s| s.tokens).collect::<Vec<_>>(), [21, 2]);
}

#[test]
fn equal_requests_that_arrive_together_are_computed_once() {
    let (mut engine, log) = engine_with(config(ALWAYS), Faults::default());
    let mut other = request(&prompt(18), 7);
    other.prompt[8..].fill(TokenId(1));
    let requests = [18, 18, 18].map(|len| request(&prompt(len), 7));
    let requests = [&requests[..], &[other]].concat();
    let ids: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    let outcomes = run_to_the_end(&mut engine);
    for (id, request) in ids.iter().zip(&requests) {
        assert_eq!(outcomes[id], oracle(request, engine.config()));
    }
    // The others wait for one step. Then of each two tokens are left, or what it does not share.
    let sizes: Vec<usize> = log.take().iter().map(|s| s.tokens).collect();
    assert_eq!(sizes[..2], [18, 1 + 2 + 2 + 10]);
    assert_eq!(engine.counts().prefix.cached, 16 + 16 + 8);
}

/// Less than half of a prompt is not worth a step in which the rest could be computed, and nobody
/// waits for a prompt that is computed already.
#[test]
fn requests_with_little_in_common_start_together() {
    let (mut engine, log) = engine_with(config(ALWAYS), Faults::default());
    let mut other = request(&prompt(18), 7);
    other.prompt[8..].fill(TokenId(1));
    engine.submit(request(&prompt(18), 7)).unwrap();
    engine.submit(other).unwrap();
    engine.step(&mut vec![]).unwrap();
    engine.submit(request(&prompt(18), 7)).unwrap();
    engine.step(&mut vec![]).unwrap();
    let sizes: Vec<usize> = log.take().iter().map(|s| s.tokens).collect();
    assert_eq!(sizes, [18 + 18, 1 + 1 + 2]);
}

#[test]
fn probabilities_of_a_prompt_need_all_of_it_computed() {
    let (mut engine, log) =
        engine_with(EngineConfig { max_scored: 64, ..config(ALWAYS) }, Faults::default());
    let plain = request(&prompt(18), 7);
    let wanted = |prompt| Some(LogprobsWanted { top: 0, prompt });
    let scored = Request { logprobs: wanted(true), ..plain.clone() };
    let generated = Request { logprobs: wanted(false), ..plain.clone() };
    let found = run(&mut engine, &log, &[plain, scored, generated]);
    assert_eq!(found, [(18, 0), (18, 0), (2, 16)]);
}

/// Beyond the steady length, a token's keys follow from the whole prompt's length.
#[test]
fn prompts_beyond_the_steady_length_share_only_with_their_like() {
    let config = config(PrefixCaching::On { steady_len: 20 });
    let (mut engine, log) = engine_with(config, Faults::default());
    let mut like = request(&prompt(24), 3);
    like.prompt[22] = TokenId(0);
    let lens = [20, 24, 25].map(|len| request(&prompt(len), 3));
    let requests = [&lens[..], &[like], &lens].concat();
    let found = run(&mut engine, &log, &requests);
    assert_eq!(found, [(20, 0), (24, 0), (25, 0), (4, 20), (4, 16), (4, 20), (1, 24)]);
}

#[test]
fn a_preempted_request_takes_up_what_is_left_of_its_blocks() {
    let computed = |prefix_caching| {
        let config = EngineConfig { blocks: 14, ..config(prefix_caching) };
        let (mut engine, log) = engine_with(config, Faults::default());
        let requests = [request(&prompt(24), 20), request(&[&[5], &prompt(20)[..]].concat(), 20)];
        let ids = requests.each_ref().map(|r| engine.submit(r.clone()).unwrap());
        let outcomes = run_to_the_end(&mut engine);
        for (id, request) in ids.iter().zip(&requests) {
            assert_eq!(outcomes[id], oracle(request, engine.config()));
        }
        assert!(engine.counts().preemptions > 0);
        log.take().iter().map(|s| s.tokens).sum::<usize>()
    };
    let (off, on) = (computed(PrefixCaching::Off), computed(ALWAYS));
    assert!(on < off, "{on} of {off} tokens");
}

#[test]
fn after_a_failed_step_nothing_is_known() {
    let (mut engine, log) =
        engine_with(config(ALWAYS), Faults { fail_at: Some(2), nan_after: None });
    engine.submit(request(&prompt(18), 7)).unwrap();
    let failed = (0..3).find_map(|_| engine.step(&mut vec![]).err());
    assert!(failed.is_some());
    engine.check_integrity();
    assert_eq!(run(&mut engine, &log, &[request(&prompt(18), 2)]), [(18, 0)]);
}

/// An engine with a perfect draft, and the steps of both runners.
fn drafting(length: usize) -> (Engine, Log, Log) {
    let config = EngineConfig { max_drafted: 3, ..config(ALWAYS) };
    let (limits, vocab) = (config.draft_limits(), config.vocab);
    let (engine, log) = engine_with(config, Faults::default());
    let runner = ScriptedRunner::draft(limits, vocab, 100).steady(u32::MAX);
    let drafted = runner.log();
    let map = VocabMap::same(vocab, vocab);
    let model = DraftModel::new(Box::new(runner), &limits, map, config.context_len);
    let (drafter, length) = (Drafter::Model(model), Length::Fixed(length));
    let speculation = Speculation { drafter, length, rule: Rule::Coupled };
    (engine.with_speculation(speculation), log, drafted)
}

#[test]
fn a_draft_model_finds_what_it_computed() {
    let (mut engine, log, drafted) = drafting(3);
    let requests = [request(&prompt(18), 9), request(&prompt(18), 9)];
    assert_eq!(run(&mut engine, &log, &requests[..1]), [(18, 0)]);
    assert_eq!(drafted.take()[0].tokens, 18);
    assert_eq!(run(&mut engine, &log, &requests[1..]), [(2, 16)]);
    assert_eq!(drafted.take()[0].tokens, 2);
}

/// It computes an idle block that lacks its part, but takes no other sequence's.
#[test]
fn a_draft_model_catches_up_with_what_nobody_else_holds() {
    let (mut engine, log, drafted) = drafting(3);
    let plain = request(&prompt(18), 30);
    engine.replace_length(Length::Fixed(0));
    assert_eq!(run(&mut engine, &log, std::slice::from_ref(&plain)), [(18, 0)]);
    engine.replace_length(Length::Fixed(3));
    engine.submit(plain.clone()).unwrap();
    let step = |engine: &mut Engine| {
        engine.step(&mut vec![]).unwrap();
        let sizes = |log: &Log| log.take().iter().map(|s| s.tokens).collect::<Vec<_>>();
        (sizes(&log), sizes(&drafted))
    };
    assert_eq!(step(&mut engine), (vec![2], vec![18]));
    run_to_the_end(&mut engine);
    engine.replace_length(Length::Fixed(0));
    let other = request(&[&[3], &prompt(17)[..]].concat(), 30);
    engine.submit(other.clone()).unwrap();
    step(&mut engine);
    // The first one lacks the draft's part and holds its blocks: who wants a draft computes them.
    engine.replace_length(Length::Fixed(3));
    engine.sequences[0].draft.locked = 1;
    engine.submit(other.clone()).unwrap();
    let (verified, drafts) = step(&mut engine);
    assert_eq!((verified, drafts), (vec![1 + 18], vec![18]));
    // Now those are known, and a third finds both parts.
    engine.submit(other).unwrap();
    engine.step(&mut vec![]).unwrap();
    assert_eq!(engine.sequences[2].draft.shared, 4);
}
