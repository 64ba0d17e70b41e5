//! The index against a search of the whole text, and its time and memory on the worst texts.

use super::*;
use proptest::prelude::*;
use std::time::{Duration, Instant};
use testkit::Rng;

fn ids(text: &[u32]) -> Vec<TokenId> {
    text.iter().map(|&t| TokenId(t)).collect()
}

fn letters(text: &str) -> Vec<TokenId> {
    text.bytes().map(|b| TokenId(u32::from(b))).collect()
}

fn index(text: &[TokenId]) -> Lookup {
    let mut lookup = Lookup::default();
    lookup.extend(text);
    lookup
}

fn proposal(lookup: &Lookup, most: usize, least_match: usize) -> Vec<TokenId> {
    let mut out = vec![];
    lookup.propose(most, least_match, &mut out);
    out
}

fn guess(text: &str, most: usize) -> String {
    let tokens = proposal(&index(&letters(text)), most, 1);
    tokens.iter().map(|t| char::from(t.0 as u8)).collect()
}

/// Length of the longest suffix that ends earlier, and all its earlier ends, latest first.
fn searched(text: &[TokenId]) -> (usize, Vec<usize>) {
    for len in (1..text.len()).rev() {
        let suffix = &text[text.len() - len..];
        let ends = (len..text.len()).rev().filter(|&end| &text[end - len..end] == suffix);
        let ends: Vec<usize> = ends.collect();
        if !ends.is_empty() {
            return (len, ends);
        }
    }
    (0, vec![])
}

/// What followed `end`, one token after the other, each from the text and the proposal so far.
fn continued(text: &[TokenId], end: usize, most: usize) -> Vec<TokenId> {
    let mut text_v = text.to_vec();
    (0..most).for_each(|i| text_v.push(text_v[end + i]));
    text_v.split_off(text.len())
}

/// Whether the last token could renew the ends of all suffixes.
fn all_renewed(lookup: &Lookup) -> bool {
    let mut at = lookup.state(lookup.last).link;
    let mut links = 0;
    while at != ROOT {
        (at, links) = (lookup.state(at).link, links + 1);
    }
    links <= MOST_RENEWED
}

/// Texts over few tokens, of pieces that are repeated, so that there are long matches.
fn texts() -> impl Strategy<Value = Vec<TokenId>> {
    let piece = (prop::collection::vec(0u32..3, 1..8), 1usize..6);
    prop::collection::vec(piece, 0..10).prop_map(|pieces| {
        ids(&pieces.iter().flat_map(|(p, times)| p.repeat(*times)).collect::<Vec<_>>())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// After every token: the matched length is the searched one, and the proposal continues some
    /// earlier end, the latest while all ends could be renewed.
    #[test]
    fn finds_what_a_search_finds(text in texts(), most in 0usize..12) {
        let (mut lookup, mut renewed) = (Lookup::default(), true);
        for end in 0..=text.len() {
            let text = &text[..end];
            lookup.extend(&text[lookup.len()..]);
            let (matched, ends) = searched(text);
            prop_assert_eq!(lookup.matched(), matched, "{:?}", text);
            let got = proposal(&lookup, most, 0);
            if renewed {
                let want = ends.first().map_or(vec![], |&end| continued(text, end, most));
                prop_assert_eq!(got, want, "{:?}", text);
            } else {
                let none = ends.is_empty() && got.is_empty();
                let any = none || ends.iter().any(|&end| continued(text, end, most) == got);
                prop_assert!(any, "{:?} proposes {:?}", text, got);
            }
            renewed &= all_renewed(&lookup);
        }
    }

    /// Chunks of any size give the index of the whole.
    #[test]
    fn chunks_make_no_difference(text in texts(), sizes in prop::collection::vec(0usize..20, 0..20)) {
        let mut lookup = Lookup::default();
        for size in sizes {
            let start = lookup.len();
            lookup.extend(&text[start..text.len().min(start + size)]);
        }
        lookup.extend(&text[lookup.len()..]);
        let whole = index(&text);
        prop_assert_eq!(lookup.len(), text.len());
        prop_assert_eq!(lookup.matched(), whole.matched());
        prop_assert_eq!(proposal(&lookup, 20, 0), proposal(&whole, 20, 0));
    }

    /// States and edges stay within the automaton's bounds, and every edge is in its state's list.
    #[test]
    fn stays_within_its_bounds(text in texts()) {
        let lookup = index(&text);
        let n = text.len().max(2);
        prop_assert!(lookup.states.len() < 2 * n, "{} states", lookup.states.len());
        let firsts = lookup.states.iter().filter(|s| s.target != ROOT).count();
        prop_assert!(firsts + lookup.more.len() < 3 * n, "{} edges", firsts + lookup.more.len());
        let mut listed = 0;
        for (id, state) in (0u32..).zip(&lookup.states) {
            let mut token = state.newest;
            while token != state.token {
                (token, listed) = (lookup.more[&(id, token)].before, listed + 1);
            }
        }
        prop_assert_eq!(listed, lookup.more.len());
    }
}

#[test]
fn a_text_without_repetition_proposes_nothing() {
    for text in ["", "a", "ab", "abcdef"] {
        assert_eq!(index(&letters(text)).matched(), 0, "{text}");
        assert_eq!(guess(text, 5), "", "{text}");
    }
    assert!(Lookup::default().is_empty());
    assert_eq!(Lookup::default().len(), 0);
}

#[test]
fn what_followed_comes_next() {
    assert_eq!(guess("the cat sat; the c", 6), "at sat");
    assert_eq!(guess("the cat sat; the c", 0), "");
}

#[test]
fn the_latest_of_several_ends_is_taken() {
    assert_eq!(guess("(x1)(x2)(x3)(x", 2), "3)");
}

#[test]
fn a_period_continues() {
    assert_eq!(guess("abcab", 9), "cabcabcab");
    assert_eq!(guess("abcabcab", 7), "cabcabc");
    assert_eq!(guess("aa", 4), "aaaa");
}

#[test]
fn a_shorter_match_than_asked_for_proposes_nothing() {
    let lookup = index(&letters("abcd abc"));
    assert_eq!(lookup.matched(), 3);
    assert_eq!(proposal(&lookup, 2, 3), letters("d "));
    assert_eq!(proposal(&lookup, 2, 4), []);
}

#[test]
fn proposals_are_appended() {
    let mut out = letters("x");
    index(&letters("abab")).propose(2, 1, &mut out);
    assert_eq!(out, letters("xab"));
}

/// A sequence in which every string of `bits` zeros and ones occurs once, by "prefer one"
/// (Martin 1934).
fn de_bruijn(bits: usize) -> Vec<u32> {
    let mask = (1usize << bits) - 1;
    let mut seen = vec![false; 1 << bits];
    let (mut window, mut text_v) = (0, vec![]);
    loop {
        let next = [1, 0].map(|bit| (window << 1 | bit) & mask).into_iter().find(|&w| !seen[w]);
        let Some(next) = next else { return text_v };
        seen[next] = true;
        text_v.push((next & 1) as u32);
        window = next;
    }
}

fn fibonacci(n: usize) -> Vec<u32> {
    let (mut text_v, mut before) = (vec![0, 1], vec![0]);
    while text_v.len() < n {
        let longer = [&text_v[..], &before].concat();
        before = std::mem::replace(&mut text_v, longer);
    }
    text_v
}

#[test]
fn the_worst_texts_are_linear() {
    const N: usize = 200_000;
    let mut rng = Rng::new(7);
    let mut random =
        |below: usize| -> Vec<u32> { (0..N).map(|_| rng.below(below) as u32).collect() };
    let texts = [
        ("constant", vec![1; N]),
        ("period 2", (0..N as u32).map(|i| i % 2).collect()),
        ("period 1000", (0..N as u32).map(|i| i % 1000).collect()),
        ("random of 2", random(2)),
        ("random of 152000", random(152_000)),
        ("all different", (0..N as u32).collect()),
        ("de Bruijn", de_bruijn(18)),
        ("Fibonacci", fibonacci(N)),
        ("most states: abb...b", [vec![0], vec![1; N - 1]].concat()),
        ("most edges: abb...bc", [vec![0], vec![1; N - 2], vec![2]].concat()),
        ("aa...abb...b, twice", [vec![0; N / 4], vec![1; N / 4]].concat().repeat(2)),
    ];
    for (name, text) in texts {
        let text = ids(&text[..N]);
        let start = Instant::now();
        let mut lookup = Lookup::default();
        let mut out = vec![];
        for token in &text {
            lookup.extend(&[*token]);
            out.clear();
            lookup.propose(8, 1, &mut out);
        }
        let (spent, bytes) = (start.elapsed(), lookup.bytes() / N);
        let (states, edges) =
            (lookup.states.len() as f64 / N as f64, lookup.more.len() as f64 / N as f64);
        println!(
            "{name}: {spent:.0?}, {bytes} bytes, {states:.2} states, {edges:.2} more edges a token"
        );
        // Linear takes a tenth of it; quadratic, of 2e10 links, more than it on any machine.
        assert!(spent < Duration::from_secs(5), "{name}: {spent:?}");
        // Each with up to twice its room: a token of 4 bytes, 2 states of 24, 8/7 entries of 17.
        assert!(bytes < 144, "{name}: {bytes} bytes a token");
    }
}
