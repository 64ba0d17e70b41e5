//! The CPU backend: interprets a program with a team of threads and hand-picked instructions.
//!
//! ```text
//! build   store (weights repacked, one at a time) -> plan (phases, memory, barriers) -> runner
//! step    runner -> team (one wake-up) -> exec (a member's share of a phase) -> kernel
//! kernel  one body over simd::Simd: scalar, avx2, avx512
//! ```
//! A row's result is the same bits whatever the other rows of the step, the number of threads and
//! the instruction set. Linears over quantized weights use int8 activations (`grouped` states
//! their error); everything else is f32, the KV cache f16. Unsafe code lives in `x86`
//! (intrinsics), `share` (memory of the team) and `exec` (who touches what) alone.
//!
//! Not here: GPUs; families of models. Start at [`CpuBackend`], then `exec`.

mod activate;
mod attention;
mod dense;
#[allow(unsafe_code)]
mod exec;
mod grouped;
mod isa;
mod kv;
mod math;
mod norm;
mod packed;
mod plan;
mod quantize;
mod rope;
mod runner;
mod scalar;
#[allow(unsafe_code)]
mod share;
mod simd;
mod store;
mod team;
#[cfg(test)]
mod testing;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;

pub use isa::Isa;

use crate::{Backend, Error, Program, Runner, StepLimits, WeightSource, validate};
use isa::Machine;
use quant::Format;
use runner::CpuRunner;
use std::sync::Arc;
use team::Team;

/// Choices for the CPU backend; none of them changes a result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads of the team; if none, all the processor offers, or one for a small model.
    pub threads: Option<usize>,
    /// Instruction set; the fastest the processor has if none.
    pub isa: Option<Isa>,
}

/// Runs programs on this machine's processor.
#[derive(Debug, Clone)]
pub struct CpuBackend {
    machine: Machine,
    team: Arc<Team>,
    /// Whether a model may get fewer threads than the team has.
    shrinks: bool,
}

/// Bytes of weights a token must read for each thread that takes part. Below it the threads wait
/// for each other longer than they work: with 4.6 MB a token one thread was 1.6 times as fast as
/// two.
const THREAD_BYTES: usize = 4 << 20;

impl CpuBackend {
    /// Starts the team; runners built by one backend share it.
    ///
    /// # Errors
    /// [`Error::Device`] if the processor lacks the instruction set or no threads can be started.
    pub fn new(options: &CpuOptions) -> Result<Self, Error> {
        let machine = options.isa.unwrap_or_else(Isa::best).detect()?;
        let threads = options.threads.unwrap_or_else(available_threads);
        let (team, shrinks) = (Arc::new(Team::new(threads)?), options.threads.is_none());
        Ok(Self { machine, team, shrinks })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.machine.isa()
    }

    /// Threads of the team.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// The whole team, or a smaller one where the program has too little work for it.
    fn team_for(&self, program: &Program) -> Result<Arc<Team>, Error> {
        let worth = (program.bytes_per_token() / THREAD_BYTES).max(1);
        if self.shrinks && worth < self.threads() {
            return Ok(Arc::new(Team::new(worth)?));
        }
        Ok(Arc::clone(&self.team))
    }
}

/// Threads that the system lets this process run at once.
pub(crate) fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn kernel_for(&self, format: Format) -> String {
        let isa = self.isa();
        match format {
            Format::Dense(float) => format!("{float} {isa}: 16-row tiles, f32 activations"),
            Format::Grouped { bits, group, act_order } => {
                let block = quantize::Blocks::new(group, group, None).block;
                let gathered = if act_order { ", gathered" } else { "" };
                let bits = bits.count();
                format!(
                    "w{bits}a8 {isa}: 16-row tiles, int8 activations in blocks of {block}{gathered}"
                )
            }
        }
    }

    fn build(
        &self,
        program: &Program,
        weights: &mut dyn WeightSource,
        limits: &StepLimits,
    ) -> Result<Box<dyn Runner>, Error> {
        validate::program(program)?;
        validate::limits(limits)?;
        let weights = store::load(program, weights, self.team.pool())?;
        let device = (self.machine, self.team_for(program)?);
        Ok(Box::new(CpuRunner::new(device, program, weights, limits)))
    }
}
