//! The filter `tojson` as transformers defines it: Python's `json.dumps` without ASCII escapes.
//!
//! Not here: reading JSON. What Python cannot serialize (an undefined variable) is an error.

use super::python::{float, float_text, wrong};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, Value};

/// Deepest nesting; a limit, since each level takes stack.
const DEPTH_MAX: usize = 200;

/// `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
#[allow(clippy::needless_pass_by_value, reason = "the engine passes keyword arguments so")]
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let ensure_ascii = ensure_ascii.or(named.get("ensure_ascii")?).is_some_and(|e| e.is_true());
    let indent = indent.or(named.get("indent")?).filter(|indent| !indent.is_none());
    let separators: Option<Value> = named.get("separators")?;
    let sort_keys = named.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    named.assert_all_used()?;
    let indent = indent.map(|indent| indent_text(&indent)).transpose()?;
    let (item, key) = match separators.filter(|s| !s.is_none()) {
        Some(pair) => (separator(&pair, 0)?, separator(&pair, 1)?),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let mut writer = Writer { out: String::new(), indent, item, key, ensure_ascii, sort_keys };
    writer.value(value, 0)?;
    Ok(Value::from(writer.out))
}

fn indent_text(indent: &Value) -> Result<String, Error> {
    if let Some(text) = indent.as_str() {
        return Ok(text.into());
    }
    let width = i64::try_from(indent.clone())?;
    if width > 64 {
        return Err(wrong(format!("tojson: an indent of {width} is more than 64")));
    }
    Ok(" ".repeat(usize::try_from(width).unwrap_or(0)))
}

fn separator(pair: &Value, at: usize) -> Result<String, Error> {
    let text = pair.get_item(&Value::from(at))?;
    let text = text.as_str().ok_or_else(|| wrong("tojson: separators must be two texts"))?;
    Ok(text.into())
}

struct Writer {
    out: String,
    indent: Option<String>,
    item: String,
    key: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            _ => self.out += &scalar(value)?,
        }
        Ok(())
    }

    fn list(&mut self, list: &Value, depth: usize) -> Result<(), Error> {
        let items: Vec<Value> = list.try_iter()?.collect();
        self.container(['[', ']'], depth, &items, |this, item| this.value(item, depth + 1))
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = map.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        self.container(['{', '}'], depth, &keys, |this, key| {
            match key.as_str() {
                Some(text) => this.string(text),
                None => this.string(&scalar(key)?),
            }
            this.out += &this.key.clone();
            this.value(&map.get_item(key)?, depth + 1)
        })
    }

    fn container(
        &mut self,
        brackets: [char; 2],
        depth: usize,
        items: &[Value],
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if depth == DEPTH_MAX {
            return Err(wrong(format!("tojson: nested deeper than {DEPTH_MAX}")));
        }
        self.out.push(brackets[0]);
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                self.out += &self.item.clone();
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push(brackets[1]);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out += &indent.repeat(depth);
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => self.out += "\\\"",
                '\\' => self.out += "\\\\",
                '\n' => self.out += "\\n",
                '\r' => self.out += "\\r",
                '\t' => self.out += "\\t",
                '\u{8}' => self.out += "\\b",
                '\u{c}' => self.out += "\\f",
                '\0'..='\u{1f}' => self.escape(letter),
                '\u{7f}'.. if self.ensure_ascii => self.escape(letter),
                _ => self.out.push(letter),
            }
        }
        self.out.push('"');
    }

    fn escape(&mut self, letter: char) {
        for unit in letter.encode_utf16(&mut [0; 2]) {
            self.out += &format!("\\u{unit:04x}");
        }
    }
}

/// A value that is neither text nor a container.
fn scalar(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if value.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => Ok(match float(value) {
            Some(number) if number.is_nan() => "NaN".into(),
            Some(number) if number == f64::INFINITY => "Infinity".into(),
            Some(number) if number == f64::NEG_INFINITY => "-Infinity".into(),
            Some(number) => float_text(number),
            None => value.to_string(),
        }),
        other => Err(wrong(format!("tojson: a value of type {other} is not JSON"))),
    }
}
