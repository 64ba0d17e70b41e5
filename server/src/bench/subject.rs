//! What is measured: a model folder, or the sizes of a published model with made-up weights.
//!
//! Not here: measuring. Input: the words of the command line.

use super::machine;
use crate::cli::{DeviceName, ShapeFormat, SubjectArgs};
use crate::{demo, load};
use anyhow::bail;
use engine::families::shapes::{self, SHAPES};
use engine::model::{Head, Model};
use engine::spec::ModelSpec;
use engine::synthetic::{Formats, SyntheticModel};
use kernels::program::{Op, Program, WeightId};
use kernels::{StepLimits, WeightSource};
use quant::{Bits, FloatType, Format};

/// A model to measure.
#[derive(Debug)]
pub(crate) struct Subject {
    /// As it was typed.
    pub(crate) name: String,
    /// What it runs on.
    pub(crate) device: DeviceName,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Model(Box<Model>),
    Synthetic(Box<SyntheticModel>),
}

impl Subject {
    /// The model or shape that `args` name, as it runs on `device`.
    pub(crate) fn open(args: &SubjectArgs, device: DeviceName) -> anyhow::Result<Self> {
        let Some(name) = &args.shape else {
            let name = args.model.as_deref().unwrap_or("demo");
            let kind = Kind::Model(Box::new(load::open(name, load::head(args.head, device))?));
            return Ok(Self { name: name.to_owned(), device, kind });
        };
        let Some(shape) = shapes::find(name) else { bail!(unknown(name)) };
        Ok(Self::made_up(name, shape.spec()?, args, device))
    }

    /// A made-up draft for this verifier: the sizes called `name`, the verifier's vocabulary.
    pub(crate) fn draft(
        &self,
        name: &str,
        args: &SubjectArgs,
        device: DeviceName,
    ) -> anyhow::Result<Self> {
        let spec = match (shapes::find(name), demo::find(name)) {
            (Some(shape), _) => shape.spec()?,
            (None, Some(files)) => Model::open(files)?.spec().clone(),
            (None, None) => bail!(unknown(name)),
        };
        let spec = ModelSpec { vocab: self.spec().vocab, ..spec };
        Ok(Self::made_up(name, spec, args, device))
    }

    fn made_up(name: &str, spec: ModelSpec, args: &SubjectArgs, device: DeviceName) -> Self {
        let layers = layers(args.format);
        let formats = Formats { layers, head: head(load::head(args.head, device), layers) };
        let model = SyntheticModel::new(spec, formats);
        Self { name: name.to_owned(), device, kind: Kind::Synthetic(Box::new(model)) }
    }

    /// The model, if it is a real one.
    pub(crate) fn model(&self) -> Option<&Model> {
        match &self.kind {
            Kind::Model(model) => Some(model),
            Kind::Synthetic(_) => None,
        }
    }

    /// What the model is.
    pub(crate) fn spec(&self) -> &ModelSpec {
        match &self.kind {
            Kind::Model(model) => model.spec(),
            Kind::Synthetic(model) => model.spec(),
        }
    }

    /// What it computes.
    pub(crate) fn program(&self) -> &Program {
        match &self.kind {
            Kind::Model(model) => model.program(),
            Kind::Synthetic(model) => model.program(),
        }
    }

    /// Its weights.
    pub(crate) fn weights(&self) -> Box<dyn WeightSource + '_> {
        match &self.kind {
            Kind::Model(model) => Box::new(model.weights()),
            Kind::Synthetic(model) => Box::new(model.weights()),
        }
    }

    /// Elements of all weights; a head made from the embedding's matrix counts with it.
    pub(crate) fn parameters(&self) -> usize {
        let (spec, program) = (self.spec(), self.program());
        let all: usize = program.weights.iter().map(|w| w.shape[0] * w.shape[1]).sum();
        let embedded = |id: WeightId| {
            program.steps.iter().any(|s| matches!(s.op, Op::Embed { table, .. } if table == id))
        };
        let head = linears(program).last().map(|(id, _)| id);
        let twice = spec.tied_head && head.is_some_and(|id| !embedded(id));
        all - if twice { spec.vocab * spec.width } else { 0 }
    }

    /// Formats of the linears: the one of most bytes, and the head's where it is another.
    pub(crate) fn format(&self) -> String {
        let program = self.program();
        let linears: Vec<WeightId> = linears(program).map(|(id, _)| id).collect();
        let format = |id: &WeightId| program.weights[id.index()].format;
        let bytes = |format: Format| -> usize {
            let same = program.weights.iter().filter(|w| w.format == format);
            same.map(|w| w.format.bytes(w.shape)).sum()
        };
        let body = linears.split_last().map_or(&[][..], |(_, body)| body);
        let main = body.iter().map(format).max_by_key(|&f| bytes(f));
        match (main, linears.last().map(format)) {
            (Some(main), Some(head)) if main != head => format!("{main}, head {head}"),
            (main, head) => main.or(head).map_or_else(String::new, |f| f.to_string()),
        }
    }
}

/// Refuses runners of these programs that together would not fit into the memory that is free now. A
/// GPU does so itself, for its own memory.
pub(crate) fn check_memory(
    name: &str,
    device: DeviceName,
    runners: &[(&Program, StepLimits)],
) -> anyhow::Result<()> {
    let (DeviceName::Cpu | DeviceName::Reference) = device else { return Ok(()) };
    let Some(free) = machine::available_memory() else { return Ok(()) };
    let kv = runners.iter().map(|(program, limits)| {
        let positions = limits.blocks.saturating_mul(limits.block_len);
        positions.saturating_mul(2 * program.kv_elements_per_token())
    });
    let kv = kv.fold(0, usize::saturating_add);
    let weights: usize = runners.iter().map(|(program, _)| program.weight_bytes()).sum();
    let needed = weights.saturating_add(kv) as u64;
    if needed > free {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        bail!(
            "{name} needs {:.1} GB for weights and {:.1} GB for keys and values, {:.1} GB are free: \
             take a smaller shape, depth or batch",
            gb(weights as u64),
            gb(kv as u64),
            gb(free)
        );
    }
    Ok(())
}

fn unknown(name: &str) -> String {
    let known: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
    format!("no shape is called {name}: take one of {}", known.join(", "))
}

/// The weight of each linear with its step's number, in order.
pub(crate) fn linears(program: &Program) -> impl Iterator<Item = (WeightId, usize)> {
    program.steps.iter().enumerate().filter_map(|(i, step)| match step.op {
        Op::Linear { weight, .. } => Some((weight, i)),
        _ => None,
    })
}

fn grouped(bits: Bits, group: usize) -> Format {
    Format::Grouped { bits, group, act_order: false }
}

fn layers(format: ShapeFormat) -> Format {
    match format {
        ShapeFormat::GptqG128 => grouped(Bits::Four, 128),
        ShapeFormat::GptqG64 => grouped(Bits::Four, 64),
        ShapeFormat::GptqG32 => grouped(Bits::Four, 32),
        ShapeFormat::F16 => Format::Dense(FloatType::F16),
    }
}

/// The format of a shape's head; none is its own, floats.
fn head(head: Head, layers: Format) -> Option<Format> {
    let int8 = match head {
        Head::Keep => false,
        Head::Int8 => true,
        Head::Auto => matches!(layers, Format::Grouped { .. }),
    };
    int8.then(|| grouped(Bits::Eight, 128))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::HeadName;

    fn shape(name: &str, head: HeadName) -> Subject {
        let (shape, format) = (Some(name.to_owned()), ShapeFormat::GptqG128);
        Subject::open(&SubjectArgs { model: None, shape, format, head }, DeviceName::Cpu).unwrap()
    }

    #[test]
    fn parameters_are_those_that_publishers_count() {
        for head in [HeadName::Keep, HeadName::Int8] {
            assert_eq!(shape("tinyllama-1.1b", head).parameters(), 1_100_048_384);
            assert_eq!(shape("llama-3.2-1b", head).parameters(), 1_235_814_400, "a tied head");
        }
    }

    #[test]
    fn formats_name_the_head_where_it_differs() {
        assert_eq!(shape("qwen2.5-0.5b", HeadName::Int8).format(), "w4g128, head w8g128");
        assert_eq!(shape("qwen2.5-0.5b", HeadName::Keep).format(), "w4g128, head f16");
        let demo = SubjectArgs {
            model: None,
            shape: None,
            format: ShapeFormat::GptqG128,
            head: HeadName::Int8,
        };
        assert!(Subject::open(&demo, DeviceName::Cpu).unwrap().format().starts_with("w4g128"));
    }

    #[test]
    fn what_cannot_fit_is_refused_before_it_is_made() {
        if machine::available_memory().is_none() {
            println!("skipped: this system does not tell its free memory");
            return;
        }
        let limits = StepLimits {
            tokens: 1,
            sequences: 1,
            outputs: 1,
            blocks: 1 << 30,
            block_len: 1 << 10,
            context_len: 1 << 20,
            trace: false,
        };
        let check = |name, device, limits| {
            let subject = shape(name, HeadName::Keep);
            check_memory(name, device, &[(subject.program(), limits)])
        };
        let refused = check("tinyllama-1.1b", DeviceName::Cpu, limits).unwrap_err().to_string();
        assert!(refused.contains("keys and values"), "{refused}");
        let small = StepLimits { blocks: 1, ..limits };
        assert!(check("smollm2-135m", DeviceName::Cpu, small).is_ok());
        assert!(check("tinyllama-1.1b", DeviceName::Cuda(0), limits).is_ok(), "the GPU's to say");
    }
}
