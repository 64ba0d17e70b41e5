//! GPU kernels as text: CUDA C++ and WGSL sources, compiled at run time by the backends.
//!
//! Not here: anything that talks to a device. WGSL kernels are not written yet.

#![forbid(unsafe_code)]

/// One kernel source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// File name, such as `cuda/rows.cu`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// What stands before the text of every CUDA source, in this order.
pub const CUDA_HEADERS: &[Source] = &[
    Source { name: "cuda/prelude.cuh", text: include_str!("../cuda/prelude.cuh") },
    Source { name: "cuda/grouped.cuh", text: include_str!("../cuda/grouped.cuh") },
    Source { name: "cuda/dense.cuh", text: include_str!("../cuda/dense.cuh") },
    Source { name: "cuda/norm.cuh", text: include_str!("../cuda/norm.cuh") },
    Source { name: "cuda/softmax.cuh", text: include_str!("../cuda/softmax.cuh") },
];

/// The CUDA sources; each is compiled by itself, behind [`CUDA_HEADERS`].
pub const CUDA: &[Source] = &[
    Source { name: "cuda/rows.cu", text: include_str!("../cuda/rows.cu") },
    Source { name: "cuda/heads.cu", text: include_str!("../cuda/heads.cu") },
    Source { name: "cuda/quantize.cu", text: include_str!("../cuda/quantize.cu") },
    Source { name: "cuda/linear_grouped.cu", text: include_str!("../cuda/linear_grouped.cu") },
    Source { name: "cuda/gemm_grouped.cu", text: include_str!("../cuda/gemm_grouped.cu") },
    Source { name: "cuda/split.cu", text: include_str!("../cuda/split.cu") },
    Source { name: "cuda/linear_f32.cu", text: include_str!("../cuda/linear_f32.cu") },
    Source { name: "cuda/linear_dense.cu", text: include_str!("../cuda/linear_dense.cu") },
    Source { name: "cuda/gemm_dense.cu", text: include_str!("../cuda/gemm_dense.cu") },
    Source { name: "cuda/attention.cu", text: include_str!("../cuda/attention.cu") },
    Source { name: "cuda/attention_mma.cu", text: include_str!("../cuda/attention_mma.cu") },
    Source { name: "cuda/choose.cu", text: include_str!("../cuda/choose.cu") },
    Source { name: "cuda/measure.cu", text: include_str!("../cuda/measure.cu") },
];
