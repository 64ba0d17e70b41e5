//! Which full blocks are known by their content: the index behind prefix caching.
//!
//! Keys and values of a token are a function of the tokens up to it and of the lengths that choose
//! their rotary speeds. So a full block is known by the block before it, its own tokens, and the
//! class of those lengths. Blocks before it are known by [`Link`]s, numbers that are never given
//! twice, and tokens are compared: equal hashes alone never make two blocks one.
//!
//! Not here: who holds a block ([`crate::kv`]), what a sequence takes ([`crate::sharing`]).

use kernels::program::{BlockId, TokenId};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Names one content of a block with all that precedes it; of two blocks with the same content
/// and beginning, as long as one of them is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Link(u64);

impl Link {
    /// What the first block of a sequence follows.
    pub const START: Self = Self(0);
}

/// What decides the content of a full block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key<'a> {
    /// The content before it.
    pub parent: Link,
    /// Equal where rotary speeds are, see [`crate::sharing`].
    pub class: u32,
    /// `[block_len]`
    pub tokens: &'a [TokenId],
}

impl Key<'_> {
    /// Unkeyed, so that runs repeat: who makes hashes collide loses hits, and corrupts nothing.
    fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        Hash::hash(self, &mut hasher);
        hasher.finish()
    }
}

#[derive(Debug)]
struct Entry {
    link: Link,
    hash: u64,
    parent: Link,
    class: u32,
    tokens: Box<[TokenId]>,
    drafted: bool,
}

impl Entry {
    fn key(&self) -> Key<'_> {
        Key { parent: self.parent, class: self.class, tokens: &self.tokens }
    }
}

/// All blocks whose content is known; at most one for a content.
#[derive(Debug)]
pub(crate) struct PrefixIndex {
    /// `[blocks]`
    entries: Vec<Option<Entry>>,
    by_hash: HashMap<u64, BlockId>,
    links: u64,
}

impl PrefixIndex {
    /// One that knows none of `blocks` blocks.
    pub(crate) fn new(blocks: usize) -> Self {
        let entries = std::iter::repeat_with(|| None).take(blocks).collect();
        Self { entries, by_hash: HashMap::new(), links: Link::START.0 }
    }

    /// The block with this content.
    pub(crate) fn find(&self, key: Key<'_>) -> Option<BlockId> {
        let block = *self.by_hash.get(&key.hash())?;
        (self.entries[block.index()].as_ref()?.key() == key).then_some(block)
    }

    /// Its content's name, if it is known.
    pub(crate) fn link(&self, block: BlockId) -> Option<Link> {
        self.entries[block.index()].as_ref().map(|entry| entry.link)
    }

    /// Whether its content is known and a draft model computed it too.
    pub(crate) fn is_drafted(&self, block: BlockId) -> bool {
        self.entries[block.index()].as_ref().is_some_and(|entry| entry.drafted)
    }

    /// Says that `block` has the content `key`, of the draft model too if `drafted`, and names the
    /// content. A known block with the same content stays the known one unless it lacks a draft's
    /// part that `block` has. Also returns the block that is not known any more.
    pub(crate) fn insert(
        &mut self,
        block: BlockId,
        key: Key<'_>,
        drafted: bool,
    ) -> (Link, Option<BlockId>) {
        let hash = key.hash();
        let other = self.by_hash.get(&hash).copied();
        let entry = other.and_then(|other| self.entries[other.index()].as_mut());
        let known = match entry.filter(|entry| entry.key() == key) {
            Some(entry) if other == Some(block) || entry.drafted || !drafted => {
                entry.drafted |= drafted && other == Some(block);
                return (entry.link, None);
            }
            same => same.map(|entry| entry.link),
        };
        if let Some(other) = other {
            self.remove(other);
        }
        let link = known.unwrap_or_else(|| self.next_link());
        let Key { parent, class, tokens } = key;
        self.by_hash.insert(hash, block);
        self.entries[block.index()] =
            Some(Entry { link, hash, parent, class, tokens: tokens.into(), drafted });
        (link, other)
    }

    /// Forgets what `block` holds.
    pub(crate) fn remove(&mut self, block: BlockId) {
        if let Some(entry) = self.entries[block.index()].take() {
            self.by_hash.remove(&entry.hash);
        }
    }

    /// Blocks that are known.
    pub(crate) fn known(&self) -> impl Iterator<Item = BlockId> {
        let known = self.entries.iter().enumerate().filter(|(_, entry)| entry.is_some());
        known.map(|(i, _)| BlockId(i as u32))
    }

    fn next_link(&mut self) -> Link {
        self.links += 1;
        Link(self.links)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: [u32; 2]) -> [TokenId; 2] {
        ids.map(TokenId)
    }

    fn key(parent: Link, class: u32, tokens: &[TokenId]) -> Key<'_> {
        Key { parent, class, tokens }
    }

    #[test]
    fn a_block_is_known_by_all_that_decides_its_content() {
        let mut index = PrefixIndex::new(4);
        let (ab, cd) = (tokens([1, 2]), tokens([3, 4]));
        let first = key(Link::START, 0, &ab);
        let (link, _) = index.insert(BlockId(3), first, false);
        let (next, _) = index.insert(BlockId(1), key(link, 0, &cd), false);
        assert_eq!(index.find(first), Some(BlockId(3)));
        assert_eq!(index.find(key(link, 0, &cd)), Some(BlockId(1)));
        let others =
            [key(next, 0, &cd), key(link, 1, &cd), key(link, 0, &ab), key(Link::START, 0, &cd)];
        assert!(others.iter().all(|other| index.find(*other).is_none()));
        index.remove(BlockId(3));
        assert_eq!((index.find(first), index.link(BlockId(3))), (None, None));
    }

    #[test]
    fn the_first_block_with_a_content_is_known_until_a_drafted_one_comes() {
        let mut index = PrefixIndex::new(4);
        let ab = tokens([1, 2]);
        let key = key(Link::START, 0, &ab);
        let (link, none) = index.insert(BlockId(0), key, false);
        assert_eq!((index.insert(BlockId(1), key, false), none), ((link, None), None));
        assert_eq!(index.find(key), Some(BlockId(0)));
        assert_eq!(index.insert(BlockId(2), key, true), (link, Some(BlockId(0))));
        assert_eq!((index.find(key), index.is_drafted(BlockId(2))), (Some(BlockId(2)), true));
        assert_eq!(index.insert(BlockId(3), key, true), (link, None));
        assert_eq!(index.insert(BlockId(2), key, false), (link, None));
        assert!(index.is_drafted(BlockId(2)));
        assert_eq!(index.known().collect::<Vec<_>>(), [BlockId(2)]);
    }

    #[test]
    fn equal_hashes_do_not_make_two_contents_one() {
        let mut index = PrefixIndex::new(2);
        let (ab, cd) = (tokens([1, 2]), tokens([3, 4]));
        let (one, two) = (key(Link::START, 0, &ab), key(Link::START, 0, &cd));
        let (link, _) = index.insert(BlockId(0), one, false);
        // As if both had the second one's hash.
        let hash = two.hash();
        index.by_hash = HashMap::from([(hash, BlockId(0))]);
        index.entries[0].as_mut().unwrap().hash = hash;
        assert_eq!(index.find(two), None);
        let (other, lost) = index.insert(BlockId(1), two, false);
        assert_eq!((index.find(two), lost), (Some(BlockId(1)), Some(BlockId(0))));
        assert!(other != link && index.link(BlockId(0)).is_none());
    }
}
