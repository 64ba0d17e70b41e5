//! The C++ side: its table of kernels, its launches and its memory, as safe functions.
//!
//! Only built where build.rs could compile it. Not here: what a launch must fulfil (`lib.rs`).
#![allow(unsafe_code)]

use super::Site;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Mutex, PoisonError};

/// `emulator::Kernel` of `emulator.h`.
#[repr(C)]
struct RawKernel {
    name: *const c_char,
    types: *const c_char,
    threads: u32,
    run: *const c_void,
    shared_start: *mut u8,
    shared_end: *mut u8,
}

/// `emulator::Launch` of `emulator.cpp`.
#[repr(C)]
struct RawLaunch {
    grid: [u32; 3],
    threads: u32,
    shared: u32,
    order: u32,
    late: u32,
    seed: u64,
    passed_file: *const c_char,
    passed_line: c_int,
    args: *const *const c_void,
    error: *mut c_char,
    error_bytes: u64,
    fault: *mut u64,
}

/// `emulator::Memory` of `emulator.cpp`.
#[repr(C)]
struct RawMemory {
    map: *mut u8,
    start: *mut u8,
    map_bytes: u64,
    bytes: u64,
}

unsafe extern "C" {
    fn emulator_kernels(unit: u32) -> *const RawKernel;
    fn emulator_launch(kernel: *const RawKernel, launch: *const RawLaunch) -> c_int;
    fn emulator_site(i: u32, file: *mut *const c_char, line: *mut c_int) -> c_int;
    fn emulator_alloc(memory: *mut RawMemory, bytes: u64, fill: u8) -> c_int;
    fn emulator_free(memory: *const RawMemory);
    fn emulator_intact(memory: *const RawMemory) -> c_int;
}

/// A kernel of the table.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    /// Its name.
    pub(crate) name: &'static str,
    /// A letter a parameter: `p`, `i` or `f`.
    pub(crate) types: &'static str,
    /// The most threads of a block.
    pub(crate) threads: u32,
    raw: &'static RawKernel,
}

// SAFETY: the table is only read, by anyone.
unsafe impl Sync for RawKernel {}

/// All kernels, in the order of their files.
pub(crate) fn kernels() -> Vec<Kernel> {
    let mut found = vec![];
    for unit in 0.. {
        // SAFETY: any number may be asked for; null says that there is no such file.
        let mut at = unsafe { emulator_kernels(unit) };
        if at.is_null() {
            break;
        }
        // SAFETY: a table lives for ever and ends with an entry without a name.
        while let Some(raw) = unsafe { at.as_ref() }.filter(|raw| !raw.name.is_null()) {
            // SAFETY: names and types are literals of C++.
            let text = |from| unsafe { CStr::from_ptr(from) }.to_str().unwrap_or("");
            found.push(Kernel {
                name: text(raw.name),
                types: text(raw.types),
                threads: raw.threads,
                raw,
            });
            // SAFETY: this was not the last entry.
            at = unsafe { at.add(1) };
        }
    }
    found
}

/// How a kernel is to be run; `args` are the bits of its arguments, in their order.
pub(crate) struct Launch<'a> {
    pub(crate) grid: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared: u32,
    pub(crate) order: u32,
    pub(crate) late: bool,
    pub(crate) seed: u64,
    pub(crate) passed: Option<Site>,
    pub(crate) args: &'a [u64],
}

/// Why a launch failed, and the address that it touched wrongly, if any.
pub(crate) struct Failure {
    pub(crate) text: String,
    pub(crate) address: Option<u64>,
}

/// There is one emulated device in a process: launches of several threads wait for each other.
static DEVICE: Mutex<()> = Mutex::new(());

/// Runs a kernel, whose parameters are as many as there are `args`, to its end.
pub(crate) fn launch(kernel: Kernel, launch: &Launch) -> Result<(), Failure> {
    assert_eq!(kernel.types.len(), launch.args.len(), "arguments of {}", kernel.name);
    let args: Vec<*const c_void> =
        launch.args.iter().map(|a| std::ptr::from_ref(a).cast()).collect();
    let mut error = [0u8; 1024];
    let mut fault = 0u64;
    let raw = RawLaunch {
        grid: launch.grid,
        threads: launch.threads,
        shared: launch.shared,
        order: launch.order,
        late: launch.late.into(),
        seed: launch.seed,
        passed_file: launch.passed.map_or(std::ptr::null(), |site| site.file.as_ptr()),
        passed_line: launch.passed.map_or(0, |site| site.line.cast_signed()),
        args: args.as_ptr(),
        error: error.as_mut_ptr().cast(),
        error_bytes: error.len() as u64,
        fault: &raw mut fault,
    };
    let device = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: kernel and launch are complete and live through the call, nobody else launches; each
    // argument has the eight bytes that the longest parameter has. What the kernel does with its
    // memory is its own: it is the code under test.
    let failed = unsafe { emulator_launch(kernel.raw, &raw const raw) } != 0;
    drop(device);
    if !failed {
        return Ok(());
    }
    let end = error.iter().position(|&b| b == 0).unwrap_or(error.len());
    let text = String::from_utf8_lossy(&error[..end]).into_owned();
    Err(Failure { text, address: (fault != 0).then_some(fault) })
}

/// Barriers and waits that kernels have come to so far.
pub(crate) fn sites() -> Vec<Site> {
    let _device = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut found, mut file, mut line) = (vec![], std::ptr::null(), 0);
    // SAFETY: both are there to be written, and no kernel runs meanwhile.
    while unsafe { emulator_site(found.len() as u32, &raw mut file, &raw mut line) } != 0 {
        // SAFETY: a literal of C++.
        let file = unsafe { CStr::from_ptr(file) };
        found.push(Site { file, line: line.cast_unsigned() });
    }
    found
}

/// Device memory: its ends are guarded, and it is freed when dropped.
pub(crate) struct Memory(RawMemory);

// SAFETY: it is plain memory that nothing else refers to.
unsafe impl Send for Memory {}

impl Memory {
    /// Takes `bytes` of memory filled with `fill`, aligned to 256; `None` if there is none.
    pub(crate) fn new(bytes: usize, fill: u8) -> Option<Self> {
        let none = std::ptr::null_mut();
        let mut raw = RawMemory { map: none, start: none, map_bytes: 0, bytes: 0 };
        // SAFETY: `raw` is there to be written.
        let failed = unsafe { emulator_alloc(&raw mut raw, bytes as u64, fill) } != 0;
        (!failed).then_some(Self(raw))
    }

    /// Its address.
    pub(crate) fn address(&self) -> u64 {
        self.0.start.addr() as u64
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: all bytes are filled; no kernel runs while they are borrowed, since running one
        // needs the emulator that owns this memory for itself.
        unsafe { std::slice::from_raw_parts(self.0.start, self.0.bytes as usize) }
    }

    /// Its bytes, to be written.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and they are borrowed only once.
        unsafe { std::slice::from_raw_parts_mut(self.0.start, self.0.bytes as usize) }
    }

    /// Whether nobody wrote before its beginning or behind its end.
    pub(crate) fn is_intact(&self) -> bool {
        // SAFETY: the memory is there.
        unsafe { emulator_intact(&raw const self.0) != 0 }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was taken once and is given back once.
        unsafe { emulator_free(&raw const self.0) }
    }
}
