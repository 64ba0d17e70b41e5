//! The GPU of this machine as a backend under test; where there is none, the reason is printed.
//!
//! Not here: the same kernels on a processor ([`super::cuda`]). Compiled kernels are kept in the
//! temporary folder, since every case opens the device anew.

use super::{Tested, bounds};
use crate::cuda::{CudaBackend, Options, Places, devices};

/// The first CUDA device.
pub(super) fn gpu() -> Option<Tested> {
    let nvrtc = Places::new(|name| std::env::var_os(name), None);
    let cache = Some(std::env::temp_dir().join("foretoken-conformance"));
    let name = match devices() {
        Ok(found) => format!("cuda on {}", found[0].name),
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    let backend = CudaBackend::new(0, Options { nvrtc, cache, say: |text| println!("{text}") });
    Some(Tested { name, backend: Box::new(backend), allowed: bounds::cpu })
}
