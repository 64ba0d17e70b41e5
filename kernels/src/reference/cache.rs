//! The paged KV memory of one layer in f32: keys and values `[blocks, block_len, g, e]`.
//!
//! Not here: which blocks a sequence owns; every call brings its table.

use crate::StepLimits;
use crate::program::{BlockId, KvDecl};

/// Keys and values of one layer.
#[derive(Debug)]
pub(super) struct KvCache {
    decl: KvDecl,
    block_len: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    pub(super) fn new(decl: KvDecl, limits: &StepLimits) -> Self {
        let len = limits.blocks * limits.block_len * decl.heads * decl.head_width;
        let StepLimits { block_len, .. } = *limits;
        Self { decl, block_len, keys: vec![0.0; len], values: vec![0.0; len] }
    }

    /// Number of KV heads, g.
    pub(super) fn heads(&self) -> usize {
        self.decl.heads
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.keys) + size_of_val(&*self.values)
    }

    /// Stores all heads of one position.
    pub(super) fn write(&mut self, table: &[BlockId], position: u32, k_ge: &[f32], v_ge: &[f32]) {
        let at = self.offset(table, position);
        self.keys[at..at + k_ge.len()].copy_from_slice(k_ge);
        self.values[at..at + v_ge.len()].copy_from_slice(v_ge);
    }

    /// The key of one head at a position, `[e]`.
    pub(super) fn key(&self, table: &[BlockId], position: u32, head: usize) -> &[f32] {
        self.head(&self.keys, table, position, head)
    }

    /// The value of one head at a position, `[e]`.
    pub(super) fn value(&self, table: &[BlockId], position: u32, head: usize) -> &[f32] {
        self.head(&self.values, table, position, head)
    }

    fn head<'a>(&self, all: &'a [f32], table: &[BlockId], position: u32, head: usize) -> &'a [f32] {
        let e = self.decl.head_width;
        &all[self.offset(table, position) + head * e..][..e]
    }

    /// First element of a position.
    fn offset(&self, table: &[BlockId], position: u32) -> usize {
        let position = position as usize;
        let block = table[position / self.block_len].index();
        (block * self.block_len + position % self.block_len) * self.position_len()
    }

    /// Elements of a position: g * e.
    fn position_len(&self) -> usize {
        self.decl.heads * self.decl.head_width
    }

    /// Fills every position of block `b` from `live[b]` on with NaN.
    pub(super) fn poison(&mut self, live: &[usize]) {
        let (position_len, block_len) = (self.position_len(), self.block_len);
        for all in [&mut self.keys, &mut self.values] {
            for (b, block) in all.chunks_exact_mut(block_len * position_len).enumerate() {
                let kept = live.get(b).copied().unwrap_or(0).min(block_len);
                block[kept * position_len..].fill(f32::NAN);
            }
        }
    }
}
