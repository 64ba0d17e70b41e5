//! The CPU backend: interprets a program with a team of threads and hand-picked instructions.
//!
//! ```text
//! build   store (weights repacked in parts) -> plan (phases, memory, barriers) -> runner
//! step    runner -> team (one wake-up) -> exec (a member's share of a phase) -> kernel
//! kernel  one body over simd::Simd: scalar, avx2, avx512 (and matmul for amx)
//! ```
//! A row's result is the same bits whatever the other rows of the step, the number of threads and
//! the instruction set. Linears over quantized weights use int8 activations (`grouped` states
//! their error); everything else is f32, the KV cache f16. Unsafe code lives in `x86`
//! (intrinsics, assembly), `pages` (memory of the weights), `share` (memory of the team), `exec` (who
//! touches what) and `team` (work that is borrowed by its threads) alone.
//!
//! Not here: GPUs; families of models. Start at [`CpuBackend`], then `exec`.

mod activate;
mod attention;
mod blocks;
mod dense;
#[allow(unsafe_code)]
mod exec;
mod few_rows;
mod gate;
mod grouped;
pub(crate) mod isa;
mod job;
mod kv;
mod math;
mod matmul;
mod norm;
mod packed;
#[allow(unsafe_code)]
pub(crate) mod pages;
pub(crate) mod peak;
mod plan;
mod products;
mod quantize;
mod repack;
mod rope;
mod runner;
mod scalar;
#[allow(unsafe_code)]
mod share;
pub(crate) mod simd;
mod softmax;
mod store;
#[allow(unsafe_code)]
mod team;
#[cfg(test)]
mod testing;
mod tile;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;

pub use isa::Isa;
pub(crate) use quantize::Blocks;

use crate::program::Rounding;
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
/// for each other longer than they work: with 4.6 MB a token one thread was 1.3 times as fast as
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

    /// Scalar code with matrix registers in plain Rust: the `amx` path on any machine.
    #[cfg(test)]
    pub(crate) fn emulated_amx(threads: usize) -> Result<Self, Error> {
        let machine = Machine::EmulatedAmx(testing::EmulatedUnit);
        Ok(Self { machine, team: Arc::new(Team::new(threads)?), shrinks: false })
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
pub fn available_threads() -> usize {
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
                let [block, coarse] = [Rounding::Fine, Rounding::Coarse]
                    .map(|rounding| quantize::Blocks::new(group, group, None, rounding).block);
                let gates = if coarse > block {
                    format!(" ({coarse} before gates)")
                } else {
                    String::new()
                };
                let gathered = if act_order { ", gathered" } else { "" };
                let bits = bits.count();
                format!(
                    "w{bits}a8 {isa}: 16-row tiles, int8 activations in blocks of {block}{gates}{gathered}"
                )
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
        let weights = store::load(program, weights, self.threads(), limits.trace)?;
        let device = (self.machine, self.team_for(program)?);
        Ok(Box::new(CpuRunner::new(device, program, weights, limits)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{Op, Rows, SlotDecl, SlotId, SlotView, Step, WeightDecl, WeightId};
    use quant::{Bits, Dense, FloatType, Weight};
    use std::ops::Range;

    #[test]
    fn a_missing_instruction_set_is_refused_by_the_names_of_its_features() {
        for isa in Isa::ALL.into_iter().filter(|isa| !isa.missing().is_empty()) {
            let refused = CpuBackend::new(&CpuOptions { isa: Some(isa), threads: Some(1) });
            let why = refused.unwrap_err().to_string();
            assert!(why.starts_with(&format!("device cpu {isa}: this processor lacks ")), "{why}");
            assert!(isa.missing().iter().all(|feature| why.contains(feature)), "{why}");
        }
    }

    #[test]
    fn kernels_are_named() {
        let options = CpuOptions { isa: Some(Isa::Scalar), threads: Some(1) };
        let backend = CpuBackend::new(&options).unwrap();
        let grouped = |group, act_order| Format::Grouped { bits: Bits::Four, group, act_order };
        let plain =
            "w4a8 scalar: 16-row tiles, int8 activations in blocks of 64 (128 before gates)";
        assert_eq!(backend.kernel_for(grouped(128, false)), plain);
        let short = "w4a8 scalar: 16-row tiles, int8 activations in blocks of 32";
        assert_eq!(backend.kernel_for(grouped(32, false)), short);
        assert_eq!(backend.kernel_for(grouped(4096, true)), format!("{plain}, gathered"));
        let dense = backend.kernel_for(Format::Dense(FloatType::Bf16));
        assert_eq!(dense, "bf16 scalar: 16-row tiles, f32 activations");
    }

    /// Delivers one matrix.
    struct One(Dense<'static>);

    impl WeightSource for One {
        fn load(&self, _: WeightId, rows: Range<usize>) -> Result<Weight<'_>, Error> {
            Ok(Weight::Dense(self.0.rows(rows)))
        }
    }

    #[test]
    fn a_head_tied_to_the_embedding_is_stored_once() {
        let [x, last, logits] = [0, 1, 2].map(SlotId);
        let weight = WeightId(0);
        let slot = |label: &str, rows, width| SlotDecl { label: label.to_owned(), rows, width };
        let out = SlotView { slot: logits, start: 0, width: 32 };
        let ops = [
            Op::Embed { table: weight, out: x },
            Op::Gather { x, out: last },
            Op::Linear { x: last, weight, bias: None, out },
        ];
        let format = Format::Dense(FloatType::F32);
        let program = Program {
            weights: vec![WeightDecl::new("table", [32, 8], format)],
            slots: vec![
                slot("x", Rows::Tokens, 8),
                slot("last", Rows::Outputs, 8),
                slot("logits", Rows::Outputs, 32),
            ],
            ropes: vec![],
            kv: vec![],
            steps: ops.map(|op| Step { label: op.name().to_owned(), op }).into(),
            logits,
        };
        let limits = StepLimits {
            tokens: 4,
            sequences: 1,
            outputs: 4,
            blocks: 1,
            block_len: 16,
            context_len: 16,
            trace: false,
        };
        let values: Vec<f32> = (0..32 * 8).map(|i| i as f32).collect();
        let source = One(Dense::from_f32([32, 8], &values));
        let backend = CpuBackend::new(&CpuOptions::default()).unwrap();
        let runner = backend.build(&program, &source, &limits).unwrap();
        assert_eq!(runner.memory().weights_bytes, 32 * 8 * 4);
    }
}
