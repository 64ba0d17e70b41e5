//! One to four rows of activations times blocks of nibbles with AVX2, in assembly.
//!
//! ```text
//! acc[r] += scale * x_scale[r, b] * ( sum over lines l of block b of  low nibbles of l . quad[r, 2 l]
//!                                     + high . quad[r, 2 l + 1]  +  zero * x_sum[r, b] )
//! sums   ymm0..8   row r in 2 r (lanes 0..8) and 2 r + 1 (lanes 8..16): i16 pairs of a flush
//! codes  ymm8, 9 low nibbles, ymm10, 11 high; quad ymm12; products ymm13, 14; mask of nibbles 15
//! end of a block   ymm8, 9 scale, ymm10, 11 zero, ymm15 ones of 16 bits
//! a line           8 vector operations a row and 6 to open it; a block's end 11 a row and 4
//! ```
//! All sixteen registers are in use, which a compiler misses: it keeps products alive and spills
//! sums. A flush holds four lines, as [`Simd`] says; most blocks have at most two, of which the first is noted
//! and not added. With the ends of
//! blocks in it too, two rows take 0.7 of the time of the lines alone in assembly and the rest in
//! Rust, four 0.8 and eight 0.75 (1536 x 256 in the cache of a 3.2 GHz Zen 3 core).
//! Reference: the same sums one operation after another, `grouped`'s tests compare bits.
//!
//! [`Simd`]: super::super::simd::Simd

use super::super::blocks::CodeBlocks;
use super::super::quantize::BlockScale;
use super::super::simd::{LANES, Line, Simd};
use super::Avx2;
use std::arch::asm;
use std::mem::offset_of;

/// What the assembly reads and writes beside its operands.
#[repr(C, align(32))]
struct Frame {
    mask: [u8; 32],
    ones: [u16; 16],
    scale: [f32; LANES],
    zero: [i32; LANES],
    /// Sums of a block's flushes but the last.
    totals: [[i32; LANES]; 4],
    block_bytes: usize,
    end: *const Line,
    /// From the end of the first row's block to the next block.
    quads_skipped: usize,
    scales_step: usize,
}

const _: () = assert!(offset_of!(Frame, totals) == 192 && offset_of!(Frame, zero) == 128);
const _: () = assert!(offset_of!(Frame, block_bytes) == 448 && offset_of!(Frame, end) == 456);
const _: () = assert!(offset_of!(Frame, quads_skipped) == 464);
const _: () = assert!(offset_of!(Frame, scales_step) == 472);
const _: () = assert!(offset_of!(BlockScale, scale) == 0 && offset_of!(BlockScale, sum) == 4);

macro_rules! zero {
    ($low:literal $high:literal) => {
        concat!("vpxor ", $low, ", ", $low, ", ", $low, "\nvpxor ", $high, ", ", $high, ", ", $high)
    };
}

/// One quad of a row times one half of a line's nibbles.
macro_rules! dot {
    ($at:literal $row:literal, $low:literal $high:literal, $sum_low:literal $sum_high:literal) => {
        concat!(
            "vpbroadcastd ymm12, dword ptr [{quads}",
            $row,
            " + ",
            $at,
            "]\nvpmaddubsw ymm13, ",
            $low,
            ", ymm12\nvpmaddubsw ymm14, ",
            $high,
            ", ymm12\nvpaddw ",
            $sum_low,
            ", ",
            $sum_low,
            ", ymm13\nvpaddw ",
            $sum_high,
            ", ",
            $sum_high,
            ", ymm14"
        )
    };
}

/// Totals of a block begin.
macro_rules! clear {
    ($at:literal) => {
        concat!("vmovdqa ymmword ptr [{frame} + 192 + ", $at, "], ymm13")
    };
}

/// Pairs of 16 bits become 32 bits and are added to the totals.
macro_rules! flush_more {
    ($sum:literal $at:literal) => {
        concat!(
            "vpmaddwd ",
            $sum,
            ", ",
            $sum,
            ", ymm15\nvpaddd ",
            $sum,
            ", ",
            $sum,
            ", ymmword ptr [{frame} + 192 + ",
            $at,
            "]\nvmovdqa ymmword ptr [{frame} + 192 + ",
            $at,
            "], ",
            $sum
        )
    };
}

/// Pairs of 16 bits become 32 bits and are the totals.
macro_rules! flush {
    ($sum:literal $at:literal) => {
        concat!(
            "vpmaddwd ",
            $sum,
            ", ",
            $sum,
            ", ymm15\nvmovdqa ymmword ptr [{frame} + 192 + ",
            $at,
            "], ",
            $sum
        )
    };
}

/// The end of a block for eight lanes of a row: `times` holds zero * sum, then scale * x_scale.
macro_rules! finish {
    ($sum:literal $at:literal, $zero:literal $scale:literal) => {
        concat!(
            "vpmaddwd ",
            $sum,
            ", ",
            $sum,
            ", ymm15\n",
            "vpaddd ",
            $sum,
            ", ",
            $sum,
            ", ymmword ptr [{frame} + 192 + ",
            $at,
            "]\n",
            "vpmulld ymm13, ymm12, ",
            $zero,
            "\n",
            "vpaddd ",
            $sum,
            ", ",
            $sum,
            ", ymm13\n",
            "vcvtdq2ps ",
            $sum,
            ", ",
            $sum,
            "\n",
            "vmulps ymm13, ymm14, ",
            $scale,
            "\n",
            "vfmadd213ps ",
            $sum,
            ", ymm13, ymmword ptr [{acc} + ",
            $at,
            "]\n",
            "vmovups ymmword ptr [{acc} + ",
            $at,
            "], ",
            $sum
        )
    };
}

macro_rules! finish_row {
    ($xs:literal, $low:literal $low_at:literal, $high:literal $high_at:literal) => {
        concat!(
            "vpbroadcastd ymm12, dword ptr [{scales}", $xs, " + 4]\n",
            "vbroadcastss ymm14, dword ptr [{scales}", $xs, "]\n",
            finish!($low $low_at, "ymm10" "ymm8"), "\n",
            finish!($high $high_at, "ymm11" "ymm9")
        )
    };
}

/// The loop over blocks for the rows that are listed: the offsets of their quads and scales, their
/// sums, and where those lie in totals and accumulators.
macro_rules! blocks {
    ($job:expr, $frame:expr, $acc:expr;
     $($quads:literal $scales:literal $low:literal $low_at:literal $high:literal $high_at:literal),+) => {
        asm!(
            "vmovdqa ymm15, ymmword ptr [{frame}]",
            "# strides {q1} {q3}",
            "2:",
            "mov {block_end}, {line}",
            "add {block_end}, qword ptr [{frame} + 448]",
            "cmp qword ptr [{frame} + 448], 512",
            "jbe 3f",
            "vpxor ymm13, ymm13, ymm13",
            $(clear!($low_at), clear!($high_at),)+
            "3:",
            "lea {until}, [{line} + 256]",
            "cmp {until}, {block_end}",
            "cmova {until}, {block_end}",
            $(zero!($low $high),)+
            "4:",
            "vmovdqa ymm10, ymmword ptr [{line}]",
            "vmovdqa ymm11, ymmword ptr [{line} + 32]",
            "prefetcht0 byte ptr [{ahead}]",
            "add {ahead}, 64",
            "vpand ymm8, ymm10, ymm15",
            "vpand ymm9, ymm11, ymm15",
            "vpsrlw ymm10, ymm10, 4",
            "vpsrlw ymm11, ymm11, 4",
            "vpand ymm10, ymm10, ymm15",
            "vpand ymm11, ymm11, ymm15",
            $(dot!("0" $quads, "ymm8" "ymm9", $low $high),)+
            $(dot!("4" $quads, "ymm10" "ymm11", $low $high),)+
            "add {quads}, 8",
            "add {line}, 64",
            "cmp {line}, {until}",
            "jb 4b",
            "vmovdqa ymm15, ymmword ptr [{frame} + 32]",
            "cmp {line}, {block_end}",
            "je 5f",
            "cmp qword ptr [{frame} + 448], 512",
            "ja 6f",
            $(flush!($low $low_at), flush!($high $high_at),)+
            "vmovdqa ymm15, ymmword ptr [{frame}]",
            "jmp 3b",
            "6:",
            $(flush_more!($low $low_at), flush_more!($high $high_at),)+
            "vmovdqa ymm15, ymmword ptr [{frame}]",
            "jmp 3b",
            "5:",
            "vmovaps ymm8, ymmword ptr [{frame} + 64]",
            "vmovaps ymm9, ymmword ptr [{frame} + 96]",
            "vmovdqa ymm10, ymmword ptr [{frame} + 128]",
            "vmovdqa ymm11, ymmword ptr [{frame} + 160]",
            $(finish_row!($scales, $low $low_at, $high $high_at),)+
            "vmovdqa ymm15, ymmword ptr [{frame}]",
            "add {quads}, qword ptr [{frame} + 464]",
            "add {scales}, qword ptr [{frame} + 472]",
            "cmp {line}, qword ptr [{frame} + 456]",
            "jb 2b",
            line = inout(reg) $job.lines.as_ptr() => _,
            block_end = out(reg) _,
            until = out(reg) _,
            quads = inout(reg) $job.quads.as_ptr() => _,
            q1 = in(reg) $job.block_lines * 8,
            q3 = in(reg) $job.block_lines * 24,
            scales = inout(reg) $job.scales.as_ptr() => _,
            ahead = inout(reg) $job.ahead.as_ptr() => _,
            frame = in(reg) $frame,
            acc = in(reg) $acc,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack),
        )
    };
}

/// Adds `job`'s blocks to the accumulators of `R` rows, 1 to 4.
///
/// # Panics
/// If a slice is shorter than its lines and rows need.
#[inline(always)]
pub(super) fn dot_blocks<const R: usize>(
    isa: Avx2,
    job: &CodeBlocks<'_, Avx2>,
    acc: &mut [[f32; LANES]; R],
) {
    if job.lines.is_empty() {
        return;
    }
    job.check(R, 2);
    let mut frame = Frame {
        mask: [15; 32],
        ones: [1; 16],
        scale: [0.0; LANES],
        zero: [0; LANES],
        totals: [[0; LANES]; 4],
        block_bytes: job.block_lines * size_of::<Line>(),
        end: job.lines.as_ptr_range().end,
        quads_skipped: (job.height - 1) * job.block_lines * 8,
        scales_step: job.height * size_of::<BlockScale>(),
    };
    isa.store(job.scale, &mut frame.scale);
    frame.zero = isa.lanes_i(job.zero);
    let (frame, acc) = (&raw mut frame, acc.as_mut_ptr());
    // SAFETY: `isa` proves the features. `check` has made sure that there are whole blocks of
    // lines, two quads of each row for each line and a scale of each row for each block; lines are
    // aligned to 64 bytes and the frame to 32. Writes the totals and R accumulators. What is
    // prefetched need not exist. Naming the low halves of the registers tells the compiler that
    // all of each is overwritten.
    unsafe {
        match R {
            1 => blocks!(job, frame, acc;
                "" "" "ymm0" "0" "ymm1" "32"),
            2 => blocks!(job, frame, acc;
                "" "" "ymm0" "0" "ymm1" "32",
                " + {q1}" " + 8" "ymm2" "64" "ymm3" "96"),
            3 => blocks!(job, frame, acc;
                "" "" "ymm0" "0" "ymm1" "32",
                " + {q1}" " + 8" "ymm2" "64" "ymm3" "96",
                " + 2 * {q1}" " + 16" "ymm4" "128" "ymm5" "160"),
            4 => blocks!(job, frame, acc;
                "" "" "ymm0" "0" "ymm1" "32",
                " + {q1}" " + 8" "ymm2" "64" "ymm3" "96",
                " + 2 * {q1}" " + 16" "ymm4" "128" "ymm5" "160",
                " + {q3}" " + 24" "ymm6" "192" "ymm7" "224"),
            rows => unreachable!("{rows} rows at once"),
        }
    }
}
