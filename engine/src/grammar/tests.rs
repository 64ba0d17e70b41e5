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

#[test]
fn schemas_are_held_to_the_letter() {
    // Pairs of a text that is valid and one that is not and that the parser alone would take.
    let cases = [
        // Another spelling of a key is the same key.
        (json!({"properties": {"a": {"type": "integer"}}}), "{\"a\": 1}", "{\"\\u0061\": \"x\"}"),
        (json!({"format": "date"}), "\"2024-02-28\"", "\"2023-02-29\""),
        (json!({"format": "time"}), "\"23:59:59Z\"", "\"22:59:60Z\""),
        (json!({"format": "date-time"}), "\"2024-02-28t00:00:00Z\"", "\"2023-02-29t00:00:00Z\""),
        (json!({"format": "hostname", "pattern": "o"}), "\"a-o.de\"", "\"xn--o.de\""),
        (json!({"format": "email"}), "\"a.b@c.de\"", "\"a@xn--X\""),
        (json!({"type": "string", "pattern": "^\\S.$"}), "\"ab\"", "\"\u{feff}b\""),
        (json!({"type": "string", "pattern": "^.$"}), "\"a\"", "\"\u{2028}\""),
        (json!({"type": "string", "pattern": "^[\\s-]$"}), "\"-\"", "\"\u{85}\""),
        (json!({"type": "string", "pattern": "^[[a]]$"}), "\"[]\"", "\"a\""),
        (json!({"patternProperties": {"^\\s": false}}), "{\"a\": 1}", "{\"\u{feff}\": 1}"),
        (json!({"uniqueItems": false, "maxItems": 1}), "[1]", "[1, 1]"),
        (
            json!({"$ref": "#/$defs/d", "$defs": {"d": {"items": {"format": "date"}}}}),
            "[\"2024-02-28\"]",
            "[\"2023-02-29\"]",
        ),
        // Alternatives behind references are seen not to overlap.
        (
            json!({"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {
                "a": {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
                "b": {"type": "object", "required": ["k"], "properties": {
                    "k": {"const": "b"}, "next": {"oneOf": [{"$ref": "#/$defs/b"}]}}},
            }}),
            "{\"k\": \"b\", \"next\": {\"k\": \"b\"}}",
            "{\"k\": \"c\"}",
        ),
        // A client's word for the parser is not heard.
        (json!({"type": "array", "x-guidance": {"item_separator": ";"}}), "[1, 2]", "[1; 2]"),
    ];
    for (schema, right, wrong) in cases {
        let source = GrammarSource::JsonSchema(schema.clone());
        assert!(matches(&source, right), "{schema} refuses {right}");
        assert!(!matches(&source, wrong), "{schema} takes {wrong}");
    }
}

#[test]
fn schemas_that_would_be_misread_are_refused_by_their_keyword() {
    let grammars = grammars();
    let inner = |schema: Value| json!({"properties": {"a": {"anyOf": [schema]}}});
    let cases = [
        (json!({"minProperties": 2}), "minProperties"),
        (json!({"const": 9_007_199_254_740_993_u64}), "const"),
        (json!({"enum": [[{"a": -9_007_199_254_740_993_i64}]]}), "enum"),
        (json!({"maximum": u64::MAX}), "maximum"),
        (json!({"const": "a\0"}), "const"),
        (inner(json!({"$id": "b"})), "$id"),
        (inner(json!({"$schema": "b"})), "$schema"),
        (json!({"$schema": "http://json-schema.org/draft-03/schema#"}), "draft 4"),
        (json!({"$ref": "#/elsewhere", "elsewhere": {"format": "date"}}), "elsewhere"),
        (json!({"$ref": "#/$defs/a%20b", "$defs": {"a%20b": {}, "a b": {}}}), "$ref"),
        (json!({"$ref": "#/$defs/a~1b", "$defs": {"a~1b": {}, "a/b": {}}}), "$ref"),
        (json!({"pattern": "[]a]"}), "pattern"),
        (json!({"format": "password"}), "password"),
        (json!({"pattern": "(a"}), "regex parse error: unclosed group"),
        (json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "overlap"),
        (json!({"uniqueItems": true}), "uniqueItems"),
        // Text that the parser's own message would cut within a character.
        (json!({"minLength": "\u{20ac}".repeat(60)}), ""),
    ];
    for (schema, part) in cases {
        let refused = grammars.guide(&GrammarSource::JsonSchema(schema.clone()));
        let reason = refused.unwrap_err().to_string();
        assert!(reason.contains(part) && !reason.contains('\n'), "{schema}: {reason}");
    }
    // Where they stand as values, such words mean nothing.
    let value = json!({"const": {"$ref": "a", "format": "date"}, "default": {"$id": "b"}});
    assert!(grammars.guide(&GrammarSource::JsonSchema(value)).is_ok());
}

/// Each rule or reference leads to the next: the parser recurses as deep.
#[test]
fn long_chains_are_followed_or_refused() {
    let grammars = grammars();
    let rules: Vec<String> = (0..3000).map(|i| format!("r{i}: r{} \"a\"", i + 1)).collect();
    let lark = format!("start: r0\n{}\nr3000: \"b\"", rules.join("\n"));
    assert!(grammars.guide(&GrammarSource::Lark(lark)).is_ok());
    for list in [json!(null), json!(true)] {
        let link = |i: usize| {
            let next = json!({"$ref": format!("#/$defs/{}", i + 1)});
            let way =
                if list.is_null() { json!({"items": next}) } else { json!({"allOf": [next]}) };
            (i.to_string(), way)
        };
        let mut all: serde_json::Map<_, _> = (0..1500).map(link).collect();
        all.insert("1500".into(), json!({"type": "integer"}));
        let schema = json!({"$ref": "#/$defs/0", "$defs": all});
        // What matters is that there is an answer.
        let _ = grammars.guide(&GrammarSource::JsonSchema(schema));
    }
    let long = GrammarSource::Choice(vec!["a".repeat(70_000)]);
    assert!(grammars.guide(&long).unwrap_err().to_string().contains("65536"));
}

#[test]
fn values_by_schemas_stand_within_a_grammar() {
    let days = json!({"$defs": {"day": {"type": "integer"}}, "items": {"$ref": "#/$defs/day"},
        "type": "array"});
    let lark = "start: \"days \" @s0 (\" and \" @s1)? <[260]>".to_owned();
    let mixed = |schemas| GrammarSource::Mixed { lark: lark.clone(), schemas };
    let mut guide = grammars().guide(&mixed(vec![days, json!({"const": "x"})])).unwrap();
    for token in tokens("days [1, 2] and \"x\"") {
        assert!(next(&mut guide).contains(&token.0));
        guide.push(token);
    }
    assert!(next(&mut guide).contains(&260), "the special token");
    guide.push(TokenId(260));
    assert!(guide.is_over());
    let refused = grammars().guide(&mixed(vec![json!(1), json!(true)])).unwrap_err().to_string();
    assert!(refused.contains("no object"), "{refused}");
}
