//! Where Jinja templates expect Python: values, methods, filters and functions that `minijinja`
//! lacks or does in its own way.
//!
//! Known to differ: the operator `%` on strings (the filter `format` does the same), `varargs` and
//! `kwargs` in macros, and filters for web pages, which are missing. Each is an error, not other
//! text.

use super::{json, strftime};
use minijinja::value::{Enumerator, Kwargs, Object, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use std::collections::HashMap;
use std::sync::Arc;

/// What `raise_exception` was called with; travels as the source of the error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Adds everything to an environment.
pub(super) fn install(env: &mut Environment<'static>) {
    env.set_formatter(print);
    env.set_unknown_method_callback(method);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_function("joiner", minijinja_contrib::globals::joiner);
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    env.add_filter("length", length);
    env.add_filter("count", length);
    // For debugging only, and its output grows with the square of the nesting.
    env.remove_filter("pprint");
    env.add_filter("tojson", json::tojson);
    env.add_filter("truncate", truncate);
    env.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    env.add_filter("center", |text: &str, width: Option<usize>| {
        pad(text, width.unwrap_or(80), ' ', Side::Both)
    });
}

/// `{% generation %}` marks what to train on; it renders its content in a scope of its own.
pub(super) fn prepare(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let name = tag.trim_start_matches(['-', '+']).trim_start();
        for (from, to) in [("generation", "with"), ("endgeneration", "endwith")] {
            let end = name.strip_prefix(from).map(str::trim_start);
            if end.is_some_and(|end| end.trim_start_matches(['-', '+']).starts_with("%}")) {
                out.push_str(&tag[..tag.len() - name.len()]);
                out.push_str(to);
                rest = &name[from.len()..];
            }
        }
    }
    out + rest
}

/// A JSON value as the template sees it. Objects keep the order of their keys.
pub(super) fn value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Object(map) => dict(map.iter().map(|(k, v)| (k.as_str(), value(v)))),
        serde_json::Value::Array(list) => list.iter().map(value).collect(),
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(set) => Value::from(*set),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64()),
        },
    }
}

/// A dict of these entries; of equal keys the last wins, at the place of the first.
pub(super) fn dict<'a>(entries: impl Iterator<Item = (&'a str, Value)>) -> Value {
    let mut dict = Dict { keys: Vec::new(), values: HashMap::new() };
    for (key, value) in entries {
        if dict.values.insert(key.to_owned(), value).is_none() {
            dict.keys.push(key.into());
        }
    }
    Value::from_object(dict)
}

/// A dict whose methods are found before its keys, as in Python: `properties.items()` lists the
/// properties even where one of them is called `items`.
#[derive(Debug)]
struct Dict {
    keys: Vec<Value>,
    values: HashMap<String, Value>,
}

impl Object for Dict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.values.get(key.as_str()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.keys.clone())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.keys.len())
    }

    fn call_method(
        self: &Arc<Self>,
        state: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        unknown_method_callback(state, &Value::from_dyn_object(self.clone()), method, args)
    }
}

/// Prints floats as Python does; all else is the same already.
fn print(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match float(value) {
        Some(number) => Ok(out.write_str(&float_text(number))?),
        None => minijinja::escape_formatter(out, state, value),
    }
}

/// The value if it is a float (not an integer).
pub(super) fn float(value: &Value) -> Option<f64> {
    let float = value.kind() == ValueKind::Number && !value.is_integer();
    float.then(|| f64::try_from(value.clone()).ok()).flatten()
}

/// Python's `repr` of a float: the shortest digits that read back as the same number.
pub(super) fn float_text(number: f64) -> String {
    let size = number.abs();
    if !number.is_finite() || size == 0.0 || (1e-4..1e16).contains(&size) {
        return format!("{number:?}").to_lowercase();
    }
    let text = format!("{number:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
    format!("{digits}e{sign}{exponent:0>2}")
}

fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Raised(message)))
}

fn strftime_now(state: &State<'_, '_>, format: &str) -> Result<String, Error> {
    let now = state.lookup("now").and_then(|now| i64::try_from(now).ok());
    let now =
        now.ok_or_else(|| wrong("strftime_now needs the time: pass now, seconds since 1970"))?;
    strftime::format(now, format).map_err(wrong)
}

/// An error that says only `reason`.
pub(super) fn wrong(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Undefined is empty, as in Jinja: `message.tool_calls | length`.
fn length(value: &Value) -> Result<usize, Error> {
    let none = || wrong(format!("a value of type {} has no length", value.kind()));
    if value.is_undefined() { Ok(0) } else { value.len().ok_or_else(none) }
}

/// Jinja's filter `truncate(length=255, killwords=false, end='...', leeway=5)`: cuts at a word
/// unless `killwords`; an overlength of `leeway` is kept.
#[allow(clippy::needless_pass_by_value, reason = "the engine passes keyword arguments so")]
fn truncate(
    text: &str,
    length: Option<usize>,
    killwords: Option<bool>,
    end: Option<String>,
    named: Kwargs,
) -> Result<String, Error> {
    let length = length.or(named.get("length")?).unwrap_or(255);
    let killwords = killwords.or(named.get("killwords")?).unwrap_or(false);
    let end = end.or(named.get("end")?).unwrap_or_else(|| "...".into());
    let leeway = named.get::<Option<usize>>("leeway")?.unwrap_or(5);
    named.assert_all_used()?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let room = length
        .checked_sub(end.chars().count())
        .ok_or_else(|| wrong(format!("truncate: length {length} is shorter than {end:?}")))?;
    let cut: String = text.chars().take(room).collect();
    let kept = if killwords { &cut } else { cut.rsplit_once(' ').map_or(&*cut, |(head, _)| head) };
    Ok(format!("{kept}{end}"))
}

/// Methods of strings that the compatibility layer lacks, then that layer.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let found = match value.as_str() {
        Some(text) => string_method(text, name, args)?,
        None => None,
    };
    found.map_or_else(|| unknown_method_callback(state, value, name, args), Ok)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let found = match name {
        "rsplit" => rsplit(text, args)?,
        "partition" | "rpartition" => partition(text, name == "partition", args)?,
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let at = if name == "index" { text.find(part) } else { text.rfind(part) };
            let at = at.ok_or_else(|| wrong("substring not found"))?;
            text[..at].chars().count().into()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let digits = pad(digits, width.saturating_sub(sign.len()), '0', Side::Left)?;
            format!("{sign}{digits}").into()
        }
        "ljust" | "rjust" | "center" => justify(text, name, args)?,
        "title" => title(text).into(),
        "casefold" => text.to_lowercase().into(),
        "swapcase" => swapcase(text).into(),
        _ => return Ok(None),
    };
    Ok(Some(found))
}

/// `rsplit(sep=None, maxsplit=-1)`.
fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
    if separator == Some("") {
        return Err(wrong("empty separator"));
    }
    let limit = limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = if separator.is_none() { text.trim_end() } else { text };
    while parts.len() < limit {
        let cut = match separator {
            Some(separator) => rest.rsplit_once(separator),
            None => rest.rsplit_once(char::is_whitespace).map(|(l, r)| (l.trim_end(), r)),
        };
        let Some((left, right)) = cut else { break };
        parts.push(Value::from(right));
        rest = left;
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(Value::from(rest));
    }
    parts.reverse();
    Ok(Value::from(parts))
}

fn partition(text: &str, first: bool, args: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(wrong("empty separator"));
    }
    let cut = if first { text.split_once(separator) } else { text.rsplit_once(separator) };
    let parts = match cut {
        Some((left, right)) => [left, separator, right],
        None if first => [text, "", ""],
        None => ["", "", text],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

fn justify(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (usize, Option<char>) = from_args(args)?;
    let side = match name {
        "ljust" => Side::Right,
        "rjust" => Side::Left,
        _ => Side::Both,
    };
    Ok(pad(text, width, fill.unwrap_or(' '), side)?.into())
}

/// Where padding goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
    Both,
}

/// Widest padded text; a limit, since the width comes from the template.
const WIDTH_MAX: usize = 100_000;

fn pad(text: &str, width: usize, fill: char, side: Side) -> Result<String, Error> {
    if width > WIDTH_MAX {
        return Err(wrong(format!("a width of {width} is more than {WIDTH_MAX}")));
    }
    let missing = width.saturating_sub(text.chars().count());
    // Python's centring: of an odd number, the extra one goes left if the width is odd.
    let left = match side {
        Side::Left => missing,
        Side::Right => 0,
        Side::Both => missing / 2 + (missing & width & 1),
    };
    let fill = |n| std::iter::repeat_n(fill, n);
    Ok(fill(left).chain(text.chars()).chain(fill(missing - left)).collect())
}

/// Upper case after anything that is no letter, else lower case.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        if inside {
            out.extend(letter.to_lowercase());
        } else {
            out.extend(letter.to_uppercase());
        }
        inside = letter.is_alphabetic();
    }
    out
}

fn swapcase(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_lowercase() {
            out.extend(letter.to_uppercase());
        } else {
            out.extend(letter.to_lowercase());
        }
    }
    out
}
