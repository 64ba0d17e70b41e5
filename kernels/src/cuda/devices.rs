//! Which CUDA devices there are, and a device taken for use.
//!
//! Not here: what is done with one ([`super::driver`]). Asks the driver; without one, the reason is
//! the answer.

#![allow(unsafe_code)]

use super::Arch;
use super::api::{Api, Failure};
use crate::Error;
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUresult};
use std::ffi::{CStr, c_char, c_int};

/// A device as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As in `cuda:0`.
    pub index: usize,
    /// Its product name.
    pub name: String,
    /// Compute capability, as in (8, 6).
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of its memory.
    pub memory: usize,
    /// Bytes of it that nobody uses now.
    pub free: usize,
    /// Newest version of CUDA that the driver serves.
    pub driver: (u32, u32),
}

impl DeviceInfo {
    /// What kernels are compiled for.
    pub fn arch(&self) -> Arch {
        Arch::of(self.capability.0, self.capability.1)
    }
}

/// All CUDA devices, in the driver's order; at least one.
///
/// # Errors
/// [`Error::Device`] says why there is none: no driver, an old one, no device.
pub fn devices() -> Result<Vec<DeviceInfo>, Error> {
    let api = Api::get().map_err(none)?;
    let count = count(api).map_err(none)?;
    (0..count).map(|index| Context::take(api, index)?.info()).collect()
}

fn none(reason: String) -> Error {
    Error::Device { device: "cuda".to_owned(), reason }
}

fn count(api: &Api) -> Result<usize, String> {
    let mut count = 0;
    // SAFETY: it points to an integer.
    let code = unsafe { sys::cuDeviceGetCount(&raw mut count) };
    api.check(code).map_err(|failure| format!("the NVIDIA driver finds no device: {failure}"))?;
    match usize::try_from(count) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("the NVIDIA driver finds no device".to_owned()),
    }
}

/// A device's primary context: held until dropped.
pub(super) struct Context {
    pub(super) api: &'static Api,
    index: usize,
    device: CUdevice,
    handle: CUcontext,
}

// SAFETY: a context may be used from any thread, by one at a time as `&mut` or after
// `make_current` there; it has no state of the thread that made it.
unsafe impl Send for Context {}

impl Context {
    /// Takes device `index`, and makes it the current one of this thread.
    ///
    /// # Errors
    /// [`Error::Device`]: no such device, or the driver's reason.
    pub(super) fn open(index: usize) -> Result<Self, Error> {
        let api = Api::get().map_err(none)?;
        let count = count(api).map_err(none)?;
        if index >= count {
            let reason = format!("there is no such device, only {count}, counted from 0");
            return Err(Error::Device { device: format!("cuda:{index}"), reason });
        }
        Self::take(api, index)
    }

    fn take(api: &'static Api, index: usize) -> Result<Self, Error> {
        let mut device = 0;
        let ordinal = c_int::try_from(index).unwrap_or(c_int::MAX);
        let mut handle = std::ptr::null_mut();
        // SAFETY: it points to an integer.
        let got = api.check(unsafe { sys::cuDeviceGet(&raw mut device, ordinal) });
        // SAFETY: the device is one that the driver gave.
        let mut retain =
            || api.check(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut handle, device) });
        got.and_then(|()| retain()).map_err(|failure| Error::Device {
            device: format!("cuda:{index}"),
            reason: format!("the device cannot be used: {failure}"),
        })?;
        let context = Self { api, index, device, handle };
        context.make_current()?;
        Ok(context)
    }

    /// As in `cuda:0`.
    pub(super) fn name(&self) -> String {
        format!("cuda:{}", self.index)
    }

    /// An error of this device: what was asked, and the driver's reason.
    pub(super) fn error(&self, asked: &str, failure: &Failure) -> Error {
        Error::Device { device: self.name(), reason: format!("{asked}: {failure}") }
    }

    /// What `code` means, for something that was `asked`.
    pub(super) fn check(&self, code: CUresult, asked: &str) -> Result<(), Error> {
        self.api.check(code).map_err(|failure| self.error(asked, &failure))
    }

    /// The calling thread's calls go to this device from now on.
    pub(super) fn make_current(&self) -> Result<(), Error> {
        // SAFETY: the context is held.
        self.check(unsafe { sys::cuCtxSetCurrent(self.handle) }, "choosing the device")
    }

    /// Bytes that nobody uses, and all; the context must be current.
    pub(super) fn memory(&self) -> Result<(usize, usize), Error> {
        let (mut free, mut all) = (0, 0);
        // SAFETY: both point to integers.
        let code = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut all) };
        self.check(code, "asking for free memory").map(|()| (free, all))
    }

    fn attribute(&self, which: CUdevice_attribute) -> Result<u32, Error> {
        let mut value = 0;
        // SAFETY: it points to an integer; the device is one that the driver gave.
        let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, self.device) };
        self.check(code, "asking for an attribute")?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    fn product(&self) -> Result<String, Error> {
        let mut bytes: [c_char; 256] = [0; 256];
        // SAFETY: it writes at most 255 bytes and a zero; the device is one that the driver gave.
        let code = unsafe { sys::cuDeviceGetName(bytes.as_mut_ptr(), 255, self.device) };
        self.check(code, "asking for the name")?;
        // SAFETY: the array's last byte at the latest is a zero.
        Ok(unsafe { CStr::from_ptr(bytes.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// What the driver says of the device; the context must be current.
    pub(super) fn info(&self) -> Result<DeviceInfo, Error> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let (free, memory) = self.memory()?;
        Ok(DeviceInfo {
            index: self.index,
            name: self.product()?,
            capability: (self.attribute(MAJOR)?, self.attribute(MINOR)?),
            multiprocessors: self.attribute(MULTIPROCESSORS)?,
            memory,
            free,
            driver: self.api.version(),
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `take`, not used again. A failure could only leak.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_device_the_reason_is_one_sentence() {
        match devices() {
            Ok(found) => {
                println!("{found:?}");
                assert!(!found.is_empty());
            }
            Err(error) => {
                let said = error.to_string();
                println!("{said}");
                assert!(said.contains("NVIDIA driver") && !said.contains('\n'), "{said}");
                let same = Context::open(0).map(|_| ()).unwrap_err().to_string();
                assert_eq!(same, said, "the second answer is the first");
            }
        }
    }
}
