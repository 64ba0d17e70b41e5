//! The NVIDIA driver: opened at run time, so that one binary runs with and without it.
//!
//! The functions are those of `cudarc`, which looks each up when it is first called and panics where
//! there is none: so the library is looked for first, and a driver too old to have them all is
//! refused. Not here: devices ([`super::devices`]), what is done with one ([`super::driver`]).

#![allow(unsafe_code)]

use cudarc::driver::sys::{self, CUresult};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int};
use std::panic::catch_unwind;
use std::sync::OnceLock;

/// Oldest driver, as `cuDriverGetVersion` counts: CUDA 12.0, which has all functions that are called.
const VERSION_MIN: c_int = 12000;

/// Where a Windows host lends its driver to Linux guests, where nobody looks by itself.
const WSL: &str = "/usr/lib/wsl/lib/libcuda.so.1";

/// A driver that is there and initialized.
#[derive(Debug)]
pub(super) struct Api {
    /// As `cuDriverGetVersion` counts: 12040 is CUDA 12.4.
    version: c_int,
}

/// What a function of the driver returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) code: CUresult,
    /// The driver's name of the code and its sentence.
    pub(super) text: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.text)
    }
}

impl Api {
    /// The driver of this machine, opened once, or why there is none.
    pub(super) fn get() -> Result<&'static Self, String> {
        static API: OnceLock<Result<Api, String>> = OnceLock::new();
        let open = || {
            let broken = |_| Err("the NVIDIA driver lacks a function: install a newer one".into());
            catch_unwind(Self::open).unwrap_or_else(broken)
        };
        API.get_or_init(open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self, String> {
        // SAFETY: a library of this name is NVIDIA's driver, whose initialization asks nothing of
        // its caller. Once it is open, the same name finds it; it is never closed.
        if let Ok(library) = unsafe { Library::new(WSL) } {
            std::mem::forget(library);
        }
        // SAFETY: as above.
        if !unsafe { sys::is_culib_present() } {
            return Err("no NVIDIA driver on this machine (libcuda was not found)".to_owned());
        }
        let mut api = Self { version: 0 };
        // SAFETY: it points to an integer.
        let version = unsafe { sys::cuDriverGetVersion(&raw mut api.version) };
        let unstarted = |failure| format!("the NVIDIA driver does not start: {failure}");
        api.check(version).map_err(unstarted)?;
        if api.version < VERSION_MIN {
            let (major, minor) = api.version();
            return Err(format!(
                "the NVIDIA driver serves CUDA {major}.{minor}: 12.0 is the oldest"
            ));
        }
        // SAFETY: the only flags there are.
        api.check(unsafe { sys::cuInit(0) }).map_err(unstarted)?;
        Ok(api)
    }

    /// Newest version of CUDA that the driver serves.
    pub(super) fn version(&self) -> (u32, u32) {
        let version = u32::try_from(self.version).unwrap_or(0);
        (version / 1000, version % 1000 / 10)
    }

    /// What a returned `code` means.
    pub(super) fn check(&self, code: CUresult) -> Result<(), Failure> {
        if code == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        let text = |of: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
            let mut text: *const c_char = std::ptr::null();
            // SAFETY: it sets `text` to a constant of the driver's, or to nothing.
            let found = unsafe { of(code, &raw mut text) };
            let found = found == CUresult::CUDA_SUCCESS && !text.is_null();
            // SAFETY: not null, it ends with a zero and is never freed.
            found.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("{code:?}"));
        let why = text(sys::cuGetErrorString).map_or(String::new(), |why| format!(": {why}"));
        Err(Failure { code, text: name + &why })
    }
}
