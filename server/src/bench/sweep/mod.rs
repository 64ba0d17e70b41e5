//! `foretoken bench --draft`: draft lengths and plain decoding in turns, in one engine.
//!
//! ```text
//! threads > tokens > round: for each prompt plain decoding and every length, beginning with
//!                           another one each time; then a row for each of them
//! ```
//! Only steps after the prompts are timed. Not here: loading ([`pair`]), times inside a step
//! ([`clocked`]), sums ([`tally`]), columns ([`rows`]).

mod clocked;
mod pair;
mod rows;
mod tally;

use super::output::Writer;
use super::stats::{self, Kept, Repetition};
use super::subject::Subject;
use super::{machine, places, to_row};
use crate::Io;
use crate::cli::{BenchArgs, DeviceArgs, DraftTokens};
use crate::generate;
use crate::load::{self, Unexpected};
use crate::speed::Timings;
use crate::verify::{first_difference, prompts};
use anyhow::{Context, anyhow, bail};
use engine::engine::EngineConfig;
use engine::request::{Request, TokenSource};
use engine::sampler::SamplingParams;
use engine::speculation::policy::POSITIONS;
use engine::speculation::{Length, Policy, Rule};
use kernels::program::TokenId;
use pair::{Drafting, Pair};
use rows::{SWEEP, Shared};
use tally::Tally;

/// Runs the command.
pub(super) fn run(args: &BenchArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let subject = Subject::open(&args.subject, args.measuring.device)?;
    let prompts = prompts(args, &subject)?;
    let tests = tests(args, &subject, &prompts)?;
    let config = config(&args.sweep.draft_tokens, &subject, &tests);
    let mut writer = Writer::new(&SWEEP, args.measuring.output);
    for place in places(&args.measuring)? {
        let device = DeviceArgs { head: Some(args.subject.head), ..place.device_args() };
        let drafting = Drafting::open(args, &subject, &device)?;
        let backend = load::backend(&device)?;
        let rule = args.sweep.acceptance.map_or(Rule::Coupled, |a| Rule::Simulated(a as f32));
        let pair = Pair::load(&subject, &drafting, config, rule, backend.as_ref(), io)?;
        let mut sweep = Sweep::new(pair, &args.sweep.draft_tokens);
        for test in &tests {
            let kept = sweep.measure(test, args)?;
            let shared = Shared {
                setting: place.setting(&subject),
                draft: drafting.name(),
                tokens: test.tokens,
                prompts: prompts.len(),
                args: &args.sweep,
                costs: &sweep.pair.costs,
            };
            for way in 0..sweep.ways.len() {
                writer.row(&to_row(&shared.row(way, &kept))?, io)?;
            }
        }
    }
    Ok(writer.finish(io)?)
}

/// Tokens of the prompt of a made-up model.
const MADE_UP_PROMPT: usize = 64;

fn prompts(args: &BenchArgs, subject: &Subject) -> anyhow::Result<Vec<Vec<TokenId>>> {
    if let Some(model) = subject.model() {
        return prompts::among(None, args.sweep.prompts.as_deref(), model);
    }
    // A prime far above most vocabularies' divisors: tokens from all over.
    let token = |i| TokenId((i * 7919 % subject.spec().vocab) as u32);
    Ok(vec![(0..MADE_UP_PROMPT).map(token).collect()])
}

/// What is continued, and by how many tokens.
struct Test {
    tokens: usize,
    requests: Vec<Request>,
}

/// A test for each number of tokens.
fn tests(
    args: &BenchArgs,
    subject: &Subject,
    prompts: &[Vec<TokenId>],
) -> anyhow::Result<Vec<Test>> {
    // A prompt gives the first token, and only what follows is timed.
    let all: Vec<usize> = args.gen_tokens.iter().copied().filter(|&n| n > 1).collect();
    if all.is_empty() {
        bail!("nothing to measure: give --gen-tokens a number above 1, since a prompt gives one");
    }
    let temperature = args.sweep.temperature as f32;
    let sampling = SamplingParams { temperature, ..SamplingParams::default() };
    let test = |tokens: usize| {
        let config = generate::config(subject.spec(), usize::MAX, tokens as u32, 0);
        let request = |(i, prompt): (usize, &Vec<TokenId>)| {
            let (prompt, sampling, max_tokens) = (prompt.clone(), sampling.clone(), tokens as u32);
            // No token ends a text: every way must generate just as many.
            let request = Request { sampling, ..Request::new(prompt, max_tokens) };
            fits(&config, &request).with_context(|| format!("prompt {}", i + 1))?;
            Ok(request)
        };
        let requests: anyhow::Result<Vec<Request>> =
            prompts.iter().enumerate().map(request).collect();
        Ok(Test { tokens, requests: requests? })
    };
    all.into_iter().map(test).collect()
}

fn fits(config: &EngineConfig, request: &Request) -> anyhow::Result<()> {
    config.check(request)?;
    let (prompt, tokens, context) =
        (request.prompt.len(), request.max_tokens, config.context_len as usize);
    if prompt + tokens as usize > context {
        bail!(
            "its {prompt} tokens and {tokens} more exceed the context of {context}: give --gen-tokens a smaller number"
        );
    }
    Ok(())
}

/// Sizes of the engine, for the longest of all lengths, prompts and tests.
fn config(lengths: &[DraftTokens], subject: &Subject, tests: &[Test]) -> EngineConfig {
    let most = lengths.iter().map(|length| match length {
        DraftTokens::Fixed(tokens) => *tokens,
        DraftTokens::Auto | DraftTokens::Off => POSITIONS,
    });
    let requests = || tests.iter().flat_map(|test| &test.requests);
    let longest = requests().map(|r| r.prompt.len()).max().unwrap_or(1);
    let tokens = requests().map(|r| r.max_tokens).max().unwrap_or(1);
    generate::config(subject.spec(), longest, tokens, most.max().unwrap_or(POSITIONS))
}

/// Everything that takes turns.
struct Sweep {
    pair: Pair,
    /// Plain decoding and all lengths, as they are before a prompt.
    ways: Vec<Length>,
    /// Requests that went all ways so far.
    turns: usize,
}

impl Sweep {
    fn new(pair: Pair, lengths: &[DraftTokens]) -> Self {
        let lengths = lengths.iter().map(|length| match length {
            DraftTokens::Fixed(tokens) => Length::Fixed(*tokens),
            DraftTokens::Auto | DraftTokens::Off => {
                Length::Auto(Box::new(Policy::new(pair.costs.clone(), POSITIONS)))
            }
        });
        let ways = std::iter::once(Length::Fixed(0)).chain(lengths).collect();
        Self { pair, ways, turns: 0 }
    }

    /// Rounds that nobody disturbed, after one to warm up.
    fn measure(&mut self, test: &Test, args: &BenchArgs) -> anyhow::Result<Kept<Vec<Tally>>> {
        let same_text = args.sweep.acceptance.is_none();
        self.round(test, same_text)?;
        stats::repeat(args.repetitions, args.measuring.max_foreign / 100.0, || {
            let (value, foreign) = machine::listen(|| self.round(test, same_text));
            Ok(Repetition { value: value?, foreign })
        })
    }

    /// All prompts all ways: a tally of each way.
    fn round(&mut self, test: &Test, same_text: bool) -> anyhow::Result<Vec<Tally>> {
        let ways = self.ways.len();
        let mut tallies = vec![Tally::default(); ways];
        for (i, request) in test.requests.iter().enumerate() {
            let mut request = request.clone();
            // Other coins in every round, the same for all ways.
            request.sampling.seed = self.turns as u64;
            let mut texts = vec![vec![]; ways];
            let first = self.turns;
            for way in (0..ways).map(|k| (first + k) % ways) {
                let (text, tally) = self.one(way, request.clone())?;
                texts[way] = text;
                tallies[way] += &tally;
            }
            self.turns += 1;
            compare(i, &texts, same_text)?;
        }
        Ok(tallies)
    }

    /// Continues a prompt one way: its text, and what that took.
    fn one(&mut self, way: usize, request: Request) -> anyhow::Result<(Vec<TokenId>, Tally)> {
        let Pair { engine, clock, .. } = &mut self.pair;
        engine.replace_length(self.ways[way].clone());
        let (mut ids, mut corrected, mut timings) = (vec![], 0, Timings::default());
        let mut take = |token, source| {
            if ids.is_empty() {
                // The prompt's steps gave this token; those after it count.
                clock.take();
            }
            ids.push(token);
            corrected += u64::from(source == TokenSource::Corrected);
            Ok(false)
        };
        let ending = generate::drive(engine, request, &mut timings, &mut take)?;
        Ok((ids, Tally::of(&timings, &ending, corrected, clock.take())))
    }
}

/// Refuses texts of prompt `i` of other lengths than the first, or where `same_text` others at all.
fn compare(i: usize, texts: &[Vec<TokenId>], same_text: bool) -> anyhow::Result<()> {
    for text in texts {
        let same = if same_text { *text == texts[0] } else { text.len() == texts[0].len() };
        if let (false, Some(difference)) = (same, first_difference(&texts[0], text)) {
            let found = anyhow!("the draft changed the text of prompt {}: {difference}", i + 1);
            return Err(found.context(Unexpected));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "mod_tests.rs"]
mod tests;
