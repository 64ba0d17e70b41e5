//! A SentencePiece `tokenizer.model` turned into a tokenizer of the `tokenizers` crate.
//!
//! BPE models become what transformers' Llama converter makes of them: merges derived from the
//! scores, a space in front of each text, byte fallback; unigram models keep their scores. As in
//! that converter, `remove_extra_whitespaces` does not change a BPE model. Models that rewrite
//! characters (a non-empty `precompiled_charsmap`) are refused with the remedy.
//!
//! Not here: the wire format ([`super::protobuf`]), begin and end tokens ([`super::Tokenizer`]).

use super::protobuf::{Fields, Wire};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, Tokenizer};

/// Longest piece in bytes; published vocabularies stay below 200, and the search for merges is
/// quadratic in it.
const PIECE_BYTES_MAX: usize = 1024;

const REMEDY: &str = "convert it to tokenizer.json with transformers";

/// What a piece is for, numbered as in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

#[derive(Debug)]
struct Piece {
    text: String,
    score: f32,
    kind: Kind,
}

/// A parsed model file.
#[derive(Debug)]
pub(super) struct Model {
    pieces: Vec<Piece>,
    trainer: Trainer,
    normalizer: Normalizer,
}

/// The part of `TrainerSpec` that matters after training; defaults as in the format.
#[derive(Debug)]
struct Trainer {
    model_type: u64,
    byte_fallback: bool,
    whitespace_suffix: bool,
    bos: i32,
    eos: i32,
}

/// The part of `NormalizerSpec` that matters.
#[derive(Debug)]
struct Normalizer {
    charsmap: bool,
    dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Model {
    /// Reads and checks a model file; the error says what is wrong and what to do.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            trainer: Trainer::default(),
            normalizer: Normalizer::default(),
        };
        // A file cut between two fields is seen by the lack of these, which come last.
        let mut missing = vec!["trainer_spec", "normalizer_spec"];
        for field in Fields::new(bytes) {
            match field.map_err(|e| format!("not a SentencePiece model: {e}"))? {
                (1, value) => model.pieces.push(Piece::parse(message(value)?)?),
                (2, value) => {
                    model.trainer.read(message(value)?)?;
                    missing.retain(|name| *name != "trainer_spec");
                }
                (3, value) => {
                    model.normalizer.read(message(value)?)?;
                    missing.retain(|name| *name != "normalizer_spec");
                }
                (5, value) => model.refuse_denormalizer(message(value)?)?,
                _ => {}
            }
        }
        if let Some(name) = missing.first() {
            return Err(format!("not a whole SentencePiece model: it has no {name}"));
        }
        model.check()?;
        Ok(model)
    }

    fn refuse_denormalizer(&self, spec: &[u8]) -> Result<(), String> {
        let mut denormalizer = Normalizer::default();
        denormalizer.read(spec)?;
        if denormalizer.charsmap {
            return Err(format!("it rewrites decoded characters, not supported: {REMEDY}"));
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        let refused = [
            (
                !matches!(self.trainer.model_type, 1 | 2),
                format!(
                    "model type {} is not supported, expected 1 (unigram) or 2 (BPE)",
                    self.trainer.model_type
                ),
            ),
            (self.normalizer.charsmap, "it rewrites characters (precompiled_charsmap)".to_owned()),
            (!self.normalizer.escape_whitespaces, "escape_whitespaces is false".to_owned()),
            (self.trainer.whitespace_suffix, "treat_whitespace_as_suffix is true".to_owned()),
        ];
        if let Some((_, reason)) = refused.into_iter().find(|(wrong, _)| *wrong) {
            return Err(format!("{reason}: {REMEDY}"));
        }
        self.check_ids()
    }

    fn check_ids(&self) -> Result<(), String> {
        let unknown = self.pieces.iter().filter(|p| p.kind == Kind::Unknown).count();
        if unknown != 1 {
            return Err(format!("{unknown} pieces of type unknown, expected one"));
        }
        for (name, id) in [("bos_id", self.trainer.bos), ("eos_id", self.trainer.eos)] {
            let Ok(at) = usize::try_from(id) else { continue };
            match self.pieces.get(at).map(|piece| piece.kind) {
                Some(Kind::Control | Kind::UserDefined) => {}
                Some(kind) => return Err(format!("{name} is {id}, a piece of type {kind:?}")),
                None => return Err(format!("{name} is {id} of {} pieces", self.pieces.len())),
            }
        }
        let mut seen = HashMap::new();
        for (id, piece) in self.pieces.iter().enumerate() {
            if let Some(first) = seen.insert(&piece.text, id) {
                return Err(format!("pieces {first} and {id} are both {:?}", piece.text));
            }
        }
        Ok(())
    }

    /// The begin token, if the model has one.
    pub(super) fn bos(&self) -> Option<&str> {
        self.text(self.trainer.bos)
    }

    /// The end token, if the model has one.
    pub(super) fn eos(&self) -> Option<&str> {
        self.text(self.trainer.eos)
    }

    fn text(&self, id: i32) -> Option<&str> {
        let piece = self.pieces.get(usize::try_from(id).ok()?)?;
        Some(&piece.text)
    }

    fn unknown(&self) -> (usize, &str) {
        let unknown = self.pieces.iter().enumerate().find(|(_, p)| p.kind == Kind::Unknown);
        unknown.map_or((0, ""), |(id, piece)| (id, piece.text.as_str()))
    }

    /// The tokenizer, without begin and end tokens.
    pub(super) fn build(&self) -> Result<Tokenizer, Box<dyn std::error::Error + Send + Sync>> {
        let mut tokenizer = match self.trainer.model_type {
            2 => Tokenizer::new(self.bpe()?),
            _ => Tokenizer::new(self.unigram()?),
        };
        tokenizer.with_normalizer(part::<NormalizerWrapper>(self.normalizer_json())?)?;
        tokenizer.with_decoder(part::<DecoderWrapper>(self.decoder_json())?);
        let added = |kinds: &'static [Kind], special| {
            let chosen = self.pieces.iter().filter(move |p| kinds.contains(&p.kind));
            chosen.map(move |p| AddedToken::from(p.text.as_str(), special).normalized(false))
        };
        tokenizer.add_special_tokens(added(&[Kind::Unknown, Kind::Control], true))?;
        tokenizer.add_tokens(added(&[Kind::UserDefined], false))?;
        Ok(tokenizer)
    }

    fn bpe(&self) -> tokenizers::Result<BPE> {
        let vocab: HashMap<&str, u32> =
            self.pieces.iter().zip(0..).map(|(p, id)| (p.text.as_str(), id)).collect();
        let merges = self.merges(&vocab);
        let vocab: Vocab = vocab.into_iter().map(|(text, id)| (text.to_owned(), id)).collect();
        BPE::builder()
            .vocab_and_merges(vocab, merges)
            .unk_token(self.unknown().1.to_owned())
            .fuse_unk(true)
            .byte_fallback(self.trainer.byte_fallback)
            .build()
    }

    /// Every way to make a piece out of two, best score first; among equal scores the longer first
    /// halves first, then vocabulary order: the order transformers derives.
    fn merges(&self, vocab: &HashMap<&str, u32>) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for piece in self.pieces.iter().filter(|p| p.joins()) {
            let start = found.len();
            for (at, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(at);
                if let (Some(l), Some(r)) = (self.half(vocab, left), self.half(vocab, right)) {
                    found.push((piece.score, left, right, (l, r)));
                }
            }
            found[start..].sort_by_key(|(.., ids)| *ids);
        }
        let chars = |text: &str| text.chars().count();
        found.sort_by(|a, b| {
            let lengths = |m: &(f32, &str, &str, _)| (chars(m.1), chars(m.2));
            b.0.total_cmp(&a.0).then_with(|| lengths(b).cmp(&lengths(a)))
        });
        found.into_iter().map(|(_, l, r, _)| (l.to_owned(), r.to_owned())).collect()
    }

    /// Id of `text` if it can be half of a merge.
    fn half(&self, vocab: &HashMap<&str, u32>, text: &str) -> Option<u32> {
        let id = *vocab.get(text)?;
        self.pieces[id as usize].joins().then_some(id)
    }

    fn unigram(&self) -> tokenizers::Result<Unigram> {
        let vocab = self.pieces.iter().map(|p| (p.text.clone(), f64::from(p.score))).collect();
        Unigram::from(vocab, Some(self.unknown().0), self.trainer.byte_fallback)
    }

    fn normalizer_json(&self) -> Value {
        let mut steps = Vec::new();
        if self.trainer.model_type == 1 && self.normalizer.remove_extra_whitespaces {
            steps.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
            steps.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
        }
        if self.normalizer.dummy_prefix {
            steps.push(json!({"type": "Prepend", "prepend": "▁"}));
        }
        steps.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}));
        json!({"type": "Sequence", "normalizers": steps})
    }

    fn decoder_json(&self) -> Value {
        let mut steps = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.normalizer.dummy_prefix {
            steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": steps})
    }
}

fn part<T: DeserializeOwned>(json: Value) -> Result<Option<T>, serde_json::Error> {
    serde_json::from_value(json).map(Some)
}

impl Piece {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (mut text, mut score, mut kind) = (None, 0.0, Kind::Normal);
        for field in Fields::new(bytes) {
            match field? {
                (1, value) => text = Some(string(value)?),
                (2, Wire::Fixed32(bits)) => score = f32::from_bits(bits),
                (3, Wire::Varint(number)) => kind = Kind::parse(number)?,
                (number @ (2 | 3), value) => return Err(mistyped(number, value)),
                _ => {}
            }
        }
        let text = text.filter(|t| !t.is_empty()).ok_or("a piece has no text")?;
        if text.len() > PIECE_BYTES_MAX {
            return Err(format!("a piece has {} bytes, limit {PIECE_BYTES_MAX}", text.len()));
        }
        if !score.is_finite() {
            return Err(format!("the score of piece {text:?} is {score}"));
        }
        Ok(Self { text, score, kind })
    }

    /// Whether it takes part in merges.
    fn joins(&self) -> bool {
        matches!(self.kind, Kind::Normal | Kind::UserDefined | Kind::Unused)
    }
}

impl Kind {
    fn parse(number: u64) -> Result<Self, String> {
        use Kind::{Byte, Control, Normal, Unknown, Unused, UserDefined};
        [Normal, Unknown, Control, UserDefined, Unused, Byte]
            .into_iter()
            .find(|kind| *kind as u64 == number)
            .ok_or_else(|| format!("a piece has type {number}, expected 1 to 6"))
    }
}

impl Default for Trainer {
    fn default() -> Self {
        Self { model_type: 1, byte_fallback: false, whitespace_suffix: false, bos: 1, eos: 2 }
    }
}

impl Trainer {
    fn read(&mut self, bytes: &[u8]) -> Result<(), String> {
        for field in Fields::new(bytes) {
            match field? {
                (3, Wire::Varint(value)) => self.model_type = value,
                (24, Wire::Varint(value)) => self.whitespace_suffix = value != 0,
                (35, Wire::Varint(value)) => self.byte_fallback = value != 0,
                // Ids are int32: negative (none) numbers are sign-extended to 64 bits.
                (41, Wire::Varint(value)) => self.bos = value as i32,
                (42, Wire::Varint(value)) => self.eos = value as i32,
                (number @ (3 | 24 | 35 | 41 | 42), value) => return Err(mistyped(number, value)),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Default for Normalizer {
    fn default() -> Self {
        Self {
            charsmap: false,
            dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

impl Normalizer {
    fn read(&mut self, bytes: &[u8]) -> Result<(), String> {
        for field in Fields::new(bytes) {
            match field? {
                (2, Wire::Bytes(map)) => self.charsmap = !map.is_empty(),
                (3, Wire::Varint(value)) => self.dummy_prefix = value != 0,
                (4, Wire::Varint(value)) => self.remove_extra_whitespaces = value != 0,
                (5, Wire::Varint(value)) => self.escape_whitespaces = value != 0,
                (number @ 2..=5, value) => return Err(mistyped(number, value)),
                _ => {}
            }
        }
        Ok(())
    }
}

fn message(value: Wire<'_>) -> Result<&[u8], String> {
    match value {
        Wire::Bytes(bytes) => Ok(bytes),
        Wire::Varint(_) | Wire::Fixed64(_) | Wire::Fixed32(_) => {
            Err(format!("not a SentencePiece model: expected a message, found {value:?}"))
        }
    }
}

fn string(value: Wire<'_>) -> Result<String, String> {
    let bytes = message(value)?;
    String::from_utf8(bytes.to_vec()).map_err(|_| format!("piece {bytes:?} is not UTF-8"))
}

fn mistyped(number: u32, value: Wire<'_>) -> String {
    format!("field {number} has the wrong type: {value:?}")
}

#[cfg(test)]
#[path = "sentencepiece_tests.rs"]
mod tests;
