//! What an answer must look like: the parameters that ask for JSON, a schema, an expression, one of
//! several texts or a grammar.
//!
//! Input: fields of a request, by the names of the OpenAI API, of vLLM (`guided_*`,
//! `structured_outputs`) and of llama.cpp (`json_schema`). Output: one grammar, or none. Not here:
//! what is done with it ([`super::super::guides`]), calls that are forced ([`super::forced`]).

use super::super::error::ApiError;
use super::super::guides::Asked;
use engine::grammar::GrammarSource;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

/// What an answer must look like: at most one of these says something. Null says nothing.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(crate) struct FormatParams {
    /// `{"type": "text"}` (default), `{"type": "json_object"}`, or `{"type": "json_schema",
    /// "json_schema": {"name": ..., "schema": {...}}}`, which is strict in any case.
    response_format: Option<Value>,
    /// What to choose from, in vLLM's newer form.
    structured_outputs: Option<StructuredOutputs>,
    /// A JSON schema, as an object or as its text.
    guided_json: Option<Value>,
    /// A JSON schema, by llama.cpp's name.
    json_schema: Option<Value>,
    /// A regular expression that the whole answer matches.
    guided_regex: Option<String>,
    /// Texts of which the answer is one.
    guided_choice: Option<Vec<String>>,
    /// A context-free grammar in the Lark form of llguidance, from its rule `start`.
    guided_grammar: Option<String>,
}

/// What an answer must look like; exactly one of these.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(crate) struct StructuredOutputs {
    /// A JSON schema, as an object or as its text.
    json: Option<Value>,
    /// Whether the answer is any JSON object.
    json_object: Option<bool>,
    /// A regular expression that the whole answer matches.
    regex: Option<String>,
    /// Texts of which the answer is one.
    choice: Option<Vec<String>>,
    /// A context-free grammar in the Lark form of llguidance, from its rule `start`.
    grammar: Option<String>,
}

impl FormatParams {
    /// The one grammar that is asked for.
    pub(crate) fn asked(self) -> Result<Option<Asked>, ApiError> {
        let all = [
            (
                "response_format",
                self.response_format.as_ref().map(response_format).transpose()?.flatten(),
            ),
            ("structured_outputs", self.structured_outputs.map(structured).transpose()?),
            ("guided_json", schema(self.guided_json, "guided_json")?),
            ("json_schema", schema(self.json_schema, "json_schema")?),
            ("guided_regex", self.guided_regex.map(GrammarSource::Regex)),
            ("guided_choice", self.guided_choice.map(GrammarSource::Choice)),
            ("guided_grammar", grammar(self.guided_grammar, "guided_grammar")?),
        ];
        let asked = all.into_iter().filter_map(|(param, source)| {
            let source = source?;
            Some(Asked { source, param })
        });
        only(asked.collect())
    }
}

/// At most one may say what an answer looks like.
pub(crate) fn only(mut asked: Vec<Asked>) -> Result<Option<Asked>, ApiError> {
    if let [first, second, ..] = &asked[..] {
        let (first, second) = (first.param, second.param);
        let message =
            format!("{first} and {second} both say what the answer looks like: give one of them");
        return Err(ApiError::invalid(message).of(second));
    }
    Ok(asked.pop())
}

fn response_format(format: &Value) -> Result<Option<GrammarSource>, ApiError> {
    let refuse = |message: String| Err(ApiError::invalid(message).of("response_format"));
    match format["type"].as_str() {
        _ if format.is_null() => Ok(None),
        Some("text") => Ok(None),
        // A schema beside it is llama.cpp's form.
        Some("json_object") => {
            let schema = schema(format.get("schema").cloned(), "response_format")?;
            Ok(Some(schema.unwrap_or(GrammarSource::JsonObject)))
        }
        Some("json_schema") => {
            let inner = format.pointer("/json_schema/schema").filter(|schema| !schema.is_null());
            match inner {
                Some(inner) => Ok(Some(GrammarSource::JsonSchema(inner.clone()))),
                None => {
                    refuse("response_format of type json_schema lacks json_schema.schema".into())
                }
            }
        }
        _ => {
            let kind = &format["type"];
            refuse(format!(
                "response_format has type {kind}, expected text, json_object or json_schema"
            ))
        }
    }
}

fn structured(outputs: StructuredOutputs) -> Result<GrammarSource, ApiError> {
    const NAME: &str = "structured_outputs";
    let object = outputs.json_object == Some(true);
    let all = [
        schema(outputs.json, NAME)?,
        object.then_some(GrammarSource::JsonObject),
        outputs.regex.map(GrammarSource::Regex),
        outputs.choice.map(GrammarSource::Choice),
        grammar(outputs.grammar, NAME)?,
    ];
    let mut all = all.into_iter().flatten();
    match (all.next(), all.next()) {
        (Some(source), None) => Ok(source),
        _ => {
            let message = "structured_outputs: give exactly one of json, json_object, regex, \
                           choice and grammar";
            Err(ApiError::invalid(message).of(NAME))
        }
    }
}

/// A schema, which may be the text of one.
fn schema(schema: Option<Value>, param: &str) -> Result<Option<GrammarSource>, ApiError> {
    let schema = match schema {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(&text).map_err(|e| {
            ApiError::invalid(format!("{param} is a text that is not JSON: {e}")).of(param)
        })?,
        Some(schema) => schema,
    };
    Ok(Some(GrammarSource::JsonSchema(schema)))
}

fn grammar(grammar: Option<String>, param: &str) -> Result<Option<GrammarSource>, ApiError> {
    match grammar {
        Some(text) if text.contains("::=") => {
            let message = format!("{param} is in the form of GBNF: write it in that of Lark");
            Err(ApiError::invalid(message).of(param))
        }
        other => Ok(other.map(GrammarSource::Lark)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn asked(body: Value) -> Result<Option<Asked>, ApiError> {
        serde_json::from_value::<FormatParams>(body).unwrap().asked()
    }

    #[test]
    fn every_parameter_asks_for_its_grammar() {
        use GrammarSource::{Choice, JsonObject, JsonSchema, Lark, Regex};
        let inner = json!({"type": "integer"});
        let named = json!({"name": "n", "strict": true, "schema": inner});
        let schema = JsonSchema(inner.clone());
        let texts = vec!["a".to_owned(), "b".to_owned()];
        let lark = "start: \"a\"";
        let cases = [
            ("response_format", json!({"type": "json_object"}), JsonObject),
            ("response_format", json!({"type": "json_object", "schema": inner}), schema.clone()),
            (
                "response_format",
                json!({"type": "json_schema", "json_schema": named}),
                schema.clone(),
            ),
            ("guided_json", inner.clone(), schema.clone()),
            ("guided_json", json!(inner.to_string()), schema.clone()),
            ("json_schema", inner.clone(), schema.clone()),
            ("guided_regex", json!("a+"), Regex("a+".into())),
            ("guided_choice", json!(texts), Choice(texts.clone())),
            ("guided_grammar", json!(lark), Lark(lark.into())),
            ("structured_outputs", json!({"json": inner, "regex": null}), schema),
            ("structured_outputs", json!({"json_object": true}), JsonObject),
            ("structured_outputs", json!({"regex": "a+"}), Regex("a+".into())),
            ("structured_outputs", json!({"choice": texts}), Choice(texts.clone())),
            ("structured_outputs", json!({"grammar": lark}), Lark(lark.into())),
        ];
        for (param, value, source) in cases {
            let found = asked(json!({param: value})).unwrap();
            assert_eq!(found, Some(Asked { source, param }), "{value}");
        }
    }

    #[test]
    fn what_says_nothing_asks_for_nothing() {
        let text = json!({"response_format": {"type": "text"}, "guided_json": null});
        for body in [json!({}), text, json!({"response_format": null, "guided_choice": null})] {
            assert_eq!(asked(body).unwrap(), None);
        }
    }

    #[test]
    fn contradictions_and_gaps_are_refused() {
        let format = |inner: Value| json!({"response_format": inner});
        let cases = [
            (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice", "guided_regex"),
            (format(json!({"type": "xml"})), "response_format", "\"xml\""),
            (format(json!("json")), "response_format", "null"),
            (format(json!({"type": "json_schema"})), "response_format", "lacks"),
            (format(json!({"type": "json_schema", "json_schema": {}})), "response_format", "lacks"),
            (json!({"structured_outputs": {}}), "structured_outputs", "exactly one"),
            (
                json!({"structured_outputs": {"regex": "a", "json": {}}}),
                "structured_outputs",
                "exactly one",
            ),
            (json!({"guided_json": "{"}), "guided_json", "not JSON"),
            (json!({"guided_grammar": "root ::= \"a\""}), "guided_grammar", "Lark"),
        ];
        for (body, param, part) in cases {
            let refused = asked(body.clone()).unwrap_err();
            assert_eq!(refused.param.as_deref(), Some(param), "{body}");
            assert!(refused.message.contains(part), "{body}: {}", refused.message);
        }
    }
}
