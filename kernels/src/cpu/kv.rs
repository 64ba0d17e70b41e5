//! The KV cache of a layer in f16, and writing a step's keys and values into it.
//!
//! ```text
//! keys   [blocks, heads, tiles, width, 16]   sixteen positions side by side: position p of a
//!        block lies in tile p / 16, lane p % 16; a score needs no sum across lanes
//! values [blocks, heads, positions, padded]  rows of `width` columns, padded to sixteen
//! ```
//! Split: tokens over threads. Rounds to f16 (the reference keeps f32). Not here: reading
//! ([`super::attention`]).

use super::isa::Kernel;
use super::pages::Arena;
use super::share::{Shared, Sink};
use super::simd::{LANES, Simd};
use crate::Error;
use crate::program::KvDecl;

/// NaN as f16.
const NAN: u16 = 0x7e00;

/// Sizes of a layer's cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvShape {
    pub(crate) heads: usize,
    pub(crate) width: usize,
    pub(crate) block_len: usize,
}

impl KvShape {
    /// Vectors of sixteen columns in a row of values.
    #[inline(always)]
    pub(crate) fn vectors(&self) -> usize {
        self.width.div_ceil(LANES)
    }

    /// Index of the key tile of `head` that holds position `at` of `block`, in vectors.
    #[inline(always)]
    pub(crate) fn key_tile(&self, block: usize, head: usize, at: usize) -> usize {
        let tiles = self.block_len.div_ceil(LANES);
        ((block * self.heads + head) * tiles + at / LANES) * self.width
    }

    /// Index of the row of values of `head` at position `at` of `block`, in vectors.
    #[inline(always)]
    pub(crate) fn value_row(&self, block: usize, head: usize, at: usize) -> usize {
        ((block * self.heads + head) * self.block_len + at) * self.vectors()
    }
}

/// One layer's cache.
#[derive(Debug)]
pub(crate) struct KvCache {
    pub(crate) shape: KvShape,
    pub(crate) keys: Shared<u16>,
    pub(crate) values: Shared<u16>,
}

impl KvCache {
    /// Room for `blocks` blocks of `block_len` positions.
    ///
    /// # Errors
    /// [`Error::Device`] if the system has no such memory left.
    pub(crate) fn new(
        arena: &Arena,
        decl: &KvDecl,
        (blocks, block_len): (usize, usize),
    ) -> Result<Self, Error> {
        let shape = KvShape { heads: decl.heads, width: decl.head_width, block_len };
        let keys = shape.key_tile(blocks, 0, 0) * LANES;
        let values = shape.value_row(blocks, 0, 0) * LANES;
        Ok(Self { shape, keys: Shared::new(arena, keys)?, values: Shared::new(arena, values)? })
    }

    /// Bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    /// Makes every position NaN except the first `live[b]` of block `b`.
    pub(crate) fn poison(&mut self, live: &[usize]) {
        let KvShape { heads, width, block_len } = self.shape;
        for (block, &live) in live.iter().enumerate() {
            for (head, at) in (0..heads).flat_map(|h| (live..block_len).map(move |at| (h, at))) {
                let start = self.shape.key_tile(block, head, at) * LANES + at % LANES;
                for i in 0..width {
                    self.keys.all_mut()[start + i * LANES] = NAN;
                }
                let start = self.shape.value_row(block, head, at) * LANES;
                self.values.all_mut()[start..][..width].fill(NAN);
            }
        }
    }
}

/// Stores one token's keys and values.
#[derive(Debug)]
pub(crate) struct KvWrite<'a> {
    pub(crate) shape: KvShape,
    pub(crate) block: usize,
    /// Position within the block.
    pub(crate) at: usize,
    /// `[heads * width]`
    pub(crate) k: &'a [f32],
    /// `[heads * width]`
    pub(crate) v: &'a [f32],
    pub(crate) keys: Sink<'a>,
    pub(crate) values: Sink<'a>,
}

impl Kernel for KvWrite<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let KvShape { width, .. } = self.shape;
        let rows = self.k.chunks_exact(width).zip(self.v.chunks_exact(width));
        for (head, (k, v)) in rows.enumerate() {
            let start = self.shape.key_tile(self.block, head, self.at) * LANES + self.at % LANES;
            put(s, k, &self.keys, start, LANES);
            let start = self.shape.value_row(self.block, head, self.at) * LANES;
            put(s, v, &self.values, start, 1);
        }
    }
}

/// Stores `row` as f16 at `start`, `start + step`, ...
#[inline(always)]
fn put<S: Simd>(s: S, row: &[f32], sink: &Sink<'_>, start: usize, step: usize) {
    for (c, x) in row.chunks(LANES).enumerate() {
        let narrow = s.narrow_f16(s.load_part(x));
        for (i, x) in narrow[..x.len()].iter().enumerate() {
            sink.store(start + (c * LANES + i) * step, *x);
        }
    }
}
