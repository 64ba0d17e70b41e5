//! Which instruction set runs the kernels: chosen once, at run time, by what the processor has.
//!
//! Not here: what the instructions do ([`super::simd`]). Input: the caller's wish or none.

#[cfg(any(test, target_arch = "x86_64"))]
use super::few_rows::{FewRows, MOST_ROWS};
use super::grouped::{GroupedLinear, STREAMS};
#[cfg(any(test, target_arch = "x86_64"))]
use super::matmul::MatrixLinear;
use super::matmul::{self, FEWEST_ROWS};
use super::quantize::{Blocks, QuadLayout};
use super::scalar::Scalar;
use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::Error;

/// An instruction set the CPU kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain code for any processor.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and VNNI.
    Avx512,
    /// The same with GFNI, and AMX int8 tiles for quantized linears over two rows and more; Linux alone.
    Amx,
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Amx];

    /// The fastest one this processor has.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.missing().is_empty()).unwrap_or(Self::Scalar)
    }

    /// Names of the processor features it needs and this processor lacks.
    pub fn missing(self) -> Vec<&'static str> {
        self.machine().err().unwrap_or_default()
    }

    /// The kernels of this instruction set.
    ///
    /// # Errors
    /// [`Error::Device`] naming the features the processor lacks.
    pub(crate) fn detect(self) -> Result<Machine, Error> {
        self.machine().map_err(|missing| Error::Device {
            device: format!("cpu {self}"),
            reason: format!(
                "this processor lacks {}: choose {} or leave the choice out",
                missing.join(", "),
                Self::best(),
            ),
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn machine(self) -> Result<Machine, Vec<&'static str>> {
        match self {
            Self::Scalar => Ok(Machine::Scalar),
            Self::Avx2 => x86::Avx2::detect().map(Machine::Avx2),
            Self::Avx512 => x86::Avx512::detect().map(Machine::Avx512),
            Self::Amx => x86::Amx::detect().map(Machine::Amx),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn machine(self) -> Result<Machine, Vec<&'static str>> {
        match self {
            Self::Scalar => Ok(Machine::Scalar),
            Self::Avx2 | Self::Avx512 | Self::Amx => Err(vec!["x86_64"]),
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        })
    }
}

/// A unit of work whose body is compiled once per instruction set.
///
/// `run` and all it calls must be `#[inline(always)]`: that is what carries the body into the
/// function that has the instruction set switched on.
pub(crate) trait Kernel {
    /// What the work yields.
    type Output;
    /// The body.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Tells how many rows of activations are multiplied together.
struct Together;

impl Kernel for Together {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::ROWS
    }
}

/// An instruction set this processor is known to have.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Machine {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
    #[cfg(target_arch = "x86_64")]
    Amx(x86::Amx),
    /// Scalar code with matrix registers in plain Rust, so that every machine tests their path.
    #[cfg(test)]
    EmulatedAmx(super::testing::EmulatedUnit),
}

impl Machine {
    /// Runs a kernel.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Scalar => kernel.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(proof) => proof.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(proof) => proof.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Amx(proof) => proof.avx512().run(kernel),
            #[cfg(test)]
            Self::EmulatedAmx(_) => kernel.run(Scalar),
        }
    }

    /// How activations are to lie for a quantized linear over `rows` rows.
    pub(crate) fn quad_layout(self, rows: usize, blocks: &Blocks) -> QuadLayout {
        let matrix_unit = self.isa() == Isa::Amx;
        match matrix_unit && rows >= FEWEST_ROWS {
            true => matmul::layout(rows, blocks),
            false => QuadLayout::together(rows, self.run(Together)),
        }
    }

    /// Streams of weights from which memory gives most: four on processors with AMX, 1.15 times as much
    /// as one (Emerald Rapids); Zen 4 got less from several.
    pub(crate) fn streams(self) -> usize {
        if self.isa() == Isa::Amx { STREAMS } else { 1 }
    }

    /// Runs a quantized linear whose activations lie as [`quad_layout`](Self::quad_layout) says.
    pub(crate) fn multiply(self, linear: GroupedLinear<'_>) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(proof) if linear.out.rows() <= x86::MOST_ROWS => {
                x86::some_rows(proof, linear);
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx(unit) if linear.out.rows() < FEWEST_ROWS => {
                x86::some_rows(unit.avx512(), linear);
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx(unit) if linear.out.rows() >= FEWEST_ROWS => {
                match linear.out.rows() <= MOST_ROWS {
                    true => unit.avx512().run(FewRows { linear, unit }),
                    false => unit.avx512().run(MatrixLinear { linear, unit }),
                }
            }
            #[cfg(test)]
            Self::EmulatedAmx(unit) if linear.out.rows() >= FEWEST_ROWS => {
                match linear.out.rows() <= MOST_ROWS {
                    true => FewRows { linear, unit }.run(Scalar),
                    false => MatrixLinear { linear, unit }.run(Scalar),
                }
            }
            _ => self.run(linear),
        }
    }

    /// Keeps the matrix unit busy, if there is one, and returns its multiplications and additions.
    pub(crate) fn matrix_products(self, rounds: usize) -> Option<usize> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(unit) => Some(unit.products(rounds)),
            _ => None,
        }
    }

    /// Its name.
    pub(crate) fn isa(self) -> Isa {
        match self {
            Self::Scalar => Isa::Scalar,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => Isa::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => Isa::Avx512,
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => Isa::Amx,
            #[cfg(test)]
            Self::EmulatedAmx(_) => Isa::Amx,
        }
    }
}
