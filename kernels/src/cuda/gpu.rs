//! What the CUDA backend asks of a device: memory, copies and launches, in the order they are asked.
//!
//! `driver` is a real device; tests run the same launches on a processor, and others may write them
//! down ([`super::CudaBackend::on`]). Not here: which
//! kernels there are (`shaders/cuda`), what they are launched for ([`super::plan`]).

use crate::Error;

/// Address of device memory, as kernels get it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pointer(pub u64);

impl Pointer {
    /// No memory: for an argument that a kernel does not use.
    pub const NULL: Self = Self(0);

    /// `bytes` further on.
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// An argument of a kernel; all of a kernel's parameters are of these types.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// A pointer to device memory.
    Pointer(Pointer),
    /// `int`.
    Int(i32),
    /// `float`.
    Float(f32),
}

/// One kernel launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Name of an `extern "C"` kernel of [`shaders::CUDA`].
    pub kernel: &'static str,
    /// Blocks in x, y and z; where one is 0 nothing runs.
    pub grid: [u32; 3],
    /// Threads of a block, in x.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// In the order of the kernel's parameters.
    pub args: Vec<Arg>,
}

/// Launches that are asked for as one.
#[derive(Debug)]
pub struct Recorded {
    pub(super) launches: Vec<Launch>,
    /// Number of the device's own recording, if it made one.
    pub(super) graph: Option<usize>,
}

/// A device with its memory and one queue of work.
///
/// Whatever is asked happens after everything asked before. Memory lives as long as the device.
pub trait Gpu: Send {
    /// What errors call it, such as `cuda:0`.
    fn name(&self) -> String {
        "cuda".to_owned()
    }

    /// Bytes of its memory that nobody uses now; none where that is not known.
    fn free(&mut self) -> Option<usize> {
        None
    }

    /// How many blocks of threads, each with a multiprocessor to itself, run at once.
    fn multiprocessors(&self) -> usize;

    /// Takes `bytes` of memory, aligned to 256, all zero.
    ///
    /// # Errors
    /// [`Error::Device`] says how much was asked for and how much is free.
    fn alloc(&mut self, bytes: usize) -> Result<Pointer, Error>;

    /// Copies `bytes` to `to`.
    ///
    /// # Errors
    /// [`Error::Device`] with the driver's reason.
    fn write(&mut self, to: Pointer, bytes: &[u8]) -> Result<(), Error>;

    /// Copies from `from` and waits for everything asked before.
    ///
    /// # Errors
    /// [`Error::Device`] with the driver's reason, also that of an earlier launch.
    fn read(&mut self, from: Pointer, bytes: &mut [u8]) -> Result<(), Error>;

    /// Asks for a launch.
    ///
    /// # Errors
    /// [`Error::Device`] names the kernel and the driver's reason.
    fn launch(&mut self, launch: &Launch) -> Result<(), Error>;

    /// Prepares launches, always the same ones, to be asked for together; nothing runs yet.
    ///
    /// # Errors
    /// Those of [`Gpu::launch`].
    fn record(&mut self, launches: Vec<Launch>) -> Result<Recorded, Error> {
        Ok(Recorded { launches, graph: None })
    }

    /// Asks for all launches of `recorded`, which this device recorded, in order.
    ///
    /// # Errors
    /// Those of [`Gpu::launch`].
    fn replay(&mut self, recorded: &Recorded) -> Result<(), Error> {
        recorded.launches.iter().try_for_each(|launch| self.launch(launch))
    }
}
