//! From the words on the command line to a model and a runner on a device.

use crate::cli::{DeviceArgs, DeviceName, HeadName, IsaName};
use crate::{Io, demo, environment};
use anyhow::{Context, anyhow, bail};
use engine::files::ModelFiles;
use engine::model::{Head, Model, ModelOptions};
use kernels::cpu::{CpuBackend, CpuOptions, Isa, available_threads};
use kernels::cuda::CudaBackend;
use kernels::program::{Program, WeightId};
use kernels::reference::ReferenceBackend;
use kernels::{Backend, Runner, StepLimits, WeightSource};
use quant::Weight;
use std::ops::Range;
use std::path::Path;

/// Marks a failure that is not the caller's mistake: the exit code is 1, not 2.
#[derive(Debug, thiserror::Error)]
#[error("failed while running")]
pub(crate) struct Unexpected;

/// Most prompt tokens computed in one step.
pub(crate) const STEP_TOKENS: usize = 512;

/// Models smaller than this load faster than a progress bar can be read.
const BAR_BYTES: usize = 256 << 20;

/// The files of the model called `name`: a folder or one of the built-in models.
pub(crate) fn find(name: &str) -> anyhow::Result<ModelFiles> {
    if let Some(files) = demo::find(name) {
        return Ok(files);
    }
    let path = Path::new(name);
    if path.is_dir() {
        return Ok(ModelFiles::Folder(path.to_owned()));
    }
    if path.is_file() {
        bail!("{name} is a file: name the folder that holds config.json and the safetensors");
    }
    bail!("no model folder at {name}: give a folder with config.json and safetensors, or `demo`");
}

/// Opens the model called `name`.
pub(crate) fn open(name: &str, head: Head) -> anyhow::Result<Model> {
    Ok(Model::open_with(find(name)?, &ModelOptions { head, ..ModelOptions::default() })?)
}

/// The format of the head that is asked for on a device.
pub(crate) fn head(choice: HeadName, device: DeviceName) -> Head {
    match (choice, device) {
        (HeadName::Keep, _) | (HeadName::Auto, DeviceName::Reference) => Head::Keep,
        (HeadName::Auto, DeviceName::Cpu | DeviceName::Cuda(_)) => Head::Auto,
        (HeadName::Int8, _) => Head::Int8,
    }
}

/// The backend that `args` ask for.
pub(crate) fn backend(args: &DeviceArgs) -> anyhow::Result<Box<dyn Backend>> {
    if args.device != DeviceName::Cpu && (args.threads.is_some() || args.cpu_isa.is_some()) {
        bail!("--threads and --cpu-isa belong to --device cpu; {} has neither", args.device);
    }
    match args.device {
        DeviceName::Reference => Ok(Box::new(ReferenceBackend)),
        DeviceName::Cuda(number) => Ok(Box::new(cuda(number))),
        DeviceName::Cpu => {
            if args.threads == Some(0) {
                bail!("--threads is 0: give at least one");
            }
            let isa = args.cpu_isa.map(isa);
            Ok(Box::new(CpuBackend::new(&CpuOptions { threads: args.threads, isa })?))
        }
    }
}

/// An NVIDIA GPU, by its number.
pub(crate) fn cuda(number: usize) -> CudaBackend {
    let options = kernels::cuda::Options {
        nvrtc: environment::cuda_compiler(),
        cache: environment::caches().map(|folder| folder.join("cuda")),
        say: |text| eprintln!("{text}"),
    };
    CudaBackend::new(number, options)
}

/// The instruction set called `name`.
pub(crate) fn isa(name: IsaName) -> Isa {
    match name {
        IsaName::Scalar => Isa::Scalar,
        IsaName::Avx2 => Isa::Avx2,
        IsaName::Avx512 => Isa::Avx512,
        IsaName::Amx => Isa::Amx,
    }
}

/// Threads that `args` give a run: one on devices that are not the processor.
pub(crate) fn threads(args: &DeviceArgs) -> usize {
    match (args.device, args.threads) {
        (DeviceName::Reference | DeviceName::Cuda(_), _) => 1,
        (DeviceName::Cpu, Some(threads)) => threads,
        (DeviceName::Cpu, None) => available_threads(),
    }
}

/// Builds a runner for `model`, with a progress bar for long loads at a terminal.
pub(crate) fn build(
    model: &Model,
    backend: &dyn Backend,
    limits: &StepLimits,
    io: &Io<'_>,
) -> anyhow::Result<Box<dyn Runner>> {
    build_program(model.program(), &model.weights(), backend, limits, io)
}

/// The same for any program and its weights.
pub(crate) fn build_program(
    program: &Program,
    weights: &dyn WeightSource,
    backend: &dyn Backend,
    limits: &StepLimits,
    io: &Io<'_>,
) -> anyhow::Result<Box<dyn Runner>> {
    if !io.err_is_terminal || program.weight_bytes() < BAR_BYTES {
        return Ok(backend.build(program, weights, limits)?);
    }
    let bar = indicatif::ProgressBar::new(program.weights.len() as u64).with_message("loading");
    bar.set_style(indicatif::ProgressStyle::with_template(
        "{msg} {wide_bar} {pos}/{len} tensors, {eta} left",
    )?);
    let counted = Counted { inner: weights, bar: &bar };
    let runner = backend.build(program, &counted, limits)?;
    bar.finish_and_clear();
    Ok(runner)
}

/// A weight source that moves a progress bar.
struct Counted<'a> {
    inner: &'a dyn WeightSource,
    bar: &'a indicatif::ProgressBar,
}

impl WeightSource for Counted<'_> {
    fn load(&self, id: WeightId, rows: Range<usize>) -> Result<Weight<'_>, kernels::Error> {
        self.inner.load(id, rows)
    }

    fn release(&self, id: WeightId) {
        self.bar.inc(1);
        self.inner.release(id);
    }
}

/// Reads a prompt from standard input, without its last line break.
pub(crate) fn prompt_from_input(io: &mut Io<'_>) -> anyhow::Result<String> {
    if io.input_is_terminal {
        return Err(anyhow!("no prompt: give one as an argument, by --ids, or on standard input"));
    }
    let mut text = String::new();
    io.input.read_to_string(&mut text).context("cannot read the prompt from standard input")?;
    Ok(text.strip_suffix('\n').map(str::to_owned).unwrap_or(text))
}
