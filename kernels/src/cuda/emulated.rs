//! The emulator as a device: the backend's own launches, run on a processor. For tests alone, those of
//! this crate and those of whole models (`tests/it`), which have this file too.

use super::Error;
use super::gpu::{Arg, Gpu, Launch, Pointer};
use emulator::{Emulator, Options};

/// An emulated device.
#[derive(Debug)]
pub(crate) struct Emulated {
    emulator: Emulator,
    pub(crate) multiprocessors: usize,
}

impl Emulated {
    /// A device without memory; none where kernels cannot be emulated. It has so few multiprocessors that
    /// small matrices meet the kernels that large ones have.
    pub(crate) fn new(options: Options) -> Result<Self, Error> {
        let emulator = Emulator::new(options).map_err(failed)?;
        Ok(Self { emulator, multiprocessors: 4 })
    }
}

fn failed(reason: String) -> Error {
    Error::Device { device: "emulated cuda".to_owned(), reason }
}

impl Gpu for Emulated {
    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn alloc(&mut self, bytes: usize) -> Result<Pointer, Error> {
        self.emulator.alloc(bytes).map(Pointer).map_err(failed)
    }

    fn write(&mut self, to: Pointer, bytes: &[u8]) -> Result<(), Error> {
        self.emulator.write(to.0, bytes).map_err(failed)
    }

    fn read(&mut self, from: Pointer, bytes: &mut [u8]) -> Result<(), Error> {
        self.emulator.read(from.0, bytes).map_err(failed)
    }

    fn launch(&mut self, launch: &Launch) -> Result<(), Error> {
        let Launch { kernel, grid, threads, shared, args } = launch;
        let arg = |arg: &Arg| match *arg {
            Arg::Pointer(pointer) => emulator::Arg::Pointer(pointer.0),
            Arg::Int(value) => emulator::Arg::Int(value),
            Arg::Float(value) => emulator::Arg::Float(value),
        };
        let args: Vec<_> = args.iter().map(arg).collect();
        self.emulator.launch(kernel, *grid, *threads, *shared, &args).map_err(failed)
    }
}
