//! GPU kernels as text: CUDA C++ and WGSL sources, compiled at run time by the backends.
//!
//! Not here: anything that talks to a device. No GPU backend is built yet, so no source is listed.

#![forbid(unsafe_code)]

/// One kernel source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// File name, such as `wgsl/linear_w4.wgsl`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// All sources of this build.
pub const SOURCES: &[Source] = &[];
