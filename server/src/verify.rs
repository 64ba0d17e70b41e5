//! `foretoken verify`: prompts with and without a draft, token by token, and a certificate.
//!
//! Input: a model, a draft and prompts. The logits shown where texts diverge are those that were
//! used, recorded around the verifier's runner. Not here: what is printed ([`certificate`]), which
//! prompts ([`prompts`]).

pub(crate) mod certificate;
pub(crate) mod prompts;
mod rows;

use crate::Io;
use crate::cli::{HeadName, VerifyArgs};
use crate::costs::Subject;
use crate::generate::{self, Ending};
use crate::load::{self, Unexpected};
use crate::run;
use crate::speculate::Draft;
use crate::speed::Timings;
use anyhow::{Context, anyhow, bail};
use certificate::Certificate;
use engine::engine::{Engine, EngineConfig};
use engine::model::Model;
use engine::request::{FinishReason, Request};
use engine::speculation::SpeculationCounts;
use kernels::Backend;
use kernels::program::TokenId;
use rows::{Recorder, Row, Rows};
use std::collections::BTreeMap;
use std::fmt;

/// Tokens drafted in a cycle where the caller leaves it open.
const DRAFTED: usize = 4;

/// Runs the command.
pub(crate) fn run(args: &VerifyArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let head = load::head(args.device.head.unwrap_or(HeadName::Auto), args.device.device);
    let model = load::open(args.model.as_deref().unwrap_or("demo"), head)?;
    let named = args.model.is_some();
    let mut draft = Draft::open(&args.speculation, &model, named, &args.device)?
        .context("verify compares with a draft: name one by --draft")?;
    if args.speculation.draft_tokens.is_none() {
        // Whether it pays is not the question here.
        draft.fix(DRAFTED);
    }
    if !draft.keeps_the_text(&run::sampling(&args.sampling)) {
        bail!(
            "this --acceptance-rule does not promise the same text at this temperature: verify with coupled, or at temperature 0"
        );
    }
    let prompts = prompts::prompts(args, &model)?;
    let requests = requests(args, &model, prompts)?;
    let backend = load::backend(&args.device)?;
    let both = both_ways(&model, &draft, &requests, backend.as_ref(), io)?;
    let certificate = Certificate { args, model: &model, draft: &draft, both: &both };
    certificate.print(&requests, backend.as_ref(), io)?;
    match both.divergence() {
        None => Ok(()),
        Some((prompt, difference)) => {
            let found =
                anyhow!("the draft changed the text of prompt {}: {difference}", prompt + 1);
            Err(found.context(Unexpected))
        }
    }
}

fn requests(
    args: &VerifyArgs,
    model: &Model,
    prompts: Vec<Vec<TokenId>>,
) -> anyhow::Result<Vec<Request>> {
    let sampling = run::sampling(&args.sampling);
    let config = generate::config(model.spec(), usize::MAX, args.max_tokens, 0);
    let request = |(i, prompt): (usize, Vec<TokenId>)| {
        let (max_tokens, sampling) = (args.max_tokens, sampling.clone());
        let stop_tokens = model.stop_tokens().to_vec();
        let request = Request { stop_tokens, sampling, ..Request::new(prompt, max_tokens) };
        config.check(&request).with_context(|| format!("prompt {}", i + 1))?;
        Ok(request)
    };
    prompts.into_iter().enumerate().map(request).collect()
}

/// What a prompt became.
struct Output {
    ids: Vec<TokenId>,
    reason: FinishReason,
    /// By the position of the token behind which they speak.
    rows: BTreeMap<u32, Row>,
}

/// All outputs, without and with the draft.
struct BothWays {
    plain: Vec<Output>,
    drafted: Vec<Output>,
    /// What the draft did for all prompts together; the reason is the last one's.
    ending: Ending,
}

/// Runs every request both ways on the same backend, one way after the other, so that one copy of
/// the verifier is in memory at a time.
fn both_ways(
    model: &Model,
    draft: &Draft,
    requests: &[Request],
    backend: &dyn Backend,
    io: &mut Io<'_>,
) -> anyhow::Result<BothWays> {
    let rows = Rows::default();
    let mut engine = |draft: Option<&Draft>| {
        let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(1);
        let max_tokens = requests.iter().map(|r| r.max_tokens).max().unwrap_or(1);
        let most = draft.map_or(0, Draft::max_drafted);
        let config = generate::config(model.spec(), longest, max_tokens, most);
        recorded(model, draft, config, backend, &rows, io)
    };
    let (plain, _) = outputs(&mut engine(None)?, requests, &rows)?;
    let (drafted, ending) = outputs(&mut engine(Some(draft))?, requests, &rows)?;
    Ok(BothWays { plain, drafted, ending })
}

/// An engine whose verifier leaves what it computes in `rows`.
fn recorded(
    model: &Model,
    draft: Option<&Draft>,
    config: EngineConfig,
    backend: &dyn Backend,
    rows: &Rows,
    io: &mut Io<'_>,
) -> anyhow::Result<Engine> {
    let mut runner = load::build(model, backend, &config.step_limits(), io)?;
    let verifier = Subject { program: model.program(), runner: runner.as_mut() };
    let speculation = draft.map(|d| d.build(verifier, &config, backend, io)).transpose()?;
    let engine = Engine::new(Box::new(Recorder::new(runner, config.vocab, rows)), config);
    Ok(match speculation {
        Some(speculation) => engine.with_speculation(speculation),
        None => engine,
    })
}

fn outputs(
    engine: &mut Engine,
    requests: &[Request],
    rows: &Rows,
) -> anyhow::Result<(Vec<Output>, Ending)> {
    let counts = SpeculationCounts::default();
    let mut all = Ending { reason: FinishReason::Length, counts, cycle_tokens: 0, verdict: None };
    let mut outputs = vec![];
    for request in requests {
        let (mut ids, mut timings) = (vec![], Timings::default());
        let mut take = |token, _| {
            ids.push(token);
            Ok(false)
        };
        let one = generate::drive(engine, request.clone(), &mut timings, &mut take)?;
        (all.reason, all.verdict) = (one.reason, one.verdict);
        all.cycle_tokens += one.cycle_tokens;
        all.counts.cycles += one.counts.cycles;
        all.counts.drafted_tokens += one.counts.drafted_tokens;
        all.counts.accepted_tokens += one.counts.accepted_tokens;
        outputs.push(Output { ids, reason: one.reason, rows: rows.take() });
    }
    Ok((outputs, all))
}

impl BothWays {
    /// The first prompt (from 0) whose outputs differ, and where.
    fn divergence(&self) -> Option<(usize, Difference)> {
        let mut pairs = self.plain.iter().zip(&self.drafted).enumerate();
        pairs.find_map(|(i, (plain, drafted))| {
            let ids = first_difference(&plain.ids, &drafted.ids);
            let end = || {
                let at = plain.ids.len();
                let differs = plain.reason != drafted.reason;
                differs.then_some(Difference { at, plain: None, drafted: None })
            };
            Some((i, ids.or_else(end)?))
        })
    }

    /// Tokens generated without the draft, each compared with the one generated with it.
    fn tokens(&self) -> usize {
        self.plain.iter().map(|output| output.ids.len()).sum()
    }

    /// How many of these were chosen from logits that are the same bits both ways.
    fn same_rows(&self, requests: &[Request]) -> usize {
        let outputs = requests.iter().zip(self.plain.iter().zip(&self.drafted));
        let same = outputs.map(|(request, (plain, drafted))| {
            let row = |output: &Output, i| output.rows.get(&position(request, i)).map(|r| r.bits);
            let range = 0..plain.ids.len();
            range.filter(|&i| row(plain, i).is_some() && row(plain, i) == row(drafted, i)).count()
        });
        same.sum()
    }
}

/// Position of the row from which the generated token `i` is chosen.
fn position(request: &Request, i: usize) -> u32 {
    (request.prompt.len() + i - 1) as u32
}

/// Where two outputs differ first; no token is the end of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Which generated token, from 0.
    pub at: usize,
    /// Without a draft.
    pub plain: Option<TokenId>,
    /// With it.
    pub drafted: Option<TokenId>,
}

/// The first difference of two outputs.
pub(crate) fn first_difference(plain: &[TokenId], drafted: &[TokenId]) -> Option<Difference> {
    let at = (0..plain.len().max(drafted.len())).find(|&i| plain.get(i) != drafted.get(i))?;
    Some(Difference { at, plain: plain.get(at).copied(), drafted: drafted.get(at).copied() })
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |token: Option<TokenId>| {
            token.map_or_else(|| "the end".to_owned(), |id| format!("token {}", id.0))
        };
        let [plain, drafted] = [self.plain, self.drafted].map(show);
        match (self.plain, self.drafted) {
            (None, None) => write!(f, "after {} equal tokens they end for other reasons", self.at),
            _ => write!(f, "generated token {} is {plain} without it, {drafted} with it", self.at),
        }
    }
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
