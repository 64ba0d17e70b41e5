//! A strict typed reader over the JSON files of a model folder.
//!
//! Every key is read by name, ignored by name with a reason, or an error: a key nobody knows may
//! change the result. `null` means the same as a missing key, as it does for the writers.
//!
//! Not here: what the keys mean ([`crate::families`], [`crate::quantization`]).

use crate::Error;
use crate::files::ModelFiles;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// The main configuration file of a model folder.
pub const CONFIG: &str = "config.json";

/// Parses file `name` as one JSON object, or none where the file does not exist.
///
/// # Errors
/// [`Error::Io`] and [`Error::Json`] with line and column.
pub fn read_object(files: &ModelFiles, name: &str) -> Result<Option<Map<String, Value>>, Error> {
    let Some(bytes) = files.read(name)? else { return Ok(None) };
    parse_object(&files.path(name), &bytes).map(Some)
}

/// Parses bytes as one JSON object; `path` is for messages.
pub(crate) fn parse_object(path: &Path, bytes: &[u8]) -> Result<Map<String, Value>, Error> {
    let json = |reason: String| Error::Json { path: path.to_owned(), reason };
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(json(format!("expected an object, found {}", show(&other)))),
        Err(e) => Err(json(e.to_string())),
    }
}

/// A JSON object that remembers which of its keys were read.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    /// Dotted path of this object inside its file, ending in a dot; empty at the top.
    prefix: String,
    map: Map<String, Value>,
    seen: RefCell<HashSet<String>>,
}

impl Reader {
    /// Reads `map`, which came from the file `path`.
    pub fn new(path: PathBuf, map: Map<String, Value>) -> Self {
        Self::nested(path, String::new(), map)
    }

    /// Reads `map`, the value of key `key` in the file `path`.
    pub fn nested(path: PathBuf, key: String, map: Map<String, Value>) -> Self {
        let prefix = if key.is_empty() { key } else { key + "." };
        Self { path, prefix, map, seen: RefCell::default() }
    }

    /// The file this object came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys whose value is not null.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.iter().filter(|(_, v)| !v.is_null()).map(|(k, _)| k.as_str())
    }

    /// The value of `key`, marked as read; none where missing or null.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.seen.borrow_mut().insert(key.to_owned());
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether `key` is present, even as null (which some writers use to switch a default off).
    pub fn mentions(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The dotted path of `key` in its file.
    pub fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The error that `key` is not what it must be.
    pub fn error(&self, key: &str, expected: impl Into<String>) -> Error {
        let found = self.map.get(key).map_or_else(|| "missing".to_owned(), show);
        Error::Config {
            path: self.path.clone(),
            key: self.full_key(key),
            expected: expected.into(),
            found,
        }
    }

    /// An integer within `range`.
    ///
    /// # Errors
    /// Like all getters, [`Error::Config`] for another type or a value out of range.
    pub fn integer(&self, key: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, Error> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_u64().filter(|v| range.contains(v)) {
            Some(v) => Ok(Some(v)),
            None => {
                let (low, high) = (range.start(), range.end());
                Err(self.error(key, format!("an integer in {low}..={high}")))
            }
        }
    }

    /// A count in `1..=max`.
    pub fn count(&self, key: &str, max: usize) -> Result<Option<usize>, Error> {
        Ok(self.integer(key, 1..=max as u64)?.map(|v| v as usize))
    }

    /// A count that must be present.
    pub fn need_count(&self, key: &str, max: usize) -> Result<usize, Error> {
        self.count(key, max)?.ok_or_else(|| self.error(key, "a positive integer"))
    }

    /// A number within `range`; integers count as numbers.
    pub fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Error> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_f64().filter(|v| range.contains(v)) {
            Some(v) => Ok(Some(v)),
            None => {
                let (low, high) = (range.start(), range.end());
                Err(self.error(key, format!("a number in {low:?}..={high:?}")))
            }
        }
    }

    /// A boolean.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, Error> {
        self.typed(key, "a list of strings", |v| v.as_array()?.iter().map(Value::as_str).collect())
    }

    /// A list of `len` positive finite numbers.
    pub fn numbers(&self, key: &str, len: usize) -> Result<Option<Vec<f64>>, Error> {
        let expected = || self.error(key, format!("a list of {len} positive numbers"));
        let Some(value) = self.value(key) else { return Ok(None) };
        let list = value.as_array().filter(|a| a.len() == len).ok_or_else(expected)?;
        let positive = |v: &Value| v.as_f64().filter(|v| *v > 0.0 && v.is_finite());
        list.iter().map(positive).collect::<Option<Vec<f64>>>().map(Some).ok_or_else(expected)
    }

    /// A nested object, none where missing, null or empty. The caller finishes it.
    pub fn object(&self, key: &str) -> Result<Option<Self>, Error> {
        let map = self.typed(key, "an object", |v| v.as_object().cloned())?;
        let nested = |m| Self::nested(self.path.clone(), self.full_key(key), m);
        Ok(map.filter(|m| !m.is_empty()).map(nested))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        get: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => get(value).map(Some).ok_or_else(|| self.error(key, expected)),
        }
    }

    /// Refuses `key` unless it is missing or `false`: the feature it switches on is not supported.
    pub fn must_be_off(&self, key: &str) -> Result<(), Error> {
        match self.flag(key)? {
            Some(true) => Err(self.error(key, "false: this feature is not supported")),
            Some(false) | None => Ok(()),
        }
    }

    /// Refuses `key` unless it is missing, null, or an empty list or object.
    pub fn must_be_empty(&self, key: &str) -> Result<(), Error> {
        let empty = match self.value(key) {
            None => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if empty { Ok(()) } else { Err(self.error(key, "null: this feature is not supported")) }
    }

    /// Marks keys as knowingly ignored.
    pub fn ignore(&self, table: &[Ignored]) {
        let keys = table.iter().flat_map(|row| row.keys).map(|k| (*k).to_owned());
        self.seen.borrow_mut().extend(keys);
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`Error::UnknownKeys`] if a key that is not null was neither read nor ignored.
    pub fn finish(&self) -> Result<(), Error> {
        let seen = self.seen.borrow();
        let unknown = self.keys().filter(|k| !seen.contains(*k));
        let keys: Vec<String> = unknown.map(|k| self.full_key(k)).collect();
        if keys.is_empty() {
            return Ok(());
        }
        Err(Error::UnknownKeys { path: self.path.clone(), keys: keys.join(", ") })
    }
}

/// Keys that are knowingly ignored, with the reason why that is right.
#[derive(Debug, Clone, Copy)]
pub struct Ignored {
    /// Why they cannot change the logits.
    pub reason: &'static str,
    /// The keys.
    pub keys: &'static [&'static str],
}

/// A value shortened for a message.
pub(crate) fn show(value: &Value) -> String {
    const MAX: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

/// Keys of `config.json` that no supported family needs.
pub const IGNORED: &[Ignored] = &[
    Ignored {
        reason: "bookkeeping of the tool that wrote the file",
        keys: &[
            "transformers_version",
            "_name_or_path",
            "_commit_hash",
            "_attn_implementation_autoset",
            "_attn_implementation",
            "_attn_implementation_internal",
            "_flash_attn_2_enabled",
            "attn_implementation",
            "transformers.js_config",
            "is_llama_config",
            "unsloth_fixed",
            "unsloth_version",
            "tokenizer_class",
            "processor_class",
            "finetuning_task",
            "task_specific_params",
            "problem_type",
            "id2label",
            "label2id",
            "num_labels",
        ],
    },
    Ignored {
        reason: "each tensor of the checkpoint says its own type",
        keys: &["torch_dtype", "dtype"],
    },
    Ignored {
        reason: "acts in training only",
        keys: &[
            "initializer_range",
            "initializer_factor",
            "attention_dropout",
            "attention_probs_dropout_prob",
            "hidden_dropout",
            "hidden_dropout_prob",
            "resid_pdrop",
            "embd_pdrop",
            "gradient_checkpointing",
            "router_aux_loss_coef",
            "loss_type",
        ],
    },
    Ignored {
        reason: "how the writer computes, not what: the product is the same",
        keys: &[
            "use_cache",
            "pretraining_tp",
            "chunk_size_feed_forward",
            "torchscript",
            "return_dict",
            "output_attentions",
            "output_hidden_states",
            "use_return_dict",
            "use_bfloat16",
            "tf_legacy_loss",
            "output_past",
            "is_decoder", // these architectures are decoders whatever it says
        ],
    },
    Ignored {
        reason: "text and sampling: the tokenizer and the request decide",
        keys: &[
            "bos_token_id",
            "pad_token_id",
            "sep_token_id",
            "unk_token_id",
            "prefix",
            "max_length",
            "model_max_length",
            "min_length",
            "do_sample",
            "early_stopping",
            "num_beams",
            "num_beam_groups",
            "num_return_sequences",
            "diversity_penalty",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
            "repetition_penalty",
            "length_penalty",
            "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size",
            "bad_words_ids",
            "begin_suppress_tokens",
            "suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "decoder_start_token_id",
            "exponential_decay_length_penalty",
            "remove_invalid_values",
            "output_scores",
            "return_dict_in_generate",
        ],
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reader(value: Value) -> Reader {
        let Value::Object(map) = value else { panic!("an object is needed") };
        Reader::new(PathBuf::from("config.json"), map)
    }

    #[test]
    fn unknown_keys_are_named_unless_null_read_or_ignored() {
        let r = reader(json!({"a": 1, "b": null, "use_cache": true, "c": 2, "d": {"x": 1}}));
        r.ignore(IGNORED);
        assert_eq!(r.count("a", 9).unwrap(), Some(1));
        let inner = r.object("d").unwrap().unwrap();
        assert_eq!(inner.finish().unwrap_err().to_string().matches("d.x").count(), 1);
        let err = r.finish().unwrap_err();
        assert!(matches!(&err, Error::UnknownKeys { keys, .. } if keys == "c"), "{err}");
    }

    #[test]
    fn absurd_values_are_config_errors() {
        let r = reader(json!({
            "zero": 0, "minus": -3, "huge": 1e30, "fraction": 2.5, "text": "8", "flag": 1,
            "list": [1, 0], "nan": "NaN"
        }));
        for key in ["zero", "minus", "huge", "fraction", "text"] {
            let err = r.need_count(key, 1 << 20).unwrap_err();
            assert!(matches!(&err, Error::Config { key: k, .. } if k == key), "{err}");
        }
        assert!(r.flag("flag").is_err());
        assert!(r.numbers("list", 2).is_err());
        assert!(r.numbers("list", 3).is_err());
        assert!(r.number("nan", 0.0..=1.0).is_err());
        assert!(r.object("zero").is_err());
        let err = r.need_count("absent", 5).unwrap_err().to_string();
        assert_eq!(err, "config.json: absent is missing, expected a positive integer");
    }

    #[test]
    fn found_values_are_shortened() {
        let err = reader(json!({"k": "é".repeat(500)})).count("k", 2).unwrap_err().to_string();
        assert!(err.contains("..., expected an integer in 1..=2"), "{err}");
        assert!(err.len() < 300);
    }

    #[test]
    fn files_that_are_no_objects_are_json_errors() {
        for bad in ["", "[]", "{", "{\"a\": Infinity}", "\u{feff}{}", "nul"] {
            let err = parse_object(Path::new("f.json"), bad.as_bytes()).unwrap_err();
            assert!(matches!(err, Error::Json { .. }), "{bad}: {err}");
        }
        let deep = "[".repeat(100_000);
        assert!(parse_object(Path::new("f.json"), deep.as_bytes()).is_err());
    }

    #[test]
    fn every_ignored_key_is_listed_once() {
        let mut seen = HashSet::new();
        for key in IGNORED.iter().flat_map(|row| row.keys) {
            assert!(seen.insert(key), "{key} is listed twice");
        }
    }
}
