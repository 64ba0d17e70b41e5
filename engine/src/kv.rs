//! Which KV blocks are free, held or kept for others: ids, reference counts, a free list.
//!
//! A block holds the keys and values of `block_len` positions of a text, in all layers. A sequence
//! keeps its ids in a block table (`Vec<BlockId>`): position p lies in `table[p / len]`. Tables may
//! share full blocks with the same content ([`crate::prefix`]); nobody writes to those, so none is
//! ever copied. A known block that no table holds stays known until its memory is needed, the one
//! released first going first.
//!
//! Not here: the memory itself (the runner's), who gets blocks ([`crate::scheduler`]), what a
//! sequence shares ([`crate::sharing`]).

use crate::prefix::{Key, Link, PrefixIndex};
use kernels::program::BlockId;
use std::collections::BTreeMap;

/// Positions of a block, where nothing asks for another size: small enough that the last, half
/// empty block of a sequence wastes little.
pub const BLOCK_LEN: usize = 16;

/// Whether sequences with equal beginnings share the blocks of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixCaching {
    /// No: each computes its own.
    Off,
    /// Yes.
    On {
        /// Longest length up to which no model's rotary speeds depend on the length
        /// ([`crate::spec::ModelSpec::steady_len`]), of verifier and draft the lesser one. Longer
        /// texts share only what was computed at equal lengths.
        steady_len: u32,
    },
}

/// What came of looking for known blocks, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixCounts {
    /// Tokens of sequences that were looked for when they began.
    pub queried: u64,
    /// Of these, tokens whose blocks were known.
    pub cached: u64,
}

/// All blocks of a runner: each is free, held by tables, or known and held by none.
#[derive(Debug)]
pub struct BlockPool {
    /// The block released last is taken first: it may still be in a processor's cache.
    free: Vec<BlockId>,
    slots: Vec<Slot>,
    block_len: usize,
    caching: PrefixCaching,
    index: PrefixIndex,
    /// Known blocks that no table holds, by when they were released.
    idle: BTreeMap<u64, BlockId>,
    releases: u64,
    counts: PrefixCounts,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// Tables that hold the block.
    holders: u32,
    /// Its key in `idle`, if it is there.
    released: u64,
}

impl BlockPool {
    /// A pool of blocks `0..blocks` of `block_len` positions, all free.
    ///
    /// # Panics
    /// If either is 0.
    pub fn new(blocks: usize, block_len: usize, caching: PrefixCaching) -> Self {
        assert!(blocks > 0 && block_len > 0, "a pool needs blocks with positions");
        Self {
            free: (0..blocks as u32).rev().map(BlockId).collect(),
            slots: vec![Slot::default(); blocks],
            block_len,
            caching,
            index: PrefixIndex::new(blocks),
            idle: BTreeMap::new(),
            releases: 0,
            counts: PrefixCounts::default(),
        }
    }

    /// Blocks in all.
    pub fn blocks(&self) -> usize {
        self.slots.len()
    }

    /// Blocks that no table holds; they may be known.
    pub fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Positions that all blocks together hold.
    pub fn positions(&self) -> usize {
        self.blocks() * self.block_len
    }

    /// Positions of one block.
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// Blocks that hold `positions` positions.
    pub fn blocks_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.block_len)
    }

    /// See [`PrefixCaching::On`]; none where nothing is shared.
    pub fn steady_len(&self) -> Option<u32> {
        match self.caching {
            PrefixCaching::Off => None,
            PrefixCaching::On { steady_len } => Some(steady_len),
        }
    }

    /// Extends `table` until it holds `positions` positions. False, with nothing taken, if too few
    /// blocks are free. Known blocks are taken last, and are known no more.
    pub fn grow(&mut self, table: &mut Vec<BlockId>, positions: usize) -> bool {
        let missing = self.blocks_for(positions).saturating_sub(table.len());
        if missing > self.free() {
            return false;
        }
        let first = table.len();
        let kept = self.free.len().saturating_sub(missing);
        table.extend(self.free.drain(kept..).rev());
        while table.len() < first + missing
            && let Some((_, block)) = self.idle.pop_first()
        {
            self.index.remove(block);
            table.push(block);
        }
        table[first..].iter().for_each(|block| self.slots[block.index()].holders = 1);
        true
    }

    /// Takes all blocks of `table` back. Those that no table holds then are free, or stay known;
    /// the beginning of a text stays known longest.
    pub fn release(&mut self, table: &mut Vec<BlockId>) {
        while let Some(block) = table.pop() {
            let slot = &mut self.slots[block.index()];
            slot.holders -= 1;
            if slot.holders > 0 {
                continue;
            }
            if self.index.link(block).is_some() {
                self.releases += 1;
                slot.released = self.releases;
                self.idle.insert(self.releases, block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// The known block with the content `key`, and the content's name.
    pub fn find(&self, key: Key<'_>) -> Option<(BlockId, Link)> {
        let block = self.index.find(key)?;
        Some((block, self.index.link(block)?))
    }

    /// Puts a known block into one more table, which the caller keeps.
    pub fn hold(&mut self, block: BlockId) {
        let slot = &mut self.slots[block.index()];
        if slot.holders == 0 {
            self.idle.remove(&slot.released);
        }
        slot.holders += 1;
    }

    /// Whether a table holds `block`.
    pub fn is_held(&self, block: BlockId) -> bool {
        self.slots[block.index()].holders > 0
    }

    /// Whether `block` is known and the draft model computed all of it too.
    pub fn is_drafted(&self, block: BlockId) -> bool {
        self.index.is_drafted(block)
    }

    /// Makes a held block known, all of whose tokens are computed, by the draft model too if
    /// `drafted`; the content's name. Where another block with this content is known, that one
    /// stays so unless it lacks the draft's part and this one does not.
    pub fn register(&mut self, block: BlockId, key: Key<'_>, drafted: bool) -> Link {
        debug_assert!(self.is_held(block) && key.tokens.len() == self.block_len);
        let (link, lost) = self.index.insert(block, key, drafted);
        if let Some(lost) = lost.filter(|lost| !self.is_held(*lost)) {
            self.idle.remove(&self.slots[lost.index()].released);
            self.free.push(lost);
        }
        link
    }

    /// Forgets what all blocks hold.
    pub fn forget(&mut self) {
        self.index = PrefixIndex::new(self.blocks());
        self.free.extend(std::mem::take(&mut self.idle).into_values());
    }

    /// Counts `tokens` tokens that were looked for, of which `cached` were known.
    pub fn count_query(&mut self, tokens: usize, cached: usize) {
        self.counts.queried += tokens as u64;
        self.counts.cached += cached as u64;
    }

    /// What came of looking so far.
    pub fn counts(&self) -> PrefixCounts {
        self.counts
    }

    /// Blocks whose content is known, held or not, and whether the draft model computed them too.
    pub fn known(&self) -> impl Iterator<Item = (BlockId, bool)> {
        self.index.known().map(|block| (block, self.is_drafted(block)))
    }

    /// Checks that every block is in as many of `tables` as it is held by, or free, or known and in
    /// none; these must be all tables there are.
    ///
    /// # Panics
    /// With the block's id if not: a bug in the caller's bookkeeping.
    pub fn check_integrity<'a>(&self, tables: impl IntoIterator<Item = &'a [BlockId]>) {
        let mut holders = vec![0; self.blocks()];
        for block in tables.into_iter().flatten() {
            assert!(block.index() < self.blocks(), "{block:?} is not of this pool");
            holders[block.index()] += 1;
        }
        let mut loose = vec![0; self.blocks()];
        self.free.iter().chain(self.idle.values()).for_each(|block| loose[block.index()] += 1);
        for (i, (slot, holders)) in self.slots.iter().zip(holders).enumerate() {
            assert_eq!(slot.holders, holders, "block {i} is in another number of tables");
            let places = usize::from(holders > 0) + loose[i];
            assert!(places > 0, "block {i} is neither free nor in a table");
            assert!(places == 1, "block {i} is free and held, or free twice");
        }
        for (released, block) in &self.idle {
            assert_eq!(self.slots[block.index()].released, *released, "{block:?} is lost");
            assert!(self.index.link(*block).is_some(), "{block:?} is kept for nobody");
        }
        let known = |block: &BlockId| self.index.link(*block).is_some();
        assert!(!self.free.iter().any(known), "a free block is known");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::program::TokenId;
    use proptest::prelude::*;

    fn pool(blocks: usize, block_len: usize) -> BlockPool {
        BlockPool::new(blocks, block_len, PrefixCaching::On { steady_len: u32::MAX })
    }

    #[test]
    fn a_refused_growth_takes_nothing() {
        let mut pool = pool(3, 4);
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
    #[should_panic(expected = "another number of tables")]
    fn a_block_in_a_table_that_does_not_hold_it_is_found() {
        let mut pool = pool(2, 1);
        let mut table = Vec::new();
        pool.grow(&mut table, 1);
        pool.check_integrity([&table[..], &table[..]]);
    }

    #[test]
    #[should_panic(expected = "neither free nor in a table")]
    fn a_lost_block_is_found() {
        let mut pool = pool(2, 1);
        pool.free.pop();
        pool.check_integrity([]);
    }

    #[test]
    #[should_panic(expected = "free twice")]
    fn a_block_that_is_free_twice_is_found() {
        let mut pool = pool(2, 1);
        pool.free.push(BlockId(1));
        pool.check_integrity([]);
    }

    fn first(token: &TokenId) -> Key<'_> {
        Key { parent: Link::START, class: 0, tokens: std::slice::from_ref(token) }
    }

    #[test]
    fn known_blocks_are_taken_last_and_the_longest_released_goes_first() {
        let mut pool = pool(3, 1);
        let (a, b) = (TokenId(7), TokenId(8));
        let [mut one, mut two, mut table] = [vec![], vec![], vec![]];
        pool.grow(&mut one, 1);
        pool.grow(&mut two, 1);
        pool.register(one[0], first(&a), false);
        pool.register(two[0], first(&b), false);
        pool.release(&mut two);
        pool.release(&mut one);
        assert_eq!(pool.free(), 3);
        pool.grow(&mut table, 1);
        assert!(pool.find(first(&a)).is_some() && pool.find(first(&b)).is_some());
        pool.grow(&mut table, 2);
        assert!(pool.find(first(&a)).is_some() && pool.find(first(&b)).is_none());
        pool.forget();
        assert!(pool.find(first(&a)).is_none());
        pool.check_integrity([&table[..]]);
    }

    #[test]
    fn an_idle_block_is_free_once_a_drafted_one_with_its_content_is_known() {
        let mut pool = pool(2, 1);
        let a = TokenId(7);
        let [mut one, mut two] = [vec![], vec![]];
        pool.grow(&mut one, 1);
        let link = pool.register(one[0], first(&a), false);
        pool.release(&mut one);
        pool.grow(&mut two, 1);
        assert_eq!(pool.register(two[0], first(&a), true), link);
        assert_eq!((pool.free(), pool.idle.len()), (1, 0));
        assert_eq!(pool.find(first(&a)), Some((two[0], link)));
        pool.check_integrity([&two[..]]);
    }

    /// A table and the tokens of its full blocks; what each block was last filled with.
    struct Model {
        pool: BlockPool,
        tables: [(Vec<BlockId>, Vec<TokenId>); 4],
        content: Vec<Vec<TokenId>>,
    }

    impl Model {
        /// Begins table `which` with the known blocks of `tokens`, and fills the rest.
        fn begin(&mut self, which: usize, tokens: Vec<TokenId>) -> Result<(), TestCaseError> {
            let len = self.pool.block_len();
            let (table, held) = &mut self.tables[which];
            self.pool.release(table);
            held.clear();
            let mut links = vec![Link::START];
            for (k, chunk) in tokens.chunks_exact(len).enumerate() {
                let key = Key { parent: links[k], class: 0, tokens: chunk };
                let Some((block, link)) = self.pool.find(key) else { break };
                prop_assert_eq!(&self.content[block.index()], &tokens[..(k + 1) * len]);
                self.pool.hold(block);
                table.push(block);
                links.push(link);
            }
            let known = table.len();
            if !self.pool.grow(table, tokens.len()) {
                prop_assert!(self.pool.free() < tokens.len().div_ceil(len) - known);
                self.pool.release(table);
                return Ok(());
            }
            for k in known..tokens.len() / len {
                let text = &tokens[..(k + 1) * len];
                self.content[table[k].index()] = text.to_vec();
                let key = Key { parent: links[k], class: 0, tokens: &text[k * len..] };
                links.push(self.pool.register(table[k], key, text[0].0 == 0));
            }
            *held = tokens;
            Ok(())
        }

        /// Every table still holds its text.
        fn check(&self) -> Result<(), TestCaseError> {
            let len = self.pool.block_len();
            self.pool.check_integrity(self.tables.iter().map(|(table, _)| table.as_slice()));
            for (table, tokens) in &self.tables {
                for (k, block) in table.iter().take(tokens.len() / len).enumerate() {
                    prop_assert_eq!(&self.content[block.index()], &tokens[..(k + 1) * len]);
                }
            }
            let held: std::collections::BTreeSet<u32> =
                self.tables.iter().flat_map(|(table, _)| table).map(|b| b.0).collect();
            prop_assert_eq!(self.pool.free(), self.pool.blocks() - held.len());
            Ok(())
        }
    }

    proptest! {
        /// Texts over two tokens, so that beginnings are often equal: no block in use is ever
        /// filled again, what is found is what was filled in, and none is lost.
        #[test]
        fn blocks_keep_what_was_filled_in_while_somebody_holds_or_finds_them(
            blocks in 1usize..20,
            block_len in 1usize..4,
            actions in proptest::collection::vec(
                (0usize..4, proptest::collection::vec(0u32..2, 0..24)), 1..80),
        ) {
            let (pool, content) = (pool(blocks, block_len), vec![vec![]; blocks]);
            let mut model = Model { pool, tables: Default::default(), content };
            for (which, tokens) in actions {
                model.begin(which, tokens.into_iter().map(TokenId).collect())?;
                model.check()?;
            }
        }
    }
}
