//! A draft model that can be asked for steps: how often it is waited for, and for which rows. (That
//! what it proposes does not depend on it is in the random schedules of [`super::tests`].)

use super::scripted::{Asked, Faults, Log, ScriptedRunner, StepSize};
use super::tests::{CONFIG, engine, oracle, prompt, request};
use super::*;
use crate::sampler::SamplingParams;
use crate::speculation::vocab::VocabMap;
use crate::speculation::{DraftModel, Drafter, Length, Rule, SpeculationCounts};
use std::collections::BTreeMap;

const CLEAR: Asked = Asked { unclear: 0, lost: 0 };

fn config(max_drafted: usize) -> EngineConfig {
    EngineConfig { max_drafted, step_tokens: 64, prefix_caching: PrefixCaching::Off, ..CONFIG }
}

/// An engine whose draft is the verifier, has a context of `context_len` and can be asked.
fn engine_with(
    config: EngineConfig,
    asked: Asked,
    faults: Faults,
    context_len: u32,
    rule: Rule,
) -> (Engine, Log) {
    let limits = config.draft_limits();
    let draft = ScriptedRunner::draft(limits, config.vocab, 100)
        .faulty(faults)
        .within(context_len)
        .asked(Some(asked));
    let (log, map) = (draft.log(), VocabMap::same(config.vocab, config.vocab));
    let model = DraftModel::new(Box::new(draft), &limits, map, context_len);
    let length = Length::Fixed(config.max_drafted);
    let speculation = Speculation { drafter: Drafter::Model(model), length, rule };
    (engine(config).with_speculation(speculation), log)
}

fn asked(config: EngineConfig, asked: Asked) -> (Engine, Log) {
    engine_with(config, asked, Faults::default(), config.context_len, Rule::Coupled)
}

/// Steps to the end; the tokens and counts of each request, which all must finish.
fn run(engine: &mut Engine) -> BTreeMap<RequestId, (Vec<TokenId>, SpeculationCounts)> {
    let (mut found, mut events) = (BTreeMap::<_, (Vec<_>, _)>::new(), vec![]);
    while engine.step(&mut events).unwrap() != Progress::Idle {
        for event in events.drain(..) {
            match event {
                Event::Token { id, token, .. } => found.entry(id).or_default().0.push(token),
                Event::Finished { id, speculation, .. } => {
                    found.entry(id).or_default().1 = speculation;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    found
}

/// Runs one request; its counts.
fn run_one(engine: &mut Engine, request: &Request) -> SpeculationCounts {
    let id = engine.submit(request.clone()).unwrap();
    let (tokens, counts) = run(engine).remove(&id).unwrap();
    assert_eq!(tokens, oracle(request, engine.config()).tokens);
    counts
}

/// (tokens, outputs) of each step since the last call.
fn sizes(log: &Log) -> Vec<(usize, usize)> {
    log.take().iter().map(|s: &StepSize| (s.tokens, s.outputs)).collect()
}

#[test]
fn one_wait_a_cycle() {
    let (mut engine, log) = asked(config(4), CLEAR);
    let counts = run_one(&mut engine, &request(&prompt(5), 51));
    let all = SpeculationCounts { cycles: 10, drafted_tokens: 40, accepted_tokens: 40 };
    assert_eq!(counts, all);
    // It follows the prompt; after a cycle it lacks the last proposed token and the bonus.
    let steps = [&[(5, 0)][..], &[(1, 1); 4], &[(2, 1), (1, 1), (1, 1), (1, 1)].repeat(9)].concat();
    assert_eq!(sizes(&log), steps);
    assert_eq!(log.trips(), 1 + 10, "the prompt and ten cycles");
}

#[test]
fn a_choice_left_to_the_host_takes_a_plain_step() {
    let (mut engine, log) = asked(config(4), Asked { unclear: 100, lost: 0 });
    let counts = run_one(&mut engine, &request(&prompt(5), 11));
    assert_eq!((counts.drafted_tokens, counts.accepted_tokens), (8, 8));
    // Of each cycle's chains of 4, 3 and 2 steps the first token is chosen anew; the last comes alone.
    let cycle = |first| [&[(first, 1)][..], &[(1, 1); 3 + 1 + 3 + 1 + 2 + 1 + 1]].concat();
    let steps = [&[(5, 0)][..], &cycle(1), &cycle(2)].concat();
    assert_eq!((sizes(&log), log.trips()), (steps, 1 + 2 * (3 + 4)));
}

/// One that has all its tokens computes its last one and leaves.
#[test]
fn sequences_that_want_unlike_numbers_of_tokens_share_a_chain() {
    let (mut engine, log) = asked(config(6), CLEAR);
    let requests = [request(&prompt(5), 4), request(&prompt(7), 30), request(&prompt(6), 6)];
    let ids = requests.each_ref().map(|r| engine.submit(r.clone()).unwrap());
    engine.step(&mut vec![]).unwrap();
    assert_eq!((sizes(&log), log.trips()), (vec![(18, 0)], 1));
    // Two, six and four tokens are wanted.
    engine.step(&mut vec![]).unwrap();
    let steps = vec![(3, 3), (3, 3), (3, 2), (2, 2), (2, 1), (1, 1)];
    assert_eq!((sizes(&log), log.trips()), (steps, 1));
    let rest = run(&mut engine);
    assert_eq!(rest.len(), 1, "two ended after one cycle");
    let tokens = &rest[&ids[1]].0;
    assert!(oracle(&requests[1], engine.config()).tokens.ends_with(tokens));
}

/// At the end of its context a draft has no position for a token that only leaves.
#[test]
fn nothing_is_computed_beyond_the_drafts_context() {
    let rule = Rule::Coupled;
    for context_len in 6..20 {
        let (mut engine, log) = engine_with(config(6), CLEAR, Faults::default(), context_len, rule);
        for (len, max_tokens) in [(5, 40), (7, 40), (6, 9)] {
            engine.submit(request(&prompt(len), max_tokens)).unwrap();
        }
        let found = run(&mut engine);
        let drafted: u64 = found.values().map(|(_, counts)| counts.drafted_tokens).sum();
        assert!(drafted > 0 && log.trips() > 0, "{context_len}");
    }
}

#[test]
fn a_token_that_ends_the_text_ends_the_proposals() {
    let free = request(&prompt(5), 20);
    let tokens = oracle(&free, &config(6)).tokens;
    let stop = (2..8).find(|&i| !tokens[..i].contains(&tokens[i])).unwrap();
    let request = Request { stop_tokens: vec![tokens[stop]], ..free };
    let (mut engine, log) = asked(config(6), CLEAR);
    let counts = run_one(&mut engine, &request);
    // All but the first token and, after six, the bonus.
    let drafted = (stop - stop / 7) as u64;
    assert_eq!((counts.drafted_tokens, counts.accepted_tokens), (drafted, drafted));
    let cycles = stop.div_ceil(7);
    assert_eq!((log.trips(), counts.cycles), (1 + cycles, cycles as u64));
}

#[test]
fn no_more_rows_are_asked_for_than_a_runner_keeps() {
    // All of six steps together, and then of five; five of six; only single ones; not even those.
    for (sequences, trips) in [(170, 1 + 1), (171, 2 + 1), (600, 6 + 5), (1100, 6 + 5)] {
        let config = EngineConfig {
            max_sequences: sequences,
            max_waiting: 0,
            step_tokens: 7 * sequences,
            blocks: 6 * sequences,
            ..config(6)
        };
        let (mut engine, log) = asked(config, CLEAR);
        for i in 0..sequences as u32 {
            engine.submit(request(&[i % 29, i / 29 % 29], 14)).unwrap();
        }
        let found = run(&mut engine);
        assert!(found.values().all(|(_, counts)| counts.drafted_tokens == 11));
        assert_eq!(log.trips(), 1 + trips, "{sequences}: the prompts, six steps, five steps");
    }
}

/// Tokens drawn from a law need it; greedy ones do not, whatever the rule.
#[test]
fn laws_are_not_asked_for() {
    let trips = |sampling| {
        let (config, rule) = (config(4), Rule::Rejection);
        let (mut engine, log) =
            engine_with(config, CLEAR, Faults::default(), config.context_len, rule);
        let request = Request { sampling, ..request(&prompt(5), 11) };
        engine.submit(request).unwrap();
        let found = run(&mut engine);
        assert_eq!(found[&RequestId(0)].1.accepted_tokens, 8);
        log.trips()
    };
    assert_eq!(trips(SamplingParams::greedy()), 1 + 2);
    assert_eq!(trips(SamplingParams::default()), 1 + 8);
}

#[test]
fn a_chain_that_fails_answers_every_request_and_the_engine_goes_on() {
    for fail_at in 1..6 {
        let faults = Faults { fail_at: Some(fail_at), nan_after: None };
        let (mut engine, _) =
            engine_with(config(4), CLEAR, faults, CONFIG.context_len, Rule::Coupled);
        engine.submit(request(&prompt(5), 20)).unwrap();
        let mut events = vec![];
        let error = (0..4).find_map(|_| engine.step(&mut events).err()).expect("a step fails");
        assert!(error.to_string().contains("scripted"), "{error}");
        assert!(matches!(events.last(), Some(Event::Failed { .. })), "{events:?}");
        let counts = run_one(&mut engine, &request(&prompt(9), 21));
        assert_eq!((counts.cycles, counts.accepted_tokens), (4, 16));
    }
}

#[test]
fn lost_answers_are_an_error() {
    let (mut engine, _) = asked(config(4), Asked { unclear: 0, lost: 1 });
    engine.submit(request(&prompt(5), 20)).unwrap();
    let error = (0..2).find_map(|_| engine.step(&mut vec![]).err()).expect("a step fails");
    assert_eq!(error.to_string(), "step input: expected 4 tokens of the runner, found 3");
}
