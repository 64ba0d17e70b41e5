//! Messages of a chat, and the text that a model's template makes of them.
//!
//! Input: the fields that `/v1/chat/completions`, `/tokenize` and `/apply-template` share. Not here:
//! what is answered ([`super::chat`]), Jinja itself ([`engine::chat`]).

use super::super::app::{Served, aside, seconds};
use super::super::error::ApiError;
use super::tools;
use engine::chat::{ChatInput, ChatTemplate};
use kernels::program::TokenId;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use utoipa::ToSchema;

/// A conversation and how it becomes text.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct Conversation {
    /// What was said so far, at least one message.
    #[serde(default)]
    messages: Vec<Message>,
    /// Whether the text ends with the beginning of an answer; default true.
    add_generation_prompt: Option<bool>,
    /// Whether the last message is to be continued, which needs `add_generation_prompt` false.
    continue_final_message: Option<bool>,
    /// Further variables of the template, such as `enable_thinking`.
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Functions that the model may call.
    pub(crate) tools: Option<Vec<Value>>,
    /// Refused: only the server's own template is used.
    chat_template: Option<Value>,
}

/// A message; further fields, such as `name` and `tool_call_id`, go to the template as they are.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct Message {
    /// `system`, `developer`, `user`, `assistant`, `tool` or what else the template knows.
    role: String,
    content: Option<Content>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// Text, as one or in parts that are joined by line breaks.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct Part {
    /// `text`; images, sound and files are refused.
    r#type: String,
    text: Option<String>,
}

impl Conversation {
    /// The conversation as tokens; `special` adds what the model expects around texts, which
    /// templates usually contain already.
    pub(crate) async fn tokens(
        self,
        served: &Arc<Served>,
        special: bool,
    ) -> Result<Vec<TokenId>, ApiError> {
        let served = served.clone();
        aside(move || served.encode(&self.text(&served)?, special)).await
    }

    /// The conversation as text.
    pub(crate) async fn render(self, served: &Arc<Served>) -> Result<String, ApiError> {
        let served = served.clone();
        aside(move || self.text(&served)).await
    }

    /// Whether nothing was said.
    pub(crate) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// The tools, if there are any.
    pub(crate) fn offered(&self) -> Option<&[Value]> {
        self.tools.as_deref().filter(|tools| !tools.is_empty())
    }

    fn text(&self, served: &Served) -> Result<String, ApiError> {
        if self.is_empty() {
            let message = "messages is empty: give at least one";
            return Err(ApiError::invalid(message).of("messages"));
        }
        let template = served.template.as_ref().ok_or_else(no_template)?;
        if self.chat_template.as_ref().is_some_and(|t| !t.is_null()) {
            let message = "chat_template is not taken from requests: start the server with it";
            return Err(ApiError::invalid(message).of("chat_template"));
        }
        let continues = self.continue_final_message == Some(true);
        let add_generation_prompt = self.add_generation_prompt.unwrap_or(true);
        if continues && add_generation_prompt {
            let message = "continue_final_message needs add_generation_prompt to be false";
            return Err(ApiError::invalid(message).of("continue_final_message"));
        }
        let messages = self.messages(template)?;
        let mut extra = self.chat_template_kwargs.clone().unwrap_or_default();
        extra.entry("now").or_insert(json!(seconds()));
        let tools = self.tools(template)?;
        let tools = tools.as_ref();
        let input = ChatInput { messages: &messages, tools, add_generation_prompt, extra: &extra };
        let text = template.render(&input);
        let text = text.map_err(|e| ApiError::invalid(e.to_string()).of("messages"))?;
        if continues { until_last_message(text, &messages) } else { Ok(text) }
    }

    fn tools(&self, template: &ChatTemplate) -> Result<Option<Value>, ApiError> {
        let Some(tools) = self.offered() else { return Ok(None) };
        tools::check(tools)?;
        if !template.source(true).contains("tools") {
            let message = "this model's chat template does not know tools: send none";
            return Err(ApiError::invalid(message).of("tools").code("no_tools"));
        }
        Ok(Some(json!(tools)))
    }

    /// The messages as a template reads them.
    fn messages(&self, template: &ChatTemplate) -> Result<Value, ApiError> {
        let knows_developers = template.source(false).contains("developer");
        let value = |(index, message): (usize, &Message)| {
            let mut fields = Map::new();
            let role = match message.role.as_str() {
                "developer" if !knows_developers => "system",
                role => role,
            };
            fields.insert("role".into(), json!(role));
            if let Some(content) = &message.content {
                fields.insert("content".into(), json!(content.text(index)?));
            }
            fields.extend(message.more.iter().map(|(key, value)| (key.clone(), value.clone())));
            tools::open_arguments(&mut fields);
            Ok(Value::Object(fields))
        };
        self.messages.iter().enumerate().map(value).collect()
    }
}

impl Content {
    /// The text of message `index`.
    fn text(&self, index: usize) -> Result<String, ApiError> {
        let parts = match self {
            Self::Text(text) => return Ok(text.clone()),
            Self::Parts(parts) => parts,
        };
        let text = |part: &Part| match (part.r#type.as_str(), &part.text) {
            ("text", Some(text)) => Ok(text.clone()),
            ("text", None) => Err("a text part lacks its text".to_owned()),
            (kind, _) => Err(format!("a part is of type {kind:?}: this model reads text alone")),
        };
        let texts: Result<Vec<String>, String> = parts.iter().map(text).collect();
        let param = format!("messages[{index}].content");
        texts.map(|texts| texts.join("\n")).map_err(|e| ApiError::invalid(e).of(param))
    }
}

fn no_template() -> ApiError {
    let message = "this model has no chat template: start the server with --chat-template FILE, \
                   or use /v1/completions";
    ApiError::invalid(message).code("no_chat_template")
}

/// The text up to the end of the last message's own, so that a model goes on with it.
fn until_last_message(mut text: String, messages: &Value) -> Result<String, ApiError> {
    let last = messages.as_array().and_then(|list| list.last());
    let content = last.and_then(|last| last["content"].as_str()).unwrap_or_default();
    // Many templates trim what was said.
    let found = [content, content.trim()].into_iter().filter(|c| !c.is_empty());
    let mut ends = found.filter_map(|c| text.rfind(c).map(|start| start + c.len()));
    match ends.next() {
        Some(end) => {
            text.truncate(end);
            Ok(text)
        }
        None => {
            let message = "continue_final_message: the template leaves the last message's text out";
            Err(ApiError::invalid(message).of("continue_final_message"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_and_other_kinds_refused_by_name() {
        let content = |json: Value| serde_json::from_value::<Content>(json).unwrap();
        let part = |text: &str| json!({"type": "text", "text": text});
        assert_eq!(content(json!([part("a"), part("b")])).text(0).unwrap(), "a\nb");
        assert_eq!(content(json!("a")).text(0).unwrap(), "a");
        let image = json!({"type": "image_url", "image_url": {"url": "data:"}});
        let refused = content(json!([part("a"), image])).text(3).unwrap_err();
        assert!(refused.message.contains("\"image_url\""), "{}", refused.message);
        assert_eq!(refused.param.as_deref(), Some("messages[3].content"));
        assert!(content(json!([{"type": "text"}])).text(0).is_err());
    }

    #[test]
    fn a_continued_message_ends_the_text() {
        let until = |text: &str, content: &str| {
            let messages = json!([{"role": "user", "content": "a"}, {"content": content}]);
            until_last_message(text.to_owned(), &messages)
        };
        assert_eq!(until("<u>a<a>b <end>", "b ").unwrap(), "<u>a<a>b ");
        assert_eq!(until("<u>a<a>b<end>", "b ").unwrap(), "<u>a<a>b");
        assert!(until("<u>a", "b").is_err());
        assert!(until("<u>a", " ").is_err());
    }
}
