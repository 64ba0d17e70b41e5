//! Conformance of every backend: one list of cases, run against expectations in f64 and against
//! itself under other schedules.
//!
//! [`case`] puts a tiny program together, [`cases`] lists them, [`oracle`] computes what they
//! must give and how far off a result may be, [`session`] runs them. A new backend adds a line to
//! [`backends`]; a new op adds cases and an arm in the oracle.

mod bounds;
mod case;
mod cases;
mod choice;
mod contract;
mod decoder;
mod faults;
mod fused;
mod gpu_tests;
mod invariance;
mod joined;
mod oracle;
mod passed;
mod session;

use crate::Backend;
use crate::Error;
use crate::cpu::{CpuBackend, CpuOptions, Isa};
use crate::cuda::CudaBackend;
use crate::reference::ReferenceBackend;
use emulator::Options;
use oracle::Expected;

/// A backend under test.
struct Tested {
    /// With the options that make it different from the others in the list.
    name: String,
    backend: Box<dyn Backend>,
    /// How far off a result may be.
    allowed: fn(&Expected) -> f64,
}

/// Every backend and variant this machine can run.
fn backends() -> Vec<Tested> {
    let gpus = cuda(Options::default()).into_iter().chain(gpu_tests::gpu());
    [reference()].into_iter().chain(cpus()).chain(gpus).collect()
}

fn reference() -> Tested {
    let backend = Box::new(ReferenceBackend);
    Tested { name: "reference".to_owned(), backend, allowed: bounds::reference }
}

/// The CUDA kernels on an emulated device; none where they cannot be emulated.
fn cuda(options: Options) -> Option<Tested> {
    if let Err(why) = emulator::available() {
        println!("skipped: emulated cuda, {why}");
        return None;
    }
    let backend = Box::new(CudaBackend::emulated(options));
    Some(Tested { name: "cuda emulated".to_owned(), backend, allowed: bounds::cuda })
}

/// The CPU with emulated matrix registers and with every instruction set this machine has, the
/// best last, with one thread and two.
fn cpus() -> Vec<Tested> {
    let (found, missing): (Vec<Isa>, _) =
        Isa::ALL.into_iter().partition(|isa| isa.missing().is_empty());
    missing.iter().for_each(|isa| println!("skipped: cpu {isa}, missing {:?}", isa.missing()));
    let variants = found.into_iter().flat_map(|isa| [1, 2].map(|threads| (isa, threads)));
    let tested = |name, backend: Result<CpuBackend, Error>| {
        let backend = Box::new(backend.expect("this machine has it"));
        Tested { name, backend, allowed: bounds::cpu }
    };
    let real = variants.map(|(isa, threads)| {
        let options = CpuOptions { threads: Some(threads), isa: Some(isa) };
        tested(format!("cpu {isa} x{threads}"), CpuBackend::new(&options))
    });
    let emulated = [1, 2].map(|threads| {
        tested(format!("cpu emulated amx x{threads}"), CpuBackend::emulated_amx(threads))
    });
    emulated.into_iter().chain(real).collect()
}
