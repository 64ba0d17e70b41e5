//! SentencePiece models written field by field, and broken ones.

use super::*;
use crate::files::ModelFiles;
use crate::tokenizer::Tokenizer as Ours;
use kernels::program::TokenId;
use proptest::prelude::*;
use testkit::{golden, golden_json, read_json, shared_models};

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn number(field: u64, value: i64) -> Vec<u8> {
    [varint(field << 3), varint(value as u64)].concat()
}

fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(content.len() as u64), content.to_vec()].concat()
}

fn piece(text: &str, score: f32, kind: Kind) -> Vec<u8> {
    let score = [varint(2 << 3 | 5), score.to_le_bytes().to_vec()].concat();
    bytes(1, &[bytes(1, text.as_bytes()), score, number(3, kind as i64)].concat())
}

/// A BPE model with byte tokens, ids 3 to 258, then `words` with falling scores.
fn bpe(words: &[&str]) -> Vec<u8> {
    let mut out = [
        piece("<unk>", 0.0, Kind::Unknown),
        piece("<s>", 0.0, Kind::Control),
        piece("</s>", 0.0, Kind::Control),
    ]
    .concat();
    out.extend((0..256).flat_map(|b| piece(&format!("<0x{b:02X}>"), 0.0, Kind::Byte)));
    let words = words.iter().zip(0..);
    out.extend(words.flat_map(|(w, rank)| piece(w, -(rank as f32), Kind::Normal)));
    out.extend(bytes(2, &[number(3, 2), number(35, 1)].concat()));
    out.extend(bytes(3, &bytes(1, b"identity")));
    out
}

fn open(model: &[u8], config: &str) -> Result<Ours, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), model).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    Ours::from_files(&ModelFiles::Folder(dir.path().into())).map_err(|e| e.to_string())
}

fn ids(list: &[u32]) -> Vec<TokenId> {
    list.iter().map(|id| TokenId(*id)).collect()
}

#[test]
fn bpe_with_byte_fallback() {
    let tokenizer = open(&bpe(&["ab", "▁ab", "▁", "a", "b"]), "{}").unwrap();
    assert_eq!(tokenizer.encode("ab ab", true).unwrap(), ids(&[1, 260, 260]));
    // The bytes of é, each a token of its own after the space in front.
    assert_eq!(tokenizer.encode("é", false).unwrap(), ids(&[261, 3 + 0xc3, 3 + 0xa9]));
    assert_eq!(tokenizer.decode(&ids(&[1, 260, 260, 198, 172, 2]), true).unwrap(), "ab abé");
    assert_eq!(tokenizer.encode("a</s>", false).unwrap(), ids(&[261, 262, 2]));
    assert_eq!(tokenizer.vocab_size(), 264);
}

#[test]
fn the_configuration_says_which_ends_to_add() {
    let model = bpe(&["▁", "a"]);
    let encode = |config| open(&model, config).unwrap().encode("a", true).unwrap();
    assert_eq!(encode("{}"), ids(&[1, 259, 260]));
    assert_eq!(encode(r#"{"add_bos_token": false, "add_eos_token": true}"#), ids(&[259, 260, 2]));
    let model = [model, bytes(2, &number(41, -1))].concat();
    assert_eq!(open(&model, "{}").unwrap().encode("a", true).unwrap(), ids(&[259, 260]));
}

#[test]
fn merges_come_by_score_then_by_longer_left_half() {
    let model = Model::parse(&bpe(&["abc", "bc", "ab", "a", "b", "c"])).unwrap();
    let vocab: HashMap<&str, u32> =
        model.pieces.iter().zip(0..).map(|(p, id)| (p.text.as_str(), id)).collect();
    let merges = model.merges(&vocab);
    let merges: Vec<(&str, &str)> = merges.iter().map(|(l, r)| (l.as_str(), r.as_str())).collect();
    assert_eq!(merges, [("ab", "c"), ("a", "bc"), ("b", "c"), ("a", "b")]);
}

#[test]
fn a_space_in_front_only_where_the_model_says() {
    let model = [bpe(&["▁", "a"]), bytes(3, &number(3, 0))].concat();
    let tokenizer = open(&model, "{}").unwrap();
    assert_eq!(tokenizer.encode("a a", false).unwrap(), ids(&[260, 259, 260]));
    assert_eq!(tokenizer.decode(&ids(&[259, 260]), true).unwrap(), " a");
}

#[test]
fn a_unigram_model_tokenizes_as_its_tokenizer_json() {
    let json = read_json(&golden("tokenizers/t5/tokenizer.json"));
    let added = json["added_tokens"].as_array().unwrap();
    let kind = |text: &str| match text {
        "<unk>" => Kind::Unknown,
        _ if added.iter().any(|t| t["content"] == text) => Kind::Control,
        _ => Kind::Normal,
    };
    let mut model = Vec::new();
    for entry in json["model"]["vocab"].as_array().unwrap() {
        let text = entry[0].as_str().unwrap();
        model.extend(piece(text, entry[1].as_f64().unwrap() as f32, kind(text)));
    }
    model.extend(bytes(2, &[number(41, -1), number(42, 1)].concat()));
    model.extend(bytes(3, &number(4, 0)));
    let tokenizer = open(&model, r#"{"add_eos_token": true}"#).unwrap();
    let mut compared = 0;
    for row in golden_json("tokenizers/t5/vectors.json")["encode"].as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        // That file puts no space before one that is there, nor before no text at all.
        if text.is_empty() || text.contains('<') || text.starts_with([' ', '▁']) {
            continue;
        }
        let found: Vec<u32> = tokenizer.encode(text, true).unwrap().iter().map(|t| t.0).collect();
        assert_eq!(serde_json::json!(found), row["ids"], "{text:?}");
        compared += 1;
    }
    assert!(compared > 40, "{compared} texts");
}

#[test]
fn unigram_models_may_collapse_spaces() {
    let words = [("▁", -2.0), ("a", -2.0), ("▁a", -1.0)];
    let words = words.iter().flat_map(|(w, s)| piece(w, *s, Kind::Normal));
    let mut model: Vec<u8> = piece("<unk>", 0.0, Kind::Unknown).into_iter().chain(words).collect();
    model.extend(bytes(2, &[number(41, -1), number(42, -1)].concat()));
    let encode = |normalizer: Vec<u8>| {
        let tokenizer = open(&[model.clone(), bytes(3, &normalizer)].concat(), "{}").unwrap();
        tokenizer.encode(" a  a ", true).unwrap()
    };
    assert_eq!(encode(number(4, 1)), ids(&[3, 3]));
    assert_eq!(encode(number(4, 0)), ids(&[1, 3, 1, 3, 1]));
}

#[test]
fn unsupported_models_are_refused_with_the_remedy() {
    let good = bpe(&["▁", "a"]);
    for (extra, reason) in [
        (bytes(2, &number(3, 4)), "model type 4 is not supported, expected 1 (unigram) or 2 (BPE)"),
        (bytes(3, &bytes(2, b"map")), "precompiled_charsmap): convert it"),
        (bytes(5, &bytes(2, b"map")), "rewrites decoded characters, not supported: convert it"),
        (bytes(3, &number(5, 0)), "escape_whitespaces is false: convert it"),
        (bytes(2, &number(24, 1)), "treat_whitespace_as_suffix is true: convert it"),
        (bytes(2, &number(41, 261)), "bos_id is 261 of 261 pieces"),
        (bytes(2, &number(42, 260)), "eos_id is 260, a piece of type Normal"),
        (piece("a", 0.0, Kind::Normal), "pieces 260 and 261 are both \"a\""),
        (piece("u", 0.0, Kind::Unknown), "2 pieces of type unknown, expected one"),
        (piece("", 0.0, Kind::Normal), "a piece has no text"),
        (piece("x", f32::NAN, Kind::Normal), "the score of piece \"x\" is NaN"),
        (piece(&"x".repeat(2000), 0.0, Kind::Normal), "a piece has 2000 bytes, limit 1024"),
        (bytes(1, &[bytes(1, b"x"), number(3, 7)].concat()), "type 7, expected 1 to 6"),
        (bytes(1, &bytes(1, b"\xff")), "is not UTF-8"),
        (bytes(2, &bytes(3, b"")), "field 3 has the wrong type"),
        (number(1, 1), "expected a message"),
        (vec![0x0b], "not a SentencePiece model: field 1 has wire type 3"),
    ] {
        let error = open(&[good.clone(), extra].concat(), "{}").map(|_| ()).unwrap_err();
        assert!(error.contains(reason), "{reason}: {error}");
    }
    assert!(open(b"", "{}").unwrap_err().contains("it has no trainer_spec"));
    assert!(open(b"IQ== 0\nIg== 1\n", "{}").unwrap_err().contains("SentencePiece model"));
}

/// Opens `model` with `changes` made to it; whatever it is, it must not panic, and if it opens, it
/// must encode.
fn survives(mut model: Vec<u8>, changes: &[(usize, u8)]) {
    for (at, byte) in changes {
        let at = at % model.len();
        model[at] = *byte;
    }
    if let Ok(model) = Model::parse(&model) {
        let built = model.build();
        if let Ok(tokenizer) = built {
            drop(tokenizer.encode_fast("Once upon a time, é", true));
        }
    }
}

proptest! {
    #[test]
    fn damaged_models_do_not_panic(
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..8),
    ) {
        survives(bpe(&["he", "▁a", "▁", "a", "h", "e"]), &changes);
    }

    #[test]
    fn cut_models_are_refused(len in 0usize..100) {
        let model = bpe(&["▁", "a"]);
        prop_assert!(Model::parse(&model[..model.len() - 1 - len]).is_err());
    }
}

#[test]
fn damaged_real_models_do_not_panic() {
    let Some(models) = shared_models() else { return };
    let model = std::fs::read(models.join("stories260k-hf/tokenizer.model")).unwrap();
    let mut rng = testkit::Rng::new(1);
    for _ in 0..300 {
        let changes: Vec<_> = (0..3).map(|_| (rng.bits() as usize, rng.bits() as u8)).collect();
        survives(model.clone(), &changes);
    }
}
