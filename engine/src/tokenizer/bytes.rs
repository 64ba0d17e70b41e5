//! The bytes of single tokens, which a decoder never shows: it gives out whole characters.
//!
//! Input: how the vocabulary spells a token, and the kind of decoder, which tells how to read the
//! spelling. Not here: text of several tokens ([`super::Tokenizer::decode`]).

use super::{Tokenizer, is_special};
use crate::Error;
use kernels::program::TokenId;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Begins the bytes of special tokens: no text has it.
const SPECIAL_MARK: u8 = 0xff;

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// A character for each byte, as GPT-2 has them.
    ByteLevel,
    /// Text with another character for the space, and `<0x0A>` for single bytes.
    Pieces { space: Option<char>, bytes: bool },
}

impl Tokenizer {
    /// The bytes that each token stands for, by id. Those of a special token are its name after a
    /// byte 0xff, which is in no text; ids without a token have none.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder is of a kind whose spelling is not known.
    pub fn token_bytes(&self) -> Result<Vec<Vec<u8>>, Error> {
        let fail = |reason| Error::Tokenizer { path: self.path.clone(), reason };
        let decoder = serde_json::to_value(self.inner.get_decoder());
        let decoder = decoder.map_err(|e| fail(e.to_string()))?;
        let spelling = Spelling::of(&decoder).ok_or_else(|| {
            let kind = &decoder["type"];
            fail(format!("a decoder of type {kind} tells no bytes of single tokens"))
        })?;
        let bytes_of = byte_level();
        let ids = (0..).map(TokenId).take(self.ids_end());
        Ok(ids.map(|id| self.bytes_of(id, spelling, &bytes_of)).collect())
    }

    /// One beyond the largest id.
    fn ids_end(&self) -> usize {
        let ids = self.inner.get_vocab(true).into_values();
        ids.max().map_or(0, |most| most as usize + 1)
    }

    fn bytes_of(&self, id: TokenId, spelling: Spelling, bytes_of: &HashMap<char, u8>) -> Vec<u8> {
        let Some(token) = self.token(id) else { return Vec::new() };
        if is_special(&self.inner, id) {
            return [&[SPECIAL_MARK], token.as_bytes()].concat();
        }
        if self.is_added(id) {
            return token.into_bytes();
        }
        spelling.read(&token, bytes_of)
    }
}

impl Spelling {
    /// What `decoder` reads.
    fn of(decoder: &Value) -> Option<Self> {
        let single = std::slice::from_ref(decoder);
        let steps = decoder["decoders"].as_array().map_or(single, Vec::as_slice);
        let has = |kind: &str| steps.iter().find(|step| step["type"] == kind);
        if has("ByteLevel").is_some() {
            return Some(Self::ByteLevel);
        }
        let bytes = has("ByteFallback").is_some();
        let metaspace = has("Metaspace").map(|step| &step["replacement"]);
        let replace = has("Replace").filter(|step| step["content"] == json!(" "));
        let space = metaspace.or_else(|| replace.map(|step| &step["pattern"]["String"]));
        let space = space.and_then(Value::as_str).and_then(|text| text.chars().next());
        (bytes || space.is_some()).then_some(Self::Pieces { space, bytes })
    }

    fn read(self, token: &str, bytes_of: &HashMap<char, u8>) -> Vec<u8> {
        match self {
            Self::ByteLevel => {
                let bytes: Option<Vec<u8>> =
                    token.chars().map(|c| bytes_of.get(&c).copied()).collect();
                // A vocabulary may hold what its own spelling cannot write; it stands for itself.
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::Pieces { space, bytes } => match byte_token(token).filter(|_| bytes) {
                Some(byte) => vec![byte],
                None => match space {
                    Some(space) => token.replace(space, " ").into_bytes(),
                    None => token.as_bytes().to_vec(),
                },
            },
        }
    }
}

/// The byte of a token such as `<0x0A>`.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// The byte of each character of the byte-level spelling (Radford et al., GPT-2): printable ones
/// of Latin-1 stand for themselves, the others are counted up from U+0100.
fn byte_level() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=u8::MAX).filter(|byte| !printable(byte));
    let others = ('\u{100}'..).zip(others);
    (0..=u8::MAX).filter(printable).map(|byte| (char::from(byte), byte)).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_spells_every_byte_by_one_character() {
        let bytes_of = byte_level();
        assert_eq!(bytes_of.len(), 256);
        assert_eq!((bytes_of[&'Ġ'], bytes_of[&'Ċ'], bytes_of[&'a']), (b' ', b'\n', b'a'));
        let read = |token| Spelling::ByteLevel.read(token, &bytes_of);
        assert_eq!(read("ĠÃ¤"), " ä".as_bytes());
        assert_eq!(read("\u{2581}"), "\u{2581}".as_bytes(), "not of this spelling");
    }

    #[test]
    fn pieces_have_a_space_of_their_own_and_byte_tokens() {
        let step = |kind: &str| json!({"type": kind});
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let llama =
            json!({"type": "Sequence", "decoders": [replace, step("ByteFallback"), step("Fuse")]});
        let spelling = Spelling::of(&llama).unwrap();
        let read = |token| spelling.read(token, &HashMap::new());
        assert_eq!(read("▁a▁b"), b" a b");
        assert_eq!(read("<0x0A>"), b"\n");
        assert_eq!(read("<0xZZ>"), b"<0xZZ>");
        let metaspace =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"});
        let spelling = Spelling::of(&metaspace).unwrap();
        assert_eq!(spelling.read("<0x0A>", &HashMap::new()), b"<0x0A>", "no byte tokens");
        assert_eq!(Spelling::of(&step("WordPiece")), None);
        assert_eq!(Spelling::of(&Value::Null), None);
    }
}
