//! Stands in for the C++ side where it could not be built: there are no kernels and no memory.
//!
//! The same names as `ffi.rs`; nothing here is ever reached, since no [`super::Emulator`] is made.

/// A kernel of the table.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    pub(crate) types: &'static str,
    pub(crate) threads: u32,
}

/// None.
pub(crate) fn kernels() -> Vec<Kernel> {
    vec![]
}

/// How a kernel is to be run.
#[allow(dead_code)]
pub(crate) struct Launch<'a> {
    pub(crate) grid: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared: u32,
    pub(crate) order: u32,
    pub(crate) late: bool,
    pub(crate) seed: u64,
    pub(crate) passed: Option<super::Site>,
    pub(crate) args: &'a [u64],
}

/// Why a launch failed.
pub(crate) struct Failure {
    pub(crate) text: String,
    pub(crate) address: Option<u64>,
}

/// Says that nothing was built.
pub(crate) fn launch(_: Kernel, _: &Launch) -> Result<(), Failure> {
    Err(Failure { text: "no emulator was built".to_owned(), address: None })
}

/// None.
pub(crate) fn sites() -> Vec<super::Site> {
    vec![]
}

/// No memory.
pub(crate) struct Memory(Vec<u8>);

impl Memory {
    pub(crate) fn new(_: usize, _: u8) -> Option<Self> {
        None
    }

    pub(crate) fn address(&self) -> u64 {
        0
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    pub(crate) fn is_intact(&self) -> bool {
        true
    }
}
