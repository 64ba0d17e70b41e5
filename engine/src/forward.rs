//! The logits of the positions of one token sequence, without a scheduler: the hook for research
//! (`foretoken logits`), for ranking drafts, perplexity and golden tests.

use crate::Error;
use crate::kv::BLOCK_LEN;
use crate::request::Rejected;
use kernels::program::{BlockId, TokenId};
use kernels::{BlockTables, Runner, StepInput, StepLimits, StepOutput};
use std::ops::Range;

/// Limits of a runner that [`logits`] and [`extend`] can use for `tokens` tokens, `chunk` of them a step.
pub fn limits(tokens: usize, chunk: usize) -> StepLimits {
    let chunk = chunk.clamp(1, tokens.max(1));
    StepLimits {
        tokens: chunk,
        sequences: 1,
        outputs: chunk,
        blocks: tokens.div_ceil(BLOCK_LEN).max(1),
        block_len: BLOCK_LEN,
        context_len: tokens.max(1),
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

/// A token sequence that is computed piece by piece.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// All its tokens, in the ids of the model that computes them.
    pub ids: &'a [TokenId],
    /// The first of them, at least 1, that were there before anything was generated. As in a run,
    /// their number is the least length that chooses rotary speeds.
    pub prompt_len: usize,
}

/// Computes the positions `range` of `text`, of which this runner has computed all earlier ones
/// before, and leaves logits `[r, v]` of those from `first_output` on in `output`.
///
/// The runner was built with `limits` (see [`limits`]), and `range` has at most that many tokens.
///
/// # Errors
/// Whatever the runner refuses, such as a token outside the vocabulary.
pub fn extend(
    runner: &mut dyn Runner,
    limits: &StepLimits,
    text: Text<'_>,
    range: Range<usize>,
    first_output: usize,
    output: &mut StepOutput,
) -> Result<(), Error> {
    let blocks = (0..range.end.div_ceil(limits.block_len) as u32).map(BlockId);
    let blocks: Vec<BlockId> = blocks.collect();
    let (t, end) = (range.len() as u32, range.end as u32);
    let first_row = first_output.saturating_sub(range.start).min(range.len()) as u32;
    let rope_len = |p: usize| text.prompt_len.max(p + 1) as u32;
    let input = StepInput {
        tokens: &text.ids[range.clone()],
        positions: &(range.start as u32..end).collect::<Vec<_>>(),
        rope_lens: &range.map(rope_len).collect::<Vec<_>>(),
        query_ends: &[t],
        context_lens: &[end],
        block_tables: BlockTables { blocks: &blocks, ends: &[blocks.len() as u32] },
        output_rows: &(first_row..t).collect::<Vec<_>>(),
        draws: &[],
    };
    Ok(runner.step(&input, output)?)
}

/// Logits `[t, v]` of all positions of `ids`, from a runner built with `limits`.
///
/// # Errors
/// As [`extend`].
pub fn logits(
    runner: &mut dyn Runner,
    limits: &StepLimits,
    ids: &[TokenId],
) -> Result<Vec<f32>, Error> {
    let text = Text { ids, prompt_len: ids.len() };
    let mut all = vec![];
    let mut output = StepOutput::default();
    for range in pieces(0..ids.len(), limits) {
        extend(runner, limits, text, range, 0, &mut output)?;
        all.extend_from_slice(&output.logits);
    }
    Ok(all)
}

/// `range` in pieces of as many tokens as a step may have.
pub fn pieces(range: Range<usize>, limits: &StepLimits) -> impl Iterator<Item = Range<usize>> {
    let (end, step) = (range.end, limits.tokens.max(1));
    range.step_by(step).map(move |start| start..(start + step).min(end))
}
