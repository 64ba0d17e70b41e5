//! Renders a chat as the text its model was trained on, by the Jinja template that comes with it.
//!
//! Input: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`, else
//! `chat_template.json`; special tokens from `tokenizer_config.json`; messages as the OpenAI API
//! writes them. Output: text to be encoded without adding special tokens.
//!
//! Not here: reading requests, tool calls in answers. Jinja itself is the crate `minijinja`;
//! `python.rs` makes it print and call as the original. What a template does is bounded in
//! instructions and stack; with memory it is trusted, like the weights it comes with.

mod json;
mod python;
mod strftime;
#[cfg(test)]
mod tests;

use crate::Error;
use crate::files::ModelFiles;
use crate::tokenizer::{TokenizerConfig, object};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

/// Instructions a rendering may run: ten thousand messages at 200 each.
const FUEL: u64 = 2_000_000;

/// Longest template in bytes; published ones stay below 40 thousand.
const SOURCE_BYTES_MAX: usize = 256 << 10;

/// Stack for compiling and rendering, most of it never touched. Long chains of operators and
/// deeply nested lists take up to about 800 bytes a level, of which the two limits above allow
/// 256 thousand.
const STACK_BYTES: usize = 256 << 20;

/// What a template is given.
#[derive(Debug, Clone, Copy)]
pub struct ChatInput<'a> {
    /// Array of message objects, at least one. Null values of a message count as absent.
    pub messages: &'a Value,
    /// Array of tool descriptions, if the caller offers any.
    pub tools: Option<&'a Value>,
    /// Whether to end with the beginning of an answer.
    pub add_generation_prompt: bool,
    /// More variables, such as `enable_thinking`; they win over special tokens, not over the
    /// fields above. `now` (seconds since 1970, local time) is needed by templates that call
    /// `strftime_now`.
    pub extra: &'a Map<String, Value>,
}

/// A model's chat templates, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    tokens: Vec<(&'static str, String)>,
    /// Name and text of each template, as they were found.
    sources: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Finds and compiles the templates; none if the model comes without.
    ///
    /// # Errors
    /// [`Error::Template`] if one is no valid template, [`Error::Json`], [`Error::Config`] or
    /// [`Error::Io`] if a file cannot be used.
    pub fn from_files(files: &ModelFiles) -> Result<Option<Self>, Error> {
        let config = TokenizerConfig::read(files)?;
        let sources = sources(files, &config)?;
        if sources.is_empty() {
            return Ok(None);
        }
        Self::compiled(sources, &config).map(Some)
    }

    /// Compiles `source` in place of the model's own template; special tokens still come from the
    /// model's `files`.
    ///
    /// # Errors
    /// As [`ChatTemplate::from_files`].
    pub fn from_source(source: String, files: &ModelFiles) -> Result<Self, Error> {
        Self::compiled(vec![("default".into(), source)], &TokenizerConfig::read(files)?)
    }

    fn compiled(sources: Vec<(String, String)>, config: &TokenizerConfig) -> Result<Self, Error> {
        let env = on_deep_stack(|| compile(&sources))?;
        let tokens = config.tokens().map(|(key, token)| (key, token.to_owned())).collect();
        Ok(Self { env, tokens, sources })
    }

    /// The template that is used, as the model's author wrote it: for conversations with tools or
    /// for those without; empty if there is none for them.
    pub fn source(&self, tools: bool) -> &str {
        let named = |name| self.sources.iter().find(|(n, _)| n == name);
        let source = named("tool_use").filter(|_| tools).or_else(|| named("default"));
        source.map_or("", |(_, text)| text)
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own words if it raises an exception, else with what
    /// it could not do.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, Error> {
        let template = self.choose(input.tools.is_some())?;
        let variables = self.variables(input)?;
        on_deep_stack(|| template.render(variables).map_err(|e| failed(&e)))
    }

    /// Template `tool_use` if there is one and tools are given, else `default`.
    fn choose(&self, tools: bool) -> Result<minijinja::Template<'_, '_>, Error> {
        if tools && let Ok(template) = self.env.get_template("tool_use") {
            return Ok(template);
        }
        self.env.get_template("default").map_err(|_| {
            let names: Vec<&str> = self.env.templates().map(|(name, _)| name).collect();
            refused(&format!("there is none called default, only {}", names.join(", ")))
        })
    }

    fn variables(&self, input: &ChatInput<'_>) -> Result<minijinja::Value, Error> {
        let tokens = self.tokens.iter().map(|(key, token)| (*key, token.as_str().into()));
        let given = [
            ("messages", messages(input.messages)?),
            ("tools", input.tools.map_or_else(|| ().into(), python::value)),
            ("add_generation_prompt", input.add_generation_prompt.into()),
        ];
        let documents = [("documents", ().into())];
        let extra = input.extra.iter().map(|(key, json)| (key.as_str(), python::value(json)));
        Ok(python::dict(tokens.chain(documents).chain(extra).chain(given)))
    }
}

/// The messages without their null values.
fn messages(messages: &Value) -> Result<minijinja::Value, Error> {
    let list = messages.as_array().ok_or_else(|| refused("messages must be an array"))?;
    if list.is_empty() {
        return Err(refused("the conversation is empty: give at least one message"));
    }
    let clean = |message: &Value| {
        let fields = message.as_object().ok_or_else(|| refused("a message must be an object"))?;
        let present = fields.iter().filter(|(_, value)| !value.is_null());
        Ok(python::dict(present.map(|(key, json)| (key.as_str(), python::value(json)))))
    };
    list.iter().map(clean).collect()
}

/// Name and text of each template of the model.
fn sources(files: &ModelFiles, config: &TokenizerConfig) -> Result<Vec<(String, String)>, Error> {
    if let Some(bytes) = files.read("chat_template.jinja")? {
        let text = String::from_utf8(bytes.into_owned())
            .map_err(|e| refused(&format!("chat_template.jinja is not UTF-8: {e}")))?;
        return Ok(vec![("default".into(), text)]);
    }
    let file = object(files, "chat_template.json")?;
    match config.value("chat_template").or_else(|| file.get("chat_template")) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![("default".into(), text.clone())]),
        Some(Value::Array(list)) => list.iter().map(|entry| named(entry, config)).collect(),
        Some(other) => Err(misshapen(config, other)),
    }
}

fn named(entry: &Value, config: &TokenizerConfig) -> Result<(String, String), Error> {
    match (entry["name"].as_str(), entry["template"].as_str()) {
        (Some(name), Some(text)) => Ok((name.into(), text.into())),
        _ => Err(misshapen(config, entry)),
    }
}

fn misshapen(config: &TokenizerConfig, found: &Value) -> Error {
    Error::Config {
        path: config.path().to_owned(),
        key: "chat_template".into(),
        expected: "a text or a list of {name, template}".into(),
        found: found.to_string().chars().take(80).collect(),
    }
}

fn compile(sources: &[(String, String)]) -> Result<Environment<'static>, Error> {
    let mut env = environment()?;
    for (name, source) in sources {
        if source.len() > SOURCE_BYTES_MAX {
            let len = source.len();
            return Err(refused(&format!("{name} has {len} bytes, limit {SOURCE_BYTES_MAX}")));
        }
        env.add_template_owned(name.clone(), python::prepare(source)).map_err(|e| failed(&e))?;
    }
    Ok(env)
}

/// Runs `work` where hostile nesting cannot overflow the stack.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| refused(&format!("no stack to render on: {e}")))?;
        thread.join().unwrap_or_else(|_| Err(refused("the template engine failed")))
    })
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| failed(&e))?);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_fuel(Some(FUEL));
    python::install(&mut env);
    Ok(env)
}

/// Why rendering or compiling failed: the template's own words if it called `raise_exception`.
fn failed(error: &minijinja::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(python::Raised(words)) = inner.downcast_ref() {
            return refused(words);
        }
        cause = inner.source();
    }
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => refused("it runs too long"),
        (kind, Some(detail)) => refused(&format!("{kind}: {detail}{line}")),
        (kind, None) => refused(&format!("{kind}{line}")),
    }
}

fn refused(reason: &str) -> Error {
    Error::Template { reason: reason.into() }
}
