//! Rendering against reference vectors, template sources, and hostile templates.

use super::*;
use crate::tokenizer::Tokenizer;
use serde_json::json;
use testkit::{golden, golden_json};

/// A template as its model folder would give it.
fn template(source: &str, tokens: &Value) -> Result<ChatTemplate, Error> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), tokens.to_string()).unwrap();
    let found = ChatTemplate::from_files(&ModelFiles::Folder(dir.path().into()))?;
    Ok(found.unwrap())
}

fn golden_template(entry: &Value) -> ChatTemplate {
    let source = golden("chat").join(entry["file"].as_str().unwrap());
    template(&std::fs::read_to_string(source).unwrap(), entry).unwrap()
}

#[test]
fn a_given_template_takes_the_place_of_the_models_own() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "own").unwrap();
    let config = json!({"bos_token": "<s>"}).to_string();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let files = ModelFiles::Folder(dir.path().into());
    let source = "{{ bos_token }}{{ messages[0].content }}";
    let template = ChatTemplate::from_source(source.into(), &files).unwrap();
    let (messages, extra) = (json!([{"role": "user", "content": "hi"}]), Map::new());
    let input =
        ChatInput { messages: &messages, tools: None, add_generation_prompt: true, extra: &extra };
    assert_eq!(template.render(&input).unwrap(), "<s>hi");
    assert_eq!(template.source(true), source);
    assert!(ChatTemplate::from_source("{% if %}".into(), &files).is_err());
}

#[test]
fn golden_conversations() {
    let vectors = golden_json("chat/vectors.json");
    for row in vectors["rows"].as_array().unwrap() {
        let entry = &vectors["templates"][row["template"].as_str().unwrap()];
        let input = ChatInput {
            messages: &vectors["conversations"][row["conversation"].as_str().unwrap()],
            tools: row["tools"].as_bool().unwrap().then_some(&vectors["tools"]),
            add_generation_prompt: row["add_generation_prompt"].as_bool().unwrap(),
            extra: row["extra"].as_object().unwrap(),
        };
        let what = format!("{} {}", row["template"], row["conversation"]);
        match (golden_template(entry).render(&input), row["text"].as_str()) {
            (Ok(text), Some(expected)) => assert_eq!(text, expected, "{what}"),
            (Err(e), None) => check_error(&e, &row["error"], &what),
            (found, _) => panic!("{what}: {found:?}, expected {row}"),
        }
    }
}

fn check_error(error: &Error, expected: &Value, what: &str) {
    if expected["type"] == "TemplateError" {
        let words = format!("chat template: {}", expected["message"].as_str().unwrap());
        assert_eq!(error.to_string(), words, "{what}");
    }
}

#[test]
fn golden_probes() {
    let vectors = golden_json("chat/vectors.json");
    let mut extra = vectors["jinja_variables"].as_object().unwrap().clone();
    extra.insert("now".into(), json!(1_750_000_000));
    let mut wrong = Vec::new();
    for row in vectors["jinja"].as_array().unwrap() {
        let messages = &vectors["jinja_messages"];
        let input =
            ChatInput { messages, tools: None, add_generation_prompt: false, extra: &extra };
        let found = template(row["template"].as_str().unwrap(), &json!({}));
        let found = found.and_then(|t| t.render(&input));
        match (&found, row["text"].as_str()) {
            (Ok(text), Some(expected)) if text == expected => {}
            (Err(_), None) => {}
            _ => {
                eprintln!(
                    "{}\n  {}\n  found {found:?}\n  want {}{}",
                    row["name"], row["template"], row["text"], row["error"]
                );
                wrong.push(row["name"].as_str().unwrap().to_owned());
            }
        }
    }
    // The operator % on strings: see the head of python.rs.
    assert_eq!(wrong, ["string_methods"]);
}

/// Renders `source` for one user message with variables `extra`.
fn render(source: &str, extra: &Value) -> Result<String, Error> {
    let messages = json!([{"role": "user", "content": "hi", "name": null}]);
    let extra = extra.as_object().unwrap();
    let input = ChatInput { messages: &messages, tools: None, add_generation_prompt: true, extra };
    template(source, &json!({}))?.render(&input)
}

#[test]
fn python_behaviour() {
    let extra = json!({
        "props": {"items": {"type": "array"}, "get": 1}, "words": "the quick brown fox jumps",
        "now": 1_750_000_000, "floats": [1e20, 1.5e-7, -0.0, 1.5, 1e16, 123_456_789_012_345.67],
    });
    // Expected texts printed by Python's jinja2 3.1.6.
    for (source, expected) in [
        (
            "{% for k, v in props.items() %}{{ k }}={{ v }};{% endfor %}",
            "items={'type': 'array'};get=1;",
        ),
        ("{{ props.get('items') }}{{ props.get('nope', 3) }}", "{'type': 'array'}3"),
        ("{{ props | length }}{{ 'items' in props }}{{ props | list }}", "2True['items', 'get']"),
        (
            "{% for f in floats %}{{ f }} {% endfor %}",
            "1e+20 1.5e-07 -0.0 1.5 1e+16 123456789012345.67 ",
        ),
        ("{{ floats | tojson }}", "[1e+20, 1.5e-07, -0.0, 1.5, 1e+16, 123456789012345.67]"),
        ("{{ nope | length }}{{ messages[0].tool_calls | length }}", "00"),
        ("{{ 'a' is sequence }}{{ props is sequence }}{{ 1 is sequence }}", "TrueTrueFalse"),
        (
            "{{ 'a,b,c'.rsplit(',') }}{{ 'a b  c '.rsplit() }}{{ 'a b  c '.rsplit(none, 1) }}{{ ''.rsplit() }}",
            "['a', 'b', 'c']['a', 'b', 'c']['a b', 'c'][]",
        ),
        (
            "{{ 'abc'.rpartition('b') }}{{ 'abc'.rpartition('x') }}{{ 'abc'.partition('x') }}",
            "('a', 'b', 'c')('', '', 'abc')('abc', '', '')",
        ),
        ("{{ 'abc'.removesuffix('c') }}{{ 'é😀c'.index('c') }}{{ 'abcabc'.rindex('b') }}", "ab24"),
        ("{{ '-5'.zfill(4) }}{{ '+5'.zfill(4) }}{{ 'abc'.zfill(2) }}", "-005+005abc"),
        (
            "{{ 'a'.center(4) }}|{{ 'ab'.center(5, '*') }}|{{ 'abc'.rjust(5) }}|{{ 'ab' | center(7) }}|",
            " a  |**ab*|  abc|   ab  |",
        ),
        ("{{ 'aBc'.swapcase() }}{{ 'ABC'.casefold() }}{{ \"it's\".title() }}", "AbCabcIt'S"),
        (
            "{{ words | truncate(15) }}|{{ words | truncate(15, true) }}|{{ words | truncate(length=10, killwords=true, end='', leeway=0) }}|{{ words | truncate(20) }}",
            "the quick...|the quick br...|the quick |the quick brown fox jumps",
        ),
        (
            "{{ '😀\u{7f}' | tojson(ensure_ascii=true) }}{{ '😀\u{7f}\u{1}' | tojson }}",
            "\"\\ud83d\\ude00\\u007f\"\"😀\u{7f}\\u0001\"",
        ),
        (r#"{{ 'a\\b"c\n' | tojson }}"#, r#""a\\b\"c\n""#),
        ("{{ [[], {}, [1]] | tojson(indent=1) }}", "[\n [],\n {},\n [\n  1\n ]\n]"),
        (
            "{{ [1, 2] | tojson(separators=(',', ':')) }}{{ (1,) | tojson(indent='-') }}",
            "[1,2][\n-1\n]",
        ),
        ("{{ strftime_now('%d %b %Y') }}", "15 Jun 2025"),
        (
            "{% generation %}{% set z = 1 %}{{ z }}{% endgeneration %}{{ z }}|{%- generation -%} a {%- endgeneration -%} b",
            "1|ab",
        ),
    ] {
        assert_eq!(render(source, &extra).unwrap(), expected, "{source}");
    }
}

/// The parts of the golden probe that fails as a whole.
#[test]
fn string_methods_but_for_the_percent_operator() {
    let vectors = golden_json("chat/vectors.json");
    let probe = vectors["jinja"].as_array().unwrap();
    let probe = probe.iter().find(|row| row["name"] == "string_methods").unwrap();
    let parts = |key: &str| probe[key].as_str().unwrap().split("}}|{{").map(str::to_owned);
    let sources =
        parts("template").map(|part| format!("{{{{{}}}}}", part.trim_matches(['{', '}'])));
    let expected: Vec<&str> = probe["text"].as_str().unwrap().split('|').collect();
    let extra = &vectors["jinja_variables"];
    let sources: Vec<String> = sources.collect();
    assert_eq!(sources.len(), expected.len());
    for (source, expected) in sources.iter().zip(expected) {
        match render(source, extra) {
            Ok(text) => assert_eq!(text, expected, "{source}"),
            Err(e) => assert!(source.contains("' % ("), "{source}: {e}"),
        }
    }
}

#[test]
fn what_python_refuses_is_refused() {
    for (source, reason) in [
        ("{{ nope | tojson }}", "a value of type undefined is not JSON"),
        ("{{ none | length }}", "a value of type none has no length"),
        ("{{ strftime_now('%Y') }}", "pass now"),
        ("{{ 'abc'.index('x') }}", "substring not found"),
        ("{{ 'abc'.ljust(1000000000) }}", "more than 100000"),
        ("{{ 'a\nb' }}{{ raise_exception('no ' ~ 1) }}", "chat template: no 1"),
        ("{% macro m() %}{{ raise_exception('inner') }}{% endmacro %}{{ m() }}", "template: inner"),
        ("\n\n{{ [] }}{{ {}['a'].b.c }}", "(line 3)"),
    ] {
        let error = render(source, &json!({})).unwrap_err().to_string();
        assert!(error.contains(reason), "{source}: {error}");
    }
}

#[test]
fn hostile_templates_end_with_an_error() {
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(1200) %}\
                  {% for j in range(100) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
    for (what, source) in [
        ("endless macro", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned()),
        ("long loops", format!("{0}{0}{1}{1}", "{% for a in range(99999) %}", "{% endfor %}")),
        ("brackets", format!("{{{{ {}", "(".repeat(200_000))),
        ("blocks", "{% if 1 %}".repeat(20_000)),
        ("size", " ".repeat(SOURCE_BYTES_MAX + 1)),
        ("nested json", format!("{nested}{{{{ ns.x | tojson }}}}")),
        ("repeated text", "{{ 'a' * 1000000000000 }}".to_owned()),
    ] {
        assert!(render(&source, &json!({})).is_err(), "{what}");
    }
    // These are valid; they must only not exhaust the stack.
    let chains =
        ["{{ 1", "+1", " }}", "{{ ", "-", "1 }}", "{% if 0 %}", "{% elif 0 %}", "{% endif %}"];
    for parts in chains.chunks_exact(3) {
        let middle = parts[1].repeat((SOURCE_BYTES_MAX - 100) / parts[1].len());
        render(&[parts[0], &middle, parts[2]].concat(), &json!({})).unwrap();
    }
    let text = render(&format!("{nested}{{{{ ns.x }}}}"), &json!({})).unwrap();
    assert_eq!(text.len(), 2 * (120_000 + 1));
}

#[test]
fn token_ids_of_golden_conversations() {
    let vectors = golden_json("chat/vectors.json");
    let mut compared = 0;
    for (name, entry) in vectors["templates"].as_object().unwrap() {
        let folder = golden("chat").join(entry["tokenizer"].as_str().unwrap());
        let files = ModelFiles::Folder(folder.parent().unwrap().into());
        let tokenizer = Tokenizer::from_files(&files).unwrap();
        let rows = vectors["rows"].as_array().unwrap().iter();
        for row in rows.filter(|r| r["template"] == **name && r["token_ids"].is_array()) {
            let ids = tokenizer.encode(row["text"].as_str().unwrap(), false).unwrap();
            let ids: Vec<u32> = ids.into_iter().map(|id| id.0).collect();
            assert_eq!(json!(ids), row["token_ids"], "{name} {}", row["conversation"]);
            compared += 1;
        }
    }
    assert!(compared > 50, "{compared} rows have token ids");
}

/// A folder of these files.
fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, ModelFiles) {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let files = ModelFiles::Folder(dir.path().into());
    (dir, files)
}

fn render_files(files: &[(&str, &str)], tools: bool) -> Result<Option<String>, Error> {
    let (_dir, files) = folder(files);
    let Some(template) = ChatTemplate::from_files(&files)? else { return Ok(None) };
    let (messages, tools_list, extra) = (json!([{"role": "user"}]), json!([]), Map::new());
    let tools = tools.then_some(&tools_list);
    let input =
        ChatInput { messages: &messages, tools, add_generation_prompt: true, extra: &extra };
    template.render(&input).map(Some)
}

#[test]
fn template_sources_in_order() {
    let config = ("tokenizer_config.json", r#"{"chat_template": "config", "bos_token": "B"}"#);
    let jinja = ("chat_template.jinja", "file {{ bos_token }}{{ eos_token }}");
    let json = ("chat_template.json", r#"{"chat_template": "json"}"#);
    let map = ("special_tokens_map.json", r#"{"bos_token": "x", "eos_token": {"content": "E"}}"#);
    let text = |files: &[_]| render_files(files, false).unwrap();
    assert_eq!(text(&[config, jinja, json, map]).as_deref(), Some("file BE"));
    assert_eq!(text(&[config, json]).as_deref(), Some("config"));
    assert_eq!(text(&[json]).as_deref(), Some("json"));
    assert_eq!(text(&[map]), None);
}

#[test]
fn named_templates() {
    let both = (
        "tokenizer_config.json",
        r#"{"chat_template": [
        {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]}"#,
    );
    let one = ("tokenizer_config.json", r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#);
    assert_eq!(render_files(&[both], false).unwrap().as_deref(), Some("plain"));
    assert_eq!(render_files(&[both], true).unwrap().as_deref(), Some("tools"));
    let error = render_files(&[one], true).unwrap_err().to_string();
    assert_eq!(error, "chat template: there is none called default, only rag");
}

#[test]
fn broken_sources_are_refused_by_name() {
    for (file, content, reason) in [
        ("tokenizer_config.json", r#"{"chat_template": 3}"#, "chat_template is 3"),
        ("tokenizer_config.json", r#"{"chat_template": [{"name": "a"}]}"#, "expected a text or"),
        ("tokenizer_config.json", "[]", "not valid JSON"),
        ("chat_template.jinja", "{% if %}", "syntax error"),
    ] {
        let error = render_files(&[(file, content)], false).unwrap_err().to_string();
        assert!(error.contains(reason), "{content}: {error}");
    }
}

#[test]
fn messages_must_be_a_list_of_objects() {
    let template = template("x", &json!({})).unwrap();
    for messages in [json!(null), json!([]), json!({"role": "user"}), json!(["hi"])] {
        let extra = Map::new();
        let input = ChatInput {
            messages: &messages,
            tools: None,
            add_generation_prompt: true,
            extra: &extra,
        };
        assert!(template.render(&input).is_err(), "{messages}");
    }
}
