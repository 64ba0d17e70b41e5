//! Streaming against reference vectors, and against decoding everything at once.

use super::*;
use crate::files::ModelFiles;
use proptest::prelude::*;
use serde_json::Value;
use std::sync::LazyLock;
use testkit::{golden, golden_cases, golden_json};

static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let open = |kind: String| {
        Tokenizer::from_files(&ModelFiles::Folder(golden("tokenizers").join(kind))).unwrap()
    };
    golden_cases("tokenizers").into_iter().map(open).collect()
});

fn ids(value: &Value) -> Vec<TokenId> {
    let number = |id: &Value| TokenId(id.as_u64().unwrap() as u32);
    value.as_array().unwrap().iter().map(number).collect()
}

/// Compares with the reference stream up to its first error, if it has one.
fn check_stream(tokenizer: &Tokenizer, ids: &[TokenId], expected: &Value, skip: bool, what: &str) {
    let mut stream = Detokenizer::new(tokenizer, skip);
    for (&id, piece) in ids.iter().zip(expected.as_array().unwrap()) {
        let text = stream.push(id).unwrap();
        if piece.is_object() {
            return;
        }
        assert_eq!(text, piece.as_str().unwrap_or(""), "{what} {id:?} in {ids:?}");
    }
}

#[test]
fn golden_streams() {
    let mut rows_with_held = 0;
    for (kind, tokenizer) in golden_cases("tokenizers").into_iter().zip(&*TOKENIZERS) {
        let vectors = golden_json(&format!("tokenizers/{kind}/vectors.json"));
        for row in vectors["encode"].as_array().unwrap() {
            check_stream(tokenizer, &ids(&row["ids_plain"]), &row["stream"], true, &kind);
        }
        for row in vectors["decode_only"].as_array().unwrap() {
            check_stream(tokenizer, &ids(&row["ids"]), &row["stream"], true, &kind);
            check_stream(tokenizer, &ids(&row["ids"]), &row["stream_with_special"], false, &kind);
            rows_with_held += usize::from(row["stream"].as_array().unwrap().contains(&Value::Null));
        }
    }
    assert!(rows_with_held > 50, "the vectors hold back half characters");
}

/// All pieces, and the flushed end.
fn run(tokenizer: &Tokenizer, ids: &[TokenId], stop: &[&str]) -> (Vec<Piece>, String) {
    let stop = stop.iter().map(|s| (*s).to_owned()).collect();
    let mut stream = TextStream::new(tokenizer, stop);
    let pieces = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    (pieces, stream.finish().unwrap())
}

fn joined(pieces: &[Piece], end: &str) -> String {
    pieces.iter().map(|p| p.text.as_str()).chain([end]).collect()
}

/// Whether a byte run decodes differently once it goes on, the documented exception: decoding
/// some beginning gives text that decoding everything takes back.
fn takes_text_back(tokenizer: &Tokenizer, ids: &[TokenId]) -> bool {
    let all = tokenizer.decode(ids, true).unwrap();
    (0..ids.len()).any(|n| {
        let part = tokenizer.decode(&ids[..n], true).unwrap();
        !all.starts_with(part.trim_end_matches(char::REPLACEMENT_CHARACTER))
    })
}

fn token_ids(max: usize) -> impl Strategy<Value = (usize, Vec<TokenId>)> {
    // Ids up to 1000: all tokens of every golden vocabulary, and some that do not exist.
    (0..TOKENIZERS.len(), prop::collection::vec((0u32..1000).prop_map(TokenId), 0..max))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn pieces_join_to_the_decoded_text((which, ids) in token_ids(60)) {
        let tokenizer = &TOKENIZERS[which];
        let (pieces, end) = run(tokenizer, &ids, &[]);
        let byte_tokens = tokenizer.token_id("<0x00>").is_some();
        if !(byte_tokens && takes_text_back(tokenizer, &ids)) {
            prop_assert_eq!(joined(&pieces, &end), tokenizer.decode(&ids, true).unwrap());
        }
    }

    #[test]
    fn no_piece_ends_in_half_a_character((which, ids) in token_ids(60)) {
        let (pieces, _) = run(&TOKENIZERS[which], &ids, &[]);
        // Holding has a limit, which random ids do not reach.
        prop_assert!(pieces.iter().all(|p| !p.text.ends_with(char::REPLACEMENT_CHARACTER)));
    }

    #[test]
    fn stop_strings_cut_where_a_search_of_the_whole_text_does(
        (which, ids) in token_ids(40),
        spans in prop::collection::vec((0usize..60, 1usize..8), 1..4),
    ) {
        let tokenizer = &TOKENIZERS[which];
        let (whole, end) = run(tokenizer, &ids, &[]);
        let text = joined(&whole, &end);
        let spans = spans.iter().map(|(at, len)| text.chars().skip(*at).take(*len).collect());
        let stop: Vec<String> = spans.filter(|s: &String| !s.is_empty()).collect();
        let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
        let (pieces, end) = run(tokenizer, &ids, &stop);
        let first = stop.iter().filter_map(|s| text.find(s).map(|at| (at + s.len(), at))).min();
        let cut = first.map_or(text.as_str(), |(_, at)| &text[..at]);
        prop_assert_eq!(joined(&pieces, &end), cut, "stop {:?}", stop);
    }

    #[test]
    fn stop_strings_do_not_depend_on_how_the_text_is_split(
        text in "[ab]{0,30}",
        stop in prop::collection::vec("[ab]{1,6}", 1..4),
        cuts in prop::collection::vec(0usize..5, 1..20),
    ) {
        let mut strings = StopStrings::new(stop.clone());
        let (mut out, mut rest) = (String::new(), text.as_str());
        for cut in cuts.into_iter().cycle().take(200) {
            if strings.found || rest.is_empty() {
                break;
            }
            let (head, tail) = rest.split_at(cut.min(rest.len()));
            out += &strings.push(head);
            rest = tail;
        }
        if !strings.found && rest.is_empty() {
            out += &strings.finish();
            let first = stop.iter().filter_map(|s| text.find(s)).min();
            prop_assert_eq!((first, &out), (None, &text));
        } else if strings.found {
            let first = stop.iter().filter_map(|s| text.find(s).map(|at| (at + s.len(), at))).min();
            prop_assert_eq!(Some(out.len()), first.map(|(_, at)| at));
            prop_assert!(text.starts_with(&out));
        }
    }
}

fn tokenizer(kind: &str) -> &'static Tokenizer {
    let at = golden_cases("tokenizers").iter().position(|k| k == kind).unwrap();
    &TOKENIZERS[at]
}

#[test]
fn a_stop_string_over_several_tokens_is_held_back_then_cut() {
    let tokenizer = tokenizer("gpt2");
    let ids = tokenizer.encode("one two, three", false).unwrap();
    let (pieces, end) = run(tokenizer, &ids, &["two, th"]);
    assert_eq!(joined(&pieces, &end), "one ");
    assert!(pieces.last().is_some_and(|p| p.stopped));
    let (pieces, end) = run(tokenizer, &ids, &["two; th"]);
    assert_eq!(joined(&pieces, &end), "one two, three");
    assert!(pieces.iter().all(|p| !p.stopped));
}

#[test]
fn text_that_may_begin_a_stop_string_is_given_out_at_the_end() {
    let mut stop = StopStrings::new(vec!["abc".into(), String::new()]);
    assert_eq!(stop.push("xab"), "x");
    assert_eq!(stop.finish(), "ab");
}

#[test]
fn an_unfinished_character_is_flushed_as_the_decoder_prints_it() {
    let tokenizer = tokenizer("qwen2");
    let mut ids = tokenizer.encode("a\u{1f600}", false).unwrap();
    ids.pop();
    let (pieces, end) = run(tokenizer, &ids, &[]);
    assert_eq!(joined(&pieces, ""), "a");
    assert_eq!(joined(&pieces, &end), tokenizer.decode(&ids, true).unwrap());
}

#[test]
fn long_runs_of_broken_bytes_are_bounded_and_exact() {
    let tokenizer = tokenizer("gpt2");
    // All bytes that are no character of their own, in an order with many half characters.
    let mut rng = testkit::Rng::new(7);
    let high: Vec<TokenId> = (0..tokenizer.vocab_size() as u32)
        .map(TokenId)
        .filter(|id| tokenizer.decode(&[*id], true).unwrap() == "\u{fffd}")
        .collect();
    let ids: Vec<TokenId> = (0..5000).map(|_| high[rng.below(high.len())]).collect();
    let mut stream = Detokenizer::new(tokenizer, true);
    let mut text = String::new();
    for &id in &ids {
        text += &stream.push(id).unwrap();
        assert!(stream.window.len() <= 2 * (HELD_MAX + PARTS_MAX) + 1, "{}", stream.window.len());
    }
    text += &stream.finish().unwrap();
    assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
}

#[test]
fn endless_tokens_that_print_nothing_are_not_kept() {
    let tokenizer = tokenizer("llama2");
    let mut stream = Detokenizer::new(tokenizer, true);
    let start = tokenizer.token_id("<s>").unwrap();
    for id in [start, TokenId(100_000)] {
        for _ in 0..100 {
            assert_eq!(stream.push(id).unwrap(), "");
        }
    }
    assert!(stream.window.is_empty());
}

#[test]
fn bytes_given_out_stay_when_the_run_turns_invalid() {
    let tokenizer = tokenizer("llama2");
    let byte = |hex: &str| tokenizer.token_id(&format!("<0x{hex}>")).unwrap();
    let x = tokenizer.encode("x", false).unwrap();
    let ids = [&[byte("0A"), byte("C3")][..], &x[x.len() - 1..]].concat();
    let (pieces, end) = run(tokenizer, &ids, &[]);
    assert_eq!(pieces[0].text, "\n");
    let text = joined(&pieces, &end);
    assert!(text.starts_with("\n\u{fffd}") && text.ends_with('x'), "{text:?}");
}

/// Text of `ids[at..]` streamed as the continuation of `ids[..at]`.
fn continued(tokenizer: &Tokenizer, ids: &[TokenId], at: usize) -> String {
    let mut stream = TextStream::new(tokenizer, vec![]).after(&ids[..at]).unwrap();
    let pieces: Vec<Piece> = ids[at..].iter().map(|&id| stream.push(id).unwrap()).collect();
    joined(&pieces, &stream.finish().unwrap())
}

#[test]
fn a_continuation_keeps_the_space_before_its_first_word() {
    for kind in ["llama2", "mistral", "llama3", "qwen2", "gpt2", "gemma"] {
        let tokenizer = tokenizer(kind);
        let ids =
            tokenizer.encode("The quick fox, and the dog it met: größer 😀 end", true).unwrap();
        let all = tokenizer.decode(&ids, true).unwrap();
        for at in 1..ids.len() {
            let prompt = tokenizer.decode(&ids[..at], true).unwrap();
            if !prompt.ends_with(char::REPLACEMENT_CHARACTER) {
                assert_eq!(prompt + &continued(tokenizer, &ids, at), all, "{kind} at {at}");
            }
        }
    }
}

#[test]
fn a_shown_special_token_is_written_where_it_stands() {
    let tokenizer = tokenizer("llama3");
    let text = "a<|eot_id|>b<|end_of_text|>";
    let ids = tokenizer.encode(text, false).unwrap();
    let [eot, plain] = ["<|eot_id|>", "a"].map(|t| tokenizer.token_id(t).unwrap());
    // What prints anyway is not written twice.
    let mut stream = TextStream::new(tokenizer, vec!["b".into()]).showing(vec![eot, plain]);
    let pieces: String = ids.iter().map(|&id| stream.push(id).unwrap().text).collect();
    assert_eq!(pieces, "a<|eot_id|>");
}
