//! One request at a time through an engine, with the time it took.
//!
//! Input: a model, perhaps a draft, and a request; output: tokens as they come, then why they
//! ended. Not here: text ([`crate::run`]), comparing ([`crate::verify`]), several requests at once.

use crate::Io;
use crate::costs::Subject;
use crate::load::{self, STEP_TOKENS, Unexpected};
use crate::speculate::Draft;
use crate::speed::Timings;
use anyhow::Context;
use engine::engine::{Engine, EngineConfig, Progress};
use engine::kv::{BLOCK_LEN, PrefixCaching};
use engine::model::Model;
use engine::request::{Event, FinishReason, Request, TokenSource};
use engine::spec::ModelSpec;
use engine::speculation::SpeculationCounts;
use engine::speculation::policy::{Source, Verdict};
use kernels::Backend;
use kernels::program::TokenId;
use std::time::Instant;

/// Sizes of an engine for one request at a time of at most so many tokens.
pub(crate) fn config(
    spec: &ModelSpec,
    prompt_tokens: usize,
    max_tokens: u32,
    max_drafted: usize,
) -> EngineConfig {
    let wanted = prompt_tokens.saturating_add(max_tokens as usize);
    let positions = wanted.min(spec.context_len as usize);
    EngineConfig {
        vocab: spec.vocab,
        context_len: spec.context_len,
        step_tokens: STEP_TOKENS.min(prompt_tokens).max(1 + max_drafted),
        max_sequences: 1,
        blocks: positions.div_ceil(BLOCK_LEN).max(1),
        block_len: BLOCK_LEN,
        max_waiting: 1,
        max_drafted,
        max_scored: 0,
        prefix_caching: PrefixCaching::Off,
    }
}

/// An engine on `backend`, guessing ahead if there is a draft.
pub(crate) fn engine(
    model: &Model,
    draft: Option<&Draft>,
    config: EngineConfig,
    backend: &dyn Backend,
    io: &mut Io<'_>,
) -> anyhow::Result<Engine> {
    let mut runner = load::build(model, backend, &config.step_limits(), io)?;
    let Some(draft) = draft else { return Ok(Engine::new(runner, config)) };
    let verifier = Subject { program: model.program(), runner: runner.as_mut() };
    let speculation = draft.build(verifier, &config, backend, io)?;
    Ok(Engine::new(runner, config).with_speculation(speculation))
}

/// How a request ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ending {
    pub reason: FinishReason,
    /// What guessing ahead did.
    pub counts: SpeculationCounts,
    /// Tokens that came of steps in which something was drafted.
    pub cycle_tokens: usize,
    /// What a draft model is worth, where its length is chosen.
    pub verdict: Option<Verdict>,
}

/// Takes a token and how it came about; true to end the request after it.
pub(crate) type Take<'a> = dyn FnMut(TokenId, TokenSource) -> anyhow::Result<bool> + 'a;

/// Steps `engine`, which must have no other request, until `request` ends. Tokens of a step that
/// lie behind the one at which `take` ends the request are as if they had never been.
pub(crate) fn drive(
    engine: &mut Engine,
    request: Request,
    timings: &mut Timings,
    take: &mut Take<'_>,
) -> anyhow::Result<Ending> {
    timings.prompt_tokens = request.prompt.len();
    let id = engine.submit(request)?;
    let (mut events, mut stopped, mut cycle_tokens) = (vec![], false, 0);
    loop {
        let start = Instant::now();
        let progress = engine.step(&mut events).context(Unexpected)?;
        count(timings, progress, start);
        for event in events.drain(..) {
            match event {
                Event::Prompt { .. } => {}
                Event::Token { .. } if stopped => timings.decode_tokens -= 1,
                Event::Token { token, source, .. } => {
                    cycle_tokens += usize::from(source != TokenSource::Plain);
                    stopped = take(token, source)?;
                    if stopped {
                        engine.cancel(id);
                    }
                }
                Event::Finished { reason, speculation: counts, .. } => {
                    timings.drafted_tokens = counts.drafted_tokens as usize;
                    let reason = if stopped { FinishReason::Stop } else { reason };
                    let verdict = engine.verdict(Source::Model);
                    return Ok(Ending { reason, counts, cycle_tokens, verdict });
                }
                // Behind the end: without a draft the failing row would not have been computed.
                Event::Failed { .. } if stopped => {
                    let (reason, counts) = (FinishReason::Stop, SpeculationCounts::default());
                    return Ok(Ending { reason, counts, cycle_tokens, verdict: None });
                }
                Event::Failed { reason, .. } => {
                    return Err(anyhow::anyhow!(reason).context(Unexpected));
                }
            }
        }
    }
}

fn count(timings: &mut Timings, progress: Progress, start: Instant) {
    match progress {
        Progress::Idle => {}
        Progress::Worked { prefill_tokens: 0, decode_tokens } => {
            timings.decode += start.elapsed();
            timings.decode_steps += 1;
            timings.decode_tokens += decode_tokens;
        }
        Progress::Worked { .. } => timings.prompt += start.elapsed(),
    }
}
