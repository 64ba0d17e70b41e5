//! Runs the CUDA kernels of `shaders/cuda` on a processor, so that tests need no GPU.
//!
//! The kernels' own text is compiled with a C++ compiler behind `emulator.h` (what CUDA gives) and
//! `prelude.h` (what `prelude.cuh` has as PTX). One thread of a kernel runs at a time, in an order
//! that a test chooses, and copies past the registers land early or as late as they may: a missing
//! barrier or wait then shows as a wrong result. Not here: speed, and races between blocks, which run
//! one after another (a block that waits for another one would wait for ever).

#[cfg(emulated)]
mod ffi;
#[cfg(not(emulated))]
mod missing;

#[cfg(not(emulated))]
use missing as ffi;
use std::collections::BTreeMap;
use std::ffi::CStr;

#[cfg(test)]
mod tests;

/// In which order threads and blocks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// Warps by turns, from the first block, warp and lane on; a turn lasts until lanes must wait.
    #[default]
    InOrder,
    /// From the last block, warp and lane on, each warp as far as it gets.
    Reversed,
    /// From the first block, warp and lane on, each warp as far as it gets.
    WarpByWarp,
    /// By chance; the same seed gives the same order.
    Random(u64),
}

/// When copies past the registers (`cp.async`) land.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AsyncCopies {
    /// At once.
    Eager,
    /// When they are waited for, and never if nobody waits.
    #[default]
    Late,
}

/// How kernels are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Order of threads and blocks.
    pub order: Order,
    /// When asynchronous copies land.
    pub async_copies: AsyncCopies,
    /// Whether new memory holds NaN (bytes 0xff) instead of zeros.
    pub poison: bool,
    /// A barrier or wait that threads pass by as if it were not there: to see whether a test notices.
    pub passed: Option<Site>,
}

/// A barrier, or a wait for copies, of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// The kernel's file.
    pub file: &'static CStr,
    /// Line of the file, from 1.
    pub line: u32,
}

/// The barriers and waits that kernels have come to so far in this process.
pub fn sites() -> Vec<Site> {
    ffi::sites()
}

impl Options {
    /// The combinations that find a missing barrier or wait: each order with early and late copies.
    pub fn all() -> Vec<Self> {
        let orders = [Order::InOrder, Order::Reversed, Order::WarpByWarp, Order::Random(1)];
        let timings = [AsyncCopies::Late, AsyncCopies::Eager];
        let of =
            |order| timings.map(|async_copies| Self { order, async_copies, ..Self::default() });
        orders.into_iter().flat_map(of).collect()
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// An address within memory of the same emulator, or 0.
    Pointer(u64),
    /// `int`.
    Int(i32),
    /// `float`.
    Float(f32),
}

impl Arg {
    fn letter(self) -> char {
        match self {
            Self::Pointer(_) => 'p',
            Self::Int(_) => 'i',
            Self::Float(_) => 'f',
        }
    }

    fn bits(self) -> u64 {
        match self {
            Self::Pointer(address) => address,
            Self::Int(value) => u64::from(value.cast_unsigned()),
            Self::Float(value) => value.to_bits().into(),
        }
    }
}

/// Whether kernels can be run here.
///
/// # Errors
/// Says why not: another system than x86-64 Linux, or no C++17 compiler when this was built.
pub fn available() -> Result<(), String> {
    match env!("EMULATOR_MISSING") {
        "" => Ok(()),
        reason => Err(reason.to_owned()),
    }
}

/// Names of all kernels; those that begin with `selftest_` are the emulator's own.
pub fn kernels() -> Vec<&'static str> {
    ffi::kernels().iter().map(|kernel| kernel.name).collect()
}

/// A device with memory of its own.
pub struct Emulator {
    options: Options,
    kernels: BTreeMap<&'static str, ffi::Kernel>,
    /// By address.
    memory: BTreeMap<u64, ffi::Memory>,
    launches: u64,
}

impl std::fmt::Debug for Emulator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Emulator").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Emulator {
    /// A device without memory.
    ///
    /// # Errors
    /// As [`available`].
    pub fn new(options: Options) -> Result<Self, String> {
        available()?;
        let kernels = ffi::kernels().into_iter().map(|kernel| (kernel.name, kernel)).collect();
        Ok(Self { options, kernels, memory: BTreeMap::new(), launches: 0 })
    }

    /// Takes `bytes` of memory and returns its address, a multiple of 256.
    ///
    /// It lives as long as the emulator. Filled with zeros, or NaN with [`Options::poison`].
    ///
    /// # Errors
    /// If the system gives none.
    pub fn alloc(&mut self, bytes: usize) -> Result<u64, String> {
        let fill = if self.options.poison { 0xff } else { 0 };
        let memory = ffi::Memory::new(bytes, fill);
        let memory = memory.ok_or_else(|| format!("no memory for {bytes} bytes"))?;
        let address = memory.address();
        self.memory.insert(address, memory);
        Ok(address)
    }

    /// Copies `bytes` to address `to`.
    ///
    /// # Errors
    /// If they do not lie within one piece of memory.
    pub fn write(&mut self, to: u64, bytes: &[u8]) -> Result<(), String> {
        let start = self.start_of(to).ok_or_else(|| no_memory(to))?;
        let memory = self.memory.get_mut(&start).ok_or_else(|| no_memory(to))?.bytes_mut();
        let (at, room) = ((to - start) as usize, memory.len());
        let place = memory.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len()));
        place.ok_or_else(|| too_long(bytes.len(), at, room))?.copy_from_slice(bytes);
        Ok(())
    }

    /// Copies from address `from`.
    ///
    /// # Errors
    /// If the bytes do not lie within one piece of memory.
    pub fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), String> {
        let start = self.start_of(from).ok_or_else(|| no_memory(from))?;
        let memory = self.memory.get(&start).ok_or_else(|| no_memory(from))?.bytes();
        let at = (from - start) as usize;
        let place = memory.get(at..).and_then(|rest| rest.get(..bytes.len()));
        bytes.copy_from_slice(place.ok_or_else(|| too_long(bytes.len(), at, memory.len()))?);
        Ok(())
    }

    /// Runs kernel `name` to its end, on `grid` blocks (x, y, z) of `threads` threads (x) with
    /// `shared` bytes of dynamic shared memory.
    ///
    /// # Errors
    /// An unknown kernel, arguments that do not fit its parameters, pointers outside of memory, more
    /// threads than its bound; and what the kernel does wrong: barriers or warp operations that not
    /// all threads reach, accesses beyond its memory. The text names kernel, block and thread.
    pub fn launch(
        &mut self,
        name: &str,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        args: &[Arg],
    ) -> Result<(), String> {
        let kernel = *self.kernels.get(name).ok_or_else(|| format!("no kernel {name}"))?;
        check_launch(kernel, threads, shared, args)?;
        self.check_pointers(name, args)?;
        self.launches += 1;
        let (order, seed) = match self.options.order {
            Order::InOrder => (0, 0),
            Order::Reversed => (1, 0),
            Order::WarpByWarp => (2, 0),
            // Launches differ, and are the same when the program runs again.
            Order::Random(seed) => (3, seed.wrapping_mul(1_000_003).wrapping_add(self.launches)),
        };
        let late = self.options.async_copies == AsyncCopies::Late;
        let bits: Vec<u64> = args.iter().map(|arg| arg.bits()).collect();
        let passed = self.options.passed;
        let launch = ffi::Launch { grid, threads, shared, order, late, seed, passed, args: &bits };
        ffi::launch(kernel, &launch).map_err(|failure| self.explain(failure, args))?;
        self.check_guards(name, args)
    }

    /// Start of the piece of memory that an address lies in, its end included.
    fn start_of(&self, address: u64) -> Option<u64> {
        let (start, memory) = self.memory.range(..=address).next_back()?;
        (address - start <= memory.bytes().len() as u64).then_some(*start)
    }

    fn check_pointers(&self, name: &str, args: &[Arg]) -> Result<(), String> {
        for (i, arg) in args.iter().enumerate() {
            match arg {
                Arg::Pointer(address) if *address != 0 && self.start_of(*address).is_none() => {
                    return Err(format!("kernel {name}, argument {i}: {}", no_memory(*address)));
                }
                Arg::Pointer(_) | Arg::Int(_) | Arg::Float(_) => {}
            }
        }
        Ok(())
    }

    /// Pieces of memory that arguments point into, with the arguments' numbers.
    fn pieces<'a>(&'a self, args: &'a [Arg]) -> impl Iterator<Item = (usize, &'a ffi::Memory)> {
        args.iter().enumerate().filter_map(|(i, arg)| match arg {
            Arg::Pointer(address) => Some((i, self.memory.get(&self.start_of(*address)?)?)),
            Arg::Int(_) | Arg::Float(_) => None,
        })
    }

    fn check_guards(&self, name: &str, args: &[Arg]) -> Result<(), String> {
        match self.pieces(args).find(|(_, memory)| !memory.is_intact()) {
            Some((i, memory)) => Err(format!(
                "kernel {name} writes before or behind the {} bytes of argument {i}",
                memory.bytes().len()
            )),
            None => Ok(()),
        }
    }

    /// Adds to a failure which argument's memory its address is nearest to.
    fn explain(&self, failure: ffi::Failure, args: &[Arg]) -> String {
        let Some(address) = failure.address else { return failure.text };
        let distance = |memory: &ffi::Memory| {
            let (start, len) = (memory.address(), memory.bytes().len() as u64);
            if address < start { start - address } else { address.saturating_sub(start + len) }
        };
        let nearest = self.pieces(args).min_by_key(|(_, memory)| distance(memory));
        let Some((i, memory)) = nearest else { return failure.text };
        let side = if address < memory.address() { "before" } else { "behind" };
        let (text, len, far) = (failure.text, memory.bytes().len(), distance(memory));
        format!("{text}: {far} bytes {side} the {len} bytes of argument {i}, the nearest")
    }
}

fn no_memory(address: u64) -> String {
    format!("address {address:#x} lies in no memory that was taken")
}

fn too_long(bytes: usize, at: usize, room: usize) -> String {
    format!("{bytes} bytes from byte {at} on do not fit into memory of {room} bytes")
}

fn check_launch(
    kernel: ffi::Kernel,
    threads: u32,
    shared: u32,
    args: &[Arg],
) -> Result<(), String> {
    /// What the largest devices allow.
    const SHARED: u32 = 227 * 1024;
    let name = kernel.name;
    let given: String = args.iter().map(|arg| arg.letter()).collect();
    if given != kernel.types {
        let (count, types) = (kernel.types.len(), kernel.types);
        return Err(format!(
            "kernel {name} takes {count} arguments ({types}: p pointer, i int, f float), got {} ({given})",
            args.len()
        ));
    }
    if threads == 0 || threads > kernel.threads {
        let bound = kernel.threads;
        return Err(format!("kernel {name} takes 1 to {bound} threads a block, got {threads}"));
    }
    if shared > SHARED {
        return Err(format!("kernel {name}: {shared} bytes of shared memory, at most {SHARED}"));
    }
    Ok(())
}
