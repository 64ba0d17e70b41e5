//! AMX int8: eight tile registers of sixteen rows of 64 bytes, as a [`MatrixUnit`].
//!
//! ```text
//! tmm0 tmm1   dots of rows 0..16 with panel 0, panel 1    i32 [16, 16]
//! tmm2 tmm3   dots of rows 16..32                         i32 [16, 16]
//! tmm4 tmm5   activations of rows 0..16, 16..32           i8 [16, quads of a step x 4]
//! tmm6 tmm7   panel 0, panel 1                            i8 [quads of a step, 16 x 4]
//! ```
//! Stable Rust knows no AMX, hence assembly: one block of it loads, multiplies and stores, so that
//! no tile outlives it. Only the shapes do, which compiled code never touches. Linux alone: the
//! system gives tiles to processes that ask. Not here: what is multiplied
//! ([`super::super::matmul`]).

use super::super::matmul::{
    Dots, MatrixRegisters, MatrixUnit, PRODUCT_ROWS, Panel, STEP_QUADS, Steps, TILE_ROWS,
};
use super::super::simd::LANES;
use super::Avx512;
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
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
    /// For steps of `quads` quads.
    const fn of(quads: usize) -> Self {
        let (line, x, rows) = (4 * LANES as u16, 4 * quads as u16, TILE_ROWS as u8);
        let deep = quads as u8;
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [line, line, line, line, x, x, line, line, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [rows, rows, rows, rows, rows, rows, deep, deep, 0, 0, 0, 0, 0, 0, 0, 0],
        }
    }
}

/// Shapes for steps of 1 to 16 quads; the first is not used.
static SHAPES: [Shapes; STEP_QUADS + 1] = {
    let mut all = [Shapes::of(1); STEP_QUADS + 1];
    let mut quads = 1;
    while quads <= STEP_QUADS {
        all[quads] = Shapes::of(quads);
        quads += 1;
    }
    all
};

/// Assembly that changes tile registers.
macro_rules! tiles {
    ($($code:tt)*) => {
        asm!(
            $($code)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// This thread's tile registers.
#[derive(Debug)]
pub(crate) struct Registers {
    steps: Steps,
    /// Another thread's registers are others.
    here: PhantomData<*const ()>,
}

impl MatrixUnit for Amx {
    type Registers = Registers;

    #[inline(always)]
    fn configure(self, steps: Steps) -> Registers {
        let shapes: &Shapes = &SHAPES[steps.quads];
        // SAFETY: `self` proves the instruction and the permission; the operand has 64 bytes.
        unsafe { tiles!("ldtilecfg [{shapes}]", shapes = in(reg) shapes,) }
        Registers { steps, here: PhantomData }
    }
}

impl Drop for Registers {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: `self` came from `configure`, which had the proof.
        unsafe { tiles!("tilerelease",) }
    }
}

impl MatrixRegisters for Registers {
    #[inline(always)]
    fn product(&self, x: &[i32], panel: &Panel, dots: &mut Dots) {
        let Steps { count, quads } = self.steps;
        let row = 4 * self.steps.block_quads();
        assert!(count > 0 && x.len() * 4 >= PRODUCT_ROWS * row);
        // SAFETY: the registers are configured for `steps`, see `configure`; each thread has one
        // `Registers` at a time. Step i reads 32 rows of 4 * quads bytes, `row` bytes apart, from
        // byte i * 4 * quads of `x` on, which holds 32 rows of count * quads quads; and lines
        // i * quads .. (i + 1) * quads of both panels, which hold at least count * quads lines.
        // The results are the four quarters of `dots`.
        unsafe {
            tiles!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{x0} + {row}]",
                "tileloadd tmm6, [{w} + {line}]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {line} + {second}]",
                "tdpbssd tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{x1} + {row}]",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
                "add {x0}, {x_step}",
                "add {x1}, {x_step}",
                "add {w}, {w_step}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{y} + {line}], tmm0",
                "tilestored [{y} + {line} + {quarter}], tmm2",
                "tilestored [{y} + {line} + 2 * {quarter}], tmm1",
                "tilestored [{y} + {line} + 3 * {quarter}], tmm3",
                x0 = inout(reg) x.as_ptr() => _,
                x1 = inout(reg) x.as_ptr().byte_add(TILE_ROWS * row) => _,
                w = inout(reg) panel.as_ptr() => _,
                y = in(reg) &raw mut *dots,
                row = in(reg) row,
                line = in(reg) 4 * LANES,
                x_step = in(reg) 4 * quads,
                w_step = in(reg) 4 * LANES * quads,
                steps = inout(reg) count => _,
                second = const size_of::<Panel>() / 2,
                quarter = const size_of::<Dots>() / 4,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_fit_each_other_as_products_need_them() {
        for (quads, shapes) in SHAPES.iter().enumerate().skip(1) {
            let (bytes, rows) = (shapes.row_bytes, shapes.rows);
            for (dots, x, w) in [(0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)] {
                assert_eq!((rows[dots], bytes[dots]), (rows[x], bytes[w]), "{quads} quads");
                assert_eq!(usize::from(bytes[x]), 4 * usize::from(rows[w]));
                assert_eq!(usize::from(rows[w]), quads);
            }
            assert!(bytes.iter().all(|b| *b <= 64) && rows.iter().all(|r| *r <= 16));
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
