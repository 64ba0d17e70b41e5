//! Drafters over the scripted runner: what counts, positions and laws must be. (That text does not
//! depend on drafters is in the random schedules of [`super::tests`].)

use super::scripted::{Faults, Log, ScriptedRunner, expected_logits};
use super::*;
use crate::request::TokenSource;
use crate::sampler::{History, SamplingParams, candidates};
use crate::speculation::policy::Source;
use crate::speculation::vocab::VocabMap;
use crate::speculation::{
    Costs, Curve, DraftCosts, DraftModel, Drafter, Length, Policy, Rule, SpeculationCounts,
};

const VOCAB: usize = 3;

fn config(max_drafted: usize) -> EngineConfig {
    EngineConfig {
        vocab: VOCAB,
        context_len: 600,
        step_tokens: 32,
        max_sequences: 2,
        blocks: 400,
        block_len: 4,
        max_waiting: 4,
        max_drafted,
        max_scored: 0,
        prefix_caching: PrefixCaching::Off,
    }
}

/// An engine whose draft is right `right` times of 100 and always proposes `drafted` tokens, and
/// the steps of both runners.
fn engine(right: u64, drafted: usize, rule: Rule) -> (Engine, Log, Log) {
    engine_of(right, drafted, Length::Fixed(drafted), rule)
}

/// The same with another length; never more than `drafted` tokens.
fn engine_of(right: u64, drafted: usize, length: Length, rule: Rule) -> (Engine, Log, Log) {
    let config = config(drafted);
    let limits = config.draft_limits();
    let draft = ScriptedRunner::draft(limits, VOCAB, right);
    let verifier = ScriptedRunner::new(config.step_limits(), VOCAB, Faults::default());
    let logs = (verifier.log(), draft.log());
    let map = VocabMap::same(VOCAB, VOCAB);
    let model = DraftModel::new(Box::new(draft), &limits, map, config.context_len);
    let speculation = Speculation { drafter: Drafter::Model(model), length, rule };
    (Engine::new(Box::new(verifier), config).with_speculation(speculation), logs.0, logs.1)
}

fn request(max_tokens: u32, sampling: SamplingParams) -> Request {
    let prompt = [1, 2, 0, 1, 1].map(TokenId).to_vec();
    Request { sampling, ..Request::new(prompt, max_tokens) }
}

fn run(engine: &mut Engine, request: Request) -> (Vec<(TokenId, TokenSource)>, SpeculationCounts) {
    let (mut events, mut tokens) = (vec![], vec![]);
    engine.submit(request).unwrap();
    loop {
        engine.step(&mut events).unwrap();
        for event in events.drain(..) {
            match event {
                Event::Prompt { .. } => {}
                Event::Token { token, source, .. } => tokens.push((token, source)),
                Event::Finished { speculation, .. } => return (tokens, speculation),
                Event::Failed { reason, .. } => panic!("{reason}"),
            }
        }
    }
}

/// Each cycle of a perfect draft gives one token more than was proposed, and each draft step but
/// the first of a cycle computes one token.
#[test]
fn a_draft_that_is_the_verifier_is_always_right() {
    let (mut engine, verifier, draft) = engine(100, 4, Rule::Coupled);
    // One token after the prompt, then cycles of five.
    let (tokens, counts) = run(&mut engine, request(51, SamplingParams::default()));
    assert_eq!(counts, SpeculationCounts { cycles: 10, drafted_tokens: 40, accepted_tokens: 40 });
    let sources: Vec<TokenSource> = tokens[1..].iter().map(|t| t.1).collect();
    let cycle = [[TokenSource::Drafted; 4].as_slice(), &[TokenSource::Bonus]].concat();
    assert!(sources.chunks(5).all(|c| c == cycle), "{sources:?}");
    let sizes = |log: &Log| log.take().iter().map(|s| s.tokens).collect::<Vec<_>>();
    let verified = sizes(&verifier);
    assert_eq!((verified[0], &verified[1..]), (5, &[5; 10][..]));
    // It follows the prompt; after a cycle it lacks the last proposed token and the bonus.
    let first = [&[5, 1, 1, 1, 1][..], &[2, 1, 1, 1].repeat(9)].concat();
    assert_eq!(sizes(&draft), first);
}

#[test]
fn another_length_holds_from_the_next_step_on() {
    let (mut engine, _, draft) = engine(100, 4, Rule::Coupled);
    let given = engine.replace_length(Length::Fixed(0));
    assert!(matches!(given, Length::Fixed(4)), "{given:?}");
    let (plain, counts) = run(&mut engine, request(21, SamplingParams::default()));
    assert_eq!((counts, draft.take().len()), (SpeculationCounts::default(), 0));
    assert!(matches!(engine.replace_length(Length::Fixed(1)), Length::Fixed(0)));
    let (drafted, counts) = run(&mut engine, request(21, SamplingParams::default()));
    assert_eq!(counts, SpeculationCounts { cycles: 10, drafted_tokens: 10, accepted_tokens: 10 });
    let ids = |tokens: &[(TokenId, TokenSource)]| tokens.iter().map(|t| t.0).collect::<Vec<_>>();
    assert_eq!(ids(&plain), ids(&drafted));
    let runner = ScriptedRunner::new(config(0).step_limits(), VOCAB, Faults::default());
    let mut alone = Engine::new(Box::new(runner), config(0));
    assert!(matches!(alone.replace_length(Length::Fixed(7)), Length::Fixed(7)), "nobody drafts");
}

#[test]
fn a_draft_that_is_always_wrong_costs_tokens_but_changes_none() {
    let greedy = SamplingParams::greedy();
    let (mut engine, verifier, _) = engine(0, 3, Rule::Coupled);
    let (tokens, counts) = run(&mut engine, request(40, greedy));
    assert_eq!(tokens.len(), 40);
    assert!(counts.accepted_tokens < counts.drafted_tokens / 2, "{counts:?}");
    let steps = verifier.take().len() as u64;
    assert_eq!(steps + counts.accepted_tokens, 40, "a step for each token that was not accepted");
}

/// No token is proposed that could not be emitted.
#[test]
fn proposals_end_where_the_sequence_must_end() {
    for max_tokens in 1..8 {
        let (mut engine, ..) = engine(100, 6, Rule::Coupled);
        let (tokens, counts) = run(&mut engine, request(max_tokens, SamplingParams::default()));
        assert_eq!(tokens.len(), max_tokens as usize);
        let expected = u64::from(max_tokens).saturating_sub(2);
        assert_eq!((counts.drafted_tokens, counts.accepted_tokens), (expected, expected));
    }
}

#[test]
fn simulated_acceptance_is_what_was_asked_for() {
    for (rate, right) in [(0.8, 0), (0.3, 100), (0.0, 100), (1.0, 0)] {
        let (mut engine, ..) = engine(right, 1, Rule::Simulated(rate));
        let counts = (0..40).map(|seed| {
            let sampling = SamplingParams { seed, ..SamplingParams::greedy() };
            run(&mut engine, request(500, sampling)).1
        });
        let (accepted, drafted) =
            counts.fold((0, 0), |sum, c| (sum.0 + c.accepted_tokens, sum.1 + c.drafted_tokens));
        let found = accepted as f64 / drafted as f64;
        let rate = f64::from(rate);
        // Six standard errors of a mean of coins.
        let bound = 6.0 * (rate * (1.0 - rate) / drafted as f64).sqrt();
        assert!((found - rate).abs() <= bound, "{found} of {drafted} for {rate}");
    }
}

/// The chance of each text of three tokens, by index in base [`VOCAB`].
fn law_of_three(sampling: &SamplingParams) -> Vec<f64> {
    let prompt = request(3, sampling.clone()).prompt;
    let mut law = vec![0.0; VOCAB.pow(3)];
    for (i, chance) in law.iter_mut().enumerate() {
        let text = [i / 9, i / 3 % 3, i % 3].map(|t| TokenId(t as u32));
        *chance = (0..3).fold(1.0, |product, n| {
            let tokens = [&prompt, &text[..n]].concat();
            let logits_v = expected_logits(&tokens, prompt.len(), VOCAB, 0);
            let history = History { prompt: &prompt, generated: &text[..n] };
            let law = candidates(&logits_v, &history, sampling).unwrap();
            let found = law.iter().find(|(token, _)| *token == text[n]);
            product * found.map_or(0.0, |(_, p)| f64::from(*p))
        });
    }
    law
}

/// Pearson's statistic of `texts` sampled texts; the more, the less they follow their law.
fn chi_square(rule: Rule, texts: u64) -> (f64, SpeculationCounts) {
    let sampling = |seed| SamplingParams { seed, temperature: 1.5, ..Default::default() };
    let (law, mut found) = (law_of_three(&sampling(0)), vec![0u64; VOCAB.pow(3)]);
    let (mut engine, ..) = engine(40, 2, rule);
    let mut counts = SpeculationCounts::default();
    for seed in 0..texts {
        // Five tokens, so that two are proposed after the first.
        let (tokens, speculation) = run(&mut engine, request(5, sampling(seed)));
        counts.drafted_tokens += speculation.drafted_tokens;
        counts.accepted_tokens += speculation.accepted_tokens;
        found[tokens[..3].iter().fold(0, |i, t| i * VOCAB + t.0.index())] += 1;
    }
    let expected = |chance: f64| chance * texts as f64;
    let term =
        |(n, chance): (&u64, &f64)| (*n as f64 - expected(*chance)).powi(2) / expected(*chance);
    (found.iter().zip(&law).map(term).sum(), counts)
}

/// Both rules give the verifier's law; rejection accepts more. With 26 degrees of freedom the
/// statistic exceeds 76 once in a million; the seeds are fixed.
#[test]
fn sampled_text_has_the_verifiers_law_under_both_rules() {
    let texts = 20_000;
    let (coupled, few) = chi_square(Rule::Coupled, texts);
    let (rejection, more) = chi_square(Rule::Rejection, texts);
    eprintln!("chi-square {coupled:.1} coupled, {rejection:.1} rejection; {few:?}, {more:?}");
    assert!(coupled < 76.0 && rejection < 76.0, "{coupled} {rejection}");
    assert!(more.accepted_tokens > few.accepted_tokens);
    // What is accepted by a coin has another law: the statistic can tell.
    let (simulated, _) = chi_square(Rule::Simulated(0.5), texts);
    assert!(simulated > 200.0, "{simulated}");
}

/// Steps of `draft` where the verifier's take 1 and cost little more with more rows.
fn automatic(draft: f64) -> Length {
    let verify = Curve::new(vec![(1, 1.0), (8, 1.1)]).unwrap();
    let step = Curve::new(vec![(1, draft)]).unwrap();
    let draft = Some(DraftCosts { step, start: 0.0, prefill_token: draft / 10.0 });
    Length::Auto(Box::new(Policy::new(Costs { verify, draft, lookup: 0.0, token: 0.0 }, 6)))
}

#[test]
fn the_automatic_length_uses_a_draft_that_is_right() {
    let (mut engine, verifier, _) = engine_of(100, 6, automatic(0.1), Rule::Coupled);
    let (tokens, counts) = run(&mut engine, request(256, SamplingParams::default()));
    assert_eq!((tokens.len(), counts.accepted_tokens), (256, counts.drafted_tokens));
    // At best 7 tokens a step; the first lengths are shorter.
    assert!(verifier.take().len() < 256 / 5, "{counts:?}");
    let verdict = engine.verdict(Source::Model).unwrap();
    assert_eq!((verdict.measured, verdict.best_length), (Some(1.0), Some(6)), "{verdict}");
}

#[test]
fn the_automatic_length_leaves_a_draft_that_is_wrong_alone() {
    // Of three tokens a wrong draft hits the right one now and then; that does not pay at 0.5.
    let (mut engine, verifier, _) = engine_of(0, 6, automatic(0.5), Rule::Coupled);
    let (_, counts) = run(&mut engine, request(256, SamplingParams::greedy()));
    assert!(counts.drafted_tokens > 0 && counts.drafted_tokens < 16, "{counts:?}");
    assert!(verifier.take().len() > 245);
    let verdict = engine.verdict(Source::Model).unwrap();
    let measured = counts.accepted_tokens as f64 / counts.drafted_tokens as f64;
    assert!(verdict.measured.unwrap() >= measured, "those behind a rejected one do not count");
    assert!((verdict.break_even.unwrap() - 0.51).abs() < 0.02, "{verdict}");
}

#[test]
fn a_draft_that_cannot_pay_does_not_even_follow_the_prompt() {
    let (mut engine, _, draft) = engine_of(100, 6, automatic(3.0), Rule::Coupled);
    let (_, counts) = run(&mut engine, request(100, SamplingParams::default()));
    assert_eq!((counts, draft.take().len()), (SpeculationCounts::default(), 0));
}
