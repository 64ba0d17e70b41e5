//! Engines, drafters and requests at random, for the random schedules of [`super::tests`].

use super::scripted::{Asked, Faults, Log, ScriptedRunner};
use super::tests::steady_len;
use super::*;
use crate::grammar::{GrammarSource, Grammars, Guide};
use crate::logprobs::LogprobsWanted;
use crate::sampler::SamplingParams;
use crate::speculation::vocab::VocabMap;
use crate::speculation::{
    Costs, Curve, DraftCosts, DraftModel, Drafter, Length, LookupRule, Policy, Rule,
};
use std::cell::RefCell;
use std::collections::HashMap;
use testkit::Rng;

/// A drafter that is right some of the time, perhaps never or always, and the steps of its model,
/// which are asked for where it can be `asked`.
pub(super) fn random_speculation(
    rng: &mut Rng,
    config: &EngineConfig,
    asked: Option<Asked>,
) -> (Speculation, Log) {
    // A padded or a smaller vocabulary, and often a shorter context than the verifier's.
    let vocab = config.vocab + [0, 0, 0, 3][rng.below(4)] - [0, 0, 0, 2][rng.below(4)];
    let context_len = config.context_len.min(4 + rng.below(90) as u32);
    let limits = config.draft_limits();
    let right = [0, 30, 70, 90, 100][rng.below(5)];
    let nan_after = (rng.below(4) == 0).then(|| TokenId(rng.below(config.vocab) as u32));
    let runner = ScriptedRunner::draft(limits, vocab, right)
        .steady(steady_len(config))
        .within(context_len)
        .faulty(Faults { nan_after, fail_at: None })
        .asked(asked);
    let (log, map) = (runner.log(), VocabMap::same(config.vocab, vocab));
    let model = DraftModel::new(Box::new(runner), &limits, map, context_len);
    let lookup = LookupRule { least_match: 1 + rng.below(3) };
    let drafter = match rng.below(4) {
        0 => Drafter::Lookup(lookup),
        1 => Drafter::Cascade(lookup, model),
        _ => Drafter::Model(model),
    };
    let rule = if rng.below(3) == 0 { Rule::Rejection } else { Rule::Coupled };
    let length = if rng.below(2) == 0 {
        Length::Fixed(rng.below(7))
    } else {
        Length::Auto(Box::new(Policy::new(random_costs(rng), rng.below(20))))
    };
    (Speculation { drafter, length, rule }, log)
}

/// Costs of which some make drafting free, some make it absurd.
fn random_costs(rng: &mut Rng) -> Costs {
    let mut seconds = || 10f64.powi(-(rng.below(6) as i32)) * (1 + rng.below(9)) as f64;
    let step = Curve::new(vec![(1, seconds()), (3, seconds())]).unwrap();
    let draft = DraftCosts { step, start: seconds(), prefill_token: seconds() };
    let verify = [1, 2, 5].map(|rows| (rows, seconds())).to_vec();
    let (verify, lookup, token) = (Curve::new(verify).unwrap(), seconds(), seconds());
    Costs { verify, draft: Some(draft), lookup, token }
}

fn random_sampling(rng: &mut Rng) -> SamplingParams {
    let mut params = SamplingParams { seed: rng.bits(), ..Default::default() };
    match rng.below(4) {
        0 => params.temperature = 0.0,
        1 => params.top_p = 0.7,
        2 => (params.top_k, params.frequency_penalty) = (5, 0.5),
        _ => (params.repetition_penalty, params.temperature) = (1.3, 0.8),
    }
    params
}

pub(super) fn random_request(rng: &mut Rng, config: &EngineConfig) -> Request {
    let longest = (config.context_len as usize - 1).min(config.blocks * config.block_len);
    // Short prompts outgrow their blocks together, long ones are cut into chunks.
    let longest = if rng.below(3) == 0 { longest } else { longest.min(6) };
    let (len, stops) = (1 + rng.below(longest), rng.below(2));
    let mut token = || TokenId(rng.below(config.vocab) as u32);
    let prompt = (0..len).map(|_| token()).collect();
    let stop_tokens: Vec<TokenId> = (0..stops).map(|_| token()).collect();
    let (min_tokens, end_tokens) = (rng.below(6) as u32, stop_tokens.clone());
    Request {
        prompt,
        stop_tokens,
        max_tokens: 1 + rng.below(40) as u32,
        sampling: SamplingParams { min_tokens, end_tokens, ..random_sampling(rng) },
        guide: random_guide(rng, config.vocab),
        logprobs: random_logprobs(rng),
        priority: rng.below(3) as i32 - 1,
    }
}

/// The request with nothing in the way of choosing its tokens by their logits alone.
pub(super) fn drawn(request: Request) -> Request {
    let SamplingParams { temperature, seed, min_tokens, .. } = request.sampling;
    let end_tokens = request.sampling.end_tokens;
    let sampling =
        SamplingParams { temperature, seed, min_tokens, end_tokens, ..Default::default() };
    Request { sampling, guide: None, logprobs: None, ..request }
}

thread_local! {
    /// Grammars by vocabulary: they take long to make.
    static GRAMMARS: RefCell<HashMap<usize, Grammars>> = RefCell::default();
}

/// A guide for two in five, over tokens that are the bytes from `!` on, the last but one two of
/// them, the last one an end token. Some grammars need what a small vocabulary lacks.
fn random_guide(rng: &mut Rng, vocab: usize) -> Option<Guide> {
    const REGEXES: [&str; 6] =
        ["[!-/]*", "(!\"|#+|[$]){1,9}", "[!-\"]{3}[!-&]{5,8}", "(!|\"|#!)*", "!{2}[#-I]+", "\"+"];
    if rng.below(5) > 1 {
        return None;
    }
    let mut words: Vec<Vec<u8>> = (b'!'..).take(vocab).map(|byte| vec![byte]).collect();
    (words[vocab - 2], words[vocab - 1]) = (b"!\"".to_vec(), b"\xff</s>".to_vec());
    let end = TokenId(vocab as u32 - 1);
    let source = GrammarSource::Regex(REGEXES[rng.below(REGEXES.len())].into());
    GRAMMARS.with_borrow_mut(|grammars| {
        let made = || Grammars::from_words(&words, &[end]).unwrap();
        Some(grammars.entry(vocab).or_insert_with(made).guide(&source).unwrap())
    })
}

fn random_logprobs(rng: &mut Rng) -> Option<LogprobsWanted> {
    let prompt = rng.below(2) == 0;
    (rng.below(3) == 0).then(|| LogprobsWanted { top: rng.below(3) as u32, prompt })
}

pub(super) fn random_config(rng: &mut Rng) -> EngineConfig {
    let step_tokens_max = if rng.below(2) == 0 { 6 } else { 40 };
    let blocks_max = if rng.below(2) == 0 { 10 } else { 60 };
    EngineConfig {
        vocab: 3 + rng.below(40),
        context_len: 2 + rng.below(60) as u32,
        step_tokens: 1 + rng.below(step_tokens_max),
        max_sequences: 1 + rng.below(7),
        blocks: 1 + rng.below(blocks_max),
        block_len: 1 + rng.below(8),
        max_waiting: rng.below(12),
        max_drafted: rng.below(7),
        max_scored: 1 + rng.below(9),
        prefix_caching: match rng.below(5) {
            0 => PrefixCaching::Off,
            1 => PrefixCaching::On { steady_len: rng.below(40) as u32 },
            _ => PrefixCaching::On { steady_len: u32::MAX },
        },
    }
}
