//! What a program takes of a GPU's memory, and what would fit, without a GPU and without weights.
//!
//! The runner's own construction, on a device that only counts: an estimate cannot drift from what is
//! taken. It is exact but for quantized weights, of which it is the most: that their scales are f16 and
//! their zero points one number is only known when they are loaded ([`super::store`]). Not here: how
//! much is free ([`super::devices`]). Input: a program and the limits of its steps.

use super::gpu::{Gpu, Launch, Pointer};
use super::runner::take;
use super::store;
use crate::backend::RunnerMemory;
use crate::program::Program;
use crate::{Error, StepLimits, validate};

/// Gives addresses and keeps nothing.
struct Counting;

impl Gpu for Counting {
    fn multiprocessors(&self) -> usize {
        1
    }

    fn alloc(&mut self, _: usize) -> Result<Pointer, Error> {
        Ok(Pointer::NULL)
    }

    fn write(&mut self, _: Pointer, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    fn read(&mut self, _: Pointer, _: &mut [u8]) -> Result<(), Error> {
        Ok(())
    }

    fn launch(&mut self, _: &Launch) -> Result<(), Error> {
        Ok(())
    }
}

/// Bytes that a runner of `program` takes on a GPU at most.
///
/// # Errors
/// A program or limits that break the contract, and ops that have no kernel.
pub fn memory(program: &Program, limits: &StepLimits) -> Result<RunnerMemory, Error> {
    validate::program(program)?;
    validate::limits(limits)?;
    let (weights, weights_bytes) = store::reserve(&mut Counting, program, limits.trace)?;
    let (_, memory) = take(&mut Counting, program, limits, (weights, weights_bytes))?;
    Ok(memory)
}

/// Tokens whose keys and values fit into `free` bytes beside everything else, at most those of the
/// limits; a twentieth of the bytes is left for the driver, which gives memory in larger pieces than
/// it is asked for. 0 where not even one block fits. Several runners, such as a model and its draft,
/// keep keys and values of the same tokens: the first one's limits say how many at most.
///
/// # Errors
/// As [`memory`].
pub fn tokens_that_fit(runners: &[(&Program, StepLimits)], free: usize) -> Result<usize, Error> {
    let room = free - free / 20;
    let fits = |blocks| -> Result<bool, Error> {
        let bytes = |(program, limits): &(&Program, StepLimits)| {
            memory(program, &StepLimits { blocks, ..*limits }).map(|memory| memory.total())
        };
        let all = runners.iter().map(bytes).collect::<Result<Vec<_>, _>>()?;
        Ok(all.into_iter().fold(0, usize::saturating_add) <= room)
    };
    let Some((_, limits)) = runners.first() else { return Ok(0) };
    if fits(limits.blocks)? {
        return Ok(limits.blocks.saturating_mul(limits.block_len));
    }
    // The most that fit lie in `least..most`; more blocks never take less memory.
    let (mut least, mut most) = (0, limits.blocks);
    while most - least > 1 {
        let middle = least + (most - least) / 2;
        *(if fits(middle)? { &mut least } else { &mut most }) = middle;
    }
    Ok(least * limits.block_len)
}

/// Refuses a program that cannot fit into what is free on `gpu`, and says what would.
pub(super) fn check(
    gpu: &mut dyn Gpu,
    program: &Program,
    limits: &StepLimits,
) -> Result<(), Error> {
    let Some(free) = gpu.free() else { return Ok(()) };
    let needed = memory(program, limits)?;
    if needed.total() <= free {
        return Ok(());
    }
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let tokens = limits.blocks * limits.block_len;
    let fit = tokens_that_fit(&[(program, *limits)], free)?;
    let remedy = match fit {
        0 => "not even the shortest text fits: use a smaller model or another device".to_owned(),
        _ => format!("those of {fit} tokens would fit: ask for fewer, or use another device"),
    };
    let reason = format!(
        "out of memory: weights take {:.2} GiB, what lies between steps {:.2}, keys and values of \
         {tokens} tokens {:.2}; {:.2} GiB are free; {remedy}",
        gib(needed.weights_bytes),
        gib(needed.slots_bytes),
        gib(needed.kv_bytes),
        gib(free)
    );
    Err(Error::Device { device: gpu.name(), reason })
}
