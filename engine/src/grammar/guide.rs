//! Where a text stands in its grammar.
//!
//! Input: the tokens of one sequence as they are chosen, and those that a drafter proposes, which
//! may be taken back. Output: rows of logits without what the grammar forbids. Not here: grammars
//! themselves ([`super::Grammars`]).

use kernels::program::TokenId;
use llguidance::Matcher;

/// Follows one text through its grammar; a copy goes on by itself.
#[derive(Clone)]
pub struct Guide {
    matcher: Matcher,
    /// The same at the text's beginning.
    origin: Box<Matcher>,
    /// The text's tokens so far.
    tokens: Vec<u32>,
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").field("tokens", &self.tokens.len()).finish_non_exhaustive()
    }
}

impl Guide {
    pub(super) fn new(matcher: Matcher) -> Self {
        Self { origin: Box::new(matcher.clone()), matcher, tokens: Vec::new() }
    }

    /// Sets the logits `[v]` of tokens that may not come next to minus infinity.
    ///
    /// # Errors
    /// Why the grammar allows no token: a limit is exceeded, or nothing in the vocabulary fits.
    pub fn mask(&mut self, logits_v: &mut [f32]) -> Result<(), String> {
        let allowed =
            self.matcher.compute_mask_or_eos().map_err(|e| super::said(&e.to_string()))?;
        let words = allowed.as_slice();
        for (logits, start) in logits_v.chunks_mut(u32::BITS as usize).zip(0..) {
            let word: u32 = words.get::<usize>(start).copied().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
            }
        }
        Ok(())
    }

    /// Goes on by a token. One that is not allowed leaves a guide that allows none.
    pub fn push(&mut self, token: TokenId) {
        self.tokens.push(token.0);
        // A matcher that fails stays so, and says why when it is asked for a mask.
        let _ = self.matcher.consume_token(token.0);
    }

    /// Goes back by `count` tokens, at most to the beginning.
    pub fn pop(&mut self, count: usize) {
        let count = count.min(self.tokens.len());
        self.tokens.truncate(self.tokens.len() - count);
        if count > 0 && (self.matcher.is_error() || self.matcher.rollback(count).is_err()) {
            self.matcher = (*self.origin).clone();
            let _ = self.matcher.consume_tokens(&self.tokens);
        }
    }

    /// How many of `tokens` may come next, one after the other.
    pub fn accepts(&mut self, tokens: &[TokenId]) -> usize {
        let vocab = self.matcher.tok_env().map_or(0, |env| env.tok_trie().vocab_size());
        // One outside the vocabulary would break the matcher.
        let known = tokens.iter().take_while(|token| token.index() < vocab);
        let ids: Vec<u32> = known.map(|token| token.0).collect();
        self.matcher.validate_tokens(&ids).unwrap_or(0)
    }

    /// Whether the text is complete and nothing can follow it.
    pub fn is_over(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }
}
