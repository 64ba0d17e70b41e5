//! Finds tool calls in an answer's text while it comes.
//!
//! Input: final text, piece by piece. Output: text without calls, and calls as soon as each is
//! complete. Forms: Hermes (also Qwen) `<tool_call>{json}</tool_call>`; Llama 3 `{json}` as the whole
//! answer, `;` between several, perhaps behind `<|python_tag|>`; Mistral `[TOOL_CALLS][{json}, ...]`, and
//! its newer `[TOOL_CALLS]name[ARGS]{json}`, one after the other.
//! What only looks like a call stays text. Not here: requests and answers ([`super::tools`]).

use crate::cli::ToolFormat;
use serde_json::Value;

impl ToolFormat {
    /// What begins a call.
    pub(crate) fn mark(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Llama3 => "<|python_tag|>",
            Self::Mistral => "[TOOL_CALLS]",
        }
    }

    /// What stands within a call and may be a token of its own.
    pub(crate) fn inner_marks(self) -> &'static [&'static str] {
        match self {
            Self::Hermes | Self::Llama3 => &[],
            Self::Mistral => &["[CALL_ID]", "[ARGS]"],
        }
    }

    /// What may stand behind a call.
    fn close(self) -> &'static str {
        match self {
            Self::Hermes => "</tool_call>",
            Self::Llama3 => ";",
            Self::Mistral => "",
        }
    }
}

/// A function and what it is to be called with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub name: String,
    /// A JSON object.
    pub arguments: String,
}

/// What a piece of text brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub text: String,
    pub calls: Vec<Call>,
}

/// Reads one answer.
#[derive(Debug)]
pub(crate) struct Reader {
    /// None reads everything as text.
    format: Option<ToolFormat>,
    /// Calls that may still be given out.
    room: usize,
    state: State,
    /// Text that may yet turn out to belong to a call.
    held: String,
    /// How much of it was seen to be no complete call.
    tried: usize,
    /// Whether there was a call.
    called: bool,
}

#[derive(Debug)]
enum State {
    /// At the answer's beginning or behind a call.
    Fresh,
    Text,
    /// Behind this mark (and the white space before it).
    Call(String),
    Closing,
}

/// What text begins with.
enum Parsed {
    /// Calls, and the bytes they take.
    Calls(Vec<Call>, usize),
    /// Perhaps calls, when more has come.
    Incomplete,
    Other,
}

impl Reader {
    /// Looks for at most `most` calls of a form; without a form there are none.
    pub(crate) fn new(format: Option<ToolFormat>, most: usize) -> Self {
        let (state, held) = (State::Fresh, String::new());
        Self { format, room: most, state, held, tried: 0, called: false }
    }

    /// Takes the next text; `ended` says that no more will come.
    pub(crate) fn read(&mut self, text: &str, ended: bool) -> Found {
        let mut found = Found::default();
        let Some(format) = self.format else {
            found.text.push_str(text);
            return found;
        };
        self.held.push_str(text);
        while self.step(format, ended, &mut found) {}
        found.calls.truncate(self.room);
        self.room -= found.calls.len();
        found
    }

    /// Goes on by one state; false if that needs more text.
    fn step(&mut self, format: ToolFormat, ended: bool, found: &mut Found) -> bool {
        match &self.state {
            State::Fresh => self.begin(format, ended, found),
            State::Text => self.text(format, ended, found),
            State::Call(_) => self.call(format, ended, found),
            State::Closing => self.close(format, ended),
        }
    }

    fn begin(&mut self, format: ToolFormat, ended: bool, found: &mut Found) -> bool {
        let rest = self.held.trim_start();
        if rest.is_empty() {
            if ended && !self.called {
                found.text.push_str(&self.held);
            }
            if ended {
                self.held.clear();
            }
            return false;
        }
        if format == ToolFormat::Llama3 && rest.starts_with('{') {
            self.enter(State::Call(String::new()));
            return true;
        }
        self.enter(State::Text);
        true
    }

    fn text(&mut self, format: ToolFormat, ended: bool, found: &mut Found) -> bool {
        let mark = format.mark();
        let Some(at) = self.held.find(mark) else {
            let keep = if ended { 0 } else { undecided(&self.held, mark) };
            let rest = self.held.split_off(self.held.len() - keep);
            found.text.push_str(&std::mem::replace(&mut self.held, rest));
            return false;
        };
        let rest = self.held.split_off(at + mark.len());
        let before = std::mem::replace(&mut self.held, rest);
        let said = before[..at].trim_end().len();
        found.text.push_str(&before[..said]);
        self.enter(State::Call(before[said..].to_owned()));
        true
    }

    fn call(&mut self, format: ToolFormat, ended: bool, found: &mut Found) -> bool {
        // JSON that a bracket does not end is incomplete: most pieces need no parsing.
        let begun = self.tried > 0 && self.held.contains('{');
        if begun && !ended && !self.held[self.tried..].contains(['}', ']']) {
            self.tried = self.held.len();
            return false;
        }
        match parse(format, &self.held) {
            Parsed::Incomplete if !ended => {
                self.tried = self.held.len();
                false
            }
            Parsed::Calls(calls, len) => {
                found.calls.extend(calls);
                self.called = true;
                self.held.drain(..len);
                self.enter(State::Closing);
                true
            }
            Parsed::Incomplete | Parsed::Other => {
                if let State::Call(mark) = &self.state {
                    found.text.push_str(mark);
                }
                self.enter(State::Text);
                true
            }
        }
    }

    fn close(&mut self, format: ToolFormat, ended: bool) -> bool {
        let (rest, close) = (self.held.trim_start(), format.close());
        if !close.is_empty() && !ended && rest.len() < close.len() && close.starts_with(rest) {
            return false;
        }
        if let Some(rest) = rest.strip_prefix(close) {
            self.held = rest.to_owned();
        }
        self.enter(State::Fresh);
        true
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.tried = 0;
    }
}

/// Bytes at the end of `text` that may begin `mark`, with the white space before them.
fn undecided(text: &str, mark: &str) -> usize {
    let starts = (1..mark.len()).rev().filter(|&len| mark.is_char_boundary(len));
    let begun = starts.map(|len| &mark[..len]).find(|start| text.ends_with(start));
    let said = text[..text.len() - begun.map_or(0, str::len)].trim_end();
    text.len() - said.len()
}

fn parse(format: ToolFormat, held: &str) -> Parsed {
    let text = held.trim_start();
    match text.chars().next() {
        None => Parsed::Incomplete,
        Some('{' | '[') => json(held, text, calls),
        Some(_) if format == ToolFormat::Mistral => named(held, text),
        Some(_) => Parsed::Other,
    }
}

/// `name[ARGS]{json}`, perhaps with `[CALL_ID]id` behind the name. Where `[ARGS]` is a special
/// token it may print nothing.
fn named(held: &str, text: &str) -> Parsed {
    let word = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let rest = text.trim_start_matches(word);
    let name = &text[..text.len() - rest.len()];
    let rest = rest.strip_prefix("[CALL_ID]").map_or(rest, |id| id.trim_start_matches(word));
    let json_text = rest.strip_prefix("[ARGS]").map_or(rest, str::trim_start);
    if name.is_empty() {
        Parsed::Other
    } else if json_text.starts_with('{') {
        let call = |value: &Value| Call { name: name.to_owned(), arguments: value.to_string() };
        json(held, json_text, |value| Some(vec![call(value)]))
    } else if json_text.is_empty() || ["[CALL_ID]", "[ARGS]"].iter().any(|m| m.starts_with(rest)) {
        Parsed::Incomplete
    } else {
        Parsed::Other
    }
}

/// The JSON value at the beginning of `text`, the end of `held`, as the calls that it stands for.
fn json(held: &str, text: &str, calls: impl Fn(&Value) -> Option<Vec<Call>>) -> Parsed {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    match values.next() {
        Some(Ok(value)) => match calls(&value) {
            Some(calls) => Parsed::Calls(calls, held.len() - text.len() + values.byte_offset()),
            None => Parsed::Other,
        },
        Some(Err(e)) if e.is_eof() => Parsed::Incomplete,
        Some(Err(_)) | None => Parsed::Other,
    }
}

/// The calls that an object or a list of objects stands for.
fn calls(value: &Value) -> Option<Vec<Call>> {
    match value {
        Value::Array(list) if list.is_empty() => None,
        Value::Array(list) => list.iter().map(call).collect(),
        one => call(one).map(|call| vec![call]),
    }
}

fn call(value: &Value) -> Option<Call> {
    let name = value["name"].as_str().filter(|name| !name.is_empty())?.to_owned();
    let arguments = match value.get("arguments").or_else(|| value.get("parameters"))? {
        Value::Null => "{}".to_owned(),
        Value::String(text) => {
            let object: Value = serde_json::from_str(text).ok()?;
            object.is_object().then(|| text.clone())?
        }
        object => object.is_object().then(|| object.to_string())?,
    };
    Some(Call { name, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ToolFormat::{Hermes, Llama3, Mistral};

    /// What `text` is, read whole and in pieces of every length, which must be the same.
    fn read(format: ToolFormat, text: &str) -> (String, Vec<(String, String)>) {
        let whole = Reader::new(Some(format), usize::MAX).read(text, true);
        let chars: Vec<char> = text.chars().collect();
        for len in 1..=chars.len() {
            let mut reader = Reader::new(Some(format), usize::MAX);
            let mut all = Found::default();
            for piece in chars.chunks(len) {
                let found = reader.read(&piece.iter().collect::<String>(), false);
                all.text += &found.text;
                all.calls.extend(found.calls);
            }
            let found = reader.read("", true);
            all.text += &found.text;
            all.calls.extend(found.calls);
            assert_eq!(all, whole, "{text:?} in pieces of {len}");
        }
        (whole.text, whole.calls.into_iter().map(|c| (c.name, c.arguments)).collect())
    }

    fn calls(calls: &[(&str, &str)]) -> Vec<(String, String)> {
        calls.iter().map(|(name, args)| ((*name).to_owned(), (*args).to_owned())).collect()
    }

    #[test]
    fn hermes_calls() {
        let one =
            "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"b\": 2, \"a\": 1.5}}\n</tool_call>";
        let add = ("add", r#"{"b":2,"a":1.5}"#);
        assert_eq!(read(Hermes, one), (String::new(), calls(&[add])));
        let two = format!("I will.\n{one}\n{one}\n");
        assert_eq!(read(Hermes, &two), ("I will.".into(), calls(&[add, add])));
        let around = format!("a {one} b <tool");
        assert_eq!(read(Hermes, &around), ("a b <tool".into(), calls(&[add])));
        let tags = r#"<tool_call>{"name": "f", "arguments": {"x": "</tool_call>{é"}}</tool_call>"#;
        let x = ("f", r#"{"x":"</tool_call>{é"}"#);
        assert_eq!(read(Hermes, tags), (String::new(), calls(&[x])));
        // The end of the answer closes as well.
        let open = r#"<tool_call>{"name": "f", "arguments": "{\"x\": 1}"}"#;
        assert_eq!(read(Hermes, open), (String::new(), calls(&[("f", r#"{"x": 1}"#)])));
    }

    #[test]
    fn llama_calls() {
        let one = r#"{"name": "get_weather", "parameters": {"place": "Zürich"}}"#;
        let weather = ("get_weather", r#"{"place":"Zürich"}"#);
        assert_eq!(read(Llama3, one), (String::new(), calls(&[weather])));
        let marked = format!("<|python_tag|>{one}; {one}");
        assert_eq!(read(Llama3, &marked), (String::new(), calls(&[weather, weather])));
        let lines = format!("\n{one}\n{one}");
        assert_eq!(read(Llama3, &lines), (String::new(), calls(&[weather, weather])));
        let said = format!("Like {one}");
        assert_eq!(read(Llama3, &said), (said.clone(), vec![]));
    }

    #[test]
    fn mistral_calls() {
        let two = r#"[TOOL_CALLS][{"name": "a", "arguments": {}, "id": "123456789"}, {"name": "b", "arguments": {"c": [1]}}]"#;
        let both = calls(&[("a", "{}"), ("b", r#"{"c":[1]}"#)]);
        assert_eq!(read(Mistral, two), (String::new(), both.clone()));
        assert_eq!(read(Mistral, &format!("Well. {two}")), ("Well.".into(), both));
    }

    #[test]
    fn newer_mistral_calls() {
        let one = r#"[TOOL_CALLS]get_weather[ARGS]{"place": "Zürich [ARGS] {"}"#;
        let weather = ("get_weather", r#"{"place":"Zürich [ARGS] {"}"#);
        assert_eq!(read(Mistral, one), (String::new(), calls(&[weather])));
        let two = format!("Well. {one}[TOOL_CALLS]a-b.c[CALL_ID]9Vx2kLm4a[ARGS] {{}}");
        assert_eq!(read(Mistral, &two), ("Well.".into(), calls(&[weather, ("a-b.c", "{}")])));
        // As it prints where `[ARGS]` is special.
        let hidden = r#"[TOOL_CALLS]f{"x": [1]}"#;
        assert_eq!(read(Mistral, hidden), (String::new(), calls(&[("f", r#"{"x":[1]}"#)])));
        assert_eq!(read(Hermes, hidden), (hidden.to_owned(), vec![]));
        let mut reader = Reader::new(Some(Mistral), 1);
        assert_eq!(reader.read("[TOOL_CALLS]f[AR", false), Found::default());
        assert_eq!(reader.read("GS]{\"a\": 1", false), Found::default());
        assert_eq!(reader.read("}", false).calls.len(), 1);
        let mut reader = Reader::new(Some(Mistral), 1);
        assert_eq!(reader.read("[TOOL_CALLS]no", false), Found::default());
        assert_eq!(reader.read(" call", false).text, "[TOOL_CALLS]no call", "told at once");
    }

    #[test]
    fn what_only_looks_like_a_call_stays_text() {
        for text in [
            "",
            " \n",
            " plain {} [] text\n\n",
            "<tool_call>not json</tool_call>",
            "<tool_call>{\"name\": \"f\", \"argum",
            "a \n<tool_call> {\"name\": 3, \"arguments\": {}}</tool_call> b",
            "<tool_call>{\"name\": \"f\", \"arguments\": [1]}",
            "a <tool_cal",
        ] {
            assert_eq!(read(Hermes, text), (text.to_owned(), vec![]));
        }
        for text in
            ["{\"name\": \"Bob\"}", " {\"a\": {", "{x}", "<|python_tag|>print(1)", "{\"a\": 1} b"]
        {
            assert_eq!(read(Llama3, text), (text.to_owned(), vec![]));
        }
        for text in [
            "[TOOL_CALLS][]",
            "[TOOL_CALLS] [1]",
            "[TOOL",
            "[1, 2]",
            "[TOOL_CALLS]f",
            "[TOOL_CALLS]f[ARGS]",
            "[TOOL_CALLS]f[ARGS][1]",
            "[TOOL_CALLS]f[ARGS]{\"a\": 1",
            "[TOOL_CALLS]f {\"a\": 1}",
            "[TOOL_CALLS][ARGS]{}",
            "[TOOL_CALLS]f[CALL_ID]x[ARG",
        ] {
            assert_eq!(read(Mistral, text), (text.to_owned(), vec![]));
        }
    }

    #[test]
    fn calls_come_when_they_are_complete_and_text_is_not_held() {
        let mut reader = Reader::new(Some(Hermes), 1);
        assert_eq!(reader.read("Sure, ", false).text, "Sure,");
        assert_eq!(reader.read("here <", false).text, " here");
        assert_eq!(reader.read("b> ", false).text, " <b>");
        let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}";
        assert_eq!(reader.read(call, false), Found::default());
        let found = reader.read("}", false);
        assert_eq!((found.text.as_str(), found.calls.len()), ("", 1));
        // There was room for one.
        assert_eq!(reader.read(&format!("</tool_call>{call}}}"), true), Found::default());
    }

    #[test]
    fn without_a_form_everything_is_text() {
        let mut reader = Reader::new(None, 1);
        assert_eq!(reader.read(" <tool_call>{", false).text, " <tool_call>{");
    }
}
