//! Four rows of activations times lines of nibbles with AVX2, in assembly.
//!
//! ```text
//! totals[r] += sum over lines l of  low nibbles of l . quads[r][2 l]  +  high . quads[r][2 l + 1]
//! sums      ymm0..8    row r in 2 r (lanes 0..8) and 2 r + 1 (lanes 8..16), i16 pairs
//! codes     ymm8, 9 low nibbles, ymm10, 11 high nibbles; quad ymm12; products ymm13, 14; mask 15
//! a line    16 multiplications and 16 additions of 32 bytes each: 38 vector operations with opening
//! ```
//! All sixteen registers are in use, which a compiler misses: it keeps products alive and spills
//! sums (measured: 222 billion operations a second against 249 on a 3.2 GHz Zen 3 core, where the
//! additions and multiplications alone allow 267). Lines are flushed four at a time, as [`Simd`]
//! says. Reference: the same sums one operation after another, `grouped`'s tests compare bits.
//!
//! [`Simd`]: super::super::simd::Simd

use super::super::simd::Line;
use super::Avx2;
use std::arch::asm;
use std::arch::x86_64::__m256i;

/// Masks of nibbles, then ones of 16 bits.
#[repr(C, align(32))]
struct Constants([u8; 32], [u16; 16]);

static CONSTANTS: Constants = Constants([15; 32], [1; 16]);

/// One quad of a row times one half of a line's nibbles.
macro_rules! dot {
    ($row:literal + $at:literal, $low:literal $high:literal, $sum_low:literal $sum_high:literal) => {
        concat!(
            "vpbroadcastd ymm12, dword ptr [{",
            $row,
            "} + ",
            $at,
            "]\n",
            "vpmaddubsw ymm13, ",
            $low,
            ", ymm12\n",
            "vpmaddubsw ymm14, ",
            $high,
            ", ymm12\n",
            "vpaddw ",
            $sum_low,
            ", ",
            $sum_low,
            ", ymm13\n",
            "vpaddw ",
            $sum_high,
            ", ",
            $sum_high,
            ", ymm14\n",
        )
    };
}

/// Adds a sum to its total, the vector at byte `at` of the totals.
macro_rules! flush {
    ($sum:literal, $at:literal) => {
        concat!(
            "vpmaddwd ",
            $sum,
            ", ",
            $sum,
            ", ymm8\n",
            "vpaddd ",
            $sum,
            ", ",
            $sum,
            ", ymmword ptr [{totals} + ",
            $at,
            "]\n",
            "vmovdqu ymmword ptr [{totals} + ",
            $at,
            "], ",
            $sum,
            "\n",
        )
    };
}

/// Adds the dots of `lines` to `totals`.
///
/// # Panics
/// If a row has fewer than two quads a line.
#[inline(always)]
pub(super) fn dot_lines(
    _: Avx2,
    lines: &[Line],
    [a, b, c, d]: &[&[i32]; 4],
    totals: &mut [(__m256i, __m256i); 4],
) {
    let least = a.len().min(b.len()).min(c.len()).min(d.len());
    assert!(least >= 2 * lines.len(), "{least} quads for {} lines", lines.len());
    if lines.is_empty() {
        return;
    }
    // SAFETY: the first argument proves the features. Reads the lines, which are aligned to 64
    // bytes, and two quads of each row for each; reads and writes 256 bytes of totals. Naming the
    // low halves of the registers tells the compiler that all of each is overwritten.
    unsafe {
        asm!(
            "vmovdqa ymm15, ymmword ptr [{constants}]",
            "2:",
            "vpxor xmm0, xmm0, xmm0", "vpxor xmm1, xmm1, xmm1",
            "vpxor xmm2, xmm2, xmm2", "vpxor xmm3, xmm3, xmm3",
            "vpxor xmm4, xmm4, xmm4", "vpxor xmm5, xmm5, xmm5",
            "vpxor xmm6, xmm6, xmm6", "vpxor xmm7, xmm7, xmm7",
            "lea {until}, [{line} + 256]",
            "cmp {until}, {end}",
            "cmova {until}, {end}",
            "3:",
            "vmovdqa ymm10, ymmword ptr [{line}]",
            "vmovdqa ymm11, ymmword ptr [{line} + 32]",
            "vpand ymm8, ymm10, ymm15",
            "vpand ymm9, ymm11, ymm15",
            "vpsrlw ymm10, ymm10, 4",
            "vpsrlw ymm11, ymm11, 4",
            "vpand ymm10, ymm10, ymm15",
            "vpand ymm11, ymm11, ymm15",
            dot!("a" + 0, "ymm8" "ymm9", "ymm0" "ymm1"),
            dot!("b" + 0, "ymm8" "ymm9", "ymm2" "ymm3"),
            dot!("c" + 0, "ymm8" "ymm9", "ymm4" "ymm5"),
            dot!("d" + 0, "ymm8" "ymm9", "ymm6" "ymm7"),
            dot!("a" + 4, "ymm10" "ymm11", "ymm0" "ymm1"),
            dot!("b" + 4, "ymm10" "ymm11", "ymm2" "ymm3"),
            dot!("c" + 4, "ymm10" "ymm11", "ymm4" "ymm5"),
            dot!("d" + 4, "ymm10" "ymm11", "ymm6" "ymm7"),
            "add {a}, 8", "add {b}, 8", "add {c}, 8", "add {d}, 8",
            "add {line}, 64",
            "cmp {line}, {until}",
            "jb 3b",
            "vmovdqa ymm8, ymmword ptr [{constants} + 32]",
            flush!("ymm0", 0), flush!("ymm1", 32), flush!("ymm2", 64), flush!("ymm3", 96),
            flush!("ymm4", 128), flush!("ymm5", 160), flush!("ymm6", 192), flush!("ymm7", 224),
            "cmp {line}, {end}",
            "jb 2b",
            line = inout(reg) lines.as_ptr() => _,
            end = in(reg) lines.as_ptr_range().end,
            until = out(reg) _,
            a = inout(reg) a.as_ptr() => _,
            b = inout(reg) b.as_ptr() => _,
            c = inout(reg) c.as_ptr() => _,
            d = inout(reg) d.as_ptr() => _,
            totals = in(reg) totals.as_mut_ptr(),
            constants = in(reg) &raw const CONSTANTS,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack),
        );
    }
}
