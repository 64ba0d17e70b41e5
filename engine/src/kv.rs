//! Which KV blocks are free: ids and a free list.
//!
//! A block holds the keys and values of `block_len` positions of one sequence, in all layers. A
//! sequence keeps its ids in a block table (`Vec<BlockId>`): position p lies in `table[p / len]`.
//! Not here: the memory itself (the runner's), who gets blocks ([`crate::scheduler`]).

use kernels::program::BlockId;

/// Positions of a block, where nothing asks for another size: small enough that the last, half
/// empty block of a sequence wastes little.
pub const BLOCK_LEN: usize = 16;

/// All blocks of a runner, each either free or in exactly one block table.
#[derive(Debug)]
pub struct BlockPool {
    /// The block released last is taken first: it may still be in a cache.
    free: Vec<BlockId>,
    blocks: usize,
    block_len: usize,
}

impl BlockPool {
    /// A pool of blocks `0..blocks` of `block_len` positions, all free.
    ///
    /// # Panics
    /// If either is 0.
    pub fn new(blocks: usize, block_len: usize) -> Self {
        assert!(blocks > 0 && block_len > 0, "a pool needs blocks with positions");
        let free = (0..blocks as u32).rev().map(BlockId).collect();
        Self { free, blocks, block_len }
    }

    /// Blocks in all.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Blocks that no table holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Positions that all blocks together hold.
    pub fn positions(&self) -> usize {
        self.blocks * self.block_len
    }

    /// Positions of one block.
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// Blocks that hold `positions` positions.
    pub fn blocks_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.block_len)
    }

    /// Extends `table` until it holds `positions` positions. False, with nothing taken, if too few
    /// blocks are free.
    pub fn grow(&mut self, table: &mut Vec<BlockId>, positions: usize) -> bool {
        let missing = self.blocks_for(positions).saturating_sub(table.len());
        let Some(rest) = self.free.len().checked_sub(missing) else { return false };
        table.extend(self.free.drain(rest..).rev());
        true
    }

    /// Takes all blocks of `table` back.
    pub fn release(&mut self, table: &mut Vec<BlockId>) {
        self.free.extend(table.drain(..).rev());
    }

    /// Checks that every block is free or in exactly one of `tables`, which must be all there are.
    ///
    /// # Panics
    /// With the block's id if not: a bug in the caller's bookkeeping.
    pub fn check_integrity<'a>(&self, tables: impl IntoIterator<Item = &'a [BlockId]>) {
        let mut seen = vec![false; self.blocks];
        let held = tables.into_iter().flatten().copied();
        for block in self.free.iter().copied().chain(held) {
            assert!(block.index() < self.blocks, "{block:?} is not of this pool");
            let before = std::mem::replace(&mut seen[block.index()], true);
            assert!(!before, "{block:?} is held twice");
        }
        let lost = seen.iter().position(|s| !s);
        assert!(lost.is_none(), "block {lost:?} is neither free nor in a table");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_refused_growth_takes_nothing() {
        let mut pool = BlockPool::new(3, 4);
        let mut table = Vec::new();
        assert!(pool.grow(&mut table, 5));
        assert_eq!((table.len(), pool.free()), (2, 1));
        assert!(!pool.grow(&mut table, 13));
        assert_eq!((table.len(), pool.free()), (2, 1));
        assert!(pool.grow(&mut table, 12));
        assert!(pool.grow(&mut table, 1), "a table that is long enough stays as it is");
        assert_eq!((table.len(), pool.free()), (3, 0));
    }

    #[test]
    #[should_panic(expected = "held twice")]
    fn a_block_in_two_tables_is_found() {
        let mut pool = BlockPool::new(2, 1);
        let mut table = Vec::new();
        pool.grow(&mut table, 1);
        pool.check_integrity([&table[..], &table[..]]);
    }

    #[test]
    #[should_panic(expected = "neither free nor in a table")]
    fn a_lost_block_is_found() {
        let mut pool = BlockPool::new(2, 1);
        pool.grow(&mut Vec::new(), 1);
        pool.check_integrity([]);
    }

    proptest! {
        /// Against a model that is a set of free ids: same success, disjoint tables, none lost.
        #[test]
        fn behaves_as_a_set_of_ids(
            blocks in 1usize..20,
            block_len in 1usize..5,
            actions in proptest::collection::vec((0usize..4, 0usize..30), 1..80),
        ) {
            let mut pool = BlockPool::new(blocks, block_len);
            let mut free: BTreeSet<u32> = (0..blocks as u32).collect();
            let mut tables: [Vec<BlockId>; 4] = Default::default();
            for (which, positions) in actions {
                let table = &mut tables[which];
                let before = table.clone();
                if positions == 0 {
                    pool.release(table);
                    free.extend(before.iter().map(|b| b.0));
                    prop_assert!(table.is_empty());
                } else {
                    let mut want = before.len();
                    while want * block_len < positions { want += 1; }
                    let fits = want - before.len() <= free.len();
                    prop_assert_eq!(pool.grow(table, positions), fits);
                    prop_assert_eq!(table.len(), if fits { want } else { before.len() });
                    prop_assert!(table.starts_with(&before), "blocks in use moved");
                    for block in &table[before.len()..] {
                        prop_assert!(free.remove(&block.0), "{:?} was not free", block);
                    }
                }
                prop_assert_eq!(pool.free(), free.len());
                pool.check_integrity(tables.iter().map(Vec::as_slice));
            }
        }
    }
}
