//! From a plan to the flat arrays a runner reads.
//!
//! The arrays are kept and refilled, so that a step allocates nothing once they have grown to the
//! largest step. Not here: policy ([`crate::scheduler`]), what the arrays are for
//! ([`kernels::backend::StepInput`]).

use crate::scheduler::StepPart;
use crate::sequence::Sequence;
use kernels::program::{BlockId, TokenId};
use kernels::{BlockTables, StepInput, StepLimits};

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

    /// Replaces every token, for a model of another vocabulary.
    pub fn map_tokens(&mut self, map: impl Fn(TokenId) -> TokenId) {
        self.tokens.iter_mut().for_each(|token| *token = map(*token));
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
            draws: &[],
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
    }

    fn push(&mut self, part: &StepPart, sequence: &Sequence, block_len: usize) {
        let range = part.start..part.end;
        self.tokens.extend_from_slice(&sequence.tokens[range.clone()]);
        self.positions.extend(range.clone().map(|p| p as u32));
        self.rope_lens.extend(range.map(|p| sequence.rope_len(p) as u32));
        let end = self.tokens.len() as u32;
        self.query_ends.push(end);
        self.context_lens.push(part.end as u32);
        self.blocks.extend_from_slice(&sequence.blocks[..part.end.div_ceil(block_len)]);
        self.block_ends.push(self.blocks.len() as u32);
        self.output_rows.extend(end - part.outputs as u32..end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Request, RequestId};

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
    }
}
