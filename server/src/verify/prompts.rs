//! The prompts of `verify` and `bench`: built in, from a file of lines, or one by its ids; and such
//! files for `draft-rank`.
//!
//! Not here: what is done with them. Input: the arguments, and any text file.

use crate::cli::VerifyArgs;
use crate::run;
use anyhow::{Context, anyhow, bail};
use engine::model::Model;
use engine::tokenizer::Tokenizer;
use kernels::program::TokenId;
use serde_json::Value;
use std::path::Path;

/// Beginnings of Rust source, which the demo pair writes.
const BUILT_IN: [&str; 6] = [
    "fn main() {\n    let args: Vec<String> = ",
    "impl Iterator for ",
    "use std::collections::HashMap;\n\n/// Counts words.\npub fn count(",
    "#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    fn ",
    "#[derive(Debug, Clone)]\npub enum Error {\n",
    "//! A small parser.\n\n",
];

/// A prompt as it was given.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<TokenId>),
}

/// A line of a file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    pub(crate) prompt: Prompt,
    /// What kind of prompt it says it is.
    pub(crate) category: Option<String>,
}

/// The prompts that `args` ask for, as tokens; at least one.
pub(super) fn prompts(args: &VerifyArgs, model: &Model) -> anyhow::Result<Vec<Vec<TokenId>>> {
    among(args.ids.as_deref(), args.prompts.as_deref(), model)
}

/// The prompt `ids`, or else those in `file`, or else the built-in ones, as tokens; at least one.
pub(crate) fn among(
    ids: Option<&[u32]>,
    file: Option<&Path>,
    model: &Model,
) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let prompts = match (ids, file) {
        (Some(ids), _) => vec![Prompt::Ids(ids.iter().map(|&id| TokenId(id)).collect())],
        (None, Some(path)) => from_file(path)?.into_iter().map(|line| line.prompt).collect(),
        (None, None) => BUILT_IN.map(|text| Prompt::Text(text.to_owned())).to_vec(),
    };
    encode(prompts, model)
}

/// As tokens; `model` may lack a tokenizer where all are ids.
pub(crate) fn encode(prompts: Vec<Prompt>, model: &Model) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let all_ids = prompts.iter().all(|prompt| matches!(prompt, Prompt::Ids(_)));
    let tokenizer = run::tokenizer(model, all_ids)?;
    prompts.into_iter().map(|prompt| tokens(prompt, tokenizer.as_ref())).collect()
}

fn tokens(prompt: Prompt, tokenizer: Option<&Tokenizer>) -> anyhow::Result<Vec<TokenId>> {
    match (prompt, tokenizer) {
        (Prompt::Ids(ids), _) => Ok(ids),
        (Prompt::Text(text), Some(tokenizer)) => Ok(tokenizer.encode(&text, true)?),
        (Prompt::Text(_), None) => bail!("a text prompt needs a tokenizer"),
    }
}

/// The prompts of a file; at least one.
pub(crate) fn from_file(path: &Path) -> anyhow::Result<Vec<Line>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the prompts of {}", path.display()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines
        .map(|(i, text)| line(text).with_context(|| format!("{}, line {}", path.display(), i + 1)));
    let prompts: Vec<Line> = prompts.collect::<anyhow::Result<_>>()?;
    if prompts.is_empty() {
        bail!("{} holds no prompt: give one a line", path.display());
    }
    Ok(prompts)
}

/// A line: JSON where it begins like a JSON string or object with keys, else plain text.
fn line(text: &str) -> anyhow::Result<Line> {
    if !text.starts_with(['"']) && !text.starts_with("{\"") {
        return Ok(Line { prompt: Prompt::Text(text.to_owned()), category: None });
    }
    let expected = "expected a JSON string, {\"prompt\": TEXT} or {\"ids\": [...]}; a plain text that begins like JSON must be written as a JSON string";
    let value: Value = serde_json::from_str(text).context(expected)?;
    let prompt = prompt(&value).ok_or_else(|| anyhow!(expected))?;
    let category = match value.get("category") {
        None => None,
        Some(Value::String(category)) => Some(category.clone()),
        Some(other) => bail!("\"category\" is {other}, expected a string"),
    };
    Ok(Line { prompt, category })
}

fn prompt(value: &Value) -> Option<Prompt> {
    match (value, value.get("prompt"), value.get("ids")) {
        (Value::String(text), _, _) | (_, Some(Value::String(text)), None) => {
            Some(Prompt::Text(text.clone()))
        }
        (_, None, Some(Value::Array(ids))) => {
            let id = |v: &Value| Some(TokenId(u32::try_from(v.as_u64()?).ok()?));
            ids.iter().map(id).collect::<Option<Vec<_>>>().map(Prompt::Ids)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_text_or_json() {
        let text = |t: &str| Line { prompt: Prompt::Text(t.to_owned()), category: None };
        assert_eq!(line("fn main() {").unwrap(), text("fn main() {"));
        assert_eq!(line("{ a").unwrap(), text("{ a"));
        assert_eq!(line(r#""a\nb""#).unwrap(), text("a\nb"));
        assert_eq!(line(r#"{"prompt": "a", "more": 1}"#).unwrap(), text("a"));
        let ids = Line {
            prompt: Prompt::Ids(vec![TokenId(3), TokenId(4)]),
            category: Some("code".to_owned()),
        };
        assert_eq!(line(r#"{"ids": [3, 4], "category": "code"}"#).unwrap(), ids);
        let all = ["\"a", r#"{"text": "a"}"#, r#"{"ids": [-1]}"#, r#"{"ids": [5000000000]}"#];
        for wrong in all.into_iter().chain([r#"{"prompt": "a", "category": 3}"#]) {
            assert!(line(wrong).is_err(), "{wrong}");
        }
    }
}
