//! The CUDA backend: a program as launches of kernels that are compiled when they are needed.
//!
//! ```text
//! build   estimate (does it fit?) -> store (weights, as tiles) -> plan (launches) -> runner
//! step    runner -> one write of the step's arrays -> launches -> one read of the logits
//! device  gpu (the contract), driver (a real one); tests run the same launches on a processor
//! kernels places -> nvrtc (the compiler, opened at run time) -> cache -> driver
//! ```
//! A row's result is the same bits whatever the other rows of the step. Quantized linears give the bits
//! of the CPU backend; everything else is f32, the KV cache f16. The kernels' text is in crate
//! `shaders`.
//!
//! Not here: families of models, other GPUs. Start at [`plan`], then `shaders/cuda`.

mod api;
mod arch;
mod cache;
#[cfg(test)]
mod dense_tests;
mod devices;
mod driver;
#[cfg(test)]
mod emulated;
mod estimate;
pub mod gpu;
mod inputs;
mod library;
mod measure;
mod nvrtc;
mod places;
mod plan;
mod runner;
mod store;
mod tiles;

pub use arch::Arch;
pub use devices::{DeviceInfo, devices};
pub use estimate::{memory, tokens_that_fit};
pub use nvrtc::Nvrtc;
pub use places::{Places, VARIABLE};

use crate::{Backend, Error, Program, Runner, StepLimits, WeightSource, validate};
use driver::Driver;
use gpu::Gpu;
use quant::{FloatType, Format};
use runner::CudaRunner;
use std::path::PathBuf;

/// What the backend takes from its surroundings.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the compiler may lie.
    pub nvrtc: Places,
    /// Folder for compiled kernels; none keeps nothing.
    pub cache: Option<PathBuf>,
    /// Gets what a user may want to know and is no error, such as a folder that cannot be written.
    pub say: fn(&str),
}

/// Bytes that are read to measure bandwidth: several times what the largest caches hold.
const MEASURED_BYTES: usize = 1 << 30;

/// Opens the device; each runner has memory and a queue of its own.
type Open = dyn Fn() -> Result<Box<dyn Gpu>, Error> + Send;

/// Runs programs on an NVIDIA GPU.
pub struct CudaBackend {
    open: Box<Open>,
}

impl std::fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaBackend").finish_non_exhaustive()
    }
}

impl CudaBackend {
    /// Device `index` of this machine, opened for each runner that is built.
    pub fn new(index: usize, options: Options) -> Self {
        Self::on(move || Ok(Box::new(Driver::open(index, &options)?)))
    }

    /// Bytes per second that the device reads from its memory, measured now in a fraction of a second.
    ///
    /// # Errors
    /// [`Error::Device`]: the device cannot be opened, or fails.
    pub fn read_bandwidth(&self) -> Result<f64, Error> {
        measure::read_bandwidth((self.open)()?.as_mut(), MEASURED_BYTES)
    }

    /// Operations per second on 8-bit integers, measured now in a fraction of a second.
    ///
    /// # Errors
    /// [`Error::Device`]: the device cannot be opened, or fails.
    pub fn int8_peak(&self) -> Result<f64, Error> {
        measure::int8_peak((self.open)()?.as_mut())
    }

    /// Whatever `open` gives, opened for each runner that is built.
    pub fn on(open: impl Fn() -> Result<Box<dyn Gpu>, Error> + Send + 'static) -> Self {
        Self { open: Box::new(open) }
    }

    /// The same kernels and launches on a processor.
    #[cfg(test)]
    pub(crate) fn emulated(options: emulator::Options) -> Self {
        Self::on(move || Ok(Box::new(emulated::Emulated::new(options)?)))
    }

    /// The same on a device of so many multiprocessors: few, and most linears have the kernels for many rows;
    /// very many, and none has.
    #[cfg(test)]
    pub(crate) fn emulated_on(multiprocessors: usize, options: emulator::Options) -> Self {
        Self::on(move || {
            let mut device = emulated::Emulated::new(options)?;
            device.multiprocessors = multiprocessors;
            Ok(Box::new(device))
        })
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn kernel_for(&self, format: Format) -> String {
        match format {
            Format::Dense(FloatType::F32) => {
                "f32 cuda: a warp a column, f32 activations".to_owned()
            }
            Format::Dense(float) => {
                format!("{float} cuda: tensor cores, activations in two parts of {float}")
            }
            Format::Grouped { bits, act_order, .. } => {
                let (bits, gathered) = (bits.count(), if act_order { ", gathered" } else { "" });
                format!("w{bits}a8 cuda: 16-row tiles on tensor cores{gathered}")
            }
        }
    }

    fn build(
        &self,
        program: &Program,
        weights: &dyn WeightSource,
        limits: &StepLimits,
    ) -> Result<Box<dyn Runner>, Error> {
        validate::program(program)?;
        validate::limits(limits)?;
        let runner = CudaRunner::new((self.open)()?, program, weights, limits)?;
        Ok(Box::new(runner))
    }
}
