//! Which draft vocabularies fit a verifier's, and how ids and logits pass between the two.
//!
//! Tokens are compared by their spelling, never by how many there are: models pad their
//! embeddings differently (Qwen2.5 0.5B to 151936 rows, 7B to 152064), and vocabularies of equal
//! size may have nothing in common. Not here: drafting. Input: two tokenizers and the row counts
//! of two models.

use crate::tokenizer::Tokenizer;
use kernels::program::TokenId;
use std::collections::HashMap;
use std::fmt;

/// Differences that an error names.
const NAMED: usize = 5;
/// Characters of a token that an error shows.
const SHOWN: usize = 32;

/// The ids of a verifier in terms of its draft's.
///
/// Two vocabularies fit if they have the same ordinary tokens, in whatever order. Added tokens
/// (special ones and the like) may be missing on either side or have other names: instruction
/// models rename reserved ones, and a draft that cannot propose one costs a token, no more.
///
/// What is not compared is how text is split (merges, scores, normalizers): all text is split by
/// the verifier's tokenizer and drafts are compared by id, so other splits in the draft's training
/// can cost acceptance but never change a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VocabMap {
    verifier_vocab: usize,
    draft_vocab: usize,
    /// The draft's id of each verifier token, `[verifier_vocab]`; none where ids mean the same.
    moved: Option<Vec<Option<TokenId>>>,
}

impl VocabMap {
    /// Compares two vocabularies; `*_vocab` are the rows of each model's logits, which may be more
    /// than the tokenizer has tokens. Tokens beyond a model's rows count as missing.
    ///
    /// # Errors
    /// [`VocabMismatch`] if one has an ordinary token that the other lacks.
    pub fn between(
        verifier: &Tokenizer,
        verifier_vocab: usize,
        draft: &Tokenizer,
        draft_vocab: usize,
    ) -> Result<Self, VocabMismatch> {
        let verifier = Tokens::of(verifier, verifier_vocab);
        let draft = Tokens::of(draft, draft_vocab);
        let [missed, unknown] = [verifier.missing_in(&draft), draft.missing_in(&verifier)];
        if !missed.is_empty() || !unknown.is_empty() {
            return Err(mismatch([&verifier, &draft], [&missed, &unknown]));
        }
        let ids = verifier.spelled.iter().map(|token| draft.id(token.as_deref()?));
        let ids: Vec<Option<TokenId>> = ids.collect();
        // A token that the other has no id for may stand where the other is padded.
        let clash = |(i, token): (usize, &Option<String>)| {
            let other = draft.spelled.get(i).and_then(Option::as_ref);
            ids[i].is_some_and(|id| id.index() != i)
                || token.as_ref().zip(other).is_some_and(|(a, b)| a != b)
        };
        let moved = verifier.spelled.iter().enumerate().any(clash);
        Ok(Self { verifier_vocab, draft_vocab, moved: moved.then_some(ids) })
    }

    /// For models whose ids are known to mean the same: copies of one checkpoint, or models
    /// without tokenizers.
    pub fn same(verifier_vocab: usize, draft_vocab: usize) -> Self {
        Self { verifier_vocab, draft_vocab, moved: None }
    }

    /// Columns of the draft's logits.
    pub fn draft_vocab(&self) -> usize {
        self.draft_vocab
    }

    /// The draft's id of the verifier's `token`.
    ///
    /// One that the draft lacks (its padding is shorter, or a special token is unknown to it) is
    /// fed under the same id where the draft has that row, else as id 0: the draft guesses worse
    /// behind it, which verification makes good.
    pub fn to_draft(&self, token: TokenId) -> TokenId {
        let known = match &self.moved {
            None => None,
            Some(ids) => ids.get(token.index()).copied().flatten(),
        };
        let row = || if token.index() < self.draft_vocab { token } else { TokenId(0) };
        known.unwrap_or_else(row)
    }

    /// Rewrites a row of the draft's logits `[draft_vocab]` into `out` as `[verifier_vocab]` in
    /// the verifier's ids: minus infinity where the draft has no such token.
    pub fn row(&self, draft_logits: &[f32], out: &mut Vec<f32>) {
        out.clear();
        let logit = |id: TokenId| draft_logits.get(id.index()).copied();
        match &self.moved {
            None => out.extend(draft_logits.iter().take(self.verifier_vocab)),
            Some(ids) => {
                out.extend(ids.iter().map(|id| id.and_then(logit).unwrap_or(f32::NEG_INFINITY)));
            }
        }
        out.resize(self.verifier_vocab, f32::NEG_INFINITY);
    }

    /// Whether [`Self::row`] would copy its input unchanged, so that it need not be called.
    pub fn is_identity(&self) -> bool {
        self.moved.is_none() && self.verifier_vocab == self.draft_vocab
    }
}

/// A tokenizer's vocabulary as far as a model has rows for it.
struct Tokens {
    /// By id; none is a row without a token.
    spelled: Vec<Option<String>>,
    ids: HashMap<String, TokenId>,
    added: Vec<bool>,
}

impl Tokens {
    fn of(tokenizer: &Tokenizer, vocab: usize) -> Self {
        let all = || (0..vocab as u32).map(TokenId);
        let spelled: Vec<_> = all().map(|id| tokenizer.token(id)).collect();
        let ids = all().zip(&spelled).filter_map(|(id, token)| Some((token.clone()?, id)));
        let added = all().map(|id| tokenizer.is_added(id)).collect();
        Self { ids: ids.collect(), added, spelled }
    }

    fn id(&self, token: &str) -> Option<TokenId> {
        self.ids.get(token).copied()
    }

    /// Places of the ordinary tokens that `other` lacks, ascending.
    fn missing_in(&self, other: &Self) -> Vec<usize> {
        let lacks = |token: &String| !other.ids.contains_key(token);
        let ordinary = self.spelled.iter().enumerate().filter(|(i, _)| !self.added[*i]);
        ordinary.filter(|(_, t)| t.as_ref().is_some_and(lacks)).map(|(i, _)| i).collect()
    }

    /// The beginning of token `i`, for an error.
    fn shown(&self, i: usize) -> Option<String> {
        Some(self.spelled.get(i)?.as_ref()?.chars().take(SHOWN).collect())
    }
}

fn mismatch([verifier, draft]: [&Tokens; 2], [missed, unknown]: [&[usize]; 2]) -> VocabMismatch {
    let mut places: Vec<usize> = [missed, unknown].concat();
    places.sort_unstable();
    places.dedup();
    let difference = |i: usize| Difference {
        id: TokenId(i as u32),
        verifier: verifier.shown(i),
        draft: draft.shown(i),
    };
    VocabMismatch {
        tokens: [verifier, draft].map(|t| t.ids.len()),
        missing: missed.len(),
        unknown: unknown.len(),
        first: places.into_iter().take(NAMED).map(difference).collect(),
    }
}

/// Why a draft's vocabulary does not fit its verifier's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the draft's vocabulary is not the verifier's: of {} and {} tokens, {missing} of the \
     verifier's are missing in the draft and {unknown} of the draft's are unknown to the verifier; \
     first differences: {}; choose a draft with the verifier's tokenizer, such as a smaller model \
     of its family, or draft by lookup, which needs no model",
    tokens[0], tokens[1], listed(first)
)]
pub struct VocabMismatch {
    /// Tokens of the verifier and of the draft.
    pub tokens: [usize; 2],
    /// Ordinary tokens of the verifier that the draft lacks.
    pub missing: usize,
    /// Ordinary tokens of the draft that the verifier lacks.
    pub unknown: usize,
    /// The first of them by id.
    pub first: Vec<Difference>,
}

/// An id at which one side has a token that the other lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The id in both vocabularies.
    pub id: TokenId,
    /// The beginning of the verifier's token with this id, if it has one.
    pub verifier: Option<String>,
    /// The beginning of the draft's token with this id, if it has one.
    pub draft: Option<String>,
}

/// For example `id 7 is "a" in the verifier and "b" in the draft`.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |token: &Option<String>| {
            token.as_ref().map_or_else(|| "nothing".to_owned(), |t| format!("{t:?}"))
        };
        let [verifier, draft] = [show(&self.verifier), show(&self.draft)];
        write!(f, "id {} is {verifier} in the verifier and {draft} in the draft", self.id.0)
    }
}

fn listed(first: &[Difference]) -> String {
    first.iter().map(Difference::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::ModelFiles;
    use serde_json::{Map, Value, json};

    /// A tokenizer whose ordinary tokens are `words` and whose added ones follow them.
    fn tokenizer(words: &[&str], added: &[&str]) -> Tokenizer {
        let vocab: Map<String, Value> =
            words.iter().enumerate().map(|(i, w)| ((*w).to_owned(), json!(i))).collect();
        let token = |(i, content): (usize, &&str)| {
            json!({"id": words.len() + i, "content": content, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        };
        let added: Vec<Value> = added.iter().enumerate().map(token).collect();
        let json = json!({"version": "1.0", "added_tokens": added,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": words[0]}});
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        Tokenizer::from_files(&ModelFiles::Folder(dir.path().into())).unwrap()
    }

    /// The map between two vocabularies with as many rows as given.
    fn between(
        (verifier, v): (&Tokenizer, usize),
        (draft, d): (&Tokenizer, usize),
    ) -> Result<VocabMap, VocabMismatch> {
        VocabMap::between(verifier, v, draft, d)
    }

    fn row(map: &VocabMap, logits: &[f32]) -> Vec<f32> {
        let mut out = vec![9.0; 3];
        map.row(logits, &mut out);
        out
    }

    const NONE: f32 = f32::NEG_INFINITY;

    #[test]
    fn equal_vocabularies_are_the_identity() {
        let t = tokenizer(&["?", "a", "b"], &["<s>"]);
        let map = between((&t, 4), (&t, 4)).unwrap();
        assert!(map.is_identity());
        assert_eq!(map, VocabMap::same(4, 4));
        assert_eq!(row(&map, &[1.0, 2.0, 3.0, 4.0]), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(map.to_draft(TokenId(3)), TokenId(3));
    }

    #[test]
    fn paddings_may_differ_both_ways() {
        let t = tokenizer(&["?", "a", "b"], &["<s>"]);
        let wide = between((&t, 6), (&t, 4)).unwrap();
        assert!(!wide.is_identity());
        assert_eq!(row(&wide, &[1.0, 2.0, 3.0, 4.0]), [1.0, 2.0, 3.0, 4.0, NONE, NONE]);
        assert_eq!(wide.to_draft(TokenId(5)), TokenId(0), "the draft has no such row");
        let narrow = between((&t, 4), (&t, 6)).unwrap();
        assert!(!narrow.is_identity());
        assert_eq!(row(&narrow, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), [1.0, 2.0, 3.0, 4.0]);
        assert!(between((&t, 6), (&t, 6)).unwrap().is_identity());
    }

    #[test]
    fn another_order_is_mapped() {
        let verifier = tokenizer(&["?", "a", "b"], &["<s>", "</s>"]);
        let draft = tokenizer(&["b", "?", "a"], &["</s>", "<s>"]);
        let map = between((&verifier, 6), (&draft, 7)).unwrap();
        let to: Vec<u32> = (0..6).map(|id| map.to_draft(TokenId(id)).0).collect();
        assert_eq!(to, [1, 2, 0, 4, 3, 5]);
        let logits = [10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0];
        assert_eq!(row(&map, &logits), [11.0, 12.0, 10.0, 14.0, 13.0, NONE]);
        assert!(!map.is_identity());
    }

    #[test]
    fn one_other_token_is_named() {
        let verifier = tokenizer(&["?", "a", "b"], &["<s>"]);
        let draft = tokenizer(&["?", "x\n", "b"], &["<s>"]);
        let err = between((&verifier, 4), (&draft, 4)).unwrap_err();
        let first = Difference {
            id: TokenId(1),
            verifier: Some("a".to_owned()),
            draft: Some("x\n".to_owned()),
        };
        assert_eq!(
            err,
            VocabMismatch { tokens: [4, 4], missing: 1, unknown: 1, first: vec![first] }
        );
        let text = err.to_string();
        assert!(text.contains(r#"id 1 is "a" in the verifier and "x\n" in the draft"#), "{text}");
    }

    #[test]
    fn equal_sizes_say_nothing() {
        let own: Vec<String> = (0..20).map(|i| format!("v{i}")).collect();
        let others: Vec<String> = (0..20).map(|i| format!("d{i}")).collect();
        let [verifier, draft] = [own, others]
            .map(|w| tokenizer(&w.iter().map(String::as_str).collect::<Vec<_>>(), &[]));
        let err = between((&verifier, 20), (&draft, 20)).unwrap_err();
        assert_eq!((err.missing, err.unknown, err.first.len()), (20, 20, NAMED));
    }

    #[test]
    fn a_part_of_the_ordinary_tokens_is_not_enough() {
        let whole = tokenizer(&["?", "a", "b", "c"], &[]);
        let part = tokenizer(&["?", "a", "b"], &[]);
        let err = between((&whole, 4), (&part, 4)).unwrap_err();
        assert_eq!((err.missing, err.unknown), (1, 0));
        assert_eq!(
            err.first[0].to_string(),
            r#"id 3 is "c" in the verifier and nothing in the draft"#
        );
        let err = between((&part, 4), (&whole, 4)).unwrap_err();
        assert_eq!((err.missing, err.unknown), (0, 1));
        let err = between((&whole, 4), (&whole, 3)).unwrap_err();
        assert_eq!(err.missing, 1, "a model without a row lacks the token");
    }

    #[test]
    fn added_tokens_may_be_missing_or_renamed() {
        let verifier = tokenizer(&["?", "a"], &["<s>", "<|im_end|>", "<tool>"]);
        let fewer = tokenizer(&["?", "a"], &["<s>"]);
        assert!(between((&verifier, 6), (&fewer, 6)).unwrap().is_identity());
        assert!(between((&fewer, 6), (&verifier, 6)).unwrap().is_identity());
        let renamed = tokenizer(&["?", "a"], &["<s>", "<|reserved|>", "<tool>"]);
        let map = between((&verifier, 5), (&renamed, 5)).unwrap();
        assert_eq!(row(&map, &[0.0, 1.0, 2.0, 3.0, 4.0]), [0.0, 1.0, 2.0, NONE, 4.0]);
        assert_eq!(map.to_draft(TokenId(3)), TokenId(3), "fed as what stands at its place");
    }

    #[test]
    fn families_are_told_apart() {
        let open = |name: &str| {
            let files = ModelFiles::Folder(testkit::golden("tokenizers").join(name));
            Tokenizer::from_files(&files).unwrap()
        };
        let names = testkit::golden_cases("tokenizers");
        for a in &names {
            for b in &names {
                let (verifier, draft) = (open(a), open(b));
                let (v, d) = (verifier.vocab_size() + 7, draft.vocab_size() + 3);
                let found = between((&verifier, v), (&draft, d));
                assert_eq!(found.is_ok(), a == b, "{a} {b}");
            }
        }
    }
}
