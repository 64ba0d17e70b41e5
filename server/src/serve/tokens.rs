//! Text to tokens and back, for clients that count or score: `/tokenize`, `/detokenize`,
//! `/tokenizer_info`, `/apply-template`.
//!
//! The JSON is vLLM's; that of `/apply-template` is llama.cpp's. Not here: generating.

use super::app::{App, Served, aside};
use super::error::{ApiError, ErrorBody};
use super::extract::Body;
use super::openai::conversation::Conversation;
use axum::Json;
use axum::extract::State;
use kernels::program::TokenId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use utoipa::ToSchema;

/// What is to become tokens: `prompt` or `messages`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TokenizeRequest {
    /// The served model's name; default: that model.
    model: Option<String>,
    prompt: Option<String>,
    /// Whether to add what the model expects around a text, such as a begin token; default true
    /// for a prompt, false for messages.
    add_special_tokens: Option<bool>,
    /// Whether to tell the tokens as the vocabulary spells them, too.
    return_token_strs: Option<bool>,
    #[serde(flatten)]
    conversation: Conversation,
}

/// A text's tokens.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Tokenized {
    /// How many there are.
    count: usize,
    /// Most tokens of prompt and answer together.
    max_model_len: u32,
    tokens: Vec<u32>,
    /// The tokens as the vocabulary spells them, where that was asked for.
    token_strs: Option<Vec<String>>,
}

/// What is to become text.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct DetokenizeRequest {
    /// The served model's name; default: that model.
    model: Option<String>,
    tokens: Vec<u32>,
}

/// A text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Text {
    prompt: String,
}

/// A conversation whose text is wanted.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TemplateRequest {
    /// The served model's name; default: that model.
    model: Option<String>,
    #[serde(flatten)]
    conversation: Conversation,
}

/// What a client needs to know to write prompts of its own.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenizerInfo {
    /// Special tokens by name: `bos_token`, `eos_token`, ...
    #[serde(flatten)]
    special: BTreeMap<&'static str, String>,
    /// Number of tokens.
    vocab_size: usize,
    /// Most tokens of prompt and answer together.
    model_max_length: u32,
    /// Jinja template of chats, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    chat_template: Option<String>,
}

/// Turns a prompt or a conversation into tokens.
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest, responses(
    (status = 200, body = Tokenized), (status = "default", body = ErrorBody),
))]
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    Body(request): Body<TokenizeRequest>,
) -> Result<Json<Tokenized>, ApiError> {
    let served = app.ready()?;
    served.check_name(request.model.as_deref())?;
    let special = request.add_special_tokens;
    let tokens = match (request.prompt, request.conversation.is_empty()) {
        (Some(prompt), true) => {
            let served = served.clone();
            aside(move || served.encode(&prompt, special.unwrap_or(true))).await?
        }
        (None, false) => request.conversation.tokens(&served, special.unwrap_or(false)).await?,
        _ => return Err(ApiError::invalid("give either prompt or messages").of("prompt")),
    };
    let strings = request.return_token_strs == Some(true);
    let spelled = |&token: &TokenId| served.tokenizer.token(token).unwrap_or_default();
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: served.config.context_len,
        token_strs: strings.then(|| tokens.iter().map(spelled).collect()),
        tokens: tokens.into_iter().map(|token| token.0).collect(),
    }))
}

/// Turns tokens into text, special ones included.
#[utoipa::path(post, path = "/detokenize", request_body = DetokenizeRequest, responses(
    (status = 200, body = Text), (status = "default", body = ErrorBody),
))]
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    Body(request): Body<DetokenizeRequest>,
) -> Result<Json<Text>, ApiError> {
    let served = app.ready()?;
    served.check_name(request.model.as_deref())?;
    aside(move || text(&served, &request.tokens)).await.map(Json)
}

fn text(served: &Served, ids: &[u32]) -> Result<Text, ApiError> {
    let tokens: Vec<TokenId> = ids.iter().map(|&id| TokenId(id)).collect();
    if let Some(TokenId(id)) = tokens.iter().find(|id| served.tokenizer.token(**id).is_none()) {
        let message = format!("token id {id} is not in the vocabulary");
        return Err(ApiError::invalid(message).of("tokens"));
    }
    let prompt = served.tokenizer.decode(&tokens, false);
    prompt.map(|prompt| Text { prompt }).map_err(|_| ApiError::failed("these tokens have no text"))
}

/// Tells special tokens and the chat template.
#[utoipa::path(get, path = "/tokenizer_info", responses(
    (status = 200, body = TokenizerInfo), (status = "default", body = ErrorBody),
))]
pub(crate) async fn tokenizer_info(
    State(app): State<Arc<App>>,
) -> Result<Json<TokenizerInfo>, ApiError> {
    let served = app.ready()?;
    let named = served.tokenizer.special_tokens();
    let mut special: BTreeMap<_, _> = named.map(|(key, text)| (key, text.to_owned())).collect();
    let end = served.stop_tokens.first().and_then(|&token| served.tokenizer.token(token));
    if let Some(end) = end {
        special.entry("eos_token").or_insert(end);
    }
    Ok(Json(TokenizerInfo {
        special,
        vocab_size: served.tokenizer.vocab_size(),
        model_max_length: served.config.context_len,
        chat_template: served.template.as_ref().map(|t| t.source(false).to_owned()),
    }))
}

/// Writes a conversation as the text that the model continues.
#[utoipa::path(post, path = "/apply-template", request_body = TemplateRequest, responses(
    (status = 200, body = Text), (status = "default", body = ErrorBody),
))]
pub(crate) async fn apply_template(
    State(app): State<Arc<App>>,
    Body(request): Body<TemplateRequest>,
) -> Result<Json<Text>, ApiError> {
    let served = app.ready()?;
    served.check_name(request.model.as_deref())?;
    Ok(Json(Text { prompt: request.conversation.render(&served).await? }))
}

#[cfg(test)]
mod tests {
    use super::super::chat_tests::server;
    use super::super::tests::TestServer;
    use axum::http::StatusCode;
    use serde_json::{Value, json};

    #[tokio::test]
    async fn tokens_become_their_text_again() {
        let server = TestServer::start(&[]);
        let text = "fn main() { let é = 1; }\n";
        let body = json!({"prompt": text, "add_special_tokens": false, "return_token_strs": true});
        let (status, answer) = server.post("/tokenize", body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert_eq!(answer["count"], answer["tokens"].as_array().unwrap().len());
        assert_eq!(answer["count"], answer["token_strs"].as_array().unwrap().len());
        assert_eq!(answer["max_model_len"], server.app.ready().unwrap().config.context_len);
        let body = json!({"tokens": answer["tokens"]});
        assert_eq!(server.post("/detokenize", body).await.1, json!({"prompt": text}));
        // The demo's tokenizer begins a text with token 0.
        let (_, special) = server.post("/tokenize", json!({"prompt": text})).await;
        assert_eq!(special["tokens"][0], 0);
        assert_eq!(
            special["tokens"].as_array().unwrap()[1..],
            answer["tokens"].as_array().unwrap()[..]
        );
        assert_eq!(special["token_strs"], Value::Null);
    }

    #[tokio::test]
    async fn a_conversation_becomes_text_and_tokens() {
        let server = server("{{ bos_token }}{{ messages[0].content }}{{ add_generation_prompt }}");
        let messages = json!([{"role": "user", "content": "let x"}]);
        let body = json!({"messages": messages, "add_generation_prompt": false});
        let (_, text) = server.post("/apply-template", body.clone()).await;
        assert_eq!(text, json!({"prompt": "<|endoftext|>let xFalse"}));
        let (_, tokens) = server.post("/tokenize", body).await;
        let body = json!({"tokens": tokens["tokens"]});
        assert_eq!(server.post("/detokenize", body).await.1, text);
        let both = json!({"messages": messages, "prompt": "a"});
        for body in [both, json!({})] {
            assert_eq!(server.post("/tokenize", body).await.0, StatusCode::BAD_REQUEST);
        }
        let (status, refused) = server.post("/detokenize", json!({"tokens": [0, 4_000_000]})).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(refused["error"]["message"].as_str().unwrap().contains("4000000"), "{refused}");
    }

    #[tokio::test]
    async fn a_tokenizer_introduces_itself() {
        let (_, info) = TestServer::start(&[]).get("/tokenizer_info").await;
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["eos_token"], "<|endoftext|>");
        assert_eq!(info["bos_token"], "<|endoftext|>");
        assert_eq!(info.get("chat_template"), None);
        let (_, info) = server("{{ messages }}").get("/tokenizer_info").await;
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["chat_template"], "{{ messages }}");
    }
}
