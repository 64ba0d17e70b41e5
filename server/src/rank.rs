//! `foretoken draft-rank`: which draft suits a model, and what each would gain, before any drafts.
//!
//! The target writes texts ([`texts`]), which it and each draft then read; their laws at every
//! token tell how often a draft would be right ([`score`], [`engine::speculation::rank`]), and
//! measured costs what that is worth. Not here: what is printed ([`output`]).

mod output;
mod score;
mod texts;

use crate::Io;
use crate::cli::{HeadName, RankArgs, RuleName};
use crate::costs::{self, Subject};
use crate::load;
use crate::run;
use crate::speculate::{self, Opened};
use anyhow::{Context, bail};
use engine::engine::EngineConfig;
use engine::kv::{BLOCK_LEN, PrefixCaching};
use engine::model::Model;
use engine::speculation::Costs;
use engine::speculation::policy::{POSITIONS, Source, Verdict};
use engine::speculation::rank::{Counted, Estimate, Estimates, Ranking, Report};
use engine::speculation::vocab::VocabMap;
use kernels::{Backend, Runner, StepLimits};
use output::{Findings, Refused};
use score::{Reader, score};
use texts::{Prompt, Text};

/// Tokens of a step, and so rows of logits that are in memory at once.
const CHUNK: usize = 64;
/// Positions that there is always room for, so that costs are measured at their usual depth.
const LEAST_POSITIONS: usize = 256;

/// Runs the command.
pub(crate) fn run(args: &RankArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let head = load::head(args.device.head.unwrap_or(HeadName::Auto), args.device.device);
    let model = load::open(&args.target, head)?;
    let prompts = texts::prompts(args, &model, &run::sampling(&args.sampling))?;
    let backend = load::backend(&args.device)?;
    let opened = args.drafts.iter().map(|name| speculate::open(name, &model, &args.device));
    let opened: Vec<anyhow::Result<Opened>> = opened.collect();
    let mut findings = Findings::default();
    let mut target = None;
    if opened.iter().any(Result::is_ok) {
        let mut loaded = Target::load(args, &model, &prompts, backend.as_ref(), io)?;
        findings.texts = loaded.write(prompts, io)?;
        target = Some(loaded);
    }
    for (name, opened) in args.drafts.iter().zip(opened) {
        let draft = name.to_string();
        let ranked = match (opened, &mut target) {
            (Ok(opened), Some(target)) => target.rank(&draft, &opened, &findings.texts, io),
            (Err(e), _) => Err(e),
            (Ok(_), None) => continue,
        };
        match ranked {
            Ok(ranked) => findings.ranked.push(ranked),
            Err(e) if e.is::<load::Unexpected>() => return Err(e),
            Err(e) => findings.refused.push(Refused { draft, reason: format!("{e:#}") }),
        }
    }
    findings.sort(args.acceptance_rule);
    findings.print(args, backend.as_ref(), io)?;
    if findings.ranked.is_empty() {
        bail!("none of the drafts can be ranked; the reasons are listed with the results");
    }
    Ok(())
}

/// What is known of a draft.
struct Ranked {
    draft: String,
    report: Report,
    costs: Costs,
    coupled: Prediction,
    rejection: Prediction,
}

impl Ranked {
    fn new(draft: String, report: Report, costs: Costs) -> Self {
        let Estimates { coupled, rejection, counted, .. } = report.overall;
        let counted = counted.unwrap_or(Counted { rejection, coupled });
        let [coupled, rejection] =
            [counted.coupled, counted.rejection].map(|a| Prediction::new(&costs, a));
        Self { draft, report, costs, coupled, rejection }
    }

    fn prediction(&self, rule: RuleName) -> &Prediction {
        match rule {
            RuleName::Coupled => &self.coupled,
            RuleName::Rejection => &self.rejection,
        }
    }
}

/// What a rule of acceptance makes of a draft.
struct Prediction {
    /// As a run would count it.
    acceptance: Estimate,
    verdict: Verdict,
    /// The speed-ups at the ends of the acceptance's interval.
    interval: Option<[f64; 2]>,
}

impl Prediction {
    fn new(costs: &Costs, acceptance: Estimate) -> Self {
        let at = |a: f64| Verdict::new(costs, Source::Model, POSITIONS, Some(a.clamp(0.0, 1.0)));
        let end = |a: f64| at(a).expected_speedup.unwrap_or(1.0);
        let Estimate { mean, half_width, .. } = acceptance;
        let interval = half_width.map(|half| [end(mean - half), end(mean + half)]);
        Self { acceptance, verdict: at(mean), interval }
    }

    fn speedup(&self) -> f64 {
        self.verdict.expected_speedup.unwrap_or(1.0)
    }
}

/// The model that drafts are to guess for.
struct Target<'a> {
    args: &'a RankArgs,
    model: &'a Model,
    backend: &'a dyn Backend,
    config: EngineConfig,
    runner: Box<dyn Runner>,
}

impl<'a> Target<'a> {
    fn load(
        args: &'a RankArgs,
        model: &'a Model,
        prompts: &[Prompt],
        backend: &'a dyn Backend,
        io: &Io<'_>,
    ) -> anyhow::Result<Self> {
        let longest = prompts.iter().map(|p| p.ids.len()).max().unwrap_or(0);
        let positions = longest.saturating_add(args.generate as usize).max(LEAST_POSITIONS);
        let spec = model.spec();
        let config = EngineConfig {
            vocab: spec.vocab,
            context_len: spec.context_len,
            step_tokens: CHUNK,
            max_sequences: 1,
            blocks: positions.min(spec.context_len as usize).div_ceil(BLOCK_LEN),
            block_len: BLOCK_LEN,
            max_waiting: 0,
            max_drafted: POSITIONS,
            max_scored: 0,
            prefix_caching: PrefixCaching::Off,
        };
        let runner = load::build(model, backend, &limits(&config), io)?;
        Ok(Self { args, model, backend, config, runner })
    }

    /// Continues the prompts.
    fn write(&mut self, prompts: Vec<Prompt>, io: &mut Io<'_>) -> anyhow::Result<Vec<Text>> {
        let mut writer = texts::Writer {
            runner: self.runner.as_mut(),
            limits: limits(&self.config),
            most: self.args.generate as usize,
            context_len: self.config.context_len as usize,
            stop_tokens: self.model.stop_tokens(),
        };
        let count = prompts.len();
        let mut texts = Vec::with_capacity(count);
        for (i, prompt) in prompts.into_iter().enumerate() {
            progress(io, format_args!("{} writes text {} of {count}", self.args.target, i + 1));
            texts.push(writer.write(prompt)?);
        }
        Ok(texts)
    }

    /// Tries a draft on `texts`.
    ///
    /// # Errors
    /// [`load::Unexpected`] where it is not the draft's fault.
    fn rank(
        &mut self,
        name: &str,
        draft: &Opened,
        texts: &[Text],
        io: &mut Io<'_>,
    ) -> anyhow::Result<Ranked> {
        let limits = limits(&self.config);
        let mut runner =
            load::build(&draft.model, self.backend, &limits, io).context("it cannot be loaded")?;
        let verifier = Subject { program: self.model.program(), runner: self.runner.as_mut() };
        let subject = draft.subject(runner.as_mut());
        let costs =
            costs::costs(verifier, Some(subject), &self.config, &self.args.device, |reason| {
                // Nothing is lost but the time to measure again.
                let _ = writeln!(io.err, "foretoken: measured costs are not kept: {reason}");
            })?;
        let same = VocabMap::same(self.config.vocab, self.config.vocab);
        let mut target = Reader::new(self.runner.as_mut(), limits, same);
        let mut reader = Reader::new(runner.as_mut(), limits, draft.vocab.clone());
        let reach = draft.model.spec().context_len as usize;
        let mut ranking = Ranking::default();
        for (i, text) in texts.iter().enumerate() {
            progress(io, format_args!("{name} reads text {} of {}", i + 1, texts.len()));
            ranking.add(&text.category, &score(&mut target, &mut reader, text, reach)?);
        }
        let report = ranking
            .report()
            .context("the texts hold no token to predict within the draft's context")?;
        Ok(Ranked::new(name.to_owned(), report, costs))
    }
}

/// The limits of both runners: every row of a step may give logits.
fn limits(config: &EngineConfig) -> StepLimits {
    StepLimits { outputs: CHUNK, ..config.step_limits() }
}

/// A line that the next one replaces, for a person who waits.
fn progress(io: &mut Io<'_>, text: std::fmt::Arguments<'_>) {
    if io.err_is_terminal {
        // Progress that nobody sees is no loss.
        let _ = write!(io.err, "\r\x1b[2K{text}");
        let _ = io.err.flush();
    }
}
