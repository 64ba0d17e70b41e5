//! Text to token ids and back.
//!
//! Input: `tokenizer.json` or, where only that exists, a SentencePiece `tokenizer.model`, both with
//! `tokenizer_config.json`. The algorithms are those of the `tokenizers` crate; here are the files,
//! the special tokens and the errors.
//!
//! Not here: tokens that come one by one ([`crate::stream`]), chat templates ([`crate::chat`]).

mod bytes;
mod config;
mod protobuf;
mod sentencepiece;
#[cfg(test)]
mod tests;

pub(crate) use config::{TokenizerConfig, object};

use crate::Error;
use crate::files::ModelFiles;
use kernels::program::TokenId;
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use tokenizers::PostProcessorWrapper;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    special: Vec<(&'static str, String)>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, else `tokenizer.model`, and `tokenizer_config.json`.
    ///
    /// Truncation and padding stored in the file are switched off: prompts are taken whole.
    ///
    /// # Errors
    /// [`Error::MissingFile`] if neither file exists, [`Error::Tokenizer`], [`Error::Json`] or
    /// [`Error::Config`] if one cannot be used, [`Error::Io`] if one cannot be read.
    pub fn from_files(files: &ModelFiles) -> Result<Self, Error> {
        let config = TokenizerConfig::read(files)?;
        if let Some(bytes) = files.read("tokenizer.json")? {
            return Self::from_json(&bytes, &config, files.path("tokenizer.json"));
        }
        if let Some(bytes) = files.read("tokenizer.model")? {
            return Self::from_sentencepiece(&bytes, &config, files.path("tokenizer.model"));
        }
        Err(Error::MissingFile {
            path: files.path("tokenizer.json"),
            needed_for:
                "it turns text into tokens, and there is no tokenizer.model in its place; copy \
                         tokenizer.json from the model's repository"
                    .into(),
        })
    }

    fn from_json(bytes: &[u8], config: &TokenizerConfig, path: PathBuf) -> Result<Self, Error> {
        let inner = guarded(&path, || tokenizers::Tokenizer::from_bytes(bytes))?;
        let mut this = Self { inner, path, special: vec![] };
        this.apply(config, config.explicit_ends()?)?;
        Ok(this)
    }

    fn from_sentencepiece(
        bytes: &[u8],
        config: &TokenizerConfig,
        path: PathBuf,
    ) -> Result<Self, Error> {
        let fail = |reason| Error::Tokenizer { path: path.clone(), reason };
        let model = sentencepiece::Model::parse(bytes).map_err(fail)?;
        let inner = guarded(&path, || model.build())?;
        let mut this = Self { inner, path, special: vec![] };
        // Without a configuration: a begin token if the model has one and no end token, as Llama.
        let ends = config.explicit_ends()?.unwrap_or((true, false));
        let (bos, eos) = ends;
        let ends = (bos && model.bos().is_some(), eos && model.eos().is_some());
        let config = config.or_tokens(model.bos(), model.eos());
        this.apply(&config, Some(ends))?;
        Ok(this)
    }

    /// Marks the configuration's special tokens and, where it says which ends to add, replaces the
    /// post-processor.
    fn apply(&mut self, config: &TokenizerConfig, ends: Option<(bool, bool)>) -> Result<(), Error> {
        let Self { inner, path, special } = self;
        special.extend(config.tokens().map(|(key, token)| (key, token.to_owned())));
        guarded(path, || {
            inner.with_truncation(None)?.with_padding(None);
            let plain = |token: &&str| {
                inner.token_to_id(token).is_some_and(|id| !is_special(inner, TokenId(id)))
            };
            let marked: Vec<_> = config.special_tokens().filter(plain).map(special_token).collect();
            inner.add_special_tokens(marked)
        })?;
        if let Some((bos, eos)) = ends {
            let bos = self.end_token(bos, config, "bos_token")?;
            let eos = self.end_token(eos, config, "eos_token")?;
            self.inner.with_post_processor(Some(ends_processor(
                bos.as_ref(),
                eos.as_ref(),
                &self.path,
            )?));
        }
        Ok(())
    }

    /// Name and id of the token that `add_<key>` asks for; none if not asked or not configured.
    fn end_token(
        &self,
        wanted: bool,
        config: &TokenizerConfig,
        key: &str,
    ) -> Result<Option<(String, u32)>, Error> {
        let Some(token) = config.token(key).filter(|_| wanted) else { return Ok(None) };
        let Some(id) = self.inner.token_to_id(token) else {
            return Err(Error::Tokenizer {
                path: self.path.clone(),
                reason: format!("add_{key} asks for {token:?}, which is not in the vocabulary"),
            });
        };
        Ok(Some((token.to_owned(), id)))
    }

    /// Ids of `text`. Names of special tokens inside the text become those tokens; `add_special`
    /// adds what the model expects around a text (such as a begin token).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the text has a character the vocabulary cannot represent.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, Error> {
        let encoding = guarded(&self.path, || self.inner.encode_fast(text, add_special))?;
        Ok(encoding.get_ids().iter().map(|&id| TokenId(id)).collect())
    }

    /// Text of `ids`; ids without a token print nothing, bytes that are no UTF-8 print U+FFFD,
    /// `skip_special` leaves special tokens out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder fails.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> Result<String, Error> {
        // The crate's own filter misses special tokens that pass the normalizer.
        let kept = ids.iter().filter(|id| !(skip_special && is_special(&self.inner, **id)));
        let kept: Vec<u32> = kept.map(|id| id.0).collect();
        guarded(&self.path, || self.inner.decode(&kept, false))
    }

    /// Id of the token spelled `token`, special or not.
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token).map(TokenId)
    }

    /// The token with this id as the vocabulary spells it (`Ġa`, `▁a`, `<0x0A>`), special or not.
    pub fn token(&self, id: TokenId) -> Option<String> {
        // The crate would give the normalized spelling of an added token.
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id.0);
        added.map(|token| token.content.clone()).or_else(|| self.inner.id_to_token(id.0))
    }

    /// Whether `id` was added to the learnt vocabulary, as special tokens are.
    pub fn is_added(&self, id: TokenId) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id.0)
    }

    /// Number of tokens, special ones included; the model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Key (`bos_token`, `eos_token`, ...) and text of the special tokens that the model names.
    pub fn special_tokens(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.special.iter().map(|(key, token)| (*key, token.as_str()))
    }

    /// Whether decoding `id` can print anything.
    pub(crate) fn prints(&self, id: TokenId, skip_special: bool) -> bool {
        self.inner.id_to_token(id.0).is_some() && !(skip_special && is_special(&self.inner, id))
    }
}

fn is_special(tokenizer: &tokenizers::Tokenizer, id: TokenId) -> bool {
    let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    added.get(&id.0).is_some_and(|token| token.special)
}

fn special_token(text: &str) -> tokenizers::AddedToken {
    tokenizers::AddedToken::from(text, true).normalized(false)
}

/// A post-processor that puts `bos` before and `eos` after a text.
fn ends_processor(
    bos: Option<&(String, u32)>,
    eos: Option<&(String, u32)>,
    path: &Path,
) -> Result<PostProcessorWrapper, Error> {
    let piece = |end: &(String, u32)| json!({"SpecialToken": {"id": end.0, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let single: Vec<Value> =
        bos.into_iter().map(piece).chain([text]).chain(eos.map(piece)).collect();
    let special: serde_json::Map<_, _> = bos
        .into_iter()
        .chain(eos)
        .map(|(t, id)| (t.clone(), json!({"id": t, "ids": [id], "tokens": [t]})))
        .collect();
    let template = json!({
        "type": "TemplateProcessing", "single": single, "special_tokens": special,
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    });
    serde_json::from_value(template)
        .map_err(|e| Error::Tokenizer { path: path.to_owned(), reason: e.to_string() })
}

/// Runs `work` of the `tokenizers` crate; its errors become ours, and so do its panics, since some
/// of its parts index without checks when a file's numbers contradict each other.
fn guarded<T>(path: &Path, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, Error> {
    let fail = |reason| Error::Tokenizer { path: path.to_owned(), reason };
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|e| fail(e.to_string())),
        Err(_) => Err(fail("its parts contradict each other; download it again".into())),
    }
}
