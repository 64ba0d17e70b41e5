//! The CUDA device that whole models are tested on: this machine's, or else its kernels on a processor;
//! and one that is lost in the middle of a step.
//!
//! The launches are the backend's own in all cases. Not here: single ops (conformance, in `kernels`).

use crate::run;
use engine::engine::{Engine, EngineConfig};
use engine::kv::{BLOCK_LEN, PrefixCaching};
use engine::model::Head;
use engine::request::{Event, Request};
use gpu::{Gpu, Launch, Pointer};
use kernels::cuda::{CudaBackend, Options, Places, devices, gpu};
use kernels::program::TokenId;
use kernels::{Backend, Error};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[path = "../../kernels/src/cuda/emulated.rs"]
mod emulated;

/// Whether there is a real one; its absence is printed.
pub(crate) fn is_real() -> bool {
    devices().map_err(|error| println!("emulated: {error}")).is_ok()
}

/// Whether either can be had; the reason why not is printed.
pub(crate) fn is_there() -> bool {
    is_real() || emulator::available().map_err(|why| println!("skipped: {why}")).is_ok()
}

/// The device; [`is_there`] was asked before.
pub(crate) fn backend() -> Box<dyn Backend> {
    if devices().is_err() {
        let open = || emulated::Emulated::new(emulator::Options::default());
        return Box::new(CudaBackend::on(move || Ok(Box::new(open()?))));
    }
    let nvrtc = Places::new(|name| std::env::var_os(name), None);
    let cache = Some(std::env::temp_dir().join("foretoken-tests"));
    Box::new(CudaBackend::new(0, Options { nvrtc, cache, say: |text| println!("{text}") }))
}

/// A device that computes nothing, answers with zeros, and is lost after so many launches.
struct Lost(Arc<AtomicUsize>);

impl Gpu for Lost {
    fn multiprocessors(&self) -> usize {
        4
    }

    fn alloc(&mut self, _: usize) -> Result<Pointer, Error> {
        Ok(Pointer(256))
    }

    fn write(&mut self, _: Pointer, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    fn read(&mut self, _: Pointer, bytes: &mut [u8]) -> Result<(), Error> {
        bytes.fill(0);
        Ok(())
    }

    fn launch(&mut self, launch: &Launch) -> Result<(), Error> {
        let left = |left: usize| left.checked_sub(1);
        let reason = format!("kernel {}: the device is lost", launch.kernel);
        let lost = |_| Error::Device { device: self.name(), reason };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).map(|_| ()).map_err(lost)
    }
}

fn engine(launches: usize) -> (Engine, Arc<AtomicUsize>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/demo/draft");
    let model = run::open_with(&dir, Head::Auto);
    let config = EngineConfig {
        vocab: model.spec().vocab,
        context_len: model.spec().context_len,
        step_tokens: 8,
        max_sequences: 2,
        blocks: 8,
        block_len: BLOCK_LEN,
        max_waiting: 8,
        max_drafted: 0,
        max_scored: 0,
        prefix_caching: PrefixCaching::Off,
    };
    let left = Arc::new(AtomicUsize::new(launches));
    let device = left.clone();
    let backend = CudaBackend::on(move || Ok(Box::new(Lost(device.clone()))));
    let built = backend.build(model.program(), &model.weights(), &config.step_limits());
    (Engine::new(built.unwrap_or_else(|e| panic!("{}", run::chain(&e))), config), left)
}

#[test]
fn a_lost_device_answers_every_request_and_ends_nothing_else() {
    let (mut engine, left) = engine(200);
    let request = Request::new((1..6).map(TokenId).collect(), 64);
    // Twice: what comes after the loss is answered too.
    for _ in 0..2 {
        let ids: Vec<_> =
            (0..3).map(|_| engine.submit(request.clone()).expect("a valid request")).collect();
        let mut events = vec![];
        let error = loop {
            if let Err(error) = engine.step(&mut events) {
                break error.to_string();
            }
        };
        assert!(error.contains("the device is lost"), "{error}");
        for id in &ids {
            let failed = events.iter().any(|event| match event {
                Event::Failed { id: of, reason } => of == id && reason.contains("is lost"),
                _ => false,
            });
            assert!(failed, "{id:?} has no answer in {events:?}");
        }
    }
    // A device that works again is used again.
    left.store(usize::MAX, Ordering::Relaxed);
    engine.submit(request).expect("a valid request");
    let mut events = vec![];
    while !matches!(events.last(), Some(Event::Finished { .. })) {
        engine.step(&mut events).expect("a step");
    }
}
