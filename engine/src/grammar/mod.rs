//! Grammars: which tokens may come next, so that a text is JSON, matches a schema or an expression.
//!
//! The parser is the `llguidance` crate's. Here: which kinds of grammars there are, what a
//! vocabulary is to the parser, and the limits a grammar is held to. [`Guide`] follows one text.
//!
//! Not here: the API's names for grammars (crate `server`), how tokens are chosen among those
//! that are allowed ([`crate::sampler`]). A grammar may leave several ways to split a text into
//! tokens; the model chooses among them, as it does without a grammar.

mod guide;
mod patterns;
mod schema;
#[cfg(test)]
mod tests;

pub use guide::Guide;

use crate::tokenizer::Tokenizer;
use kernels::program::TokenId;
use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::panic::catch_unwind;
use std::sync::Arc;

/// White space between the parts of JSON: one space, or a new line and its indentation, but no page
/// of blanks, in which a small model can get lost.
const JSON_SPACE: &str = r" |\r?\n[ \t]{0,20}";

/// Bytes of a grammar.
const SOURCE_MAX: usize = 64 << 10;

/// Stack in bytes on which a grammar is parsed: the crate goes from rule to rule and from reference
/// to reference by recursion, of which there can be some thousands, at up to 13 KB each.
const STACK: usize = 256 << 20;

/// What may follow a backslash: not `u`, by which a key could be spelled in another way and escape
/// what the schema says of it.
const JSON_ESCAPES: &str = "nrbtf\\\"";

/// States a lexer may have, at about 1 to 2 KB each; the schemas of the JSON Schema test suite
/// need a few hundred.
const LEXER_STATES_MAX: usize = 20_000;

/// What a text must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum GrammarSource {
    /// A JSON object.
    JsonObject,
    /// A JSON value that is valid by this schema (drafts 4 to 2020-12; see
    /// [`Grammars::guide`] for what is not supported).
    JsonSchema(Value),
    /// The whole text matches this regular expression (the syntax of the `regex` crate, without
    /// look-around, and anchors at the ends alone).
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A context-free grammar in the Lark form of the `llguidance` crate, from its rule `start`.
    Lark(String),
    /// The same, in whose rules `@s0`, `@s1`, ... stand for values that are valid by these schemas.
    Mixed {
        /// The grammar around the values.
        lark: String,
        /// As in [`Self::JsonSchema`].
        schemas: Vec<Value>,
    },
}

/// Why there is no guide.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// The grammar says nothing that can be followed.
    #[error("{reason}")]
    Source {
        /// What is wrong with it.
        reason: String,
    },
    /// The vocabulary cannot be read as bytes.
    #[error("this model's tokenizer offers no structured output: {reason}")]
    Vocabulary {
        /// What is missing.
        reason: String,
    },
}

/// Makes guides for the texts of one model; costs about 0.1 s to make for 32,000 tokens, so it is
/// made once.
pub struct Grammars {
    factory: ParserFactory,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let vocab = self.factory.tok_env().tok_trie().vocab_size();
        f.debug_struct("Grammars").field("vocab", &vocab).finish_non_exhaustive()
    }
}

impl Grammars {
    /// Grammars over the tokens of `tokenizer`, for a model of `vocab` logits whose texts end with
    /// one of `end_tokens`.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`] if the tokenizer's tokens have no bytes of their own.
    pub fn new(
        tokenizer: &Tokenizer,
        vocab: usize,
        end_tokens: &[TokenId],
    ) -> Result<Self, GrammarError> {
        let fail = |reason: crate::Error| GrammarError::Vocabulary { reason: reason.to_string() };
        let mut words = tokenizer.token_bytes().map_err(fail)?;
        words.resize(vocab, Vec::new());
        Self::from_words(&words, end_tokens)
    }

    /// Grammars over tokens of these bytes, by id; empty ones are never allowed. The bytes of a
    /// special token begin with 0xff, which is in no text.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`] if the tokens make no vocabulary.
    pub fn from_words(words: &[Vec<u8>], end_tokens: &[TokenId]) -> Result<Self, GrammarError> {
        let fail = |reason: String| GrammarError::Vocabulary { reason };
        let size = u32::try_from(words.len()).map_err(|e| fail(e.to_string()))?;
        let mut ends: Vec<u32> = end_tokens.iter().map(|t| t.0).filter(|&t| t < size).collect();
        if ends.is_empty() {
            ends.push(llguidance::toktrie::INVALID_TOKEN);
        }
        // The crate checks by assertion.
        let trie = catch_unwind(|| {
            let trie = TokTrie::from(&TokRxInfo::new(size, ends[0]), words);
            if ends.len() > 1 { trie.with_eos_tokens(&ends) } else { trie }
        });
        let trie = trie.map_err(|_| fail("its tokens make no tree".into()))?;
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|e| fail(e.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory })
    }

    /// A guide at the beginning of a text. Takes milliseconds, with large schemas tens of them.
    ///
    /// # Errors
    /// [`GrammarError::Source`] says what is wrong with the grammar, which keyword of a schema is
    /// not supported, or which limit it exceeds.
    pub fn guide(&self, source: &GrammarSource) -> Result<Guide, GrammarError> {
        let refuse = |reason: String| Err(GrammarError::Source { reason });
        let bytes = source.len();
        if bytes > SOURCE_MAX {
            return refuse(format!("it has {bytes} bytes, expected at most {SOURCE_MAX}"));
        }
        let made = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK);
            thread.spawn_scoped(scope, || self.parse(source)).map(|thread| thread.join())
        });
        match made {
            Ok(Ok(guide)) => guide,
            // The crate is careful, but some of its messages cut text within a character.
            Ok(Err(_)) => refuse("it cannot be read".into()),
            Err(e) => refuse(format!("it cannot be read now: {e}")),
        }
    }

    fn parse(&self, source: &GrammarSource) -> Result<Guide, GrammarError> {
        let matcher = Matcher::new(self.factory.create_parser(top_level(source)?));
        match matcher.get_error() {
            None => Ok(Guide::new(matcher)),
            Some(reason) => Err(GrammarError::Source { reason: said(&reason) }),
        }
    }
}

impl GrammarSource {
    /// Its size in bytes, about.
    fn len(&self) -> usize {
        match self {
            Self::JsonObject => 0,
            Self::JsonSchema(schema) => schema.to_string().len(),
            Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(texts) => texts.iter().map(|text| text.len() + 1).sum(),
            Self::Mixed { lark, schemas } => {
                lark.len() + schemas.iter().map(|schema| schema.to_string().len()).sum::<usize>()
            }
        }
    }
}

/// Limits that keep a mask under about 15 ms and a grammar under about 50 MB.
fn limits() -> ParserLimits {
    ParserLimits {
        max_lexer_states: LEXER_STATES_MAX,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// The source as the crate takes it.
fn top_level(source: &GrammarSource) -> Result<TopLevelGrammar, GrammarError> {
    let refuse = |reason: &str| Err(GrammarError::Source { reason: reason.into() });
    Ok(match source {
        GrammarSource::JsonObject => of_schema(&json!({"type": "object"}))?,
        GrammarSource::JsonSchema(schema) => of_schema(schema)?,
        GrammarSource::Regex(regex) => TopLevelGrammar::from_regex(unanchored(regex)),
        GrammarSource::Choice(choices) if choices.iter().all(String::is_empty) => {
            return refuse("there is nothing to choose from: give at least one text");
        }
        GrammarSource::Choice(choices) => {
            let choices: Vec<String> = choices.iter().map(|text| json!(text).to_string()).collect();
            TopLevelGrammar::from_lark(format!("start: {}", choices.join(" | ")))
        }
        GrammarSource::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        GrammarSource::Mixed { lark, schemas } => {
            let mut mixed = TopLevelGrammar::from_lark(lark.clone());
            for (i, schema) in schemas.iter().enumerate() {
                let mut parts = of_schema(schema)?.grammars;
                parts.iter_mut().for_each(|part| part.name = Some(format!("s{i}")));
                mixed.grammars.extend(parts);
            }
            mixed
        }
    })
}

/// Without anchors at the ends: the whole text must match in any case.
fn unanchored(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    let Some(open) = regex.strip_suffix('$') else { return regex };
    let slashes = open.chars().rev().take_while(|&c| c == '\\').count();
    if slashes.is_multiple_of(2) { open } else { regex }
}

fn of_schema(schema: &Value) -> Result<TopLevelGrammar, GrammarError> {
    let mut schema = schema::sound(schema).map_err(|reason| GrammarError::Source { reason })?;
    let options = json!({"whitespace_pattern": JSON_SPACE, "json_allowed_escapes": JSON_ESCAPES});
    schema.insert("x-guidance".into(), options);
    let grammar = GrammarWithLexer::from_json_schema(Value::Object(schema));
    Ok(TopLevelGrammar::from_grammar(grammar))
}

/// The first line of what the crate says, as the end of a sentence of ours: more lines show its
/// inside.
fn said(message: &str) -> String {
    // Its remedy is an option that takes what is not valid.
    if message.starts_with("oneOf constraints") {
        return "oneOf is not supported where alternatives may overlap: use anyOf".into();
    }
    let mut lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut line = lines.next().unwrap_or("it is wrong").to_owned();
    if let (true, Some(last)) = (line.ends_with(':'), lines.next_back()) {
        line = format!("{line} {}", last.trim_start_matches("error: "));
    }
    let line = line.replace("Unimplemented keys:", "keywords that are not supported:");
    line.trim_end_matches('.').to_owned()
}
