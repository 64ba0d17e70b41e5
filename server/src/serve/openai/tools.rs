//! Tools in requests, and calls of them in answers.
//!
//! Not here: how calls are found in text ([`super::calls`]), how a template shows tools.

use super::super::app::{App, Served};
use super::super::error::ApiError;
use super::super::guides::Asked;
use super::calls::{Call, Reader};
use super::conversation::Conversation;
use super::forced;
use crate::cli::ToolFormat;
use engine::chat::ChatTemplate;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// Which of the tools may be called; the tools themselves belong to the conversation.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct ToolParams {
    /// `auto` (default), `none`, `required`, or `{"type": "function", "function": {"name": ...}}`.
    tool_choice: Option<Value>,
    /// Whether one answer may hold several calls; default true.
    parallel_tool_calls: Option<bool>,
}

/// A call in an answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ToolCall {
    /// Its place among the answer's calls; in streams alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    /// Nine letters and digits.
    id: String,
    /// `function`.
    r#type: &'static str,
    function: FunctionCall,
}

/// What is to be called.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct FunctionCall {
    name: String,
    /// A JSON object as text.
    arguments: String,
}

/// What `tool_choice` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice<'c> {
    Auto,
    None,
    /// Some call there must be.
    Any,
    /// A call of this function there must be.
    Named(&'c str),
}

/// How calls are read from the answers of a request.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ToolPlan {
    format: Option<ToolFormat>,
    most: usize,
}

impl ToolParams {
    /// What is to be read; tools that must not be called are taken from the conversation. If some
    /// must, the answer's grammar comes along.
    pub(crate) fn plan(
        &self,
        conversation: &mut Conversation,
        served: &Served,
    ) -> Result<(ToolPlan, Option<Asked>), ApiError> {
        let choice = self.choice()?;
        if choice == Choice::None {
            conversation.tools = None;
        }
        let Some(tools) = conversation.offered() else {
            return match choice {
                Choice::None | Choice::Auto => Ok((ToolPlan::default(), None)),
                Choice::Any | Choice::Named(_) => {
                    let message = "tool_choice asks for a call, but there are no tools";
                    Err(ApiError::invalid(message).of("tool_choice"))
                }
            };
        };
        check(tools)?;
        let Some(format) = served.tool_format else {
            let message = "this model's chat template tells no form of tool calls: start the \
                           server with --tool-format, or send no tools";
            return Err(ApiError::invalid(message).of("tools").code("no_tool_format"));
        };
        // A function that is named is called once.
        let once = matches!(choice, Choice::Named(_)) || self.parallel_tool_calls == Some(false);
        let most = if once { 1 } else { usize::MAX };
        let callable = choice.callable(tools)?;
        let source = callable.map(|tools| forced::grammar(format, &tools, !once, served));
        let source = source.transpose()?;
        let asked = source.map(|source| Asked { source, param: "tools" });
        Ok((ToolPlan { format: Some(format), most }, asked))
    }

    fn choice(&self) -> Result<Choice<'_>, ApiError> {
        let choice = self.tool_choice.as_ref().unwrap_or(&Value::Null);
        Ok(match (choice, choice.pointer("/function/name")) {
            (Value::Null, _) => Choice::Auto,
            (Value::String(word), _) if word == "auto" => Choice::Auto,
            (Value::String(word), _) if word == "none" => Choice::None,
            (Value::String(word), _) if word == "required" => Choice::Any,
            (_, Some(Value::String(name))) => Choice::Named(name),
            _ => {
                let message = format!(
                    "tool_choice is {choice}, expected auto, none, required or a function's name"
                );
                return Err(ApiError::invalid(message).of("tool_choice"));
            }
        })
    }
}

impl Choice<'_> {
    /// The tools that one must be called of, with their places; none if none must.
    fn callable<'t>(
        &self,
        tools: &'t [Value],
    ) -> Result<Option<Vec<(usize, &'t Value)>>, ApiError> {
        let all = tools.iter().enumerate();
        let callable: Vec<_> = match self {
            Self::Auto | Self::None => return Ok(None),
            Self::Any => all.collect(),
            Self::Named(name) => all.filter(|(_, t)| t["function"]["name"] == **name).collect(),
        };
        if let (Self::Named(name), []) = (self, &callable[..]) {
            let message = format!("tool_choice names {name:?}, which is none of the tools");
            return Err(ApiError::invalid(message).of("tool_choice"));
        }
        Ok(Some(callable))
    }
}

impl ToolPlan {
    /// A reader for one answer.
    pub(crate) fn reader(&self) -> Reader {
        Reader::new(self.format, self.most)
    }

    /// The tokens that begin a call and divide it, where they are tokens of their own.
    pub(crate) fn marks(&self, served: &Served) -> Vec<kernels::program::TokenId> {
        let Some(format) = self.format else { return vec![] };
        let marks = [format.mark()].into_iter().chain(format.inner_marks().iter().copied());
        marks.filter_map(|mark| served.tokenizer.token_id(mark)).collect()
    }
}

impl ToolCall {
    /// Call number `index` of an answer, in a stream.
    pub(crate) fn new(call: Call, index: usize, app: &App) -> Self {
        let function = FunctionCall { name: call.name, arguments: call.arguments };
        Self { index: Some(index), id: app.call_id(), r#type: "function", function }
    }

    /// The same outside a stream.
    pub(crate) fn whole(self) -> Self {
        Self { index: None, ..self }
    }
}

impl ToolFormat {
    /// The form that `template` teaches.
    pub(crate) fn of(template: &ChatTemplate) -> Option<Self> {
        let source = template.source(true);
        let forms = [
            ("<tool_call>", Self::Hermes),
            ("[TOOL_CALLS]", Self::Mistral),
            ("<|python_tag|>", Self::Llama3),
            ("ipython", Self::Llama3),
        ];
        forms.into_iter().find(|(mark, _)| source.contains(mark)).map(|(_, form)| form)
    }
}

/// Refuses what is no description of a function.
pub(crate) fn check(tools: &[Value]) -> Result<(), ApiError> {
    for (i, tool) in tools.iter().enumerate() {
        if tool["type"] != "function" || !tool["function"]["name"].is_string() {
            let message = "a tool is not of the form {\"type\": \"function\", \"function\": \
                           {\"name\": ...}}";
            return Err(ApiError::invalid(message).of(format!("tools[{i}]")));
        }
    }
    Ok(())
}

/// Makes objects of the arguments of earlier calls, which the API sends as text and templates read
/// as objects.
pub(crate) fn open_arguments(message: &mut Map<String, Value>) {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        let object = arguments.as_str().and_then(|text| serde_json::from_str(text).ok());
        if let Some(object @ Value::Object(_)) = object {
            *arguments = object;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn arguments_of_earlier_calls_become_objects() {
        let mut message = json!({"tool_calls": [
            {"function": {"name": "f", "arguments": "{\"a\": 1}"}},
            {"function": {"name": "g", "arguments": "not json"}},
            {"id": "h"},
        ]});
        open_arguments(message.as_object_mut().unwrap());
        assert_eq!(message["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
        assert_eq!(message["tool_calls"][1]["function"]["arguments"], "not json");
    }

    #[test]
    fn tools_are_functions_with_names() {
        assert!(check(&[json!({"type": "function", "function": {"name": "f"}})]).is_ok());
        for wrong in [json!(1), json!({"type": "retrieval"}), json!({"type": "function"})] {
            let refused = check(&[json!({"type": "function", "function": {"name": "f"}}), wrong]);
            assert_eq!(refused.unwrap_err().param.as_deref(), Some("tools[1]"));
        }
    }
}
