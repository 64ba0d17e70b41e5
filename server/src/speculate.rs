//! From the words about guessing ahead to a draft beside the verifier, and what it achieved.
//!
//! Input: [`SpeculationArgs`] and the opened verifier. Output: [`engine::speculation::Speculation`]
//! over runners of the verifier's own backend, so that both share its threads. Not here: how
//! drafting works (`engine::speculation`), what can be typed ([`crate::cli`]).

use crate::Io;
use crate::cli::{
    DeviceArgs, DraftName, DraftTokens, HeadName, ModelName, RuleName, SpeculationArgs,
};
use crate::costs::{self, DraftSubject, Subject};
use crate::generate::Ending;
use crate::{load, run};
use anyhow::{Context, bail};
use engine::engine::EngineConfig;
use engine::model::Model;
use engine::sampler::SamplingParams;
use engine::speculation::policy::POSITIONS;
use engine::speculation::vocab::VocabMap;
use engine::speculation::{DraftModel, Drafter, Length, LookupRule, Policy, Rule, Speculation};
use kernels::{Backend, Runner, StepLimits};
use serde_json::{Value, json};

/// A draft that was chosen and opened; nothing of it is loaded yet.
#[derive(Debug)]
pub(crate) struct Draft {
    name: DraftName,
    source: Source,
    /// Tokens of every cycle; none is as many as pay.
    fixed: Option<usize>,
    rule: Rule,
    device: DeviceArgs,
}

/// Where its proposals come from.
#[derive(Debug)]
enum Source {
    Lookup,
    Model(Box<Opened>),
    Cascade(Box<Opened>),
}

/// A draft model, and how its tokens are the verifier's.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) model: Model,
    pub(crate) vocab: VocabMap,
}

impl Opened {
    /// Over `runner`, to be measured.
    pub(crate) fn subject<'a>(&'a self, runner: &'a mut dyn Runner) -> DraftSubject<'a> {
        let model = Subject { program: self.model.program(), runner };
        DraftSubject { model, same_ids: self.vocab.is_identity() }
    }

    fn over(&self, runner: Box<dyn Runner>, limits: &StepLimits) -> DraftModel {
        DraftModel::new(runner, limits, self.vocab.clone(), self.model.spec().context_len)
    }
}

impl Draft {
    /// The draft that `args` ask for. The demo verifier brings its own where no model is named.
    pub(crate) fn open(
        args: &SpeculationArgs,
        verifier: &Model,
        model_is_named: bool,
        device: &DeviceArgs,
    ) -> anyhow::Result<Option<Self>> {
        let Some(name) = chosen(args, model_is_named)? else { return Ok(None) };
        let fixed = match args.draft_tokens {
            Some(DraftTokens::Off) => return Ok(None),
            Some(DraftTokens::Fixed(tokens)) => Some(tokens),
            Some(DraftTokens::Auto) | None => None,
        };
        let rule = match args.acceptance_rule {
            None | Some(RuleName::Coupled) => Rule::Coupled,
            Some(RuleName::Rejection) => Rule::Rejection,
        };
        let source = match &name {
            DraftName::Off => return Ok(None),
            DraftName::Lookup => Source::Lookup,
            DraftName::Model(name) => Source::Model(Box::new(open(name, verifier, device)?)),
            DraftName::Cascade(name) => Source::Cascade(Box::new(open(name, verifier, device)?)),
        };
        Ok(Some(Self { name, source, fixed, rule, device: *device }))
    }

    /// Makes it propose so many tokens in every cycle.
    pub(crate) fn fix(&mut self, tokens: usize) {
        self.fixed = Some(tokens);
    }

    /// What it is called.
    pub(crate) fn name(&self) -> String {
        self.name.to_string()
    }

    /// The draft model, if it is one.
    pub(crate) fn model(&self) -> Option<&Model> {
        self.opened().map(|opened| &opened.model)
    }

    fn opened(&self) -> Option<&Opened> {
        match &self.source {
            Source::Lookup => None,
            Source::Model(opened) | Source::Cascade(opened) => Some(opened),
        }
    }

    /// The draft model over `runner`, to be measured.
    pub(crate) fn subject<'a>(&'a self, runner: &'a mut dyn Runner) -> Option<DraftSubject<'a>> {
        self.opened().map(|opened| opened.subject(runner))
    }

    /// Most tokens it proposes in a cycle.
    pub(crate) fn max_drafted(&self) -> usize {
        self.fixed.unwrap_or(POSITIONS)
    }

    /// Whether the text must be the one that the verifier writes alone.
    pub(crate) fn keeps_the_text(&self, sampling: &SamplingParams) -> bool {
        match self.rule {
            Rule::Coupled => true,
            Rule::Rejection => sampling.temperature == 0.0,
            Rule::Simulated(_) => false,
        }
    }

    fn rule_name(&self) -> &'static str {
        match self.rule {
            Rule::Coupled => "coupled",
            Rule::Rejection => "rejection",
            Rule::Simulated(_) => "simulated",
        }
    }

    /// Weight bytes that drafting a token reads; none where that differs from token to token.
    pub(crate) fn bytes_per_token(&self) -> Option<usize> {
        match &self.source {
            Source::Lookup => Some(0),
            Source::Model(opened) => Some(opened.model.program().bytes_per_token()),
            Source::Cascade(_) => None,
        }
    }

    /// Loads it for an engine of `config` over `verifier`, which has no request yet: its costs are
    /// measured where the length depends on them.
    pub(crate) fn build(
        &self,
        verifier: Subject<'_>,
        config: &EngineConfig,
        backend: &dyn Backend,
        io: &mut Io<'_>,
    ) -> anyhow::Result<Speculation> {
        let mut runner = self.load(config, backend, io)?;
        let length = match self.fixed {
            Some(tokens) => Length::Fixed(tokens),
            None => {
                let draft = runner.as_deref_mut().and_then(|runner| self.subject(runner));
                let costs = costs::costs(verifier, draft, config, &self.device, |reason| {
                    // Nothing is lost but the time to measure again.
                    let _ = writeln!(io.err, "foretoken: measured costs are not kept: {reason}");
                })?;
                Length::Auto(Box::new(Policy::new(costs, config.max_drafted)))
            }
        };
        let drafter = self.drafter(runner, &config.draft_limits());
        Ok(Speculation { drafter, length, rule: self.rule })
    }

    /// Loads the draft model for an engine of `config`, if it is one.
    pub(crate) fn load(
        &self,
        config: &EngineConfig,
        backend: &dyn Backend,
        io: &Io<'_>,
    ) -> anyhow::Result<Option<Box<dyn Runner>>> {
        let limits = config.draft_limits();
        let runner = self.model().map(|model| load::build(model, backend, &limits, io)).transpose();
        runner.with_context(|| format!("cannot load the draft {}", self.name))
    }

    /// The drafter over what [`Draft::load`] loaded, which was built for `limits`.
    pub(crate) fn drafter(&self, runner: Option<Box<dyn Runner>>, limits: &StepLimits) -> Drafter {
        match (&self.source, runner) {
            (Source::Model(opened), Some(runner)) => Drafter::Model(opened.over(runner, limits)),
            (Source::Cascade(opened), Some(runner)) => {
                Drafter::Cascade(LookupRule::BEFORE_A_MODEL, opened.over(runner, limits))
            }
            _ => Drafter::Lookup(LookupRule::ALONE),
        }
    }

    /// What it achieved, for a program.
    pub(crate) fn json(&self, ending: &Ending) -> Value {
        let counts = &ending.counts;
        json!({
            "draft": self.name(),
            "draft_tokens": self.fixed.map_or_else(|| json!("auto"), |tokens| json!(tokens)),
            "rule": self.rule_name(),
            "drafted_tokens": counts.drafted_tokens,
            "accepted_tokens": counts.accepted_tokens,
            "cycles": counts.cycles,
            "acceptance": ending.acceptance(),
            "tokens_per_cycle": ending.tokens_per_cycle(),
            "break_even_acceptance": ending.verdict.and_then(|v| v.break_even),
            "measured_acceptance": ending.verdict.and_then(|v| v.measured),
            "expected_speedup": ending.verdict.and_then(|v| v.expected_speedup),
        })
    }

    /// The same for a person.
    pub(crate) fn line(&self, ending: &Ending) -> String {
        let name = &self.name;
        let verdict = ending.verdict.map_or(String::new(), |verdict| format!(" | {verdict}"));
        match (ending.acceptance(), ending.tokens_per_cycle()) {
            (Some(acceptance), Some(tokens)) => format!(
                "draft {name}: {:.0} % of {} tokens accepted, {tokens:.2} tokens a cycle{verdict}",
                acceptance * 1e2,
                ending.counts.drafted_tokens,
            ),
            _ => format!("draft {name}: nothing drafted{verdict}"),
        }
    }
}

/// Opens a draft model whose vocabulary fits the verifier's.
pub(crate) fn open(
    name: &ModelName,
    verifier: &Model,
    device: &DeviceArgs,
) -> anyhow::Result<Opened> {
    let head = load::head(device.head.unwrap_or(HeadName::Auto), device.device);
    match name {
        ModelName::Named(name) => {
            let model = load::open(name, head).context("cannot open the draft")?;
            let vocab = vocabulary(name, &model, verifier)?;
            Ok(Opened { model, vocab })
        }
        ModelName::OfItself(draft) => {
            let model = Model::open_with(verifier.files().clone(), &draft.options(head))
                .with_context(|| format!("cannot open the draft {name}"))?;
            let vocab = VocabMap::same(verifier.spec().vocab, model.spec().vocab);
            Ok(Opened { model, vocab })
        }
    }
}

/// How the draft's tokens are the verifier's, by the tokenizers of both.
fn vocabulary(name: &str, draft: &Model, verifier: &Model) -> anyhow::Result<VocabMap> {
    let [found, expected] = [draft, verifier].map(|model| model.spec().vocab);
    let [drafts, verifiers] = [draft, verifier].map(|model| run::tokenizer(model, true));
    match (drafts?, verifiers?) {
        (Some(drafts), Some(verifiers)) => {
            Ok(VocabMap::between(&verifiers, expected, &drafts, found)?)
        }
        (None, None) if found == expected => Ok(VocabMap::same(expected, found)),
        (None, None) => bail!(
            "the draft {name} has a vocabulary of {found} tokens, the verifier one of {expected}, and neither has a tokenizer to compare: choose a draft with the verifier's vocabulary"
        ),
        (None, Some(_)) | (Some(_), None) => bail!(
            "the vocabularies of the draft {name} and of the verifier cannot be compared, since only one of the two has a tokenizer: put tokenizer.json beside the other"
        ),
    }
}

/// Who is asked to draft; none where nobody is.
fn chosen(args: &SpeculationArgs, model_is_named: bool) -> anyhow::Result<Option<DraftName>> {
    match &args.draft {
        Some(name) => Ok(Some(name.clone())),
        None if !model_is_named => Ok(Some(demo_draft())),
        None if args.draft_tokens.is_some_and(|tokens| tokens != DraftTokens::Off) => {
            bail!("--draft-tokens needs a draft: name one by --draft")
        }
        None if args.acceptance_rule.is_some() => {
            bail!("--acceptance-rule needs a draft: name one by --draft")
        }
        None => Ok(None),
    }
}

fn demo_draft() -> DraftName {
    DraftName::Model(ModelName::Named("demo-draft".to_owned()))
}

impl Ending {
    /// Share of the drafted tokens that were accepted; none where nothing was drafted.
    pub(crate) fn acceptance(&self) -> Option<f64> {
        share(self.counts.accepted_tokens, self.counts.drafted_tokens)
    }

    /// Tokens that a step with drafted tokens gave on average, its own one included.
    pub(crate) fn tokens_per_cycle(&self) -> Option<f64> {
        share(self.cycle_tokens as u64, self.counts.cycles)
    }
}

fn share(part: u64, all: u64) -> Option<f64> {
    (all > 0).then(|| part as f64 / all as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(draft: Option<DraftName>, draft_tokens: Option<DraftTokens>) -> SpeculationArgs {
        SpeculationArgs { draft, draft_tokens, acceptance_rule: None }
    }

    #[test]
    fn only_an_unnamed_model_brings_its_draft() {
        let other = DraftName::Lookup;
        assert_eq!(chosen(&args(None, None), false).unwrap(), Some(demo_draft()));
        assert_eq!(chosen(&args(None, None), true).unwrap(), None);
        assert_eq!(chosen(&args(Some(other.clone()), None), false).unwrap(), Some(other));
        let off = Some(DraftName::Off);
        assert_eq!(chosen(&args(off.clone(), None), false).unwrap(), off);
    }

    #[test]
    fn a_length_without_a_draft_is_a_mistake() {
        let refused = chosen(&args(None, Some(DraftTokens::Fixed(3))), true).unwrap_err();
        assert!(refused.to_string().contains("--draft-tokens"), "{refused}");
        assert_eq!(chosen(&args(None, Some(DraftTokens::Off)), true).unwrap(), None);
    }
}
