//! What drafts are tried on: prompts, and what the target writes after them.
//!
//! A text is the one that `run` writes for the same prompt, parameters and seed. Input: the
//! arguments, a file of prompts, or those built in here. Not here: what drafts make of a text
//! ([`super::score`]).

use crate::cli::RankArgs;
use crate::generate;
use crate::load::Unexpected;
use crate::verify::prompts::{self, Line};
use anyhow::Context;
use engine::forward;
use engine::model::Model;
use engine::request::Request;
use engine::sampler::{History, Sampler, SamplingParams};
use kernels::program::TokenId;
use kernels::{Runner, StepLimits, StepOutput};

/// The category of a prompt that names none.
const NO_CATEGORY: &str = "other";

/// Beginnings of Rust source of four kinds, five of each.
const BUILT_IN: [(&str, [&str; 5]); 4] = [
    (
        "functions",
        [
            "fn main() {\n    let args: Vec<String> = ",
            "/// The greatest common divisor of two numbers.\npub fn gcd(a: u64, b: u64) -> u64 {\n",
            "pub fn read_lines(path: &Path) -> io::Result<Vec<String>> {\n    let file = ",
            "fn parse_header(input: &[u8]) -> Result<(Header, &[u8]), Error> {\n    if input.len() < ",
            "/// Splits `text` at the first `separator`.\nfn split_once<'a>(text: &'a str, separator: char) -> ",
        ],
    ),
    (
        "modules",
        [
            "//! A small parser.\n\n",
            "use std::collections::HashMap;\n\n/// Counts words.\npub fn count(",
            "#![no_std]\n\nextern crate alloc;\n\nuse alloc::",
            "// Copyright of the authors.\n\nmod config;\nmod error;\n\npub use ",
            "//! Reading and writing of little-endian numbers.\n//!\n//! ",
        ],
    ),
    (
        "tests",
        [
            "#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    fn ",
            "#[test]\nfn empty_input_is_an_error() {\n    let found = ",
            "#[test]\nfn round_trip() {\n    for value in [0, 1, ",
            "mod common;\n\nuse common::server;\n\n#[tokio::test]\nasync fn ",
            "    #[test]\n    #[should_panic(expected = \"",
        ],
    ),
    (
        "types",
        [
            "#[derive(Debug, Clone)]\npub enum Error {\n",
            "impl Iterator for ",
            "/// Where a value came from.\n#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]\npub struct ",
            "impl fmt::Display for Level {\n    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {\n",
            "pub trait Storage {\n    type Error;\n\n    fn ",
        ],
    ),
];

/// What the target continues.
pub(super) struct Prompt {
    pub(super) ids: Vec<TokenId>,
    category: String,
    sampling: SamplingParams,
}

/// What the target and a draft read.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) ids: Vec<TokenId>,
    pub(super) prompt_len: usize,
    /// The first token that is to be predicted.
    pub(super) first: usize,
    pub(super) category: String,
    /// With the seed that it was written with.
    pub(super) sampling: SamplingParams,
}

impl Text {
    /// What the token at `position` is chosen after.
    pub(super) fn history(&self, position: usize) -> History<'_> {
        let (prompt, generated) = self.ids[..position].split_at(self.prompt_len.min(position));
        History { prompt, generated }
    }

    /// Tokens to be predicted.
    pub(super) fn predicted(&self) -> usize {
        self.ids.len() - self.first
    }
}

/// The prompts that `args` ask for; at least one, and each can be continued.
pub(super) fn prompts(
    args: &RankArgs,
    model: &Model,
    sampling: &SamplingParams,
) -> anyhow::Result<Vec<Prompt>> {
    let lines = match &args.prompts {
        Some(path) => prompts::from_file(path)?,
        None => built_in().collect(),
    };
    let (texts, categories): (Vec<_>, Vec<_>) =
        lines.into_iter().map(|line| (line.prompt, line.category)).unzip();
    let config = generate::config(model.spec(), usize::MAX, args.generate, 0);
    let prompt = |(i, (ids, category)): (usize, (Vec<TokenId>, Option<String>))| {
        let seed = sampling.seed.wrapping_add(i as u64);
        let (max_tokens, stop_tokens) = (args.generate.max(1), vec![]);
        let sampling = SamplingParams { seed, ..sampling.clone() };
        let request = Request { stop_tokens, sampling, ..Request::new(ids, max_tokens) };
        config.check(&request).with_context(|| format!("prompt {}", i + 1))?;
        let category = category.unwrap_or_else(|| NO_CATEGORY.to_owned());
        Ok(Prompt { ids: request.prompt, category, sampling: request.sampling })
    };
    let ids = prompts::encode(texts, model)?;
    ids.into_iter().zip(categories).enumerate().map(prompt).collect()
}

fn built_in() -> impl Iterator<Item = Line> {
    let line = |category: &str, text: &str| Line {
        prompt: prompts::Prompt::Text(text.to_owned()),
        category: Some(category.to_owned()),
    };
    BUILT_IN.iter().flat_map(move |(category, texts)| texts.map(|text| line(category, text)))
}

/// The target as a writer.
pub(super) struct Writer<'a> {
    pub(super) runner: &'a mut dyn Runner,
    /// What it was built for.
    pub(super) limits: StepLimits,
    /// Tokens that are written; with 0 the prompt itself is what is to be predicted.
    pub(super) most: usize,
    pub(super) context_len: usize,
    pub(super) stop_tokens: &'a [TokenId],
}

impl Writer<'_> {
    /// Continues `prompt` until it is long enough, as long as the context, or ends by itself.
    pub(super) fn write(&mut self, prompt: Prompt) -> anyhow::Result<Text> {
        let Prompt { ids, category, sampling } = prompt;
        let prompt_len = ids.len();
        let first = if self.most == 0 { 1 } else { prompt_len };
        let mut text = Text { ids, prompt_len, first, category, sampling };
        let (mut sampler, mut output) = (Sampler::default(), StepOutput::default());
        let (mut computed, end) = (0, self.context_len.min(prompt_len.saturating_add(self.most)));
        while text.ids.len() < end {
            let len = text.ids.len();
            let read = forward::Text { ids: &text.ids, prompt_len };
            for range in forward::pieces(computed..len, &self.limits) {
                forward::extend(self.runner, &self.limits, read, range, len - 1, &mut output)
                    .context(Unexpected)?;
            }
            computed = len;
            let history = text.history(len);
            let token = sampler
                .sample(&output.logits, &history, &text.sampling, len as u32)
                .context(Unexpected)?;
            text.ids.push(token);
            if self.stop_tokens.contains(&token) {
                break;
            }
        }
        Ok(text)
    }
}
