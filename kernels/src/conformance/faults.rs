//! A GPU without room, or one that fails: what the CUDA backend says then, and that it never panics.
//!
//! The device computes nothing and answers with zeros, so that every call can be the one that fails.
//! Not here: results ([`super::invariance`]), what becomes of open requests (the engine's tests).

use super::case::{Case, Source};
use super::{cases, decoder, joined, session};
use crate::backend::RunnerMemory;
use crate::cuda::gpu::{Gpu, Launch, Pointer};
use crate::cuda::{CudaBackend, memory, tokens_that_fit};
use crate::program::{BlockId, TokenId};
use crate::{Backend, BlockTables, Draw, Error, Runner, StepInput, StepLimits, StepOutput};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A device that fails from call `at` on.
#[derive(Clone)]
struct Failing {
    calls: Arc<AtomicUsize>,
    at: usize,
    free: Option<usize>,
}

impl Failing {
    fn new(at: usize, free: Option<usize>) -> Self {
        Self { calls: Arc::default(), at, free }
    }

    fn call(&self) -> Result<(), Error> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let lost = || Error::Device { device: self.name(), reason: "it fell off the bus".into() };
        if call < self.at { Ok(()) } else { Err(lost()) }
    }

    fn build(&self, case: &Case, limits: &StepLimits) -> Result<Box<dyn Runner>, Error> {
        let gpu = self.clone();
        let backend = CudaBackend::on(move || Ok(Box::new(gpu.clone())));
        backend.build(&case.program, &Source(&case.weights), limits)
    }
}

impl Gpu for Failing {
    fn name(&self) -> String {
        "cuda:7".to_owned()
    }

    fn free(&mut self) -> Option<usize> {
        self.free
    }

    fn multiprocessors(&self) -> usize {
        4
    }

    fn alloc(&mut self, _: usize) -> Result<Pointer, Error> {
        self.call().map(|()| Pointer(256))
    }

    fn write(&mut self, _: Pointer, _: &[u8]) -> Result<(), Error> {
        self.call()
    }

    fn read(&mut self, _: Pointer, bytes: &mut [u8]) -> Result<(), Error> {
        bytes.fill(0);
        self.call()
    }

    fn launch(&mut self, _: &Launch) -> Result<(), Error> {
        self.call()
    }
}

fn all() -> Vec<Case> {
    cases::all().into_iter().chain(joined::all()).chain(decoder::decoders()).collect()
}

fn decoder() -> Case {
    decoder::decoders().swap_remove(0)
}

#[test]
fn memory_is_as_estimated() {
    for case in all() {
        for trace in [false, true] {
            let limits = StepLimits { trace, ..session::limits(&case) };
            let runner = Failing::new(usize::MAX, None).build(&case, &limits).unwrap();
            let (known, found) = (memory(&case.program, &limits).unwrap(), runner.memory());
            // Scales and zero points may turn out to be fewer bytes.
            assert!(found.weights_bytes <= known.weights_bytes, "{}", case.name);
            let weights_bytes = found.weights_bytes;
            assert_eq!(RunnerMemory { weights_bytes, ..known }, found, "{}", case.name);
        }
    }
}

#[test]
fn want_of_memory_says_what_would_fit() {
    let case = decoder();
    let limits = StepLimits { blocks: 1 << 16, ..session::limits(&case) };
    let of = |blocks| memory(&case.program, &StepLimits { blocks, ..limits }).unwrap().total();
    let free = of(1000);
    let said = Failing::new(usize::MAX, Some(free)).build(&case, &limits).map(|_| ()).unwrap_err();
    let fit = tokens_that_fit(&[(&case.program, limits)], free).unwrap();
    let (said, blocks) = (said.to_string(), fit / limits.block_len);
    assert!(said.contains("cuda:7") && said.contains("out of memory"), "{said}");
    assert!(said.contains(&format!("those of {fit} tokens would fit")), "{said}");
    // The most of which a twentieth is left, and that does fit.
    assert!(of(blocks) <= free - free / 20 && of(blocks + 1) > free - free / 20, "{blocks}");
    let fewer = StepLimits { blocks, ..limits };
    assert!(Failing::new(usize::MAX, Some(free)).build(&case, &fewer).is_ok());
    let small = Failing::new(usize::MAX, Some(1000)).build(&case, &limits).map(|_| ());
    assert!(small.unwrap_err().to_string().contains("smaller model"));
    assert_eq!(tokens_that_fit(&[(&case.program, fewer)], free).unwrap(), fit);
    // Two of them take twice as much, so that the same room holds fewer tokens, and two rooms as many.
    let two = [(&case.program, limits); 2];
    let least = fewer.block_len..fit;
    assert!(least.contains(&tokens_that_fit(&two, free).unwrap()));
    assert_eq!(tokens_that_fit(&two, 2 * free).unwrap(), fit);
}

/// Three steps of a sequence: one waited for, two asked for of which the second follows the first.
fn steps(case: &Case, runner: &mut dyn Runner) -> [Result<(), Error>; 2] {
    let tokens = &case.sequences[0][..3];
    let blocks = [BlockId(0), BlockId(1)];
    let draws = [Some(Draw { key: 5, temperature: 1.0 })];
    let input = |range: std::ops::Range<usize>, draws| {
        let positions: Vec<u32> = range.clone().map(|p| p as u32).collect();
        let (count, end) = (range.len() as u32, range.end as u32);
        let lens = vec![end; range.len()];
        move |run: &mut dyn FnMut(&StepInput<'_>) -> Result<(), Error>| {
            run(&StepInput {
                tokens: &tokens[range.clone()],
                positions: &positions,
                rope_lens: &lens,
                query_ends: &[count],
                context_lens: &[end],
                block_tables: BlockTables { blocks: &blocks, ends: &[2] },
                output_rows: &[count - 1],
                draws,
            })
        }
    };
    let (first, second, third) = (input(0..1, &[]), input(1..2, &draws), input(2..3, &draws));
    let plain = first(&mut |input| runner.step(input, &mut StepOutput::default()));
    let mut chain = || {
        second(&mut |input| runner.ask(input, false).map(|_| ()))?;
        third(&mut |input| runner.ask(input, true).map(|_| ()))?;
        let mut tokens: Vec<Option<TokenId>> = vec![];
        runner.answers(&mut tokens)
    };
    [plain, chain()]
}

#[test]
fn every_failure_is_an_error() {
    let case = decoder();
    let limits = session::limits(&case);
    let calls = |device: &Failing| device.calls.load(Ordering::Relaxed);
    let whole = Failing::new(usize::MAX, None);
    let mut runner = whole.build(&case, &limits).unwrap();
    let built = calls(&whole);
    steps(&case, runner.as_mut()).into_iter().for_each(|step| step.unwrap());
    let done = calls(&whole);
    assert!(built > 20 && done > built + 20, "{built} calls to build, {done} in all");
    for at in 0..done {
        let device = Failing::new(at, None);
        let lost = |error: Error| assert!(error.to_string().contains("cuda:7: it fell"), "{error}");
        match device.build(&case, &limits) {
            Err(error) => {
                assert!(at < built);
                lost(error);
            }
            Ok(mut runner) => {
                let found = steps(&case, runner.as_mut());
                assert!(at >= built && found[1].is_err(), "call {at}");
                found.into_iter().filter_map(Result::err).for_each(lost);
                // Nothing works behind it, and nothing panics.
                steps(&case, runner.as_mut()).into_iter().for_each(|step| lost(step.unwrap_err()));
            }
        }
    }
}
