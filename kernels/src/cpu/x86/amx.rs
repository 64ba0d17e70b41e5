//! AMX int8: eight tile registers of sixteen rows of 64 bytes, as a [`MatrixUnit`].
//!
//! Stable Rust knows no AMX, hence assembly; compiled code never touches tile registers, so that
//! they keep their contents between two blocks of it. Linux alone: the system gives tiles to
//! processes that ask. Registers 0 to 3 hold dots, 4 and 5 activations, 6 and 7 codes, as
//! [`super::amx_many`] and [`super::amx_few`] use them.
//! Not here: what is multiplied ([`super::super::matmul`]).

use super::super::few_rows;
use super::super::job::Job;
use super::super::matmul::{
    DEPTH_QUADS, MatrixRegisters, MatrixUnit, Results, STRIP_ROWS, Scratch, Shape,
};
use super::super::simd::{LANES, Line};
use super::{Avx512, amx_few, amx_many};
use quant::Bits;
use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// Proof of AMX tiles with int8 that the system lets this process use, and of all that
/// [`Avx512`] proves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx {
    avx512: Avx512,
}

impl Amx {
    /// The proof, or the names of what this processor or the system lacks. Asks the system for
    /// the permission, which holds for all threads of the process and does no harm if unused.
    pub(crate) fn detect() -> Result<Self, Vec<&'static str>> {
        let avx512 = Avx512::detect();
        let mut missing = avx512.as_ref().err().cloned().unwrap_or_default();
        if !is_x86_feature_detected!("gfni") {
            missing.push("gfni");
        }
        let features = features();
        for (name, bit) in [("amx-tile", 24), ("amx-int8", 25)] {
            if features >> bit & 1 == 0 {
                missing.push(name);
            }
        }
        if missing.is_empty() && !(enabled() && permitted()) {
            missing.push("permission of the system to use amx");
        }
        match avx512 {
            Ok(avx512) if missing.is_empty() => Ok(Self { avx512 }),
            _ => Err(missing),
        }
    }

    /// Multiplies tiles out of registers, four products a round, and returns the multiplications and
    /// additions: the most that the matrix unit can do.
    pub(crate) fn products(self, rounds: usize) -> usize {
        let shape = Shape::new(4 * DEPTH_QUADS, STRIP_ROWS);
        let registers = self.configure(shape);
        // SAFETY: the registers are configured; what is in them does not matter.
        unsafe {
            asm!(
                "2:",
                "tdpbssd tmm0, tmm4, tmm6",
                "tdpbssd tmm1, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) rounds.max(1) => _,
                options(nostack, nomem),
            );
        }
        drop(registers);
        rounds.max(1) * 4 * 2 * STRIP_ROWS * LANES * 4 * shape.quads
    }

    /// The vector instructions beside it.
    pub(crate) fn avx512(self) -> Avx512 {
        self.avx512
    }
}

/// Register EDX of CPUID leaf 7.
fn features() -> u32 {
    if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx }
}

/// Whether the system has switched on tile shapes (bit 17 of XCR0) and tiles (bit 18).
fn enabled() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const TILES: u64 = 1 << 17 | 1 << 18;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the instruction exists; it reads a register.
    let switched_on = unsafe { _xgetbv(0) };
    switched_on & TILES == TILES
}

/// Asks Linux to let this process use tiles; it says yes again to one that already may.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XTILEDATA: usize = 18;
    let status: isize;
    // SAFETY: this system call takes two numbers and touches no memory of the process; like every
    // system call it changes no registers but rax, rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    status == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The operand of `ldtilecfg`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Of each register, the bytes of a row; registers 8 to 15 do not exist.
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    const fn of(shape: Shape) -> Self {
        let (line, x) = (4 * LANES as u16, 4 * shape.quads as u16);
        let (rows, deep) = (shape.rows as u8, shape.quads as u8);
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [line, line, line, line, x, x, line, line, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [rows, rows, rows, rows, rows, rows, deep, deep, 0, 0, 0, 0, 0, 0, 0, 0],
        }
    }
}

/// This thread's tile registers.
#[derive(Debug)]
pub(crate) struct Registers {
    shape: Shape,
    /// Another thread's registers are others.
    here: PhantomData<*const ()>,
}

impl MatrixUnit for Amx {
    type Registers = Registers;

    #[inline(always)]
    fn configure(self, shape: Shape) -> Registers {
        assert!((1..=DEPTH_QUADS).contains(&shape.quads) && (1..=STRIP_ROWS).contains(&shape.rows));
        let shapes = Shapes::of(shape);
        // SAFETY: `self` proves the instruction and the permission; the operand has 64 bytes.
        unsafe {
            asm!("ldtilecfg [{shapes}]", shapes = in(reg) &raw const shapes, options(nostack))
        }
        Registers { shape, here: PhantomData }
    }
}

impl Drop for Registers {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: `self` came from `configure`, which had the proof.
        unsafe { asm!("tilerelease", options(nostack)) }
    }
}

impl MatrixRegisters for Registers {
    #[inline(always)]
    fn few_rows(
        &self,
        job: &Job<'_>,
        scratch: &mut few_rows::Scratch,
        done: impl FnMut(few_rows::Round, &mut [[f32; LANES]]),
    ) {
        // SAFETY: the registers are configured, see `configure`, and `self` came from a proof of AVX-512.
        unsafe { amx_few::few_rows(self.shape, job, scratch, done) }
    }

    #[inline(always)]
    fn many_rows(
        &self,
        job: &Job<'_>,
        rows: usize,
        scratch: &mut Scratch,
        results: &mut impl Results,
    ) {
        // SAFETY: the registers are configured, see `configure`; each thread has one `Registers` at a time.
        unsafe { amx_many::many_rows(self.shape, job, rows, scratch, results) }
    }
}

/// What opens codes: 4 bits become `code - zero`, 8 bits `code - 128`.
///
/// A code less 8 is linear in its bits over GF(2): as a signed byte its bits 0 to 2 are those of the code,
/// and bits 3 to 7 the code's bit 3 turned over. So one affine operation takes a nibble and lowers it.
#[derive(Clone, Copy)]
pub(super) struct Opener {
    low: __m512i,
    high: __m512i,
    /// Zero points less 8; none if all are 8.
    zero: Option<__m512i>,
}

/// A matrix that takes bits `first` to `first + 3` of a byte: row `7 - i` of eight bits chooses those of
/// which bit `i` is the sum.
const fn nibble(first: u32) -> i64 {
    let (mut rows, mut bit) = (0u64, 0);
    while bit < 8 {
        let from = if bit < 3 { bit } else { 3 };
        rows |= 1 << (first + from) << (8 * (7 - bit));
        bit += 1;
    }
    rows as i64
}

impl Opener {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(zero: Option<__m512i>) -> Self {
        let (low, high) = (_mm512_set1_epi64(nibble(0)), _mm512_set1_epi64(nibble(4)));
        Self { low, high, zero }
    }

    /// For a zero point of all rows.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn all(zero: i32) -> Self {
        Self::new((zero != 8).then(|| _mm512_set1_epi8((zero as i8).wrapping_sub(8))))
    }

    /// For those of sixteen rows.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    pub(super) fn each(zeros: &[u8; LANES]) -> Self {
        // SAFETY: there are sixteen.
        let zeros = unsafe { _mm_loadu_si128(zeros.as_ptr().cast()) };
        let zeros = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(zeros), _mm512_set1_epi32(0x0101_0101));
        Self::new(Some(_mm512_sub_epi8(zeros, _mm512_set1_epi8(8))))
    }

    /// Writes the signed codes of a line: two lines if they have 4 bits, else one. Returns where the next go.
    ///
    /// # Safety
    /// There must be room.
    #[target_feature(enable = "gfni,avx512f,avx512bw")]
    #[inline]
    pub(super) unsafe fn line(self, bits: Bits, line: &Line, out: *mut Line) -> *mut Line {
        /// Bits 3 to 7.
        const TURNED: i32 = 0xf8;
        // SAFETY: lines are aligned to 64 bytes; the caller promises the room.
        unsafe {
            let line = _mm512_load_si512((&raw const *line).cast());
            if bits == Bits::Eight {
                // Less 128, which is the highest bit turned over.
                _mm512_store_si512(out.cast(), _mm512_xor_si512(line, _mm512_set1_epi8(-128)));
                return out.add(1);
            }
            let mut low = _mm512_gf2p8affine_epi64_epi8::<TURNED>(line, self.low);
            let mut high = _mm512_gf2p8affine_epi64_epi8::<TURNED>(line, self.high);
            if let Some(zero) = self.zero {
                (low, high) = (_mm512_sub_epi8(low, zero), _mm512_sub_epi8(high, zero));
            }
            _mm512_store_si512(out.cast(), low);
            _mm512_store_si512(out.add(1).cast(), high);
            out.add(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_fit_each_other_as_products_need_them() {
        for (quads, rows) in (1..=16).flat_map(|quads| [(quads, 8), (quads, 16)]) {
            let shapes = Shapes::of(Shape { quads, depths: 1, rows });
            let (bytes, height) = (shapes.row_bytes, shapes.rows);
            for (dots, x, w) in [(0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)] {
                assert_eq!((height[dots], bytes[dots]), (height[x], bytes[w]), "{quads} quads");
                assert_eq!(usize::from(bytes[x]), 4 * usize::from(height[w]));
                assert_eq!((usize::from(height[w]), usize::from(height[x])), (quads, rows));
            }
            assert!(bytes.iter().all(|b| *b <= 64) && height.iter().all(|r| *r <= 16));
        }
        assert_eq!((size_of::<Shapes>(), align_of::<Shapes>()), (64, 64));
    }

    #[test]
    fn what_is_missing_is_named() {
        match Amx::detect() {
            Ok(_) => println!("skipped: nothing is missing here"),
            Err(missing) => assert!(missing.iter().all(|name| !name.is_empty()), "{missing:?}"),
        }
    }
}
