//! Text of one sequence while its tokens arrive, never half a character, and stop strings.
//!
//! Input is one token id after the other from the engine; output is what may be shown so far.
//! Each token costs a decode of the last few tokens, however long the text is.
//!
//! Not here: stop *tokens*, which the engine knows ([`crate::request::Request::stop_tokens`]).

use crate::Error;
use crate::tokenizer::Tokenizer;
use kernels::program::TokenId;
use std::ops::Deref;

/// What a token added to the text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    /// Text that is final; may be empty.
    pub text: String,
    /// Whether a stop string was found; the text before it has been given out, nothing follows.
    pub stopped: bool,
}

/// Turns the tokens of one sequence into text by a tokenizer (a reference or an `Arc`); special tokens
/// print nothing.
///
/// The pieces joined are the text of all tokens decoded at once, up to the first stop string. The
/// one exception: a tokenizer with byte tokens decodes a run of them that is not UTF-8 to one
/// U+FFFD a byte, also where part of the run is valid and was given out before. Here the part
/// stays, and only the bytes after it become U+FFFD.
#[derive(Debug)]
pub struct TextStream<T> {
    detokenizer: Detokenizer<T>,
    stop: StopStrings,
    shown: Vec<TokenId>,
}

impl<T: Deref<Target = Tokenizer>> TextStream<T> {
    /// Starts a text that ends before the first of the `stop` strings; empty ones are ignored.
    pub fn new(tokenizer: T, stop: Vec<String>) -> Self {
        let (detokenizer, stop) = (Detokenizer::new(tokenizer, true), StopStrings::new(stop));
        Self { detokenizer, stop, shown: Vec::new() }
    }

    /// Makes those of `tokens` that are special print as the vocabulary spells them, such as the
    /// one that begins a tool call.
    pub fn showing(mut self, mut tokens: Vec<TokenId>) -> Self {
        tokens.retain(|&token| !self.detokenizer.tokenizer.prints(token, true));
        self.shown = tokens;
        self
    }

    /// Makes this the continuation of `prompt`, whose own text is not given out: without it, many
    /// tokenizers would drop the space before the first generated word.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder fails.
    pub fn after(mut self, prompt: &[TokenId]) -> Result<Self, Error> {
        self.detokenizer.start_after(prompt)?;
        Ok(self)
    }

    /// Takes the next token. After a stop string everything is ignored.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder fails.
    pub fn push(&mut self, token: TokenId) -> Result<Piece, Error> {
        if self.stop.found {
            return Ok(Piece { text: String::new(), stopped: true });
        }
        let mut text = self.detokenizer.push(token)?;
        if self.shown.contains(&token) {
            text += &self.detokenizer.tokenizer.token(token).unwrap_or_default();
        }
        Ok(Piece { text: self.stop.push(&text), stopped: self.stop.found })
    }

    /// Ends the text: gives out what was held back because more might have changed it. A character
    /// that was never completed prints as the decoder prints it (U+FFFD).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder fails.
    pub fn finish(&mut self) -> Result<String, Error> {
        if self.stop.found {
            return Ok(String::new());
        }
        let rest = self.detokenizer.finish()?;
        Ok(self.stop.push(&rest) + &self.stop.finish())
    }
}

/// Most tokens that wait for a character to be completed. Four bytes make one, so what ends in
/// U+FFFD after so many tokens is garbage; the limit keeps the work per token bounded.
const HELD_MAX: usize = 32;

/// Tokens of a prompt that are kept as context: enough for a word, its space and a character that
/// is spread over four of them.
const CONTEXT_TOKENS: usize = 6;

/// Most tokens that share a character of which one byte is still missing.
const PARTS_MAX: usize = 3;

/// Ids to text without half characters.
///
/// A window of tokens is decoded instead of all: `window[..read]` is given out already and only
/// gives the rest its context (a space in front, a continued word).
#[derive(Debug)]
struct Detokenizer<T> {
    tokenizer: T,
    skip_special: bool,
    window: Vec<TokenId>,
    read: usize,
    /// Text of `window[..read]`.
    context: String,
}

impl<T: Deref<Target = Tokenizer>> Detokenizer<T> {
    fn new(tokenizer: T, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, window: Vec::new(), read: 0, context: String::new() }
    }

    /// Takes the last tokens of `prompt` as the context of what follows.
    fn start_after(&mut self, prompt: &[TokenId]) -> Result<(), Error> {
        let printed = |t: &&TokenId| self.tokenizer.prints(**t, self.skip_special);
        let mut last: Vec<TokenId> =
            prompt.iter().rev().filter(printed).take(CONTEXT_TOKENS).copied().collect();
        last.reverse();
        self.window = last;
        self.read = self.window.len();
        self.context = self.decode(0, self.read)?;
        Ok(())
    }

    fn push(&mut self, token: TokenId) -> Result<String, Error> {
        if !self.tokenizer.prints(token, self.skip_special) {
            return Ok(String::new());
        }
        self.window.push(token);
        let text = self.decode(0, self.window.len())?;
        if text.len() > self.context.len() && !text.ends_with(char::REPLACEMENT_CHARACTER) {
            return self.give(self.window.len());
        }
        if self.window.len() - self.read > HELD_MAX {
            return self.settle(&text);
        }
        Ok(String::new())
    }

    fn finish(&mut self) -> Result<String, Error> {
        self.give(self.window.len())
    }

    fn decode(&self, from: usize, to: usize) -> Result<String, Error> {
        self.tokenizer.decode(&self.window[from..to], self.skip_special)
    }

    /// Gives out `window[read..end]`, which becomes the context of what follows.
    fn give(&mut self, end: usize) -> Result<String, Error> {
        let text = self.decode(0, end)?;
        let new = match text.strip_prefix(&self.context) {
            Some(new) => new.to_owned(),
            // Byte tokens that made text of their own, but none together with later ones.
            None => self.decode(self.read, end)?,
        };
        self.window.drain(..self.read);
        self.read = end - self.read;
        self.context = self.decode(0, self.read)?;
        Ok(new)
    }

    /// Too many tokens are held: gives out all but those of a last character that may yet be
    /// completed, recognised by the two parts printing alone what they print together.
    fn settle(&mut self, text: &str) -> Result<String, Error> {
        let len = self.window.len();
        if !text.ends_with(char::REPLACEMENT_CHARACTER) {
            // They print nothing: without them the context stays what it is.
            self.window.truncate(self.read);
            return Ok(String::new());
        }
        for end in len - PARTS_MAX..len {
            if self.decode(0, end)? + &self.decode(end, len)? == text {
                return self.give(end);
            }
        }
        self.give(len)
    }
}

/// Finds the stop string that is complete first (of several that end together, the longest) and
/// holds back text that may be the beginning of one.
#[derive(Debug)]
struct StopStrings {
    patterns: Vec<Pattern>,
    /// Not given out yet: as long as the longest beginning that the text ends with.
    held: String,
    found: bool,
}

impl StopStrings {
    fn new(stop: Vec<String>) -> Self {
        let stop = stop.into_iter().filter(|s| !s.is_empty());
        Self { patterns: stop.map(Pattern::new).collect(), held: String::new(), found: false }
    }

    /// Text that may be given out after `text` has come.
    fn push(&mut self, text: &str) -> String {
        let start = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let done = self.patterns.iter_mut().filter_map(|p| p.step(byte)).max();
            if let Some(len) = done {
                self.found = true;
                self.held.truncate(start + at + 1 - len);
                return std::mem::take(&mut self.held);
            }
        }
        let keep = self.patterns.iter().map(|p| p.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// One stop string and how much of it the text ends with (Knuth, Morris and Pratt 1977): each byte
/// is looked at once, so a long stop string costs no more than a short one.
#[derive(Debug)]
struct Pattern {
    bytes: Vec<u8>,
    /// For each length matched, the next shorter one that the text ends with as well.
    shorter: Vec<usize>,
    matched: usize,
}

impl Pattern {
    fn new(text: String) -> Self {
        let bytes = text.into_bytes();
        let mut shorter = vec![0; bytes.len() + 1];
        let mut k = 0;
        for i in 1..bytes.len() {
            while k > 0 && bytes[i] != bytes[k] {
                k = shorter[k];
            }
            k += usize::from(bytes[i] == bytes[k]);
            shorter[i + 1] = k;
        }
        Self { bytes, shorter, matched: 0 }
    }

    /// Takes the next byte; the pattern's length if it is complete. Not to be called after that.
    fn step(&mut self, byte: u8) -> Option<usize> {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.shorter[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        (self.matched == self.bytes.len()).then_some(self.matched)
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
