//! Grammars of answers that must call tools.
//!
//! Input: the tools that may be called and the model's form of calls. Output: a grammar whose texts
//! [`super::calls`] reads as calls with arguments that are valid by the tools' schemas. Not here:
//! how a request asks for that ([`super::tools`]).

use super::super::app::Served;
use super::super::error::ApiError;
use crate::cli::ToolFormat;
use engine::grammar::GrammarSource;
use engine::tokenizer::Tokenizer;
use serde_json::{Value, json};

/// The grammar of an answer that calls one of `tools` or, if `several`, some of them one after
/// the other, and says nothing else. A tool comes with its place in the request.
pub(crate) fn grammar(
    format: ToolFormat,
    tools: &[(usize, &Value)],
    several: bool,
    served: &Served,
) -> Result<GrammarSource, ApiError> {
    let word = |text: &str| terminal(text, &served.tokenizer);
    let (mark, names) = (word(format.mark()), (0..tools.len()).map(|i| format!("call_{i}")));
    let between = match format {
        ToolFormat::Hermes => "\n",
        ToolFormat::Llama3 => "; ",
        ToolFormat::Mistral => ", ",
    };
    let calls = if several { format!("call ({} call)*", json!(between)) } else { "call".into() };
    let start = match format {
        ToolFormat::Mistral => format!("{mark} \"[\" {calls} \"]\""),
        ToolFormat::Hermes | ToolFormat::Llama3 => calls,
    };
    let any = names.clone().collect::<Vec<_>>().join(" | ");
    let mut lark = format!("start: {start}\ncall: {any}\n");
    let mut schemas = vec![];
    for (i, (name, (place, tool))) in names.zip(tools).enumerate() {
        let function = &tool["function"];
        let key = if format == ToolFormat::Llama3 { "parameters" } else { "arguments" };
        let head = format!("{{\"name\": {}, \"{key}\": ", function["name"]);
        let call = match format {
            ToolFormat::Hermes => {
                let (head, close) = (json!(format!("\n{head}")), word("</tool_call>"));
                format!("{mark} {head} @s{i} {} {close}", json!("}\n"))
            }
            ToolFormat::Llama3 | ToolFormat::Mistral => format!("{} @s{i} \"}}\"", json!(head)),
        };
        lark += &format!("{name}: {call}\n");
        schemas.push(parameters(&function["parameters"], *place)?);
    }
    Ok(GrammarSource::Mixed { lark, schemas })
}

/// A text in Lark: by its bytes, or as the token that it is if that one has none.
fn terminal(text: &str, tokenizer: &Tokenizer) -> String {
    let id = tokenizer.token_id(text);
    let special = id.filter(|&id| tokenizer.decode(&[id], true).is_ok_and(|text| text.is_empty()));
    special.map_or_else(|| json!(text).to_string(), |id| format!("<[{}]>", id.0))
}

/// The schema of a function's arguments, which are an object whatever else it says.
fn parameters(schema: &Value, place: usize) -> Result<Value, ApiError> {
    let param = || format!("tools[{place}].function.parameters");
    let mut schema = match schema {
        Value::Null | Value::Bool(true) => return Ok(json!({"type": "object"})),
        Value::Object(schema) => schema.clone(),
        _ => return Err(ApiError::invalid("parameters is no JSON schema").of(param())),
    };
    let takes = match schema.get("type") {
        None => true,
        Some(Value::Array(types)) => types.iter().any(|one| one == "object"),
        Some(one) => one == "object",
    };
    if !takes {
        let message = "parameters allows no object, and arguments are one";
        return Err(ApiError::invalid(message).of(param()));
    }
    schema.insert("type".into(), json!("object"));
    Ok(Value::Object(schema))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_objects() {
        let object = json!({"type": "object"});
        for schema in [json!(null), json!(true), json!({}), json!({"type": ["null", "object"]})] {
            assert_eq!(parameters(&schema, 0).unwrap(), object, "{schema}");
        }
        let more = json!({"properties": {"a": {}}, "type": "object"});
        assert_eq!(parameters(&more, 0).unwrap(), more);
        for schema in [json!(1), json!(false), json!({"type": "string"}), json!({"type": []})] {
            let refused = parameters(&schema, 3).unwrap_err();
            assert_eq!(refused.param.as_deref(), Some("tools[3].function.parameters"), "{schema}");
        }
    }
}
