//! What the parser would read otherwise in a JSON schema than the standard says, put right.
//!
//! Input: a client's schema. Output: one whose texts are all valid by the client's, or a reason.
//! Most of what it does not support the parser refuses by itself; here is what it would get wrong,
//! found with the JSON Schema test suite (`tests/it/schemas.rs`). Not here: grammars ([`super`]),
//! formats and expressions within a schema ([`super::patterns`]).

use super::patterns;
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// Keywords whose value is a schema.
const ONE: [&str; 12] = [
    "additionalItems",
    "additionalProperties",
    "contains",
    "contentSchema",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
];
/// Keywords whose value is, or may be, a list of schemas.
const SEVERAL: [&str; 5] = ["allOf", "anyOf", "items", "oneOf", "prefixItems"];
/// Keywords whose value holds schemas by names.
const NAMED: [&str; 6] =
    ["$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"];
/// Keywords that compare numbers.
const NUMBERS: [&str; 7] =
    ["const", "enum", "exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"];
/// Integers beyond it are not all numbers of the parser, which has f64.
const INTEGER_MAX: u64 = 1 << 53;

/// Alternatives that are written out instead of referred to: a schema must not grow without bound.
const OPENED_MAX: usize = 100;

/// A schema of which the parser takes valid instances alone.
///
/// # Errors
/// What cannot be put right, by its keyword.
pub(super) fn sound(schema: &Value) -> Result<Map<String, Value>, String> {
    let mut schema = match schema {
        Value::Bool(true) => return Ok(Map::new()),
        Value::Object(_) => schema.clone(),
        _ => return Err("the schema is no object, and not true".into()),
    };
    let draft = schema["$schema"].as_str().unwrap_or_default();
    if ["draft-00", "draft-01", "draft-02", "draft-03"].iter().any(|old| draft.contains(old)) {
        return Err(format!("$schema {draft:?} is not supported: the oldest that is, is draft 4"));
    }
    let mut walk = Walk { whole: schema.clone(), ..Walk::default() };
    walk.visit(&mut schema, "#")?;
    if let Some(reference) = walk.astray() {
        return Err(format!(
            "$ref {reference:?} is not supported: it does not lead to a schema within this one"
        ));
    }
    match schema {
        Value::Object(keys) => Ok(keys),
        _ => Ok(Map::new()),
    }
}

/// Goes through all schemas within one.
#[derive(Debug, Default)]
struct Walk {
    /// Where they are, as pointers.
    places: HashSet<String>,
    references: Vec<String>,
    /// The schema as it came.
    whole: Value,
    /// References that were opened on the way to where it is, and how many were so far.
    open: Vec<String>,
    opened: usize,
}

impl Walk {
    fn visit(&mut self, schema: &mut Value, place: &str) -> Result<(), String> {
        self.places.insert(place.to_owned());
        let Value::Object(keys) = schema else { return Ok(()) };
        // To the parser the whole is of one draft, and a reference starts at its root.
        let is_text = |key: &str| keys.get(key).is_some_and(Value::is_string);
        let found = ["$id", "$schema", "id"].into_iter().find(|key| is_text(key));
        if let Some(key) = found.filter(|_| place != "#") {
            return Err(format!("{key} within a schema is not supported"));
        }
        if let Some(Value::String(reference)) = keys.get("$ref") {
            let whole = reference == "#" || reference == "#/";
            self.references.push(if whole { "#".into() } else { reference.clone() });
        }
        repair(keys)?;
        for (key, value) in keys.iter_mut() {
            let (key, place) = (key.as_str(), format!("{place}/{key}"));
            match value {
                Value::Object(named) if NAMED.contains(&key) => {
                    for (name, inner) in named.iter_mut() {
                        self.visit(inner, &format!("{place}/{}", escaped(name)))?;
                    }
                }
                Value::Array(several) if SEVERAL.contains(&key) => {
                    for (i, inner) in several.iter_mut().enumerate() {
                        let opened = key == "oneOf" && self.open(inner);
                        self.visit(inner, &format!("{place}/{i}"))?;
                        self.open.truncate(self.open.len() - usize::from(opened));
                    }
                }
                one if ONE.contains(&key) => self.visit(one, &place)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts what an alternative refers to in its place: the parser does not look behind references
    /// when it asks whether alternatives may overlap.
    fn open(&mut self, alternative: &mut Value) -> bool {
        let Value::Object(keys) = &*alternative else { return false };
        let (Some(Value::String(reference)), 1) = (keys.get("$ref"), keys.len()) else {
            return false;
        };
        let target = reference.strip_prefix("#/").and_then(|_| self.whole.pointer(&reference[1..]));
        let Some(target) = target else { return false };
        // What refers to itself stays a reference there.
        if self.open.contains(reference) || self.opened == OPENED_MAX {
            return false;
        }
        self.opened += 1;
        self.open.push(reference.clone());
        *alternative = target.clone();
        true
    }

    /// Where a reference that leads to none of the places leads, if there is one. The parser
    /// decodes nothing, so names that have to be encoded cannot be referred to.
    fn astray(&self) -> Option<&String> {
        let leads = |r: &&String| self.places.contains(*r) && !r.contains(['~', '%']);
        self.references.iter().find(|reference| !leads(reference))
    }
}

/// A name as a pointer has it.
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// Puts the keywords of one schema right.
fn repair(keys: &mut Map<String, Value>) -> Result<(), String> {
    if keys.get("uniqueItems") == Some(&Value::Bool(false)) {
        keys.shift_remove("uniqueItems");
    }
    for key in NUMBERS {
        check(key, keys.get(key).unwrap_or(&Value::Null))?;
    }
    // Texts may repeat a key, which counts once.
    let required = keys.get("required").and_then(Value::as_array).map_or(0, Vec::len);
    if keys.get("minProperties").and_then(Value::as_u64) > Some(required as u64 + 1) {
        return Err("minProperties is not supported beyond one more than required".into());
    }
    if let Some(Value::String(pattern)) = keys.get_mut("pattern") {
        *pattern = patterns::expression(pattern)?;
    }
    if let Some(Value::Object(named)) = keys.get_mut("patternProperties") {
        for (pattern, schema) in std::mem::take(named) {
            named.insert(patterns::expression(&pattern)?, schema);
        }
    }
    let format = keys.get("format").and_then(Value::as_str).and_then(patterns::of_format);
    if let Some(pattern) = format {
        keys.shift_remove("format");
        // The parser says what is wrong with one that is no list.
        if let Value::Array(all) = keys.entry("allOf").or_insert_with(|| json!([])) {
            all.push(json!({"pattern": pattern}));
        }
    }
    Ok(())
}

/// Refuses values that the parser would take for others.
fn check(key: &str, value: &Value) -> Result<(), String> {
    let size = |n: &serde_json::Number| n.as_i64().map_or(n.as_u64(), |n| Some(n.unsigned_abs()));
    match value {
        Value::Number(n) if size(n) > Some(INTEGER_MAX) => {
            Err(format!("{key} of {n} is not supported: an integer of more than 53 bits"))
        }
        Value::String(text) if text.contains('\0') => {
            Err(format!("{key} of {value} is not supported: a text with a zero byte"))
        }
        Value::Array(values) => values.iter().try_for_each(|value| check(key, value)),
        Value::Object(values) => values.values().try_for_each(|value| check(key, value)),
        _ => Ok(()),
    }
}
