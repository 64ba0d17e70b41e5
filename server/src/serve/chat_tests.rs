//! Chats over the demo pair, with a template made up here.

use super::tests::TestServer;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};

/// Shows roles, text and one variable; the demo pair comes without a template.
const TEMPLATE: &str = "{{ bos_token }}{{ greeting }}{% for m in messages %}// {{ m.role }}: {{ m.content }}\n\
                        {% endfor %}{% if add_generation_prompt %}fn {% endif %}";

/// A server whose chats are written by `template`.
pub(super) fn server(template: &str) -> TestServer {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), template).unwrap();
    TestServer::start(&["--chat-template", file.path().to_str().unwrap()])
}

/// The objects of a stream, without its end.
pub(super) async fn stream(server: &TestServer, path: &str, body: &Value) -> Vec<Value> {
    let request = Request::post(path).body(Body::from(body.to_string())).unwrap();
    let (status, text) = server.send(request).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let pieces: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(pieces.last(), Some(&"[DONE]"));
    pieces[..pieces.len() - 1].iter().map(|p| serde_json::from_str(p).unwrap()).collect()
}

#[tokio::test]
async fn a_chat_goes_on_where_its_template_ends() {
    let server = server(TEMPLATE);
    let messages = json!([
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "adds"}, {"type": "text", "text": "two"}]},
    ]);
    let body = json!({"messages": messages, "max_tokens": 30, "max_completion_tokens": 24, "seed": 3,
        "chat_template_kwargs": {"greeting": "// hi\n"}});
    let (status, answer) = server.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let prompt = "// hi\n// system: be short\n// user: adds\ntwo\nfn ";
    let body = json!({"prompt": prompt, "max_tokens": 24, "seed": 3});
    let (_, expected) = server.post("/v1/completions", body).await;
    let (choice, expected_choice) = (&answer["choices"][0], &expected["choices"][0]);
    assert_eq!(choice["message"]["content"], expected_choice["text"]);
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["finish_reason"], expected_choice["finish_reason"]);
    for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(answer["usage"][key], expected["usage"][key], "{key}");
    }
    assert_eq!(answer["object"], "chat.completion");
}

#[tokio::test]
async fn a_chat_stream_is_the_whole_answer_in_pieces() {
    let server = server(TEMPLATE);
    let mut body = json!({"messages": [{"role": "user", "content": "sort"}], "max_tokens": 20,
        "seed": 5, "n": 2, "logprobs": true, "top_logprobs": 3, "metrics": true, "provenance": true});
    let (_, whole) = server.post("/v1/chat/completions", body.clone()).await;
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let pieces = stream(&server, "/v1/chat/completions", &body).await;
    for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(pieces.last().unwrap()["usage"][key], whole["usage"][key], "{key}");
    }
    assert_eq!(pieces[0]["usage"]["completion_tokens"], 0);
    for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let of = pieces.iter().flat_map(|p| p["choices"].as_array().unwrap());
        let of: Vec<&Value> = of.filter(|c| c["index"] == i).collect();
        assert_eq!(of[0]["delta"], json!({"role": "assistant", "content": ""}));
        assert!(of[1..].iter().all(|c| c["delta"]["role"].is_null()));
        let text: String = of.iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(text, choice["message"]["content"].as_str().unwrap());
        let lists = of.iter().filter_map(|c| c["logprobs"]["content"].as_array());
        let all: Vec<Value> = lists.flatten().cloned().collect();
        assert_eq!(json!(all), choice["logprobs"]["content"]);
        assert_eq!(of.last().unwrap()["finish_reason"], choice["finish_reason"]);
        let told = choice["provenance"].as_array().unwrap();
        let told: String = told.iter().map(|piece| piece["text"].as_str().unwrap()).collect();
        assert_eq!(told, text);
    }
    for answer in [pieces.last().unwrap(), &whole] {
        assert!(answer["metrics"]["speculative_decoding"]["num_spec_tokens"].as_u64() > Some(0));
        assert_eq!(answer["timings"]["predicted_n"], 40);
    }
}

#[tokio::test]
async fn log_probabilities_belong_to_the_answers_tokens() {
    let server = server(TEMPLATE);
    let mut body = json!({"messages": [{"role": "user", "content": "sort"}], "max_tokens": 12,
        "temperature": 0, "logprobs": true, "top_logprobs": 2});
    let (_, answer) = server.post("/v1/chat/completions", body.clone()).await;
    let choice = &answer["choices"][0];
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), 12);
    let text: String = entries.iter().map(|e| e["token"].as_str().unwrap()).collect();
    assert_eq!(text, choice["message"]["content"].as_str().unwrap());
    for entry in entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        // Greedy: what was chosen is the likeliest.
        assert_eq!(entry["logprob"], top[0]["logprob"]);
        let bytes = entry["token"].as_str().unwrap().as_bytes();
        assert_eq!(entry["bytes"], json!(bytes));
    }
    body["logprobs"] = json!(false);
    body["top_logprobs"] = json!(0);
    let (_, answer) = server.post("/v1/chat/completions", body).await;
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn a_last_message_can_be_continued() {
    let server = server(TEMPLATE);
    let messages = json!([{"role": "user", "content": "add"},
        {"role": "assistant", "content": "fn add(a: i32, "}]);
    let body = json!({"messages": messages, "max_tokens": 16, "temperature": 0,
        "add_generation_prompt": false, "continue_final_message": true});
    let (status, answer) = server.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let prompt = "// user: add\n// assistant: fn add(a: i32, ";
    let body = json!({"prompt": prompt, "max_tokens": 16, "temperature": 0});
    let (_, expected) = server.post("/v1/completions", body).await;
    assert_eq!(answer["choices"][0]["message"]["content"], expected["choices"][0]["text"]);
}

#[tokio::test]
async fn an_answer_may_fill_the_context() {
    let server = server(TEMPLATE);
    let messages = json!([{"role": "user", "content": "a b ".repeat(1000)}]);
    let body = json!({"messages": messages, "ignore_eos": true, "temperature": 0});
    let (status, answer) = server.post("/v1/chat/completions", body).await;
    let context = server.app.ready().unwrap().config.context_len;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["usage"]["total_tokens"], context);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let messages = json!([{"role": "user", "content": "a b ".repeat(context as usize)}]);
    let (status, refused) =
        server.post("/v1/chat/completions", json!({"messages": messages})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{refused}");
    assert_eq!(refused["error"]["code"], "context_length_exceeded");
    assert_eq!(refused["error"]["param"], "messages");
}

#[tokio::test]
async fn mistakes_in_chats_are_answered_in_words() {
    let server = server("{{ raise_exception('be polite') if messages[0].content == 'x' }}a");
    let user = |content: Value| json!([{"role": "user", "content": content}]);
    let refuse = async |body: Value, param: Option<&str>, part: &str| {
        let (status, answer) = server.post("/v1/chat/completions", body.clone()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}: {answer}");
        let error = &answer["error"];
        assert_eq!(error["param"].as_str(), param, "{body}: {answer}");
        assert!(error["message"].as_str().unwrap().contains(part), "{body}: {answer}");
    };
    refuse(json!({}), Some("messages"), "empty").await;
    refuse(json!({"messages": 1}), None, "sequence").await;
    refuse(json!({"messages": []}), Some("messages"), "empty").await;
    refuse(json!({"messages": user(json!("x"))}), Some("messages"), "be polite").await;
    let image = user(json!([{"type": "image_url", "image_url": {"url": "a"}}]));
    refuse(json!({"messages": image}), Some("messages[0].content"), "image_url").await;
    let with = |key: &str, value: Value| {
        let mut body = json!({"messages": user(json!("a"))});
        body[key] = value;
        body
    };
    refuse(with("top_logprobs", json!(2)), Some("top_logprobs"), "logprobs").await;
    refuse(with("chat_template", json!("b")), Some("chat_template"), "server").await;
    let continues = Some("continue_final_message");
    refuse(with("continue_final_message", json!(true)), continues, "false").await;
    refuse(with("max_completion_tokens", json!(0)), Some("max_tokens"), "at least one").await;
}

#[tokio::test]
async fn a_model_without_a_template_says_so() {
    let server = TestServer::start(&[]);
    let body = json!({"messages": [{"role": "user", "content": "a"}]});
    let (status, refused) = server.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(refused["error"]["code"], "no_chat_template");
}

/// Teaches calls by its mark, offers tools by their names, and shows earlier calls.
const TOOLS: &str = "{{ bos_token }}{% if tools %}// <tool_call> {% for t in tools %}{{ t.function.name }} \
    {% endfor %}{% endif %}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}\
    {{ c.function.arguments.a }}{% endfor %}{% endfor %}";

#[tokio::test]
async fn templates_show_tools_unless_none_may_be_called() {
    let server = server(TOOLS);
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {}}}]);
    let earlier = json!({"role": "assistant", "content": null, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 7}"}}]});
    let messages = json!([{"role": "user", "content": "x"}, earlier]);
    let mut body = json!({"messages": messages, "tools": tools});
    let (_, text) = server.post("/apply-template", body.clone()).await;
    assert_eq!(text["prompt"], "<|endoftext|>// <tool_call> add x7");
    body["max_tokens"] = json!(4);
    body["temperature"] = json!(0);
    let (status, with) = server.post("/v1/chat/completions", body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{with}");
    // The demo writes code, not calls: everything is content.
    assert_eq!(with["choices"][0]["message"].get("tool_calls"), None);
    body["tool_choice"] = json!("none");
    let (_, without) = server.post("/v1/chat/completions", body.clone()).await;
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(tokens(&without) < tokens(&with), "{without} {with}");
    body["tool_choice"] = json!("auto");
    body["tools"] = json!([{"type": "x"}]);
    let (status, refused) = server.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{refused}");
    assert_eq!(refused["error"]["param"], "tools[0]", "{refused}");
}

#[tokio::test]
async fn tools_need_a_template_that_knows_them() {
    let tools = json!([{"type": "function", "function": {"name": "add"}}]);
    let body = json!({"messages": [{"role": "user", "content": "x"}], "tools": tools});
    let unknown = server("{{ messages[0].content }}{{ tools }}");
    let (_, refused) = unknown.post("/v1/chat/completions", body.clone()).await;
    assert_eq!(refused["error"]["code"], "no_tool_format", "{refused}");
    let ignorant =
        server("{{ messages[0].content }}<tool_call>{{ 'x' }}".replace("tool_", "t_").as_str());
    let (_, refused) = ignorant.post("/apply-template", body).await;
    assert_eq!(refused["error"]["code"], "no_tools", "{refused}");
}
