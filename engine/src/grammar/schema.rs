//! What of a JSON schema the parser takes at its word, and what it must not be given.
//!
//! Input: a client's schema. Output: one whose every text is valid by the client's, or a reason.
//! The parser refuses most of what it does not support; here is what it would get wrong. Found by
//! the JSON Schema test suite (`tests/it/schemas.rs`). Not here: grammars ([`super`]).

use serde_json::{Map, Value};

/// A schema of which the parser accepts valid instances alone.
pub(super) fn sound(schema: &Value) -> Result<Map<String, Value>, String> {
    match schema {
        Value::Bool(true) => Ok(Map::new()),
        Value::Object(schema) => Ok(schema.clone()),
        _ => Err("the schema is no object, and not true".into()),
    }
}
