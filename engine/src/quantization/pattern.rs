//! Module name patterns of quantization rules, with the meaning of Python's `re.match`.
//!
//! Input: patterns from configuration files; a bad or runaway one is an error, never a hang
//! (the engine gives up after a bounded number of backtracking steps).

use crate::Error;
use crate::config::Reader;
use fancy_regex::Regex;
use std::path::PathBuf;

/// A compiled pattern and where it came from.
#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    text: String,
    key: String,
    path: PathBuf,
}

impl Pattern {
    /// Compiles `text`, an entry of `key`.
    pub(super) fn new(reader: &Reader, key: &str, text: &str) -> Result<Self, Error> {
        let regex = Regex::new(text).map_err(|e| Error::Config {
            path: reader.path().to_owned(),
            key: reader.full_key(key),
            expected: format!("regular expressions ({e})"),
            found: format!("{text:?}"),
        })?;
        let (text, path) = (text.to_owned(), reader.path().to_owned());
        Ok(Self { regex, text, key: reader.full_key(key), path })
    }

    /// Whether a match starts at the first character of `name`.
    pub(super) fn matches(&self, name: &str) -> Result<bool, Error> {
        let found = self.regex.find(name).map_err(|e| Error::Config {
            path: self.path.clone(),
            key: self.key.clone(),
            expected: format!("one that can be decided for {name} ({e})"),
            found: format!("{:?}", self.text),
        })?;
        Ok(found.is_some_and(|m| m.start() == 0))
    }
}
