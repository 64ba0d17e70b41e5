//! How a sequence takes blocks that others computed, and offers its own.
//!
//! Only full blocks whose tokens are all computed are shared, and nobody writes to those again, so
//! no block is ever copied. The draft model's keys and values lie in the same blocks but may come
//! later: each block has at most one sequence whose draft may still write to it, the one that had
//! it alone when it got it; the draft of any other waits for none and leaves such a sequence alone.
//!
//! Input: a sequence and the pool. Not here: when ([`crate::scheduler`], [`crate::engine`]), the
//! memory.

use crate::kv::BlockPool;
use crate::prefix::{Key, Link};
use crate::sequence::Sequence;
use kernels::program::BlockId;

/// The known blocks that a sequence can begin with.
#[derive(Debug, Default)]
struct Beginning {
    blocks: Vec<BlockId>,
    links: Vec<Link>,
    /// Leading ones that the draft model computed too.
    drafted: usize,
    /// Leading ones up to the last that its draft must not write to.
    locked: usize,
    /// Those that others hold.
    held: usize,
}

/// Lets a waiting sequence begin with all known blocks of its tokens, in which one at least is left
/// to compute: its logits are wanted. Takes none while probabilities of the prompt are wanted,
/// which need every logit.
pub fn take(sequence: &mut Sequence, pool: &mut BlockPool) {
    if pool.steady_len().is_none() || sequence.scores_prompt() {
        sequence.cached.get_or_insert(0);
        return;
    }
    let found = find(sequence, pool);
    found.blocks.iter().for_each(|block| pool.hold(*block));
    let tokens = |blocks: usize| blocks * pool.block_len();
    sequence.computed = tokens(found.blocks.len());
    sequence.draft.computed = tokens(found.drafted);
    sequence.draft.locked = tokens(found.locked);
    sequence.draft.shared = found.drafted;
    (sequence.blocks, sequence.links) = (found.blocks, found.links);
    if sequence.cached.is_none() {
        sequence.cached = Some(sequence.computed);
        pool.count_query(sequence.tokens.len(), sequence.computed);
    }
}

/// How many blocks that others hold a waiting sequence would begin with.
pub fn held(sequence: &Sequence, pool: &BlockPool) -> usize {
    if sequence.scores_prompt() { 0 } else { find(sequence, pool).held }
}

/// Whether most of what a waiting sequence would compute now is computed in this step for `other`,
/// up to its token `end`, and so can be taken in the next.
pub fn is_under_way(sequence: &Sequence, other: &Sequence, end: usize, pool: &BlockPool) -> bool {
    if sequence.scores_prompt() {
        return false;
    }
    let block_len = pool.block_len();
    let full = most(sequence, pool).min(end.min(other.tokens.len()) / block_len);
    let of = |sequence, k| key(sequence, k, Link::START, pool);
    let common = (0..full).take_while(|&k| of(sequence, k) == of(other, k)).count();
    if common * block_len <= other.computed {
        return false;
    }
    let found = find(sequence, pool).blocks.len();
    let (gained, left) = (common.saturating_sub(found), sequence.tokens.len() - found * block_len);
    2 * gained * block_len >= left
}

fn find(sequence: &Sequence, pool: &BlockPool) -> Beginning {
    let mut found = Beginning::default();
    for k in 0..most(sequence, pool) {
        let parent = found.links.last().copied().unwrap_or(Link::START);
        let block = key(sequence, k, parent, pool).and_then(|key| pool.find(key));
        let Some((block, link)) = block else { break };
        let held = pool.is_held(block);
        if found.drafted == k && pool.is_drafted(block) {
            found.drafted += 1;
        } else if held && sequence.draft.follows {
            // Better computed again than never drafted for.
            break;
        } else if held {
            found.locked = k + 1;
        }
        found.held += usize::from(held);
        found.blocks.push(block);
        found.links.push(link);
    }
    found
}

/// Most blocks that a sequence may begin with.
pub fn most(sequence: &Sequence, pool: &BlockPool) -> usize {
    match pool.steady_len() {
        Some(_) => sequence.tokens.len().saturating_sub(1) / pool.block_len(),
        None => 0,
    }
}

/// Offers the blocks that were filled since the last call to sequences to come.
pub fn offer(sequence: &mut Sequence, pool: &mut BlockPool) {
    if pool.steady_len().is_none() {
        return;
    }
    let full = sequence.computed / pool.block_len();
    let drafted = sequence.draft.computed.min(sequence.computed) / pool.block_len();
    let known = sequence.links.len();
    for k in known..full {
        let link = register(sequence, k, k < drafted, pool);
        sequence.links.extend(link);
    }
    // Where the draft came later.
    for k in sequence.draft.shared..drafted.min(known) {
        register(sequence, k, true, pool);
    }
    sequence.draft.shared = sequence.draft.shared.max(drafted);
}

fn register(sequence: &Sequence, k: usize, drafted: bool, pool: &mut BlockPool) -> Option<Link> {
    let parent = k.checked_sub(1).map_or(Link::START, |before| sequence.links[before]);
    let key = key(sequence, k, parent, pool)?;
    Some(pool.register(sequence.blocks[k], key, drafted))
}

/// What decides the content of block `k` after `parent`. The lengths that choose rotary speeds of
/// a block's tokens follow from that of the first; while the last is within the steady length, all
/// speeds are the same whatever they are.
fn key<'a>(sequence: &'a Sequence, k: usize, parent: Link, pool: &BlockPool) -> Option<Key<'a>> {
    let steady = pool.steady_len()? as usize;
    let (start, end) = (k * pool.block_len(), (k + 1) * pool.block_len());
    let class = match sequence.rope_len(end - 1) <= steady {
        true => 0,
        false => sequence.rope_len(start) as u32,
    };
    Some(Key { parent, class, tokens: &sequence.tokens[start..end] })
}
