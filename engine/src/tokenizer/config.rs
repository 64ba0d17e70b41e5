//! `tokenizer_config.json` and `special_tokens_map.json`: special tokens and what to add to a text.
//!
//! Not here: the vocabulary. The chat template in the same file is read by [`crate::chat`].

use crate::Error;
use crate::files::ModelFiles;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Keys that name one special token each.
const TOKEN_KEYS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The two files, read.
#[derive(Debug, Clone)]
pub(crate) struct TokenizerConfig {
    path: PathBuf,
    values: Map<String, Value>,
    tokens: Vec<(&'static str, String)>,
}

impl TokenizerConfig {
    /// Reads both files; absent ones are empty. The map only fills what the configuration lacks.
    pub(crate) fn read(files: &ModelFiles) -> Result<Self, Error> {
        let path = files.path("tokenizer_config.json");
        let values = object(files, "tokenizer_config.json")?;
        let map = object(files, "special_tokens_map.json")?;
        let find = |key| token_text(values.get(key)).or_else(|| token_text(map.get(key)));
        let tokens =
            TOKEN_KEYS.into_iter().filter_map(|k| Some((k, find(k)?.to_owned()))).collect();
        Ok(Self { path, values, tokens })
    }

    /// The special token under `key`, such as `bos_token`.
    pub(crate) fn token(&self, key: &str) -> Option<&str> {
        self.tokens.iter().find(|(k, _)| *k == key).map(|(_, token)| token.as_str())
    }

    /// Key and text of every special token that is set.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.tokens.iter().map(|(key, token)| (*key, token.as_str()))
    }

    /// Texts of the special tokens.
    pub(crate) fn special_tokens(&self) -> impl Iterator<Item = &str> {
        self.tokens.iter().map(|(_, token)| token.as_str()).filter(|t| !t.is_empty())
    }

    /// A copy whose begin and end tokens are those given where it names none.
    pub(crate) fn or_tokens(&self, bos: Option<&str>, eos: Option<&str>) -> Self {
        let mut copy = self.clone();
        for (key, token) in [("bos_token", bos), ("eos_token", eos)] {
            if let (None, Some(token)) = (self.token(key), token) {
                copy.tokens.push((key, token.to_owned()));
            }
        }
        copy
    }

    /// `add_bos_token` and `add_eos_token` if at least one is set (the other is then false): these
    /// overrule the post-processor of `tokenizer.json`, as in transformers 5.
    pub(crate) fn explicit_ends(&self) -> Result<Option<(bool, bool)>, Error> {
        let (bos, eos) = (self.flag("add_bos_token")?, self.flag("add_eos_token")?);
        let set = bos.is_some() || eos.is_some();
        Ok(set.then(|| (bos.unwrap_or(false), eos.unwrap_or(false))))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(false)),
            Some(Value::Bool(set)) => Ok(Some(*set)),
            Some(other) => Err(Error::Config {
                path: self.path.clone(),
                key: key.into(),
                expected: "true or false".into(),
                found: other.to_string(),
            }),
        }
    }

    /// Any other value.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// Where it was read from.
    pub(crate) fn path(&self) -> &std::path::Path {
        &self.path
    }
}

/// A token is written as a string or as an object with its text under `content`.
fn token_text(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::String(text) => Some(text),
        Value::Object(token) => token.get("content")?.as_str(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => None,
    }
}

/// JSON file `name` as an object; absent is empty.
pub(crate) fn object(files: &ModelFiles, name: &str) -> Result<Map<String, Value>, Error> {
    let Some(bytes) = files.read(name)? else { return Ok(Map::new()) };
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::Json { path: files.path(name), reason: e.to_string() })
}
