//! `foretoken logits`: the logits of every position, as a safetensors file.

use crate::Io;
use crate::cli::{HeadName, LogitsArgs};
use crate::load::{self, STEP_TOKENS, Unexpected};
use anyhow::Context;
use engine::forward;
use kernels::program::TokenId;
use safetensors::tensor::{Dtype, TensorView};

/// Runs the command.
pub(crate) fn run(args: &LogitsArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    // These logits are for comparing with other programs, so nothing is rounded unasked.
    let model = load::open(&args.model, load::head(&args.device, HeadName::Keep))?;
    let ids: Vec<TokenId> = args.ids.iter().map(|&id| TokenId(id)).collect();
    forward::check(&ids, model.spec().vocab, model.spec().context_len)?;
    let limits = forward::limits(ids.len(), STEP_TOKENS);
    let backend = load::backend(&args.device)?;
    let mut runner = load::build(&model, backend.as_ref(), &limits, io)?;
    let logits = forward::logits(runner.as_mut(), &limits, &ids).context(Unexpected)?;
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape = vec![ids.len(), model.spec().vocab];
    let view = TensorView::new(Dtype::F32, shape, &bytes).context(Unexpected)?;
    safetensors::serialize_to_file([("logits", view)], None, &args.out)
        .with_context(|| format!("cannot write {}", args.out.display()))
}
