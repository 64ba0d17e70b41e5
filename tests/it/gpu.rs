//! The CUDA device that whole models are tested on: this machine's, or else its kernels on a processor.
//!
//! The launches are the backend's own in both cases. Not here: single ops (conformance, in `kernels`).

use kernels::cuda::{CudaBackend, Options, Places, devices, gpu};
use kernels::{Backend, Error};

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
