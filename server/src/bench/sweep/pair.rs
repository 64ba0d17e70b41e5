//! A verifier and its draft in one engine, with a clock around both and their costs.
//!
//! Input: the words of the command line. Not here: rounds and rows ([`super`]).

use super::clocked::{Clock, Role};
use crate::bench::subject::{self, Subject};
use crate::cli::{BenchArgs, DeviceArgs, SpeculationArgs};
use crate::costs::{self, DraftSubject};
use crate::speculate::Draft;
use crate::{Io, load};
use anyhow::{Context, bail};
use engine::engine::{Engine, EngineConfig};
use engine::speculation::vocab::VocabMap;
use engine::speculation::{Costs, DraftModel, Drafter, Length, Rule, Speculation};
use kernels::program::Program;
use kernels::{Backend, Runner, StepLimits};

/// Who drafts: a draft as `run` has it, or one of made-up weights.
#[derive(Debug)]
pub(super) enum Drafting {
    Real(Box<Draft>),
    MadeUp(Box<Subject>),
}

impl Drafting {
    /// The draft that `args` name for `verifier`.
    pub(super) fn open(
        args: &BenchArgs,
        verifier: &Subject,
        device: &DeviceArgs,
    ) -> anyhow::Result<Self> {
        if let Some(name) = &args.sweep.draft_shape {
            let draft = verifier.draft(name, &args.subject, device.device)?;
            return Ok(Self::MadeUp(Box::new(draft)));
        }
        let model = verifier.model().context("a shape has no draft but --draft-shape")?;
        let draft = args.sweep.draft.clone();
        let words = SpeculationArgs { draft, draft_tokens: None, acceptance_rule: None };
        match Draft::open(&words, model, true, device)? {
            Some(draft) => Ok(Self::Real(Box::new(draft))),
            None => bail!("--draft off drafts nothing: name a draft, or leave --draft out"),
        }
    }

    pub(super) fn name(&self) -> String {
        match self {
            Self::Real(draft) => draft.name(),
            Self::MadeUp(subject) => subject.name.clone(),
        }
    }

    /// What the draft model computes; none if it is no model.
    pub(super) fn program(&self) -> Option<&Program> {
        match self {
            Self::Real(draft) => draft.model().map(|model| model.program()),
            Self::MadeUp(subject) => Some(subject.program()),
        }
    }

    fn load(
        &self,
        config: &EngineConfig,
        backend: &dyn Backend,
        io: &Io<'_>,
    ) -> anyhow::Result<Option<Box<dyn Runner>>> {
        match self {
            Self::Real(draft) => draft.load(config, backend, io),
            Self::MadeUp(subject) => build(subject, &config.draft_limits(), backend, io).map(Some),
        }
    }

    /// The draft model over `runner`, to be measured; none if it is no model.
    fn subject<'a>(
        &'a self,
        runner: &'a mut dyn Runner,
        verifier_vocab: usize,
    ) -> Option<DraftSubject<'a>> {
        match self {
            Self::Real(draft) => draft.subject(runner),
            Self::MadeUp(subject) => {
                let vocab = VocabMap::same(verifier_vocab, subject.spec().vocab);
                let model = costs::Subject { program: subject.program(), runner };
                Some(DraftSubject { model, same_ids: vocab.is_identity() })
            }
        }
    }

    fn drafter(
        &self,
        runner: Option<Box<dyn Runner>>,
        limits: &StepLimits,
        verifier_vocab: usize,
    ) -> anyhow::Result<Drafter> {
        match self {
            Self::Real(draft) => Ok(draft.drafter(runner, limits)),
            Self::MadeUp(subject) => {
                let runner = runner.context("a made-up draft is a model")?;
                let vocab = VocabMap::same(verifier_vocab, subject.spec().vocab);
                let context_len = subject.spec().context_len;
                Ok(Drafter::Model(DraftModel::new(runner, limits, vocab, context_len)))
            }
        }
    }
}

/// The engine, the clock of its runners, and what their steps cost.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) engine: Engine,
    pub(super) clock: Clock,
    pub(super) costs: Costs,
}

impl Pair {
    /// Loads both and measures their costs; the engine proposes nothing yet.
    pub(super) fn load(
        verifier: &Subject,
        drafting: &Drafting,
        config: EngineConfig,
        rule: Rule,
        backend: &dyn Backend,
        io: &Io<'_>,
    ) -> anyhow::Result<Self> {
        check_memory(verifier, drafting, &config)?;
        let mut runner = build(verifier, &config.step_limits(), backend, io)?;
        let mut draft = drafting.load(&config, backend, io)?;
        let drafts = draft.as_deref_mut().and_then(|runner| drafting.subject(runner, config.vocab));
        let subject = costs::Subject { program: verifier.program(), runner: runner.as_mut() };
        let costs = costs::measure(subject, drafts, &config)?;
        let clock = Clock::default();
        let draft = draft.map(|draft| clock.around(draft, Role::Draft));
        let drafter = drafting.drafter(draft, &config.draft_limits(), config.vocab)?;
        let engine = Engine::new(clock.around(runner, Role::Verifier), config);
        let speculation = Speculation { drafter, length: Length::Fixed(0), rule };
        Ok(Self { engine: engine.with_speculation(speculation), clock, costs })
    }
}

fn build(
    subject: &Subject,
    limits: &StepLimits,
    backend: &dyn Backend,
    io: &Io<'_>,
) -> anyhow::Result<Box<dyn Runner>> {
    load::build_program(subject.program(), subject.weights().as_ref(), backend, limits, io)
}

fn check_memory(
    verifier: &Subject,
    drafting: &Drafting,
    config: &EngineConfig,
) -> anyhow::Result<()> {
    let mut runners = vec![(verifier.program(), config.step_limits())];
    runners.extend(drafting.program().map(|program| (program, config.draft_limits())));
    let name = format!("{} with the draft {}", verifier.name, drafting.name());
    subject::check_memory(&name, verifier.device, &runners)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::machine;
    use crate::cli::{DeviceName, HeadName, ShapeFormat, SubjectArgs};
    use crate::generate;

    fn made_up(name: &str, draft: &str) -> (Subject, Drafting) {
        let (shape, format) = (Some(name.to_owned()), ShapeFormat::GptqG128);
        let args = SubjectArgs { model: None, shape, format, head: HeadName::Auto };
        let verifier = Subject::open(&args, DeviceName::Cpu).unwrap();
        let draft = verifier.draft(draft, &args, DeviceName::Cpu).unwrap();
        (verifier, Drafting::MadeUp(Box::new(draft)))
    }

    #[test]
    fn a_made_up_draft_speaks_the_verifiers_tokens() {
        let (verifier, drafting) = made_up("smollm2-135m", "demo-draft");
        let Drafting::MadeUp(draft) = &drafting else { panic!("{drafting:?}") };
        assert_eq!(draft.spec().vocab, verifier.spec().vocab);
        let weights = drafting.program().unwrap().weight_bytes();
        assert!(weights > 0 && weights < verifier.program().weight_bytes() / 2, "{weights}");
        let args = SubjectArgs {
            model: None,
            shape: Some("smollm2-135m".to_owned()),
            format: ShapeFormat::F16,
            head: HeadName::Auto,
        };
        let refused = verifier.draft("gpt-9", &args, DeviceName::Cpu).unwrap_err().to_string();
        assert!(refused.contains("gpt-9") && refused.contains("tinyllama-1.1b"), "{refused}");
    }

    #[test]
    fn a_pair_that_cannot_fit_is_refused_before_it_is_made() {
        if machine::available_memory().is_none() {
            println!("skipped: this system does not tell its free memory");
            return;
        }
        let (verifier, drafting) = made_up("smollm2-135m", "demo-draft");
        let config = generate::config(verifier.spec(), 64, 64, 4);
        assert!(check_memory(&verifier, &drafting, &config).is_ok());
        let config = EngineConfig { blocks: 1 << 40, ..config };
        let refused = check_memory(&verifier, &drafting, &config).unwrap_err().to_string();
        assert!(refused.starts_with("smollm2-135m with the draft demo-draft needs"), "{refused}");
    }
}
