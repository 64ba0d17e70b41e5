//! Guides over a vocabulary of single bytes and a few longer tokens.

use super::*;

/// Every byte, then some longer tokens, a special one and an end token.
fn grammars() -> Grammars {
    let bytes = (0..=255u8).map(|byte| vec![byte]);
    let longer = ["{\"", "\":", "true", " \""].map(|text| text.as_bytes().to_vec());
    let special = [b"\xff<call>".to_vec(), b"\xff</s>".to_vec()];
    let words: Vec<Vec<u8>> = bytes.chain(longer).chain(special).collect();
    Grammars::from_words(&words, &[END]).unwrap()
}

const END: TokenId = TokenId(261);
const VOCAB: usize = 262;

fn tokens(text: &str) -> Vec<TokenId> {
    text.bytes().map(|byte| TokenId(u32::from(byte))).collect()
}

/// Ids that may come next.
fn next(guide: &mut Guide) -> Vec<u32> {
    let mut row_v = vec![0.0; VOCAB];
    guide.mask(&mut row_v).unwrap();
    (0..).zip(row_v).filter(|(_, logit)| *logit == 0.0).map(|(id, _)| id).collect()
}

/// Whether the whole of `text` is of the grammar.
fn matches(source: &GrammarSource, text: &str) -> bool {
    let mut guide = grammars().guide(source).unwrap();
    let tokens = tokens(text);
    if guide.accepts(&tokens) < tokens.len() {
        return false;
    }
    tokens.iter().for_each(|&token| guide.push(token));
    guide.is_over() || next(&mut guide).contains(&END.0)
}

#[test]
fn each_kind_of_grammar_tells_its_texts_from_others() {
    let schema = json!({
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
        "additionalProperties": false,
    });
    let choice = GrammarSource::Choice(vec!["yes".into(), "say \"no\"\n".into(), "(.*)".into()]);
    let cases = [
        (GrammarSource::JsonObject, "{\"b\": [1, null]}", "[1]"),
        (GrammarSource::JsonSchema(schema), "{\n  \"a\": -3}", "{\"a\": 1.5}"),
        (GrammarSource::JsonSchema(json!(true)), "[{}]", "[{]"),
        (GrammarSource::Regex(r"[a-f]{2}/\d+".into()), "be/12", "bx/12"),
        (GrammarSource::Regex(r"^a\$|b$".into()), "a$", "a"),
        (GrammarSource::Regex(r"a\$".into()), "a$", "a"),
        (choice.clone(), "say \"no\"\n", "no"),
        (choice, "(.*)", "anything"),
        (GrammarSource::Lark("start: \"a\" start \"b\" | \"c\"".into()), "aacbb", "aacb"),
    ];
    for (source, right, wrong) in &cases {
        assert!(matches(source, right), "{source:?} refuses {right:?}");
        assert!(!matches(source, wrong), "{source:?} takes {wrong:?}");
    }
}

#[test]
fn masks_name_the_tokens_that_may_follow_and_no_special_ones() {
    let mut guide = grammars().guide(&GrammarSource::Regex("a|bc?".into())).unwrap();
    assert_eq!(next(&mut guide), [u32::from(b'a'), u32::from(b'b')]);
    guide.push(TokenId(u32::from(b'b')));
    assert_eq!(next(&mut guide), [u32::from(b'c'), END.0], "it may end here, or go on");
    assert!(!guide.is_over());
    guide.push(TokenId(u32::from(b'c')));
    assert!(guide.is_over(), "nothing can follow");
}

#[test]
fn an_end_token_ends_the_text_and_can_be_taken_back() {
    let mut guide = grammars().guide(&GrammarSource::Regex("a*".into())).unwrap();
    guide.push(TokenId(u32::from(b'a')));
    guide.push(END);
    assert!(guide.is_over());
    guide.pop(1);
    assert!(!guide.is_over());
    assert_eq!(next(&mut guide), [u32::from(b'a'), END.0]);
}

#[test]
fn what_is_taken_back_leaves_no_trace() {
    let grammars = grammars();
    let schema = json!({"type": "object", "properties": {"a": {"enum": ["x", "yz", 12]}}});
    let mut guide = grammars.guide(&GrammarSource::JsonSchema(schema)).unwrap();
    let text = tokens("{\"a\": \"yz\" }");
    let masks: Vec<_> = (text.iter())
        .map(|&token| {
            let mask = next(&mut guide);
            guide.push(token);
            mask
        })
        .collect();
    for kept in 0..text.len() {
        guide.pop(text.len() - kept);
        assert_eq!(next(&mut guide), masks[kept], "after {kept} tokens");
        text[kept..].iter().for_each(|&token| guide.push(token));
    }
    // Also what was wrong: a copy of the guide stays as it was.
    let mut copy = guide.clone();
    copy.pop(3);
    copy.push(TokenId(u32::from(b'!')));
    assert!(!copy.is_over() && copy.mask(&mut [0.0; VOCAB]).is_err());
    copy.pop(1);
    assert_eq!(next(&mut copy), masks[text.len() - 3]);
    assert!(guide.is_over());
}

#[test]
fn proposed_tokens_are_taken_as_far_as_they_fit() {
    let mut guide = grammars().guide(&GrammarSource::Regex("abc".into())).unwrap();
    assert_eq!(guide.accepts(&tokens("abx")), 2);
    assert_eq!(guide.accepts(&tokens("xbc")), 0);
    assert_eq!(guide.accepts(&[TokenId(u32::MAX)]), 0);
    assert_eq!(next(&mut guide), [u32::from(b'a')], "asking changes nothing");
}

#[test]
fn what_cannot_be_followed_is_refused_with_a_reason() {
    let grammars = grammars();
    let refused = |source| grammars.guide(&source).unwrap_err().to_string();
    let cases = [
        (GrammarSource::JsonSchema(json!(3)), "no object"),
        (GrammarSource::JsonSchema(json!({"type": "text"})), "text"),
        (GrammarSource::JsonSchema(json!({"not": {"type": "string"}})), "not"),
        (GrammarSource::JsonSchema(json!({"$ref": "http://example.com/x"})), "example.com"),
        (GrammarSource::Choice(vec![]), "nothing to choose"),
        (GrammarSource::Regex("(a".into()), "regex"),
        (GrammarSource::Lark("begin: \"a\"".into()), "start"),
        (GrammarSource::Lark("start: missing".into()), "missing"),
    ];
    for (source, expected) in cases {
        let reason = refused(source.clone());
        assert!(reason.contains(expected), "{source:?}: {reason:?} has no {expected:?}");
        assert!(!reason.contains('\n') && reason.len() < 300, "{reason:?}");
    }
}

#[test]
fn grammars_without_an_end_token_still_end() {
    let words: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    let grammars = Grammars::from_words(&words, &[]).unwrap();
    let mut guide = grammars.guide(&GrammarSource::Choice(vec!["ab".into()])).unwrap();
    tokens("ab").iter().for_each(|&token| guide.push(token));
    assert!(guide.is_over());
}
