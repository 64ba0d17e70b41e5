//! The logits of every position of one token sequence, without a scheduler: the hook for
//! research (`foretoken logits`), perplexity and golden tests.

use crate::Error;
use crate::kv::BLOCK_LEN;
use crate::request::Rejected;
use kernels::program::{BlockId, TokenId};
use kernels::{BlockTables, Runner, StepInput, StepLimits, StepOutput};

/// Limits of a runner that [`logits`] can use for `tokens` tokens, `chunk` of them a step.
pub fn limits(tokens: usize, chunk: usize) -> StepLimits {
    let chunk = chunk.clamp(1, tokens.max(1));
    StepLimits {
        tokens: chunk,
        sequences: 1,
        outputs: chunk,
        blocks: tokens.div_ceil(BLOCK_LEN).max(1),
        block_len: BLOCK_LEN,
        trace: false,
    }
}

/// Checks a token sequence before any work is done for it.
///
/// # Errors
/// An empty sequence, one longer than the context, a token outside the vocabulary.
pub fn check(ids: &[TokenId], vocab: usize, context_len: u32) -> Result<(), Rejected> {
    if ids.is_empty() {
        return Err(Rejected::EmptyPrompt);
    }
    if ids.len() > context_len as usize {
        return Err(Rejected::TooLong { tokens: ids.len(), context: context_len as usize });
    }
    match ids.iter().position(|id| id.index() >= vocab) {
        None => Ok(()),
        Some(position) => {
            Err(Rejected::TokenOutOfRange { token: ids[position].0, position, vocab })
        }
    }
}

/// Logits `[t, v]` of all positions of `ids`, from a runner built with `limits`.
///
/// # Errors
/// Whatever the runner refuses, such as a token outside the vocabulary.
pub fn logits(
    runner: &mut dyn Runner,
    limits: &StepLimits,
    ids: &[TokenId],
) -> Result<Vec<f32>, Error> {
    let blocks: Vec<BlockId> = (0..limits.blocks as u32).map(BlockId).collect();
    let mut all = vec![];
    let mut output = StepOutput::default();
    for (chunk, start) in ids.chunks(limits.tokens).zip((0..).step_by(limits.tokens)) {
        let (t, end) = (chunk.len() as u32, (start + chunk.len()) as u32);
        let input = StepInput {
            tokens: chunk,
            positions: &(start as u32..end).collect::<Vec<_>>(),
            rope_lens: &vec![ids.len() as u32; chunk.len()],
            query_ends: &[t],
            context_lens: &[end],
            block_tables: BlockTables { blocks: &blocks, ends: &[blocks.len() as u32] },
            output_rows: &(0..t).collect::<Vec<_>>(),
        };
        runner.step(&input, &mut output)?;
        all.extend_from_slice(&output.logits);
    }
    Ok(all)
}
