//! Answers that must look like something, over the demo pair, which would not by itself.

use super::chat_tests::{server as chat_server, stream};
use super::tests::TestServer;
use axum::http::StatusCode;
use serde_json::{Value, json};

/// A small object; every text of it is short.
fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["fn", "struct", "mod"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 999},
            "public": {"type": "boolean"},
        },
        "required": ["kind", "count", "public"],
        "additionalProperties": false,
    })
}

/// Whether `text` is valid by [`schema`].
fn fits(text: &str) -> bool {
    let Ok(Value::Object(object)) = serde_json::from_str(text) else { return false };
    let keys: Vec<&str> = object.keys().map(String::as_str).collect();
    keys == ["kind", "count", "public"]
        && [json!("fn"), json!("struct"), json!("mod")].contains(&object["kind"])
        && object["count"].as_u64().is_some_and(|count| count < 1000)
        && object["public"].is_boolean()
}

/// Every way to ask, with a test of what comes.
type Way = (&'static str, Value, fn(&str) -> bool);

fn ways() -> Vec<Way> {
    let named = json!({"name": "item", "strict": true, "schema": schema()});
    let texts = json!(["fn main()", "struct\n\"A\"", "mod tests"]);
    let lark = "start: \"[\" word (\", \" word){2} \"]\"\nword: /[a-z]{1,4}/";
    // Closures without captures are functions.
    let choice: fn(&str) -> bool = |t| ["fn main()", "struct\n\"A\"", "mod tests"].contains(&t);
    let regex: fn(&str) -> bool = |t| {
        let (name, number) = t.split_once(' ').unwrap();
        name.bytes().all(|b| b.is_ascii_lowercase()) && number.parse::<u32>().is_ok()
    };
    let list: fn(&str) -> bool = |t| {
        let inner = t.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or("");
        let words: Vec<&str> = inner.split(", ").collect();
        let fits =
            |w: &&str| (1..=4).contains(&w.len()) && w.bytes().all(|b| b.is_ascii_lowercase());
        words.len() == 3 && words.iter().all(fits)
    };
    vec![
        ("response_format", json!({"type": "json_schema", "json_schema": named}), fits),
        ("guided_json", schema(), fits),
        ("json_schema", schema(), fits),
        ("structured_outputs", json!({"json": schema().to_string()}), fits),
        ("guided_choice", texts.clone(), choice),
        ("structured_outputs", json!({"choice": texts}), choice),
        ("guided_regex", json!("[a-z]{2,9} [0-9]{1,6}"), regex),
        ("guided_grammar", json!(lark), list),
    ]
}

#[tokio::test]
async fn every_way_to_ask_is_heeded_with_and_without_guessing() {
    let (with, without) = (TestServer::start(&[]), TestServer::start(&["--draft", "off"]));
    let mut drafted = 0;
    for (param, value, fits) in ways() {
        for (temperature, seed) in [(0.0, 1), (1.0, 2), (1.0, 3)] {
            let body = json!({"prompt": "pub fn new(", "max_tokens": 200, "seed": seed,
                "temperature": temperature, param: value, "metrics": true});
            let (status, answer) = with.post("/v1/completions", body.clone()).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            let choice = &answer["choices"][0];
            let text = choice["text"].as_str().unwrap();
            assert!(fits(text), "{param} {value}: {text:?}");
            assert_eq!(choice["finish_reason"], "stop");
            let told = &answer["metrics"]["speculative_decoding"]["num_draft_tokens"];
            drafted += told.as_u64().unwrap_or(0);
            let (_, plain) = without.post("/v1/completions", body).await;
            assert_eq!(plain["choices"][0]["text"], text, "{param} {value}");
        }
    }
    assert!(drafted > 100, "only {drafted} tokens were guessed");
}

#[tokio::test]
async fn any_object_is_json_as_far_as_it_goes() {
    let server = TestServer::start(&[]);
    let mut ended = 0;
    for seed in 0..6 {
        let body = json!({"prompt": "{\"name\": \"x\"}\n", "max_tokens": 300, "seed": seed,
            "response_format": {"type": "json_object"}});
        let (_, answer) = server.post("/v1/completions", body).await;
        let choice = &answer["choices"][0];
        let text = choice["text"].as_str().unwrap();
        let read = serde_json::from_str::<Value>(text);
        // JSON's numbers have no largest one; the reader's do.
        let large = read.as_ref().is_err_and(|e| e.to_string().contains("out of range"));
        if choice["finish_reason"] == "stop" {
            assert!(large || read.unwrap().is_object(), "{text}");
            ended += 1;
        } else {
            assert_eq!(choice["finish_reason"], "length");
            assert!(large || read.is_err_and(|e| e.is_eof()), "{text}");
        }
    }
    assert!(ended > 0, "no object was ever complete");
}

const TEMPLATE: &str = "{% for m in messages %}// {{ m.content }}\n{% endfor %}";

#[tokio::test]
async fn chats_and_their_streams_follow_a_schema() {
    let server = chat_server(TEMPLATE);
    let format = json!({"type": "json_schema", "json_schema": {"schema": schema()}});
    let mut body = json!({"messages": [{"role": "user", "content": "an item"}], "seed": 4, "n": 2,
        "response_format": format});
    let (status, whole) = server.post("/v1/chat/completions", body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{whole}");
    body["stream"] = json!(true);
    let pieces = stream(&server, "/v1/chat/completions", &body).await;
    for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(fits(text), "{text:?}");
        let of = pieces.iter().flat_map(|p| p["choices"].as_array().unwrap());
        let of = of.filter(|c| c["index"] == i);
        let streamed: String = of.filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(streamed, text);
    }
    let cut = json!({"messages": [{"role": "user", "content": "an item"}], "max_tokens": 3,
        "response_format": format});
    let (_, cut) = server.post("/v1/chat/completions", cut).await;
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn what_cannot_be_followed_is_refused_by_its_parameter() {
    let server = chat_server(TEMPLATE);
    let not = json!({"not": {"type": "string"}});
    let remote = json!({"$ref": "https://example.com/schema"});
    let schema = |schema: &Value| json!({"type": "json_schema", "json_schema": {"schema": schema}});
    let cases = [
        ("response_format", schema(&not), "not"),
        ("response_format", schema(&remote), "example.com"),
        ("response_format", json!({"type": "json_schema", "json_schema": {}}), "lacks"),
        ("guided_json", json!(3), "no object"),
        ("guided_regex", json!("(a"), "regex"),
        ("guided_choice", json!([]), "nothing to choose"),
        ("guided_grammar", json!("begin: \"a\""), "start"),
        ("structured_outputs", json!({}), "exactly one"),
    ];
    for (param, value, part) in cases {
        let messages = json!([{"role": "user", "content": "a"}]);
        for (path, key, said) in [
            ("/v1/completions", "prompt", json!("a")),
            ("/v1/chat/completions", "messages", messages),
        ] {
            let (status, refused) = server.post(path, json!({key: said, param: value})).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{param} {value}: {refused}");
            let error = &refused["error"];
            assert_eq!(error["param"], param, "{refused}");
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(part) && !message.contains('\n'), "{message}");
        }
    }
}

#[tokio::test]
async fn equal_schemas_in_another_order_are_not_mistaken_for_each_other() {
    let server = TestServer::start(&[]);
    for keys in [["a", "b"], ["b", "a"]] {
        let text = format!(
            r#"{{"type": "object", "properties": {{"{}": {{"const": 1}}, "{}": {{"const": 1}}}},
                "required": ["a", "b"], "additionalProperties": false}}"#,
            keys[0], keys[1]
        );
        let schema: Value = serde_json::from_str(&text).unwrap();
        let body = json!({"prompt": "x", "max_tokens": 200, "guided_json": schema, "seed": 1});
        let (_, answer) = server.post("/v1/completions", body).await;
        let object = answer["choices"][0]["text"].as_str().unwrap();
        let object: Value = serde_json::from_str(object).unwrap();
        assert!(object.as_object().unwrap().keys().eq(keys), "{object}");
    }
}

/// Two functions; their arguments are short.
fn tools() -> Value {
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let days = json!({"$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 14}},
        "properties": {"place": {"enum": ["Bern", "Z\u{fc}rich \"HB\""]}, "days": {"$ref": "#/$defs/days"}},
        "required": ["place", "days"], "additionalProperties": false});
    json!([tool("weather", days), tool("now", json!({"additionalProperties": false}))])
}

/// Whether a call is one of [`tools`] with arguments that it takes.
fn is_call(call: &Value) -> bool {
    let function = &call["function"];
    let arguments = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
    let Value::Object(arguments) = arguments else { return false };
    match function["name"].as_str() {
        Some("now") => arguments.is_empty(),
        Some("weather") => {
            let (place, days) = (&arguments["place"], arguments["days"].as_u64());
            ["Bern", "Z\u{fc}rich \"HB\""].contains(&place.as_str().unwrap())
                && days.is_some_and(|days| (1..=14).contains(&days))
                && arguments.len() == 2
        }
        _ => false,
    }
}

#[tokio::test]
async fn calls_are_forced_in_every_form() {
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for mark in ["<tool_call>", "<|python_tag|>", "[TOOL_CALLS]"] {
        let template = format!("{{{{ tools }}}}{mark}{{{{ messages[0].content }}}}");
        let server = chat_server(&template);
        for (choice, parallel, seed) in [
            (json!("required"), true, 1),
            (json!("required"), true, 2),
            (json!("required"), false, 3),
            (named.clone(), true, 4),
        ] {
            let body = json!({"messages": [{"role": "user", "content": "x"}], "tools": tools(),
                "tool_choice": choice, "parallel_tool_calls": parallel, "seed": seed,
                "max_tokens": 400});
            let (status, answer) = server.post("/v1/chat/completions", body.clone()).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            let choice = &answer["choices"][0];
            let calls = choice["message"]["tool_calls"].as_array();
            let calls = calls.unwrap_or_else(|| panic!("{mark} {body}: {answer}"));
            assert!(calls.iter().all(is_call), "{mark}: {answer}");
            let one =
                !parallel || choice["finish_reason"] != "length" && body["tool_choice"].is_object();
            assert!(!one || calls.len() == 1, "{mark}: {answer}");
            if one {
                assert_eq!(choice["finish_reason"], "tool_calls", "{mark}: {answer}");
                assert_eq!(choice["message"]["content"], Value::Null, "{mark}: {answer}");
            }
            if body["tool_choice"].is_object() {
                assert_eq!(calls[0]["function"]["name"], "weather");
            }
        }
    }
}

#[tokio::test]
async fn calls_that_cannot_be_forced_are_refused() {
    let server = chat_server("{{ tools }}<tool_call>{{ messages[0].content }}");
    let body = json!({"messages": [{"role": "user", "content": "x"}], "tools": tools()});
    let unknown = json!({"type": "function", "function": {"name": "missing"}});
    let parameters = json!({"type": "string"});
    let text = json!([{"type": "function", "function": {"name": "f", "parameters": parameters}}]);
    let not = json!([{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]);
    let format = json!({"type": "json_object"});
    let cases = [
        (json!({"tool_choice": unknown}), "tool_choice", "missing"),
        (json!({"tool_choice": "some"}), "tool_choice", "some"),
        (json!({"tool_choice": "required", "tools": []}), "tool_choice", "no tools"),
        (
            json!({"tool_choice": "required", "tools": text}),
            "tools[0].function.parameters",
            "object",
        ),
        (json!({"tool_choice": "required", "tools": not}), "tools", "not"),
        (json!({"tool_choice": "required", "response_format": format}), "tools", "response_format"),
    ];
    for (more, param, part) in cases {
        let mut body = body.clone();
        for (key, value) in more.as_object().unwrap() {
            body[key] = value.clone();
        }
        let (status, refused) = server.post("/v1/chat/completions", body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{more}: {refused}");
        assert_eq!(refused["error"]["param"], param, "{more}: {refused}");
        assert!(refused["error"]["message"].as_str().unwrap().contains(part), "{refused}");
    }
}
