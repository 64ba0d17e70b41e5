//! From a plan to the flat arrays a runner reads.
//!
//! The arrays are kept and refilled, so that a step allocates nothing once they have grown to the
//! largest step. Not here: policy ([`crate::scheduler`]), what the arrays are for
//! ([`kernels::backend::StepInput`]).

use crate::scheduler::StepPart;
use crate::sequence::Sequence;
use kernels::program::{BlockId, TokenId};
use kernels::{BlockTables, Draw, StepInput, StepLimits};

/// Host arrays of one step.
#[derive(Debug, Default)]
pub struct Batch {
    tokens: Vec<TokenId>,
    positions: Vec<u32>,
    rope_lens: Vec<u32>,
    query_ends: Vec<u32>,
    context_lens: Vec<u32>,
    blocks: Vec<BlockId>,
    block_ends: Vec<u32>,
    output_rows: Vec<u32>,
    draws: Vec<Option<Draw>>,
}

impl Batch {
    /// Empty arrays with room for the largest step of `limits`.
    pub fn new(limits: &StepLimits) -> Self {
        let (t, s) = (limits.tokens, limits.sequences);
        Self {
            tokens: Vec::with_capacity(t),
            positions: Vec::with_capacity(t),
            rope_lens: Vec::with_capacity(t),
            query_ends: Vec::with_capacity(s),
            context_lens: Vec::with_capacity(s),
            blocks: Vec::with_capacity(limits.blocks),
            block_ends: Vec::with_capacity(s),
            output_rows: Vec::with_capacity(limits.outputs),
            draws: Vec::with_capacity(limits.outputs),
        }
    }

    /// Refills the arrays with `parts`, in their order. Of each block table it packs the blocks
    /// that hold positions visible after the step.
    pub fn pack(&mut self, parts: &[StepPart], sequences: &[Sequence], block_len: usize) {
        self.clear();
        for part in parts {
            self.push(part, &sequences[part.sequence], block_len);
        }
    }

    /// [`Batch::pack`] for tokens that nobody knows yet, since the runner is still to choose them.
    pub fn pack_unknown(&mut self, parts: &[StepPart], sequences: &[Sequence], block_len: usize) {
        self.clear();
        for part in parts {
            self.tokens.extend((part.start..part.end).map(|_| TokenId(0)));
            self.place(part, &sequences[part.sequence], block_len);
        }
    }

    /// Replaces every token, for a model of another vocabulary.
    pub fn map_tokens(&mut self, map: impl Fn(TokenId) -> TokenId) {
        self.tokens.iter_mut().for_each(|token| *token = map(*token));
    }

    /// Asks for all logits, where they are more than what tokens are chosen by.
    pub fn want_logits(&mut self) {
        self.draws.clear();
    }

    /// Whether tokens are wanted, and all of them can be chosen without their logits.
    pub fn is_drawn(&self) -> bool {
        !self.draws.is_empty() && !self.draws.contains(&None)
    }

    /// The arrays as packed last.
    pub fn input(&self) -> StepInput<'_> {
        StepInput {
            tokens: &self.tokens,
            positions: &self.positions,
            rope_lens: &self.rope_lens,
            query_ends: &self.query_ends,
            context_lens: &self.context_lens,
            block_tables: BlockTables { blocks: &self.blocks, ends: &self.block_ends },
            output_rows: &self.output_rows,
            draws: &self.draws,
        }
    }

    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.rope_lens.clear();
        self.query_ends.clear();
        self.context_lens.clear();
        self.blocks.clear();
        self.block_ends.clear();
        self.output_rows.clear();
        self.draws.clear();
    }

    fn push(&mut self, part: &StepPart, sequence: &Sequence, block_len: usize) {
        self.tokens.extend_from_slice(&sequence.tokens[part.start..part.end]);
        self.place(part, sequence, block_len);
    }

    /// Everything but the tokens of a part, which were pushed.
    fn place(&mut self, part: &StepPart, sequence: &Sequence, block_len: usize) {
        let range = part.start..part.end;
        self.positions.extend(range.clone().map(|p| p as u32));
        self.rope_lens.extend(range.map(|p| sequence.rope_len(p) as u32));
        let end = self.tokens.len() as u32;
        self.query_ends.push(end);
        self.context_lens.push(part.end as u32);
        self.blocks.extend_from_slice(&sequence.blocks[..part.end.div_ceil(block_len)]);
        self.block_ends.push(self.blocks.len() as u32);
        self.output_rows.extend(end - part.outputs as u32..end);
        // A row's token stands behind it.
        let positions = part.end + 1 - part.outputs..part.end + 1;
        self.draws.extend(positions.map(|position| sequence.draw(position)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Request, RequestId};
    use crate::sampler;

    fn sequence(tokens: std::ops::Range<u32>, prompt_len: usize, blocks: &[u32]) -> Sequence {
        let request = Request::new(tokens.map(TokenId).collect(), 9);
        let blocks = blocks.iter().map(|&b| BlockId(b)).collect();
        Sequence { prompt_len, blocks, ..Sequence::new(RequestId(0), request, 99) }
    }

    /// A chunk inside a prompt, a part with three wanted rows, and blocks beyond what is visible.
    #[test]
    fn packs_parts_one_after_another() {
        let sequences = [sequence(10..20, 10, &[7, 3, 5]), sequence(30..36, 2, &[1, 4])];
        let part = |sequence, start, end, outputs| StepPart { sequence, start, end, outputs };
        let limits = StepLimits {
            tokens: 8,
            sequences: 2,
            outputs: 4,
            blocks: 9,
            block_len: 4,
            context_len: 36,
            trace: false,
        };
        let mut batch = Batch::new(&limits);
        for _ in 0..2 {
            batch.pack(&[part(1, 2, 6, 3), part(0, 4, 7, 0)], &sequences, 4);
        }
        let input = batch.input();
        let ids: Vec<u32> = input.tokens.iter().map(|t| t.0).collect();
        assert_eq!(ids, [32, 33, 34, 35, 14, 15, 16]);
        assert_eq!(input.positions, [2, 3, 4, 5, 4, 5, 6]);
        assert_eq!(input.rope_lens, [3, 4, 5, 6, 10, 10, 10]);
        assert_eq!(input.query_ends, [4, 7]);
        assert_eq!(input.context_lens, [6, 7]);
        assert_eq!(input.block_tables.of(0), [BlockId(1), BlockId(4)]);
        assert_eq!(input.block_tables.of(1), [BlockId(7), BlockId(3)]);
        assert_eq!(input.output_rows, [1, 2, 3]);
        let draw = |position| sampler::draw(&sequences[1].sampling, 0, position);
        assert_eq!(input.draws, [4, 5, 6].map(draw));
        assert!(input.draws.iter().all(Option::is_some) && batch.is_drawn());
        batch.want_logits();
        assert_eq!(batch.input().draws, []);
        assert!(!batch.is_drawn());
    }

    /// Tokens beyond a sequence's own have everything but their ids.
    #[test]
    fn packs_tokens_that_are_still_to_be_chosen() {
        let mut adjusted = sequence(30..36, 2, &[1, 4]);
        adjusted.sampling.presence_penalty = 0.5;
        let sequences = [sequence(10..20, 10, &[7, 3, 5]), adjusted];
        let part = |sequence, start, outputs| StepPart { sequence, start, end: start + 1, outputs };
        let mut batch = Batch::default();
        batch.pack_unknown(&[part(0, 11, 1), part(1, 6, 0)], &sequences, 4);
        let input = batch.input();
        assert_eq!(input.tokens, [TokenId(0); 2]);
        assert_eq!((input.positions, input.rope_lens), (&[11, 6][..], &[12, 7][..]));
        assert_eq!((input.query_ends, input.context_lens), (&[1, 2][..], &[12, 7][..]));
        assert_eq!(input.block_tables.of(0), [7, 3, 5].map(BlockId));
        assert_eq!(input.block_tables.of(1), [1, 4].map(BlockId));
        assert_eq!(input.output_rows, [0]);
        assert_eq!(input.draws, [sampler::draw(&sequences[0].sampling, 2, 12)]);
        assert!(batch.is_drawn());
        batch.pack_unknown(&[part(0, 11, 1), part(1, 6, 1)], &sequences, 4);
        assert!(!batch.is_drawn(), "a penalty needs more than the row");
        batch.pack_unknown(&[part(1, 6, 0)], &sequences, 4);
        assert!(!batch.is_drawn(), "nothing is wanted");
    }
}
