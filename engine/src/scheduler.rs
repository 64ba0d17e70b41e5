//! Which tokens of which sequences the next step computes.
//!
//! One budget of tokens a step. First sequences that waited too long, then sequences that need one
//! token (decodes), then prefill in chunks that fill the rest, in the given order. Blocks are
//! taken here; when a running sequence needs one and none is free, the youngest sequence gives
//! all of its blocks up and is computed anew later, but for what is still known then
//! ([`crate::sharing`]). Prefill and decode are the same [`StepPart`].
//!
//! Not here: kernels, sampling, a clock. A function of sequences, pool and budget.

use crate::kv::BlockPool;
use crate::sequence::{Phase, Sequence};
use crate::sharing;
use std::cmp::Reverse;

/// Steps without a part, though only the budget was in its way, after which a sequence goes
/// before all others.
pub const WAITED_MAX: u32 = 16;

/// What a step may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Most tokens, at least 1.
    pub tokens: usize,
    /// Most sequences that hold blocks, and so most parts; at least 1.
    pub sequences: usize,
    /// Most prompt tokens whose own probabilities are computed.
    pub scored: usize,
}

/// Tokens `start..end` of one sequence, some perhaps still to be proposed, and how many of their logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepPart {
    /// Index of the sequence.
    pub sequence: usize,
    /// First token, the first one not computed yet.
    pub start: usize,
    /// End of the tokens; beyond the sequence's own there is room for proposed ones.
    pub end: usize,
    /// Logits are wanted of the last `outputs` tokens: none for a chunk inside a prefill, one
    /// where a token can be chosen, one for each proposed token, and all tokens of a prompt whose
    /// own probabilities are wanted.
    pub outputs: usize,
}

/// The work of one step.
#[derive(Debug, Default)]
pub struct StepPlan {
    /// At most one part a sequence.
    pub parts: Vec<StepPart>,
    /// Indices of sequences that need more blocks than there are: they can never go on.
    pub too_large: Vec<usize>,
    /// Sequences that lost their blocks while this was planned.
    pub preempted: usize,
}

/// Plans steps; keeps nothing from one to the next but memory.
#[derive(Debug, Default)]
pub struct Scheduler {
    order: Vec<usize>,
    plan: StepPlan,
}

impl Scheduler {
    /// The plan made last.
    pub fn last(&self) -> &StepPlan {
        &self.plan
    }

    /// Its parts, for a drafter that proposes fewer tokens than they have room for.
    pub fn parts_mut(&mut self) -> &mut [StepPart] {
        &mut self.plan.parts
    }

    /// Plans the next step over `sequences`, which are in order (by priority and arrival) and hold all blocks
    /// that are taken from `pool`. Takes and gives back blocks, and counts who waits. While any
    /// sequence is open, the plan has at least one part or one sequence that is too large.
    pub fn plan(&mut self, sequences: &mut [Sequence], pool: &mut BlockPool, budget: Budget) {
        self.plan.parts.clear();
        self.plan.too_large.clear();
        self.plan.preempted = 0;
        self.sort(sequences);
        let (mut tokens_left, mut scored_left) = (budget.tokens, budget.scored);
        let mut decodes_left = sequences.iter().filter(|s| decodes(s)).count();
        for k in 0..self.order.len() {
            if tokens_left == 0 || self.plan.parts.len() == budget.sequences {
                break;
            }
            let i = self.order[k];
            let decode = decodes(&sequences[i]);
            decodes_left -= usize::from(decode);
            if self.reserve(i, sequences, pool, budget.sequences) {
                let scores = sequences[i].scores_prompt();
                if scores && scored_left == 0 {
                    continue;
                }
                let room = if scores { tokens_left.min(scored_left) } else { tokens_left };
                let mut part = part(i, &sequences[i], room);
                tokens_left -= part.end - part.start;
                scored_left -= if scores { part.outputs } else { 0 };
                if decode {
                    // A token of another sequence goes before a guess for this one.
                    let room = tokens_left.saturating_sub(decodes_left);
                    let room = room_for_proposals(i, sequences, pool, room);
                    (part.end, part.outputs) = (part.end + room, part.outputs + room);
                    tokens_left -= room;
                }
                self.plan.parts.push(part);
            }
        }
        self.count_waits(sequences, pool, budget.sequences);
    }

    /// Counts a step for those it passed over: running sequences, and the first waiting one if it
    /// could have started. (Waiting for a place is no reason to go before decodes later.)
    fn count_waits(&self, sequences: &mut [Sequence], pool: &BlockPool, sequences_max: usize) {
        let head = sequences.iter().position(|s| s.phase == Phase::Waiting);
        let head = head.filter(|&i| admissible(i, sequences, pool, sequences_max));
        for (i, s) in sequences.iter_mut().enumerate() {
            if s.phase == Phase::Running || head == Some(i) {
                s.waited = s.waited.saturating_add(1);
            }
        }
        self.plan.parts.iter().for_each(|p| sequences[p.sequence].waited = 0);
    }

    /// Orders all sequences: overdue ones by how long they waited, decodes, the rest by arrival.
    fn sort(&mut self, sequences: &[Sequence]) {
        self.order.clear();
        self.order.extend(0..sequences.len());
        // The place in line makes keys unlike, so this order is the only one; it takes no memory.
        self.order.sort_unstable_by_key(|&i| {
            let s = &sequences[i];
            let class = match s.waited {
                waited if waited >= WAITED_MAX => 0,
                _ if decodes(s) => 1,
                _ => 2,
            };
            (class, Reverse(if class == 0 { s.waited } else { 0 }), i)
        });
    }

    /// Whether sequence `i` holds, or now gets, blocks for all its tokens.
    fn reserve(
        &mut self,
        i: usize,
        sequences: &mut [Sequence],
        pool: &mut BlockPool,
        sequences_max: usize,
    ) -> bool {
        if pool.blocks_for(sequences[i].tokens.len()) > pool.blocks() {
            self.plan.too_large.push(i);
            return false;
        }
        match sequences[i].phase {
            Phase::Ended => false,
            Phase::Waiting if self.is_under_way(i, sequences, pool) => false,
            Phase::Waiting if admissible(i, sequences, pool, sequences_max) => {
                sequences[i].phase = Phase::Running;
                sharing::take(&mut sequences[i], pool);
                self.grow(i, sequences, pool)
            }
            Phase::Waiting => false,
            Phase::Running => self.grow(i, sequences, pool),
        }
    }

    /// Whether a waiting sequence should let this step compute for another what it needs as well.
    /// (An overdue one goes before all others, so that nobody's turn is put off for long.)
    fn is_under_way(&self, i: usize, sequences: &[Sequence], pool: &BlockPool) -> bool {
        let first = sequences[..i].iter().all(|s| s.phase != Phase::Waiting);
        let for_it = |p: &StepPart| {
            sharing::is_under_way(&sequences[i], &sequences[p.sequence], p.end, pool)
        };
        first && self.plan.parts.iter().any(for_it)
    }

    /// Extends a running sequence's table, taking blocks from the youngest while there are none.
    /// Sequences that arrived before it, or already have a part in this step, keep theirs.
    fn grow(&mut self, i: usize, sequences: &mut [Sequence], pool: &mut BlockPool) -> bool {
        loop {
            let sequence = &mut sequences[i];
            if pool.grow(&mut sequence.blocks, sequence.tokens.len()) {
                return true;
            }
            let parts = &self.plan.parts;
            let free_to_go = |j: &usize| {
                sequences[*j].phase == Phase::Running && parts.iter().all(|p| p.sequence != *j)
            };
            let Some(youngest) = (i + 1..sequences.len()).rev().find(free_to_go) else {
                return false;
            };
            preempt(&mut sequences[youngest], pool);
            self.plan.preempted += 1;
        }
    }
}

/// Whether a sequence needs one token to go on.
fn decodes(sequence: &Sequence) -> bool {
    sequence.phase == Phase::Running && sequence.pending() == 1
}

/// Whether a waiting sequence may start: no earlier one waits, there is a place, and all its tokens
/// find blocks, those included that it shares with running ones. Leaves a block for each running
/// sequence, which may soon need one: otherwise the newcomer would be the first to lose its own.
fn admissible(i: usize, sequences: &[Sequence], pool: &BlockPool, sequences_max: usize) -> bool {
    let first = sequences[..i].iter().all(|s| s.phase != Phase::Waiting);
    let running = || sequences.iter().filter(|s| s.phase == Phase::Running).count();
    if !first || running() >= sequences_max {
        return false;
    }
    let sequence = &sequences[i];
    let needed = pool.blocks_for(sequence.tokens.len()) + running();
    let fits = |shared: usize| pool.free() + shared >= needed;
    fits(0) || (fits(sharing::most(sequence, pool)) && fits(sharing::held(sequence, pool)))
}

fn preempt(sequence: &mut Sequence, pool: &mut BlockPool) {
    pool.release(&mut sequence.blocks);
    sequence.reset();
}

/// How many tokens may be proposed for running sequence `i`, with blocks for them taken: at most
/// `most`, and only into its own blocks and such that no other running sequence may need next.
fn room_for_proposals(
    i: usize,
    sequences: &mut [Sequence],
    pool: &mut BlockPool,
    most: usize,
) -> usize {
    let others = sequences.iter().filter(|s| s.phase == Phase::Running).count() - 1;
    let sequence = &mut sequences[i];
    let wanted = sequence.draft.wanted.min(sequence.proposals_max()).min(most);
    let (len, held) = (sequence.tokens.len(), sequence.blocks.len());
    let spare = pool.free().saturating_sub(others);
    let room = wanted.min((held + spare) * pool.block_len() - len);
    let grown = pool.grow(&mut sequence.blocks, len + room);
    debug_assert!(grown, "blocks that were counted free");
    if grown { room } else { 0 }
}

/// As many pending tokens of a sequence as fit; logits where they reach its end, and of all of
/// them while its prompt is scored.
fn part(index: usize, sequence: &Sequence, tokens_left: usize) -> StepPart {
    let (start, len) = (sequence.computed, sequence.tokens.len());
    let end = len.min(start + tokens_left);
    let outputs = if sequence.scores_prompt() { end - start } else { usize::from(end == len) };
    StepPart { sequence: index, start, end, outputs }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::PrefixCaching;
    use crate::request::{Request, RequestId};
    use kernels::program::TokenId;

    /// Sequences over a pool; running a plan appends a token wherever logits were wanted.
    struct World {
        sequences: Vec<Sequence>,
        pool: BlockPool,
        budget: Budget,
        scheduler: Scheduler,
    }

    impl World {
        /// Blocks of 4 positions.
        fn new(blocks: usize, tokens: usize, sequences: usize) -> Self {
            let (pool, budget) = (
                BlockPool::new(blocks, 4, PrefixCaching::Off),
                Budget { tokens, sequences, scored: 3 },
            );
            Self { sequences: Vec::new(), pool, budget, scheduler: Scheduler::default() }
        }

        fn arrive(&mut self, prompt_len: usize) {
            let request = Request::new(vec![TokenId(0); prompt_len], 10_000);
            let id = RequestId(self.sequences.len() as u64);
            self.sequences.push(Sequence::new(id, request, 100_000));
        }

        /// Plans and runs a step; returns (sequence, tokens, outputs) of each part.
        fn step(&mut self) -> Vec<(usize, usize, usize)> {
            self.scheduler.plan(&mut self.sequences, &mut self.pool, self.budget);
            let running = self.sequences.iter().filter(|s| s.phase == Phase::Running).count();
            assert!(running <= self.budget.sequences, "{running} run");
            for part in &self.scheduler.last().parts {
                let sequence = &mut self.sequences[part.sequence];
                assert_eq!(part.start, sequence.computed);
                sequence.computed = part.end;
                sequence.tokens.extend((0..part.outputs).map(|_| TokenId(0)));
            }
            let parts = self.scheduler.last().parts.iter();
            parts.map(|p| (p.sequence, p.end - p.start, p.outputs)).collect()
        }

        /// Steps until each of `who` has had a part; how many that took.
        fn steps_until_served(&mut self, who: &[usize]) -> usize {
            let mut missing = who.to_vec();
            for n in 1..10_000 {
                let parts = self.step();
                missing.retain(|i| parts.iter().all(|p| p.0 != *i));
                if missing.is_empty() {
                    return n;
                }
            }
            panic!("{missing:?} starve");
        }
    }

    #[test]
    fn decodes_come_first_and_prefill_fills_the_rest_in_order_of_arrival() {
        let mut world = World::new(100, 10, 8);
        world.arrive(4);
        assert_eq!(world.step(), [(0, 4, 1)]);
        world.arrive(12);
        world.arrive(5);
        assert_eq!(world.step(), [(0, 1, 1), (1, 9, 0)], "a chunk wants no logits");
        assert_eq!(world.step(), [(0, 1, 1), (1, 3, 1), (2, 5, 1)]);
        assert_eq!(world.step(), [(0, 1, 1), (1, 1, 1), (2, 1, 1)]);
    }

    #[test]
    fn no_more_sequences_run_than_the_budget_allows() {
        let mut world = World::new(100, 100, 2);
        (0..4).for_each(|_| world.arrive(3));
        assert_eq!(world.step(), [(0, 3, 1), (1, 3, 1)]);
        world.sequences[0].phase = Phase::Ended;
        world.pool.release(&mut world.sequences[0].blocks);
        assert_eq!(world.step(), [(1, 1, 1), (2, 3, 1)]);
    }

    #[test]
    fn a_sequence_without_a_part_in_a_step_still_takes_a_place() {
        let mut world = World::new(100, 2, 2);
        world.arrive(8);
        world.arrive(1);
        (0..4).for_each(|_| assert_eq!(world.step().len(), 1));
        world.arrive(1);
        (0..50).for_each(|_| assert!(world.step().iter().all(|p| p.0 < 2)));
    }

    #[test]
    fn a_sequence_with_a_part_in_the_step_keeps_its_blocks() {
        let mut world = World::new(2, 100, 2);
        (0..2).for_each(|_| world.arrive(4));
        world.sequences[0].phase = Phase::Running;
        world.sequences[1].phase = Phase::Running;
        world.step();
        assert_eq!(world.pool.free(), 0);
        // The older one needs a second block; the younger one is overdue and goes first.
        world.sequences[1].tokens.pop();
        world.sequences[1].computed = 3;
        world.sequences[1].waited = WAITED_MAX;
        assert_eq!(world.step(), [(1, 1, 1)]);
        assert_eq!(world.step(), [(0, 1, 1)], "then the younger one gives its own");
        assert_eq!(world.sequences[1].phase, Phase::Waiting);
    }

    #[test]
    fn decodes_that_fill_the_budget_do_not_starve_a_prefill() {
        let mut world = World::new(1000, 2, 8);
        world.arrive(1);
        world.arrive(1);
        world.step();
        world.arrive(30);
        assert!(world.steps_until_served(&[2]) <= WAITED_MAX as usize + 1);
        assert!(world.steps_until_served(&[2]) <= WAITED_MAX as usize + 1, "nor its next chunk");
    }

    #[test]
    fn more_decodes_than_the_budget_take_turns() {
        // One round takes longer than the wait after which a sequence is overdue.
        let mut world = World::new(1000, 1, 40);
        (0..40).for_each(|_| world.arrive(1));
        let all: Vec<usize> = (0..40).collect();
        while world.sequences.iter().any(|s| s.phase == Phase::Waiting) {
            world.step();
        }
        let bound = WAITED_MAX as usize + all.len();
        for _ in 0..10 {
            assert!(world.steps_until_served(&all) <= bound);
        }
    }

    #[test]
    fn a_long_prefill_does_not_stop_decodes() {
        let mut world = World::new(1000, 4, 8);
        world.arrive(1);
        world.step();
        world.arrive(400);
        for _ in 0..100 {
            assert_eq!(world.step()[0], (0, 1, 1));
        }
    }

    #[test]
    fn the_youngest_gives_its_blocks_up_and_goes_before_later_arrivals() {
        let mut world = World::new(5, 100, 8);
        (0..2).for_each(|_| world.arrive(7));
        assert_eq!(world.step(), [(0, 7, 1), (1, 7, 1)]);
        world.arrive(1);
        assert_eq!(world.step(), [(0, 1, 1), (1, 1, 1)], "the last block is kept for these two");
        for _ in 0..4 {
            assert_eq!(world.step(), [(0, 1, 1)], "the older one has the last block");
        }
        assert_eq!((world.sequences[1].phase, world.sequences[1].computed), (Phase::Running, 8));
        assert_eq!(world.step(), [(0, 1, 1)]);
        assert_eq!((world.sequences[1].phase, world.sequences[1].computed), (Phase::Waiting, 0));
        assert_eq!((world.scheduler.last().preempted, world.pool.free()), (1, 1));
        world.pool.release(&mut world.sequences[0].blocks);
        world.sequences.remove(0);
        assert_eq!(world.step(), [(0, 9, 1), (1, 1, 1)], "it is computed anew, before the third");
    }

    #[test]
    fn a_small_request_does_not_pass_a_large_one() {
        let mut world = World::new(6, 100, 8);
        world.arrive(12);
        world.step();
        world.arrive(16);
        world.arrive(1);
        assert_eq!(world.step(), [(0, 1, 1)]);
        world.pool.release(&mut world.sequences[0].blocks);
        world.sequences.remove(0);
        assert_eq!(world.step(), [(0, 16, 1), (1, 1, 1)]);
    }

    #[test]
    fn a_sequence_beyond_the_whole_pool_is_named_and_the_others_go_on() {
        let mut world = World::new(4, 100, 8);
        world.arrive(17);
        world.arrive(3);
        assert_eq!(world.step(), []);
        assert_eq!(world.scheduler.last().too_large, [0]);
        world.sequences.remove(0);
        assert_eq!(world.step(), [(0, 3, 1)]);
    }
}
