//! The x86-64 instruction sets: proofs that the processor has them, and the one place where code
//! is compiled with them switched on.
//!
//! A value of [`Avx2`], [`Avx512`] or [`Amx`] exists only after [`detect`](Avx2::detect) has seen
//! every feature it needs; each instruction below relies on exactly that. Not here: kernels, which are
//! generic over [`Simd`](super::simd::Simd).

mod amx;
mod amx_few;
mod amx_many;
mod amx_step;
mod avx2;
mod avx2_blocks;
mod avx512;
mod avx512_blocks;
mod avx512_rows;

pub(crate) use amx::Amx;
pub(crate) use avx512_rows::{MOST_ROWS, some_rows};

use super::isa::Kernel;

/// Proof of AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

/// Proof of AVX-512 F, BW, VL and VNNI, and of all that [`Avx2`] proves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

/// The names of `features` that the processor lacks.
macro_rules! missing {
    ($($feature:tt)*) => {
        [$(($feature, is_x86_feature_detected!($feature))),*]
            .into_iter()
            .filter_map(|(name, present)| (!present).then_some(name))
            .collect::<Vec<&'static str>>()
    };
}

impl Avx2 {
    /// The proof, or the names of the features this processor lacks.
    pub(crate) fn detect() -> Result<Self, Vec<&'static str>> {
        let missing = missing!("avx2" "fma" "f16c");
        if missing.is_empty() { Ok(Self(())) } else { Err(missing) }
    }

    /// Runs a kernel compiled for this instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` exists, so the processor has these features.
        unsafe { run_avx2(self, kernel) }
    }
}

impl Avx512 {
    /// The proof, or the names of the features this processor lacks.
    pub(crate) fn detect() -> Result<Self, Vec<&'static str>> {
        let missing = missing!("avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512vl" "avx512vnni");
        if missing.is_empty() { Ok(Self(())) } else { Err(missing) }
    }

    /// Runs a kernel compiled for this instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` exists, so the processor has these features.
        unsafe { run_avx512(self, kernel) }
    }

    /// The same as a function that is not inlined.
    pub(crate) fn run_apart<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` exists, so the processor has these features.
        unsafe { run_apart_avx512(self, kernel) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(isa: Avx2, kernel: K) -> K::Output {
    kernel.run(isa)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn run_avx512<K: Kernel>(isa: Avx512, kernel: K) -> K::Output {
    kernel.run(isa)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
fn run_apart_avx512<K: Kernel>(isa: Avx512, kernel: K) -> K::Output {
    kernel.run(isa)
}
